"""What a rehearsal without memory counts is what a real pass allocates, to the byte."""

import pytest
import torch
from activations.llama import (
    EAGER_NORM,
    HIDDEN,
    LAYER,
    LENGTH,
    RECOMPUTED_LAYER,
    language_model,
    whole,
)

from lowrank_kernels import (
    FiraAdamW,
    GaLoreAdamW,
    param_groups,
    project_linears,
    recompute_activations,
)
from lowrank_kernels.activations.plan import Planner, Training, plan_training
from lowrank_kernels.activations.rehearsal import Conditions, Rehearsal, rehearse
from lowrank_kernels.optim.allocations import Allocations
from lowrank_kernels.optim.groups import is_projected
from lowrank_kernels.optim.state import new_state
from lowrank_kernels.optim.workspace import planned_alone, planned_workspace

TOKENS = 96


def on_meta(**options):
    with torch.device("meta"):
        return language_model(**options)


class Real:
    """A pass with memory, as `rehearse` counts it, twice."""

    def __init__(self, model, tokens, releases=False):
        self.peaks = []
        params = list(model.parameters())
        places = torch.arange(tokens).remainder_(60).view(1, tokens)
        with Allocations() as allocations:
            # Equal tokens would have no basis of any rank above 1.
            ids = places.clone()
            loss = model(input_ids=ids, labels=ids).loss
            self.saved, self.forward = allocations.live_bytes, allocations.peak_bytes
            allocations.peak_bytes = self.saved

            def whole(param):
                if releases:
                    param.grad = None

            handles = [param.register_post_accumulate_grad_hook(whole) for param in params]
            loss.backward()
            self.backward = allocations.peak_bytes
            for handle in handles:
                handle.remove()
            for param in params:
                param.grad = None


def assert_same(found: Rehearsal, real: Real):
    assert (found.saved, found.forward_peak) == (real.saved, real.forward)
    assert found.backward_peak == real.backward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_pass_is_what_is_allocated(dtype, recompute):
    (found,) = rehearse(on_meta(dtype=dtype), TOKENS, Conditions("cpu", recompute=recompute))
    model = language_model(dtype=dtype, use_cache=False)
    if recompute:
        recompute_activations(model)
    assert_same(found, Real(model, TOKENS))
    assert found.backward_peak_of_one({}) == Real(model, TOKENS, releases=True).backward


def test_a_pass_with_checkpoints():
    model = language_model(use_cache=False).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    (found,) = rehearse(on_meta(), TOKENS, Conditions("cpu", checkpointing=True))
    assert_same(found, Real(model, TOKENS))


@pytest.mark.parametrize("recompute", [False, True])
def test_the_first_pass_with_projected_gradients(recompute):
    twin, model = on_meta(), language_model(use_cache=False)
    planned, optimizer = (GaLoreAdamW(param_groups(each, 8)) for each in (twin, model))
    conditions = Conditions("cpu", recompute=recompute, project=planned)
    first, later = rehearse(twin, TOKENS, conditions)
    assert not planned.state
    assert not any("forward" in vars(module) for module in twin.modules())
    for group in filter(is_projected, optimizer.param_groups):
        for param in group["params"]:
            optimizer.state[param].update(new_state(param, group, 0, optimizer.method))
    if recompute:
        recompute_activations(model)
    project_linears(model, optimizer)
    assert_same(first, Real(model, TOKENS))
    # One whole gradient in the place of its R.
    largest = max(p.numel() for p in model.model.layers.parameters())
    assert 0 < later.gradients - first.gradients < 2 * largest


@pytest.mark.parametrize(
    ("recompute", "layer", "norm"),
    [(False, LAYER, EAGER_NORM + 2 * HIDDEN), (True, RECOMPUTED_LAYER, 2 * HIDDEN)],
)
def test_what_is_saved_by_formula(recompute, layer, norm):
    """And the loss itself, with a number or two of the model's."""
    twice = 2 * LENGTH  # as many tokens as the formula has, in one sequence
    (found,) = rehearse(on_meta(), twice, Conditions("cuda", recompute=recompute))
    rotations = 2 * 2 * LENGTH * HIDDEN // 4
    assert 0 <= found.saved - (whole(layer, norm) + rotations) <= 1024


