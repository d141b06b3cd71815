"""The scalars of one step, from the group's options and the step number."""

import math
from typing import Literal, NamedTuple

from ..ops import AdamScalars, Residual
from .groups import Group

ResidualForm = Literal["official", "paper"]
RESIDUAL_FORMS = ("official", "paper")


class StepScalars(NamedTuple):
    """Run-time scalars of the three operations, all known on the host."""

    adam: AdamScalars
    residual: Residual | None
    scale: float
    step_size: float
    decay: float


def step_scalars(group: Group, step: int, form: ResidualForm | None) -> StepScalars:
    """Scalars of the 1-based `step`.

    The official GaLore and Fira code takes the moments uncorrected and corrects the step size,
    which therefore also scales Fira's residual. The paper form of Fira corrects the moments before
    it measures them.
    """
    beta1, beta2 = (float(beta) for beta in group["betas"])
    lr, scale, eps = float(group["lr"]), float(group["scale"]), float(group["eps"])
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    decay = lr * float(group["weight_decay"])
    if form == "paper":
        adam = AdamScalars(beta1, beta2, eps, correction1, correction2)
        return StepScalars(adam, Residual(kappa=1.0, rho=scale), scale, lr, decay)
    residual = Residual(kappa=scale, rho=1.0) if form == "official" else None
    step_size = lr * math.sqrt(correction2) / correction1
    return StepScalars(AdamScalars(beta1, beta2, eps), residual, scale, step_size, decay)
