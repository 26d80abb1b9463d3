"""Goldens for networks of one channel: images as timm prepares them (Pillow's `convert("L")`), and what timm answers.

    python make_grey.py

Needs torch, torchvision, timm, safetensors and Pillow 13. Reads images/ and ../../goldens/nf_regnet_grey, writes grey.json.
"""
import hashlib
import json
import pathlib

import PIL
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform

HERE = pathlib.Path(__file__).parent
CHECKPOINT = HERE.parent.parent / "goldens/nf_regnet_grey"
SETTINGS = [
    dict(height=40, width=40, crop_pct=0.875, crop_mode="center", interpolation="bicubic", mean=[0.449], std=[0.226]),
    dict(height=32, width=50, crop_pct=0.9, crop_mode="squash", interpolation="bilinear", mean=[0.5], std=[0.25]),
    dict(height=64, width=48, crop_pct=1.0, crop_mode="border", interpolation="lanczos", mean=[0.449], std=[1.0]),
    dict(height=20, width=20, crop_pct=0.8, crop_mode="center", interpolation="nearest", mean=[0.0], std=[1.0]),
]


def prepared(file, p):
    transform = create_transform(
        input_size=(1, p["height"], p["width"]), is_training=False, interpolation=p["interpolation"], mean=p["mean"],
        std=p["std"], crop_pct=p["crop_pct"], crop_mode=p["crop_mode"],
    )
    return transform(Image.open(HERE / "images" / file).convert("L"))


def main():
    files = sorted(path.name for path in (HERE / "images").iterdir() if not path.name.startswith("exif"))
    cases = []
    for file in files:
        for p in SETTINGS:
            try:
                tensor = prepared(file, p)
            except OSError:  # Pillow does not read it
                continue
            sha256 = hashlib.sha256(tensor.numpy().astype("<f4").tobytes()).hexdigest()
            cases.append(dict(file=file, preprocessing=p, sha256=sha256))
    config = json.loads((CHECKPOINT / "config.json").read_text())
    args = {key: value for key, value in config["model_args"].items() if value is not None}
    model = timm.create_model(config["architecture"], **args).eval()
    model.load_state_dict(load_file(CHECKPOINT / "model.safetensors"))
    cfg = config["pretrained_cfg"]
    p = dict(
        height=cfg["test_input_size"][1], width=cfg["test_input_size"][2], crop_pct=cfg["crop_pct"], mean=cfg["mean"],
        std=cfg["std"], interpolation=cfg["interpolation"], crop_mode=cfg["crop_mode"],
    )
    answers = []
    with torch.no_grad():
        for file in ("jpeg_420.jpg", "png_palette.png", "png_grey.png"):
            answers.append(dict(file=file, logits=model.double()(prepared(file, p)[None].double())[0].tolist()))
    versions = dict(pillow=PIL.__version__, timm=timm.__version__)
    (HERE / "grey.json").write_text(json.dumps(dict(versions=versions, tensors=cases, answers=answers), indent=0) + "\n")
    print(len(cases), versions)


if __name__ == "__main__":
    main()
