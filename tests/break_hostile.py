"""Input that somebody made to do harm: sizes, paths, names, code

Each case makes a small file and hands it to the library in a process of its own (pytest: one process for all quick cases, to import PyTorch once). It must be
refused in one sentence that names the limit, or be read as what it is; the process stays below 2 GB with all imports; nothing is started or connected to; nothing
is written outside of the case's folder; no control character reaches the screen.
"""
import csv
import html.parser
import importlib
import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from contextlib import redirect_stdout
from pathlib import Path

import hostile_files as make
from fault_cases import Absent,case,outcome

ATTACKS,READER,SECRET = {},make.Reader(),'the secret of another folder'
_RUNS = ('os.system', 'os.exec', 'os.posix_spawn', 'os.fork', 'os.forkpty', 'subprocess.Popen', 'pty.spawn', 'socket.connect', 'socket.getaddrinfo')


def hostile(stage, fault, need, result='refused', quick=True, seconds=60):
    "Register an attack: a function of an empty folder that returns what the user saw; `need`: what the sentence must hold"
    def register(attack):
        def run(folder):
            answer = READER.read(attack.__name__, folder, seconds)
            assert answer['peak'] < make.GIGABYTES, f"{answer['peak']/1e9:.2f} GB: {answer['message']}"
            assert not answer['events'], answer['events']
            assert not answer['error'], answer['error']
            assert re.search(need, answer['message']), f"{need!r} is not in {answer['message']!r}"
            return outcome(result, answer['message'])
        run.__name__ = attack.__name__
        ATTACKS[attack.__name__] = attack
        case(stage, f'hostile: {fault}', quick=quick, seconds=seconds+60)(run)
        return attack
    return register


def refusal(call, *args, **kwargs):
    "The sentence with which a call is refused"
    try: call(*args, **kwargs)
    except (ValueError, OSError) as e: return str(e)
    raise AssertionError('it was accepted')


def printed(call, *args, **kwargs):
    "What a call prints"
    with redirect_stdout(buffer := io.StringIO()): call(*args, **kwargs)
    return buffer.getvalue()


# ---- the process that reads

def _answer(name, place, events):
    "Run one attack in the folder `place`; what came out"
    inside,outside,here = (Path(place)/part for part in ('inside', 'outside', 'here'))
    for folder in (inside, outside, here): folder.mkdir(parents=True)
    (outside/'secret.txt').write_text(SECRET)
    os.chdir(here)
    events.update(found=[], inside=str(inside))
    make.forget_peak()
    began = time.process_time()
    error = message = ''
    try: message = ATTACKS[name](inside)
    except Absent: raise
    except Exception as e: error = f'{type(e).__name__}: {str(e)[:400]}'
    found,events['inside'] = events['found'],None
    if sorted(p.name for p in outside.iterdir()) != ['secret.txt'] or (outside/'secret.txt').read_text() != SECRET: found.append('outside was changed')
    if list(here.iterdir()): found.append(f'written: {list(here.iterdir())}')
    if not error and (len(message) > 2500 or not message.replace('\n', '').isprintable()): error = f'a message of {len(message)} characters: {message[:300]!r}'
    return dict(message=message[:2500], error=error, events=found, peak=make.peak_memory(), seconds=time.process_time()-began)


def _watch_events(events):
    "Note what a hostile file may not lead to: programs, connections, files outside of the case's folder"
    def look(event, args):
        inside = events.get('inside')
        if inside is None: return
        if event in _RUNS: events['found'].append(f'{event} {args!r}'[:200])
        if event == 'open' and isinstance(args[0], (str, bytes)):
            mode,flags = args[1] or '',args[2] or 0
            writes = set(mode) & set('wax+') or not mode and flags & (os.O_WRONLY|os.O_RDWR|os.O_CREAT)
            path = os.path.realpath(os.fsdecode(args[0]))
            if writes and not path.startswith((inside, '/dev/', '/proc/')): events['found'].append(f'written: {path}')
    sys.addaudithook(look)


def _read_forever():
    "Answer names of attacks on standard input until it is closed"
    for name in ('av', 'matplotlib.pyplot', 'onnxruntime', 'fspn_nb.evaluate', 'fspn_nb.inspect.clip'): importlib.import_module(name)
    tempfile.gettempdir()  # tries whether it can write there
    events = {}
    _watch_events(events)
    replies,sys.stdout = sys.stdout,sys.stderr
    print('ready', file=replies, flush=True)
    for line in sys.stdin: print(json.dumps(_answer(*json.loads(line), events)), file=replies, flush=True)


# ---- pictures

def release(folder, n=2, frames=lambda i: make.jpeg()):
    "The root of a FineDiving release of `n` dives; `frames` gives the content of frame i of dive (26, 1)"
    from test_formats import FINEDIVING_FRAMES,tree
    tree(folder/'fd', n)
    for i,path in enumerate(sorted((folder/'fd'/FINEDIVING_FRAMES/'26'/'1').iterdir())): path.write_bytes(frames(i))
    return folder/'fd'


def samples(root):
    from fspn_nb.data.finediving import read_finediving
    return read_finediving(root)


def one_picture(folder, data):
    from fspn_nb.data.clips import read_picture
    (folder/'00001.jpg').write_bytes(data)
    return refusal(read_picture, folder/'00001.jpg')


