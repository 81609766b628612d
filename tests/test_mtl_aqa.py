"What the MTL-AQA reader makes of the real annotations, of damaged trees and of hostile files"
import os
import pickle
import pickletools
import random
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from conftest import edit_pickle

from fspn_nb.data import mtl_aqa,release_files
from fspn_nb.data.finediving import read_finediving
from fspn_nb.data.mtl_aqa import MTL_AQA_FRAMES,read_mtl_aqa,write_mtl_aqa,write_video_frames
from fspn_nb.data.records import check_samples,frame_problem,samples_frame
from fspn_nb.data.safe_pickle import load_pickle
from fspn_nb.data.stats import judge_mismatches,mtl_aqa_stats
from fspn_nb.data.video_pieces import where_to_get
from fspn_nb.metrics import baseline_predictions,relative_l2,spearman
from fspn_nb.synthetic.dive_motion import make_dive

CORE, MUSDL, TRAIN, TEST = 'final_annotations_dict_with_dive_number', 'augmented_final_annotations_dict', 'train_split_0', 'test_split_0'
AUTHOR = 'final_annotations_dict'
FOUR = (CORE, MUSDL, TRAIN, TEST)
REAL = dict(samples=1412, train=1059, test=353, action_types=58, difficulties=23, lone=1, zeros=2, judges_off=27, short=732, long=654)
KEYS = [(5, 1), (5, 2), (26, 7), (26, 8)]
ENDS = [130, 330, 150, 400]


def grey(n): return np.full((n, 8, 12, 3), 90, np.uint8)


def tree(root):
    "Annotations of four made-up dives from two broadcasts, the last one in the test split; returns the dives"
    dives = [(k, end, make_dive(i)) for i, (k, end) in enumerate(zip(KEYS, ENDS))]
    write_mtl_aqa(root, dives, KEYS[:-1], KEYS[-1:])
    return dives


@pytest.fixture
def small(tmp_path):
    "Root of a fresh small release without frames"
    tree(tmp_path/'mtl')
    return tmp_path/'mtl'


@pytest.fixture(scope='session')
def real(shared):
    "The real samples, read once"
    return read_mtl_aqa(None, annotations=shared('data', 'mtl_aqa', 'info'))


@pytest.fixture(scope='session')
def sheets(real):
    "Train and test dives as tables"
    return [samples_frame([s for s in real if s.split == split]) for split in ('train', 'test')]


def edit(root, name, change):
    "Change one pickle of the release"
    edit_pickle(root/'info'/f'{name}.pkl', change)


def empty_frames(root, video, numbers, padding=8):
    "Files with the names of frames"
    folder = root/MTL_AQA_FRAMES/f'{video:02d}'
    folder.mkdir(parents=True, exist_ok=True)
    for n in numbers: (folder/f'{n:0{padding}d}.jpg').touch()
    return folder


# ---- the real release

def test_real_counts(real):
    got = mtl_aqa_stats(real)
    assert {k: got[k] for k in REAL} == REAL and got['with_frames'] == 0
    assert len({s.uid.split('/')[0] for s in real}) == 15
    assert all(s.n_frames == 103 and s.end_frame == s.annotated_span[1] and len(s.judges) == 7 and s.folder is None and s.files == () for s in real)
    n = np.array([s.annotated_span[1]-s.annotated_span[0] for s in real])
    assert (n.min(), n.max(), round(n.mean())) == (54, 273, 106)
    by = {s.uid: s for s in real}
    assert [by[uid].annotated_span[1]-by[uid].annotated_span[0] for uid in ('26/108', '05/42')] == [54, 273]
    assert min(s.start_frame for s in real) > 1000 # no real window begins before the broadcast


def test_real_scores_and_groups(sheets):
    train, test = sheets
    assert (train.score.max(), test.score.max(), train.score.min(), test.score.min()) == (102.6, 104.5, 0, 0)
    assert (test[test.score == 0].uid.tolist(), train[train.score == 0].uid.tolist()) == (['17/35'], ['17/164'])
    assert set(test.difficulty) <= set(train.difficulty) and set(test.action) <= set(train.action) and test.difficulty.nunique() == 19
    small = {k: n for k, n in train.difficulty.value_counts().items() if n < 8}
    assert small == {1.5: 1, 2.3: 2, 2.6: 4, 4.1: 4, 2.1: 5, 2.4: 5, 3.9: 6, 1.8: 7}
    assert train[train.difficulty == 1.5].uid.tolist() == ['07/7']
    score, dd = np.concatenate([train.score, test.score]), np.concatenate([train.difficulty, test.difficulty])
    assert np.corrcoef(score, dd)[0, 1] == pytest.approx(.62, abs=5e-3) and (score/dd).max() < 29.01


