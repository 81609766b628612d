"A run is what it was made of: whatever changes in its data, its weights or its settings, no old folder is taken for it"
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from conftest import edit_pickle

from fspn_nb import file_hashes
from fspn_nb.actor.track import detect_boxes
from fspn_nb.batches.dataset import load_samples
from fspn_nb.batches.features import cache_features
from fspn_nb.batches.fingerprint import KINDS,check_inputs,write_inputs
from fspn_nb.config import finediving,make_config,override,run_id,save_cfg,validate
from fspn_nb.core import flatten,write_json
from fspn_nb.data.safe_pickle import load_pickle
from fspn_nb.evaluate import evaluate,load_model
from fspn_nb.experiments.grid import run_one
from fspn_nb.file_hashes import frame_hashes,group_hashes
from fspn_nb.synthetic.release import MARKER
from fspn_nb.train import environment,fit,launch,resume
from fspn_nb.training.prepare import feature_extractor,prepare,read_inputs

SMALL = dict(synthetic__n_train=6, synthetic__n_test=4)
QUICK = dict(weights='random', clip__size=32, model__name='i3d_mlp', train__epochs=1)
AQA = ('fine-grained_annotation_aqa','FineDiving_fine-grained_annotation','FineDiving_coarse_annotation')


@pytest.fixture(scope='session')
def made():
    "The synthetic release that other tests use as well"
    return load_samples(finediving('smoke', **SMALL))


@pytest.fixture
def given(made, tmp_path):
    "A run on a copy of that release, with a file of boxes and a file of weights of its own"
    root = tmp_path/'release'
    shutil.copytree(made.root, root)
    boxes,weights = tmp_path/'own'/'boxes.csv',tmp_path/'own'/'weights.pth'
    boxes.parent.mkdir()
    shutil.copy(root/'truth'/'boxes.csv', boxes)
    weights.write_bytes(b'weights')
    return finediving('smoke', data_root=str(root), actor__source='boxes', actor__boxes=str(boxes), weights=str(weights), clip__stats='unit')


def annotations(cfg): return Path(cfg.data_root)/'Annotations'


def rewrite(path, edit):
    "Edit a file in place, its size and its times as before, as far as a program can put them back"
    before,data = path.stat(),bytearray(path.read_bytes())
    edit(data)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


# --- settings ---

def other_value(value):
    "Another value of the same type"
    if isinstance(value, bool): return not value
    if isinstance(value, (int, float)): return value+1
    return (*value, 1) if isinstance(value, tuple) else f'{value}x'


def test_every_setting_is_part_of_the_name():
    cfg = finediving('smoke', data_root='/data/a')
    for name,value in flatten(cfg).items():
        other = '' if name == 'data_root' else other_value(value) # one folder or another is a matter of the fingerprint
        changed = override(cfg, **{name.replace('.', '__'): other})
        assert run_id(changed) != run_id(cfg), f'{name}: {value} and {other} have one name'
    assert run_id(override(cfg, data_root='/data/b')) == run_id(cfg)


def test_precision_is_stated_and_part_of_the_name():
    cfg = finediving('demo')
    assert {p: finediving(p).train.feature_precision for p in ('smoke','demo','paper')} == dict.fromkeys(('smoke','demo','paper'), 'fp32')
    assert run_id(override(cfg, train__feature_precision='bf16')) != run_id(cfg)
    with pytest.raises(ValueError, match='train.feature_precision must be one of fp32, bf16'): validate(override(cfg, train__feature_precision='fast'))


# --- files ---

def edited(dive, field, by):
    "A dive of an annotation file with one field changed"
    if isinstance(dive, dict): return dive|{field: dive[field]+by}
    names = ('action_type','dive_score','difficulty','steps_transit_frames','frames_labels')
    return [value+by if name == field else value for name,value in zip(names, dive)]


def in_all(cfg, field, by):
    "Change `field` of the first dive in every annotation file that has it"
    first = next(iter(sorted(_load(cfg, AQA[0]))))
    for name in AQA:
        def change(d):
            if name == AQA[0] or field in d[first]: d[first] = edited(d[first], field, by)
        edit_pickle(annotations(cfg)/f'{name}.pkl', change)


def _load(cfg, name):
    return load_pickle(annotations(cfg)/f'{name}.pkl')


def swap_split(cfg):
    train,test = (_load(cfg, f'{name}_split') for name in ('train','test'))
    edit_pickle(annotations(cfg)/'train_split.pkl', lambda _: [test[0], *train[1:]])
    edit_pickle(annotations(cfg)/'test_split.pkl', lambda _: [train[0], *test[1:]])


