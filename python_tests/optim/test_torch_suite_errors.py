"""What optimizers refuse: when they are built, when a group is added, and at the head of a step."""

import math

import pytest
import torch
from optim.torch_suite import (
    KINDS,
    TORCH,
    assert_same,
    every_kind,
    model,
    set_grads,
    snapshot,
    train,
)
from torch import nn

INF, NAN = math.inf, math.nan
BAD = [
    ("lr", -1e-3, ValueError),
    ("lr", NAN, ValueError),
    ("lr", "1e-2", TypeError),
    ("lr", None, TypeError),
    ("lr", torch.tensor([0.001, 0.001]), ValueError),
    ("lr", torch.tensor(NAN), ValueError),
    ("eps", -1e-8, ValueError),
    ("eps", NAN, ValueError),
    ("eps", "1e-8", TypeError),
    ("weight_decay", -1.0, ValueError),
    ("weight_decay", NAN, ValueError),
    ("weight_decay", "0.1", TypeError),
    ("betas", (1.0, 0.0), ValueError),
    ("betas", (0.9, 1.0), ValueError),
    ("betas", (-0.1, 0.9), ValueError),
    ("betas", (0.9, NAN), ValueError),
    ("betas", (INF, 0.9), ValueError),
    ("betas", ("0.9", "0.99"), TypeError),
]
INFINITE = [  # taken by torch, whose first step then leaves no finite weight
    ("lr", INF, ValueError),
    ("lr", torch.tensor(INF), ValueError),
    ("eps", INF, ValueError),
    ("weight_decay", INF, ValueError),
]
PROJECTION = [
    ("rank", 0, ValueError),
    ("rank", 2.5, TypeError),
    ("rank", "2", TypeError),
    ("update_proj_gap", 0, ValueError),
    ("update_proj_gap", 2.5, TypeError),
    ("scale", -1.0, ValueError),
    ("scale", NAN, ValueError),
    ("scale", INF, ValueError),
    ("scale", "0.25", TypeError),
    ("proj_type", "middle", ValueError),
]


def rows(**tables):
    params = [
        pytest.param(KINDS[name], *row, id=f"{name}-{row[0]}={row[1]}")
        for name, table in tables.items()
        for row in table
    ]
    return pytest.mark.parametrize(("kind", "option", "value", "error"), params)


@rows(torch=BAD, plain=BAD + INFINITE, fira=BAD + INFINITE)
def test_a_bad_default(kind, option, value, error):
    with pytest.raises(error):
        kind(model().parameters(), **{option: value})


@rows(plain=BAD + INFINITE, fira=BAD + INFINITE + PROJECTION)
def test_a_bad_group_is_not_added(kind, option, value, error):
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = kind(model().parameters())
    count = len(optimizer.param_groups)
    (group,) = kind.divided({"params": [weight]})
    with pytest.raises(error):
        optimizer.add_param_group({**group, option: value})
    assert len(optimizer.param_groups) == count


@pytest.mark.parametrize("place", [0, -1], ids=["first", "last"])
@rows(plain=BAD + INFINITE, fira=BAD + INFINITE + PROJECTION)
def test_a_bad_option_that_comes_later_stops_a_step_before_it_begins(
    kind, option, value, error, place
):
    """Schedulers and users write to groups; the groups before the bad one have not moved either."""
    module = model()
    optimizer = kind([{"params": [param]} for param in module.parameters()], lr=0.01)
    train(module, optimizer, range(2))
    set_grads(module.parameters(), 2)
    before = snapshot(module, optimizer)
    projects = option in {row[0] for row in PROJECTION}
    groups = [group for group in optimizer.param_groups if "rank" in group or not projects]
    groups[place][option] = value
    with pytest.raises(error):
        optimizer.step()
    assert_same(before, snapshot(module, optimizer))


@every_kind
def test_parameters_of_two_groups_or_half_named(kind):
    first, second = nn.Parameter(torch.ones(1, 1)), nn.Parameter(torch.ones(1, 1))
    with pytest.raises(TypeError, match="should be an iterable of Tensors or dicts"):
        kind.cls(first)
    with pytest.raises(ValueError, match="optimizer got an empty parameter list"):
        kind.cls([])
    with pytest.raises(ValueError, match="appear in more than one parameter group"):
        kind([{"params": [first]}, {"params": [first]}])
    with pytest.raises(ValueError, match="should be with/without names"):
        kind([("weight", first), second])
    with pytest.raises(ValueError, match="cannot add param group with names"):
        kind([{"params": [first]}, {"params": [("weight", second)]}])
    with pytest.raises(TypeError, match="ordered"):
        kind.cls([{"params": {first, second}}])
    with pytest.raises(ValueError, match="can't optimize a non-leaf Tensor"):
        kind([first * 2])


@every_kind
def test_duplicate_parameters_of_a_group_are_warned_of(kind):
    weight = nn.Parameter(torch.ones(4, 3))
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters"):
        kind([weight, weight])


@every_kind
def test_sparse_gradients_change_nothing(kind):
    """No AdamW takes them."""
    module = model()
    optimizer = kind(module.named_parameters())
    train(module, optimizer, range(2))
    before = snapshot(module, optimizer)
    module[2].weight.grad = module[2].weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    if kind is not TORCH:  # torch's step has moved what comes before
        assert_same(before, snapshot(module, optimizer))
