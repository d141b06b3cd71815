"""Registers and spills of every CUDA kernel, as nvcc's assembler reports them. Needs no GPU.

    python -m bench.cuda_compile
    python -m bench.cuda_compile --out bench/results/cuda-compile.json

The CUDA half is built as for a wheel. The exit status is 1 if a kernel spills, or if one is missing
for an architecture.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.table import Table

from bench.record import head, write_lines
from bench.tables import show

ROOT = Path(__file__).parents[1]
KERNEL = re.compile(r"(\w+_kernel)\b")
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture; everything but registers is in bytes."""

    name: str
    architecture: str
    registers: int
    stack: int
    spill_stores: int
    spill_loads: int
    shared: int

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0


def parse(log: str) -> list[Kernel]:
    """Reads what `ptxas -v` says; one line of others may stand before each of its own."""
    kernels, entry, frame = [], None, (0, 0, 0)
    for line in log.splitlines():
        if match := ENTRY.search(line):
            entry, frame = match.groups(), (0, 0, 0)
        elif match := FRAME.search(line):
            # A function that is not inlined has a frame of its own, after that of its kernel.
            frame = tuple(map(max, frame, map(int, match.groups())))
        elif entry and (match := USED.search(line)):
            shared = SHARED.search(line)
            kernels.append(Kernel(*entry, int(match[1]), *frame, int(shared[1]) if shared else 0))
            entry = None
    return kernels


def readable(kernels: list[Kernel]) -> list[Kernel]:
    """With C++ names, without arguments and namespaces, where there is a tool that reads them."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not kernels:
        return kernels
    text = "\n".join(kernel.name for kernel in kernels)
    done = subprocess.run([tool], input=text, capture_output=True, text=True, check=True)
    names = []
    for name in done.stdout.splitlines():
        name = re.sub(r"lowrank::cuda::(\(anonymous namespace\)::)?", "", name)
        names.append(re.sub(r"^void |\(.*$", "", name))
    pairs = zip(kernels, names, strict=True)
    return [Kernel(**{**asdict(kernel), "name": name}) for kernel, name in pairs]


def missing(kernels: list[Kernel], architectures: list[str]) -> list[str]:
    """What the sources define and an architecture lacks."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    defined = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", sources))
    found = {(match[1], k.architecture) for k in kernels if (match := KERNEL.search(k.name))}
    return [f"{n} for {a}" for a in architectures for n in sorted(defined) if (n, a) not in found]


def find_nvcc() -> str | None:
    """As setup.py finds it: in CUDA_HOME, else on PATH."""
    folders = [Path(home, "bin") for home in [os.environ.get("CUDA_HOME")] if home]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    return shutil.which("nvcc", path=path)


def nvcc_version() -> str:
    command = [find_nvcc() or "nvcc", "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def build() -> str:
    """Builds a wheel somewhere else, in isolation; returns what was printed."""
    flags = f"{os.environ.get('CMAKE_ARGS', '')} -DCMAKE_CUDA_FLAGS=-Xptxas=-v"
    environ = os.environ | {"LOWRANK_CUDA": "on", "CMAKE_ARGS": flags.strip()}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        ignored = shutil.ignore_patterns(".*", "build", "demo", "dist", "*.so", "*.egg-info")
        shutil.copytree(ROOT, source, ignore=ignored)
        command = [sys.executable, "-m", "pip", "-v", "wheel", str(source), "--no-deps"]
        done = subprocess.run(
            [*command, "-w", folder],
            cwd=ROOT,
            env=environ,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    if done.returncode != 0:
        sys.exit(done.stdout)
    return done.stdout


def table(kernels: list[Kernel], architectures: list[str]) -> Table:
    """A row a kernel: registers on each architecture, and its local memory if it has any."""
    result = Table(title="registers a thread; bytes of stack/spill stores/spill loads in brackets")
    for heading in ("kernel", "shared", *architectures):
        result.add_column(heading, no_wrap=True, justify="left" if heading == "kernel" else "right")
    cells = {(kernel.name, kernel.architecture): kernel for kernel in kernels}
    for name in sorted({kernel.name for kernel in kernels}):
        row = [cells.get((name, architecture)) for architecture in architectures]
        shared = max(kernel.shared for kernel in row if kernel)
        result.add_row(name, str(shared), *map(_cell, row))
    return result


def _cell(kernel: Kernel | None) -> str:
    if kernel is None:
        return ""
    local = (kernel.stack, kernel.spill_stores, kernel.spill_loads)
    return (
        f"{kernel.registers} ({'/'.join(map(str, local))})" if any(local) else f"{kernel.registers}"
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.cuda_compile")
    parser.add_argument("--out", type=Path, help="the JSON record; none by default")
    options = parser.parse_args(arguments)
    if find_nvcc() is None:
        print("cuda_compile: there is no nvcc here, so nothing was compiled")
        return
    kernels = readable(parse(build()))
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: int(a.strip("sm_af")))
    show(table(kernels, architectures))
    spilling = [f"{k.name} for {k.architecture}" for k in kernels if k.spills]
    absent = missing(kernels, architectures)
    print(f"{len(kernels)} kernels, {len(spilling)} spill, {len(absent)} missing")
    if options.out:
        facts = {"nvcc": nvcc_version(), "kernels": len(kernels), "spilling": spilling}
        record = head("cuda_compile", "cpu", [], **facts)
        write_lines(options.out, record, "rows", [asdict(kernel) for kernel in kernels])
    if spilling or absent or not kernels:
        sys.exit("cuda_compile: " + ("; ".join([*spilling, *absent]) or "no kernel was found"))


if __name__ == "__main__":
    main()
