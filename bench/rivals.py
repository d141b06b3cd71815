"""Rivals of the low-rank family, from their papers' equations: hidden matrices by a rule of their
own, embeddings, the head and vectors by AdamW.

G is the gradient of a matrix of m x n, lr the rate of the rest, s a scale of the method's own and
NS five Newton-Schulz iterations towards the nearest orthogonal matrix; W moves by -lr s D:

    muon            M <- beta M + (1 - beta) G, D = sqrt(max(m, n)) NS(beta M + (1 - beta) G):
                    torch's own, beta 0.95
    muon-8bit       D = sqrt(max(m, n)) NS(M), M kept in codes of 8 bits, beta 0.9
    newton-schulz   D = sqrt(max(m, n)) NS(G): no state
    swan            the same of G with rows of rms 1: like SWAN (arXiv 2412.13148), which by
                    secondary sources also takes out the rows' means
    scale           D_j = G_j / |G_j|, of the entries that one input has; embeddings too, and the
                    head, of whose G a momentum is kept, beta 0.9 (SCALE, arXiv 2506.16659)
    adafactor-8bit  M in codes, the second moment by rows and columns: `peers.FactoredAdamW`
    adamw-8bit      bitsandbytes', of all parameters
    stable-spam     AdamW on gradients with clipped entries and steadied norms (arXiv 2502.17055,
                    from secondary sources)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.peers import (
    FactoredAdamW,
    KeptState,
    Recipe,
    keep_momentum,
    momentum_of,
    new_momentum,
    quietly,
    tensors_of,
)

# Jordan et al., https://kellerjordan.github.io/posts/muon: steep at zero, and so not quite at 1.
QUINTIC = (3.4445, -4.7750, 2.0315)
# What torch's Muon multiplies sqrt(max(m, n)) NS(M) by where it is to move like AdamW.
LIKE_ADAMW = 0.2


def newton_schulz(matrix: Tensor, steps: int = 5) -> Tensor:
    """U Z^T of matrix = U S Z^T, but for singular values between about 0.7 and 1.2."""
    a, b, c = QUINTIC
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    wide = wide / wide.norm().clamp(min=1e-12)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.mT


def spectral(matrix: Tensor) -> Tensor:
    """Orthogonal, with entries of rms 1 or thereabouts in a matrix of any shape."""
    return newton_schulz(matrix) * math.sqrt(max(matrix.shape))


def rows_then_spectral(matrix: Tensor) -> Tensor:
    return spectral(matrix / matrix.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12))


def unit_columns(matrix: Tensor) -> Tensor:
    """Of a linear weight, outputs x inputs, a column is what one input adds to."""
    return matrix / matrix.norm(dim=0, keepdim=True).clamp(min=1e-12)


def unit_rows(matrix: Tensor) -> Tensor:
    """The same of an embedding, whose inputs are its rows; those that nobody read stay zero."""
    return matrix / matrix.norm(dim=1, keepdim=True).clamp(min=1e-12)


class Directed(KeptState):
    """W <- (1 - lr decay) W - lr scale D(M), with M <- beta M + (1 - beta) G, or G if beta is 0.

    M is in codes of 8 bits (`peers.new_momentum`) or in float32; D sees it before it is rounded.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: float,
        direction: Callable[[Tensor], Tensor],
        *,
        scale: float,
        weight_decay: float,
        beta: float = 0.0,
        codes: bool = False,
    ):
        self._direction, self._codes = direction, codes
        options = {"lr": lr, "scale": scale, "weight_decay": weight_decay, "beta": beta}
        super().__init__(params, options)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    found = self._direction(self._momentum(param, group["beta"]))
                    param.mul_(1 - group["lr"] * group["weight_decay"])
                    param.add_(found.to(param.dtype), alpha=-group["lr"] * group["scale"])

    def _momentum(self, param: Tensor, beta: float) -> Tensor:
        grad = param.grad.to(torch.promote_types(param.dtype, torch.float32))
        if not beta:
            return grad
        state = self.state[param]
        if not state:
            state.update(
                new_momentum(param) if self._codes else {"exp_avg": torch.zeros_like(grad)}
            )
        momentum = momentum_of(state)
        momentum.lerp_(grad.to(momentum.dtype), 1 - beta)
        keep_momentum(state, momentum)
        return momentum