@hostile('reading', 'JPEG of 60,000 x 60,000', '60000 x 60000 pixels, more than')
def picture_jpeg(folder): return one_picture(folder, make.jpeg(60000, 60000))


@hostile('reading', 'PNG of 60,000 x 60,000', '60000 x 60000 pixels, more than')
def picture_png(folder): return one_picture(folder, make.png(60000, 60000, rows=100))


@hostile('reading', 'WebP of 60,000 x 60,000', '60000 x 60000 pixels, more than')
def picture_webp(folder): return one_picture(folder, make.webp(60000, 60000))


@hostile('reading', 'PNG with a profile of 1 GB', 'need a picture')
def picture_profile(folder):
    return one_picture(folder, make.png(8, 8, make.chunk(b'iCCP', b'x\0\0'+make.zeros(64)))[:-20])


@hostile('reading', 'PNG with 10,000 packed texts of 1 MB', 'need a picture')
def picture_texts(folder): return one_picture(folder, make.png(8, 8, make.chunk(b'zTXt', b'x\0\0'+zlib.compress(bytes(2**20-1), 9))*10000))


@hostile('reading', 'PNG animation of a million pictures', 'need a picture|animation')
def picture_animation(folder): return one_picture(folder, make.png(8, 8, make.chunk(b'acTL', struct.pack('>II', 10**6, 0))))


@hostile('reading', 'JPEG with 10,000 scans', 'scans')
def picture_scans(folder):
    from PIL import Image
    Image.new('RGB', (800, 800)).save(buffer := io.BytesIO(), 'JPEG', progressive=True)
    data = buffer.getvalue()
    at = data.rindex(b'\xff\xda')
    return one_picture(folder, data[:at]+data[at:-2]*10000+b'\xff\xd9')


@hostile('reading', 'a dive whose frames have 60,000 x 60,000 pixels', 'dive 26/1.*60000 x 60000 pixels, more than')
def dive_of_bombs(folder):
    from fspn_nb.data.clips import load_frames
    sample = samples(release(folder, frames=lambda i: make.jpeg(60000, 60000)))[0]
    return refusal(load_frames, sample, range(len(sample.files)))


@hostile('reading', '96 frames of 5,700 x 5,700, each of them allowed', 'dive 26/1.*pixels in all')
def dive_of_large_pictures(folder):
    from fspn_nb.data.clips import load_frames
    data = make.real_jpeg(5700, 5700)
    sample = samples(release(folder, frames=lambda i: data))[0]
    return refusal(load_frames, sample, range(96))


@hostile('reading', 'ten such pictures, decoded by ten threads of the check', 'frame sizes', 'named', False, 200)
def check_of_large_pictures(folder):
    from fspn_nb.data.check import check_release,summarize_findings
    data,root = make.png(5700, 5700),release(folder, 10)
    for dive in range(1, 11): next(iter((root/'FINADiving_MTL_256s'/'26'/str(dive)).iterdir())).write_bytes(data)
    return summarize_findings(check_release('finediving', root, decode=True, workers=10))[:1500]


@hostile('reading', 'a release of bombs, checked', 'unreadable.*60000 x 60000 pixels', result='named')
def check_of_bombs(folder):
    from fspn_nb.data.check import check_release
    kinds = (make.jpeg(60000, 60000), make.png(60000, 60000, rows=1), make.webp(60000, 60000))
    rows = check_release('finediving', release(folder, frames=lambda i: kinds[i % 3]), workers=16)
    return ' '.join(f'{row.kind} {row.detail}' for row in rows[rows.uid == '26/1'].itertuples())


# ---- clips and films

def clip(path):
    from fspn_nb.inspect.clip import read_clip
    return refusal(read_clip, path)


@hostile('clip page', 'folder of pictures of 60,000 x 60,000', '60000 x 60000 pixels, more than')
def clip_of_bombs(folder):
    for i in range(20): (folder/f'{i}.png').write_bytes(make.png(60000, 60000, rows=1))
    return clip(folder)


@hostile('clip page', 'GIF of 60,000 x 60,000', '60000 x 60000 pixels, more than')
def clip_gif_size(folder):
    (folder/'a.gif').write_bytes(make.gif(60000, 60000, 20))
    return clip(folder/'a.gif')


@hostile('clip page', 'GIF of a million pictures', 'at most 1000 frames')
def clip_gif_count(folder):
    (folder/'a.gif').write_bytes(make.gif(64, 48, 10**6))
    return clip(folder/'a.gif')


@hostile('clip page', 'PostScript that is called GIF', 'need a (picture|GIF)')
def clip_postscript(folder):
    (folder/'a.gif').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(' + str(folder.parent/'outside'/'pwned').encode()
                                 + b') (w) file closefile showpage\n%%EOF\n')
    return clip(folder/'a.gif')


@hostile('clip page', '130 pictures of 256 x 16,000', 'pixels in all')
def clip_wide(folder):
    data = make.real_jpeg(16000, 256)
    for i in range(130): (folder/f'{i}.jpg').write_bytes(data)
    return clip(folder)


@hostile('clip page', 'mp4 whose index lists 10^9 pictures', 'pictures')
def film_frames(folder):
    make.claim_frames(make.film(folder/'a.mp4'), 10**9)
    return clip(folder/'a.mp4')


