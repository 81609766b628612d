"Memory: what a step keeps, how many clips at a time fit, and what happens where memory runs out all the same"
import json
import multiprocessing
import os

import pandas as pd
import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fspn_nb import processes
from fspn_nb.config import finediving,load_cfg,make_config,override,run_id,save_cfg,validate
from fspn_nb.evaluate import evaluate
from fspn_nb.models.i3d import I3D,InceptionBlock,SamePool,same_pad
from fspn_nb.models.with_backbone import encode_frames
from fspn_nb.train import fit
from fspn_nb.training import memory
from fspn_nb.training.checkpoint import load_ckpt
from fspn_nb.training.loop import build_model,compute_gradients,make_optimiser,make_schedule,train_step
from fspn_nb.training.prefetch import load_batches
from fspn_nb.training.prepare import prepare

SMALL = dict(synthetic__n_train=6, synthetic__n_test=4)
TINY = dict(clip__size=32, clip__starts=(0,40), model__clips=2, weights='random', train__backbone='finetune', model__adapter=False, train__epochs=1)
CPU = torch.device('cpu')


@pytest.fixture(scope='session', autouse=True)
def quiet():
    "No progress bars, one thread: the same bits whatever the machine has"
    os.environ['IN_TEST'] = '1'
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def release(): return prepare(finediving('smoke', **SMALL), 'cpu') # renders once; later calls read the cache


# --- what a step keeps ---

def plain_pool(pool, x):
    "PyTorch's own pooling, which keeps the places of the maxima"
    return F.max_pool3d(x, pool.kernel, pool.stride, [a for a,_ in same_pad(x.shape[2:], pool.kernel, pool.stride)], 1, True)


def kept_storages(forward):
    "(result, {storage: bytes by dtype}) of what autograd keeps"
    kept = {}
    def pack(t): kept[t.untyped_storage().data_ptr()] = t; return t
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t): out = forward()
    return out,list(kept.values())


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize('kernel,stride,shape', [((1,3,3), (1,2,2), (2,3,4,9,10)), ((3,3,3), (1,1,1), (1,5,3,7,6)), ((2,2,2), (2,2,2), (3,2,5,5,4)),
                                                 ((3,3,3), (2,2,2), (2,4,1,1,2))])
def test_pool_has_the_bits_of_the_plain_one_and_keeps_no_places(kernel, stride, shape, layout):
    torch.manual_seed(0)
    x = torch.randn(shape).relu().contiguous(memory_format=layout).requires_grad_() # half zeros: many ties
    pool = SamePool(kernel, stride)
    y,kept = kept_storages(lambda: pool(x))
    plain = plain_pool(pool, x)
    weights = torch.rand_like(plain)
    assert torch.equal(y, plain) and y.stride() == plain.stride()
    assert [t.data_ptr() for t in kept] == [x.data_ptr()], 'its input alone'
    assert torch.equal(*(torch.autograd.grad(z, x, weights)[0] for z in (y, plain)))


def test_pool_finds_places_part_by_part(monkeypatch):
    "Many clips at once: the places of all of them never lie in memory together in the backward pass"
    x = torch.rand(8, 300, 2, 85, 84).requires_grad_() # 34 million outputs: two parts
    pool,sizes,plain = SamePool((1,1,1), (1,1,1)),[],F.max_pool3d
    y = pool(x)
    monkeypatch.setattr(F, 'max_pool3d', lambda *args, **options: (sizes.append(len(args[0])), plain(*args, **options))[1])
    grad, = torch.autograd.grad(y.sum(), x)
    monkeypatch.undo()
    assert len(sizes) == 2 and sum(sizes) == 8
    assert grad.sum() == y.numel()


@pytest.mark.parametrize('freeze_bn', [True, False])
def test_block_has_the_bits_of_four_branches_and_keeps_them_once(freeze_bn):
    torch.manual_seed(0)
    block = InceptionBlock(16, (4, 6, 8, 3, 4, 4)).to(memory_format=torch.channels_last_3d)
    if freeze_bn: block.eval()
    x = torch.rand(2, 16, 3, 5, 6).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    def separate(): # the ReLU in each branch, as before
        parts = [F.relu(part) for part in (block.b0(x), block.b1b(block.b1a(x)), block.b2b(block.b2a(x)), block.b3b(plain_pool(block.b3a, x)))]
        return torch.cat(parts, 1)
    inputs = [x, *block.parameters()]
    (y,kept),(z,more) = kept_storages(lambda: block(x)),kept_storages(separate)
    assert torch.equal(y, z)
    for p,q in zip(*(torch.autograd.grad(out.square().sum(), inputs) for out in (y, z))): assert torch.equal(p, q)
    size = lambda tensors: sum(t.untyped_storage().nbytes() for t in tensors)
    places = x.numel()*8
    assert size(kept) == size(more)-places, 'the joined branches in place of the single ones, and no places'
    assert not any(t.dtype == torch.int64 for t in kept)


