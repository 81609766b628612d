"Trainings as jobs: packing, parts of a plan, signals, jobs that die, and what is said where a cluster is not as it should be; no SLURM is needed (tests/test_slurm.py has one)"
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from waiting import wait_until
from fspn_nb.core import write_json
from fspn_nb.experiments import cluster,grid
from fspn_nb.experiments.cluster import follow,train_on_cluster
from fspn_nb.experiments.grid import run_grid
from fspn_nb.experiments.jobs import TrainingPack,balanced_parts,grid_trainings,pack_trainings,read_outcome,training_minutes,write_outcome
from fspn_nb.experiments.parameters import CLUSTER_DEFAULTS,ClusterSettings,cluster_settings,notebook_parameters
from fspn_nb.experiments.plan_files import NOTEBOOK_DEFAULTS,grid_cli,parse_shard,planned_trainings,read_plan,write_plan
from fspn_nb.experiments.submit import job_states,submit_missing,submitted_jobs
from fspn_nb.experiments.variants import grid_base
from fspn_nb.stored_files import write_checked

ROOT = Path(__file__).resolve().parents[1]
QUICK = grid_base('smoke', train__epochs=1, model__stages=1)
LONG = grid_base('smoke', train__epochs=16, model__stages=1, synthetic__n_train=8, synthetic__n_test=4, clip__size=32)
HERE = ClusterSettings(jobs=2, job_minutes=30, executor='local') # jobs are processes of this machine
RESULTS = ('predictions.csv', 'parsing.csv', 'metrics.json', 'watched.csv', 'votes.csv')


def results(root, run): return {name: (root/run/name).read_bytes() for name in RESULTS if (root/run/name).is_file()}


# ---- who goes with whom

def test_packs_hold_each_training_once_and_are_long_enough():
    rng = np.random.default_rng(0)
    for _ in range(200):
        minutes, least = rng.exponential(rng.uniform(1, 60), rng.integers(1, 60)).tolist(), rng.uniform(1, 60)
        packs = pack_trainings(minutes, least)
        assert sorted(i for pack in packs for i in pack) == list(range(len(minutes)))
        short = [sum(minutes[i] for i in pack) for pack in packs if sum(minutes[i] for i in pack) < least]
        assert len(short) <= 1, 'one job at most is too short: the rest of the short trainings'
        assert all(minutes[pack[k]] >= minutes[pack[k+1]] for pack in packs for k in range(len(pack)-1)), 'longest first'


@pytest.mark.parametrize('n', [1, 2, 3, 7, 20])
def test_parts_are_the_plan_and_take_as_long(n):
    minutes = [training_minutes(training.cfg, {}, 'cpu') for training in grid_trainings(grid_base())]
    parts = balanced_parts(minutes, n)
    assert sorted(i for part in parts for i in part) == list(range(len(minutes))) and parts == balanced_parts(minutes, n)
    loads = [sum(minutes[i] for i in part) for part in parts]
    assert max(loads)-min(loads) <= max(minutes)


# ---- what is said

@pytest.mark.parametrize('changes, message', [
    (dict(cluster='pbs'), "cluster must be one of local, slurm, got 'pbs'"), (dict(jobs=0), 'jobs: need 1 or more, got 0'), (dict(job_minutes=0), 'job_minutes: need 1 or more'),
    (dict(partition='gpu'), "partition='gpu' needs cluster='slurm', got 'local'"), (dict(sbatch='mem=1G'), "sbatch='mem=1G' needs cluster='slurm'"),
    (dict(cluster='slurm', processes=2), "processes=2 needs cluster='local'"), (dict(cluster='slurm', workers=3), "workers=3 needs cluster='local'"),
    (dict(cluster='slurm', sbatch='mem="1G'), 'need a quote at both ends'), (dict(cluster='slurm', sbatch='mem 1G'), 'need name=value'), (dict(cluster='slurm', sbatch='mem='), 'need name=value'),
    (dict(cluster='slurm', sbatch='job-name=x'), 'job-name is what this notebook decides'), (dict(cluster='slurm', sbatch='--partition=x'), 'use -p partition'),
    (dict(cluster='slurm', sbatch="comment='a\nrm'"), 'need name=value'), (dict(cluster='slurm', sbatch='MEM=1G'), 'need name=value')])
