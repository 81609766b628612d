"Parameters of the notebooks: types, unknown names, changed settings, wrong files; a notebook that is run twice in one kernel"
import ast
import atexit
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import UnionType

import pytest

from fspn_nb.analysis.run_groups import _family_facts,_preset_of
from fspn_nb.config import finediving,load_cfg,make_config,method_schedule,override,run_id,save_cfg
from fspn_nb.core import data_cache
from fspn_nb.experiments.grid import GRID_PARAMETERS,grid_parameters
from fspn_nb.experiments.parameters import assigned_names,cast_value,changed_settings,notebook_parameters,parse_changes,setting_types
from fspn_nb.experiments.session import DATASET_PARAMETERS,RUN_PARAMETERS,start
from fspn_nb.experiments.variants import config_of,plan_runs
from fspn_nb.inspect.actor_study import STUDY_PARAMETERS
from fspn_nb.inspect.clip_run import CLIP_PARAMETERS
from fspn_nb.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {'run_ablations': GRID_PARAMETERS, 'actor_and_heat': STUDY_PARAMETERS, 'score_clip': CLIP_PARAMETERS,
         **{f'run_{dataset}': RUN_PARAMETERS|own for dataset, own in DATASET_PARAMETERS.items()}}


def notebook(name): return json.loads((ROOT/'nbs'/f'{name}.ipynb').read_text(encoding='utf-8'))


def defaults(name):
    "The values in the parameters cell of a notebook"
    cell = next(c for c in notebook(name)['cells'] if 'parameters' in c['metadata'].get('tags', []))
    return {line.targets[0].id: ast.literal_eval(line.value) for line in ast.parse(''.join(cell['source'])).body}


@pytest.fixture
def cell(tmp_path, monkeypatch):
    "The parameters of run_mtl_aqa as they stand there, small"
    monkeypatch.delenv('IN_TEST', raising=False)
    return defaults('run_mtl_aqa')|dict(preset='smoke', weights='random', device='cpu', protocol='w_dd', out=str(tmp_path))


# ---- types

@pytest.mark.parametrize('name', KNOWN)
def test_types_are_those_of_the_defaults(name):
    assert {key: type(value) for key, value in defaults(name).items()} == {key: str if kind is list else kind for key, kind in KNOWN[name].items()}
    assert notebook_parameters(defaults(name), KNOWN[name]) == defaults(name)


@pytest.mark.parametrize('value, kind, result', [
    ('false', bool, False), ('False', bool, False), ('no', bool, False), ('TRUE', bool, True), ('yes', bool, True), (True, bool, True),
    ('flase', bool, 'need true or false'), ('', bool, 'need true or false'), (0, bool, 'need true or false'), (None, bool, 'need true or false'),
    (3, int, 3), ('3', int, 3), (3., int, 3), (1e2, int, 100), (3.5, int, 'a whole number'), ('3.5', int, 'a whole number'), (True, int, 'a whole number'),
    (float('nan'), int, 'a whole number'), (float('inf'), int, 'a whole number'), ([3], int, 'a whole number'), ('', int, 'a whole number'),
    (3, float, 3.), ('3.2', float, 3.2), ('1e-3', float, .001), ('nan', float, 'need a number'), (False, float, 'need a number'),
    (0, list, '0'), ('0,1', list, '0,1'), ([0, 1], list, '0,1'), (('fspn', 'usdl'), list, 'fspn,usdl'), (1.5, list, 'need text'), ([None], list, 'need text'),
    (407, str, '407'), (Path('a')/'b', str, str(Path('a')/'b')), (None, str, 'need text'), (True, str, 'need text'), (['a'], str, 'need text'), (2e5, str, 'need text'),
    ('0,10', tuple, (0, 10)), ('7', tuple, (7,)), ('7', UnionType, 7), ('auto', UnionType, 'auto'), ('0,', tuple, 'need whole numbers'), ('0,a', tuple, 'need whole numbers')])
def test_a_value_gets_its_type_or_is_refused(value, kind, result):
    if isinstance(result, str) and 'need' in result or isinstance(result, str) and result.startswith('a '):
        with pytest.raises(ValueError, match=f'^size: .*{result}.*got '): cast_value(value, kind, 'size')
    else:
        made = cast_value(value, kind, 'size')
        assert made == result and type(made) is type(result)


