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
from PIL import Image,ImageColor,ImageDraw

from fspn_nb.config import make_config
from fspn_nb.data.video_io import encode_video
from fspn_nb.evaluate import evaluate
from fspn_nb.inspect import clip_pictures
from fspn_nb.inspect.clip import MOST,clip_boxes,kept_frames,read_clip,synthetic_clip
from fspn_nb.inspect.clip_pictures import example_result,overlay_frames,plot_strip,save_pictures
from fspn_nb.inspect.clip_report import clip_page,headline,score_warnings,write_report
from fspn_nb.inspect.clip_run import find_run,open_run,parse_parameters,pick_clip_exemplars,run_facts
from fspn_nb.inspect.clip_score import LITTLE,clip_dependence,score_clip,clip_summary
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
    (lambda d: (d/'a.jpg').write_bytes(b'') or d, ValueError, 'a.jpg: need a picture .JPEG, PNG or WebP., got 0 bytes'),
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


@pytest.mark.parametrize('name, safe', [('<script>alert(1)', 'script_alert_1'), ('a b..c', 'a_b_c'), ('...', 'clip'), ('日本', '日本')])
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
    cfg = make_config(changes.pop('dataset', 'finediving'), changes.pop('preset', 'smoke'), **changes)
    run = root/cfg.dataset/name
    save_cfg(cfg, run/'config.json')
    (run/'metrics.json').write_text('{}')
    for file in (run/'last.pt', run/'best_val.pt') if weights else ():
        file.write_bytes(b'x')
        os.utime(file, (1e9-age, 1e9-age))
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


def test_a_run_in_earnest_comes_before_one_that_was_tried_out(tmp_path):
    "The newest smoke run, which even suits the clip, is the last resort; paper before demo; a named run is taken as it is"
    smoke = fake(tmp_path, 'fspn-smoke', 0, protocol='w_dn')
    assert find_run(tmp_path, action='407c') == smoke
    demo = fake(tmp_path, 'fspn-demo', 99, preset='demo', protocol='wo_dn')
    assert find_run(tmp_path, action='407c') == find_run(tmp_path) == demo
    paper = fake(tmp_path, 'fspn-paper', 999, preset='paper', data_root='/release', protocol='wo_dn')
    assert find_run(tmp_path) == paper
    assert find_run(tmp_path, action='407c') == paper
    steps = fake(tmp_path, 'fspn_viterbi-demo', 9999, preset='demo', protocol='wo_dn', model__name='fspn_viterbi')
    assert find_run(tmp_path) == paper, 'a run of the paper preset comes before one of the better method'
    assert find_run(tmp_path/'none', tmp_path) == paper
    better = fake(tmp_path, 'fspn_viterbi-paper', 9999, preset='paper', data_root='/release', protocol='wo_dn', model__name='fspn_viterbi')
    assert find_run(tmp_path) == better != steps, 'the older run of the method with points per step'
    for file in better.iterdir(): file.unlink()
    fussy = fake(tmp_path, 'fspn-fussy', 0, preset='paper', data_root='/release', protocol='w_dd') # needs the difficulty
    assert find_run(tmp_path, action='407c') == paper and find_run(tmp_path, action='407c', difficulty=3.2) == fussy


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
    assert set(result.heat['heat']) == {'scene', 'actor'}, 'heat needs no Captum'
    files = write_report(result, tmp_path)
    assert [file.name for file in files] == ['score.json', 'strip.png', 'parse.png', 'heat.png', 'overlay.gif', 'report.html']
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


# ---- what the number is worth

def test_headline_says_what_the_run_was_trained_on(runs, tmp_path):
    run, _ = runs(protocol='wo_dn')
    result = score_clip(synthetic_clip(), run, 'cpu')
    first = headline(result)[0]
    assert 'synthetic (drawn)' in first and 'Preset smoke, 1 epochs, 6 of 10 dives for training, seed 0' in first and 'on 4 test dives is' in first
    assert 'tried out (preset smoke)' in headline(result)[1] and 'tried out (preset smoke)' in clip_page(result, {})
    demo = replace(result, cfg=make_config('finediving', 'demo'), facts=dict(result.facts, preset='demo', seeds=[0, 1, 2], rho=.7, rho_lo=.43, rho_hi=.86), dependence=.5)
    assert 'seed 0 (trained with 0, 1, 2)' in headline(demo)[0] and 'is 0.70 (95 % interval 0.43 to 0.86)' in headline(demo)[0]
    assert score_warnings(demo) == [] and 'WARNING' not in clip_page(demo, {})
    chance = replace(demo, facts=dict(demo.facts, rho_lo=-.1))
    assert ['better than chance' in line for line in score_warnings(chance)] == [True]
    undefined = replace(demo, facts=dict(demo.facts, rho=None, rho_lo=None, rho_hi=None))
    assert 'is not defined' in headline(undefined)[0]
    (tmp_path/'finediving'/'empty').mkdir(parents=True)
    (tmp_path/'finediving'/'empty'/'config.json').write_text((run/'config.json').read_text())
    facts = run_facts(tmp_path/'finediving'/'empty')
    assert facts['rho'] is None and facts['annotated'] is None and facts['spread'] is None
    json.dumps(facts, allow_nan=False)


