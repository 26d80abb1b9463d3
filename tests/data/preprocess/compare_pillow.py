"""Every format and property that people's files have, as Pillow reads it and as nfold does.

    pip install pillow==13.0.0 numpy
    cargo build --example pixels
    python tests/data/preprocess/compare_pillow.py [--pixels PROGRAM] [--only WORD] [--table] [--keep FOLDER]

Makes some 400 files by itself (nothing is downloaded), asks Pillow and `examples/pixels.rs` for each, and compares size and
bits where both read it, and otherwise who refuses it and why. Exit code 1 when bits differ, or when nfold refuses what
Pillow reads for a reason that REFUSED does not list. `--table` prints the table of docs/folding.md.
"""
import argparse
import collections
import hashlib
import io
import json
import pathlib
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib

import numpy as np
import PIL
from PIL import Image, ImageOps

ROOT = pathlib.Path(__file__).resolve().parents[3]
warnings.simplefilter("ignore")

# what nfold refuses although Pillow reads it: a part of nfold's message, and why
REFUSED = {
    "some of its components in one scan": "sequential JPEG in several scans of several components; no encoder makes them unasked",
    "share a number": "JPEG whose components have the same number: which table belongs to which is a guess",
    "CIE Lab": "TIFF in CIE Lab: needs a colour engine",
    "CCITT run lengths": "TIFF compressed by CCITT run lengths, a forerunner of fax",
}

# the rows of the table whose files are kept as tests
ODD = ("JPEG, colour markers", "JPEG, a trailer for the end", "JPEG, any sampling", "JPEG, several pictures (MPO)", "JPEG, kinds nobody reads",
       "PNG, without its last chunk", "PNG, wrong checksums", "PNG, pixels missing", "GIF, frame and screen", "GIF, palettes", "BMP, kinds",
       "TIFF, palette", "TIFF, orientation", "TIFF, BigTIFF", "TIFF, 16 bits", "TIFF, 32 bits", "TIFF, bit order", "TIFF, layouts", "TIFF, fax",
       "TIFF, CIE Lab", "TIFF, YCbCr", "TIFF, JPEG inside", "TIFF, alpha")

FILES = {}


