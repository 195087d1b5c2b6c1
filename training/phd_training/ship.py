"""What goes with a model that is shipped in models/: a held-out text, what the float64 reference says of it, its card.

    python -m phd_training.ship runs/demo ../models/english-phd-cswa-2-16-32 --held-out corpus/held_out.txt \\
        --reference ../../shared/reference/phd_reference.py --phd ../target/release/phd --against ../models/kjv-phd-cswa-2-16-32
"""

import argparse
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from .evaluate import evaluate
from .export import load, load_training_arguments, save_hub

PROMPTS = ["In the beginning", "To be, or not to be,", "It is a truth universally acknowledged, that"]
KINDS = ["f32", "bf16", "f16", "q8_0", "q6_k", "q5_k", "q4_k", "q4_1", "q4_0"]


def excerpts(text, count=8, size=1500):
    """Pieces from all over a text, each from the start of a paragraph."""
    pieces = []
    for i in range(count):
        start = text.index("\n\n", i * len(text) // count) + 2
        pieces.append(text[start : start + size].rsplit(" ", 1)[0])
    return "\n\n".join(pieces) + "\n"


def log_likelihoods(logits, tokens):
    logits = logits - logits.max(-1, keepdims=True)
    return logits[np.arange(len(tokens)), tokens] - np.log(np.exp(logits).sum(-1))


def expected(reference, folder, text, window):
    """tests/demo_model.rs reads this: windows of so many inputs, each from an empty cache; a window's last input predicts the next
    one's first token."""
    spec = importlib.util.spec_from_file_location("phd_reference", reference)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    means = []
    for vanilla in (False, True):
        model = module.load(folder)
        if vanilla:
            model.copies, model.window, model.chunk = 1, 0, 0
        found = []
        for start in range(0, len(tokens) - 1, window):
            piece = tokens[start : start + window + 1]
            found.extend(log_likelihoods(model.logits(piece[:-1]), piece[1:]))
        means.append(-float(np.mean(found)))
    model = module.load(folder)
    greedy = []
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt, add_special_tokens=False).ids
        continued = model.greedy(ids, 32)
        greedy.append({"prompt": prompt, "tokens": ids, "greedy": continued, "text": tokenizer.decode(continued)})
    return {
        "file": "held_out.txt",
        "tokens": len(tokens),
        "window": window,
        "mean_nll": means[0],
        "note": f"windows of {window} inputs, each from an empty cache; mean negative log-likelihood per predicted token, natural "
        "log, float64 reference with the bf16 weights",
        "mean_nll_if_run_as_vanilla": means[1],
        "greedy": greedy,
    }


