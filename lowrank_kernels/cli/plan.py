"""How much memory training takes with each optimizer, told without taking it."""

import argparse
from typing import Any

from ..optim.workspace import Workspace, planned_workspace
from .errors import UserError
from .models import OPTIMIZERS, Model, add_model_arguments, backend_of, build_optimizer, model_of
from .text import GB, amount, print_json, table

SUMMARY = "say what weights, gradients, optimizer state and a step's workspace take"

ALL_OPTIMIZERS = ("adamw", *OPTIMIZERS)

# Decimal GB, as data sheets have them.
CARDS = {
    "rtx-4090": 24,
    "a100-40": 40,
    "a100-80": 80,
    "h100": 80,
    "h200": 141,
    "b200": 180,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the optimizers and the memory that they should fit into."""
    add_model_arguments(parser)
    names = ",".join(ALL_OPTIMIZERS)
    parser.add_argument("--optimizers", default=names, metavar="NAMES", help=f"default: {names}")
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--memory", type=float, metavar="GB", help="to fit into; 10^9 bytes a GB")
    memory.add_argument("--card", choices=CARDS, help="whose memory to fit into, in the same GB")


def run(args: argparse.Namespace) -> int:
    """Prints the facts of `planned`."""
    facts = planned(args)
    if args.json:
        print_json(facts)
    else:
        print(as_text(facts))
    return 0


def planned(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of a model: weights, gradients, and of each optimizer state, workspace and total.

    The total counts the larger of the two workspaces, of a step and of a refresh, since they are
    never there together.
    """
    names, memory, backend = _optimizers(args.optimizers), _memory(args), backend_of(args).backend
    model = model_of(args)
    params = list(model.module.parameters())
    weights = sum(param.numel() * param.element_size() for param in params)
    gradients = sum(p.numel() * p.element_size() for p in params if p.requires_grad)
    optimizers = {}
    for name in names:
        state, workspace = _needs(name, model, args)
        total = weights + gradients + state + max(workspace)
        optimizers[name] = {
            "state_bytes": state,
            "step_workspace_bytes": workspace.step,
            "refresh_workspace_bytes": workspace.refresh,
            "total_bytes": total,
            "left_bytes": None if memory is None else memory - total,
        }
    return {
        "model": model.name,
        "parameters": sum(param.numel() for param in params),
        "rank": model.rank,
        "dtype": args.dtype,
        "device": args.device,
        "backend": backend,
        "memory_bytes": memory,
        "weight_bytes": weights,
        "gradient_bytes": gradients,
        "optimizers": optimizers,
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts for people, in decimal units."""
    header = ["optimizer", "state", "step", "refresh", "total"]
    columns = ("state_bytes", "step_workspace_bytes", "refresh_workspace_bytes", "total_bytes")
    rows = [
        [name, *(amount(needs[key]) for key in columns)]
        for name, needs in facts["optimizers"].items()
    ]
    if facts["memory_bytes"] is not None:
        header.append(f"in {amount(facts['memory_bytes'])}")
        for row, needs in zip(rows, facts["optimizers"].values(), strict=True):
            row.append(_verdict(needs["left_bytes"]))
    return "\n".join(
        [
            f"{facts['model']}: {facts['parameters']:,} parameters, rank {facts['rank']},"
            f" {facts['dtype']}, {facts['backend']} backend on {facts['device']}",
            f"weights {amount(facts['weight_bytes'])},"
            f" gradients {amount(facts['gradient_bytes'])}; 1 GB is 10^9 bytes",
            "",
            table(header, rows),
            "",
            "step and refresh: the most that is held for a while; the total counts the larger.",
            "adamw is torch's, fused; adarankgrad's state is the most it can hold.",
        ]
    )


def _verdict(left: int) -> str:
    if left < 0:
        return f"too large by {amount(-left)}"
    return f"leaves {amount(left)} for activations"


def _optimizers(argument: str) -> list[str]:
    names = argument.split(",")
    for name in names:
        if name not in ALL_OPTIMIZERS:
            raise UserError(f"--optimizers: {name!r} is not one of {', '.join(ALL_OPTIMIZERS)}")
    return names


def _memory(args: argparse.Namespace) -> int | None:
    if args.card is not None:
        return CARDS[args.card] * GB
    if args.memory is None:
        return None
    if not 0 < args.memory < float("inf"):
        raise UserError(f"--memory must be a number of GB above 0, got {args.memory}")
    return round(args.memory * GB)


def _needs(name: str, model: Model, args: argparse.Namespace) -> tuple[int, Workspace]:
    """Bytes of the state, and the workspaces."""
    if name == "adamw":
        return adamw_state_bytes(model), Workspace(0, 0)
    optimizer = build_optimizer(name, model, args.backend)
    state = sum(row["state_bytes"] for row in optimizer.plan())
    return state, planned_workspace(optimizer, args.device)


def adamw_state_bytes(model: Model) -> int:
    """Of torch.optim.AdamW: two moments in the weights' dtype and a float32 step."""
    trained = [param for param in model.module.parameters() if param.requires_grad]
    return sum(2 * param.numel() * param.element_size() + 4 for param in trained)
