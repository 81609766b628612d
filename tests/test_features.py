"The feature cache must not hand out what another transform made"
import pytest
from fspn_nb.config import finediving
from fspn_nb.data import features
from fspn_nb.data.records import Sample


@pytest.fixture
def dive(tmp_path):
    for i in range(3): (tmp_path/f'{i:05d}.jpg').write_bytes(b'x'*(i+1))
    return Sample('01/1', 'train', '407c', 88., 3.2, tmp_path, tuple(f'{i:05d}.jpg' for i in range(3)))


def test_changed_code_is_another_key(dive, monkeypatch):
    cfg = finediving('smoke')
    before = features.feature_key(dive, cfg, None, 'w')
    assert features.feature_key(dive, cfg, None, 'w') == before
    monkeypatch.setattr(features, '_transform', lambda: 'mended')
    assert features.feature_key(dive, cfg, None, 'w') != before


def test_changed_frame_is_another_key(dive):
    cfg = finediving('smoke')
    before = features.feature_key(dive, cfg, None, 'w')
    (dive.folder/dive.files[1]).write_bytes(b'another frame')
    assert features.feature_key(dive, cfg, None, 'w') != before


def test_clip_stride_is_another_key(dive):
    a,b = finediving('smoke'),finediving('smoke', clip__starts=(0,40))
    assert features.feature_key(dive, a, None, 'w') != features.feature_key(dive, b, None, 'w')
