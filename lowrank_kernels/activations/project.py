"""Linear layers that hand their optimizer R instead of a gradient."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from torch import Tensor, nn

from ..linears import Row
from ..optim.groups import is_projected
from ..optim.lowrank_adamw import LowRankAdamW
from .layers import LastInput, Layer
from .recompute import is_recomputing
from .reduction import Reduction, is_reduced

Start = Literal["activations", "gradient", "random", "dense"]
STARTS = ("activations", "gradient", "random", "dense")
SHARED_STARTS = ("activations", "gradient", "random")
PATCHED_ALREADY = "its forward is patched already, by project_linears, sample_linears or others"


class ProjectedLinears:
    """What `project_linears` has done, and the way back.

    Attributes:
        rows: a `Row` for every linear layer of the model.
        layers: those that are taken.
    """

    def __init__(self, rows: list[Row], layers: list[Layer], reduction: Reduction) -> None:
        self.rows, self.layers, self._reduction = rows, layers, reduction

    def undo(self) -> None:
        """Gives every layer its own forward again.

        Raises:
            RuntimeError: DistributedDataParallel has wrapped the model since and counts on this.
        """
        self._reduction.end()
        for layer in self.layers:
            layer.restore()
        self.layers = []

    def __str__(self) -> str:
        taken = sum(row.taken for row in self.rows)
        reasons = Counter(row.reason for row in self.rows if not row.taken)
        others = "".join(f"\n  {count} not: {reason}" for reason, count in reasons.items())
        return f"{taken} of {len(self.rows)} linear layers hand over projected gradients{others}"


def project_linears(
    model: nn.Module,
    optimizer: LowRankAdamW,
    *,
    start: Start = "gradient",
    share_bases: bool = False,
) -> ProjectedLinears:
    """Lets the linear layers whose weights the optimizer projects compute R = G P or P^T G alone.

    R = H^T (x P) is what GaLore makes of the gradient G = H^T x, exactly; G is formed in the
    steps alone in which a basis is due, of each matrix once in `update_proj_gap` steps. That spares
    two thirds of the products for the weights' gradients at r = h / 4, all but r / n of the
    gradients' memory, and of what is saved for them: x P instead of x.

    A weight's `.grad` is then a `ProjectedGradient`: it accumulates in float32, can be clipped by
    its 2-norm, which is that of R and so of what is applied, unscaled and set to zero; `.dense()`
    is what R tells of it. Names, state dicts and hooks stay; hooks on a weight see it, too.

    Works with autocast, GradScaler, accumulation, gradient checkpointing of both kinds, weights
    used twice, layers used in several places and DistributedDataParallel (call this on the very
    module that it wraps, before that; first bases are random then, the same on every rank). In a
    compiled model each layer is a graph break. `zero_grad` has to free gradients, as it does by
    default. Inside of transforms of torch.func a layer is what it was.

    Args:
        model: with the layers, on its device.
        optimizer: GaLore or AdaRankGrad, over the model's parameters, without `capturable`.
        start: where the first bases come from, which change with the first refresh of a matrix,
            within `update_proj_gap` steps. "gradient": a matrix' own G, one at a time in the
            backward pass, as GaLore does it; x is then saved in the first step, and of several
            micro-batches the first decides. "activations": the leading directions of x (right side)
            or of H (left), so that the first step needs no gradient either; "random": the same.
            "dense": all gradients in the first step.
        share_bases: layers on the right side that have one input, as q, k and v or gate and up,
            share one basis, that of their gradients below each other, and x P. They are found in
            the first forward pass of a new optimizer; the first to have a gradient decides for all
            until their first refresh. Not with `start="dense"`; where ranks adapt, or with
            `release_gradients`, by "activations" or "random" only. One that is due without the
            others has its own from then on.

    Returns:
        What was taken and why not; its `undo()` restores the layers.

    Raises:
        ValueError: `share_bases` with another `start`, with a criterion, which asks for bases one
            by one, or with interpolation; the optimizer needs whole gradients (Fira, `capturable`);
            no layer's weight is projected; `start` is unknown; or the model is wrapped already.

    Source: GaLore (arXiv 2403.03507) by associativity; LoQT (2405.16528) and CompAct (2410.15352)
    save x P.
    """
    _check(model, optimizer, start)
    if share_bases and optimizer.subspace.interpolation:
        raise ValueError("share_bases=True goes without interpolation: M of each has its own scale")
    if share_bases and (start not in SHARED_STARTS or optimizer.subspace.criterion is not None):
        raise ValueError(
            f"share_bases=True goes with start={', '.join(SHARED_STARTS)} and without a criterion,"
            " of AdaRankGrad by criterion=None"
        )
    groups = filter(is_projected, optimizer.param_groups)
    projected = {param for group in groups for param in group["params"]}
    rows: list[Row] = []
    taken: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = _obstacle(module, projected)
        if reason is None:
            taken[name] = module
        side = "" if reason else f"{optimizer.side_of(module.weight).name.lower()} side"
        rows.append(Row(name, reason is None, reason or side))
    if not taken:
        raise ValueError(_nothing_taken(model, rows, projected))
    weights = {f"{name}.weight": module.weight for name, module in taken.items()}
    inputs, reduction = LastInput(), Reduction(model, weights, optimizer)
    layers = [
        Layer(module, optimizer, start, inputs, reduction, share_bases) for module in taken.values()
    ]
    for layer in layers:
        layer.patch()
    return ProjectedLinears(rows, layers, reduction)


def _nothing_taken(model: nn.Module, rows: list[Row], projected: set[Tensor]) -> str:
    """Why no layer is, and the way out."""
    reasons = Counter(row.reason for row in rows)
    others = Counter(
        type(module).__name__
        for module in model.modules()
        if not isinstance(module, nn.Linear)
        and not projected.isdisjoint(module.parameters(recurse=False))
    )
    text = "no linear layer has a weight whose gradient can be projected"
    if reasons:
        text += f" ({', '.join(f'{count}: {reason}' for reason, count in reasons.items())})"
    if others:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in others.items())
        return f"{text}; the optimizer projects weights of {kinds}, which are no nn.Linear"
    if any("DTensor" in reason for reason in reasons):
        return f"{text}; gradients of shards stay whole: leave this call out, or use DDP"
    if PATCHED_ALREADY in reasons:
        return f"{text}; call undo() of what the first call returned, or take a new model"
    return (
        f"{text}; build the optimizer's groups with lowrank_kernels.param_groups(model, rank=...)"
    )


def _check(model: nn.Module, optimizer: LowRankAdamW, start: str) -> None:
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    check_served(optimizer)
    check_unwrapped(model, "project_linears")


def check_served(optimizer: LowRankAdamW) -> None:
    """Raises ValueError if an optimizer cannot do with R in the place of gradients."""
    if not isinstance(optimizer, LowRankAdamW):
        raise ValueError(
            f"{type(optimizer).__name__} is no optimizer of lowrank_kernels; of one that accelerate"
            " or another wraps, pass its .optimizer"
        )
    if optimizer.residual is not None:
        raise ValueError(
            f"residual={optimizer.residual!r} needs what lies outside of the basis, and so the"
            " whole gradient: use GaLoreAdamW, or release_gradients to hold one at a time"
        )
    if optimizer.capturable:
        raise ValueError("capturable=True: a captured step cannot tell when a basis is due")


def check_unwrapped(model: nn.Module, caller: str) -> None:
    """Raises ValueError if DistributedDataParallel has wrapped a model before a call."""
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(f"call {caller} before DistributedDataParallel wraps the model")


def obstacle(module: nn.Linear) -> str | None:
    """Why a layer's forward cannot be patched."""
    weight = module._parameters.get("weight")
    if type(module) is not nn.Linear and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    if weight is None:
        return "its weight is computed from others"
    if not weight.requires_grad:
        return "its weight is frozen"
    if "forward" in vars(module) and not is_recomputing(module):
        return PATCHED_ALREADY
    return None


def _obstacle(module: nn.Linear, projected: set[Tensor]) -> str | None:
    """Why a layer cannot be taken."""
    weight = module._parameters.get("weight")
    if weight is not None and weight not in projected:
        return "its weight is not projected by the optimizer"
    if reason := obstacle(module):
        return reason
    assert weight is not None
    if not weight.is_contiguous():
        return "the elements of its rows are not adjacent"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if is_reduced(weight):
        return "another call averages its gradient: call project_linears before ProjectedGradients"
    return None
