"""The models that the repository ships: PyTorch against what the float64 reference says of them (expected.json)."""

import json

import pytest
import torch
from conftest import ROOT
from tokenizers import Tokenizer

from phd_training.export import load

MODELS = sorted(p.parent for p in (ROOT / "models").glob("*/expected.json"))


@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
@pytest.mark.parametrize("rules", [None, {"copies": 1}], ids=["phd", "vanilla"])
@torch.no_grad()
def test_held_out_loss_is_the_reference_s(folder, rules):
    expected = json.loads((folder / "expected.json").read_text())
    model, tokenizer = load(folder, rules)
    tokens = Tokenizer.from_str(tokenizer).encode((folder / expected["file"]).read_text(), add_special_tokens=False).ids
    assert len(tokens) == expected["tokens"]
    total = 0.0
    for start in range(0, len(tokens) - 1, expected["window"]):
        piece = torch.tensor(tokens[start : start + expected["window"] + 1])
        logits = model.eval()(piece[None, :-1], use_cache=False).logits[0]
        total += torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum").double().item()
    key = "mean_nll" if rules is None else "mean_nll_if_run_as_vanilla"
    assert total / (len(tokens) - 1) == pytest.approx(expected[key], abs=1e-5)


@pytest.mark.parametrize("folder", MODELS, ids=lambda p: p.name)
def test_prompts_continue_as_the_reference_s(folder):
    model, tokenizer = load(folder)
    tokenizer = Tokenizer.from_str(tokenizer)
    for case in json.loads((folder / "expected.json").read_text())["greedy"]:
        ids = tokenizer.encode(case["prompt"], add_special_tokens=False).ids
        assert ids == case["tokens"]
        found = model.generate(
            torch.tensor([ids]), max_new_tokens=len(case["greedy"]), do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(ids) :].tolist()
        assert found == case["greedy"]
        assert tokenizer.decode(found) == case["text"]