def test_votes_that_hardly_depend_on_the_clip(runs, monkeypatch):
    "A run of one epoch gives every clip its voters' scores, and says so; a model that looks at the clips does not"
    from fspn_nb.inspect import clip_score
    run, data = runs(protocol='wo_dn')
    result, other = (score_clip(synthetic_clip(seed=seed), run, 'cpu') for seed in (1, 2))
    assert abs(result.score-other.score) < .05 and result.dependence < 1e-3 and clip_summary(result)['dependence'] < LITTLE
    assert any('hardly depends on the clip' in line for line in score_warnings(result)) and 'hardly depends on the clip' in clip_page(result, {})
    load = clip_score.load_model

    def looking(*args):
        model = load(*args)
        def score(query, exemplar, label):
            far = (query-exemplar).mean(-1)
            return label+20*far/far.abs().max()
        model.score = score
        return model
    monkeypatch.setattr(clip_score, 'load_model', looking)
    looks = score_clip(synthetic_clip(seed=1), run, 'cpu')
    assert looks.dependence > LITTLE and not any('hardly' in line for line in score_warnings(looks))


@pytest.mark.parametrize('slope, warned', [(0., False), (.02, True), (.5, False), (1., False)])
def test_dependence_is_the_spread_of_votes_between_videos(runs, monkeypatch, slope, warned):
    "Votes that are `slope` times the true score of the video, plus anything of the voter"
    from types import SimpleNamespace
    from fspn_nb.batches.exemplars import pick_exemplars
    from fspn_nb.inspect import clip_score
    labels, n = np.array([50., 60, 70, 80]), 3
    subset = SimpleNamespace(splits=dict(train=np.arange(n)), cfg=SimpleNamespace(seed=7))
    videos, voters = np.array([50., 60, 70, 80]), np.array([5., -9, 30])
    votes = lambda model, data, ids, m: (None, np.stack([slope*videos[i]+voters[pick_exemplars(np.arange(n), n, 7, 5, int(i))] for i in ids]), None)
    monkeypatch.setattr(clip_score, 'predict', votes)
    got = clip_dependence(SimpleNamespace(uses_exemplar=True), subset, labels)
    expected = slope*np.sqrt(np.mean([np.var(np.delete(videos, j)) for j in range(n)]))/np.std(labels)
    assert np.isclose(got, expected) and (0 < got < LITTLE) == warned
    assert clip_dependence(SimpleNamespace(uses_exemplar=False), subset, labels) is None


@pytest.mark.parametrize('h, w', [(256, 144), (256, 120), (250, 231), (64, 30)])
def test_portrait_clips(tmp_path, h, w):
    "Words do not run into one another, the film fits the screen, and a picture without known cuts does not explain them"
    from PIL import ImageFont
    result = example_result(tmp_path)
    frames = np.zeros((len(result.clip.frames), h, w, 3), np.uint8)
    tall = replace(result, clip=replace(result.clip, frames=frames, transitions=(), kind='real'), boxes=None, heat=None)
    shot = next(overlay_frames(tall))
    assert shot.shape[1] >= 230 and shot.shape[0] > shot.shape[1] and not any(side % 2 for side in shot.shape[:2])
    font = ImageFont.load_default(15 if shot.shape[1] > 400 else 11)
    start = shot.shape[1]-6-int(font.getlength('66.2 points'))
    k = (shot.shape[1]+1)//w
    words = shot[h*k//2*2+18:h*k//2*2+36] # the line below the bar
    assert (words.max(-1) > 150).any() and not (words[:, start-8:start-2].max(-1) > 150).any()
    assert 'max-height:80vh' in clip_page(tall, {})
    figures = {}
    import fspn_nb.inspect.clip_pictures as module
    original, module._saved = module._saved, lambda fig, path: figures.setdefault(path.name, fig)
    try: save_pictures(tall, tmp_path); save_pictures(replace(result, heat=None), tmp_path/'known')
    finally: module._saved = original
    assert figures['parse'].axes[-1].get_xlabel() == 'frame (dashed: predicted cut)'
    strip = plot_strip(tall, n=6)
    strip.canvas.draw()
    boxes = [axis.title.get_window_extent() for axis in strip.axes if axis.get_title()]
    boxes.sort(key=lambda box: box.x0)
    assert len(boxes) == 6 and all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:]))
    matplotlib.pyplot.close('all')


