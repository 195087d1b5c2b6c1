"""Make a PyPI torch wheel importable without the gigabytes of CUDA libraries that it is linked against.

    pip install --no-deps torch==... nvidia-cuda-runtime==... && python cpu_torch.py

For machines without a GPU, CI above all: PyPI's only Linux x86-64 build of torch is the CUDA one, and the loader
wants every CUDA library there, though nothing but the runtime (2 MB, a real one: torch asks it for devices) is called
on a CPU. For each library that is missing, this writes a stand-in into torch/lib that defines the symbols torch
refers to; calling one traps. Libraries that are installed are left alone, so on a machine with a GPU, install torch
with its dependencies and do not run this. Needs readelf and cc.
"""

import collections
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path


def readelf(option, path):
    return subprocess.run(["readelf", "-W", option, path], capture_output=True, text=True, check=True).stdout


def symbols(path):
    """(defined names, undefined names each with its version or None) of a library's dynamic symbols."""
    defined, undefined = set(), set()
    for line in readelf("--dyn-syms", path).splitlines():
        # Num: Value Size Type Bind Vis Ndx Name[@version] [(n)]
        match = re.match(r"\s*\d+:\s+\S+\s+\S+\s+\S+\s+(\S+)\s+\S+\s+(\S+)\s+(\S+)", line)
        if not match:
            continue
        bind, section, name = match.groups()
        name, _, version = name.partition("@")
        if section != "UND":
            defined.add(name)
        elif bind == "GLOBAL":
            undefined.add((name, version.lstrip("@") or None))
    return defined, undefined


def main():
    lib = Path(sysconfig.get_paths()["purelib"]) / "torch" / "lib"
    ours = sorted(p for p in lib.glob("*.so*") if p.is_file())
    needed, defined, undefined = set(), set(), set()
    for path in ours:
        needed |= set(re.findall(r"\(NEEDED\).*\[(.*)\]", readelf("-d", path)))
        d, u = symbols(path)
        defined |= d
        undefined |= u
    installed = {p.name for p in [*ours, *lib.parent.parent.glob("nvidia/**/*.so*")]}
    # The driver, libcuda, is no dependency: nothing loads it until a kernel is compiled.
    missing = sorted(
        n for n in needed if n.startswith(("libcu", "libnv", "libnccl")) and n not in {*installed, "libcuda.so.1"}
    )
    if not missing:
        return
    # Versioned names belong to the library that defines the version; names without one may stand in any library.
    versions = collections.defaultdict(set)
    for path in ours:
        for soname, body in re.findall(
            r"Version: \d+\s+File: (\S+)\s+Cnt: \d+\n((?:.*Name: .*\n)*)", readelf("-V", path)
        ):
            for version in re.findall(r"Name: (\S+)", body):
                versions[version].add(soname)
    members = collections.defaultdict(lambda: collections.defaultdict(set))
    for name, version in undefined:
        if name in defined:
            continue
        if version is None:
            if name.startswith(("cu", "nv", "nccl")):
                members[missing[0]][None].add(name)
        else:
            for soname in versions[version] & set(missing):
                members[soname][version].add(name)
    for soname in missing:
        with tempfile.TemporaryDirectory() as scratch:
            asm, script = Path(scratch, "stub.s"), Path(scratch, "stub.map")
            names = [n for group in members[soname].values() for n in group]
            # Every name is the same trap.
            asm.write_text(
                ".text\n" + "".join(f".globl {n}\n.type {n},@function\n{n}:\n" for n in sorted(names)) + "ud2\n"
                '.section .note.GNU-stack,"",@progbits\n'
            )
            groups = [
                f"{v} {{ global: {' '.join(f'{n};' for n in sorted(group))} }};"
                for v, group in sorted((g for g in members[soname].items() if g[0]), key=lambda g: g[0])
            ]
            script.write_text("\n".join(groups) + "\n")
            versioned = [f"-Wl,--version-script={script}"] if groups else []
            subprocess.run(
                ["cc", "-shared", "-nostdlib", f"-Wl,-soname,{soname}", *versioned, asm, "-o", lib / soname], check=True
            )
    print(f"{len(missing)} CUDA libraries stood in for in {lib}: {' '.join(missing)}")


if __name__ == "__main__":
    main()
