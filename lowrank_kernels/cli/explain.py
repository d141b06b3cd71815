"""How each parameter of a model would be trained, and by whom."""

import argparse
from typing import Any

from ..optim.param_groups import collapsed, decide
from .models import OPTIMIZERS, add_model_arguments, backend_of, build_optimizer, model_of
from .text import amount, print_json, table

SUMMARY = "say which parameters are projected, on which side, and who computes their step"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model and the optimizer."""
    add_model_arguments(parser)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="fira")


def run(args: argparse.Namespace) -> int:
    """Prints the rows of `explained`, in text one a kind of parameter."""
    rows = explained(args)
    if args.json:
        print_json({"optimizer": args.optimizer, "device": args.device, "parameters": rows})
    else:
        print(as_text(rows))
    return 0


def explained(args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of `LowRankAdamW.plan` with backend and reason, of the device that is asked for."""
    choice = backend_of(args)
    model = model_of(args)
    optimizer = build_optimizer(args.optimizer, model, args.backend)
    reasons = {each.name: each.reason for each in decide(model.module, model.rank)}
    rows = []
    for row in optimizer.plan():
        backend, reason = choice if row["projected"] else ("torch", reasons[row["name"]])
        dtype = str(row["dtype"]).removeprefix("torch.")
        rows.append({**row, "dtype": dtype, "backend": backend, "reason": reason})
    return rows


def as_text(rows: list[dict[str, Any]]) -> str:
    """A row a kind of parameter: blocks read as one."""
    kinds: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for row in rows:
        name = collapsed(row["name"])
        kinds.setdefault((name, row["shape"], row["side"], row["rank"]), []).append(row)
    header = ("parameter", "shape", "side", "rank", "state", "backend", "reason")
    return table(header, [_kind(name, alike) for (name, *_), alike in kinds.items()])


def _kind(name: object, alike: list[dict[str, Any]]) -> tuple[object, ...]:
    first = alike[0]
    return (
        f"{name} x {len(alike)}" if len(alike) > 1 else name,
        " x ".join(map(str, first["shape"])),
        first["side"] or "-",
        first["rank"] or "-",
        amount(sum(row["state_bytes"] for row in alike)),
        first["backend"],
        first["reason"],
    )