@pytest.mark.parametrize('seen', [96, 60, 12]) # frames that the run saw; its parser has 96 steps
def test_film_page_and_file_show_the_same_steps(tmp_path, seen):
    "A doubtful stretch, where another sub-action is likelier than the one between the cuts of the Viterbi path: the cuts count"
    result = example_result(tmp_path)
    step_probs = result.step_probs.copy()
    step_probs[44:50] = .1, .3, .6
    kept = np.linspace(0, 95, seen).astype(int)
    result = replace(result, step_probs=step_probs, transitions=(30, 62), ids=result.ids[kept], boxes=result.boxes[kept], heat=None)
    assert (result.step_probs.argmax(1) != np.searchsorted((30, 62), np.arange(96), 'right')).sum() >= 6
    page = {frame: i for i, first, last in result.parts for frame in result.ids if first <= frame <= last}
    assert list(page) == result.ids.tolist() and sorted(set(page.values())) == [0, 1, 2], 'each frame has one part on the page'
    assert clip_summary(result)['first_frame_of_later_sub_actions'] == [first for _, first, _ in result.parts[1:]]
    bar = Image.new('RGB', (seen*10, 20))
    words = [clip_pictures._timeline(ImageDraw.Draw(bar), result, i, 2, seen*10) for i in range(seen)] # the last one leaves the bars of all
    for i, frame in enumerate(result.ids):
        assert words[i].startswith(result.names[page[frame]]), (frame, words[i])
        assert bar.getpixel((10*i+2, 6)) == ImageColor.getrgb(clip_pictures.COLOURS[page[frame]])
    if seen == 96: assert words[46] == f'{result.names[1]} (30%)'


def test_true_cuts_are_explained_where_they_are_known():
    from fspn_nb.report.figures import plot_parse
    label = lambda cuts: plot_parse(None, np.full((20, 3), 1/3), cuts, (5, 12), ('a', 'b', 'c'), 'real').axes[-1].get_xlabel()
    assert 'solid: true cut' in label([4, 11]) and 'true' not in label([])


# ---- what the steps are called and worth, how sure the score is, and whether the clip is a stranger

def judged(run, folder, n=30):
    "A copy of `run` whose predictions are 1 to n points off on n test dives"
    import shutil
    from fspn_nb.stored_files import write_checked
    copy = Path(shutil.copytree(run, folder/'finediving'/run.name))
    rows = pd.DataFrame(dict(uid=[f'x/{i}' for i in range(n)], true=60., pred=61.+np.arange(n), difficulty=3., action='107b', split='test', seed=0))
    write_checked(copy/'predictions.csv', rows.to_csv(index=False))
    return copy


def test_points_of_the_steps_add_up_to_each_vote(runs, tmp_path):
    "Vote = score of the exemplar + sum over steps, in points also where the run learnt points per difficulty; the page and the file say so"
    for protocol in ('w_dn', 'w_dd'):
        run, data = runs(protocol=protocol, model__name='fspn_viterbi')
        exemplar = data.release.samples[data.splits['train'][0]]
        clip = replace(synthetic_clip(), action=exemplar.action.upper(), difficulty=exemplar.difficulty)
        for known in (clip, replace(clip, difficulty=None)) if protocol == 'w_dd' else (clip,):
            result = score_clip(known, run, 'cpu')
            own = np.array([sample.score/(sample.difficulty if protocol == 'w_dd' else 1) for sample in result.exemplars])
            if result.unit == 'points' and protocol == 'w_dd': own = own*known.difficulty
            assert result.step_points.shape == (len(result.votes), 3) and np.allclose(own+result.step_points.sum(1), result.votes, atol=1e-3)
    summary, page = clip_summary(result), clip_page(result, save_pictures(result, tmp_path))
    json.dumps(summary, allow_nan=False)
    assert [part['name'] for part in summary['sub_actions']] == list(result.names) and result.names[-1] == 'entry'
    assert all(len(vote['steps']) == 3 for vote in summary['votes']) and np.isclose(sum(part['points'] for part in summary['sub_actions']), result.step_points.sum(1).mean(), atol=1e-3)
    assert 'Made up by the model' in page and f'dive number {result.clip.action}' in page and 'aria-label="points of each step"' in page
    unnamed = replace(result, clip=replace(result.clip, action='gym_vault'))
    assert unnamed.names == ('sub-action 1', 'sub-action 2', 'sub-action 3') and 'Nobody named them' in clip_page(unnamed, {}) and 'dive number' not in clip_page(unnamed, {})


