"What the checker finds in real annotations, in damaged releases and in hostile files"
import io
import os
import random
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_clips import encoded, exif, no_pictures, pictures
from test_formats import EDITS, edit

from fspn_nb.batches.dataset import load_samples
from fspn_nb.config import make_config,override
from fspn_nb.data.aqa7 import write_aqa7
from fspn_nb.data.check import FINDING_COLUMNS,FINDING_KINDS,check_cli,check_release,summarize_findings
from fspn_nb.data.check_files import _plain_size,_whole_jpeg,check_image
from fspn_nb.data.clips import load_frames
from fspn_nb.data.finediving import FINEDIVING_FRAMES,read_finediving,write_finediving
from fspn_nb.data.matlab import mat_bytes
from fspn_nb.data.mtl_aqa import read_mtl_aqa,write_mtl_aqa,write_video_frames
from fspn_nb.data.records import Sample
from fspn_nb.data.stats import shared_dives
from fspn_nb.protocols import SPORTS
from fspn_nb.synthetic.dive_motion import make_dive
from fspn_nb.training.prepare import deviations

AQA, FINE, COARSE = 'fine-grained_annotation_aqa', 'FineDiving_fine-grained_annotation', 'FineDiving_coarse_annotation'


def film(i, n=None):
    "Small frames in a colour of their own"
    return np.full((n or len(make_dive(i).labels), 24, 32, 3), 30+37*i % 200, np.uint8)


def release(root, n=5):
    "A FineDiving release of `n` made-up dives, the last two for testing"
    dives = [(('26', i+1), 400*i+1000, replace(make_dive(i), frames=film(i))) for i in range(n)]
    keys = [k for k, *_ in dives]
    write_finediving(root, dives, keys[:-2], keys[-2:])
    return root


@pytest.fixture
def small(tmp_path):
    "Root of a fresh small release"
    return release(tmp_path/'fd')


def frames(root, i):
    "Paths of the frames of dive 26/i"
    return sorted((root/FINEDIVING_FRAMES/'26'/str(i)).iterdir())


def harm(findings):
    "[(uid, kind)] of what is missing or wrong"
    return [(row.uid, row.kind) for row in findings.itertuples() if row.severity != 'note']


def shorten(root, i, name=FINE):
    "Take the last label from dive 26/i in one of the three files"
    edit(root, name, lambda v: v['26', i].update(frames_labels=v['26', i]['frames_labels'][:-1]))


# ---- real annotations

def test_real_finediving_names_what_has_no_frames(shared, tmp_path, capsys):
    root = shared('data', 'finediving')
    assert check_cli(['finediving', str(root), '--csv', str(tmp_path/'f.csv')]) == 1
    df = pd.read_csv(tmp_path/'f.csv', keep_default_na=False)
    assert list(df.columns) == list(FINDING_COLUMNS)
    bare = {s.uid for s in read_finediving(root) if not s.files}
    assert len(bare) == 2988 and set(df[df.severity != 'note'].uid) == bare and (df[df.severity != 'note'].kind == 'no frames').all()
    text = capsys.readouterr().out
    assert '2,988 x no frames' in text and '12 without a fault (6 train, 6 test)' in text and 'as released' in text
    assert df[df.kind == 'no frames'].file.str.startswith(str(root/FINEDIVING_FRAMES)).all()


def test_real_frames_decode(shared):
    df = check_release('finediving', shared('data', 'finediving'), decode=True)
    assert set(df[df.severity != 'note'].kind) == {'no frames'}


def test_real_overlap(shared):
    "The counts of leaking dives, from both sides"
    fd, mtl = shared('data', 'finediving'), shared('data', 'mtl_aqa', 'info')
    expected = {'train here, test there': 268, 'test here, train there': 249, 'test in both': 76}
    got = Counter(check_release('finediving', None, fd/'Annotations', against=('mtl_aqa', mtl.parent)).kind)
    assert {k: got[k] for k in expected} == expected and got['marks'] == 121 and got['one exemplar'] == 5
    back = Counter(check_release('mtl_aqa', None, mtl, against=('finediving', fd)).kind)
    assert (back['train here, test there'], back['test here, train there'], back['test in both']) == (249, 268, 76) and back['marks'] == 27


