"Training that is killed and resumed, both modes, bad input that is found before anything is trained"
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from fspn_nb.batches.sources import ClipDataset
from fspn_nb.config import override,finediving,run_id,save_cfg
from fspn_nb.evaluate import evaluate
from fspn_nb.methods import METHODS
from fspn_nb.train import fit,launch
from fspn_nb.training.checkpoint import Preempted,backup_path,load_ckpt,newest_ckpt,save_ckpt
from fspn_nb.training.loop import build_model
from fspn_nb.training.predict import predict
from fspn_nb.training.prepare import prepare

SMALL = dict(synthetic__n_train=6, synthetic__n_test=4)


@pytest.fixture(scope='session', autouse=True)
def quiet():
    "No progress bars, one thread: the same bits whatever the machine has"
    os.environ['IN_TEST'] = '1'
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def release(): return prepare(finediving('smoke', **SMALL), 'cpu') # renders and encodes once; later calls read the cache


def weights(run): return torch.load(run/'last.pt', weights_only=True)['model']


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(cfg, tmp, *more):
    "The trainer as its own process"
    env = dict(os.environ, OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-m', 'fspn_nb.train', str(save_cfg(cfg, tmp/'config.json')), '--out', str(tmp), '--device', 'cpu', *more],
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(run, cfg, epoch):
    "Until a checkpoint of a later epoch is there"
    deadline = time.time()+200
    while time.time() < deadline:
        try:
            if load_ckpt(run/'last.pt', run_id(cfg))['epoch'] > epoch: return
        except FileNotFoundError: pass
        time.sleep(.02)


LONG = finediving('smoke', **SMALL, model__name='fspn_s', train__epochs=60, train__batch_size=2, model__dropout=.3)


@pytest.fixture(scope='session')
def whole(release, tmp_path_factory):
    "A run that nobody interrupts; in this process, while those that are stopped are processes of their own"
    return fit(LONG, tmp_path_factory.mktemp('whole'), 'cpu')


@pytest.mark.parametrize('sign,status', [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_a_run_that_is_stopped_ends_where_the_whole_one_ends(whole, tmp_path, sign, status):
    cfg,run = LONG,tmp_path/'finediving'/run_id(LONG)
    p = start(cfg, tmp_path, '--max-overhead', '.3')
    wait_for(run, cfg, 3)
    p.send_signal(sign)
    text = p.communicate(timeout=60)[0]
    assert p.returncode == status, 'it must have been stopped, not finished'
    state = load_ckpt(run/'last.pt', run_id(cfg))
    assert 3 < state['epoch'] < 60
    if sign == signal.SIGTERM: assert 'everything is saved' in text and f"epoch {state['epoch']+1}, step {state['within_epoch']['step']}" in text
    again = start(cfg, tmp_path)
    assert again.wait(timeout=300) == 0
    assert same(weights(run), weights(whole))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(whole, tmp_path, capsys):
    cfg,run = LONG,tmp_path/'finediving'/run_id(LONG)
    p = start(cfg, tmp_path, '--max-overhead', '1')
    wait_for(run, cfg, 2)
    p.kill()
    p.wait()
    for damage in (lambda b: b[:len(b)//2], lambda b: b[:len(b)//2]+bytes([b[len(b)//2]^1])+b[len(b)//2+1:]):
        sound = (run/'last.pt').read_bytes()
        (run/'last.pt').unlink() # after a kill it may be one file with its backup, which stays sound
        (run/'last.pt').write_bytes(damage(sound))
        assert newest_ckpt(run, run_id(cfg)) is not None
        assert 'going on from the checkpoint before it' in capsys.readouterr().out
    assert fit(cfg, tmp_path, 'cpu') == run
    assert same(weights(run), weights(whole))


@pytest.mark.parametrize('links', [True, False])
def test_a_kill_between_backup_and_checkpoint_loses_neither(tmp_path, monkeypatch, links):
    last = save_ckpt(tmp_path/'last.pt', keep_backup=True, run_id='run', epoch=1)
    def killed(source, target):
        if Path(target) == last: raise SystemExit('killed')
        rename(source, target)
    def no_links(*a): raise OSError(95, 'Operation not supported')
    rename = os.replace
    if not links: monkeypatch.setattr('fspn_nb.training.checkpoint.os.link', no_links)
    monkeypatch.setattr('fspn_nb.core.os.replace', killed)
    with pytest.raises(SystemExit, match='killed'): save_ckpt(last, keep_backup=True, run_id='run', epoch=2)
    assert newest_ckpt(tmp_path, 'run')['epoch'] == 1 and last.is_file() == links
    monkeypatch.setattr('fspn_nb.core.os.replace', rename)
    for epoch in (2,3): save_ckpt(last, keep_backup=True, run_id='run', epoch=epoch)
    assert [load_ckpt(path, 'run')['epoch'] for path in (last, backup_path(last))] == [3,2]
    assert sorted(path.name for path in tmp_path.iterdir()) == ['last.backup.pt','last.pt']


def test_what_a_kill_left_behind_is_removed(release, tmp_path):
    cfg = finediving('smoke', **SMALL, model__name='i3d_mlp', train__epochs=1)
    run = tmp_path/'finediving'/run_id(cfg)
    run.mkdir(parents=True)
    (run/'.last.pt.77.part').write_bytes(b'half')
    fit(cfg, tmp_path, 'cpu')
    assert not list(run.glob('.*.part'))


def test_a_full_disk_is_found_before_training(release, tmp_path, monkeypatch):
    monkeypatch.setattr('fspn_nb.training.checkpoint.shutil.disk_usage', lambda p: shutil._ntuple_diskusage(10**9, 10**9-1000, 1000))
    with pytest.raises(OSError, match='for the checkpoints of'): fit(finediving('smoke', **SMALL), tmp_path, 'cpu', prepare(finediving('smoke', **SMALL), 'cpu'))


def test_a_disk_that_fills_up_costs_no_checkpoint(release, tmp_path, monkeypatch):
    cfg = finediving('smoke', **SMALL, model__name='i3d_mlp', train__epochs=3)
    def full(*a): raise OSError(28, 'No space left on device')
    def on_epoch_end(model, data, epoch, run):
        if epoch == 2: monkeypatch.setattr('fspn_nb.core.os.fsync', full)
    with pytest.raises(OSError, match='No space left'): fit(cfg, tmp_path, 'cpu', on_epoch_end=on_epoch_end, max_checkpoint_overhead=1)
    monkeypatch.undo()
    run = tmp_path/'finediving'/run_id(cfg)
    assert load_ckpt(run/'last.pt', run_id(cfg))['epoch'] == 1 and not list(run.glob('.*.part'))
    os.environ['IN_TEST'] = '1'
    fit(cfg, tmp_path, 'cpu')
    assert load_ckpt(run/'last.pt', run_id(cfg))['epoch'] == 3


TINY = dict(clip__size=32, clip__starts=(0,40), model__clips=2, weights='random', train__backbone='finetune', model__adapter=False, train__epochs=1)


def test_exemplars_of_the_batch(release, tmp_path):
    data = prepare(finediving('smoke', **SMALL, protocol='wo_dn', model__name='fspn_s', train__in_batch_exemplars=True, **TINY), 'cpu')
    seen,get_batch = [],data.source.get_batch
    data.source.get_batch = lambda ids, rng_key=None: (seen.append(len(ids)), get_batch(ids, rng_key))[1]
    fit(data.cfg, tmp_path, 'cpu', data)
    assert sum(seen) == 6, 'each training dive goes through the backbone once'
    assert run_id(data.cfg) != run_id(override(data.cfg, train__in_batch_exemplars=False))


def test_clips_in_small_portions_change_nothing(release, tmp_path):
    base = finediving('smoke', **SMALL, model__name='i3d_mlp', **TINY)
    logs = [pd.read_csv(fit(override(base, train__micro_batch=m), tmp_path, 'cpu')/'log.csv').total[0] for m in (0, 3)]
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


def test_two_processes_are_one(release, tmp_path):
    cfg = finediving('smoke', **SMALL, model__name='fspn_s', **dict(TINY, train__epochs=2))
    def measured(run):
        table = pd.read_csv(run/'predictions.csv')
        assert not table.uid.duplicated().any()
        return table.set_index('uid').pred
    one,two = fit(cfg, tmp_path/'1', 'cpu'),launch(cfg, tmp_path/'2', 'cpu', 2)
    assert json.loads((two/'provenance.json').read_text())['processes'] == 2
    command = [sys.executable, '-m', 'fspn_nb.evaluate', str(two), '--device', 'cpu', '--processes', '2']
    subprocess.run(command, check=True, capture_output=True, env=dict(os.environ, OMP_NUM_THREADS='1'))
    by_two = measured(two)
    for run in (one, two): evaluate(run, device='cpu')
    assert list(by_two.index) == list(measured(two).index) and (by_two-measured(two)).abs().max() < 1e-3
    # the gradients of the backbone are added up in another order, and Adam lends every weight its step, also those whose gradient is nothing but rounding:
    # below 1e-5 on CPUs with AVX-512, 2.4e-5 on one with AVX2
    assert (measured(two)/measured(one)-1).abs().max() < 1e-4


def test_several_processes_want_a_backbone_to_train(release, tmp_path):
    from fspn_nb.training.distributed import DistributedContext
    with pytest.raises(ValueError, match="need train.backbone='finetune' for 2 processes"): fit(finediving('smoke', **SMALL), tmp_path, 'cpu', dist=DistributedContext(0, 2))


def test_evaluation_repeats_itself(release, tmp_path):
    cfg = finediving('smoke', **SMALL)
    run = fit(cfg, tmp_path, 'cpu')
    first = evaluate(run, device='cpu')
    assert evaluate(run, device='cpu') == first
    assert first['n'] == 4 and first['data'] == 'synthetic'


@pytest.mark.parametrize('protocol', ['wo_dn','w_dn','w_dd'])
@pytest.mark.parametrize('method', ['i3d_mlp','fspn_s'])
def test_every_setting(release, tmp_path, method, protocol):
    run = fit(finediving('smoke', **SMALL, model__name=method, protocol=protocol, train__epochs=1), tmp_path, 'cpu')
    m = evaluate(run, device='cpu')
    assert (m['method'], m['protocol']) == (method, protocol)
    assert json.loads((run/'provenance.json').read_text())['data'] == 'synthetic'


@pytest.mark.parametrize('method', ['fspn_s', 'fspn_viterbi', 'tsa'])
def test_step_labels_are_read_by_methods_that_say_so_and_by_no_other(release, tmp_path, method):
    "FSPN and FSPN-Viterbi find the steps by themselves: with other step labels they end at the same bits; TSA does not, so the test would see it"
    data = prepare(finediving('smoke', **SMALL, model__name=method, train__epochs=2), 'cpu')
    other = replace(data, labels=replace(data.labels, transitions=data.labels.transitions//2))
    assert not torch.equal(data.labels.transitions, other.labels.transitions)
    first, second = (weights(fit(data.cfg, tmp_path/name, 'cpu', own)) for name, own in (('first', data), ('second', other)))
    assert all(torch.equal(value, second[name]) for name, value in first.items()) == ('transitions' not in METHODS[method].learns_from)


@pytest.mark.parametrize('method', ['fspn_s', 'fspn_viterbi'])
def test_finetune_mode_trains_the_backbone(release, tmp_path, method):
    clip = dict(clip__size=32, clip__starts=(0,40), model__clips=2, synthetic__n_train=6, synthetic__n_test=4, weights='random')
    cfg = finediving('smoke', **clip, train__backbone='finetune', model__adapter=False, model__name=method, train__epochs=1, train__batch_size=2)
    run = fit(cfg, tmp_path, 'cpu')
    w = weights(run)
    before = prepare(cfg, 'cpu').backbone
    torch.manual_seed(0)
    assert any(k.startswith('backbone.') for k in w)
    assert evaluate(run, device='cpu')['mode'] == 'finetune'
    running = [k for k in w if k.endswith('running_mean') and k.startswith('backbone.')]
    assert running and all(torch.equal(w[k], before.state_dict()[k.removeprefix('backbone.')]) for k in running), 'BatchNorm statistics must stay frozen'


def decoding(n):
    "What a run with `n` workers works on that decodes each clip anew, as where the disk is too small for the store"
    data = prepare(override(finediving('smoke', **SMALL, model__name='fspn_s', **TINY), train__workers=n), 'cpu')
    return replace(data, source=ClipDataset(data.release.samples, data.cfg, data.boxes[1]))


@pytest.fixture(scope='module')
def decoded(release, tmp_path_factory):
    "A run that decodes each clip, without workers"
    data = decoding(0)
    assert not data.source.pool
    run = fit(data.cfg, tmp_path_factory.mktemp('decoded'), 'cpu', data)
    evaluate(run, data)
    return run


def test_finetune_results_do_not_depend_on_workers(decoded, tmp_path):
    runs = [decoded]
    for n in (1,4):
        data = decoding(n)
        assert data.source.pool
        runs.append(fit(data.cfg, tmp_path, 'cpu', data))
        evaluate(runs[-1], data)
    assert len({run.name for run in runs}) == 3
    assert all(same(weights(runs[0]), weights(r)) for r in runs[1:])
    assert len({(r/'predictions.csv').read_text() for r in runs}) == 1


def test_the_store_gives_what_decoding_gives(decoded, tmp_path):
    kept = prepare(finediving('smoke', **SMALL, model__name='fspn_s', **TINY), 'cpu')
    assert type(kept.source).__name__ == 'CachedDataset'
    run = fit(kept.cfg, tmp_path, 'cpu', kept)
    assert run.name == decoded.name and same(weights(run), weights(decoded))


def test_validation_is_cut_from_training(release, tmp_path):
    cfg = finediving('smoke', **SMALL, train__val_fraction=.5, eval__checkpoint_selection='best_val', model__name='i3d_mlp')
    run = fit(cfg, tmp_path, 'cpu')
    assert (run/'best_val.pt').exists()
    assert evaluate(run, device='cpu')['checkpoint_selection'] == 'best_val'
    splits = {line.split(',')[5] for line in (run/'predictions.csv').read_text().splitlines()[1:]}
    assert splits == {'test','val'}


def counted(monkeypatch, *names):
    "Replace functions of the package by counting ones, in every module that has imported them; gives name to number of calls"
    calls = dict.fromkeys(names, 0)
    def counting(name, real):
        def call(*args):
            calls[name] += 1
            return real(*args)
        return call
    for module in [m for name,m in sys.modules.items() if name.split('.')[0] == 'fspn_nb']:
        for name in names:
            if callable(real := vars(module).get(name)): monkeypatch.setattr(module, name, counting(name, real))
    return calls


@pytest.mark.parametrize('method', ['fspn_s','i3d_mlp'])
def test_a_prepared_run_is_resolved_once(release, tmp_path, monkeypatch, method):
    cfg = finediving('smoke', **SMALL, protocol='wo_dn', model__name=method, train__epochs=2, train__val_fraction=.5)
    calls = counted(monkeypatch, 'protocol_variant', 'run_id')
    data = prepare(cfg, 'cpu')
    assert min(calls.values()) > 0, 'the counting functions are in place'
    calls.update(dict.fromkeys(calls, 0))
    run = fit(cfg, tmp_path, 'cpu', data, max_checkpoint_overhead=1)
    evaluate(run, data)
    predict(build_model(data), data, data.splits['test'], 3)
    assert fit(cfg, tmp_path, 'cpu', data) == run, 'a finished run is found'
    assert set(calls.values()) == {0}, calls


def test_what_follows_from_the_configuration_follows_it(release):
    other = replace(release, cfg=override(release.cfg, protocol='wo_dn'))
    assert (other.run_id, other.variant.exemplar_group) == (run_id(other.cfg), 'any')
    assert (release.run_id, release.variant.exemplar_group, release.dataset_protocol.title) == (run_id(release.cfg), 'action', 'FineDiving')


def test_data_of_another_run(release, tmp_path):
    with pytest.raises(ValueError, match='need the data of the run that is trained'): fit(override(release.cfg, seed=1), tmp_path, 'cpu', release)


@pytest.mark.parametrize('lost', [('config.json','provenance.json','log.csv'), ('log.csv',), ('provenance.json',), ('last.pt','last.backup.pt')])
def test_a_folder_that_lacks_a_file_is_trained_anew(release, tmp_path, capsys, lost):
    cfg = finediving('smoke', **SMALL, model__name='i3d_mlp')
    run = fit(cfg, tmp_path, 'cpu', max_checkpoint_overhead=1)
    trained = weights(run)
    for name in lost: (run/name).unlink()
    capsys.readouterr()
    assert fit(cfg, tmp_path, 'cpu') == run
    assert f"{run.name}: no {lost[0]}" in (printed := capsys.readouterr().out) and 'training starts from the beginning' in printed
    assert same(weights(run), trained) and len(pd.read_csv(run/'log.csv')) == 2
    fit(cfg, tmp_path, 'cpu')
    assert 'training starts' not in capsys.readouterr().out, 'the folder is complete again'


def stopped(cfg, out, data, after, how=KeyboardInterrupt):
    "Train until `after` epochs, then stop; a checkpoint after every step"
    def stop(model, data, epoch, run):
        if epoch == after: raise how
    with pytest.raises(how): fit(cfg, out, 'cpu', data, stop, max_checkpoint_overhead=1)
    return out/cfg.dataset/run_id(cfg)


@pytest.mark.parametrize('choice', ['last', 'best_val'])
def test_an_unfinished_training_is_not_measured(release, tmp_path, choice):
    cfg = finediving('smoke', **SMALL, train__val_fraction=.5, eval__checkpoint_selection=choice, model__name='i3d_mlp')
    data = prepare(cfg, 'cpu')
    run = stopped(cfg, tmp_path, data, 2)
    with pytest.raises(ValueError, match='need a run that was trained to its end, got one after 1 of 2 epochs; give the command that trains it again'):
        evaluate(run, data)
    assert not list(run.glob('predictions*')) and not (run/'metrics.json').exists()
    fit(cfg, tmp_path, 'cpu', data)
    assert evaluate(run, data)['n'] == 4


def test_a_training_anew_leaves_no_results_of_the_one_before(release, tmp_path):
    from fspn_nb.experiments.grid import is_there,run_one
    cfg = finediving('smoke', **SMALL, model__name='fspn_s', model__stages=1)
    run,metrics,data = run_one(cfg, tmp_path, 'cpu', extras=('watch','votes')) # without its weights
    before = (run/'predictions.csv').read_bytes()
    assert is_there(run, False, ('watch','votes')) and not is_there(run, True)
    stopped(cfg, tmp_path, data, 2)
    assert not is_there(run, False) and sorted(path.name for path in run.glob('*.csv')) == ['log.csv']
    assert run_one(cfg, tmp_path, 'cpu', data, ('watch','votes'), keep_weights=True)[1] == metrics
    assert is_there(run, True, ('watch','votes')) and (run/'predictions.csv').read_bytes() == before and newest_ckpt(run, run.name)['epoch'] == 2


def test_sigterm_after_the_last_step_stops_what_comes_next(release, tmp_path):
    cfg = finediving('smoke', **SMALL, model__name='i3d_mlp')
    late = lambda model, data, epoch, run: epoch == 2 and os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Preempted, match='end of the training'): fit(cfg, tmp_path, 'cpu', on_epoch_end=late)
    run = fit(cfg, tmp_path, 'cpu')
    assert newest_ckpt(run, run.name)['epoch'] == 2 and evaluate(run, device='cpu')['n'] == 4, 'nothing is lost'


def test_lost_weights_of_the_best_epoch(release, tmp_path, capsys):
    cfg = finediving('smoke', **SMALL, train__val_fraction=.5, eval__checkpoint_selection='best_val', model__name='i3d_mlp')
    run = fit(cfg, tmp_path, 'cpu')
    (run/'best_val.pt').unlink()
    fit(cfg, tmp_path, 'cpu')
    assert 'no best_val.pt' in capsys.readouterr().out and (run/'best_val.pt').is_file()


def test_unwritable_out(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(PermissionError, match='folder that can be written'): fit(finediving('smoke', **SMALL), tmp_path/'file'/'reports')


@pytest.mark.parametrize('change_,error', [
    (dict(model__name='resnet'), 'model.name must be one of'), (dict(protocol='dn'), 'protocol must be one of'), (dict(train__epochs=0), 'at least 1'),
    (dict(data_root='/nowhere'), 'nowhere'), (dict(weights='nowhere.pth'), 'nowhere.pth')])
def test_bad_input_before_training(tmp_path, change_, error):
    with pytest.raises((ValueError, FileNotFoundError), match=error): fit(finediving('smoke', **SMALL, **change_), tmp_path, 'cpu')


def test_checkpoint_of_another_variant(release, tmp_path):
    cfg = finediving('smoke', **SMALL, model__name='i3d_mlp', train__epochs=1)
    run = fit(cfg, tmp_path, 'cpu')
    other = override(cfg, seed=1)
    target = tmp_path/'finediving'/run_id(other)
    target.mkdir()
    (target/'last.pt').write_bytes((run/'last.pt').read_bytes())
    with pytest.raises(ValueError, match='another variant needs another folder'): fit(other, tmp_path, 'cpu')
