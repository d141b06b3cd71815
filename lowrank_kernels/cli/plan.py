"""Whether a model can be trained in some memory with each optimizer, found without taking it."""

import argparse
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..activations.plan import (
    Planner,
    Training,
    TrainingPlan,
    adamw_bytes,
    projects,
)
from ..linears import collapsed
from ..ops import requested_backend
from ..optim import LowRankAdamW
from ..text import amount, parse_bytes, table
from . import factored, gpus, offload
from .cards import CARDS, card_bytes
from .models import (
    OPTIMIZERS,
    Model,
    add_model_arguments,
    backend_of,
    build_optimizer,
    model_of,
    rank_of,
)
from .text import UserError, user_errors

SUMMARY = "say what training takes, activations too, whether it fits, and with how many tokens"

ALL_OPTIMIZERS = ("adamw", *OPTIMIZERS)
USUAL = ("adamw", "galore", "fira", "adarankgrad")
TOKENS = 2048

# What makes a model fit, cheapest first: by an argument, its value, and whether it needs R.
MEASURES = (
    ("recompute", True, False),
    ("project", True, True),
    ("release", True, False),
    ("state", "int8", False),
    ("basis", "int8", False),
    ("checkpointing", True, False),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the optimizers, how it is trained, and the memory that it should fit into."""
    add_model_arguments(parser)
    parser.set_defaults(device=None)
    names = ",".join(USUAL)
    which = f"of {', '.join(ALL_OPTIMIZERS)}; default: {names}"
    parser.add_argument("--optimizers", default=names, metavar="NAMES", help=which)
    add = parser.add_argument
    without = "in a micro-batch, 0 to leave activations out; default: %(default)s"
    add("--tokens", type=int, default=TOKENS, help=without)
    add("--recompute", action="store_true", help="recompute_activations(model): norms and products")
    add("--project", action="store_true", help="project_linears(model, optimizer): R, no gradients")
    add("--release", action="store_true", help="release_gradients: one gradient at a time")
    add("--checkpointing", action="store_true", help="of the blocks, as transformers does it")
    add("--accumulate", action="store_true", help="several backward passes a step")
    offload.add_arguments(parser)
    memory = parser.add_mutually_exclusive_group()
    memory.add_argument("--memory", metavar="AMOUNT", help="to fit into: 24GiB, 24GB or 24, in GB")
    memory.add_argument(
        "--card",
        choices=CARDS,
        metavar="CARD",
        help=f"whose memory to fit into, implies --device cuda: {', '.join(CARDS)}",
    )
    factored.add_arguments(parser)
    gpus.add_arguments(parser)


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes of a training run: weights, and for each optimizer gradients, state, workspaces,
    activations, the most that is held in each part of a step, and how many tokens fit; with --gpus
    those of `gpus`.
    """
    gpus.check(args, TOKENS)
    factored.check(args)
    args.device = args.device or ("cpu" if args.card is None else "cuda")
    names = args.optimizers.split(",")
    for name in names:
        if name not in ALL_OPTIMIZERS:
            raise UserError(f"--optimizers: {name!r} is not one of {', '.join(ALL_OPTIMIZERS)}")
    if args.tokens < 0:
        raise UserError(f"--tokens must be at least 0, got {args.tokens}")
    offload.check(args)
    if args.release and args.accumulate:
        raise UserError("--release and --accumulate: what is released adds up to nothing")
    memory, usual = _memory(args), backend_of(args).backend
    if args.gpus is not None:
        return gpus.facts(args, names, memory)
    model = model_of(args)
    planner = Planner(model.module, _training(args, memory))
    tokens, unknown = _tokens(planner, args.tokens)
    params = list(model.module.parameters())
    gradients = [_bytes(param) for param in params if param.requires_grad]
    optimizers, backends = {}, set()
    for name in names:
        optimizer = None if name == "adamw" else build_optimizer(name, model, args)
        plan = planner.plan(optimizer, tokens)
        optimizers[name] = _needs(plan, planner, optimizer, memory)
        if args.offload and plan.activations is not None:
            out = plan.activations.out, plan.activations.products
            optimizers[name] |= offload.facts_of(*out, args)
        optimizers[name]["rank"] = None if optimizer is None else rank_of(name, model, args)
        optimizers[name]["remark"] = None
        if optimizer is not None:
            rows = optimizer.plan()
            optimizers[name]["remark"] = _more_than_adamw(rows, model, args.state)
            backends |= {backend_of(args, row).backend for row in rows if row["projected"]}
    if args.factored is not None:
        twin, optimizer, remark = factored.twin_of(args)
        # Factors are never projected.
        training = _training(argparse.Namespace(**vars(args) | {"project": False}), memory)
        planner_of_twin = Planner(twin, training)
        plan = planner_of_twin.plan(optimizer, tokens)
        needs = _needs(plan, planner_of_twin, optimizer, memory)
        optimizers[factored.NAME] = needs | {"rank": None, "remark": remark}
    ours = [name for name in names if name != "adamw"]
    advice = None
    if ours and memory is not None and all(each["left_bytes"] < 0 for each in optimizers.values()):
        advice = _advice(ours[0], model, args, memory, tokens)
    return {
        "model": model.name,
        "architecture": model.architecture,
        "parameters": sum(param.numel() for param in params),
        "rank": model.rank,
        "dtype": args.dtype,
        "state": args.state,
        "basis": args.basis,
        "device": args.device,
        "backend": " and ".join(sorted(backends)) or usual,
        "predicted": _is_predicted(args),
        "offload_card": args.card if args.offload else None,
        "memory_bytes": memory,
        "allowance_bytes": planner.training.allowance,
        "tokens": tokens,
        "without_activations": unknown,
        **{name: getattr(args, name) for name in _HOW},
        "weight_bytes": sum(map(_bytes, params)),
        "buffer_bytes": sum(map(_bytes, model.module.buffers())),
        "gradient_bytes": sum(gradients),
        "largest_gradient_bytes": max(gradients, default=0),
        "optimizers": optimizers,
        "advice": advice,
    }


_HOW = ("recompute", "project", "release", "checkpointing", "accumulate", "offload")


def as_text(facts: dict[str, Any]) -> str:
    """A row an optimizer, in decimal units, and remarks below."""
    if "gpus" in facts:
        return gpus.as_text(facts)
    offloads = facts["offload"] and not facts["without_activations"]
    header = ["optimizer", "state", "gradients", "activations", "step", "refresh", "peak", "in the"]
    if offloads:
        header[4:4] = ["offloaded", "GB/s"]
    with_twin = factored.NAME in facts["optimizers"]
    if with_twin:
        header.insert(1, "weights")
    if facts["memory_bytes"] is not None:
        header.append(f"in {amount(facts['memory_bytes'])}")
    rows, about = [], defaultdict(list)
    for name, needs in facts["optimizers"].items():
        saved = needs["activation_bytes"]
        row = [
            name,
            *(amount(needs[f"{kind}_bytes"]) for kind in ("state", "gradient")),
            "-" if saved is None else amount(saved),
            *(amount(needs[f"{part}_workspace_bytes"]) for part in ("step", "refresh")),
            *(amount(needs["total_bytes"]), needs["peak_in"]),
        ]
        if offloads:
            row[4:4] = offload.cells_of(needs)
        if with_twin:
            row.insert(1, amount(needs["weight_bytes"]))
        if facts["memory_bytes"] is not None:
            row.append(_verdict(needs, facts["tokens"]))
        rows.append(row)
        for remark in _remarks(needs, facts):
            about[remark].append(name)
    how = _arguments({name: facts[name] for name in _HOW if facts[name]})
    tokens = f"{facts['tokens']:,} tokens" if facts["tokens"] else "without activations"
    lines = [
        f"{facts['model']}: {facts['architecture']}, {facts['parameters']:,} parameters,"
        f" rank {facts['rank']}, {facts['dtype']}, state in {facts['state']},"
        f" {facts['backend']} backend on {facts['device']}",
        f"weights {amount(facts['weight_bytes'])},"
        f" gradients {amount(facts['gradient_bytes'])}; 1 GB is 10^9 bytes",
        " ".join([tokens, *how]),
        "",
        table(header, rows),
        "",
        *(textwrap.fill(note, 100, break_on_hyphens=False) for note in _notes(facts, about)),
    ]
    return "\n".join(lines)


def _notes(facts: dict[str, Any], about: dict[str, list[str]]) -> Iterator[str]:
    allowance = facts["allowance_bytes"]
    beside = (
        f" and {amount(allowance)} for CUDA and its allocator, an estimate" if allowance else ""
    )
    if facts["advice"] is not None:
        yield facts["advice"]["text"]
    yield (
        "peak: the most that is held at once, weights and state included"
        f"{beside}; gradients: when a backward pass ends; activations: what it needs when it"
        " begins; step and refresh: what these hold for a while."
    )
    if facts["without_activations"]:
        yield f"Without activations: {facts['without_activations']}"
    elif facts["offload"]:
        yield from offload.notes(facts)
    yield "adamw is torch's, fused; adarankgrad's state is the most it can hold."
    if not (facts["release"] or facts["accumulate"]):
        yield (
            "Stepping in the backward pass, --release, holds little more than the largest gradient,"
            f" {amount(facts['largest_gradient_bytes'])}."
        )
    yield from (f"{', '.join(names)}: {remark}." for remark, names in about.items())
    if facts["predicted"]:
        yield (
            "The backend is predicted: there is no CUDA device here; a GPU checks kernels before"
            " it takes them."
        )


def _verdict(needs: dict[str, Any], tokens: int | None) -> str:
    left, most = needs["left_bytes"], needs["most_tokens"]
    words = f"fits, {amount(left)} to spare" if left >= 0 else f"too large by {amount(-left)}"
    if tokens is None:
        return f"{words} for activations" if left >= 0 else words
    if most:
        return f"{words}; up to {_rounded(most):,} tokens"
    return f"{words}; no number of tokens fits"


def _rounded(tokens: int) -> int:
    """Down to two digits."""
    unit = 10 ** max(0, len(str(tokens)) - 2)
    return tokens // unit * unit


def _remarks(needs: dict[str, Any], facts: dict[str, Any]) -> Iterator[str]:
    """Of an optimizer; at last what was asked for and it cannot."""
    if needs["rank"] not in (None, facts["rank"]):
        yield f"rank {needs['rank']}, its own"
    if needs["remark"]:
        yield needs["remark"]
    if facts["project"] and not needs["projected"]:
        yield "takes whole gradients, which are not projected"
    if facts["release"] and not needs["released"]:
        yield "all gradients are there at once"


def _is_predicted(args: argparse.Namespace) -> bool:
    """Whether nobody has named the backend, nor is there a GPU that would choose it."""
    chosen = requested_backend(args.backend) == "auto"
    return chosen and args.device == "cuda" and not torch.cuda.is_available()


def _memory(args: argparse.Namespace) -> int | None:
    if args.card is not None:
        return card_bytes(args.card)
    if args.memory is None:
        return None
    with user_errors():
        return parse_bytes(args.memory, "--memory")


def _training(args: argparse.Namespace, memory: int | None) -> Training:
    return Training(args.device, memory, **{name: getattr(args, name) for name in _HOW})


def _tokens(planner: Planner, tokens: int) -> tuple[int | None, str | None]:
    """None where the model is not run, and why it cannot be."""
    if not tokens:
        return None, None
    try:
        planner.plan(None, tokens)
    except Exception as error:  # of any kind: it is the model's code
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 200, placeholder=" ...")
        return None, f"the model does not run on input_ids and labels alone: {reason}"
    return tokens, None


