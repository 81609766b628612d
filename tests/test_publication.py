"docs/publish.py: what it trains, how a sitting ends, and how the next one goes on, on this machine or on another"
import importlib.util
import itertools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from conftest import as_trained
from fspn_nb.analysis import run_groups
from fspn_nb.analysis.compare import read_baselines
from fspn_nb.analysis.published import unpack_runs
from fspn_nb.analysis.runs import collect
from fspn_nb.config import make_config,override,run_id
from fspn_nb.experiments.jobs import Training
from fspn_nb.experiments.variants import config_of,grid_base
from fspn_nb.methods import METHODS
from fspn_nb.report.fake_runs import fake_run
from fspn_nb.report.run_index import open_index

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def publish(tmp_path, monkeypatch):
    "The script, with a folder of packed runs of its own and a checkout without changes"
    spec = importlib.util.spec_from_file_location('publish', ROOT/'docs'/'publish.py')
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    answers = {'status': '', 'rev-parse': 'a'*40, 'diff': ''}
    monkeypatch.setattr(module, 'git', lambda verb, *_: answers[verb])
    monkeypatch.setattr(module, 'PACKED', tmp_path/'packed')
    module.answers = answers
    return module


def test_every_training_can_begin(publish):
    "Each notebook knows its parameters, and each run of a method is one that its dataset allows; hours before the last would say so"
    groups = publish.planned()
    trainings = [training for group in groups for training in group]
    assert len({training.run for training in trainings}) == len(trainings) > 400, 'nothing is trained twice'
    assert not any(training.keep_weights for training in trainings)
    for training in trainings: assert (training.cfg.synthetic.n_train, training.cfg.synthetic.n_test) == publish.SIZES[training.cfg.dataset]
    methods = {dataset: {training.cfg.model.name for training in trainings if training.cfg.dataset == dataset} for dataset in publish.SIZES}
    assert {*METHODS}-{'tsa_net'} == methods['finediving']
    assert {*METHODS}-{'tsa_net', 'fspn_s', 'fspn_m'}-methods['mtl_aqa'] == {'tsa'}
    for dataset in publish.SIZES:
        for name in publish.HEADLINE.split(','):
            seeds = {training.cfg.seed for training in trainings if (training.cfg.dataset, training.cfg.model.name) == (dataset, name)}
            assert seeds == set(range(5)), (dataset, name)
    assert {extra for training in trainings for extra in training.extras} == {'watch', 'votes'}
    assert publish.SIZES == dict(finediving=(300, 300), mtl_aqa=(300, 300), aqa7=(100, 60)), 'as power.csv asks for; the guide says why'
    seeds = {}
    for training in trainings: seeds.setdefault(run_id(override(training.cfg, seed=0)), set()).add(training.cfg.seed)
    assert all(found >= {0, 1, 2} for found in seeds.values()), 'three seeds of every row'


def test_a_sitting_ends_in_time_and_the_next_one_goes_on(publish, tmp_path, capsys):
    groups = [[Training(make_config('finediving', 'smoke', model__name='i3d_mlp', seed=seed), keep_weights=False) for seed in (0, 1)]]
    assert publish.work(groups, tmp_path, 0, 1) == (2, []), 'no time: nothing is begun'
    assert publish.work(groups, tmp_path, float('inf'), 1, ['aqa7']) == (2, []), 'none of them is on AQA-7'
    assert not list(tmp_path.glob('*/*/metrics.json'))
    assert publish.work([groups[0][:1]], tmp_path, float('inf'), 1) == (0, [])
    first = (tmp_path/groups[0][0].run/'metrics.json')
    before = first.stat().st_mtime_ns
    assert publish.work(groups, tmp_path, float('inf'), 1) == (0, [])
    assert first.stat().st_mtime_ns == before and len(list(tmp_path.glob('*/*/metrics.json'))) == 2
    assert not list(tmp_path.rglob('*.pt')) and '1 of 2 trainings to do' in capsys.readouterr().out


def test_a_training_that_fails_is_named_and_the_others_go_on(publish, tmp_path):
    cfgs = [make_config('finediving', 'smoke', model__name='i3d_mlp', seed=seed) for seed in (0, 1)]
    blocked = tmp_path/'finediving'/run_id(cfgs[0])
    blocked.parent.mkdir(parents=True)
    blocked.write_text('a file where the folder should be')
    left, (problem,) = publish.work([[Training(cfg, keep_weights=False) for cfg in cfgs]], tmp_path, float('inf'), 1)
    assert left == 1 and problem.startswith(f'finediving/{blocked.name}: ') and (tmp_path/'finediving'/run_id(cfgs[1])/'metrics.json').is_file()


