"""R from linear layers: what it is, and that steps cannot tell it from G."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from activations.nets import (
    GAP,
    Net,
    batch,
    build,
    check_r,
    distance,
    expected_r,
    groups_of,
    loss_of,
    routed,
    stepped_once,
    train,
    weights,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, Subspace, param_groups
from lowrank_kernels.activations import (
    project_linears,
    release_gradients,
    saved_bytes,
)
from lowrank_kernels.optim.projected_gradient import (
    ProjectedGradient,
)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("rank", [1, 4, 17])
def test_r_is_that_of_the_whole_gradient(proj_type, parts, rank):
    model, optimizer, plain = stepped_once(proj_type=proj_type, rank=rank)
    for part in range(parts):
        loss_of(model, batch(1, part)).backward()
        loss_of(plain, batch(1, part)).backward()
    check_r(model, optimizer, plain)


class Layer(nn.Module):
    """One layer in a numbered block, called with any input."""

    def __init__(self, rows, cols, bias):
        super().__init__()
        self.layer = nn.Linear(cols, rows, bias=bias, dtype=torch.float64)

    def forward(self, x):
        return self.layer(x)


INPUTS = {
    "one token": lambda x: x[0, 0],
    "matrix": lambda x: x[0],
    "four dimensions": lambda x: x[None],
    "no token": lambda x: x[:, :0],
    "transposed": lambda x: x.transpose(0, 1),
    "sliced": lambda x: x[:, ::2],
    "columns apart": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    "expanded": lambda x: x[:1].expand(3, -1, -1),
    "negated": lambda x: torch._neg_view(x),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(13, 7), (7, 13), (9, 9)], ids=str)
def test_inputs_of_any_shape_and_stride(name, bias, shape):
    torch.manual_seed(0)
    rows, cols = shape
    model, plain = Layer(rows, cols, bias), Layer(rows, cols, bias)
    plain.load_state_dict(model.state_dict())
    optimizer = GaLoreAdamW(param_groups(model, rank=3, targets=["layer"]), lr=1e-3)
    project_linears(model, optimizer, start="random")
    x = torch.randn(3, 5, cols, dtype=torch.float64)
    results = []
    for module in (model, plain):
        own = INPUTS[name](x).detach().clone().requires_grad_()
        out = module(INPUTS[name](x) * 1 if own.numel() == 0 else own)
        (out.sin() * 2).sum().backward()
        results.append((out, own.grad))
    (out, of_x), (other, of_other) = results
    assert torch.equal(out, other)
    if of_x is not None:
        torch.testing.assert_close(of_x, of_other, rtol=1e-13, atol=1e-13)
    weight = model.layer.weight
    expected = expected_r(optimizer, weight, plain.layer.weight.grad)
    torch.testing.assert_close(weight.grad.held, expected, rtol=1e-13, atol=1e-13)
    if bias:
        torch.testing.assert_close(model.layer.bias.grad, plain.layer.bias.grad)


@pytest.mark.parametrize("backend", ["reference", "foreach"])
@pytest.mark.parametrize("start", ["dense", "gradient"])
@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize(
    "subspace", [Subspace(), Subspace("svd", stagger=False), Subspace(moments="carry")], ids=str
)
def test_fifty_steps_over_refreshes_are_those_of_whole_gradients(
    backend, start, proj_type, subspace
):
    options = {"backend": backend, "subspace": subspace, "proj_type": proj_type}
    plain, of_plain = build(**options)
    model, optimizer = build(start=start, **options)
    train(plain, of_plain, 50)
    grads = []
    for weight in weights(model):
        weight.register_post_accumulate_grad_hook(lambda weight: grads.append(type(weight.grad)))
    train(model, optimizer, 50)
    refreshes = [row["refreshes"] for row in optimizer.stats()]
    assert min(refreshes) >= 3
    assert grads.count(torch.Tensor) <= sum(refreshes)
    assert ProjectedGradient in grads
    assert distance(plain, model) <= 1e-10


@pytest.mark.parametrize("parts", [1, 3])
def test_adaptive_ranks_and_criteria_take_whole_gradients_where_they_look(parts):
    options = {"kind": AdaRankGradAdamW, "check_gap": 5, "residual_energy": 0.6}
    plain, of_plain = build(**options)
    model, optimizer = build(start="dense", **options)
    train(plain, of_plain, 50, parts=parts)
    train(model, optimizer, 50, parts=parts)
    assert distance(plain, model) <= 1e-10
    assert {row["rank"] for row in optimizer.stats()} != {4}


@pytest.mark.parametrize("backend", ["native", "foreach"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", ["float32", "int8"])
def test_one_step_in_lower_precision(backend, dtype, state):
    """By R in float32: at most twice the error of the step by G, of the step in float64."""
    results = {}
    for start in (None, "gradient"):
        model, optimizer = build(dtype, start, backend=backend, state=state)
        train(model, optimizer, 3)
        results[start] = model
    exact, of_exact = build(torch.float64, None)
    train(exact, of_exact, 3)
    errors = {
        start: max(
            (a.double() - b).norm().item() for a, b in zip(weights(m), weights(exact), strict=True)
        )
        for start, m in results.items()
    }
    assert errors["gradient"] <= 2 * errors[None]


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_checkpointing(reentrant):
    model, optimizer, plain = stepped_once()

    def block(module, x):
        x = x + torch.tanh(module.q(x)) * module.k(x)
        return x + module.down(torch.relu(module.up(x)))

    for module in (model, plain):
        x = module.embedding(batch(1)[:, :-1])
        x = checkpoint(block, module, x, use_reentrant=reentrant)
        F.cross_entropy(module.head(x).flatten(0, 1), batch(1)[:, 1:].flatten()).backward()
    check_r(model, optimizer, plain)


def test_a_weight_used_twice_and_once_outside_of_its_layer():
    model, optimizer, plain = stepped_once()
    for module in (model, plain):
        x = module.embedding(batch(1))
        (module.q(module.q(x)) @ module.q.weight).square().sum().backward()
    expected = expected_r(optimizer, model.q.weight, plain.q.weight.grad)
    torch.testing.assert_close(model.q.weight.grad.held, expected, rtol=1e-12, atol=1e-13)


def test_under_autocast_r_is_as_good_as_of_the_gradient_there():
    model, optimizer, plain = stepped_once(torch.float32)
    exact = Net(torch.float64)
    exact.load_state_dict(model.state_dict())
    for module in (model, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(module, batch(1))
        loss.backward()
    loss_of(exact, batch(1)).backward()
    for weight, other, wide in zip(*map(weights, (model, plain, exact)), strict=True):
        assert weight.grad.dtype is weight.grad.held.dtype is torch.float32
        truth = expected_r(optimizer, weight, wide.grad)
        error = (weight.grad.held - truth).norm()
        assert error <= 2 * (expected_r(optimizer, weight, other.grad) - truth).norm()


def test_where_x_p_would_be_more_than_x_then_x_is_saved():
    model, optimizer = build(torch.float32, "activations", rank=17)
    train(model, optimizer, 2)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(5, 6, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.q(x).sum() + model.k(x).sum()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert sum(size for place, size in saved.items() if place not in own) == 30 * 24 * 4


class Shapes(TorchDispatchMode):
    """Which shapes of matrices are computed."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.add(tuple(result.shape))
        return result


