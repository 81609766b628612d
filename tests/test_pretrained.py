"A run that is handed on: the same numbers from the folder alone, one error for a folder that is not what was saved"
import json
import os
import re
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fspn_nb.config import make_config,run_id
from fspn_nb.data.video_io import encode_video
from fspn_nb.evaluate import evaluate,load_model,predictions
from fspn_nb.inspect.clip import synthetic_clip
from fspn_nb.inspect.clip_score import score_clip
from fspn_nb.inspect.novelty import check_novelty
from fspn_nb.share.model_card import card_license
from fspn_nb.share.save_pretrained import save_pretrained
from fspn_nb.share.score_command import score_cli
from fspn_nb.stored_files import seal
from fspn_nb.synthetic.release import MARKER
from fspn_nb.train import fit
from fspn_nb.training import pretrained as module
from fspn_nb.training.pretrained import PRETRAINED_FILES,from_pretrained,open_pretrained,pretrained_folder,read_manifest
from fspn_nb.training.prepare import prepare

SMALL = dict(clip__size=32, weights='random', train__epochs=1, model__name='fspn_s', eval__num_exemplars=3, synthetic__n_train=6, synthetic__n_test=4)


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A function that trains a small run once, hands it on, and returns (run, folder, what it was prepared from)"
    made,out = {},tmp_path_factory.mktemp('runs')

    def get(dataset='finediving', license='', **changes):
        key = (dataset, *changes.items())
        if key not in made:
            data = prepare(make_config(dataset, 'smoke', **{**SMALL, **changes}), 'cpu')
            run = fit(data.cfg, out, data=data)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore') # four test dives are too few for an interval
                evaluate(run, data)
            made[key] = run,save_pretrained(run, out/'handed_on'/f'{len(made)}', license),data
        return made[key]
    return get


@pytest.fixture
def folder(runs, tmp_path):
    "A copy of a folder, to be damaged"
    return shutil.copytree(runs()[1], tmp_path/'folder')


@pytest.fixture
def no_heat(monkeypatch):
    "Heat maps take most of the time of a score, and the test of the command makes them"
    monkeypatch.setattr('fspn_nb.inspect.clip_score._heat', lambda *args: (None, {}))


def same_predictions(run, folder, data):
    "Test predictions of the folder's weights, both ways of opening them, are those of the run's file"
    ours = (run/'predictions.csv').read_text()
    for model in (from_pretrained(folder, 'cpu').model, load_model(folder, data)):
        table = predictions(model, data, 'test')[0]
        assert all(f'{row.uid},{row.true},{row.pred}' in ours for row in table.itertuples()) and len(table) == 4


@pytest.mark.parametrize('dataset, changes', [('finediving', {}), ('mtl_aqa', dict(protocol='w_dd', synthetic__n_train=5)),
                                              ('finediving', dict(model__use_actor=False, actor__source='none'))])
def test_a_clip_gets_the_same_score_from_the_folder_alone(runs, no_heat, monkeypatch, dataset, changes):
    run,folder,data = runs(dataset, **changes)
    same_predictions(run, folder, data)
    clip = synthetic_clip(dataset, data.cfg.protocol)
    own = check_novelty(score_clip(clip, run, 'cpu'), run, 'cpu')
    for name in ('load_samples','cache_features','load_actor_boxes'): monkeypatch.delattr(f'fspn_nb.inspect.clip_run.{name}')
    handed = check_novelty(score_clip(clip, folder, 'cpu'), folder, 'cpu')
    assert (handed.score, handed.dependence, handed.novelty.value) == (own.score, own.dependence, own.novelty.value)
    assert np.array_equal(handed.votes, own.votes) and np.array_equal(handed.features, own.features)
    assert [s.uid for s in handed.exemplars] == [s.uid for s in own.exemplars] and handed.notes == own.notes and handed.facts == own.facts
    assert handed.run == run.name and handed.unit == own.unit == 'points'


def test_a_method_without_exemplars_and_scores_in_percent(runs, no_heat):
    run,folder,data = runs('aqa7', protocol='gym_vault', model__name='i3d_mlp', synthetic__n_train=4)
    same_predictions(run, folder, data)
    transform = open_pretrained(folder, 'cpu').labels.label_transform
    assert transform == data.labels.label_transform and transform.kind == 'percent'
    clip = synthetic_clip('aqa7', 'gym_vault')
    assert score_clip(clip, folder, 'cpu').score == score_clip(clip, run, 'cpu').score