def judges(cfg):
    def change(d):
        dive = d[first := next(iter(sorted(d)))]
        d[first] = dive|{'judge_scores': [*dive['judge_scores'][:-1], dive['judge_scores'][-1]+.5]}
    edit_pickle(annotations(cfg)/'FineDiving_coarse_annotation.pkl', change)


def steps(cfg):
    "The second step of one dive begins a frame later, wherever that is written"
    first = next(iter(sorted(_load(cfg, AQA[0]))))
    def later(labels):
        labels = list(labels)
        at = next(i for i in range(1, len(labels)) if labels[i] != labels[i-1])
        labels[at] = labels[at-1]
        return labels
    for name in AQA[:2]:
        def change(d):
            dive = d[first]
            if isinstance(dive, dict): d[first] = dive|{'frames_labels': later(dive['frames_labels'])}
            else: d[first] = [*dive[:4], later(dive[4])]
        edit_pickle(annotations(cfg)/f'{name}.pkl', change)


def order(cfg): edit_pickle(annotations(cfg)/'train_split.pkl', lambda keys: keys[::-1])


def frame(k, at):
    "Edit frame `at` of dive `k`, its size and time kept"
    def change(cfg):
        sample = load_samples(cfg).samples[k]
        rewrite(sample.folder/sample.files[at], lambda data: data.__setitem__(-3, data[-3]^1))
    return change


def drop_dive(cfg):
    sample = load_samples(cfg).samples[-1]
    shutil.rmtree(sample.folder)


def swap_frames(cfg):
    sample = load_samples(cfg).samples[1]
    a,b = (sample.folder/sample.files[i] for i in (3, 40))
    a.rename(a.with_suffix('.part')); b.rename(a); a.with_suffix('.part').rename(b)


def boxes(cfg):
    path = Path(cfg.actor.boxes)
    table = pd.read_csv(path)
    table.loc[7, 'x2'] += 1
    table.to_csv(path, index=False)


def marker(cfg): (Path(cfg.data_root)/MARKER).unlink()


CHANGES = {
    'a score': (lambda cfg: in_all(cfg, 'dive_score', 1.), 'labels', 'score of 1 sample'),
    'a difficulty': (lambda cfg: in_all(cfg, 'difficulty', .1), 'labels', 'difficulty of 1 sample'),
    'a mark of a judge': (judges, 'labels', 'annotation of 1 sample'),
    'a step': (steps, 'labels', 'annotation of 1 sample'),
    'the split': (swap_split, 'samples', 'split of 2 samples'),
    'the order of a split': (order, 'samples', 'order of the samples'),
    'a frame': (frame(0, 5), 'frames', 'frames of 1 sample'),
    'the last frame of the last dive': (frame(-1, -1), 'frames', 'frames of 1 sample'),
    'two frames that change places': (swap_frames, 'frames', 'frames of 1 sample'),
    'a dive less': (drop_dive, 'samples', '1 sample fewer'),
    'a box': (boxes, 'boxes', 'boxes of 1 sample'),
    'the weights': (lambda cfg: Path(cfg.weights).write_bytes(b'WEIGHTS'), 'weights', 'weights of the backbone'),
    'synthetic or not': (marker, 'data', 'real or synthetic .synthetic, now real')}


@pytest.mark.parametrize('name', CHANGES)
def test_any_file_that_a_run_reads_changes_its_identity(given, tmp_path, name):
    change,kind,words = CHANGES[name]
    cfg = override(given, allow_missing=True)
    before = read_inputs(cfg)
    run = tmp_path/'out'/'finediving'/run_id(cfg)
    write_json(run/'provenance.json', dict(inputs=before.record))
    write_inputs(run, before)
    check_inputs(run, read_inputs(cfg))
    change(cfg)
    after = read_inputs(cfg)
    assert run_id(cfg) == run.name and kind in {k for k in KINDS if before.hashes.get(k) != after.hashes.get(k)}
    assert before.total != after.total
    with pytest.raises(ValueError, match=f'got others: .*{words}.*delete that folder, or pass another `out`'): check_inputs(run, after)


SMOOTHED = """
import numpy as np
from fspn_nb.actor.crop import smooth_boxes
from fspn_nb.batches.fingerprint import box_hash
print(box_hash(smooth_boxes(np.random.default_rng(0).uniform(0, 300, (90, 4)).round(2))))
"""


