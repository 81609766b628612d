"What a user does first: open a notebook in JupyterLab in a browser, run all cells, edit a parameter, run all cells again"
import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BROWSERS = ('chromium','chromium-browser','google-chrome')
SWITCHES = ['--no-sandbox','--disable-gpu','--disable-quic','--no-first-run','--disable-background-networking',
            '--disable-component-update','--disable-sync']
RUN_ALL = "() => window.jupyterapp.commands.execute('notebook:run-all-cells')"
# what the notebook that is open holds: source, execution count and outputs of each code cell
CELLS = """() => window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code').map(c => ({
    source: c.model.sharedModel.getSource(), tags: c.model.getMetadata('tags') || [], count: c.model.executionCount,
    outputs: c.model.outputs.toJSON()}))"""
EDIT = """([i, text]) => window.jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type === 'code')[i]
    .model.sharedModel.setSource(text)"""
KERNEL = "() => window.jupyterapp.shell.currentWidget.sessionContext.session?.kernel?.status"


def skip_without_browser():
    "The browser's path and playwright's entry, or a skip that says what is missing"
    lacking = pytest.fail if os.environ.get('FSPN_NEEDS_BROWSER') else pytest.skip # continuous integration installs a browser
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None: lacking(f'no browser: none of {", ".join(BROWSERS)} is installed')
    try: from playwright.sync_api import sync_playwright
    except ImportError: lacking("no playwright: pip install -e '.[dev]'")
    return browser,sync_playwright


@contextlib.contextmanager
def lab_server(root, home):
    "Address and token of a JupyterLab that serves the checkout `root`, with settings of its own in `home`"
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    token,folders = secrets.token_hex(8),{name: home/name.lower() for name in
        ('JUPYTER_CONFIG_DIR','JUPYTER_RUNTIME_DIR','JUPYTER_DATA_DIR','JUPYTERLAB_SETTINGS_DIR','JUPYTERLAB_WORKSPACES_DIR','IPYTHONDIR')}
    for folder in folders.values(): folder.mkdir(parents=True)
    labconfig = folders['JUPYTER_CONFIG_DIR']/'labconfig'
    labconfig.mkdir()
    quiet = {'disabledExtensions': {'@jupyterlab/apputils-extension:announcements': True}}
    (labconfig/'page_config.json').write_text(json.dumps(quiet))
    env = {**os.environ, **{name: str(folder) for name,folder in folders.items()}, 'HOME': str(home), 'PYTHONPATH': str(root),
           'FSPN_CACHE': os.environ.get('FSPN_CACHE') or str(ROOT/'.cache'), 'OMP_NUM_THREADS': '2'}
    env.pop('IN_TEST', None)
    command = [sys.executable, '-m', 'jupyterlab', '--no-browser', '--allow-root', '--ip=127.0.0.1', f'--port={port}',
               '--ServerApp.port_retries=0', f'--IdentityProvider.token={token}', f'--ServerApp.root_dir={root}',
               '--expose-app-in-browser', '--LabApp.extension_manager=readonly']
    with open(home/'lab.log', 'w') as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as server:
        try:
            wait_for(lambda: answers(f'http://127.0.0.1:{port}/api?token={token}'), 60, 'JupyterLab to start')
            yield f'http://127.0.0.1:{port}',token
        finally: server.terminate()


def answers(url):
    "Whether a server answers at `url`"
    try:
        with urllib.request.urlopen(url, timeout=5): return True
    except OSError: return False


def wait_for(condition, seconds, reason):
    "Wait until `condition()` is true"
    end = time.time()+seconds
    while not condition():
        assert time.time() < end, f'waited {seconds} s for {reason}'
        time.sleep(.2)


