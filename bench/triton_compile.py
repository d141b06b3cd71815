"""Compile every Triton kernel that the launchers can ask for, without a GPU: what does it cost?

    python -m bench.triton_compile            # minutes on two CPU cores
    python -m bench.triton_compile --quick    # what the test compiles

The launchers run on meta tensors of LLaMA's shapes, and what they would launch is compiled by
Triton's JIT for each target: the same tiles, and the same arguments taken as 1 or as divisible by
16, as on a GPU. Registers, spills and shared memory are read from the binary, the width of memory
accesses and the matrix instruction from the PTX. Speed is another question.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.runtime import JITFunction, driver

from bench.models import PRESETS
from lowrank_kernels.ops import AdamScalars, Residual, Side
from lowrank_kernels.ops import triton as launchers
from lowrank_kernels.ops.contract import basis_shape, projected_shape

RESULT = Path(__file__).parent / "results" / "triton-compile.json"
TOOLS = Path(nvidia.__file__).parent / "bin"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Target(NamedTuple):
    """A compute capability: processors of its largest GPU, shared memory a block can have."""

    capability: int
    processors: int
    shared_bytes: int


TARGETS = (
    Target(80, 108, 163 * 1024),
    Target(90, 132, 227 * 1024),
    Target(100, 148, 227 * 1024),
)

PRODUCTS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}

# An argument that is 1 becomes a constant, which is not a tensor: a kernel has to compile then too.
DEGENERATE = [((1, 1), 1), ((1, 17), 1), ((17, 1), 1), ((61, 37), 13)]


@dataclass
class Variant:
    """A kernel with the arguments of one launch, and the launches that share its binary."""

    kernel: JITFunction
    target: Target
    arguments: tuple
    options: dict
    dtype: str
    aligned: bool
    uses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """What a variant compiles to; bytes of stack and shared memory, spilling instructions."""

    kernel: str
    target: int
    tile: str
    warps: int
    stages: int | None
    split: int
    sums_or_residual: bool | None
    dtype: str
    aligned: bool
    registers: int
    stack: int
    spills: int
    shared: int
    product: str | None
    accesses: dict[str, int]
    uses: list[str]

    def __str__(self) -> str:
        return (
            f"sm_{self.target} {self.kernel} {self.tile} ({self.warps} warps, {self.stages} stages,"
            f" split {self.split}, {self.dtype}): {self.registers} registers, {self.stack} bytes of"
            f" stack, {self.spills} spilling instructions, {self.shared} bytes shared,"
            f" {self.product}, {self.accesses}; {self.uses[0]}, {len(self.uses)} in all"
        )


def shapes(quick: bool) -> Iterator[tuple[str, tuple[int, int], int]]:
    """Name, shape and rank of a layer's matrices, at the ranks of the papers."""
    names = ("nano", "60m", "1b", "7b") if quick else PRESETS
    for name in names:
        preset = PRESETS[name]
        for rank in (64, preset.rank) if name == "7b" else (preset.rank,):
            for shape in (
                (preset.hidden, preset.hidden),
                (preset.ffn, preset.hidden),
                (preset.hidden, preset.ffn),
            ):
                yield name, shape, rank


def variants(quick: bool) -> list[Variant]:
    """Everything that the launchers would launch, once each."""
    found: dict[str, Variant] = {}
    for target in TARGETS:
        for name, shape, rank in shapes(quick):
            # float32 products are sums of FMA, which take ptxas longest.
            dtypes = DTYPES if not quick or name == "1b" else ("bf16",)
            for dtype in dtypes:
                _add(found, target, name, shape, rank, dtype)
    for shape, rank in DEGENERATE:
        _add(found, TARGETS[0], "degenerate", shape, rank, "fp32")
    return list(found.values())


def _add(
    found: dict[str, Variant],
    target: Target,
    name: str,
    shape: tuple[int, int],
    rank: int,
    dtype: str,
) -> None:
    aligned = shape[1] % 16 == 0 and rank % 16 == 0
    for residual in (None, Residual(0.25, 1.0)):
        method = "GaLore" if residual is None else "Fira"
        use = f"{name} {shape[0]} x {shape[1]} r{rank} {dtype} {method}"
        for kernel, arguments, options in launches(target, shape, rank, DTYPES[dtype], residual):
            key = _key(kernel, target, arguments, options)
            variant = found.setdefault(
                key, Variant(kernel, target, arguments, options, dtype, aligned)
            )
            variant.aligned &= aligned
            variant.uses.append(use)
            if options.get("SPLIT", 1) > variant.options.get("SPLIT", 1):
                variant.arguments, variant.options = arguments, options


def launches(
    target: Target,
    shape: tuple[int, int],
    rank: int,
    dtype: torch.dtype,
    residual: Residual | None,
) -> list[tuple[JITFunction, tuple, dict]]:
    """The launches of one step of one matrix, recorded instead of run."""
    recorded = []

    class Recorder:
        def __init__(self, kernel: JITFunction):
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]):
            return lambda *arguments, **options: recorded.append((self.kernel, arguments, options))

    def empty(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, device="meta")

    kernels = {name: Recorder(k) for name, k in vars(launchers).items() if _is_kernel(k)}
    side = Side.LEFT if shape[0] < shape[1] else Side.RIGHT
    low, basis = projected_shape(shape, side, rank), empty(basis_shape(shape, side, rank), dtype)
    weight, grad = empty(shape, dtype), empty(shape, dtype)
    with mock.patch.multiple(launchers, _processors=lambda _: target.processors, **kernels):
        projection = launchers.project_moments(
            grad, basis, side, empty(low), empty(low), AdamScalars(0.9, 0.999, 1e-8), residual
        )
        factor = launchers.channel_scale(projection.sums, empty(())) if residual else None
        launchers.back_project_update(
            *(weight, grad, basis, side, projection, residual, factor),
            scale=0.25,
            step_size=0.01,
            decay=0.0,
        )
    return recorded


