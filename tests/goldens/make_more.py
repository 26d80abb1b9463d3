"""Goldens for the corners of the configuration space: dilation, deep stems, every activation, BN variants.

    python make_more.py OUT_DIR [NAME ...]

Needs torch, timm and safetensors. Each case, or each one named, becomes OUT_DIR/NAME/{config.json,model.safetensors,golden.safetensors}
in the layout of the other goldens: `input.K`, `logits.K` (timm in double precision), `logits32.K` (in single).
Parameters are moved off their initial values, at which a scalar folded into the wrong place would go unseen.
Also writes OUT_DIR/architectures.json: parameters, tensors and evaluation settings of every architecture named.
"""
import hashlib
import json
import sys
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from timm.models._hub import save_for_hf
from timm.models import efficientnet

TINY = dict(depths=(1, 1, 1, 1), width_factor=0.17, num_features=96)
NFNET = dict(depths=(1, 1, 2, 1), channels=(32, 48, 64, 64), group_size=16, stem_chs=32, num_features=96)
CASES = {
    "nf_regnet_dilated": ("nf_regnet_b0", dict(TINY, depths=(1, 1, 2, 2), output_stride=8), [(1, 65, 49)]),
    "nf_resnet_deep_pool": (
        "nf_resnet26",
        dict(channels=(16, 32, 48, 64), depths=(1, 1, 1, 1), stem_chs=16, stem_type="deep_pool", act_layer="leaky_relu", alpha=0.3),
        [(2, 63, 50)],
    ),
    "nfnet_tiered": ("nfnet_f0", dict(NFNET, stem_type="deep_tiered", skipinit=True), [(1, 61, 64)]),
    "dm_nfnet_dilated": ("dm_nfnet_f0", dict(NFNET, output_stride=16), [(1, 66, 81)]),
    "eca_regnet": ("nf_regnet_b0", dict(TINY, attn_layer="eca", attn_kwargs={}, group_size=0, attn_gain=1.5), [(2, 40, 40)]),
    "resnet18d_small": ("resnet18d", dict(layers=(1, 1, 1, 1), channels=(16, 24, 32, 48), stem_width=8), [(1, 65, 97)]),
    "resnet50d_small": ("resnet50d", dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 24), stem_width=8, stem_type="deep_tiered"), [(1, 63, 64)]),
    "resnext_small": ("resnext50_32x4d", dict(layers=(1, 1, 1, 1), channels=(16, 16, 32, 32), cardinality=4, base_width=16), [(1, 64, 64)]),
}
for act in ("celu", "elu", "gelu", "identity", "relu6", "selu", "sigmoid", "tanh"):
    CASES[f"nf_regnet_{act}"] = ("nf_regnet_b0", dict(TINY, act_layer=act), [(1, 48, 48)])
CASES |= {
    # stage widths by the rule are 24, 40, 64 and 96: groups of 12 make them 24, 36, 60 and 96
    "regnety_small": (
        "regnety_008",
        dict(depth=6, w0=24, wa=16.0, wm=1.6, group_size=12, stem_width=16),
        [(2, 64, 64), (1, 65, 97)],
    ),
    "regnety_linear": (
        "regnety_016",
        dict(depth=5, w0=16, wa=14.0, wm=1.8, group_size=8, stem_width=8, linear_out=True, act_layer="silu", bottle_ratio=0.5, num_features=48),
        [(1, 63, 50)],
    ),
    "efficientnet_small": (
        "efficientnet_b0",
        dict(channel_multiplier=0.25, depth_multiplier=0.5),
        [(2, 64, 64), (1, 65, 97)],
    ),
    "efficientnet_odd": (
        "efficientnet_b1",
        dict(channel_multiplier=0.3, depth_multiplier=0.6, channel_divisor=4, act_layer="hard_swish", bn_eps=0.001),
        [(1, 63, 50)],
    ),
}
RESNET = dict(layers=(1, 1, 1, 1), channels=(8, 16, 16, 24))
TENSORFLOW = dict(pad_type="same", bn_eps=1e-3)
CASES |= {
    "seresnet18_small": ("seresnet18", dict(RESNET, channels=(16, 24, 32, 48)), [(1, 65, 97)]),
    "seresnext_small": ("seresnext26t_32x4d", dict(RESNET, cardinality=4, base_width=16, stem_width=8), [(1, 63, 64)]),
    "ecaresnet_small": ("ecaresnet50t", dict(RESNET, stem_width=8), [(2, 64, 50)]),
    "resnetrs_small": ("resnetrs50", dict(RESNET, stem_width=8), [(1, 65, 66)]),
    "wide_resnet_small": ("wide_resnet50_2", RESNET, [(1, 64, 64)]),
    "regnetx_small": ("regnetx_008", dict(depth=6, w0=24, wa=16.0, wm=1.6, group_size=12, stem_width=16), [(1, 65, 97)]),
    "tf_efficientnet_small": ("tf_efficientnet_b0", dict(channel_multiplier=0.25, depth_multiplier=0.5, **TENSORFLOW), [(2, 64, 64), (1, 65, 98)]),
    "tf_efficientnet_lite_small": ("tf_efficientnet_lite0", dict(channel_multiplier=0.25, depth_multiplier=0.5, **TENSORFLOW), [(1, 65, 64)]),
    "efficientnetv2_s_small": ("efficientnetv2_s", dict(channel_multiplier=0.25, depth_multiplier=0.2), [(1, 65, 64)]),
    "efficientnetv2_rw_small": ("efficientnetv2_rw_s", dict(channel_multiplier=0.25, depth_multiplier=0.2), [(1, 64, 64)]),
    "tf_efficientnetv2_b_small": ("tf_efficientnetv2_b0", dict(channel_multiplier=0.3, depth_multiplier=0.5, **TENSORFLOW), [(1, 67, 64)]),
}

