"""The JSON record of a bench: one head for all of them, then a line a measurement.

    bench, date, command                   what was run, and when
    environment                            device, its clocks, cores, threads, versions, commit
    rates, missing, ...                    what the bench adds: the floor's rates, absent rivals
    rows                                   a case each; times under `results`, by who took them

A result is {"ms": median, "spread": ..., "samples_ms": every sample}, with `share_of_floor` where
the floor is known. What pre-training leaves has `settings`, `data`, `summary` and `runs` instead of
`rows`. A `Journal` has `runs`, the heads of the commands that filled it, and rows that tell theirs.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import torch

from bench.timing import Samples

PACKAGES = (
    *("torch", "lowrank_kernels", "triton", "transformers", "tokenizers", "numpy"),
    *("galore-torch", "fira", "apollo-torch", "torchao", "bitsandbytes", "flashoptim"),
)


def write_lines(path: Path, head: dict, name: str, rows: list[dict]) -> None:
    """Writes the head and, under `name`, a line a row, so that a diff shows which row changed."""
    text = json.dumps(_finite(head), indent=2, allow_nan=False).removesuffix("\n}")
    lines = ",\n".join(json.dumps(_finite(row), allow_nan=False) for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process that is killed meanwhile leaves the file as it was.
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(f'{text},\n  "{name}": [\n{lines}\n  ]\n}}\n')
    unfinished.replace(path)


class BadRecord(SystemExit):
    """Ends the process with one line: a record that cannot be read or written, with the reason."""


class Journal:
    """A record that commands fill one after the other, written after every row.

    Raises:
        BadRecord: the file is no such record, or cannot be written.
    """

    def __init__(self, path: Path, bench: str):
        try:
            found = json.loads(path.read_text()) if path.exists() else {}
        except (OSError, ValueError) as error:
            raise BadRecord(f"{path} cannot be read, move it away: {error}") from None
        self._path, self._bench = path, bench
        self.runs: list[dict] = found.get("runs", [])
        self.rows: list[dict] = found.get("rows", [])

    def begin(self, head: dict) -> None:
        """The rows from here on are this command's."""
        self.runs.append(head)

    def find(self, **key: object) -> dict | None:
        return next((row for row in self.rows if key.items() <= row.items()), None)

    def put(self, row: dict, **key: object) -> None:
        """Writes a row, in the place of the one with this key if there is one."""
        self.drop(lambda old: key.items() <= old.items())
        self.rows.append({**key, "run": len(self.runs) - 1, **row})
        self.save()

    def replace(self, rows: list[dict], *names: str) -> None:
        """Writes rows in the place of all those that are like one of them in these fields."""
        keys = {tuple(row[name] for name in names) for row in rows}
        self.drop(lambda old: tuple(old[name] for name in names) in keys)
        self.rows += [{"run": len(self.runs) - 1, **row} for row in rows]
        self.save()

    def drop(self, unwanted: Callable[[dict], bool]) -> None:
        self.rows = [row for row in self.rows if not unwanted(row)]

    def save(self) -> None:
        head = {"bench": self._bench, "runs": self.runs}
        try:
            write_lines(self._path, head, "rows", self.rows)
        except OSError as error:
            raise BadRecord(f"{self._path} cannot be written: {error}") from None


def _finite(value: object) -> object:
    """Replaces NaN and infinity, which JSON does not have, by null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return value


def head(bench: str, device: str, arguments: list[str], **facts: object) -> dict:
    """What every record begins with."""
    return {
        "bench": bench,
        "date": datetime.date.today().isoformat(),
        "command": " ".join([f"python -m bench.{bench}", *_without_places(arguments)]),
        "environment": environment(device),
        **facts,
    }


def _without_places(arguments: list[str]) -> list[str]:
    """Where files lay, and how often the run was stopped, says nothing about the figures."""
    places, flags = ("--out", "--gradients"), ("--resume", "--overwrite")
    pairs = zip(["", *arguments], arguments, strict=False)
    return [word for before, word in pairs if word not in places + flags and before not in places]


def result(samples: Samples, floor: float | None = None) -> dict:
    """One candidate's times; with the floor in seconds, its share of what was measured."""
    found = {"ms": 1e3 * samples.median, "spread": samples.spread}
    if floor is not None:
        found["share_of_floor"] = floor / samples.median
    return {**found, "samples_ms": [round(1e3 * second, 5) for second in samples.seconds]}


def environment(device: str) -> dict:
    """Names the device, the versions and the commit that the numbers belong to."""
    return {
        "device": device_name(device),
        "clocks": _clocks(device),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "commit": commit(Path(__file__).parent),
    }


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    names = _cpuinfo("model name")
    return names[0] if names else platform.machine()


def _clocks(device: str) -> dict[str, float | None] | None:
    """MHz, as the machine is found; None where nobody tells, as in some virtual machines."""
    if device == "cpu":
        found = [float(text) for text in _cpuinfo("cpu MHz")]
        return {"cpu": max(found)} if found else None
    tool, names = shutil.which("nvidia-smi"), ("clocks.sm", "clocks.mem", "clocks.max.sm")
    if tool is None:
        return None
    command = [tool, f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True)
    values = done.stdout.strip().split(", ")
    if done.returncode or len(values) != len(names):
        return None
    return {
        name: float(text) if text.replace(".", "", 1).isdigit() else None
        for name, text in zip(names, values, strict=True)
    }


def _cpuinfo(key: str) -> list[str]:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line.split(":", 1)[1].strip() for line in lines if line.startswith(key)]


def code() -> str:
    """What is measured: the commit, with a digest of the sources where it does not say all."""
    root = Path(__file__).parents[1]
    found = commit(root)
    if found and not found.endswith("-dirty"):
        return found
    sources = [
        path for name in ("bench", "lowrank_kernels") for path in root.glob(f"{name}/**/*.py")
    ]
    sources += [path for path in root.glob("csrc/**/*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted(sources):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return f"{found or 'no commit'}, sources {digest.hexdigest()[:12]}"


def commit(folder: Path) -> str | None:
    """Of the repository that a folder belongs to."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() or None