def test_a_straight_line_is_above_the_numbers_between():
    model, conditions = on_meta(), Conditions("cuda")
    few, some, many = (rehearse(model, tokens, conditions)[0] for tokens in (64, 160, 256))
    line = few.between(many, 0.5)
    for found, real in ((line.backward_peak, some.backward_peak), (line.saved, some.saved)):
        assert real <= found <= 1.01 * real


def test_heads_that_share_keys():
    model = on_meta(num_key_value_heads=2)
    saved = [rehearse(model, TOKENS, Conditions(device))[0].saved for device in ("cuda", "cpu")]
    # Keys and values of half the heads, where the kernel takes them so.
    assert saved[0] < saved[1]


def test_a_model_on_the_meta_device_is_looked_through_as_a_real_one():
    assert recompute_activations(on_meta()).rows == recompute_activations(language_model()).rows


@pytest.mark.parametrize("how", ["plain", "release", "accumulate", "project", "offload"])
def test_the_most_tokens_fit_and_more_do_not(how):
    model = on_meta()
    optimizer = GaLoreAdamW(param_groups(model, 8))
    training = Training("cpu", **({} if how == "plain" else {how: True}))
    planner = Planner(model, training)
    memory = planner.plan(optimizer, 500).total
    most = planner.most_tokens(optimizer, memory)
    assert 490 <= most <= 500
    assert plan_training(model, optimizer, most, training).total <= memory
    assert planner.most_tokens(optimizer, 1000) == 0


def test_what_saves_memory():
    model = on_meta()
    galore, fira = (kind(param_groups(model, 8)) for kind in (GaLoreAdamW, FiraAdamW))

    def total(optimizer=galore, tokens=TOKENS, **options):
        return plan_training(model, optimizer, tokens, Training("cpu", **options)).total

    assert total(recompute=True) < total()
    assert total(checkpointing=True) < total()
    assert total(project=True, accumulate=True) < total(accumulate=True)
    assert total(project=True) <= total()
    assert total(tokens=2, release=True) < total(tokens=2)
    assert total() < total(accumulate=True)
    with pytest.raises(ValueError, match="FiraAdamW takes whole gradients"):
        total(fira, project=True)
    with pytest.raises(ValueError, match="AdamW takes whole gradients"):
        total(None, project=True)
    with pytest.raises(ValueError, match="exclude each other"):
        Training(release=True, accumulate=True)


def test_the_peak_is_where_the_most_is_held():
    model = on_meta()
    plan = plan_training(model, GaLoreAdamW(param_groups(model, 8)), 500, Training("cuda"))
    assert plan.at == "backward"
    assert plan.total == plan.peaks["backward"] + plan.allowance
    few = plan_training(model, GaLoreAdamW(param_groups(model, 8)), 1, Training("cpu"))
    assert few.at == "step"
    held = few.weights + few.state + few.gradients
    assert few.total == held + few.workspace.step == few.peaks["step"]


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_the_workspace_of_a_step_with_projected_gradients(backend):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(60, 201), torch.nn.Linear(201, 90)).bfloat16()
    groups = [{"params": [p for p in model.parameters() if p.dim() == 2], "rank": 8}]
    optimizer = GaLoreAdamW(groups, backend=backend)
    project_linears(model, optimizer)
    for _ in range(2):
        model(torch.randn(70, 60).bfloat16()).square().sum().backward()
        with Allocations() as allocations:
            optimizer.step()
        optimizer.zero_grad()
    planned = planned_workspace(optimizer, "cpu", projected=set(groups[0]["params"]))
    assert planned.step == allocations.peak_bytes
    assert planned.step <= planned_workspace(optimizer, "cpu").step


@pytest.mark.parametrize("basis", ["weight", "int8"])
def test_the_workspace_of_one_at_a_time(basis):
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((60, 201), (90, 60), (60, 201))]
    plain = torch.nn.Parameter(torch.zeros(70))
    kinds = [{"params": params, "rank": 8}, {"params": [plain]}]
    alone = planned_alone(FiraAdamW(kinds, basis=basis), "cpu")
    assert set(alone) == {*params, plain}
    for param in params:
        by_itself = planned_workspace(
            FiraAdamW([{"params": [param], "rank": 8}], basis=basis), "cpu"
        )
        assert alone[param].step - alone[param].held == by_itself.step - by_itself.held
        assert alone[param].refresh - alone[param].held == by_itself.refresh - by_itself.held
        assert alone[param].held == alone[plain].held >= by_itself.held
