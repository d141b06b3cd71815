"""The scalars of one step, from the group's options and the step number."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..ops import AdamScalars, Residual
from ..ops.contract import Scalar, adam_of, scalar_of
from .groups import Group

ResidualForm = Literal["official", "paper"]
RESIDUAL_FORMS = ("official", "paper")


class StepScalars(NamedTuple):
    """Run-time scalars of the three operations: numbers, or tensors with one value a matrix."""

    adam: AdamScalars
    residual: Residual | None
    scale: float
    step_size: Scalar
    decay: Scalar

    def of(self, matrices: slice) -> "StepScalars":
        """Those of some of the matrices."""
        return self._replace(
            adam=adam_of(self.adam, matrices),
            step_size=scalar_of(self.step_size, matrices),
            decay=scalar_of(self.decay, matrices),
        )


def step_scalars(group: Group, step: int | Tensor, form: ResidualForm | None) -> StepScalars:
    """Scalars of the 1-based `step`, a number, or a tensor with one number a matrix.

    The official GaLore and Fira code takes the moments uncorrected and corrects the step size,
    which therefore also scales Fira's residual. The paper form of Fira corrects the moments before
    it measures them.
    """
    beta1, beta2 = (float(beta) for beta in group["betas"])
    scale, eps = float(group["scale"]), float(group["eps"])
    lr: Scalar
    if isinstance(step, Tensor):
        step = step.double()  # in float32, 1 - beta2^t loses four digits at the first steps
        lr = torch.ones_like(step) * group["lr"]
    else:
        lr = float(group["lr"])
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    decay = lr * float(group["weight_decay"])
    if form == "paper":
        adam = AdamScalars(beta1, beta2, eps, correction1, correction2)
        return StepScalars(adam, Residual(kappa=1.0, rho=scale), scale, lr, decay)
    adam = AdamScalars(beta1, beta2, eps)
    residual = Residual(kappa=scale, rho=1.0) if form == "official" else None
    step_size = lr * correction2**0.5 / correction1
    return StepScalars(adam, residual, scale, step_size, decay)
