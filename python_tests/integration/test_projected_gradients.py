"""R in the place of gradients of any layer, as it accumulates in one process."""

import copy
import gc
import pickle
import weakref
from unittest import mock

import pytest
import torch
from integration.product_model import (
    ADAPTIVE,
    GALORE,
    GAP,
    PARTS,
    RANK,
    SHAPES,
    STEPS,
    WIDTH,
    accumulate,
    assert_same_weights,
    build,
    loss_of,
    matrices,
    train,
)
from torch import nn

from lowrank_kernels import (
    FiraAdamW,
    GaLoreAdamW,
    LowRankAdamW,
    ProjectedGradients,
    project_linears,
    release_gradients,
)
from lowrank_kernels.ops import products
from lowrank_kernels.ops.contract import Side
from lowrank_kernels.optim.projected_gradient import ProjectedGradient

METHODS = {
    "galore": GALORE,
    "svd": {**GALORE, "subspace": "svd"},
    "int8 basis": {**GALORE, "basis": "int8"},
    "adaptive": ADAPTIVE,
}


def stepped_once(**options):
    """A model whose matrices have bases, and one that goes on with whole gradients."""
    (model, optimizer), (plain, whole) = (build(**{**GALORE, **options}) for _ in range(2))
    handle = ProjectedGradients(optimizer)
    for each, own in ((model, optimizer), (plain, whole)):
        train(each, own, range(1))
        # None is due at the next step.
        for group in own.param_groups[:1]:
            group["update_proj_gap"] = 1000
    return model, optimizer, plain, whole, handle


def projected_by(state, gradient):
    basis = state["basis"].to(gradient.dtype)
    return gradient @ basis if state["side"] == Side.RIGHT else basis.T @ gradient


@pytest.mark.parametrize("method", METHODS)
def test_steps_of_accumulated_gradients_are_those_of_whole_ones(method):
    model, optimizer = build(**METHODS[method])
    plain, whole = build(**METHODS[method])
    ProjectedGradients(optimizer)
    kinds = []
    for step in range(STEPS):
        accumulate(model, step)
        for name, weight in matrices(model).items():
            state, grad = optimizer.state[weight], weight.grad
            wants = optimizer.wants(weight)
            kinds.append(type(grad))
            assert (type(grad) is torch.Tensor) == (wants is None), (step, name)
            if wants is not None:
                assert grad.held.shape == state["exp_avg"].shape
        optimizer.step()
        optimizer.zero_grad()
    train(plain, whole)
    assert {torch.Tensor, ProjectedGradient} == set(kinds)
    assert_same_weights(model, plain)
    steps = [[state["basis_step"] for state in own.state.values() if "basis" in state]
             for own in (optimizer, whole)]  # fmt: skip
    assert steps[0] == steps[1]


def test_bfloat16_gradients_lose_less_than_in_bfloat16():
    """64 micro-batches: G added in bfloat16 rounds 64 times, R in float32 never."""
    model, optimizer, plain, _, _ = stepped_once(dtype=torch.bfloat16)
    exact = {name: torch.zeros(SHAPES[name], dtype=torch.float64) for name in SHAPES}
    for part in range(64):
        loss_of(model, 1, part).backward()
        loss_of(plain, 1, part).backward()
        alone = copy.deepcopy(plain)
        alone.zero_grad()
        loss_of(alone, 1, part).backward()
        for name, weight in matrices(alone).items():
            exact[name] += weight.grad.double()
    for name, weight in matrices(model).items():
        state = optimizer.state[weight]
        assert weight.grad.held.dtype is torch.float32
        expected = projected_by(state, exact[name])
        added = projected_by(state, matrices(plain)[name].grad.double())
        error, rounded = ((other.double() - expected).norm() for other in (weight.grad.held, added))
        assert error < 0.01 * rounded, name


