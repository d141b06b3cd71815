"""The rival that needs no kernel of ours: torch's products, in-place passes, `addmm_`.

The same functions as a backend, so that the benches treat it as one. It is what a careful user
writes by hand: no temporary of W's size in GaLore, one in Fira (the scaled gradient), every other
pass in place. Its error is also "plain torch at this precision", twice which a kernel may have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.peers import Recipe
from lowrank_kernels.ops import AdamScalars, ChannelSums, Projection, Residual, Side
from lowrank_kernels.ops.contract import basis_shape, projected_shape, rank_axis
from lowrank_kernels.ops.native import TILE_ELEMENTS
from lowrank_kernels.ops.reference import channel_scale as channel_scale
from lowrank_kernels.optim.groups import side_of


def project_moments(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    adam: AdamScalars,
    residual: Residual | None,
) -> Projection:
    low = [p.T @ g if side is Side.LEFT else g @ p for g, p in zip(grads, bases, strict=True)]
    projected = [r.to(m.dtype) for r, m in zip(low, exp_avgs, strict=True)]
    torch._foreach_lerp_(list(exp_avgs), projected, 1 - adam.beta1)
    torch._foreach_mul_(list(exp_avg_sqs), adam.beta2)
    torch._foreach_addcmul_(list(exp_avg_sqs), projected, projected, 1 - adam.beta2)
    direction = torch._foreach_sqrt(list(exp_avg_sqs))
    torch._foreach_add_(direction, adam.eps)
    direction = torch._foreach_div(list(exp_avgs), direction)
    stacked = torch.stack(list(direction)), torch.stack(projected)
    if residual is None:
        return Projection(*stacked, None)
    axis, kappa = rank_axis(side), residual.kappa
    norms = [torch.linalg.vector_norm(x, dim=1 + axis) for x in stacked]
    wide = stacked[0].dtype
    grad_norms = torch.stack([torch.linalg.vector_norm(g, dim=axis, dtype=wide) for g in grads])
    direction_sq, projected_sq, grad_sq = (norm.square_() for norm in (*norms, grad_norms))
    residual_sq = grad_sq.sub_(projected_sq, alpha=2 * kappa - kappa**2).clamp_(min=0.0)
    return Projection(*stacked, ChannelSums(direction_sq, projected_sq, residual_sq))


def back_project_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: Side,
    projection: Projection,
    residual: Residual | None,
    factor: Tensor | None,
    *,
    scale: float,
    step_size: float,
    decay: float,
    noise: None = None,
) -> None:
    keep = 1 - decay
    combined = projection.direction * scale
    if residual is not None and factor is not None:
        phi = residual.rho * factor.unsqueeze(1 + rank_axis(side))
        combined.addcmul_(projection.projected, phi, value=-residual.kappa)
        for param, grad, weight in zip(params, grads, phi, strict=True):
            param.addcmul_(grad, weight.to(param.dtype), value=-step_size)
    for param, basis, low in zip(params, bases, combined.to(params[0].dtype), strict=True):
        left, right = (basis, low) if side is Side.LEFT else (low, basis.T)
        param.addmm_(left, right, beta=keep, alpha=-keep * step_size)


class HybridAdamW(torch.optim.Optimizer):
    """A whole optimizer of these functions; the bases are random and stay.

    Equal matrices go together, as far as their low-rank parts stay in a cache; the rest of the
    model is torch's fused AdamW.
    """

    def __init__(self, groups: list[dict], lr: float, recipe: Recipe, *, fira: bool):
        tensors = [{**group, "params": [entry[1] for entry in group["params"]]} for group in groups]
        super().__init__(tensors, {"lr": lr, "weight_decay": recipe.weight_decay})
        self.residual = Residual(kappa=recipe.scale, rho=1.0) if fira else None
        plain = [p for group in self.param_groups if "rank" not in group for p in group["params"]]
        options = {"lr": lr, "weight_decay": recipe.weight_decay}
        self.rest = torch.optim.AdamW(plain, fused=True, **options) if plain else None
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        if self.rest:
            self.rest.step()
        for group in self.param_groups:
            if "rank" in group:
                for params in _equal(group["params"]):
                    self._step_group(params, group)

    def _step_group(self, params: list[Tensor], group: dict) -> None:
        side = side_of(group["proj_type"], *params[0].shape)
        states = [self._state_of(param, side, group["rank"]) for param in params]
        grads, bases = [param.grad for param in params], [state["basis"] for state in states]
        moments = [[state[key] for state in states] for key in ("exp_avg", "exp_avg_sq")]
        adam = AdamScalars(0.9, 0.999, 1e-6)
        projection = project_moments(grads, bases, side, *moments, adam, self.residual)
        factor = None
        if projection.sums is not None:
            factor = channel_scale(projection.sums, [state["limiter_norm"] for state in states])
        step_size = group["lr"] * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        common = {"scale": group["scale"], "step_size": step_size}
        decay = group["lr"] * group["weight_decay"]
        rest = (projection, self.residual, factor)
        back_project_update(params, grads, bases, side, *rest, **common, decay=decay)

    def _state_of(self, param: Tensor, side: Side, rank: int) -> dict[str, Tensor]:
        state = self.state[param]
        if not state:
            moments = projected_shape(param.shape, side, rank)
            wide = {"dtype": torch.float32, "device": param.device}
            basis = torch.randn(basis_shape(param.shape, side, rank), **wide)
            state["basis"] = torch.linalg.qr(basis)[0].to(param.dtype)
            state["exp_avg"] = torch.zeros(moments, **wide)
            state["exp_avg_sq"] = torch.zeros(moments, **wide)
            state["limiter_norm"] = torch.zeros((), **wide)
        return state


def _equal(params: list[Tensor]) -> list[list[Tensor]]:
    """Groups of equal shape, of as many as the native backend takes at a time."""
    shapes: dict[torch.Size, list[Tensor]] = {}
    for param in params:
        shapes.setdefault(param.shape, []).append(param)
    found = []
    for equal in shapes.values():
        size = max(1, TILE_ELEMENTS[equal[0].device.type] // equal[0].numel())
        found += [equal[start : start + size] for start in range(0, len(equal), size)]
    return found
