"""From an encoded JPEG to the network's tensor: nfold, Pillow, OpenCV and torchvision, one thread each, in one run.

    make bench-pixels

Each decodes the same file, resizes it to a short side of 248 by the checkpoint's filter (bicubic, with the support widened by
the reduction), takes the middle 224 x 224 and normalises it. OpenCV has no such filter: its pixels are resized by torch's. The
median of interleaved rounds is printed, in milliseconds.
"""
import argparse
import io
import json
import pathlib
import statistics
import subprocess
import tempfile
import time

import cv2
import numpy as np
import torch
import torchvision
from PIL import Image
from torchvision.transforms.v2 import functional as F

ROOT = pathlib.Path(__file__).resolve().parents[1]
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
torch.set_num_threads(1)
cv2.setNumThreads(1)


def by_pillow(data):
    image = Image.open(io.BytesIO(data)).convert("RGB")
    ratio = 248 / min(image.size)
    image = image.resize([int(side * ratio) for side in image.size], Image.Resampling.BICUBIC)
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), dtype=np.float32)
    return ((pixels / 255 - MEAN) / STD).transpose(2, 0, 1).copy()


def by_torch(pixels):
    pixels = F.resize(pixels, [248], interpolation=F.InterpolationMode.BICUBIC, antialias=True)
    pixels = F.center_crop(pixels, [224, 224])
    return F.normalize(F.to_dtype(pixels, torch.float32, scale=True), MEAN.tolist(), STD.tolist())


def by_torchvision(data):
    return by_torch(torchvision.io.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8)))


def by_opencv(data):
    pixels = cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)
    return by_torch(torch.from_numpy(pixels).permute(2, 0, 1))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", default=ROOT / "target/release/examples/pixels")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    photo = Image.open(ROOT / "tests/data/cat.jpg").convert("RGB")
    others = {"Pillow": by_pillow, "OpenCV + torch": by_opencv, "torchvision": by_torchvision}
    print("JPEG (4:2:0, quality 90) |", " | ".join(["nfold", *others]))
    with tempfile.TemporaryDirectory() as folder:
        for width, height in ((500, 375), (1920, 1080), (4000, 3000)):
            path = pathlib.Path(folder) / f"{width}x{height}.jpg"
            photo.resize((width, height), Image.Resampling.BICUBIC).save(path, quality=90)
            data, times = path.read_bytes(), {name: [] for name in ["nfold", *others]}
            for _ in range(args.rounds):
                answer = subprocess.run([args.pixels, "--time", "5"], input=f"{path}\n", text=True, stdout=subprocess.PIPE, check=True)
                times["nfold"].append(json.loads(answer.stdout)["ms"])
                for name, run in others.items():
                    started = time.perf_counter()
                    run(data)
                    times[name].append((time.perf_counter() - started) * 1e3)
            print(f"{width}x{height} |", " | ".join(f"{statistics.median(t):.2f}" for t in times.values()))


if __name__ == "__main__":
    main()