def put(kind, name, data):
    """kind: the row of the table."""
    assert data is not None and name not in FILES, name
    FILES[name] = (kind, data)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def scene(width, height, seed=0):
    """Shapes, gradients and noise; the same everywhere."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    noise = np.random.RandomState(seed).randint(-30, 31, (height, width, 3))
    rings = 90 * np.sin(np.hypot(x - width / 3, y - height / 2) / 5)[..., None]
    base = np.dstack([x * 255 / max(1, width - 1), y * 255 / max(1, height - 1), 255 - x * 255 / max(1, width - 1)])
    return Image.fromarray((base + rings * [1, 0.5, -1] + noise).clip(0, 255).astype("uint8"))


# ---------------------------------------------------------------- JPEG

def segment(marker, body):
    return bytes([0xFF, marker]) + struct.pack(">H", len(body) + 2) + body


def adobe(transform, version=100):
    return segment(0xEE, b"Adobe" + struct.pack(">H", version) + bytes(4) + bytes([transform]))


def exif(orientation, order="<"):
    head = b"II" if order == "<" else b"MM"
    tiff = head + struct.pack(order + "HIHHHIHHI", 42, 8, 1, 274, 3, 1, orientation, 0, 0)
    return b"Exif\0\0" + tiff


def with_ids(data, ids):
    """The rest of a file (from the first segment on) with other component numbers."""
    data, at = bytearray(data), 0
    while True:
        marker, length = data[at + 1], struct.unpack(">H", data[at + 2:at + 4])[0]
        for k, number in enumerate(ids):
            if marker in (0xC0, 0xC2):
                data[at + 10 + 3 * k] = number
            if marker == 0xDA:
                data[at + 5 + 2 * k] = number
        if marker == 0xDA:
            return bytes(data)
        at += 2 + length


class Coder:
    """A baseline encoder of noise for any sampling: what Pillow's own encoder doesn't offer."""

    DC = {s: (i, 4) for i, s in enumerate(range(12))}

    def __init__(self, width, height, factors, marker=0xC0, seed=1, interleaved=True, restart=0):
        self.random = np.random.RandomState(seed)
        self.bits, self.count, self.out = 0, 0, bytearray()
        n = len(factors)
        across, down = max(f[0] for f in factors), max(f[1] for f in factors)
        table = lambda cls, symbols: segment(0xC4, bytes([cls << 4]) + bytes([0, 0, 0, len(symbols)] + [0] * 12) + bytes(symbols))
        head = b"\xff\xd8" + segment(0xDB, b"\0" + bytes(range(3, 67)))
        frame = struct.pack(">BHHB", 8, height, width, n) + b"".join(bytes([i + 1, h << 4 | v, 0]) for i, (h, v) in enumerate(factors))
        head += segment(marker, frame) + table(0, range(12)) + table(1, [0, 1, 2, 3, 4, 0x11, 0x12, 0x21, 0xF0])
        self.ac = {s: (i, 4) for i, s in enumerate([0, 1, 2, 3, 4, 0x11, 0x12, 0x21, 0xF0])}
        if restart:
            head += segment(0xDD, struct.pack(">H", restart))
        self.file = bytearray(head)
        mcus = [-(-width // (8 * across)), -(-height // (8 * down))]
        scans = [range(n)] if interleaved else [[i] for i in range(n)]
        for scan in scans:
            self.file += segment(0xDA, bytes([len(scan)]) + b"".join(bytes([i + 1, 0]) for i in scan) + b"\0\x3f\0")
            self.last, done = [0] * n, 0
            if len(scan) == 1:
                h, v = factors[scan[0]]
                units = -(-(-(-width * h // across)) // 8) * -(-(-(-height * v // down)) // 8)
                blocks = [[scan[0]]] * units
            else:
                blocks = [[i for i in scan for _ in range(factors[i][0] * factors[i][1])]] * (mcus[0] * mcus[1])
            for unit in blocks:
                if restart and done and done % restart == 0:
                    self.flush()
                    self.out += bytes([0xFF, 0xD0 + (done // restart - 1) % 8])
                    self.last = [0] * n
                for i in unit:
                    self.block(i)
                done += 1
            self.flush()
            self.file += self.out
            self.out = bytearray()
        self.file += b"\xff\xd9"

    def put(self, value, length):
        for i in reversed(range(length)):
            self.bits = self.bits << 1 | (value >> i & 1)
            self.count += 1
            if self.count == 8:
                self.out.append(self.bits)
                if self.bits == 0xFF:
                    self.out.append(0)
                self.bits = self.count = 0

    def flush(self):
        while self.count:
            self.put(1, 1)

    def value(self, value):
        size = abs(value).bit_length()
        return size, (value if value >= 0 else value + (1 << size) - 1)

    def block(self, i):
        dc = int(self.random.randint(-250, 250))
        size, bits = self.value(dc - self.last[i])
        self.last[i] = dc
        self.put(*self.DC[size])
        self.put(bits, size)
        for k in range(int(self.random.randint(0, 9))):
            value = int(self.random.randint(-15, 16)) or 1
            size, bits = self.value(value)
            self.put(*self.ac[size])
            self.put(bits, size)
        self.put(*self.ac[0])


def jpegs():
    for number, (w, h) in enumerate([(1, 1), (2, 3), (7, 1), (1, 9), (8, 8), (17, 16), (33, 31), (64, 48), (121, 77), (200, 150)]):
        for sampling in (0, 1, 2):
            quality = (5, 30, 75, 90, 95, 100)[(number + sampling) % 6]
            options = dict(quality=quality, subsampling=sampling, optimize=number % 3 == 1)
            put("JPEG, baseline", f"baseline_{w}x{h}_{sampling}.jpg", saved(scene(w, h, number), "JPEG", **options))
            put("JPEG, progressive", f"progressive_{w}x{h}_{sampling}.jpg", saved(scene(w, h, number), "JPEG", progressive=True, **options))
    for w, h in [(40, 30), (9, 7), (65, 33)]:
        image = scene(w, h, 5)
        put("JPEG, greyscale", f"grey_{w}x{h}.jpg", saved(image.convert("L"), "JPEG"))
        put("JPEG, greyscale", f"grey_progressive_{w}x{h}.jpg", saved(image.convert("L"), "JPEG", progressive=True))
        put("JPEG, RGB", f"rgb_{w}x{h}.jpg", saved(image, "JPEG", keep_rgb=True))
        put("JPEG, restart markers", f"restart_{w}x{h}.jpg", saved(image, "JPEG", restart_marker_blocks=2))
        put("JPEG, restart markers", f"restart_rows_{w}x{h}.jpg", saved(image, "JPEG", restart_marker_rows=1, subsampling=0))
        for sampling in (0, 1, 2):
            cmyk = saved(image.convert("CMYK"), "JPEG", subsampling=sampling)
            at = cmyk.index(b"Adobe")
            for transform in (0, 1, 2, 9):
                put("JPEG, CMYK and YCCK", f"inks_{transform}_{w}x{h}_{sampling}.jpg", cmyk[:at + 11] + bytes([transform]) + cmyk[at + 12:])
            put("JPEG, CMYK and YCCK", f"inks_none_{w}x{h}_{sampling}.jpg", cmyk[:at - 4] + cmyk[at + 12:])
    samplings = ["22 11 11", "21 11 11", "12 11 11", "41 11 11", "14 11 11", "42 11 11", "24 11 11", "44 11 11", "22 21 12", "22 12 21",
                 "11 22 11", "11 12 21", "21 21 11", "22 11 22", "33 11 11", "31 11 31", "22", "11", "41", "21 11 11 21", "22 11 11 22"]
    for number, text in enumerate(samplings):
        factors = [(int(f[0]), int(f[1])) for f in text.split()]
        for w, h in [(35, 29), (3, 50)]:
            data = bytes(Coder(w, h, factors, seed=number, restart=3 * (number % 2)).file)
            put("JPEG, any sampling", f"sampling_{text.replace(' ', '_')}_{w}x{h}.jpg", data)
    for number, text in enumerate(samplings[:4]):
        factors = [(int(f[0]), int(f[1])) for f in text.split()]
        put("JPEG, scan by scan", f"scans_{number}.jpg", bytes(Coder(35, 29, factors, seed=number, interleaved=False).file))
    whole, progressive = saved(scene(60, 45, 3), "JPEG", quality=92), saved(scene(60, 45, 3), "JPEG", quality=92, progressive=True)
    soi, jfif = b"\xff\xd8", whole[2:20]
    heads = {"none": b"", "jfif": jfif, "jfif_adobe0": jfif + adobe(0), "adobe0_jfif": adobe(0) + jfif, "adobe0": adobe(0), "adobe1": adobe(1),
             "adobe2": adobe(2), "adobe5": adobe(5), "jfif_adobe2": jfif + adobe(2), "jfif_adobe5": jfif + adobe(5), "adobe0_101": adobe(0, 101),
             "jfxx": jfif + segment(0xE0, b"JFXX\0\x13" + bytes(5)), "avi": segment(0xE0, b"AVI1" + bytes(10)), "comment": segment(0xFE, b"hi") + jfif,
             "profile": jfif + segment(0xE2, b"ICC_PROFILE\0\1\1" + bytes(128)), "short_adobe": segment(0xEE, b"Adobe\0d\0"),
             "two_adobes": adobe(0) + adobe(1), "fill": jfif + b"\xff\xff\xff" + segment(0xFE, b"x")}
    for name, head in heads.items():
        for ids in (None, b"RGB", b"rgb", b"\0\1\2", b'"#$'):
            if ids is None or name in ("none", "jfif", "adobe1", "jfif_adobe0"):
                tag = "" if ids is None else "_" + ids.hex()
                body = whole[20:] if ids is None else with_ids(whole[20:], ids)
                put("JPEG, colour markers", f"markers_{name}{tag}.jpg", soi + head + body)
        put("JPEG, colour markers", f"markers_{name}_progressive.jpg", soi + head + progressive[20:])
    put("JPEG, colour markers", "markers_same_ids.jpg", soi + jfif + with_ids(whole[20:], b"\1\1\1"))
    for orientation in range(1, 9):
        put("JPEG, EXIF orientation", f"exif_{orientation}.jpg", soi + segment(0xE1, exif(orientation, "<>"[orientation % 2])) + whole[20:])
    tails = {"zeros": bytes(50), "text": b"text after the end", "jpeg": whole, "panorama": b"\0\0\x10\x0btrailer " + bytes(200)}
    for name, tail in tails.items():
        put("JPEG, bytes after the end", f"after_{name}.jpg", whole + tail)
        put("JPEG, bytes after the end", f"after_progressive_{name}.jpg", progressive + tail)
        if name != "jpeg":
            put("JPEG, a trailer for the end", f"without_end_{name}.jpg", whole[:-2] + tail)
    for kind, data in (("baseline", whole), ("progressive", progressive)):
        for percent in range(4, 100, 8):
            put("JPEG, cut short", f"cut_{kind}_{percent}.jpg", data[:len(data) * percent // 100])
        put("JPEG, cut short", f"cut_{kind}_end.jpg", data[:-2])
    for name, marker in {"12 bits": None, "lossless": 0xC3, "hierarchical": 0xC5}.items():
        at = whole.index(b"\xff\xc0")
        data = whole[:at + 4] + b"\x0c" + whole[at + 5:] if marker is None else whole[:at + 1] + bytes([marker]) + whole[at + 2:]
        put("JPEG, kinds nobody reads", f"kind_{name.replace(' ', '')}.jpg", data)
    put("JPEG, several pictures (MPO)", "pictures.mpo", saved(scene(40, 30), "MPO", save_all=True, append_images=[scene(40, 30, 1), scene(20, 15, 2)]))


# ---------------------------------------------------------------- PNG

def chunk(kind, body, check=None):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body) if check is None else check)


def png_of(array, color, depth, interlace=False, before=b"", end=True, check=None, palette=None):
    """array: height × width × channels of samples."""
    height, width = array.shape[:2]

    def rows(part):
        for row in part:
            flat = row.reshape(-1)
            if depth == 16:
                yield b"\0" + flat.astype(">u2").tobytes()
            elif depth == 8:
                yield b"\0" + flat.astype("u1").tobytes()
            else:
                bits = (flat[:, None] >> np.arange(depth - 1, -1, -1) & 1).reshape(-1)
                yield b"\0" + np.packbits(bits.astype("u1")).tobytes()

    passes = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)] if interlace else [(0, 0, 1, 1)]
    raw = b"".join(r for x, y, dx, dy in passes for r in rows(array[y::dy, x::dx]) if array[y::dy, x::dx].size)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, int(interlace))) + before
    if color == 3:
        data += chunk(b"PLTE", palette)
    return data + chunk(b"IDAT", zlib.compress(raw), check) + (chunk(b"IEND", b"") if end else b"")


def pngs():
    random = np.random.RandomState(2)
    for color, channels, depths in ((0, 1, (1, 2, 4, 8, 16)), (2, 3, (8, 16)), (3, 1, (1, 2, 4, 8)), (4, 2, (8, 16)), (6, 4, (8, 16))):
        for depth in depths:
            for interlace in (False, True):
                for w, h in [(37, 23), (1, 1), (5, 3)]:
                    array = random.randint(0, 1 << depth, (h, w, channels))
                    if depth == 16:
                        array[::2] %= 400
                    palette = random.bytes(3 * (1 << min(depth, 8)))
                    name = f"png_{color}_{depth}_{'i' if interlace else 'p'}_{w}x{h}.png"
                    put(f"PNG, {depth} bits" if color in (0, 2) else ("PNG, palette" if color == 3 else "PNG, alpha"), name,
                        png_of(array, color, depth, interlace, palette=palette))
    photo = np.asarray(scene(60, 45, 7))
    good = png_of(photo, 2, 8)
    put("PNG, transparent colour", "png_trns_rgb.png", png_of(photo, 2, 8, before=chunk(b"tRNS", struct.pack(">HHH", *map(int, photo[0, 0])))))
    put("PNG, transparent colour", "png_trns_grey.png", png_of(photo[..., :1], 0, 8, before=chunk(b"tRNS", b"\0\x10")))
    indices = random.randint(0, 16, (20, 30, 1))
    palette = random.bytes(48)
    body = png_of(indices, 3, 4, palette=palette)
    at = body.index(b"IDAT") - 4
    put("PNG, transparent colour", "png_trns_palette.png", body[:at] + chunk(b"tRNS", bytes(range(0, 160, 10))) + body[at:])
    put("PNG, palette", "png_short_palette.png", png_of(indices % 9, 3, 4, palette=palette[:27]))
    put("PNG, palette", "png_beyond_palette.png", png_of(indices, 3, 4, palette=palette[:27]))
    put("PNG, palette", "png_no_palette.png", body[:33] + body[at:])
    put("PNG, without its last chunk", "png_no_iend.png", png_of(photo, 2, 8, end=False))
    put("PNG, without its last chunk", "png_cut_in_iend.png", good[:-4])
    put("PNG, wrong checksums", "png_idat_crc.png", png_of(photo, 2, 8, check=1))
    put("PNG, wrong checksums", "png_text_crc.png", png_of(photo, 2, 8, before=chunk(b"tEXt", b"a\0b", 7)))
    put("PNG, wrong checksums", "png_header_crc.png", good[:29] + b"\0\0\0\0" + good[33:])
    broken = zlib.compress(b"".join(b"\0" + row.tobytes() for row in photo))
    header = good[:33]
    put("PNG, wrong checksums", "png_adler.png", header + chunk(b"IDAT", broken[:-4] + bytes(4)) + chunk(b"IEND", b""))
    rows = [b"\0" + row.tobytes() for row in photo]
    put("PNG, pixels missing", "png_rows_missing.png", header + chunk(b"IDAT", zlib.compress(b"".join(rows[:20]))) + chunk(b"IEND", b""))
    put("PNG, pixels missing", "png_idat_ends.png", header + chunk(b"IDAT", broken[:len(broken) // 2]) + chunk(b"IEND", b""))
    put("PNG, pixels missing", "png_no_idat.png", header + chunk(b"IEND", b""))
    put("PNG, too many pixels", "png_rows_more.png", header + chunk(b"IDAT", zlib.compress(b"".join(rows + rows[:3]))) + chunk(b"IEND", b""))
    pieces = b"".join(chunk(b"IDAT", broken[i:i + 100]) for i in range(0, len(broken), 100))
    put("PNG, odd chunks", "png_pieces.png", header + pieces + chunk(b"IEND", b""))
    put("PNG, odd chunks", "png_empty_piece.png", header + chunk(b"IDAT", b"") + pieces + chunk(b"IEND", b""))
    for name, kind, text in (("text", b"tEXt", b"key\0value"), ("unknown", b"abCd", b"x" * 40), ("gamma", b"gAMA", struct.pack(">I", 100000)),
                             ("srgb", b"sRGB", b"\0"), ("bad_profile", b"iCCP", b"x\0\0nonsense"), ("bad_text", b"zTXt", b"x\0\0nonsense"),
                             ("bad_exif", b"eXIf", b"nonsense"), ("background", b"bKGD", bytes(6)), ("apng", b"acTL", struct.pack(">II", 3, 0))):
        put("PNG, odd chunks", f"png_chunk_{name}.png", header + chunk(kind, text) + good[33:])
    for orientation in (3, 6, 7):
        put("PNG, EXIF orientation", f"png_exif_{orientation}.png", header + chunk(b"eXIf", exif(orientation)[6:]) + good[33:])
    put("PNG, bytes after the end", "png_after.png", good + b"anything")
    for percent in (10, 30, 50, 70, 90):
        put("PNG, cut short", f"png_cut_{percent}.png", good[:len(good) * percent // 100])
    put("PNG, animated", "animated.png", saved(scene(30, 20), "PNG", save_all=True, append_images=[scene(30, 20, 1), scene(30, 20, 2)]))


# ---------------------------------------------------------------- GIF, WebP, BMP

def gif_of(screen, at, size, palette, data, local=None, transparent=None, interlace=0, background=0, tail=b";", version=b"GIF89a"):
    bits = lambda p: (len(p) // 3).bit_length() - 2
    file = version + struct.pack("<HHBBB", *screen, 0x80 | bits(palette) if palette else 0, background, 0) + (palette or b"")
    if transparent is not None:
        file += b"!\xf9\4\1\0\0" + bytes([transparent]) + b"\0"
    file += b"," + struct.pack("<HHHHB", *at, *size, (0x80 | bits(local) if local else 0) | interlace) + (local or b"")
    return file + data + tail


def lzw(pixels, depth=8):
    """Uncompressed codes, cleared before the table grows."""
    clear, out, bits, count = 1 << depth, bytearray(), 0, 0
    codes = []
    for i, pixel in enumerate(pixels):
        if i % ((1 << depth) - 3) == 0:
            codes.append(clear)
        codes.append(int(pixel))
    for code in codes + [clear + 1]:
        bits |= code << count
        count += depth + 1
        while count >= 8:
            out.append(bits & 255)
            bits >>= 8
            count -= 8
    out.append(bits & 255)
    blocks = b"".join(bytes([len(out[i:i + 255])]) + out[i:i + 255] for i in range(0, len(out), 255))
    return bytes([depth]) + blocks + b"\0"


def gifs():
    random = np.random.RandomState(4)
    palette, other = random.bytes(768), random.bytes(48)
    for colors in (2, 7, 64, 256):
        put("GIF", f"gif_{colors}.gif", saved(scene(50, 40, colors).quantize(colors), "GIF"))
        put("GIF", f"gif_interlaced_{colors}.gif", saved(scene(50, 41, colors).quantize(colors), "GIF", interlace=1))
    put("GIF", "gif_grey.gif", saved(scene(50, 40).convert("L"), "GIF"))
    frames = [scene(40, 30, i).quantize(32) for i in range(3)]
    put("GIF, animated", "gif_animated.gif", saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=50))
    put("GIF, animated", "gif_disposal.gif", saved(frames[0], "GIF", save_all=True, append_images=frames[1:], disposal=2, transparency=3))
    pixels = lambda w, h, n=256: random.randint(0, n, w * h)
    for name, options in {
        "part": dict(screen=(30, 20), at=(5, 4), size=(10, 8)), "beyond": dict(screen=(30, 20), at=(25, 4), size=(10, 30)),
        "larger": dict(screen=(3, 2), at=(0, 0), size=(10, 8)), "whole": dict(screen=(10, 8), at=(0, 0), size=(10, 8)),
        "no_screen": dict(screen=(0, 0), at=(0, 0), size=(10, 8)),
    }.items():
        for transparent in (None, 9):
            tag = "" if transparent is None else "_transparent"
            data = lzw(pixels(*options["size"]))
            put("GIF, frame and screen", f"gif_{name}{tag}.gif", gif_of(palette=palette, data=data, transparent=transparent, background=7, **options))
    one = dict(screen=(12, 9), at=(1, 1), size=(10, 8))
    put("GIF, palettes", "gif_local.gif", gif_of(palette=palette, local=other, data=lzw(pixels(10, 8, 16), 4), **one))
    put("GIF, palettes", "gif_local_only.gif", gif_of(palette=None, local=other, data=lzw(pixels(10, 8, 16), 4), **one))
    put("GIF, palettes", "gif_beyond_palette.gif", gif_of(palette=other, data=lzw(pixels(10, 8)), **one))
    put("GIF, palettes", "gif_none.gif", gif_of(palette=None, data=lzw(pixels(10, 8)), **one))
    ramp = bytes(v for i in range(256) for v in (i, i, i))
    put("GIF, palettes", "gif_ramp.gif", gif_of(palette=ramp, data=lzw(pixels(10, 8)), **one))
    put("GIF, palettes", "gif_ramp_local.gif", gif_of(palette=palette, local=ramp, data=lzw(pixels(10, 8)), **one))
    put("GIF, endings", "gif_no_end.gif", gif_of(palette=palette, data=lzw(pixels(10, 8)), tail=b"", **one))
    put("GIF, endings", "gif_after.gif", gif_of(palette=palette, data=lzw(pixels(10, 8)), tail=b";anything", **one))
    put("GIF, endings", "gif_87a.gif", gif_of(palette=palette, data=lzw(pixels(10, 8)), version=b"GIF87a", **one))
    put("GIF, endings", "gif_more_pixels.gif", gif_of(palette=palette, data=lzw(pixels(10, 11)), **one))
    put("GIF, endings", "gif_fewer_pixels.gif", gif_of(palette=palette, data=lzw(pixels(10, 5)), **one))
    good = saved(scene(50, 40).quantize(64), "GIF")
    for percent in (5, 30, 60, 90):
        put("GIF, cut short", f"gif_cut_{percent}.gif", good[:len(good) * percent // 100])


def others():
    alpha = scene(50, 41, 3).convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize((50, 41)))
    for w, h in [(1, 1), (3, 2), (17, 33), (64, 48), (123, 77)]:
        for quality in (10, 80, 100):
            put("WebP, lossy", f"webp_{w}x{h}_{quality}.webp", saved(scene(w, h, quality), "WEBP", quality=quality, method=quality % 7))
        put("WebP, lossless", f"webp_lossless_{w}x{h}.webp", saved(scene(w, h, 1), "WEBP", lossless=True))
    put("WebP, lossless", "webp_palette.webp", saved(scene(40, 30).quantize(6).convert("RGB"), "WEBP", lossless=True))
    put("WebP, alpha", "webp_alpha.webp", saved(alpha, "WEBP", quality=80))
    put("WebP, alpha", "webp_alpha_lossless.webp", saved(alpha, "WEBP", lossless=True))
    put("WebP, alpha", "webp_alpha_exact.webp", saved(alpha, "WEBP", lossless=True, exact=True))
    put("WebP, animated", "webp_animated.webp", saved(scene(40, 30), "WEBP", save_all=True, append_images=[scene(40, 30, 1)]))
    put("WebP, animated", "webp_animated_alpha.webp", saved(alpha, "WEBP", save_all=True, append_images=[alpha.rotate(90)]))
    put("WebP, metadata", "webp_exif.webp", saved(scene(40, 30), "WEBP", exif=exif(6)))
    put("WebP, metadata", "webp_profile.webp", saved(scene(40, 30), "WEBP", icc_profile=bytes(200)))
    good = saved(scene(64, 48), "WEBP")
    put("WebP, cut short", "webp_after.webp", good + b"anything")
    for percent in (10, 50, 90):
        put("WebP, cut short", f"webp_cut_{percent}.webp", good[:len(good) * percent // 100])
    for w, h in [(1, 1), (5, 3), (33, 20)]:
        image = scene(w, h, 2)
        put("BMP", f"bmp_24_{w}x{h}.bmp", saved(image, "BMP"))
        put("BMP", f"bmp_8_{w}x{h}.bmp", saved(image.quantize(100), "BMP"))
        put("BMP", f"bmp_grey_{w}x{h}.bmp", saved(image.convert("L"), "BMP"))
        put("BMP", f"bmp_1_{w}x{h}.bmp", saved(image.convert("1"), "BMP"))
        put("BMP", f"bmp_32_{w}x{h}.bmp", saved(image.convert("RGBA"), "BMP"))
    random = np.random.RandomState(6)

    def bmp(w, h, bits, data, compression=0, palette=b"", masks=b"", size=40):
        start = 14 + size + len(masks) + len(palette)
        head = struct.pack("<IiiHHIIiiII", size, w, h, 1, bits, compression, len(data), 0, 0, len(palette) // 4, 0)
        return b"BM" + struct.pack("<IHHI", start + len(data), 0, 0, start) + head + masks + palette + data

    palette = random.bytes(64)
    rows = lambda w, h, bits: random.bytes(-(-w * bits // 32) * 4 * h)
    put("BMP, kinds", "bmp_top_down.bmp", bmp(7, -5, 24, rows(7, 5, 24)))
    put("BMP, kinds", "bmp_4.bmp", bmp(7, 5, 4, rows(7, 5, 4), palette=palette))
    put("BMP, kinds", "bmp_16.bmp", bmp(7, 5, 16, rows(7, 5, 16)))
    put("BMP, kinds", "bmp_565.bmp", bmp(7, 5, 16, rows(7, 5, 16), 3, masks=struct.pack("<III", 0xF800, 0x7E0, 0x1F)))
    put("BMP, kinds", "bmp_32_masks.bmp", bmp(7, 5, 32, rows(7, 5, 32), 3, masks=struct.pack("<III", 0xFF0000, 0xFF00, 0xFF)))
    put("BMP, kinds", "bmp_32_plain.bmp", bmp(7, 5, 32, rows(7, 5, 32)))
    put("BMP, kinds", "bmp_rle8.bmp", bmp(7, 3, 8, b"\7\1\0\0\3\2\4\3\0\0\0\3\1\2\3\0\4\5\0\0\0\1", 1, palette=palette))
    put("BMP, kinds", "bmp_rle4.bmp", bmp(7, 2, 4, b"\7\x12\0\0\7\x34\0\0\0\1", 2, palette=palette))
    put("BMP, kinds", "bmp_cut.bmp", bmp(7, 5, 24, rows(7, 5, 24))[:-20])


# ---------------------------------------------------------------- TIFF

def tiff_of(tags, strip, order="<", big=False):
    """tags: number → (type, values); the pixels in one strip unless they say otherwise."""
    head = 16 if big else 8
    size, kind = struct.calcsize, {1: "B", 3: "H", 4: "I", 16: "Q"}
    tags = dict(tags)
    if 324 not in tags:
        tags.setdefault(273, (4, [head]))
        tags.setdefault(279, (4, [len(strip)]))
    data, rows = bytearray(bytes(head) + strip + bytes(-len(strip) % 8)), []
    room = 8 if big else 4
    for number in sorted(tags):
        type_, values = tags[number]
        body = values if isinstance(values, bytes) else b"".join(struct.pack(order + kind[type_], v) for v in values)
        count = len(values)
        if len(body) > room:
            at = len(data)
            data += body + bytes(-len(body) % 8)
            body = struct.pack(order + ("Q" if big else "I"), at)
        rows.append(struct.pack(order + ("HHQ" if big else "HHI"), number, type_, count) + body.ljust(room, b"\0"))
    at = len(data)
    mark = b"II" if order == "<" else b"MM"
    data[:head] = mark + (struct.pack(order + "HHHQ", 43, 8, 0, at) if big else struct.pack(order + "HI", 42, at))
    data += struct.pack(order + ("Q" if big else "H"), len(rows)) + b"".join(rows) + bytes(room if not big else 8)
    return bytes(data)


def base(w, h, bits, photometric, samples=1, compression=1, **more):
    tags = {256: (4, [w]), 257: (4, [h]), 258: (3, [bits] * samples), 259: (3, [compression]), 262: (3, [photometric]), 277: (3, [samples]), 278: (4, [h])}
    tags.update({int(k[1:]): v for k, v in more.items()})
    return tags


def tiffs():
    photo = scene(41, 30, 9)
    array, grey = np.asarray(photo), np.asarray(photo.convert("L"))
    h, w = grey.shape
    for compression in (None, "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        for mode in ("RGB", "L", "1", "P", "RGBA", "CMYK", "LA"):
            image = photo.quantize(64) if mode == "P" else photo.convert(mode)
            put("TIFF, " + {"RGB": "RGB", "L": "greyscale", "1": "one bit", "P": "palette", "RGBA": "alpha", "LA": "alpha", "CMYK": "CMYK"}[mode],
                f"tiff_{mode}_{compression}.tif", saved(image, "TIFF", compression=compression))
    for compression in ("group3", "group4", "tiff_ccitt"):
        put("TIFF, fax", f"tiff_{compression}.tif", saved(photo.convert("1"), "TIFF", compression=compression))
    for mode in ("RGB", "L", "YCbCr", "CMYK"):
        put("TIFF, JPEG inside", f"tiff_jpeg_{mode}.tif", saved(photo.convert(mode), "TIFF", compression="jpeg"))
    put("TIFF, YCbCr", "tiff_ycbcr.tif", saved(photo.convert("YCbCr"), "TIFF"))
    put("TIFF, CIE Lab", "tiff_lab.tif", tiff_of(base(w, h, 8, 8, 3), array.tobytes()))
    for orientation in range(1, 9):
        put("TIFF, orientation", f"tiff_turned_{orientation}.tif", saved(photo, "TIFF", tiffinfo={274: orientation}))
    put("TIFF, BigTIFF", "tiff_big.tif", saved(photo, "TIFF", big_tiff=True))
    put("TIFF, BigTIFF", "tiff_big_be.tif", tiff_of(base(w, h, 8, 2, 3), array.tobytes(), ">", True))
    put("TIFF, big-endian", "tiff_be.tif", tiff_of(base(w, h, 8, 2, 3), array.tobytes(), ">"))
    alpha = np.asarray(Image.linear_gradient("L").resize((w, h))).astype(int)
    associated = np.dstack([array.astype(int) * alpha[..., None] // 255, alpha]).astype("u1")
    for extra in (0, 1, 2):
        put("TIFF, alpha", f"tiff_extra_{extra}.tif", tiff_of(base(w, h, 8, 2, 4, _338=(3, [extra])), associated.tobytes()))
    put("TIFF, alpha", "tiff_extra_none.tif", tiff_of(base(w, h, 8, 2, 4), associated.tobytes()))
    for order in "<>":
        tag = "le" if order == "<" else "be"
        wide = (grey.astype("u4") * 257).astype(order + "u2")
        put("TIFF, 16 bits", f"tiff_grey16_{tag}.tif", tiff_of(base(w, h, 16, 1), wide.tobytes(), order))
        put("TIFF, 16 bits", f"tiff_grey16_dark_{tag}.tif", tiff_of(base(w, h, 16, 1), (wide // 200).astype(order + "u2").tobytes(), order))
        put("TIFF, 16 bits", f"tiff_rgb16_{tag}.tif", tiff_of(base(w, h, 16, 2, 3), (array.astype("u4") * 257).astype(order + "u2").tobytes(), order))
        put("TIFF, 32 bits", f"tiff_float_{tag}.tif", tiff_of(base(w, h, 32, 1, _339=(3, [3])), (grey * 1.3 - 20).astype(order + "f4").tobytes(), order))
        put("TIFF, 32 bits", f"tiff_int_{tag}.tif", tiff_of(base(w, h, 32, 1, _339=(3, [2])), (grey.astype("i4") * 2 - 99).astype(order + "i4").tobytes(), order))
    for bits in (1, 2, 4, 8):
        row = (grey >> (8 - bits))[..., None] >> np.arange(bits - 1, -1, -1) & 1
        packed = np.packbits(row.reshape(h, -1).astype("u1"), axis=1)
        for photometric in (0, 1):
            put("TIFF, greyscale", f"tiff_{bits}bit_{photometric}.tif", tiff_of(base(w, h, bits, photometric), packed.tobytes()))
        colors = np.random.RandomState(bits).randint(0, 65536, 3 << bits)
        put("TIFF, palette", f"tiff_palette_{bits}.tif", tiff_of(base(w, h, bits, 3, _320=(3, list(map(int, colors)))), packed.tobytes()))
    bits = np.packbits(grey > 127, axis=1, bitorder="little")
    put("TIFF, bit order", "tiff_fillorder.tif", tiff_of(base(w, h, 1, 1, _266=(3, [2])), bits.tobytes()))
    fax = saved(photo.convert("1"), "TIFF", compression="group4")
    with Image.open(io.BytesIO(fax)) as image:
        at, size = image.tag_v2[273][0], image.tag_v2[279][0]
    mirrored = bytes(int(f"{b:08b}"[::-1], 2) for b in fax[at:at + size])
    put("TIFF, bit order", "tiff_fax_fillorder.tif", tiff_of(base(w, h, 1, 0, compression=4, _266=(3, [2])), mirrored))
    planes = b"".join(array[..., i].tobytes() for i in range(3))
    put("TIFF, layouts", "tiff_planar.tif", tiff_of({**base(w, h, 8, 2, 3, _284=(3, [2])), 273: (4, [8, 8 + w * h, 8 + 2 * w * h]), 279: (4, [w * h] * 3)}, planes))
    strips = [array[y:y + 7].tobytes() for y in range(0, h, 7)]
    starts = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    put("TIFF, layouts", "tiff_strips.tif", tiff_of({**base(w, h, 8, 2, 3), 278: (4, [7]), 273: (4, starts), 279: (4, list(map(len, strips)))}, b"".join(strips)))
    tiles = []
    for y in range(0, h, 16):
        for x in range(0, w, 16):
            tile = np.zeros((16, 16, 3), "u1")
            part = array[y:y + 16, x:x + 16]
            tile[:part.shape[0], :part.shape[1]] = part
            tiles.append(tile.tobytes())
    tags = base(w, h, 8, 2, 3, _322=(3, [16]), _323=(3, [16]), _324=(4, [8 + 768 * i for i in range(len(tiles))]), _325=(4, [768] * len(tiles)))
    tags.pop(278)
    put("TIFF, layouts", "tiff_tiles.tif", tiff_of(tags, b"".join(tiles)))
    difference = np.concatenate([array[:, :1].astype(int), np.diff(array.astype(int), axis=1)], axis=1).astype("u1")
    put("TIFF, layouts", "tiff_predictor.tif", tiff_of(base(w, h, 8, 2, 3, compression=8, _317=(3, [2])), zlib.compress(difference.tobytes())))
    put("TIFF, several pages", "tiff_pages.tif", saved(photo, "TIFF", save_all=True, append_images=[photo.rotate(90), photo.convert("L")]))
    good = saved(photo, "TIFF")
    for percent in (5, 30, 60, 95):
        put("TIFF, cut short", f"tiff_cut_{percent}.tif", good[:len(good) * percent // 100])


def strangers():
    """What is no image, or none that is read; Pillow reads some of these."""
    put("other formats", "a.svg", b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>')
    put("other formats", "a.pdf", b"%PDF-1.7\n")
    put("other formats", "a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    put("other formats", "a.avif", saved(scene(20, 20), "AVIF"))
    put("other formats", "a.jxl", b"\xff\x0a" + bytes(30))
    put("other formats", "a.jp2", saved(scene(20, 20), "JPEG2000"))
    put("other formats", "a.ppm", saved(scene(20, 20), "PPM"))
    put("other formats", "a.ico", saved(scene(20, 20), "ICO"))
    put("other formats", "a.tga", saved(scene(20, 20), "TGA"))
    put("other formats", "a.txt", b"just some text")


# ---------------------------------------------------------------- comparison

def pillow(data, upright):
    try:
        image = Image.open(io.BytesIO(data))
        if upright:
            image = ImageOps.exif_transpose(image)
        image = image.convert("RGB")
        return dict(size=list(image.size), sha256=hashlib.sha256(image.tobytes()).hexdigest())
    except Exception as error:  # Pillow has no common class for what it raises
        return dict(error=f"{type(error).__name__}: {error}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", default=ROOT / "target/debug/examples/pixels")
    parser.add_argument("--only", default="")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--keep", type=pathlib.Path)
    parser.add_argument("--odd", action="store_true", help="write the files of tests/preprocess.rs")
    args = parser.parse_args()
    for make in (jpegs, pngs, gifs, others, tiffs, strangers):
        make()
    files = {name: value for name, value in FILES.items() if args.only in value[0] or args.only in name}
    chosen = {name: value for name, value in files.items() if value[0] in ODD and not name.startswith("exif_")} if args.odd else {}
    odd = []
    rows, bad = collections.defaultdict(collections.Counter), []
    with tempfile.TemporaryDirectory() as folder:
        folder = args.keep or pathlib.Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name, (_, data) in files.items():
            (folder / name).write_bytes(data)
        for upright in (False, True):
            asked = [name for name, (kind, _) in files.items() if not upright or "orientation" in kind or "metadata" in kind]
            if not asked:
                continue
            command = [args.pixels] + ["--upright"] * upright
            answers = subprocess.run(command, input="".join(f"{folder / name}\n" for name in asked), text=True, stdout=subprocess.PIPE, check=True)
            for name, line in zip(asked, answers.stdout.splitlines(), strict=True):
                kind, data = files[name]
                if name in chosen and not upright:
                    ours, theirs = json.loads(line), pillow(data, False)
                    if ("sha256" in ours) <= ("sha256" in theirs):
                        (ROOT / "tests/data/preprocess/odd" / name).write_bytes(data)
                        odd.append(dict(file=name, **theirs) if "sha256" in ours else dict(file=name, reason=ours["reason"]))
                theirs, ours = pillow(data, upright), json.loads(line)
                row = rows[kind]
                if "sha256" in theirs and "sha256" in ours:
                    same = theirs["sha256"] == ours["sha256"] and theirs["size"] == ours["size"]
                    row["same" if same else "different"] += 1
                    if not same:
                        bad.append(f"DIFFERENT {name}{' upright' * upright}")
                elif "sha256" in theirs:
                    why = next((why for part, why in REFUSED.items() if part in ours["error"]), None)
                    row["refused" if why or kind == "other formats" else "refused without reason"] += 1
                    if not why and kind != "other formats":
                        bad.append(f"REFUSED {name}: {ours['error']}")
                elif "sha256" in ours:
                    row["ours"] += 1
                    print(f"only nfold reads {name}: {theirs['error'][:100]}", file=sys.stderr)
                else:
                    row["neither"] += 1
                    if ours["reason"] == "panic":
                        bad.append(f"PANIC {name}")
    if args.odd:
        lines = ",\n".join(json.dumps(case) for case in odd)
        (ROOT / "tests/data/preprocess/odd/odd.json").write_text(f"[\n{lines}\n]\n")
    names = ("same", "different", "refused", "refused without reason", "ours", "neither")
    total = sum(rows.values(), collections.Counter())
    if args.table:
        print("| files | same bits | other bits | only Pillow reads | only nfold reads | neither reads |\n|---|---|---|---|---|---|")
        for kind, row in [*rows.items(), ("all", total)]:
            refused = row["refused"] + row["refused without reason"]
            print(f"| {kind} | {row['same']} | {row['different']} | {refused} | {row['ours']} | {row['neither']} |".replace("| 0 |", "| |").replace("| 0 |", "| |"))
    print(f"{sum(total.values())} comparisons with Pillow {PIL.__version__}: " + ", ".join(f"{total[n]} {n}" for n in names), file=sys.stderr)
    print("\n".join(bad), file=sys.stderr)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