def _needs(
    plan: TrainingPlan, planner: Planner, optimizer: LowRankAdamW | None, memory: int | None
) -> dict[str, Any]:
    activations, total = plan.activations, plan.total
    most = None
    if memory is not None and plan.tokens is not None:
        most = planner.most_tokens(optimizer, memory)
    return {
        "weight_bytes": plan.weights,
        "state_bytes": plan.state,
        "gradient_bytes": plan.gradients,
        "activation_bytes": None if activations is None else activations.saved,
        "step_workspace_bytes": plan.workspace.step,
        "refresh_workspace_bytes": plan.workspace.refresh,
        "peak_bytes": plan.peaks,
        "peak_in": plan.at,
        "total_bytes": total,
        "left_bytes": None if memory is None else memory - total,
        "most_tokens": most,
        "projected": planner.training.project and projects(optimizer),
        "released": planner.training.release and optimizer is not None,
    }


def _advice(
    name: str, model: Model, args: argparse.Namespace, memory: int, tokens: int | None
) -> dict[str, Any]:
    """What to add to the command so that an optimizer fits."""

    def total(measures: dict[str, Any]) -> int:
        planner, optimizer = _planned_with(measures, name, model, args, memory)
        return planner.plan(optimizer, tokens).total

    useless = not projects(build_optimizer(name, model, args))
    possible = {
        key: value
        for key, value, needs_projection in MEASURES
        if getattr(args, key) != value
        and not (needs_projection and useless)
        and not (key == "release" and args.accumulate)
    }
    chosen, found = _fewest(possible, total, memory)
    added = _arguments(chosen)
    if found > memory or not chosen:
        text = _no_way(name, model, args, memory, found, added)
        return {"add": added, "total_bytes": found, "most_tokens": 0, "text": text}
    text = f"{name} fits with {' '.join(added)}: {amount(memory - found)} to spare"
    most = None
    if tokens is not None:
        most = Planner.most_tokens(*_planned_with(chosen, name, model, args, memory), memory)
        text += f", up to {_rounded(most):,} tokens"
    return {"add": added, "total_bytes": found, "most_tokens": most, "text": f"{text}."}


