"""Disk full, folders without write permission, read-only disks, Ctrl-C, limited memory, dead workers, clocks set back

Most stages are broken by the same five hands: a stage is a function that gets a folder of its own, prepares what it needs there, and returns a writer;
a writer writes into any folder and can be called again. After each fault the writer is called once more and must leave the bytes that it leaves where
nothing goes wrong. Cells that make no sense are left out: a clip is scored from one process (no worker to be killed), tables and pages keep no times.
"""
import contextlib
import ctypes
import hashlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import psutil
import pytest
import torch
from safetensors.torch import load_file

from fault_cases import Absent,case,outcome
from fspn_nb.actor.detectors import get_detector
from fspn_nb.actor.track import detect_boxes
from fspn_nb.analysis.published import pack_runs
from fspn_nb.analysis.runs import collect
from fspn_nb.batches.features import cache_features
from fspn_nb.batches.frame_store import build_store
from fspn_nb.config import finediving,override,save_cfg
from fspn_nb.data.check import check_cli
from fspn_nb.data.extract_frames import prepare_cli
from fspn_nb.data.finediving import read_finediving,write_finediving
from fspn_nb.data.mtl_aqa import write_mtl_aqa
from fspn_nb.data.video_io import encode_video
from fspn_nb.evaluate import evaluate
from fspn_nb.experiments.grid import run_grid
from fspn_nb.experiments.variants import config_of,grid_base
from fspn_nb.file_hashes import frame_hashes
from fspn_nb.inspect.clip_pictures import example_result
from fspn_nb.inspect.clip_report import write_report
from fspn_nb.report.build import build_report
from fspn_nb.report.fake_runs import fake_run
from fspn_nb.report.tables import ours_vs_paper,save_table
from fspn_nb.synthetic.dive_render import demo_dive
from fspn_nb.synthetic.release import synth_release
from fspn_nb.train import fit
from fspn_nb.training.checkpoint import save_ckpt
from fspn_nb.training.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
FULL = r'need .* (bytes|GB) for .*, got [0-9,.]+ (bytes|GB) free .*; free some'
CLOSED = r'need a (cache )?folder that can be written.*, got .*(Permission denied|Read-only file system)|--csv needs a file in a folder that can be written'


# Hands --------------------------------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def small_disk(folder, size):
    "A disk of `size` bytes mounted at `folder`; its size can be changed by `remount`"
    folder.mkdir(parents=True)
    made = subprocess.run(['mount','-t','tmpfs','-o',f'size={size}','none',folder], capture_output=True, text=True) if shutil.which('mount') else None
    if made is None or made.returncode: raise Absent(f'a small disk cannot be mounted here ({made.stderr.strip() if made else "no mount"})')
    try: yield folder
    finally: subprocess.run(['umount','-l',folder], check=True)


def remount(folder, options): subprocess.run(['mount','-o',f'remount,{options}',folder], check=True)


class _Capabilities(ctypes.Structure):
    _fields_ = [('effective', ctypes.c_uint32), ('permitted', ctypes.c_uint32), ('inheritable', ctypes.c_uint32)]


@contextlib.contextmanager
def permissions_hold():
    "Inside, permissions of files hold for root as well: this thread and those that it starts are without CAP_DAC_OVERRIDE"
    if os.name != 'posix': raise Absent('permissions of folders are those of POSIX')
    if os.geteuid():
        yield
        return
    libc,header,both = ctypes.CDLL(None, use_errno=True),(ctypes.c_uint32*2)(0x20080522, 0),(_Capabilities*2)()
    if libc.capget(header, both): raise Absent('root keeps its permissions here')
    before = both[0].effective
    both[0].effective = before & ~0b110 # 1: CAP_DAC_OVERRIDE, 2: CAP_DAC_READ_SEARCH
    if libc.capset(header, both): raise Absent('root keeps its permissions here')
    try: yield
    finally:
        both[0].effective = before
        assert libc.capset(header, both) == 0


