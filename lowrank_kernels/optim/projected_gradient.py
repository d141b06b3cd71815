"""The gradient of a weight of which only the projection was ever computed."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.bases import loaded_basis
from ..ops.contract import Side, moment_dtype, projected_shape
from ..ops.products import fast_in_half, project

State = dict[str, Any]
aten = torch.ops.aten

GRAD = attrgetter("grad")


class Projector(NamedTuple):
    """What projects a weight's gradient: the basis that its state had at some time.

    Attributes:
        state: of the weight.
        basis_step: steps that it had taken when the basis was computed.
    """

    state: State
    basis_step: int

    @classmethod
    def of(cls, state: State) -> "Projector":
        """The one that a state has now."""
        return cls(state, state["basis_step"])

    @property
    def side(self) -> Side:
        return Side(self.state["side"])

    @property
    def rank(self) -> int:
        return int(self.state["basis"].shape[1])

    def is_current(self) -> bool:
        """Whether the state still has this basis."""
        return bool(self.state["basis_step"] == self.basis_step)

    def basis(self) -> Tensor:
        """P, rows x r on the left, cols x r on the right, in the dtype of the weight.

        Raises:
            RuntimeError: the state has another one by now.
        """
        if not self.is_current():
            raise RuntimeError(
                "a basis was renewed between a forward pass and the use of its gradient: call"
                " zero_grad() after each step"
            )
        return loaded_basis(self.state)

    def project(self, gradient: Tensor) -> Tensor:
        """R of a whole gradient, in float32 (float64 for float64), whatever autocast asks for."""
        basis, kind, wide = self.basis(), gradient.device.type, moment_dtype(gradient.dtype)
        inner = gradient.dtype if fast_in_half(gradient, basis, kind) else wide
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        with torch.autocast(kind, enabled=False) if casts else nullcontext():
            return project(gradient.to(inner), basis.to(inner), self.side).to(wide)

    def is_same(self, other: "Projector | None") -> bool:
        """Whether what they project may be added up."""
        if other is None:
            return False
        return self.state is other.state and self.basis_step == other.basis_step


class ProjectedGradient(Tensor):
    """G, rows x cols, known by R = G P (right side) or P^T G (left side) alone.

    It has the shape and the dtype of G, and its norm is that of R: of what a step applies. It can
    be added up, scaled, clipped by the 2-norm, unscaled by a GradScaler and set to zero. All else
    needs G: `dense()` gives what R tells of it.

    Attributes:
        held: R, rows x r or r x cols, in float32 (float64 for float64 weights), or G itself where a
            dense gradient was added to none.
        projector: of R; None if G is held.
    """

    held: Tensor
    projector: Projector | None
    _empty: bool

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        held: Tensor,
        projector: Projector | None,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> "ProjectedGradient":
        make: Callable[..., ProjectedGradient] = torch.Tensor._make_wrapper_subclass
        gradient = make(cls, tuple(shape), dtype=dtype, device=held.device)
        gradient.held, gradient.projector, gradient._empty = held, projector, False
        return gradient

    def dense(self) -> Tensor:
        """R P^T on the right, P R on the left: the part of G in the span of the basis, in the dtype
        of the gradient.

        Raises:
            RuntimeError: the basis was renewed since.
        """
        if self.projector is None:
            return self.held
        basis = self.projector.basis().to(self.held.dtype)
        right = self.projector.side is Side.RIGHT
        return (self.held @ basis.mT if right else basis @ self.held).to(self.dtype)

    def __repr__(self, **_: object) -> str:  # type: ignore[override]
        kind = (
            "G" if self.projector is None else f"R of the {self.projector.side.name.lower()} side"
        )
        return (
            f"ProjectedGradient({tuple(self.shape)}, {self.dtype}, {self.device}, holds {kind},"
            f" {tuple(self.held.shape)})"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        function: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        served = _SERVED.get(function)
        if served is None:
            raise RuntimeError(_needs_all(function))
        return served(function, args, kwargs or {})

    def _with(self, held: Tensor) -> "ProjectedGradient":
        other = ProjectedGradient(held, self.projector, self.shape, self.dtype)
        other._empty = self._empty
        return other

    def _add(self, other: Tensor, alpha: float = 1) -> None:
        """In place. A dense one comes from a use of the weight outside of its layer."""
        theirs = other.projector if isinstance(other, ProjectedGradient) else None
        if self._empty:
            # What was set to zero may have been of a basis that is gone.
            self.held, self.projector = held(other) * alpha, theirs
            self._empty = False
        elif self.projector is None and theirs is not None:
            self.held, self.projector = theirs.project(self.held), theirs
            self.held.add_(held(other), alpha=alpha)
        elif self.projector is not None and theirs is None:
            self.held.add_(self.projector.project(held(other)), alpha=alpha)
        elif self.projector is None or self.projector.is_same(theirs):
            self.held.add_(held(other), alpha=alpha)
        else:
            raise RuntimeError(
                f"gradients of a {tuple(self.shape)} weight with different bases cannot be added"
                " up: call zero_grad() after each step"
            )


def held(gradient: Tensor) -> Tensor:
    """What is in memory of a gradient: R of a projected one."""
    return gradient.held if isinstance(gradient, ProjectedGradient) else gradient


def is_projected_gradient(gradient: Tensor | None) -> bool:
    """Whether R is held, and no G."""
    return isinstance(gradient, ProjectedGradient) and gradient.projector is not None


def grads_of(params: Iterable[Tensor]) -> list[Tensor]:
    """What is in memory of the gradients of parameters that have one."""
    grads: list[Tensor] = list(map(GRAD, params))
    return list(map(held, grads)) if ProjectedGradient in map(type, grads) else grads


def new_gradient(
    projected: Tensor, projector: Projector, shape: Sequence[int], dtype: torch.dtype
) -> ProjectedGradient:
    """Of a weight of a shape and dtype, from R in any floating dtype."""
    rows, cols = shape
    expected = projected_shape((rows, cols), projector.side, projector.rank)
    assert projected.shape == expected, (projected.shape, expected)
    wide = projected.to(moment_dtype(dtype)).contiguous()
    return ProjectedGradient(wide, projector, shape, dtype)


def _needs_all(function: Any) -> str:
    text = (
        f"{function} needs a whole gradient, and of this one only a projection is known, for"
        " lowrank_kernels.project_linears or ProjectedGradients is at work: step it with the"
        " optimizer given there, clip by norm and not by value, let zero_grad() free gradients"
        " (set_to_none=True), or take .dense() for what lies in the span of its basis"
    )
    if function is aten.mul.out:
        text += (
            ". DistributedDataParallel has to wrap the very module that was given there, as model=,"
            " and after that"
        )
    return text


def _every(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As the operation, on what is held."""
    return function(*_unwrapped(args), **kwargs)


