"""The operations as operators of torch.library, for compilers and exporters.

They take and return plain tensors and numbers, and call the same backends. The schemas are written
out because torch 2.6 cannot infer them from these annotations. Channel sums are one tensor, 3 x B x
channels, added up, since how many slots a backend uses is its own affair.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .contract import (
    AdamScalars,
    ChannelSums,
    Noise,
    Projection,
    Residual,
    Scalar,
    Side,
    number,
    rank_axis,
)
from .dispatch import load


@torch.library.custom_op(
    "lowrank_kernels::project_moments",
    mutates_args=("exp_avgs", "exp_avg_sqs"),
    schema="(Tensor[] grads, Tensor[] bases, int side, Tensor(a!)[] exp_avgs,"
    " Tensor(b!)[] exp_avg_sqs, float beta1, float beta2, float eps, float bias_correction1,"
    " float bias_correction2, float? kappa, str backend) -> (Tensor, Tensor, Tensor)",
)
def _project_moments(
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: int,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    beta1: float,
    beta2: float,
    eps: float,
    bias_correction1: float,
    bias_correction2: float,
    kappa: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direction, projected gradient and the channel sums, which are empty without a kappa."""
    adam = AdamScalars(beta1, beta2, eps, bias_correction1, bias_correction2)
    residual = None if kappa is None else Residual(kappa, rho=1.0)
    projection = load(backend).project_moments(
        grads, bases, Side(side), exp_avgs, exp_avg_sqs, adam, residual
    )
    direction, projected, sums = projection
    if sums is None:
        return direction, projected, direction.new_empty(0)
    return direction, projected, torch.stack([x.sum(1) if x.dim() == 3 else x for x in sums])


@_project_moments.register_fake
def _(grads, bases, side, exp_avgs, exp_avg_sqs, *scalars):  # type: ignore[no-untyped-def]
    kappa = scalars[-2]
    count, low = len(grads), tuple(exp_avgs[0].shape)
    channels = low[1 - rank_axis(Side(side))]
    shapes = [(count, *low)] * 2 + [(0,) if kappa is None else (3, count, channels)]
    return tuple(exp_avgs[0].new_empty(shape) for shape in shapes)


@torch.library.custom_op(
    "lowrank_kernels::channel_scale",
    mutates_args=("limiter_norms",),
    schema="(Tensor direction, Tensor projected, Tensor residual, Tensor(a!)[] limiter_norms,"
    " str backend) -> Tensor",
)
def _channel_scale(
    direction: Tensor,
    projected: Tensor,
    residual: Tensor,
    limiter_norms: Sequence[Tensor],
    backend: str,
) -> Tensor:
    sums = ChannelSums(direction, projected, residual)
    factor: Tensor = load(backend).channel_scale(sums, limiter_norms)
    return factor


@_channel_scale.register_fake
def _(direction, projected, residual, limiter_norms, backend):  # type: ignore[no-untyped-def]
    return direction.new_empty((direction.shape[0], direction.shape[-1]))


@torch.library.custom_op(
    "lowrank_kernels::back_project_update",
    mutates_args=("params",),
    schema="(Tensor(a!)[] params, Tensor[] grads, Tensor[] bases, int side, Tensor direction,"
    " Tensor projected, float? kappa, float? rho, Tensor? factor, float scale, float step_size,"
    " float decay, int[]? salts, int step, str backend) -> ()",
)
def _back_project_update(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    bases: Sequence[Tensor],
    side: int,
    direction: Tensor,
    projected: Tensor,
    kappa: float | None,
    rho: float | None,
    factor: Tensor | None,
    scale: float,
    step_size: float,
    decay: float,
    salts: Sequence[int] | None,
    step: int,
    backend: str,
) -> None:
    residual = None if kappa is None or rho is None else Residual(kappa, rho)
    load(backend).back_project_update(
        params,
        grads,
        bases,
        Side(side),
        Projection(direction, projected, None),
        residual,
        factor,
        scale=scale,
        step_size=step_size,
        decay=decay,
        noise=None if salts is None else Noise(tuple(salts), step),
    )


@_back_project_update.register_fake
def _(*arguments):  # type: ignore[no-untyped-def]
    return None


class Operators:
    """The functions of a backend, by way of its operators.

    Raises:
        TypeError: scalars are tensors; those are for CUDA graphs captured from eager code.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def project_moments(
        self,
        grads: Sequence[Tensor],
        bases: Sequence[Tensor],
        side: Side,
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        adam: AdamScalars,
        residual: Residual | None,
    ) -> Projection:
        direction, projected, sums = _project_moments(
            list(grads),
            list(bases),
            int(side),
            list(exp_avgs),
            list(exp_avg_sqs),
            adam.beta1,
            adam.beta2,
            adam.eps,
            number("bias_correction1", adam.bias_correction1),
            number("bias_correction2", adam.bias_correction2),
            None if residual is None else residual.kappa,
            self.backend,
        )
        return Projection(direction, projected, ChannelSums(*sums) if residual else None)

    def channel_scale(self, sums: ChannelSums, limiter_norms: Sequence[Tensor]) -> Tensor:
        return _channel_scale(*sums, list(limiter_norms), self.backend)

    def back_project_update(
        self,
        params: Sequence[Tensor],
        grads: Sequence[Tensor],
        bases: Sequence[Tensor],
        side: Side,
        projection: Projection,
        residual: Residual | None,
        factor: Tensor | None,
        *,
        scale: float,
        step_size: Scalar,
        decay: Scalar,
        noise: Noise | None,
    ) -> None:
        if noise is not None and isinstance(noise.step, Tensor):
            raise TypeError("noise.step must be an int under a compiler")
        _back_project_update(
            list(params),
            list(grads),
            list(bases),
            int(side),
            projection.direction,
            projection.projected,
            None if residual is None else residual.kappa,
            None if residual is None else residual.rho,
            factor,
            scale,
            number("step_size", step_size),
            number("decay", decay),
            None if noise is None else list(noise.salts),
            0 if noise is None else noise.step,
            self.backend,
        )