def _fewest(
    possible: dict[str, Any], total: Callable[[dict[str, Any]], int], memory: int
) -> tuple[dict[str, Any], int]:
    """Measures, and what is held with them: one after the other, cheapest first, until it fits,
    less those that are needless then; all that help if it never does.
    """
    chosen, found = dict[str, Any](), total({})
    for key, value in possible.items():
        more = chosen | {key: value}
        # Some take more where they have nothing left to spare.
        if (least := total(more)) < found:
            chosen, found = more, least
        if found <= memory:
            break
    needless = found <= memory
    while needless:
        needless = False
        for key in list(chosen):
            fewer = {other: value for other, value in chosen.items() if other != key}
            if fewer and (least := total(fewer)) <= memory:
                chosen, found, needless = fewer, least, True
    return chosen, found


def _planned_with(
    measures: dict[str, Any], name: str, model: Model, args: argparse.Namespace, memory: int
) -> tuple[Planner, LowRankAdamW]:
    """By the command with some arguments more."""
    changed = argparse.Namespace(**vars(args) | measures)
    return Planner(model.module, _training(changed, memory)), build_optimizer(name, model, changed)


def _arguments(measures: dict[str, Any]) -> list[str]:
    return [f"--{key}" if value is True else f"--{key} {value}" for key, value in measures.items()]


def _no_way(
    name: str, model: Model, args: argparse.Namespace, memory: int, total: int, added: list[str]
) -> str:
    """What is left to do where nothing is enough."""
    weights = sum(map(_bytes, [*model.module.parameters(), *model.module.buffers()]))
    if weights > memory:
        return (
            f"The weights alone take {amount(weights)}, more than the memory: nothing but a smaller"
            " model, weights in fewer bits or several devices is left."
        )
    ways = "fewer tokens, a lower rank or more memory"
    if args.accumulate:
        ways += ", or --release in the place of --accumulate"
    even = f" even with {' '.join(added)}" if added else " even with all of this"
    return f"{name} does not fit, too large by {amount(total - memory)}{even}: {ways}."


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
        adamw[projected] += adamw_bytes(params[row["name"]])
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


def _bytes(param: torch.Tensor) -> int:
    return param.numel() * param.element_size()