def test_parameters_that_do_not_go_together(changes, message):
    p = dict(CLUSTER_DEFAULTS, device='auto', processes=1, workers=0)|changes
    with pytest.raises(ValueError, match=message): cluster_settings(p)


@pytest.mark.parametrize('device, sbatch, result', [
    ('auto', '', ('cpu', {})), ('auto', 'gres=gpu:1', ('cuda', dict(gres='gpu:1'))), ('auto', 'gpus-per-node=1', ('cuda', {'gpus-per-node': '1'})), ('cuda', '', ('cuda', dict(gres='gpu:1'))),
    ('cuda:1', 'gres=gpu:a100:1', ('cuda', dict(gres='gpu:a100:1'))), ('cpu', 'gres=gpu:1', ('cpu', dict(gres='gpu:1'))), ('auto', 'gres=shard:1', ('cpu', dict(gres='shard:1')))])
def test_the_device_of_a_job_follows_from_what_it_asks_for(device, sbatch, result):
    settings = cluster_settings(dict(CLUSTER_DEFAULTS, cluster='slurm', device=device, sbatch=sbatch))
    assert (settings.device, settings.options) == result


def test_a_program_may_leave_out_the_parameters_of_clusters_a_notebook_may_not():
    known = dict(seeds=list, cluster=str, jobs=int)
    assert notebook_parameters(dict(seeds='0'), known) == dict(seeds='0', cluster='local', jobs=20)
    with pytest.raises(ValueError, match='got none called cluster, jobs'): notebook_parameters(dict(seeds='0', In=["seeds = '0'", 'check()']), known)


def programs(folder, **scripts):
    "Stand-ins for the commands of SLURM in `folder`"
    folder.mkdir(exist_ok=True)
    for name in ('sbatch', 'squeue', 'srun', 'scontrol'):
        file = folder/name
        file.write_text(f'#!/bin/sh\n{scripts.get(name, "exit 0")}\n')
        file.chmod(0o755)
    return folder


def test_what_is_missing_is_one_sentence(tmp_path, monkeypatch):
    trainings, slurm = grid_trainings(QUICK, 'V', (0,), False), ClusterSettings()
    bin = programs(tmp_path/'bin')
    monkeypatch.setenv('PATH', str(bin))
    (bin/'sbatch').unlink()
    with pytest.raises(FileNotFoundError, match='need the commands of SLURM, got a machine without sbatch; start this where sbatch works'): submit_missing(trainings, tmp_path, slurm)
    (bin/'squeue').unlink()
    with pytest.raises(FileNotFoundError, match='got a machine without sbatch, squeue; start this where sbatch works'): submit_missing(trainings, tmp_path, slurm)
    programs(bin)
    (bin/'sbatch').unlink()
    monkeypatch.setitem(sys.modules, 'submitit', None)
    with pytest.raises(ImportError, match=r"pip install 'fspn_nb\[cluster\]'"): submit_missing(trainings, tmp_path, slurm)


def test_what_sbatch_and_squeue_say_is_one_sentence(tmp_path, monkeypatch, capfd):
    refuse = "echo 'sbatch: error: invalid partition specified: gup' >&2; echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2; exit 1"
    bin = programs(tmp_path/'bin', sbatch=refuse)
    monkeypatch.setenv('PATH', f'{bin}:/usr/bin:/bin')
    trainings, slurm = grid_trainings(QUICK, 'V', (0,), False), ClusterSettings(options=dict(partition='gup'))
    with pytest.raises(RuntimeError, match='^sbatch refused the jobs: invalid partition specified: gup; Batch job submission failed: Invalid partition name specified; look at -p partition'):
        submit_missing(trainings, tmp_path, slurm)
    assert 'sbatch: error' not in capfd.readouterr().err
    programs(bin, squeue="echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1")
    assert job_states(slurm, {}) is None
    with pytest.raises(RuntimeError, match='need squeue to answer'): submit_missing(trainings, tmp_path, slurm)


