"""Gradients that become R as soon as they are there, of any layer."""

from __future__ import annotations

import weakref
from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..optim.groups import is_projected, named_groups
from ..optim.lowrank_adamw import LowRankAdamW
from ..optim.projected_gradient import ProjectedGradient, new_gradient
from ..optim.state import State, check_shapes
from .project import check_served, check_unwrapped
from .reduction import Reduction, is_reduced

# By model; its hook, which is copied and pickled with it, finds them here.
_REDUCTIONS: weakref.WeakKeyDictionary[nn.Module, list[Reduction]] = weakref.WeakKeyDictionary()


class ProjectedGradients:
    """Turns the gradient of each matrix that an optimizer projects into R = G P or P^T G as soon as
    a backward pass has it: for layers that `project_linears` cannot take, of any kind.

        ProjectedGradients(optimizer, model)
        model = DistributedDataParallel(model)             # if there are several ranks
        for micro_batch in batch:
            loss_of(model, micro_batch).backward()         # R += G P
        optimizer.step()

    R is linear in G, and so a step is that of whole gradients, to rounding. What accumulates, in
    float32 (float64 for float64 weights), takes r / n of the memory, and there never is more than
    one whole gradient, but of the matrices whose basis is due at the coming step: those keep all of
    G until then. So do weights that are frozen now or come to the optimizer later, and gradients
    that have a graph of their own (`create_graph=True`).

    A weight's `.grad` is then what `project_linears` makes of it, a `ProjectedGradient`: its norm
    is that of R, which is smaller than that of G, and so clip_grad_norm_ goes by what a step
    applies; it is unscaled by a GradScaler and set to zero as others are. Hooks on a weight see G.
    Both go together: call `project_linears` first, and the weights of its layers are left to it.

    Under DistributedDataParallel, which has to wrap the very `model` and after this, R is averaged
    over the ranks at the end of each backward pass that synchronizes, with what has accumulated
    under `no_sync`, and so are whole gradients where they are due; gradients of all else are left
    to the wrapper. Of a matrix a rank then sends r / n of what it would, but once in
    `update_proj_gap` steps. That is not sent while the backward pass goes on, and ranks have to use
    the same matrices in it.

    Args:
        optimizer: GaLore or AdaRankGrad (residual=None), without `capturable`.
        model: that DistributedDataParallel is going to wrap, with all matrices of the optimizer;
            None if nobody averages gradients.

    Attributes:
        names: of the parameters that are taken.

    Raises:
        ValueError: the optimizer needs whole gradients (Fira and every other residual,
            `capturable`); no gradient can be projected, or one is already; a matrix is none of the
            model's; or the model is wrapped.

    Source: GaLore's R (arXiv 2403.03507) by linearity.
    """

    def __init__(self, optimizer: LowRankAdamW, model: nn.Module | None = None) -> None:
        check_served(optimizer)
        taken = _taken(optimizer)
        weights = {} if model is None else _names_in(model, taken)
        self.names = tuple(taken)
        self._model = None if model is None else weakref.ref(model)
        hook = _Hook(weakref.ref(optimizer))
        self._handles = [
            param.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            for param in taken.values()
        ]
        self._reduction: Reduction | None = None
        if model is not None:
            self._reduction = Reduction(model, weights, optimizer)
            _REDUCTIONS.setdefault(model, []).append(self._reduction)
            self._handles.append(model.register_forward_pre_hook(_enter))

    def remove(self) -> None:
        """Ends it. What has accumulated stays as it is, and can be added to and stepped with.

        Raises:
            RuntimeError: DistributedDataParallel has wrapped the model since and counts on this;
                nothing was changed.
        """
        if self._reduction is not None:
            self._reduction.end()
        for handle in self._handles:
            handle.remove()
        model = None if self._model is None else self._model()
        if model is not None and self._reduction is not None:
            _REDUCTIONS[model].remove(self._reduction)
        self._handles, self._reduction, self._model = [], None, None

    def __str__(self) -> str:
        ended = "" if self._handles else " no more"
        return f"gradients of {len(self.names)} matrices are projected as they come{ended}"


class _Hook(NamedTuple):
    """Of a weight, in torch's hands, where Python's garbage collector does not look."""

    optimizer: weakref.ref[LowRankAdamW]

    def __call__(self, param: Tensor) -> None:
        optimizer = self.optimizer()
        if optimizer is not None:
            _project(optimizer, param)


@torch.no_grad()
def _project(optimizer: LowRankAdamW, param: Tensor) -> None:
    """Puts R in the place of a whole gradient, where the next step goes by R."""
    grad = param.grad
    if isinstance(grad, ProjectedGradient) and grad.projector is None:
        # A whole one that was added to an R that had been set to zero.
        grad = param.grad = grad.held
    # What has been projected already, released or sharded is of another class.
    if type(grad) is not Tensor or grad.layout is not torch.strided or grad.requires_grad:
        return
    projector = optimizer.wants(param)
    if projector is not None and _fits(projector.state, param):
        param.grad = new_gradient(projector.project(grad), projector, grad.shape, grad.dtype)


def _fits(state: State, param: Tensor) -> bool:
    """If not, the weight was changed, of which the step tells."""
    try:
        check_shapes("", param, state, True)
    except ValueError:
        return False
    return bool(state["basis"].device == param.device)


def _enter(model: nn.Module, _: object) -> None:
    """Before each forward pass of a model."""
    for reduction in _REDUCTIONS.get(model, ()):
        reduction.enter()


def _taken(optimizer: LowRankAdamW) -> dict[str, Tensor]:
    """The matrices whose gradients can be projected, by the optimizer's names."""
    taken: dict[str, Tensor] = {}
    others: Counter[str] = Counter()
    for _, group, named in named_groups(optimizer.param_groups):
        for name, param, _ in named if is_projected(group) else ():
            if reason := _obstacle(name, param):
                others[reason] += 1
            else:
                taken[name] = param
    if not taken:
        reasons = ", ".join(f"{count}: {reason}" for reason, count in others.items())
        raise ValueError(
            "the optimizer projects no matrix whose gradient could be projected as it comes"
            f" ({reasons or 'no group has a rank'}): build its groups with"
            " lowrank_kernels.param_groups(model, rank=...)"
        )
    return taken


def _obstacle(name: str, param: Tensor) -> str | None:
    """Why a matrix cannot be taken."""
    hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
    if any(isinstance(hook, _Hook) and hook.optimizer() for hook in hooks.values()):
        raise ValueError(
            f"{name}: its gradient is projected already: remove() the other ProjectedGradients, of"
            " this optimizer or of another that shares the parameter"
        )
    if is_reduced(param):
        return "project_linears has taken its layer"
    if not param.requires_grad:
        return "it is frozen"
    if type(param) is not nn.Parameter and type(param) is not Tensor:
        return f"it is a {type(param).__name__}"
    return None


def _names_in(model: nn.Module, taken: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights by all of the names that a model has for them."""
    check_unwrapped(model, "ProjectedGradients")
    wanted = set(taken.values())
    every = model.named_parameters(remove_duplicate=False)
    weights: dict[str, Tensor] = {name: param for name, param in every if param in wanted}
    missing = wanted - set(weights.values())
    for name, param in taken.items():
        if param in missing:
            raise ValueError(
                f"{name} ({tuple(param.shape)}, {param.dtype}) is no parameter of the model: pass"
                " the model that DistributedDataParallel is going to wrap, with all matrices that"
                " the optimizer projects"
            )
    return weights