@pytest.mark.parametrize("start", ["activations", "random"])
def test_no_step_but_one_in_which_a_basis_is_due_forms_a_gradient(start):
    model, optimizer = build(start=start)
    shapes = {(41, 24), (24, 41)}
    due = []
    for step in range(2 * GAP):
        with Shapes() as mode:
            loss_of(model, batch(step)).backward()
        due.append(sorted(mode.seen & shapes))
        whole = [type(w.grad) is torch.Tensor for w in (model.up.weight, model.down.weight)]
        assert len(due[-1]) == sum(whole)
        optimizer.step()
        optimizer.zero_grad()
    assert due[0] == []
    assert 2 <= sum(map(len, due)) <= 6


@pytest.mark.parametrize(
    ("start", "shares"),
    [
        ("activations", False),
        ("activations", True),
        ("gradient", False),
        ("gradient", True),
        ("random", True),
        ("dense", False),
    ],
)
@pytest.mark.parametrize("basis", ["weight", "int8"])
def test_resumed_it_takes_the_same_steps(start, shares, basis):
    model, optimizer = build(torch.float32, start, shares=shares, basis=basis)
    train(model, optimizer, 30)
    whole = [p.detach().clone() for p in model.parameters()]

    model, optimizer = build(torch.float32, start, shares=shares, basis=basis)
    train(model, optimizer, 13)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model, optimizer = build(torch.float32, start, shares=shares, basis=basis)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(model, optimizer, 17, first=13)
    for own, other in zip(model.parameters(), whole, strict=True):
        assert torch.equal(own, other)


