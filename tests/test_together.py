"Two programs at once: one run, one grid, one release, one cache; what a killed one leaves; scripts, folders and names that are not as we have them"
import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import psutil
import pytest
import torch

from waiting import wait_until
from fspn_nb import core,processes
from fspn_nb.batches import features,frame_store
from fspn_nb.analysis.runs import collect
from fspn_nb.batches.dataset import load_samples
from fspn_nb.config import RunCfg,finediving,load_cfg,override,run_id,save_cfg
from fspn_nb.core import data_cache,escape,reports_dir,write_atomic
from fspn_nb.evaluate import evaluate
from fspn_nb.experiments.grid import run_grid
from fspn_nb.experiments.variants import grid_base
from fspn_nb.file_hashes import frame_hashes
from fspn_nb.processes import LockHeld,hold_lock,lock_owner,peak_memory,run_lock
from fspn_nb.stored_files import write_checked
from fspn_nb.synthetic.release import synth_release
from fspn_nb.train import fit
from fspn_nb.training.checkpoint import newest_ckpt

SMALL = dict(synthetic__n_train=6, synthetic__n_test=4)
ONE_THREAD = dict(os.environ, OMP_NUM_THREADS='1')


@pytest.fixture(scope='module')
def release():
    "The small release and its features; drawn and encoded once, by whichever test comes first"
    from fspn_nb.training.prepare import prepare
    torch.set_num_threads(1)
    return prepare(finediving('smoke', **SMALL), 'cpu')