@hostile('clip page', 'mp4 whose index lists 6 x 10^7 pictures', 'pictures')
def film_frames_below_the_limit_of_ffmpeg(folder):
    make.claim_frames(make.film(folder/'a.mp4'), 6*10**7)
    return clip(folder/'a.mp4')


@hostile('clip page', 'film of 10^9 seconds', 'at most 1000 frames|need')
def film_seconds(folder): return clip(make.packets(folder/'a.mkv', 'mjpeg', (8, 8), [make.jpeg()]*30, [0, *range(25*10**9, 25*10**9+29)]))


@hostile('clip page', 'film at 1,000,000 pictures a second', 'need')
def film_rate(folder): return clip(make.packets(folder/'a.mov', 'mjpeg', (8, 8), [make.jpeg()]*30, range(30), rate=10**6))


@hostile('clip page', 'film of 30,000 x 30,000', 'need a video|pixels')
def film_size(folder): return clip(make.packets(folder/'a.mkv', 'mjpeg', (64, 64), [make.jpeg(30000, 30000)]*30, range(30)))


@hostile('clip page', 'film of 16,000 x 16,000, which ffmpeg would decode', 'need a video|pixels')
def film_size_below_the_limit_of_ffmpeg(folder):
    return clip(make.packets(folder/'a.mkv', 'mjpeg', (64, 64), [make.jpeg(16000, 16000)]*30, range(30)))


@hostile('clip page', 'film whose pictures are PNG bombs', 'need a video|pixels')
def film_of_png(folder):
    return clip(make.packets(folder/'a.mov', 'png', (64, 64), [make.png(9000, 9000)]*20, range(20)))


def listening(use):
    "Call `use` with a port of this machine; an AssertionError where somebody connects to it"
    import socket
    with socket.create_server(('127.0.0.1', 0)) as server:
        server.settimeout(.2)
        message = use(server.getsockname()[1])
        try: server.accept()
        except TimeoutError: return message
    raise AssertionError('somebody connected')


@hostile('clip page', 'playlist that is called mp4: an address and a file outside', 'need a video')
def film_playlist(folder):
    make.film(folder/'other.ts')
    def use(port):
        (folder/'a.mp4').write_text(f'#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:1,\nhttp://127.0.0.1:{port}/a.ts\n#EXTINF:9,\nfile://{folder}/other.ts\n#EXT-X-ENDLIST\n')
        return clip(folder/'a.mp4')
    return listening(use)


@hostile('clip page', 'list of films (ffconcat) that is called mp4', 'need a video')
def film_concat(folder):
    make.film(folder/'other.mp4')
    (folder/'a.mp4').write_text(f'ffconcat version 1.0\nfile {folder}/other.mp4\n')
    return clip(folder/'a.mp4')


@hostile('clip page', 'SDP, which opens a connection, that is called mp4', 'need a video')
def film_connection(folder):
    (folder/'a.mp4').write_text('v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n')
    return clip(folder/'a.mp4')


@hostile('clip page', 'film with attached files', 'h264|mpeg4', result='goes on')
def film_attachments(folder):
    import av

    from fspn_nb.data.video_pieces import read_film
    with av.open(str(make.film(folder/'a.mkv'))) as source, av.open(str(folder/'b.mkv'), 'w') as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        target.add_attachment('../../outside/evil.ttf', 'application/x-truetype-font', b'evil'*1000)
        for packet in source.demux(video=0):
            if packet.dts is None: continue
            packet.stream = stream
            target.mux(packet)
    return str(read_film(folder/'b.mkv'))


@hostile('preparation', 'a log that is a link to a file outside', 'got the link .*fspn_prepare.jsonl')
def log_link(folder):
    from fspn_nb.data.extract_frames import prepare_videos
    root = release(folder)
    (folder/'films').mkdir()
    (root/'fspn_prepare.jsonl').symlink_to(folder.parent/'outside'/'secret.txt')
    return refusal(prepare_videos, 'finediving', folder/'films', root)


# ---- names and links of a release

def renamed(folder, name):
    "The annotations in `folder` with the video `name` in place of 26"
    from conftest import edit_pickle
    from test_formats import SIX
    def change(value):
        new = lambda key: (name, *key[1:]) if key == ('26', 1) else key
        if isinstance(value, list): return [new(key) for key in value]
        return {new(key): entry for key,entry in value.items()} if ('26', 1) in value else value
    for file in SIX: edit_pickle(folder/f'{file}.pkl', change)
    return folder


NAMES = dict(climbs='../../outside', absolute='/etc', parent='..', nul='a\0b', long='x'*300, drive='C:', backslash='..\\..\\outside', dots='...', space='.. ', escape='\x1b]0;x\x07',
             newline='a\nb', turned='a\u202egpj.exe', formula='=1+2', command="+cmd|' C'!A0", minus='-2+3', at='@SUM(1)')


@hostile('reading', 'annotation keys that climb out of the release, or are formulas', 'keys refused: 16')
def keys(folder):
    from fspn_nb.data.finediving import read_finediving
    annotations,messages = release(folder)/'Annotations',[]
    for kind,name in NAMES.items():
        shutil.copytree(annotations, folder/kind)
        messages.append(refusal(read_finediving, None, renamed(folder/kind, name)))
    assert all(re.search('need (a folder name|a short printable text)', message) for message in messages), messages
    return f'keys refused: {len(messages)}; '+messages[0]


