"H-GCN: the four counts of its released program, the contract of the zoo, the edges, the unit of its loss, four dives by heart"
from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr
from conftest import bf16_is_close, trains_on_one, weights_carry_everything

from fspn_nb.config import ModelCfg
from fspn_nb.core import Batch
from fspn_nb.peers.hgcn import GraphConv,HGCN,Hierarchy,GaussianHead,build_hgcn,rsample,neighbour_edges,points_error
from fspn_nb.zoo import BUILDERS,check_model,random_batch

PRINTED = {1: 1.218, 2: .677, 4: .407, 8: .272} # million, counted in the released program
count = lambda m: sum(p.numel() for p in m.parameters())


def made(seed=0, labels=(0., 50., 100.), **kw):
    "An untrained H-GCN, always with the same weights"
    torch.manual_seed(seed)
    return HGCN(ModelCfg(name='hgcn', dropout=kw.pop('dropout', 0.)), labels, **kw)


@pytest.mark.parametrize('groups, million', PRINTED.items())
def test_counts_of_the_released_program(groups, million):
    assert round(count(HGCN(num_groups=groups))/1e6, 3) == million


def test_only_the_three_convolutions_are_grouped():
    whole, parts = ({n: p.numel() for n, p in HGCN(num_groups=g).named_parameters()} for g in (1, 8))
    grouped = {n for n in whole if whole[n] != parts[n]}
    assert grouped == {f'hierarchy.{s}.conv.weight' for s in ('refine', 'group', 'move')}
    assert all(whole[n] == 8*parts[n] for n in grouped) and sum(whole[n] for n in grouped) == 1_081_344
    assert round(count(HGCN(motion=False))/1e6, 3) != PRINTED[8]


@pytest.mark.parametrize('labels', [None, torch.linspace(0, 29, 30)], ids=['points', 'points per difficulty'])
@pytest.mark.parametrize('cfg', [dict(), dict(dropout=.3), dict(clips=10)], ids=['plain', 'dropout', 'ten clips'])
def test_contract(cfg, labels, monkeypatch):
    "What the zoo asks of every method, for both units of the label"
    build = build_hgcn if labels is None else lambda c, _, g: build_hgcn(c, labels, g)
    monkeypatch.setitem(BUILDERS, 'hgcn_tried', build)
    torch.manual_seed(0)
    row = check_model('hgcn_tried', ModelCfg(name='hgcn', **cfg))
    assert (row['parameters'], row['losses'], row['exemplar']) == (count(HGCN()), 'mse', False)
    assert row['needs'] == ('scene' if labels is None else 'scene, difficulty')


@pytest.mark.parametrize('clips, scenes', [(9, 6), (10, 7), (4, 1), (20, 17)])
def test_any_number_of_clips(clips, scenes):
    hierarchy, x = Hierarchy(), torch.rand(2, clips, 1024)
    assert hierarchy.scenes(x).shape == (2, scenes, 256) and hierarchy(x).shape == (2, 128)
    with pytest.raises(ValueError, match='at least 4 clips'): hierarchy(x[:, :3])


def test_edges_are_shares_among_neighbours():
    x = torch.randn(3, 10, 32, generator=torch.Generator().manual_seed(0))
    for use_next in (True, False):
        e = neighbour_edges(x, 5., use_next)
        assert torch.allclose(e.sum(-1), torch.ones(3, 10)) and not e.triu(2 if use_next else 1).any() and not e.tril(-2).any()
        assert torch.allclose(neighbour_edges(x*7, 5., use_next), e, atol=1e-6) # length does not matter
    assert torch.allclose(neighbour_edges(torch.zeros(1, 3, 8))[0, 1], torch.full((3,), 1/3)) # blank clips: no likeness, no NaN
    assert torch.equal(neighbour_edges(x[:, :1]), torch.ones(3, 1, 1))


def test_far_clips_do_not_reach_a_scene():
    hierarchy, x = Hierarchy().eval(), torch.rand(1, 10, 1024)
    far = x.clone(); far[:, 6:] = 5
    with torch.no_grad(): a, b = hierarchy.scenes(x), hierarchy.scenes(far)
    assert torch.allclose(a[:, :2], b[:, :2]) and not torch.allclose(a[:, 2], b[:, 2]) # the third hears clip 7


def test_the_order_of_clips_matters():
    model, batch = made().eval(), random_batch(clips=10)
    with torch.no_grad(): assert not torch.allclose(model(batch).prediction, model(replace(batch, scene=batch.scene.flip(1))).prediction, atol=1e-3)


