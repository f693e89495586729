"""Loading by hub id through the real huggingface-hub client, from a hub that this test serves on the loopback address.

python -m pytest tests/test_hub_online.py
"""

import hashlib
import os
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from helpers import peer
from transformers import BertForSequenceClassification

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOAD = (
    "import sys, minift; model, _ = minift.load(sys.argv[1], task='classify');"
    "print('sum', sum(p.sum().item() for p in model.parameters()))"
)


@pytest.fixture
def hub(tmp_path):
    """(address, requests): serves tmp_path/hub/USER/NAME as repositories, the way huggingface.co answers /resolve/."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: bool):
            requests.append((self.command, self.path))
            parts = self.path.split("?")[0].strip("/").split("/resolve/")
            path = tmp_path / "hub" / parts[0] / parts[-1].split("/", 1)[-1] if len(parts) == 2 else None
            if path is None or not path.is_file():
                repo = path is not None and (tmp_path / "hub" / parts[0]).is_dir()
                return self.head(404, 0, "X-Error-Code", "EntryNotFound" if repo else "RepoNotFound")
            content = path.read_bytes()
            self.head(200, len(content), "ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            if body:
                self.wfile.write(content)

        def head(self, status: int, length: int, name: str, value: str):
            self.send_response(status)
            for header in ((name, value), ("X-Repo-Commit", COMMIT), ("Content-Length", str(length))):
                self.send_header(*header)
            self.end_headers()

        def do_HEAD(self):
            self.answer(False)

        def do_GET(self):
            self.answer(True)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests
    server.shutdown()


def load(repo, address, cache, **env):
    """`minift.load(repo)` in a process of its own: huggingface-hub reads its settings at import."""
    settings = dict(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_HUB_DISABLE_TELEMETRY="1", no_proxy="127.0.0.1")
    env = os.environ | {"HF_ENDPOINT": address, "HF_HOME": str(cache)} | settings | env
    return subprocess.run([sys.executable, "-c", LOAD, repo], env=env, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_a_model_by_its_id(hub, tmp_path, kind):
    address, requests = hub
    theirs = peer(BertForSequenceClassification, tmp_path / "hub/someone/small-bert")
    if kind == "sharded":
        (tmp_path / "hub/someone/small-bert/model.safetensors").unlink()
        theirs.save_pretrained(tmp_path / "hub/someone/small-bert", max_shard_size="20KB")
    want = sum(p.sum().item() for p in theirs.parameters())

    first = load("someone/small-bert", address, tmp_path / "cache")
    assert first.returncode == 0, first.stderr
    assert float(first.stdout.split()[-1]) == pytest.approx(want, abs=1e-2)
    fetched = [path for method, path in requests if method == "GET" and path.endswith(".safetensors")]
    assert len(fetched) == len(list((tmp_path / "hub/someone/small-bert").glob("*.safetensors")))
    assert not any("pytorch_model" in path for _, path in requests)  # the second choice is not even asked for

    requests.clear()
    second = load("someone/small-bert", address, tmp_path / "cache")
    assert second.stdout == first.stdout and not [p for m, p in requests if m == "GET"]

    offline = load("someone/small-bert", address, tmp_path / "cache", HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout, offline.stderr


def test_no_such_model(hub, tmp_path):
    done = load("someone/nothing", hub[0], tmp_path / "cache")
    assert done.returncode == 1 and "InputError: someone/nothing: no such folder" in done.stderr


def test_the_hub_out_of_reach(tmp_path):
    """Said at once, and what to do; its client alone would try for 48 seconds."""
    code = "import time, minift.checkpoints.hub\n" + (
        "begin = time.perf_counter()\n"
        "try: minift.load('someone/small-bert')\n"
        "except minift.InputError as e: print(time.perf_counter() - begin, e)\n"
    )
    proxies = {"http_proxy", "https_proxy", "all_proxy"}
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes calls and never answers; at port 9 nobody does
        for address in ("http://127.0.0.1:9", f"http://127.0.0.1:{silent.getsockname()[1]}"):
            env = {key: value for key, value in os.environ.items() if key.lower() not in proxies}
            env |= {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0", "no_proxy": "*"}
            done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
            seconds, _, message = done.stdout.partition(" ")
            assert float(seconds) < 2.5, done.stdout
            for words in ("someone/small-bert: no such folder", "out of reach", address, "expected a folder"):
                assert words in message
            assert message.count("\n") == 1 and "builtin:" in message and f"{tmp_path}/hub, which has none" in message
