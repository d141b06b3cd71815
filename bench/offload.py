"""A disk between forward and backward: the memory that a process really takes, and its time.

    python -m bench.offload --out bench/results/offload-cpu.json        # two minutes
    python -m bench.offload --layers 4 --tokens 512 --folder /scratch   # smaller, elsewhere

Two processes of their own take the same steps of a LLaMA's blocks in float32, one of them with
`offload_activations`, in turns. Resident memory above what a process had before its steps, at the
highest, and the median time of a step stand side by side; and what the disk has done. Losses and
gradients have to be equal in every bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from bench.models import PRESETS, Preset, build_model
from bench.options import about
from bench.peak import CLEAR, resident
from bench.record import head, write_lines
from lowrank_kernels import offload_activations, recompute_activations, saved_bytes

VOCABULARY, SEED, STEPS = 512, 0, 4
ARMS = ("plain", "offload")


def preset(options: argparse.Namespace) -> Preset:
    hidden, layers = options.hidden, options.layers
    like = PRESETS["60m"].__dict__ | {"hidden": hidden, "ffn": 11 * hidden // 4, "layers": layers}
    return Preset(**(like | {"heads": hidden // 64}))


def measured(options: argparse.Namespace) -> dict:
    """Of this process, which is to be a new one."""
    torch.manual_seed(SEED)
    model = build_model(preset(options), VOCABULARY, options.tokens)
    recompute_activations(model)
    ids = torch.randint(VOCABULARY, (1, options.tokens))
    context = nullcontext()
    if options.arm == "offload":
        context = offload_activations(
            options.folder,
            least=1 << 18,
            **dict.fromkeys(("in_flight", "ahead"), options.budget << 20),
        )
    found = {}
    if options.arm == "plain":
        found["saved_bytes"] = saved_bytes(model, input_ids=ids, labels=ids).total
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    before, times = resident("VmRSS"), []
    CLEAR.write_text("5")  # VmHWM begins anew
    for _ in range(STEPS):
        start = time.perf_counter()
        with context:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        times.append(time.perf_counter() - start)
    found["peak_bytes"] = resident("VmHWM") - before
    digest = hashlib.sha256(loss.detach().numpy().tobytes())
    for param in model.parameters():
        digest.update(param.grad.numpy().tobytes())
    found |= {"seconds": statistics.median(times), "digest": digest.hexdigest()[:16]}
    if options.arm == "offload":
        assert context.places_in_use == 0
        found["disk"] = {**vars(context.counts), "steps": STEPS}
    return found


def in_a_process(arguments: list[str], arm: str) -> dict:
    command = [sys.executable, "-m", "bench.offload", *arguments, "--arm", arm]
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> None:
    own = about("offload", __doc__)
    own.add_argument("--hidden", type=int, default=512, help="default: %(default)s")
    own.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    own.add_argument("--tokens", type=int, default=2048, help="default: %(default)s")
    own.add_argument("--budget", type=int, default=32, help="MiB each way; default: %(default)s")
    own.add_argument("--rounds", type=int, default=3, help="processes each; default: %(default)s")
    own.add_argument("--folder", default=tempfile.gettempdir(), help="default: %(default)s")
    own.add_argument("--out", type=Path, help="the JSON record; none by default")
    own.add_argument("--arm", choices=ARMS, help="measure this one in this process")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = own.parse_args(arguments)
    if options.arm:
        print(json.dumps(measured(options)))
        return
    runs: dict[str, list[dict]] = {arm: [] for arm in ARMS}
    for turn in range(options.rounds):
        for arm in ARMS:
            runs[arm].append(in_a_process(arguments, arm))
            peak, seconds = (runs[arm][-1][key] for key in ("peak_bytes", "seconds"))
            print(f"{turn + 1}/{options.rounds} {arm}: {peak / 1e6:.1f} MB, {seconds:.2f} s a step")
    if len({run["digest"] for every in runs.values() for run in every}) > 1:
        raise SystemExit("gradients differ")
    size = {name: getattr(options, name) for name in ("hidden", "layers", "tokens", "budget")}
    saved = runs["plain"][0]["saved_bytes"]
    rows = [
        {
            "arm": arm,
            **size,
            "saved_bytes": saved,
            **{
                key: statistics.median(run[key] for run in every)
                for key in ("peak_bytes", "seconds")
            },
            "disk": every[-1].get("disk"),
        }
        for arm, every in runs.items()
    ]
    memory, seconds = (rows[1][key] / rows[0][key] for key in ("peak_bytes", "seconds"))
    print(f"memory {100 * memory:.0f} %, time {100 * seconds:.0f} % of plain")
    if options.out:
        write_lines(options.out, head("offload", "cpu", arguments), "rows", rows)


if __name__ == "__main__":
    main()
