"""What fspn_plan says about the memory of a training step, beside what the step takes on this CPU

    python tests/step_memory.py            # three runs in processes of their own, about 4 GB of memory and two minutes
    python tests/step_memory.py --csv reports/benchmarks/step_memory.csv

Two measurements: bytes that PyTorch allocated at the worst moment of the step (its profiler counts every allocation), and
the growth of the process's resident memory, which also holds what oneDNN takes for itself and what malloc keeps.
"""
import argparse, json, subprocess, sys

import psutil
import torch
from torch.profiler import ProfilerActivity, profile

from fspn_nb.config import make_config
from fspn_nb.processes import peak_memory
from fspn_nb.training.loop import batch_sampler, build_model, make_optimiser, make_schedule, train_step
from fspn_nb.training.prefetch import tensors_of
from fspn_nb.batches.sources import make_batch
from fspn_nb.training.rehearsal import FakeClips, _features, _plain, fake_data, rehearse

RUNS = { # name to the arguments of make_config
    'fspn, fine-tuned at 112': ('finediving', 'paper', dict(train__batch_size=1)),
    'usdl, fine-tuned at 224': ('mtl_aqa', 'paper', dict(train__batch_size=1, model__name='usdl')),
    'fspn, a head on kept features': ('finediving', 'demo', {}),
    'fspn, fine-tuned at 112, 6 clips at a time': ('finediving', 'paper', dict(train__batch_size=1, train__micro_batch=6))}


def allocated_peak(step):
    "Most bytes that are allocated in addition while `step()` runs"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler: step()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == '[memory]']
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak


def measured_step(cfg):
    "(bytes allocated at the worst moment of a real training step of `cfg`, growth of resident memory)"
    cfg = _plain(cfg)
    resident = psutil.Process().memory_info().rss
    data = fake_data(cfg)
    model = build_model(data).train()
    optimiser = make_optimiser(model, cfg)
    schedule = make_schedule(optimiser, cfg, 9)
    ids, exemplars, index = max(batch_sampler(data, model.uses_exemplar, 0), key=lambda step: len(step[0]))
    roles = 1 if exemplars is None else 2
    source = _features(cfg, len(data.labels.uid)) if data.backbone is None else FakeClips(cfg, len(ids), 2*roles)
    batch = make_batch(source, data.labels, ids, exemplars, 0)
    for tensor in tensors_of(batch):
        if tensor.is_floating_point(): tensor.nan_to_num_(0, 0, 0).clamp_(-100, 100) # torch.empty holds anything
    step = lambda: train_step(model, batch, optimiser, schedule, cfg.train.precision, data.dist, len(ids), index)
    step() # the optimiser gets its state
    optimiser.zero_grad()
    held = [*model.parameters(), *model.buffers(), *tensors_of(batch)]
    held += [v for state in optimiser.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    if data.backbone is not None: held += [clips for pair in source.pairs for clips in pair]
    static = sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in held}.values())
    return static+allocated_peak(step), peak_memory()-resident


def compare(name):
    "One row of the table"
    dataset, preset, changes = RUNS[name]
    cfg = make_config(dataset, preset, **changes)
    predicted = rehearse(cfg, device='cpu').peak # before anything large is there
    allocated, resident = measured_step(cfg)
    return dict(run=name, predicted=predicted, allocated=allocated, resident=resident)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--csv', help='write the table there')
    p.add_argument('--run', help='only this one, as JSON')
    a = p.parse_args()
    if a.run:
        print(json.dumps(compare(a.run)))
        sys.exit()
    rows = []
    for name in RUNS:
        text = subprocess.run([sys.executable, __file__, '--run', name], stdout=subprocess.PIPE, text=True, check=True).stdout
        row = json.loads(text.splitlines()[-1])
        rows.append(row)
        mib = {k: v/2**20 for k, v in row.items() if k != 'run'}
        print(f'{name}: predicted {mib["predicted"]:.0f} MiB, allocated {mib["allocated"]:.0f} MiB ({mib["predicted"]/mib["allocated"]-1:+.1%}), '
              f'resident {mib["resident"]:.0f} MiB ({mib["predicted"]/mib["resident"]-1:+.1%})', flush=True)
    if a.csv:
        import pandas as pd
        pd.DataFrame(rows).to_csv(a.csv, index=False)
