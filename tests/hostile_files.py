"Builds small files that claim much: pictures, films, networks, lists; and the process in which they are read"
import ctypes
import gc
import json
import os
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import psutil

GIGABYTES = 2e9  # No input may make a process larger than this, imports included


# ---- a process of its own

class Reader:
    "A process that reads hostile files one after the other; a new one after the old one had to be ended"
    def __init__(self): self.process = None

    def start(self):
        env = os.environ | dict(OMP_NUM_THREADS='1', MPLBACKEND='agg', IN_TEST='1', PYTHONPATH=str(Path(__file__).parents[1]))
        self.process = subprocess.Popen([sys.executable, str(Path(__file__).parent/'break_hostile.py'), '--reader'], text=True, env=env,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, encoding='utf-8')
        self.process.stdout.readline()  # its imports are done

    def read(self, name, folder, seconds):
        "What came out of the attack `name`; an AssertionError where the process died, was too large or too slow"
        if self.process is None or self.process.poll() is not None: self.start()
        ended = threading.Event()
        why = []
        watch = threading.Thread(target=self._watch, args=(ended, why, seconds), daemon=True)
        watch.start()
        self.process.stdin.write(json.dumps([name, str(folder)])+'\n')
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        ended.set()
        watch.join()
        if not line:
            self.process.wait()
            raise AssertionError(f"{name}: {why[0] if why else f'the process ended with status {self.process.returncode}'}")
        return json.loads(line)

    def _watch(self, ended, why, seconds):
        process,began = psutil.Process(self.process.pid),time.monotonic()
        while not ended.wait(.05):
            try: rss = process.memory_info().rss
            except psutil.Error: return
            if rss > 1.5*GIGABYTES: why.append(f'the process reached {rss/1e9:.1f} GB')
            elif time.monotonic()-began > seconds: why.append(f'no answer after {seconds} s')
            else: continue
            self.process.kill()
            return


def peak_memory():
    "Largest resident size of this process since `forget_peak`, bytes"
    lines = Path('/proc/self/status').read_text().splitlines()
    return 1024*int(next(line for line in lines if line.startswith('VmHWM')).split()[1])


def forget_peak():
    "Give back what is free, and begin to measure anew"
    if psutil.Process().memory_info().rss > GIGABYTES/2:
        gc.collect()
        with suppress(OSError, AttributeError): ctypes.CDLL(None).malloc_trim(0)
    Path('/proc/self/clear_refs').write_text('5')


# ---- pictures

def jpeg(w=8, h=8, quality=90):
    "A JPEG of 8 x 8 pixels whose header says `w` x `h`"
    from PIL import Image
    Image.new('RGB', (8, 8), (90, 120, 60)).save(buffer := BytesIO(), 'JPEG', quality=quality)
    data = bytearray(buffer.getvalue())
    at = data.index(b'\xff\xc0')
    data[at+5:at+9] = struct.pack('>HH', h, w)
    return bytes(data)


def real_jpeg(w, h):
    "A grey JPEG of `w` x `h` pixels"
    from PIL import Image
    Image.new('L', (w, h), 90).save(buffer := BytesIO(), 'JPEG', quality=10)
    return buffer.getvalue()


def zeros(n):
    "Deflated zeros, `n` times 16 MiB, without the checksum at the end"
    packer,block = zlib.compressobj(9),bytes(2**24)
    first,further = (packer.compress(block)+packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first+further*(n-1)


def chunk(kind, data): return struct.pack('>I', len(data))+kind+data+struct.pack('>I', zlib.crc32(kind+data))


def png(w, h, extra=b'', rows=None):
    "A PNG of `w` x `h` RGB pixels, black as far as `rows` goes; `extra`: chunks before the pixels"
    row = bytes(1+3*w)
    packer = zlib.compressobj(9)
    pixels = b''.join(packer.compress(row) for _ in range(h if rows is None else rows))+packer.flush()
    return b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 8, 2, 0, 0, 0))+extra+chunk(b'IDAT', pixels)+chunk(b'IEND', b'')


