"""Optimizers under tensor parallelism, saved and loaded: on the same mesh in every bit, on another
one and under FSDP2 as one process.
"""

from functools import partial

import pytest
import torch
from integration.ranks import on_ranks
from integration.saved_runs import dicts_of, fresh, go_on, loaded, result_of
from integration.spread_runs import STEPS, spreads, ways
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.tensor import distribute_tensor

# The first test of each world size waits for all that its ranks do.
pytestmark = pytest.mark.timeout(900)

STOP = 5
METHOD = "adaptive"


def spreading(way):
    return lambda value: distribute_tensor(value, *way, src_data_rank=None)


def right_ways(world):
    """Of those, the ones that go with bases on the right, as FSDP2's do."""
    return {name: spreading(way) for name, way in ways(world).items() if "rowwise" not in name}


def saving(rank, world, folder):
    """On every mesh: whether it resumes in every bit, and what is saved for others."""
    results = {}
    for where, spread in right_ways(world).items():
        model, optimizer = fresh(spread, METHOD)
        go_on(model, optimizer, spread, range(STOP))
        saved = dicts_of(model, optimizer, StateDictOptions())
        dcp.save(saved, checkpoint_id=folder / where)
        go_on(model, optimizer, spread, range(STOP, STEPS))
        straight = result_of(model, optimizer)
        model, optimizer = loaded(spread, METHOD, "nested", folder / where)
        go_on(model, optimizer, spread, range(STOP, STEPS))
        results[where] = straight, result_of(model, optimizer)
    return results


def loading(rank, world, folder):
    """FSDP2 goes on with what every mesh has saved, and saves for them."""
    spread, results = next(iter(spreads(world).values())), {}
    for path in sorted(folder.iterdir()):
        model, optimizer = loaded(spread, METHOD, "nested", path)
        go_on(model, optimizer, spread, range(STOP, STEPS))
        results[path.name] = result_of(model, optimizer)
    model, optimizer = fresh(spread, METHOD)
    go_on(model, optimizer, spread, range(STOP))
    dcp.save(dicts_of(model, optimizer, StateDictOptions()), checkpoint_id=folder / "fsdp")
    return results


def going_on(rank, world, folder):
    """Every mesh goes on with what FSDP2 has saved."""
    results = {}
    for where, spread in right_ways(world).items():
        model, optimizer = loaded(spread, METHOD, "nested", folder / "fsdp")
        go_on(model, optimizer, spread, range(STOP, STEPS))
        results[where] = result_of(model, optimizer)
    return results


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def saved(folder, tmp_path_factory):
    return on_ranks(4, [partial(saving, folder=folder)], tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def under_fsdp(saved, folder, tmp_path_factory):
    return on_ranks(2, [partial(loading, folder=folder)], tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def back(under_fsdp, folder, tmp_path_factory):
    return on_ranks(4, [partial(going_on, folder=folder)], tmp_path_factory.mktemp("ranks"))


@pytest.fixture(scope="module")
def expected():
    model, optimizer = fresh(torch.clone, METHOD)
    go_on(model, optimizer, torch.clone, range(STEPS))
    return result_of(model, optimizer)


def assert_near(result, expected):
    for here, one in zip(result[0], expected[0], strict=True):
        assert here.shape == one.shape
        assert (here - one).abs().max() <= 1e-10 * one.abs().max()


def test_the_same_mesh_resumes_in_every_bit(saved):
    for found in saved["saving"]:
        for where, (straight, resumed) in found.items():
            assert all(map(torch.equal, straight[0], resumed[0])), where
            for state, other in zip(straight[1], resumed[1], strict=True):
                assert state.keys() == other.keys()
                for key, value in state.items():
                    assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def test_fsdp_goes_on_as_one_process(under_fsdp, expected):
    for found in under_fsdp["loading"]:
        assert len(found) == 3
        for result in found.values():
            assert_near(result, expected)


def test_meshes_go_on_from_fsdp_as_one_process(back, expected):
    for found in back["going_on"]:
        for result in found.values():
            assert_near(result, expected)
