"""Compile every Triton kernel that the backend can ask for, without a GPU: what does it cost?

    python -m bench.triton_compile            # minutes on two CPU cores
    python -m bench.triton_compile --quick    # what the test compiles

Its operations run on meta tensors of LLaMA's shapes, and what they would launch is compiled by
Triton's JIT for each target: the same tiles, and the same arguments taken as 1 or as divisible by
16, as on a GPU. Registers, spills and shared memory are read from the binary, the width of memory
accesses and the matrix instruction from the PTX, hazards of asynchronous copies and products from
the TTGIR (`bench.pipelines`). Speed is another question.
"""

from __future__ import annotations

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
from itertools import product, zip_longest
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
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from bench.models import PRESETS
from bench.options import about
from bench.pipelines import follow
from lowrank_kernels.ops import AdamScalars, Matrices, Residual, Scalars, Side
from lowrank_kernels.ops import triton as launchers
from lowrank_kernels.ops.codes import FLAT_GROUPS, FORMATS, channel_groups, new_stored
from lowrank_kernels.ops.contract import basis_shape, projected_shape
from lowrank_kernels.ops.triton import addresses, config, launch, plain, rows

RESULT = Path(__file__).parent / "results" / "triton-compile.json"
TOOLS = Path(nvidia.__file__).parent / "bin"


class Target(NamedTuple):
    """A compute capability, and the largest GPU that has it."""

    capability: int
    gpu: config.Gpu


TARGETS = (
    Target(80, config.Gpu("a100", 108, 163 * 1024, 80)),
    Target(90, config.Gpu("h200", 132, 227 * 1024, 90)),
    Target(100, config.Gpu("b200", 148, 227 * 1024, 100)),
)

# Of the loop over a reduction, none included: all slots of a pipeline, in all its stages.
TURNS = range(10)

# Arguments that loops go along, and the constants that are their steps.
LENGTHS = {"depth": "BD", "rank": "BR"}

PRODUCTS = {"tcgen05": "tcgen05.mma", "wgmma": "wgmma.mma_async", "mma": "mma.sync"}


class Dtypes(NamedTuple):
    """Of weights and gradients, the basis being like the weights; how float32 is multiplied."""

    weight: torch.dtype
    grad: torch.dtype
    precision: str = "ieee"


DTYPES = {
    "bf16": Dtypes(torch.bfloat16, torch.bfloat16),
    "fp32": Dtypes(torch.float32, torch.float32),
    "fp16": Dtypes(torch.float16, torch.float16),
    "tf32": Dtypes(torch.float32, torch.float32, "tf32"),
    "bf16 W, fp32 G": Dtypes(torch.bfloat16, torch.float32),
    "fp32 W, bf16 G": Dtypes(torch.float32, torch.bfloat16),
}


class Options(NamedTuple):
    """What else a launch can be asked for; `scattered`: 16 does not divide the distances.

    `moments`: their format; `projected`: R is given, for GaLore only.
    """

    capturable: bool = False
    stochastic: bool = False
    scattered: bool = False
    moments: str = "float32"
    projected: bool = False


OPTIONS = {
    "": Options(),
    "capturable": Options(capturable=True),
    "stochastic": Options(stochastic=True),
    "capturable, stochastic": Options(capturable=True, stochastic=True),
    "scattered": Options(scattered=True),
    "codes": Options(moments="int8"),
    "codes, capturable": Options(moments="int8", capturable=True),
    "codes, scattered": Options(moments="int8", scattered=True),
    "bf16 moments": Options(moments="bfloat16"),
    "projected": Options(projected=True),
    "projected, scattered": Options(projected=True, scattered=True),
    "projected, codes": Options(projected=True, moments="int8"),
    "projected, codes, capturable": Options(projected=True, moments="int8", capturable=True),
    "projected, bf16 moments": Options(projected=True, moments="bfloat16"),
}

FIRA = Residual(0.25, 1.0)

