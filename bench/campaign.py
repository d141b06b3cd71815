"""Everything that this device can show, in parts of at most nine minutes: build, tests, benches.

    python -m bench.campaign --out campaign          # goes on where it was stopped
    python -m bench.campaign --out campaign --only tune,kernels
    python -m bench.campaign --out campaign --list   # the parts, and what is done
    python -m bench.campaign --out campaign --quick  # minutes on a CPU: a smoke test, no figures

The folder holds a record a bench, a log a part, and `campaign.json`: how each part ended. A part
that ended well is not run again; one that was stopped or failed is. On a GPU the kernels go first
and the CPU's tests, which need none, last. `bench.report` makes tables and pictures of the records.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.optimizers import present
from bench.tables import new_table, show

ROOT = Path(__file__).parents[1]
SECONDS = 540
# Of a part that goes on where it was stopped, in one campaign.
TRIES = 10
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


@dataclass(frozen=True)
class Part:
    """A command that ends within `SECONDS`, or one that goes on with --resume where it was stopped.

    `needs` is a program that has to be there.
    """

    name: str
    command: tuple[str, ...]
    resumes: bool = False
    needs: str | None = None


def parts(out: Path, device: str, quick: bool) -> list[Part]:
    """What there is to do on this device, in order."""
    found = [
        Part("build", python("-c", BUILD)),
        Part("env", python("-m", "lowrank_kernels", "env")),
        Part("selftest", python("-m", "lowrank_kernels", "selftest")),
    ]
    if quick:
        return [*found, *_quick_benches(out)]
    if device == "cuda":
        found += [*_on_gpu(out), *_sanitizers(), *_comparisons_on_gpu(out), *_tests()]
    else:
        found += [*_tests(), *_on_cpu(out)]
    return [*found, _bench("memory", out / "memory.json")]


# An editable install of a checkout whose module does not load is made again, with its build tools
# from an index, or from the environment where it has them.
BUILD = """
import importlib.util, subprocess, sys
try:
    from lowrank_kernels import _native
    print("built already:", _native.build_info())
