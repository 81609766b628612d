"Parsing quality: hand-made parses, FineDiving's real annotation, and what group contrast can and cannot see"
import numpy as np
import pandas as pd
import pytest
import torch

from fspn_nb.analysis.parse_quality import (MEAN_TRANSITIONS,random_transitions,constant_cuts,constant_iou_grid,parse_baselines,parse_quality,
    parse_table,runs_frame,seed_means,valid_transitions)
from fspn_nb.config import finediving,run_id,save_cfg
from fspn_nb.data.clips import frame_indices
from fspn_nb.data.finediving import read_finediving
from fspn_nb.data.records import steps_on_axis
from fspn_nb.analysis.parse_quality import iou_hits
from fspn_nb.metrics import temporal_iou
from fspn_nb.models.group_contrast import group_contrast
from fspn_nb.models.iap import order_prior


def frame(pred, true, split='test'):
    "A parsing.csv of `pred` (one pair or n) against `true`"
    true = np.asarray(true, float)
    return pd.DataFrame(np.column_stack([np.broadcast_to(pred, true.shape), true]), columns=['pred_1', 'pred_2', 'true_1', 'true_2']).assign(
        uid=[f'v/{i}' for i in range(len(true))], split=split)


@pytest.fixture(scope='module')
def true():
    t = np.random.default_rng(0).normal([29, 62], [10, 8], (200, 2)).clip(3, 93).round()
    return t[t[:, 0]+4 < t[:, 1]]


def test_only_test_dives_count(true):
    both = pd.concat([frame(true, true), frame([1, 2], true, 'val')])
    q = parse_quality(both, n=0)
    assert (q['n'], q['tiou'], q['mae_first'], q['mae_last']) == (len(true), 1., 0., 0.)


@pytest.mark.parametrize('bad', [(60, 40), (50, 50), (np.nan, 60), (20, np.nan)])
def test_dives_without_true_order_are_counted_not_used(true, bad):
    whole = frame([29, 62], true)
    hurt = pd.concat([whole, frame([29, 62], [bad])])
    a, b = parse_quality(whole, n=0), parse_quality(hurt, n=0)
    assert (a['left_out'], b['left_out']) == (0, 1)
    assert {**b, 'left_out': 0} == pytest.approx(a, nan_ok=True)


def test_a_wild_prediction_counts_as_a_miss_and_a_missing_one_is_an_error(true):
    df = frame(true, true)
    df.loc[:9, ['pred_1', 'pred_2']] = 90, 5
    assert parse_quality(df, n=0)['tiou'] == pytest.approx(1-10/len(true))
    df.loc[0, 'pred_1'] = np.inf
    with pytest.raises(ValueError, match='finite predicted cuts'): valid_transitions(df)


def test_interval_is_bca_over_videos(true):
    from scipy import stats
    df = frame([33, 60], true)
    q = parse_quality(df, n=500, seed=3)
    iou = temporal_iou(df[['pred_1', 'pred_2']], df[['true_1', 'true_2']])
    ci = stats.bootstrap((iou,), np.mean, n_resamples=500, method='BCa', rng=np.random.default_rng(3)).confidence_interval
    assert (q['tiou_lo'], q['tiou_hi']) == pytest.approx((ci.low, ci.high), abs=.003)
    assert q['tiou_lo'] < q['tiou'] < q['tiou_hi']
    assert parse_quality(df, n=500, seed=3) == pytest.approx(q, nan_ok=True)
    assert {.5: q['hit_50'], .75: q['hit_75']} == iou_hits(df[['pred_1', 'pred_2']], df[['true_1', 'true_2']])


def test_one_cut_has_distances_but_no_overlap(true):
    q = parse_quality(frame([48, 48], true))
    assert all(np.isnan(q[k]) for k in ('tiou', 'tiou_lo', 'hit_50', 'hit_75')) and q['mae_first'] > 10


def test_landscape_knows_every_pair(true):
    hill = constant_iou_grid(true)
    assert np.isnan(hill[np.tril_indices(96)]).all() and np.isfinite(hill[np.triu_indices(96, 1)]).all()
    a, b = constant_cuts(true)
    assert hill[a, b] == np.nanmax(hill) == pytest.approx(temporal_iou(np.tile([a, b], (len(true), 1)), true).mean())


def test_chance_is_the_mean_of_the_landscape(true):
    q = parse_quality(random_transitions(true, 300, seed=1), n=0)
    assert q['tiou'] == pytest.approx(np.nanmean(constant_iou_grid(true)), abs=.002)
    assert random_transitions(true, 2).equals(random_transitions(true, 2)) and not random_transitions(true, 2).equals(random_transitions(true, 2, seed=1))
    assert (random_transitions(true, 3).pred_1 < random_transitions(true, 3).pred_2).all()


def test_baselines_without_training_dives_learn_nothing(true):
    rows = parse_baselines(frame(true, true), n=0)
    assert rows.label.tolist() == [f'constant {MEAN_TRANSITIONS}', 'chance'] and (rows.n == len(true)).all()


