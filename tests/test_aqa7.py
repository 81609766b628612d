"AQA-7: the real lists, damaged and hostile ones, and what is written and read again"
import ast
import io
import json
import random
import re
import struct
import time
import warnings
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat, savemat

from fspn_nb.data.aqa7 import ranges_of,read_aqa7,write_act_frames,write_aqa7
from fspn_nb.data.check import check_release
from fspn_nb.data.clips import load_frames
from fspn_nb.data.matlab import load_mat,mat_bytes
from fspn_nb.data.records import check_samples,frame_problem
from fspn_nb.data.stats import aqa7_stats
from fspn_nb.metrics import fisher_mean,relative_l2
from fspn_nb.paper import paper_table
from fspn_nb.protocols import SPORTS,LabelTransform

NOTEBOOK = Path(__file__).resolve().parents[1]/'nbs'/'data'/'09_aqa7.ipynb'
GREY = np.full((103, 8, 12, 3), 90, np.uint8)
SPLITS = ('train', 'test')
OFFICIAL, COPY = 'split_4_{}_list.mat', 'consolidated_{}_list.mat'
GOOD = dict(train=[(1, 54, 29.7), (1, 41, 97.2), (2, 9, 16.87), (6, 3, 50.4)], test=[(1, 1, 84.15), (2, 3, 15.1)])


def act(score, frames=GREY): return SimpleNamespace(score=score, frames=frames)


def put(folder, name=OFFICIAL, scale=1, packed=True, **lists):
    "Write both lists into `folder`; `lists` replace those of GOOD"
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in (GOOD | lists).items():
        rows = np.array(rows, float)*[1, 1, scale] if scale != 1 else rows
        (folder/name.format(split)).write_bytes(mat_bytes(f'consolidated_{split}_list', rows, packed))
    return folder


@pytest.fixture(scope='module')
def real(shared):
    "The real samples, from C3D-LSTM's copy"
    return read_aqa7(shared('data', 'aqa7'))


def scores(samples, sport, split): return np.array([s.score for s in samples if (s.action, s.split) == (sport, split)])


# ---- the real lists

def test_real_counts(real):
    got = aqa7_stats(real)
    assert (got['samples'], got['train'], got['test'], got['sports'], got['with_frames']) == (1106, 803, 303, 6, 0)
    assert [got[k] for k in SPORTS] == [(300, 70), (120, 56), (120, 55), (140, 66), (60, 28), (63, 28)]
    assert len({s.uid for s in real}) == 1106 and all(s.difficulty is None and s.judges is None and s.n_frames == 103 for s in real)
    assert {frame_problem(s) for s in real} == {'no frames'}
    with pytest.raises(FileNotFoundError, match='1106 of 1106 .*No sample is left'): check_samples(real, allow_missing=True)


def test_real_lists_are_said_to_be_a_hundredfold(shared, capsys):
    folder = shared('data', 'aqa7')
    problems = []
    samples = read_aqa7(None, annotations=folder, problems=problems)
    assert problems == [] and all(s.folder is None for s in samples)
    out = capsys.readouterr().out
    assert out.count('\n') == 1 and 'consolidated_train_list.mat, consolidated_test_list.mat: scores are 100 x points' in out


def test_real_values_are_scipys(real, shared):
    "Our own reader and SciPy's see the same numbers"
    for split in SPLITS:
        name = f'consolidated_{split}_list'
        path = shared('data', 'aqa7', f'{name}.mat')
        theirs = loadmat(path)[name]
        assert np.array_equal(load_mat(path, name), theirs)
        mine = [s for s in real if s.split == split]
        assert [s.score for s in mine] == pytest.approx(theirs[:, 2]/100, abs=1e-9)
        assert [(SPORTS[s.action].id, int(s.uid[-3:])) for s in mine] == [(int(c), int(i)) for c, i, _ in theirs]
        assert all(s.score == round(s.score, 2) for s in mine)