def _is_kernel(value: object) -> bool:
    return isinstance(value, JITFunction)


def _activate(target: Target) -> None:
    """Makes Triton compile for a target that is not there."""
    driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", target.capability, 32),
            get_current_device=lambda: target.capability,
            get_current_stream=lambda _: 0,
        )
    )


def _key(kernel: JITFunction, target: Target, arguments: tuple, options: dict) -> str:
    """Equal for launches that share a binary, and for all numbers of parts but one part."""
    _activate(target)
    *_, binder = kernel.device_caches[target.capability]
    options = {"debug": False, "instrumentation_mode": "", **options}
    if "SPLIT" in options:
        options["SPLIT"] = min(options["SPLIT"], 2)
    _, specialization, remaining = binder(*arguments, **options)
    return f"{kernel.__name__} {target.capability} {specialization} {remaining}"


def compile_variant(variant: Variant) -> Record:
    """Compiles for the variant's target and reads what came out."""
    options, target = variant.options, variant.target
    _activate(target)
    try:
        compiled = variant.kernel.run(*variant.arguments, grid=(1,), warmup=True, **options)
    except Exception as error:
        name = f"{variant.kernel.__name__} for sm_{target.capability}, {variant.uses[0]}"
        raise RuntimeError(f"{name}: {error}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", file.name)
    ptx = compiled.asm["ptx"]
    return Record(
        kernel=variant.kernel.__name__,
        target=target.capability,
        tile=" x ".join(str(options[key]) for key in ("BC", "BR", "BD") if key in options),
        warps=options["num_warps"],
        stages=options.get("num_stages"),
        split=options.get("SPLIT", 1),
        sums_or_residual=options.get("SUMS", options.get("RESIDUAL")),
        dtype=variant.dtype,
        aligned=variant.aligned,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=compiled.metadata.shared,
        product=next((name for name, code in PRODUCTS.items() if code in ptx), None),
        accesses=_accesses(ptx),
        uses=variant.uses,
    )


def _tool(name: str, *arguments: str) -> str:
    command = [TOOLS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _accesses(ptx: str) -> dict[str, int]:
    """Instructions on global memory by kind and bytes a thread."""
    found = Counter()
    for kind, modifiers in re.findall(r"\b(ld|st)\.global(\S*)", ptx):
        vector = re.search(r"\.v(\d)", modifiers)
        bits = int(re.search(r"\.[busf](\d+)$", modifiers)[1])
        found[f"{kind} {bits // 8 * int(vector[1] if vector else 1)}"] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global.*?\], 0x(\w+)", ptx):
        found[f"cp.async {int(size, 16)}"] += 1
    return dict(sorted(found.items()))


def compile_all(quick: bool) -> list[Record]:
    """Compiles every variant, in processes: ptxas takes most of the time."""
    todo = variants(quick)
    # Kernels do not pickle: the processes inherit the list.
    _inherited[:] = todo
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=fork) as pool:
        steps = pool.map(_compile_inherited, range(len(todo)))
        return list(track(steps, "compiling", total=len(todo), console=Console(stderr=True)))


_inherited: list[Variant] = []


def _compile_inherited(index: int) -> Record:
    return compile_variant(_inherited[index])


def table(records: list[Record]) -> Table:
    """A row a kernel, tile and kind of rows: the worst of the variants that it stands for."""
    result = Table(
        title=f"Triton {triton.__version__}: registers / spilling instructions / shared kB",
        caption="the worst variant of a row; tiles of channels x directions x depth",
    )
    headings = ("kernel", "tile", "warps", "stages", "dtype", "rows", "variants")
    for heading in (*headings, *(f"sm_{target.capability}" for target in TARGETS)):
        result.add_column(heading, no_wrap=True)
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(_row(record), []).append(record)
    for row, group in sorted(groups.items()):
        cells = [_worst([r for r in group if r.target == t.capability]) for t in TARGETS]
        result.add_row(*row, str(len(group)), *cells)
    return result


def _row(record: Record) -> tuple[str, ...]:
    name = record.kernel.removesuffix("_kernel")
    if name == "project" and record.split > 1:
        name += ", split"
    stages = str(record.stages or "")
    rows = "16-byte" if record.aligned else "odd"
    return name, record.tile, str(record.warps), stages, record.dtype, rows


def _worst(records: list[Record]) -> str:
    if not records:
        return ""
    registers = max(record.registers for record in records)
    spills = max(record.spills for record in records)
    shared = max(record.shared for record in records) / 1024
    products = "/".join(sorted({record.product or "" for record in records}))
    return f"{registers} / {spills} / {shared:.0f} {products}"


def write(records: list[Record], path: Path) -> None:
    """Writes a line a variant, so that a diff shows which one changed."""
    head = {
        "triton": triton.__version__,
        "ptxas": _tool("ptxas", "--version").split()[-1],
        "targets": [target._asdict() for target in TARGETS],
    }
    lines = ",\n".join(f"  {json.dumps(asdict(record))}" for record in records)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{text},\n "variants": [\n{lines}\n ]\n}}\n')


def main(arguments: list[str] | None = None) -> None:
    """Compiles, writes the record and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.triton_compile")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, float32 at one model")
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON record")
    command = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("triton_compile: unset TRITON_INTERPRET, it replaces the compiler")
    records = compile_all(command.quick)
    write(records, command.out)
    Console(width=None if sys.stdout.isatty() else 150).print(table(records))


if __name__ == "__main__":
    main()
