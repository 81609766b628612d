"Tables of actor boxes from other tools: other sizes, shares, separators, frame numbers, names"
import numpy as np
import pandas as pd
import pytest
import torch

from fspn_nb.actor.box_table import read_boxes,require_dives
from fspn_nb.actor.boxes import load_actor_boxes
from fspn_nb.config import ActorCfg
from fspn_nb.data.finediving import read_finediving
from fspn_nb.data.records import Release
from fspn_nb.synthetic.release import synth_release

CORNERS = ['x1','y1','x2','y2']
SIZE = (144,256) # height, width


@pytest.fixture(scope='session')
def made(tmp_path_factory):
    "A synthetic release of six dives, 256 x 144"
    root = synth_release(tmp_path_factory.mktemp('boxes')/'six', n_train=4, n_test=2, size=(256,144), workers=1)
    return Release(tuple(read_finediving(root)), 'synthetic', root)


@pytest.fixture(scope='session')
def truth(made):
    "Its true boxes, as the table stands on disk"
    return pd.read_csv(made.root/'truth'/'boxes.csv', dtype={'uid':str})


@pytest.fixture
def load(made, tmp_path):
    "A function: boxes of the release from a changed table, and the lines for the log"
    def run(table, **csv):
        table.to_csv(tmp_path/'boxes.csv', index=False, **csv)
        _,boxes,messages = load_actor_boxes(made, ActorCfg(source='boxes', boxes=str(tmp_path/'boxes.csv')))
        return boxes,messages
    return run


def scaled(table, x, y, **stated): return table.assign(x1=table.x1*x, y1=table.y1*y, x2=table.x2*x, y2=table.y2*y, **stated)


# ---- other units

FOREIGN = { # what it was measured on: (factor of x, of y, the error without the two columns)
    '640x360': (640/256, 360/144, r'frames of 256x144 \(6 of 6 dives reach beyond'), '455x256': (455/256, 256/144, 'dives reach beyond'),
    'shares': (1/256, 1/144, 'shares of the picture.*width,height with 1,1'), '128x72': (.5, .5, 'upper left part: measured on a smaller picture'),
    '112x112': (112/256, 112/144, 'dives reach|upper left|$'), 'thousandths': (1000/256, 1000/144, 'dives reach beyond'), 'per cent': (100/256, 100/144, 'upper left part')}


@pytest.mark.parametrize('what', FOREIGN)
def test_boxes_measured_on_other_pictures(load, truth, made, what):
    "Refused with both sizes as they come; with the stated size they are the boxes of the frames"
    x,y,why = FOREIGN[what]
    right,_ = load_actor_boxes(made, ActorCfg())[1:]
    if what != '112x112': # x within 44 %, y within 65 %
        with pytest.raises(ValueError, match=why) as e: load(scaled(truth, x, y))
        assert 'boxes.csv' in str(e.value) and '256x144' in str(e.value) and 'width,height' in str(e.value) and len(str(e.value)) < 500
    boxes,messages = load(scaled(truth, x, y, width=256*x, height=144*y))
    for uid in right: np.testing.assert_allclose(boxes[uid], right[uid], atol=1e-6)
    assert len(messages) == 1 and ('measured on 1x1' if what == 'shares' else f'measured on {256*x:g}x{144*y:g}') in messages[0]
    assert ('other proportions' in messages[0]) == (what in ('112x112','thousandths','per cent'))


def test_boxes_as_they_should_be(load, truth, made):
    boxes,messages = load(truth)
    right = load_actor_boxes(made, ActorCfg())[1]
    assert all(np.array_equal(boxes[uid], right[uid]) for uid in right)
    assert messages[0].startswith('actor boxes of boxes.csv: 6 dives, x ') and messages[0].endswith(' on frames of 256x144, taken as pixels of the frames')


def test_the_truth_of_a_synthetic_release_is_checked_too(made, truth, tmp_path):
    scaled(truth, 2.5, 2.5).to_csv(tmp_path/'boxes.csv', index=False)
    folder = tmp_path/'truth'
    folder.mkdir()
    (tmp_path/'boxes.csv').rename(folder/'boxes.csv')
    with pytest.raises(ValueError, match='dives reach beyond'): load_actor_boxes(Release(made.samples, 'synthetic', tmp_path), ActorCfg())


def test_one_dive_of_another_size_is_found(load, truth):
    uid = truth.uid.iloc[0]
    odd = truth.uid == uid
    with pytest.raises(ValueError, match=rf'got dive {uid} with x .* \(1 of 6 dives reach beyond'):
        load(pd.concat([scaled(truth[odd], 2.5, 2.5), truth[~odd]]))
    boxes,_ = load(pd.concat([scaled(truth[odd], 2.5, 2.5, width=640, height=360), truth[~odd].assign(width=256, height=144)]))
    assert boxes[uid].max() < 256


def test_a_wrong_statement_is_found(load, truth):
    with pytest.raises(ValueError, match='on the stated picture and frames of 256x144.*correct width,height'): load(scaled(truth, 2.5, 2.5, width=320, height=180))
    with pytest.raises(ValueError, match='width and height above 0'): load(truth.assign(width=0, height=144))
    with pytest.raises(ValueError, match='one of width,height alone'): load(truth.assign(width=256))


