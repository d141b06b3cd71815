"""The rivals, each in its best configuration; other people's packages are run as they come.

`adamw-master` is how AdamW with float32 state trains bfloat16 weights: torch's fused kernel on
float32 copies. `adamw-factored-8bit` is what takes least of what keeps a number for every weight.
The hybrids keep one random basis: they are here to be timed.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
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
    # Of methods that have them: what their matrices' steps are multiplied by, beside the rate, and
    # the decay of their momentum, where it is to be another than the method's own.
    own_scale: float = 1.0
    beta: float | None = None


def tensors_of(group: dict) -> list[Tensor]:
    """The parameters of a group, without the names that packages do not know."""
    return [entry[1] if isinstance(entry, tuple) else entry for entry in group["params"]]


def _all(groups: list[dict]) -> list[Tensor]:
    return [tensor for group in groups for tensor in tensors_of(group)]


def _stripped(groups: list[dict], **names: str) -> Iterator[dict]:
    """Groups without names of parameters; `names` renames keys of projected groups."""
    for group in groups:
        options = {names.get(key, key): value for key, value in group.items() if key != "params"}
        yield {"params": tensors_of(group), **options}


def adamw(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_all(groups), lr=lr, weight_decay=recipe.weight_decay, fused=True)


def adamw_foreach(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_all(groups), lr=lr, weight_decay=recipe.weight_decay, foreach=True)


def adamw_split(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW with the rates that GaLore implies: `scale` shrinks the projected matrices' only."""
    split = [
        {"params": tensors_of(group), "lr": lr * recipe.scale if "rank" in group else lr}
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


# Elements of a momentum in codes that share a scale.
BLOCK = 256


class KeptState(torch.optim.Optimizer):
    """With states that are loaded in the dtypes in which they were saved."""

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        super().load_state_dict(saved)
        # Not in the weights' dtype, to which torch casts all states.
        for index, param in enumerate(_all(self.param_groups)):
            for name, value in saved["state"].get(index, {}).items():
                kept = value.to(param.device, copy=True) if isinstance(value, Tensor) else value
                self.state[param][name] = kept


class FactoredAdamW(KeptState):
    """AdamW with M in 8 bits and, of a matrix, the row and column means of V in place of V.

    M = q scale of 256 elements, q to the nearest from -127 to 127; V of (i, j) is taken as
    rows_i cols_j / mean(rows), which is Adafactor's (arXiv 1804.04235, section 3). beta2, the rate
    and the decay are AdamW's, and what is not a matrix keeps both moments in float32.
    """

    def __init__(self, params: list[Tensor], lr: float, weight_decay: float):
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": (0.9, 0.999), "eps": 1e-8}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step(param, group)

    def _step(self, param: Tensor, group: dict) -> None:
        state = self.state[param] or self._new_state(param)
        (beta1, beta2), lr, grad = group["betas"], group["lr"], param.grad.float()
        state["step"] += 1
        momentum = momentum_of(state).lerp_(grad, 1 - beta1)
        keep_momentum(state, momentum)
        # As in the paper, so that rows without a gradient are no division by zero.
        squares = grad.square().add_(1e-30)
        if "rows" in state:
            state["rows"].lerp_(squares.mean(1), 1 - beta2)
            state["cols"].lerp_(squares.mean(0), 1 - beta2)
            second = torch.outer(state["rows"] / state["rows"].mean(), state["cols"])
        else:
            second = state["exp_avg_sq"].lerp_(squares, 1 - beta2)
        root = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        update = momentum.div_(root).mul_(lr / (1 - beta1 ** state["step"]))
        param.copy_(param.float().mul_(1 - lr * group["weight_decay"]).sub_(update))

    def _new_state(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = {"step": 0}
        if param.dim() == 2:
            state |= new_momentum(param)
            for name, size in zip(("rows", "cols"), param.shape, strict=True):
                state[name] = torch.zeros(size, dtype=torch.float32, device=param.device)
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(param, dtype=torch.float32)
        self.state[param] = state
        return state


def new_momentum(param: Tensor) -> dict[str, Tensor]:
    """Zero, in codes."""
    blocks = math.ceil(param.numel() / BLOCK)
    return {
        "exp_avg": torch.zeros_like(param, dtype=torch.int8),
        "scales": torch.zeros(blocks, dtype=torch.float32, device=param.device),
    }


def momentum_of(state: dict[str, Any]) -> Tensor:
    """M in float32, a copy."""
    codes = state["exp_avg"]
    if "scales" not in state:
        return codes.clone()
    scales = state["scales"].repeat_interleave(BLOCK)[: codes.numel()]
    return codes.float().mul_(scales.view_as(codes))


def keep_momentum(state: dict[str, Any], momentum: Tensor) -> None:
    if "scales" not in state:
        state["exp_avg"].copy_(momentum)
        return
    padded = F.pad(momentum.flatten(), (0, -momentum.numel() % BLOCK)).view(-1, BLOCK)
    torch.div(padded.abs().amax(1), 127, out=state["scales"])
    codes = padded / state["scales"].where(state["scales"] > 0, 1.0).unsqueeze(1)
    state["exp_avg"].copy_(codes.round_().flatten()[: momentum.numel()].view_as(momentum))


def factored_bytes(shape: Sequence[int]) -> int:
    """What `FactoredAdamW` keeps of a parameter."""
    elements = math.prod(shape)
    if len(shape) != 2:
        return 8 * elements
    return elements + 4 * (math.ceil(elements / BLOCK) + sum(shape))


def factored_8bit(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    return FactoredAdamW(_all(groups), lr, recipe.weight_decay)


def hybrid_galore(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    return HybridAdamW(groups, lr, weight_decay=recipe.weight_decay)


def hybrid_fira(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    residual = Residual(kappa=recipe.scale, rho=1.0)
    return HybridAdamW(groups, lr, weight_decay=recipe.weight_decay, residual=residual)


def galore_torch(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    with quietly():
        from galore_torch import GaLoreAdamW

    options = {"lr": lr, "weight_decay": recipe.weight_decay, "no_deprecation_warning": True}
    return GaLoreAdamW(list(_stripped(groups)), **options)


def galore_torch_8bit(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """As its authors meant it: see `bench.galore_8bit`."""
    with quietly():
        from bench.galore_8bit import GaLore8bit

    return GaLore8bit(list(_stripped(groups)), lr, recipe.weight_decay)


def fira_official(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    with quietly():
        from fira import FiraAdamW

    options = {"lr": lr, "weight_decay": recipe.weight_decay, "no_deprecation_warning": True}
    return FiraAdamW(list(_stripped(groups, scale="alpha")), **options)


def apollo_torch(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """Its documented form: a random projection, channel-wise factors, scale 1."""
    with quietly():
        from apollo_torch import APOLLOAdamW

    own = {"proj": "random", "scale_type": "channel", "scale": 1.0}
    stripped = [{**g, **own} if "rank" in g else g for g in _stripped(groups)]
    options = {"lr": lr, "weight_decay": recipe.weight_decay, "no_deprecation_warning": True}
    return APOLLOAdamW(stripped, **options)


def torchao_8bit(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    with quietly():
        from torchao.optim import AdamW8bit

    return AdamW8bit(_all(groups), lr=lr, weight_decay=recipe.weight_decay)


def bitsandbytes_8bit(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    with quietly():
        from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(_all(groups), lr=lr, weight_decay=recipe.weight_decay)


def flashoptim(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    from flashoptim import FlashAdamW

    return FlashAdamW(_all(groups), lr=lr, weight_decay=recipe.weight_decay)


def quietly() -> warnings.catch_warnings:
    """Packages warn on import of GPUs and libraries that they do not find."""
    return warnings.catch_warnings(action="ignore")
