"""How long would the Triton kernels take on an H200? Predicted from what they compile to.

    python -m bench.predict                     # compiles for sm_90, minutes on two CPU cores
    python -m bench.predict --version 1a2b3c    # keeps the rows of other versions beside its own
    python -m bench.predict --models 1b         # and those of other models

PREDICTED, NOT MEASURED: the model of `lowrank_kernels.ops.triton.model`, by which the heuristics
choose tiles, over the registers, the shared memory and the rounds of loads that were compiled. It
orders designs; a measurement corrects the model's constants, in that one place.

Floors count each operand once, N and R in float32 (`Case.traffic`); a kernel without a floor of its
own is excess.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from bench.absent_gpu import memory_of_h200
from bench.cases import DTYPES, Case
from bench.models import PRESETS
from bench.options import about, words
from bench.record import Journal, head
from bench.tables import new_table, progress, show
from lowrank_kernels.ops.triton.config import Config, Problem
from lowrank_kernels.ops.triton.model import (
    RATES,
    Build,
    Rates,
    Work,
    combine_work,
    project_work,
    resident,
    resident_work,
    seconds,
    update_work,
)

RESULT = Path(__file__).parent / "results" / "predict-h200.json"
TITLE = "predicted, not measured"
MODELS = ("60m", "1b", "7b")
SMALL_RANK = 64


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

    @property
    def build(self) -> Build:
        """As the model takes it."""
        held = resident(self.registers, self.warps, self.shared)
        return Build(held, self.rounds, self.asynchronous, self.from_registers)


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


def work_of(kernel: str, case: Case, launched: dict) -> tuple[str, Work]:
    """The tile and the work, from the options and the arguments that a kernel was launched with."""
    channels, depth = sorted((case.rows, case.cols), reverse=True)
    fira, dtypes = case.residual is not None, (DTYPES[case.dtype],) * 2
    problem = Problem(case.side, channels, depth, case.rank, case.matrices, dtypes, fira)
    if kernel == "channel_scale_kernel":
        block = launched["BC"]
        blocks = case.matrices * -(-channels // block)
        total, _ = case.traffic()["channel_scale"]
        # Arrival, the shares of all blocks, then every channel's factor, a piece at a time.
        trips = 6 + -(-channels // launched["SWEEP"])
        return f"{block}", Work(blocks, 0, 0, 0, total / blocks, total, 0, 0, 1, trips)
    if kernel == "pad_rows_kernel":
        blocks = case.matrices * launched["rows"] * -(-launched["padded"] // launched["BLOCK"])
        moved = case.matrices * launched["rows"] * (launched["length"] + launched["padded"]) * 2
        return f"{launched['BLOCK']}", Work(blocks, 0, 0, 0, moved / blocks, moved, 0, 0, 1)
    if kernel == "combine_kernel":
        tile = launched["BC"], launched["BR"]
        return "{} x {}".format(*tile), combine_work(problem, *tile)
    bc, br, bd = (launched[name] for name in ("BC", "BR", "BD"))
    stages, split = launched["num_stages"], launched.get("parts", 1)
    config = Config(bc, br, bd, launched.get("CUTS", 0), launched["num_warps"], stages, split)
    if kernel == "project_kernel":
        return f"{bc} x {br} x {bd}", project_work(problem, config)
    work = resident_work if kernel == "resident_update_kernel" else update_work
    return f"{bc} x {bd} x {br}", work(problem, config)


# The operation of `Case.traffic` that a kernel stands for.
_OPERATIONS = {
    "project_kernel": "project_moments",
    "channel_scale_kernel": "channel_scale",
    "update_kernel": "back_project_update",
    "resident_update_kernel": "back_project_update",
}


def floor(case: Case, kernel: str, rates: Rates = RATES) -> float:
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

    from lowrank_kernels.ops import triton as kernels

    for name in models:
        preset = PRESETS[name]
        hidden, ffn = preset.hidden, preset.ffn
        for rank in (hidden // 4, SMALL_RANK):
            for shape, each in (((hidden, hidden), 4), ((ffn, hidden), 2), ((hidden, ffn), 1)):
                matrix = torch.empty(shape, dtype=torch.bfloat16, device="meta")
                with memory_of_h200():
                    size = kernels.batch_size(matrix, matrix, rank)
                count = each * preset.layers
                yield f"{name} r{rank}", Case(*shape, rank, "bf16", method, min(size, count)), count


def rows_of(version: str, model: str, case: Case, count: int) -> Iterator[dict]:
    """A row a kernel, times of one matrix."""
    for kernel, launched, facts in compiled(case):
        tile, work = work_of(kernel, case, launched)
        build = facts.build
        yield {
            "version": version,
            "model": model,
            "case": asdict(case),
            "count": count,
            "kernel": kernel.removesuffix("_kernel"),
            "tile": tile,
            **facts._asdict(),
            "blocks_a_processor": build.resident,
            "loop_bytes_in_flight": build.resident * work.bytes_in_flight,
            "epilogue_bytes_in_flight": build.resident * 32 * facts.warps * facts.bytes_a_round,
            "flops_a_byte_of_l2": work.flops_a_byte,
            "waves": work.blocks / (build.resident * RATES.processors),
            "us": 1e6 * seconds(work, build) / case.matrices,
            "floor_us": 1e6 * floor(case, kernel) / case.matrices,
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


def arguments_of(arguments: list[str]) -> argparse.Namespace:
    line = about("predict", __doc__)
    usual = ",".join(MODELS)
    names = f"of {', '.join(PRESETS)}; default: {usual}"
    line.add_argument("--models", type=words(PRESETS), default=usual, help=names)
    called = "what the rows are called; default: %(default)s"
    line.add_argument("--version", default="now", help=called)
    place = "the JSON record, its tables beside it; default: %(default)s"
    line.add_argument("--out", type=Path, default=RESULT, help=place)
    return line.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Compiles, predicts, writes the record and its rendering, and prints the tables."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = arguments_of(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("predict: unset TRITON_INTERPRET, it replaces the compiler")
    journal, todo = Journal(options.out, "predict"), list(cases(tuple(options.models)))
    facts = {"note": TITLE, "rates": asdict(RATES)}
    journal.begin(head("predict", "cpu", arguments, **facts))
    made = [
        row
        for model, case, count in progress(todo, "compiling")
        for row in rows_of(options.version, model, case, count)
    ]
    journal.replace(made, "version", "model")
    rows = journal.rows
    tables = [kernels_table(rows, options.version), totals_table(rows)]
    with options.out.with_suffix(".txt").open("w") as file:
        for table in tables:
            Console(file=file, width=170).print(table)
    for table in tables:
        show(table, 170)


if __name__ == "__main__":
    main()
