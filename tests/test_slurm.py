"""A grid on a real SLURM with two nodes, and what happens to it: a process is killed, a job is put back, the controller is started anew, a node loses its power.
At the end stand the bits of one machine, and no training was done twice. Prints a log (pytest -s)"""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from slurm_cluster import CONF,missing_reason,processes_of,slurm_cluster,wait_until

from fspn_nb.experiments.jobs import grid_trainings,read_outcome
from fspn_nb.experiments.submit import submitted_jobs
from fspn_nb.experiments.variants import grid_base
from fspn_nb.training.checkpoint import newest_ckpt

ROOT = Path(__file__).resolve().parents[1]
NEEDED = os.environ.get('FSPN_NEEDS_SLURM') # continuous integration installs it
if not NEEDED:
    pytest.importorskip('submitit', reason="no submitit: pip install -e '.[dev]'")
    pytest.importorskip('lightning_fabric', reason="no lightning-fabric: pip install -e '.[dev]'")
EPOCHS = 24
CHANGES = 'model.stages=1 clip.size=32'
PARAMETERS = dict(tables='V', seeds='0,1,2,3', preset='smoke', n_train=8, n_test=4, epochs=EPOCHS, changes=CHANGES, device='cpu', keep_weights=True)
REST = dict(data_root='', backbone='auto', weights='', workers=1, allow_missing=False)
TRAININGS = grid_trainings(grid_base('smoke', train__epochs=EPOCHS, model__stages=1, clip__size=32, synthetic__n_train=8, synthetic__n_test=4),
                           'V', (0,1,2,3), False, True)
TABLES = ('predictions.csv','metrics.json','parsing.csv','votes.csv','watched.csv')
# what run_ablations does; jobs of six seconds, by estimate, where a notebook gives them a minute at least
DRIVER = """
import json,sys
from dataclasses import replace
from fspn_nb.experiments.cluster import follow,train_grid
from fspn_nb.experiments.grid import grid_parameters
follow.__defaults__ = (2,) # seconds between two questions at most; 30 in earnest
p = grid_parameters(json.loads(sys.argv[1]))
if p['cluster']: p['cluster'] = replace(p['cluster'], job_minutes=.1)
train_grid(p, p['out']).to_csv(sys.argv[2], index=False)
"""
# exemplars and predictions of one process, or of those that srun has started
PROCESSES = """
import json,sys
from pathlib import Path
import torch
from fspn_nb.config import finediving,override
from fspn_nb.train import fit
from fspn_nb.training.checkpoint import load_ckpt
from fspn_nb.training.distributed import any_rank,init_distributed
from fspn_nb.training.loop import batch_sampler,build_model
from fspn_nb.training.predict import predict
from fspn_nb.training.prepare import prepare
torch.set_num_threads(1)
out,processes,nodes = Path(sys.argv[1]),int(sys.argv[2]),int(sys.argv[3])
dist = init_distributed(processes, 'cpu', nodes)
pairs = finediving('smoke', protocol='wo_dn', synthetic__n_train=6, synthetic__n_test=4, clip__size=32, clip__starts=(0,40), model__clips=2, weights='random',
                   train__backbone='finetune', model__adapter=False, train__epochs=1, model__name='fspn_s', train__batch_size=5)
answers = []
for cfg in (pairs, override(pairs, train__in_batch_exemplars=True)):
    data = prepare(cfg, 'cpu', dist=dist)
    model,run = build_model(data),fit(cfg, out, data=data)
    any_rank(dist, False) # the main process has written its files
    model.load_state_dict(load_ckpt(run/'last.pt', data.run_id)['model'])
    steps = [[None if part is None else [int(i) for i in part] for part in step] for step in batch_sampler(data, model.uses_exemplar, 0)]
    label,votes,_ = predict(model, data, data.splits['test'], 3)
    answers.append((steps, label.tolist()))
(out/f'answer{dist.rank}.json').write_text(json.dumps(answers))
"""


