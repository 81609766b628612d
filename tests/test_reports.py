"Reports from run folders: sound ones, damaged ones, groups that are shown or not, and the same bytes every time"
import csv
import gzip
import io
import itertools
import json
import re
import shutil
import warnings
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import mistune
import numpy as np
import pandas as pd
import pytest

from conftest import as_trained
from fspn_nb.analysis import runs
from fspn_nb.analysis.class_averages import add_averages,average_gaps
from fspn_nb.analysis.compare import Scorer
from fspn_nb.analysis.method_tables import average_cell,seed_intervals
from fspn_nb.analysis.parse_quality import overlap_gain
from fspn_nb.analysis.published import pack_runs,unpack_runs
from fspn_nb.analysis.run_groups import RANKING,left_out,left_out_line,main_runs,rank_group,why_lower
from fspn_nb.analysis.runs import average_seeds,collect,read_predictions,read_run
from fspn_nb.analysis.seed_spread import published_scores,seed_spread
from fspn_nb.analysis.significance import holm
from fspn_nb.config import make_config,override
from fspn_nb.core import write_json
from fspn_nb.escaping import csv_text,escape_md,escape_tex,md_code,one_line,unquote_formulas
from fspn_nb.experiments.variants import config_of,grid_base
from fspn_nb.metrics import score_baselines,summarise
from fspn_nb.protocols import SPORTS
from fspn_nb.report import build,figures,tables
from fspn_nb.report.build import build_report,intro
from fspn_nb.report.fake_runs import fake_run
from fspn_nb.report.figures import plot_cs,plot_parse,plot_scatter,plot_table,save_figure
from fspn_nb.report.figure_sections import draw_section,epochs_section,parsing_section,votes_section
from fspn_nb.report.run_index import figure_note,open_index,provenance_line
from fspn_nb.report.study_figures import plot_ablation
from fspn_nb.report.study_sections import standing_section
from fspn_nb.report.table_lines import floor_lines,rank_lines
from fspn_nb.report.table_sections import ablation_section,methods_section
from fspn_nb.report.tables import caption,ours_vs_paper,predictions_by_method,readable,save_table,to_md

from fspn_nb.report.writers import _is,section_md


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
    assert table[table.protocol == 'w_dn'].method.tolist()[-3:] == ['fspn', 'fspn_s', 'no video: action-type mean'], 'what the paper does not print stands below'
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


# Which group of runs is shown, and what is said of those that are not

GROUP = dict(preset='demo', data='synthetic', share=1., trained=1., seeds=3, tests=150, methods=2, name='a')
ORDERINGS = { # better first, each a change of GROUP
    'a full real paper run before the synthetic demo': (dict(preset='paper', data='real', seeds=1, tests=749), {}),
    'nine smoke dives after the demo': ({}, dict(preset='smoke', data='real', share=9/3000, tests=3)),
    'a smoke run of all real dives after the demo': ({}, dict(preset='smoke', data='real', tests=749)),
    'twelve real dives of the demo after the whole synthetic one': ({}, dict(data='real', share=12/3000)),
    'twelve real dives of the paper preset after the synthetic demo': ({}, dict(preset='paper', data='real', share=12/3000)),
    'most real dives before synthetic ones': (dict(data='real', share=.6, seeds=1), {}),
    'one real seed before three synthetic ones': (dict(data='real', seeds=1), {}),
    'the paper preset before the demo, both real': (dict(preset='paper', data='real', seeds=1), dict(data='real')),
    'a paper run of two epochs after the demo': ({}, dict(preset='paper', data='real', trained=.01)),
    'real smoke before synthetic smoke on whole releases': (dict(preset='smoke', data='real'), dict(preset='smoke')),
    'all dives before 60 %': (dict(data='real', seeds=1), dict(data='real', share=.6)),
    'three seeds before one, a few videos missing': (dict(data='real', share=.98), dict(data='real', seeds=1)),
    'more test videos': ({}, dict(tests=50)),
    'more methods': ({}, dict(methods=1)),
    'an unknown share after a known one': ({}, dict(share=0.)),
    'the name at last': ({}, dict(name='b'))}


@pytest.mark.parametrize('kind', ORDERINGS)
def test_the_order_of_groups(kind):
    better, worse = (GROUP|changes for changes in ORDERINGS[kind])
    assert rank_group(better) < rank_group(worse)
    assert why_lower(worse, better) in {words for words, _ in RANKING}


@pytest.fixture(scope='module')
def beside_published(tmp_path_factory):
    "The published runs, linked, and a folder for more"
    root = tmp_path_factory.mktemp('beside')
    for run in unpack_runs().glob('*/*'):
        if run.is_dir():
            (root/run.parent.name).mkdir(exist_ok=True)
            (root/run.parent.name/run.name).symlink_to(run)
    return root


def add_nine_dives(root, preset='smoke', **changes):
    return [fake_run(root, as_trained('finediving', preset, data_root='/data/FineDiving', model__name=method, protocol=protocol, **changes), 8., n=3,
                     counts=dict(train=6, test=3)) for method in ('i3d_mlp','fspn') for protocol in ('wo_dn','w_dn')]


@pytest.mark.parametrize('preset', ['smoke','demo'])
def test_nine_real_dives_replace_nothing(beside_published, preset):
    folders = add_nine_dives(beside_published, preset)
    try: index = open_index(beside_published, n=20, tests=20, sizes=False)
    finally:
        for folder in folders: shutil.rmtree(folder)
    filled = index.cells.groupby(['table','row','protocol','experiment']).run.apply(lambda runs: (runs != '').any())
    own = index.main[index.main.dataset == 'finediving']
    assert filled.all() and len(filled) == 85
    assert set(own.data) == {'synthetic'} and set(own.seed) == {0, 1, 2, 3, 4}
    line = left_out_line(index.hidden, 'finediving')
    reason = 'only tried out' if preset == 'smoke' else 'less than half of the dataset'
    assert f'4 runs (real data, preset {preset}, 9 of 3,000 dives, 3 of them for testing, seed 0): {reason}' in line


