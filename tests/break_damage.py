"""Damaged files: a flipped byte, a cut tail, an empty file, the zeros that a power cut leaves, in every kind of file that is written and read again

Each case asserts what a user reads, that no damaged value is used (what comes out is what the sound file gives), and that the next start goes on.
"""
import contextlib
import functools
import io
import json
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fault_cases import case,outcome
from fspn_nb.actor import track
from fspn_nb.analysis.compare import read_baselines
from fspn_nb.analysis.method_tables import vote_points
from fspn_nb.analysis.parse_quality import parse_table
from fspn_nb.analysis.published import pack_runs,unpack_runs
from fspn_nb.analysis.runs import collect,read_run
from fspn_nb.batches.features import cache_features
from fspn_nb.batches.fingerprint import check_inputs,write_inputs
from fspn_nb.batches.frame_store import build_store,read_frame_record,record_state
from fspn_nb.config import finediving,load_cfg,save_cfg
from fspn_nb.core import write_json
from fspn_nb.evaluate import evaluate
from fspn_nb.experiments.grid import run_one
from fspn_nb.file_hashes import frame_hashes
from fspn_nb.inspect.clip_run import find_run,run_facts
from fspn_nb.processes import LockHeld,hold_lock,lock_owner
from fspn_nb.stored_files import CHECKSUMS,damaged_files,read_table,write_checked
from fspn_nb.synthetic.release import MARKER,synth_release
from fspn_nb.train import fit,resume
from fspn_nb.training.checkpoint import backup_path,load_ckpt,save_ckpt
from fspn_nb.training.prepare import prepare

CFG = finediving('smoke', synthetic__n_train=6, synthetic__n_test=4, model__name='fspn_s', eval__num_exemplars=2)


# What is damaged, and how -------------------------------------------------------------------------------------------------------------------------

