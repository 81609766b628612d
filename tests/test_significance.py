"Significance against exact enumeration, hand-made cases and SciPy; block metrics and intervals against the plain functions"
import itertools
import json
import tracemalloc
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from conftest import as_trained
from fspn_nb.analysis.class_averages import average_test
from fspn_nb.analysis.compare import compare
from fspn_nb.analysis.published import unpack_runs
from fspn_nb.analysis.interval_coverage import coverage
from fspn_nb.analysis.significance import _gap_ci,_gap_parts,holm,jackknife,paired_ci,paired_test,retrain_test,seed_mean_ci
from fspn_nb.analysis.watched_epochs import epoch_selection,per_epoch
from fspn_nb.config import make_config
from fspn_nb.metrics import bca,bootstrap_ci,on_rows,relative_l2,spearman,summarise
from fspn_nb.protocols import PROTOCOLS,SPORTS
from fspn_nb.report.fake_runs import fake_run
from fspn_nb.report.run_index import open_index
from fspn_nb.report.run_report import compare_methods
from fspn_nb.report.table_sections import methods_section

ROOT = Path(__file__).resolve().parents[1]


def mae(p, t):
    "A metric that the package does not know"
    return float(np.abs(p-t).mean())


@pytest.fixture(scope='module')
def pair():
    "True scores of 60 videos, and three seeds each of a good method and of the same plus noise"
    rng = np.random.default_rng(0)
    y = rng.normal(66, 15, 60)
    a = y+rng.normal(0, 5, (3, 60))
    return a, a+rng.normal(0, 15, (3, 60)), y


# ---- metrics in blocks

@pytest.mark.parametrize('f', [spearman, relative_l2, partial(relative_l2, p=1), partial(relative_l2, lo=0, hi=104.4), partial(relative_l2, lo=0), partial(spearman), mae])
@pytest.mark.parametrize('ties', [False, True])
def test_a_block_is_the_plain_function_to_the_last_bit(f, ties):
    rng = np.random.default_rng(3)
    p, t = rng.normal(60, 15, (2, 90)).round(-1 if ties else 6)
    i = rng.integers(0, 90, (50, 90))
    assert on_rows(f, p, t)(i).tolist() == [f(p[k], t[k]) for k in i]
    assert on_rows(f, p, t)(i.reshape(5, 10, 90)).shape == (5, 10)
    assert on_rows(f, p, t)(np.arange(90)) == f(p, t)


def test_a_block_has_nan_where_the_plain_function_has_no_value():
    p, t = np.array([1., 1., 2.]), np.array([5., 6., 5.])
    i = np.array([[0, 1, 1], [0, 2, 2], [0, 1, 2]]) # predictions constant, truth constant, neither
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert np.isnan(on_rows(spearman, p, t)(i)).tolist() == [True, True, False]
        assert np.isnan(on_rows(relative_l2, p, t)(i)).tolist() == [False, True, False]


def _slow_ci(metric, pred, true, n, seed):
    "The interval by a Python call per resample, as SciPy's `vectorized=False` has it"
    with np.errstate(all='ignore'):
        res = stats.bootstrap((pred, true), metric, paired=True, vectorized=False, n_resamples=n, method='BCa', random_state=np.random.default_rng(seed))
    return tuple(res.confidence_interval)


@pytest.mark.parametrize('size, n', [(12, 200), (150, 300), (700, 120)])
@pytest.mark.parametrize('f', [spearman, relative_l2, partial(relative_l2, lo=0, hi=120), mae])
def test_intervals_are_those_of_the_loop(f, size, n):
    rng = np.random.default_rng(size)
    y = rng.normal(60, 15, size)
    p = y+rng.normal(0, 8, size)
    assert bootstrap_ci(f, p, y, n=n, seed=5) == _slow_ci(f, p, y, n, 5)


RUNS = sorted(unpack_runs(ROOT/'reports'/'published').glob('*/*/metrics.json'))


