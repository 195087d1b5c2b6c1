import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
PHD = Path(os.environ.get("PHD", ROOT / "target" / "release" / "phd"))

# What a run on two cores and no GPU needs; larger ones set these themselves.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TEXT = """The quick brown fox jumps over the lazy dog, and the dog, being lazy, does not mind at all.
It was the best of foxes, it was the worst of dogs; and there went out a decree that all the world should jump.
"""


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A small text with enough variety to be learnt from: numbered sentences about foxes."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    lines = [f"{TEXT}Number {i} saw {i * 7 % 13} dogs and {i * i % 17} foxes. " for i in range(120)]
    path.write_text("\n".join(lines))
    return path


SMALL = [
    "--vocab-size",
    "320",
    "--context",
    "64",
    "--batch",
    "4",
    "--hidden-size",
    "32",
    "--intermediate-size",
    "64",
    "--layers",
    "2",
    "--heads",
    "4",
    "--kv-heads",
    "2",
    "--copies",
    "2",
    "--window",
    "16",
    "--chunk",
    "32",
    "--log-steps",
    "1",
    "--eval-steps",
    "0",
    "--no-tensorboard",
]


def command(text, out, *options):
    return [
        sys.executable,
        "-m",
        "phd_training.train",
        "--data",
        str(text),
        "--held-out",
        str(text),
        "--out",
        str(out),
        *SMALL,
        *map(str, options),
    ]


def train(text, out, *options):
    subprocess.run(command(text, out, *options), check=True, capture_output=True, text=True)
    return out


@pytest.fixture(scope="session")
def trained(text, tmp_path_factory):
    """A small PHD-CSWA run of 40 steps, in bfloat16 and with TensorBoard."""
    out = tmp_path_factory.mktemp("run") / "run"
    arguments = [
        o for o in command(text, out, "--tokens", 40 * 256, "--bf16", "--lr", "5e-3") if o != "--no-tensorboard"
    ]
    subprocess.run(arguments, check=True, capture_output=True, text=True)
    return out


@pytest.fixture(scope="session")
def phd():
    if not PHD.is_file():
        pytest.fail(f"{PHD} is missing: `make build`, or set PHD")
    return PHD