# input channels, poolings of the head, dilated networks with batch normalisation
CASES |= {
    "nf_regnet_grey": ("nf_regnet_b0", dict(TINY, in_chans=1, global_pool="max"), [(2, 48, 40)]),
    "nf_resnet_channels": (
        "nf_resnet26",
        dict(channels=(16, 32, 48, 64), depths=(1, 1, 1, 1), stem_chs=16, in_chans=16, global_pool="avgmax"),
        [(1, 63, 50)],
    ),
    "nfnet_both": ("nfnet_f0", dict(NFNET, in_chans=4, global_pool="catavgmax"), [(1, 64, 61)]),
    "resnet50d_dilated": (
        "resnet50d",
        dict(RESNET, layers=(1, 2, 2, 2), stem_width=8, output_stride=8, global_pool="catavgmax", in_chans=2),
        [(1, 65, 66)],
    ),
    "resnet18_dilated": ("resnet18", dict(RESNET, layers=(1, 2, 2, 2), output_stride=16, global_pool="max"), [(1, 64, 65)]),
    "regnety_dilated": (
        "regnety_008",
        dict(depth=6, w0=24, wa=16.0, wm=1.6, group_size=12, stem_width=16, output_stride=8, in_chans=1),
        [(1, 65, 64)],
    ),
    "efficientnet_dilated": (
        "efficientnet_b0",
        dict(channel_multiplier=0.25, depth_multiplier=0.5, output_stride=8, global_pool="avgmax", in_chans=5),
        [(1, 65, 64)],
    ),
    "tf_efficientnet_dilated": (
        "tf_efficientnet_b0",
        dict(channel_multiplier=0.25, depth_multiplier=0.5, output_stride=16, **TENSORFLOW),
        [(1, 65, 98)],
    ),
}

# a deep stem without pooling on the shortcuts
CASES["resnetc_small"] = ("resnet50c", dict(RESNET, layers=(1, 2, 1, 1), stem_width=8), [(1, 65, 66)])


def create(architecture, args):
    if "channel_multiplier" in args:  # timm's entry points fix an EfficientNet's multipliers
        generations = [
            ("_lite", "lite", {}), ("v2_b", "v2_base", {}), ("v2_rw", "v2_s", dict(rw=True)), ("v2_s", "v2_s", {}), ("", "", {}),
        ]
        maker, more = next((m, more) for part, m, more in generations if part in architecture)
        generate = getattr(efficientnet, "_gen_efficientnet" + (maker if maker[:1] == "v" else "_" * bool(maker) + maker))
        return generate(architecture, num_classes=7, **args, **more).eval()
    return timm.create_model(architecture, num_classes=7, **args).eval()


def channels(model):
    """Of the input: its first convolution's."""
    return next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d)).in_channels


