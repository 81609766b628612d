"Metrics against other people's numbers: released predictions, SciPy, the averages that the paper prints, real score sheets"
import json
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from fspn_nb.analysis.parse_quality import iou_hits
from fspn_nb.metrics import (bootstrap_ci,cs_area,cumulative_score,fisher_mean,baseline_predictions,relative_l2,
    score_baselines,spearman,summarise,temporal_iou)

# Table X: six correlations (diving, vault, big ski, big snow, sync 3 m, sync 10 m) and the average as printed
AVERAGES = {
    'C3D-LSTM': ([.6047, .5636, .4593, .5029, .7912, .6927], .6165),
    'C3D-SVR': ([.7902, .6824, .5209, .4006, .5937, .9120], .6937),
    'ST-GCN': ([.3286, .5770, .1681, .1234, .6600, .6483], .4433),
    'JRG': ([.7630, .7358, .6006, .5405, .9013, .9254], .7849),
    'Asymmetric': ([.7419, .7296, .5890, .4960, .9298, .9043], .7789),
    'USDL': ([.8099, .7570, .6538, .7109, .9166, .8878], .8102),
    'TSA-Net': ([.8379, .8004, .6657, .6962, .9493, .9334], .8476),
    'Adaptive': ([.8306, .7593, .7208, .6940, .9588, .9298], .8500),
    'TAP': ([.8969, .8043, .7336, .6965, .9456, .9545], .8715),
    'UD-AQA': ([.8532, .7663, .6836, .5596, .9281, .9438], .8318),
    'H-GCN': ([.8867, .7917, .7326, .6447, .9213, .9424], .8501),
    'I3D+MLP': ([.7438, .7342, .5190, .5103, .8915, .8703], .7472),
}
# The three whose row gives another average than the one printed (D-08): row, printed, recomputed
SLIPS = {
    'CoRe': ([.8824, .7746, .7115, .6624, .9442, .9078], .8401, .8433),
    'PCLA': ([.8697, .8759, .7754, .5778, .9629, .9541], .8790, .8795),
    'FSPN': ([.8786, .8343, .6736, .7265, .9556, .9545], .8724, .8734),
}


@pytest.mark.parametrize('name', AVERAGES)
def test_fisher_mean_reproduces_printed_averages(name):
    rhos, printed = AVERAGES[name]
    assert fisher_mean(rhos) == pytest.approx(printed, abs=1.5e-4)


@pytest.mark.parametrize('name', SLIPS)
def test_d08_three_averages_do_not_follow_from_their_rows(name):
    rhos, printed, own = SLIPS[name]
    assert fisher_mean(rhos) == pytest.approx(own, abs=6e-5)
    assert abs(fisher_mean(rhos)-printed) > 4e-4


def test_released_tsa_predictions(shared):
    pred, true = (np.load(shared('data', 'finediving', 'oracle', f'tsa_{name}.npy'), allow_pickle=False) for name in ('pred', 'true'))
    assert len(true) == 749
    assert spearman(pred, true) == pytest.approx(.92124, abs=5e-6)
    assert relative_l2(pred, true) == pytest.approx(.0033699, abs=5e-8)
    assert relative_l2(pred, true, p=1) == pytest.approx(.04011, abs=5e-6)
    result = summarise(pred, true, n=300)
    assert result['spearman_lo'] < .9203 < result['spearman_hi'] and result['n'] == 749


class _Plain(pickle.Unpickler):
    "Dicts, tuples, strings, numbers and numpy arrays; nothing else"
    def find_class(self, module, name):
        if module.split('.')[0] == 'numpy' and name in ('_reconstruct', 'ndarray', 'dtype', 'scalar', '_frombuffer'): return super().find_class(module, name)
        raise pickle.UnpicklingError(f'{module}.{name}')


