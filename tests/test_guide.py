"The numbers of docs/guide.md are those of the CSV files that it names"
import json
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fspn_nb.analysis.class_averages import compare_averages
from fspn_nb.analysis.compare import compare
from fspn_nb.analysis.parse_quality import overlap_gain,parse_table
from fspn_nb.analysis.published import unpack_runs
from fspn_nb.config import make_config
from fspn_nb.protocols import SPORTS

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT/'docs'/'guide.md').read_text(encoding='utf-8')
NUMBER = r'-?\d*\.?\d+'


def benchmark(name): return pd.read_csv(ROOT/'reports'/'benchmarks'/name)


def is_rounded(text, value):
    "Whether the number `text` is `value`, rounded as `text` is"
    decimals = len(text.partition('.')[2])
    return abs(float(text)-value) <= .5*10**-decimals+1e-9


def assert_numbers(text, *values):
    "The numbers of `text`, in their order, are `values`"
    found = re.findall(NUMBER, text)
    assert len(found) == len(values), f'{text!r} has {len(found)} numbers, need {len(values)}'
    wrong = [(printed, value) for printed, value in zip(found, values) if not is_rounded(printed, value)]
    assert not wrong, f'{text!r}: {wrong}'


def said(pattern):
    "What the guide says in the one place that matches `pattern`, which has one group"
    found = re.findall(pattern, GUIDE)
    assert len(found) == 1, f'{pattern!r}: {len(found)} places'
    return found[0]


def table_after(words):
    "The table that follows `words`, as lists of cells without its head"
    lines = GUIDE[GUIDE.index(words):].splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith('|'))
    end = next(i for i, line in enumerate(lines) if i > begin and not line.startswith('|'))
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in lines[begin+2:end]]


def test_a_wrong_digit_is_found():
    assert_numbers('.908 (p = .07)', .9081, .07167)
    for value in (.9086, .9074): assert not is_rounded('.908', value)
    with pytest.raises(AssertionError): assert_numbers('.908', .918)
    with pytest.raises(AssertionError, match='need 2'): assert_numbers('.908', .908, .07)


def test_the_table_of_fspn_viterbi():
    table = benchmark('viterbi.csv').set_index(['dataset', 'protocol', 'method'])
    rows, blocks = table_after('`reports/benchmarks/viterbi.csv`'), table.index.droplevel('method').unique()
    assert len(rows) == 2*len(blocks) == 8
    for row, (block, metric) in zip(rows, [(block, metric) for block in blocks for metric in ('rho', 'r_l2_x100')]):
        own, fspn, smt = (table.loc[*block, method] for method in ('fspn_viterbi', 'fspn', 'i3d_smt'))
        assert_numbers(row[1], own[metric])
        for cell, other in zip(row[2:], (fspn, smt)): assert_numbers(cell, other[metric], other[f'{metric}_p'])
    cuts = table.loc['finediving'].tiou
    assert_numbers(said(r'Cuts: temporal IoU (\S+ w/ DN)'), cuts['w_dn', 'fspn_viterbi'])
    assert_numbers(said(r'our aim of \.87\*\*\) and (\S+) w/o DN'), cuts['wo_dn', 'fspn_viterbi'])
    assert_numbers(said(r'FSPN (\S+ and \S+), and a linear classifier'), cuts['w_dn', 'fspn'], cuts['wo_dn', 'fspn'])


def test_the_teachers_of_the_steps():
    table = benchmark('parsers.csv').groupby('case').mean(numeric_only=True)
    tiou, whole = table.tiou, table.filter(like='whole method', axis=0)
    ends = lambda start: (lambda rows: (rows.min(), rows.max()))(tiou[tiou.index.str.startswith(start)])
    assert_numbers(said(r'release of seed 1, constant (\S+)\): transport'), *tiou[tiou.index.str.startswith('the same cuts')])
    assert_numbers(said(r'as good as Viterbi \((\S+ to \S+ against \S+)\),'), *ends('ASOT'), tiou['Viterbi (FSPN-Viterbi)'])
    assert_numbers(said(r'those of TOT nearly \((\S+ to \S+)\)'), *ends('TOT'))
    assert_numbers(said(r'worse than the constant \((\S+ and \S+)\)'), *sorted(tiou[tiou.index.str.startswith('change points')]))
    assert_numbers(said(r'warm-up of 5 % \((\S+)\)'), tiou['Viterbi, warm-up 5%'])
    assert_numbers(said(r'the scene in place of the actor \((\S+)\)'), tiou['Viterbi, the scene in place of the actor'])
    one, own = whole.loc['whole method: one judge for all steps'], whole.loc['whole method: FSPN-Viterbi']
    costs = [own.rho-rho for rho in (one.rho, whole.rho['whole method: steps see each other'])]
    assert_numbers(said(r'One judge for all steps (costs \S+ of rho \(\S+ against \S+, R \S+ against \S+\))'),
                   costs[0], one.rho, own.rho, one.r_l2_x100, own.r_l2_x100)
    assert_numbers(said(r'steps that see each other (\S+);'), costs[1])
    assert_numbers(said(r'gradients of the score into the cuts change nothing \((\S+)\)'),
                   whole.rho['whole method: gradients of the score into the cuts'])