def test_real_ranges_leak_two_test_extremes(real):
    "The six fixed ranges are the union of both splits' extremes; two ends occur in the test list only (D-17)"
    train, fixed = ranges_of(real, 'train'), ranges_of(real)
    test = {k: (scores(real, k, 'test').min(), scores(real, k, 'test').max()) for k in SPORTS}
    assert {k: (min(train[k][0], test[k][0]), max(train[k][1], test[k][1])) for k in SPORTS} == fixed
    ends = [(k, i) for k in SPORTS for i in (0, 1) if train[k][i] != fixed[k][i]]
    assert ends == [('diving', 0), ('sync_diving_10m', 1)]
    assert (fixed['diving'][0], fixed['sync_diving_10m'][1]) == (21.6, 99.36) == (test['diving'][0], test['sync_diving_10m'][1])
    assert list(test.values()) == [(21.6, 102.6), (13.1, 16.67), (8, 47), (8, 50), (47.4, 100.32), (51, 99.36)]


def test_real_error_of_the_mean_under_both_ranges(real):
    "R of the training mean as known for these splits, whatever range the labels use"
    got = {}
    for k in SPORTS:
        true, mean = scores(real, k, 'test'), scores(real, k, 'train').mean()
        got[k] = 100*relative_l2(np.full(len(true), mean), true)
        for ranges in ('literature', 'train'):
            unit = LabelTransform('percent', *ranges_of(real, ranges)[k])
            assert 100*relative_l2(unit.transform(np.full(len(true), mean)), unit.transform(true)) == pytest.approx(got[k])
    assert list(got.values()) == pytest.approx([3.71, 4.50, 9.13, 8.49, 8.20, 11.38], abs=.006)


def test_real_figures_of_the_notebook(real):
    "The counts and training ranges that the notebook prints are those of the lists"
    cells = [''.join(c['source']) for c in json.loads(NOTEBOOK.read_text())['cells'] if c['cell_type'] == 'code']
    tree = ast.parse(next(c for c in cells if c.startswith('COUNTS = ')))
    box = {}
    exec(compile(ast.Module([node for node in tree.body if isinstance(node, ast.Assign)], []), 'cell', 'exec'), box)
    assert box['TRAIN'] == ranges_of(real, 'train')
    for k, row in SPORTS.items():
        assert box['COUNTS'][k] == tuple(np.histogram(scores(real, k, s), np.linspace(row.lo, row.hi, 15))[0].tolist() for s in SPLITS)


def test_average_of_the_classes_is_fishers():
    "Table X's averages: Fisher's z over the six classes, as FSPN's row shows (printed 0.8724, D-08)"
    df = paper_table('X')
    row = df[df.method == 'fspn'].set_index('protocol').rho
    assert fisher_mean([row[k] for k in SPORTS]) == pytest.approx(.8734, abs=1e-4)


def damaged(data, rng):
    "One mutation: flipped bytes, a cut, a hole, or foreign bytes"
    out, kind = bytearray(data), rng.randrange(4)
    at = rng.randrange(len(out))
    if kind == 0:
        for _ in range(rng.randint(1, 4)): out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    elif kind == 1: del out[at:]
    elif kind == 2: del out[at:at+rng.randint(1, 40)]
    else: out[at:at+8] = bytes(rng.randrange(256) for _ in range(8))
    return bytes(out)


def survive(folder, files, n, seed):
    "Read `n` mutations of the two lists `files` {name: bytes}; returns how many could be read"
    rng, names, read = random.Random(seed), sorted(files), 0
    for i in range(n):
        name = names[i % 2]
        for file, data in files.items(): (folder/file).write_bytes(damaged(data, rng) if file == name else data)
        problems = [] if i % 3 else None
        try: samples = read_aqa7(None, annotations=folder, problems=problems)
        except ValueError as e:
            assert name in str(e) or '/' in str(e), e
            continue
        read += 1
        assert all(SPORTS[s.action].lo <= s.score <= SPORTS[s.action].hi for s in samples)
        assert len({s.uid for s in samples}) == len(samples) and (len(samples) == 1106 or problems)
    return read