def test_the_frames_own_size_says_that_the_boxes_are_right(load, truth):
    "A camera that never moves, and all that is of interest in the upper left"
    small = scaled(truth, .5, .5)
    with pytest.raises(ValueError, match='or with that of the frames if they are right'): load(small)
    assert load(small.assign(width=256, height=144))[0]


@pytest.mark.shared
def test_real_boxes_pass_and_foreign_ones_do_not(shared, tmp_path):
    "Boxes of the two annotated dives, around joints and 10 % more: up to 7 % over the edge of frames of 455 x 256"
    real = pd.read_csv(shared('data','actor_frames','boxes.csv')).rename(columns={'dive':'uid'})
    real['frame'] = real.groupby('uid').cumcount()
    sizes,path = {'0':(256,455), '1':(256,455)},tmp_path/'b.csv'
    def read(table): table.to_csv(path, index=False); return read_boxes(path, sizes)
    right = read(real)
    assert min(x.min() for x in right.values()) < -17
    for x,y in ((640/455,360/256),(1280/455,720/256),(1/455,1/256),(256/455,144/256),(320/455,180/256),(100/455,100/256)):
        with pytest.raises(ValueError, match='455x256'): read(scaled(real, x, y))
        again = read(scaled(real, x, y, width=455*x, height=256*y))
        for uid in right: np.testing.assert_allclose(again[uid], right[uid], atol=1e-9)


# ---- other tables

@pytest.mark.parametrize('csv', [dict(sep=';'), dict(sep='\t'), dict(sep='|'), dict(sep=';', decimal=','), dict(encoding='utf-8-sig'), dict(lineterminator='\r\n'), dict(quoting=1)], ids=str)
def test_separators_that_are_not_in_doubt(load, truth, csv):
    boxes,_ = load(truth)
    again,_ = load(truth, **csv)
    assert all(np.array_equal(boxes[uid], again[uid]) for uid in boxes)


def test_order_case_and_further_columns(load, truth):
    boxes,_ = load(truth)
    other = truth.assign(score=.9)[['y2','score','x2','frame','y1','x1','uid']].rename(columns=lambda name: f' {name.upper()}')
    assert all(np.array_equal(boxes[uid], x) for uid,x in load(other.sample(frac=1, random_state=0))[0].items())


def test_headers_that_fit_none_are_shown(load, truth, tmp_path):
    boxed = truth.assign(x=truth.x1, y=truth.y1, w=truth.x2-truth.x1, h=truth.y2-truth.y1)[['uid','frame','x','y','w','h']]
    with pytest.raises(ValueError, match=r"got the header 'uid,frame,x,y,w,h': none named x1, y1, x2, y2; .*x2 = x\+w"): load(boxed)
    with pytest.raises(ValueError, match=r"got the header 'uid;frame;x;y;w;h'"): load(boxed, sep=';')
    with pytest.raises(ValueError, match='got the header .*none named uid'): load(truth.rename(columns={'uid':'video'}))
    with pytest.raises(ValueError, match='two named x1'): load(truth.assign(X1=truth.x1))
    (tmp_path/'b.csv').write_bytes(truth.to_csv(index=False).encode('utf-16'))
    with pytest.raises(ValueError, match=r'in UTF-8.*save it as CSV \(UTF-8\)'): read_boxes(tmp_path/'b.csv')


def test_corner_and_size_under_the_names_of_corners(load, truth):
    wrong = truth.assign(x2=truth.x2-truth.x1, y2=truth.y2-truth.y1)
    with pytest.raises(ValueError, match=r'need x1 < x2 .*x2 = x\+width'): load(wrong)


def test_decimal_commas_between_commas_shift_nothing(tmp_path):
    "Pandas alone would take the first fields for row names"
    path = tmp_path/'b.csv'
    path.write_text('uid,frame,x1,y1,x2,y2\n'+''.join(f'a,{i},10,5,20,5,30,5,40,5\n' for i in range(3)))
    with pytest.raises(ValueError, match='6 fields in every row, as in the header, got 10; write decimals with a point'): read_boxes(path)
    path.write_text('uid,frame,x1,y1,x2,y2\na,0,10,20,30,40,\na,1,10,20,30,40,\n')
    with pytest.raises(ValueError, match='got 7'): read_boxes(path)
    path.write_text('uid,frame,x1,y1,x2,y2\na,0,10,20,30,40\na,1,10,20,30,40,50\n')
    with pytest.raises(ValueError, match='line 3, saw 7'): read_boxes(path)


