"""torch.distributed.checkpoint: nested, flat and full state dicts."""

import copy

import pytest
import torch
from integration.tiny_runs import (
    GAP,
    STEPS,
    STOP,
    assert_same_bits,
    every_dtype,
    every_method,
    set_grads,
    setup,
    train,
    uninterrupted,
)
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from lowrank_kernels import FiraAdamW, Subspace, param_groups

CHECKPOINTS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full on the CPU": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
every_checkpoint = pytest.mark.parametrize("options", CHECKPOINTS.values(), ids=CHECKPOINTS)


def distributed_state(model, optimizer, options):
    return {
        "model": get_model_state_dict(model, options=options),
        "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
    }


def set_distributed_state(model, optimizer, state, options):
    set_model_state_dict(model, state["model"], options=options)
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)


@every_method
@every_dtype
@every_checkpoint
def test_distributed_checkpoint_resumes_bit_for_bit(options, dtype, method, tmp_path):
    """Saved to files; the template to load into comes from a zero-gradient step, as torch does."""
    model, optimizer = setup(method, dtype)
    train(model, optimizer, range(STOP))
    dcp.save(distributed_state(model, optimizer, options), checkpoint_id=tmp_path, no_dist=True)

    twin, resumed = setup(method, dtype, seed=1)
    before = [param.detach().clone() for param in twin.parameters()]
    template = distributed_state(twin, resumed, options)
    for param, value in zip(twin.parameters(), before, strict=True):
        assert torch.equal(param, value)
        assert param.grad is None
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_distributed_state(twin, resumed, template, options)
    assert_same_bits((model, optimizer), (twin, resumed))
    train(twin, resumed, range(STOP, STEPS))
    assert_same_bits((twin, resumed), uninterrupted(method, dtype))


# Everything that keeps something of its own in the state; half of the energy needs 2 directions.
SUBSPACES = {
    "norm": Subspace(criterion="norm", threshold=1e-3, check_gap=2),
    "relative_norm": Subspace(criterion="relative_norm", threshold=0.9, check_gap=2),
    "displacement": Subspace(criterion="displacement", threshold=0.9, check_gap=2),
    "lazy": Subspace(lazy=0.0),
    "adaptive": Subspace(residual_energy=0.65, moments="carry"),
    "adaptive displacement": Subspace(
        residual_energy=0.65, criterion="displacement", threshold=0.9, check_gap=2
    ),
}


@pytest.mark.parametrize("subspace", SUBSPACES.values(), ids=SUBSPACES)
@every_checkpoint
def test_what_a_subspace_keeps_is_in_the_checkpoint(options, subspace, tmp_path):
    """Enough steps before and after for lazy intervals to grow and for criteria to decide."""
    stop, steps = 7 * GAP + 1, 11 * GAP
    run = setup("fira", subspace=subspace, monitor=True)
    train(*run, range(stop))
    if subspace.residual_energy:
        assert run[1].stats()[0]["rank"] < 3
    dcp.save(distributed_state(*run, options), checkpoint_id=tmp_path, no_dist=True)
    twin = setup("fira", seed=1, subspace=subspace, monitor=True)
    template = distributed_state(*twin, options)
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_distributed_state(*twin, template, options)
    assert_same_bits(run, twin)
    train(*run, range(stop, steps))
    train(*twin, range(stop, steps))
    assert_same_bits(run, twin)


@pytest.mark.parametrize("subspace", SUBSPACES.values(), ids=SUBSPACES)
def test_a_plain_state_dict_loaded_in_place(subspace, tmp_path):
    """Without torch's helpers, into an optimizer that has stepped: numbers lie under texts."""
    run = setup("fira", subspace=subspace)
    train(*run, range(2 * GAP + 1))
    state = {"model": run[0].state_dict(), "optimizer": run[1].state_dict()}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    twin = setup("fira", seed=1, subspace=subspace)
    train(*twin, range(1))
    state = {"model": twin[0].state_dict(), "optimizer": twin[1].state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    twin[0].load_state_dict(state["model"])
    twin[1].load_state_dict(state["optimizer"])
    assert_same_bits(run, twin)
    assert set(twin[1].state) == set(twin[0].parameters())


@every_method
@every_checkpoint
def test_state_set_on_a_fresh_optimizer(options, method):
    """Without a template: torch makes the state by a zero-gradient step inside the setter."""
    model, optimizer = setup(method, torch.bfloat16)
    train(model, optimizer, range(STOP))
    state = copy.deepcopy(distributed_state(model, optimizer, options))
    twin, resumed = setup(method, torch.bfloat16, seed=1)
    set_distributed_state(twin, resumed, state, options)
    train(twin, resumed, range(STOP, STEPS))
    assert_same_bits((twin, resumed), uninterrupted(method, torch.bfloat16))


def test_flat_state_is_keyed_by_names():
    model, optimizer = setup("fira")
    train(model, optimizer, range(STOP))
    options = CHECKPOINTS["flat"]
    flat = get_optimizer_state_dict(model, optimizer, options=options)
    state = optimizer.state[model[3].weight]
    for key in ("step", "exp_avg", "exp_avg_sq", "basis", "side", "basis_step", "limiter_norm"):
        assert f"state.3.weight.{key}" in flat
    assert torch.equal(flat["state.3.weight.basis"], state["basis"])
    assert flat["param_groups.3.weight.rank"] == 3
    assert "param_groups.3.bias.rank" not in flat


@every_checkpoint
def test_distributed_checkpoint_with_frozen_and_tied_parameters(options, tmp_path):
    def make(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 12), nn.Linear(12, 16, False))
        model[2].weight = model[0].weight
        model[1].bias.requires_grad_(False)
        return model, FiraAdamW(param_groups(model, rank=3, update_proj_gap=GAP), lr=0.01)

    def run(model, optimizer, seeds):
        for seed in seeds:
            set_grads(model, seed)
            model[1].bias.grad = None
            optimizer.step()

    model, optimizer = make(0)
    run(model, optimizer, range(STOP))
    dcp.save(distributed_state(model, optimizer, options), checkpoint_id=tmp_path, no_dist=True)
    twin, resumed = make(1)
    template = distributed_state(twin, resumed, options)
    dcp.load(template, checkpoint_id=tmp_path, no_dist=True)
    set_distributed_state(twin, resumed, template, options)
    run(model, optimizer, range(STOP, STEPS))
    run(twin, resumed, range(STOP, STEPS))
    assert_same_bits((model, optimizer), (twin, resumed))
