"""Write cifar10.json: what timm itself says about the photographs in this folder.

Loads models/nf_regnet_cifar10 with timm, applies timm's own evaluation transform to
cat.jpg and to every file of cifar10/CLASS/, and records class and logits of each.
Run it again whenever the checkpoint changes:

    python tests/data/timm_reference.py [--model DIR] [--out FILE]

Needs torch, timm, pillow and safetensors; the versions used are recorded in the file.
"""
import argparse
import json
from pathlib import Path

import PIL
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


def load_model(folder):
    """The network of a folder in timm's layout, its transform and its label names."""
    config = json.loads((folder / "config.json").read_text())
    args = dict(config["model_args"])
    args.setdefault("num_classes", config["num_classes"])
    model = timm.create_model(config["architecture"], pretrained=False, **args)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    data = resolve_data_config({}, pretrained_cfg=config["pretrained_cfg"], use_test_size=True)
    return model.eval(), create_transform(**data, is_training=False), config["label_names"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "nf_regnet_cifar10")
    parser.add_argument("--out", type=Path, default=HERE / "cifar10.json")
    args = parser.parse_args()

    model, transform, labels = load_model(args.model)

    def classify(paths):
        batch = torch.stack([transform(Image.open(p).convert("RGB")) for p in paths])
        with torch.inference_mode():
            logits = model(batch)
        return [
            {"top1": int(row.argmax()), "logits": [float(f"{v:.6g}") for v in row.tolist()]}
            for row in logits
        ]

    images, right = {}, 0
    for index, label in enumerate(labels):
        paths = sorted((HERE / "cifar10" / label).glob("*.jpg"))
        for path, answer in zip(paths, classify(paths)):
            images[f"{label}/{path.name}"] = answer
            right += answer["top1"] == index
    result = {
        "timm": timm.__version__,
        "torch": torch.__version__.split("+")[0],
        "pillow": PIL.__version__,
        "accuracy": right / len(images),
        "images": images,
        "cat.jpg": classify([HERE / "cat.jpg"])[0],
    }
    # One line per photograph keeps the file readable and its differences small.
    body = ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in images.items())
    head = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in result.items() if k != "images"]
    args.out.write_text(
        "{\n" + ",\n".join(head) + ',\n  "images": {\n' + body + "\n  }\n}\n"
    )
    print(f"{right} of {len(images)} right; wrote {args.out}")


if __name__ == "__main__":
    main()