@pytest.mark.parametrize('change,why', [
    (lambda t: t.assign(frame=t.frame+1), 'got 1 where 0 should be; .*from 0: subtract 1'), (lambda t: t.assign(frame=t.frame+885), 'subtract 885'),
    (lambda t: pd.concat([t, t[t.frame == 7]]), r'one box per frame, around both athletes of a synchronised dive \(frame 7 has several\)'),
    (lambda t: t[t.frame%5 == 0], 'got 5 where 1 should be; fill the gaps'), (lambda t: t[t.frame < 20], 'need .* boxes, one per frame file, got 20; its files are .*jpg to .*jpg, counted from 0'),
    (lambda t: t.assign(x1=t.x1.where(t.frame != 3)), 'five finite numbers per row, got .*x1=nan.* in line 5 .6 such rows'),
    (lambda t: t.assign(frame=t.frame.map('{:05d}.jpg'.format)), 'five finite numbers per row, got .*frame=00000.jpg')])
def test_frames_that_do_not_fit(load, truth, change, why):
    with pytest.raises(ValueError, match=why): load(change(truth))


@pytest.mark.parametrize('spell', [lambda uid: uid.replace('/','_'), lambda uid: str(tuple(uid.split('/'))), lambda uid: uid.replace('0',''),
                                   lambda uid: uid.upper().replace('/','-0')], ids=['01_5',"('01', '5')",'1/5','01-05'])
def test_names_in_another_spelling_are_shown(load, truth, made, spell):
    first = made.samples[0].uid
    with pytest.raises(ValueError, match='need actor boxes for 6 dives, got none for 6 of them') as e: load(truth.assign(uid=truth.uid.map(spell)))
    assert f'write {first!r} instead of {spell(first)!r}' in str(e.value)


def test_dives_without_boxes_and_boxes_without_dives(load, truth):
    first = truth.uid.iloc[0]
    with pytest.raises(ValueError, match=rf'got none for 1 of them \({first}\) and 5 dives such as .*leave these dives out'): load(truth[truth.uid != first])
    more = pd.concat([truth, truth[truth.uid == first].assign(uid='elsewhere/1')])
    assert '6 dives (of 7 in it), x ' in load(more)[1][0]
    with pytest.raises(ValueError, match='got none for 2 of them'): require_dives({}, ['a','b'], 'b.csv')


def test_a_clip_with_boxes_of_the_film(truth, made, tmp_path):
    "`score_clip` reads the same table: boxes of a film of 640 x 360 are refused, and scaled when they say so"
    from fspn_nb.config import make_config
    from fspn_nb.data.clips import load_frames
    from fspn_nb.inspect.clip import clip_boxes
    from types import SimpleNamespace
    sample = made.samples[0]
    frames = load_frames(sample, np.arange(len(sample.files)))
    clip = SimpleNamespace(name='film', frames=frames, boxes=None, action='')
    own = truth[truth.uid == sample.uid]
    cfg,path = make_config('finediving', 'smoke'),tmp_path/'b.csv'
    own.to_csv(path, index=False)
    right = clip_boxes(clip, cfg, 'boxes', str(path))[0]
    scaled(own, 2.5, 2.5).to_csv(path, index=False)
    with pytest.raises(ValueError, match='frames of 256x144'): clip_boxes(clip, cfg, 'boxes', str(path))
    scaled(own, 2.5, 2.5, width=640, height=360).to_csv(path, index=False)
    np.testing.assert_allclose(clip_boxes(clip, cfg, 'boxes', str(path))[0], right)


def test_the_crop_shows_the_diver(load, truth, made):
    "What the units are for: the crop from a stated 640 x 360 is the crop from the true boxes"
    from fspn_nb.actor.crop import crop_actor
    from fspn_nb.data.clips import load_frames
    sample = made.samples[0]
    frames,right = load_frames(sample, [0,30,60]),load_actor_boxes(made, ActorCfg())[1][sample.uid]
    boxes = load(scaled(truth, 2.5, 2.5, width=640, height=360))[0][sample.uid]
    assert torch.equal(crop_actor(frames, boxes[[0,30,60]]), crop_actor(frames, right[[0,30,60]]))


# ---- how much

def test_a_table_of_all_frames_with_every_digit_is_read(tmp_path):
    "FineDiving has 312,256 frames; as pandas writes float64, with the picture's size, that is a third more than 25 MiB"
    from fspn_nb.actor.box_table import TABLE_BYTES
    boxes = np.random.default_rng(0).random((1000, 4))*100+[0, 0, 100, 100]
    rows = pd.DataFrame(boxes, columns=CORNERS).assign(uid='FINADivingWorldCup2021_Men10m_final_r1/10', width=256, height=256)
    rows.insert(0, 'frame', range(1000))
    assert len(rows.to_csv(index=False))*312.256 < TABLE_BYTES, 'also with the longest name in every row'
    rows.to_csv(path := tmp_path/'boxes.csv', index=False)
    with open(path, 'ab') as file: file.truncate(TABLE_BYTES+1)
    with pytest.raises(ValueError, match='need a table of at most 67108864 bytes, .* or round to two decimals'): read_boxes(path)


def test_a_table_of_millions_of_short_rows_is_refused_at_once(tmp_path):
    "64 MiB of them would take minutes and 2 GB"
    (path := tmp_path/'boxes.csv').write_bytes(b'uid,frame,x1,y1,x2,y2\n'+b'a,0,0,0,1,1\n'*(2**20+1))
    with pytest.raises(ValueError, match='need a table of at most 1048576 rows'): read_boxes(path)