# An argument that is 1 becomes a constant, which is not a tensor: a kernel has to compile then too.
DEGENERATE = [((1, 1), 1), ((1, 17), 1), ((17, 1), 1), ((61, 37), 13)]
DEGENERATE_PROJECTED = ("projected", "projected, codes, capturable")


class Case(NamedTuple):
    """A batch of equal matrices, and one step of it."""

    name: str
    shape: tuple[int, int]
    rank: int
    matrices: int
    dtypes: str
    options: str
    residual: Residual | None

    def __str__(self) -> str:
        method = "GaLore" if self.residual is None else "Fira"
        words = (
            f"{self.matrices} of {self.name} {self.shape[0]} x {self.shape[1]} r{self.rank}",
            self.dtypes,
            method,
            self.options,
        )
        return ", ".join(filter(None, words))

    @property
    def aligned(self) -> bool:
        """Whether all rows begin at multiples of 16 bytes."""
        multiples = self.shape[1] % 16 == 0 and self.rank % 16 == 0
        return multiples and not OPTIONS[self.options].scattered


@dataclass
class Variant:
    """A kernel with the arguments of one launch, and the launches that share its binary."""

    kernel: JITFunction
    target: Target
    arguments: tuple
    options: dict
    dtypes: str
    aligned: bool
    uses: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """What a variant compiles to; bytes of stack and shared memory, spilling instructions.

    `overlapping`: copies to shared memory that begin while a product is pending.
    """

    kernel: str
    target: int
    tile: str
    cuts: int | None
    warps: int
    stages: int | None
    split: bool
    sums_or_residual: bool | None
    dtypes: str
    aligned: bool
    registers: int
    stack: int
    spills: int
    shared: int
    product: str | None
    accesses: dict[str, int]
    overlapping: int
    hazards: list[str]
    uses: list[str]

    def __str__(self) -> str:
        return (
            f"sm_{self.target} {self.kernel} {self.tile} ({self.warps} warps, {self.stages} stages,"
            f" {self.cuts} cuts, split {self.split}, {self.dtypes}): {self.registers} registers,"
            f" {self.stack} bytes of stack, {self.spills} spilling instructions,"
            f" {self.shared} bytes shared, {self.product}, {self.accesses};"
            f" {'; '.join(self.hazards) or 'no hazards'}; {self.uses[0]},"
            f" {len(self.uses)} in all"
        )


def cases() -> Iterator[Case]:
    """The layers of the models at the ranks of the papers, alone and in batches.

    Dtypes other than bf16 and float32, and options, are compiled for two models.
    """
    for name, preset in PRESETS.items():
        hidden, ffn = preset.hidden, preset.ffn
        ranks = (64, preset.rank) if name == "7b" else (preset.rank,)
        shapes = ((hidden, hidden), (ffn, hidden), (hidden, ffn))
        for rank, shape, residual in product(ranks, shapes, (None, FIRA)):
            case = Case(name, shape, rank, preset.layers, "bf16", "", residual)
            many = name in ("1b", "7b")
            for dtypes in DTYPES if many else ("bf16", "fp32"):
                yield case._replace(dtypes=dtypes)
                yield case._replace(dtypes=dtypes, matrices=1)
            for options in OPTIONS if many else ():
                if residual is None or not OPTIONS[options].projected:
                    yield case._replace(options=options)
            if many:
                yield case._replace(dtypes="fp32", options="scattered")
                yield case._replace(dtypes="fp32", options="codes")
                yield case._replace(matrices=1, options="codes")
    for shape, rank in DEGENERATE:
        for dtypes, options in product(("bf16", "fp32"), ("", "capturable", "codes, capturable")):
            yield Case("degenerate", shape, rank, 1, dtypes, options, FIRA)
        for dtypes, options in product(("bf16", "fp32"), DEGENERATE_PROJECTED):
            yield Case("degenerate", shape, rank, 1, dtypes, options, None)


