"The frame store: the same clips as decoding, and never a stale or a damaged record"
from collections import namedtuple
from dataclasses import replace
import os
import shutil

import numpy as np
import pytest
import torch

from fspn_nb.actor.boxes import load_actor_boxes
from fspn_nb.batches import frame_store as S,store_source as stored
from fspn_nb.batches.dataset import load_samples
from fspn_nb.batches.sources import ClipDataset
from fspn_nb.batches.store_source import CachedDataset,choose_source,sample_augmentation
from fspn_nb.config import override,make_config


@pytest.fixture(scope='module')
def release():
    cfg = make_config('finediving', 'smoke', train__flip_prob=.5)
    made = load_samples(cfg)
    return cfg,made.samples[:3],load_actor_boxes(made, cfg.actor)[1]


@pytest.fixture(scope='module')
def made(release, tmp_path_factory):
    "Records of three dives, copied by the tests that spoil them"
    cfg,samples,boxes = release
    folder = tmp_path_factory.mktemp('store')
    return S.build_store(samples, cfg, boxes, folder)


@pytest.fixture
def own(made, tmp_path):
    "A copy of the records that a test may spoil"
    for p in made.paths: shutil.copy(p, tmp_path/p.name)
    return tmp_path


@pytest.fixture
def moved(release, tmp_path):
    "The same dives with frame files of their own"
    cfg,samples,boxes = release
    for sample in samples: shutil.copytree(sample.folder, tmp_path/'frames'/sample.uid)
    return cfg,[replace(sample, folder=tmp_path/'frames'/sample.uid) for sample in samples],boxes


def written(monkeypatch):
    "The names of the dives that are decoded from now on"
    seen = []
    monkeypatch.setattr(S, 'write_record', lambda path, sample, *rest, write=S.write_record: (seen.append(sample.uid), write(path, sample, *rest))[1])
    return seen


def rot(path, at):
    "Flip one bit of the file, in a new file of the same name as a bad copy would be"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.unlink()
    path.write_bytes(data)


@pytest.mark.parametrize('orientation', ['correct', 'peer'])
def test_same_clips_as_decoding(release, tmp_path, orientation):
    cfg,samples,boxes = release
    cfg,samples = override(cfg, clip__orientation=orientation),samples[:2]
    plain,stored = ClipDataset(samples, cfg, boxes),CachedDataset(S.build_store(samples, cfg, boxes, tmp_path))
    ids,flips = np.array([1,0]),set()
    for rng_key in (None, *((e, 3) for e in range(4))):
        (s,a),(s0,a0) = plain.get_batch(ids, rng_key),stored.get_batch(ids, rng_key)
        assert torch.equal(s, s0)
        for i,x,y in zip(ids, a, a0):
            flip = sample_augmentation(cfg, rng_key, int(i))[0]
            flips.add(flip)
            apart = (x.int()-y.int()).abs()
            assert apart.max() <= int(flip) and (apart > 0).float().mean() < 1e-3
    assert flips == {True,False}


def test_without_boxes_the_scene_plays_the_actor(release, tmp_path):
    cfg,samples,boxes = release
    mixed = boxes | {samples[0].uid: None}
    plain,stored = ClipDataset(samples[:2], cfg, mixed),CachedDataset(S.build_store(samples[:2], cfg, mixed, tmp_path))
    for x,y in zip(plain.get_batch(np.array([0,1])), stored.get_batch(np.array([0,1]))): assert torch.equal(x, y)
    x,y = stored.get_batch(np.array([0]), (1, 3))
    assert torch.equal(x, y)


def test_killed_build_goes_on(release, tmp_path, monkeypatch):
    cfg,samples,boxes = release
    def killed(sample, *rest, real=S.store_frames):
        if sample.uid == samples[1].uid: raise KeyboardInterrupt
        return real(sample, *rest)
    with monkeypatch.context() as m:
        m.setattr(S, 'store_frames', killed)
        with pytest.raises(KeyboardInterrupt): S.build_store(samples, cfg, boxes, tmp_path, workers=1)
    assert len(list(tmp_path.iterdir())) < 3 and not list(tmp_path.glob('*.part')) # whole records, no half ones
    left = {p.name for p in tmp_path.iterdir()}
    assert S.record_name(samples[0], cfg, boxes[samples[0].uid]) in left
    seen = written(monkeypatch)
    store = S.build_store(samples, cfg, boxes, tmp_path)
    assert samples[0].uid not in seen and samples[1].uid in seen
    assert S.verify_store(store) == {}


