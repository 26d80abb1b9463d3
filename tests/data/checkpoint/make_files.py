"""Write files/: one small network in every kind of file that people have, by torch and timm themselves.

    python tests/data/checkpoint/make_files.py

The weights are those of tests/goldens/nf_regnet_tanh. Needs torch, timm and safetensors.
"""
import argparse
import json
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

HERE = Path(__file__).resolve().parent
GOLDEN = HERE.parent.parent / "goldens" / "nf_regnet_tanh"
OUT = HERE / "files"


def prefixed(state, prefix):
    return OrderedDict((prefix + name, value) for name, value in state.items())


def main():
    OUT.mkdir(exist_ok=True)
    state = OrderedDict(load_file(str(GOLDEN / "model.safetensors")))
    config = json.loads((GOLDEN / "config.json").read_text())
    averaged = OrderedDict((name, value * 1.25 if name == "head.fc.bias" else value) for name, value in state.items())
    args = argparse.Namespace(
        model=config["architecture"], img_size=96, input_size=None, mean=[0.5, 0.4, 0.3], std=[0.2, 0.2, 0.25],
        crop_pct=0.8, interpolation="bilinear", num_classes=7, in_chans=None, gp=None, bn_eps=None,
        model_kwargs=config["model_args"], train_crop_mode=None, lr=0.1, data_dir="data",
    )
    optimizer = {"state": {0: {"momentum_buffer": state["head.fc.bias"] * 0}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    train = {"epoch": 9, "arch": config["architecture"], "state_dict": state, "optimizer": optimizer, "version": 2,
             "args": args, "state_dict_ema": averaged, "metric": 71.5}
    torch.save(state, OUT / "state.pth")
    torch.save(train, OUT / "model_best.pth.tar")
    torch.save(state, OUT / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(train, OUT / "old.pth.tar", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": prefixed(state, "model."), "epoch": 1, "global_step": 10,
                "pytorch-lightning_version": "2.5.0", "hyper_parameters": {"lr": 0.1}, "loops": {}}, OUT / "lightning.ckpt")
    torch.save(prefixed(state, "module."), OUT / "ddp.pth")
    torch.save(prefixed(state, "_orig_mod."), OUT / "compiled.pth")
    torch.save({"model": prefixed(state, "module._orig_mod.")}, OUT / "wrapped.pt")
    torch.save({"epoch": 3, "net": state, "accuracy": 0.9}, OUT / "net.pth")
    torch.save(OrderedDict((k, torch.nn.Parameter(v) if v.is_floating_point() else v) for k, v in state.items()), OUT / "parameters.pth")
    torch.save(OrderedDict((k, v.contiguous(memory_format=torch.channels_last) if v.ndim == 4 else v) for k, v in state.items()), OUT / "channels_last.pth")
    torch.save(OrderedDict((k, v.half()) for k, v in state.items()), OUT / "half.pth")
    torch.save(state, OUT / "protocol4.pth", pickle_protocol=4)
    save_file(state, str(OUT / "told.safetensors"), metadata={"format": "pt", "architecture": config["architecture"]})
    save_file(prefixed(state, "timm_model."), str(OUT / "wrapper.safetensors"), metadata={"format": "pt"})


if __name__ == "__main__":
    main()
