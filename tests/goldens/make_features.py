"""Features, last maps and class activation maps of some of the goldens beside this file, by timm in double precision.

    python make_features.py        # writes features.safetensors

Needs torch, timm and safetensors. Of `input.0` of each golden: `NAME.features` is forward_head(forward_features(x), pre_logits=True),
`NAME.map` is forward_features(x), and where the head averages, `NAME.cam` is each class's row of the head times the map.
"""
import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import make_more

HERE = Path(__file__).resolve().parent
NAMES = [
    # gamma in the activations and in the weights, attention, activations
    "nf_regnet_small", "nf_regnet_celu", "nf_regnet_tanh", "eca_nfnet_l0_small", "dm_nfnet_f0_small", "nfnet_l0_small", "nf_seresnet_small",
    # other inputs and poolings
    "nf_regnet_grey", "nf_resnet_channels", "nfnet_both", "resnet50d_dilated",
    # batch normalisation, widths that are no whole blocks
    "resnet18_small", "regnety_small", "regnetx_small", "efficientnet_odd", "tf_efficientnet_small",
]


def main():
    found = {}
    for name in NAMES:
        config = json.loads((HERE / name / "config.json").read_text())
        args = {key: tuple(value) if isinstance(value, list) else value for key, value in config["model_args"].items()}
        classes = args.pop("num_classes")
        make = make_more.create
        if classes != 7:  # of the goldens that were made before
            import timm
            make = lambda architecture, args: timm.create_model(architecture, num_classes=classes, **args).eval()
        model = make(config["architecture"], args)
        model.load_state_dict(load_file(HERE / name / "model.safetensors"))
        model.double()
        x = load_file(HERE / name / "golden.safetensors")["input.0"].double()
        with torch.no_grad():
            map = model.forward_features(x)
            features = model.forward_head(map, pre_logits=True)
            found |= {f"{name}.map": map, f"{name}.features": features}
            assert torch.allclose(model.get_classifier()(features), model(x), rtol=1e-9), name
            if args.get("global_pool", "avg") == "avg":
                found[f"{name}.cam"] = torch.einsum("kc,nchw->nkhw", model.get_classifier().weight, map)
        print(name, tuple(map.shape), tuple(features.shape))
    save_file({key: value.contiguous() for key, value in found.items()}, str(HERE / "features.safetensors"))


main()
