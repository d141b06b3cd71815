"""What a rehearsal takes for offloaded is what `offload_activations` writes."""

import inspect

import pytest
import torch
from activations.llama import HIDDEN, INTERMEDIATE, LAYERS, language_model

from lowrank_kernels import offload_activations, recompute_activations
from lowrank_kernels.activations.dry_offload import AHEAD, IN_FLIGHT, DryOffload
from lowrank_kernels.activations.plan import Training, plan_training
from lowrank_kernels.activations.rehearsal import Conditions, rehearse
from lowrank_kernels.optim.allocations import Allocations

TOKENS, VOCABULARY = 96, 61
HOW = ("plain", "recompute", "checkpointing")


def on_meta(**options):
    with torch.device("meta"):
        return language_model(**options)


def conditions_of(how, share):
    return Conditions("cpu", **({} if how == "plain" else {how: True}), offload=share)


class Real:
    """The second step of a model whose saved tensors a disk takes, up to its backward pass."""

    def __init__(self, how, share, folder):
        model = language_model(use_cache=False).train()
        if how == "recompute":
            recompute_activations(model)
        if how == "checkpointing":
            model.gradient_checkpointing_enable({"use_reentrant": False})
        offload = offload_activations(folder, least=1, keep=1 - share)
        offload.install(model)
        ids = torch.arange(TOKENS).remainder_(60).view(1, TOKENS)
        model(input_ids=ids, labels=ids).loss.backward()
        before = offload.counts.written
        with Allocations() as allocations:
            ids = ids.clone()
            loss = model(input_ids=ids, labels=ids).loss
            assert offload.places_in_use
            self.saved = allocations.live_bytes
        self.written = offload.counts.written - before
        loss.backward()


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("how", HOW)
def test_what_is_left_of_a_forward_is_what_a_disk_leaves(how, share, tmp_path):
    (found,) = rehearse(on_meta(), TOKENS, conditions_of(how, share))
    real = Real(how, share, tmp_path)
    assert (found.saved, found.out) == (real.saved, real.written)
    assert found.out > 0


def test_budgets_are_those_of_the_disk():
    defaults = inspect.signature(offload_activations).parameters
    assert defaults["in_flight"].default == IN_FLIGHT
    assert defaults["ahead"].default == AHEAD


def passes(depth, budget=float("inf")):
    """Bytes after the forward and at the peak of the backward pass, in tensors, and what is out."""
    x = torch.empty(64, 64, device="meta", requires_grad=True)
    away = DryOffload(torch.nn.Identity(), budget * x.nbytes)
    with Allocations() as allocations:
        y = x * 1
        with away:
            for _ in range(depth):
                y = y.exp()
            y = y.sum()
        saved = allocations.live_bytes
        allocations.peak_bytes = saved
        y.backward()
    return saved // x.nbytes, allocations.peak_bytes // x.nbytes, away.out // x.nbytes


def test_what_is_out_holds_nothing_and_comes_one_by_one():
    assert passes(10) == (0, passes(20)[1], 10)
    assert passes(10)[1] <= 4
    # The first half is out; the last half is there when the backward pass begins.
    saved, peak, out = passes(20, budget=10)
    assert (saved, out) == (10, 10)
    assert 10 <= peak <= 13


def test_what_several_need_goes_and_comes_once():
    x = torch.empty(64, 64, device="meta", requires_grad=True)
    away, twin = DryOffload(torch.nn.Identity()), DryOffload(torch.nn.Identity())
    peaks = []
    for context in (away, twin):
        with Allocations() as allocations:
            h = x * 1
            with context:
                y = h.sin() + h.cos() if context is away else h.sin() + h.clone().cos()
            del h
            allocations.peak_bytes = allocations.live_bytes
            y.backward(torch.empty_like(y))
            peaks.append(allocations.peak_bytes)
    assert (away.out, twin.out) == (x.nbytes, 2 * x.nbytes)
    assert peaks[0] == peaks[1]


def test_the_products_of_a_forward():
    (found,) = rehearse(on_meta(), TOKENS, conditions_of("plain", 0.5))
    block = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE
    assert found.products == 2 * TOKENS * (LAYERS * block + VOCABULARY * HIDDEN)
    assert rehearse(on_meta(), TOKENS, Conditions("cpu"))[0].products == 0


def test_a_straight_line_is_above_the_numbers_between():
    model, conditions = on_meta(), conditions_of("plain", 0.5)
    few, some, many = (rehearse(model, tokens, conditions)[0] for tokens in (64, 160, 256))
    line = few.between(many, 0.5)
    assert some.backward_peak <= line.backward_peak <= 1.02 * some.backward_peak
    assert some.out <= 1.02 * line.out
    assert line.products == some.products


def test_what_is_on_its_way_is_in_the_plan():
    """All that is out, since it is less than what may wait."""
    model = on_meta()
    (found,) = rehearse(model, TOKENS, conditions_of("plain", 1.0))
    plan = plan_training(model, None, TOKENS, Training("cpu", offload=1.0))
    assert plan.activations.forward == found.forward_peak + found.out
    assert plan.activations.backward == found.backward_peak + found.out
    assert plan.activations.out == found.out < IN_FLIGHT


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_is_between_none_and_all(share):
    with pytest.raises(ValueError, match="offload must be between 0 and 1"):
        Training("cpu", offload=share)
