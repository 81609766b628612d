"TSA: sizes and costs of the released network, cuts, segments, cells, one contract, and it can learn"
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import bf16_is_close, trains_on_one, weights_carry_everything

from fspn_nb.analysis.complexity import flops_of
from fspn_nb.config import ModelCfg
from fspn_nb.core import Batch
from fspn_nb.metrics import spearman,temporal_iou
from fspn_nb.peers.psnet import PSNet,assign_steps,check_transitions,conv_pair,predict_transitions,transition_loss
from fspn_nb.peers.tsa import StepDecoder,StepPooling,TSA,build_tsa,from_cells,sampling_weights,split_query_memory,to_cells
from fspn_nb.zoo import BUILDERS,check_model,create_model,random_batch

count = lambda m: sum(p.numel() for p in m.parameters())


@pytest.fixture(autouse=True)
def in_the_zoo(monkeypatch): monkeypatch.setitem(BUILDERS, 'tsa', build_tsa)


def made(seed=0, labels=(0., 50., 100.), **cfg):
    "An untrained TSA, always with the same weights"
    torch.manual_seed(seed)
    return build_tsa(ModelCfg(name='tsa', **cfg), labels)


def small_batch(n=4, dim=64, cells=(1, 2), seed=0):
    "Dives on narrow features, with an exemplar each"
    g = torch.Generator().manual_seed(seed)
    def one():
        maps = torch.randn(n, 9, dim, *cells, generator=g)
        return Batch(maps.mean((3, 4)), label=torch.rand(n, generator=g)*60+30, transitions=torch.tensor([[30, 70], [20, 60], [40, 80], [10, 50]])[:n], feature_maps=maps, uid=tuple('abcd')[:n])
    return replace(one(), exemplar=one())


def test_parameters_of_the_release():
    model = made()
    net, decoder = model.pooling.psnet, model.decoder
    assert [count(b) for b in net.blocks] == [828, 2_736, 10_656, 42_048, 55_872] and count(net.head) == 16_706
    assert (count(net), count(decoder.blocks), count(decoder.mlp), count(model)) == (128_846, 149_760, 33_153, 311_759)
    assert count(PSNet(10)) == 128_846+3*12 # one more channel into the first convolution


def test_operations_of_the_release():
    with torch.device('meta'):
        net, decoder = PSNet(), StepDecoder()
        assert flops_of(net, torch.empty(1, 9, 1024)) == pytest.approx(30.4e6, rel=.02)
        cells = flops_of(net.frame_features, torch.empty(16, 9, 1024))
        assert cells == pytest.approx(486e6, rel=.12) # the release also asks the head at each cell, and throws the answer away
        step = flops_of(decoder.blocks[0], torch.empty(1, 5, 64), torch.empty(1, 80, 64))*3
        assert step == pytest.approx(5.5e6, rel=.02)
        assert flops_of(decoder, torch.empty(1, 3, 5, 64), torch.empty(1, 3, 80, 64)) == 3*step+15*2*(64*256+256*64+64)


@pytest.mark.parametrize('cfg', [dict(), dict(dropout=.3), dict(clips=10), dict(heads=6)], ids=['plain', 'dropout', 'ten clips', 'six heads'])
def test_contract(cfg):
    torch.manual_seed(0)
    result = check_model('tsa', ModelCfg(name='tsa', **cfg))
    assert result['parameters'] == count(made(**cfg)) and result['exemplar'] and result['losses'] == 'mse, bce' and result['needs'] == 'scene, feature_maps, transitions'


@pytest.mark.parametrize('h, w', [(1, 1), (2, 2), (4, 4), (2, 3)])
def test_maps_of_any_size(h, w):
    model = made().eval()
    with torch.no_grad(): e = model.encode(Batch(torch.rand(2, 9, 1024), feature_maps=torch.rand(2, 9, 1024, h, w)))
    assert e.feature.shape == (2, 15*64*(1+h*w)) and split_query_memory(e.feature)[1].shape == (2, 3, 5*h*w, 64)
    assert e.extras['transitions'].shape == (2, 2) and e.extras['step_probs'].shape == (2, 96, 3) and torch.equal(e.extras['step_probs'].sum(-1), torch.ones(2, 96))