def test_real_figures_of_the_notebook(real):
    "The histograms that the notebook prints are those of the annotations"
    score, dd = np.array([(s.score, s.difficulty) for s in real]).T
    assert np.histogram(score, np.arange(0, 106, 5))[0].tolist() == [2, 1, 0, 2, 7, 10, 33, 51, 80, 71, 84, 94, 125, 163, 191, 162, 131, 111, 61, 25, 8]
    assert np.histogram(np.round(score/dd, 6), np.arange(0, 31, 1.5))[0].tolist() == [2, 0, 1, 1, 3, 5, 9, 25, 37, 29, 54, 71, 88, 145, 223, 249, 234, 141, 78, 17]
    spans = [s.annotated_span[1]-s.annotated_span[0]+1 for s in real]
    assert np.histogram(spans, np.arange(50, 281, 10))[0].tolist() == [2, 9, 72, 285, 296, 236, 156, 106, 86, 73, 48, 21, 10, 5, 3, 1, 1, 0, 1, 0, 0, 0, 1]


def test_real_judges_are_reported_and_not_repaired(real):
    wrong = judge_mismatches(real).set_index('uid')
    assert len(wrong) == 27 and not wrong.odd_marks.any() and wrong.gap.idxmax() == '01/70'
    assert wrong.loc['01/70', ['stored', 'computed']].tolist() == [18.15, 37.95]
    assert len(judge_mismatches(real, tolerance=0)) == 30 # three scores were rounded to one decimal
    assert next(s for s in real if s.uid == '01/70').score == 18.15
    dd = {s.uid: s.difficulty for s in real}
    assert sum(abs(gap/dd[uid]-.5) < 1e-6 for uid, gap in wrong.gap.items()) == 15
    test = [s for s in real if s.split == 'test']
    assert spearman([sum(sorted(s.judges)[2:5])*s.difficulty for s in test], [s.score for s in test]) == pytest.approx(.9998, abs=5e-5)


def test_real_baselines_without_a_frame(sheets):
    train, test = sheets
    baselines = {k: (spearman(v, test.score), 100*relative_l2(v, test.score)) for k, v in baseline_predictions(train, test).items() if k != 'constant mean'}
    assert baselines['mean(score/difficulty) x difficulty'] == (pytest.approx(.5595, abs=5e-5), pytest.approx(2.067, abs=5e-4))
    assert baselines['action-type mean'] == (pytest.approx(.5963, abs=5e-5), pytest.approx(2.004, abs=5e-4))
    assert 100*relative_l2(np.full(len(test), train.score.mean()), test.score) == pytest.approx(3.02, abs=5e-3)


@pytest.mark.parametrize('protocol, n, top, edges', [
    ('w/ DD', 67_562, 30, [0, .912, 1.5, 2.5, 3, 4.5, 6, 8.5, 30]), ('w/o DD', 560_211, 100, [0, 3.6, 7.35, 11.2, 15.7, 20.8, 27.2, 36.3, 100])])
def test_real_intervals_are_those_of_the_literature(sheets, protocol, n, top, edges):
    from fspn_nb.models.heads import ScoreBins,pair_differences
    train = sheets[0]
    labels, groups = (train.score/train.difficulty, train.difficulty.tolist()) if protocol == 'w/ DD' else (train.score, None)
    assert len(pair_differences(labels.to_numpy(), groups)) == n
    bins = ScoreBins.fit_pairs(labels.to_numpy(), groups, top=top)
    assert np.allclose([0, *bins.hi[8:].tolist()], edges, atol=6e-4)


def part(shared, tmp_path, *names):
    "A folder with some of the real files"
    for name in names: (tmp_path/f'{name}.pkl').write_bytes(shared('data', 'mtl_aqa', 'info', f'{name}.pkl').read_bytes())
    return tmp_path


