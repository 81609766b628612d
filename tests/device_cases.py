"""Cases for the devices test: every method, frozen and fine-tuned, in training and in evaluation, in fp32 and bf16

Needs the library and PyTorch, no notebook and no pytest: `check_method` runs one case on a real device ('cpu', 'cuda'), or on
'fake cuda', whose tensors know shape, type and device and hold no numbers. On a fake device an operation that mixes devices is an
error, and everything that would make the CPU wait for a GPU is written down with the function of the library that asked for it.
Without a GPU PyTorch runs no backward pass for CUDA; 'fake standin' is another device that is not there, and one for which it does.
`python tests/device_cases.py cuda` runs every case on that device and prints a line for each.
"""
import ast
import sys
import time
import warnings
from contextlib import ExitStack, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

import fspn_nb
from fspn_nb.batches.dataset import Labels
from fspn_nb.batches.exemplars import find_candidates
from fspn_nb.batches.fingerprint import RunInputs
from fspn_nb.batches.sources import FeatureDataset
from fspn_nb.config import finediving
from fspn_nb.core import Batch
from fspn_nb.data.records import Release, Sample
from fspn_nb.inspect.gradcam import MAP_METHODS,HeadOnMaps
from fspn_nb.methods import METHODS
from fspn_nb.models.i3d import I3D, Unit3D
from fspn_nb.training import prefetch as prefetch_module
from fspn_nb.training.loop import build_model, make_optimiser, make_schedule, train_epoch
from fspn_nb.training.predict import predict
from fspn_nb.training.prepare import RunData
from fspn_nb.zoo import list_models

LIBRARY = Path(fspn_nb.__file__).parent
aten = torch.ops.aten

MODES, PRECISIONS = ('train', 'eval'), ('fp32', 'bf16')

ALLOWED = { # method ('*': any): function of the library to the reason why the CPU waits for the device there while it trains
    '*': {'batches.sources._copy_features': 'once per run: the features go to the device',
          'training.prefetch._labels_on': 'once per epoch: so do the labels',
          'training.prefetch._table_batches': 'once per epoch: so do the positions of all steps'},
    'tsa_net': {'peers.tsa_net._read_tubes': 'once per step: the shapes of all that follows depend on how many cells the tubes have'}}


def cases(names=None):
    "(name, backbone, mode, precision) of every case of the methods `names`, by default all of the zoo"
    for name in names or list_models():
        for backbone in ('finetune',) if METHODS[name].finetune_only else ('frozen', 'finetune'):
            yield from ((name, backbone, mode, precision) for mode in MODES for precision in PRECISIONS)


def allowed(name):
    "The functions in which the CPU may wait for the device while the method `name` trains"
    return ALLOWED['*'].keys()|ALLOWED.get(name, {}).keys()


# ---- a run of six made-up dives

class Clips:
    "Frames of all dives in memory, as a source"
    def __init__(self, scene, actor, **extra): self.scene, self.actor, self.extra = scene, actor, extra
    def get_batch(self, ids, rng_key=None): return self.scene[torch.as_tensor(ids)], self.actor[torch.as_tensor(ids)]
    def extra_fields(self, ids, rng_key=None): return {k: v[torch.as_tensor(ids)] for k, v in self.extra.items()}


