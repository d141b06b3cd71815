"""A plan for many GPUs: what each holds, what each sends, by the formulas of `traffic`."""

import argparse
import textwrap
from collections.abc import Iterator
from typing import Any

from ..text import amount, table
from .models import Model, build_optimizer, model_of, rank_of
from .text import UserError, user_errors
from .traffic import (
    SHARD_SIZE,
    SHARDS,
    Held,
    Layout,
    Needs,
    adamw_needs,
    held_of,
    needs_of,
)

# Options of a plan for one GPU that one for many does not take.
ALONE = ("recompute", "project", "release", "checkpointing", "accumulate", "offload")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many GPUs, and what is split over them."""
    add = parser.add_argument_group("many GPUs", "by formulas, without activations").add_argument
    add("--gpus", type=int, metavar="N", help="plan for each of so many GPUs")
    add("--shard", choices=SHARDS, help="what splits the model; default: fsdp2")
    size = f"GPUs that share a copy of the weights under hsdp; default: {SHARD_SIZE}"
    add("--shard-size", type=int, metavar="N", help=size)


def check(args: argparse.Namespace, usual_tokens: int) -> None:
    """Raises UserError for what does nothing without --gpus, or is of one GPU alone."""
    if args.gpus is None:
        for name in ("shard", "shard_size"):
            if getattr(args, name) is not None:
                raise UserError(f"{_flag(name)} needs --gpus: over how many?")
        return
    if args.shard_size is not None and args.shard != "hsdp":
        raise UserError("--shard-size is of --shard hsdp: the others have no replicas of shards")
    given = [name for name in ALONE if getattr(args, name)]
    if args.tokens not in (0, usual_tokens):
        given.append("tokens")
    if given:
        raise UserError(
            f"{_flag(given[0])} is planned for one GPU, without --gpus: on many, activations and"
            " what makes them less are not counted"
        )


def facts(args: argparse.Namespace, names: list[str], memory: int | None) -> dict[str, Any]:
    """Bytes of each GPU and on the wire, of the model and of each optimizer.

    Args:
        args: of the command line, checked.
        names: of the optimizers.
        memory: of a GPU, if it is to fit.
    """
    size = SHARD_SIZE if args.shard_size is None else args.shard_size
    with user_errors():
        layout = Layout.of(args.shard or "fsdp2", args.gpus, size)
    model = model_of(args)
    held, adamw = held_of(model.module, layout), adamw_needs(model.module, layout)
    optimizers = {
        name: _facts(name, model, args, held, adamw, layout, memory)
        for name in dict.fromkeys(names)
    }
    return {
        "model": model.name,
        "architecture": model.architecture,
        "parameters": sum(param.numel() for param in model.module.parameters()),
        "rank": model.rank,
        "dtype": args.dtype,
        "state": args.state,
        "basis": args.basis,
        "gpus": layout.gpus,
        "shard": layout.shard,
        "shard_size": layout.shards,
        "replicas": layout.replicas,
        "memory_bytes": memory,
        **{f"{key}_bytes": value for key, value in held._asdict().items()},
        "sent_bytes": held.sent,
        "optimizers": optimizers,
    }


def _facts(
    name: str,
    model: Model,
    args: argparse.Namespace,
    held: Held,
    adamw: Needs,
    layout: Layout,
    memory: int | None,
) -> dict[str, Any]:
    needs, rank = adamw, None
    if name != "adamw":
        optimizer = build_optimizer(name, model, args)
        needs = needs_of(optimizer, layout)
        rank = rank_of(name, model, args)
    total = held.weights + held.gradients + held.buffers + needs.state
    return {
        "rank": rank,
        "state_bytes": needs.state,
        "basis_bytes": needs.bases,
        "total_bytes": total,
        "left_bytes": None if memory is None else memory - total,
        "sent_bytes": needs.sent,
        "collectives": needs.collectives,
        "refresh_sent_bytes": needs.bases_sent,
        "refresh_sent_bytes_a_step": needs.bases_sent_a_step,
        "gathered_gradient_bytes": needs.largest,
        "more_than_adamw": needs.state > adamw.state,
    }


def as_text(facts: dict[str, Any]) -> str:
    """A row an optimizer, in decimal units, and remarks below."""
    header = ["optimizer", "state", "bases in it", "held", "sent a step", "in", "for bases"]
    if facts["memory_bytes"] is not None:
        header.append(f"in {amount(facts['memory_bytes'])}")
    rows = []
    for name, needs in facts["optimizers"].items():
        row = [
            *(name, *(amount(needs[f"{key}_bytes"]) for key in ("state", "basis", "total"))),
            *(amount(needs["sent_bytes"]), f"{needs['collectives']} calls"),
            amount(needs["refresh_sent_bytes_a_step"]),
        ]
        if (left := needs["left_bytes"]) is not None:
            fits = left >= 0
            row.append(f"{amount(left)} left" if fits else f"too large by {amount(-left)}")
        rows.append(row)
    replicas = f", {facts['replicas']} replicas of {facts['shard_size']}" * (
        facts["shard"] == "hsdp"
    )
    lines = [
        f"{facts['model']}: {facts['architecture']}, {facts['parameters']:,} parameters,"
        f" rank {facts['rank']}, {facts['dtype']}, state in {facts['state']},"
        f" bases in {facts['basis']}",
        f"each of {facts['gpus']:,} GPUs, {facts['shard']}{replicas}:"
        f" weights {amount(facts['weights_bytes'])},"
        f" gradients {amount(facts['gradients_bytes'])}; 1 GB is 10^9 bytes",
        f"it sends {amount(facts['sent_bytes'])} a step for the model: weights"
        f" {amount(facts['gathers_bytes'])}, gradients {amount(facts['reduces_bytes'])};"
        " the optimizer's own is below",
        "",
        table(header, rows),
        "",
        *(textwrap.fill(note, 100, break_on_hyphens=False) for note in _notes(facts)),
    ]
    return "\n".join(lines)


def _notes(facts: dict[str, Any]) -> Iterator[str]:
    yield (
        "Computed from shapes, not measured. held: weights, gradients, buffers and state of the"
        " fullest GPU; activations, gathered weights and temporaries come beside. sent a step:"
        " between two refreshes. for bases: the mean of all steps and GPUs."
    )
    if facts["shard"] == "ddp":
        yield "Under DDP every GPU computes the same bases from the same gradients."
        return
    yield (
        "On shards matrices are projected from the right, bases are whole on every GPU, and moments"
        " are in float32, whatever --state says."
    )
    largest = max(each["gathered_gradient_bytes"] for each in facts["optimizers"].values())
    if largest:
        yield f"The owner of a new basis holds a whole gradient, up to {amount(largest)}."
    more = [name for name, each in facts["optimizers"].items() if each["more_than_adamw"]]
    if more:
        other = "" if facts["shard"] == "hsdp" or facts["gpus"] <= SHARD_SIZE else "hsdp, "
        yield (
            f"{', '.join(more)}: more state than adamw's, whose moments are in {facts['dtype']} and"
            f" split; {other}a lower rank, or --basis int8 keep what is whole small."
        )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
