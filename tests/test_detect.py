"Actor boxes: candidates, the path through them, the cache, and what real frames say"
import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fspn_nb.actor.best_path import best_path,main_actor,nms
from fspn_nb.actor.detectors import get_detector
from fspn_nb.actor.motion_boxes import motion_boxes
from fspn_nb.actor.track import box_file,box_quality,detect_boxes,fallback_line,video_boxes
from fspn_nb.actor.yolox import Onnx,decode_cells,grid_cells,letterbox
from fspn_nb.data.records import Sample
from fspn_nb.file_hashes import frame_hashes
from fspn_nb.synthetic.dive_render import synth_dive

SIZE = (144,256)
NONE = np.zeros((0,5))
ROOT = Path(__file__).resolve().parents[1]
onnxruntime = pytest.mark.skipif(not importlib.util.find_spec('onnxruntime'), reason="onnxruntime absent (pip install 'fspn_nb[onnx]')")


def falling(n=20, x=128., score=.5, side=(16.,30.)):
    "One candidate per frame, falling through the middle"
    return [np.array([[x-side[0]/2,30+3*t,x+side[0]/2,30+3*t+side[1],score]]) for t in range(n)]


# decoding

def test_decoding_a_hand_made_output():
    rows = np.zeros((21,6), np.float32)
    rows[20] = [.25,.5,0,np.log(.5),.5,.5] # the one cell of stride 32
    rows[3] = [0,0,0,0,.9,.01] # no person
    np.testing.assert_allclose(decode_cells(rows, 32), [[8-16,16-8,8+16,16+8,.25]], atol=1e-5)


def test_cells_follow_the_rows_of_the_output():
    cells = grid_cells(64)
    assert len(cells) == 64+16+4 and cells[8].tolist() == [0,1,8] and cells[-1].tolist() == [1,1,32]


@pytest.mark.parametrize('h,w', [(256,455),(455,256),(30,30)])
def test_letterbox_and_back(h, w):
    x,r = letterbox(torch.full((h,w,3), 7, dtype=torch.uint8), 64)
    assert x.shape == (1,3,64,64) and max(h,w)*r == pytest.approx(64)
    assert (x < 8).sum() == 3*round(h*r)*round(w*r)


def test_doubles_go_and_the_best_stays():
    a = np.array([[0,0,10,10,.3],[1,0,11,10,.8],[40,0,50,10,.1]])
    assert nms(a)[:, 4].tolist() == [.8,.1]


# which candidate

def test_a_flashing_spectator_does_not_distract():
    film = falling()
    for t in (4,9,10): film[t] = np.concatenate([[[20.,20,36,50,.99]], film[t]])
    assert best_path(film, SIZE).tolist() == [1 if t in (4,9,10) else 0 for t in range(20)]


def test_a_steady_judge_at_the_edge_is_not_the_actor():
    film = [np.concatenate([[[5.,100,21,130,.9]], c]) for c in falling()]
    assert (best_path(film, SIZE) == 1).all()


def test_a_gap_is_bridged_on_the_straight_line():
    film = falling()
    truth = np.stack([c[0,:4] for c in film])
    film[7] = film[8] = film[9] = NONE
    boxes,code = main_actor(film, SIZE)
    np.testing.assert_allclose(boxes, truth)
    assert np.flatnonzero(code == 'carried').tolist() == [7,8,9] and not (code == 'whole').any()


def test_both_ends_are_carried_then_given_up():
    boxes,code = main_actor([NONE]*5+falling(3)+[NONE]*5, SIZE, carry=3)
    assert code.tolist() == ['whole']*2+['carried']*3+['']*3+['carried']*3+['whole']*2
    assert boxes[0].tolist() == [0,0,256,144] and (boxes[2] == boxes[5]).all() and (boxes[10] == boxes[7]).all()


def test_nobody_is_the_whole_frame():
    boxes,code = main_actor([NONE]*4, SIZE)
    assert (code == 'whole').all() and (boxes == [0,0,256,144]).all()
    assert len(main_actor([], SIZE)[0]) == 0


def test_two_actors_are_one_box_even_when_one_is_missed():
    film = [np.concatenate([a,b]) for a,b in zip(falling(x=118.), falling(x=140., score=.4))]
    film[6] = film[6][:1]
    boxes,code = main_actor(film, SIZE, actors=2)
    np.testing.assert_allclose(boxes[:, [0,2]], [[110,148]]*20)
    assert np.flatnonzero(code != '').tolist() == [6]
    np.testing.assert_allclose(main_actor(film, SIZE)[0][:, [0,2]], [[110,126]]*20)


