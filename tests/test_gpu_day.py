"The script for a machine with a GPU: it runs without notebooks, loses nothing, and keeps numbers of a CPU apart from its goals"
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import gpu_day

ROOT = Path(__file__).resolve().parents[1]
# Notebook tools are as if not installed; Python reads a module of this name when it starts
WITHOUT_NOTEBOOKS = """
import sys
class Others:
    def __init__(self, finders): self.finders = finders
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ABSENT: return None
        return next((spec for finder in self.finders if (spec := finder.find_spec(name, path, target))), None)
    def invalidate_caches(self):
        for finder in self.finders: getattr(finder, 'invalidate_caches', lambda: None)()
sys.meta_path[:] = [Others(sys.meta_path[:])]
ABSENT = {'nbdev','fastcore','execnb','ghapi','papermill','IPython','ipykernel','ipywidgets','jupyter','jupyter_client','jupyter_core','jupyterlab',
          'nbformat','nbclient','nbconvert','matplotlib','seaborn','mistune','av','onnxruntime','captum','lightning_fabric'}
"""
ROW = "import gpu_day; gpu_day.Lab.send(None, name='{}', value=2.5, unit='times'); "
GOAL = "gpu_day.Lab.send(None, name='training: times the reference loop', value={}, unit='times', goal=True); "
WORKING = ROW.format('works')+"print('a line of its own'); "+GOAL.format(9.5)+GOAL.format(12.)
BROKEN = ROW.format('before it broke')+"gpu_day.Lab.send(None, error='ValueError: need x, got y'); raise SystemExit(1)"
DEAD = "import os; os.kill(os.getpid(), 9)"
SLOW = ROW.format('before it hung')+"import subprocess; subprocess.run(['sleep', '20'])"


def command(code): return [sys.executable, '-u', '-c', code]


def read(path): return list(csv.DictReader(path.open(encoding='utf-8')))


@pytest.fixture(scope='module')
def small_form(tmp_path_factory):
    "Output and rows of the whole script on a CPU, where notebook tools cannot be imported"
    folder = tmp_path_factory.mktemp('gpu_day')
    (folder/'sitecustomize.py').write_text(WITHOUT_NOTEBOOKS)
    env = {**os.environ, 'PYTHONPATH': str(folder), 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    result = subprocess.run([sys.executable, str(ROOT/'tests'/'gpu_day.py'), '--out', str(folder/'gpu.csv')], cwd=folder, env=env, capture_output=True, text=True)
    return result, read(folder/'gpu.csv')


def test_all_steps_run_without_notebooks_and_without_a_gpu(small_form):
    result,rows = small_form
    assert result.returncode == 0, result.stdout+result.stderr
    measured = [row for row in rows if row['value']]
    assert all(float(row['value']) >= 0 and row['device'].startswith('cpu') for row in measured)
    for step in gpu_day.GOALS: assert any(row['name'] == f'reduced, {step}' for row in measured), step # each goal was computed on the way
    assert not [row for row in rows if row['unit'] == 'error']
    assert all(row['torch'] and row['date'] and row['commit'] and float(row['seconds']) < 180 for row in measured) # one on a CPU without bf16, and beside other programs


def test_no_number_of_a_cpu_stands_beside_a_goal(small_form):
    goals = {row['name']: row for row in small_form[1] if row['goal']}
    assert goals.keys() == gpu_day.GOALS.keys()
    assert all((row['met'],row['value'],row['device']) == ('not measured','','') for row in goals.values())
    assert all(row['name'].startswith('reduced, ') and row['met'] == '' for row in small_form[1] if row['value'])


def test_a_failing_step_leaves_its_reason_and_the_next_goes_on(tmp_path, capfd):
    table = gpu_day.Table(tmp_path/'gpu.csv', device='one', torch='2')
    start = time.perf_counter()
    steps = dict(broken=(command(BROKEN), 30), dead=(command(DEAD), 30), slow=(command(SLOW), 1), working=(command(WORKING), 39))
    assert gpu_day.run_steps(table, steps, 100) == ['broken','dead','slow'] and time.perf_counter()-start < 15
    rows = {row['name']: row for row in read(table.path)}
    assert [rows[name]['value'] for name in ('before it broke','before it hung','works')] == ['2.5']*3
    reasons = {name: row['note'] for name,row in rows.items() if row['unit'] == 'error'}
    assert reasons.pop('step slow').startswith('stopped after')
    assert reasons == {'step broken': 'ValueError: need x, got y', 'step dead': 'ended with status -9'}
    reached = rows['training: times the reference loop'] # the better one of two takes the place of the first
    assert (reached['value'],reached['goal'],reached['met'],reached['device']) == ('12','>= 10','yes','one')
    assert 'a line of its own' in capfd.readouterr().out


def test_a_hard_stop_loses_no_row(tmp_path):
    code = f"import gpu_day,sys; table = gpu_day.Table('gpu.csv', device='one'); gpu_day.run_steps(table, dict(slow=([sys.executable, '-u', '-c', {SLOW!r}], 1)), 100)"
    with subprocess.Popen(command(code), cwd=tmp_path, env={**os.environ, 'PYTHONPATH': str(ROOT/'tests')}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().startswith('before it hung')
        os.kill(process.pid, signal.SIGKILL)
        process.stdout.close()
    rows = read(tmp_path/'gpu.csv')
    assert rows[0]['name'] == 'before it hung' and len(rows) == 1+len(gpu_day.GOALS)


def test_time_that_a_step_leaves_is_there_for_the_next(tmp_path):
    table,limits = gpu_day.Table(tmp_path/'gpu.csv'),[]
    gpu_day.run_steps(table, {name: (name, share) for name,share in (('a', 3), ('b', 1))}, 100, run=lambda table,step,command,limit: limits.append(limit) or True)
    assert limits == [pytest.approx(75, abs=1), pytest.approx(100, abs=1)]


@pytest.mark.parametrize('name,value,met', [('training: times the reference loop', 10., 'yes'), ('training: times the reference loop', 9.99, 'no'),
                                            ('fine-tuning: 200 epochs of FineDiving', 40., 'yes'), ('fine-tuning: 200 epochs of FineDiving', 41., 'no')])
def test_goals(name, value, met): assert gpu_day.is_met(name, value) == met


def test_a_gpu_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    with pytest.raises(SystemExit, match="need a GPU for --device cuda, got none; leave --device out, or take 'cpu'"): gpu_day.device_facts('cuda')


def test_the_reference_is_the_one_of_the_notebook():
    space = gpu_day.notebook_functions('plain_unit', 'pad_same', known=1)
    assert space['plain_unit'].__doc__ and space['known'] == 1
    with pytest.raises(ValueError, match='need gone in nbs/bench_throughput.ipynb'): gpu_day.notebook_functions('gone', 'pad_same')