def program(code, *args, **env):
    "A Python program of its own"
    return subprocess.Popen([sys.executable, '-c', code, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env=ONE_THREAD|env)


# One run ----------------------------------------------------------------------------------------------------------------------------------------

def start(cfg, folder, *more):
    "The trainer as a program of its own"
    command = [sys.executable, '-m', 'fspn_nb.train', str(save_cfg(cfg, folder/'config.json')), '--out', str(folder), '--device', 'cpu', *more]
    return subprocess.Popen(command, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_second_of_two_trainings_is_told_who_trains(release, tmp_path):
    cfg = finediving('smoke', **SMALL, model__name='fspn_s', train__epochs=400, train__batch_size=2)
    run = tmp_path/'finediving'/run_id(cfg)
    first = start(cfg, tmp_path, '--max-overhead', '1')
    wait_until(lambda: (run/'last.pt').exists() or first.poll() is not None)
    (run/'.note.part').write_text('half') # as if the first one were about to rename it
    refusal = f'run {run.name}: need it for this process alone, got process {first.pid} on .*config.json.*; wait until it has ended, or pass another `out`'
    with pytest.raises(LockHeld, match=refusal): fit(cfg, tmp_path, 'cpu')
    with pytest.raises(LockHeld, match=refusal): evaluate(run, device='cpu')
    second = start(cfg, tmp_path, '--processes', '2') # neither of its processes may wait for the other for ever
    err = second.communicate(timeout=200)[1]
    assert second.returncode == 1 and len(re.findall(refusal, err)) == 1 and 'Traceback' not in err, err
    assert (run/'.note.part').exists() and not (run/'metrics.json').exists() and first.poll() is None
    first.kill() # SIGKILL: no chance to tidy up
    first.communicate()
    epoch,seen = newest_ckpt(run, run.name)['epoch'],[]
    def on_epoch_end(model, data, epoch, folder):
        seen.append(epoch)
        assert lock_owner(run.with_name(f'.{run.name}.lock')).pid == os.getpid() and not (run/'.note.part').exists()
        if len(seen) == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(cfg, tmp_path, 'cpu', on_epoch_end=on_epoch_end)
    assert seen == [epoch+1, epoch+2], 'it goes on at once where the killed one stopped'
    assert not [path for path in run.parent.iterdir() if 'lock' in path.name], 'a normal end leaves no lock'


def test_locks_are_no_runs(tmp_path):
    with run_lock(tmp_path/'finediving'/'fspn-1'): assert collect(tmp_path).empty and len(list((tmp_path/'finediving').iterdir())) == 2


def test_a_thread_is_refused_and_the_same_thread_is_not(tmp_path):
    with hold_lock(tmp_path/'.lock', 'it'), hold_lock(tmp_path/'.lock', 'it'), ThreadPoolExecutor(1) as pool:
        def take():
            with hold_lock(tmp_path/'.lock', 'it'): pass
        with pytest.raises(LockHeld, match=f'got process {os.getpid()} on'): pool.submit(take).result()
        link = tmp_path/'link'
        link.symlink_to(tmp_path)
        with hold_lock(link/'.lock', 'it'): pass # the same file by another way


def test_the_lock_of_another_machine_says_how_to_be_rid_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(processes.platform, 'node', lambda: 'node-7')
    with hold_lock(tmp_path/'.lock', 'run x'), ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr(processes.platform, 'node', lambda: 'here')
        with pytest.raises(LockHeld, match=r'on node-7, since 20..-.* ago\): .*where that machine no longer runs it, remove .*/\.lock'):
            pool.submit(lambda: hold_lock(tmp_path/'.lock', 'run x').__enter__()).result()


@pytest.mark.parametrize('text', ['', '{', '[]', '{"pid": 1}', 'null'])
def test_a_broken_note_beside_a_lock_harms_nobody(tmp_path, text):
    (tmp_path/'.lock.json').write_text(text)
    assert lock_owner(tmp_path/'.lock') is None
    with hold_lock(tmp_path/'.lock', 'it'): assert lock_owner(tmp_path/'.lock').pid == os.getpid()


# One grid ---------------------------------------------------------------------------------------------------------------------------------------

GRID = """
import sys
from fspn_nb.experiments.grid import run_grid
from fspn_nb.experiments.variants import grid_base
if __name__ == '__main__':
    print('go', flush=True); input()
    table = run_grid(grid_base('smoke', train__epochs=4, model__stages=1, synthetic__n_train=6, synthetic__n_test=4), 'II,III', (0,), sys.argv[1], 'cpu', 1, False)
    table.to_json(sys.argv[2])
"""


def test_two_grids_in_one_folder_share_the_runs(release, tmp_path):
    grids = [program(GRID, tmp_path/'out', tmp_path/f'{i}.json') for i in range(2)]
    for grid in grids: assert grid.stdout.readline() == 'go\n'
    for grid in grids: grid.stdin.write('\n'); grid.stdin.flush()
    for grid in grids: assert grid.wait(timeout=300) == 0, grid.stderr.read()
    tables = [pd.read_json(tmp_path/f'{i}.json') for i in range(2)]
    assert set(pd.concat(tables).status) <= {'trained','there','elsewhere'}
    trained = sum((table.status == 'trained').astype(int) for table in tables)
    assert (trained == 1).all(), f'each run is trained by one of them: {trained.tolist()}'
    assert min((table.status == 'trained').sum() for table in tables) >= 2, 'both have worked'
    base = grid_base('smoke', train__epochs=4, model__stages=1, **SMALL)
    assert (run_grid(base, 'II,III', (0,), tmp_path/'out', 'cpu', 1, False).status == 'there').all()


def test_a_finished_run_of_other_data_is_not_there(release, tmp_path):
    base = grid_base('smoke', train__epochs=1, model__stages=1, **SMALL)
    plan = run_grid(base, 'V', (0,), tmp_path, 'cpu', 1, False)
    assert (plan.status == 'trained').all()
    file = tmp_path/plan.run[1]/'provenance.json'
    facts = json.loads(file.read_text())
    facts['inputs']['labels'] = 'other'
    write_checked(file, json.dumps(facts)) # not damaged, but of other data
    again = run_grid(base, 'V', (0,), tmp_path, 'cpu', 1, False)
    assert again.status.tolist() == ['there','failed',*['there']*(len(again)-2)]
    assert 'need the data that this run was made from' in again.problem[1] and 'scores' in again.problem[1]


# One release, one cache -------------------------------------------------------------------------------------------------------------------------

DRAW = """
import sys
from fspn_nb.synthetic.release import synth_release
print('go', flush=True); input()
synth_release(sys.argv[1], n_train=6, n_test=4, size=(64,36), workers=1)
"""


def test_a_release_is_drawn_once(tmp_path):
    root = tmp_path/'few'
    (tmp_path/'.few.77.part').mkdir() # left by a process that was killed
    first,second = (program(DRAW, root) for _ in range(2))
    for p in (first, second): assert p.stdout.readline() == 'go\n'
    first.stdin.write('\n'); first.stdin.flush()
    wait_until(lambda: (tmp_path/'.few.lock.json').exists() or first.poll() is not None)
    second.stdin.write('\n'); second.stdin.flush()
    texts = [p.communicate(timeout=120) for p in (first, second)]
    assert 'release drawn' in texts[0][0], texts
    assert f'synthetic release few: need it for this process alone, got process {first.pid}' in texts[1][0] and '(waiting)' in texts[1][0]
    assert 'release reused' in texts[1][0]
    assert [path.name for path in tmp_path.iterdir()] == ['few']


def test_features_of_the_same_videos_are_computed_once(release, tmp_path, capsys):
    samples,cfg,calls = release.release.samples,release.cfg,[]
    frames = frame_hashes(samples)
    def encode(clips):
        calls.append(1); time.sleep(.02)
        return torch.zeros(len(clips), 4)
    def work(): return features.cache_features(samples, cfg, release.boxes[1], encode, 'w', frames, tmp_path)
    with ThreadPoolExecutor(3) as pool: sets = [future.result() for future in [pool.submit(work) for _ in range(3)]]
    assert len(calls) == 2*len(samples), 'both streams of each video, once'
    assert all(torch.equal(sets[0].scene, other.scene) for other in sets) and not list(tmp_path.glob('.*'))
    assert 'I3D features of 10 videos' in capsys.readouterr().out


def test_frames_of_the_same_videos_are_stored_once(release, tmp_path, monkeypatch):
    written,write = [],frame_store.write_record
    def counted(path, *args):
        written.append(path)
        return write(path, *args)
    monkeypatch.setattr(frame_store, 'write_record', counted)
    def work(): return frame_store.build_store(release.release.samples, release.cfg, release.boxes[1], tmp_path, 1)
    with ThreadPoolExecutor(2) as pool: stores = [future.result() for future in [pool.submit(work) for _ in range(2)]]
    assert len(written) == len(set(written)) == len(release.release.samples)
    assert stores[0].nbytes == stores[1].nbytes and not list(tmp_path.glob('.*'))


def test_two_writers_of_one_file_do_not_share_an_unfinished_one(tmp_path):
    barrier = threading.Barrier(2)
    def write(letter):
        def content(part):
            part.write_text(letter*1000)
            barrier.wait(timeout=30) # both unfinished files are there
        return write_atomic(tmp_path/'table.csv', content)
    with ThreadPoolExecutor(2) as pool: list(pool.map(write, 'ab'))
    assert (tmp_path/'table.csv').read_text() in ('a'*1000, 'b'*1000) and len(list(tmp_path.iterdir())) == 1


def test_make_clean_leaves_what_others_are_at(tmp_path):
    (tmp_path/'Makefile').write_bytes((Path(__file__).parents[1]/'Makefile').read_bytes())
    runs,cache = tmp_path/'reports'/'runs'/'finediving',tmp_path/'.cache'
    for folder in (runs/'fspn-1', cache/f'.few.{os.getpid()}.part', cache/'.few.4194305.part', cache/'k_x.part'): folder.mkdir(parents=True)
    for name in (f'.a b.csv.{os.getpid()}-0a1b.part', '.a b.csv.4194305-0a1b.part'): (tmp_path/name).write_text('half')
    def clean(): return subprocess.run(['make', 'clean'], cwd=tmp_path, capture_output=True, text=True)
    with run_lock(runs/'fspn-1'):
        refused = clean()
        assert refused.returncode and f'process {os.getpid()} works on a run' in refused.stdout and (runs/'fspn-1').is_dir()
    (runs/'.fspn-1.lock.json').write_text('{"pid": 4194305}') # left by a kill
    assert clean().returncode == 0 and not runs.exists()
    left = {path.name for path in tmp_path.rglob('*.part')}
    assert left == {f'.few.{os.getpid()}.part', f'.a b.csv.{os.getpid()}-0a1b.part'}


# Scripts without a main guard -------------------------------------------------------------------------------------------------------------------

PREPARE = """
from fspn_nb.config import finediving
from fspn_nb.training.prepare import prepare
prepare(finediving('smoke', synthetic__n_train=12, synthetic__n_test=8, clip__size=32), 'cpu')
"""
BARE_GRID = """
from fspn_nb.experiments.grid import run_grid
from fspn_nb.experiments.variants import grid_base
run_grid(grid_base('smoke', train__epochs=1, model__stages=1), 'II', (0,), 'out', 'cpu', 2, False)
"""


def test_a_script_without_main_guard_is_told_so_in_one_sentence(tmp_path):
    scripts = []
    for name,text in (('prepare',PREPARE), ('grid',BARE_GRID)):
        (tmp_path/name).mkdir()
        (tmp_path/name/'script.py').write_text(text)
        scripts.append(subprocess.Popen([sys.executable, 'script.py'], cwd=tmp_path/name, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                        env=ONE_THREAD|dict(FSPN_CACHE=str(tmp_path/name/'cache'), PYTHONPATH=str(core.repo_root()))))
    for script in scripts:
        _,err = script.communicate(timeout=200)
        assert script.returncode == 1 and len(err.splitlines()) < 60 and err.count('Traceback') == 1 and 'BrokenProcessPool' not in err, err
        last = err.splitlines()[-1]
        assert "need a script whose calls stand under `if __name__ == '__main__':`" in last and 'script.py' in last, last
    assert not list((tmp_path/'prepare'/'cache').iterdir()), 'nothing half-drawn is left'


# Folders and names ------------------------------------------------------------------------------------------------------------------------------

def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path/'file').write_text('')
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path/'file'/'cache'))
    with pytest.raises(PermissionError, match='FSPN_CACHE'): synth_release(n_train=2, n_test=1)
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path/'file')) # a file instead of a folder
    with pytest.raises(PermissionError, match='FSPN_CACHE'): data_cache()
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path/'sealed'))
    def refuse(dir): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(core.tempfile, 'TemporaryFile', refuse) # a folder that is there and takes no file
    with pytest.raises(PermissionError, match='Permission denied.*FSPN_CACHE'): data_cache()


