"""Batches as large as on a GPU that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from lowrank_kernels.ops import products

# As torch tells them of the GPU that records without one are about.
H200_NAME, H200_BYTES = "NVIDIA H200", 139 * 2**30


@contextmanager
def memory_of_h200() -> Iterator[None]:
    """Within it backends size their batches for that GPU, also on the machine of another."""
    workspace = H200_BYTES // products.WORKSPACE_SHARE
    with mock.patch.object(products, "_workspace_bytes", return_value=workspace):
        yield
