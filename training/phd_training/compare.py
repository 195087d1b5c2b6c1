"""The comparison in docs/training.md: finished runs of several variants and seeds as a table and a plot.

    phd-compare RUNS --held-out corpus/held_out.txt --phd ../target/release/phd --out ../docs/training-compare

RUNS holds one folder for each run, VARIANT-sSEED. Losses are libphd's (`phd score`, float32 cache, on the bfloat16
weights), step times `phd bench`'s. Writes OUT.json, OUT.md (the table) and OUT.svg.
"""

import argparse
import json
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path

from tokenizers import Tokenizer

from . import data

NAMES = {
    "vanilla": "vanilla",
    "phd-k2": "PHD-K2",
    "phd-cswa-2-16-32": "PHD-CSWA-2-16-32",
    "phd-cswa-3-16-32": "PHD-CSWA-3-16-32",
}


def call(*command):
    return json.loads(subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True).stdout)


def bytes_scored(tokenizer, text, segment):
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    return sum(len(tokenizer.decode(list(s[1:])).encode()) for s in data.segments(tokens, segment))


def cache_bytes(config, positions, bytes_per_value=2):
    """(the originals' keys and values, the ring of hidden ones) of a sequence with so many positions."""
    rules = config.get("phd") or {"copies": 1, "window": 0, "chunk": 0}
    token = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * bytes_per_value
    band = rules["chunk"] * (rules["copies"] - 1)
    ring = min(rules["window"], band) if band else rules["window"]
    return token * positions, token * ring


def measure(folder, held_out, phd, segment, threads, context):
    model = folder / "model"
    config = json.loads((model / "config.json").read_text())
    score = call(phd, "score", model, held_out, "--segment", segment, "--cache", "f32", "--json", "-t", threads)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    nats = score["mean_nll"] * score["positions"]
    copies = (config.get("phd") or {"copies": 1})["copies"]
    rules = config.get("phd") or {}
    options = (
        ["--copies", copies, "--window", rules.get("window", 0), "--chunk", rules.get("chunk", 0)] if copies > 1 else []
    )
    bench = call(
        phd,
        "bench",
        model,
        "--copies-list",
        copies,
        *options,
        "--context",
        context,
        "--steps",
        200,
        "--json",
        "-t",
        threads,
    )
    originals, ring = cache_bytes(config, context)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {
        "loss": score["mean_nll"],
        "bits_per_byte": nats / math.log(2) / bytes_scored(tokenizer, held_out.read_text(), segment),
        "step_ms": bench["steps"][0]["ms"],
        "cache_bytes": originals,
        "hidden_bytes": ring,
        "copies": copies,
        "cpu_seconds": max(line.get("cpu_seconds", 0) for line in log),
        "tokens": max(line.get("tokens", 0) for line in log),
        "curve": [(line["step"], line["held_out_loss"]) for line in log if "held_out_loss" in line],
    }


def table(results):
    rows = [
        "| variant | held-out loss, nats a token (each seed) | mean | against vanilla, mean of pairs | bits a byte | KV cache, f16 | step |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for variant, name in NAMES.items():
        seeds = results.get(variant)
        if not seeds:
            continue
        losses = [run["loss"] for run in seeds.values()]
        pairs = [
            run["loss"] - results["vanilla"][s]["loss"] for s, run in seeds.items() if s in results.get("vanilla", {})
        ]
        any_run = next(iter(seeds.values()))
        against = (
            f"{statistics.mean(pairs):+.4f} ({', '.join(f'{p:+.4f}' for p in pairs)})"
            if pairs and variant != "vanilla"
            else ""
        )
        hidden = f" + {any_run['hidden_bytes']:,}" if any_run["hidden_bytes"] else ""
        rows.append(
            f"| {name} | {', '.join(f'{x:.4f}' for x in losses)} | {statistics.mean(losses):.4f} | {against} | "
            f"{statistics.mean(r['bits_per_byte'] for r in seeds.values()):.4f} | {any_run['cache_bytes']:,}{hidden} bytes | "
            f"{statistics.median(r['step_ms'] for r in seeds.values()):.4f} ms |"
        )
    return "\n".join(rows) + "\n"


def plot(results, path):
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "phd"  # the same file from the same numbers
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for i, (variant, name) in enumerate((v, n) for v, n in NAMES.items() if results.get(v)):
        for j, (_, run) in enumerate(sorted(results[variant].items())):
            steps, losses = zip(*run["curve"])
            per_step = run["tokens"] / steps[-1] / 1e6
            left.plot(
                [s * per_step for s in steps],
                losses,
                color=f"C{i}",
                linestyle=["-", "--", ":"][j % 3],
                linewidth=1.2,
                label=name if j == 0 else None,
            )
            right.plot(run["copies"] + 0.06 * i, run["loss"], "o", color=f"C{i}", label=name if j == 0 else None)
    left.set_xlabel("million tokens")
    left.set_ylabel("held-out loss, nats a token")
    left.set_title("while training (dashed: second seed)")
    right.set_xlabel("K")
    right.set_xticks([1, 2, 3])
    right.set_title("at the end, each seed")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="phd-compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path)
    parser.add_argument("--held-out", type=Path, required=True)
    parser.add_argument("--phd", default="phd")
    parser.add_argument("--out", type=Path, required=True, help="files are OUT.json, OUT.md, OUT.svg")
    parser.add_argument("--segment", type=int, default=256)
    parser.add_argument("--context", type=int, default=512, help="cached positions at which steps are timed")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    results = {}
    for folder in sorted(args.runs.iterdir()):
        match = re.fullmatch(r"(.+)-s(\d+)", folder.name)
        if match and match[1] in NAMES and (folder / "model" / "config.json").is_file():
            results.setdefault(match[1], {})[match[2]] = measure(
                folder, args.held_out, args.phd, args.segment, args.threads, args.context
            )
    if not results:
        parser.error(f"{args.runs}: no finished run named VARIANT-sSEED, with VARIANT of {', '.join(NAMES)}")
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(table(results))
    plot(results, args.out.with_suffix(".svg"))
    print(table(results), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
