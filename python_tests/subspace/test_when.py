"""When a basis changes: intervals, staggered ones, and criteria."""

import itertools

import pytest
import torch

from lowrank_kernels.optim.batches import phase_of
from lowrank_kernels.subspace import Subspace, is_due, is_measured, measure
from lowrank_kernels.subspace.when import LAZY_REFRESHES, Readback, note_overlap


def refreshes(steps, gap, phase=0):
    found, basis_step = [], -1
    for step in range(steps):
        if is_due(step, basis_step, gap, phase):
            found.append(step)
            basis_step = step
    return found


def test_schedule_is_the_official_one_and_catches_up():
    assert refreshes(13, 4) == [0, 4, 8, 12]
    assert is_due(7, -1, 200), "no basis yet"
    assert is_due(201, 0, 200), "missed at 200"
    assert not is_due(201, 200, 200)


@pytest.mark.parametrize("gap", [1, 4, 7])
def test_a_phase_moves_all_but_the_first_and_keeps_the_interval(gap):
    for phase in range(gap):
        first, *later = refreshes(30, gap, phase)
        assert first == 0
        assert later[0] == gap - phase
        assert all(b - a == gap for a, b in itertools.pairwise(later))


def test_waves_are_multiples_of_their_steps_and_keep_the_interval():
    salts = [int(place * 2**32 / 50) for place in range(50)]
    phases = {phase_of({"salt": salt}, 20, Subspace(stagger=8)) for salt in salts}
    assert phases == {0, 8, 16}
    assert {phase_of({"salt": salt}, 20, Subspace()) for salt in salts} == set(range(20))
    assert {phase_of({"salt": salt}, 20, Subspace(stagger=False)) for salt in salts} == {0}
    with pytest.raises(ValueError, match="stagger must be True, False or an int"):
        Subspace(stagger=-1)


def stepped(state, norms, subspace):
    """Steps of a matrix whose R has these norms, in one direction; steps at which it switches."""
    switches, readback, param = [], Readback(), torch.zeros(())
    for step, norm in enumerate(norms):
        due = state["basis_step"] < 0
        if is_measured(state, step, subspace):
            due = due or readback.finish(param, state["measured"]) <= subspace.threshold
        if due:
            switches.append(step)
            state["basis_step"] = step
        measure(state, torch.full((2, 2), norm / 2), step, subspace)
    return switches


def test_the_absolute_norm_switches_once_it_is_small_and_only_when_looked_at():
    subspace = Subspace(criterion="norm", threshold=1.0, check_gap=3)
    norms = [4.0, 3.0, 2.0, 0.5, 0.5, 0.5, 0.5, 5.0, 5.0, 5.0, 5.0, 5.0, 5.0]
    assert stepped({"basis_step": -1}, norms, subspace) == [0, 6]


def test_the_relative_norm_compares_with_the_first_of_the_basis():
    subspace = Subspace(criterion="relative_norm", threshold=0.5, check_gap=2)
    norms = [8.0, 7.0, 6.0, 5.0, 4.0, 3.9, 3.8, 3.7, 3.6, 3.0, 1.9, 1.8, 1.7]
    assert stepped({"basis_step": -1}, norms, subspace) == [0, 6, 12]


def test_a_frozen_direction_switches_and_a_moving_one_does_not():
    subspace = Subspace(criterion="displacement", threshold=0.01, check_gap=5)
    frozen = torch.ones(3, 4)
    state = {"basis_step": 0}
    for step in range(5):
        measure(state, frozen * (step + 1), step, subspace)
    assert is_measured(state, 5, subspace)
    assert float(state["measured"]) <= subspace.threshold
    state = {"basis_step": 0}
    for step in range(5):
        angle = torch.tensor(0.2 * step)
        measure(state, torch.stack([angle.cos(), angle.sin()]).reshape(1, 2), step, subspace)
    chord = 2 * torch.tensor(0.4).sin()
    torch.testing.assert_close(state["measured"], chord / 4)
    assert float(state["measured"]) > subspace.threshold


@pytest.mark.parametrize("criterion", ["relative_norm", "displacement"])
@pytest.mark.parametrize("zero_at", [0, 1])
def test_a_zero_projection_leaves_finite_measures(criterion, zero_at):
    """As of a gradient that was not finite."""
    subspace = Subspace(criterion=criterion, threshold=0.5, check_gap=2)
    state = {"basis_step": 0}
    for step in range(2):
        measure(state, torch.full((2, 2), float(step != zero_at)), step, subspace)
    assert all(torch.as_tensor(value).isfinite().all() for value in state.values())


def test_the_first_step_of_a_basis_is_no_standstill():
    subspace = Subspace(criterion="displacement", threshold=0.5, check_gap=1)
    state = {"basis_step": 0, "measured": torch.zeros(())}
    assert measure(state, torch.ones(2, 2), 0, subspace)
    assert float(state["measured"]) > subspace.threshold


def test_nothing_is_measured_without_a_criterion():
    assert not is_measured({"basis_step": 0}, 50, Subspace(check_gap=50))
    assert is_measured({"basis_step": 0}, 50, Subspace(criterion="norm", threshold=1.0))
    assert not is_measured({"basis_step": 50}, 50, Subspace(criterion="norm", threshold=1.0))


def test_lazy_intervals_double_after_enough_overlap():
    subspace = Subspace(lazy=0.4)

    def gap_factor(overlap, refreshes=LAZY_REFRESHES, before=1, subspace=subspace):
        overlaps = torch.full((LAZY_REFRESHES,), overlap)
        state = {"overlaps": overlaps, "refreshes": refreshes, "gap_factor": before}
        note_overlap(state, overlap, subspace)
        return state["gap_factor"]

    assert gap_factor(0.5) == 2
    assert gap_factor(0.5, LAZY_REFRESHES - 1) == 1, "too few to tell"
    assert gap_factor(0.3, before=4) == 4
    assert gap_factor(0.5, 99, before=2**16) == 2**16, "the interval stays an int"
    assert gap_factor(0.5, subspace=Subspace()) == 1