@pytest.fixture(scope='module')
def cluster():
    if reason := missing_reason(): (pytest.fail if NEEDED else pytest.skip)(reason)
    with slurm_cluster() as its: yield its


def child_env():
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'FSPN_CACHE': os.environ.get('FSPN_CACHE') or str(ROOT/'.cache'), 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '1'}
    env.pop('IN_TEST', None)
    return env


def start(file, *command):
    "A process whose output goes to `file`"
    with open(file, 'w') as log: return subprocess.Popen([str(part) for part in command], env=child_env(), stdout=log, stderr=log, cwd=file.parent)


def tell(*words): print(time.strftime('%H:%M:%S'), *words, flush=True)


def outcome(root, run):
    entry = submitted_jobs(root).get(run)
    return read_outcome(root/'jobs'/entry['name'], run) if entry else {}


def epochs_of(folder):
    "Epochs in the log of a training"
    try: return len((folder/'log.csv').read_text().split('\n'))-2
    except FileNotFoundError: return 0


def under_way(root, saved, not_these):
    "(run, job) of an FSPN training in its middle; with a checkpoint"
    for training in TRAININGS:
        if training.run in not_these or training.cfg.model.name != 'fspn': continue
        record,folder = outcome(root, training.run),root/training.run
        if record.get('status') == 'running' and 2 <= epochs_of(folder) < EPOCHS-8 and (not saved or (folder/'last.pt').is_file()): return training.run,record['job']


def job_env(process): return process.environ() if process.is_running() else {}


def trainers(cluster, job):
    "Processes on a node that do the trainings of a job"
    array,_,task = job.partition('_')
    for process in processes_of(cluster.folder.as_posix(), cluster.name):
        env = job_env(process)
        if process.name() != 'srun' and 'SLURM_PROCID' in env and 'submitit.core._submit' in process.cmdline() and (env.get('SLURM_ARRAY_JOB_ID'), env.get('SLURM_ARRAY_TASK_ID')) == (array, task):
            yield process


def node_of(cluster, job): return cluster.run('squeue', '--noheader', f'--job={job}', '--format=%N')


def log_of(folder): return (folder/'log.csv').read_text().rstrip('\n').split('\n')


def state_of(folder):
    "(lines of its log, epochs in its checkpoint) of an interrupted training"
    return log_of(folder), newest_ckpt(folder, folder.name)['epoch']


def test_nothing_is_left():
    "The program that has a cluster is killed in the midst of a job: no daemon, no job, no file stays"
    if reason := missing_reason(): (pytest.fail if NEEDED else pytest.skip)(reason)
    owner = subprocess.Popen([sys.executable, ROOT/'tests/slurm_cluster.py', 'srun', '--nodes=2', 'sleep', '1000'])
    try:
        lines = wait_until(lambda: CONF.exists() and owner.poll() is None and dict(line.split('=', 1) for line in CONF.read_text().split('\n') if '=' in line), 'need a cluster')
        folder,name = Path(lines['StateSaveLocation']).parent,lines['ClusterName']
        def sleeping(): return sum(process.name() == 'sleep' for process in processes_of(folder.as_posix(), name))
        wait_until(lambda: sleeping() == 2, 'need a job on two nodes')
        names = {process.name() for process in processes_of(folder.as_posix(), name)}
        assert names >= {'munged','slurmctld','slurmd','slurmstepd','srun','sleep'}
        with pytest.raises(RuntimeError, match=f'process {owner.pid} has a cluster'), slurm_cluster(): pass
    finally: owner.kill()
    owner.wait()
    wait_until(lambda: not folder.exists(), 'need the end of the cluster')
    assert not CONF.exists() and not list(processes_of(folder.as_posix(), name))
    CONF.write_text('ClusterName=real\n')
    try:
        with pytest.raises(RuntimeError, match='a real cluster is left alone'), slurm_cluster(): pass
        assert CONF.read_text() == 'ClusterName=real\n'
    finally: CONF.unlink()


