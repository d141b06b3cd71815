"""What half an hour with a GPU has to tell: is it right, what does it cost, where does time go?

    python -m bench.first_contact --parts check,rates --out contact
    python -m bench.first_contact --parts operations,python,replay,profile --out contact
    python -m bench.first_contact --parts models,tune --out contact
    python -m bench.first_contact --show --out contact     # the tables again; measures nothing

    check       every backend against float64 on LLaMA's shapes and odd ones, with the same bits?
    rates       copy, product, reads from L2, launches, torch's products of each shape
    operations  ms of triton, native, foreach, torch, and of Triton's other configurations
    python      ms until a step of a whole model returns, and until the device is done
    replay      a captured step beside an eager one
    profile     Nsight Compute on operations 1 and 3, where it is
    models      steps of whole models beside AdamW's
    tune        every configuration of operations 1 and 3, and sizes of batches

Each command ends within nine minutes: it begins nothing after `--seconds`, and a case that hangs is
ended. `contact/first_contact.json` is written after every case; what it holds is not measured
again, so that the same command goes on where it was stopped, elsewhere, too, if the folder goes
along. A folder is of one device, one backend, one commit (of changed files: as they are) and one
number of rounds; another is refused. A case that raised, hung or took the process with it is named
there, and the others go on in a new process; the next command tries it again, and what was wrong.
Nothing needs a network or another's optimizer.

The exit status is 1 if something was wrong or failed, else 0, also where the time was up; 74 where
the folder cannot be read, written or gone on with.
"""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import gc
import os
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from bench import kernels
from bench.contact import operations, steps
from bench.contact.tables import TABLES, failures
from bench.contact.tasks import Skipped, Task, is_fatal, synchronize, text_of
from bench.optimizers import METHODS, present
from bench.options import parse, parser, words
from bench.record import BadRecord, Journal, code, device_name, head
from bench.tables import missing_text, show

PARTS = {
    "check": operations.check,
    "rates": operations.rates,
    "operations": operations.operations,
    "python": steps.python,
    "replay": steps.replay,
    "profile": operations.profile,
    "models": steps.models,
    "tune": operations.tune,
}
SECONDS = 400.0
# How long the last case may go on when the time is up.
GRACE = 100.0
# Columns; a variant has a long name, and figures are never cut off.
WIDTH = 200
# Of a process that another one has to take the place of; that has no record to write.
BROKEN, UNUSABLE = 75, 74
INTERRUPTED = 130
UNFINISHED = {"begun", "error", "skipped"}


def record(folder: Path) -> Journal:
    return Journal(folder / "first_contact.json", "first_contact")


def kind_of(options: argparse.Namespace) -> dict[str, object]:
    """What the figures of a folder have in common."""
    device = device_name(options.device)
    asked = {name: getattr(options, name) for name in ("backend", "quick", "rounds")}
    return {"device": device, **asked, "code": code()}


def must_be_alike(journal: Journal, folder: Path, wanted: dict[str, object]) -> None:
    """Raises BadRecord where a folder has figures of something else."""
    for run in journal.runs[-1:]:
        found = run.get("kind", {})
        other = [name for name in wanted if found.get(name) != wanted[name]]
        if other:
            texts = (f"{name} {found.get(name)}, not {wanted[name]}" for name in other)
            raise BadRecord(f"{folder} holds figures of {'; '.join(texts)}: take another folder")


def work(options: argparse.Namespace, deadline: float) -> None:
    """Runs what the record lacks; leaves with status BROKEN where nothing more can run.

    The last two words of the arguments are those of a worker.
    """
    journal = record(options.out)
    _, missing = kernels.candidates(options.backend, options.device)
    missing |= present(METHODS, options.device)[1]
    kind = kind_of(options)
    must_be_alike(journal, options.out, kind)  # files may have changed since the last worker
    facts = {"backend": options.backend, "kind": kind, "missing": missing}
    journal.begin(head("first_contact", options.device, options.arguments[:-2], **facts))
    for part in options.parts:
        for task in tasks(part, options):
            if journal.find(part=part, case=task.name):
                continue
            if time.monotonic() > deadline:
                print("the time is up; the same command goes on", file=sys.stderr)
                return
            run(task, journal, part, options, deadline)


def tasks(part: str, options: argparse.Namespace) -> list[Task]:
    """The cases of a part; one that fails, where they cannot be listed."""
    try:
        return list(PARTS[part](options))
    except Exception as error:
        reason = error

        def fail() -> dict:
            raise reason

        return [Task("its cases", fail)]