def test_a_method_without_a_sum_over_steps_invents_none(runs):
    run, _ = runs(protocol='wo_dn')
    result = score_clip(synthetic_clip(), run, 'cpu')
    page = clip_page(result, {})
    assert result.step_points is None and all(part['points'] is None for part in clip_summary(result)['sub_actions'])
    assert 'points of each step' not in page and 'Points of a part' not in page and 'Made up by the model' in page


@pytest.mark.parametrize('action, n, names', [
    ('307C', 3, ('reverse take-off', '3.5 somersaults in tuck', 'entry')), ('107b', 3, ('forward take-off', '3.5 somersaults in pike', 'entry')),
    ('5253B', 3, ('back take-off', '1.5 twists and 2.5 somersaults in pike', 'entry')), ('5253b', 4, ('back take-off', '1.5 twists', '2.5 somersaults in pike', 'entry')),
    ('5132d', 5, ('forward take-off', 'first somersaults', '1 twist', 'rest of 1.5 somersaults in free position', 'entry')),
    ('626c', 3, ('armstand take-off, back', '3 somersaults in tuck', 'entry')), ('101a', 3, ('forward take-off', '0.5 somersault straight', 'entry')),
    ('307c', 4, ()), ('307c', 2, ()), ('5253b', 6, ()), ('', 3, ()), ('999', 3, ()), ('gym_vault', 3, ()), ('307e', 3, ()), ('<b>', 3, ())])
def test_names_of_the_parts(action, n, names):
    from fspn_nb.inspect.clip import part_names
    assert part_names(action, n) == names


def test_every_dive_of_the_release_has_names():
    from fspn_nb.data.grammar import step_ids
    from fspn_nb.inspect.clip import part_names
    from fspn_nb.synthetic.catalogue import ACTIONS
    for action in ACTIONS:
        for n in {3, len(step_ids(action))}: assert len(part_names(action, n)) == n == len(set(part_names(action, n)))


def test_interval_of_the_score(runs, tmp_path):
    "From held-out dives of the run, around the score; too few, or a clip that was compared otherwise than they: none, and it is said"
    run, data = runs(protocol='w_dn')
    clip = replace(synthetic_clip(), action=data.release.samples[data.splits['train'][0]].action)
    few, many = (score_clip(clip, folder, 'cpu') for folder in (run, judged(run, tmp_path/'a')))
    assert not few.expected.bounded and any('at least 9 dives that the run did not learn from, got 4' in line for line in headline(few))
    assert clip_summary(few)['expected'] is None and '<path' not in clip_page(few, {})
    assert many.expected.half_width == 28 and np.isclose(many.expected.hi, many.score+28) # rank 28 of 30 errors of 1 to 30 points
    assert clip_summary(many)['expected']['held_out'] == dict(test=30) and '<path' in clip_page(many, {})
    assert any('90%' in line and '30 dives that the run did not learn from (30 test)' in line for line in headline(many))
    unknown = score_clip(replace(clip, action=''), judged(run, tmp_path/'b'), 'cpu')
    assert unknown.expected is None and any('interval: not known' in note and 'same action' in note for note in unknown.notes)
    bare = judged(run, tmp_path/'c')
    (bare/'predictions.csv').unlink()
    lost = score_clip(clip, bare, 'cpu')
    assert lost.expected is None and any('interval: not known' in note and 'predictions.csv' in note for note in lost.notes)