def test_a_trained_backbone_is_among_the_weights(runs, no_heat):
    "Exemplars are features of the trained backbone, which stands behind a clip as a frozen one"
    run,folder,data = runs(train__backbone='finetune', model__adapter='off', clip__frames=16, clip__starts=(0,), model__clips=1, synthetic__n_train=3)
    assert not (folder/'backbone.safetensors').exists()
    pretrained = from_pretrained(folder, 'cpu')
    assert pretrained.model.backbone and pretrained.cfg.train.backbone == 'finetune'
    same_predictions(run, folder, data)
    clip = replace(synthetic_clip(), frames=synthetic_clip().frames[:20], boxes=None)
    own,handed = (score_clip(clip, path, 'cpu', 'none') for path in (run, folder))
    assert np.isclose(handed.score, own.score, atol=1e-3) and np.allclose(handed.features, own.features, atol=1e-4)


def test_a_method_that_reads_more_hands_on_its_weights(runs):
    run,folder,data = runs(model__name='tpt')
    same_predictions(run, folder, data)
    assert 'the folder holds the weights alone' in (folder/'README.md').read_text()
    with pytest.raises(ValueError, match='tpt reads short_clip_features beside clip vectors: need its run'): score_clip(synthetic_clip(), folder, 'cpu')


# ---- what is in it

def test_no_code_no_frames_no_paths_and_a_card_that_the_hub_reads(runs):
    run,folder,data = runs()
    assert {path.name for path in folder.iterdir()} <= {*PRETRAINED_FILES, 'pretrained.json', 'README.md'}
    for path in folder.iterdir():
        content = path.read_bytes()
        assert not content.startswith((b'PK', b'\x80')) and path.stat().st_mode & 0o044
        if path.suffix != '.safetensors': assert not re.search(rb'/(home|root|work|tmp|Users)/', content), path.name
    hub = pytest.importorskip('huggingface_hub')
    card = hub.ModelCard.load(folder/'README.md')
    assert card.data.license == 'apache-2.0' and card.data.library_name == 'fspn_nb' and 'synthetic' in card.data.tags
    metrics = json.loads((run/'metrics.json').read_text())
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == {'spearmanr': round(metrics['spearman'], 4), 'relative_l2': round(metrics['relative_l2'], 4)}
    assert f"{metrics['spearman_lo']:.4f} to {metrics['spearman_hi']:.4f}" in card.text and 'no other seed was trained' in card.text


def test_real_data_needs_a_licence_and_leaves_its_paths_at_home(runs, tmp_path):
    "A release without our mark counts as real; its folder and its table of boxes have names, no places"
    root = tmp_path/'videos of mine'
    shutil.copytree(runs()[2].release.root, root)
    (root/MARKER).unlink()
    boxes = shutil.copy(root/'truth'/'boxes.csv', tmp_path/'my_boxes.csv')
    with pytest.raises(ValueError, match='need license=.*inherit the terms of these videos'):
        runs(data_root=str(root), actor__source='boxes', actor__boxes=str(boxes))
    run,folder,data = runs(license='cc-by-nc-4.0', data_root=str(root), actor__source='boxes', actor__boxes=str(boxes))
    config = json.loads((folder/'config.json').read_text())
    assert (config['data_root'], config['actor']['boxes']) == ('videos of mine', 'my_boxes.csv')
    assert run_id(from_pretrained(folder, 'cpu').cfg) == run.name
    text = (folder/'README.md').read_text()
    front = yaml.safe_load(text.split('---\n')[1])
    assert front['license'] == 'cc-by-nc-4.0' and 'real' in front['tags'] and 'inherit their terms' in text and 'Nothing about real sport' not in text
    assert str(tmp_path) not in ''.join(path.read_text() for path in folder.iterdir() if path.suffix != '.safetensors')


def test_other_seeds_are_on_the_card(runs):
    runs(); run,folder,_ = runs(seed=1)
    assert read_manifest(folder)['facts']['seeds'] == [0,1] and 'this is seed 1; trained with seeds 0, 1' in (folder/'README.md').read_text()