@hostile('reading', 'the first key climbs out, the others are read', 'wrong entry|unreadable release', result='named')
def keys_in_a_check(folder):
    from fspn_nb.data.check import check_release,summarize_findings
    root = release(folder)
    renamed(root/'Annotations', '../../outside')
    return summarize_findings(check_release('finediving', root))[:2000]


@hostile('reading', 'frames that are links to a secret, a device, a pipe, themselves', 'refused: 4')
def frame_links(folder):
    from fspn_nb.data.clips import read_picture
    targets = {'secret': folder.parent/'outside'/'secret.txt', 'device': '/dev/zero', 'loop': folder/'loop.jpg', 'pipe': folder/'pipe'}
    os.mkfifo(folder/'pipe')
    for kind,target in targets.items(): (folder/f'{kind}.jpg').symlink_to(target)
    messages = [refusal(read_picture, folder/f'{kind}.jpg') for kind in targets]
    assert not any(SECRET in message for message in messages), messages
    return f'refused: {len(messages)}; '+messages[1]


@hostile('reading', 'folders of frames that are links: read, as many keep their frames elsewhere', '2 samples', result='goes on')
def folder_links(folder):
    from fspn_nb.data.check import check_release,summarize_findings
    root = release(folder)
    videos = root/'FINADiving_MTL_256s'/'26'
    videos.rename(folder/'elsewhere')
    videos.symlink_to(folder/'elsewhere')
    return summarize_findings(check_release('finediving', root))[:2000]


@hostile('reading', 'control characters in the names of files', r'\\x9b31m', 'escaped')
def file_names(folder):
    from fspn_nb.data.check import check_release,summarize_findings
    root = release(folder)
    videos = root/'FINADiving_MTL_256s'/'26'
    videos.rename(videos.with_name('27'))
    for name in ('a\x1b[2J\x1b]0;pwned\x07', 'b\nresult: nothing is missing', 'c\u202egpj', '1\x9b31m'): (videos.parent/name).mkdir()
    text = summarize_findings(check_release('finediving', root))
    assert '\nresult: nothing' not in text
    return text


# ---- MATLAB lists

def mat(folder, data, split='train'):
    "What reading `data` as a list of AQA-7 gives"
    from fspn_nb.data.matlab import load_mat
    (folder/'a.mat').write_bytes(data)
    return refusal(load_mat, folder/'a.mat', f'consolidated_{split}_list')


def mat_file(*elements): return b'MATLAB 5.0'.ljust(124)+b'\0\1IM'+b''.join(elements)


def mat_matrix(name, rows, columns, data, kind=9):
    part = lambda kind,data: struct.pack('<II', kind, len(data))+data+bytes(-len(data) % 8)
    return part(14, part(6, struct.pack('<II', 6, 0))+part(5, struct.pack('<ii', rows, columns))+part(1, name.encode())+part(kind, data))


@hostile('reading', '.mat that claims 10^12 numbers', 'do not fit')
def mat_claims(folder): return mat(folder, mat_file(mat_matrix('consolidated_train_list', 10**6, 10**6, bytes(800))))


@hostile('reading', '.mat with a zip bomb', 'bytes when unpacked')
def mat_bomb(folder):
    data = make.zeros(64)
    return mat(folder, mat_file(struct.pack('<II', 15, len(data))+data))


@hostile('reading', '.mat of version 7.3', 'MATLAB 7.3')
def mat_hdf(folder): return mat(folder, b'\x89HDF\r\n\x1a\n'+bytes(1000))


@hostile('reading', '.mat with five million rows in 16 kB', 'rows')
def mat_rows(folder):
    from fspn_nb.data.aqa7 import read_aqa7
    n = 5*10**6
    data = zlib.compress(mat_matrix('consolidated_train_list', n, 3, bytes(3*n), kind=1), 9)
    for split in ('train', 'test'): (folder/f'split_4_{split}_list.mat').write_bytes(mat_file(struct.pack('<II', 15, len(data))+data))
    return refusal(read_aqa7, None, folder, [])


# ---- pickles

def annotation(folder, data):
    from fspn_nb.data.safe_pickle import load_pickle
    (folder/'a.pkl').write_bytes(data)
    return refusal(load_pickle, folder/'a.pkl')


class Shell:
    def __init__(self, command): self.command = command
    def __reduce__(self): return os.system, (self.command,)


def doubled(depth, value=()):
    "A tuple of two tuples of two tuples ..."
    for _ in range(depth): value = (value,value)
    return value


@hostile('reading', 'pickle that runs a program', 'asks for (posix|nt).system, which may run code')
def pickle_code(folder): return annotation(folder, pickle.dumps({('01', 1): Shell(f'touch {folder.parent}/outside/pwned')}))


@hostile('reading', 'pickle of lists, 300,000 deep', 'a dict that is not empty')
def pickle_deep(folder):
    from fspn_nb.data.safe_pickle import load_annotation_file
    (folder/'a.pkl').write_bytes(b'\x80\x04'+b']'*300_000+b'a'*299_999+b'.')
    return refusal(load_annotation_file, folder, 'a', dict)


@hostile('reading', 'pickle of tuples, a million deep, as a key', 'a tuple of more than')
def pickle_deep_key(folder): return annotation(folder, b'\x80\x04})'+b'\x85'*10**6+b'Ns.')


