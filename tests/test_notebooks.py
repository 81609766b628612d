"How the notebooks are built: opening, size, imports that point backwards, parameters that papermill can reach"
import ast
import io
import json
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT/'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts and 'runs' not in p.parts)
LIBRARY = [p for p in NOTEBOOKS if p.parent != NBS]
RUNS = [p for p in NOTEBOOKS if p.name.startswith('run_')]
PARAMETERS = {'data_root','preset','methods','seeds','backbone','weights','device','processes','epochs','allow_missing','actor','actor_file','changes','out',
              'cluster','partition','jobs','job_minutes','sbatch'}
# Area -> areas that it may import. `base` is split in three: what everything stands on, the zoo of methods, and the two commands
BELOW = {'base':(), 'data':('base',), 'synthetic':('base','data'), 'actor':('base','data')}
BELOW['models'] = ('base','data') # of data only the unpickler for checkpoints and the cutting of clips
BELOW['peers'] = (*BELOW['models'],'models')
BELOW['zoo'] = (*BELOW['peers'],'peers')
BELOW['batches'] = ('base','data','synthetic','actor')
BELOW['training'] = (*BELOW['batches'],'models','peers','zoo','batches')
BELOW['commands'] = (*BELOW['training'],'training')
BELOW['analysis'] = BELOW['commands']
BELOW['experiments'] = (*BELOW['analysis'],'analysis','commands')
BELOW['report'] = (*BELOW['experiments'],'experiments')
BELOW['inspect'] = (*BELOW['report'],'report')
BELOW['share'] = (*BELOW['inspect'],'inspect')


@cache # tests of one notebook read all the others
def cells(path, kind='code'):
    "Sources of the cells of one kind"
    return [''.join(c['source']) for c in json.loads(path.read_text())['cells'] if c['cell_type'] == kind]


def exported(path):
    "Sources of the exported cells"
    return [c for c in cells(path) if re.search(r'^#\| *export', c, re.M)]


@cache
def module_of(path):
    "Name after default_exp"
    return re.search(r'#\| default_exp (\S+)', cells(path)[0])[1]


def test_there_are_notebooks():
    assert len(LIBRARY) >= 90 and len(RUNS) == 4


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
    assert max(sizes) <= 45
    assert len(json.loads(path.read_text())['cells']) <= 75


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_public_names_are_documented(path):
    for c in exported(path):
        for node in ast.parse(c).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_'):
                assert ast.get_docstring(node), f'{node.name} has no docstring'
                assert '\n' not in ast.get_docstring(node), f'{node.name}: one line, the rest is prose'


def area_of(module):
    "Area of a module's dotted name without `fspn_nb.`"
    if '.' in module: return module.split('.')[0]
    return {'zoo':'zoo', 'train':'commands', 'evaluate':'commands'}.get(module, 'base')


def imported_modules(path):
    "(module, names) of every import of our own in exported cells; names of modules are resolved"
    known = {module_of(p) for p in LIBRARY}
    for c in exported(path):
        for node in ast.walk(ast.parse(c)):
            if not isinstance(node, ast.ImportFrom) or not (node.module or '').split('.')[0] == 'fspn_nb': continue
            assert all(a.name != '*' for a in node.names), f'{path.name}: import *'
            module = node.module.removeprefix('fspn_nb').lstrip('.')
            if module in known: yield module, [a.name for a in node.names]
            else: yield from ((f'{module}.{a.name}'.lstrip('.'), []) for a in node.names)


def test_the_folder_of_notebooks_fits_on_a_screen():
    assert len([p for p in NOTEBOOKS if p.parent == NBS]) <= 12
    folders = {p.parent.name for p in LIBRARY}
    assert folders == {'base', *(a for a in BELOW if a not in ('zoo','commands'))}
    for folder in folders:
        numbers = sorted(int(p.name[:2]) for p in LIBRARY if p.parent.name == folder)
        assert numbers == list(range(1, len(numbers)+1)), f'{folder}: {numbers}'
        assert len(numbers) <= 15, f'{folder} has {len(numbers)} modules'


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_notebook_exports_the_module_of_its_name(path):
    folder = '' if path.parent.name == 'base' else path.parent.name+'.'
    assert module_of(path) == folder+path.stem[3:]