def quantized(phd, folder, text_file, segment):
    """Loss of each type's GGUF file, and its size."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for kind in KINDS:
            path = Path(scratch) / f"{kind}.gguf"
            subprocess.run([phd, "convert", folder, path, "--type", kind], check=True, capture_output=True)
            score = subprocess.run(
                [phd, "score", path, text_file, "--segment", str(segment), "--cache", "f32", "--json"],
                check=True,
                capture_output=True,
                text=True,
            )
            found[kind] = (json.loads(score.stdout)["mean_nll"], path.stat().st_size)
    return found


def sample(phd, folder, prompt):
    found = subprocess.run(
        [phd, "run", folder, "-p", prompt, "-n", "60", "--seed", "1"], check=True, capture_output=True, text=True
    )
    return found.stdout.strip()


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="phd_training.ship", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--phd", required=True)
    parser.add_argument("--against", type=Path, help="an earlier model with a held_out.txt of its own, to compare with")
    parser.add_argument("--sources", type=Path, default=Path(__file__).parents[1] / "recipes" / "sources.json")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parents[1] / "recipes" / "demo.toml")
    args = parser.parse_args(argv)
    options = load_training_arguments(args.run)
    segment = int(options["context"])

    model, tokenizer_text = load(args.run / "model")
    save_hub(model, tokenizer_text, args.out, generation={"do_sample": True, "temperature": 0.8, "top_p": 0.95})
    model, _ = load(args.out)
    tokenizer = Tokenizer.from_str(tokenizer_text)
    held_out = args.held_out.read_text()
    text = excerpts(held_out)
    (args.out / "held_out.txt").write_text(text)
    (args.out / "expected.json").write_text(
        json.dumps(expected(args.reference, args.out, text, segment), indent=1) + "\n"
    )
    shutil.copyfile(args.run / "log.jsonl", args.out / "training.jsonl")
    shutil.copyfile(args.recipe, args.out / "recipe.toml")
    shutil.copyfile(args.sources, args.out / "sources.json")

    log = [json.loads(line) for line in (args.run / "log.jsonl").read_text().splitlines()]
    cpu = max(line.get("cpu_seconds", 0) for line in log)
    tokens = max(line.get("tokens", 0) for line in log)
    ours = evaluate(model, tokenizer, held_out, segment)
    types = quantized(args.phd, args.out, args.held_out, segment)
    config = model.config
    parameters = sum(p.numel() for p in model.parameters())
    rows = [("held-out text", f"{ours['mean_nll']:.4f}", f"{ours['bits_per_byte']:.4f}")]
    comparison = ""
    if args.against:
        other, other_tokenizer = load(args.against)
        other_tokenizer = Tokenizer.from_str(other_tokenizer)
        lines = []
        for title, sample_text in (
            ("this model's held-out text", held_out),
            (f"`{args.against.name}`'s held_out.txt", (args.against / "held_out.txt").read_text()),
        ):
            a = evaluate(other, other_tokenizer, sample_text, 256)
            b = evaluate(model, tokenizer, sample_text, segment)
            lines.append(f"| {title} | {a['bits_per_byte']:.4f} | {b['bits_per_byte']:.4f} |")
        comparison = (
            f"\n## Against {args.against.name}\nBits per byte, each model in segments of the length it was trained on. Nothing of "
            "Genesis 25 to 28, from which the second text is, was trained on here;\nparts of the first text may have been "
            f"trained on there.\n\n| text | {args.against.name} | this one |\n| --- | --- | --- |\n"
            + "\n".join(lines)
            + "\n"
        )
    sources = json.loads(args.sources.read_text())
    source_rows = "\n".join(
        f"| {entry['what']} | {entry['package']} | {entry['licence']} | {entry['bytes'] / 1e6:.1f} MB |"
        for name, entry in sources.items()
        if name != "held_out"
    )
    type_rows = "\n".join(
        f"| {kind} | {loss:.4f} | {loss - types['f32'][0]:+.4f} | {size / 1e6:.1f} MB |"
        for kind, (loss, size) in types.items()
    )
    rules = config.phd
    card = (
        f"""# {args.out.name}: a small trained PHD checkpoint
{parameters / 1e6:.1f} M parameters: {config.family} body, {config.num_hidden_layers} layers, hidden {config.hidden_size}, feed-forward \
{config.intermediate_size}, {config.num_attention_heads} query and {config.num_key_value_heads} key/value heads of {config.head_dim}, \
byte-level BPE of {config.vocab_size:,} tokens, tied embeddings, bf16. PHD-CSWA with K = {rules["copies"]}, W = {rules["window"]}, \
C = {rules["chunk"]}: each token is read {rules["copies"]} times, the cache is the vanilla model's.

It writes English of past centuries and knows nothing. Weights and tokenizer may be used freely (CC0).

| measured on | nats a token | bits a byte |
| --- | --- | --- |
"""
        + "\n".join(f"| {' | '.join(row)} |" for row in rows)
        + f"""

## Training
From scratch on {tokens / 1e6:.1f} M tokens, {cpu / 3600:.2f} hours of CPU time, seed {options["seed"]}, windows of {segment} tokens, AdamW, bfloat16 \
autocast: `recipe.toml` with `training/`, log in `training.jsonl`, the text's hashes in `sources.json`.

| text | from | licence | |
| --- | --- | --- | --- |
{source_rows}

Every 64th section of about 3,000 characters was held out ({sources["held_out"]["bytes"]:,} bytes); `held_out.txt` has excerpts of those.
{comparison}
## As GGUF
`phd convert` and `phd score` on the held-out text, f32 cache:

| type | nats a token | against f32 | size |
| --- | --- | --- | --- |
{type_rows}

`expected.json` is the float64 reference's: the mean loss over `held_out.txt`, what the same weights give when run with K = 1, and greedy
continuations; libphd's tests and training/'s compare with it.

## A sample
`phd run ... -p "{PROMPTS[2]}" --seed 1`:

> {sample(args.phd, args.out, PROMPTS[2])}
"""
    )
    (args.out / "README.md").write_text("\n".join(line.rstrip() for line in card.splitlines()) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
