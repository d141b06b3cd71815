"""What a parameter and its gradient have to be for a step to be taken."""

import logging
import operator
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..factors.linear import all_trained_parts
from ..ops import Side
from ..ops.notices import notice_once
from .formats import has_low_bits
from .groups import Group, is_projected, named_params, side_for
from .outside import AMPLIFIED
from .parts import Method
from .placement import check_placement, divides, is_sharded
from .projected_gradient import ProjectedGradient, held, is_projected_gradient


def check_params(group: Group, index: int) -> None:
    """Raises if a parameter cannot be trained: complex, overlapping, projected and no matrix, or
    projected and a factor.
    """
    factors = all_trained_parts() if is_projected(group) else set()
    for name, param in named_params(group, index):
        if not isinstance(param, Tensor):
            continue  # torch refuses it with its own text
        # Frozen integer weights, as in quantized models, never have a gradient: they may stay.
        if param.is_complex() or (param.requires_grad and not param.is_floating_point()):
            raise TypeError(f"{name} is {param.dtype}; only real floating-point weights are served")
        check_memory(name, param)
        if is_projected(group):
            if param in factors:
                raise ValueError(
                    f"{name}, {tuple(param.shape)}, is a part of a FactoredLinear, of a low rank"
                    " already: take the rank out of its group, or use param_groups(model, rank),"
                    " and it is trained by AdamW"
                )
            check_matrix(name, param)


def tell_what_has_no_effect(groups: list[Group], method: Method) -> None:
    """Of what is asked for bfloat16 weights, where there are none.

    The optimizer of a single parameter, as gradient release uses them, is none to judge.
    """
    trained = [
        (group, param) for group in groups for param in group["params"] if param.requires_grad
    ]
    if len(trained) < 2:
        return
    if method.master and not any(has_low_bits(param, method.master) for _, param in trained):
        notice_once(logging.WARNING, "master=24 has no effect: it is for weights in bfloat16")
    rounded = (is_projected(group) and p.dtype is torch.bfloat16 for group, p in trained)
    if method.rounding == "stochastic" and not any(rounded):
        text = "rounding='stochastic' has no effect: it is for projected weights in bfloat16"
        notice_once(logging.WARNING, text)


def check_matrix(name: str, param: Tensor) -> None:
    """Raises ValueError if a projected parameter is no matrix."""
    if param.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(param.shape)} and {param.dtype}, but only matrices can be"
            " projected: put it in a group without rank. If it is a matrix that FSDP1 or DeepSpeed"
            " flattened, the low-rank optimizers need the whole matrix: use DDP or one device"
        )


def check_sharded(
    name: str, param: Tensor, group: Group, method: Method, process_group: object
) -> None:
    """Raises NotImplementedError or ValueError if a step cannot be taken with a parameter that is
    spread over processes.

    Args:
        name: of the parameter.
        param: of whatever kind.
        group: its options.
        method: the optimizer's parts.
        process_group: of an optimizer of copies, or None.
    """
    if not is_sharded(param):
        return
    if process_group is not None:
        raise NotImplementedError(
            f"{name} {tuple(param.shape)}, {param.dtype}, is a DTensor, whose mesh says who shares"
            " it, and process_group is for whole weights of which every rank has a copy: leave"
            " process_group out"
        )
    if method.capturable:
        raise NotImplementedError(
            f"{name} is a DTensor, whose gradients are new tensors at each step, and what is"
            " captured goes on with the old ones: leave capturable out"
        )
    if not is_projected(group):
        return
    check_placement(name, param, group["proj_type"])
    outside = method.outside
    refused = {
        "residual_momentum shares a scale between columns that are on several ranks": (
            divides(param, 1) and outside.residual_momentum > 0
        ),
        f"residual={outside.residual!r} sums over columns that are on several ranks": (
            divides(param, 1)
            and side_for(group, param) is Side.RIGHT
            and outside.residual in AMPLIFIED
        ),
        "monitor=True counts on one rank": method.monitor,
        "rounding='stochastic' draws by the place on one rank": method.rounding == "stochastic",
    }
    for reason, applies in refused.items():
        if applies:
            raise NotImplementedError(
                f"{name} is a DTensor in a group with a rank, and {reason}: leave that out, or put"
                " the parameter in a group without rank"
            )


def check_addressable(name: str, param: Tensor, backend: str) -> None:
    """Raises ValueError if a backend's kernels cannot reach a projected parameter's values."""
    if is_wrapped(param) and backend in ("native", "triton"):
        raise ValueError(
            f"{name} is a {type(param).__name__}, whose values lie in other tensors, where the"
            f" {backend} backend cannot reach them: name backend='reference', or put it in a group"
            " without rank"
        )


def check_memory(name: str, param: Tensor) -> None:
    """Raises ValueError if a step could not write to a parameter's own memory, element by element.

    Whatever slicing, transposing and permuting make of a dense tensor passes.
    """
    if param.is_neg():
        raise ValueError(
            f"{name} {_described(param)} is a view with a pending negation: call resolve_neg() on"
            " it before it becomes a parameter"
        )
    if param.layout != torch.strided or not param.numel():
        return
    reach = 0
    for stride, size in sorted(zip(param.stride(), param.shape, strict=True)):
        if size > 1 and stride <= reach:
            raise ValueError(
                f"{name} {_described(param)} overlaps itself, strides {tuple(param.stride())}:"
                " make it contiguous before it becomes a parameter"
            )
        reach += (size - 1) * stride