@pytest.mark.parametrize('packed', (True, False))
def test_real_lists_damaged(packed, shared, tmp_path, capsys):
    "150 mutations, of the files as released and of the same lists unpacked (where a flipped score may be another valid one)"
    files = {(path:=shared('data', 'aqa7', f'consolidated_{s}_list.mat')).name: path.read_bytes() for s in SPLITS}
    if not packed: files = {file: mat_bytes(file[:-4], loadmat(io.BytesIO(data))[file[:-4]], False) for file, data in files.items()}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        read = survive(tmp_path, files, 150, seed=7)
    assert time.perf_counter()-start < 60 and read < 100
    printed = capsys.readouterr()
    assert printed.err == '' and all(line.endswith('they were divided by 100') or line.startswith('trampoline') for line in printed.out.splitlines())


# ---- the two names, the three places

@pytest.mark.parametrize('name', (OFFICIAL, COPY))
@pytest.mark.parametrize('scale', (1, 100))
@pytest.mark.parametrize('place', ('Split_4', '.', 'apart'))
def test_lists_are_found_and_their_unit_is_said(name, scale, place, tmp_path, capsys):
    put(tmp_path/place, name, scale)
    samples = read_aqa7(tmp_path, annotations=tmp_path/place if place == 'apart' else None)
    assert [s.score for s in samples] == [row[2] for s in SPLITS for row in GOOD[s]]
    assert [s.uid for s in samples] == ['diving/054', 'diving/041', 'gym_vault/009', 'sync_diving_10m/003', 'diving/001', 'gym_vault/003']
    assert samples[-1].folder == tmp_path/'gym_vault-out'/'003' and (samples[0].start_frame, samples[0].end_frame) == (1, 103)
    printed = capsys.readouterr().out
    assert ('100 x points' in printed) == (scale == 100) and printed.count('\n') == (scale == 100)


def test_each_file_has_its_own_unit(tmp_path, capsys):
    put(tmp_path)
    put(tmp_path/'x', scale=100)
    (tmp_path/'x'/OFFICIAL.format('test')).replace(tmp_path/OFFICIAL.format('test'))
    assert [s.score for s in read_aqa7(tmp_path) if s.split == 'test'] == [84.15, 15.1]
    assert capsys.readouterr().out.startswith('split_4_test_list.mat: scores are 100 x points')


def test_no_lists_half_a_pair_two_pairs(tmp_path):
    with pytest.raises(FileNotFoundError, match='found none; pass the folder'): read_aqa7(tmp_path)
    put(tmp_path/'deep'/'Split_4')
    with pytest.raises(FileNotFoundError, match='did you mean .*deep'): read_aqa7(tmp_path)
    put(tmp_path, COPY)
    assert len(read_aqa7(tmp_path)) == 6
    (tmp_path/COPY.format('test')).unlink()
    with pytest.raises(FileNotFoundError, match='consolidated_test_list.mat, found none'): read_aqa7(tmp_path)
    put(tmp_path/'Split_4')
    with pytest.raises(ValueError, match='need one pair of lists, got 2'): read_aqa7(tmp_path)
    assert len(read_aqa7(tmp_path, annotations=tmp_path/'Split_4')) == 6


# ---- rows

WRONG = {
    'class 8': ((8, 5, 50.), 'class id: need a whole number from 1 to 7', 'row 5'),
    'class 1.5': ((1.5, 5, 50.), 'class id', 'row 5'),
    'class nan': ((np.nan, 5, 50.), 'class id', 'row 5'),
    'class inf': ((np.inf, 5, 50.), 'class id', 'row 5'),
    'class 0': ((0, 5, 50.), 'class id', 'row 5'),
    'id 0': ((1, 0, 50.), 'sample id: need a whole number from 1 to 999', 'row 5'),
    'id 1000': ((1, 1000, 50.), 'sample id', 'row 5'),
    'id 2.5': ((1, 2.5, 50.), 'sample id', 'row 5'),
    'score nan': ((1, 5, np.nan), 'need scores of class 1 .diving.*got nan', 'diving/005'),
    'score inf': ((1, 5, np.inf), 'got inf', 'diving/005'),
    'score high': ((2, 5, 84.15), 'class 2 .gym_vault. in points, 12.3 to 16.87, or 100 x points, 1230 to 1687', 'gym_vault/005'),
    'other unit': ((2, 5, 1510.), 'one unit per file, got 1510', 'gym_vault/005'),
    'twice': ((1, 54, 29.7), 'need every video once in both lists together, got it 2 times in the train list', 'diving/054'),
    'both': ((2, 3, 15.1), 'in the train and in the test list', 'gym_vault/003'),
}


