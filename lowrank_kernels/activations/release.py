"""Gradients that are gone as soon as they were used: each step is taken in the backward pass."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..optim import LowRankAdamW
from ..optim.alone import Alone, each_alone
from ..optim.checks import check_shared, is_sharded, is_wrapped
from ..optim.groups import is_projected, named_groups

# What flattens or averages gradients after the backward pass has handed them over.
WRAPPERS = {
    "DistributedDataParallel": "DistributedDataParallel averages gradients after they are released",
    "FullyShardedDataParallel": "FSDP1 hands flat gradients over",
}
WAY_OUT = "train without release_gradients, or shard the model by fully_shard"

_SECOND = (
    "a second gradient before optimizer.step(). With release_gradients every backward pass is a"
    " step, so that gradients cannot be accumulated: call optimizer.step() after each backward"
    " pass, in place of accumulation take a larger batch, and where activation checkpointing"
    " repeats a weight that is used twice, use_reentrant=False"
)
_CLIPPED = (
    "its gradient was released in the backward pass, before the norm of all gradients was known."
    " release_gradients(..., clip=...) limits each parameter's own norm; here leave clipping out,"
    " in the HF Trainer by max_grad_norm=0, in Lightning by no gradient_clip_val"
)
_SCALED = (
    "its step was taken in the backward pass, with the gradient that a GradScaler had scaled and"
    " now cannot unscale. Load the weights and the optimizer anew, and train in bfloat16, which"
    " needs no GradScaler, or without release_gradients"
)
_GONE = "its gradient was released in the backward pass, which has taken its step"


class Released(Tensor):
    """Stands in `param.grad`, without memory, for a gradient that was released, until the next
    `optimizer.step()` or `zero_grad()`: what would change the gradient is told that it is gone.

    Its norm is infinite. A limit on it makes a factor of 0, which is refused; who only asks for it,
    as the HF Trainer does by max_norm=inf, makes one of NaN, which passes.
    """

    lowrank_name: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def of(param: Tensor, name: str) -> Released:
        """In the place of a parameter's gradient."""
        own: Released = Tensor._make_wrapper_subclass(
            Released, param.shape, strides=param.stride(), dtype=param.dtype, device=param.device
        )
        own.lowrank_name = name
        return own

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        aten, what = torch.ops.aten, operation.overloadpacket
        first = args[0][0] if isinstance(args[0], (list, tuple)) else args[0]
        if what is aten.linalg_vector_norm:
            return torch.full((), math.inf, dtype=first.dtype, device=first.device)
        if what in (aten.zero_, aten._foreach_zero_, aten.detach):
            return args[0]
        if what is aten.mul_ and math.isnan(float(args[1])):
            return args[0]
        reasons = {
            aten.add_: _SECOND,
            aten.mul_: _CLIPPED,
            aten.clamp_: _CLIPPED,
            aten._foreach_norm: _CLIPPED,
            aten._foreach_clamp_min_: _CLIPPED,
            aten._amp_foreach_non_finite_check_and_unscale_: _SCALED,
        }
        raise RuntimeError(f"{_name(args)}: {reasons.get(what, f'{_GONE} ({operation})')}")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Released({self.lowrank_name}, shape={tuple(self.shape)})"


def _name(args: Any) -> str:
    """Of the first that was released."""
    flat = (each for arg in args for each in (arg if isinstance(arg, (list, tuple)) else (arg,)))
    names = (each.lowrank_name for each in flat if isinstance(each, Released))
    return next(names, "a parameter")


class _Hook(NamedTuple):
    """Of a parameter, in torch's hands."""

    release: weakref.ref[GradientRelease]

    def __call__(self, param: Tensor) -> None:
        release = self.release()
        if release is not None:
            release._step(param)