def test_false_in_lower_case_drops_no_dives(cell):
    "papermill passes `-p allow_missing false` as text"
    session = start('mtl_aqa', cell|dict(allow_missing='false'))
    assert session.base.allow_missing is False and session.runs == start('mtl_aqa', cell).runs
    with pytest.raises(ValueError, match="^allow_missing: need true or false, got 'flase'"): start('mtl_aqa', cell|dict(allow_missing='flase'))


@pytest.mark.parametrize('wrong, message', [
    (dict(epochs=-1), 'epochs: need 0 or more, got -1'), (dict(epochs='many'), "epochs: need a whole number, got 'many'"), (dict(processes=0), 'processes: need 1 or more, got 0'),
    (dict(seeds='0,-1'), 'seed must be at least 0'), (dict(methods=True), 'methods: need text'), (dict(preset=None), 'preset: need text'),
    (dict(weights='nowhere.pt'), 'weights: need a file, and there is nothing at .*nowhere.pt'), (dict(data_root='nowhere'), 'data_root: need a folder, and there is nothing at'),
    (dict(actor='boxes', actor_file='nowhere.csv'), 'actor_file: need a file, and there is nothing at'), (dict(actor='onnx', actor_file='.'), 'actor_file: need a file, and there is something else'),
    (dict(actor_file=__file__), 'actor_file: need an actor that reads a file'), (dict(weights=__file__), 'weights: .* cannot be read as I3D weights'),
    (dict(actor='boxes', actor_file=__file__), 'actor_file: .*need'), (dict(actor='onnx', actor_file=__file__), 'actor_file: .*need'), (dict(data_root=__file__), 'data_root: need a folder')])
def test_wrong_values_are_named_before_anything_is_read(wrong, message, cell, monkeypatch):
    monkeypatch.setattr('fspn_nb.experiments.session.prepare', None)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error: start('mtl_aqa', cell|wrong)
    assert 'Errno' not in str(error.value)


def test_the_same_files_are_checked_in_the_grid(cell):
    given = defaults('run_ablations')|dict(preset='smoke', device='cpu')
    with pytest.raises(FileNotFoundError, match='weights: need a file'): grid_parameters(given|dict(weights='nowhere.pt'))
    assert grid_parameters(given|dict(keep_weights='no', allow_missing='false', seeds=3))['seeds'] == (3,)


def test_paths_are_kept_absolute(cell, tmp_path, monkeypatch):
    (tmp_path/'release').mkdir()
    monkeypatch.chdir(tmp_path)
    assert start('mtl_aqa', cell|dict(data_root='release')).base.data_root == str(tmp_path/'release')


# ---- changed settings

def test_what_differs_is_printed_for_each_run(cell, capsys):
    start('mtl_aqa', cell|dict(epochs=3, changes='train.lr=5e-4'))
    lines = capsys.readouterr().out.splitlines()
    assert "weights '' -> 'random'" in lines[0] and 'train.lr 0.001 -> 0.0005' in lines[0] and 'train.epochs 2 -> 3' in lines[0]
    start('mtl_aqa', cell|dict(preset='demo', epochs=3))
    lines = capsys.readouterr().out.splitlines()
    assert 'epochs' not in lines[0]
    assert lines[1].startswith('i3d_mlp-') and lines[1].endswith('train.epochs 100 -> 3') and lines[2].startswith('fspn-') and lines[2].endswith('train.epochs 20 -> 3')


def test_every_setting_can_be_changed_by_its_name():
    "Each of its type, and each gives the run another name"
    base, samples = finediving('demo'), {UnionType: '7', bool: 'no', int: '7', float: '0.25', str: 'x', tuple: '1,2'}
    for name, kind in setting_types().items():
        if name in ('dataset', 'preset'): continue
        value = getattr(base, name) if '.' not in name else getattr(getattr(base, name.partition('.')[0]), name.partition('.')[2])
        text = samples[kind] if kind is not bool else 'no' if value else 'yes'
        changed = make_config('finediving', 'demo', **parse_changes(f'{name}={text}'))
        assert len(changed_settings(changed, base)) == 1 and changed_settings(changed, base)[0].startswith(f'{name} ')
        assert run_id(changed) != run_id(base), name


