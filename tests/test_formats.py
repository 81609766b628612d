"What the readers make of real annotations, of damaged trees and of hostile files"
import datetime
import os
import pickle
import random
import shutil
import time
from collections import OrderedDict,defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from conftest import edit_pickle

from fspn_nb.data.clips import load_frames
from fspn_nb.data.finediving import FINEDIVING_FRAMES,read_finediving,write_finediving,write_frames
from fspn_nb.data.records import check_samples,describe_folder,frame_problem,samples_frame,steps_on_axis
from fspn_nb.data.safe_pickle import load_pickle
from fspn_nb.data.stats import finediving_stats
from fspn_nb.synthetic.dive_motion import make_dive

AQA, FINE, COARSE = 'fine-grained_annotation_aqa', 'FineDiving_fine-grained_annotation', 'FineDiving_coarse_annotation'
SIX = (AQA, FINE, COARSE, 'Sub_action_Types_Table', 'train_split', 'test_split')
NAMED = (ValueError, FileNotFoundError, KeyError)
REAL = dict(samples=3000, train=2251, test=749, action_types=52, sub_actions=29, difficulties=23, three_steps=2209, short=489)


def film(dive):
    "The dive with tiny frames, so that writing costs nothing"
    return replace(dive, frames=np.full((len(dive.labels), 8, 12, 3), 90, np.uint8))


def tree(root, n=4):
    "A release of `n` made-up dives, the last one in the test split; returns the dives"
    dives = [(('26', i+1), 99990+7*i, film(make_dive(i))) for i in range(n)]
    keys = [k for k, _, _ in dives]
    write_finediving(root, dives, keys[:-1], keys[-1:])
    return dives


@pytest.fixture
def small(tmp_path):
    "Root of a fresh small release"
    tree(tmp_path/'fd')
    return tmp_path/'fd'


@pytest.fixture(scope='session')
def real(shared):
    "The real samples, read once"
    return read_finediving(shared('data', 'finediving'))


def edit(root, name, change):
    "Change one pickle of the release"
    edit_pickle(root/'Annotations'/f'{name}.pkl', change)


# ---- the real release

def test_real_counts(real):
    got = finediving_stats(real)
    assert {k: got[k] for k in REAL} == REAL
    assert (got['with_frames'], got['train_with_frames'], got['test_with_frames']) == (12, 6, 6)


def test_real_odd_things_are_reported_as_they_are(real):
    "Transitions outside the dive, labels that come back, last labels that are no entry: kept, not repaired"
    by = {s.uid: s for s in real}
    assert by['05/56'].transitions == (99, 133) and by['05/56'].n_frames < 133
    assert by['03/67'].transitions == (-1, 51, 35)
    assert sum(list(dict.fromkeys(s.labels))[-1] == 35 for s in real) == 15
    assert sum(s.start_frame >= 100000 for s in real) == 531
    df = samples_frame(real)
    assert df.judges.value_counts().to_dict() == {7: 1369, 3: 1024, 5: 607}
    assert df.transitions.value_counts().to_dict() == {2: 2209, 3: 568, 4: 223}
    assert (df.n_frames.min(), df.n_frames.max(), df.n_frames.median()) == (63, 273, 101)
    assert (df.score.min(), df.score.max(), df[df.split == 'test'].score.max()) == (0, 114.8, 104.4)


def test_real_steps_on_the_axis(real):
    "The targets that TSA trains on: first half 1..58, last 35..88, outside the two windows in 108 and 98 dives"
    t = np.array([steps_on_axis(s, np.linspace(0, s.n_frames-1, 96).astype(int)) for s in real])
    assert (t.min(0).tolist(), t.max(0).tolist(), np.median(t, 0).tolist()) == ([1, 35], [58, 88], [29, 62])
    assert t.mean(0) == pytest.approx([28.6, 62.3], abs=.05)
    assert ((t[:, 0] > 47).sum(), (t[:, 1] < 48).sum()) == (108, 98)


def test_real_figures_of_the_notebook(real):
    "The histograms that the notebook prints are those of the annotations"
    n = [s.n_frames for s in real]
    assert np.histogram(n, np.arange(60, 281, 10))[0].tolist() == [5, 57, 235, 434, 1629, 355, 109, 69, 56, 31, 12, 2, 0, 1, 2, 1, 1, 0, 0, 0, 0, 1]


