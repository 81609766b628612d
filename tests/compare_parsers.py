"""Compares teachers of the steps under one budget, and writes reports/benchmarks/parsers.csv

    python tests/compare_parsers.py [--release SEED] [--seeds 0,1,2] [--only TEXT] [--out reports/benchmarks/parsers.csv]

One linear classifier of clip vectors (`OrderedSegments`) is trained for as many steps as a demo run has, with different teachers: the best ordered
segmentation of its own log probabilities (Viterbi, what FSPN-Viterbi does), optimal transport with a temporal prior (TOT, CVPR 2022), fused
Gromov-Wasserstein transport (ASOT, CVPR 2024), equal parts for ever, and with other warm-ups. All are decoded by Viterbi. Change points
(`ruptures`, which is no dependency: pip install ruptures) need no training. Then FSPN-Viterbi as a whole beside
variants of it: one judge for all steps, steps that see each other, gradients of the score into the cuts. Settings are chosen on the release of
seed 1; the published runs are of seed 0. Features are computed once (about ten minutes) and kept.
"""
import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from fspn_nb.analysis.parse_quality import constant_cuts,training_cuts
from fspn_nb.batches.exemplars import group_of
from fspn_nb.config import make_config,override
from fspn_nb.core import seed_all
from fspn_nb.evaluate import parsing_table,predictions
from fspn_nb.metrics import relative_l2,spearman,temporal_iou
from fspn_nb.models.backbone import one_thread
from fspn_nb.models.encoder import EncoderOutput
from fspn_nb.models.fspn import FSPN,ScoreRegressor
from fspn_nb.models.heads import ScoreBins
from fspn_nb.models.iap import pooled_tokens
from fspn_nb.models.ordered_segments import OrderedSegments,frame_weights
from fspn_nb.models.step_scores import FSPNViterbi,SegmentEncoder,SegmentParser,_step_regressor
from fspn_nb.training.loop import make_optimiser,make_schedule,steps_per_epoch,train_epoch
from fspn_nb.training.prefetch import load_batches
from fspn_nb.training.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]
PAIRS = 16 # videos and exemplars of a training step of the demo preset


def sinkhorn_labels(log_probs, epsilon, strength, width=.15, iterations=10):
    "Soft labels of TOT: all frames of a batch are transported to steps of equal size, near their place in time"
    b,frames,steps = log_probs.shape
    place = ((torch.arange(frames)+.5)/frames)[:,None]-(torch.arange(steps)+.5)/steps
    gain = ((log_probs-strength*place**2/(2*width**2))/epsilon).double().flatten(0, 1)
    kernel,rows = (gain-gain.amax(1, keepdim=True)).exp(),b*frames
    columns = torch.ones(steps, dtype=torch.float64)
    for _ in range(iterations): columns = rows/steps/(kernel.T @ (1/(kernel @ columns)))
    plan = kernel*columns
    return (plan/plan.sum(1, keepdim=True)).float().view(b, frames, steps)


def transport_labels(logits, alpha, balance, epsilon=.07, order=.2, radius=.04, iterations=25):
    "Soft labels of ASOT: each video by itself, neighbours in time belong together, sizes of the steps are free at a price"
    b,frames,steps = logits.shape
    place = (((torch.arange(frames)+.5)/frames)[:,None]-(torch.arange(steps)+.5)/steps).abs().double()
    cost = 1-logits.double().softmax(-1)+order*place
    reach = max(1, int(radius*frames))
    gap = (torch.arange(frames)[:,None]-torch.arange(frames)).abs()
    near,other = ((gap > 0) & (gap <= reach)).double()/reach,1-torch.eye(steps, dtype=torch.float64)
    plan = torch.full((b,frames,steps), 1/steps, dtype=torch.float64) # each row sums to 1
    for _ in range(iterations): # mirror descent
        sizes = (plan.mean(1, keepdim=True)*steps).clamp(min=1e-12)
        slope = alpha*near @ plan @ other+(1-alpha)*cost+balance*sizes.log()
        plan = plan*(-slope/epsilon).exp()
        plan = plan/plan.sum(-1, keepdim=True)
    return plan.float()


def load_vectors(data):
    "Clip vectors of all dives, (n,K,1024) for each stream"
    n = len(data.release.samples)
    plan = [(np.arange(k, min(k+32, n)), None) for k in range(0, n, 32)]
    batches = list(load_batches(data.source, data.labels, plan, data.device))
    return {name: torch.cat([getattr(batch, name) for batch in batches]) for name in ('actor','scene')}


