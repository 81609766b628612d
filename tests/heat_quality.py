"""Which heat map may be believed: agreement with occlusion, deletion and insertion, share in the actor's box, injected faults (no test; minutes to hours)

Trains FSPN on a synthetic FineDiving release and asks several maps about its test dives. One row of the CSV: a measure of a map in a stream, its mean over
dives with a 95 % bootstrap interval, and its mean gain over an order by chance or a flat map. Cost of a dive on one core: 16 squares x K clips for occlusion
(21 s per stream at 112 pixels), 6 x K clips for the curves of one map (8 s).

    python tests/heat_quality.py --release 1 --train 130 --test 150 --dives 6 --pairs 16
"""
import argparse
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from fspn_nb.config import make_config
from fspn_nb.core import write_atomic
from fspn_nb.data.clips import to_clips,resize_crop
from fspn_nb.actor.crop import crop_actor
from fspn_nb.escaping import csv_text
from fspn_nb.evaluate import load_model
from fspn_nb.inspect.attention import extract_maps,shown_frames
from fspn_nb.inspect.fault_pairs import cell_weights,fault_mask,draw_pair,pair_videos,plan_pairs
from fspn_nb.inspect.fault_study import heat_gain
from fspn_nb.inspect.gradcam import MAP_METHODS,HeadOnMaps,exemplars_of,grey_reference,map_agreement,shuffled,split_backbone
from fspn_nb.inspect.heat import cell_centres,heat_in_box
from fspn_nb.inspect.map_quality import curve_areas,deletion_insertion,occlusion
from fspn_nb.inspect.reference_maps import mean_reference,on_squares
from fspn_nb.metrics import bootstrap_ci
from fspn_nb.models.backbone import load_backbone
from fspn_nb.models.i3d import fuse_conv_bn
from fspn_nb.train import fit
from fspn_nb.training.prepare import prepare

MAPS = [(method, layer, reference) for layer, methods in (('Mixed_5c', ('gradcam', 'layercam')), ('Mixed_4f', ('gradcam', 'hirescam', 'layercam')))
        for method in methods for reference in ('zero', 'grey', 'mean')]
CURVES = [('gradcam', 'Mixed_5c', 'zero'), ('gradcam', 'Mixed_5c', 'grey'), ('hirescam', 'Mixed_4f', 'grey'), ('layercam', 'Mixed_5c', 'grey'),
          ('occlusion', 'pixels', 'grey'), ('chance', 'pixels', '')]
SHARES = (.1, .3, .6)


def clips_of(data, i):
    "Clips of both streams of dive `i`, its frames and boxes"
    (frames, boxes), c = shown_frames(data, i), data.cfg.clip
    shown = dict(scene=resize_crop(frames, c.size, c.orientation), actor=crop_actor(frames, boxes, c.size, data.cfg.actor.pad))
    return {s: to_clips(x, c.starts, c.length).transpose(1, 2).contiguous() for s, x in shown.items()}, frames, boxes


def references(backbone, data, n):
    "(layer, name) to what heat is counted from: nothing, a grey clip, the mean of `n` training dives"
    shape, out = (3, data.cfg.clip.length, *[data.cfg.clip.size]*2), {}
    rows = data.splits['train'][np.linspace(0, len(data.splits['train'])-1, n).astype(int)]
    for layer in ('Mixed_5c', 'Mixed_4f'):
        out[layer, 'zero'] = None
        out[layer, 'grey'] = dict.fromkeys(('scene', 'actor'), grey_reference(backbone, shape, layer))
        out[layer, 'mean'] = mean_reference(backbone, (clips_of(data, i)[0] for i in rows), layer)
    return out


def all_maps(model, exemplar, backbone, maps, given):
    "Signed maps of every kind, `maps` by layer"
    return {kind: MAP_METHODS[kind[0]](HeadOnMaps(model, exemplar=exemplar, reference=given[kind[1:]], above=split_backbone(backbone, kind[1])[1]),
                                       maps[kind[1]], relu=False) for kind in MAPS}


