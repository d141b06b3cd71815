"""A table a part, of the rows that a record has of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from rich.table import Table

from bench.cases import STEP
from bench.contact.operations import KINDS, is_right
from bench.kernels import ADAMW
from bench.tables import SPREAD, new_table, time_text

Rows = list[dict]


def check(rows: Rows) -> Table:
    names = _names(row["backends"] for row in rows)
    found = new_table(
        "check: errors, as shares of what they may be against float64",
        "BITS: outputs that are not the same each time",
        ("case",),
        names,
    )
    for row in rows:
        each = (row["backends"].get(name) for name in names)
        found.add_row(row["case"], *("" if one is None else _verdict(one) for one in each))
    return found


def _verdict(one: dict) -> str:
    if "raised" in one:
        return f"RAISED {one['raised']:.60}"
    shares = {name: _size(share) for name, share in one["shares"].items()}
    worst = max(shares, key=shares.__getitem__)
    words = [f"{shares[worst]:.2f}"]
    if shares[worst] > 1:
        words.append(f"WRONG {worst}")
    if one["unequal"]:
        words.append(f"BITS {', '.join(one['unequal'])}")
    return " ".join(words)


def _size(share: float | None) -> float:
    """A record has None for NaN and infinity."""
    return math.inf if share is None or math.isnan(share) else share


def rates(rows: Rows) -> Table:
    found = new_table("rates: what the device does", SPREAD, ("what",), ("", ""))
    for row in rows:
        found.add_row(row["case"], *_rates(row))
    return found


def _rates(row: dict) -> Iterator[str]:
    for one in row.get("results", {}).values():
        yield f"{one['flops_per_second'] / 1e12:.2f} TFLOP/s, {time_text(one, 3)} ms"
    if "bytes_per_second" in row:
        yield f"{row['bytes_per_second'] / 1e9:.0f} GB/s"
    if "flops_per_second" in row:
        yield f"{row['flops_per_second'] / 1e12:.2f} TFLOP/s"
    each = [f"{name} {value:.2f}" for name, value in row.items() if name.endswith("_us")]
    if each:
        yield ", ".join(each)


def operations(rows: Rows) -> Table:
    """Our backend, the rivals, and the variant that takes the least time."""
    own, variants = rows[0]["backend"], {name for row in rows for name in row["configs"]}
    others = _names(each["results"] for row in rows for each in row["operations"])
    rivals = [name for name in others if name not in variants and name != own]
    found = new_table(
        f"operations: ms of {own}, and how many times as long the others take",
        f"{SPREAD}; variant: tiles of channels, directions and depth, and the rest of `Config`",
        ("case", "operation", "floor", own),
        ("of floor", *rivals, "best variant", "", "wrong ones"),
    )
    for row in rows:
        for each in row["operations"]:
            if row["method"] == "fira" or each["operation"] == STEP:
                cells = (row["case"], each["operation"], f"{each['floor_ms']:.3f}")
                tried = [
                    n for n, c in row["configs"].items() if c["kind"] in KINDS[each["operation"]]
                ]
                found.add_row(*cells, *_times(each, own, rivals, tried))
    return found


def _times(each: dict, own: str, rivals: list[str], variants: list[str]) -> Iterator[str]:
    results = each["results"]
    if own not in results:
        wrong = each["wrong"].get(own)
        yield f"WRONG {', '.join(wrong)}" if wrong else "not timed"
        return
    base = results[own]
    yield time_text(base, 3)
    yield f"{100 * base['share_of_floor']:.0f} %"
    yield from (f"{results[n]['ms'] / base['ms']:.2f}" if n in results else "" for n in rivals)
    tried = {name: results[name]["ms"] for name in variants if name in results}
    best = min(tried, key=tried.__getitem__, default="")
    yield from (best, f"{tried[best] / base['ms']:.2f}" if best else "")
    yield f"{len(variants) - len(tried)} of {len(variants)}" if variants else ""


def python(rows: Rows) -> Table:
    return _steps(
        "python: ms until a step returns, and until the device is done", rows, "with_device"
    )


def replay(rows: Rows) -> Table:
    return _steps("replay: ms of the device, and of Python", rows, "host")


def _steps(title: str, rows: Rows, second: str) -> Table:
    found = new_table(title, SPREAD, ("model", "step"), ("ms", second.replace("_", " ")))
    for row in rows:
        for name, one in row["results"].items():
            found.add_row(row["case"], name, time_text(one, 3), time_text(row[second][name], 3))
    return found


def profile(rows: Rows) -> Table:
    found = new_table("profile: of the peak, by Nsight Compute", "", ("case", "metric"), ("value",))
    for row in rows:
        for kernel in row["kernels"]:
            for name, value in kernel.items():
                if name == "kernel" or _is_told(name):
                    found.add_row(row["case"], name, str(value))
    return found


def _is_told(metric: str) -> bool:
    return metric.startswith(
        ("gpu__time", "dram__throughput", "lts__throughput", "l1tex__throughput", "sm__throughput")
    )


def models(rows: Rows) -> Table:
    found = new_table(
        "models: a step of a whole model, ms of the device",
        f"{SPREAD}; fresh: with gradients just written",
        ("model", "optimizer"),
        ("ms", "fresh", "of floor", "x adamw", "launches"),
    )
    for row in rows:
        for name, value in (row["wrong"] | row["missing"]).items():
            found.add_row(row["case"], name, f"WRONG {value}" if name in row["wrong"] else value)
        for name, one in row["results"].items():
            share = one.get("share_of_floor")
            found.add_row(
                row["case"],
                name,
                time_text(one),
                f"{row['fresh'][name]['ms']:.2f}",
                "" if share is None else f"{100 * share:.0f} %",
                f"{one['ms'] / row['results']['adamw']['ms']:.2f}",
                str(one["launches"] or ""),
            )
    return found


def tune(rows: Rows) -> Table:
    found = new_table(
        "tune: the three that take the least time",
        "without the names of the fields: ms, then those of `Config`, or matrices of a batch",
        ("what",),
        ("right ones", "1", "2", "3"),
    )
    for row in rows:
        best = (" ".join(f"{v:.4g}" for v in time.values()) for time in row["times"][:3])
        found.add_row(row["case"], str(len(row["times"])), *best)
    return found


def _names(groups: Iterable[dict]) -> list[str]:
    found = dict.fromkeys(name for group in groups for name in group)
    return [name for name in found if name != ADAMW]


TABLES: dict[str, Callable[[Rows], Table]] = {
    each.__name__: each
    for each in (check, rates, operations, python, replay, profile, models, tune)
}


def failures(row: dict) -> list[str]:
    """What of a row is wrong, for people to read; a variant that is wrong is no failure."""
    if "error" in row:
        return [row["error"]]
    backends = row.get("backends", {})
    raised = {name: one["raised"] for name, one in backends.items() if "raised" in one}
    wrong = [name for name, one in backends.items() if not is_right(one) and name not in raised]
    wrong += row.get("wrong", {})
    for each in row.get("operations", []):
        wrong += [name for name in each["wrong"] if name not in row["configs"]]
    found = [f"{name} raised {reason}" for name, reason in raised.items()]
    return [*found, *(f"{name} is wrong" for name in dict.fromkeys(wrong))]
