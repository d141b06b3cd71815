"""AdaRankGrad and the parts of a subspace, through the optimizers."""

import copy
import math

import pytest
import torch
from devices import device_of
from optim.test_state import saved_and_loaded
from torch import nn

from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, Subspace
from lowrank_kernels.subspace import range_finders, refresh

GAP = 5
SHAPES = {"tall": (40, 16), "wide": (16, 40)}
PARTS = {
    "randomized": Subspace(),
    "power": Subspace("power", power_iterations=2),
    "interpolated": Subspace("power", moments="carry_ldadam", interpolation=0.9),
    "random": Subspace("random"),
    "svd": Subspace("svd", stagger=False),
    "reset": Subspace(moments="reset"),
    "carry": Subspace(moments="carry"),
    "carry_ldadam": Subspace(moments="carry_ldadam"),
    "carry_absolute": Subspace(moments="carry_absolute"),
    "adaptive": Subspace(residual_energy=0.2, moments="carry"),
    "adaptive kept": Subspace(residual_energy=0.2, rank_multiple=2),
    "norm": Subspace(criterion="norm", threshold=50.0, check_gap=2),
    "relative": Subspace(criterion="relative_norm", threshold=0.9, check_gap=2),
    "displacement": Subspace(criterion="displacement", threshold=0.5, check_gap=2),
    "lazy": Subspace(lazy=0.1),
}
every_part = pytest.mark.parametrize("part", PARTS)


def gradient(shape, seed, scale=1.0):
    """Of a rank that changes from seed to seed, plus noise."""
    rng = torch.Generator().manual_seed(seed)
    inner = 1 + seed % 7
    low = torch.randn(shape[0], inner, generator=rng) @ torch.randn(inner, shape[1], generator=rng)
    return scale * (low + 0.05 * torch.randn(shape, generator=rng))


def start(cls=FiraAdamW, dtype=torch.float32, count=1, rank=8, backend="auto", **options):
    rng = torch.Generator().manual_seed(1)
    shapes = [shape for shape in SHAPES.values() for _ in range(count)]
    values = [torch.randn(shape, generator=rng).to(device_of(backend), dtype) for shape in shapes]
    params = [nn.Parameter(value) for value in values]
    group = {"params": params, "rank": rank, "update_proj_gap": GAP}
    return params, cls([group], lr=0.05, backend=backend, **options)


def run(params, optimizer, seeds):
    for seed in seeds:
        for param in params:
            param.grad = gradient(param.shape, seed).to(param)
        optimizer.step()


def states(params, optimizer):
    return [optimizer.state[param] for param in params]


