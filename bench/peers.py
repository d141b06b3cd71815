"""The rivals, each in its best configuration; other people's packages are run as they come.

`adamw-master` is how AdamW with float32 state trains bfloat16 weights: torch's fused kernel on
float32 copies. The hybrids keep one random basis: they are here to be timed.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.hybrid import HybridAdamW
from lowrank_kernels.ops import Residual


@dataclass(frozen=True)
class Recipe:
    """What an optimizer is built with, beside its groups and its rate."""

    scale: float = 0.25
    weight_decay: float = 0.0
    backend: str = "auto"
    residual: str = "official"
    residual_energy: float = 0.01


def _tensors(group: dict) -> list[Tensor]:
    """The parameters of a group, without the names that packages do not know."""
    return [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]


def _all(groups: list[dict]) -> list[Tensor]:
    return [tensor for group in groups for tensor in _tensors(group)]


def _stripped(groups: list[dict], **names: str) -> Iterator[dict]:
    """Groups without names of parameters; `names` renames keys of projected groups."""
    for group in groups:
        options = {names.get(key, key): value for key, value in group.items() if key != "params"}
        yield {"params": _tensors(group), **options}


def adamw(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_all(groups), lr=lr, weight_decay=recipe.weight_decay, fused=True)


def adamw_foreach(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_all(groups), lr=lr, weight_decay=recipe.weight_decay, foreach=True)


def adamw_split(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with the rates that GaLore implies: `scale` shrinks the projected matrices' only."""
    split = [
        {"params": _tensors(group), "lr": lr * recipe.scale if "rank" in group else lr}
        for group in groups
    ]
    return torch.optim.AdamW(split, lr=lr, weight_decay=recipe.weight_decay, fused=True)


class MasterAdamW:
    """torch's fused AdamW on float32 copies of the weights, as mixed precision does it."""

    def __init__(self, groups: list[dict], lr: float, recipe: Recipe):
        self._params = _all(groups)
        masters = [torch.nn.Parameter(param.detach().float()) for param in self._params]
        for master in masters:
            master.grad = torch.empty_like(master)
        options = {"lr": lr, "weight_decay": recipe.weight_decay}
        self._inner = torch.optim.AdamW(masters, fused=True, **options)
        self._masters = masters

    @property
    def param_groups(self) -> list[dict]:
        return self._inner.param_groups

    @property
    def state(self) -> dict[Any, Any]:
        copies = {index: {"master": master} for index, master in enumerate(self._masters)}
        return {**self._inner.state, **copies}

    def step(self) -> None:
        with torch.no_grad():
            grads = [param.grad for param in self._params]
            torch._foreach_copy_([master.grad for master in self._masters], grads)
            self._inner.step()
            torch._foreach_copy_(self._params, self._masters)

    def zero_grad(self) -> None:
        for param in self._params:
            param.grad = None

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self._inner.state_dict(), "masters": [m.detach() for m in self._masters]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._inner.load_state_dict(saved["inner"])
        with torch.no_grad():
            torch._foreach_copy_(self._masters, saved["masters"])


def hybrid_galore(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    return HybridAdamW(groups, lr, weight_decay=recipe.weight_decay)


def hybrid_fira(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    residual = Residual(kappa=recipe.scale, rho=1.0)
    return HybridAdamW(groups, lr, weight_decay=recipe.weight_decay, residual=residual)


def galore_torch(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    with _quietly():
        from galore_torch import GaLoreAdamW

    options = {"lr": lr, "weight_decay": recipe.weight_decay, "no_deprecation_warning": True}
    return GaLoreAdamW(list(_stripped(groups)), **options)


def fira_official(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    with _quietly():
        from fira import FiraAdamW

    options = {"lr": lr, "weight_decay": recipe.weight_decay, "no_deprecation_warning": True}
    return FiraAdamW(list(_stripped(groups, scale="alpha")), **options)


def apollo_torch(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """Its documented form: a random projection, channel-wise factors, scale 1."""
    with _quietly():
        from apollo_torch import APOLLOAdamW

    own = {"proj": "random", "scale_type": "channel", "scale": 1.0}
    stripped = [{**g, **own} if "rank" in g else g for g in _stripped(groups)]
    options = {"lr": lr, "weight_decay": recipe.weight_decay, "no_deprecation_warning": True}
    return APOLLOAdamW(stripped, **options)


def torchao_8bit(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    with _quietly():
        from torchao.optim import AdamW8bit

    return AdamW8bit(_all(groups), lr=lr, weight_decay=recipe.weight_decay)


def bitsandbytes_8bit(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    with _quietly():
        from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(_all(groups), lr=lr, weight_decay=recipe.weight_decay)


def flashoptim(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(_all(groups), lr=lr, weight_decay=recipe.weight_decay)


def _quietly() -> warnings.catch_warnings:
    """Packages warn on import of GPUs and libraries that they do not find."""
    return warnings.catch_warnings(action="ignore")