def test_real_order_is_that_of_the_test_split(real, shared):
    "Released prediction arrays follow the test split; so must ours"
    true = np.load(shared('data', 'finediving', 'oracle', 'tsa_true.npy'), allow_pickle=False).ravel()
    assert np.allclose([s.score for s in real if s.split == 'test'], true)


def test_real_frames(real):
    whole = [s for s in real if frame_problem(s) is None]
    assert len(whole) == 12 and all(s.files[0] == f'{s.start_frame:05d}.jpg' and len(s.files) == s.n_frames for s in whole)
    with pytest.raises(FileNotFoundError, match='2988 of 3000 samples cannot be used.*allow_missing'): check_samples(real)
    assert len(check_samples(real, allow_missing=True)) == 12


def test_real_annotations_apart_and_fast(shared):
    start = time.perf_counter()
    samples = read_finediving(None, annotations=shared('data', 'finediving', 'Annotations'))
    assert time.perf_counter()-start < 20 # two to three seconds on an idle core
    assert len(samples) == 3000 and all(s.folder is None and s.files == () for s in samples)


def test_real_release_survives_our_writer(real, shared, tmp_path):
    "Written again by us, the real annotations have the same values of the same types"
    dive = lambda s: SimpleNamespace(action=s.action, score=s.score, difficulty=s.difficulty, labels=s.labels, transitions=s.transitions, sub_actions=s.sub_actions,
                                     judges=s.judges, frames=None)
    key = lambda s: (s.uid.rsplit('/', 1)[0], int(s.uid.rsplit('/', 1)[1]))
    part = lambda split: [key(s) for s in real if s.split == split]
    folder = write_finediving(tmp_path, ((key(s), s.start_frame, dive(s)) for s in real), part('train'), part('test'))
    again = read_finediving(tmp_path)
    assert [replace(s, folder=None, files=()) for s in again] == [replace(s, folder=None, files=()) for s in real]
    shape = lambda v: [(type(x), getattr(x, 'dtype', None)) for x in (v.values() if isinstance(v, dict) else v)]
    for name in (AQA, FINE, COARSE):
        ours, theirs = load_pickle(folder/f'{name}.pkl'), load_pickle(shared('data', 'finediving', 'Annotations', f'{name}.pkl'))
        assert ours.keys() == theirs.keys() and all(shape(ours[k]) == shape(theirs[k]) for k in theirs)
        if name == FINE: assert all(list(ours[k]) == list(theirs[k]) and list(ours[k]['sub-action_types']) == list(theirs[k]['sub-action_types']) for k in theirs)
    for name in SIX[3:]: assert load_pickle(folder/f'{name}.pkl') == load_pickle(shared('data', 'finediving', 'Annotations', f'{name}.pkl'))
    assert all((folder/f'{name}.pkl').read_bytes()[:2] == b'\x80\x03' for name in SIX)


def test_mtl_aqa_pickles_open_too(shared):
    "The same unpickler opens the other release's files, among them one of protocol 4"
    info = shared('data', 'mtl_aqa', 'info')
    assert {path.name: len(load_pickle(path)) for path in info.glob('*.pkl')} == {
        'augmented_final_annotations_dict.pkl': 1412, 'final_annotations_dict_with_dive_number.pkl': 1412, 'train_split_0.pkl': 1059, 'test_split_0.pkl': 353}


# ---- round trip and frames

def test_round_trip(tmp_path):
    dives = tree(tmp_path)
    samples = check_samples(read_finediving(tmp_path))
    assert len(samples) == len(dives)
    for s, ((video, index), start, d) in zip(samples, dives):
        assert (s.uid, s.split) == (f'{video}/{index}', 'test' if index == 4 else 'train')
        assert (s.action, s.score, s.difficulty, s.judges, s.transitions) == (d.action, d.score, d.difficulty, d.judges, d.transitions)
        assert s.labels == tuple(d.labels) and s.sub_actions == d.sub_actions
        assert (s.start_frame, s.end_frame) == (start, start+len(d.labels)-1)
        assert [int(name[:-4]) for name in s.files] == list(range(start, start+len(d.labels)))


