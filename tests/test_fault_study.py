"Pairs of films that differ in one fault: what a release holds, one mask by hand, what is refused, controls, and the section of the report"
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from fspn_nb.analysis.fault_table import fault_table,guessed_steps
from fspn_nb.data.clips import load_frames
from fspn_nb.data.finediving import write_frames
from fspn_nb.data.records import Sample
from fspn_nb.inspect.fault_pairs import (FAULT_STEPS,FaultPair,PairPlan,fault_frames,fault_mask,draw_pair,pair_videos,plan_pairs,
    step_shares,true_steps)
from fspn_nb.inspect.fault_study import heat_gain,pair_scores,study_networks
from fspn_nb.synthetic.judging import PRICES
from fspn_nb.synthetic.release import plan_release

PLANS = plan_pairs(6, 15)


@pytest.fixture(scope='module')
def splash():
    return draw_pair(next(plan for plan in PLANS if plan.fault == 'splash'))


def test_every_fault_is_asked_as_often_and_at_every_severity():
    counts = pd.DataFrame(PLANS).value_counts(['fault', 'severity'])
    assert len(counts) == 15 and (counts == 1).all()
    jobs = {f'{job.key[0]}/{job.key[1]}': job for job in plan_release(6, 15) if job.split == 'test'}
    assert [plan.uid for plan in PLANS] == list(jobs) and all(plan.seed == jobs[plan.uid].seed for plan in PLANS)


@pytest.mark.parametrize('plan', PLANS[:5], ids=lambda plan: plan.fault)
def test_nothing_but_the_fault_differs(plan):
    pair = draw_pair(plan, draw=False)
    a, b = pair.clean, pair.faulty
    assert {name for name in PRICES if a.faults[name] != b.faults[name]} == {plan.fault} and a.faults[plan.fault] == 0
    assert (a.action, a.height, a.difficulty, a.transitions, a.touch) == (b.action, b.height, b.difficulty, b.transitions, b.touch)
    assert np.isclose(pair.cost, 3*a.difficulty*PRICES[plan.fault]*plan.severity) and np.isclose(sum(a.costs.values())+pair.cost/3/a.difficulty, sum(b.costs.values()))
    early = slice(0, a.transitions[0]-3)
    assert np.array_equal(a.joints[early], b.joints[early]), 'a fault in the take-off'


def test_a_fault_without_a_price_is_refused():
    "`make_dive` takes no notice of a name that it does not know: a pair of twins that differ in nothing would look like a network that sees nothing"
    with pytest.raises(ValueError, match='unknown faults .*belly'): draw_pair(PLANS[0]._replace(fault='belly'))
    with pytest.raises(ValueError, match='unknown faults .*Splash'): plan_pairs(6, 6, faults=('splash', 'Splash'))
    with pytest.raises(ValueError, match='need severities above 0 and at most 1, got 1.2'): plan_pairs(6, 6, severities=(1.2,))


def test_films_are_those_of_a_release(splash, tmp_path):
    "The same bytes as frames that were written and read, at the frames that a run keeps"
    film = splash.faulty.frames
    folder = write_frames(tmp_path, ('synth01', 1), splash.plan.start, film)
    sample = Sample('synth01/1', 'test', '', 0., folder=folder, files=tuple(sorted(path.name for path in folder.iterdir())))
    assert torch.equal(pair_videos(splash, 16)[1].frames, load_frames(sample, splash.ids(16)))


def test_a_splash_is_seen_after_the_touch_only_and_where_the_films_differ(splash):
    mask = fault_mask(splash)
    assert not mask[:splash.faulty.touch].any() and mask[splash.faulty.touch+8].sum() > 100
    differs = (splash.clean.frames != splash.faulty.frames).any(-1)
    assert not (mask & ~differs).any()
    steps = true_steps(splash.faulty, np.arange(len(mask)))
    assert step_shares(mask, steps)[2] == 1 and FAULT_STEPS['splash'] == ('entry',)


def test_a_body_that_moved_is_marked_twice(splash):
    "The faulty body three metres further on, by hand: half of the mask around each of both places, nothing for a body that did not move"
    b = splash.faulty
    moved = replace(b, joints=b.joints-[3., 0.])
    mask, = fault_mask(FaultPair(splash.plan, moved, b), [10])
    x = b.joints_px[10, :, 0].mean()
    metre = np.ptp(b.joints_px[10, :, 0])/np.ptp(b.joints[10, :, 0])
    assert mask[:, int(x-1.5*metre):].sum() == pytest.approx(mask[:, :int(x-1.5*metre)].sum(), rel=.15)
    assert not fault_mask(FaultPair(splash.plan, b, b), [10]).any()


def test_shares_and_frames_of_a_mask_that_is_known():
    mask = np.zeros((6, 4, 4), bool)
    mask[2, 0, 0] = mask[3, :2] = mask[4] = True # 1, 8 and 16 pixels
    assert step_shares(mask, np.array([0, 0, 1, 1, 2, 2])).tolist() == [0, .36, .64]
    assert fault_frames(mask).tolist() == [False, False, False, True, True, False]
    assert not fault_frames(mask[:2]).any() and np.isnan(step_shares(mask[:2], np.array([0, 1]))).all()


def test_gains_by_hand():
    cells = torch.tensor([[1., 1, 1, 1], [0, 0, 1, 1], [0, 0, .5, 0]]).view(3, 1, 2, 1, 2)
    gain = heat_gain(torch.tensor([[1., -5], [2, 1]]).view(1, 2, 1, 2), cells) # 3 of 4 on the frames, 1 of 3 on the place; a flat map 1/2 and 1/4
    assert gain == pytest.approx(dict(frames=.25, place=1/12))


