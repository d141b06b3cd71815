"""In which format a parameter's moments are held, and from one format to another."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from ..ops.bases import basis_entries, loaded_basis
from ..ops.codes import (
    FLAT_GROUPS,
    FORMATS,
    Groups,
    Stored,
    channel_groups,
    loaded,
    new_stored,
    store,
)
from ..ops.contract import Side, basis_shape, moment_dtype
from .placement import is_sharded

StateFormat = Literal["float32", "bfloat16", "int8"]
BasisFormat = Literal["weight", "int8", "int4"]
MasterBits = Literal[24] | None
STATE_FORMATS = tuple(FORMATS)
BASIS_FORMATS = ("weight", "int8", "int4")
# Of what holds the codes.
BASIS_NAMES: dict[torch.dtype, BasisFormat] = {torch.int8: "int8", torch.uint8: "int4"}

# With fewer elements, or one dimension, a parameter that is not projected keeps wide moments: norms
# and biases are few numbers, and take hardly any memory.
SMALLEST_LOW = 4096


def format_for(param: Tensor, projected: bool, wanted: StateFormat) -> StateFormat:
    """The format that a parameter's moments are held in, if `wanted` is the optimizer's."""
    if projected:
        # Elements that share a scale, and noise, would depend on where shards begin.
        return "float32" if is_sharded(param) else wanted
    large = param.dim() > 1 and param.numel() >= SMALLEST_LOW
    return wanted if is_whole(param) and large else "float32"


def has_low_bits(param: Tensor, master: MasterBits) -> bool:
    """Whether a parameter is held in more bits than its dtype has."""
    return master == 24 and param.dtype is torch.bfloat16 and is_whole(param)


def is_whole(param: Tensor) -> bool:
    """Whether its values lie in memory of its own: it is no shard, and no subclass' codes."""
    own = type(param).__torch_dispatch__ is Tensor.__torch_dispatch__
    return own and param.layout is torch.strided


def basis_dtype(rows: int, param: Tensor, wanted: BasisFormat) -> torch.dtype:
    """What holds a basis of so many rows: int4, two codes in a byte of uint8, needs an even number
    of them, and is int8 otherwise.
    """
    if wanted == "weight":
        return param.dtype
    return torch.int8 if wanted == "int8" or rows % 2 else torch.uint8


def basis_format(side: Side, param: Tensor, wanted: BasisFormat) -> BasisFormat:
    """The format that a parameter's basis is held in, if `wanted` is the optimizer's."""
    rows, _ = basis_shape((param.shape[0], param.shape[1]), side, 1)
    return BASIS_NAMES.get(basis_dtype(rows, param, wanted), "weight")


def new_basis(shape: tuple[int, int], param: Tensor, wanted: BasisFormat) -> dict[str, Tensor]:
    """The entries of P in a projected parameter's state, before its first basis."""
    zeros = torch.zeros(shape, dtype=param.dtype, device=param.device)
    return basis_entries(zeros, basis_dtype(shape[0], param, wanted))


def convert_basis(state: dict[str, Any], param: Tensor, wanted: BasisFormat) -> bool:
    """Brings P of a state into a format, each entry to the nearest; whether that changed it."""
    shape, held = (param.shape[0], param.shape[1]), state["basis"].dtype
    rows, _ = basis_shape(shape, Side(state["side"]), state["basis"].shape[1])
    dtype = basis_dtype(rows, param, wanted)
    if held is dtype or (held.is_floating_point and dtype.is_floating_point):
        return False
    entries = basis_entries(loaded_basis(state), dtype)
    state.pop("basis_scale", None)
    state.update(entries)
    return True


def check_format(name: str, param: Tensor, wanted: StateFormat) -> None:
    """Raises TypeError if a parameter's moments cannot be held in this format."""
    if wanted != "float32" and param.dtype is torch.float64:
        raise TypeError(
            f"{name} ({tuple(param.shape)}, {param.dtype}) has moments in float64, which"
            f" state={wanted!r} does not hold: use float32 weights, or state='float32'"
        )


def format_of(state: dict[str, Any]) -> StateFormat:
    """The format of a state; moments in float64 count as float32."""
    forms: dict[torch.dtype, StateFormat] = {torch.bfloat16: "bfloat16", torch.int8: "int8"}
    return forms.get(state["exp_avg"].dtype, "float32")


def groups_of(state: dict[str, Any]) -> Groups:
    """Which moments of a state share a scale, if they are codes."""
    return channel_groups(Side(state["side"])) if "basis" in state else FLAT_GROUPS


def moments_of(state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """M and V of a state in the dtype of arithmetic: copies, unless they are held in it."""
    return loaded(Stored.of(state), groups_of(state))


def moments_dtype(param: Tensor, form: StateFormat) -> torch.dtype:
    """What holds M of a parameter in a format."""
    return moment_dtype(param.dtype) if form == "float32" else FORMATS[form]


def new_moments(
    shape: Sequence[int], param: Tensor, form: StateFormat, groups: Groups
) -> dict[str, Tensor]:
    """The entries of M and V in a parameter's state, before its first step."""
    stored = new_stored(shape, moments_dtype(param, form), param.device, groups)
    return {key: value for key, value in stored._asdict().items() if value is not None}


def convert(state: dict[str, Any], param: Tensor, form: StateFormat) -> None:
    """Brings M and V of a state into a format, each to the nearest."""
    exp_avg, exp_avg_sq = moments_of(state)
    groups, wide = groups_of(state), moment_dtype(param.dtype)
    entries = new_moments(exp_avg.shape, param, form, groups)
    store(Stored(**entries), exp_avg.to(wide), exp_avg_sq.to(wide), groups)
    for key in Stored._fields:
        state.pop(key, None)
    state.update(entries)
