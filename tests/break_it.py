"""Breaks every stage on purpose and writes the table of stages x faults

    python tests/break_it.py [--only TEXT] [--module NAME] [--minutes 30] [--workers 2] [--out reports/benchmarks/faults.csv]

Each case (tests/break_*.py) runs in a process and a folder of its own. Status 1 where a case fails, takes too long or did not get its turn; a case
whose means are not on this machine is listed as absent, with the reason.
"""
import argparse
import contextlib
import ctypes
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

from fault_cases import Absent,load_cases

ROOT = Path(__file__).resolve().parents[1]


def _own_mounts():
    "Disks that a case mounts end with its process, also where it is killed"
    if sys.platform == 'linux' and not os.geteuid() and ctypes.CDLL(None).unshare(0x20000) == 0: # CLONE_NEWNS
        subprocess.run(['mount','--make-rprivate','/'], check=False, capture_output=True)


def _child(name, folder, pipe):
    "Run one case in this process (a group of its own) and send what came out"
    os.setsid()
    _own_mounts()
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    try:
        result = {c.name: c for c in load_cases()}[name].run(Path(folder))
        answer = result.result,result.message
    except Absent as error: answer = 'absent',str(error)
    except BaseException as error: answer = 'FAILED',f'{type(error).__name__}: {error} | {traceback.format_exc()[-1500:]}'
    with contextlib.suppress(BrokenPipeError): pipe.send(answer) # too late: its row says so already


def run_case(c, deadline):
    "A row of the table"
    left,start = deadline-time.monotonic(),time.monotonic()
    row = dict(stage=c.stage, fault=c.fault, case=c.name)
    if left < 10: return row | dict(result='NO TURN', message='the minutes were over', seconds=0.)
    context = multiprocessing.get_context('spawn')
    receive,send = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix='fspn_break_', ignore_cleanup_errors=True) as folder:
        child = context.Process(target=_child, args=(c.name, folder, send))
        child.start()
        send.close()
        try: result,message = receive.recv() if receive.poll(min(c.seconds, left)) else ('TOO LONG', f'more than {min(c.seconds, left):.0f} s')
        except EOFError: result,message = 'FAILED','the process of the case ended without a word'
        child.join(10)
        if child.is_alive(): _end_group(child.pid)
        child.join()
    return row | dict(result=result, message=message.replace(folder, 'FOLDER'), seconds=round(time.monotonic()-start, 1))


def _end_group(pid):
    "End a case that hangs, with its children"
    import signal
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: pass


def main(argv=None):
    "Write the table; status 1 where a case did not hold"
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', default='', help='part of a stage, a fault or a name of a case')
    parser.add_argument('--module', default='', help='only cases of one module: break_disk')
    parser.add_argument('--minutes', type=float, default=30)
    parser.add_argument('--workers', type=int, default=2)
    parser.add_argument('--out', type=Path, default=None, help='a CSV file; without it the table is only printed')
    args = parser.parse_args(argv)
    cases = [c for c in load_cases() if any(args.only in text for text in (c.stage, c.fault, c.name)) and args.module in ('', c.run.__module__)]
    deadline,rows = time.monotonic()+60*args.minutes,[]
    with ThreadPoolExecutor(args.workers) as pool:
        for row in pool.map(lambda c: run_case(c, deadline), sorted(cases, key=lambda c: -c.seconds)):  # the long ones first
            rows.append(row)
            print(f"{row['result']:<10} {row['seconds']:6.1f} s  {row['stage']} x {row['fault']} ({row['case']}): {row['message']}", flush=True)
    table = pd.DataFrame(rows, columns=['stage', 'fault', 'case', 'result', 'message', 'seconds']).sort_values(['stage', 'fault', 'case'])
    if args.out: table.to_csv(args.out, index=False)
    bad = [r for r in rows if r['result'].isupper()]
    print(f'{len(rows)} cases, {len(bad)} did not hold, {sum(r["result"] == "absent" for r in rows)} absent, {sum(r["seconds"] for r in rows):.0f} s in all')
    sys.exit(bool(bad))


if __name__ == '__main__': main()
