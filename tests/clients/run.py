"""Other people's clients against a running server: tritonclient, KServe's SDK, NVIDIA's perf_analyzer, schemathesis, httpx,
curl, Node, huggingface_hub and a generated client; and the examples of docs/api.md.

    python3 tests/clients/run.py PATH_OF_NFOLD

Each client is installed from PyPI, at one pinned version, into an environment of its own under target/python/clients
(they can't share one: tritonclient and kserve register the same protobuf names). A client that can't be installed is
SKIPPED, loudly; with CI=true that is a failure.
"""
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import documents

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
CACHE = ROOT / "target" / "python" / "clients"

TRITON = ["tritonclient[http,grpc]==2.73.0"]
KSERVE = ["kserve==0.21.0"]
SCHEMATHESIS = ["schemathesis==4.32.5"]
HUB = ["huggingface_hub==2.4.0"]
HTTPX = ["httpx[http2]==0.28.1"]
GENERATOR = ["openapi-python-client==0.29.1"]
# glibc 2.38 and newer; older systems: the last tritonclient that carries the program
PERF_ANALYZER = ["perf-analyzer==2.60.0"]
PERF_ANALYZER_OLD = ["tritonclient==2.41.0", "nvidia-cuda-runtime-cu12==12.4.127"]


class Skipped(Exception):
    """A client that can't be had here."""


def call(command, what, **more):
    """Runs something that only installs."""
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    if done.returncode:
        last = "\n".join(done.stdout.strip().splitlines()[-3:])
        raise Skipped(f"{what} failed: {last}")


MAKING = threading.Lock()


def environment(name, requirements):
    """The Python of a virtual environment with exactly these requirements; made once, though two checks may want it."""
    with MAKING:
        return made(name, requirements)


def made(name, requirements):
    folder = CACHE / name
    python, mark = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(requirements)
    if not (mark.is_file() and mark.read_text() == wanted):
        shutil.rmtree(folder, ignore_errors=True)
        call([sys.executable, "-m", "venv", folder], f"making an environment for {name}")
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        call([*pip, *requirements], f"pip install {' '.join(requirements)}")
        mark.write_text(wanted)
    return python


def perf_analyzer():
    """The program and the environment it runs in."""
    libc, version = platform.libc_ver()
    if platform.machine() != "x86_64" or libc != "glibc":
        raise Skipped(f"perf_analyzer is published for x86_64 with glibc, not for {platform.machine()} with {libc or 'another C library'}")
    if tuple(map(int, version.split("."))) >= (2, 38):
        python = environment("perf_analyzer", PERF_ANALYZER)
        return [python.parent / "perf_analyzer"], dict(os.environ)
    folder = CACHE / "perf_analyzer"
    program = folder / "tritonclient-2.41.0.data" / "data" / "bin" / "perf_analyzer"
    mark = folder / "installed"
    if not mark.is_file():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as wheels:
            pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", wheels]
            call([*pip, *PERF_ANALYZER_OLD], f"pip download {' '.join(PERF_ANALYZER_OLD)}")
            for wheel in Path(wheels).glob("*.whl"):
                shutil.unpack_archive(wheel, folder, "zip")
        program.chmod(0o755)
        with tempfile.TemporaryDirectory() as packages:
            # one small library that no wheel carries
            try:
                call(["apt-get", "download", "libb64-0d"], "apt-get download libb64-0d", cwd=packages)
            except (Skipped, FileNotFoundError):
                call(["apt-get", "update", "--quiet"], "apt-get update")
                call(["apt-get", "download", "libb64-0d"], "apt-get download libb64-0d", cwd=packages)
            for package in Path(packages).glob("*.deb"):
                call(["dpkg-deb", "--extract", package, folder], "unpacking libb64")
        mark.touch()
    libraries = [folder / "nvidia" / "cuda_runtime" / "lib", folder / "usr" / "lib" / "x86_64-linux-gnu"]
    return [program], {**os.environ, "LD_LIBRARY_PATH": ":".join(map(str, libraries))}


class Server:
    """The demo model, served on free ports."""

    def __init__(self, nfold, folder, *more):
        self.program, self.folder = nfold, folder
        ports = [part for port in ("--http", "--grpc", "--admin") for part in (port, "127.0.0.1:0")]
        flags = ["--repository", folder, "--log-format", "json", "--model-control", "--queue-limit", "64", *more]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("NFOLD_")}
        self.process = subprocess.Popen([nfold, "serve", *ports, *flags], stderr=subprocess.PIPE, text=True, env=environment)
        self.addresses = {}
        for line in self.process.stderr:
            event = json.loads(line)
            if "address" in event:
                self.addresses[event["protocol"]] = event["address"]
            if event["message"] == "ready":
                break
        else:
            raise SystemExit("the server did not become ready")
        # a full pipe would stop it
        threading.Thread(target=lambda: [None for _ in self.process.stderr], daemon=True).start()

    def stop(self):
        self.process.terminate()
        return self.process.wait(timeout=30)