def test_a_run_that_was_not_measured_is_not_handed_on(runs, tmp_path):
    run = shutil.copytree(runs()[0], tmp_path/'finediving'/runs()[0].name)
    (run/'predictions.csv').unlink()
    with pytest.raises(ValueError, match='predictions.csv'): save_pretrained(run, tmp_path/'new')
    assert not [path for path in tmp_path.iterdir() if path.name != 'finediving'], 'something half-written is left'


@pytest.mark.parametrize('license', ['two words', 'a\nb', '\x1b[2J'])
def test_odd_licences(license):
    with pytest.raises(ValueError, match='need one identifier of a licence'): card_license(dict(data='real'), license)


# ---- damage

@pytest.mark.parametrize('name', PRETRAINED_FILES)
@pytest.mark.parametrize('how', ['flipped','cut','gone'])
def test_any_damaged_file_is_named(folder, name, how):
    path = folder/name
    if not path.is_file(): pytest.skip(f'{name} is in folders of other runs')
    content = bytearray(path.read_bytes())
    content[len(content)//2] ^= 1
    if how == 'gone': path.unlink()
    else: path.write_bytes(content if how == 'flipped' else content[:-7])
    with pytest.raises(ValueError, match=f'{name}: need the file .*get the folder anew') as e: from_pretrained(folder, 'cpu')
    assert '\n' not in str(e.value)


def edit_manifest(folder, change):
    values = json.loads((folder/'pretrained.json').read_text())
    values.pop('crc32'); change(values)
    (folder/'pretrained.json').write_text(json.dumps(seal(values)))


@pytest.mark.parametrize('change, why', [
    (lambda v: v.update(num_samples=0), 'need 1 to 1000000 samples'), (lambda v: v.update(num_samples=10**9), 'need 1 to 1000000 samples'),
    (lambda v: v.update(num_samples=2), 'need a list of exemplars'), (lambda v: v['exemplars'].pop(), 'need the exemplars of pretrained.json'),
    (lambda v: v['exemplars'][0].update(position=-1), 'need the exemplars of pretrained.json'), (lambda v: v.update(exemplars=[1]), 'need a list of exemplars'),
    (lambda v: v.update(label_transform=dict(power=2)), 'unknown setting power'), (lambda v: v.pop('facts'), 'facts missing'),
    (lambda v: v.update(run_id='x'), 'need the settings of x'), (lambda v: v.update(fspn_nb='99.0'), 'got one of 99.0; update fspn_nb'),
    (lambda v: v['sha256'].update({'model.safetensors': None}), 'its checksum differs')])
def test_a_foreign_list_is_one_error(folder, change, why):
    edit_manifest(folder, change)
    with pytest.raises(ValueError, match=why) as e: open_pretrained(folder, 'cpu')
    assert '\n' not in str(e.value)


def test_weights_of_another_method_are_refused(folder, runs):
    from fspn_nb.training.pretrained import write_manifest
    other = runs('aqa7', protocol='gym_vault', model__name='i3d_mlp', synthetic__n_train=4)[1]
    shutil.copy(other/'model.safetensors', folder)
    with pytest.raises(ValueError, match='model.safetensors: .*checksum differs'): from_pretrained(folder, 'cpu')
    values = {k: v for k,v in read_manifest(runs()[1]).items() if k not in ('sha256','fspn_nb')}
    write_manifest(folder, **values) # whoever does that on purpose
    with pytest.raises(ValueError, match='model.safetensors: need the weights of'): from_pretrained(folder, 'cpu')
    (folder/'model.safetensors').write_bytes(b'\xff'*64)
    write_manifest(folder, **values)
    with pytest.raises(ValueError, match='model.safetensors: need a safetensors file'): from_pretrained(folder, 'cpu')


def test_an_empty_list_and_a_folder_of_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match='without pretrained.json'): from_pretrained(tmp_path, 'cpu')
    (tmp_path/'pretrained.json').write_text('')
    with pytest.raises(ValueError, match='pretrained.json: need a JSON file'): from_pretrained(tmp_path, 'cpu')


# ---- hub

