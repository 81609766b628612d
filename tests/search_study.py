"""The same small search for every method, on dives that no table shows: reports/benchmarks/search.csv

    python tests/search_study.py [--methods tsa tpt ...] [--processes 2] [--runs DIR]     trains what is not there (about a minute each); a method that is done goes into the table, search_so_far.csv
                                                                                          until all are done; rows that are there are not trained again
    python tests/search_study.py --table                                                  what was chosen, from the table

Stated before anything was trained:

- Data: the synthetic FineDiving release of seed 1 (the tables show that of seed 0), w/ DN, frozen backbone. 200 of its 300 training dives train, the other 100
  choose. Its test dives are not read. Two trainings (seeds 10 and 11, which no table has) for each setting; what counts is the mean rho of both on the 100 dives.
- Settings, one after the other, each from the best of the one before: (1) a learned layer (`model.adapter`) and standardised inputs (`model.standardise`), on and
  off, all four; (2) learning rate: a third, as it is, three times; (3) epochs: half, as it is, twice. As it is: the preset demo, for methods with cheap epochs
  five times its epochs. Eight settings, sixteen trainings for every method.
- A setting takes the place of the one before only where its rho is higher by more than .005, so that noise moves nothing far. What was chosen holds for both
  protocols of FineDiving, for MTL-AQA and for AQA-7.
- TSA-Net has no features that could be kept: it is not searched.
"""
import argparse
from concurrent.futures import ProcessPoolExecutor,ThreadPoolExecutor,as_completed
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd

from fspn_nb.core import write_atomic
from fspn_nb.escaping import csv_text
from fspn_nb.methods import METHODS
from fspn_nb.report.study_sections import SEARCHED,chosen_settings

OUT = Path(__file__).resolve().parents[1]/'reports'/'benchmarks'/'search.csv'
SO_FAR = OUT.with_name('search_so_far.csv') # until every method is done: the page shows all or none
RELEASE, TRAIN, KEPT, SEEDS, MARGIN = 1, 300, 100, (10, 11), .005
_DATA = {} # of this process


def base_config():
    "What all trainings share"
    from fspn_nb.config import make_config
    return make_config('finediving', 'demo', synthetic__seed=RELEASE, synthetic__n_train=TRAIN, synthetic__n_test=2, train__val_fraction=KEPT/TRAIN)


def config_of(method, seed, adapter, standardise, lr, epochs):
    "The configuration of one training; `lr` and `epochs` are factors of what the method has"
    from fspn_nb.config import method_schedule,override
    cfg = method_schedule(override(base_config(), model__name=method, seed=seed), searched=False)
    return override(cfg, model__adapter=adapter, model__standardise=standardise, train__lr=cfg.train.lr*lr, train__epochs=max(1, round(cfg.train.epochs*epochs)))


def first_setting(method):
    "What the method has without a search"
    from fspn_nb.core import flatten
    from fspn_nb.methods import input_layers
    layers = input_layers(flatten(config_of(method, SEEDS[0], 'auto', 'auto', 1, 1)))
    return dict(adapter='off' if layers['adapter'] == 'off' or not METHODS[method].adapter else 'on', standardise=layers['standardise'], lr=1., epochs=1.)


def rho_of(method, seed, setting, runs):
    "Rank correlation of one training on the dives that choose, and its minutes; in a process of the pool"
    import time
    import torch
    from fspn_nb.evaluate import load_model
    from fspn_nb.metrics import spearman
    from fspn_nb.train import fit
    from fspn_nb.training.predict import predict
    from fspn_nb.training.prepare import prepare
    torch.set_num_threads(1)
    cfg, began = config_of(method, seed, **setting), time.process_time()
    _DATA['last'] = data = prepare(cfg, 'cpu', reuse=_DATA.get('last'))
    data = replace(data, cfg=cfg)
    run, ids = fit(cfg, runs, 'cpu', data), data.splits['val']
    pred = predict(load_model(run, data), data, ids, cfg.eval.num_exemplars)[0]
    for file in run.glob('*.pt'): file.unlink() # some 80 MB a training
    true = np.array([data.release.samples[i].score for i in ids])
    return float(spearman(pred, true)), (time.process_time()-began)/60


