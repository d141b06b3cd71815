"""Odd layouts, lazy views, foreign modes: the right result, or an error before anything changes."""

import copy

import pytest
import torch
from torch import nn

from lowrank_kernels import FiraAdamW, GaLoreAdamW, Subspace

LR, STEPS = 1e-2, 3


def strided(values):
    """The same values with holes between them."""
    wide = torch.zeros(*values.shape, 2, dtype=values.dtype)
    wide[..., 0] = values
    return wide[..., 0]


def transposed(values):
    return values.mT.contiguous().mT


def expanded(values):
    """The first row, everywhere, by a stride of 0."""
    return values[:1].expand_as(values)


def offset(values):
    flat = torch.zeros(values.numel() + 3, dtype=values.dtype)
    return flat[3:].view_as(values).copy_(values)


def negated(values):
    """The same values behind a pending negation."""
    return torch._neg_view(-values)


PARAMS = {"dense": lambda x: x, "holes": strided, "transposed": transposed, "offset": offset}
GRADS = {**PARAMS, "expanded": expanded, "negated": negated}
GROUPS = {"plain": {}, "scaled": {"scale": 0.5}, "projected": {"rank": 4, "update_proj_gap": 2}}


def trained(values, gradients, group, dtype, layout=lambda x: x, grad_layout=lambda x: x):
    """The weight after a few steps, and everything around it in its memory."""
    param = nn.Parameter(layout(values.to(dtype, copy=True)))
    optimizer = FiraAdamW([{"params": [param], **group}], lr=LR)
    for gradient in gradients:
        param.grad = grad_layout(gradient.to(dtype))
        optimizer.step()
    return param.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("param", PARAMS)
@pytest.mark.parametrize("group", GROUPS)
def test_layouts_change_no_result(group, param, grad, dtype, rng):
    """Against contiguous copies, up to rounding: products may add up in another order."""
    values, *gradients = torch.randn(STEPS + 1, 10, 12, generator=rng, dtype=torch.float64)
    options = dict(GROUPS[group])
    if grad == "expanded":
        gradients = [expanded(gradient) for gradient in gradients]
        if "rank" in options:  # more directions than the gradient has are left to rounding
            options["rank"] = 1
    expected = trained(values, [g.contiguous() for g in gradients], options, dtype)
    found = trained(values, gradients, options, dtype, PARAMS[param], GRADS[grad])
    torch.testing.assert_close(found, expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-5 * LR)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("group", GROUPS)
def test_a_step_writes_to_its_weight_only(group, dtype, rng):
    whole = torch.randn(10, 12, 2, generator=rng, dtype=torch.float64).to(dtype)
    before = whole.clone()
    param = nn.Parameter(whole[..., 0])
    param.data = whole[..., 0]
    optimizer = FiraAdamW([{"params": [param], **GROUPS[group]}], lr=LR)
    param.grad = torch.ones(1, 1, dtype=dtype).expand(10, 12)
    optimizer.step()
    assert torch.equal(whole[..., 1], before[..., 1])
    assert not torch.equal(whole[..., 0], before[..., 0])


def test_a_checkpoint_of_a_contiguous_model_goes_on_in_channels_last(rng):
    values, *gradients = torch.randn(5, 4, 3, 3, 3, generator=rng)
    states = []
    for layouts in ((torch.contiguous_format,) * 2, (torch.contiguous_format, torch.channels_last)):
        first, second = (nn.Parameter(values.clone(memory_format=layout)) for layout in layouts)
        optimizer, other = FiraAdamW([first], lr=LR), FiraAdamW([second], lr=LR)
        for gradient in gradients[:2]:
            first.grad = gradient
            optimizer.step()
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        second.data.copy_(first)
        for gradient in gradients[2:]:
            second.grad = gradient.clone(memory_format=layouts[1])
            other.step()
        assert other.state[second]["exp_avg"].stride() == second.stride()
        states.append(second.detach())
    torch.testing.assert_close(*states, rtol=1e-6, atol=0)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize(
    ("view", "text"),
    [
        (lambda: torch.ones(1, 12).expand(10, 12), "overlaps itself"),
        (lambda: torch.ones(30).as_strided((10, 12), (2, 1)), "overlaps itself"),
        (lambda: negated(torch.ones(10, 12)), "pending negation"),
    ],
    ids=["expanded", "windows", "negated"],
)
def test_weights_that_cannot_be_written_element_by_element(view, text, group):
    param = nn.Parameter(torch.empty(10, 12))
    param.data = view()
    with pytest.raises(ValueError, match=rf"parameter 0 of group 0 .*float32.* {text}"):
        FiraAdamW([{"params": [param], **GROUPS[group]}])