def test_another_machine_goes_on_from_the_packed_runs(publish, tmp_path):
    "Packed, taken over by an empty folder, packed again: the same bytes; what is there already is left alone"
    here, there = tmp_path/'here', tmp_path/'there'
    publish.begin(here)
    for seed in range(4): fake_run(here, make_config('finediving', 'demo', seed=seed), 5., watched=True, votes=True)
    publish.pack(here)
    packed = {file.name: file.read_bytes() for file in publish.PACKED.iterdir()}
    publish.answers['rev-parse'] = 'b'*40 # a commit that added the packed runs
    publish.begin(there)
    runs = collect(there)
    assert len(runs) == len(collect(here)) > 3 and not any(runs.problem)
    assert json.loads((there/'commit.json').read_text()) == dict(commit='a'*40), 'the code is named by the first one'
    changed = there/runs.run[0]/'metrics.json'
    changed.write_bytes(changed.read_bytes()+b' ')
    publish.begin(there)
    assert changed.read_bytes().endswith(b' ')
    shutil.rmtree(there)
    publish.begin(there)
    publish.pack(there)
    assert {file.name: file.read_bytes() for file in publish.PACKED.iterdir()} == packed


@pytest.mark.parametrize('kept', ['folder', 'packed'])
def test_runs_of_other_code_are_refused(publish, tmp_path, kept):
    folder = tmp_path/'runs'
    publish.begin(folder)
    if kept == 'packed':
        publish.PACKED.mkdir()
        (folder/'commit.json').rename(publish.PACKED/'commit.json')
    publish.answers.update({'rev-parse': 'b'*40, 'diff': ' fspn_nb/train.py | 2 +-'})
    with pytest.raises(SystemExit, match=r'need the code of aaaaaaaa, (?s:.*) got other code:\n fspn_nb/train.py (?s:.*)--afresh'): publish.begin(folder)
    publish.answers['diff'] = ''
    publish.begin(folder)
    publish.answers['status'] = ' M fspn_nb/train.py'
    with pytest.raises(SystemExit, match='need a checkout without changes'): publish.begin(folder)


def test_the_code_that_counts_is_there(publish):
    "A path that git does not know would compare nothing"
    for path in publish.CODE: assert (ROOT/path.removeprefix(':!')).exists(), path


def test_no_training_rests_on_code_that_may_change_meanwhile(publish, tmp_path):
    "One training of its own process loads no module that only reads finished runs"
    code = ("import sys; from pathlib import Path; from fspn_nb.config import make_config; from fspn_nb.experiments.grid import _work; "
            f"done = _work(make_config('finediving', 'smoke', model__name='core_tree', weights='random', clip__size=32), Path({str(tmp_path)!r}), 'cpu', ('votes', 'watch'), False); "
            "assert done[0] == 'trained' and not done[3], done; print(*sys.modules)")
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded, reading = done.stdout.split(), [path.replace('/', '.') for path in publish.READING]
    assert 'fspn_nb.train' in loaded and not [name for name in loaded if name.startswith(tuple(reading))]


@pytest.mark.parametrize('scale_epochs', [True, False])
def test_the_page_finds_the_cells_of_methods_with_rates_of_their_own(tmp_path, monkeypatch, scale_epochs):
    "The grid's base is read from a run of FSPN: a rate that a search chose for FSPN alone must not count as the user's rate for all"
    for name, searched in dict(fspn=dict(lr=3), i3d_mlp=dict(lr=1/3), fspn_viterbi={}, core_tree=dict(epochs=2)).items():
        monkeypatch.setitem(METHODS, name, replace(METHODS[name], searched=searched))
    monkeypatch.setattr(run_groups, '_preset_of', run_groups._preset_of.__wrapped__)
    monkeypatch.setattr(run_groups, '_family_facts', run_groups._family_facts.__wrapped__)
    base = grid_base('demo', synthetic__n_train=60, synthetic__n_test=40)
    if not scale_epochs: base = override(base, train__epochs=7)
    experiments = ['fspn', 'i3d_mlp', 'fspn_viterbi', 'core_tree', 'without_actor']
    for seed, experiment in itertools.product((0, 1), experiments): fake_run(tmp_path, config_of(base, experiment, seed, scale_epochs=scale_epochs), 5.)
    cells = open_index(tmp_path, (0, 1), n=20, tests=20, sizes=False).cells
    found = cells[(cells.protocol == 'w_dn') & cells.experiment.isin(experiments)]
    assert set(found.experiment) == set(experiments) and (found.run != '').all(), found[found.run == '']


