"A batch in shards: the mathematics of the whole batch, and the same bits whatever the threads do"
import threading
import time
from dataclasses import replace

import pytest
import torch

import head_speed
from fspn_nb.config import ModelCfg,finediving,override,run_id
from fspn_nb.evaluate import evaluate
from fspn_nb.models import double_conv
from fspn_nb.models.backbone import one_thread
from fspn_nb.models.encoder import Encoder
from fspn_nb.train import fit
from fspn_nb.training.loop import build_model,set_shards,train_epoch
from fspn_nb.training.prepare import prepare


@pytest.fixture
def few_videos(monkeypatch):
    "Runs of the benchmark on 44 videos"
    monkeypatch.setattr(head_speed, 'VIDEOS', 44)
    monkeypatch.setattr(head_speed, 'PART', 21) # the last step has five


def trained(shards, threads=1, late=None):
    "Weights after an epoch in `shards`, with `threads` of PyTorch's; the thread of shard `late` is held up"
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        model,*run = head_speed.run_of('fspn_s', shards)
        def wait(*_):
            if late is not None and getattr(double_conv._thread, 'rank', None) == late: time.sleep(.002)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d|torch.nn.Linear): module.register_forward_pre_hook(wait)
        with one_thread(): losses = train_epoch(model, *run, 0)
        assert torch.get_num_threads() == threads, 'the setting of the process is as before'
    finally: torch.set_num_threads(before)
    return losses, model.state_dict()


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_the_bits_depend_on_the_number_of_shards_alone(few_videos):
    whole,weights = trained(2)
    for other in (dict(threads=2), dict(late=0), dict(late=1)): assert equal(weights, trained(2, **other)[1]), other
    one,unsharded = trained(1)
    assert whole == pytest.approx(one, rel=1e-4) and not equal(weights, unsharded)
    assert trained(3)[0] == pytest.approx(one, rel=1e-4)


@pytest.mark.parametrize('change,n,actor', [({}, 3, True), (dict(stages=1), 2, False), (dict(use_iap=False, stages=1), 2, True), (dict(adapter=False, residual='scene', stages=2), 2, True),
                                            (dict(token_mode='frames', use_mtf=False, stages=1), 2, True), (dict(use_smt=False), 7, True)])
def test_values_and_gradients_are_those_of_the_whole_batch(change, n, actor):
    torch.manual_seed(0)
    encoder = Encoder(replace(ModelCfg(), blocks=1, **change)).double().train()
    streams = torch.randn(1+actor, 7, 9, 1024, dtype=torch.float64) # seven videos: shards of different size
    first = {k: v.clone() for k,v in encoder.state_dict().items()}
    results = []
    for shards in (1, n):
        encoder.load_state_dict(first)
        encoder.zero_grad()
        encoder.shards = shards
        out = encoder(*streams)
        torch.manual_seed(1)
        sum((x*torch.randn_like(x)).sum() for x in (out.feature, *out.extras.values())).backward()
        results.append([out.feature.detach(), *out.extras.values(), *(p.grad for p in encoder.parameters()), *encoder.buffers()])
    assert len(results[0]) == len(results[1])
    for a,b in zip(*results):
        assert (a is None) == (b is None)
        if a is not None: torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_an_error_in_one_shard_ends_the_step_and_is_the_one_that_is_raised():
    encoder = Encoder(replace(ModelCfg(), stages=1, blocks=1)).train()
    encoder.shards,threads = 2,threading.active_count()
    bad = torch.randn(4, 9, 1024)
    def fail(*_):
        if double_conv._thread.rank == 1: raise MemoryError('made for the test')
    hook = encoder.parser.iap.up.blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match='made for the test'): encoder(bad, bad)
    hook.remove()
    assert threading.active_count() == threads, 'no thread is left behind'
    assert encoder(bad, bad).feature.shape == (4, 256) # and the next step works


def test_a_single_video_and_evaluation_need_no_shards():
    whole,sharded = (Encoder(replace(ModelCfg(), stages=1, blocks=1)) for _ in range(2))
    sharded.load_state_dict(whole.state_dict())
    sharded.shards = 4
    x = torch.randn(3, 9, 1024)
    for videos,training in ((x[:1], True), (x, False)):
        a,b = (m.train(training)(videos, videos).feature for m in (whole, sharded))
        assert torch.equal(a, b)


def test_a_run_in_shards(tmp_path):
    cfg = finediving('smoke', synthetic__n_train=6, synthetic__n_test=4, model__name='fspn_s', train__epochs=1, train__shards=2)
    assert run_id(cfg) != run_id(override(cfg, train__shards=1))
    data,results,threads = prepare(cfg, 'cpu'),[],torch.get_num_threads()
    for n in (1, 2):
        torch.set_num_threads(n)
        try:
            run = fit(cfg, tmp_path/str(n), 'cpu', data=data)
            assert evaluate(run, data)['spearman'] is not None
            results.append((run/'predictions.csv').read_bytes())
        finally: torch.set_num_threads(threads)
    assert results[0] == results[1]
    elsewhere = replace(data, device=torch.device('meta')) # as a GPU: its head would not be trained in shards
    assert build_model(elsewhere) is not None, 'a trained run is opened on any device'
    with pytest.raises(ValueError, match='on meta; use train.shards=1'): set_shards(build_model(data), elsewhere)