def test_a_zero_that_was_never_written_is_a_zero_gradient():
    param = nn.Parameter(torch.ones(10, 12))
    optimizer = FiraAdamW([{"params": [param], "rank": 4}], lr=LR)
    for gradient in (torch.ones(10, 12), torch._efficientzerotensor(10, 12)):
        param.grad = gradient
        optimizer.step()
    assert param.isfinite().all()


SHARED = {
    "one weight twice": lambda whole: (whole[:10], whole[:10], None),
    "windows": lambda whole: (whole[:10], whole[5:15], None),
    "a gradient": lambda whole: (whole[:10], None, whole[:10]),
    "a part of a gradient": lambda whole: (whole[:10], None, whole[5:15]),
}


@pytest.mark.parametrize("other", [{"rank": 4}, {}], ids=["projected", "plain"])
@pytest.mark.parametrize("backend", ["native", "foreach", "reference"])
@pytest.mark.parametrize("shared", SHARED)
def test_shared_memory_is_refused_before_anything_changes(shared, backend, other):
    """Two parameters of one storage would be stepped twice, a gradient be overwritten."""
    whole = torch.ones(20, 12)
    first, second, grad = SHARED[shared](whole)
    params = [nn.Parameter(first), nn.Parameter(torch.ones(10, 12) if second is None else second)]
    groups = [{"params": [("a", params[0])], "rank": 4}, {"params": [("b", params[1])], **other}]
    optimizer = GaLoreAdamW(groups, lr=LR, backend=backend)
    params[0].grad = torch.ones(10, 12) if grad is None else grad
    params[1].grad = torch.ones(10, 12)
    with pytest.raises(ValueError, match="shares its memory with"):
        optimizer.step()
    assert not optimizer.state
    assert torch.equal(whole, torch.ones(20, 12))


def test_weights_between_each_others_elements_share_nothing():
    whole = torch.ones(10, 24)
    params = [nn.Parameter(whole[:, start::2]) for start in range(2)]
    optimizer = GaLoreAdamW([{"params": params, "rank": 4}], lr=LR)
    for param in params:
        param.grad = torch.ones(10, 12)
    optimizer.step()
    assert not (whole == 1).any()


@pytest.mark.parametrize("group", GROUPS)
def test_a_gradient_of_another_shape_is_refused_before_anything_changes(group):
    """torch compares them when a gradient is assigned, but both may be changed after that."""
    params = [nn.Parameter(torch.ones(10, 12)) for _ in range(2)]
    optimizer = FiraAdamW([{"params": params, **GROUPS[group]}], lr=LR)
    for param in params:
        param.grad = torch.ones(10, 12)
    params[1].data = torch.ones(40, 12)
    with pytest.raises(RuntimeError, match=r"parameter 1 of group 0 has shape \(40, 12\)"):
        optimizer.step()
    assert not optimizer.state
    assert all((param == 1).all() for param in params)


FINDERS = ("randomized", "power", "random", "svd")


