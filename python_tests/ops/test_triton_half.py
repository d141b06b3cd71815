"""What operation 3 multiplies in half precision: B or N, rounded once, in rows of 16-byte lines.

Triton's interpreter multiplies float16 as a GPU does; bfloat16 it cannot.
"""

import pytest
import torch
from ops.test_operations import FORMS, Run, assert_as_accurate
from ops.test_triton import assert_equal, launch, scattered, small_tiles
from pairs import pairwise

from lowrank_kernels.ops import Side

kernels = pytest.importorskip("lowrank_kernels.ops.triton")


@pytest.fixture(autouse=True)
def poisoned_workspaces():
    """torch fills what it does not initialize with NaN in this mode, padding too."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def half_runs(count, shape, rank, side, form):
    return [
        Run("triton", torch.float16, shape, rank, side, form, seed=seed) for seed in range(count)
    ]


# Rows that are a multiple of 16 or not, of R and of W; one tile or many.
SHAPES_AND_RANKS = [((48, 64), 16), ((37, 61), 13), ((61, 37), 17), ((1, 17), 1), ((40, 70), 33)]


@pytest.mark.parametrize(
    ("shape_rank", "small", "side", "form"),
    pairwise(SHAPES_AND_RANKS, (False, True), Side, FORMS),
    ids=str,
)
def test_against_oracle(shape_rank, side, form, small):
    runs = half_runs(2, *shape_rank, side, form)
    for index in range(2):
        for run in runs:
            run.literal_step(index)
        if small:
            with small_tiles(3):
                launch(runs, index)
        else:
            launch(runs, index)
    for run in runs:
        assert_as_accurate(run)


@pytest.mark.parametrize(("side", "form"), pairwise(Side, FORMS), ids=str)
def test_a_batch_is_its_matrices_one_by_one(side, form):
    """Bit for bit, wherever they lie, and nothing outside of them is read or written."""
    alone, together = (half_runs(3, (19, 37), 18, side, form) for _ in "ab")
    buffers = scattered(together, 4099, True)
    with small_tiles():
        for run in alone:
            launch([run])
        launch(together)
    assert_equal(alone, together)
    for buffer, outside in buffers:
        assert buffer[outside].isnan().all()


def launched(form, monkeypatch):
    """The tensors that each kernel of a step is given first."""
    log, call = {}, kernels.Launcher.__call__

    def logged(launcher, kind, stream, tensors, scalars, rest):
        log[launcher._kernel.__name__] = tensors
        return call(launcher, kind, stream, tensors, scalars, rest)

    monkeypatch.setattr(kernels.Launcher, "__call__", logged)
    launch(half_runs(2, (19, 37), 18, Side.LEFT, form))
    return log


def test_fira_forms_b_once_in_padded_rows(monkeypatch):
    log = launched("official", monkeypatch)
    assert list(log) == [
        "project_kernel",
        "channel_scale_kernel",
        "combine_kernel",
        "update_kernel",
    ]
    combined, direction, *_ = log["combine_kernel"]
    assert (combined.shape, combined.dtype) == ((2, 18, 48), torch.float16)
    assert direction.dtype is torch.float32
    assert not combined[..., 37:].any()
    assert log["update_kernel"][0] is combined


def test_galore_rounds_its_direction_and_forms_nothing(monkeypatch):
    log = launched(None, monkeypatch)
    assert list(log) == ["project_kernel", "update_kernel"]
    direction = log["project_kernel"][0]
    assert (direction.shape, direction.dtype) == ((2, 18, 48), torch.float16)
    assert not direction[..., 37:].any()
    assert log["update_kernel"][0].data_ptr() == direction.data_ptr()