@pytest.mark.parametrize('foreign', [False, True])
def test_without_a_checkout_the_cache_is_the_users_and_that_is_said_once(tmp_path, monkeypatch, capsys, foreign):
    work = tmp_path/'work'
    work.mkdir()
    if foreign: (work/'settings.ini').write_text('[DEFAULT]\nlib_name = another_nbdev_project\n')
    for name in ('FSPN_CACHE','IN_TEST'): monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path/'home'))
    monkeypatch.chdir(work)
    core._say_once.cache_clear()
    assert [data_cache() for _ in range(2)] == [tmp_path/'home'/'fspn_nb']*2
    assert [reports_dir() for _ in range(2)] == [work/'reports'/'runs']*2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and 'FSPN_CACHE' in lines[0] and str(work/'reports'/'runs') in lines[1]
    assert {path.name for path in work.iterdir()} <= {'settings.ini','reports'}, 'no .cache beside the work of others'
    assert core.repo_root(Path(__file__)) == Path(__file__).resolve().parents[1]


def test_paths_of_a_configuration_hold_in_every_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = finediving('smoke', data_root='films', weights='./w/i3d.pt', actor__boxes='~/boxes.csv', actor__source='boxes')
    file = save_cfg(cfg, 'run.json')
    monkeypatch.chdir('/')
    assert load_cfg(tmp_path/file) == cfg
    assert (cfg.data_root, cfg.weights) == (str(tmp_path/'films'), str(tmp_path/'w'/'i3d.pt')) and Path(cfg.actor.boxes) == Path.home()/'boxes.csv'
    assert override(cfg, data_root='').data_root == '' and RunCfg(weights='random').weights == 'random'
    with pytest.raises(FileNotFoundError, match=str(tmp_path/'films')): load_samples(cfg)