def assert_same(first, second):
    for one, other in zip(first[0], second[0], strict=True):
        assert torch.equal(one, other)
    for one, other in zip(states(*first), states(*second), strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert type(other[key]) is type(value), key
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


@every_part
@pytest.mark.parametrize("stop", [3, 5, 8])
@pytest.mark.parametrize("cls", [GaLoreAdamW, FiraAdamW])
def test_resume_is_bit_exact_with_every_part(cls, part, stop):
    """In the middle of an interval, at its end, and after a change of rank."""
    whole = start(cls, torch.bfloat16, 2, subspace=PARTS[part])
    run(*whole, range(3 * GAP))
    params, optimizer = start(cls, torch.bfloat16, 2, subspace=PARTS[part])
    run(params, optimizer, range(stop))
    others, resumed = start(cls, torch.bfloat16, 2, subspace=PARTS[part])
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    resumed.load_state_dict(saved_and_loaded(optimizer.state_dict()))
    run(others, resumed, range(stop, 3 * GAP))
    assert_same((others, resumed), whole)


def test_every_part_is_another_trajectory():
    """What the test above would not see: a part that does nothing."""
    ends = {}
    for part, subspace in PARTS.items():
        params, optimizer = start(GaLoreAdamW, subspace=subspace)
        run(params, optimizer, range(8 * GAP))
        ends[part] = params[0].detach()
        assert ends[part].isfinite().all(), part
    names = list(ends)
    for index, name in enumerate(names):
        for other in names[:index]:
            assert not torch.equal(ends[name], ends[other]), (name, other)


@pytest.mark.parametrize("backend", ["reference", "foreach", "native", "triton"])
def test_the_rank_follows_the_gradient_and_the_state_with_it(backend):
    subspace = Subspace(residual_energy=0.05, moments="carry", stagger=False)
    params, optimizer = start(subspace=subspace, backend=backend)
    ranks = []
    for seed in (0, 4, 2, 6):  # gradients of rank 1, 5, 3 and 7
        run(params, optimizer, [seed] * GAP)
        ranks.append([row["rank"] for row in optimizer.stats()])
        for param, state in zip(params, states(params, optimizer), strict=True):
            rank, rows, cols = ranks[-1][0], *param.shape
            low = (rows, rank) if rows >= cols else (rank, cols)
            assert state["basis"].shape == (min(rows, cols), rank)
            assert state["exp_avg"].shape == state["exp_avg_sq"].shape == low
            for key in ("basis", "exp_avg", "exp_avg_sq"):
                tensor = state[key]
                assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.itemsize
    for first, *others in zip(*ranks, strict=True):
        assert first == 1
        assert others[0] > others[1] < others[2]
        assert max(others) <= 7


def test_ranks_stay_between_their_bounds():
    subspace = Subspace(residual_energy=0.0, stagger=False)
    params, optimizer = start(rank=6, subspace=subspace)
    run(params, optimizer, range(1))
    assert [row["rank"] for row in optimizer.stats()] == [6, 6]
    subspace = Subspace(residual_energy=1.0, min_rank=3, rank_multiple=2, stagger=False)
    params, optimizer = start(rank=6, subspace=subspace)
    run(params, optimizer, [6])
    assert [row["rank"] for row in optimizer.stats()] == [4, 4]
    for row, param in zip(optimizer.stats(), params, strict=True):
        energies = torch.linalg.svdvals(param.grad).square()
        share = float(energies[:4].sum() / energies.sum())
        assert row["captured"] == pytest.approx(share, rel=0.05), "of the rank that was taken"


def test_the_peak_of_a_shrinking_state_is_not_kept():
    """The memory of the largest rank is the allocator's again."""
    subspace = Subspace(residual_energy=0.05, stagger=False)
    params, optimizer = start(rank=8, subspace=subspace)
    run(params, optimizer, [6] * GAP)
    before = [row["state_bytes"] for row in optimizer.explain()]
    run(params, optimizer, [0])
    after = [row["state_bytes"] for row in optimizer.explain()]
    assert all(small < 0.5 * large for small, large in zip(after, before, strict=True))


def test_staggered_refreshes_share_the_interval_out():
    params, optimizer = start(count=5, subspace="randomized")
    seen = []
    for seed in range(3 * GAP):
        before = [row["refreshes"] for row in optimizer.stats()] or [0] * len(params)
        run(params, optimizer, [seed])
        after = [row["refreshes"] for row in optimizer.stats()]
        seen.append(sum(b - a for a, b in zip(before, after, strict=True)))
    assert seen[0] == len(params)
    assert seen[1:] == [2] * (3 * GAP - 1), "ten matrices over five steps"
    ages = sorted(row["age"] for row in optimizer.stats())
    assert ages == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]


@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_names_decide_and_not_places(moments):
    """A matrix alone is trained as among others, as in optimizers of one parameter each."""
    rng = torch.Generator().manual_seed(1)
    start_value = torch.randn(40, 16, generator=rng)
    ends = []
    for others in (0, 3):
        names = [f"layers.{i}.weight" for i in range(others)] + ["module.last._orig_mod.weight"]
        names[-1] = names[-1] if others else "last.weight"
        params = [nn.Parameter(start_value.clone()) for _ in names]
        group = {
            "params": list(zip(names, params, strict=True)),
            "rank": 4,
            "update_proj_gap": GAP,
        }
        optimizer = GaLoreAdamW([group], lr=0.05, subspace=Subspace(moments=moments))
        run(params, optimizer, range(2 * GAP))
        ends.append(params[-1].detach())
    assert torch.equal(*ends)


def test_named_matrices_take_turns_too():
    params = [nn.Parameter(torch.zeros(16, 12)) for _ in range(30)]
    names = [f"layers.{index}.weight" for index in range(30)]
    group = {"params": list(zip(names, params, strict=True)), "rank": 4, "update_proj_gap": GAP}
    optimizer = GaLoreAdamW([group])
    run(params, optimizer, range(GAP + 1))
    ages = [row["age"] for row in optimizer.stats()]
    assert all(2 <= ages.count(age) <= 12 for age in range(GAP)), "6 of 30 in the mean"