@cache
def _dives(backbone, size, clips, per_dd):
    "What six made-up dives consist of: frames of `size` pixels, or features"
    g = torch.Generator().manual_seed(0)
    n, side = 6, -(-size//32)
    if backbone == 'finetune': scene, actor = torch.randint(256, (2, n, clips, 3, 16, size, size), dtype=torch.uint8, generator=g)
    else: scene, actor = torch.rand(2, n, clips, 1024, generator=g)
    first, extent = torch.rand(2, n, clips, 16, 2, generator=g)/2
    difficulty = torch.rand(n, generator=g)*2+1.5
    label = torch.linspace(8, 26, n) if per_dd else torch.linspace(40, 90, n)
    judges = torch.randint(0, 21, (n, 7), generator=g)/2
    judges[1, 5:] = float('nan')
    fields = dict(boxes=torch.cat([first, first+extent], -1))
    if backbone == 'frozen':
        fields |= dict(feature_maps=torch.randn(n, clips, 1024, side, side, generator=g),
                       short_clip_features=torch.randn(n, 20, 1024, generator=g))
    return scene, actor, fields, label, difficulty, torch.randint(10, 40, (n, 2), generator=g).cumsum(1), judges


def make_data(name, backbone, precision='fp32', device='cpu', net=None, size=32, per_dd=False, **changes):
    "The `RunData` of a run of method `name` on six made-up dives; `net`: its I3D; `changes` as in `override`; `net` is moved to the device"
    starts = (0, 10, 20, 30)
    cfg = finediving('smoke', **dict(model__name=name, train__backbone=backbone, train__precision=precision, train__batch_size=4,
                                     clip__starts=starts, model__clips=len(starts), clip__frames=48, clip__size=size,
                                     protocol='w_dd' if per_dd else 'w_dn')|changes)
    scene, actor, fields, label, difficulty, transitions, judges = _dives(backbone, size, len(starts), per_dd)
    n = len(label)
    uids, train = tuple(f'made-up/{i}' for i in range(n)), np.arange(n-2)
    samples = tuple(Sample(uid, 'train' if i < n-2 else 'test', '407c', float(label[i]), float(difficulty[i])) for i, uid in enumerate(uids))
    extra = [field for field in METHODS[name].extra_inputs if field in fields] if name in METHODS else []
    source = (FeatureDataset if backbone == 'frozen' else Clips)(scene, actor, **{field: fields[field] for field in extra})
    data = RunData(cfg, Release(samples, 'synthetic', Path('.')), dict(train=train, val=train[:0], test=np.arange(n-2, n)),
                   Labels(label, difficulty, transitions, uids, judges=judges), None, source,
                   None if backbone == 'frozen' else net, torch.device(device), {}, RunInputs({}, None))
    object.__setattr__(data, 'candidate_sets', find_candidates(samples, train, data.variant)) # it needs the variant of the run
    return data


# ---- what waits for a device

def _caller():
    "The innermost function of the library on the stack, as 'peers.tsa.check'; 'backward' where there is none"
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if LIBRARY in path.parents:
            return f"{'.'.join(path.relative_to(LIBRARY).with_suffix('').parts)}.{frame.f_code.co_qualname.split('.<locals>')[0]}"
        frame = frame.f_back
    return 'backward'


def _function_at(path, line):
    "The same for a line of a file"
    path = Path(path)
    if LIBRARY not in path.parents: return f'{path.name}:{line}'
    names, nodes = [], ast.parse(path.read_text(encoding='utf-8')).body
    while inside := [node for node in nodes if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.lineno <= line <= node.end_lineno]:
        names.append(inside[0].name)
        if isinstance(inside[0], ast.FunctionDef): break
        nodes = inside[0].body
    return '.'.join((*path.relative_to(LIBRARY).with_suffix('').parts, *names))


SMALL = 1<<16 # values of tensors up to this size are known on a fake device, as far as they follow from labels and boxes
_INDEXING = {'index', 'index_put', 'index_put_', '_index_put_impl_', '_unsafe_index'}
_FACTORIES = {'arange', 'zeros', 'ones', 'full', 'eye', 'linspace', 'scalar_tensor', 'lift_fresh', 'lift_fresh_copy'}


class Watch(TorchDispatchMode):
    "Writes down what waits for the fake device, and float64 on it; knows the values of small tensors that follow from labels and boxes"
    def __init__(self, fake):
        super().__init__()
        self.fake, self.waits, self.doubles, self.values = fake, set(), set(), WeakIdKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        if reason := self._reason(name, args, kwargs): self.waits.add((_caller(), reason))
        known = self._known(name, args, kwargs)
        if name in ('_local_scalar_dense', 'nonzero'):
            value = self._ask(func, known)
            return value if name == '_local_scalar_dense' else self.wrap(value, args[0].device)
        out = func(*self._positions(name, args), **kwargs)
        outs = [t for t in tree_flatten(out)[0] if isinstance(t, FakeTensor)]
        self.doubles |= {_caller() for t in outs if t.dtype == torch.float64 and t.device.type != 'cpu'}
        if known and sum(t.numel() for t in outs) <= SMALL:
            for t, value in zip(outs, tree_flatten(self._ask(func, known))[0]): self.values[t] = value
        elif func._schema.is_mutable: self.values.pop(args[0], None) if isinstance(args[0], FakeTensor) else None
        return out

    def _reason(self, name, args, kwargs):
        "Why the CPU waits for the device in this operation; None where it does not"
        x = next((t for t in args if isinstance(t, torch.Tensor)), None)
        if x is None: return None
        far = x.device.type != 'cpu'
        if name in ('_to_copy', 'copy_'):
            target = kwargs.get('device') if name == '_to_copy' else x.device
            source = x if name == '_to_copy' else args[1]
            crosses = target is not None and (torch.device(target).type == 'cpu') != (source.device.type == 'cpu')
            return 'copy' if crosses and not (kwargs.get('non_blocking') or name == 'copy_' and len(args) > 2 and args[2]) else None
        if far and name in ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal', '_unique2', 'unique_dim', 'bincount'): return name
        if far and name in _INDEXING:
            given = [i for i in args[1] if i is not None]
            if any(i.dtype in (torch.bool, torch.uint8) for i in given): return 'mask'
            if any(i.device.type == 'cpu' for i in given): return 'index on the CPU'

    def _known(self, name, args, kwargs):
        "The arguments with values in place of fake tensors; None where one has no value"
        tensors = [t for a in (*args, *kwargs.values()) for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, torch.Tensor)]
        if not tensors and name not in _FACTORIES or any(isinstance(t, FakeTensor) and t not in self.values for t in tensors): return None
        def real(x): return self.values[x] if isinstance(x, FakeTensor) else torch.device('cpu') if isinstance(x, torch.device) else x
        return tree_map(real, (args, kwargs))

    def _ask(self, func, known):
        "What `func` says of the values"
        if not known and _caller() == 'training.loop.train_epoch': return 1. # the losses, which are read when an epoch ends
        if not known: raise NotImplementedError(f'{_caller()} asks for numbers that do not follow from labels or boxes ({func})')
        with unset_fake_temporarily(), torch.no_grad(): return func(*known[0], **known[1])

    def wrap(self, value, device):
        "`value` as a fake tensor on `device` that knows it"
        out = to_fake(self.fake, value, device)
        self.values[out] = value
        return out

    def _positions(self, name, args):
        "`args` with positions in place of masks, as PyTorch itself does on a GPU"
        if name not in _INDEXING: return args
        indices = []
        for i in args[1]:
            if i is None or i.dtype != torch.bool: indices.append(i)
            elif i not in self.values: raise NotImplementedError(f'{_caller()} uses a mask that does not follow from labels or boxes')
            else:
                with unset_fake_temporarily(): places = self.values[i].nonzero(as_tuple=True)
                indices += [self.wrap(place, i.device) for place in places]
        return args[0], indices, *args[2:]


