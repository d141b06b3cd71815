"""How each parameter of a model would be trained, and by whom."""

import argparse
import math
from typing import Any

from ..optim import LowRankAdamW
from ..optim.param_groups import collapsed, decide
from .models import OPTIMIZERS, add_model_arguments, backend_of, build_optimizer, model_of
from .text import amount, print_json, table

SUMMARY = "say which parameters are projected, at which learning rate, and who computes their step"

Row = dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the optimizer."""
    add_model_arguments(parser)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="fira")


def run(args: argparse.Namespace) -> int:
    """Prints the facts of `explained`."""
    facts = explained(args)
    if args.json:
        print_json(facts)
    else:
        print(as_text(facts))
    return 0


def explained(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of `LowRankAdamW.plan` in the order of the model, each with the factor on its
    learning rate, and the backend and the reason of the device that is asked for; and totals.
    """
    choice = backend_of(args)
    model = model_of(args)
    optimizer = build_optimizer(args.optimizer, model, args.backend)
    planned = {row["name"]: row for row in optimizer.plan()}
    factors = _lr_factors(optimizer)
    rows = []
    for decision in decide(model.module, model.rank):
        backend, reason = choice if decision.projected else ("torch", decision.reason)
        row = planned[decision.name]
        dtype, lr = str(row["dtype"]).removeprefix("torch."), factors[decision.name]
        rows.append({**row, "dtype": dtype, "lr": lr, "backend": backend, "reason": reason})
    return {
        "model": model.name,
        "architecture": model.architecture,
        "optimizer": args.optimizer,
        "device": args.device,
        "elements": sum(map(_elements, rows)),
        "projected_elements": sum(_elements(row) for row in rows if row["projected"]),
        "state_bytes": sum(row["state_bytes"] for row in rows),
        "parameters": rows,
    }


def as_text(facts: dict[str, Any]) -> str:
    """A row a kind of parameter: blocks read as one."""
    kinds: dict[tuple[object, ...], list[Row]] = {}
    for row in facts["parameters"]:
        name = collapsed(row["name"])
        kinds.setdefault((name, row["shape"], row["side"], row["rank"], row["lr"]), []).append(row)
    header = ("parameter", "shape", "side", "rank", "lr", "state", "backend", "reason")
    share = facts["projected_elements"] / facts["elements"]
    return "\n".join(
        [
            f"{facts['model']}: {facts['architecture']}, {facts['elements']:,} parameters,"
            f" {share:.1%} of them projected; {facts['optimizer']}'s state"
            f" {amount(facts['state_bytes'])}",
            "",
            table(header, [_kind(name, alike) for (name, *_), alike in kinds.items()]),
            "",
            "lr: a parameter moves at this many times the optimizer's learning rate.",
        ]
    )


def _lr_factors(optimizer: LowRankAdamW) -> dict[str, float]:
    """By name, what a group puts on its learning rate."""
    return {
        name: group.get("scale", 1.0)
        for group in optimizer.param_groups
        for name in group["param_names"]
    }


def _elements(row: Row) -> int:
    return math.prod(row["shape"])


def _kind(name: object, alike: list[Row]) -> tuple[object, ...]:
    first = alike[0]
    return (
        f"{name} x {len(alike)}" if len(alike) > 1 else name,
        " x ".join(map(str, first["shape"])),
        first["side"] or "-",
        first["rank"] or "-",
        f"{first['lr']:g}",
        amount(sum(row["state_bytes"] for row in alike)),
        first["backend"],
        first["reason"],
    )
