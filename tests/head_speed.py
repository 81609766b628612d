"""Time per video and epoch of a head on kept features, at the size of FineDiving's training set, and what its matrix products alone would take

    python tests/head_speed.py [--against CHECKOUT] [--methods fspn_s fspn] [--repeats 15] [--shards 2] [--compiled] [--out FILE.csv]

Features are random numbers of the right shape, exemplars are drawn as in a run, the preset is `demo` (batch 16). A measurement is `train_epoch` over 64 of the
2,251 videos. All variants are processes that wait while another one works, and take turns; `--against` adds another checkout of the library as `before`
(`git worktree add ../old COMMIT`). `cpu_ms` is processor time: other programs disturb it less than `wall_ms`. What holds on a quiet machine is `wall_ms_lowest`.

    one run          one thread, as a run on kept features trains
    compiled         one run whose model went through torch.compile (with --compiled: it needs a C++ compiler and minutes); `compile_s` is the processor time of that
    N shards         one run with train.shards=N: N threads, the same bits whatever the number of cores
    two runs         two processes at once, time per video of both together, as the run notebooks and the grid train
    products alone   all matrix products, convolutions and attentions of a step, on tensors of the same shapes and strides, one thread
    at full rate     the operations of those products at the rate of a large product, one thread: the floor for any code without fewer operations

`head_epoch_rate` measures epochs on any device, with captured steps and without; `captured_difference` compares their weights.
"""
import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

VIDEOS,PART = 2251,64
ROOT = Path(__file__).resolve().parents[1]
PRODUCTS = ('mm','addmm','bmm','baddbmm','convolution','convolution_backward','_scaled_dot_product_flash_attention_for_cpu',
            '_scaled_dot_product_flash_attention_for_cpu_backward')


