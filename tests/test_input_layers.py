"Adapter and standardisation: any method can have them by a setting, what makes no sense is an error, and older runs keep their names"
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fspn_nb.config import ModelCfg,finediving,load_cfg,make_config,method_schedule,override,run_id,validate
from fspn_nb.core import Batch,flatten
from fspn_nb.evaluate import load_model
from fspn_nb.experiments.parameters import parse_changes
from fspn_nb.inspect.gradcam import HeadOnMaps
from fspn_nb.methods import METHODS,input_layers
from fspn_nb.models.encoder import EncoderOutput
from fspn_nb.models.iap import Adapter,InputLayers,WithInputLayers
from fspn_nb.models.with_backbone import WithBackbone
from fspn_nb.train import fit
from fspn_nb.training.checkpoint import load_ckpt
from fspn_nb.training.loop import build_model,make_optimiser,standardise_inputs
from fspn_nb.training.prepare import prepare
from fspn_nb.zoo import create_model,random_batch

FROZEN = sorted(name for name, method in METHODS.items() if not method.finetune_only)
SMALL = dict(synthetic__n_train=6, synthetic__n_test=4, weights='random', clip__size=32, train__epochs=2, model__name='tpt', model__adapter='off', model__standardise='on', protocol='wo_dn')
adapters = lambda model: sum(isinstance(part, Adapter) for part in model.modules())


@pytest.mark.parametrize('name', FROZEN)
def test_both_layers_reach_every_method(name):
    changes = parse_changes('model.adapter=on model.standardise=on train.lr=5e-4 train.epochs=3')
    cfg = validate(finediving('demo', model__name=name, **changes))
    torch.manual_seed(0)
    model = create_model(name, replace(cfg.model, **input_layers(flatten(cfg)))).eval()
    assert adapters(model) == 1 and model.inputs.standardise and model.inputs.inputs == tuple(n for n in model.inputs.inputs if n in model.needs)
    before, batch = random_batch(2), random_batch(2)
    for field in model.inputs.inputs: getattr(model.inputs, f'{field}_std').fill_(2.) # twice the feature and twice the deviation: the same
    twice = replace(batch, **{field: 2*getattr(batch, field) for field in model.inputs.inputs})
    with torch.no_grad():
        doubled = model.encode(replace(twice, exemplar=None)).feature
        for field in model.inputs.inputs: getattr(model.inputs, f'{field}_std').fill_(1.)
        assert torch.allclose(model.encode(replace(batch, exemplar=None)).feature, doubled, atol=1e-4)
    assert torch.equal(before.scene, batch.scene), 'the batch itself is left alone'


def test_what_a_method_has_by_default():
    layers = {name: input_layers(flatten(finediving('demo', model__name=name))) for name in METHODS}
    assert {name for name, layer in layers.items() if layer['adapter'] == 'on'} == {'tsa', 'tpt', 'hgcn', 'i3d_svr', 'i3d_clip_mlp', 'i3d_lstm'}
    assert {name for name, layer in layers.items() if layer['standardise'] == 'on'} == {'fspn', 'fspn_m', 'fspn_s', 'musdl', 'core_tree', 'i3d_clip_mlp', 'i3d_lstm', 'tsa'}
    assert input_layers(flatten(finediving('demo', model__name='musdl', train__backbone='finetune')))['standardise'] == 'off'
    assert input_layers(flatten(finediving('demo', model__name='tsa', train__backbone='finetune')))['adapter'] == 'auto'
    assert adapters(create_model('fspn_s')) == 1 and adapters(create_model('fspn_s', ModelCfg(adapter=False))) == 0
    inside = create_model('fspn_s', ModelCfg(adapter='on'))
    assert not isinstance(inside, WithInputLayers), 'FSPN has its adapter inside the parser'
    assert isinstance(create_model('fspn_s', ModelCfg(adapter='on', use_iap=False)), WithInputLayers), 'without a parser it stands in front'


@pytest.mark.parametrize('changes, message', [
    (dict(model__name='usdl', model__norm='apart'), "model.norm is a setting of tsa alone: need 'released' for usdl, got 'apart'; leave it out"),
    (dict(model__name='fspn', train__decoder_lr_ratio=1.), 'train.decoder_lr_ratio is a setting of tpt alone'),
    (dict(model__name='fspn', model__parser_warmup=.2), 'model.parser_warmup is a setting of fspn_viterbi alone'),
    (dict(model__name='tpt', model__standardise='on', train__backbone='finetune'), "need train.backbone='frozen', got 'finetune'"),
    (dict(model__name='tsa_net', model__adapter='on', train__backbone='finetune'), "tsa_net works inside the backbone.*need model.adapter='auto' or 'off', got 'on'"),
    (dict(model__name='tsa_net', model__standardise='on', train__backbone='finetune'), "need model.standardise='auto' or 'off', got 'on'"),
    (dict(model__adapter='yes'), "model.adapter must be one of auto, on, off, got 'yes'"),
    (dict(model__name='tsa', model__norm='both'), "model.norm must be one of apart, released, got 'both'")])