def test_where_products_in_half_precision_are_fast_r_is_float32_all_the_same(monkeypatch):
    monkeypatch.setattr(products, "FAST_IN_HALF", {"cpu"})
    model, optimizer, _, _, _ = stepped_once(dtype=torch.bfloat16)
    rng = torch.Generator().manual_seed(0)
    for name, weight in matrices(model).items():
        grads = [torch.randn(SHAPES[name], generator=rng).bfloat16() for _ in range(8)]
        for grad in grads:
            (weight * grad).sum().backward()
        state = optimizer.state[weight]
        expected = sum(projected_by(state, grad).float() for grad in grads)
        assert weight.grad.held.dtype is torch.float32
        # One of them is not rounded to bfloat16 more than once.
        torch.testing.assert_close(weight.grad.held, expected, rtol=1e-6, atol=1e-6)


def test_the_norm_is_that_of_r():
    model, optimizer, plain, _, _ = stepped_once()
    for each in (model, plain):
        accumulate(each, 1)
    squares = [param.grad.square().sum() for param in plain.last.parameters()]
    for name, weight in matrices(model).items():
        expected = projected_by(optimizer.state[weight], matrices(plain)[name].grad)
        torch.testing.assert_close(weight.grad.held, expected)
        squares.append(expected.square().sum())
    expected = torch.stack(squares).sum().sqrt()
    norm = nn.utils.clip_grad_norm_(model.parameters(), float(expected) / 2)
    torch.testing.assert_close(norm, expected)
    norm = nn.utils.get_total_norm([param.grad for param in model.parameters()])
    torch.testing.assert_close(norm, expected / 2, rtol=1e-5, atol=0)