def test_a_name_on_the_hub(runs, monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    folder,asked = runs()[1],[]
    monkeypatch.setattr(hub, 'snapshot_download', lambda *args, **options: asked.append((args, options)) or str(folder))
    assert from_pretrained('owner/name', 'cpu', revision='v1').folder == folder
    assert asked[0][0] == ('owner/name',) and asked[0][1]['revision'] == 'v1' and set(asked[0][1]['allow_patterns']) >= set(PRETRAINED_FILES)


def test_no_network_is_one_error(monkeypatch):
    hub = pytest.importorskip('huggingface_hub')
    monkeypatch.setattr(hub.constants, 'HF_HUB_OFFLINE', True)
    with pytest.raises(FileNotFoundError, match="got 'owner/no_such_name': no such folder here, and the hub says") as e: pretrained_folder('owner/no_such_name')
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('name', ['../x/y', 'a/b/c', 'https://hub/a/b', '-', 'a b/c', ''])
def test_odd_names_never_reach_the_hub(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module, 'hub_client', lambda: pytest.fail('asked'))
    if name: pytest.raises(FileNotFoundError, pretrained_folder, name)


# ---- the command

def test_the_command_scores_with_the_folder(runs, tmp_path, capsys):
    run,folder,_ = runs()
    film = encode_video(synthetic_clip().frames[:40], tmp_path/'dive.mp4')
    score_cli([str(film), '--model', str(folder), '--out', str(tmp_path/'out'), '--device', 'cpu', '--actor', 'none', '--action', '107B'])
    printed = capsys.readouterr().out
    saved = json.loads((tmp_path/'out'/'clips'/'dive'/'score.json').read_text())
    assert f"dive: {saved['score']:.1f} points" in printed and 'WARNING: this run was only tried out' in printed and 'interval' in printed
    assert saved['run'] == run.name and (tmp_path/'out'/'clips'/'dive'/'report.html').is_file()


def test_the_command_says_what_is_missing(runs, folder, tmp_path, monkeypatch, capsys):
    film = str(encode_video(synthetic_clip().frames[:20], tmp_path/'dive.mp4'))
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(SystemExit, match=r"fspn_score: need huggingface_hub for a model hub, found none; install it with: pip install 'fspn_nb\[hub\]'"):
        score_cli([film, '--model', 'owner/name'])
    (folder/'metrics.json').write_text('{}')
    with pytest.raises(SystemExit): score_cli([film, '--model', str(folder), '--device', 'cpu', '--out', str(tmp_path)])
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith('fspn_score: error: ') and 'metrics.json: need the file as it was saved' in error


# ---- TensorBoard

def scalars(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    log = EventAccumulator(str(run/'tensorboard')).Reload()
    return {tag: [(row.step, row.value) for row in log.Scalars(tag)] for tag in log.Tags()['scalars']}


def test_epochs_stand_once_in_tensorboard_whatever_interrupts(runs, tmp_path, monkeypatch):
    pytest.importorskip('tensorboard')
    import pandas as pd
    data = runs()[2]
    data = replace(data, cfg=replace(data.cfg, train=replace(data.cfg.train, epochs=3)))
    plain = fit(data.cfg, tmp_path/'a', data=data)
    monkeypatch.setenv('FSPN_LOG_TO', 'tensorboard')
    def crash(model, data, epoch, run):
        if epoch == 3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(data.cfg, tmp_path/'b', data=data, on_epoch_end=crash)
    (tmp_path/'b'/'finediving'/data.run_id/'last.pt').unlink(missing_ok=True) # two epochs are logged, none is saved
    run = fit(data.cfg, tmp_path/'b', data=data)
    assert run.name == plain.name and not (plain/'tensorboard').exists()
    log,events = pd.read_csv(run/'log.csv'),scalars(run)
    assert set(events) == {name for name in log if name != 'epoch' and log[name].notna().any()}
    assert [step for step,_ in events['total']] == [1,2,3] and np.allclose([value for _,value in events['total']], log.total)
    state = lambda run: torch.load(run/'last.pt', weights_only=True)['model']
    assert all(torch.equal(value, state(run)[name]) for name,value in state(plain).items())


@pytest.mark.parametrize('value, error, why', [('tensorboard', ImportError, r"pip install 'fspn_nb\[tensorboard\]'"), ('wandb', ValueError, 'FSPN_LOG_TO')])
def test_a_log_that_cannot_be_written_ends_before_training(runs, tmp_path, monkeypatch, value, error, why):
    data = runs()[2]
    monkeypatch.setenv('FSPN_LOG_TO', value)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    with pytest.raises(error, match=why): fit(data.cfg, tmp_path, data=data)
    assert not list(tmp_path.rglob('*.csv'))
