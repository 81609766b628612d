"Frames, clips, crops and actor boxes: edge cases, and real frames where they are at hand"
import io
import os
import struct
import time
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from fspn_nb.actor.box_table import read_boxes
from fspn_nb.actor.crop import actor_boxes,crop_actor,smooth_boxes,square_box
from fspn_nb.data.clips import clip_starts,decode_picture,frame_ids,load_frames,read_picture,resize_crop,to_clips
from fspn_nb.data.records import Sample


@pytest.fixture
def dive(tmp_path):
    "Six small frames on disk, each of one grey"
    for i in range(6): Image.fromarray(np.full((36, 64, 3), 40*i, np.uint8)).save(tmp_path/f'{i+100:05d}.jpg', quality=95)
    return Sample('v/1', 'train', '107B', 80., folder=tmp_path, files=tuple(f'{i+100:05d}.jpg' for i in range(6)))


@pytest.mark.parametrize('n', [1, 2, 63, 95, 96, 97, 150, 273])
@pytest.mark.parametrize('keep', [96, 103])
def test_frame_ids(n, keep):
    ids = frame_ids(n, keep)
    assert len(ids) == keep and ids[0] == 0 and (keep == 1 or ids[-1] == n-1)
    assert (np.diff(ids) >= 0).all() and (n < keep or (np.diff(ids) > 0).all()) and ids.dtype.kind == 'i'
    assert (n > keep) or set(ids) == set(range(n)) # a short dive loses no frame


def test_frame_ids_as_tsa_counts_them(shared):
    "On the real annotations, spacing from 0 and spacing broadcast numbers differ in 11 dives"
    from fspn_nb.data.finediving import read_finediving
    dives = read_finediving(None, shared('data', 'finediving', 'Annotations'))
    apart = [(frame_ids(s.n_frames) != frame_ids(s.n_frames, first=s.start_frame)).sum() for s in dives]
    assert np.count_nonzero(apart) == 11 and max(apart) == 3


def test_to_clips_of_tensors_and_arrays():
    for frames in (torch.arange(96*4).view(96, 2, 2), np.arange(96*4).reshape(96, 2, 2)):
        clips = to_clips(frames, clip_starts('finediving'))
        assert clips.shape == (9, 16, 2, 2) and (clips[3] == frames[30:46]).all()
    assert to_clips(np.arange(103), clip_starts('mtl_aqa')).shape == (10, 16)
    for starts,length in (([-1], 16), ([81], 16), ([0], 97)):
        with pytest.raises(ValueError, match='inside 96 frames'): to_clips(np.arange(96), starts, length)


def test_load_frames_values_order_and_layout(dive):
    frames = load_frames(dive, [5, 0, 0, 3])
    assert frames.shape == (4, 36, 64, 3) and frames.dtype == torch.uint8
    assert [abs(int(frame.float().mean())-v) <= 2 for frame,v in zip(frames, (200, 0, 0, 120))] == [True]*4


def test_each_file_is_read_once(dive, monkeypatch):
    from fspn_nb.data import clips
    seen,real = [],clips.read_picture
    monkeypatch.setattr(clips, 'read_picture', lambda path: (seen.append(path.name), real(path))[1])
    load_frames(dive, frame_ids(6))
    assert sorted(seen) == list(dive.files)


def test_grey_jpeg_becomes_rgb(dive):
    Image.fromarray(np.full((36, 64), 77, np.uint8)).save(dive.folder/dive.files[0])
    assert load_frames(dive, [0]).shape == (1, 36, 64, 3)


@pytest.mark.parametrize('data', [b'', b'\xff\xd8\xff', b'hello', b'\x89PNG\r\n\x1a\n'+bytes(50)])
def test_not_a_jpeg(dive, data):
    (dive.folder/dive.files[2]).write_bytes(data)
    with pytest.raises(ValueError, match=rf'dive v/1: .*{dive.files[2]}'): load_frames(dive, [0, 2])
    assert len(load_frames(dive, [0, 1])) == 2


