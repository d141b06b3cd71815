"""What only a GPU shows of the Triton kernels: loops whose copies and products run on their own.

Triton pipelines loops over aligned rows. A copy that comes too early is a race: results are wrong,
and others each time. `bench.triton_compile` looks for that in what was compiled, without a GPU.
"""

import pytest
import torch
from devices import GPU, device_of
from ops.test_operations import FORMS, STEPS, Run, assert_as_accurate, take_step

from lowrank_kernels.cli import selftest
from lowrank_kernels.ops import Side, prepare
from lowrank_kernels.ops.contract import rank_axis
from lowrank_kernels.optim.batches import step_scalars

config = pytest.importorskip("lowrank_kernels.ops.triton.config")

SHAPES = [(256, 1024), (512, 2048)]
RANK = 128
TIMES = 4
H200 = config.Gpu("NVIDIA H200 (x)", 132, 227 * 1024)


def configs(shape, side, dtype, gpu):
    """Of the projection, from large to small tiles, for one matrix."""
    axis = rank_axis(side)
    sizes = shape[1 - axis], shape[axis], RANK
    problem = config.Problem(side, *sizes, matrices=1, dtypes=(dtype, dtype))
    return list(config._configs("project", problem, gpu))


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("shape", [*SHAPES, *(shape for shape, _ in selftest.PIPELINED)], ids=str)
def test_shapes_are_such_that_triton_pipelines(shape, side):
    """Rows of 16 bytes, several stages, and more turns than those on the longer side."""
    assert all(size % 64 == 0 for size in (*shape, RANK))
    assert all(rank == RANK for _, rank in selftest.PIPELINED)
    for each in configs(shape, side, torch.bfloat16, H200):
        assert each.stages == 3
        assert max(shape) // each.depth > 4 * each.stages


def steps_of(run):
    """All steps of the package's operations, prepared once."""
    operations = prepare(Run.matrices([run], 0), backend="triton")
    group = {**run.options, "betas": (0.9, 0.999)}
    for index in range(STEPS):
        scalars = step_scalars(group, index + 1, run.form == "paper")
        take_step(operations, Run.matrices([run], index), scalars)


@pytest.mark.parametrize("tile", [0, -1], ids=["large tiles", "small tiles"])
@pytest.mark.parametrize("split", [1, 2, 4, 8])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype", [pytest.param(dtype, marks=GPU) for dtype in (torch.bfloat16, torch.float16)]
)
def test_pipelined_steps(dtype, shape, side, form, split, tile):
    """As accurate as plain torch, and the same bits each time."""
    one = configs(shape, side, dtype, config.gpu_of(device_of("triton")))[tile]
    runs = [Run("triton", dtype, shape, RANK, side, form) for _ in range(TIMES)]
    with config.forced(project=one._replace(split=split)):
        for run in runs:
            steps_of(run)
    first, *others = runs
    for other in others:
        for name in ("weight", "exp_avg", "exp_avg_sq", "limiter_norm"):
            assert torch.equal(getattr(first, name), getattr(other, name)), name
    for index in range(STEPS):
        first.literal_step(index)
    assert_as_accurate(first)
