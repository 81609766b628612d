"""How many seeds and test videos a comparison needs, from how far the published runs lie apart (no test; half a minute)

In each block (dataset, protocol, test videos) the variance of rho over trainings (mean over configurations: three seeds alone say little) and, for each
configuration beside the one that tables compare with (the full FSPN), the variance over test videos, both on Fisher's z scale as `retrain_test` has them,
give the power to find a difference of .03 in rho at p = .05, and the smallest difference that is found in 80 of 100 studies, for other numbers of seeds and
videos. One row of the CSV: a block and a design; medians, and the worse quarter, over configurations.

    python tests/power_study.py [--out reports/benchmarks/power.csv]
"""
import argparse
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import optimize,stats

from fspn_nb.analysis.compare import stack_predictions
from fspn_nb.analysis.published import published_dir,unpack_runs
from fspn_nb.analysis.run_groups import main_runs
from fspn_nb.analysis.runs import SAME_RUN,collect
from fspn_nb.analysis.significance import _covariances,jackknife
from fspn_nb.core import write_atomic
from fspn_nb.escaping import csv_text
from fspn_nb.metrics import spearman

DESIGNS = list(itertools.product((3, 5, 10), (60, 150, 300, 600, 749)))
DIFFERENCE, ALPHA, POWER = .03, .05, .8


def pulls_of(root, group):
    "(z (S,), pulls (S,n) on that scale, mean rho) of the seeds of one configuration"
    preds, true = stack_predictions(root, group.sort_values('seed').run)
    values, pulls = map(np.array, zip(*(jackknife(spearman, pred, true) for pred in preds)))
    mean = values.mean()
    return np.arctanh(mean)+(values-mean)/(1-mean**2), pulls/(1-mean**2), mean


def video_variance(ours, other):
    "Variance of a difference that one test video brings"
    a, b = ours[1], other[1]
    return a.shape[1]*max(_covariances(a, a, True)+_covariances(b, b, True)-2*_covariances(a, b, False), 0)


def power(gap, seeds, videos, S, n):
    "Chance that a true difference of `gap` on the z scale is found with S seeds of each side and n videos"
    parts = np.array([seeds/S, seeds/S, videos/n])
    if not parts.sum(): return 1.
    freedom = parts.sum()**2/(parts**2/[S-1, S-1, n-1]).sum()
    edge, shift = stats.t.ppf(1-ALPHA/2, freedom), gap/np.sqrt(parts.sum())
    return float(stats.t.sf(edge-shift, freedom)+stats.t.cdf(-edge-shift, freedom)) # a shifted t: scipy's noncentral one fails far out


def on_z(gap, mean):
    "The difference `gap` in rho, around the mean rho of both sides, on the z scale"
    top = min(mean+gap/2, .999)
    return np.arctanh(top)-np.arctanh(top-gap)


def smallest(seeds, videos, S, n, mean):
    "The difference in rho that is found with a chance of `POWER`"
    f = lambda gap: power(on_z(gap, mean), seeds, videos, S, n)-POWER
    return optimize.brentq(f, 1e-4, 1.) if f(1.) > 0 else np.nan


def study(root):
    "Rows of the table"
    runs = collect(root)
    runs = runs[(runs.problem == '') & runs.dataset.isin(['finediving', 'mtl_aqa'])]
    ours = set(main_runs(runs, root).run)
    rows = []
    for (dataset, protocol, n_test, _), block in runs.groupby(['dataset', 'protocol', 'n', 'test_set']):
        groups = [group for _, group in block.groupby(SAME_RUN, dropna=False) if group.seed.nunique() >= 3]
        full = [group for group in groups if (group.method == 'fspn').all() and set(group.run) <= ours]
        if len(full) != 1 or len(groups) < 2: continue
        base, sides = pulls_of(root, full[0]), [pulls_of(root, group) for group in groups if group is not full[0]]
        sides = [side for side in sides if side[2] > .3] # what learns nothing is not what a table must tell apart
        trained = np.mean([side[0].var(ddof=1) for side in (base, *sides)])
        pairs = [(trained, video_variance(base, side), (base[2]+side[2])/2) for side in sides]
        for S, n in DESIGNS:
            chance = [power(on_z(DIFFERENCE, mean), seeds, videos, S, n) for seeds, videos, mean in pairs]
            least = [smallest(seeds, videos, S, n, mean) for seeds, videos, mean in pairs]
            rows.append(dict(dataset=dataset, protocol=protocol, published_n=n_test, configurations=len(pairs), seed_sd=np.sqrt(trained), seeds=S, videos=n,
                             power_median=np.median(chance), power_low=np.quantile(chance, .25), share_80=np.mean(np.array(chance) >= POWER),
                             smallest_median=np.nanmedian(least), smallest_high=np.nanquantile(least, .75)))
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', default='reports/benchmarks/power.csv')
    table = study(unpack_runs(published_dir()))
    write_atomic(Path(parser.parse_args().out), csv_text(table, float_format='%.3f'))
    print(table.round(3).to_string())


if __name__ == '__main__': main()
