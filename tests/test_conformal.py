"The interval of a score and the test for strangers: their rates where errors are drawn, ties, too few dives, and which dives count"
import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fspn_nb.analysis.conformal import (HeldOutErrors,conformal_quantile,coverage_range,describe_interval,held_out_errors,least_dives,
    rank_test,score_interval)
from fspn_nb.config import make_config,save_cfg

DRAWS = {'normal': lambda rng, size: rng.normal(size=size), 'heavy tails': lambda rng, size: rng.standard_t(2, size), 'skewed': lambda rng, size: rng.exponential(size=size)-1,
         'half points': lambda rng, size: np.round(2*rng.normal(size=size))/2, 'all equal': lambda rng, size: np.ones(size)}


@pytest.mark.parametrize('kind', DRAWS)
@pytest.mark.parametrize('n, level', [(9, .9), (13, .9), (63, .9), (39, .8), (19, .95)])
def test_coverage_is_what_the_beta_law_says(kind, n, level):
    "Mean coverage over 2,000 draws of n held-out errors and 20 new ones; with ties it can only be larger"
    rng, sims, m = np.random.default_rng([n, list(DRAWS).index(kind)]), 2000, 20
    errors = np.abs(DRAWS[kind](rng, (sims, n+m)))
    widths = np.array([conformal_quantile(own, level) for own in errors[:, :n]])
    covered = (errors[:, n:] <= widths[:, None]).mean(1)
    rank = math.ceil((n+1)*level-1e-9)
    law = stats.betabinom(m, rank, n+1-rank)
    room = 4*law.std()/m/np.sqrt(sims)
    assert covered.mean() >= rank/(n+1)-room and rank/(n+1) >= level-1e-9
    if kind in ('normal', 'heavy tails', 'skewed'):
        assert covered.mean() <= rank/(n+1)+room
        lo, hi = coverage_range(n, m, level)
        assert .93 < ((covered >= lo) & (covered <= hi)).mean() <= 1


def test_too_few_dives_give_no_end():
    assert [least_dives(level) for level in (.5, .8, .9, .95)] == [1, 4, 9, 19]
    for level in (.8, .9, .95):
        n = least_dives(level)
        assert conformal_quantile(np.arange(n), level) == n-1 and conformal_quantile(np.arange(n-1), level) == math.inf
    assert conformal_quantile([], .9) == math.inf and coverage_range(8) == (1, 1)
    few = score_interval(70., HeldOutErrors(np.ones(8), dict(test=8)))
    assert (few.lo, few.hi, few.bounded) == (0, math.inf, False)
    text = describe_interval(few, 'video')
    assert 'at least 9 videos' in text and text.endswith('got 8.') and 'inf' not in text


@pytest.mark.parametrize('score, ends', [(-5., (0, 0)), (-2., (0, 0)), (-1., (0, 1)), (1., (0, 3)), (5., (3, 7))])
@pytest.mark.parametrize('difficulty', [None, 2.])
def test_the_ends_are_in_order_and_no_score_is_negative(score, ends, difficulty):
    "Half width 2, also as 1 per difficulty at difficulty 2; what the interval held of the scores from 0 up, it still holds"
    errors = HeldOutErrors(np.full(40, 2. if difficulty is None else 1.), dict(test=40), difficulty is not None)
    interval = score_interval(score, errors, difficulty)
    assert (interval.lo, interval.hi) == ends and interval.bounded and interval.half_width == 2
    text = describe_interval(interval)
    assert text.startswith(f'{ends[0]:.1f} to {ends[1]:.1f}: 90%' if ends[1] else '0.0, since all of it lies below 0') and '0.0 to 0.0' not in text and '-' not in text


@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_missing_error_is_an_error(bad):
    with pytest.raises(ValueError, match='got 1 of 12 without a number'): conformal_quantile([*range(11), bad])
    with pytest.raises(ValueError, match='need finite values'): rank_test(bad, range(20))
    with pytest.raises(ValueError, match='need finite values'): rank_test(1., [*range(20), bad])


@pytest.mark.parametrize('level', [0, 1, 90, -1])
def test_levels(level):
    with pytest.raises(ValueError, match='between 0 and 1'): conformal_quantile(range(99), level)


