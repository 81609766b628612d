"The report: links, forms, the same bytes twice, and numbers that follow from predictions"
import gzip
import re
import shutil
from functools import cache, partial
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import numpy as np
import pandas as pd
import pytest

from fspn_nb.analysis.compare import Scorer,ablation_table,stack_predictions
from fspn_nb.analysis.method_tables import average_cell
from fspn_nb.analysis.published import pack_runs,unpack_runs
from fspn_nb.analysis.run_groups import main_runs
from fspn_nb.analysis.runs import collect,mean_rho,read_predictions
from fspn_nb.analysis.significance import seed_mean_ci
from fspn_nb.config import override,make_config
from fspn_nb.experiments.variants import TABLE_CELLS,config_of,grid_base
from fspn_nb.metrics import cs_area,relative_l2,spearman
from fspn_nb.protocols import SPORTS
from fspn_nb.report.build import build_report,publish_report
from fspn_nb.report.fake_runs import fake_run
from fspn_nb.report.figure_sections import parsing_section
from fspn_nb.report.run_index import open_index
from fspn_nb.report.table_sections import cost_section,methods_section
from fspn_nb.report.writers import ReportSection,section_md,escape_tex,page_html,to_latex

ROOT = Path(__file__).resolve().parents[1]
PARTS = dict(fspn=5., i3d_mlp=9., i3d_smt=6., without_actor=5.5, fspn_s=7., blocks_1=6.)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    root, base = tmp_path_factory.mktemp('reports'), grid_base('smoke')
    for seed in (0, 1):
        for exp, miss in PARTS.items(): fake_run(root, config_of(base, exp, seed), miss, n=24, watched=exp in ('fspn', 'i3d_mlp'), votes=exp == 'fspn')
        for exp, miss in dict(fspn=6., i3d_mlp=9.).items(): fake_run(root, config_of(base, exp, seed, 'wo_dn'), miss, n=24)
        fake_run(root, make_config('mtl_aqa', 'smoke', seed=seed), 6., n=24)
        for sport in SPORTS: fake_run(root, make_config('aqa7', 'smoke', protocol=sport, seed=seed), 9., n=24)
    return root


@pytest.fixture(scope='module')
def built(root, tmp_path_factory):
    "Two builds of the same runs, the second from a copy elsewhere"
    copy = tmp_path_factory.mktemp('copy')/'deeper'/'reports'
    shutil.copytree(root, copy)
    outs = [tmp_path_factory.mktemp('book'), copy]
    for r, out in ((root, outs[0]), (copy, outs[1])): files, sections = build_report(r, out, seeds=(0, 1), n=40, tests=40, sizes=False)
    return outs, [f.relative_to(copy) for f in files], sections


def test_two_builds_are_the_same_bytes(built):
    (a, b), names, _ = built
    assert len(names) == len(set(names)) > 40
    assert {n.suffix for n in names} == {'.csv', '.md', '.tex', '.png', '.pdf', '.html'}
    for n in names: assert (a/n).read_bytes() == (b/n).read_bytes(), n


def test_nothing_tells_when_or_where_it_was_built(built, root):
    (a, b), names, _ = built
    for n in names:
        if n.suffix in ('.csv', '.md', '.tex', '.html'):
            text = (a/n).read_text()
            assert str(a) not in text and str(root) not in text and '\r' not in text
            assert not re.search(r'/(home|root|work|tmp|Users)/|20\d\d-\d\d-\d\d', text), n


def test_the_page_has_eleven_tables_and_the_figures(built):
    page = (built[0][0]/'README.md').read_text()
    for name in ('I', 'II', 'III', 'IV', 'V', 'VI', 'VII', 'VIII', 'IX', 'X', 'XI'): assert len(re.findall(rf'^## Table {name}:', page, re.M)) == 1, name
    for i in (6, 7, 8, 9, 11): assert f'](figures/fig_{i:02d}.png)' in page
    assert page.count('Synthetic data, not comparable with the paper') >= 11


