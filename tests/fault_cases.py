"""The table of stages x faults: where a case is registered, and what a case may use

A case is a function of one empty folder. It sets the stage up, breaks it, asserts what must hold (a clear sentence; nothing half-written that is later
believed; the next start goes on), and returns the sentence that a user saw:

    @case('checkpoints', 'disk full')
    def checkpoint_on_a_full_disk(folder):
        ...
        return outcome('named', sentence)

`quick` cases take seconds and are run by pytest too (tests/test_faults.py); the others are run by tests/break_it.py alone.
"""
from dataclasses import dataclass
from typing import Callable

STAGES = ('drawing', 'features', 'frame store', 'boxes', 'checkpoints', 'evaluation', 'tables', 'report', 'grid', 'clip page', 'run notebook', 'preparation', 'reading')
RESULTS = ('goes on', 'named', 'made anew', 'refused', 'escaped')  # what may come out of a fault; anything else is an AssertionError
CASES: list['Case'] = []


class Absent(Exception):
    "What a case needs is not on this machine; the message says what"


@dataclass(frozen=True)
class Case:
    "One cell of the table"
    stage: str
    fault: str
    run: Callable
    quick: bool = False
    seconds: int = 300

    @property
    def name(self): return self.run.__name__


@dataclass(frozen=True)
class Outcome:
    "What came out: one of `RESULTS`, and the sentence that a user saw"
    result: str
    message: str


def outcome(result, message):
    "An outcome whose result is one that the table knows"
    if result not in RESULTS: raise ValueError(f'need one of {", ".join(RESULTS)}, got {result!r}')
    return Outcome(result, ' '.join(str(message).split())[:300])


def case(stage, fault, quick=False, seconds=300):
    "Register the function as a case; `seconds` is its time limit"
    if stage not in STAGES: raise ValueError(f'need one of {", ".join(STAGES)}, got {stage!r}')
    def register(run):
        if run.__name__ in {c.name for c in CASES}: raise ValueError(f'two cases are named {run.__name__}')
        CASES.append(Case(stage, fault, run, quick, seconds))
        return run
    return register


def load_cases():
    "Import every module of cases (tests/break_*.py) and return what they registered"
    from importlib import import_module
    from pathlib import Path
    for path in sorted(Path(__file__).parent.glob('break_*.py')):
        if path.stem != 'break_it': import_module(path.stem)
    return CASES