def test_a_judge_is_no_second_actor():
    film = [np.concatenate([[[5.,100,21,130,.9]], c]) for c in falling()]
    np.testing.assert_array_equal(main_actor(film, SIZE, actors=2)[0], main_actor(film, SIZE)[0])


# motion

def test_motion_beats_the_whole_frame_on_dives():
    for seed in (200,201):
        dive = synth_dive(seed)
        motion = box_quality(video_boxes(dive.frames, get_detector('motion'))[0], dive.boxes)
        whole = box_quality(np.tile([0,0,256,144], (len(dive.boxes), 1)), dive.boxes)
        assert motion['iou'] > whole['iou'] and motion['over_50'] > .5, seed


@pytest.mark.parametrize('frames', [np.zeros((1,144,256,3), np.uint8), np.full((9,144,256,3), 200, np.uint8), np.zeros((2,40,17,3), np.uint8),
                                    np.random.default_rng(0).integers(0, 256, (8,60,80,3)).astype(np.uint8)], ids=['one frame','grey','narrow','noise'])
def test_motion_of_odd_films(frames):
    candidates = motion_boxes(frames)
    assert len(candidates) == len(frames) and all(c.shape[1] == 5 and np.isfinite(c).all() for c in candidates)
    boxes,_ = video_boxes(frames, get_detector('motion'))
    assert boxes.shape == (len(frames),4) and (boxes[:, 2:] > boxes[:, :2]).all()


def test_motion_is_repeatable():
    frames = synth_dive(203).frames[:20]
    for a,b in zip(motion_boxes(frames), motion_boxes(torch.from_numpy(frames))): np.testing.assert_array_equal(a, b)


# the cache

class Counting:
    name = 'counting'
    def __init__(self, key='counting-1'): self.key,self.calls = key,0
    def __call__(self, frames):
        self.calls += 1
        return falling(len(frames))


@pytest.fixture
def dives(tmp_path):
    "Two dives with frame files, and a loader that needs none of their content"
    samples = []
    for uid,n in (('01/1',12),('01/2',7)):
        folder = tmp_path/uid
        folder.mkdir(parents=True)
        files = tuple(f'{i:05d}.jpg' for i in range(n))
        for f in files: (folder/f).write_bytes(b'x')
        samples.append(Sample(uid, 'train', '107b', 50., folder=folder, files=files))
    return samples,(lambda sample,ids: np.zeros((len(ids),144,256,3), np.uint8)),tmp_path/'boxes'


def test_second_run_calls_nothing(dives):
    samples,load,folder = dives
    one,two = Counting(),Counting()
    first,report = detect_boxes(samples, one, folder, load=load)
    second,again = detect_boxes(samples, two, folder, load=lambda *a: pytest.fail('frames were read'))
    assert (one.calls,two.calls) == (2,0) and (report['detected'],again['detected']) == (2,0)
    for uid in first: np.testing.assert_array_equal(first[uid], second[uid])
    assert first['01/1'].shape == (12,4) and again['frames'] == 19
    assert fallback_line(report) == fallback_line(again)


def test_hashes_at_hand_are_not_computed_again(dives, monkeypatch):
    "As `prepare` does it: 300,000 files are asked for their state once; the boxes are those of the same names"
    samples,load,folder = dives
    first,_ = detect_boxes(samples, Counting(), folder, load=load)
    hashes = frame_hashes(samples)
    monkeypatch.setattr('fspn_nb.actor.track.frame_hashes', lambda samples: pytest.fail('files were asked again'))
    again,report = detect_boxes(samples, Counting(), folder, load=load, hashes=hashes)
    assert report['detected'] == 0 and all((again[uid] == first[uid]).all() for uid in first)
    hashes[samples[0].uid] = 'changed'
    assert detect_boxes(samples, Counting(), folder, load=load, hashes=hashes)[1]['detected'] == 1


def test_another_key_or_setting_is_computed(dives):
    samples,load,folder = dives
    detect_boxes(samples, Counting(), folder, load=load)
    for detector,kw in ((Counting('counting-2'),{}),(Counting(),dict(actors=2)),(Counting(),dict(every=3))):
        assert detect_boxes(samples, detector, folder, load=load, **kw)[1]['detected'] == 2


def test_a_changed_frame_is_noticed(dives):
    samples,load,folder = dives
    detect_boxes(samples, Counting(), folder, load=load)
    (samples[0].folder/'00003.jpg').write_bytes(b'another')
    assert detect_boxes(samples, Counting(), folder, load=load)[1]['detected'] == 1
    (samples[0].folder/'00003.jpg').unlink()
    with pytest.raises(FileNotFoundError, match='00003.jpg'): box_file(samples[0], Counting())