def to_fake(fake, x, device):
    "A fake tensor of the shape, strides and type of `x` on `device`"
    with unset_fake_temporarily(): meta = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device='meta')
    return FakeTensor(fake, meta, torch.device(device))


# ---- a device that is not there

def _move(watch):
    "`nn.Module.to` for fake devices: parameters and buffers, and nothing else"
    def to(self, device=None, *args, memory_format=None, **kwargs):
        if not isinstance(device, (str, torch.device)): return self
        def moved(t):
            if memory_format and t.ndim == 5:
                with unset_fake_temporarily(): t = torch.empty(t.shape, dtype=t.dtype, device='meta').to(memory_format=memory_format)
            return to_fake(watch.fake, t, device)
        for module in self.modules():
            for name, p in module._parameters.items():
                if p is not None: module._parameters[name] = nn.Parameter(moved(p), p.requires_grad)
            for name, b in module._buffers.items():
                if b is None: continue
                known = watch.values.get(b) if isinstance(b, FakeTensor) else b if b.device.type != 'meta' else None
                module._buffers[name] = moved(b)
                if known is not None and known.numel() <= SMALL: watch.values[module._buffers[name]] = known.detach().clone()
        return self
    return to


def _numpy(self, *args, **kwargs):
    "`Tensor.numpy` of a fake tensor: zeros, and the error of a real one that is not on the CPU"
    if not isinstance(self, FakeTensor): return _REAL_NUMPY(self, *args, **kwargs)
    if self.device.type != 'cpu': raise TypeError(f"can't convert {self.device} device type tensor to numpy")
    with unset_fake_temporarily(): return torch.zeros(self.shape, dtype=self.dtype).numpy()


