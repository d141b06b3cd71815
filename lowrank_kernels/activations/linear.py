"""A linear layer whose weight gives R instead of a gradient.

    y = x W^T + b;   dx = H W;   db = sum of H;   H = dL/dy, t x m, x t x n, W m x n

    right side   R = G P   = H^T (x P)      what is saved is x P, t x r, or x
    left side    R = P^T G = (H P)^T x      what is saved is x

What x is made again from is saved in the place of x, where something does that (`recompute`).

Both are exact: G = H^T x is never formed. Source: GaLore's R (arXiv 2403.03507) by the product's
associativity; saving x P is CompAct's (arXiv 2410.15352).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..ops.contract import Side
from ..optim.projected_gradient import Projector, new_gradient
from .recompute import input_of, is_recomputed

# Gives what projects a gradient once H, t x m, and x, t x n, are known; None if it cannot.
Begin = Callable[[Tensor, Tensor], Projector | None]
# By a basis' identity and age and a dtype; the basis stays, so that no other takes its place.
Products = dict[tuple[int, int, torch.dtype], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Use:
    """How one pass through a layer forms the gradient of its weight.

    Attributes:
        projector: what projects it; None if that is begun in the backward pass.
        begin: how it is begun.
        keeps_input: x is saved and not x P.
        dtype: in which all is computed, that of autocast; None for the tensors' own.
        products: x P of this x by the basis, for layers that share both; None if none do.
    """

    projector: Projector | None
    begin: Begin | None = None
    keeps_input: bool = False
    dtype: torch.dtype | None = None
    products: Products | None = None

    def saves_product(self, x: Tensor) -> bool:
        """x P and not x: it is less, and nothing if x is made again, but then x P is, too."""
        if self.projector is None or self.projector.side is Side.LEFT:
            return False
        if is_recomputed(x):
            return self.products is not None
        return not self.keeps_input

    def cast(self, tensor: Tensor) -> Tensor:
        return tensor if self.dtype is None else tensor.to(self.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x P."""
        assert self.projector is not None
        basis = self.projector.state["basis"]
        products = {} if self.products is None else self.products
        key = id(basis), self.projector.basis_step, x.dtype
        if key not in products:
            products[key] = basis, x @ self.projector.basis().to(x.dtype)
        return products[key][1]


class ProjectedLinear(torch.autograd.Function):
    """`apply(x, weight, bias, use)`: x of any leading dimensions, weight m x n, bias m or None."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, use: Use) -> Tensor:
        # What is saved of x P, autograd alone shall keep.
        ctx.use, ctx.x_shape, ctx.x_dtype = replace(use, products=None), x.shape, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        cast = use.cast(x)
        ctx.has_product = use.saves_product(x)
        if ctx.has_product:
            kept = input_of(use.product(cast))
        else:
            # A copy in another dtype is not known to be made again.
            kept = input_of(x if is_recomputed(x) else cast)
        ctx.load = kept.load
        ctx.weight_shape, ctx.weight_dtype = weight.shape, weight.dtype
        ctx.save_for_backward(weight if ctx.needs_input_grad[0] else None, *kept.tensors)
        return F.linear(cast, use.cast(weight), None if bias is None else use.cast(bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        heads = grad.reshape(-1, grad.shape[-1])
        of_x = of_weight = of_bias = None
        if needs_x:
            of_x = (heads @ ctx.use.cast(weight)).view(ctx.x_shape).to(ctx.x_dtype)
        if needs_weight:
            kept = ctx.use.cast(ctx.load(saved))
            kept = kept.reshape(-1, kept.shape[-1])
            of_weight = _weight_gradient(heads, kept, ctx)
        if needs_bias:
            of_bias = heads.sum(0).to(ctx.bias_dtype)
        return of_x, of_weight, of_bias, None


def _weight_gradient(heads: Tensor, kept: Tensor, ctx: Any) -> Tensor:
    """R as the gradient of the weight, or G where there is no basis.

    Args:
        heads: H, t x m.
        kept: x, t x n, or x P, t x r.
        ctx: of the pass.
    """
    use: Use = ctx.use
    projector = use.projector
    if projector is None and use.begin is not None:
        projector = use.begin(heads, kept)
    if projector is None:
        return (heads.mT @ kept).to(ctx.weight_dtype)
    if ctx.has_product:
        projected = heads.mT @ kept
    else:
        basis = projector.basis().to(kept.dtype)
        right = projector.side is Side.RIGHT
        projected = heads.mT @ (kept @ basis) if right else (heads @ basis).mT @ kept
    return new_gradient(projected, projector, ctx.weight_shape, ctx.weight_dtype)