def test_weights_carry_everything(tmp_path):
    batch, a, b = random_batch(), made(1, [20., 50., 95.]).eval(), made(2, [40., 45., 60.]).eval()
    weights_carry_everything(a, b, batch, tmp_path/'w.pt')


def test_batch_mates_and_batches_of_one():
    model, batch = made().eval(), random_batch()
    one = Batch(batch.scene[2:3], label=batch.label[2:3])
    with torch.no_grad(): assert torch.allclose(model(one).prediction, model(batch).prediction[2:3], atol=1e-3)
    trains_on_one(model, one)


def test_bf16_is_close():
    bf16_is_close(made(), random_batch())


def test_drawn_in_training_and_only_on_request_afterwards():
    batch, steady, drawn = random_batch(), made().eval(), made(sample=True).eval()
    with torch.no_grad():
        assert torch.equal(steady(batch).prediction, steady(batch).prediction) and not torch.equal(drawn(batch).prediction, drawn(batch).prediction)
        many = torch.stack([drawn(batch).prediction for _ in range(400)])
        mean, sd = drawn.distribution(drawn.encode(batch).feature)
    assert torch.allclose(steady(batch).prediction, mean, atol=1e-4)
    assert ((many.mean(0)-mean).abs() < 5*sd/20).all() and torch.allclose(many.std(0), sd, rtol=.2)
    torch.manual_seed(3); a = steady.train()(batch).prediction
    torch.manual_seed(3); b = steady(batch).prediction
    assert torch.equal(a, b) # the seed decides what is drawn


def test_a_draw_teaches_mean_and_deviation():
    mean, sd = torch.zeros(3, requires_grad=True), torch.ones(3, requires_grad=True)
    rsample(mean, sd).sum().backward()
    assert torch.equal(mean.grad, torch.ones(3)) and sd.grad.any()
    assert torch.equal(rsample(mean, torch.zeros(3)), mean)
    assert (GaussianHead(8)(1e4*torch.randn(50, 8))[1] >= 0).all()


def test_the_loss_is_in_points_whatever_the_label():
    "Scores and labels divided by the difficulty make the same loss"
    score, label, dd = torch.tensor([60., 45., 80.]), torch.tensor([66., 45., 71.]), torch.tensor([3., 1.5, 2.])
    batch = Batch(torch.rand(3, 10, 1024), label=label, difficulty=dd)
    per_dd = build_hgcn(ModelCfg(), [10., 28.])
    assert (per_dd.points, per_dd.trains_on, made().trains_on) == (False, ('difficulty',), ())
    assert torch.isclose(points_error(score, batch), torch.tensor((36+0+81)/3))
    assert torch.isclose(points_error(score/dd, replace(batch, label=label/dd), per_dd.points), torch.tensor((36+0+81)/3))
    assert [build_hgcn(ModelCfg(), [10., top]).points for top in (30., 30.5)] == [False, True]


def test_what_is_missing_or_broken_is_named():
    batch, per_dd = random_batch(), made(labels=[10., 28.], points=False)
    with pytest.raises(ValueError, match='no scene'): made().encode(replace(batch, scene=None))
    with pytest.raises(ValueError, match='no label'): made().train()(replace(batch, label=None))
    with pytest.raises(ValueError, match='no difficulty'): per_dd.train()(replace(batch, difficulty=None))
    with pytest.raises(ValueError, match='not finite'): per_dd.train()(replace(batch, difficulty=torch.full((4,), float('nan'))))
    for groups in (3, 0, 5):
        with pytest.raises(ValueError, match='num_groups must divide'): HGCN(num_groups=groups)
    with pytest.raises(ValueError, match='adjacency must be'): GraphConv(8, 8, 1, adjacency='future')
    out = per_dd.eval()(Batch(batch.scene)) # a new dive has neither label nor difficulty
    assert not out.losses and out.prediction.isfinite().all()


@pytest.mark.parametrize('clips', [9, 10])
@pytest.mark.parametrize('label, points', [([42., 58., 71., 90.], True), ([14., 19., 23., 28.], False)], ids=['points', 'per difficulty'])
def test_four_dives_by_heart(label, points, clips):
    g = torch.Generator().manual_seed(0)
    batch = Batch(torch.rand(4, clips, 1024, generator=g), label=torch.tensor(label), difficulty=torch.full((4,), 3.))
    model = made(labels=label, points=points).train()
    opt, first = torch.optim.Adam(model.parameters(), lr=1e-3), None
    for _ in range(60):
        loss = model(batch).total_loss
        first = first or loss.item()
        opt.zero_grad(); loss.backward(); opt.step()
    with torch.no_grad(): score = model.eval()(batch).prediction
    assert spearmanr(score, label).statistic == pytest.approx(1) and loss < .2*first, (first, loss.item(), score)