def test_transitions_can_be_measured():
    "What evaluation reads: whole frames, first before last, and the step probabilities say the same"
    model, batch = made().eval(), random_batch(8)
    with torch.no_grad(): extras = model.encode(batch).extras
    cuts = extras['transitions']
    assert ((0 < cuts[:, 0]) & (cuts[:, 0] < 48) & (48 <= cuts[:, 1]) & (cuts[:, 1] < 96)).all()
    assert torch.equal(extras['step_probs'].sum(1)[:, 0].long(), cuts[:, 0]) and torch.equal(extras['step_probs'].sum(1)[:, 2].long(), 96-cuts[:, 1])
    assert ((iou := temporal_iou(cuts.numpy(), batch.transitions.numpy())) >= 0).all() and (iou <= 1).all()
    assert torch.equal(model(batch).extras['transitions'], cuts)


def test_windows_and_the_empty_first_step():
    logits = torch.full((3, 96, 2), -5.)
    logits[0, 47, 0] = logits[0, 48, 1] = 1 # the innermost frames
    logits[1, 48, 0] = logits[1, 47, 1] = 9 # each in the other's half
    logits[2, 0, 0] = logits[2, 95, 1] = 1
    assert predict_transitions(logits).tolist() == [[47, 48], [1, 48], [1, 95]]


def test_segments_are_pytorchs_interpolation():
    cuts = torch.tensor([[a, b] for a in (1, 2, 29, 47) for b in (48, 51, 70, 95)])
    x = torch.randn(len(cuts), 96, 7)
    got = (sampling_weights(cuts)@x).unflatten(1, (3, 5))
    for i, (a, b) in enumerate(cuts.tolist()):
        for s, part in enumerate(x[i].tensor_split([a, b])):
            assert torch.allclose(got[i, s], F.interpolate(part.T[None], 5, mode='linear', align_corners=True)[0].T, atol=1e-4)
    assert torch.allclose(sampling_weights(cuts).sum(-1), torch.ones(len(cuts), 15))
    assert (assign_steps(cuts).argmax(-1).diff(dim=1) >= 0).all()


def test_cells_keep_their_place_and_the_released_reshape_does_not():
    maps = torch.randn(2, 9, 1024, 4, 4)
    moved, peer = to_cells(maps), to_cells(maps, True)
    assert torch.equal(moved[16+5], maps[1, :, :, 1, 1]) and torch.equal(peer, maps.reshape(32, 9, 1024))
    assert not torch.equal(moved, peer) and torch.equal(to_cells(maps[..., :1, :1]), to_cells(maps[..., :1, :1], True)) # one cell: nothing to mix up
    out = torch.randn(32, 96, 64)
    assert torch.equal(from_cells(out, 2)[1, :, 5], out[16+5])
    assert torch.equal(from_cells(out, 2, True), out.reshape(2, 96, 64, 4, 4).flatten(3).mT)


def test_a_change_in_one_cell_stays_there():
    "With axes moved one cell of the picture reaches its own answers and no others; as released it reaches many"
    a = torch.randn(1, 9, 1024, 2, 2)
    b = a.clone()
    b[..., 1, 1] += 1
    cuts, scene = torch.tensor([[30, 70]]), torch.randn(1, 9, 1024)
    def touched(peer):
        torch.manual_seed(0)
        pooling = StepPooling(peer_reshape=peer).eval()
        with torch.no_grad(): one, two = (split_query_memory(pooling(scene, m, cuts).feature)[1].view(15, 4, 64) for m in (a, b))
        return [not torch.allclose(one[:, i], two[:, i], atol=1e-5) for i in range(4)]
    assert touched(False) == [False, False, False, True] and all(touched(True))


def test_both_reshapes_train():
    for peer in (False, True):
        out = TSA(dim=64, peer_reshape=peer).train()(small_batch())
        out.total_loss.backward()
        assert out.total_loss.isfinite()


def test_the_teacher_leaves_after_a_quarter():
    model = made(labels=torch.linspace(20, 100, 16))
    model.on_train_start(200*282)
    assert model.teacher.steps == 200*282//4
    model = TSA(dim=64, teacher_forcing=2, cfg=ModelCfg(heads=2)).train()
    batch, seen = small_batch(), []
    for _ in range(4): seen.append(torch.equal(model(batch).extras['transitions'], batch.transitions))
    assert seen == [True, True, False, False] and model.teacher.done == 4
    model.eval()(batch)
    model.encode(batch)
    assert model.teacher.done == 4 # evaluation does not count
    fresh = TSA(dim=64, teacher_forcing=2, cfg=ModelCfg(heads=2)).eval()
    with torch.no_grad(): assert torch.equal(fresh(batch).extras['transitions'], fresh(replace(batch, transitions=None)).extras['transitions']) # and sees no true cut


