"""What an optimizer tells of itself: how each parameter is trained, what it takes, how it goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import ops
from ..factors.linear import all_trained_parts
from ..ops import BackendUnavailable, Choice, Side
from ..ops.adamw import stepped_by
from ..ops.dispatch import Kind
from .formats import basis_format, format_for, has_low_bits, is_whole, moments_dtype
from .groups import Group, is_projected, learning_rate, named_params, size_of
from .monitor import noise_and_signal
from .placement import is_sharded, local, spread_of
from .state import planned_state, state_bytes, subspace_stats

if TYPE_CHECKING:
    from .lowrank_adamw import LowRankAdamW

Row = dict[str, Any]


def explain(optimizer: LowRankAdamW) -> list[Row]:
    """See `LowRankAdamW.explain`."""
    factors = all_trained_parts()
    return [
        {
            "name": name,
            "shape": tuple(param.shape),
            "dtype": param.dtype,
            **_who(optimizer, name, group, param, factors),
            "lr": learning_rate(group),
            **_formats(optimizer, group, param),
            **_spread(optimizer, group, param),
            "state_bytes": state_bytes(optimizer.state.get(param, {})),
        }
        for name, group, param in _parameters(optimizer)
    ]


def plan(optimizer: LowRankAdamW) -> list[Row]:
    """See `LowRankAdamW.plan`."""
    return [_needs(optimizer, name, group, param) for name, group, param in _parameters(optimizer)]


def stats(optimizer: LowRankAdamW) -> list[Row]:
    """See `LowRankAdamW.stats`."""
    return [
        {
            "name": name,
            **subspace_stats(optimizer.state[param]),
            **_monitored(optimizer, group, param),
        }
        for name, group, param in _parameters(optimizer)
        if is_projected(group) and optimizer.state.get(param)
    ]


def _monitored(optimizer: LowRankAdamW, group: Group, param: Tensor) -> Row:
    """Of what `monitor` keeps; a state may have it from before, until the next step."""
    if not optimizer.monitor:
        return dict.fromkeys(("nonfinite", "limited", "noise", "signal"))
    values = noise_and_signal(optimizer.state[param], float(group["betas"][0]))
    return dict(zip(("noise", "signal"), values, strict=True))


def described(optimizer: LowRankAdamW, groups: str) -> str:
    """An optimizer in a few lines: method, subspace, backend, then the groups as torch has them."""
    name, *rest = groups.splitlines()
    parts = optimizer.method._asdict()
    changes = ", ".join(f"{key}={value!r}" for key, value in optimizer.subspace.changed().items())
    parts |= {"subspace": f"Subspace({changes})", "backend": optimizer.backend}
    used = Counter(row["backend"] for row in explain(optimizer))
    parts["stepped by"] = ", ".join(f"{backend} ({count})" for backend, count in used.items())
    return "\n".join([name, *(f"    {key}: {value}" for key, value in parts.items()), *rest])


def _parameters(optimizer: LowRankAdamW) -> Iterator[tuple[str, Group, Tensor]]:
    for index, group in enumerate(optimizer.param_groups):
        for name, param in named_params(group, index):
            yield name, group, param


def _who(
    optimizer: LowRankAdamW, name: str, group: Group, param: Tensor, factors: set[Tensor]
) -> Row:
    projected, side, rank = is_projected(group), None, None
    if projected:
        _, _, rank, side = size_of(group, param)
        if state := optimizer.state.get(param):
            side, rank = Side(state["side"]), state["basis"].shape[1]
    try:
        if projected:
            choice = _choice(optimizer, name, group, param)
        else:
            choice = _plain_choice(optimizer, group, param, factors)
    except (ValueError, BackendUnavailable) as error:  # what a step would raise
        choice = Choice("none", str(error))
    side_name = None if side is None else side.name.lower()
    return {"projected": projected, "side": side_name, "rank": rank, **choice._asdict()}


def _choice(optimizer: LowRankAdamW, name: str, group: Group, param: Tensor) -> Choice:
    choice = optimizer.choice(ops.requested_backend(optimizer.backend), group, name, param)
    if tiles := ops.tiles(choice.backend):
        choice = choice._replace(reason=f"{choice.reason}; {tiles}")
    kept = _kept(optimizer, param) if is_sharded(param) else ""
    return choice._replace(reason=choice.reason + kept)


def _plain_choice(
    optimizer: LowRankAdamW, group: Group, param: Tensor, factors: set[Tensor]
) -> Choice:
    at = " at lr * scale" if "scale" in group else ""
    why = "a part of a FactoredLinear" if param in factors else "no rank in its group"
    reason = f"AdamW{at}: {why}{_kept(optimizer, param)}"
    form, backend = format_for(param, False, optimizer.state_format), "torch"
    if form != "float32":
        dtypes = param.dtype, (param if param.grad is None else param.grad).dtype
        moments = moments_dtype(param, form)
        kind = Kind(str(param.device), *dtypes, optimizer.capturable, moments=moments)
        backend = stepped_by(kind, has_low_bits(param, optimizer.master))
    return Choice(backend, reason)


def _formats(optimizer: LowRankAdamW, group: Group, param: Tensor) -> Row:
    """In which formats a parameter is held."""
    projected, basis = is_projected(group), None
    if projected:
        basis = basis_format(size_of(group, param).side, param, optimizer.basis_format)
    return {
        "state": format_for(param, projected, optimizer.state_format),
        "basis": basis,
        "master": 24 if has_low_bits(param, optimizer.master) else None,
    }


def _spread(optimizer: LowRankAdamW, group: Group, param: Tensor) -> Row:
    """Over whom a parameter is spread, and what they do together in its steps."""
    placement, told = None, ""
    if is_sharded(param):
        mesh, placements = spread_of(param)
        names = mesh.mesh_dim_names or [f"axis {axis}" for axis in range(mesh.ndim)]
        axes = zip(placements, names, mesh.mesh.shape, strict=True)
        placement = ", ".join(f"{place!r} over {name} of {size}" for place, name, size in axes)
        if is_projected(group):
            # Imported for those who have DTensors.
            from .sharded import collectives_of

            told = collectives_of(param, size_of(group, param).side, optimizer.method)
    elif optimizer.process_group is not None and is_projected(group):
        told = "at a refresh broadcast of P"
    return {"placement": placement, "collectives": told or None}


def _kept(optimizer: LowRankAdamW, param: Tensor) -> str:
    """Why a parameter is not held as the optimizer was asked to."""
    if is_whole(param) or (optimizer.state_format == "float32" and optimizer.master is None):
        return ""
    return f"; a {type(param).__name__} keeps its dtype, and moments in float32"


def _needs(optimizer: LowRankAdamW, name: str, group: Group, param: Tensor) -> Row:
    projected, weight = is_projected(group), local(param).numel() * param.element_size()
    size = size_of(group, param) if projected else None
    state = 0
    if param.requires_grad:
        state = state_bytes(planned_state(param, group, optimizer.method))
    return {
        "name": name,
        "shape": tuple(param.shape),
        "dtype": param.dtype,
        "projected": projected,
        "side": None if size is None else size.side.name.lower(),
        "rank": None if size is None else size.rank,
        **_formats(optimizer, group, param),
        "weight_bytes": weight,
        "gradient_bytes": weight if param.requires_grad else 0,
        "state_bytes": state,
    }
