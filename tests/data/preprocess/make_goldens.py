"""Makes the goldens of tests/preprocess.rs: what Pillow and timm answer.

    pip install pillow==13.0.0 timm==1.0.31 torchvision scikit-image
    python tests/data/preprocess/make_goldens.py

Writes goldens.json (hashes, with the versions that made them), images/ (encoded files) and bombs/. Sources of the resize cases are computed (`pattern`), the same way in Rust.
"""
import hashlib
import io
import json
import pathlib
import struct
import zlib

import numpy as np
import PIL
import timm
import torch
import torchvision
from PIL import Image, ImageOps
from skimage import data
from timm.data import create_transform

HERE = pathlib.Path(__file__).parent
FILTERS = {name: getattr(Image.Resampling, name.upper()) for name in ("nearest", "box", "bilinear", "bicubic", "lanczos")}


def pattern(width, height, kind):
    """Noise, black and white noise, or a smooth sawtooth; the test has the same function."""
    i = np.arange(width * height * 3, dtype=np.uint64)
    h = (i * 2654435761 + 40503) & 0xFFFFFFFF
    h ^= h >> np.uint64(15)
    h = (h * 2246822519) & 0xFFFFFFFF
    h ^= h >> np.uint64(13)
    y, rest = np.divmod(i, width * 3)
    x, c = np.divmod(rest, 3)
    v = {"noise": h & 255, "edges": (h & 1) * 255, "smooth": (x * 3 + y * 5 + c * 85) & 255}[kind]
    return Image.fromarray(v.astype(np.uint8).reshape(height, width, 3))


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


# width, height -> width, height
SHAPES = [
    (1, 1, 1, 1), (1, 1, 7, 5), (7, 5, 1, 1), (1, 64, 9, 9), (64, 1, 9, 9), (2, 3, 3, 2), (5, 5, 5, 5), (5, 5, 5, 9),
    (5, 9, 5, 5), (9, 5, 5, 5), (8, 8, 16, 16), (16, 16, 8, 8), (17, 13, 16, 16), (33, 31, 32, 32), (31, 33, 32, 32),
    (32, 32, 32, 31), (32, 32, 31, 32), (100, 75, 57, 43), (75, 100, 43, 57), (64, 48, 37, 28), (48, 64, 28, 37),
    (97, 89, 61, 53), (128, 96, 96, 96), (96, 128, 96, 96), (200, 10, 20, 20), (10, 200, 20, 20), (20, 200, 20, 20),
    (200, 20, 20, 20), (23, 300, 23, 16), (300, 23, 16, 23), (1000, 2, 10, 2), (2, 1000, 2, 10), (1000, 1, 100, 1),
    (1, 1000, 1, 100), (3, 700, 33, 7), (700, 3, 7, 33), (500, 375, 64, 48), (375, 500, 48, 64), (320, 240, 40, 30),
    (300, 900, 94, 284), (60, 40, 426, 284), (255, 257, 256, 256), (257, 255, 128, 129), (640, 427, 336, 224),
    (427, 640, 224, 336), (150, 150, 151, 151), (11, 11, 200, 3), (11, 400, 200, 3), (400, 11, 3, 200), (40, 81, 40, 40),
    # around the rule of which pass is first: h - nh against 2 (w - nw)
    (60, 101, 40, 60), (60, 100, 40, 60), (60, 99, 40, 60), (40, 61, 40, 60), (39, 60, 40, 61), (30, 90, 40, 60),
    (90, 90, 89, 88), (90, 90, 89, 87), (90, 90, 89, 86),
]


def resizes():
    for number, (w, h, nw, nh) in enumerate(SHAPES):
        kind = ("noise", "edges", "smooth")[number % 3]
        for name, resample in FILTERS.items():
            out = np.asarray(pattern(w, h, kind).resize((nw, nh), resample))
            yield dict(source=[w, h], kind=kind, target=[nw, nh], filter=name, sha256=sha(out))


IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5,) * 3, (0.5,) * 3)
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))


