"""The orthogonal factor of matrices, nearly: Newton-Schulz iterations on batches of products."""

import functools

import torch
from torch import Tensor

from .dry import device_type

# Of x -> a x + b x^3 + c x^5, which brings singular values near 1 fast instead of to 1 exactly:
# after five steps those above 0.003 of the norm lie between 0.68 and 1.14.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5
# Of CPUs that multiply bfloat16 themselves, by torch's names for how; older versions lack some.
BFLOAT16_UNITS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


@functools.cache
def fast_in_bfloat16(device_type: str) -> bool:
    """Whether products in bfloat16 are several times as fast as in float32."""
    if device_type != "cpu":
        return device_type == "cuda"
    units = (getattr(torch.cpu, unit, None) for unit in BFLOAT16_UNITS)
    return any(unit() for unit in units if unit)


def factor_dtype(dtype: torch.dtype, device_type: str) -> torch.dtype:
    """Of the products of `orthogonalized`, and of what it returns.

    Args:
        dtype: of the matrices.
        device_type: where they are.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return torch.bfloat16 if wide is torch.float32 and fast_in_bfloat16(device_type) else wide


def orthogonalized(matrices: Tensor, steps: int = STEPS) -> Tensor:
    """U Z^T of each matrix U diag(s) Z^T, with singular values near 1 instead of at 1.

    Args:
        matrices: B x m x n, finite. Zero gives zero.
        steps: of the iteration.

    Returns:
        A new tensor: for what is narrower than float64 bfloat16 where products in it are fast, else
        of the matrices' dtype, at least float32.

    Source: the quintic iteration of Muon (K. Jordan and others, 2024), after Bernstein and Newhouse
    (arXiv 2409.20325).
    """
    dtype = torch.promote_types(matrices.dtype, torch.float32)
    if not matrices.numel():
        return torch.zeros_like(matrices, dtype=factor_dtype(dtype, device_type(matrices)))
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(dtype)
    tiny = torch.finfo(dtype).tiny
    # In two steps, since the square of what is finite need not be.
    x = x / x.abs().amax((1, 2), keepdim=True).clamp_(min=tiny)
    x /= torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp_(min=tiny)
    x = x.to(factor_dtype(dtype, device_type(x)))
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
