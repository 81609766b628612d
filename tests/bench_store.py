"How fast the frame store is made and read: python tests/bench_store.py [dives] [height] (a minute on two free cores; ratios are of the same run, absolute figures mean nothing on a busy machine)"
import os
import sys
import tempfile
from contextlib import redirect_stderr,redirect_stdout
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import torch
from PIL import Image
from torchvision.io import ImageReadMode,decode_jpeg

from fspn_nb.config import recipe
from fspn_nb.data.loaders import ClipSource,axis_of,boxes_of,load_samples
from fspn_nb.data.store import _workers,build_store,verify
from fspn_nb.data.stored import StoreSource,hold

RUNS = 5


def enlarged(samples, boxes, height, folder):
    "The dives with frames of the size that broadcasts have (256 lines), and their boxes"
    made,scaled = [],{}
    for o in samples:
        (to := Path(folder)/o.uid).mkdir(parents=True)
        for f in o.files:
            with Image.open(o.folder/f) as im:
                times = height/im.height
                im.resize((round(im.width*times), height)).save(to/f, quality=92)
        made.append(replace(o, folder=to))
        scaled[o.uid] = boxes[o.uid]*times
    return made,scaled


def jpeg_alone(samples, frames):
    "Decode the kept frames of all dives, bytes already in memory, result thrown away: what the library can do"
    data = [[torch.frombuffer(bytearray((o.folder/o.files[i]).read_bytes()), dtype=torch.uint8) for i in np.unique(axis_of(o, frames))] for o in samples]
    def run():
        with _workers(None) as pool: list(pool.map(lambda d: [decode_jpeg(x, mode=ImageReadMode.RGB) for x in d] and None, data))
    return run,sum(map(len, data))


def built(samples, cfg, boxes):
    "Make a whole store in a fresh folder"
    def run():
        with tempfile.TemporaryDirectory() as tmp: build_store(samples, cfg, boxes, tmp)
    return run


def fetched(source, n, batch=2):
    "Ask for every dive once, augmented, in batches of two"
    epoch = iter(range(10**6))
    def run():
        e = next(epoch)
        for i in range(0, n, batch): source.fetch(np.arange(i, min(i+batch, n)), (e, 3))
    return run


def interleaved(jobs):
    "Median seconds of each job, one after the other in every round, so that a busy minute hits all"
    for f in jobs.values(): f() # the first call warms caches and is not counted
    took = {k: [] for k in jobs}
    for _ in range(RUNS):
        for k,f in jobs.items():
            start = perf_counter()
            f()
            took[k].append(perf_counter()-start)
    return {k: median(v) for k,v in took.items()}


def main(n=4, height=256):
    cfg = recipe('finediving', 'smoke', clip__size=112)
    release = load_samples(cfg)
    with tempfile.TemporaryDirectory() as tmp, open(os.devnull, 'w') as quiet:
        samples,boxes = enlarged(release.samples[:n], boxes_of(release, cfg.actor)[1], height, Path(tmp)/'frames')
        alone,frames = jpeg_alone(samples, cfg.clip.frames)
        clips = n*len(cfg.clip.starts)*2 # scene and actor
        with redirect_stdout(quiet), redirect_stderr(quiet):
            store = build_store(samples, cfg, boxes, Path(tmp)/'store')
            took = interleaved({'JPEG library alone': alone, 'build, scene': built(samples, cfg, {o.uid: None for o in samples}), 'build, scene and actor': built(samples, cfg, boxes),
                                'check': lambda: verify(store), 'fetch, decoding': fetched(ClipSource(samples, cfg, boxes), n), 'fetch, map': fetched(StoreSource(store), n),
                                'fetch, memory': fetched(StoreSource(hold(store)), n)})
    for k,t in took.items():
        unit,rate,base = ('clips',clips/t,'fetch, decoding') if k.startswith('fetch') else ('frames',frames/t,'JPEG library alone')
        print(f'{k:24}{rate:10.0f} {unit}/s {took[base]/t:8.2f} x {base}')


if __name__ == '__main__': main(*map(int, sys.argv[1:]))
