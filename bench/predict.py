"""How long would the Triton kernels take on an H200? Predicted from what they compile to.

    python -m bench.predict                     # compiles for sm_90, minutes on two CPU cores
    python -m bench.predict --version 1a2b3c    # keeps the rows of other versions beside its own

PREDICTED, NOT MEASURED: arithmetic over compiled facts and the rates of `Rates`, most of which are
assumptions. It orders designs; a measurement corrects the constants, in that one place.

A kernel is a grid of blocks, of which a processor holds as many as its registers and its shared
memory allow. They run in waves. A block has a loop of products, then an epilogue:

    loop      the slowest of: FLOPs at the processor's rate; bytes through L2 at its share of L2's
              rate; bytes from memory at its share of memory's rate; bytes in flight a round trip
    epilogue  the slower of: bytes at its share of memory's rate; rounds of loads that wait for one
              another, a round trip each
    wave      loop + epilogue where a block is alone on its processor; else the longer of the two
              and what it does not hide of the shorter

and no kernel takes less than its bytes or its FLOPs do. Floors count each operand once, N and R in
float32 (`Case.traffic`); a kernel without a floor of its own is excess.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.cases import DTYPES, Case
from bench.models import PRESETS
from bench.record import write_lines
from bench.tables import new_table, progress, show

RESULT = Path(__file__).parent / "results" / "predict-h200.json"
TITLE = "predicted, not measured"
MODELS = ("60m", "1b", "7b")
SMALL_RANK = 64


@dataclass(frozen=True)
class Rates:
    """An H200 as it is assumed to be; seconds, bytes a second, FLOPs a second."""

    processors: int = 132
    registers: int = 65536  # of a processor, as all below up to `blocks`
    shared_bytes: int = 228 * 1024
    threads: int = 2048
    blocks: int = 32
    flops: float = 790e12  # of a large product of torch's, bf16
    memory: float = 4.3e12  # of a copy
    streaming: float = 0.92  # share of it that a kernel reaches
    l2: float = 7.3e12  # what all processors read; 620 TFLOP/s of 128 x 256 tiles take as much
    l2_of_one: float = 110e9  # what one processor can read
    round_trip: float = 0.75e-6  # of a load from memory
    l2_round_trip: float = 0.35e-6  # of a load that L2 holds
    product: float = 0.85  # share of `flops` of an asynchronous product from shared memory
    product_from_registers: float = 0.62  # which waits for what forms its operand
    step_by_registers: float = 1.6e-6  # of a loop whose loads are narrow and not asynchronous
    fill: float = 1.5e-6  # of a pipeline, once a wave
    launch: float = 2e-6  # from the end of a kernel to the work of the next one
    hidden: float = 0.65  # share of the shorter of loop and epilogue that another block hides


class Facts(NamedTuple):
    """What a kernel compiles to.

    Attributes:
        warps: of a block.
        registers: of a thread.
        shared: bytes of a block.
        rounds: groups of global loads behind the last product, each behind a store.
        bytes_a_round: that a thread loads in the largest of them.
        asynchronous: whether both operands of the product ride the copy pipeline.
        from_registers: whether an operand of the product comes from registers.
    """

    warps: int
    registers: int
    shared: int
    rounds: int
    bytes_a_round: int
    asynchronous: bool
    from_registers: bool

    def blocks(self, rates: Rates) -> int:
        """That a processor holds. Registers are given out by 8 to a thread."""
        threads = 32 * self.warps
        registers = threads * -(-max(self.registers, 1) // 8) * 8
        # The system has 1 KiB of each block's shared memory.
        shared = rates.shared_bytes // (self.shared + 1024)
        return min(rates.registers // registers, shared, rates.threads // threads, rates.blocks)


class Work(NamedTuple):
    """What a kernel does; FLOPs and bytes of one block unless it says otherwise."""

    tile: str
    blocks: int  # of the grid
    flops: float
    loop_bytes: float  # that the loop reads through L2
    stream_bytes: float  # of them from memory, and what the loop writes there
    epilogue_bytes: float
    total_bytes: float  # of the grid, from and to memory
    steps: int  # of the loop
    step_bytes: float  # that a step reads
    stages: int
    trips: int = 0  # to L2 and back, one after another, of its last block

    @property
    def flops_a_byte(self) -> float:
        """Of the product, by bytes that processors read through L2."""
        return self.flops / self.loop_bytes if self.loop_bytes else 0.0

    def bytes_in_flight(self) -> float:
        """Of a block's loop."""
        return max(1, self.stages - 1) * self.step_bytes