@hostile('reading', 'pickle whose key is hashed 2^60 times', 'a tuple of more than')
def pickle_laughs(folder):
    body = pickle.dumps(doubled(60))
    return annotation(folder, body[:2]+b'}'+body[2 if body[2] != 0x95 else 11:-1]+b'Ns.')


@hostile('reading', 'pickle with a text of 10^12 bytes', 'need a pickle')
def pickle_length(folder): return annotation(folder, b'\x80\x04\x8e'+struct.pack('<Q', 10**12)+b'abc.')


@hostile('reading', 'pickle of 16 million sets', 'opcodes')
def pickle_sets(folder): return annotation(folder, b'\x80\x04('+b'\x8f'*2**24+b't.')


@hostile('reading', 'pickle of a thousand arrays of 30 MB out of one', 'more bytes than the file')
def pickle_arrays(folder):
    raw = bytes(range(250))*120000
    state = b'(K\x01J'+struct.pack('<i', len(raw)//4)+b'\x85h\x01\x89h\x00tb'
    dtype = b'cnumpy\ndtype\n(X\x02\0\0\0i4K\0K\x01tR(K\x03X\x01\0\0\0>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\0tbq\x01'
    array = b'cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\x01btR'+state
    return annotation(folder, b'\x80\x03(B'+struct.pack('<I', len(raw))+raw+b'q\0'+dtype+array*1000+b'l.')


@hostile('reading', 'pickle of keys that share one hash', 'whole numbers beyond')
def pickle_hashes(folder): return annotation(folder, b'\x80\x04}('+b''.join(b'\x8a\x0b'+(i*(2**61-1)).to_bytes(11, 'little')+b'N' for i in range(1, 10**5))+b'u.')


# ---- weights and checkpoints

def weights(path):
    from fspn_nb.models.weights import read_weights
    return refusal(read_weights, path)


def saved(folder, state, name='w.pt'):
    import torch
    torch.save(state, folder/name)
    return folder/name


@hostile('features', 'weights: a billion numbers out of one', r'out of 4 bytes')
def weights_expanded(folder):
    import torch
    return weights(saved(folder, {'conv.weight': torch.ones(1).expand(10**9)}))


@hostile('features', 'weights: a sparse tensor of 10^12 numbers', 'no plain one')
def weights_sparse(folder):
    import torch
    return weights(saved(folder, {'w': torch.sparse_coo_tensor([[5], [5]], [1.], (10**6, 10**6))}))


@hostile('features', 'weights: overlapping rows, 10^5 x 10^5 out of 2 x 10^5 numbers', 'out of 799')
def weights_strided(folder):
    import torch
    return weights(saved(folder, {'w': torch.ones(2*10**5-1).as_strided((10**5, 10**5), (1, 1))}))


@hostile('features', 'weights: a storage that claims 10^9 numbers', 'cannot be read')
def weights_claim(folder):
    import torch
    path = saved(folder, {'a': torch.arange(4.)})
    with zipfile.ZipFile(path) as source: parts = {i.filename: source.read(i) for i in source.infolist()}
    big = b'J'+struct.pack('<i', 10**9)
    with zipfile.ZipFile(path, 'w') as target:
        for name,data in parts.items():
            if name.endswith('data.pkl'): data = data.replace(b'K\x04tq\x07Q', big+b'tq\x07Q').replace(b'K\x04\x85q\x08', big+b'\x85q\x08')
            target.writestr(name, data)
    return weights(path)


@hostile('features', 'weights: a zip bomb', 'packed')
def weights_packed(folder):
    import torch
    path = saved(folder, {'a': torch.arange(4.)})
    with zipfile.ZipFile(path) as source: parts = {i.filename: source.read(i) for i in source.infolist()}
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED, compresslevel=1) as target:
        for name,data in parts.items():
            if not name.endswith('data/0'): target.writestr(name, data)
            else:
                with target.open(name, 'w', force_zip64=True) as part:
                    for _ in range(16): part.write(bytes(2**24))
    return weights(path)