def test_real_annotations_without_cores_file(real, shared, tmp_path):
    "The composed dive number is the released one in all 1,412 dives; the typing error at (4, 49) is still there"
    samples = read_mtl_aqa(None, part(shared, tmp_path, MUSDL, TRAIN, TEST))
    assert sum(a.action == b.action for a, b in zip(samples, real)) == len(samples) == 1412
    odd = [(a.uid, a.judges[3], b.judges[3]) for a, b in zip(samples, real) if replace(a, judges=b.judges) == b and a.judges != b.judges]
    assert odd == [('04/49', 45, 4.5)] and sum(a != b for a, b in zip(samples, real)) == 1
    wrong = judge_mismatches(samples).set_index('uid')
    assert len(wrong) == 28 and wrong.loc['04/49', ['gap', 'odd_marks']].tolist() == [0, 1]


def test_real_annotations_without_musdls_file(real, shared, tmp_path):
    assert read_mtl_aqa(None, part(shared, tmp_path, CORE, TRAIN, TEST)) == real


def test_real_dive_numbers_are_composed(real, shared):
    "One half somersault is counted as none in 27 dives, and 16 of these carry another letter than in FineDiving, which has the same broadcasts"
    other = {s.uid: s for s in read_finediving(None, annotations=shared('data', 'finediving', 'Annotations'))}
    pairs = Counter()
    for s in real:
        twin = other.get(f"{s.uid[:2]}/{s.uid[3:]}")
        if s.action[:3] in ('100', '200', '300') or s.action == '201B':
            assert twin.score == s.score and abs(twin.end_frame-s.end_frame) < 3
            pairs[s.action, twin.action] += 1
    assert pairs == {('100B', '101b'): 1, ('200B', '201b'): 2, ('200D', '201b'): 5, ('300B', '301b'): 8, ('300D', '301b'): 11, ('201B', '205b'): 1}


def test_real_annotations_are_read_fast(shared):
    start = time.perf_counter()
    assert len(read_mtl_aqa(None, shared('data', 'mtl_aqa', 'info'))) == 1412
    assert time.perf_counter()-start < 8 # half a second on an idle core


def test_real_root_without_frames_says_what_to_do(shared):
    root = shared('data', 'mtl_aqa')
    if (root/MTL_AQA_FRAMES).exists(): pytest.skip('frames are there')
    with pytest.raises(FileNotFoundError, match='root=None'): read_mtl_aqa(root)


def test_real_release_survives_our_writer(shared, tmp_path, monkeypatch):
    "The real values through our writer: same types, same order of dives and fields, the same opcodes but for NumPy 2's truth values"
    theirs = {name: load_pickle(shared('data', 'mtl_aqa', 'info', f'{name}.pkl')) for name in FOUR}
    plain = {k: v | dict(judge_scores=np.array(v['judge_scores'])) for k, v in theirs[CORE].items()}
    monkeypatch.setattr(mtl_aqa, '_record', lambda key, end, dive: dict(plain[key]))
    folder = write_mtl_aqa(tmp_path, ((k, None, None) for k in plain), theirs[TRAIN], theirs[TEST])
    ops = lambda path: [path.name for path, _, _ in pickletools.genops(path.read_bytes())]
    for name in FOUR:
        ours = load_pickle(folder/f'{name}.pkl')
        real = shared('data', 'mtl_aqa', 'info', f'{name}.pkl')
        assert (folder/f'{name}.pkl').read_bytes()[:2] == real.read_bytes()[:2] == (b'\x80\x04' if name == CORE else b'\x80\x03')
        assert list(ours) == list(theirs[name])
        if name in (TRAIN, TEST): assert (folder/f'{name}.pkl').read_bytes() == real.read_bytes()
        else:
            shape = lambda record: [(k, type(v), getattr(v, 'dtype', None)) for k, v in record.items()]
            assert all(shape(ours[k]) == shape(theirs[name][k]) for k in theirs[name])
            assert Counter(ops(folder/f'{name}.pkl'))-Counter(ops(real)) <= Counter(NEWFALSE=1, NEWTRUE=1)
            assert b'numpy.core.multiarray' in (folder/f'{name}.pkl').read_bytes()
    assert len(read_mtl_aqa(None, folder)) == 1412


# ---- round trip

def test_round_trip(tmp_path):
    dives = tree(tmp_path)
    for video in (5, 26): write_video_frames(tmp_path, video, 1, grey(401))
    samples = check_samples(read_mtl_aqa(tmp_path))
    for s, (key, end, d) in zip(samples, dives):
        assert (s.uid, s.split) == (f'{key[0]:02d}/{key[1]}', 'test' if key == KEYS[-1] else 'train')
        assert (s.action, s.score, s.difficulty, s.judges) == (d.action.upper(), d.score, d.difficulty, d.judges)
        assert (s.start_frame, s.end_frame, s.annotated_span) == (end-102, end, (end-len(d.labels)+1, end))
        assert [int(name[:-4]) for name in s.files] == list(range(end-102, end+1))
        assert [int(name[:-4]) for name in s.before] == [end-105, end-104, end-103]
        assert [int(name[:-4]) for name in s.after] == [n for n in (end+1, end+2, end+3) if n <= 401]
        by_position = sorted(os.listdir(s.folder))[end-103:end] # what the peers read
        assert by_position == list(s.files)