def run(
    task: Task, journal: Journal, part: str, options: argparse.Namespace, deadline: float
) -> None:
    """One row; if the process ends meanwhile, the record tells by which case."""
    started = time.monotonic()
    print(f"{part}: {task.name}", file=sys.stderr, flush=True)
    journal.put({"begun": True}, part=part, case=task.name)
    faulthandler.dump_traceback_later(min(task.hangs, deadline + GRACE - started), exit=True)
    broken = False
    try:
        row = task.run()
        synchronize(torch.device(options.device))
    except Skipped as reason:
        row = {"skipped": str(reason)}
    except Exception as error:
        traceback.print_exc()
        row, broken = {"error": text_of(error)}, is_fatal(error)
    finally:
        faulthandler.cancel_dump_traceback_later()
    row["seconds"] = round(time.monotonic() - started, 2)
    journal.put(row, part=part, case=task.name)
    if broken:
        sys.exit(BROKEN)
    gc.collect()
    if options.device == "cuda":
        torch.cuda.empty_cache()


def supervise(options: argparse.Namespace) -> int:
    """Runs processes until one gets to the end; returns its exit status."""
    deadline = time.monotonic() + options.seconds
    with locked(options.out) as lock, lifeline() as life:
        journal = record(options.out)
        must_be_alike(journal, options.out, kind_of(options))
        journal.drop(lambda row: "begun" in row)
        journal.drop(lambda row: row["part"] in options.parts and is_open(row))
        journal.save()
        words = [*options.arguments, "--worker", str(deadline)]
        command = [sys.executable, "-m", "bench.first_contact", *words]
        while True:
            status = subprocess.run(command, stdin=life, pass_fds=[lock]).returncode
            if status == UNUSABLE:
                return status
            journal = record(options.out)
            ended_by = journal.find(begun=True)
            if ended_by:
                key = {"part": ended_by["part"], "case": ended_by["case"]}
                journal.put({"error": f"its process ended with status {status}"}, **key)
            elif status != BROKEN:
                return status
            if time.monotonic() > deadline:
                return 0


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Holds a folder, also as long as a process lives that the descriptor is handed to.

    Raises:
        BadRecord: another holds it, or it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        found = os.open(folder, os.O_RDONLY)
        fcntl.flock(found, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise BadRecord(f"{folder}: another command is at work there") from None
    except OSError as error:
        raise BadRecord(f"{folder} cannot be written: {error}") from None
    try:
        yield found
    finally:
        os.close(found)


@contextmanager
def lifeline() -> Iterator[int]:
    """A file that nothing is written to, and that ends with this process, however it ends."""
    reading, writing = os.pipe()
    try:
        yield reading
    finally:
        os.close(reading)
        os.close(writing)


def end_with_supervisor() -> None:
    """Ends this process when its input does, whatever it is doing."""

    def wait() -> None:
        os.read(sys.stdin.fileno(), 1)
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def is_open(row: dict) -> bool:
    """Whether the next command tries it again."""
    return bool(failures(row)) or not UNFINISHED.isdisjoint(row)


def tell(options: argparse.Namespace, journal: Journal) -> list[str]:
    """Prints a table a part; returns what was wrong."""
    found = []
    for part in options.parts:
        rows = [row for row in journal.rows if row["part"] == part]
        done = [row for row in rows if UNFINISHED.isdisjoint(row)]
        if done:
            show(TABLES[part](done), WIDTH)
        for row in rows:
            if "skipped" in row:
                print(f"{part}: {row['case']}: not done, {row['skipped']}")
            found += [f"{part}: {row['case']}: {what}" for what in failures(row)]
    if journal.runs:
        print(missing_text(journal.runs[-1]["missing"]))
    return found


def arguments_of(arguments: list[str] | None) -> argparse.Namespace:
    folder = "the folder of first_contact.json and of the profiler's pages; needed"
    usual = {"models": "60m,1b,7b", "dtypes": "bf16", "rounds": 15, "out": folder}
    line = parser("first_contact", __doc__, **usual)
    every = ",".join(PARTS)
    line.add_argument("--parts", type=words(PARTS), default=every, help="default: %(default)s")
    text = "begin nothing after; default: %(default)s"
    line.add_argument("--seconds", type=float, default=SECONDS, help=text)
    line.add_argument("--show", action="store_true", help="the tables of what was measured")
    line.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    options = parse(line, arguments)
    if options.out is None:
        line.error("--out: which folder?")
    options.out = options.out.resolve()
    return options


def main(arguments: list[str] | None = None) -> None:
    options = arguments_of(arguments)
    try:
        if options.worker is not None:
            end_with_supervisor()
            return work(options, options.worker)
        status = 0 if options.show else supervise(options)
        journal = record(options.out)
    except BadRecord as error:
        print(f"first_contact: {error}", file=sys.stderr)
        sys.exit(UNUSABLE)
    except KeyboardInterrupt:
        if options.worker is None:
            print("first_contact: stopped; the same command goes on", file=sys.stderr)
        sys.exit(INTERRUPTED)
    if status == UNUSABLE:
        sys.exit(status)
    if options.show and not journal.rows:
        sys.exit(f"first_contact: {options.out} has no figures")
    wrong = tell(options, journal)
    for line in wrong:
        print(line)
    if wrong or status:
        sys.exit(f"first_contact: {len(wrong)} cases are wrong or failed, status {status}")


if __name__ == "__main__":
    main()
