"""Uploads that are refused: httpx, curl and Node send all of a large body, and still read why it was refused.

    python uploads.py HTTP_ADDRESS GRPC_ADDRESS

The server wants the key of documents.py and takes bodies of 1 MiB.
"""
import json
import shutil
import subprocess
import sys
import tempfile

import httpx

from documents import KEY

BODY = b"x" * (10 << 20)
# target, content type, with the key, status
CASES = [
    ("/v1/classify", "image/png", False, 401),
    ("/v1/classify?model=other", "image/png", True, 404),
    ("/nothing", "image/png", True, 404),
    ("/v1/classify?top_k=x", "image/png", True, 400),
    ("/v1/classify", "text/css", True, 415),
    ("/v1/classify", "image/png", True, 413),
    ("/v2/health/live", "image/png", True, 405),
]

NODE = """
const [protocol, to, target, headers, file] = JSON.parse(process.argv[1]);
const body = require('fs').readFileSync(file);
let text = '', status;
const failed = error => { console.error(error); process.exit(1); };
const done = () => process.stdout.write(JSON.stringify([status, JSON.parse(text)]), () => process.exit(0));
setTimeout(() => failed('no answer'), 20000);
let request;
if (protocol === 2) {
  const session = require('http2').connect(to);
  session.on('error', failed);
  request = session.request({ ':method': 'POST', ':path': target, ...headers });
  request.on('response', head => status = head[':status']);
  request.on('data', part => text += part);
  request.on('end', done);
} else {
  request = require('http').request(to + target, { method: 'POST', headers });
  request.on('response', response => {
    status = response.statusCode;
    response.on('data', part => text += part);
    response.on('end', done);
  });
}
request.on('error', failed);
request.end(body);
"""


def by_httpx(protocol, to, target, headers, file):
    with httpx.Client(http1=protocol == 1, http2=protocol == 2, timeout=20) as client:
        answer = client.post(to + target, content=BODY, headers=headers)
        return answer.status_code, answer.json()


def by_curl(protocol, to, target, headers, file):
    command = ["curl", "--silent", "--show-error", "--max-time", "20", "--write-out", "\n%{http_code}"]
    command += ["--http2-prior-knowledge" if protocol == 2 else "--http1.1", "--data-binary", f"@{file}"]
    # both ways: asking before the body, and not
    for name, value in headers.items():
        command += ["--header", f"{name}: {value}"]
    answers = []
    for more in ([], ["--header", "expect:"]):
        done = subprocess.run([*command, *more, to + target], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert done.returncode == 0, done.stderr
        text, status = done.stdout.rsplit("\n", 1)
        answers.append((int(status), json.loads(text)))
    assert answers[0] == answers[1], answers
    return answers[0]


def by_node(protocol, to, target, headers, file):
    arguments = json.dumps([protocol, to, target, headers, file])
    done = subprocess.run(["node", "-e", NODE, arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def main():
    to = f"http://{sys.argv[1]}"
    clients = {"httpx": by_httpx}
    for name, client in (("curl", by_curl), ("node", by_node)):
        if shutil.which(name):
            clients[name] = client
        else:
            print(f"  SKIPPED {name}: not installed here")
    with tempfile.NamedTemporaryFile() as file:
        file.write(BODY)
        file.flush()
        for name, client in clients.items():
            for protocol in (1, 2):
                for target, kind, key, expected in CASES:
                    headers = {"content-type": kind, **({"authorization": f"Bearer {KEY}"} if key else {})}
                    status, body = client(protocol, to, target, headers, file.name)
                    assert status == expected and body["error"], (name, protocol, target, status, body)
    print(f"  {len(CASES)} refused uploads over HTTP/1.1 and HTTP/2 by {', '.join(clients)}")


if __name__ == "__main__":
    main()