@pytest.mark.parametrize('name', [CORE, MUSDL])
def test_either_file_is_enough(small, name):
    both = read_mtl_aqa(small)
    (small/'info'/f'{name}.pkl').unlink()
    assert read_mtl_aqa(small) == both
    edit(small, MUSDL if name == CORE else CORE, lambda v: v[KEYS[0]].update(final_score=1.))
    assert read_mtl_aqa(small)[0].score == 1


def test_every_catalogued_dive_can_be_written(tmp_path):
    from fspn_nb.synthetic.catalogue import ACTIONS
    dives = [((1, i), 1000*(i+1), make_dive(i, a)) for i, a in enumerate(ACTIONS)]
    write_mtl_aqa(tmp_path, dives, [k for k, _, _ in dives][:-1], [dives[-1][0]])
    assert [s.action for s in read_mtl_aqa(tmp_path)] == [a.upper() for a in ACTIONS]
    types = load_pickle(tmp_path/'info'/f'{CORE}.pkl')[1, 0]
    assert [type(v).__name__ for v in types.values()] == ['int']*4+['float']+['int']*4+['float', '_Array', 'str'] and types['judge_scores'].dtype == np.float64
    assert pickle.loads((tmp_path/'info'/f'{CORE}.pkl').read_bytes())[1, 0]['judge_scores'].shape == (7,) # as the peers open it


@pytest.mark.parametrize('action', ['101a', '113b', '6241a', 'x', ''])
def test_dives_that_the_fields_cannot_express(tmp_path, action):
    with pytest.raises(ValueError, match='need a dive'): write_mtl_aqa(tmp_path, [((1, 1), 500, replace(make_dive(0), action=action))], [], [])
    assert not (tmp_path/'info').exists()


def test_writer_is_repeatable_and_replaces_nothing_unasked(tmp_path):
    for name in 'ab': tree(tmp_path/name)
    before = [(tmp_path/'a/info'/f'{n}.pkl').read_bytes() for n in FOUR]
    assert before == [(tmp_path/'b/info'/f'{n}.pkl').read_bytes() for n in FOUR]
    with pytest.raises(ValueError, match='overwrite=True'): write_mtl_aqa(tmp_path/'a', [], [], [])
    assert before == [(tmp_path/'a/info'/f'{n}.pkl').read_bytes() for n in FOUR]
    one = [(KEYS[0], 500, make_dive(0))]
    with pytest.raises(ValueError, match='every key once'): write_mtl_aqa(tmp_path/'c', one*2, [], [])
    write_mtl_aqa(tmp_path/'a', one, KEYS[:1], [], overwrite=True)
    with pytest.raises(ValueError, match='test_split_0.pkl: need a list that is not empty'): read_mtl_aqa(tmp_path/'a')


def test_frames_are_written_whole_and_once(tmp_path):
    folder = write_video_frames(tmp_path, 3, 5, grey(4))
    assert sorted(os.listdir(folder)) == [f'{n:08d}.jpg' for n in range(5, 9)] # no half-written file either
    with pytest.raises(ValueError, match='not there yet, got 1 of them'): write_video_frames(tmp_path, 3, 8, grey(2))
    for first, frames, padding in ((0, grey(1), 8), (-1, grey(1), 8), (99, grey(2), 2), (1, grey(1), 10), (1, grey(1), 0), (9, grey(1)/255, 8), (9, grey(1)[0], 8), ('9', grey(1), 8)):
        with pytest.raises(ValueError, match='need'): write_video_frames(tmp_path, 3, first, frames, padding=padding)
    assert len(os.listdir(folder)) == 4


# ---- frames by number

@pytest.mark.parametrize('padding', [1, 6, 8, 9])
def test_any_padding(small, padding):
    for video in (5, 26): empty_frames(small, video, range(1, 420), padding)
    samples = check_samples(read_mtl_aqa(small))
    assert [(s.files[0], s.files[-1]) for s in samples] == [(f'{e-102:0{padding}d}.jpg', f'{e:0{padding}d}.jpg') for e in ENDS]


