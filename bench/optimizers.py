"""Every optimizer that a bench can compare, ours and others, behind one interface.

An optimizer is built from the groups of `lowrank_kernels.param_groups`: those with a rank are what
a low-rank method projects, and the others ignore the rank. A new one is one entry in METHODS.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from types import MethodType
from typing import TYPE_CHECKING, Any
from unittest import mock

from bench import peers, rivals
from bench.peers import Recipe

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lowrank_kernels import Subspace

    Build = Callable[[list[dict], float, Recipe], torch.optim.Optimizer]
    Prepare = Callable[[torch.nn.Module, torch.optim.Optimizer], object]


@dataclass(frozen=True)
class Method:
    """How to build an optimizer, what it needs, and the rates to use when none is given.

    A variant is compared only if it is named. What cannot `train` has no way to renew its basis.
    What is `compiled` by torch cannot be watched on a CPU. `prepare` is what it does to a model.

    `tunes` is the field of the recipe that is its second tunable: "scale" where that is the alpha
    of hidden matrices, "own_scale" where the method has a scale of its own, whose usual value is
    then `own_scale`. `ranked` methods depend on the rank of their groups, `own_rank` is of one that
    has the same everywhere, and those with a `beta` depend on the recipe's.
    """

    build: Build
    nano_lr: float = 1e-3
    lr: float = 1e-3
    variant: bool = True
    packages: tuple[str, ...] = ()
    device: str | None = None
    train: bool = True
    compiled: bool = False
    prepare: Prepare | None = None
    tunes: str | None = None
    own_scale: float | None = None
    ranked: bool = False
    own_rank: int | None = None
    beta: bool = False

    def optimizer_of(
        self, model: torch.nn.Module, groups: list[dict], lr: float, recipe: Recipe
    ) -> torch.optim.Optimizer:
        """The optimizer of a model's groups, and the model as that wants it."""
        optimizer = self.build(groups, lr, recipe)
        if self.prepare:
            self.prepare(model, optimizer)
        return optimizer

    def obstacle(self, device: str) -> str | None:
        """Why it cannot run here, or None."""
        if self.device not in (None, device):
            return f"needs {self.device}"
        absent = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return f"{absent[0]} is not installed" if absent else None


def named(name: str) -> tuple[Method, dict[str, float]]:
    """A method and what its name says of its options: `fira@16` is fira of rank 16, `muon@b0.9`
    muon with a beta of 0.9.

    Raises:
        ValueError: there is no such method, or it has no such option.
    """
    known, *words = name.split("@")
    if known not in METHODS:
        raise ValueError(f"unknown optimizer {known!r}: the known ones are {', '.join(METHODS)}")
    method, options = METHODS[known], {}
    if method.own_rank is not None:
        options["rank"] = method.own_rank
    for word in words:
        if word.isdecimal() and int(word) and method.ranked:
            options["rank"] = int(word)
        elif re.fullmatch(r"b0(\.\d+)?", word) and method.beta:
            options["beta"] = float(word[1:])
        else:
            takes = [text for text, has in (("@16", method.ranked), ("@b0.9", method.beta)) if has]
            raise ValueError(f"{name}: {known} takes {' and '.join(takes) or 'no options'}")
    return method, options


def present(names: Iterable[str], device: str) -> tuple[list[str], dict[str, str]]:
    """Those that can run here, and the others with the reason why not."""
    reasons = {name: named(name)[0].obstacle(device) for name in names}
    here = [name for name, reason in reasons.items() if reason is None]
    return here, {name: reason for name, reason in reasons.items() if reason is not None}


def _galore(groups: list[dict], lr: float, recipe: Recipe, **formats: str) -> torch.optim.Optimizer:
    return _galore_in("randomized", groups, lr, recipe, **formats)


