"""Forms of the residual: steps against their equations, resume, bad gradients, options, bytes."""

import copy
import io
import itertools
import math

import pytest
import torch
from devices import device_of
from oracles import outside as oracle
from torch import nn

from lowrank_kernels import (
    ApolloAdamW,
    FiraAdamW,
    GaLoreAdamW,
    LowRankAdamW,
    OrthoFiraAdamW,
    Subspace,
    project_linears,
    release_gradients,
)
from lowrank_kernels.ops import orthogonal
from lowrank_kernels.ops.bases import loaded_basis
from lowrank_kernels.ops.codes import ROW_GROUPS, decoded, encode

FORMS = {
    "scale": {"residual": "scale"},
    "scale of a matrix": {"residual": "scale", "per": "matrix"},
    "normalize": {"residual": "normalize", "residual_scale": 0.3},
    "sign": {"residual": "sign", "residual_scale": 0.2},
    "orthogonal": {"residual": "orthogonal"},
}
AVERAGED = {
    "sign": {"residual": "sign", "residual_momentum": 0.9},
    "orthogonal": {"residual": "orthogonal", "residual_momentum": 0.9},
}
NONE = {"none": {"residual": None}}
EVERY = {**FORMS, **{f"{name}, averaged": own for name, own in AVERAGED.items()}}
SHAPES = [(12, 20), (20, 12), (16, 16), (12, 20)]
LR, DECAY, ALPHA, RANK = 0.03, 0.1, 0.25, 4
BACKENDS = ["reference", "foreach", "native", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def in_bfloat16(request, monkeypatch):
    """Whether matrices are orthogonalized in it, whatever this processor multiplies fast: not if
    not asked for.
    """
    asked = getattr(request, "param", False)
    monkeypatch.setattr(orthogonal, "fast_in_bfloat16", lambda device_type: asked)


def start(form, backend="auto", dtype=torch.float64, shapes=SHAPES, **options):
    torch.manual_seed(0)
    drawn = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    params = [nn.Parameter(values.to(device_of(backend), dtype)) for values in drawn]
    group = {"params": params, "rank": RANK, "update_proj_gap": 3, "scale": ALPHA}
    own = {"lr": LR, "weight_decay": DECAY, "backend": backend, **(NONE | EVERY)[form], **options}
    return params, LowRankAdamW([group], **own)


def gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in params:
        drawn = torch.randn(param.shape, generator=generator, dtype=torch.float64)
        param.grad = drawn.to(param.device, param.dtype)


def run(params, optimizer, seeds):
    for seed in seeds:
        gradients(params, seed)
        optimizer.step()


def wide(stored, shape):
    """M and V before the first step are zero."""
    return torch.zeros(shape, dtype=torch.float64) if stored is None else stored.double()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_those_of_the_equations(form, backend):
    """Over two refreshes; each step begins where the optimizer's last one ended."""
    exact = backend in ("reference", "foreach")
    params, optimizer = start(form, backend, torch.float64 if exact else torch.float32)
    # Near zero the slope of the iteration is that of its first step to the fifth power, 485.
    tolerance = 1e-12 if exact else 485 * 2**-20 if form == "orthogonal" else 2**-15
    own = EVERY[form]
    scale = own.get("residual_scale", 0.4)
    name = own["residual"], scale, own.get("per") == "matrix"
    for count in range(1, 8):
        before = [copy.deepcopy((param.data, optimizer.state[param])) for param in params]
        run(params, optimizer, [count])
        for param, (weight, old) in zip(params, before, strict=True):
            state = optimizer.state[param]
            moments = [wide(old.get(key), state[key].shape) for key in ("exp_avg", "exp_avg_sq")]
            scalars = LR, 0.9, 0.999, 1e-6, DECAY, ALPHA, count
            tensors = (x.cpu() for x in (weight, param.grad, state["basis"]))
            moments = [moment.cpu() for moment in moments]
            expected, stored = oracle.step(
                *(name, *tensors, state["side"] == 0, moments, scalars),
                float(old.get("limiter_norm", 0.0)),
            )
            moved = expected - weight.double().cpu()
            error = (param.data.double().cpu() - expected).norm() / moved.norm()
            assert float(error) < tolerance
            if "limiter_norm" in state:
                # Weights are stepped by alpha S, and the limiter keeps |S|.
                assert float(state["limiter_norm"]) == pytest.approx(stored, rel=1e-5)


@pytest.mark.parametrize("name", AVERAGED)
def test_a_momentum_is_the_mean_of_what_is_outside_in_a_byte_an_element(name):
    params, optimizer = start(f"{name}, averaged", "reference")
    means = [torch.zeros_like(param) for param in params]
    for count in range(1, 6):
        before = [param.data.clone() for param in params]
        run(params, optimizer, [count])
        for place, param in enumerate(params):
            state = optimizer.state[param]
            basis, grad = state["basis"], param.grad
            low = basis @ (basis.T @ grad) if state["side"] == 0 else grad @ basis @ basis.T
            means[place] = 0.9 * means[place] + 0.1 * (grad - low)
            codes, scales = state["residual_avg"], state["residual_avg_scale"]
            assert codes.dtype is torch.int8
            assert codes.shape == param.shape
            found = decoded(codes, scales, ROW_GROUPS)
            # A code is half of two 127ths of the group's largest, at the most.
            bound = float(means[place].abs().max()) / 60
            assert float((found - means[place]).abs().max()) < bound
            means[place] = found.double()
            assert not torch.equal(param.data, before[place])


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float32), ("foreach", torch.float64), ("native", torch.float32)],
)
@pytest.mark.parametrize("form", EVERY)
def test_a_resumed_run_has_the_same_bits(form, backend, dtype):
    whole, optimizer = start(form, backend, dtype)
    run(whole, optimizer, range(9))
    part, first = start(form, backend, dtype)
    run(part, first, range(4))
    stream = io.BytesIO()
    torch.save([first.state_dict(), part], stream)
    stream.seek(0)
    state_dict, weights = torch.load(stream)
    resumed, second = start(form, backend, dtype)
    for param, weight in zip(resumed, weights, strict=True):
        param.data.copy_(weight)
    second.load_state_dict(state_dict)
    run(resumed, second, range(4, 9))
    for one, two in zip(whole, resumed, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_channel_that_is_not_finite_is_left_out_and_no_other(form, backend, bad):
    params, optimizer = start(form, backend, torch.float32, weight_decay=0.0)
    run(params, optimizer, range(2))
    before = [param.data.clone() for param in params]
    gradients(params, 2)
    for param in params:
        left = optimizer.state[param]["side"] == 0
        param.grad[:, 5].fill_(0.0) if left else param.grad[5].fill_(0.0)
        param.grad[3, 5] = bad
        if not left:
            param.grad[5, 3] = bad
            param.grad[3, 5] = 1.0
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        moved = (param.data != old).any(0 if optimizer.state[param]["side"] == 0 else 1)
        assert param.data.isfinite().all()
        assert not moved[5]
        assert moved.sum() == len(moved) - 1
    run(params, optimizer, [3])
    assert all(param.data.isfinite().all() for param in params)


@pytest.mark.parametrize("form", EVERY)
def test_zero_gradients_move_nothing_before_there_is_momentum(form):
    params, optimizer = start(form, dtype=torch.float32, weight_decay=0.0)
    before = [param.data.clone() for param in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    for param, old in zip(params, before, strict=True):
        assert torch.equal(param.data, old)
    run(params, optimizer, range(3))
    assert all(param.data.isfinite().all() for param in params)


AMPLIFIED = [name for name in EVERY if not name.startswith("scale")]


@pytest.mark.parametrize("basis", ["weight", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", AMPLIFIED)
def test_of_a_gradient_in_the_span_rounding_is_no_step(form, backend, basis):
    """All of it in the first matrix, whose gradient has a rank of 2, and in the second, which the
    basis spans; of the third half of the channels, and the others are stepped.
    """
    shapes = [(16, 24), (RANK, 9), (16, 20)]
    options = {"shapes": shapes, "weight_decay": 0.0, "basis": basis, "residual_scale": 0.3}
    params, optimizer = start(form, backend, torch.float32, **options)
    # Without Adam's step, which divides what rounding leaves of R.
    optimizer.param_groups[0]["scale"] = 1e-30
    generator = torch.Generator().manual_seed(0)
    device = params[0].device
    two = torch.randn(16, 2, generator=generator)
    low = (two @ torch.randn(2, 24, generator=generator)).to(device)
    for seed in range(5):
        before = [param.data.clone() for param in params]
        gradients(params, seed)
        params[0].grad = low.clone()
        part = (two @ torch.randn(2, 10, generator=generator)).to(device)
        params[2].grad = torch.cat([1e3 * part, 1e-3 * params[2].grad[:, 10:]], dim=1)
        optimizer.step()
    first, second, third = (
        (param.data != old).cpu() for param, old in zip(params, before, strict=True)
    )
    assert not first.any()
    assert not second.any()
    assert not third[:, :10].any()
    assert third[:, 10:].float().mean() > 0.8


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", AMPLIFIED)
def test_bases_in_a_byte_that_span_everything_leave_no_step(form, backend):
    """Whatever their codes round: of many directions up to a 64th of a gradient, nearly."""
    options = {"shapes": [(64, 64)], "weight_decay": 0.0, "residual_scale": 0.3}
    params, optimizer = start(form, backend, torch.float32, basis="int8", **options)
    optimizer.param_groups[0].update(rank=64, scale=1e-30)
    before = params[0].data.clone()
    run(params, optimizer, range(3 if backend == "triton" else 7))
    assert torch.equal(params[0].data, before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["sign, averaged", "orthogonal, averaged"])
def test_without_gradients_the_steps_of_a_mean_fade(form, backend):
    """As slowly as the mean; where it is of usual size, zero gradients take whole steps."""
    options = {"shapes": [(8, 12)], "weight_decay": 0.0, "residual_scale": 0.3}
    params, optimizer = start(form, backend, torch.float32, **options)
    optimizer.param_groups[0]["scale"] = 1e-30
    run(params, optimizer, range(2))
    moved = []
    mean = optimizer.state[params[0]]["residual_avg_scale"]
    for strength in (1.0, 1e-9, 1e-12):
        mean.fill_(strength)
        params[0].data.zero_()
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
        moved.append(float(params[0].data.norm()))
    assert moved[0] > 0
    assert 0.0 < moved[1] < 0.6 * moved[0]
    assert moved[2] == pytest.approx(1e-3 * moved[1], rel=0.02)


@pytest.mark.parametrize("form", ["sign, averaged", "orthogonal, averaged"])
def test_a_mean_takes_no_step_in_the_span(form):
    """Nor what its codes have rounded into it."""
    params, optimizer = start(form, "reference", shapes=[(32, 48)], weight_decay=0.0)
    for seed in range(6):
        before = params[0].data.clone()
        run(params, optimizer, [seed])
    state = optimizer.state[params[0]]
    # Nothing of it is left in the span before the transformation; orthogonal keeps it so.
    moved = (before - params[0].data) / LR
    exp_avg, exp_avg_sq = optimizer.moments(params[0])
    corrected = exp_avg / (1 - 0.9**6), exp_avg_sq / (1 - 0.999**6)
    direction = corrected[0] / (corrected[1].sqrt() + 1e-6)
    outside = moved - ALPHA * state["basis"] @ direction
    spanned = state["basis"].T @ outside
    if form.startswith("orthogonal"):
        assert float(spanned.norm() / outside.norm()) < 1e-12
    else:
        assert float(outside.abs().amax()) == pytest.approx(ALPHA, rel=1e-9)


@pytest.mark.parametrize("in_bfloat16", [True], indirect=True)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["orthogonal", "orthogonal, averaged"])
def test_orthogonalized_in_bfloat16_there_is_no_step_in_the_span_either(form, backend, in_bfloat16):
    """Beside Adam's: the iterations make some tenth of a step of what is rounded into it."""
    options = {"shapes": [(24, 32)], "weight_decay": 0.0}
    params, optimizer = start(form, backend, torch.float32, **options)
    twins, inside = start("none", backend, torch.float32, corrected=True, **options)
    for seed in range(5):
        before = params[0].data.clone()
        for ours, stepped in ((params, optimizer), (twins, inside)):
            ours[0].data.copy_(before)
            run(ours, stepped, [seed])
        outside = (twins[0].data - params[0].data) / LR
        spanned = optimizer.state[params[0]]["basis"].T @ outside
        # Entries of a rounding at random, 2^-9 / sqrt(3) of their size at the most.
        assert float(spanned.norm() / outside.norm()) < 2**-9
        assert 0.8 < float(outside.norm()) / (0.4 * 32**0.5 * (24 - RANK) ** 0.5) < 1.1


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
@pytest.mark.parametrize(
    ("dtype", "basis"), [(torch.bfloat16, "weight"), (torch.float32, "int8")], ids=str
)
def test_of_rounded_bases_no_step_is_in_the_span(dtype, basis, backend, momentum):
    """Where hardly anything is outside: E keeps of R what a basis, or R, was rounded by."""
    generator = torch.Generator().manual_seed(0)
    weight = nn.Parameter(torch.zeros(64, 256, dtype=dtype))
    group = {"params": [weight], "rank": 8, "scale": 1e-30, "update_proj_gap": 1000}
    own = {"residual": "orthogonal", "residual_momentum": momentum, "residual_scale": 1.0}
    optimizer = LowRankAdamW([group], lr=1.0, basis=basis, backend=backend, **own)
    directions = torch.linalg.qr(torch.randn(64, 8, generator=generator))[0]
    for _ in range(4):
        inside = directions @ torch.randn(8, 256, generator=generator)
        outside = torch.randn(64, 256, generator=generator)
        outside *= 0.1 * inside.norm() / outside.norm()
        weight.data.zero_()
        weight.grad = (inside + outside).to(dtype)
        optimizer.step()
    span = torch.linalg.qr(loaded_basis(optimizer.state[weight]).double())[0]
    spanned = span.T @ weight.data.double()
    assert float(spanned.norm() / weight.data.double().norm()) < 0.01


@pytest.mark.parametrize("backend", BACKENDS)
def test_channels_of_next_to_nothing_are_finite(backend):
    """Of which the square is, and not a channel's length divided by it."""
    params, optimizer = start("normalize", backend, torch.float32, weight_decay=0.0)
    for seed in range(4):
        gradients(params, seed)
        for param in params:
            param.grad[:, 3] *= 1e-19
            param.grad[5] *= 1e-20
        optimizer.step()
    assert all(param.data.isfinite().all() for param in params)


@pytest.mark.parametrize("channels", [50, 5000])
def test_the_limiter_holds_back_matrices_of_any_width(channels):
    params, optimizer = start(
        "scale of a matrix", "reference", torch.float32, shapes=[(4, channels)], weight_decay=0.0
    )
    optimizer.param_groups[0]["rank"] = 1
    norms = []
    for seed in range(4):
        gradients(params, seed)
        params[0].grad *= 1.0 if seed < 3 else 1e-4
        if seed == 3:
            # phi divides what momentum has left by a projection of almost nothing.
            params[0].grad[0] = 1.0
        optimizer.step()
        norms.append(float(optimizer.state[params[0]]["limiter_norm"]))
    assert norms[0] > 0
    for before, after in itertools.pairwise(norms):
        assert after <= 1.01 * before * (1 + 1e-5)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (7, 3)])
@pytest.mark.parametrize("form", EVERY)
def test_odd_shapes(form, shape):
    params, optimizer = start(form, dtype=torch.float32, shapes=[shape, shape])
    run(params, optimizer, range(5))
    assert all(param.data.isfinite().all() for param in params)


@pytest.mark.parametrize("form", EVERY)
def test_gradients_and_weights_of_any_layout(form):
    """Transposed, with gaps, negated: as dense ones."""
    plain, first = start(form, "foreach", torch.float32)
    odd, second = start(form, "foreach", torch.float32)
    odd[0].data = odd[0].data.T.contiguous().T
    for seed in range(4):
        gradients(plain, seed)
        for one, two in zip(plain, odd, strict=True):
            two.grad = one.grad.clone()
        odd[1].grad = torch.stack([plain[1].grad, plain[0].grad.T], -1)[..., 0]
        odd[2].grad = torch._neg_view(-plain[2].grad)
        first.step()
        second.step()
    for one, two in zip(plain, odd, strict=True):
        torch.testing.assert_close(one, two, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("form", EVERY)
@pytest.mark.parametrize(
    "options",
    [
        {"state": "int8"},
        {"state": "int8", "basis": "int8"},
        {"master": 24},
        {"rounding": "stochastic"},
    ],
    ids=str,
)
def test_half_precision_in_every_format(form, options):
    """Against float32 weights with the same formats of moments and bases, stepped as they are."""
    options = {"lr": 0.3, **options}
    params, optimizer = start(form, dtype=torch.bfloat16, weight_decay=0.0, **options)
    shared = {key: value for key, value in options.items() if key in ("lr", "state", "basis")}
    twins, exact = start(form, dtype=torch.float32, weight_decay=0.0, **shared)
    for twin, param in zip(twins, params, strict=True):
        twin.data.copy_(param.data)
    begin = [twin.data.clone() for twin in twins]
    for seed in range(4):
        gradients(params, seed)
        for twin, param in zip(twins, params, strict=True):
            twin.grad = param.grad.float()
        optimizer.step()
        exact.step()
    for twin, param, old in zip(twins, params, begin, strict=True):
        moved = float((twin.data - old).norm())
        assert float((param.data.float() - twin.data).norm()) < 0.5 * moved


@pytest.mark.parametrize("form", EVERY)
def test_released_gradients_take_the_same_steps(form):
    """In the backward pass, each by itself."""
    outcomes = []
    for releases in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20, bias=False), nn.Tanh(), nn.Linear(20, 12))
        matrices = [p for p in model.parameters() if p.dim() == 2]
        rest = [p for p in model.parameters() if p.dim() != 2]
        groups = [{"params": matrices, "rank": RANK, "update_proj_gap": 3}, {"params": rest}]
        optimizer = LowRankAdamW(groups, lr=LR, **EVERY[form])
        if releases:
            release_gradients(model, optimizer)
        for seed in range(7):
            x = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        outcomes.append([param.detach().clone() for param in model.parameters()])
    for one, two in zip(*outcomes, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", EVERY)
def test_plan_is_what_states_take(name):
    params, optimizer = start(name, dtype=torch.bfloat16, state="int8")
    planned = [row["state_bytes"] for row in optimizer.plan()]
    run(params, optimizer, [0])
    found = [
        sum(v.nbytes for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
        for p in params
    ]
    assert planned == found


def test_signs_fade_by_channels():
    """Of a mean with a row of usual size, one of next to nothing and one of nothing."""
    options = {"shapes": [(3, 8)], "weight_decay": 0.0, "residual_scale": 0.3}
    params, optimizer = start("sign, averaged", "reference", **options)
    optimizer.param_groups[0].update(rank=1, proj_type="right", scale=1e-30)
    run(params, optimizer, [0])
    state = optimizer.state[params[0]]
    state["basis"].zero_()[0] = 1.0
    mean = torch.zeros(3, 8)
    # The norm of four is twice that of one.
    mean[:2, 1:5] = torch.tensor([[1.0], [0.25e-9 / 0.9]])
    encode(state["residual_avg"], state["residual_avg_scale"], mean, ROW_GROUPS, None)
    before = params[0].data.clone()
    params[0].grad = torch.zeros_like(params[0])
    optimizer.step()
    moved = (before - params[0].data)[:, 1:5] / LR
    expected = torch.tensor([[0.3], [0.3 * 0.5e-2], [0.0]]).double().expand(3, 4)
    torch.testing.assert_close(moved, expected, rtol=1e-5, atol=1e-12)


def test_forms_can_be_changed_between_steps():
    params, optimizer = start("orthogonal, averaged", dtype=torch.float32)
    run(params, optimizer, range(2))
    orders = itertools.permutations(EVERY, 2)
    for seed, (_, form) in enumerate(orders):
        changed = {"per": "channel", "residual_momentum": 0.0, "residual_scale": None}
        vars(optimizer).update(changed | EVERY[form])
        run(params, optimizer, [seed])
        state = optimizer.state[params[0]]
        assert ("residual_avg" in state) == ("residual_momentum" in EVERY[form])
        assert all(param.data.isfinite().all() for param in params)


def test_float64_gradients_beyond_float32_leave_a_finite_mean():
    params, optimizer = start("sign, averaged")
    for seed in range(3):
        gradients(params, seed)
        for param in params:
            param.grad *= 1e60 if seed == 1 else 1.0
        before = [param.data.clone() for param in params]
        optimizer.step()
        for param, old in zip(params, before, strict=True):
            assert (param.data != old).all()
            assert param.data.isfinite().all()
    assert all(optimizer.state[param]["residual_avg_scale"].isfinite().all() for param in params)


@pytest.mark.parametrize(
    ("entry", "change", "text"),
    [
        ("residual_avg", lambda value: value[1:], "residual_avg"),
        ("residual_avg", lambda value: value.float(), "residual_avg as torch.float32"),
        ("residual_avg_scale", lambda value: value[:0], "residual_avg_scale"),
        ("residual_avg_scale", lambda value: value - 1e9, "residual_avg_scale below 0"),
        ("residual_avg_scale", lambda value: None, "residual_avg_scale"),
    ],
)
def test_a_mean_that_is_none_is_not_loaded(entry, change, text):
    params, optimizer = start("sign, averaged", dtype=torch.float32)
    run(params, optimizer, range(2))
    state_dict = copy.deepcopy(optimizer.state_dict())
    state = state_dict["state"][0]
    state[entry] = change(state[entry])
    if state[entry] is None:
        del state[entry]
    with pytest.raises(ValueError, match=text):
        optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize(
    ("saved", "here", "kept"),
    [
        ({"residual": "scale"}, {"residual": "scale"}, True),
        ({"residual": "scale"}, {"residual": "official"}, False),
        ({"residual": "scale"}, {"residual": "scale", "per": "matrix"}, False),
        ({"residual": "official"}, {"residual": "paper"}, False),
        ({"residual": "official"}, {"residual": "official", "corrected": True}, False),
    ],
)
def test_the_limiter_compares_norms_of_one_form(saved, here, kept):
    params = [nn.Parameter(torch.ones(6, 8)) for _ in range(2)]
    group = {"params": params, "rank": 2}
    first, second = LowRankAdamW([dict(group)], **saved), LowRankAdamW([dict(group)], **here)
    run(params, first, range(2))
    second.load_state_dict(first.state_dict())
    assert ("limiter_norm" in second.state[params[0]]) is kept
    run(params, second, [2])
    assert float(second.state[params[0]]["limiter_norm"]) != 0


def test_another_method_is_told_by_the_names_of_its_parts(caplog):
    params, averaged = start("sign, averaged", dtype=torch.float32)
    run(params, averaged, [0])
    _, fira = start("none", dtype=torch.float32, residual="paper")
    fira.load_state_dict(averaged.state_dict())
    told = caplog.messages[-1].partition("optimizer's: ")[2]
    assert told == (
        "residual=sign (here residual=paper), residual_momentum=0.9 (here no residual_momentum)"
    )


def test_another_methods_momentum_is_not_loaded():
    params, averaged = start("sign, averaged", dtype=torch.float32)
    run(params, averaged, range(2))
    others, galore = start("sign", dtype=torch.float32)
    galore.load_state_dict(averaged.state_dict())
    assert "residual_avg" not in galore.state[others[0]]
    run(others, galore, [2])


MINI = {"residual": "scale", "per": "matrix", "subspace": "gaussian"}


@pytest.mark.parametrize(
    ("saved", "loading", "text"),
    [
        (MINI, {"residual": "orthogonal"}, "weight in the state dict is Gaussian, and"),
        (MINI, {"residual": "paper"}, "made with subspace='gaussian'"),
        ({}, MINI, "weight in the state dict is orthonormal, and"),
        ({"residual": "sign"}, MINI, "made with subspace='randomized'"),
        ({"basis": "int4"}, {"residual": "orthogonal"}, "weight in the state dict is in int4"),
        ({"basis": "int4"}, {"residual": "normalize", "basis": "int8"}, "residual='normalize'"),
    ],
)
def test_a_basis_that_a_method_cannot_go_on_with_is_not_loaded(saved, loading, text):
    weight = nn.Parameter(torch.randn(8, 12))
    first, second = (
        LowRankAdamW([{"params": [("weight", weight)], "rank": 2}], **options)
        for options in (saved, loading)
    )
    second.load_state_dict(first.state_dict())  # there are no bases yet
    for optimizer in (first, second):
        run([weight], optimizer, [0])
    before = copy.deepcopy(second.state[weight])
    with pytest.raises(ValueError, match=text):
        second.load_state_dict(first.state_dict())
    torch.testing.assert_close(second.state[weight], before, rtol=0, atol=0)


def test_a_checkpoint_tells_what_was_written_to_an_optimizer():
    weight = nn.Parameter(torch.randn(8, 12))
    optimizer = LowRankAdamW([{"params": [weight], "rank": 2}], residual="sign")
    run([weight], optimizer, [0])
    optimizer.residual_scale, optimizer.residual_momentum = 0.05, 0.5
    run([weight], optimizer, [1])
    (group,) = optimizer.state_dict()["param_groups"]
    told = "residual=sign, residual_scale=0.05, residual_momentum=0.5, corrected=True"
    assert group["method"].startswith(told)


def test_linear_layers_do_not_hand_r_over():
    model = nn.Sequential(nn.Linear(12, 20))
    optimizer = LowRankAdamW(
        [{"params": [model[0].weight], "rank": 4}, {"params": [model[0].bias]}],
        residual="orthogonal",
    )
    with pytest.raises(ValueError, match="residual='orthogonal' needs what lies outside"):
        project_linears(model, optimizer)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"residual": "orthogonl"}, ValueError, "residual must be one of official, paper"),
        ({"residual": "scale", "per": "row"}, ValueError, "per must be one of channel, matrix"),
        ({"residual": "paper", "per": "matrix"}, ValueError, "per='matrix' goes with"),
        ({"residual": "sign", "residual_scale": -1.0}, ValueError, "residual_scale must be at"),
        ({"residual": "sign", "residual_scale": math.inf}, ValueError, "residual_scale must be at"),
        ({"residual": "sign", "residual_scale": "1"}, TypeError, "residual_scale must be a number"),
        ({"residual": "scale", "residual_scale": 1.0}, ValueError, "residual_scale goes with"),
        ({"residual_scale": 1.0}, ValueError, "residual_scale goes with"),
        ({"residual": "sign", "residual_momentum": 0.99}, ValueError, "must be in"),
        ({"residual": "sign", "residual_momentum": True}, TypeError, "must be a number, got True"),
        ({"residual": "paper", "residual_momentum": 0.9}, ValueError, "residual_momentum goes"),
        (
            {"residual": "normalize", "basis": "int4"},
            ValueError,
            "nearly orthonormal, which 4 bits",
        ),
        (
            {"residual": "orthogonal", "basis": "int4"},
            ValueError,
            "nearly orthonormal, which 4 bits",
        ),
        (
            {"residual": "orthogonal", "subspace": Subspace("gaussian")},
            ValueError,
            "needs an orthonormal basis",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options, error, text):
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(error, match=text):
        LowRankAdamW([{"params": [weight], "rank": 2}], **options)


