"""The three operations of a low-rank step, computed by a backend.

    operations = prepare(matrices, backend="native")          # checks; once
    projection = operations.project_moments(matrices, adam, step)   # each step
    factor = operations.channel_scale(matrices, projection.sums)
    operations.back_project_update(matrices, projection, factor, scalars)

Shapes and notation are in `contract`, the mathematics in `reference`, the names of backends in
`dispatch`.
"""

from torch import Tensor

from .contract import (
    AdamScalars,
    ChannelSums,
    Matrices,
    Operations,
    Projection,
    Residual,
    Scalar,
    Scalars,
    Side,
    check_matrices,
)
from .decoded import operations_of
from .dispatch import BackendUnavailable, Choice, backends, choose, load, requested_backend
from .times import Size

__all__ = [
    "AdamScalars",
    "BackendUnavailable",
    "ChannelSums",
    "Choice",
    "Matrices",
    "Operations",
    "Projection",
    "Residual",
    "Scalar",
    "Scalars",
    "Side",
    "Size",
    "backends",
    "batch_size",
    "choose",
    "prepare",
    "requested_backend",
    "tiles",
]


def prepare(matrices: Matrices, *, backend: str = "reference") -> Operations:
    """The operations for a batch, checked and prepared.

    They may serve a batch for as long as nothing but the places of its gradients changes, and keep
    none of its tensors.

    Args:
        matrices: see `Matrices`; equal in shape, strides, dtype and device.
        backend: a name out of `choose`.

    Raises:
        ValueError: a shape, device or stride does not fit.
        TypeError: a dtype does not fit.
    """
    check_matrices(matrices)
    return operations_of(load(backend), matrices)


def batch_size(param: Tensor, grad: Tensor, rank: int, *, backend: str = "reference") -> int:
    """How many matrices like this one the backend takes best in one batch, at least 1.

    The workspace of a step, N and R of a batch, grows with it. `grad` may be R.
    """
    size: int = load(backend).batch_size(param, grad, rank)
    return size


def tiles(backend: str) -> str:
    """Where the tile sizes of a backend come from; empty if it has none to choose."""
    sources: dict[str, str] = getattr(load(backend), "sources", dict)()
    return ", ".join(f"{operation}: {source}" for operation, source in sources.items())