def test_a_grad_scaler_unscales_it_and_leaves_out_what_is_not_finite():
    model, optimizer, plain, whole, _ = stepped_once(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for part in range(PARTS):
        scaler.scale(loss_of(model, 1, part)).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    train(plain, whole, range(1, 2))
    assert_same_weights(model, plain, 1e-5)
    before = copy.deepcopy(model)
    scaler.scale(loss_of(model, 2) * torch.inf).backward()
    scaler.step(optimizer)
    assert_same_weights(model, before, 0)


def test_gradients_that_are_set_to_zero_and_stay():
    model, optimizer = build(**GALORE)
    plain, whole = build(**GALORE)
    ProjectedGradients(optimizer)
    for step in range(STEPS):
        accumulate(model, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    train(plain, whole)
    assert_same_weights(model, plain)


def test_a_state_dict_within_an_accumulation():
    model, optimizer, plain, whole, _ = stepped_once()
    loss_of(model, 1, 0).backward()
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    loss_of(model, 1, 1).backward()
    fresh, resumed = build(seed=1, **GALORE)
    ProjectedGradients(resumed)
    fresh.load_state_dict(weights)
    resumed.load_state_dict(saved)
    # Into the optimizer itself: what had accumulated is of a basis that is gone.
    optimizer.load_state_dict(saved)
    with pytest.raises(RuntimeError, match=r"square .*call zero_grad\(\) after load_state_dict"):
        optimizer.step()
    assert_same_weights(model, plain, 0)
    optimizer.zero_grad()
    for each, own in ((model, optimizer), (fresh, resumed), (plain, whole)):
        train(each, own, range(1, 4))
    assert_same_weights(model, fresh, 0)
    assert_same_weights(model, plain)


def test_removed_within_an_accumulation():
    model, optimizer, plain, whole, handle = stepped_once()
    loss_of(model, 1, 0).backward()
    assert "3 matrices are projected as they come" in str(handle)
    handle.remove()
    handle.remove()
    assert str(handle).endswith("no more")
    loss_of(model, 1, 1).backward()
    optimizer.step()
    optimizer.zero_grad()
    train(plain, whole, range(1, 2))
    assert_same_weights(model, plain)
    accumulate(model, 2)
    assert not any(isinstance(param.grad, ProjectedGradient) for param in model.parameters())


def test_a_backward_pass_that_fails_loses_nothing_but_itself():
    model, optimizer, plain, whole, _ = stepped_once()

    def fail(_):
        raise ArithmeticError

    handle = model.square.register_hook(fail)
    with pytest.raises(ArithmeticError):
        loss_of(model, 1).backward()
    handle.remove()
    assert isinstance(model.block.up.grad, ProjectedGradient)
    assert model.square.grad is None
    optimizer.zero_grad()
    for each, own in ((model, optimizer), (plain, whole)):
        train(each, own, range(1, 3))
    assert_same_weights(model, plain)


def test_a_projection_that_fails_keeps_the_whole_gradient():
    model, optimizer, plain, whole, _ = stepped_once()
    with (
        mock.patch("lowrank_kernels.optim.projected_gradient.project", side_effect=MemoryError),
        pytest.raises(MemoryError),
    ):
        (model.square.square().sum() / 2).backward()
    assert torch.equal(model.square.grad, model.square)
    accumulate(model, 1)
    assert isinstance(model.square.grad, ProjectedGradient)
    (plain.square.square().sum() / 2).backward()
    accumulate(plain, 1)
    for own in (optimizer, whole):
        own.step()
    assert_same_weights(model, plain)


def test_groups_and_methods_that_change():
    model, optimizer, _, _, _ = stepped_once()
    projected = optimizer.param_groups[0]
    accumulate(model, 1)
    optimizer.residual = "official"
    with pytest.raises(RuntimeError, match=r"square .*its step needs the whole: call zero_grad"):
        optimizer.step()
    optimizer.zero_grad()
    accumulate(model, 1)
    assert type(model.square.grad) is torch.Tensor
    optimizer.residual = None
    # Taken out of the optimizer, its gradients are nobody's business.
    optimizer.zero_grad()
    optimizer.param_groups.remove(projected)
    accumulate(model, 1)
    assert type(model.square.grad) is torch.Tensor
    optimizer.param_groups.insert(0, projected)
    optimizer.zero_grad()
    # A gradient of another shape is left to the step, which says so.
    model.square.data = torch.zeros(WIDTH, WIDTH + 2, dtype=torch.float64)
    model.square.sum().backward()
    with pytest.raises(ValueError, match="the state of square does not fit its shape"):
        optimizer.step()


def test_parameters_that_come_later_keep_whole_gradients():
    model, optimizer, _, _, handle = stepped_once()
    late = nn.Parameter(torch.eye(WIDTH, dtype=torch.float64))
    optimizer.add_param_group({"params": [("late", late)], "rank": RANK})
    for _ in range(2):
        late.square().sum().backward()
        assert type(late.grad) is torch.Tensor
        accumulate(model, 1)
        optimizer.step()
        optimizer.zero_grad()
    assert handle.names == ("square", "up", "down")


def test_autocast_around_the_backward_pass_rounds_nothing():
    model, optimizer, _, _, _ = stepped_once(dtype=torch.float32)
    rng = torch.Generator().manual_seed(0)
    for name, weight in matrices(model).items():
        first, second = (torch.randn(SHAPES[name], generator=rng) for _ in range(2))
        losses = [(weight * grad).sum() for grad in (first, second)]
        with torch.autocast("cpu", torch.bfloat16):
            for loss in losses:
                loss.backward()
        state = optimizer.state[weight]
        expected = projected_by(state, first) + projected_by(state, second)
        torch.testing.assert_close(weight.grad.held, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_gradients_with_a_graph_of_their_own_stay_whole():
    model, optimizer, _, _, _ = stepped_once()
    loss_of(model, 1).backward(create_graph=True)
    assert optimizer.wants(model.square) is not None
    assert model.square.grad.requires_grad
    assert type(model.square.grad) is torch.Tensor


def test_beside_projected_linears_and_released_gradients():
    """One takes the linear layers, the other what is left."""
    runs = []
    for way in ("whole", "projected", "released"):
        torch.manual_seed(2)
        linear = nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.float64)
        model, optimizer = build(**GALORE)
        model = nn.Sequential(linear, model)
        group = {"params": [("linear", linear.weight)], "rank": RANK, "update_proj_gap": GAP}
        optimizer.add_param_group(group)
        if way != "whole":
            project_linears(model, optimizer, start="dense")
            handle = ProjectedGradients(optimizer, model)
            assert handle.names == ("square", "up", "down")
        if way == "released":
            release_gradients(model, optimizer)
        for step in range(5):
            loss_of(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(model)
    assert_same_weights(runs[1], runs[0])
    assert_same_weights(runs[2], runs[0])
    with pytest.raises(ValueError, match="call project_linears before ProjectedGradients"):
        linear_after()


def linear_after():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH))
    optimizer = GaLoreAdamW([{"params": [("w", model[0].weight)], "rank": RANK}])
    ProjectedGradients(optimizer, model)
    project_linears(model, optimizer)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"kind": FiraAdamW}, "residual='official' needs .*use GaLoreAdamW, or release_gradients"),
        ({"kind": LowRankAdamW, "residual": "sign"}, "residual='sign' needs"),
        ({"kind": GaLoreAdamW, "capturable": True}, "capturable=True: a captured step"),
    ],
)
def test_optimizers_that_need_whole_gradients_are_refused(options, match):
    _, optimizer = build(**options)
    with pytest.raises(ValueError, match=match):
        ProjectedGradients(optimizer)


