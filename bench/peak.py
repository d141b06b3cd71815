"""The plan of a training run beside the memory that a process really takes.

    python -m bench.peak --out bench/results/peak-cpu.json      # a minute on two cores
    python -m bench.peak --hidden 256 --layers 2 --tokens 512   # smaller

A process of its own trains a LLaMA in float32 by GaLore, int8, with projected and released
gradients, after a small one has made torch load what it loads. Its resident memory above what it
had before the model, at the highest, as the kernel keeps it (VmHWM of /proc/self/status), stands
beside the plan. The C library gives memory back as soon as it is freed
(MALLOC_MMAP_THRESHOLD_=65536), so that nothing but what is held is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.models import PRESETS, Preset, build_model
from bench.options import about
from bench.record import head, write_lines
from lowrank_kernels import (
    GaLoreAdamW,
    param_groups,
    project_linears,
    recompute_activations,
    release_gradients,
)
from lowrank_kernels.activations.plan import Training, plan_training

VOCABULARY, SEED, STEPS = 4_096, 0, 3
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ARMS = {
    "plain": {},
    "project, release": {"project": True, "release": True},
    "recompute, project, release": {"recompute": True, "project": True, "release": True},
}


def preset(options: argparse.Namespace) -> Preset:
    hidden, layers = options.hidden, options.layers
    like = PRESETS["60m"].__dict__ | {"hidden": hidden, "ffn": 11 * hidden // 4, "layers": layers}
    return Preset(**(like | {"heads": hidden // 64, "rank": hidden // 4}))


def optimizer_of(model: torch.nn.Module, rank: int) -> GaLoreAdamW:
    return GaLoreAdamW(param_groups(model, rank), lr=1e-3, state="int8")


def train(shape: Preset, tokens: int, how: dict[str, bool]) -> None:
    torch.manual_seed(SEED)
    model = build_model(shape, VOCABULARY, tokens)
    optimizer = optimizer_of(model, shape.rank)
    if how.get("recompute"):
        recompute_activations(model)
    if how.get("project"):
        project_linears(model, optimizer)
    if how.get("release"):
        release_gradients(model, optimizer)
    ids = torch.randint(VOCABULARY, (1, tokens))
    for _ in range(STEPS):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def resident(name: str) -> int:
    """Bytes by a name of the kernel's: VmRSS now, VmHWM at the highest."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def measured(options: argparse.Namespace) -> int:
    """Of this process, which is to be a new one."""
    shape, how = preset(options), ARMS[options.arm]
    small = Preset(**(shape.__dict__ | {"hidden": 128, "ffn": 352, "heads": 2, "layers": 1}))
    train(Preset(**(small.__dict__ | {"rank": 32})), 64, how)
    before = resident("VmRSS")
    CLEAR.write_text("5")  # VmHWM begins anew
    train(shape, options.tokens, how)
    return resident("VmHWM") - before


def planned(options: argparse.Namespace) -> dict:
    shape = preset(options)
    with torch.device("meta"):
        model = build_model(shape, VOCABULARY, options.tokens)
    training = Training("cpu", **ARMS[options.arm])
    plan = plan_training(model, optimizer_of(model, shape.rank), options.tokens, training)
    assert plan.activations is not None
    return {
        "weight_bytes": plan.weights,
        "state_bytes": plan.state,
        "gradient_bytes": plan.gradients,
        "activation_bytes": plan.activations.saved,
        "planned_bytes": plan.total,
        "peak_in": plan.at,
    }


def in_a_process(options: argparse.Namespace, arm: str) -> int:
    command = [sys.executable, "-m", "bench.peak", "--arm", arm]
    for name in ("hidden", "layers", "tokens"):
        command += [f"--{name}", str(getattr(options, name))]
    quiet = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    done = subprocess.run(command, env=os.environ | quiet, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return int(json.loads(done.stdout.splitlines()[-1]))


def main(arguments: list[str] | None = None) -> None:
    own = about("peak", __doc__)
    own.add_argument("--hidden", type=int, default=512, help="default: %(default)s")
    own.add_argument("--layers", type=int, default=6, help="default: %(default)s")
    own.add_argument("--tokens", type=int, default=1024, help="default: %(default)s")
    own.add_argument("--out", type=Path, help="the JSON record; none by default")
    own.add_argument("--arm", choices=ARMS, help="measure this one in this process")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = own.parse_args(arguments)
    if options.arm:
        print(measured(options))
        return
    rows = []
    for arm in ARMS:
        options.arm = arm
        plan, found = planned(options), in_a_process(options, arm)
        size = {name: getattr(options, name) for name in ("hidden", "layers", "tokens")}
        ratio = found / plan["planned_bytes"]
        rows.append({"arm": arm, **size, **plan, "measured_bytes": found, "ratio": ratio})
        print(
            f"{arm}: planned {plan['planned_bytes'] / 1e6:.1f} MB, of them activations"
            f" {plan['activation_bytes'] / 1e6:.1f} MB; resident {found / 1e6:.1f} MB,"
            f" {100 * (ratio - 1):+.1f} %"
        )
    if options.out:
        write_lines(options.out, head("peak", "cpu", arguments), "rows", rows)


if __name__ == "__main__":
    main()