@pytest.mark.parametrize('what', WRONG)
def test_wrong_row(what, tmp_path):
    "Raises by default; with a list, the video is named and left out and all others are read"
    row, match, uid = WRONG[what]
    put(tmp_path, train=[*GOOD['train'], row])
    with pytest.raises(ValueError, match=match): read_aqa7(tmp_path)
    problems = []
    samples = read_aqa7(tmp_path, problems=problems)
    assert [problem[0].endswith(uid) for problem in problems] == [True] and type(problems[0][1]) is str
    assert len(samples) == (5 if what in ('twice', 'both') else 6) and uid not in {s.uid for s in samples}


def test_trampoline_is_left_out_and_counted(tmp_path, capsys):
    put(tmp_path, train=[*GOOD['train'], (7, 1, 40.), (7, 2, 41.)], test=[*GOOD['test'], (7, 3, 42.)])
    assert len(read_aqa7(tmp_path)) == 6
    assert capsys.readouterr().out == 'trampoline videos (class 7) left out, as in every published table: 3\n'
    problems = []
    assert len(read_aqa7(tmp_path, problems=problems)) == 6
    assert [uid for uid, _ in problems] == [f'trampoline/00{i}' for i in (1, 2, 3)]
    put(tmp_path, test=[(7, 3, 42.)])
    with pytest.raises(ValueError, match='need videos of the six classes'): read_aqa7(tmp_path, problems=[])


def test_scores_in_no_known_unit(tmp_path):
    "Normalised or inverted scores stop the reading, whoever asks; the message shows class, values and both units"
    put(tmp_path, train=[(1, i, i/10) for i in range(1, 10)])
    for problems in (None, []):
        with pytest.raises(ValueError, match=r'split_4_train_list.mat: need scores of class 1 \(diving\) in points, 21.6 to 102.6, or 100 x points, 2160 to 10260, .*got 0.1 to 0.9 in 9 rows'):
            read_aqa7(tmp_path, problems=problems)


def test_nothing_left(tmp_path):
    put(tmp_path, train=[(1, 1, 50.)], test=[(1, 1, 50.)])
    with pytest.raises(ValueError, match='at least one video without a fault'): read_aqa7(tmp_path, problems=[])


# ---- hostile files

def element(kind, raw, claim=None): return struct.pack('<II', kind, len(raw) if claim is None else claim)+raw+bytes(-len(raw) % 8)


def variable(flags=6, sizes=(4, 3), name=b'consolidated_train_list', numbers=None, claim=None):
    numbers = np.array(GOOD['train'], float).T.tobytes() if numbers is None else numbers
    return element(14, element(6, struct.pack('<II', flags, 0))+element(5, struct.pack(f'<{len(sizes)}i', *sizes))+element(1, name)+element(9, numbers, claim))


def mat5(*variables): return b'x'.ljust(124)+b'\0\1IM'+b''.join(variables)


def saved(value, name='consolidated_train_list', **options):
    savemat(out:=io.BytesIO(), {name: value}, **options)
    return out.getvalue()


def packed(raw):
    "An element packed with zlib"
    return struct.pack('<II', 15, len(z:=zlib.compress(raw)))+z