def quick_cases(target: Target) -> Iterator[Case]:
    """What the test compiles: each kind of rows and of tiles for every target, the rest for one."""
    odd = Case("1b", (2048, 5461), 512, 24, "bf16", "", FIRA)
    aligned = odd._replace(shape=(5461, 2048))
    split = Case("7b", (4096, 4096), 64, 1, "bf16", "", FIRA)
    nano = PRESETS["nano"]
    small = Case("nano", (nano.hidden, nano.hidden), nano.rank, nano.layers, "bf16", "", FIRA)
    yield from (odd, odd._replace(dtypes="fp32"), odd._replace(options="scattered"))
    yield from (aligned, split, small)
    if target.capability == 90:
        # The tiles with the fewest registers to spare.
        wide = Case("7b", (4096, 11008), 1024, 32, "bf16", "capturable, stochastic", FIRA)
        yield from (wide, wide._replace(shape=(11008, 4096)))
        yield Case("350m", (1024, 2736), 256, 24, "bf16", "", FIRA)
    yield from (aligned._replace(options="codes"), split._replace(options="codes"))
    given = [odd._replace(residual=None), aligned._replace(residual=None)]
    for options in ("projected", "projected, codes"):
        yield from (each._replace(options=options) for each in given)
    some = [odd._replace(dtypes=dtypes) for dtypes in DTYPES if dtypes not in ("bf16", "fp32")]
    for options, means in OPTIONS.items():
        if means.projected:
            some += [each._replace(options=options) for each in given]
        elif options not in ("", "scattered"):
            some.append(odd._replace(options=options))
    some += [given[1]._replace(dtypes=dtypes, options="projected") for dtypes in DTYPES]
    some += [aligned._replace(dtypes="fp32"), aligned._replace(residual=None)]
    some += [odd._replace(dtypes="fp32", options="codes")]
    some += [split._replace(options="capturable, stochastic"), small._replace(residual=None)]
    for shape, rank in DEGENERATE:
        for dtypes, options in (
            ("bf16", "capturable"),
            ("fp32", ""),
            ("bf16", "codes, capturable"),
        ):
            some.append(Case("degenerate", shape, rank, 1, dtypes, options, FIRA))
        for dtypes, options in zip(("bf16", "fp32"), DEGENERATE_PROJECTED, strict=True):
            some.append(Case("degenerate", shape, rank, 1, dtypes, options, None))
    yield from some[TARGETS.index(target) :: len(TARGETS)]


def variants(quick: bool, candidates: bool) -> list[Variant]:
    """Everything that would be launched, once each."""
    found: dict[str, Variant] = {}
    for target in TARGETS:
        for case in quick_cases(target) if quick else cases():
            for project, update in _configurations(case, target) if candidates else [(None, None)]:
                with config.forced(project=project, update=update):
                    _add(found, target, case)
    return list(found.values())


def _configurations(case: Case, target: Target) -> Iterator[tuple]:
    """All that a tuner may try, two operations at a time."""
    problems = {}

    def noted(operation: str, problem: config.Problem, gpu: config.Gpu) -> config.Config:
        problems[operation] = problem
        return config.config_of(operation, problem, gpu)

    # Of the two places that gradients may have, the aligned one comes last.
    with mock.patch.object(launchers, "config_of", noted):
        launches(target, case)
    candidates = (
        config.candidates(operation, problems[operation], target.gpu)
        for operation in ("project", "update")
    )
    return zip_longest(*candidates)


def _add(found: dict[str, Variant], target: Target, case: Case) -> None:
    for kernel, arguments, options in (*launches(target, case), *launches_of_samples(case)):
        key = _key(kernel, target, arguments, options)
        new = Variant(kernel, target, arguments, options, case.dtypes, case.aligned)
        variant = found.setdefault(key, new)
        variant.aligned &= case.aligned
        variant.uses.append(str(case))