def run_with(root, splits, **changes):
    "A run's folder with predictions that are 1, 2, 3, ... points off in each of `splits`"
    run = root/'finediving'/'run'
    save_cfg(make_config('finediving', 'demo', **changes), run/'config.json')
    rows = [dict(uid=f'{split}/{i}', true=50., pred=50.+(i+1)*(-1)**i, difficulty=2.5, action='107b', split=split, seed=0) for split, n in splits.items() for i in range(n)]
    pd.DataFrame(rows).to_csv(run/'predictions.csv', index=False)
    return run


def test_which_dives_count(tmp_path):
    "Validation and test, never training; validation not where it chose the epoch, or where there is none; errors per difficulty where labels are"
    splits = dict(train=30, val=13, test=20)
    errors = held_out_errors(run_with(tmp_path/'a', splits))
    assert errors.counts == dict(val=13, test=20) and sorted(errors.values) == sorted([*range(1, 14), *range(1, 21)])
    assert score_interval(50., errors).half_width == sorted(errors.values)[math.ceil(34*.9)-1]
    assert held_out_errors(run_with(tmp_path/'b', splits, eval__checkpoint_selection='best_val')).counts == dict(test=20)
    assert held_out_errors(run_with(tmp_path/'c', dict(test=20), train__val_fraction=0.)).counts == dict(test=20)
    few = run_with(tmp_path/'few', dict(test=40), train__val_fraction=.1) # a tenth of up to five training dives is none
    assert held_out_errors(few).counts == dict(test=40) and score_interval(50., held_out_errors(few)).bounded
    assert held_out_errors(few, ('val',)).counts == {} and not score_interval(50., held_out_errors(few, ('val',))).bounded
    per_dd = held_out_errors(run_with(tmp_path/'d', splits, protocol='w_dd'), ('test',))
    assert np.allclose(sorted(per_dd.values), np.arange(1, 21)/2.5)
    q = conformal_quantile(per_dd.values)
    assert [score_interval(20., per_dd, dd).half_width for dd in (None, 3.)] == [q, 3*q]
    with pytest.raises(ValueError, match='predictions.csv'):
        run = run_with(tmp_path/'e', splits)
        (run/'predictions.csv').unlink()
        held_out_errors(run)
    for spoil, message in ((lambda rows: rows.drop(columns='split'), 'lacks the columns split'), (lambda rows: rows.assign(pred=rows.pred.where(rows.split != 'val')), 'finite scores in val')):
        run = run_with(tmp_path/message, splits)
        spoil(pd.read_csv(run/'predictions.csv')).to_csv(run/'predictions.csv', index=False)
        with pytest.raises(ValueError, match=message): held_out_errors(run)


def test_the_spread_of_votes_is_no_interval():
    "Votes that agree on a wrong score: their spread covers nothing, the interval of held-out dives what it says"
    rng = np.random.default_rng(3)
    error = rng.normal(0, 6, 400) # the same for all votes of a dive
    votes = error[:, None]+rng.normal(0, 1, (400, 10))
    spread = (np.abs(votes.mean(1)) <= 1.645*votes.std(1)).mean()
    half = conformal_quantile(np.abs(votes.mean(1)[:200]))
    lo, hi = coverage_range(200, 200)
    assert spread < .4 and lo <= (np.abs(votes.mean(1)[200:]) <= half).mean() <= hi


@pytest.mark.parametrize('n, rate', [(19, .05), (63, .05), (99, .01), (40, .1)])
def test_alarms_come_as_often_as_promised(n, rate):
    rng, sims = np.random.default_rng(n), 3000
    values = rng.exponential(size=(sims, n+1))
    alarms = np.mean([rank_test(row[0], row[1:], rate).outside for row in values])
    exact = math.floor((n+1)*rate+1e-9)/(n+1)
    assert abs(alarms-exact) < 4*np.sqrt(exact*(1-exact)/sims) and exact <= rate
    assert rank_test(1., np.ones(n), rate).outside is False, 'a tie is no alarm'
    assert rank_test(9., np.ones(n), rate).outside is True
    assert rank_test(9., np.ones(round(1/rate)-2), rate).outside is None
