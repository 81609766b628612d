"A slice of the fuzz run over the real annotation files; `python tests/fuzz_annotations.py FOLDER` does all of it"
import os
import pickle

import pytest
from fuzz_annotations import READERS, fuzz

from fspn_nb.data.safe_pickle import load_pickle

FINE = {'named error', 'reported exclusion', 'no effect', 'seen by fspn_check'}


@pytest.mark.parametrize('dataset, n', [('finediving', 14), ('mtl_aqa', 42), ('aqa7', 90)])
def test_damaged_annotations_end_in_words(shared, dataset, n):
    results = fuzz(dataset, shared('data', *READERS[dataset][1].split('/')), n, seed=1)
    assert len(results) == n and not [result for result in results if result[1] not in FINE]
    assert sum(result == 'named error' for _, result in results) > n/5


class Evil:
    def __reduce__(self): return os.system, ('touch pwned',)


@pytest.mark.parametrize('value', [Evil(), {'a': Evil()}, [(('01', 1), {'final_score': Evil()})]])
@pytest.mark.parametrize('protocol', range(6))
def test_a_pickle_that_would_run_a_command_is_refused(tmp_path, monkeypatch, value, protocol):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'train_split.pkl').write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(ValueError, match=r'train_split\.pkl.*(posix|nt)\.system'): load_pickle(tmp_path/'train_split.pkl')
    assert not (tmp_path/'pwned').exists()