def check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    """Raises if a gradient cannot be used.

    torch compares shapes and devices where a gradient is assigned, but both may change after that.
    """
    if grad.shape != param.shape or grad.device != param.device:
        raise RuntimeError(
            f"{name} has shape {tuple(param.shape)} on {param.device}, and its gradient"
            f" {tuple(grad.shape)} on {grad.device}: call zero_grad() after a change of a weight"
        )
    if is_sharded(grad) != is_sharded(param):
        kinds = ["no DTensor", "a DTensor"]
        raise RuntimeError(
            f"{name} {_described(param)} is {kinds[is_sharded(param)]}, and its gradient is"
            f" {kinds[is_sharded(grad)]}: call zero_grad() after a change of a weight"
        )
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{name} has a sparse gradient ({grad.layout}); use sparse=False in its embedding or"
            " train it with torch.optim.SparseAdam"
        )
    if grad.is_complex():
        raise RuntimeError(f"{name} has a complex gradient ({grad.dtype})")


def check_projected_gradient(name: str, param: Tensor, serves: bool) -> None:
    """Raises RuntimeError if R is all that is known of a gradient, and a step needs more.

    Args:
        name: of the parameter.
        param: with a gradient.
        serves: whether R is all that its step needs.
    """
    if is_projected_gradient(param.grad) and not serves:
        raise RuntimeError(
            f"{name} {_described(param)} has a projected gradient, R alone, and its step needs the"
            " whole: call zero_grad() after a change of the method or of the groups, and"
            " project_linears or ProjectedGradients again"
        )


def check_projector(name: str, param: Tensor, state: dict[str, Any]) -> None:
    """Raises RuntimeError if a projected gradient is not of the basis that the state has."""
    grad = param.grad
    assert isinstance(grad, ProjectedGradient)
    assert grad.projector is not None
    if grad.projector.state is not state or not grad.projector.is_current():
        raise RuntimeError(
            f"{name} {_described(param)} has a gradient that was projected by another basis than"
            " its state holds: call zero_grad() after load_state_dict() and after each step"
        )


def _described(param: Tensor) -> str:
    return f"({tuple(param.shape)}, {param.dtype})"


def is_unresolved(tensor: Tensor) -> bool:
    """Whether its values are not in its memory: a pending negation, or a zero never written."""
    return tensor.is_neg() or tensor._is_zerotensor()


def resolved(grad: Tensor) -> Tensor:
    """The gradient with its values in memory, where kernels look for them."""
    return grad.resolve_neg().clone() if is_unresolved(grad) else grad


def extent(tensor: Tensor) -> int:
    """Bytes of a dense tensor; 0 of others, between whose elements others may lie."""
    return tensor.numel() * tensor.element_size() if is_dense(tensor) else 0


def is_wrapped(param: Tensor) -> bool:
    """Whether other tensors hold its values, as of shards and of quantized weights."""
    return hasattr(param, "__tensor_flatten__")


def is_dense(tensor: Tensor) -> bool:
    """Whether its elements fill its memory without gaps, in whatever order."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True


def overlap(addresses: list[int], extents: list[int]) -> bool:
    """Whether two of some spans of memory have a byte in common."""
    spans = sorted(pair for pair in zip(addresses, extents, strict=True) if all(pair))
    begins = [begin for begin, _ in spans]
    ends = [begin + size for begin, size in spans]
    return any(map(operator.gt, ends, begins[1:]))


def check_shared(owners: Iterable[tuple[str, Tensor, bool]]) -> None:
    """Raises ValueError if what a projected weight's step writes or reads is another weight's.

    Args:
        owners: name, weight with a gradient, and whether it is projected.
    """
    reach: _Span | None = None
    for span in sorted(span for owner in owners for span in _spans(*owner)):
        if (
            reach is not None
            and span.begin < reach.end
            and (span.written or reach.written)
            and (span.projected or reach.projected)
        ):
            raise ValueError(
                f"{span.owner} shares its memory with {reach.owner}: tie weights by using one"
                " parameter in both places, and give gradients memory of their own"
            )
        if reach is None or span.end > reach.end:
            reach = span


class _Span(NamedTuple):
    """Where a dense weight or gradient lies, and whose it is."""

    begin: int
    end: int
    owner: str
    projected: bool
    written: bool


def _spans(name: str, param: Tensor, projected: bool) -> Iterator[_Span]:
    """Of the weight and its gradient, if they fill their memory."""
    grad = None if param.grad is None else held(param.grad)
    for tensor, owner in ((param, name), (grad, f"the gradient of {name}")):
        size = 0 if tensor is None else extent(tensor)
        if tensor is not None and size and tensor.data_ptr():
            begin = tensor.data_ptr()
            yield _Span(begin, begin + size, owner, projected, tensor is param)
