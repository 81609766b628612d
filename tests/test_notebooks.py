"How the notebooks are built: opening, size, imports that point backwards, parameters that papermill can reach"
import ast
import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT/'nbs').glob('*.ipynb'))
LIBRARY = [p for p in NOTEBOOKS if re.match(r'\d\d_', p.name)]
RUNS = [p for p in NOTEBOOKS if p.name.startswith('run_')]
PARAMETERS = {'data_root','preset','methods','seeds','backbone','weights','device','processes','epochs','allow_missing','actor','actor_file','out'}


def cells(path, kind='code'):
    "Sources of the cells of one kind"
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def exported(path):
    "Sources of the exported cells"
    return [c for c in cells(path) if re.search(r'^#\| *export', c, re.M)]


def module_of(path):
    "Name after default_exp"
    return re.search(r'#\| default_exp (\S+)', cells(path)[0])[1]


def test_there_are_notebooks():
    assert len(LIBRARY) >= 25 and RUNS


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_opening(path):
    first = json.loads(path.read_text())['cells'][:2]
    assert ''.join(first[0]['source']).startswith('#| default_exp ')
    text = ''.join(first[1]['source'])
    assert re.match(r'# .+\n\n> .+', text), 'an H1, then a one-line blockquote'
    for label in ('**In:**','**Out:**','**Paper:**','**Next:**'): assert label in text, f'{label} is missing'


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_cells_are_small(path):
    sizes = [sum(bool(line.strip()) for line in c.splitlines()) for c in exported(path)]
    assert max(sizes) <= 60
    assert len(json.loads(path.read_text())['cells']) <= 75


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_public_names_are_documented(path):
    for c in exported(path):
        for node in ast.parse(c).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
                assert ast.get_docstring(node), f'{node.name} has no docstring'
                assert '\n' not in ast.get_docstring(node), f'{node.name}: one line, the rest is prose'


def test_one_notebook_per_module():
    names = [module_of(p) for p in LIBRARY]
    assert len(set(names)) == len(names)


def test_imports_point_backwards():
    number = {'fspn_nb.'+module_of(p): p.name for p in LIBRARY}
    for path in LIBRARY:
        for c in exported(path):
            for node in ast.walk(ast.parse(c)):
                if isinstance(node, ast.ImportFrom):
                    assert all(a.name != '*' for a in node.names), f'{path.name}: import *'
                    if node.module and node.module.startswith('fspn_nb.'):
                        modules = [node.module] if node.module in number else [f'{node.module}.{a.name}' for a in node.names]
                        for m in modules: assert number[m] < path.name, f'{path.name} imports {m} from {number[m]}'


def test_library_needs_no_notebook_tools():
    for path in LIBRARY:
        for c in exported(path):
            for node in ast.walk(ast.parse(c)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ''] if isinstance(node, ast.ImportFrom) else []
                assert not [n for n in names if n.split('.')[0] in ('nbdev','fastcore','papermill','nbformat','IPython')], f'{path.name}: {names}'


def test_data_and_models_do_not_know_each_other():
    for path in LIBRARY:
        layer = module_of(path).split('.')[0]
        other = dict(data='fspn_nb.models', models='fspn_nb.batches.sources').get(layer)
        if other: assert other not in '\n'.join(exported(path)), f'{path.name} imports {other}'


@pytest.mark.parametrize('path', RUNS, ids=lambda p: p.stem)
def test_parameters_survive(path):
    import papermill as pm
    from fspn_nb.experiments.grid import KNOWN
    from fspn_nb.experiments.session import OWN,PARAMETERS as known
    name = path.stem.removeprefix('run_')
    wanted = set(KNOWN) if name == 'ablations' else PARAMETERS|set(OWN[name])
    assert set(pm.inspect_notebook(path)) == wanted, 'the tag is gone, or a parameter is'
    assert set(known) == PARAMETERS
    nb = json.loads(path.read_text())
    tagged = [c for c in nb['cells'] if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1
    for line in ast.parse(''.join(tagged[0]['source'])).body:
        assert isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant), 'literals only: papermill replaces names, not what was computed from them'
    assert all('#' in line for line in ''.join(tagged[0]['source']).splitlines() if '=' in line), 'each parameter carries a comment'


def test_run_notebooks_have_no_cell_in_common():
    "What two of them would share belongs in the library; a line that calls it may look alike"
    seen = {}
    for path in RUNS:
        for c in cells(path):
            if sum(bool(o.strip()) for o in c.splitlines()) <= 4 or '# folder' in c or 'import' in c: continue
            assert c not in seen, f'{path.name} repeats a cell of {seen[c]}: {c[:80]}'
            seen[c] = path.name


@pytest.mark.parametrize('path', RUNS, ids=lambda p: p.stem)
def test_run_notebooks_are_stored_without_outputs(path):
    assert not any(c.get('outputs') for c in json.loads(path.read_text())['cells'])


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_portable(path):
    for c in json.loads(path.read_text())['cells']:
        text = json.dumps([{k: v for k,v in o.get('data', {}).items() if not k.startswith('image/')} or o.get('text') for o in c.get('outputs', [])])
        assert not re.search(r'/(home|root|work|tmp|Users)/', text), f'{path.name}: a machine path in an output: {text[:200]}'
        assert not any(o['output_type'] == 'error' for o in c.get('outputs', []))


def test_environment_file_adds_no_pin():
    env = yaml.safe_load((ROOT/'environment.yml').read_text())
    pip = next(d for d in env['dependencies'] if isinstance(d, dict))['pip']
    assert '-e .[dev]' in pip
    assert not [d for d in env['dependencies'] if isinstance(d, str) and '=' in d and not d.startswith('python=')]


def test_clean_keeps_tags():
    assert re.search(r'^allowed_cell_metadata_keys *= *tags', (ROOT/'settings.ini').read_text(), re.M)
