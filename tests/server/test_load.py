"""phd-load for 20 seconds: 64 clients, some of them rude; afterwards nothing may be lost (docs/server-tests.md)."""

import json
import os
import subprocess

from conftest import ROOT, running

# Small and quick, so that 20 seconds are thousands of requests; and it reads each token twice.
DEMO_MODEL = ROOT / "models/kjv-phd-cswa-2-16-32"
LOAD = os.environ.get("PHD_LOAD", ROOT / "target/phd-load")


def test_load(tmp_path):
    with running(tmp_path, "--model", DEMO_MODEL, "--chat-template", "chatml", "--parallel", 8, "--ctx-size", 8192,
                 "--metrics", "--slots", "--slot-save-path", tmp_path) as url:
        run = subprocess.run([LOAD, "-url", url, "-clients", "64", "-duration", "20s", "-json", tmp_path / "report.json"],
                             capture_output=True, text=True, timeout=400)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    # Every kind of request was made, and each ended as it should.
    for kind in ["chat", "chat, stream", "completion", "completion, stream", "probe"]:
        assert report["kinds"][kind].get("answered"), report
    for kind in ["too long a prompt", "no JSON", "wrong types"]:
        assert report["kinds"][kind].get("refused"), report
    assert report["kinds"]["hang up in the answer"].get("disconnected"), report
    print(run.stdout)
