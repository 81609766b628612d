"""How often "outside what the run was trained on" is said of test dives, and of videos that are: detectors side by side

    FSPN_CACHE=... python tests/novelty_study.py [--releases 1] [--shared ../shared]     into reports/benchmarks/novelty.csv

Features of a frozen backbone, synthetic FineDiving of 130 and 150 dives. Half of the test dives calibrate each detector, the other half counts its false alarms; 200 random halves, means with the middle 95 %.
Foreign videos: two other sports (synthetic AQA-7), dives played backwards, at half the brightness, of MTL-AQA's synthetic release (still frames around the dive), a grey clip, noise, and real frames where `shared` is there.
Dives of another synthetic release of the same kind are not foreign: they should be called outside as rarely as test dives.
One thread; about four minutes the first time, then features are kept.
"""
import argparse
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.spatial.distance import cdist

from conformal_study import release_of,with_others
from fspn_nb.analysis.conformal import rank_test
from fspn_nb.core import data_cache,write_atomic
from fspn_nb.data.clips import resize_crop,to_clips
from fspn_nb.actor.crop import crop_actor
from fspn_nb.inspect.clip import Clip,clip_boxes,kept_frames,read_clip,synthetic_clip
from fspn_nb.models.backbone import feature_extractor

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/'reports'/'benchmarks'/'novelty.csv'
RATE, HALVES, OTHER_SEED = .05, 200, {1: 0, 0: 1}


# ---- videos

def foreign_clips(shared):
    "(kind, clip) of what a run on dives was not trained on"
    for sport in ('gym_vault', 'ski_big_air'):
        for seed in range(3): yield sport.replace('_', ' '), synthetic_clip('aqa7', sport, 556_000_000+seed)
    for seed in range(3):
        dive = synthetic_clip(seed=557_000_000+seed)
        yield 'dive backwards', Clip('backwards', dive.frames[::-1].copy(), boxes=dive.boxes[::-1].copy(), kind='synthetic')
    yield 'grey clip', Clip('grey', np.full((96, 144, 256, 3), 128, np.uint8))
    yield 'noise', Clip('noise', np.random.default_rng(0).integers(0, 256, (96, 144, 256, 3), dtype=np.uint8))
    for name in ('diving_sample.gif', 'actor_frames/images'):
        if (path := Path(shared)/'data'/name).exists(): yield 'real frames: '+name.split('/')[0].split('.')[0], read_clip(path)
        else: print(f'left out: {path} is not there')


def vector_of(clip, cfg, encode):
    "What the backbone sees in `clip`, as `clip_features` has it"
    ids = kept_frames(len(clip.frames), cfg.dataset, cfg.clip.frames)[0]
    boxes, frames = clip_boxes(clip, cfg)[0], torch.from_numpy(clip.frames[ids].copy())
    scene = resize_crop(frames, cfg.clip.size, cfg.clip.orientation)
    actor = scene if boxes is None else crop_actor(frames, boxes[ids], cfg.clip.size, cfg.actor.pad)
    streams = [encode(to_clips(x, cfg.clip.starts, cfg.clip.length).transpose(1, 2).contiguous()).float() for x in (scene, actor)]
    return torch.cat([stream.mean(0) for stream in streams]).numpy()


def all_vectors(release, shared):
    "{kind: (n,2048)}; 'train' and 'test' among them"
    path = data_cache()/f'novelty-{release}.npz'
    if path.is_file(): return dict(np.load(path))
    data = with_others(release_of(release, 0.))
    pooled = torch.cat([data.source.scene.mean(1), data.source.actor.mean(1)], 1).numpy()
    found = {kind: pooled[data.splits[split]] for kind, split in (('train', 'train'), ('test', 'test'), ('MTL-AQA dive', 'other'), ('dive, half as bright', 'dark'))}
    again = release_of(OTHER_SEED[release], 0.)
    found['dive of another release'] = torch.cat([again.source.scene.mean(1), again.source.actor.mean(1)], 1).numpy()[again.splits['test']]
    encode, rows = feature_extractor(data.cfg, data.device)[0], {}
    for k, (kind, clip) in enumerate(foreign_clips(shared)):
        kept = path.with_name(f'{path.stem}-{k}.npy')
        if not kept.is_file(): np.save(kept, vector_of(clip, data.cfg, encode))
        rows.setdefault(kind, []).append(np.load(kept))
    found |= {kind: np.stack(own) for kind, own in rows.items()}
    np.savez(path, **found)
    return found