MAPS = {'Grad-CAM, Mixed_5c': ('gradcam', 'Mixed_5c', 'grey'), 'the same, counted from zero': ('gradcam', 'Mixed_5c', 'zero'),
        'LayerCAM, Mixed_5c': ('layercam', 'Mixed_5c', 'grey'), '**HiResCAM, Mixed_4f**': ('hirescam', 'Mixed_4f', 'grey'),
        'occlusion itself': ('occlusion', 'pixels', 'grey')}


def test_the_table_of_heat_maps():
    table = benchmark('heat_methods.csv').query("stream == 'scene'").set_index(['method', 'layer', 'reference', 'measure']).sort_index()
    rows = table_after('`reports/benchmarks/heat_methods.csv`')
    assert [row[0] for row in rows] == [*MAPS]
    for name, *cells in rows:
        own = table.loc[MAPS[name]]
        for cell, measure, unit in zip(cells, ('agreement with occlusion', 'insertion', 'deletion', 'share in the box'), (1, 1, 1, 100)):
            if measure in own.index: assert_numbers(cell, *own.loc[measure, ['gain', 'lo', 'hi']]*unit)
            else: assert (name, cell) == ('occlusion itself', '')
        for cell, where in zip(cells[4:], ('frames', 'place')):
            if name == 'occlusion itself': continue
            trained, shuffled = (own.loc[f'lost heat on the {where} of the fault, {network}'] for network in ('trained', 'shuffled'))
            assert_numbers(cell, *trained[['gain', 'lo', 'hi']]*100, shuffled.gain*100)


def test_the_intervals_of_a_score():
    table = benchmark('conformal.csv')
    own = table[table.method == 'fspn_viterbi'].set_index(['protocol', 'on', 'interval'])
    held = lambda protocol, on='test', interval='plain', names=('covered',): [
        value if name == 'width' else 100*value for name, value in own.loc[(protocol, on, interval), [*names]].items()]
    ends = ('covered', 'lo', 'hi', 'width')
    assert_numbers(said(r'the interval holds (\S+ % of the test dives w/ DN \(\d+ to \d+ % from training to training; \d+ points)'),
                   *held('w_dn', names=ends))
    assert_numbers(said(r'points wide\) and (\S+ % w/o DN \(\d+ to \d+ %; \d+ points)'), *held('wo_dn', names=ends))
    plus = [value for name in ('covered', 'width') for protocol in ('w_dn', 'wo_dn')
            for value in held(protocol, interval='CV+, five trainings', names=(name,))]
    assert_numbers(said(r'130 dives\) (holds \d+ and \d+ % and is \d+ and \d+) points wide'), *plus)
    votes = held('w_dn', interval='spread of votes', names=('width', 'covered'))
    assert_numbers(said(r"which is what the paper's averaging offers, (is \d+ points wide and holds \d+ %)"), *votes)
    assert_numbers(said(r'intervals from training dives (hold \d+ %)'), *held('w_dn', interval='training dives'))
    other = [*held('w_dn', 'other'), *held('wo_dn', 'other'), *held('w_dn', 'dark')]
    assert_numbers(said(r'read the same way (\d+ % hold \(w/o DN \d+ %\), \*\*on test dives at half the brightness only \d+ %)'), *other)
    published = table[table.method == 'all'].set_index('on')
    validation, halves = (published.loc[f'published, {kind}'] for kind in ('validation only', 'half of validation and test'))
    assert_numbers(said(r'Over the (\d+ published runs of FineDiving the intervals hold \d+ %)'), validation.seeds, 100*validation.covered)
    assert_numbers(said(r'of which all these runs share five draws\) (and \d+ %)'), 100*halves.covered)


def test_what_is_called_outside_of_training():
    called = benchmark('novelty.csv').query("detector == 'nearest 1'").set_index('video').called
    assert_numbers(said(r'At a stated 5 % false alarms (\d+ %) were measured'), 100*called['test dives (false alarms)'])
    noticed = ['gym vault', 'ski big air', 'grey clip', 'noise', *called.index[called.index.str.startswith('real frames')]]
    assert len(noticed) == 6 and (called[noticed] == 1).all() and said(r'(vaults, ski jumps, grey clips, noise and both real films) are noticed')
    assert said('(two of three) dives played backwards') and np.isclose(called['dive backwards'], 2/3, atol=.001)
    assert (called[['dive, half as bright', 'dive of another release']] < .05).all()