def test_every_link_of_the_page_leads_somewhere(built):
    copy = built[0][1]
    page = (copy/'README.md').read_text()
    heads = {re.sub(r'[^\w\- ]', '', h.lower()).replace(' ', '-') for h in re.findall(r'^## (.+)$', page, re.M)}
    links = re.findall(r'\]\(([^)]+)\)', page)
    assert len(links) > 50
    for link in links: assert link[1:] in heads if link.startswith('#') else (copy/link).exists(), link
    for md in (copy/'tables').glob('*.md'):
        for link in re.findall(r'\]\(([^)]+)\)', md.read_text()): assert (md.parent/link).exists(), (md.name, link)


class Tags(HTMLParser):
    "Whether every element that is opened is closed in order"
    VOID = {'meta', 'img', 'br', 'hr', 'link'}

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.hrefs = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID: self.open.append(tag)
        self.ids += [v for k, v in attrs if k == 'id']
        self.hrefs += [v for k, v in attrs if k in ('href', 'src')]

    def handle_startendtag(self, tag, attrs): self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_html_page_stands_alone(built):
    text, tags = (built[0][1]/'report.html').read_text(), Tags()
    tags.feed(text)
    assert not tags.open and len(tags.ids) == len(set(tags.ids))
    for h in tags.hrefs: assert h[1:] in tags.ids if h.startswith('#') else (built[0][1]/h).exists(), h
    assert 'prefers-color-scheme' in text and 'viewport' in text and '<script' not in text and 'http' not in ''.join(tags.hrefs)
    assert '](' not in text and '**' not in text and '|:--' not in text


def test_latex_has_no_markdown_and_balanced_braces(built):
    for tex in (built[0][0]/'tables').glob('*.tex'):
        text = tex.read_text()
        body = text.split('\n', 1)[1]
        assert '**' not in text and '](' not in text and '`' not in text, tex.name
        bare = re.sub(r'\\[\\%&_#${}]', '', body)
        assert bare.count('{') == bare.count('}'), tex.name
        assert not re.search(r'(?<!\\)[%#$]', body.replace('{%\n', '{\n')), tex.name
        assert not re.search(r'(?<!\\)_', re.sub(r'\\label\{[^}]*\}', '', body)), tex.name
        rows = [line for line in body.splitlines() if line.endswith('\\\\')]
        assert len({len(re.findall(r'(?<!\\)&', line)) for line in rows}) == 1, tex.name


@pytest.mark.parametrize('text', ['100 % of R_l2 & {x}', '\\section{a}', '[0](finediving/a/)', '`-p tables "II"`', '<1> ~ ^ |'])
def test_escaped_text_has_no_bare_command(text):
    bare = re.sub(r'\\(textbackslash|textasciitilde|textasciicircum|textless|textgreater|textbar|textquotedbl|textasciigrave)\{\}', '', escape_tex(text))
    assert not re.search(r'(?<!\\)[%&_#$~^{}]|\\[a-z]', bare)


def test_markup_in_names_cannot_break_the_page():
    shown = pd.DataFrame(dict(row=['a|b', '<script>x</script>'], seeds=['', '']))
    section = ReportSection('t', 'T', 'c', shown.assign(runs='', label=shown.row), shown)
    page = page_html('# T\n\n'+section_md(section), '<T>')
    assert '<script' not in page and page.count('<tr>') == 3
    assert '<script' not in to_latex(shown, 'c', 't')


def test_one_edited_prediction_takes_its_run_off_the_page(built, tmp_path):
    root = tmp_path/'r'
    shutil.copytree(built[0][1], root)
    run = sorted((root/'finediving').glob('fspn-w_dn*'))[0]
    df = pd.read_csv(run/'predictions.csv')
    df.loc[0, 'pred'] += 60
    df.to_csv(run/'predictions.csv', index=False)
    index = open_index(root, (0, 1), n=20, tests=20, sizes=False)
    name = f'finediving/{run.name}'
    assert name not in set(index.cells.run) | set(index.main.run)
    assert 'evaluate the run again' in index.runs.set_index('run').problem[name]