def test_missing_frames_are_reported_and_move_nothing(small):
    empty_frames(small, 5, [n for n in range(1, 420) if n not in (3, 100, 328)])
    a, b, *rest = read_mtl_aqa(small)
    assert frame_problem(a) == 'fewer frames than labels: 102 of 103' and a.files[0] == '00000028.jpg' and '00000101.jpg' in a.files
    assert b.files[0] == '00000228.jpg' and frame_problem(b) # 3 is missing too, and moved nothing
    assert [frame_problem(s) for s in rest] == ['no frames']*2
    with pytest.raises(FileNotFoundError, match='4 of 4'): check_samples(read_mtl_aqa(small))


def test_a_frame_missing_beside_the_window_ends_what_adjoins(small):
    empty_frames(small, 5, [n for n in range(1, 420) if n not in (26, 131)])
    a = read_mtl_aqa(small)[0]
    assert frame_problem(a) is None and (a.before, a.after) == (('00000027.jpg',), ())


def test_a_window_that_begins_before_the_broadcast(tmp_path):
    write_mtl_aqa(tmp_path, [((5, 1), 98, make_dive(2)), ((5, 2), 330, make_dive(1))], [(5, 1)], [(5, 2)])
    empty_frames(tmp_path, 5, range(1, 400))
    early, fine = read_mtl_aqa(tmp_path)
    assert early.start_frame == -4 and frame_problem(early) == 'fewer frames than labels: 98 of 103' and early.before == () and frame_problem(fine) is None


def test_one_number_twice(small):
    empty_frames(small, 5, range(1, 420))
    empty_frames(small, 5, [300, 410], padding=6) # 410 belongs to no dive
    with pytest.raises(ValueError, match='05: need one file per frame number, got 000*300.jpg and 000*300.jpg'): read_mtl_aqa(small)
    problems = []
    assert [s.uid for s in read_mtl_aqa(small, problems=problems)] == ['05/1', '26/7', '26/8']
    assert [uid for uid, _ in problems] == ['05/2']


def test_a_broadcast_numbered_from_zero(small):
    for video in (5, 26): empty_frames(small, video, range(1-(video == 26), 420))
    with pytest.raises(ValueError, match='26: need frames numbered from 1, got 00000000.jpg'): read_mtl_aqa(small)
    problems = []
    assert [s.uid for s in read_mtl_aqa(small, problems=problems)] == ['05/1', '05/2'] and len(problems) == 2


def test_what_lies_there_instead_is_said(small):
    "A broadcast's folder without its zero, and frames with a prefix"
    empty_frames(small, 5, range(1, 420)).rename(small/MTL_AQA_FRAMES/'5')
    with pytest.raises(FileNotFoundError, match='there is no 05 in .*, which holds 1 other name .5.; did you mean .*256s/5[?]'): check_samples(read_mtl_aqa(small))
    folder = (small/MTL_AQA_FRAMES/'5').rename(small/MTL_AQA_FRAMES/'05')
    for path in list(folder.iterdir()): path.rename(path.with_name(f'frame_{path.name}'))
    with pytest.raises(FileNotFoundError, match='this folder holds 419 other names .frame_00000001.jpg, '): check_samples(read_mtl_aqa(small))


def test_strange_names_and_a_file_for_a_folder(small):
    folder = empty_frames(small, 5, range(1, 420))
    for name in ('notes.txt', '00000050.jpg.part', '.00000050.jpg.7.part', '-0000050.jpg', '٥٠.jpg', '9'*30+'.jpg'): (folder/name).touch()
    (small/MTL_AQA_FRAMES/'26').write_text('')
    assert [frame_problem(s) for s in read_mtl_aqa(small)] == [None, None, 'no frames', 'no frames']


def test_each_broadcast_is_listed_once(real, shared, tmp_path, monkeypatch):
    "1,412 dives, fifteen folders of a hundred thousand names: fifteen listings"
    (tmp_path/MTL_AQA_FRAMES).mkdir(parents=True)
    names, calls = [f'{n:08d}.jpg' for n in range(1, 100001)], []
    monkeypatch.setattr(release_files.os, 'listdir', lambda folder: calls.append(folder.name) or names)
    start = time.perf_counter()
    samples = read_mtl_aqa(tmp_path, shared('data', 'mtl_aqa', 'info'))
    assert time.perf_counter()-start < 20 # two seconds on an idle core
    assert sorted(calls) == sorted({s.uid.split('/')[0] for s in real})
    inside = [s for s in samples if s.end_frame <= 100000]
    assert len(inside) > 400 and all(frame_problem(s) is None for s in inside) and all(frame_problem(s) for s in samples if s.end_frame > 100000)


