"""Under DistributedDataParallel: R is averaged over the ranks, not a gradient of full size.

By collectives of its own, and not as a communication hook of torch's: what such a hook is given are
buckets that hold G, all of it, a second time, and what it returns is copied back into whole
gradients. It would also take the one place there is for hooks that compress what is left.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..optim.families import BASIS
from ..optim.lowrank_adamw import LowRankAdamW
from ..optim.projected_gradient import held

# Of a bucket that is sent at once, as DistributedDataParallel has it.
BUCKET_BYTES = 25 * 2**20


class Reduction:
    """Averages the gradients of some weights that DistributedDataParallel is told to ignore.

    It happens at the end of each backward pass in which that synchronizes, of a checkpointed part
    by itself, before anyone reads a norm: what was accumulated under `no_sync` goes along, and each
    rank sends r / n of what it would. They are sent in the dtype of the weights, as other gradients
    are. Ranks have to use the same layers. Weights, and bases that are there before the first pass
    under the wrapper, are those of the first rank from then on.

    Args:
        model: as it is going to be wrapped.
        weights: of it, by all names that each has.
        optimizer: of the weights.
    """

    def __init__(
        self, model: nn.Module, weights: dict[str, Tensor], optimizer: LowRankAdamW
    ) -> None:
        self._model, self._optimizer = weakref.ref(model), weakref.ref(optimizer)
        # torch looks for those of the outermost module under two names.
        self._names = {*weights, *(f".{name}" for name in weights if "." not in name)}
        self._weights = list(dict.fromkeys(weights.values()))
        self._wrapper: weakref.ref[nn.parallel.DistributedDataParallel] | None = None
        self._synchronizes = False
        self._pending: list[Tensor] = []
        # torch's hooks of parameters are not seen by Python's garbage collector.
        hook = _Hook(weakref.ref(self))
        self._handles = [
            weight.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            for weight in self._weights
        ]
        ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
        model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
            *ignored, *sorted(self._names)
        ]  # fmt: skip

    def end(self) -> None:
        """Raises RuntimeError if a wrapper counts on this."""
        if self._wrapper is not None and self._wrapper() is not None:
            raise RuntimeError(
                "DistributedDataParallel leaves the average of these weights' gradients to"
                " lowrank_kernels: wrap the model anew to undo that"
            )
        for handle in self._handles:
            handle.remove()
        model = self._model()
        if model is not None:
            ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", ())
            model._ddp_params_and_buffers_to_ignore = [  # type: ignore[assignment]
                name for name in ignored if name not in self._names
            ]

    def enter(self) -> bool:
        """Called in every forward pass; whether other ranks may be at work."""
        if not dist.is_available() or not dist.is_initialized():
            return False
        wrapper = nn.parallel.DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if wrapper is not None:
            if self._wrapper is None or self._wrapper() is not wrapper:
                self._wrapper = weakref.ref(wrapper)
                self._agree(wrapper)
            self._synchronizes = wrapper.require_backward_grad_sync
            # Of a backward pass that failed.
            self._pending = []
        return dist.get_world_size() > 1

    @torch.no_grad()
    def _agree(self, wrapper: nn.parallel.DistributedDataParallel) -> None:
        """Takes over what the first rank has."""
        optimizer = self._optimizer()
        states = {} if optimizer is None else optimizer.state
        for weight in self._weights:
            state = states.get(weight, {})
            for own in (weight.detach(), *(state[name] for name in BASIS if name in state)):
                dist.broadcast(own, _first_rank(wrapper), wrapper.process_group)

    def _accumulated(self, weight: Tensor) -> None:
        if self._wrapper is None or not self._synchronizes:
            return
        if not self._pending:
            torch.autograd.Variable._execution_engine.queue_callback(self._average)
        self._pending.append(weight)

    @torch.no_grad()
    def _average(self) -> None:
        wrapper = None if self._wrapper is None else self._wrapper()
        assert wrapper is not None
        group = wrapper.process_group
        count = dist.get_world_size(group)
        for grads, dtype in self._buckets():
            flat = torch.cat([grad.flatten().to(dtype) for grad in grads]).div_(count)
            dist.all_reduce(flat, group=group)
            means = torch.split(flat, [grad.numel() for grad in grads])
            for grad, mean in zip(grads, means, strict=True):
                grad.copy_(mean.view_as(grad))

    def _buckets(self) -> Iterator[tuple[list[Tensor], torch.dtype]]:
        bucket: list[Tensor] = []
        size, dtype = 0, None
        pending, self._pending = self._pending, []
        for weight in pending:
            assert weight.grad is not None
            grad = held(weight.grad)
            if bucket and (weight.dtype is not dtype or size >= BUCKET_BYTES):
                assert dtype is not None
                yield bucket, dtype
                bucket, size = [], 0
            dtype = weight.dtype
            bucket.append(grad)
            size += grad.numel() * dtype.itemsize
        if bucket:
            assert dtype is not None
            yield bucket, dtype


class _Hook(NamedTuple):
    """Of a weight, in torch's hands."""

    reduction: weakref.ref[Reduction]

    def __call__(self, weight: Tensor) -> None:
        reduction = self.reduction()
        if reduction is not None:
            reduction._accumulated(weight)


def is_reduced(weight: Tensor) -> bool:
    """Whether somebody averages its gradients here already."""
    hooks = getattr(weight, "_post_accumulate_grad_hooks", None) or {}
    return any(isinstance(hook, _Hook) and hook.reduction() for hook in hooks.values())


def _first_rank(wrapper: nn.parallel.DistributedDataParallel) -> int:
    return dist.get_global_rank(wrapper.process_group, 0)
