"""Optimizers of shards, saved and loaded: on as many ranks in every bit, else as one process."""

from functools import partial

import pytest
import torch
from integration.ranks import mesh_of, on_ranks
from integration.saved_runs import OPTIONS, dicts_of, fresh, go_on, loaded, result_of
from integration.spread_runs import STEPS, spreads
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import Shard, distribute_tensor

# The first test of each world size waits for all that its ranks do.
pytestmark = pytest.mark.timeout(900)

STOP = 5
SAVED = ("fira", "adaptive", "displacement", "sign, averaged", "orthogonal, averaged")


def saving(rank, world, folder):
    """Runs that are saved at `STOP` and go on, and what is loaded at once on the same ranks."""
    spread, results = next(iter(spreads(world).values())), {}
    for method in SAVED:
        model, optimizer = fresh(spread, method)
        go_on(model, optimizer, spread, range(STOP))
        for form, options in OPTIONS.items():
            dcp.save(dicts_of(model, optimizer, options), checkpoint_id=folder / method / form)
        full = StateDictOptions(full_state_dict=True, cpu_offload=True)
        every = dicts_of(model, optimizer, full)
        if rank == 0:
            torch.save(every, folder / method / "full.pt")
        go_on(model, optimizer, spread, range(STOP, STEPS))
        results[method, "uninterrupted"] = result_of(model, optimizer)
        for form in OPTIONS:
            model, optimizer = loaded(spread, method, form, folder / method / form)
            go_on(model, optimizer, spread, range(STOP, STEPS))
            results[method, form] = result_of(model, optimizer)
    return results


def loading(rank, world, folder):
    """What other ranks have saved, in every form; half of them plainly, of one process."""
    spread, results = next(iter(spreads(world).values())), {}
    for method in SAVED:
        model, optimizer = loaded(spread, method, "nested", folder / method / "nested")
        go_on(model, optimizer, spread, range(STOP, STEPS))
        results[method, "nested"] = result_of(model, optimizer)
        model, optimizer = fresh(spread, method)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        every = {"model": {}, "optimizer": {}}
        if rank == 0:
            every = torch.load(folder / method / "full.pt", weights_only=True)
        set_model_state_dict(model, every["model"], options=options)
        set_optimizer_state_dict(model, optimizer, every["optimizer"], options=options)
        go_on(model, optimizer, spread, range(STOP, STEPS))
        results[method, "full"] = result_of(model, optimizer)
    return results


def of_one_process(rank, world):
    """A state dict of plain tensors, loaded by all ranks."""
    mesh = mesh_of(world)

    def spread(value):
        return distribute_tensor(value, mesh, [Shard(0)])

    model, optimizer = fresh(torch.clone, "fira")
    go_on(model, optimizer, torch.clone, range(STOP))
    twin, resumed = fresh(spread, "fira")
    for here, one in zip(twin.values(), model.values(), strict=True):
        here.data.copy_(spread(one.detach()))
    resumed.load_state_dict(optimizer.state_dict())
    go_on(twin, resumed, spread, range(STOP, STEPS))
    with pytest.raises(ValueError, match="which is none here: save it with") as error:
        optimizer.load_state_dict(resumed.state_dict())
    return result_of(twin, resumed), str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    functions = (partial(saving, folder=folder), of_one_process)
    return on_ranks(2, functions, tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module", params=(3, 4))
def resumed(request, saved, folder, tmp_path_factory):
    return on_ranks(request.param, [partial(loading, folder=folder)], tmp_path_factory.mktemp("r"))


@pytest.fixture(scope="module")
def expected():
    found = {}
    for method in SAVED:
        model, optimizer = fresh(torch.clone, method)
        go_on(model, optimizer, torch.clone, range(STEPS))
        found[method] = result_of(model, optimizer)
    return found


def assert_near(result, expected):
    for here, one in zip(result[0], expected[0], strict=True):
        assert here.shape == one.shape
        assert (here - one).abs().max() <= 1e-10 * one.abs().max()


def test_as_many_ranks_resume_in_every_bit(saved):
    for found in saved["saving"]:
        for (method, form), (tensors, states) in found.items():
            straight, straight_states = found[method, "uninterrupted"]
            assert all(map(torch.equal, tensors, straight)), (method, form)
            for state, other in zip(states, straight_states, strict=True):
                assert state.keys() == other.keys()
                for key, value in state.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def test_other_ranks_go_on_as_one_process(resumed, expected):
    """Three of FSDP2, and two by two of HSDP."""
    for found in resumed["loading"]:
        for (method, _), result in found.items():
            assert_near(result, expected[method])


@pytest.mark.parametrize("method", SAVED)
def test_one_process_goes_on(method, saved, folder, expected):
    model, optimizer = loaded(torch.clone, method, "flat", folder / method / "flat")
    go_on(model, optimizer, torch.clone, range(STOP, STEPS))
    assert_near(result_of(model, optimizer), expected[method])


def test_ranks_go_on_from_a_state_dict_of_one_process(saved, expected):
    for result, _ in saved["of_one_process"]:
        assert_near(result, expected["fira"])
