"""Lays out releases of the real size from a few pictures, and measures what comes before the first training step, on an eighth to all of them

    python tests/full_size.py [--datasets finediving mtl_aqa aqa7] [--runs 125 250 500 1000] [--folder FOLDER] [--out FILE.csv]

The annotations are the real ones where they are there (FSPN_SHARED, or `shared` beside the checkout), else synthetic ones of the same number. Frame files
are hard links to a few pictures under the names that the annotations ask for: 312,256 on FineDiving, 2.4 million on MTL-AQA (whole broadcasts up to their
last dive), 113,918 on AQA-7. Features and boxes are random numbers, kept where `prepare` looks for them. Each measurement is a process of its own, with
the library imported; those below five seconds are made three times, and the median counts. All pictures are in the system's cache: on a real release a slow disk comes on top.

The CSV has a row per stage and share. Growth is the exponent k of cost ~ samples^k, fitted over all shares (`growth_*`) and between the two largest
(`last_*`); n log n has 1.15 over these sizes. `memory_mb` is the peak above the import of
the library, which has a row of its own: together the whole process. `opens` and `stats` are the files that are opened and those whose state is asked for, with
`--calls` by strace, else only what Python itself opens.
"""
import argparse
import json
import math
import multiprocessing
import os
import pickle
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stdout
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pandas as pd

SHARED = Path(os.environ.get('FSPN_SHARED') or Path(__file__).resolve().parents[2]/'shared')/'data'
ANNOTATIONS = dict(finediving='Annotations', mtl_aqa='info', aqa7='Split_4')
LINKS = 30_000 # to one file; ext4 allows 65,000
IMPORTS = ['fspn_nb.train'] # what a run imports
STORE = 1/32 # of the samples are decoded into a frame store: all of FineDiving would take 30 GB


# Layout

def real_annotations(dataset):
    "The folder of the real annotations, None where there is none"
    folders = (SHARED/dataset/ANNOTATIONS[dataset], SHARED/dataset)
    return next((folder for folder in folders if [*folder.glob('*.pkl'), *folder.glob('*.mat')]), None)


def write_synthetic(dataset, folder):
    "Annotations of as many synthetic videos as the release has"
    from fspn_nb.protocols import PROTOCOLS
    from fspn_nb.synthetic.formats import FORMATS
    kind = FORMATS[dataset]
    sizes = [math.ceil(n/6) for n in PROTOCOLS[dataset].released] if dataset == 'aqa7' else PROTOCOLS[dataset].released # there: of each class
    jobs = kind.plan(*sizes, 0)
    kind.annotate(folder, jobs, [kind.make(job, (64, 36), False) for job in jobs])
    return folder/ANNOTATIONS[dataset]


def part_of_pickles(dataset, source, folder, share):
    "Write the pickles of `source` with `share` of the dives: every nth one, on MTL-AQA the first ones of each broadcast"
    from fspn_nb.data.safe_pickle import load_pickle
    content, videos = {path.name: load_pickle(path) for path in sorted(source.glob('*.pkl'))}, {}
    splits = [name for name, value in content.items() if isinstance(value, list)]
    if dataset == 'finediving': keep = {tuple(key) for name in splits for key in content[name][::round(1/share)]}
    else:
        dives = next(value for name, value in content.items() if 'annotations' in name)
        for key in sorted(dives, key=lambda key: dives[key]['end_frame']): videos.setdefault(key[0], []).append(tuple(key))
        keep = {key for keys in videos.values() for key in keys[:math.ceil(share*len(keys))]}
    for name, value in content.items():
        if name in splits: value = [key for key in value if tuple(key) in keep]
        elif not name.startswith('Sub_action'): value = {key: row for key, row in value.items() if tuple(key) in keep}
        (folder/name).write_bytes(pickle.dumps(value, protocol=4))


def part_of_lists(source, folder, share):
    "Write AQA-7's two lists with every nth video"
    from fspn_nb.data.matlab import load_mat,mat_bytes
    for split in ('train', 'test'):
        path, name = next(path for path in sorted(source.glob('*.mat')) if split in path.name), f'consolidated_{split}_list'
        (folder/f'{name}.mat').write_bytes(mat_bytes(name, load_mat(path, name)[::round(1/share)]))


