"The peers: sizes of the released heads, one contract for all, each can learn, what is missing is named"
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import bf16_is_close, trains_on_one, weights_carry_everything

from fspn_nb.config import ModelCfg
from fspn_nb.core import Batch
from fspn_nb.models.heads import ScoreBins
from fspn_nb.peers.baselines import I3DLSTM
from fspn_nb.peers.core_tree import CoRe,Tree,build_core_tree,leaf_losses,score_range
from fspn_nb.peers.usdl import LabelBins,MUSDL,USDL,build_musdl,panel_sum
from fspn_nb.zoo import check_model,create_model,list_models,random_batch

BASELINES = ['usdl', 'musdl', 'core_tree', 'i3d_clip_mlp', 'i3d_lstm', 'i3d_avg', 'i3d_svr']
ALL = list_models()
count = lambda m: sum(p.numel() for p in m.parameters())


def made(name, seed=0, labels=None, **cfg):
    "An untrained method, always with the same weights"
    torch.manual_seed(seed)
    return create_model(name, ModelCfg(name=name, **cfg), labels)


def test_the_zoo_lists_them():
    assert {*BASELINES, 'i3d_mlp', 'tsa', 'tsa_net', 'tpt', 'hgcn', 'fspn', 'fspn_m', 'fspn_s', 'fspn_viterbi'} == set(ALL)


def test_sizes_of_the_released_heads():
    assert (count(made('usdl')), count(made('musdl')), count(made('core_tree'))) == (308_325, 2_086_035, 2_510_382)
    assert {d: count(Tree(depth=d)) for d in (2, 3, 4, 6)} == {2: 657_412, 3: 922_122, 4: 1_451_542, 6: 4_628_062}
    assert {i: count(made('core_tree', num_bins=i)) for i in (2, 4, 8, 32)} == {2: 657_412, 4: 922_122, 8: 1_451_542, 32: 4_628_062}
    assert count(I3DLSTM(dim=4096)) == 4_458_753 # of the public port, on C3D's vectors


@pytest.mark.parametrize('cfg', [dict(), dict(decoding='expected', dropout=.3), dict(clips=10)], ids=['plain', 'expected', 'ten clips'])
@pytest.mark.parametrize('name', ALL)
def test_contract(name, cfg):
    torch.manual_seed(0)
    assert check_model(name, ModelCfg(name=name, **cfg))['parameters'] == count(made(name, **cfg))


@pytest.mark.parametrize('name', ALL)
def test_weights_carry_everything(name, tmp_path):
    "Another scale, other weights: after loading the same score"
    batch, a, b = random_batch(), made(name, 1, [20., 50., 95.]).eval(), made(name, 2, [40., 45., 60.]).eval()
    weights_carry_everything(a, b, batch, tmp_path/'w.pt')


@pytest.mark.parametrize('name', ALL)
def test_batch_mates_and_batches_of_one(name):
    model, batch = made(name).eval(), random_batch()
    cut = lambda b: Batch(**{k: v[2:3] for k, v in vars(b).items() if k not in ('exemplar','exemplar_index','checked')})
    one = replace(cut(batch), exemplar=cut(batch.exemplar))
    with torch.no_grad(): assert torch.allclose(model.encode(one).feature, model.encode(batch).feature[2:3], atol=1e-4)
    trains_on_one(model, one)


@pytest.mark.parametrize('name', ALL)
def test_bf16_is_close(name):
    bf16_is_close(made(name, decoding='expected'), random_batch())


def sixteen(seed=0):
    "Sixteen dives whose score shows, with an exemplar each and marks that make the score"
    g = torch.Generator().manual_seed(seed)
    marks = (torch.rand(16, 1, generator=g)*12+6+torch.randint(-1, 2, (16, 7), generator=g)).round()/2
    dd = torch.full((16,), 3.)
    label = panel_sum(marks)*dd
    scene = torch.randn(16, 9, 1024, generator=g)*.3+((label-label.mean())/label.std())[:, None, None]*torch.randn(1024, generator=g)*.1
    batch = Batch(scene, scene, label, dd, judges=marks, uid=tuple(map(str, range(16))))
    order = torch.randperm(16, generator=g)
    return replace(batch, exemplar=Batch(scene[order], scene[order], label[order], dd, judges=marks[order]))


@pytest.mark.parametrize('name', BASELINES)
def test_sixteen_dives_can_be_learnt(name):
    batch = sixteen()
    model = made(name, labels=batch.label, decoding='expected').train()
    opt, first = torch.optim.Adam(model.parameters(), lr=1e-3), None
    for _ in range(80):
        out = model(batch)
        first = first or out.total_loss.item()
        opt.zero_grad(); out.total_loss.backward(); opt.step()
    assert out.total_loss < .2*first, (first, out.total_loss)
    with torch.no_grad(): score = model.eval()(batch).prediction
    rank = lambda x: x.argsort().argsort().double()
    assert torch.corrcoef(torch.stack([rank(score), rank(batch.label)]))[0, 1] > .95
    assert (score-batch.label).abs().mean() < 6