def test_cut_jpeg(dive):
    "Half a JPEG is an error or a frame, never a crash, and the error has the file's name"
    path = dive.folder/dive.files[2]
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(ValueError, match=dive.files[2]): load_frames(dive, [2])


# ---- one rule for pictures

def encoded(image, kind='JPEG', **options):
    "A picture file as bytes"
    image.save(out := io.BytesIO(), kind, **options)
    return out.getvalue()


def exif(orientation, thumbnail=b''):
    "EXIF data with an orientation and, if given, a small preview picture in front of the real one"
    data = Image.Exif()
    data[0x0112] = orientation
    return data.tobytes()+thumbnail


def wide_png(array):
    "A PNG with 16 bits for each of three colours, which Pillow cannot write"
    h,w = array.shape[:2]
    chunk = lambda kind, body: struct.pack('>I', len(body))+kind+body+struct.pack('>I', zlib.crc32(kind+body))
    rows = b''.join(b'\0'+row.astype('>u2').tobytes() for row in array.reshape(h, -1).astype(np.uint16)*257)
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16, 2, 0, 0, 0))+chunk(b'IDAT', zlib.compress(rows))+chunk(b'IEND', b'')


_y,_x = np.mgrid[:48, :64]
PLAIN = np.stack([(_x*3+40).astype(np.uint8), (_y*4+20).astype(np.uint8), ((_x+_y)*2).astype(np.uint8)], -1) # no symmetry
IMAGE,GREY = Image.fromarray(PLAIN),Image.fromarray(PLAIN[..., 0])
TURN = {2:'FLIP_LEFT_RIGHT', 3:'ROTATE_180', 4:'FLIP_TOP_BOTTOM', 5:'TRANSPOSE', 6:'ROTATE_90', 7:'TRANSVERSE', 8:'ROTATE_270'} # how to store it


def pictures():
    "{name: (file content, the picture that has to come out, largest difference)}: all can be read"
    grey,jpeg = PLAIN[..., :1].repeat(3, 2),encoded(IMAGE, quality=95)
    alpha = IMAGE.convert('RGBA')
    alpha.putalpha(GREY)
    deep = encoded(Image.fromarray(PLAIN[..., 0].astype(np.uint16)*257), 'PNG')
    files = {'jpeg':(jpeg, PLAIN, 16), 'progressive':(encoded(IMAGE, progressive=True, quality=95), PLAIN, 16), 'grey jpeg':(encoded(GREY, quality=95), grey, 8),
             'cmyk':(encoded(IMAGE.convert('CMYK'), quality=95), PLAIN, 16), 'icc 3 kB':(encoded(IMAGE, quality=95, icc_profile=bytes(3000)), PLAIN, 16),
             'icc 200 kB':(encoded(IMAGE, quality=95, icc_profile=bytes(200_000)), PLAIN, 16), 'thumbnail':(encoded(IMAGE, quality=95, exif=exif(1, jpeg[:900]+jpeg[-2:])), PLAIN, 16),
             'zeros behind':(jpeg+bytes(2000), PLAIN, 16), 'many zeros behind':(jpeg+bytes(9000), PLAIN, 16), 'text behind':(jpeg+b'made by a phone'*300, PLAIN, 16),
             'second picture behind':(jpeg+encoded(GREY), PLAIN, 16), 'comment':(encoded(IMAGE, quality=95, comment=b'\xff\xd9'*3), PLAIN, 16),
             'png':(encoded(IMAGE, 'PNG'), PLAIN, 0), 'grey png':(encoded(GREY, 'PNG'), grey, 0), '16 bits':(deep, grey, 0), '16 bits, colour':(wide_png(PLAIN), PLAIN, 0),
             'palette':(encoded(GREY.convert('P'), 'PNG'), grey, 0), 'rgba':(encoded(alpha, 'PNG'), PLAIN, 0), 'grey with alpha':(encoded(GREY.convert('LA'), 'PNG'), grey, 0),
             'webp':(encoded(IMAGE, 'WEBP', lossless=True), PLAIN, 0)}
    for n,turn in TURN.items():
        stored = IMAGE.transpose(Image.Transpose[turn])
        files[f'exif {n}'] = encoded(stored, quality=95, exif=exif(n)),PLAIN,16
        files[f'png exif {n}'] = encoded(stored, 'PNG', exif=exif(n)),PLAIN,0
        files[f'webp exif {n}'] = encoded(stored, 'WEBP', lossless=True, exif=exif(n)),PLAIN,0
    return files


