"""AdamW for the parameters that are not projected, by torch's own implementation."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from ..ops.contract import moment_dtype
from .groups import Group

FUSED_DEVICES = ("cpu", "cuda")

# Elements that are widened at a time: their copies stay in a cache, and an embedding's would be
# hundreds of megabytes. The number for CUDA was not measured.
BLOCK_ELEMENTS = {"cpu": 2**18, "cuda": 2**23}


class Work(NamedTuple):
    """A parameter, or a piece of one, with what AdamW needs of it."""

    param: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor

    @property
    def dtypes(self) -> set[torch.dtype]:
        return {self.param.dtype, self.grad.dtype, self.exp_avg.dtype}

    @property
    def fusable(self) -> bool:
        """Whether torch's fused kernels serve it: they walk along memory, whatever the strides are.

        What goes through widened copies, a block at a time, has to be contiguous, too.
        """
        if self.param.device.type not in FUSED_DEVICES:
            return False
        if all(tensor.is_contiguous() for tensor in self[:4]):
            return True
        strides = {tensor.stride() for tensor in self[:4]}
        return len(strides) == 1 and len(self.dtypes) == 1 and is_dense(self.param)


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


def step_plain(
    gradients: Sequence[tuple[Tensor, Tensor]],
    states: list[dict[str, Any]],
    group: Group,
    capturable: bool,
) -> None:
    """One torch AdamW step.

    torch's fused kernels want one dtype throughout. A bf16 weight has float32 moments here, so it
    goes through copies in float32, a block at a time.

    Args:
        gradients: each parameter with its gradient.
        states: theirs.
        group: its options; a `scale` slows the steps down, but not the decay.
        capturable: steps are counted on the device.
    """
    fused: list[Work] = []
    widened: list[Work] = []
    for (param, grad), state in zip(gradients, states, strict=True):
        work = Work(param, grad, state["exp_avg"], state["exp_avg_sq"], state["step"])
        fuses = work.fusable
        # torch counts steps on the device in its fused kernels; its unfused code would wait there.
        state["step"] = state["step"].to(param.device if fuses or capturable else "cpu")
        work = work._replace(step=state["step"])
        if fuses:
            (fused if len(work.dtypes) == 1 else widened).append(work)
        else:
            wide = work._replace(grad=work.grad.to(work.exp_avg.dtype))
            _adamw([wide], group, capturable, fused=False)
    if fused:
        _adamw(fused, group, capturable, fused=True)
        for work in fused:
            # torch's fused kernels leave that to nobody, and a stale graph would go backward.
            if not work.param.is_inference():
                increment_version(work.param)
    if widened:
        _step_widened(widened, group, capturable)


def workspace_bytes(params: list[Tensor], device_type: str) -> int:
    """Bytes of temporaries at the peak, with dense gradients of the weights' dtypes.

    Where the device has fused kernels, a block's copies of weights and gradients, and a step for
    each piece; elsewhere a copy of the gradient, the root of the second moment and a quotient.
    """
    if device_type not in FUSED_DEVICES:
        return max((_unfused_bytes(param) for param in params), default=0)
    widened = [param for param in params if param.dtype is not moment_dtype(param.dtype)]
    elements = sum(param.numel() for param in widened)
    copied = min(elements, BLOCK_ELEMENTS[device_type])
    return 2 * 4 * copied + 4 * len(widened)


def _unfused_bytes(param: Tensor) -> int:
    dtype = moment_dtype(param.dtype)
    return (2 + (param.dtype is not dtype)) * param.numel() * dtype.itemsize


def _step_widened(works: list[Work], group: Group, capturable: bool) -> None:
    for block in _blocks(works):
        _step_block(block, group, capturable)
    torch._foreach_add_([work.step for work in works], 1)


def _step_block(block: list[Work], group: Group, capturable: bool) -> None:
    """Weights and gradients are copied, moments are not; each weight is rounded once.

    The copies die with this call, so that no two blocks' are there together.
    """
    wide = [
        work._replace(
            param=work.param.to(work.exp_avg.dtype), grad=work.grad.to(work.exp_avg.dtype)
        )
        for work in block
    ]
    _adamw(wide, group, capturable, fused=True)
    torch._foreach_copy_([work.param for work in block], [work.param for work in wide])


def _blocks(works: list[Work]) -> Iterator[list[Work]]:
    """Pieces, each with a step of its own to count, of a block's elements together."""
    block: list[Work] = []
    room = 0
    for work in works:
        size = BLOCK_ELEMENTS[work.param.device.type]
        pieces = (torch.split(tensor.view(-1), size) for tensor in work[:4])
        for param, grad, exp_avg, exp_avg_sq in zip(*pieces, strict=True):
            if block and param.numel() > room:
                yield block
                block = []
            room = (room if block else size) - param.numel()
            block.append(Work(param, grad, exp_avg, exp_avg_sq, work.step.clone()))
    yield block


def _adamw(works: list[Work], group: Group, capturable: bool, *, fused: bool) -> None:
    beta1, beta2 = group["betas"]
    scale = float(group.get("scale", 1.0))
    lr = group["lr"] if capturable else float(group["lr"])
    params, grads, exp_avgs, exp_avg_sqs, steps = map(list, zip(*works, strict=True))
    adamw(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=fused,
        foreach=False,
        # torch refuses it on a CPU, where it would change nothing.
        capturable=capturable and params[0].device.type != "cpu",
        amsgrad=False,
        beta1=float(beta1),
        beta2=float(beta2),
        lr=lr * scale,
        weight_decay=float(group["weight_decay"]) / scale,
        eps=float(group["eps"]),
        maximize=group["maximize"],
    )
