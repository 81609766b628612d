"Heat maps: the long way equals the short one, known corners, real footage, and pictures that come out the same twice"
import sys

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from conftest import film

from fspn_nb.actor.crop import crop_actor,square_box
from fspn_nb.config import ClipCfg,ModelCfg
from fspn_nb.core import Batch
from fspn_nb.data.clips import resize_crop
from fspn_nb.inspect.heat import (box_shares,cell_centres,crop_window,heat_in_box,on_frames,paste,pick_failures,
    plot_failures,plot_heat,share_summary,video_heat)
from fspn_nb.models.encoder import EncoderOutput
from fspn_nb.models.fspn import FSPN
from fspn_nb.models.heads import ScoreBins
from fspn_nb.models.i3d import I3D,fuse_conv_bn,normalize_clip
from fspn_nb.report.figures import save_figure
from fspn_nb.zoo import create_model

captum = pytest.importorskip('captum', reason="Captum is not installed (pip install 'fspn_nb[gradcam]')")
from fspn_nb.inspect.gradcam import (MAP_METHODS,HeadOnMaps,feature_maps,grad_cam,grey_reference,heat,layer_cam,map_agreement,  # noqa: E402
    shuffled,split_backbone)
from fspn_nb.inspect.map_quality import curve_areas,deletion_insertion,grey_out,occlusion  # noqa: E402
from fspn_nb.inspect.reference_maps import column_strength,mean_reference,mirror_agreement,on_squares  # noqa: E402


def head(**changes):
    torch.manual_seed(1)
    cfg = ModelCfg(stages=1, clips=3, **changes)
    bins = ScoreBins.fit_pairs(range(0, 101, 5)) if cfg.pairing == 'exemplar' else ScoreBins.fit_labels(range(0, 101, 5))
    return FSPN(cfg, bins).eval()