@pytest.mark.parametrize('text, message', [
    ('model.num_bin=8', 'unknown setting model.num_bin; the nearest are model.num_bins'), ('num_bins=8', 'the nearest are model.num_bins'), ('lr=1', 'the nearest are train.lr'),
    ('model.intervals=8', 'unknown setting model.intervals; the nearest are .*model.num_bins'), ('model=8', 'unknown setting model;'), ('=8', 'unknown setting ;'),
    ('train.lr=fast', "changes: train.lr: need a number, got 'fast'"), ('model.num_bins=8,', "model.num_bins: need a whole number, got '8,'"), ('model.num_bins=2.5', 'need a whole number'),
    ('model.use_gc=maybe', "changes: model.use_gc: need true or false, got 'maybe'"), ('clip.starts=0,ten', 'clip.starts: need whole numbers'), ('train.lr=nan', 'need a number'),
    ('train.lr', 'need name=value'), ('train.lr = 3', 'need name=value'), ('train.lr=1 train.lr=2', 'need each setting once, got train.lr twice'), ("train.schedule='one", 'need a quote at both ends'),
    ('train.epochs=3', 'set by the parameter epochs; use -p epochs'), ('seed=1', 'use -p seeds'), ('actor.boxes=x.csv', 'use -p actor_file'), ('dataset=aqa7', 'what this notebook decides'),
    ('train.schedule=cosine', 'train.schedule must be one of constant, one_cycle'), ('train.batch_size=0', 'train.batch_size must be at least 1'), ('train.lr=-1', 'train.lr must be at least 0'),
    ('model.blocks=0', 'model.blocks must be at least 1'), ('model.dropout=1', 'model.dropout must be at least 0 and below 1'), ('clip.starts=0,10', 'model.clips must be the number of clip.starts')])
def test_wrong_changes_are_refused(text, message, cell):
    with pytest.raises(ValueError, match=message): start('mtl_aqa', cell|dict(changes=text))


@pytest.mark.parametrize('name', ['run_finediving', 'run_mtl_aqa', 'run_aqa7', 'run_ablations', 'actor_and_heat', 'tutorial_new_method'])
def test_the_examples_in_the_notebooks_work(name):
    text = ''.join(notebook(name)['cells'][0]['source'])
    assert parse_changes(re.search(r'-p changes "([^"]+)"', text)[1], KNOWN.get(name, ()))


@pytest.mark.parametrize('field, value, message', [
    ('train', {'epochs': '3'}, "train.epochs: need .*int.*, got '3'"), ('allow_missing', 'false', 'allow_missing: need .*bool'), ('seed', True, 'seed: need .*int'), ('seed', 1.5, 'seed: need .*int'),
    ('clip', {'starts': ['0']}, 'clip.starts: need tuple'), ('clip', {'starts': 5}, 'clip.starts: need tuple'), ('train', {'lr': 'x'}, 'train.lr: need .*float'), ('weights', None, 'weights: need .*str'), ('model', 3, 'model: need')])
def test_a_configuration_file_holds_values_of_their_types(field, value, message, tmp_path):
    path = save_cfg(finediving('smoke'), tmp_path/'config.json')
    values = json.loads(path.read_text())
    assert load_cfg(path) == finediving('smoke')
    path.write_text(json.dumps(values|{field: values[field]|value if isinstance(value, dict) else value}))
    with pytest.raises(ValueError, match=message): load_cfg(path)
    path.write_text(json.dumps(values|dict(train=values['train']|dict(lr=1)))) # JSON writes 1.0 as 1 in some languages
    assert load_cfg(path).train.lr == 1


# ---- names

@pytest.mark.parametrize('history, parameters', [
    (['a = 1\nb = 2', 'x'], 'a b'), (['a = 1\nb = 2', '# Parameters\nc = 3\n', 'x'], 'a b c'), (['a = 1\nb = 2', 'c = 3', 'x'], 'a b'), (['a = 1\nb = 2\nc = 3', 'x'], 'a b c'),
    (['a = 1\nc = 2', 'x', 'a = 1\nb = 2', 'x'], 'a b'), (['a = 1\nb = 2', '# Parameters\nc = 3\n', 'x', 'a = 1\nb = 2', 'x'], 'a b'),
    (['a = 1\nb = 2', '# Parameters\na = 3\nb = 4\n', 'x'], 'a b'), (['import os\na: int = 1\nb = os.sep', 'x'], 'a b'), (['a = 1\nb = 2', 'not python(', 'x'], 'a b')])
def test_parameters_are_what_the_last_parameters_cell_and_papermill_assign(history, parameters):
    assert assigned_names(history, ('a', 'b'))[0] == set(parameters.split())