def script(name, requirements):
    def run(server):
        python = environment(name, requirements)
        addresses = [server.addresses["http"], server.addresses["grpc"]]
        subprocess.run([python, HERE / f"{name}.py", *addresses], check=True, timeout=300)

    return run


def load(server):
    """perf_analyzer over both protocols, one client and eight: throughput, no errors, the server's own times."""
    command, env = perf_analyzer()
    for protocol in ("http", "grpc"):
        for clients in (1, 8):
            report = CACHE / f"perf_{protocol}_{clients}.csv"
            report.unlink(missing_ok=True)
            flags = ["-m", "nf_regnet_cifar10", "-i", protocol, "-u", server.addresses[protocol], "--concurrency-range", str(clients)]
            # a machine shared with others is never as stable as the program would like: three windows, whatever they say
            flags += ["--measurement-interval", "700", "-r", "10", "-s", "999", "--verbose-csv", "-f", str(report)]
            done = subprocess.run([str(part) for part in [*command, *flags]], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
            out = done.stdout
            assert report.is_file(), out
            header, row = report.read_text().strip().splitlines()[:2]
            figures = dict(zip(header.split(","), row.split(",")))
            rate = float(figures["Inferences/Second"])
            queue, compute = float(figures["Server Queue"]), float(figures["Server Compute Infer"])
            assert rate > 0 and compute > 0 and queue >= 0, figures
            assert "Failed" not in out.replace("Failed to obtain stable measurement", ""), out
            failed = [line for line in out.splitlines() if "error" in line.lower() or "failed requests" in line.lower()]
            assert not failed, out
            print(f"  perf_analyzer {protocol} x{clients}: {rate:.0f}/s, server queue {queue:.0f} us, compute {compute:.0f} us")


def schema(server):
    """Generated requests for every route of openapi.json: no 5xx, answers as described."""
    python = environment("schemathesis", SCHEMATHESIS)
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    # a client that gives the server one millisecond is told 504, as documented; one that comes while it stops, 503
    settings = CACHE / "schemathesis.toml"
    settings.write_text('[checks]\nnot_a_server_error.expected-statuses = ["2xx", "3xx", "4xx", "503", "504"]\n')
    command = [python.parent / "schemathesis", "--config-file", settings, "run", f"http://{server.addresses['http']}/openapi.json"]
    command += ["--checks", checks, "--max-examples", "15", "--seed", "1", "--phases", "examples,coverage,fuzzing", "--no-color"]
    # loading takes seconds each time: it has a test of its own
    command += ["--exclude-path-regex", "/(load|unload)$", "--request-timeout", "20"]
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600, cwd=CACHE)
    if done.returncode:
        sys.stdout.write(done.stdout)
        raise AssertionError("schemathesis found something")
    tail = [line.strip() for line in done.stdout.splitlines() if "generated" in line or "passed" in line.lower()]
    print("  schemathesis:", "; ".join(tail[-3:]))


def examples(server):
    """docs/api.md, against this server and one that wants a key."""
    python = environment("triton", TRITON)
    with tempfile.TemporaryDirectory() as folder:
        for name, photograph in (("photo.jpg", "cat.jpg"), ("ship.jpg", "cifar10/ship/0000.jpg")):
            shutil.copy(ROOT / "tests" / "data" / photograph, Path(folder, name))
        keys = Path(folder, "keys.txt")
        keys.write_text(f"{documents.KEY}\n")
        locked = Server(server.program, server.folder, "--api-key-file", keys)
        try:
            ran = documents.check(ROOT / "docs" / "api.md", folder, python, {"": server, "keys": locked})
        finally:
            locked.stop()
    assert ran > 15, ran
    print(f"  docs/api.md: {ran} examples ran")


def uploads(server):
    """Refusals of large bodies, read by clients that are still sending."""
    python = environment("uploads", HTTPX)
    with tempfile.TemporaryDirectory() as folder:
        keys = Path(folder, "keys.txt")
        keys.write_text(f"{documents.KEY}\n")
        locked = Server(server.program, server.folder, "--api-key-file", keys, "--body-limit", "1048576")
        try:
            addresses = [locked.addresses["http"], locked.addresses["grpc"]]
            subprocess.run([python, HERE / "uploads.py", *addresses], check=True, timeout=300)
        finally:
            locked.stop()


def hub(server):
    """Python's cache of the model hub read by nfold, and nfold's by Python."""
    python = environment("hub", HUB)
    subprocess.run([python, HERE / "hub.py", "client", server.program, ROOT / "models" / "nf_regnet_cifar10"], check=True, timeout=300)


def hosts(server):
    """Platforms' own clients against their contracts."""
    hosted = Server(server.program, server.folder, "--hosts", "huggingface,kserve-v1,torchserve")
    try:
        for kind, python in (("huggingface", environment("hub", HUB)), ("kserve-v1", environment("kserve_sdk", KSERVE)), ("torchserve", sys.executable)):
            subprocess.run([python, HERE / "hosts.py", kind, hosted.addresses["http"]], check=True, timeout=120)
    finally:
        hosted.stop()


