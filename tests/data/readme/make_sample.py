"""Write my_classifier/: a small network as timm's own save_for_hf saves it without any option.

    python tests/data/readme/make_sample.py

`tests/readme.py` folds it, and takes it for the README's training example where torch is absent. Needs torch and timm.
"""
from pathlib import Path

import timm
import torch

torch.manual_seed(0)
model = timm.create_model("nf_regnet_b1", num_classes=3, depths=[1, 1, 1, 1], channels=[16, 32, 48, 64], num_features=64, stem_chs=16)
timm.models.save_for_hf(model, str(Path(__file__).resolve().parent / "my_classifier"))
