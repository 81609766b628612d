"Reports from run folders: sound ones, damaged ones, and the same bytes every time"
import json
import shutil
from functools import cache

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from fspn_nb.analysis import runs
from fspn_nb.analysis.runs import average_seeds,collect,read_predictions,read_run
from fspn_nb.core import write_json
from fspn_nb.metrics import score_baselines,summarise
from fspn_nb.report import figures,tables
from fspn_nb.report.figures import plot_cs,plot_parse,plot_scatter,plot_table,save_figure
from fspn_nb.report.tables import caption,ours_vs_paper,predictions_by_method,readable,save_table,to_md


def sheet(n=40):
    rng = np.random.default_rng(5)
    kind = rng.integers(0, 5, n)
    dd = 2+.3*kind
    return pd.DataFrame(dict(uid=[f'01/{i}' for i in range(n)], true=dd*rng.normal(22, 3, n), difficulty=dd, action=[f'{k}b' for k in kind]))


@cache
def fake_predictions(seed, miss):
    "Rows of a run that misses by `miss` points, and its scores"
    df = sheet().assign(split='test', seed=seed)
    df['pred'] = df.true+np.random.default_rng([seed, int(miss)]).normal(0, miss, len(df))
    return df, summarise(df.pred, df.true, n=60)


def make_run(root, method='fspn', protocol='w_dn', seed=0, miss=6., name=None, cfg=(), **changes):
    df, scores = fake_predictions(seed, miss)
    folder = root/'finediving'/(name or f'{method}_{protocol}_s{seed}')
    meta = dict(method=method, protocol=protocol, seed=seed, mode='frozen', data='synthetic', checkpoint_selection='last', weights='rgb_scratch', preset='smoke', label='points')
    write_json(folder/'metrics.json', scores|meta|changes)
    write_json(folder/'config.json', dict(seed=seed, protocol=protocol, model=dict(name=method))|dict(cfg))
    write_json(folder/'provenance.json', {})
    val = df[:4].assign(split='val')
    pd.concat([df, val]).to_csv(folder/'predictions.csv', index=False)
    return folder


@pytest.fixture(scope='module')
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp('reports')
    for method, miss in (('i3d_mlp', 9.), ('fspn', 5.)):
        for protocol in ('wo_dn', 'w_dn'):
            for seed in (0, 1): make_run(root, method, protocol, seed, miss)
    return root


@pytest.fixture
def folder(good, tmp_path):
    shutil.copytree(good/'finediving'/'fspn_w_dn_s0', tmp_path/'finediving'/'run')
    return tmp_path/'finediving'/'run'


def test_collect_reads_every_run(good):
    runs = collect(good, strict=True)
    assert len(runs) == 8 and (runs.problem == '').all() and runs.run.is_monotonic_increasing
    assert (runs.n == 40).all() and runs.config.nunique() == 2


def edit(file, **changes):
    def damage(folder):
        value = json.loads((folder/file).read_text())|changes
        (folder/file).write_text(json.dumps({k: v for k, v in value.items() if v != 'drop'}))
    return damage


def rewrite(f):
    return lambda folder: f(pd.read_csv(folder/'predictions.csv')).to_csv(folder/'predictions.csv', index=False)