def test_a_full_real_run_takes_the_page(tmp_path):
    counts = dict(train=2251, test=749)
    for seed in (0, 1, 2): fake_run(tmp_path, config_of(grid_base('demo'), 'fspn', seed), 5.)
    fake_run(tmp_path, as_trained('finediving', 'paper', data_root='/data/FineDiving'), 5., counts=counts)
    index = open_index(tmp_path, n=20, tests=20, sizes=False)
    assert '- FineDiving: real data, preset paper, 1 seed (0), all 3,000 dives' in intro(index) and '3 of the runs are not shown' in intro(index)
    nine, one = methods_section(index, 'finediving'), ablation_section(index, 'I')
    line = left_out_line(index.hidden, 'finediving')
    assert line.startswith('Not shown: 3 runs (synthetic data, preset demo,') and 'a smaller preset' in line
    assert 'single training' in nine.caption and 'not known' in nine.caption
    assert any('One seed only: FSPN (Ours)' in line for line in one.lines)


def test_partial_data_is_said_in_captions_and_titles(tmp_path):
    add_nine_dives(tmp_path, 'demo')
    index = open_index(tmp_path, n=20, tests=20, sizes=False)
    words = '9 of 3,000 dives, 3 of them for testing'
    assert words in provenance_line(index.main) and words in figure_note(index.main)[1] and words in caption('IX', index.runs)
    assert words in plot_table(ours_vs_paper('IX', index.runs)).get_suptitle()
    plt.close('all')


def test_a_synthetic_release_given_as_folder_is_called_synthetic(tmp_path):
    folder = fake_run(tmp_path, as_trained('finediving', 'demo', data_root='/data/made_up'), 5.)
    for name in ('metrics', 'provenance'): edit(f'{name}.json', data='synthetic')(folder)
    index = open_index(tmp_path, n=20, tests=20, sizes=False)
    assert 'Synthetic data, not comparable' in provenance_line(index.main) and 'all 142 dives' in provenance_line(index.main)


# A run is what it was made of

def test_seeds_on_other_inputs_are_never_averaged(tmp_path):
    for seed, inputs in ((0, ''), (1, ''), (2, 'a1'), (3, 'a1'), (4, 'b2')):
        fake_run(tmp_path, as_trained('finediving', 'demo', seed=seed), 5., inputs=inputs)
    runs = collect(tmp_path, strict=True)
    assert sorted(average_seeds(runs).seeds) == ['0,1', '2,3', '4']
    table = ours_vs_paper('IX', runs)
    assert readable(table).columns[-1] == 'inputs' and 'column inputs' in table.attrs['caption']
    main = main_runs(runs, tmp_path)
    assert main.seed.tolist() in ([0, 1], [2, 3]) and main.inputs.nunique() == 1
    hidden = left_out(runs, tmp_path, main)
    assert hidden.runs.sum() == 3 and len(set(hidden.reason)) == 2
    # the grid takes runs of one set of inputs too, where it raised an error before
    index = open_index(tmp_path, (0, 1, 2, 3, 4), n=20, tests=20, sizes=False)
    assert set(index.cells.run)-{''} == set(main.run)


def test_the_runs_of_one_row_have_one_number_of_epochs(tmp_path):
    fspn, mlp = (lambda seed, name=name, **changes: override(config_of(grid_base('demo'), name, seed), **changes) for name in ('fspn', 'i3d_mlp'))
    kept = [fake_run(tmp_path, cfg, miss) for cfg, miss in ((fspn(0), 3.), (mlp(0), 9.), (mlp(1), 9.))]
    short = fake_run(tmp_path, fspn(1, train__epochs=2), 30.)
    index = open_index(tmp_path, n=20, tests=20, sizes=False)
    assert set(index.main.run) == {f'finediving/{folder.name}' for folder in kept}
    nine = methods_section(index, 'finediving').table
    row = nine[(nine.method == 'fspn') & nine.seeds.notna()]
    assert row.seeds.tolist() == ['0'] and row.runs.tolist() == [f'finediving/{kept[0].name}']
    mine, *others = (f'finediving/{folder.name}' for folder in kept)
    assert nine[(nine.method == 'i3d_mlp') & nine.seeds.notna()].rho_gain.item() == index.scorer.gain(others, [mine])['rho_gain']
    assert left_out_line(index.hidden, 'finediving').endswith('seed 1): another number of epochs than the runs that are shown.')
    # without the preset's epochs: those of most seeds
    shutil.rmtree(kept[0])
    for seed, epochs in ((0, 2), (2, 3)): fake_run(tmp_path, fspn(seed, train__epochs=epochs), 30.)
    main = main_runs(collect(tmp_path), tmp_path)
    assert main[main.method == 'fspn'].seed.tolist() == [0, 1] and f'finediving/{short.name}' in set(main.run)


def test_the_classes_of_a_row_have_one_number_of_epochs(tmp_path):
    for i, sport in enumerate(SPORTS):
        cfg = as_trained('aqa7', 'demo', protocol=sport)
        fake_run(tmp_path, cfg, 6., n=20)
        if i < 3: fake_run(tmp_path, override(cfg, seed=1, train__epochs=2), 20., n=20)
    index = open_index(tmp_path, n=20, tests=20, sizes=False)
    assert index.main.seed.tolist() == [0]*6
    assert index.hidden.reason.tolist() == ['another number of epochs than the runs that are shown'] and index.hidden.runs.tolist() == [3]


