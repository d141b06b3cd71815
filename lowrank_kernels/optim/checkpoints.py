"""What goes into a state dict and comes out of one: shapes, dtypes, names, and what is refused."""

import logging
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..ops.contract import moment_dtype
from .formats import (
    BASIS_NAMES,
    convert,
    convert_basis,
    format_for,
    format_of,
    has_low_bits,
)
from .groups import FORMAT, PROJECTION_DEFAULTS, Group, is_projected, named_params, unwrapped
from .outside import AMPLIFIED
from .parts import Method
from .placement import check_side, distribute, is_sharded, local, spread_like
from .state import State, check_codes, check_counts, check_shapes, laid_like
from .transformed import MOMENTUM, regrouped

logger = logging.getLogger("lowrank_kernels")

# The axis of length r of each is axis 1 of a basis and `rank_axis` of the moments' side.
MOMENTS = ("exp_avg", "exp_avg_sq")
MOMENT_SCALES = ("exp_avg_scale", "exp_avg_sq_scale")
BASIS = ("basis", "basis_scale")
RANKED = (*MOMENTS, *MOMENT_SCALES, "first_direction", *BASIS)
ON_THE_HOST = ("overlaps",)
# Of a method, on which the size of what the limiter compares depends.
LIMITER_PARTS = {"residual", "per", "corrected"}


