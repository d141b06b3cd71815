"""galore-torch's 8-bit optimizer, run as its authors meant it.

Its constructor hands `percentile_clipping` and `block_wise` to bitsandbytes by position.
bitsandbytes 0.50 has neither, so that 100 becomes `max_unorm` and True `skip_zeros`: the update of
a parameter whose projected gradient has less than 4,096 elements is then limited to 100 times the
norm of a weight that galore-torch has replaced by zeros, and nothing of it is left; kernels on a
GPU leave out zeros, too. Given as `args`, the options arrive whatever their places are.

A step also leaves weights in other memory than before and projected gradients in the place of the
gradients. Here both are what they were: the copy of a weight, which galore-torch makes and would
add the update to, is dropped for the weight. On a machine without CUDA there is nothing for it to
wait for, and torch would refuse.

It is imported only where the packages are there.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from galore_torch import GaLoreAdamW8bit
from torch import Tensor

# bitsandbytes' own of blockwise 8-bit AdamW.
ARGUMENTS = {"optim_bits": 8, "min_8bit_size": 4096, "max_unorm": 0.0, "skip_zeros": False}
NOTHING_TO_WAIT_FOR = mock.patch("torch.cuda.synchronize")


class GaLore8bit(GaLoreAdamW8bit):
    """See above; eps is 1e-8, as there."""

    def __init__(self, groups: list[dict], lr: float, weight_decay: float):
        options = {"lr": lr, "weight_decay": weight_decay}
        super().__init__(groups, **options, args=SimpleNamespace(**ARGUMENTS))
        self._weights: dict[Tensor, Tensor] = {}

    def step(self, closure: Any = None) -> Any:
        params = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        gradients = [param.grad for param in params]
        self._weights = {param: param.data for param in params}
        with nullcontext() if torch.cuda.is_available() else NOTHING_TO_WAIT_FOR:
            loss = super().step(closure)
        self._weights.clear()
        for param, grad in zip(params, gradients, strict=True):
            param.grad = grad
        return loss

    def prefetch_state(self, p: Tensor) -> None:
        """Called between the projection of a gradient and the update."""
        if hasattr(p, "saved_data"):
            p.saved_data = self._weights[p]
        super().prefetch_state(p)
