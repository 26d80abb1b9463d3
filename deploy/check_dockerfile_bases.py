"""What stands in for the base images of the Dockerfile where no image registry can be reached, and the way to the package registries
from this machine. Used by deploy/check-dockerfile.
"""
import fnmatch, os, pathlib, re, shutil, subprocess, sys, tempfile

PROJECT = pathlib.Path(__file__).resolve().parent.parent
# base images by what their name contains, and the Debian packages that stand in for them
STAND_INS = {
    "/rust:": ("debootstrap", ["gcc", "libc6-dev", "ca-certificates"]),
    "/python:": ("debootstrap", ["python3", "python3-pip", "ca-certificates"]),
    "/distroless/cc": ("packages", ["base-files", "netbase", "tzdata", "ca-certificates", "libc6", "libgcc-s1",
                                     "libgomp1", "libssl3", "libstdc++6"]),
}


def run(*command, **more):
    return subprocess.run([str(part) for part in command], check=True, **more)


def instructions(text):
    """(keyword, arguments) of every instruction, comments dropped and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            keyword, arguments = line.strip().split(None, 1)
            yield keyword.upper(), arguments.strip()


def wanted(path, patterns):
    """Whether .dockerignore lets a file through: the last pattern that matches it or a folder of it decides."""
    kept = True
    for pattern in patterns:
        name = pattern.lstrip("!")
        folders = [str(part) for part in [path, *path.parents]]
        if any(fnmatch.fnmatch(folder, name) for folder in folders):
            kept = pattern.startswith("!")
    return kept


def size(root):
    return sum(f.lstat().st_size for f in root.rglob("*") if f.is_file() and not f.is_symlink())


def context(folder):
    """Copies what the build sees: the files of the project that .dockerignore lets through."""
    patterns = [p for p in (PROJECT / ".dockerignore").read_text().splitlines() if p and not p.startswith("#")]
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=PROJECT, capture_output=True,
                             text=True, check=True).stdout.splitlines()
    for name in tracked:
        path = pathlib.Path(name)
        if wanted(path, patterns) and (PROJECT / path).is_file():
            (folder / path.parent).mkdir(parents=True, exist_ok=True)
            shutil.copy2(PROJECT / path, folder / path)


def registry_settings(root):
    """This machine's way to the registries: certificates, proxies, package clients' settings, resolver."""
    env = {}
    for name, value in os.environ.items():
        if re.search(r"CERT|CAINFO|CA_BUNDLE|_PROXY$|_proxy$|^PIP_|^CARGO_(HTTP|REGISTR|NET|SOURCE)", name):
            env[name] = value
    places = [pathlib.Path(v) for v in env.values() if v.startswith("/")]
    home = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo"))
    places += [pathlib.Path(p) for p in ("/etc/resolv.conf", "/etc/hosts", "/etc/pip.conf", "/etc/ssl/certs")]
    for place in places:
        if place.exists():
            to = root / str(place).lstrip("/")
            to.parent.mkdir(parents=True, exist_ok=True)
            if place.is_dir():
                to.mkdir(exist_ok=True)
                place = f"{place}/."
            # links inside the root would lead out of it
            run("cp", "-rL", "--remove-destination", place, to)
    for name in ("config.toml", "config"):
        if (home / name).is_file():
            (root / "cargo").mkdir(exist_ok=True)
            shutil.copy(home / name, root / "cargo" / name)
    return env


def base_root(image, work):
    kind, packages = next((v for k, v in STAND_INS.items() if k in image), (None, None))
    if kind is None:
        sys.exit(f"check-dockerfile: nothing stands in for `{image}`; add it to STAND_INS")
    root = pathlib.Path(tempfile.mkdtemp(prefix="root-", dir=work))
    root.chmod(0o755)
    if kind == "debootstrap":
        mirror = subprocess.run(["apt-get", "indextargets", "--format", "$(SITE) $(RELEASE)"], capture_output=True,
                                text=True, check=True).stdout.split("\n")
        site = next(line.split()[0] for line in mirror if line.endswith(" bookworm"))
        run("debootstrap", "--variant=minbase", f"--include={','.join(packages)}", "bookworm", root, site,
            stdout=subprocess.DEVNULL)
    else:
        debs = pathlib.Path(tempfile.mkdtemp(prefix="debs-", dir=work))
        run("apt-get", "download", "-qq", *packages, cwd=debs)
        for deb in debs.glob("*.deb"):
            run("dpkg", "-x", deb, root)
        authorities = sorted((root / "usr/share/ca-certificates").rglob("*.crt"))
        (root / "etc/ssl/certs/ca-certificates.crt").write_bytes(b"".join(f.read_bytes() for f in authorities))
        home = root / "home/nonroot"
        home.mkdir(parents=True)
        os.chown(home, 65532, 65532)
        with open(root / "etc/passwd", "w") as passwd:
            passwd.write("root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n")
    return root
