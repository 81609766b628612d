"""Train and publish every table anew on larger synthetic releases, in as many sittings as it takes

    make publication                       or: python docs/publish.py [--runs DIR] [--minutes 170] [--workers 2]

Sizes follow from `reports/benchmarks/power.csv` (tests/power_study.py). What is finished is not trained again, so the same command goes on after a break; with
`--minutes` it begins no training after so many, with `--datasets` it trains on these alone: features of one class of AQA-7 take minutes, those of FineDiving
half an hour, so a short sitting is well spent on AQA-7. The finished runs are packed into reports/publication/ at the end of each sitting: committed, they are where the
next sitting goes on, also on another machine. All runs come from the same code: a checkout with changes is refused, and so are runs of other code; `--afresh`
deletes them. At the end reports/published/ is written from these runs alone, the page from that, and reports/publication/ is gone.
"""
import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import FIRST_COMPLETED,wait
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKED = ROOT/'reports'/'publication' # runs of a publication that is under way
SIZES = dict(finediving=(300, 300), mtl_aqa=(300, 300), aqa7=(100, 60)) # training and test videos; of AQA-7 in each class
SEEDS, MORE_SEEDS = '0,1,2', '3,4' # every row; the rows that the headlines rest on
HEADLINE = 'fspn,fspn_viterbi,i3d_mlp'
READING = ('fspn_nb/analysis', 'fspn_nb/report', 'fspn_nb/inspect', 'fspn_nb/share') # of the code, what reads finished runs and trains nothing
CODE = ('fspn_nb', 'requirements.lock', *(f':!{path}' for path in (*READING, 'fspn_nb/_modidx.py', 'fspn_nb/ledger.csv'))) # what a training rests on


def size(dataset):
    "The release of a dataset, as a run notebook takes it"
    return 'synthetic.n_train={} synthetic.n_test={}'.format(*SIZES[dataset])


def parts():
    "(notebook, parameters) of all that is trained, as `planned_trainings` takes them"
    from fspn_nb.methods import METHODS,lacking_labels
    methods = [name for name, row in METHODS.items() if not row.finetune_only and name not in ('fspn_s', 'fspn_m')]
    n_train, n_test = SIZES['finediving']
    yield 'ablations', dict(seeds=SEEDS, n_train=n_train, n_test=n_test)
    # w/ DD is not in the paper's table: its runs would be rows of two seeds
    yield 'finediving', dict(methods=HEADLINE, seeds=MORE_SEEDS, per_difficulty=False, changes=size('finediving'))
    for dataset in ('mtl_aqa', 'aqa7'):
        able = ','.join(name for name in methods if not lacking_labels(name, dataset))
        yield dataset, dict(methods=able, seeds=SEEDS, changes=size(dataset))
        yield dataset, dict(methods=HEADLINE, seeds=MORE_SEEDS, changes=size(dataset))


def planned():
    "All trainings, those that read the same features one after the other"
    from fspn_nb.experiments.plan_files import planned_trainings
    from fspn_nb.training.prepare import input_fields
    trainings = {}
    for notebook, given in parts():
        with contextlib.redirect_stdout(io.StringIO()): found = planned_trainings(notebook, given)[0] # a line for each run
        for training in found: trainings.setdefault(training.run, replace(training, keep_weights=False))
    groups = {}
    for training in trainings.values(): groups.setdefault(input_fields(training.cfg), []).append(training)
    return list(groups.values())


def work(groups, out, until, workers, datasets=tuple(SIZES)):
    "Train what is not finished, on `datasets` alone; how many are left of all, and what went wrong"
    from fspn_nb.experiments.grid import _work,encode_all,is_there
    from fspn_nb.processes import worker_pool
    todo = [[training for training in group if not is_there(out/training.run, False)] for group in groups]
    left, problems = sum(map(len, todo)), []
    print(f'== {left} of {sum(map(len, groups))} trainings to do', flush=True)
    if not left: return left, problems
    with worker_pool(workers) as pool:
        for group in [group for group in todo if group and group[0].cfg.dataset in datasets]:
            if time.time() > until: break
            encode_all([training.cfg for training in group], pool, workers)
            running = {}
            while group or running:
                while group and len(running) < workers and time.time() < until:
                    training = group.pop(0)
                    running[pool.submit(_work, training.cfg, out, 'cpu', training.extras, False)] = training
                if not running: break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    training, (status, seconds, rho, problem) = running.pop(future), future.result()
                    if problem: problems.append(f'{training.run}: {problem}')
                    else: left -= 1
                    print(f'{training.run}: {status}, {seconds/60:.1f} minutes, rho {rho:.4f}, {left} left {problem}', flush=True)
    return left, problems


