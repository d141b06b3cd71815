"""Per-parameter state: tensors, ints and floats only, so that any checkpoint library can hold it.

Every key is there from the first step on, since such libraries take the list of keys from a fresh
optimizer's state. Projected parameter:

    step          0-d float32, completed steps; on the CPU, with `capturable` beside the weight
    exp_avg       M, the shape of R, float32 (float64 for float64 weights)
    exp_avg_sq    V, as exp_avg
    basis         P, in the dtype of the weight
    side          int, a value of `ops.Side`
    rank          int, r; a saved state has M, V and P filled up to the group's rank with zeros
    salt          int, what its random numbers and its turn to refresh depend on
    limiter_norm  0-d, the last norm that Fira's limiter stored, 0 for none yet (Fira only)
    ints and floats that tell of its bases: see `subspace.refresh.new_record`
    what a criterion or lazy refreshes keep: see `subspace.when.new_measures`
    nonfinite, limited   0-d counters, with `monitor`

Other parameter: step, exp_avg, exp_avg_sq as torch.optim.AdamW, moments at least float32.
"""

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.contract import Side, basis_shape, moment_dtype, projected_shape
from ..ops.notices import notice_once
from ..subspace import Subspace, new_measures, new_record
from .groups import FORMAT, PROJECTION_DEFAULTS, Group, is_projected, named_params, unwrapped

State = dict[str, Any]

# The axis of length r of each is axis 1 of a basis and `rank_axis` of the moments' side.
RANKED = ("exp_avg", "exp_avg_sq", "first_direction", "basis")
ON_THE_HOST = ("overlaps",)


def new_projected_state(
    param: Tensor, rank: int, side: Side, salt: int, subspace: Subspace, *counted: str
) -> State:
    """State before the first step; a zero basis projects to zero until it is computed.

    Args:
        param: the weight, rows x cols.
        rank: r, at most min(rows, cols).
        side: of the basis.
        salt: of its random numbers.
        subspace: what it keeps of its own.
        counted: names of 0-d entries, see `complete`.
    """
    shape = (param.shape[0], param.shape[1])
    dtype, device = moment_dtype(param.dtype), param.device
    moments = projected_shape(shape, side, rank)
    state = {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        "exp_avg": torch.zeros(moments, dtype=dtype, device=device),
        "exp_avg_sq": torch.zeros(moments, dtype=dtype, device=device),
        "basis": torch.zeros(basis_shape(shape, side, rank), dtype=param.dtype, device=device),
        "side": int(side),
    }
    complete(state, salt, subspace, *counted)
    return state


def complete(state: State, salt: int, subspace: Subspace, *counted: str) -> None:
    """Adds to a projected state what an older version, or another method, did not keep.

    Args:
        state: of a projected parameter.
        salt: of its random numbers, where it has none yet.
        subspace: what it keeps of its own.
        counted: names of 0-d entries: "limiter_norm", "nonfinite", "limited".
    """
    expected = {
        "rank": state["basis"].shape[1],
        "salt": salt,
        **new_record(),
        **new_measures(state["exp_avg"], subspace),
    }
    for name in counted:
        expected[name] = state["exp_avg"].new_zeros(())
    for key, value in expected.items():
        state.setdefault(key, value)