def _unwrapped(args: Iterable[Any]) -> list[Any]:
    return [list(map(held, x)) if isinstance(x, (list, tuple)) and x and isinstance(x[0], Tensor)
            else held(x) if isinstance(x, Tensor) else x for x in args]  # fmt: skip


def _scaled(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """By one number: any other factor is of the shape of G."""
    first, factor = args
    if not isinstance(first, ProjectedGradient) or isinstance(factor, ProjectedGradient):
        raise RuntimeError(_needs_all(function))
    if isinstance(factor, Tensor) and factor.numel() != 1:
        raise RuntimeError(_needs_all(function))
    if function in (aten.mul_.Tensor, aten.div_.Tensor, aten.mul_.Scalar, aten.div_.Scalar):
        function(first.held, factor)
        return first
    return first._with(function(first.held, factor))


def _all_scaled(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    factors = args[1] if isinstance(args[1], (list, tuple)) else [args[1]]
    if any(isinstance(factor, Tensor) and factor.numel() != 1 for factor in factors):
        raise RuntimeError(_needs_all(function))
    return _every(function, args, kwargs)


def _norm(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    if order != 2 or any(x is not None for x in args[2:]) or kwargs.get("dim") is not None:
        raise RuntimeError(
            f"of a projected gradient only the 2-norm of the whole is known, not ord={order}: clip"
            " by norm_type=2"
        )
    return _every(function, args, kwargs)


def _add(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first, other = args
    alpha = kwargs.get("alpha", 1)
    if not (isinstance(first, Tensor) and isinstance(other, Tensor)):
        raise RuntimeError(_needs_all(function))
    if not isinstance(first, ProjectedGradient):
        if alpha != 1:
            raise RuntimeError(_needs_all(function))
        first, other = other, first
    total = first._with(first.held.clone())
    total._add(other, alpha)
    return total


def _add_(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    first, other = args
    if not isinstance(first, ProjectedGradient) or not isinstance(other, Tensor):
        raise RuntimeError(f"{_needs_all(function)}; the gradient that is there is whole")
    first._add(other, **kwargs)
    return first


def _zero_(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for gradient in args[0] if isinstance(args[0], (list, tuple)) else args[:1]:
        held(gradient).zero_()
        if isinstance(gradient, ProjectedGradient):
            gradient._empty = True
    return args[0] if isinstance(args[0], Tensor) else None


def _unscale(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """R may be of another dtype than the gradients beside it."""
    grads, found_inf, inverse = args
    for gradient in map(held, grads):
        function([gradient], found_inf, inverse)


def _same(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]._with(args[0].held)


def _copy(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0]._with(args[0].held.clone())


_SERVED: dict[Any, Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: _copy,
    aten.mul.Tensor: _scaled,
    aten.mul.Scalar: _scaled,
    aten.div.Tensor: _scaled,
    aten.div.Scalar: _scaled,
    aten.mul_.Tensor: _scaled,
    aten.mul_.Scalar: _scaled,
    aten.div_.Tensor: _scaled,
    aten.div_.Scalar: _scaled,
    aten.add.Tensor: _add,
    aten.add_.Tensor: _add_,
    aten.zero_.default: _zero_,
    aten._foreach_zero_.default: _zero_,
    aten.linalg_vector_norm.default: _norm,
    aten._foreach_norm.Scalar: _norm,
    aten.isnan.default: _every,
    aten._foreach_mul_.Tensor: _all_scaled,
    aten._foreach_mul_.Scalar: _all_scaled,
    aten._foreach_div_.Tensor: _all_scaled,
    aten._foreach_div_.Scalar: _all_scaled,
    aten._amp_foreach_non_finite_check_and_unscale_.default: _unscale,
}
