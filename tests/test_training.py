"Training that is killed and resumed, both modes, bad input that is found before anything is trained"
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fspn_nb.config import change, finediving, run_id, save_cfg
from fspn_nb.evaluate import evaluate
from fspn_nb.prepare import prepare
from fspn_nb.checkpoint import load_ckpt
from fspn_nb.train import fit

SMALL = dict(synth__n_train=6, synth__n_test=4)


@pytest.fixture(scope='session', autouse=True)
def quiet():
    "No progress bars, one thread: the same bits whatever the machine has"
    os.environ['IN_TEST'] = '1'
    torch.set_num_threads(1)


@pytest.fixture(scope='session')
def release(): return prepare(finediving('smoke', **SMALL), 'cpu') # renders and encodes once; later calls read the cache


def weights(run): return torch.load(run/'last.pt', weights_only=True)['model']


def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def start(cfg, tmp):
    "The trainer as its own process"
    env = dict(os.environ, OMP_NUM_THREADS='1')
    return subprocess.Popen([sys.executable, '-m', 'fspn_nb.train', str(save_cfg(cfg, tmp/'config.json')), '--out', str(tmp), '--device', 'cpu'],
                            env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_sigkill_in_an_epoch_changes_nothing(release, tmp_path):
    cfg = finediving('smoke', **SMALL, train__epochs=40, train__batch=2, model__dropout=.3)
    whole = start(cfg, tmp_path/'whole')
    text = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, text
    killed,run = start(cfg, tmp_path/'killed'),tmp_path/'killed'/'finediving'/run_id(cfg)
    deadline = time.time()+200
    while time.time() < deadline and not ((run/'log.csv').exists() and len((run/'log.csv').read_text().splitlines()) > 8): time.sleep(.02)
    time.sleep(.15) # into the next epoch
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, 'it must have been killed, not finished'
    assert 7 < load_ckpt(run/'last.pt', cfg)['epoch'] < 40
    again = start(cfg, tmp_path/'killed')
    assert again.wait(timeout=300) == 0
    assert same(weights(run), weights(tmp_path/'whole'/'finediving'/run_id(cfg)))


def test_evaluation_repeats_itself(release, tmp_path):
    cfg = finediving('smoke', **SMALL)
    run = fit(cfg, tmp_path, 'cpu')
    first = evaluate(run, device='cpu')
    assert evaluate(run, device='cpu') == first
    assert first['n'] == 4 and first['data'] == 'synthetic'


@pytest.mark.parametrize('setting', ['wo_dn','w_dn','w_dd'])
@pytest.mark.parametrize('method', ['i3d_mlp','fspn_s'])
def test_every_setting(release, tmp_path, method, setting):
    run = fit(finediving('smoke', **SMALL, model__name=method, setting=setting, train__epochs=1), tmp_path, 'cpu')
    m = evaluate(run, device='cpu')
    assert (m['method'], m['setting']) == (method, setting)
    assert json.loads((run/'provenance.json').read_text())['data'] == 'synthetic'


def test_finetune_mode_trains_the_backbone(release, tmp_path):
    clip = dict(clip__size=32, clip__starts=(0,40), model__clips=2, synth__n_train=6, synth__n_test=4, weights='random')
    cfg = finediving('smoke', **clip, train__backbone='finetune', model__adapter=False, model__name='fspn_s', train__epochs=1, train__batch=2)
    run = fit(cfg, tmp_path, 'cpu')
    w = weights(run)
    before = prepare(cfg, 'cpu').backbone
    torch.manual_seed(0)
    assert any(k.startswith('backbone.') for k in w)
    assert evaluate(run, device='cpu')['mode'] == 'finetune'
    running = [k for k in w if k.endswith('running_mean') and k.startswith('backbone.')]
    assert running and all(torch.equal(w[k], before.state_dict()[k.removeprefix('backbone.')]) for k in running), 'BatchNorm statistics must stay frozen'


def test_finetune_results_do_not_depend_on_workers(release, tmp_path):
    clip = dict(clip__size=32, clip__starts=(0,), model__clips=1, synth__n_train=6, synth__n_test=4, weights='random')
    base = finediving('smoke', **clip, train__backbone='finetune', model__adapter=False, model__name='i3d_mlp', train__epochs=1, train__batch=3)
    torch.manual_seed(7)
    a,b = (prepare(change(base, train__workers=w), 'cpu').source.fetch([0,1,2], (1, 3)) for w in (0,2))
    assert all(torch.equal(x, y) for x,y in zip(a, b))


def test_validation_is_cut_from_training(release, tmp_path):
    cfg = finediving('smoke', **SMALL, train__val_share=.5, eval__epoch_rule='best_val', model__name='i3d_mlp')
    run = fit(cfg, tmp_path, 'cpu')
    assert (run/'best_val.pt').exists()
    assert evaluate(run, device='cpu')['epoch_rule'] == 'best_val'
    splits = {line.split(',')[5] for line in (run/'predictions.csv').read_text().splitlines()[1:]}
    assert splits == {'test','val'}


def test_unwritable_out(tmp_path):
    (tmp_path/'file').write_text('')
    with pytest.raises(PermissionError, match='folder that can be written'): fit(finediving('smoke', **SMALL), tmp_path/'file'/'reports')


@pytest.mark.parametrize('change_,error', [
    (dict(model__name='resnet'), 'model.name must be one of'), (dict(setting='dn'), 'setting must be one of'), (dict(train__epochs=0), 'at least 1'),
    (dict(data_root='/nowhere'), 'nowhere'), (dict(weights='nowhere.pth'), 'nowhere.pth')])
def test_bad_input_before_training(tmp_path, change_, error):
    with pytest.raises((ValueError, FileNotFoundError), match=error): fit(finediving('smoke', **SMALL, **change_), tmp_path, 'cpu')


def test_checkpoint_of_another_variant(release, tmp_path):
    cfg = finediving('smoke', **SMALL, model__name='i3d_mlp', train__epochs=1)
    run = fit(cfg, tmp_path, 'cpu')
    other = change(cfg, seed=1)
    target = tmp_path/'finediving'/run_id(other)
    target.mkdir()
    (target/'last.pt').write_bytes((run/'last.pt').read_bytes())
    with pytest.raises(ValueError, match='another variant needs another folder'): fit(other, tmp_path, 'cpu')
