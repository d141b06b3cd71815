"""LDAdam on one matrix without its feedback of errors, from its algorithm; in float64, left form.

It shares nothing with the package. The basis is what infinitely many power iterations come to: the
leading left singular vectors of A = rho P M^ + (1 - rho) G.
"""

import torch
from torch import Tensor


class LDAdam:
    def __init__(self, weight: Tensor, rank: int, rho: float, betas: tuple[float, float]) -> None:
        self.weight, self.rank, self.rho, self.betas = weight, rank, rho, betas
        self.basis: Tensor | None = None
        self.step = 0

    def take(self, grad: Tensor, lr: float, eps: float, scale: float) -> None:
        beta1, beta2 = self.betas
        seen, old = self.step, self.basis
        c1, c2 = 1 - beta1**seen, 1 - beta2**seen
        blend = grad
        if old is not None:
            blend = self.rho * old @ (self.mean / c1) + (1 - self.rho) * grad
        self.blend = blend
        self.basis = torch.linalg.svd(blend)[0][:, : self.rank]
        if old is None:
            mean = square = grad.new_zeros(self.rank, grad.shape[1])
        else:
            turn = self.basis.T @ old
            corrected, spread = self.mean / c1, self.square / c2 - (self.mean / c1) ** 2
            mean = turn @ self.mean
            square = c2 * ((turn * turn) @ spread + (turn @ corrected) ** 2).abs()
        low = self.basis.T @ grad
        self.mean = beta1 * mean + (1 - beta1) * low
        self.square = beta2 * square + (1 - beta2) * low**2
        self.step = seen + 1
        c1, c2 = 1 - beta1**self.step, 1 - beta2**self.step
        direction = (self.mean / c1) / ((self.square / c2).sqrt() + eps)
        self.weight = self.weight - lr * scale * self.basis @ direction
