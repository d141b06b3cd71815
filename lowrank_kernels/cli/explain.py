"""How each parameter of a model would be trained, and by whom."""

import argparse
import math
from typing import Any

from ..linears import collapsed
from ..ops.adamw import stepped_by
from ..ops.codes import FORMATS
from ..ops.dispatch import Kind
from ..optim.param_groups import decide
from ..text import amount, table
from .models import (
    OPTIMIZERS,
    add_model_arguments,
    backend_of,
    build_optimizer,
    model_of,
    rank_of,
)

SUMMARY = "say which parameters are projected, at which learning rate, and who computes their step"

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the optimizer."""
    add_model_arguments(parser)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="fira")


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of `LowRankAdamW.plan` in the order of the model, each with the factor on its
    learning rate, and the backend and the reason of the device that is asked for; and totals.
    """
    backend_of(args)  # a mistake there is told before a model is built
    model = model_of(args)
    optimizer = build_optimizer(args.optimizer, model, args)
    planned = {row["name"]: row for row in optimizer.plan()}
    factors = {
        name: group.get("scale", 1.0)
        for group in optimizer.param_groups
        for name in group["param_names"]
    }
    rows = []
    for decision in decide(model.module, rank_of(args.optimizer, model, args)):
        row, lr = planned[decision.name], factors[decision.name]
        backend, reason = "torch", decision.reason
        if decision.projected:
            backend, reason = backend_of(args, row)
        elif row["state"] != "float32":
            moments = FORMATS[row["state"]]
            backend = stepped_by(Kind(args.device, row["dtype"], row["dtype"], moments=moments))
        dtype = str(row["dtype"]).removeprefix("torch.")
        rows.append({**row, "dtype": dtype, "lr": lr, "backend": backend, "reason": reason})
    return {
        "model": model.name,
        "architecture": model.architecture,
        "optimizer": args.optimizer,
        "state": args.state,
        "device": args.device,
        "elements": sum(math.prod(row["shape"]) for row in rows),
        "projected_elements": sum(math.prod(row["shape"]) for row in rows if row["projected"]),
        "state_bytes": sum(row["state_bytes"] for row in rows),
        "parameters": rows,
    }


def as_text(facts: dict[str, Any]) -> str:
    """A row a kind of parameter: blocks read as one."""
    kinds: dict[tuple[object, ...], list[Row]] = {}
    for row in facts["parameters"]:
        kind = collapsed(row["name"]), row["shape"], row["side"], row["rank"], f"{row['lr']:g}"
        kinds.setdefault(kind, []).append(row)
    rows = []
    for (name, *kind_of), alike in kinds.items():
        count = f" x {len(alike)}" if len(alike) > 1 else ""
        state = amount(sum(row["state_bytes"] for row in alike))
        who = alike[0]["backend"], alike[0]["reason"]
        rows.append((f"{name}{count}", *kind_of, state, *who))
    header = ("parameter", "shape", "side", "rank", "lr", "state", "backend", "reason")
    return (
        f"{facts['model']}: {facts['architecture']}, {facts['elements']:,} parameters,"
        f" {facts['projected_elements'] / facts['elements']:.1%} of them projected;"
        f" {facts['optimizer']}'s state {amount(facts['state_bytes'])}\n\n{table(header, rows)}\n\n"
        "lr: a parameter moves at this many times the optimizer's learning rate."
    )