def run_of(method, shards=1, device='cpu', **changes):
    "(model, data, optimiser, schedule) of a run on random features; `changes` as in `override`"
    import torch
    from fspn_nb.batches.dataset import Labels
    from fspn_nb.batches.sources import FeatureDataset
    from fspn_nb.config import finediving
    from fspn_nb.core import seed_all
    from fspn_nb.methods import METHODS
    from fspn_nb.processes import tune_malloc
    from fspn_nb.training.distributed import DistributedContext
    from fspn_nb.training.loop import make_optimiser,make_schedule
    from fspn_nb.zoo import create_model
    tune_malloc()
    cfg = finediving('demo', **dict(model__name=method, **(dict(train__shards=shards) if shards > 1 else {}))|changes)
    seed_all(0)
    scene,actor,label = torch.rand(VIDEOS, 9, 1024),torch.rand(VIDEOS, 9, 1024),90*torch.rand(VIDEOS)
    transitions = torch.randint(1, 95, (VIDEOS, 2)).sort(1)[0]
    transitions[:, 1] += transitions[:, 0] == transitions[:, 1] # TSA refuses an empty step
    labels = Labels(label, 2+torch.rand(VIDEOS), transitions, tuple(f'v{i}' for i in range(VIDEOS)), judges=10*torch.rand(VIDEOS, 7))
    groups = np.random.default_rng(0).integers(0, max(2, VIDEOS//56), VIDEOS) # as many as FineDiving has on average
    candidates = {i: np.setdiff1d(np.flatnonzero(groups == groups[i]), [i]) for i in range(VIDEOS)}
    model = create_model(method, cfg.model, label, list(groups)).to(device)
    if shards > 1: model.encoder.shards = shards
    part = np.random.default_rng(1).permutation(VIDEOS)[:PART]
    shapes = dict(feature_maps=(VIDEOS, 9, 1024, 2, 2), short_clip_features=(VIDEOS, 20, 1024))
    extra = {name: torch.rand(shapes[name]) for name in METHODS[method].extra_inputs}
    data = SimpleNamespace(cfg=cfg, splits=dict(train=part), labels=labels, candidate_sets=SimpleNamespace(candidates=candidates), backbone=None,
                           source=FeatureDataset(scene, actor, **extra), device=torch.device(device), dist=DistributedContext())
    optimiser = make_optimiser(model, cfg)
    return model, data, optimiser, make_schedule(optimiser, cfg, 100_000)


def compiled_gradients(model):
    "`compute_gradients` with the forward and backward pass of `model` compiled; inductor draws its own numbers for dropout"
    import torch
    from fspn_nb.training.loop import compute_gradients
    compiled = torch.compile(model, dynamic=False)
    return lambda model, *args: compute_gradients(compiled, *args)


def head_epoch_rate(method='fspn', captured=True, device='cuda', batch_size=16, epochs=3, compiled=False):
    "Seconds of an epoch over VIDEOS videos: the lowest of `epochs`, after those that warm up and capture; with captured steps, or without"
    from fspn_nb.training.graphs import pick_gradients
    from fspn_nb.training.loop import compute_gradients,train_epoch
    model,data,optimiser,schedule = run_of(method, device=device, train__batch_size=batch_size, train__capture='auto' if captured else 'off')
    data.splits['train'] = np.arange(VIDEOS)
    gradients = compiled_gradients(model) if compiled else pick_gradients(model, data)
    if captured and gradients is compute_gradients: raise ValueError(f'need a GPU for captured steps of {method}, got {device}')
    seconds = []
    for epoch in range(2+epochs): # the first of each batch size is ordinary, the second is captured
        start = time.perf_counter()
        train_epoch(model, data, optimiser, schedule, epoch, gradients=gradients) # ends by reading the losses, for which the CPU waits
        seconds.append(time.perf_counter()-start)
    steps = -(-VIDEOS//batch_size)
    return dict(method=method, captured=captured, device=str(device), batch_size=batch_size, seconds=min(seconds[2:]), first_seconds=seconds[0],
                ms_per_step=1e3*min(seconds[2:])/steps, ms_per_video=1e3*min(seconds[2:])/VIDEOS, epochs_200_minutes=200*min(seconds[2:])/60)


def captured_difference(method='fspn', device='cuda', batch_size=16, epochs=2):
    "Largest difference of a weight after `epochs` with captured steps and without, over the largest change of a weight; 0: the same bits"
    import torch
    from fspn_nb.training.graphs import CudaGraph,GraphedGradients,RecordedGraph
    from fspn_nb.training.loop import compute_gradients,train_epoch
    make_graph = RecordedGraph if torch.device(device).type == 'cpu' else lambda: CudaGraph(torch.device(device))
    ends = []
    for gradients in (compute_gradients, GraphedGradients(make_graph)):
        model,data,optimiser,schedule = run_of(method, device=device, train__batch_size=batch_size)
        first = [p.detach().clone() for p in model.parameters()]
        for epoch in range(epochs): train_epoch(model, data, optimiser, schedule, epoch, gradients=gradients)
        ends.append([p.detach() for p in model.parameters()])
    changed = max(float((p-q).abs().max()) for p,q in zip(ends[0], first))
    return max(float((p-q).abs().max()) for p,q in zip(*ends))/changed


def operations(name, tensors):
    "Multiplications and additions of a product"
    shapes = [t.shape for t in tensors]
    if name.startswith('_scaled'): # (B,heads,T,d): two products forward, five backward
        B,heads,T,d = shapes[0]
        return (5 if 'backward' in name else 2)*2*B*heads*T*T*d
    if name == 'convolution': return 2*shapes[0][0]*int(np.prod(shapes[0][2:]))*int(np.prod(shapes[1]))
    if name == 'convolution_backward': return 4*shapes[0][0]*int(np.prod(shapes[0][2:]))*int(np.prod(shapes[2]))
    a,b = shapes[-2:]
    return 2*int(np.prod(a))*b[-1]


def products_of_a_step(method):
    "[(function, arguments, how often)] of one training step, and their operations"
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from fspn_nb.training.loop import train_epoch
    model,data,optimiser,schedule = run_of(method)
    data.splits['train'] = data.splits['train'][:data.cfg.train.batch_size]
    train_epoch(model, data, optimiser, schedule, 0) # the first one makes the optimiser's state
    calls,times,total = {},Counter(),0

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal total
            name = function.overloadpacket.__name__
            if name in PRODUCTS:
                tensors = [a for a in args if isinstance(a, torch.Tensor)]
                key = name,*(str(a) if not isinstance(a, torch.Tensor) else (a.shape, a.stride()) for a in args)
                calls[key] = function,args,kwargs or {}
                times[key] += 1
                total += operations(name, tensors)
            return function(*args, **(kwargs or {}))
    with Record(): train_epoch(model, data, optimiser, schedule, 1)
    return [(*calls[key], times[key]) for key in calls], total


def full_rate():
    "Operations per second of a large product, one thread"
    import torch
    a,times = torch.randn(1024, 1024),[]
    for _ in range(5):
        start = time.process_time()
        a @ a
        times.append(time.process_time()-start)
    return 2*1024**3/min(times)


def worker(kind, method, shards):
    "Print a line of JSON for every line that comes in"
    import torch
    from fspn_nb.training.loop import train_epoch
    torch.set_num_threads(1)
    amount,operations_of_a_step = PART,0
    def processor(): return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    if kind == 'products':
        products,operations_of_a_step = products_of_a_step(method)
        amount = 16
        def work():
            with torch.no_grad():
                for function,args,kwargs,n in products:
                    for _ in range(n): function(*args, **kwargs)
    else:
        run = run_of(method, shards)
        options = dict(gradients=compiled_gradients(run[0])) if kind == 'compiled' else {} # which older checkouts do not know
        def work(): train_epoch(*run, 0, **options)
    began = processor()
    work()
    first = processor()-began
    for _ in sys.stdin:
        rate = full_rate() if kind == 'products' else 0
        wall,cpu = time.perf_counter(),time.process_time()
        work()
        wall,cpu = time.perf_counter()-wall,time.process_time()-cpu
        full = 1e3*operations_of_a_step/rate/amount if rate else 0
        print(json.dumps(dict(wall_ms=1e3*wall/amount, cpu_ms=1e3*cpu/amount, full_rate_ms=full, gflop=operations_of_a_step/amount/1e9,
                              compile_s=first-cpu)), flush=True)


class Variant:
    "One or two processes that measure the same"
    def __init__(self, name, method, kind='run', shards=1, processes=1, checkout=ROOT):
        self.name,self.method,self.kind = name,method,kind
        command = [sys.executable, __file__, '--worker', kind, method, str(shards)]
        env = {**os.environ, 'PYTHONPATH': str(checkout), 'OMP_NUM_THREADS': '1'}
        self.processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=checkout)
                          for _ in range(processes)]
        self.results = []

    def measure(self):
        "One more result: time per video of all processes together"
        for p in self.processes: print(file=p.stdin, flush=True)
        answers = [p.stdout.readline() for p in self.processes]
        if not all(answers): raise RuntimeError(f'need a measurement of {self.name}, {self.method}, but its process ended; its error stands above')
        answers = [json.loads(line) for line in answers]
        n = len(answers)
        self.results.append(dict(wall_ms=max(a['wall_ms'] for a in answers)/n, cpu_ms=sum(a['cpu_ms'] for a in answers)/n,
                                 full_rate_ms=answers[0]['full_rate_ms'], gflop=answers[0]['gflop'], compile_s=answers[0]['compile_s']))

    def close(self):
        "End the processes"
        for p in self.processes:
            p.stdin.close()
            p.wait()


def row_of(variant, column='wall_ms', cpu='cpu_ms', name=None):
    "Medians of a variant"
    table = pd.DataFrame(variant.results)
    return dict(variant=name or variant.name, method=variant.method, cpu_ms=table[cpu].median(), cpu_ms_lowest=table[cpu].min(),
                wall_ms=table[column].median(), wall_ms_lowest=table[column].min(), n=len(table))


def measure(methods, repeats, shards, against='', compiled=False):
    "One row per method and variant; the processes take turns"
    rows = []
    for method in methods:
        variants = [Variant('one run, before', method, checkout=Path(against).resolve())] if against else []
        variants += [Variant('compiled', method, 'compiled')]*compiled
        variants += [Variant('one run', method), Variant(f'{shards} shards', method, shards=shards),
                     Variant('two runs', method, processes=2), Variant('products alone', method, 'products')]
        for k in range(repeats+1):
            for variant in variants[::1 if k%2 else -1]: variant.measure() # in turn there and back
        for variant in variants:
            variant.results = variant.results[1:] # the first one warms up
            rows.append(row_of(variant)|(dict(compile_s=variant.results[0]['compile_s']) if variant.kind == 'compiled' else {}))
            variant.close()
        rows.append(row_of(variants[-1], 'full_rate_ms', 'full_rate_ms', 'at full rate')|dict(gflop=variants[-1].results[0]['gflop']))
        print(pd.DataFrame(rows[-len(variants)-1:]).round(2).to_string(index=False), flush=True)
    import torch
    return pd.DataFrame(rows).assign(device=platform.machine(), cores=os.cpu_count(), load=os.getloadavg()[0], torch=torch.__version__,
                                     python=platform.python_version(), batch=16, videos=VIDEOS)


if __name__ == '__main__':
    if sys.argv[1:2] == ['--worker']: worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        p.add_argument('--against', default='', help='another checkout of the library, measured as `before`')
        p.add_argument('--methods', nargs='+', default=['fspn_s','fspn'])
        p.add_argument('--repeats', type=int, default=15)
        p.add_argument('--shards', type=int, default=2)
        p.add_argument('--compiled', action='store_true', help='torch.compile beside eager')
        p.add_argument('--out', default='', help='CSV file')
        a = p.parse_args()
        table = measure(a.methods, a.repeats, a.shards, a.against, a.compiled)
        if a.out: table.to_csv(a.out, index=False, float_format='%.4g')
