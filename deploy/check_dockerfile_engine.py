"""The Dockerfile built by buildah and the image run by podman: `deploy/check-dockerfile --build`.

Images and containers are kept below one folder, apart from those of the machine. Containers run in a network of their own that has
loopback alone.
"""
import calendar, http.client, json, os, pathlib, re, resource, shutil, socket, subprocess, sys, tempfile, time

from check_dockerfile_bases import PROJECT, base_root, context, instructions, run

PHOTOGRAPH = PROJECT / "tests/data/cat.jpg"
CHECKPOINT = PROJECT / "models/nf_regnet_cifar10"
# bytes, compressed by gzip
LIMIT = 30_000_000
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HTTP, ADMIN = 8000, 8002
STARTS = 9


def text(*command, **more):
    return run(*command, stdout=subprocess.PIPE, text=True, **more).stdout.strip()


class Engine:
    """buildah and podman over a storage of their own."""

    def __init__(self, work):
        self.work = work
        self.storage = ["--root", work / "storage", "--runroot", work / "run"]
        runtime = ["--runtime", "runc"] if shutil.which("runc") else []
        self.buildah = ["buildah", *self.storage]
        # without systemd podman complains that nothing repeats the health check
        self.podman = ["podman", "--log-level", "fatal", *self.storage, "--cgroup-manager", "cgroupfs", "--events-backend", "file", *runtime]
        # as here: a container engine without rights to raise limits starts nothing else
        limits = {"nofile": resource.RLIMIT_NOFILE, "nproc": resource.RLIMIT_NPROC}
        most = lambda kind: min(resource.getrlimit(kind)[0] % (1 << 64), 4096)
        self.limits = [word for name, kind in limits.items() for word in ("--ulimit", f"{name}={most(kind)}:{most(kind)}")]

    def run(self, *words, name=None, mounts=(), variables=(), writable=()):
        """`podman run` with a read-only root, on the host's network (which is a network of its own here)."""
        options = ["--read-only", "--read-only-tmpfs=false", "--network", "host", *self.limits]
        options += ["--cap-drop", "ALL", "--security-opt", "no-new-privileges"]
        options += ["--detach", "--name", name] if name else ["--rm"]
        for source, target, mode in mounts:
            options += ["--volume", f"{source}:{target}:{mode}"]
        for folder in writable:
            options += ["--mount", f"type=tmpfs,destination={folder}"]
        for variable in variables:
            options += ["--env", variable]
        return text(*self.podman, "run", *options, "nfold", *words, stderr=None if name else subprocess.PIPE)

    def inspect(self, name):
        return json.loads(text(*self.podman, "inspect", name))[0]

    def logs(self, name):
        return run(*self.podman, "logs", name, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout

    def remove(self, name):
        run(*self.podman, "rm", "--force", "--time", "0", name, stdout=subprocess.DEVNULL)


# --- the build -------------------------------------------------------------------------------------------------------------


def import_stand_ins(engine):
    """Makes the base images of the CPU image under the names that the Dockerfile has for them."""
    for keyword, arguments in instructions((PROJECT / "Dockerfile").read_text()):
        name, _, image = arguments.partition("=")
        if keyword == "FROM":
            return
        if keyword != "ARG" or "/" not in image or "cuda" in name.lower():
            continue
        print(f"== {image}: a stand-in", flush=True)
        root = base_root(image, engine.work)
        changes = [f"ENV PATH={PATH}"]
        if "/rust:" in image:
            sysroot = pathlib.Path(text("rustc", "--print", "sysroot"))
            for part in ("bin/cargo", "bin/rustc", "lib"):
                to = root / "usr/local" / part
                to.parent.mkdir(parents=True, exist_ok=True)
                run("cp", "-a", *([f"{sysroot / part}/.", to] if part == "lib" else [sysroot / part, to]))
            changes.append("ENV CARGO_HOME=/usr/local/cargo")
        if "/distroless/" in image:
            changes += ["USER 65532", "WORKDIR /home/nonroot", "ENV SSL_CERT_FILE=/etc/ssl/certs/ca-certificates.crt"]
        options = [word for change in changes for word in ("--change", change)]
        archive = subprocess.Popen(["tar", "-C", root, "-c", "."], stdout=subprocess.PIPE)
        run(*engine.podman, "import", "--quiet", *options, "-", image, stdin=archive.stdout, stdout=subprocess.DEVNULL)
        if archive.wait() != 0:
            sys.exit(f"check-dockerfile: {root} can't be packed")
        shutil.rmtree(root)


def build(engine, pull):
    """Builds the CPU image. The registries' settings of this machine are mounted while it builds, and in no layer."""
    folder = engine.work / "context"
    context(folder)
    shutil.copy(PROJECT / "Dockerfile", folder)
    shutil.copy(PROJECT / ".dockerignore", folder)
    authorities = os.environ.get("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    cargo = pathlib.Path(os.environ.get("CARGO_HOME", pathlib.Path.home() / ".cargo")) / "config.toml"
    mounts = [(authorities, "/etc/ssl/certs/ca-certificates.crt"), ("/etc/pip.conf", "/etc/pip.conf"),
              (cargo, "/usr/local/cargo/config.toml")]
    volumes = [f"--volume={source}:{target}:ro" for source, target in mounts if pathlib.Path(source).is_file()]
    revision = text("git", "rev-parse", "HEAD", cwd=PROJECT)
    # buildah 1.28 names stages by arguments that are given, not by their defaults
    run(*engine.buildah, "bud", "--isolation", "chroot", "--network", "host", "--format", "docker", "--layers",
        "--pull" if pull else "--pull-never", *volumes, "--build-arg", "VARIANT=cpu", "--build-arg",
        f"REVISION={revision}", "--tag", "nfold", folder)
    return revision


def packed(engine):
    """Bytes of the image's layers as a registry keeps them, by compression."""
    sizes = {}
    for compression in ("gzip", "zstd"):
        folder = engine.work / f"packed-{compression}"
        run(*engine.buildah, "push", "--quiet", "--compression-format", compression, "nfold", f"oci:{folder}:nfold",
            stdout=subprocess.DEVNULL)
        index = json.loads((folder / "index.json").read_text())
        blob = lambda entry: folder / "blobs/sha256" / entry["digest"].removeprefix("sha256:")
        manifest = json.loads(blob(index["manifests"][0]).read_text())
        sizes[compression] = [layer["size"] for layer in manifest["layers"]]
    return sizes


def contents(engine):
    """The files of the image: none is a shell, and the parts list names what is in it."""
    name = text(*engine.buildah, "from", "--pull-never", "nfold")
    root = pathlib.Path(text(*engine.buildah, "mount", name))
    try:
        found = [f for f in root.rglob("*") if f.name in ("sh", "bash", "dash", "ash", "busybox") and f.is_file()]
        assert not found, f"the image has a shell: {found}"
        parts = {}
        for file in ("usr/share/doc/nfold/sbom.cdx.json", "usr/lib/onnxruntime/sbom.cdx.json"):
            document = json.loads((root / file).read_text())
            assert document["bomFormat"] == "CycloneDX", file
            parts |= {part["name"]: part["version"] for part in document["components"]}
        locked = (PROJECT / "Cargo.lock").read_text()
        for crate in ("ort", "axum", "tonic", "png"):
            assert f'name = "{crate}"\nversion = "{parts[crate]}"' in locked, crate
        release = (root / "usr/lib/onnxruntime/VERSION").read_text().split()[0]
        assert parts["onnxruntime"] == release and "proptest" not in parts, "what is built in, and no more"
        program = (root / "usr/bin/nfold").read_bytes()
        assert b".dep-v0" in program, "the program carries no list of its crates"
        return len(parts)
    finally:
        run(*engine.buildah, "umount", name, stdout=subprocess.DEVNULL)
        run(*engine.buildah, "rm", name, stdout=subprocess.DEVNULL)


def configuration(engine, revision):
    """What the image says of itself."""
    image = json.loads(text(*engine.podman, "image", "inspect", "nfold"))[0]
    config = image["Config"]
    version = re.search(r'^version = "(.+)"', (PROJECT / "Cargo.toml").read_text(), re.M)[1]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in config["Labels"].items()}
    assert (labels["version"], labels["revision"]) == (version, revision), labels
    assert {"title", "description", "licenses"} <= set(labels), labels
    assert (config["User"], config["StopSignal"]) == ("65532:65532", "SIGTERM"), config
    assert (config["Entrypoint"], config["Cmd"]) == (["/usr/bin/nfold"], ["serve"]), config
    health = image.get("Healthcheck") or config.get("Healthcheck")
    assert health["Test"] == ["CMD", "/usr/bin/nfold", "healthcheck"], health
    return f"nfold {version}, revision {revision[:12]}"


# --- the image, run ----------------------------------------------------------------------------------------------------------


def classify(timeout=10):
    caller = http.client.HTTPConnection("127.0.0.1", HTTP, timeout=timeout)
    try:
        caller.request("POST", "/v1/classify", PHOTOGRAPH.read_bytes(), {"content-type": "image/jpeg"})
        answer = caller.getresponse()
        body = json.load(answer)
        assert answer.status == 200, body
        return body["results"][0]["predictions"]
    finally:
        caller.close()


def until(condition, what, logs, seconds=60):
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > seconds:
            sys.exit(f"check-dockerfile: not {what} after {seconds} s: {logs()}")
        time.sleep(0.05)


def served(engine, *words, **more):
    """Serves until one request is answered and one is cut in two by SIGTERM; what was seen of it."""
    name = "served"
    engine.run(*words, name=name, **more)
    healthcheck = [*engine.podman, "healthcheck", "run", name]
    try:
        healthy = lambda: subprocess.run(healthcheck, capture_output=True).returncode == 0
        until(healthy, "healthy", lambda: engine.logs(name))
        state = engine.inspect(name)["State"]
        health = state.get("Health") or state.get("Healthcheck")
        assert health["Status"] == "healthy", health
        first = classify()[0]
        assert first["label"] == "cat", first
        status = pathlib.Path(f"/proc/{state['Pid']}/status").read_text()
        uid = re.search(r"^Uid:\s+(\d+)", status, re.M)[1]
        inside = re.search(r"^NSpid:.*\s(\d+)$", status, re.M)[1]
        assert (uid, inside) == ("65532", "1"), status
        # half of a request, SIGTERM, the other half
        body = PHOTOGRAPH.read_bytes()
        head = f"POST /v1/classify HTTP/1.1\r\nhost: nfold\r\ncontent-type: image/jpeg\r\ncontent-length: {len(body)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", HTTP), timeout=10) as half:
            half.sendall(head.encode() + body[: len(body) // 2])
            time.sleep(0.2)
            run(*engine.podman, "kill", "--signal", "TERM", name, stdout=subprocess.DEVNULL)
            time.sleep(0.5)
            assert engine.inspect(name)["State"]["Running"], "it did not wait for a request in flight"
            half.sendall(body[len(body) // 2:])
            answer = http.client.HTTPResponse(half)
            answer.begin()
            body = json.load(answer)
        assert answer.status == 200 and body["results"][0]["predictions"][0]["label"] == "cat", body
        code = int(text(*engine.podman, "wait", name))
        assert code == 0, engine.logs(name)
        assert subprocess.run(healthcheck, capture_output=True).returncode != 0, "healthy without a process"
        return f"healthy, cat.jpg is a cat ({first['score']:.3f}), process 1 of user 65532; SIGTERM: drained, exit code 0"
    finally:
        engine.remove(name)


def stopped(engine, **more):
    """`podman stop` of an idle server: exit code and seconds."""
    name = "stopped"
    engine.run("serve", name=name, **more)
    try:
        until(lambda: subprocess.run([*engine.podman, "healthcheck", "run", name], capture_output=True).returncode == 0,
              "healthy", lambda: engine.logs(name))
        started = time.monotonic()
        run(*engine.podman, "stop", "--time", "30", name, stdout=subprocess.DEVNULL)
        took = time.monotonic() - started
        code = engine.inspect(name)["State"]["ExitCode"]
        assert code == 0 and took < 15, (code, took)
        return f"exit code {code} after {took:.1f} s"
    finally:
        engine.remove(name)


def stamp(value):
    """Seconds of an RFC 3339 time with any number of digits."""
    whole, _, rest = value.replace(" ", "T", 1).partition(".")
    digits = re.match(r"\d*", rest)[0] or "0"
    return calendar.timegm(time.strptime(whole[:19], "%Y-%m-%dT%H:%M:%S")) + float(f"0.{digits}")


def from_zero(engine, folder):
    """Starts nf_regnet_b0 at 192 pixels from a filled graph cache, and says what the time to the first right answer is made of."""
    made = (folder, "/made", "rw")
    engine.run("init", "nf_regnet_b0", "--out", "/made/nf_regnet_b0", mounts=[made])
    engine.run("fold", "/made/nf_regnet_b0", "--size", "192", "--repository", "/made/repository", mounts=[made])
    mounts = [(folder / "repository", "/models", "ro"), (folder, "/made", "rw")]
    cache = ["NFOLD_GRAPH_CACHE=/made/cache"]
    engine.run("serve", "--check", mounts=mounts, variables=cache)
    right, all_parts, overheads, name = None, [], [], "zero"
    for start in range(STARTS + 1):
        # the first answers without the cache
        asked = time.time()
        engine.run("serve", name=name, mounts=mounts, variables=cache if start else [])
        try:
            while True:
                try:
                    predictions = classify()
                    break
                except OSError:
                    time.sleep(0.001)
            answered = time.time()
            seen = [(p["index"], p["score"]) if "index" in p else (p["label"], p["score"]) for p in predictions]
            right = right or seen
            assert [n for n, _ in seen] == [n for n, _ in right], (seen, right)
            assert all(abs(a - b) < 1e-5 for (_, a), (_, b) in zip(seen, right)), (seen, right)
            if not start:
                continue
            # when the process began, by the clock that the log has
            ticks = pathlib.Path(f"/proc/{engine.inspect(name)['State']['Pid']}/stat").read_text().rsplit(")", 1)[1].split()[19]
            began = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + int(ticks) / os.sysconf("SC_CLK_TCK")
            lines = [json.loads(line) for line in engine.logs(name).splitlines() if line.startswith("{")]
            at = lambda words: next(stamp(line["timestamp"]) for line in lines if line["message"].startswith(words)) - began
            overheads.append(began - asked)
            points = [("process and ports", at("admin port")), ("graph read and checked", at("warming")),
                      ("engine from the cache", at("graph cache: hit")), ("first run, its golden answer", at("the golden")),
                      ("other engines and warm-up", at("ready")), ("first answer", answered - began)]
            all_parts.append([(words, time_at - before) for (words, time_at), (_, before) in zip(points, [("", 0.0), *points])])
        finally:
            engine.remove(name)
    totals = [sum(took for _, took in parts) for parts in all_parts]
    median = lambda values: sorted(values)[len(values) // 2]
    print(f"\nfrom the start of the process to the first right answer, nf_regnet_b0 at 192 pixels, graph cache filled: median "
          f"{median(totals):.2f} s of {STARTS} starts ({min(totals):.2f} to {max(totals):.2f}); `podman run` takes {median(overheads):.2f} s before that")
    for at, (words, _) in enumerate(all_parts[0]):
        print(f"  {median([parts[at][1] for parts in all_parts]) * 1e3:6.0f} ms  {words}")


def trial(work):
    """Runs the image in a network that has loopback alone."""
    engine = Engine(work)
    run("ip", "link", "set", "lo", "up")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="out-", dir=work))
    os.chown(folder, 65532, 65532)
    engine.run("fold", "/checkpoint", "--name", "demo", "--repository", "/out",
               mounts=[(CHECKPOINT, "/checkpoint", "ro"), (folder, "/out", "rw")])
    models = [(folder, "/models", "ro")]
    print("fold /checkpoint, serve:", served(engine, mounts=models), flush=True)
    print("stop:", stopped(engine, mounts=models), flush=True)
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(PROJECT / "tests/clients"))
    from hub import Hub
    hub = Hub(CHECKPOINT)
    print("serve timm/…:", served(engine, "serve", "timm/nf_regnet_b1.ra2_in1k", variables=[f"HF_ENDPOINT={hub.endpoint}"],
                                  writable=["/tmp"]), flush=True)
    from_zero(engine, folder)


def discard(work):
    """Removes images, containers and all else below the folder."""
    engine = Engine(work)
    for command in ([*engine.podman, "rm", "--all", "--force"], [*engine.buildah, "rm", "--all"]):
        subprocess.run([str(word) for word in command], capture_output=True)
    mounts = [line.split()[4] for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines()]
    for mount in sorted((m for m in mounts if m.startswith(f"{work}/")), reverse=True):
        subprocess.run(["umount", mount], capture_output=True)
    subprocess.run(["rm", "-rf", "--one-file-system", str(work)])


def check(work, pull):
    for tool in ("buildah", "podman", *(() if pull else ("debootstrap", "rustc"))):
        if not shutil.which(tool):
            sys.exit(f"check-dockerfile: --build needs {tool}")
    engine = Engine(work)
    if not pull:
        import_stand_ins(engine)
    revision = build(engine, pull)
    print("\nbuilt:", configuration(engine, revision))
    sizes = packed(engine)
    print(f"  {sum(sizes['gzip']) / 1e6:.1f} MB compressed by gzip ({' + '.join(f'{size / 1e6:.1f}' for size in sizes['gzip'])}), "
          f"{sum(sizes['zstd']) / 1e6:.1f} by zstd")
    assert sum(sizes["gzip"]) <= LIMIT, f"more than {LIMIT / 1e6:.0f} MB"
    print(f"  {contents(engine)} parts in its SBOM; no shell", flush=True)
    run("unshare", "--net", sys.executable, PROJECT / "deploy/check-dockerfile", "--trial-image", work)
    stand_ins = "" if pull else " (Debian's packages and this machine's Rust stood in for the base images)"
    print(f"""
verified: the CPU image as buildah builds it{stand_ins}, run by podman with a read-only root, without capabilities: HEALTHCHECK, STOPSIGNAL,
  user, labels, SBOM and size; it folds, serves, fetches from a hub on loopback, drains and stops as process 1.
not verified: BuildKit, other architectures, the image for CUDA{'' if pull else ', the base images themselves'}.""")