def transforms():
    sources = [(32, 32), (500, 375), (375, 500), (300, 900), (60, 40), (41, 61), (1, 1), (1, 50), (50, 1), (640, 7),
               (36, 36), (37, 36), (224, 224), (33, 47)]
    sizes = [(32, 32), (64, 64), (65, 65), (48, 64), (64, 49), (33, 31)]
    for number, (w, h) in enumerate(sources):
        for mode in ("center", "squash", "border"):
            for other, (height, width) in enumerate(sizes):
                pick = number + other
                pct = (0.875, 0.9, 0.95, 1.0, 0.99, 1.15)[pick % 6]
                interpolation = ("bicubic", "bilinear", "bicubic", "lanczos", "nearest", "box")[(pick + number) % 6]
                mean, std = (IMAGENET, HALF, CIFAR)[pick % 3]
                t = create_transform(input_size=(3, height, width), is_training=False, interpolation=interpolation,
                                     mean=mean, std=std, crop_pct=pct, crop_mode=mode)
                try:
                    tensor = t(pattern(w, h, "noise")).numpy()
                except ValueError as error:  # border mode shrinks a side to nothing
                    assert "must be > 0" in str(error) and mode == "border"
                    continue
                yield dict(source=[w, h], sha256=sha(tensor.astype("<f4")), preprocessing=dict(
                    height=height, width=width, crop_pct=pct, crop_mode=mode, interpolation=interpolation, mean=mean, std=std))


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth, color, raw, interlace=0, before=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b""))


def deep(array, color):
    """A 16-bit PNG; Pillow writes none but greyscale."""
    h, w = array.shape[:2]
    return png(w, h, 16, color, b"".join(b"\0" + row.astype(">u2").tobytes() for row in array))


def interlaced(array):
    h, w = array.shape[:2]
    raw = b""
    for x, y, dx, dy in ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)):
        for row in array[y::dy, x::dx]:
            raw += b"\0" + row.tobytes() if row.size else b""
    return png(w, h, 8, 2, raw, interlace=1)


