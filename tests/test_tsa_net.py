"TSA-Net: the tube, what attention may touch, boxes that go with the frames, and training through the backbone"
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fspn_nb.batches.dataset import Labels
from fspn_nb.batches.frame_store import build_store,scene_size
from fspn_nb.batches.sources import ClipDataset,dive_boxes,make_batch,normalized_boxes
from fspn_nb.batches.store_source import CachedDataset,sample_augmentation
from fspn_nb.config import CHOICES,ModelCfg,finediving,override,validate
from fspn_nb.core import Batch,rng_for
from fspn_nb.data.clips import resize_crop
from fspn_nb.data.records import Sample
from fspn_nb.evaluate import evaluate
from fspn_nb.experiments.session import RunResult
from fspn_nb.experiments.variants import EXPERIMENTS,BASELINES
from fspn_nb.methods import METHODS
from fspn_nb.metrics import spearman
from fspn_nb.models.i3d import I3D,normalize_clip
from fspn_nb.models.with_backbone import WithBackbone
from fspn_nb.peers.tsa_net import TSANet,TubeAttention,build_tsa_net,tube_cells
from fspn_nb.report.run_report import plot_first_parse
from fspn_nb.train import fit
from fspn_nb.training.prepare import prepare
from fspn_nb.zoo import list_models,random_batch

FINETUNE_ONLY = [m.name for m in METHODS.values() if m.finetune_only]
LABELS = [20., 50., 80., 95.]
count = lambda m: sum(p.numel() for p in m.parameters())


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    torch.set_num_threads(1)


def backbone(seed=0):
    "I3D with random weights, without its logits"
    torch.manual_seed(seed)
    net = I3D()
    net.Logits = nn.Identity()
    return net


def whole(awake=True, seed=0, **kw):
    "TSA-Net with I3D in front; `awake`: the block's scale is one, as after training"
    net = WithBackbone(backbone(seed), TSANet(ModelCfg(name='tsa_net'), LABELS, **kw))
    if awake: nn.init.ones_(net.head.tube.norm.weight)
    return net


def test_size_of_the_block():
    assert count(TubeAttention()) == 462_720
    assert count(TubeAttention(embed=True)) == 924_480
    assert count(build_tsa_net(ModelCfg(name='tsa_net'), LABELS)) == 462_720+295_425


@pytest.mark.parametrize('kw', [dict(), dict(embed=True), dict(distribution=True)], ids=['plain', 'embed', 'distribution'])
def test_a_fresh_block_leaves_i3d_as_it_was(kw):
    batch, net = random_batch(2, 2, exemplar=False, pixels=32), whole(awake=False, **kw).eval()
    with torch.no_grad():
        got = net.extract_features(batch).scene
        expected = net.backbone.features(normalize_clip(batch.scene.flatten(0, 1))).mean((2, 3, 4)).unflatten(0, (2, 2))
    assert torch.equal(got, expected) or torch.allclose(got, expected, atol=1e-6)


def cells_of(*box, shape=(1, 4, 4)):
    "The cells of one layer that a box covers, as text"
    result = tube_cells(torch.tensor([box]*4, dtype=torch.float32)[None], shape)[0, 0]
    return [''.join('x' if v else '.' for v in row) for row in result.tolist()]


@pytest.mark.parametrize('box, expected', [
    ((0, 0, 1, 1), ['xxxx']*4), ((0, 0, .5, 1), ['xx..']*4), ((0, 0, .375, 1), ['xx..']*4), ((.25, .25, .5, .5), ['....', '.x..', '....', '....']),
    ((.26, .74, .27, .76), ['....', '....', '.x..', '.x..']), ((1, 0, 1, 1), ['....']*4), ((0, 0, 0, 1), ['....']*4), ((.3, .6, .7, .6), ['....']*4), ((.99, .99, 1, 1), ['....', '....', '....', '...x'])])
def test_cells_under_a_box(box, expected):
    assert cells_of(*box) == expected
    mirrored = (1-box[2], box[1], 1-box[0], box[3])
    assert cells_of(*mirrored) == [row[::-1] for row in expected]