def test_a_class_is_compared_on_one_set_of_inputs(tmp_path):
    "Two trainings of a method saw other videos of one class: they stand beside the table, and do not stop the page"
    for sport in SPORTS:
        for name in ('fspn', 'usdl', 'i3d_mlp'):
            odd = name == 'i3d_mlp' and sport == 'diving'
            fake_run(tmp_path, as_trained('aqa7', 'demo', protocol=sport, model__name=name), 6., n=20-odd, inputs=f'{sport}{"other"*odd}')
    index = open_index(tmp_path, n=20, tests=20, sizes=False)
    assert sorted(index.main.method[index.main.protocol == 'diving']) == ['fspn', 'usdl'] and len(index.main) == 17
    assert index.hidden.reason.tolist() == ['other inputs than the runs that are shown']
    lines = methods_section(index, 'aqa7').lines
    assert 'Not compared with FSPN: I3D+MLP (AQA-7: 5 of 6 classes).' in lines and 'Not compared with FSPN: I3D+MLP (AQA-7: 5 of 6 classes).' in standing_section(index).lines


def test_p_of_a_sentence_is_that_of_the_table(tmp_path):
    for seed, (name, miss) in itertools.product((0, 1, 2), dict(fspn=8., i3d_mlp=11., usdl=9.).items()):
        fake_run(tmp_path, as_trained('finediving', 'demo', model__name=name, seed=seed), miss, n=60)
        for sport in SPORTS: fake_run(tmp_path, as_trained('aqa7', 'demo', protocol=sport, model__name=name, seed=seed), miss, n=20)
    index = open_index(tmp_path, n=20, tests=50, sizes=False)
    nine, ten = (methods_section(index, dataset) for dataset in ('finediving', 'aqa7'))
    row = nine.table[(nine.table.method == 'i3d_mlp') & nine.table.seeds.notna()].iloc[0]
    assert row.rho_p_holm > row.rho_p and f'({_is(row.rho_p_holm, "Holm p")}) and ' in nine.lines[0]
    pairs = {sport: [index.main.run[(index.main.method == name) & (index.main.protocol == sport)].tolist() for name in ('fspn', 'i3d_mlp')] for sport in SPORTS}
    gains = pd.DataFrame([index.scorer.gain(*pair) for pair in pairs.values()])
    for line, p, raw in zip(ten.lines, holm(gains.rho_p.to_numpy(float)), gains.rho_p): assert f'({_is(p, "Holm p")}) and ' in line and p >= raw
    assert 'adjusted (Holm) for the six classes' in ten.caption


def test_a_score_that_is_undefined_is_above_nothing():
    nan = float('nan')
    table = pd.DataFrame(dict(protocol='w_dn', method=['usdl', 'musdl', 'tpt', 'core_tree'], rho_gain=[0., .02, nan, -.1], rho_p_holm=[1., .4, nan, nan]))
    line, = rank_lines(table, dict(w_dn='w/ DN'))
    assert line == ('w/ DN: above FSPN in rho: MUSDL [5] (+0.0200, Holm p = 0.400). FSPN is above 1 of 4 methods, above 0 of them beyond chance (Holm p < .05); '
                    '1 without p, as one seed says nothing about another training. As high as FSPN: USDL [5]. No difference, as a rho is undefined: TAP [39].')
    floor = pd.DataFrame(dict(protocol='w_dn', method=['no video: action-type mean', 'usdl', 'tpt'], label=['no video', 'USDL', 'TPT'], rho=[.4, .8, nan],
                              rho_lo=[nan, .7, nan], seeds=['', '0', '0,1']))
    assert floor_lines(floor, dict(w_dn='w/ DN'))[0].endswith('1 of 1 methods lie above it with their whole interval; not above: none. Without an interval, as a rho is undefined: TPT.')


def test_the_best_parser_is_tested_as_the_best_of_many(tmp_path):
    for seed, experiment in itertools.product((0, 1, 2), ('fspn', 'without_actor', 'blocks_1', 'i3d_iap')):
        fake_run(tmp_path, config_of(grid_base('demo'), experiment, seed), 5., n=40)
    index = open_index(tmp_path, n=20, tests=20, sizes=False)
    section = parsing_section(index, tmp_path/'page')
    tested = section.table[section.table.runs != '']
    gains = {row.label: overlap_gain([tmp_path/run for run in row.runs.split()]) for row in tested.itertuples()}
    best = tested.label[tested.tiou.idxmax()]
    p = dict(zip(gains, holm(np.array([gain['p'] for gain in gains.values()]))))[best]
    assert len(tested) == 4 and p > gains[best]['p'] or p == 1
    assert f"{gains[best]['gain']:+.3f} ({_is(p, 'Holm p')} among 4 variants" in section.lines[0]


def test_the_average_of_r_has_the_interval_of_whole_ranges(tmp_path):
    "R is relative to the range of a class's scores: a resample keeps that range"
    for sport in SPORTS: fake_run(tmp_path, as_trained('aqa7', 'demo', protocol=sport), 6., n=12)
    runs = collect(tmp_path)
    average = add_averages(runs, tmp_path, 600).iloc[-1]
    whole = average_cell(tmp_path, runs, 600)
    assert average.protocol == 'average' and whole['r_l2_x100'] == pytest.approx(100*average.relative_l2)
    for end in ('lo', 'hi'): assert 100*average[f'relative_l2_{end}'] == pytest.approx(whole[f'r_l2_x100_{end}'], rel=.15)