def saved(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def encodings():
    """name, bytes"""
    photo = Image.fromarray(data.astronaut()).crop((160, 30, 352, 174)).resize((96, 72), Image.Resampling.LANCZOS)
    array = np.asarray(photo)
    alpha = Image.fromarray(np.add.outer(np.arange(72), np.arange(96)).astype(np.uint8))
    rgba = photo.copy()
    rgba.putalpha(alpha)
    grey, palette = photo.convert("L"), photo.quantize(64)
    la = Image.merge("LA", (grey, alpha))
    wide = (array.astype(np.uint32) * 257 + np.arange(96)[None, :, None] * 2 % 256).clip(0, 65535).astype(np.uint16)
    wide_alpha = (np.asarray(alpha).astype(np.uint16) * 257)[..., None]

    jpeg = lambda image=photo, **o: saved(image, "JPEG", **{"quality": 90, **o})
    yield "jpeg_420.jpg", jpeg(subsampling="4:2:0")
    yield "jpeg_422.jpg", jpeg(subsampling="4:2:2")
    yield "jpeg_444.jpg", jpeg(subsampling="4:4:4")
    yield "jpeg_progressive.jpg", jpeg(progressive=True)
    yield "jpeg_restart.jpg", jpeg(restart_marker_blocks=3)
    yield "jpeg_optimised_q30.jpg", jpeg(quality=30, optimize=True)
    yield "jpeg_rgb.jpg", jpeg(keep_rgb=True)
    yield "jpeg_grey.jpg", jpeg(grey)
    cmyk = jpeg(photo.convert("CMYK"))
    yield "jpeg_cmyk.jpg", cmyk
    at = cmyk.index(b"Adobe") + 11
    yield "jpeg_ycck.jpg", cmyk[:at] + b"\2" + cmyk[at + 1:]
    yield "jpeg_trailing.jpg", jpeg() + b"\xff\xd8trailing bytes"
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield f"exif_{orientation}.png", saved(photo.resize((24, 16)), "PNG", exif=exif)
    exif = Image.Exif()
    exif[0x0112] = 6
    yield "exif_6.jpg", jpeg(exif=exif)
    yield "png_rgb.png", saved(photo, "PNG")
    yield "png_rgb_transparent.png", saved(photo, "PNG", transparency=tuple(int(v) for v in array[0, 0]))
    yield "png_rgba.png", saved(rgba, "PNG")
    yield "png_grey.png", saved(grey, "PNG")
    yield "png_grey_alpha.png", saved(la, "PNG")
    yield "png_palette.png", saved(palette, "PNG")
    yield "png_palette_2.png", saved(photo.quantize(4), "PNG", bits=2)
    yield "png_palette_transparent.png", saved(palette, "PNG", transparency=7)
    yield "png_1_bit.png", saved(photo.convert("1"), "PNG")
    yield "png_interlaced.png", interlaced(array)
    yield "png_rgb_16.png", deep(wide, 2)
    yield "png_rgba_16.png", deep(np.concatenate([wide, wide_alpha], 2), 6)
    yield "png_grey_alpha_16.png", deep(np.concatenate([wide[..., :1], wide_alpha], 2), 4)
    yield "png_grey_16.png", deep(wide[..., :1], 0)
    yield "webp_lossy.webp", saved(photo, "WEBP", quality=90)
    yield "webp_lossy_alpha.webp", saved(rgba, "WEBP", quality=90)
    yield "webp_lossless.webp", saved(photo, "WEBP", lossless=True)
    small = photo.resize((48, 36))
    yield "webp_animated.webp", saved(small, "WEBP", lossless=True, save_all=True, append_images=[ImageOps.invert(small)])
    yield "gif.gif", saved(palette, "GIF", interlace=0)
    yield "gif_interlaced.gif", saved(palette, "GIF", interlace=1)
    yield "gif_animated.gif", saved(small.quantize(64), "GIF", save_all=True, append_images=[ImageOps.invert(small).quantize(64)])
    yield "gif_transparent.gif", saved(palette, "GIF", transparency=7)
    # a first frame that covers part of the screen: the rest is the background
    inner = bytearray(saved(small.quantize(64), "GIF"))
    inner[6:10] = struct.pack("<HH", 60, 50)
    at = inner.index(b"\x2c\0\0\0\0\x30\0\x24\0")
    inner[at + 1:at + 5] = struct.pack("<HH", 5, 7)
    yield "gif_part.gif", bytes(inner)
    yield "bmp_24.bmp", saved(small, "BMP")
    yield "bmp_8.bmp", saved(small.quantize(64), "BMP")
    yield "bmp_1.bmp", saved(photo.convert("1"), "BMP")
    yield "bmp_32.bmp", saved(small.convert("RGBA"), "BMP")
    yield "tiff_raw.tif", saved(small, "TIFF")
    yield "tiff_lzw.tif", saved(photo, "TIFF", compression="tiff_lzw")
    yield "tiff_deflate.tif", saved(photo, "TIFF", compression="tiff_adobe_deflate")
    yield "tiff_packbits.tif", saved(palette.convert("L"), "TIFF", compression="packbits")
    yield "tiff_rgba.tif", saved(rgba, "TIFF", compression="tiff_lzw")


def images():
    folder = HERE / "images"
    folder.mkdir(exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for name, encoded in encodings():
        (folder / name).write_bytes(encoded)
        image = Image.open(io.BytesIO(encoded))
        upright = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
        pixels = np.asarray(image.convert("RGB"))
        yield dict(file=name, size=list(image.size), sha256=sha(pixels), upright_size=list(upright.shape[1::-1]),
                   upright_sha256=sha(upright))


def drafts():
    """JPEGs decoded for a smaller target by Pillow's `draft`: libjpeg scales inside the inverse DCT."""
    for path in sorted((HERE / "images").glob("jpeg_*.jpg")):
        for target in ((96, 72), (49, 36), (48, 36), (47, 20), (30, 30), (24, 18), (13, 9), (12, 9), (1, 1)):
            image = Image.open(path)
            image.draft(None, target)
            pixels = np.asarray(image.convert("RGB"))
            yield dict(file=path.name, target=list(target), size=list(image.size), sha256=sha(pixels))


def bombs():
    folder = HERE / "bombs"
    folder.mkdir(exist_ok=True)
    zeros = lambda n: bytes(n)
    write = lambda name, body: (folder / name).write_bytes(body)
    # 100 million pixels that are honest about it
    write("pixels.png", png(10000, 10000, 8, 0, zeros(10001 * 10000)))
    # 64 x 64 pixels, then 96 MiB that no pixel needs; the same in a colour profile and in text
    row = zeros(64 * 3 + 1) * 64
    write("idat.png", png(64, 64, 8, 2, row + zeros(96 << 20)))
    packed = zlib.compress(zeros(96 << 20), 9)
    write("profile.png", png(64, 64, 8, 2, row, before=chunk(b"iCCP", b"bomb\0\0" + packed)))
    Image.new("RGB", (4000, 4000)).save(folder / "lossy.webp", quality=1, method=0)
    write("text.png", png(64, 64, 8, 2, row, before=chunk(b"zTXt", b"bomb\0\0" + packed)))


if __name__ == "__main__":
    versions = dict(pillow=PIL.__version__, timm=timm.__version__, torch=torch.__version__, torchvision=torchvision.__version__)
    goldens = dict(versions=versions, resize=list(resizes()), transforms=list(transforms()), images=list(images()),
                   drafts=list(drafts()))
    lines = ",\n".join(
        f'"{key}": ' + ("[\n" + ",\n".join(json.dumps(case) for case in value) + "\n]" if isinstance(value, list) else json.dumps(value))
        for key, value in goldens.items())
    (HERE / "goldens.json").write_text("{\n" + lines + "\n}\n")
    bombs()
    print({key: len(value) for key, value in goldens.items()}, versions)
