"""What trained networks say of injected faults, beside an untrained network and shuffled weights, on synthetic FineDiving

    python tests/fault_study.py [--release 0] [--pairs 100] [--seeds 3] [--methods fspn,fspn_viterbi]     answers, into reports/benchmarks/fault_study.csv.gz
    python tests/fault_study.py --table                                                                    the table from them, onto the screen

Test dives of the release (130/150) are drawn without one fault and with it; each network compares both films with the same exemplars. Pairs, runs and answers that are there are not made again.
The report reads the answers, so its table and figure need no training. One thread: about 7 processor seconds per pair, once, 2 minutes per training and 10 seconds per network and 100 pairs.
"""
import argparse
import io
import os
from pathlib import Path

import pandas as pd
import torch

from fspn_nb.analysis.fault_table import fault_table,guessed_steps,readable_faults
from fspn_nb.core import data_cache,write_atomic

ROOT = Path(__file__).resolve().parents[1]
ANSWERS = ROOT/'reports'/'benchmarks'/'fault_study.csv.gz'
SIZES = dict(synthetic__n_train=130, synthetic__n_test=150)
KEYS = ['method', 'network', 'seed']


def read(path):
    "The answers so far"
    return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=KEYS)


def save(table, path):
    "The answers, written at once and the same bytes for the same answers"
    out = io.BytesIO()
    table.to_csv(out, index=False, float_format='%.6g', lineterminator='\n', compression=dict(method='gzip', mtime=0))
    write_atomic(path, out.getvalue())


def ask(release, n, seeds, methods, path, runs):
    "Answers of every network that the table does not have"
    from fspn_nb.config import make_config,method_schedule,override
    from fspn_nb.evaluate import load_model
    from fspn_nb.inspect.fault_pairs import load_pairs,plan_pairs
    from fspn_nb.inspect.fault_study import ask_pairs,study_networks
    from fspn_nb.models.backbone import load_backbone
    from fspn_nb.models.i3d import fuse_conv_bn
    from fspn_nb.train import fit
    from fspn_nb.training.prepare import prepare
    cfg, data, pairs = make_config('finediving', 'demo', synthetic__seed=release, **SIZES), None, None
    table, backbone = read(path), fuse_conv_bn(load_backbone(cfg.weights)[0])
    for seed in range(seeds):
        for method in methods:
            if ((table.method == method) & (table.seed == seed)).any(): continue
            data = prepare(method_schedule(override(cfg, model__name=method, seed=seed)), 'cpu', reuse=data)
            model = load_model(fit(data.cfg, runs, 'cpu', data), data)
            pairs = pairs or load_pairs(plan_pairs(*SIZES.values(), release)[:n], cfg)
            for name, network in study_networks(model, data).items():
                rows = ask_pairs(network, data, pairs, backbone).assign(method=method, network=name, seed=seed)
                table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
                print(method, seed, name, f'mean fall {rows.fall.mean():.2f} of {rows.cost.mean():.2f} points', flush=True)
            save(table[KEYS+[name for name in table if name not in KEYS]], path)


def main():
    "Command line"
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--release', type=int, default=0)
    p.add_argument('--pairs', type=int, default=100)
    p.add_argument('--seeds', type=int, default=3)
    p.add_argument('--methods', default='fspn,fspn_viterbi')
    p.add_argument('--answers', type=Path, default=ANSWERS)
    p.add_argument('--runs', type=Path, default=None, help='where the runs are kept; in the data cache if not given')
    p.add_argument('--table', action='store_true', help='only the table')
    a = p.parse_args()
    torch.set_num_threads(1)
    if not a.table: ask(a.release, a.pairs, a.seeds, a.methods.split(','), a.answers, a.runs or data_cache()/f'fault_runs_{a.release}')
    answers = read(a.answers)
    print(guessed_steps(answers), readable_faults(fault_table(answers), {}).to_markdown(index=False), sep='\n\n')


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    main()
