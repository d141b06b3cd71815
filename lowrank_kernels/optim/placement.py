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

from ..ops.contract import Side, projected_shape, rank_axis
from ..ops.tensors import READER

State = dict[str, Any]

# Of a state, what has R's shape, and what is spread as that, or as the weight is.
MOMENTS = ("exp_avg", "exp_avg_sq", "first_direction")
SPREAD = (*MOMENTS, "residual_avg", "residual_avg_scale")


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


def spread_like(
    like: Tensor, part: Tensor, shape: Sequence[int], placements: Sequence[Any] | None = None
) -> Tensor:
    """A DTensor that is spread over the mesh of another one; nobody communicates.

    Args:
        like: a DTensor.
        part: what is here, contiguous.
        shape: of the whole, which shards of unequal sizes do not tell.
        placements: None for those of the other.
    """
    stride = [math.prod(shape[place + 1 :]) for place in range(len(shape))]
    make = type(like).from_local  # type: ignore[attr-defined]
    mesh, own = spread_of(like)
    placements = own if placements is None else placements
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
            rows, columns = param.shape[0], value.shape[1]
            placements = spread_of(param)[1]
            if key in MOMENTS:
                side = Side(found["side"])
                rank = value.shape[rank_axis(side)]
                rows, columns = projected_shape((rows, param.shape[1]), side, rank)
                placements = _moment_placements(param, side)
            state[key] = spread_like(param, value, (rows, columns), placements)


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
    """How a projected weight is spread over a mesh; over axes that are not named it is copied.

    Attributes:
        mesh: of torch's DTensor.
        rows: axes of the mesh that divide the rows, each what those before it have left: under
            tensor parallelism and FSDP2 that of the first comes first.
        columns: those that divide the columns.
    """

    mesh: Any
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, param: Tensor) -> "Placement":
        """That of a DTensor which `check_placement` lets through."""
        rows, columns = (_nested(param, dim) for dim in (0, 1))
        assert rows is not None
        assert columns is not None
        return cls(spread_of(param)[0], rows, columns)

    @property
    def parts(self) -> int:
        """Into how many shards a matrix is divided."""
        return math.prod(int(self.mesh.size(axis)) for axis in (*self.rows, *self.columns))

    def axes(self, dim: int) -> tuple[int, ...]:
        """Those that divide the rows, dim 0, or the columns, outermost first."""
        return (self.rows, self.columns)[dim]

    def span(
        self, count: int, axes: Sequence[int], coordinates: Sequence[int] | None = None
    ) -> tuple[int, int]:
        """Where in so many rows or columns a rank's begin, and how many it has.

        Args:
            count: of the whole.
            axes: that divide it, outermost first, each as `torch.chunk` does.
            coordinates: of the rank in the mesh; None for this one.
        """
        start, here = 0, self.mesh.get_coordinate() if coordinates is None else coordinates
        for axis in axes:
            size = -(-count // int(self.mesh.size(axis)))
            before = min(here[axis] * size, count)
            start, count = start + before, min(size, count - before)
        return start, count

    def most(self, count: int, axes: Sequence[int]) -> int:
        """How many of so many rows or columns the rank has that has most."""
        return self.span(count, axes, [0] * int(self.mesh.ndim))[1]


def divides(param: Tensor, dim: int) -> bool:
    """Whether ranks have different rows of a weight, dim 0, or different columns."""
    return is_sharded(param) and any(place.dim == dim for _, place in _dividing(param))


def depth_here(param: Tensor, side: Side) -> tuple[int, int] | None:
    """Of the rows of a basis, where those begin that meet what is here of a weight, and how many
    they are; None if that is all of them.
    """
    dim = rank_axis(side)
    if not divides(param, dim):
        return None
    place = Placement.of(param)
    return place.span(param.shape[dim], place.axes(dim))


def channels_here(param: Tensor, side: Side) -> Tensor:
    """Like those channels of a DTensor of which something is here, each whole: a tensor that says
    shape, dtype and device, and has no memory of its own.
    """
    part, dim = local(param).detach(), rank_axis(side)
    shape = [param.shape[i] if i == dim else size for i, size in enumerate(part.shape)]
    return part if shape == list(part.shape) else part.new_empty(()).expand(shape)


def check_placement(name: str, param: Tensor, proj_type: str) -> None:
    """Raises NotImplementedError or ValueError if a matrix cannot be projected as it is spread.

    Args:
        name: of the parameter.
        param: a DTensor with two dimensions.
        proj_type: of its group.
    """
    mesh, placements = spread_of(param)
    told = f"{name} {tuple(param.shape)}, {param.dtype}, is a DTensor with placements {placements}"
    if mesh.get_coordinate() is None:
        raise NotImplementedError(
            f"{told} on a mesh that this rank is not in: leave it out of the groups here, or put it"
            " in a group without rank"
        )
    if any(place.is_partial() for place in placements):
        raise NotImplementedError(
            f"{told}: partial sums are no weight: redistribute it to Replicate() or Shard(0)"
        )
    if any(_nested(param, dim) is None for dim in (0, 1)):
        raise NotImplementedError(
            f"{told}: projected are weights that axes of the mesh divide as FSDP2, HSDP and tensor"
            " parallelism do: put it in a group without rank"
        )
    by_rows = divides(param, 0)
    if by_rows and proj_type == "left":
        raise ValueError(
            f"{told}: proj_type='left' sums over rows, which are on other ranks: take"
            " proj_type='right', or 'std', which is right for rows on several ranks"
        )
    place = Placement.of(param)
    here = tuple(place.span(param.shape[dim], place.axes(dim))[1] for dim in (0, 1))
    if tuple(local(param).shape) != here:
        raise NotImplementedError(
            f"{told}: this rank has {tuple(local(param).shape)} of it, and not {here}, as"
            " torch.chunk divides it: put it in a group without rank"
        )
    last = [int(size) - 1 for size in place.mesh.shape]
    if (by_rows or proj_type == "right") and not place.span(param.shape[1], place.columns, last)[1]:
        raise NotImplementedError(
            f"{told}: a rank has no column of it, and is needed in sums over columns: put it in a"
            " group without rank"
        )


def check_side(name: str, param: Tensor, state: State) -> None:
    """Raises ValueError if a state is of a side that sums over what is on other ranks."""
    if divides(param, 0) and state.get("side") == Side.LEFT:
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

    mesh, _ = spread_of(param)
    for key in SPREAD:
        if key in state and not is_sharded(state[key]):
            placements = _state_placements(param, state, key)
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
            mesh, _ = spread_of(param)
            fits = spread_of(value) == (mesh, _state_placements(param, state, key))
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


def _state_placements(param: Tensor, state: State, key: str) -> tuple[Any, ...]:
    """Those of what a state has of a DTensor's shape, or of R's."""
    if "side" in state and key in MOMENTS:
        return _moment_placements(param, Side(state["side"]))
    return spread_of(param)[1]


def _moment_placements(param: Tensor, side: Side) -> tuple[Any, ...]:
    """Those of R: channels are where those of the weight are; over ranks that have other parts of
    the same channels it is copied.
    """
    from torch.distributed.tensor import Replicate

    placements, depth = spread_of(param)[1], rank_axis(side)
    return tuple(
        Replicate() if not place.is_replicate() and place.dim == depth else place
        for place in placements
    )


def _dividing(param: Tensor) -> list[tuple[int, Any]]:
    """Axes of the mesh on which ranks have different parts of a DTensor, and their placements."""
    mesh, placements = spread_of(param)
    return [
        (axis, place)
        for axis, place in enumerate(placements)
        if mesh.size(axis) > 1 and not place.is_replicate()
    ]


def _nested(param: Tensor, dim: int) -> tuple[int, ...] | None:
    """Axes of the mesh that divide a dimension of a DTensor, outermost first; None if it is
    unknown how.

    FSDP2 divides what tensor parallelism has left, of which the axis comes later in the mesh: its
    placement is a _StridedShard that says into how many shards those later axes divide.
    """
    mesh, placements = spread_of(param)
    axes = [(axis, place) for axis, place in _dividing(param) if place.dim == dim]
    strided = [axis for axis, place in axes if type(place).__name__ == "_StridedShard"]
    plain = [axis for axis, place in axes if type(place).__name__ == "Shard"]
    if len(strided) + len(plain) < len(axes) or len(strided) > 1:
        return None
    for axis in strided:
        later = math.prod(int(mesh.size(other)) for other in plain if other > axis)
        if int(placements[axis].split_factor) != later:
            return None
    return *plain, *strided
