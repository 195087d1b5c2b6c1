"""The model against the float64 reference's results in tests/data/golden."""

import json

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from phd_training.configuration_phd import PhdConfig
from phd_training.export import save_hub
from phd_training.modeling_phd import PhdCache, PhdForCausalLM, Rules

NAMES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())


def load(name):
    golden = load_file(GOLDEN / name / "golden.safetensors")
    model = PhdForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32).eval()
    return model, torch.as_tensor(golden["tokens"].astype(np.int64))[None], golden


def difference(found, expected):
    return float(np.abs(found.detach().numpy() - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_logits_are_the_reference_s(name):
    model, tokens, golden = load(name)
    assert difference(model(tokens, use_cache=False).logits[0], golden["logits"]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_generate_continues_as_the_reference(name):
    model, tokens, golden = load(name)
    prompt = tokens[:, : tokens.shape[1] // 2]
    found = model.generate(prompt, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert found[0, prompt.shape[1] :].tolist() == golden["greedy"].tolist()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_pieces_through_the_cache_are_the_whole(name):
    model, tokens, golden = load(name)
    rng = np.random.default_rng(7)
    cache, start, found = PhdCache(model.config), 0, []
    while start < tokens.shape[1]:
        n = int(rng.integers(1, 14))
        found.append(model(tokens[:, start : start + n], past_key_values=cache, use_cache=True).logits[0])
        start += n
    assert difference(torch.cat(found), golden["logits"]) < 1e-5


@pytest.mark.parametrize("name", ["llama-vanilla", "llama-phd-k3", "llama-swa-k3-w16", "llama-cswa-k4-w5-c6"])
@torch.no_grad()
def test_flex_attention_sees_the_same(name):
    model, tokens, golden = load(name)
    model.config._attn_implementation = "flex_attention"
    assert difference(model(tokens, use_cache=False).logits[0], golden["logits"]) < 1e-5


@pytest.mark.parametrize("name", ["llama-cswa-k3-w16-c32", "llama-swa-k2-w4"])
def test_beams_and_batches_keep_their_own_hidden_rows(name):
    model, tokens, _ = load(name)
    prompts = tokens[0, :36].view(3, 12)
    options = dict(max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    for beams in (1, 3):
        cached, whole = (
            model.generate(prompts, num_beams=beams, use_cache=cache, **options) for cache in (True, False)
        )
        assert cached.tolist() == whole.tolist()


@torch.no_grad()
def test_the_cache_keeps_originals_and_the_band_alone():
    model, tokens, _ = load("llama-cswa-k3-w16-c32")
    cache = PhdCache(model.config)
    for n in (1, 31, 32, 33, 40, 47):
        cache = PhdCache(model.config)
        model(tokens[:, :n], past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == n == cache.layers[0].keys.shape[2]
        # The next token is at position n: 16 hidden tokens are 8 positions of 2, and a chunk starts anew at multiples of 32.
        assert cache.hidden[0][0].shape[2] == 2 * min(8, n % 32)


def test_attention_grows_with_k_and_not_with_its_square():
    def scores(copies, n=2048):
        plan = Rules(copies, 16, 32).plan(0, n, range(1, copies), "cpu", torch.float32)
        return sum(mask.numel() for *_, mask in plan)

    for copies in (3, 5, 9, 17):
        assert scores(copies) / (copies - 1) < 1.05 * scores(2)


def test_blocks_see_what_the_rules_say(monkeypatch):
    """Blocks of several sizes against the dense mask, with windows that end inside positions and chunks that blocks cut."""
    import phd_training.modeling_phd as modeling

    rng = np.random.default_rng(3)
    for _ in range(40):
        copies, window, chunk = int(rng.integers(2, 6)), int(rng.integers(0, 12)), int(rng.integers(0, 9))
        n, past = int(rng.integers(1, 40)), int(rng.integers(0, 20))
        monkeypatch.setattr(modeling, "BLOCK_ROWS", int(rng.integers(1, 64)))
        rules = Rules(copies, window, chunk)
        for a, b, first, mask in rules.plan(past, n, range(1, copies), "cpu", torch.float32):
            for row, (i, s) in enumerate((i, s) for i in range(past + a, past + b) for s in range(1, copies)):
                expected = set()
                for j in range(past + n):
                    for r in range(copies):
                        own, original = j == i and r <= s, r == 0 and j < i
                        near = i * (copies - 1) + s - j * (copies - 1) - r <= window and (
                            not chunk or i // chunk == j // chunk
                        )
                        if own or original or (r >= 1 and j < i and window and near):
                            expected.add((j, r))
                keys = [(j, 0) for j in range(past + b)] + [
                    (j, r) for j in range(first, past + b) for r in range(1, copies)
                ]
                assert {key for key, value in zip(keys, mask[row]) if value == 0} == expected


def test_exported_folder_loads_with_trust_remote_code(tmp_path):
    model, tokens, golden = load("llama-cswa-k4-w5-c6")
    save_hub(model, None, tmp_path / "out", torch.float32)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert type(again).__module__.startswith("transformers_modules")
    assert difference(again(tokens, use_cache=False).logits[0], golden["logits"]) < 1e-5
    # Without the remote code it is the vanilla base.
    vanilla = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, _, _ = load("llama-cswa-k4-w5-c6")
    base = PhdForCausalLM(PhdConfig(**{**ours.config.to_dict(), "phd": None}))
    base.load_state_dict(ours.state_dict())
    assert difference(vanilla(tokens).logits[0], base(tokens).logits[0].detach().numpy()) < 1e-5


def test_loss_is_that_of_the_logits_and_reaches_every_weight():
    model, tokens, golden = load("qwen3-cswa-k4-w3-c8")
    model.train()
    loss = model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss
    logits = torch.as_tensor(golden["logits"][:-1], dtype=torch.float64)
    expected = torch.nn.functional.cross_entropy(logits, tokens[0, 1:])
    assert abs(loss.item() - expected.item()) < 1e-5
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.activation_checkpointing_enable()
    model(tokens[:, :-1], shift_labels=tokens[:, 1:]).loss.backward()
    assert all(torch.allclose(p.grad, whole[name], atol=1e-6) for name, p in model.named_parameters())


def test_what_is_not_implemented_is_refused_by_name(tmp_path):
    for key, value in (
        ("hidden_act", "gelu"),
        ("sliding_window", 128),
        ("mlp_bias", True),
        ("rope_scaling", {"rope_type": "yarn"}),
        ("model_type", "mamba"),
        ("phd", {"copies": 2, "depth": 3}),
    ):
        config = {**json.loads((GOLDEN / "llama-phd-k2/config.json").read_text()), key: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match="rope_type" if key == "rope_scaling" else key):
            PhdConfig.from_pretrained(tmp_path)
    model, tokens, _ = load("llama-phd-k2")
    with pytest.raises(ValueError, match="padded on the left"):
        model(tokens[:, :3], attention_mask=torch.tensor([[0, 1, 1]]))
