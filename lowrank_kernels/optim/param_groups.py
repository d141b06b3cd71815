"""Splits a model's parameters into projected and plain groups."""

import logging
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..factors.linear import factored_in, trained_parts
from ..linears import (
    IN_A_BLOCK,
    ROUTER,
    Candidate,
    collapsed,
    embeddings_and_heads,
    linear_weights,
    matches,
)
from ..ops import Side
from ..ops.contract import basis_shape, projected_shape
from ..ranks import Ranks, ranks_of
from .groups import PROJECTION_DEFAULTS, PROJECTION_TYPES, Group, side_of

logger = logging.getLogger("lowrank_kernels")


# Why a part of a FactoredLinear is not projected.
FACTOR = "a part of a FactoredLinear, which is never projected"


class Decision(NamedTuple):
    """How a parameter is trained, and why.

    `projected`, or else by AdamW: at lr * scale if it is `hidden`, so that it moves as fast as the
    projected weights beside it. `transposed` as in `Candidate`. `rank` is what it was given, also
    where that saves no memory.
    """

    name: str
    param: Tensor
    projected: bool
    hidden: bool
    reason: str
    transposed: bool = False
    rank: int | None = None


def param_groups(
    model: nn.Module,
    rank: Ranks,
    *,
    targets: str | Iterable[str] | None = None,
    weight_decay: float | None = None,
    scale: float = PROJECTION_DEFAULTS["scale"],
    update_proj_gap: int = PROJECTION_DEFAULTS["update_proj_gap"],
    proj_type: str = PROJECTION_DEFAULTS["proj_type"],
) -> list[Group]:
    """Parameter groups for the low-rank optimizers: linear weights inside the blocks are projected.

    Projected are the weights of `nn.Linear`, of `nn.MultiheadAttention` and of transformers'
    `Conv1D` that belong to a numbered block ("model.layers.3.mlp.up_proj", "encoder_layer_3.mlp").
    Embeddings, the output head (tied or not), norms, biases, routers of experts, convolutions and
    fused 3-D experts are not, and neither is a matrix so small that its low-rank state would not be
    smaller than AdamW's. A head is known by the model's `get_output_embeddings`; the last layer of
    a plain `nn.Sequential` is a block like the others.

    Weights of the blocks that are not projected, for whatever reason, move at lr * scale like the
    projected ones, and at lr where a scale is above 1, as APOLLO-Mini's is: at the full rate, which
    is meant for embeddings and norms, they would take steps several times as large as their
    neighbours'. A warning says which they are and why.

    B, A and the sparse values of a `FactoredLinear` are left to AdamW, at lr * scale as well, and
    with the decay of matrices: they are of a low rank already. The groups of a model in which
    nothing else could be projected have no rank; `LowRankAdamW(groups, state="int8")` takes them.

    A `Conv1D` weight is the transpose of a linear weight, so its `proj_type` is turned around where
    the shape alone would choose another side than for the linear layer (square matrices).

    Args:
        model: any module; parameters that do not require a gradient are included, so that they can
            be unfrozen later, but they do not count where something has to be found to project.
        rank: r of every projected matrix; or patterns of names, as of `fnmatch`, with their ranks,
            of which the first that matches counts and "*" is the rest; or a function of a weight's
            name and the weight. Names are those of `model.named_parameters()`. A weight whose rank
            is None, or whose name no pattern matches, is not projected. Ranks linear in depth, as
            PRILoRA gives them to adapters (arXiv 2401.11316), are
            `lambda name, weight: 4 + int(name.split(".")[2])` for "model.layers.3.mlp.up_proj".
            Each rank is a group, and matrices of one group are stepped together.
        targets: instead of the rule above, the linear modules to project: name parts or regular
            expressions searched in the module names, or "all-linear" for every linear module but
            the output head.
        weight_decay: decay of every matrix, with 0 for 1-D parameters; None leaves it to the
            optimizer's own `weight_decay`, for all parameters.
        scale: alpha of the papers.
        update_proj_gap: steps between two bases.
        proj_type: "std", "reverse_std", "left" or "right", as seen by a linear layer.

    Returns:
        Non-empty groups with (name, parameter) pairs; those with a "rank" are projected, those with
        a "scale" alone are hidden weights left to AdamW.

    Raises:
        TypeError: `model` is no module, or a rank no int.
        ValueError: nothing that is trained matched, and the text lists the linear modules; or no
            rank saves memory on any of it; or `targets` are factored modules; or a rank is below 1;
            or a pattern decides nothing; or `proj_type` is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups takes the model, not {type(model).__name__}")
    if proj_type not in PROJECTION_TYPES:
        raise ValueError(f"proj_type must be one of {', '.join(PROJECTION_TYPES)}")
    if targets is not None and not isinstance(targets, str):
        targets = list(targets)
    decisions = decide(model, rank, targets)
    _check_something_is_projected(model, decisions, targets)
    _tell_what_is_left_out(decisions, min(scale, 1.0))

    groups: dict[tuple[Any, ...], Group] = {}
    for each in decisions:
        options: Group = {}
        if each.projected:
            options = {"rank": each.rank, "update_proj_gap": update_proj_gap, "scale": scale}
            options["proj_type"] = _stored_proj_type(each, proj_type)
        elif each.hidden:
            # APOLLO's factors on whole gradients may be above 1.
            options = {"scale": min(scale, 1.0)}
        if weight_decay is not None:
            matrix = each.param.dim() > 1 or each.reason == FACTOR
            options["weight_decay"] = weight_decay if matrix else 0.0
        key = tuple(options.items())
        groups.setdefault(key, {"params": [], **options})["params"].append((each.name, each.param))
    return list(groups.values())


def decide(
    model: nn.Module, rank: Ranks, targets: str | Iterable[str] | None = None
) -> list[Decision]:
    """What `param_groups` does with each parameter, in the order of the model."""
    candidates = {id(candidate.param): candidate for candidate in linear_weights(model)}
    matched = {
        name: param
        for name, param in model.named_parameters()
        if id(param) in candidates and matches(candidates[id(param)].name, targets)
    }
    ranks = ranks_of(rank, matched)
    outside, factors = embeddings_and_heads(model), _factors(model)
    decisions = []
    for name, param in model.named_parameters():
        candidate = candidates.get(id(param))
        in_a_block = bool(IN_A_BLOCK.search(name.rpartition(".")[0]))
        if candidate and name in ranks:
            own = ranks[name]
            # FSDP1 makes vectors of matrices.
            saves = own is not None and param.dim() == 2 and _saves_memory(param, own)
            reason = "a linear weight" if saves else f"rank {own} saves no memory"
            if own is None:
                reason = "given no rank"
            decision = Decision(name, param, saves, not saves, reason, candidate.transposed, own)
        elif id(param) in factors:
            decision = Decision(name, param, False, True, FACTOR)
        elif param.dim() < 2:
            decision = Decision(name, param, False, False, "not a matrix")
        elif id(param) in outside:
            decision = Decision(name, param, False, False, "an embedding or an output head")
        elif not in_a_block:
            decision = Decision(name, param, False, False, "outside the blocks")
        else:
            decision = Decision(name, param, False, True, _why_not(name, param, candidate, targets))
        decisions.append(decision)
    return decisions


def _factors(model: nn.Module) -> set[int]:
    """Identities of the parameters that stand for weights."""
    modules = factored_in(model).values()
    return {id(part) for module in modules for part in trained_parts(module).values()}


def _why_not(
    name: str, param: Tensor, candidate: Candidate | None, targets: str | Iterable[str] | None
) -> str:
    """Of a weight in a block that did not match."""
    if ROUTER.search(name):
        return "a router"
    if param.dim() > 2:
        return "not a matrix"
    if candidate is None:
        return "of no linear module"
    return f"not among targets={targets!r}"


def _check_something_is_projected(
    model: nn.Module,
    decisions: list[Decision],
    targets: str | Iterable[str] | None,
) -> None:
    trained = [each for each in decisions if each.param.requires_grad] or decisions
    if any(each.projected for each in trained):
        return
    candidates = [c for c in linear_weights(model) if any(c.param is d.param for d in trained)]
    ranks = sorted({each.rank for each in trained if each.rank is not None})
    if ranks:
        shapes = sorted({tuple(each.param.shape) for each in trained if each.rank is not None})
        raise ValueError(
            f"rank {', '.join(map(str, ranks))} saves no memory on any of the matched trained"
            f" shapes {shapes}"
        )
    matched = [candidate.name for candidate in candidates if matches(candidate.name, targets)]
    if matched:
        raise ValueError(f"rank gives none to any matched trained module, as {matched[0]}")
    if any(each.reason == FACTOR for each in trained):
        if targets is None or targets == "all-linear":
            return
        factored = [name for name in factored_in(model) if matches(name, targets)]
        if factored:
            raise ValueError(
                f"targets={targets!r}: {factored[0]} is factored, of a low rank already, and so"
                " never projected: leave targets out, and its factors to AdamW, or"
                " densify(model) first"
            )
    names = "\n  ".join(dict.fromkeys(collapsed(c.name) for c in candidates)) or "none"
    raise ValueError(
        f"no trained linear module matches targets={targets!r}; give a list of name parts, or"
        f" 'all-linear'. The model's trained linear modules are:\n  {names}"
    )


def _tell_what_is_left_out(decisions: list[Decision], scale: float) -> None:
    left: dict[str, int] = {}
    for each in decisions:
        # Factors are what the user has made of a weight.
        if each.hidden and each.param.requires_grad and each.reason != FACTOR:
            shape = " x ".join(map(str, each.param.shape))
            line = f"{collapsed(each.name)} ({shape}): {each.reason}"
            left[line] = left.get(line, 0) + 1
    if left:
        lines = "".join(f"\n  {line}, {count} of them" for line, count in left.items())
        logger.warning(
            "weights of the blocks left out of the projection, trained by AdamW at lr * %g:%s",
            scale,
            lines,
        )


def _saves_memory(param: Tensor, rank: int) -> bool:
    """Whether basis and two low-rank moments have fewer elements than AdamW's two moments."""
    shape = (param.shape[0], param.shape[1])
    side = side_of("std", *shape)
    basis, moment = basis_shape(shape, side, rank), projected_shape(shape, side, rank)
    return basis[0] * basis[1] + 2 * moment[0] * moment[1] < 2 * param.numel()


def _stored_proj_type(decision: Decision, proj_type: str) -> str:
    """The `proj_type` that, for a weight as it is stored, gives the side of the linear layer."""
    if not decision.transposed:
        return proj_type
    cols, rows = decision.param.shape
    linear_side = side_of(proj_type, rows, cols)
    stored_side = Side(1 - linear_side)
    if side_of(proj_type, cols, rows) == stored_side:
        return proj_type
    return stored_side.name.lower()
