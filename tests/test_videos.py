"Folders of videos become release folders; killed runs, broken films and wrong folders end in a word, never in half a dive"
import builtins
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from fspn_nb.data.aqa7 import read_aqa7,write_aqa7
from fspn_nb.data.extract_frames import prepare_cli,prepare_videos
from fspn_nb.data.finediving import read_finediving,write_finediving
from fspn_nb.data.mtl_aqa import read_mtl_aqa,write_mtl_aqa
from fspn_nb.data.records import check_samples,frame_problem
from fspn_nb.data.release_files import jpeg_bytes
from fspn_nb.data.video_io import encode_video,numbering_rate,video_frames
from fspn_nb.data.video_pieces import pieces_of,read_film,where_to_get
from fspn_nb.processes import hold_lock,lock_owner
from fspn_nb.protocols import PROTOCOLS
from fspn_nb.synthetic.dive_motion import make_dive

av = pytest.importorskip('av', reason="PyAV is not installed (pip install 'fspn_nb[video]')")
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def film(n, height=72, width=128, seed=0):
    "`n` frames that are all different: the number of a frame is the brightness of three of its bands"
    for i in range(1, n+1):
        frame = np.zeros((height, width, 3), np.uint8)
        for k, digit in enumerate((i//25, i//5 % 5, i % 5)): frame[:, k*width//4:(k+1)*width//4] = 25+50*(digit % 5)
        frame[:, 3*width//4:] = 40+20*(seed % 8)
        yield frame


def number_of(path):
    "The number that `film` drew into a frame"
    grey = np.asarray(Image.open(path).convert('L')).astype(float)
    w = grey.shape[1]
    a, b, c = (round((grey[:, k*w//4+3:(k+1)*w//4-3].mean()-25)/50) for k in range(3))
    return 25*a+5*b+c


def hidden(root):
    return [path for path in root.rglob('.*')]


DIVE = replace(make_dive(0), frames=None)
N = len(DIVE.labels)


@pytest.fixture
def diving(tmp_path):
    "(videos, out): two broadcasts with three dives in the first and one in the second"
    keys = [('01', 1), ('01', 2), ('01', 6), ('Tokyo_final_r1', 3)]
    write_finediving(tmp_path/'out', [(k, s, DIVE) for k, s in zip(keys, (3, N+10, 2*N+12, 1))], keys[:3], keys[3:])
    encode_video(film(3*N+20), tmp_path/'videos'/'01.mp4')
    encode_video(film(N), tmp_path/'videos'/'Tokyo_final_r1.mkv')
    return tmp_path/'videos', tmp_path/'out'


# ---- the three layouts

def test_finediving_layout(diving):
    videos, out = diving
    table = prepare_videos('finediving', videos, out, workers=2)
    assert table.status.tolist() == ['done']*4 and table.frames.tolist() == [N]*4 and list(table.columns) == ['name', 'status', 'frames', 'why']
    samples = check_samples(read_finediving(out))
    for s in samples:
        assert s.files[0] == f'{s.start_frame:05d}.jpg'
        for name in (s.files[0], s.files[N//2], s.files[-1]): assert number_of(s.folder/name) == int(name[:5]) % 125, 'frames are counted from one'
    assert not hidden(out)
    again = prepare_videos('finediving', videos, out, height=72)
    assert again.status.tolist() == ['skipped']*4 and not again.why.any()


def test_mtl_aqa_layout(tmp_path):
    "Every frame from the first to three behind the last dive, eight digits, video 5 found as 5 or 05"
    ends = {(5, 1): 110, (5, 2): 120, (13, 7): 107}
    write_mtl_aqa(tmp_path/'out', [(k, e, DIVE) for k, e in ends.items()], list(ends)[:2], list(ends)[2:])
    encode_video(film(130), tmp_path/'videos'/'5.mp4')
    encode_video(film(107), tmp_path/'videos'/'13.avi')
    table = prepare_videos('mtl_aqa', tmp_path/'videos', tmp_path/'out')
    assert table.values[:, :3].tolist() == [['05', 'done', 123], ['13', 'done', 107]]
    folder = tmp_path/'out'/'new'/'new_total_frames_256s'/'05'
    assert sorted(os.listdir(folder)) == [f'{i:08d}.jpg' for i in range(1, 124)]
    assert [number_of(folder/f'{i:08d}.jpg') for i in (1, 62, 123)] == [1, 62, 123]
    samples = {s.uid: s for s in read_mtl_aqa(tmp_path/'out')}
    assert all(frame_problem(s) is None for s in samples.values())
    assert len(samples['05/2'].after) == 3 and samples['13/7'].after == ()
    assert prepare_videos('mtl_aqa', tmp_path/'videos', tmp_path/'out').status[0] == 'skipped'


@pytest.mark.parametrize('nested', ['', 'Actions'])
def test_aqa7_layout(tmp_path, nested):
    acts = {('diving', 1): 80., ('gym_vault', 12): 15., ('diving', 2): 70.}
    from types import SimpleNamespace
    write_aqa7(tmp_path/'out', [(k, SimpleNamespace(score=v, frames=None)) for k, v in acts.items()], list(acts)[:2], list(acts)[2:])
    for name, n in (('diving-out/001', 103), ('diving-out/002', 90), ('gym_vault-out/012', 110)): encode_video(film(n), tmp_path/'videos'/nested/f'{name}.avi')
    table = prepare_videos('aqa7', tmp_path/'videos', tmp_path/'out').set_index('name')
    assert table.status.to_dict() == {'diving/001': 'done', 'gym_vault/012': 'done', 'diving/002': 'failed'}
    assert 'frames 1 to 103 are annotated, the film has 1 to 90' in table.why['diving/002']
    assert sorted(os.listdir(tmp_path/'out'/'gym_vault-out'/'012')) == [f'img_{i:05d}.jpg' for i in range(1, 104)]
    assert not (tmp_path/'out'/'diving-out'/'002').exists() and not hidden(tmp_path/'out')
    good = [s.uid for s in read_aqa7(tmp_path/'out') if frame_problem(s) is None]
    assert good == ['diving/001', 'gym_vault/012']


# ---- what goes wrong with films

def test_broken_film_is_passed_over(diving, capsys):
    videos, out = diving
    (videos/'Tokyo_final_r1.mkv').write_bytes(b'RIFF'*500)
    assert prepare_cli(['finediving', str(videos), str(out), '--workers', '2']) == 1
    printed = capsys.readouterr().out
    assert '3 done, 0 holes, 0 skipped, 0 missing, 1 failed' in printed and 'Tokyo_final_r1.mkv: need a video that can be decoded' in printed
    assert not hidden(out) and not (out/'FINADiving_MTL_256s'/'Tokyo_final_r1'/'3').exists()


def test_damage_is_named_and_moves_no_number(diving, capsys):
    "Damage in the middle of the second dive: what came before is done, what it may touch has holes, every number stays where it was"
    videos, out = diving
    whole = (videos/'01.mp4').read_bytes()
    at = whole.index(b'mdat')+(len(whole)-whole.index(b'mdat'))//2
    (videos/'01.mp4').write_bytes(whole[:at]+bytes(600)+whole[at+600:])
    assert prepare_cli(['finediving', str(videos), str(out)]) == 1
    assert 'frames perhaps damaged' in capsys.readouterr().out
    table = prepare_videos('finediving', videos, out).set_index('name') # found on disk, and the damage is not forgotten
    assert table.status['01/1'] == 'skipped' and table.status['01/6'] == 'holes' and table.status['Tokyo_final_r1/3'] == 'skipped'
    assert 'damaged' in table.why['01/6'] and (table.frames == N).all()
    assert prepare_cli(['finediving', str(videos), str(out), '--allow-holes']) == 0
    folder = out/'FINADiving_MTL_256s'/'01'/'1'
    assert [number_of(folder/f'{i:05d}.jpg') for i in (3, 50, N+2)] == [3, 50, (N+2) % 125]


def test_film_too_short_names_both_lengths(diving):
    videos, out = diving
    encode_video(film(2*N+40), videos/'01.mp4')
    table = prepare_videos('finediving', videos, out)
    assert table.status.tolist() == ['done', 'done', 'failed', 'done']
    assert table.why[2].startswith(f'frames {2*N+12} to {3*N+11} are annotated, the film has 1 to {2*N+40}')
    assert not hidden(out)


def test_random_damage_never_ends_in_another_error(tmp_path):
    "Any bytes: frames, a ValueError with the file's name, or a film that is too short"
    good = encode_video(film(30), tmp_path/'a.mkv').read_bytes()
    rng = np.random.default_rng(0)
    for k in range(25):
        b = bytearray(good[:int(rng.integers(1, len(good)))] if k % 5 == 0 else good)
        for i in rng.integers(0, len(b), 1+k): b[i] = rng.integers(256)
        (tmp_path/'b.mkv').write_bytes(b)
        try: assert all(frame.ndim == 3 for _, frame in video_frames(tmp_path/'b.mkv'))
        except ValueError as e: assert 'b.mkv' in str(e)


@pytest.mark.parametrize('text', ['', 'hello'*99, '#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/a.ts\n', 'ffconcat version 1.0\nfile a.mkv\n'])
def test_files_that_are_no_films(tmp_path, text):
    "Playlists that point elsewhere are not followed"
    encode_video(film(5), tmp_path/'a.mkv')
    (tmp_path/'b.mp4').write_text(text)
    with pytest.raises(ValueError, match='b.mp4: need a video that can be decoded'): list(video_frames(tmp_path/'b.mp4'))


def test_sound_without_picture(tmp_path):
    with av.open(str(tmp_path/'a.mp4'), 'w') as box:
        s = box.add_stream('aac', rate=44100)
        for i in range(5):
            f = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), 'fltp', 'stereo')
            f.sample_rate, f.pts = 44100, 1024*i
            box.mux(s.encode(f))
        box.mux(s.encode())
    with pytest.raises(ValueError, match='no picture in it'): list(video_frames(tmp_path/'a.mp4'))


# ---- going on after a kill

def test_leftovers_of_a_killed_run_are_not_taken_for_dives(diving):
    videos, out = diving
    part = out/'FINADiving_MTL_256s'/'01'/'.1.99999.part'
    part.mkdir(parents=True)
    (part/'00003.jpg').write_bytes(b'half')
    assert not any(s.files for s in read_finediving(out))
    assert prepare_videos('finediving', videos, out).status.tolist() == ['done']*4
    assert not hidden(out)


# ---- two at once

def test_a_second_preparation_of_one_release_is_refused(diving, capsys):
    "It would remove the hidden folders of the first; it is told who works there, writes nothing, and goes on once the first has ended"
    videos, out = diving
    with hold_lock(out/'.fspn_prepare.lock', 'frames'), ThreadPoolExecutor(1) as other:
        part = out/'FINADiving_MTL_256s'/'01'/f'.1.{os.getpid()+1}.part'
        part.mkdir(parents=True)
        with pytest.raises(SystemExit, match=f'frames in .* got process {os.getpid()} on .*ago.*wait until that process has ended'):
            other.submit(prepare_cli, ['finediving', str(videos), str(out)]).result()
        assert part.is_dir() and not any(s.files for s in read_finediving(out))
    assert lock_owner(out/'.fspn_prepare.lock') is None
    assert prepare_videos('finediving', videos, out).status.tolist() == ['done']*4 and not hidden(out)


def test_two_processes_make_what_one_makes(tmp_path):
    "Both started together: one is refused or finds all done, whichever was first, and no dive is incomplete"
    keys = [('01', i) for i in range(3)]
    write_finediving(tmp_path/'out', [(k, 1+i*N, DIVE) for i, k in enumerate(keys)], keys[:-1], keys[-1:])
    encode_video(film(3*N, 180, 320), tmp_path/'videos'/'01.mp4')
    code = f"import sys; from fspn_nb.data.extract_frames import prepare_cli; sys.exit(prepare_cli(['finediving', {str(tmp_path/'videos')!r}, {str(tmp_path/'out')!r}]))"
    both = [subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    texts = [run.communicate(timeout=120)[0] for run in both]
    assert min(run.returncode for run in both) == 0, texts
    assert all(run.returncode == 0 or 'need it for this process alone, got' in text for run, text in zip(both, texts)), texts
    assert all(frame_problem(s) is None for s in read_finediving(tmp_path/'out')) and not hidden(tmp_path/'out')


@pytest.mark.parametrize('all_of_them', [False, True])
def test_frames_that_vanish_while_a_dive_is_written(diving, monkeypatch, all_of_them):
    "Another program tidies up: that dive has failed, no incomplete folder gets its name, the others are done"
    videos, out = diving
    part,real,count = out/'FINADiving_MTL_256s'/'01'/f'.2.{os.getpid()}.part',jpeg_bytes,[0]
    def tidied(*args):
        count[0] += part.is_dir()
        if count[0] == 9: shutil.rmtree(part) if all_of_them else sorted(part.iterdir())[2].write_bytes(b'')
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr('fspn_nb.data.release_files.jpeg_bytes', tidied)
        table = prepare_videos('finediving', videos, out, workers=1)
    assert table.status.tolist() == ['done', 'failed', 'done', 'done'] and 'vanished from' in table.why[1] and table.frames[1] == 0
    assert [frame_problem(s) for s in read_finediving(out)] == [None, 'no frames', None, None] and not hidden(out)
    assert prepare_videos('finediving', videos, out).status.tolist() == ['skipped', 'done', 'skipped', 'skipped']


# ---- going on after a kill, continued

def test_a_log_line_that_does_not_fit_leaves_no_dive_that_is_called_done(diving, monkeypatch):
    "The disk is full when the line is written, after all frames: not done, nothing left behind; with room the same command ends it"
    videos, out = diving
    def full(path, *_): raise OSError(28, f'need 1 byte for {path}, got 0 bytes free')
    with monkeypatch.context() as patch:
        patch.setattr('fspn_nb.data.extract_frames.append_jsonl', full)
        rows = prepare_videos('finediving', videos, out, workers=1)
    assert set(rows.status) == {'failed'} and rows.why.str.contains('need 1 byte|stopped before').all()
    assert not any(s.files for s in read_finediving(out)) and not hidden(out)
    assert prepare_videos('finediving', videos, out).status.tolist() == ['done']*4


def test_killed_process_leaves_only_hidden_parts(tmp_path):
    "SIGKILL in the middle: under its own name a dive is whole, and the next run makes the tree that an undisturbed one makes"
    keys = [('01', i) for i in range(5)]
    for name in ('killed', 'calm'): write_finediving(tmp_path/name, [(k, 1+i*N, DIVE) for i, k in enumerate(keys)], keys[:-1], keys[-1:])
    encode_video(film(5*N, 180, 320), tmp_path/'videos'/'01.mp4')
    code = f"from fspn_nb.data.extract_frames import prepare_cli; prepare_cli(['finediving', {str(tmp_path/'videos')!r}, {str(tmp_path/'killed')!r}])"
    run = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, env={**os.environ, 'IN_TEST': '1'})
    frames, end = tmp_path/'killed'/'FINADiving_MTL_256s', time.time()+60
    while not (frames/'01'/'1').exists() and time.time() < end and run.poll() is None: time.sleep(.002)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    left = [s for s in read_finediving(tmp_path/'killed') if s.files]
    assert 2 <= len(left) < 5 and all(frame_problem(s) is None for s in left)
    status = prepare_videos('finediving', tmp_path/'videos', tmp_path/'killed').status.tolist()
    assert status.count('skipped') == len(left) and status.count('done') == 5-len(left)
    prepare_videos('finediving', tmp_path/'videos', tmp_path/'calm')
    tree = lambda root: {path.relative_to(root): path.read_bytes() for path in root.rglob('*.jpg')}
    assert tree(tmp_path/'killed') == tree(tmp_path/'calm') and not hidden(tmp_path/'killed')


@pytest.fixture
def broadcast(tmp_path):
    "(videos, out, folder): an MTL-AQA broadcast of 120 frames, prepared"
    write_mtl_aqa(tmp_path/'out', [((5, 1), 110, DIVE), ((5, 2), 115, DIVE)], [(5, 1)], [(5, 2)])
    encode_video(film(120), tmp_path/'videos'/'05.mp4')
    prepare_videos('mtl_aqa', tmp_path/'videos', tmp_path/'out')
    return tmp_path/'videos', tmp_path/'out', tmp_path/'out'/'new'/'new_total_frames_256s'/'05'


def test_broadcast_goes_on_where_it_stopped(broadcast):
    "Frames that are there are not written again, gaps are filled, hidden halves are removed"
    videos, out, folder = broadcast
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for i in [7, *range(60, 119)]: (folder/f'{i:08d}.jpg').unlink()
    (folder/'.00000060.jpg.99999.part').write_bytes(b'half')
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob('0*.jpg')}
    assert prepare_videos('mtl_aqa', videos, out).values[:, :3].tolist() == [['05', 'done', 118]]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert all((folder/k).stat().st_mtime_ns == v for k, v in kept.items())


@pytest.mark.parametrize('change', ['film', 'height', 'names'])
def test_broadcast_does_not_go_on_with_other_frames(broadcast, change):
    videos, out, folder = broadcast
    for i in range(60, 119): (folder/f'{i:08d}.jpg').unlink()
    if change == 'film': encode_video((255-frame for frame in film(120)), videos/'05.mp4')
    if change == 'names': [(folder/f'{i:08d}.jpg').rename(folder/f'{i:06d}.jpg') for i in range(1, 60)]
    row = prepare_videos('mtl_aqa', videos, out, height=36 if change == 'height' else 256).iloc[0]
    assert row.status == 'failed' and 'remove' in row.why
    assert len(os.listdir(folder)) == 59


def test_short_broadcast_keeps_its_frames_and_fails(broadcast):
    videos, out, folder = broadcast
    for i in range(112, 119): (folder/f'{i:08d}.jpg').unlink()
    encode_video(film(111), videos/'05.mp4')
    row = prepare_videos('mtl_aqa', videos, out).iloc[0]
    assert (row.status, row.frames) == ('failed', 111) and 'frames 1 to 115 are annotated, the film has 1 to 111' in row.why
    assert [frame_problem(s) is None for s in read_mtl_aqa(out)] == [True, False]


def test_folder_of_somebody_else_is_left_alone(diving):
    videos, out = diving
    mine = out/'FINADiving_MTL_256s'/'01'/'2'
    mine.mkdir(parents=True)
    (mine/'00001.jpg').write_bytes(b'mine')
    row = prepare_videos('finediving', videos, out).iloc[1]
    assert row.status == 'failed' and 'move or remove' in row.why and (mine/'00001.jpg').read_bytes() == b'mine'


DAMAGE = {'zeros': lambda data: bytes(500), 'cut off': lambda data: data[:100], 'text': lambda data: b'<html>'*50}

@pytest.mark.parametrize('damage', DAMAGE)
@pytest.mark.parametrize('last', [False, True])
def test_a_damaged_frame_fails_its_own_dive_only(diving, damage, last):
    "After a power cut: the file is named, stays where it is, and what the message says works; the film that arrives meanwhile is cut"
    videos, out = diving
    (videos/'Tokyo_final_r1.mkv').rename(out/'later.mkv')
    prepare_videos('finediving', videos, out)
    (out/'later.mkv').rename(videos/'Tokyo_final_r1.mkv')
    frame = sorted((out/'FINADiving_MTL_256s'/'01'/'1').iterdir())[-last]
    whole = frame.read_bytes()
    frame.write_bytes(damaged := DAMAGE[damage](whole))
    table = prepare_videos('finediving', videos, out)
    assert table.status.tolist() == ['failed', 'skipped', 'skipped', 'done'] and frame.read_bytes() == damaged
    assert table.why[0].startswith(f'its frame {frame.name} cannot be read') and 'remove it: with the film' in table.why[0]
    frame.unlink()
    assert prepare_videos('finediving', videos, out).status.tolist() == ['done']+['skipped']*3
    assert frame.read_bytes() == whole and not hidden(out)


def test_an_empty_frame_is_not_there(diving):
    "Wherever it is in a dive, it is cut again; without the film the dive is missing, with the number of frames that it has"
    videos, out = diving
    prepare_videos('finediving', videos, out)
    folder = out/'FINADiving_MTL_256s'/'01'/'1'
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for i in (3, 40, N+2): (folder/f'{i:05d}.jpg').write_bytes(b'')
    (folder/'00050.jpg').unlink()
    (videos/'01.mp4').rename(videos/'elsewhere.mp4')
    assert prepare_videos('finediving', videos, out).values[0].tolist() == ['01/1', 'missing', N-4, 'no video 01']
    (videos/'elsewhere.mp4').rename(videos/'01.mp4')
    assert prepare_videos('finediving', videos, out).values.tolist()[:2] == [['01/1', 'done', N, ''], ['01/2', 'skipped', N, '']]
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_gaps_are_not_filled_from_another_film(diving):
    videos, out = diving
    prepare_videos('finediving', videos, out)
    folder = out/'FINADiving_MTL_256s'/'01'/'1'
    (folder/'00050.jpg').unlink()
    shutil.rmtree(folder.with_name('6'))
    encode_video((255-frame for frame in film(3*N+20)), videos/'01.mp4')
    table = prepare_videos('finediving', videos, out)
    assert table.status.tolist() == ['failed', 'skipped', 'done', 'skipped'] and 'from another film' in table.why[0] and len(os.listdir(folder)) == N-1


def test_gaps_of_somebody_elses_dive_are_not_filled(diving):
    "No line in the log: the frames came from elsewhere, perhaps from a better film; the message names what to do, and it works"
    videos, out = diving
    prepare_videos('finediving', videos, out)
    (out/'fspn_prepare.jsonl').unlink()
    first = sorted((out/'FINADiving_MTL_256s'/'01'/'1').iterdir())[0]
    first.write_bytes(b'no picture')
    row = prepare_videos('finediving', videos, out).iloc[0]
    assert row.status == 'failed' and 'get it again, or remove its folder' in row.why
    first.unlink()
    row = prepare_videos('finediving', videos, out).iloc[0]
    assert row.status == 'failed' and f'{N-1} of {N} frames' in row.why and 'move or remove it' in row.why
    shutil.rmtree(first.parent)
    assert prepare_videos('finediving', videos, out).status[0] == 'done'


def test_a_broadcast_that_ends_with_its_last_dive_is_there(tmp_path, monkeypatch):
    "The optional frames after the last dive never come: no second decoding, and the film may be deleted"
    write_mtl_aqa(tmp_path/'out', [((5, 1), 110, DIVE), ((6, 2), 110, DIVE)], [(5, 1)], [(6, 2)])
    for i, n in ((5, 112), (6, 110)): encode_video(film(n), tmp_path/'videos'/f'{i}.mp4')
    args = 'mtl_aqa', tmp_path/'videos', tmp_path/'out'
    assert prepare_videos(*args).values[:, 1:3].tolist() == [['done', 112], ['done', 110]]
    with monkeypatch.context() as patch:
        patch.setattr('fspn_nb.data.extract_frames.read_film', lambda path: pytest.fail('decoded again'))
        assert prepare_videos(*args).values[:, 1:3].tolist() == [['skipped', 112], ['skipped', 110]]
        (tmp_path/'videos'/'5.mp4').unlink()
        assert prepare_videos(*args).values[:, 1:3].tolist() == [['skipped', 112], ['skipped', 110]]
    (tmp_path/'out'/'new'/'new_total_frames_256s'/'05'/'00000060.jpg').unlink()
    assert prepare_videos(*args).values[0].tolist() == ['05', 'missing', 111, 'no video 05']


def test_films_of_two_rates_in_two_folders(tmp_path):
    "Each run minds the films of its own folder; frames of the other one's stay, and their row says at which rate they are numbered"
    from types import SimpleNamespace
    keys = [('diving', 1), ('diving', 2)]
    write_aqa7(tmp_path/'out', [(k, SimpleNamespace(score=50., frames=None)) for k in keys], keys[:1], keys[1:])
    encode_video(film(103), tmp_path/'at25'/'diving-out'/'001.mp4')
    encode_video(film(103), tmp_path/'at30'/'diving-out'/'002.mp4', fps=30)
    run = lambda folder, rate=None: prepare_videos('aqa7', tmp_path/folder, tmp_path/'out', rate=rate)
    assert run('at25').status.tolist() == ['done', 'missing']
    there = 'frames numbered at 25 per second are there'
    assert run('at30', 30).values.tolist() == [['diving/001', 'skipped', 103, there], ['diving/002', 'done', 103, '']]
    assert run('at25').status.tolist() == ['skipped']*2
    assert run('at25', 30).values.tolist() == [['diving/001', 'failed', 103, f'{there}; move or remove its folder'], ['diving/002', 'skipped', 103, '']]
    (tmp_path/'out'/'diving-out'/'001'/'img_00007.jpg').unlink() # the other rate must not fill its gaps either
    assert run('at25', 30).values[0, 1:3].tolist() == ['failed', 102]


# ---- folders, names, commands

def test_missing_films_are_no_failure(diving, capsys):
    videos, out = diving
    (videos/'01.mp4').rename(videos/'01.mp4.part')
    assert prepare_cli(['finediving', str(videos), str(out)]) == 0
    assert '1 done, 0 holes, 0 skipped, 3 missing, 0 failed' in (printed := capsys.readouterr().out) and 'missing: 01/1, 01/2, 01/6: no video 01' in printed


def test_files_that_are_passed_over_are_named(diving, capsys):
    videos, out = diving
    (videos/'01.mp4').rename(videos/'01.mxf')
    (videos/'1.mp4.part').write_bytes(b'half')
    why = prepare_videos('finediving', videos, out).why
    assert why[0] == 'no video 01, passed over for another ending: 01.mxf, 1.mp4.part; put such a film into an mkv or mp4' and why[3] == ''
    (videos/'Tokyo_final_r1.mkv').unlink()
    shutil.rmtree(out/'FINADiving_MTL_256s'/'Tokyo_final_r1')
    assert prepare_cli(['finediving', str(videos), str(out)]) == 1
    assert '(such as 01.mp4), passed over for another ending: 01.mxf, 1.mp4.part; put such' in capsys.readouterr().err


@pytest.mark.parametrize('ending, form, codec', [('asf', 'asf', 'mpeg4'), ('m2v', 'mpeg2video', 'mpeg2video'), ('f4v', 'mp4', 'libx264'), ('divx', 'avi', 'mpeg4'), ('h264', 'h264', 'libx264')])
def test_endings_of_films(diving, ending, form, codec):
    videos, out = diving
    (videos/'01.mp4').unlink()
    with av.open(str(videos/f'01.{ending}'), 'w', format=form) as box:
        s = box.add_stream(codec, rate=25)
        s.width, s.height, s.pix_fmt = 128, 72, 'yuv420p'
        for frame in film(3*N+20): box.mux(s.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        box.mux(s.encode())
    table = prepare_videos('finediving', videos, out)
    assert table.status.tolist() == ['done']*4, table.why.tolist()
    folder = out/'FINADiving_MTL_256s'/'01'/'2'
    assert [number_of(folder/f'{i:05d}.jpg') for i in (N+10, 2*N)] == [(N+10) % 125, 2*N % 125]


def test_two_films_of_one_name(diving):
    videos, out = diving
    (videos/'1.mkv').write_bytes((videos/'01.mp4').read_bytes())
    table = prepare_videos('finediving', videos, out)
    assert table.status.tolist() == ['failed']*3+['done'] and 'two videos of one name, 01.mp4 and 1.mkv' in table.why[0]


def test_a_wrong_entry_is_a_failed_row(diving, capsys):
    "All other dives are cut; the wrong one has no piece, and its row says what is wrong"
    from conftest import edit_pickle
    videos, out = diving
    edit_pickle(out/'Annotations'/'FineDiving_coarse_annotation.pkl', lambda v: v['01', 2].update(dive_score=1.5))
    with pytest.raises(ValueError, match='dive_score is'): pieces_of('finediving', out)
    assert prepare_cli(['finediving', str(videos), str(out)]) == 1
    assert "3 done, 0 holes, 0 skipped, 0 missing, 1 failed" in (text := capsys.readouterr().out) and "failed: 01/2: ('01', 2): dive_score is" in text
    assert prepare_videos('finediving', videos, out).values[:, :3].tolist()[2:] == [['Tokyo_final_r1/3', 'skipped', N], ['01/2', 'failed', 0]]


def test_trampoline_is_no_failure(tmp_path):
    from fspn_nb.data.matlab import mat_bytes
    (tmp_path/'out'/'Split_4').mkdir(parents=True)
    for split, rows in dict(train=[(1, 1, 50.), (7, 1, 60.)], test=[(1, 2, 50.)]).items():
        (tmp_path/'out'/'Split_4'/f'split_4_{split}_list.mat').write_bytes(mat_bytes(f'consolidated_{split}_list', rows))
    encode_video(film(103), tmp_path/'videos'/'diving-out'/'001.mp4')
    assert prepare_videos('aqa7', tmp_path/'videos', tmp_path/'out').values[:, :2].tolist() == [['diving/001', 'done'], ['diving/002', 'missing']]


def test_wrong_folders(diving, tmp_path, capsys):
    videos, out = diving
    (tmp_path/'empty').mkdir()
    for args, message in (((tmp_path/'empty', out), 'need videos of FineDiving'), ((tmp_path/'none', out), 'need a folder of videos'), ((videos, tmp_path/'empty'), 'Annotations')):
        assert prepare_cli(['finediving', *map(str, args)]) == 1
        assert message in (err := capsys.readouterr().err)
        assert (where_to_get('finediving') in err) == (message == 'need videos of FineDiving')
    with pytest.raises(SystemExit): prepare_cli(['finediving', str(videos)])
    with pytest.raises(SystemExit): prepare_cli(['jigsaws', str(videos), str(out)])
    for bad in (dict(height=0), dict(quality=101), dict(workers=0), dict(workers=-1), dict(height=2.5)):
        with pytest.raises(ValueError, match='need '): prepare_videos('finediving', videos, out, **bad)


@pytest.mark.parametrize('dataset', PROTOCOLS)
def test_dataset_alone_says_where_to_get_it(dataset, capsys):
    assert prepare_cli([dataset]) == 0
    assert capsys.readouterr().out.strip() == where_to_get(dataset)


def test_missing_decoder(diving, monkeypatch, capsys):
    videos, out = diving
    real = builtins.__import__
    def without(name, *args, **kw):
        if name.split('.')[0] == 'av': raise ModuleNotFoundError("No module named 'av'", name='av')
        return real(name, *args, **kw)
    monkeypatch.setattr(builtins, '__import__', without)
    with pytest.raises(ImportError, match=r"pip install 'fspn_nb\[video\]'"): prepare_videos('finediving', videos, out)
    assert prepare_cli(['finediving', str(videos), str(out)]) == 1
    assert 'fspn_nb[video]' in capsys.readouterr().err


def test_import_needs_no_decoder():
    code = "import sys; sys.modules['av'] = None; import fspn_nb.data.extract_frames, fspn_nb.data.video_io"
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_another_height_is_said(diving):
    videos, out = diving
    prepare_videos('finediving', videos, out, height=36)
    assert set(prepare_videos('finediving', videos, out).why) == {'frames of height 36 are there'}


def test_films_that_are_small_by_themselves_are_no_news(diving):
    "72 pixels high, cut at 256: nothing to say at 256 or 128, but at 36"
    videos, out = diving
    prepare_videos('finediving', videos, out)
    for height, why in ((256, ''), (128, ''), (36, 'frames of height 72 are there')):
        assert set(prepare_videos('finediving', videos, out, height=height).why) == {why}


# ---- time: every picture bears its number as a bar code of eight stripes

def barcode(i, height=72):
    frame = np.full((height, 128, 3), 60, np.uint8)
    for b in range(8): frame[20:50, 16*b:16*b+16] = 230 if i >> b & 1 else 20
    return frame


def bars(frame):
    grey = np.asarray(frame).astype(float).mean(-1)
    return sum((grey[22:48, 16*b+3:16*b+13].mean() > 128) << b for b in range(8))


def write_film(path, stamps, time_base, rate, sound=0., cover=False, codec='libx264', **options):
    "A film whose pictures 1, 2, ... are shown at `stamps`; `sound`: seconds of silence from the beginning"
    with av.open(str(path), 'w') as box:
        if cover:
            front = box.add_stream('mjpeg', rate=1)
            front.width, front.height, front.pix_fmt = 128, 72, 'yuvj420p'
        s = box.add_stream(codec, rate=rate, options={'crf': '8', **options} if codec == 'libx264' else options)
        s.width, s.height, s.pix_fmt, s.codec_context.time_base = 128, 72, 'yuv420p', time_base
        if sound:
            silent = box.add_stream('aac', rate=44100)
            for k in range(int(sound*44100/1024)):
                f = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), 'fltp', 'mono')
                f.sample_rate, f.pts, f.time_base = 44100, 1024*k, Fraction(1, 44100)
                box.mux(silent.encode(f))
            box.mux(silent.encode())
        if cover:
            box.mux(front.encode(av.VideoFrame.from_ndarray(barcode(255), format='rgb24').reformat(format='yuvj420p')))
            box.mux(front.encode())
        for k, stamp in enumerate(stamps):
            f = av.VideoFrame.from_ndarray(barcode(k+1), format='rgb24')
            f.pts, f.time_base = int(stamp), time_base
            box.mux(s.encode(f))
        box.mux(s.encode())
    return path


def shown(path, **kw):
    "{frame: the number on the picture that it shows}, and the faults as text"
    faults = []
    return {i: bars(frame) for i, frame in video_frames(path, None, faults=faults, **kw)}, [str(fault) for fault in faults]


@pytest.fixture
def prepared(tmp_path):
    "A function: (exit status, printed, {frame: picture}) for a film that is annotated from frame 1 to n"
    def prepare(path, n, *args):
        import contextlib, io
        dive = replace(DIVE, labels=DIVE.labels[:n], transitions=tuple(t for t in DIVE.transitions if t < n-1))
        out, keys = tmp_path/'release', [('01', 1), ('01', 2)]
        if not out.exists(): write_finediving(out, [(key, 1, dive) for key in keys], keys[:1], keys[1:])
        (tmp_path/'films').mkdir(exist_ok=True)
        (tmp_path/'films'/f'01{path.suffix}').write_bytes(path.read_bytes())
        with contextlib.redirect_stdout(io.StringIO()) as text: status = prepare_cli(['finediving', str(tmp_path/'films'), str(out), *args])
        files = sorted((out/'FINADiving_MTL_256s'/'01'/'1').glob('*.jpg'))
        return status, text.getvalue(), {int(file.stem): bars(Image.open(file)) for file in files}
    return prepare


def test_case_hole_in_the_clock(shared, prepared):
    status, text, frames = prepared(shared('cases', 'clock_with_hole.mkv'), 58)
    assert status == 1 and '05' not in text and '25 pictures/s (constant), starts at 0 s, ends at 2.4 s' in text
    assert '0 done, 2 holes' in text and '5 of 58 frames missing in the film (the last picture is repeated): 20 to 24 at 0.76 s' in text
    assert frames == {i: 19 if 20 <= i < 25 else i for i in range(1, 59)}
    status, text, _ = prepared(shared('cases', 'clock_with_hole.mkv'), 58, '--allow-holes')
    assert status == 0 and '2 holes' in text and '20 to 24' in text, 'said again when the frames are found on disk'


def test_case_lost_packets(shared, prepared):
    status, text, frames = prepared(shared('cases', 'damaged.ts'), 100)
    assert status == 1 and '3 of 100 frames missing' in text and '12 of 100 frames perhaps damaged: 37 to 48 at 1.44 s' in text
    assert all(frames[i] == i for i in (*range(1, 37), *range(49, 101))) and len(frames) == 100


def test_case_fifty_pictures_a_second(shared, prepared):
    film = shared('cases', 'fifty_per_second.mp4')
    status, text, frames = prepared(film, 58)
    assert status == 1 and not frames and '50 pictures/s (constant)' in text and 'need 25 pictures/s' in text and '--rate 25' in text
    status, text, frames = prepared(film, 58, '--rate', '25')
    assert status == 0 and '2 done' in text and frames == {i: i for i in range(1, 59)}
    status, text, _ = prepared(film, 58, '--rate', '50')
    assert status == 1 and 'frames numbered at 25 per second are there' in text


def test_case_cover_comes_first(shared, prepared):
    status, text, frames = prepared(shared('cases', 'cover_first.mkv'), 58)
    assert status == 0 and frames == {i: i for i in range(1, 59)} and '2 video streams, number 1 is read' in text


def test_rate_of_the_film_itself(tmp_path, prepared):
    "30000/1001 pictures a second: refused, at its own rate every picture, at 25 five of six"
    film = write_film(tmp_path/'a.mp4', [1001*k for k in range(60)], Fraction(1, 30000), Fraction(30000, 1001))
    assert read_film(film).rate == Fraction(30000, 1001) and not read_film(film).variable
    assert shown(film) == ({i: i for i in range(1, 61)}, [])
    assert 'need 25 pictures/s' in prepared(film, 48)[1]
    status, text, frames = prepared(film, 48, '--rate', '25')
    number = np.floor(np.arange(60)*1001/1200+.5)+1
    assert status == 0 and frames == {i: int(np.flatnonzero(number <= i)[-1])+1 for i in range(1, 49)}
    assert [frames[i] for i in (1, 2, 3, 4, 5, 6, 24, 48)] == [1, 2, 3, 5, 6, 7, 29, 57], 'as the fps filter of ffmpeg gives'


@pytest.mark.parametrize('ending', ['mkv', 'mp4'])
def test_sound_starts_before_the_picture(tmp_path, ending):
    "The clock of the file begins with its sound; without sound it begins with the first picture"
    stamps = [400+40*k for k in range(50)]
    late = write_film(tmp_path/f'a.{ending}', stamps, Fraction(1, 1000), 25, sound=3)
    frames, faults = shown(late)
    assert [frames[i] for i in (1, 10, 11, 12, 60)] == [1, 1, 1, 2, 50] and len(frames) == 60
    assert faults == ['frames 1 to 10 repeated (0.00 to 0.40 s)'] and abs(read_film(late).start-.4) < .002
    assert shown(write_film(tmp_path/f'b.{ending}', stamps, Fraction(1, 1000), 25)) == ({i: i for i in range(1, 51)}, [])


def test_variable_rate(tmp_path, prepared):
    "Steps of 20 to 80 ms: a picture is shown at the frame nearest in time, until the next"
    stamps = np.r_[0, np.cumsum(np.random.default_rng(0).choice([20, 33, 40, 50, 80], 59))]
    film = write_film(tmp_path/'a.mkv', stamps, Fraction(1, 1000), 25)
    assert read_film(film).variable
    status, text, frames = prepared(film, 60)
    number = np.floor(stamps/40+.5).astype(int)+1
    assert status == 0 and '(variable, mean' in text and 'frames repeated (no picture of their own)' in text
    assert frames == {i: int(np.flatnonzero(number <= i)[-1])+1 for i in range(1, 61)}


def test_other_streams(tmp_path):
    "A cover that is no attachment, sound, and B-frames in a file that stores only times of decoding"
    assert shown(write_film(tmp_path/'a.mkv', range(40), Fraction(1, 25), 25, cover=True))[0] == {i: i for i in range(1, 41)}
    for codec in ('libx264', 'mpeg4'):
        assert shown(write_film(tmp_path/'b.avi', range(40), Fraction(1, 25), 25, codec=codec, bf='2')) == ({i: i for i in range(1, 41)}, [])
    counted = write_film(tmp_path/'c.h264', range(40), Fraction(1, 25), 25)
    assert shown(counted)[0] == {i: i for i in range(1, 41)} and 'no time stamps' in str(read_film(counted))


def test_a_packet_that_cannot_be_read(tmp_path):
    "300 zeroed bytes in an mkv of several clusters: later numbers stay, the hole and what may be damaged are named"
    film = write_film(tmp_path/'a.mkv', range(250), Fraction(1, 25), 25, g='25', sound=10)
    data = bytearray(film.read_bytes())
    data[len(data)//3:len(data)//3+300] = bytes(300)
    film.write_bytes(data)
    frames, faults = shown(film)
    touched = {i for fault in faults for i in range(int(fault.split()[1]), int(fault.split()[3] if 'frames' in fault else fault.split()[1])+1)}
    assert faults and len(frames) == 250 and all(shows == i for i, shows in frames.items() if i not in touched) and len(touched) < 200


def test_truncated_file(tmp_path, prepared):
    whole = write_film(tmp_path/'a.mkv', range(100), Fraction(1, 25), 25, g='10')
    whole.write_bytes(whole.read_bytes()[:len(whole.read_bytes())//2])
    status, text, frames = prepared(whole, 90)
    assert status == 1 and not frames and 'frames 1 to 90 are annotated, the film has 1 to' in text and 'its end is missing or damaged' in text
    (tmp_path/'b.mp4').write_bytes(write_film(tmp_path/'c.mp4', range(50), Fraction(1, 25), 25).read_bytes()[:3000])
    with pytest.raises(ValueError, match='b.mp4: need a video that can be decoded'): read_film(tmp_path/'b.mp4')


def test_parts_with_their_own_clocks_and_sizes(tmp_path):
    "Two recordings in one file: numbers go on, the jump and the new size are named"
    a = write_film(tmp_path/'a.ts', range(50), Fraction(1, 25), 25, g='10')
    b = encode_video([barcode(100+k)[:64] for k in range(30)], tmp_path/'b.ts')
    (tmp_path/'c.ts').write_bytes(a.read_bytes()+b.read_bytes())
    faults = []
    frames = [frame for _, frame in video_frames(tmp_path/'c.ts', faults=faults)]
    assert {frame.shape for frame in frames} == {(72, 128, 3)} and {'clock', 'size'} <= {fault.kind for fault in faults}
    assert 78 <= len(frames) <= 81 and [bars(frame) for frame in frames[:45]] == list(range(1, 46))


def test_rates_that_are_none(diving, tmp_path):
    for bad in ('fast', 0, '1/0', -25): # 25. and '30000/1001' are rates
        with pytest.raises(ValueError, match='need a rate between'): prepare_videos('finediving', *diving, rate=bad)
    film = read_film(diving[0]/'01.mp4')
    assert numbering_rate(film, '30000/1001') == Fraction(30000, 1001) and numbering_rate(film, 'film') == 25


# ---- the shape of frames

@pytest.mark.parametrize('pixel', [Fraction(4, 3), Fraction(1, 2), Fraction(16, 11)])
def test_pixels_that_are_not_square(tmp_path, pixel):
    encode_video(film(3), tmp_path/'a.mp4', pixel_aspect=float(pixel))
    (_, frame), *_ = video_frames(tmp_path/'a.mp4')
    assert frame.shape == (72, round(128*pixel), 3)
    (_, frame), *_ = video_frames(tmp_path/'a.mp4', 36)
    assert frame.shape == (36, round(64*pixel), 3)


def test_films_are_made_smaller_never_larger(tmp_path):
    encode_video(film(2, 300, 400), tmp_path/'a.mp4')
    shape = lambda h: next(video_frames(tmp_path/'a.mp4', h))[1].shape
    assert (shape(256), shape(None), shape(400)) == ((256, 341, 3), (300, 400, 3), (300, 400, 3))


@pytest.mark.parametrize('turn', [90, 180, 270])
def test_film_on_its_side(tmp_path, turn):
    "A phone stores the picture as its chip lies and writes down the turn"
    upright = np.zeros((64, 96, 3), np.uint8)
    upright[:16] = 220
    stored = np.ascontiguousarray(np.rot90(upright, -turn//90))
    with av.open(str(tmp_path/'a.mp4'), 'w') as box:
        s = box.add_stream('mpeg4', rate=25)
        if not hasattr(s, 'set_display_rotation'): pytest.skip('this PyAV cannot write a turned film')
        s.height, s.width, s.pix_fmt = *stored.shape[:2], 'yuv420p'
        s.set_display_rotation(turn)
        for _ in range(3): box.mux(s.encode(av.VideoFrame.from_ndarray(stored, format='rgb24')))
        box.mux(s.encode())
    frame = next(video_frames(tmp_path/'a.mp4', 32))[1]
    assert frame.shape == (32, 48, 3) and np.abs(frame.astype(int)-upright[::2, ::2]).mean() < 12


def test_odd_sizes_and_other_containers(tmp_path):
    for name in ('a.mp4', 'a.mkv', 'a.avi', 'a.mov'):
        got = [frame for _, frame in video_frames(encode_video(film(4, 71, 129), tmp_path/name))]
        assert len(got) == 4 and got[0].shape == (71, 129, 3)


def test_same_frames_same_file(tmp_path):
    assert encode_video(film(30), tmp_path/'a.mp4').read_bytes() == encode_video(film(30), tmp_path/'b.mp4').read_bytes()


def test_real_gif(shared, tmp_path):
    got = list(video_frames(shared('data', 'diving_sample.gif')))
    assert len(got) == 21 and got[0][1].shape == (256, 456, 3) and [i for i, _ in got] == list(range(1, 22))
    with Image.open(shared('data', 'diving_sample.gif')) as g:
        g.seek(20)
        other = np.asarray(g.convert('RGB').resize((456, 256))).astype(int)
    assert np.abs(got[20][1]-other).mean() < 4


def test_real_annotations_give_the_pieces(shared, tmp_path):
    dives = pieces_of('finediving', tmp_path, shared('data', 'finediving', 'Annotations'))
    assert len(dives) == 3000 and len({piece.video for piece in dives}) == 135 and min(piece.numbers[0] for piece in dives) == 95
    films = pieces_of('mtl_aqa', tmp_path, shared('data', 'mtl_aqa', 'info'))
    assert len(films) == 15 and {piece.name: piece.last for piece in films}['01'] == 291971 and sum(piece.last for piece in films) == 2358217
    assert len(pieces_of('aqa7', tmp_path, shared('data', 'aqa7'))) == 1106
