"The models: one contract for all, the paper's sizes, and the intervals of the real training split"
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from fspn_nb.config import ModelCfg
from fspn_nb.core import Batch
from fspn_nb.methods import METHODS
from fspn_nb.models.fspn import FSPN,build_fspn,fspn,fspn_m,fspn_s,part_sizes
from fspn_nb.models.heads import ScoreBins
from fspn_nb.models.i3d import I3D
from fspn_nb.models.iap import decode_transitions
from fspn_nb.models.smt import head_width
from fspn_nb.models.with_backbone import WithBackbone
from fspn_nb.peers.i3d_mlp import build_i3d_mlp
from fspn_nb.training.graphs import HostWaits
from fspn_nb.training.loop import train_step
from fspn_nb.zoo import create_model,random_batch

FINETUNE_ONLY = [m.name for m in METHODS.values() if m.finetune_only]
LABELS = np.linspace(20, 100, 40)
FLAGS = [dict(), dict(use_iap=False), dict(use_smt=False), dict(use_mtf=False), dict(use_smt=False, use_mtf=False), dict(use_iap=False, use_smt=False, use_mtf=False),
         dict(use_actor=False), dict(use_gc=False), dict(use_bce=False), dict(adapter=False), dict(decoding='expected'), dict(dropout=.3), dict(pairing='absolute'),
         dict(pairing='absolute', use_bce=False), dict(sub_actions=5), dict(clips=10), dict(num_bins=8), dict(heads=6), dict(heads=10), dict(heads=12), dict(head_dim=4), dict(blocks=1)]
name_of = lambda flags: ','.join(f'{k}={v}' for k, v in flags.items()) or 'all'


def batch_of(b=3, clips=9, seed=0, exemplar=True):
    "`b` random dives, with an exemplar each"
    g = torch.Generator().manual_seed(seed)
    rand = lambda *s: torch.rand(*s, generator=g)
    one = lambda: Batch(rand(b, clips, 1024), rand(b, clips, 1024), 20+80*rand(b), 1.5+2*rand(b))
    batch = one()
    if exemplar: batch.exemplar = one()
    return batch


def small(seed=0, **flags):
    "FSPN-S with `flags`"
    torch.manual_seed(seed)
    return build_fspn(replace(ModelCfg(), **flags), LABELS, stages=1)


def conform(model, batch):
    "What trainer and evaluation rely on, for any model"
    out = model.train()(batch)
    assert out.prediction.shape == (len(batch),) and out.prediction.isfinite().all()
    assert out.losses and all(v.ndim == 0 and v.isfinite() for v in out.losses.values())
    out.total_loss.backward()
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not idle, idle
    model.eval()
    with torch.no_grad():
        a, b = model(batch), model(batch)
        mine = model.encode(batch)
        theirs = (model.encode(batch.exemplar).feature, batch.exemplar.label) if model.uses_exemplar else ()
        by_hand = model.score(mine.feature, *theirs)
    assert torch.equal(a.prediction, b.prediction)
    assert torch.allclose(by_hand, a.prediction, atol=.05)
    for name in model.needs:
        with pytest.raises((ValueError, TypeError), match=name): model(replace(batch, **{name: None}))


@pytest.mark.parametrize('flags', FLAGS, ids=name_of)
def test_fspn_keeps_the_contract(flags):
    conform(small(**flags), batch_of(clips=flags.get('clips', 9)))


@pytest.mark.parametrize('make', [fspn_s, fspn_m, fspn])
def test_every_size_keeps_the_contract(make):
    conform(make(bins=ScoreBins.fit_pairs(LABELS, top=100)), batch_of(2))


def test_baseline_keeps_the_contract():
    conform(build_i3d_mlp(ModelCfg(name='i3d_mlp'), LABELS), batch_of(exemplar=False))


@pytest.mark.parametrize('name', FINETUNE_ONLY)
def test_methods_inside_the_backbone_keep_the_contract(name):
    "Over frames, with the backbone that trains: its own logits have nothing to say"
    torch.manual_seed(0)
    net = WithBackbone(I3D(), create_model(name))
    del net.backbone.Logits
    conform(net, random_batch(2, 2, exemplar=False, pixels=32))


@pytest.mark.parametrize('choice', [dict(token_mode='frames'), dict(tokens_per_step=5), dict(residual='scene'), dict(residual='actor'), dict(order_prior=0.), dict(fusion_dim=64)], ids=name_of)
def test_choices_that_the_paper_leaves_open(choice):
    from types import SimpleNamespace
    cfg = replace(ModelCfg(), stages=1, **choice)
    conform(FSPN(cfg, ScoreBins.fit_pairs(LABELS)), batch_of())


def test_missing_exemplar_and_label_are_named():
    model = small().train()
    with pytest.raises(ValueError, match='exemplar'): model(batch_of(exemplar=False))
    with pytest.raises(ValueError, match='label'): model(replace(batch_of(), label=None))
    assert not small().eval()(replace(batch_of(), label=None)).losses


