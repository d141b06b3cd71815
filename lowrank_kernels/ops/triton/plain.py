"""Parameters without a rank: the launch of their AdamW."""

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

from ..codes import ELEMENTS_A_SCALE, Stored
from ..contract import Number, Scalars
from ..noise import MOMENTS_SALT
from .adamw import adamw_kernel
from .addresses import current_stream, device_table
from .config import ADAMW_GROUPS, ADAMW_WARPS
from .launch import Launcher, Rest


def adamw(param: Tensor, grad: Tensor, stored: Stored, scalars: Scalars, salt: int) -> None:
    """See `ops.adamw.adamw`, of which it has float32 and half precision; in one launch."""
    adam, elements, device = scalars.adam, param.numel(), param.device
    if not elements:
        return
    corrections = [_placed(x, device) for x in (adam.bias_correction1, adam.bias_correction2)]
    rates = [_placed(x, device) for x in (scalars.step_size, scalars.decay)]
    step = _placed(scalars.step, device, torch.int32)
    coded = stored.exp_avg_scale is not None

    def rest() -> Rest:
        options = {
            "DEVICE_CORRECTIONS": isinstance(corrections[0], Tensor),
            "DEVICE_RATES": isinstance(rates[0], Tensor),
            "DEVICE_STEP": isinstance(step, Tensor),
            "CODED": coded,
            "GROUPS": ADAMW_GROUPS,
            "GROUP": ELEMENTS_A_SCALE,
            "num_warps": ADAMW_WARPS,
        }
        programs = triton.cdiv(elements, ADAMW_GROUPS * ELEMENTS_A_SCALE)
        return Rest((programs, 1, 1), (elements,), options)

    # Scales that are not there have another's place.
    moments = [stored.exp_avg if each is None else each for each in stored]
    salts = device_table((salt + MOMENTS_SALT,), device)
    betas = adam.beta1, 1 - adam.beta1, adam.beta2, 1 - adam.beta2
    if device not in _launchers:
        _launchers[device] = Launcher(adamw_kernel, device)
    _launchers[device](
        (elements, param.dtype, grad.dtype, stored.exp_avg.dtype),
        current_stream(device),
        (param, grad, *moments, salts),
        (*betas, adam.eps, *corrections, *rates, step),
        rest,
    )
    # As torch's own functions do, for a stale graph not to go backward.
    if not param.is_inference():
        increment_version(param)


def _placed(
    scalar: Number | Tensor, device: torch.device, dtype: torch.dtype = torch.float64
) -> Number | Tensor:
    """A number as it is; a tensor where the kernel reads it, in one dtype."""
    return scalar.to(device, dtype) if isinstance(scalar, Tensor) else scalar


_launchers: dict[torch.device, Launcher] = {}
