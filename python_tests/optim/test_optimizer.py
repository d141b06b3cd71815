"""What users of torch.optim expect of any optimizer."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, LowRankAdamW, param_groups
from lowrank_kernels.ops import notices

CLASSES = [GaLoreAdamW, FiraAdamW]
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def model(dtype=torch.float32):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 10))
    return layers.to(dtype)


def fill_grads(module, seed):
    rng = torch.Generator().manual_seed(seed)
    for param in module.parameters():
        param.grad = torch.randn(param.shape, generator=rng).to(param.dtype)


def train(module, optimizer, seeds):
    for seed in seeds:
        fill_grads(module, seed)
        optimizer.step()


def assert_equal_weights(first, second):
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def build(cls, module, lr=0.01, **options):
    return cls(param_groups(module, rank=3, update_proj_gap=4), lr=lr, **options)


@pytest.mark.parametrize("cls", CLASSES)
def test_two_runs_are_bitwise_equal(cls):
    runs = [model(), model()]
    for module in runs:
        train(module, build(cls, module), range(10))
    assert_equal_weights(*runs)


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_groups_without_rank_are_torch_adamw(dtype, maximize):
    """Bit for bit: the fused kernel is torch's own."""
    ours, theirs = model(dtype), model(dtype)
    options = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1}
    optimizers = [
        LowRankAdamW(ours.parameters(), maximize=maximize, **options),
        torch.optim.AdamW(theirs.parameters(), maximize=maximize, fused=True, **options),
    ]
    for module, optimizer in zip((ours, theirs), optimizers, strict=True):
        train(module, optimizer, range(5))
    assert_equal_weights(ours, theirs)


def test_bf16_weights_without_rank_have_float32_moments():
    """The second moment of a constant gradient decays: in bf16 at beta2 = 0.999 it would not."""
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = FiraAdamW([weight], lr=0.01)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    state = optimizer.state[weight]
    assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is torch.float32
    before = state["exp_avg_sq"].clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(state["exp_avg_sq"], 0.999 * before, rtol=1e-6, atol=0)
    assert (weight < 1).all()


@pytest.mark.parametrize("cls", CLASSES)
def test_full_rank_is_adam_in_the_rotated_basis(cls):
    """At r = min(rows, cols) and alpha = 1 nothing is lost: W P takes Adam's step on G P.

    The eps of the official code is added before the bias correction, so it is 0 here.
    """
    rng = torch.Generator().manual_seed(1)
    start = torch.randn(20, 12, generator=rng, dtype=torch.float64)
    grads = [torch.randn(20, 12, generator=rng, dtype=torch.float64) for _ in range(10)]
    weight = nn.Parameter(start.clone())
    optimizer = cls([{"params": [weight], "rank": 12, "scale": 1.0}], lr=0.01, eps=0.0)
    weight.grad = grads[0].clone()
    optimizer.step()
    basis = optimizer.state[weight]["basis"]
    rotated = nn.Parameter(start @ basis)
    adam = torch.optim.AdamW([rotated], lr=0.01, eps=0.0, weight_decay=0.0)
    for index, grad in enumerate(grads):
        rotated.grad = grad @ basis
        adam.step()
        if index:
            weight.grad = grad.clone()
            optimizer.step()
    assert torch.linalg.norm(weight @ basis - rotated) <= 1e-12 * torch.linalg.norm(rotated)


def test_residual_forms_are_equal_at_scale_one_but_for_the_bias_correction():
    """With beta1 = beta2 = 0 there is none, so the two forms are the same update at alpha = 1."""
    runs = {}
    for scale in (1.0, 0.25):
        for form in ("official", "paper"):
            module = model(torch.float64)
            groups = param_groups(module, rank=3, scale=scale)
            optimizer = FiraAdamW(groups, lr=0.01, betas=(0.0, 0.0), eps=0.0, residual=form)
            train(module, optimizer, range(3))
            runs[scale, form] = module[0].weight.detach()
    distance = {s: torch.linalg.norm(runs[s, "official"] - runs[s, "paper"]) for s in (1.0, 0.25)}
    assert distance[1.0] <= 1e-12
    assert distance[0.25] >= 1e-3


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maximize_is_descent_on_the_negated_gradient(cls, dtype):
    up, down = model(dtype), model(dtype)
    optimizers = build(cls, up, maximize=True), build(cls, down)
    for seed in range(6):
        fill_grads(up, seed)
        fill_grads(down, seed)
        for param in down.parameters():
            param.grad.neg_()
        for optimizer in optimizers:
            optimizer.step()
    assert_equal_weights(up, down)


