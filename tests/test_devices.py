"Every method on devices that are not there: no CPU tensor meets one of a GPU, and nothing in a training step waits for the GPU"
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from device_cases import ALLOWED, MODES, PRECISIONS, Clips, cases, check_method, fake_device, plain_tensors, to_fake
from fspn_nb.methods import METHODS
from fspn_nb.training.prepare import pick_device
from fspn_nb.zoo import create_model, list_models

HERE = Path(__file__).parent
used = {} # method: functions of `ALLOWED` in which it waited


@pytest.mark.parametrize('name', list_models())
def test_no_case_mixes_devices_or_waits(name):
    for case in cases([name]):
        result = check_method(*case, 'fake cuda')
        if case[2] == 'train':
            assert not result['waits'], f'{" ".join(case)}: a training step waits for the GPU in {result["waits"]}'
            used.setdefault(name, set()).update(result['allowed'])


def test_every_allowed_wait_is_still_needed():
    missing = [name for name in list_models() if name not in used]
    for name in missing: test_no_case_mixes_devices_or_waits(name)
    assert set.union(*used.values()) >= ALLOWED['*'].keys()
    assert all(used[name] >= ALLOWED[name].keys() for name in ALLOWED if name != '*'), f'no longer needed: {ALLOWED}, used are {used}'


def test_every_combination_is_there():
    assert len(MODES) == len(PRECISIONS) == 2
    expected = sum(4 if METHODS[name].finetune_only else 8 for name in list_models())
    assert len(set(cases())) == expected and {case[0] for case in cases()} == set(list_models())


def run_apart(code):
    "What `code` prints in a process of its own: the stand-in device stays for the rest of a process"
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join((str(HERE), str(HERE.parent))))
    done = subprocess.run([sys.executable, '-c', f'import device_cases, sys; {code}'], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout+done.stderr[-3000:]
    return done.stdout


def test_the_backward_pass_and_the_optimiser_stay_on_the_device():
    printed = run_apart("sys.exit(device_cases.main(['fake standin'], ['train'], ['fp32']))")
    assert printed.count('fake standin') == sum(case[2:] == ('train', 'fp32') for case in cases())


def test_heat_maps_are_made_on_the_device_of_the_head():
    printed = run_apart("print([device_cases.check_heat(name) for name in ('fspn', 'fspn_viterbi', 'i3d_mlp')])")
    assert printed.strip() == str([{(4, 2, 4, 4)}]*3)


@pytest.mark.parametrize('changes', [dict(model__pairing='absolute'), dict(train__in_batch_exemplars=True), dict(model__use_iap=False),
                                     dict(model__token_mode='frames'), dict(model__decoding='argmax', model__residual='scene', model__adapter=False)])
def test_variants_of_fspn(changes):
    for mode in MODES: assert not [wait for wait in check_method('fspn', 'frozen', mode, 'bf16', 'fake cuda', **changes)['waits'] if mode == 'train']


@pytest.mark.parametrize('name', ['hgcn', 'musdl', 'core_tree'])
def test_labels_per_difficulty(name):
    assert not check_method(name, 'frozen', 'train', 'fp32', 'fake cuda', per_dd=True)['waits']


def test_micro_batches_are_computed_again_on_the_device():
    assert not check_method('fspn', 'finetune', 'train', 'fp32', 'fake cuda', train__micro_batch=3)['waits']


@pytest.mark.parametrize('name', list_models())
def test_no_module_keeps_a_tensor_that_does_not_move(name):
    model = create_model(name).to('meta')
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {'meta'}
    assert not [type(module).__name__ for module in model.modules() if any(t.device.type != 'meta' for t in plain_tensors(module))]


class Hidden(nn.Module):
    "Holds a tensor that no one moves"
    def __init__(self):
        super().__init__()
        self.scale, self.steps = torch.ones(3), [torch.zeros(2)]


def test_the_checks_see_what_they_are_for():
    assert len(plain_tensors(Hidden())) == 2
    numbers = torch.tensor([1., 0., 2.])
    with fake_device() as watch, watch.fake, watch:
        far = watch.wrap(numbers, 'cuda')
        with pytest.raises(RuntimeError, match='two different devices'): far+torch.ones(3)
        assert not watch.waits
        assert far.sum().item() == 3. and far[far > 0].shape == (2,) and far.cpu().device.type == 'cpu'
        torch.ones(2).to('cuda')
        far[torch.tensor([0, 1])]
        assert {reason for _, reason in watch.waits} == {'_local_scalar_dense', 'mask', 'copy', 'index on the CPU'}
        watch.waits.clear()
        torch.ones(2).to('cuda', non_blocking=True)
        assert not watch.waits and not watch.doubles
        far.double()
        assert watch.doubles
        with pytest.raises(NotImplementedError, match='do not follow'): to_fake(watch.fake, torch.ones(3), 'cuda').sum().item()
        with pytest.raises(TypeError, match='numpy'): far.numpy()


def test_a_real_device_runs_the_same_cases():
    trained, scored = (check_method('fspn', 'frozen', mode, 'fp32', 'cpu') for mode in MODES)
    assert trained['losses']['total'] > 0 and not trained['waits'] and scored['predictions'].shape == (2,)


def test_devices_that_are_not_there_are_named():
    with pytest.raises(ValueError, match="need a device that exists, got 'no such device'"): pick_device('no such device')
    assert pick_device('cpu').type == 'cpu' and Clips(torch.ones(2, 1), torch.ones(2, 1)).get_batch([1])[0].shape == (1, 1)
