"""What people run today beside nfold: timm in PyTorch (eager, torch.compile, AOTInductor), OpenVINO and ONNX Runtime, in turns.

    PYTHON benches/against_torch.py PATH_OF_NFOLD [--models nf_regnet_b0@192,…] [--threads 1,2] [--rounds 5] [--ways eager,compile,…]

PYTHON has torch, timm, onnx, onnxruntime and openvino; torch.compile and AOTInductor want a C++ compiler as well. Every contender
runs the same network with fresh weights on one image in single precision, in a process of its own that waits while others
have their turn. Printed: the median over rounds of each turn's median, in milliseconds, and the median over rounds of the
ratio to nfold's. OpenVINO and ONNX Runtime get timm's export (`torch.onnx.export`, dynamo=False).
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version

WAYS = ["eager", "compile", "aotinductor", "openvino", "onnxruntime"]
TURN, WARMUP = 0.4, 1.0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("nfold", type=pathlib.Path)
    parser.add_argument("--models", default="nf_regnet_b0@192,nf_regnet_b1@288,nf_resnet50@288,resnet50@288,efficientnet_b1@288")
    parser.add_argument("--threads", default=f"1,{os.cpu_count()}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default=",".join(WAYS))
    options = parser.parse_args()
    packages = [f"{name} {version(name)}" for name in ("torch", "timm", "openvino", "onnxruntime")]
    print(", ".join(packages), file=sys.stderr)
    print("| network | threads | nfold, ms | " + " | ".join(f"{way}, ms (times nfold's)" for way in options.ways.split(",")) + " |")
    print("|---" * (3 + len(options.ways.split(","))) + "|")
    for model in options.models.split(","):
        for threads in options.threads.split(","):
            row = compare(options, model, threads)
            print("| " + " | ".join([f"`{model}`", threads, *row]) + " |", flush=True)


def compare(options, model, threads):
    ways = options.ways.split(",")
    with tempfile.TemporaryDirectory() as place:
        workers = {way: Worker(model, way, threads, place) for way in ways}
        try:
            times = {way: [] for way in ["nfold", *ways]}
            for _ in range(options.rounds):
                times["nfold"].append(by_nfold(options.nfold, model, threads))
                for way in ways:
                    times[way].append(workers[way].turn())
        finally:
            for worker in workers.values():
                worker.stop()
    shown = [f"**{statistics.median(times['nfold']):.1f}**"]
    for way in ways:
        if workers[way].error:
            print(f"{model}, {way}: {workers[way].error}", file=sys.stderr)
            shown.append("–")
            continue
        ratio = statistics.median(theirs / ours for theirs, ours in zip(times[way], times["nfold"]))
        shown.append(f"{statistics.median(times[way]):.1f} ({ratio:.2f})")
    return shown


def by_nfold(nfold, model, threads):
    command = [nfold, "bench", "engine", model, "--threads", threads, "--rounds", "1", "--turn", f"{1e3 * TURN:.0f}ms", "--json"]
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout)
    return found["rows"][0]["latency_ms"]["median"]


class Worker:
    """A contender in a process of its own: it says `ready`, then runs for a turn whenever it is asked."""

    def __init__(self, model, way, threads, place):
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", place)
        command = [sys.executable, __file__, "--worker", model, way, threads, place]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.error = None
        self.heard("ready")

    def heard(self, word):
        for line in self.process.stdout:
            if line.startswith(word):
                return line
            if line.startswith("failed"):
                self.error = line.strip()
                return None
        self.error = self.error or "it ended"
        return None

    def turn(self):
        if self.error:
            return float("nan")
        print("turn", file=self.process.stdin, flush=True)
        line = self.heard("median")
        return float(line.split()[1]) if line else float("nan")

    def stop(self):
        self.process.stdin.close()
        self.process.wait()


def worker(model, way, threads, place):
    try:
        run = contender(model, way, int(threads), place)
        until = time.perf_counter() + WARMUP
        while time.perf_counter() < until:
            run()
    except Exception as error:
        print("failed", " ".join(str(error).split())[:300], flush=True)
        return
    print("ready", flush=True)
    for _ in sys.stdin:
        run()
        times, until = [], time.perf_counter() + TURN
        while time.perf_counter() < until or not times:
            began = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began))
        print("median", statistics.median(times), flush=True)


def contender(name, way, threads, place):
    """A function that runs the network once."""
    import timm
    import torch

    torch.set_num_threads(threads)
    architecture, size = name.split("@")
    network = timm.create_model(architecture).eval()
    image = torch.randn(1, 3, int(size), int(size))
    if way in ("openvino", "onnxruntime"):
        path = os.path.join(place, f"{way}.onnx")
        torch.onnx.export(network, (image,), path, dynamo=False, input_names=["input"], output_names=["logits"])
        pixels = image.numpy()
        if way == "openvino":
            import openvino

            settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
            request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
            return lambda: request.infer({0: pixels}, share_inputs=True)
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, {"input": pixels})
    with torch.inference_mode():
        if way == "aotinductor":
            exported = torch.export.export(network, (image,))
            package = torch._inductor.aoti_compile_and_package(exported, package_path=os.path.join(place, "network.pt2"))
            network = torch._inductor.aoti_load_package(package)
        elif way == "compile":
            network = torch.compile(network)

    def run():
        with torch.inference_mode():
            network(image)

    return run


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*sys.argv[2:])
    else:
        main()
