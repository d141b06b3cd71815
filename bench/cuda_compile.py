"""Registers and spills of every CUDA kernel, and how wide its stores are. Needs no GPU.

    python -m bench.cuda_compile
    python -m bench.cuda_compile --out bench/results/cuda-compile.json

The CUDA half is built as for a wheel. Registers and spills are what nvcc's assembler reports;
stores are counted in the machine code. The exit status is 1 if a kernel spills, if one is missing
for an architecture, or if one that has packs of a matrix stores them in parts.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field, replace
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
ARCHITECTURE = re.compile(r"code for (\w+)")
FUNCTION = re.compile(r"Function : (\S+)")
STORE = re.compile(r"\bSTG\.E\S*")
WIDTH = re.compile(r"\.(?:[US](8|16)|(64|128|256))\b")

# Kernels that write matrices, in packs if the last argument is not 1; the first is what they read.
WRITES_PACKS = re.compile(r"^(adam_moments_rows|adam_moments_columns|combine|update)_kernel<(\w+),")
# The moments are float32 whatever is read.
WRITES_FLOAT32 = {"adam_moments_rows", "adam_moments_columns"}
# Stores of channel sums, of which each has its own address.
SUMS = {"adam_moments_rows": 2, "adam_moments_columns": 8}


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
    stores: dict[int, int] = field(default_factory=dict)  # bytes a thread: how many instructions

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0

    @property
    def pack(self) -> int:
        """Bytes that a store of a matrix should have; 0 if it writes none, or not in packs."""
        match = WRITES_PACKS.search(self.name)
        elements = int(self.name.rstrip(">").split()[-1]) if match else 1
        if match is None or elements == 1:
            return 0
        half = match[2] != "float" and match[1] not in WRITES_FLOAT32
        return min(16, elements * (2 if half else 4))

    @property
    def scatters(self) -> bool:
        """Whether packs are stored in parts."""
        if not self.pack:
            return False
        sums = SUMS.get(WRITES_PACKS.search(self.name)[1], 0)
        narrow = sum(count for width, count in self.stores.items() if width < self.pack)
        return narrow > sums or narrow == sum(self.stores.values())


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


def count_stores(code: str) -> dict[tuple[str, str], dict[int, int]]:
    """Of what cuobjdump says: of each kernel and architecture, stores to memory by their bytes."""
    stores: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    architecture = function = ""
    for line in code.splitlines():
        if match := ARCHITECTURE.search(line):
            architecture = match[1]
        elif match := FUNCTION.search(line):
            function = match[1]
        elif match := STORE.search(line):
            width = WIDTH.search(match[0])
            bits = int(width[1] or width[2]) if width else 32
            stores[function, architecture][bits // 8] += 1
    return {key: dict(sorted(counts.items())) for key, counts in stores.items()}


def with_stores(kernels: list[Kernel], code: str) -> list[Kernel]:
    stores = count_stores(code)
    return [
        replace(kernel, stores=stores.get((kernel.name, kernel.architecture), {}))
        for kernel in kernels
    ]


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
    return [replace(kernel, name=name) for kernel, name in pairs]


def missing(kernels: list[Kernel], architectures: list[str]) -> list[str]:
    """What the sources define and an architecture lacks."""
    sources = "".join(path.read_text() for path in (ROOT / "csrc" / "cuda").glob("*.cu"))
    defined = set(re.findall(r"__global__[^;{]*?(\w+_kernel)\(", sources))
    found = {(match[1], k.architecture) for k in kernels if (match := KERNEL.search(k.name))}
    return [f"{n} for {a}" for a in architectures for n in sorted(defined) if (n, a) not in found]


def find_tool(name: str) -> str | None:
    """As setup.py finds nvcc: in CUDA_HOME, else on PATH. Triton brings some of them too."""
    folders = [Path(home, "bin") for home in [os.environ.get("CUDA_HOME")] if home]
    path = os.pathsep.join([*map(str, folders), os.environ.get("PATH", "")])
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        path += os.pathsep + str(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    return shutil.which(name, path=path)


def find_nvcc() -> str | None:
    return find_tool("nvcc")


def nvcc_version() -> str:
    command = [find_nvcc() or "nvcc", "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", text)[1]


def build() -> tuple[str, str]:
    """Builds a wheel somewhere else, in isolation; what was printed, and its machine code."""
    disassembler = find_tool("cuobjdump")
    if disassembler is None:
        sys.exit("cuda_compile: no cuobjdump, which comes with the CUDA toolkit and with triton")
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
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (module,) = [name for name in archive.namelist() if name.endswith(".so")]
            module = archive.extract(module, folder)
        command = [disassembler, "-sass", module]
        code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return done.stdout, code


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
    log, code = build()
    kernels = readable(with_stores(parse(log), code))
    architectures = sorted({k.architecture for k in kernels}, key=lambda a: int(a.strip("sm_af")))
    show(table(kernels, architectures))
    spilling = [f"{k.name} for {k.architecture}" for k in kernels if k.spills]
    scattering = [
        f"{k.name} for {k.architecture} stores {k.stores}, packs of {k.pack} bytes in parts"
        for k in kernels
        if k.scatters
    ]
    absent = missing(kernels, architectures)
    packed = sum(k.pack > 0 for k in kernels)
    print(f"{len(kernels)} kernels, {len(spilling)} spill, {len(absent)} missing")
    print(f"{packed} of them write packs, {len(scattering)} in parts")
    if options.out:
        facts = {"nvcc": nvcc_version(), "kernels": len(kernels), "spilling": spilling}
        record = head("cuda_compile", "cpu", [], **facts)
        write_lines(options.out, record, "rows", [asdict(kernel) for kernel in kernels])
    if kernels and not packed:
        absent.append("no kernel that writes packs was found")
    if spilling or scattering or absent or not kernels:
        faults = [*spilling, *scattering, *absent]
        sys.exit("cuda_compile: " + ("; ".join(faults) or "no kernel was found"))


if __name__ == "__main__":
    main()
