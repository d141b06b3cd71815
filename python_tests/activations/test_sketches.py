"""Sampled rows: unbiased, as noisy as formulas say, and the published choice of what is certain."""

import itertools

import pytest
import torch

from lowrank_kernels.activations.sketches import (
    ROW_METHODS,
    certain_rows,
    random_signs,
    sample_rows,
)

TOKENS, KEPT, DRAWS = 128, 40, 3000
# Spread of the logarithm of norms of x and of h.
TAILS = {"heavy": (1.5, 1.5), "medium": (0.5, 1.0), "flat": (0.01, 0.01)}


def factors(tail):
    rng = torch.Generator().manual_seed(3)

    def rows(width, spread):
        norms = (spread * torch.randn(TOKENS, 1, generator=rng, dtype=torch.float64)).exp()
        return torch.randn(TOKENS, width, generator=rng, dtype=torch.float64) * norms

    spread_x, spread_h = TAILS[tail]
    return rows(12, spread_x), rows(8, spread_h)


def scores_of(x, h):
    return x.norm(dim=1) * h.norm(dim=1)


@pytest.fixture(scope="module")
def found():
    """Of each tail and method: the mean's distance from G in its own errors, and the variance."""
    results = {}
    for tail, method in itertools.product(TAILS, ROW_METHODS):
        x, h = factors(tail)
        gradient, scores = h.T @ x, scores_of(x, h)
        rng, total, squares = torch.Generator().manual_seed(0), 0, 0.0
        for _ in range(DRAWS):
            places, weights = sample_rows(scores, KEPT, method, rng)
            drawn = (h[places] * weights.unsqueeze(1)).T @ x[places]
            total, squares = total + drawn, squares + float((drawn - gradient).square().sum())
        variance = squares / DRAWS
        bias = float((total / DRAWS - gradient).norm()) / (variance / DRAWS) ** 0.5
        results[tail, method] = bias, variance
    return results


def test_the_mean_is_the_gradient(found):
    for case, (bias, _) in found.items():
        assert bias < 4, case


@pytest.mark.parametrize("tail", TAILS)
def test_the_variance_is_that_of_the_formulas(found, tail):
    x, h = factors(tail)
    scores = scores_of(x, h)
    ordered = scores.argsort(descending=True)
    certain = published_choice(scores, KEPT)
    rest = ordered[certain:]
    wta = scores[rest].sum() ** 2 - (h[rest].T @ x[rest]).square().sum()
    formulas = {
        "crs": float((scores.sum() ** 2 - (h.T @ x).square().sum()) / KEPT),
        "wta": float(wta / (KEPT - certain)),
    }
    for method, formula in formulas.items():
        assert found[tail, method][1] == pytest.approx(formula, rel=0.05), method


def test_what_is_certain_and_proportional_is_least_noisy_on_heavy_tails(found):
    variances = [found["heavy", method][1] for method in ("pps", "wta", "crs", "uniform")]
    assert variances == sorted(variances)
    assert variances[0] < 0.7 * variances[1]


def published_choice(scores, count):
    """The c of WTA-CRS, from its text: argmin of (1 - P_c) / (k - c) over 0 <= c < k."""
    shares = sorted((scores / scores.sum()).tolist(), reverse=True)
    ratios = [(1 - sum(shares[:c])) / (count - c) for c in range(count)]
    return ratios.index(min(ratios))


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("count", [1, 12, KEPT, TOKENS - 1])
def test_what_is_certain_is_the_published_choice(tail, count):
    scores = scores_of(*factors(tail))
    ordered = scores.sort(descending=True).values
    left = ordered.flip(0).cumsum(0).flip(0)[:count]
    certain = int(certain_rows(left, count))
    assert certain == published_choice(scores, count)
    places, weights = sample_rows(scores, count, "wta")
    largest = scores.argsort(descending=True)[:certain]
    assert torch.equal(places[:certain], largest)
    assert (weights[:certain] == 1).all()