def test_boxes_are_the_same_on_another_processor():
    "NumPy's exp, and so the weights that smooth boxes, differ in the last bit between instruction sets; NumPy can be told which ones to leave out"
    from numpy._core._multiarray_umath import __cpu_dispatch__,__cpu_features__
    given = [name for name in __cpu_dispatch__ if __cpu_features__[name]]
    if not given: pytest.skip('this processor has no instruction set that NumPy could leave out')
    hashes = {subprocess.run([sys.executable, '-c', SMOOTHED], cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
                             env=os.environ|dict(NPY_DISABLE_CPU_FEATURES=' '.join(off))).stdout for off in ([], given[-1:], given)}
    assert len(hashes) == 1


def test_true_boxes_and_files_of_a_detector_count(given, tmp_path):
    truth = override(given, actor__source='auto', actor__boxes='')
    before = read_inputs(truth)
    path = Path(given.data_root)/'truth'/'boxes.csv'
    path.write_text(path.read_text().replace('.', '.1', 1)) # one corner of one box
    assert read_inputs(truth).hashes['boxes'] != before.hashes['boxes']
    file = tmp_path/'detector.onnx'
    totals = set()
    for content in (b'one', b'two'):
        file.write_bytes(content)
        totals.add(read_inputs(override(given, actor__source='onnx', actor__weights=str(file))).total)
    assert len(totals) == 2


def test_what_must_not_matter(given, tmp_path, monkeypatch):
    before = read_inputs(given)
    for path in Path(given.data_root).rglob('*.*'): os.utime(path)
    assert read_inputs(given) == before, 'touched'
    copied = tmp_path/'elsewhere'/'copy of it'
    shutil.copytree(given.data_root, copied, copy_function=shutil.copyfile)
    moved = override(given, data_root=str(copied))
    assert (read_inputs(moved), run_id(moved)) == (before, run_id(given)), 'another place'
    for name in ('weights','actor.boxes'):
        other = tmp_path/'elsewhere'/Path(flatten(given)[name]).name
        shutil.copyfile(flatten(given)[name], other)
        moved = override(moved, **{name.replace('.', '__'): str(other)})
    assert (read_inputs(moved), run_id(moved)) == (before, run_id(given)), 'files of the same name and content'
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path/'cache'))
    assert read_inputs(moved) == before, 'another cache'
    (copied/'notes.txt').write_text('mine')
    (load_samples(moved).samples[0].folder/'Thumbs.db').write_bytes(b'x')
    assert read_inputs(moved) == before, 'files that no run reads'


def test_another_process_with_other_threads_agrees(given, tmp_path):
    script = 'import sys; from fspn_nb.config import load_cfg; from fspn_nb.training.prepare import read_inputs; print(read_inputs(load_cfg(sys.argv[1])).total)'
    env = dict(os.environ, OMP_NUM_THREADS='2', FSPN_CACHE=str(tmp_path/'cache'), PYTHONHASHSEED='7')
    printed = subprocess.run([sys.executable, '-c', script, str(save_cfg(given, tmp_path/'cfg.json'))], env=env, capture_output=True, text=True)
    assert printed.stdout.split()[-1:] == [read_inputs(given).total], printed.stderr


# --- content of frames ---

def test_files_are_read_once_and_again_when_touched(given, tmp_path, monkeypatch):
    samples,reads = load_samples(given).samples,[]
    real = file_hashes.files_hash
    monkeypatch.setattr(file_hashes, 'files_hash', lambda paths: (reads.append(1), real(paths))[1])
    monkeypatch.setattr(file_hashes, '_YOUNG', 0)
    groups = {s.uid: (s.folder, s.files) for s in samples}
    first = group_hashes(groups, tmp_path/'memory.json')
    assert group_hashes(groups, tmp_path/'memory.json') == first and len(reads) == 10
    os.utime(samples[3].folder/samples[3].files[9])
    assert group_hashes(groups, tmp_path/'memory.json') == first and len(reads) == 11
    rewrite(samples[4].folder/samples[4].files[9], lambda data: data.__setitem__(-3, data[-3]^1))
    second = group_hashes(groups, tmp_path/'memory.json')
    assert {uid for uid in first if first[uid] != second[uid]} == {samples[4].uid} and len(reads) == 12


