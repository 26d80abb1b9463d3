"""Write configs.json: generated configurations in every dialect, and how timm itself reads each.

    python tests/data/checkpoint/make_configs.py [--count N]

For each: the file, and timm's architecture, arguments of the network, class names and evaluation settings
(`_parse_model_cfg`, then `resolve_data_config(use_test_size=True)`, as timm's validate.py). Needs timm; the version used is recorded.
"""
import argparse
import copy
import json
import random
from pathlib import Path

import timm
from timm.data import resolve_data_config
from timm.data.dataset_info import CustomDatasetInfo
from timm.models import PretrainedCfg
from timm.models._hub import _parse_model_cfg

ARCHITECTURES = ["nf_regnet_b1", "eca_nfnet_l0", "resnet18", "efficientnet_b1", "dm_nfnet_f0"]


def maybe(rng, chance, value):
    return value() if rng.random() < chance else None


def settings(rng):
    """Fields of pretrained_cfg about preprocessing; null now and then, as old files have it."""
    side = lambda: [3, rng.choice([64, 192, 224, 288]), rng.choice([64, 192, 224, 320])]
    colour = lambda: rng.choice([[0.5] * 3, [0.485, 0.456, 0.406], [0.1, 0.2, 0.3], [0.5]])
    fields = {
        "input_size": maybe(rng, 0.8, side),
        "test_input_size": maybe(rng, 0.4, side),
        "crop_pct": maybe(rng, 0.7, lambda: rng.choice([0.875, 0.9, 1.0, 0])),
        "test_crop_pct": maybe(rng, 0.3, lambda: rng.choice([0.95, 1.0, 0])),
        "crop_mode": maybe(rng, 0.4, lambda: rng.choice(["center", "squash", "border", ""])),
        "interpolation": maybe(rng, 0.7, lambda: rng.choice(["bilinear", "bicubic", "nearest", "box", "lanczos", ""])),
        "mean": maybe(rng, 0.7, colour),
        "std": maybe(rng, 0.7, colour),
    }
    return {k: v for k, v in fields.items() if v is not None or rng.random() < 0.3}


def labels(rng, classes):
    names = [f"class {i}" for i in range(classes)]
    return rng.choice([names, {str(i): n for i, n in enumerate(names) if i % 2 == 0}, {str(i): n for i, n in enumerate(names)}])


def descriptions(names):
    listed = names.values() if isinstance(names, dict) else names
    return {name: f"a thing of {name}" for name in listed}


def harmless(rng):
    fields = {
        "custom_load": False,
        "first_conv": "stem.conv",
        "classifier": "head.fc",
        "pool_size": [7, 7],
        "fixed_input_size": False,
        "license": "apache-2.0",
        "url": "",
        "notes": None,
        "label_offset": None,
    }
    return {k: v for k, v in fields.items() if rng.random() < 0.3}


def generate(rng):
    architecture, classes = rng.choice(ARCHITECTURES), rng.choice([3, 5, 8])
    dialect = rng.choice(["nested", "nested", "flat", "inside", "wrapper"])
    names = labels(rng, classes) if rng.random() < 0.6 else None
    inner = settings(rng) | harmless(rng)
    if rng.random() < 0.5:
        inner["tag"] = rng.choice(["ra2_in1k", "", "in1k"])
    if dialect == "flat":
        config = {"architecture": architecture, "num_classes": classes, "num_features": 960} | inner
        if names is not None:
            config[rng.choice(["labels", "label_names"])] = names
        if names is not None and rng.random() < 0.3:
            config["label_descriptions"] = descriptions(names)
        return dialect, config
    config = {"architecture": architecture, "pretrained_cfg": inner}
    if dialect == "inside" or rng.random() < 0.5:
        inner["num_classes"] = classes if dialect == "inside" else rng.choice([classes, 1000])
    if dialect != "inside":
        config["num_classes"] = classes
    if rng.random() < 0.5:
        config["num_features"] = 960
    if rng.random() < 0.5:
        config["global_pool"] = "avg"
    if rng.random() < 0.6:
        args = {"num_classes": classes, "in_chans": 3, "global_pool": "avg", "drop_rate": None}
        config["model_args"] = {k: v for k, v in args.items() if rng.random() < 0.7}
    if names is not None:
        place = rng.choice([config, inner])
        place["label_names"] = names
        if rng.random() < 0.3:
            rng.choice([config, inner])["label_descriptions"] = descriptions(names)
    if dialect == "wrapper":
        config |= {"model_type": "timm_wrapper", "architectures": ["TimmWrapperForImageClassification"], "do_pooling": True,
                   "transformers_version": "4.57.0", "torch_dtype": "float32", "initializer_range": 0.02}
    return dialect, config


def ask(config):
    """What timm makes of it."""
    pretrained_cfg, architecture, args = _parse_model_cfg(copy.deepcopy(config), {})
    data = resolve_data_config(pretrained_cfg=pretrained_cfg, use_test_size=True)
    made = PretrainedCfg(**pretrained_cfg)  # refuses fields that timm does not have
    classes = args.get("num_classes", made.num_classes)
    names = [str(i) for i in range(classes)]
    if pretrained_cfg.get("label_names"):
        info = CustomDatasetInfo(pretrained_cfg["label_names"], pretrained_cfg.get("label_descriptions"))
        names = [info.index_to_description(i) if info.has_label(i) else str(i) for i in range(classes)]
    else:
        names = []
    return {
        "architecture": architecture,
        "num_classes": classes,
        "input_size": list(data["input_size"]),
        "crop_pct": data["crop_pct"],
        "crop_mode": data["crop_mode"],
        "interpolation": data["interpolation"],
        "mean": (list(data["mean"]) * 3)[:3],
        "std": (list(data["std"]) * 3)[:3],
        "labels": names,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    count = parser.parse_args().count
    rng = random.Random(20)
    lines = []
    while len(lines) < count:
        dialect, config = generate(rng)
        try:
            timm_says = ask(config)
        except TypeError:  # timm stumbles over a null input_size beside in_chans
            continue
        lines.append(json.dumps({"dialect": dialect, "config": config, "timm": timm_says}, separators=(",", ":")))
    text = '{"timm":"%s","cases":[\n%s\n]}\n' % (timm.__version__, ",\n".join(lines))
    Path(__file__).with_name("configs.json").write_text(text)


if __name__ == "__main__":
    main()
