"fspn_plan and the rehearsal behind it: what a step takes, from its configuration alone"
import random
import re

import numpy as np
import pytest
import torch

from fspn_nb.config import finediving, make_config, override, save_cfg
from fspn_nb.methods import METHODS
from fspn_nb.training.plan import CARDS, card_table, plan_cli, print_plans, rehearse_evaluation, sample_counts, video_bytes
from fspn_nb.training.rehearsal import rehearse
from step_memory import measured_step

TINY = dict(train__batch_size=2, clip__size=32)


@pytest.mark.parametrize('changes', [
    dict(TINY, train__backbone='finetune', clip__size=64, clip__starts=(0,10), model__clips=2),
    dict(TINY, train__backbone='finetune', model__name='i3d_lstm', clip__size=64, clip__starts=(0,10), model__clips=2),
    dict(TINY, train__backbone='finetune', clip__size=64, clip__starts=(0,10), model__clips=2, train__micro_batch=3),
    dict(train__batch_size=16), dict(model__name='tsa', train__batch_size=8)], ids=['fspn', 'lstm', 'parts', 'head', 'maps'])
def test_prediction_is_what_a_real_step_allocates(changes):
    cfg = finediving('smoke', **changes)
    assert rehearse(cfg, device='cpu').peak == pytest.approx(measured_step(cfg)[0], rel=.1) # tenths of a GB in all; large runs: step_memory.py


@pytest.mark.parametrize('name', METHODS)
def test_every_method_can_be_rehearsed(name):
    finetune = METHODS[name].finetune_only or name in ('tpt','tsa','fspn')
    for mode in ['frozen']*(not METHODS[name].finetune_only)+['finetune']*finetune:
        cfg = finediving('smoke', model__name=name, train__backbone=mode, **TINY)
        step = rehearse(cfg)
        assert step.flops > 0 and step.samples == 2 and (step.clips > 0) == (mode == 'finetune')
        assert sum(step.parts.values()) == step.peak and step.parts['parameters'] > 0


def test_half_the_bits_take_less():
    full, half = (rehearse(finediving('paper', train__batch_size=4, train__precision=p, clip__size=64)) for p in ('fp32', 'bf16'))
    assert half.parts['activations'] < .6*full.parts['activations'] and half.flops == pytest.approx(full.flops, rel=.01)


def test_exemplars_of_the_batch_are_counted_once():
    other, own = (rehearse(finediving('paper', train__batch_size=4, train__in_batch_exemplars=b, clip__size=32)) for b in (False, True))
    assert own.clips < .7*other.clips and own.samples >= 4


def test_random_numbers_are_the_same_afterwards():
    def draw(): return random.random(), np.random.random(), float(torch.rand(1))
    def seed(): random.seed(0); np.random.seed(0); torch.manual_seed(0)
    seed(); plain = draw()
    seed(); rehearse(finediving('smoke', train__batch_size=3)); rehearse_evaluation(finediving('smoke', train__batch_size=3))
    assert draw() == plain


def test_real_tensors_stay_real():
    "What a rehearsal leaves behind must not reach a training in the same process"
    rehearse(finediving('smoke', model__name='tpt', train__backbone='finetune', **TINY))
    assert torch.ones(2).sum().item() == 2.
    measured_step(finediving('smoke', model__name='tpt', train__backbone='finetune', **TINY))


def test_counts_come_from_the_release_or_the_paper(tmp_path):
    assert sample_counts(make_config('mtl_aqa', 'paper'))[:2] == (1059, 353)
    assert sample_counts(make_config('aqa7', 'paper', protocol='sync_diving_10m'))[:2] == (63, 28)
    assert sample_counts(make_config('aqa7', 'smoke'))[:2] == (4, 4)
    assert sample_counts(finediving('paper', data_root=str(tmp_path/'absent')))[:2] == (2251, 749)
    from fspn_nb.synthetic.release import synth_release
    root = synth_release(tmp_path, 'finediving', 10, 6, 0)
    assert sample_counts(finediving('paper', data_root=str(root))) == (10, 6, 'the release at hand')