def test_real_overlap_of_the_notebook(shared):
    "The matrix in the figure; the same dive has the same name, often another first frame, and always the same score"
    fd, mtl = read_finediving(shared('data', 'finediving')), read_mtl_aqa(None, shared('data', 'mtl_aqa', 'info'))
    both = shared_dives(fd, mtl)
    assert Counter(zip(both.split, both.other_split)) == {('train', 'train'): 776, ('train', 'test'): 268, ('test', 'train'): 249, ('test', 'test'): 76}
    assert (both.uid.str.replace('/0', '/') == both.other.str.replace('/0', '/')).all() and both.other.is_unique
    assert sum(row.span[0]-row.other_span[0] == 1 and row.span[1] == row.other_span[1] for row in both.itertuples()) == 972
    score = {s.uid: s.score for s in mtl}
    assert all(s.score == score[u] for s, u in zip((s for s in fd if s.uid in set(both.uid)), both.other))


def test_real_marks(shared):
    "How many real dives the rules reproduce, by size of the panel, and how many of the rest would fit another difficulty"
    df = check_release('finediving', None, shared('data', 'finediving')/'Annotations')
    marks = df[df.kind == 'marks']
    panel = {s.uid: len(s.judges) for s in read_finediving(None, shared('data', 'finediving')/'Annotations')}
    assert Counter(marks.uid.map(panel)) == {7: 100, 3: 13, 5: 8} # one of the hundred has an impossible mark that does not count
    assert marks.detail.str.contains('they would with difficulty').sum() == 79
    assert 'frames not looked at' in summarize_findings(df)


def test_real_aqa7_lists(shared):
    df = check_release('aqa7', shared('data', 'aqa7'))
    assert Counter(df.kind) == {'samples': 1, 'no frames': 1106} and '(803 train, 303 test), as released' in df[df.kind == 'samples'].detail.item()


# ---- a small release, damaged

def test_a_clean_release_is_fit_for_use(small, capsys):
    for extra in ([], ['--decode'], ['--workers', '1']): assert check_cli(['finediving', str(small), *extra]) == 0
    out = capsys.readouterr().out
    assert 'a part of it, or synthetic' in out and 'this release can be used' in out and '5 without a fault (3 train, 2 test)' in out


@pytest.mark.parametrize('decode', [False, True])
def test_three_accidents_give_three_findings(small, decode, tmp_path, capsys):
    a, b = frames(small, 1)[7], frames(small, 4)[50]
    a.write_bytes(a.read_bytes()[:-40]); b.unlink(); shorten(small, 3)
    assert check_cli(['finediving', str(small), '--csv', str(tmp_path/'f.csv'), *['--decode']*decode]) == 1
    df = pd.read_csv(tmp_path/'f.csv', keep_default_na=False)
    assert sorted(harm(df)) == [('26/1', 'cut off'), ('26/3', 'wrong entry'), ('26/4', 'frames missing')]
    by = df.set_index('kind')
    assert by.loc['cut off', 'file'] == str(a) and str(int(b.stem)) in by.loc['frames missing', 'detail'] and by.loc['frames missing', 'file'] == str(b.parent)
    assert 'frames_labels is' in by.loc['wrong entry', 'detail'] and FINE in by.loc['wrong entry', 'detail']
    out = capsys.readouterr().out
    assert all(text in out for text in ('26/1', '26/3', '26/4', str(a), '1 missing, 2 wrong')) and '2 without a fault (1 train, 1 test)' in out


def renumber(root, step):
    "Dive 26/2 with all numbers moved by `step`"
    files = frames(root, 2)
    for path in files[::-1] if step > 0 else files: path.rename(path.with_name(f'{int(path.stem)+step:05d}.jpg'))


def picture(w, h):
    "A JPEG as bytes"
    out = io.BytesIO()
    Image.fromarray(np.full((h, w, 3), 200, np.uint8)).save(out, 'jpeg')
    return out.getvalue()


