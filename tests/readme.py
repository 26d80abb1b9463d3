"""Every block of README.md, in order, as a reader would run them: on a clean copy of the tracked files, with a home and a
folder of his own, and a checkpoint that timm's save_for_hf wrote without options.

    python3 tests/readme.py                  # everything, builds included
    python3 tests/readme.py --quick NFOLD    # with a program that is built: nothing is compiled or installed

Names on the model hub are answered by a hub on loopback, on which each is the demo checkpoint. What can't run here (torch, a
container engine) is SKIPPED by name. Ports 8000 to 8002 must be free; the quick form has a network
of its own where the system allows one.
"""
import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT / "tests/data/readme/my_classifier"
FILES = ROOT / "tests/data/checkpoint/files"
# the network of FILES / state.pth: nf_regnet_b0 with the arguments of this golden checkpoint
GOLDEN = ROOT / "tests/goldens/nf_regnet_tanh/config.json"


def blocks(text):
    """Language, heading and text of each fenced block."""
    heading = ""
    for match in re.finditer(r"^## ([^\n]+)$|^```(\w*)\n(.*?)^```$", text, re.M | re.S):
        if match[1]:
            heading = match[1]
        else:
            yield match[2], heading, match[3]


def commands(block):
    """The lines of a shell block without their comments; a backslash joins lines."""
    for line in block.replace("\\\n", " ").splitlines():
        line = re.sub(r"(^|\s)#.*", "", line).strip()
        if line:
            yield line


