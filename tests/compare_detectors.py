"Writes reports/actor/detectors.csv and examples.csv: python tests/compare_detectors.py (about five minutes; real frames and weights as in conftest)"
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np
import pandas as pd
import torch
from PIL import Image
from conftest import ROOT, shared_root

from fspn_nb.actor.detectors import get_detector
from fspn_nb.actor.track import video_boxes,write_detectors
from fspn_nb.core import write_atomic
from fspn_nb.protocols import SPORTS
from fspn_nb.synthetic.dive_render import demo_dive,synth_dive
from fspn_nb.synthetic.sport_render import synth_act


def real_films():
    "The annotated frames, one film per dive"
    folder = shared_root()/'data'/'actor_frames'
    read = lambda f: np.asarray(Image.open(folder/'images'/f).convert('RGB'))
    return [(np.stack([read(f) for f in g.image]),g[['x1','y1','x2','y2']].to_numpy(),1) for _,g in pd.read_csv(folder/'boxes.csv').groupby('dive')]


def made_films():
    "Dives and acts with seeds of their own"
    dives = [(dive.frames,dive.boxes,1) for dive in map(synth_dive, range(100, 108))]
    acts = []
    for sport in SPORTS:
        if sport == 'diving': continue
        acts += [(act.frames,act.boxes,2 if sport.startswith('sync') else 1) for act in (synth_act(seed, sport) for seed in (50,51))]
    return dict(dives=dives, acts=acts)


def write_examples(path, detector):
    "The network's boxes on the two films that the notebook shows"
    rows = []
    for name,film,actors in (('dive',demo_dive(),1),('pair',synth_act(50, 'sync_diving_10m'),2)):
        boxes,_ = video_boxes(film.frames, detector, actors)
        rows += [(name,i,*b) for i,b in enumerate(boxes.round(1).tolist())]
    write_atomic(path, pd.DataFrame(rows, columns=['film','frame','x1','y1','x2','y2']).to_csv(index=False))


if __name__ == '__main__':
    torch.set_num_threads(1)
    torch.manual_seed(0)
    out,random = ROOT/'reports'/'actor','ssd300 (random weights)'
    onnx = get_detector('onnx', str(shared_root()/'weights'/'yolox_nano.onnx'))
    detectors = {'onnx (yolox_nano)':onnx, 'motion':get_detector('motion'), 'whole frame':None, random:get_detector('ssd300', None)}
    write_examples(out/'examples.csv', onnx)
    print(write_detectors(out, {'real':real_films(), **made_films()}, detectors, timed=(random,)))