def test_a_setting_without_sense_is_one_error(changes, message):
    with pytest.raises(ValueError, match=message): validate(finediving('smoke', **changes))


def test_a_switch_in_words_is_not_guessed():
    with pytest.raises(ValueError, match="model.adapter must be one of auto, on, off, got 'true'"):
        validate(finediving('smoke', **parse_changes('model.adapter=true')))


# --- names ---

def test_layers_of_one_dataset():
    "TPT stays at chance behind its learned layer on a class of AQA-7; there it has standardised inputs, unless layers or another mode are asked for"
    layers = lambda *args, **changes: input_layers(flatten(method_schedule(make_config(*args, model__name='tpt', **changes))))
    assert layers('aqa7', 'demo') == dict(adapter='off', standardise='on')
    for other in (layers('finediving', 'demo'), layers('mtl_aqa', 'demo'), layers('aqa7', 'demo', model__adapter='on'), layers('aqa7', 'smoke')):
        assert other == dict(adapter='on', standardise='off')
    assert layers('aqa7', 'demo', train__backbone='finetune') == dict(adapter='auto', standardise='off')
    cfg = method_schedule(make_config('aqa7', 'demo', model__name='tpt'))
    assert cfg.model == method_schedule(cfg).model and run_id(cfg) != run_id(override(cfg, model__adapter='on', model__standardise='off'))


OLDER = {('finediving', 'demo', 'fspn', 'frozen', 0): 'fspn-w_dn-frozen-s0-aee2d7bc', ('finediving', 'demo', 'usdl', 'frozen', 0): 'usdl-w_dn-frozen-s0-a48554ec', ('mtl_aqa', 'demo', 'core_tree', 'frozen', 1): 'core_tree-w_dd-frozen-s1-5fae5979',
         ('finediving', 'paper', 'fspn', 'finetune', 0): 'fspn-w_dn-finetune-s0-ca9f7379'}


@pytest.mark.parametrize('key', OLDER)
def test_runs_of_before_keep_their_names(key):
    "Without what the search gave since, which changes what a run gives"
    dataset, preset, name, mode, seed = key
    cfg = method_schedule(make_config(dataset, preset, model__name=name, seed=seed, train__backbone=mode, model__adapter=mode == 'frozen', model__standardise='off'), searched=False)
    assert run_id(cfg) == OLDER[key]


def test_a_run_whose_results_changed_has_another_name():
    tpt = method_schedule(finediving('demo', model__name='tpt'))
    tsa = method_schedule(make_config('finediving', 'paper', model__name='tsa', model__norm='apart'))
    assert run_id(override(tpt, train__decoder_lr_ratio=1.)) != 'tpt-w_dn-frozen-s0-952f89df', 'the learned layer is new'
    assert run_id(tsa) != 'tsa-w_dn-finetune-s0-c483f79b' == run_id(override(tsa, model__norm='released'))
    frozen = finediving('demo', model__name='tsa')
    assert len({run_id(override(frozen, model__adapter=a, model__norm=n)) for a in ('on', 'off') for n in ('apart', 'released')}) == 4
    assert run_id(frozen) == run_id(override(frozen, model__adapter='on'))


def test_the_file_of_an_older_run_is_read(tmp_path):
    path = tmp_path/'config.json'
    for value, text in ((True, 'auto'), (False, 'off')):
        path.write_text(json.dumps(dict(preset='demo', model=dict(name='fspn', adapter=value))))
        assert load_cfg(path).model.adapter == text


# --- statistics ---

def test_mean_and_deviation_by_hand():
    g = torch.Generator().manual_seed(0)
    maps = 3+2*torch.randn(6, 9, 5, 2, 3, generator=g)
    maps[:, :, 4] = 7. # a feature that never changes
    layers = InputLayers(('feature_maps', 'boxes'), standardise=True, dim=5).fit(Batch(None, feature_maps=part) for part in maps.split(4))
    rows = maps.permute(2, 0, 1, 3, 4).flatten(1)
    assert torch.allclose(layers.feature_maps_mean, rows.mean(1), atol=1e-5)
    assert torch.allclose(layers.feature_maps_std[:4], rows[:4].std(1, correction=0), atol=1e-5) and layers.feature_maps_std[4] == 1
    out = layers(Batch(None, feature_maps=maps)).feature_maps
    assert torch.allclose(out[2, 3, :, 1, 2], (maps[2, 3, :, 1, 2]-layers.feature_maps_mean)/layers.feature_maps_std) and (out[:, :, 4] == 0).all()


