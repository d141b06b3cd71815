"""Put measured steps into the table by which `backend="auto"` chooses on a GPU.

    python -m bench.times campaign/kernels-cuda.json    # records of bench.kernels

A measured row takes the place of any other row of its case.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from bench.cases import DTYPES, STEP
from lowrank_kernels.ops import times

KERNELS = {"triton", "native"}
KEY = ("gpu", "dtype", "rows", "cols", "rank", "side")


def measured(record: dict) -> list[dict]:
    """The rows of a record: microseconds a matrix of Fira's step by each of our backends.

    A case of which only one of the kernels was timed says nothing of the other, nor does a CPU.
    """
    found = []
    for row in record["rows"]:
        ours = {name: row["results"][name] for name in times.ORDER if name in row["results"]}
        if (row["method"], row["operation"]) != ("fira", STEP) or not ours.keys() >= KERNELS:
            continue
        found.append(
            {
                "gpu": record["environment"]["device"],
                "dtype": str(DTYPES[row["dtype"]]).removeprefix("torch."),
                **{key: row[key] for key in ("rows", "cols", "rank", "side")},
                "source": "measured",
                "us": {n: round(1e3 * each["ms"] / row["matrices"], 1) for n, each in ours.items()},
            }
        )
    return found


def merged(old: list[dict], new: list[dict]) -> list[dict]:
    """Both, the new ones in the place of old ones of the same case."""
    by_case = {tuple(row[key] for key in KEY): row for row in [*old, *new]}
    return list(by_case.values())


def main(arguments: list[str] | None = None) -> None:
    """Writes the table anew, a line a row."""
    parser = argparse.ArgumentParser(prog="python -m bench.times")
    parser.add_argument("records", type=Path, nargs="+", help="written by bench.kernels on a GPU")
    parser.add_argument("--out", type=Path, default=times.FILE, help="default: the package's own")
    options = parser.parse_args(arguments)
    rows = json.loads(times.FILE.read_text())["rows"]
    for path in options.records:
        rows = merged(rows, measured(json.loads(path.read_text())))
    lines = ",\n".join(map(json.dumps, rows))
    options.out.write_text(f'{{\n"rows": [\n{lines}\n]\n}}\n')
    print(f"{sum(row['source'] == 'measured' for row in rows)} measured rows of {len(rows)}")


if __name__ == "__main__":
    main()
