"Made-up dives and the releases made of them: what the notebooks leave out"
import json,shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from fspn_nb.actor.box_table import read_boxes
from fspn_nb.data.aqa7 import read_aqa7
from fspn_nb.data.finediving import read_finediving
from fspn_nb.data.grammar import final_score,parse_code,step_ids
from fspn_nb.data.mtl_aqa import read_mtl_aqa
from fspn_nb.data.records import check_samples
from fspn_nb.synthetic import release as synth
from fspn_nb.synthetic.catalogue import ACTIONS
from fspn_nb.synthetic.dive_motion import Moments,make_dive
from fspn_nb.synthetic.dive_render import demo_dive,synth_dive
from fspn_nb.synthetic.judging import PRICES,fault_costs
from fspn_nb.synthetic.release import plan_release,release_key,synth_release
from fspn_nb.synthetic.skeleton import SLANT

SMALL = dict(n_train=3, n_test=2, seed=7, size=(64,36))


@pytest.fixture(scope='module')
def release(tmp_path_factory):
    "A finished release of five tiny dives"
    return synth_release(tmp_path_factory.mktemp('synth')/'five', **SMALL)


@pytest.mark.parametrize('action', ACTIONS)
@pytest.mark.parametrize('seed', range(3))
def test_every_action_is_a_dive(action, seed):
    "Labels, transitions, body and score fit together for every type of the catalogue"
    d = synth_dive(seed, action, draw=False)
    n,runs = len(d.labels),np.flatnonzero(np.diff(d.labels))
    assert 80 <= n <= 130 and d.joints.shape == (n,16,2) and np.isfinite(d.joints).all()
    assert tuple(runs) == d.transitions # last frame of the preceding step
    assert [d.labels[0], *d.labels[runs+1]] == list(step_ids(action))
    assert set(d.sub_actions) == set(d.labels.tolist())
    assert d.score == final_score(d.judges, d.difficulty)
    assert d.costs == fault_costs(d.faults) and list(d.faults) == list(PRICES)


@pytest.mark.parametrize('action', ACTIONS)
def test_physics(action):
    "Nobody sinks into the board, the drop is smooth, and everybody enters head first with the given slant"
    d = make_dive(2, action, dict(rotation=.5))
    lift = d.transitions[0]-3
    assert d.joints[:lift,:,1].min() > d.height-.35
    assert d.joints[lift+1:d.touch,:,1].min() > -.2
    steps = np.abs(np.diff(d.joints.mean(1), axis=0))
    assert steps.max() < .9 # metres a frame: no jumps
    head,toes = d.joints[d.touch,0],d.joints[d.touch,14:].mean(0)
    assert head[1] < toes[1] and abs(abs(d.slant)-SLANT/2) < 1e-9
    lean = np.degrees(np.arctan2(abs(head[0]-toes[0]), toes[1]-head[1]))
    assert 10 < lean < 40
    assert d.joints[-1,:,1].max() < 0 # under water at the end


def test_somersaults_are_counted():
    "The head goes round as often as the number says: half turns of the trunk between lift-off and touch"
    for action in ('103b','205b','407c','109c'):
        d = make_dive(0, action, {})
        trunk = d.joints[:,1]-d.joints[:,8:10].mean(1)
        angle = np.unwrap(np.arctan2(trunk[:,0], trunk[:,1]))
        turns = abs(angle[d.touch]-angle[d.transitions[0]-3])/np.pi
        assert abs(turns-parse_code(action).somersaults) < .25, action


def test_looks_do_not_depend_on_faults():
    "Same seed, other faults: same pool, same suit, same boards before the diver moves"
    a,b = (synth_dive(4, '205b', size=(64,36), faults=f) for f in ({}, dict(rotation=1., legs=1., feet=1., shape=1., splash=1.)))
    assert (a.frames[0] == b.frames[0]).all()
    assert (a.frames[a.touch] != b.frames[b.touch]).any()