def test_writing_twice_gives_the_same_bytes(tmp_path):
    for name in 'ab': tree(tmp_path/name)
    for name in SIX: assert (tmp_path/'a/Annotations'/f'{name}.pkl').read_bytes() == (tmp_path/'b/Annotations'/f'{name}.pkl').read_bytes()
    assert not list(tmp_path.rglob('*.part'))


def test_writer_replaces_nothing_unasked(small):
    before = {path: path.read_bytes() for path in (small/'Annotations').iterdir()}
    with pytest.raises(ValueError, match='overwrite=True'): write_finediving(small, [], [], [])
    with pytest.raises(ValueError, match='not there yet'): write_frames(small, ('26', 1), 1, np.zeros((2, 8, 8, 3), np.uint8))
    assert all(path.read_bytes() == b for path, b in before.items())


@pytest.mark.parametrize('key', [('..', 1), ('a/b', 1), ('a\\b', 1), ('', 1), ('26', -1), ('26', 'x'), ('a\0', 1), ('x'*300, 1)])
def test_keys_cannot_leave_the_root(small, key):
    with pytest.raises(ValueError): write_frames(small, key, 1, np.zeros((2, 8, 8, 3), np.uint8))
    edit(small, 'test_split', lambda v: v+[key])
    with pytest.raises(ValueError, match='test_split.pkl: need'): read_finediving(small)


def test_frames_missing_and_misnumbered(small, capsys):
    folders = [small/FINEDIVING_FRAMES/'26'/str(i) for i in (1, 2, 3)]
    shutil.rmtree(folders[0])
    next(folders[1].iterdir()).unlink()
    last = sorted(folders[2].iterdir(), key=lambda path: int(path.stem))
    last[0].rename(folders[2]/f'{int(last[-1].stem)+1:05d}.jpg')
    (small/FINEDIVING_FRAMES/'26'/'4'/'notes.txt').write_text('not a frame')
    samples = read_finediving(small)
    assert [str(frame_problem(s)).split(':')[0] for s in samples] == ['no frames', 'fewer frames than labels', 'other frame numbers than annotated', 'None']
    with pytest.raises(FileNotFoundError, match='3 of 4 samples.*1 with no frames: 26/1; .*26/2 .*; .*26/3'): check_samples(samples)
    capsys.readouterr()
    assert [s.uid for s in check_samples(samples, allow_missing=True)] == ['26/4']
    assert '3 of 4 samples cannot be used' in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match='No sample is left'): check_samples(samples[:3], allow_missing=True)


def test_a_file_where_a_folder_should_be(small):
    shutil.rmtree(small/FINEDIVING_FRAMES/'26'/'1')
    (small/FINEDIVING_FRAMES/'26'/'1').write_text('')
    assert frame_problem(read_finediving(small)[0]) == 'no frames'


def test_what_lies_there_instead_is_said(small):
    "Frames under other names, in a folder of another name, and counted from 0 or 1 in each dive"
    samples = read_finediving(small)
    first, second, third, fourth = (s.folder for s in samples)
    for path in sorted(first.iterdir()): path.rename(path.with_name(f'frame_{path.name}'))
    second.rename(second.with_name('02'))
    for i, path in enumerate(sorted(third.iterdir())): path.rename(path.with_name(f'x{i:05d}.jpg'))
    for path in list(third.iterdir()): path.rename(path.with_name(path.name[1:]))
    for path in list(fourth.iterdir()):
        with Image.open(path) as image: image.save(path.with_suffix('.png'))
        path.unlink()
    samples = read_finediving(small)
    assert [str(frame_problem(s)).split(':')[0] for s in samples] == ['no frames', 'no frames', 'other frame numbers than annotated', 'None']
    names = sorted(os.listdir(first))
    assert names[0].startswith('frame_') and describe_folder(first) == f'this folder holds {len(names)} other names ({names[0]}, {names[1]}, ...)'
    assert describe_folder(second).endswith(f'did you mean {second.with_name("02")}?')
    with pytest.raises(FileNotFoundError, match='looked first in .*26/1: this folder holds .* frame_'): check_samples(samples)
    assert load_frames(samples[3], [0, -1+samples[3].n_frames]).shape[0] == 2 and samples[3].files[0].endswith('.png')


