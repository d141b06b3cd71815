"""Per-parameter state: tensors, ints and floats only, so that any checkpoint library can hold it.

Of a weight that is spread over processes as a DTensor, what has its rows, or the shape of R, is
spread in the same way, and all else, P too, is whole and the same everywhere.

Every key is there from the first step on, since such libraries take the list of keys from a fresh
optimizer's state. Projected parameter:

    step          0-d float32, completed steps; on the CPU, with `capturable` beside the weight
    exp_avg       M, the shape of R: float32 (float64 for float64 weights), bfloat16, or int8 codes
    exp_avg_sq    V, as exp_avg; codes are uint8
    exp_avg_scale, exp_avg_sq_scale   float32, those of codes; see `ops.codes`
    basis         P, in the dtype of the weight, or int8 codes, or uint8 with two of int4
    basis_scale   float32, those of codes, 1 x r or ceil(rows of P / 64) x r; see `ops.bases`
    side          int, a value of `ops.Side`
    rank          int, r; a saved state has M, V and P filled up to the group's rank with zeros
    salt          int, what its random numbers and its turn to refresh depend on
    limiter_norm  0-d, the last norm that Fira's limiter stored, 0 before the first step, -1 if no
                  step had a norm worth storing (Fira only)
    ints and floats that tell of its bases: see `subspace.refresh.new_record`
    what a criterion or lazy refreshes keep: see `subspace.when.new_measures`
    nonfinite, limited   0-d counters, with `monitor`
    norm_sq       0-d, with `monitor` the running mean of |R|^2, times 1 - beta1^t of its t steps
    norm_step     int, with `monitor` completed steps when that began
    low_bits      int8, the shape of the weight, of a bfloat16 weight with master=24
    residual_avg, residual_avg_scale   int8, the shape of the weight, contiguous, and float32, one
                  for 256 neighbours in a row: the mean of what is outside, with residual_momentum

Other parameter: step, exp_avg, exp_avg_sq as torch.optim.AdamW, moments at least float32; matrices
of some size also in bfloat16 or in codes, contiguous, and then with a salt; low_bits as above.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from ..ops.bases import BASIS_CODES, code_shapes
from ..ops.codes import FLAT_GROUPS, ROW_GROUPS, Stored, channel_groups
from ..ops.contract import Side, basis_shape, moment_dtype, projected_shape
from ..ops.notices import notice_once
from ..ops.reference import NOTHING_STORED
from ..subspace import Subspace, new_measures, new_record
from .checks import is_dense, is_unresolved
from .formats import (
    StateFormat,
    convert,
    convert_basis,
    format_for,
    format_of,
    groups_of,
    has_low_bits,
    new_basis,
    new_moments,
)
from .groups import Group, cut_rank, is_projected, side_for, side_of, size_of
from .parts import Method
from .placement import channels_here, is_sharded, local, local_state, put_back
from .transformed import MOMENTUM, new_momentum

State = dict[str, Any]

# Of a projected state, what every backend takes as contiguous.
CONTIGUOUS = (*Stored._fields, *MOMENTUM)

# In a projected state, with `monitor`.
MONITORED = ("nonfinite", "limited", "norm_sq", "norm_step")

# What steps may be counted in: 1 can be added to it in place.
COUNTS = (torch.float32, torch.float64, torch.int32, torch.int64)


def new_state(param: Tensor, group: Group, salt: int, method: Method) -> State:
    """State of a parameter before its first step, on its device.

    Args:
        param: the weight.
        group: its options; with a rank it is projected.
        salt: of its random numbers.
        method: the optimizer's parts.
    """
    if is_projected(group):
        rank, side = cut_rank(group["rank"], *param.shape), side_for(group, param)
        own = method._replace(state=format_for(param, True, method.state))
        like = channels_here(param, side) if is_sharded(param) else param
        state = new_projected_state(like, rank, side, salt, own)
        if is_sharded(param):
            put_back(state, dict(state), param)
            if side != side_of(group["proj_type"], *param.shape):
                where = ("left", "right")[side]
                text = f"the basis of {tuple(param.shape)} matrices is on the {where}, since ranks"
                what = ("columns", "rows")[side]
                notice_once(logging.INFO, f"{text} have different {what} of them")
    else:
        state = new_plain_state(param, salt, method.state)
    if has_low_bits(param, method.master):
        state["low_bits"] = torch.zeros_like(param, dtype=torch.int8)
    if method.capturable:
        state["step"] = state["step"].to(param.device)
    return state


def planned_state(param: Tensor, group: Group, method: Method) -> State:
    """The state that a parameter is going to have, on the meta device; see `new_state`."""
    twin = torch.empty(local(param).shape, dtype=param.dtype, device="meta")
    forms = method._replace(
        state=format_for(param, is_projected(group), method.state),
        master=method.master if has_low_bits(param, method.master) else None,
    )
    if is_projected(group) and is_sharded(param):
        _, _, rank, side = size_of(group, param)
        twin = torch.empty(channels_here(param, side).shape, dtype=param.dtype, device="meta")
        return new_projected_state(twin, rank, side, 0, forms)
    return new_state(twin, group, 0, forms)


def new_projected_state(param: Tensor, rank: int, side: Side, salt: int, method: Method) -> State:
    """State before the first step; a zero basis projects to zero until it is computed.

    Args:
        param: the weight, rows x cols.
        rank: r, at most min(rows, cols).
        side: of the basis.
        salt: of its random numbers.
        method: the optimizer's parts.
    """
    shape, groups = (param.shape[0], param.shape[1]), channel_groups(side)
    state = {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        **new_moments(projected_shape(shape, side, rank), param, method.state, groups),
        **new_basis(basis_shape(shape, side, rank), param, method.basis),
        "side": int(side),
    }
    complete(state, salt, method.subspace, *method.counters)
    if method.outside.residual_momentum:
        state |= new_momentum(param)
    return state


def complete(state: State, salt: int, subspace: Subspace, *counted: str) -> None:
    """Adds to a projected state what an older version, or another method, did not keep.

    Args:
        state: of a projected parameter.
        salt: of its random numbers, where it has none yet.
        subspace: what it keeps of its own.
        counted: names of 0-d entries: "limiter_norm", "nonfinite", "limited", "norm_sq".
    """
    basis = state["basis"]
    exp_avg = state["exp_avg"]
    like = basis.new_empty(exp_avg.shape, dtype=moment_dtype(exp_avg.dtype))
    expected = {
        "rank": basis.shape[1],
        "salt": salt,
        **new_record(),
        **new_measures(like, subspace),
    }
    for name in counted:
        expected[name] = like.new_zeros(())
    if "limiter_norm" in counted and state.get("basis_step", -1) >= 0:
        # Of another method's steps: there is momentum, and no norm of it.
        expected["limiter_norm"] = like.new_full((), NOTHING_STORED)
    if "norm_sq" in counted and "norm_sq" not in state:
        expected["norm_step"] = int(state["step"])
    for key, value in expected.items():
        state.setdefault(key, value)


def keep_up(state: State, param: Tensor, group: Group, salt: int, method: Method) -> None:
    """Brings a state to what the method keeps now: its formats, what was not kept before, and
    nothing that would be stale.
    """
    projected = is_projected(group)
    if projected and is_sharded(param):
        here = local_state(state)
        own = method._replace(state=format_for(param, True, method.state), master=None)
        keep_up(here, channels_here(param, Side(state["side"])), group, salt, own)
        put_back(state, here, param)
        return
    form = format_for(param, projected, method.state)
    if format_of(state) != form:
        convert(state, param, form)
    if not has_low_bits(param, method.master):
        state.pop("low_bits", None)
    elif "low_bits" not in state:
        state["low_bits"] = torch.zeros_like(param, dtype=torch.int8)
    if projected:
        convert_basis(state, param, method.basis)
        complete(state, salt, method.subspace, *method.counters)
        momentum = MOMENTUM if method.outside.residual_momentum else ()
        if momentum and "residual_avg" not in state:
            state |= new_momentum(param)
        for entry in {*MONITORED, *MOMENTUM} - {*momentum, *(MONITORED if method.monitor else ())}:
            state.pop(entry, None)
    elif form != "float32":
        state.setdefault("salt", salt)
    else:
        # A weight may have been laid out anew, as by `.to(memory_format=...)`.
        for entry in ("exp_avg", "exp_avg_sq"):
            if is_dense(state[entry]):
                state[entry] = laid_like(param, state[entry])


def new_plain_state(param: Tensor, salt: int, form: StateFormat = "float32") -> State:
    """State of an AdamW parameter before its first step."""
    state: State = {"step": torch.zeros((), dtype=torch.float32, device="cpu")}
    form = format_for(param, False, form)
    if form != "float32":
        return {**state, **new_moments(param.shape, param, form, FLAT_GROUPS), "salt": salt}
    for key in ("exp_avg", "exp_avg_sq"):
        # Of subclasses, too, as sharded tensors are.
        state[key] = torch.zeros_like(
            param, dtype=moment_dtype(param.dtype), memory_format=torch.preserve_format
        )
    return state


def forget_moments(state: State) -> None:
    """Lets the moments of a state begin anew, in place; its basis and low bits of a weight stay.

    Steps of a projected parameter go on, since refreshes and noise go by them. Fira's limiter
    compares norms of a direction whose size depends on the steps that the moments have seen.
    """
    for entry in (*Stored._fields, *MOMENTUM, "limiter_norm"):
        if entry in state:
            state[entry].zero_()
    if "basis" in state:
        state["moments_step"] = int(state["step"])
    else:
        state["step"].zero_()


def state_bytes(state: State) -> int:
    """Bytes of the tensors in one parameter's state; of shards of those that are here."""
    held = [local(value) for value in state.values() if isinstance(value, Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def subspace_stats(state: State) -> dict[str, Any]:
    """What a projected state tells of its bases; see `LowRankAdamW.stats`."""
    step = int(state["step"])
    row = {"step": step, "rank": state["basis"].shape[1]}
    row |= {key: state.get(key, default) for key, default in new_record().items()}
    row["age"] = step - 1 - row.pop("basis_step")
    del row["moments_step"]
    counters = {key: state.get(key) for key in ("nonfinite", "limited")}
    return row | {key: None if x is None else int(x) for key, x in counters.items()}


def laid_like(param: Tensor, moment: Tensor) -> Tensor:
    """A moment laid out like its weight, as torch's fused kernels need it, or as it is."""
    laid = torch.empty_like(param, dtype=moment.dtype)
    return moment if laid.stride() == moment.stride() else laid.copy_(moment)


def check_shapes(name: str, param: Tensor, state: State, projected: bool) -> None:
    """Raises ValueError if a state does not belong to a parameter of this shape."""
    try:
        _, exp_avg, exp_avg_sq = state["step"], state["exp_avg"], state["exp_avg_sq"]
        expected = tuple(param.shape)
        if projected:
            basis, side = state["basis"], state["side"]
            if side not in tuple(Side):
                raise ValueError(f"the state of {name} has side {side!r}, which is neither 0 nor 1")
            rank = basis.shape[1] if isinstance(basis, Tensor) and basis.dim() == 2 else 0
            shape = param.shape[0], param.shape[1]
            expected = projected_shape(shape, Side(side), rank)
            shapes = {"basis": basis_shape(shape, Side(side), rank)}
            if isinstance(basis, Tensor) and basis.dtype in BASIS_CODES:
                codes = code_shapes(shapes["basis"], basis.dtype)
                shapes = dict(zip(("basis", "basis_scale"), codes, strict=True))
            for key, wanted in shapes.items():
                _check_shape(name, param, key, state.get(key), wanted)
            for key in {"limiter_norm", "norm_sq"} & state.keys():
                _check_shape(name, param, key, state[key], ())
        elif "basis" in state:
            raise ValueError(f"{name} has the state of a projected parameter, in an AdamW group")
    except KeyError as missing:
        raise ValueError(
            f"the state of {name} has no {missing}; it was not saved by this optimizer for"
            f" {'a projected' if projected else 'an AdamW'} parameter"
        ) from None
    _check_shape(name, param, "exp_avg", exp_avg, expected)
    _check_shape(name, param, "exp_avg_sq", exp_avg_sq, expected)
    for key in {"low_bits", "residual_avg"} & state.keys():
        _check_shape(name, param, key, state[key], tuple(param.shape))
    if "residual_avg" in state:
        key, scales = "residual_avg_scale", ROW_GROUPS.scales(param.shape)
        _check_shape(name, param, key, state.get(key), scales)
    if exp_avg.dtype is torch.int8:
        scales = groups_of(state).scales(expected)
        for key in ("exp_avg_scale", "exp_avg_sq_scale"):
            _check_shape(name, param, key, state.get(key), scales)


def check_counts(name: str, state: State, projected: bool) -> None:
    """Raises ValueError if the numbers of a state cannot be what a run has left."""
    step = float(state.get("step", 0))
    fits = step >= 0
    if projected:
        record = {**new_record(), **state}
        fits = fits and -1 <= record["basis_step"] <= step and 0 <= record["moments_step"] <= step
        fits = fits and 0 <= record.get("norm_step", 0) <= step
        fits = fits and 0 <= record.get("salt", 0) < 2**32 and record["gap_factor"] >= 1
    if not fits:
        numbers = {key: value for key, value in state.items() if isinstance(value, (int, float))}
        raise ValueError(f"the state of {name} was not left by a run: step {step}, {numbers}")


def check_codes(name: str, state: State) -> None:
    """Raises ValueError if codes, or their scales, are none that a run has left."""
    dtypes = {"exp_avg": (torch.int8,), "exp_avg_sq": (torch.uint8,), "basis": BASIS_CODES}
    momentum = state.get("residual_avg")
    if momentum is not None and momentum.dtype is not torch.int8:
        raise ValueError(
            f"the state of {name} has residual_avg as {momentum.dtype}, which are no codes"
        )
    for key, codes in dtypes.items():
        value = state.get(key)
        if value is not None and not value.is_floating_point() and value.dtype not in codes:
            raise ValueError(f"the state of {name} has {key} as {value.dtype}, which are no codes")
    pair = state["exp_avg"], state["exp_avg_sq"]
    if pair[0].is_floating_point() != pair[1].is_floating_point():
        raise ValueError(
            f"the state of {name} has exp_avg as {pair[0].dtype} and exp_avg_sq as {pair[1].dtype}"
        )
    for key in ("exp_avg_scale", "exp_avg_sq_scale", "basis_scale", "residual_avg_scale"):
        scale = state.get(key)
        if scale is None:
            continue
        here = local(scale)
        if not bool(((here >= 0) & (here < float("inf"))).all()):
            raise ValueError(f"the state of {name} has a {key} below 0, or not finite")


def check_storage(name: str, param: Tensor, state: State) -> None:
    """Raises ValueError if a weight was moved to another dtype or device than its state, or if what
    every backend takes as contiguous is not.
    """
    wide = moment_dtype(param.dtype)
    dtypes = _moment_dtypes(state, wide) | {"low_bits": torch.int8}
    if "basis" in state:
        held = state["basis"].dtype
        dtypes["basis"] = held if held in BASIS_CODES else param.dtype
        dtypes |= {"basis_scale": torch.float32, "limiter_norm": wide, "norm_sq": wide}
        dtypes |= {"residual_avg": torch.int8, "residual_avg_scale": torch.float32}
    for key, dtype in dtypes.items():
        value = state.get(key)
        if value is None:
            continue
        if is_unresolved(value):
            raise ValueError(
                f"the state of {name} has {key} with a pending negation or as zeros without memory:"
                " replace it by its clone()"
            )
        if value.dtype is not dtype or value.device != param.device:
            raise ValueError(
                f"{name} is {param.dtype} on {param.device}, and its state has {key} as"
                f" {value.dtype} on {value.device}: after moving or casting a model call"
                " optimizer.load_state_dict(optimizer.state_dict()), which converts the state"
            )
        if "basis" in state and key in CONTIGUOUS and not value.is_contiguous():
            raise ValueError(
                f"the state of {name} has {key} with strides {tuple(value.stride())}: make it"
                " contiguous"
            )


def _moment_dtypes(state: State, wide: torch.dtype) -> dict[str, torch.dtype]:
    """What the moments have to be by the format that M tells of."""
    found = state["exp_avg"].dtype
    if found is torch.int8:
        scales = dict.fromkeys(("exp_avg_scale", "exp_avg_sq_scale"), torch.float32)
        return {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8, **scales}
    low = found is torch.bfloat16 and wide is torch.float32
    return dict.fromkeys(("exp_avg", "exp_avg_sq"), found if low else wide)


def check_step(name: str, state: State) -> None:
    """Raises ValueError if steps cannot be counted; a counter on a device is not read."""
    step, began = state["step"], state.get("moments_step", 0)
    fits = isinstance(step, Tensor) and step.numel() == 1 and step.layout is torch.strided
    fits = fits and step.dtype in COUNTS and not step.is_neg()
    if fits and step.device.type == "cpu":
        fits = began <= float(step) < float("inf")
    if not fits:
        raise ValueError(
            f"the state of {name} has step as {step!r}, with moments from step {began} on; expected"
            " is a float32 tensor with the number of steps taken"
        )


def _check_shape(
    name: str, param: Tensor, key: str, value: object, expected: tuple[int, ...]
) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"the state of {name} has {key} as {value!r}, which is no tensor")
    if tuple(value.shape) != expected:
        raise ValueError(
            f"the state of {name} does not fit its shape {tuple(param.shape)}: {key} has shape"
            f" {tuple(value.shape)}, expected {expected}"
        )
