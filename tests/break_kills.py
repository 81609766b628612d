"""Programs that are killed: the run notebooks, the trainer, a grid and its workers, two programs in one cache

    python tests/break_kills.py [--out reports/benchmarks/kills.csv] [--workers 2]

Each kill is a run of its own: started, killed at a moment that a seeded draw chooses, started again with the same command, and left alone. Then every
table, prediction, metric, page and picture must be that of a run that nobody touched, byte for byte; no process and no unfinished file may be left.
The command writes one line per kill; the table of stages x faults (tests/break_it.py) does the same kills and keeps the sentence.
"""
import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pandas as pd
import psutil
import torch

from fault_cases import case,outcome
from waiting import wait_until
from fspn_nb.config import finediving,run_id,save_cfg
from fspn_nb.experiments.grid import run_grid,run_one
from fspn_nb.experiments.variants import config_of,grid_base
from fspn_nb.processes import lock_owner
from fspn_nb.stored_files import remove_unfinished
from fspn_nb.training.checkpoint import checksum,newest_ckpt

ROOT = Path(__file__).resolve().parents[1]
MARK = 'FSPN_KILL_MARK' # in the environment of a program and of all its descendants
SMALL = dict(synthetic__n_train=6, synthetic__n_test=4)


# Programs and what they leave ---------------------------------------------------------------------------------------------------------------------

class Program:
    "A program of its own, its output in a file, its descendants known by a mark"
    def __init__(self, command, log, **env):
        self.log,self.mark,self.began = Path(log),uuid.uuid4().hex,time.monotonic()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), MPLBACKEND='agg', **env) | {MARK: self.mark}
        env.pop('IN_TEST', None)
        with open(self.log, 'wb') as file:
            self.process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT)

    @property
    def text(self): return self.log.read_text(encoding='utf-8', errors='replace')

    @property
    def runs(self): return self.process.poll() is None

    def tree(self):
        "All its processes that are alive, the program itself first"
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE: found.append(process)
            except psutil.Error: pass
        return sorted(found, key=lambda p: (p.pid != self.process.pid, p.create_time()))

    def end(self, victim='all', number=signal.SIGKILL, patience=30):
        "Send the signal to one of its processes or to all; seconds until none is alive"
        tree,began = self.tree(),time.monotonic()
        for process in dict(all=tree, program=tree[:1], kernel=tree[1:2])[victim]: # papermill starts its kernel first
            try: process.send_signal(number)
            except psutil.NoSuchProcess: pass
        self.process.wait(patience)
        while self.tree():
            if time.monotonic()-began > patience:
                for process in (orphans := self.tree()): process.kill()
                raise AssertionError(f'{victim} ended, and after {patience} s these were alive: {orphans}')
            time.sleep(.02)
        return round(time.monotonic()-began, 2)

    def finish(self, seconds=300):
        "Wait for a normal end; the text"
        status = self.process.wait(seconds)
        assert status == 0, self.text[-3000:]
        wait_until(lambda: not self.tree(), seconds=10) # Python's resource tracker ends a moment after its program
        return self.text


def unfinished(*folders):
    "Files that a program writes and removes or renames before its end"
    return sorted(path.name for folder in folders for path in Path(folder).rglob('.*') if path.is_file() or path.name.endswith('.part'))


def results(folder):
    "{path: content} of everything that must not depend on a kill; of checkpoints the weights, of a log all but the seconds"
    found = {}
    for path in sorted(path for path in Path(folder).rglob('*') if path.is_file() and not path.name.startswith('.')):
        if path.name in ('provenance.json','checksums.json','last.backup.pt'): continue # environment; number of attempts; the moment of the last checkpoint
        if path.suffix == '.pt': content = checksum(torch.load(path, weights_only=True)['model'])
        elif path.name == 'log.csv': content = pd.read_csv(path).drop(columns='seconds').to_csv()
        else: content = path.read_bytes()
        found[path.relative_to(folder).as_posix()] = content
    return found


def difference(folder, expected):
    "What in `folder` is not as expected, as words; '' where nothing is"
    now = results(folder)
    return ', '.join(sorted(name for name in now.keys()|expected.keys() if now.get(name) != expected.get(name)))


