"""New bases of weights of which every rank has a whole copy, as under DistributedDataParallel.

Each is computed by one rank, its owner, and sent to the others, as on shards, but without a gather:
every rank has all of a gradient. Nothing else is sent, and only in steps in which a basis is due.
"""

from collections.abc import Hashable, Sequence

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ops import Side
from ..subspace import Due, Subspace
from .agreement import agree_by_store
from .collectives import Claim, Ranks
from .groups import Group, NamedGroups, is_projected
from .owners import refresh_shared
from .parts import Method
from .placement import Placement
from .sharded import AGREED


def check_process_group(group: object) -> None:
    """Raises TypeError if it is none in which this process is."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f"process_group is a {type(group).__name__}: give it a group of torch.distributed that"
            " this process is in, such as torch.distributed.group.WORLD, or None"
        )


def lines_of(groups: NamedGroups, method: Method) -> list[str]:
    """What has to be the same on every rank."""
    told = [
        _described(group, name, param)
        for _, group, named in groups
        if is_projected(group)
        for name, param, _ in named
        if param.requires_grad
    ]
    return [*told, method.described()]


def agree_on_change(lines: Sequence[str], before: Sequence[str], group: dist.ProcessGroup) -> None:
    """Raises RuntimeError if not all ranks have made the same change between two steps.

    Args:
        lines: see `lines_of`, now.
        before: at an earlier step.
        group: the ranks that have copies.
    """
    agree_by_store(lines, before, dist.get_process_group_ranks(group), "copies")


def refresh_replicas(
    due: Sequence[Due], lines: Sequence[str], group: dist.ProcessGroup, subspace: Subspace
) -> None:
    """Gives each matrix a new basis, or counts why it keeps the old one, the same on every rank.

    Args:
        due: matrices with elements; the same on all ranks, with the same gradients.
        lines: see `lines_of`.
        group: the ranks that have copies.
        subspace: where bases come from.

    Raises:
        RuntimeError: the ranks are not about to do the same, or an owner failed in an unforeseen
            way; every rank raises it.
    """
    own = [f"{item.name}, due for a basis after {item.completed} steps" for item in due]
    # All are compared before anything is computed.
    _ranks(group, due[0]).agree(Claim([*lines, *own]))
    alike: dict[Hashable, list[Due]] = {}
    for item in due:
        # Bases of an owner travel in one message, of one dtype.
        kind = item.grad.device, item.state["basis"].dtype, item.state["side"]
        alike.setdefault(kind, []).append(item)
    for some in alike.values():
        shapes = [(item.grad.shape[0], item.grad.shape[1]) for item in some]
        refresh_shared(some, shapes, _ranks(group, some[0]), subspace)


def _ranks(group: dist.ProcessGroup, like: Due) -> Ranks:
    device = like.grad.device
    mesh = DeviceMesh.from_group(group, device.type)
    return Ranks(Placement(mesh, (), ()), device, Side(like.state["side"]))


def _described(group: Group, name: str, param: Tensor) -> str:
    told = ", ".join(f"{key} {group[key]}" for key in AGREED)
    trained = "" if param.grad is not None else ", without a gradient"
    return f"{name} {tuple(param.shape)}, {param.dtype}, {told}{trained}"