@pytest.fixture(scope='module')
def lab(tmp_path_factory):
    "A function that opens a notebook of a copy of the checkout in a real browser"
    browser,start = skip_without_browser()
    home = tmp_path_factory.mktemp('lab')
    root = home/'copy'
    names = subprocess.run(['git','ls-files','-zco','--exclude-standard','nbs','fspn_nb','settings.ini','reports/published'], cwd=ROOT, capture_output=True,
                           text=True, check=True).stdout.split('\0')
    for name in filter(None, names): # saving writes outputs, so work on a copy
        if not (ROOT/name).is_file(): continue
        (root/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT/name, root/name)
    with lab_server(root, home) as (address,token), start() as play:
        chromium = play.chromium.launch(executable_path=browser, args=SWITCHES)
        page = chromium.new_page(viewport=dict(width=1400, height=1000))
        def _open(name):
            page.goto(f'{address}/lab/tree/nbs/{name}.ipynb?reset&token={token}')
            page.wait_for_selector('.jp-NotebookPanel .jp-Cell', timeout=60_000)
            page.evaluate('() => window.jupyterapp.restored')
            wait_for(lambda: page.evaluate(KERNEL) == 'idle', 60, 'the kernel')
            return page
        yield _open,root
        chromium.close()


def run_all(page):
    "Run All Cells, as from the menu; the code cells with their outputs, none of which is an error"
    page.evaluate(RUN_ALL)
    cells = page.evaluate(CELLS)
    errors = [f"{output['ename']}: {output['evalue']}" for cell in cells for output in cell['outputs'] if output['output_type'] == 'error']
    assert not errors, errors
    assert all(cell['count'] for cell in cells if cell['source'].strip()), 'a cell was not run'
    return cells


def set_parameter(page, **values):
    "Edit the parameters cell, as a user types into it"
    cells = page.evaluate(CELLS)
    i = next(i for i,cell in enumerate(cells) if 'parameters' in cell['tags'])
    text = cells[i]['source']
    for name,value in values.items():
        text,n = re.subn(rf'^{name} = (\'[^\']*\'|\S+)', lambda _: f'{name} = {value!r}', text, flags=re.M)
        assert n == 1, f'no parameter {name}'
    page.evaluate(EDIT, [i, text])


def pictures(cells):
    "How many cells show a picture"
    return sum(any('image/png' in output.get('data', {}) for output in cell['outputs']) for cell in cells)


def printed(cells):
    "All text that the cells printed"
    return ''.join(''.join(output['text']) for cell in cells for output in cell['outputs'] if output['output_type'] == 'stream')


def run_folders(root, pattern):
    "Run folders of FineDiving in the copy"
    return sorted((root/'reports'/'runs'/'finediving').glob(pattern))


def test_run_notebook_twice(lab):
    open_,root = lab
    page = open_('run_finediving')
    set_parameter(page, preset='smoke', methods='i3d_mlp,fspn', protocol='w_dn')
    first = run_all(page)
    assert 'fspn-w_dn-frozen-s0-' in printed(first) and pictures(first) >= 4
    assert page.locator('.jp-OutputArea img').count() >= 1, 'a picture is on the page, not only in the file'
    set_parameter(page, seeds='1', epochs=1)
    second = run_all(page)
    assert 'fspn-w_dn-frozen-s1-' in printed(second) and 'fspn-w_dn-frozen-s0-' not in printed(second)
    assert pictures(second) == pictures(first)
    logs = [run/'log.csv' for run in run_folders(root, 'fspn-w_dn-frozen-s1-*')]
    assert len(logs) == 1 and len(logs[0].read_text().splitlines()) == 2, 'the header and one epoch'


def test_index_twice(lab):
    page = lab[0]('index')
    assert pictures(run_all(page)) == pictures(run_all(page)) == 2


def test_tutorial_twice(lab):
    page = lab[0]('tutorial_new_method')
    first = run_all(page)
    set_parameter(page, out='of_my_own')
    second = run_all(page)
    assert pictures(first) == pictures(second) >= 1
    assert list((lab[1]/'nbs'/'of_my_own'/'finediving').glob('mine-*/predictions.csv')), 'the edited folder was used'


def test_score_clip_twice(lab):
    open_,root = lab
    trained = run_folders(root, 'fspn-w_dn-frozen-s0-*')
    assert trained, 'test_run_notebook_twice trains the run that is used here'
    page = open_('score_clip')
    set_parameter(page, run=str(trained[0]))
    first = run_all(page)
    set_parameter(page, difficulty=3.2, actor='none')
    second = run_all(page)
    assert pictures(first) == pictures(second) >= 2
    assert printed(first) != printed(second)
