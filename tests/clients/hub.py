"""A model hub on loopback, as far as downloads need one, with content on another host; and Python's `huggingface_hub` against
the same cache as nfold, both ways.

    python3 hub.py serve CHECKPOINT         # every `timm/…` is this checkpoint; prints its address
    python  hub.py client NFOLD CHECKPOINT  # in an environment with huggingface_hub
"""
import hashlib
import http.server
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

COMMIT = "a" * 40


class Hub:
    def __init__(self, checkpoint):
        self.files = {name: (Path(checkpoint) / name).read_bytes() for name in ("config.json", "model.safetensors")}
        self.requests = []
        elsewhere = self.listen("127.0.0.2", self.content)
        self.cdn = "http://{}:{}".format(*elsewhere.server_address)
        self.endpoint = "http://{}:{}".format(*self.listen("127.0.0.1", self.hub).server_address)

    def listen(self, host, answer):
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                if not self.path.startswith("/api/agent"):
                    hub.requests.append((self.command, self.path))
                status, headers, body = answer(self)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer((host, 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return server

    def hub(self, request):
        repository, _, rest = request.path.lstrip("/").partition("/resolve/")
        revision, _, name = rest.partition("/")
        if not repository.startswith("timm/"):
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if name not in self.files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        body = self.files[name]
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(body).hexdigest()
            headers = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(body)), "Location": f"{self.cdn}/{name}?signed"}
            return 302, {"X-Repo-Commit": COMMIT, **headers}, b""
        digest = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{digest}"'}, body

    def content(self, request):
        body = self.files[request.path.lstrip("/").partition("?")[0]]
        start = request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-")
        if start == "0":
            return 200, {"ETag": '"another"'}, body
        return 206, {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}, body[int(start):]


def client(nfold, checkpoint):
    hub = Hub(checkpoint)
    name = "timm/nf_regnet_b1.ra2_in1k"
    with tempfile.TemporaryDirectory() as work:
        for first in ("nfold", "huggingface_hub"):
            cache = Path(work, first)
            cache.mkdir()
            variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "NFOLD_"))}
            variables |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"}
            offline = {**variables, "HF_HUB_OFFLINE": "1"}
            fold = [nfold, "fold", name, "--repository", cache / "repository"]
            # what each does with the cache, in a process of its own: Python reads the variables when it starts
            fetch = [sys.executable, "-c", FETCH, name]
            order = [fold, fetch] if first == "nfold" else [fetch, fold]
            done = subprocess.run(order[0], env=variables, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            before = sorted(str(f) for f in (cache / "hub").rglob("*"))
            assert hub.requests
            hub.requests.clear()
            done = subprocess.run(order[1], env=offline, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert not hub.requests, hub.requests
            # the other way round, online: nothing is fetched a second time
            done = subprocess.run([*order[1], *(["--replace"] if order[1] is fold else [])], env=variables, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert all(method == "HEAD" for method, _ in hub.requests), hub.requests
            after = sorted(str(f) for f in (cache / "hub").rglob("*"))
            grown = [f for f in after if f not in before and ".locks" not in f and not f.endswith(("CACHEDIR.TAG", ".no_exist"))]
            assert not grown, grown
            print(f"  cached by {first}, read by the other offline: the same {len(hub.files)} files")


FETCH = """
import sys
from pathlib import Path
from huggingface_hub import hf_hub_download, scan_cache_dir
paths = [hf_hub_download(sys.argv[1], name) for name in ("config.json", "model.safetensors")]
assert len({Path(path).parent for path in paths}) == 1, paths
cache = scan_cache_dir()
assert not cache.warnings, cache.warnings
(repository,) = cache.repos
(revision,) = repository.revisions
assert revision.refs == frozenset({"main"}) and revision.nb_files == 2, revision
"""


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        print(Hub(sys.argv[2]).endpoint, flush=True)
        threading.Event().wait()
    else:
        client(*sys.argv[2:])
