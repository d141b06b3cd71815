"""AdamW for the parameters that are not projected, by torch's own implementation; by ours where
moments have fewer than 32 bits or weights more than their dtype. Of shards each rank steps what it
has, which needs nobody else.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.optim.adamw import adamw

from ..ops import AdamScalars, Scalars
from ..ops.adamw import adamw as low_adamw
from ..ops.codes import Stored
from ..ops.dry import device_type
from .checks import is_dense, is_unresolved, is_wrapped, resolved
from .formats import format_of
from .groups import Group
from .placement import is_sharded, local, local_grad
from .state import State

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
        if device_type(self.param) not in FUSED_DEVICES:
            return False
        # Quantized weights and the like have no memory to walk along.
        if is_wrapped(self.param):
            return False
        if all(tensor.is_contiguous() for tensor in self[:4]):
            return True
        strides = {tensor.stride() for tensor in self[:4]}
        return len(strides) == 1 and len(self.dtypes) == 1 and is_dense(self.param)

    def widened(self) -> "Work":
        """With copies of the weight and the gradient in the dtype of the moments."""
        dtype = self.exp_avg.dtype
        return self._replace(param=self.param.to(dtype), grad=self.grad.to(dtype))


class Plain:
    """AdamW parameters of a group, sorted once by how torch can step them.

    torch's fused kernels want one dtype throughout. A bf16 weight has float32 moments here, so it
    goes through copies in float32, a block at a time.

    Args:
        group: the options; a `scale` slows the steps down, but not the decay.
        params: with gradients.
        states: theirs.
        capturable: steps are counted on the device.
    """

    def __init__(
        self, group: Group, params: list[Tensor], states: list[State], capturable: bool
    ) -> None:
        self.group, self.capturable = group, capturable
        self._sharded = [param for param in params if is_sharded(param)]
        self._resolves = any(
            is_unresolved(local(param.grad)) for param in params if param.grad is not None
        )
        self._fused: list[tuple[Tensor, State]] = []
        self._widened: list[tuple[Tensor, State]] = []
        self._alone: list[tuple[Tensor, State]] = []
        self._low: list[tuple[Tensor, State]] = []
        for pair in zip(params, states, strict=True):
            param, state = pair
            if format_of(state) != "float32" or "low_bits" in state:
                state["step"] = state["step"].to(param.device if capturable else "cpu")
                self._low.append(pair)
                continue
            (work,) = self._works([pair])
            fuses = work.fusable
            # torch counts steps on the device in its fused kernels; its unfused code would wait.
            state["step"] = state["step"].to(param.device if fuses or capturable else "cpu")
            kind = self._alone
            if fuses:
                kind = self._fused if len(work.dtypes) == 1 else self._widened
            kind.append(pair)
        written = [param for param, _ in self._fused if not is_sharded(param)] + self._sharded
        self._versioned = [param for param in written if not param.is_inference()]

    def step(self) -> None:
        """One torch AdamW step."""
        for pair in self._alone:
            (work,) = self._works([pair])
            wide = work.widened()
            _adamw([wide], self.group, self.capturable, fused=False)
            if wide.param is not work.param:
                work.param.copy_(wide.param)
        if self._fused:
            _adamw(self._works(self._fused), self.group, self.capturable, fused=True)
        if self._widened:
            _step_widened(self._works(self._widened), self.group, self.capturable)
        if self._versioned:
            # torch's fused kernels, and local parts, leave that to nobody, and a stale graph would
            # go backward.
            increment_version(self._versioned)
        for param, state in self._low:
            self._step_low(param, state)

    def _step_low(self, param: Tensor, state: State) -> None:
        state["step"] += 1
        grad = param.grad
        assert grad is not None
        grad = resolved(grad) if self._resolves else grad
        grad = -grad if self.group["maximize"] else grad
        step = state["step"] if self.capturable else int(state["step"])
        kept = ("low_bits", *Stored._fields)
        written = {"param": param} | {key: state[key] for key in kept if key in state}
        dense = {key: tensor.contiguous() for key, tensor in written.items()}
        low_adamw(
            dense["param"],
            grad.contiguous(),
            Stored.of(dense),
            _scalars(self.group, step),
            # Moments in float32 draw no noise, and have no salt.
            state.get("salt", 0),
            dense.get("low_bits"),
        )
        for key, tensor in written.items():
            if dense[key] is not tensor:
                tensor.copy_(dense[key])

    def _works(self, pairs: list[tuple[Tensor, State]]) -> list[Work]:
        works = []
        for param, state in pairs:
            grad, exp_avg, exp_avg_sq = param.grad, state["exp_avg"], state["exp_avg_sq"]
            if self._sharded:
                grad = local_grad(param)
                param, exp_avg, exp_avg_sq = map(local, (param, exp_avg, exp_avg_sq))
            assert grad is not None
            grad = resolved(grad) if self._resolves else grad
            works.append(Work(param, grad, exp_avg, exp_avg_sq, state["step"]))
        return works


def _step_widened(works: list[Work], group: Group, capturable: bool) -> None:
    for block in _blocks(works):
        _step_block(block, group, capturable)
    torch._foreach_add_([work.step for work in works], 1)


def _step_block(block: list[Work], group: Group, capturable: bool) -> None:
    """Weights and gradients are copied, moments are not; each weight is rounded once.

    The copies die with this call, so that no two blocks' are there together.
    """
    wide = [work.widened() for work in block]
    _adamw(wide, group, capturable, fused=True)
    torch._foreach_copy_([work.param for work in block], [work.param for work in wide])


def _blocks(works: list[Work]) -> Iterator[list[Work]]:
    """Pieces, each with a step of its own to count, of a block's elements together."""
    block: list[Work] = []
    room = 0
    for work in works:
        size = BLOCK_ELEMENTS[device_type(work.param)]
        pieces = (torch.split(tensor.view(-1), size) for tensor in work[:4])
        for param, grad, exp_avg, exp_avg_sq in zip(*pieces, strict=True):
            if block and param.numel() > room:
                yield block
                block = []
            room = (room if block else size) - param.numel()
            block.append(Work(param, grad, exp_avg, exp_avg_sq, work.step.clone()))
    yield block


def _scalars(group: Group, step: int | Tensor) -> Scalars:
    """Of the 1-based `step`; a number, or a 0-d tensor."""
    beta1, beta2 = map(float, group["betas"])
    lr, seen = group["lr"], step
    if isinstance(seen, Tensor):
        seen, step = seen.double(), seen.int()
        lr = torch.as_tensor(lr, device=seen.device).reshape(()).float()
    else:
        lr = float(lr)
    adam = AdamScalars(beta1, beta2, float(group["eps"]), 1 - beta1**seen, 1 - beta2**seen)
    scale, decay = float(group.get("scale", 1.0)), lr * float(group["weight_decay"])
    return Scalars(adam, 1.0, lr * scale, decay, step)


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
