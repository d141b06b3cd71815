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


def step_scalars(
    group: Group, step: int | Tensor, form: ResidualForm | None, corrected: bool
) -> StepScalars:
    """Scalars of the 1-based `step`, a number, or a tensor with one number a matrix.

    The official GaLore and Fira code takes the moments uncorrected and corrects the step size,
    which therefore also scales Fira's residual. `corrected` corrects the moments themselves, as
    torch's AdamW and both papers do; the paper form of Fira measures the corrected ones.

    Args:
        group: options of the parameters.
        step: steps that the moments have seen, this one included.
        form: of the residual, None for none.
        corrected: where the bias correction goes.
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
    residual = None
    if form is not None:
        kappa, rho = (1.0, scale) if form == "paper" else (scale, 1.0)
        residual = Residual(kappa, rho)
    if corrected:
        adam = AdamScalars(beta1, beta2, eps, correction1, correction2)
        return StepScalars(adam, residual, scale, lr, decay)
    adam = AdamScalars(beta1, beta2, eps)
    step_size = lr * correction2**0.5 / correction1
    return StepScalars(adam, residual, scale, step_size, decay)