def test_every_sketch_is_another(monkeypatch):
    """Of another matrix, and of the same one at another step."""
    seeds = []
    randomized = range_finders.RANGE_FINDERS["randomized"]
    monkeypatch.setitem(
        range_finders.RANGE_FINDERS,
        "randomized",
        lambda request: (seeds.extend(request.seeds), randomized(request))[1],
    )
    params, optimizer = start(count=3)
    run(params, optimizer, range(3 * GAP))
    assert len(seeds) == len(set(seeds)) >= 3 * len(params)


def test_a_large_float16_gradient_is_finite():
    """Its norm is not, in its own dtype."""
    weight = nn.Parameter(torch.zeros(40, 16, dtype=torch.float16))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4}])
    weight.grad = gradient((40, 16), 3).sign().half() * 3e4
    optimizer.step()
    assert optimizer.stats()[0]["refreshes"] == 1
    assert weight.isfinite().all()


def test_moments_that_are_reset_begin_their_bias_correction_anew():
    """After a reset a step is as large as a first one: the sign of the gradient, nearly."""
    subspace = Subspace("svd", moments="reset", stagger=False)
    params, optimizer = start(GaLoreAdamW, rank=16, subspace=subspace)
    run(params, optimizer, range(GAP))
    before = [param.detach().clone() for param in params]
    run(params, optimizer, [GAP])
    moved = [param - old for param, old in zip(params, before, strict=True)]
    fresh_params, fresh = start(GaLoreAdamW, rank=16, subspace=subspace)
    for param, old in zip(fresh_params, before, strict=True):
        param.data.copy_(old)
    run(fresh_params, fresh, [GAP])
    for param, old, step in zip(fresh_params, before, moved, strict=True):
        torch.testing.assert_close(step, param.detach() - old)


@pytest.mark.parametrize("moments", ["keep", "carry"])
def test_a_carried_moment_still_points_where_it_did(moments):
    """A basis turned inside its span: carried moments do not notice, kept ones do."""
    params, optimizer = start(GaLoreAdamW, subspace=Subspace(moments=moments, stagger=False))
    run(params, optimizer, range(GAP))
    state = states(params, optimizer)[0]
    before = state["exp_avg"] @ state["basis"].T
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(3)))[0]
    turned = state["basis"] @ turn
    item = refresh.Due("weight", params[0].grad, state, 8, GAP, 0, (0.9, 0.999))
    zeros = torch.zeros(1, dtype=torch.bool)
    found = range_finders.Found(turned.unsqueeze(0), torch.full((1, 8), 0.1), zeros, 0.0)
    (result,) = refresh._judged([item], found, Subspace(moments=moments))
    refresh.take(item, result, Subspace(moments=moments), {})
    after = state["exp_avg"] @ state["basis"].T
    relative = float(torch.dist(after, before) / torch.linalg.norm(before))
    assert (relative <= 1e-6) == (moments == "carry")
    assert state["overlap"] == pytest.approx(1.0, abs=1e-5)


def test_adarankgrad_is_adamw_in_the_full_space():
    """r = d, scale 1, no refresh: torch's AdamW in a rotated basis, here of the identity."""
    rng = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(12, 12, generator=rng, dtype=torch.float64))]
    weights.append(nn.Parameter(weights[0].detach().clone()))
    group = {"params": weights[:1], "rank": 12, "update_proj_gap": 10**6, "scale": 1.0}
    ours = AdaRankGradAdamW([group], lr=0.01, residual_energy=0.0, criterion=None)
    theirs = torch.optim.AdamW(weights[1:], lr=0.01, eps=1e-6, weight_decay=0.0)
    for seed in range(10):
        grad = gradient((12, 12), seed).double()
        for weight in weights:
            weight.grad = grad
        if seed == 0:
            ours.step()
            ours.state[weights[0]]["basis"].copy_(torch.eye(12))
            for key in ("exp_avg", "exp_avg_sq", "step"):
                ours.state[weights[0]][key].zero_()
            weights[0].data.copy_(weights[1])
        ours.step()
        theirs.step()
    torch.testing.assert_close(*weights, rtol=1e-12, atol=1e-12)