def seconds(work: Work, facts: Facts, rates: Rates) -> float:
    """Of one launch."""
    if not work.blocks:
        return 0.0
    resident, left, total = max(1, facts.blocks(rates)), work.blocks, rates.launch
    while left:
        active = min(left, resident * rates.processors)
        total += _wave(work, facts, rates, active)
        left -= active
    total += work.trips * rates.l2_round_trip
    flops = work.blocks * work.flops / rates.flops
    return max(total, work.total_bytes / (rates.memory * rates.streaming), flops)


def _wave(work: Work, facts: Facts, rates: Rates, active: int) -> float:
    processors = min(active, rates.processors)
    together = -(-active // processors)
    share = rates.product_from_registers if facts.from_registers else rates.product
    # Of one processor.
    flops = share * rates.flops / rates.processors
    memory = rates.memory * rates.streaming / processors
    l2 = min(rates.l2 / processors, rates.l2_of_one)
    if facts.asynchronous:
        waiting = work.steps * work.step_bytes / work.bytes_in_flight() * rates.round_trip
    else:
        waiting = work.steps * rates.step_by_registers
    loop = max(
        together * work.flops / flops,
        together * work.loop_bytes / l2,
        together * work.stream_bytes / memory,
        waiting if work.steps else 0.0,
    )
    epilogue = max(together * work.epilogue_bytes / memory, facts.rounds * rates.round_trip)
    if together == 1:
        return rates.fill + loop + epilogue
    return rates.fill + max(loop, epilogue) + (1 - rates.hidden) * min(loop, epilogue)


def facts_of(code: str, usage: str, ttgir: str, shared: int, warps: int) -> Facts:
    """Read from what nvdisasm and cuobjdump tell of a binary, and from Triton's last dialect."""
    rounds, largest = _rounds(code)
    # A loop's asynchronous operands lie in buffers with a slot a stage.
    slots = re.findall(r"local_alloc : \(\) -> !ttg\.memdesc<\d+x\d+x\d+x", ttgir)
    dots = re.findall(r"warp_group_dot %.*? : (tensor|!ttg\.memdesc)", ttgir)
    return Facts(
        warps=warps,
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        shared=shared,
        rounds=rounds,
        bytes_a_round=largest,
        asynchronous=len(slots) >= 2,
        from_registers="tensor" in dots,
    )


def _rounds(code: str) -> tuple[int, int]:
    """Groups of loads behind the last product, by address; the bytes of the largest of them."""
    lines = code.splitlines()
    products = [i for i, line in enumerate(lines) if re.search(r"\b(?:HGMMA|HMMA)\b", line)]
    tail = lines[products[-1] + 1 :] if products else []
    groups, behind_store = [], True
    for line in tail:
        access = re.search(r"\b(LDG|STG)\.E((?:\.\w+)*)", line)
        if access is None:
            continue
        if access[1] == "STG":
            behind_store = True
            continue
        if behind_store:
            groups.append(0)
        groups[-1] += _width(access[2])
        behind_store = False
    return len(groups), max(groups, default=0)


def _width(modifiers: str) -> int:
    """Bytes of a load; 4 where nothing is said."""
    for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if name in modifiers.split("."):
            return size
    return 4


def work_of(kernel: str, case: Case, launched: dict) -> Work:
    """By the kernel's name, from the options and the arguments that it was launched with."""
    return _WORK[kernel](case, launched)


class _Sizes(NamedTuple):
    count: int
    channels: int
    depth: int
    rank: int
    bytes: int  # of an element of W, G and P
    fira: bool


def _sizes(case: Case) -> _Sizes:
    channels, depth = sorted((case.rows, case.cols), reverse=True)
    size = DTYPES[case.dtype].itemsize
    return _Sizes(case.matrices, channels, depth, case.rank, size, case.residual is not None)


def _project(case: Case, launched: dict) -> Work:
    s, (bc, br, bd) = _sizes(case), (launched[name] for name in ("BC", "BR", "BD"))
    parts = launched["parts"]
    tiles_k = -(-s.rank // br)
    depth = s.depth / parts
    # M and V are read and written, N is written, and R for Fira.
    low = bc * br * (24 if s.fira else 20)
    partial = bc * br * 8 if parts > 1 else 0
    (total, _), *_ = case.traffic().values()
    blocks = s.count * -(-s.channels // bc) * tiles_k * parts
    return Work(
        tile=f"{bc} x {br} x {bd}",
        blocks=blocks,
        flops=2.0 * bc * br * depth,
        loop_bytes=s.bytes * (bc + br) * depth,
        stream_bytes=s.bytes * bc * depth / tiles_k,
        epilogue_bytes=low / parts + partial,
        total_bytes=total + blocks * partial,
        steps=-(-s.depth // (bd * parts)),
        step_bytes=s.bytes * bd * (bc + br),
        stages=launched["num_stages"],
    )


def _channel_scale(case: Case, launched: dict) -> Work:
    s = _sizes(case)
    blocks = s.count * -(-s.channels // launched["BC"])
    total, _ = case.traffic()["channel_scale"]
    # Arrival, the shares of all blocks, then every channel's factor, a piece at a time.
    trips = 6 + -(-s.channels // launched["BC"])
    return Work(f"{launched['BC']}", blocks, 0, 0, 0, total / blocks, total, 0, 0, 1, trips)


def _update(case: Case, launched: dict) -> Work:
    s, (bc, bd, br) = _sizes(case), (launched[name] for name in ("BC", "BD", "BR"))
    # B is formed in the loop, from N, and R for Fira.
    low = 8 if s.fira else 4
    total, _ = case.traffic()["back_project_update"]
    return Work(
        tile=f"{bc} x {bd} x {br}",
        blocks=s.count * -(-s.channels // bc) * -(-s.depth // bd),
        flops=2.0 * bc * bd * s.rank,
        loop_bytes=(low * bc + s.bytes * bd) * s.rank,
        stream_bytes=low * bc * s.rank / -(-s.depth // bd),
        # W is read and written, and G read for Fira.
        epilogue_bytes=bc * bd * s.bytes * (3 if s.fira else 2),
        total_bytes=total,
        steps=-(-s.rank // br),
        step_bytes=br * (low * bc + s.bytes * bd),
        stages=launched["num_stages"],
    )


_WORK = {
    "project_kernel": _project,
    "channel_scale_kernel": _channel_scale,
    "update_kernel": _update,
}

# The operation of `Case.traffic` that a kernel stands for.
_OPERATIONS = {
    "project_kernel": "project_moments",
    "channel_scale_kernel": "channel_scale",
    "update_kernel": "back_project_update",
}


def floor(case: Case, kernel: str, rates: Rates) -> float:
    """Seconds of a kernel's operation on a batch, each operand moved once; 0 if it has none."""
    operation = _OPERATIONS.get(kernel)
    moved, flops = case.traffic()[operation] if operation else (0.0, 0.0)
    return max(moved / rates.memory, flops / rates.flops)


def compiled(case: Case) -> Iterator[tuple[str, dict, Facts]]:
    """The launches of a step: the kernel, what it was launched with, what sm_90 makes of it."""
    from bench import triton_compile as tools

    target = next(target for target in tools.TARGETS if target.capability == 90)
    residual = tools.FIRA if case.residual else None
    shape = case.rows, case.cols
    asked = tools.Case("", shape, case.rank, case.matrices, case.dtype, "", residual)
    for kernel, arguments, options in tools.launches(target, asked):
        tools._activate(target)
        binary = kernel.run(*arguments, grid=(1,), warmup=True, **options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage = tools._tool("cuobjdump", "-res-usage", file.name)
            code = tools._tool("nvdisasm", file.name)
        ttgir, shared = binary.asm["ttgir"], binary.metadata.shared
        launched = dict(zip(kernel.arg_names, arguments, strict=False)) | options
        facts = facts_of(code, usage, ttgir, shared, options["num_warps"])
        yield kernel.__name__, launched, facts


def cases(
    models: tuple[str, ...] = MODELS, method: str = "fira"
) -> Iterator[tuple[str, Case, int]]:
    """The projected shapes of the models at a quarter of the size and at 64, in bf16, in batches as
    the backend takes them on an H200, and how many such matrices the model has.
    """
    import torch

    from bench import triton_compile as tools
    from lowrank_kernels.ops import triton as kernels

    gpu = next(target.gpu for target in tools.TARGETS if target.capability == 90)
    for name in models:
        preset = PRESETS[name]
        hidden, ffn = preset.hidden, preset.ffn
        for rank in (hidden // 4, SMALL_RANK):
            for shape, each in (((hidden, hidden), 4), ((ffn, hidden), 2), ((hidden, ffn), 1)):
                matrix = torch.empty(shape, dtype=torch.bfloat16, device="meta")
                with tools.mock.patch.object(kernels, "gpu_of", lambda _: gpu):
                    size = kernels.batch_size(matrix, matrix, rank)
                count = each * preset.layers
                yield f"{name} r{rank}", Case(*shape, rank, "bf16", method, min(size, count)), count


def rows_of(version: str, model: str, case: Case, count: int, rates: Rates) -> Iterator[dict]:
    """A row a kernel, times of one matrix."""
    for kernel, launched, facts in compiled(case):
        work = work_of(kernel, case, launched)
        resident = facts.blocks(rates)
        yield {
            "version": version,
            "model": model,
            "case": asdict(case),
            "count": count,
            "kernel": kernel.removesuffix("_kernel"),
            "tile": work.tile,
            **facts._asdict(),
            "blocks_a_processor": resident,
            "loop_bytes_in_flight": resident * work.bytes_in_flight(),
            "epilogue_bytes_in_flight": resident * 32 * facts.warps * facts.bytes_a_round,
            "flops_a_byte_of_l2": work.flops_a_byte,
            "waves": work.blocks / (resident * rates.processors),
            "us": 1e6 * seconds(work, facts, rates) / case.matrices,
            "floor_us": 1e6 * floor(case, kernel, rates) / case.matrices,
        }


def totals(rows: list[dict]) -> dict[tuple[str, str], tuple[float, float]]:
    """Milliseconds of a model's projected matrices, by version and model, and their floor."""
    found: dict[tuple[str, str], tuple[float, float]] = {}
    for row in rows:
        key = row["version"], row["model"]
        ms, floor_ms = found.get(key, (0.0, 0.0))
        each = row["count"] / 1e3
        found[key] = (ms + each * row["us"], floor_ms + each * row["floor_us"])
    return found


def kernels_table(rows: list[dict], version: str) -> Table:
    """A row a kernel of one version."""
    table = new_table(
        f"{TITLE}: an H200's microseconds a matrix, version {version}",
        "kB: shared memory of a block; in flight: kB of a processor, in the loop and in a round of"
        " the epilogue; FLOP/B: of the product, by bytes read through L2",
        ("model", "matrices", "kernel", "tile"),
        (
            "warps",
            "regs",
            "kB",
            "blocks",
            "in flight",
            "rounds",
            "FLOP/B",
            "waves",
            "us",
            "floor",
            "x",
        ),
    )
    for row in rows:
        if row["version"] != version:
            continue
        case, kilo = row["case"], 1024
        flight = f"{row['loop_bytes_in_flight'] / kilo:.0f}"
        flight += f" + {row['epilogue_bytes_in_flight'] / kilo:.0f}"
        ratio = f"{row['us'] / row['floor_us']:.1f}" if row["floor_us"] else ""
        table.add_row(
            row["model"],
            f"{case['matrices']} of {case['rows']} x {case['cols']}",
            row["kernel"],
            row["tile"],
            str(row["warps"]),
            str(row["registers"]),
            f"{row['shared'] / kilo:.0f}",
            str(row["blocks_a_processor"]),
            flight,
            str(row["rounds"]),
            f"{row['flops_a_byte_of_l2']:.0f}",
            f"{row['waves']:.2f}",
            f"{row['us']:.1f}",
            f"{row['floor_us']:.1f}",
            ratio,
        )
    return table


def totals_table(rows: list[dict]) -> Table:
    """A row a model, a column a version."""
    found = totals(rows)
    versions = list(dict.fromkeys(version for version, _ in found))
    table = new_table(
        f"{TITLE}: milliseconds of all projected matrices, and of the floor",
        "kernels alone, without what the host takes",
        ("model",),
        ("floor ms", *(f"{version} ms (x floor)" for version in versions)),
    )
    for model in dict.fromkeys(model for _, model in found):
        known = {v: found[v, model] for v in versions if (v, model) in found}
        cells = [
            f"{known[v][0]:.2f} ({known[v][0] / known[v][1]:.1f})" if v in known else ""
            for v in versions
        ]
        table.add_row(model, f"{next(iter(known.values()))[1]:.2f}", *cells)
    return table


def main(arguments: list[str] | None = None) -> None:
    """Compiles, predicts, writes the record and its rendering, and prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict")
    parser.add_argument("--models", default=",".join(MODELS), help=f"of {', '.join(PRESETS)}")
    parser.add_argument("--version", default="now", help="what the rows are called")
    parser.add_argument("--out", type=Path, default=RESULT, help="the JSON record")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("predict: unset TRITON_INTERPRET, it replaces the compiler")
    rates = Rates()
    rows = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    rows = [row for row in rows if row["version"] != options.version]
    todo = list(cases(tuple(options.models.split(","))))
    for model, case, count in progress(todo, "compiling"):
        rows += rows_of(options.version, model, case, count, rates)
    import triton

    head = {"bench": "predict", "note": TITLE, "triton": triton.__version__, "rates": asdict(rates)}
    write_lines(options.out, head, "rows", rows)
    tables = [kernels_table(rows, options.version), totals_table(rows)]
    with options.out.with_suffix(".txt").open("w") as file:
        for table in tables:
            Console(file=file, width=170).print(table)
    for table in tables:
        show(table, 170)


if __name__ == "__main__":
    main()