@pytest.mark.skipif(not RUNS, reason='no finished runs in reports/published')
@pytest.mark.parametrize('file', RUNS[::max(1, len(RUNS)//8)], ids=lambda p: p.parent.name)
def test_stored_intervals_come_out_again(file):
    kept, table = json.loads(file.read_text()), pd.read_csv(file.parent/'predictions.csv', dtype={'uid': str}).query("split == 'test'")
    result = summarise(table.pred.to_numpy(), table.true.to_numpy(), seed=kept['seed'])
    same = [k for k in result if k in kept] # runs from before `reason` lack it
    assert {'spearman_lo', 'relative_l2_hi', 'n'} <= set(same)
    close = lambda value: value if isinstance(value, str) else pytest.approx(value, abs=1e-12, rel=0, nan_ok=True)
    assert {k: result[k] for k in same} == {k: close(kept[k]) for k in same}


def test_memory_does_not_grow_with_the_resamples():
    rng = np.random.default_rng(0)
    y, p = rng.normal(size=(2, 700))
    tracemalloc.start()
    bootstrap_ci(spearman, p, y, n=3000) # at once: 3000 x 700 x 8 bytes = 17 MB, and several of them
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6


def test_bca_of_nothing_and_of_something_undefined():
    assert np.isnan(bca(lambda i, axis: i.mean(axis), 1)).all()
    assert np.isnan(bca(lambda i, axis: np.full(i.shape[:-1], np.nan), 9)).all()


# ---- means over seeds

@pytest.mark.parametrize('f', [spearman, partial(relative_l2, lo=0, hi=110), mae])
def test_one_seed_is_the_plain_bootstrap(pair, f):
    a, _, y = pair
    assert seed_mean_ci(f, a[:1], y, n=300, seed=7) == bootstrap_ci(f, a[0], y, n=300, seed=7)


def test_seeds_share_the_resample(pair):
    "So copies of a seed add nothing, and the interval of the mean is not narrower than luck allows"
    a, _, y = pair
    assert seed_mean_ci(spearman, np.repeat(a[:1], 4, 0), y, n=300) == pytest.approx(bootstrap_ci(spearman, a[0], y, n=300), abs=1e-12)
    lo, hi = seed_mean_ci(spearman, a, y, n=300)
    assert lo < np.mean([spearman(p, y) for p in a]) < hi


# ---- two methods

def test_the_same_method_twice(pair):
    a, _, y = pair
    for f in (spearman, mae): assert paired_test(f, a, a, y, n=200) == (0, 1) and paired_ci(f, a, a, y, n=200) == (0, 0)


def test_added_noise_is_found(pair):
    a, b, y = pair
    for f, sign in ((spearman, 1), (mae, -1)):
        d, p = paired_test(f, a, b, y, n=999)
        lo, hi = paired_ci(f, a, b, y, n=500)
        assert sign*d > 0 and p < .01 and 0 < (sign*np.array([lo, hi])).min()
        assert lo < d < hi
        assert paired_test(f, b, a, y, n=999) == (pytest.approx(-d), pytest.approx(p, abs=.01))


def test_repeats_for_a_seed_and_only_for_it(pair):
    a, _, y = pair
    b = y+np.random.default_rng(5).normal(0, 5, (3, 60))
    assert paired_test(mae, a, b, y, n=300, seed=1) == paired_test(mae, a, b, y, n=300, seed=1) != paired_test(mae, a, b, y, n=300, seed=2)
    assert paired_ci(mae, a, b, y, n=300, seed=1) == paired_ci(mae, a, b, y, n=300, seed=1) != paired_ci(mae, a, b, y, n=300, seed=2)


def _enumerated(metric, a, b, true):
    "Difference and p by trying every swap: Eq.-free, one Python loop"
    if metric is spearman: a, b = (stats.rankdata(preds, axis=1) for preds in (a, b))
    def gap(swap): return np.mean([metric(np.where(swap, q, p), true)-metric(np.where(swap, p, q), true) for p, q in zip(a, b)])
    d, null = gap(np.zeros(len(true), bool)), np.array([gap(np.array(s)) for s in itertools.product([False, True], repeat=len(true))])
    return d, min(1, 2*min((null >= d-1e-12).mean(), (null <= d+1e-12).mean()))


@pytest.mark.parametrize('size', [4, 6, 8])
@pytest.mark.parametrize('seeds', [1, 3])
@pytest.mark.parametrize('f', [spearman, mae])
def test_p_is_exact_for_few_videos(f, seeds, size):
    rng = np.random.default_rng([size, seeds])
    y = rng.normal(60, 15, size)
    a, b = y+rng.normal(0, 5, (seeds, size)), y+rng.normal(3, 20, (seeds, size))
    assert paired_test(f, a, b, y) == pytest.approx(_enumerated(f, a, b, y), abs=1e-12)


def test_d120_a_bias_or_a_stretch_changes_no_rank_and_no_p(pair):
    a, _, y = pair
    b = a+np.random.default_rng(5).normal(0, 4, (3, 60))
    expected = paired_test(spearman, a, b, y, n=300)
    assert paired_test(spearman, a, b+30, y, n=300) == paired_test(spearman, a, np.exp(b/20), y, n=300) == expected
    assert paired_test(mae, a, b+30, y, n=300)[1] < .01


def test_d120_false_alarms_are_as_rare_as_promised():
    "Two equal methods, one of which answers on another scale: p < .1 in a tenth of the cases, neither never nor often"
    rejected = 0
    for k in range(150):
        rng = np.random.default_rng(k)
        y = rng.normal(0, 1, 40)
        a, b = y+rng.normal(0, .5, (2, 1, 40))
        rejected += paired_test(spearman, a, 3*b+1, y, n=199, seed=k)[1] < .1
    assert 5 <= rejected <= 27


def test_undefined_swaps_count_against_the_difference():
    "Half of the four swaps of (1,2) and (2,1) are constant"
    assert paired_test(spearman, [[1., 2.]], [[2., 1.]], np.array([1., 2.])) == (2, 1)


# ---- bad input, and metrics that are not there

@pytest.mark.parametrize('f', [paired_ci, paired_test])
def test_constant_predictions_give_nan_everywhere(pair, f):
    a, _, y = pair
    flat = a.copy()
    flat[1] = 60.
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for one, two in ((a, flat), (flat, a), (flat, flat)): assert np.isnan(f(spearman, one, two, y, n=100)).all()
        assert np.isnan(seed_mean_ci(spearman, flat, y, n=100)).all()
        assert np.isnan(f(spearman, a, a+1, np.full(60, 5.), n=100)).all()
        assert np.isfinite(f(mae, a, flat, y, n=100)).all()


@pytest.mark.parametrize('preds', [np.zeros(5), np.zeros((0, 5)), np.zeros((2, 4)), np.zeros((2, 2, 5)), [[1., 2., 3., 4., np.nan]], 3.])
def test_bad_shapes_are_value_errors(preds):
    y = np.arange(5.)
    with pytest.raises(ValueError, match='need'): seed_mean_ci(spearman, preds, y)
    for f in (paired_ci, paired_test):
        with pytest.raises(ValueError, match='need'): f(spearman, preds, preds, y)
        with pytest.raises(ValueError, match='need'): f(spearman, np.zeros((2, 5)), preds, y)


def test_one_video_has_no_interval():
    assert np.isnan(seed_mean_ci(mae, [[1.]], [2.], n=10)).all() and np.isnan(paired_ci(mae, [[1.]], [[3.]], [2.], n=10)).all()


def test_lists_will_do(pair):
    a, b, y = pair
    assert paired_test(spearman, a.tolist(), b.tolist(), y.tolist(), n=100) == paired_test(spearman, a, b, pd.Series(y), n=100)
    assert seed_mean_ci(spearman, a.tolist(), y.tolist(), n=100) == seed_mean_ci(spearman, a, pd.Series(y), n=100)


# ---- another training on other videos

def _left_out(metric, pred, true):
    "The pulls of the videos by deleting each in turn"
    without = np.array([metric(np.delete(pred, i), np.delete(true, i)) for i in range(len(true))])
    return (len(true)-1)*(without.mean()-without)


@pytest.mark.parametrize('f', [spearman, relative_l2, partial(relative_l2, lo=0, hi=120), partial(relative_l2, p=1), mae])
@pytest.mark.parametrize('digits', [6, -1])
def test_pulls_are_those_of_deleting_each_video(f, digits):
    y, p = np.random.default_rng(4).normal(60, 15, (2, 31)).round(digits) # -1: ties on both sides
    value, pulls = jackknife(f, p, y)
    assert value == f(p, y) and pulls == pytest.approx(_left_out(f, p, y), abs=1e-9)


def test_pulls_know_their_bounds_and_their_data():
    "The memory of earlier results keeps metrics, bounds, predictions and truth apart"
    y, p = np.random.default_rng(5).normal(60, 15, (2, 12))
    keys = [(spearman, p, y), (mae, p, y), (relative_l2, p, y), (partial(relative_l2, lo=0, hi=100), p, y), (partial(relative_l2, lo=0, hi=200), p, y), (mae, p+1, y), (mae, p, y+1)]
    first = [jackknife(*key) for key in keys]
    assert len({value for value, _ in first}) == len(keys)
    for key, (value, _) in zip(keys, first): assert value == key[0](*key[1:]) == jackknife(*key)[0]


def test_copies_of_a_seed_leave_the_test_over_videos():
    "Without spread over seeds it is the paired t of the videos' pulls"
    rng = np.random.default_rng(6)
    y, a, b = rng.normal(60, 15, (3, 40))
    gap, p = retrain_test(mae, np.tile(a, (3, 1)), np.tile(b, (3, 1)), y)
    assert (gap, p) == (pytest.approx(mae(a, y)-mae(b, y)), pytest.approx(stats.ttest_rel(abs(a-y), abs(b-y)).pvalue))


def test_seeds_that_differ_by_a_constant_leave_welch():
    "Methods that do the same to every video: no covariance, and Welch's t of the seeds remains"
    y = np.zeros(30)
    a, b = (np.array(shift)[:, None]+np.zeros((len(shift), 30)) for shift in ([1., 2., 4.], [5., 5.5, 7., 6.]))
    assert retrain_test(mae, a, b, y) == (pytest.approx(7/3-5.875), pytest.approx(stats.ttest_ind([1., 2., 4.], [5., 5.5, 7., 6.], equal_var=False).pvalue))


def test_a_bias_or_a_stretch_changes_no_p_of_rho(pair):
    a, b, y = pair
    expected = retrain_test(spearman, a, b, y)
    assert retrain_test(spearman, a, np.exp(b/20), y) == retrain_test(spearman, a, b+30, y) == expected
    assert retrain_test(spearman, b, a, y) == (-expected[0], pytest.approx(expected[1]))
    assert retrain_test(spearman, a[::-1], b, y) == (pytest.approx(expected[0]), pytest.approx(expected[1])), 'seeds are not paired'


def test_no_p_without_a_second_training(pair):
    a, b, y = pair
    for one, two in ((a[:1], b), (a, b[:1]), (a[:1], b[:1])):
        gap, p = retrain_test(spearman, one, two, y)
        assert np.isfinite(gap) and np.isnan(p)
    flat = np.full((2, 60), 60.)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert np.isnan(retrain_test(spearman, a, flat, y)).all() and np.isfinite(retrain_test(mae, a, flat, y)).all()
        assert retrain_test(mae, flat, flat+1, np.full(60, 9.)) == (-1, pytest.approx(np.nan, nan_ok=True)), 'no spread at all'
        assert np.isnan(retrain_test(spearman, a[:, :2], b[:, :2], y[:2])[1]) and np.isnan(retrain_test(spearman, a[:, :1], b[:, :1], y[:1])).all()


def test_perfect_predictions_have_no_place_on_the_scales(pair):
    a, _, y = pair
    for f, best in ((spearman, 1.), (relative_l2, 0.)):
        gap, p = retrain_test(f, np.tile(y, (2, 1)), a, y)
        assert gap == pytest.approx(best-np.mean([f(pred, y) for pred in a])) and 0 < p < .25


@pytest.mark.parametrize('preds', [np.zeros(5), np.zeros((0, 5)), np.zeros((2, 4)), [[1., 2., 3., 4., np.nan]], 3.])
def test_retraining_refuses_what_paired_test_refuses(preds):
    with pytest.raises(ValueError, match='need'): retrain_test(spearman, np.arange(10.).reshape(2, 5), preds, np.arange(5.))


def test_error_rates_of_pairs_of_the_same_method():
    "Three trainings of unequal quality on each side: the exchange of videos calls a quarter different, the new test one in twenty"
    wrong = np.zeros(2)
    for k in range(200):
        rng = np.random.default_rng([11, k])
        y, hard = rng.normal(66, 14, 60), rng.normal(0, 5, 60)
        a, b = (y+hard+8*np.exp(.25*rng.normal(size=(3, 1)))*rng.normal(size=(3, 60)) for _ in range(2))
        wrong += [paired_test(spearman, a, b, y, n=199)[1] < .05, retrain_test(spearman, a, b, y)[1] < .05]
    assert wrong[0]/200 > .12 and .015 <= wrong[1]/200 <= .085


def test_exchanges_of_ranks_are_those_of_the_general_way():
    "With and without ties, to the same p; and no p depends on what was compared before"
    rng = np.random.default_rng(8)
    y = rng.normal(66, 15, 45).round()
    a, b = y+rng.normal(0, 8, (3, 45)), y+rng.normal(0, 9, (3, 45))
    b[1] = b[1].round(-1)
    same = lambda p, t: spearman(p, t) # not known, so it takes the general way
    ranks = [stats.rankdata(preds, axis=1) for preds in (a, b)]
    alone = paired_test(spearman, a, b, y, n=500)
    paired_test(spearman, a[:, :40], b[:, :40], y[:40], n=500)
    assert paired_test(spearman, a, b, y, n=500) == alone == pytest.approx(paired_test(same, *ranks, y, n=500), abs=1e-12)


# ---- the interval of the same test

def retrain_ci(f, a, b, y):
    "As `compare` asks for it"
    return _gap_ci(f, *(np.mean([f(pred, y) for pred in preds]) for preds in (a, b)), *_gap_parts(f, np.asarray(a), np.asarray(b), y)[1:])


@pytest.mark.parametrize('f', [spearman, partial(relative_l2, lo=20, hi=110), mae])
def test_zero_lies_outside_exactly_where_p_is_below_05(f):
    "Methods from alike to far apart, two to four trainings each, and the same pair shifted until p passes .05"
    below = 0
    for k in range(120):
        rng = np.random.default_rng([12, k])
        y, hard, sds = rng.normal(66, 14, 40), rng.normal(0, 4, 40), (5, 5+k/10)
        a, b = (y+hard+sd*np.exp(.2*rng.normal(size=(n, 1)))*rng.normal(size=(n, 40)) for sd, n in zip(sds, rng.integers(2, 5, 2)))
        (gap, p), (lo, hi) = retrain_test(f, a, b, y), retrain_ci(f, a, b, y)
        assert lo < gap < hi and (lo > 0 or hi < 0) == (p < .05)
        assert retrain_ci(f, b, a, y) == pytest.approx((-hi, -lo))
        below += p < .05
    assert 20 < below < 110
    if f is mae:
        near = [(retrain_test(f, a+shift, b, y)[1] < .05, retrain_ci(f, a+shift, b, y)) for shift in np.linspace(-60, 60, 400)]
        assert len({below for below, _ in near}) == 2 and all(below == (lo > 0 or hi < 0) for below, (lo, hi) in near)


def test_the_interval_is_scipys_where_only_seeds_or_only_videos_differ():
    y, (a, b) = np.zeros(30), (np.array(shift)[:, None]+np.zeros((len(shift), 30)) for shift in ([1., 2., 4.], [5., 5.5, 7., 6.]))
    assert retrain_ci(mae, a, b, y) == pytest.approx(tuple(stats.ttest_ind([1., 2., 4.], [5., 5.5, 7., 6.], equal_var=False).confidence_interval()))
    y, a, b = np.random.default_rng(6).normal(60, 15, (3, 40))
    assert retrain_ci(mae, np.tile(a, (3, 1)), np.tile(b, (3, 1)), y) == pytest.approx(tuple(stats.ttest_rel(abs(a-y), abs(b-y)).confidence_interval()))


def test_no_interval_without_a_p(pair):
    a, b, y = pair
    flat = np.full((2, 60), 60.)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for one, two in ((a[:1], b), (a, b[:1]), (a, flat)): assert np.isnan(retrain_ci(spearman, one, two, y)).all()
        assert np.isnan(retrain_ci(mae, flat, flat+1, np.full(60, 9.))).all() and retrain_ci(mae, flat, flat, np.full(60, 9.)) == (0, 0)
        lo, hi = retrain_ci(spearman, a, a, y)
        assert lo == -hi and hi > 0 and retrain_test(spearman, a, a, y) == (0, 1)
        lo, hi = retrain_ci(spearman, np.tile(y, (2, 1)), a, y) # a rho of 1 has no z
        assert lo < 1-np.mean([spearman(pred, y) for pred in a]) < hi


@pytest.mark.parametrize('sds', [(6, 6), (5, 9), (4, 20)])
def test_the_interval_holds_the_difference_of_methods(sds):
    "Other trainings on other videos, the truth known; the interval over videos alone misses it far more often"
    metrics, held, videos = dict(rho=spearman, r=partial(relative_l2, lo=20, hi=110)), [], []
    def draw(rng, n, k):
        y, hard = rng.normal(66, 14, n), rng.normal(0, 5, n)
        return *(y+hard+sd*np.exp(.2*rng.normal(size=(k, 1)))*rng.normal(size=(k, n)) for sd in sds), y
    large = [draw(np.random.default_rng([13, k]), 4000, 1) for k in range(100)]
    truth = dict(rho=np.mean([spearman(a[0], y)-spearman(b[0], y) for a, b, y in large]), r=np.exp(.08)*(sds[0]**2-sds[1]**2)/90**2)
    for k in range(150):
        a, b, y = draw(np.random.default_rng([14, k]), 80, 3)
        inside = lambda ends, name: ends[0] <= truth[name] <= ends[1]
        held.append([inside(retrain_ci(f, a, b, y), name) for name, f in metrics.items()])
        if k < 60: videos.append([inside(paired_ci(f, a, b, y, n=200), name) for name, f in metrics.items()])
    assert (np.mean(held, 0) > .88).all() and (np.mean(held, 0) > np.mean(videos, 0)).all(), (np.mean(held, 0), np.mean(videos, 0))


def test_compare_gives_the_interval_of_its_p(tmp_path):
    "Two methods whose trainings differ more than the methods: over videos alone they are told apart, with other trainings they are not"
    made = {(name, seed): make_config('finediving', 'demo', model__name=name, seed=seed) for name in ('i3d_mlp', 'i3d_avg') for seed in range(3)}
    miss = dict(zip(made, (2., 4., 9., 5., 8., 10.)))
    runs = {key: fake_run(tmp_path, cfg, miss[key], n=150) for key, cfg in made.items()}
    a, b = ([runs[name, seed] for seed in range(3)] for name in ('i3d_mlp', 'i3d_avg'))
    for table in (compare(a, b, n=500, tests=500), compare(a, b[:2], n=500, tests=500), compare(a, a, n=50, tests=50)):
        assert ((table.lo <= table.difference) & (table.difference <= table.hi)).all() and (((table.lo > 0) | (table.hi < 0)) == (table.p < .05)).all()
    table = compare(a, b, n=500, tests=500).set_index('metric')
    assert table.p['rho'] > .05 > table.p_videos['rho'] and table.lo['rho'] < 0 < table.lo_videos['rho']
    one = compare(a[0], b[0], n=100, tests=100)
    assert one[['lo', 'hi', 'p']].isna().all(axis=None) and one[['lo_videos', 'hi_videos', 'p_videos']].notna().all(axis=None)

# ---- Holm

def test_holm_by_hand():
    assert holm([.01, .04, .03]).tolist() == pytest.approx([.03, .06, .06])
    assert holm([.5, .9, .4]).tolist() == [1, 1, 1]
    assert holm([.2]).tolist() == [.2] and holm([]).tolist() == []
    assert holm([.02, .02]).tolist() == pytest.approx([.04, .04])


def test_holm_keeps_nan_and_does_not_count_it():
    result = holm([np.nan, .01, np.nan, .04])
    assert np.isnan(result).tolist() == [True, False, True, False] and result[[1, 3]] == pytest.approx([.02, .04])
    assert np.isnan(holm([np.nan, np.nan])).all()


def _rejected(p, level):
    "Holm (1979) as he states it: go up the sorted p-values until one exceeds level/(m-k), reject those before"
    out = np.zeros(len(p), bool)
    for k, i in enumerate(np.argsort(p)):
        if p[i] > level/(len(p)-k): break
        out[i] = True
    return out


@pytest.mark.parametrize('seed', range(20))
def test_holm_follows_the_definition(seed):
    p = np.random.default_rng(seed).uniform(0, .2, 7)**2
    for level in (.01, .05, .1): assert (holm(p) <= level).tolist() == _rejected(p, level).tolist()
    assert (holm(p) >= p).all() and (holm(p) <= np.minimum(1, 7*p)).all() # between none and Bonferroni


@pytest.mark.parametrize('p', [[-.1, .5], [1.01], [[.1, .2]], .3])
def test_holm_refuses_what_is_no_p(p):
    with pytest.raises(ValueError, match='p-values from 0 to 1'): holm(p)


# ---- picking the epoch

def _watched(rhos, split='test', true=(0, 10, 20, 30.)):
    "One run whose predictions have these rhos; 1: in order, .8: the last two swapped, -1: reversed, None: constant"
    order = {1: (0, 10, 20, 30), .8: (0, 10, 30, 20), -1: (30, 20, 10, 0), None: (7, 7, 7, 7)}
    return pd.concat([pd.DataFrame(dict(method='m', seed=0, epoch=10*k, split=split, uid=list('abcd'), true=true, pred=np.array(order[rho], float))) for k, rho in enumerate(rhos, 1)])


def test_picking_by_hand():
    w = pd.concat([_watched([-1, 1, .8]), _watched([.8, -1, .8], 'val')])
    row = epoch_selection(w).iloc[0]
    assert (row.epoch_last, row.epoch_val, row.epoch_best_rho, row.epoch_best_r) == (30, 10, 20, 20) # the earlier of two equals on validation
    assert (row.rho_last, row.rho_val, row.rho_test) == pytest.approx((.8, -1, 1))
    assert (row.r_last, row.r_test) == pytest.approx((100*2*(10/30)**2/4, 0)) and row.r_val == pytest.approx(100*(2*1+2/9)/4)
    assert (row.worth_rho, row.worth_r) == pytest.approx((.2, row.r_last))


def test_each_metric_has_its_own_best_epoch():
    w = _watched([1, .8])
    w.loc[w.epoch == 10, 'pred'] += 40 # perfect order, far off
    row = epoch_selection(w).iloc[0]
    assert (row.epoch_best_rho, row.epoch_best_r) == (10, 20) and row.worth_r == 0 and row.worth_rho == pytest.approx(.2)


def test_constant_epochs_are_passed_over():
    row = epoch_selection(pd.concat([_watched([None, .8, None]), _watched([None, None, None], 'val')])).iloc[0]
    assert row.epoch_best_rho == 20 and np.isnan([row.rho_last, row.worth_rho, row.rho_val, row.epoch_val]).all() and np.isfinite(row.worth_r)
    assert np.isnan(epoch_selection(_watched([None])).iloc[0].rho_test)
    assert np.isnan(epoch_selection(_watched([1], true=(5., 5, 5, 5))).iloc[0][['rho_last', 'r_last', 'worth_r']].astype(float)).all()


def test_rows_may_come_in_any_order_and_methods_apart():
    w = pd.concat([_watched([-1, 1, .8]), _watched([.8, -1, .8], 'val')])
    both = pd.concat([w, w.assign(method='k', pred=w.pred+1), w.assign(seed=1)])
    result = epoch_selection(both.sample(frac=1, random_state=0))
    assert result[['method', 'seed']].values.tolist() == [['k', 0], ['m', 0], ['m', 1]]
    pd.testing.assert_series_equal(result.iloc[1], epoch_selection(w).iloc[0], check_names=False)
    assert len(per_epoch(both)) == 18


@pytest.mark.parametrize('spoil, word', [(lambda w: w.drop(columns='pred'), 'lack: pred'), (lambda w: w[:0], 'got 0 rows'), (lambda w: w[w.split == 'val'], 'need rows of the test split'),
                                         (lambda w: pd.concat([w, w]), 'got 24 more'), (lambda w: w.assign(pred=np.nan), 'need finite scores')])
def test_watched_rows_are_checked(spoil, word):
    w = pd.concat([_watched([-1, 1, .8]), _watched([.8, -1, .8], 'val')])
    with pytest.raises(ValueError, match=word): epoch_selection(spoil(w))


# ---- coverage

def test_coverage_repeats_and_adds_up():
    a, b = (coverage((20, 40), sims=30, resamples=200, seed=4) for _ in range(2))
    pd.testing.assert_frame_equal(a, b)
    assert (a.covered+a.lo_missed+a.hi_missed).tolist() == pytest.approx([1, 1])
    assert a.covered.min() >= .8 and a.mean_width[0] > a.mean_width[1]
    assert a.rho_true[0] == pytest.approx(6/np.pi*np.arcsin(.45)) and coverage((20,), 3, r=0., resamples=50).rho_true[0] == 0


def test_true_rho_of_the_simulation():
    z = np.random.default_rng(0).multivariate_normal([0, 0], [[1, .9], [.9, 1]], 200_000)
    assert spearman(*z.T) == pytest.approx(6/np.pi*np.arcsin(.45), abs=1e-3)


def test_average_over_classes_keeps_its_error_rate():
    "Two names for one method on six classes: each training has a quality of its own; called different about once in twenty"
    rng, called = np.random.default_rng(7), []
    for _ in range(300):
        classes = []
        for _ in range(6):
            true, hard = rng.normal(70, 12, 60), rng.normal(0, 5, 60) # some videos are hard for all trainings
            classes.append((*(true+hard+rng.uniform(4, 9, (3, 1))*rng.normal(size=(3, 60)) for _ in 'ab'), true))
        called.append([average_test(score, classes)['p'] < .05 for score in ('rho', 'r_l2_x100')])
    assert (np.mean(called, 0) > .015).all() and (np.mean(called, 0) < .085).all(), np.mean(called, 0)


def test_average_over_classes_in_reports_and_notebooks(tmp_path):
    "FSPN is better in each class by little: beyond chance on average; five classes have no average"
    made = {(sport, name, seed): as_trained('aqa7', 'demo', protocol=sport, model__name=name, seed=seed) for sport in SPORTS for name in ('fspn', 'i3d_mlp') for seed in range(3)}
    done = [SimpleNamespace(cfg=cfg, run=fake_run(tmp_path, cfg, 5. if cfg.model.name == 'fspn' else 7., n=60)) for cfg in made.values()]
    session = SimpleNamespace(dataset='aqa7', dataset_protocol=PROTOCOLS['aqa7'], runs=list(made.values()), done=done)
    table = compare_methods(session, n=50).set_index(['block', 'metric'])
    average = table.loc['average']
    mean = lambda name: np.tanh(np.mean([np.arctanh(table.loc[variant.title, 'rho'][name]) for variant in PROTOCOLS['aqa7'].variants.values()]))
    assert np.isclose(average.difference['rho'], mean('a')-mean('b')) and average.methods['rho'] == 'fspn minus i3d_mlp'
    assert average.difference['rho'] > 0 > average.difference['r_l2_x100'] and average.p['rho'] < .05 and average.n['rho'] == 360
    lines = methods_section(open_index(tmp_path, (0, 1, 2), n=20, tests=50, sizes=False), 'aqa7').lines
    assert any(line.startswith('Average over classes: above FSPN in rho: none. FSPN is above 1 of 1 methods, above 1 of them beyond chance') for line in lines), lines
    session.done = [result for result in done if result.cfg.protocol != 'gym_vault']
    assert 'average' not in set(compare_methods(session, n=50).block)


# ---- how many seeds and videos a comparison needs

@pytest.fixture(scope='module')
def power_study():
    import importlib.util
    spec = importlib.util.spec_from_file_location('power_study', Path(__file__).with_name('power_study.py'))
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.parametrize('S, n', [(3, 60), (5, 300)])
def test_power_is_the_share_of_simulated_studies_that_find_the_difference(power_study, S, n):
    "Two methods with trainings that vary, on videos that all share: the test of the tables finds as many as was computed"
    rng, seeds, videos, gap, studies = np.random.default_rng(3), .01, .9, .15, 40_000
    parts = np.stack([seeds/S*rng.chisquare(S-1, studies)/(S-1), seeds/S*rng.chisquare(S-1, studies)/(S-1), videos/n*rng.chisquare(n-1, studies)/(n-1)])
    found = gap+rng.normal(size=studies)*np.sqrt(2*seeds/S+videos/n)
    freedom = parts.sum(0)**2/(parts**2/np.array([[S-1], [S-1], [n-1]])).sum(0)
    share = np.mean(np.abs(found)/np.sqrt(parts.sum(0)) > stats.t.ppf(.975, freedom))
    assert power_study.power(gap, seeds, videos, S, n) == pytest.approx(share, abs=.04)
    assert power_study.power(0, seeds, videos, S, n) == pytest.approx(.05, abs=.001)


def test_the_smallest_difference_is_found_in_80_of_100_studies(power_study):
    for S, n in ((3, 60), (10, 749)):
        least = power_study.smallest(.01, .9, S, n, .85)
        assert power_study.power(power_study.on_z(least, .85), .01, .9, S, n) == pytest.approx(.8, abs=1e-3)
    assert power_study.smallest(.01, .9, 10, 749, .85) < power_study.smallest(.01, .9, 3, 60, .85)
    assert power_study.smallest(9., 9., 2, 20, .85) != power_study.smallest(9., 9., 2, 20, .85), 'never: no number'


def test_the_sizes_of_the_publication_follow_from_the_table_of_power():
    "The guide's numbers: with 300 videos more videos help little, more seeds much"
    table = pd.read_csv(Path(__file__).resolve().parents[1]/'reports'/'benchmarks'/'power.csv').set_index(['dataset', 'protocol', 'seeds', 'videos'])
    text = (Path(__file__).resolve().parents[1]/'docs'/'guide.md').read_text()
    for block, five, more in ((('finediving', 'w_dn'), '.037', '.037'), (('finediving', 'wo_dn'), '.057', '.044'), (('mtl_aqa', 'w_dd'), '.045', '.041'), (('mtl_aqa', 'wo_dd'), '.11', '.10')):
        digits = len(five)-1
        for videos, shown in ((300, five), (600, more)):
            assert f'{table.smallest_median[(*block, 5, videos)]:.{digits}f}'.lstrip('0') == shown, (block, videos)
            assert shown in text