@pytest.mark.parametrize('name', ['fspn_s', 'fspn', 'core_tree', 'tpt', 'i3d_mlp', 'i3d_lstm', 'usdl'])
def test_a_training_step_waits_for_nothing(name):
    model, batch = create_model(name).train(), random_batch(4)
    optimiser = torch.optim.AdamW(model.parameters(), fused=True) # as `make_optimiser` builds it
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1.)
    train_step(model, batch, optimiser, schedule) # the first one may ask whether there are intervals
    with HostWaits() as look: train_step(model, batch, optimiser, schedule)
    assert look.total and not look.waits


def test_waiting_is_noticed():
    with HostWaits() as look: bool((torch.arange(3) > 1).any()), torch.arange(3)[torch.arange(3) > 1]
    assert len(look.waits) >= 2


def test_many_exemplars_at_once_equal_one_by_one():
    model, batch = small(decoding='expected').eval(), batch_of(4)
    with torch.no_grad():
        f, ex = model.encode(batch).feature, model.encode(batch_of(6, seed=1)).feature
        y = torch.linspace(30, 90, 6)
        every = model.score(f, ex[None].expand(4, -1, -1), y.expand(4, -1))
        single = torch.stack([model.score(f, e.expand_as(f), v.expand(4)) for e, v in zip(ex, y)], 1)
    assert torch.allclose(every, single, atol=1e-3)
    assert torch.allclose(model.score(f[:, None], ex[None].expand(4, -1, -1), y.expand(4, -1)), every, atol=1e-3)


def test_evaluation_does_not_depend_on_batch_mates():
    model, batch = small().eval(), batch_of(4)
    with torch.no_grad(): every, one = model.encode(batch).feature, model.encode(Batch(batch.scene[2:3], batch.actor[2:3])).feature
    assert torch.allclose(every[2:3], one, atol=1e-4)


def test_weights_carry_intervals_and_scale():
    model = small(seed=1).eval()
    fresh = fspn_s().eval()
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad(): assert torch.equal(fresh(batch_of()).prediction, model(batch_of()).prediction)


def test_printed_parameter_counts():
    sizes = {f: part_sizes(f())['FSPN']/1e6 for f in (fspn_s, fspn_m, fspn)}
    assert abs(sizes[fspn]/3.75-1) < .05
    assert abs(sizes[fspn_m]/1.31-1) < .1 and abs(sizes[fspn_s]/.48-1) < .1
    assert part_sizes(fspn(replace(ModelCfg(), adapter=False)))['adapter'] == 0


@pytest.mark.parametrize('heads', [6, 8, 10, 12])
def test_heads_of_table_three_cover_the_width(heads):
    assert all(head_width(c, heads)*heads >= c for c in (64, 128, 256))


def test_an_overfit_is_possible():
    torch.manual_seed(0)
    model, batch = small(decoding='expected').train(), batch_of(4)
    opt = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(60):
        out = model(batch)
        opt.zero_grad(); out.total_loss.backward(); opt.step()
    with torch.no_grad(): off = (model(batch).prediction-batch.label).abs().mean()
    assert off < 5, off


def test_transitions_are_ordered_and_inside():
    A = torch.randn(50, 96, 4, generator=torch.Generator().manual_seed(0)).softmax(-1)
    for rule in ('cut', 'printed'):
        peak, first = decode_transitions(A, rule)
        assert (peak[:, :-1] < first).all() and (first <= peak[:, 1:]).all()


def real_labels(shared):
    "Scores, action types and resampled transitions of FineDiving's annotations; training keys"
    folder = shared('data', 'finediving', 'Annotations')
    with open(folder/'fine-grained_annotation_aqa.pkl', 'rb') as f: notes = pickle.load(f)
    with open(folder/'train_split.pkl', 'rb') as f: train = [tuple(k) for k in pickle.load(f)]
    return notes, train


def test_intervals_of_the_real_training_split(shared):
    notes, train = real_labels(shared)
    labels, types = [notes[k][1] for k in train], [notes[k][0] for k in train]
    from fspn_nb.models.heads import pair_differences
    assert len(pair_differences(labels, types)) == 146_949
    bins = ScoreBins.fit_pairs(labels, types, top=100)
    assert np.allclose([0, *bins.hi[8:].tolist()], [0, 2.1, 4.5, 6.82, 9.75, 13.35, 17.88, 25.5, 100], atol=.01)
    assert torch.equal(bins.lo, -bins.hi.flip(0))


def test_boundary_rule_reaches_the_real_transitions(shared):
    notes, _ = real_labels(shared)
    first = []
    for note in notes.values():
        labels = np.asarray(note[4])[np.linspace(0, len(note[4])-1, 96).astype(int)]
        kinds = list(dict.fromkeys(labels.tolist()))
        if len(kinds) > 1: first.append([np.argmax(labels == kinds[1]), np.argmax(labels == kinds[-1])])
    t1, t2 = np.array(first).T
    assert .6 < ((t1 >= 1) & (t1 <= 32)).mean() < .7 and .6 < ((t2 >= 33) & (t2 <= 64)).mean() < .7 # the printed rule cannot say more
    assert ((t1 >= 1) & (t1 <= 63)).all() and ((t2 >= 33) & (t2 <= 95)).all() # the cut can