def test_a_criterion_renews_a_basis_before_its_interval_is_over():
    criterion = {"criterion": "relative_norm", "threshold": 0.5, "check_gap": 3}
    weight = nn.Parameter(torch.zeros(16, 12))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 100}
    optimizer = AdaRankGradAdamW([group], stagger=False, **criterion)
    steps = []
    for seed in range(30):
        weight.grad = gradient((16, 12), 3, scale=0.9**seed)
        optimizer.step()
        if optimizer.stats()[0]["age"] == 0:
            steps.append(seed)
    assert steps == [0, 9, 18, 27], "0.9^8 < 0.5 <= 0.9^5, looked at after 3, 6 and 9 steps"


# What users see.


def test_stats_tell_what_happened():
    params, optimizer = start(subspace=Subspace("svd", stagger=False), monitor=True)
    assert optimizer.stats() == []
    run(params, optimizer, range(GAP + 2))
    for row, param in zip(optimizer.stats(), params, strict=True):
        state = optimizer.state[param]
        assert row["step"] == GAP + 2
        assert row["rank"] == 8
        assert row["age"] == 1
        assert row["refreshes"] == 2
        grad, basis = gradient(param.shape, GAP), state["basis"]
        low = grad @ basis if param.shape[0] > param.shape[1] else basis.T @ grad
        share = float(low.square().sum() / grad.square().sum())
        assert row["captured"] == pytest.approx(share, rel=1e-4)
        assert 0 < row["overlap"] < 1
        assert (row["kept"], row["fallbacks"], row["deficient"]) == (0, 0, 0)
        assert row["nonfinite"] == 0
    params, optimizer = start()
    run(params, optimizer, range(1))
    assert optimizer.stats()[0]["limited"] is None


def test_the_limiter_and_non_finite_gradients_are_counted():
    params, optimizer = start(monitor=True)
    run(params, optimizer, [3])
    scales = [1.0, 100.0, 100.0, 1.0, float("nan"), 0.0]
    for scale in scales:
        for param in params:
            param.grad = gradient(param.shape, 3, scale)
        optimizer.step()
    for row in optimizer.stats():
        assert row["nonfinite"] == 1
        assert 1 <= row["limited"] <= 3


@pytest.mark.parametrize(
    ("make", "counter"),
    [
        (lambda shape: torch.zeros(shape), "kept"),
        (lambda shape: torch.full(shape, float("nan")), "kept"),
        (lambda shape: torch.full(shape, float("inf")), "kept"),
        (lambda shape: gradient(shape, 0)[:, :1] @ torch.ones(1, shape[1]), "deficient"),
    ],
    ids=["zero", "nan", "inf", "rank 1"],
)
@every_part
def test_a_bad_gradient_at_a_refresh_is_counted_and_survived(part, make, counter):
    subspace = PARTS[part]
    if "stagger" not in subspace.changed():
        subspace = Subspace(**{**subspace.changed(), "stagger": False})
    params, optimizer = start(subspace=subspace)
    run(params, optimizer, range(GAP))
    for state in states(params, optimizer):
        state["gap_factor"] = 1
    for param in params:
        param.grad = make(param.shape)
    optimizer.step()
    for row in optimizer.stats():
        assert row["step"] == GAP + 1
        others = part in ("random", "interpolated")  # directions than the gradient's own
        expected = 0 if counter == "deficient" and others else 1
        assert row[counter] >= expected
    run(params, optimizer, range(GAP, 2 * GAP))
    for param, state in zip(params, states(params, optimizer), strict=True):
        assert param.isfinite().all()
        assert all(torch.as_tensor(value).isfinite().all() for value in state.values())


def test_a_failing_cholesky_is_counted_and_survived(monkeypatch):
    monkeypatch.setattr(
        torch.linalg,
        "cholesky_ex",
        lambda gram: (gram, torch.ones(gram.shape[:-2], dtype=torch.int32)),
    )
    params, optimizer = start(subspace=Subspace(stagger=False))
    run(params, optimizer, range(GAP + 1))
    for row, state in zip(optimizer.stats(), states(params, optimizer), strict=True):
        assert row["fallbacks"] == row["refreshes"] == 2
        overlap = state["basis"].T @ state["basis"]
        torch.testing.assert_close(overlap, torch.eye(8), rtol=0, atol=1e-5)


