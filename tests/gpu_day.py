"""What only a GPU can tell, in less than ten minutes and on a machine without notebooks

    python tests/gpu_day.py [--minutes 9] [--out gpu.csv] [--only STEP ...] [--device cuda]

It needs this checkout and torch, torchvision, numpy, pandas, scipy, pillow, psutil, filelock, safetensors, tqdm and platformdirs; no nbdev, no papermill, no
Jupyter, no network, no data: frames are those of a synthetic release or random bytes, weights are random. Where a package is missing, bring its wheel
(`pip download --no-deps platformdirs`) and `pip install --no-index --no-deps` it, or unpack it into a folder of PYTHONPATH. The reference loop is the one
of nbs/bench_throughput.ipynb: its cells are read, not copied.

Each step is a process of its own with a limit of its own; what one leaves unused is there for the next. The CSV is whole after every row, so a hard stop
loses nothing; a step that fails or takes too long leaves a row with unit `error`, and the next one goes on. In order of their value:

    devices      forward and backward pass of every method on the real device, as tests/device_cases.py has them
    memory       peak of a training step: predicted by the rehearsal, and measured; train.micro_batch='auto' at the paper's batch of eight
    training     pairs per second of `train_epoch` beside the reference loop, at 112 pixels; the share of the measured peak of matrix products
    evaluation   a further test video with ten exemplars beside the reference loop
    heads        a head on kept features, with and without captured steps

Columns: name, value, unit, goal, met (yes, no, not measured; empty where there is no goal), device, torch, driver, date, commit, seconds (that the row took),
note. Without a GPU, or with `--device cpu`, all steps run in a small form under the name `reduced, ...`: this shows that they run, and its numbers
mean nothing. The goals stay `not measured`. The exit status is 1 where a step failed.
"""
import argparse
import csv
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ('name','value','unit','goal','met','device','torch','driver','date','commit','seconds','note')
VIDEOS, EPOCHS, EXEMPLARS, BATCH = 2251, 200, 10, 8 # FineDiving's training split, and the paper's settings
GOALS = { # name: (unit, comparison, bound)
    'devices: combinations that pass': ('share', '>=', 1.),
    'devices: functions that wait for the device': ('functions', '<=', 0.),
    'memory: largest error of the prediction': ('share', '<=', .15),
    "memory: peak with micro_batch='auto'": ('share of the free memory', '<=', 1.),
    'training: times the reference loop': ('times', '>=', 10.),
    'training: share of the bf16 matrix peak': ('share', '>=', .4),
    'fine-tuning: 200 epochs of FineDiving': ('minutes', '<=', 40.),
    'evaluation: times the reference loop, a further video': ('times', '>=', 20.),
    'heads: 200 epochs of FineDiving, fspn': ('minutes', '<=', 3.)}
SMALL = dict(clip__size=32, clip__starts=(0,40), model__clips=2, train__batch_size=2) # of the small form
ROW = '@gpu_day ' # begins a line of a step that is a row


# Rows, and the file that holds them

def text(value):
    "A number in five digits, anything else as it is"
    return f'{value:.5g}' if isinstance(value, float) else str(value)


def is_met(name, value):
    "'yes' or 'no' for a measured goal"
    _,comparison,bound = GOALS[name]
    return 'yes' if (value >= bound if comparison == '>=' else value <= bound) else 'no'


class Table:
    "The rows so far, in a file that is whole after each of them"
    def __init__(self, path, **facts):
        self.path,self.facts,self.rows,self.last = Path(path).absolute(),facts,[],time.perf_counter()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, name, value='', unit='', note='', goal=False):
        "One more row; `goal`: a key of GOALS was measured"
        now,(_,comparison,bound) = time.perf_counter(),GOALS[name] if goal else ('', '', '')
        row = dict(name=name, value=text(value), unit=unit, goal=f'{comparison} {bound:g}' if goal else '', met=is_met(name, value) if goal else '',
                   date=datetime.now(timezone.utc).isoformat(timespec='seconds'), seconds=f'{now-self.last:.1f}', note=note, **self.facts)
        self.last,self.rows = now,[*(r for r in self.rows if r['name'] != name), row] # a better number of the same name takes its place
        self.write()
        print(f"{row['name']}: {row['value']} {unit} {row['goal'] and '(goal '+row['goal']+': '+row['met']+')'} {note}".rstrip(), flush=True)

    def missing_goals(self):
        "Rows for the goals that nobody has measured"
        measured = {row['name'] for row in self.rows if row['goal']}
        return [dict(name=name, unit=unit, goal=f'{comparison} {bound:g}', met='not measured')
                for name,(unit,comparison,bound) in GOALS.items() if name not in measured]

    def write(self):
        "Put the whole table in the place of the one before"
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, COLUMNS, restval='', lineterminator='\n')
        writer.writeheader()
        writer.writerows([*self.rows, *self.missing_goals()])
        part = self.path.with_name(f'.{self.path.name}.{os.getpid()}.part')
        part.write_text(buffer.getvalue(), encoding='utf-8')
        os.replace(part, self.path)