# Run notebooks ------------------------------------------------------------------------------------------------------------------------------------

PARAMETERS = dict(run_finediving='-p preset smoke', run_mtl_aqa='-p preset smoke -p methods i3d_mlp,fspn_s', run_aqa7='-p preset smoke -p classes gym_vault -p methods i3d_mlp',
                  run_ablations='-p preset smoke -p tables VI -p seeds 0 -p epochs 3', report='-p preset smoke -p seeds 0 -p resamples 50 -p exchanges 50', score_clip='')
READ_RUNS = ('report','score_clip') # need runs that are there


def start_notebook(name, folder, cache):
    "papermill as a user calls it"
    command = ['-m','papermill','--log-output','--no-progress-bar',f'nbs/{name}.ipynb',folder/f'{name}.ipynb','-p','out',folder/'runs',*PARAMETERS[name].split()]
    return Program(command, folder/f'{uuid.uuid4().hex[:6]}.log', FSPN_CACHE=str(cache))


def cell_of(text):
    "Number of the cell that runs"
    return max([0, *map(int, re.findall(r'Executing Cell (\d+)', text))])


def watch(program):
    "Seconds at which each cell began, and the whole time"
    began = {0: 0.}
    while program.runs:
        began.setdefault(cell_of(program.text), time.monotonic()-program.began)
        time.sleep(.02)
    return began,time.monotonic()-program.began


class Untouched:
    "A run of a notebook that nobody touched: its results, the moments of its cells, what it printed, and a cache that is filled"
    def __init__(self, name, folder):
        self.name,self.folder,self.cache = name,Path(folder)/'untouched',Path(folder)/'cache'
        self.folder.mkdir(parents=True)
        self.runs = None
        if name in READ_RUNS: # another notebook makes them
            start_notebook('run_finediving', self.folder, self.cache).finish()
            self.runs = shutil.copytree(self.folder/'runs', Path(folder)/'runs')
        program = start_notebook(name, self.folder, self.cache)
        self.cells,self.whole = watch(program)
        self.lines = self.sentences(program.finish())
        self.expected = results(self.folder/'runs')
        assert not unfinished(self.folder/'runs', self.cache), unfinished(self.folder/'runs', self.cache)

    @staticmethod
    def sentences(text):
        "The lines of a log without bars, seconds and the frame of papermill"
        skip = r'it/s\]|s/it\]|Executing|release (drawn|reused)|Ending Cell|Notebook:|IPKernelApp|^\s*$|ready after|\bmin\b|minutes|ms_per_video|^\d+ .*frozen|Figure size|IPython.core'
        return list(dict.fromkeys(line.strip() for line in text.splitlines() if not re.search(skip, line)))

    def moment(self, rng, empty):
        "(cell, seconds after its begin) of a moment that is drawn from the whole time; with a cache that is filled, the cell that fills it takes a second"
        begins = [*self.cells.values(), self.whole]
        seconds = {cell: end-begin for cell,begin,end in zip(self.cells, begins, begins[1:])}
        if not empty: seconds[max(seconds, key=seconds.get)] = 1.
        second = rng.uniform(.5, sum(seconds.values())-.5)
        for cell,duration in seconds.items():
            if second < duration: return cell,second
            second -= duration


