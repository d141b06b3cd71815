"""The optimizers that torch's own tests, written anew, run over, and what those tests share."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW

RANK, GAP = 2, 3  # of every test: refreshes fall between its first step and its last


class Kind(NamedTuple):
    """An optimizer that is built as torch's are: from parameters, pairs with a name, or groups.

    A matrix goes to a group with a rank, all else to one without.
    """

    cls: type[torch.optim.Optimizer]
    options: Mapping[str, Any] = MappingProxyType({})
    projected: bool = True

    def __call__(self, params, rank=RANK, gap=GAP, **options):
        members = list(params)
        groups = members if isinstance(members[0], dict) else [{"params": members}]
        groups = [part for group in groups for part in self.divided(group, rank, gap)]
        return self.cls(groups, **{**self.options, **options})

    def divided(self, group, rank=RANK, gap=GAP):
        if not self.projected:
            return [group]
        parts = {True: [], False: []}
        for member in group["params"]:
            param = member[1] if isinstance(member, tuple) else member
            parts[param.dim() == 2].append(member)
        keys = {True: {"rank": rank, "update_proj_gap": gap}, False: {}}
        return [{**group, **keys[which], "params": part} for which, part in parts.items() if part]


OURS = {
    "plain": Kind(GaLoreAdamW, projected=False),
    "galore": Kind(GaLoreAdamW),
    "fira": Kind(FiraAdamW),
    "fira-paper": Kind(FiraAdamW, {"residual": "paper"}),
    "adarankgrad": Kind(AdaRankGradAdamW),
    "svd": Kind(GaLoreAdamW, {"subspace": "svd"}),
    "power": Kind(GaLoreAdamW, {"subspace": "power"}),
    "random": Kind(GaLoreAdamW, {"subspace": "random"}),
    "reference": Kind(FiraAdamW, {"backend": "reference"}),
}
# The control: what torch's AdamW does not pass is no fair test of ours.
TORCH = Kind(torch.optim.AdamW, projected=False)
KINDS = {"torch": TORCH, **OURS}


def over(kinds):
    return pytest.mark.parametrize("kind", kinds.values(), ids=kinds)


every_kind, every_one_of_ours = over(KINDS), over(OURS)

# torch's own inputs for AdamW; the ones with tensors it keeps for GPUs, and takes on a CPU, too.
INPUTS = {
    "default": {},
    "non-default lr": {"lr": 0.01},
    "nonzero weight_decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "Tensor lr": {"lr": torch.tensor(0.01)},
    "Tensor lr, Tensor betas": {
        "lr": torch.tensor(0.01),
        "betas": (torch.tensor([[[0.9]]]), torch.tensor([[0.99]])),
    },
}
every_input = pytest.mark.parametrize("options", INPUTS.values(), ids=INPUTS)


def model(dtype=torch.float32, seed=0):
    """A matrix for either side of a projection, and vectors."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(5, 10), nn.Tanh(), nn.Linear(10, 4), nn.PReLU())
    return layers.to(dtype)


def with_holes(tensor):
    """Every other element of twice the memory; what lies between belongs to somebody else."""
    return torch.stack([tensor, torch.full_like(tensor, 7.0)], dim=-1)[..., 0]


def set_grads(params, seed):
    """The same numbers in every dtype, but for their rounding."""
    rng = torch.Generator().manual_seed(seed)
    for param in params:
        param.grad = torch.randn(param.shape, generator=rng, dtype=torch.float64).to(param.dtype)


def train(module, optimizer, seeds):
    for seed in seeds:
        set_grads(module.parameters(), seed)
        optimizer.step()


def snapshot(module, optimizer):
    """Copies of all that a step may change, as (name, value): weights and their states."""
    values = []
    for name, param in module.named_parameters():
        values.append((name, param.detach().clone()))
        for key, value in sorted(optimizer.state.get(param, {}).items()):
            values.append((f"{key} of {name}", copy.deepcopy(value)))
    return values


def assert_same(before, after):
    """Two snapshots, bit for bit."""
    for (name, a), (other, b) in zip(before, after, strict=True):
        assert name == other
        assert type(a) is type(b), name
        if isinstance(a, torch.Tensor):
            assert a.dtype is b.dtype, name
        assert torch.equal(torch.as_tensor(a), torch.as_tensor(b)), name


def assert_close(before, after):
    """Two snapshots, within torch's own tolerances of their dtypes."""
    for (name, a), (other, b) in zip(before, after, strict=True):
        assert name == other
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