def test_runs_from_before_a_search_are_no_seeds_of_its_rate(tmp_path, monkeypatch):
    "A search gave FSPN three times the rate: a training at the old one is another family, not a third seed"
    monkeypatch.setitem(METHODS, 'fspn', replace(METHODS['fspn'], searched=dict(lr=3)))
    monkeypatch.setattr(run_groups, '_preset_of', run_groups._preset_of.__wrapped__)
    monkeypatch.setattr(run_groups, '_family_facts', run_groups._family_facts.__wrapped__)
    base = grid_base('demo')
    for seed, experiment in itertools.product((0, 1), ('fspn', 'i3d_mlp')): fake_run(tmp_path, config_of(base, experiment, seed), 5.)
    old = fake_run(tmp_path, override(base, seed=2), 9.) # at the preset's rate
    main = run_groups.main_runs(runs := collect(tmp_path, strict=True), tmp_path)
    assert main.groupby('method').seed.agg(set).to_dict() == dict(fspn={0, 1}, i3d_mlp={0, 1}) and main.family.nunique() == 1
    assert old.name not in ' '.join(main.run) and run_groups.left_out(runs, tmp_path, main).runs.tolist() == [1]


def test_layers_of_a_dataset_are_no_other_family(tmp_path):
    "TPT's row of AQA-7 stands beside the others with the layers that it has there; with those of the other datasets it is no row"
    made = {name: as_trained('aqa7', 'demo', protocol='diving', model__name=name) for name in ('fspn', 'i3d_mlp', 'tpt')}
    for cfg in made.values(): fake_run(tmp_path, cfg, 5.)
    other = fake_run(tmp_path, override(made['tpt'], model__adapter='auto', model__standardise='auto', seed=1), 5.)
    main = run_groups.main_runs(runs := collect(tmp_path, strict=True), tmp_path)
    assert set(main.method) == set(made) and main.family.nunique() == 1 and set(main.seed) == {0}
    assert other.name not in ' '.join(main.run) and run_groups.left_out(runs, tmp_path, main).reason.tolist() == ["settings of the method that are not its preset's"]


# ---- what is published, once a publication has ended

PUBLISHED = ROOT/'reports'/'published'
ended = pytest.mark.skipif((ROOT/'reports'/'publication'/'runs.csv').is_file(), reason='a publication is under way; until its end the page shows the runs before it')


@ended
def test_all_published_runs_are_of_one_commit_and_one_precision():
    runs = pd.read_csv(PUBLISHED/'runs.csv', dtype=str)
    commits, precisions = (set(runs[f'provenance.{name}']) for name in ('environment.commit', 'inputs.precision'))
    assert len(commits) == len(precisions) == 1 and runs['provenance.weights.precision'].nunique() == 1
    page = (ROOT/'reports'/'README.md').read_text()
    assert f'one commit (`{commits.pop()}`); precision {precisions.pop()}' in page
    rows = (ROOT/'README.md').read_text().split('| date | commit |')[1].split('\n\n')[0].splitlines()[2:]
    assert {row.split('|')[-2].strip() for row in rows} == set(runs['provenance.environment.commit'])


@ended
def test_the_command_would_train_what_is_published(publish):
    "Whoever runs it anew trains the same runs, under the same names; a setting that changed since would show here"
    runs = pd.read_csv(PUBLISHED/'runs.csv', dtype=str)
    assert set(runs.dataset+'/'+runs.run) == {training.run for group in publish.planned() for training in group}


@ended
def test_every_cell_is_filled_by_three_seeds_and_the_headlines_by_five(publish):
    index = open_index(unpack_runs(PUBLISHED), (0, 1, 2), n=20, tests=20, sizes=False)
    assert not (index.runs.problem != '').any() and (index.cells.run != '').all(), index.cells[index.cells.run == '']
    for (dataset, protocol, method), own in index.main.groupby(['dataset', 'protocol', 'method']):
        assert set(own.seed) == set(range(5 if method in publish.HEADLINE else 3)), (dataset, protocol, method)
        assert set(own.n) == {publish.SIZES[dataset][1]}, (dataset, protocol, method)
    for dataset, (_, n_test) in publish.SIZES.items(): assert read_baselines(unpack_runs(PUBLISHED), dataset).n.eq(n_test).all()


@ended
def test_tpt_leaves_chance():
    "Its interval loss ends below 2.5 in every training; a guess among sixteen intervals is ln 16 = 2.77"
    log = pd.read_csv(PUBLISHED/'log.csv.gz')
    ends = log[log.run.str.contains('/tpt-')].sort_values('epoch').groupby('run').leaf.last()
    assert len(ends) >= 12 and (ends < 2.5).all(), ends[ends >= 2.5]


@ended
@pytest.mark.parametrize('protocol', ['w_dn', 'wo_dn'])
def test_tsa_is_clearly_above_the_mean_of_the_action_type(protocol):
    "The mean of a dive number's training scores needs no film; the whole interval of TSA lies above it, with and without dive numbers"
    table = pd.read_csv(ROOT/'reports'/'tables'/'table_09.csv')
    floor, = table.rho[table.method == 'no video: action-type mean']
    lowest, = table.rho_lo[(table.method == 'tsa') & (table.protocol == protocol)]
    assert lowest > floor > .2