def test_a_step_in_bf16_keeps_half():
    "All that grows with the number of clips; forward values are those of pooling in fp32"
    net = I3D().eval().to(memory_format=torch.channels_last_3d)
    sizes = {}
    for dtype in (torch.float32, torch.bfloat16):
        for n in (1, 2):
            with torch.autocast('cpu', dtype, enabled=dtype != torch.float32):
                _,kept = kept_storages(lambda: encode_frames(net.features, torch.zeros(n, 3, 8, 32, 32, dtype=torch.uint8)))
            sizes[dtype,n] = sum(t.untyped_storage().nbytes() for t in kept)
    per_clip = {dtype: sizes[dtype,2]-sizes[dtype,1] for dtype in (torch.float32, torch.bfloat16)}
    assert 1.9 < per_clip[torch.float32]/per_clip[torch.bfloat16] <= 2 # a CPU adds a frame of zeros where a clip has two left
    x = torch.randn(1, 3, 2, 6, 6).relu().bfloat16()
    with torch.autocast('cpu', torch.bfloat16):
        assert SamePool((3,3,3), (1,1,1))(x).dtype == torch.bfloat16
        assert torch.equal(SamePool((3,3,3), (1,1,1))(x).float(), plain_pool(SamePool((3,3,3), (1,1,1)), x.float()))


def test_checkpoint_and_inference_pass_through_the_pool():
    torch.manual_seed(0)
    block,x = InceptionBlock(4, (2,2,2,2,2,2)).eval(),torch.rand(1, 4, 2, 4, 4, requires_grad=True)
    whole,parts = block(x),checkpoint(block, x, use_reentrant=False)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (whole, parts)))
    with torch.inference_mode(): assert torch.equal(block(x), whole)
    with pytest.raises(RuntimeError, match='once_differentiable'): # said, not wrong
        grad, = torch.autograd.grad(SamePool((3,3,3), (1,1,1))(x).square().sum(), x, create_graph=True)
        grad.sum().backward()


def test_a_step_after_one_that_was_stopped():
    "Ctrl-C in a notebook, which remembers the error with all its frames: nothing stays open that would catch what the next step keeps"
    conv,clips,remembered = torch.nn.Conv3d(3, 4, 3),torch.zeros(2, 3, 4, 5, 5, dtype=torch.uint8),[]
    def stopped(x): conv(x); raise KeyboardInterrupt
    try: encode_frames(stopped, clips, 1)
    except KeyboardInterrupt as e: remembered.append(e)
    encode_frames(conv, clips, 1).sum().backward()
    assert remembered and conv.weight.grad is not None
    w = torch.rand(3, requires_grad=True)
    assert torch.equal(torch.autograd.grad((w*w).sum(), w)[0], 2*w)


def test_compiled_pool_is_pytorchs_own():
    "What the compiler sees: an operation that it knows, in place of a function that it would have to trust"
    seen = []
    def backend(graph, inputs):
        seen.extend(node.name.removeprefix('l_').removesuffix('_') for node in graph.graph.nodes)
        return graph.forward
    x = torch.rand(1, 4, 2, 4, 4)
    pool = SamePool((3,3,3), (1,1,1))
    assert torch.equal(torch.compile(pool, backend=backend)(x), pool(x))
    assert seen == ['x', 'max_pool3d', 'output'], 'and no function of our own'


# --- how many clips at a time ---

def gradients_of(cfg, data, micro_batch):
    "Losses and gradients of the first step"
    model = build_model(data)
    model.zero_grad() # the backbone is that of `data`
    model.options['micro_batch'] = micro_batch
    ids = data.splits['train'][:3]
    batch = next(iter(load_batches(data.source, data.labels, [(ids, ids[::-1].copy())], data.device, 0)))
    losses = compute_gradients(model.train(), batch)
    return losses,{name: param.grad.clone() for name,param in model.named_parameters() if param.grad is not None}


