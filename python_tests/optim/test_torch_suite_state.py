"""State dicts, copies and pickles, as torch tests its own optimizers."""

import copy
import io
import pickle

import pytest
import torch
from optim.torch_suite import (
    GAP,
    OURS,
    assert_same,
    every_input,
    every_kind,
    every_one_of_ours,
    model,
    set_grads,
    snapshot,
    train,
)

HALF = 2 * GAP - 1  # between two refreshes


def members(module, named):
    return list(module.named_parameters() if named else module.parameters())


def trained(kind, named=True, dtype=torch.float32, steps=HALF, **options):
    module = model(dtype)
    optimizer = kind(members(module, named), **{"lr": 0.01, **options})
    train(module, optimizer, range(steps))
    return module, optimizer


def resumed(kind, run, file=None, named=True, **options):
    """Another model and optimizer with the weights and the state dict of `run`."""
    module = copy.deepcopy(run[0])
    optimizer = kind(members(module, named), **{"lr": 0.01, **options})
    # torch's own load_state_dict takes the very tensors: no copy, and two runs have one state.
    optimizer.load_state_dict(copy.deepcopy(run[1].state_dict()) if file is None else file)
    return module, optimizer


def assert_goes_on_as(run, other):
    assert_same(snapshot(*run), snapshot(*other))
    for each in (run, other):
        train(*each, range(HALF, HALF + GAP + 1))
    assert_same(snapshot(*run), snapshot(*other))


def without_names(state_dict):
    groups = [
        {key: value for key, value in group.items() if key != "param_names"}
        for group in state_dict["param_groups"]
    ]
    return {**state_dict, "param_groups": groups}


def assert_equal_dicts(one, other):
    leaves, spec = torch.utils._pytree.tree_flatten(one)
    others, same = torch.utils._pytree.tree_flatten(other)
    assert spec == same
    for a, b in zip(leaves, others, strict=True):
        assert type(a) is type(b)
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def through_a_file(value, weights_only=True):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=weights_only)


# Copies


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda run: pickle.loads(pickle.dumps(run)),
}


@every_kind
@pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)
def test_a_copy_has_all_attributes_and_goes_on_by_itself(copier, kind):
    run = trained(kind)
    twin = copier(run)
    public = [{key for key in vars(o) if not key.startswith("_")} for o in (run[1], twin[1])]
    assert public[0] == public[1]
    assert type(twin[1]) is type(run[1])
    before = snapshot(*run)
    train(*twin, range(HALF, HALF + GAP))
    assert_same(before, snapshot(*run))
    assert_goes_on_as(run, copier(run))


# Round trips


@every_kind
def test_loading_its_own_state_dict_changes_nothing(kind):
    run = trained(kind)
    before, file = snapshot(*run), run[1].state_dict()
    run[1].load_state_dict(file)
    assert_same(before, snapshot(*run))
    assert_equal_dicts(file, run[1].state_dict())


@every_kind
def test_a_state_dict_from_before_the_first_step(kind):
    run = trained(kind, steps=0)
    assert run[1].state_dict()["state"] == {}
    assert_goes_on_as(run, resumed(kind, run))


NAMES = [(True, True), (False, False), (True, False), (False, True)]


@every_kind
@pytest.mark.parametrize(("named", "named_again"), NAMES)
def test_resuming_gives_the_same_bits_with_names_or_without(named, named_again, kind):
    """Saved without names and resumed with them, too: random numbers go by what was saved."""
    run = trained(kind, named)
    other = resumed(kind, run, named=named_again)
    assert_goes_on_as(run, other)
    assert_equal_dicts(*(without_names(each[1].state_dict()) for each in (run, other)))
    names = [group.get("param_names") for group in other[1].state_dict()["param_groups"]]
    expected = {name for name, _ in run[0].named_parameters()} if named or named_again else {None}
    assert {name for group in names for name in group or [None]} == expected


@every_kind
@every_input
def test_resuming_gives_the_same_bits_with_any_option(options, kind):
    run = trained(kind, **copy.deepcopy(options))
    assert_goes_on_as(run, resumed(kind, run))


@every_kind
@pytest.mark.parametrize(("weights_only", "named"), [(True, True), (False, False)])
def test_a_file_holds_what_was_saved(weights_only, named, kind):
    run = trained(kind, named)
    file = through_a_file(run[1].state_dict(), weights_only)
    assert_equal_dicts(file, run[1].state_dict())
    assert_goes_on_as(run, resumed(kind, run, file, named))


@every_one_of_ours
def test_a_loaded_state_dict_stays_as_it_was(kind):
    run = trained(kind)
    file = copy.deepcopy(run[1].state_dict())
    other = resumed(kind, run, file)
    assert_equal_dicts(file, run[1].state_dict())
    train(*other, range(HALF, HALF + GAP))
    assert_equal_dicts(file, run[1].state_dict())


@every_kind
def test_older_state_dicts(kind):
    """Without the options that came later, and with steps that are numbers."""
    run = trained(kind)
    file = copy.deepcopy(run[1].state_dict())
    for group in file["param_groups"]:
        for option in ("foreach", "differentiable", "fused", "maximize", "capturable"):
            group.pop(option, None)
    for state in file["state"].values():
        state["step"] = float(state["step"])
    other = resumed(kind, run, file)
    set_grads(other[0].parameters(), 0)
    other[1].step()  # as torch's test; torch keeps the numbers until then
    train(*run, [0])
    for a, b in zip(run[0].parameters(), other[0].parameters(), strict=True):
        assert torch.equal(a, b)


