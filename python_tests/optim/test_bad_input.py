"""Every mistake ends in an error that names the parameter, before anything is changed."""

import logging

import pytest
import torch
from torch import nn

from lowrank_kernels import FiraAdamW, GaLoreAdamW, LowRankAdamW
from lowrank_kernels.ops import notices


def parameter(*shape, dtype=torch.float32):
    return nn.Parameter(torch.ones(*shape, dtype=dtype))


def group(param=None, **options):
    param = parameter(8, 6) if param is None else param
    return {"params": [("layer.weight", param)], "rank": 2, **options}


BAD_GROUPS = [
    ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
    ({"rank": -3}, ValueError, "rank must be at least 1"),
    ({"rank": 2.0}, TypeError, "rank must be an int, got 2.0"),
    ({"rank": True}, TypeError, "rank must be an int"),
    ({"rank": None}, TypeError, "rank must be an int"),
    ({"update_proj_gap": 0}, ValueError, "update_proj_gap must be at least 1"),
    ({"proj_type": "full"}, ValueError, "proj_type must be one of std, reverse_std, left, right"),
    ({"scale": -1.0}, ValueError, "scale must be at least 0 and finite"),
    ({"scale": float("nan")}, ValueError, "scale must be at least 0 and finite"),
    ({"scale": 0.5, "alpha": 0.25}, ValueError, "alpha is another name of scale"),
    ({"lr": -1e-3}, ValueError, "lr must be at least 0"),
    ({"lr": float("nan")}, ValueError, "lr must be at least 0"),
    ({"lr": torch.ones(2)}, ValueError, "lr must have one element"),
    ({"eps": -1e-8}, ValueError, "eps must be at least 0"),
    ({"weight_decay": -0.1}, ValueError, "weight_decay must be at least 0"),
    ({"betas": (1.0, 0.999)}, ValueError, "betas must be at least 0 and below 1"),
    ({"betas": (0.9, -0.1)}, ValueError, "betas"),
    ({"betas": (0.9,)}, ValueError, "betas"),
]


@pytest.mark.parametrize(("options", "exception", "text"), BAD_GROUPS)
def test_group_options(options, exception, text):
    with pytest.raises(exception, match=text):
        FiraAdamW([group(**options)])


@pytest.mark.parametrize(("options", "exception", "text"), BAD_GROUPS)
def test_add_param_group_adds_nothing_that_is_wrong(options, exception, text):
    optimizer = FiraAdamW([group()])
    with pytest.raises(exception, match=text):
        optimizer.add_param_group(group(parameter(4, 4), **options))
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize(
    ("param", "exception", "text"),
    [
        (parameter(48), ValueError, r"layer.weight has shape \(48,\).*FSDP1"),
        (parameter(4, 3, 3, 3), ValueError, r"layer.weight has shape \(4, 3, 3, 3\)"),
        (parameter(8, 6, dtype=torch.complex64), TypeError, "layer.weight is torch.complex64"),
        ("weight", TypeError, "can only optimize Tensors"),
    ],
)
def test_parameters(param, exception, text):
    with pytest.raises(exception, match=text):
        GaLoreAdamW([group(param)])


def test_constructor_arguments():
    with pytest.raises(TypeError, match="iterable"):
        GaLoreAdamW(parameter(4, 4))
    shared = parameter(4, 4)
    with pytest.raises(ValueError, match="more than one parameter group"):
        GaLoreAdamW([group(shared), group(shared)])
    with pytest.raises(ValueError, match="residual must be one of official, paper"):
        LowRankAdamW([group()], residual="code")
    with pytest.raises(ValueError, match="use GaLoreAdamW"):
        FiraAdamW([group()], residual=None)
    with pytest.raises(ValueError, match="range_finder must be one of svd, randomized"):
        FiraAdamW([group()], subspace="qr")
    with pytest.raises(TypeError, match="amsgrad: of galore_torch or fira"):
        FiraAdamW([group()], amsgrad=True)
    with pytest.raises(TypeError, match="unexpected keyword"):
        FiraAdamW([group()], amsgrade=True)


def sparse_grad():
    return torch.sparse_coo_tensor([[0, 1], [0, 1]], [1.0, 1.0], (8, 6))


@pytest.mark.parametrize("projected", [True, False])
def test_sparse_gradient_is_refused_before_any_parameter_changes(projected):
    good, bad = parameter(8, 6), parameter(8, 6)
    second = group(bad) if projected else {"params": [("layer.weight", bad)]}
    optimizer = FiraAdamW([{"params": [("first", good)], "rank": 2}, second], lr=0.1)
    good.grad, bad.grad = torch.randn(8, 6), sparse_grad()
    with pytest.raises(RuntimeError, match=r"layer\.weight has a sparse gradient"):
        optimizer.step()
    assert torch.equal(good, torch.ones(8, 6))
    assert not optimizer.state


def test_parameter_that_becomes_flat_is_refused_before_any_parameter_changes():
    """FSDP1 swaps the matrices for flat pieces after the optimizer is built."""
    first, weight = parameter(8, 6), parameter(8, 6)
    optimizer = FiraAdamW([{"params": [("first", first)], "rank": 2}, group(weight)], lr=0.1)
    weight.data = torch.ones(24)
    first.grad, weight.grad = torch.randn(8, 6), torch.randn(24)
    with pytest.raises(ValueError, match=r"layer\.weight has shape \(24,\).*flattened"):
        optimizer.step()
    assert torch.equal(first, torch.ones(8, 6))


def test_parameter_that_changes_shape_under_its_state_is_refused():
    weight = parameter(8, 6)
    optimizer = FiraAdamW([group(weight)], lr=0.1)
    weight.grad = torch.randn(8, 6)
    optimizer.step()
    weight.data = torch.ones(10, 6)
    weight.grad = torch.randn(10, 6)
    with pytest.raises(ValueError, match=r"state of layer\.weight does not fit its shape"):
        optimizer.step()
    assert torch.equal(weight, torch.ones(10, 6))


def test_rank_above_the_matrix_is_cut_with_one_notice(caplog):
    notices.notice_once.cache_clear()
    weights = [parameter(8, 6), parameter(8, 6)]
    optimizer = GaLoreAdamW([{"params": weights, "rank": 64}], lr=0.1)
    for _ in range(3):
        for weight in weights:
            weight.grad = torch.randn(8, 6)
        with caplog.at_level(logging.WARNING, logger="lowrank_kernels"):
            optimizer.step()
    assert all(optimizer.state[weight]["basis"].shape == (6, 6) for weight in weights)
    cut = [r.getMessage() for r in caplog.records if "is cut to" in r.getMessage()]
    assert cut == ["rank 64 is cut to 6 for matrices of 8 x 6: their gradient cannot have more"]
