"""Weights that are spread over processes, as DTensors: what is here of them, and of their states.

DTensors end at the optimizer's door: a step takes the local part of a weight, of its gradient and
of its moments, and no operation of a DTensor. Asked are only methods and attributes of DTensors, so
that torch's module of them is not imported for those who have none.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.contract import Side
from ..ops.tensors import READER

State = dict[str, Any]

# Of a state, what is spread as the weight is.
SPREAD = ("exp_avg", "exp_avg_sq", "first_direction", "residual_avg", "residual_avg_scale")


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor; its module, which takes time to import, is not asked."""
    return type(tensor).__name__ == "DTensor"


def spread_of(tensor: Any) -> tuple[Any, tuple[Any, ...]]:
    """The mesh and the placements of a DTensor, of whose type the annotations say nothing."""
    return tensor.device_mesh, tuple(tensor.placements)


def local(tensor: Any) -> Tensor:
    """What is here of a DTensor, in the same memory; any other tensor as it is."""
    return tensor._local_tensor if is_sharded(tensor) else tensor


def local_grad(param: Tensor) -> Tensor:
    """What is here of a weight's gradient, spread as the weight is.

    Tensor parallelism may leave a gradient spread in another way: ranks then exchange it.
    """
    grad: Any = param.grad
    if is_sharded(param) and spread_of(grad)[1] != spread_of(param)[1]:
        grad = grad.redistribute(*spread_of(param))
    return local(grad)


def spread_like(param: Tensor, part: Tensor, shape: Sequence[int]) -> Tensor:
    """A DTensor that is spread as another one is; nobody communicates.

    Args:
        param: a DTensor.
        part: what is here, contiguous.
        shape: of the whole, which shards of unequal sizes do not tell.
    """
    stride = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    make = type(param).from_local  # type: ignore[attr-defined]
    mesh, placements = spread_of(param)
    sizes = torch.Size(shape)
    return make(part, mesh, placements, run_check=False, shape=sizes, stride=tuple(stride))


def local_state(state: State) -> State:
    """A copy of a projected state with what is here in the place of DTensors."""
    return state | {key: local(state[key]) for key in SPREAD if key in state}


def put_back(state: State, found: State, param: Tensor) -> None:
    """Brings a projected state to what has become of its local one.

    Args:
        state: of a DTensor.
        found: as `local_state` gave it, since then changed.
        param: the DTensor.
    """
    for key in state.keys() - found.keys():
        del state[key]
    for key, value in found.items():
        if key not in SPREAD:
            state[key] = value
        elif not is_sharded(state.get(key)) or local(state[key]) is not value:
            # Rows are divided of what has as many as the weight, as all has that is of the right.
            rows = param.shape[0] if divides_rows(param) else value.shape[0]
            state[key] = spread_like(param, value, (rows, value.shape[1]))


def facts_here(params: Sequence[Tensor], states: Mapping[Tensor, State]) -> list[object]:
    """What `batches.facts_of` does not see of DTensors: where their local parts are, and how they
    and those of gradients lie.

    Args:
        params: with gradients.
        states: of the optimizer.
    """
    sharded = list(filter(is_sharded, params))
    own = [states.get(param, {}) for param in sharded]
    written = sharded + [state[key] for state in own for key in SPREAD if key in state]
    grads = [local(param.grad) for param in sharded if param.grad is not None]
    layouts = READER.layouts(grads), *map(Tensor.is_neg, grads), *map(Tensor._is_zerotensor, grads)
    spread = [(spread_of(param)[1], spread_of(param.grad)[1]) for param in sharded]
    return [READER.places(list(map(local, written))), *layouts, *spread]