def test_splash_is_seen():
    "The worse the splash, the more white there is above the water afterwards"
    white = []
    for s in (0., .5, 1.):
        d = synth_dive(9, '407c', size=(128,72), faults=dict(splash=s))
        after = d.frames[d.touch+4:d.touch+14,:,32:96].astype(int)
        white.append(int(((after.min(-1) > 190) & (np.ptp(after, -1) < 40)).sum()))
    assert white[0] < white[1] < white[2]


def test_boxes_hold_the_diver():
    "Joints above water are inside, boxes are inside the frame and never empty"
    for seed in range(25):
        d = synth_dive(seed, draw=False)
        up = (d.joints[:,:,1] > 0)[...,None]
        inside = (d.joints_px >= d.boxes[:,None,:2]-.01) & (d.joints_px <= d.boxes[:,None,2:]+.01)
        assert (inside | ~up).all()
        assert (d.boxes[:,2:] > d.boxes[:,:2]+4).all() and d.boxes.min() >= 0 and (d.boxes[:,2:] <= [256,144]).all()
        flight = d.joints_px[:d.touch+3,:,0]
        assert flight.min() > 56 and flight.max() < 200 # the square in the middle


def test_demo_dive_is_fixed():
    assert demo_dive() is demo_dive()
    assert len(set(demo_dive().labels.tolist())) == 4
    assert all(v > 0 for v in demo_dive().faults.values()) # something of every kind to point at


def test_spread_of_scores():
    "Mean, spread and range of 600 dives are FineDiving's"
    dives = [make_dive(s) for s in range(600)]
    score = np.array([d.score for d in dives])
    per = np.array([d.score/d.difficulty for d in dives])
    assert abs(score.mean()-66.4) < 2.5 and abs(score.std()-15.2) < 2
    assert abs(per.mean()-21.4) < 1 and 3 < per.min() < 12 and 28 < per.max() <= 30
    assert .1 < np.mean([len(d.labels) < 96 for d in dives]) < .3


def test_flight_moments_are_ordered():
    for seed in range(200):
        d = make_dive(seed)
        m = Moments.of(type('T', (), dict(transitions=d.transitions, n=len(d.labels))))
        assert 4 < m.lift < m.folded < m.opening < m.opened < m.touch < len(d.labels)-8


def test_release_reads_back(release):
    "Every field of every dive comes back through the reader of the real release"
    samples = {s.uid:s for s in check_samples(read_finediving(release))}
    plan = plan_release(3, 2, 7)
    assert [s.split for s in samples.values()].count('test') == 2 and len(samples) == 5
    for (video,index),start,seed,split in plan:
        s,d = samples[f'{video}/{index}'],synth_dive(seed, draw=False)
        assert (s.split,s.action,s.score,s.difficulty,s.judges) == (split,d.action,d.score,d.difficulty,d.judges)
        assert s.transitions == d.transitions and list(s.labels) == d.labels.tolist() and s.sub_actions == d.sub_actions
        assert s.start_frame == start and len(s.files) == len(d.labels) and int(s.files[0].split('.')[0]) == start


def test_truth_fits_the_samples(release):
    "One box per frame, keyed by Sample.uid"
    boxes,faults = pd.read_csv(release/'truth/boxes.csv'),pd.read_csv(release/'truth/faults.csv')
    joints = np.load(release/'truth/joints.npz')
    for s in read_finediving(release):
        own = boxes[boxes.uid == s.uid]
        assert own.frame.tolist() == list(range(s.n_frames)) and joints[s.uid].shape == (s.n_frames,16,2)
        assert own.x2.max() <= 64 and own.y2.max() <= 36
    cost = faults[[f'{k}_cost' for k in PRICES]].sum(axis=1)
    assert len(faults) == 5 and cost.between(0, 9).all()


def test_release_is_reused_not_redrawn(release, monkeypatch, capsys):
    monkeypatch.setattr(synth, '_draw_all', lambda *a: pytest.fail('drew a finished release again'))
    assert synth_release(release, **SMALL) == release
    assert 'reused' in capsys.readouterr().out


def test_other_content_is_refused(release):
    with pytest.raises(ValueError, match='choose another folder, or delete'): synth_release(release, **SMALL | dict(seed=8))


