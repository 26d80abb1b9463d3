"""What `make dist` made, installed into clean roots and run: it folds, classifies tests/data/cat.jpg and serves.

    python3 tests/packages.py [FOLDER]

The wheel: an empty environment, with PATH emptied. Tarball and .deb: as root, in a root with nothing but the C and C++ runtime.
What can't be tried here is said.
"""
import hashlib
import json
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CAT = ROOT / "tests/data/cat.jpg"


def run(*command, **more):
    done = subprocess.run([str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more)
    if done.returncode:
        sys.exit(f"`{' '.join(map(str, command))}` ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return done.stdout


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def trial(what, prefix, program, env, folder, seen):
    """Initialises, folds, classifies and serves. `prefix` goes before the program, `seen` is the folder as it sees it."""
    nfold = lambda *words: run(*prefix, program, *words, env=env, cwd=folder)
    repository = f"{seen}/repository"
    for source, target in [(ROOT / "models/nf_regnet_cifar10", "checkpoint")]:
        shutil.copytree(source, folder / target)
    shutil.copy(CAT, folder / "cat.jpg")
    nfold("init", "test_nfnet", "--out", f"{seen}/fresh")
    nfold("fold", f"{seen}/fresh", "--repository", f"{seen}/other")
    nfold("fold", f"{seen}/checkpoint", "--repository", repository)
    said = nfold("classify", "--repository", repository, "--json", f"{seen}/cat.jpg")
    best = next(json.loads(line) for line in said.splitlines() if line.startswith("{"))["predictions"][0]
    assert best["label"] == "cat" and best["score"] > 0.8, (what, said)
    port, log = free_port(), tempfile.TemporaryFile(mode="w+")
    address = f"127.0.0.1:{port}"
    server = subprocess.Popen([*map(str, prefix), str(program), "serve", "--repository", repository, "--http", address, "--grpc",
                               "127.0.0.1:0", "--admin", "127.0.0.1:0"], env=env, cwd=folder, stdout=log, stderr=log)
    try:
        for attempt in range(300):
            try:
                answer = json.load(urllib.request.urlopen(
                    urllib.request.Request(f"http://{address}/v1/classify", CAT.read_bytes()), timeout=30))
                break
            except OSError:
                if server.poll() is not None or attempt == 299:
                    log.seek(0)
                    sys.exit(f"{what}: no answer from the server:\n{log.read()[-3000:]}")
                time.sleep(0.2)
        assert answer["results"][0]["predictions"][0]["label"] == "cat", (what, answer)
    finally:
        server.terminate()
    assert server.wait(timeout=60) == 0, (what, server.returncode)
    print(f"{what}: init, fold, classify and serve; the cat is a {best['label']} ({best['score']:.3f})", flush=True)


def clean_root(root, binaries):
    """Nothing but the libraries that `binaries` are linked against, from this machine."""
    said = "".join(run("ldd", binary) for binary in binaries)
    libraries = {word for line in said.splitlines() for word in line.split() if word.startswith("/") and not word.endswith(":")}
    for library in libraries - {str(binary) for binary in binaries}:
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    (root / "tmp").mkdir(exist_ok=True)
    (root / "home").mkdir(exist_ok=True)


def inside(root):
    """Runs a program there, with /proc mounted for its life alone."""
    (root / "proc").mkdir(exist_ok=True)
    unshare, shell, mount, chroot = (shutil.which(name) for name in ("unshare", "sh", "mount", "chroot"))
    script = f'{mount} -t proc proc {root}/proc && exec {chroot} {root} "$@"'
    return [unshare, "--mount", "--propagation", "private", shell, "-c", script, "sh"]


def wheel(file, work):
    environment = work / "venv"
    run(sys.executable, "-m", "venv", environment)
    run(environment / "bin/pip", "install", "--quiet", "--disable-pip-version-check", file)
    folder = work / "wheel"
    folder.mkdir()
    trial("wheel", [], environment / "bin/nfold", {"PATH": "/nowhere", "HOME": str(folder)}, folder, ".")
    # pipx and uv link to the program
    (folder / "link").symlink_to(environment / "bin/nfold")
    run(folder / "link", "classify", "cat.jpg", env={}, cwd=folder)


def tarball(file, work):
    folder = work / "unpacked"
    with tarfile.open(file) as archive:
        archive.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(folder)
    [unpacked] = folder.iterdir()
    home = work / "home"
    home.mkdir()
    trial("tarball", [], unpacked / "nfold", {"PATH": "/nowhere"}, home, ".")
    assert (unpacked / "man/nfold-serve.1").is_file() and (unpacked / "completions/nfold.bash").is_file()
    if os.geteuid() == 0:
        root = work / "root-of-tarball"
        shutil.copytree(unpacked, root / "opt/nfold")
        clean_root(root, [unpacked / "nfold", unpacked / "libonnxruntime.so"])
        trial("tarball in a clean root", inside(root), "/opt/nfold/nfold", {"PATH": ""}, root / "home", "/home")


def debian(file, work):
    control = run("dpkg-deb", "--field", file)
    assert "libstdc++6" in control and "libc6 (>= 2." in control, control
    root = work / "root-of-deb"
    run("dpkg-deb", "--extract", file, root)
    for name in ["usr/share/man/man1/nfold-serve.1.gz", "usr/share/bash-completion/completions/nfold", "var/lib/nfold/models",
                 "lib/systemd/system/nfold.service", "etc/default/nfold", "usr/share/doc/nfold/copyright"]:
        assert (root / name).exists(), name
    if os.geteuid() == 0:
        if shutil.which("apt-get"):
            # are the dependencies those of this system's archive?
            run("apt-get", "install", "--simulate", "--quiet", file)
        clean_root(root, [root / "usr/bin/nfold", root / "usr/lib/nfold/libonnxruntime.so"])
        trial(".deb in a clean root", inside(root), "/usr/bin/nfold", {"PATH": ""}, root / "home", "/home")
        if shutil.which("debootstrap"):
            by_dpkg(file, work)
        else:
            print("SKIP: the .deb by dpkg in a fresh Debian: no debootstrap here (apt install debootstrap)")
    else:
        print("SKIP: the .deb in a clean root: chroot needs root")
    if shutil.which("systemd-analyze"):
        unit = root / "lib/systemd/system/nfold.service"
        said = run("systemd-analyze", "security", "--offline=true", "--threshold=20", unit)
        print(f".deb: {said.strip().splitlines()[-1]}")


def by_dpkg(file, work):
    """A Debian of its own with nothing but what is essential, and apt; the package goes in, runs, and goes."""
    root = work / "debian"
    run("debootstrap", "--variant=minbase", platform.freedesktop_os_release()["VERSION_CODENAME"], root)
    shutil.copy(file, root / "nfold.deb")
    here, env = inside(root), {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C"}
    said = run(*here, "/usr/bin/dpkg", "--install", "/nfold.deb", env=env)
    assert "Setting up nfold" in said and "nfold fold CHECKPOINT" in said, said
    trial(".deb by dpkg in a fresh Debian", here, "/usr/bin/nfold", {"PATH": ""}, root / "home", "/home")
    (root / "var/lib/nfold/models/mine").mkdir()
    run(*here, "/usr/bin/dpkg", "--purge", "nfold", env=env)
    left = [name for name in ("usr/bin/nfold", "usr/lib/nfold", "etc/default/nfold", "lib/systemd/system/nfold.service")
            if (root / name).exists()]
    assert not left and (root / "var/lib/nfold/models/mine").is_dir(), "the program goes, the administrator's models stay"


def section(program, name):
    """The bytes of a section of a 64-bit ELF file; none: it has no such section."""
    offset, size, count, names = struct.unpack_from("<Q10xHHH", program, 0x28)
    header = lambda i: struct.unpack_from("<IIQQQQ", program, offset + i * size)
    at = header(names)[4]
    for entry in map(header, range(count)):
        if program[at + entry[0]:].split(b"\0", 1)[0] == name:
            return program[entry[4]:entry[4] + entry[5]]
    return None


def list_inside(file):
    """The crates that the program itself says it is made of (cargo-auditable)."""
    with tarfile.open(file) as archive:
        [member] = [name for name in archive.getnames() if name.endswith("/nfold")]
        program = archive.extractfile(member).read()
    packed = section(program, b".dep-v0")
    assert packed is not None, "the program carries no list of its crates"
    crates = {crate["name"] for crate in json.loads(zlib.decompress(packed))["packages"]}
    assert {"nfold", "ort", "axum", "tonic", "png"} <= crates, crates
    print(f"the program lists {len(crates)} crates")


def checksums(folder):
    lines = (folder / "SHA256SUMS").read_text().splitlines()
    for line in lines:
        digest, name = line.split()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name
    listed = {line.split()[1] for line in lines}
    assert listed == {file.name for file in folder.iterdir()} - {"SHA256SUMS"}, listed


def parts(file):
    names = {part["name"]: part["version"] for part in json.loads(file.read_text())["components"]}
    locked = (ROOT / "Cargo.lock").read_text()
    for name in ("ort", "axum", "tonic", "png"):
        assert f'name = "{name}"\nversion = "{names[name]}"' in locked, name
    assert names["onnxruntime"] == "1.28.0" and "proptest" not in names, "what is built in, and no more"
    print(f"SBOM: {len(names)} components")


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "dist").resolve()
    # not below the project, whose .ort would be found
    work = Path(tempfile.mkdtemp(prefix="nfold-packages-"))
    work.chmod(0o755)
    try:
        checksums(folder)
        parts(next(folder.glob("*.cdx.json")))
        list_inside(next(folder.glob("*.tar.gz")))
        wheel(next(folder.glob("*.whl")), work)
        tarball(next(folder.glob("*.tar.gz")), work)
        packages = list(folder.glob("*.deb"))
        debian(packages[0], work) if packages else print("SKIP: the .deb: not made here, for want of dpkg-deb")
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    main()