class Steps(torch.nn.Module):
    "Adds up the scene, step by step, and compares with an exemplar"
    uses_exemplar, needs = True, ('scene', 'actor')
    def encode(self, batch): return SimpleNamespace(feature=batch.scene.mean(-1))
    def score_steps(self, feature, exemplar, label): return feature-exemplar
    def score(self, feature, exemplar, label): return label+self.score_steps(feature, exemplar, label).sum(-1)


@pytest.mark.parametrize('kind,factor', [('points', 1), ('per_dd', 2.5)])
def test_falls_are_in_points(kind, factor):
    "Labels per difficulty are multiplied by it, and the steps add up to the fall in either unit"
    from fspn_nb.protocols import LabelTransform
    labels = SimpleNamespace(uid=('a/1',), difficulty=torch.tensor([2.5]), label_transform=LabelTransform(kind))
    films = torch.tensor([[5., 9, 7], [5, 6, 6]])[..., None]
    pair = SimpleNamespace(plan=PairPlan('a/1', 0, 0, 'splash', 1.), features=dict(scene=films, actor=films))
    score, steps = pair_scores(Steps(), SimpleNamespace(labels=labels), pair, (torch.tensor([[4., 4, 4], [6, 6, 6]]), torch.tensor([10., 20.])))
    assert score.tolist() == [21*factor, 17*factor] and (steps[0]-steps[1]).tolist() == [0, 3*factor, 1*factor]


def test_frames_in_place_of_features_are_refused():
    data = SimpleNamespace(backbone=torch.nn.Identity(), cfg=SimpleNamespace(train=SimpleNamespace(backbone='finetune')))
    with pytest.raises(ValueError, match='finetune, which reads frames; take a frozen run'): study_networks(Steps(), data)


def test_a_network_that_knows_stands_out_and_one_that_does_not_does_not():
    rng, n = np.random.default_rng(1), 30
    cost, entry = rng.uniform(3, 25, n), np.arange(n) % 2
    def rows(network, knows):
        right = np.where(rng.random(n) < (.9 if knows else .5), entry, 1-entry)
        return pd.DataFrame(dict(method='m', network=network, seed=0, uid=[f'{i:02d}' for i in range(n)], fault=np.where(entry, 'splash', 'shape'), cost=cost,
                                 fall=knows*cost+rng.normal(0, 2, n), step_0=0., step_1=1.-right, step_2=1.*right, true_0=0., true_1=1.-entry, true_2=1.*entry,
                                 acts_0=0, acts_1=1-entry, acts_2=entry))
    table = fault_table(pd.concat([rows('trained', 1), rows('untrained', 0), rows('shuffled', 0)]), 200)
    all_ = table[table.fault == 'all'].set_index('measure')
    assert (all_.over_untrained_lo[['order', 'step', 'booked']] > 0).all() and (all_.over_untrained_p[['order', 'step', 'booked']] < .05).all()
    assert all_.trained['slope'] == pytest.approx(1, abs=.1) and np.isnan(all_.over_untrained_p['slope'])
    again = fault_table(pd.concat([rows('trained', 0), rows('untrained', 0), rows('shuffled', 0)]), 200)
    assert (again[again.fault == 'all'].set_index('measure').over_untrained_p[['order', 'step']] > .05).all()
    assert guessed_steps(rows('trained', 1)) == {'always take-off': 0, 'always flight': .5, 'always entry': .5, 'any step at random': 1/3}


@pytest.mark.parametrize('unknown', [np.nan, 0.])
def test_a_dive_without_true_steps_hits_nothing(unknown):
    "A fault that changes no pixel: `step`, `heat_step`, `booked` and the guesses are those of the other dives; what needs no step counts all"
    rng, n = np.random.default_rng(2), 12
    cost, entry = rng.uniform(3, 25, n), np.arange(n) % 2
    def rows(network):
        steps = {f'{kind}_{i}': 1.*(i == 0)+rng.normal(0, .1, n) for kind in ('step', 'heat') for i in range(3)} # always the take-off, which argmax of NaN is too
        return pd.DataFrame(dict(method='m', network=network, seed=0, uid=[f'{i:02d}' for i in range(n)], fault=np.where(np.arange(n) < 3, 'shape', 'splash'), cost=cost,
                                 fall=cost, true_0=0., true_1=1.-entry, true_2=1.*entry, acts_0=0, acts_1=1-entry, acts_2=entry)|steps)
    answers = pd.concat([rows(name) for name in ('trained', 'untrained', 'shuffled')])
    hidden = answers.uid.isin(['00', '01', '02']) # all that have the fault 'shape'
    odd = answers.assign(**{f'true_{i}': answers[f'true_{i}'].where(~hidden, unknown) for i in range(3)})
    table, rest = (fault_table(frame, 50) for frame in (odd, answers[~hidden]))
    pick = lambda frame, fault: frame[frame.fault == fault].set_index('measure')
    assert pick(table, 'all').trained[['step', 'heat_step']].tolist() == [0, 0] and set(pick(table, 'shape').index) == {'order', 'slope', 'falls', 'acts'}
    assert pick(table, 'all').n[['order', 'acts', 'step', 'booked', 'heat_step']].tolist() == [12, 12, 9, 9, 9]
    measured = ['step', 'booked', 'heat_step']
    pd.testing.assert_frame_equal(pick(table, 'all').loc[measured], pick(rest, 'all').loc[measured])
    assert guessed_steps(odd) == guessed_steps(answers[~hidden]) and guessed_steps(odd)['always take-off'] == 0
    assert np.isnan(guessed_steps(odd[hidden])['always take-off'])
