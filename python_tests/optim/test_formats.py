"""State in fewer bits: what it takes, that it resumes and converts, and what is refused."""

import copy
import io
import logging

import pytest
import torch
from integration.tiny_runs import assert_same_bits
from torch import nn
from torch.utils._pytree import tree_map

from lowrank_kernels import (
    AdaRankGradAdamW,
    FiraAdamW,
    GaLoreAdamW,
    GaLoreAdamW8bit,
    Subspace,
)
from lowrank_kernels.ops import Matrices, Residual, Side, prepare
from lowrank_kernels.ops.codes import (
    Stored,
    channel_groups,
    channel_noise,
    loaded,
    new_stored,
    store,
)
from lowrank_kernels.ops.contract import AdamScalars
from lowrank_kernels.ops.weights24 import joined
from lowrank_kernels.optim.workspace import planned_workspace

GAP, STOP, STEPS = 4, 7, 15
METHODS = {
    "galore": GaLoreAdamW,
    "fira": FiraAdamW,
    "adarankgrad": AdaRankGradAdamW,
    "carry": lambda groups, **kw: GaLoreAdamW(groups, subspace=Subspace(moments="carry"), **kw),
}
every_method = pytest.mark.parametrize("method", METHODS)
every_state = pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
every_basis = pytest.mark.parametrize("basis", ["weight", "int8", "int4"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def setup(method, dtype=torch.float32, seed=0, **formats):
    """Right and left sides, an odd basis, an embedding large enough for codes, vectors."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        nn.Embedding(300, 24), nn.Linear(24, 70), nn.LayerNorm(70), nn.Linear(70, 33)
    ).to(dtype)
    matrices = [(f"{place}.weight", module[place].weight) for place in (1, 3)]
    projected = {"params": matrices, "rank": 8, "update_proj_gap": GAP}
    own = {id(weight) for _, weight in matrices}
    others = [pair for pair in module.named_parameters() if id(pair[1]) not in own]
    groups = [projected, {"params": others}]
    return module, METHODS[method](groups, lr=0.01, weight_decay=0.1, **formats)


def train(module, optimizer, seeds):
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        for param in module.parameters():
            param.grad = torch.randn(param.shape, generator=rng).to(param.dtype)
        optimizer.step()


def saved_and_loaded(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


@every_method
@every_state
@every_basis
@every_dtype
def test_a_run_resumes_bit_for_bit(method, state, basis, dtype):
    module, optimizer = setup(method, dtype, state=state, basis=basis)
    train(module, optimizer, range(STOP))
    saved = saved_and_loaded({"model": module.state_dict(), "optimizer": optimizer.state_dict()})
    twin, resumed = setup(method, dtype, seed=1, state=state, basis=basis)
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for each in ((module, optimizer), (twin, resumed)):
        train(*each, range(STOP, STEPS))
    assert_same_bits((module, optimizer), (twin, resumed))


@every_state
@every_basis
@every_dtype
def test_the_plan_is_what_is_held(state, basis, dtype):
    module, optimizer = setup("fira", dtype, state=state, basis=basis)
    train(module, optimizer, range(2))
    held = {row["name"]: row["state_bytes"] for row in optimizer.explain()}
    assert held == {row["name"]: row["state_bytes"] for row in optimizer.plan()}


def test_what_codes_take():
    """A byte for each of M and V, a scale for 64 channels of a direction or for 256 elements."""
    _, optimizer = setup("galore", torch.bfloat16, state="int8", basis="int8")
    rows = {row["name"]: row for row in optimizer.plan()}
    step, scale = 4, 4
    assert rows["0.weight"]["state_bytes"] == 2 * (300 * 24 + scale * 29) + step
    # 70 x 24 at rank 8: R is 70 x 8, two groups of channels; P is 24 x 8.
    right = 2 * (70 * 8 + scale * 2 * 8) + 24 * 8 + scale * 8 + step
    assert rows["1.weight"]["state_bytes"] == right
    # 33 x 70: R is 8 x 70, P is 33 x 8.
    assert (
        rows["3.weight"]["state_bytes"] == 2 * (8 * 70 + scale * 8 * 2) + 33 * 8 + scale * 8 + step
    )
    low = [name for name, row in rows.items() if row["state"] == "int8"]
    assert low == ["1.weight", "3.weight", "0.weight"]
    # Of an odd number of rows a basis stays in bytes.
    (int4,) = (r for r in setup("galore", basis="int4")[1].plan() if r["name"] == "3.weight")
    (int8,) = (r for r in setup("galore", basis="int8")[1].plan() if r["name"] == "3.weight")
    assert int4["state_bytes"] == int8["state_bytes"]


@pytest.mark.parametrize("target", ["float32", "bfloat16", "int8"])
@every_state
def test_a_file_of_another_format_is_converted_and_says_so(state, target, caplog):
    module, optimizer = setup("fira", state=state)
    train(module, optimizer, range(STOP))
    wide = [tuple(m.clone() for m in optimizer.moments(p)) for p in module.parameters()]
    twin, other = setup("fira", state=target, basis="int8")
    twin.load_state_dict(module.state_dict())
    with caplog.at_level(logging.WARNING, "lowrank_kernels"):
        other.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    assert ("holds moments in" in caplog.text) == (state != target)
    assert "holds bases in torch.float32" in caplog.text
    for param, moments in zip(twin.parameters(), wide, strict=True):
        for own, before in zip(other.moments(param), moments, strict=True):
            assert float((own - before).norm()) <= 0.02 * float(before.norm())
    held = {row["name"]: row["state_bytes"] for row in other.explain()}
    assert held == {row["name"]: row["state_bytes"] for row in other.plan()}
    train(twin, other, range(STOP, STEPS))


def test_formats_may_change_between_steps():
    module, optimizer = setup("fira")
    train(module, optimizer, range(2))
    exp_avg, _ = optimizer.moments(module[1].weight)
    before = exp_avg.clone()
    optimizer.state_format, optimizer.basis_format = "int8", "int8"
    for param in module.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    state = optimizer.state[module[1].weight]
    assert (state["exp_avg"].dtype, state["basis"].dtype) == (torch.int8, torch.int8)
    change = optimizer.moments(module[1].weight)[0] - 0.9 * before
    assert float(change.norm()) < 0.02 * float(before.norm())


@every_state
def test_batches_change_no_bit(state):
    """Equal matrices together, whose bases are decoded in turn, and each alone."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(40, 24)) for _ in range(4)]
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    options = {"rank": 8, "update_proj_gap": GAP}
    formats = {"state": state, "basis": "int8", "lr": 0.1}
    names = [f"layer{index}" for index in range(4)]
    together = FiraAdamW([{"params": list(zip(names, params, strict=True)), **options}], **formats)
    alone = [
        FiraAdamW([{"params": [(name, twin)], **options}], **formats)
        for name, twin in zip(names, twins, strict=True)
    ]
    for seed in range(6):
        rng = torch.Generator().manual_seed(seed)
        for param, twin in zip(params, twins, strict=True):
            param.grad = torch.randn(param.shape, generator=rng)
            twin.grad = param.grad.clone()
        for optimizer in (together, *alone):
            optimizer.step()
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)


@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
@pytest.mark.parametrize("side", Side)
@pytest.mark.parametrize("state", [torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (130, 67), (0, 5)], ids=str)
def test_an_operation_is_that_of_wide_moments(backend, side, state, shape):
    """N of the decoded moments before they are rounded; then M and V as `codes` stores them."""
    rng = torch.Generator().manual_seed(3)
    rank, groups = min(4, *shape), channel_groups(side)
    grad = torch.randn(shape, generator=rng)
    length = shape[0] if side is Side.LEFT else shape[1]
    basis = torch.linalg.qr(torch.randn(length, rank, generator=rng))[0] if rank else grad[:0, :0]
    low = (rank, shape[1]) if side is Side.LEFT else (shape[0], rank)
    basis = basis.reshape(length, rank)
    exp_avg, exp_avg_sq = torch.randn(low, generator=rng), torch.rand(low, generator=rng)
    if grad.numel():
        grad[0, 0] = float("nan")
    held = new_stored(low, state, torch.device("cpu"), groups)
    store(held, exp_avg, exp_avg_sq, groups)
    adam, salt, step = AdamScalars(0.9, 0.999, 1e-6), 17, 5

    def batch(stored, salts):
        scales = [[x] if x is not None else [] for x in stored[2:]]
        norm = [torch.zeros(())]
        tensors = ([grad.clone()], [grad], [basis], [stored.exp_avg], [stored.exp_avg_sq], norm)
        return Matrices(side, Residual(0.25, 1.0), *tensors, None, *scales, salts)

    wide = Stored(*loaded(held, groups))
    narrow = batch(held, (salt,))
    found = prepare(narrow, backend=backend).project_moments(narrow, adam, step)
    exact = prepare(batch(wide, None), backend=backend).project_moments(batch(wide, None), adam)
    assert torch.equal(found.direction, exact.direction)
    assert torch.equal(found.projected, exact.projected)
    for own, other in zip(found.sums, exact.sums, strict=True):
        assert torch.equal(own.nan_to_num(), other.nan_to_num())
    expected = new_stored(low, state, torch.device("cpu"), groups)
    store(expected, *wide[:2], groups, channel_noise(wide.exp_avg_sq, side, salt, step))
    for own, other in zip(held, expected, strict=True):
        assert (own is None and other is None) or torch.equal(own, other)


@pytest.mark.parametrize("state", ["bfloat16", "int8"])
@every_dtype
def test_an_embedding_follows_adamw(state, dtype):
    """M and V one rounding away from AdamW's of the same gradients, weights within their error."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(100, 77).to(dtype))
    twin = nn.Parameter(weight.detach().float())
    ours = GaLoreAdamW([weight], lr=0.01, weight_decay=0.1, eps=1e-8, state=state)
    theirs = torch.optim.AdamW([twin], lr=0.01, weight_decay=0.1)
    for seed in range(20):
        rng = torch.Generator().manual_seed(seed)
        weight.grad = torch.randn(weight.shape, generator=rng).to(dtype)
        twin.grad = weight.grad.float()
        ours.step()
        theirs.step()
    exp_avg, exp_avg_sq = ours.moments(weight)
    for own, key, error in ((exp_avg, "exp_avg", 0.03), (exp_avg_sq, "exp_avg_sq", 0.05)):
        expected = theirs.state[twin][key]
        assert float((own - expected).norm()) < error * float(expected.norm())
    # A bfloat16 weight is rounded at every step.
    error = 0.01 if dtype is torch.float32 else 0.02
    assert float((weight.float() - twin).norm()) < error * float(twin.norm())


def test_an_element_that_cannot_be_squared_is_left_out():
    weight = nn.Parameter(torch.ones(64, 80))
    optimizer = GaLoreAdamW([weight], lr=0.01, state="int8")
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    for place, value in enumerate((float("nan"), float("inf"), 1e30)):
        weight.grad[place, 0] = value
    optimizer.step()
    assert torch.equal(weight[:3, 0], before[:3, 0])
    assert bool((weight[:, 1:] < before[:, 1:]).all())
    assert all(x.isfinite().all() for x in optimizer.moments(weight))


@pytest.mark.parametrize("layout", ["transposed", "sliced", "channels last"])
def test_weights_of_any_layout_take_codes(layout):
    shapes = {"transposed": (70, 80), "sliced": (70, 80), "channels last": (8, 6, 10, 12)}
    torch.manual_seed(0)
    value = torch.randn(shapes[layout])
    if layout == "transposed":
        laid = value.T.contiguous().T
    elif layout == "sliced":
        laid = torch.zeros(140, 160)[::2, ::2].copy_(value)
    else:
        laid = value.contiguous(memory_format=torch.channels_last)
    weights = [nn.Parameter(value.clone()), nn.Parameter(laid)]
    optimizers = [GaLoreAdamW([("w", weight)], lr=0.01, state="int8") for weight in weights]
    for seed in range(4):
        grad = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed))
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = torch.empty_like(weight).copy_(grad)
            optimizer.step()
    assert torch.equal(weights[0], weights[1])
    assert weights[1].stride() == laid.stride()


def test_wide_weights_and_unknown_formats_are_refused():
    weight = nn.Parameter(torch.randn(64, 80, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"weight.*float64.*state='int8'"):
        GaLoreAdamW([("weight", weight)], state="int8")
    single = nn.Parameter(torch.randn(8, 8))
    with pytest.raises(ValueError, match="state must be one of float32, bfloat16, int8"):
        GaLoreAdamW([single], state="fp8")
    with pytest.raises(ValueError, match="basis must be one of weight, int8, int4"):
        GaLoreAdamW([single], basis="int2")
    optimizer = GaLoreAdamW([single], state="int8")
    with pytest.raises(KeyError, match="no step"):
        optimizer.moments(single)


@pytest.mark.parametrize("rank", [None, 4])
def test_what_is_frozen_needs_no_format(rank):
    """Until it is trained."""
    weight = nn.Parameter(torch.randn(64, 80, dtype=torch.float64), requires_grad=False)
    trained = nn.Parameter(torch.randn(64, 80))
    group = {"params": [("weight", weight), ("trained", trained)]} | (
        {"rank": rank} if rank else {}
    )
    optimizer = GaLoreAdamW([group], state="int8")
    trained.grad = torch.randn(64, 80)
    optimizer.step()
    assert optimizer.plan()[0]["state_bytes"] == optimizer.explain()[0]["state_bytes"] == 0
    weight.requires_grad_(True)
    weight.grad = torch.randn(64, 80, dtype=torch.float64)
    before = trained.detach().clone()
    with pytest.raises(TypeError, match=r"weight.*float64.*state='int8'"):
        optimizer.step()
    assert torch.equal(trained, before)


class Named(nn.Parameter):
    """A parameter that a library tells apart, and that is one."""


class Wrapped(torch.Tensor):
    """Another tensor in its place, as quantized and sharded weights are."""

    @staticmethod
    def __new__(cls, inner):
        own = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        own.inner = inner
        return own

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __torch_dispatch__(cls, operator, types, args=(), kwargs=None):
        if operator not in cls.KNOWN:
            raise NotImplementedError(f"no {operator}")
        args = tree_map(lambda x: x.inner if isinstance(x, cls) else x, args)
        result = operator(*args, **(kwargs or {}))
        return cls(result) if operator is torch.ops.aten.detach.default else result

    KNOWN = (
        torch.ops.aten.detach.default,
        torch.ops.aten.zeros_like.default,
        torch.ops.aten._to_copy.default,
        torch.ops.aten.clone.default,
        torch.ops.aten.copy_.default,
        torch.ops.aten.mul_.Tensor,
        torch.ops.aten.addcdiv_.default,
    )


every_choice = pytest.mark.parametrize(
    "formats", [{}, {"state": "int8"}, {"state": "bfloat16", "master": 24}], ids=str
)


@every_choice
@every_dtype
def test_subclasses_of_parameters_are_parameters(formats, dtype):
    start = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    weights = [Named(start.clone()), nn.Parameter(start.clone())]
    optimizers = [GaLoreAdamW([("w", weight)], lr=0.01, **formats) for weight in weights]
    (planned,) = optimizers[0].plan()
    for seed in range(3):
        grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(seed)).to(dtype)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    (row,), (other,) = (optimizer.explain() for optimizer in optimizers)
    assert row == other
    assert planned["state_bytes"] == row["state_bytes"]
    assert planned["state"] == row["state"] == formats.get("state", "float32")
    assert torch.equal(*weights)


@every_choice
@every_dtype
def test_weights_without_memory_are_trained_in_wide_copies(formats, dtype):
    """With torch's moments, whatever was asked for, which `explain` says."""
    start = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight, wide = nn.Parameter(Wrapped(start.clone())), nn.Parameter(start.float())
    optimizer = GaLoreAdamW([("w", weight)], lr=0.01, weight_decay=0.1, **formats)
    torchs = torch.optim.AdamW([wide], lr=0.01, weight_decay=0.1, eps=1e-6, foreach=False)
    (planned,) = optimizer.plan()
    for seed in range(3):
        weight.grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(seed)).to(dtype)
        wide.grad = weight.grad.float()
        optimizer.step()
        torchs.step()
        wide.data.copy_(wide.to(dtype))
    (row,) = optimizer.explain()
    assert planned["state_bytes"] == row["state_bytes"] == 2 * 4 * 64 * 80 + 4
    assert planned["state"] == row["state"] == "float32"
    assert ("; a Wrapped keeps its dtype, and moments in float32" in row["reason"]) == bool(formats)
    assert torch.equal(weight.inner.float(), wide)


