"""Some rows of a matrix times their weights."""

import torch
from torch import Tensor

from .dispatch import load, triton_is_ready


def scaled_rows(x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """weights[:, None] * x[index], in the dtype of x; products are made in that of the weights.

    Args:
        x: t x m.
        index: of rows, k, int32.
        weights: of these, k, float32 or float64.
    """
    if x.is_cuda and x.stride(1) == 1 and weights.dtype is torch.float32 and triton_is_ready():
        found: Tensor = load("triton.rows").scaled_rows(x, index, weights)
        return found
    picked = x.index_select(0, index).to(weights.dtype)
    return picked.mul_(weights.unsqueeze(1)).to(x.dtype)
