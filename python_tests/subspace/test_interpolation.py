"""LDAdam's blend of momentum and gradient, from which its basis comes."""

import copy

import pytest
import torch
from oracles.ldadam import LDAdam
from subspace.test_range_finders import request
from torch import nn

from lowrank_kernels import GaLoreAdamW, LowRankAdamW, Subspace
from lowrank_kernels.activations import project_linears
from lowrank_kernels.ops import Side
from lowrank_kernels.ops.codes import Stored, channel_groups, loaded
from lowrank_kernels.optim import families
from lowrank_kernels.subspace import refresh
from lowrank_kernels.subspace.range_finders import RANGE_FINDERS

RHO = 0.7
BETAS = (0.9, 0.99)
SIDES = pytest.mark.parametrize("left", [True, False], ids=["left", "right"])


def ldadam(params, rank, rho=RHO, **options):
    subspace = Subspace("power", moments="carry_ldadam", stagger=False, interpolation=rho)
    group = {"params": params, "rank": rank, "update_proj_gap": 1, "betas": BETAS, "eps": 1e-8}
    return LowRankAdamW([group], lr=0.02, corrected=True, subspace=subspace, **options)


def gradient(step, rows=12, cols=20, dtype=torch.float64):
    """Wide; a direction stays, the others are of the step alone."""
    rng, stays = (torch.Generator().manual_seed(seed) for seed in (step + 1, 0))
    steady = torch.randn(rows, 1, generator=stays) @ torch.randn(1, cols, generator=stays)
    return (0.5 * steady + torch.randn(rows, cols, generator=rng)).to(dtype)


def taken(param, optimizer, steps, left):
    for step in steps:
        param.grad = gradient(step) if left else gradient(step).T.contiguous()
        optimizer.step()


