"""Records, and what every figure is written with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "results"

NOT_MEASURED = "**not measured**"


class Records:
    """The records of a folder by their path without the ending, read when first asked for."""

    def __init__(self, folder: Path = RESULTS):
        self.folder = folder
        self._read: dict[str, dict] = {}

    def __getitem__(self, name: str) -> dict:
        if name not in self._read:
            self._read[name] = json.loads((self.folder / f"{name}.json").read_text())
        return self._read[name]

    def __contains__(self, name: str) -> bool:
        return (self.folder / f"{name}.json").exists()


Figure = Callable[[Records], str]

FIGURES: dict[str, Figure] = {}


def figure(function: Figure) -> Figure:
    FIGURES[function.__name__] = function
    return function


def table(headings: Iterable[str], rows: Iterable[Iterable[object]], record: str = "") -> str:
    """A Markdown table; the line below says where it is from."""
    headings = list(headings)
    lines = ["| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(["", *lines, *(["", record] if record else []), ""])


def source(records: Records, name: str) -> str:
    """Device, date, command and the record itself."""
    record = records[name]
    place, known = record["environment"], record["environment"]["commit"] or ""
    commit = known[:7] + (" with changes" if known.endswith("-dirty") else "")
    command, torch = record["command"], place["versions"]["torch"]
    threads = f"{place['threads']} thread{'s' * (place['threads'] > 1)}"
    return (
        f"{place['device']}, {threads}, torch {torch},"
        f" {record['date']}, commit {commit}, `{command}`:"
        f" [{name}.json](bench/results/{name}.json)"
    )


def by(rows: list[dict], **wanted: object) -> list[dict]:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def times(value: float) -> str:
    return f"{value:.2f}x"


def ms(result: dict) -> str:
    return f"{result['ms']:.1f} ± {100 * result['spread']:.0f} %"


def span_text(values: Iterable[float]) -> str:
    found = list(values)
    return f"{min(found):.2f} to {max(found):.2f}"