def test_modules_are_short_and_have_a_name_of_their_own():
    modules = [p for p in (ROOT/'fspn_nb').rglob('*.py') if not p.name.startswith('_')]
    names = [p.stem for p in modules]
    assert sorted(names) == sorted(p.stem[3:] for p in LIBRARY), 'a module without a notebook, or the other way round'
    assert len(set(names)) == len(names), sorted(n for n in set(names) if names.count(n) > 1)
    long = {p.name: n for p in modules if (n := len(p.read_text().splitlines())) > 250}
    assert not long, long


def test_a_public_name_stands_in_one_module():
    places = {}
    for path in LIBRARY:
        for c in exported(path):
            for node in ast.parse(c).body:
                named = [node.name] if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else []
                if isinstance(node, ast.Assign): named = [n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)]
                for name in named:
                    if not name.startswith('_'): places.setdefault(name, set()).add(module_of(path))
    twice = {k: sorted(v) for k, v in places.items() if len(v) > 1}
    assert not twice, twice


def test_lines_are_short():
    lines = [(p.name, len(line)) for p in (ROOT/'fspn_nb').rglob('*.py') if p.name != '_modidx.py'
             for line in p.read_text().splitlines()]
    assert sum(n > 140 for _, n in lines) <= 60
    assert not [item for item in lines if item[1] > 160]


@pytest.mark.parametrize('path', LIBRARY, ids=lambda p: p.stem)
def test_imports_point_down(path):
    number = {module_of(p): p.name for p in LIBRARY}
    own = module_of(path)
    for module, names in imported_modules(path):
        if area_of(module) == area_of(own): assert number[module] < path.name, f'{path.name} imports {module} from {number[module]}'
        else: assert area_of(module) in BELOW[area_of(own)], f'{area_of(own)} must not import {module}'
        private = [n for n in names if n.startswith('_') and area_of(module) != area_of(own)]
        assert not private, f'{path.name} imports {private} of another area'


def links(path):
    "(label, target) of every relative link in prose"
    for c in cells(path, 'markdown'):
        for label, target in re.findall(r'(?<!!)\[([^\]]*)\]\(([^)\s]+)\)', c):
            if not re.match(r'[a-z]+:|#', target): yield label, target.split('#')[0]


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_links_lead_somewhere(path):
    for label, target in links(path):
        assert (path.parent/target).resolve().exists(), f'{path.name}: [{label}]({target}) is not there'


def test_next_leads_through_the_whole_library():
    after = {}
    for path in LIBRARY:
        found = [re.findall(r'\*\*Next:\*\* \[[^\]]*\]\(([^)]+)\)', c) for c in cells(path, 'markdown')]
        targets = {(path.parent/t).resolve() for item in found for t in item}
        assert len(targets) == 1, f'{path.name}: Next is {targets}'
        after[path.resolve()] = targets.pop()
    reached = set(after.values())
    missing = {p.name for p in LIBRARY if p.resolve() not in reached}-{'01_core.ipynb'}
    assert not missing, f'no Next leads to {sorted(missing)}'
    start = [t for _, t in links(NBS/'index.ipynb')]
    assert 'base/01_core.ipynb' in start, 'index names the first notebook'


