"The quick part of the table of stages x faults; the whole table: python tests/break_it.py"
import os
from unittest.mock import patch

import pytest

from fault_cases import Absent,load_cases


@pytest.mark.parametrize('case', [c for c in load_cases() if c.quick], ids=lambda c: c.name)
def test_fault(case, tmp_path):
    "The case holds, and the user gets a sentence"
    with patch.dict(os.environ): # a case may name a cache of its own
        try: result = case.run(tmp_path)
        except Absent as error: pytest.skip(str(error))
    assert result.message
