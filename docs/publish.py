"""Train and publish every table anew on larger synthetic releases, in as many sittings as it takes

    make publication                       or: python docs/publish.py [--runs DIR] [--minutes 170]

Sizes follow from `reports/benchmarks/power.csv` (tests/power_study.py). Runs go into a folder of their own; what is finished is not trained again, so the
same command goes on after a break. With `--minutes` it ends between two parts when they are over. All runs come from one commit: a checkout with changes is
refused, and so are runs of another commit; `--afresh` deletes them. At the end reports/published/ is written from these runs alone, and the page from that.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SIZES = dict(finediving=(300, 300), mtl_aqa=(300, 300), aqa7=(100, 60)) # training and test videos; of AQA-7 in each class
SEEDS, MORE_SEEDS = '0,1,2', '3,4' # every row; the rows that the headlines rest on
HEADLINE = 'fspn,fspn_viterbi,i3d_mlp'


def size(dataset):
    "The release of a dataset, as a run notebook takes it"
    return 'synthetic.n_train={} synthetic.n_test={}'.format(*SIZES[dataset])


def parts(runs):
    "(name, notebook, parameters) of all that is trained, the most important first; the grid has a process for each core, the others one each"
    from fspn_nb.methods import METHODS,lacking_labels
    methods = [name for name, row in METHODS.items() if not row.finetune_only and name not in ('fspn_s', 'fspn_m')]
    n_train, n_test = SIZES['finediving']
    notebook = lambda dataset, seeds, names: (f'run_{dataset}', dict(methods=names, seeds=seeds, changes=size(dataset), out=runs))
    yield 'grid', 'run_ablations', dict(seeds=SEEDS, n_train=n_train, n_test=n_test, out=runs)
    for dataset in ('mtl_aqa', 'aqa7'): yield dataset, *notebook(dataset, SEEDS, ','.join(name for name in methods if not lacking_labels(name, dataset)))
    for dataset in SIZES: yield f'{dataset}_more_seeds', *notebook(dataset, MORE_SEEDS, HEADLINE)


def run(name, notebook, parameters, folder):
    "Execute one notebook with papermill; its output lies in `folder`"
    options = [text for pair in parameters.items() for text in ('-r', pair[0], str(pair[1]))]
    began = time.time()
    print(f'== {name}: nbs/{notebook}.ipynb {" ".join(options)}', flush=True)
    command = [sys.executable, '-m', 'papermill', f'nbs/{notebook}.ipynb', folder/f'{name}.ipynb', '--no-progress-bar', *options]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    print(f'== {name}: {(time.time()-began)/60:.0f} minutes', flush=True)


def train(name, notebook, parameters, folder, until):
    "One part, unless it is done; False where the time is over"
    if (done := folder/f'{name}.done').is_file(): return True
    if time.time() > until: return False
    run(name, notebook, parameters, folder)
    done.touch()
    return True


def git(*args):
    "What git prints"
    return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def same_commit(folder):
    "Refuse a checkout with changes, and runs of another commit"
    if changed := git('status', '--porcelain', '--untracked-files=no', '--', '.', ':!reports'): # which this command itself writes
        raise SystemExit(f'need a checkout without changes, so that one commit names the code of all runs, got:\n{changed}\ncommit them first')
    mark, commit = folder/'commit.json', git('rev-parse', 'HEAD')
    if mark.is_file() and (began := json.loads(mark.read_text())['commit']) != commit:
        raise SystemExit(f'need the commit {began[:8]}, from which the runs in {folder} come, got {commit[:8]}; check it out, or begin anew with --afresh')
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(dict(commit=commit)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', default='reports/runs/publication', help='folder of the runs')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='begin no further part after so many minutes')
    parser.add_argument('--afresh', action='store_true', help='delete the runs that are there')
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from fspn_nb.analysis.published import pack_runs
    folder, until = (ROOT/args.runs).resolve(), time.time()+60*args.minutes
    if args.afresh:
        for left in (folder, folder.with_name(f'{folder.name}_pictures')): shutil.rmtree(left, ignore_errors=True)
    same_commit(folder)
    grid, *others = parts(folder)
    finished = [train(*grid, folder, until)]
    with ThreadPoolExecutor(2) as pool: finished += pool.map(lambda part: train(*part, folder, until), others) # an error of one waits for the other
    if not all(finished): raise SystemExit('the time is over; the same command goes on')
    pictures = folder.with_name(f'{folder.name}_pictures') # its small runs on AQA-7 have no place beside those of the tables
    if not (done := folder/'actor.done').is_file():
        run('actor', 'actor_and_heat', dict(changes=size('finediving'), out=pictures), folder)
        done.touch()
    for name in ('figures', 'tables'): shutil.copytree(pictures/name, ROOT/'reports'/name, dirs_exist_ok=True)
    published, before = ROOT/'reports'/'published', folder/'.published_before'
    if not before.is_dir(): shutil.copytree(published, before)
    try:
        shutil.rmtree(published)
        pack_runs([folder], published)
        run('report', 'report', dict(publish=True, seeds=SEEDS, out=folder), folder)
    except BaseException: # the page that was there stays
        shutil.copytree(before, published, dirs_exist_ok=True)
        raise


if __name__ == '__main__': main()