def test_what_cannot_be_projected_is_told():
    model = Net()
    optimizer = GaLoreAdamW(groups_of(model), lr=1e-2)
    model.q.weight.requires_grad_(False)
    model.k = nn.utils.parametrizations.weight_norm(model.k)
    report = project_linears(model, optimizer)
    reasons = {row.name: row.reason for row in report.rows if not row.taken}
    assert reasons["q"] == "its weight is frozen"
    assert reasons["k"] == "its weight is computed from others"
    assert reasons["head"] == "its weight is not projected by the optimizer"
    assert [row.name for row in report.rows if row.taken] == ["up", "down"]
    assert str(report).startswith("2 of ")
    again = pytest.raises(ValueError, match="patched already")
    with again:
        project_linears(model, optimizer)
    for bad, message in (
        (FiraAdamW(groups_of(Net())), "needs what lies outside"),
        (GaLoreAdamW(groups_of(Net()), capturable=True), "capturable"),
        (torch.optim.AdamW(Net().parameters()), "no optimizer of lowrank_kernels"),
        (GaLoreAdamW(Net().parameters()), "no linear layer"),
    ):
        with pytest.raises(ValueError, match=message):
            project_linears(Net(), bad)
    with pytest.raises(ValueError, match="start must be one of"):
        project_linears(Net(), optimizer, start="cold")


def test_undone_copied_and_pickled_layers_are_as_before():
    model, optimizer = Net(), None
    keys, before = list(model.state_dict()), dict(vars(model.q))
    optimizer = GaLoreAdamW(groups_of(model), lr=1e-2)
    report = project_linears(model, optimizer)
    assert list(model.state_dict()) == keys
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loss_of(other, batch(0)).backward()
        assert type(other.q.weight.grad) is torch.Tensor
        assert torch.equal(other(batch(0)), model(batch(0)))
    report.undo()
    assert vars(model.q).keys() == before.keys()
    train(model, optimizer, 2)
    loss_of(model, batch(2)).backward()
    assert type(model.q.weight.grad) is torch.Tensor


def test_without_gradients_nothing_is_begun():
    model, optimizer = build(start="activations")
    with torch.no_grad():
        model(batch(0))
    with torch.inference_mode():
        model(batch(0))
    assert not optimizer.state


@pytest.mark.parametrize("start", ["activations", "gradient"])
def test_released_in_backward_r_takes_the_same_steps(start):
    runs = []
    for releases in (False, True):
        model, optimizer = build(torch.float32, start, state="int8")
        if releases:
            release_gradients(model, optimizer)
        kinds = set()
        model.q.weight.register_hook(lambda grad, kinds=kinds: kinds.add(type(grad)))
        train(model, optimizer, 30)
        assert ProjectedGradient in kinds
        runs.append(model)
    for one, other in zip(*(model.parameters() for model in runs), strict=True):
        assert torch.equal(one, other)