def _fill_gradients(model):
    "A stand-in for `Tensor.backward`, which needs a real GPU: gradients of zeros, of the backbone for one layer alone, which is enough"
    def backward(loss, *args, **kwargs):
        assert loss.requires_grad and loss.ndim == 0
        for name, p in model.named_parameters():
            if p.requires_grad and not name.startswith('backbone.') or name.startswith('backbone.Conv3d_1a'): p.grad = torch.zeros_like(p)
    return backward


class _Inline:
    "A pool whose jobs run at once, in this thread: fake tensors live in the thread that made them"
    def __init__(self, *args, **kwargs): pass
    def __enter__(self): return self
    def __exit__(self, *error): return False
    def submit(self, function, *args): return SimpleNamespace(result=lambda value=function(*args): value)


_REAL_NUMPY, _FAKE = torch.Tensor.numpy, FakeTensorMode()


@contextmanager
def fake_device():
    "Inside the `with`, modules move to devices that are not there; gives a `Watch`, which makes all tensors fake ones inside its own `with`"
    watch = Watch(_FAKE)
    stream = SimpleNamespace(record_event=lambda: None, wait_event=lambda event: None)
    patches = [(nn.Module, 'to', _move(watch)), (torch.Tensor, 'numpy', _numpy), (torch.Tensor, 'pin_memory', lambda self, *a: self),
               (torch.Tensor, 'record_stream', lambda self, stream: None), (prefetch_module, 'ThreadPoolExecutor', _Inline),
               (torch.cuda, 'Stream', lambda *a, **k: stream), (torch.cuda, 'current_stream', lambda *a: stream),
               (torch.cuda, 'stream', lambda stream: nullcontext()), (torch.cuda.amp.common, 'amp_definitely_not_available', lambda: False),
               (torch.cuda, 'is_bf16_supported', lambda *a, **k: True), (torch.cuda, 'mem_get_info', lambda *a: (2**34, 2**34))]
    copied = mock.patch.object(FakeTensorMode, '__deepcopy__', lambda self, memo: self, create=True) # a copied module stays in the same mode
    with copied, ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'Accessing the data pointer of FakeTensor') # PyTorch's own copy.deepcopy
        stack.enter_context(torch.backends.cudnn.flags(enabled=False)) # an LSTM would ask cuDNN which GPU there is
        for target, name, new in patches: stack.enter_context(mock.patch.object(target, name, new))
        yield watch


_LOWER = ('linear', 'conv1d', 'conv2d', 'conv3d', 'matmul', 'mm', 'bmm', 'addmm', 'baddbmm', 'scaled_dot_product_attention')
_FULL = ('layer_norm', 'softmax.int', 'log_softmax.int', 'exp', 'log', 'cumsum', 'pow.Tensor_Scalar', 'mse_loss', 'l1_loss', 'kl_div',
         'binary_cross_entropy_with_logits', 'prod', 'norm.Scalar', 'norm.ScalarOpt_dim')

@cache
def register_stand_in():
    """Register the device 'standin', which PyTorch takes for an accelerator, for the rest of this process

    Autograd cannot run for CUDA where there is no GPU; on this device, with fake tensors, it runs as it is. Its autocast casts the usual operations.
    """
    from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend
    class Backend(_DummyBackendModule):
        def get_amp_supported_dtype(self): return [torch.bfloat16]
    _setup_privateuseone_for_python_backend('standin', Backend())
    library, off = torch.library.Library('aten', 'IMPL'), torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)
    def casting(op, dtype):
        def cast(x): return x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != dtype else x
        def kernel(*args, **kwargs):
            with torch._C._ExcludeDispatchKeyGuard(off): return op(*tree_map(cast, args), **tree_map(cast, kwargs))
        return kernel
    for names, dtype in ((_LOWER, torch.bfloat16), (_FULL, torch.float32)):
        for name in names:
            packet, _, overload = name.partition('.')
            library.impl(name, casting(getattr(getattr(aten, packet), overload or 'default'), dtype), 'AutocastPrivateUse1')
    rest = torch.library.Library('_', 'IMPL')
    rest.fallback(torch.library.fallthrough_kernel, 'AutocastPrivateUse1')
    return library, rest # the registrations live as long as they do


