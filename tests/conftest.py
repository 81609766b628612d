"What the tests share: where real material may lie, and what is asked of several readers and of every method"
import os
import pickle
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def shared_root():
    "The folder with real annotations, frames and weights: FSPN_SHARED, or `shared` beside the checkout"
    return Path(os.environ.get('FSPN_SHARED') or ROOT.parent/'shared')


@pytest.fixture(scope='session')
def shared():
    "A function that returns a path below the real material, or skips and says what was not there"
    def find(*parts):
        path = shared_root().joinpath(*parts)
        if not path.exists(): pytest.skip(f'real material absent: {"/".join(parts)} (set FSPN_SHARED to the folder that holds it)')
        return path
    return find


def as_trained(*args, **changes):
    "A configuration (`make_config`) with the epochs and the learning rate that run notebooks give its method"
    from fspn_nb.config import make_config,method_schedule
    return method_schedule(make_config(*args, **changes))


def edit_pickle(path, change):
    "Replace the content of one annotation pickle by `change(content)` (None: changed in place)"
    from fspn_nb.data.safe_pickle import load_pickle
    value = load_pickle(path)
    new = change(value)
    path.write_bytes(pickle.dumps(value if new is None else new, protocol=3))


def weights_carry_everything(a, b, batch, path):
    "Model `b` with the saved weights of `a` says what `a` says"
    torch.save(a.eval().state_dict(), path)
    b.eval().load_state_dict(torch.load(path, weights_only=True))
    with torch.no_grad(): assert torch.equal(a(batch).prediction, b(batch).prediction)


def bf16_is_close(model, batch):
    "Under autocast the score stays a float32 within five points, and the losses stay what they are"
    with torch.no_grad():
        full = model.eval()(batch)
        with torch.autocast('cpu', torch.bfloat16): half = model(batch)
    assert half.prediction.dtype == torch.float32 and (half.prediction-full.prediction).abs().max() < 5
    assert all(torch.isclose(half.losses[k], v, rtol=.15, atol=.02) for k, v in full.losses.items())


def trains_on_one(model, one):
    "A batch of a single dive trains"
    out = model.train()(one)
    assert out.prediction.shape == (1,) and out.total_loss.isfinite()


def film(corner, colour, n=20):
    "A black film (n,64,64,3) with a bright corner"
    frames = torch.zeros(n, 64, 64, 3, dtype=torch.uint8)
    y, x = dict(tl=(0, 0), tr=(0, 48), bl=(48, 0), br=(48, 48))[corner]
    frames[:, y:y+16, x:x+16, colour] = 255
    return frames
