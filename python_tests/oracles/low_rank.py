"""A literal step of GaLore and Fira on one matrix, written from the papers and the official code.

It shares nothing with the package: S is formed, nothing is fused, bases are applied one by one. Run
in float64 it is the oracle; run in float32 or bfloat16 it is "plain torch at that precision", whose
error bounds what a backend may have.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Matrix:
    """One weight and its state; `moments` is the dtype of M and V, `factor` the last step's phi."""

    weight: Tensor
    basis: Tensor
    left: bool
    moments: torch.dtype
    exp_avg: Tensor = field(init=False)
    exp_avg_sq: Tensor = field(init=False)
    limiter_norm: Tensor | None = None
    factor: Tensor | None = None
    step: int = 0

    def __post_init__(self):
        shape = self.down(self.weight).shape
        self.exp_avg = torch.zeros(shape, dtype=self.moments)
        self.exp_avg_sq = torch.zeros(shape, dtype=self.moments)

    def down(self, full: Tensor) -> Tensor:
        return self.basis.T @ full if self.left else full @ self.basis

    def back(self, low: Tensor) -> Tensor:
        low = low.to(self.basis.dtype)
        return self.basis @ low if self.left else low @ self.basis.T


def literal_step(
    matrix: Matrix,
    grad: Tensor,
    *,
    form: str | None,
    lr: float = 0.02,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    scale: float = 0.25,
    weight_decay: float = 0.0,
    projected: bool = False,
) -> None:
    """form: None for GaLore, "official" for Fira's code, "paper" for its algorithm 1.

    projected: the gradient is R.
    """
    beta1, beta2 = betas
    m = matrix
    m.step += 1
    low = (grad if projected else m.down(grad)).to(m.moments)
    m.exp_avg = beta1 * m.exp_avg + (1 - beta1) * low
    m.exp_avg_sq = beta2 * m.exp_avg_sq + (1 - beta2) * low * low
    c1, c2 = 1 - beta1**m.step, 1 - beta2**m.step

    if form == "paper":
        direction = (m.exp_avg / c1) / ((m.exp_avg_sq / c2).sqrt() + eps)
        scaled = _scaled_residual(m, direction, low, grad - m.back(low))
        update = lr * scale * (m.back(direction) + scaled)
    else:
        direction = m.exp_avg / (m.exp_avg_sq.sqrt() + eps)
        update = scale * m.back(direction)
        if form == "official":
            update = update + _scaled_residual(m, direction, low, grad - scale * m.back(low))
        update = lr * math.sqrt(c2) / c1 * update
    m.weight = m.weight - update.to(m.weight.dtype)
    if weight_decay:
        m.weight = m.weight - lr * weight_decay * m.weight


def _scaled_residual(m: Matrix, direction: Tensor, low: Tensor, residual: Tensor) -> Tensor:
    rank_dim = 0 if m.left else 1
    norms = [torch.linalg.vector_norm(x, dim=rank_dim, keepdim=True) for x in (direction, low)]
    m.factor = norms[0] / (norms[1] + 1e-8)
    scaled = m.factor.to(residual.dtype) * residual
    norm = torch.linalg.vector_norm(scaled)
    if m.limiter_norm is None:
        m.limiter_norm = norm
        return scaled
    limiter = torch.clamp(norm / (m.limiter_norm + 1e-8), min=1.01) / 1.01
    m.limiter_norm = norm / limiter
    return scaled / limiter


def low_rank_gradient(rows: int, cols: int, generator: torch.Generator) -> Tensor:
    """A gradient with a decaying spectrum and noise, as real ones have; float64."""
    inner = max(1, min(rows, cols, 8))
    left = torch.randn(rows, inner, generator=generator, dtype=torch.float64)
    right = torch.randn(inner, cols, generator=generator, dtype=torch.float64)
    decay = torch.arange(1, inner + 1, dtype=torch.float64) ** -1.0
    noise = torch.randn(rows, cols, generator=generator, dtype=torch.float64)
    return (left * decay) @ right + 0.3 * noise


def balanced_gradients(
    shape: tuple[int, int],
    basis: Tensor,
    left: bool,
    steps: int,
    generator: torch.Generator,
    outside: float = 1.0,
) -> list[Tensor]:
    """Gradients whose step has a small condition number at any rank; float64.

    N and phi divide by R: where a sum of large terms nearly cancels, its rounding decides on all
    that follows. So entries of R keep their signs from step to step and are nowhere near 0, and a
    channel is `outside` times as long outside of the basis as in it.
    """

    def down(full: Tensor) -> Tensor:
        return basis.T @ full if left else full @ basis

    def back(low: Tensor) -> Tensor:
        return basis @ low if left else low @ basis.T

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rank_dim, (size, rank) = 0 if left else 1, basis.shape
    low_shape = (rank, shape[1]) if left else (shape[0], rank)
    signs = normal(*low_shape).sign()
    grads = []
    for _ in range(steps):
        low = signs * (0.5 + torch.rand(low_shape, generator=generator, dtype=torch.float64))
        noise = normal(*shape)
        beyond = (noise - back(down(noise))) * (rank < size)
        within_norm, norm = (x.norm(dim=rank_dim, keepdim=True) for x in (low, beyond))
        grads.append(back(low) + beyond * outside * within_norm / norm.clamp(min=1e-9))
    return grads


def orthonormal(size: int, rank: int, generator: torch.Generator) -> Tensor:
    """A random basis of size x rank with orthonormal columns; float64."""
    return torch.linalg.qr(torch.randn(size, rank, generator=generator, dtype=torch.float64))[0]