def kill_notebook(untouched, folder, k, number=signal.SIGKILL, victim=None, cell=None):
    "Kill number `k` of the notebook, and the same command again; a row"
    rng = random.Random(1000*list(PARAMETERS).index(untouched.name)+k)
    victim,empty = victim or ('all','program')[k//2 % 2],k % 4 == 0 and untouched.name not in READ_RUNS
    folder = Path(folder)/f'{untouched.name}_{k}_{number}_{victim}'
    cache = folder/'cache' if empty else untouched.cache
    folder.mkdir(parents=True)
    if untouched.runs: shutil.copytree(untouched.runs, folder/'runs')
    at,delay = untouched.moment(rng, empty or untouched.runs) if cell is None else (cell, .3)
    program = start_notebook(untouched.name, folder, cache)
    while program.runs and cell_of(program.text) < at: time.sleep(.005)
    end = time.monotonic()+delay
    while program.runs and time.monotonic() < end and cell_of(program.text) == at: time.sleep(.005)
    assert program.runs, f'it ended before it was killed: {program.text[-2000:]}'
    second,where = time.monotonic()-program.began,cell_of(program.text)
    gone = program.end(victim, number)
    left = unfinished(folder/'runs', cache)
    done = len(list(folder.glob('runs/*/*/metrics.json')))
    again = start_notebook(untouched.name, folder, cache)
    new = [line for line in untouched.sentences(again.finish()) if line not in untouched.lines]
    differs,rest = difference(folder/'runs', untouched.expected),unfinished(folder/'runs', cache)
    row = dict(program=untouched.name, kill=k+1, signal=number.name, victim=victim, cache='empty' if empty else 'ready', second=round(second, 1),
               where=f'cell {where}', finished_runs=done, left=' '.join(left), gone_after_s=gone, next_start=' | '.join(new)[:200], differs=differs, rest=' '.join(rest),
               told=next((line for line in reversed(program.text.splitlines()) if line.strip()), '')[:200])
    shutil.rmtree(folder)
    return row


def hold(rows):
    "An outcome where each of the rows is as it must be"
    bad = [row for row in rows if row['differs'] or row['rest']]
    assert not bad, json.dumps(bad, indent=1)
    said = ' | '.join(sorted({row['next_start'] for row in rows} - {''}))
    return outcome('goes on', f'{len(rows)} of {len(rows)} equal after the same command again; all processes gone after {max(row["gone_after_s"] for row in rows):.1f} s; the next start: {said or "as ever"}')


def kill_notebook_often(name, kills, folder, **options):
    "Rows of several kills of one notebook"
    untouched = Untouched(name, folder)
    return [kill_notebook(untouched, folder, k, **options) for k in kills]


@case('run notebook', 'SIGKILL', seconds=1100)
def finediving_killed_ten_times(folder): return hold(kill_notebook_often('run_finediving', range(10), folder))


@case('run notebook', 'SIGKILL', seconds=1100)
def finediving_killed_ten_more_times(folder): return hold(kill_notebook_often('run_finediving', range(10, 20), folder))


@case('run notebook', 'SIGKILL', seconds=600)
def mtl_aqa_killed(folder): return hold(kill_notebook_often('run_mtl_aqa', range(2), folder))


@case('run notebook', 'SIGKILL', seconds=600)
def aqa7_killed(folder): return hold(kill_notebook_often('run_aqa7', range(2), folder))


@case('grid', 'SIGKILL of the notebook', seconds=600)
def ablations_killed(folder): return hold(kill_notebook_often('run_ablations', range(2), folder))


@case('report', 'SIGKILL', seconds=300)
def report_killed(folder): return hold(kill_notebook_often('report', range(2), folder))


@case('clip page', 'SIGKILL', seconds=300)
def score_clip_killed(folder): return hold(kill_notebook_often('score_clip', range(2), folder))


@case('run notebook', 'SIGTERM', seconds=400)
def finediving_sent_sigterm(folder):
    untouched = Untouched('run_finediving', folder)
    rows = [kill_notebook(untouched, folder, 21+4*i, signal.SIGTERM, victim, cell) for i,(victim,cell) in enumerate([('program', 13), ('kernel', 13), ('all', 13), ('all', None)])]
    return hold(rows)


# The trainer: kills in the middle of an epoch and of a checkpoint -----------------------------------------------------------------------------------

TRAINED = finediving('smoke', train__epochs=8, train__val_fraction=.2, model__name='fspn_s', model__dropout=.3)


def train(folder):
    "The trainer as a program"
    config = save_cfg(TRAINED, Path(folder)/'config.json')
    return Program(['-m','fspn_nb.train',config,'--out',folder,'--device','cpu','--max-overhead','.3'], Path(folder)/f'{uuid.uuid4().hex[:6]}.log')


def measured(folder):
    "Results of a trained run, measured in this process"
    from fspn_nb.evaluate import evaluate
    evaluate(Path(folder)/TRAINED.dataset/run_id(TRAINED), device='cpu')
    return results(Path(folder)/TRAINED.dataset)


def kill_trainer(folder, k, expected, whole, number=signal.SIGKILL):
    "Kill number `k` of the trainer, every second one while a checkpoint is written; a row"
    rng,folder = random.Random(k),Path(folder)/f'trained_{k}_{number}'
    run = folder/TRAINED.dataset/run_id(TRAINED)
    program = train(folder)
    while program.runs and not (run/'config.json').exists(): time.sleep(.005)
    end = time.monotonic()+rng.uniform(0, .8*whole)
    while program.runs and time.monotonic() < end: time.sleep(.001)
    while k % 2 and program.runs and not list(run.glob('.last.pt.*.part')): pass
    if not program.runs: # the machine has become faster since `whole` was measured
        program.finish()
        shutil.rmtree(folder)
        return kill_trainer(folder.parent, k, expected, .7*whole, number)
    second = time.monotonic()-program.began
    gone = program.end('all', number)
    state = newest_ckpt(run, run.name) or dict(epoch=0, within_epoch=None)
    if state['epoch'] == TRAINED.train.epochs: # it was at its last lines: too late to be called a kill
        shutil.rmtree(folder)
        return kill_trainer(folder.parent, k, expected, .7*whole, number)
    left = unfinished(folder)
    new = [line for line in train(folder).finish().splitlines() if 'fspn_s w_dn:' not in line and run.name not in line.split('/')[-1:]]
    now = measured(folder)
    row = dict(program='fspn_nb.train', kill=k+1, signal=number.name, victim='all', cache='ready', second=round(second, 1),
               where=f"epoch {state['epoch']}, step {(state['within_epoch'] or dict(step=0))['step']}", finished_runs=0, left=' '.join(left), gone_after_s=gone,
               next_start=' | '.join(line for line in new if 'going on' in line or 'training starts' in line)[:200],
               differs=', '.join(sorted(name for name in now.keys()|expected.keys() if now.get(name) != expected.get(name))), rest=' '.join(unfinished(folder)),
               told=next((line for line in reversed(program.text.splitlines()) if line.strip()), '')[:200])
    shutil.rmtree(folder)
    return row


def kill_trainer_often(kills, folder, number=signal.SIGKILL):
    "Rows of several kills of the trainer"
    folder = Path(folder)/'whole'
    program = train(folder)
    log = folder/TRAINED.dataset/run_id(TRAINED)/'config.json'
    while program.runs and not log.exists(): time.sleep(.005)
    began = time.monotonic()
    program.finish()
    whole,expected = time.monotonic()-began,measured(folder)
    return [kill_trainer(folder.parent, k, expected, whole, number) for k in kills]


@case('checkpoints', 'SIGKILL', seconds=500)
def trainer_killed_ten_times(folder): return hold(kill_trainer_often(range(10), folder))


@case('checkpoints', 'SIGTERM', seconds=200)
def trainer_sent_sigterm(folder):
    rows = kill_trainer_often((20, 22), folder, signal.SIGTERM)
    assert all('stopped by SIGTERM' in row['told'] for row in rows), rows
    return hold(rows)


# Power cut: a file that is written and not yet renamed ----------------------------------------------------------------------------------------------

POWER_CUT = """
import os,signal,sys
from itertools import count
from pathlib import Path
from fspn_nb import evaluate,train
from fspn_nb.config import load_cfg

def work(out): # a fork is safe here: PyTorch has computed nothing yet, and has one thread
    if (pid := os.fork()) == 0:
        sys.stdout = open(os.devnull, 'w')
        evaluate.evaluate(train.fit(cfg, out, 'cpu', max_checkpoint_overhead=.5), device='cpu')
        os._exit(0)
    return os.waitpid(pid, 0)[1]

cfg,out,replace,step = load_cfg(sys.argv[1]),Path(sys.argv[2]),os.replace,int(sys.argv[3])
print('untouched', work(out/'untouched'), flush=True)
for n in count(1, step):
    names = []
    def cut(part, path):
        names.append(path)
        if len(names) == n: os.kill(os.getpid(), signal.SIGKILL)
        replace(part, path)
    os.replace = cut
    status = work(out/f'cut_{n}')
    os.replace = replace
    if status == 0: break # there were fewer than n files
    left = sorted(path.name for path in (out/f'cut_{n}').rglob('.*.part'))
    print('cut', n, left, work(out/f'cut_{n}'), flush=True)
"""


@case('checkpoints', 'power cut between write and rename', seconds=600)
def power_cut_before_every_rename(folder):
    save_cfg(finediving('smoke', **SMALL, model__name='i3d_mlp'), folder/'config.json')
    text = Program(['-c',POWER_CUT,folder/'config.json',folder/'out',1], folder/'log').finish(590)
    expected,cuts = results(folder/'out'/'untouched'),[path for path in sorted((folder/'out').glob('cut_*'))]
    assert 'untouched 0' in text and len(cuts) > 10, text
    for cut in cuts:
        for part in cut.rglob('.*.part'): os.utime(part, (0, 0)) # beside the run's folder they are left alone for ten minutes
        remove_unfinished(cut)
        assert not difference(cut, expected) and not unfinished(cut), f'{cut.name}: {difference(cut, expected)} {unfinished(cut)}, {text}'
    names = sorted({re.sub(r"^\.|\.\d+-[0-9a-f]{8}\.part$", '', name) for name in re.findall(r"'([^']+\.part)'", text)})
    return outcome('goes on', f'{len(cuts)-1} cuts, one before each rename ({", ".join(names)}): all equal after the next start, no unfinished file left')


# The grid and its workers -------------------------------------------------------------------------------------------------------------------------

GRID = """
import sys
import tempfile
from fspn_nb.experiments.grid import run_grid
from fspn_nb.experiments.variants import grid_base
if __name__ == '__main__':
    base = grid_base('smoke', train__epochs=int(sys.argv[3]), model__stages=1, synthetic__n_train=6, synthetic__n_test=4)
    run_grid(base, 'II', (0,), sys.argv[1], 'cpu', 2, False).to_json(sys.argv[2])
"""


def grid_of(epochs): return grid_base('smoke', train__epochs=epochs, model__stages=1, **SMALL)


def started_grid(folder, epochs):
    "A grid of four runs in two workers, of which one at least has trained an epoch; its program, and that run"
    (folder/'grid.py').write_text(GRID)
    program = Program([folder/'grid.py',folder/'out',folder/'table.json',epochs], folder/'log')
    wait_until(lambda: list(folder.glob('out/*/*/log.csv')) or not program.runs)
    assert program.runs, program.text[-2000:]
    return program,next(folder.glob('out/*/*/log.csv')).parent


def same_as_alone(table, folder, epochs, positions):
    "The runs at these positions of the grid are what they are where nobody touched them"
    for i in positions:
        alone = run_one(config_of(grid_of(epochs), table.experiment[i], 0, table.protocol[i], False), folder/'alone', 'cpu')[0]
        assert (folder/'out'/table.run[i]/'predictions.csv').read_bytes() == (alone/'predictions.csv').read_bytes(), alone.name


@case('grid', 'SIGKILL of a worker', quick=True, seconds=120)
def grid_worker_killed(folder):
    program,run = started_grid(folder, 6)
    owner = lock_owner(run.with_name(f'.{run.name}.lock'))
    os.kill(owner.pid, signal.SIGKILL) # what the system does for want of memory
    program.finish()
    table = pd.read_json(folder/'table.json')
    failed = table[table.status == 'failed']
    assert failed.run.tolist() == [f'finediving/{run.name}'] and table.status.value_counts().to_dict() == dict(trained=3, failed=1), table
    again = run_grid(grid_of(6), 'II', (0,), folder/'out', 'cpu', 1, False)
    assert again.status.value_counts().to_dict() == dict(there=3, trained=1) and again.status[failed.index[0]] == 'trained', again
    same_as_alone(again, folder, 6, failed.index)
    assert not unfinished(folder/'out'), unfinished(folder/'out')
    return outcome('named', f'{failed.run.iloc[0]}: {failed.problem.iloc[0]}')


@case('grid', 'SIGTERM of a worker', seconds=120)
def grid_worker_sent_sigterm(folder):
    program,run = started_grid(folder, 40)
    os.kill(lock_owner(run.with_name(f'.{run.name}.lock')).pid, signal.SIGTERM)
    program.finish()
    table = pd.read_json(folder/'table.json')
    assert table.run[table.status == 'failed'].tolist() == [f'finediving/{run.name}'] and (table.status == 'trained').sum() == 3, table
    assert (run/'last.pt').is_file(), 'it saved itself'
    return outcome('named', table.problem[table.status == 'failed'].iloc[0])


@case('grid', 'SIGKILL of the parent', seconds=400)
def grid_parent_killed(folder):
    program,_ = started_grid(folder, 60)
    gone = program.end('program')
    files = {path: path.stat().st_mtime_ns for path in folder.rglob('*')}
    time.sleep(1)
    assert files == {path: path.stat().st_mtime_ns for path in folder.rglob('*')}, 'somebody still writes'
    again = run_grid(grid_of(60), 'II', (0,), folder/'out', 'cpu', 1, False)
    assert set(again.status) <= {'there','trained'} and not unfinished(folder/'out'), (again, unfinished(folder/'out'))
    same_as_alone(again, folder, 60, again.index)
    return outcome('goes on', f'its workers ended after {gone:.1f} s; the next start: {again.status.value_counts().to_dict()}, the same predictions')


@case('run notebook', 'SIGKILL of a worker', seconds=180)
def session_worker_killed(folder):
    import contextlib,io,threading
    from fspn_nb.experiments import session
    parameters = dict(data_root='', preset='smoke', methods='i3d_mlp,fspn_s', protocol='w_dn', per_difficulty=False, seeds='0', backbone='frozen', weights='', device='cpu',
                      processes=1, epochs=60, allow_missing=False, actor='auto', actor_file='', changes='', out=str(folder/'out'))
    context = session.start('finediving', parameters, **SMALL)
    datas,session._MIN_VIDEOS = session.read_data(context),1
    run = folder/'out'/'finediving'/run_id(context.runs[1])
    def _kill():
        wait_until(lambda: (run/'log.csv').exists())
        os.kill(lock_owner(run.with_name(f'.{run.name}.lock')).pid, signal.SIGKILL)
    killer = threading.Thread(target=_kill)
    killer.start()
    with contextlib.redirect_stdout(io.StringIO()) as text: seconds = session.train_side_by_side(context, datas, 2)
    killer.join()
    line = next(line for line in text.getvalue().splitlines() if 'worker process died' in line)
    assert list(seconds) == [run_id(context.runs[0])] and run.name in line, (seconds, line)
    assert len(session.train_all(context, datas).done) == 2 and not unfinished(folder/'out')
    return outcome('goes on', line)


@case('run notebook', 'SIGKILL of papermill alone', seconds=120)
def kernel_without_papermill(folder):
    from fspn_nb.processes import LockHeld,lock_owner,run_lock
    command = ['-m','papermill',ROOT/'nbs'/'run_finediving.ipynb',folder/'out.ipynb',*'-p preset smoke -p methods fspn_s -p protocol w_dn -p epochs 2000 -p out'.split(),folder/'runs']
    program = Program(command, folder/'log')
    wait_until(lambda: list(folder.glob('runs/finediving/*/log.csv')) or not program.runs)
    run,tree = next(folder.glob('runs/finediving/*/log.csv')).parent,program.tree()
    tree[0].kill()
    try:
        with run_lock(run): message = 'free at once'
    except LockHeld as e: message = str(e)
    began = time.monotonic()
    wait_until(lambda: not program.tree() and lock_owner(run.with_name(f'.{run.name}.lock')) is None, seconds=30)
    gone = time.monotonic()-began
    with run_lock(run): pass
    return outcome('refused', f'{gone:.1f} s later its kernel is gone as well; until then: {message}')


# One release and one cache -------------------------------------------------------------------------------------------------------------------------

PREPARE = """
import sys
import tempfile
from fspn_nb.config import finediving
from fspn_nb.training.prepare import prepare
if __name__ == '__main__': prepare(finediving('smoke', synthetic__n_train=int(sys.argv[1]), synthetic__n_test=4, clip__size=32), 'cpu')
"""


def start_prepare(folder, cache, name, n_train=8):
    "Draw and encode a release in `cache`"
    (folder/'prepare.py').write_text(PREPARE)
    return Program([folder/'prepare.py',n_train], folder/f'{name}.log', FSPN_CACHE=str(cache))


def files_of(cache):
    "Content of each file in `cache` but the remembered hashes, which are named by where a release lies"
    names = {path: path.relative_to(cache).as_posix() for path in sorted(Path(cache).rglob('*')) if path.is_file()}
    return {name: path.read_bytes() for path,name in names.items() if not name.startswith('checksums/')}


@case('features', 'one of two programs killed', seconds=240)
def one_of_two_killed_in_one_cache(folder):
    cache,start = folder/'cache',lambda name: start_prepare(folder, folder/'cache', name)
    start_prepare(folder, folder/'untouched', 'untouched').finish()
    first,second = start('first'),start('second')
    wait_until(lambda: len(list(cache.glob('.finediving_synth_*.part/*/*/*/*.jpg'))) > 100 or len(list(cache.rglob('*.jpg'))) > 100)
    drawing = first if '(waiting)' in second.text or lock_owner(next(cache.glob('.*.lock'))).pid == first.process.pid else second
    other = second if drawing is first else first
    drawing.end()
    wait_until(lambda: list(cache.glob('features/**/*.safetensors')) or list(cache.glob('features/**/.*.part')) or not other.runs)
    third = start('third') # while the second encodes
    wait_until(lambda: list(cache.glob('features/**/*.safetensors')) or not other.runs)
    other.end()
    third.finish()
    left = [path.relative_to(cache).as_posix() for path in cache.rglob('.*')]
    assert files_of(cache) == files_of(folder/'untouched') and not left, left
    return outcome('goes on', 'one killed while it drew, one while it encoded: the cache is that of a program that nobody touched, byte for byte')


@case('drawing', 'SIGKILL of a worker', seconds=120)
def drawing_worker_killed(folder):
    cache = folder/'cache'
    program = start_prepare(folder, cache, 'first', 16)
    def _workers(): return [p for p in program.tree() if 'spawn_main' in ' '.join(p.cmdline())]
    wait_until(lambda: len(_workers()) > 1 or not program.runs)
    _workers()[0].kill()
    assert program.process.wait(100) == 1
    wait_until(lambda: not program.tree(), 'all processes gone', 10)
    assert not list(cache.iterdir()), f'nothing half-drawn is left: {list(cache.iterdir())}'
    again = start_prepare(folder, cache, 'again', 16).finish()
    assert 'release drawn' in again and not unfinished(cache)
    return outcome('named', program.text.splitlines()[-1])


# All kills as one table -----------------------------------------------------------------------------------------------------------------------------

def main(argv=None):
    "Write one row per kill; status 1 where one of them did not end at the same bytes"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--out', type=Path, default=ROOT/'reports'/'benchmarks'/'kills.csv')
    parser.add_argument('--workers', type=int, default=2)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix='fspn_kills_') as tmp, ThreadPoolExecutor(args.workers) as pool:
        jobs = [partial(kill_notebook_often, 'run_finediving', range(k, k+5), Path(tmp)/f'f{k}') for k in range(0, 20, 5)]
        jobs += [partial(kill_trainer_often, range(k, k+10), Path(tmp)/f't{k}') for k in (0, 10)]
        jobs += [partial(kill_notebook_often, name, range(3), Path(tmp)/name) for name in PARAMETERS if name != 'run_finediving']
        rows = [row for rows in pool.map(lambda job: job(), jobs) for row in rows]
    pd.DataFrame(rows).to_csv(args.out, index=False)
    bad = [row for row in rows if row['differs'] or row['rest']]
    print(f'{len(rows)} kills, {len(bad)} did not end at the same bytes')
    sys.exit(bool(bad))


if __name__ == '__main__': main()