def test_a_failing_svd_is_counted_and_survived(monkeypatch):
    def failing(*_, **__):
        raise torch.linalg.LinAlgError("did not converge")

    monkeypatch.setattr(torch.linalg, "svd", failing)
    params, optimizer = start(subspace="svd")
    run(params, optimizer, range(1))
    assert [row["fallbacks"] for row in optimizer.stats()] == [1, 1]
    monkeypatch.setattr(torch.linalg, "eigh", failing)
    run(params, optimizer, range(1, GAP + 2))
    for row in optimizer.stats():
        assert (row["kept"], row["refreshes"], row["step"]) == (2, 1, GAP + 2)


def test_one_bad_matrix_of_a_batch_spoils_no_other(monkeypatch):
    """Equal matrices are factored together; alone each is found or kept by itself."""
    exact = range_finders.RANGE_FINDERS["svd"]

    def fails_with_a_large_one(request):
        if float(request.norms.max()) > 1e6:
            raise torch.linalg.LinAlgError("did not converge")
        return exact(request)

    monkeypatch.setitem(range_finders.RANGE_FINDERS, "svd", fails_with_a_large_one)
    params, optimizer = start(count=3, subspace="svd")
    for index, param in enumerate(params):
        param.grad = gradient(param.shape, 3, scale=1e9 if index == 1 else 1.0)
    params[2].grad.zero_()
    optimizer.step()
    assert [row["kept"] for row in optimizer.stats()] == [0, 1, 1, 0, 0, 0]
    assert [row["refreshes"] for row in optimizer.stats()] == [1, 0, 0, 1, 1, 1]


def test_a_refresh_stacks_no_more_than_its_share(monkeypatch):
    """Memory is bounded by the largest matrix, however many are due."""
    batches = []
    randomized = range_finders.RANGE_FINDERS["randomized"]
    monkeypatch.setitem(
        range_finders.RANGE_FINDERS,
        "randomized",
        lambda request: (batches.append(request.matrices.numel()), randomized(request))[1],
    )
    monkeypatch.setattr(refresh, "BATCH_ELEMENTS", 1500)
    params, optimizer = start(count=5)
    run(params, optimizer, range(1))
    assert batches == 10 * [640]
    batches.clear()
    # Elsewhere than on a CPU.
    monkeypatch.setattr(refresh, "device_type", lambda _: "cuda")
    params, optimizer = start(count=5)
    run(params, optimizer, range(1))
    assert sorted(batches) == [640, 640] + 4 * [1280]


# Options and states.


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"range_finder": "qr"}, "range_finder must be one of svd, randomized"),
        ({"moments": "drop"}, "moments must be one of keep, reset"),
        ({"criterion": "loss"}, "criterion must be one of norm"),
        ({"min_rank": 0}, "min_rank must be an int of at least 1, got 0"),
        ({"check_gap": 2.5}, "check_gap must be an int of at least 1, got 2.5"),
        ({"power_iterations": 0}, "power_iterations must be"),
        ({"residual_energy": 1.5}, r"residual_energy must be in \[0, 1\] or None, got 1.5"),
        ({"lazy": -1.0}, "lazy must be"),
        ({"criterion": "norm"}, "criterion='norm' needs a threshold above 0"),
        ({"criterion": "norm", "threshold": float("nan")}, "above 0, .*, got nan"),
        ({"criterion": "norm", "threshold": -1.0}, "above 0, .*, got -1.0"),
        ({"threshold": 0.1}, "threshold=0.1 does nothing without criterion"),
        ({"check_gap": 5}, "check_gap=5 does nothing without criterion"),
        ({"min_rank": 2}, "min_rank=2 does nothing without residual_energy"),
        ({"rank_multiple": 8}, "rank_multiple=8 does nothing without residual_energy"),
        ({"range_finder": "svd", "power_iterations": 2}, "=2 does nothing with range_finder='svd'"),
        ({"range_finder": "random", "residual_energy": 0.1}, "needs directions in the order"),
        ({"range_finder": "gaussian", "moments": "carry"}, "needs an orthonormal basis"),
        ({"interpolation": 1.0}, r"interpolation must be in \[0, 1\), got 1.0"),
        ({"interpolation": -0.1}, "interpolation must be"),
        ({"interpolation": float("nan")}, "interpolation must be .*, got nan"),
        ({"interpolation": 0.9}, "=0.9 does nothing with range_finder='randomized', only with pow"),
        ({"interpolation": 0.9, "range_finder": "power"}, "needs moments that follow the basis"),
        (
            {
                "interpolation": 0.9,
                "range_finder": "power",
                "moments": "carry",
                "residual_energy": 0.1,
            },
            "in the order of the gradient's energy, which interpolation=0.9 does not",
        ),
    ],
)
def test_wrong_subspaces_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Subspace(**options)


