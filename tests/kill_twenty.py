"""Kills a training twenty times at random moments, half of them while a checkpoint is being written, and compares where it ends

    python tests/kill_twenty.py FOLDER [TIMES]

Each time is a run of its own: started, killed with SIGKILL, started again and left alone. Its weights and its predictions.csv must be those of a run
that nobody touched, bit for bit. FOLDER keeps kills.csv; a row says how far the killed run had come, and what it left behind.
"""
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import torch

from fspn_nb.config import finediving,run_id,save_cfg
from fspn_nb.training.checkpoint import checksum,newest_ckpt

CFG = finediving('smoke', train__epochs=16, train__val_fraction=.2, model__dropout=.3)


def start(folder):
    "The trainer, in a process of its own"
    return subprocess.Popen([sys.executable, '-m', 'fspn_nb.train', str(save_cfg(CFG, folder/'config.json')), '--out', str(folder), '--device', 'cpu', '--max-overhead', '.3'],
                            env=dict(os.environ, OMP_NUM_THREADS='1'), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def result(folder):
    "(checksum of the weights, hash of predictions.csv) of a finished run"
    run = folder/CFG.dataset/run_id(CFG)
    subprocess.run([sys.executable, '-m', 'fspn_nb.evaluate', str(run), '--device', 'cpu'], check=True, capture_output=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    return checksum(torch.load(run/'last.pt', weights_only=True)['model']), hashlib.sha256((run/'predictions.csv').read_bytes()).hexdigest()[:12]


def kill(folder, within_write, rng, began_training, whole):
    "Start, kill, and say what was there: seconds, epoch and step of the newest checkpoint, unfinished files"
    run,p,t = folder/CFG.dataset/run_id(CFG),start(folder),time.time()
    target = rng.uniform(began_training, whole)
    while time.time()-t < target and p.poll() is None: time.sleep(.001)
    while within_write and p.poll() is None and not list(run.glob('.last.pt.*.part')): pass
    p.send_signal(signal.SIGKILL)
    killed = p.wait() == -signal.SIGKILL
    state = newest_ckpt(run, run.name) or dict(epoch=0, within_epoch=None)
    return dict(asked='while writing' if within_write else 'any time', killed=killed, second=round(time.time()-t, 2), epoch=state['epoch'], step=(state['within_epoch'] or dict(step=0))['step'], torn=len(list(run.glob('.last.pt.*.part'))))


def main(folder, times=20):
    "Write kills.csv; status 1 where any run ended elsewhere"
    folder,rng,rows = Path(folder),random.Random(0),[]
    p,t = start(folder/'whole'),time.time()
    log = folder/'whole'/CFG.dataset/run_id(CFG)/'log.csv'
    while p.poll() is None and not log.exists(): time.sleep(.01)
    began = time.time()-t
    if p.wait(): raise RuntimeError(p.stderr.read().decode())
    whole,expected = time.time()-t,result(folder/'whole')
    for k in range(times):
        here = folder/f'run_{k}'
        row = kill(here, k%2 == 1, rng, began, whole-.5)
        again = start(here)
        if again.wait(): raise RuntimeError(again.stderr.read().decode())
        weights,predictions = result(here)
        rows.append(dict(kill=k+1, **row, weights_equal=weights == expected[0], predictions_equal=predictions == expected[1]))
        print(rows[-1], flush=True)
        pd.DataFrame(rows).to_csv(folder/'kills.csv', index=False)
        shutil.rmtree(here)
    sys.exit(not all(r['killed'] and r['weights_equal'] and r['predictions_equal'] for r in rows))


if __name__ == '__main__': main(sys.argv[1], *map(int, sys.argv[2:]))
