import json
import subprocess
import sys

import pytest

from phd_training.compare import cache_bytes


def test_table_and_plot_of_finished_runs(trained, phd, text, tmp_path):
    """A run stands in for two variants and two seeds: equal losses, so the differences are zero; unfinished runs are left out."""
    for name in ("vanilla-s1", "vanilla-s2", "phd-cswa-2-16-32-s1"):
        (tmp_path / "runs" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "runs" / name).symlink_to(trained)
    (tmp_path / "runs" / "phd-k2-s1").mkdir()
    out = tmp_path / "compare"
    found = subprocess.run(
        [
            sys.executable,
            "-m",
            "phd_training.compare",
            tmp_path / "runs",
            "--held-out",
            text,
            "--phd",
            phd,
            "--out",
            out,
            "--segment",
            "64",
            "--context",
            "64",
        ],
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stderr
    results = json.loads(out.with_suffix(".json").read_text())
    assert sorted(results) == ["phd-cswa-2-16-32", "vanilla"] and sorted(results["vanilla"]) == ["1", "2"]
    run = results["vanilla"]["1"]
    assert run["tokens"] == 40 * 256 and run["copies"] == 2 and run["step_ms"] > 0 and 0 < run["bits_per_byte"] < 8
    # What PyTorch measured at the end of training, but for bfloat16 weights and the segments' last tokens.
    assert run["loss"] == pytest.approx(run["curve"][-1][1], rel=5e-3)
    assert "+0.0000 (+0.0000)" in out.with_suffix(".md").read_text()
    assert out.with_suffix(".svg").read_text().lstrip().startswith("<?xml")


def test_cache_bytes():
    config = {"num_hidden_layers": 4, "num_key_value_heads": 2, "head_dim": 32}
    assert cache_bytes(config, 100) == (4 * 2 * 32 * 2 * 2 * 100, 0)
    for copies, window, chunk, ring in (
        (2, 16, 32, 16),
        (3, 16, 32, 16),
        (2, 64, 32, 32),
        (3, 64, 0, 64),
        (2, 0, 0, 0),
    ):
        config["phd"] = {"copies": copies, "window": window, "chunk": chunk}
        assert cache_bytes(config, 100) == (102400, 1024 * ring)
