"Predictions that others published, quoted numbers, and what captions say of methods that know more than others"
import matplotlib
matplotlib.use('Agg')
import numpy as np
import pandas as pd
import pytest

from conftest import as_trained
from fspn_nb.analysis.compare import compare,compare_seeds
from fspn_nb.analysis.ledger import quoted_epochs,quoted_results
from fspn_nb.analysis.published import pack_runs,unpack_runs
from fspn_nb.analysis.runs import collect,read_predictions,read_run
from fspn_nb.config import make_config
from fspn_nb.metrics import spearman
from fspn_nb.protocols import SPORTS
from fspn_nb.report import fake_runs,released
from fspn_nb.report.build import intro
from fspn_nb.report.fake_runs import fake_run,fake_samples
from fspn_nb.report.figure_sections import epochs_section
from fspn_nb.report.released import add_cli,add_predictions,scored_videos
from fspn_nb.report.run_index import open_index
from fspn_nb.report.table_sections import cost_section,methods_section
from fspn_nb.report.writers import section_md

INDEX = dict(seeds=(0, 1), n=40, tests=200, sizes=False)
COUNTS = dict(train=2251, val=0, test=749)


@pytest.fixture
def videos(monkeypatch):
    "The invented test videos of `fake_run` in the place of those of a release"
    def read(dataset, setting, root):
        df = fake_samples(make_config(dataset, 'smoke', protocol=setting))
        return df[df.split == 'test'].drop(columns='split').reset_index(drop=True)
    monkeypatch.setattr(released, 'scored_videos', read)
    return read


def real_runs(root, miss=(('fspn', 5.), ('i3d_mlp', 9.)), seeds=(0, 1), data_root='somewhere'):
    for seed in seeds:
        for method, error in miss:
            cfg = as_trained('finediving', 'demo', protocol='w_dn', seed=seed, model__name=method, data_root=data_root)
            fake_run(root, cfg, error, counts=COUNTS if data_root else None)


def add(root, test, name='tsa', shift=7., source='a repository', dataset='finediving', setting='w_dn'):
    pred = test.true+np.random.default_rng(3).normal(0, shift, len(test))
    return add_predictions(name, dataset, setting, test.uid, pred, source, out=root, data_root='x')


def test_tsa_released_predictions_give_their_known_scores(shared, tmp_path, monkeypatch):
    pred, true = (np.load(shared('data', 'finediving', 'oracle', f'tsa_{name}.npy')) for name in ('pred', 'true'))
    root, runs = shared('data', 'finediving'), tmp_path/'runs'
    test = scored_videos('finediving', 'w_dn', root)
    monkeypatch.setattr(released, 'scored_videos', lambda *_: test) # reading it takes seconds
    folder = add_predictions('tsa', 'finediving', 'w_dn', None, pred, 'xujinglin/FineDiving', true=true, data_root=root, out=runs)
    run = read_run(folder)
    assert (run['n'], round(run['spearman'], 4), round(100*run['relative_l2'], 3)) == (749, .9212, .337)
    with pytest.raises(ValueError, match='need the true scores of the release'): # the order is proved, not believed
        add_predictions('tsa', 'finediving', 'w_dn', None, pred[::-1], 'backwards', true=true[::-1], data_root=root, out=runs)
    with pytest.raises(ValueError, match=f'one has no prediction: {test.uid[5]}; names look like'):
        add_predictions('tsa', 'finediving', 'w_dn', test.uid.drop(5), np.delete(pred, 5), 'one less', data_root=root, out=runs)
    monkeypatch.setattr(fake_runs, 'fake_samples', lambda cfg, n: test.assign(split='test'))
    real_runs(runs, miss=(('fspn', 5.), ('tsa', 7.)))
    nine = methods_section(open_index(runs, **INDEX), 'finediving')
    row = nine.table.set_index(['protocol', 'label']).loc[('w_dn', 'TSA [20], released')]
    ours = np.mean([spearman(df.pred, df.true) for df in map(read_predictions, runs.glob('finediving/fspn-*'))])
    assert (round(row.rho, 4), round(row.r_l2_x100, 3)) == (.9212, .337) and row.rho_lo < row.rho < row.rho_hi
    assert row.rho_gain == pytest.approx(row.rho-ours) and np.isnan(row.rho_p) and row.rho_p_videos < .05
    assert nine.table.rho_paper[nine.table.label == 'TSA [20]'].tolist() == [.8925, .9203] # the printed rows stay
    assert any('749 test videos (xujinglin/FineDiving)' in line and 'minus TSA [20] ' in line for line in nine.lines)


