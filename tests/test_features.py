"The feature cache must not hand out what another transform made"
import subprocess
import sys

import pytest
from fspn_nb.batches import features
from fspn_nb.config import finediving
from fspn_nb.data.records import Sample
from fspn_nb.file_hashes import frame_hashes


@pytest.fixture
def dive(tmp_path):
    for i in range(3): (tmp_path/f'{i:05d}.jpg').write_bytes(b'x'*(i+1))
    return Sample('01/1', 'train', '407c', 88., 3.2, tmp_path, tuple(f'{i:05d}.jpg' for i in range(3)))


def frames(dive): return frame_hashes([dive])[dive.uid]


def test_changed_code_is_another_key(dive, monkeypatch):
    cfg = finediving('smoke')
    before = features.feature_key(dive, cfg, None, 'w', frames(dive))
    assert features.feature_key(dive, cfg, None, 'w', frames(dive)) == before
    monkeypatch.setattr(features, 'clip_code_hash', lambda clip: 'mended')
    assert features.feature_key(dive, cfg, None, 'w', frames(dive)) != before


def test_changed_frame_is_another_key(dive):
    cfg = finediving('smoke')
    before = features.feature_key(dive, cfg, None, 'w', frames(dive))
    (dive.folder/dive.files[1]).write_bytes(b'yy') # of the same size
    assert features.feature_key(dive, cfg, None, 'w', frames(dive)) != before


def test_clip_stride_is_another_key(dive):
    a,b = finediving('smoke'),finediving('smoke', clip__starts=(0,40))
    assert features.feature_key(dive, a, None, 'w', 'f') != features.feature_key(dive, b, None, 'w', 'f')


def test_maps_and_cells_are_the_same_backbone_looked_at_otherwise(tmp_path):
    import torch
    from fspn_nb.training.prepare import prepare
    base = dict(synthetic__n_train=6, synthetic__n_test=4, weights='random')
    plain = prepare(finediving('smoke', **base), 'cpu')
    tsa = prepare(finediving('smoke', **base, model__name='tsa'), 'cpu', reuse=plain)
    tpt = prepare(finediving('smoke', **base, model__name='tpt'), 'cpu', reuse=tsa)
    assert plain.source.extra == {} and set(tsa.source.extra) == {'feature_maps'} and set(tpt.source.extra) == {'short_clip_features'}
    assert tsa.source.extra['feature_maps'].shape == (10, 9, 1024, 2, 2) and tpt.source.extra['short_clip_features'].shape == (10, 20, 1024)
    assert torch.allclose(tsa.source.extra['feature_maps'].mean((3, 4)), plain.source.scene, atol=1e-4)
    again = prepare(finediving('smoke', **base, model__name='tpt'), 'cpu')
    assert torch.equal(again.source.extra['short_clip_features'], tpt.source.extra['short_clip_features'])


@pytest.mark.parametrize('name', ['tsa', 'tpt', 'hgcn'])
def test_peers_train_in_both_modes(name, tmp_path):
    from fspn_nb.evaluate import evaluate
    from fspn_nb.training.prepare import prepare
    from fspn_nb.train import fit
    small = dict(synthetic__n_train=6, synthetic__n_test=4, weights='random', model__name=name, train__epochs=1, clip__size=32)
    for mode in ('frozen', 'finetune'):
        cfg = finediving('smoke', **small, train__backbone=mode, model__adapter=mode == 'frozen', train__batch_size=2)
        data = prepare(cfg, 'cpu')
        m = evaluate(fit(cfg, tmp_path/mode, 'cpu', data), data)
        assert m['n'] == 4 and m['mode'] == mode


def test_an_unknown_kind_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="need 'feature_maps' or 'short_clip_features'"): features.cache_kind([], finediving('smoke'), None, 'w', tmp_path, 'flow', {})


def test_a_run_starts_without_what_only_decoding_needs():
    "torchvision (which loads torch's compiler), SciPy's statistics and Matplotlib take a second and a half and 170 MB: a run on kept features does without"
    code = "import sys, fspn_nb.train; print(sorted({'torchvision', 'torch._dynamo', 'scipy.stats', 'matplotlib'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True).stdout.split('\n')[-2] == '[]'
