"""Splits a model's parameters into projected and plain groups."""

import logging
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..ops import Side
from ..ops.contract import basis_shape, projected_shape
from .groups import PROJECTION_DEFAULTS, PROJECTION_TYPES, Group, side_of

logger = logging.getLogger("lowrank_kernels")

IN_A_BLOCK = re.compile(r"(^|\.)\d+(\.|$)")
ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")


class Candidate(NamedTuple):
    """A linear weight; `transposed` if it is stored as in_features x out_features."""

    name: str
    param: Tensor
    transposed: bool


def param_groups(
    model: nn.Module,
    rank: int,
    *,
    targets: str | Iterable[str] | None = None,
    weight_decay: float | None = None,
    scale: float = PROJECTION_DEFAULTS["scale"],
    update_proj_gap: int = PROJECTION_DEFAULTS["update_proj_gap"],
    proj_type: str = PROJECTION_DEFAULTS["proj_type"],
) -> list[Group]:
    """Parameter groups for the low-rank optimizers: linear weights inside the blocks are projected.

    Projected are the weights of `nn.Linear` and of transformers' `Conv1D` that belong to a numbered
    block ("model.layers.3.mlp.up_proj"). Embeddings, the output head (tied or not), norms, biases,
    routers of experts, convolutions and fused 3-D experts are not, and neither is a matrix so small
    that its low-rank state would not be smaller than AdamW's. A head is known by the model's
    `get_output_embeddings`; the last layer of a plain `nn.Sequential` is a block like the others.

    A `Conv1D` weight is the transpose of a linear weight, so its `proj_type` is turned around where
    the shape alone would choose another side than for the linear layer (square matrices).

    Args:
        model: any module; parameters that do not require a gradient are included, so that they can
            be unfrozen later.
        rank: r of every projected matrix.
        targets: instead of the rule above, the linear modules to project: name parts or regular
            expressions searched in the module names, or "all-linear" for every linear module but
            the output head.
        weight_decay: decay of every matrix, with 0 for 1-D parameters; None leaves it to the
            optimizer's own `weight_decay`, for all parameters.
        scale: alpha of the papers.
        update_proj_gap: steps between two bases.
        proj_type: "std", "reverse_std", "left" or "right", as seen by a linear layer.

    Returns:
        Non-empty groups with (name, parameter) pairs; those with a "rank" are projected.

    Raises:
        ValueError: nothing matched; the text lists the linear modules. Or `proj_type` is unknown.
    """
    if proj_type not in PROJECTION_TYPES:
        raise ValueError(f"proj_type must be one of {', '.join(PROJECTION_TYPES)}")
    if targets is not None and not isinstance(targets, str):
        targets = list(targets)
    candidates = _linear_weights(model)
    chosen = [c for c in candidates if _matches(c.name, targets)]
    if not chosen:
        names = "\n  ".join(dict.fromkeys(collapsed(c.name) for c in candidates)) or "none"
        raise ValueError(
            f"no linear module matches targets={targets!r}; give a list of name parts, or"
            f" 'all-linear'. The model's linear modules are:\n  {names}"
        )
    projected = {id(c.param): c for c in chosen if _saves_memory(c.param, rank)}
    if not projected:
        shapes = sorted({tuple(c.param.shape) for c in chosen})
        raise ValueError(f"rank {rank} saves no memory on any of the matched shapes {shapes}")

    groups: dict[tuple[Any, ...], Group] = {}
    for name, param in model.named_parameters():
        candidate = projected.get(id(param))
        options: Group = {}
        if candidate:
            options = {"rank": rank, "update_proj_gap": update_proj_gap, "scale": scale}
            options["proj_type"] = _stored_proj_type(candidate, proj_type)
        elif param.dim() > 2:
            logger.info("%s has shape %s: trained by AdamW", name, tuple(param.shape))
        if weight_decay is not None:
            options["weight_decay"] = weight_decay if param.dim() > 1 else 0.0
        key = tuple(options.items())
        groups.setdefault(key, {"params": [], **options})["params"].append((name, param))
    return list(groups.values())


def why_not_projected(model: nn.Module, rank: int) -> dict[str, str]:
    """For every parameter that `param_groups(model, rank)` leaves to AdamW, its name and why."""
    linear = {id(candidate.param): candidate for candidate in _linear_weights(model)}
    reasons = {}
    for name, param in model.named_parameters():
        candidate = linear.get(id(param))
        if param.dim() != 2:
            reasons[name] = "not a matrix"
        elif candidate is None:
            reasons[name] = "embedding, output head or no linear layer"
        elif not _matches(candidate.name, None):
            reasons[name] = "outside the blocks, or a router"
        elif not _saves_memory(param, rank):
            reasons[name] = f"rank {rank} saves no memory"
    return reasons


def _linear_weights(model: nn.Module) -> list[Candidate]:
    """Linear weights by module name, without the output head and without tied embeddings."""
    excluded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():  # the model may be wrapped, by DDP or PEFT
        head = getattr(module, "get_output_embeddings", lambda: None)()
        excluded.add(id(getattr(head, "weight", None)))
    found: dict[int, Candidate] = {}
    for name, module in model.named_modules():
        transposed = _is_transformers_conv1d(module)
        if not transposed and not isinstance(module, nn.Linear):
            continue
        # A parametrized weight is no parameter and is not trained itself.
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None or not weight.is_floating_point():
            continue
        if id(weight) not in excluded:
            found.setdefault(id(weight), Candidate(name, weight, transposed))
    return list(found.values())


def _is_transformers_conv1d(module: nn.Module) -> bool:
    """Told by name: transformers is no dependency, and users call their convolutions so too."""
    return any(
        base.__name__ == "Conv1D" and base.__module__.startswith("transformers.")
        for base in type(module).__mro__
    )


def _matches(name: str, targets: str | Iterable[str] | None) -> bool:
    if targets is None:
        return bool(IN_A_BLOCK.search(name)) and not ROUTER.search(name)
    if targets == "all-linear":
        return True
    patterns = [targets] if isinstance(targets, str) else targets
    return any(re.search(pattern, name) for pattern in patterns)


def _saves_memory(param: Tensor, rank: int) -> bool:
    """Whether basis and two low-rank moments have fewer elements than AdamW's two moments."""
    shape = (param.shape[0], param.shape[1])
    side = side_of("std", *shape)
    basis, moment = basis_shape(shape, side, rank), projected_shape(shape, side, rank)
    return basis[0] * basis[1] + 2 * moment[0] * moment[1] < 2 * param.numel()


def _stored_proj_type(candidate: Candidate, proj_type: str) -> str:
    """The `proj_type` that, for a weight as it is stored, gives the side of the linear layer."""
    if not candidate.transposed:
        return proj_type
    cols, rows = candidate.param.shape
    linear_side = side_of(proj_type, rows, cols)
    stored_side = Side(1 - linear_side)
    if side_of(proj_type, cols, rows) == stored_side:
        return proj_type
    return stored_side.name.lower()


def collapsed(name: str) -> str:
    """A name with block numbers as *: 24 layers read as one."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