def trajectory(around, subspace, backend, residual="official"):
    """Weights after steps over refreshes, each step taken inside of `around()`."""
    rng = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(20, 31, generator=rng)) for _ in range(2)]
    groups = [{"params": weights[:1], "rank": 5, "update_proj_gap": 2}, {"params": weights[1:]}]
    options = {} if residual is None else {"residual": residual}
    method = GaLoreAdamW if residual is None else FiraAdamW
    optimizer = method(groups, lr=LR, subspace=subspace, backend=backend, **options)
    for _ in range(5):
        for weight in weights:
            weight.grad = torch.randn(20, 31, generator=rng)
        with around():
            optimizer.step()
    return torch.stack([weight.detach() for weight in weights])


@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
@pytest.mark.parametrize("subspace", FINDERS)
def test_autocast_changes_no_bit(subspace, backend):
    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    def nothing():
        return torch.autocast("cpu", enabled=False)

    expected = trajectory(nothing, subspace, backend)
    assert torch.equal(trajectory(autocast, subspace, backend), expected)


def test_autocast_is_on_in_the_closure():
    param = nn.Parameter(torch.ones(4, 4))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 2}])

    def closure():
        loss = (param @ param).sum()
        assert (param @ param).dtype is torch.bfloat16
        loss.backward()
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        optimizer.step(closure)


MEASURED = {
    "relative_norm": Subspace(criterion="relative_norm", threshold=0.5, check_gap=2),
    "displacement": Subspace(criterion="displacement", threshold=0.5, check_gap=2),
    "lazy": Subspace(lazy=0.0, residual_energy=0.1),
}


@pytest.mark.parametrize("subspace", [*FINDERS, *MEASURED])
def test_a_default_device_changes_no_bit(subspace):
    """ "meta" stands for a GPU: what a step makes there without being told to, fails or is lost."""
    chosen = MEASURED.get(subspace, subspace)
    expected = trajectory(lambda: torch.device("cpu"), chosen, "auto")
    assert torch.equal(trajectory(lambda: torch.device("meta"), chosen, "auto"), expected)


def test_a_default_device_does_not_get_the_step_count():
    param = nn.Parameter(torch.ones(4, 4))
    optimizer = GaLoreAdamW(
        [{"params": [param], "rank": 2}, {"params": [nn.Parameter(torch.ones(4))]}]
    )
    for group in optimizer.param_groups:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    with torch.device("meta"):
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    assert {state["step"].device.type for state in optimizer.state.values()} == {"cpu"}


