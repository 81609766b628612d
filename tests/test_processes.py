"Four processes train one run: the numbers of one process, and none of them outlives the others"
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fspn_nb.config import finediving,override,run_id,save_cfg
from fspn_nb.train import fit,launch,train_cli
from fspn_nb.training.checkpoint import load_ckpt,newest_ckpt
from fspn_nb.training.distributed import DistributedContext,any_rank,init_distributed
from fspn_nb.training.loop import batch_sampler,build_model
from fspn_nb.training.predict import predict
from fspn_nb.training.prepare import prepare

pytest.importorskip('lightning_fabric', reason='several processes need lightning-fabric: pip install fspn_nb[processes]')
SMALL = dict(synthetic__n_train=6, synthetic__n_test=4)
TINY = dict(clip__size=32, clip__starts=(0,40), model__clips=2, weights='random', train__backbone='finetune', model__adapter=False, train__epochs=1)
PAIRS = finediving('smoke', **SMALL, **TINY, protocol='wo_dn', model__name='fspn_s', train__batch_size=3)
IN_BATCH = override(PAIRS, train__in_batch_exemplars=True, train__batch_size=5)
RESUMED = override(PAIRS, seed=1, model__name='i3d_mlp', train__batch_size=2, train__epochs=2)
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


def until(condition, seconds=120):
    "Wait until `condition()`"
    end = time.monotonic()+seconds
    while not condition():
        assert time.monotonic() < end, 'it never came'
        time.sleep(.02)


# The numbers of one process -------------------------------------------------------------------------------------------------------------------------

def train_and_predict(cfg, out, dist=DistributedContext()):
    "Train on four dives, then predict three; (exemplars of the epoch, predictions, votes)"
    data = prepare(cfg, 'cpu', dist=dist)
    data = replace(data, splits=dict(data.splits, train=data.splits['train'][:5 if cfg.train.in_batch_exemplars else 4], test=data.splits['test'][:3]))
    model = build_model(data)
    run = fit(cfg, out, data=data)
    any_rank(dist, False) # the main process has written its files
    model.load_state_dict(load_ckpt(run/'last.pt', data.run_id)['model'])
    pairs = [[None if part is None else np.asarray(part).tolist() for part in step] for step in batch_sampler(data, model.uses_exemplar, 0)]
    label,votes,_ = predict(model, data, data.splits['test'], 3)
    return pairs, label.tolist(), None if votes is None else votes.tolist()


def several(cfgs, out, results):
    "All runs in one group of processes"
    dist = init_distributed(4, 'cpu')
    results.put((dist.rank, [train_and_predict(cfg, out, dist) for cfg in cfgs]))


@pytest.fixture(scope='module')
def release(): return prepare(finediving('smoke', **SMALL), 'cpu')


def stop_after_the_first(model, data, epoch, run):
    if epoch == 1: raise KeyboardInterrupt


def test_four_processes_are_one(release, tmp_path):
    torch.set_num_threads(1)
    cfgs = (PAIRS, IN_BATCH, RESUMED)
    alone = [train_and_predict(cfg, tmp_path/'one') for cfg in cfgs]
    steps = [[len(query) for query,_,_ in pairs] for pairs,_,_ in alone]
    assert steps == [[3,1],[5],[2,2]], 'batches that four does not divide, and one of a single dive'
    data = prepare(RESUMED, 'cpu')
    data = replace(data, splits=dict(data.splits, train=data.splits['train'][:4], test=data.splits['test'][:3]))
    with pytest.raises(KeyboardInterrupt): fit(RESUMED, tmp_path/'four', data=data, on_epoch_end=stop_after_the_first, max_checkpoint_overhead=1)
    assert load_ckpt(tmp_path/'four'/'finediving'/run_id(RESUMED)/'last.pt', run_id(RESUMED))['epoch'] < 2, 'one process begins what four go on with'
    results = multiprocessing.get_context('forkserver').Queue()
    ranks = start_ranks(tmp_path, several, cfgs, tmp_path/'four', results)
    status,texts = end_of(ranks, tmp_path)
    assert status == [0]*4, texts
    answers = dict(results.get(timeout=5) for _ in ranks)
    assert all(answers[rank] == answers[0] for rank in range(4)), 'all have the same numbers'
    for cfg,(pairs,label,votes),(pairs_4,label_4,votes_4) in zip(cfgs, alone, answers[0]):
        assert pairs_4 == pairs, 'the same exemplars'
        assert np.abs(np.array(label_4)/label-1).max() < 1e-5, run_id(cfg)
        if votes: assert np.abs(np.array(votes_4)-votes).max() < 1e-4
        assert json.loads((tmp_path/'four'/'finediving'/run_id(cfg)/'provenance.json').read_text())['processes'] == 4


# None outlives the others ---------------------------------------------------------------------------------------------------------------------------

def test_one_of_four_is_killed(release, tmp_path):
    run = tmp_path/'finediving'/run_id(LONG)
    command = [str(save_cfg(LONG, tmp_path/'config.json')), '--out', str(tmp_path), '--device', 'cpu', '--processes', '4', '--max-overhead', '1']
    ranks = start_ranks(tmp_path, train_cli, command)
    until(lambda: (run/'last.pt').exists() or not all(rank.is_alive() for rank in ranks))
    os.kill(ranks[2].pid, signal.SIGKILL)
    began = time.monotonic()
    status,texts = end_of(ranks, tmp_path, 30)
    assert time.monotonic()-began < 20 and status == [1,1,-signal.SIGKILL,1], texts
    for rank in (0, 1, 3):
        assert f'fspn_train: run {run.name}: process {rank+1} of 4 lost the connection to another one, which has ended' in texts[rank] and 'Traceback' not in texts[rank], texts[rank]
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


@pytest.mark.parametrize('sign', [signal.SIGKILL, signal.SIGINT])
def test_no_process_is_left_behind_by_a_notebook(release, tmp_path, sign):
    run = tmp_path/'finediving'/run_id(LONG)
    notebook = subprocess.Popen([sys.executable, '-c', NOTEBOOK, str(save_cfg(LONG, tmp_path/'config.json')), str(tmp_path)], env=dict(os.environ, OMP_NUM_THREADS='1'),
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    until(lambda: (run/'log.csv').exists() or notebook.poll() is not None)
    trainers = psutil.Process(notebook.pid).children(recursive=True)
    assert len(trainers) == 2, notebook.communicate()[1]
    notebook.send_signal(sign)
    until(lambda: not alive(trainers), 30)
    notebook.communicate(timeout=30)
    state = newest_ckpt(run, run.name)
    assert state and (state['epoch'] > 0 or state['within_epoch']), 'it has saved itself'
    assert not [path for path in run.parent.iterdir() if 'lock' in path.name]