@pytest.mark.parametrize('damage', [b'', b'PK\x03\x04 cut short', b'no archive'])
def test_a_damaged_file_is_computed_anew(dives, damage):
    samples,load,folder = dives
    good,_ = detect_boxes(samples, Counting(), folder, load=load)
    for f in folder.iterdir(): f.write_bytes(damage)
    again,report = detect_boxes(samples, Counting(), folder, load=load)
    assert report['detected'] == 2
    np.testing.assert_array_equal(good['01/2'], again['01/2'])


def test_nothing_is_left_half_written(dives):
    samples,load,folder = dives
    detect_boxes(samples, Counting(), folder, load=load)
    assert sorted(f.suffix for f in folder.iterdir()) == ['.npz','.npz']


def test_fall_backs_are_counted(dives):
    samples,load,folder = dives
    class Late(Counting):
        def __call__(self, frames): return [NONE]*4+falling(len(frames)-4)
    _,report = detect_boxes(samples, Late('late-1'), folder, load=load)
    assert report['carried'] == pytest.approx(8/19) and report['whole'] == 0
    class Blind(Counting):
        def __call__(self, frames): return [NONE]*len(frames)
    _,report = detect_boxes(samples, Blind('blind-1'), folder, load=load)
    assert report['whole'] == 1 and '01/1' in fallback_line(report)
    assert detect_boxes([], Blind(), folder)[1]['frames'] == 0


def test_keys_tell_detectors_apart(tmp_path):
    torch.manual_seed(0)
    a = get_detector('ssd300', None)
    state = a.net.state_dict()
    state['backbone.features.0.bias'][0] += 1
    torch.save({'model':state}, tmp_path/'ssd.pth')
    b = get_detector('ssd300', str(tmp_path/'ssd.pth'))
    assert len({a.key, b.key, get_detector('motion').key}) == 3
    assert (a.name,b.name) == ('ssd300 (random weights)','ssd300')
    assert b(np.zeros((1,144,256,3), np.uint8))[0].shape[1] == 5


# bad weights

class Trap:
    def __reduce__(self): return print,('code ran',)


@pytest.mark.parametrize('content', [b'', b'text', b'PK\x03\x04'+bytes(50)], ids=['empty','text','archive'])
def test_bad_ssd_checkpoint(tmp_path, content):
    (tmp_path/'w.pth').write_bytes(content)
    with pytest.raises(ValueError, match='w.pth'): get_detector('ssd300', str(tmp_path/'w.pth'))


def test_a_checkpoint_runs_no_code(tmp_path, capsys):
    torch.save({'model':Trap()}, tmp_path/'w.pth')
    with pytest.raises(ValueError, match='w.pth'): get_detector('ssd300', str(tmp_path/'w.pth'))
    torch.save([1], tmp_path/'w.pth')
    with pytest.raises(ValueError, match='need a dict of tensors'): get_detector('ssd300', str(tmp_path/'w.pth'))
    assert 'code ran' not in capsys.readouterr().out


@onnxruntime
@pytest.mark.parametrize('content', [b'', b'text', bytes(1000)], ids=['empty','text','zeros'])
def test_bad_onnx_file(tmp_path, content):
    (tmp_path/'w.onnx').write_bytes(content)
    with pytest.raises(ValueError, match='w.onnx'): get_detector('onnx', str(tmp_path/'w.onnx'))


@onnxruntime
def test_a_cut_onnx_file_is_one_error(shared, tmp_path):
    data = shared('weights','yolox_nano.onnx').read_bytes()
    rng = np.random.default_rng(0)
    for n in rng.integers(1, len(data), 6):
        (tmp_path/'w.onnx').write_bytes(data[:n])
        with pytest.raises(ValueError, match='w.onnx'): Onnx(tmp_path/'w.onnx')


class FakeSession:
    "A network with a given input shape and output"
    def __init__(self, shape, out): self.shape,self.out = shape,out
    def get_inputs(self): return [self]
    name = 'images'
    def run(self, names, feed, options=None): return [self.out]


@pytest.mark.parametrize('out,why', [(np.zeros((1,100,85)),'need an output'),(np.zeros((1,21,5)),'need an output'),(np.full((1,21,85), -3.),'need scores'),
                                     (np.full((1,21,85), np.nan),'need scores'),(np.concatenate([np.full((1,21,4), 40.),np.zeros((1,21,81))], 2),'decodes inside')])
def test_foreign_outputs_are_refused(out, why):
    from fspn_nb.actor.yolox import _raw
    with pytest.raises(ValueError, match=why): _raw(FakeSession([1,3,32,32], out), torch.zeros(1, 3, 32, 32), 'w.onnx')