def _fake_data(watch, data):
    "`data` with fake tensors on the CPU"
    def known(x):
        if not isinstance(x, torch.Tensor): return x
        return watch.wrap(x, 'cpu') if x.numel() <= SMALL else to_fake(watch.fake, x, 'cpu')
    source, labels = data.source, data.labels
    return replace(data, source=type(source)(known(source.scene), known(source.actor), **{k: known(v) for k, v in source.extra.items()}),
                   labels=Labels(**{k: known(v) for k, v in vars(labels).items()}))


# ---- one case

def _train(model, data, waits):
    "Losses of an epoch of one step, and what `waits()` says at the end of the last step"
    optimiser, seen = make_optimiser(model, data.cfg), []
    losses = train_epoch(model, data, optimiser, make_schedule(optimiser, data.cfg, 9), 0, on_step_end=lambda _: seen.append(waits()))
    return losses, seen[-1], optimiser


def _where(model):
    "Devices of all parameters and buffers, and of all other tensors that a module holds"
    own = {t.device.type for t in (*model.parameters(), *model.buffers())}
    return own|{t.device.type for module in model.modules() for t in plain_tensors(module)}


def plain_tensors(module):
    "Tensors that `module` holds and `nn.Module.to` does not move"
    hidden = {k: v for k, v in vars(module).items() if k not in ('_parameters', '_buffers', '_modules')}
    leaves, todo = [], list(hidden.values())
    while todo:
        x = todo.pop()
        if isinstance(x, torch.Tensor): leaves.append(x)
        elif isinstance(x, dict): todo += x.values()
        elif isinstance(x, (list, tuple, set)): todo += x
    return leaves