def train_parser(data, vectors, seed, teacher='viterbi', warmup=.375, min_length=None, steps=None, stream='actor', **options):
    "An `OrderedSegments` after as many steps as the training of a method"
    torch.manual_seed(seed)
    train,epochs = torch.as_tensor(data.splits['train']),data.cfg.train.epochs
    total = steps or epochs*steps_per_epoch(data)
    parser = OrderedSegments(data.cfg.model.clips, warmup=warmup)
    parser.min_length = parser.min_length if min_length is None else min_length
    parser.on_train_start(total)
    optimiser = torch.optim.AdamW(parser.parameters(), data.cfg.train.lr, weight_decay=data.cfg.train.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, data.cfg.train.lr, total_steps=total)
    for step in range(total):
        rows = train[torch.randint(len(train), (2*PAIRS,))]
        logits = parser(vectors[stream][rows])
        soft = teacher in ('tot','asot') and step >= warmup*total
        if soft:
            log_probs = logits.detach().log_softmax(-1)
            target = sinkhorn_labels(log_probs, **options) if teacher == 'tot' else transport_labels(logits.detach(), **options)
            loss = -(target*logits.log_softmax(-1)).sum(-1).mean()
        else: loss = parser.loss(logits)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return parser.eval()


def parser_cuts(data, vectors, seed, ids, **settings):
    "The cuts that a trained parser makes in the dives `ids`"
    parser = train_parser(data, vectors, seed, **settings)
    with torch.no_grad(): return parser.segment(parser(vectors[settings.get('stream', 'actor')][ids])).numpy()


def change_points(data, vectors, ids, kernel):
    "Two change points of each dive, from its own frames alone; the same for all seeds"
    import ruptures
    weights = frame_weights(data.cfg.model.clips)
    frames = (weights @ F.layer_norm(vectors['actor'][ids], (1024,))).numpy()
    return np.array([ruptures.KernelCPD(kernel=kernel, min_size=16).fit(video).predict(n_bkps=2)[:-1] for video in frames])


CASES = {
    'Viterbi (FSPN-Viterbi)': {},
    'equal parts for ever': dict(warmup=1.),
    'Viterbi, the scene in place of the actor': dict(stream='scene'),
    **{f'Viterbi, warm-up {share:.0%}': dict(warmup=share) for share in (.05, .125, .25, .5, .75)},
    'Viterbi, steps of any length': dict(min_length=1),
    'Viterbi, 4 times the steps': dict(steps=640),
    'Viterbi, 4 times the steps, of any length': dict(steps=640, min_length=1),
    **{f'TOT, epsilon {e}, prior {s}': dict(teacher='tot', epsilon=e, strength=s) for e in (.05, .1, .3) for s in (.1, 1.)},
    **{f'ASOT, alpha {a}, balance {b}': dict(teacher='asot', alpha=a, balance=b) for a in (.3, .6) for b in (.05, .2)},
    'change points, linear kernel': dict(kernel='linear'),
    'change points, rbf kernel': dict(kernel='rbf')}


class WholeEncoder(SegmentEncoder):
    "Transformer and fusion see all steps at once; `by_step`: one feature a step all the same"
    def __init__(self, cfg, by_step=False):
        super().__init__(cfg)
        self.by_step = by_step
        if not by_step: self.dim = self.fusion.dim

    def forward(self, scene, actor=None):
        tokens,logits = self.parser(scene if actor is None else actor, scene)
        fused = self.fusion.fused_map(*tokens.chunk(2)) # (B,S*n,D)
        if not self.by_step: return EncoderOutput(self.fusion.pool(fused), {'logits': logits})
        return EncoderOutput(self.fusion.pool(fused.unflatten(1, (self.steps, -1)).flatten(0, 1)).unflatten(0, (-1, self.steps)).flatten(1), {'logits': logits})


class OpenParser(SegmentParser):
    "Gradients of the score reach the classifier of the steps"
    def forward(self, actor, scene):
        logits = self.segments.weights @ self.segments.classify(self.segments.norm(actor))
        frames = self.segments.weights @ self.project(torch.cat([actor, scene]))
        return pooled_tokens(frames, logits.softmax(-1).repeat(2, 1, 1), self.per_step)+self.pos_embed,logits