def check_loadable(groups: list[Group], state_dict: State, method: Method) -> None:
    """Raises ValueError if a state dict cannot be loaded into these groups of an optimizer of this
    method; changes nothing.

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
    told = {key: _formats_told(saved) for saved in saved_groups for key in saved["params"]}
    gaussian = {key for saved in saved_groups if _is_gaussian(saved) for key in saved["params"]}
    renamed = _renamed(groups, saved_groups)
    for name, param, projected, key in _saved_params(groups, saved_groups):
        if key in state_dict["state"]:
            _check_spread(name, param, state_dict["state"][key])
            check_shapes(name, param, state_dict["state"][key], projected)
            check_counts(name, state_dict["state"][key], projected)
            check_codes(name, state_dict["state"][key])
            _check_told(name, param, projected, state_dict["state"][key], told[key])
            _check_basis(name, state_dict["state"][key], key in gaussian, method)
    if renamed:
        logger.warning(
            "parameters have other names than in the state dict, and go by their places: %s and %d"
            " more",
            renamed[0],
            len(renamed) - 1,
        )
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        _tell_differences(group, saved, index, method.described())


def _check_spread(name: str, param: Tensor, state: State) -> None:
    """Raises ValueError if a state is of shards, or of a side, that the parameter cannot have."""
    check_side(name, param, state)
    if not is_sharded(param) and any(map(is_sharded, state.values())):
        raise ValueError(
            f"the state dict has DTensors for {name}, which is none here: save it with"
            " StateDictOptions(full_state_dict=True), or load it through"
            " torch.distributed.checkpoint, which puts shards together"
        )


def with_method(groups: list[Group], states: State, method: Method) -> list[Group]:
    """A state dict's groups, whose `method` tells what their states were made by, and in which
    formats they are.
    """
    result = []
    for group in groups:
        own = [states[key] for key in group["params"] if "exp_avg" in states.get(key, ())]
        forms = {format_of(state) for state in own} - {"float32"}
        coded = any("basis_scale" in state for state in own)
        told = f", state={min(forms, default='float32')}, basis={'codes' if coded else 'weight'}"
        result.append({**group, "method": method.described() + told})
    return result


def _is_gaussian(saved: Group) -> bool:
    return "range_finder=gaussian" in str(saved.get("method", "")).split(", ")


def _check_basis(name: str, state: State, gaussian: bool, method: Method) -> None:
    """Raises ValueError if a basis is of a kind that the method cannot go on with until it is
    renewed.
    """
    if "basis" not in state:
        return
    if gaussian == method.subspace.orthonormal:
        kinds = ["orthonormal", "Gaussian"]
        finder = "gaussian" if gaussian else "randomized"
        raise ValueError(
            f"the basis of {name} in the state dict is {kinds[gaussian]}, and this optimizer's are"
            f" {kinds[not gaussian]}, with moments of another size: load it into an optimizer made"
            f" with subspace={finder!r}, or load the model's weights alone, and begin with a new"
            " state"
        )
    residual = method.outside.residual
    if residual in AMPLIFIED and BASIS_NAMES.get(state["basis"].dtype) == "int4":
        raise ValueError(
            f"the basis of {name} in the state dict is in int4, which residual={residual!r} cannot"
            " go on with: load the model's weights alone, and begin with a new state"
        )


def _formats_told(saved: Group) -> tuple[str, str]:
    """Of moments and of bases, as `with_method` wrote them; older files hold no codes."""
    _, _, told = str(saved.get("method", "")).partition(", state=")
    moments, _, bases = told.partition(", basis=")
    return moments or "float32", bases or "weight"


def _check_told(
    name: str, param: Tensor, projected: bool, state: State, told: tuple[str, str]
) -> None:
    """Raises ValueError if codes have become numbers: `torch.distributed.checkpoint` copies them
    into whatever tensors the optimizer has that it loads into.
    """
    moments, bases = told
    coded = moments == "int8" and format_for(param, projected, "int8") == "int8"
    wrong = coded and state["exp_avg"].is_floating_point()
    if wrong or (projected and bases == "codes" and state["basis"].is_floating_point()):
        raise ValueError(
            f"the state of {name} was saved in codes and has been loaded as numbers: load it into"
            " an optimizer made with the state=, basis= and master= of the run, and set its"
            " state_format, basis_format and master afterwards"
        )


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


def unpadded(states: State) -> State:
    """The states with moments and bases of their own rank again, and means as they are held now.

    `torch.distributed.checkpoint`, loading into a plain state dict, leaves what is no tensor under
    the keys' names as text: that belongs to the states of the keys themselves.
    """
    texts = {str(key): key for key in states if isinstance(key, int)}
    folded = {key: state for key, state in states.items() if key not in texts}
    for text, key in texts.items():
        if isinstance(states.get(text), dict):
            folded[key] = {**states[key], **states[text]}
    return {
        # Users may keep other things beside the parameters' states.
        key: regrouped(_resized(state, state["rank"], grow=False)) if _has_a_rank(state) else state
        for key, state in folded.items()
    }


def restore(states: Any, groups: list[Group], state_dict: State, method: Method) -> None:
    """Puts the saved values back in their own dtypes, and moments into this optimizer's format.

    `Optimizer.load_state_dict` casts every floating-point tensor but `step` to the dtype of the
    parameter: float32 moments of bf16 weights would come back as bf16.

    Args:
        states: of the optimizer, by parameter, as torch loaded them.
        groups: of the optimizer.
        state_dict: what was loaded.
        method: the optimizer's parts.
    """
    converted: Counter[tuple[str, str]] = Counter()
    saved_groups, own = state_dict["param_groups"], method.described()
    of_other_norms = {
        key
        for group in saved_groups
        if LIMITER_PARTS & _changed_parts(group.get("method"), own).keys()
        for key in group["params"]
    }
    for _, param, projected, key in _saved_params(groups, saved_groups):
        saved = state_dict["state"].get(key, {})
        for entry, value in saved.items():
            if entry == "step":
                # It may be a Python float in old files, and on a GPU after a mapped load.
                device = param.device if method.capturable else torch.device("cpu")
                value = torch.as_tensor(value, dtype=torch.float32, device=device).clone()
            elif isinstance(value, Tensor):
                value = _placed(entry, value, param, projected)
            states[param][entry] = value
        if "exp_avg" in saved:
            converted.update(_converted(states[param], saved, param, projected, method))
        if is_sharded(param):
            distribute(states[param], param)
        # Of another method's steps.
        foreign = {"limiter_norm", *MOMENTUM} - set(method.outside.entries)
        if key in of_other_norms:
            foreign.add("limiter_norm")
        for entry in foreign:
            states.get(param, {}).pop(entry, None)
    for (what, became), count in converted.items():
        logger.warning("the state dict holds %s, of %d parameters: %s", what, count, became)


def _converted(
    state: State, saved: State, param: Tensor, projected: bool, method: Method
) -> Iterator[tuple[str, str]]:
    """Brings a state into this optimizer's formats: what was saved in another one, and what has
    become of it.
    """
    found, own = format_of(saved), format_for(param, projected, method.state)
    if found != own:
        convert(state, param, own)
        yield f"moments in {found}", f"converted to state={own!r}, each value to the nearest"
    if projected and convert_basis(state, param, method.basis):
        held = saved["basis"].dtype
        name = BASIS_NAMES.get(held, str(held).removeprefix("torch."))
        became = f"converted to basis={method.basis!r}, each value to the nearest"
        yield f"bases in {name}", became
    keeps = has_low_bits(param, method.master)
    if "low_bits" in saved and not keeps:
        del state["low_bits"]
        yield "weights of 24 bits", f"their lower 8 are dropped, as master={method.master} has it"
    elif keeps and "low_bits" not in saved:
        yield "weights of 16 bits", "the lower 8 of master=24 begin at zero"


def _placed(entry: str, value: Tensor, param: Tensor, projected: bool) -> Tensor:
    """A copy of a state tensor where, and in the dtype that, the parameter's step expects it."""
    if entry in ON_THE_HOST:
        return value.to("cpu", copy=True)
    if not value.is_floating_point():
        return value.to(param.device, copy=True).contiguous()
    dtype = moment_dtype(param.dtype)
    if entry == "basis":
        dtype = param.dtype
    elif entry in (*MOMENT_SCALES, "basis_scale", "residual_avg_scale"):
        dtype = torch.float32
    elif entry in MOMENTS and value.dtype is torch.bfloat16:
        return value.to(param.device, copy=True).contiguous()
    if not projected and value.shape == param.shape:
        return laid_like(param, value.to(param.device, dtype, copy=True))
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
        whole, axis = state[key], 1 if key in BASIS else int(state["side"])
        value = local(whole)
        if grow:
            size = list(value.shape)
            size[axis] = rank - found
            value = torch.cat([value, value.new_zeros(size)], dim=axis)
        else:
            value = value.narrow(axis, 0, rank).clone(memory_format=torch.contiguous_format)
        if is_sharded(whole):
            shape = [rank if place == axis else size for place, size in enumerate(whole.shape)]
            value = spread_like(whole, value, shape)
        result[key] = value
    return result


