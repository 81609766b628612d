"With and without the actor: the pair of runs, the paired difference, heat that is computed once, and files that come out the same twice"
import ast
import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from conftest import film

from fspn_nb.config import ClipCfg,ModelCfg
from fspn_nb.core import Batch
from fspn_nb.inspect import actor_study,attention,heat_shares
from fspn_nb.inspect.gradcam import HeadOnMaps,exemplars_of,hires_cam
from fspn_nb.inspect.heat import box_shares,heat_in_box,video_heat
from fspn_nb.metrics import spearman
from fspn_nb.models.encoder import EncoderOutput
from fspn_nb.paper import paper_table
from fspn_nb.experiments import session as s
from fspn_nb.report.figures import save_figure
from fspn_nb.zoo import create_model


NOTEBOOK = Path(__file__).resolve().parents[1]/'nbs'/'actor_and_heat.ipynb'
CELL = dict(data_root='', preset='smoke', seeds='0', protocol='w_dn', weights='random', device='cpu', epochs=0, allow_missing=False, actor='auto', actor_file='', changes='', dives=0, aqa7_root='')
SMALL = dict(synthetic__n_train=6, synthetic__n_test=4)
CLIP = ClipCfg(frames=20, starts=(0, 4), size=64)


class Eye(nn.Module):
    "Three channels: brightness of red, green and blue in cells of 8 x 8 pixels and 8 frames; counts its calls"
    calls = 0

    def features(self, x):
        self.calls += 1
        return F.avg_pool3d(x.relu(), 8)


class Red(nn.Module):
    "Likes red in the scene, and green in the actor's crop"
    uses_exemplar, needs = False, ('scene', 'actor')

    def encode(self, batch): return EncoderOutput(torch.cat([batch.scene[..., :1], batch.actor[..., 1:2]], -1).mean(1), {})

    def score(self, feature): return 10*feature[..., 0]+20*feature[..., 1]


@pytest.fixture(scope='module')
def study(tmp_path_factory):
    "Three tiny runs on random weights"
    out = actor_study.start_study(CELL|dict(out=str(tmp_path_factory.mktemp('reports'))), **SMALL)
    return s.train_all(out, s.read_data(out))


@pytest.fixture(scope='module')
def results(study): return attention.collect_heat(study, attention.heat_sources(study))


@pytest.mark.parametrize('wrong, why', [(dict(epohcs=1), 'unknown parameter epohcs'), (dict(protocol='both'), 'protocol must be one of'), (dict(protocol='w_dn,w_dd'), 'protocol must be one of'),
                                        (dict(dives=-1), 'dives: need 0 or more'), (dict(dives=1.5), 'dives: need a whole number'), (dict(dives='two'), 'dives: need a whole number'), (dict(actor='none'), 'need boxes'),
                                        (dict(seeds='x'), 'seeds must be whole numbers'), (dict(actor='boxes'), 'needs a CSV'), (dict(preset='paper'), 'needs a real release')])
