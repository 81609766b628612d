"The ablation grid: what it plans, what it repeats, what it survives"
import subprocess
import sys
import time

import pandas as pd
import psutil
import pytest

from fspn_nb.config import load_cfg,override,run_id
from fspn_nb.core import diff
from fspn_nb.evaluate import evaluate
from fspn_nb.experiments.grid import GRID_PARAMETERS,_work,grid_parameters,run_grid
from fspn_nb.experiments.parameters import CLUSTER_DEFAULTS
from fspn_nb.experiments.variants import TABLE_CELLS,EXPERIMENTS,cells_of,config_of,find_runs,grid_base,plan_grid
from fspn_nb.paper import paper_table
from fspn_nb.train import fit
from fspn_nb.training.prepare import prepare
from fspn_nb.zoo import list_models

QUICK = grid_base('smoke', train__epochs=1, model__stages=1)


@pytest.mark.parametrize('table', ['I', 'II', 'III', 'IV', 'V', 'VI', 'VIII'])
def test_every_printed_row_has_an_experiment_or_a_method_that_is_missing(table):
    filled = set(TABLE_CELLS.row[TABLE_CELLS.table == table])
    for r in paper_table(table).itertuples():
        assert r.label in filled or (r.method not in list_models() and not r.method.startswith('fspn')), f'{table}, {r.label}: no experiment'


def test_two_experiments_never_share_a_run():
    ids = [run_id(config_of(grid_base(), e)) for e in EXPERIMENTS]
    assert len(set(ids)) == len(ids)


def test_the_switches_of_table_i_are_those_that_the_paper_ticks():
    for r in paper_table('I').itertuples():
        if r.method == 'i3d_mlp': continue
        m = config_of(grid_base(), TABLE_CELLS.query("table == 'I' and row == @r.label").experiment.iloc[0]).model
        assert (m.use_iap, m.use_smt, m.use_mtf) == (bool(r.iap), bool(r.smt), bool(r.mtf)), r.label


def test_the_numbers_of_tables_ii_and_iii_are_those_that_the_paper_prints():
    for table, field in (('II', 'blocks'), ('III', 'heads')):
        for r in paper_table(table).itertuples():
            cfg = config_of(grid_base(), TABLE_CELLS.query('table == @table and row == @r.label').experiment.iloc[0])
            assert getattr(cfg.model, field) == getattr(r, field)
            assert set(diff(cfg, config_of(grid_base(), 'fspn'))) <= {f'model.{field}'}


def test_seeds_come_outermost():
    seeds = plan_grid(grid_base(), 'I,II', (3, 4)).seed.tolist()
    assert seeds == sorted(seeds) and set(seeds) == {3, 4}


def test_unknown_tables_and_parameters_are_named():
    with pytest.raises(ValueError, match="got 'XX'"): cells_of('XX')
    with pytest.raises(ValueError, match="''"): cells_of('')
    given = dict(tables='I', seeds='0', data_root='', preset='demo', n_train=0, n_test=0, epochs=0, backbone='auto', weights='', device='cpu', workers=0, allow_missing=False, keep_weights=False, changes='', out='',
                 **CLUSTER_DEFAULTS)
    assert set(given) == set(GRID_PARAMETERS)
    assert grid_parameters(given)['base'] == grid_base()
    assert grid_parameters(given | dict(epochs=3))['scale_epochs'] is False
    with pytest.raises(ValueError, match='seeds must be whole numbers'): grid_parameters(given | dict(seeds='0,x'))
    with pytest.raises(ValueError, match='unknown parameter tabels'): grid_parameters(given | dict(tabels='I'))


def test_cells_of_the_base_find_their_command(tmp_path):
    found = find_runs(grid_base(), tmp_path, 'II', (0, 1))
    assert (found.run == '').all() and found.command.str.contains('-p tables "II"').all() and len(found) == 8


SCRIPT = """
import sys
from fspn_nb.experiments.variants import grid_base
from fspn_nb.experiments.grid import run_grid
if __name__ == '__main__': run_grid(grid_base('smoke', train__epochs=1, model__stages=1), 'II,III', (0,), sys.argv[1], 'cpu', 2, False)
"""


