"""How often a test calls two trainings of the same method different: simulated, trained here, and published

    python tests/seed_study.py train       30 seeds of one configuration each, into reports/benchmarks/seed_scores.csv.gz (about half an hour)
    python tests/seed_study.py             error rates and power from them and from simulation, into reports/benchmarks/seed_test.csv
"""
import itertools
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats

from fspn_nb.analysis.compare import score_functions,stack_predictions
from fspn_nb.analysis.published import unpack_runs
from fspn_nb.analysis.runs import SAME_RUN,collect
from fspn_nb.analysis.significance import paired_test,retrain_test
from fspn_nb.core import write_atomic
from fspn_nb.metrics import on_rows,spearman

ROOT = Path(__file__).resolve().parents[1]
SCORES, RATES = (ROOT/'reports'/'benchmarks'/name for name in ('seed_scores.csv.gz', 'seed_test.csv'))
TRAINED = [('finediving', 'i3d_mlp', 'w_dn', 30), ('finediving', 'fspn_s', 'w_dn', 12), ('mtl_aqa', 'i3d_mlp', 'wo_dd', 30), ('mtl_aqa', 'fspn_s', 'wo_dd', 6)]
SWAPS, DRAWS, LEVEL = 499, 300, .05


# ---- many seeds of one configuration

def train():
    "Predictions of the demo preset for the test videos, one column per seed"
    from fspn_nb.config import make_config,method_schedule,override,validate
    from fspn_nb.evaluate import load_model,predictions
    from fspn_nb.train import fit
    from fspn_nb.training.prepare import prepare
    tables, data = [], None
    for dataset, method, protocol, seeds in TRAINED:
        base, columns = make_config(dataset, 'demo', protocol=protocol), {}
        for seed in range(seeds):
            cfg = validate(method_schedule(override(base, seed=seed, protocol=protocol, model__name=method)))
            data = prepare(cfg, 'cpu', data if data is not None and data.cfg.dataset == dataset else None)
            with tempfile.TemporaryDirectory() as out:
                table = predictions(load_model(fit(cfg, out, 'cpu', data), data), data, 'test')[0].set_index('uid')
            columns[f's{seed}'] = table.pred
        tables.append(pd.DataFrame(dict(dataset=dataset, method=method, protocol=protocol, true=table.true)|columns).reset_index())
    table = pd.concat(tables)[['dataset', 'method', 'protocol', 'uid', 'true', *(f's{seed}' for seed in range(max(row[-1] for row in TRAINED)))]]
    table.to_csv(SCORES, index=False, float_format='%.4f', lineterminator='\n', compression=dict(method='gzip', mtime=0))


# ---- the tests

def bootstrap_p(metric, a, b, true, rng):
    "Two-sided p of the plain hierarchical bootstrap: videos and, within each method, seeds drawn with replacement"
    videos = rng.integers(len(true), size=(DRAWS, len(true)))
    means = [np.take_along_axis(np.array([on_rows(metric, pred, true)(videos) for pred in preds]), rng.integers(len(preds), size=(len(preds), DRAWS)), 0).mean(0)
             for preds in (a, b)]
    gaps = means[0]-means[1]
    return min(1, 2*min((gaps <= 0).mean(), (gaps >= 0).mean())+1/DRAWS)

def p_values(metric, a, b, true, rng=None):
    "{name of a test: p}; the bootstrap only with `rng`"
    result = {'videos and trainings': retrain_test(metric, a, b, true)[1], 'videos': paired_test(metric, a, b, true, n=SWAPS)[1]}
    return result if rng is None else result|{'hierarchical bootstrap': bootstrap_p(metric, a, b, true, rng)}

def rates(p, independent=True, **facts):
    "One row per test: the share of p below the level, with its binomial interval where the pairs are independent"
    rows = []
    for test in dict.fromkeys(name for each in p for name in each):
        own = [each[test] for each in p if test in each]
        below = sum(value < LEVEL for value in own)
        interval = stats.binomtest(below, len(own)).proportion_ci(method='wilson') if independent else (np.nan, np.nan)
        rows.append(facts|dict(test=test, pairs=len(own), share=below/len(own), lo=interval[0], hi=interval[1]))
    return rows


# ---- simulation: crossed random effects of videos and trainings

# Points: what all methods do to a video, what a method adds of its own, noise of a training, and the spread of its logarithm over trainings
SCENARIOS = {'equal trainings': (5, 0, 8, 0), 'trainings differ': (5, 0, 8, .2), 'methods differ on videos': (4, 6, 5, .1),
             'only one method varies': (4, 3, 7, .2)}

def draw_scores(rng, n):
    "Judges' scores: half points, skewed to the left as a final is"
    return np.round(2*np.clip(rng.normal(66, 14, n)-rng.exponential(6, n), 5, 105))/2

def draw_method(rng, true, common, seeds, own, noise, spread):
    "Predictions of `seeds` trainings of one method"
    sd = noise*np.exp(spread*rng.normal(size=(seeds, 1)))
    return true+common+rng.normal(0, own, len(true))+sd*rng.normal(size=(seeds, len(true)))

