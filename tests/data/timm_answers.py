"""Prints timm's answers for the photographs in this folder (cifar10.json) as the JSON lines that `nfold eval --against` takes."""
import json
from pathlib import Path

LABELS = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
answers = json.loads((Path(__file__).parent / "cifar10.json").read_text())["images"]
for image, answer in answers.items():
    print(json.dumps({"image": image, "predictions": [{"index": answer["top1"], "label": LABELS[answer["top1"]]}]}))
