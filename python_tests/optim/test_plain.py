"""Parameters without a rank, of a lower precision than their moments: AdamW in blocks."""

import pytest
import torch

from lowrank_kernels import GaLoreAdamW
from lowrank_kernels.optim import plain
from lowrank_kernels.optim.allocations import Allocations
from lowrank_kernels.optim.workspace import planned_workspace

# Of one block, of several with a rest, and small ones that share a block.
SIZES = [(40,), (300, 7), (), (64,), (1, 5000)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setitem(plain.BLOCK_ELEMENTS, "cpu", 512)


def trained(dtype, grad_dtype=None, maximize=False, sizes=SIZES, layout=torch.clone):
    """Weights and moments after three steps."""
    rng = torch.Generator().manual_seed(0)
    params = [
        torch.nn.Parameter(layout(torch.randn(size, generator=rng).to(dtype))) for size in sizes
    ]
    optimizer = GaLoreAdamW(params, **OPTIONS, maximize=maximize)
    for _ in range(3):
        for param in params:
            grad = torch.randn(param.shape, generator=rng).to(dtype).to(grad_dtype or dtype)
            if grad_dtype and hasattr(param, "grad_dtype"):
                param.grad_dtype = grad_dtype
            param.grad = layout(grad)
        optimizer.step()
    return params, [optimizer.state[param] for param in params]


def fused(dtype, maximize=False):
    """torch's fused AdamW in float32, its weights rounded after every step."""
    rng = torch.Generator().manual_seed(0)
    params = [torch.randn(size, generator=rng).to(dtype).float() for size in SIZES]
    params = [torch.nn.Parameter(param) for param in params]
    optimizer = torch.optim.AdamW(params, **OPTIONS, maximize=maximize, fused=True)
    for _ in range(3):
        for param in params:
            param.grad = torch.randn(param.shape, generator=rng).to(dtype).float()
        optimizer.step()
        for param in params:
            param.data = param.data.to(dtype).float()
    return params, [optimizer.state[param] for param in params]


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bit_for_bit_torchs_fused_step_rounded_once(dtype, maximize):
    params, states = trained(dtype, maximize=maximize)
    for param, state, right, other in zip(params, states, *fused(dtype, maximize), strict=True):
        assert state["step"] == 3
        assert torch.equal(state["exp_avg"], other["exp_avg"])
        assert torch.equal(state["exp_avg_sq"], other["exp_avg_sq"])
        assert torch.equal(param.float(), right)


def test_float32_gradients_of_bfloat16_weights_are_taken_as_they_are():
    for one, other in zip(
        trained(torch.bfloat16)[0], trained(torch.bfloat16, torch.float32)[0], strict=True
    ):
        assert torch.equal(one, other)


def test_a_block_and_the_whole_give_the_same_bits(monkeypatch):
    small = trained(torch.bfloat16)[0]
    monkeypatch.setitem(plain.BLOCK_ELEMENTS, "cpu", 2**20)
    for one, other in zip(small, trained(torch.bfloat16)[0], strict=True):
        assert torch.equal(one, other)


def test_many_small_parameters_share_no_more_than_a_block():
    params = [torch.nn.Parameter(torch.zeros(300, dtype=torch.bfloat16)) for _ in range(10)]
    optimizer = GaLoreAdamW(params, **OPTIONS)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    with Allocations() as allocations:
        optimizer.step()
    assert 0 < allocations.peak_bytes <= planned_workspace(optimizer, "cpu").step


def test_what_is_not_dense_is_trained_all_the_same():
    def strided(tensor):
        return tensor.t().contiguous().t()

    sizes = [(30, 70)]
    dense, states = trained(torch.bfloat16, sizes=sizes)
    (other,), (state,) = trained(torch.bfloat16, sizes=sizes, layout=strided)
    assert not other.is_contiguous()
    assert torch.equal(state["exp_avg_sq"], states[0]["exp_avg_sq"])
    # The unfused code rounds the decayed weight and the new one: an ulp or two a step, three steps.
    ulp = torch.finfo(torch.bfloat16).eps * other.abs().max()
    assert (other - dense[0]).abs().max() <= 6 * ulp


def test_a_nan_stays_where_it_is():
    param = torch.nn.Parameter(torch.ones(2000, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    param.grad[700] = float("nan")
    GaLoreAdamW([param], **OPTIONS).step()
    assert param.isnan().nonzero().flatten().tolist() == [700]


def test_empty_parameters_are_left_alone():
    params = [torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16)) for n in (0, 3)]
    for param in params:
        param.grad = torch.ones_like(param)
    GaLoreAdamW(params, **OPTIONS).step()
    assert params[1].abs().min() > 0
