"""Write spp.json: hidden activations of golden checkpoints as timm computes them, in double precision.

For each residual block: average channel squared mean and average channel variance of its
output (before a last activation) and of its residual branch (before alpha and SkipInit's gain),
on the first input of the golden. Run it again when the goldens change:

    python tests/data/spp_reference.py

Needs torch, timm and safetensors; the versions used are recorded in the file.
"""
import json
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
NAMES = ["nf_regnet_small", "nf_seresnet_small", "dm_nfnet_f0_small", "eca_nfnet_l0_small", "resnet50d_small"]


def moments(x):
    """Average channel squared mean, average channel variance."""
    mean = x.mean(dim=(0, 2, 3))
    return [(mean**2).mean().item(), x.var(dim=(0, 2, 3), unbiased=False).mean().item()]


def nf_block(block, x, out):
    """Undo a NormFreeBlock's last line, out * alpha + shortcut."""
    shortcut = x
    if block.downsample is not None:
        shortcut = block.downsample(block.act1(x.clone()) * block.beta)
    scale = block.alpha
    if block.skipinit_gain is not None:
        scale = scale * block.skipinit_gain
    return out, (out - shortcut) / scale


def bn_block(block, branch, x):
    """The sum in front of a ResNet block's last activation."""
    shortcut = block.downsample(x) if block.downsample is not None else x
    return branch + shortcut, branch


def profile(name):
    folder = HERE.parent / "goldens" / name
    config = json.loads((folder / "config.json").read_text())
    args = {k: v for k, v in config["model_args"].items() if k != "in_chans"}
    model = timm.create_model(config["architecture"], pretrained=False, **args)
    model.load_state_dict(load_file(folder / "model.safetensors"))
    model.eval().double()
    found = {}

    def watch(block_name, block):
        if type(block).__name__ == "NormFreeBlock":
            def hook(module, inputs, out):
                found[block_name] = nf_block(module, inputs[0], out)
            block.register_forward_hook(hook)
        else:
            inputs = {}
            block.register_forward_pre_hook(lambda module, args: inputs.update(x=args[0].clone()))
            last = block.bn3 if hasattr(block, "bn3") else block.bn2
            # the sum is taken in place: keep the branch as it is now
            def hook(module, args, out):
                found[block_name] = bn_block(block, out.clone(), inputs["x"])
            last.register_forward_hook(hook)

    for block_name, block in model.named_modules():
        if type(block).__name__ in ("NormFreeBlock", "Bottleneck", "BasicBlock"):
            watch(block_name, block)
    with torch.no_grad():
        model(load_file(folder / "golden.safetensors")["input.0"].double())
    return [{"block": n, "output": moments(o), "residual": moments(r)} for n, (o, r) in found.items()]


def main():
    versions = {"timm": timm.__version__, "torch": torch.__version__}
    report = {"versions": versions, "goldens": {name: profile(name) for name in NAMES}}
    (HERE / "spp.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