def _galore_svd(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """As the official package: exact bases, all at the same step."""
    return _galore_in("svd", groups, lr, recipe)


def _galore_together(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """Randomized bases, all at the same step."""
    from lowrank_kernels import Subspace

    return _galore_in(Subspace(stagger=False), groups, lr, recipe)


def _galore_in(
    subspace: str | Subspace,
    groups: list[dict],
    lr: float,
    recipe: Recipe,
    **formats: str,
) -> torch.optim.Optimizer:
    from lowrank_kernels import GaLoreAdamW

    return GaLoreAdamW(groups, subspace=subspace, **_common(lr, recipe), **formats)


def _fira(groups: list[dict], lr: float, recipe: Recipe, **formats: str) -> torch.optim.Optimizer:
    from lowrank_kernels import FiraAdamW

    return FiraAdamW(groups, residual=recipe.residual, **_common(lr, recipe), **formats)


def _project_linears(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, **options: Any
) -> object:
    from lowrank_kernels.activations import project_linears

    return project_linears(model, optimizer, **options)


# As in its authors' code.
LDADAM_RHO = 0.908


def _ldadam(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """A power iteration a step on a blend of momentum and gradient, moments that follow the basis;
    without its full-size feedback of errors.
    """
    from lowrank_kernels import LowRankAdamW, Subspace

    every = [group | ({"update_proj_gap": 1} if "rank" in group else {}) for group in groups]
    subspace = Subspace("power", moments="carry_ldadam", stagger=False, interpolation=LDADAM_RHO)
    return LowRankAdamW(every, corrected=True, subspace=subspace, **_common(lr, recipe))


def _adarankgrad(
    groups: list[dict], lr: float, recipe: Recipe, **formats: str
) -> torch.optim.Optimizer:
    from lowrank_kernels import AdaRankGradAdamW

    share = recipe.residual_energy
    return AdaRankGradAdamW(groups, residual_energy=share, **_common(lr, recipe), **formats)


def _adamw_split(
    groups: list[dict], lr: float, recipe: Recipe, **formats: str
) -> torch.optim.Optimizer:
    """As `peers.adamw_split`, with nothing projected."""
    from lowrank_kernels import GaLoreAdamW

    split = [
        {
            "params": group["params"],
            "eps": 1e-8,
            **({"scale": recipe.scale} if "rank" in group else {}),
        }
        for group in groups
    ]
    return GaLoreAdamW(split, **_common(lr, recipe), **formats)


def _apollo(groups: list[dict], lr: float, recipe: Recipe, **options: str) -> torch.optim.Optimizer:
    from lowrank_kernels import ApolloAdamW

    return ApolloAdamW(groups, **_common(lr, recipe), **options)


def _residual(
    form: str, groups: list[dict], lr: float, recipe: Recipe, **formats: str
) -> torch.optim.Optimizer:
    """Adam in the subspace and a form of the residual outside, with a scale of its own."""
    from lowrank_kernels import LowRankAdamW

    own = {"residual_scale": recipe.own_scale, "residual_momentum": recipe.beta or 0.0}
    return LowRankAdamW(groups, residual=form, **own, **_common(lr, recipe), **formats)


def _outside_alone(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """The orthogonal factor of what is outside alone, without a step in the subspace."""
    return _residual("orthogonal", groups_of_scale(groups, 0.0), lr, recipe)


def _in_three_steps(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
    """With three Newton-Schulz steps instead of five."""
    from lowrank_kernels.ops.orthogonal import orthogonalized
    from lowrank_kernels.optim import transformed

    optimizer = _residual("orthogonal", groups, lr, recipe)
    three = partial(orthogonalized, steps=3)
    # Schedulers want a method.
    patched = mock.patch.object(transformed, "orthogonalized", three)(type(optimizer).step)
    optimizer.step = MethodType(patched, optimizer)  # type: ignore[method-assign]
    return optimizer


def groups_of_scale(groups: list[dict], scale: float) -> list[dict]:
    return [group | ({"scale": scale} if "rank" in group else {}) for group in groups]


def _common(lr: float, recipe: Recipe) -> dict:
    return {"lr": lr, "weight_decay": recipe.weight_decay, "backend": recipe.backend}


def _moved(build: Build) -> Build:
    """At a rate larger by a millionth, as which it ends elsewhere: the scatter that no change of a
    format can be told from.
    """

    def built(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
        return build(groups, lr * (1 + 1e-6), recipe)

    return built


def _reversed(build: Build) -> Build:
    """With a basis for the smaller side, which compresses the larger one."""

    def built(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
        turned = [group | ({"proj_type": "reverse_std"} if "rank" in group else {})
                  for group in groups]  # fmt: skip
        return build(turned, lr, recipe)

    return built


def _to_nearest(build: Build) -> Build:
    """With every V rounded to the nearest, by torch's operations: half a code, no noise.

    Only while it steps: others in its process go on with noise.
    """

    def built(groups: list[dict], lr: float, recipe: Recipe) -> torch.optim.Optimizer:
        import torch

        from lowrank_kernels.ops import codes, native

        def half(channels: Tensor, places: Tensor, salt: int, step: int) -> Tensor:
            shape = torch.broadcast_shapes(channels.shape, places.shape)
            return torch.full(shape, 2**15, dtype=torch.int32)

        optimizer = build(groups, lr, replace(recipe, backend="reference"))
        step = optimizer.step

        def to_nearest(*arguments: object) -> object:
            compiled = mock.patch.object(native, "serves_adamw", return_value=False, create=True)
            with compiled, mock.patch.object(codes, "noise", half):
                return step(*arguments)

        optimizer.step = to_nearest
        return optimizer

    return built


# Validation losses of nano's default recipe, seed 0, one run a rate:
#   adamw        5e-4 1.708   1e-3 1.618   2e-3 1.638   3e-3 1.671   1e-2 2.085
#   adamw-split  3e-3 1.570   5e-3 1.555   1e-2 1.587
#   galore       3e-3 1.672   1e-2 1.552   2e-2 1.545
#   fira         3e-3 1.554   5e-3 1.517   1e-2 1.552
# Above nano the rates are the published ones, from 60m (7b used 0.005).
# Their scale is the alpha of hidden matrices, of those that are projected and of others.
_SPLIT = {"tunes": "scale"}
_RANKED = {"tunes": "scale", "ranked": True}
METHODS = {
    "adamw": Method(peers.adamw, variant=False),
    "adamw-split": Method(peers.adamw_split, nano_lr=5e-3, lr=1e-2, variant=False, **_SPLIT),
    "galore": Method(_galore, nano_lr=2e-2, lr=1e-2, variant=False, **_RANKED),
    "galore-svd": Method(_galore_svd, nano_lr=2e-2, lr=1e-2, **_RANKED),
    "galore-together": Method(_galore_together, nano_lr=2e-2, lr=1e-2, **_RANKED),
    "adarankgrad": Method(_adarankgrad, nano_lr=2e-2, lr=1e-2, variant=False, **_RANKED),
    "fira": Method(_fira, nano_lr=5e-3, lr=1e-2, variant=False, **_RANKED),
    "adamw-foreach": Method(peers.adamw_foreach),
    "adamw-master": Method(peers.MasterAdamW),
    "adamw-factored-8bit": Method(peers.factored_8bit),
    "hybrid-galore": Method(peers.hybrid_galore, train=False),
    "hybrid-fira": Method(peers.hybrid_fira, train=False),
    # galore-torch has an 8-bit optimizer beside this one, and imports both.
    "galore-torch": Method(
        peers.galore_torch,
        nano_lr=2e-2,
        lr=1e-2,
        packages=("galore_torch", "bitsandbytes"),
        **_RANKED,
    ),
    "galore-torch-8bit": Method(
        peers.galore_torch_8bit,
        nano_lr=2e-2,
        lr=1e-2,
        packages=("galore_torch", "bitsandbytes"),
        **_RANKED,
    ),
    "fira-official": Method(
        peers.fira_official, nano_lr=5e-3, lr=1e-2, packages=("fira",), **_RANKED
    ),
    "apollo-torch": Method(
        peers.apollo_torch, nano_lr=1e-2, lr=1e-2, packages=("apollo_torch",), ranked=True
    ),
    "torchao-8bit": Method(peers.torchao_8bit, packages=("torchao",), compiled=True),
    "bitsandbytes-8bit": Method(peers.bitsandbytes_8bit, packages=("bitsandbytes",)),
    "flashoptim": Method(peers.flashoptim, packages=("flashoptim",), device="cuda"),
}

# Compared by what they train to, at equal tuning: `bench.family`; forms of the residual that have a
# scale of their own are among them.
_OWN = {"tunes": "own_scale", "nano_lr": 5e-3, "lr": 5e-3}
RIVALS = {
    "orthogonal": Method(
        partial(_residual, "orthogonal"), own_scale=0.4, ranked=True, beta=True, **_OWN
    ),
    "orthogonal-8bit": Method(
        partial(_residual, "orthogonal", state="int8"),
        own_scale=0.4,
        ranked=True,
        beta=True,
        **_OWN,
    ),
    # What is left without a part of it.
    "orthogonal-outside": Method(_outside_alone, own_scale=0.4, ranked=True, **_OWN),
    "orthogonal-3-steps": Method(_in_three_steps, own_scale=0.4, ranked=True, **_OWN),
    "sign": Method(partial(_residual, "sign"), own_scale=0.1, ranked=True, beta=True, **_OWN),
    "normalize": Method(partial(_residual, "normalize"), own_scale=0.1, ranked=True, **_OWN),
    # alpha is near 1 for APOLLO and sqrt(128) for Mini.
    "apollo": Method(_apollo, nano_lr=5e-3, lr=1e-2, **_RANKED),
    "apollo-mini": Method(
        partial(_apollo, per="matrix"), nano_lr=5e-3, lr=1e-2, tunes="scale", own_rank=1
    ),
    "ldadam": Method(_ldadam, nano_lr=1e-2, lr=1e-2, **_RANKED),
    "muon": Method(rivals.muon, own_scale=0.4, beta=True, **_OWN),
    "muon-8bit": Method(rivals.muon_8bit, own_scale=0.4, beta=True, **_OWN),
    "newton-schulz": Method(rivals.stateless_muon, own_scale=0.8, **_OWN),
    "swan": Method(rivals.swan, own_scale=0.8, **_OWN),
    # Its columns have norm 1, and so entries of about a tenth of the others'.
    "scale": Method(rivals.scale, own_scale=4.0, beta=True, **_OWN),
    "adafactor-8bit": Method(rivals.adafactor_8bit, nano_lr=5e-3, lr=1e-2, **_SPLIT),
    "adamw-8bit": Method(
        rivals.adamw_8bit, nano_lr=5e-3, lr=1e-2, packages=("bitsandbytes",), **_SPLIT
    ),
    "stable-spam": Method(rivals.stable_spam, nano_lr=5e-3, lr=1e-2, **_SPLIT),
}
METHODS |= RIVALS

# Formats that a method can be named with, and what such a name builds.
FORMATS = {
    "bf16": {"state": "bfloat16"},
    "8bit": {"state": "int8"},
    "8bit-basis": {"state": "int8", "basis": "int8"},
}

# Arms whose linear layers hand R over: where their first bases come from, and whether layers of
# one input share theirs. They are clipped by the norm of what a step applies, R's, and galore by
# that of whole gradients, which is larger.
PROJECTED = {
    "projected": {"start": "activations"},
    "projected-random": {"start": "random"},
    "projected-gradient": {"start": "gradient"},
    "projected-shared": {"start": "activations", "share_bases": True},
    "projected-gradient-shared": {"start": "gradient", "share_bases": True},
}

# What an arm of a method is judged by: the method itself, or its arm of this name.
ARMS = dict.fromkeys((*FORMATS, "8bit-nearest", "moved", "reversed", *PROJECTED), "")
ARMS["8bit-basis-reversed"] = "-8bit-basis"

# Of the methods that have a rate of their own.
for _name, _build in {
    "adamw-split": _adamw_split,
    "galore": _galore,
    "adarankgrad": _adarankgrad,
    "fira": _fira,
}.items():
    _in = {form: partial(_build, **options) for form, options in FORMATS.items()}
    _arms = {
        **_in,
        "8bit-nearest": _to_nearest(_in["8bit"]),
        "moved": _moved(_build),
        "reversed": _reversed(_build),
        "8bit-basis-reversed": _reversed(_in["8bit-basis"]),
    }
    METHODS |= {
        f"{_name}-{arm}": replace(METHODS[_name], build=build, variant=True)
        for arm, build in _arms.items()
    }

# There is no basis in it, and no side.
METHODS = {
    name: method
    for name, method in METHODS.items()
    if not (name.startswith("adamw-split") and name.endswith(("-basis", "-reversed")))
}

METHODS |= {
    f"galore-{arm}": replace(
        METHODS["galore"], variant=True, prepare=partial(_project_linears, **options)
    )
    for arm, options in PROJECTED.items()
}