def new_plain_state(param: Tensor) -> State:
    """State of an AdamW parameter before its first step."""
    dtype = moment_dtype(param.dtype)
    return {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
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


def check_storage(name: str, param: Tensor, state: State) -> None:
    """Raises ValueError if a weight was moved to another dtype or device than its state."""
    wide = moment_dtype(param.dtype)
    for key in ("exp_avg", "exp_avg_sq", "basis", "limiter_norm"):
        value = state.get(key)
        if value is None:
            continue
        dtype = param.dtype if key == "basis" else wide
        if value.dtype is not dtype or value.device != param.device:
            raise ValueError(
                f"{name} is {param.dtype} on {param.device}, and its state has {key} as"
                f" {value.dtype} on {value.device}: after moving or casting a model call"
                " optimizer.load_state_dict(optimizer.state_dict()), which converts the state"
            )


def check_loadable(groups: list[Group], state_dict: State) -> None:
    """Raises ValueError if a state dict cannot be loaded into these groups; changes nothing.

    What differs and can be loaded is said.
    """
    saved_groups = state_dict["param_groups"]
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        _check_format(saved, index)
        if is_projected(saved) != is_projected(group):
            kinds = ["an AdamW group", "a projected group"]
            raise ValueError(
                f"group {index} is {kinds[is_projected(group)]} here and"
                f" {kinds[is_projected(saved)]} in the state dict"
            )
    _check_order(groups, saved_groups)
    for name, param, projected, key in _saved_params(groups, saved_groups):
        if key in state_dict["state"]:
            check_shapes(name, param, state_dict["state"][key], projected)
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        _tell_differences(group, saved, index)


def padded(states: State, groups: list[Group]) -> State:
    """A state dict's states with moments and bases of the group's full rank, filled with zeros.

    An adaptive rank is smaller, and another one in each matrix and at each refresh; checkpoint
    libraries load into tensors of the shapes that a fresh optimizer has.
    """
    result = dict(states)
    for group in filter(is_projected, groups):
        for key in group["params"]:
            if "basis" in states.get(key, ()):
                result[key] = _resized(states[key], group["rank"], grow=True)
    return result


def cut(states: State) -> State:
    """The states with moments and bases of their own rank again."""
    return {
        # Users may keep other things beside the parameters' states.
        key: _resized(state, state["rank"], grow=False) if _has_a_rank(state) else state
        for key, state in states.items()
    }


def restore(states: Any, groups: list[Group], state_dict: State, capturable: bool) -> None:
    """Puts the saved values back in their own dtypes.

    `Optimizer.load_state_dict` casts every floating-point tensor but `step` to the dtype of the
    parameter: float32 moments of bf16 weights would come back as bf16.

    Args:
        states: of the optimizer, by parameter, as torch loaded them.
        groups: of the optimizer.
        state_dict: what was loaded.
        capturable: steps are counted beside the weights.
    """
    for _, param, projected, key in _saved_params(groups, state_dict["param_groups"]):
        for entry, value in state_dict["state"].get(key, {}).items():
            if entry == "step":
                # It may be a Python float in old files, and on a GPU after a mapped load.
                device = param.device if capturable else torch.device("cpu")
                value = torch.as_tensor(value, dtype=torch.float32, device=device).clone()
            elif isinstance(value, Tensor):
                value = _placed(entry, value, param, projected)
            states[param][entry] = value


def _placed(entry: str, value: Tensor, param: Tensor, projected: bool) -> Tensor:
    """A copy of a state tensor where, and in the dtype that, the parameter's step expects it."""
    if entry in ON_THE_HOST:
        return value.to("cpu", copy=True)
    if not value.is_floating_point():
        return value.to(param.device, copy=True)
    dtype = param.dtype if entry == "basis" else moment_dtype(param.dtype)
    if not projected and value.shape == param.shape:
        # Laid out like the weight, as torch's fused kernels need it, whatever was saved.
        return torch.empty_like(param, dtype=dtype).copy_(value)
    return value.to(param.device, dtype, copy=True).contiguous()


def _resized(state: State, rank: int, *, grow: bool) -> State:
    """A state of which M, V and P have this rank; the state itself if they have."""
    found = state["basis"].shape[1]
    rank = min(rank, *_full_shape(state)) if grow else rank
    if (found >= rank) if grow else (found <= rank):
        return state
    result = dict(state)
    for key in RANKED:
        if key not in state:
            continue
        value, axis = state[key], 1 if key == "basis" else int(state["side"])
        if grow:
            size = list(value.shape)
            size[axis] = rank - found
            result[key] = torch.cat([value, value.new_zeros(size)], dim=axis)
        else:
            result[key] = value.narrow(axis, 0, rank).clone(memory_format=torch.contiguous_format)
    return result


def _has_a_rank(state: object) -> bool:
    return isinstance(state, dict) and "basis" in state and "rank" in state


def _full_shape(state: State) -> tuple[int, int]:
    """Sizes of the weight: of the basis' long axis, and of the moments'."""
    return state["basis"].shape[0], state["exp_avg"].shape[1 - int(state["side"])]


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


def _check_order(groups: list[Group], saved_groups: list[Group]) -> None:
    """Raises ValueError if a state would go to another parameter than the one that it is of.

    torch goes by places. A name that is unknown here is a renamed parameter, which is only told.
    """
    ours = [unwrapped(name) for group in groups for name in group.get("param_names", ())]
    renamed = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        pairs = zip(group.get("param_names", ()), saved.get("param_names", ()), strict=False)
        for place, (here, there) in enumerate(pairs):
            here, there = unwrapped(here), unwrapped(there)
            if _same(here, there):
                continue
            if any(_same(name, there) for name in ours):
                raise ValueError(
                    f"place {place} of group {index} holds the state of {there}, and is {here}"
                    " here: the layers were registered, or the groups built, in another order;"
                    " build them as they were when the state was saved"
                )
            renamed.append(f"{there} -> {here}")
    if renamed:
        notice_once(
            logging.WARNING,
            f"parameters have other names than in the state dict, and go by their places:"
            f" {renamed[0]} and {len(renamed) - 1} more",
        )


def _same(one: str, other: str) -> bool:
    """Whether two names mean one parameter: either may have a prefix."""
    return one == other or one.endswith("." + other) or other.endswith("." + one)


def _tell_differences(group: Group, saved: Group, index: int) -> None:
    """What was made in another way; the saved options are taken, as torch does."""
    differences = [
        f"{key} {saved[key]} (here {group[key]})"
        for key in ("rank", *PROJECTION_DEFAULTS)
        if key in saved and key in group and saved[key] != group[key]
    ]
    if differences:
        notice_once(
            logging.WARNING,
            f"group {index} goes on with the options of the state dict: {', '.join(differences)};"
            " to change them, write to optimizer.param_groups after loading",
        )
    theirs, ours = saved.get("method"), group["method"]
    if theirs is not None and theirs != ours:
        parts = zip(theirs.split(", "), ours.split(", "), strict=False)
        changed = ", ".join(f"{was} (here {now})" for was, now in parts if was != now)
        notice_once(
            logging.WARNING,
            f"group {index} was trained by another method, and goes on with this optimizer's:"
            f" {changed}",
        )


def _check_shape(
    name: str, param: Tensor, key: str, value: Tensor, expected: tuple[int, ...]
) -> None:
    if tuple(value.shape) != expected:
        raise ValueError(
            f"the state of {name} does not fit its shape {tuple(param.shape)}: {key} has shape"
            f" {tuple(value.shape)}, expected {expected}"
        )