@pytest.mark.parametrize('length', [1, 2, 8, 15, 16, 17, 32])
def test_layers_of_the_tube_are_those_of_i3d(length):
    net, x = I3D(), torch.rand(1, 3, length, 32, 32)
    with torch.no_grad():
        for name in net.names[:net.names.index('MaxPool3d_4a_3x3')+1]: x = getattr(net, name)(x)
    boxes = torch.zeros(1, length, 4)
    boxes[0, -1] = torch.tensor([0., 0., 1., 1.])
    tube = tube_cells(boxes, x.shape[2:])
    assert tube.shape == (1, *x.shape[2:]) and tube[0, -1].all() and not tube[0, :-1].any()


def test_attention_reads_and_writes_the_tube_alone():
    torch.manual_seed(0)
    block = TubeAttention(16).eval()
    nn.init.ones_(block.norm.weight)
    x, inside = torch.rand(3, 16, 4, 3, 3), torch.rand(3, 4, 3, 3) > .6
    inside[1] = False
    for training in (False, True):
        block.train(training)
        y = block(x, inside)
        assert torch.equal(y.movedim(1, -1)[~inside], x.movedim(1, -1)[~inside])
        assert torch.equal(y[1], x[1]) and (y.movedim(1, -1)[inside] != x.movedim(1, -1)[inside]).any(1).all()
        other = torch.where(inside[:, None], x, 9*torch.randn_like(x))
        assert torch.allclose(block(other, inside).movedim(1, -1)[inside], y.movedim(1, -1)[inside])
    block.eval()
    alone = torch.cat([block(x[i:i+1], inside[i:i+1]) for i in range(3)])
    assert torch.allclose(alone, block(x, inside), atol=1e-5), 'a clip must not attend to another'
    leaf = x.clone().requires_grad_()
    block(leaf, inside)[0][:, inside[0]].square().sum().backward()
    assert leaf.grad.isfinite().all() and not leaf.grad[0].movedim(0, -1)[~inside[0]].any() and not leaf.grad[1:].any()


def test_tubes_of_one_cell_and_of_none():
    block = TubeAttention(16).train()
    nn.init.ones_(block.norm.weight)
    x, one = torch.rand(2, 16, 4, 3, 3), torch.zeros(2, 4, 3, 3, dtype=torch.bool)
    assert torch.equal(block(x, one), x)
    one[0, 2, 1, 1] = True
    y = block(x, one)
    assert y.isfinite().all() and (y != x).any(1).sum() == 1


@pytest.mark.parametrize('name', FINETUNE_ONLY)
def test_contract_over_frames(name):
    assert name in list_models()
    net, batch = whole(), random_batch(2, 2, exemplar=False, pixels=32)
    out = net.train()(batch)
    assert out.prediction.shape == (2,) and out.prediction.isfinite().all() and list(out.losses) == ['mse']
    out.total_loss.backward()
    idle = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
    assert not idle, idle
    with torch.no_grad():
        a, b = net.eval()(batch), net(batch)
        one = net(Batch(batch.scene[1:], label=batch.label[1:], boxes=batch.boxes[1:]))
        assert torch.equal(a.prediction, b.prediction) and torch.allclose(net.score(net.encode(batch).feature), a.prediction, atol=.05)
        assert torch.allclose(one.prediction, a.prediction[1:], atol=.05)
        with torch.autocast('cpu', torch.bfloat16): half = net(batch)
    assert half.prediction.dtype == torch.float32 and (half.prediction-a.prediction).abs().max() < 5
    assert not net(replace(batch, label=None)).losses
    for gone in ('scene', 'boxes'):
        with pytest.raises(ValueError, match=f'TSA-Net needs scene, boxes, but this batch has no {gone}'): net(replace(batch, **{gone: None}))


def test_weights_carry_everything(tmp_path):
    a, b, batch = whole(seed=1).eval(), whole(seed=2).eval(), random_batch(1, 2, exemplar=False, pixels=32)
    torch.save(a.state_dict(), tmp_path/'w.pt')
    b.load_state_dict(torch.load(tmp_path/'w.pt', weights_only=True))
    with torch.no_grad(): assert torch.equal(a(batch).prediction, b(batch).prediction)


def test_frozen_is_refused_and_left_out_of_the_frozen_grid():
    with pytest.raises(ValueError, match="tsa_net works inside the backbone: need train.backbone='finetune', got 'frozen'"): validate(finediving('smoke', model__name='tsa_net'))
    validate(finediving('smoke', model__name='tsa_net', train__backbone='finetune'))
    assert set(FINETUNE_ONLY) <= set(CHOICES['model.name']) and not set(FINETUNE_ONLY) & (set(BASELINES)|set(EXPERIMENTS))


