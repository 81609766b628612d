"""Damage real annotation files and see what the readers make of it.

    python tests/fuzz_annotations.py FOLDER [--n 1000] [--seed 0]

FOLDER holds finediving/Annotations, mtl_aqa/info and aqa7 with the released annotation files. Every mutation must end in a named error
(ValueError or FileNotFoundError that names a file or a sample), in a reported exclusion, or change nothing. What became another possible
release (a score that is another score, a list that is a shorter list) is counted apart, and `fspn_check` must name the file."""
import argparse
import contextlib
import copy
import io
import pickle
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from scipy.io import loadmat, savemat

from fspn_nb.data.aqa7 import read_aqa7
from fspn_nb.data.check import check_release
from fspn_nb.data.finediving import read_finediving
from fspn_nb.data.mtl_aqa import read_mtl_aqa

READERS = {'finediving': (read_finediving, 'finediving/Annotations'), 'mtl_aqa': (read_mtl_aqa, 'mtl_aqa/info'), 'aqa7': (read_aqa7, 'aqa7')}
SHARE = {'finediving': .2, 'mtl_aqa': .35, 'aqa7': .45}  # by what one reading costs
ODD = [None, float('nan'), float('inf'), -1, 10**9, 'x', '', b'bytes', [], {}, (), True, 1+2j, [None], {'a': 1}, np.zeros((2, 2)), np.array(['a'], dtype=object), set()]


def flip(data, rng):
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8, 64])): data[rng.randrange(len(data))] = rng.randrange(256)
    return bytes(data)


def truncate(data, rng): return data[:rng.choice([0, 1, len(data)-1, rng.randrange(len(data))])]


def block(data, rng):
    a, n = rng.randrange(len(data)), rng.randrange(1, 400)
    return data[:a]+rng.choice([b'', bytes(n), data[a:a+n]*2, rng.randbytes(n)])+data[a+n:]


def _deep(value, rng):
    "A container inside `value` and one of its keys"
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        k = rng.choice(keys)
        if isinstance(value[k], (dict, list)) and len(value[k]) and rng.random() < .9: value = value[k]
        else: return value, k


def _pickled(change):
    def mutate(data, rng):
        value = copy.deepcopy(pickle.loads(data))  # the unchanged, trusted file
        place, key = _deep(value, rng)
        change(value, place, key, rng)
        return pickle.dumps(value, protocol=rng.choice([2, 3, 4, 5]))
    return mutate


def _drop(value, place, key, rng): del place[key]
def _retype(value, place, key, rng): place[key] = rng.choice(ODD)
def _rename(value, place, key, rng):
    if isinstance(place, dict): place[rng.choice(ODD[:8]+['other', (1, 2, 3)]) if rng.random() < .8 else (999, 999)] = place.pop(key)
    else: place.append(place[key])
def _stretch(value, place, key, rng):
    x = place[key]
    if isinstance(x, np.ndarray): place[key] = rng.choice([x[:-1], np.concatenate([x, x]), x.astype(float)+.5, x.reshape(1, -1), x.astype(str), -x])
    elif isinstance(x, (int, float)): place[key] = rng.choice([x*100, -x, x+.5, x*1e300, str(x)])
    elif isinstance(x, str): place[key] = rng.choice([x*500, '../'+x, x+'\0', x[::-1]])
    else: place[key] = rng.choice([x*2 if isinstance(x, (list, tuple)) else None, str(x)])


def _matlab(change):
    def mutate(data, rng):
        name, table = next((k, v) for k, v in loadmat(io.BytesIO(data)).items() if not k.startswith('__'))
        name, table = change(name, table.copy(), rng)
        savemat(out := io.BytesIO(), {name: table}, do_compression=rng.random() < .5)
        return out.getvalue()
    return mutate


def _cell(name, table, rng):
    table[rng.randrange(len(table)), rng.randrange(3)] = rng.choice([np.nan, np.inf, -1, 0, 7, 8, 1.5, 1e9, 1e-9])
    return name, table