def test_a_file_written_twice_within_a_tick_is_read_again(tmp_path):
    "The clock of a file system stands still for milliseconds; what was written a moment ago is not remembered"
    (tmp_path/'a.jpg').write_bytes(b'1')
    hashes = set()
    for content in range(50):
        (tmp_path/'a.jpg').write_bytes(bytes([content]))
        hashes.add(group_hashes(dict(a=(tmp_path, ('a.jpg',))), tmp_path/'memory.json')['a'])
    assert len(hashes) == 50 and not (tmp_path/'memory.json').exists()


def test_an_edited_frame_of_the_same_size_never_gets_old_features_or_boxes(given, tmp_path):
    cfg = override(given, **QUICK, actor__source='none', actor__boxes='')
    class Brightness: # finds the whole frame, and how bright its first pixel is
        name,key,calls = 'brightness','brightness',0
        def __call__(self, frames):
            self.calls += 1
            return [np.array([[0, 0, 9, 9, 1.]])]*len(frames)
    detector = Brightness()
    samples = load_samples(cfg).samples[:2]
    encode = lambda clips: clips.float().mean((2,3,4))
    first = cache_features(samples, cfg, dict.fromkeys([s.uid for s in samples]), encode, 'toy', frame_hashes(samples), tmp_path/'f')
    detect_boxes(samples, detector, tmp_path/'b'); detect_boxes(samples, detector, tmp_path/'b')
    assert detector.calls == 2
    other = samples[0].folder/samples[0].files[30]
    dark = tmp_path/'dark.jpg'
    Image.new('RGB', Image.open(other).size).save(dark)
    data = dark.read_bytes()
    size = other.stat().st_size
    assert len(data) <= size
    before = other.stat()
    other.write_bytes(data+b'\0'*(size-len(data)))
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    second = cache_features(samples, cfg, dict.fromkeys([s.uid for s in samples]), encode, 'toy', frame_hashes(samples), tmp_path/'f')
    assert not torch.equal(first.scene[0], second.scene[0]) and torch.equal(first.scene[1], second.scene[1])
    detect_boxes(samples, detector, tmp_path/'b')
    assert detector.calls == 3


# --- the same number for any number of threads ---

def test_features_have_the_same_bits_for_any_number_of_threads(made, tmp_path):
    cfg = finediving('smoke', **SMALL, **QUICK|dict(clip__size=64, model__name='tsa'))
    samples,threads = made.samples[:2],torch.get_num_threads()
    frames,no_boxes = frame_hashes(samples),dict.fromkeys([s.uid for s in samples])
    results = []
    for n in (1, 3):
        torch.set_num_threads(n)
        try:
            encode,key = feature_extractor(cfg, torch.device('cpu'))
            results.append(cache_features(samples, cfg, no_boxes, encode, key, frames, tmp_path/str(n), ('feature_maps',), workers=n))
            assert torch.get_num_threads() == n
        finally: torch.set_num_threads(threads)
    names = [sorted(p.name for p in (tmp_path/str(n)).iterdir()) for n in (1, 3)]
    assert names[0] == names[1] and len(names[0]) == 4, 'the key knows of no threads'
    one,three = results
    assert torch.equal(one.scene, three.scene) and torch.equal(one.extra['feature_maps'], three.extra['feature_maps'])


def test_training_has_the_same_bits_for_any_number_of_threads(made, tmp_path):
    cfg = finediving('smoke', **SMALL, **QUICK|dict(model__name='fspn_s', train__epochs=3))
    data,threads = prepare(cfg, 'cpu'),torch.get_num_threads()
    for n in (1, 3):
        torch.set_num_threads(n)
        try:
            run = fit(cfg, tmp_path/str(n), 'cpu', data)
            evaluate(run, data)
            assert torch.get_num_threads() == n
        finally: torch.set_num_threads(threads)
    a,b = (torch.load(tmp_path/n/'finediving'/data.run_id/'last.pt', weights_only=True)['model'] for n in ('1','3'))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert len({(tmp_path/n/'finediving'/data.run_id/'predictions.csv').read_bytes() for n in ('1','3')}) == 1


# --- the whole story ---

@pytest.fixture
def twelve(shared, tmp_path):
    "A folder with the real annotations and the frames of six of twelve real dives, and a function that adds the others"
    source,root = shared('data', 'finediving'),tmp_path/'FineDiving'
    shutil.copytree(source/'Annotations', root/'Annotations')
    cfg = finediving('smoke', data_root=str(source), allow_missing=True)
    samples = load_samples(cfg).samples
    assert len(samples) == 12
    chosen = [*[s for s in samples if s.split == 'train'][:3], *[s for s in samples if s.split == 'test'][:3]]
    def add(samples):
        for s in samples: shutil.copytree(s.folder, root/'FINADiving_MTL_256s'/s.uid)
    add(chosen)
    rest = [s for s in samples if s not in chosen]
    cfg = override(cfg, **QUICK, actor__source='none', data_root=str(root))
    return cfg,chosen,rest,add