# Steps as processes

def end_group(process):
    "End a step and all that it started"
    try: os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError: pass


def run_step(table, step, command, limit):
    "Run a step; whether it ended well. Its rows are added as they come, and one for its failure"
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join([str(ROOT), str(ROOT/'tests'), *filter(None, [os.environ.get('PYTHONPATH')])])}
    error,expired,table.last = '',threading.Event(),time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors='replace', env=env, cwd=ROOT, start_new_session=True)
    def stop():
        expired.set()
        end_group(process)
    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        for line in process.stdout:
            if not line.startswith(ROW): print(line, end='', flush=True)
            elif 'error' in (row := json.loads(line[len(ROW):])): error = row['error']
            else: table.add(**row)
        process.wait()
    finally:
        timer.cancel()
        end_group(process)
        process.wait()
    if expired.is_set(): error = f'stopped after {limit:.0f} seconds'
    elif process.returncode and not error: error = f'ended with status {process.returncode}'
    if error: table.add(f'step {step}', unit='error', note=error)
    return not error


def run_steps(table, commands, seconds, run=run_step):
    "Run `commands` (step to command and share of the time) one after the other; the names of those that failed"
    failed,end = [],time.perf_counter()+seconds
    for k,(step,(command,share)) in enumerate(commands.items()):
        left = max(1., end-time.perf_counter())
        limit = left*share/sum(share for _,share in list(commands.values())[k:])
        if not run(table, step, command, limit): failed.append(step)
    return failed


def end_with_parent():
    "End this step and all that it started once nobody reads its rows any more"
    parent = os.getppid()
    while os.getppid() == parent: time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def device_facts(device):
    "Name of the device that `device` means, and the versions beside it; one line and status 2 where it is not there"
    import torch
    try: commit = subprocess.run(['git','rev-parse','--short','HEAD'], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError): commit = 'unknown'
    there = torch.cuda.is_available()
    if device.startswith('cuda') and not there: raise SystemExit(f"gpu_day: need a GPU for --device {device}, got none; leave --device out, or take 'cpu'")
    if device == 'cpu' or not there:
        return dict(device=f'cpu, {torch.get_num_threads()} threads', torch=torch.__version__, driver='', commit=commit)
    ask = ['nvidia-smi','--query-gpu=driver_version','--format=csv,noheader']
    try: driver = subprocess.run(ask, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError): driver = 'unknown'
    return dict(device=torch.cuda.get_device_name(device if ':' in device else 'cuda'), torch=torch.__version__, driver=driver, commit=commit)


# Inside a step

class Lab:
    "Where a step works, and where its rows go"
    def __init__(self, device):
        import torch
        self.gpu = device != 'cpu' and torch.cuda.is_available()
        self.device = torch.device('cpu' if not self.gpu else 'cuda' if device == 'auto' else device)

    def send(self, **row): print(ROW+json.dumps(row), flush=True)

    def record(self, name, value, unit, note=''):
        "A number beside the goals; not one of a GPU where there is none"
        self.send(name=name if self.gpu else f'reduced, {name}', value=value, unit=unit, note=note)

    def reach(self, name, value, note=''):
        "The number of a goal"
        if self.gpu: self.send(name=name, value=value, unit=GOALS[name][0], note=note, goal=True)
        else: self.record(name, value, GOALS[name][0], note)

    def release(self):
        "Give back the memory of what is no longer used"
        import gc
        import torch
        gc.collect()
        if self.gpu: torch.cuda.empty_cache()

    def wait(self):
        "Until the device has done its work"
        import torch
        if self.gpu: torch.cuda.synchronize(self.device)

    def seconds(self, work, repeats=5):
        "Median time of `work()` after a first call, in seconds"
        import statistics
        work()
        taken = []
        for _ in range(repeats):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            taken.append(time.perf_counter()-start)
        return statistics.median(taken)