def _column(name, table, rng): table[:, rng.randrange(3)] *= rng.choice([0, -1, .01, 100, 1.5]); return name, table
def _shape(name, table, rng): return name, rng.choice([table[:, :2], table.T, table[:0], table[:1], table.ravel(), np.hstack([table, table])])
def _kind(name, table, rng): return name, rng.choice([table.astype(complex), table.astype(str), table.astype(object), table.astype(np.int16), table > 0, {'a': table}])
def _variable(name, table, rng): return rng.choice(['x', name+'s', name.upper()]), table
def _rows(name, table, rng): return name, np.vstack([table, table[[rng.randrange(len(table))]]])


BYTES = {'bytes flipped': flip, 'truncated': truncate, 'block lost or doubled': block}
PICKLE = {'key removed': _pickled(_drop), 'type changed': _pickled(_retype), 'key renamed or doubled': _pickled(_rename), 'value out of bounds': _pickled(_stretch)}
MAT = {'cell changed': _matlab(_cell), 'column in another unit': _matlab(_column), 'other shape': _matlab(_shape), 'other type': _matlab(_kind),
       'other variable': _matlab(_variable), 'row doubled': _matlab(_rows)}


def read(dataset, folder):
    "(samples, problems, printed) of one reading"
    problems, printed = [], io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings():
        warnings.simplefilter('error')
        return READERS[dataset][0](None, folder, problems=problems), problems, printed.getvalue()


def outcome(dataset, folder, whole, seconds=20):
    "What one reading of a damaged folder ends in"
    def late(*_): raise TimeoutError
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try: samples, problems, printed = read(dataset, folder)
    except (ValueError, FileNotFoundError) as e:
        named = re.search(r'\.(pkl|mat)|_split|_annotation|\d+/\d+|\(\S+, \d+\)|_list', str(e))
        return 'named error' if named else f'UNNAMED {type(e).__name__}: {str(e)[:120]}'
    except TimeoutError: return 'HANG'
    except BaseException as e: return f'ANOTHER EXCEPTION {type(e).__name__}: {str(e)[:120]}'
    finally: signal.alarm(0)
    if problems: return 'reported exclusion'
    if samples == whole[0]: return 'no effect'
    if printed != whole[2]: return 'reported exclusion'
    with contextlib.redirect_stdout(io.StringIO()): findings = check_release(dataset, None, folder)
    return 'seen by fspn_check' if 'changed file' in set(findings.kind) else 'SILENCE'


def fuzz(dataset, source, n, seed=0):
    "[(kind of mutation, outcome)] of `n` mutations of the files in `source`"
    rng, whole, results = random.Random(f'{dataset}{seed}'), read(dataset, source), []
    kinds = BYTES | (MAT if dataset == 'aqa7' else PICKLE)
    with tempfile.TemporaryDirectory() as tmp:
        folder = Path(tmp)/'annotations'
        shutil.copytree(source, folder)
        files = sorted(p for p in folder.iterdir() if p.suffix in ('.pkl', '.mat'))
        for i in range(n):
            path, kind = rng.choice(files), list(kinds)[i % len(kinds)]
            data = path.read_bytes()
            path.write_bytes(kinds[kind](data, rng))
            results.append((kind, outcome(dataset, folder, whole)))
            path.write_bytes(data)
    return results


def main():
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('folder', type=Path)
    p.add_argument('--n', type=int, default=1000)
    p.add_argument('--seed', type=int, default=0)
    a = p.parse_args()
    bad = 0
    print('| dataset | mutation | named error | reported exclusion | no effect | seen by fspn_check | anything else |\n|---|---|---|---|---|---|---|')
    for dataset, share in SHARE.items():
        began, results = time.time(), fuzz(dataset, a.folder/READERS[dataset][1], round(share*a.n), a.seed)
        for kind in dict(results):
            c = Counter(result for k, result in results if k == kind)
            cols = [c.pop(name, 0) for name in ('named error', 'reported exclusion', 'no effect', 'seen by fspn_check')]
            bad += sum(c.values())
            print(f"| {dataset} | {kind} | {' | '.join(map(str, cols))} | {dict(c) or 0} |", flush=True)
        print(f'{dataset}: {len(results)} mutations, {time.time()-began:.0f} s', file=sys.stderr)
    return bad > 0


if __name__ == '__main__': sys.exit(main())