@pytest.fixture(scope='session')
def published():
    "Folder of the runs of the published tables"
    return Path(unpack_runs(ROOT/'reports'/'published'))


@pytest.fixture(scope='session')
def publication(published):
    "FineDiving's runs with their models' settings"
    configs = {file.parent: json.loads(file.read_text()) for file in (published/'finediving').glob('*/config.json')}
    return {run: config['model'] for run, config in configs.items() if config['clip']['orientation'] == 'correct'} # others are rows of their own


def runs_of(publication, name, protocol, **switches):
    "Folders of a method's runs, one for each seed, of those with its usual switches but for `switches`"
    usual = json.loads(json.dumps(asdict(make_config('finediving', 'demo').model)))|dict(name=name)|switches
    chosen = ('adapter', 'standardise') # as its method has them; without its layer FSPN is another row
    same = lambda model: all(model[key] == value for key, value in usual.items() if key not in chosen)
    runs = [run for run, model in publication.items() if same(model) and (name != 'fspn' or model['adapter'] != 'off')]
    return sorted(run for run in runs if run.name.startswith(f'{name}-{protocol}-frozen-'))


def test_what_is_left_of_the_lead_with_more_dives_and_searched_rates(publication):
    between = lambda *runs: compare(*runs, n=50, tests=50).set_index('metric')
    viterbi, fspn = ({block: runs_of(publication, name, block) for block in ('w_dn', 'wo_dn')} for name in ('fspn_viterbi', 'fspn'))
    assert {len(runs) for own in (viterbi, fspn) for runs in own.values()} == {5}
    with_dn, without = (between(viterbi[block], fspn[block]) for block in viterbi)
    assert_numbers(said(r'w/ DN rho (\S+ against \S+ \(p = \S+\)) and R x100'), *with_dn.loc['rho', ['a', 'b', 'p']])
    assert_numbers(said(r'and R x100 (\S+ against \S+ \(p = \S+\)), w/o DN'), *with_dn.loc['r_l2_x100', ['a', 'b', 'p']])
    assert_numbers(said(r'w/o DN (\S+ against \S+ \(p = \S+\) and \S+ against \S+ \(p = \S+\))\. Above FSPN without'),
                   *without.loc['rho', ['a', 'b', 'p']], *without.loc['r_l2_x100', ['a', 'b', 'p']])
    smt = between([run for run in viterbi['w_dn'] if int(run.name.split('-s')[1][0]) < 3],
                  runs_of(publication, 'fspn', 'w_dn', use_iap=False, use_mtf=False))
    assert smt[['seeds_a', 'seeds_b']].eq(3).all(axis=None)
    assert_numbers(said(r'three seeds, (\S+ against \S+, p = \S+; R \S+ against \S+, p = \S+)\)').replace('R', ''),
                   *smt.loc['rho', ['a', 'b', 'p']], *smt.loc['r_l2_x100', ['a', 'b', 'p']])
    cuts = {(name, block): parse_table(pd.DataFrame(dict(label=name, seed=range(5), run=runs)), n=0) for name, own in
            (('fspn_viterbi', viterbi), ('fspn', fspn)) for block, runs in own.items()}
    mean = lambda *key: cuts[key].tiou[cuts[key].seed.notna()].mean()
    gains = [overlap_gain(viterbi[block]) for block in viterbi]
    constant = mean('fspn_viterbi', 'w_dn')-gains[0]['gain']
    assert_numbers(said(r'temporal IoU (\S+ w/ DN and \S+ w/o DN, against \S+) for the same two frames in every dive').replace('DN', ''),
                   mean('fspn_viterbi', 'w_dn'), mean('fspn_viterbi', 'wo_dn'), constant)
    assert_numbers(said(r'\(p < \.001\), (\S+ and \S+) for FSPN'), mean('fspn', 'w_dn'), mean('fspn', 'wo_dn'))
    assert all(gain['p'] < .001 for gain in gains)


def seeds_of(published, dataset, method, block):
    "Folders of the five seeds of a headline method, which has one row in each block of these datasets"
    runs = sorted((published/dataset).glob(f'{method}-{block}-frozen-*'))
    assert len(runs) == 5, (dataset, method, block)
    return runs


def test_fspn_viterbi_beside_fspn_on_mtl_aqa(published):
    between = {block: compare(*(seeds_of(published, 'mtl_aqa', name, block) for name in ('fspn_viterbi', 'fspn')), n=50, tests=50).set_index('metric') for block in ('w_dd', 'wo_dd')}
    assert_numbers(said(r'On MTL-AQA w/o DD it leads, rho (\S+ against \S+ \(p = \S+\))'), *between['wo_dd'].loc['rho', ['a', 'b', 'p']])
    assert_numbers(said(r'and R x100 (\S+ against \S+) \(p < \.001\); w/ DD'), *between['wo_dd'].loc['r_l2_x100', ['a', 'b']])
    assert between['wo_dd'].p['r_l2_x100'] < .001
    assert_numbers(said(r'w/ DD it does not \((\S+ against \S+, p = \S+; \S+ against \S+, p = \S+)\)'),
                   *between['w_dd'].loc['rho', ['a', 'b', 'p']], *between['w_dd'].loc['r_l2_x100', ['a', 'b', 'p']])


