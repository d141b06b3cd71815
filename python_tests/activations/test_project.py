"""R from linear layers: what it is, how it accumulates, and that steps cannot tell it from G."""

import copy
import functools
import gc
import io
import itertools
import math
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from activations.llama import language_model, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, Subspace, param_groups
from lowrank_kernels.activations import (
    project_linears,
    recompute_activations,
    release_gradients,
    saved_bytes,
)
from lowrank_kernels.ops.contract import Side, moment_dtype
from lowrank_kernels.optim.families import _of_norm_1
from lowrank_kernels.optim.projected_gradient import (
    ProjectedGradient,
    held,
    is_projected_gradient,
)

LAYERS = ("q", "k", "up", "down")
TOKENS = 23
GAP = 20


class Net(nn.Module):
    """q and k share an input; down is on the left; the head is not projected."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(TOKENS, 24, dtype=dtype)
        self.q = nn.Linear(24, 24, bias=False, dtype=dtype)
        self.k = nn.Linear(24, 24, dtype=dtype)
        self.up = nn.Linear(24, 41, dtype=dtype)
        self.down = nn.Linear(41, 24, bias=False, dtype=dtype)
        self.head = nn.Linear(24, TOKENS, dtype=dtype)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + torch.tanh(self.q(x)) * self.k(x)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x)


def groups_of(model, rank=4, **options):
    """By hand: `param_groups` leaves out what a rank saves no memory on."""
    named = dict(model.named_parameters())
    own = [(f"{name}.weight", named.pop(f"{name}.weight")) for name in LAYERS]
    projected = {"params": own, "rank": rank, "update_proj_gap": GAP, **options}
    return [projected, {"params": list(named.items())}]


def build(
    dtype=torch.float64,
    start=None,
    kind=GaLoreAdamW,
    rank=4,
    proj_type="std",
    shares=False,
    **options,
):
    """A model, its optimizer and, with a `start`, projected layers."""
    model = Net(dtype)
    optimizer = kind(groups_of(model, rank, proj_type=proj_type), lr=1e-2, **options)
    if start is not None:
        project_linears(model, optimizer, start=start, share_bases=shares)
    return model, optimizer


def batch(step, part=0):
    rng = torch.Generator().manual_seed(1000 * step + part)
    return torch.randint(0, TOKENS, (3, 8), generator=rng)


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model, optimizer, steps, first=0, parts=1, clip=None):
    for step in range(first, first + steps):
        for part in range(parts):
            (loss_of(model, batch(step, part)) / parts).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def distance(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(((a - b).norm() / a.norm()).item() for a, b in pairs)


def weights(model):
    return [getattr(model, name).weight for name in LAYERS]


def stepped_once(dtype=torch.float64, **options):
    """Projected layers whose bases are there, and a copy of the model that has dense gradients."""
    model, optimizer = build(dtype, "gradient", **options)
    train(model, optimizer, 1)
    plain = Net(dtype)
    plain.load_state_dict(model.state_dict())
    return model, optimizer, plain


def expected_r(optimizer, weight, gradient):
    state = optimizer.state[weight]
    basis = state["basis"].to(gradient.dtype)
    return gradient @ basis if state["side"] == Side.RIGHT else basis.mT @ gradient


def check_r(model, optimizer, plain, bound=1e-13):
    for weight, other in zip(weights(model), weights(plain), strict=True):
        assert isinstance(weight.grad, ProjectedGradient)
        expected = expected_r(optimizer, weight, other.grad)
        assert (weight.grad.held - expected).norm() <= bound * expected.norm()
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if weight not in set(weights(model)):
            error = (weight.grad - other.grad).norm()
            assert error <= bound * other.grad.norm(), name


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


def test_its_norm_is_that_of_r_and_clipping_scales_it():
    model, optimizer, plain = stepped_once()
    for module in (model, plain):
        loss_of(module, batch(1)).backward()
    squares = [expected_r(optimizer, w, o.grad).square().sum()
               for w, o in zip(weights(model), weights(plain), strict=True)]  # fmt: skip
    own = set(weights(model))
    squares += [p.grad.square().sum() for p in model.parameters() if p not in own]
    expected = torch.stack(squares).sum().sqrt()
    for foreach in (True, False):
        total = nn.utils.clip_grad_norm_(model.parameters(), 1e9, foreach=foreach)
        torch.testing.assert_close(total, expected)
    nn.utils.clip_grad_norm_(model.parameters(), expected / 2)
    total = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(total, expected / 2, rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match="only the 2-norm"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=float("inf"))


def test_a_grad_scaler_unscales_it():
    model, optimizer, plain = stepped_once(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, batch(1))).backward()
    loss_of(plain, batch(1)).backward()
    scaler.unscale_(optimizer)
    for weight, other in zip(weights(model), weights(plain), strict=True):
        expected = expected_r(optimizer, weight, other.grad)
        torch.testing.assert_close(weight.grad.held, expected)
    model.q.weight.grad.held[0, 0] = torch.inf
    before = model.q.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(model.q.weight, before)


def test_zero_gradients_that_stay_are_of_their_time():
    """What is known of a projection is set to zero; a whole gradient that stays is in the way."""
    model, optimizer, _ = stepped_once()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    loss_of(model, batch(1)).backward()
    for weight in weights(model):
        weight.grad.zero_()
    loss_of(model, batch(2)).backward()
    loss_of(plain, batch(2)).backward()
    for weight, other in zip(weights(model), weights(plain), strict=True):
        expected = expected_r(optimizer, weight, other.grad)
        torch.testing.assert_close(weight.grad.held, expected, rtol=1e-12, atol=1e-14)
    model, optimizer = build(start="dense")
    loss_of(model, batch(0)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="set_to_none=True"):
        loss_of(model, batch(1)).backward()


def test_gradients_are_as_small_as_r_and_saved_is_x_p():
    model, optimizer = build(torch.float32, "activations")
    train(model, optimizer, 1)
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(5, 6, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Two layers of one input: each saves x P of rank 4, less than x.
        out = model.q(x).sum() + model.k(x).sum()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert sum(size for place, size in saved.items() if place not in own) == 2 * 30 * 4 * 4
    out.backward()
    loss_of(model, batch(1)).backward()
    sizes = [held(weight.grad).numel() for weight in weights(model)]
    assert sizes == [24 * 4, 24 * 4, 41 * 4, 4 * 41]


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


def test_a_gradient_of_another_basis_is_refused():
    model, optimizer, _ = stepped_once()
    loss_of(model, batch(1)).backward()
    optimizer.load_state_dict(optimizer.state_dict())
    before = model.q.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"q\.weight .* projected by another basis"):
        optimizer.step()
    assert torch.equal(model.q.weight, before)
    optimizer.zero_grad()
    train(model, optimizer, 1, first=1)


def test_other_optimizers_and_methods_say_what_they_need():
    model, optimizer, _ = stepped_once()
    loss_of(model, batch(1)).backward()
    with pytest.raises(RuntimeError, match="only a projection is known"):
        torch.optim.AdamW(model.parameters()).step()
    optimizer.residual = "official"
    with pytest.raises(RuntimeError, match=r"q\.weight .* its step needs the whole"):
        optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 2, first=1)


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


def test_what_it_says_of_itself():
    model, optimizer, plain = stepped_once(torch.bfloat16)
    loss_of(model, batch(1)).backward()
    loss_of(plain, batch(1)).backward()
    gradient = model.q.weight.grad
    assert "ProjectedGradient((24, 24), torch.bfloat16" in repr(gradient)
    assert gradient.held.dtype is moment_dtype(torch.bfloat16)
    assert gradient.dense().shape == (24, 24)
    assert gradient.dense().dtype is torch.bfloat16
    basis = optimizer.state[model.q.weight]["basis"].float()
    torch.testing.assert_close(
        gradient.dense().float() @ basis, gradient.held, rtol=0.05, atol=1e-3
    )


def test_layers_of_one_input_share_a_basis_and_x_p():
    subspace = Subspace("svd")
    model, optimizer = build(start="activations", shares=True, subspace=subspace)
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    q, k, up = (optimizer.state[weight] for weight in weights(model)[:3])
    for step in range(2 * GAP):
        loss_of(model, batch(step)).backward()
        grads = [weight.grad for weight in (model.q.weight, model.k.weight)]
        whole = [type(grad) is torch.Tensor for grad in grads]
        assert len(set(whole)) == 1
        optimizer.step()
        q, k, up = (optimizer.state[weight] for weight in weights(model)[:3])
        if whole[0]:
            # The best one for both, however small one is beside the other.
            expected = torch.linalg.svd(torch.cat([g / g.norm() for g in grads]))[2][:4]
            assert torch.linalg.matrix_norm(expected @ q["basis"], "nuc") == pytest.approx(4)
        optimizer.zero_grad()
        assert q["basis"] is k["basis"]
        assert up["basis"] is not q["basis"]
    assert q["refreshes"] == k["refreshes"] >= 3
    assert "family" not in up
    x = torch.randn(5, 6, 24, dtype=torch.float64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model.q(x).sum() + model.k(x).sum()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert sum(size for place, size in saved.items() if place not in own) == 30 * 4 * 8
    out.backward()


def test_siblings_begin_with_the_basis_of_the_first_that_has_a_gradient():
    """And with R by it, of all of them; later bases are of all their gradients."""
    model, optimizer = build(start="gradient", shares=True, subspace=Subspace("svd"))
    plain = copy.deepcopy(model)
    for each in (model, plain):
        loss_of(each, batch(0)).backward()
    q, k = (optimizer.state[layer.weight] for layer in (model.q, model.k))
    assert q["basis"] is k["basis"]
    assert q["family"] == k["family"]
    leads = [torch.linalg.svd(layer.weight.grad)[2][:4] for layer in (plain.q, plain.k)]
    captured = [float(torch.linalg.matrix_norm(lead @ q["basis"], "nuc")) for lead in leads]
    assert max(captured) == pytest.approx(4)
    assert min(captured) < 3.99
    check_r(model, optimizer, plain)
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 2 * GAP, first=1)
    assert q["basis"] is k["basis"]
    assert q["refreshes"] == k["refreshes"] >= 2


class Heads(nn.Module):
    """Layers of one input, of 4, 24 and 24 rows."""

    def __init__(self):
        super().__init__()
        self.small, self.a, self.b = (nn.Linear(32, rows, bias=False) for rows in (4, 24, 24))

    def forward(self, x, order=("small", "a", "b")):
        found = {name: getattr(self, name)(x) for name in order}
        return torch.cat([found[name] for name in ("small", "a", "b")], -1)


@pytest.mark.parametrize("order", itertools.permutations(("small", "a", "b")))
@pytest.mark.parametrize("kind", [GaLoreAdamW, AdaRankGradAdamW])
@pytest.mark.parametrize("start", ["gradient", "activations"])
def test_who_has_begun_for_itself_joins_no_more(kind, order, start):
    """R is by the basis that the state has, of gradients of a rank of 4 as well."""
    torch.manual_seed(0)
    model, plain = Heads().double(), Heads().double()
    plain.load_state_dict(model.state_dict())
    group = {"params": list(model.named_parameters()), "rank": 12, "proj_type": "right"}
    options = {"criterion": None} if kind is AdaRankGradAdamW else {}
    optimizer = kind([group], lr=1e-2, **options)
    project_linears(model, optimizer, start=start, share_bases=True)
    x, low = torch.randn(40, 32).double(), torch.randn(40, 4).double()
    own = [low @ torch.randn(4, 24).double(), low.roll(3, 0) @ torch.randn(4, 24).double()]
    heads = torch.cat([torch.randn(40, 4).double(), *own], -1)
    for each in (model, plain):
        (each(x, order) * heads).sum().backward()
    for weight, other in zip(model.parameters(), plain.parameters(), strict=True):
        expected = expected_r(optimizer, weight, other.grad)
        assert (weight.grad.held - expected).norm() <= 1e-13 * expected.norm()
    a, b = (optimizer.state[layer.weight] for layer in (model.a, model.b))
    if kind is GaLoreAdamW and order[-1 if start == "gradient" else 0] != "small":
        assert a["basis"] is b["basis"]


@pytest.mark.parametrize("start", ["gradient", "activations", "random"])
@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_a_first_micro_batch_without_a_gradient_leaves_the_first_step_whole(start, shares, bad):
    """As of an expert that got no tokens."""
    if start == "gradient" or bad == 0.0:
        model, plain = Heads().double(), Heads().double()
        plain.load_state_dict(model.state_dict())
        group = {"params": list(model.named_parameters()), "rank": 4, "proj_type": "right"}
        optimizer = GaLoreAdamW([group], lr=1e-2)
        project_linears(model, optimizer, start=start, share_bases=shares)
        x = torch.randn(6, 32).double()
        for each in (model, plain):
            (each(x) * bad).sum().backward()
            each(x).square().sum().backward()
        for weight, other in zip(model.parameters(), plain.parameters(), strict=True):
            own = weight.grad
            if isinstance(own, ProjectedGradient):
                own, other = own.held, expected_r(optimizer, weight, other.grad)
            else:
                other = other.grad
            torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12, equal_nan=True)
        optimizer.step()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        assert bad != 0.0 or all(map(is_projected_gradient, (p.grad for p in model.parameters())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-30, 1e-12, 1.0, 1e12, 1e30])
def test_siblings_count_as_much_whatever_their_gradients_are(dtype, size):
    own = torch.randn(8, 12).to(dtype).mul(size).to(dtype)
    if own.isfinite().all() and float(own.abs().min()) > 0:
        found = _of_norm_1(own)
        assert float(found.norm()) == pytest.approx(1, rel=1e-5)
    assert torch.equal(_of_norm_1(torch.zeros(3, 4, dtype=dtype)), torch.zeros(3, 4))


def test_nothing_but_autograd_keeps_products():
    """Under checkpointing that keeps nothing, nothing is kept."""
    model, optimizer = build(start="gradient", shares=True)
    train(model, optimizer, 1)
    x = torch.randn(50, 24, dtype=torch.float64, requires_grad=True)
    alive = []

    def pack(tensor):
        alive.append(weakref.ref(tensor))
        return tensor.shape

    with torch.autograd.graph.saved_tensors_hooks(pack, torch.zeros):
        out = model.q(x).sum() + model.k(x).sum()
    model.up(torch.randn(5, 24, dtype=torch.float64))
    gc.collect()
    shapes = [each().shape for each in alive if each() is not None]
    assert (50, 4) not in shapes
    del out


def test_a_sibling_that_is_due_alone_leaves_its_family():
    model, optimizer = build(start="random", shares=True)
    train(model, optimizer, 1)
    model.k.weight.requires_grad_(False)
    train(model, optimizer, 2 * GAP, first=1)
    q, k = (optimizer.state[weight] for weight in weights(model)[:2])
    assert q["basis"] is not k["basis"]
    assert (q["basis_step"] > 0, k["basis_step"]) == (True, 0)
    model.k.weight.requires_grad_(True)
    train(model, optimizer, GAP, first=2 * GAP + 1)
    assert k["basis_step"] > 0


def test_bases_are_shared_where_that_has_a_meaning():
    model = Net()
    optimizer = AdaRankGradAdamW(groups_of(model))
    with pytest.raises(ValueError, match="without a criterion"):
        project_linears(model, optimizer, share_bases=True)
    with pytest.raises(ValueError, match="goes with start=activations, gradient, random"):
        build(start="dense", shares=True)


@pytest.mark.parametrize("first", ["project", "recompute"])
@pytest.mark.parametrize("shares", [False, True])
def test_beside_recomputed_activations_less_is_saved_and_steps_are_the_same(first, shares):
    """In both orders, of which no report complains."""
    ids = token_ids()
    sizes, models = {}, {}
    for recomputes in (False, True):
        model = language_model(dtype=torch.float64)
        optimizer = GaLoreAdamW(param_groups(model, rank=6, update_proj_gap=4), lr=1e-3)
        project = functools.partial(project_linears, model, optimizer, share_bases=shares)
        todo = [project, functools.partial(recompute_activations, model)][: 1 + recomputes]
        reports = [act() for act in (todo if first == "project" else todo[::-1])]
        assert not any("left out" in str(report) for report in reports)
        for step in range(6):
            if step == 0:
                first_size = saved_bytes(model, input_ids=ids, labels=ids).total
            model(input_ids=ids, labels=ids).loss.backward()
            if step == 2:
                sizes[recomputes] = saved_bytes(model, input_ids=ids, labels=ids).total
            optimizer.step()
            optimizer.zero_grad()
        models[recomputes] = model
        for report in reports[::-1]:
            report.undo()
        assert not any("forward" in vars(module) for module in model.modules())
    assert distance(models[False], models[True]) <= 1e-12
    assert sizes[True] < 0.75 * sizes[False]
    # The first step saves no more, though bases are not there before it.
    assert first_size <= sizes[True]


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


def test_one_tensor_that_is_the_input_of_every_step_is_projected_anew():
    """Also where it is changed behind autograd's back."""
    model, optimizer = build(start="random", shares=True)
    plain = Net()
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    for step in range(GAP + 2):
        plain.load_state_dict(model.state_dict())
        for module in (model, plain):
            (module.q(x) * module.k(x)).sum().backward()
        for weight, other in zip(weights(model)[:2], weights(plain)[:2], strict=True):
            if isinstance(weight.grad, ProjectedGradient):
                expected = expected_r(optimizer, weight, other.grad)
                torch.testing.assert_close(weight.grad.held, expected, rtol=1e-12, atol=1e-12)
        optimizer.step()
        optimizer.zero_grad()
        plain.zero_grad()
        if step % 3 == 0:
            x.data.mul_(-0.9)
    assert optimizer.state[model.q.weight]["refreshes"] > 1


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