def disturb(model, gen):
    """Moves parameters and statistics off their initial values; statistics come from real activations."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
    if norms:
        model.train()
        model(torch.randn(32, channels(model), 64, 64, generator=gen))
        model.eval()
    for name, p in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        noise = torch.randn(p.shape, generator=gen)
        if leaf == "skipinit_gain":
            p.fill_(-0.6)
        elif leaf == "gain" or (leaf == "weight" and p.ndim == 1):
            p.copy_(1 + 0.2 * noise)
        elif leaf == "bias":
            p.copy_(0.1 * noise)
        elif p.ndim == 2:
            p.copy_(0.05 * noise)
        elif p.ndim == 4 and not norms:
            p.add_(0.25 * p.std())


def digest(model):
    """Of every tensor's name and shape, in order of names."""
    lines = [f"{name} {list(value.shape)}\n" for name, value in sorted(model.state_dict().items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def main():
    out = Path(sys.argv[1])
    only = sys.argv[2:]
    for seed, (name, (architecture, args, sizes)) in enumerate(CASES.items()):
        if only and name not in only:
            continue
        gen = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        with torch.no_grad():
            model = create(architecture, args)
            disturb(model, gen)
            wide = create(architecture, args)
            wide.load_state_dict(model.state_dict())
            wide.double()
            golden = {}
            for k, (n, h, w) in enumerate(sizes):
                x = torch.randn(n, channels(model), h, w, generator=gen)
                golden |= {f"input.{k}": x, f"logits.{k}": wide(x.double()), f"logits32.{k}": model(x)}
        lists = {key: list(value) if isinstance(value, tuple) else value for key, value in args.items()}
        save_for_hf(model, out / name, model_config={}, model_args=lists, safe_serialization=True)
        save_file({key: value.contiguous() for key, value in golden.items()}, str(out / name / "golden.safetensors"))
        span = (golden["logits.0"].max() - golden["logits.0"].min()).item()
        print(f"{name}: {sum(p.numel() for p in model.parameters())} parameters, span {span:.3f}")

    if only:
        return
    table = {"timm": timm.__version__}
    names = timm.list_models(["nf_regnet_*", "nf_*resnet*", "*nfnet*"]) + "resnet18 resnet18d resnet26 resnet26d resnet34 \
        resnet34d resnet50 resnet50d resnet101 resnet101d resnet152 resnet152d resnext50_32x4d \
        regnety_002 regnety_004 regnety_006 regnety_008 regnety_008_tv regnety_016 regnety_032 \
        efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4 \
        resnet10t resnet14t resnet26t resnet50t resnet200 resnet200d wide_resnet50_2 wide_resnet101_2 \
        resnext50d_32x4d resnext101_32x4d resnext101_32x8d resnext101_32x16d resnext101_32x32d resnext101_64x4d seresnet18 seresnet34 \
        seresnet50 seresnet50t seresnet101 seresnet152 seresnet152d seresnext26d_32x4d seresnext26t_32x4d seresnext50_32x4d \
        seresnext101_32x4d seresnext101_32x8d seresnext101_64x4d ecaresnet26t ecaresnet50d ecaresnet50t ecaresnet101d ecaresnet200d \
        ecaresnetlight resnetrs50 resnetrs101 resnetrs152 resnetrs200 regnetx_002 regnetx_004 regnetx_004_tv \
        regnetx_006 regnetx_008 regnetx_016 regnetx_032 regnetx_040 regnetx_064 regnetx_080 regnetx_120 \
        regnetx_160 regnetx_320 regnety_040 regnety_064 regnety_080 regnety_080_tv regnety_120 regnety_160 \
        regnety_320 efficientnet_b5 efficientnet_b6 efficientnet_b7 tf_efficientnet_b0 tf_efficientnet_b1 tf_efficientnet_b2 tf_efficientnet_b3 \
        tf_efficientnet_b4 tf_efficientnet_b5 tf_efficientnet_b6 tf_efficientnet_b7 tf_efficientnet_lite0 tf_efficientnet_lite1 tf_efficientnet_lite2 tf_efficientnet_lite3 \
        tf_efficientnet_lite4 efficientnet_lite0 efficientnetv2_s efficientnetv2_m efficientnetv2_l tf_efficientnetv2_s tf_efficientnetv2_m tf_efficientnetv2_l \
        tf_efficientnetv2_b0 tf_efficientnetv2_b1 tf_efficientnetv2_b2 tf_efficientnetv2_b3 efficientnetv2_rw_s efficientnetv2_rw_t \
        resnetrs270 resnetrs350 resnetrs420 resnet50c resnet101c resnet152c resnet50s \
        resnet101s resnet152s seresnet200d seresnet269d seresnext101d_32x8d ecaresnet269d regnety_640 \
        regnety_1280 regnety_2560 efficientnet_b8 efficientnet_l2 efficientnet_lite1 efficientnet_lite2 efficientnet_lite3 \
        efficientnet_lite4 efficientnetv2_xl efficientnetv2_rw_m tf_efficientnet_b8 tf_efficientnet_l2 tf_efficientnetv2_xl".split()
    for name in names:
        with torch.device("meta"):
            model = timm.create_model(name)
        settings = ("input_size", "test_input_size", "crop_pct", "test_crop_pct", "crop_mode", "interpolation", "mean", "std")
        table[name] = {
            "parameters": sum(p.numel() for p in model.parameters()),
            "tensors": len(model.state_dict()),
            "digest": digest(model),
            **{key: model.pretrained_cfg.get(key) for key in settings},
        }
    hub = {}
    for path in sorted((Path(__file__).parent.parent / "data/checkpoint/hub").glob("*.json")):
        config = json.loads(path.read_text())
        with torch.device("meta"):
            model = timm.create_model(config["architecture"], **config["model_args"])
        hub[path.stem] = {"digest": digest(model), "parameters": sum(p.numel() for p in model.parameters())}
    (out / "hub.json").write_text(json.dumps(hub, indent=1))
    (out / "architectures.json").write_text(json.dumps(table, separators=(",", ":")))


if __name__ == "__main__":
    main()
