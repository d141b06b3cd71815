"""Linear layers that hand their optimizer R instead of a gradient."""

from __future__ import annotations

import functools
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.contract import Side
from ..optim.groups import is_projected, side_of
from ..optim.lowrank_adamw import LowRankAdamW, not_compiled
from ..optim.projected_gradient import Projector
from .linear import Products, ProjectedLinear, Use
from .recompute import is_recomputing
from .reduction import Reduction

Start = Literal["activations", "gradient", "random", "dense"]
STARTS = ("activations", "gradient", "random", "dense")
SHARED_STARTS = ("activations", "random")

# What is patched, so that a copy of a model, which is not, computes as before.
_PATCHED: weakref.WeakKeyDictionary[nn.Module, _Layer] = weakref.WeakKeyDictionary()


class Row(NamedTuple):
    """What became of a linear layer.

    Attributes:
        name: of the layer.
        taken: whether its weight's gradient is projected.
        reason: why not; of a layer that is taken, its side.
    """

    name: str
    taken: bool
    reason: str


class ProjectedLinears:
    """What `project_linears` has done, and the way back.

    Attributes:
        rows: a `Row` for every linear layer of the model.
    """

    def __init__(self, rows: list[Row], layers: list[_Layer], reduction: Reduction) -> None:
        self.rows, self._layers, self._reduction = rows, layers, reduction

    def undo(self) -> None:
        """Gives every layer its own forward again.

        Raises:
            RuntimeError: DistributedDataParallel has wrapped the model since and counts on this.
        """
        self._reduction.end()
        for layer in self._layers:
            layer.restore()
        self._layers = []

    def __str__(self) -> str:
        taken = sum(row.taken for row in self.rows)
        reasons = Counter(row.reason for row in self.rows if not row.taken)
        others = "".join(f"\n  {count} not: {reason}" for reason, count in reasons.items())
        return f"{taken} of {len(self.rows)} linear layers hand over projected gradients{others}"


