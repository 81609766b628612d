"""How often the interval of a score holds the judges' score, on synthetic FineDiving, beside the spread of the votes

    python tests/conformal_study.py train [--methods fspn_viterbi] [--seeds 5] [--releases 1]     predictions, into reports/benchmarks/conformal_scores.csv.gz
    python tests/conformal_study.py train --runs FOLDER ...                                        the same of runs that were trained before
    python tests/conformal_study.py                                                                shares and widths from them, into reports/benchmarks/conformal.csv

A run trains on 91 of 130 dives, 39 are kept for validation, 150 are tested; both protocols, several seeds (weights, order, and which dives are kept). Runs that are in the table are not repeated.
Beside the test dives, each run scores 30 dives of another release (synthetic MTL-AQA, read as the run reads its own) and 24 test dives at half the brightness: what an interval is worth there.
`cv` rows come from five trainings, each without a fifth of the 130 dives (CV+). One thread; about a minute per training.
"""
import argparse
import itertools
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from fspn_nb.analysis.conformal import conformal_quantile,coverage_range
from fspn_nb.core import write_atomic

ROOT = Path(__file__).resolve().parents[1]
SCORES, SHARES = (ROOT/'reports'/'benchmarks'/name for name in ('conformal_scores.csv.gz', 'conformal.csv'))
KEPT, LEVEL, Z, SPLITS, OTHER, DARK = .3, .9, 1.645, 400, 30, 24
KEYS = ['release', 'method', 'protocol', 'seed', 'fold']


# ---- predictions

def release_of(seed, kept=KEPT):
    "`RunData` of 130 and 150 dives"
    from fspn_nb.config import make_config
    from fspn_nb.training.prepare import prepare
    return prepare(make_config('finediving', 'demo', synthetic__seed=seed, synthetic__n_train=130, synthetic__n_test=150, train__val_fraction=kept), 'cpu')