class Placement(NamedTuple):
    """How a projected weight is spread: by rows over at most one axis of its mesh, and as copies
    over the others.

    Attributes:
        mesh: of torch's DTensor.
        axis: of the mesh, that divides the rows; None if every rank has all of them.
    """

    mesh: Any
    axis: int | None

    @classmethod
    def of(cls, param: Tensor) -> "Placement":
        """That of a DTensor which `check_placement` lets through."""
        axes = _dividing(param)
        return cls(spread_of(param)[0], axes[0] if axes else None)

    @property
    def parts(self) -> int:
        """Into how many shards the rows are divided."""
        return 1 if self.axis is None else int(self.mesh.size(self.axis))

    def rows(self, count: int) -> list[int]:
        """How many of so many rows each of the shards has, as `torch.chunk` divides them."""
        size = -(-count // self.parts)
        return [max(0, min(size, count - part * size)) for part in range(self.parts)]


def divides_rows(param: Tensor) -> bool:
    """Whether ranks have different rows of a weight."""
    return is_sharded(param) and bool(_dividing(param))


def check_placement(name: str, param: Tensor, proj_type: str) -> None:
    """Raises NotImplementedError or ValueError if a matrix cannot be projected as it is spread.

    Args:
        name: of the parameter.
        param: a DTensor with two dimensions.
        proj_type: of its group.
    """
    _, placements = spread_of(param)
    told = f"{name} {tuple(param.shape)}, {param.dtype}, is a DTensor with placements {placements}"
    axes = _dividing(param)
    if any(place.is_partial() for place in placements):
        raise NotImplementedError(
            f"{told}: partial sums are no weight: redistribute it to Replicate() or Shard(0)"
        )
    by_rows = all(type(placements[axis]).__name__ == "Shard" for axis in axes)
    if len(axes) > 1 or not by_rows or any(placements[axis].dim for axis in axes):
        raise NotImplementedError(
            f"{told}: projected are weights that one axis of the mesh divides by rows, Shard(0), as"
            " FSDP2 and HSDP do, or that are Replicate(): put it in a group without rank, or leave"
            " tensor parallelism out"
        )
    if axes and proj_type == "left":
        raise ValueError(
            f"{told}: proj_type='left' sums over rows, which are on other ranks: take"
            " proj_type='right', or 'std', which is right for rows on several ranks"
        )
    place = Placement.of(param)
    if (
        axes
        and local(param).shape[0] != place.rows(param.shape[0])[place.mesh.get_local_rank(axes[0])]
    ):
        raise NotImplementedError(
            f"{told}: this rank has {local(param).shape[0]} rows of it, and not those of"
            " torch.chunk: put it in a group without rank"
        )


def check_side(name: str, param: Tensor, state: State) -> None:
    """Raises ValueError if a state is of a side that sums over rows of other ranks."""
    if divides_rows(param) and state.get("side") == Side.LEFT:
        raise ValueError(
            f"{name} {tuple(param.shape)} is {_spread(param)}, and its state is of the left side,"
            " which sums over rows that are on other ranks: train with proj_type='right' from the"
            " start where shards are to come, or begin with a new state"
        )


def distribute(state: State, param: Tensor) -> None:
    """Takes of whole moments, which every rank has, what is here of a DTensor; nobody communicates.

    Args:
        state: of the parameter; what is a DTensor already stays.
        param: a DTensor.
    """
    # Whoever has a DTensor has it.
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = spread_of(param)
    for key in SPREAD:
        if key in state and not is_sharded(state[key]):
            state[key] = distribute_tensor(state[key], mesh, placements, src_data_rank=None)


def check_spread(name: str, param: Tensor, state: State) -> None:
    """Raises ValueError if what a state has for each entry of a weight is spread in another way."""
    check_side(name, param, state)
    for key in SPREAD:
        value = state.get(key)
        if value is None:
            continue
        fits = is_sharded(value) == is_sharded(param)
        if fits and is_sharded(param):
            mesh, placements = spread_of(param)
            fits = spread_of(value) == (mesh, placements)
        if not fits:
            raise ValueError(
                f"{name} is {_spread(param)}, and {key} in its state is {_spread(value)}: after"
                " fully_shard or a change of the mesh load the state through"
                " torch.distributed.checkpoint.state_dict.set_optimizer_state_dict"
            )


def _spread(tensor: Tensor) -> str:
    if not is_sharded(tensor):
        return "a plain tensor"
    _, placements = spread_of(tensor)
    return f"a DTensor with placements {placements}"


def _dividing(param: Tensor) -> list[int]:
    """Axes of the mesh on which ranks have different parts of a DTensor."""
    mesh, placements = spread_of(param)
    return [
        axis
        for axis, place in enumerate(placements)
        if mesh.size(axis) > 1 and not place.is_replicate()
    ]