def baselines(out):
    "The predictors that see no frame, of each release"
    from fspn_nb.config import make_config,override
    from fspn_nb.experiments.grid import write_baselines
    from fspn_nb.protocols import PROTOCOLS
    for dataset, (n_train, n_test) in SIZES.items():
        base = make_config(dataset, 'demo', synthetic__n_train=n_train, synthetic__n_test=n_test)
        actions = [name for name, variant in PROTOCOLS[dataset].variants.items() if variant.action]
        write_baselines(*[override(base, protocol=action) for action in actions] or [base], out=out)


def git(*args):
    "What git prints"
    return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def begin(folder):
    "Take over the packed runs; refuse a checkout with changes, and runs of other code"
    from fspn_nb.analysis.published import unpack_runs
    if changed := git('status', '--porcelain', '--untracked-files=no', '--', '.', ':!reports'): # which this command itself writes
        raise SystemExit(f'need a checkout without changes, so that a commit names the code of all runs, got:\n{changed}\ncommit them first')
    mark, head = folder/'commit.json', (now := git('rev-parse', 'HEAD'))
    for file in (mark, PACKED/'commit.json'):
        if not file.is_file(): continue
        began = json.loads(file.read_text())['commit']
        if changed := git('diff', '--stat', began, head, '--', *CODE):
            raise SystemExit(f'need the code of {began[:8]}, from which the runs in {file.parent} come, got other code:\n{changed}\n'
                             f'go on there (git checkout {began[:8]} && git checkout {now[:8]} -- reports/publication), or begin anew with --afresh')
        head = began
    folder.mkdir(parents=True, exist_ok=True)
    mark.write_text(json.dumps(dict(commit=head)))
    if not (PACKED/'runs.csv').is_file(): return
    for run in unpack_runs(PACKED).glob('*/*/'):
        target = folder/run.relative_to(run.parents[1])
        if not (target/'metrics.json').is_file(): shutil.copytree(run, target, dirs_exist_ok=True)


def pack(folder):
    "Put the finished runs where git can keep them"
    from fspn_nb.analysis.published import pack_runs
    PACKED.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder/'commit.json', PACKED/'commit.json') # first: the checksums are of all files
    pack_runs([folder], PACKED)


def run(name, notebook, parameters, folder):
    "Execute one notebook with papermill; its output lies in `folder`"
    options = [text for pair in parameters.items() for text in ('-r', pair[0], str(pair[1]))]
    began = time.time()
    print(f'== {name}: nbs/{notebook}.ipynb {" ".join(options)}', flush=True)
    command = [sys.executable, '-m', 'papermill', f'nbs/{notebook}.ipynb', folder/f'{name}.ipynb', '--no-progress-bar', *options]
    subprocess.run(command, cwd=ROOT, check=True, env=os.environ|dict(OMP_NUM_THREADS='1'))
    print(f'== {name}: {(time.time()-began)/60:.0f} minutes', flush=True)


def publish(folder):
    "The published files and the page, from the runs in `folder` alone"
    from fspn_nb.analysis.published import pack_runs
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
    shutil.rmtree(PACKED, ignore_errors=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--runs', default='reports/runs/publication', help='folder of the runs')
    parser.add_argument('--minutes', type=float, default=float('inf'), help='begin no training after so many minutes')
    parser.add_argument('--datasets', nargs='+', choices=SIZES, default=[*SIZES], help='train on these alone in this sitting')
    parser.add_argument('--workers', type=int, default=os.cpu_count() or 1, help='trainings side by side, one thread each')
    parser.add_argument('--afresh', action='store_true', help='delete the runs that are there')
    args = parser.parse_args()
    folder, until = (ROOT/args.runs).resolve(), time.time()+60*args.minutes
    if args.afresh:
        for left in (folder, folder.with_name(f'{folder.name}_pictures'), PACKED): shutil.rmtree(left, ignore_errors=True)
    begin(folder)
    try: left, problems = work(planned(), folder, until, args.workers, args.datasets)
    finally: pack(folder)
    if problems: raise SystemExit('\n'.join([f'{len(problems)} trainings failed:', *problems]))
    if left: raise SystemExit(f'{left} trainings are left; the same command goes on')
    baselines(folder)
    publish(folder)


if __name__ == '__main__':
    sys.path.insert(0, str(ROOT))
    main()
