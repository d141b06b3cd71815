"""A linear layer that keeps a sketch of its input for the gradient of its weight.

    y = x W^T + b;   dx = H W;   db = sum of H;   dW = an unbiased estimate of H^T x

    rows        k of the t rows of x, and their weights     dW = (S^T H)^T (S^T x)
    columns     x Omega, random signs, k of n features      dW = (H^T (x Omega)) Omega^T
    subspace    x P, and k rows of x (I - P P^T)            dW = (H^T x P) P^T + that of the rows

y, dx and db are what they are without. Sources: WTA-CRS (arXiv 2305.15265), RAD (arXiv 2007.10412);
see `sketches` for how rows are drawn.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.rows import scaled_rows
from ..optim.projected_gradient import Projector
from .sketches import random_signs, sample_rows

# Of H, t x m, in a backward pass.
Seen = Callable[[Tensor], None]


class Sketch(NamedTuple):
    """What is kept of an input, t x n.

    Attributes:
        tensors: what autograd saves.
        gradient: from H, t x m, and those tensors to dW, m x n.
        dtype: in which the layer computes, that of autocast; None for the tensors' own.
        seen: is told H.
    """

    tensors: tuple[Tensor, ...]
    gradient: Callable[..., Tensor]
    dtype: torch.dtype | None = None
    seen: Seen | None = None


def kept_rows(x: Tensor, scores: Tensor, count: int, method: str, seed: int) -> Sketch:
    """Some rows.

    Args:
        x: t x n.
        scores: of its rows, see `sketches`.
        count: of rows to keep.
        method: of `sketches.ROW_METHODS`.
        seed: of the draws.
    """
    generator = None if x.is_meta else torch.Generator(x.device).manual_seed(seed)
    sample = sample_rows(scores, count, method, generator)
    # Half of what int64 would take; nobody has 2^31 rows.
    index, weights = sample.places.int(), sample.weights.to(_wide(x.dtype))
    return Sketch((x.index_select(0, index), index, weights), _of_rows)


def _of_rows(heads: Tensor, rows: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    if heads.dtype is torch.float16:
        # A large weight belongs to a short row: only together they are in range.
        picked = scaled_rows(heads.float(), index, weights)
        return (picked.mT @ rows.float()).to(heads.dtype)
    # Weights may be large: they are not rounded with what is saved.
    return scaled_rows(heads, index, weights).mT @ rows


def kept_columns(x: Tensor, count: int, seed: int) -> Sketch:
    """Products with random signs, of t x n as t x count."""
    features = x.shape[1]

    def gradient(heads: Tensor, product: Tensor) -> Tensor:
        return (heads.mT @ product) @ random_signs(features, count, seed, product).mT

    return Sketch((x @ random_signs(features, count, seed, x),), gradient)


def kept_in_subspace(
    x: Tensor,
    projector: Projector,
    score: Callable[[Tensor], Tensor],
    count: int,
    method: str,
    seed: int,
) -> Sketch:
    """All that a basis spans, and some rows of the rest.

    Args:
        x: t x n.
        projector: of the right side: it has P, n x r.
        score: of the rest's rows.
        count: of them to keep.
        method: of `sketches.ROW_METHODS`.
        seed: of the draws.
    """
    basis = projector.basis().to(x.dtype)
    product = x @ basis
    rest = torch.addmm(x, product, basis.mT, alpha=-1)
    rows = kept_rows(rest, score(rest), count, method, seed)

    def gradient(heads: Tensor, product: Tensor, *tensors: Tensor) -> Tensor:
        basis = projector.basis().to(product.dtype)
        return torch.addmm(_of_rows(heads, *tensors), heads.mT @ product, basis.mT)

    return Sketch((product, *rows.tensors), gradient)


def norms_of(rows: Tensor) -> Tensor:
    """Of each row, in at least float32."""
    return torch.linalg.vector_norm(rows, dim=1, dtype=_wide(rows.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class SampledLinear(torch.autograd.Function):
    """`apply(x, weight, bias, sketch)`: x of any leading dimensions, weight m x n, bias or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, sketch: Sketch) -> Tensor:
        # What is saved, autograd alone shall keep.
        ctx.sketch, ctx.x_shape, ctx.x_dtype = sketch._replace(tensors=()), x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.save_for_backward(weight, *sketch.tensors)
        cast = [None if each is None else _cast(each, sketch) for each in (x, weight, bias)]
        return F.linear(*cast)  # type: ignore[arg-type]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        *rows, features = grad.shape
        heads = grad.reshape(math.prod(rows), features)
        if ctx.sketch.seen is not None:
            ctx.sketch.seen(heads)
        of_x = of_weight = of_bias = None
        if needs_x:
            of_x = (heads @ _cast(weight, ctx.sketch)).view(ctx.x_shape).to(ctx.x_dtype)
        if needs_weight:
            of_weight = ctx.sketch.gradient(heads, *saved).to(weight.dtype)
        if needs_bias:
            of_bias = heads.sum(0).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None


def _cast(tensor: Tensor, sketch: Sketch) -> Tensor:
    return tensor if sketch.dtype is None else tensor.to(sketch.dtype)
