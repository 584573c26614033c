"""A model by its id: huggingface_hub's own client, against a server on this machine that speaks the hub's routes."""

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from pathlib import Path

import pytest

from gshardx.convert.hub import fetched
from gshardx.errors import BadInput
from tests.convert.test_public import PUBLIC

COMMIT, OLD = "a" * 40, "b" * 40
FILES = {path.name: path.read_bytes() for path in (PUBLIC / "mixtral").iterdir() if path.suffix != ".npz"}
NEEDED = {**FILES, "tokenizer_config.json": b"{}"}
OTHERS = ("original/model.safetensors", "consolidated.00.safetensors", "pytorch_model.bin", "README.md")
FILES = NEEDED | dict.fromkeys(OTHERS, b"{}")
ASKED = []
"""Paths, in the order in which they came."""


class Hub(http.server.BaseHTTPRequestHandler):
    """One model, tiny/mixtral, with a tag; some that it does not give."""

    def do_HEAD(self):
        path = urllib.parse.urlsplit(self.path).path
        ASKED.append(path)
        found = re.fullmatch(r"(?:/api/models)?/tiny/(\w+)/(revision|tree|resolve)/([\w.]+)/?(.*)", path)
        if not found or found[1] == "nothing":
            return self.answer(401, {"X-Error-Code": "RepoNotFound"})
        name, route, revision, file = found.groups()
        if name == "gated":
            return self.answer(403, {"X-Error-Code": "GatedRepo"})
        if name == "broken":
            return self.answer(500, {})
        commit = {"main": COMMIT, COMMIT: COMMIT, "v1": OLD, OLD: OLD}.get(revision)
        if commit is None:
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        if route == "revision":
            about = {"id": f"tiny/{name}", "sha": commit, "siblings": [{"rfilename": one} for one in FILES]}
            return self.answer(200, {}, json.dumps(about).encode())
        if route == "tree":
            entries = [{"type": "file", "path": one, "size": len(FILES[one]), "oid": digest(one)} for one in FILES]
            return self.answer(200, {}, json.dumps(entries).encode())
        return self.answer(200, {"ETag": f'"{digest(file)}"', "X-Repo-Commit": commit}, FILES[file])

    do_GET = do_HEAD

    def answer(self, status, headers, content=b""):
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def digest(file):
    return hashlib.sha1(FILES[file]).hexdigest()


@pytest.fixture(scope="module")
def hub():
    pytest.importorskip("huggingface_hub")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


FETCH = """
import sys
from gshardx.convert.hub import fetched
from gshardx.errors import BadInput
try:
    print(fetched(*sys.argv[1:]))
except BadInput as error:
    print(f"error: {error}")
"""


def run(hub, home, *argv, **more):
    """A process of its own, as the client reads its settings when it is imported."""
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    out = subprocess.run([sys.executable, *argv], env=os.environ | settings | more, capture_output=True, text=True)
    assert "Traceback" not in out.stderr, out.stderr
    return out


def said(hub, home, *argv, **more):
    return run(hub, home, "-c", FETCH, *argv, **more).stdout.strip()


def test_what_a_model_needs_is_fetched_once_and_found_without_a_network(hub, tmp_path):
    place = said(hub, tmp_path, "tiny/mixtral")
    assert place.endswith(f"/snapshots/{COMMIT}")
    assert {path.name: path.read_bytes() for path in Path(place).iterdir()} == NEEDED
    ASKED.clear()
    assert said(hub, tmp_path, "tiny/mixtral", HF_HUB_OFFLINE="1") == place
    assert ASKED == []
    assert said("http://127.0.0.1:9", tmp_path, "tiny/mixtral") == place, "no network"
    assert said(hub, tmp_path, "tiny/mixtral@v1").endswith(OLD)
    assert said(hub, tmp_path, "tiny/mixtral", "v1").endswith(OLD)


@pytest.mark.parametrize(
    ("name", "line", "settings"),
    [
        ("tiny/nothing", "tiny/nothing: no such directory, and as a model on the hub it is not there, or private", {}),
        ("tiny/gated", "as a model on the hub it is gated; ask for access on its page", {}),
        ("tiny/mixtral@v9", "it has no revision v9; give a branch, tag or commit", {}),
        ("tiny/mixtral", "not in the cache, or in part, and HF_HUB_OFFLINE is set", {"HF_HUB_OFFLINE": "1"}),
        ("tiny/mixtral", "http://127.0.0.1:9 can't be reached", {"HF_ENDPOINT": "http://127.0.0.1:9"}),
        ("tiny/broken", "tiny/broken: no such directory, and as a model on the hub it", {}),
    ],
)
def test_what_can_not_be_fetched_is_one_line(hub, tmp_path, name, line, settings):
    out = said(hub, tmp_path, name, **settings)
    assert out.startswith("error: ")
    assert line in out
    assert "\n" not in out


def test_without_the_package_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(BadInput, match=r"runs/qwen: no such directory, .*pip install 'gshardx\[hf\]'"):
        fetched("runs/qwen")


def test_directories_and_what_is_no_id_are_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name").mkdir(parents=True)
    for name in ("org/name", "name", "/a/b", "./a/b", "a/b/c", "../a", "a/b@", "~/b"):
        assert str(fetched(name)) == name.removeprefix("./")
    with pytest.raises(BadInput, match="--revision v1: is for models on the hub, and org/name is a directory"):
        fetched("org/name", "v1")
    with pytest.raises(BadInput, match="--revision v1: a/b@v2 names another"):
        fetched("a/b@v2", "v1")


@pytest.mark.slow
def test_the_command_converts_from_the_hub(hub, tmp_path):
    command = ["-m", "gshardx.convert", "--from", "tiny/mixtral@v1", "--to", str(tmp_path / "run")]
    out = run(hub, tmp_path, *command)
    assert (out.returncode, f"{OLD} (mixtral) to {tmp_path / 'run'}" in out.stdout) == (0, True), out
    out = run(hub, tmp_path, *command[:3], "tiny/nothing", "--to", str(tmp_path / "other"))
    assert (out.returncode, out.stderr.startswith("error: tiny/nothing: "), out.stderr.count("\n")) == (2, True, 1)
