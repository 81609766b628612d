"Captured steps give the weights of ordinary ones, for every head and across interruptions"
import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import head_speed
from fspn_nb import train
from fspn_nb.batches.dataset import Labels
from fspn_nb.batches.sources import FeatureDataset
from fspn_nb.config import finediving,override
from fspn_nb.methods import METHODS
from fspn_nb.models.backbone import one_thread
from fspn_nb.train import fit
from fspn_nb.training import graphs
from fspn_nb.training.checkpoint import load_ckpt,rng_state
from fspn_nb.training.graphs import CudaGraph,GraphedGradients,HostWaits,RecordedGraph
from fspn_nb.training.loop import batch_sampler,compute_gradients,train_epoch
from fspn_nb.training.prefetch import load_batches,tensors_of
from fspn_nb.training.prepare import prepare

HEADS = sorted(name for name,method in METHODS.items() if not method.finetune_only)


@pytest.fixture(autouse=True)
def few_videos(monkeypatch):
    "Runs of the benchmark on 14 of 44 videos: batches of 4, 4, 4 and 2"
    monkeypatch.setattr(head_speed, 'VIDEOS', 44)
    monkeypatch.setattr(head_speed, 'PART', 14)


def new_run(method, **changes):
    "(model, data, optimiser, schedule) of a small run"
    run = head_speed.run_of(method, **dict(model__blocks=1, train__batch_size=4, train__schedule='one_cycle')|changes)
    if hasattr(run[0], 'on_train_start'): run[0].on_train_start(24) # TSA: six steps by true transitions
    return run


def trained(run, gradients, epochs=2):
    "Losses of each epoch, weights, and the state of the optimiser"
    model,data,optimiser,schedule = run
    with one_thread(): losses = [train_epoch(model, data, optimiser, schedule, epoch, gradients=gradients) for epoch in range(epochs)]
    return losses, model.state_dict(), optimiser.state_dict()


def same(a, b):
    "Nested dicts and lists with the same numbers"
    if isinstance(a, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)): return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# --- the same numbers ---

@pytest.mark.parametrize('method', HEADS)
def test_replayed_steps_end_at_the_same_bits(method):
    steps = GraphedGradients(RecordedGraph)
    assert same(trained(new_run(method), steps), trained(new_run(method), compute_gradients))
    assert len(steps.steps) == 2 and all(len(step.graph) for step in steps.steps.values()), 'one graph for the last step of an epoch, one for all others'


@pytest.mark.parametrize('change', [dict(train__in_batch_exemplars=True), dict(train__precision='bf16'), dict(model__pairing='absolute'), dict(model__use_bce=False, model__use_gc=False),
                                    dict(model__use_iap=False), dict(model__token_mode='frames', model__residual='scene'), dict(train__schedule='constant', train__optimiser='adam')],
                         ids=lambda change: ','.join(f'{k}={v}' for k,v in change.items()))
def test_so_do_the_switches_of_fspn(change):
    changes = dict(model__stages=1)|change
    assert same(trained(new_run('fspn', **changes), GraphedGradients(RecordedGraph)), trained(new_run('fspn', **changes), compute_gradients))


def test_more_batch_sizes_than_graphs():
    "Exemplars from the batch itself: packs make sizes of four, five and less"
    changes = dict(train__in_batch_exemplars=True, model__stages=1)
    steps = GraphedGradients(RecordedGraph, max_graphs=1)
    assert same(trained(new_run('fspn', **changes), steps), trained(new_run('fspn', **changes), compute_gradients))
    sizes = {len(ids) for epoch in range(2) for ids,_,_ in batch_sampler(new_run('fspn', **changes)[1], True, epoch)}
    assert len(steps.steps) == 1 < len(sizes)


def first_batch(model, data):
    "The first batch of a run, after a step of `model` that asks whether there are intervals, and a look at the labels"
    batch = next(load_batches(data.source, data.labels, [step[:2] for step in batch_sampler(data, model.uses_exemplar, 0)], data.device))
    compute_gradients(model.train(), batch)
    batch.checked = True
    if batch.exemplar is not None: batch.exemplar.checked = True
    return batch


@pytest.mark.parametrize('method', HEADS)
def test_a_step_has_nothing_to_wait_for(method):
    model,data,_,_ = new_run(method)
    batch = first_batch(model, data)
    with HostWaits() as look: compute_gradients(model, batch)
    assert look.total > 10 and not look.waits


@pytest.mark.parametrize('method', sorted({*HEADS}-{'fspn','fspn_m','i3d_lstm'})) # larger FSPNs are the same code; torch.compile refuses an LSTM as such
def test_the_compiler_sees_a_step_as_one_graph(method):
    "With `fullgraph`, whatever it cannot follow is an error: Python that asks for a number, for one"
    model,data,_,_ = new_run(method, **dict(model__stages=1) if method.startswith('fspn') else {})
    batch = first_batch(model, data)
    state = {name: v.clone() for name,v in model.state_dict().items()}
    torch.manual_seed(0)
    expected = model(batch).losses
    model.load_state_dict(state)
    torch.manual_seed(0)
    torch._dynamo.reset()
    assert same(torch.compile(model, backend='eager', fullgraph=True)(batch).losses, expected)


def test_the_benchmark_has_both_ways(monkeypatch):
    monkeypatch.setattr(head_speed, 'VIDEOS', 12)
    assert head_speed.captured_difference('fspn_s', 'cpu', 4) == 0
    rate = head_speed.head_epoch_rate('i3d_mlp', False, 'cpu', 4, 1)
    assert rate['ms_per_step'] > 0 and rate['epochs_200_minutes'] == pytest.approx(200*rate['seconds']/60)
    with pytest.raises(ValueError, match='need a GPU for captured steps'): head_speed.head_epoch_rate('i3d_mlp', True, 'cpu', 4, 1)