# Names that nobody but us understood, and what they are called now
STRANGE = {
    'Crew':'DistributedContext', 'crew':'dist', 'enlist':'init_distributed', 'lead_first':'main_process_first', 'any_of':'any_rank',
    'put_own':'all_gather_with_grad', 'gather_rows':'all_gather', 'join_gradients':'all_reduce_gradients', 'Pace':'CheckpointTimer',
    'noted_sigterm':'sigterm_flag', 'need_room':'check_disk_space', 'former_of':'backup_path', 'whole_batch':'extract_and_gather',
    'plan_steps':'batch_sampler', 'Prepared':'RunData', 'substitutes':'deviations', 'frozen_encoder':'feature_extractor',
    'counter_rng':'rng_for', 'keep_memory':'tune_malloc', 'recipe':'make_config', 'READS':'EXTRA_INPUTS', 'PATIENCE':'EPOCH_MULTIPLIER',
    'Setting':'ProtocolVariant', 'setting_of':'protocol_variant', 'Parser':'SubActionEncoder', 'Judge':'ScoreRegressor',
    'floor_predictions':'baseline_predictions', 'representatives':'key_frames', 'band_tokens':'pooled_tokens', 'Mixed':'InceptionBlock',
    'to_input':'normalize_clip', 'Contrast':'PairwiseRegressor', 'read_difference':'decode_difference', 'scale_end':'score_range',
    'pair_vector':'concat_pair', 'pair_input':'concat_pair', 'read_cuts':'predict_transitions', 'cut_loss':'transition_loss',
    'StepReader':'StepPooling', 'StepContrast':'StepDecoder', 'order_losses':'ranking_losses', 'order_hinge':'ranking_hinge',
    'ScoreSpread':'GaussianHead', 'hears':'adjacency', 'their_key':'map_key', 'axis_of':'frame_indices', 'move_window':'shift_window',
    'Targets':'Labels', 'square_shares':'normalized_boxes', 'boxes_of':'load_actor_boxes', 'ClipSource':'ClipDataset',
    'FeatureSource':'FeatureDataset', 'StoreSource':'CachedDataset', 'Pools':'CandidateSets', 'orphans':'no_candidate',
    'plan_epoch':'sample_pairs', 'plan_in_batch':'sample_pairs_in_batch', 'draw_view':'sample_augmentation', 'pick_place':'choose_backend',
    'tap_weights':'resampling_weights', 'look_at':'check_image', 'BEYOND':'EXTRA_ABLATIONS', 'CELLS':'TABLE_CELLS',
    'vote_table':'exemplar_sweep', 'sound_cuts':'valid_transitions', 'landscape':'constant_iou_grid', 'Shelf':'RunIndex',
    'Opinion':'ClipResult', 'made_up_run':'fake_run', 'Watcher':'HeatSource', 'Watched':'HeatResults', 'Encoded':'EncoderOutput, EncodedSet',
    'Session':'RunContext', 'Done':'RunResult', 'Place':'MapGeometry', 'voters':'sample_exemplars', 'partners':'exemplar_index',
    'Unit':'LabelTransform, Unit3D', 'Chapter':'ReportSection', 'Fusion':'FusionModule', 'FIELD':'MEAN_TRANSITIONS', 'PEERS':'BASELINES',
    'begin':'on_train_start', 'change':'override', 'synth':'synthetic', 'event':'rng_key', 'fetch':'get_batch', 'floors':'no-video baselines',
    'former':'backup', 'halve':'max_pool_pairs', 'hold':'load_to_memory', 'long_rows':'reshape_rows', 'repeated':'repeat_channels',
    'micro':'micro_batch', 'move_by':'offset', 'noted':'collect_errors', 'picking':'epoch_selection', 'pin':'pin_memory',
    'roles':'split_query_memory', 'setting':'protocol', 'substitutes':'deviations', 'suppress':'nms',
    'taught':'teacher_forcing', 'when':'pos_embed', 'see':'extract_maps', 'due':'is_due', 'writing':'time_write', 'like':'reuse',
    'epoch_rule':'checkpoint_selection', 'val_share':'val_fraction', 'said':'message(s)', 'o':'sample, row, cfg ...'}


def identifiers(text):
    "Names in a piece of code, whatever they stand for"
    plain = re.sub(r'^(\s*)[%!].*$', r'\1pass', text, flags=re.M)
    return {t.string for t in tokenize.generate_tokens(io.StringIO(plain).readline) if t.type == tokenize.NAME}


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_names_are_those_of_the_field(path):
    strange = {n: STRANGE[n] for c in cells(path) for n in identifiers(c)&set(STRANGE)}
    assert not strange, f'{path.name}: {strange}'


def test_library_needs_no_notebook_tools():
    for path in LIBRARY:
        for c in exported(path):
            for node in ast.walk(ast.parse(c)):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module or ''] if isinstance(node, ast.ImportFrom) else []
                assert not [n for n in names if n.split('.')[0] in ('nbdev','fastcore','papermill','nbformat','IPython')], f'{path.name}: {names}'


