"""Figures of what a GPU has to show, and of what is compiled for one."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from bench.figures.common import NOT_MEASURED, Records, by, figure, table, times
from bench.models import PRESETS


@figure
def cuda_compile(records: Records) -> str:
    rows = records["cuda-compile"]["rows"]
    registers = [row["registers"] for row in rows]
    spilling = sum(row["spill_stores"] + row["spill_loads"] > 0 for row in rows)
    found = f"{len(rows)} kernels, {min(registers)} to {max(registers)} registers"
    return f"{found}, {spilling} of them spill"


@figure
def gpu_goals(records: Records) -> str:
    """What has to be shown on a GPU, and what was."""
    lines = [(text, goal, _measured(records, value)) for text, goal, value in GPU_GOALS]
    return table(("on an NVIDIA H200, bf16 weights and gradients", "goal", "measured"), lines)


def _measured(records: Records, value: Callable[[Records], str]) -> str:
    try:
        return value(records)
    except (FileNotFoundError, KeyError):
        return NOT_MEASURED


def _gpu_row(records: Records, model: str) -> dict:
    """Of a model's step at its own rank by triton: its own record's, else that of first contact.

    Raises:
        FileNotFoundError, KeyError: it was not measured.
    """
    if (name := f"model_step-{model}-cuda") in records:
        return records[name]["rows"][0]
    rank = PRESETS[model].rank
    for row in records["first_contact-cuda"]["rows"]:
        facts = [row.get(key) for key in ("part", "model", "rank", "dtype", "backend")]
        if facts == ["models", model, rank, "bf16", "triton"]:
            return row
    raise KeyError(model)


def _of_floor(records: Records) -> str:
    shares = [
        _gpu_row(records, model)["results"]["fira"]["share_of_floor"] for model in ("1b", "7b")
    ]
    return ", ".join(times(1 / share) for share in shares)


def _against(ours: str, rival: str, models: tuple[str, ...]) -> Callable[[Records], str]:
    def ratio(records: Records) -> str:
        rows = [_gpu_row(records, model)["results"] for model in models]
        return ", ".join(times(row[rival]["ms"] / row[ours]["ms"]) for row in rows)

    return ratio


def _refresh_share(records: Records) -> str:
    rows = by(records["refresh-cuda"]["rows"], finder="randomized")
    return f"{100 * max(row['share_of_step'] for row in rows):.1f} %"


def _slowest(records: Records) -> str:
    """The slowest step after the first, in medians, of layers that take turns."""
    runs = by(records["pretrain-60m-cuda/pretrain"]["runs"], optimizer="galore")
    return times(
        max(max(r["step_seconds"][1:]) / statistics.median(r["step_seconds"]) for r in runs)
    )


def _at_low_rank(records: Records) -> str:
    (row,) = by(records["ranks-cuda"]["rows"], model="1b", rank=128)
    return times(row["results"]["adamw-master"]["ms"] / row["results"]["fira"]["ms"])


def _tokens(records: Records) -> str:
    ratios = []
    for model in ("60m", "350m"):
        rows = records[f"pretrain-{model}-cuda/pretrain"]["summary"]
        rate = {row["optimizer"]: row["tokens_per_second"] for row in rows}
        ratios.append(rate["fira"] / rate["adamw"])
    return ", ".join(map(times, ratios))


def _launches(records: Records) -> str:
    return str(_gpu_row(records, "60m")["results"]["fira"]["launches"])


LARGE = ("1b", "7b")

GPU_GOALS = [
    ("Fira's step over its floor, 1B and 7B", "at most 1.4x", _of_floor),
    ("Fira, times as fast as the hybrid", "1.3x", _against("fira", "hybrid-fira", LARGE)),
    ("GaLore, times as fast as the hybrid", "1.1x", _against("galore", "hybrid-galore", LARGE)),
    (
        "Fira at 1B, times as fast as fused AdamW, float32 moments",
        "1x at r = m/4",
        _against("fira", "adamw-master", ("1b",)),
    ),
    ("the same at r = m/16", "1.5x", _at_low_rank),
    ("Fira at 60M, times as fast as fused AdamW", "1x", _against("fira", "adamw", ("60m",))),
    ("launches of a Fira step at 60M", "10: 3 or 4 a batch of equal matrices", _launches),
    ("randomized refresh, of a step at T = 200", "at most 2 %", _refresh_share),
    ("slowest step after the first, in medians, 60M", "under 2x", _slowest),
    ("tokens/s against fused AdamW, 60M and 350M", "at least 0.99x", _tokens),
]