@pytest.mark.parametrize('classes,reads', [(80,True),(1,True),(20,False),(91,False),(2,False)], ids=['COCO','people alone','VOC','SSD','two'])
def test_a_network_whose_person_is_unknown_is_refused(classes, reads):
    "The first class of Pascal VOC is an aeroplane"
    from fspn_nb.actor.yolox import _raw
    out = np.zeros((1,21,5+classes), np.float32)
    if reads: assert _raw(FakeSession([1,3,32,32], out), torch.zeros(1, 3, 32, 32), 'w.onnx').shape == (21,5+classes)
    else:
        with pytest.raises(ValueError, match=f'w.onnx: need the 80 classes of COCO.*got {classes};'): _raw(FakeSession([1,3,32,32], out), torch.zeros(1, 3, 32, 32), 'w.onnx')


def test_a_network_that_never_finds_anybody_stops_the_run(dives, monkeypatch):
    "As with a file that expects other input: the crops would be whole frames"
    from fspn_nb.actor import boxes
    samples,load,folder = dives
    samples = [*samples, replace(samples[0], uid='01/3')]
    monkeypatch.setattr(boxes, 'detect_boxes', lambda group, detector, actors, hashes: detect_boxes(group, detector, folder, actors, load=load))
    class Blind(Counting):
        def __call__(self, frames): return [NONE]*len(frames)
    with pytest.raises(ValueError, match='need people in 3 dives, and counting found nobody in 31 frames; take other weights'): boxes._detected(samples, Blind('blind-2'))
    assert '100.0% whole frame' in boxes._detected(samples[:2], Blind('blind-2'))[1][0] # two hard dives are possible
    assert len(boxes._detected(samples, Counting())[0]) == 3


def test_ssd_weights_of_a_training_run(tmp_path):
    "From several GPUs, beside the optimiser, parsed arguments and a score of numpy, as torchvision's script saves it"
    from argparse import Namespace
    from fspn_nb.actor.detectors import _state_dict
    state = {'module.backbone.bias': torch.arange(3.)}
    for i,wrapped in enumerate((state, {'model': state, 'args': Namespace(lr=.1), 'epoch': 3, 'map': np.float64(.5)}, {'state_dict': state})):
        torch.save(wrapped, tmp_path/f'{i}.pth')
        assert _state_dict(tmp_path/f'{i}.pth')['backbone.bias'].tolist() == [0,1,2]
    torch.save({'backbone.bias': torch.tensor([1., np.nan])}, tmp_path/'nan.pth')
    with pytest.raises(ValueError, match='nan.pth: need finite numbers, got others in 1 tensors .backbone.bias'): _state_dict(tmp_path/'nan.pth')
    torch.save(torch.nn.Linear(1, 1), tmp_path/'whole.pth')
    with pytest.raises(ValueError, match=r'whole.pth.*it asks for torch.nn.modules.linear.Linear\).*save model.state_dict'): _state_dict(tmp_path/'whole.pth')


def test_unknown_names_and_missing_files():
    with pytest.raises(ValueError, match='ssd300, motion, onnx'): get_detector('retina')
    with pytest.raises(ValueError, match='needs the path'): get_detector('onnx')
    for source in ('onnx','ssd300'):
        with pytest.raises(FileNotFoundError, match='nowhere'): get_detector(source, 'nowhere')


# real frames

def real(shared):
    "Frames and boxes of the two annotated dives"
    from PIL import Image
    table,folder = pd.read_csv(shared('data','actor_frames','boxes.csv')),shared('data','actor_frames','images')
    return [(np.stack([np.asarray(Image.open(folder/f).convert('RGB')) for f in g.image]),g[['x1','y1','x2','y2']].to_numpy()) for _,g in table.groupby('dive')]


def on_real(shared, detector):
    films = real(shared)
    boxes = np.concatenate([video_boxes(f, detector)[0] for f,_ in films])
    return box_quality(boxes, np.concatenate([b for _,b in films]))


@pytest.mark.shared
@onnxruntime
def test_onnx_on_real_frames(shared):
    q = on_real(shared, get_detector('onnx', str(shared('weights','yolox_nano.onnx'))))
    assert q['over_50'] > .77 and q['over_30'] > .95


@pytest.mark.shared
def test_motion_on_real_frames(shared):
    q = on_real(shared, get_detector('motion'))
    assert q['over_50'] > .8 and q['over_30'] > .95


def test_the_committed_table_has_every_detector():
    table = pd.read_csv(ROOT/'reports'/'actor'/'detectors.csv')
    assert {'real','dives','acts'} == set(table.set) and {'motion','whole frame'} <= set(table.detector) and (table.seconds >= 0).all()
    best = table.dropna(subset='over_50').pivot(index='set', columns='detector', values='over_50')
    assert (best['motion'] > best['whole frame']).all() and best.loc['dives','motion'] > .5