class Routed(nn.Module):
    """Layers whose inputs the caller chooses."""

    def __init__(self, *names):
        super().__init__()
        torch.manual_seed(2)
        for name in names:
            setattr(self, name, nn.Linear(16, 16, bias=False, dtype=torch.float64))


def routed(*names, gap=GAP, **options):
    """Layers that share bases, and the same with whole gradients."""
    model = Routed(*names)
    group = {"params": list(model.named_parameters()), "rank": 3, "update_proj_gap": gap}
    optimizer = GaLoreAdamW([group], lr=1e-2)
    project_linears(model, optimizer, start="random", share_bases=True, **options)
    return model, optimizer, Routed(*names)


def check_routed(model, optimizer, plain, loss):
    plain.load_state_dict(model.state_dict())
    for module in (model, plain):
        loss(module).backward()
    for weight, other in zip(model.parameters(), plain.parameters(), strict=True):
        if isinstance(weight.grad, ProjectedGradient):
            expected = expected_r(optimizer, weight, other.grad)
            torch.testing.assert_close(weight.grad.held, expected, rtol=1e-12, atol=1e-12)
    optimizer.step()
    optimizer.zero_grad()
    plain.zero_grad()


def test_a_basis_that_is_in_use_is_not_replaced_by_a_shared_one():
    model, optimizer, plain = routed("q", "k", "z")
    x = torch.randn(4, 16, dtype=torch.float64)

    def loss(m):
        h = torch.tanh(m.q(x))
        return (m.z(h) + m.q(h) * m.k(h)).square().sum()

    check_routed(model, optimizer, plain, loss)
    states = {name: optimizer.state[p] for name, p in model.named_parameters()}
    assert states["z.weight"]["basis"] is states["k.weight"]["basis"]
    assert "family" not in states["q.weight"]