@pytest.mark.parametrize("state", ["float32", "int8"])
def test_a_projected_weight_without_memory_is_refused_by_name(state):
    """Where kernels would look for it; before anything has changed."""
    first, wrapped = nn.Parameter(torch.randn(40, 24)), nn.Parameter(Wrapped(torch.randn(40, 24)))
    group = {"params": [("first", first), ("second", wrapped)], "rank": 4}
    optimizer = FiraAdamW([group], backend="native", state=state)
    for weight in (first, wrapped):
        weight.grad = torch.randn(40, 24)
    before = first.detach().clone()
    with pytest.raises(ValueError, match=r"second is a Wrapped.*native.*reference"):
        optimizer.step()
    assert torch.equal(first, before)
    assert not optimizer.state[first]
    reasons = {row["name"]: row["reason"] for row in optimizer.explain()}
    assert "second is a Wrapped" in reasons["second"]


@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
@pytest.mark.parametrize(
    "entry", ["exp_avg", "exp_avg_sq", "exp_avg_scale", "exp_avg_sq_scale"], ids=str
)
def test_transposed_codes_are_refused_by_name(entry, backend):
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(140, 130)) for _ in range(2)]
    group = {"params": list(zip(("first", "second"), weights, strict=True)), "rank": 8}
    optimizer = FiraAdamW([group], state="int8", backend=backend)
    for weight in weights:
        weight.grad = torch.randn(140, 130)
    optimizer.step()
    state = optimizer.state[weights[1]]
    state[entry] = state[entry].T.contiguous().T
    before = copy.deepcopy([weights, dict(optimizer.state)])
    optimizer.basis_format = "int8"
    with pytest.raises(ValueError, match=rf"state of second has {entry} with strides \("):
        optimizer.step()
    for weight, old in zip(weights, before[0], strict=True):
        assert torch.equal(weight, old)
    assert optimizer.state[weights[0]]["basis"].dtype is torch.float32
    state[entry] = state[entry].contiguous()
    optimizer.step()


