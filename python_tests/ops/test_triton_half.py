"""What operation 3 multiplies in half precision: B or N, rounded once, in rows of 16-byte lines.

Triton's interpreter multiplies float16 as a GPU does; bfloat16 it cannot.
"""

import pytest
import torch
from ops.test_operations import FORMS, Run, assert_as_accurate
from ops.test_triton import INTERPRETED, assert_equal, launch, scattered, small_tiles
from pairs import pairwise

from lowrank_kernels.ops import Side

pytest.importorskip("triton")
from lowrank_kernels.ops import triton as kernels
from lowrank_kernels.ops.triton.config import Config, forced

# Interpreted or compiled, the kernels have to do the same.
pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def poisoned_workspaces():
    """torch fills what it does not initialize with NaN in this mode, padding too.

    It would also refuse cuBLAS where CUBLAS_WORKSPACE_CONFIG is not set, and not only warn.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)
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


def resident_tiles(parts):
    """B stays; several tiles of channels and of depth."""
    return forced(
        project=Config(16, 16, 16, cuts=0, warps=4, stages=1),
        update=Config(16, 64, 16, cuts=0, warps=4, stages=2, split=parts, resident=True),
    )


@pytest.mark.parametrize(
    ("shape_rank", "parts", "side", "form"),
    pairwise(SHAPES_AND_RANKS, (1, 2, 7), Side, FORMS),
    ids=str,
)
def test_b_stays_and_w_g_and_p_pass_by(shape_rank, parts, side, form):
    """More parts than tiles leave some of them without work."""
    runs = half_runs(2, *shape_rank, side, form)
    for run in runs:
        run.literal_step(0)
    with resident_tiles(parts):
        launch(runs, 0)
    for run in runs:
        assert_as_accurate(run)


@pytest.mark.parametrize(("side", "form"), pairwise(Side, FORMS), ids=str)
def test_b_that_stays_touches_nothing_outside(side, form):
    alone, together = (half_runs(3, (19, 37), 18, side, form) for _ in "ab")
    buffers = scattered(together, 4099, True)
    with resident_tiles(2):
        for run in alone:
            launch([run])
        launch(together)
    assert_equal(alone, together)
    for buffer, outside in buffers:
        assert buffer[outside].isnan().all()


def test_b_that_stays_is_formed_where_it_is_used(monkeypatch):
    with resident_tiles(1):
        log = launched("paper", monkeypatch)
    assert list(log) == ["project_kernel", "channel_scale_kernel", "resident_update_kernel"]


def logged_launches(monkeypatch):
    """The tensors that each kernel is given first, by its name."""
    log, call = {}, kernels.Launcher.__call__

    def logged(launcher, kind, stream, tensors, scalars, rest):
        log[launcher._kernel.__name__] = tensors
        return call(launcher, kind, stream, tensors, scalars, rest)

    monkeypatch.setattr(kernels.Launcher, "__call__", logged)
    return log


def launched(form, monkeypatch):
    log = logged_launches(monkeypatch)
    launch(half_runs(2, (19, 37), 18, Side.LEFT, form))
    return log


def test_fira_forms_b_once_in_padded_rows(monkeypatch):
    with small_tiles():
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
    with small_tiles():
        log = launched(None, monkeypatch)
    assert list(log) == ["project_kernel", "update_kernel"]
    direction = log["project_kernel"][0]
    assert (direction.shape, direction.dtype) == ((2, 18, 48), torch.float16)
    assert not direction[..., 37:].any()
    assert log["update_kernel"][0].data_ptr() == direction.data_ptr()


@pytest.fixture
def always_pads(monkeypatch):
    monkeypatch.setattr(kernels, "PAD_FROM", 0)
    monkeypatch.setattr(kernels, "PAD_BLOCK", 32)


@pytest.mark.parametrize(
    ("shape_rank", "transposed", "side", "form"),
    pairwise([((37, 61), 13), ((61, 37), 17), ((40, 70), 33)], (False, True), Side, FORMS),
    ids=str,
)
def test_copies_of_gradients_with_padded_rows(shape_rank, transposed, side, form, always_pads):
    runs = half_runs(2, *shape_rank, side, form)
    for run in runs:
        if transposed:
            run.grads = [grad.T.contiguous().T for grad in run.grads]
    for index in range(2):
        for run in runs:
            run.literal_step(index)
        with small_tiles():
            launch(runs, index)
    for run in runs:
        assert_as_accurate(run)


@pytest.mark.parametrize(("side", "form"), pairwise(Side, FORMS), ids=str)
def test_padded_copies_change_no_bit(side, form, monkeypatch):
    """One copy serves operations 1 and 3, wherever the gradients lie.

    On a GPU aligned rows have a layout of their own, which adds in another order.
    """
    plain, padded = (half_runs(3, (19, 37), 18, side, form) for _ in "ab")
    buffers = scattered(padded, 4099, True)
    with small_tiles():
        launch(plain)
        monkeypatch.setattr(kernels, "PAD_FROM", 0)
        log = logged_launches(monkeypatch)
        launch(padded)
    if INTERPRETED:
        assert_equal(plain, padded)
    else:
        for run in padded:
            run.literal_step(0)
            assert_as_accurate(run)
    for buffer, outside in buffers:
        assert buffer[outside].isnan().all()
    copy = log["pad_rows_kernel"][0]
    assert copy.shape == (3, 19, 48)
    assert not copy[..., 37:].any()
    assert log["project_kernel"][5] is copy
    if form:
        assert log["update_kernel"][4] is copy


@pytest.mark.parametrize("side", Side)
def test_operation_3_copies_gradients_that_operation_1_did_not_have(side, monkeypatch):
    """As of a residual that was made of them between the two."""
    plain, padded = (half_runs(2, (19, 37), 18, side, "paper") for _ in "ab")
    with small_tiles():
        launch(plain)
        monkeypatch.setattr(kernels, "PAD_FROM", 0)
        project = kernels.Operations.project_moments
        monkeypatch.setattr(
            kernels.Operations,
            "project_moments",
            lambda *args: project(*args)._replace(grads=None),
        )
        log = logged_launches(monkeypatch)
        launch(padded)
    if INTERPRETED:
        assert_equal(plain, padded)
    else:
        for run in padded:
            run.literal_step(0)
            assert_as_accurate(run)
    assert log["update_kernel"][4] is log["pad_rows_kernel"][0]


@pytest.mark.parametrize(
    ("shape", "matrices", "padded"),
    [((2048, 5461), 1, 5472), ((5461, 2048), 1, None), ((512, 1376), 9, None), ((37, 61), 2, None)],
)
def test_only_large_batches_with_odd_rows_are_copied(shape, matrices, padded):
    grad = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    rows = kernels._rows(grad, matrices)
    assert (rows and rows.padded) == padded
    assert kernels._rows(grad.float(), matrices) is None


@pytest.mark.parametrize("shape", [(1, 2**20 + 1), (2**20 + 1, 1)], ids=str)
def test_a_single_row_is_copied_as_one(shape):
    """Of strides that are both 1: elements of their own would be padded to 16 each."""
    rows = kernels._rows(torch.empty_strided(shape, (1, 1), dtype=torch.float16, device="meta"), 1)
    assert (rows.lines, rows.length, rows.padded) == (1, 2**20 + 1, 2**20 + 16)
    assert sorted(rows.sizes) == [1, 2**20 + 16]