def test_a_layer_stays_with_the_first_that_it_shares_with():
    model, optimizer, plain = routed("p", "q", "k", gap=4)
    x, other = torch.randn(2, 4, 16, dtype=torch.float64)
    check_routed(model, optimizer, plain, lambda m: (m.p(x) * m.q(x)).sum() + m.k(other).sum())
    for _ in range(6):
        check_routed(model, optimizer, plain, lambda m: (m.q(other) * m.k(other)).square().sum())
    p, q = (optimizer.state[getattr(model, name).weight] for name in "pq")
    assert p["basis_step"] == 0
    assert q["basis_step"] > 0
    assert p["basis"] is not q["basis"]


def test_an_input_whose_graph_stays_is_projected_by_the_basis_of_its_time():
    model, optimizer, plain = routed("q", "k", gap=2)
    x, kept = torch.randn(4, 16, dtype=torch.float64), []
    for _ in range(6):
        kept.append((model.q(x) * model.k(x)).sum())
        check_routed(model, optimizer, plain, lambda m: (m.q(x) * m.k(x)).sum())


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


def test_only_numbers_scale_it_and_nothing_else_is_added():
    model, optimizer, _ = stepped_once()
    loss_of(model, batch(1)).backward()
    assert optimizer.state
    gradient = model.q.weight.grad
    before = gradient.held.clone()
    mask = torch.ones(24, 24, dtype=torch.float64)
    attempts = (
        lambda: gradient.mul_(mask),
        lambda: gradient * mask,
        lambda: mask * gradient,
        lambda: gradient * gradient,
        lambda: gradient + 1,
        lambda: torch._foreach_mul_([gradient], [mask]),
        lambda: torch.optim.SGD([model.q.weight], lr=1.0, foreach=False).step(),
        lambda: torch.optim.SGD([model.q.weight], lr=1.0, foreach=True).step(),
    )
    for attempt in attempts:
        # Python's operators tell of their operands instead.
        with pytest.raises(RuntimeError, match="only a projection is known"):
            attempt()
    assert torch.equal(gradient.held, before)
    other = gradient.clone()
    gradient.zero_()
    gradient.clone().add_(other, alpha=3.0)
    gradient.add_(other, alpha=3.0)
    assert torch.equal(gradient.held, 3 * before)


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