def test_a_frames_folder_in_other_letters_is_named(small):
    (small/FINEDIVING_FRAMES).rename(small/FINEDIVING_FRAMES.lower())
    with pytest.raises(FileNotFoundError, match=f'did you mean .*/{FINEDIVING_FRAMES.lower()}[?]'): read_finediving(small)


def test_what_a_system_leaves_in_a_folder_is_no_frame(small):
    "Files of macOS, Windows and a network disk beside the frames"
    folder = read_finediving(small)[0].folder
    for name in ('._01000.jpg','Thumbs.db','.DS_Store','desktop.ini'): (folder/name).write_bytes(b'x')
    for place in (folder, folder.parent, folder.parent.parent): (place/'@eaDir').mkdir()
    assert len(check_samples(read_finediving(small))) == 4


# ---- damaged trees

def test_wrong_roots(small, tmp_path):
    for root, why in ((small/FINEDIVING_FRAMES, 'did you mean'), (small/'Annotations', 'did you mean'), (tmp_path, 'did you mean'), (tmp_path/'nowhere', 'which is no folder')):
        with pytest.raises(FileNotFoundError, match=why): read_finediving(root)
    with pytest.raises(FileNotFoundError, match='root=None'): read_finediving(tmp_path/'nowhere', annotations=small/'Annotations')
    assert len(read_finediving(None, annotations=small/'Annotations')) == 4