def test_a_line_that_was_deleted_before_the_second_run_is_missed():
    history = ["a = 1\nb = 2\nc = 3", 'check()', 'a = 1\nb = 2', 'check()']
    with pytest.raises(ValueError, match='got none called c'): notebook_parameters(dict(a=1, b=2, c=3, In=history), dict(a=int, b=int, c=int))


# ---- real kernels

def kernel_run(nb, *more, cwd=ROOT/'nbs'):
    "Execute the cells of `nb`, then for each of `more` the same cells with other parameters, all in one kernel; outputs as text per pass"
    import nbformat
    from nbclient import NotebookClient
    book = nbformat.reads(json.dumps(nb), 4)
    client, passes = NotebookClient(book, timeout=240, kernel_name='python3', resources={'metadata': {'path': str(cwd)}}), []
    with client.setup_kernel():
        for changes in ({}, *more):
            for i, c in enumerate(book.cells):
                if 'parameters' in c.metadata.get('tags', []):
                    for name, value in changes.items(): c.source = re.sub(rf'^{name} = .*$', lambda _: f'{name} = {value!r}', c.source, flags=re.M)
                if c.cell_type == 'code': client.execute_cell(c, i, store_history=True)
            passes.append('\n'.join(o.get('text', '') or str(o.get('data', {}).get('text/plain', '')) for c in book.cells for o in c.get('outputs', [])))
    return passes


@pytest.fixture
def environment(monkeypatch, tmp_path):
    "What kernels started here inherit: the library of this checkout, the cache, one thread"
    monkeypatch.delenv('IN_TEST', raising=False)
    for name, value in dict(PYTHONPATH=str(ROOT), FSPN_CACHE=str(data_cache().resolve()), OMP_NUM_THREADS='1', IPYTHONDIR=str(tmp_path/'ipython')).items(): monkeypatch.setenv(name, value)


def edited(name, **values):
    "The notebook `name` with other values in its parameters cell, and without stored outputs"
    nb = notebook(name)
    for c in nb['cells']:
        if 'parameters' in c['metadata'].get('tags', []):
            text = ''.join(c['source'])
            for key, value in values.items(): text = re.sub(rf'^{key} = .*$', lambda _: f'{key} = {value!r}', text, flags=re.M)
            c['source'] = text
        if c['cell_type'] == 'code': c['outputs'] = []
    return nb


def up_to(nb, pattern):
    "`nb` as far as the first cell of code in which `pattern` occurs"
    last = next(i for i, c in enumerate(nb['cells']) if c['cell_type'] == 'code' and re.search(pattern, ''.join(c['source'])))
    return nb|dict(cells=nb['cells'][:last+1])


def test_run_all_twice_with_another_parameter(environment, tmp_path):
    "Results are those of the new parameters, and nothing red is shown (the whole notebook is run in tests/test_lab.py)"
    nb = up_to(edited('run_mtl_aqa', preset='smoke', methods='i3d_mlp', protocol='w_dd', weights='random', device='cpu', epochs=1, changes='clip.size=32', out=str(tmp_path/'out')), r'train_runs\(')
    first, second = kernel_run(nb, dict(seeds='1', epochs=2, changes='clip.size=32 train.lr=5e-4'))
    assert 'Warning' not in first+second
    assert re.search(r'i3d_mlp-w_dd-frozen-s0-\w+: rho', first) and re.search(r'i3d_mlp-w_dd-frozen-s1-\w+: rho', second) and '-s0-' not in second
    assert 'train.epochs 2 -> 1' in first and 'train.lr 0.001 -> 0.0005' in second and 'train.epochs' not in second
    runs = [load_cfg(path) for path in (tmp_path/'out').glob('*/*/config.json')]
    assert sorted((cfg.seed, cfg.train.epochs, cfg.train.lr) for cfg in runs) == [(0, 1, .001), (1, 2, .0005)]


@pytest.fixture
def shell(environment):
    "IPython in this process, with its history"
    from IPython.core.interactiveshell import InteractiveShell
    made = InteractiveShell(user_ns={'__name__': '__main__'})
    made.history_manager.enabled = False # no file
    yield made
    made.restore_sys_module_state()
    atexit.unregister(made.atexit_operations) # its folder is gone by then