def test_losses_by_hand():
    model, batch = TSA(theta=30., dim=64, cfg=ModelCfg(heads=2)).eval(), small_batch()
    out, other = model(batch), batch.exemplar
    turned = model(replace(other, exemplar=replace(batch, exemplar=None)))
    there, back = (out.prediction-other.label)/30, (turned.prediction-batch.label)/30
    gap = (batch.label-other.label)/30
    assert torch.isclose(out.losses['mse'], ((there-gap)**2).mean()+((back+gap)**2).mean(), atol=1e-5)
    logits = torch.cat([model.encode(b).extras['transition_logits'] for b in (batch, other)])
    steps, p = torch.cat([batch.transitions, other.transitions]), logits.sigmoid()
    hot = torch.zeros_like(p)
    for i, (a, b) in enumerate(steps.tolist()): hot[i, a, 0] = hot[i, b, 1] = 1
    assert torch.isclose(out.losses['bce'], F.binary_cross_entropy(p, hot), atol=1e-5) and torch.isclose(transition_loss(logits, steps), out.losses['bce'], atol=1e-5)
    assert all(torch.isclose(turned.losses[k], v, rtol=1e-4) for k, v in out.losses.items())


def test_votes_do_not_depend_on_company():
    model = made(heads=8).eval()
    d = 15*64*2
    f, ex, y = torch.randn(40, d), torch.randn(40, 3, d), torch.rand(40, 3)*100 # more than one portion of 32
    with torch.no_grad():
        votes = model.score(f, ex, y)
        assert votes.shape == (40, 3) and torch.allclose(model.score(f[:, None], ex, y), votes)
        assert torch.allclose(model.score(f[35:36], ex[35:36, 1], y[35:36, 1]), votes[35:36, 1], atol=1e-3)


def test_weights_carry_everything(tmp_path):
    batch, a, b = random_batch(), made(1, [20., 50., 95.]).eval(), made(2, [10., 15., 20.]).eval()
    a.train()(batch)
    weights_carry_everything(a, b, batch, tmp_path/'w.pt')
    assert (b.theta, b.teacher.done) == (100, 1)


def test_batch_mates_and_batches_of_one():
    model, batch = made().eval(), random_batch()
    cut = lambda b: Batch(b.scene[2:3], label=b.label[2:3], transitions=b.transitions[2:3], feature_maps=b.feature_maps[2:3])
    one = replace(cut(batch), exemplar=cut(batch.exemplar))
    with torch.no_grad(): assert torch.allclose(model.encode(one).feature, model.encode(batch).feature[2:3], atol=1e-4)
    trains_on_one(model, one)


def test_bf16_is_close():
    bf16_is_close(made(), random_batch())


def by_hand(net, parts):
    "Running mean of the first normalisation of `net` after these inputs (N,9,dim), one pass each"
    mean = torch.zeros(12)
    for x in parts: mean = .9*mean+.1*net.blocks[0][0](x).mean((0, 2))
    return mean.detach()


@pytest.mark.parametrize('norm', ['apart', 'released'])
def test_running_statistics_of_vectors_and_of_maps(norm):
    "Apart each is that of its own input; released, one average gets vectors and cells in turn, and evaluation uses it for both"
    batch = small_batch(dim=64)
    maps = 5*batch.feature_maps
    torch.manual_seed(0)
    pooling = StepPooling(dim=64, norm=norm).train()
    cells, net = to_cells(maps), pooling.psnet
    for _ in range(3): pooling(batch.scene, maps)
    expected = dict(apart=[batch.scene]*3, released=[batch.scene, cells]*3)[norm]
    assert torch.allclose(net.blocks[0][1].running_mean, by_hand(net, expected), atol=1e-5)
    if norm == 'apart': assert torch.allclose(pooling.cell_psnet.blocks[0][1].running_mean, by_hand(net, [cells]*3), atol=1e-5)
    assert count(pooling) == count(net), 'the weights are the same'


def test_apart_is_the_same_training_and_another_evaluation():
    batch = replace(small_batch(dim=64), label=torch.tensor([40., 55., 70., 85.]))
    batch.exemplar.feature_maps = 5*batch.exemplar.feature_maps
    models = []
    for norm in ('apart', 'released'):
        torch.manual_seed(0)
        models.append(TSA(ModelCfg(heads=2, norm=norm), dim=64).train())
        opt = torch.optim.Adam(models[-1].parameters(), lr=1e-3)
        for _ in range(2): opt.zero_grad(); models[-1](batch).total_loss.backward(); opt.step()
    a, b = models
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    with torch.no_grad(): assert not torch.allclose(a.eval()(batch).prediction, b.eval()(batch).prediction, atol=1e-3)
    assert {name for name in a.state_dict() if 'cell_psnet' not in name} == set(b.state_dict()), 'a released checkpoint has the names of before'