def webp(w, h):
    "A WebP whose canvas is `w` x `h`, over a picture of 8 x 8"
    from PIL import Image
    Image.new('RGB', (8, 8)).save(buffer := BytesIO(), 'WEBP')
    body = buffer.getvalue()[12:]
    head = b'VP8X'+struct.pack('<I', 10)+bytes(4)+(w-1).to_bytes(3, 'little')+(h-1).to_bytes(3, 'little')
    return b'RIFF'+struct.pack('<I', 4+len(head)+len(body))+b'WEBP'+head+body


def gif(w, h, n):
    "A GIF whose screen is `w` x `h`, with `n` pictures of 1 x 1"
    one = b'\x21\xf9\x04\x04\x01\0\0\0'+b'\x2c'+struct.pack('<HHHHB', 0, 0, 1, 1, 0)+b'\x02\x02\x44\x01\0'
    return b'GIF89a'+struct.pack('<HHBBB', w, h, 0x80, 0, 0)+bytes(6)+one*n+b'\x3b'


# ---- films

def film(path, n=30, size=(32, 48), **kwargs):
    "A small film of noise"
    import numpy as np

    from fspn_nb.data.video_io import encode_video
    return encode_video(np.random.default_rng(0).integers(0, 255, (n, *size, 3), dtype=np.uint8), path, **kwargs)


def claim_frames(path, n):
    "Let the index of an mp4 say that it has `n` pictures of one byte each"
    data = bytearray(path.read_bytes())
    at = data.index(b'stsz')
    data[at+4:at+16] = struct.pack('>III', 0, 1, n)
    at = data.index(b'stsc')
    data[at+16:at+20] = struct.pack('>I', n)
    at = data.index(b'stts')
    data[at+12:at+16] = struct.pack('>I', n)
    path.write_bytes(data)


def packets(path, codec, shape, payloads, times, rate=25):
    "A film of `codec` that says it has pictures of `shape`, with these packets at these `times` (in 1/`rate` s)"
    from fractions import Fraction

    import av
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width,stream.height,stream.pix_fmt = *shape,dict(mjpeg='yuvj420p', png='rgb24')[codec]
        for payload,t in zip(payloads, times):
            packet = av.Packet(payload)
            packet.stream,packet.pts,packet.dts,packet.time_base,packet.is_keyframe = stream,t,t,Fraction(1, rate),True
            container.mux_one(packet)
    return path


# ---- networks in ONNX, written byte by byte

def _varint(n):
    out = b''
    while True:
        out += bytes([n & 127 | (128 if n > 127 else 0)])
        n >>= 7
        if not n: return out


def field(number, value):
    "One field of a protocol buffer"
    if isinstance(value, int): return _varint(number << 3)+_varint(value)
    value = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2)+_varint(len(value))+value


def node(op, inputs, outputs, attributes=b'', domain=''):
    names = b''.join(field(1, name) for name in inputs)+b''.join(field(2, name) for name in outputs)
    return names+field(4, op)+attributes+(field(7, domain) if domain else b'')


def value_info(name, dims, kind=1):
    return field(1, name)+field(2, field(1, field(1, kind)+field(2, b''.join(field(1, field(1, d)) for d in dims))))


def graph(nodes, tensors=(), inputs=(), outputs=()):
    return (b''.join(field(1, n) for n in nodes)+field(2, 'g')+b''.join(field(5, t) for t in tensors)
            +b''.join(field(11, i) for i in inputs)+b''.join(field(12, o) for o in outputs))


def onnx(nodes, tensors=(), side=32):
    "A network with one input (1,3,side,side) `x` and the output `y`"
    return field(1, 8)+field(7, graph(nodes, tensors, [value_info('x', (1, 3, side, side))], [value_info('y', (1, 21, 85))]))+field(8, field(1, '')+field(2, 13))


def whole_numbers(name, values, dims=None):
    "A tensor of 64-bit whole numbers"
    dims = (len(values),) if dims is None else dims
    return b''.join(field(1, d) for d in dims)+field(2, 7)+field(8, name)+field(9, struct.pack(f'<{len(values)}q', *values))