@every_kind
def test_groups_that_stand_there_twice_are_saved_twice(kind):
    _, optimizer = trained(kind)
    before = optimizer.state_dict()["param_groups"]
    optimizer.param_groups.extend(list(optimizer.param_groups))
    assert optimizer.state_dict()["param_groups"] == before * 2


@every_kind
def test_what_is_in_the_state_beside_parameters_is_saved_and_loaded(kind):
    run = trained(kind)
    run[1].state["note"] = 1
    other = resumed(kind, run)
    assert other[1].state_dict()["state"]["note"] == 1
    assert_goes_on_as(run, other)


@every_kind
@pytest.mark.parametrize("damage", ["groups", "parameters"])
def test_a_state_dict_of_another_size(damage, kind):
    run = trained(kind)
    file, before = copy.deepcopy(run[1].state_dict()), snapshot(*run)
    if damage == "groups":
        file["param_groups"] = file["param_groups"] * 2
    else:
        file["param_groups"][0]["params"].append(99)
    with pytest.raises(ValueError, match=r"different number of parameter groups|doesn't match"):
        run[1].load_state_dict(file)
    assert_same(before, snapshot(*run))


# Dtypes, devices and names: torch casts all to the parameter, and knows no names


@every_one_of_ours
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moments_keep_their_dtype(dtype, kind):
    run = trained(kind, dtype=dtype)
    other = resumed(kind, run, through_a_file(run[1].state_dict()))
    for state in other[1].state.values():
        assert state["step"].dtype is torch.float32
        assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype
        assert state["exp_avg"].dtype is torch.promote_types(dtype, torch.float32)
    assert_goes_on_as(run, other)


@every_kind
@pytest.mark.parametrize(
    ("saved", "dtype"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_a_state_dict_of_another_dtype_is_converted(saved, dtype, kind):
    """What comes is what a state of the new dtype holds; at least the leading digits are kept."""
    run = trained(kind, dtype=saved)
    module = copy.deepcopy(run[0]).to(dtype)
    optimizer = kind(module.named_parameters(), lr=0.01)
    optimizer.load_state_dict(run[1].state_dict())
    fresh = trained(kind, dtype=dtype, steps=1)
    loaded, expected = snapshot(module, optimizer), dict(snapshot(*fresh))
    assert {n: v.dtype for n, v in loaded if isinstance(v, torch.Tensor)} == {
        n: v.dtype for n, v in expected.items() if isinstance(v, torch.Tensor)
    }
    digits = max(torch.finfo(t).eps for t in (saved, dtype))
    for (name, value), (_, original) in zip(loaded, snapshot(*run), strict=True):
        values = (torch.as_tensor(v, dtype=torch.float64) for v in (value, original))
        torch.testing.assert_close(
            *values, rtol=digits, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    train(module, optimizer, range(HALF, HALF + GAP))
    assert all(param.isfinite().all() for param in module.parameters())


KEYS = {name: ["exp_avg", "exp_avg_sq", "basis"] for name in ("galore", "fira", "reference")}
KEYS["plain"] = ["exp_avg", "exp_avg_sq"]


@pytest.mark.parametrize("to", ["meta", torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "key"),
    [pytest.param(OURS[n], key, id=f"{n}-{key}") for n, keys in KEYS.items() for key in keys],
)
def test_a_state_of_another_dtype_or_device_stops_a_step_before_it_begins(kind, key, to):
    """As after `model.to(...)`, which an optimizer does not see."""
    module, optimizer = trained(kind)
    state = optimizer.state[module[2].weight]
    state[key] = state[key].to(to)
    set_grads(module.parameters(), HALF)
    before, weight = snapshot(module[0], optimizer), module[2].weight.detach().clone()
    with pytest.raises((TypeError, ValueError, RuntimeError), match=r"2\.weight"):
        optimizer.step()
    assert_same(before, snapshot(module[0], optimizer))
    assert torch.equal(module[2].weight, weight)


@every_one_of_ours
@pytest.mark.parametrize(
    ("saved", "here"),
    [
        (("q.weight", "k.weight"), ("k.weight", "q.weight")),
        (("q.weight", "k.weight"), ("k._orig_mod.weight", "q._orig_mod.weight")),
        (("weight", "norm.weight"), ("norm.weight", "weight")),
    ],
    ids=["swapped", "swapped and compiled", "one ends like the other"],
)
def test_names_in_another_order_are_refused(saved, here, kind):
    """Two layers of one shape: the state would go to the wrong one."""
    weights = [torch.nn.Parameter(torch.ones(4, 3)) for _ in saved]
    module = torch.nn.ParameterList(weights)
    optimizers = [kind(list(zip(names, weights, strict=True))) for names in (saved, here)]
    for optimizer in optimizers:
        train(module, optimizer, range(2))
    before = snapshot(module, optimizers[1])
    with pytest.raises(ValueError, match="weight"):
        optimizers[1].load_state_dict(optimizers[0].state_dict())
    assert_same(before, snapshot(module, optimizers[1]))


@every_kind
def test_what_wrappers_put_before_names_is_no_other_name(kind):
    """As saved by a plain model and loaded by a compiled one under DDP."""
    run = trained(kind)
    module = copy.deepcopy(run[0])
    named = [("module._orig_mod." + name, param) for name, param in module.named_parameters()]
    optimizer = kind(named, lr=0.01)
    optimizer.load_state_dict(copy.deepcopy(run[1].state_dict()))
    assert_goes_on_as(run, (module, optimizer))