def generated(server):
    """A client made of openapi.json by a generator."""
    python = environment("generator", GENERATOR)
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder, "settings.yaml")
        settings.write_text("package_name_override: nfold_client\npost_hooks: []\n")
        command = [python.parent / "openapi-python-client", "generate", "--url", f"http://{server.addresses['http']}/openapi.json"]
        command += ["--config", settings, "--meta", "none", "--output-path", Path(folder, "nfold_client")]
        done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, cwd=folder)
        # it knows no bodies of image/jpeg, and says so; the same bytes as octet-stream it does
        unknown = [line for line in done.stdout.splitlines() if "Unsupported" in line and "content type image/" not in line]
        assert done.returncode == 0 and not unknown and "Unable to process" not in done.stdout, done.stdout
        subprocess.run([python, HERE / "generated.py", folder, server.addresses["http"]], check=True, timeout=120)


def cluster_load(server):
    """The load of deploy/check-cluster: its four kinds of clients, and what it reads of them, from a server that stops, too."""
    sys.path.insert(0, str(ROOT / "deploy"))
    loader = SourceFileLoader("check_cluster", str(ROOT / "deploy" / "check-cluster"))
    check = module_from_spec(spec_from_loader("check_cluster", loader))
    sys.dont_write_bytecode = True
    loader.exec_module(check)
    run = check.Check(check.arguments(["--image", "a", "--models-image", "a", "--client-image", "a", "--rate", "10"]), None, None)
    given = {"/given/client.py": ROOT / "deploy" / "check_cluster_client.py", "/given/1-photograph.jpg": check.PHOTOGRAPH}
    def started(at, kind, seconds):
        words, expected = run.words(kind, at.addresses["http"], at.addresses["grpc"], seconds)
        words = [str(given.get(word, word)) for word in words]
        command = words if words[0] == "python3" else [str(at.program), *words]
        return kind, expected, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    def counted(kind, expected, process):
        log = process.communicate(timeout=120)[0]
        assert process.returncode == 0, log
        return {"client": kind, "expected": expected, **check.counts(log)}
    loads = [counted(*begun) for begun in [started(server, kind, 3) for kind in run.kinds()]]
    assert [load["client"] for load in loads] == ["kept", "unary", "fresh", "stream"]
    # other tests may have the machine: refusals and slowness are allowed here
    wrong = check.judge(loads, {}, refused=0.2, slowest_s=10)
    assert not wrong and check.tally(loads, False)["sent"] >= 4 * 29, (wrong, loads)
    stopping = Server(server.program, server.folder, "--drain-hold", "500ms")
    try:
        begun = [started(stopping, kind, 6) for kind in ("fresh", "stream")]
        time.sleep(2)
    finally:
        stopping.stop()
    lost = [counted(*each) for each in begun]
    for load in lost:
        assert load["outcomes"].get("ok", 0) > 0 and load["outcomes"].get("transport", 0) > 0, lost
    assert lost[1]["moved"] == 1, f"UNAVAILABLE at the end of the stream was not understood: {lost}"
    assert check.judge(lost, {}), "what was lost was not seen"


# the longest first; those of one environment are not neighbours: it is made once
CHECKS = {
    "schemathesis": schema,
    "examples": examples,
    "perf_analyzer": load,
    "check-cluster": cluster_load,
    "kserve": script("kserve_sdk", KSERVE),
    "uploads": uploads,
    "huggingface_hub": hub,
    "hosts": hosts,
    "generated": generated,
    "tritonclient": script("triton", TRITON),
}


def main():
    nfold = Path(sys.argv[1]).resolve()
    chosen = sys.argv[2:] or list(CHECKS)
    CACHE.mkdir(parents=True, exist_ok=True)
    passed, failed, skipped = [], [], []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([nfold, "fold", ROOT / "models" / "nf_regnet_cifar10", "--repository", folder], check=True, stderr=subprocess.PIPE)

        def check(name):
            started, server = time.monotonic(), Server(nfold, folder)
            try:
                CHECKS[name](server)
                assert server.process.poll() is None, "the server died"
                passed.append(name)
                print(f"{name}: ok ({time.monotonic() - started:.0f} s)", flush=True)
            except Skipped as reason:
                skipped.append(name)
                print(f"\n{'!' * 80}\nSKIPPED {name}: {reason}\n{'!' * 80}\n", flush=True)
            except Exception as error:
                failed.append(name)
                print(f"{name}: FAILED: {error}", flush=True)
            finally:
                code = server.stop()
            if code != 0:
                failed.append(f"{name}: exit code {code}")

        # each with a server of its own; most of the time they wait, so that two go on at once
        with ThreadPoolExecutor(max_workers=2) as pool:
            list(pool.map(check, chosen))
    if skipped and os.environ.get("CI") == "true":
        failed += skipped
    print(f"clients: {len(passed)} passed, {len(failed)} failed, {len(skipped)} skipped")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
