"""AdamW for the parameters that are not projected, by torch's own implementation."""

from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from ..ops.contract import moment_dtype
from .groups import Group

FUSED_DEVICES = ("cpu", "cuda")


def step_plain(
    params: list[Tensor], states: list[dict[str, Any]], group: Group, capturable: bool
) -> None:
    """One torch AdamW step of parameters that all have a gradient.

    torch's fused kernels want one dtype throughout. A bf16 weight has float32 moments here, so it
    goes through the unfused code, alone, with a float32 copy of its own gradient.
    """
    fused: list[tuple[Tensor, Tensor, dict[str, Any]]] = []
    for param, state in zip(params, states, strict=True):
        grad = param.grad
        assert grad is not None
        dtype = state["exp_avg"].dtype
        if param.dtype is grad.dtype is dtype and param.device.type in FUSED_DEVICES:
            fused.append((param, grad, state))
        else:
            _adamw([(param, grad.to(dtype), state)], group, capturable, fused=False)
    if fused:
        _adamw(fused, group, capturable, fused=True)


def workspace_bytes(param: Tensor, device_type: str) -> int:
    """Bytes of temporaries of one parameter, with a gradient of its dtype.

    torch's unfused code holds the root of the second moment and a quotient, beside our copy of the
    gradient; the fused one holds nothing.
    """
    dtype = moment_dtype(param.dtype)
    if param.dtype is dtype and device_type in FUSED_DEVICES:
        return 0
    copies = 2 + (param.dtype is not dtype)
    return copies * param.numel() * dtype.itemsize


def _adamw(
    work: list[tuple[Tensor, Tensor, dict[str, Any]]],
    group: Group,
    capturable: bool,
    *,
    fused: bool,
) -> None:
    for param, _, state in work:
        # torch counts steps on the device in its fused kernels and on the CPU elsewhere.
        state["step"] = state["step"].to(param.device if fused or capturable else "cpu")
    beta1, beta2 = group["betas"]
    params, grads, states = map(list, zip(*work, strict=True))
    adamw(
        params,
        grads,
        [state["exp_avg"] for state in states],
        [state["exp_avg_sq"] for state in states],
        [],
        [state["step"] for state in states],
        fused=fused,
        foreach=False,
        # torch refuses it on a CPU, where it would change nothing.
        capturable=capturable and params[0].device.type != "cpu",
        amsgrad=False,
        beta1=float(beta1),
        beta2=float(beta2),
        lr=group["lr"] if capturable else float(group["lr"]),
        weight_decay=float(group["weight_decay"]),
        eps=float(group["eps"]),
        maximize=group["maximize"],
    )