def test_no_ablation_leaks_into_table_nine(root):
    runs = collect(root, strict=True)
    main = main_runs(runs, root)
    mine = main[main.dataset == 'finediving']
    assert not mine.duplicated(['method', 'protocol', 'seed']).any() and mine.config.groupby(mine.method).nunique().max() == 1
    assert set(mine.method) == {'fspn', 'fspn_s', 'i3d_mlp'}
    fake_run(root, override(config_of(grid_base('smoke'), 'fspn', 0), eval__num_exemplars=7, model__tau=.3), 1.)
    try: assert main_runs(collect(root), root).run.tolist() == main.run.tolist()
    finally: shutil.rmtree(next(p for p in (root/'finediving').iterdir() if f'finediving/{p.name}' not in set(runs.run)))


def test_the_command_of_a_section_trains_what_it_shows(root, tmp_path):
    index = open_index(root, (0, 1), n=20, tests=20, sizes=False)
    commands = [section.command.partition('out.ipynb ')[2] for section in (*(methods_section(index, name) for name in ('finediving', 'mtl_aqa', 'aqa7')), cost_section(index))]
    assert commands == ['-p tables "IX" -p seeds 0,1', *['-p methods fspn -p seeds 0,1']*3]
    parsed = parsing_section(index, tmp_path)
    trained = TABLE_CELLS[TABLE_CELLS.table.isin(re.search('tables "(.*)"', parsed.command)[1].split(','))]
    assert len(parsed.table) > 2 and set(parsed.table.label[parsed.table.runs != '']) <= set(trained.row) | set(trained.table+', '+trained.row)
    (tmp_path/'none').mkdir()
    empty = open_index(tmp_path/'none', (0, 1), n=20, tests=20, sizes=False)
    assert [methods_section(empty, 'mtl_aqa').command, cost_section(empty).command] == [
        f'papermill nbs/run_mtl_aqa.ipynb out.ipynb -p methods {names}' for names in ('i3d_mlp,fspn', 'musdl,core_tree,hgcn,fspn')]


def test_a_folder_without_runs_gives_a_page_of_commands(tmp_path):
    files, sections = build_report(tmp_path, n=20, tests=20, sizes=False)
    page = (tmp_path/'README.md').read_text()
    assert page.count('papermill nbs/run_ablations.ipynb out.ipynb -p tables "I" -p seeds 0,1,2') == 1
    assert 'Finished runs: none' in page and page.count('No finished run') >= 11
    assert not list((tmp_path/'figures').glob('*')) if (tmp_path/'figures').exists() else True
    assert pd.read_csv(tmp_path/'tables'/'table_01.csv').rho.isna().all()


def test_means_intervals_and_gains_are_what_they_say(root):
    index = open_index(root, (0, 1), n=100, tests=100, sizes=False)
    table = ablation_table('I', index.cells, Scorer(root, 100, 100)).set_index('label')
    row, full = table.loc['I3D+MLP'], table.loc['FSPN (Ours)']
    preds, true = stack_predictions(root, row.runs.split())
    assert row.rho == pytest.approx(np.mean([spearman(p, true) for p in preds])) and row.rho_sd == pytest.approx(np.std([spearman(p, true) for p in preds], ddof=1))
    assert (row.rho_lo, row.rho_hi) == seed_mean_ci(spearman, preds, true, n=100)
    assert row.rho_gain == pytest.approx(row.rho-full.rho) and np.isnan(full.rho_gain)
    assert row.rho_diff == pytest.approx(row.rho-.850)


def test_the_average_of_classes_is_fishers(root):
    ten = methods_section(open_index(root, (0, 1), n=100, sizes=False), 'aqa7').table
    row = ten[(ten.protocol == 'average') & (ten.method == 'fspn')].iloc[0]
    runs = collect(root)
    runs = runs[runs.dataset == 'aqa7'].set_index(['seed', 'protocol']).spearman
    assert row.rho == pytest.approx(np.mean([mean_rho(runs[s][list(SPORTS)].to_numpy()) for s in (0, 1)]))
    assert row.rho_lo < row.rho < row.rho_hi and len(row.runs.split()) == 12


# What stands in reports/ now: ten numbers, drawn with fixed seeds, computed again from the published predictions of the runs that they name

REPORTS = ROOT/'reports'
METRICS = dict(rho=(spearman, 1), r_l2_x100=(relative_l2, 100), cs_area=(partial(cs_area, top=20.), 1))