def test_twelve_trainings_on_two_nodes(cluster, tmp_path):
    "Killed, put back, without a controller, without a node: all finished, the bits of one machine, nothing twice"
    local,root = tmp_path/'local',tmp_path/'slurm'
    assert len(TRAININGS) == 12
    here = dict(REST, **PARAMETERS)
    began = time.monotonic()
    alone = start(tmp_path/'local.txt', sys.executable, '-c', DRIVER, json.dumps(dict(here, out=str(local))), tmp_path/'local.csv')
    there = dict(here, out=str(root), cluster='slurm', partition='main', jobs=4, sbatch='mem=1500M time=20', workers=0)
    driver = start(tmp_path/'slurm.txt', sys.executable, '-c', DRIVER, json.dumps(there), tmp_path/'slurm.csv')
    def middle(saved, not_these):
        def find():
            assert driver.poll() is None, (tmp_path/'slurm.txt').read_text()
            return under_way(root, saved, not_these)
        return wait_until(find, 'need a training in its middle', 300, .2)

    killed,job = middle(True, ())
    victim = next(trainers(cluster, job))
    victim.kill()
    tell(f'kill -9 of process {victim.pid}, which trains {killed} in job {job} on {node_of(cluster, job)}')
    begun = {killed: state_of(root/killed)}
    wait_until(lambda: cluster.run('squeue', '--noheader', '--states=all', f'--job={job}', '--format=%T') == 'FAILED', 'need SLURM to know of the death')

    requeued,job = middle(False, (killed,))
    tell(f'scontrol requeue {job}, which trains {requeued} on {node_of(cluster, job)}')
    cluster.run('scontrol', 'requeue', job)
    wait_until(lambda: not list(trainers(cluster, job)), 'need the end of a job that was put back')
    begun[requeued] = state_of(root/requeued)
    # srun waits for minutes where the controller goes while it asks for its step
    wait_until(lambda: sum(step.endswith('.0') for step in cluster.run('squeue', '--noheader', '--steps', '--format=%i').split()) >= len(cluster.run('squeue', '--noheader', '--states=R', '--format=%i').split()),
               'need steps of all jobs that run', 120)
    cluster.stop_controller()
    tell('slurmctld stopped:', cluster.run('scontrol', 'ping', check=False))
    time.sleep(3)
    cluster.start_controller()
    tell('slurmctld started:', cluster.run('scontrol', 'ping'))

    lost,job = middle(True, (killed, requeued))
    node = node_of(cluster, job)
    cluster.cut_power(node)
    begun[lost] = state_of(root/lost)
    tell(f'no power on {node}, where job {job} trained {lost}:', cluster.run('sinfo', '--noheader', '--format=%N %T').replace('\n', ', '))
    time.sleep(2)
    cluster.restore_power(node)
    tell(f'power on {node} again')

    assert driver.wait(400) == 0, (tmp_path/'slurm.txt').read_text()
    tell('the call has ended'), print((tmp_path/'slurm.txt').read_text(), cluster.queue(), sep='\n')
    plan = pd.read_csv(tmp_path/'slurm.csv', keep_default_na=False).set_index('run')
    print(plan[['experiment','seed','status','seconds','rho']].to_string())
    failed = plan[plan.status == 'failed']
    assert failed.index.tolist() == [killed] and 'ended (FAILED) before this training did; its log' in failed.problem.iloc[0], plan.to_string()
    assert (plan.status.drop(killed) == 'trained').all(), plan.to_string()
    tell(f'{killed}: {failed.problem.iloc[0]}')

    papermill = [sys.executable, '-m', 'papermill', ROOT/'nbs/run_ablations.ipynb', tmp_path/'again.ipynb', '--no-progress-bar']
    values = [part for name,value in dict(there, job_minutes=1).items() if value != '' for part in ('-p', name, value)]
    again = start(tmp_path/'again.txt', *papermill, *values)
    assert again.wait(300) == 0, (tmp_path/'again.txt').read_text()
    text = json.loads((tmp_path/'again.ipynb').read_text())
    printed = ''.join(''.join(out.get('text', '')) for cell in text['cells'] for out in cell.get('outputs', []))
    tell('the same command again, as a notebook'), print(printed)
    assert '1 training in 1 job ' in printed and 'there      11' in printed and 'trained     1' in printed, printed

    assert alone.wait(300) == 0, (tmp_path/'local.txt').read_text()
    ends = [line.split()[:2] for log in (root/'jobs').glob('*/*_log.out') for line in log.read_text().splitlines() if line.startswith('finediving/fspn') or line.startswith('finediving/i3d')]
    assert sorted(ends) == sorted([training.run, 'trained'] for training in TRAININGS), 'each training ended once'
    for training in TRAININGS:
        one,other = local/training.run,root/training.run
        for name in TABLES: assert (one/name).is_file() == (other/name).is_file() and (not (one/name).is_file() or (one/name).read_bytes() == (other/name).read_bytes()), (training.run, name)
        a,b = (pd.read_csv(folder/'log.csv', dtype=str).drop(columns='seconds') for folder in (one, other))
        assert a.equals(b) and b.epoch.tolist() == [str(i+1) for i in range(EPOCHS)], training.run
        a,b = (torch.load(folder/'last.pt', weights_only=True)['model'] for folder in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a), training.run
    for run,(lines,saved) in begun.items(): # compared with their seconds: these epochs were not computed a second time
        kept = sum(old == new for old,new in zip(lines, log_of(root/run)))-1
        tell(f'{run}: {len(lines)-1} epochs at the interruption, {saved} of them saved, {kept} kept')
        assert kept >= saved, (run, lines, log_of(root/run))
    assert begun[requeued][1] == len(begun[requeued][0])-1 > 0, 'who is told to stop saves all'
    tell(f'12 trainings, the same bits as a local run, {time.monotonic()-began:.0f} s in all')