def test_a_printed_row_stands_once(tmp_path):
    "A method that lacks classes here: the paper's row is whole, ours has gaps"
    for sport in ('diving', 'gym_vault'): fake_run(tmp_path, as_trained('aqa7', 'demo', protocol=sport), 6., n=20)
    shown = methods_section(open_index(tmp_path, n=20, tests=20, sizes=False), 'aqa7').shown
    rho = shown[shown.metric == 'rho'].set_index('method')
    assert (rho.index == 'FSPN (Ours)').sum() == (rho.index == 'FSPN, here').sum() == 1
    assert (rho.loc['FSPN (Ours)'] != '').all() and (rho.loc['FSPN, here'] != '').sum() == 3 # with the column `metric`


def test_the_epochs_of_one_block_empty_no_cell_of_another(tmp_path):
    for experiment in ('fspn', 'i3d_mlp'): fake_run(tmp_path, config_of(grid_base('demo'), experiment, 0), 5.)
    for protocol in ('w_dd', 'wo_dn'): fake_run(tmp_path, override(config_of(grid_base('demo'), 'fspn', 0, protocol), train__epochs=2), 20.)
    index = open_index(tmp_path, n=20, tests=20, sizes=False)
    assert len(index.main) == 4 and set(index.cells.experiment[index.cells.run != '']) == {'fspn', 'i3d_mlp'}


def test_a_group_is_ranked_by_the_runs_that_it_would_show(tmp_path):
    cfg = as_trained('finediving', 'demo')
    for seed in (0, 1): fake_run(tmp_path, override(cfg, seed=seed), 5., inputs='a')
    for seed in (0, 1, 2): fake_run(tmp_path, override(cfg, seed=seed, train__epochs=20 if seed == 0 else 2, train__lr_backbone=2e-4), 5., inputs='b')
    index = open_index(tmp_path, (0, 1), n=20, tests=20, sizes=False)
    assert index.main.seed.tolist() == [0, 1] and set(index.main.inputs) == {'a'}
    assert index.hidden.reason.tolist() == ['fewer seeds'], 'two of its three seeds have two epochs'


def test_runs_on_other_videos_do_not_stop_the_report(tmp_path):
    for seed, n in ((0, 24), (1, 24), (2, 12)): fake_run(tmp_path, config_of(grid_base('demo'), 'fspn', seed), 5., n=n)
    index = open_index(tmp_path, n=20, tests=20, sizes=False)
    assert set(index.main.seed) == {0, 1} and index.hidden.runs.tolist() == [1]
    assert methods_section(index, 'finediving').table.n.dropna().tolist() == [24]


@pytest.mark.parametrize('name', ['inputs', '.fspn-w_dn.lock', 'fspn.lock', 'claims', 'abc.part'])
def test_what_lies_beside_runs_is_no_run(good, name):
    (good/'finediving'/name).mkdir()
    try: assert len(collect(good, strict=True)) == 8
    finally: (good/'finediving'/name).rmdir()


# What one seed is worth

def test_the_spread_of_seeds_is_computed_from_the_runs_at_hand(tmp_path):
    cfg = as_trained('finediving', 'demo', protocol='wo_dn')
    alone = collect(fake_run(tmp_path/'alone', cfg, 5.).parent.parent)
    published = published_scores()
    line = caption('IX', alone)
    expected = seed_spread(published[(published.dataset == 'finediving') & (published.protocol == 'wo_dn')])
    assert f"{expected['rho']:.3f} in rho" in line and 'published runs' in line and 'nothing follows' in line
    for seed in range(3): fake_run(tmp_path/'own', override(cfg, seed=seed, model__name='i3d_mlp'), 9.)
    own = collect(tmp_path/'own')
    line = caption('IX', alone, pd.concat([alone, own]))
    assert f'{own.spearman.std():.3f} in rho' in line and 'runs at hand' in line
    assert 'single training' not in caption('IX', own)
    assert 'not known' in caption('IX', alone.assign(preset='smoke'))


# Few test videos

def test_a_perfect_class_has_no_average(tmp_path):
    for sport in SPORTS: fake_run(tmp_path, as_trained('aqa7', 'demo', protocol=sport), 0. if sport == 'diving' else 9., n=5)
    ten = methods_section(open_index(tmp_path, (0,), n=20, sizes=False), 'aqa7')
    body = section_md(ten)
    assert ten.table[(ten.table.protocol == 'average') & (ten.table.method == 'fspn')].rho.isna().all()
    assert 'FSPN (Ours), Avg.: no rho (Diving: perfect order, whose Fisher z is infinite' in body