def _check_fake(data, mode):
    "One case on a fake device"
    with fake_device() as watch:
        model, kind = build_model(data), data.device.type
        data = _fake_data(watch, data)
        with watch.fake, watch, mock.patch.object(torch.Tensor, 'backward', _fill_gradients(model)) if kind == 'cuda' else nullcontext():
            if mode == 'train':
                losses, waits, optimiser = _train(model, data, lambda: set(watch.waits))
                state = [t for entry in optimiser.state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
                assert state and {t.device.type for t in state} == {kind}, 'the state of the optimiser lies elsewhere'
            else: losses, waits = {}, set(predict(model, data, data.splits['test'], 2) and watch.waits)
        assert _where(model) == {kind}, f'a tensor of the model lies on {_where(model)}'
    return dict(waits=sorted(waits), doubles=sorted(watch.doubles))


@contextmanager
def _sync_warnings(device):
    "A function that lists where this block has waited for a GPU so far"
    with warnings.catch_warnings(record=True) as seen:
        if device.type == 'cuda':
            warnings.filterwarnings('always', 'called a synchronizing')
            torch.cuda.set_sync_debug_mode('warn')
        try: yield lambda: {(_function_at(w.filename, w.lineno), 'wait') for w in seen if 'synchronizing' in str(w.message)}
        finally:
            if device.type == 'cuda': torch.cuda.set_sync_debug_mode('default')


def _check_real(data, mode):
    "One case on a device that is there"
    model, began = build_model(data), time.perf_counter()
    if mode == 'train':
        with _sync_warnings(data.device) as waits: losses, waits, _ = _train(model, data, waits)
        idle = [name for name, p in model.named_parameters() if p.grad is None or p.grad.device != p.device or not p.grad.isfinite().all()]
        assert not idle, f'no finite gradient for {", ".join(idle[:4])}'
        result = dict(losses=losses, waits=sorted(waits))
    else:
        label = predict(model, data, data.splits['test'], 2)[0]
        assert np.isfinite(label).all(), f'predictions are {label}'
        result = dict(predictions=label, waits=[])
    assert _where(model) == {data.device.type}, f'a tensor of the model lies on {_where(model)}'
    return dict(result, seconds=time.perf_counter()-began)


def check_method(name, backbone, mode, precision, device, small=True, **changes):
    """Run one case, a training step or the scores of two dives, and return what came out; an `AssertionError` or PyTorch's own where it fails

    name: a method of the zoo; backbone: 'frozen' | 'finetune'; mode: 'train' | 'eval'; precision: 'fp32' | 'bf16'; device: 'cpu', 'cuda', or
    'fake cuda'; small: fine-tune the first third of I3D; changes: settings of the run, and `size`, `per_dd` of `make_data`. Returns waits: (function, reason) of all that waited
    for the device in the training steps and is not in `ALLOWED`; on a real device also seconds, and losses or predictions; on a GPU the
    predictions were compared with those of the CPU.
    """
    fake = device.startswith('fake ')
    if device == 'fake standin': register_stand_in()
    net = _backbone(small, 'meta' if fake else 'cpu') if backbone == 'finetune' else None
    data = make_data(name, backbone, precision, device.removeprefix('fake '), deepcopy(net), **changes)
    result = (_check_fake if fake else _check_real)(data, mode)
    if data.device.type == 'cuda' and not fake and mode == 'eval':
        expected = _check_real(make_data(name, backbone, 'fp32', 'cpu', deepcopy(net), **changes), mode)['predictions']
        result['difference'] = float(np.abs(result['predictions']-expected).max())
        limit = 1. if precision == 'fp32' else 5.
        assert result['difference'] < limit, f"{name}: {device} says {result['predictions']}, the CPU {expected}"
    if mode == 'train':
        result['allowed'] = sorted({function for function, _ in result['waits'] if function in allowed(name)})
        result['waits'] = [wait for wait in result['waits'] if wait[0] not in allowed(name)]
    assert not result.get('doubles'), f"{name}: float64 on the device in {result['doubles']}, which some devices (mps) do not have"
    return result


def check_heat(name, device='standin'):
    """Ask all heat maps for the score of method `name` on a device that is not there, with maps, exemplars and reference on the CPU; the shapes that came

    `device`: one for which autograd runs without it, from `register_stand_in`.
    """
    register_stand_in()
    data = make_data(name, 'frozen', device=device)
    with fake_device() as watch:
        model = build_model(data).eval()
        with watch.fake, watch:
            maps = {s: torch.rand(4, 1024, 2, 4, 4) for s in ('scene', 'actor')}
            with torch.no_grad(): feature = model.encode(Batch(**{s: torch.rand(2, 4, 1024, device=device) for s in maps})).feature.cpu()
            chain = HeadOnMaps(model, exemplar=(feature, torch.rand(2)), reference={s: torch.rand(1024, 2, 4, 4) for s in maps})
            heat = [method(chain, maps) for method in MAP_METHODS.values()]
        assert {m.device.type for maps in heat for m in maps.values()} == {'cpu'}
    return {tuple(m.shape) for maps in heat for m in maps.values()}


class SmallI3D(I3D):
    "The first third of I3D, and one layer up to its 1024 channels"
    def __init__(self):
        super().__init__()
        kept = self.names[:self.names.index('MaxPool3d_4a_3x3')+1]
        for name in self.names:
            if name not in kept: delattr(self, name)
        self.Mixed_5c, self.names = Unit3D(480, 1024), [*kept, 'Mixed_5c']


@cache
def _backbone(small, device):
    "I3D, or a third of it; on 'meta' without numbers"
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(0)
        return (SmallI3D if small else I3D)().eval()


def main(devices, modes=MODES, precisions=PRECISIONS):
    "Run all cases on each of `devices`, print a line for each; the number that failed"
    failed = 0
    for device in devices:
        for case in (case for case in cases() if case[2] in modes and case[3] in precisions):
            began = time.perf_counter()
            try: text = ', '.join(f'{k} {v}' for k, v in check_method(*case, device).items() if k not in ('seconds', 'predictions'))
            except Exception as e: # goes on with the other cases, and is counted
                failed, text = failed+1, f'FAILED {type(e).__name__}: {str(e)[:300]}'
            print(f'{device:9} {" ".join(case):32} {time.perf_counter()-began:6.2f} s  {text}', flush=True)
    return failed


if __name__ == '__main__': sys.exit(main(sys.argv[1:] or ['fake cuda']))