@pytest.mark.parametrize('method', ['i3d_mlp','fspn_s'])
def test_results_do_not_depend_on_it(release, method):
    cfg = finediving('smoke', **SMALL, model__name=method, **TINY)
    data = prepare(cfg, 'cpu')
    expected,grads = gradients_of(cfg, data, 0)
    for size in (2, 5, 100): # a video, some clips of several videos, more than there are
        losses,others = gradients_of(cfg, data, size)
        for name,loss in losses.items(): assert torch.allclose(loss, expected[name], rtol=1e-5), (size, name)
        assert others.keys() == grads.keys()
        for part in ('backbone.','head.'):
            flat = [torch.cat([grad.flatten() for name,grad in one.items() if name.startswith(part)]) for one in (others, grads)]
            assert (flat[0]-flat[1]).norm() <= 1e-5*flat[1].norm() > 0, (size, part)
        if size == 2: # what a CPU takes where not all clips fit: the bits are those of all at once
            assert all(torch.equal(losses[name], loss) for name,loss in expected.items())
            assert all(torch.equal(grad, grads[name]) for name,grad in others.items())


def test_auto_is_the_zero_of_published_runs(tmp_path):
    cfg = make_config('mtl_aqa', 'paper', data_root='x')
    auto = override(cfg, train__micro_batch='auto')
    assert auto == cfg and run_id(auto) == run_id(cfg) and run_id(override(cfg, train__micro_batch=12)) != run_id(cfg)
    text = save_cfg(cfg, tmp_path/'a.json').read_text()
    (tmp_path/'b.json').write_text(text.replace('"micro_batch": 0', '"micro_batch": "auto"'))
    assert load_cfg(tmp_path/'b.json') == cfg
    for value,error in (('all', "need train.micro_batch='auto' or a number, got 'all'"), (-1, 'micro_batch must be at least 0, got -1')):
        with pytest.raises(ValueError, match=error): validate(override(cfg, train__micro_batch=value))


def test_statistics_of_batchnorm_do_not_depend_on_it(monkeypatch):
    "With freeze_bn=False the clips stay together, on every card"
    cfg = finediving('smoke', **TINY, train__freeze_bn=False)
    with pytest.raises(ValueError, match='need train.micro_batch=0 without train.freeze_bn, got 4'): validate(override(cfg, train__micro_batch=4))
    fake_gpu(monkeypatch, 1)
    assert memory.find_micro_batch(cfg, CPU, 130*2**30)['micro_batch'] == 0
    with pytest.raises(MemoryError, match='takes its statistics over all clips at once, so micro_batch cannot help: train.batch_size=3 would fit'):
        memory.find_micro_batch(cfg, CPU, 129*2**30)


class Line:
    "Stands in for `rehearse`: memory grows by 3 GiB with each clip, above 10 GiB"
    def __init__(self, clips): self.clips,self.asked = clips,[]

    def __call__(self, cfg, micro_batch=None, batch_size=None, device='cuda'):
        self.asked.append((micro_batch, batch_size))
        clips = self.clips*(batch_size or cfg.train.batch_size)//cfg.train.batch_size
        return type('Step', (), dict(peak=(10+3*(micro_batch or clips))*2**30, clips=clips))


def fake_gpu(monkeypatch, gib, clips=40, name='RTX'):
    "A device of that many free GiB that computes on the CPU"
    line = Line(clips)
    monkeypatch.setattr(memory, 'rehearse', line)
    monkeypatch.setattr(memory, 'surely_fits', lambda cfg, bytes: False)
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (int(gib*2**30), 10**12))
    for number in ('memory_reserved','memory_allocated'): monkeypatch.setattr(torch.cuda, number, lambda device: 0)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: name)
    return line


GPU = torch.device('cuda')