@cache
def published_runs():
    "The run folders that reports/published was made of"
    return unpack_runs(REPORTS/'published')


@cache
def printed():
    "Every number of ours that is printed with the runs that it comes from: (file, row, metric)"
    if not (REPORTS/'README.md').is_file(): pytest.skip('reports/README.md and its tables are absent: build them with nbs/report.ipynb')
    tables = {p.name: pd.read_csv(p, dtype=dict(runs=str, label=str)) for p in sorted((REPORTS/'tables').glob('*.csv'))}
    tables = {k: t for k, t in tables.items() if 'runs' in t and {'rho', 'tiou'} & set(t)}
    assert tables, 'reports/tables has no table that names its runs: build it again with nbs/report.ipynb'
    return tables, [(k, i, m) for k, t in tables.items() for m in METRICS if m in t for i in t.index[t[m].notna() & t.runs.notna()]]


def again(row, metric, root=None):
    "(value, low, high) of a printed row, from predictions.csv (votes.csv where voters are counted) alone"
    runs, (f, k), root = row.runs.split(), METRICS[metric], root or published_runs()
    if row.get('protocol') == 'average':
        meta = collect(root).set_index('run').loc[runs].reset_index()
        got = average_cell(root, meta)
        return got[metric], got[f'{metric}_lo'], got[f'{metric}_hi']
    preds, true = stack_predictions(root, runs)
    if 'exemplars' in row:
        sheets = [pd.read_csv(root/r/'votes.csv', dtype=dict(uid=str)) for r in runs]
        preds, true = np.stack([s[f'm_{int(row.exemplars)}'] for s in sheets]), sheets[0].true.to_numpy()
    f = partial(relative_l2, lo=true.min(), hi=true.max()) if f is relative_l2 else f
    lo, hi = seed_mean_ci(f, preds, true)
    return k*np.mean([f(p, true) for p in preds]), k*lo, k*hi


def check(row, metric, root=None):
    "Raise an `AssertionError` unless the printed row follows from its runs"
    value, lo, hi = again(row, metric, root)
    assert row[metric] == pytest.approx(value, abs=1e-8), f'{row.runs}: {metric} {row[metric]} printed, {value} computed'
    for name, bound in (('lo', lo), ('hi', hi)):
        if f'{metric}_{name}' in row and np.isfinite(bound): assert row[f'{metric}_{name}'] == pytest.approx(bound, abs=1e-6)


@pytest.mark.parametrize('seed', range(10))
def test_a_printed_number_recomputes(seed):
    tables, numbers = printed()
    assert numbers, 'no table in reports/tables has a number of ours'
    name, i, metric = numbers[np.random.default_rng(seed).integers(len(numbers))]
    check(tables[name].loc[i], metric)


def test_an_edited_number_is_found(built):
    root = built[0][1]
    table = pd.read_csv(root/'tables'/'table_01.csv')
    row = table[table.label == 'I3D+MLP'].iloc[0].copy()
    value, lo, hi = again(row, 'rho', root)
    row['rho_lo'], row['rho_hi'] = lo, hi # this page was built with fewer resamples
    check(row, 'rho', root)
    row['rho'] += .001
    with pytest.raises(AssertionError, match='printed'): check(row, 'rho', root)


def fault_intervals():
    "Every interval of the table of injected faults, as it is printed: signed where two networks are compared"
    t = pd.read_csv(REPORTS/'tables'/'fault_study.csv')
    return {f'{r[m]:{sign}.3f} [{r[f"{m}_lo"]:{sign}.3f}, {r[f"{m}_hi"]:{sign}.3f}]' for _, r in t[t.fault == 'all'].iterrows()
            for m, sign in (('trained', ''), ('over_untrained', '+'), ('over_shuffled', '+'))}


def test_the_intervals_of_the_fault_table_are_those_of_its_csv():
    printed()
    text, number = (REPORTS/'tables'/'fault_study.md').read_text(), r'[-+]?\d+\.\d+'
    shown = set(re.findall(rf'{number} \[{number}, {number}\]', text))
    assert shown == fault_intervals() and len(shown) > 50