def test_store_is_as_large_as_the_plan_says():
    from fspn_nb.batches.dataset import load_samples
    from fspn_nb.batches.frame_store import record_bytes
    cfg = finediving('smoke', train__backbone='finetune', train__temporal_jitter=0)
    sample = load_samples(cfg).samples[0]
    real = record_bytes(sample, cfg, np.zeros((len(sample.files), 4))+[0, 0, 9, 9])
    assert video_bytes(cfg)['store'] == pytest.approx(real, rel=.4)


def test_cards_that_are_too_small_take_parts_or_nothing(monkeypatch):
    cfg = finediving('paper', train__batch_size=1, clip__size=64, clip__starts=(0,10), model__clips=2)
    whole, part = (rehearse(cfg, size).peak/2**30 for size in (0, 2))
    middle = (whole+part)/2/.9 # of which nine tenths may be taken
    from dataclasses import replace
    card = CARDS['h100']
    small = {'a': replace(card, title='a', memory=1+2*whole), 'b': replace(card, title='b', memory=1+middle), 'c': replace(card, title='c', memory=1.05)}
    for name in [*CARDS]: monkeypatch.delitem(CARDS, name)
    for name, card in small.items(): monkeypatch.setitem(CARDS, name, card)
    table = card_table(cfg).set_index('card')
    assert table.micro_batch['a'] == 0 and 1 <= table.micro_batch['b'] < rehearse(cfg, 0).clips and table.isna().micro_batch['c']
    assert table.step_gib['b'] <= .9*middle+.1
    assert table.hours['b'] >= table.hours['a']


def test_command_prints_a_plan(tmp_path, capsys):
    cfg = override(finediving('paper', clip__size=32, train__batch_size=2), data_root=str(tmp_path/'FineDiving'))
    plan_cli([str(save_cfg(cfg, tmp_path/'run.json')), '--gpu', 'rtx4090', '--share', '.5'])
    text = capsys.readouterr().out
    for part in ('fspn on FineDiving (w_dn), paper preset, batch 2, fp32, micro_batch 0; 2,251 training and 749 test samples', 'memory of a training step:',
                 'operations:', 'frame store of', 'time at 50 % of what GeForce RTX 4090 can do'): assert part in text, text
    assert len(re.findall(r'^ *(?:GeForce|A100|L40S|H100)', text, re.M)) == len(CARDS)


def test_command_says_what_is_wrong(tmp_path, capsys):
    for args, message in ((['--gpu', 'voodoo'], 'invalid choice'), (['--share', '40'], 'need a share above 0 and at most 1, got 40'),
                          (['--preset', 'smoke', '--method', 'tsa_net'], 'works inside the backbone'),
                          (['--preset', 'smoke', '--method', 'fsp'], 'model.name must be one of')):
        with pytest.raises(SystemExit) as e: plan_cli(args)
        assert e.value.code == 2 and message in capsys.readouterr().err
    with pytest.raises(SystemExit) as e: plan_cli([str(tmp_path/'absent.json')])
    assert 'absent.json' in str(e.value) and 'fspn_plan: ' in str(e.value)


def test_notebook_lines_are_few(capsys):
    runs = [finediving('smoke', model__name=name, seed=seed) for name in ('i3d_mlp','fspn','usdl','i3d_svr') for seed in (0, 1)]
    print_plans(runs)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[0].startswith('plan: i3d_mlp, frozen') and '1 more' in lines[-1]


def test_the_command_is_installed():
    from configparser import ConfigParser
    from conftest import ROOT
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT/'settings.ini', encoding='utf-8')
    assert 'fspn_plan=fspn_nb.training.plan:plan_cli' in parser['DEFAULT']['console_scripts'].split()