def write(root, cfg, df):
    save_cfg(cfg, root/run_id(cfg)/'config.json')
    df.to_csv(root/run_id(cfg)/'parsing.csv', index=False)
    return run_id(cfg)


def test_table_of_runs_from_folders_and_from_a_grid(tmp_path, true):
    names = [write(tmp_path, finediving('smoke', seed=s), frame([29+s, 62], true)) for s in (0, 1)]
    names.append(write(tmp_path, finediving('smoke', model__use_gc=False), frame(true, true)))
    table = parse_table(names, tmp_path, true[:50], n=0)
    assert table.label.tolist()[:3] == ['fspn w_dn', 'fspn w_dn', 'fspn w_dn, use_gc=False'] and table.label[5] == 'chance' and len(table) == 6
    means = seed_means(table)
    assert means.label.tolist() == list(dict.fromkeys(table.label)) and means.seeds.tolist() == [2, 1, 0, 0, 0]
    grid = pd.DataFrame(dict(table='beyond', row=['full', 'full', 'no contrast', 'S = 5'], seed=[0, 1, 0, 0], run=[*names, '']))
    with pytest.warns(UserWarning, match='1 of 4 runs are not finished'): by_grid = parse_table(grid, tmp_path, n=0)
    assert by_grid.label.tolist()[:3] == ['full', 'full', 'no contrast'] and by_grid.tiou[2] == 1
    with pytest.warns(UserWarning, match='not finished'), pytest.raises(ValueError, match='at least one finished run'): parse_table(grid[3:], tmp_path)
    with pytest.raises(ValueError, match='columns run, seed, label'): runs_frame(grid.drop(columns='run'))


def test_order_of_rows_does_not_matter_but_the_dives_do(tmp_path, true):
    a = write(tmp_path, finediving('smoke'), frame([29, 62], true))
    b = write(tmp_path, finediving('smoke', seed=1), frame([29, 62], true).sample(frac=1, random_state=0))
    table = parse_table([a, b], tmp_path, n=0)
    assert table.tiou[0] == pytest.approx(table.tiou[1])
    c = write(tmp_path, finediving('smoke', seed=2), frame([29, 62], true[1:]))
    with pytest.raises(ValueError, match='same test dives'): parse_table([a, c], tmp_path, n=0)


@pytest.fixture(scope='module')
def real(shared):
    "True cuts of FineDiving's dives on 96 frames, which of them are test dives, and the samples"
    dives = read_finediving(None, shared('data', 'finediving', 'Annotations'))
    return np.array([steps_on_axis(dive, frame_indices(dive)) for dive in dives], float), np.array([dive.split == 'test' for dive in dives]), dives


def test_real_constant_is_hard_to_beat(real):
    cuts, test, _ = real
    q = parse_quality(frame(MEAN_TRANSITIONS, cuts[test]), n=300)
    assert (q['n'], q['left_out']) == (749, 0)
    assert (q['hit_50'], q['hit_75'], q['tiou']) == pytest.approx((78.50, 32.44, .6477), abs=.01)
    assert q['hit_50'] < 82.51 and q['hit_75'] < 34.31 # TSA's, trained on step labels
    assert q['tiou_lo'] < q['tiou'] < q['tiou_hi']


def test_real_learnt_constant_and_chance(real):
    cuts, test, _ = real
    rows = parse_baselines(frame(MEAN_TRANSITIONS, cuts[test]), cuts[~test], n=0).set_index('label')
    assert rows.loc['best constant (26, 63)', ['tiou', 'hit_50', 'hit_75']].tolist() == pytest.approx([.6546, 80.77, 32.18], abs=.01)
    assert rows.tiou['chance'] == pytest.approx(.302, abs=.003)
    assert tuple(cuts[~test].mean(0).round()) == (29, 62)


def test_real_transitions_out_of_order_have_no_say_on_the_axis(real):
    cuts, _, dives = real
    wrong = {dive.uid for dive in dives if list(dive.transitions) != sorted(set(dive.transitions))}
    assert len(wrong) == 3 and (cuts[:, 0] < cuts[:, 1]).all()
    assert sum(min(dive.transitions) < 0 or max(dive.transitions) >= dive.n_frames for dive in dives) == 6


@pytest.mark.parametrize('strength', [.5, 3., 20.])
def test_group_contrast_is_content_with_the_prior_alone(strength):
    g = order_prior(strength=strength)[None]
    assert group_contrast(g, g).item() == pytest.approx(.0942, abs=1e-3)


@pytest.mark.parametrize('cuts', [(5, 10), (29, 62), (48, 50), (70, 94)])
def test_group_contrast_is_zero_for_any_constant_parse(cuts):
    "Logits that name the frame and see no video: a minimum wherever they cut (D-123)"
    g = torch.eye(3)[torch.bucketize(torch.arange(96), torch.tensor(cuts), right=True)].expand(4, 96, 3)
    assert group_contrast(g, g) < 1e-3