def test_what_a_job_is_told(tmp_path, monkeypatch):
    "The script for sbatch: options, environment, signal, limit; the second call finds the first one's job"
    bin = programs(tmp_path/'bin', sbatch=f'cat "$1" >> {tmp_path}/script; echo Submitted batch job 7')
    monkeypatch.setenv('PATH', f'{bin}:/usr/bin:/bin')
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path/'cache'))
    trainings = grid_trainings(QUICK, 'V', (0,), False)
    settings = ClusterSettings(jobs=2, job_minutes=1e-6, device='cuda', options={'partition': 'gpu', 'gres': 'gpu:1', 'time': '1:00:00'})
    assert submit_missing(trainings, tmp_path, settings) == ['7_0', '7_1', '7_2']
    first, array = (tmp_path/'script').read_text().split('#!/bin/bash')[1:]
    assert '--array=0-2%2' in array and '--dependency=afterany:7' in array and '--array' not in first, 'what all read is made before'
    for text in ('--partition=gpu', '--gres=gpu:1', '--time=60', '--requeue', '--signal=USR2@90', '--cpus-per-task=8', f'export FSPN_CACHE={tmp_path}/cache', f'export PYTHONPATH={ROOT}', sys.executable):
        assert text in array and text in first, text
    name = submitted_jobs(tmp_path)[trainings[0].run]['name']
    programs(bin, squeue=f'echo "7_0|{name}|PENDING|Priority"; echo "7_1|{name}|RUNNING|None"; echo "7_2|{name}|COMPLETED|None"', sbatch='echo Submitted batch job 8')
    assert submit_missing(trainings, tmp_path, settings) == ['8'], 'only the one whose job has ended'
    assert [submitted_jobs(tmp_path)[training.run]['job'] for training in trainings] == ['7_0', '7_1', '8']


# ---- jobs that are stopped

def tasks(root):
    "The processes that do the jobs"
    pids = {int(entry['job']) for entry in submitted_jobs(root).values() if entry['job']}
    return [child for pid in pids if psutil.pid_exists(pid) for child in psutil.Process(pid).children()]


def under_way(root, run):
    "Whether a training has finished some epochs, not all"
    log = root/run/'log.csv'
    return log.is_file() and 3 < len(log.read_text().splitlines()) and not (root/run/'metrics.json').is_file()


@pytest.fixture(scope='module')
def expected(tmp_path_factory):
    "What this machine makes of the trainings without jobs"
    root = tmp_path_factory.mktemp('expected')
    table = run_grid(LONG, 'V', (0,), root, 'cpu', 1, False)
    assert (table.status == 'trained').all()
    return {run: results(root, run) for run in table.run}


def test_a_job_that_is_stopped_and_put_back_ends_at_the_same_bytes(tmp_path, expected, capsys):
    "SIGUSR2, as before a time limit: saved at the next step, then submitit's requeue"
    trainings = grid_trainings(LONG, 'V', (0,), False)
    (job,) = submit_missing(trainings, tmp_path, HERE)
    wait_until(lambda: under_way(tmp_path, trainings[1].run), 'the second training was begun')
    tasks(tmp_path)[0].send_signal(signal.SIGUSR2)
    assert submit_missing(trainings, tmp_path, HERE) == [] and 'in jobs that were submitted before' in capsys.readouterr().out
    assert [answer[0] for answer in follow(trainings, tmp_path, HERE).values()] == ['trained']*3
    assert [answer[0] for answer in train_on_cluster(trainings, tmp_path, HERE)] == ['there']*3 and len({entry['name'] for entry in submitted_jobs(tmp_path).values()}) == 1
    folder = tmp_path/'jobs'/submitted_jobs(tmp_path)[trainings[0].run]['name']
    log = (folder/f'{job}_0_log.out').read_text()+(folder/f'{job}_0_log.err').read_text()
    assert 'stopped by SIGTERM at epoch' in log and f'Requeued job {job}' in log
    assert log.count(f'{trainings[0].run} trained') == 1, 'what had ended is not repeated'
    assert {training.run: results(tmp_path, training.run) for training in trainings} == expected