@pytest.fixture(scope='module')
def sheet(shared):
    "FineDiving's real score sheet: train and test frames, and the cuts of the test dives on the 96-frame axis"
    folder = shared('data', 'finediving', 'Annotations')
    def load(name):
        with open(folder/name, 'rb') as f: return _Plain(f).load()
    notes = load('fine-grained_annotation_aqa.pkl')
    frames = [pd.DataFrame([dict(action=notes[k][0], score=float(notes[k][1]), difficulty=float(notes[k][2])) for k in map(tuple, load(f'{s}_split.pkl'))]) for s in ('train', 'test')]
    cuts = []
    for k in map(tuple, load('test_split.pkl')):
        labels = np.asarray(notes[k][4])
        labels = labels[np.linspace(0, len(labels)-1, 96).astype(int)]
        seen = list(dict.fromkeys(labels.tolist()))
        cuts.append([labels.tolist().index(seen[1]), labels.tolist().index(seen[-1])])
    return *frames, np.array(cuts)


def test_baselines_on_the_real_score_sheet(sheet):
    train, test, _ = sheet
    baselines = score_baselines(train, test, n=100).set_index('baseline')
    assert baselines.n.tolist() == [749]*3
    assert baselines.loc['action-type mean', 'spearman'] == pytest.approx(.588, abs=5e-4)
    assert 100*baselines.loc['action-type mean', 'relative_l2'] == pytest.approx(1.335, abs=5e-4)
    dd = baselines.loc['mean(score/difficulty) x difficulty']
    assert (dd.spearman, 100*dd.relative_l2) == (pytest.approx(.560, abs=5e-4), pytest.approx(1.392, abs=5e-4))
    assert np.isnan(baselines.loc['constant mean', 'spearman'])


def test_constant_cuts_are_a_strong_baseline_on_real_steps(sheet):
    cuts = sheet[2]
    hits = iou_hits(np.tile([29, 62], (len(cuts), 1)), cuts)
    assert (hits[.5], hits[.75]) == (pytest.approx(78.5, abs=.05), pytest.approx(32.44, abs=.05)) # TSA's parser: 82.51, 34.31


def test_spearman_is_scipys_with_ties():
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 9, 50), rng.normal(size=50)
        assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


@pytest.mark.parametrize('pred, true, word', [([], [], 'length'), ([1, 2], [1, 2, 3], 'length'), ([[1, 2]], [[1, 2]], 'length'),
                                              ([1, np.inf], [1, 2], '1 bad predictions'), ([1, 2], [np.nan, 2], '1 bad true')])
@pytest.mark.parametrize('f', [spearman, relative_l2, cs_area, lambda a, b: cumulative_score(a, b, [1]), summarise])
def test_bad_vectors_are_named(f, pred, true, word):
    with pytest.raises(ValueError, match=word): f(pred, true)


@pytest.mark.parametrize('lo, hi', [(5, 5), (6, 5), (np.nan, 5)])
def test_empty_score_range(lo, hi):
    with pytest.raises(ValueError, match='empty score range'): relative_l2([1, 2], [3, 4], lo, hi)


@pytest.mark.parametrize('rhos', [[], [1.], [.5, -1], [np.nan, .5]])
def test_fisher_mean_refuses_what_has_no_z(rhos):
    with pytest.raises(ValueError, match='strictly between'): fisher_mean(rhos)


def test_cumulative_score_never_falls_and_counts_the_threshold():
    rng = np.random.default_rng(1)
    a, b = rng.normal(60, 15, (2, 300))
    curve = cumulative_score(a, b, np.linspace(0, 100, 50))
    assert (np.diff(curve) >= 0).all() and curve[-1] == 100
    assert cumulative_score([1.], [3.], 2).tolist() == [100.]


@pytest.mark.parametrize('p, t, iou', [((20, 60), (20, 60), 1), ((0, 10), (20, 60), 0), ((20, 20), (20, 60), 0), ((60, 20), (20, 60), 0),
                                       ((20, 40), (20, 60), .5), ((0, 96), (24, 72), .5)])
def test_temporal_iou(p, t, iou):
    assert temporal_iou([p], [t]) == pytest.approx([iou])


def test_temporal_iou_refuses_nonsense():
    with pytest.raises(ValueError, match='as many'): temporal_iou([[1, 2]], [[1, 2], [3, 4]])
    with pytest.raises(ValueError, match='first is 1'): temporal_iou([[1, 2], [3, 4]], [[1, 2], [4, 4]])
    with pytest.raises(ValueError, match='bad rows'): temporal_iou([[np.nan, 2]], [[1, 2]])


