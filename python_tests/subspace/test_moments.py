"""Moments that follow the basis: exact where that is possible, and V never negative."""

import math

import pytest
import torch

from lowrank_kernels.ops import Side
from lowrank_kernels.subspace.moments import MOMENTS, Corrections, Moments, transferred

CARRIED = [how for how in MOMENTS if how.startswith("carry")]
CORRECTIONS = Corrections(1 - 0.9**10, 1 - 0.999**10)


def basis(rows, rank, rng):
    return torch.linalg.qr(torch.randn(rows, rank, generator=rng, dtype=torch.float64))[0]


def moments(shape, rng):
    """As Adam makes them: V is at least M^2 in corrected terms."""
    draws = torch.randn(30, *shape, generator=rng, dtype=torch.float64)
    exp_avg, exp_avg_sq = torch.zeros(2, *shape, dtype=torch.float64)
    for draw in draws[:10]:
        exp_avg = 0.9 * exp_avg + 0.1 * draw
        exp_avg_sq = 0.999 * exp_avg_sq + 0.001 * draw.square()
    return Moments(exp_avg, exp_avg_sq)


def in_form(side, old):
    return old if side is Side.LEFT else Moments(*(moment.T.contiguous() for moment in old))


@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("how", CARRIED)
def test_a_rotation_inside_the_subspace_leaves_the_first_moment(how, side, rng):
    old_basis = basis(40, 6, rng)
    new_basis = old_basis @ basis(6, 6, rng)
    old = moments((6, 25), rng)
    new = transferred(how, in_form(side, old), new_basis.T @ old_basis, side, CORRECTIONS)
    carried = new.exp_avg if side is Side.LEFT else new.exp_avg.T
    torch.testing.assert_close(new_basis @ carried, old_basis @ old.exp_avg, rtol=0, atol=1e-12)
    single = transferred(
        how,
        Moments(*(m.float() for m in in_form(side, old))),
        (new_basis.T @ old_basis).float(),
        side,
        CORRECTIONS,
    )
    carried = (single.exp_avg if side is Side.LEFT else single.exp_avg.T).double()
    back, before = new_basis @ carried, old_basis @ old.exp_avg
    assert torch.dist(back, before) <= 1e-6 * torch.linalg.norm(before)


@pytest.mark.parametrize("ranks", [(6, 6), (6, 3), (3, 6)], ids=str)
@pytest.mark.parametrize("side", list(Side))
@pytest.mark.parametrize("how", MOMENTS)
def test_shapes_and_signs_at_every_change_of_rank(how, side, ranks, rng):
    old_rank, new_rank = ranks
    old_basis, new_basis = basis(40, old_rank, rng), basis(40, new_rank, rng)
    old = moments((old_rank, 25), rng)
    kept = Moments(*(moment.clone() for moment in in_form(side, old)))
    new = transferred(how, kept, new_basis.T @ old_basis, side, CORRECTIONS)
    shape = (new_rank, 25) if side is Side.LEFT else (25, new_rank)
    for before, after, unchanged in zip(kept, new, in_form(side, old), strict=True):
        assert after.shape == shape
        assert after.is_contiguous()
        assert after.untyped_storage().data_ptr() != before.untyped_storage().data_ptr()
        assert torch.equal(before, unchanged), "the old ones stay until all is known"
    assert (new.exp_avg_sq >= 0).all()


def test_the_literal_formula_does_turn_negative(rng):
    """Why the absolute value is there."""
    overlap = basis(40, 6, rng).T @ basis(40, 6, rng)
    old = moments((6, 25), rng)
    assert (overlap @ old.exp_avg_sq < 0).any()
    new = transferred("carry_absolute", old, overlap, Side.LEFT, CORRECTIONS)
    torch.testing.assert_close(new.exp_avg_sq, (overlap @ old.exp_avg_sq).abs())


def test_keep_and_reset(rng):
    old = moments((4, 25), rng)
    same = transferred("keep", old, torch.eye(4), Side.LEFT, CORRECTIONS)
    assert torch.equal(same.exp_avg, old.exp_avg)
    fewer = transferred("keep", old, torch.zeros(2, 4), Side.LEFT, CORRECTIONS)
    assert torch.equal(fewer.exp_avg_sq, old.exp_avg_sq[:2])
    more = transferred("keep", old, torch.zeros(6, 4), Side.LEFT, CORRECTIONS)
    assert torch.equal(more.exp_avg[:4], old.exp_avg)
    assert not more.exp_avg[4:].any()
    for moment in transferred("reset", old, torch.eye(4), Side.LEFT, CORRECTIONS):
        assert not moment.any()


@pytest.mark.parametrize("how", CARRIED)
def test_the_same_basis_changes_nothing(how, rng):
    old = moments((4, 25), rng)
    new = transferred(how, old, torch.eye(4, dtype=torch.float64), Side.LEFT, CORRECTIONS)
    for before, after in zip(old, new, strict=True):
        torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-15)


def test_ldadam_follows_its_printed_formula(rng):
    """Element by element, from LDAdam's algorithm."""
    overlap = basis(40, 3, rng).T @ basis(40, 3, rng)
    old = moments((3, 2), rng)
    new = transferred("carry_ldadam", old, overlap, Side.LEFT, CORRECTIONS)
    c1, c2 = CORRECTIONS
    for i in range(3):
        for j in range(2):
            carried = sum(float(overlap[i, k] * old.exp_avg[k, j]) for k in range(3))
            spread = sum(
                float(overlap[i, k] ** 2)
                * (float(old.exp_avg_sq[k, j]) / c2 - (float(old.exp_avg[k, j]) / c1) ** 2)
                for k in range(3)
            )
            expected = c2 * abs(spread + (carried / c1) ** 2)
            assert math.isclose(float(new.exp_avg_sq[i, j]), expected, rel_tol=1e-12)


def test_ldadam_takes_the_absolute_value_where_the_difference_is_negative():
    """After a gradient that has grown V < M^2, and a direction that M does not have gets -0.15."""
    turn = torch.tensor([[1.0, -1.0], [1.0, 1.0]], dtype=torch.float64) / math.sqrt(2)
    old = Moments(*(torch.full((2, 1), value, dtype=torch.float64) for value in (0.5, 0.1)))
    new = transferred("carry_ldadam", old, turn, Side.LEFT, Corrections(1.0, 1.0))
    expected = torch.tensor([[0.15], [0.35]], dtype=torch.float64)
    torch.testing.assert_close(new.exp_avg_sq, expected)


def test_the_carried_variance_is_that_of_independent_entries(rng):
    """(C o C) V: the mean square of C x, x with mean squares V, drawn."""
    overlap = basis(12, 4, rng).T @ basis(12, 4, rng)
    mean_sq = torch.rand(4, 1, generator=rng, dtype=torch.float64)
    draws = torch.randn(4, 200_000, generator=rng, dtype=torch.float64) * mean_sq.sqrt()
    drawn = (overlap @ draws).square().mean(1, keepdim=True)
    new = transferred(
        "carry", Moments(torch.zeros_like(mean_sq), mean_sq), overlap, Side.LEFT, CORRECTIONS
    )
    torch.testing.assert_close(new.exp_avg_sq, drawn, rtol=0.02, atol=0)