# ---- the file of the dataset's author

def as_author(folder, source=CORE):
    "The annotations of `folder` as the author's repository has them: no marks, no dive number, protocol 3"
    records = {key: {name: v for name, v in record.items() if name not in ('judge_scores', 'dive_number')} for key, record in load_pickle(folder/f'{source}.pkl').items()}
    (folder/f'{AUTHOR}.pkl').write_bytes(pickle.dumps(records, protocol=3))
    return records


def test_the_authors_file_alone(small):
    "Everything but the marks is there; the dive number is composed"
    both = read_mtl_aqa(small)
    as_author(small/'info')
    assert read_mtl_aqa(small) == both
    for name in (CORE, MUSDL): (small/'info'/f'{name}.pkl').unlink()
    alone = read_mtl_aqa(small)
    assert alone == [replace(s, judges=None) for s in both]
    stats = mtl_aqa_stats(alone)
    assert stats['judges_off'] is None and stats['samples'] == 4 and len(judge_mismatches(alone)) == 0


def test_the_real_annotations_without_marks_are_the_same_dives(real, shared, tmp_path):
    "The author's file equals CoRe's in every field that both have (compared with the released one); so it is rebuilt from CoRe's here"
    for name in (TRAIN, TEST): (tmp_path/f'{name}.pkl').write_bytes(shared('data', 'mtl_aqa', 'info', f'{name}.pkl').read_bytes())
    (tmp_path/f'{CORE}.pkl').write_bytes(shared('data', 'mtl_aqa', 'info', f'{CORE}.pkl').read_bytes())
    as_author(tmp_path)
    (tmp_path/f'{CORE}.pkl').unlink()
    alone = read_mtl_aqa(None, annotations=tmp_path)
    assert alone == [replace(s, judges=None) for s in real]
    assert {k: v for k, v in mtl_aqa_stats(alone).items() if k in REAL} == REAL | dict(judges_off=None)


def test_the_authors_file_beside_another_is_compared(small):
    records = as_author(small/'info')
    records[KEYS[1]]['final_score'] = 1.
    (small/'info'/f'{AUTHOR}.pkl').write_bytes(pickle.dumps(records))
    with pytest.raises(ValueError, match=f'final_score is .* in {CORE} and 1.0 in {AUTHOR}'): read_mtl_aqa(small)
    (small/'info'/f'{CORE}.pkl').unlink()
    with pytest.raises(ValueError, match=f'final_score is .* in {MUSDL} and 1.0 in {AUTHOR}'): read_mtl_aqa(small)


def test_the_authors_smaller_training_set_is_no_release(small):
    "140 training dives, annotations of these, and the test list of the whole: the splits name dives that nobody annotated"
    as_author(small/'info')
    for name in (CORE, MUSDL): (small/'info'/f'{name}.pkl').unlink()
    edit(small, AUTHOR, lambda v: {key: v[key] for key in KEYS[:1]})
    with pytest.raises(ValueError, match='which is in no annotation file .and 2 more.; take splits and annotations from one release'): read_mtl_aqa(small)


def test_musdl_without_marks_says_so(small):
    from fspn_nb.batches.dataset import read_judges
    as_author(small/'info')
    for name in (CORE, MUSDL): (small/'info'/f'{name}.pkl').unlink()
    assert read_judges(read_mtl_aqa(small)) is None


@pytest.mark.parametrize('name', [CORE, MUSDL, AUTHOR, TRAIN, TEST])
def test_users_are_sent_to_every_file_that_is_read(name):
    assert f'{name}.pkl' in where_to_get('mtl_aqa') or f'{name}, ' in where_to_get('mtl_aqa') or f'{name} ' in where_to_get('mtl_aqa')


# ---- damaged trees

def test_wrong_roots(small, tmp_path):
    for root, why in ((small/'info', 'did you mean'), (small/'new', 'did you mean'), (small/MTL_AQA_FRAMES, 'did you mean'), (tmp_path, 'did you mean'), (tmp_path/'nowhere', 'which is no folder')):
        with pytest.raises(FileNotFoundError, match=why) as e: read_mtl_aqa(root)
        if 'mean' in why: assert str(e.value).endswith(f'{small}?')
    with pytest.raises(FileNotFoundError, match='root=None'): read_mtl_aqa(tmp_path/'nowhere', annotations=small/'info')
    with pytest.raises(ValueError, match='got neither'): read_mtl_aqa(None)
    assert len(read_mtl_aqa(None, annotations=str(small/'info'))) == 4