# --- interruptions ---

class Stopped(Exception): pass


@pytest.mark.parametrize('before,after', [(RecordedGraph, None), (None, RecordedGraph), (RecordedGraph, RecordedGraph)])
def test_an_interrupted_epoch_goes_on_with_or_without_graphs(before, after):
    gradients = [compute_gradients if graph is None else GraphedGradients(graph) for graph in (before, after)]
    whole = trained(new_run('fspn_s'), compute_gradients)
    model,data,optimiser,schedule = new_run('fspn_s')
    left = []
    def stop(position):
        if position['step'] == 3:
            left.append(dict(position, rng=rng_state()))
            raise Stopped
    with one_thread():
        first = train_epoch(model, data, optimiser, schedule, 0, gradients=gradients[0])
        with pytest.raises(Stopped): train_epoch(model, data, optimiser, schedule, 1, on_step_end=stop, gradients=gradients[0])
        other = new_run('fspn_s')
        for new,old in zip((other[0], *other[2:]), (model, optimiser, schedule)): new.load_state_dict(old.state_dict())
        second = train_epoch(*other, 1, resume_from=left[0], gradients=gradients[1])
    assert same(([first, second], other[0].state_dict(), other[2].state_dict()), whole)


def test_checkpoints_are_the_same_file_content(tmp_path, monkeypatch):
    cfg = finediving('smoke', synthetic__n_train=6, synthetic__n_test=4, weights='random', clip__size=32, model__name='fspn_s', model__blocks=1, train__epochs=3)
    data = prepare(cfg, 'cpu')
    plain = fit(cfg, tmp_path/'plain', 'cpu', data)
    used = []
    def pick(model, data):
        used.append(GraphedGradients(RecordedGraph))
        return used[0]
    monkeypatch.setattr(train, 'pick_gradients', pick)
    graphed = fit(cfg, tmp_path/'graphed', 'cpu', data)
    assert len(used) == 1 and len(used[0].steps) == 2, 'the trainer asks once, and its steps are captured'
    assert same(*({k: v for k,v in load_ckpt(run/'last.pt', run.name).items() if k != 'history'} for run in (plain, graphed)))


# --- the device ---

def test_features_are_looked_up_on_the_gpu():
    "Tensors that have a device and no numbers: what mixes devices is an error there"
    ids,exemplars = np.array([5,0,3]),np.array([1,2,4])
    with FakeTensorMode():
        scene,column = torch.empty(6, 9, 1024),torch.empty(6)
        labels = Labels(column, column, torch.zeros(6, 2, dtype=torch.long), tuple('abcdef'), judges=torch.empty(6, 7))
        source = FeatureDataset(scene, scene, short_clip_features=torch.empty(6, 20, 1024))
        source.copies['cuda'] = FeatureDataset(scene.cuda(), scene.cuda(), short_clip_features=source.extra['short_clip_features'].cuda())
        batches = list(load_batches(source, labels, [(ids, exemplars), (ids[:1], exemplars[:1])], torch.device('cuda')))
    assert [len(batch) for batch in batches] == [3, 1] and batches[0].uid == ('f','a','d') and batches[0].exemplar.uid == ('b','c','e')
    tensors = tensors_of(batches[0])
    assert len(tensors) == 14 and all(x.device.type == 'cuda' and len(x) == 3 for x in tensors)


class FakeCuda:
    "Writes down what is asked of `torch.cuda`"
    def __init__(self, monkeypatch):
        self.calls,self.current = [],'outside'
        for name in ('CUDAGraph','Stream','current_stream','stream','device','graph'): monkeypatch.setattr(torch.cuda, name, getattr(self, name), raising=False)

    def CUDAGraph(self): return SimpleNamespace(replay=lambda: self.calls.append('replay'))

    def Stream(self, device): return SimpleNamespace(wait_stream=lambda other: self.calls.append('side waits'))

    def current_stream(self, device): return SimpleNamespace(wait_stream=lambda other: self.calls.append('outside waits'))

    @contextlib.contextmanager
    def stream(self, stream):
        self.calls.append('on the side')
        yield
        self.calls.append('back')

    device = stream

    @contextlib.contextmanager
    def graph(self, graph, stream):
        self.calls.append('begin')
        yield
        self.calls.append('end')


def test_calls_of_cuda_come_in_the_order_that_pytorch_asks_for(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    graph = CudaGraph(torch.device('cuda'))
    assert graph.warm_up(lambda: cuda.calls.append('work') or 3) == 3
    assert cuda.calls == ['side waits','on the side','work','back','outside waits'], 'the warm-up sees what came before, and what follows sees its results'
    cuda.calls.clear()
    assert graph.capture(lambda: cuda.calls.append('work') or 4) == 4
    assert cuda.calls == ['on the side','begin','work','end','back']
    graph.replay()
    assert cuda.calls[-1] == 'replay'


def test_a_method_of_ones_own_is_captured_only_if_it_says_so(monkeypatch):
    monkeypatch.setattr(graphs, 'method_code', lambda name: '0123456789ab') # what a registered method has
    model,data,_,_ = new_run('i3d_mlp')
    data.device = torch.device('cuda')
    assert graphs.pick_gradients(model, data) is compute_gradients
    model.graph_safe = True
    assert isinstance(graphs.pick_gradients(model, data), GraphedGradients)
    data.cfg = override(data.cfg, train__capture='off')
    assert graphs.pick_gradients(model, data) is compute_gradients
