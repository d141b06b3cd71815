"""Linear layers that are patched: what each pass through one does about its weight's gradient."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linears import autocast_dtype
from ..ops.contract import Side
from ..ops.notices import notice_once
from ..optim.first_bases import begin, can_begin, share_first
from ..optim.lowrank_adamw import LowRankAdamW, not_compiled
from ..optim.projected_gradient import ProjectedGradient, Projector
from .linear import Products, ProjectedLinear, Use
from .recompute import TAKERS, is_recomputed, is_saved_anyway
from .reduction import Reduction

# What is patched, so that a copy of a model, which is not, computes as before.
_PATCHED: weakref.WeakKeyDictionary[nn.Module, Layer] = weakref.WeakKeyDictionary()

_LOOKING_ON = ContextVar("_LOOKING_ON", default=False)


@contextmanager
def looking_on() -> Iterator[None]:
    """Passes in which no basis is begun: a layer without one computes its gradient as ever."""
    token = _LOOKING_ON.set(True)
    try:
        yield
    finally:
        _LOOKING_ON.reset(token)


@dataclass(eq=False)
class _Input:
    """A tensor that layers multiply.

    Attributes:
        x: itself, which may be gone.
        version: of it.
        users: layers, in the order of the forward pass.
        begun: those on the right side that share a first basis, which came from it.
        products: x P.
    """

    x: weakref.ref[Tensor]
    version: int
    users: dict[Layer, None]
    begun: list[Layer] = field(default_factory=list)
    products: Products = field(default_factory=dict)

    def is_of(self, x: Tensor) -> bool:
        return self.x() is x and self.version == x._version


class LastInput:
    """Finds the layers that one input goes to, as q, k and v."""

    def __init__(self) -> None:
        self._last: _Input | None = None

    def of(self, x: Tensor, layer: Layer) -> _Input:
        """Called in the order of the forward pass; a layer that comes again begins another one."""
        last = self._last
        if last is not None and last.is_of(x) and layer not in last.users:
            last.users[layer] = None
            return last
        users = [] if last is None else list(last.users)
        for user in users:
            user.siblings = users
        self._last = _Input(weakref.ref(x), x._version, {layer: None})
        return self._last


class Layer:
    """A linear layer that is patched.

    Args:
        module: whose weight the optimizer projects.
        optimizer: see `project_linears`, as for `start` and `shares`.
        inputs: of all layers of a model.
        reduction: of all layers of a model.

    Attributes:
        begin: gives first bases, `first_bases.begin`.
        siblings: the layers that its input goes to, itself among them.
    """

    def __init__(
        self,
        module: nn.Linear,
        optimizer: LowRankAdamW,
        start: str,
        inputs: LastInput,
        reduction: Reduction,
        shares: bool,
    ) -> None:
        self._module, self._weight = weakref.ref(module), weakref.ref(module.weight)
        self._optimizer = weakref.ref(optimizer)
        self._start, self._inputs = start, inputs
        self._reduction, self._shares = reduction, shares
        self.begin: Callable[..., Projector | None] = begin
        self.siblings = [self]
        self._forward_before = vars(module).get("forward")
        # What is saved must not change between a forward pass and its recomputation.
        self._decided: tuple[int, bool] = -1, False

    def patch(self) -> None:
        module = self._module()
        assert module is not None
        _PATCHED[module] = self
        TAKERS.add(module)
        # A copied or pickled module takes the partial along, and finds no layer.
        module.forward = functools.partial(_forward, module)  # type: ignore[method-assign]

    def restore(self) -> None:
        module = self._module()
        if module is None or _PATCHED.pop(module, None) is not self:
            return
        TAKERS.discard(module)
        del module.forward
        if self._forward_before is not None:
            module.forward = self._forward_before  # type: ignore[method-assign]

    def use(self, x: Tensor, weight: Tensor) -> Use | None:
        """How this pass forms the weight's gradient; None for whole."""
        distributed = self._reduction.enter()
        optimizer = self._optimizer()
        if optimizer is None or not self._is_served(x, weight):
            return None
        given = self._inputs.of(x, self)
        use = self._projecting(x, given, weight, optimizer, distributed)
        if use is None:
            # A whole gradient, of an input that need not be saved.
            return Use(None, dtype=autocast_dtype(x)) if is_recomputed(x) else None
        keeps = self._keeps_input(optimizer, weight) or is_saved_anyway(x)
        products = given.products if self._shares else None
        return replace(use, keeps_input=keeps, dtype=autocast_dtype(x), products=products)

    def _projecting(
        self, x: Tensor, given: _Input, weight: Tensor, optimizer: LowRankAdamW, distributed: bool
    ) -> Use | None:
        """By the basis that is there, or by a first one; None where the gradient is to be whole."""
        if _holds_a_first_whole_gradient(optimizer, weight):
            return None
        projector = optimizer.wants(weight)
        if projector is not None:
            return Use(projector)
        if not self._may_begin(optimizer, weight):
            return None
        start = self._start
        if distributed and start != "random":
            # The same on every rank, without a word between them.
            start = "random"
            notice_once(
                logging.INFO,
                "first bases are random under DistributedDataParallel, whose ranks have no"
                " gradient in common yet",
            )
        return self._first_use(start, x, given, weight, optimizer)

    def _is_served(self, x: Tensor, weight: Tensor) -> bool:
        """Not under transforms, which hand over other weights, nor where nothing is trained."""
        return weight is self._weight() and is_plain_pass(x, weight)

    def _may_begin(self, optimizer: LowRankAdamW, weight: Tensor) -> bool:
        return self._start != "dense" and not _LOOKING_ON.get() and can_begin(optimizer, weight)

    def bases(self, optimizer: LowRankAdamW) -> dict[int, int] | None:
        """The rank of x P by its basis; None if x itself is needed."""
        weight = self._weight()
        state = None if weight is None else optimizer.state.get(weight)
        if not state or state["side"] == Side.LEFT:
            return None
        return {id(state["basis"]): state["rank"]}

    def _keeps_input(self, optimizer: LowRankAdamW, weight: Tensor) -> bool:
        """x is saved once for all of its layers, x P for each."""
        state = optimizer.state.get(weight)
        step = int(state["step"]) if state else 0
        if self._decided[0] != step:
            every = [sibling.bases(optimizer) for sibling in self.siblings]
            ranks = {basis: rank for bases in every for basis, rank in (bases or {}).items()}
            whole = sum(ranks.values()) >= weight.shape[1]
            self._decided = step, whole or None in every
        # In the first step it is wanted for the basis.
        return self._decided[1] or (step == 0 and self._start == "gradient")

    def _first_use(
        self, start: str, x: Tensor, given: _Input, weight: Tensor, optimizer: LowRankAdamW
    ) -> Use | None:
        side = optimizer.side_of(weight)
        shares = self._shares and side is Side.RIGHT

        def from_gradient(heads: Tensor, x: Tensor) -> Projector | None:
            if _holds_a_first_whole_gradient(optimizer, weight):
                return None
            projector = optimizer.wants(weight)
            if projector is None and shares:
                # The first to have a gradient decides for all, until their first refresh.
                self._share(given, optimizer)
                projector = optimizer.wants(weight)
            if projector is None:
                projector = self.begin(optimizer, weight, gradient=heads.mT @ x)
                if shares and projector is not None and not given.begun:
                    given.begun.append(self)
            return projector

        def from_heads(heads: Tensor, x: Tensor) -> Projector | None:
            return optimizer.wants(weight) or self.begin(optimizer, weight, like=heads.mT)

        if start == "gradient":
            return Use(None, from_gradient)
        if start == "activations" and side is Side.LEFT:
            return Use(None, from_heads)
        like = x.detach().reshape(-1, x.shape[-1]) if start == "activations" else None
        projector = self.begin(optimizer, weight, like=like)
        if projector is None:
            return None
        if shares:
            if not given.begun:
                given.begun.append(self)
            self._share(given, optimizer)
        return Use(Projector.of(optimizer.state[weight]))

    def _share(self, given: _Input, optimizer: LowRankAdamW) -> None:
        """Joins those whose first basis came from the same input, if it is like them."""
        if not given.begun or self in given.begun:
            return
        weights = [layer._weight() for layer in (*given.begun, self)]
        if share_first(optimizer, [each for each in weights if each is not None]):
            given.begun.append(self)


def _holds_a_first_whole_gradient(optimizer: LowRankAdamW, weight: Tensor) -> bool:
    """Of a micro-batch of the first step that could begin no basis: to G no R can be added."""
    if weight.grad is None or isinstance(weight.grad, ProjectedGradient):
        return False
    state = optimizer.state.get(weight)
    return not state or int(state["step"]) == 0


def is_plain_pass(x: Tensor, weight: Tensor) -> bool:
    """Whether autograd records a gradient of the weight, outside of transforms."""
    return (
        weight.requires_grad
        and torch.is_grad_enabled()
        and not x.is_inference()
        and not torch.jit.is_tracing()  # type: ignore[no-untyped-call]
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    )


@not_compiled
def _forward(module: nn.Linear, input: Tensor) -> Tensor:
    """In the place of `nn.Linear.forward`."""
    layer, weight = _PATCHED.get(module), module.weight
    use = None if layer is None else layer.use(input, weight)
    if use is None:
        return F.linear(input, weight, module.bias)
    projected: Tensor = ProjectedLinear.apply(input, weight, module.bias, use)  # type: ignore[no-untyped-call]
    return projected