def mean_rho(common, own, noise, spread):
    "Expected rho of a training, from one large test set"
    rng = np.random.default_rng(5)
    true = draw_scores(rng, 3000)
    preds = draw_method(rng, true, rng.normal(0, common, 3000), 300, own, noise, spread)
    return float(np.mean([spearman(pred, true) for pred in preds]))

@cache
def noise_for(rho, common, own, spread):
    "The noise with which a method has this expected rho"
    low, high = 1., 60.
    for _ in range(14):
        middle = (low+high)/2
        low, high = (middle, high) if mean_rho(common, own, middle, spread) > rho else (low, middle)
    return middle

def what_of(loss): return f'power, rho {loss:.2f} apart' if loss else 'simulated'

def simulate(scenario, videos, seeds, pairs, loss=0.):
    "Rows of error rates (loss 0) or of power (the second method's rho is lower by `loss`)"
    common, own, noise, spread = SCENARIOS[scenario]
    unequal = scenario == 'only one method varies'
    other = (own, noise, 0 if unequal else spread)
    if loss or unequal: other = (own, noise_for(mean_rho(common, own, noise, spread)-loss, common, own, other[2]), other[2])
    rng = np.random.default_rng([videos, seeds, [*SCENARIOS].index(scenario), round(1000*loss)])
    p = {'rho': [], 'R': []}
    for pair in range(pairs):
        true = draw_scores(rng, videos)
        hard = rng.normal(0, common, videos)
        a, b = draw_method(rng, true, hard, seeds, own, noise, spread), draw_method(rng, true, hard, seeds, *other)
        for name, (_, metric, _) in zip(p, score_functions(true)):
            if name == 'R' and (unequal or loss): continue # equal (or apart) in rho, not in R
            p[name].append(p_values(metric, a, b, true, rng if pair % 8 == 0 and videos < 200 and not loss else None))
    facts = dict(what=what_of(loss), where=scenario, videos=videos, seeds=seeds)
    return [row for name, own in p.items() if own for row in rates(own, **facts, metric=name)]


# ---- trainings that differ in nothing but the seed

def trained_pairs(splits=200):
    "Random halves of the seeds in seed_scores.csv.gz; pairs share seeds and videos, so they have no interval"
    table, rows = pd.read_csv(SCORES), []
    for (dataset, method, protocol), own in table.groupby(['dataset', 'method', 'protocol'], sort=False):
        preds, true = own.filter(regex=r'^s\d+$').dropna(axis=1).to_numpy().T, own.true.to_numpy()
        for k in (k for k in (2, 3, 5) if 2*k <= len(preds)):
            rng = np.random.default_rng([k, len(preds)])
            halves = [rng.permutation(len(preds))[:2*k] for _ in range(splits)]
            for name, (_, metric, _) in zip(('rho', 'R'), score_functions(true)):
                p = [p_values(metric, preds[i[:k]], preds[i[k:]], true) for i in halves]
                rows += rates(p, False, what='trained', where=f'{dataset} {method} {protocol}, {len(preds)} seeds', videos=len(true), seeds=k, metric=name)
    return rows

def published_pairs():
    "All pairs of published runs of one configuration, one training against one: the new test gives no p"
    root = unpack_runs(ROOT/'reports'/'published')
    groups = [own for _, own in collect(root).groupby(SAME_RUN) if own.seed.nunique() >= 3]
    p = {'rho': [], 'R': []}
    for own in groups:
        preds, true = stack_predictions(root, own.run)
        for name, (_, metric, _) in zip(p, score_functions(true)):
            p[name] += [{'videos': paired_test(metric, preds[[i]], preds[[j]], true, n=SWAPS)[1]} for i, j in itertools.combinations(range(len(preds)), 2)]
    return [row for name, own in p.items() for row in rates(own, False, what='published', where=f'{len(groups)} configurations', seeds=1, metric=name)]


def study():
    "All rows, into seed_test.csv as they come; steps that are there are not repeated"
    plan = [(scenario, videos, seeds, 400 if videos < 100 else 200 if videos < 200 else 60, 0.)
            for videos in (45, 60, 150, 749) for scenario in SCENARIOS for seeds in (3, 5)]
    plan += [('trainings differ', videos, seeds, 100, loss) for videos in (45, 150) for seeds in (3, 5) for loss in (.03, .05, .1)]
    plan += [(scenario, 60, 2, 400, 0.) for scenario in SCENARIOS]
    table = pd.read_csv(RATES) if RATES.is_file() else pd.DataFrame(published_pairs()+trained_pairs())
    for step in plan:
        there = (table['where'] == step[0]) & (table.videos == step[1]) & (table.seeds == step[2]) & (table.what == what_of(step[-1]))
        if there.any(): continue
        table = pd.concat([table, pd.DataFrame(simulate(*step))], ignore_index=True)
        table = table.reindex(columns=['what', 'where', 'videos', 'seeds', 'metric', 'test', 'pairs', 'share', 'lo', 'hi']).astype({'videos': 'Int64'})
        write_atomic(RATES, table.to_csv(index=False, float_format='%.4f', lineterminator='\n'))
        print(*step, flush=True)


if __name__ == '__main__': train() if sys.argv[1:] == ['train'] else study()