def no_pictures():
    "{name: file content}: none can be read"
    jpeg,png,webp = (encoded(IMAGE, kind) for kind in ('JPEG','PNG','WEBP'))
    preview = encoded(IMAGE, exif=exif(1, jpeg))
    giant,broken = bytearray(jpeg),bytearray(jpeg)
    at = giant.index(b'\xff\xc0')
    giant[at+5:at+9] = b'\xff'*4
    at = broken.index(b'\xff\xc4')+5
    broken[at:at+16] = bytes([255]*16)
    return {'empty':b'', 'web page':b'<html>please log in</html>', 'half':jpeg[:len(jpeg)//2], 'two bytes short':jpeg[:-2], 'one byte short':jpeg[:-1], 'half and zeros':jpeg[:len(jpeg)//2]+bytes(2000),
            'header only':jpeg[:jpeg.index(b'\xff\xda')], 'header and end':jpeg[:jpeg.index(b'\xff\xda')]+jpeg[-2:], 'up to the preview':preview[:preview.index(b'\xff\xd9')+2],
            'zeros only':bytes(5000), 'giant':bytes(giant), 'broken table':bytes(broken), 'half a png':png[:len(png)//2], 'half a webp':webp[:len(webp)//2], 'png header':png[:40],
            'gif':encoded(IMAGE, 'GIF'), 'bmp':encoded(IMAGE, 'BMP'), 'tiff':encoded(IMAGE, 'TIFF'), 'pickle':b'\x80\x04]\x94.',
            'animation':encoded(IMAGE, 'WEBP', save_all=True, append_images=[GREY.convert('RGB')]*3)}


@pytest.mark.parametrize('name', pictures())
def test_one_rule_for_pictures(tmp_path, name):
    "Whatever the file is called, a run and `score_clip` see the same upright RGB"
    from fspn_nb.inspect.clip import read_clip
    data,picture,tolerance = pictures()[name]
    for i in range(16): (tmp_path/f'{i}.jpg').write_bytes(data)
    frames = load_frames(Sample('v/1', 'train', '', 0., folder=tmp_path, files=('0.jpg',)), [0])[0]
    assert frames.dtype == torch.uint8 and frames.shape == (48, 64, 3)
    assert np.abs(frames.numpy().astype(int)-picture).max() <= tolerance
    assert (read_clip(tmp_path).frames[0] == frames.numpy()).all()
    assert torch.equal(decode_picture(data), frames)


@pytest.mark.parametrize('name', no_pictures())
def test_what_is_no_picture_is_refused_by_name(tmp_path, name):
    data = no_pictures()[name]
    (tmp_path/'00070.jpg').write_bytes(data)
    with pytest.raises(ValueError, match=rf'00070.jpg: need a picture .JPEG, PNG or WebP., got {len(data)} bytes.*; get the file again$') as e: read_picture(tmp_path/'00070.jpg')
    assert ' at 0x' not in str(e.value) and '\n' not in str(e.value)


def test_a_pipe_and_a_vast_file_do_not_block_a_run(tmp_path):
    os.mkfifo(tmp_path/'0.jpg')
    with open(tmp_path/'1.jpg', 'wb') as file: file.truncate(2**26)
    start = time.perf_counter()
    for name in ('0.jpg','1.jpg','.','2.jpg'):
        with pytest.raises(ValueError, match='need the frame'): read_picture(tmp_path/name)
    assert time.perf_counter()-start < 5


def test_real_frames_are_what_pillow_reads(shared):
    "No released frame carries an orientation, so the rule changes no published number"
    files = sorted(shared('data', 'finediving').glob('**/*.jpg'))[::50]
    assert len(files) > 20
    for path in files:
        with Image.open(path) as image:
            assert image.getexif().get(0x0112, 1) == 1 and (np.asarray(image.convert('RGB')) == read_picture(path).numpy()).all()


def test_vanished_and_odd_sizes(dive):
    (dive.folder/dive.files[1]).unlink()
    with pytest.raises(ValueError, match=rf'{dive.files[1]}.*FileNotFoundError'): load_frames(dive, [1])
    Image.fromarray(np.zeros((30, 64, 3), np.uint8)).save(dive.folder/dive.files[4])
    with pytest.raises(ValueError, match=dive.files[4]): load_frames(dive, [3, 4])
    for ids in ([-1], [6]):
        with pytest.raises(ValueError, match='positions 0..5'): load_frames(dive, ids)
    with pytest.raises(ValueError, match='v/2 has no frames'): load_frames(Sample('v/2', 'train', '', 0.), [0])


@pytest.mark.parametrize('hw', [(144, 256), (256, 455), (256, 256), (112, 112), (455, 256), (20, 30)])
@pytest.mark.parametrize('size', [112, 224])
def test_squares(hw, size):
    frames = torch.zeros(2, *hw, 3, dtype=torch.uint8)
    for orientation in ('correct', 'peer'):
        for where in (0, .5, 1): assert resize_crop(frames, size, orientation, where).shape == (2, 3, size, size)


def test_resize_is_what_pillow_does():
    "The peers resize with Pillow; one grey level of rounding apart"
    rng = np.random.default_rng(0)
    frame = np.asarray(Image.fromarray(rng.integers(0, 256, (40, 70, 3), np.uint8)).resize((455, 256), Image.BICUBIC))
    wide = np.asarray(Image.fromarray(frame).resize((199, 112), Image.BILINEAR)).astype(int)[:, 44:156]
    ours = resize_crop(torch.from_numpy(frame.copy())[None])[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(wide-ours).max() <= 2
    tall = np.asarray(Image.fromarray(frame).resize((112, 200), Image.BILINEAR)).astype(int)[44:156]
    ours = resize_crop(torch.from_numpy(frame.copy())[None], orientation='peer')[0].permute(1, 2, 0).numpy().astype(int)
    assert np.abs(tall-ours).max() <= 2


def test_circle_stays_round_only_when_correct():
    y,x = np.mgrid[:256, :455]
    disc = (((x-227)**2+(y-128)**2) < 50**2).astype(np.uint8)[..., None].repeat(3, 2)*255
    def extent(orientation):
        on = resize_crop(torch.from_numpy(disc)[None], orientation=orientation)[0, 0] > 127
        return on.any(0).sum().item(),on.any(1).sum().item()
    wide,high = extent('correct')
    assert abs(wide-high) <= 1
    wide,high = extent('peer')
    assert high > 3*wide


def boxes_file(tmp_path, text):
    (tmp_path/'b.csv').write_text(text)
    return tmp_path/'b.csv'


HEAD = 'uid,frame,x1,y1,x2,y2\n'


@pytest.mark.parametrize('text,match', [
    ('', 'CSV'), ('uid,frame,x1,y1,x2\n', 'none named y2'), ('a;b\n1;2\n', 'none named uid'),
    (HEAD+'a,0,5,5,5,9\n', 'x1 < x2'), (HEAD+'a,0,5,9,8,9\n', 'x1 < x2'), (HEAD+'a,0,1,2,3,nan\n', 'line 2'),
    (HEAD+'a,0,1,2,3,4\na,1,1,x,3,4\n', 'line 3'), (HEAD+'a,0,1,2,inf,4\n', 'finite'), (HEAD+',0,1,2,3,4\n', 'a name'),
    (HEAD+'a,1,1,2,3,4\n', 'got 1 where 0'), (HEAD+'a,0,1,2,3,4\na,0.5,1,2,3,4\n', 'got 0.5 where 1')])
def test_bad_tables(tmp_path, text, match):
    with pytest.raises(ValueError, match=match) as e: read_boxes(boxes_file(tmp_path, text))
    assert 'b.csv' in str(e.value)


def test_good_tables(tmp_path):
    assert read_boxes(boxes_file(tmp_path, HEAD)) == {}
    table = read_boxes(boxes_file(tmp_path, 'note,x1,y1,x2,y2,uid,frame\nq,-5,0,10,300,007,1\nq,0,0,1,1,007,0\nq,0,0,1,1,8,0\n'))
    assert list(table) == ['007','8'] and table['007'].tolist() == [[0,0,1,1],[-5,0,10,300]]


def test_boxes_of_a_dive(dive):
    table = {'v/1': np.tile([0., 0., 10., 20.], (6, 1))}
    assert actor_boxes(dive, 'boxes', table).shape == (6, 4) and actor_boxes(dive, 'none', table) is None
    with pytest.raises(ValueError, match='v/1'): actor_boxes(dive, 'truth', {})
    with pytest.raises(ValueError, match='need 6 boxes'): actor_boxes(dive, 'boxes', {'v/1': table['v/1'][:5]})
    with pytest.raises(ValueError, match='oracle'): actor_boxes(dive, 'oracle', table)


def test_smoothing_keeps_the_mean_and_a_single_box():
    rng = np.random.default_rng(0)
    b = np.tile([0., 0., 50., 80.], (200, 1))+rng.normal(0, 3, (200, 4))
    s = smooth_boxes(b)
    assert s.std(0).max() < b.std(0).min()/1.5 and np.abs(s.mean(0)-b.mean(0)).max() < .5
    assert np.allclose(smooth_boxes(b[:1]), b[:1])


def test_square_of_wide_and_tall():
    assert np.allclose(square_box([[0, 0, 40, 10], [0, 0, 10, 40]], .25), [[-10, -25, 50, 35], [-25, -10, 35, 50]])


@pytest.mark.parametrize('box', [[-50, -50, -10, -10], [1000, 1000, 1100, 1100], [-500, -500, 900, 900], [10, 10, 10.5, 10.5]])
def test_crops_far_out_huge_and_tiny(box):
    frames = torch.randint(0, 256, (3, 36, 64, 3), dtype=torch.uint8)
    out = crop_actor(frames, [box]*3, size=32)
    assert out.shape == (3, 3, 32, 32) and out.dtype == torch.uint8


def test_crop_of_the_whole_square_is_a_resize():
    frames = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)
    assert torch.equal(crop_actor(frames, [[0, 0, 64, 64]], size=64, pad=0), frames.permute(0, 3, 1, 2))
    grey = torch.full((1, 36, 64, 3), 93, dtype=torch.uint8)
    assert (crop_actor(grey, [[-9, -9, 80, 50]], size=48) == 93).all()


def test_every_frame_uses_its_own_box():
    frames = torch.zeros(2, 40, 40, 3, dtype=torch.uint8)
    frames[:, :20, :20] = 200
    out = crop_actor(frames, [[2, 2, 18, 18], [22, 22, 38, 38]], size=16, pad=0)
    assert (out[0] == 200).all() and (out[1] == 0).all()


def test_real_boxes_hold_the_diver(shared):
    "Boxes that people drew around a real diver, smoothed and cut: every crop has something in it"
    from torchvision.io import decode_jpeg,read_file
    table = pd.read_csv(shared('data', 'actor_frames', 'boxes.csv'))
    table = table[table.dive == 0]
    folder = shared('data', 'actor_frames', 'images')
    frames = torch.stack([decode_jpeg(read_file(str(folder/name))).permute(1, 2, 0) for name in table.image])
    boxes = smooth_boxes(table[['x1','y1','x2','y2']].to_numpy())
    out = crop_actor(frames, boxes)
    assert out.shape == (len(table), 3, 112, 112)
    side = square_box(boxes)
    assert ((side[:, 2]-side[:, 0]) > 50).all() and out.float().std() > 20