@SIDES
@pytest.mark.parametrize("rho", [0.0, RHO, 0.908])
def test_it_is_ldadam(rho, left):
    """A sketch of 4 and 8 more columns holds all 12 rows: one iteration finds what all would."""
    begun = torch.randn(12, 20, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    oracle = LDAdam(begun, 4, rho, BETAS)
    param = nn.Parameter(begun.clone() if left else begun.T.contiguous())
    optimizer = ldadam([param], 4, rho)
    scale = optimizer.param_groups[0]["scale"]
    for step in range(50):
        oracle.take(gradient(step), 0.02, 1e-8, scale)
        taken(param, optimizer, [step], left)
    moved = torch.dist(oracle.weight, begun)
    ours = param.detach() if left else param.detach().T
    assert torch.dist(ours, oracle.weight) <= 1e-10 * moved


@SIDES
def test_to_maximize_is_to_minimize_the_negated(left):
    """Moments are of -G then, and a blend of them with G would cancel."""
    weights = []
    for sign in (1.0, -1.0):
        param = nn.Parameter(torch.zeros((12, 20) if left else (20, 12), dtype=torch.float64))
        optimizer = ldadam([param], 4, maximize=sign < 0)
        for step in range(12):
            param.grad = sign * (gradient(step) if left else gradient(step).T)
            optimizer.step()
        weights.append(param.detach())
    assert torch.equal(*weights)


def test_what_a_basis_captured_is_of_the_gradient():
    """And not of the blend, which is mostly in the span of the last one."""
    param = nn.Parameter(torch.zeros(40, 60, dtype=torch.float64))
    optimizer = ldadam([param], 4, 0.9)
    for step in range(6):
        param.grad = gradient(step, 40, 60)
        optimizer.step()
    basis = optimizer.state[param]["basis"]
    held = float((basis.T @ param.grad).square().sum() / param.grad.square().sum())
    assert optimizer.stats()[0]["captured"] == pytest.approx(held, rel=1e-6)


@pytest.mark.parametrize("state", ["float32", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@SIDES
def test_the_basis_is_that_of_the_blend(left, dtype, state, monkeypatch):
    """Whatever the gradients and the moments are held in."""
    asked = []
    power = RANGE_FINDERS["power"]

    def watched(request):
        asked.append(request)
        return power(request)

    shape = (40, 60) if left else (60, 40)
    param = nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = ldadam([param], 4, state=state)
    monkeypatch.setitem(RANGE_FINDERS, "power", watched)
    for step in range(4):
        grad = gradient(step, 40, 60, dtype)
        if step == 3:
            saved = copy.deepcopy(optimizer.state[param])
        param.grad = grad if left else grad.T.contiguous()
        optimizer.step()
    assert [found.blends is None for found in asked] == [True, False, False, False]
    [blend] = asked[3].blends
    assert blend.dtype is torch.float32
    basis = saved["basis"].double()
    moment, _ = loaded(Stored.of(saved), channel_groups(Side(saved["side"])))
    mean = (moment if left else moment.T).double() / (1 - BETAS[0] ** 3)
    expected = RHO * basis @ mean + (1 - RHO) * grad.double()
    assert torch.dist(blend.double(), expected) <= 1e-6 * torch.linalg.norm(expected)


def test_moments_that_have_seen_no_step_add_nothing(rng):
    """As after a reset and before the next step: c1 is 0."""
    grad = torch.randn(12, 20, generator=rng)
    param = nn.Parameter(torch.zeros(12, 20))
    optimizer = ldadam([param], 4)
    param.grad = grad
    optimizer.step()
    state = optimizer.state[param]
    state["exp_avg"].zero_()
    state["moments_step"] = 1
    due = refresh.Due("w", grad, state, 4, 1, 0, BETAS)
    [blend] = refresh._blends([due], grad.unsqueeze(0), RHO)
    torch.testing.assert_close(blend, (1 - RHO) * grad)


def test_a_batch_of_blends_is_its_matrices_one_by_one(rng):
    matrices = [torch.randn(12, 40, generator=rng) for _ in range(3)]
    blends = [torch.randn(12, 40, generator=rng) for _ in range(3)]
    bases = [torch.linalg.qr(torch.randn(12, 4, generator=rng))[0] for _ in range(3)]
    together = request(*matrices, rank=4, previous=bases)._replace(blends=torch.stack(blends))
    found = RANGE_FINDERS["power"](together)
    for index, matrix in enumerate(matrices):
        alone = request(matrix, rank=4, previous=[bases[index]], seeds=[index])
        blend = blends[index].unsqueeze(0)
        one = RANGE_FINDERS["power"](alone._replace(blends=blend))
        of_blend = RANGE_FINDERS["power"](alone._replace(matrices=blend))
        overlap = one.bases[0].T @ found.bases[index]
        torch.testing.assert_close(overlap.abs(), torch.eye(4), rtol=0, atol=0.02)
        overlap = one.bases[0].T @ of_blend.bases[0]
        torch.testing.assert_close(overlap.abs(), torch.eye(4), rtol=0, atol=0.02)
        low = one.bases[0].T @ matrix
        exact = low.square().sum(1) / matrix.square().sum()
        torch.testing.assert_close(one.energies[0], exact, rtol=2**-7, atol=2**-9)


@pytest.mark.parametrize("ratio", [1e-22, 1e22])
def test_a_gradient_may_be_of_another_size_than_the_momentum(ratio, rng):
    """Each is brought to norm 1 by its own: squares of their quotient are none in float32."""
    matrix, blend = (torch.randn(1, 12, 40, generator=rng) for _ in range(2))
    previous = torch.linalg.qr(torch.randn(12, 4, generator=rng))[0]
    asked = request(matrix[0] * ratio, rank=4, previous=[previous])
    found = RANGE_FINDERS["power"](asked._replace(blends=blend))
    alike = RANGE_FINDERS["power"](request(matrix[0], rank=4, previous=[previous]))
    expected = RANGE_FINDERS["power"](request(blend[0], rank=4, previous=[previous]))
    torch.testing.assert_close(found.bases, expected.bases)
    assert 0 < float(found.energies.sum()) <= float(alike.energies.sum())


def test_a_blend_that_overflows_leaves_the_basis():
    param = nn.Parameter(torch.zeros(12, 20))
    optimizer = ldadam([param], 4)
    for step in range(2):
        param.grad = gradient(step, dtype=torch.float32)
        if step:
            kept = optimizer.state[param]["basis"].clone()
            optimizer.state[param]["exp_avg"].fill_(3e38)
        optimizer.step()
    assert optimizer.stats()[0]["kept"] == 1
    assert torch.equal(optimizer.state[param]["basis"], kept)


# Beside others.


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x):
        return self.q(x) + self.k(x).tanh()


def shared(interpolation, **options):
    torch.manual_seed(0)
    model = Attention()
    subspace = Subspace("power", moments="carry", interpolation=interpolation)
    group = {"params": list(model.named_parameters()), "rank": 4, "update_proj_gap": 2}
    optimizer = GaLoreAdamW([group], lr=0.01, subspace=subspace)
    project_linears(model, optimizer, **options)
    return model, optimizer


def stepped(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        model(inputs).square().mean().backward()
        optimizer.step()


def test_shared_bases_are_refused():
    with pytest.raises(ValueError, match="share_bases=True goes without interpolation"):
        shared(RHO, share_bases=True)


def test_who_shared_a_basis_in_a_checkpoint_has_its_own_from_then_on():
    model, optimizer = shared(0.0, share_bases=True)
    stepped(model, optimizer, range(3))
    assert all("family" in state for state in optimizer.state.values())
    others, resumed = shared(RHO)
    others.load_state_dict(model.state_dict())
    resumed.load_state_dict(optimizer.state_dict())
    stepped(others, resumed, range(3, 8))
    assert not any("family" in state for state in resumed.state.values())
    first, second = (state["basis"] for state in resumed.state.values())
    assert not torch.equal(first, second)


def test_apart_leaves_those_alone_that_are_no_family():
    state = {"basis": torch.eye(2)}
    due = refresh.Due("w", torch.ones(2, 2), state, 2, 1, 0, BETAS)
    assert families.joined([due], apart=True) == [due]


# What a checkpoint tells.


def test_a_checkpoint_from_before_there_was_any_is_of_the_same_method():
    param = nn.Parameter(torch.zeros(12, 20))
    optimizer = ldadam([param], 4, 0.0)
    assert "interpolation" not in optimizer.param_groups[0]["method"]
    optimizer = ldadam([param], 4)
    assert optimizer.param_groups[0]["method"].endswith(f"interpolation={RHO}")