def test_an_average_has_the_seeds_that_all_classes_have(tmp_path):
    for i, sport in enumerate(SPORTS):
        for method, seed in (('fspn', 0), ('i3d_mlp', 0), *[('fspn', 1)]*(i < 3)):
            fake_run(tmp_path, as_trained('aqa7', 'demo', protocol=sport, seed=seed, model__name=method), 6. if method == 'fspn' else 9., n=20)
    index = open_index(tmp_path, (0, 1), n=60, tests=60, sizes=False)
    ten = methods_section(index, 'aqa7')
    rows = ten.table[ten.table.method == 'fspn'].set_index('protocol')
    first = index.main[(index.main.method == 'fspn') & (index.main.seed == 0)]
    cell = average_cell(tmp_path, first, index.scorer.n//2)
    assert rows.seeds.tolist() == ['0,1']*3+['0']*4 and set(rows.runs['average'].split()) == set(first.run)
    assert rows.rho['average'] == pytest.approx(cell['rho']) and (rows.rho_lo['average'], rows.rho_hi['average']) == (cell['rho_lo'], cell['rho_hi'])
    other = ten.table[(ten.table.method == 'i3d_mlp') & (ten.table.protocol == 'average')].rho.item()
    assert average_gaps(index.main, tmp_path).rho_gain.item() == pytest.approx(other-cell['rho']), 'the line below the table is about its rows'


def test_a_class_with_two_runs_of_one_seed_has_no_average_and_says_so(tmp_path):
    root = tmp_path/'runs'
    for sport in SPORTS: fake_run(root, as_trained('aqa7', 'demo', protocol=sport), 6., n=20, inputs='a')
    again = fake_run(tmp_path/'other', as_trained('aqa7', 'demo', protocol='diving'), 9., n=20, inputs='b')
    shutil.copytree(again, root/'aqa7'/f'{again.name}-again')
    runs = add_averages(collect(root, strict=True), root, 20)
    table = seed_intervals(ours_vs_paper('X', runs), runs, Scorer(root, 20, 20))
    row = table[(table.protocol == 'average') & (table.method == 'fspn')]
    assert row.rho.isna().all() and row.seeds.tolist() == ['0']
    text = save_table(table, tmp_path/'t')[1].read_text().replace('\\', '')
    reason = f'Diving: need one run with seed 0, got aqa7/{again.name} and aqa7/{again.name}-again; remove all but one'
    assert f'FSPN (Ours), Avg.: no rho and no R ({reason})' in text
    # the page takes one of them, and names the other
    index = open_index(root, n=20, tests=20, sizes=False)
    ten = methods_section(index, 'aqa7').table
    assert ten[(ten.protocol == 'average') & (ten.method == 'fspn')].rho.notna().all() and len(index.main) == 6
    assert left_out_line(index.hidden, 'aqa7').endswith('seed 0): other inputs than the runs that are shown.')


def test_sections_of_single_test_videos(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore') # of writing the fake runs
        for exp in ('fspn','i3d_mlp','blocks_1'): fake_run(tmp_path, config_of(grid_base('smoke'), exp), 5., n=1, votes=exp == 'fspn')
        for sport in SPORTS: fake_run(tmp_path, make_config('aqa7', 'smoke', protocol=sport), 5., n=1)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        index = open_index(tmp_path, (0,), n=20, tests=20, sizes=False)
        one = draw_section(index, ablation_section(index, 'I'), tmp_path/'page', plot_ablation, '')
        ten, eight = methods_section(index, 'aqa7'), votes_section(index, tmp_path/'page')
    assert 'FSPN (Ours): no rho and no R (1 dive: no rank correlation and no score range).' in section_md(one)
    assert eight.lines == ['No number of exemplars has a rho, so none is best.'] and not eight.figures
    assert one.shown.set_index('row').loc['FSPN (Ours)', 'rho ours'] == '-' and not one.figures
    assert ten.table[(ten.table.protocol == 'average') & (ten.table.method == 'fspn')].rho.isna().all()
    assert 'FSPN (Ours), Avg.: no rho and no R (Diving: 1 dive' in section_md(ten)


def test_a_reason_is_read_from_metrics(tmp_path):
    folder = make_run(tmp_path)
    df = pd.read_csv(folder/'predictions.csv').assign(pred=60.)
    df.to_csv(folder/'predictions.csv', index=False)
    test = df[df.split == 'test']
    edit('metrics.json', **(summarise(test.pred, test.true, n=60)|dict(spearman=None)))(folder)
    runs = collect(tmp_path, strict=True)
    assert 'all 40 predictions are 60' in runs.reason.item()
    text = save_table(ours_vs_paper('IX', runs), tmp_path/'t')[1].read_text()
    assert 'FSPN (Ours), w/ DN: no rho (all 40 predictions are 60' in text


# Publishing

def test_published_files_name_no_folder_of_the_machine(tmp_path):
    folder = fake_run(tmp_path/'runs', as_trained('finediving', 'demo', data_root='/data/me/My Films/FineDiving', actor__boxes=r'C:\aqa\boxes.csv'), 5.,
                      inputs='a1b2')
    edit('provenance.json', actor_boxes=['read from /home/me/boxes.csv, 3 dives without'])(folder)
    files = pack_runs([tmp_path/'runs'], tmp_path/'published')
    text = files[0].read_text()
    assert '/data' not in text and 'home' not in text and 'aqa\\' not in text and 'read from boxes.csv, 3 dives without' in text
    back = collect(unpack_runs(tmp_path/'published', tmp_path/'cache'), strict=True)
    assert back.inputs.tolist() == ['a1b2'] and back.data.tolist() == ['real'] and 'FineDiving' in text


def test_nothing_public_is_left_out_of_all():
    assert {'collect', 'read_run', 'average_seeds'} <= set(runs.__all__)
    assert {'ours_vs_paper', 'to_md', 'save_table'} <= set(tables.__all__)
    assert {'plot_scatter', 'plot_cs', 'plot_parse', 'save_figure'} <= set(figures.__all__)


def test_a_folder_with_broken_runs_alone_gives_a_page_that_names_them(tmp_path):
    fake_run(tmp_path, config_of(grid_base('smoke'), 'fspn', 0), 5.)
    run = next(tmp_path.glob('finediving/*/metrics.json')).parent
    edited = json.loads((run/'metrics.json').read_text()) | dict(spearman=.99)
    (run/'metrics.json').write_text(json.dumps(edited))
    build_report(tmp_path, seeds=(0,), n=20, tests=20, sizes=False)
    page = (tmp_path/'README.md').read_text(encoding='utf-8')
    assert run.name in page and 'metrics.json has spearman 0.99' in page


# Names that were made to do harm

NAMES = ['<script>alert(1)</script>', '"><img src=x onerror=alert(1)>', "[now](javascript:alert(1)) ![p](http://x/p.png) <http://x> &lt;b&gt;",
         '`a` | *b* _c_ ~~d~~ $e^2$ \\frac{ $ ]]> <!-- [^1]', '\\input{/etc/passwd} 100 % #1 ~ ^^5c {', 'two\nlines\r\x1b[31m\u202egpj.exe', '=1+1', '# 1. > - x']
FORMULAS = ['=HYPERLINK("http://x","y")', "+cmd|'/C calc'!A0", '-2+3', '@SUM(A1)', "'=1", '\t=1', '＝1', 'plain', '-0.31']


class Parsed(HTMLParser):
    "Tags with attributes, and all text"
    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], ''
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs): self.tags.append((tag, dict(attrs)))

    def handle_data(self, data): self.text += data