DAMAGE = {
    'no metrics': (lambda d: (d/'metrics.json').unlink(), 'metrics.json is missing'),
    'no config': (lambda d: (d/'config.json').unlink(), 'config.json is missing'),
    'no provenance': (lambda d: (d/'provenance.json').unlink(), 'provenance.json is missing'),
    'no predictions': (lambda d: (d/'predictions.csv').unlink(), 'predictions.csv is missing'),
    'cut off': (lambda d: (d/'metrics.json').write_text('{"spearman": 0.9'), 'metrics.json is not JSON'),
    'binary': (lambda d: (d/'config.json').write_bytes(b'\xff\xfe\x00'), 'config.json is not JSON'),
    'a list': (lambda d: (d/'metrics.json').write_text('[1]'), 'must hold a dictionary, got a list'),
    'no spearman': (edit('metrics.json', spearman='drop'), 'metrics.json lacks spearman'),
    'words': (edit('metrics.json', relative_l2='small'), 'something else than numbers'),
    'typed rho': (edit('metrics.json', spearman=.99), 'metrics.json has spearman 0.99000'),
    'typed error': (edit('metrics.json', relative_l2=.001), 'metrics.json has relative_l2 0.00100'),
    'other n': (edit('metrics.json', n=749), 'counts 749 dives, predictions.csv has 40'),
    'empty csv': (lambda d: (d/'predictions.csv').write_text(''), 'predictions.csv cannot be read'),
    'no column': (rewrite(lambda df: df.drop(columns='difficulty')), 'lacks the columns difficulty'),
    'twice': (rewrite(lambda df: pd.concat([df, df[:1]])), 'has 01/0 twice'),
    'nan': (rewrite(lambda df: df.assign(pred=df.pred.where(df.index != 3))), 'needs finite scores'),
    'text score': (rewrite(lambda df: df.assign(pred=df.pred.astype(str).where(df.index != 3, 'high'))), 'needs finite scores'),
    'no test': (rewrite(lambda df: df[df.split == 'val']), '0 rows'),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_runs_are_named_not_skipped(folder, kind):
    damage, word = DAMAGE[kind]
    make_run(folder.parent.parent, name='sound')
    damage(folder)
    runs = collect(folder.parent.parent).set_index('run')
    assert word in runs.problem['finediving/run'] and runs.problem['finediving/sound'] == ''
    assert 'Broken runs left out: finediving/run.' in caption('IX', runs.reset_index())
    table = ours_vs_paper('IX', runs.reset_index())
    assert table.seeds.notna().sum() == 1
    with pytest.raises(ValueError, match='1 broken runs: finediving/run'): collect(folder.parent.parent, strict=True)


def test_collect_ignores_files_and_its_own_output(good, tmp_path):
    root = tmp_path/'r'
    shutil.copytree(good, root)
    (root/'README.md').write_text('x')
    (root/'finediving'/'notes.txt').write_text('x')
    (root/'figures'/'old').mkdir(parents=True)
    assert len(collect(root)) == 8
    assert len(collect(tmp_path/'r'/'figures'/'old')) == 0
    with pytest.raises(FileNotFoundError): collect(tmp_path/'none')


def test_val_rows_never_reach_a_test_metric(good):
    folder = good/'finediving'/'fspn_w_dn_s0'
    assert len(read_predictions(folder)) == 40 and len(read_predictions(folder, 'val')) == 4
    assert read_run(folder)['n'] == 40


def test_a_constant_predictor_is_a_sound_run(tmp_path):
    folder = make_run(tmp_path)
    df = pd.read_csv(folder/'predictions.csv').assign(pred=60.)
    df.to_csv(folder/'predictions.csv', index=False)
    test = df[df.split == 'test']
    edit('metrics.json', **summarise(test.pred, test.true, n=60))(folder)
    runs = collect(tmp_path, strict=True)
    assert np.isnan(runs.spearman.item())
    shown = readable(ours_vs_paper('IX', runs)).set_index(['protocol', 'method']).loc[('w/ DN', 'FSPN (Ours)')]
    assert shown['rho ours'] == '-' and shown['R x100 ours'] != '-'


def test_seeds_are_averaged_only_within_one_configuration(good, tmp_path):
    root = tmp_path/'r'
    shutil.copytree(good, root)
    make_run(root, seed=7, name='heads', cfg=dict(heads=10))
    make_run(root, seed=8, name='tuned', mode='finetune')
    make_run(root, seed=9, name='true', data='real')
    means = average_seeds(collect(root))
    fspn = means[(means.method == 'fspn') & (means.protocol == 'w_dn')]
    assert sorted(fspn.seeds) == ['0,1', '7', '8', '9']
    table = ours_vs_paper('IX', collect(root))
    assert len(table) == 12+3 and {'data', 'mode', 'config'} <= set(readable(table).columns)
    assert 'mixed' in table.attrs['caption']
    make_run(root, seed=0, name='copy')
    with pytest.raises(ValueError, match='twice: finediving/copy, finediving/fspn_w_dn_s0'): average_seeds(collect(root))


def test_mean_interval_and_spread(good):
    runs = collect(good)
    both = runs[(runs.method == 'fspn') & (runs.protocol == 'wo_dn')].sort_values('seed')
    row = ours_vs_paper('IX', runs).set_index(['protocol', 'method']).loc[('wo_dn', 'fspn')]
    assert row.rho == pytest.approx(both.spearman.mean()) and row.rho_sd == pytest.approx(both.spearman.std())
    assert (row.rho_lo, row.rho_hi) == tuple(both.iloc[0][['spearman_lo', 'spearman_hi']])
    assert row.r_l2_x100 == pytest.approx(100*both.relative_l2.mean()) and row.r_l2_x100_diff == pytest.approx(row.r_l2_x100-.413)


def test_rows_keep_the_papers_order(good, tmp_path):
    root = tmp_path/'r'
    shutil.copytree(good, root)
    make_run(root, 'fspn_s', 'w_dn')
    make_run(root, 'fspn', 'w_dd', label='per_dd')
    s = sheet().rename(columns={'true': 'score'})
    table = ours_vs_paper('IX', collect(root), score_baselines(s, s, n=60))
    assert table.protocol.tolist() == ['wo_dn']*7+['w_dn']*8+['w_dd']*2
    assert table[table.protocol == 'wo_dn'].method.tolist() == ['usdl', 'musdl', 'core_tree', 'tsa', 'i3d_mlp', 'fspn', 'no video: constant mean']
    assert table.label[table.method == 'fspn_s'].item() == 'FSPN-S'
    assert table.rho_paper[table.protocol == 'w_dd'].isna().all()
    assert 'target' in readable(table).columns


def test_captions_never_call_synthetic_data_comparable(good):
    runs = collect(good)
    assert 'synthetic, not comparable with the paper' in caption('IX', runs)
    assert 'not comparable' not in caption('IX', runs.assign(data='real'))
    for word in ('frozen', 'rgb_scratch', 'smoke', 'last', '0, 1', 'bootstrap'): assert word in caption('IX', runs)
    assert 'no finished run' in caption('IX', runs[:0])


def test_tables_are_byte_stable(good, tmp_path):
    out = []
    for i in range(2):
        files = save_table(ours_vs_paper('IX', collect(good)), tmp_path/str(i)/'table_09')
        out.append([item.read_bytes() for item in files])
    assert out[0] == out[1] and b'\r' not in out[0][0]+out[0][1]
    assert [file.name for file in files] == ['table_09.csv', 'table_09.md']
    md = out[0][1].decode()
    assert 'synthetic, not comparable' in md and 'copy of I3D+MLP' in md and str(tmp_path) not in md
    back = pd.read_csv(files[0])
    assert back.rho_paper.tolist() == ours_vs_paper('IX', collect(good)).rho_paper.tolist()


def test_order_of_folders_on_disk_does_not_matter(good):
    runs = collect(good)
    a, b = (ours_vs_paper('IX', r).drop(columns='note').to_csv() for r in (runs, runs.sample(frac=1, random_state=0)))
    assert a == b


def test_predictions_by_method_keeps_configurations_apart(good, tmp_path):
    root = tmp_path/'r'
    shutil.copytree(good, root)
    assert list(predictions_by_method(root, collect(root))) == ['I3D+MLP', 'FSPN (Ours)']
    make_run(root, seed=7, name='heads', cfg=dict(heads=10))
    names = list(predictions_by_method(root, collect(root)))
    assert names == ['I3D+MLP', 'FSPN (Ours) (fspn_w_dn_s0)', 'FSPN (Ours) (heads)']


def test_markdown_escapes_pipes():
    assert 'a\\|b' in to_md(pd.DataFrame(dict(x=['a|b'])))


@pytest.fixture
def preds(good):
    yield {name: read_predictions(good/'finediving'/f'{name}_w_dn_s0') for name in ('i3d_mlp', 'fspn')}
    plt.close('all')


@pytest.mark.parametrize('draw', [lambda p: plot_scatter(p, 'synthetic'), lambda p: plot_cs(p, 'real'),
                                  lambda p: plot_parse(np.zeros((96, 8, 8, 3), np.uint8), np.full((96, 3), 1/3), [29, 62], [28, 66], 'abc', 'real')])
def test_figures_are_byte_stable(preds, draw, tmp_path):
    files = [save_figure(draw(preds), tmp_path/f'{i}', pdf=True) for i in range(2)]
    assert [a.read_bytes() for a in files[0]] == [b.read_bytes() for b in files[1]]
    assert files[0][0].read_bytes()[:4] == b'\x89PNG' and files[0][1].read_bytes()[:4] == b'%PDF'


@pytest.mark.parametrize('metric', ['rho', 'r_l2_x100'])
def test_table_figure_with_and_without_runs(good, metric, tmp_path):
    s = sheet().rename(columns={'true': 'score'})
    for runs, baselines, word in ((collect(good), score_baselines(s, s, n=60), 'synthetic data'), (collect(good)[:0], None, 'no finished run')):
        fig = plot_table(ours_vs_paper('IX', runs, baselines), metric)
        assert word in fig.get_suptitle()
        save_figure(fig, tmp_path/'t.png')
        plt.close(fig)


def test_figures_survive_degenerate_predictions(preds, tmp_path):
    one = preds['fspn'][:1]
    for fig in (plot_scatter({'one': one}, 'real'), plot_cs({'one': one}, 'real')): save_figure(fig, tmp_path/'x')
    with pytest.raises(ValueError, match='at least one method'): plot_scatter({}, 'real')
    with pytest.raises(ValueError, match='at least one method'): plot_cs({}, 'real')
    with pytest.raises(ValueError, match="need data='real' or 'synthetic'"): plot_cs(preds, '')


def test_nothing_public_is_left_out_of_all():
    assert {'collect', 'read_run', 'average_seeds'} <= set(runs.__all__)
    assert {'ours_vs_paper', 'to_md', 'save_table'} <= set(tables.__all__)
    assert {'plot_scatter', 'plot_cs', 'plot_parse', 'save_figure'} <= set(figures.__all__)