def test_changed_code_changes_the_key(monkeypatch):
    before = release_key(3, 2)
    monkeypatch.setattr(synth, '_code', lambda: ['another renderer'])
    assert release_key(3, 2) != before


def test_foreign_folder_is_left_alone(tmp_path):
    (tmp_path/'Annotations').mkdir()
    with pytest.raises(ValueError, match='holds something else'): synth_release(tmp_path, **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ['Annotations']


def test_interrupted_release_leaves_nothing(tmp_path, monkeypatch):
    "A failure half-way leaves neither the release nor a partial copy, and the next call succeeds"
    real,calls = synth.FORMATS['finediving'],[]
    def failing(*args):
        calls.append(1)
        if len(calls) == 3: raise OSError('disk full')
        return real.frames(*args)
    monkeypatch.setitem(synth.FORMATS, 'finediving', replace(real, frames=failing))
    with pytest.raises(OSError, match='disk full'): synth_release(tmp_path/'r', **SMALL)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setitem(synth.FORMATS, 'finediving', real)
    assert json.loads((synth_release(tmp_path/'r', **SMALL)/synth.MARKER).read_text())['train'] == 3


def test_second_to_finish_takes_the_first(tmp_path, release, monkeypatch):
    "If another process finished the same release meanwhile, ours is dropped and theirs is used"
    build = synth._build
    def late(part, *rest): build(part, *rest); shutil.copytree(release, tmp_path/'r')
    monkeypatch.setattr(synth, '_build', late)
    synth_release(tmp_path/'r', **SMALL)
    assert [p.name for p in tmp_path.iterdir()] == ['r']


def test_pool_draws_the_same(tmp_path, release):
    "Two processes write the same bytes as one"
    two = synth_release(tmp_path/'two', **SMALL, workers=2)
    files = lambda r: {str(p.relative_to(r)):p.read_bytes() for p in r.rglob('*') if p.is_file()}
    assert files(two) == files(release)


def test_splits_never_share_a_seed():
    seeds = [{r.seed for r in plan_release(50, 30, s)} for s in range(3)]
    assert all(len(s) == 80 for s in seeds) and not seeds[0] & seeds[1] and not seeds[1] & seeds[2]


@pytest.mark.parametrize('dataset, read, n', [('mtl_aqa', read_mtl_aqa, 5), ('aqa7', read_aqa7, 12)])
def test_the_other_formats_read_back_with_their_truth(tmp_path, dataset, read, n):
    "Every sample is whole, has one box per frame file, and the score that was made up for it"
    small = dict(SMALL, n_train=1, n_test=1) if dataset == 'aqa7' else SMALL
    root = synth_release(tmp_path/'r', dataset, **{k: v for k,v in small.items() if k != 'dataset'})
    samples,boxes = check_samples(read(root)),read_boxes(root/'truth/boxes.csv')
    faults = pd.read_csv(root/'truth/faults.csv').set_index('uid')
    fmt,jobs = synth.FORMATS[dataset],plan_release(small['n_train'], small['n_test'], small['seed'], dataset)
    made = {fmt.uid(job): fmt.make(job, (64,36), False) for job in jobs}
    assert len(samples) == n and set(boxes) == set(faults.index) == {s.uid for s in samples} == set(made)
    for s in samples:
        assert len(s.files) == 103 and boxes[s.uid].shape == (103,4) and s.score == pytest.approx(made[s.uid].score)
        cost = faults.loc[s.uid, [c for c in faults if c.endswith('_cost')]].astype(float).sum()
        assert cost == pytest.approx(sum(made[s.uid].costs.values()), abs=.01)


def test_mtl_window_is_the_same_by_number_and_by_position(tmp_path):
    "The peers count back in the sorted list of a broadcast's frames; a gapless release gives them our frames"
    root = synth_release(tmp_path/'r', 'mtl_aqa', **{k: v for k,v in SMALL.items() if k != 'dataset'})
    for s in read_mtl_aqa(root):
        listed = sorted(p.name for p in s.folder.iterdir())
        assert tuple(listed[s.end_frame-103:s.end_frame]) == s.files and len(s.before) == len(s.after) == 3