def test_bootstrap_covers_and_repeats():
    "Of twenty splits with a known correlation, the 95 % interval misses it a few times at most"
    missed = 0
    for seed in range(20):
        z = np.random.default_rng(seed).multivariate_normal([0, 0], [[1, .8], [.8, 1]], 80)
        lo, hi = bootstrap_ci(spearman, *z.T, n=200, seed=seed)
        missed += not lo <= 6/np.pi*np.arcsin(.4) <= hi
    assert missed <= 4
    assert bootstrap_ci(spearman, *z.T, n=200, seed=3) == bootstrap_ci(spearman, *z.T, n=200, seed=3) != bootstrap_ci(spearman, *z.T, n=200, seed=4)


def test_bootstrap_keeps_pairs_together():
    true = np.arange(40.)
    lo, hi = bootstrap_ci(spearman, true, true, n=100)
    assert lo == pytest.approx(1) and hi == pytest.approx(1)


@pytest.mark.parametrize('pred, true', [([1., 2.], [3., 4.]), ([1., 1., 2.], [2., 2., 1.]), ([1., 2., 3.], [1., 3., 2.])])
def test_tiny_splits_say_in_their_result_that_bca_is_undefined(pred, true):
    with warnings.catch_warnings():
        warnings.simplefilter('error') # nothing red in a notebook
        result = summarise(pred, true, n=100)
    assert result['n'] == len(pred) and result['reason'] == ''
    assert 'degenerate' in result['intervals']
    assert np.isnan(result['spearman_lo']) or -1 <= result['spearman_lo'] <= result['spearman_hi'] <= 1


@pytest.mark.parametrize('pred, true, reason', [([50.], [60.], '1 dive: '), ([50., 51., 52.], [60.]*3, 'all 3 dives have the score 60: '), ([50.]*4, [60., 61., 62., 63.], 'all 4 predictions are 50: '),
                                                ([50., 50.], [60., 60.], 'all 2 dives have the score 60: ')])
def test_what_has_no_order_or_no_range_is_nan_with_a_reason(pred, true, reason):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        result = summarise(pred, true, n=100)
    assert result['reason'].startswith(reason) and 'no rank correlation' in result['reason']
    assert np.isnan([result[f'spearman{end}'] for end in ('', '_lo', '_hi')]).all()
    assert np.isnan([result[f'relative_l2{end}'] for end in ('', '_lo', '_hi')]).all() == ('no score range' in result['reason']) == (np.ptp(true) == 0)


def test_constant_predictor_has_an_error_but_no_order():
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        result = summarise(np.full(30, 60.), np.arange(30.), n=100)
    assert np.isnan([result[f'spearman{end}'] for end in ('', '_lo', '_hi')]).all() and result['relative_l2_lo'] < result['relative_l2'] < result['relative_l2_hi']


def test_a_bug_in_a_metric_is_not_swallowed():
    def broken(pred, true): raise ValueError('mine')
    with pytest.raises(ValueError, match='mine'): bootstrap_ci(broken, [1., 2.], [1., 2.])


def test_interval_keeps_the_range_of_the_split():
    rng = np.random.default_rng(0)
    true = np.r_[0., 104.4, rng.normal(66, 5, 98)] # two extremes that most resamples lose
    pred = true+rng.normal(0, 5, 100)
    assert summarise(pred, true, n=200)['relative_l2_hi'] < .7*bootstrap_ci(relative_l2, pred, true, n=200)[1]


def test_baselines_name_what_is_missing():
    ok = pd.DataFrame(dict(action=['a', 'b'], score=[1., 2.], difficulty=[1., 2.]))
    for train, test, word in ((ok[:0], ok, 'train, got 0 rows'), (ok, ok.drop(columns='action'), 'test, got 2 rows that lack: action')):
        with pytest.raises(ValueError, match=word): baseline_predictions(train, test)
    assert len(baseline_predictions(ok.assign(difficulty=[0., 1.]), ok)) == 2


# ---- runs whose metrics are undefined

