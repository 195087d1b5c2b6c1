"""PyTorch and libphd agree on exported checkpoints: Hub folders and GGUF files."""

import json
import subprocess

import numpy as np
import pytest
import torch
from conftest import GOLDEN, ROOT
from safetensors.numpy import load_file
from tokenizers import Tokenizer

from phd_training import data
from phd_training.evaluate import evaluate
from phd_training.export import load, main

SEGMENT = 64


def score(phd, model, text, *options):
    found = subprocess.run(
        [phd, "score", model, text, "--segment", str(SEGMENT), "--cache", "f32", "--json", *options],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(found.stdout)


def torch_score(folder, text):
    model, tokenizer = load(folder)
    return evaluate(model, Tokenizer.from_str(tokenizer), text.read_text(), SEGMENT)


@pytest.fixture(scope="module")
def exported(trained, phd, tmp_path_factory):
    """The run as f32 and bf16 folders, the latter also as GGUF files."""
    out = tmp_path_factory.mktemp("exported")
    assert main([str(trained), str(out / "f32"), "--dtype", "float32"]) == 0
    assert main([str(trained), str(out / "bf16"), "--gguf", "bf16", "q8_0", "--phd", str(phd)]) == 0
    return out


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_libphd_scores_a_folder_as_pytorch_does(exported, phd, text, dtype):
    expected, found = torch_score(exported / dtype, text), score(phd, exported / dtype, text)
    assert found["positions"] == expected["positions"]
    assert found["mean_nll"] == pytest.approx(expected["mean_nll"], rel=1e-3 if dtype == "bf16" else 1e-5)
    # Wrong rules would be told apart: the same weights run as the vanilla base.
    vanilla = score(phd, exported / dtype, text, "--copies", "1")
    assert abs(vanilla["mean_nll"] / expected["mean_nll"] - 1) > 2e-3


def test_libphd_scores_gguf_files_as_pytorch_does(exported, phd, text):
    expected = torch_score(exported / "bf16", text)["mean_nll"]
    assert score(phd, f"{exported}/bf16-bf16.gguf", text)["mean_nll"] == pytest.approx(expected, rel=1e-3)
    assert score(phd, f"{exported}/bf16-q8_0.gguf", text)["mean_nll"] == pytest.approx(expected, rel=1e-2)


def test_a_gguf_file_comes_back_as_it_went(exported, text):
    """Rules, weights and tokenizer through `phd convert` and back: upcycling may start from such a file."""
    folder, tokenizer = load(exported / "bf16")
    file, again = load(f"{exported}/bf16-bf16.gguf")
    assert file.config.phd == folder.config.phd == {"copies": 2, "window": 16, "chunk": 32}
    theirs = dict(file.state_dict())
    assert all(torch.equal(value, theirs[name]) for name, value in folder.state_dict().items())
    for sample in (text.read_text(), "Naïve  café\n\n 12345"):
        assert Tokenizer.from_str(again).encode(sample).ids == Tokenizer.from_str(tokenizer).encode(sample).ids
    upcycled, _ = load(f"{exported}/bf16-q8_0.gguf", {"copies": 3})
    assert upcycled.config.phd == {"copies": 3, "window": 0, "chunk": 0}


class Field:
    def __init__(self, value):
        self.contents = lambda: value


def test_gguf_tokenizers_give_llama_cpp_s_ids():
    """tests/data/tokenizer: recorded for the first demo model's vocabulary with three tokens replaced, for each way to cut words."""
    vocabulary = json.loads((ROOT / "models/kjv-phd-cswa-2-16-32/tokenizer.json").read_text())["model"]
    tokens = sorted(vocabulary["vocab"], key=vocabulary["vocab"].get)
    replaced, tokens[2046:] = set(tokens[2046:]), ["<|im_start|>", "<user>"]
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in vocabulary["merges"]]
    fields = {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": [3] + [1] * 2045 + [3, 4],
        "merges": [" ".join(pair) for pair in merges if "".join(pair) not in replaced],
    }
    recorded = json.loads((ROOT / "tests/data/tokenizer/llama_cpp.json").read_text())
    for pre, cases in recorded.items():
        tokenizer = data.gguf_tokenizer({f"tokenizer.ggml.{k}": Field(v) for k, v in {**fields, "pre": pre}.items()})
        for case in cases:
            assert tokenizer.encode(case["text"], add_special_tokens=False).ids == case["parsed"], (pre, case["text"])
    assert data.gguf_tokenizer({}) is None
    with pytest.raises(ValueError, match="'tekken'.*--tokenizer"):
        data.gguf_tokenizer({f"tokenizer.ggml.{k}": Field(v) for k, v in {**fields, "pre": "tekken"}.items()})


@pytest.mark.parametrize("name", ["qwen2-cswa-k2-w4-c8", "qwen3-cswa-k4-w3-c8"])
def test_other_families_come_back_from_gguf(name, phd, tmp_path):
    subprocess.run([phd, "convert", GOLDEN / name, tmp_path / "model.gguf"], check=True, capture_output=True)
    model, _ = load(tmp_path / "model.gguf")
    golden = load_file(GOLDEN / name / "golden.safetensors")
    with torch.no_grad():
        found = (
            model.eval()(torch.as_tensor(golden["tokens"].astype(np.int64))[None], use_cache=False).logits[0].numpy()
        )
    assert np.abs(found - golden["logits"]).max() / np.abs(golden["logits"]).max() < 1e-5


def test_a_wrong_path_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nowhere.gguf"):
        load(tmp_path / "nowhere.gguf")