@contextlib.contextmanager
def closed(folder):
    "Inside, nothing can be written below `folder`"
    folders = [folder, *(path for path in folder.rglob('*') if path.is_dir())]
    for path in folders: path.chmod(0o555)
    try:
        with permissions_hold(): yield
    finally:
        for path in folders: path.chmod(0o755)


if signal.getsignal(signal.SIGINT) == signal.SIG_IGN: # a shell that starts a program with `&` makes it deaf to Ctrl-C, and so all that it starts
    signal.signal(signal.SIGINT, signal.default_int_handler)

_watch = dict(folder='', at=0, count=0) # of the audit hook, which cannot be removed


def _audit(event, args):
    "Count the files that are opened for writing or renamed below a folder, and press Ctrl-C at one of them"
    if not _watch['folder'] or event not in ('open','os.rename'): return
    path,mode = args[0],args[1] if event == 'open' else 'w'
    if not isinstance(path, (str,os.PathLike)) or not isinstance(mode, str) or not set(mode) & set('wax'): return
    if not os.fspath(path).startswith(_watch['folder']): return
    _watch['count'] += 1
    if _watch['count'] == _watch['at']: os.kill(os.getpid(), signal.SIGINT)


@cache
def _add_hook(): sys.addaudithook(_audit)


@contextlib.contextmanager
def interrupt_at(folder, at):
    "Inside, Ctrl-C comes with the `at`-th file that is written below `folder` (0: never); gives the counter"
    _add_hook()
    _watch.update(folder=str(folder), at=at, count=0)
    try: yield _watch
    finally: _watch['folder'] = ''


def digests(folder):
    "{file: hash} of all files below `folder`; an unfinished, hidden one is an error"
    files = sorted(path for path in folder.rglob('*') if path.is_file() and path.name != 'checksums.json') # break_damage.py has those
    rest = [str(path) for path in files if any(part.startswith('.') for part in path.relative_to(folder).parts)]
    assert not rest, f'left behind: {rest}'
    return {str(path.relative_to(folder)): hashlib.sha256(_content(path)).hexdigest() for path in files}


def _content(path):
    "The bytes of a file; of a record of the store its tensors, as the header says when the frames were written"
    if path.suffix == '.safetensors': return b''.join(name.encode()+tensor.numpy().tobytes() for name,tensor in sorted(load_file(path).items()))
    if path.suffix == '.jsonl': return b''.join(sorted(line for line in path.read_bytes().splitlines() if b'begun' not in line))
    return path.read_bytes()


def refused(writer, target, pattern, error=OSError):
    "The sentence with which `writer` refuses"
    with pytest.raises(error) as info: writer(target)
    sentence = str(info.value)
    assert re.search(pattern, sentence, re.S), sentence
    rest = [str(path) for path in target.parent.rglob('.*')] if target.parent.is_dir() else []
    assert not rest, f'left behind: {rest}'
    return sentence[sentence.index('need'):]