def test_other_refusals():
    model, optimizer = build(**GALORE)
    with pytest.raises(ValueError, match="SGD is no optimizer of lowrank_kernels"):
        ProjectedGradients(torch.optim.SGD(model.parameters()))
    with pytest.raises(ValueError, match=r"square \(\(10, 10\), torch.float64\) is no parameter"):
        ProjectedGradients(optimizer, model.block)
    with pytest.raises(ValueError, match="no group has a rank"):
        ProjectedGradients(GaLoreAdamW(model.last.parameters()))
    model.square.requires_grad_(False)
    only = GaLoreAdamW([{"params": [model.square], "rank": RANK}])
    with pytest.raises(ValueError, match="1: it is frozen"):
        ProjectedGradients(only)
    model.square.requires_grad_(True)
    # None of these has left a hook behind.
    handle = ProjectedGradients(optimizer)
    with pytest.raises(ValueError, match=r"square: .*projected already: remove\(\) the other"):
        ProjectedGradients(optimizer)
    handle.remove()
    ProjectedGradients(optimizer)


def test_two_optimizers_of_one_model():
    """Each projects its own; what DistributedDataParallel is told to leave is put back."""
    model, _ = build()
    by_name = list(matrices(model).items())
    optimizers = [
        GaLoreAdamW([{"params": [own], "rank": RANK, "update_proj_gap": GAP}]) for own in by_name
    ]
    with pytest.raises(ValueError, match="is no parameter of the model"):
        ProjectedGradients(optimizers[0], nn.Sequential(nn.Linear(2, 2)))
    handles = [ProjectedGradients(each, model) for each in optimizers]
    left = set(model._ddp_params_and_buffers_to_ignore)
    assert left == {"square", ".square", "block.up", "block.down"}
    handles.pop(0).remove()
    assert set(model._ddp_params_and_buffers_to_ignore) == {"block.up", "block.down"}
    for step in range(2):
        accumulate(model, step)
        for each in optimizers:
            each.step()
            each.zero_grad()
    optimizers[0].param_groups[0]["update_proj_gap"] = 1000
    accumulate(model, 2)
    assert type(model.square.grad) is torch.Tensor
    for handle in handles:
        handle.remove()
    assert model._ddp_params_and_buffers_to_ignore == []
    assert not model._forward_pre_hooks


def test_models_are_copied_and_pickled_and_nothing_is_kept():
    model, optimizer = build(**GALORE)
    ProjectedGradients(optimizer, model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        accumulate(twin, 0)
        assert type(twin.square.grad) is torch.Tensor
    gone = weakref.ref(optimizer), weakref.ref(model)
    train(model, optimizer, range(2))
    del optimizer
    gc.collect()
    assert gone[0]() is None
    accumulate(model, 1)
    assert type(model.square.grad) is torch.Tensor
    del model
    gc.collect()
    assert gone[1]() is None