TABLE = np.array(GOOD['train'], float)
HOSTILE = {
    'empty': b'', 'short': b'MATLAB', 'text': b'1 54 29.7\n'*50, 'pickle': b'\x80\x03}q\x00.'*40, 'zeros': bytes(400), 'ones': b'\xff'*400,
    'header only': mat5(), 'hdf5': b'\x89HDF\r\n\x1a\n'+bytes(600), 'v7.3': b'MATLAB 7.3 MAT-file'.ljust(124)+b'\0\2IM'+bytes(400),
    'v4': saved(TABLE, format='4'), 'text value': saved('text'), 'cell': saved(np.array([TABLE, 'a'], dtype=object)), 'struct': saved({'a': TABLE}),
    'complex': saved(TABLE*1j), 'logical': saved(TABLE > 3), 'singles': saved(TABLE.astype('f4')),
    '3-d': saved(TABLE[None]), 'vector': saved(TABLE[:, 0]), 'two columns': saved(TABLE[:, :2]), 'transposed': saved(TABLE.T), 'no rows': saved(np.zeros((0, 3))),
    'other name': saved(TABLE, 'scores'), 'name twice': mat5(variable(), variable()), 'sparse': mat5(variable(flags=5)), 'object': mat5(variable(flags=3)),
    'terabyte': mat5(variable(claim=2**32-1)), 'huge sizes': mat5(variable(sizes=(2**31-1, 2**31-1))), 'negative sizes': mat5(variable(sizes=(-4, -3))),
    'no sizes': mat5(variable(sizes=())), 'many sizes': mat5(variable(sizes=(1,)*1000)), 'long name': mat5(variable(name=b'\xff\n'*5000)),
    'element of 4 GB': mat5(struct.pack('<II', 14, 2**32-1)+bytes(64)), 'wrong type': mat5(element(9, bytes(64))), 'bomb': mat5(packed(bytes(2**26))), 'bombs': mat5(*[packed(element(14, b'')+bytes(2**22))]*200), 'packed in packed': mat5(packed(packed(variable()))),
    'bad zlib': mat5(element(15, b'\x78\x9c'+bytes(30))), 'infinite': mat5(variable(numbers=np.full(12, np.inf).tobytes())),
    'not a number': mat5(variable(numbers=np.full(12, np.nan).tobytes())),
}


@pytest.mark.parametrize('what', HOSTILE)
def test_hostile_list(what, tmp_path):
    put(tmp_path)
    (tmp_path/OFFICIAL.format('train')).write_bytes(HOSTILE[what])
    start = time.perf_counter()
    with pytest.raises(ValueError, match='split_4_train_list.mat') as e: read_aqa7(tmp_path)
    assert time.perf_counter()-start < 5 and len(str(e.value)) < 1000 and '\n' not in str(e.value)
    if what not in ('infinite', 'not a number'): # those two can be pinned on rows, but no row is left
        with pytest.raises(ValueError, match='split_4_train_list.mat'): read_aqa7(tmp_path, problems=[])


def test_what_the_hostile_ones_are_built_from_is_read(tmp_path):
    (tmp_path/'a.mat').write_bytes(mat5(variable(name=b'other'), variable()))
    assert np.array_equal(load_mat(tmp_path/'a.mat', 'consolidated_train_list'), TABLE)


@pytest.mark.parametrize('kind', ['i1', 'u1', 'i2', 'u2', 'i4', 'u4', 'i8', 'u8'])
@pytest.mark.parametrize('packed', [False, True])
def test_lists_saved_again_as_whole_numbers(tmp_path, kind, packed):
    "SciPy's `loadmat` hands whole doubles on as short whole numbers; `savemat` then writes those"
    whole = np.array([[1, 54, 30], [2, 9, 16]])
    savemat(tmp_path/'a.mat', {'list': whole.astype(kind)}, do_compression=packed)
    assert np.array_equal(load_mat(tmp_path/'a.mat', 'list'), whole) and load_mat(tmp_path/'a.mat', 'list').dtype == float


def test_the_real_lists_saved_again(shared, tmp_path):
    for split in ('train', 'test'):
        name = f'consolidated_{split}_list'
        real = shared('data', 'aqa7', f'{name}.mat')
        savemat(tmp_path/'again.mat', {name: loadmat(real)[name]})
        assert np.array_equal(load_mat(tmp_path/'again.mat', name), load_mat(real, name))