def film(folder, uid, hw=(72, 128), n=24, spare=3):
    "A dive whose actor is a bright rectangle on black, and its boxes; before and after it stands still"
    folder.mkdir()
    i = np.arange(n)
    x, y = (.3*hw[1]+i).astype(int), (5+2*i%(hw[0]-25)).astype(int)
    boxes = np.stack([x, y, x+12, y+16], 1)
    for j in range(-spare, n+spare):
        x1, y1, x2, y2 = boxes[np.clip(j, 0, n-1)]
        frame = np.zeros((*hw, 3), np.uint8)
        frame[y1:y2, x1:x2] = 255
        Image.fromarray(frame).save(folder/f'{j+100:05d}.jpg', quality=95)
    name = lambda a, b: tuple(f'{j+100:05d}.jpg' for j in range(a, b))
    return Sample(uid, 'train', '107B', 80., folder=folder, files=name(0, n), before=name(-spare, 0), after=name(n, n+spare)), boxes.astype(float)


def films(tmp_path, **kw):
    "A run of tsa_net on two such dives"
    made = [film(tmp_path/str(i), f'v/{i}', hw) for i, hw in enumerate([(72, 128), (90, 120)])]
    cfg = finediving('smoke', model__name='tsa_net', train__backbone='finetune', clip__frames=20, clip__starts=(0, 4), model__clips=2, clip__size=64, **kw)
    return cfg, [sample for sample, _ in made], {sample.uid: b for sample, b in made}


def check_places(scene, boxes, size):
    "The bright rectangle of each frame lies where its box says; how many frames showed it"
    shown = 0
    bright = scene.float().mean(2) > 110 # (B,K,L,H,W)
    for picture, box in zip(bright.flatten(0, 2), boxes.flatten(0, 2)*size):
        x1, y1, x2, y2 = box.tolist()
        if x2-x1 < 3 or y2-y1 < 3: continue
        rows, cols = picture.any(1).nonzero(), picture.any(0).nonzero()
        result = (cols.min(), rows.min(), cols.max()+1, rows.max()+1)
        assert all(abs(float(a)-b) <= 1.5 for a, b in zip(result, (x1, y1, x2, y2))), (result, box)
        shown += 1
    for picture, box in zip(bright.flatten(0, 2), boxes.flatten(0, 2)):
        if box[2] <= box[0] or box[3] <= box[1]: assert picture.sum() <= 2*size # at most a smeared edge
    return shown


@pytest.mark.parametrize('orientation', ['correct', 'peer'])
@pytest.mark.parametrize('jitter', [0, 3])
def test_boxes_go_with_the_frames(tmp_path, orientation, jitter):
    cfg, samples, boxes = films(tmp_path, train__flip_prob=.5, clip__orientation=orientation, train__temporal_jitter=jitter)
    source, ids = ClipDataset(samples, cfg, boxes), np.array([1, 0])
    sources = [source, CachedDataset(build_store(samples, cfg, boxes, tmp_path/'store'), cfg)]
    seen, flips = 0, set()
    for rng_key in (None, *((e, 3) for e in range(5))):
        first = source.extra_fields(ids, rng_key)['boxes']
        for s in sources:
            result = s.extra_fields(ids, rng_key)['boxes']
            assert result.shape == (2, 2, 16, 4) and torch.equal(result, first)
            seen += check_places(s.get_batch(ids, rng_key)[0], result, 64)
        flips |= {sample_augmentation(cfg, rng_key, int(i), samples[i])[0] for i in ids}
    assert seen > 200 and flips == {True, False}


def test_a_mirror_of_the_frames_is_a_mirror_of_the_boxes(tmp_path):
    cfg, samples, boxes = films(tmp_path)
    hw, b = (72, 128), boxes['v/0']
    for where in (.2, .5, .9):
        plain, mirrored = (normalized_boxes(np.stack([128-b[:, 2], b[:, 1], 128-b[:, 0], b[:, 3]], 1) if f else b, hw, cfg.clip, f, where) for f in (False, True))
        assert torch.allclose(plain, mirrored, atol=1e-6), 'boxes mirrored twice are where they were'