@pytest.mark.parametrize("rank", [None, 8])
@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
def test_v_in_bfloat16_stays_finite(backend, rank):
    """Of the largest squares there are, where it is a thousandth of the way to Inf."""
    weight = nn.Parameter(torch.zeros(130, 130))
    group = {"params": [weight]} | ({"rank": rank} if rank else {})
    optimizer = GaLoreAdamW([group], lr=0.01, state="bfloat16", backend=backend)
    weight.grad = torch.zeros(130, 130)
    # Of its basis, and then the largest that can be squared.
    weight.grad[:, : rank or 1] = torch.eye(130)[:, : rank or 1]
    optimizer.step()
    state = optimizer.state[weight]
    state["exp_avg_sq"].fill_(torch.finfo(torch.bfloat16).max)
    if rank:
        state["basis"].copy_(torch.eye(130, rank))
    weight.grad.fill_(2.0**64 - 2.0**40)
    for _ in range(20):
        optimizer.step()
    assert optimizer.moments(weight)[1].isfinite().all()


def test_codes_without_their_scales_are_refused():
    module, optimizer = setup("fira", state="int8", basis="int8")
    train(module, optimizer, range(2))
    for key in ("exp_avg_scale", "basis_scale"):
        saved = copy.deepcopy(optimizer.state_dict())
        del saved["state"][1][key]
        with pytest.raises(ValueError, match=f"3.weight.*{key}"):
            setup("fira", state="int8")[1].load_state_dict(saved)