@pytest.mark.parametrize('gib,size', [(150, 0), (140, 20), (80, 20), (70, 14), (50, 10), (20, 2), (15, 1)])
def test_the_most_that_fits_into_nine_tenths(monkeypatch, tmp_path, gib, size, capsys):
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path))
    line = fake_gpu(monkeypatch, gib)
    cfg = make_config('mtl_aqa', 'paper', data_root='x', seed=gib)
    assert memory.pick_micro_batch(cfg, GPU) == size
    said,asked = capsys.readouterr().out,len(line.asked)
    assert said.count('\n') == 1 and (f'{size} of 40 clips at a time' if size else 'all 40 clips at once') in said
    assert memory.pick_micro_batch(cfg, GPU) == size and len(line.asked) == asked, 'asked once'
    assert memory.pick_micro_batch(override(cfg, train__micro_batch=3), GPU) == 3, 'a number is taken as it is'
    (answer := next((tmp_path/'micro_batch').glob('*.json'))).write_text(answer.read_text()[:20])
    assert memory.pick_micro_batch(cfg, GPU) == size and len(line.asked) > asked, 'a damaged answer is found anew'


def test_another_card_another_number_the_same_run(monkeypatch, tmp_path):
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path))
    cfg = make_config('mtl_aqa', 'paper', data_root='x')
    sizes = {}
    for name,gib in (('small', 50), ('large', 80), ('small', 30)):
        fake_gpu(monkeypatch, gib, name=name)
        sizes[name,gib] = memory.pick_micro_batch(cfg, GPU)
    assert sizes == {('small',50): 10, ('large',80): 20, ('small',30): 5}, 'less is free than last time: asked anew'
    fake_gpu(monkeypatch, 80, name='large')
    assert memory.pick_micro_batch(cfg, GPU, last=10) == 10, 'a run that goes on keeps its number'
    assert memory.pick_micro_batch(cfg, GPU, last=30) == 20, 'where it fits'


def test_nothing_fits(monkeypatch, tmp_path):
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path))
    fake_gpu(monkeypatch, 14)
    cfg = make_config('mtl_aqa', 'paper', data_root='x')
    with pytest.raises(MemoryError, match='need 13.0 GiB .* of fspn with one clip at a time, got 14.0 GiB free on cuda; take a smaller train.batch_size'):
        memory.pick_micro_batch(cfg, GPU)
    fake_gpu(monkeypatch, 60)
    inside = override(cfg, model__name='tsa_net')
    with pytest.raises(MemoryError, match='need 130.0 GiB .* got 60.0 GiB free on cuda; tsa_net works inside .*: train.batch_size=3 would fit, which is another run'):
        memory.pick_micro_batch(inside, GPU)
    fake_gpu(monkeypatch, 131) # more than nine tenths, but not more than all: no other choice
    assert memory.pick_micro_batch(inside, GPU) == 0


def test_a_cpu_takes_all_as_before_or_video_by_video(monkeypatch, tmp_path):
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path))
    cfg = finediving('smoke', **TINY)
    assert memory.surely_fits(cfg, 2**32) and memory.pick_micro_batch(cfg, CPU) == 0
    fake_gpu(monkeypatch, 1)
    monkeypatch.setattr(memory, 'available_memory', lambda device: 80*2**30)
    assert memory.pick_micro_batch(cfg, CPU) == 2, 'the clips of a video, for the same bits'
    assert memory.pick_micro_batch(override(cfg, train__backbone='frozen'), CPU) == 0


def _process(rank, port, sizes, answers):
    "One of two processes with another amount of free memory"
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE='2', LOCAL_RANK=str(rank), NODE_RANK='0')
    torch.distributed.init_process_group('gloo', rank=rank, world_size=2)
    def all_reduce(x, reduce_op): torch.distributed.all_reduce(x, getattr(torch.distributed.ReduceOp, reduce_op.upper())); return x
    fabric = type('Fabric', (), dict(device=CPU, all_reduce=staticmethod(all_reduce)))
    dist = memory.DistributedContext(rank, 2, fabric)
    def own(cfg, device, last, processes):
        if sizes[rank] < 0: raise MemoryError('need 9 GiB, got 1 GiB')
        return sizes[rank],''
    memory._own_micro_batch = own
    try: answers.put((rank, memory.pick_micro_batch(finediving('smoke', **TINY), CPU, dist)))
    except MemoryError as e: answers.put((rank, str(e)))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize('sizes,agreed', [((6, 4), 4), ((0, 4), 4), ((0, 0), 0), ((-1, 4), None)])
def test_processes_agree(sizes, agreed):
    import socket
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    context = multiprocessing.get_context('fork')
    answers = context.Queue()
    both = [context.Process(target=_process, args=(rank, port, sizes, answers)) for rank in range(2)]
    for process in both: process.start()
    got = dict(answers.get(timeout=60) for _ in both)
    for process in both: process.join(60)
    if agreed is None: assert got == {0: 'need 9 GiB, got 1 GiB', 1: 'need memory for a training step in all processes, got too little in another one, which says how much'}
    else: assert got == {0: agreed, 1: agreed}


