"""What a GPU's counters say of one operation 1 and one operation 3, by Nsight Compute.

    ncu --profile-from-start off ... python -m bench.contact.profiled --case '{"rows": ...}'

Between the marks of the profiler this runs each operation of a batch once. `profile` does both, and
reads what came out: shares of the peak rates of memory, caches and tensor cores, occupancy, time.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import torch

from bench.cases import Candidate, Case, make_inputs
from lowrank_kernels.ops import load

ROOT = Path(__file__).parents[2]
KERNELS = "regex:project_kernel|update_kernel"
KEPT = re.compile(
    r"(throughput\.avg\.pct|pipe_tensor.*\.pct|warps_active\.avg\.pct|issue_active\.avg\.pct"
    r"|gpu__time_duration\.sum$|dram__bytes.*\.sum$|lts__t_bytes\.sum$|registers_per_thread"
    r"|occupancy_limit|shared_mem_per_block)"
)
SECONDS = 100


class NotProfiled(RuntimeError):
    """The profiler is not here, or cannot read the counters."""


def profile(case: Case, folder: Path) -> list[dict]:
    """The metrics that matter, by kernel; all that there are lie in a file in the folder.

    Raises:
        NotProfiled: there is nothing to read.
    """
    tool = shutil.which("ncu")
    if tool is None:
        raise NotProfiled("ncu is not on PATH")
    out = folder / f"ncu-{case.rows}x{case.cols}-r{case.rank}.csv"
    # The clocks stay as the machine has them.
    command = [
        *(tool, "--set", "full", "--clock-control", "none", "--profile-from-start", "off"),
        *("--kernel-name", KERNELS, "--csv", "--page", "raw", "--log-file", str(out)),
        *(sys.executable, "-m", "bench.contact.profiled", "--case", json.dumps(asdict(case))),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    found = read(out.read_text()) if out.exists() else []
    if not found:
        text = f"{out.read_text() if out.exists() else ''}\n{done.stdout}\n{done.stderr}".split(
            "\n"
        )
        errors = [line for line in text if "ERROR" in line] or [line for line in text if line]
        raise NotProfiled(f"ncu ended with status {done.returncode}: {errors[-1:]}")
    return found


def read(text: str) -> list[dict]:
    """Of ncu's raw page: a header, units, and a line a kernel, among lines of its own."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if len(lines) < 3:
        return []
    names, units, *rows = csv.reader(lines)
    return [
        {"kernel": row[names.index("Kernel Name")]}
        | {
            f"{name} {unit}".strip(): _number(value)
            for name, unit, value in zip(names, units, row, strict=True)
            if KEPT.search(name)
        }
        for row in rows
    ]


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


def main() -> None:
    line = argparse.ArgumentParser(prog="python -m bench.contact.profiled")
    line.add_argument("--case", type=json.loads, required=True)
    case = Case(**line.parse_args().case)
    inputs = make_inputs(case, torch.device("cuda"), seed=0)
    candidate = Candidate(load("triton"), case)
    candidate.step(inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    candidate.step(inputs)
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
