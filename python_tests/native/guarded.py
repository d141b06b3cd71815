"""Matrices between zones of NaN, and what the passes of `_native` want to know of them."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from lowrank_kernels import _native

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = list(CODES)
SIDES = pytest.mark.parametrize("rows_are_channels", [True, False], ids=["right", "left"])
DEVICES = pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(
                    not torch.cuda.is_available() or _native.build_info()["cuda"] is None,
                    reason="needs a CUDA device and a build with the CUDA half",
                ),
            ],
        ),
    ],
)


def guard_of(cols: int) -> int:
    """Elements of a zone: odd, so that arrays are aligned to their elements and no better.

    Where rows have eighths, 64, for the wide accesses of the CUDA kernels.
    """
    return 67 if cols % 8 else 64


class Guarded:
    """`count` matrices in one storage; all that lies between and around them is NaN."""

    def __init__(self, count, rows, cols, dtype=torch.float32, gap=0, device="cpu"):
        guard = guard_of(cols)
        self.stride = cols + gap
        size = rows * self.stride
        self.storage = torch.full((count * (size + guard) + guard,), torch.nan, dtype=dtype)
        self.storage = self.storage.to(device)
        starts = [guard + index * (size + guard) for index in range(count)]
        self.views = [
            self.storage.as_strided((rows, cols), (self.stride, 1), start) for start in starts
        ]
        self.outside = torch.ones(self.storage.shape, dtype=torch.bool, device=device)
        for start in starts:
            self.outside.as_strided((rows, cols), (self.stride, 1), start).fill_(False)

    def fill(self, generator: torch.Generator, scale: float = 1.0) -> "Guarded":
        for view in self.views:
            view.copy_(torch.randn(view.shape, generator=generator) * scale)
        return self

    @property
    def addresses(self) -> list[int]:
        return [view.data_ptr() for view in self.views]

    @property
    def matrices(self) -> tuple[list[int], int, int]:
        return self.addresses, CODES[self.storage.dtype], self.stride

    def double(self) -> list[Tensor]:
        return [view.double() for view in self.views]

    def assert_nothing_else_was_written(self):
        assert self.storage[self.outside].isnan().all()


def place(device: str, threads: int = 1) -> dict[str, int]:
    """Where a pass runs."""
    if device == "cpu":
        return {"threads": threads}
    stream = torch.cuda.current_stream().cuda_stream
    return {"threads": threads, "device": torch.cuda.current_device(), "stream": stream}


def assert_same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]):
    integers = {4: torch.int32, 2: torch.int16}
    for one, other in zip(actual, expected, strict=True):
        integer = integers[one.dtype.itemsize]
        assert torch.equal(one.contiguous().view(integer), other.contiguous().view(integer))


def assert_as_accurate(actual: Tensor, torch32: Tensor, exact: Tensor):
    """Twice torch's error, and a few roundings of one element: torch may be lucky when tiny."""
    if not exact.numel():
        return
    unit = torch.finfo(actual.dtype).eps
    allowed = 2 * (torch32.double() - exact).norm() + 8 * 2**-23 * exact.abs().max()
    if actual.dtype is not torch.float32:
        allowed = allowed + unit * exact.norm()
    assert (actual.double() - exact).norm() <= allowed
