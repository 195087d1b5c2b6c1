"""Training resumes to the bit wherever it is killed; several processes train what one does."""

import json
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import command, train
from safetensors.torch import load_file
from tokenizers import Tokenizer

from phd_training import data
from phd_training.train import arguments, learning_rate

STEPS = 30


def weights(out):
    return load_file(out / "model" / "model.safetensors")


def losses(out):
    """The log without its clocks."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    return train(
        text, tmp_path_factory.mktemp("whole") / "run", "--tokens", STEPS * 256, "--save-steps", 3, "--dtype", "float32"
    )


def test_killed_at_any_moment_it_arrives_at_the_same_bits(text, uninterrupted, tmp_path):
    """SIGKILL while a checkpoint is being written, right after one, and anywhere between; then to the end."""
    out = tmp_path / "run"
    arguments = command(text, out, "--tokens", STEPS * 256, "--save-steps", 3, "--dtype", "float32")
    rng = random.Random(5)
    scratch, checkpoint, log = out / ".checkpoint.pt.tmp", out / "checkpoint.pt", out / "log.jsonl"

    def stamp(path):
        try:
            return path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    interrupted = 0
    for moment in ("writing", "written", "step", "step", "writing", "step"):
        process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        before, lines = stamp(checkpoint), log.read_text().count("\n") if log.exists() else 0
        wanted = lines + rng.randint(1, 5)
        while process.poll() is None:
            if (
                (moment == "writing" and scratch.exists())
                or (moment == "written" and stamp(checkpoint) not in (None, before))
                or (moment == "step" and log.exists() and log.read_text().count("\n") >= wanted)
            ):
                process.send_signal(signal.SIGKILL)
                interrupted += 1
                break
            time.sleep(0.0005)
        if process.wait() == 0:
            break
    assert interrupted >= 3
    subprocess.run(arguments, check=True, capture_output=True)
    assert losses(out) == losses(uninterrupted)
    expected, found = weights(uninterrupted), weights(out)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    ends = [torch.load(o / "checkpoint.pt", weights_only=True) for o in (uninterrupted, out)]
    for key, moments in ends[0]["optimizer"]["state"].items():
        assert all(
            torch.equal(torch.as_tensor(moments[m]), torch.as_tensor(ends[1]["optimizer"]["state"][key][m]))
            for m in moments
        )


def test_asked_to_stop_it_saves_and_goes_on(text, uninterrupted, tmp_path):
    out = tmp_path / "run"
    arguments = command(text, out, "--tokens", STEPS * 256, "--dtype", "float32")
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "log.jsonl").exists() or "\n" not in (out / "log.jsonl").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM
    step = torch.load(out / "checkpoint.pt", weights_only=True)["state"]["step"]
    assert 1 <= step < STEPS and losses(out)[-1]["step"] == step
    subprocess.run(arguments, check=True, capture_output=True)
    assert losses(out) == losses(uninterrupted)


def test_another_run_s_checkpoint_is_refused(text, uninterrupted):
    found = subprocess.run(
        command(text, uninterrupted, "--tokens", STEPS * 256, "--lr", "9e-3"), capture_output=True, text=True
    )
    assert found.returncode != 0 and "lr was 0.001, is 0.009" in found.stderr


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(text, uninterrupted, tmp_path, engine):
    out = tmp_path / "run"
    options = command(text, out, "--tokens", STEPS * 256, "--dtype", "float32", "--engine", engine, "--micro-batch", 1)[
        3:
    ]
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "phd_training.train",
    ]
    half = subprocess.run([*torchrun, *options, "--stop-after", "8"], capture_output=True, text=True)
    assert half.returncode == 0, half.stderr
    assert torch.load(out / "checkpoint.pt", weights_only=True)["state"]["step"] == 8
    again = subprocess.run([*torchrun, *options], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    one, two = losses(uninterrupted), losses(out)
    assert [line["step"] for line in two] == [line["step"] for line in one]
    for a, b in zip(one, two):
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=2e-4), (key, a, b)
    assert weights(out).keys() == weights(uninterrupted).keys()


def test_it_learns_logs_and_measures(trained):
    log = losses(trained)
    curve = [line["loss"] for line in log if "loss" in line]
    assert curve[-1] < curve[0] - 1.5
    assert [line for line in log if "held_out_loss" in line][-1]["held_out_loss"] < curve[0] - 1.5
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 41))


def test_schedule_rises_then_falls_as_a_cosine():
    args = arguments(["--out", "x", "--data", "y", "--lr", "1e-2", "--min-lr", "0.1", "--warmup", "0.1"])
    rates = [learning_rate(step, 100, args) for step in range(1, 101)]
    assert rates[0] == pytest.approx(1e-3) and rates[9] == pytest.approx(1e-2) and rates[-1] == pytest.approx(1e-3)
    assert rates[54] == pytest.approx(1e-2 * (0.1 + 0.9 * 0.5), rel=1e-6)
    assert all(a > b for a, b in zip(rates[9:], rates[10:]))


def test_windows_cover_the_text_in_an_order_of_the_seed():
    tokens = np.arange(1000)
    windows = data.Windows(tokens, 30, seed=1)
    firsts = [int(windows.window(i)[0]) for i in range(windows.per_pass)]
    assert len(set(firsts)) == windows.per_pass and all((f - firsts[0]) % 30 == 0 for f in firsts)
    assert firsts != sorted(firsts)
    again, other = data.Windows(tokens, 30, seed=1), data.Windows(tokens, 30, seed=2)
    assert [int(again.window(i)[0]) for i in reversed(range(windows.per_pass))] == firsts[::-1]
    assert [int(other.window(i)[0]) for i in range(windows.per_pass)] != firsts
    second = [int(windows.window(windows.per_pass + i)[0]) for i in range(windows.per_pass)]
    assert second != firsts
    assert (windows.window(5)[1:] == windows.window(5)[:-1] + 1).all() and len(windows.window(5)) == 31
    with pytest.raises(ValueError, match="too few"):
        data.Windows(np.arange(40), 30, seed=1)


def test_config_file_gives_defaults_and_unknown_keys_are_named(tmp_path, capsys):
    (tmp_path / "a.toml").write_text('data = ["text"]\nlr = 0.5\nhidden-size = 48\nbf16 = true\n')
    args = arguments(["--out", "x", "--config", str(tmp_path / "a.toml"), "--lr", "0.25"])
    assert (args.lr, args.hidden_size, args.bf16, args.data) == (0.25, 48, True, [tmp_path / "text"])
    (tmp_path / "b.toml").write_text('data = ["text"]\nlearning-rate = 0.5\n')
    with pytest.raises(SystemExit):
        arguments(["--out", "x", "--config", str(tmp_path / "b.toml")])
    assert "learning_rate" in capsys.readouterr().err


def test_upcycling_starts_from_the_vanilla_weights(text, tmp_path, trained):
    """One step at rate 0 of a vanilla folder as K = 3: the weights stay, the rules are new, the tokenizer is the folder's."""
    from phd_training.export import load, save_hub

    vanilla, tokenizer = load(trained / "model", {"copies": 1})
    save_hub(vanilla, tokenizer, tmp_path / "vanilla", torch.float32)
    out = train(
        text,
        tmp_path / "run",
        "--init",
        tmp_path / "vanilla",
        "--copies",
        3,
        "--tokens",
        256,
        "--lr",
        0,
        "--dtype",
        "float32",
    )
    before, after = load_file(tmp_path / "vanilla/model.safetensors"), weights(out)
    assert all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((out / "model/config.json").read_text())
    assert config["phd"] == {"copies": 3, "window": 16, "chunk": 32}
    assert (
        Tokenizer.from_file(str(out / "model/tokenizer.json")).get_vocab() == Tokenizer.from_str(tokenizer).get_vocab()
    )