BAD = os.fsdecode(b'caf\xe9') # a name from the time before UTF-8


def test_names_that_are_no_utf8_are_escaped(tmp_path, monkeypatch):
    from fspn_nb.data.check import check_cli
    strict = io.TextIOWrapper(io.BytesIO(), 'utf-8', 'strict')
    monkeypatch.setattr(sys, 'stdout', strict)
    (tmp_path/BAD).mkdir()
    assert check_cli(['finediving', str(tmp_path/BAD), '--csv', str(tmp_path/BAD/'findings.csv')]) == 1
    strict.flush()
    assert r'caf\udce9' in strict.buffer.getvalue().decode()
    assert r'caf\udce9' in (tmp_path/BAD/'findings.csv').read_text(encoding='utf-8')
    with hold_lock(tmp_path/BAD/'.lock', BAD): json.loads((tmp_path/BAD/'.lock.json').read_text(encoding='utf-8'))
    cfg = finediving('smoke', data_root=str(tmp_path/BAD))
    assert load_cfg(save_cfg(cfg, tmp_path/BAD/'config.json')) == cfg, 'a configuration keeps the real name'
    assert escape(f'ρ {BAD}') == r'ρ caf\udce9' and write_atomic(tmp_path/'t.csv', f'uid\n{BAD}\n').read_text(encoding='utf-8') == 'uid\ncaf\\udce9\n'