@pytest.mark.parametrize("cls", CLASSES)
def test_lr_as_tensor_or_float_and_changed_on_the_way(cls):
    first, second = model(), model()
    optimizers = build(cls, first), build(cls, second, lr=torch.tensor(0.01))
    train(first, optimizers[0], range(3))
    train(second, optimizers[1], range(3))
    for group in optimizers[0].param_groups:
        group["lr"] = 0.5
    for group in optimizers[1].param_groups:
        group["lr"].fill_(0.5)
    train(first, optimizers[0], range(3, 5))
    train(second, optimizers[1], range(3, 5))
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        # float32(0.01) is not 0.01
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("positional", [True, False])
def test_closure_runs_under_enabled_gradients_and_its_loss_is_returned(cls, positional):
    module = model()
    optimizer = build(cls, module)
    inputs = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))

    def closure():
        optimizer.zero_grad(set_to_none=True)
        loss = module(inputs).square().mean()
        loss.backward()
        return loss

    step = (
        (lambda: optimizer.step(closure)) if positional else lambda: optimizer.step(closure=closure)
    )
    losses = [float(step().detach()) for _ in range(20)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("cls", CLASSES)
def test_missing_gradient_leaves_weight_state_and_counter_alone(cls):
    module = model()
    optimizer = build(cls, module)
    optimizer.step()
    assert not optimizer.state
    train(module, optimizer, range(2))
    before = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(module)
    optimizer.zero_grad()
    optimizer.step()
    assert_equal_weights(module, weights)
    after = optimizer.state_dict()
    for key, state in before["state"].items():
        for entry, value in state.items():
            assert torch.equal(torch.as_tensor(after["state"][key][entry]), torch.as_tensor(value))


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_deepcopy_and_pickle_continue_bitwise(cls, copier):
    module = model()
    optimizer = build(cls, module, backend="reference")
    train(module, optimizer, range(5))
    twin_module, twin = copier((module, optimizer))
    assert twin.backend == "reference"
    assert twin.residual == optimizer.residual
    assert repr(twin) == repr(optimizer)
    train(module, optimizer, range(5, 10))
    train(twin_module, twin, range(5, 10))
    assert_equal_weights(module, twin_module)


def test_add_param_group_on_the_way():
    first, second = model(), model()
    whole = build(FiraAdamW, first)
    groups = param_groups(second, rank=3, update_proj_gap=4)
    grown = FiraAdamW(groups[:1], lr=0.01)
    for group in groups[1:]:
        grown.add_param_group(group)
    train(first, whole, range(5))
    train(second, grown, range(5))
    assert_equal_weights(first, second)


def test_hooks_run():
    module = model()
    optimizer = build(FiraAdamW, module)
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(module, optimizer, range(2))
    assert calls == ["pre", "post", "pre", "post"]


def test_group_keys_of_the_official_packages_and_unknown_ones_are_accepted():
    weight = nn.Parameter(torch.ones(8, 6))
    fira = {"rank": 2, "update_proj_gap": 50, "alpha": 0.5, "proj_type": "std", "fused": None}
    given = {"params": [weight], **fira}
    optimizer = FiraAdamW([given])
    assert optimizer.param_groups[0]["scale"] == 0.5
    assert optimizer.param_groups[0]["fused"] is None
    assert given == {"params": [weight], **fira}, "the user's own dict is not changed"


def test_mixed_dtypes_and_gradients_of_another_dtype():
    """float32 gradients of bf16 weights, as a trainer may accumulate them."""
    weights = [nn.Parameter(torch.ones(8, 6, dtype=dtype)) for dtype in DTYPES]
    plain = [nn.Parameter(torch.ones(6, dtype=dtype)) for dtype in DTYPES]
    optimizer = FiraAdamW([{"params": weights, "rank": 2}, {"params": plain}], lr=0.1)
    for param in weights + plain:
        param.grad = torch.randn(param.shape, dtype=param.dtype)
    optimizer.step()
    for param in weights + plain:
        assert param.isfinite().all()
        assert not torch.equal(param, torch.ones_like(param))
        assert optimizer.state[param]["exp_avg"].dtype is torch.promote_types(
            param.dtype, torch.float32
        )


@pytest.mark.parametrize("shape", [(0, 6), (6, 0), (1, 1), (1, 9), (9, 1)])
@pytest.mark.parametrize("cls", CLASSES)
def test_empty_and_thin_matrices(cls, shape):
    weight = nn.Parameter(torch.ones(shape))
    optimizer = cls([{"params": [weight], "rank": 4}], lr=0.1)
    for _ in range(3):
        weight.grad = torch.ones(shape)
        optimizer.step()
    assert float(optimizer.state[weight]["step"]) == 3
    assert weight.isfinite().all()
    assert weight.numel() == 0 or (weight < 1).all()


def test_frozen_parameters_have_no_state_and_can_be_unfrozen():
    module = model()
    module[0].weight.requires_grad_(False)
    optimizer = build(FiraAdamW, module)
    frozen = module[0].weight
    train(module[3], optimizer, range(2))
    assert frozen not in optimizer.state
    frozen.requires_grad_(True)
    train(module, optimizer, range(2))
    assert float(optimizer.state[frozen]["step"]) == 2
    assert float(optimizer.state[module[3].weight]["step"]) == 4


def test_signatures_are_those_of_the_constructors():
    for cls, own in [(LowRankAdamW, "subspace"), (AdaRankGradAdamW, "residual_energy")]:
        parameters = inspect.signature(cls).parameters
        assert next(iter(parameters)) == "params"
        assert {"lr", "betas", own} <= parameters.keys()


def test_frozen_integer_weights_may_stay_in_a_group():
    """As in a quantized base model under trained adapters."""
    module = model()
    module[0].weight = nn.Parameter(torch.ones(24, 12, dtype=torch.int8), requires_grad=False)
    optimizer = build(FiraAdamW, module)
    train(module[3], optimizer, range(2))
    assert {row["name"] for row in optimizer.explain() if row["projected"]} == {"3.weight"}


def test_plain_adamw_by_oversight_is_told(caplog):
    notices.notice_once.cache_clear()
    module = model()
    with caplog.at_level("WARNING", "lowrank_kernels"):
        train(module, FiraAdamW(module.parameters()), range(2))
    assert [record.getMessage().split(",")[0] for record in caplog.records] == [
        "no trained parameter is in a group with a rank"
    ]


def test_explain_names_every_parameter_and_counts_its_bytes():
    module = model()
    optimizer = build(FiraAdamW, module)
    assert all(row["state_bytes"] == 0 for row in optimizer.explain())
    train(module, optimizer, range(1))
    rows = {row["name"]: row for row in optimizer.explain()}
    assert set(rows) == {name for name, _ in module.named_parameters()}
    weight = rows["0.weight"]
    assert (weight["side"], weight["rank"], weight["projected"]) == ("right", 3, True)
    assert rows["3.weight"]["side"] == "left"
    assert rows["0.bias"]["backend"] == "torch"


@pytest.mark.parametrize("rows_cols", [(24, 12), (12, 24), (16, 16), (37, 61)])
@pytest.mark.parametrize("cls", CLASSES)
def test_state_bytes_of_float32_are_the_formula(cls, rows_cols):
    rank = 5
    weight = nn.Parameter(torch.ones(rows_cols))
    optimizer = cls([{"params": [weight], "rank": rank}])
    weight.grad = torch.randn(rows_cols)
    optimizer.step()
    scalars = 4 + (4 if cls is FiraAdamW else 0)
    expected = 4 * (2 * rank * max(rows_cols) + rank * min(rows_cols)) + scalars
    assert optimizer.explain()[0]["state_bytes"] == expected
    stream = io.BytesIO()
    torch.save(optimizer.state_dict()["state"], stream)
    assert stream.tell() < expected + 8192, "nothing else is saved"
