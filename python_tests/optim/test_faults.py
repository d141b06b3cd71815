"""Zero, NaN, Inf and rank-deficient gradients, and factorizations that fail."""

import logging

import pytest
import torch
from devices import device_of
from torch import nn

from lowrank_kernels import FiraAdamW, GaLoreAdamW
from lowrank_kernels.ops import notices
from lowrank_kernels.subspace import RANGE_FINDERS, new_record

METHODS = {
    "galore": GaLoreAdamW,
    "fira": FiraAdamW,
    "fira-paper": lambda *args, **kw: FiraAdamW(*args, residual="paper", **kw),
}
SHAPES = [(24, 12), (12, 24)]
GAP = 4


def start(method, shape, dtype=torch.float32, backend="auto"):
    weight = nn.Parameter(torch.ones(shape, dtype=dtype, device=device_of(backend)))
    group = {"params": [("w", weight)], "rank": 3, "update_proj_gap": GAP}
    return weight, METHODS[method]([group], lr=0.1, backend=backend)


def gradient(shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def step(weight, optimizer, grad):
    weight.grad = grad.to(weight)
    optimizer.step()
    return weight.detach().clone()


def snapshot(weight, optimizer):
    state = optimizer.state[weight]
    return {
        "weight": weight.detach().clone(),
        **{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()},
    }


def differing(before, after):
    return {
        key
        for key, value in before.items()
        if not torch.equal(torch.as_tensor(value), torch.as_tensor(after[key]))
    }


@pytest.mark.parametrize("backend", ["reference", "foreach", "native", "triton"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
def test_zero_gradient_first_is_as_if_it_had_never_been(method, shape, backend):
    """State is complete, nothing moves; with the step count put back the runs are bitwise equal."""
    fresh, late = start(method, shape, backend=backend), start(method, shape, backend=backend)
    after = step(*late, torch.zeros(shape))
    assert (after == 1).all()
    state = late[1].state[late[0]]
    complete = {"step", "exp_avg", "exp_avg_sq", "basis", "side", "rank", "salt", *new_record()}
    assert set(state) == complete | ({"limiter_norm"} if method != "galore" else set())
    assert float(state["step"]) == state["kept"] == 1
    state["step"].zero_()
    state["kept"] = 0
    for seed in range(10):
        grad = gradient(shape, seed)
        assert torch.equal(step(*late, grad), step(*fresh, grad))
    assert not differing(snapshot(*fresh), snapshot(*late))


def test_zero_gradient_first_is_no_warning(caplog):
    """Checkpoint libraries create the state that way."""
    notices.notice_once.cache_clear()
    with caplog.at_level(logging.WARNING, "lowrank_kernels"):
        step(*start("fira", (24, 12)), torch.zeros(24, 12))
    assert "renewed" not in caplog.text


@pytest.mark.parametrize("method", ["fira", "fira-paper"])
def test_zero_gradient_first_does_not_throttle_the_residual(method):
    """A limiter that stores the zero norm lets next to nothing through for over 1,000 steps."""
    fresh, late = start(method, (24, 12)), start(method, (24, 12))
    step(*late, torch.zeros(24, 12))
    grad = gradient((24, 12), 0)
    step(*fresh, grad)
    step(*late, grad)
    norms = [float(optimizer.state[weight]["limiter_norm"]) for weight, optimizer in (fresh, late)]
    assert norms[1] > 0.3 * norms[0]


@pytest.mark.parametrize("backend", ["reference", "foreach", "native", "triton"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("when", [2, GAP], ids=["between refreshes", "at a refresh"])
def test_wholly_non_finite_gradient_changes_the_step_count_only(method, shape, bad, when, backend):
    run = start(method, shape, backend=backend)
    for seed in range(when):
        step(*run, gradient(shape, seed))
    before = snapshot(*run)
    step(*run, torch.full(shape, bad))
    assert differing(before, snapshot(*run)) == ({"step"} if when < GAP else {"step", "kept"})
    step(*run, gradient(shape, 99))
    after = snapshot(*run)
    assert all(torch.as_tensor(value).isfinite().all() for value in after.values())
    assert "weight" in differing(before, after)
    assert after["basis_step"] == (0 if when < GAP else when + 1), "tried again at the next step"


@pytest.mark.parametrize("method", METHODS)
def test_one_nan_in_a_refresh_keeps_the_old_basis(method):
    run = start(method, (24, 12))
    for seed in range(GAP):
        step(*run, gradient((24, 12), seed))
    before = snapshot(*run)
    grad = gradient((24, 12), GAP)
    grad[3, 5] = float("nan")
    step(*run, grad)
    after = snapshot(*run)
    assert torch.equal(before["basis"], after["basis"])
    assert torch.equal(before["weight"][3], after["weight"][3])
    assert not torch.equal(before["weight"][4], after["weight"][4])
    assert all(torch.as_tensor(value).isfinite().all() for value in after.values())


@pytest.mark.parametrize("method", METHODS)
def test_rank_one_gradient(method):
    run = start(method, (24, 12))
    for seed in range(2 * GAP):
        step(*run, gradient((24, 1), seed) @ gradient((1, 12), seed + 100))
    state = run[1].state[run[0]]
    overlap = state["basis"].T @ state["basis"]
    torch.testing.assert_close(overlap, torch.eye(3), rtol=0, atol=1e-5)
    assert run[0].isfinite().all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_no_factorization_of_a_zero_or_non_finite_gradient(value, monkeypatch):
    """On a GPU it may return NaN, or take minutes; on a CPU it raises or returns any basis."""
    calls = []
    monkeypatch.setitem(RANGE_FINDERS, "randomized", lambda *args: calls.append(args))
    step(*start("fira", (24, 12)), torch.full((24, 12), value))
    assert not calls


def failing_range_finder(request):
    raise torch.linalg.LinAlgError("did not converge")


def nan_range_finder(request):
    found = RANGE_FINDERS["svd"](request)
    return found._replace(bases=found.bases * float("nan"))


def test_parameters_whose_basis_was_not_renewed_are_named_once(caplog):
    notices.notice_once.cache_clear()
    weights = [nn.Parameter(torch.ones(24, 12)) for _ in range(3)]
    optimizer = GaLoreAdamW([{"params": list(zip("abc", weights, strict=True)), "rank": 3}])
    for weight, value in zip(weights, (1.0, float("nan"), float("nan")), strict=True):
        weight.grad = torch.full((24, 12), value)
    with caplog.at_level(logging.WARNING, "lowrank_kernels"):
        optimizer.step()
        optimizer.step()
    told = [r.getMessage() for r in caplog.records if "renewed" in r.getMessage()]
    assert told == ["a basis was not renewed: its gradient is not finite: b and 1 more"]


@pytest.mark.parametrize("broken", [failing_range_finder, nan_range_finder])
def test_failed_factorization_keeps_the_old_basis_and_tries_again(broken, monkeypatch, caplog):
    notices.notice_once.cache_clear()
    run = start("fira", (24, 12))
    for seed in range(GAP):
        step(*run, gradient((24, 12), seed))
    before = snapshot(*run)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, "lowrank_kernels"):
        patch.setitem(RANGE_FINDERS, "randomized", broken)
        step(*run, gradient((24, 12), GAP))
    assert "a basis was not renewed: the factorization" in caplog.text
    assert torch.equal(run[1].state[run[0]]["basis"], before["basis"])
    assert not torch.equal(run[0], before["weight"]), "training goes on"
    step(*run, gradient((24, 12), GAP + 1))
    assert run[1].state[run[0]]["basis_step"] == GAP + 1
