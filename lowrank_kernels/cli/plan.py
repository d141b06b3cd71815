"""How much memory training takes with each optimizer, found without taking it."""

import argparse
import textwrap
from collections import Counter, defaultdict
from typing import Any

import torch
from torch import Tensor

from ..ops import requested_backend
from ..optim.param_groups import collapsed
from ..optim.workspace import Workspace, planned_workspace
from ..text import GB, amount, table
from .models import OPTIMIZERS, Model, add_model_arguments, backend_of, build_optimizer, model_of
from .text import UserError

SUMMARY = "say what weights, gradients, optimizer state and a step's workspace take"

ALL_OPTIMIZERS = ("adamw", *OPTIMIZERS)

# Decimal GB, as data sheets have them.
CARDS = {
    "rtx-3060": 12,
    "rtx-4080": 16,
    "rtx-4090": 24,
    "rtx-5090": 32,
    "a100-40": 40,
    "l40s": 48,
    "a6000": 48,
    "a100-80": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the optimizers and the memory that they should fit into."""
    add_model_arguments(parser)
    parser.set_defaults(device=None)
    names = ",".join(ALL_OPTIMIZERS)
    parser.add_argument("--optimizers", default=names, metavar="NAMES", help=f"default: {names}")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--memory", type=float, metavar="GB", help="to fit into; 10^9 bytes a GB")
    memory.add_argument(
        "--card",
        choices=CARDS,
        metavar="CARD",
        help=f"whose memory to fit into, implies --device cuda: {', '.join(CARDS)}",
    )


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of a model: weights, gradients, and of each optimizer state, workspace and total.

    The total counts the larger of the two workspaces, of a step and of a refresh, since they are
    never there together.
    """
    args.device = args.device or ("cpu" if args.card is None else "cuda")
    names = args.optimizers.split(",")
    for name in names:
        if name not in ALL_OPTIMIZERS:
            raise UserError(f"--optimizers: {name!r} is not one of {', '.join(ALL_OPTIMIZERS)}")
    memory, usual = _memory(args), backend_of(args).backend
    model = model_of(args)
    params = list(model.module.parameters())
    weights = sum(map(_bytes, params))
    gradients = [_bytes(param) for param in params if param.requires_grad]
    optimizers, backends = {}, set()
    for name in names:
        state, workspace, remark, used = _needs(name, model, args)
        backends |= used
        total = weights + sum(gradients) + state + max(workspace)
        optimizers[name] = {
            "state_bytes": state,
            "step_workspace_bytes": workspace.step,
            "refresh_workspace_bytes": workspace.refresh,
            "remark": remark,
            "total_bytes": total,
            "left_bytes": None if memory is None else memory - total,
        }
    return {
        "model": model.name,
        "architecture": model.architecture,
        "parameters": sum(param.numel() for param in params),
        "rank": model.rank,
        "dtype": args.dtype,
        "state": args.state,
        "device": args.device,
        "backend": " and ".join(sorted(backends)) or usual,
        "predicted": _is_predicted(args),
        "memory_bytes": memory,
        "weight_bytes": weights,
        "gradient_bytes": sum(gradients),
        "largest_gradient_bytes": max(gradients, default=0),
        "optimizers": optimizers,
    }


def as_text(facts: dict[str, Any]) -> str:
    """A row an optimizer, in decimal units, and remarks below."""
    header = ["optimizer", "state", "step", "refresh", "total"]
    columns = ("state_bytes", "step_workspace_bytes", "refresh_workspace_bytes", "total_bytes")
    if facts["memory_bytes"] is not None:
        header.append(f"in {amount(facts['memory_bytes'])}")
    rows, about = [], defaultdict(list)
    for name, needs in facts["optimizers"].items():
        row = [name, *(amount(needs[key]) for key in columns)]
        left = needs["left_bytes"]
        if left is not None:
            fits = f"leaves {amount(left)} for activations"
            row.append(fits if left >= 0 else f"too large by {amount(-left)}")
        rows.append(row)
        if needs["remark"]:
            about[needs["remark"]].append(name)
    notes = [
        "step and refresh: the most that is held for a while; the total counts the larger.",
        "adamw is torch's, fused; adarankgrad's state is the most it can hold.",
        "Stepping in the backward pass, one optimizer a parameter, holds little more than the"
        f" largest gradient, {amount(facts['largest_gradient_bytes'])}, where each weight is used"
        " once.",
        *(f"{', '.join(names)}: {remark}." for remark, names in about.items()),
    ]
    if facts["predicted"]:
        notes.append(
            "The backend is predicted: there is no CUDA device here; a GPU checks kernels before"
            " it takes them."
        )
    lines = [
        f"{facts['model']}: {facts['architecture']}, {facts['parameters']:,} parameters,"
        f" rank {facts['rank']}, {facts['dtype']}, state in {facts['state']},"
        f" {facts['backend']} backend on {facts['device']}",
        f"weights {amount(facts['weight_bytes'])},"
        f" gradients {amount(facts['gradient_bytes'])}; 1 GB is 10^9 bytes",
        "",
        table(header, rows),
        "",
        *(textwrap.fill(note, 100, break_on_hyphens=False) for note in notes),
    ]
    return "\n".join(lines)


def _is_predicted(args: argparse.Namespace) -> bool:
    """Whether nobody has named the backend, nor is there a GPU that would choose it."""
    chosen = requested_backend(args.backend) == "auto"
    return chosen and args.device == "cuda" and not torch.cuda.is_available()


def _memory(args: argparse.Namespace) -> int | None:
    if args.card is not None:
        return CARDS[args.card] * GB
    if args.memory is None:
        return None
    if not 0 < args.memory < float("inf"):
        raise UserError(f"--memory must be a number of GB above 0, got {args.memory}")
    return round(args.memory * GB)


def _needs(
    name: str, model: Model, args: argparse.Namespace
) -> tuple[int, Workspace, str | None, set[str]]:
    """Bytes of the state and of the workspaces, what is to be said of them, and the backends."""
    if name == "adamw":
        return sum(map(_adamw_bytes, model.module.parameters())), Workspace(0, 0), None, set()
    optimizer = build_optimizer(name, model, args)
    rows = optimizer.plan()
    # A data sheet's GB are at most so many bytes to torch.
    size = CARDS.get(args.card, args.memory)
    memory = None if size is None else round(size * 2**30)
    workspace = planned_workspace(optimizer, args.device, memory)
    state = sum(row["state_bytes"] for row in rows)
    remark = _more_than_adamw(rows, model, args.state)
    used = {backend_of(args, row).backend for row in rows if row["projected"]}
    return state, workspace, remark, used


def _more_than_adamw(rows: list[dict[str, Any]], model: Model, form: str) -> str | None:
    """Why an optimizer's state is larger than AdamW's, or None."""
    params = dict(model.module.named_parameters())
    # Of what is projected, and of what is not.
    ours: Counter[bool] = Counter()
    adamw: Counter[bool] = Counter()
    plain: Counter[str] = Counter()
    for row in rows:
        projected = row["projected"]
        ours[projected] += row["state_bytes"]
        adamw[projected] += _adamw_bytes(params[row["name"]])
        if not projected:
            plain[collapsed(row["name"])] += row["state_bytes"]
    if ours.total() <= adamw.total():
        return None
    reasons = []
    if ours[False] > adamw[False]:
        reasons.append(
            f"what is not projected holds {form} moments, {amount(ours[False])} where adamw's take"
            f" {amount(adamw[False])}, the largest part {plain.most_common(1)[0][0]}"
        )
    if ours[True] > adamw[True]:
        reasons.append(
            f"rank {model.rank} takes {amount(ours[True])} for what is projected, adamw"
            f" {amount(adamw[True])}"
        )
    return f"more state than adamw's: {'; '.join(reasons)}"


def _bytes(param: Tensor) -> int:
    return param.numel() * param.element_size()


def _adamw_bytes(param: Tensor) -> int:
    """Of torch.optim.AdamW: two moments in the weight's dtype and a float32 step."""
    return 2 * _bytes(param) + 4 if param.requires_grad else 0