def test_damaged_features_of_the_runs_own_videos_are_computed_anew(runs, monkeypatch, tmp_path, capsys):
    from fspn_nb.inspect import novelty
    run, _ = runs()
    data, computed = replace(open_run(run, 'cpu'), backbone='trained'), [] # only a trained backbone's features are kept
    monkeypatch.setattr(novelty, '_features', lambda data, model, ids: (computed.append(len(ids)), np.ones((len(ids), 4), np.float32))[1])
    monkeypatch.setattr(novelty, 'data_cache', lambda: tmp_path)
    (tmp_path/'features').mkdir()
    first = novelty.reference_features(data, run, None)
    kept, calls = next((tmp_path/'features').glob('*.novelty.safetensors')), len(computed)
    again = novelty.reference_features(data, run, None)
    assert len(computed) == calls > 0 and all(np.array_equal(again[name], first[name]) for name in first), 'kept'
    whole = kept.read_bytes()
    for damaged in (whole[:-1]+bytes([whole[-1]^1]), whole[:20]):
        kept.write_bytes(damaged)
        anew = novelty.reference_features(data, run, None)
        assert 'damaged' in capsys.readouterr().out and all(np.array_equal(anew[name], first[name]) for name in first) and kept.read_bytes() == whole
    assert len(computed) == 3*calls


@pytest.mark.parametrize('stranger', [True, False])
def test_outside_of_training(runs, monkeypatch, stranger):
    "Features far from all: a warning above the score and a sentence; features like the others: no warning; no features: a note"
    from fspn_nb.inspect import novelty
    run, _ = runs()
    result, rng = score_clip(synthetic_clip(), run, 'cpu'), np.random.default_rng(0)
    assert novelty.check_novelty(result, run, 'cpu').novelty.outside is None, 'four held-out dives cannot say'
    near = result.features+.1*rng.normal(size=(80, result.features.shape[1]))
    monkeypatch.setattr(novelty, 'reference_features', lambda *args: dict(train=near[:50], held_out=near[50:]))
    checked = novelty.check_novelty(replace(result, features=result.features+stranger), run, 'cpu')
    assert checked.novelty.outside == stranger and clip_summary(checked)['novelty']['held_out'] == 30
    assert stranger == any('WARNING: The clip is outside what the run was trained on' in line for line in score_warnings(checked))
    page = clip_page(checked, {})
    assert page.count('outside what the run was trained on') == stranger and ('not unlike what the run was trained on' in page) == (not stranger)
    json.dumps(clip_summary(checked), allow_nan=False)
    monkeypatch.setattr(novelty, 'reference_features', lambda *args: None)
    assert novelty.check_novelty(result, run, 'cpu').novelty is None


# ---- films with faults

def test_film_is_read_by_time(shared):
    clip = read_clip(shared('cases', 'fifty_per_second.mp4'))
    assert len(clip.frames) == 60 and '50 pictures/s' in clip.about[0] and 'read at 25 frames/s' in clip.about[0]
    lost = read_clip(shared('cases', 'damaged.ts'))
    assert len(lost.frames) == 120 and '3 of 120 frames missing' in lost.about[1]
    assert len(read_clip(shared('cases', 'cover_first.mkv')).frames) == 60
    assert '5 of 60 frames missing' in read_clip(shared('cases', 'clock_with_hole.mkv')).about[1]


def test_slow_film_keeps_its_pictures_and_faults_are_among_the_notes(runs, tmp_path):
    run, _ = runs()
    slow = read_clip(encode_video(film(20), tmp_path/'slow.mp4', 10))
    assert len(slow.frames) == 20 and '10 pictures/s' in slow.about[0]
    lost = encode_video(film(24, 96, 128), tmp_path/'lost.mkv', times=[i+5*(i > 11) for i in range(24)])
    result = score_clip(read_clip(lost), run, 'cpu')
    assert any('5 of 29 frames missing in the film' in note for note in result.notes)


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
    monkeypatch.setattr('fspn_nb.inspect.clip_run.repo_root', lambda: tmp_path) # runs of the checkout would be taken first
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
    from fspn_nb.inspect.novelty import check_novelty
    assert check_novelty(result, run, 'cpu').novelty.outside is None, 'four held-out dives cannot say'


def test_names_in_any_script_have_pages_of_their_own(tmp_path):
    names = ('прыжок', 'полёт 2', '跳水')
    for name in names:
        (tmp_path/name).mkdir()
        for k in range(16): Image.new('RGB', (64, 64), (10*k, 0, 0)).save(tmp_path/name/f'{k}.png')
    assert [read_clip(tmp_path/name).name for name in names] == ['прыжок', 'полёт_2', '跳水']