# ---- detectors: each gives (distance of rows, given the training rows)

def _scaled(train): return train.mean(0), train.std(0)+1e-6

def nearest(k, metric='euclidean'):
    "Distance to the k-th nearest training dive, on standardised features"
    def _distance(train, rows):
        mean, sd = _scaled(train)
        return np.sort(cdist((rows-mean)/sd, (train-mean)/sd, metric), 1)[:, k-1]
    return _distance

def mahalanobis(train, rows):
    "Mahalanobis distance with the shrinkage of Ledoit and Wolf (2004)"
    mean, sd = _scaled(train)
    x, z = (train-mean)/sd, (rows-mean)/sd
    n, p = x.shape
    gram = x@x.T/n
    mu = np.trace(gram)/p
    d2 = (gram**2).sum()/p-mu**2
    b2 = min(d2, ((x**2).sum(1)**2).mean()/n/p-(gram**2).sum()/n/p)
    shrink = b2/d2
    # (shrink mu I + (1-shrink) x'x/n)^-1 by Woodbury
    a = shrink*mu
    inner = np.linalg.inv(np.eye(n)*n/(1-shrink)+x@x.T/a)
    cross = z@x.T/a
    return np.sqrt(np.maximum((z**2).sum(1)/a-np.einsum('ij,jk,ik->i', cross, inner, cross), 0))

def residual(q):
    "What is left of a video after the first q principal components of the training dives"
    def _distance(train, rows):
        mean, sd = _scaled(train)
        basis = np.linalg.svd((train-mean)/sd, full_matrices=False)[2][:q]
        z = (rows-mean)/sd
        return np.linalg.norm(z-z@basis.T@basis, axis=1)
    return _distance

DETECTORS = {'nearest 1': nearest(1), 'nearest 5': nearest(5), 'nearest 5, cosine': nearest(5, 'cosine'), 'nearest 10': nearest(10), 'mahalanobis, shrunk': mahalanobis,
             'residual of 20 components': residual(20)}


# ---- counts

def study(release, shared):
    "One row per detector and kind: the share that is called outside, over random halves of the test dives"
    found, rows = all_vectors(release, shared), []
    train, test = found.pop('train'), found.pop('test')
    half = len(test)//2
    for name, distance in DETECTORS.items():
        own, foreign = distance(train, test), {kind: distance(train, vectors) for kind, vectors in found.items()}
        rng, shares = np.random.default_rng(0), []
        for _ in range(HALVES):
            order = rng.permutation(len(test))
            calibration = own[order[:half]]
            called = lambda values: np.mean([rank_test(value, calibration, RATE).outside for value in values])
            shares.append({'test dives (false alarms)': called(own[order[half:]])}|{kind: called(values) for kind, values in foreign.items()})
        shares = pd.DataFrame(shares)
        usual = rank_test(0, own, RATE).usual
        for kind in shares:
            values = own if kind.startswith('test') else foreign[kind]
            rows.append(dict(release=release, detector=name, video=kind, n=len(values), called=shares[kind].mean(), lo=shares[kind].quantile(.025), hi=shares[kind].quantile(.975),
                             distance=np.median(values)/usual))
        alone = np.array([distance(np.delete(train, i, 0), train[[i]])[0] for i in range(len(train))])
        rows.append(dict(release=release, detector=name, video='test dives, threshold from training dives one by one', n=len(test),
                         called=np.mean([rank_test(value, alone, RATE).outside for value in own]), distance=np.median(own)/rank_test(0, alone, RATE).usual))
    return pd.DataFrame(rows)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='False alarms and hits of "outside what the run was trained on".')
    parser.add_argument('--releases', nargs='+', type=int, default=[1])
    parser.add_argument('--shared', default=str(ROOT.parent/'shared'))
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = pd.concat([study(release, args.shared) for release in args.releases])
    write_atomic(OUT, table.to_csv(index=False, float_format='%.3f', lineterminator='\n'))
    print(table.round(3).to_string())
