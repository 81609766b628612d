"The frame store: the same clips as decoding, and never a stale or a damaged record"
from collections import namedtuple
from dataclasses import replace
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from fspn_nb.actor.boxes import load_actor_boxes
from fspn_nb.actor.crop import crop_actor
from fspn_nb.batches import frame_store as S,sources,store_source as stored
from fspn_nb.batches.dataset import load_samples
from fspn_nb.batches.sources import ClipDataset,dive_clips
from fspn_nb.batches.store_source import CachedDataset,choose_source,sample_augmentation
from fspn_nb.config import override,make_config
from fspn_nb.data.clips import frame_indices,load_frames,resize_crop,to_clips
from fspn_nb.data.records import Sample


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
            flips.add(sample_augmentation(cfg, rng_key, int(i), samples[i])[0])
            assert torch.equal(x, y)
    assert flips == {True,False}


# A window that moves ----------------------------------------------------------------------------------------------------------------------------

def broadcast(folder, n, before, after, hw=(72, 128), largest=30, uid='v/1'):
    "A dive of `n` frames of noise in a broadcast that has `before` and `after` frames beside them, and boxes of which the last is the largest"
    folder.mkdir()
    rng,names = np.random.default_rng(n+before),[f'{i:05d}.jpg' for i in range(before+n+after)]
    for name in names: Image.fromarray(rng.integers(0, 256, (*hw, 3), dtype=np.uint8)).save(folder/name, quality=95)
    middle,side = rng.uniform(.3, .7, (n, 2))*hw[::-1],np.array([12.]*(n-1)+[largest])[:, None]
    sample = Sample(uid, 'train', '107B', 80., folder=folder, files=tuple(names[before:before+n]), before=tuple(names[:before]), after=tuple(names[before+n:]))
    return sample, np.hstack([middle-side/2, middle+side/2])


def all_draws(cfg, sample, keys=300):
    "One key per shift, mirrored and not, with the shift"
    draws = {sample_augmentation(cfg, (epoch, 3), 0, sample)[::2]: (epoch, 3) for epoch in range(keys)}
    return {key: offset for (_,offset),key in draws.items()}


T103,T96 = make_config('mtl_aqa').clip,make_config('finediving').clip

@pytest.mark.parametrize('n,before,after,clip,offsets,orientation', [
    (103, 3, 3, dict(frames=103, starts=T103.starts), range(-3, 4), 'correct'), # ten clips, inside a broadcast
    (96, 1, 1, dict(frames=96, starts=T96.starts), range(-1, 2), 'correct'), # nine clips, one frame on each side
    (20, 3, 0, dict(frames=20, starts=(0,4)), range(-3, 1), 'peer'), # at the end
    (20, 0, 3, dict(frames=20, starts=(0,4)), range(0, 4), 'correct'), # at the beginning
    (20, 0, 0, dict(frames=20, starts=(0,4)), [0], 'correct'), # alone
    (7, 5, 2, dict(frames=20, starts=(0,4)), range(-3, 3), 'peer'), # a short video: the axis repeats its frames
    (50, 3, 3, dict(frames=20, starts=(0,4)), range(-3, 4), 'correct'), # a long one: the axis skips two of three
])
def test_a_window_that_moves(tmp_path, n, before, after, clip, offsets, orientation):
    sample,table = broadcast(tmp_path/'frames', n, before, after)
    cfg = make_config('mtl_aqa', 'smoke', train__temporal_jitter=3, clip__size=32, clip__orientation=orientation, **{f'clip__{name}': value for name,value in clip.items()})
    boxes,keys = {sample.uid: table},all_draws(cfg, sample)
    assert sorted(set(keys.values())) == list(offsets) and len(keys) == 2*len(offsets), 'each shift, mirrored and not'
    decoded,store = ClipDataset([sample], cfg, boxes),S.build_store([sample], cfg, boxes, tmp_path/'store')
    kept = CachedDataset(store)
    for key in (None, *keys):
        for x,y in zip(decoded.get_batch([0], key), kept.get_batch([0], key)): assert torch.equal(x, y), keys.get(key)
    unmoved = CachedDataset(S.build_store([sample], override(cfg, train__temporal_jitter=0), boxes, tmp_path/'store'))
    assert torch.equal(unmoved.get_batch([0])[0], kept.get_batch([0])[0]), 'evaluation reads the window where it was annotated'
    assert set(store.rows[0]) == {'scene','actor'}|({'actor_1'} if before else set()), 'without the largest box crops are sampled less finely'
    assert store.nbytes == S.record_bytes(sample, cfg, table)
    assert len(list((tmp_path/'store').iterdir())) == 1+(before+after > 0), 'a window that cannot move needs no record of its own'


def test_only_the_neighbours_that_can_be_reached_are_kept(tmp_path):
    sample,table = broadcast(tmp_path/'frames', 20, 9, 9)
    for jitter in (0, 1, 3): assert S.record_bytes(sample, cfg := make_config('mtl_aqa', 'smoke', clip__frames=20, train__temporal_jitter=jitter), None) == (20+2*jitter)*3*64*114
    assert S.reachable_files(sample, cfg).files == tuple(f'{i:05d}.jpg' for i in range(6, 32))


