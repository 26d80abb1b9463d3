"""The examples of docs/api.md, run as they stand: `sh` and `python` blocks, and what they print against the block below.

A `json` block holds what must come, numbers to within a hundredth; in texts and strings `…` stands for anything.
"""
import json
import math
import re
import subprocess
from pathlib import Path

KEY = "an-example-of-a-key"


def blocks(text):
    """(line, kind, words after it, code) of each fenced block."""
    for found in re.finditer(r"^```(\w+)([^\n]*)\n(.*?)^```$", text, re.M | re.S):
        yield text[: found.start()].count("\n") + 1, found[1], found[2].split(), found[3]


def like(pattern, text):
    """Whether `text` is `pattern`, whose `…` stand for anything on a line."""
    return re.fullmatch(".*".join(re.escape(part) for part in pattern.split("…")), text) is not None


def same(wanted, came, place="answer"):
    """Fails where two JSON values differ."""
    assert type(wanted) is type(came) or {type(wanted), type(came)} <= {int, float}, f"{place}: {came!r} for {wanted!r}"
    if isinstance(wanted, dict):
        assert wanted.keys() == came.keys(), f"{place}: {sorted(came)} for {sorted(wanted)}"
        for key in wanted:
            same(wanted[key], came[key], f"{place}.{key}")
    elif isinstance(wanted, list):
        assert len(wanted) == len(came), f"{place}: {came} for {wanted}"
        for i, (one, other) in enumerate(zip(wanted, came)):
            same(one, other, f"{place}[{i}]")
    elif isinstance(wanted, str):
        assert like(wanted, came), f"{place}: {came!r} for {wanted!r}"
    else:
        assert math.isclose(wanted, came, rel_tol=0.01), f"{place}: {came} for {wanted}"


def check(document, folder, python, servers):
    """Runs the examples in `folder`; `servers` by the word after a block's kind. How many ran."""
    ran, said, line = 0, None, 0
    for at, kind, words, code in blocks(Path(document).read_text()):
        if kind in ("sh", "python"):
            assert said is None, f"{document}:{line}: nothing says what this prints"
            addresses = servers[words[0] if words else ""].addresses
            for port, protocol in ((8000, "http"), (8001, "grpc"), (8002, "admin")):
                code = code.replace(f"localhost:{port}", addresses[protocol])
            command = [python, "-c", code] if kind == "python" else ["bash", "-euo", "pipefail", "-c", code]
            # curl's progress goes to stderr
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, f"{document}:{at}: exit code {done.returncode}: {done.stdout}{done.stderr}"
            ran, said, line = ran + 1, done.stdout, at
        elif kind in ("json", "text"):
            assert said is not None, f"{document}:{at}: nothing prints this"
            if kind == "json":
                try:
                    same(json.loads(code), json.loads(said))
                except (AssertionError, ValueError) as error:
                    raise AssertionError(f"{document}:{line}: {error}") from None
            else:
                said = said.replace("\r\n", "\n")
                assert like(code.strip(), said.strip()), f"{document}:{line}: printed\n{said}\nnot\n{code}"
            said = None
    assert said is None, f"{document}:{line}: nothing says what this prints"
    return ran
