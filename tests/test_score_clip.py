"One strange clip: how it is read, that it is scored as a test dive would be, and what the page holds"
import ast
import json
import os
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fspn_nb.config import make_config
from fspn_nb.data.video_io import encode_video
from fspn_nb.evaluate import evaluate
from fspn_nb.inspect import clip_pictures
from fspn_nb.inspect.clip import MOST,clip_boxes,kept_frames,read_clip,synthetic_clip
from fspn_nb.inspect.clip_report import clip_page,headline,write_report
from fspn_nb.inspect.clip_run import find_run,open_run,parse_parameters
from fspn_nb.inspect.clip_score import pick_clip_exemplars,score_clip,clip_summary
from fspn_nb.train import fit
from fspn_nb.training.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(clip__size=32, weights='random', train__epochs=1, model__name='fspn_s', eval__num_exemplars=3)


def film(n=24, h=48, w=64, seed=0):
    "n frames (h,w,3) in which a light square falls"
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 30, (n, h, w, 3), dtype=np.uint8)
    for i, y in enumerate(np.linspace(0, h-12, n).astype(int)): frames[i, y:y+12, w//2:w//2+12] = 220
    return frames


def pictures(folder, frames, names=None, ending='png'):
    folder.mkdir(parents=True, exist_ok=True)
    for i, frame in enumerate(frames): Image.fromarray(frame).save(folder/(names[i] if names else f'{i}.{ending}'))
    return folder


def gif(path, frames):
    first, *rest = map(Image.fromarray, frames)
    first.save(path, save_all=True, append_images=rest)
    return path


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A function that trains a small run once and returns (folder, what it was prepared from)"
    made, out = {}, tmp_path_factory.mktemp('reports')

    def get(dataset='finediving', **changes):
        key = (dataset, *changes.items())
        if key not in made:
            cfg = make_config(dataset, 'smoke', **{**dict(synthetic__n_train=6, synthetic__n_test=4), **SMALL, **changes})
            data = prepare(cfg, 'cpu')
            run = fit(cfg, out, data=data)
            with warnings.catch_warnings():
                warnings.simplefilter('ignore') # four test dives are too few for an interval
                evaluate(run, data)
            made[key] = run, data
        return made[key]
    return get


# ---- reading

@pytest.mark.parametrize('make, error, why', [
    (lambda d: encode_video(film(5), d/'five.mp4'), ValueError, 'five.mp4: need at least 16 frames.*got 5'),
    (lambda d: gif(d/'five.gif', film(5)), ValueError, 'five.gif: need at least 16 frames.*got 5'),
    (lambda d: pictures(d/'five', film(5)), ValueError, 'five: need at least 16 frames.*got 5'),
    (lambda d: (d/'empty.mp4').write_bytes(b'') or d/'empty.mp4', ValueError, 'empty.mp4: need a video that can be decoded'),
    (lambda d: (d/'text.mp4').write_text('not a film '*99) and d/'text.mp4', ValueError, 'text.mp4: need a video that can be decoded'),
    (lambda d: (d/'text.gif').write_text('not a film '*99) and d/'text.gif', ValueError, 'text.gif: need a picture that can be decoded'),
    (lambda d: (d/'a.jpg').write_bytes(b'') or d, ValueError, 'a.jpg: need a picture that can be decoded, got 0 bytes'),
    (lambda d: d, FileNotFoundError, 'need a folder of pictures'),
    (lambda d: d/'nowhere.mp4', FileNotFoundError, 'there is none at'),
    (lambda d: pictures(pictures(d/'mixed', film(20)), film(1, 40, 64), ['99.png']), ValueError, r'mixed: need frames of one size, got \(64, 48\) and, as number 21, \(64, 40\)'),
    (lambda d: encode_video(film(MOST+1, 16, 16), d/'long.mp4'), ValueError, f'long.mp4: need one action in at most {MOST} frames')])
def test_one_clear_error_each(tmp_path, make, error, why):
    with pytest.raises(error, match=why) as e: read_clip(make(tmp_path))
    assert type(e.value) is error and '\n' not in str(e.value)


@pytest.mark.parametrize('ending', ['mp4', 'mkv', 'gif', 'png'])
@pytest.mark.parametrize('seed', range(6))
def test_damage_is_a_value_error_or_a_clip(tmp_path, ending, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path/f'x.{ending}'
    if ending == 'gif': gif(path, film(20))
    elif ending == 'png': path = pictures(tmp_path/'x', film(20))/'7.png'
    else: encode_video(film(20), path)
    data = bytearray(path.read_bytes())
    if seed % 2: data = data[:rng.integers(1, len(data))]
    else:
        for i in rng.integers(0, len(data), 40): data[i] = rng.integers(256)
    path.write_bytes(data)
    try: clip = read_clip(path.parent if ending == 'png' else path)
    except ValueError as e: assert path.name in str(e) or path.parent.name in str(e)
    else: assert clip.frames.ndim == 4 and 16 <= len(clip.frames) <= 20


def test_pictures_come_in_the_order_of_their_numbers(tmp_path):
    frames = film(20)
    names = [f'dive2_{i}.png' for i in range(1, 21)]
    folder = pictures(tmp_path/'dive 407C', frames, names)
    (folder/'._dive2_1.png').write_bytes(b'rubbish of an archive'); (folder/'notes.txt').write_text('x')
    clip = read_clip(folder)
    assert np.array_equal(clip.frames, frames) and clip.name == 'dive_407C' and clip.kind == 'real'


def test_large_pictures_become_256_lines_and_lie_as_they_were_taken(tmp_path):
    assert read_clip(pictures(tmp_path/'a', film(16, 512, 300), ending='jpg')).frames.shape == (16, 256, 150, 3)
    for i, item in enumerate(film(16)):
        img = Image.fromarray(item)
        exif = img.getexif(); exif[0x0112] = 6
        (tmp_path/'b').mkdir(exist_ok=True); img.save(tmp_path/'b'/f'{i}.jpg', exif=exif)
    assert read_clip(tmp_path/'b').frames.shape == (16, 64, 48, 3)


def test_gif_and_video_show_the_same(tmp_path):
    frames = film(20)
    a, b = read_clip(gif(tmp_path/'a.gif', frames)), read_clip(encode_video(frames, tmp_path/'a.mp4'))
    assert a.frames.shape == b.frames.shape == frames.shape
    for item in (a, b): assert np.abs(item.frames.astype(int)-frames).mean() < 8


@pytest.mark.parametrize('name, safe', [('<script>alert(1)', 'script_alert_1'), ('a b..c', 'a_b_c'), ('...', 'clip'), ('日本', 'clip')])
def test_names_are_safe_as_folders(tmp_path, name, safe):
    assert read_clip(gif(tmp_path/'x.gif', film(16)).rename(tmp_path/f'{name}.gif')).name == safe


@pytest.mark.parametrize('dataset, frames', [('finediving', 96), ('mtl_aqa', 103), ('aqa7', 103)])
@pytest.mark.parametrize('n', [16, 50, 95, 96, 97, 102, 103, 104, 300, 1000])
def test_kept_frames(dataset, frames, n):
    ids, message = kept_frames(n, dataset, frames)
    assert len(ids) == frames and ids[-1] == n-1 and (np.diff(ids) >= 0).all() and ids[0] >= 0
    assert ('repeats' in message) == (n < frames)
    if dataset != 'finediving' and n >= frames: assert (np.diff(ids) == 1).all()
    else: assert ids[0] == 0


# ---- runs

def fake(root, name, age, weights=True, **changes):
    "A folder that looks like a finished run"
    from fspn_nb.config import save_cfg
    cfg = make_config(changes.pop('dataset', 'finediving'), 'smoke', **changes)
    run = root/cfg.dataset/name
    save_cfg(cfg, run/'config.json')
    (run/'metrics.json').write_text('{}')
    if weights:
        (run/'last.pt').write_bytes(b'x')
        os.utime(run/'last.pt', (1e9-age, 1e9-age))
    return run


def test_newest_run_that_suits_the_clip(tmp_path):
    a, b, c = (fake(tmp_path, f'fspn-{s}', age, protocol=s) for s, age in (('wo_dn', 30), ('w_dn', 20), ('w_dd', 10)))
    fake(tmp_path, 'fspn-none', 0, weights=False); fake(tmp_path, 'i3d_mlp-x', 0, model__name='i3d_mlp')
    (tmp_path/'finediving'/'fspn-broken').mkdir(); (tmp_path/'finediving'/'fspn-broken'/'config.json').write_text('{"x')
    assert find_run(tmp_path) == a
    assert find_run(tmp_path, action='407c') == b
    assert find_run(tmp_path, action='407c', difficulty=3.2) == find_run(tmp_path/'no', tmp_path, action='407c', difficulty=3.2) == c
    vault = fake(tmp_path, 'fspn-vault', 0, dataset='aqa7', protocol='gym_vault')
    assert find_run(tmp_path) == a and find_run(tmp_path, action='gym_vault') == vault
    unfinished = fake(tmp_path, 'fspn-new', 0, protocol='wo_dn')
    (unfinished/'metrics.json').unlink()
    assert find_run(tmp_path) == a


def test_no_run_names_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match='make run'): find_run(tmp_path, tmp_path/'none')


def test_damaged_run(tmp_path, runs):
    import shutil
    run, _ = runs()
    for name, error, why in (('config.json', FileNotFoundError, 'config.json'), ('last.pt', FileNotFoundError, 'need the weights'), ('provenance.json', ValueError, 'provenance.json')):
        copy = shutil.copytree(run, tmp_path/name/run.name)
        (copy/name).unlink()
        with pytest.raises(error, match=why): score_clip(synthetic_clip(), copy, 'cpu')
    (shutil.copytree(run, tmp_path/'cut'/run.name)/'last.pt').write_bytes(b'PK')
    with pytest.raises(ValueError, match='damaged or foreign'): score_clip(synthetic_clip(), tmp_path/'cut'/run.name, 'cpu')


# ---- scores

def test_a_test_dive_gets_the_score_of_its_test(runs, tmp_path):
    "All of the way: frames from JPEGs, boxes from a table, the voters of the release"
    run, data = runs(protocol='wo_dn', synthetic__n_train=3, eval__num_exemplars=9) # all three vote, whatever the draw
    table = pd.read_csv(run/'predictions.csv').set_index('uid')
    truth = pd.read_csv(data.release.root/'truth'/'boxes.csv', dtype={'uid': str})
    for i in data.splits['test']:
        o = data.release.samples[i]
        truth[truth.uid == o.uid].to_csv(tmp_path/'boxes.csv', index=False)
        clip = read_clip(o.folder, o.action, o.difficulty)
        got = score_clip(clip, run, 'cpu', 'boxes', str(tmp_path/'boxes.csv'))
        assert abs(got.score-table.pred[o.uid]) < .05 and len(got.votes) == 3 and abs(got.votes.mean()-got.score) < 1e-3


def test_points_need_the_difficulty(runs):
    run, data = runs(protocol='w_dd')
    clip = synthetic_clip()
    known, unknown = (score_clip(replace(clip, difficulty=d), run, 'cpu') for d in (clip.difficulty, None))
    assert (known.unit, unknown.unit) == ('points', 'points per difficulty')
    assert np.isclose(known.score, unknown.score*clip.difficulty, atol=.01)
    assert any('points per difficulty' in note for note in unknown.notes) and not any('points per difficulty' in item for item in known.notes)
    assert 'per difficulty' in clip_page(unknown, {})
    json.dumps(clip_summary(unknown), allow_nan=False)


def test_voters_come_from_training_and_from_the_group(runs):
    run, data = runs(protocol='w_dn')
    opened, clip = open_run(run, 'cpu'), synthetic_clip()
    kinds = {data.release.samples[i].action for i in data.splits['train']}
    for kind in kinds:
        ids, message = pick_clip_exemplars(opened, replace(clip, action=kind.upper()), 10)
        assert {opened.release.samples[i].action for i in ids} == {kind} and set(ids) <= set(data.splits['train']) and 'same action' in message
    ids, message = pick_clip_exemplars(opened, replace(clip, action=''), 10)
    assert sorted(ids) == sorted(data.splits['train']) and 'was not given' in message
    assert 'has action 9999z' in pick_clip_exemplars(opened, replace(clip, action='9999z'), 10)[1]


@pytest.mark.parametrize('dataset, changes', [('mtl_aqa', dict(protocol='w_dd', synthetic__n_train=5)), ('aqa7', dict(protocol='gym_vault', synthetic__n_train=4)), ('finediving', dict(model__name='i3d_mlp')),
                                              ('finediving', dict(model__use_actor=False)), ('finediving', dict(model__pairing='absolute')), ('finediving', dict(model__use_iap=False, model__use_gc=False)),
                                              ('finediving', dict(actor__source='none')), ('finediving', dict(train__backbone='finetune', model__adapter=False))])
def test_every_kind_of_run_gives_a_page(runs, tmp_path, dataset, changes):
    run, data = runs(dataset, **changes)
    result = score_clip(synthetic_clip(dataset, data.cfg.protocol), run, 'cpu')
    assert np.isfinite(result.score) and len(result.votes) == len(result.exemplars) and result.synthetic_only
    files = write_report(result, tmp_path)
    text = files[-1].read_text(encoding='utf-8')
    assert not re.search(r'<script|https?:|src="(?!data:)|href=|url\(', text) and 'synthetic (drawn) videos only' in text
    assert text.index('synthetic (drawn)') < text.index('class="score"')
    assert ('parse.png' in [file.name for file in files]) == (result.step_probs is not None)
    assert json.loads(files[0].read_text())['score'] == round(result.score, 4)
    assert not re.search(r'/(home|root|work|tmp|Users)/', files[0].read_text()), 'a machine path'


@pytest.mark.parametrize('n', [16, 21, 130])
def test_filmed_clips_of_any_length(runs, tmp_path, n):
    run, _ = runs()
    result = score_clip(read_clip(encode_video(film(n, 96, 128), tmp_path/f'{n}.mp4')), run, 'cpu')
    assert result.frames.shape == (96, 96, 128, 3) and result.boxes.shape == (96, 4)
    assert 'motion' in result.notes[1] and 'was filmed' in headline(result)[0]


def test_without_captum_and_without_an_encoder(runs, tmp_path, monkeypatch):
    run, _ = runs()
    monkeypatch.setitem(sys.modules, 'captum.attr', None)
    monkeypatch.setattr(clip_pictures, '_h264', lambda: False)
    result = score_clip(synthetic_clip(), run, 'cpu')
    assert result.heat is None and any("pip install 'fspn_nb[gradcam]'" in note for note in result.notes)
    files = write_report(result, tmp_path)
    assert [file.name for file in files] == ['score.json', 'strip.png', 'parse.png', 'overlay.gif', 'report.html']
    assert 'data:image/gif' in files[-1].read_text()


def test_names_from_outside_are_text(runs):
    run, _ = runs()
    bad = '<img src=x onerror=alert(1)>"\''
    result = score_clip(synthetic_clip(), run, 'cpu')
    result = replace(result, clip=replace(result.clip, name=bad, action=bad), exemplars=[replace(exemplar, uid=bad, action=bad, files=()) for exemplar in result.exemplars], notes=[bad], run=bad)
    assert '<img src=x' not in clip_page(result, {}) and '&lt;img src=x' in clip_page(result, {})


def test_same_clip_same_numbers(runs):
    run, _ = runs()
    a, b = (score_clip(synthetic_clip(), run, 'cpu') for _ in range(2))
    assert clip_summary(a) == clip_summary(b)


def test_boxes_of_the_clip(tmp_path, runs):
    _, data = runs()
    clip = read_clip(gif(tmp_path/'a.gif', film(20)))
    rows = [f'{{}},{i},10,10,30,40' for i in range(20)]
    for uid in ('a', 'other'):
        (tmp_path/'b.csv').write_text('\n'.join(['uid,frame,x1,y1,x2,y2', *(item.format(uid) for item in rows)]))
        assert np.allclose(clip_boxes(clip, data.cfg, 'boxes', str(tmp_path/'b.csv'))[0], [10, 10, 30, 40])
    (tmp_path/'b.csv').write_text('\n'.join(['uid,frame,x1,y1,x2,y2', *(row.format('a') for row in rows[:-1])]))
    with pytest.raises(ValueError, match='need 20 boxes'): clip_boxes(clip, data.cfg, 'boxes', str(tmp_path/'b.csv'))
    with pytest.raises(FileNotFoundError): clip_boxes(clip, data.cfg, 'boxes', '')
    with pytest.raises(ValueError, match="'onnx' needs the path"): clip_boxes(clip, data.cfg, 'onnx')
    synchro = replace(clip, action='sync_diving_10m')
    assert '2 athletes' in clip_boxes(synchro, data.cfg)[1] and '1 athlete,' in clip_boxes(clip, data.cfg)[1]


# ---- the notebook

def test_notebook_parameters():
    import papermill as pm
    from fspn_nb.inspect.clip_run import CLIP_PARAMETERS
    path = ROOT/'nbs'/'score_clip.ipynb'
    assert set(pm.inspect_notebook(path)) == set(CLIP_PARAMETERS), 'the tag is gone, or a parameter is'
    cells = json.loads(path.read_text())['cells']
    tagged = [c for c in cells if 'parameters' in c['metadata'].get('tags', [])]
    assert len(tagged) == 1 and not any(c.get('outputs') for c in cells)
    for line in ast.parse(''.join(tagged[0]['source'])).body: assert isinstance(line, ast.Assign) and isinstance(line.value, ast.Constant)
    assert all('#' in line for line in ''.join(tagged[0]['source']).splitlines() if '=' in line)


def test_what_the_notebook_asks_for(tmp_path, runs, monkeypatch):
    monkeypatch.delenv('IN_TEST', raising=False)
    run, data = runs()
    cell = dict(clip='', run='', action='', difficulty=0., actor='auto', actor_file='', device='cpu', out=str(run.parents[1]))
    clip, found, reports = parse_parameters(cell)
    assert clip.kind == 'synthetic' and found.parents[1] == reports == run.parents[1].resolve()
    assert parse_parameters(cell|dict(action='107b', difficulty='3'))[0].difficulty == 3
    path = gif(tmp_path/'x.gif', film(16))
    assert parse_parameters(cell|dict(clip=str(path), action=407, run=str(run)))[0].action == '407'
    with pytest.raises(FileNotFoundError, match='need the folder of a run'): parse_parameters(cell|dict(run=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match='there is none at'): parse_parameters(cell|dict(clip='nowhere.mp4'))


def test_a_real_dive(runs, shared, tmp_path):
    "Three seconds of a competition dive, 21 frames; the score means nothing, the rest must hold"
    run, _ = runs()
    clip = read_clip(shared('data', 'diving_sample.gif'))
    assert clip.frames.shape == (21, 256, 456, 3)
    result = score_clip(clip, run, 'cpu')
    assert '75 are repeats' in result.notes[0] and result.heat['heat']['scene'].shape == (96, 256, 456)
    assert torch.isfinite(result.heat['heat']['actor']).all()