@pytest.mark.parametrize('name', FOUR)
@pytest.mark.parametrize('tolerant', [False, True])
def test_each_file_missing_cut_or_of_another_shape(small, name, tolerant):
    path, args = small/'info'/f'{name}.pkl', dict(problems=[] if tolerant else None)
    data = path.read_bytes()
    for bad in (data[:-1], data[:len(data)//2], b'', b'\x80', b'<html>not found</html>', pickle.dumps(5), pickle.dumps({} if 'split' not in name else []),
                pickle.dumps([1, 2] if 'split' not in name else {1: 2})):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match=f'{name}.pkl: need a'): read_mtl_aqa(small, **args)
    path.write_bytes(b'cos\nsystem\n(S"touch pwned"\ntR.')
    with pytest.raises(ValueError, match=f'{name}.pkl: need a pickle of plain annotations.*asks for os.system'): read_mtl_aqa(small, **args)
    path.unlink()
    if name in (TRAIN, TEST):
        with pytest.raises(FileNotFoundError, match=f'{name}.pkl, found none'): read_mtl_aqa(small, **args)
    else:
        (small/'info'/f'{MUSDL if name == CORE else CORE}.pkl').unlink()
        with pytest.raises(FileNotFoundError, match='found none of them; download'): read_mtl_aqa(small, **args)


K = (5, 2)
EDITS = {
    'no record': (CORE, lambda v: v.update({K: 'x'}), r"number.pkl, \(5, 2\): need a record"),
    'field gone': (MUSDL, lambda v: v[K].pop('end_frame') and None, "need the field 'end_frame'"),
    'number gone': (CORE, lambda v: v[K].pop('dive_number') and None, "need the field 'dive_number'"),
    'nan score': (CORE, lambda v: v[K].update(final_score=float('nan')), 'final_score: need a finite number, got float nan'),
    'infinite difficulty': (MUSDL, lambda v: v[K].update(difficulty=float('inf')), 'difficulty: need a finite number'),
    'no difficulty': (CORE, lambda v: v[K].update(difficulty=0.), 'difficulty > 0'),
    'negative score': (CORE, lambda v: v[K].update(final_score=-1.), 'need score >= 0'),
    'text score': (CORE, lambda v: v[K].update(final_score='88'), 'final_score: need a finite number'),
    'vast frame': (CORE, lambda v: v[K].update(end_frame=10**5000), 'end_frame: need a whole number'),
    'float frame': (CORE, lambda v: v[K].update(end_frame=330.), 'end_frame: need a whole number'),
    'backwards': (CORE, lambda v: v[K].update(start_frame=331), 'need 1 <= start_frame <= end_frame, got 331 and 330'),
    'frame zero': (CORE, lambda v: v[K].update(start_frame=0), 'need 1 <= start_frame'),
    'six marks': (CORE, lambda v: v[K].update(judge_scores=np.ones(6)), 'need seven marks, got tuple of length 6'),
    'matrix of marks': (CORE, lambda v: v[K].update(judge_scores=np.ones((7, 1))), 'judge_scores: need a list of numbers'),
    'nan mark': (MUSDL, lambda v: v[K]['judge_scores'].__setitem__(0, np.nan), 'judge_scores: need a finite number'),
    'other score': (MUSDL, lambda v: v[K].update(final_score=1.5), r'\(5, 2\): final_score is .* in final.* and 1.5 in augmented'),
    'other end': (MUSDL, lambda v: v[K].update(end_frame=331), 'end_frame is 330 in final.* and 331 in augmented'),
    'other mark': (MUSDL, lambda v: v[K]['judge_scores'].__setitem__(0, .5), 'judge_scores is'),
    'odd mark in the better file': (CORE, lambda v: v[K]['judge_scores'].__setitem__(0, 45.), 'judge_scores is'),
    'other number': (CORE, lambda v: v[K].update(dive_number='101Z'), "dive_number is '101Z' and its fields make"),
    'empty number': (CORE, lambda v: v[K].update(dive_number=''), 'dive_number: need a short printable text'),
    'no such rotation': (CORE, lambda v: [fields.update(rotation_type=9) for fields in v.values()] and None, 'rotation_type'),
    'in one file': (MUSDL, lambda v: v.pop(K) and None, r'\(5, 2\): need every dive in every annotation file, got none in augmented'),
    'split twice': (TEST, lambda v: v+[K], r'got \(5, 2\) 2 times'),
    'not in a split': (TRAIN, lambda v: [key for key in v if key != K], r'got \(5, 2\) 0 times'),
}
STRAY = { # entries that no dive can be blamed for
    'split unknown': (TEST, lambda v: v+[(99, 1)], r'got \(99, 1\), which is in no annotation file', '99/1'),
    'key as text': (CORE, lambda v: v.update({'05/9': v[K]}), r'need keys \(video, index\), got str', 'annotated dive 4'),
    'key of three': (MUSDL, lambda v: v.update({(5, 2, 1): v[K]}), r'need keys \(video, index\), got tuple of length 3', 'annotated dive 4'),
    'vast key': (CORE, lambda v: v.update({(10**5000, 1): v[K]}), 'need a whole number', 'annotated dive 4'),
    'key as list in a split': (TRAIN, lambda v: [[1, 2], *v], r'need keys \(video, index\), got list', 'train_split_0, entry 0'),
    'negative index': (TEST, lambda v: v+[(5, -1)], 'need numbers >= 0', 'test_split_0, entry 1'),
    'truth value': (TEST, lambda v: v+[(True, 1)], 'need a whole number', 'test_split_0, entry 1'),
}