@pytest.mark.parametrize("per", ["channel", "matrix"])
def test_apollo_by_its_equations(per):
    """With Gaussian projections, which are not orthonormal, and Mini's rank of 1."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(8, 12, dtype=torch.float64))
    rank, alpha = (2, 1.0) if per == "channel" else (1, 128**0.5)
    group = {"params": [weight], "rank": rank, "scale": alpha, "update_proj_gap": 3}
    optimizer = ApolloAdamW([group], lr=LR, weight_decay=DECAY, per=per, backend="foreach")
    for count in range(1, 8):
        old, before = copy.deepcopy(optimizer.state[weight]), weight.data.clone()
        run([weight], optimizer, [count])
        state = optimizer.state[weight]
        shape = state["exp_avg"].shape
        moments = [wide(old.get(key), shape) for key in ("exp_avg", "exp_avg_sq")]
        form = "scale", 0.0, per == "matrix"
        scalars = LR, 0.9, 0.999, 1e-6, DECAY, alpha, count
        given = before, weight.grad, state["basis"], state["side"] == 0, moments, scalars
        expected, _ = oracle.step(form, *given, float(old.get("limiter_norm", 0.0)))
        error = (weight.data - expected).norm() / (expected - before).norm()
        assert float(error) < 1e-12
    assert state["basis"].shape[1] == rank


def test_orthofira_is_the_orthogonal_residual():
    """With its options, and so the other's checkpoints."""
    twins = []
    for make, own in (
        (LowRankAdamW, {"residual": "orthogonal"}),
        (OrthoFiraAdamW, {}),
    ):
        params = start("none")[0]
        group = {"params": params, "rank": RANK, "update_proj_gap": 3}
        optimizer = make([group], lr=LR, residual_scale=0.2, residual_momentum=0.9, **own)
        run(params, optimizer, range(4))
        twins.append((params, optimizer))
    (params, one), (others, other) = twins
    assert all(map(torch.equal, params, others))
    assert other.method == one.method
    assert OrthoFiraAdamW([others[0]]).residual_scale is None


def test_fira_refuses_forms_that_are_not_its_own():
    weight = nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="residual must be one of official, paper, got 'sign'"):
        FiraAdamW([{"params": [weight], "rank": 2}], residual="sign")


def test_what_a_checkpoint_is_of_tells_the_options():
    _, optimizer = start("orthogonal, averaged")
    assert "residual=orthogonal, residual_momentum=0.9" in optimizer.method.described()
    plain = GaLoreAdamW([{"params": [nn.Parameter(torch.zeros(4, 4))], "rank": 2}])
    assert plain.method.described().startswith("residual=None, corrected=")