class Reader:
    def __init__(self, work, quick):
        self.home, self.clone = work / "home", work / "nfold"
        self.quick, self.server, self.skipped, self.ran = quick, None, [], 0
        self.folder = self.clone
        keep = ("PATH", "CARGO_HOME", "RUSTUP_HOME", "LANG", "PIP_", "SSL_", "CARGO_HTTP", "CARGO_REG", "HTTP", "http", "no_proxy", "NO_PROXY")
        self.env = {name: value for name, value in os.environ.items() if name.startswith(keep)}
        self.env["HOME"] = str(self.home)
        sys.path.insert(0, str(ROOT / "tests/clients"))
        sys.dont_write_bytecode = True
        from hub import Hub
        self.env.update(HF_ENDPOINT=Hub(ROOT / "models/nf_regnet_cifar10").endpoint, NO_PROXY="127.0.0.1,127.0.0.2,localhost")
        real = Path.home()
        if not quick:
            # toolchains that live in the real home
            self.env.setdefault("CARGO_HOME", str(real / ".cargo"))
            self.env.setdefault("RUSTUP_HOME", str(real / ".rustup"))
            # what doesn't depend on the copy's path is compiled once
            self.env["CARGO_BUILD_BUILD_DIR"] = os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))
        else:
            bin = work / "bin"
            bin.mkdir()
            shutil.copy2(quick, bin / "nfold")
            library = os.environ.get("ORT_DYLIB_PATH") or ROOT / ".ort/libonnxruntime.so"
            (bin / "libonnxruntime.so").symlink_to(Path(library).resolve())
            (self.clone / ".ort").symlink_to(ROOT / ".ort")
            self.env.update(PATH=f"{bin}:{self.env['PATH']}", PROGRAM=str(bin / "nfold"))

    def skip(self, what, why):
        self.skipped.append(f"SKIP: README: {what}: {why}")

    def shell(self, line):
        """Runs a line where the last one left folder and environment; answers its output."""
        self.ran += 1
        print(f"$ {line}", flush=True)
        with tempfile.NamedTemporaryFile() as state:
            script = f"set -e\n{line}\npwd >{state.name}\nenv -0 >>{state.name}\n"
            done = subprocess.run(["bash", "-c", script], cwd=self.folder, env=self.env, stdout=subprocess.PIPE,
                                  stderr=subprocess.STDOUT, text=True)
            if done.returncode:
                sys.exit(f"README: `{line}` ended with {done.returncode}:\n{done.stdout[-4000:]}")
            folder, _, variables = Path(state.name).read_text().partition("\n")
        self.folder = Path(folder)
        self.env = dict(pair.split("=", 1) for pair in variables.split("\0") if "=" in pair)
        return done.stdout

    def serve(self, line):
        self.stop()
        self.ran += 1
        print(f"$ {line} &", flush=True)
        self.log = tempfile.TemporaryFile(mode="w+")
        self.server = subprocess.Popen(["bash", "-c", f"exec {line}"], cwd=self.folder, env=self.env, stdout=self.log,
                                       stderr=self.log, start_new_session=True)
        while True:
            try:
                urllib.request.urlopen("http://127.0.0.1:8002/readyz", timeout=5).read()
                return
            except OSError:
                time.sleep(0.1)
            if self.server.poll() is not None:
                self.log.seek(0)
                sys.exit(f"README: `{line}` ended with {self.server.returncode}:\n{self.log.read()[-4000:]}")

    def stop(self):
        if self.server:
            os.killpg(self.server.pid, signal.SIGINT)
            self.server.wait(timeout=60)
            self.server = None

    def files_of_a_reader(self):
        """What the page takes for granted in a folder of the reader's own."""
        shutil.copy(ROOT / "tests/data/cat.jpg", self.folder / "photo.jpg")
        shutil.copy(FILES / "model_best.pth.tar", self.folder)
        shutil.copy(FILES / "state.pth", self.folder / "weights.pth")
        (self.folder / "names.txt").write_text("".join(f"class {n}\n" for n in range(7)))

    def run(self, language, heading, block):
        if language == "python":
            self.files_of_a_reader()
            python = os.environ.get("PYTHON", sys.executable)
            if subprocess.run([python, "-c", "import timm, torch"], capture_output=True).returncode == 0:
                self.ran += 1
                print(f"$ python: {block.splitlines()[1]} …", flush=True)
                subprocess.run([python, "-c", block], cwd=self.folder, check=True, env={**self.env, "HF_HUB_OFFLINE": "1"})
                shutil.copytree(KEPT, self.folder / "without_options")
            else:
                self.skip("the training example", "timm and torch are not here; a kept sample of save_for_hf stands in")
                compile(block, "README.md", "exec")
                shutil.copytree(KEPT, self.folder / "my_classifier")
            return
        if language != "sh":
            sys.exit(f"README: a block of `{language}` under `{heading}`: this test doesn't know how to run it")
        for line in commands(block):
            if line.startswith("docker "):
                if subprocess.run("docker info", shell=True, capture_output=True).returncode == 0:
                    if " fold " not in line:
                        self.stop()
                        line += " --version"
                    elif "nfold" not in self.shell("docker images --format '{{.Repository}}'"):
                        self.shell(f"docker build -t nfold {self.clone}")
                    self.shell(line)
                else:
                    self.skip(f"`{line}`", "no container engine answers")
            elif self.quick and ("pip install" in line or line.startswith("export PATH")):
                self.skip(f"`{line}`", "the quick form takes the program that is built")
            elif line.startswith(("make serve", "nfold serve")):
                self.serve(line)
            elif line.startswith("curl "):
                answer = json.loads(self.shell(line.replace("curl ", "curl --silent --show-error ", 1)))
                best = answer["results"][0]["predictions"][0]
                if self.folder == self.clone and best["label"] != "cat":
                    sys.exit(f"README: the demo takes the cat for {best}")
                print(f"  {answer['model']}: {best}", flush=True)
            elif "weights.pth --arch" in line:
                # the kept file is of a small network of the same family
                args = json.dumps(json.loads(GOLDEN.read_text())["model_args"])
                self.shell(line.replace("nf_regnet_b1", f"nf_regnet_b0 --model-args '{args}'"))
            else:
                self.shell(line)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", type=Path, metavar="NFOLD")
    args = parser.parse_args()
    if args.quick and "NFOLD_README_ALONE" not in os.environ:
        alone = ["unshare", "--net", "--map-root-user", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
        if shutil.which("unshare") and shutil.which("ip") and subprocess.run([*alone, "true"], capture_output=True).returncode == 0:
            os.environ["NFOLD_README_ALONE"] = "1"
            os.execvp("unshare", [*alone, sys.executable, *sys.argv])
    started = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="nfold-readme-"))
    reader = None
    try:
        (work / "home").mkdir()
        tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for name in filter(None, tracked.split("\0")):
            if (ROOT / name).is_file():
                (work / "nfold" / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, work / "nfold" / name)
        reader = Reader(work, args.quick and args.quick.resolve())
        for language, heading, block in blocks((ROOT / "README.md").read_text()):
            reader.run(language, heading, block)
        # a checkpoint without options, alone in its repository, and the bare request
        other = reader.home / "other"
        shutil.copytree(KEPT, other / "untouched")
        reader.folder = other
        reader.shell("nfold fold untouched")
        reader.serve("nfold serve")
        answer = json.loads(reader.shell(f"curl --silent --data-binary @{ROOT}/tests/data/cat.jpg localhost:8000/v1/classify"))
        if answer["model"] != "untouched" or len(answer["results"][0]["predictions"]) != 3:
            sys.exit(f"README: save_for_hf without options: {answer}")
    finally:
        if reader:
            reader.stop()
        shutil.rmtree(work, ignore_errors=True)
    print(*reader.skipped, sep="\n")
    print(f"README: {reader.ran} commands ran in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
