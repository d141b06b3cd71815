"""What the contract refuses of a weight's layout, whoever computes the step."""

import pytest
import torch

from lowrank_kernels.ops import Projection, Side, back_project_update

BACKENDS = pytest.mark.parametrize("backend", ["reference", "native"])


def update(param, backend):
    """W <- W - 2, from a basis and a direction of ones."""
    (rows, cols), rank = param.shape, 4
    direction = torch.ones(1, rank, cols)
    back_project_update(
        [param],
        [torch.ones(rows, cols)],
        [torch.ones(rows, rank)],
        Side.LEFT,
        Projection(direction, direction, None),
        scale=1.0,
        step_size=0.5,
        decay=0.0,
        backend=backend,
    )


@pytest.mark.parametrize("strides", [(0, 1), (1, 0), (0, 0)], ids=str)
@BACKENDS
def test_a_weight_that_overlaps_itself_is_refused_and_not_written(backend, strides):
    memory = torch.zeros(12)
    with pytest.raises(ValueError, match="param must not overlap itself, got strides") as raised:
        update(memory.as_strided((8, 12), strides), backend)
    assert str(strides) in str(raised.value)
    assert not memory.any()


@pytest.mark.parametrize(("shape", "strides"), [((1, 12), (0, 1)), ((8, 1), (1, 0))], ids=str)
@BACKENDS
def test_a_single_row_or_column_may_have_any_stride(backend, shape, strides):
    memory = torch.zeros(12)
    update(memory.as_strided(shape, strides), backend)
    assert torch.equal(memory, -2.0 * (torch.arange(12) < max(shape)))