def small_session(tmp_path, change, monkeypatch, **changes):
    "A session on MTL-AQA with one tiny run, whose data go through `change` wherever they are prepared"
    from fspn_nb.experiments import session as s
    monkeypatch.delenv('IN_TEST', raising=False)
    prepare = s.prepare
    monkeypatch.setattr(s, 'prepare', lambda cfg, device, reuse=None: reuse or change(prepare(cfg, device)))
    cell = dict(data_root='', preset='smoke', methods='i3d_mlp', seeds='0', protocol='w_dd', backbone='auto', weights='random', device='cpu', processes=1, epochs=1,
                allow_missing=False, actor='auto', actor_file='', changes='', out=str(tmp_path))
    return s, s.start('mtl_aqa', cell, clip__size=32, synthetic__n_train=5, synthetic__n_test=4, **changes)


def with_splits(data, **sizes):
    "`data` with only the first samples of some splits"
    return replace(data, splits=data.splits|{name: data.splits[name][:n] for name, n in sizes.items()})


def with_scores(data, score):
    "`data` whose test dives all have one score"
    samples = tuple(replace(sample, score=score) if sample.split == 'test' else sample for sample in data.release.samples)
    return replace(data, release=replace(data.release, samples=samples))


@pytest.mark.parametrize('change, reason, lines', [(lambda data: with_splits(data, test=1), '1 dive: no rank correlation and no score range', 2),
                                                   (lambda data: with_scores(data, 70.5), 'all 4 dives have the score 70.5: no rank correlation and no score range', 5)])
def test_a_test_split_without_order_is_said_before_training_and_measured_as_nan(change, reason, lines, tmp_path, monkeypatch, capsys):
    from fspn_nb.analysis.runs import read_run
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        s, session = small_session(tmp_path, change, monkeypatch)
        datas = s.read_data(session)
        assert f'test: {reason}' in capsys.readouterr().out
        run = s.train_all(session, datas).done[0].run
    assert f'{run.name}: {reason}' in capsys.readouterr().out
    metrics = json.loads((run/'metrics.json').read_text(), parse_constant=lambda name: pytest.fail(f'{name} is no JSON'))
    assert metrics['spearman'] is metrics['relative_l2'] is metrics['relative_l2_hi'] is None and metrics['reason'] == reason
    assert len((run/'predictions.csv').read_text().splitlines()) == lines
    row = read_run(run)
    assert row['reason'] == reason and np.isnan(row['spearman'])


def test_predictions_are_written_before_they_are_measured(tmp_path, monkeypatch):
    "Whatever fails after a training, its predictions stay; here they are equal, as those of a network that has collapsed"
    import fspn_nb.evaluate as e
    s, session = small_session(tmp_path, lambda data: data, monkeypatch)
    datas = s.read_data(session)
    with monkeypatch.context() as m:
        m.setattr(e, 'summarise', lambda *args, **options: 1/0)
        with pytest.raises(ZeroDivisionError): s.train_all(session, datas)
    run = next(tmp_path.glob('mtl_aqa/*/predictions.csv')).parent
    assert len((run/'predictions.csv').read_text().splitlines()) == 5 and not (run/'metrics.json').exists()
    plain = e.predictions
    monkeypatch.setattr(e, 'predictions', lambda *args: (plain(*args)[0].assign(pred=60.), {}))
    metrics = s.train_all(session, datas).done[0].metrics
    assert np.isnan(metrics['spearman']) and metrics['relative_l2'] > 0 and metrics['reason'] == 'all 4 predictions are 60: no rank correlation'


def test_small_validation_and_training_splits_are_named(tmp_path, monkeypatch, capsys):
    s, session = small_session(tmp_path, lambda data: with_splits(data, train=1), monkeypatch, train__val_fraction=.4)
    s.read_data(session)
    printed = capsys.readouterr().out
    assert 'val: need 3 dives or more for a rank correlation, got 2' in printed and 'train: 1 dive, which is its own exemplar' in printed
    s, session = small_session(tmp_path, lambda data: data, monkeypatch, train__val_fraction=.4, eval__checkpoint_selection='best_val')
    with pytest.raises(ValueError, match='best_val: need 3 validation samples or more, with different scores, got 2'): s.read_data(session)
