"""In a dry run meta tensors have a kind of device and an answer, outside of it neither."""

import pytest
import torch

from lowrank_kernels.ops import native, products
from lowrank_kernels.ops.dry import device_type, meta_stands_for, on_host

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.bool]


def test_meta_stands_for_a_device_within_a_dry_run(monkeypatch):
    monkeypatch.setattr(products, "_workspace_bytes", lambda _: 2**28)
    matrix = torch.empty(1000, 1000, device="meta")
    sizes = {}
    for name in ("cpu", "cuda"):
        with meta_stands_for(name):
            assert device_type(matrix) == name
            assert device_type(torch.empty(2)) == "cpu"
            sizes[name] = native.batch_size(matrix, matrix, 8)
    assert sizes == {"cpu": 1, "cuda": 2**28 // (16 * 8 * 1000)}
    assert device_type(matrix) == "meta"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_answers_of_a_dry_run_are_those_of_a_usual_step(dtype):
    """A gradient that is finite and not zero, a factorization that worked."""
    asked = torch.empty(3, 2, dtype=dtype, device="meta")
    with meta_stands_for("cuda"):
        answers = on_host(asked)
    assert (answers.dtype, answers.shape, answers.device.type) == (dtype, (3, 2), "cpu")
    assert all(0 < answer <= 1 for row in answers.tolist() for answer in row)


def test_without_a_dry_run_a_meta_tensor_has_no_answer():
    with pytest.raises(NotImplementedError, match="meta"):
        on_host(torch.empty(3, device="meta"))


def test_a_tensor_with_values_answers_for_itself():
    values = torch.randn(3)
    with meta_stands_for("cpu"):
        assert torch.equal(on_host(values), values)
    assert torch.equal(on_host(values), values)