def as_jupyter(md):
    "Markdown as a reader that lets HTML through shows it"
    return Parsed(mistune.create_markdown(escape=False, plugins=['table', 'strikethrough', 'footnotes'])(md))


def squeezed(text): return ' '.join(text.split())


@pytest.mark.parametrize('seed', range(3))
def test_escaped_text_is_shown_letter_by_letter(seed):
    rng = np.random.default_rng(seed)
    pieces = [*'<>[]()!`*_~$&#;|\\"\'ab1:/.-=+@\n\x1b\u202e ', *NAMES, '](', '&#60;', '-->', 'www.x.de', '**']
    for _ in range(150):
        name = ''.join(rng.choice(pieces, rng.integers(1, 12)))
        for md, text in ((f'- x: {escape_md(name)}\n', f'x: {one_line(name)}'), (f'x {md_code(name)} y', f'x {one_line(name)} y'),
                         (to_md(pd.DataFrame({'a': [name]})), f'a {one_line(name)}')):
            page = as_jupyter(md)
            assert squeezed(page.text) == squeezed(text)
            assert {tag for tag, _ in page.tags} <= {'table', 'thead', 'tbody', 'tr', 'th', 'td', 'p', 'ul', 'li', 'code'}
        page = as_jupyter(f'**b** {escape_md(name, prose=True)}')
        assert {tag for tag, _ in page.tags} <= {'p', 'strong', 'em', 'code', 'del', 'pre'}
        tex = re.sub(r'\\text[a-z]+\{\}|\$\\pm\$|\\[{}&%$#_]', '', escape_tex(name))
        assert not re.search(r'[\\{}&%$#_~^\x00-\x1f]', tex), tex


@pytest.fixture(scope='module')
def hostile(tmp_path_factory):
    "A report of runs whose names are hostile, and its sections"
    root, base = tmp_path_factory.mktemp('hostile'), grid_base('smoke')
    for seed in (0, 1):
        for experiment, miss in dict(fspn=5., i3d_mlp=9., i3d_smt=6.).items():
            fake_run(root, config_of(base, experiment, seed), miss, n=12, watched=seed == 0, votes=True)
        for i, name in enumerate(NAMES):
            folder = fake_run(root, config_of(base, 'i3d_mlp', seed+10+2*i), 7., n=12)
            edit('metrics.json', method=name, seed=seed)(folder)
    for folder in root.glob('finediving/*/'): edit('metrics.json', weights=''.join(NAMES))(folder)
    for name in ('"><script>alert(2)<script>', '<svg onload=alert(3)>', '=cmd', '`x`[y](z)', 'a\nb\x1b[31m'): # broken runs, named
        (root/'finediving'/name).mkdir()
    (root/'finediving'/'=cmd'/'config.json').write_text('{"<script>alert(4)</script>')
    files, sections = build_report(root, seeds=(0, 1), n=20, tests=20, sizes=False)
    return root, files, sections


def test_no_name_becomes_markup(hostile):
    root, _, sections = hostile
    page = Parsed((root/'report.html').read_text(encoding='utf-8'))
    for parsed in (page, as_jupyter((root/'README.md').read_text(encoding='utf-8')), *(as_jupyter(path.read_text(encoding='utf-8')) for path in root.glob('tables/*.md'))):
        known = {'html', 'head', 'meta', 'title', 'style', 'body', 'div', 'table', 'thead', 'tbody', 'tr', 'th', 'td', 'p', 'ul', 'li', 'code', 'pre',
                 'h1', 'h2', 'a', 'img', 'strong', 'em', 'del'}
        assert {tag for tag, _ in parsed.tags} <= known, {tag for tag, _ in parsed.tags}-known
        for tag, attrs in parsed.tags:
            assert not [name for name in attrs if name.startswith('on') or name == 'style' and tag != 'th' and tag != 'td'], attrs
            address = attrs.get('href') or attrs.get('src') or '#'
            assert re.match(r'#|(\.\./)?(figures|tables)/[a-z_0-9]+\.(png|pdf|csv|md|tex)$|(\.\./)?finediving/[\w.%=+-]+/$', address), address
    for name in NAMES: assert squeezed(one_line(name)) in squeezed(page.text), name # the row of Table IX, as it is
    for path in root.glob('finediving/*/'):
        if not (path/'metrics.json').is_file(): assert one_line(path.name) in page.text, path
    assert '\x1b' not in page.text and '\u202e' not in page.text


def test_no_cell_is_run_by_a_spreadsheet(hostile):
    root, files, _ = hostile
    tables = [path for path in files if path.suffix == '.csv']
    cells = [cell for path in tables for row in csv.reader(io.StringIO(path.read_text(encoding='utf-8'), newline='')) for cell in row]
    assert len(tables) > 10 and "'=1+1" in cells and any(cell.startswith('-0.') for cell in cells)
    assert not [cell for cell in cells if re.match(r'[=+\-@\t\r]', cell) and not re.fullmatch(r'[+-]?[\d.]+(e[+-]?\d+)?', cell)]
    assert set(NAMES) <= set(unquote_formulas(pd.read_csv(root/'tables'/'table_09.csv', keep_default_na=False)).method)