def test_large_file_and_folder_in_the_place_of_a_list(tmp_path):
    put(tmp_path)
    path = tmp_path/OFFICIAL.format('train')
    with open(path, 'r+b') as f: f.truncate(2**24+1)
    with pytest.raises(ValueError, match='need at most 16777216 bytes, got 16777217'): read_aqa7(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(FileNotFoundError, match='split_4_train_list.mat, found none'): read_aqa7(tmp_path)


def test_other_ways_to_store_the_same_list(tmp_path):
    "Unpacked, beside other variables, whole numbers stored short, and in the other byte order"
    path, whole = tmp_path/'a.mat', np.array([[1, 54, 30], [2, 9, 16]], float)
    savemat(path, {'a': 'text', 'b': {'c': [1, 2]}, 'list': TABLE, 'z': [np.eye(3)]})
    assert np.array_equal(load_mat(path, 'list'), TABLE)
    short = element(6, struct.pack('<II', 6, 0))+element(5, struct.pack('<2i', 2, 3))+struct.pack('<I4s', 4 << 16 | 1, b'list')+element(2, whole.T.astype('u1').tobytes())
    path.write_bytes(mat5(element(14, short)))
    assert np.array_equal(load_mat(path, 'list'), whole) and np.array_equal(loadmat(path)['list'], whole)
    big = lambda kind, raw: struct.pack('>II', kind, len(raw))+raw+bytes(-len(raw) % 8)
    body = big(6, struct.pack('>II', 6, 0))+big(5, struct.pack('>2i', 2, 3))+struct.pack('>I4s', 4 << 16 | 1, b'list')+big(9, whole.T.astype('>f8').tobytes())
    path.write_bytes(b'x'.ljust(124)+b'\1\0MI'+big(14, body))
    assert np.array_equal(load_mat(path, 'list'), whole) and np.array_equal(loadmat(path)['list'], whole)


# ---- frames, and there and back

def made():
    "Six acts, one of each class; the last two are for testing"
    keys = [(k, 10*i+1) for i, k in enumerate(SPORTS)]
    return [(k, act(SPORTS[k[0]].lo+2)) for k in keys], keys[:4], keys[4:]


def test_round_trip(tmp_path, capsys):
    acts, train, test = made()
    folder = write_aqa7(tmp_path, acts, train, test)
    assert sorted(path.name for path in folder.iterdir()) == [OFFICIAL.format(s) for s in sorted(SPLITS)]
    samples = check_samples(read_aqa7(tmp_path))
    assert capsys.readouterr().out == ''
    assert [(s.action, int(s.uid[-3:])) for s in samples] == train+test and [s.split for s in samples] == ['train']*4+['test']*2
    assert [s.score for s in samples] == [s.score for _, s in acts]
    assert samples[2].files == tuple(f'img_{i:05d}.jpg' for i in range(1, 104)) and samples[2].before == samples[2].after == ()
    for split in SPLITS: assert loadmat(folder/OFFICIAL.format(split))[f'consolidated_{split}_list'].dtype == float
    assert not [path for path in tmp_path.rglob('*') if 'part' in path.name]


def test_equal_acts_give_equal_bytes(tmp_path, monkeypatch):
    acts, train, test = made()
    for name in ('a', 'b'):
        write_aqa7(tmp_path/name, acts, train, test)
        monkeypatch.setattr(time, 'asctime', lambda *_: 'Mon Jan  1 00:00:00 1990')
    tree = lambda root: {path.relative_to(root): path.read_bytes() for path in root.rglob('*') if path.is_file()}
    assert tree(tmp_path/'a') == tree(tmp_path/'b') and len(tree(tmp_path/'a')) == 2+6*103


def test_frames_missing_and_mixed(tmp_path, capsys):
    acts, train, test = made()
    write_aqa7(tmp_path, acts, train, test)
    first, second, third, fourth = (s.folder for s in read_aqa7(tmp_path)[:4])
    (first/'img_00103.jpg').unlink()
    for path in second.iterdir(): path.unlink()
    (third/'img_00104.jpg').write_bytes(b'')
    (third/'Thumbs.db').write_bytes(b'')
    capsys.readouterr()
    samples = read_aqa7(tmp_path)
    assert capsys.readouterr().out == f'videos with more than 103 frames: 1, the first is {third}; 1 to 103 are read\n'
    assert [frame_problem(s) for s in samples[:4]] == ['fewer frames than labels: 102 of 103', 'no frames', None, None]
    (fourth/'img_000007.jpg').write_bytes(b'')
    with pytest.raises(ValueError, match='need one file per frame number, got img_000007.jpg and img_00007.jpg'): read_aqa7(tmp_path)
    problems = []
    assert len(read_aqa7(tmp_path, problems=problems)) == 5 and problems[0][0] == samples[3].uid


def rename(folder, name):
    "Give each frame of `folder` the name that `name(number)` makes"
    files = sorted(folder.iterdir())
    for path in files: path.rename(path.with_name(f'x{path.name}'))
    for path in files: path.with_name(f'x{path.name}').rename(path.with_name(name(int(path.stem[-5:]))))


def harm(root):
    "What `fspn_check` calls missing or wrong, but for the equal grey films"
    return list(check_release('aqa7', root, decode=True).query('severity != "note" and kind != "same frames"').itertuples())


@pytest.mark.parametrize('n', (103, 104))
def test_frames_counted_from_zero_are_refused(tmp_path, n):
    "Whether or not number 103 is there too: every video would be one frame late"
    acts, train, test = made()
    write_aqa7(tmp_path, acts, train, test)
    folder = read_aqa7(tmp_path)[1].folder
    rename(folder, lambda i: f'img_{i-1:05d}.jpg')
    if n == 104: (folder/'img_00103.jpg').write_bytes((folder/'img_00102.jpg').read_bytes())
    with pytest.raises(ValueError, match=f'{folder}: need frames numbered from 1, got img_00000.jpg; .*one frame late'): read_aqa7(tmp_path)
    row, = harm(tmp_path)
    assert row.kind == 'wrong entry' and 'numbered from 1, got img_00000.jpg' in row.detail
    for k, i in train[:1]+train[2:]+test: rename(tmp_path/f'{k}-out'/f'{i:03d}', lambda i: f'img_{i-1:05d}.jpg') # all of them
    row, = harm(tmp_path)
    assert row.kind == 'unreadable release' and 'numbered from 1, got img_00000.jpg' in row.detail


@pytest.mark.parametrize('ending', ('png', 'webp', 'JPEG'))
def test_other_formats_under_the_right_number(tmp_path, ending):
    acts, train, test = made()
    write_aqa7(tmp_path, acts, train, test)
    folder = read_aqa7(tmp_path)[1].folder
    for path in list(folder.iterdir()):
        with Image.open(path) as image: image.save(path.with_suffix(f'.{ending}'), lossless=True)
        if ending != 'JPEG': path.unlink()
    if ending == 'JPEG':
        with pytest.raises(ValueError, match='need one file per frame number, got img_00001.JPEG and img_00001.jpg'): read_aqa7(tmp_path)
        return
    samples = check_samples(read_aqa7(tmp_path))
    assert samples[1].files[0] == f'img_00001.{ending}' and (load_frames(samples[1], [0, 102]).float()-90).abs().max() <= 2
    assert harm(tmp_path) == []


OTHER_NAMES = { # what was done to the first video: what the message says of it
    'frame_': (lambda f: rename(f, lambda i: f'frame_{i:05d}.jpg'), 'this folder holds 103 other names .frame_00001.jpg, frame_00002.jpg, ....'),
    'no prefix': (lambda f: rename(f, lambda i: f'{i:05d}.png'), 'this folder holds 103 other names .00001.png'),
    'bmp': (lambda f: rename(f, lambda i: f'img_{i:05d}.bmp'), 'img_00001.bmp'),
    'folder of two digits': (lambda f: f.rename(f.with_name(f.name[1:])), "there is no 001 in .*diving-out, which holds 1 other name .01.; did you mean .*diving-out.01[?]"),
    'capitals': (lambda f: f.parent.rename(f.parent.with_name('Diving-Out')), 'there is no diving-out in .*; did you mean .*Diving-Out[?]'),
    'underscore': (lambda f: f.parent.rename(f.parent.with_name('diving_out')), 'did you mean .*diving_out[?]'),
    'one folder deeper': (lambda f: [(f/'frames').mkdir(), *[path.rename(f/'frames'/path.name) for path in list(f.glob('*.jpg'))]], 'this folder holds 1 other name .frames.'),
    'nothing there': (lambda f: [path.unlink() for path in f.iterdir()], 'this folder holds nothing'),
    'hidden files of an archive': (lambda f: rename(f, lambda i: f'._img_{i:05d}.jpg'), 'this folder holds nothing'),
}


@pytest.mark.parametrize('what', OTHER_NAMES)
def test_what_lies_there_instead_is_said(tmp_path, what):
    "By the run and by the checker"
    change, words = OTHER_NAMES[what]
    acts, train, test = made()
    write_aqa7(tmp_path, acts, train, test)
    change(tmp_path/'diving-out'/'001')
    with pytest.raises(FileNotFoundError, match=f'1 with no frames: diving/001. .*{words}'): check_samples(read_aqa7(tmp_path))
    row, = harm(tmp_path)
    assert row.kind == 'no frames' and re.search(f'^none of 103; .*{words}', row.detail) and row.file == str(tmp_path/'diving-out'/'001')


def test_writer_refuses(tmp_path):
    acts, train, test = made()
    blind = [(k, replace_frames(act)) for k, act in acts]
    write = lambda a=blind, tr=train, te=test, **k: write_aqa7(tmp_path, a, tr, te, **k)
    with pytest.raises(ValueError, match='at least one act in the test list'): write(te=[])
    with pytest.raises(ValueError, match='got .* again'): write(te=test+train[:1])
    with pytest.raises(ValueError, match='every act once'): write(a=blind+blind[:1])
    with pytest.raises(ValueError, match='every act once and in one list'): write(te=test[:1])
    with pytest.raises(ValueError, match='need an act for every key'): write(a=blind[1:])
    for bad in (('trampoline', 1), ('diving', 0), ('diving', 1000), ('diving', 1.5), ('diving', True)):
        with pytest.raises(ValueError, match='trampoline|sample id'): write(tr=[bad])
    with pytest.raises(ValueError, match='need scores of class 1'): write(a=[(blind[0][0], act(float('nan'), None)), *blind[1:]])
    assert not (tmp_path/'Split_4').exists()
    write()
    with pytest.raises(ValueError, match='need a folder without lists'): write()
    write(overwrite=True)
    with pytest.raises(ValueError, match=r'\(103,H,W,3\) uint8, got'): write_act_frames(tmp_path, 'diving', 5, GREY/255)
    write_act_frames(tmp_path, 'diving', 5, GREY)
    with pytest.raises(ValueError, match='not there yet'): write_act_frames(tmp_path, 'diving', 5, GREY)


def replace_frames(act): return SimpleNamespace(score=act.score, frames=None)


def test_made_up_acts_are_within_the_ranges(tmp_path):
    "What `synth_act` draws for every class can be written and read"
    from fspn_nb.synthetic.sport_render import synth_act
    acts = [((k, i+1), synth_act(i, k, draw=False)) for k in SPORTS for i in range(4)]
    keys = [k for k, _ in acts]
    write_aqa7(tmp_path, acts, keys[::2], keys[1::2])
    assert {s.uid: s.score for s in read_aqa7(tmp_path)} == {f'{k}/{i:03d}': s.score for (k, i), s in acts}


def test_ranges_of_one_training_sample(tmp_path):
    put(tmp_path)
    samples = read_aqa7(tmp_path)
    assert ranges_of(samples) == ranges_of([]) == {k: (row.lo, row.hi) for k, row in SPORTS.items()}
    divers = [s for s in samples if s.action == 'diving']
    assert ranges_of(divers, 'train') == {'diving': (29.7, 97.2)}
    with pytest.raises(ValueError, match='gym_vault: need two different training scores for a range, got 1'): ranges_of(samples, 'train')
    with pytest.raises(ValueError, match='got 0'): ranges_of([replace(s, split='test') for s in divers], 'train')