@pytest.mark.parametrize('form', ['README.md', 'report.html', '*.md', '*.tex'])
def test_every_score_on_the_pages_is_one_of_the_csv_files(form):
    tables, _ = printed()
    known = set()
    for t in tables.values():
        for m, d in (('rho', 4), ('r_l2_x100', 3), ('r_l2_x100', 2), ('cs_area', 1), ('tiou', 3)):
            if f'{m}_lo' in t: known |= {f'{r[m]:.{d}f} [{r[f"{m}_lo"]:.{d}f}, {r[f"{m}_hi"]:.{d}f}]' for _, r in t.iterrows() if r[m] == r[m]}
    known |= fault_intervals()
    files = [REPORTS/form] if '*' not in form else sorted(p for k in tables for p in (REPORTS/'tables').glob(k.replace('.csv', form[1:])))
    shown = {s for p in files for s in re.findall(r'-?\d+\.\d+ \[-?\d+\.\d+, -?\d+\.\d+\]', p.read_text())}
    assert shown and shown <= known, f'on the page but in no CSV: {sorted(shown-known)[:5]}'


def test_the_committed_page_is_the_one_that_its_runs_give():
    if not (REPORTS/'README.md').is_file(): pytest.skip('reports/README.md is absent: build it with nbs/report.ipynb')
    page = (REPORTS/'README.md').read_text()
    rows = (REPORTS/'published'/'runs.csv').read_text().splitlines()
    links = re.findall(r'\]\(([^)#]+)(?:#L(\d+))?\)', page)
    assert sum(line != '' for _, line in links) > 100
    for path, line in links:
        assert (REPORTS/path).exists(), path
        if line: assert len(read_predictions(published_runs()/'/'.join(rows[int(line)-1].split(',')[:2]))) > 0


def test_the_published_page_is_rebuilt_byte_for_byte(tmp_path):
    files, _ = publish_report((), REPORTS, tmp_path)
    names = [path.relative_to(tmp_path) for path in files]
    assert len(names) > 70 and {'README.md', 'report.html'} <= {str(name) for name in names}
    for name in names: assert (tmp_path/name).read_bytes() == (REPORTS/name).read_bytes(), f'{name}: build the page again with nbs/report.ipynb -p publish True'


def test_published_files_are_what_their_runs_pack_to(tmp_path):
    for path in pack_runs([published_runs()], tmp_path):
        kept = (REPORTS/'published'/path.name).read_bytes()
        read = gzip.decompress if path.suffix == '.gz' else bytes # compressed bytes depend on the version of zlib
        assert read(kept) == read(path.read_bytes()), path.name


def test_published_runs_have_the_names_of_their_settings():
    runs = pd.read_csv(REPORTS/'published'/'runs.csv', dtype=str)
    assert not runs.run.duplicated().any() and (runs.run == runs['provenance.run_id']).all()


def test_publishing_adds_runs_and_replaces_the_same(root, tmp_path):
    options = dict(seeds=(0, 1), n=20, tests=20, sizes=False)
    first, second = tmp_path/'first', tmp_path/'second'
    for seed, folder in ((0, first), (1, second)): fake_run(folder, config_of(grid_base('smoke'), 'fspn', seed), 5., n=24)
    publish_report([first], tmp_path/'page', **options)
    once = (tmp_path/'page'/'published'/'runs.csv').read_text()
    publish_report([first, second], tmp_path/'page', **options)
    both = (tmp_path/'page'/'published'/'runs.csv').read_text()
    assert (len(once.splitlines()), len(both.splitlines())) == (2, 3)
    for run in collect(unpack_runs(tmp_path/'page'/'published')).run: assert len(read_predictions(unpack_runs(tmp_path/'page'/'published')/run)) == 24


# Packed files: what is deleted, empty, or of runs before

@pytest.fixture
def packed(tmp_path):
    "Two invented runs, one with votes, and baselines: (their folder, the files that they pack to)"
    runs, base = tmp_path/'runs', grid_base('smoke')
    for exp in ('fspn', 'i3d_mlp'): fake_run(runs, config_of(base, exp, 0), 5., n=24, votes=exp == 'fspn')
    pd.DataFrame(dict(protocol='w_dn', baseline=['constant mean'], n=24, spearman=[.1], relative_l2=[.05])).to_csv(runs/'finediving'/'baselines_24.csv', index=False)
    pack_runs([runs], tmp_path/'published')
    return runs, tmp_path/'published'