@pytest.mark.parametrize('orientation', ['correct', 'peer'])
@pytest.mark.parametrize('hw', [(72, 128), (128, 72), (100, 100), (256, 455), (37, 91)])
def test_shares_know_the_shrunk_size(hw, orientation):
    clip = replace(finediving('smoke').clip, orientation=orientation)
    tall, wide = scene_size(*hw, clip)
    assert resize_crop(torch.zeros(1, *hw, 3, dtype=torch.uint8), clip.size, orientation).shape[2:] == (clip.size, clip.size)
    top, left = round(.5*(tall-clip.size)), round(.5*(wide-clip.size))
    centre = torch.tensor([[left+10, top+20, left+30, top+40]])*torch.tensor([hw[1]/wide, hw[0]/tall]*2)
    assert torch.allclose(normalized_boxes(centre.numpy(), hw, clip)[0]*clip.size, torch.tensor([10., 20., 30., 40.]), atol=1e-3)


def test_without_boxes_the_whole_square_is_the_tube(tmp_path):
    cfg, samples, boxes = films(tmp_path)
    none = dict.fromkeys(boxes)
    for source in (ClipDataset(samples, cfg, none), CachedDataset(build_store(samples, cfg, none, tmp_path/'store'), cfg)):
        result = source.extra_fields(np.array([0, 1]), (2, 3))['boxes']
        assert result.shape == (2, 2, 16, 4) and tube_cells(result.flatten(0, 1), (4, 4, 4)).all()


def test_only_who_reads_boxes_gets_them(tmp_path):
    cfg, samples, boxes = films(tmp_path)
    targets = Labels(torch.tensor([70., 80.]), torch.tensor([3., 3.]), None, ('v/0', 'v/1'))
    ids = np.array([0, 1])
    batch = make_batch(ClipDataset(samples, cfg, boxes), targets, ids, ids[::-1].copy(), 4)
    assert torch.equal(batch.boxes[0], dive_boxes(samples[0], cfg.clip, boxes['v/0'], rng_for(cfg.seed, 4, 3, 0), cfg.train.flip_prob)) and batch.exemplar.boxes.shape == batch.boxes.shape
    assert make_batch(ClipDataset(samples, override(cfg, model__name='usdl'), boxes), targets, ids).boxes is None


def test_four_dives_can_be_learnt():
    "Noise that looks alike in all four but for the tube's brightness; the whole net trains"
    g = torch.Generator().manual_seed(0)
    boxes = torch.tensor([.25, .25, .75, .75]).expand(4, 1, 16, 4)
    scene = torch.randint(0, 90, (4, 1, 3, 16, 32, 32), dtype=torch.uint8, generator=g)
    scene[..., 8:24, 8:24] += torch.tensor([0, 50, 100, 150], dtype=torch.uint8).view(4, 1, 1, 1, 1, 1)
    batch, net = Batch(scene, label=torch.tensor(LABELS), boxes=boxes), whole(awake=False)
    net.freeze_bn = False
    opt = torch.optim.Adam(net.parameters(), lr=1e-3)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(40):
        out = net.train()(batch)
        opt.zero_grad(); out.total_loss.backward(); opt.step()
        if out.total_loss < 1e-3: break
    assert spearman(out.prediction.numpy(), batch.label.numpy()) == 1 and out.total_loss < .1, out
    still = [n for n, p in net.named_parameters() if torch.equal(p, before[n])]
    assert not still, still
    assert net.head.tube.norm.weight.abs().max() > 0


def test_a_run_from_frames_to_metrics(tmp_path):
    cfg = finediving('smoke', model__name='tsa_net', train__backbone='finetune', model__adapter=False, clip__size=32, clip__starts=(0, 40), model__clips=2,
                     synthetic__n_train=6, synthetic__n_test=4, weights='random', train__epochs=1, train__batch_size=2)
    run = fit(cfg, tmp_path, 'cpu')
    result = evaluate(run, device='cpu')
    assert (result['method'], result['mode'], result['n']) == ('tsa_net', 'finetune', 4)
    w = torch.load(run/'last.pt', weights_only=True)['model']
    assert w['head.tube.norm.weight'].any() and w['head.tube.norm.num_batches_tracked'] == 3
    data = prepare(cfg, 'cpu')
    assert data.source.extra_fields([0])['boxes'].shape == (1, 2, 16, 4)
    done = SimpleNamespace(done=[RunResult(cfg, run, result, 0., data)])
    assert plot_first_parse(done, 'w_dn') is None, 'no picture of steps that nobody found'