class GradientRelease:
    """What `release_gradients` returns: `remove()` ends it, as does leaving a `with` block."""

    def __init__(
        self, model: nn.Module | None, optimizer: LowRankAdamW, clip: float | None
    ) -> None:
        self._optimizer, self._clip = optimizer, clip
        self._groups: list[int] = []
        self._each: dict[Tensor, Alone] = {}
        self._stepped: dict[Tensor, None] = {}
        self._handles: list[Any] = [
            # The optimizer keeps this object; parameters do not, whose hooks Python's garbage
            # collector does not see.
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        hook = _Hook(weakref.ref(self))
        for _, param, _ in _named_params(optimizer):
            if param.requires_grad:
                self._handles.append(param.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        if model is not None:
            self._handles.append(model.register_forward_pre_hook(_check_no_ranks))

    def remove(self) -> None:
        """Ends it: gradients stay until `optimizer.step()` uses them, as before."""
        for handle in self._handles:
            handle.remove()
        self._after_backward()
        self._handles, self._each, self._groups = [], {}, []
        self._stepped.clear()

    def __str__(self) -> str:
        count = sum(param.requires_grad for _, param, _ in _named_params(self._optimizer))
        ended = "" if self._handles else " no more"
        return f"gradients of {count} parameters are released in the backward pass{ended}"

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _step(self, param: Tensor) -> None:
        """Called as soon as the gradient of a parameter is whole."""
        alone = self._alone(param)
        if param in self._stepped:
            raise RuntimeError(f"{alone.name}: {_SECOND}")
        if self._clip is not None:
            nn.utils.clip_grad_norm_([param], self._clip)
        alone.take_step()
        self._stepped[param] = None
        # Sharded and other wrapped gradients are told apart by their class.
        param.grad = None if is_wrapped(param) else Released.of(param, alone.name)

    def _alone(self, param: Tensor) -> Alone:
        """All are made anew once the groups are others, as after a state dict was loaded."""
        groups = list(map(id, self._optimizer.param_groups))
        if groups != self._groups:
            self._each, self._groups = each_alone(self._optimizer), groups
        return self._each[param]

    def _before_step(self, _: object, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A closure goes backward within the step."""
        self._after_backward()
        own, *rest = args
        closure = rest[0] if rest else kwargs.get("closure")
        if closure is None:
            return None

        def run() -> float:
            loss: float = closure()
            self._after_backward()
            return loss

        return (own, run), {}

    def _after_backward(self) -> None:
        """Nothing is left of what was released."""
        for param in self._stepped:
            if isinstance(param.grad, Released):
                param.grad = None

    def _after_step(self, *_: object) -> None:
        self._stepped.clear()


def release_gradients(
    model: nn.Module | None, optimizer: LowRankAdamW, *, clip: float | None = None
) -> GradientRelease:
    """Takes each parameter's step in the backward pass, as soon as its gradient is whole, and frees
    the gradient: there never is more than one matrix' of them.

        release_gradients(model, optimizer)
        for batch in batches:
            model(**batch).loss.backward()       # every parameter's step
            optimizer.step()                     # nothing is left to do
            scheduler.step()
            optimizer.zero_grad()                # nor here

    On a CPU weights, states, checkpoints and resumed runs have the bits that they have without it.
    On a GPU equal matrices have their bases computed together, and kernels are cut by how many
    there are, so that last bits may differ; random numbers and the steps at which bases change do
    not. Options of groups are read at each step.

    `optimizer.step()` after each backward pass tells one from the next; it also steps parameters
    that are not released: those that were frozen when this was called, or were added later.

    Without all gradients there is no norm of all, no accumulation and no second look. These raise
    RuntimeError, by the name of a parameter and with the way out: a second backward pass before
    `optimizer.step()`, clipping by the norm of all gradients, and a GradScaler, whose first scaled
    gradients have been used by then. An exception within the backward pass leaves those parameters
    stepped that it had come to; call `optimizer.step()` before the next one.

    Args:
        model: whose parameters are trained, to refuse what averages gradients after the backward
            pass; None to leave that to you.
        optimizer: any of this package; a parameter's gradient may have any shape and layout that it
            takes. Sharded parameters (`fully_shard`) are released where torch calls their hooks.
        clip: the largest norm of a parameter's gradient, by itself: a larger one is scaled down to
            it, as by `torch.nn.utils.clip_grad_norm_([param], clip)`. None leaves gradients alone.

    Returns:
        A handle with `remove()`, after which all is as before.

    Raises:
        TypeError: the optimizer is none of this package (pass it before accelerate wraps it), or
            the model is none.
        ValueError: a parameter is released already, by this or another optimizer, or shares its
            memory with another; none is of the model; `clip` is no positive number.
        NotImplementedError: the model is wrapped in DistributedDataParallel or FSDP1, the optimizer
            has a `process_group`, or `clip` is given and a parameter is sharded.

    Source: LOMO (arXiv 2306.09782); GaLore (arXiv 2403.03507), section 4.4, per-layer weight
    updates.
    """
    if not isinstance(optimizer, LowRankAdamW):
        raise TypeError(
            f"release_gradients takes an optimizer of lowrank_kernels, not"
            f" {type(optimizer).__name__}: pass it before it is wrapped, as by accelerate"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module or None, got {type(model).__name__}")
    if clip is not None and (
        isinstance(clip, bool) or not isinstance(clip, Real) or not 0 < clip < math.inf
    ):
        raise ValueError(f"clip must be a positive, finite number or None, got {clip!r}")
    for module in () if model is None else model.modules():
        if reason := WRAPPERS.get(type(module).__name__):
            raise NotImplementedError(f"{reason}: {WAY_OUT}")
    if optimizer.process_group is not None:
        raise NotImplementedError(
            "the optimizer has a process_group, whose ranks would wait for each other in the middle"
            " of their backward passes: leave process_group out"
        )
    own = set() if model is None else set(model.parameters())
    if model is not None and own.isdisjoint(param for _, param, _ in _named_params(optimizer)):
        raise ValueError("the optimizer trains no parameter of this model")
    for name, param, projected in _named_params(optimizer):
        if projected and is_sharded(param):
            raise NotImplementedError(
                f"{name} is a DTensor in a group with a rank, whose step waits for other ranks:"
                " call optimizer.step() after the backward pass instead"
            )
        if clip is not None and is_wrapped(param):
            raise NotImplementedError(
                f"{name} is a {type(param).__name__}: its norm would wait for other ranks in the"
                " middle of their backward passes: leave clip out"
            )
        hooks = getattr(param, "_post_accumulate_grad_hooks", None) or {}
        if any(isinstance(hook, _Hook) and hook.release() for hook in hooks.values()):
            raise ValueError(
                f"{name} is released already: remove() the other release, of this optimizer or of"
                " another that shares the parameter"
            )
    check_shared(_named_params(optimizer))
    return GradientRelease(model, optimizer, clip)


def _named_params(optimizer: LowRankAdamW) -> Iterator[tuple[str, Tensor, bool]]:
    """Name, parameter, and whether it is projected."""
    for _, group, named in named_groups(optimizer.param_groups):
        for name, param, _ in named:
            yield name, param, is_projected(group)


def _check_no_ranks(*_: object) -> None:
    """Before a forward pass of the model, which may have been wrapped since."""
    if DistributedDataParallel._active_ddp_module is not None:
        raise NotImplementedError(f"{WRAPPERS['DistributedDataParallel']}: {WAY_OUT}")