# The reference loop

def notebook_functions(*names, **known):
    "The functions and classes `names` of nbs/bench_throughput.ipynb, run with the imports that they need and with `known`"
    import ast
    notebook = json.loads((ROOT/'nbs'/'bench_throughput.ipynb').read_text(encoding='utf-8'))
    cells = [ast.parse(''.join(c['source'])) for c in notebook['cells'] if c['cell_type'] == 'code']
    def defined(cell): return {node.name for node in cell.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    chosen = [cell for cell in cells if defined(cell) & set(names)]
    if missing := set(names)-set().union(*map(defined, chosen)):
        raise ValueError(f'need {", ".join(sorted(missing))} in nbs/bench_throughput.ipynb, which has no such functions; they were renamed there')
    used = {node.id for cell in chosen for node in ast.walk(cell) if isinstance(node, ast.Name)}
    imports = []
    for node in (node for cell in cells for node in cell.body if isinstance(node, (ast.Import, ast.ImportFrom))):
        node.names = [alias for alias in node.names if (alias.asname or alias.name) in used]
        if node.names: imports.append(node)
    space = dict(known)
    for body in (imports, *(cell.body for cell in chosen)): exec(compile(ast.Module(body, []), 'bench_throughput', 'exec'), space)
    return space


class Bench:
    "A small release, one model for both loops, and the reference loop"
    def __init__(self, lab):
        from dataclasses import replace
        import numpy as np
        import torch
        from fspn_nb.config import finediving,override
        from fspn_nb.synthetic.release import synth_release
        from fspn_nb.training.loop import build_model
        from fspn_nb.training.prepare import prepare
        torch.manual_seed(0)
        n_train,n_test,small = (40, 8, dict(clip__size=112)) if lab.gpu else (10, 6, SMALL)
        synth_release(None, 'finediving', n_train, n_test, 0, workers=os.cpu_count() if lab.gpu else None)
        self.lab,self.batch,self.exemplars = lab,BATCH if lab.gpu else 2,EXEMPLARS if lab.gpu else 2
        self.cfg = finediving('smoke', weights='random', synthetic__n_train=n_train, synthetic__n_test=n_test, train__backbone='finetune', model__adapter=False,
                              model__residual='scene', eval__num_exemplars=self.exemplars, **{**dict(train__batch_size=self.batch), **small})
        self.data = prepare(self.cfg, str(lab.device))
        self.override,self.replace,self.torch,self.np = override,replace,torch,np
        self.model = build_model(self.data)
        self.reference = notebook_functions('PairsOfDives', 'plain_copy', 'clip_by_clip', 'reference_step', 'reference_score', data=self.data, cfg=self.cfg)

    def loader(self, pairs, batch):
        "The pairs of dives, decoded by worker processes as the peers do"
        from torch.utils.data import DataLoader
        return DataLoader(self.reference['PairsOfDives'](self.data.release.samples, pairs), batch, num_workers=min(8, os.cpu_count()) if self.lab.gpu else 0)

    def steps(self, number):
        "Data whose epoch has `number` steps: the same dives over and over"
        train = self.data.splits['train']
        ids = self.np.resize(train, number*self.batch)
        return self.replace(self.data, splits=self.data.splits|dict(train=ids))

    def paced(self, steps, pass_over):
        "Pairs per second of `pass_over(on_step)` over `steps` steps, from the end of the third step on; of the second where there are few"
        skip,start = min(3, steps-1),[]
        def on_step(step):
            if step != skip: return
            self.lab.wait()
            start.append(time.perf_counter())
        pass_over(on_step)
        self.lab.wait()
        return (steps-skip)*self.batch/(time.perf_counter()-start[0])

    def reference_rate(self, steps):
        "Pairs per second of the reference loop"
        from fspn_nb.training.loop import batch_sampler
        plan = batch_sampler(self.steps(steps), True, 0)
        model = self.reference['plain_copy'](self.model).train()
        optimiser = self.torch.optim.Adam(model.parameters(), lr=1e-4)
        loader = self.loader(self.np.concatenate([self.np.stack(step[:2], 1) for step in plan]), self.batch)
        def pass_over(on_step):
            for k,(pair,step) in enumerate(zip(loader, plan), 1):
                self.reference['reference_step'](model, pair, self.torch.as_tensor(self.np.stack(step[:2])), optimiser)
                on_step(k)
        return self.paced(steps, pass_over)

    def rate(self, steps, **changes):
        "Pairs per second of `train_epoch` with some settings"
        import copy
        from fspn_nb.training.loop import build_model,make_optimiser,make_schedule,train_epoch
        data = self.replace(self.data, cfg=self.override(self.cfg, **changes), backbone=copy.deepcopy(self.model.backbone))
        model,data = build_model(data).train(),self.replace(data, splits=self.steps(steps).splits)
        optimiser = make_optimiser(model, data.cfg)
        schedule = make_schedule(optimiser, self.override(data.cfg, train__schedule='constant'), 1)
        return self.paced(steps, lambda on_step: train_epoch(model, data, optimiser, schedule, 0, on_step_end=lambda position: on_step(position['step'])))

    def operations(self):
        "Multiplications and additions of a pair, counted: both videos, both streams, forward and backward"
        from torch.utils.flop_counter import FlopCounterMode
        from fspn_nb.training.loop import batch_sampler,make_optimiser,make_schedule,train_step
        from fspn_nb.training.prefetch import load_batches
        optimiser = make_optimiser(self.model, self.cfg)
        schedule = make_schedule(optimiser, self.override(self.cfg, train__schedule='constant'), 1)
        plan = [step[:2] for step in batch_sampler(self.data, True, 0)[:1]]
        batch = next(load_batches(self.data.source, self.data.labels, plan, self.data.device, 0))
        with FlopCounterMode(display=False) as counter: train_step(self.model.train(), batch, optimiser, schedule)
        return counter.get_total_flops()/len(batch)


# Steps

def devices(lab):
    "Training steps and predictions of every method, and what waits for the device in them"
    from device_cases import cases,check_method
    chosen = list(cases() if lab.gpu else [case for case in cases(['fspn_s']) if case[1] == 'frozen'])
    passed,waits = 0,set()
    for case in chosen:
        try: result = check_method(*case, str(lab.device))
        except Exception as e: lab.record(f'devices: {" ".join(case)}', '', 'failed', f'{type(e).__name__}: {str(e).strip()[:300]}')
        else:
            passed += 1
            waits |= {f'{function} ({reason})' for function,reason in result['waits']}
        lab.reach('devices: combinations that pass', passed/len(chosen), f'{passed} of {len(chosen)}')
        lab.reach('devices: functions that wait for the device', float(len(waits)), ', '.join(sorted(waits)))
        lab.release()


class PaperStep:
    "A training step of the run `cfg` on random clips that lie on the device"
    def __init__(self, lab, cfg):
        from dataclasses import replace
        from functools import partial
        import torch
        from fspn_nb.config import override
        from fspn_nb.core import to_device
        from fspn_nb.batches.sources import make_batch
        from fspn_nb.training.loop import batch_sampler,build_model,make_optimiser,make_schedule,train_step
        from fspn_nb.training.rehearsal import FakeClips,fake_data
        self.lab,self.data = lab,replace(fake_data(cfg), device=lab.device)
        self.model = build_model(self.data).train()
        ids,exemplars,index = batch_sampler(self.data, self.model.uses_exemplar, 0)[0]
        with torch.device(lab.device): self.source = FakeClips(cfg, len(ids), 4) # two batches: one is read while the other is trained on
        for clips in (clips for pair in self.source.pairs for clips in pair): clips.random_(256)
        self.batch = to_device(make_batch(self.source, self.data.labels, ids, exemplars, 0), lab.device)
        self.optimiser = make_optimiser(self.model, cfg)
        schedule = make_schedule(self.optimiser, override(cfg, train__schedule='constant'), 1)
        self.step = partial(train_step, self.model, self.batch, self.optimiser, schedule, cfg.train.precision, self.data.dist, len(ids), index)

    def peak(self):
        "Bytes of tensors and bytes that the allocator held at the worst moment of a step; without a GPU the storages are counted"
        import torch
        from fspn_nb.training.prefetch import tensors_of
        from fspn_nb.training.rehearsal import LiveMemory
        self.step() # makes the optimiser's state, and cuDNN choose
        if self.lab.gpu:
            self.lab.wait()
            torch.cuda.reset_peak_memory_stats(self.lab.device)
            self.step()
            self.lab.wait()
            return torch.cuda.max_memory_allocated(self.lab.device), torch.cuda.max_memory_reserved(self.lab.device)
        self.optimiser.zero_grad()
        state = [v for values in self.optimiser.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
        clips = [clips for pair in self.source.pairs for clips in pair]
        with LiveMemory() as memory:
            memory.add([*self.model.parameters(), *self.model.buffers(), *state, *tensors_of(self.batch), *clips], 'before')
            memory.restart()
            self.step()
        return memory.peak, memory.peak


def predicted_and_measured(lab):
    "Peak of a training step as the rehearsal has it, and as it is"
    import torch
    from fspn_nb.config import make_config
    from fspn_nb.training.rehearsal import rehearse
    steps = [('finediving','fp32',0), ('finediving','bf16',0), ('finediving','fp32',36), ('mtl_aqa','bf16',40), ('mtl_aqa','fp32',0)]
    worst = 0
    for dataset,precision,micro_batch in steps if lab.gpu else steps[:1]:
        cfg = make_config(dataset, train__precision=precision, train__micro_batch=micro_batch, **({} if lab.gpu else SMALL|dict(model__name='i3d_mlp')))
        label = f'memory: {dataset}, {cfg.train.batch_size} pairs at {cfg.clip.size} pixels, {precision}, micro_batch={micro_batch}'
        predicted = rehearse(cfg, micro_batch, device=lab.device.type).peak
        lab.record(f'{label}, predicted', predicted/2**30, 'GiB')
        if lab.gpu and predicted > (free := torch.cuda.mem_get_info(lab.device)[0]):
            lab.record(f'{label}, measured', '', 'GiB', f'left out: {free/2**30:.0f} GiB are free')
            continue
        measured,held = PaperStep(lab, cfg).peak()
        lab.record(f'{label}, measured', measured/2**30, 'GiB', f'predicted: {predicted/measured:.3f} of it')
        lab.record(f'{label}, held by the allocator', held/2**30, 'GiB')
        worst = max(worst, abs(predicted/measured-1))
        lab.reach('memory: largest error of the prediction', worst)
        lab.release()


def automatic_micro_batch(lab):
    "What train.micro_batch='auto' takes where so many GiB are free, at the paper's batch of eight"
    import torch
    from fspn_nb.config import make_config,override
    from fspn_nb.training.memory import find_micro_batch,pick_micro_batch
    worst = 0
    for dataset,room in (('finediving',8), ('finediving',24), ('mtl_aqa',24), ('mtl_aqa',40)) if lab.gpu else (('finediving',2),):
        cfg = make_config(dataset, train__micro_batch=0, **({} if lab.gpu else SMALL|dict(model__name='i3d_mlp')))
        if lab.gpu:
            if (free := torch.cuda.mem_get_info(lab.device)[0]) < room*2**30: continue
            ballast = torch.empty(free-room*2**30, dtype=torch.uint8, device=lab.device) # a smaller card
            size = pick_micro_batch(cfg, lab.device)
        else: ballast,size = torch.empty(0),find_micro_batch(cfg, lab.device, room*2**30)['micro_batch']
        cfg = override(cfg, train__micro_batch=size, **({} if lab.gpu else dict(train__batch_size=1)))
        peak,held = (n-ballast.nbytes for n in PaperStep(lab, cfg).peak())
        lab.record(f"memory: {dataset}, {cfg.train.batch_size} pairs at {cfg.clip.size} pixels, fp32, micro_batch='auto', {room} GiB free", peak/2**30, 'GiB',
                   f'{size or "all"} clips at a time; the allocator held {held/2**30:.1f} GiB')
        worst = max(worst, peak/room/2**30)
        lab.reach("memory: peak with micro_batch='auto'", worst)
        del ballast
        lab.release()


def memory(lab):
    "Peak of a training step: predicted, measured, and made to fit"
    predicted_and_measured(lab)
    automatic_micro_batch(lab)


def matrix_peak(lab, dtype, size):
    "Operations per second of a large product"
    import torch
    a,b = (torch.randn(size, size, device=lab.device).to(dtype) for _ in range(2))
    return 2*size**3/lab.seconds(lambda: a@b, 20 if lab.gpu else 3)


def training(lab):
    "Pairs per second of both loops, and the share of the peak"
    import torch
    peak = matrix_peak(lab, torch.bfloat16, 8192 if lab.gpu else 256)
    lab.record('matrix product, bf16', peak/1e12, 'TFLOP/s')
    lab.record('matrix product, fp32', matrix_peak(lab, torch.float32, 8192 if lab.gpu else 256)/1e12, 'TFLOP/s')
    bench,steps = Bench(lab),40 if lab.gpu else 2
    flop = bench.operations()
    lab.record('training: operations of a pair', flop/1e12, 'TFLOP', 'counted, forward and backward')
    reference = None
    try: reference = bench.reference_rate(12 if lab.gpu else 2)
    except Exception as e: lab.record('training: reference loop', '', 'failed', f'{type(e).__name__}: {str(e).strip()[:300]}') # ours is measured all the same
    else: lab.record('training: reference loop', reference, 'pairs per second', 'frames decoded by eight workers, clip by clip, fp32 as PyTorch has it: products in fp32, convolutions in TF32 on a GPU')
    rates = {}
    def measure(label, **changes):
        rates[label] = bench.rate(steps, **changes)
        lab.record(f'training: ours, {label}', rates[label], 'pairs per second', f'{rates[label]/reference:.1f} times the reference loop' if reference else '')
        best = max(rates, key=rates.get)
        if reference: lab.reach('training: times the reference loop', rates[best]/reference, f'ours, {best}, {bench.batch} pairs a step at {bench.cfg.clip.size} pixels')
        if half := [name for name in rates if 'bf16' in name]:
            fastest = max(half, key=rates.get)
            lab.reach('training: share of the bf16 matrix peak', rates[fastest]*flop/peak, f'ours, {fastest}, reading of clips included')
        lab.reach('fine-tuning: 200 epochs of FineDiving', EPOCHS*VIDEOS/rates[best]/60, f'extrapolated from {steps} steps, ours, {best}; training alone')
    measure('fp32')
    measure('bf16', train__precision='bf16')
    if not lab.gpu: return # the others differ on a GPU alone, or need a compiler
    torch.set_float32_matmul_precision('high')
    measure('fp32, products in TF32')
    torch.set_float32_matmul_precision('highest')
    torch.backends.cudnn.benchmark = True
    measure('bf16, cuDNN measures its algorithms', train__precision='bf16')
    torch.backends.cudnn.benchmark = False
    measure('bf16, compiled', train__precision='bf16', train__compile=True)


def reference_seconds(bench, model, videos):
    "Seconds of the reference loop for a further test video, and the score of the first one"
    from itertools import islice
    from fspn_nb.training.predict import sample_exemplars
    queries = bench.np.resize(bench.data.splits['test'], videos)
    exemplars = sample_exemplars(bench.data, queries, bench.exemplars)[0]
    pairs = iter(bench.loader([(int(q), int(e)) for q,row in zip(queries, exemplars) for e in row], 1))
    scores,start = [],time.perf_counter()
    for k,row in enumerate(exemplars):
        scores.append(float(bench.reference['reference_score'](model, islice(pairs, len(row)), row)))
        if k == 0: start = time.perf_counter() # workers have started, and decode ahead
    return (time.perf_counter()-start)/(videos-1), scores[0]


def evaluation(lab):
    "Seconds of a further test video in both loops"
    from fspn_nb.training.predict import encode_dives,predict
    bench,data = Bench(lab),None
    model = bench.reference['plain_copy'](bench.model).eval()
    slow,theirs = reference_seconds(bench, model, 9 if lab.gpu else 2)
    lab.record('evaluation: reference loop, a further video', 1e3*slow, 'ms', f'{bench.exemplars} exemplars, {2*bench.exemplars} passes of the backbone')
    query,ids = bench.data.splits['test'][:1],bench.np.arange(len(bench.data.release.samples))[:None if lab.gpu else 4]
    fast = {}
    halves = lab.gpu or bench.torch.ops.mkldnn._is_mkldnn_bf16_supported() # else a product takes fifty times as long
    if not halves: print('evaluation in bf16: left out, this CPU has no arithmetic for it')
    for precision in ('fp32','bf16') if halves else ('fp32',):
        data = bench.replace(bench.data, cfg=bench.override(bench.cfg, train__precision=precision))
        encode = lab.seconds(lambda: encode_dives(bench.model, data, ids), 3 if lab.gpu else 1)/len(ids)
        feature = encode_dives(bench.model, data, query).feature.to(lab.device)
        label = data.labels.label[:bench.exemplars].to(lab.device)
        def vote():
            with bench.torch.no_grad(): bench.model.score(feature[:, None], feature.expand(1, len(label), -1), label[None])
        votes = lab.seconds(vote, 20)
        fast[precision] = encode+votes
        lab.record(f'evaluation: ours, {precision}, encoding a video once', 1e3*encode, 'ms')
        lab.record(f'evaluation: ours, {precision}, its votes', 1e3*votes, 'ms')
        ours = float(predict(bench.model, data, query, bench.exemplars)[0][0])
        lab.record(f'evaluation: ours, {precision}, score beside that of the reference', abs(ours-theirs), 'points', f'{ours:.4f} and {theirs:.4f}, the same weights')
        best = min(fast, key=fast.get)
        lab.reach('evaluation: times the reference loop, a further video', slow/fast[best], f'ours, {best}')


def heads(lab):
    "Seconds of an epoch of a head on kept features, at FineDiving's size, as it is and with captured steps"
    import head_speed
    import numpy as np
    from fspn_nb.config import override
    from fspn_nb.training.graphs import GraphedGradients,RecordedGraph,pick_gradients
    from fspn_nb.training.loop import compute_gradients,make_optimiser,make_schedule,train_epoch
    part,times = head_speed.VIDEOS if lab.gpu else 16,{}
    for method in ('fspn','fspn_s','i3d_mlp') if lab.gpu else ('fspn',):
        for label in ('one kernel after the other','captured steps'):
            model,data,_,_ = head_speed.run_of(method)
            data.device,data.splits['train'],data.cfg = lab.device,np.arange(part),override(data.cfg, train__capture='auto')
            model.to(lab.device)
            optimiser = make_optimiser(model, data.cfg)
            schedule = make_schedule(optimiser, data.cfg, 100_000)
            gradients = compute_gradients
            if label == 'captured steps': gradients = pick_gradients(model, data) if lab.gpu else GraphedGradients(RecordedGraph)
            def epoch(): train_epoch(model, data, optimiser, schedule, 0, gradients=gradients)
            for _ in range(2 if lab.gpu else 1): epoch() # the second step of each shape is captured
            times[label] = lab.seconds(epoch, 3 if lab.gpu else 1)
            lab.record(f'heads: {method}, {label}', 1e3*times[label]/part, 'ms per video and epoch', f'batch {data.cfg.train.batch_size}')
        lab.record(f'heads: {method}, gain of captured steps', times['one kernel after the other']/times['captured steps'], 'times')
        if method == 'fspn': lab.reach('heads: 200 epochs of FineDiving, fspn', EPOCHS*VIDEOS*times['captured steps']/part/60, 'extrapolated from three epochs; training alone')


STEPS = dict(devices=(devices, .25), memory=(memory, .2), training=(training, .3), evaluation=(evaluation, .12), heads=(heads, .13)) # share of the time


def parser():
    "The command line"
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--minutes', type=float, default=9., help='for all steps together')
    p.add_argument('--out', default='gpu.csv', help='the CSV file')
    p.add_argument('--only', nargs='+', choices=STEPS, default=[*STEPS], metavar='STEP', help=f'some of {", ".join(STEPS)}')
    p.add_argument('--device', default='auto', help='auto, cpu, cuda, cuda:1 ...')
    p.add_argument('--step', choices=STEPS, help=argparse.SUPPRESS) # inside the process of a step
    return p


def main(args=None):
    "Run the steps as processes; or, in such a process, the work of one"
    a = parser().parse_args(args)
    if a.step:
        threading.Thread(target=end_with_parent, daemon=True).start()
        lab = Lab(a.device)
        try: STEPS[a.step][0](lab)
        except Exception as e:
            lab.send(error=f'{type(e).__name__}: {(str(e).strip() or "no message").splitlines()[0][:300]}')
            raise
        return
    start = time.perf_counter()
    table = Table(a.out, **device_facts(a.device))
    def command(step): return [sys.executable, '-u', __file__, '--step', step, '--device', a.device]
    failed = run_steps(table, {step: (command(step), STEPS[step][1]) for step in STEPS if step in a.only}, 60*a.minutes-(time.perf_counter()-start))
    print(f'{len(table.rows)} rows in {table.path.name}, {len(table.missing_goals())} of {len(GOALS)} goals not measured'+(f'; failed: {", ".join(failed)}' if failed else ''))
    raise SystemExit(bool(failed))


if __name__ == '__main__': main()