def test_fspn_viterbi_beside_fspn_on_aqa7(published):
    own, other = ({sport: seeds_of(published, 'aqa7', name, sport) for sport in SPORTS} for name in ('fspn_viterbi', 'fspn'))
    average = compare_averages(own, other).set_index('metric')
    table = pd.read_csv(ROOT/'reports'/'tables'/'table_10.csv')
    shown = table[(table.protocol == 'average') & table.rho.notna()].set_index('method')
    assert_numbers(said(r'nothing is beyond chance on average: rho (\S+ against \S+ \(p = \S+\))'), *shown.rho[['fspn_viterbi', 'fspn']], average.p['rho'])
    assert_numbers(said(r'and R x100 (\S+ against \S+ \(p = \S+\)); by class'), *average.loc['r_l2_x100', ['a', 'b', 'p']])
    classes = {sport: compare(own[sport], other[sport], n=50, tests=50).set_index('metric') for sport in SPORTS}
    assert_numbers(said(r'only Diving differs in rho \((\S+ against \S+, p = \S+)\)'), *classes['diving'].loc['rho', ['a', 'b', 'p']])
    assert {sport for sport, row in classes.items() if row.p['rho'] < .05} == {'diving'}
    assert {sport for sport, row in classes.items() if row.p['r_l2_x100'] < .05} == {'diving', 'ski_big_air'}


def table(name): return pd.read_csv(ROOT/'reports'/'tables'/f'{name}.csv')


def test_what_carries_the_lead():
    "The paragraph below the table of what was measured, from the published tables"
    parts, beyond = (table(name).set_index('label') for name in ('table_01', 'beyond'))
    rho = parts.rho
    assert_numbers(said(r'\(I3D\+SMT\+MTF, (\S+)\), without parser'), rho['I3D+SMT+MTF'])
    assert_numbers(said(r'without parser and fusion \(I3D\+SMT, (\S+)\) and with'), rho['I3D+SMT'])
    assert_numbers(said(r'with the parser alone \(I3D\+IAP, (\S+)\)'), rho['I3D+IAP'])
    assert_numbers(said(r"from the full model's \((\S+), three seeds\)"), rho['FSPN (Ours)'])
    assert (parts.rho_p_holm[['I3D+SMT+MTF', 'I3D+SMT', 'I3D+IAP']] > .05).all()
    assert_numbers(said(r'lead over I3D\+MLP \((\S+)\) is comparing'), rho['I3D+MLP'])
    assert_numbers(said(r'dive with exemplars \((\S+) when scores'), beyond.rho['absolute scores'])
    assert beyond.index[beyond.rho_p_holm < .05].tolist() == ['absolute scores']
    cuts = table('parsing').set_index('label').tiou
    assert_numbers(said(r'same two frames \(temporal IoU (\S+) against'), cuts['FSPN (Ours)'])
    xi = table('standing').set_index(['dataset', 'protocol', 'method'])
    musdl = xi.loc['mtl_aqa', 'wo_dd', 'musdl']
    assert_numbers(said(r'beyond chance on MTL-AQA \(\+(\S+) in rho, Holm p = \S+\)'), musdl.rho_gain)
    assert_numbers(said(r'beyond chance on MTL-AQA \(\+\S+ in rho, Holm p = (\S+)\)'), musdl.rho_p_holm)
    assert xi.loc['finediving', 'wo_dn', 'musdl'].rho_verdict == 'not told apart'


def test_fspn_on_aqa7():
    average = table('table_10').query("protocol == 'average' and rho == rho").set_index('method').rho
    assert_numbers(said(r'beyond chance \(I3D\+MLP (\S+), FSPN \S+\); class'), average.i3d_mlp)
    assert_numbers(said(r'beyond chance \(I3D\+MLP \S+, FSPN (\S+)\); class'), average.fspn)
    page = (ROOT/'reports'/'README.md').read_text().split('## Table X: AQA-7')[1].split('\n## ')[0]
    assert 'FSPN is above 9 of 10 methods, above 7 of them beyond chance' in page
    classes = re.findall(r'^- ([^:]+): FSPN minus I3D\+MLP is \S+ in rho \(Holm p [<=] ([.\d]+)\)', page, re.M)
    assert len(classes) == 6 and {name for name, p in classes if float(p) < .05} == {'Gym Vault', 'BigSki.'}