def facts(run):
    "What the files of a run say of its samples"
    provenance,metrics = (json.loads((run/f'{name}.json').read_text()) for name in ('provenance','metrics'))
    return provenance['counts']['test'],metrics['n'],len(pd.read_csv(run/'predictions.csv'))


def test_frames_of_six_more_dives(twelve, tmp_path):
    cfg,chosen,rest,add = twelve
    out = tmp_path/'out'
    six = prepare(cfg, 'cpu')
    run = fit(cfg, out, 'cpu', six)
    evaluate(run, six)
    assert facts(run) == (3, 3, 3)
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert fit(cfg, out, 'cpu') == run, 'the same command on the same data: nothing to do'
    add(rest)
    data = prepare(cfg, 'cpu', reuse=six)
    names = ', '.join(s.uid for s in load_samples(cfg).samples if s.uid in {other.uid for other in rest})
    assert len(rest) == 6
    for command in (lambda: resume(run, 'cpu'), lambda: fit(cfg, out, 'cpu', data), lambda: evaluate(run, data), lambda: load_model(run, data),
                    lambda: run_one(cfg, out, 'cpu', data), lambda: launch(cfg, out, 'cpu', 2, data)):
        with pytest.raises(ValueError) as e: command()
        assert f'6 samples more ({names})' in str(e.value) and 'to train anew on the present data delete that folder' in str(e.value)
    assert {p.name: p.read_bytes() for p in run.iterdir()} == before, 'the old run is as it was'
    other = fit(cfg, tmp_path/'other', 'cpu', data)
    evaluate(other, data)
    assert other.name == run.name and len(set(facts(other))) == 1 and facts(other) != facts(run)
    shutil.rmtree(run)
    evaluate(fit(cfg, out, 'cpu', data), data)
    assert facts(run) == facts(other), 'deleted as the message says, the run is trained anew'


def test_an_interrupted_run_does_not_go_on_with_other_data(made, given, tmp_path):
    cfg = override(given, **QUICK|dict(train__epochs=3))
    def crash(model, data, epoch, run):
        if epoch == 2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): fit(cfg, tmp_path/'out', 'cpu', on_epoch_end=crash, max_checkpoint_overhead=1)
    in_all(cfg, 'dive_score', 2.)
    with pytest.raises(ValueError, match='score of 1 sample'): fit(cfg, tmp_path/'out', 'cpu')
    in_all(cfg, 'dive_score', -2.)
    assert len(pd.read_csv(fit(cfg, tmp_path/'out', 'cpu')/'log.csv')) == 3


def test_a_checkpoint_of_other_data_in_the_right_folder(given, tmp_path):
    cfg = override(given, **QUICK)
    run = fit(cfg, tmp_path/'one', 'cpu')
    in_all(cfg, 'dive_score', 2.)
    other = fit(cfg, tmp_path/'two', 'cpu')
    shutil.copy(run/'last.pt', other/'last.pt')
    for command in (lambda: evaluate(other, device='cpu'), lambda: fit(cfg, tmp_path/'two', 'cpu')):
        with pytest.raises(ValueError, match='trained on others .labels differ'): command()


def test_a_folder_of_an_older_version_is_refused(given, tmp_path):
    cfg = override(given, **QUICK)
    run = fit(cfg, tmp_path, 'cpu')
    old = json.loads((run/'provenance.json').read_text())
    del old['inputs']
    (run/'provenance.json').write_text(json.dumps(old))
    (run/'checksums.json').unlink()
    for command in (lambda: fit(cfg, tmp_path, 'cpu'), lambda: evaluate(run, device='cpu')):
        with pytest.raises(ValueError, match='older version, which did not record it; to train anew'): command()


def test_without_the_list_of_samples_the_kinds_are_named(given, tmp_path):
    cfg = override(given, **QUICK)
    run = fit(cfg, tmp_path, 'cpu')
    in_all(cfg, 'dive_score', 2.)
    for damage in (lambda path: path.write_bytes(path.read_bytes()[:40]), lambda path: path.unlink()):
        for path in (tmp_path/'inputs').iterdir(): damage(path)
        with pytest.raises(ValueError, match='got others: scores or other annotations .*, now'): fit(cfg, tmp_path, 'cpu')