def project_linears(
    model: nn.Module,
    optimizer: LowRankAdamW,
    *,
    start: Start = "activations",
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
    used twice, layers used in several places and DistributedDataParallel (call this before wrapping
    the model). In a compiled model each layer is a graph break.

    Args:
        model: with the layers, on its device.
        optimizer: GaLore or AdaRankGrad, over the model's parameters, without `capturable`.
        start: where the first bases come from. "activations": the leading directions of x (right
            side) or of H (left), so that the first step needs no gradient either; "random"; both
            change with the first refresh of a matrix, within `update_proj_gap` steps. "gradient":
            a matrix' own G, one at a time in the backward pass, as GaLore does it, where x is
            saved in the first step; of several micro-batches the first decides. "dense": all
            gradients in the first step.
        share_bases: layers on the right side that have one input, as q, k and v or gate and up,
            share one basis, that of their gradients below each other, and x P. They are found in
            the first forward pass of a new optimizer; with a `start` that is known then. One that
            is due without the others, as with `release_gradients`, has its own from then on.

    Returns:
        What was taken and why not; its `undo()` restores the layers.

    Raises:
        ValueError: `share_bases` with another `start`, or with a criterion, which asks for bases
            one by one; the optimizer needs whole gradients (Fira, `capturable`); no layer's weight
            is projected; `start` is unknown; or the model is wrapped already.

    Source: GaLore (arXiv 2403.03507) by associativity; LoQT (2405.16528) and CompAct (2410.15352)
    save x P.
    """
    _check(model, optimizer, start)
    if share_bases and (start not in SHARED_STARTS or optimizer.subspace.criterion is not None):
        raise ValueError(
            f"share_bases=True goes with start={' or '.join(SHARED_STARTS)} and without a criterion"
        )
    projected = {
        param: group
        for group in optimizer.param_groups
        for param in group["params"]
        if is_projected(group)
    }
    rows: list[Row] = []
    taken: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        reason = _obstacle(module, projected)
        if reason is None:
            taken[name] = module
            side = _side(module, projected)
            rows.append(Row(name, True, f"{side.name.lower()} side"))
        else:
            rows.append(Row(name, False, reason))
    if not taken:
        found = Counter(row.reason for row in rows)
        raise ValueError(
            f"no linear layer has a weight whose gradient can be projected: {dict(found)}; build"
            " the optimizer's groups with lowrank_kernels.param_groups(model, rank=...)"
        )
    inputs, reduction = _LastInput(), Reduction(model, taken)
    layers = [
        _Layer(module, optimizer, start, _side(module, projected), inputs, reduction, share_bases)
        for module in taken.values()
    ]
    for layer in layers:
        layer.patch()
    return ProjectedLinears(rows, layers, reduction)


def _side(module: nn.Linear, projected: dict[Tensor, Any]) -> Side:
    rows, cols = module.weight.shape
    return side_of(projected[module.weight]["proj_type"], rows, cols)


def _check(model: nn.Module, optimizer: LowRankAdamW, start: str) -> None:
    if start not in STARTS:
        raise ValueError(f"start must be one of {', '.join(STARTS)}, got {start!r}")
    if not isinstance(optimizer, LowRankAdamW):
        raise ValueError(
            f"{type(optimizer).__name__} is no optimizer of lowrank_kernels (wrappers have it in"
            " .optimizer)"
        )
    if optimizer.residual is not None:
        raise ValueError(
            f"residual={optimizer.residual!r} needs what lies outside of the basis, and so the"
            " whole gradient: use GaLoreAdamW, or release_gradients to hold one at a time"
        )
    if optimizer.capturable:
        raise ValueError("capturable=True: a captured step cannot tell when a basis is due")
    for module in model.modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError("call project_linears before DistributedDataParallel wraps the model")


def _obstacle(module: nn.Linear, projected: dict[Tensor, Any]) -> str | None:
    """Why a layer cannot be taken."""
    weight = module._parameters.get("weight")
    if type(module) is not nn.Linear and type(module).forward is not nn.Linear.forward:
        return f"{type(module).__name__} has a forward of its own"
    if weight is None:
        return "its weight is computed from others"
    if weight not in projected:
        return "its weight is not projected by the optimizer"
    if not weight.requires_grad:
        return "its weight is frozen"
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if "forward" in vars(module) and not is_recomputing(module):
        return "its forward is patched already"
    return None


class _LastInput:
    """Finds the layers that one input goes to, as q, k and v."""

    def __init__(self) -> None:
        self._x: weakref.ref[Tensor] | None = None
        self._version = -1
        self._users: list[_Layer] = []
        self.products: Products = {}

    def goes_to(self, x: Tensor, layer: _Layer) -> None:
        """Called in the order of the forward pass."""
        if self._x is None or self._x() is not x or self._version != x._version:
            for user in self._users:
                user.siblings = self._users
            self._x, self._version = weakref.ref(x), x._version
            self._users, self.products = [], {}
        self._users.append(layer)

    def family(self) -> list[_Layer]:
        """The layers on the right side that it went to so far."""
        return [user for user in dict.fromkeys(self._users) if user.is_on_the_right]


class _Layer:
    """A linear layer that is patched."""

    def __init__(
        self,
        module: nn.Linear,
        optimizer: LowRankAdamW,
        start: Start,
        side: Side,
        inputs: _LastInput,
        reduction: Reduction,
        shares: bool,
    ) -> None:
        self._module, self._optimizer = weakref.ref(module), weakref.ref(optimizer)
        self._start, self._side, self._inputs = start, side, inputs
        self._reduction, self._shares = reduction, shares
        self.siblings = [self]
        self._forward_before = vars(module).get("forward")
        # What is saved must not change between a forward pass and its recomputation.
        self._decided: tuple[int, bool] = -1, False

    @property
    def is_on_the_right(self) -> bool:
        return self._side is Side.RIGHT

    def patch(self) -> None:
        module = self._module()
        assert module is not None
        _PATCHED[module] = self
        # A copied or pickled module takes the partial along, and finds no layer.
        module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]

    def restore(self) -> None:
        module = self._module()
        if module is None or _PATCHED.pop(module, None) is not self:
            return
        del module.forward
        if self._forward_before is not None:
            module.forward = self._forward_before  # type: ignore[method-assign]

    def use(self, x: Tensor, weight: Tensor) -> Use | None:
        """How this pass forms the weight's gradient; None for whole."""
        optimizer = self._optimizer()
        if optimizer is None or not torch.is_grad_enabled() or not weight.requires_grad:
            return None
        distributed = self._reduction.enter()
        self._inputs.goes_to(x, self)
        use, projector = None, optimizer.wants(weight)
        if projector is not None:
            use = Use(projector)
        elif self._start != "dense" and optimizer.can_begin(weight):
            # The same on every rank, without a word between them.
            start = "random" if distributed else self._start
            use = self._first_use(start, x, weight, optimizer)
        keeps = self._keeps_input(optimizer)
        products = self._inputs.products if self._shares else None
        dtype = _autocast_dtype(x)
        return use and replace(use, keeps_input=keeps, dtype=dtype, products=products)

    def bases(self, optimizer: LowRankAdamW) -> dict[int, int] | None:
        """The rank of x P by its basis; None if x itself is needed."""
        module = self._module()
        state = None if module is None else optimizer.state.get(module.weight)
        if not state or self._side is Side.LEFT:
            return None
        return {id(state["basis"]): state["rank"]}

    def _keeps_input(self, optimizer: LowRankAdamW) -> bool:
        """x is saved once for all of its layers, x P for each."""
        module = self._module()
        assert module is not None
        state = optimizer.state.get(module.weight)
        step = int(state["step"]) if state else 0
        if self._decided[0] != step:
            every = [sibling.bases(optimizer) for sibling in self.siblings]
            ranks = {basis: rank for bases in every for basis, rank in (bases or {}).items()}
            whole = sum(ranks.values()) >= module.weight.shape[1]
            self._decided = step, whole or None in every
        # In the first step it is wanted for the basis.
        return self._decided[1] or (step == 0 and self._start == "gradient")

    def _first_use(
        self, start: str, x: Tensor, weight: Tensor, optimizer: LowRankAdamW
    ) -> Use | None:
        def from_gradient(heads: Tensor, x: Tensor) -> Projector | None:
            return optimizer.wants(weight) or optimizer.begin(weight, gradient=heads.mT @ x)

        def from_heads(heads: Tensor, x: Tensor) -> Projector | None:
            return optimizer.wants(weight) or optimizer.begin(weight, like=heads.mT)

        if start == "gradient":
            return Use(None, from_gradient)
        if start == "activations" and self._side is Side.LEFT:
            return Use(None, from_heads)
        like = x.detach().reshape(-1, x.shape[-1]) if start == "activations" else None
        projector = optimizer.begin(weight, like=like)
        if projector is None:
            return None
        if self._shares:
            self._join(weight, optimizer)
        return Use(Projector.of(optimizer.state[weight]))

    def _join(self, weight: Tensor, optimizer: LowRankAdamW) -> None:
        """Takes the basis of the layer that the same input went to first, if that suits both."""
        family = self._inputs.family()
        others = [layer._module() for layer in family]
        weights = [module.weight for module in others if module is not None]
        states = [optimizer.state[each] for each in weights]
        same_group = len({id(optimizer._group_of(each)) for each in weights}) == 1
        ages = {(state["rank"], state["basis_step"], int(state["step"])) for state in states}
        if len(weights) > 1 and same_group and ages == {(states[0]["rank"], 0, 0)}:
            optimizer.share_basis(weights)


@not_compiled
def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    """In the place of `nn.Linear.forward`."""
    layer, weight = _PATCHED.get(module), module.weight
    use = None if layer is None else layer.use(x, weight)
    if use is None:
        return F.linear(x, weight, module.bias)
    projected: Tensor = ProjectedLinear.apply(x, weight, module.bias, use)  # type: ignore[no-untyped-call]
    return projected


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """In which autocast would compute a linear layer; None without it."""
    kind = x.device.type
    if x.dtype is torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