# --- out of memory all the same ---

class FullCard:
    "Lets the calls `at` of a backbone fail, as on a GPU without memory; counts them"
    def __init__(self, at, error=torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')): self.at,self.error,self.calls = at,error,0

    def __call__(self, module, args):
        self.calls += 1
        if self.calls in self.at: raise type(self.error)(*self.error.args)


def run_with(cfg, out, at=(), **options):
    "The run `cfg` whose backbone fails at the calls `at`; (folder, how often it was called)"
    data,card = prepare(cfg, 'cpu'),FullCard(at, **options)
    data.backbone.Conv3d_1a_7x7.register_forward_pre_hook(card)
    return fit(cfg, out, 'cpu', data),card.calls


def log_of(run): return pd.read_csv(run/'log.csv').drop(columns='seconds')


def same_weights(a, b): return all(torch.equal(v, b[name]) for name,v in a.items())


HALVED = finediving('smoke', **SMALL, model__name='fspn_s', model__dropout=.3, **TINY, train__micro_batch=6)


@pytest.fixture(scope='module')
def half(release, tmp_path_factory):
    "The run with half as many clips from the start"
    return run_with(override(HALVED, train__micro_batch=3), tmp_path_factory.mktemp('half'))[0]


@pytest.mark.parametrize('call,where', [(2, 'the forward pass'), (5, 'the backward pass')]) # 16 clips, six at a time: three parts, and three again
def test_a_run_whose_first_step_fails_is_the_run_with_half_as_many_clips(half, tmp_path, capsys, call, where):
    run,expected = run_with(HALVED, tmp_path/'fails', at=(call,))[0],half
    said = capsys.readouterr().out
    assert said.count('memory ran out with 6 clips at a time (CUDA out of memory. Tried to allocate 2.00 GiB): the step is computed again, from now on with 3') == 1
    a,b = (load_ckpt(folder/'last.pt', folder.name) for folder in (run, expected))
    assert same_weights(a['model'], b['model']) and log_of(run).equals(log_of(expected)), where
    assert [json.loads((folder/'provenance.json').read_text())['micro_batch'] for folder in (run, expected)] == [3, 3]
    assert a['micro_batch'] == 3 and not processes.lock_owner(run.with_name(f'.{run.name}.lock'))


def test_memory_of_a_cpu_counts_too(release, tmp_path, capsys):
    "All clips at once fail: half of them; a run says the same in its log within 1e-5"
    cfg = finediving('smoke', **SMALL, model__name='i3d_mlp', **TINY)
    error = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
    (run,_),(expected,_) = run_with(cfg, tmp_path/'fails', at=(1,), error=error),run_with(cfg, tmp_path/'whole')
    assert 'memory ran out with 8 clips at a time' in capsys.readouterr().out
    assert log_of(run).total[0] == pytest.approx(log_of(expected).total[0], rel=1e-5)
    assert run.name == expected.name
    assert [json.loads((folder/'provenance.json').read_text())['micro_batch'] for folder in (run, expected)] == [4, 0]


def test_a_second_time_is_an_error(release, tmp_path):
    cfg = finediving('smoke', **SMALL, model__name='i3d_mlp', **TINY, train__micro_batch=8)
    with pytest.raises(MemoryError, match=r'need about [\d.]+ GiB for a training step of i3d_mlp with 4 clips at a time, got [\d.]+ GiB free on cpu after it ran out '
                                          r'\(CUDA out of memory.*\); take train.micro_batch=2, or take train.precision=bf16'):
        run_with(cfg, tmp_path, at=(1, 2))


def test_another_error_is_not_taken_for_it(release, tmp_path):
    cfg = finediving('smoke', **SMALL, model__name='i3d_mlp', **TINY, train__micro_batch=8)
    with pytest.raises(RuntimeError, match='an illegal memory access'):
        run_with(cfg, tmp_path, at=(1,), error=RuntimeError('CUDA error: an illegal memory access was encountered'))


def test_nothing_is_applied_twice(release):
    "Counters and statistics of the head, and random numbers, are those of one step"
    cfg = finediving('smoke', **SMALL, model__name='tsa', protocol='w_dn', **TINY)
    states = []
    for at,size in (((), 3), ((5,), 6)):
        data = prepare(cfg, 'cpu') # a backbone of its own
        model,gradients = build_model(data),memory.HalvingGradients(cfg)
        model.options['micro_batch'] = size
        model.backbone.Conv3d_1a_7x7.register_forward_pre_hook(FullCard(at)) # three parts, and again in the backward pass: the head has done its work by then
        ids = data.splits['train'][:4]
        batch = next(iter(load_batches(data.source, data.labels, [(ids, ids[::-1].copy())], data.device, 0)))
        optimiser = make_optimiser(model.train(), cfg)
        torch.manual_seed(5)
        losses = train_step(model, batch, optimiser, make_schedule(optimiser, cfg, 4), gradients=gradients)
        states.append((dict(model.head.named_buffers()), torch.rand(1), gradients.halved, losses))
    (first,number,_,losses),(second,other,halved,more) = states
    assert halved and torch.equal(number, other)
    assert int(first['teacher.done']) == int(second['teacher.done']) == 1
    assert same_weights(first, second) and same_weights(losses, more), 'the bits of a step with three clips at a time'


def test_what_cannot_be_halved_says_so(release):
    from fspn_nb.training.distributed import DistributedContext
    for changes,dist,why in ((dict(model__name='tsa_net'), DistributedContext(), 'tsa_net works inside the backbone.*; take a smaller train.batch_size'),
                             (dict(train__freeze_bn=False), DistributedContext(), 'takes its statistics over all clips at once; take a smaller train.batch_size'),
                             (dict(), DistributedContext(0, 2, object()), 'with several processes micro_batch is not halved by itself; take train.micro_batch=4')):
        cfg = finediving('smoke', **SMALL, **dict(dict(model__name='i3d_mlp'), **changes), **TINY)
        data = prepare(cfg, 'cpu')
        model = build_model(data).train()
        model.backbone.Conv3d_1a_7x7.register_forward_pre_hook(FullCard((1,)))
        batch = next(iter(load_batches(data.source, data.labels, [(data.splits['train'][:4], None)], data.device, 0)))
        with pytest.raises(MemoryError, match=why): memory.HalvingGradients(cfg)(model, batch, dist=dist)


def test_an_interrupted_run_keeps_its_number(release, tmp_path, monkeypatch):
    "Half as many clips after a lack of memory, a stop, and on: the bits are those of the run without the stop"
    cfg = override(finediving('smoke', **SMALL, model__name='fspn_s', **TINY), train__epochs=2)
    whole,_ = run_with(cfg, tmp_path/'whole', at=(1,))
    def stop(model, data, epoch, run): raise KeyboardInterrupt
    data = prepare(cfg, 'cpu')
    data.backbone.Conv3d_1a_7x7.register_forward_pre_hook(FullCard((1,)))
    saved = []
    def keep(model, data, epoch, run): saved.append(run); (epoch == 2) and stop(model, data, epoch, run)
    with pytest.raises(KeyboardInterrupt): fit(cfg, tmp_path/'stopped', 'cpu', data, on_epoch_end=keep, max_checkpoint_overhead=1)
    run = saved[0]
    assert load_ckpt(run/'last.pt', run.name)['micro_batch'] == 16, 'half of 32'
    monkeypatch.setattr(memory, 'surely_fits', lambda cfg, bytes: False)
    monkeypatch.setattr(memory, 'remembered_micro_batch', lambda cfg, device, bytes: dict(micro_batch=0, clips=32, peak=2**30, whole=2**30))
    fit(cfg, tmp_path/'stopped', 'cpu')
    a,b = (load_ckpt(folder/'last.pt', folder.name) for folder in (whole, run))
    assert a['micro_batch'] == b['micro_batch'] == 16 and same_weights(a['model'], b['model'])


def test_evaluation_in_smaller_parts_has_the_same_bits(release, tmp_path, capsys):
    cfg = finediving('smoke', **SMALL, model__name='fspn_s', **TINY)
    run,_ = run_with(cfg, tmp_path)
    first = evaluate(run, device='cpu')
    before = (run/'predictions.csv').read_bytes()
    data = prepare(cfg, 'cpu')
    data.backbone.Conv3d_1a_7x7.register_forward_pre_hook(FullCard((2, 4)))
    assert evaluate(run, data) == first and (run/'predictions.csv').read_bytes() == before
    assert capsys.readouterr().out.count('memory ran out with') == 2