def test_a_neighbour_that_changes_or_lacks(tmp_path, monkeypatch, capsys):
    sample,table = broadcast(tmp_path/'frames', 20, 3, 3)
    cfg = make_config('mtl_aqa', 'smoke', clip__frames=20, clip__starts=(0,4), clip__size=32, train__temporal_jitter=2)
    boxes,build = {sample.uid: table},lambda jitter: S.build_store([sample], override(cfg, train__temporal_jitter=jitter), boxes, tmp_path/'store')
    for jitter in (0, 2): build(jitter)
    seen = written(monkeypatch)
    for name,made in (('00001.jpg',[2]), ('00000.jpg',[])): # the second is out of reach
        Image.new('RGB', (128, 72), (9, 9, 9)).save(tmp_path/'frames'/name)
        for jitter in (0, 2):
            build(jitter)
            assert bool(seen) == (jitter in made)
            seen.clear()
    assert capsys.readouterr().out.count('made again, its frame files') == 1
    (tmp_path/'frames'/'00001.jpg').unlink()
    build(0)
    with pytest.raises(ValueError, match='dive v/1: need the frame .*00001.jpg'): build(2)
    Image.new('RGB', (128, 72)).save(tmp_path/'frames'/'00001.jpg')
    short = replace(sample, start_frame=1, end_frame=22) # two frames fewer than it says, and frames of the broadcast behind them
    for source in (lambda: ClipDataset([short], cfg, boxes).get_batch([0], (1, 3)), lambda: S.build_store([short], cfg, boxes, tmp_path/'other')):
        with pytest.raises(ValueError, match='need positions 0..19, got 0..21'): source()


def test_a_store_serves_windows_that_move_less(tmp_path):
    sample,table = broadcast(tmp_path/'frames', 20, 3, 3)
    cfg = make_config('mtl_aqa', 'smoke', clip__frames=20, clip__starts=(0,4), clip__size=32, train__temporal_jitter=3)
    boxes,less = {sample.uid: table},override(cfg, train__temporal_jitter=1)
    store = S.build_store([sample], cfg, boxes, tmp_path/'store')
    kept,decoded = CachedDataset(store, less),ClipDataset([sample], less, boxes)
    for key,offset in all_draws(less, sample).items():
        for x,y in zip(decoded.get_batch([0], key), kept.get_batch([0], key)): assert torch.equal(x, y), offset
    for other in (0, 4):
        with pytest.raises(ValueError, match=f'move by up to {other} frames .*, got one for 3; build_store'): CachedDataset(store, override(cfg, train__temporal_jitter=other))


def test_training_with_a_moving_window_is_that_of_decoding(tmp_path):
    from fspn_nb.train import fit
    from fspn_nb.training.prepare import prepare
    cfg = make_config('mtl_aqa', 'smoke', clip__size=32, clip__starts=(40,), model__clips=1, weights='random', model__name='i3d_mlp',
                      train__backbone='finetune', model__adapter=False, train__epochs=1, train__temporal_jitter=3)
    data = prepare(cfg, 'cpu')
    assert type(data.source) is CachedDataset and len(data.source.store.rows[0]['scene']) > cfg.clip.frames
    assert prepare(override(cfg, seed=1), 'cpu', data).source.store is data.source.store, 'the next seed reads the same store'
    assert prepare(override(cfg, train__temporal_jitter=0), 'cpu', data).source.store is not data.source.store
    again = replace(prepare(cfg, 'cpu', data), source=ClipDataset(data.release.samples, cfg, data.boxes[1]))
    a,b = (torch.load(fit(cfg, tmp_path/name, 'cpu', d)/'last.pt', weights_only=True)['model'] for name,d in (('kept',data), ('decoded',again)))
    assert all(torch.equal(a[name], b[name]) for name in a)


# Decoding in portions ---------------------------------------------------------------------------------------------------------------------------

def clips_at_once(sample, clip, boxes, pad):
    "The clips of a dive as from a program that decodes all frames first"
    ids = frame_indices(sample, clip.frames)
    frames = load_frames(sample, ids)
    streams = resize_crop(frames, clip.size, clip.orientation),crop_actor(frames, boxes[ids], clip.size, pad)
    return [to_clips(x, clip.starts, clip.length).transpose(1, 2).contiguous() for x in streams]


@pytest.mark.parametrize('n,hw', [(96, (72, 128)), (97, (128, 72)), (9, (37, 91)), (41, (100, 100))])
def test_portions_change_no_bit_and_need_little_memory(tmp_path, monkeypatch, n, hw):
    sample,table = broadcast(tmp_path/'frames', n, 0, 0, hw)
    portions = []
    monkeypatch.setattr(sources, 'load_frames', lambda sample, ids: (portions.append(len(ids)), load_frames(sample, ids))[1])
    for size in (32, 57):
        clip = replace(T96, frames=max(n, 20) if n < 90 else n, starts=(0,4), size=size)
        for x,y in zip(dive_clips(sample, clip, table), clips_at_once(sample, clip, table, .2)): assert torch.equal(x, y)
    assert max(portions) == 8


def test_real_frames_are_kept_as_they_are_decoded(shared, tmp_path):
    folder = shared('data','finediving','FINADiving_MTL_256s','Budapest2021Diving10mPlatformWomenFinal_1','2')
    names = tuple(sorted(path.name for path in folder.glob('*.jpg')))
    sample = Sample('v/1', 'train', '107B', 80., folder=folder, files=names[4:-4], before=names[:4], after=names[-4:]) # 103 of 111
    boxes = {sample.uid: np.random.default_rng(0).uniform(20, 60, (103, 4))+[100, 50, 160, 110]}
    cfg = make_config('mtl_aqa', 'smoke', clip__size=112, train__temporal_jitter=3)
    store = S.build_store([sample], cfg, boxes, tmp_path)
    assert [len(x) for x in store.rows[0].values()] == [109,109]
    kept,decoded = CachedDataset(store),ClipDataset([sample], cfg, boxes)
    for key,offset in list(all_draws(cfg, sample).items())[:4]:
        for x,y in zip(decoded.get_batch([0], key), kept.get_batch([0], key)): assert torch.equal(x, y), offset


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