# Other systems ----------------------------------------------------------------------------------------------------------------------------------

ELSEWHERE = """
import importlib,os,pkgutil,signal,sys
import matplotlib.pyplot,pandas,psutil,filelock,platformdirs,scipy.stats,seaborn,torch,torchvision,tqdm,multiprocessing.spawn,concurrent.futures.process
from filelock import FileLock,SoftFileLock,Timeout
import safetensors.torch,torch.utils.checkpoint # what others import on this system does not count
for name in ('resource','fcntl','pwd','grp','termios','tty','pty'): sys.modules[name] = None
for name in ('SIGKILL','SIGUSR1','SIGALRM','SIGHUP'): delattr(signal, name)
for name in ('sched_getaffinity','fork','getuid','geteuid','uname','getloadavg','mkfifo','sysconf','O_NOFOLLOW','O_NONBLOCK'): delattr(os, name)
sys.platform = 'win32'
import fspn_nb
for module in pkgutil.walk_packages(fspn_nb.__path__, 'fspn_nb.'): importlib.import_module(module.name)
from fspn_nb.processes import peak_memory,tune_malloc
from fspn_nb.batches.store_source import free_memory
from fspn_nb.synthetic.release import _workers
print(peak_memory(), free_memory(), tune_malloc(), _workers(800, None))
"""


def test_every_module_is_imported_without_what_only_linux_has():
    p = program(ELSEWHERE)
    out,err = p.communicate(timeout=200)
    assert p.returncode == 0, err[-2000:]
    peak,free,tuned,workers = out.split()
    assert 1e8 < int(peak) < 1e11 and int(free) > 1e6 and tuned == 'False' and int(workers) == os.cpu_count()


def test_memory_is_in_bytes_on_every_system(monkeypatch):
    import resource
    rss = psutil.Process().memory_info().rss
    monkeypatch.setattr(resource, 'getrusage', lambda who: type('Usage', (), dict(ru_maxrss=3_000_000)))
    assert peak_memory() == 3_000_000*1024
    monkeypatch.setattr(processes.sys, 'platform', 'darwin') # macOS counts bytes
    assert peak_memory() == 3_000_000
    monkeypatch.setitem(sys.modules, 'resource', None) # Windows has no such module
    assert .5*rss < peak_memory() < 2*rss
    fake = type('Process', (), dict(memory_info=lambda self: type('Info', (), dict(rss=1, peak_wset=7))))
    monkeypatch.setattr(processes.psutil, 'Process', fake)
    assert peak_memory() == 7


def test_no_exported_module_names_what_only_linux_has():
    root = Path(core.__file__).parent
    for path in root.rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        for name in ('/proc/','import fcntl','os.fork','os.getuid','signal.SIGKILL'): assert name not in text, f'{path.name}: {name}'