def launches(target: Target, case: Case) -> list[tuple[JITFunction, tuple, dict]]:
    """The launches of one step of one batch, recorded instead of run."""
    recorded = []

    def record(kernel: JITFunction, grid: tuple, arguments: tuple, options: dict) -> None:
        recorded.append((kernel, arguments, options))

    def empty(size: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        return [torch.empty(size, dtype=dtype, device="meta")] * count

    def addresses_of(tensors: list[torch.Tensor]) -> addresses.Addresses:
        found = addresses.addresses_of(tensors)
        return found._replace(unit=1) if options.scattered else found

    dtypes, options, count = DTYPES[case.dtypes], OPTIONS[case.options], case.matrices
    switches = SimpleNamespace(fp32_precision=dtypes.precision)
    side = _side(case)
    low = projected_shape(case.shape, side, case.rank)
    moments, meta = FORMATS[options.moments], torch.device("meta")
    stored = new_stored(low, moments, meta, channel_groups(side))
    exp_avgs, exp_avg_sqs, *scales = [[each] * count for each in stored if each is not None]
    matrices = Matrices(
        side,
        case.residual,
        params=empty(case.shape, dtypes.weight),
        grads=empty(low if options.projected else case.shape, dtypes.grad),
        bases=empty(basis_shape(case.shape, side, case.rank), dtypes.weight),
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        limiter_norms=empty(()),
        salts=tuple(range(count)) if options.stochastic else None,
        exp_avg_scales=scales[0] if scales else (),
        exp_avg_sq_scales=scales[1] if scales else (),
        moment_salts=None if moments is torch.float32 else tuple(range(count)),
        projected=options.projected,
    )
    scalar, step = 0.5, 17
    if options.capturable:
        scalar, step = empty((count,), torch.float64)[0], empty((count,), torch.int32)[0]
    adam = AdamScalars(0.9, 0.999, 1e-8, scalar, scalar)
    with (
        mock.patch.multiple(
            launchers,
            addresses_of=addresses_of,
            gpu_of=lambda _: target.gpu,
            rereads_gradients=lambda _: target.capability == 90,
        ),
        mock.patch.object(launch, "by_jit", record),
        mock.patch.object(torch.backends.cuda, "matmul", switches),
    ):
        operations = launchers.Operations(matrices)
        projection = operations.project_moments(matrices, adam, step)
        if options.projected:
            return recorded  # operation 3 is GaLore's, which has cases of its own
        factor = None
        if projection.sums is not None:
            factor = operations.channel_scale(matrices, projection.sums)
        scalars = Scalars(adam, 0.25, step_size=scalar, decay=scalar, step=step)
        operations.back_project_update(matrices, projection, factor, scalars)
        if moments is not torch.float32:
            whole = new_stored(case.shape, moments, meta, FLAT_GROUPS)
            grad = torch.empty_like(matrices.params[0], dtype=dtypes.grad)
            plain.adamw(matrices.params[0], grad, whole, scalars, salt=1)
    return recorded


def launches_of_samples(case: Case) -> list[tuple[JITFunction, tuple, dict]]:
    """As `launches`, for the weighted rows of a sampled layer's backward pass."""
    recorded = []

    def record(kernel: JITFunction, grid: tuple, arguments: tuple, options: dict) -> None:
        recorded.append((kernel, arguments, options))

    heads = torch.empty(case.shape, dtype=DTYPES[case.dtypes].grad, device="meta")
    index = torch.empty(case.rank, dtype=torch.int32, device="meta")
    with mock.patch.object(launch, "by_jit", record):
        rows.scaled_rows(heads, index, torch.empty(case.rank, device="meta"))
    return recorded


def _side(case: Case) -> Side:
    return Side.LEFT if case.shape[0] < case.shape[1] else Side.RIGHT


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
    """Equal for launches that share a binary."""
    _activate(target)
    *_, binder = kernel.device_caches[target.capability]
    options = {"debug": False, "instrumentation_mode": "", **options}
    _, specialization, remaining = binder(*arguments, **options)
    return f"{kernel.__name__} {target.capability} {specialization} {remaining}"


def compiled(
    target: Target, kernel: JITFunction, arguments: tuple, options: dict
) -> CompiledKernel:
    """What a launch would run there."""
    _activate(target)
    return kernel.run(*arguments, grid=(1,), warmup=True, **options)


def compile_variant(variant: Variant) -> Record:
    """Compiles for the variant's target and reads what came out."""
    options, target = variant.options, variant.target
    try:
        binary = compiled(target, variant.kernel, variant.arguments, options)
    except Exception as error:
        name = f"{variant.kernel.__name__} for sm_{target.capability}, {variant.uses[0]}"
        raise RuntimeError(f"{name}: {error}") from error
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", file.name)
    ptx = binary.asm["ptx"]
    overlapping, hazards = _course(binary.asm["ttgir"], options)
    return Record(
        kernel=variant.kernel.__name__,
        target=target.capability,
        tile=" x ".join(
            str(options[key]) for key in ("BC", "BR", "BD", "GROUPS") if key in options
        ),
        cuts=options.get("CUTS"),
        warps=options["num_warps"],
        stages=options.get("num_stages"),
        split=options.get("SPLIT", False),
        sums_or_residual=options.get("SUMS", options.get("RESIDUAL")),
        dtypes=variant.dtypes,
        aligned=variant.aligned,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        stack=int(re.search(r"STACK:(\d+)", usage)[1]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        shared=binary.metadata.shared,
        product=next((name for name, code in PRODUCTS.items() if code in ptx), None),
        accesses=_accesses(ptx),
        overlapping=overlapping,
        hazards=hazards,
        uses=variant.uses,
    )


def _tool(name: str, *arguments: str) -> str:
    command = [TOOLS / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _course(ttgir: str, options: dict) -> tuple[int, list[str]]:
    """Copies that overlap products, and the hazards, whatever the length of the reduction."""
    tile = {name: options[size] for name, size in LENGTHS.items() if size in options}
    courses = [
        follow(ttgir, parts=1, **{name: turns * size for name, size in tile.items()})
        for turns in TURNS
    ]
    hazards = {hazard: None for course in courses for hazard in course.hazards}
    # A length of 1 is a constant, and the loop over it has a turn that is never taken.
    if all(f"%{name}: i32" in ttgir for name in tile):
        missed = set.intersection(*(course.missed for course in courses))
        hazards |= {f"{each} was not followed": None for each in sorted(missed)}
    return courses[-1].overlapping, list(hazards)


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


def compile_all(quick: bool, candidates: bool = False) -> list[Record]:
    """Compiles every variant, in processes: ptxas takes most of the time."""
    todo = variants(quick, candidates)
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
    if record.split:
        name += ", split"
    stages = str(record.stages or "")
    rows = "16-byte" if record.aligned else "odd"
    return name, record.tile, str(record.warps), stages, record.dtypes, rows


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
        "targets": [{"capability": t.capability, **t.gpu._asdict()} for t in TARGETS],
    }
    lines = ",\n".join(f"  {json.dumps(asdict(record))}" for record in records)
    text = json.dumps(head, indent=1).removesuffix("\n}")
    path.write_text(f'{text},\n "variants": [\n{lines}\n ]\n}}\n')


def main(arguments: list[str] | None = None) -> None:
    """Compiles, writes the record and prints the table; ends with status 1 if there are hazards."""
    line = about("triton_compile", __doc__)
    line.add_argument("--quick", action="store_true", help="fewer shapes and dtypes")
    line.add_argument("--candidates", action="store_true", help="all tiles that a tuner may try")
    text = "the JSON record, written anew; default: %(default)s"
    line.add_argument("--out", type=Path, default=RESULT, help=text)
    command = line.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("triton_compile: unset TRITON_INTERPRET, it replaces the compiler")
    records = compile_all(command.quick, command.candidates)
    write(records, command.out)
    Console(width=None if sys.stdout.isatty() else 150).print(table(records))
    if dangerous := [str(record) for record in records if record.hazards]:
        sys.exit("\n".join(["triton_compile: hazards", *dangerous]))


if __name__ == "__main__":
    main()