@pytest.mark.parametrize('change, reason', [
    (lambda u, p, t: (u[:-1], p[:-1], None), 'has no prediction: 01/39'),
    (lambda u, p, t: ([*u[:-1], u[0]], p, None), 'got a video twice: 01/0'),
    (lambda u, p, t: ([*u[:-1], '01/45'], p, None), 'got an unknown one: 01/45'), # a validation video is none of the test
    (lambda u, p, t: ([f'{name} ' for name in u], p, None), 'unknown one: 01/0 , 01/1 , 01/2  and 37 more'),
    (lambda u, p, t: (u, p, t+1), 'true scores of the release, got'),
    (lambda u, p, t: (u, [*p[:-1], np.inf], None), 'need a finite prediction, got none for 01/39'),
    (lambda u, p, t: (None, p, None), 'got neither'), (lambda u, p, t: (u, p[1:], None), '40 names and 39 predictions')])
def test_a_wrong_video_is_named_and_nothing_is_written(videos, tmp_path, change, reason):
    test = videos('finediving', 'w_dn', '')
    uids, pred, true = change(test.uid.tolist(), test.true.to_numpy(), test.true.to_numpy())
    with pytest.raises(ValueError, match=reason): add_predictions('tsa', 'finediving', 'w_dn', uids, pred, 's', true, out=tmp_path)
    assert not list(tmp_path.glob('*/*'))


def test_a_released_row_stands_beside_real_runs_and_survives_publishing(videos, tmp_path):
    root = tmp_path/'runs'
    real_runs(root)
    folder = add(root, videos('finediving', 'w_dn', ''))
    index = open_index(unpack_runs(pack_runs([root], tmp_path/'published')[0].parent, tmp_path/'cache'), **INDEX)
    nine = methods_section(index, 'finediving')
    row = nine.shown.set_index(['protocol', 'method']).loc[('w/ DN', 'TSA [20], released')]
    rho = read_run(folder)['spearman']
    assert row['rho ours'].startswith(f'{rho:.4f} [') and row['p (Holm)'] == '-' and 0 <= float(row['p (videos)']) <= 1
    assert 'Rows marked released' in nine.caption and 'preset' not in nine.shown and not index.hidden.runs.sum()
    assert nine.table.set_index('label').runs['TSA [20], released'] == f'finediving/{folder.name}'
    assert 'released' not in nine.caption.split('Rows marked')[0] # presets and seeds of the caption are those of the runs


@pytest.mark.parametrize('data_root', ['', 'somewhere'])
def test_a_synthetic_page_never_shows_released_rows(videos, tmp_path, data_root):
    real_runs(tmp_path, data_root=data_root)
    for name in ('tsa', 'usdl'): add(tmp_path, videos('finediving', 'w_dn', ''), name)
    index = open_index(tmp_path, **INDEX)
    nine = methods_section(index, 'finediving')
    page = section_md(nine)+intro(index)
    assert (', released' in page, nine.table.label.str.contains('released').sum()) == ((True, 2) if data_root else (False, 0))
    assert index.hidden.reason.tolist() == ([] if data_root else ['released predictions, which stand only beside runs on real data'])
    assert 'Finished runs: 4 on' in page # released sets are no runs of ours