def test_a_default_dtype_changes_no_state():
    torch.set_default_dtype(torch.float64)
    try:
        param = nn.Parameter(torch.ones(4, 4, dtype=torch.float32))
        optimizer = GaLoreAdamW([{"params": [param], "rank": 2}], subspace=Subspace(lazy=0.5))
        param.grad = torch.ones(4, 4, dtype=torch.float32)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    tensors = [v for v in optimizer.state[param].values() if isinstance(v, torch.Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


BAD_VALUES = [
    ("lr", float("nan"), ValueError),
    ("lr", float("inf"), ValueError),
    ("lr", "1e-2", TypeError),
    ("lr", True, TypeError),
    ("eps", float("inf"), ValueError),
    ("weight_decay", float("inf"), ValueError),
    ("betas", (0.9, 1.5), ValueError),
    ("rank", 0, ValueError),
    ("rank", 2.5, TypeError),
    ("update_proj_gap", 0, ValueError),
    ("scale", float("nan"), ValueError),
    ("proj_type", "full", ValueError),
    ("betas", 0.9, ValueError),
    ("maximize", "no", TypeError),
]


@pytest.mark.parametrize(("key", "value", "error"), BAD_VALUES)
def test_options_that_do_not_fit_are_refused_at_construction(key, value, error):
    group = {"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2, key: value}
    with pytest.raises(error, match=f"group 0: {key} "):
        GaLoreAdamW([group])


@pytest.mark.parametrize(("key", "value", "error"), BAD_VALUES)
def test_options_changed_to_what_does_not_fit_leave_everything_as_it_was(key, value, error):
    """The first group would have moved by the time that the second one is looked at."""
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = FiraAdamW([{"params": [weight], "rank": 2} for weight in weights])
    for weight in weights:
        weight.grad = torch.ones(4, 4)
    optimizer.step()
    optimizer.param_groups[1][key] = value
    before = copy.deepcopy([weights, [optimizer.state[weight] for weight in weights]])
    with pytest.raises(error, match=f"group 1: {key} "):
        optimizer.step()
    after = [weights, [optimizer.state[weight] for weight in weights]]
    assert str(after) == str(before)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rnak": 4}, "'rnak' is not an option; do you mean 'rank'"),
        ({"rank": 2, "projtype": "left"}, "do you mean 'proj_type'"),
        ({"rank": 2, "update_proj_gp": 5}, "do you mean 'update_proj_gap'"),
        ({"update_proj_gap": 5}, "update_proj_gap without a rank"),
        ({"scale": 1.0, "proj_type": "std"}, "proj_type without a rank"),
    ],
)
def test_slips_in_the_keys_of_a_group(options, text):
    with pytest.raises(ValueError, match=f"group 0: .*{text}"):
        GaLoreAdamW([{"params": [nn.Parameter(torch.ones(4, 4))], **options}])


@pytest.mark.parametrize("key", ["lr_scale", "name", "initial_lr", "swa_lr"])
def test_keys_of_others_stay_in_the_group(key):
    optimizer = GaLoreAdamW([{"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2, key: 0.5}])
    assert optimizer.param_groups[0][key] == 0.5


def test_keys_of_other_low_rank_optimizers_are_told(caplog):
    group = {"params": [nn.Parameter(torch.ones(4, 4))], "rank": 2, "scale_type": "channel"}
    with caplog.at_level("WARNING", "lowrank_kernels"):
        GaLoreAdamW([group])
    assert "group 0: of no effect here: scale_type" in caplog.text


@pytest.mark.parametrize(
    "key", ["lr", "betas", "maximize", "scale", "update_proj_gap", "proj_type"]
)
def test_an_option_that_was_taken_out_is_missed_before_anything_changes(key):
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    optimizer = FiraAdamW([{"params": [weight], "rank": 2} for weight in weights])
    for weight in weights:
        weight.grad = torch.ones(4, 4)
    del optimizer.param_groups[1][key]
    with pytest.raises(ValueError, match=f"group 1 has no {key}"):
        optimizer.step()
    assert not optimizer.state


def test_a_rank_given_to_a_plain_group_needs_its_other_options():
    param = nn.Parameter(torch.ones(4, 4))
    optimizer = FiraAdamW([param])
    param.grad = torch.ones(4, 4)
    optimizer.param_groups[0]["rank"] = 2
    with pytest.raises(ValueError, match="group 0 has no update_proj_gap, scale, proj_type"):
        optimizer.step()


def test_alpha_is_not_written_in_vain():
    param = nn.Parameter(torch.ones(4, 4))
    optimizer = FiraAdamW([{"params": [param], "rank": 2, "alpha": 1.0}])
    param.grad = torch.ones(4, 4)
    optimizer.param_groups[0]["alpha"] = 0.5
    with pytest.raises(ValueError, match=r"write to group\['scale'\]"):
        optimizer.step()


@pytest.mark.parametrize("shape", [(9, 1), (1, 9)], ids=str)
@pytest.mark.parametrize("proj_type", ["left", "right"])
def test_an_exact_basis_of_a_vector_has_the_sign_of_the_svd(shape, proj_type):
    """The official packages factor the gradient as it lies; a vector lies either way."""
    for seed in range(4):
        param = nn.Parameter(torch.zeros(shape))
        group = {"params": [param], "rank": 1, "proj_type": proj_type}
        optimizer = GaLoreAdamW([group], subspace="svd")
        rng = torch.Generator().manual_seed(seed)
        param.grad = torch.randn(shape, generator=rng)
        optimizer.step()
        left, _, right = torch.linalg.svd(param.grad, full_matrices=False)
        expected = left if proj_type == "left" else right.mT
        basis = optimizer.state[param]["basis"]
        assert torch.equal(basis.sign(), expected.sign())