def ask_dives(model, backbone, data, given, rows, rng):
    "One record per dive, map, stream and measure"
    for i in rows:
        clips, frames, boxes = clips_of(data, i)
        seen = {layer: extract_maps(backbone, frames, boxes, data.cfg.clip, data.cfg.actor.pad, layer) for layer in ('Mixed_5c', 'Mixed_4f')}
        exemplar = exemplars_of(model, data, int(i), data.cfg.eval.num_exemplars)
        chain, made = HeadOnMaps(model, exemplar=exemplar), all_maps(model, exemplar, backbone, {k: v[0] for k, v in seen.items()}, given)
        truth = occlusion(chain, backbone, clips)
        size = data.cfg.clip.size
        squares = {kind: {s: on_squares(m, 4, cell_centres(size, kind[1])/size) for s, m in value.items()} for kind, value in made.items()}
        for kind, value in squares.items():
            for s, rho in map_agreement(value, truth).items(): yield dict(dive=i, map=kind, stream=s, measure='agreement with occlusion', value=rho, floor=0.)
            geometry = seen[kind[1]][1]
            for s, m in geometry.project(made[kind]).items():
                flat = geometry.project({s: torch.ones_like(made[kind][s])})[s]
                yield dict(dive=i, map=kind, stream=s, measure='share in the box', value=heat_in_box(m, boxes), floor=heat_in_box(flat, boxes))
        squares |= {CURVES[-2]: truth, CURVES[-1]: {'scene': torch.from_numpy(rng.permutation(truth['scene'].numel())).view_as(truth['scene']).float()}}
        areas = {kind: curve_areas(deletion_insertion(chain, backbone, clips, 'scene', squares[kind]['scene'], SHARES)) for kind in CURVES}
        for kind, value in areas.items():
            for name, area in value.items(): yield dict(dive=i, map=kind, stream='scene', measure=name, value=area, floor=areas[CURVES[-1]][name])
        print(f'dive {i}: {time.process_time():.0f} s', flush=True)


def ask_faults(networks, backbone, data, given, plans):
    "One record per pair, network, map, stream and measure: what the map of lost heat has above a flat one"
    row, clip, pad = {uid: i for i, uid in enumerate(data.labels.uid)}, data.cfg.clip, data.cfg.actor.pad
    for plan in plans:
        pair = draw_pair(plan)
        mask, films = fault_mask(pair, pair.ids(clip.frames)), pair_videos(pair, clip.frames)
        seen = {layer: [extract_maps(backbone, film.frames, film.boxes, clip, pad, layer) for film in films] for layer in ('Mixed_5c', 'Mixed_4f')}
        cells = {layer: cell_weights(value[1][1], (lambda m: (len(m), *m.shape[2:]))(value[1][0]['scene']), mask) for layer, value in seen.items()}
        for name, network in networks.items():
            exemplar = exemplars_of(network, data, row[plan.uid], data.cfg.eval.num_exemplars)
            clean, faulty = (all_maps(network, exemplar, backbone, {k: v[j][0] for k, v in seen.items()}, given) for j in (0, 1))
            for kind in MAPS:
                for s in clean[kind]:
                    gain = heat_gain(clean[kind][s]-faulty[kind][s], cells[kind[1]][s])
                    for what, value in gain.items():
                        yield dict(dive=plan.uid, map=kind, stream=s, measure=f'lost heat on the {what} of the fault, {name}', value=value, floor=0.)
        print(f'pair {plan.uid}: {time.process_time():.0f} s', flush=True)


def summary(records):
    "Means over dives with intervals"
    rows, mean = [], lambda a, b: float(np.mean(np.subtract(a, b)))
    for (kind, stream, measure), g in pd.DataFrame(records).groupby(['map', 'stream', 'measure'], sort=False):
        g = g[g.value.notna()]
        if not len(g): continue
        low, high = bootstrap_ci(mean, g.value, g.floor) if len(g) > 1 and (g.value != g.floor).any() else (np.nan, np.nan)
        rows.append(dict(zip(('method', 'layer', 'reference'), kind))|dict(stream=stream, measure=measure, n=len(g), mean=g.value.mean(), gain=mean(g.value, g.floor), lo=low, hi=high))
    return pd.DataFrame(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (('release', 1), ('train', 130), ('test', 150), ('dives', 6), ('pairs', 16), ('references', 6)): parser.add_argument(f'--{name}', type=int, default=value)
    parser.add_argument('--method', default='fspn')
    parser.add_argument('--runs', default='reports/runs/heat_quality')
    parser.add_argument('--out', default='reports/benchmarks/heat_methods.csv')
    args = parser.parse_args()
    torch.set_num_threads(1)
    cfg = make_config('finediving', 'demo', synthetic__seed=args.release, synthetic__n_train=args.train, synthetic__n_test=args.test, model__name=args.method)
    data = prepare(cfg, 'cpu')
    model = load_model(fit(cfg, args.runs, data=data), data).eval()
    backbone = fuse_conv_bn(load_backbone(cfg.weights)[0])
    given, test = references(backbone, data, args.references), data.splits['test']
    records = list(ask_dives(model, backbone, data, given, test[np.linspace(0, len(test)-1, args.dives).astype(int)], np.random.default_rng(0)))
    records += ask_faults(dict(trained=model, shuffled=shuffled(model)), backbone, data, given, plan_pairs(args.train, args.test, args.release)[:args.pairs])
    table = summary(records).assign(network=args.method, release=args.release)
    write_atomic(Path(args.out), csv_text(table, float_format='%.5g'))
    print(table.round(3).to_string())


if __name__ == '__main__': main()
