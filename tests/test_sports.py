"Made-up acts of AQA-7's six classes: what the notebooks leave out"

import numpy as np
import pytest

from fspn_nb.protocols import SPORTS
from fspn_nb.synthetic.big_air_motion import air_flight,snow
from fspn_nb.synthetic.pair_motion import make_pair
from fspn_nb.synthetic.sport_plans import FAULTS,TRICKS,VAULTS,plan_act
from fspn_nb.synthetic.sport_render import Act,synth_act
from fspn_nb.synthetic.vault_motion import FPS,vault_flight

PAIRS = ('sync_diving_3m','sync_diving_10m')
SNOW = ('ski_big_air','snowboard_big_air')
SMALL = (64,36)
sports = pytest.mark.parametrize('sport', SPORTS)


def fields(act):
    "Everything but the frames"
    return {k:getattr(act, k) for k in Act.__dataclass_fields__ if k != 'frames'}


@sports
def test_same_bytes_twice_and_blind(sport):
    "The same seed gives the same bytes; without frames everything else is the same"
    a,b,blind = synth_act(5, sport, SMALL),synth_act(5, sport, SMALL),synth_act(5, sport, SMALL, draw=False)
    assert a.frames.tobytes() == b.frames.tobytes() and blind.frames is None
    for k,v in fields(a).items():
        for other in (b,blind):
            if isinstance(v, np.ndarray): np.testing.assert_array_equal(v, getattr(other, k), err_msg=k)
            else: assert v == getattr(other, k), k


@sports
def test_shapes(sport):
    a,n = synth_act(2, sport, SMALL),2 if sport in PAIRS else 1
    assert a.frames.shape == (103,36,64,3) and a.frames.dtype == np.uint8
    assert a.joints.shape == (103,n,16,2) == a.joints_px.shape and a.depth.shape == (103,n,16)
    assert a.athlete_boxes.shape == (103,n,4) and a.boxes.shape == (103,4) and a.boxes.dtype == np.float32
    assert list(a.faults) == list(a.costs) == list(FAULTS[sport])
    assert len(a.judges) == dict(diving=7, sync_diving_3m=11, sync_diving_10m=11).get(sport, 5)
    assert synth_act(2, sport).frames.shape == (103,144,256,3)


@sports
def test_scores_lie_in_the_range(sport):
    "200 seeds: inside the literature's range, over a good part of it, and all sorts of acts"
    acts,rule = [plan_act(s, sport) for s in range(200)],SPORTS[sport]
    score = np.array([a.score for a in acts])
    assert rule.lo <= score.min() and score.max() <= rule.hi
    assert np.ptp(score) > .6*(rule.hi-rule.lo) and score.std() > .12*(rule.hi-rule.lo)
    assert all(0 <= v <= 1 for a in acts for v in a.faults.values())
    assert len({a.name for a in acts}) >= min(8, len(VAULTS), len(TRICKS))


@sports
def test_draw_false_agrees_with_the_plan(sport):
    for s in range(200):
        a,p = synth_act(s, sport, draw=False),plan_act(s, sport)
        assert (a.score,a.judges,a.faults,a.name) == (p.score,p.judges,p.faults,p.name)
        assert np.isfinite(a.boxes).all() and np.isfinite(a.joints).all()


@pytest.mark.parametrize('sport,fault', [(s,f) for s in SPORTS for f in FAULTS[s]])
def test_each_fault_costs_and_shows(sport, fault):
    "The score never rises with a severity and ends lower; the pixels change; nothing else is billed"
    falls = 0
    for seed in range(4):
        score = [plan_act(seed, sport, {fault:v}).score for v in (0.,.25,.5,.75,1.)]
        assert all(b <= a for a,b in zip(score, score[1:])), (seed, score)
        falls += score[-1] < score[0]
    assert falls >= 3 # half points may hide a small fault in a single draw
    bill = plan_act(0, sport, {fault:.5}).costs
    assert [k for k,v in bill.items() if v] == [fault] and bill[fault] == FAULTS[sport][fault]/2
    a,b = synth_act(0, sport, (128,72), faults={}),synth_act(0, sport, (128,72), faults={fault:1.})
    assert (a.frames != b.frames).any(axis=(1,2,3)).sum() >= 5, 'frames that differ'
    assert (a.frames[0] == b.frames[0]).mean() > .97 # the scene is the same


@sports
def test_given_faults_reproduce_the_act(sport):
    "The drawn severities, passed by hand, give the same act: nothing hides in the draw"
    for seed in range(30):
        a = plan_act(seed, sport)
        assert plan_act(seed, sport, a.faults) == a


