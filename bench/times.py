"""Put measured steps into the table by which `backend="auto"` chooses on a GPU.

    python -m bench.times campaign/kernels-cuda.json       # records of bench.kernels
    python -m bench.times contact/first_contact.json       # of the part `operations`

A measured row takes the place of any other row of its case.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from bench.cases import DTYPES, STEP
from bench.options import about
from lowrank_kernels.ops import times

KERNELS = {"triton", "native"}
KEY = ("gpu", "dtype", "rows", "cols", "rank", "side")


def operations(record: dict) -> Iterator[tuple[dict, dict]]:
    """Rows of operations and steps, each with the run that it is from, but none of `--quick`."""
    for row in record["rows"]:
        run = record["runs"][row["run"]] if "runs" in record else record
        if "--quick" not in run["command"].split():
            each = row.get("operations", [row])
            yield from ((run, one) for one in each if "operation" in one)


def measured(record: dict) -> list[dict]:
    """The rows of a record: microseconds a matrix of Fira's step by each of our backends.

    A case of which only one of the kernels was timed says nothing of the other, nor does a CPU.
    """
    found = []
    for run, row in operations(record):
        ours = {name: row["results"][name] for name in times.ORDER if name in row["results"]}
        if (row["method"], row["operation"]) != ("fira", STEP) or not ours.keys() >= KERNELS:
            continue
        found.append(
            {
                "gpu": run["environment"]["device"],
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
    """Writes the table anew, a line a row; a record that has no times for it ends with status 1."""
    line = about("times", __doc__)
    text = "written by bench.kernels or bench.first_contact on a GPU"
    line.add_argument("records", type=Path, nargs="+", help=text)
    text = "the table; default: the package's own, %(default)s"
    line.add_argument("--out", type=Path, default=times.FILE, help=text)
    options = line.parse_args(arguments)
    rows = json.loads(times.FILE.read_text())["rows"]
    for path in options.records:
        new = measured(json.loads(path.read_text()))
        if not new:
            sys.exit(f"times: {path} has no case that triton and native were both timed on")
        rows = merged(rows, new)
    lines = ",\n".join(map(json.dumps, rows))
    options.out.write_text(f'{{\n"rows": [\n{lines}\n]\n}}\n')
    print(f"{sum(row['source'] == 'measured' for row in rows)} measured rows of {len(rows)}")


if __name__ == "__main__":
    main()
