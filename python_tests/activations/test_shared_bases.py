"""Layers of one input that share a basis and x P."""

import copy
import functools
import gc
import itertools
import math
import weakref

import pytest
import torch
from activations.llama import language_model, token_ids
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
    train,
    weights,
)
from torch import nn

from lowrank_kernels import AdaRankGradAdamW, GaLoreAdamW, Subspace, param_groups
from lowrank_kernels.activations import (
    project_linears,
    recompute_activations,
    saved_bytes,
)
from lowrank_kernels.optim.families import _of_norm_1
from lowrank_kernels.optim.projected_gradient import (
    ProjectedGradient,
    is_projected_gradient,
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


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        *itertools.product((torch.float32, torch.bfloat16), (1e-30, 1e-12, 1.0, 1e12, 1e30)),
        *((torch.float16, size) for size in (1e-3, 1.0, 1e3)),
    ],
)
def test_siblings_count_as_much_whatever_their_gradients_are(dtype, size):
    own = torch.randn(8, 12).mul(size).to(dtype)
    assert float(_of_norm_1(own).norm()) == pytest.approx(1, rel=1e-5)
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
