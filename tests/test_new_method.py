"The last step of the tutorial, done as it says: a method that is kept gets its row in Table IX"
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from fspn_nb.core import data_cache

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def read(path): return json.loads(path.read_text(encoding='utf-8'))


def source(cell): return ''.join(cell['source'])


def the_only(items, word):
    "The one of `items` that contains `word`"
    hits = [item for item in items if word in item]
    assert len(hits) == 1, f'{len(hits)} of {len(items)} contain {word!r}'
    return hits[0]


def change(path, old, new):
    "Replace the line `old`, which stands once in the notebook `path`, by the lines `new`"
    book = read(path)
    hits = [(cell, i) for cell in book['cells'] for i, line in enumerate(cell['source']) if line.rstrip('\n') == old]
    assert len(hits) == 1, f'{len(hits)} lines {old!r} in {path.name}'
    cell, i = hits[0]
    cell['source'][i:i+1] = [line+'\n' for line in new]
    path.write_text(json.dumps(book), encoding='utf-8')


def new_notebook(path, cells):
    "Write `cells` of code as a notebook"
    cells = [dict(cell_type='code', id=f'cell{i}', metadata={}, source=text.splitlines(True), execution_count=None, outputs=[])
             for i, text in enumerate(cells)]
    path.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)), encoding='utf-8')


def test_a_method_that_is_kept_gets_its_row_in_table_ix(tmp_path):
    copy, out = tmp_path/'checkout', tmp_path/'out'
    for name in ('nbs', 'fspn_nb'): shutil.copytree(ROOT/name, copy/name, ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT/name, copy)
    env = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    env |= dict(PYTHONPATH=str(copy), PATH=f'{BIN}{os.pathsep}{env["PATH"]}', FSPN_CACHE=str(data_cache().resolve()), OMP_NUM_THREADS='1')
    def run(command):
        done = subprocess.run(command, cwd=copy, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f'{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}'

    tutorial = [source(cell) for cell in read(ROOT/'nbs/tutorial_new_method.ipynb')['cells']]
    steps = [line.strip() for line in the_only(tutorial, '## To keep a method').splitlines() if line.startswith('        ')]

    imports = ['import torch', *(line for line in the_only(tutorial, 'from torch import nn').splitlines()
                                 if re.match(r'import torch|from (torch|fspn_nb.(core|models.encoder|peers.i3d_mlp)) ', line))]
    parts = ['\n'.join(imports), the_only(tutorial, 'class ClipAttention('), the_only(tutorial, 'def build_mine(')]
    number = max(int(path.name[:2]) for path in (copy/'nbs/peers').glob('*.ipynb'))+1
    new_notebook(copy/f'nbs/peers/{number:02d}_mine.ipynb', ['#| default_exp peers.mine', *(f'#| export\n{part}' for part in parts)])

    change(copy/'nbs/base/03_methods.ipynb', ')}', [f"    {the_only(steps, 'Method(')}", ')}'])
    last = "    'fspn': build_fspn,"
    change(copy/'nbs/base/08_zoo.ipynb', last, [last, f"""    {the_only(steps, "'mine': ")}"""])
    first = 'from fspn_nb.peers.i3d_mlp import build_i3d_mlp'
    change(copy/'nbs/base/08_zoo.ipynb', first, [first, the_only(steps, 'import build_mine')])

    run(the_only(steps, 'nbdev_export').split())
    run(['nbdev_test', '--path', 'nbs/base/08_zoo.ipynb'])
    run([*the_only(steps, 'papermill').split(), '-p', 'preset', 'smoke', '-p', 'out', str(out)])

    table = pd.read_csv(out/'finediving/table_09.csv')
    mine = table[table.method == 'mine']
    assert set(mine.protocol) == {'wo_dn', 'w_dn', 'w_dd'} and mine.rho.notna().all()
    assert set(mine.label) == {'Clip attention'}
    assert 'Clip attention' in (out/'finediving/table_09.md').read_text(encoding='utf-8')


def test_an_edited_method_does_not_get_the_former_weights(tmp_path):
    from torch import nn
    from fspn_nb.config import make_config
    from fspn_nb.evaluate import evaluate
    from fspn_nb.methods import METHODS,Method
    from fspn_nb.peers.i3d_mlp import build_i3d_mlp
    from fspn_nb.train import fit
    from fspn_nb.training.prepare import prepare
    from fspn_nb.zoo import BUILDERS,register_method
    def register(shift):
        def build(cfg, labels, groups):
            model = build_i3d_mlp(cfg, labels, groups)
            model.shift = shift
            return model
        register_method(Method('edited', 'Edited'), build)
    try:
        register(1.)
        data = prepare(make_config('finediving', 'smoke', model__name='i3d_mlp', synthetic__n_train=6, synthetic__n_test=4, train__epochs=1))
        cfg = make_config('finediving', 'smoke', model__name='edited', synthetic__n_train=6, synthetic__n_test=4, train__epochs=1)
        mine = prepare(cfg, reuse=data)
        assert mine.source is data.source and 'method' in mine.inputs.hashes and 'method' not in data.inputs.hashes
        run = fit(cfg, tmp_path, data=mine)
        assert evaluate(run, prepare(cfg, reuse=data))['method'] == 'edited'
        register(2.) # the cell was edited and run again
        with pytest.raises(ValueError, match='the code of the registered method'): fit(cfg, tmp_path, data=prepare(cfg, reuse=data))
        with pytest.raises(ValueError, match='the code of the registered method'): evaluate(run, prepare(cfg, reuse=data))
    finally:
        for table in (METHODS, BUILDERS): table.pop('edited', None)