@pytest.mark.parametrize("residual_energy", [None, 0.01])
@pytest.mark.parametrize("criterion", [None, "norm"])
def test_adarankgrad_without_its_parts(criterion, residual_energy):
    """A default threshold is no mistake of who asks for no criterion."""
    parts = {"criterion": criterion, "residual_energy": residual_energy}
    params, optimizer = start(AdaRankGradAdamW, **parts)
    run(params, optimizer, range(2))
    assert optimizer.subspace.threshold == (0.0 if criterion is None else 0.1)
    unused = {"check_gap": 7} if criterion is None else {"threshold": 0.0}
    with pytest.raises(ValueError, match=r"does nothing without|needs a threshold"):
        start(AdaRankGradAdamW, **parts, **unused)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValueError, match="needs an orthonormal basis, which range_finder='gauss"):
        start(FiraAdamW, subspace="gaussian")
    start(GaLoreAdamW, subspace="gaussian")
    criterion = {"criterion": "norm", "threshold": 1.0}
    for options in ({"residual_energy": 0.1}, {"moments": "reset"}, criterion):
        with pytest.raises(ValueError, match="capturable=True replays one step"):
            start(FiraAdamW, subspace=Subspace(**options), capturable=True)


def test_states_of_the_first_format_are_read():
    """Written before there were records of refreshes."""
    params, optimizer = start(subspace="svd")
    run(params, optimizer, range(GAP + 1))
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        group["format"] = 1
    for state in old["state"].values():
        for key in ("rank", "salt", *refresh.new_record()):
            if key != "basis_step":
                del state[key]
    others, resumed = start(subspace="svd")
    for param, other in zip(params, others, strict=True):
        other.data.copy_(param)
    resumed.load_state_dict(old)
    assert resumed.stats()[0]["refreshes"] == 0
    run(params, optimizer, range(GAP + 1, 2 * GAP))
    run(others, resumed, range(GAP + 1, 2 * GAP))
    for param, other in zip(params, others, strict=True):
        assert torch.equal(param, other)
    assert resumed.state_dict()["param_groups"][0]["format"] == 3


# The theory, where it holds.


def test_the_gradient_of_a_reversible_layer_loses_rank_geometrically():
    """Lemma 1: G = B W C - A under SGD has |G - G_1|^2 / |G|^2 <= O(c^-t).

    The component of G along the eigenvectors i of B and j of C shrinks by q_ij = 1 - beta_i gamma_j
    a step. The slowest, q_11, survives. Those in its row or column only turn the first direction;
    what they leave outside it is their product, so the second singular value falls, against the
    first, as the larger of q_22 / q_11 and q_12 q_21 / q_11^2.
    """
    rng = torch.Generator().manual_seed(0)
    left, right = (
        torch.linalg.qr(torch.randn(n, n, generator=rng, dtype=torch.float64))[0] for n in (12, 9)
    )
    beta = torch.linspace(0.2, 1.0, 12, dtype=torch.float64)
    gamma = torch.linspace(0.2, 1.0, 9, dtype=torch.float64)
    b, c = left * beta @ left.T, right * gamma @ right.T
    target = torch.randn(12, 9, generator=rng, dtype=torch.float64)
    weight = nn.Parameter(torch.zeros(12, 9, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    shares = []
    for _ in range(400):
        weight.grad = b @ weight.detach() @ c - target
        values = torch.linalg.svdvals(weight.grad)
        shares.append(float(values[1:].square().sum() / values.square().sum()))
        optimizer.step()
    q = (1 - torch.outer(beta, gamma)).tolist()
    ratio = max(q[1][1] / q[0][0], q[0][1] * q[1][0] / q[0][0] ** 2)
    slope = (math.log(shares[399]) - math.log(shares[200])) / 199
    assert slope < -0.05
    assert slope == pytest.approx(2 * math.log(ratio), rel=0.02)
    finder = range_finders.RANGE_FINDERS["randomized"]
    late = weight.grad.unsqueeze(0)
    norms = torch.linalg.vector_norm(late, dim=(1, 2))
    found = finder(range_finders.Request(late, norms, 4, [None], [0], 1))
    assert float(found.energies[0, 0]) > 0.999