def test_changed_frame_of_the_same_size(moved, own, monkeypatch, capsys):
    cfg,samples,boxes = moved
    assert S.verify_store(S.build_store(samples, cfg, boxes, own)) == {} # copied frames: other times, same bytes
    frame = samples[1].folder/samples[1].files[0]
    data = bytearray(frame.read_bytes())
    data[-3] ^= 1 # inside the picture
    frame.write_bytes(data)
    os.utime(frame, ns=(0, 0))
    seen = written(monkeypatch)
    capsys.readouterr()
    S.build_store(samples, cfg, boxes, own)
    assert seen == [samples[1].uid]
    assert f'dive {samples[1].uid} is made again, its frame files' in capsys.readouterr().out
    seen.clear()
    S.build_store(samples, cfg, boxes, own)
    assert not seen


def test_changed_size_and_changed_boxes(moved, own, monkeypatch):
    cfg,samples,boxes = moved
    with open(samples[2].folder/samples[2].files[5], 'ab') as f: f.write(b'x')
    seen = written(monkeypatch)
    S.build_store(samples, cfg, boxes, own)
    assert seen == [samples[2].uid]
    seen.clear()
    S.build_store(samples, cfg, boxes | {samples[0].uid: boxes[samples[0].uid]+1}, own)
    assert seen == [samples[0].uid]


@pytest.mark.parametrize('at', [20, 300, -1])
def test_one_flipped_bit(release, own, monkeypatch, capsys, at):
    cfg,samples,boxes = release
    store = S.build_store(samples, cfg, boxes, own)
    rot(store.paths[0], at)
    assert list(S.verify_store(store)) == [samples[0].uid]
    seen = written(monkeypatch)
    S.build_store(samples, cfg, boxes, own)
    assert seen == [samples[0].uid]
    assert f'dive {samples[0].uid} is made again' in capsys.readouterr().out
    assert S.verify_store(store) == {}


def test_too_small_a_disk(release, tmp_path, monkeypatch, capsys):
    cfg,samples,boxes = release
    monkeypatch.setattr(S.shutil, 'disk_usage', lambda p: namedtuple('U', 'total used free')(10, 0, 10))
    with pytest.raises(OSError, match='need 0.01 GB for the frames of 3 dives, got 0.00 GB free.*ClipDataset'): S.build_store(samples, cfg, boxes, tmp_path)
    assert not list(tmp_path.iterdir())
    assert 'MB to be written' in capsys.readouterr().out # said before
    assert type(choose_source(samples, cfg, boxes, tmp_path)) is ClipDataset
    assert 'the disk is too small' in capsys.readouterr().out


def test_memory_or_map(release, made, monkeypatch, capsys):
    cfg,samples,boxes = release
    folder = made.paths[0].parent
    for free,message in ((10**12, 'held in memory'), (10**6, 'mapped from disk')):
        monkeypatch.setattr(stored, 'free_memory', lambda: free)
        assert type(choose_source(samples, cfg, boxes, folder)) is CachedDataset
        assert message in capsys.readouterr().out


def test_nothing_to_store(release, tmp_path):
    cfg = release[0]
    store = S.build_store([], cfg, {}, tmp_path)
    assert (store.rows, store.nbytes, S.verify_store(store)) == ((), 0, {})


def test_missing_frame_is_named(moved, tmp_path):
    cfg,samples,boxes = moved
    gone = samples[1].folder/samples[1].files[7]
    gone.unlink()
    with pytest.raises(ValueError, match=f'dive {samples[1].uid}: need the frame .*{gone.name}.*FileNotFoundError'): S.build_store(samples, cfg, boxes, tmp_path/'s')
    with pytest.raises(ValueError, match='has no frames on disk'): S.build_store([replace(samples[0], files=())], cfg, boxes, tmp_path/'s')


def test_threads_are_given_back(release, made):
    before = torch.get_num_threads()
    S.verify_store(made)
    assert torch.get_num_threads() == before
