"""How often nfold names the class that Pillow + timm name, on real photographs, decoding included.

    python tests/data/preprocess/compare_top1.py CIFAR_ZIP NFOLD [--jpeg-scale exact|fast]

NFOLD is the program. Folds models/nf_regnet_cifar10, classifies the files of compare_timm.py with it, and asks timm with
its own transform about the same files. Prints agreements by kind and encoding, and the closest of the disagreements.
"""
import argparse
import collections
import json
import pathlib
import subprocess
import sys
import tempfile

import torch
from PIL import Image

HERE = pathlib.Path(__file__).resolve().parent
sys.path += [str(HERE), str(HERE.parent)]
from compare_timm import ENCODINGS, photographs  # noqa: E402
from timm_reference import ROOT, load_model  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive")
    parser.add_argument("nfold")
    parser.add_argument("--jpeg-scale", default="exact")
    args = parser.parse_args()
    checkpoint = ROOT / "models" / "nf_regnet_cifar10"
    model, transform, _ = load_model(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        files = []
        for number, (kind, image, encodings) in enumerate(photographs(args.archive)):
            for encoding in encodings:
                format, options = ENCODINGS[encoding]
                path = folder / f"{number:04}_{encoding}.{format.lower()}"
                image.save(path, format, **options)
                files.append((kind.split()[0], encoding, path))
        repository = folder / "repository"
        subprocess.run([args.nfold, "fold", checkpoint, "--repository", repository], check=True, stdout=subprocess.DEVNULL)
        command = [args.nfold, "classify", "--json", "--top-k", "1", "--repository", repository]
        command += ["--jpeg-scale", args.jpeg_scale]
        lines = subprocess.run([*command, *(path for _, _, path in files)], check=True, stdout=subprocess.PIPE, text=True)
        ours = [json.loads(line)["predictions"][0]["index"] for line in lines.stdout.splitlines()]
        assert len(ours) == len(files)
        agreed, margins = collections.Counter(), []
        asked = collections.Counter((kind, encoding) for kind, encoding, _ in files)
        for (kind, encoding, path), index in zip(files, ours):
            with torch.inference_mode():
                logits = model(transform(Image.open(path).convert("RGB"))[None])[0]
            agreed[kind, encoding] += index == int(logits.argmax())
            if index != int(logits.argmax()):
                margins.append((float(logits.max() - logits[index]), path.name))
    for key, count in sorted(asked.items()):
        print(f"{key[0]:8} {key[1]:18} {agreed[key]:4} of {count}")
    for kind in sorted({kind for kind, _ in asked}):
        of = lambda counter: sum(n for (k, _), n in counter.items() if k == kind)
        print(f"{kind:8} all                {of(agreed):4} of {of(asked)}")
    print("logits that the class timm names is ahead where they disagree:", sorted(margins))


if __name__ == "__main__":
    main()