def test_first_bases_are_not_computed_in_the_dtype_of_autocast():
    model, optimizer = build(torch.float32, "activations")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(model, batch(0))
    loss.backward()
    for weight in weights(model):
        basis = optimizer.state[weight]["basis"]
        assert (basis.mT @ basis - torch.eye(4)).abs().max() < 1e-5


@pytest.mark.parametrize("shares", [False, True])
def test_saved_bytes_counts_x_p_and_r(shares):
    model, optimizer = build(torch.float32, "random", shares=shares)
    train(model, optimizer, 1)
    x = torch.randn(5, 24)
    both = nn.ModuleDict({"q": model.q, "k": model.k})
    both.forward = lambda x: both["q"](x).sum() + both["k"](x).sum()
    saved = saved_bytes(both, x, backward=True)
    assert saved.total == (1 if shares else 2) * 5 * 4 * 4
    assert saved.gradients == (2 * 24 * 4 + 24) * 4


def test_options_are_those_of_the_group_as_it_is_now():
    model, optimizer, _ = stepped_once()
    optimizer.param_groups[0] = {**optimizer.param_groups[0], "update_proj_gap": 2}
    train(model, optimizer, 6, first=1)
    assert min(row["refreshes"] for row in optimizer.stats()) >= 3


@pytest.mark.parametrize("start", ["activations", "gradient", "random"])
def test_counting_saved_bytes_begins_no_basis(start):
    model, optimizer = build(torch.float32, start)
    model.loss = None
    saved_bytes(model, batch(0), loss=lambda out: out.sum(), backward=True)
    assert not optimizer.state


@pytest.mark.parametrize("start", ["activations", "gradient", "random"])
def test_autocast_around_forward_and_backward(start):
    model, optimizer = build(torch.float32, start)
    for step in range(3):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss_of(model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    for weight in weights(model):
        basis = optimizer.state[weight]["basis"]
        assert (basis.mT @ basis - torch.eye(4)).abs().max() < 1e-5


def test_nothing_keeps_a_model_that_is_gone():
    model, optimizer = build(torch.float32, "activations", shares=True)
    train(model, optimizer, 2)
    seen = [weakref.ref(model.q.weight), weakref.ref(model)]
    del model, optimizer
    for _ in range(3):  # what hooks held is freed by the first
        gc.collect()
    assert [each() for each in seen] == [None, None]


def test_layers_are_called_as_ever():
    model, optimizer, plain = stepped_once()
    x = torch.randn(4, 24, dtype=torch.float64)
    assert torch.equal(model.q(input=x), plain.q(input=x))
    named = {name: param.detach() * 2 for name, param in model.named_parameters()}
    twice = torch.func.functional_call(model, named, (batch(1),))
    assert torch.equal(twice, torch.func.functional_call(plain, named, (batch(1),)))

    def loss(params):
        return torch.func.functional_call(model, params, (batch(1),)).square().sum()

    found = torch.func.grad(loss)(named)["q.weight"]
    assert type(found) is torch.Tensor
    mapped = torch.func.vmap(model.q)(x)
    torch.testing.assert_close(mapped, plain.q(x))
    with torch.autograd.detect_anomaly(check_nan=True):
        loss_of(model, batch(1)).backward()
    assert isinstance(model.q.weight.grad, ProjectedGradient)
    optimizer.step()


def test_a_weight_may_change_before_the_backward_pass_where_no_input_is_trained():
    model, optimizer, plain = routed("q")
    x = torch.randn(4, 16, dtype=torch.float64)
    for module in (model, plain):
        out = module.q(x).square().sum()
        with torch.no_grad():
            module.q.weight.mul_(2)
        out.backward()
    assert isinstance(model.q.weight.grad, ProjectedGradient)
    optimizer.zero_grad()


def test_a_weight_whose_rows_lie_apart_is_left_out():
    model = Net()
    model.q.weight = nn.Parameter(model.q.weight.detach().t().contiguous().t())
    report = project_linears(model, GaLoreAdamW(groups_of(model), lr=1e-2))
    reasons = {row.name: row.reason for row in report.rows if not row.taken}
    assert "rows" in reasons["q"]