except ImportError:
    isolated = importlib.util.find_spec("pybind11") is None
    flags = [] if isolated else ["--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "install", "--no-deps", *flags, "-e", "."]
    sys.exit(subprocess.run(command).returncode)
"""


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, *words)


def _bench(bench: str, out: Path, *words: str, resumes: bool = False) -> Part:
    name = out.stem if out.suffix else out.name
    return Part(name, python("-m", f"bench.{bench}", *words, "--out", str(out)), resumes)


def _quick_benches(out: Path) -> Iterator[Part]:
    quick = ("--quick", "--device", "cpu")
    yield _bench("kernels", out / "kernels-cpu.json", *quick)
    yield _bench("step", out / "step-cpu.json", *quick)
    yield _bench("model_step", out / "model_step-cpu.json", *quick)
    ranks = ("--ranks", "16,64,full", "--optimizers", "adamw,galore,fira", "--dtypes", "fp32")
    yield _bench("model_step", out / "ranks-cpu.json", *quick, *ranks)
    yield _bench("activations", out / "activations-cpu.json", *quick)
    yield _bench("host", out / "host-cpu.json", "--quick")
    yield _bench("refresh", out / "refresh-cpu.json", *quick)
    yield _bench("memory", out / "memory.json", "--models", "60m")
    yield _bench("first_contact", out / "first_contact", *quick)
    tiny = "--steps 20 --seq-len 32 --batch-size 4 --eval-tokens 256 --overwrite --device cpu"
    yield _bench("pretrain", out / "pretrain-nano", *tiny.split())


def _tests() -> Iterator[Part]:
    """A part a folder: all of them take longer than a part may."""
    for folder in sorted((ROOT / "python_tests").iterdir()):
        if any(folder.glob("test_*.py")):
            place = str(folder.relative_to(ROOT))
            yield Part(f"tests-{folder.name}", python("-m", "pytest", "-q", place))


def _on_cpu(out: Path) -> Iterator[Part]:
    yield _bench("kernels", out / "kernels-cpu.json", "--rounds", "9")
    yield _bench("step", out / "step-cpu.json", "--rounds", "7")
    yield _bench("model_step", out / "model_step-cpu.json", "--models", "60m", "--rounds", "7")
    sizes = "--models 9m,20m,35m,60m,130m --optimizers adamw,adamw-master,galore,fira --rounds 5"
    yield _bench("model_step", out / "sizes-cpu.json", *sizes.split())
    ranks = "--ranks 16,32,64,128,256,full --optimizers adamw,galore,fira --rounds 7"
    yield _bench("model_step", out / "ranks-cpu.json", *ranks.split())
    yield _bench("activations", out / "activations-cpu.json", resumes=True)
    yield _bench("host", out / "host-cpu.json")
    gradients = out / "gradients.pt"
    points = ("--points", "1,50,200,400,800")
    yield Part("gradients", python("-m", "bench.gradients", *points, "--out", str(gradients)))
    yield _bench("refresh", out / "refresh-cpu.json", "--gradients", str(gradients))
    yield from comparisons(out)


def comparisons(out: Path) -> Iterator[Part]:
    """What the demo shows; where the subspace comes from, over seeds; layers in turn or at once."""
    yield _bench("pretrain", out / "pretrain-nano", resumes=True)
    where = ("--optimizers", "galore-svd,galore-together,galore,adarankgrad", "--lr", "2e-2")
    yield _bench("pretrain", out / "subspaces-nano", *where, "--seeds", "0,1,2", resumes=True)
    when = ("--optimizers", "adamw,galore-svd,galore-together,galore", "--eval-every", "800")
    yield _bench("pretrain", out / "stagger-nano", *when, resumes=True)


def _sanitizers() -> Iterator[Part]:
    native = ("-m", "pytest", "-q", "--timeout", "0", "-m", "gpu", "python_tests/native")
    for tool in SANITIZERS:
        words = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "1")
        command = (*words, "--target-processes", "all", *python(*native))
        yield Part(f"sanitize-{tool}", command, needs="compute-sanitizer")


def _on_gpu(out: Path) -> Iterator[Part]:
    for models in ("60m,130m,350m", "1b,7b"):
        name = f"kernels-{models.replace(',', '-')}-cuda.json"
        yield _bench("kernels", out / name, "--models", models, "--dtypes", "bf16")
    yield _bench("kernels", out / "kernels-fp32-cuda.json", "--dtypes", "fp32")
    yield _bench("step", out / "step-cuda.json")
    few = ("--optimizers", "adamw,galore,fira,hybrid-galore,hybrid-fira")
    for model in ("60m", "130m", "350m", "1b", "7b"):
        words = ("--models", model, "--dtypes", "bf16", *(few if model == "7b" else ()))
        yield _bench("model_step", out / f"model_step-{model}-cuda.json", *words)
    sizes = "--models 60m,130m,350m,1b --optimizers adamw,adamw-master,galore,fira --dtypes bf16"
    yield _bench("model_step", out / "sizes-cuda.json", *sizes.split())
    more = (*few[:-1], f"{few[-1]},adamw-master")
    ranks = "--models 350m,1b --ranks 16,32,64,128,256,512,full --dtypes bf16"
    yield _bench("model_step", out / "ranks-cuda.json", *ranks.split(), *more)
    yield _bench("refresh", out / "refresh-cuda.json", "--models", "60m,1b,7b")
    for models in ("60m,130m", "350m,1b", "7b"):
        words = ("--models", models, "--dtypes", "bf16", "--seconds", "450")
        record = ("--out", str(out / f"tune-{models.replace(',', '-')}.json"))
        yield Part(f"tune-{models}", python("-m", "bench.tune", *words, *record))


def _comparisons_on_gpu(out: Path) -> Iterator[Part]:
    text = "--dtype bf16 --tokenizer bpe --vocab-size 32000 --eval-tokens 65536"
    rivals = ("galore-torch", "fira-official", "apollo-torch", "torchao-8bit", "flashoptim")
    everyone = ["adamw", "adamw-master", "galore", "adarankgrad", "fira"]
    everyone += present(rivals, "cuda")[0]
    for model, steps, batch in (("60m", 450, 256), ("350m", 250, 64)):
        size = f"--model {model} --steps {steps} --batch-size {batch} --micro-batch {batch}"
        words = (*size.split(), *text.split(), "--optimizers", ",".join(everyone))
        yield _bench("pretrain", out / f"pretrain-{model}-cuda", *words, resumes=True)
    for model, steps, batch, rank in (("60m", 450, 256, 32), ("350m", 250, 64, 64)):
        size = f"--model {model} --steps {steps} --batch-size {batch} --micro-batch {batch}"
        ours = f"orthogonal@{rank},orthogonal@{rank}@b0.9"
        names = f"adamw-split,muon,muon-8bit,fira@{rank},{ours}"
        search = f"--optimizers {names} --tune-steps {steps // 3} --budget 5 --seeds 0,1,2"
        words = (*size.split(), *text.split(), *search.split())
        yield _bench("family", out / f"family-{model}-cuda", *words, resumes=True)


def run(part: Part, out: Path, seconds: float = SECONDS) -> dict:
    """Runs a part until it ends or its time is up; what it printed is in its log."""
    if part.needs and shutil.which(part.needs) is None:
        return {"status": f"not run: {part.needs} is not on PATH", "seconds": 0.0}
    command = list(part.command)
    if part.resumes and (Path(command[-1]) / "work").exists():
        command.append("--resume")
    log, started = out / "logs" / f"{part.name}.log", time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as output:
        try:
            environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
            done = subprocess.run(
                command, cwd=ROOT, env=environ, stdout=output, stderr=subprocess.STDOUT,
                timeout=seconds,
            )  # fmt: skip
            status = "ok" if done.returncode == 0 else f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            status = "stopped; the same command goes on" if part.resumes else "too long"
    return {"status": status, "seconds": round(time.monotonic() - started, 1)}


def campaign(todo: list[Part], out: Path, seconds: float = SECONDS) -> dict[str, dict]:
    """Runs what is not done yet; the file is written after every part."""
    file = out / "campaign.json"
    done: dict[str, dict] = json.loads(file.read_text()) if file.exists() else {}
    for part in todo:
        if done.get(part.name, {}).get("status") == "ok":
            continue
        now = datetime.datetime.now().strftime("%H:%M:%S")
        print(f"{now} {part.name}", file=sys.stderr, flush=True)
        for _ in range(TRIES if part.resumes else 1):
            ended = run(part, out, seconds)
            again = done.get(part.name, {}).get("seconds", 0.0) if part.resumes else 0.0
            ended["seconds"] += again
            done[part.name] = ended
            file.write_text(json.dumps(done, indent=1) + "\n")
            if not ended["status"].startswith("stopped"):
                break
    return done


def summary(todo: list[Part], done: dict[str, dict], out: Path) -> None:
    table = new_table("campaign", f"logs and records in {out}", ("part", "how it ended"), ("s",))
    for part in todo:
        ended = done.get(part.name)
        status, seconds = (ended["status"], f"{ended['seconds']:.0f}") if ended else ("to do", "")
        table.add_row(part.name, status, seconds)
    show(table, 110)


def main(arguments: list[str] | None = None) -> None:
    """Runs the parts and prints how they ended; the exit status is 1 if one did not end well."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    line = argparse.ArgumentParser(prog="python -m bench.campaign")
    line.add_argument("--out", type=Path, required=True, help="folder of records and logs")
    line.add_argument("--device", choices=("cpu", "cuda"), default=here)
    line.add_argument("--only", help="these parts, with commas between them")
    line.add_argument("--list", action="store_true", help="shows the parts and runs none")
    line.add_argument("--quick", action="store_true", help="a smoke test on the CPU")
    options = line.parse_args(arguments)
    out = options.out.resolve()
    todo = parts(out, options.device, options.quick)
    if options.only:
        names = options.only.split(",")
        unknown = set(names) - {part.name for part in todo}
        if unknown:
            line.error(f"no such part: {', '.join(sorted(unknown))}")
        todo = [part for part in todo if part.name in names]
    file = out / "campaign.json"
    if options.list:
        summary(todo, json.loads(file.read_text()) if file.exists() else {}, out)
        return
    done = campaign(todo, out)
    summary(todo, done, out)
    bad = [part.name for part in todo if done[part.name]["status"] != "ok" and not part.needs]
    if bad:
        sys.exit(f"campaign: {', '.join(bad)} did not end well; the logs are in {out / 'logs'}")


if __name__ == "__main__":
    main()