def bytes_below(folder):
    "{name: content} of all files below `folder`"
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


@pytest.mark.parametrize('name', ['finediving', 'finediving/fspn*', 'finediving/fspn*/votes.csv', 'finediving/fspn*/metrics.json',
                                  'finediving/fspn*/checksums.json', 'finediving/baselines_24.csv', '*.json'])
def test_what_is_deleted_from_the_cache_is_unpacked_again(packed, tmp_path, name, capsys):
    root = unpack_runs(packed[1], tmp_path/'cache')
    whole, (lost, *_) = bytes_below(root), root.glob(name)
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    assert unpack_runs(packed[1], tmp_path/'cache') == root and bytes_below(root) == whole
    assert 'missing or damaged: made anew' in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert unpack_runs(packed[1], tmp_path/'cache') == root and not capsys.readouterr().out, 'whole again: nothing to do'
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == before and [root] == [*(tmp_path/'cache').iterdir()]


@pytest.mark.parametrize('full', [0, 1])
def test_a_table_without_rows_is_packed_and_unpacked(packed, tmp_path, full):
    runs, _ = packed
    for i, folder in enumerate(sorted(runs.glob('*/*/'))): (folder/'log.csv').write_text('epoch,loss\n'+'1,0.5\n'*(i < full))
    pack_runs([runs], tmp_path/'published')
    again = unpack_runs(tmp_path/'published', tmp_path/'cache')
    logs = {folder.name: (folder/'log.csv').read_text() for folder in runs.glob('*/*/')}
    assert {folder.name: (folder/'log.csv').read_text() for folder in again.glob('*/*/')} == logs and len(logs) == 2
    packed_again = {path.name: path.read_bytes() for path in pack_runs([again], tmp_path/'again')}
    assert packed_again == {name: (tmp_path/'published'/name).read_bytes() for name in packed_again}


def test_a_packed_table_that_is_not_there_is_named(packed, tmp_path):
    (packed[1]/'votes.csv.gz').unlink()
    with pytest.raises(FileNotFoundError, match='need the published file .*votes.csv.gz, got none; take it from the repository'):
        unpack_runs(packed[1], tmp_path/'cache')


def test_packing_again_removes_the_tables_that_no_run_has_any_more(packed, tmp_path):
    runs, published = packed
    foreign = {'commit.json': '{}', 'notes.csv': 'a\n1\n', 'README.md': 'of others'}
    for name, text in foreign.items(): (published/name).write_text(text)
    for path in (*runs.glob('*/*/votes.csv'), *runs.glob('*/baselines_*.csv')): path.unlink()
    files = pack_runs([runs], published)
    fresh = pack_runs([runs], tmp_path/'fresh')
    assert {path.name for path in published.iterdir()} == {*foreign, 'checksums.json', *(path.name for path in files)}
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in fresh]
    assert not list(unpack_runs(published, tmp_path/'cache').glob('*/baselines_*.csv'))


def test_a_page_that_cannot_be_built_leaves_the_published_files(tmp_path, monkeypatch):
    options, page = dict(seeds=(0, 1), n=20, tests=20, sizes=False), tmp_path/'page'
    for seed, folder in ((0, 'first'), (1, 'second')): fake_run(tmp_path/folder, config_of(grid_base('smoke'), 'fspn', seed), 5., n=24)
    publish_report([tmp_path/'first'], page, **options)
    before = bytes_below(page)

    def fail(*args, **kwargs): raise RuntimeError('no page')
    with monkeypatch.context() as patch:
        patch.setattr('fspn_nb.report.build.page_html', fail)
        with pytest.raises(RuntimeError, match='no page'): publish_report([tmp_path/'second'], page, **options)
    assert bytes_below(page) == before
    publish_report([tmp_path/'second'], page, **options)
    after = bytes_below(page)
    assert after['README.md'] != before['README.md'] and len(after['published/runs.csv'].splitlines()) == 3
    publish_report((), page, **options)
    assert bytes_below(page) == after