@pytest.mark.parametrize('name', SIX)
def test_each_file_missing_cut_or_of_another_shape(small, name):
    path = small/'Annotations'/f'{name}.pkl'
    data = path.read_bytes()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f'{name}.pkl, found none'): read_finediving(small)
    for bad in (data[:-1], data[:len(data)//2], b'', b'\x80', b'<html>not found</html>', pickle.dumps(5), pickle.dumps({} if 'split' not in name else [])):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=name): read_finediving(small)
    path.write_bytes(pickle.dumps([1, 2] if 'split' not in name else {1: 2}))
    with pytest.raises(ValueError, match=f'{name}.pkl: need a'): read_finediving(small)


K = ('26', 2)
EDITS = {
    'tuple of four': (AQA, lambda v: v.update({K: tuple(v[K][:4])}), r"fine-grained_annotation_aqa.pkl, \('26', 2\): need 5 values"),
    'no record': (FINE, lambda v: v.update({K: 'x'}), r"\('26', 2\): need a record"),
    'field gone': (COARSE, lambda v: v[K].pop('end_frame') and None, "need the field 'end_frame'"),
    'nan score': (AQA, lambda v: v[K].__setitem__(1, float('nan')), 'dive_score: need a finite number, got float nan'),
    'text score': (COARSE, lambda v: v[K].update(dive_score='88'), 'dive_score: need a finite number'),
    'true score': (COARSE, lambda v: v[K].update(dive_score=True), 'dive_score: need a finite number'),
    'vast score': (COARSE, lambda v: v[K].update(dive_score=10**5000), 'dive_score: need a finite number'),
    'float labels': (FINE, lambda v: v[K].update(frames_labels=np.array([1., 2.])), 'frames_labels: need a vector of whole numbers'),
    'matrix labels': (FINE, lambda v: v[K].update(frames_labels=np.ones((2, 3), int)), 'frames_labels: need a vector'),
    'text labels': (AQA, lambda v: v[K].__setitem__(4, ['a', 'b']), 'frames_labels: need a whole number'),
    'other score': (COARSE, lambda v: v[K].update(dive_score=1.5), r"\('26', 2\): dive_score is .* in fine-grained_annotation_aqa and 1.5 in FineDiving_coarse_annotation"),
    'other action': (FINE, lambda v: v[K].update(action_type='999z'), "action_type is .* and 999z in FineDiving_fine"),
    'other label': (FINE, lambda v: v[K]['frames_labels'].__setitem__(3, 9), 'frames_labels is .* at position 3 in fine-grained_annotation_aqa and 9'),
    'other length': (COARSE, lambda v: v[K].update(end_frame=v[K]['end_frame']+1), 'number of frames is .* in frames_labels'),
    'steps without name': (FINE, lambda v: v[K]['sub-action_types'].popitem() and None, 'set of sub-actions'),
    'other step name': ('Sub_action_Types_Table', lambda v: v.update({36: 'Exit'}), 'names of sub-actions'),
    'nan mark': (COARSE, lambda v: v[K]['judge_scores'].__setitem__(0, float('nan')), 'judge_scores: need a finite number'),
    'dive gone': (COARSE, lambda v: v.pop(K) and None, r"need the same dives, got 1 that only one has \(\('26', 2\)"),
    'key as text': (AQA, lambda v: v.update({'26/9': v[K]}), r"need keys \(video, index\)"),
    'twice': ('test_split', lambda v: v+[K], r"once in train and test together, got \('26', 2\)"),
    'unknown': ('test_split', lambda v: v+[('99', 1)], r"need annotated dives, got \('99', 1\)"),
    'uncovered': ('train_split', lambda v: v[1:], r"need every dive in a split, got 1 in none \(\('26', 1\)"),
    'no difficulty': (None, None, 'difficulty > 0'),
}


@pytest.mark.parametrize('what', EDITS)
def test_one_wrong_value(small, what):
    name, change, why = EDITS[what]
    if name: edit(small, name, change)
    else:
        edit(small, AQA, lambda v: v[K].__setitem__(2, 0.))
        for name in (FINE, COARSE): edit(small, name, lambda v: v[K].update(difficulty=0.))
    with pytest.raises(ValueError, match=why) as e: read_finediving(small)
    assert len(str(e.value)) < 700 and '; ' in str(e.value)


def test_checks_of_a_list(small):
    samples = read_finediving(small)
    for bad, why in (([], 'at least one'), ([replace(samples[0], score=float('nan'))], '26/1: need a finite score'), ([*samples, samples[0]], '26/1 occurs twice'),
                     ([*samples, replace(samples[0], split='test')], '26/1 is in the train and in the test split'), ([replace(samples[0], split='val')], "'val'")):
        for allow in (False, True):
            with pytest.raises(ValueError, match=why): check_samples(bad, allow_missing=allow)


# ---- hostile files

RAN = []


class Call:
    "Pickles as a call of `f(*args)`"
    def __init__(self, f, *args): self.call = f, args
    def __reduce__(self): return self.call


HOSTILE = {
    'os.system': b'cos\nsystem\n(S"true"\ntR.', 'posix': b'\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.',
    'eval': pickle.dumps({1: Call(eval, 'RAN.append(1)')}), 'getattr': pickle.dumps(Call(getattr, 'x', 'format')), 'load': pickle.dumps(Call(pickle.loads, b'N.')),
    'dotted': b'\x80\x04\x8c\x05numpy\x8c\x0cndarray.dump\x93.', 'numpy function': b'cnumpy\nload\n(S"x"\ntR.',
    'object array': pickle.dumps({1: np.array([Call(eval, 'RAN.append(1)')], dtype=object)}), 'plain object array': pickle.dumps(np.array([None], dtype=object)),
    'object scalar': b'\x80\x03cnumpy.core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00O8\x89\x88\x87RN\x86R.',
    'foreign class': b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\ndtype\n(I1\ntS"b"\ntR.', 'string array': pickle.dumps(np.array(['a'*9])),
    'records': pickle.dumps(np.zeros(2, [('a', 'i4')])), 'array as call': b'cnumpy\nndarray\n((L1000000000000L\nttR.',
    'terabyte': pickle.dumps(np.zeros(3)).replace(b'K\x03\x85', b'\x8a\x05\x00\x00\x00\x00\x7f\x85'), 'memo': b'\x80\x03Nr\xff\xff\xff\xf0.', 'memo in text': b'Np4000000000\n.',
    'long': b'\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.', 'instance': b'(ios\nsystem\n.', 'persistent': b'Pos\n.', 'extension': b'\x80\x02\x82\x01.',
    'build on a stand-in': b'\x80\x04\x8c\x05numpy\x8c\x05dtype\x93N}\x8c\x0c__setstate__Ns\x86b.', 'nothing on the stack': b'\x80\x03.', 'garbage': bytes(range(256)),
}


@pytest.mark.parametrize('what', HOSTILE)
def test_hostile_pickles_are_refused_and_named(tmp_path, what):
    path = tmp_path/'fine-grained_annotation_aqa.pkl'
    path.write_bytes(HOSTILE[what])
    with pytest.raises(ValueError, match='fine-grained_annotation_aqa.pkl: need a pickle of plain annotations.*download') as e: load_pickle(path)
    assert not RAN and len(str(e.value)) < 800


def test_the_refused_name_is_in_the_message(tmp_path):
    path = tmp_path/'x.pkl'
    path.write_bytes(HOSTILE['os.system'])
    with pytest.raises(ValueError, match='asks for os.system'): load_pickle(path)
    with pytest.raises(ValueError, match='need at most 10 bytes'): load_pickle(path, limit=10)
    with pytest.raises(FileNotFoundError, match='found none'): load_pickle(tmp_path)


@pytest.mark.parametrize('module', ['numpy.core.multiarray', 'numpy._core.multiarray'])
@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_plain_numpy_passes(tmp_path, module, protocol):
    "Arrays and scalars of all number types, either byte order, both module names"
    value = {k: np.arange(6).astype(k).reshape(2, 3, order=order) for k in ('i1', '<i8', '>i4', 'u2', 'f4', '>f8', '?') for order in 'CF'} | {'s': [np.float32(1.5), np.int64(-3), np.bool_(True)]}
    path = tmp_path/'x.pkl'
    data = pickle.dumps(value, protocol=protocol)
    data = data.replace(b'cnumpy._core.multiarray\n', b'c'+module.encode()+b'\n')
    path.write_bytes(data)
    got = load_pickle(path)
    assert all(np.array_equal(got[k], v) and got[k].dtype == v.dtype.newbyteorder('=') for k, v in value.items() if k != 's')
    assert got['s'] == value['s'] and [type(x) for x in got['s']] == [type(x) for x in value['s']]


# ---- files that were saved again

def normalized(value):
    "`value` in plain types, so that two readings can be compared"
    if isinstance(value, dict): return {k: normalized(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return type(value)(normalized(v) for v in value)
    return (str(value.dtype.newbyteorder('=')), value.shape, value.tolist()) if isinstance(value, np.ndarray) else value


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize('numpy1', [False, True])
def test_real_annotations_saved_again_read_the_same(shared, tmp_path, protocol, numpy1):
    "Every released pickle, written anew by this Python in each protocol, under the module names of numpy 2 and of numpy 1"
    for path in (*shared('data', 'finediving', 'Annotations').glob('*.pkl'), *shared('data', 'mtl_aqa', 'info').glob('*.pkl')):
        if path.stat().st_size > 10**6: continue # one file of three megabytes holds what the others hold
        released = normalized(load_pickle(path))
        data = pickle.dumps(load_pickle(path), protocol=protocol)
        if numpy1: data = data.replace(b'numpy._core.multiarray\n', b'numpy.core.multiarray\n') # only in the text of protocols 0 to 3
        (tmp_path/path.name).write_bytes(data)
        again = normalized(load_pickle(tmp_path/path.name))
        assert again == released and [type(k) for k in again] == [type(k) for k in released], path.name


@pytest.mark.parametrize('protocol', range(6))
def test_harmless_types_pass_in_every_protocol(tmp_path, protocol):
    value = {'ordered': OrderedDict(a=[1, 2.5]), 'default': defaultdict(list, b=['x']), 'set': {3}, 'frozen': frozenset({4}), 'bytes': b'', 'more': b'\xff\0',
             'fortran': np.arange(6.).reshape(2, 3, order='F'), 'turned': np.arange(24).reshape(2, 3, 4).transpose(1, 0, 2), 'zero': np.array(7),
             'strided': np.arange(9)[::2], 'empty': np.zeros(0, np.float32), 'big': np.arange(3, dtype='>i4'), 'scalar': np.float32(.5)}
    path = tmp_path/'x.pkl'
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    got = load_pickle(path)
    assert normalized(got) == normalized(value) and type(got['ordered']) is dict and type(got['scalar']) is np.float32


def test_arrays_of_python_2_open(tmp_path):
    "Protocol 2 as Python 2 wrote it: the bytes of the array are a byte string, which Python 3 calls text"
    path = tmp_path/'old.pkl'
    raw = np.array([1., -2.5]).tobytes()
    path.write_bytes(b'\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R'
                     b'(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x10'+raw+b'tb.')
    assert load_pickle(path).tolist() == [1., -2.5]


class Note:
    "A class of somebody's own; harmless, and not on the list"


@pytest.mark.parametrize('value, name', [(Note(), 'Note'), (pd.DataFrame({'score': [88.]}), 'DataFrame'), (Path('x'), 'Path'), (datetime.date(2021, 5, 1), 'date')])
@pytest.mark.parametrize('protocol', [2, 4, 5])
def test_only_what_can_run_code_is_accused(tmp_path, value, name, protocol):
    path = tmp_path/'x.pkl'
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    with pytest.raises(ValueError, match=f'asks for .*{name}.*download') as e: load_pickle(path)
    assert 'not on the list of types' in str(e.value) and 'may run code' not in str(e.value)


@pytest.mark.parametrize('what', ['os.system', 'posix', 'eval', 'getattr', 'load', 'dotted'])
def test_what_can_run_code_is_accused(tmp_path, what):
    path = tmp_path/'x.pkl'
    path.write_bytes(HOSTILE[what])
    with pytest.raises(ValueError, match='which may run code'): load_pickle(path)


def test_buffers_outside_of_the_file_are_missed_in_words(tmp_path):
    path = tmp_path/'x.pkl'
    path.write_bytes(pickle.dumps({'judge_scores': np.zeros(7)}, protocol=5, buffer_callback=[].append))
    with pytest.raises(ValueError, match='arrays lie outside of the file'): load_pickle(path)


# ---- random damage

def mutate(data, rng):
    "`data` with one to four bytes changed, cut, doubled or moved"
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i, how = rng.randrange(len(data)), rng.random()
        if how < .6: data[i] = rng.randrange(256)
        elif how < .75: del data[i:i+rng.randint(1, 40)]
        elif how < .9: data[i:i] = data[max(0, i-rng.randint(1, 40)):i]
        else: data = data[:max(1, i)]
        if not data: data = bytearray(b'.')
    return bytes(data)


def outcome(read):
    "'read' or 'refused'; any other exception is a failure"
    try: read()
    except NAMED as e:
        assert str(e)
        return 'refused'
    return 'read'


def test_random_damage_to_a_small_release(small):
    rng, seen = random.Random(0), []
    whole = {name: (small/'Annotations'/f'{name}.pkl').read_bytes() for name in SIX}
    for i in range(300):
        path = small/'Annotations'/f'{SIX[i % 6]}.pkl'
        path.write_bytes(mutate(whole[path.stem], rng))
        seen.append(outcome(lambda: read_finediving(small)))
        path.write_bytes(whole[path.stem])
    assert seen.count('refused') > 150 and len(read_finediving(small)) == 4


def test_random_damage_to_the_real_files(shared, tmp_path):
    "Three hundred damaged copies of the real files, mostly of the small ones"
    folder, rng = shared('data', 'finediving', 'Annotations'), random.Random(1)
    for name, n in ((AQA, 6), (FINE, 5), (COARSE, 9), ('Sub_action_Types_Table', 200), ('train_split', 30), ('test_split', 50)):
        data = (folder/f'{name}.pkl').read_bytes()
        for _ in range(n):
            (tmp_path/'x.pkl').write_bytes(mutate(data, rng))
            outcome(lambda: load_pickle(tmp_path/'x.pkl'))


def test_random_damage_to_real_values(real, tmp_path):
    "Thirty real dives in a small release, damaged 300 times and read whole"
    dive = lambda s: SimpleNamespace(action=s.action, score=s.score, difficulty=s.difficulty, labels=s.labels, transitions=s.transitions, sub_actions=s.sub_actions,
                                     judges=s.judges, frames=None)
    part = real[::100]
    keys = [(s.uid.rsplit('/', 1)[0], int(s.uid.rsplit('/', 1)[1])) for s in part]
    folder = write_finediving(tmp_path, [(k, s.start_frame, dive(s)) for k, s in zip(keys, part)], keys[:20], keys[20:])
    assert len(read_finediving(tmp_path)) == len(part)
    rng = random.Random(2)
    for i in range(300):
        path = folder/f'{SIX[i % 6]}.pkl'
        data = path.read_bytes()
        path.write_bytes(mutate(data, rng))
        outcome(lambda: read_finediving(tmp_path))
        path.write_bytes(data)