def test_killed_half_way_it_repeats_nothing_that_was_finished(tmp_path):
    (tmp_path/'grid.py').write_text(SCRIPT)
    out = tmp_path/'out'
    sealed = lambda: sorted(out.glob('*/*/metrics.json'))
    p = subprocess.Popen([sys.executable, str(tmp_path/'grid.py'), str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    until = time.monotonic()+240
    while len(sealed()) < 3 and p.poll() is None and time.monotonic() < until: time.sleep(.02)
    workers = psutil.Process(p.pid).children()
    p.kill() # the main program alone
    p.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1], 'its workers end with it'
    done = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in sealed()}
    total = len(plan_grid(QUICK, 'II,III', (0,), False))
    assert 3 <= len(done) < total, f'{len(done)} of {total} were finished when it was killed: {p.stderr.read()[-2000:]}'
    table = run_grid(QUICK, 'II,III', (0,), out, 'cpu', 1, False)
    assert table.status.value_counts().to_dict() == {'there': len(done), 'trained': total-len(done)}
    for f, (at, content) in done.items(): assert (f.stat().st_mtime_ns, f.read_bytes()) == (at, content)
    assert (find_runs(QUICK, out, 'II,III', (0,), False).run != '').all()


def test_a_run_does_not_depend_on_the_number_of_workers(tmp_path):
    one, two = (run_grid(QUICK, 'V', (0,), tmp_path/str(w), 'cpu', w, False) for w in (1, 2))
    assert (one.status == 'trained').all() and (two.status == 'trained').all()
    for run in one.run:
        assert (tmp_path/'1'/run/'predictions.csv').read_bytes() == (tmp_path/'2'/run/'predictions.csv').read_bytes()


def test_a_run_of_the_grid_is_a_run_like_any_other(tmp_path):
    plan = run_grid(QUICK, 'V', (1,), tmp_path, 'cpu', 1, False, True)
    run = tmp_path/plan.run[plan.experiment == 'without_actor'].iloc[0]
    cfg = load_cfg(run/'config.json')
    assert run.name == run_id(cfg) and cfg.model.use_actor is False and cfg.seed == 1
    assert (run/'last.pt').is_file() # keep_weights
    assert set(pd.read_csv(run/'predictions.csv').split) == {'test'}
    assert override(cfg, model__use_actor=True) == override(QUICK, seed=1)


def test_a_run_of_a_notebook_gets_its_votes_and_keeps_its_weights(tmp_path):
    cfg = config_of(QUICK, 'fspn', 0, scale_epochs=False)
    data = prepare(cfg, 'cpu')
    metrics = evaluate(run := fit(cfg, tmp_path, 'cpu', data), data) # as a run notebook leaves it
    last = (run/'last.pt').read_bytes()
    for status in ('trained', 'there'):
        answer, _, rho, problem = _work(cfg, tmp_path, 'cpu', ('watch','votes'), False)
        assert answer == status and rho == metrics['spearman'] and 'was trained without watched.csv' in problem
        assert (run/'last.pt').read_bytes() == last and len(pd.read_csv(run/'votes.csv')) == metrics['n'] and not (run/'watched.csv').exists()
    table = run_grid(QUICK, 'Fig. 8', (0,), tmp_path, 'cpu', 1, False)
    assert table.status.eq('there').all() and table.problem.str.contains('delete its folder').all()


@pytest.mark.parametrize('name', ['watched.csv', 'votes.csv'])
def test_a_damaged_table_of_a_finished_run_is_made_anew(tmp_path, name):
    run = tmp_path/run_grid(QUICK, 'Fig. 8', (0,), tmp_path, 'cpu', 1, False).run[0]
    before = (run/name).read_bytes()
    (run/name).write_bytes(before.replace(b'1', b'7', 1))
    table = run_grid(QUICK, 'Fig. 8', (0,), tmp_path, 'cpu', 1, False)
    assert (table.status[0], table.problem[0]) == ('trained', '') and (run/name).read_bytes() == before


def test_a_session_trains_side_by_side_what_it_trains_one_by_one(tmp_path, monkeypatch):
    from fspn_nb.experiments import session
    def results(out, workers):
        parameters = dict(data_root='', preset='smoke', methods='i3d_mlp,fspn_s', protocol='w_dn', per_difficulty=False, seeds='0', backbone='frozen',
                          weights='', device='cpu', processes=1, epochs=0, allow_missing=False, actor='auto', actor_file='', changes='', out=str(out))
        context = session.start('finediving', parameters)
        datas = session.read_data(context)
        seconds = session.train_side_by_side(context, datas, workers)
        assert set(seconds) == (set(map(run_id, context.runs)) if workers > 1 else set())
        assert session.train_side_by_side(context, datas, workers) == {} or workers == 1, 'what is trained is left alone'
        return [(done.run/'predictions.csv').read_bytes() for done in session.train_all(context, datas).done]
    monkeypatch.setattr(session, '_MIN_VIDEOS', 1)
    assert results(tmp_path/'one', 1) == results(tmp_path/'two', 2)
