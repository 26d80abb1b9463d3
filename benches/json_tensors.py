"""Tensors as JSON numbers: nfold beside FastAPI with orjson, on the same network and cores, in turns.

    python3 benches/json_tensors.py PATH_OF_NFOLD [ROUNDS]

The network is nf_regnet_b0 at 192 pixels with fresh weights: 110,592 numbers a request. Installs FastAPI, uvicorn, orjson and
ONNX Runtime from PyPI into target/python/json_tensors. The load generator is `nfold bench load` for both.
"""
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ["fastapi==0.165.0", "uvicorn[standard]==0.54.0", "orjson==3.13.0", "onnxruntime==1.32.0", "numpy"]

APP = '''
import os
import numpy as np, onnxruntime, orjson
from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(os.environ["THREADS"])
session = onnxruntime.InferenceSession(os.environ["MODEL"], options, providers=["CPUExecutionProvider"])
app = FastAPI()

@app.get("/v2/models/m")
def metadata():
    return {"name": "m", "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, 3, 192, 192]}]}

def answer(body):
    tensor = orjson.loads(body)["inputs"][0]
    values = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
    logits = session.run(["logits"], {"input": values})[0]
    output = {"name": "logits", "datatype": "FP32", "shape": logits.shape, "data": logits.ravel()}
    return orjson.dumps({"model_name": "m", "outputs": [output]}, option=orjson.OPT_SERIALIZE_NUMPY)

@app.post("/v2/models/m/infer")
async def infer(request: Request):
    body = await request.body()
    return Response(await run_in_threadpool(answer, body), media_type="application/json")
'''


def port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait(url):
    for _ in range(600):
        try:
            return urllib.request.urlopen(url).read()
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"nothing answers at {url}")


def load(nfold, address, protocol, connections):
    command = [nfold, "bench", "load", "--server", address, "--protocol", protocol, "--model", "m", "--bodies", "8"]
    command += ["--connections", str(connections), "--warmup", "1s", "--duration", "6s", "--json"]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if not done.stdout:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def main():
    nfold, rounds = Path(sys.argv[1]).resolve(), int((sys.argv[2:] or [3])[0])
    folder = ROOT / "target" / "python" / "json_tensors"
    python = folder / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    with tempfile.TemporaryDirectory() as place:
        run = lambda *words: subprocess.run([nfold, *map(str, words)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        run("init", "nf_regnet_b0", "--out", f"{place}/c")
        run("fold", f"{place}/c", "--repository", f"{place}/r", "--name", "m", "--size", "192", "--outputs", "logits")
        Path(place, "app.py").write_text(APP)
        http, grpc, admin, other = (port() for _ in range(4))
        addresses = {"nfold": f"127.0.0.1:{http}", "FastAPI": f"127.0.0.1:{other}"}
        flags = ["--repository", f"{place}/r", "--http", addresses["nfold"], "--grpc", f"127.0.0.1:{grpc}", "--admin", f"127.0.0.1:{admin}"]
        servers = [subprocess.Popen([nfold, "serve", *flags, "--log", "error"])]
        cores = len(os.sched_getaffinity(0))
        environment = {**os.environ, "MODEL": f"{place}/r/m/1/model.onnx", "THREADS": str(cores)}
        command = [python, "-m", "uvicorn", "app:app", "--port", other, "--log-level", "error"]
        servers.append(subprocess.Popen([str(part) for part in command], cwd=place, env=environment))
        try:
            for address in addresses.values():
                wait(f"http://{address}/v2/models/m")
            cases = [("nfold", "oip-json"), ("nfold", "oip-http"), ("FastAPI", "oip-json")]
            found = {}
            for _ in range(rounds):
                for connections in (1, 8):
                    for case in cases:
                        report = load(nfold, addresses[case[0]], case[1], connections)
                        step = report["steps"][0]
                        found.setdefault((*case, connections), []).append((step["throughput"], step["latency_ms"]["p50"]))
            print("| server | protocol | connections | answers/s | p50 ms |\n|---|---|---|---|---|")
            for (server, protocol, connections), values in sorted(found.items(), key=lambda one: one[0][2]):
                rate, p50 = (statistics.median(column) for column in zip(*values))
                print(f"| {server} | {protocol} | {connections} | {rate:.1f} | {p50:.1f} |")
        finally:
            for server in servers:
                server.terminate()


if __name__ == "__main__":
    main()