def test_nothing_is_shared_with_a_run_whose_boxes_were_edited_meanwhile(given):
    cfg = override(given, **QUICK)
    first = prepare(cfg, 'cpu')
    assert prepare(override(cfg, seed=1), 'cpu', reuse=first).source is first.source
    boxes(cfg)
    second = prepare(override(cfg, seed=1), 'cpu', reuse=first)
    assert second.source is not first.source and second.inputs != first.inputs
    assert not torch.equal(second.source.actor, first.source.actor)


# --- synthetic or real ---

@pytest.mark.parametrize('dataset', ['finediving','mtl_aqa','aqa7'])
def test_a_synthetic_release_is_called_synthetic(dataset, tmp_path):
    small = dict(synthetic__n_train=4, synthetic__n_test=4) if dataset == 'aqa7' else SMALL
    cfg = make_config(dataset, 'smoke', **small)
    root = load_samples(cfg).root
    copy = tmp_path/'My FineDiving'
    shutil.copytree(root, copy)
    linked = tmp_path/'linked' # the frames of one place, the annotations of another
    linked.mkdir()
    for path in root.iterdir():
        if path.is_dir(): (linked/path.name).symlink_to(path)
        elif path.name != MARKER: shutil.copy(path, linked)
    sources = {path.name: load_samples(override(cfg, data_root=str(path))).source for path in (root, copy, linked)}
    assert set(sources.values()) == {'synthetic'}, sources
    (copy/MARKER).unlink()
    assert load_samples(override(cfg, data_root=str(copy))).source == 'real' # nothing says what it is


def test_what_a_run_says_of_a_synthetic_data_root(made, tmp_path):
    cfg = finediving('smoke', **QUICK, data_root=str(made.root))
    data = prepare(cfg, 'cpu')
    run = fit(cfg, tmp_path, 'cpu', data)
    assert evaluate(run, data)['data'] == 'synthetic' and data.boxes[0] == 'truth'
    assert json.loads((run/'provenance.json').read_text())['deviations'][0] == 'data: a synthetic release, not comparable with the paper'


def test_real_dives_are_real(shared):
    assert load_samples(finediving('smoke', data_root=str(shared('data', 'finediving')), allow_missing=True)).source == 'real'


def test_commit_is_that_of_the_code_that_runs(tmp_path, monkeypatch):
    here = environment()['commit']
    git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@example.org']
    for command in (['init', '-q'], ['commit', '-q', '--allow-empty', '-m', 'work of the user']): subprocess.run(git+command, cwd=tmp_path, check=True)
    other = subprocess.run(['git', 'rev-parse', '--short', 'HEAD'], cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()
    monkeypatch.chdir(tmp_path)
    assert environment()['commit'] == here != other


def test_a_cache_that_cannot_be_written_is_no_damaged_frame(made, tmp_path, monkeypatch):
    (tmp_path/'file').write_bytes(b'')
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path/'file'))
    with pytest.raises(PermissionError, match='need a cache folder that can be written, got .*file .*FSPN_CACHE'): frame_hashes(made.samples)
    (tmp_path/'cache').mkdir()
    (tmp_path/'cache'/'checksums').write_bytes(b'')
    monkeypatch.setenv('FSPN_CACHE', str(tmp_path/'cache'))
    with pytest.raises(OSError) as error: frame_hashes(made.samples)
    assert 'dive' not in str(error.value) and 'checksums' in str(error.value)


def test_a_run_notebook_refuses_before_features_are_computed(tmp_path, monkeypatch):
    from fspn_nb.experiments import session
    parameters = dict(data_root='', preset='smoke', methods='i3d_mlp', protocol='w_dn', per_difficulty=False, seeds='0', backbone='frozen', weights='',
                      device='cpu', processes=1, epochs=0, allow_missing=False, actor='auto', actor_file='', changes='', out=str(tmp_path))
    context = session.start('finediving', parameters)
    cfg = context.runs[0]
    other = read_inputs(override(cfg, synthetic__seed=1)).record
    write_json(tmp_path/'finediving'/run_id(cfg)/'provenance.json', dict(inputs=other))
    monkeypatch.setattr(session, 'prepare', lambda *_, **__: pytest.fail('features were asked for'))
    with pytest.raises(ValueError, match='pass another `out`'): session.read_data(context)
