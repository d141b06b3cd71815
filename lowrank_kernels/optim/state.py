"""Per-parameter state: tensors, ints and floats only, so that any checkpoint library can hold it.

Projected parameter:
    step          0-d float32, completed steps; on the CPU, with `capturable` beside the weight
    exp_avg       M, the shape of R, float32 (float64 for float64 weights)
    exp_avg_sq    V, as exp_avg
    basis         P, in the dtype of the weight
    side          int, a value of `ops.Side`
    limiter_norm  0-d, the last norm that Fira's limiter stored, 0 for none yet (Fira only)
    ints and floats that tell of its bases: see `subspace.refresh.new_record`
    measured, first_norm, first_direction   of a criterion: see `subspace.when.measure`
    overlaps      of the last refreshes, with lazy ones
    nonfinite, limited   0-d counters, with `monitor`
Other parameter: step, exp_avg, exp_avg_sq as torch.optim.AdamW, moments at least float32.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.contract import Side, basis_shape, moment_dtype, projected_shape
from ..subspace import new_record
from .groups import FORMAT, Group, is_projected, named_params

State = dict[str, Any]


def new_projected_state(
    param: Tensor, rank: int, side: Side, limited: bool, monitored: bool
) -> State:
    """State before the first step; a zero basis projects to zero until it is computed."""
    shape = (param.shape[0], param.shape[1])
    dtype, device = moment_dtype(param.dtype), param.device
    moments = projected_shape(shape, side, rank)
    state = {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros(moments, dtype=dtype, device=device),
        "exp_avg_sq": torch.zeros(moments, dtype=dtype, device=device),
        "basis": torch.zeros(basis_shape(shape, side, rank), dtype=param.dtype, device=device),
        "side": int(side),
        **new_record(),
    }
    complete(state, limited, monitored)
    return state


def complete(state: State, limited: bool, monitored: bool) -> None:
    """Adds to a projected state what an older version, or another method, did not keep."""
    for key, value in new_record().items():
        state.setdefault(key, value)
    names = ["limiter_norm"] * limited + ["nonfinite", "limited"] * monitored
    for name in names:
        if name not in state:
            state[name] = state["exp_avg"].new_zeros(())


def new_plain_state(param: Tensor) -> State:
    """State of an AdamW parameter before its first step."""
    dtype = moment_dtype(param.dtype)
    return {
        "step": torch.zeros((), dtype=torch.float32),
        "exp_avg": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format),
    }


def state_bytes(state: State) -> int:
    """Bytes of the tensors in one parameter's state."""
    return sum(v.numel() * v.element_size() for v in state.values() if isinstance(v, Tensor))


def subspace_stats(state: State) -> dict[str, Any]:
    """What a projected state tells of its bases; see `LowRankAdamW.stats`."""
    step = int(state["step"])
    row = {"step": step, "rank": state["basis"].shape[1]}
    row |= {key: state.get(key, default) for key, default in new_record().items()}
    row["age"] = step - 1 - row.pop("basis_step")
    del row["moments_step"]
    counters = {key: state.get(key) for key in ("nonfinite", "limited")}
    return row | {key: None if x is None else int(x) for key, x in counters.items()}


def check_shapes(name: str, param: Tensor, state: State, projected: bool) -> None:
    """Raises ValueError if a state does not belong to a parameter of this shape."""
    try:
        exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
        expected = tuple(param.shape)
        if projected:
            basis, side = state["basis"], Side(state["side"])
            rank, shape = basis.shape[1], (param.shape[0], param.shape[1])
            expected = projected_shape(shape, side, rank)
            _check_shape(name, param, "basis", basis, basis_shape(shape, side, rank))
    except KeyError as missing:
        raise ValueError(
            f"the state of {name} has no {missing}; it was not saved by this optimizer for"
            f" {'a projected' if projected else 'an AdamW'} parameter"
        ) from None
    _check_shape(name, param, "exp_avg", exp_avg, expected)
    _check_shape(name, param, "exp_avg_sq", exp_avg_sq, expected)


def check_loadable(groups: list[Group], state_dict: State) -> None:
    """Raises ValueError if a state dict cannot be loaded into these groups; changes nothing."""
    saved_groups = state_dict["param_groups"]
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        _check_format(saved, index)
        if is_projected(saved) != is_projected(group):
            kinds = ["an AdamW group", "a projected group"]
            raise ValueError(
                f"group {index} is {kinds[is_projected(group)]} here and"
                f" {kinds[is_projected(saved)]} in the state dict"
            )
    for name, param, projected, key in _saved_params(groups, saved_groups):
        if key in state_dict["state"]:
            check_shapes(name, param, state_dict["state"][key], projected)


def restore(states: Any, groups: list[Group], state_dict: State, capturable: bool) -> None:
    """Puts the saved values back in their own dtypes.

    `Optimizer.load_state_dict` casts every floating-point tensor but `step` to the dtype of the
    parameter: float32 moments of bf16 weights would come back as bf16.
    """
    for _, param, _, key in _saved_params(groups, state_dict["param_groups"]):
        for entry, value in state_dict["state"].get(key, {}).items():
            if entry == "step":
                # It may be a Python float in old files, and on a GPU after a mapped load.
                device = param.device if capturable else "cpu"
                value = torch.as_tensor(value, dtype=torch.float32).to(device, copy=True)
            elif isinstance(value, Tensor):
                value = value.to(param.device, copy=True)
            states[param][entry] = value
    for group in groups:
        group["format"] = FORMAT


def _saved_params(
    groups: list[Group], saved_groups: list[Group]
) -> Iterator[tuple[str, Tensor, bool, Any]]:
    """(name, parameter, projected, key in the saved state) for every parameter.

    Lengths may differ: torch raises for that, after our checks and before it changes anything.
    """
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        named = named_params(group, index)
        for (name, param), key in zip(named, saved["params"], strict=False):
            yield name, param, is_projected(group), key


def _check_format(saved: Group, index: int) -> None:
    version = saved.get("format")
    if not isinstance(version, int):
        raise ValueError(
            f"group {index} of the state dict has no format number: it was not saved by"
            " lowrank_kernels, and its projections cannot be taken over"
        )
    if version > FORMAT:
        raise ValueError(
            f"group {index} of the state dict has format {version}, this version of"
            f" lowrank_kernels reads up to {FORMAT}: upgrade it"
        )


def _check_shape(
    name: str, param: Tensor, key: str, value: Tensor, expected: tuple[int, ...]
) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(
            f"the state of {name} does not fit its shape {tuple(param.shape)}: {key} has shape"
            f" {tuple(value.shape)}, expected {expected}"
        )
