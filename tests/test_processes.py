"Four processes train one run: the numbers of one process, and none of them outlives the others"
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch

from waiting import wait_until
from fspn_nb.config import finediving,override,run_id,save_cfg
from fspn_nb.train import fit,train_cli
from fspn_nb.training import checkpoint,distributed
from fspn_nb.training.checkpoint import load_ckpt,newest_ckpt
from fspn_nb.training.distributed import DistributedContext,any_rank,init_distributed
from fspn_nb.training.loop import batch_sampler,build_model
from fspn_nb.training.predict import predict
from fspn_nb.training.prepare import prepare

pytest.importorskip('lightning_fabric', reason='several processes need lightning-fabric: pip install fspn_nb[processes]')
SMALL = dict(synthetic__n_train=6, synthetic__n_test=4)
TINY = dict(clip__size=32, clip__starts=(0,40), model__clips=2, weights='random', train__backbone='finetune', model__adapter=False, train__epochs=1)
PAIRS = finediving('smoke', **SMALL, **dict(TINY, train__epochs=2), protocol='wo_dn', model__name='fspn_s', train__batch_size=3)
IN_BATCH = override(PAIRS, train__epochs=1, train__in_batch_exemplars=True, train__batch_size=5)
LONG = override(PAIRS, model__name='i3d_mlp', train__batch_size=2, train__epochs=500)


# Processes that are forked from one that has imported the library: a quarter of the time of four fresh ones ------------------------------------------

def run_rank(rank, size, port, folder, function, args):
    "Call `function(*args)` as process `rank` of `size`, as torchrun would start it; what it prints goes to a file"
    with open(folder/f'{rank}.txt', 'w') as file:
        for number in (1, 2): os.dup2(file.fileno(), number)
    os.environ |= dict(LOCAL_RANK=str(rank), RANK=str(rank), WORLD_SIZE=str(size), NODE_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), IN_TEST='1')
    torch.set_num_threads(1)
    function(*args)


def start_ranks(folder, function, *args, size=4):
    "`size` processes"
    from lightning_fabric.plugins.environments.lightning import find_free_network_port
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['fspn_nb.train','fspn_nb.evaluate','lightning_fabric'])
    port = find_free_network_port()
    ranks = [context.Process(target=run_rank, args=(rank, size, port, folder, function, args)) for rank in range(size)]
    for rank in ranks: rank.start()
    return ranks


def end_of(ranks, folder, seconds=120):
    "Exit status and output of each"
    for rank in ranks: rank.join(seconds)
    texts = [(folder/f'{i}.txt').read_text() for i in range(len(ranks))]
    assert not any(rank.is_alive() for rank in ranks), texts
    return [rank.exitcode for rank in ranks],texts


# The numbers of one process -------------------------------------------------------------------------------------------------------------------------

def few(cfg, dist=DistributedContext(), reuse=None):
    "What `cfg` works on: four or five dives to train on, three to test"
    data = prepare(cfg, 'cpu', reuse, dist)
    return replace(data, splits=dict(data.splits, train=data.splits['train'][:5 if cfg.train.in_batch_exemplars else 4], test=data.splits['test'][:3]))


def train_and_predict(data, out):
    "(exemplars of the first epoch, predictions, votes) of a run, after its training"
    run = fit(data.cfg, out, data=data)
    any_rank(data.dist, False) # the main process has written its files
    model = build_model(data)
    model.load_state_dict(load_ckpt(run/'last.pt', data.run_id)['model'])
    pairs = [[None if part is None else np.asarray(part).tolist() for part in step] for step in batch_sampler(data, True, 0)]
    label,votes,_ = predict(model, data, data.splits['test'], 3)
    return pairs, label.tolist(), votes.tolist()


def train_all(out, dist=DistributedContext()):
    "Both runs"
    first = few(IN_BATCH, dist)
    return [train_and_predict(first, out), train_and_predict(few(PAIRS, dist, first), out)]


def several(out, results):
    "Both runs in one group of processes"
    dist = init_distributed(4, 'cpu')
    results.put((dist.rank, train_all(out, dist)))


@pytest.fixture(scope='module')
def release(): return prepare(finediving('smoke', **SMALL), 'cpu')


def stop_after_the_first(model, data, epoch, run):
    if epoch == 2: raise KeyboardInterrupt


def test_four_processes_are_one(release, tmp_path):
    torch.set_num_threads(1)
    with pytest.raises(KeyboardInterrupt): fit(PAIRS, tmp_path/'four', data=few(PAIRS), on_epoch_end=stop_after_the_first, max_checkpoint_overhead=1)
    begun = tmp_path/'four'/'finediving'/run_id(PAIRS)
    assert load_ckpt(begun/'last.pt', begun.name)['epoch'] == 1, 'one process begins what four go on with'
    shutil.copytree(begun, tmp_path/'one'/'finediving'/begun.name)
    results = multiprocessing.get_context('forkserver').Queue()
    ranks = start_ranks(tmp_path, several, tmp_path/'four', results)
    alone = train_all(tmp_path/'one')
    assert [[len(query) for query,_,_ in pairs] for pairs,_,_ in alone] == [[5],[3,1]], 'batches that four does not divide, and one of a single dive'
    status,texts = end_of(ranks, tmp_path)
    assert status == [0]*4, texts
    answers = dict(results.get(timeout=5) for _ in ranks)
    assert all(answers[rank] == answers[0] for rank in range(4)), 'all have the same numbers'
    for cfg,(pairs,label,votes),(pairs_4,label_4,votes_4) in zip((IN_BATCH, PAIRS), alone, answers[0]):
        assert pairs_4 == pairs, 'the same exemplars'
        assert np.abs(np.array(label_4)/label-1).max() < 1e-5, run_id(cfg)
        assert np.abs(np.array(votes_4)-votes).max() < 1e-4
        assert json.loads((tmp_path/'four'/'finediving'/run_id(cfg)/'provenance.json').read_text())['processes'] == 4


