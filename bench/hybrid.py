"""The rival that needs no package: torch's products, in-place passes, `addmm_`.

What a careful user writes by hand, behind the interface of a backend, so that the benches treat it
as one: no temporary of W's size, every pass in place. It takes finite gradients and plain numbers,
and rounds W twice in Fira. Its error is also "plain torch at this precision", twice which a kernel
may have.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_kernels.ops import (
    AdamScalars,
    ChannelSums,
    Matrices,
    Projection,
    Residual,
    Scalars,
    Side,
)
from lowrank_kernels.ops.contract import basis_shape, projected_shape, rank_axis
from lowrank_kernels.ops.reference import channel_scale
from lowrank_kernels.optim.groups import side_of

# Elements of W that a batch holds.
BATCH_ELEMENTS = {"cpu": 2**20, "cuda": 2**23}


class Operations:
    """See `lowrank_kernels.ops.contract.Operations`."""

    def __init__(self, matrices: Matrices) -> None:
        """Nothing is prepared."""

    def project_moments(self, matrices: Matrices, adam: AdamScalars) -> Projection:
        side, residual, moments = matrices.side, matrices.residual, matrices.exp_avgs
        pairs = zip(matrices.grads, matrices.bases, strict=True)
        low = [p.T @ g if side is Side.LEFT else g @ p for g, p in pairs]
        projected = [r.to(m.dtype) for r, m in zip(low, moments, strict=True)]
        torch._foreach_lerp_(moments, projected, 1 - adam.beta1)
        torch._foreach_mul_(matrices.exp_avg_sqs, adam.beta2)
        torch._foreach_addcmul_(matrices.exp_avg_sqs, projected, projected, 1 - adam.beta2)
        direction = torch._foreach_sqrt(matrices.exp_avg_sqs)
        torch._foreach_add_(direction, adam.eps)
        direction = torch._foreach_div(moments, direction)
        stacked = torch.stack(list(direction)), torch.stack(projected)
        if residual is None:
            return Projection(*stacked, None)
        axis, kappa, wide = rank_axis(side), residual.kappa, stacked[0].dtype
        norms = [torch.linalg.vector_norm(x, dim=1 + axis) for x in stacked]
        of_grads = [torch.linalg.vector_norm(g, dim=axis, dtype=wide) for g in matrices.grads]
        direction_sq, projected_sq, grad_sq = (x.square_() for x in (*norms, torch.stack(of_grads)))
        residual_sq = grad_sq.sub_(projected_sq, alpha=2 * kappa - kappa**2).clamp_(min=0.0)
        return Projection(*stacked, ChannelSums(direction_sq, projected_sq, residual_sq))

    def channel_scale(self, matrices: Matrices, sums: ChannelSums) -> Tensor:
        return channel_scale(sums, matrices.limiter_norms)

    def back_project_update(
        self,
        matrices: Matrices,
        projection: Projection,
        factor: Tensor | None,
        scalars: Scalars,
    ) -> None:
        side, residual, params = matrices.side, matrices.residual, matrices.params
        step_size, keep = scalars.step_size, 1 - scalars.decay
        combined = projection.direction * scalars.scale
        if residual is not None and factor is not None:
            phi = residual.rho * factor.unsqueeze(1 + rank_axis(side))
            combined.addcmul_(projection.projected, phi, value=-residual.kappa)
            for param, grad, weight in zip(params, matrices.grads, phi, strict=True):
                param.addcmul_(grad, weight.to(param.dtype), value=-step_size)
        lows = combined.to(params[0].dtype)
        for param, basis, low in zip(params, matrices.bases, lows, strict=True):
            left, right = (basis, low) if side is Side.LEFT else (low, basis.T)
            param.addmm_(left, right, beta=keep, alpha=-keep * step_size)


class HybridAdamW(torch.optim.Optimizer):
    """A whole optimizer of these operations; the bases are random and stay.

    Equal matrices go together, as far as their low-rank parts stay in a cache; the rest of the
    model is torch's fused AdamW.
    """

    def __init__(
        self,
        groups: list[dict],
        lr: float,
        *,
        weight_decay: float,
        residual: Residual | None = None,
    ):
        tensors = [{**group, "params": [entry[1] for entry in group["params"]]} for group in groups]
        super().__init__(tensors, {"lr": lr, "weight_decay": weight_decay})
        self.residual = residual
        plain = [p for group in self.param_groups if "rank" not in group for p in group["params"]]
        options = {"lr": lr, "weight_decay": weight_decay}
        self.rest = torch.optim.AdamW(plain, fused=True, **options) if plain else None
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        if self.rest:
            self.rest.step()
        for group in self.param_groups:
            if "rank" in group:
                for params in _batches(group["params"]):
                    self._step_batch(params, group)

    def _step_batch(self, params: list[Tensor], group: dict) -> None:
        side = side_of(group["proj_type"], *params[0].shape)
        states = [self._state_of(param, side, group["rank"]) for param in params]
        names = ("basis", "exp_avg", "exp_avg_sq", "limiter_norm")
        tensors = ([state[name] for state in states] for name in names)
        grads = [param.grad for param in params]
        matrices = Matrices(side, self.residual, params, grads, *tensors)
        corrected = group["lr"] * (1 - 0.999**self.steps) ** 0.5 / (1 - 0.9**self.steps)
        adam, decay = AdamScalars(0.9, 0.999, 1e-6), group["lr"] * group["weight_decay"]
        operations = Operations(matrices)
        projection = operations.project_moments(matrices, adam)
        factor = None
        if projection.sums is not None:
            factor = operations.channel_scale(matrices, projection.sums)
        scalars = Scalars(adam, group["scale"], corrected, decay)
        operations.back_project_update(matrices, projection, factor, scalars)

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


def _batches(params: list[Tensor]) -> list[list[Tensor]]:
    shapes: dict[torch.Size, list[Tensor]] = {}
    for param in params:
        shapes.setdefault(param.shape, []).append(param)
    found = []
    for equal in shapes.values():
        size = max(1, BATCH_ELEMENTS[equal[0].device.type] // equal[0].numel())
        found += [equal[start : start + size] for start in range(0, len(equal), size)]
    return found