def search(method, runs, pool):
    "All trainings of one method, those that do not wait for one another side by side; a row each, kept as they come"
    file = Path(runs)/f'{method}.csv'
    known = pd.read_csv(file) if file.is_file() else written()
    rows = known[known.method == method].drop(columns='chosen', errors='ignore').to_dict('records')
    def of(setting, seed=None): return [row for row in rows if seed in (None, row['seed']) and all(row[name] == setting[name] for name in SEARCHED)]
    def mean_rhos(settings):
        missing = [(setting, seed) for setting in settings for seed in SEEDS if not of(setting, seed)]
        jobs = {pool.submit(rho_of, method, seed, setting, runs): (setting, seed) for setting, seed in missing}
        for job in as_completed(jobs):
            (setting, seed), (rho, minutes) = jobs[job], job.result()
            rows.append(dict(method=method, seed=seed, **setting, rho=round(rho, 4), minutes=round(minutes, 2)))
            write_atomic(file, csv_text(pd.DataFrame(rows)))
            print(method, setting, seed, f'{rho:.4f}', flush=True)
        return [float(np.mean([row['rho'] for row in of(setting)])) for setting in settings]
    best = first_setting(method)
    value, = mean_rhos([best])
    for others in ([dict(adapter=a, standardise=s) for a in ('off', 'on') for s in ('off', 'on')], [dict(lr=1/3), dict(lr=3.)], [dict(epochs=.5), dict(epochs=2.)]):
        settings = [best|other for other in others]
        top, setting = max(zip(mean_rhos(settings), settings), key=lambda pair: pair[0])
        if top > value+MARGIN: value, best = top, setting
    return method, best


def searchable():
    "Methods that can be searched; sizes of FSPN take over what it got"
    return [name for name, row in METHODS.items() if not row.finetune_only and name not in ('fspn_s', 'fspn_m')]


def written():
    "Rows of the methods that are done; none of an unfinished one's rows is chosen"
    file = SO_FAR if SO_FAR.is_file() else OUT
    return pd.read_csv(file) if file.is_file() else pd.DataFrame(columns=['method'])


def write(method, best, runs):
    "Put the rows of one method into the table"
    file, known = Path(runs)/f'{method}.csv', written()
    others, rows = known[known.method != method], pd.read_csv(file) if file.is_file() else known[known.method == method]
    rows = rows.assign(chosen=(rows[list(SEARCHED)] == [best[name] for name in SEARCHED]).all(axis=1))
    table = pd.concat([table for table in (others, rows) if len(table)], ignore_index=True)
    write_atomic(SO_FAR, csv_text(table))
    if {*searchable()} <= {*table.method[table.chosen]}: SO_FAR.replace(OUT)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--methods', nargs='+', default=searchable())
    parser.add_argument('--processes', type=int, default=2)
    parser.add_argument('--runs', default='reports/runs/search')
    parser.add_argument('--table', action='store_true')
    args = parser.parse_args()
    if not args.table:
        from fspn_nb.training.prepare import prepare
        Path(args.runs).mkdir(parents=True, exist_ok=True)
        for method in args.methods: prepare(config_of(method, SEEDS[0], 'auto', 'auto', 1, 1), 'cpu') # features, by one process
        with ProcessPoolExecutor(args.processes, get_context('spawn')) as pool, ThreadPoolExecutor(len(args.methods)) as threads:
            for job in as_completed([threads.submit(search, method, args.runs, pool) for method in args.methods]):
                write(*job.result(), args.runs)
    table = written()
    print(chosen_settings(table[table.method.isin(table.method[table.chosen])]).round(4).to_string())


if __name__ == '__main__': main()
