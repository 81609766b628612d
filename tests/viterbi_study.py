"""FSPN-Viterbi beside FSPN and FSPN without its parser, the same inputs and code for all: reports/benchmarks/viterbi.csv

    python tests/viterbi_study.py [--seeds 0,1,2] [--runs DIR]     trains what is not there (36 trainings, about a minute each) and writes the table
    python tests/viterbi_study.py --table                          the table from the kept predictions, onto the screen

Synthetic releases of seed 0: FineDiving 130/150, MTL-AQA 115/150. Differences and p-values: against other trainings and other test videos (`retrain_test`).
"""
import argparse
import os
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fspn_nb.analysis.parse_quality import overlap_gain
from fspn_nb.analysis.significance import retrain_test
from fspn_nb.config import make_config,method_schedule,override,run_id
from fspn_nb.core import data_cache
from fspn_nb.evaluate import evaluate
from fspn_nb.experiments.variants import EXPERIMENTS
from fspn_nb.metrics import relative_l2,spearman
from fspn_nb.train import fit
from fspn_nb.training.prepare import prepare

BENCHMARKS = Path(__file__).resolve().parents[1]/'reports'/'benchmarks'
PREDICTIONS = BENCHMARKS/'viterbi_predictions.csv.gz'
METHODS = ('fspn_viterbi', 'fspn', 'i3d_smt')
RELEASES = {'finediving': ('w_dn', 'wo_dn'), 'mtl_aqa': ('w_dd', 'wo_dd')}


def runs_of(seeds):
    "(dataset, protocol, method, seed, configuration) of all trainings"
    for dataset, protocols in RELEASES.items():
        base = make_config(dataset, 'demo', synthetic__n_test=150)
        for protocol in protocols:
            for seed in seeds:
                for method in METHODS:
                    yield dataset, protocol, method, seed, method_schedule(override(base, protocol=protocol, seed=seed, **EXPERIMENTS[method]))


def train_all(seeds, runs):
    "Predictions of all trainings on the test videos; what is finished is not repeated"
    tables, data = [], None
    for dataset, protocol, method, seed, cfg in runs_of(seeds):
        run = runs/dataset/run_id(cfg)
        if not (run/'metrics.json').is_file():
            data = prepare(cfg, 'cpu', reuse=data if data and data.cfg.dataset == dataset else None)
            evaluate(fit(cfg, runs, data=data), data)
        table = pd.read_csv(run/'predictions.csv', dtype=dict(uid=str)).query("split == 'test'")
        parse = run/'parsing.csv'
        cuts = pd.read_csv(parse, dtype=dict(uid=str)).query("split == 'test'").set_index('uid').tiou.reindex(table.uid).to_numpy() if parse.is_file() else np.nan
        tables.append(table[['uid', 'true', 'pred']].assign(dataset=dataset, protocol=protocol, method=method, seed=seed, tiou=cuts))
    return pd.concat(tables)


def compare(kept):
    "Means over seeds, and FSPN-Viterbi minus each"
    rows = []
    for (dataset, protocol), own in kept.groupby(['dataset', 'protocol'], sort=False):
        preds = {method: g.pivot(index='seed', columns='uid', values='pred').to_numpy() for method, g in own.groupby('method')}
        true = own[own.method == 'fspn'].drop_duplicates('uid').set_index('uid').true.sort_index().to_numpy()
        l2 = partial(relative_l2, lo=true.min(), hi=true.max())
        for method in METHODS:
            row = dict(dataset=dataset, protocol=protocol, method=method, seeds=len(preds[method]), n=len(true), tiou=own[own.method == method].tiou.mean())
            for name, metric, factor in (('rho', spearman, 1), ('r_l2_x100', l2, 100)):
                row[name] = factor*np.mean([metric(pred, true) for pred in preds[method]])
                if method != 'fspn_viterbi':
                    gap, row[f'{name}_p'] = retrain_test(metric, preds['fspn_viterbi'], preds[method], true)
                    row[f'{name}_viterbi_minus'] = factor*gap
            rows.append(row)
    return pd.DataFrame(rows)


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--seeds', default='0,1,2')
    p.add_argument('--runs', type=Path, default=None, help='where the runs are kept; in the data cache if not given')
    p.add_argument('--table', action='store_true', help='only the table')
    a = p.parse_args()
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in a.seeds.split(',')]
    if a.table: kept = pd.read_csv(PREDICTIONS, dtype=dict(uid=str))
    else:
        runs = a.runs or data_cache()/'viterbi_runs'
        kept = train_all(seeds, runs)
        kept.to_csv(PREDICTIONS, index=False, float_format='%.6g', compression=dict(method='gzip', mtime=0))
        for protocol in RELEASES['finediving']:
            own = [runs/'finediving'/run_id(cfg) for dataset, name, method, _, cfg in runs_of(seeds) if (dataset, name, method) == ('finediving', protocol, 'fspn_viterbi')]
            print(f'{protocol}: overlap beside the same two cuts for every dive', overlap_gain(own))
    table = compare(kept)
    if not a.table: table.to_csv(BENCHMARKS/'viterbi.csv', index=False, float_format='%.4g')
    print(table.round(4).to_string(index=False))


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    main()
