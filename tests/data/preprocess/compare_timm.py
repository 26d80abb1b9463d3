"""How far nfold's preprocessing is from Pillow + timm on real photographs, decoding included.

    python tests/data/preprocess/compare_timm.py CIFAR_ZIP [FOLDER]

Encodes 200 CIFAR-10 test photographs (as PNG and as JPEG) and the photographs of scikit-image and scikit-learn at
several sizes and encodings, runs `cargo test … write_tensors` on them (NFOLD_CARGO replaces the `cargo test` part), and
prints the differences of the tensors in levels of 255. NFOLD_JPEG_SCALE=fast scales JPEGs. Top-1 agreement:
compare_top1.py.
"""
import collections
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

import numpy as np
from PIL import Image
from skimage import data
from sklearn.datasets import load_sample_images
from timm.data import create_transform

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PREPROCESSING = dict(height=256, width=256, crop_pct=0.9, crop_mode="center", interpolation="bicubic", mean=MEAN, std=STD)
ENCODINGS = {
    "png": ("PNG", {}),
    "jpeg_420_q90": ("JPEG", dict(quality=90, subsampling="4:2:0")),
    "jpeg_420_q60": ("JPEG", dict(quality=60, subsampling="4:2:0")),
    "jpeg_444_q95": ("JPEG", dict(quality=95, subsampling="4:4:4")),
    "jpeg_progressive": ("JPEG", dict(quality=85, progressive=True)),
    "webp_q85": ("WEBP", dict(quality=85)),
}


def photographs(archive):
    """kind, image, encodings"""
    with zipfile.ZipFile(archive) as files:
        names = sorted(n for n in files.namelist() if n.lower().endswith((".png", ".jpg", ".jpeg")))
        for name in names[:: max(1, len(names) // 200)][:200]:
            yield "cifar", Image.open(io.BytesIO(files.read(name))).convert("RGB"), ("png", "jpeg_420_q90")
    found = [getattr(data, name)() for name in ("astronaut", "chelsea", "coffee")] + list(load_sample_images().images)
    for pixels in found:
        image = Image.fromarray(pixels[..., :3])
        for long in (96, 320, 500, 1000, 1920):
            size = [max(1, round(side * long / max(image.size))) for side in image.size]
            yield f"photo {long}", image.resize(size, Image.Resampling.LANCZOS), tuple(ENCODINGS)


def main():
    archive, folder = sys.argv[1], pathlib.Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, (kind, image, encodings) in enumerate(photographs(archive)):
        for encoding in encodings:
            format, options = ENCODINGS[encoding]
            path = folder / f"{number:04}_{encoding}.{format.lower()}"
            image.save(path, format, **options)
            files.append((kind, encoding, path))
    (folder / "list.txt").write_text("".join(f"{path}\n" for _, _, path in files))
    command = os.environ.get("NFOLD_CARGO", "cargo test --release --test tests").split()
    subprocess.run([*command, "--", "--ignored", "--exact", "preprocess::write_tensors"], check=True, stdout=sys.stderr,
                   env={**os.environ, "NFOLD_COMPARE": str(folder / "list.txt"), "NFOLD_PREPROCESSING": json.dumps(PREPROCESSING)})
    transform = create_transform(input_size=(3, 256, 256), is_training=False, interpolation="bicubic", mean=MEAN, std=STD,
                                 crop_pct=0.9, crop_mode="center")
    found = collections.defaultdict(list)
    for kind, encoding, path in files:
        theirs = transform(Image.open(path).convert("RGB")).numpy()
        ours = np.fromfile(f"{path}.tensor", "<f4").reshape(theirs.shape)
        levels = np.abs(ours.astype(np.float64) - theirs) * np.array(STD)[:, None, None] * 255
        found[encoding].append((levels.max(), levels.mean(), kind == "cifar", ours.tobytes() == theirs.tobytes()))
    print(f"{len(files)} files of {len({p.name[:4] for _, _, p in files})} photographs")
    for encoding, rows in sorted(found.items()) + [("all", sum(found.values(), []))]:
        largest, mean, _, same = map(np.array, zip(*rows))
        print(f"{encoding:18} {len(rows):4} files  max {largest.max():6.2f}  mean of max {largest.mean():5.2f}  "
              f"mean {mean.mean():.4f}  bit-equal {same.sum()}")


if __name__ == "__main__":
    main()
