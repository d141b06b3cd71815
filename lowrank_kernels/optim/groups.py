"""Validation of parameter groups: every mistake of a user ends here, before anything changes."""

import difflib
import logging
import math
import zlib
from collections.abc import Iterable, Iterator
from numbers import Real
from typing import Any

from torch import Tensor

from ..ops import Side, Size
from ..ops.notices import notice_once
from ..values import positive_int
from .placement import divides

Group = dict[str, Any]
# A group with its place, and the name, the tensor and the salt of each of its parameters.
NamedGroups = Iterable[tuple[int, Group, Iterable[tuple[str, Tensor, int]]]]

FORMAT = 3
# What DDP, torch.compile, FSDP1 and activation checkpointing put into the names of parameters.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
PROJECTION_TYPES = ("std", "reverse_std", "left", "right")
PROJECTION_DEFAULTS: Group = {"update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
OWN_KEYS = ("rank", "alpha", *PROJECTION_DEFAULTS)
OPTIONS = (*OWN_KEYS, "lr", "betas", "eps", "weight_decay", "maximize")
# Of the whole optimizer.
FORMAT_OPTIONS = ("state", "basis", "master")
# Of 2^32: the multiples of no number fall more evenly into the range of 32 bits.
GOLDEN_RATIO = 0x9E3779B9
# What torch, its schedulers and users keep in a group beside what this optimizer reads.
OTHER_KEYS = ("params", "param_names", "initial_lr", "swa_lr", "max_lr", "min_lr", "name")


def is_projected(group: Group) -> bool:
    """Groups with a rank are projected, groups without one are plain AdamW."""
    return "rank" in group


def side_of(proj_type: str, rows: int, cols: int) -> Side:
    """The side of GaLore's `proj_type`; "std" compresses the smaller side, squares go right."""
    if proj_type in ("left", "right"):
        return Side[proj_type.upper()]
    tall = rows >= cols
    return Side.RIGHT if tall == (proj_type == "std") else Side.LEFT


def side_for(group: Group, param: Tensor) -> Side:
    """The side of a projected parameter. It is the one that does not sum over ranks: right where
    they have different rows, left where they have different columns, unless that is not asked for.
    """
    if divides(param, 0):
        return Side.RIGHT
    if divides(param, 1):
        return Side.RIGHT if group["proj_type"] == "right" else Side.LEFT
    return side_of(group["proj_type"], param.shape[0], param.shape[1])


def size_of(group: Group, param: Tensor) -> Size:
    """What a backend is chosen by: the largest basis that a projected parameter can have."""
    rows, cols = param.shape
    side = side_for(group, param)
    return Size(rows, cols, min(group["rank"], rows, cols), side)


def cut_rank(rank: int, rows: int, cols: int) -> int:
    """The rank that a matrix can have, with a notice if that is less than was asked for."""
    smallest = min(rows, cols)
    if rank > smallest:
        notice_once(
            logging.WARNING,
            f"rank {rank} is cut to {smallest} for matrices of {rows} x {cols}: their gradient"
            " cannot have more",
        )
    return min(rank, smallest)


def named_params(group: Group, index: int) -> Iterator[tuple[str, Tensor]]:
    """The group's parameters, given as tensors or (name, tensor) pairs, with names for messages."""
    names = group.get("param_names")
    for position, param in enumerate(group["params"]):
        if isinstance(param, tuple):
            yield param
        else:
            yield (names[position] if names else f"parameter {position} of group {index}"), param


def unwrapped(name: str) -> str:
    """A parameter's name without what wrappers of its module put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def salts(group: Group, first: int) -> Iterator[int]:
    """What the random numbers and the turn of each of a group's parameters depend on: 32 bits.

    They come from the names, and so stay the same when each parameter, or a share of them, has an
    optimizer of its own. Without names they come from the places, from `first` on, and then share
    the turns out evenly.
    """
    names = group.get("param_names")
    for position in range(len(group["params"])):
        if names:
            yield zlib.crc32(unwrapped(names[position]).encode())
        else:
            yield (first + position) * GOLDEN_RATIO & 0xFFFFFFFF


def named_groups(groups: list[Group]) -> NamedGroups:
    """The groups, with names and salts as `named_params` and `salts` give them."""
    first = 0
    for index, group in enumerate(groups):
        each = zip(named_params(group, index), salts(group, first), strict=True)
        yield index, group, ((name, param, salt) for (name, param), salt in each)
        first += len(group["params"])


def learning_rate(group: Group) -> float:
    """How fast a group's weights move: projected ones, and plain ones with a `scale`, by less."""
    return float(group["lr"]) * float(group.get("scale", 1.0))


def normalized(group: Group, defaults: Group, index: int) -> Group:
    """A checked copy of a parameter group in the form that the optimizer keeps.

    Args:
        group: as the user gave it; `alpha` is accepted for `scale`, as in Fira.
        defaults: what the constructor set for every group.
        index: position of the group, for messages.

    Raises:
        ValueError, TypeError: an option or a parameter does not fit.
    """
    # Groups of another optimizer may be handed on, with its method.
    group = {**group, "format": defaults["format"], "method": defaults["method"]}
    params = group["params"]
    group["params"] = [params] if isinstance(params, Tensor) else params
    if not isinstance(params, set):  # left to torch, which refuses sets with its own text
        group["params"] = list(group["params"])
    _check_keys(group, defaults, index)
    _rename_alpha(group, index)
    if is_projected(group):
        for key, value in PROJECTION_DEFAULTS.items():
            group.setdefault(key, value)
    check_options({**defaults, **group}, index)
    return group


def check_options(group: Group, index: int, capturable: bool = True) -> None:
    """Raises ValueError or TypeError if an option of a group does not fit.

    Schedulers and users write to groups, so this is asked whenever one changed, too. Values on
    another device than the CPU are not read: the host would wait for them.
    """
    name = f"group {index}: "
    _check_complete(group, index)
    _check_lr(group["lr"], name, capturable)
    for key in ("lr", "eps", "weight_decay"):
        _check_number(group[key], name + key)
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise ValueError(f"{name}betas must be two values in [0, 1), got {betas}")
    if not isinstance(group["maximize"], bool):
        raise TypeError(f"{name}maximize must be True or False, got {group['maximize']!r}")
    for beta in betas:
        _check_number(beta, name + "betas", below=1.0)
    if "scale" in group:
        _check_number(group["scale"], name + "scale")
    if not is_projected(group):
        if group.get("scale", 1.0) == 0:
            raise ValueError(
                f"{name}scale must be above 0 without a rank, got {group['scale']}; to keep"
                " weights as they are, set requires_grad=False"
            )
        return
    for key in ("rank", "update_proj_gap"):
        group[key] = positive_int(group[key], name + key)
    if group["proj_type"] not in PROJECTION_TYPES:
        raise ValueError(
            f"{name}proj_type must be one of {', '.join(PROJECTION_TYPES)},"
            f" got {group['proj_type']!r}"
        )


def _check_lr(lr: object, name: str, capturable: bool) -> None:
    """Raises ValueError if reading the learning rate would wait for a device at every step."""
    if isinstance(lr, Tensor) and lr.device.type != "cpu" and not capturable:
        raise ValueError(
            f"{name}lr is a tensor on {lr.device}, which the host would wait for at every"
            " step; pass a float, a tensor on the CPU, or capturable=True"
        )


def _check_keys(group: Group, defaults: Group, index: int) -> None:
    """Refuses slips of the pen, which would train another way in silence."""
    unknown = [key for key in group if key not in (*OWN_KEYS, *OTHER_KEYS, *defaults)]
    for key in unknown:
        meant = difflib.get_close_matches(str(key), OWN_KEYS, n=1, cutoff=0.75)
        if meant and abs(len(key) - len(meant[0])) <= 1:
            raise ValueError(f"group {index}: {key!r} is not an option; do you mean {meant[0]!r}?")
    if misplaced := [key for key in unknown if key in FORMAT_OPTIONS]:
        raise ValueError(
            f"group {index}: {', '.join(misplaced)}: options of the optimizer, not of its groups:"
            " pass them to the constructor"
        )
    alone = [key for key in ("update_proj_gap", "proj_type") if key in group]
    if alone and not is_projected(group):
        raise ValueError(
            f"group {index}: {' and '.join(alone)} without a rank: give it a rank to project it,"
            " or leave them out to train it by AdamW"
        )
    if unknown and is_projected(group):
        notice_once(
            logging.WARNING, f"group {index}: of no effect here: {', '.join(map(str, unknown))}"
        )


def _check_complete(group: Group, index: int) -> None:
    """Options that were taken out of a group, or the name of one that is kept under another."""
    needed = ["lr", "betas", "eps", "weight_decay", "maximize"]
    if is_projected(group):
        needed += PROJECTION_DEFAULTS
    missing = [key for key in needed if key not in group]
    if missing:
        raise ValueError(f"group {index} has no {', '.join(missing)}")
    if "alpha" in group:
        raise ValueError(f"group {index}: alpha is kept as 'scale': write to group['scale']")


def _check_number(value: object, name: str, below: float = math.inf) -> None:
    """Of a number, or of a tensor with one element."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must have one element, got shape {tuple(value.shape)}")
        if value.device.type != "cpu":
            return
    elif isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 <= float(value) < below:
        bound = "finite" if below == math.inf else f"below {below:g}"
        raise ValueError(f"{name} must be at least 0 and {bound}, got {value}")


def _rename_alpha(group: Group, index: int) -> None:
    alpha = group.pop("alpha", None)
    if alpha is None:
        return
    if group.setdefault("scale", alpha) != alpha:
        raise ValueError(
            f"group {index}: alpha is another name of scale, got alpha={alpha} and"
            f" scale={group['scale']}"
        )