def test_a_partition_that_is_not_there(cluster, tmp_path):
    values = dict(REST, **PARAMETERS, out=str(tmp_path), cluster='slurm', partition='gup')
    call = start(tmp_path/'call.txt', sys.executable, '-c', DRIVER, json.dumps(values), tmp_path/'plan.csv')
    text = (call.wait(120), (tmp_path/'call.txt').read_text())[1]
    assert 'RuntimeError: sbatch refused the jobs: invalid partition specified: gup; Batch job submission failed' in text and '-p partition' in text, text
    tell(text.strip().split('\n')[-1])


def test_two_nodes_train_one_run(cluster, tmp_path, monkeypatch):
    "One and two processes on each of two nodes: the exemplars of one process, and its predictions"
    monkeypatch.setenv('MASTER_ADDR', '127.0.0.1') # n1, which Lightning takes from SLURM, is no name of a machine here
    script = tmp_path/'processes.py'
    script.write_text(PROCESSES)
    answers = {}
    for processes,nodes in ((1, 1), (1, 2), (2, 2)):
        out = tmp_path/f'{processes}x{nodes}'
        out.mkdir()
        srun = ['srun', f'--nodes={nodes}', f'--ntasks-per-node={processes}', '--mem-per-cpu=1500M', '--kill-on-bad-exit=1'] if nodes > 1 else []
        call = start(out/'log.txt', *srun, sys.executable, script, out, processes, nodes)
        assert call.wait(200) == 0, (out/'log.txt').read_text()
        files = sorted(out.glob('answer*.json'))
        assert len(files) == processes*nodes
        answers[processes,nodes] = json.loads(files[0].read_text())
        assert all(file.read_text() == files[0].read_text() for file in files), 'all have the same numbers'
    for several in ((1, 2), (2, 2)):
        for (pairs,label),(pairs_n,label_n) in zip(answers[1,1], answers[several]):
            assert pairs == pairs_n, 'the same exemplars'
            error = np.abs(np.array(label_n)/label-1).max()
            tell(f'{several[1]} nodes, {several[0]} processes on each: predictions differ from those of one process by {error:.1e}')
            assert error < 1e-5