def test_no_name_is_a_command_of_latex(hostile):
    root, _, _ = hostile
    for path in root.glob('tables/*.tex'):
        text = path.read_text(encoding='utf-8')
        commands = set(re.findall(r'\\([a-z]+)', re.sub(r'\\text[a-z]+\{\}', '', text)))
        assert commands <= {'usepackage', 'begin', 'end', 'centering', 'resizebox', 'textwidth', 'caption', 'label', 'toprule', 'midrule', 'bottomrule', 'pm'}, commands
        bare = re.sub(r'\\[{}]', '', text)
        assert bare.count('{') == bare.count('}') and '\x1b' not in text


def test_names_with_formulas_are_read_back(tmp_path):
    folder = make_run(tmp_path)
    df = pd.read_csv(folder/'predictions.csv', dtype=dict(uid=str))
    names = [*FORMULAS, *df.uid[len(FORMULAS):]]
    (folder/'predictions.csv').write_text(csv_text(df.assign(uid=names)), encoding='utf-8')
    assert read_predictions(folder).uid.tolist()+read_predictions(folder, 'val').uid.tolist() == names
    assert collect(tmp_path).problem.tolist() == ['']
    pack_runs([tmp_path], tmp_path/'published')
    texts = [gzip.decompress(path.read_bytes()).decode() for path in tmp_path.glob('published/*.gz')]
    assert "'=HYPERLINK" in texts[0] and ',=' not in texts[0] and ',"=' not in texts[0]
    again = read_predictions(unpack_runs(tmp_path/'published', tmp_path/'cache')/'finediving'/folder.name)
    assert again.uid.tolist() == names[:len(again)] and again.pred.tolist() == read_predictions(folder).pred.tolist()


def test_a_published_file_cannot_write_elsewhere(good, tmp_path):
    file = pack_runs([good], tmp_path/'published')[0]
    lines = file.read_text().splitlines(True)
    for bad in ('../../outside,', 'finediving,..', 'C:,x'):
        file.write_text(lines[0]+re.sub('^[^,]*,[^,]*' if bad[-1] != ',' else '^[^,]*,', bad, lines[1])+''.join(lines[2:]))
        (tmp_path/'published'/'checksums.json').unlink(missing_ok=True)
        with pytest.raises(ValueError, match='need names of a dataset and of a run'): unpack_runs(tmp_path/'published', tmp_path/'cache')
    assert not list(tmp_path.glob('outside*'))


def test_figures_show_names_as_they_are(preds, good, tmp_path):
    df, runs = next(iter(preds.values())), collect(good)
    table = ours_vs_paper('IX', runs.assign(method=runs.method.replace('i3d_mlp', NAMES[3])))
    note = 'weights $a$ \\frac{\nseed 0 $'
    steps = [plot_scatter(dict.fromkeys([*NAMES[3:6], '_x', 'y'*5000], df), 'synthetic', note), plot_cs(dict.fromkeys([*NAMES, '_x'], df), 'real', note),
             plot_parse(None, np.ones((9, 2))/2, [3], [4], NAMES[3:5], 'real', note), plot_table(table)]
    with matplotlib.rc_context({'svg.fonttype': 'none'}):
        for i, fig in enumerate(steps):
            fig.savefig(tmp_path/f'{i}.svg') # a formula that is none raises here
            assert ElementTree.parse(tmp_path/f'{i}.svg').getroot().tag.endswith('svg')
    text = squeezed(Parsed((tmp_path/'1.svg').read_text(encoding='utf-8')).text)
    assert all(squeezed(one_line(name)) in text for name in NAMES) and 'weights $a$ \\frac{' in text
    legend = [item.get_text() for item in steps[1].axes[0].get_legend().get_texts()]
    assert len(legend) == len(NAMES)+1 and max(map(len, (item.get_text() for item in steps[0].axes[3].texts)), default=0) < 200
    plt.close('all')


# A report is whole or the one before

def test_a_report_that_fails_leaves_the_one_before(good, tmp_path, monkeypatch):
    options = dict(seeds=(0,), n=20, tests=20, sizes=False)
    build_report(good, tmp_path, **options)
    before = {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()}
    monkeypatch.setattr(build, 'page_html', lambda *args: 1/0)
    with pytest.raises(ZeroDivisionError): build_report(good, tmp_path, **options)
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before
    monkeypatch.setattr(build.shutil, 'rmtree', lambda *args, **kwargs: None) # as if it were killed: nothing is tidied up
    replace, moved = build.os.replace, []
    def killed(source, target):
        if len(moved) == 3: raise KeyboardInterrupt
        if '.report.ready' in Path(source).parts: moved.append(target)
        replace(source, target)
    monkeypatch.setattr(build.os, 'replace', killed)
    with pytest.raises(KeyboardInterrupt): build_report(good, tmp_path, **options)
    monkeypatch.undo()
    assert (tmp_path/'.report.ready').is_dir() and (tmp_path/'README.md').read_bytes() == before[tmp_path/'README.md']
    build_report(good, tmp_path, **options)
    assert {path: path.read_bytes() for path in tmp_path.rglob('*') if path.is_file()} == before


