"""Validation of parameter groups: every mistake of a user ends here, before anything changes."""

import operator
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import Side

Group = dict[str, Any]

FORMAT = 2
# What DDP, torch.compile, FSDP1 and activation checkpointing put into the names of parameters.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PROJECTION_TYPES = ("std", "reverse_std", "left", "right")
PROJECTION_DEFAULTS: Group = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}


def is_projected(group: Group) -> bool:
    """Groups with a rank are projected, groups without one are plain AdamW."""
    return "rank" in group


def side_of(proj_type: str, rows: int, cols: int) -> Side:
    """The side of GaLore's `proj_type`; "std" compresses the smaller side, squares go right."""
    if proj_type in ("left", "right"):
        return Side[proj_type.upper()]
    tall = rows >= cols
    return Side.RIGHT if tall == (proj_type == "std") else Side.LEFT


def named_params(group: Group, index: int) -> Iterator[tuple[str, Tensor]]:
    """The group's parameters, given as tensors or (name, tensor) pairs, with names for messages."""
    names = group.get("param_names")
    for position, param in enumerate(group["params"]):
        if isinstance(param, tuple):
            yield param
        else:
            yield (names[position] if names else f"parameter {position} of group {index}"), param


class Identity(NamedTuple):
    """What makes a parameter differ from its equals.

    Attributes:
        salt: what its random numbers depend on, beside the step.
        turn: when it refreshes, as a share of the interval.
    """

    salt: int
    turn: float


def identities(group: Group, first: int) -> Iterator[Identity]:
    """Of a group's parameters, by their names: then they stay the same when each parameter, or a
    share of them, has an optimizer of its own. Without names by their places, from `first` on.
    """
    names = group.get("param_names")
    for place in range(len(group["params"])):
        if names:
            parts = [part for part in names[place].split(".") if part not in WRAPPERS]
            salt = zlib.crc32(".".join(parts).encode())
            yield Identity(salt, salt / 2**32)
        else:
            yield Identity(first + place, place / len(group["params"]))


def normalized(group: Group, defaults: Group, index: int) -> Group:
    """A checked copy of a parameter group in the form that the optimizer keeps.

    Args:
        group: as the user gave it; `alpha` is accepted for `scale`, as in Fira.
        defaults: what the constructor set for every group.
        index: position of the group, for messages.

    Raises:
        ValueError, TypeError: an option or a parameter does not fit.
    """
    group = dict(group)
    params = group["params"]
    group["params"] = [params] if isinstance(params, Tensor) else params
    if not isinstance(params, set):  # left to torch, which refuses sets with its own text
        group["params"] = list(group["params"])
    _check_adam_options({**defaults, **group}, index)
    if not is_projected(group):
        return group
    _rename_alpha(group, index)
    for key, value in PROJECTION_DEFAULTS.items():
        group.setdefault(key, value)
    _check_projection_options(group, index)
    return group


def check_params(group: Group, index: int) -> None:
    """Raises if a parameter cannot be trained: complex, or projected and not a matrix."""
    for name, param in named_params(group, index):
        if not isinstance(param, Tensor):
            continue  # torch refuses it with its own text
        # Frozen integer weights, as in quantized models, never have a gradient: they may stay.
        if param.is_complex() or (param.requires_grad and not param.is_floating_point()):
            raise TypeError(f"{name} is {param.dtype}; only real floating-point weights are served")
        if is_projected(group):
            check_matrix(name, param)


def check_matrix(name: str, param: Tensor) -> None:
    """Raises if a projected parameter is not a matrix held whole on one device."""
    if type(param).__name__ == "DTensor":
        raise NotImplementedError(
            f"{name} is a DTensor (FSDP2 or tensor parallel); sharded weights cannot be projected"
            " yet: put it in a group without rank"
        )
    if param.dim() != 2:
        raise ValueError(
            f"{name} has shape {tuple(param.shape)} and {param.dtype}, but only matrices can be"
            " projected: put it in a group without rank. If it is a matrix that FSDP1 or DeepSpeed"
            " flattened, the low-rank optimizers need the whole matrix: use DDP or one device"
        )


def check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    """Raises if a gradient cannot be used."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{name} has a sparse gradient ({grad.layout}); use sparse=False in its embedding or"
            " train it with torch.optim.SparseAdam"
        )
    if grad.is_complex():
        raise RuntimeError(f"{name} has a complex gradient ({grad.dtype})")


def check_lr(group: Group, index: int, capturable: bool) -> None:
    """Raises ValueError if reading the learning rate would wait for a device at every step."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.device.type != "cpu" and not capturable:
        raise ValueError(
            f"group {index}: lr is a tensor on {lr.device}, which the host would wait for at every"
            " step; pass a float, a tensor on the CPU, or capturable=True"
        )


def _check_adam_options(group: Group, index: int) -> None:
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"group {index}: a tensor lr must have one element, got {lr.shape}")
    for key in ("lr", "eps", "weight_decay"):
        if not float(group[key]) >= 0:
            raise ValueError(f"group {index}: {key} must be at least 0, got {group[key]}")
    betas = tuple(group["betas"])
    if len(betas) != 2 or not all(0 <= float(beta) < 1 for beta in betas):
        raise ValueError(f"group {index}: betas must be two values in [0, 1), got {betas}")


def _rename_alpha(group: Group, index: int) -> None:
    alpha = group.pop("alpha", None)
    if alpha is None:
        return
    if group.setdefault("scale", alpha) != alpha:
        raise ValueError(
            f"group {index}: alpha is another name of scale, got alpha={alpha} and"
            f" scale={group['scale']}"
        )


def _check_projection_options(group: Group, index: int) -> None:
    for key in ("rank", "update_proj_gap"):
        group[key] = _positive_int(group[key], f"group {index}: {key}")
    scale = group["scale"]
    if not 0 <= float(scale) < float("inf"):
        raise ValueError(f"group {index}: scale must be finite and at least 0, got {scale}")
    if group["proj_type"] not in PROJECTION_TYPES:
        raise ValueError(
            f"group {index}: proj_type must be one of {', '.join(PROJECTION_TYPES)},"
            f" got {group['proj_type']!r}"
        )


def _positive_int(value: object, name: str) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}")
    return number