def open_method(cfg, bins):
    model = FSPNViterbi(cfg, bins)
    model.encoder.parser.__class__ = OpenParser
    return model


def whole_method(cfg, bins, by_step=False, intervals=True):
    "FSPN-Viterbi with one judge for all steps, or with steps that see each other"
    regressor = _step_regressor if by_step else ScoreRegressor
    model = FSPN(replace(cfg, use_bce=intervals), bins, partial(WholeEncoder, by_step=by_step), regressor)
    model.on_train_start = model.encoder.parser.segments.on_train_start
    return model


METHODS_COMPARED = {
    'FSPN-Viterbi': FSPNViterbi,
    'one judge for all steps': whole_method,
    'one judge, no intervals': partial(whole_method, intervals=False),
    'steps see each other': partial(whole_method, by_step=True),
    'gradients of the score into the cuts': open_method}


def train_method(data, seed, build):
    "rho, R x100 and temporal IoU of a method on the test dives, after a training of the demo preset"
    data = replace(data, cfg=override(data.cfg, seed=seed, model__name='fspn_viterbi'))
    seed_all(seed)
    rows = torch.as_tensor(data.splits['train'])
    groups = [group_of(data.release.samples[i], data.variant) for i in rows]
    model = build(data.cfg.model, ScoreBins.fit_pairs(data.labels.label[rows].tolist(), groups, data.cfg.model.num_bins))
    steps = data.cfg.train.epochs*steps_per_epoch(data)
    model.on_train_start(steps)
    optimiser = make_optimiser(model, data.cfg)
    schedule = make_schedule(optimiser, data.cfg, steps)
    for epoch in range(data.cfg.train.epochs): train_epoch(model, data, optimiser, schedule, epoch)
    table,extras = predictions(model.eval(), data, 'test')
    true = table.true.to_numpy()
    return dict(rho=spearman(table.pred.to_numpy(), true), r_l2_x100=100*relative_l2(table.pred.to_numpy(), true, true.min(), true.max()),
                tiou=float(parsing_table(table, extras, data).tiou.mean()))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--release', type=int, default=1, help='seed of the synthetic release')
    p.add_argument('--seeds', default='0,1,2')
    p.add_argument('--only', default='', help='cases whose name holds this text')
    p.add_argument('--out', default=str(ROOT/'reports'/'benchmarks'/'parsers.csv'))
    a = p.parse_args()
    data = prepare(make_config('finediving', 'demo', synthetic__seed=a.release, synthetic__n_test=150), 'cpu')
    vectors,ids = load_vectors(data),torch.as_tensor(data.splits['test'])
    true = data.labels.transitions[ids].numpy()[:,[0,-1]]
    overlap = lambda cuts: float(temporal_iou(cuts[:,[0,-1]], true).mean())
    constant = constant_cuts(training_cuts(data))
    rows = [dict(case=f'the same cuts for all, {constant}, by true cuts', release=a.release, seed='', tiou=overlap(np.broadcast_to(constant, true.shape)))]
    for name,settings in CASES.items():
        if a.only not in name: continue
        for seed in [''] if 'kernel' in settings else a.seeds.split(','):
            start = time.process_time()
            cuts = change_points(data, vectors, ids, **settings) if seed == '' else parser_cuts(data, vectors, int(seed), ids, **settings)
            rows.append(dict(case=name, release=a.release, seed=seed, tiou=overlap(cuts), cpu_seconds=time.process_time()-start))
            print(f"{name:45} seed {seed or '-'} {rows[-1]['tiou']:.3f}", flush=True)
    for name,build in METHODS_COMPARED.items():
        if a.only not in name: continue
        for seed in a.seeds.split(','):
            start = time.process_time()
            rows.append(dict(case=f'whole method: {name}', release=a.release, seed=seed, **train_method(data, int(seed), build), cpu_seconds=time.process_time()-start))
            print(f"{name:45} seed {seed} rho {rows[-1]['rho']:.3f} {rows[-1]['tiou']:.3f}", flush=True)
    pd.DataFrame(rows).to_csv(a.out, index=False, float_format='%.4f')
    print(pd.DataFrame(rows).groupby('case', sort=False)[['tiou','rho','r_l2_x100']].mean().round(3).to_string())


if __name__ == '__main__':
    with one_thread(): main()