def some_pictures(folder):
    "A hundred frames: real ones where they are there, else of a synthetic dive"
    if real := sorted(SHARED.glob('finediving/*/*/*/*.jpg')): return real[::len(real)//100]
    from fspn_nb.data.release_files import jpeg_bytes
    from fspn_nb.synthetic.release import synth_dive
    folder.mkdir(parents=True)
    for i, frame in enumerate(synth_dive(0, size=(256, 256)).frames): (folder/f'{i}.jpg').write_bytes(jpeg_bytes(frame))
    return sorted(folder.glob('*.jpg'))


class Pictures:
    "Files that frames are linked to; copied anew when they have as many links as a file system allows"
    def __init__(self, folder, paths):
        folder.mkdir(parents=True)
        self.folder, self.data, self.files, self.links = folder, [path.read_bytes() for path in paths], [], 0

    def link(self, path):
        n = len(self.data)
        if self.links%(n*LINKS) == 0:
            self.files = [self.folder/f'{self.links}_{i}.jpg' for i in range(n)]
            for file, data in zip(self.files, self.data): file.write_bytes(data)
        os.link(self.files[self.links%n], path)
        self.links += 1


def lay_out(dataset, root, share, source, pictures):
    "Let the release in `root` grow to `share`; how many samples and frame files it has"
    from fspn_nb.data import aqa7,finediving,mtl_aqa
    from fspn_nb.data.video_pieces import pieces_of
    folder, total = root/ANNOTATIONS[dataset], 0
    for place in (folder, root/'FINADiving_MTL_256s', root/'new'/'new_total_frames_256s'): place.mkdir(parents=True, exist_ok=True)
    if dataset == 'aqa7': part_of_lists(source, folder, share)
    else: part_of_pickles(dataset, source, folder, share)
    for piece in pieces_of(dataset, root):
        piece.folder.mkdir(parents=True, exist_ok=True)
        there, names = set(os.listdir(piece.folder)), [piece.pattern.format(i) for i in piece.numbers]
        for name in names:
            if name not in there: pictures.link(piece.folder/name)
        total += len(names)
    time.sleep(3) # times of a file that was touched within two seconds are not trusted
    read = dict(finediving=finediving.read_finediving, mtl_aqa=mtl_aqa.read_mtl_aqa, aqa7=aqa7.read_aqa7)[dataset]
    return dict(samples=len(read(None, folder)), files=total)


# Stages: each takes (dataset, root, scratch), does what is not measured, and returns the function that is

def config(dataset, root, **changes):
    "A head on ready features, main protocol"
    from fspn_nb.config import make_config
    own = dict(train__backbone='frozen', train__temporal_jitter=0, train__epochs=1, actor__source='none')
    return make_config(dataset, 'paper', data_root=str(root), **{**own, **changes})


def random_features(sample, cfg, *rest):
    "As `dive_features`, without a look at the frames"
    import torch
    return {name: torch.rand(len(cfg.clip.starts), 1024) for name in ('scene', 'actor')}


def random_boxes(candidates, *rest):
    "As `main_actor`: boxes (T,4) and that the athlete was seen in all frames"
    corners = np.random.default_rng(0).uniform(40, 90, (len(candidates), 2))
    return np.concatenate([corners, corners+[60, 90]], 1), np.full(len(candidates), '', '<U7')


class Blind:
    "Sees nothing, and goes by the key of another detector"
    def __init__(self, detector): self.name, self.key = detector.name, detector.key

    def __call__(self, frames): return [np.zeros((0, 5)) for _ in frames]


def fill(dataset, root, scratch, **changes):
    "Keep random features, and random boxes where the configuration asks for a detector"
    from fspn_nb.actor import boxes,track
    from fspn_nb.batches import features
    from fspn_nb.training.prepare import prepare
    features.dive_features, track.main_actor = random_features, random_boxes
    boxes.get_detector = lambda *args, get=boxes.get_detector: Blind(get(*args))
    boxes.detect_boxes = partial(track.detect_boxes, load=lambda sample, ids: np.zeros((len(ids), 16, 16, 3), np.uint8))
    return lambda: prepare(config(dataset, root, **changes), 'cpu')


def read(dataset, root, scratch):
    from fspn_nb.batches.dataset import load_samples
    return lambda: load_samples(config(dataset, root))


def check(dataset, root, scratch):
    from fspn_nb.data.check import check_cli
    return lambda: check_cli([dataset, str(root)])


def fingerprint(dataset, root, scratch, known=False):
    "Hash all frames; `known`: their hashes are kept"
    from fspn_nb.file_hashes import frame_hashes
    release = read(dataset, root, scratch)()
    if not known: os.environ['FSPN_CACHE'] = tempfile.mkdtemp(dir=scratch)
    return lambda: frame_hashes(release.samples)


def prepared(dataset, root, scratch, **changes):
    from fspn_nb.training.prepare import prepare
    return lambda: prepare(config(dataset, root, **changes), 'cpu')


def store(dataset, root, scratch, known=False):
    "Decode every 32nd sample into a frame store; `known`: check the one that is there"
    from fspn_nb.batches.frame_store import build_store
    samples = read(dataset, root, scratch)().samples[::round(1/STORE)]
    if not known: shutil.rmtree(scratch/'frames', ignore_errors=True)
    return lambda: build_store(samples, config(dataset, root), {sample.uid: None for sample in samples}, scratch/'frames')


def first_step(dataset, root, scratch):
    "Train one step, in a folder of its own"
    from fspn_nb import train
    class Stepped(Exception): pass
    def stop(position): raise Stepped
    train.train_epoch = lambda *args, run=train.train_epoch: run(*args[:6], stop)
    def run():
        with tempfile.TemporaryDirectory(dir=scratch) as out:
            try: train.fit(config(dataset, root), out, 'cpu')
            except Stepped: return
        raise RuntimeError('need a run that trains a step, got one that ended without')
    return run


def report(dataset, root, scratch):
    from fspn_nb.report.build import build_report
    return lambda: build_report(root, scratch/'page')


MOTION = dict(actor__source='motion')
STAGES = {'import': lambda *args: lambda: None, 'read': read, 'check': check, 'fingerprint': fingerprint, 'fingerprint_known': partial(fingerprint, known=True),
          'prepare': prepared, 'prepare_boxes': partial(prepared, **MOTION), 'store': store, 'store_known': partial(store, known=True),
          'first_step': first_step, 'report': report, 'fill': fill, 'fill_boxes': partial(fill, **MOTION)}
FILLED = dict(fingerprint_known='fill', prepare='fill', prepare_boxes='fill_boxes', first_step='fill') # what must be kept before a stage
ON_RELEASES = [name for name in STAGES if name not in ('import', 'report', 'fill', 'fill_boxes')]


def fake_runs(folder, n):
    "`n` runs that nobody trained, on 749 test videos as FineDiving has: the grid, both other datasets, and as many seeds as it takes"
    from fspn_nb.config import make_config
    from fspn_nb.experiments.variants import config_of,grid_base,plan_grid
    from fspn_nb.protocols import PROTOCOLS,SPORTS
    from fspn_nb.report.fake_runs import fake_run
    cells, there = plan_grid(grid_base('demo'), 'all', (0,)), len(list(folder.glob('*/*/metrics.json')))
    makers = [partial(config_of, grid_base('demo'), cell.experiment, protocol=cell.protocol) for cell in cells.itertuples()]
    makers += [partial(make_config, 'mtl_aqa', 'demo', protocol=protocol) for protocol in PROTOCOLS['mtl_aqa'].paper]
    makers += [partial(make_config, 'aqa7', 'demo', protocol=sport) for sport in SPORTS]
    for i in range(there, n):
        seed, kind = divmod(i, len(makers))
        fake_run(folder, makers[kind](seed=seed), 5+kind/10, n=749, watched=kind == 0, votes=kind == 0)


# Measuring: this file again, in a process of its own

def peak_mb():
    "Largest memory of this process so far, MB"
    status = Path('/proc/self/status')
    if status.is_file(): return int(status.read_text().partition('VmHWM:')[2].split()[0])/1024 # ru_maxrss counts the parent's, too
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/(2**20 if sys.platform == 'darwin' else 1024)


def child(stage, dataset, root, scratch):
    "Run one stage in this process; what it took"
    for name in IMPORTS: import_module(name)
    base, run = peak_mb(), STAGES[stage](dataset, root, scratch)
    opens, start, cpu = [0], time.time(), time.process_time()
    sys.addaudithook(lambda event, args: opens.__setitem__(0, opens[0]+(event == 'open')))
    with open(os.devnull, 'w') as quiet, redirect_stdout(quiet): run()
    took = dict(seconds=time.time()-start, cpu_seconds=time.process_time()-cpu)
    return took|dict(memory_mb=peak_mb()-base, opens=opens[0], stats=math.nan)


def import_alone():
    "A new process that imports the library; what it took"
    start, code = time.time(), f"import time,{','.join(IMPORTS)},full_size; print(time.process_time(), full_size.peak_mb())"
    result = subprocess.run([sys.executable, '-c', code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent)
    cpu, mb = map(float, result.stdout.split()[-2:])
    return dict(seconds=time.time()-start, cpu_seconds=cpu, memory_mb=mb, opens=math.nan, stats=math.nan)


def measure(*args):
    "As `child`, in a process of its own that has the library imported"
    context = multiprocessing.get_context('forkserver' if 'forkserver' in multiprocessing.get_all_start_methods() else 'spawn')
    context.set_forkserver_preload(IMPORTS)
    with context.Pool(1) as pool: return pool.apply(child, args)


CALLS = dict(opens=('open', 'openat'), stats=('stat', 'lstat', 'newfstatat', 'statx'))

def system_calls(stage, dataset, root, scratch):
    "How many files a stage opens, and of how many it asks the state, by strace"
    names, table = ','.join('?'+name for group in CALLS.values() for name in group), scratch/'calls.txt'
    command = ['strace', '-f', '--seccomp-bpf', '-c', '-o', table, '-e', f'trace={names}', sys.executable, __file__, '--child', stage, dataset, root, scratch]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    rows = [line.split() for line in table.read_text().splitlines()]
    counts = {row[-1]: int(row[3]) for row in rows if len(row) > 4 and row[3].isdigit()}
    return {name: sum(counts.get(call, 0) for call in group) for name, group in CALLS.items()}


def measured(stage, dataset, root, scratch, repeats=3, imported=None):
    "The median of `repeats` measurements, or the only one where it takes more than five seconds; with `imported`, what the import alone asks for, system calls"
    once = import_alone if stage == 'import' else partial(measure, stage, dataset, root, scratch)
    results = [once()]
    while results[0]['seconds'] < 5 and len(results) < repeats: results.append(once())
    row = {name: statistics.median(result[name] for result in results) for name in results[0]}|dict(repeats=len(results))
    calls = {} if imported is None else system_calls(stage, dataset, root, scratch)
    return row|{name: n-imported.get(name, 0) for name, n in calls.items()}


COSTS = ('seconds', 'cpu_seconds', 'memory_mb', 'opens', 'stats')

def add_growth(table):
    "`table` with the exponents of each stage, in the row of its largest size"
    table = table.assign(**{f'{kind}_{cost}': math.nan for cost in COSTS for kind in ('growth', 'last')})
    for _, rows in table.groupby(['dataset', 'stage']):
        rows = rows.sort_values('samples')
        for cost in COSTS:
            size, value = np.log(rows.samples.to_numpy(float)), rows[cost].to_numpy(float)
            size, value = size[value > 0], np.log(value[value > 0])
            if len(value) < 2: continue
            table.loc[rows.index[-1], f'growth_{cost}'] = np.polyfit(size, value, 1)[0].round(2)
            table.loc[rows.index[-1], f'last_{cost}'] = ((value[-1]-value[-2])/(size[-1]-size[-2])).round(2)
    return table


def facts():
    "What else is on the machine, and which code was measured"
    commit = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    return dict(load=round(os.getloadavg()[0], 1) if hasattr(os, 'getloadavg') else math.nan, cores=os.cpu_count(), commit=commit)


def sizes_of(dataset, shares, folder):
    "Lay out one share after the other; (what it holds, root) of each"
    source = real_annotations(dataset) or write_synthetic(dataset, folder/f'{dataset}_annotations')
    pictures, root = Pictures(folder/'pictures'/dataset, some_pictures(folder/'drawn')), folder/dataset
    for share in shares:
        yield dict(share=share, **lay_out(dataset, root, share, source, pictures)), root


def main(a):
    "Measure, write the CSV after every row, print the table of growth"
    scratch = Path(tempfile.mkdtemp(prefix='full_size_', dir=a.folder or os.environ.get('FSPN_CACHE')))
    rows, failed, filled = [], [], set()
    def add(stage, dataset, root, **size):
        counted = imported if size['share'] in (min(a.shares), max(a.shares)) else None
        try:
            if (what := FILLED.get(stage)) and (what, root, size['share']) not in filled:
                measure(what, dataset, root, scratch)
                filled.add((what, root, size['share']))
            row = measured(stage, dataset, root, scratch, a.repeats, counted)
        except Exception as e: # the other stages are measured all the same
            failed.append(f'{dataset}, {stage}, {size}: {type(e).__name__}: {e}')
            return print(failed[-1], flush=True)
        rows.append(dict(dataset=dataset, stage=stage, **size)|row|facts())
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        add_growth(pd.DataFrame(rows)).round(4).to_csv(a.out, index=False)
    try:
        os.environ['FSPN_CACHE'] = str(scratch/'cache')
        imported = system_calls('import', 'runs', scratch, scratch) if a.calls else None
        add('import', 'library', scratch, share=1, samples=1, files=0)
        for dataset in a.datasets:
            for size, root in sizes_of(dataset, a.shares, scratch):
                shutil.rmtree(scratch/'cache', ignore_errors=True)
                for stage in a.stages: add(stage, dataset, root, **size)
            shutil.rmtree(scratch/dataset)
        for n in a.runs:
            fake_runs(scratch/'runs', n)
            add('report', 'runs', scratch/'runs', share=n/max(a.runs), samples=n, files=sum(path.is_file() for path in (scratch/'runs').rglob('*')))
    finally:
        if not a.keep: shutil.rmtree(scratch, ignore_errors=True)
    table = add_growth(pd.DataFrame(rows))
    print(table[table.share == table.share.max()].drop(columns=['share', 'load', 'cores', 'commit']).round(2).to_string(index=False))
    sys.exit('\n'.join(['not measured:', *failed]) if failed else 0)


def parser():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--datasets', nargs='*', default=list(ANNOTATIONS), choices=list(ANNOTATIONS))
    p.add_argument('--shares', nargs='*', type=float, default=[1/8, 1/4, 1/2, 1], help='of the samples, ascending')
    p.add_argument('--stages', nargs='*', default=ON_RELEASES, choices=ON_RELEASES)
    p.add_argument('--repeats', type=int, default=3, help='of a measurement below five seconds')
    p.add_argument('--runs', nargs='*', type=int, default=[125, 250, 500, 1000], help='run folders for the report page')
    p.add_argument('--folder', help='where the releases are laid out (default: FSPN_CACHE, else the folder of temporary files); 1 GB, 3 million names')
    p.add_argument('--out', default=str(Path(__file__).resolve().parents[1]/'reports'/'benchmarks'/'full_size.csv'))
    p.add_argument('--calls', action='store_true', help='count system calls of the smallest and the largest share (needs strace)')
    p.add_argument('--keep', action='store_true', help='leave the releases where they are')
    return p


if __name__ == '__main__':
    if sys.argv[1:2] == ['--child']: print(json.dumps(child(*sys.argv[2:4], *map(Path, sys.argv[4:6]))))
    else: main(parser().parse_args())