def test_wrong_parameters(wrong, why, tmp_path, monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    with pytest.raises(ValueError, match=why): actor_study.start_study(CELL|dict(out=str(tmp_path))|wrong)


@pytest.mark.parametrize('name', actor_study.STUDY_PARAMETERS)
def test_parameter_gone(name, tmp_path):
    with pytest.raises(ValueError, match=f'none called {name}'): actor_study.start_study({k: v for k, v in (CELL|dict(out=str(tmp_path))).items() if k != name})


def test_runs_are_those_of_the_run_notebook(tmp_path, monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    mine = actor_study.start_study(CELL|dict(preset='demo', weights='', seeds='0,1', out=str(tmp_path)))
    cell = {k: v for k, v in CELL.items() if k not in ('dives', 'aqa7_root')}|dict(preset='demo', weights='', seeds='0,1', out=str(tmp_path))
    theirs = s.start('finediving', cell|dict(methods='i3d_mlp,fspn', backbone='auto', processes=1, per_difficulty=True, protocol='both'))
    assert [item for item in mine.runs if actor_study.method_of(item) != 'without'] == [entry for entry in theirs.runs if entry.protocol == 'w_dn']
    assert mine.dives == 0 and [run.seed for run in mine.runs if actor_study.method_of(run) == 'without'] == [0, 1]


def test_paper_rows_agree_with_the_other_tables():
    "FSPN's row is printed in Table IX as well, to one digit more; the baseline is that of the block without dive numbers (D-02)"
    ix = paper_table('IX').set_index(['protocol', 'method'])
    for block, (method, _, rho, r) in (('wo_dn', actor_study.ACTOR_TABLE[0]), ('w_dn', actor_study.ACTOR_TABLE[2])):
        assert abs(ix.rho[block, method]-rho) < 1e-3 and abs(ix.r_l2_x100[block, method]-r) < 1e-3


def test_scene_in_both_streams_is_what_without_means():
    torch.manual_seed(0)
    alone = create_model('fspn', cfg=ModelCfg(use_actor=False), labels=torch.linspace(30, 90, 20)).eval()
    both = create_model('fspn', cfg=ModelCfg(), labels=torch.linspace(30, 90, 20)).eval()
    both.load_state_dict(alone.state_dict())
    x = torch.randn(2, 9, 1024)
    with torch.no_grad(): assert torch.allclose(alone.encode(Batch(x)).feature, both.encode(Batch(x, x)).feature, atol=1e-4)
    assert sum(p.numel() for p in alone.parameters()) == sum(item.numel() for item in both.parameters())


def test_gain_of_nothing():
    y = np.arange(12.)
    assert actor_study.paired_gain(spearman, y, y, y, 200) == dict(gain=0, lo=0, hi=0, p=1)
    flat = actor_study.paired_gain(spearman, np.full(12, 3.), y, y, 200)
    assert all(np.isnan(value) for value in flat.values())


def test_gain_is_paired_and_repeats():
    rng = np.random.default_rng(0)
    true, miss = rng.normal(60, 15, 80), rng.normal(0, 12, 80)
    one, other = true+miss, true+miss*1.25
    got = actor_study.paired_gain(spearman, one, other, true, 500)
    assert got == actor_study.paired_gain(spearman, one, other, true, 500)
    mixed = rng.permutation(80)
    assert np.isclose(actor_study.paired_gain(spearman, one[mixed], other[mixed], true[mixed], 500)['gain'], got['gain'])
    apart = actor_study.paired_gain(spearman, one, true+rng.permutation(miss)*1.25, true, 500)
    assert got['lo'] > 0 and got['p'] < .05 and got['hi']-got['lo'] < (apart['hi']-apart['lo'])/2, 'errors that go together make a sharper difference'


def test_permutation_counts_all_swaps_of_a_few():
    "Three dives, eight ways to swap: the p-value can be counted by hand"
    true, one, other = np.array([1., 2., 3.]), np.array([1., 2., 3.]), np.array([1., 3., 2.])
    gaps = []
    for k in range(8):
        swap = np.array([k >> i & 1 for i in range(3)], bool)
        gaps.append(spearman(np.where(swap, other, one), true)-spearman(np.where(swap, one, other), true))
    want = min(1, 2*np.mean(np.array(gaps) >= gaps[0]-1e-9))
    with pytest.warns(UserWarning): got = actor_study.paired_gain(spearman, one, other, true, 200)
    assert np.isclose(got['p'], want)


@pytest.mark.parametrize('corner', ['tl', 'tr', 'bl', 'br'])
def test_heat_sits_where_the_score_comes_from(corner):
    "The answer is known: red in one corner, and a blue one that does not count"
    y, x = dict(tl=(0, 0), tr=(0, 48), bl=(48, 0), br=(48, 48))[corner]
    boxes = np.array([[x, y, x+16., y+16.]]*20)
    eye = Eye().eval()
    maps, geometry = attention.extract_maps(eye, film(corner, 0)+film('tr' if corner != 'tr' else 'bl', 2), boxes, CLIP)
    hot = geometry.project(hires_cam(HeadOnMaps(Red()), maps))
    edge = attention.bounds(geometry, maps)
    assert heat_in_box(hot['scene'], boxes) > .8 > .1 > edge['scene_floor'] and edge['scene_best'] > .7
    assert hot['actor'].sum() == 0


def test_seen_once_is_seen_twice_the_same():
    frames, boxes = film('br', 1)+film('tl', 0), np.array([[44., 44., 64., 64.]]*20)
    maps, geometry = attention.extract_maps(Eye().eval(), frames, boxes, CLIP, pad=.5)
    made = video_heat(Eye().eval(), Red(), frames, boxes, CLIP, pad=.5)
    hot = geometry.project(hires_cam(HeadOnMaps(Red()), maps))
    for k in hot: assert torch.equal(hot[k], made['heat'][k])
    assert attention.bounds(geometry, maps) == {k: v for k, v in box_shares(made, boxes).items() if '_' in k}


def test_table_has_all_rows(study):
    table = actor_study.actor_table(study)
    assert table.method.tolist() == ['i3d_mlp', 'without', 'fspn'] and table.rho_paper.tolist() == [.850, .918, .942]
    assert table.parameters[1] == table.parameters[2] and 'synthetic, not comparable' in table.attrs['caption']
    for result in study.done:
        row = table[table.method == actor_study.method_of(result.cfg)].iloc[0]
        assert np.isclose(row.r_l2_x100, 100*result.metrics['relative_l2']) and row.n == 4


def test_backbone_sees_every_dive_once(study, monkeypatch):
    sources = attention.heat_sources(study)
    count = []
    seen = attention.extract_maps
    monkeypatch.setattr(attention, 'extract_maps', lambda *args: count.append(1) or seen(*args))
    got = attention.collect_heat(study, sources)
    assert len(count) == 2 == len(got.geometry) and len(got.table) == 6


def test_every_share_is_that_of_the_long_way(study, results):
    data = study.done[0].data
    for w in attention.heat_sources(study):
        for uid, i in results.index.items():
            frames, boxes = attention.shown_frames(data, i)
            made = video_heat(w.backbone, w.model, frames, boxes, data.cfg.clip, data.cfg.actor.pad, exemplar=exemplars_of(w.model, w.data, int(i), data.cfg.eval.num_exemplars))
            row = results.table[(results.table.run == w.name) & (results.table.uid == uid)].iloc[0]
            for k, v in box_shares(made, boxes).items(): assert np.isclose(row[k], v, atol=1e-4, equal_nan=True), (w.name, k)


def test_boxes_are_on_the_axis_of_kept_frames(study):
    data = study.done[0].data
    i = max(data.splits['test'], key=lambda j: len(data.release.samples[j].files))
    frames, boxes = attention.shown_frames(data, i)
    every = data.boxes[1][data.release.samples[i].uid]
    assert len(frames) == len(boxes) == 96 and np.array_equal(boxes[-1], every[-1]) and np.array_equal(boxes[0], every[0])


def test_shuffling_leaves_the_trained_network_alone(study):
    first, _, last = attention.heat_sources(study)
    again = attention.heat_sources(study)[0]
    assert all(torch.equal(u, v) for u, v in zip(first.model.parameters(), again.model.parameters()))
    assert not all(torch.equal(u, v) for u, v in zip(first.model.parameters(), last.model.parameters()))


def test_shares_and_pictures_are_the_same_twice(study, results, tmp_path):
    weights = {item.run: (item.run/'last.pt').stat().st_mtime_ns for item in study.done}
    again = s.train_all(actor_study.start_study(CELL|dict(out=str(study.reports)), **SMALL), {'': study.done[0].data})
    assert {result.run: (result.run/'last.pt').stat().st_mtime_ns for result in again.done} == weights, 'finished runs are not trained again'
    other = attention.collect_heat(again, attention.heat_sources(again))
    pd.testing.assert_frame_equal(other.table, results.table)
    made = []
    for k, (st, w) in enumerate(((study, results), (again, other))):
        shares = heat_shares.share_table(w)
        files = actor_study.save_both(shares, heat_shares.readable_shares(shares), tmp_path/str(k)/'attention', heat_shares.heat_caption(st, w))
        for name, fig in (('shares', heat_shares.plot_shares(shares, 'synthetic')), ('fig_12', heat_shares.draw_failures(st, w))): files += save_figure(fig, tmp_path/str(k)/name)
        made.append([file.read_bytes() for file in files])
    assert made[0] == made[1] and len(made[0]) == 4
    plt.close('all')


def cold(runs=('FSPN (Ours)', 'FSPN w/o', 'FSPN, weights shuffled'), n=5):
    "A network without any heat among others that have some"
    rows = [dict(run=r, uid=str(i), true=60., pred=61., scene=np.nan if r == runs[0] else .1, scene_floor=.05, scene_best=.3,
                 **(dict(actor=.3, actor_floor=.2, actor_best=.6) if r != runs[1] else {})) for r in runs for i in range(n)]
    return SimpleNamespace(table=pd.DataFrame(rows), geometry={str(i): None for i in range(n)})


def test_no_heat_is_counted_and_not_averaged():
    shares = heat_shares.share_table(cold()).set_index(['run', 'stream'])
    assert shares.cold['FSPN (Ours)', 'scene'] == 5 and np.isnan(shares.share['FSPN (Ours)', 'scene']) and len(shares) == 5
    assert np.isnan(heat_shares.scene_shift(cold())['gap'])
    assert '-' in heat_shares.readable_shares(shares.reset_index())['in the box %'].tolist()
    with pytest.raises(ValueError, match='got none in 5'): heat_shares.typical_dive(cold())


def test_typical_is_the_median_and_not_the_best():
    t = pd.DataFrame(dict(run='FSPN (Ours)', uid=list('abcde'), scene=[.5, .1, .3, .2, .4], scene_floor=.1))
    assert heat_shares.typical_dive(SimpleNamespace(table=t)) == 'c' == heat_shares.typical_dive(SimpleNamespace(table=t.sample(frac=1, random_state=0)))


def test_notebook_keeps_its_parameters_and_no_outputs():
    import papermill as pm
    assert set(pm.inspect_notebook(NOTEBOOK)) == set(actor_study.STUDY_PARAMETERS)
    nb = json.loads(NOTEBOOK.read_text())
    tagged = [c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and all(isinstance(item.value, ast.Constant) for item in ast.parse(''.join(tagged[0]['source'])).body)
    assert all('#' in line for line in ''.join(tagged[0]['source']).splitlines() if '=' in line), 'each parameter carries a comment'
    assert not any(c.get('outputs') for c in nb['cells'])
