"""The optimizers that the pre-training bench compares. A new one is one entry in METHODS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from bench.settings import Settings
    from lowrank_kernels import Subspace


@dataclass(frozen=True)
class Method:
    """How to build an optimizer for a model, and the learning rates to use when none is given.

    A variant is compared only if it is named.
    """

    build: Callable[[torch.nn.Module, float, Settings], torch.optim.Optimizer]
    nano_lr: float
    lr: float
    variant: bool = False


def _adamw(model: torch.nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    import torch

    return torch.optim.AdamW(
        model.parameters(), lr=lr, weight_decay=settings.weight_decay, fused=True
    )


def _adamw_split(model: torch.nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    """AdamW with the rates that GaLore implies: `scale` shrinks the projected matrices' only."""
    import torch

    groups = [
        {"params": group["params"], "lr": lr * settings.scale if "rank" in group else lr}
        for group in _groups(model, settings)
    ]
    return torch.optim.AdamW(groups, lr=lr, weight_decay=settings.weight_decay, fused=True)


def _galore(model: torch.nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    return _galore_in("randomized", model, lr, settings)


def _galore_svd(model: torch.nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    """As the official package: exact bases, all at the same step."""
    return _galore_in("svd", model, lr, settings)


def _galore_together(
    model: torch.nn.Module, lr: float, settings: Settings
) -> torch.optim.Optimizer:
    """Randomized bases, all at the same step."""
    from lowrank_kernels import Subspace

    return _galore_in(Subspace(stagger=False), model, lr, settings)


def _galore_in(
    subspace: str | Subspace, model: torch.nn.Module, lr: float, settings: Settings
) -> torch.optim.Optimizer:
    from lowrank_kernels import GaLoreAdamW

    return GaLoreAdamW(
        _groups(model, settings),
        lr=lr,
        weight_decay=settings.weight_decay,
        subspace=subspace,
        backend=settings.backend,
    )


def _adarankgrad(model: torch.nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    from lowrank_kernels import AdaRankGradAdamW

    return AdaRankGradAdamW(
        _groups(model, settings),
        lr=lr,
        weight_decay=settings.weight_decay,
        residual_energy=settings.residual_energy,
        backend=settings.backend,
    )


def _fira(model: torch.nn.Module, lr: float, settings: Settings) -> torch.optim.Optimizer:
    from lowrank_kernels import FiraAdamW

    return FiraAdamW(
        _groups(model, settings),
        lr=lr,
        weight_decay=settings.weight_decay,
        backend=settings.backend,
        residual=settings.residual,
    )


def _groups(model: torch.nn.Module, settings: Settings) -> list[dict]:
    from lowrank_kernels import param_groups

    return param_groups(
        model,
        rank=settings.rank,
        scale=settings.scale,
        update_proj_gap=settings.update_proj_gap,
    )


# Validation losses of nano's default recipe, seed 0, one run a rate:
#   adamw        5e-4 1.708   1e-3 1.618   2e-3 1.638   3e-3 1.671   1e-2 2.085
#   adamw-split  3e-3 1.570   5e-3 1.555   1e-2 1.587
#   galore       3e-3 1.672   1e-2 1.552   2e-2 1.545
#   fira         3e-3 1.554   5e-3 1.517   1e-2 1.552
# Above nano the rates are the published ones, from 60m (7b used 0.005).
METHODS = {
    "adamw": Method(_adamw, nano_lr=1e-3, lr=1e-3),
    "adamw-split": Method(_adamw_split, nano_lr=5e-3, lr=1e-2),
    "galore": Method(_galore, nano_lr=2e-2, lr=1e-2),
    "galore-svd": Method(_galore_svd, nano_lr=2e-2, lr=1e-2, variant=True),
    "galore-together": Method(_galore_together, nano_lr=2e-2, lr=1e-2, variant=True),
    "adarankgrad": Method(_adarankgrad, nano_lr=2e-2, lr=1e-2),
    "fira": Method(_fira, nano_lr=5e-3, lr=1e-2),
}