@sports
def test_boxes(sport):
    "Inside the frame, not empty, around all joints that can be seen; the common box is the union"
    for seed in range(15):
        a = synth_act(seed, sport, draw=False)
        box,(w,h) = a.athlete_boxes,(256,144)
        assert box.min() >= 0 and (box[...,2:] <= [w,h]).all() and (box[...,2:] > box[...,:2]+3).all(), seed
        np.testing.assert_array_equal(a.boxes, np.concatenate([box[...,:2].min(1), box[...,2:].max(1)], -1))
        p = a.joints_px
        seen = (p >= 0).all(-1) & (p <= [w,h]).all(-1) & ((a.joints[...,1] > 0) | (not sport.endswith(('diving','m'))))
        inside = ((p >= box[:,:,None,:2]-.01) & (p <= box[:,:,None,2:]+.01)).all(-1)
        assert (inside | ~seen).all(), seed
        assert ((p >= 0) & (p <= [w,h])).all(-1)[:60].mean() > .97, 'the camera keeps the athletes in the picture'


def test_vaults_are_possible():
    "Ballistic between contacts, no jumps, never deep in the floor, upright at the landing unless it failed"
    for seed in range(60):
        plan = plan_act(seed, 'gym_vault')
        f = vault_flight(plan)
        air = slice(int(f.lift)+1, int(f.land))
        aside = .5*plan.faults['line']*np.clip((np.arange(103)-f.lift)/(f.land-f.lift), 0, 1)
        np.testing.assert_allclose(np.diff(f.center[air,1]+aside[air], 2)*FPS**2, -9.81, atol=1e-6)
        assert np.hypot(*np.diff(f.center, axis=0).T).max() < .3
        assert f.joints[:int(f.lift),:,1].min() > -.02 and f.joints[...,1].min() > -.52
        assert 60 < f.land < 90 and 2.3 < f.center[:,1].max() < 3.3
        head,toes = f.joints[int(f.land)+1,0,1],f.joints[int(f.land)+1,14:,1].mean()
        assert head > toes+.4


def test_runs_are_possible():
    "Ballistic over the gap, on the snow elsewhere, through it nowhere"
    for seed in range(60):
        for sport in SNOW:
            f = air_flight(plan_act(seed, sport))
            air = slice(int(f.lift)+1, int(np.ceil(f.land)))
            np.testing.assert_allclose(np.diff(f.center[air,1], 2)*FPS**2, -9.81, atol=1e-6)
            assert np.hypot(*np.diff(f.center, axis=0).T).max() < .7
            above = f.joints[...,1]-snow(f.joints[...,0])
            assert above.min() > -.1, (sport,seed)
            assert above[:int(f.lift)-1].min(1).max() < .12 and above[int(f.land)+1:].min(1).max() < .12
            assert above[int(f.lift+f.land)//2].min() > .5


def test_amplitude_is_seen():
    "Less amplitude: shorter and lower"
    for sport in SNOW:
        high,low = (air_flight(plan_act(1, sport, dict(amplitude=v))) for v in (0.,1.))
        assert high.land-high.lift > low.land-low.lift+8 and high.center[:,1].max() > low.center[:,1].max()+.3


@pytest.mark.parametrize('sport', PAIRS)
def test_pairs(sport):
    "Two bodies, the nearer one larger and to the right; out of time only if they should be"
    a = synth_act(3, sport, draw=False, faults={})
    tall = np.ptp(a.joints_px[0,:,:,1], axis=-1)
    assert tall[0] > tall[1] and (a.joints_px[:40,0,:,0].mean(1) > a.joints_px[:40,1,:,0].mean(1)).all()
    touch = lambda f: np.diff([d.touch for d in make_pair(plan_act(3, sport, f))])[0]
    assert touch({}) == 0 and abs(touch(dict(sync=.4))) == 2 and abs(touch(dict(sync=1.))) == 5
    for seed in range(30): assert all(d.height == (3 if '3m' in sport else 10) for d in make_pair(plan_act(seed, sport)))


def test_single_dives_are_from_the_platform():
    for seed in range(40):
        d, = make_pair(plan_act(seed, 'diving'))
        assert d.height == 10 and len(d.joints) == 103 and 30 < d.touch < 100


@sports
def test_looks_do_not_tell(sport):
    "Looks vary with the seed, and do not change with the faults: the first frame is the same"
    bad = {k:1. for k in FAULTS[sport] if not k.startswith('sync')}
    a,b = synth_act(6, sport, SMALL, faults={}),synth_act(6, sport, SMALL, faults=bad)
    if sport in SNOW or sport == 'gym_vault': np.testing.assert_array_equal(a.frames[0], b.frames[0])
    assert (np.abs(a.frames[0].astype(int)-b.frames[0]) > 20).mean() < .03
    assert len({synth_act(s, sport, SMALL).frames[0].tobytes() for s in range(6)}) == 6
