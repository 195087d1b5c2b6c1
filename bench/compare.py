#!/usr/bin/env python3
"""Times libphd and llama.cpp on the same GGUF files, in turn, and prints the medians as Markdown.

    bench/compare.py --llama LLAMA_BIN_FOLDER [--threads 2] [--rounds 3] [--prompt 512] MODEL.gguf ...

LLAMA_BIN_FOLDER holds llama-bench and llama-batched-bench, built natively for this machine. One round times llama.cpp's prefill and
decode (llama-bench), its steps of 1, 2, 3, 4 and 8 rows (as many sequences), then libphd's prefill and decode on the CPU, its steps at
K = 1, 2, 3, 4 and 8, and 1 to 32 sequences that decode together with K = 1; rounds alternate, so that both meet the same disturbances.
"""
import argparse
import json
import os
import statistics
import subprocess


def run(command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--llama", required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--phd", default=os.path.join(os.path.dirname(__file__), "..", "target", "release", "phd"))
    parser.add_argument("models", nargs="+")
    args = parser.parse_args()
    rows = [1, 2, 3, 4, 8]
    together = [1, 2, 4, 8, 16, 32]
    for model in args.models:
        prefill, decode, step, batch = {"llama": [], "phd": []}, {"llama": [], "phd": []}, {}, {}
        gb_per_second, variant = [], ""
        for _ in range(args.rounds):
            threads = ["-t", str(args.threads)]
            for what, (prompt, tokens, repeat) in [(prefill, (args.prompt, 0, 1)), (decode, (0, 48, 3))]:
                sizes = ["-p", str(prompt), "-n", str(tokens), "-r", str(repeat)]
                out = json.loads(run([f"{args.llama}/llama-bench", "-m", model, "-o", "json"] + sizes + threads))
                what["llama"].append(out[0]["avg_ts"])
            counts = ",".join(map(str, rows))
            sizes = ["-c", "4096", "-npp", "64", "-ntg", "24", "-npl", counts + ",16,32"]
            out = run([f"{args.llama}/llama-batched-bench", "-m", model, "--output-format", "jsonl"] + sizes + threads)
            for line in filter(lambda l: l.startswith("{"), out.splitlines()):
                result = json.loads(line)
                step.setdefault(("llama", result["pl"]), []).append(1e3 * result["t_tg"] / result["tg"])
            phd = [args.phd, "bench", model, "--backend", "cpu", "--context", "64", "--steps", "24", "--json"] + threads
            out = json.loads(run(phd + ["--prompt", str(args.prompt), "--prefills", "1", "--decode", "0", "--copies-list", counts]))
            sizes = ["--copies-list", "1", "--sequences", ",".join(map(str, together))]
            batches = json.loads(run(phd + ["--prompt", "0", "--decode", "48"] + sizes))
            for t in batches["together"]:
                batch.setdefault(t["sequences"], []).append(t["ms"])
            variant = out["backend"]
            gb_per_second.append(out["bandwidth_gb_per_second"])
            prefill["phd"].append(out["prefill"][0]["tokens_per_second"])
            decode["phd"].append(batches["decode"][0]["tokens_per_second"])
            for s in out["steps"]:
                step.setdefault(("phd", s["copies"]), []).append(s["ms"])
        reads = statistics.median(gb_per_second)
        print(f"\n**{os.path.basename(model)}**, {variant}, {args.threads} threads, memory reads at {reads:.0f} GB/s\n")
        print("| | libphd | llama.cpp | ratio |\n| --- | --- | --- | --- |")
        for what, figure in [(f"prefill of {args.prompt}", prefill), ("decode of 48 at K = 1", decode)]:
            ours, theirs = (statistics.median(figure[who]) for who in ("phd", "llama"))
            print(f"| {what}, tok/s | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |")
        first = {who: statistics.median(step[who, 1]) for who in ("phd", "llama")}
        for n in rows:
            ours, theirs = (statistics.median(step[who, n]) for who in ("phd", "llama"))
            print(
                f"| step of {n} row{'s' if n > 1 else ''}, ms (over 1) | {ours:.2f} ({ours / first['phd']:.2f}) "
                f"| {theirs:.2f} ({theirs / first['llama']:.2f}) | {theirs / ours:.2f} |",
                flush=True,
            )
        for n in together:
            ours, theirs = (n * 1e3 / statistics.median(ms) for ms in (batch[n], step["llama", n]))
            print(f"| {n} sequence{'s' if n > 1 else ''} decoding, tok/s | {ours:.0f} | {theirs:.0f} | {ours / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    main()