@pytest.mark.parametrize('name', BASELINES)
def test_what_is_missing_is_named(name):
    model, batch = made(name).train(), random_batch()
    for field in (*model.needs, *getattr(model, 'trains_on', ('label',)), *['exemplar']*model.uses_exemplar):
        with pytest.raises(ValueError, match=field): model(replace(batch, **{field: None}))
    if model.uses_exemplar:
        with pytest.raises(ValueError, match='for the exemplar.*label'): model(replace(batch, exemplar=replace(batch.exemplar, label=None)))


@pytest.mark.parametrize('name', ALL)
def test_no_labels_no_losses(name):
    out = made(name).eval()(replace(random_batch(), label=None, judges=None))
    assert not out.losses and out.prediction.isfinite().all()


def test_usdls_curve_in_any_unit():
    for lo, hi in ((0., 102.6), (4.2, 28.5), (0., 100.)):
        bins = LabelBins(lo, hi)
        y = torch.linspace(lo, hi, 500)
        p = bins.soft_labels(y)
        assert p.shape == (500, 101) and torch.allclose(p.sum(-1), torch.ones(500), atol=1e-5)
        assert ((bins.decode(p.log())-y).abs() <= .5001*(hi-lo)/100).all() # half a bin at most
        assert torch.equal(bins.soft_labels(torch.tensor([hi+5, lo-1e6])), bins.soft_labels(torch.tensor([hi, lo])))
    with pytest.raises(ValueError, match='two different labels'): USDL(labels=[50., 50.])
    with pytest.raises(ValueError, match='got none'): USDL(labels=[])


def test_musdls_rule_on_the_real_marks(shared):
    "Perfect heads would give the stored score of all dives but those whose record disagrees with itself"
    import pickle
    with open(shared('data', 'mtl_aqa', 'info')/'augmented_final_annotations_dict.pkl', 'rb') as f: notes = pickle.load(f)
    gaps = [abs(float(panel_sum(torch.tensor(np.asarray(n['judge_scores'], float))))*n['difficulty']-n['final_score']) for n in notes.values() if 'judge_scores' in n]
    if not gaps: pytest.skip('these annotations carry no marks')
    assert sum(gap < .051 for gap in gaps) >= len(gaps)-27


@pytest.mark.parametrize('marks, why', [(None, 'judges'), (float('nan'), 'no mark: 0/0'), (45., 'from 0 to 10.*0/0'), (-1., 'from 0 to 10'), (float('inf'), 'from 0 to 10')])
def test_musdl_names_bad_marks(marks, why):
    batch = random_batch()
    judges = None if marks is None else batch.judges.clone()
    if marks is not None: judges[0] = marks
    with pytest.raises(ValueError, match=why): made('musdl').train()(replace(batch, judges=judges))


def test_musdls_unit_follows_the_labels():
    batch = random_batch()
    assert build_musdl(ModelCfg(), [10., 30.]).needs == ('scene',) and build_musdl(ModelCfg(), [10., 30.5]).needs == ('scene', 'difficulty')
    torch.manual_seed(0); per_dd = MUSDL(points=False).eval()
    torch.manual_seed(0); points = MUSDL(points=True).eval()
    with torch.no_grad(): assert torch.allclose(points(batch).prediction, per_dd(batch).prediction*batch.difficulty)
    with pytest.raises(ValueError, match='difficulty of every dive'): points(replace(batch, difficulty=torch.full((4,), float('nan'))))


def test_core_counts_both_directions_and_leaves_out_what_is_nowhere():
    bins = ScoreBins.fit_pairs(np.linspace(0, 100, 50), top=100)
    logp, offset = torch.full((4, 16), 1/16).log(), torch.full((4, 16), .5)
    losses = leaf_losses(logp, offset, torch.tensor([5., -5., 120., -120.]), bins)
    assert torch.isclose(losses['leaf'], torch.tensor(16.).log()) and losses['offset'] > 0
    none = leaf_losses(logp, offset, torch.full((4,), 150.), bins)
    assert none['leaf'] == none['offset'] == 0
    batch = random_batch()
    swapped = replace(batch.exemplar, exemplar=replace(batch, exemplar=None))
    model = made('core_tree').eval()
    assert all(torch.isclose(model(batch).losses[k], model(swapped).losses[k], rtol=1e-4) for k in ('leaf', 'offset'))


@pytest.mark.parametrize('labels, theta', [([0., 29.], 30.), ([0., 30.5], 100.), ([0., 104.5], 100.)])
def test_cores_scale(labels, theta):
    model = build_core_tree(ModelCfg(), [*labels, 15., 20.])
    assert score_range(labels) == theta and model.theta == theta and model.bins.hi[-1] == theta and model.bins.lo[0] == -theta


def test_core_refuses_what_it_cannot_be():
    with pytest.raises(ValueError, match='power of two'): build_core_tree(ModelCfg(num_bins=12), [1., 2., 3.])
    with pytest.raises(ValueError, match='fit_pairs'): CoRe(bins=ScoreBins.fit_labels([1., 2., 3.]))
    with pytest.raises(ValueError, match='widen the groups'): build_core_tree(ModelCfg(), [1., 2.], ['a', 'b'])