@pytest.mark.parametrize('what', [*EDITS, *STRAY])
def test_one_wrong_value(small, what):
    "Stops by default; with a list, it is named there and the other dives are read"
    name, change, why, *stray = (EDITS | STRAY)[what]
    edit(small, name, change)
    with pytest.raises(ValueError, match=why) as e: read_mtl_aqa(small)
    assert len(str(e.value)) < 700 and '; ' in str(e.value)
    if what == 'no such rotation':
        with pytest.raises(ValueError, match='at least one dive without a fault, got none of 4'): read_mtl_aqa(small, problems=[])
        return
    problems = []
    left = [s.uid for s in read_mtl_aqa(small, problems=problems)]
    assert [uid for uid, _ in problems] == (stray or ['05/2'])
    assert left == (['05/1', '05/2', '26/7', '26/8'] if stray else ['05/1', '26/7', '26/8'])


def test_a_foreign_split_is_counted(small):
    edit(small, TRAIN, lambda v: [(9, i) for i in range(50)])
    with pytest.raises(ValueError, match=r'got \(9, 0\), which is in no annotation file \(and 52 more\)'): read_mtl_aqa(small)
    problems = []
    assert len(read_mtl_aqa(small, problems=problems)) == 1 and len(problems) == 53


def test_the_released_typing_error_is_no_contradiction(small):
    edit(small, MUSDL, lambda v: v[K]['judge_scores'].__setitem__(3, 45.))
    assert max(next(s for s in read_mtl_aqa(small) if s.uid == '05/2').judges) <= 10
    (small/'info'/f'{CORE}.pkl').unlink()
    samples = read_mtl_aqa(small)
    assert samples[1].judges[3] == 45 and judge_mismatches(samples).uid.tolist() == ['05/2']


def test_mismatches_of_a_made_up_release(small):
    for name in (CORE, MUSDL): edit(small, name, lambda v: v[K].update(final_score=v[K]['final_score']+2))
    wrong = judge_mismatches(read_mtl_aqa(small))
    assert wrong.uid.tolist() == ['05/2'] and wrong.gap.tolist() == [2] and mtl_aqa_stats(read_mtl_aqa(small))['judges_off'] == 1
    assert list(judge_mismatches([]).columns) == ['uid', 'split', 'stored', 'computed', 'gap', 'odd_marks']


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


@pytest.mark.parametrize('tolerant', [False, True])
def test_random_damage(small, tolerant):
    "Read or refused with a reason, nothing else"
    rng, refused = random.Random(0), 0
    for i in range(400):
        path = small/'info'/f'{FOUR[i % 4]}.pkl'
        data = path.read_bytes()
        path.write_bytes(mutate(data, rng))
        try: read_mtl_aqa(small, problems=[] if tolerant else None)
        except (ValueError, FileNotFoundError) as e:
            assert str(e)
            refused += 1
        path.write_bytes(data)
    assert refused > 150 and len(read_mtl_aqa(small)) == 4