# None outlives the others ---------------------------------------------------------------------------------------------------------------------------

def test_one_of_four_is_killed(release, tmp_path):
    run = tmp_path/'finediving'/run_id(LONG)
    command = [str(save_cfg(LONG, tmp_path/'config.json')), '--out', str(tmp_path), '--device', 'cpu', '--processes', '4', '--max-overhead', '1']
    ranks = start_ranks(tmp_path, train_cli, command)
    wait_until(lambda: (run/'last.pt').exists() or not all(rank.is_alive() for rank in ranks))
    os.kill(ranks[2].pid, signal.SIGKILL)
    began = time.monotonic()
    status,texts = end_of(ranks, tmp_path, 30)
    assert time.monotonic()-began < 20 and status == [1,1,-signal.SIGKILL,1], texts
    for rank in (0, 1, 3):
        assert f'fspn_train: need 4 processes to the end, process {rank+1} has lost another one' in texts[rank].splitlines()[-1] and 'Traceback' not in texts[rank], texts[rank]
    assert not [path for path in run.parent.iterdir() if 'lock' in path.name]
    epoch,seen = newest_ckpt(run, run.name)['epoch'],[]
    def on_epoch_end(model, data, epoch, folder):
        seen.append(epoch)
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(LONG, tmp_path, 'cpu', on_epoch_end=on_epoch_end)
    assert seen == [epoch+1], 'one process goes on where four stopped'


NOTEBOOK = """
import sys
from fspn_nb.config import load_cfg
from fspn_nb.train import launch
launch(load_cfg(sys.argv[1]), sys.argv[2], 'cpu', 2)
"""


def alive(processes): return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_no_process_is_left_behind_by_a_notebook(release, tmp_path):
    run = tmp_path/'finediving'/run_id(LONG)
    notebook = subprocess.Popen([sys.executable, '-c', NOTEBOOK, str(save_cfg(LONG, tmp_path/'config.json')), str(tmp_path)], env=dict(os.environ, OMP_NUM_THREADS='1'),
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (run/'log.csv').exists() or notebook.poll() is not None)
    trainers = psutil.Process(notebook.pid).children(recursive=True)
    assert len(trainers) == 2, notebook.communicate()[1]
    notebook.kill() # SIGKILL: it can tell nobody
    notebook.communicate()
    wait_until(lambda: not alive(trainers), seconds=30)
    state = newest_ckpt(run, run.name)
    assert state and (state['epoch'] > 0 or state['within_epoch']), 'it has saved itself'
    assert not [path for path in run.parent.iterdir() if 'lock' in path.name]


@pytest.mark.parametrize('deaf', [False, True])
def test_ctrl_c_in_a_notebook_ends_the_program_that_it_started(monkeypatch, deaf):
    program = "import os,signal,sys,time\nif sys.argv[1] == 'True': signal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint(os.getpid(), flush=True)\ntime.sleep(300)"
    seen = []
    def interrupted(line, end): seen.append(int(line)); raise KeyboardInterrupt
    monkeypatch.setattr(checkpoint, 'print', interrupted, raising=False)
    monkeypatch.setattr(checkpoint, '_PATIENCE', .5)
    with pytest.raises(KeyboardInterrupt): checkpoint.run_attached([sys.executable, '-c', program, str(deaf)])
    assert not psutil.pid_exists(seen[0])


# Who has started the processes ----------------------------------------------------------------------------------------------------------------------

def test_tasks_of_srun_are_the_processes(monkeypatch):
    for name,value in dict(SLURM_JOB_ID='7', SLURM_NTASKS='4', SLURM_STEP_NUM_TASKS='4', SLURM_PROCID='3', SLURM_LOCALID='1', SLURM_NODEID='1', SLURM_NODELIST='n[1-2]').items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv('MASTER_ADDR', raising=False)
    monkeypatch.setenv('SLURM_NTASKS_PER_NODE', '2') # restored after the test
    monkeypatch.delenv('SLURM_NTASKS_PER_NODE') # as by srun -n 4 -N 2
    cluster = distributed._cluster(2, 2)
    assert (cluster.creates_processes_externally, cluster.global_rank(), cluster.node_rank(), cluster.local_rank(), cluster.world_size()) == (True, 3, 1, 1, 4)
    cluster.validate_settings(num_devices=2, num_nodes=2)
    with pytest.raises(ValueError, match='need srun with 2 tasks for 2 processes on each of 1 machines, got 4; start with srun --nodes 1 --ntasks-per-node 2'): init_distributed(2, 'cpu')
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '1') # one task, as of a job that packs several trainings
    assert not distributed._cluster(2, 1).creates_processes_externally, 'it starts the second one itself'
    for name in ('MASTER_PORT','NODE_RANK'): monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match='need MASTER_ADDR, MASTER_PORT and NODE_RANK in the environment of 2 machines, got no MASTER_ADDR, MASTER_PORT, NODE_RANK'): init_distributed(1, 'cpu', 2)