def copied(root):
    "Dive 26/2 shows the film of 26/1"
    for path, p in zip(frames(root, 2), frames(root, 1)): path.write_bytes(p.read_bytes())
    for path in frames(root, 2)[len(frames(root, 1)):]: path.write_bytes(frames(root, 1)[-1].read_bytes())
    mid = len(frames(root, 2))//2
    frames(root, 2)[mid].write_bytes(frames(root, 1)[len(frames(root, 1))//2].read_bytes())


def pipe(root):
    path = frames(root, 2)[3]
    path.unlink(); os.mkfifo(path)


def broken(root):
    "A frame with a broken Huffman table, between a good header and a good end"
    path = frames(root, 2)[3]
    data = bytearray(path.read_bytes())
    at = data.index(b'\xff\xc4')+5
    data[at:at+16] = bytes([255]*16)
    path.write_bytes(data)


def same_span(root):
    start, end = (read_finediving(root)[0].start_frame, read_finediving(root)[0].end_frame)
    n = end-start+1
    labels = read_finediving(root)[0].labels
    other = {k: v for k, v in read_finediving(root)[0].sub_actions.items()}
    edit(root, AQA, lambda v: v['26', 2].__setitem__(4, np.array(labels)))
    edit(root, FINE, lambda v: v['26', 2].update({'frames_labels': np.array(labels), 'sub-action_types': other}))
    edit(root, COARSE, lambda v: v['26', 2].update(start_frame=start, end_frame=end))
    for path in frames(root, 2): path.unlink()
    for i in range(n): (root/FINEDIVING_FRAMES/'26'/'2'/f'{start+i:05d}.jpg').write_bytes(picture(32, 24))


DAMAGE = {
    'no frames': (lambda r: [path.unlink() for path in frames(r, 2)], 'none of'),
    'frames missing': (lambda r: [path.unlink() for path in frames(r, 2)[10:15]], '5 of '),
    'off by one': (lambda r: renumber(r, 1), 'numbers start one later than annotated'),
    'other numbers': (lambda r: renumber(r, -1399), '1..'),
    'too many frames': (lambda r: (frames(r, 2)[0].parent/'01399.jpg').write_bytes(picture(32, 24)), '1 beyond'),
    'number twice': (lambda r: (frames(r, 2)[0].parent/'001400.jpg').write_bytes(picture(32, 24)), '001400.jpg and 01400.jpg'),
    'empty file': (lambda r: frames(r, 2)[3].write_bytes(b''), '01403.jpg: 0 bytes'),
    'no picture': (lambda r: [path.write_bytes(b'<html>please sign in</html>') for path in frames(r, 2)], '<html>'),
    'cut off': (lambda r: [path.write_bytes(path.read_bytes()[:400]) for path in frames(r, 2)[5:9]], '4 of '),
    'unreadable': (pipe, '01403.jpg'),
    'frame sizes': (lambda r: frames(r, 2)[3].write_bytes(picture(24, 32)), '1 of 24x32'),
    'same frames': (copied, 'those of 26/1'),
    'same span': (same_span, 'are also 26/1'),
}


@pytest.mark.parametrize('decode', [False, True])
@pytest.mark.parametrize('kind', DAMAGE)
def test_each_kind_of_damage_is_named_once(small, kind, decode):
    damage, words = DAMAGE[kind]
    damage(small)
    df = check_release('finediving', small, decode=decode)
    assert harm(df) == [('26/2', kind)]
    assert words in df.detail[0] and df.todo[0] == FINDING_KINDS[kind][1]


def test_frames_one_earlier(small):
    renumber(small, -1)
    assert 'one earlier' in check_release('finediving', small).detail[0]


def test_only_decoding_sees_a_broken_table(small):
    "The quick look does not see it, and its summary says that it looked at both ends only"
    broken(small)
    quick, whole = (check_release('finediving', small, decode=decode) for decode in (False, True))
    assert harm(quick) == [] and harm(whole) == [('26/2', 'unreadable')]
    assert 'both ends of each frame looked at (--decode reads them whole)' in summarize_findings(quick) and 'all frames decoded' in summarize_findings(whole)


def test_decoding_refuses_a_giant(small):
    path = frames(small, 2)[3]
    data = bytearray(path.read_bytes())
    at = data.index(b'\xff\xc0')
    data[at+5:at+9] = b'\xff\xff\xff\xff'
    path.write_bytes(data)
    assert ('26/2', 'unreadable') in harm(check_release('finediving', small, decode=True))


def test_notes_do_no_harm(small):
    "Marks that do not make the score, a lone exemplar, none at all: said, and the exit status stays 0"
    for name in (AQA, FINE, COARSE): edit(small, name, lambda v: v['26', 2].__setitem__(1, 99.9) if isinstance(v['26', 2], list) else v['26', 2].update(dive_score=99.9))
    df = check_release('finediving', small)
    assert harm(df) == [] and 'stored 99.9' in df[df.kind == 'marks'].detail.item() and df[df.kind == 'marks'].uid.item() == '26/2'
    assert {'one exemplar', 'no exemplar'} & set(df.kind)
    assert check_cli(['finediving', str(small)]) == 0


def test_many_samples_are_counted_not_listed(tmp_path):
    root = release(tmp_path/'fd', 8)
    for i in range(1, 8): [path.unlink() for path in frames(root, i)]
    text = summarize_findings(check_release('finediving', root), names=2)
    assert '7 x no frames: 26/1, 26/2, ...' in text and '26/3' not in text and '1 without a fault (0 train, 1 test)' in text


# ---- the tolerant reader

@pytest.mark.parametrize('what', EDITS)
def test_a_wrong_entry_is_one_problem(tmp_path, what):
    "All single faults that stop the strict reader: exactly one problem, the other dives readable; or an error, where the whole file is concerned"
    root = release(tmp_path/'fd')
    name, change, _ = EDITS[what]
    if name: edit(root, name, change)
    else:
        edit(root, AQA, lambda v: v['26', 2].__setitem__(2, 0.))
        for name in (FINE, COARSE): edit(root, name, lambda v: v['26', 2].update(difficulty=0.))
    with pytest.raises(ValueError): read_finediving(root)
    problems = []
    if what in ('key as text', 'other step name'):
        with pytest.raises(ValueError): read_finediving(root, problems=problems)
        assert not problems and [finding[1] for finding in harm(check_release('finediving', root))] == ['unreadable release']
        return
    uid = {'unknown': '99/1', 'uncovered': '26/1'}.get(what, '26/2')
    got = [s.uid for s in read_finediving(root, problems=problems)]
    assert [uid for uid, _ in problems] == [uid] and got == [f'26/{i}' for i in range(1, 6) if f'26/{i}' != uid]
    assert harm(check_release('finediving', root)) == [(uid, 'wrong entry')]


@pytest.mark.parametrize('name', [AQA, FINE])
def test_labels_shortened_in_one_file(small, name):
    if name == AQA: edit(small, AQA, lambda v: v['26', 3].__setitem__(4, v['26', 3][4][:-1]))
    else: shorten(small, 3)
    problems = []
    assert len(read_finediving(small, problems=problems)) == 4
    (uid, why), = problems
    assert uid == '26/3' and 'values in' in why and name in why
    with pytest.raises(ValueError, match=r"\('26', 3\): frames_labels"): read_finediving(small)


def test_several_problems_at_once(small):
    shorten(small, 1); shorten(small, 3)
    edit(small, COARSE, lambda v: v.pop(('26', 4)) and None)
    edit(small, 'test_split', lambda v: [*v, ('26', 1), ('99', 1)])
    problems = [('before', 'kept')]
    assert [s.uid for s in read_finediving(small, problems=problems)] == ['26/2', '26/5']
    assert sorted(uid for uid, _ in problems) == ['26/1', '26/3', '26/4', '99/1', 'before']
    for i in (2, 5): shorten(small, i)
    with pytest.raises(ValueError, match='at least one dive without a fault'): read_finediving(small, problems=[])


# ---- the other two releases

@pytest.fixture
def mtl(tmp_path):
    "Root of an MTL-AQA release of four dives in one broadcast"
    root = tmp_path/'mtl'
    ends = [160+200*i for i in range(4)]
    write_mtl_aqa(root, [((1, i+1), e, make_dive(i)) for i, e in enumerate(ends)], [(1, 1), (1, 2), (1, 3)], [(1, 4)])
    noise = np.random.default_rng(0).integers(0, 255, (ends[-1]+6, 12, 16, 3)).astype(np.uint8)
    write_video_frames(root, 1, 1, noise)
    return root


def test_mtl_aqa(mtl):
    assert harm(check_release('mtl_aqa', mtl, decode=True)) == []
    folder = next((mtl/'new'/'new_total_frames_256s').iterdir())
    name = lambda n: folder/f'{n:08d}.jpg'
    name(150).unlink(); name(350).write_bytes(name(350).read_bytes()[:300]); (folder/'000540.jpg').write_bytes(name(540).read_bytes())
    df = check_release('mtl_aqa', mtl)
    assert sorted(harm(df)) == [('01/1', 'frames missing'), ('01/2', 'cut off'), ('01/3', 'wrong entry')]
    assert '1 of 103: 150' in df[df.kind == 'frames missing'].detail.item()


def test_synthetic_overlap(mtl, tmp_path):
    "A FineDiving release whose first dives lie in MTL-AQA's first broadcast"
    dives = [(('01', i+1), 160+200*i-len(make_dive(i).labels)+2, make_dive(i)) for i in range(3)]
    write_finediving(tmp_path/'fd', [(k, s-1, d) for k, s, d in dives], [('01', 1)], [('01', 2), ('01', 3)])
    df = check_release('mtl_aqa', mtl, against=('finediving', tmp_path/'fd'))
    assert df[df.kind == 'train here, test there'].uid.tolist() == ['01/2', '01/3'] and harm(df) == []
    edit(tmp_path/'fd', COARSE, lambda v: v['01', 2].update(dive_score=1.5))
    df = check_release('mtl_aqa', mtl, against=('finediving', tmp_path/'fd'))
    assert df[df.kind == 'train here, test there'].uid.tolist() == ['01/3'] and df[df.kind == 'other release'].detail.item().startswith('1 entries of FineDiving')


def test_aqa7(tmp_path):
    acts = [((sport, i), SimpleNamespace(score=row.lo+i, frames=film(7*row.id+i, 103))) for sport, row in SPORTS.items() for i in (1, 2)]
    write_aqa7(tmp_path, acts, [k for k, _ in acts if k[1] == 1], [k for k, _ in acts if k[1] == 2])
    df = check_release('aqa7', tmp_path, decode=True)
    assert harm(df) == [] and '6 train, 6 test' in df.detail[0]
    folder = tmp_path/'diving-out'/'001'
    (folder/'img_00050.jpg').unlink(); (tmp_path/'gym_vault-out'/'002'/'img_00103.jpg').write_bytes(b'')
    assert sorted(harm(check_release('aqa7', tmp_path))) == [('diving/001', 'frames missing'), ('gym_vault/002', 'empty file')]


# ---- what is named is what a run leaves out

def config(dataset, root, **kw): return override(make_config(dataset, 'smoke'), data_root=str(root), **kw)


def test_a_wrong_entry_costs_one_sample(tmp_path, capsys):
    "One dive less where the caller allows it: printed, named as missing; refused otherwise, and the error says how to go on"
    root = release(tmp_path/'fd', 8)
    shorten(root, 2)
    [path.unlink() for path in frames(root, 3)]
    with pytest.raises(ValueError, match=r"\('26', 2\): frames_labels is .*; or go on without such samples: -p allow_missing True"): load_samples(config('finediving', root))
    capsys.readouterr()
    got = load_samples(config('finediving', root, allow_missing=True))
    assert [s.uid for s in got.samples] == [f'26/{i}' for i in (1, 4, 5, 6, 7, 8)] and got.missing == ('26/2', '26/3')
    out = capsys.readouterr().out
    assert "26/2 is left out, its entry is wrong: ('26', 2): frames_labels is" in out and '1 with no frames: 26/3' in out
    said = deviations(got, 'boxes', SimpleNamespace(no_candidate=()), 'rgb_scratch')
    assert said[0] == 'data: 2 samples left out, their frames are missing or their annotations wrong'


def test_many_wrong_entries_are_counted(tmp_path, capsys):
    root = release(tmp_path/'fd', 8)
    for i in range(1, 6): shorten(root, i)
    with pytest.raises(ValueError, match=r"^\('26', 1\).* \(and 4 more wrong entries\)"): load_samples(config('finediving', root))
    capsys.readouterr()
    assert len(load_samples(config('finediving', root, allow_missing=True)).missing) == 5
    out = capsys.readouterr().out
    assert out.count('is left out, its entry is wrong') == 3 and '2 more samples are left out' in out and '26/4' not in out
    for i in range(6, 9): shorten(root, i)
    with pytest.raises(ValueError, match='at least one dive without a fault'): load_samples(config('finediving', root, allow_missing=True))


def test_a_wrong_entry_of_mtl_aqa(mtl):
    folder = next((mtl/'new'/'new_total_frames_256s').iterdir())
    (folder/'000540.jpg').write_bytes((folder/'00000540.jpg').read_bytes())
    with pytest.raises(ValueError, match='need one file per frame number.*-p allow_missing True'): load_samples(config('mtl_aqa', mtl))
    got = load_samples(config('mtl_aqa', mtl, allow_missing=True))
    assert [s.uid for s in got.samples] == ['01/1', '01/2', '01/4'] and got.missing == ('01/3',)


def test_wrong_entries_of_other_classes_do_not_stop_a_run(tmp_path):
    "A frame 0 in a vault, a score of ski that nobody can have: vault and ski need `allow_missing`, diving does not notice"
    acts = [((sport, i), SimpleNamespace(score=row.lo+i, frames=film(7*row.id+i, 103))) for sport, row in SPORTS.items() for i in (1, 2, 3)]
    write_aqa7(tmp_path, acts, [k for k, _ in acts if k[1] < 3], [k for k, _ in acts if k[1] == 3])
    (tmp_path/'gym_vault-out'/'002'/'img_00000.jpg').write_bytes(b'')
    rows = [(SPORTS[sport].id, i, a.score) for (sport, i), a in acts if i < 3]+[(SPORTS['ski_big_air'].id, 9, 99999.), (7, 1, 50.)]
    (tmp_path/'Split_4'/'split_4_train_list.mat').write_bytes(mat_bytes('consolidated_train_list', rows))
    diving = load_samples(config('aqa7', tmp_path, protocol='diving'))
    assert len(diving.samples) == 3 and diving.missing == ()
    for sport, words, uid, n in (('gym_vault', 'numbered from 1', 'gym_vault/002', 2), ('ski_big_air', 'need scores', 'ski_big_air/009', 3)):
        with pytest.raises(ValueError, match=words): load_samples(config('aqa7', tmp_path, protocol=sport))
        got = load_samples(config('aqa7', tmp_path, protocol=sport, allow_missing=True))
        assert len(got.samples) == n and got.missing == (uid,)


# ---- the command

def test_wrong_places_are_one_finding(small, tmp_path, capsys):
    for root, words in ((tmp_path/'nowhere', 'no folder'), (small/FINEDIVING_FRAMES, 'did you mean'), (tmp_path, 'did you mean')):
        assert check_cli(['finediving', str(root)]) == 1
        out = capsys.readouterr().out
        assert words in out and '1 missing, 0 wrong' in out
    (small/'Annotations'/f'{FINE}.pkl').write_bytes(b'\x80\x03cut')
    assert harm(check_release('finediving', small)) == [('', 'unreadable release')]
    (small/'Annotations'/f'{FINE}.pkl').unlink()
    assert harm(check_release('finediving', small)) == [('', 'not there')]


def test_annotations_elsewhere(small, tmp_path):
    (small/'Annotations').rename(tmp_path/'notes')
    assert check_cli(['finediving', str(small)]) == 1
    assert check_cli(['finediving', str(small), '--annotations', str(tmp_path/'notes')]) == 0


@pytest.mark.parametrize('args', [[], ['finediving'], ['jigsaws', '.'], ['finediving', '.', '--against', 'mtl_aqa'], ['finediving', '.', '--against', 'finediving=.'],
                                  ['aqa7', '.', '--against', 'mtl_aqa=.'], ['finediving', '.', '--workers', '0'], ['finediving', '.', '--workers', 'x'],
                                  ['finediving', '.', '--csv', 'no/such/folder/f.csv'], ['finediving', '.', '--csv', '.']])
def test_usage_ends_with_two(args, capsys):
    with pytest.raises(SystemExit) as e: check_cli(args)
    assert e.value.code == 2 and 'usage: fspn_check' in capsys.readouterr().err


def test_a_missing_other_release_is_said(small, tmp_path, capsys):
    assert check_cli(['finediving', str(small), '--against', f'mtl_aqa={tmp_path/"nowhere"}']) == 1
    assert 'mtl_aqa: ' in capsys.readouterr().out


# ---- the checker and the loader agree

def loader(path):
    "(height, width) that a run reads from the file, None where it stops"
    try: return tuple(load_frames(Sample('v/1', 'train', '', 0., folder=path.parent, files=(path.name,)), [0]).shape[1:3])
    except ValueError: return None


def agree(path, exact=True):
    "The verdict of the loader; the checker must have the same, and without decoding it may at most not see a fault (`exact`: it sees all)"
    truth = loader(path)
    for decode in (False, True):
        kind, detail, size = check_image(path, decode)
        assert kind in ('', *FINDING_KINDS) and (size is None) == (kind != '' and FINDING_KINDS[kind][0] == 'wrong')
        if truth or decode or exact: assert (size and size[::-1]) == truth, (path.name, decode, kind, detail, size, truth)
    return truth


NOTES = {'16 bits': '16 bits', '16 bits, colour': '16 bits'}
KINDS = {'empty': 'empty file', 'web page': 'no picture', 'zeros only': 'no picture', 'gif': 'no picture', 'bmp': 'no picture', 'tiff': 'no picture', 'pickle': 'no picture', 'giant': 'unreadable',
         'header and end': 'unreadable', 'broken table': 'unreadable', 'animation': 'unreadable', 'up to the preview': 'unreadable', 'half a webp': 'unreadable'} # all others: 'cut off'


@pytest.mark.parametrize('name', pictures())
def test_what_can_be_read_is_not_called_damaged(tmp_path, name):
    path = tmp_path/'00070.jpg'
    path.write_bytes(pictures()[name][0])
    assert agree(path) == (48, 64)
    note = 'EXIF orientation' if 'exif' in name else NOTES.get(name, '')
    assert [check_image(path, decode)[0] for decode in (False, True)] == [note, note]


@pytest.mark.parametrize('name', no_pictures())
def test_what_cannot_be_read_is_named(tmp_path, name):
    path = tmp_path/'00070.jpg'
    path.write_bytes(no_pictures()[name])
    assert agree(path, exact=name != 'broken table') is None
    assert check_image(path, True)[0] == KINDS.get(name, 'cut off')


def test_a_colour_profile_does_not_hide_mixed_sizes(small):
    "Found without decoding, as it stops a run"
    for i, path in enumerate(frames(small, 2)): path.write_bytes(encoded(Image.new('RGB', (32, 24 if i % 2 else 26)), icc_profile=bytes(3000)))
    assert harm(check_release('finediving', small)) == [('26/2', 'frame sizes')]
    with pytest.raises(ValueError, match='need frames of one size'): load_frames(read_finediving(small)[1], [0, 1])


@pytest.mark.parametrize('decode', [False, True])
def test_turned_frames_are_a_note(small, decode):
    "All frames turned: read upright, and said. Half of them turned by 90 degrees: two sizes, as a run sees them"
    files = frames(small, 2)
    for path in files: path.write_bytes(encoded(Image.new('RGB', (24, 32), (9, len(path.name), 9)), exif=exif(6)))
    df = check_release('finediving', small, decode=decode)
    row, = df[df.kind == 'EXIF orientation'].itertuples()
    assert harm(df) == [] and row.uid == '26/2' and row.severity == 'note' and row.detail.startswith(f'{len(files)} of {len(files)} frames, first {files[0].name}: 6') and row.file == str(files[0])
    for path in files[::2]: path.write_bytes(encoded(Image.new('RGB', (24, 32)))) # as they are stored
    assert harm(check_release('finediving', small, decode=decode)) == [('26/2', 'frame sizes')]


# ---- hostile frames, and many of them

def test_no_file_breaks_the_look(tmp_path):
    "Random damage to pictures, with and without decoding: an answer of a known kind, and never one that the loader contradicts"
    rng, path = random.Random(0), tmp_path/'1.jpg'
    good = [picture(32, 24), encoded(Image.new('RGB', (32, 24)), exif=exif(6)), encoded(Image.new('RGB', (32, 24)), 'PNG'), encoded(Image.new('RGB', (32, 24)), 'WEBP')]
    for i in range(600):
        data = bytearray(good[i % 4])
        for _ in range(rng.randrange(1, 6)): data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data[:rng.choice([len(data), rng.randrange(len(data))])])
        agree(path, exact=False)
    for other in (tmp_path, tmp_path/'none', tmp_path/'1.jpg'/'x'): assert check_image(other)[0] == 'unreadable'
    (tmp_path/'loop').symlink_to('loop')
    assert check_image(tmp_path/'loop')[0] == 'unreadable'


def test_the_quick_header_says_what_pillow_says(tmp_path, monkeypatch):
    "Thousands of damaged headers: where the quick walk gives a size, Pillow opens the file and gives the same; the verdict is the same with either"
    rng, path = random.Random(0), tmp_path/'1.jpg'
    grey, colour = Image.new('L', (33, 24), 7), Image.new('RGB', (32, 24), (9, 99, 200))
    good = [encoded(colour), encoded(grey), encoded(colour, progressive=True), encoded(colour, comment='70', subsampling=0, optimize=True), encoded(colour, restart_marker_rows=1)]
    assert [_plain_size(data) for data in good] == [(32, 24), (33, 24), (32, 24), (32, 24), (32, 24)]
    answered = 0
    for i in range(3000):
        data = bytearray(good[i % 5])
        head = data.index(b'\xff\xda')+12
        for _ in range(rng.randrange(1, 4)): data[rng.randrange(2, head)] = rng.choice([0, 1, 2, 8, 0xc0, 0xda, 0xff, rng.randrange(256)])
        if i % 7 == 0: del data[(at := rng.randrange(2, head)):at+rng.randrange(1, 4)]
        if size := _plain_size(data):
            with Image.open(io.BytesIO(data), formats=('JPEG',)) as image: assert (image.size, 'APP1' in image.app, bool(image.tile)) == (size, False, True)
            answered += 1
        if i % 10: continue
        path.write_bytes(data)
        quick = _whole_jpeg(path)
        with monkeypatch.context() as m:
            m.setattr('fspn_nb.data.check_files._plain_size', lambda head: None)
            assert _whole_jpeg(path) == quick
    assert 300 < answered < 2700


def test_copies_among_ten_thousand_files(tmp_path):
    "Every sample has the same picture; nothing else is wrong with them"
    dive = make_dive(0)
    n = len(dive.labels)
    write_finediving(tmp_path, [(('01', i), 1000*i, dive) for i in range(10000//n)], [('01', 0)], [('01', i) for i in range(1, 10000//n)])
    path = tmp_path/'one.jpg'
    path.write_bytes(picture(256, 256))
    for i in range(10000//n):
        (folder := tmp_path/FINEDIVING_FRAMES/'01'/str(i)).mkdir(parents=True)
        for k in range(n): os.link(path, folder/f'{1000*i+k:05d}.jpg')
    assert {kind for _, kind in harm(check_release('finediving', tmp_path))} == {'same frames'}