def test_without_any_run_the_released_row_stands_alone(videos, tmp_path):
    add(tmp_path, videos('finediving', 'w_dn', ''))
    nine = methods_section(open_index(tmp_path, **INDEX), 'finediving')
    assert nine.table.rho[nine.table.label == 'TSA [20], released'].notna().all() and 'nothing beside it' in nine.lines[-1]


def test_a_set_with_more_videos_is_compared_on_the_shared_ones(videos, tmp_path, monkeypatch):
    test = videos('finediving', 'w_dn', '')
    folder = add(tmp_path, test)
    monkeypatch.setattr(fake_runs, 'fake_samples', lambda cfg, n: test[:30].assign(split='test'))
    real_runs(tmp_path)
    nine = methods_section(open_index(tmp_path, **INDEX), 'finediving')
    assert any('on 30 test videos' in line and '40 test videos (a repository)' in line for line in nine.lines)
    fspn = sorted(tmp_path.glob('finediving/fspn-*'))
    with pytest.raises(ValueError, match='need runs on the same test videos'): compare(folder, fspn)
    assert compare(folder, fspn, n=40, tests=40, shared=True).n.tolist() == [30, 30]


def test_sets_of_other_videos_are_not_compared_and_it_is_said(videos, tmp_path):
    folder = add(tmp_path, videos('finediving', 'w_dn', ''))
    real_runs(tmp_path, seeds=(0,))
    frame = pd.read_csv(folder/'predictions.csv', dtype=dict(uid=str))
    (folder/'checksums.json').unlink()
    frame.assign(uid='other/'+frame.uid).to_csv(folder/'predictions.csv', index=False)
    lines = methods_section(open_index(tmp_path, **INDEX), 'finediving').lines
    assert any('not compared (need runs that share a test video' in line for line in lines)


def test_two_sets_of_one_method_are_two_rows(videos, tmp_path):
    real_runs(tmp_path)
    for source in ('one', 'two'): add(tmp_path, videos('finediving', 'w_dn', ''), source=source, shift=len(source))
    table = methods_section(open_index(tmp_path, **INDEX), 'finediving').table
    assert table.label[table.rho.notna() & table.label.str.contains('released')].tolist() == ['TSA [20], released 1', 'TSA [20], released 2']


def test_two_sets_are_compared_with_each_other_once(videos, tmp_path):
    folders = [add(tmp_path, videos('finediving', 'w_dn', ''), name, shift) for name, shift in (('core_tree', 12.), ('tsa', 3.))]
    lines = methods_section(open_index(tmp_path, **INDEX), 'finediving').lines
    between = compare(*folders).set_index('metric').loc['rho']
    words = f'CoRe [38], released, 40 test videos (a repository). In rho: minus TSA [20], released {between.difference:+.4f} on 40 test videos'
    assert sum(words in line for line in lines) == sum('minus TSA' in line for line in lines) == 1
    assert not any('minus CoRe' in line for line in lines)


def test_a_released_set_of_six_classes_has_an_average(videos, tmp_path):
    for sport in SPORTS: add(tmp_path, videos('aqa7', sport, ''), 'tsa_net', 4., dataset='aqa7', setting=sport)
    ten = methods_section(open_index(tmp_path, **INDEX), 'aqa7')
    assert 'TSA-Net [9], released' in ten.shown.method.tolist() and len(ten.sources) == 6
    row = ten.table[(ten.table.protocol == 'average') & (ten.table.label == 'TSA-Net [9], released')]
    assert row.rho.notna().all() and len(row) == 1


