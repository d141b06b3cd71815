"""AdamW of a whole parameter, in any format of its moments and of itself.

    M <- b1 M + (1 - b1) G,   V <- b2 V + (1 - b2) G^2,   N = (M / c1) / (sqrt(V / c2) + eps)
    W <- (1 - decay) W - step_size N

As in operation 1, N is formed before M and V are rounded, and an element of G without a finite
square is left out: its N is 0, and it keeps its moments as far as codes go.

On a CPU it is one compiled pass, on a GPU one launch where Triton serves; of weights of 24 bits it
is neither.

Source: Adam (arXiv 1412.6980), decoupled decay (arXiv 1711.05101).
"""

import torch
from torch import Tensor

from . import native
from .codes import ELEMENTS_A_SCALE, FLAT_GROUPS, Stored, flat_noise, loaded, store
from .contract import AdamScalars, Scalars
from .dispatch import Kind, is_stepped_by_triton, load
from .dry import device_name, device_type
from .weights24 import joined, split

# Elements that are widened at a time: their copies stay in a cache, and an embedding's would be
# hundreds of megabytes. The number for others than CPUs was not measured.
BLOCK_ELEMENTS = {"cpu": 2**18}
BLOCK_ELEMENTS_ELSEWHERE = 2**23


def adamw(
    param: Tensor,
    grad: Tensor,
    stored: Stored,
    scalars: Scalars,
    salt: int,
    low_bits: Tensor | None = None,
) -> None:
    """One step, in place.

    Args:
        param: W, float32 or half precision, contiguous.
        grad: G, of W's shape, floating point, contiguous.
        stored: M and V of W's shape, in float32, bfloat16 or codes, with a scale for 256 elements
            in row-major order; contiguous.
        scalars: numbers, or tensors of one element each; `scale` is not used.
        salt: of the noise that rounds V.
        low_bits: of a bfloat16 W of 24 bits, int8, of W's shape; contiguous.
    """
    adam, dtypes = scalars.adam, (param.dtype, grad.dtype)
    numbers = (*scalars[1:], adam.bias_correction1, adam.bias_correction2)
    on_device = any(isinstance(number, Tensor) for number in numbers)
    kind = Kind(device_name(param), *dtypes, on_device, moments=stored.exp_avg.dtype)
    backend = stepped_by(kind, low_bits is not None)
    if backend == "triton":
        load("triton.plain").adamw(param, grad, stored, scalars, salt)
        return
    if backend == "native":
        native.adamw(param, grad, stored, scalars, salt)
        return
    size = BLOCK_ELEMENTS.get(device_type(param), BLOCK_ELEMENTS_ELSEWHERE)
    for first in range(0, param.numel(), size):
        part = slice(first, first + size)
        held = _flat_part(stored, part)
        exp_avg, exp_avg_sq = loaded(held, FLAT_GROUPS)
        direction = _direction(grad.view(-1)[part], exp_avg, exp_avg_sq, scalars.adam)
        bits = flat_noise(first, direction.numel(), salt, scalars.step, param.device)
        store(held, exp_avg, exp_avg_sq, FLAT_GROUPS, bits)
        weight = param.view(-1)[part]
        keep = 1 - scalars.decay
        low = None if low_bits is None else low_bits.view(-1)[part]
        wide = weight.float() if low is None else joined(weight, low)
        wide = wide * keep - scalars.step_size * direction
        if low is None:
            weight.copy_(wide)
        else:
            split(wide, weight, low)


def stepped_by(kind: Kind, has_low_bits: bool = False) -> str:
    """Who takes the step of a kind of parameter: "triton", "native", or "torch" by its operations.

    Args:
        kind: without strides and size.
        has_low_bits: its weights are of 24 bits.
    """
    if has_low_bits:
        return "torch"
    if is_stepped_by_triton(kind):
        return "triton"
    served = native.serves_adamw(kind.device_type, kind.param, kind.grad, kind.moments)
    return "native" if served and not kind.capturable else "torch"


def _flat_part(stored: Stored, part: slice) -> Stored:
    groups = slice(part.start // ELEMENTS_A_SCALE, -(-part.stop // ELEMENTS_A_SCALE))
    exp_avg, exp_avg_sq, *scales = stored
    values = (moment.view(-1)[part] for moment in (exp_avg, exp_avg_sq))
    return Stored(*values, *(None if scale is None else scale[groups] for scale in scales))


def _direction(grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, adam: AdamScalars) -> Tensor:
    """N; M and V change in place."""
    grad = grad.float()
    usable = grad.square() <= torch.finfo(grad.dtype).max
    grad = grad.where(usable, 0.0)
    new_avg = exp_avg * adam.beta1 + grad * (1 - adam.beta1)
    new_avg_sq = exp_avg_sq * adam.beta2 + grad.square() * (1 - adam.beta2)
    exp_avg.copy_(new_avg.where(usable, exp_avg))
    exp_avg_sq.copy_(new_avg_sq.where(usable, exp_avg_sq))
    denominator = (exp_avg_sq / adam.bias_correction2).sqrt() + adam.eps
    return (exp_avg / adam.bias_correction1 / denominator).where(usable, 0.0)