def damages(data, positions=6):
    "(kind, content) of the damaged versions of a file: bytes flipped all over it, a tail cut, nothing left, zeros of the same length"
    for at in np.linspace(0, len(data)-1, positions).astype(int):
        yield f'byte {at} flipped', data[:at]+bytes([data[at]^1])+data[at+1:]
    yield 'tail cut', data[:2*len(data)//3]
    yield 'emptied', b''
    yield 'zeros', b'\0'*len(data)


def other_digit(data, count=1):
    "The last digits of a text changed to others: the text stays valid"
    data = bytearray(data)
    for at in [i for i,byte in enumerate(data) if chr(byte).isdigit()][-count:]: data[at] = ord('0')+(data[at]-ord('0')+5)%10
    return bytes(data)


def printed_by(work):
    "(result, what was printed)"
    with contextlib.redirect_stdout(io.StringIO()) as text: result = work()
    return result,text.getvalue()


def refused(work, *parts):
    "The message of the error that `work` must raise, with all `parts` in it"
    with pytest.raises((ValueError, FileNotFoundError)) as error: work()
    assert all(part in str(error.value) for part in parts), (parts, str(error.value))
    return str(error.value)


@functools.cache
def trained():
    "(folder of runs, the run, its data): trained and measured once"
    folder = Path(tempfile.mkdtemp(prefix='fspn_damage_'))
    data,_ = printed_by(lambda: prepare(CFG, 'cpu'))
    run,_,_ = printed_by(lambda: run_one(CFG, folder, 'cpu', data, ('watch','votes'), keep_weights=True))[0]
    return folder,run,data


def copy_of_run(folder):
    "A copy of the run in `folder`, and its data"
    _,run,data = trained()
    own = Path(folder)/run.parent.name/run.name
    shutil.copytree(run, own)
    return own,data


# The cache ----------------------------------------------------------------------------------------------------------------------------------------

@case('features', 'damaged', quick=True, seconds=60)
def damaged_features(folder):
    _,_,data = trained()
    samples,hashes = data.release.samples[:3],frame_hashes(data.release.samples[:3])
    encode = lambda clips, maps=False: clips.float().mean(2 if maps else (2,3,4))
    work = lambda: cache_features(samples, CFG, data.boxes[1], encode, 'toy', hashes, folder, ('feature_maps',))
    sound,_ = printed_by(work)
    for path in sorted(Path(folder).glob('*.safetensors'))[:4]:
        for kind,content in damages(path.read_bytes(), 5):
            path.write_bytes(content)
            again,text = printed_by(work)
            assert torch.equal(again.scene, sound.scene) and torch.equal(again.actor, sound.actor) and torch.equal(again.extra['feature_maps'], sound.extra['feature_maps']), kind
            assert 'were damaged: made anew' in text, kind
            line = text
    assert 'damaged' not in printed_by(work)[1]
    return outcome('made anew', line)


@case('frame store', 'damaged', quick=True, seconds=60)
def damaged_frame_record(folder):
    _,_,data = trained()
    samples = data.release.samples[:1]
    work = lambda: build_store(samples, CFG, data.boxes[1], folder, 1)
    store,_ = printed_by(work)
    path,sound = store.paths[0],{name: value.clone() for name,value in store.rows[0].items()}
    data_there = path.read_bytes()
    for kind,content in damages(data_there, 7):
        del store
        path.unlink() # the sound one is mapped
        path.write_bytes(content)
        store,text = printed_by(work)
        assert all(torch.equal(store.rows[0][name], value) for name,value in sound.items()), kind
        assert 'is made again, its record is damaged' in text, kind
    assert record_state(path, samples[0], CFG, data.boxes[1][samples[0].uid]) == '' and read_frame_record(path)[0]
    return outcome('made anew', text)


@case('boxes', 'damaged', quick=True, seconds=60)
def damaged_boxes(folder):
    _,_,data = trained()
    samples,calls = data.release.samples[:1],[]
    class Detector:
        name,key = 'toy','toy-1'
        def __call__(self, frames):
            calls.append(len(frames))
            return [np.array([[10.,10.,60.,70.,.9]]) for _ in frames]
    work = lambda: track.detect_boxes(samples, Detector(), folder)[0][samples[0].uid]
    sound,_ = printed_by(work)
    path, = Path(folder).glob('*.npz')
    whole = path.read_bytes()
    header = whole.index(b'<f8') # half of each number: right shape, finite, and wrong
    for kind,content in [('type', whole[:header+2]+b'4'+whole[header+3:]), *damages(whole, 9)]:
        path.write_bytes(content)
        calls.clear()
        again,text = printed_by(work)
        assert np.array_equal(again, sound), kind
        assert bool(calls) == ('were damaged: made anew' in text), kind # an archive has bytes that say nothing, such as times
        path.write_bytes(whole)
    path.write_bytes(b'')
    return outcome('made anew', printed_by(work)[1])


@case('reading', 'damaged hashes', quick=True, seconds=60)
def damaged_remembered_hashes(folder):
    from fspn_nb import file_hashes
    frames = Path(folder)/'frames'
    frames.mkdir()
    for i in range(3): (frames/f'{i}.jpg').write_bytes(bytes([i])*50)
    groups,memory = {'a': (frames, ('0.jpg','1.jpg')), 'b': (frames, ('2.jpg',))},Path(folder)/'hashes.json'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file_hashes, '_YOUNG', -1.)
        work = lambda: file_hashes.group_hashes(groups, memory)
        sound,_ = printed_by(work)
        whole = memory.read_bytes()
        digit = whole.index(sound['b'].encode())
        flipped = whole[:digit]+bytes([ord('0') if whole[digit] != ord('0') else ord('1')])+whole[digit+1:]
        for kind,content in [('a digit', flipped), *damages(whole, 12)]:
            memory.write_bytes(content)
            again,text = printed_by(work)
            assert again == sound, kind
        memory.write_bytes(flipped)
        line = printed_by(work)[1]
        assert 'was damaged' in line and printed_by(work) == (sound, '')
    return outcome('made anew', line)


@case('drawing', 'damaged release', quick=True, seconds=60)
def damaged_release(folder):
    work = lambda: synth_release(Path(folder)/'few', n_train=1, n_test=1, seed=5, size=(64,36))
    root,_ = printed_by(work)
    picture,labels = sorted(root.glob('FINADiving*/*/*/*.jpg'))[5],sorted((root/'Annotations').glob('*'))[0]
    for path in (picture, labels, root/'truth'/'boxes.csv', root/'truth'/'joints.npz'):
        whole = path.read_bytes()
        for kind,content in list(damages(whole, 2))[1:]:
            path.write_bytes(content)
            text = printed_by(work)[1]
            assert path.read_bytes() == whole and 'were damaged: drawn anew' in text, (path.name, kind)
            line = text
    picture.unlink()
    assert 'were damaged: drawn anew' in printed_by(work)[1] and picture.is_file()
    marker = root/MARKER
    whole = marker.read_bytes()
    for kind,content in [('a digit', other_digit(whole)), *damages(whole, 9)]:
        marker.write_bytes(content)
        try: assert 'reused' in printed_by(work)[1] and json.loads(content) == json.loads(whole), kind # white space
        except ValueError as e: assert 'got a damaged one' in str(e) and 'delete this folder' in str(e), kind
    marker.write_bytes(whole)
    assert 'damaged' not in printed_by(work)[1]
    return outcome('made anew', line)