def test_the_command_names_what_is_wrong(videos, tmp_path, capsys):
    test = videos('mtl_aqa', 'w_dd', '')
    test.assign(pred=test.true+1)[['uid', 'pred']].to_csv(tmp_path/'p.csv', index=False)
    command = [str(tmp_path/'p.csv'), *'--method hgcn --dataset mtl_aqa --setting w_dd --source s --data-root x --out'.split(), str(tmp_path/'runs')]
    add_cli(command)
    assert '40 test videos, rho 1.0000' in capsys.readouterr().out and len(collect(tmp_path/'runs', strict=True)) == 1
    test[['uid']].to_csv(tmp_path/'p.csv', index=False)
    with pytest.raises(SystemExit): add_cli(command)
    assert 'need columns uid and pred, got uid' in capsys.readouterr().err
    with pytest.raises(SystemExit, match='fspn_add: '): add_cli([str(tmp_path/'none.csv'), *command[1:]])


def test_unequal_numbers_of_seeds_compare_means():
    rng = np.random.default_rng(0)
    true = rng.normal(60, 15, 60)
    a, b = true+rng.normal(0, 5, (3, 60)), true+rng.normal(0, 9, (2, 60))
    tested = compare_seeds(a, b, true, tests=500)
    mean = lambda preds: np.mean([spearman(p, true) for p in preds])
    assert tested['rho_gain'] == pytest.approx(mean(a)-mean(b)) and 0 < tested['rho_p'] < 1 and tested['rho_p_videos'] < .05
    assert compare_seeds(b, a, true, tests=500)['rho_p'] == pytest.approx(tested['rho_p'])


def test_quoted_epochs_stand_beside_ours(tmp_path):
    worth = quoted_epochs().set_index(['rho_test', 'rho_last']).worth_rho
    assert worth[(.9624, .9615)] == .0009 and worth[(.8087, .7748)] == .0339
    bare = epochs_section(open_index(tmp_path, **INDEX))
    assert len(bare.shown) == len(worth) and bare.caption.startswith('No finished run') and bare.shown.method.str.endswith('(quoted)').all()
    fake_run(tmp_path, make_config('finediving', 'smoke', model__name='fspn'), 5., watched=True)
    both = epochs_section(open_index(tmp_path, **INDEX))
    assert len(both.shown) == len(worth)+1 and both.table.source[0] == '' and both.shown.seeds[0] == '0'
    assert 'Rows marked quoted: real data' in both.caption and any(line.startswith('Quoted from 9 public logs') for line in both.lines)


def test_newer_results_say_where_they_are_from_and_which_are_contested():
    table = quoted_results()
    row = table.set_index(['dataset', 'label', 'rho'])
    assert row.r_l2_x100[('finediving', 'Uni-FineParser', .9501)] == .2294
    assert row.r_l2_x100[('mtl_aqa', 'Uni-FineParser', .9622)] == .2299 and row.r_l2_x100[('mtl_aqa', 'RICA2', .9624)] == .2176
    assert row.contested[('mtl_aqa', 'T2CR or SAP-Net', .9638)] and table.source.ne('').all()
    assert not table.label.str.contains('FSPN').any() # the paper's rows are elsewhere


def test_captions_say_who_is_given_the_difficulty_what_is_held_back_and_what_p_is_adjusted_for(tmp_path):
    for protocol in ('wo_dd', 'w_dd'):
        for method in ('fspn', 'musdl', 'usdl'): fake_run(tmp_path, make_config('mtl_aqa', 'smoke', protocol=protocol, model__name=method), 6.)
    index = open_index(tmp_path, **INDEX)
    eleven, seven = methods_section(index, 'mtl_aqa'), cost_section(index)
    note = "In w/o DD MUSDL [5] is given each test dive's true difficulty, as in its released program; the other methods are not."
    assert note in eleven.caption and eleven.lines.count(note) == 1 and note not in seven.caption # all are given it w/ DD
    assert '6 % of the training dives are held back for a validation that selects nothing: the last epoch counts.' in eleven.caption
    assert 'adjusted (Holm) for the methods of its block' in eleven.caption and 'rows of the table' not in eleven.caption
    assert 'adjusted (Holm) for the rows of the table' in seven.caption