def test_a_job_that_is_killed_loses_one_training_and_no_other(tmp_path, expected):
    trainings = grid_trainings(LONG, 'V', (0,), False)
    submit_missing(trainings, tmp_path, HERE)
    begun = lambda: [training.run for training in trainings if under_way(tmp_path, training.run)]
    wait_until(begun, 'a training was begun')
    (run,) = begun()
    for process in tasks(tmp_path): process.kill()
    answers = {training.run: answer for training, answer in zip(trainings, train_on_cluster(trainings, tmp_path, HERE))}
    assert answers[run][0] == 'failed' and 'before this training did; its log' in answers[run][3] and '_0_log.' in answers[run][3]
    assert all(answer[0] == 'trained' for other, answer in answers.items() if other != run), 'they were submitted once more'
    assert [answer[0] for answer in train_on_cluster(trainings, tmp_path, HERE)].count('trained') == 1, 'the same command again trains that one'
    assert {training.run: results(tmp_path, training.run) for training in trainings} == expected


def test_a_training_that_fails_says_why_and_where_its_log_is(tmp_path):
    from fspn_nb.config import override
    trainings = grid_trainings(override(QUICK, model__heads=10**9), 'V', (0,), False)[:2]
    good = grid_trainings(QUICK, 'V', (0,), False)[:1]
    answers = train_on_cluster([*trainings, *good], tmp_path, HERE)
    failed = [answer for answer in answers if answer[0] == 'failed']
    assert failed and answers[-1][0] == 'trained' and all('(log: ' in answer[3] and Path(answer[3].split('(log: ')[1].rstrip(')')).is_file() for answer in failed)


def test_a_finished_training_without_a_rho_ends_no_pack(tmp_path):
    "Constant predictions: null in metrics.json. A job that was killed after that file and before its answer does the rest of its pack"
    trainings, jobs = grid_trainings(QUICK, 'V', (0,), False)[:2], tmp_path/'jobs'
    TrainingPack(trainings[:1], tmp_path, 'cpu', jobs)()
    path = tmp_path/trainings[0].run/'metrics.json'
    write_json(path, json.loads(path.read_text())|dict(spearman=None, reason='all predictions are equal'), write_checked)
    write_outcome(jobs, trainings[0].run, 'running')
    TrainingPack(trainings, tmp_path, 'cpu', jobs)()
    first, second = (read_outcome(jobs, training.run) for training in trainings)
    assert (first['status'], first['rho'], first['problem'], second['status']) == ('there', None, '', 'trained')
    for rho in (None, float('nan'), np.float32('nan')): assert json.loads(write_outcome(jobs, trainings[0].run, 'trained', rho=rho).read_text())['rho'] is None
    status, _, rho, _ = grid._work(trainings[0].cfg, tmp_path, 'cpu', (), False) # what `run_grid` puts into its plan
    assert status == 'there' and isinstance(rho, float) and np.isnan(rho)


def test_ctrl_c_leaves_the_jobs_and_says_how_to_come_back(tmp_path, monkeypatch, capsys):
    trainings = grid_trainings(QUICK, 'V', (0,), False)[:1]
    submit_missing(trainings, tmp_path, HERE)
    asleep = time.sleep
    def interrupt(_): raise KeyboardInterrupt
    monkeypatch.setattr(cluster.time, 'sleep', interrupt)
    with pytest.raises(KeyboardInterrupt): follow(trainings, tmp_path, HERE)
    monkeypatch.setattr(cluster.time, 'sleep', asleep)
    name = submitted_jobs(tmp_path)[trainings[0].run]['name']
    assert f'the jobs {name} go on without this notebook; the same command comes back to them, `scancel --name={name}` ends them' in capsys.readouterr().out
    assert [answer[0] for answer in train_on_cluster(trainings, tmp_path, HERE)] == ['trained']


def test_a_scheduler_that_does_not_answer_ends_nothing(tmp_path, monkeypatch):
    "Its last answer counts; before the first one nothing is concluded"
    trainings = grid_trainings(QUICK, 'V', (0,), False)[:1]
    monkeypatch.setattr(cluster, '_PATIENCE', dict(local=0))
    submit_missing(trainings, tmp_path, HERE)
    answers, real = iter([None, None, None]), job_states
    monkeypatch.setattr(cluster, 'job_states', lambda *args: next(answers, real(*args)))
    assert [answer[0] for answer in follow(trainings, tmp_path, HERE).values()] == ['trained']