def test_the_adapter_treats_a_cell_as_a_vector():
    torch.manual_seed(0)
    model, batch = create_model('tsa', ModelCfg(name='tsa', adapter='on')).eval(), random_batch(2)
    layers = model.inputs
    with torch.no_grad():
        seen, by_hand = layers(batch), layers.adapter(batch.scene)
        assert torch.allclose(seen.scene, by_hand) and torch.allclose(seen.exemplar.scene, layers.adapter(batch.exemplar.scene))
        assert torch.allclose(seen.feature_maps[0, 3, :, 1, 0], layers.adapter(batch.feature_maps[0, 3, :, 1, 0]), atol=1e-5)
        plain = replace(seen, exemplar=None)
        assert torch.allclose(model.encode(batch).feature, model.head.encode(plain).feature)
    assert count(model)-count(model.head) == 1024**2+1024
    model.check_labels(batch)
    with pytest.raises(ValueError, match='TSA needs transitions with'): model.check_labels(replace(batch, transitions=torch.tensor([[50, 50]]*2)))


def test_four_dives_are_learnt_by_heart():
    batch = replace(small_batch(dim=128), label=torch.tensor([40., 55., 70., 85.]))
    torch.manual_seed(0)
    model = TSA(ModelCfg(heads=2), teacher_forcing=20, dim=128).train()
    opt, first = torch.optim.Adam(model.parameters(), lr=3e-3), None
    for _ in range(40):
        out = model(batch)
        first = first or out.total_loss.item()
        opt.zero_grad(); out.total_loss.backward(); opt.step()
    with torch.no_grad(): out = model.eval()(batch)
    assert spearman(out.prediction.numpy(), batch.label.numpy()) == pytest.approx(1) and (out.prediction-batch.label).abs().mean() < 6
    assert out.total_loss < .2*first and torch.equal(out.extras['transitions'], batch.transitions)


def test_what_is_missing_is_named():
    model, batch = made().train(), random_batch()
    for field in ('scene', 'feature_maps', 'transitions', 'label', 'exemplar'):
        with pytest.raises(ValueError, match=f'no {field}'): model(replace(batch, **{field: None}))
    for field in ('feature_maps', 'label', 'transitions'):
        with pytest.raises(ValueError, match=f'for the exemplar.*{field}'): model(replace(batch, exemplar=replace(batch.exemplar, **{field: None})))
    with pytest.raises(ValueError, match='pass both'): model.score(torch.zeros(1, 15*64*2))
    with pytest.raises(ValueError, match='from the same clips'): model(replace(batch, feature_maps=batch.feature_maps[:, :5]))
    with pytest.raises(ValueError, match='number of clips'): made(clips=10)(batch)
    with pytest.raises(ValueError, match='8 divides'): PSNet(frames=100)


@pytest.mark.parametrize('steps', [[0, 50], [50, 50], [60, 40], [20, 96], [-3, 50]])
def test_impossible_steps_are_named(steps):
    batch = random_batch()
    bad = batch.transitions.clone()
    bad[2] = torch.tensor(steps)
    with pytest.raises(ValueError, match='in these dives: 0/2'): made().train()(replace(batch, transitions=bad))
    with pytest.raises(ValueError, match='number 2'): check_transitions(replace(batch, transitions=bad, uid=()))


def test_no_labels_no_losses():
    out = made().eval()(replace(random_batch(), label=None, transitions=None))
    assert not out.losses and out.prediction.isfinite().all()


@pytest.mark.parametrize('labels, theta', [([0., 29.], 30.), ([0., 30.5], 100.)])
def test_the_unit_follows_the_labels(labels, theta): assert made(labels=labels).theta == theta


def test_conv_pair_is_what_it_says():
    block = conv_pair(9, 12)
    assert block(torch.randn(2, 9, 32)).shape == (2, 12, 32) and [type(m).__name__ for m in block] == ['Conv1d', 'BatchNorm1d', 'ReLU']*2


def test_real_steps_fit_or_are_named(shared):
    "How often the two windows, and the check, exclude an annotated dive"
    from fspn_nb.data.clips import frame_ids
    from fspn_nb.data.finediving import read_finediving
    from fspn_nb.data.records import steps_on_axis
    samples = read_finediving(shared('data', 'finediving'))
    steps = torch.tensor([steps_on_axis(s, frame_ids(s.n_frames)) for s in samples])
    check_transitions(Batch(torch.zeros(len(steps), 1, 1), transitions=steps))
    assert ((steps[:, 0] >= 48).sum(), (steps[:, 1] < 48).sum()) == (108, 98)