@hostile('features', 'weights before 2020: a storage that claims 10^9 numbers', 'cannot be read')
def weights_old(folder):
    import torch
    path = folder/'w.pth'
    torch.save({'a': torch.arange(4.)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    changed = re.sub(rb'K\x04(Nt|tq.Q|t)', lambda m: b'J'+struct.pack('<i', 10**9)+m[1], data)
    assert changed != data
    path.write_bytes(changed)
    return weights(path)


@hostile('features', 'weights that hold themselves', 'levels')
def weights_ring(folder):
    ring = {}
    ring['ring'] = ring
    return weights(saved(folder, ring))


@hostile('features', 'weights: dictionaries that share dictionaries, 2^60 in all', 'entries|levels')
def weights_laughs(folder):
    import torch
    tree = {'w': torch.ones(1)}
    for _ in range(25): tree = {'a': tree, 'b': tree}
    return weights(saved(folder, tree))


@hostile('features', 'weights that run a program', 'asks for')
def weights_code(folder): return weights(saved(folder, {'w': Shell(f'touch {folder.parent}/outside/pwned')}))


@hostile('features', 'flax weights: dictionaries that share dictionaries', 'entries|levels')
def flax_laughs(folder):
    tree = {}
    for _ in range(25): tree = {'a': tree, 'b': tree}
    (folder/'w.ckpt').write_bytes(pickle.dumps({'params': tree}))
    return weights(folder/'w.ckpt')


@hostile('features', 'msgpack that claims 4 GB', 'cannot be read')
def flax_msgpack(folder):
    (folder/'w.msgpack').write_bytes(b'\x81\xa6params\xc6\xff\xff\xff\xff'+bytes(100))
    return weights(folder/'w.msgpack')


@hostile('features', 'safetensors with a header of 10^18 bytes', 'cannot be read')
def safetensors_header(folder):
    (folder/'w.safetensors').write_bytes(struct.pack('<Q', 10**18)+b'{}')
    return weights(folder/'w.safetensors')


@hostile('features', 'safetensors with half a million names', 'header')
def safetensors_names(folder):
    text = b'{'+b','.join(b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(5*10**5))+b'}'
    (folder/'w.safetensors').write_bytes(struct.pack('<Q', len(text))+text)
    return weights(folder/'w.safetensors')


@hostile('features', 'weights of 20 GB (a file with a hole)', 'at most')
def weights_large(folder):
    for name in ('w.pt', 'w.safetensors'):
        with open(folder/name, 'wb') as file: file.truncate(20*10**9)
    weights(folder/'w.safetensors')
    return weights(folder/'w.pt')


@hostile('checkpoints', 'checkpoint of a run: a billion numbers out of one', 'need a checkpoint of this trainer.*out of 4 bytes')
def checkpoint_expanded(folder):
    import torch

    from fspn_nb.training.checkpoint import load_ckpt
    return refusal(load_ckpt, saved(folder, {'run_id': 'x', 'checksum': 0, 'model': {'w': torch.ones(1).expand(10**9)}}, 'last.pt'), 'x')


@hostile('checkpoints', 'checkpoint of a run that holds itself', 'need a checkpoint of this trainer.*levels')
def checkpoint_ring(folder):
    from fspn_nb.training.checkpoint import load_ckpt
    ring = {'run_id': 'x', 'checksum': 0}
    ring['ring'] = ring
    return refusal(load_ckpt, saved(folder, ring, 'last.pt'), 'x')


@hostile('boxes', 'SSD300 weights: a billion numbers out of one', 'need a checkpoint of tensors.*out of 4 bytes')
def detector_expanded(folder):
    import torch

    from fspn_nb.actor.detectors import get_detector
    return refusal(get_detector, 'ssd300', str(saved(folder, {'w': torch.ones(1).expand(10**9)})))


# ---- detectors in ONNX

def detector(folder, data):
    from fspn_nb.actor.detectors import get_detector
    (folder/'a.onnx').write_bytes(data)
    return refusal(get_detector, 'onnx', str(folder/'a.onnx'))


def shape(name, dims): return make.whole_numbers(name, dims)


KIND = make.field(2, 1)  # float32


@hostile('boxes', 'ONNX with an input of 200,000 x 200,000', 'need one input .*at most')
def onnx_side(folder): return detector(folder, make.onnx([make.node('Identity', ['x'], ['y'])], side=200000))


@hostile('boxes', 'ONNX that makes 40,000 x 40,000 numbers out of two', 'memory')
def onnx_constant(folder): return detector(folder, make.onnx([make.node('ConstantOfShape', ['s'], ['y'])], [shape('s', [40000, 40000])]))


@hostile('boxes', 'ONNX that spreads one number over 40,000 x 40,000', 'memory')
def onnx_expand(folder):
    return detector(folder, make.onnx([make.node('ReduceMean', ['x'], ['m']), make.node('Expand', ['m', 's'], ['y'])], [shape('s', [1, 1, 40000, 40000])]))


@hostile('boxes', 'ONNX whose tensor claims 10^12 numbers', 'cannot be opened')
def onnx_claim(folder): return detector(folder, make.onnx([make.node('Identity', ['s'], ['y'])], [make.field(1, 10**6)*2+KIND+make.field(8, 's')+make.field(9, b'abcd')]))


@hostile('boxes', 'ONNX whose weights lie in a file outside', 'cannot be opened|outside')
def onnx_external(folder):
    messages = []
    for place in ('../outside/secret.txt', str(folder.parent/'outside'/'secret.txt'), '../inside/a.onnx'):
        external = make.field(1, 7)+KIND+make.field(8, 's')+make.field(13, make.field(1, 'location')+make.field(2, place))+make.field(14, 1)
        messages.append(detector(folder, make.onnx([make.node('Identity', ['s'], ['y'])], [external])))
    assert all(re.search('cannot be opened|outside', message) for message in messages), messages
    return messages[0]


@hostile('boxes', 'ONNX with an operator of its own', 'cannot be opened')
def onnx_custom(folder): return detector(folder, make.onnx([make.node('Evil', ['x'], ['y'], domain='evil.com')]))


@hostile('boxes', 'ONNX with graphs inside one another, 5,000 deep', 'cannot be opened')
def onnx_deep(folder):
    inner = make.graph([make.node('Identity', ['x'], ['y'])])
    for _ in range(5000): inner = make.graph([make.node('If', ['c'], ['y'], make.field(5, make.field(1, 'then_branch')+make.field(6, inner)+make.field(20, 5)))])
    return detector(folder, make.field(1, 8)+make.field(7, inner)+make.field(8, make.field(1, '')+make.field(2, 13)))


@hostile('boxes', 'ONNX with a loop of 10^15 rounds', 'seconds', quick=False, seconds=150)
def onnx_loop(folder):
    truth = make.field(2, 9)+make.field(8, 't')+make.field(9, b'\1')
    body = make.graph([make.node('Identity', ['c'], ['c2']), make.node('Identity', ['v'], ['v2'])], (),
                      [make.value_info('i', (), 7), make.value_info('c', (), 9), make.value_info('v', (1, 3, 32, 32))],
                      [make.value_info('c2', (), 9), make.value_info('v2', (1, 3, 32, 32))])
    loop = make.node('Loop', ['n', 't', 'x'], ['y'], make.field(5, make.field(1, 'body')+make.field(6, body)+make.field(20, 5)))
    return detector(folder, make.onnx([loop], [make.whole_numbers('n', [10**15], dims=()), truth]))


# ---- tables of boxes

def boxes(folder, data):
    from fspn_nb.actor.box_table import read_boxes
    (folder/'boxes.csv').write_bytes(data)
    return refusal(read_boxes, folder/'boxes.csv', (100, 100))


@hostile('boxes', 'table of 3 GB (a file with a hole)', 'at most')
def table_large(folder):
    from fspn_nb.actor.box_table import read_boxes
    with open(folder/'boxes.csv', 'wb') as file:
        file.write(b'uid,frame,x1,y1,x2,y2\n')
        file.truncate(3*10**9)
    return refusal(read_boxes, folder/'boxes.csv')


@hostile('boxes', 'table with one name of 30 MB', 'characters|printable')
def table_field(folder): return boxes(folder, b'uid,frame,x1,y1,x2,y2\n'+b'x'*30_000_000+b',0,1,1,0,0\n')


@hostile('boxes', 'table with ten million columns', 'header')
def table_columns(folder): return boxes(folder, b'uid,frame,x1,y1,x2,y2'+b',ab'*10**7+b'\n')


@hostile('boxes', 'table of 2.5 million short rows', 'at most|every frame', quick=False, seconds=200)
def table_rows(folder): return boxes(folder, b'uid,frame,x1,y1,x2,y2\n'+b'a,0,0,0,1,1\n'*2_500_000)


@hostile('boxes', 'names with control characters and formulas', 'names refused: 5')
def table_names(folder):
    messages = [boxes(folder, f'uid,frame,x1,y1,x2,y2\n"{name}",0,1,1,9,9\n'.encode()) for name in ('=HYPERLINK(1)', '\x1b[2J', 'a\u202eb', '+cmd', '@x')]
    assert all('printable' in message for message in messages), messages
    return f'names refused: {len(messages)}; '+messages[0]


# ---- settings and parameters

@hostile('evaluation', 'configuration nested 100,000 deep', 'brackets')
def config_deep(folder):
    from fspn_nb.config import load_cfg
    (folder/'config.json').write_text('['*10**5+']'*10**5)
    return refusal(load_cfg, folder/'config.json')


@hostile('evaluation', 'configurations with NaN, infinity, 1e400, 5,000 digits', 'refused: 5')
def config_numbers(folder):
    from fspn_nb.config import load_cfg,make_config,save_cfg
    path = save_cfg(make_config(preset='smoke'), folder/'config.json')
    value,messages = json.loads(path.read_text()),[]
    for number in ('NaN', 'Infinity', '1e400', '9'*5000, '-1'):
        value['train']['lr'] = 'HERE'
        path.write_text(json.dumps(value).replace('"HERE"', number))
        messages.append(refusal(load_cfg, path))
    return f'refused: {len(messages)}; '+messages[0]


@hostile('evaluation', 'configuration of 3 GB', 'at most')
def config_large(folder):
    from fspn_nb.config import load_cfg
    with open(folder/'config.json', 'wb') as file: file.truncate(3*10**9)
    return refusal(load_cfg, folder/'config.json')


@hostile('run notebook', 'parameters that hold code, as text', 'refused: 6')
def parameters(folder):
    from fspn_nb.experiments.parameters import input_path,parse_changes,parse_seeds
    code = f"x'); import os; os.system('touch {folder.parent}/outside/pwned'); ('"
    calls = ((input_path, code, 'data_root', True), (parse_changes, f'train.lr=__import__("os").system("touch {folder.parent}/outside/pwned")'), (parse_changes, code),
             (parse_changes, 'train.__class__=1'), (parse_seeds, '0,__import__("os")'), (input_path, f'$(touch {folder.parent}/outside/pwned)', 'weights'))
    return f'refused: {len([refusal(*call) for call in calls])}; '+refusal(*calls[0])


# ---- what reports show

MARKUP = ('<img src=x onerror=alert(1)>', '"><script>alert(1)</script>', '=HYPERLINK("http://evil.com","x")', "+cmd|' /C calc'!A0", r'\input{/etc/passwd}', ']]>', 'a\u202eb',
          '\x1b[31mred', 'line\nbreak', '[x](javascript:alert(1))', r'$\href{javascript:alert(1)}{x}$', '| a | b |', '--><b>bold</b>', '`code`', '@SUM(A1)', '&lt;b&gt;')


class Tags(html.parser.HTMLParser):
    "Notes what a browser would run or fetch"
    def __init__(self):
        super().__init__()
        self.wrong = []
    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if any(name.startswith('on') for name in values): self.wrong.append(self.get_starttag_text()[:200])
        if any(str(values.get(name, '')).strip().lower().startswith(('javascript:', 'vbscript:')) for name in ('href', 'src', 'action')): self.wrong.append(self.get_starttag_text()[:200])
        if tag == 'img' and values.get('src') == 'x' or tag == 'b': self.wrong.append(self.get_starttag_text()[:200])
    def handle_data(self, data):
        if self.cdata_elem == 'script' and 'alert(1)' in data: self.wrong.append(data[:200])


def tags(text):
    "What a browser would run or fetch of the page `text`"
    parser = Tags()
    parser.feed(text)
    return parser.wrong


def unescaped(out):
    "What in the files below `out` would be run by a browser, a spreadsheet or LaTeX, or steers a terminal"
    import mistune
    wrong = []
    for path in (p for p in sorted(out.rglob('*')) if p.is_file() and p.suffix in ('.html', '.csv', '.tex', '.md')):
        text = path.read_text(encoding='utf-8')
        if path.suffix == '.html': wrong += [(path.name, tag) for tag in tags(text)]
        if path.suffix == '.csv':
            cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
            wrong += [(path.name, cell) for cell in cells if cell[:1] in ('=', '+', '-', '@') and not re.fullmatch(r'[-+]?[\d.]+(e[-+]?\d+)?', cell)]
        if path.suffix == '.tex': wrong += [(path.name, name) for name in (r'\input', r'\href') if name in text]
        if path.suffix == '.md': wrong += [(path.name, tag) for tag in tags(mistune.html(text))]
        if any(c in text for c in '\x1b\u202e'): wrong.append((path.name, 'a control character'))
    return wrong


@hostile('report', 'runs whose folders, dives and facts are named in HTML, LaTeX, Markdown, formulas and escape sequences', 'files, nothing unescaped', 'escaped', False, 200)
def report_names(folder):
    import pandas as pd

    from fspn_nb.config import make_config
    from fspn_nb.report.build import build_report
    from fspn_nb.report.fake_runs import fake_run
    for seed,name in enumerate(MARKUP):
        for method in ('fspn', 'i3d_mlp'):
            run = fake_run(folder/'runs', make_config(preset='demo', model__name=method, seed=seed), 5., votes=method == 'fspn')
            for file in run.glob('*.csv'):
                table = pd.read_csv(file, dtype=str)
                if 'uid' in table: table['uid'] = [f'{MARKUP[i % len(MARKUP)]}/{i}' for i in range(len(table))]
                table.to_csv(file, index=False)
            facts = json.loads((run/'metrics.json').read_text())
            (run/'metrics.json').write_text(json.dumps(facts | dict(reason={'spearman': name})))
            provenance = json.loads((run/'provenance.json').read_text())
            (run/'provenance.json').write_text(json.dumps(provenance | dict(release=name, weights=dict(name=name), excluded={name: name})))
            run.rename(run.with_name(f"{name.replace('/', '')}-{method}"))
        broken = folder/'runs'/'finediving'/f"broken {name.replace('/', '')}"
        broken.mkdir()
        for file in ('config', 'metrics', 'provenance'): (broken/f'{file}.json').write_text('['*10**5 if seed % 2 else json.dumps({name: name}))
    printed(build_report, folder/'runs', folder/'page', n=50)
    wrong = unescaped(folder/'page')
    assert not wrong, wrong[:5]
    files = list((folder/'page').rglob('*.*'))
    assert any(path.suffix == '.html' for path in files)
    return f'{len(files)} files, nothing unescaped'


def papermill(folder, *arguments):
    "What `papermill nbs/run_finediving.ipynb` says with these arguments, which must fail"
    root = Path(__file__).parents[1]
    done = subprocess.run([sys.executable, '-m', 'papermill', str(root/'nbs'/'run_finediving.ipynb'), str(folder/'out.ipynb'), '-p', 'preset', 'smoke', '-p', 'out', str(folder/'runs'), *arguments],
                          capture_output=True, text=True, cwd=folder, env=os.environ | dict(PYTHONPATH=str(root)), timeout=200)
    assert done.returncode and not (folder/'pwned').exists(), done.stderr[-500:]
    return done.stderr.strip()


@case('run notebook', 'hostile: papermill parameters that hold code', seconds=250)
def papermill_code(folder):
    code = f"""x'); import os; os.system('touch {folder}/pwned'); ('"""
    sentence = papermill(folder, '-p', 'data_root', code)
    assert 'need a folder' in sentence, sentence[-500:]
    other = papermill(folder, '-p', 'changes', f'train.lr=__import__("os").system("touch {folder}/pwned")')
    assert 'changes: ' in other, other[-500:]
    return outcome('refused', sentence.splitlines()[-1])


@case('run notebook', 'hostile: papermill parameters in YAML that build objects', seconds=250)
def papermill_yaml(folder):
    sentence = papermill(folder, '-y', f'{{data_root: !!python/object/apply:os.system ["touch {folder}/pwned"]}}')
    assert 'could not determine a constructor' in sentence and 'python/object/apply' in sentence, sentence[-500:]
    return outcome('refused', next(line for line in sentence.splitlines() if 'could not determine' in line))


# ---- run it

if __name__ == '__main__' and sys.argv[1:] == ['--reader']: _read_forever()