def run_cells(shell, nb, **values):
    "Run the code cells of `nb` with other values in its parameters cell; the error of the first that fails, or None"
    for c in nb['cells']:
        text = ''.join(c['source'])
        if 'parameters' in c['metadata'].get('tags', []):
            for key, value in values.items(): text = re.sub(rf'^{key} = .*$', lambda _: f'{key} = {value!r}', text, flags=re.M)
        result = shell.run_cell(text, store_history=True) if c['cell_type'] == 'code' else None
        if result is not None and not result.success: return result.error_in_exec or result.error_before_exec


LATER = "datas,dive,fig,floors,kind = {},'a',None,[1],'synthetic'" # what Run All leaves behind


@pytest.mark.parametrize('name', [*KNOWN, 'report', 'tutorial_new_method', 'bench_throughput'])
def test_every_notebook_checks_its_parameters_a_second_time(name, shell, tmp_path, capsys):
    preset = dict(preset='smoke') if name not in ('score_clip', 'bench_throughput') else {}
    nb = up_to(edited(name, out=str(tmp_path), **preset), r'globals\(\)')
    check = ''.join(nb['cells'][-1]['source'])
    if name == 'bench_throughput': nb['cells'][-1]['source'] = check[:check.index('tiny = ')] # the rest measures
    if name == 'score_clip': nb['cells'][-1]['source'] = 'from fspn_nb.experiments.parameters import notebook_parameters\nfrom fspn_nb.inspect.clip_run import CLIP_PARAMETERS\nnotebook_parameters(globals(), CLIP_PARAMETERS);'
    assert run_cells(shell, nb) is None
    assert shell.run_cell(LATER, store_history=True).success
    assert run_cells(shell, nb, out=str(tmp_path/'other')) is None
    typo = dict(cell_type='code', metadata={}, source='# Parameters\nsedes = 3\n')
    assert 'unknown parameter sedes; this notebook has' in str(run_cells(shell, nb|dict(cells=[nb['cells'][0], *(c for c in nb['cells'][1:-1]), typo, nb['cells'][-1]])))
    assert run_cells(shell, nb) is None, 'the error is gone once the parameter is'


def test_papermill_with_an_unknown_parameter_stops_at_once(environment, tmp_path):
    command = [sys.executable, '-m', 'papermill', 'run_finediving.ipynb', str(tmp_path/'out.ipynb'), '-p', 'preset', 'smoke', '-p', 'out', str(tmp_path/'runs'), '-p', 'epoch', '3']
    done = subprocess.run(command, cwd=ROOT/'nbs', capture_output=True, text=True, env=os.environ.copy())
    assert done.returncode != 0 and 'unknown parameter epoch; this notebook has' in done.stderr
    assert not (tmp_path/'runs').exists()


def test_what_the_search_chose_holds_in_the_frozen_demo_alone(monkeypatch, tmp_path):
    "Factors of a method reach its runs; a rate that the user gives stays; and its runs are of one family with those of other methods"
    plain = make_config('finediving', 'demo', model__name='usdl')
    def forget(): _preset_of.cache_clear(), _family_facts.cache_clear()
    facts = lambda cfg: _family_facts(save_cfg(cfg, tmp_path/f'{run_id(cfg)}.json').read_text())
    forget()
    before = facts(method_schedule(plain))
    monkeypatch.setitem(METHODS, 'usdl', replace(METHODS['usdl'], searched=dict(lr=3., epochs=.5)))
    forget()
    cfg = method_schedule(plain)
    assert (cfg.train.lr, cfg.train.epochs) == (3*plain.train.lr, 50)
    assert method_schedule(plain, searched=False).train.epochs == 100
    assert method_schedule(override(plain, train__lr=.01)).train.lr == .01, "the user's rate"
    assert plan_runs(plain, 'usdl', 'w_dn', '0', epochs=7)[0].train == override(cfg, train__epochs=7).train
    assert config_of(plain, 'usdl', scale_epochs=False).train.epochs == plain.train.epochs
    for other in (make_config('finediving', 'smoke', model__name='usdl'), override(plain, train__backbone='finetune')): assert method_schedule(other).train.lr == other.train.lr
    own, fspn = facts(cfg), facts(method_schedule(override(plain, model__name='fspn')))
    assert own['family'] == fspn['family'] == before['family'] and own['plain'] and own['usual_epochs']
    assert facts(override(cfg, train__lr=.01))['family'] != own['family']
    forget()