def test_the_name_of_galore_torch():
    weight = nn.Parameter(torch.randn(64, 80))
    optimizer = GaLoreAdamW8bit([{"params": [weight], "rank": 4}], lr=0.01)
    weight.grad = torch.randn(64, 80)
    optimizer.step()
    assert optimizer.state[weight]["exp_avg"].dtype is torch.int8
    assert GaLoreAdamW8bit([weight], state="bfloat16").state_format == "bfloat16"


@every_method
@pytest.mark.parametrize("state", ["float32", "int8"])
def test_weights_of_24_bits_resume_bit_for_bit(method, state):
    formats = {"state": state, "basis": "int8", "master": 24}
    module, optimizer = setup(method, torch.bfloat16, **formats)
    train(module, optimizer, range(STOP))
    saved = saved_and_loaded({"model": module.state_dict(), "optimizer": optimizer.state_dict()})
    twin, resumed = setup(method, torch.bfloat16, seed=1, **formats)
    twin.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for each in ((module, optimizer), (twin, resumed)):
        train(*each, range(STOP, STEPS))
    assert_same_bits((module, optimizer), (twin, resumed))
    held = {row["name"]: row["state_bytes"] for row in optimizer.explain()}
    assert held == {row["name"]: row["state_bytes"] for row in optimizer.plan()}


