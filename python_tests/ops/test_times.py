"""Which backend is fastest for a matrix on a GPU, by a table of times."""

import pytest
import torch

from lowrank_kernels.ops import Side, Size, times
from lowrank_kernels.ops.times import ORDER, Times, fastest_first

BF16, FP16, FLOAT = torch.bfloat16, torch.float16, torch.float32
GPU = "NVIDIA H200"


def row(size, triton, native, source="predicted", gpu=GPU, dtype=BF16):
    return Times(gpu, dtype, size, source, {"triton": triton, "native": native})


SQUARE = Size(4096, 4096, 1024, Side.RIGHT)
SMALL = Size(512, 512, 128, Side.RIGHT)


@pytest.fixture
def rows(monkeypatch):
    def fill(*found):
        monkeypatch.setattr(times, "table", lambda: list(found))

    return fill


def test_the_table_that_is_shipped():
    found = times.table()
    assert found
    keys = [(each.gpu, each.dtype, each.size, each.source) for each in found]
    assert len(set(keys)) == len(keys)
    for each in found:
        assert each.source in ("measured", "predicted")
        assert set(each.us) <= set(ORDER)
        assert min(each.us.values()) > 0
        assert each.size.rank <= min(each.size.rows, each.size.cols)


@pytest.mark.parametrize(
    "size",
    [
        SMALL,
        Size(2048, 2048, 512, Side.RIGHT),
        SQUARE,
        Size(11008, 4096, 1024, Side.RIGHT),
        Size(4096, 11008, 1024, Side.LEFT),
    ],
)
def test_llama_gets_kernels_by_the_table_that_is_shipped(size):
    order, reason = fastest_first(size, BF16, GPU)
    assert order[0] in ("triton", "native")
    assert reason.startswith(("predicted: ", "measured: "))


def test_a_measured_time_is_told_as_one_of_its_case_alone(rows):
    rows(row(SQUARE, 258, 201), row(SQUARE, 150, 201.5, "measured"), row(SMALL, 3, 18))
    order, reason = fastest_first(SQUARE, BF16, GPU)
    assert order == ["triton", "native", "foreach"]
    assert reason == (
        "measured: triton 150 us, native 201.5 us (4096 x 4096, rank 1024, NVIDIA H200)"
    )
    others = (SQUARE._replace(rank=1000), BF16, GPU), (SQUARE, FP16, GPU), (SQUARE, BF16, "other")
    for size, dtype, gpu in others:
        order, reason = fastest_first(size, dtype, gpu)
        assert order[0] == "triton"
        assert reason.startswith("predicted: triton 150 us")


def test_times_of_the_same_gpu_come_before_those_of_another(rows):
    rows(row(SQUARE, 258, 201), row(SMALL, 9, 8, "measured", gpu="other"))
    assert fastest_first(SQUARE, BF16, "other")[1].startswith("predicted: native 8 us, triton 9 us")


def test_nearest_goes_by_channels_and_depth(rows):
    """A matrix on its other side is hardly another one, one of another rank is."""
    down = Size(4096, 11008, 1024, Side.LEFT)
    rows(
        row(Size(4096, 11008, 64, Side.LEFT), 1, 2), row(Size(11008, 4096, 1024, Side.RIGHT), 2, 1)
    )
    assert fastest_first(down, BF16, GPU)[0][0] == "native"


def test_where_nothing_is_known_fewer_launches_are_better(rows):
    rows(row(SQUARE, 258, 201))
    for size in (SQUARE, None):
        order, reason = fastest_first(size, FLOAT, GPU)
        assert order == list(ORDER)
        assert reason == "predicted by the number of launches"


def test_without_a_size_what_is_known_of_all_is_told(rows):
    wide = SQUARE._replace(rows=11008)
    rows(row(SQUARE, 3, 2, "measured"), row(wide, 3, 2), row(SMALL, 1, 2, "measured"))
    order, reason = fastest_first(None, BF16, GPU)
    assert order == ["native", "triton", "foreach"]
    assert (
        reason == "by size; fastest in 3 cases: native 2, triton 1 (2 measured here, 1 predicted)"
    )
    assert fastest_first(None, BF16, "other")[1].endswith("(0 measured here, 3 predicted)")


def test_no_size_is_too_small(rows):
    rows(row(SQUARE, 258, 201))
    assert fastest_first(Size(0, 5, 0, Side.LEFT), BF16, GPU)[0][0] == "native"