class Together:
    """Several optimizers as one, each with parameters of its own."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self._parts = parts

    @property
    def param_groups(self) -> list[dict]:
        return [group for part in self._parts for group in part.param_groups]

    @property
    def state(self) -> dict[Any, Any]:
        return {param: state for part in self._parts for param, state in part.state.items()}

    def step(self) -> None:
        for part in self._parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self._parts:
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        for part, own in zip(self._parts, saved["parts"], strict=True):
            part.load_state_dict(own)


class StableSpam(torch.optim.AdamW):
    """AdamW on steadied gradients, each tensor's by itself and in place:

        T <- g3 T + (1 - g3) max|G|;      G_i <- G_i T^ / max|G| where |G_i| > T^
        n = |G|;  m <- g1 m + (1 - g1) n;  v <- g2 v + (1 - g2) n^2
        G <- (G / n) m^ / (sqrt v^ + eps)

    T^, m^ and v^ are corrected for their start. After every `reset` steps the moments start anew.
    """

    def __init__(self, groups: list[dict], lr: float, weight_decay: float, reset: int = 1000):
        super().__init__(groups, lr=lr, weight_decay=weight_decay, fused=True)
        for group in self.param_groups:
            group.update(gammas=(0.7, 0.9, 0.999), reset=reset)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._steady(param, group)
        super().step()

    def _steady(self, param: Tensor, group: dict) -> None:
        state, grad = self.state[param], param.grad
        if not state:
            # torch begins the moments of a parameter without a state, so this begins them, too.
            wide = torch.promote_types(param.dtype, torch.float32)
            state["norms"] = torch.zeros(3, dtype=wide, device=param.device)
            state["seen"] = 0
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state |= {name: torch.zeros_like(param) for name in ("exp_avg", "exp_avg_sq")}
        if state["seen"] and state["seen"] % group["reset"] == 0:
            for name in ("step", "exp_avg", "exp_avg_sq"):
                state[name].zero_()
        state["seen"] += 1
        first, second, third = group["gammas"]
        mean, square, threshold = state["norms"]
        largest = grad.abs().max().to(threshold.dtype)
        threshold.lerp_(largest, 1 - third)
        limit = threshold / (1 - third ** state["seen"])
        grad.copy_(grad.where(grad.abs() <= limit, grad * (limit / largest)))
        norm = grad.norm(dtype=mean.dtype)
        mean.lerp_(norm, 1 - first)
        square.lerp_(norm.square(), 1 - second)
        root = (square / (1 - second ** state["seen"])).sqrt() + group["eps"]
        grad.mul_(mean / (1 - first ** state["seen"]) / root / norm.clamp(min=1e-30))


def _halves(groups: list[dict]) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden matrices, and the rest."""
    halves: tuple[list[Tensor], list[Tensor]] = [], []
    for group in groups:
        halves["rank" not in group].extend(tensors_of(group))
    return halves


def _adamw(params: list[Tensor], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=lr, weight_decay=recipe.weight_decay, fused=True)


def muon(groups: list[dict], lr: float, recipe: Recipe) -> Together:
    matrices, rest = _halves(groups)
    factor = recipe.own_scale / LIKE_ADAMW
    own = torch.optim.Muon(
        matrices,
        lr=lr * factor,
        # Of torch's rate for matrices, which is not the rest's.
        weight_decay=recipe.weight_decay / factor,
        momentum=0.95 if recipe.beta is None else recipe.beta,
        adjust_lr_fn="match_rms_adamw",
    )
    return Together(own, _adamw(rest, lr, recipe))


def _directed(
    groups: list[dict],
    lr: float,
    recipe: Recipe,
    direction: Callable[[Tensor], Tensor],
    **momentum: Any,
) -> Together:
    matrices, rest = _halves(groups)
    options = {"scale": recipe.own_scale, "weight_decay": recipe.weight_decay, **momentum}
    return Together(Directed(matrices, lr, direction, **options), _adamw(rest, lr, recipe))


def muon_8bit(groups: list[dict], lr: float, recipe: Recipe) -> Together:
    beta = 0.9 if recipe.beta is None else recipe.beta
    return _directed(groups, lr, recipe, spectral, beta=beta, codes=True)


def stateless_muon(groups: list[dict], lr: float, recipe: Recipe) -> Together:
    return _directed(groups, lr, recipe, spectral)


def swan(groups: list[dict], lr: float, recipe: Recipe) -> Together:
    return _directed(groups, lr, recipe, rows_then_spectral)


def scale(groups: list[dict], lr: float, recipe: Recipe) -> Together:
    """The head is the matrix outside of the blocks that is no embedding."""
    hidden, _ = _halves(groups)
    others = [entry for group in groups if "rank" not in group for entry in group["params"]]
    vectors = [param for _, param in others if param.dim() != 2]
    embeddings = [param for name, param in others if param.dim() == 2 and "embed" in name]
    heads = [param for name, param in others if param.dim() == 2 and "embed" not in name]
    options = {"scale": recipe.own_scale, "weight_decay": recipe.weight_decay}
    beta = 0.9 if recipe.beta is None else recipe.beta
    parts: list[torch.optim.Optimizer] = [Directed(hidden, lr, unit_columns, **options)]
    if embeddings:
        parts.append(Directed(embeddings, lr, unit_rows, **options))
    if heads:
        parts.append(Directed(heads, lr, unit_columns, beta=beta, **options))
    if vectors:
        parts.append(_adamw(vectors, lr, recipe))
    return Together(*parts)


def adafactor_8bit(groups: list[dict], lr: float, recipe: Recipe) -> Together:
    matrices, rest = _halves(groups)
    own = FactoredAdamW(matrices, lr * recipe.scale, recipe.weight_decay)
    return Together(own, _adamw(rest, lr, recipe))


def _split(groups: list[dict], lr: float, recipe: Recipe) -> list[dict]:
    """Hidden matrices at lr alpha, as `peers.adamw_split` has them."""
    rates = (lr * recipe.scale, lr)
    halves = zip(_halves(groups), rates, strict=True)
    return [{"params": params, "lr": rate} for params, rate in halves]


def adamw_8bit(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    with quietly():
        from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(_split(groups, lr, recipe), lr=lr, weight_decay=recipe.weight_decay)


def stable_spam(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    return StableSpam(_split(groups, lr, recipe), lr, recipe.weight_decay)