@case('grid', 'damaged note of a lock', quick=True, seconds=60)
def damaged_lock_note(folder):
    lock = Path(folder)/'.lock'
    with hold_lock(lock, 'it'):
        note = lock.with_name('.lock.json')
        whole,owner = note.read_bytes(),lock_owner(lock)
        for kind,content in [('a digit', other_digit(whole, 3)), *damages(whole, 20)]:
            note.write_bytes(content)
            assert lock_owner(lock) in (None, owner), kind
        from concurrent.futures import ThreadPoolExecutor
        note.write_bytes(whole.replace(b'"since": "20', b'"since": "99'))
        with ThreadPoolExecutor(1) as pool,pytest.raises(LockHeld) as error: pool.submit(lambda: hold_lock(lock, 'it').__enter__()).result()
    assert 'got another process' in str(error.value)
    with hold_lock(lock, 'it'): pass
    return outcome('named', error.value)


# A run --------------------------------------------------------------------------------------------------------------------------------------------

@case('checkpoints', 'damaged', quick=True, seconds=120)
def damaged_checkpoint(folder):
    run,data = copy_of_run(folder)
    last = run/'last.pt'
    whole,sound = last.read_bytes(),load_ckpt(last, run.name)
    backup_path(last).unlink(missing_ok=True)
    weights = lambda state: torch.cat([value.flatten().float() for value in state['model'].values()])
    name = whole.index(run.name.encode())
    for kind,content in [('the name of the run', whole[:name]+bytes([whole[name]^1])+whole[name+1:]), *damages(whole, 25)]:
        last.write_bytes(content)
        try: assert torch.equal(weights(load_ckpt(last, run.name)), weights(sound)), kind # a byte that says nothing
        except ValueError as e:
            assert 'damaged or foreign file' in str(e) and 'remove it to start afresh' in str(e), (kind, str(e))
            message = str(e)
    save_ckpt(backup_path(last), run_id=run.name, inputs=data.inputs.hashes, **{k: v for k,v in sound.items() if k not in ('run_id','inputs')})
    _,text = printed_by(lambda: fit(CFG, folder, 'cpu', data)) # `last` holds zeros
    assert 'last.pt of' in text and 'is damaged: going on from the checkpoint before it' in text
    last.write_bytes(b'')
    backup_path(last).write_bytes(b'')
    refused(lambda: fit(CFG, folder, 'cpu', data), 'damaged or foreign file', '(with its backup)')
    for path in (last, backup_path(last)): path.unlink()
    _,text = printed_by(lambda: fit(CFG, folder, 'cpu', data))
    assert 'no last.pt in its folder, training starts from the beginning' in text
    assert torch.equal(weights(load_ckpt(last, run.name)), weights(sound))
    return outcome('named', message)


