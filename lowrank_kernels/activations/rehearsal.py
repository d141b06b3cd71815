"""A training step without memory: what forward and backward hold, moment by moment.

The model runs on the meta device, where tensors have a layout and no memory, by its own code and by
that of `project_linears` and `recompute_activations`. What it allocates is counted, so that any
model is planned, to the byte, and with the temporaries that no table of saved tensors has: those of
the loss, of a block's backward pass, of the first bases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ..ops.dry import meta_stands_for
from ..optim import first_bases
from ..optim.allocations import Allocations
from ..optim.groups import is_projected
from ..optim.lowrank_adamw import LowRankAdamW
from ..optim.projected_gradient import Projector, held
from ..optim.state import planned_state
from .dry_offload import DryOffload
from .project import ProjectedLinears, project_linears
from .recompute import recompute_activations


class Moment(NamedTuple):
    """When a parameter's gradient is whole, in bytes.

    Attributes:
        param: whose gradient it is.
        gradient: of what is held of it.
        live: of all that is held beside weights and state.
        peak: the most that was held since the moment before.
    """

    param: Tensor
    gradient: int
    live: int
    peak: int


@dataclass(frozen=True)
class Rehearsal:
    """Bytes beside weights and state in one forward and backward pass that begins without
    gradients.

    Attributes:
        saved: at the end of the forward pass.
        forward_peak: in it.
        moments: in the order of the backward pass.
        last_peak: after the last of them.
        out: that `offload` takes away meanwhile; what waits for that, and what is read ahead, is
            not in the others.
        products: operations of the matrix products in the forward pass, where something is taken
            away; attention's own are left out.
    """

    saved: int
    forward_peak: int
    moments: tuple[Moment, ...]
    last_peak: int
    out: int = 0
    products: int = 0

    @property
    def gradients(self) -> int:
        """All that are held at the end."""
        return sum(moment.gradient for moment in self.moments)

    @property
    def backward_peak(self) -> int:
        return max(self.last_peak, *(moment.peak for moment in self.moments))

    def backward_peak_of_one(self, workspaces: dict[Tensor, int]) -> int:
        """With each gradient released once its step, which takes so much, was taken."""
        peak = released = 0
        for moment in self.moments:
            stepping = moment.live + workspaces.get(moment.param, 0)
            peak = max(peak, moment.peak - released, stepping - released)
            released += moment.gradient
        return max(peak, self.last_peak - released)

    def backward_peak_of_more(self) -> int:
        """With the gradients of a pass before, to which these are added."""
        return self.gradients + self.backward_peak_of_one({})

    def between(self, other: Rehearsal, share: float) -> Rehearsal:
        """On the line from this one to another of the same model, so far from the first."""

        def line(first: int, second: int) -> int:
            return math.ceil(first + (second - first) * share)

        moments = (
            Moment(a.param, a.gradient, line(a.live, b.live), line(a.peak, b.peak))
            for a, b in zip(self.moments, other.moments, strict=True)
        )
        return Rehearsal(
            line(self.saved, other.saved),
            line(self.forward_peak, other.forward_peak),
            tuple(moments),
            line(self.last_peak, other.last_peak),
            line(self.out, other.out),
            line(self.products, other.products),
        )


class Conditions(NamedTuple):
    """How a model is trained.

    Attributes:
        device_type: where, "cpu" or "cuda".
        memory: bytes of the GPU, None for a small one.
        checkpointing: of blocks, as transformers does it.
        recompute: by `recompute_activations`.
        project: by `project_linears` with this optimizer over the model's parameters.
        offload: share of what is saved that `offload_activations` takes away, the first part of it.
    """

    device_type: str
    memory: int | None = None
    checkpointing: bool = False
    recompute: bool = False
    project: LowRankAdamW | None = None
    offload: float = 0.0


def rehearse(model: nn.Module, tokens: int, conditions: Conditions) -> list[Rehearsal]:
    """One sequence of so many tokens through a model on the meta device.

    Args:
        model: of transformers, that takes `input_ids` and `labels` and returns a loss.
        tokens: in a micro-batch; several sequences take the same, but for positions.
        conditions: how it is trained.

    Returns:
        The passes that differ: one; with `project` the first, which finds the bases, and a later
        one in which the basis of the largest matrix of the last block is due.
    """
    optimizer, undo = conditions.project, []
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    _prepare(model, conditions)
    with meta_stands_for(conditions.device_type, conditions.memory):
        try:
            if conditions.recompute:
                undo.append(recompute_activations(model).undo)
            if optimizer is not None:
                _new_states(optimizer)
                report = project_linears(model, optimizer)
                undo.append(report.undo)
                _begin_each_kind_once(report, optimizer)
            passes = [_pass(model, ids, conditions)]
            if optimizer is not None:
                _to_a_later_step(optimizer)
                passes.append(_pass(model, ids, conditions))
            return passes
        finally:
            for each in reversed(undo):
                each()
            if optimizer is not None:
                optimizer.state.clear()


def _prepare(model: Any, conditions: Conditions) -> None:
    model.train()
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = False
    # As newer and as older versions of transformers call it.
    new = hasattr(model, "activation_checkpointing_enable")
    kind = "activation" if new else "gradient"
    if conditions.checkpointing:
        # Modes are off in a backward pass.
        options = {
            "use_reentrant": False,
            "context_fn": lambda: (nullcontext(), _Attention(conditions.device_type)),
        }
        getattr(model, f"{kind}_checkpointing_enable")(options)
    elif getattr(model, f"is_{kind}_checkpointing"):
        getattr(model, f"{kind}_checkpointing_disable")()


def _new_states(optimizer: LowRankAdamW) -> None:
    """State of its own is no part of what is counted."""
    optimizer.state.clear()
    for group in filter(is_projected, optimizer.param_groups):
        for param in group["params"]:
            optimizer.state[param].update(planned_state(param, group, optimizer.method))


def _begin_each_kind_once(report: ProjectedLinears, optimizer: LowRankAdamW) -> None:
    """First bases of matrices that are alike take the same: the second and later ones allocate so
    much at once, which is faster than the operations of a factorization.
    """
    known: dict[object, int] = {}

    def begin(
        _: LowRankAdamW,
        param: Tensor,
        *,
        gradient: Tensor | None = None,
        like: Tensor | None = None,
    ) -> Projector:
        key = param.shape, gradient is None, None if like is None else like.shape
        if key in known:
            torch.empty(known[key], dtype=torch.uint8, device="meta")
            optimizer.state[param]["basis_step"] = 0
        else:
            with Allocations() as allocations:
                first_bases.begin(optimizer, param, gradient=gradient, like=like)
            known[key] = allocations.peak_bytes
        return Projector.of(optimizer.state[param])

    for layer in report.layers:
        layer.begin = begin


def _pass(model: nn.Module, ids: Tensor, conditions: Conditions) -> Rehearsal:
    params = [param for param in model.parameters() if param.requires_grad]
    for param in params:
        param.grad = None
    away, products = None, 0
    if conditions.offload:
        away, products = _offloading(model, ids, conditions)
    with _Allocations() as allocations, _Attention(conditions.device_type), torch.enable_grad():
        ids = ids.clone()
        with away or nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        saved, forward_peak = allocations.live_bytes, allocations.peak_bytes
        moments: list[Moment] = []

        def whole(param: Tensor) -> None:
            assert param.grad is not None
            size = held(param.grad).nbytes
            moments.append(Moment(param, size, allocations.live_bytes, allocations.peak_bytes))
            allocations.peak_bytes = allocations.live_bytes

        allocations.peak_bytes = saved
        with _called_at_gradients(params, whole):
            loss.backward()
        out = 0 if away is None else away.out
        found = Rehearsal(
            saved, forward_peak, tuple(moments), allocations.peak_bytes, out, products
        )
        for param in params:
            param.grad = None
    return found


def _offloading(model: nn.Module, ids: Tensor, conditions: Conditions) -> tuple[DryOffload, int]:
    """For a pass of which a share goes out, found by a forward before it, and its products."""
    everything, counted = DryOffload(model), FlopCounterMode(display=False)
    # Values that the code asks for are known to the second of the modes.
    modes = counted, _Allocations(), _Attention(conditions.device_type)
    with ExitStack() as stack:
        for each in (*modes, torch.enable_grad(), everything):
            stack.enter_context(each)
        model(input_ids=ids, labels=ids)
    operations = counted.get_flop_counts()["Global"]
    products = sum(n for name, n in operations.items() if "attention" not in str(name))
    return DryOffload(model, conditions.offload * everything.packed), products


@contextmanager
def _called_at_gradients(params: list[nn.Parameter], hook: Any) -> Iterator[None]:
    handles = [param.register_post_accumulate_grad_hook(hook) for param in params]  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _to_a_later_step(optimizer: LowRankAdamW) -> None:
    """As if all had taken a step, and the largest matrix that is used last had no basis yet."""
    due = None
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state.get(param)
            if is_projected(group) and state:
                state["step"].add_(1)
                if due is None or param.numel() >= due.numel():
                    due = param
    if due is not None:
        optimizer.state[due]["basis_step"] = -1


class _Allocations(Allocations):  # type: ignore[no-untyped-call]
    """Values that the code asks for are 1 and true, as that there is no padding."""

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if operation is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        return super().__torch_dispatch__(operation, types, args, kwargs)


class _Attention(TorchFunctionMode):
    """torch's attention by the kernel that it takes on the device; on the meta device it would
    write all scores.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._on_gpu = device_type == "cuda"

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attention(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        aten = torch.ops.aten
        flash = self._on_gpu and attn_mask is None and query.dtype.itemsize == 2
        if enable_gqa and not flash:
            repeats = query.shape[1] // key.shape[1]
            key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
        inputs = query, key, value
        if flash:
            found = aten._scaled_dot_product_flash_attention(
                *inputs, dropout_p, is_causal, scale=scale
            )
        elif self._on_gpu:
            found = aten._scaled_dot_product_efficient_attention(
                *inputs, attn_mask, True, dropout_p, is_causal, scale=scale
            )
        else:
            found = aten._scaled_dot_product_flash_attention_for_cpu(
                *inputs, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        attention: Tensor = found[0]
        return attention
