"""Lay out the documentation's pages in _docs/source and build them with Sphinx into _docs/html.

The tree mirrors the repository, so that the relative links of README and notebooks hold here as they do there.
Warnings are errors: a link that leads nowhere fails the build.
"""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT/'_docs'
SOURCE = OUT/'source'
AREAS = {'base': 'Ground floor', 'data': 'Data', 'synthetic': 'Synthetic releases', 'actor': 'The actor', 'models': 'FSPN and its backbone',
         'peers': 'Other methods', 'batches': 'Batches', 'training': 'Training', 'analysis': 'Analysis', 'experiments': 'Experiments',
         'report': 'Report', 'inspect': 'A closer look', 'share': 'Handing on'}
RUN_FIRST = ('run_finediving', 'run_mtl_aqa', 'run_aqa7', 'run_ablations', 'report', 'score_clip', 'actor_and_heat', 'bench_throughput')


def toctree(entries, caption='', hidden=False, depth=1):
    "A MyST toctree"
    options = [f':caption: {caption}']*bool(caption)+[':hidden:']*hidden+[f':maxdepth: {depth}']
    return '\n'.join(['```{toctree}', *options, '', *entries, '```', ''])


def page_of(cells):
    "The cells that a reader of the site sees: directives go, hidden cells go"
    for cell in cells:
        text = ''.join(cell['source'])
        if cell['cell_type'] == 'code' and re.search(r'^#\| *(hide|default_exp)', text, re.M): continue
        cell['source'] = re.sub(r'^#\|.*\n', '', text, flags=re.M).splitlines(True)
        yield cell


def copy_notebook(path, target):
    "A notebook as a page; where an executed copy is kept under reports/notebooks, its outputs are shown"
    executed = ROOT/'reports'/'notebooks'/path.name
    nb = json.loads((executed if executed.is_file() else path).read_text(encoding='utf-8'))
    nb['cells'] = list(page_of(nb['cells']))
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(nb, ensure_ascii=False), encoding='utf-8')


def signature(node, lines):
    "The head of a function as it is written, comments of its parameters included"
    first, last = node.lineno, max(node.body[0].lineno-1, node.lineno)
    return '\n'.join(line[node.col_offset:] for line in lines[first-1:last])


def entry(node, lines, level=3):
    "Markdown of one public function or class"
    doc = ast.get_docstring(node) or ''
    out = [f"{'#'*level} {node.name}", '']
    if isinstance(node, ast.ClassDef):
        body = [n for n in node.body if isinstance(n, (ast.AnnAssign, ast.FunctionDef)) and not getattr(n, 'name', '').startswith('__')]
        fields = [lines[n.lineno-1].strip() for n in body if isinstance(n, ast.AnnAssign)]
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == '__init__'), None)
        head = [f"class {node.name}({', '.join(ast.unparse(b) for b in node.bases)})".replace('()', '')+':', *('    '+f for f in fields)]
        if init: head += ['', signature(init, lines)]
        out += ['```python', '\n'.join(head), '```', '', doc, '']
        for n in body:
            if isinstance(n, ast.FunctionDef) and not n.name.startswith('_'): out += [entry(n, lines, level+1)]
    else: out += ['```python', signature(node, lines), '```', '', doc, '']
    return '\n'.join(out)


def api_page(area):
    "Every public function and class of one area, with a link to the notebook that defines it"
    out = [f'# API: {AREAS[area]}', '']
    for path in sorted((ROOT/'nbs'/area).glob('*.ipynb')):
        name = path.stem[3:]
        module = ROOT/'fspn_nb'/('' if area == 'base' else area)/f'{name}.py'
        lines = module.read_text(encoding='utf-8').splitlines()
        tree = ast.parse('\n'.join(lines))
        dotted = f"fspn_nb.{'' if area == 'base' else area+'.'}{name}"
        out += [f'## {dotted}', '', f'{ast.get_docstring(tree)}. Defined in [{name}](../nbs/{area}/{path.name}).', '']
        out += [entry(n, lines) for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and not n.name.startswith('_')]
    return '\n'.join(out)


def link_folders(page):
    "Send links to folders, which are no pages, to the repository"
    folder = page.parent.relative_to(SOURCE)
    there = lambda m: f'](https://github.com/fspn-nb/fspn_nb/tree/main/{(folder/m[1]).as_posix()})'
    page.write_text(re.sub(r'\]\((?![a-z]+:)([^)#]+)/\)', there, page.read_text(encoding='utf-8')), encoding='utf-8')


def lay_out():
    "Write the whole source tree"
    shutil.rmtree(SOURCE, ignore_errors=True)
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        if path.parent != ROOT/'nbs' and path.parent.name not in AREAS: continue
        copy_notebook(path, SOURCE/path.relative_to(ROOT))
    for path in (ROOT/'nbs').glob('*.md'): shutil.copy(path, SOURCE/'nbs'/path.name)
    shutil.copytree(ROOT/'reports', SOURCE/'reports', ignore=shutil.ignore_patterns('runs', 'notebooks', '.*'))
    for path in (SOURCE/'reports').rglob('*.md'):
        if path.name != 'README.md': path.write_text('---\norphan: true\n---\n'+path.read_text(encoding='utf-8'), encoding='utf-8')
    for name in ('README.md', 'LICENSE', 'CITATION.cff', 'Makefile', 'settings.ini', 'environment.yml', 'requirements.lock'):
        if (ROOT/name).is_file(): shutil.copy(ROOT/name, SOURCE/name)
    (SOURCE/'docs').mkdir()
    shutil.copy(ROOT/'docs'/'guide.md', SOURCE/'docs'/'guide.md')
    (SOURCE/'api').mkdir()
    (SOURCE/'areas').mkdir()
    for area, title in AREAS.items():
        (SOURCE/'api'/f'{area}.md').write_text(api_page(area), encoding='utf-8')
        books = [f'../nbs/{area}/{p.stem}' for p in sorted((ROOT/'nbs'/area).glob('*.ipynb'))]
        (SOURCE/'areas'/f'{area}.md').write_text(f'# {title}\n\n'+toctree([*books, f'../api/{area}']), encoding='utf-8')
    for path in (SOURCE/'README.md', SOURCE/'reports'/'README.md'): link_folders(path)
    runs = [f'nbs/{n}' for n in RUN_FIRST if (ROOT/'nbs'/f'{n}.ipynb').is_file()]
    parts = [('Start here', ['Overview <README>', 'A five-minute walk <nbs/index>', 'nbs/glossary', 'nbs/tutorial_new_method', 'docs/guide']), ('Results', ['reports/README']),
             ('Notebooks to run', runs), ('Notebooks to read', [f'areas/{a}' for a in AREAS])]
    index = '# fspn_nb\n\nFSPN for action quality assessment, as notebooks: the method, the protocols of its peers, tables and figures with intervals.\n\n'
    (SOURCE/'index.md').write_text(index+'\n'.join(toctree(e, c) for c, e in parts), encoding='utf-8')


if __name__ == '__main__':
    lay_out()
    command = [sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-j', 'auto', '-c', str(ROOT/'docs'), str(SOURCE), str(OUT/'html')]
    status = subprocess.run(command).returncode
    if status: sys.exit(f'the site was not built: each line above is a warning, and a warning is an error here (status {status})')
    print(OUT/'html'/'index.html')
