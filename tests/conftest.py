"What the tests share: where real material may lie, and one small synthetic release"
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def shared_root():
    "The folder with real annotations, frames and weights: FSPN_SHARED, or `shared` beside the checkout"
    return Path(os.environ.get('FSPN_SHARED') or ROOT.parent/'shared')


@pytest.fixture(scope='session')
def shared():
    "A function that returns a path below the real material, or skips and says what was not there"
    def find(*parts):
        path = shared_root().joinpath(*parts)
        if not path.exists(): pytest.skip(f'real material absent: {"/".join(parts)} (set FSPN_SHARED to the folder that holds it)')
        return path
    return find