def _has_a_rank(state: object) -> bool:
    return isinstance(state, dict) and "basis" in state and "rank" in state


def _full_shape(state: State) -> tuple[int, int]:
    """Sizes of the weight: of the basis' long axis, and of the moments'."""
    basis, codes_a_row = state["basis"], 2 if state["basis"].dtype is torch.uint8 else 1
    return len(basis) * codes_a_row, state["exp_avg"].shape[1 - int(state["side"])]


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
            " lowrank_kernels, and cannot be taken over: load the model's weights alone, and begin"
            " with a new state"
        )
    if version > FORMAT:
        raise ValueError(
            f"group {index} of the state dict has format {version}, this version of"
            f" lowrank_kernels reads up to {FORMAT}: upgrade it"
        )


def _renamed(groups: list[Group], saved_groups: list[Group]) -> list[str]:
    """Old and new names of parameters that are unknown here by their old ones.

    Raises:
        ValueError: a state would go to another parameter than the one that it is of; torch goes by
            places.
    """
    ours = [unwrapped(name) for group in groups for name in group.get("param_names", ())]
    renamed = []
    for index, (group, saved) in enumerate(zip(groups, saved_groups, strict=False)):
        pairs = zip(group.get("param_names", ()), saved.get("param_names", ()), strict=False)
        for place, (here, there) in enumerate(pairs):
            here, there = unwrapped(here), unwrapped(there)
            meant = here if here == there else _counterpart(there, ours)
            if meant == here:
                continue
            if meant is not None:
                raise ValueError(
                    f"place {place} of group {index} holds the state of {there}, and is {here}"
                    " here: the layers were registered, or the groups built, in another order;"
                    " build them as they were when the state was saved"
                )
            renamed.append(f"{there} -> {here}")
    return renamed


def _counterpart(name: str, names: list[str]) -> str | None:
    """The one of the names that means the same parameter; either may have a prefix."""
    alike = [n for n in names if f".{n}".endswith(f".{name}") or f".{name}".endswith(f".{n}")]
    return min(alike, key=lambda other: abs(len(other) - len(name)), default=None)


def _tell_differences(group: Group, saved: Group, index: int, own: str) -> None:
    """What was made in another way; the saved options are taken, as torch does."""
    differences = [
        f"{key} {saved[key]} (here {group[key]})"
        for key in ("rank", *PROJECTION_DEFAULTS)
        if key in saved and key in group and saved[key] != group[key]
    ]
    if differences:
        logger.warning(
            "group %d goes on with the options of the state dict: %s; to change them, write to"
            " optimizer.param_groups after loading",
            index,
            ", ".join(differences),
        )
    changed = _changed_parts(saved.get("method"), own)
    if changed:
        logger.warning(
            "group %d was trained by another method, and goes on with this optimizer's: %s",
            index,
            ", ".join(f"{was} (here {now})" for was, now in changed.values()),
        )


def _changed_parts(theirs: str | None, ours: str) -> dict[str, tuple[str, str]]:
    """By name what a part was and what it is here, of what `Method.described` tells; nothing of a
    file that does not tell it.
    """
    if theirs is None:
        return {}
    # What formats are in is told elsewhere.
    was, now = (
        {part.partition("=")[0]: part for part in told.partition(", state=")[0].split(", ")}
        for told in (theirs, ours)
    )
    return {
        name: (was.get(name, f"no {name}"), now.get(name, f"no {name}"))
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    }