@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
def test_weights_of_24_bits_follow_float32_weights(backend):
    """Steps of 2^-12 of the weights, which bfloat16 alone loses, under equal gradients."""
    torch.manual_seed(0)
    start = torch.randn(70, 24).bfloat16()
    wide, long, short = (
        nn.Parameter(start.to(dtype, copy=True)) for dtype in (torch.float32, *[torch.bfloat16] * 2)
    )
    options = {"rank": 8, "update_proj_gap": GAP, "scale": 1.0}
    optimizers = [
        FiraAdamW(
            [{"params": [("w", weight)], **options}], lr=2.0**-12, backend=backend, master=master
        )
        for weight, master in ((wide, None), (long, 24), (short, None))
    ]
    for seed in range(60):
        grad = torch.randn(70, 24, generator=torch.Generator().manual_seed(seed // 20)).bfloat16()
        for weight, optimizer in zip((wide, long, short), optimizers, strict=True):
            weight.grad = grad.to(weight.dtype)
            optimizer.step()
    moved = float((wide - start.float()).norm())
    held = joined(long, optimizers[1].state[long]["low_bits"])
    assert float((held - wide).norm()) < 0.02 * moved
    assert float((short.float() - wide).norm()) > 0.1 * moved


def test_weights_of_24_bits_are_for_bfloat16():
    module, optimizer = setup("galore", torch.float32, master=24)
    train(module, optimizer, range(2))
    assert not any("low_bits" in state for state in optimizer.state.values())
    with pytest.raises(ValueError, match=r"master=24 .* stochastically"):
        setup("galore", master=24, rounding="stochastic")
    for master in (16, 24.0, True):
        with pytest.raises(ValueError, match=f"master must be 24 or None, got {master}"):
            setup("galore", master=master)


def test_weights_of_24_bits_begin_and_end_between_steps():
    module, optimizer = setup("fira", torch.bfloat16)
    train(module, optimizer, range(2))
    optimizer.master = 24
    train(module, optimizer, range(2, 4))
    assert all(state["low_bits"].any() for state in optimizer.state.values())
    optimizer.master = None
    train(module, optimizer, range(4, 6))
    assert not any("low_bits" in state for state in optimizer.state.values())


def test_float64_weights_take_codes_of_their_bases():
    weight = nn.Parameter(torch.randn(40, 24, dtype=torch.float64))
    optimizer = FiraAdamW([{"params": [weight], "rank": 8}], lr=0.01, basis="int8")
    for seed in range(3):
        rng = torch.Generator().manual_seed(seed)
        weight.grad = torch.randn(40, 24, generator=rng, dtype=torch.float64)
        optimizer.step()
    assert optimizer.state[weight]["limiter_norm"].dtype is torch.float64


@pytest.mark.parametrize(
    "lr", [torch.tensor(1e-2, dtype=torch.float64), torch.tensor([[1e-2]])], ids=str
)
@pytest.mark.parametrize("formats", [{"master": 24}, {"state": "int8"}], ids=str)
def test_any_learning_rate_of_one_element_is_taken(lr, formats):
    weights = [nn.Parameter(torch.randn(70, 70).bfloat16()) for _ in range(2)]
    weights[1].data.copy_(weights[0].data)
    for weight, rate in zip(weights, (lr, 1e-2), strict=True):
        weight.grad = torch.ones_like(weight)
        GaLoreAdamW([("w", weight)], lr=rate, capturable=True, **formats).step()
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("key", "change", "text"),
    [
        ("exp_avg", lambda x: x.to(torch.uint8), "exp_avg as torch.uint8, which are no codes"),
        ("exp_avg_sq", lambda x: x.to(torch.int8), "exp_avg_sq as torch.int8, which are no codes"),
        (
            "exp_avg_sq",
            lambda x: x.float(),
            "exp_avg as torch.int8 and exp_avg_sq as torch.float32",
        ),
        ("exp_avg_scale", lambda x: -x, "exp_avg_scale below 0, or not finite"),
        ("basis_scale", lambda x: x * float("nan"), "basis_scale below 0, or not finite"),
    ],
)
def test_what_are_no_codes_is_refused_by_name(key, change, text):
    module, optimizer = setup("fira", state="int8", basis="int8")
    train(module, optimizer, range(2))
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0][key] = change(saved["state"][0][key])
    with pytest.raises(ValueError, match=f"1.weight has (a )?{text}"):
        setup("fira", state="int8", basis="int8")[1].load_state_dict(saved)


