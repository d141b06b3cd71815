"""A tiny model, its runs, and what it means that two of them are the same."""

from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import nn

from lowrank_kernels import FiraAdamW, GaLoreAdamW, param_groups

GAP, STOP, STEPS = 3, 4, 9
METHODS = {
    "galore": lambda groups, **options: GaLoreAdamW(groups, **options),
    "fira": lambda groups, **options: FiraAdamW(groups, **options),
    "fira-paper": lambda groups, **options: FiraAdamW(groups, residual="paper", **options),
    "fira-8bit": lambda groups, **options: FiraAdamW(groups, state="int8", basis="int8", **options),
}
# Of those whose steps are the literal ones.
FORMS = {"galore": None, "fira": "official", "fira-paper": "paper"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
every_method = pytest.mark.parametrize("method", METHODS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def tiny_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(12, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 8)
    return nn.Sequential(*layers).to(dtype)


def setup(method, dtype=torch.float32, seed=0, **options):
    model = tiny_model(dtype, seed)
    groups = param_groups(model, rank=3, update_proj_gap=GAP, weight_decay=0.1)
    return model, METHODS[method](groups, **{"lr": 0.01} | options)


def set_grads(model, seed, scale=1.0):
    rng = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        param.grad = (scale * torch.randn(param.shape, generator=rng)).to(param.dtype)


def train(model, optimizer, seeds):
    for seed in seeds:
        set_grads(model, seed)
        optimizer.step()


def assert_same_bits(first, second):
    """Weights and optimizer states of two (model, optimizer) pairs, in bits and dtypes."""
    (model, optimizer), (twin, twin_optimizer) = first, second
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(a, b), name
        state, other = optimizer.state[a], twin_optimizer.state[b]
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert type(other[key]) is type(value), (name, key)
            if isinstance(value, torch.Tensor):
                assert other[key].dtype is value.dtype, (name, key)
                assert torch.equal(other[key], value), (name, key)
            else:
                assert other[key] == value, (name, key)


def assert_same_result(result, expected):
    """(weights, states) of two runs, in bits and dtypes."""
    (weights, states), (expected_weights, expected_states) = result, expected
    for name, value in weights.items():
        assert torch.equal(value, expected_weights[name]), name
    for state, other in zip(states, expected_states, strict=True):
        assert state.keys() == other.keys()
        for key, value in state.items():
            value, expected_value = torch.as_tensor(value), torch.as_tensor(other[key])
            assert value.dtype is expected_value.dtype, key
            assert torch.equal(value, expected_value), key


def uninterrupted(method, dtype=torch.float32, **options):
    model, optimizer = setup(method, dtype, **options)
    train(model, optimizer, range(STEPS))
    return model, optimizer


def loss_of(model, seed, factor=1.0):
    rng = torch.Generator().manual_seed(seed)
    return factor * model(torch.randn(4, 12, generator=rng)).square().mean()


@contextmanager
def process_group(rank, world, store):
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), world), rank=rank, world_size=world
    )
    try:
        yield
    finally:
        dist.destroy_process_group()