def pages(folder): return sum(-(-path.stat().st_size//4096)*4096 if path.is_file() else 4096 for path in folder.rglob('*'))


# Stages -------------------------------------------------------------------------------------------------------------------------------------------

def quietly(function, *args, **options):
    "`function` without its lines"
    with contextlib.redirect_stdout(io.StringIO()): return function(*args, **options)


def _release(folder): return quietly(synth_release, folder, n_train=2, n_test=1, seed=41, size=(64,36), workers=1)


def drawing(work): return _release


def _samples(work):
    samples = read_finediving(_release(work/'release'))
    return samples,finediving('smoke'),{sample.uid: None for sample in samples}


def features(work):
    samples,cfg,boxes = _samples(work)
    encode = lambda clips: clips.float().mean((1,2,3,4))[:, None].expand(-1, 1024).contiguous()
    frames = frame_hashes(samples)
    return lambda target: quietly(cache_features, samples, cfg, boxes, encode, 'of-a-test', frames, target)


def frame_store(work):
    samples,cfg,boxes = _samples(work)
    cfg = replace(cfg, clip=replace(cfg.clip, size=32))
    return lambda target: quietly(build_store, samples, cfg, boxes, target, 1)


def boxes(work):
    samples = _samples(work)[0][:1]
    return lambda target: quietly(detect_boxes, samples, get_detector('motion'), target)


def checkpoints(work):
    state = dict(run_id='run', model={'weight': torch.arange(20_000.)})
    def _write(target):
        for epoch in (1,2): save_ckpt(target/'last.pt', keep_backup=True, epoch=epoch, **state)
    return _write


def _runs(work): # invented runs are enough for tables and pages
    return [fake_run(work/'runs', config_of(grid_base('demo'), name, seed), 5.) for name in ('fspn','i3d_mlp') for seed in (0,1)]


def tables(work):
    _runs(work)
    table = ours_vs_paper('IX', collect(work/'runs'))
    return lambda target: save_table(table, target/'table_09')


def report(work):
    _runs(work)
    return lambda target: quietly(build_report, work/'runs', target, n=20, tests=20, sizes=False)


def publishing(work):
    _runs(work)
    return lambda target: pack_runs([work/'runs'], target)


def clip_page(work):
    result = example_result(work)
    short = replace(result, clip=replace(result.clip, name='dive'))
    return lambda target: quietly(write_report, short, target)


def _command(command, *args):
    "A terminal command; an `OSError` with all that it said where its status is not 0"
    with contextlib.redirect_stderr(io.StringIO()) as errors,contextlib.redirect_stdout(io.StringIO()) as lines:
        try: status = command([*map(str, args)])
        except SystemExit as end: status = end.code
    if status: raise OSError(f'{lines.getvalue()}{errors.getvalue()}{status if isinstance(status, str) else ""}')


def _film(work):
    "A film of two dives without pictures of their own, 01"
    dive = demo_dive()
    frames = list(dive.frames[:, ::4, ::4])
    encode_video([*frames, *frames, *frames[-1:]*60], work/'videos'/'01.mp4')
    return replace(dive, frames=None),len(dive.frames)


def preparation(work):
    dive,n = _film(work)
    write_finediving(work/'annotations', [(('01',i), 1+i*n, dive) for i in (0,1)], [('01',0)], [('01',1)])
    return lambda target: _command(prepare_cli, 'finediving', work/'videos', target, '--annotations', work/'annotations'/'Annotations', '--workers', 1)


def growing_preparation(work): # the frames of a broadcast appear one by one
    dive,n = _film(work)
    write_mtl_aqa(work/'annotations', [((1,i), i*n, dive) for i in (1,2)], [(1,1)], [(1,2)])
    return lambda target: _command(prepare_cli, 'mtl_aqa', work/'videos', target, '--annotations', work/'annotations'/'info', '--workers', 1)


def reading(work):
    root = _release(work/'release')
    def _write(target):
        with contextlib.suppress(OSError): target.mkdir(parents=True, exist_ok=True)
        _command(check_cli, 'finediving', root, '--csv', target/'findings.csv')
    return _write


# Stage, cell of the table, whether it is quick, seconds that the clip or the report needs
ONE = dict(drawing=drawing, features=features, frame_store=frame_store, boxes=boxes, checkpoints=checkpoints, tables=tables, publishing=publishing,
           preparation=preparation, growing_preparation=growing_preparation, reading=reading, report=report, clip_page=clip_page)
CELL = dict(frame_store='frame store', publishing='report', growing_preparation='preparation', clip_page='clip page')
SLOW = ('report','clip_page') # several seconds for each page
MADE_ONCE = ('drawing','features','frame_store','boxes','preparation','growing_preparation') # a second call reads, and needs no permission


# Faults -------------------------------------------------------------------------------------------------------------------------------------------

def _prepare(stage, folder):
    "(writer, what it leaves where nothing goes wrong) of a stage, in a cache of its own"
    os.environ['FSPN_CACHE'] = str(folder/'cache')
    writer = ONE[stage](folder/'work')
    (folder/'first').mkdir()
    with interrupt_at(folder/'first', 0) as counter: writer(folder/'first'/'good') # the cache beside it is filled once, and not counted
    return writer,digests(folder/'first'/'good'),counter['count']


def disk_full(stage, folder):
    "Nothing fits, half fits, nearly all fits: refused in one sentence each time; with more room it is done"
    writer,good,_ = _prepare(stage, folder)
    size,sentences = pages(folder/'first'),[]
    with small_disk(folder/'disk', 4*size+65536) as disk:
        for share in (0,.5,.85):
            filler = disk/'filler'
            with open(filler, 'wb') as file:
                os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free//4096*4096)
                spare = max(0, int(share*size)-pages(disk)+filler.stat().st_size) # what earlier tries left counts
                file.truncate(filler.stat().st_size-spare//4096*4096)
            sentences.append(refused(writer, disk/'out', FULL))
            filler.unlink()
        writer(disk/'out')
        assert digests(disk/'out') == good
    return outcome('named', sentences[-1])


def folder_closed(stage, folder):
    "A folder without write permission is named; a cache in which all is there is read without it"
    writer,good,_ = _prepare(stage, folder)
    (folder/'closed').mkdir()
    with closed(folder/'closed'): sentence = refused(writer, folder/'closed'/'out', CLOSED, PermissionError if stage in PLAIN else OSError)
    writer(folder/'closed'/'out')
    assert digests(folder/'closed'/'out') == good
    if stage in MADE_ONCE:
        with closed(folder/'closed'): writer(folder/'closed'/'out')
    return outcome('named', sentence)


def disk_read_only(stage, folder):
    "A disk that the system has made read-only"
    writer,good,_ = _prepare(stage, folder)
    with small_disk(folder/'disk', 4*pages(folder/'first')+65536) as disk:
        remount(disk, 'ro')
        sentence = refused(writer, disk/'out', CLOSED)
        remount(disk, 'rw')
        writer(disk/'out')
        assert digests(disk/'out') == good
        if stage in MADE_ONCE:
            remount(disk, 'ro')
            writer(disk/'out')
    return outcome('named', sentence)


def ctrl_c(stage, folder):
    "Ctrl-C at the first, a middle and the last file that is written"
    writer,good,count = _prepare(stage, folder)
    for at in sorted({1, (count+1)//2, count}):
        place = folder/f'stopped_{at}'
        place.mkdir()
        with interrupt_at(place, at):
            try: writer(place/'out')
            except (KeyboardInterrupt,OSError) as error: heard = error
            else: raise AssertionError(f'Ctrl-C at file {at} of {count} was not heard')
        assert isinstance(heard, KeyboardInterrupt) or 'stopped by Ctrl-C' in str(heard)
        if stage != 'report': digests(place) # no rest; a page that is ready is moved to its place by the next start
        writer(place/'out')
        assert digests(place) == {f'out/{name}': value for name,value in good.items()}
    return outcome('goes on', f'Ctrl-C at the first, a middle and the last of {count} files; the next start ended at the same bytes')


def clock_set_back(stage, folder):
    "All files come from the future: an hour, a year; the clock is behind by as much; what was made is used again"
    writer,good,_ = _prepare(stage, folder)
    for seconds in (3600,365*86400):
        for path in (*(folder/'work').rglob('*'), *(folder/'first').rglob('*'), *(folder/'cache').rglob('*')):
            if path.is_file(): os.utime(path, (time.time()+seconds,)*2)
        now = time.time
        for back in (0,seconds):
            with patch('time.time', lambda: now()-back):
                writer(folder/'first'/'good')
                assert digests(folder/'first'/'good') == good
                writer(folder/f'again_{seconds}_{back}')
            assert digests(folder/f'again_{seconds}_{back}') == good
    return outcome('goes on', 'files from the future and a clock that is behind: the same bytes, made anew or read')


PLAIN = ('drawing','features','frame_store','boxes','checkpoints','tables','publishing','report','clip_page') # raise; commands print
FAULTS = {'disk full': disk_full, 'folder closed': folder_closed, 'disk read-only': disk_read_only, 'SIGINT': ctrl_c, 'clock set back': clock_set_back}
WITHOUT = {('clock set back','tables'), ('clock set back','publishing'), ('clock set back','report'), ('clock set back','clip_page'), ('clock set back','checkpoints'),
           ('clock set back','reading')} # they keep and compare no times
QUICK = {('disk full',stage) for stage in ('drawing','features','frame_store','checkpoints','tables','publishing','preparation','growing_preparation','reading')}
QUICK |= {('folder closed',stage) for stage in ('frame_store','checkpoints','reading')} | {('disk read-only',stage) for stage in ('checkpoints','publishing')}
QUICK |= {('SIGINT',stage) for stage in ('frame_store','checkpoints','tables','growing_preparation')} | {('clock set back','frame_store')}


def _register(fault, stage):
    run = lambda folder: FAULTS[fault](stage, folder)
    run.__name__,run.__doc__ = f'{stage}_{FAULTS[fault].__name__}',FAULTS[fault].__doc__
    case(CELL.get(stage, stage), fault, quick=(fault,stage) in QUICK, seconds=240)(run)


for _fault in FAULTS:
    for _stage in ONE:
        if (_fault,_stage) not in WITHOUT: _register(_fault, _stage)


# Runs, grids, notebooks: whole programs -----------------------------------------------------------------------------------------------------------

CFG = finediving('smoke', model__name='fspn_s', synthetic__n_train=6, synthetic__n_test=4)
PARAMETERS = 'preset smoke methods i3d_mlp protocol w_dn seeds 0 device cpu'.split()


def _weights(run): return torch.load(run/'last.pt', weights_only=True)['model']


def _same_run(run, other):
    "The same weights, bit for bit, and the same losses"
    ours,theirs = _weights(run),_weights(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    losses = [pd.read_csv(folder/'log.csv').drop(columns='seconds') for folder in (run,other)]
    pd.testing.assert_frame_equal(*losses, check_exact=True)


@case('checkpoints', 'disk full', seconds=240)
def training_on_a_full_disk(folder):
    "Too small from the beginning: said before training; full in the second epoch: one sentence, and it ends at the same bits"
    data = quietly(prepare, CFG, 'cpu')
    good = quietly(fit, CFG, folder/'good', 'cpu', data)
    with small_disk(folder/'disk', 2**21) as disk:
        first = refused(lambda target: quietly(fit, CFG, target, 'cpu', data), disk/'out', 'need [0-9]+ MB for the checkpoints of .*, got [0-9]+ MB free')
        remount(disk, 'size=600m')
        def _fill(model, data, epoch, run):
            if epoch < 2: return
            with open(disk/'filler', 'wb') as file: os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)
        stopped = lambda target: quietly(fit, CFG, target, 'cpu', data, _fill, max_checkpoint_overhead=1.)
        sentence = refused(stopped, disk/'out', FULL)
        (disk/'filler').unlink()
        _same_run(quietly(fit, CFG, disk/'out', 'cpu', data), good)
    return outcome('named', f'{first} | {sentence}')


@case('evaluation', 'disk full', seconds=240)
def evaluation_on_a_full_disk(folder):
    "No metrics without predictions; the next call measures the same"
    data = quietly(prepare, CFG, 'cpu')
    run = quietly(fit, CFG, folder/'good', 'cpu', data)
    with small_disk(folder/'disk', 300*2**20) as disk:
        shutil.copytree(run, disk/'runs'/CFG.dataset/run.name)
        own = disk/'runs'/CFG.dataset/run.name
        with open(disk/'filler', 'wb') as file: os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free)
        with pytest.raises(OSError, match=FULL) as info: quietly(evaluate, own, data)
        assert not (own/'metrics.json').exists()
        (disk/'filler').unlink()
        assert quietly(evaluate, own, data) == quietly(evaluate, run, data)
        assert (own/'predictions.csv').read_bytes() == (run/'predictions.csv').read_bytes()
    return outcome('named', info.value)


@case('grid', 'disk full', seconds=240)
def grid_on_a_full_disk(folder):
    "Each run that does not fit is failed with the sentence; the same command trains it when there is room"
    base = grid_base('smoke', synthetic__n_train=6, synthetic__n_test=4)
    with small_disk(folder/'disk', 2**21) as disk:
        plan = quietly(run_grid, base, 'V', (0,), disk/'out', 'cpu', 1)
        assert (plan.status == 'failed').all() and plan.problem.str.contains('MB free; free some').all(), plan
        assert not list(disk.rglob('*.part'))
        remount(disk, 'size=2g')
        again = quietly(run_grid, base, 'V', (0,), disk/'out', 'cpu', 1)
        assert (again.status == 'trained').all(), again
    return outcome('named', plan.problem[0])


def _start(command, before=(), **env):
    "A program of its own in a group of its own"
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT), MPLBACKEND='agg') | env
    env.pop('IN_TEST', None)
    return subprocess.Popen([*before, sys.executable, *map(str, command)], cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            start_new_session=True, restore_signals=True)


def _ended(process, status=None):
    "The last line that a program wrote to the terminal, after it ended with `status`"
    _,errors = process.communicate()
    lines = [line for line in errors.splitlines() if line.strip()]
    assert status is None or process.returncode == status, (process.returncode, errors[-2000:])
    return lines[-1] if lines else '',len(lines)


def _train(config, out, *options): return ['-m','fspn_nb.train', config, '--out', out, '--device', 'cpu', *options]


@case('checkpoints', 'SIGINT', seconds=240)
def training_and_ctrl_c(folder):
    "Ctrl-C in the terminal: status 130 and one line; the same command ends at the same bits"
    cfg = override(CFG, train__epochs=12)
    config,good = save_cfg(cfg, folder/'config.json'),quietly(fit, cfg, folder/'good', 'cpu')
    process,run = _start(_train(config, folder/'out', '--max-overhead', 1)),folder/'out'/cfg.dataset/good.name
    while not (run/'last.backup.pt').exists() and process.poll() is None: time.sleep(.01)
    os.killpg(process.pid, signal.SIGINT)
    line,lines = _ended(process, 130)
    assert lines < 5 and line.startswith('fspn_train: stopped by Ctrl-C'), (lines, line)
    assert not list((folder/'out').rglob('.*'))
    assert torch.load(run/'last.pt', weights_only=True)['epoch'] < 12
    _same_run(quietly(fit, cfg, folder/'out', 'cpu'), good)
    return outcome('goes on', line)


@case('checkpoints', 'folder closed', seconds=120)
def training_into_a_closed_folder(folder):
    "A terminal command: one line, status 1"
    config = save_cfg(CFG, folder/'config.json')
    (folder/'out').mkdir(mode=0o555)
    if not shutil.which('setpriv') and not os.geteuid(): raise Absent('root keeps its permissions here, and there is no setpriv')
    bare = ['setpriv','--bounding-set=-dac_override,-dac_read_search','--inh-caps=-dac_override,-dac_read_search'] if not os.geteuid() else []
    line,lines = _ended(_start(_train(config, folder/'out'), bare), 1)
    assert lines == 1 and line.startswith('fspn_train: need a folder that can be written for reports'), line
    return outcome('named', line)


@case('checkpoints', 'clock set back', seconds=240)
def training_after_the_clock_was_set_back(folder):
    "Stopped in one year, continued in the year before: the same bits"
    if not shutil.which('faketime'): raise Absent('faketime is not installed')
    cfg = override(CFG, train__epochs=12)
    config,good = save_cfg(cfg, folder/'config.json'),quietly(fit, cfg, folder/'good', 'cpu')
    process,run = _start(_train(config, folder/'out', '--max-overhead', 1)),folder/'out'/cfg.dataset/good.name
    while not (run/'last.backup.pt').exists() and process.poll() is None: time.sleep(.01)
    process.terminate()
    _ended(process, 143)
    line,_ = _ended(_start(_train(config, folder/'out'), ['faketime','-f','-365d'], FAKETIME_DONT_FAKE_MONOTONIC='1'), 0)
    _same_run(run, good)
    return outcome('goes on', 'stopped, the clock set back by a year, continued: the same bits')


LIMITED = """
import resource,sys
import psutil,torch
from fspn_nb.train import train_cli
limit = psutil.Process().memory_info().vms+int(sys.argv[1])*2**20
resource.setrlimit(resource.RLIMIT_AS, (limit,limit))
train_cli(sys.argv[2:])
"""


@case('checkpoints', 'memory limited', seconds=400)
def training_with_little_memory(folder):
    "A limit as ulimit -v sets it, some MB above what the program has when it begins: a sentence and a status, or a finished run that is the same"
    config,good,said = save_cfg(CFG, folder/'config.json'),quietly(fit, CFG, folder/'good', 'cpu'),[]
    for megabytes in (8,24,40,64,128): # near 40 torchvision cannot be loaded
        process = _start(['-c',LIMITED,megabytes,*_train(config, folder/'out')[2:]])
        line,lines = _ended(process)
        if process.returncode: said.append((megabytes, process.returncode, lines, line))
    named = ('fspn_train: need more memory for ','fspn_train: need the torchvision ')
    sentences = [line for *_,line in said if line.startswith(named)]
    assert any('more memory for' in line for line in sentences) and len(sentences) == len(said), said
    _same_run(quietly(fit, CFG, folder/'out', 'cpu'), good)
    return outcome('named', sentences[-1])


@case('drawing', 'worker killed', seconds=240)
def drawing_with_a_worker_that_is_killed(folder):
    "As the system does where memory is short: one sentence, nothing is left, the next call draws the same"
    draw = lambda target: quietly(synth_release, target, n_train=20, n_test=4, seed=41, size=(128,72), workers=2)
    draw(folder/'good')
    def _kill():
        workers = []
        while len(workers) < 2 or len(list(folder.glob('.out.*.part/*/*/*'))) < 3: # the first video is drawn before there are workers
            workers = [child for child in psutil.Process().children() if 'spawn_main' in ' '.join(child.cmdline())]
            time.sleep(.01)
        workers[0].kill()
    killer = threading.Thread(target=_kill)
    killer.start()
    sentence = refused(draw, folder/'out', 'need an answer of each worker process, got none of one that died', BrokenProcessPool)
    killer.join()
    draw(folder/'out')
    assert digests(folder/'out') == digests(folder/'good')
    return outcome('named', sentence)


def _papermill(folder, *parameters):
    command = ['-m','papermill','--no-progress-bar','nbs/run_finediving.ipynb',folder/'executed.ipynb']
    return [*command, *(word for pair in zip(PARAMETERS[::2], PARAMETERS[1::2]) for word in ('-p',*pair)), *parameters]


@case('run notebook', 'disk full', seconds=300)
def notebook_on_a_full_disk(folder):
    "The last line of the notebook's error is the sentence; with more room the same command goes through"
    with small_disk(folder/'disk', 2**21) as disk:
        line,_ = _ended(_start(_papermill(folder, '-p', 'out', disk/'runs')))
        assert re.search(r'^OSError: need [0-9]+ MB for the checkpoints of .*, got [0-9]+ MB free; free some', line), line
        remount(disk, 'size=1g')
        _ended(_start(_papermill(folder, '-p', 'out', disk/'runs')), 0)
        assert list(disk.rglob('table_09.md')) and not list(disk.rglob('*.part'))
    return outcome('named', line)


@case('run notebook', 'SIGINT', seconds=300)
def notebook_and_ctrl_c(folder):
    "Ctrl-C in the terminal of papermill, which the kernel hears as well; the same command gives the same table"
    command = lambda name: _papermill(folder, '-p', 'out', folder/name, '-p', 'epochs', 12)
    _ended(_start(command('good')), 0)
    process = _start(command('out'))
    while not list((folder/'out').rglob('provenance.json')): # training has begun
        assert process.poll() is None, _ended(process)
        time.sleep(.01)
    os.killpg(process.pid, signal.SIGINT)
    line,_ = _ended(process)
    assert process.returncode and ('Interrupt' in line or line == 'Aborted!' or 'Kernel died' in line), line # papermill's own words; a kernel that is starting dies
    _ended(_start(command('out')), 0)
    tables = [next((folder/name).rglob('table_09.csv')).read_bytes() for name in ('good','out')]
    assert tables[0] == tables[1] and not list((folder/'out').rglob('*.part'))
    return outcome('goes on', line)