@pytest.mark.parametrize("tail", TAILS)
def test_rows_come_as_often_as_their_share_and_never_twice(tail):
    scores, rng = scores_of(*factors(tail)), torch.Generator().manual_seed(1)
    counts = torch.zeros(TOKENS, dtype=torch.float64)
    for _ in range(DRAWS):
        places, weights = sample_rows(scores, KEPT, "pps", rng)
        assert len(places.unique()) == KEPT
        counts[places] += 1
    shares = torch.zeros(TOKENS, dtype=torch.float64)
    shares[places] = 1 / weights
    ordered = scores.sort(descending=True).values
    open_rows = next(
        c for c in range(KEPT) if (KEPT - c) * ordered[c] <= ordered[c:].sum() * (1 + 1e-12)
    )
    tau = (KEPT - open_rows) / ordered[open_rows:].sum()
    expected = (tau * scores).clamp(max=1)
    assert float(expected.sum()) == pytest.approx(KEPT)
    drawn = shares > 0
    torch.testing.assert_close(shares[drawn], expected[drawn])
    error = (DRAWS * expected * (1 - expected)).sqrt()
    assert ((counts - DRAWS * expected).abs() <= 4.5 * error + 1e-6).all()


@pytest.mark.parametrize("method", ROW_METHODS)
@pytest.mark.parametrize(
    "scores", [[0.0] * 5, [1.0, 0, 0, 2.0, 0], [1.0] * 5, [1e-300, 1.0, 1e300, 0, 0], [3e38] * 5]
)
def test_rows_without_a_score_have_no_weight(method, scores):
    scores = torch.tensor(scores, dtype=torch.float64)
    for count in range(1, 6):
        places, weights = sample_rows(scores, count, method)
        assert places.shape == weights.shape == (count,)
        assert weights.isfinite().all()
        assert (weights >= 0).all()
        assert (weights[scores[places] == 0] == 0).all()
        sure = int((scores > 0).sum()) <= count and method in ("pps", "uniform")
        if sure:
            assert float(weights.sum()) == pytest.approx(int((scores > 0).sum()))


@pytest.mark.parametrize("method", ROW_METHODS)
def test_what_is_not_finite_stays_in_range(method):
    places, weights = sample_rows(torch.tensor([1.0, float("nan"), 2.0, float("inf")]), 2, method)
    assert ((places >= 0) & (places < 4)).all()
    assert weights.shape == (2,)


def test_random_signs_are_the_identity_in_the_mean():
    like, total = torch.zeros((), dtype=torch.float64), torch.zeros(6, 6, dtype=torch.float64)
    for seed in range(DRAWS):
        signs = random_signs(6, 3, seed, like)
        assert torch.equal(signs.abs(), torch.full((6, 3), 3**-0.5, dtype=torch.float64))
        total += signs @ signs.T
    error = (total / DRAWS - torch.eye(6)).abs().max()
    assert error < 5 * (1 / 3 / DRAWS) ** 0.5
    assert torch.equal(signs, random_signs(6, 3, DRAWS - 1, like))


@pytest.mark.parametrize("method", ["pps", "uniform", "wta", "crs"])
@pytest.mark.parametrize("scored", [1, 2, 5, 8, 11, 12])
def test_rows_of_no_score_leave_the_others_their_weights(method, scored):
    """Fewer rows count than are kept, as behind a mask: without replacement all of them are."""
    scores = torch.zeros(40, dtype=torch.float64)
    scores[::3][:scored] = torch.arange(1.0, scored + 1, dtype=torch.float64)
    sample = sample_rows(scores, 12, method, torch.Generator().manual_seed(0))
    found = torch.zeros(40, dtype=torch.float64).index_add_(0, sample.places, sample.weights)
    assert (found[scores == 0] == 0).all()
    if method in ("pps", "uniform"):
        torch.testing.assert_close(found, (scores != 0).double())
    assert found.sum() > 0


@pytest.mark.parametrize("method", ["pps", "wta", "crs"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_is_seen(method, bad):
    scores = torch.ones(40, dtype=torch.float64)
    scores[7] = bad
    sample = sample_rows(scores, 12, method, torch.Generator().manual_seed(0))
    assert 7 in sample.places
    assert sample.weights.isfinite().all()
    assert (sample.weights > 0).all()