def test_a_damaged_list_is_named(tmp_path):
    (tmp_path/'jobs').mkdir()
    (tmp_path/'jobs'/'submitted.json').write_text(json.dumps({'finediving/fspn': dict(name='n', index=0, job='1')}))
    with pytest.raises(ValueError, match='submitted.json: need a record with its checksum.*squeue --me'): submit_missing(grid_trainings(QUICK, 'V', (0,), False), tmp_path, HERE)


# ---- a plan in files

@pytest.mark.parametrize('name', NOTEBOOK_DEFAULTS)
def test_defaults_are_those_of_the_notebooks(name):
    import ast
    nb = json.loads((ROOT/'nbs'/f'run_{name}.ipynb').read_text(encoding='utf-8'))
    cell = next(c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', []))
    values = {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(''.join(cell['source'])).body}
    assert NOTEBOOK_DEFAULTS[name]|CLUSTER_DEFAULTS == values


@pytest.mark.parametrize('text', ['3/2', '0/2', '-1/2', '1/0', '2', '', '1/2/3', 'a/2', '1/2.5', '²/3', '1 /2'])
def test_a_shard_that_is_none(text):
    with pytest.raises(ValueError, match='shard: need i/n with i from 1 to n'): parse_shard(text)


def test_two_shards_side_by_side_do_the_plan_once(tmp_path):
    plan, out = tmp_path/'plan', tmp_path/'out'
    grid_cli(['--plan', str(plan), '-p', 'tables', 'V', '-p', 'seeds', '0', '-p', 'preset', 'smoke', '-p', 'epochs', '1', '-p', 'out', str(out), '-p', 'device', 'cpu', '-p', 'changes', 'model.stages=1'])
    table, trainings, _ = read_plan(plan)
    assert sorted(table.config) == sorted(f'configs/{path.name}' for path in (plan/'configs').glob('*-*.json')) and f'--plan {plan} --shard i/n' in (plan/'README.txt').read_text()
    before = {path: path.read_bytes() for path in plan.rglob('*') if path.is_file()}
    command = [sys.executable, '-m', 'fspn_nb.experiments.plan_files', '--plan', str(plan), '--shard']
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': str(ROOT)}
    shards = [subprocess.Popen([*command, shard], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=tmp_path) for shard in ('1/2', '2/2', '1/2')]
    texts = [shard.communicate()[0] for shard in shards]
    assert [shard.returncode for shard in shards] == [0, 0, 0], texts
    assert sum(text.count(' trained ') for text in texts) == len(trainings), texts
    local = run_grid(QUICK, 'V', (0,), tmp_path/'local', 'cpu', 1, False)
    assert sorted(local.run) == sorted(table.run) and all(results(out, run) == results(tmp_path/'local', run) for run in local.run)
    assert {path: path.read_bytes() for path in plan.rglob('*') if path.is_file()} == before


def test_a_plan_that_was_edited_or_is_another_is_refused(tmp_path):
    trainings = grid_trainings(QUICK, 'V', (0,), False)
    file = write_plan(tmp_path/'plan', trainings, tmp_path, 'cpu')
    with pytest.raises(SystemExit, match='fspn_grid: .*need an empty folder, or that of the same plan'): grid_cli(['--plan', str(tmp_path/'plan'), '-p', 'preset', 'smoke', '-p', 'out', str(tmp_path)])
    with pytest.raises(SystemExit, match='fspn_grid: -p belongs to the plan'): grid_cli(['--plan', str(tmp_path/'plan'), '--shard', '1/2', '-p', 'seeds', '0'])
    with pytest.raises(SystemExit, match='fspn_grid: .*need the folder of a plan'): grid_cli(['--plan', str(tmp_path/'none'), '--shard', '1/2'])
    file.write_text(file.read_text().replace('watch', 'wotch'))
    with pytest.raises(SystemExit, match='fspn_grid: .*need the file as it was written.*write the plan anew'): grid_cli(['--plan', str(tmp_path/'plan'), '--shard', '1/2'])


def test_a_plan_for_a_gpu_needs_none(tmp_path):
    (tmp_path/'release').mkdir()
    trainings, _, device = planned_trainings('mtl_aqa', dict(data_root=str(tmp_path/'release'), preset='paper', device='cuda', out=str(tmp_path)))
    assert device == 'cuda' and {training.cfg.train.backbone for training in trainings} == {'finetune'} and all(training.keep_weights for training in trainings)