EXTRAS = {'votes.csv': lambda text: text[:len(text)//2], 'watched.csv': lambda text: text.replace('pred', 'x', 1),
          'parsing.csv': lambda text: ''.join(text.splitlines(True)[:5])}


def test_a_damaged_extra_table_is_named_in_its_section(tmp_path):
    folders = [fake_run(tmp_path/'runs', config_of(grid_base('smoke'), 'fspn', seed), 5., n=12, watched=True, votes=True) for seed in (0, 1)]
    for k, folder in enumerate(folders, 1):
        for file, damage in EXTRAS.items(): (folder/file).write_text(damage((folder/file).read_text()))
        index = open_index(tmp_path/'runs', seeds=(0, 1), n=20, tests=20, sizes=False)
        sections = (votes_section(index, tmp_path), epochs_section(index), parsing_section(index, tmp_path))
        for file, section in zip(EXTRAS, sections):
            words = section_md(section)
            assert all(f'{file} of finediving/{damaged.name}: ' in words for damaged in folders[:k]) and 'Left out: ' in words
            unseen = section.table is None or 'source' in section.table and (section.table.source != '').all() # quoted rows stay
            assert unseen == (k == 2) and set(index.main.run) == {f'finediving/{run.name}' for run in folders}


DROPPED = {'votes.csv': ('m_25', 'true'), 'watched.csv': ('split', 'epoch'), 'parsing.csv': ('split', 'tiou')}
ODD = {'votes.csv': ('m_5', 'x'), 'watched.csv': ('pred', ''), 'parsing.csv': ('pred_2', '')}


@pytest.mark.parametrize('damaged', [0, 1])
def test_each_column_that_a_section_reads_is_checked(tmp_path, damaged):
    "A column less, a vote more, and a cell without a number, in the first or in the second seed"
    folders = [fake_run(tmp_path/'runs', config_of(grid_base('smoke'), 'fspn', seed), 5., n=12, watched=True, votes=True) for seed in (0, 1)]
    folder, sections = folders[damaged], (lambda index: votes_section(index, tmp_path), epochs_section, lambda index: parsing_section(index, tmp_path))
    for file, section in zip(EXTRAS, sections):
        sound = pd.read_csv(folder/file, dtype=dict(uid=str))
        sound = sound if file == 'votes.csv' else sound[sound.split == 'test']
        column, value = ODD[file]
        cases = [(sound.drop(columns=name), f'it lacks the columns {name}') for name in DROPPED[file]]
        cases.append((sound.assign(**{column: [value, *sound[column][1:]]}), f'it needs a number in each row of {column}'))
        if file == 'votes.csv': cases.append((sound.assign(m_30=sound.m_25), 'it has unknown columns m_30'))
        for table, reason in cases:
            table.to_csv(folder/file, index=False)
            words = section_md(section(open_index(tmp_path/'runs', seeds=(0, 1), n=20, tests=20, sizes=False)))
            assert f'{file} of finediving/{folder.name}: {reason}' in words.replace('\\', ''), words
        sound.to_csv(folder/file, index=False)


def test_json_of_any_shape_gives_a_page(tmp_path):
    fake_run(tmp_path, config_of(grid_base('smoke'), 'i3d_mlp', 0), 5., n=12)
    sound = fake_run(tmp_path, config_of(grid_base('smoke'), 'fspn', 0), 5., n=12)
    rng, values = np.random.default_rng(0), [None, [], {}, 'x', -1, 1e400, True, [1, {'a': 2}], {'name': []}, {'epochs': 'x'}]
    for i in range(60): # one value of one file, or of one section
        folder = shutil.copytree(sound, sound.with_name(f'run_{i}'))
        path = folder/f"{rng.choice(['config', 'metrics', 'provenance'])}.json"
        content = json.loads(path.read_text())
        key, value = rng.choice(sorted(content)), values[rng.integers(len(values))]
        if isinstance(content[key], dict) and rng.random() < .5: content[key][rng.choice(sorted(content[key]))] = value
        else: content[key] = value
        path.write_text(json.dumps(content))
    build_report(tmp_path, seeds=(0,), n=20, tests=20, sizes=False)
    runs, page = collect(tmp_path), (tmp_path/'README.md').read_text(encoding='utf-8')
    assert len(runs) == 62 and 10 < (runs.problem != '').sum() < 60
    assert all(f'`{run}`' in page for run in runs.run[runs.problem != ''])


def test_a_difference_is_that_of_the_two_rows_where_one_method_has_more_seeds(tmp_path):
    base = grid_base('demo')
    for name, miss, seeds in (('fspn', 5., range(5)), ('i3d_mlp', 9., range(5)), ('usdl', 7., range(3))):
        for seed in seeds: fake_run(tmp_path, config_of(base, name, seed), miss)
    nine = methods_section(open_index(tmp_path, n=20, tests=20, sizes=False), 'finediving')
    table = nine.table[nine.table.protocol == 'w_dn'].set_index('method')
    for name in ('usdl', 'i3d_mlp'): assert table.rho_gain[name] == pytest.approx(table.rho[name]-table.rho['fspn'])
    rhos = pd.Series({row.seed: row.spearman for row in collect(tmp_path).itertuples() if row.method == 'fspn'})
    assert table.rho['fspn'] == pytest.approx(rhos.mean()) != pytest.approx(rhos[:3].mean()), 'the seeds that both have would say something else'
    assert 'over all seeds of both' in nine.caption


def test_seeds_of_one_release_in_two_places_are_one_row(tmp_path):
    "Another machine has the data in another folder: the same videos and labels, so one configuration"
    for seed, place in enumerate(('/data/FineDiving', '/scratch/FineDiving')): fake_run(tmp_path, as_trained('finediving', 'demo', data_root=place, seed=seed), 5.)
    runs = collect(tmp_path, strict=True)
    assert runs.config.nunique() == 1 and average_seeds(runs).seeds.tolist() == ['0,1']
