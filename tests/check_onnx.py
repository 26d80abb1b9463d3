"""Folds every golden checkpoint in every way and holds the files to ONNX's own checker.

    PYTHONPATH=... python3 tests/check_onnx.py PATH_OF_NFOLD
"""
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

WAYS = {
    "default": [],
    "broadcast": ["--gate", "broadcast"],
    "dynamic": ["--size", "dynamic"],
    "fp16": ["--precision", "fp16"],
    "unfolded": ["--unfolded"],
    "map": ["--outputs", "logits,features,map"],
    "map dynamic": ["--outputs", "logits,features,map", "--size", "dynamic"],
    "map fp16": ["--outputs", "logits,features,map", "--precision", "fp16"],
}


def main():
    nfold = Path(sys.argv[1]).resolve()
    goldens = sorted(p for p in Path(__file__).with_name("goldens").iterdir() if p.is_dir())
    checked = 0
    with tempfile.TemporaryDirectory() as folder:
        for golden in goldens:
            channels = json.loads((golden / "config.json").read_text()).get("model_args", {}).get("in_chans", 3)
            for version, (way, flags) in enumerate(WAYS.items(), start=1):
                command = [nfold, "fold", golden, "--repository", folder, "--model-version", str(version), *flags]
                subprocess.run(command, check=True, stderr=subprocess.PIPE)
                path = Path(folder, golden.name, str(version), "model.onnx")
                onnx.checker.check_model(str(path), full_check=True)
                model = onnx.load(path)
                shape = lambda value: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
                [source], [logits, *others] = model.graph.input, model.graph.output
                assert (source.name, logits.name) == ("input", "logits"), path
                assert {output.name for output in others} == ({"features", "map"} if way.startswith("map") else {"features"}), path
                assert all(output.type.tensor_type.elem_type == onnx.TensorProto.FLOAT for output in others), path
                assert source.type.tensor_type.elem_type == logits.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
                assert shape(source)[:2] == ["batch", channels] and shape(logits)[0] == "batch", path
                assert (shape(source)[2:] == ["height", "width"]) == way.endswith("dynamic"), path
                checked += 1
    print(f"onnx.checker: {checked} passed, 0 failed")


if __name__ == "__main__":
    main()
