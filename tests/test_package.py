"What a stranger meets first: the package, its commands, the README"
import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib.metadata import distributions
from pathlib import Path

from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]


def settings():
    p = ConfigParser(delimiters=['='])
    p.read(ROOT/'settings.ini', encoding='utf-8')
    return p['DEFAULT']


def test_pins_that_work_together():
    dev = settings()['dev_requirements']
    assert 'nbdev==2.4.14' in dev and 'execnb==0.1.18' in dev and 'fastcore>=1.12.24,<2' in dev


def test_every_pin_can_be_installed_on_the_oldest_python():
    oldest = tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['requires-python'].removeprefix('>=')+'.0'
    pins = dict(line.split('==') for line in (ROOT/'requirements.lock').read_text().split() if '==' in line)
    allowed = {dist.name: dist.metadata['Requires-Python'] for dist in distributions() if pins.get(dist.name) == dist.version}
    assert len(allowed) > 100, 'the environment must be that of the lock file'
    newer = {name: python for name, python in allowed.items() if python and oldest not in SpecifierSet(python)}
    assert not newer, f'need pins that install on Python {oldest}, got {newer}; Debian 12 has 3.11.2'


def test_lock_file_has_every_requirement():
    locked = {line.split('==')[0].lower() for line in (ROOT/'requirements.lock').read_text().splitlines() if '==' in line}
    wanted = {re.split(r'[=<>\[]', r)[0].lower() for k,v in settings().items() if k.endswith('requirements') for r in v.split()}
    assert wanted <= locked, f'not in requirements.lock: {wanted-locked}'
    assert not re.search(r'file:|/(home|root|work|tmp)/', (ROOT/'requirements.lock').read_text())


def test_every_dynamic_field_is_given_by_setup():
    dynamic = set(tomllib.loads((ROOT/'pyproject.toml').read_text())['project']['dynamic'])
    assert {'version','dependencies','optional-dependencies','scripts'} <= dynamic


def test_console_commands_exist():
    import importlib
    for line in settings()['console_scripts'].split():
        module, _, name = line.split('=')[1].partition(':')
        assert callable(getattr(importlib.import_module(module), name)), line


def test_readme_names_every_notebook_and_both_commands():
    text = (ROOT/'README.md').read_text()
    assert 'make run' in text and 'make test' in text and 'papermill nbs/run_finediving.ipynb' in text
    missing = [p.stem for p in (ROOT/'nbs').glob('*.ipynb') if p.stem not in text]
    assert not missing, f'not in the map of README: {missing}'


def test_readme_shows_only_files_that_exist():
    links = re.findall(r'\]\(([^)#:]+)\)', (ROOT/'README.md').read_text())
    assert links and not [link for link in links if not (ROOT/link).exists()]


def test_citation():
    import yaml
    cff = yaml.safe_load((ROOT/'CITATION.cff').read_text())
    assert cff['preferred-citation']['doi'] == '10.1109/TIP.2023.3331212' and cff['version'] == settings()['version']


def test_training_needs_no_notebook_tools():
    code = ("import sys; sys.modules.update({k: None for k in ('nbdev','fastcore','papermill','nbformat','IPython','av','captum','onnxruntime')}); "
            'import fspn_nb.train, fspn_nb.evaluate')
    assert subprocess.run([sys.executable, '-c', code], cwd=ROOT).returncode == 0


def test_results_in_readme_are_what_the_published_tables_say():
    import pandas as pd
    section = (ROOT/'README.md').read_text().split('## Results')[1].split('\n## ')[0]
    table = pd.concat([pd.read_csv(ROOT/'reports'/'tables'/f'table_{n}.csv') for n in ('09', '10', '11')])
    ours = {f'{r.rho:.3f} [{r.rho_lo:.3f}, {r.rho_hi:.3f}]'.replace('0.', '.') for r in table.itertuples() if r.rho == r.rho}
    shown = re.findall(r'-?0?\.\d{3} \[-?0?\.\d{3}, -?0?\.\d{3}\]', section)
    assert len(shown) >= 6 and set(shown) <= ours, f'in README but not in reports: {set(shown)-ours}'


def test_committed_numbers_follow_from_committed_predictions():
    from fspn_nb.analysis.published import unpack_runs
    from fspn_nb.analysis.runs import collect
    runs = collect(unpack_runs(ROOT/'reports'/'published'), strict=True)
    assert {'fspn','i3d_mlp'} <= set(runs.method)