def with_others(data):
    "`data` with two more splits: 'other', dives of another release, and 'dark', test dives at half the brightness"
    import torch
    from fspn_nb.actor.boxes import load_actor_boxes
    from fspn_nb.batches.dataset import load_samples,read_labels
    from fspn_nb.batches.exemplars import find_candidates
    from fspn_nb.batches.features import cache_features
    from fspn_nb.batches.sources import FeatureDataset,dive_clips
    from fspn_nb.config import make_config
    from fspn_nb.core import data_cache
    from fspn_nb.file_hashes import frame_hashes
    from fspn_nb.models.backbone import feature_extractor
    from safetensors.torch import load_file,save_file
    release = load_samples(make_config('mtl_aqa', 'demo', synthetic__seed=2, synthetic__n_train=1, synthetic__n_test=60))
    release = replace(release, samples=tuple(replace(sample, uid=f'other {sample.uid}', action=sample.action.lower()) for sample in release.samples if sample.split == 'test')[:OTHER])
    named = replace(release, samples=tuple(replace(sample, uid=sample.uid.removeprefix('other ')) for sample in release.samples))
    boxes = {f'other {uid}': rows for uid, rows in load_actor_boxes(named, data.cfg.actor)[1].items()}
    encode, key = feature_extractor(data.cfg, data.device)
    other = cache_features(release.samples, data.cfg, boxes, encode, key, frame_hashes(release.samples))
    ids = data.splits['test'][:DARK]
    path = data_cache()/'features'/f'dark-{data.release.root.name}-{key}.safetensors'
    if not path.is_file():
        rows = []
        for i in ids:
            sample = data.release.samples[i]
            rows.append([encode(clips//2).float() for clips in dive_clips(sample, data.cfg.clip, data.boxes[1][sample.uid], data.cfg.actor.pad)])
        save_file(dict(zip(('scene', 'actor'), map(torch.stack, zip(*rows)))), path)
    dark, n = load_file(path), len(data.release.samples)
    samples = (*data.release.samples, *release.samples, *(replace(data.release.samples[i], uid=f'dark {data.release.samples[i].uid}') for i in ids))
    source = FeatureDataset(*(torch.cat([getattr(data.source, name), getattr(other, name), dark[name]]) for name in ('scene', 'actor')))
    splits = data.splits|dict(other=np.arange(n, n+OTHER), dark=np.arange(n+OTHER, n+OTHER+DARK))
    labels = replace(read_labels(samples, data.cfg), transitions=None) # no method that reads true steps is measured
    return replace(data, release=replace(data.release, samples=samples), labels=labels, source=source, splits=splits,
                   candidate_sets=find_candidates(samples, data.splits['train'], data.variant))


def scores_of(data, facts, splits, run=None):
    "What one training, or the one in the folder `run`, predicts: a row per dive, with the standard deviation of its votes"
    from fspn_nb.evaluate import load_model
    from fspn_nb.train import fit
    from fspn_nb.training.predict import predict
    tables, cfg = [], data.cfg
    with tempfile.TemporaryDirectory() as out:
        model = load_model(run or fit(cfg, out, 'cpu', data), data)
        for split in splits:
            ids = data.splits[split]
            pred, votes, _ = predict(model, data, ids, cfg.eval.num_exemplars)
            rows = [data.release.samples[i] for i in ids]
            tables.append(pd.DataFrame(facts|dict(split=split, uid=[row.uid for row in rows], true=[row.score for row in rows], pred=pred,
                                                  votes_sd=np.nanstd(votes, 1), difficulty=[row.difficulty for row in rows])))
    return pd.concat(tables)


def of_runs(folders):
    "Predictions of runs that were trained before, each with its own validation split"
    from fspn_nb.config import load_cfg
    from fspn_nb.training.prepare import prepare
    table, data = pd.read_csv(SCORES) if SCORES.is_file() else pd.DataFrame(columns=KEYS), None
    for folder in map(Path, folders):
        cfg = load_cfg(folder/'config.json')
        facts = dict(zip(KEYS, (cfg.synthetic.seed, cfg.model.name, cfg.protocol, cfg.seed, -1)))
        if (table[KEYS] == list(facts.values())).all(axis=1).any(): continue
        data = prepare(cfg, 'cpu', data)
        table = pd.concat([table, scores_of(data, facts, ('train', 'val', 'test'), folder)], ignore_index=True)
        save(table)
        print(*facts.values(), flush=True)


def train(methods, seeds, releases, folds):
    "Predictions of every run that the table does not have"
    from fspn_nb.config import method_schedule,override
    from fspn_nb.protocols import protocol_variant
    from fspn_nb.batches.dataset import split_indices
    from fspn_nb.batches.exemplars import find_candidates
    table = pd.read_csv(SCORES) if SCORES.is_file() else pd.DataFrame(columns=KEYS)
    for release in releases:
        data = with_others(release_of(release))
        for method, fold, seed, protocol in itertools.product(methods, (-1, *range(folds)), range(seeds), ('w_dn', 'wo_dn')):
            if fold >= 0 and seed > 0: continue # five trainings of one seed
            facts = dict(zip(KEYS, (release, method, protocol, seed, fold)))
            if (table[KEYS] == list(facts.values())).all(axis=1).any(): continue
            cfg, samples = method_schedule(override(data.cfg, model__name=method, protocol=protocol, seed=seed)), data.release.samples
            splits = data.splits|split_indices(samples[:280], KEPT, seed)
            if fold >= 0: # train on four fifths of all 130
                everyone = np.random.default_rng(7).permutation(np.concatenate([splits['train'], splits['val']]))
                splits |= dict(val=np.sort(everyone[fold::5]), train=np.sort(np.delete(everyone, slice(fold, None, 5))))
            run = replace(data, cfg=cfg, splits=splits, candidate_sets=find_candidates(samples, splits['train'], protocol_variant(cfg.dataset, protocol)))
            rows = scores_of(run, facts, ('val', 'test') if fold >= 0 else ('train', 'val', 'test', 'other', 'dark'))
            table = pd.concat([table, rows], ignore_index=True) if len(table) else rows
            save(table)
            error = (rows.true-rows.pred).abs().groupby(rows.split).mean()
            print(*facts.values(), ' '.join(f'{split} {value:.2f}' for split, value in error.items()), flush=True)


def save(table):
    "The table of predictions, written at once"
    part = SCORES.with_suffix('.part')
    table.to_csv(part, index=False, float_format='%.4f', lineterminator='\n', compression=dict(method='gzip', mtime=0))
    os.replace(part, SCORES)


# ---- shares and widths

def half_widths(calibration, target):
    "{name of an interval: half widths of its intervals for the rows of `target`}; all but the last two are split conformal"
    error, scales = (calibration.true-calibration.pred).abs(), {'plain': lambda t: np.ones(len(t)), 'by difficulty': lambda t: t.difficulty}
    middle = calibration.votes_sd.median()
    scales['by votes'] = lambda t: t.votes_sd+middle
    found = {name: conformal_quantile(error/scale(calibration), LEVEL)*np.asarray(scale(target), float) for name, scale in scales.items()}
    return found|{'spread of votes': Z*target.votes_sd.to_numpy()}


def counted(run):
    "Rows of one training: each interval on each split"
    parts, rows = dict(list(run.groupby('split'))), []
    for split in ('test', 'other', 'dark'):
        if split not in parts: continue
        target = parts[split]
        error = (target.true-target.pred).abs().to_numpy()
        widths = half_widths(parts['val'], target)|{'training dives': half_widths(parts['train'], target)['plain']}
        rows += [dict(on=split, interval=name, n_cal=len(parts['train' if name == 'training dives' else 'val']), n_test=len(target), covered=(error <= half).mean(), width=2*half.mean())
                 for name, half in widths.items()]
    return rows


def resplit(run, draws=SPLITS, half=False):
    "Validation and test dives of one training pooled and split anew: mean coverage, and its spread over splits"
    pool, rng, rows = run[run.split.isin(('val', 'test'))].reset_index(drop=True), np.random.default_rng(0), []
    n = len(pool)//2 if half else (run.split == 'val').sum()
    for _ in range(draws):
        order = rng.permutation(len(pool))
        target = pool.iloc[order[n:]]
        error = (target.true-target.pred).abs().to_numpy()
        rows += [dict(interval=name, covered=(error <= half).mean(), width=2*half.mean()) for name, half in half_widths(pool.iloc[order[:n]], target).items()]
    own = pd.DataFrame(rows).groupby('interval', sort=False)
    return [dict(on='random halves' if half else 'random splits', interval=name, n_cal=n, n_test=len(pool)-n, covered=g.covered.mean(), lo=g.covered.quantile(.025), hi=g.covered.quantile(.975), width=g.width.mean())
            for name, g in own]


def cross_validated(folds):
    "CV+ from the trainings without one fifth each (Barber et al. 2021): coverage on the test dives"
    held, test = folds[folds.split == 'val'], folds[folds.split == 'test'].pivot(index='uid', columns='fold', values='pred')
    true = folds[(folds.split == 'test') & (folds.fold == 0)].set_index('uid').true[test.index].to_numpy()
    error = (held.true-held.pred).abs().to_numpy()
    centre = test[held.fold.to_numpy()].to_numpy() # (test dives, held-out dives)
    n = len(error)
    k = int(np.ceil((n+1)*LEVEL-1e-9))
    hi, lo = np.sort(centre+error, 1)[:, k-1], -np.sort(error-centre, 1)[:, k-1]
    return [dict(on='test', interval='CV+, five trainings', n_cal=n, n_test=len(test), covered=((true >= lo) & (true <= hi)).mean(), width=(hi-lo).mean())]


def published():
    "Rows of the published runs, whose validation dives give the interval, and of random halves of their held-out dives"
    from fspn_nb.analysis.conformal import held_out_errors
    from fspn_nb.analysis.published import unpack_runs
    rows, rng = [], np.random.default_rng(0)
    for file in sorted(Path(unpack_runs(ROOT/'reports'/'published')).glob('finediving/*/predictions.csv')):
        run, kinds = file.parent, {}
        method, protocol = run.name.split('-')[:2]
        val, test = (held_out_errors(run, (split,)).values for split in ('val', 'test'))
        if not len(val): continue
        kinds['published, validation only'] = conformal_quantile(val, LEVEL), test, len(val)
        order = rng.permutation(np.concatenate([val, test]))
        half = len(order)//2
        kinds['published, half of validation and test'] = conformal_quantile(order[:half], LEVEL), order[half:], half
        per_difficulty = protocol == 'w_dd'
        rows += [dict(release=0, method=method, protocol=protocol, on=on, interval='plain', n_cal=n, n_test=len(errors), covered=(errors <= half).mean(),
                      width=np.nan if per_difficulty else 2*half) for on, (half, errors, n) in kinds.items()]
    table, keys = pd.DataFrame(rows), ['release', 'method', 'protocol', 'on', 'interval', 'n_cal', 'n_test']
    out = [dict(zip(keys, key))|dict(seeds=len(g), covered=g.covered.mean(), lo=g.covered.min(), hi=g.covered.max(), width=g.width.mean(), **dict(zip(('chance_lo', 'chance_hi'), coverage_range(key[-2], key[-1], LEVEL))))
           for key, g in table.groupby(keys, sort=False)]
    for on, g in table.groupby('on', sort=False):
        out.append(dict(release=0, method='all', protocol='all', on=on, interval='plain', seeds=len(g), covered=g.covered.mean(), lo=g.covered.quantile(.025), hi=g.covered.quantile(.975)))
    return out


def study():
    "One row per configuration, split and interval; means over seeds, with the range that chance alone would give one of them"
    table, rows = pd.read_csv(SCORES), published()
    for (release, method, protocol), own in table.groupby(KEYS[:3], sort=False):
        facts, single = dict(release=release, method=method, protocol=protocol), [run for _, run in own[own.fold < 0].groupby('seed')]
        each = pd.DataFrame([row|dict(seed=run.seed.iloc[0]) for run in single for row in counted(run)])
        for (on, name), g in each.groupby(['on', 'interval'], sort=False):
            n, m = int(g.n_cal.iloc[0]), int(g.n_test.iloc[0])
            chance = coverage_range(n, m, LEVEL) if name not in ('spread of votes', 'training dives') else (np.nan, np.nan)
            rows.append(facts|dict(on=on, interval=name, seeds=len(g), n_cal=n, n_test=m, covered=g.covered.mean(), lo=g.covered.min(), hi=g.covered.max(), chance_lo=chance[0], chance_hi=chance[1], width=g.width.mean()))
        again = pd.DataFrame([row for run in single for half in (False, True) for row in resplit(run, half=half)])
        for (on, name), g in again.groupby(['on', 'interval'], sort=False):
            n, m = int(g.n_cal.iloc[0]), int(g.n_test.iloc[0])
            chance = coverage_range(n, m, LEVEL) if name != 'spread of votes' else (np.nan, np.nan)
            rows.append(facts|dict(on=on, interval=name, seeds=len(g), n_cal=n, n_test=m, **g[['covered', 'lo', 'hi']].mean(), chance_lo=chance[0], chance_hi=chance[1], width=g.width.mean()))
        if (folds := own[own.fold >= 0]).fold.nunique() == 5: rows += [facts|dict(seeds=1)|row for row in cross_validated(folds)]
    columns = ['release', 'method', 'protocol', 'on', 'interval', 'seeds', 'n_cal', 'n_test', 'covered', 'lo', 'hi', 'chance_lo', 'chance_hi', 'width']
    write_atomic(SHARES, pd.DataFrame(rows).reindex(columns=columns).to_csv(index=False, float_format='%.3f', lineterminator='\n'))
    print(pd.DataFrame(rows).reindex(columns=columns).round(3).to_string())


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Coverage of the interval of a score.')
    parser.add_argument('what', nargs='?', choices=('train', 'count'), default='count')
    parser.add_argument('--methods', nargs='+', default=['fspn_viterbi'])
    parser.add_argument('--seeds', type=int, default=5)
    parser.add_argument('--releases', nargs='+', type=int, default=[1])
    parser.add_argument('--folds', type=int, default=5, help='trainings for CV+ with seed 0; 0: none')
    parser.add_argument('--runs', nargs='+', help='folders of trained runs, whose predictions are added; nothing is trained')
    args = parser.parse_args()
    if args.runs: of_runs(args.runs)
    else: train(args.methods, args.seeds, args.releases, args.folds) if args.what == 'train' else study()