@pytest.mark.parametrize("formats", [{"state": "int8"}, {"basis": "int8"}], ids=str)
def test_codes_that_were_loaded_as_numbers_are_refused(formats):
    """As torch.distributed.checkpoint does, which copies them into the tensors that it finds."""
    module, optimizer = setup("fira", **formats)
    train(module, optimizer, range(2))
    twin, other = setup("fira")
    train(twin, other, range(2))
    saved, template = optimizer.state_dict(), copy.deepcopy(other.state_dict())
    for key, state in template["state"].items():
        for entry in ("exp_avg", "exp_avg_sq", "basis"):
            if entry in state:
                state[entry].copy_(saved["state"][key][entry])
    template["param_groups"] = saved["param_groups"]
    with pytest.raises(ValueError, match=r"1\.weight was saved in codes and has been loaded"):
        other.load_state_dict(template)


def test_rooms_are_one_for_all_and_in_the_plan():
    """What is decoded for a batch is kept from step to step: no copy of the model."""
    weights = [nn.Parameter(torch.randn(64, 48 + 16 * index).bfloat16()) for index in range(4)]
    group = {"params": [(f"w{index}", w) for index, w in enumerate(weights)], "rank": 8}
    formats = {"state": "int8", "basis": "int8", "master": 24}
    optimizer = FiraAdamW([group], lr=0.01, **formats)
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    rooms = [batch.room for batch in optimizer._known.batches]
    assert len(rooms) == 4
    memories = {room.weights[0].untyped_storage().data_ptr() for room in rooms}
    (memory,) = {room.weights[0].untyped_storage().nbytes() for room in rooms}
    assert len(memories) == 1
    assert memory <= 4 * 64 * 96 + 2 * 96 * 8 + 512
    plain = FiraAdamW([group], lr=0.01, state="int8")
    held = planned_workspace(optimizer, "cpu").refresh - planned_workspace(plain, "cpu").refresh
    assert held >= memory
