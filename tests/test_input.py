"What the backbone is shown: how much of a frame, and in which range"
from dataclasses import replace

import numpy as np
import pytest
import torch

from fspn_nb.actor.crop import normalized_boxes,scene_size
from fspn_nb.batches.features import feature_key
from fspn_nb.batches.fingerprint import check_inputs,clip_code_hash
from fspn_nb.batches.frame_store import record_name
from fspn_nb.batches.sources import draw_augmentation
from fspn_nb.config import make_config,override,run_id,validate
from fspn_nb.core import Batch,rng_for,write_json
from fspn_nb.data.clips import resize_crop
from fspn_nb.data.records import Sample
from fspn_nb.inspect.gradcam import feature_maps,grey_reference
from fspn_nb.inspect.heat import crop_window
from fspn_nb.inspect.map_quality import grey_out
from fspn_nb.models.backbone import feature_extractor,encoder_suffix,load_backbone
from fspn_nb.models.i3d import encode_clips,normalize_clip
from fspn_nb.models.weights import map_key,pick_stats
from fspn_nb.models.with_backbone import WithBackbone,extract_features
from fspn_nb.protocols import crop_offsets,resized_size
from fspn_nb.training.prepare import prepare,read_inputs
from fspn_nb.zoo import create_model

SEEN = { # share of the height and of the width that a square keeps of a 16:9 frame
    ('finediving','peer'): (112/200, 1.), ('mtl_aqa','peer'): (224/455, 224/256), ('aqa7','peer'): (224/455, 224/256),
    ('finediving','correct'): (1., 9/16), ('mtl_aqa','correct'): (224/256, 224/455), ('aqa7','correct'): (224/256, 224/455)}


def ramps(h, w):
    "A frame whose red tells the row and whose green the column, 0 to 255"
    frame = np.zeros((1, h, w, 3), np.uint8)
    frame[..., 0],frame[..., 1] = np.linspace(0, 255, h)[:, None],np.linspace(0, 255, w)
    return torch.from_numpy(frame)


@pytest.mark.parametrize('dataset,orientation', SEEN)
def test_as_much_of_a_frame_is_seen_as_in_the_released_code(dataset, orientation):
    clip,(h,w) = make_config(dataset, 'paper', clip__orientation=orientation).clip,(360, 640)
    square = resize_crop(ramps(h, w), clip.size, orientation)[0].float()
    height,width = (float(part.max()-part.min())/255 for part in square[:2])
    assert (height, width) == pytest.approx(SEEN[dataset, orientation], abs=.015)
    x1,y1,x2,y2 = window = crop_window(h, w, clip.size, orientation)
    assert ((y2-y1)/h, (x2-x1)/w) == pytest.approx(SEEN[dataset, orientation], abs=.003)
    assert torch.allclose(normalized_boxes(window[None], (h, w), clip), torch.tensor([[0., 0., 1., 1.]]), atol=1e-4)
    assert clip.size**2/np.prod(scene_size(h, w, clip)) == pytest.approx(np.prod(SEEN[dataset, orientation]), rel=.01)


@pytest.mark.parametrize('hw,correct', [((240, 320), (256, 341)), ((320, 240), (341, 256)), ((100, 100), (256, 256))])
def test_other_proportions_keep_the_margin(hw, correct):
    assert (resized_size(*hw, 224), resized_size(*hw, 224, 'peer')) == (correct, (455, 256))


@pytest.mark.parametrize('hw', [(144, 256), (72, 128), (128, 72), (50, 50)])
@pytest.mark.parametrize('size', [32, 64, 112])
def test_squares_up_to_112_pixels_have_the_bits_that_they_had(hw, size):
    from torchvision.transforms.v2 import functional as V
    frames = torch.randint(0, 256, (2, *hw, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))
    h,w = hw
    sides = dict(correct=[round(size*max(1, h/w)), round(size*max(1, w/h))], peer=[round(size*200/112), size])
    for orientation,(tall,wide) in sides.items():
        x = V.resize(frames.permute(0, 3, 1, 2), [tall, wide], antialias=True)
        for place in (.5, .1, 1.):
            top,left = round(place*(tall-size)),round(place*(wide-size))
            assert torch.equal(resize_crop(frames, size, orientation, place), x[:, :, top:top+size, left:left+size])


def test_in_training_the_square_moves_along_both_sides():
    dive = Sample('01/1', 'train', '407c', 88., 3.2)
    draws = [draw_augmentation(dive, rng_for(0, k), .5)[3] for k in range(200)]
    tops,lefts = np.array([crop_offsets(455, 256, 224, draw) for draw in draws]).T
    assert 0 <= tops.min() < 10 and 221 < tops.max() <= 231 and lefts.min() == 0 and lefts.max() == 32
    assert abs(np.corrcoef(tops, lefts)[0, 1]) < .2, 'each side has a draw of its own'
    rng = rng_for(0, 7)
    rng.random() # mirrored or not
    assert crop_offsets(112, 199, 112, draws[7]) == (0, round(rng.random()*87)), 'where one side is free, the draw is the one it was'
    assert draw_augmentation(dive, None)[3] == (.5, .5)


def test_frames_of_another_size_have_another_key():
    dive = Sample('01/1', 'train', '407c', 88., 3.2)
    keys = {size: {way: feature_key(dive, make_config('mtl_aqa', 'demo', clip__size=size, clip__orientation=way), None, 'w', 'f')
                   for way in ('correct','peer')} for size in (112, 224)}
    assert len({key for row in keys.values() for key in row.values()}) == 4
    demo,paper = make_config('mtl_aqa', 'demo').clip,make_config('mtl_aqa', 'paper').clip
    assert clip_code_hash(demo) == clip_code_hash() != clip_code_hash(paper) != clip_code_hash(replace(paper, orientation='peer'))