@case('checkpoints', 'of a newer version', quick=True, seconds=60)
def newer_versions(folder):
    run,data = copy_of_run(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('fspn_nb.__version__', '99.0')
        state = load_ckpt(run/'last.pt', run.name)
        save_ckpt(run/'last.pt', **state)
        config = save_cfg(CFG, Path(folder)/'new.json')
    message = refused(lambda: fit(CFG, folder, 'cpu', data), 'got one of 99.0', 'update fspn_nb')
    values = json.loads(config.read_text())
    assert load_cfg(config) == CFG, 'nothing in it is unknown'
    values['model']['gates'] = 2
    write_json(config, values)
    refused(lambda: load_cfg(config), 'unknown setting model.gates', 'written by fspn_nb 99.0', 'update fspn_nb')
    write_json(config, values|dict(fspn_nb='0.0.1'))
    refused(lambda: load_cfg(config), 'unknown setting model.gates', 'written by fspn_nb 0.0.1', 'remove what it no longer knows')
    write_json(config, {name: value for name,value in values.items() if name != 'fspn_nb'})
    assert 'written by' not in refused(lambda: load_cfg(config), 'unknown setting model.gates')
    write_json(run/'config.json', values|dict(fspn_nb='99.0'), write_checked)
    assert 'unknown setting model.gates' in (problem := collect(folder).problem[0]) and 'written by fspn_nb 99.0' in problem
    record = json.loads((run/'provenance.json').read_text())
    write_json(run/'provenance.json', record|dict(fspn_nb='99.0', inputs=record['inputs']|dict(tokens='1')), write_checked)
    refused(lambda: check_inputs(run, data.inputs), 'written by fspn_nb 99.0', 'does not know the inputs tokens')
    return outcome('named', message)


@case('run notebook', 'damaged files of a run', quick=True, seconds=120)
def damaged_run_files(folder):
    run,data = copy_of_run(folder)
    weights = (run/'last.pt').stat().st_mtime_ns
    sound = {name: (run/name).read_bytes() for name in ('config.json','provenance.json','log.csv')}
    for name,whole in sound.items():
        for kind,content in [('a digit', other_digit(whole)), *damages(whole, 2)]:
            (run/name).write_bytes(content)
            assert name in damaged_files(run), (name, kind)
            _,text = printed_by(lambda: fit(CFG, folder, 'cpu', data))
            assert f'{name} was damaged' in text and 'made anew' in text, (name, kind)
            assert content_of(run/name) == content_of(name, whole) and damaged_files(run) == {}, (name, kind)
            line = text
    assert (run/'last.pt').stat().st_mtime_ns == weights, 'nothing was trained for it'
    (run/'config.json').write_bytes(sound['config.json'].replace(b'"seed": 0', b'"seed": 7'))
    edited = refused(lambda: resume(run), 'damaged, or edited by hand', 'give that file to fspn_train')
    refused(lambda: evaluate(run, device='cpu'), edited)
    assert find_run_skips(folder, run)
    (run/CHECKSUMS).write_bytes(other_digit((run/CHECKSUMS).read_bytes()))
    assert {*damaged_files(run)} >= {*sound}, 'nothing can be compared with a damaged list'
    printed_by(lambda: (fit(CFG, folder, 'cpu', data), evaluate(run, data)))
    assert (run/'config.json').read_bytes() == sound['config.json']
    return outcome('made anew', line)


def content_of(name, data=None):
    "The bytes of a file; of a provenance without the software that wrote it, which may be newer"
    data = Path(name).read_bytes() if data is None else data
    return json.dumps(json.loads(data)|dict(environment='')).encode() if Path(name).name == 'provenance.json' else data


def find_run_skips(folder, run):
    "Whether the clip page leaves a run with a damaged configuration out, by name"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        with pytest.raises(FileNotFoundError, match='need a trained FSPN run'): find_run(folder)
    return f'{run.name} is left out' in text.getvalue()


@case('evaluation', 'damaged results', quick=True, seconds=120)
def damaged_results(folder):
    run,data = copy_of_run(folder)
    row,votes,facts = read_run(run),vote_points_of(folder, run),run_facts(run)
    for name in ('predictions.csv','metrics.json','parsing.csv','votes.csv','watched.csv'):
        whole = (run/name).read_bytes()
        for kind,content in [('a digit', other_digit(whole)), *damages(whole, 3)]:
            (run/name).write_bytes(content)
            assert [*damaged_files(run)] == [name], (name, kind)
            if name in ('predictions.csv','metrics.json'):
                problem = collect(folder).problem[0]
                assert name in problem, (name, kind, problem)
            elif name == 'votes.csv': refused(lambda: vote_points_of(folder, run), 'votes.csv: need the file as it was written')
            elif name == 'parsing.csv': refused(lambda: parse_table([run]), 'parsing.csv: need the file as it was written')
            else: refused(lambda: read_table(run/name), 'watched.csv: need the file as it was written')
        if name == 'metrics.json':
            (run/name).write_bytes(other_digit(whole))
            assert printed_by(lambda: run_facts(run))[0]['rho'] is None, 'a damaged number is not shown'
        (run/name).write_bytes(whole)
    (run/'predictions.csv').write_bytes(other_digit((run/'predictions.csv').read_bytes()))
    message = collect(folder).problem[0]
    printed_by(lambda: evaluate(run, data))
    assert read_run(run) == row and vote_points_of(folder, run).equals(votes) and run_facts(run) == facts
    return outcome('named', message)


def vote_points_of(folder, run):
    "The table of votes of one run"
    from fspn_nb.analysis.compare import Scorer
    return vote_points([f'{run.parent.name}/{run.name}'], Scorer(Path(folder), 50, 50))


@case('grid', 'damaged results', quick=True, seconds=120)
def damaged_run_of_the_grid(folder):
    run,data = copy_of_run(folder)
    sound = {path.name: path.read_bytes() for path in run.glob('*.csv') if path.name != 'log.csv'}
    for path in run.glob('*.pt'): path.unlink() # as the grid does
    work = lambda: run_one(CFG, folder, 'cpu', data, ('watch','votes'))
    assert printed_by(work)[1] == '', 'a sound run is left alone'
    (run/'votes.csv').write_bytes(other_digit(sound['votes.csv']))
    _,text = printed_by(work)
    assert 'votes.csv was damaged' in text and 'the run is made anew' in text
    assert {name: (run/name).read_bytes() for name in sound} == sound and damaged_files(run) == {}
    return outcome('made anew', text)


@case('tables', 'damaged baselines', quick=True, seconds=60)
def damaged_baselines(folder):
    table = pd.DataFrame(dict(protocol='w_dn', baseline=['constant mean'], n=40, spearman=[.41], relative_l2=[.05]))
    path = write_checked(Path(folder)/'finediving'/'baselines_40.csv', table.to_csv(index=False))
    whole,sound = path.read_bytes(),read_baselines(folder, 'finediving')
    for kind,content in [('a digit', other_digit(whole)), *damages(whole, 9)]:
        path.write_bytes(content)
        message = refused(lambda: read_baselines(folder, 'finediving'), 'baselines_40.csv: need the file as it was written', 'remove it')
    path.unlink()
    write_checked(path, whole)
    assert read_baselines(folder, 'finediving').equals(sound)
    return outcome('named', message)


@case('report', 'damaged list of samples', quick=True, seconds=60)
def damaged_list_of_samples(folder):
    run,data = copy_of_run(folder)
    path = write_inputs(run, data.inputs)
    whole = path.read_bytes()
    other = dict(json.loads((run/'provenance.json').read_text())['inputs'], labels='other')
    for kind,content in damages(whole, 9):
        path.write_bytes(content)
        _,text = printed_by(lambda: write_inputs(run, data.inputs))
        assert path.read_bytes() in (whole, content) and ('was damaged: made anew' in text) == (path.read_bytes() == whole), kind
        if path.read_bytes() == whole: line = text
    path.write_bytes(b'')
    write_json(run/'provenance.json', dict(inputs=other), write_checked)
    refused(lambda: check_inputs(run, data.inputs), 'scores or other annotations') # the kind, without the samples
    return outcome('made anew', line)


@case('report', 'damaged published runs', quick=True, seconds=60)
def damaged_published_runs(folder):
    _,run,_ = trained()
    published,cache = Path(folder)/'published',Path(folder)/'cache'
    own,_ = copy_of_run(Path(folder)/'runs')
    pack_runs([Path(folder)/'runs'], published)
    root = unpack_runs(published, cache)
    sound = collect(root)
    for path in sorted(published.glob('*.*')):
        if path.name == CHECKSUMS: continue
        whole = path.read_bytes()
        for kind,content in damages(whole, 3):
            path.write_bytes(content)
            message = refused(lambda: unpack_runs(published, cache), f'{path.name}: need the file as it was written', 'pack the runs again')
        path.write_bytes(whole)
    for path in sorted((root/'finediving'/run.name).glob('*.csv')):
        whole = path.read_bytes()
        path.write_bytes(other_digit(whole))
        _,text = printed_by(lambda: unpack_runs(published, cache))
        assert 'were missing or damaged: made anew' in text and path.read_bytes() == whole, path.name
    assert collect(unpack_runs(published, cache)).equals(sound)
    (published/CHECKSUMS).unlink() # of an older version: read as it is
    assert collect(unpack_runs(published, cache)).equals(sound)
    (published/'runs.csv').write_bytes(b'')
    pack_runs([Path(folder)/'runs'], published)
    assert collect(unpack_runs(published, cache)).equals(sound)
    return outcome('named', message)