def maps(k=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {s: torch.randn(k, 1024, 2, 3, 3, generator=g).relu() for s in ('scene', 'actor')}


def votes(model, m=4):
    return torch.randn(m, model.encoder.fusion.dim, generator=torch.Generator().manual_seed(2)), torch.linspace(40, 80, m)


def same(a, b, eps=1e-4):
    return (a-b).abs().max() <= eps*b.abs().max() and b.abs().max() > 0


class Eye(nn.Module):
    "Three channels: brightness of red, green and blue in cells of 8 x 8 pixels and 8 frames"
    def features(self, x): return F.avg_pool3d(x.relu(), 8)


class Red(nn.Module):
    "Likes red in the scene, and green in the actor's crop"
    uses_exemplar, needs = False, ('scene', 'actor')

    def encode(self, batch): return EncoderOutput(torch.cat([batch.scene[..., :1], batch.actor[..., 1:2]], -1).mean(1), {})

    def score(self, feature): return 10*feature[..., 0]+20*feature[..., 1]


CASES = {'pairs': {}, 'absolute': dict(pairing='absolute'), 'no bce': dict(use_bce=False), 'no parser': dict(use_iap=False, use_gc=False),
         'no transformer': dict(use_smt=False), 'scene alone': dict(use_actor=False), 'expected': dict(decoding='expected')}


@pytest.mark.parametrize('changes', CASES.values(), ids=CASES)
@pytest.mark.parametrize('decode', ['expected', 'own'])
def test_captum_agrees_with_the_derivative_of_the_mean(changes, decode):
    model = head(**changes)
    chain = HeadOnMaps(model, exemplar=votes(model) if model.uses_exemplar else None, decode=decode)
    m = maps()
    got = grad_cam(chain, m, relu=False)
    assert list(got) == list(model.needs)
    means = [m[s].mean((2, 3, 4), keepdim=True).requires_grad_() for s in chain.maps]
    for s, g in zip(chain.maps, torch.autograd.grad(chain(*means), means)):
        assert same(got[s], (m[s]*g).sum(1)/18), s


def test_question_leaves_the_model_alone():
    model = head()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    m = maps()
    kept = {s: value.clone() for s, value in m.items()}
    grad_cam(HeadOnMaps(model.train(), exemplar=votes(model)), m)
    assert model.training and model.regressor.decoding == 'argmax' and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and all(torch.equal(m[s], kept[s]) for s in m)


def test_own_decoding_is_what_prediction_says():
    model = head()
    feature, label = votes(model)
    m = maps()
    vectors = {s: value.mean((2, 3, 4))[None] for s, value in m.items()}
    with torch.no_grad(): want = model.score(model.encode(Batch(**vectors)).feature[:, None], feature[None], label[None]).mean()
    assert torch.allclose(HeadOnMaps(model, exemplar=(feature, label), decode='own')(*m.values())[0], want, atol=1e-3)


def test_actor_and_scene_are_parsed_apart():
    model, a, b = head(), maps(seed=0), maps(seed=1)
    mixed = dict(scene=a['scene'], actor=b['actor'])
    one, two = (grad_cam(HeadOnMaps(model, ('sub_action', 1)), item, relu=False) for item in (a, mixed))
    assert same(one['scene'], two['scene']) and not same(one['actor'], two['actor'])


@pytest.mark.parametrize('model, why', [(lambda: head(use_iap=False, use_gc=False), 'need a head with a parser'), (lambda: create_model('i3d_mlp').eval(), 'need a head with a parser')])
def test_sub_action_needs_a_parser(model, why):
    with pytest.raises(ValueError, match=why): grad_cam(HeadOnMaps(model(), ('sub_action', 0)), maps())


@pytest.mark.parametrize('target', ['verdict', ('score', 1), ('sub_action',), (), 1, None])
def test_unknown_question(target):
    with pytest.raises(ValueError, match='target is'): HeadOnMaps(head(), target)


def test_unknown_decoding():
    with pytest.raises(ValueError, match="decode is 'expected' or 'own'"): HeadOnMaps(head(), decode='argmax')


def backbone():
    "Random I3D whose activations do not die out on the way"
    torch.manual_seed(0)
    net = I3D().eval()
    for m in net.modules():
        if isinstance(m, nn.Conv3d): nn.init.kaiming_normal_(m.weight, nonlinearity='relu')
    return net


class Whole(nn.Module):
    def __init__(self, net, model, exemplar):
        super().__init__()
        self.net, self.model, self.exemplar = net, model, exemplar

    def forward(self, scene, actor):
        v = [item[None] for item in self.net.features(torch.cat([scene, actor])).mean((2, 3, 4)).chunk(2)]
        feature, label = self.exemplar
        return self.model.score(self.model.encode(Batch(*v)).feature[:, None], feature[None], label[None]).mean()[None]


@pytest.mark.parametrize('ask, layer, shape', [(dict(method='gradcam', layer='Mixed_5c'), 'Mixed_5c', (2, 2, 2)), (dict(), 'Mixed_4f', (4, 4, 4))], ids=['Grad-CAM', 'as said nothing'])
def test_hook_inside_the_whole_network_gives_the_same(ask, layer, shape):
    "Captum's Grad-CAM; and for HiResCAM its gradient times activation, summed over channels"
    net, model = backbone(), head(decoding='expected')
    scene, actor = torch.randint(0, 256, (2, 3, 3, 16, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    method = captum.attr.LayerGradCam if ask else captum.attr.LayerGradientXActivation
    whole = method(Whole(net, model, votes(model)), getattr(net, layer)).attribute((normalize_clip(scene), normalize_clip(actor)))
    want = whole.sum(1).detach().chunk(2) # Grad-CAM has one channel
    for folded in (False, True):
        got = heat(fuse_conv_bn(net) if folded else net, model, scene, actor, exemplar=votes(model), relu=False, batch=2, reference=None, **ask)
        assert got['scene'].shape == (3, *shape)
        for s, w in zip(('scene', 'actor'), want): assert same(got[s], w, 1e-3), (s, folded)


def test_batches_do_not_matter():
    net, clips = backbone(), torch.randint(0, 256, (5, 3, 16, 32, 32), dtype=torch.uint8)
    assert same(feature_maps(net, clips, 2), feature_maps(net, clips, 5))


CLIP = ClipCfg(frames=20, starts=(0, 4), size=64)


@pytest.mark.parametrize('corner', ['tl', 'tr', 'bl', 'br'])
def test_heat_sits_in_the_corner_that_the_score_depends_on(corner):
    frames = film(corner, 0)+film('tr' if corner != 'tr' else 'bl', 2)
    made = video_heat(Eye().eval(), Red(), frames, clip=CLIP)
    y, x = dict(tl=(0, 0), tr=(0, 48), bl=(48, 0), br=(48, 48))[corner]
    box = np.array([[x-4, y-4, x+20, y+20]]*20)
    shares = box_shares(made, box.clip(0, 64))
    assert shares['scene'] > .95 and shares['scene_floor'] < .11 and shares['scene_best'] > .9 and np.isnan(shares['actor'])


def test_actor_heat_lands_on_the_actor():
    frames, box = film('br', 1), np.array([[44., 44., 64., 64.]]*20)
    shares = box_shares(video_heat(Eye().eval(), Red(), frames, box, CLIP, pad=.5), box)
    assert shares['actor'] > .8 and shares['actor_floor'] < .6 and np.isnan(shares['scene'])


def test_box_outside_the_window_has_no_best_cell():
    made = video_heat(Eye().eval(), Red(), F.pad(film('tl', 0), (0, 0, 0, 64)), clip=CLIP)
    shares = box_shares(made, np.array([[0., 0., 20., 20.]]*20))
    assert shares['scene_floor'] == 0 and np.isnan(shares['scene_best'])


def test_heat_lands_at_the_time():
    "Red for the last eight of 32 frames only"
    frames = film('tl', 0, n=32)
    frames[:24] = 0
    made = video_heat(Eye().eval(), Red(), frames, clip=ClipCfg(frames=32, starts=(0, 16), size=64))['heat']['scene']
    assert made[:24].sum() == 0 and made[24:].sum((1, 2)).min() > 0


def test_every_frame_is_the_mean_of_its_clips():
    rng = torch.Generator().manual_seed(0)
    clips, starts = torch.rand(10, 2, 4, 4, generator=rng), (*range(0, 81, 10), 86)
    got = on_frames(clips, starts, 103)
    for t in range(103):
        cover = [clips[k, (t-s)*2//16] for k, s in enumerate(starts) if s <= t < s+16]
        assert torch.allclose(got[t], torch.stack(cover).mean(0) if cover else torch.zeros(4, 4))
    assert got[102].sum() == 0


@pytest.mark.parametrize('h, w', [(144, 256), (256, 144), (90, 91)])
@pytest.mark.parametrize('orientation', ['correct', 'peer'])
def test_scene_goes_there_and_back(h, w, orientation):
    frames = torch.zeros(1, h, w, 3, dtype=torch.uint8)
    y, x = h//2, w//2
    frames[:, y-10:y, x-12:x+4] = 255
    back = paste(resize_crop(frames, 112, orientation)[:, 0]/255, crop_window(h, w, 112, orientation), h, w)
    assert heat_in_box(back, [[x-13, y-11, x+5, y+1]]) > .97


@pytest.mark.parametrize('size, n', [(112, 4), (224, 7), (64, 2), (96, 3), (128, 4), (80, 3)])
def test_cells_are_where_the_layers_look(size, n):
    "Pooling alone, with I3D's padding: the middle of the pixels that reach a cell away from the border"
    from fspn_nb.models.i3d import same_pad
    pixels = [[i] for i in range(size)]
    for k, s in [(u.stride*3+1 if u.stride > 1 else 0, u.stride) for u in [I3D().Conv3d_1a_7x7]]+[(p.kernel[2], p.stride[2]) for p in I3D().modules()
                                                                             if type(p).__name__ == 'SamePool' and p.stride[2] > 1]:
        front = same_pad((len(pixels),), (k,), (s,))[0][0]
        pixels = [sum((pixels[j] for j in range(i*s-front, i*s-front+k) if 0 <= j < len(pixels)), []) for i in range(-(-len(pixels)//s))]
    got = cell_centres(size)
    assert len(got) == len(pixels) == n and np.allclose(np.diff(got), 32)
    for i in range(n):
        lo, hi = min(pixels[i]), max(pixels[i])
        if lo > 0 and hi < size-1: assert got[i] == (lo+hi+1)/2
        else: assert lo <= got[i] <= max(hi+1, size+16)


@pytest.mark.parametrize('box', [(60, 50, 160, 120), (-20, -10, 40, 60), (200, 100, 250, 143), (100, 90, 104, 93)])
def test_actor_goes_there_and_back(box):
    boxes = np.array([box], float)
    frames = torch.zeros(1, 144, 256, 3, dtype=torch.uint8)
    x1, y1, x2, y2 = np.clip(box, 0, [255, 143]*2)
    frames[:, y1:y2, x1:x2] = 255
    back = paste(crop_actor(frames, boxes)[:, 0]/255, square_box(boxes), 144, 256)
    assert heat_in_box(back, [[x1-1, y1-1, x2+1, y2+1]]) > .9


def test_share_counts_parts_of_pixels_and_is_bounded():
    flat = torch.ones(3, 12, 20)
    for x in np.linspace(0, 10, 7): assert np.isclose(heat_in_box(flat, [[x, 3.25, x+5.5, 9.5]]*3), 5.5*6.25/240)
    assert np.isclose(heat_in_box(flat, [[-50, -50, 500, 500]]*3), 1) and heat_in_box(flat, [[30, 0, 40, 9]]*3) == 0
    assert np.isnan(heat_in_box(torch.zeros(3, 12, 20), [[0, 0, 5, 5]]*3))


def test_weights_matter_and_seeds_count():
    model, m = head(), maps()
    ask = lambda net: grad_cam(HeadOnMaps(net, exemplar=votes(model)), m, relu=False)
    own, other, third = ask(model), ask(shuffled(model)), ask(shuffled(model, 1))
    assert map_agreement(own, ask(model)) == dict(scene=1, actor=1)
    for s in own: assert abs(map_agreement(own, other)[s]) < .5 and not torch.equal(other[s], third[s])
    assert np.isnan(map_agreement(own, {s: torch.zeros_like(value) for s, value in own.items()})['scene'])


def test_trained_network_finds_real_divers(shared):
    "Real frames with real boxes: what makes them diving lies on the diver more than chance, and goes with the weights"
    from fspn_nb.models.i3d import load_kinetics
    from PIL import Image, ImageSequence
    from torchvision.models.video import R3D_18_Weights
    gif = Image.open(shared('data', 'diving_sample.gif'))
    frames = torch.from_numpy(np.stack([np.asarray(entry.convert('RGB')) for entry in ImageSequence.Iterator(gif)]))
    net = I3D().eval()
    try: load_kinetics(net)
    except FileNotFoundError as e: pytest.skip(str(e))

    class Names(nn.Module):
        uses_exemplar, needs = False, ('scene',)

        def __init__(self):
            super().__init__()
            at = R3D_18_Weights.KINETICS400_V1.meta['categories'].index('springboard diving')
            self.fc = nn.Linear(1024, 1)
            self.fc.weight.data = net.Logits.weight[[at]].data.flatten(1)

        def encode(self, batch): return EncoderOutput(batch.scene.mean(1), {})

        def score(self, feature): return self.fc(feature)[..., 0]

    k = max(1, (len(frames)-16)//10+1)
    clips = torch.stack([resize_crop(frames[10*i:10*i+16]).transpose(0, 1) for i in range(min(k, 5))])
    own, broken = (heat(fuse_conv_bn(item), Names(), clips, relu=False) for item in (net, shuffled(net)))
    assert (own['scene'] > 0).any() and map_agreement(own, broken)['scene'] < .7


def table():
    return pd.DataFrame(dict(uid=list('abcdef'), true=60., pred=[61, 80, 45, 62, 60, 75], in_box=[.3, .4, .2, .05, np.nan, .1]), index=[7]*6)


def test_failures_by_rule():
    assert pick_failures(table(), 4).uid.tolist() == ['b', 'f', 'd', 'c'], 'no heat at all is not the least heat'
    assert pick_failures(table().sample(frac=1, random_state=0), 4).equals(pick_failures(table(), 4))
    assert pick_failures(table(), 1).why.tolist() == ['largest error'] and len(pick_failures(table(), 6)) == 6
    for n in (0, 7):
        with pytest.raises(ValueError, match='need 1..6 failures'): pick_failures(table(), n)


def test_summary_without_heat():
    t = pd.DataFrame(dict(scene=[np.nan]*3, scene_floor=[.1]*3, scene_best=[.4]*3))
    got = share_summary(t).loc['scene']
    assert got.n == 0 and got.cold == 3 and np.isnan(got.gain_lo)


def test_pictures_are_the_same_twice(tmp_path):
    frames, box = film('tl', 0).numpy(), np.array([[2., 2., 14., 14.]]*20)
    made = video_heat(Eye().eval(), Red(), torch.from_numpy(frames), box, CLIP)['heat']
    picks = pick_failures(table(), 2)
    videos = {u: (frames, made['scene'], box) for u in picks.uid}
    draw = [lambda: plot_heat(frames, made, box, (1, 18), 'real', 'a note'), lambda: plot_failures(picks, videos, 'synthetic')]
    for i, f in enumerate(draw):
        a, b = ([item.read_bytes() for item in save_figure(f(), tmp_path/f'{i}{j}', pdf=True)] for j in 'ab')
        assert a == b
    plt.close('all')


def test_heat_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, 'captum.attr', None)
    with pytest.raises(ImportError, match=r"pip install 'fspn_nb\[gradcam\]'"): grad_cam(HeadOnMaps(Red()), maps())


# ---- what heat is counted from

class Names(nn.Module):
    "Kinetics' own last layer as a judge of the scene"
    uses_exemplar, needs = False, ('scene',)

    def __init__(self, net, name):
        super().__init__()
        from torchvision.models.video import R3D_18_Weights
        self.fc = nn.Linear(1024, 1)
        self.fc.weight.data = net.Logits.weight[[R3D_18_Weights.KINETICS400_V1.meta['categories'].index(name)]].data.flatten(1)

    def encode(self, batch): return EncoderOutput(batch.scene.mean(1), {})

    def score(self, feature): return self.fc(feature)[..., 0]


@pytest.fixture(scope='module')
def kinetics():
    "I3D with its weights, folded; a plain one, for the names of classes"
    from fspn_nb.models.backbone import load_backbone
    try: net = load_backbone()[0]
    except FileNotFoundError as e: pytest.skip(str(e))
    return fuse_conv_bn(net), net


def test_mirrored_video_has_mirrored_heat(kinetics):
    "Counted from zero the heat stays on the right edge; counted from grey it goes with the video"
    from fspn_nb.data.clips import frame_ids, to_clips
    from fspn_nb.synthetic.dive_render import demo_dive
    net, plain = kinetics
    demo = demo_dive()
    frames = resize_crop(torch.from_numpy(demo.frames[frame_ids(len(demo.frames))]))
    clips = to_clips(frames, (20, 60)).transpose(1, 2)
    grey = grey_reference(net, clips.shape[1:])
    strength = [column_strength(feature_maps(net, x)) for x in (torch.zeros(1, *clips.shape[1:]), clips, clips.flip(-1))]
    assert all(row[3] > 3*row[0] for row in strength), 'the border on the right, whatever the video'
    zero, corrected = (np.mean([mirror_agreement(net, Names(plain, name), clips, ref) for name in ('springboard diving', 'yoga', 'surfing water')]) for ref in (None, grey))
    assert corrected > zero+.2 and corrected > .2, (zero, corrected)
    assert np.mean([mirror_agreement(net, Names(plain, name), clips, grey_reference(net, clips.shape[1:], 'Mixed_4f'), 'Mixed_4f') for name in ('springboard diving', 'yoga')]) > .4


def test_grey_video_has_no_heat():
    net = backbone()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm3d): nn.init.uniform_(m.bias, 0, .1) # an untrained network shows nothing on grey
    model, grey = head(use_actor=False), torch.full((3, 3, 16, 64, 64), 0.)
    ask = dict(exemplar=votes(model), relu=False)
    for layer in ('Mixed_5c', 'Mixed_4f'):
        for method in MAP_METHODS:
            hot, cold = (heat(net, model, grey, layer=layer, method=method, reference=r, **ask)['scene'] for r in (None, 'grey'))
            assert hot.abs().max() > 0 and cold.abs().max() <= 1e-4*hot.abs().max(), (layer, method)


def test_reference_leaves_the_score_alone():
    model, m = head(), maps()
    plain, based = (HeadOnMaps(model, exemplar=votes(model), reference=r) for r in (None, {s: v[1] for s, v in m.items()}))
    assert torch.allclose(plain(*m.values()), based(*m.values()), atol=1e-3)
    a, b = (grad_cam(item, m, relu=False) for item in (plain, based))
    for s in m:
        assert b[s][1].abs().max() <= 1e-5*a[s].abs().max(), 'a clip that is the reference has no heat'
        assert not same(b[s], a[s], .01)


def test_mean_reference_counts_clips_not_videos():
    net = backbone()
    a, b = (torch.randint(0, 256, (k, 3, 16, 32, 32), dtype=torch.uint8) for k in (3, 1))
    got = mean_reference(net, [dict(scene=a), dict(scene=b)], 'Mixed_4f')['scene']
    assert same(got, feature_maps(net, torch.cat([a, b]), layer='Mixed_4f').mean(0))


def test_layer_cam_by_hand():
    "Two channels, two cells, another gradient in each: 2 and -1 times the head's 1 and 2, half of it for the mean"
    class Above(nn.Module):
        def forward(self, m): return m*torch.tensor([2., -1.])

    class Sum(nn.Module):
        uses_exemplar, needs = False, ('scene',)
        def encode(self, batch): return EncoderOutput(batch.scene.mean(1), {})
        def score(self, feature): return feature@torch.tensor([1., 2.])
    chain, m = HeadOnMaps(Sum(), above=Above()), dict(scene=torch.tensor([[3., 4.], [5., 6.]]).view(1, 2, 1, 1, 2))
    assert torch.allclose(layer_cam(chain, m)['scene'].flatten(), torch.tensor([13., 0.]))
    assert torch.allclose(grad_cam(chain, m)['scene'].flatten(), torch.tensor([3.25, 4.]))


@pytest.mark.parametrize('layer', ['Mixed_4b', 'Mixed_4f', 'Mixed_5b'])
def test_cutting_the_backbone_changes_nothing(layer):
    net, x = backbone(), torch.rand(1, 3, 16, 32, 32)*2-1
    below, above = split_backbone(net, layer)
    with torch.no_grad(): assert torch.equal(above(below(x)), net.features(x))


def test_unknown_layer_and_method():
    with pytest.raises(ValueError, match="need a layer of I3D, got 'Mixed_9z'"): split_backbone(backbone(), 'Mixed_9z')
    with pytest.raises(ValueError, match='method is one of gradcam, hirescam, layercam'): heat(Eye().eval(), Red(), *[torch.zeros(1, 3, 16, 32, 32)]*2, method='cam')


# ---- how good a map is

@pytest.mark.parametrize('corner', ['tl', 'tr', 'bl', 'br'])
def test_occlusion_finds_a_known_place(corner):
    clips = film(corner, 0, n=16).permute(3, 0, 1, 2)[None].repeat(2, 1, 1, 1, 1)
    clips[0] = 0
    y, x = dict(tl=(0, 0), tr=(0, 3), bl=(3, 0), br=(3, 3))[corner]
    truth = occlusion(HeadOnMaps(Red()), Eye().eval(), dict(scene=clips, actor=torch.zeros_like(clips)))
    assert truth['scene'].nonzero().tolist() == [[1, 0, y, x]] and truth['actor'].abs().max() == 0
    assert torch.isclose(truth['scene'].max(), torch.tensor(10/32)) # ten points, half of the clips, a sixteenth of the cells


def test_right_order_falls_first():
    clips = film('tl', 0, n=16).permute(3, 0, 1, 2)[None].float()/255
    clips[:, 0, :, 32:, 32:] = .5
    given, chain = dict(scene=clips, actor=torch.zeros_like(clips)), HeadOnMaps(Red())
    truth = occlusion(chain, Eye().eval(), given)['scene']
    gap = {k: curve_areas(deletion_insertion(chain, Eye().eval(), given, 'scene', v))['gap'] for k, v in dict(right=truth, none=0*truth, wrong=-truth).items()}
    assert gap['right'] > gap['none'] > gap['wrong']
    curves = deletion_insertion(chain, Eye().eval(), given, 'scene', truth, shares=(.3,))
    assert np.allclose(curves['deletion'][[0, -1]], curves['insertion'][[-1, 0]]) and curves['deletion'][1] < curves['insertion'][1]


def test_grey_squares_cover_what_they_should():
    white = torch.ones(1, 3, 2, 30, 30)
    for n in (2, 4, 7):
        gone = torch.zeros(n, n).bool()
        gone[n-1, 0] = True
        y, x = (grey_out(white, gone)[0, 0, 0] == 0).nonzero().T
        assert y.max() == 29 and x.min() == 0 and y.min() >= 29-30//n and x.max() <= 30//n
    assert on_squares(torch.ones(2, 4, 7, 7), 4).shape == (2, 1, 4, 4)