# Statistics of the input -----------------------------------------------------------------------------------------------------------

CLIPS = torch.randint(0, 256, (2, 3, 8, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope='module', params=['unit', 'imagenet'])
def fed(request): return load_backbone('random', request.param)[0],request.param


def test_whatever_shows_a_clip_normalises_it_alike(fed):
    net,stats = fed
    expected = net.features(normalize_clip(CLIPS, stats)).detach()
    vectors = expected.mean((2, 3, 4))
    assert torch.allclose(encode_clips(net, CLIPS), vectors, atol=1e-5), 'frozen features'
    batch = Batch(CLIPS[None], CLIPS.flip(0)[None])
    with torch.no_grad():
        for model in (WithBackbone(net, create_model('i3d_mlp')), WithBackbone(net, create_model('i3d_mlp'), compiled=net.features)):
            assert torch.allclose(model.extract_features(batch).scene[0], vectors, atol=1e-5), 'a backbone that trains'
        short = extract_features(net, Batch(CLIPS[None].repeat(1, 1, 1, 2, 1, 1)), ('scene',), ('short_clip_features',), (0, 10))
        tube = WithBackbone(net, create_model('tsa_net')).extract_features(replace(batch, boxes=torch.zeros(1, 2, 8, 4)))
    assert torch.allclose(short.short_clip_features[0, 0], vectors[0], atol=1e-5), 'short clips'
    assert torch.allclose(tube.scene[0], vectors, atol=1e-5), 'inside the backbone'
    assert torch.allclose(feature_maps(net, CLIPS), expected, atol=1e-5), 'heat maps'


def test_grey_is_grey(fed):
    net,stats = fed
    ends = [grey_out(torch.full_like(CLIPS, value), torch.zeros(2, 2).bool(), net) for value in (127, 128)]
    grey = grey_out(CLIPS, torch.ones(2, 2).bool(), net)
    assert torch.allclose(grey, sum(ends)/2, atol=1e-6) and (stats == 'imagenet' or not grey.any())
    with torch.no_grad(): assert torch.allclose(grey_reference(net, CLIPS.shape[1:]), net.features(grey[:1])[0], atol=1e-5)


@pytest.fixture(scope='module')
def theirs(tmp_path_factory):
    "Random weights under the names of `model_rgb.pth`"
    path = tmp_path_factory.mktemp('weights')/'model_rgb.pth'
    torch.save({map_key(key, 'hassony2'): value for key,value in load_backbone('random')[0].state_dict().items()
                if not key.endswith('num_batches_tracked')}, path)
    return path


def test_the_weights_decide(theirs, tmp_path):
    assert [pick_stats('auto', weights) for weights in ('', 'random', theirs)] == ['unit', 'unit', 'imagenet']
    assert pick_stats('unit', theirs) == 'unit'
    net,loaded = load_backbone(str(theirs))
    assert (net.stats, loaded['stats'], loaded['name']) == ('imagenet', 'imagenet', 'model_rgb (hassony2), ImageNet statistics')
    with pytest.raises(ValueError, match='clip.stats must be one of auto, unit, imagenet'): validate(make_config('finediving', 'smoke', clip__stats='kinetics'))


def test_names_tell_them_apart():
    cfg = make_config('finediving', 'smoke', weights='random')
    dive,other = Sample('01/1', 'train', '407c', 88., 3.2),override(cfg, clip__stats='imagenet')
    assert (encoder_suffix(cfg), encoder_suffix(override(cfg, clip__stats='unit')), encoder_suffix(other)) == ('', '', '-imagenet')
    keys = [feature_key(dive, c, None, feature_extractor(c, torch.device('cpu'))[1], 'f') for c in (cfg, override(cfg, clip__stats='unit'), other)]
    assert keys[0] == keys[1] != keys[2]
    assert record_name(dive, cfg, None) == record_name(dive, other, None), 'kept frames are the same bytes'
    assert len({run_id(override(cfg, clip__stats=stats)) for stats in ('auto', 'unit', 'imagenet')}) == 3
    assert run_id(make_config('finediving', 'demo', model__standardise='off')) == 'fspn-w_dn-frozen-s0-aee2d7bc', 'the name that such a run has always had'


def normalize_otherwise(clips, stats='unit'): return clips.float()/255


def test_code_that_normalises_is_part_of_the_key(monkeypatch):
    from fspn_nb.models import backbone
    cfg = make_config('finediving', 'smoke', weights='random')
    before = feature_extractor(cfg, torch.device('cpu'))[1]
    monkeypatch.setattr(backbone, 'normalize_clip', normalize_otherwise)
    assert feature_extractor(cfg, torch.device('cpu'))[1].startswith(before+'-')


def test_a_run_says_what_its_backbone_was_fed(theirs, tmp_path):
    cfg = make_config('finediving', 'smoke', synthetic__n_train=6, synthetic__n_test=4, weights=str(theirs), clip__size=32, clip__frames=16,
                      clip__starts=(0,), model__clips=1, model__name='i3d_mlp', train__backbone='finetune')
    data = prepare(cfg, 'cpu')
    assert data.backbone.stats == data.provenance['weights']['stats'] == data.provenance['inputs']['stats'] == 'imagenet'
    assert data.provenance['weights']['name'] == 'model_rgb (hassony2), ImageNet statistics'
    plain = read_inputs(override(cfg, clip__stats='unit'))
    assert 'stats' not in plain.record, 'as in runs from before the setting existed'
    write_json(tmp_path/'old'/'provenance.json', dict(inputs=plain.record))
    with pytest.raises(ValueError, match='got others: statistics of the input'): check_inputs(tmp_path/'old', data.inputs)
