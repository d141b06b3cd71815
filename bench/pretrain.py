"""Pre-train a LLaMA on real text with several optimizers side by side, and compare them.

    python -m bench.pretrain                      # five optimizers, minutes on two CPU cores
    python -m bench.pretrain --lr 3e-3,1e-2,3e-2 --seeds 0,1,2
    python -m bench.pretrain --optimizers adamw,fira --lr adamw=1e-3,3e-3 fira=1e-2
    python -m bench.pretrain --model 60m --dtype bf16 --data corpus/ --tokenizer bpe

Optimizers that share a seed start from the same weights and see the same batches. Every run has a
process of its own, so that its peak memory is its own. A comparison that was stopped goes on with
the same command and --resume, on a CPU to bitwise the same result.
"""

from __future__ import annotations

import json
import multiprocessing
import shutil
import sys
import time
from dataclasses import asdict
from multiprocessing.process import BaseProcess
from pathlib import Path

from bench.data import DataSummary, prepare
from bench.settings import Command, Job, parse, plan


def main(arguments: list[str] | None = None) -> None:
    """Runs a comparison and leaves a table on the screen, a record and a picture in the folder."""
    started = time.perf_counter()
    command = parse(arguments)
    settings, out = command.settings, command.out
    try:
        data = start(command)
    except ValueError as error:
        sys.exit(f"pretrain: {error}")
    print(data.describe(), flush=True)
    jobs = plan(settings.lrs, settings.seeds, settings.scales)
    try:
        records = [finish(job, command, data) for job in jobs]
    except KeyboardInterrupt:
        sys.exit("pretrain: stopped; --resume goes on from the last checkpoint")

    # Drawing libraries take seconds to import, which a mistake in the arguments should not cost.
    from bench.picture import PICTURES, Comparison
    from bench.record import device_name
    from bench.summary import print_tables, write_record

    words = sys.argv[1:] if arguments is None else arguments
    write_record(records, settings, data, out / "pretrain.json", words)
    comparison = Comparison(records, settings, data, device_name(settings.device))
    for name, draw in PICTURES.items():
        draw(comparison, out / f"{name}.png")
    print_tables(records, settings, data)
    print(f"{time.perf_counter() - started:.0f} s; the record and the picture are in {out}")


def start(command: Command) -> DataSummary:
    """Makes the folder ready for a new comparison, or checks that it holds this one.

    Raises:
        ValueError: The folder holds another comparison or none to resume, or the text is short.
    """
    settings, work = command.settings, command.out / "work"
    saved = _saved(work)
    if command.resume:
        if saved is None:
            raise ValueError(f"nothing to resume in {command.out}")
        _refuse(settings.differences(saved["settings"]))
    elif saved is None or command.overwrite or _is_finished(work, saved["settings"]):
        shutil.rmtree(work / "runs", ignore_errors=True)
    else:
        raise ValueError(
            f"{command.out} holds an unfinished comparison: --resume goes on, --overwrite drops it"
        )
    window = settings.seq_len + 1
    data = prepare(settings.data, settings.tokenizer, settings.vocab_size, window, work / "data")
    if command.resume and saved["digest"] != data.digest:
        _refuse([f"the text's digest was {saved['digest']}, is {data.digest}"])
    (work / "settings.json").write_text(
        json.dumps({"settings": asdict(settings), "digest": data.digest})
    )
    return data


def finish(job: Job, command: Command, data: DataSummary) -> dict:
    """Returns the record of a run, which is made or continued unless it is already there."""
    work = command.out / "work"
    folder = work / "runs" / job.name
    if not (folder / "record.json").exists():
        process = begun(job, command, data, folder)
        process.join()
        if process.exitcode != 0:
            sys.exit(f"pretrain: {job.name} failed; --resume goes on from its last checkpoint")
    return json.loads((folder / "record.json").read_text())


def begun(job: Job, command: Command, data: DataSummary, folder: Path) -> BaseProcess:
    """A process that makes a run, or continues it, and leaves its record in the folder."""
    # spawn, not fork: a child must not inherit this process' threads and memory.
    process = multiprocessing.get_context("spawn").Process(
        target=_train, args=(command, job, command.out / "work" / "data", data.vocab_size, folder)
    )
    process.start()
    return process


def _train(command: Command, job: Job, data: Path, vocab_size: int, folder: Path) -> None:
    from bench.train import train

    try:
        train(command.settings, job, data, vocab_size, folder)
    except KeyboardInterrupt:
        sys.exit(130)


def _saved(work: Path) -> dict | None:
    path = work / "settings.json"
    return json.loads(path.read_text()) if path.exists() else None


def _is_finished(work: Path, settings: dict) -> bool:
    jobs = plan(settings["lrs"], settings["seeds"], settings.get("scales"))
    return all((work / "runs" / job.name / "record.json").exists() for job in jobs)


def _refuse(differences: list[str]) -> None:
    if differences:
        raise ValueError(f"--resume needs the arguments of the start: {'; '.join(differences)}")


if __name__ == "__main__":
    main()
