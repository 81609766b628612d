"""Copy executed notebooks to reports/notebooks: outputs stay, progress bars, timing and machine paths do not.

Usage: python docs/keep_executed.py EXECUTED.ipynb NAME [EXECUTED.ipynb NAME ...]
"""
import re
import sys
from pathlib import Path

import nbformat

FOLDER = Path(__file__).resolve().parents[1]/'reports'/'notebooks'
BAR = re.compile(r'^.*\d+%\|.*(\n|$)', re.M) # a progress bar, line by line
LIMIT = 1_000_000 # bytes: what a code host still renders


def strip(nb):
    "The notebook with what a reader wants to see"
    nb.metadata = {k: v for k, v in nb.metadata.items() if k in ('kernelspec', 'language_info')}
    nb.metadata['language_info'] = {'name': 'python'}
    nb.metadata['kernelspec'] = {'name': 'python3', 'display_name': 'python3', 'language': 'python'}
    for cell in nb.cells:
        cell.metadata = {k: v for k, v in cell.metadata.items() if k == 'tags'}
        if cell.cell_type != 'code': continue
        cell.execution_count = None
        for out in cell.outputs:
            if out.output_type == 'stream': out.text = BAR.sub('', out.text).lstrip('\n')
        cell.outputs = [o for o in cell.outputs if o.output_type != 'stream' or (o.name == 'stdout' and o.text.strip())]
        for out in cell.outputs: out.pop('execution_count', None)
        for out in cell.outputs: out.get('data', {}).pop('application/vnd.jupyter.widget-view+json', None)
    return nb


def keep(source, name):
    "Write reports/notebooks/NAME.ipynb; refuse one that is too large or carries a path of this machine"
    text = nbformat.writes(strip(nbformat.read(source, as_version=4)), indent=1, sort_keys=True, ensure_ascii=False)+'\n'
    if len(text.encode()) > LIMIT: raise SystemExit(f'{name}: need at most {LIMIT:,} bytes, got {len(text.encode()):,}; draw smaller figures')
    if found := re.search(r'.{40}/(home|root|work|tmp|Users)/.{40}', text): raise SystemExit(f'{name}: a path of this machine: {found[0]}')
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER/f'{name}.ipynb').write_text(text, encoding='utf-8')


if __name__ == '__main__':
    for source, name in zip(sys.argv[1::2], sys.argv[2::2]): keep(source, name)
