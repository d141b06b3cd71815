"""Weighted rows: each implementation against sums in float64."""

import pytest
import torch
from devices import device_of

from lowrank_kernels.ops import dispatch
from lowrank_kernels.ops.rows import scaled_rows

IMPLEMENTATIONS = ["torch"]
if dispatch._triton_status()[0]:
    from lowrank_kernels.ops.triton import rows

    IMPLEMENTATIONS.append("triton")


def of(name):
    return rows.scaled_rows if name == "triton" else scaled_rows


def case(device, dtype, columns, pitch):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(37, pitch, generator=rng).to(device, dtype)[:, :columns]
    index = torch.tensor([36, 0, 5, 5, 21], dtype=torch.int32, device=device)
    weights = torch.tensor([3.7, 1.0, 0.0, 1e3, 1 / 3], device=device)
    return x, index, weights


@pytest.mark.parametrize(("columns", "pitch"), [(1, 1), (48, 48), (1025, 1030), (2048, 2048)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_are_multiplied_once(name, dtype, columns, pitch):
    x, index, weights = case(device_of(name), dtype, columns, pitch)
    found = of(name)(x, index, weights)
    exact = weights.double().unsqueeze(1) * x.double()[index.long()]
    assert found.dtype is dtype
    assert found.shape == exact.shape
    # The interpreter truncates what is rounded to half precision.
    limits = torch.finfo(dtype)
    bound = limits.eps * exact.abs() + limits.smallest_normal * limits.eps
    assert torch.all((found.double() - exact).abs() <= bound)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_no_rows_and_no_columns(name):
    x, index, weights = case(device_of(name), torch.float32, 48, 48)
    assert of(name)(x[:, :0], index, weights).shape == (5, 0)
    assert of(name)(x, index[:0], weights[:0]).shape == (0, 48)


def test_x_is_left_alone():
    x, index, weights = case("cpu", torch.float32, 48, 48)
    before = x.clone()
    scaled_rows(x, index, weights)
    assert torch.equal(x, before)