def test_no_notebook_turns_warnings_of_the_next_one_into_errors():
    "nbdev_test runs notebooks one after the other in a process: a filter that stays is a failure of whichever comes next"
    def _raises(node): # filterwarnings('error', ...) or simplefilter('error', ...)
        name = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        return name in ('filterwarnings','simplefilter') and node.args and getattr(node.args[0], 'value', '') == 'error'
    for path in [*LIBRARY,*RUNS]:
        for c in cells(path):
            tree = ast.parse(c)
            inside = {id(call) for node in ast.walk(tree) if isinstance(node, ast.With) for call in ast.walk(node)}
            stays = [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Call) and _raises(node) and id(node) not in inside]
            assert not stays, f'{path.name}: put it under "with warnings.catch_warnings()": {c.splitlines()[stays[0]-1]}'


@pytest.mark.parametrize('path', RUNS, ids=lambda p: p.stem)
def test_parameters_survive(path):
    import papermill as pm
    from fspn_nb.experiments.grid import GRID_PARAMETERS
    from fspn_nb.experiments.session import DATASET_PARAMETERS,RUN_PARAMETERS
    name = path.stem.removeprefix('run_')
    wanted = set(GRID_PARAMETERS) if name == 'ablations' else PARAMETERS|set(DATASET_PARAMETERS[name])
    assert set(pm.inspect_notebook(path)) == wanted, 'the tag is gone, or a parameter is'
    assert set(RUN_PARAMETERS) == PARAMETERS
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
            if sum(bool(line.strip()) for line in c.splitlines()) <= 4 or '# folder' in c or 'import' in c: continue
            assert c not in seen, f'{path.name} repeats a cell of {seen[c]}: {c[:80]}'
            seen[c] = path.name


@pytest.mark.parametrize('path', RUNS, ids=lambda p: p.stem)
def test_run_notebooks_are_stored_without_outputs(path):
    assert not any(c.get('outputs') for c in json.loads(path.read_text())['cells'])


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_outputs_are_portable(path):
    for c in json.loads(path.read_text())['cells']:
        text = json.dumps([{k: v for k,v in entry.get('data', {}).items() if not k.startswith('image/')} or entry.get('text') for entry in c.get('outputs', [])])
        assert not re.search(r'/(home|root|work|tmp|Users)/', text), f'{path.name}: a machine path in an output: {text[:200]}'
        assert not any(item['output_type'] == 'error' for item in c.get('outputs', []))


def test_environment_file_adds_no_pin():
    env = yaml.safe_load((ROOT/'environment.yml').read_text())
    pip = next(d for d in env['dependencies'] if isinstance(d, dict))['pip']
    assert '-e .[dev]' in pip
    assert not [d for d in env['dependencies'] if isinstance(d, str) and '=' in d and not d.startswith('python=')]


def test_clean_keeps_tags():
    assert re.search(r'^allowed_cell_metadata_keys *= *tags', (ROOT/'settings.ini').read_text(), re.M)


EXECUTED = sorted((ROOT/'reports'/'notebooks').glob('*.ipynb'))


def test_executed_copies_are_there():
    assert {p.stem for p in EXECUTED} == {'run_finediving','run_mtl_aqa','run_aqa7','report','score_clip'}


@pytest.mark.parametrize('path', EXECUTED, ids=lambda p: p.stem)
def test_executed_copies_show_results_of_the_source(path):
    "Outputs of the notebook as it is in nbs/, small enough to be rendered, without paths of a machine"
    assert path.stat().st_size < 1e6
    own = [''.join(c['source']) for c in json.loads(path.read_text())['cells']
           if c['cell_type'] == 'code' and 'injected-parameters' not in c['metadata'].get('tags', [])]
    assert own == cells(NBS/path.name), 'the source has changed: make notebooks'
    text = path.read_text()
    assert not re.search(r'/(home|root|work|tmp|Users)/', text)
    outputs = [o for c in json.loads(text)['cells'] for o in c.get('outputs', [])]
    assert any('image/png' in o.get('data', {}) for o in outputs) and not any(o['output_type'] == 'error' for o in outputs)