@pytest.fixture(scope='module')
def data(): return prepare(finediving('smoke', **SMALL), 'cpu')


def test_statistics_are_those_of_the_training_videos_alone(data):
    model = standardise_inputs(build_model(data), data)
    cells = data.source.extra['short_clip_features']
    train, test = (cells[torch.as_tensor(data.splits[split])].flatten(0, 1) for split in ('train', 'test'))
    assert torch.allclose(model.inputs.short_clip_features_mean, train.mean(0), rtol=1e-4, atol=1e-7)
    assert not torch.allclose(model.inputs.short_clip_features_mean, torch.cat([train, test]).mean(0), rtol=1e-4, atol=1e-7)
    with torch.no_grad(): z = model.inputs(Batch(None, short_clip_features=train.unflatten(0, (-1, 20)))).short_clip_features
    varying = train.std(0) > 0
    assert z.mean((0, 1)).abs().max() < 1e-2 and torch.allclose(z.std((0, 1), correction=0)[varying], torch.tensor(1.), atol=1e-2)
    held_back = prepare(finediving('smoke', **SMALL, train__val_fraction=.34), 'cpu', data)
    assert len(held_back.splits['val']) and not torch.equal(standardise_inputs(build_model(held_back), held_back).inputs.short_clip_features_mean, model.inputs.short_clip_features_mean)


def test_the_same_bits_after_an_interruption_and_in_the_checkpoint(data, tmp_path):
    class Stop(Exception): pass
    def stop(model, data, epoch, run):
        if epoch == 2: raise Stop
    whole = fit(data.cfg, tmp_path/'a', 'cpu', data)
    with pytest.raises(Stop): fit(data.cfg, tmp_path/'b', 'cpu', data, stop, max_checkpoint_overhead=1)
    again = fit(data.cfg, tmp_path/'b', 'cpu', data)
    a, b = (load_ckpt(run/'last.pt', run.name, data.inputs.hashes)['model'] for run in (whole, again))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    model = load_model(whole, data)
    assert torch.equal(a['inputs.short_clip_features_mean'], model.inputs.short_clip_features_mean) and a['inputs.short_clip_features_std'].max() > 0


def test_the_adapter_does_not_change_other_first_weights(data):
    cfg = override(data.cfg, model__standardise='off')
    plain, adapted = (build_model(replace(data, cfg=override(cfg, model__adapter=value))) for value in ('off', 'on'))
    assert all(torch.equal(plain.state_dict()[name], adapted.head.state_dict()[name]) for name in plain.state_dict())


# --- rates ---

def test_tpts_decoder_learns_at_a_tenth_of_the_rate():
    cfg, tpt = finediving('paper', model__name='tpt'), create_model('tpt')
    for model in (tpt, WithInputLayers(tpt, standardise=True), WithBackbone(nn.Conv3d(3, 4, 1), tpt)):
        groups = make_optimiser(model, cfg).param_groups
        rates = {id(p): group['lr'] for group in groups for p in group['params']}
        assert len(rates) == len(list(model.parameters())) and groups[0]['lr'] == 1e-3
        assert {rates[id(p)] for part in (tpt.head.classify, tpt.head.offset) for p in part.parameters()} == {1e-3}
        assert {round(rates[id(p)], 12) for part in (tpt.decoder, tpt.head.pair) for p in part.parameters()} == {1e-4}
    assert len(make_optimiser(create_model('i3d_mlp'), finediving('demo', model__name='i3d_mlp')).param_groups) == 1


class FirstThree(nn.Module):
    "A parser whose logits of the sub-actions are the first three features"
    parser = SimpleNamespace(iap=True)
    def forward(self, scene): return EncoderOutput(scene, dict(logits=scene[..., :3]))


def test_a_heat_map_of_a_sub_action_asks_what_the_method_is_asked():
    "Raw maps to a method with its layer and standardised maps to the method alone: the same probability"
    plain = nn.Module()
    plain.encoder, plain.needs, plain.uses_exemplar = FirstThree(), ('scene',), False
    whole = WithInputLayers(plain, standardise=True)
    whole.inputs.scene_mean[1], whole.inputs.scene_std[1] = 5., .5
    maps = torch.zeros(9, 1024, 1, 2, 2)
    maps[:, 1] = 5.5 # one deviation above the mean
    logits = torch.tensor([0., 1., 0.])
    assert HeadOnMaps(whole, ('sub_action', 1))(maps).item() == pytest.approx(logits.softmax(0)[1].item(), abs=1e-6)
