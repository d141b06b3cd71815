"""State dicts: what they hold, that they resume bit for bit, and what is refused."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lowrank_kernels import FiraAdamW, GaLoreAdamW, LowRankAdamW, Subspace, param_groups
from lowrank_kernels.optim.groups import FORMAT

GAP, STOP, STEPS = 4, 6, 13
METHODS = {
    "galore": lambda groups, **kw: GaLoreAdamW(groups, lr=0.01, **kw),
    "fira": lambda groups, **kw: FiraAdamW(groups, lr=0.01, weight_decay=0.1, **kw),
    "fira-paper": lambda groups, **kw: FiraAdamW(groups, lr=0.01, residual="paper", **kw),
}


def model(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.LayerNorm(24), nn.Linear(24, 10)).to(dtype)


def setup(method, dtype, backend="auto"):
    module = model(dtype)
    groups = param_groups(module, rank=3, update_proj_gap=GAP, weight_decay=0.1)
    return module, METHODS[method](groups, backend=backend)


def train(module, optimizer, seeds):
    for seed in seeds:
        rng = torch.Generator().manual_seed(seed)
        for param in module.parameters():
            param.grad = torch.randn(param.shape, generator=rng).to(param.dtype)
        optimizer.step()


def saved_and_loaded(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def assert_same(first, second):
    module, optimizer = first
    twin_module, twin = second
    for a, b in zip(module.parameters(), twin_module.parameters(), strict=True):
        assert torch.equal(a, b)
        assert optimizer.state[a].keys() == twin.state[b].keys()
        for entry, value in optimizer.state[a].items():
            other = twin.state[b][entry]
            assert type(value) is type(other)
            if isinstance(value, torch.Tensor):
                assert value.dtype is other.dtype
                assert torch.equal(value, other), entry
            else:
                assert value == other, entry


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_resume_between_two_refreshes_is_bitwise(method, dtype, backend):
    assert STOP % GAP
    whole = setup(method, dtype, backend)
    train(*whole, range(STEPS))
    half = setup(method, dtype, backend)
    train(*half, range(STOP))
    files = saved_and_loaded([half[0].state_dict(), half[1].state_dict()])
    resumed = setup(method, dtype, backend)
    resumed[0].load_state_dict(files[0])
    resumed[1].load_state_dict(state_dict=files[1])
    assert_same(half, resumed)
    train(*resumed, range(STOP, STEPS))
    assert_same(whole, resumed)


@pytest.mark.parametrize("saved_rank", [2, 3])
def test_a_smaller_adaptive_rank_is_filled_up_in_the_state_dict_only(saved_rank):
    """Every state dict of a model has the same shapes; the state itself keeps what it saves."""
    weight = nn.Parameter(torch.ones(12, 20))
    group = {"params": [weight], "rank": 3, "update_proj_gap": 1}
    optimizer = GaLoreAdamW([group], subspace=Subspace(residual_energy=0.01))
    rng = torch.Generator().manual_seed(0)
    factors = torch.randn(12, saved_rank, generator=rng), torch.randn(saved_rank, 20, generator=rng)
    weight.grad = factors[0] @ factors[1]
    optimizer.step()
    state, saved = optimizer.state[weight], optimizer.state_dict()["state"][0]
    assert state["rank"] == state["basis"].shape[1] == saved["rank"] == saved_rank
    assert (saved["basis"].shape, saved["exp_avg"].shape) == ((12, 3), (3, 20))
    for key, axis in (("basis", 1), ("exp_avg", 0), ("exp_avg_sq", 0)):
        assert torch.equal(saved[key].narrow(axis, 0, saved_rank), state[key])
        assert not saved[key].narrow(axis, saved_rank, 3 - saved_rank).any()


def test_a_state_follows_its_weight_to_another_dtype_by_a_round_trip():
    """Refused in a step, with the parameter's name and nothing changed; loading converts it."""
    run = setup("fira", torch.float64)
    train(*run, range(2))
    module, optimizer = run
    module.float()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight is torch.float32 .* exp_avg as torch.float64"):
        train(*run, [2])
    assert str(optimizer.state_dict()) == str(before)
    optimizer.load_state_dict(optimizer.state_dict())
    train(*run, [2])
    dtypes = {v.dtype for s in optimizer.state.values() for v in s.values() if torch.is_tensor(v)}
    assert dtypes == {torch.float32}


@pytest.mark.parametrize("change", ["moments", "weights"])
def test_a_state_dict_of_other_dtypes_is_converted(change):
    """Moments cast to bfloat16 by somebody, or float64 weights that go on in float32."""
    saved_as = torch.float64 if change == "weights" else torch.float32
    run = setup("fira", saved_as)
    train(*run, range(3))
    saved = copy.deepcopy(run[1].state_dict())
    if change == "moments":
        for state in saved["state"].values():
            for key in ("exp_avg", "exp_avg_sq"):
                state[key] = state[key].bfloat16()
    twin = setup("fira", torch.float32)
    twin[1].load_state_dict(saved)
    state = twin[1].state[next(twin[0].parameters())]
    assert {state[key].dtype for key in ("exp_avg", "exp_avg_sq", "basis")} == {torch.float32}
    train(*twin, [3])


WRONG_VALUES = {
    "step": torch.tensor(-3.0),
    "basis_step": 10**9,
    "moments_step": 77,
    "gap_factor": 0,
    "salt": 2**40,
    "side": 7,
    "limiter_norm": torch.zeros(1),
    "limiter_norm ": 1.0,
}


@pytest.mark.parametrize("key", WRONG_VALUES)
def test_values_that_no_run_leaves_are_refused_with_the_parameters_name(key):
    run, other = setup("fira", torch.float32), setup("fira", torch.float32)
    train(*run, range(2))
    saved = copy.deepcopy(run[1].state_dict())
    saved["state"][0][key.strip()] = WRONG_VALUES[key]
    with pytest.raises(ValueError, match=r"0\.weight"):
        other[1].load_state_dict(saved)
    assert not other[1].state


def test_a_limiter_of_another_dtype_is_refused_in_a_step():
    run = setup("fira", torch.float32)
    train(*run, range(1))
    state = run[1].state[next(run[0].parameters())]
    state["limiter_norm"] = state["limiter_norm"].double()
    with pytest.raises(ValueError, match=r"0\.weight is torch.float32 .* limiter_norm as"):
        train(*run, [1])


def test_a_projected_state_in_an_adamw_group_is_refused():
    """Moments of a full rank have the weight's shape, in the coordinates of a basis."""
    weight = nn.Parameter(torch.ones(8, 8))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 8}])
    weight.grad = torch.ones(8, 8)
    optimizer.step()
    del optimizer.param_groups[0]["rank"]
    with pytest.raises(ValueError, match="has the state of a projected parameter"):
        optimizer.step()


class Twins(nn.Module):
    """Two equal layers, registered in an order of one's own."""

    def __init__(self, *names):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(12, 12) for name in names})


def build_twins(names, **options):
    torch.manual_seed(0)
    module = Twins(*names)
    return module, FiraAdamW(param_groups(module, 3, targets="layers"), lr=0.01, **options)


def test_layers_in_another_order_are_refused():
    run, other = build_twins("qk"), build_twins("kq")
    train(*run, range(2))
    text = r"place 0 of group 0 holds the state of layers\.q\.weight, and is layers\.k\.weight"
    with pytest.raises(ValueError, match=text):
        other[1].load_state_dict(run[1].state_dict())
    assert not other[1].state


@pytest.mark.parametrize("prefix", ["", "m.", "a.b."])
@pytest.mark.parametrize("prefixed", ["saved", "loaded"])
def test_a_name_that_ends_like_another_is_not_taken_for_it(prefix, prefixed):
    def build(names, start):
        weights = [nn.Parameter(torch.ones(4, 3)) for _ in names]
        named = [(start + name, weight) for name, weight in zip(names, weights, strict=True)]
        return weights, GaLoreAdamW([{"params": named, "rank": 2}])

    starts = (prefix, "") if prefixed == "saved" else ("", prefix)
    weights, optimizer = build(["weight", "norm.weight"], starts[0])
    for weight in weights:
        weight.grad = torch.ones(4, 3)
    optimizer.step()
    build(["weight", "norm.weight"], starts[1])[1].load_state_dict(optimizer.state_dict())
    with pytest.raises(ValueError, match="another order"):
        build(["norm.weight", "weight"], starts[1])[1].load_state_dict(optimizer.state_dict())


def test_renamed_layers_go_by_their_places_and_keep_their_names_and_streams(caplog):
    run, other = build_twins("qk"), build_twins("xy")
    train(*run, range(2))
    with caplog.at_level("WARNING", "lowrank_kernels"):
        other[1].load_state_dict(run[1].state_dict())
    assert "other names than in the state dict" in caplog.text
    assert "layers.q.weight -> layers.x.weight and 3 more" in caplog.text
    assert other[1].param_groups[0]["param_names"] == ["layers.x.weight", "layers.y.weight"]
    salts = [[state.get("salt") for state in o.state.values()] for _, o in (run, other)]
    assert salts[0] == salts[1]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model."])
def test_prefixes_of_names_change_nothing(prefix, caplog):
    run, other = build_twins("qk"), build_twins("qk")
    train(*run, range(2))
    saved = copy.deepcopy(run[1].state_dict())
    for group in saved["param_groups"]:
        group["param_names"] = [prefix + name for name in group["param_names"]]
    with caplog.at_level("WARNING", "lowrank_kernels"):
        other[1].load_state_dict(saved)
    assert not caplog.records


def told(caplog, run, other):
    """By the second of two loads: another one in the same process may be of another run."""
    train(*run, range(2))
    copy.deepcopy(other[1]).load_state_dict(run[1].state_dict())
    caplog.clear()
    with caplog.at_level("WARNING", "lowrank_kernels"):
        other[1].load_state_dict(run[1].state_dict())
    return caplog.text


def test_another_method_is_told(caplog):
    run = build_twins("qk")
    other = build_twins("qk", residual="paper", subspace="svd", rounding="stochastic")
    text = told(caplog, run, other)
    for part in ("residual=official (here residual=paper)", "range_finder=randomized (here range"):
        assert part in text
    assert "rounding=nearest (here rounding=stochastic)" in text
    assert "moments=" not in text
    assert "residual=paper" in other[1].param_groups[0]["method"]


def test_other_options_of_the_projection_are_told(caplog):
    run, other = build_twins("qk"), build_twins("qk")
    other[1].param_groups[0] |= {"rank": 5, "scale": 1.0}
    text = told(caplog, run, other)
    assert "group 0 goes on with the options of the state dict: rank 3 (here 5)" in text
    assert "scale 0.25 (here 1.0)" in text
    assert other[1].param_groups[0]["rank"] == 3


def test_the_same_method_is_told_nothing(caplog):
    assert not told(caplog, build_twins("qk"), build_twins("qk"))


SCRIPT = """
import sys, torch
sys.path.insert(0, {tests!r})
from optim.test_state import setup, train
run = setup("fira", torch.bfloat16)
if {first} > 0:
    saved = torch.load({path!r}, weights_only=True)
    run[0].load_state_dict(saved["model"])
    run[1].load_state_dict(saved["optimizer"])
torch.set_num_threads(1)
train(*run, range({first}, {last}))
torch.save({{"model": run[0].state_dict(), "optimizer": run[1].state_dict()}}, {path!r})
"""


def test_resume_in_a_new_process_is_bitwise(tmp_path, request):
    """2N steps equal N, save, new process, load, N: bf16 weights, N no multiple of the gap."""
    tests = str(request.config.rootpath / "python_tests")

    def run(path, first, last):
        script = SCRIPT.format(tests=tests, path=str(path), first=first, last=last)
        subprocess.run([sys.executable, "-c", script], check=True)

    run(tmp_path / "whole.pt", 0, 2 * STOP)
    run(tmp_path / "parts.pt", 0, STOP)
    run(tmp_path / "parts.pt", STOP, 2 * STOP)
    whole, parts = (
        torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt")
    )
    flat = torch.utils._pytree.tree_leaves
    for a, b in zip(flat(whole), flat(parts), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_state_holds_tensors_and_numbers_only_and_loads_safely():
    run = setup("fira", torch.bfloat16)
    train(*run, range(3))
    state_dict = run[1].state_dict()
    for state in state_dict["state"].values():
        assert {type(value) for value in state.values()} <= {torch.Tensor, int, float}
    loaded = saved_and_loaded(state_dict)
    assert loaded["param_groups"][0]["format"] == FORMAT
    assert loaded["param_groups"][0]["param_names"]


def test_loaded_state_does_not_share_memory_with_the_state_dict():
    run = setup("fira", torch.float32)
    train(*run, range(2))
    state_dict = copy.deepcopy(run[1].state_dict())
    before = copy.deepcopy(state_dict)
    twin = setup("fira", torch.float32)
    twin[1].load_state_dict(state_dict)
    train(*twin, range(2, 4))
    for key, state in before["state"].items():
        for entry, value in state.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(state_dict["state"][key][entry])
            )


def test_step_that_comes_back_as_a_float_is_taken():
    run = setup("fira", torch.float32)
    train(*run, range(STOP))
    state_dict = copy.deepcopy(run[1].state_dict())
    for state in state_dict["state"].values():
        state["step"] = float(state["step"])
    twin = setup("fira", torch.float32)
    twin[0].load_state_dict(run[0].state_dict())
    twin[1].load_state_dict(state_dict)
    assert_same(run, twin)


def test_user_hooks_on_loading_are_respected():
    run = setup("fira", torch.float32)
    train(*run, range(2))
    twin = setup("fira", torch.float32)

    def forget_everything(_, state_dict):
        return {**state_dict, "state": {}}

    twin[1].register_load_state_dict_pre_hook(forget_everything)
    twin[1].load_state_dict(run[1].state_dict())
    assert not twin[1].state


def test_galore_state_continues_with_fira():
    run = setup("galore", torch.float32)
    train(*run, range(2))
    twin = setup("fira", torch.float32)
    twin[1].load_state_dict(run[1].state_dict())
    train(*twin, range(2, 4))
    assert float(twin[1].state[twin[0][0].weight]["limiter_norm"]) > 0


def other_shape(state_dict):
    state_dict["state"][0]["exp_avg"] = torch.zeros(24, 4)


def other_basis(state_dict):
    state_dict["state"][0]["basis"] = torch.zeros(24, 3)


def newer_format(state_dict):
    state_dict["param_groups"][1]["format"] = FORMAT + 1


def no_format(state_dict):
    del state_dict["param_groups"][0]["format"]


def no_basis(state_dict):
    del state_dict["state"][0]["basis"]


def not_projected(state_dict):
    del state_dict["param_groups"][0]["rank"]


def fewer_groups(state_dict):
    del state_dict["param_groups"][-1]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (other_shape, r"state of 0\.weight does not fit its shape \(24, 12\): exp_avg has"),
        (other_basis, r"state of 0\.weight does not fit its shape \(24, 12\): basis has"),
        (newer_format, r"group 1 of the state dict has format 4.*upgrade"),
        (no_format, r"group 0 of the state dict has no format number"),
        (no_basis, r"state of 0\.weight has no 'basis'"),
        (not_projected, r"group 0 is a projected group here and an AdamW group in the state dict"),
        (fewer_groups, r"different number of parameter groups"),
    ],
)
def test_wrong_state_dict_is_refused_and_nothing_changes(damage, text):
    run = setup("fira", torch.float32)
    train(*run, range(2))
    state_dict = copy.deepcopy(run[1].state_dict())
    damage(state_dict)
    untouched = copy.deepcopy(run)
    with pytest.raises(ValueError, match=text):
        run[1].load_state_dict(state_dict)
    assert_same(run, untouched)
    assert not run[1]._optimizer_load_state_dict_pre_hooks


def test_nothing_per_parameter_is_cached_before_the_first_step():
    """Trainers swap parameters after construction: on a device, by shards, by another dtype."""
    weight = nn.Parameter(torch.ones(24, 12))
    optimizer = LowRankAdamW([{"params": [weight], "rank": 3}], residual="official")
    optimizer.param_groups[0]["params"][0] = replaced = nn.Parameter(torch.ones(6, 40).double())
    replaced.grad = torch.randn(6, 40, dtype=torch.float64)
    optimizer.step()
    assert optimizer.state[replaced]["basis"].shape == (6, 3)
    assert weight not in optimizer.state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_laid_out_anew_goes_on_as_after_a_load(dtype):
    """Its moments are laid out anew with it, so that torch's fused kernels go on serving it."""

    def trained(conv, steps):
        for seed in steps:
            rng = torch.Generator().manual_seed(seed)
            for param in conv.parameters():
                grad = torch.randn(param.shape, generator=rng).to(dtype)
                param.grad = torch.empty_like(param).copy_(grad)
            optimizers[conv].step()

    first, second = (torch.nn.Conv2d(8, 8, 3, dtype=dtype) for _ in "ab")
    optimizers = {conv: FiraAdamW(conv.parameters(), lr=1e-2) for conv in (first, second)}
    trained(first, range(3))
    first.to(memory_format=torch.channels_last)
    trained(first, range(3, 5))
    for moment in ("exp_avg", "exp_avg_sq"):
        assert optimizers[first].state[first.weight][moment].stride() == first.weight.stride()
    second.to(memory_format=torch.channels_last)
    second.load_state_dict(first.state_dict())
    optimizers[second].load_state_dict(optimizers[first].state_dict())
    trained(first, [5])
    trained(second, [5])
    assert torch.equal(first.weight, second.weight)


def test_groups_handed_on_have_the_method_of_their_new_optimizer():
    weight = torch.nn.Parameter(torch.randn(8, 6))
    fira = FiraAdamW([{"params": [weight], "rank": 2}])
    galore = GaLoreAdamW(fira.param_groups)
    assert galore.param_groups[0]["method"] == galore.defaults["method"]
    assert galore.param_groups[0]["method"] != fira.param_groups[0]["method"]


def taken_a_step(backend, method=GaLoreAdamW, **options):
    weight = torch.nn.Parameter(torch.randn(12, 20))
    optimizer = method([{"params": [weight], "rank": 4}], backend=backend, **options)
    weight.grad = torch.randn(12, 20)
    optimizer.step()
    return weight, optimizer


def assert_refused_unchanged(optimizer, weight, error=ValueError, match=None):
    """A step raises, and neither the weight nor its number of steps changes."""
    before, steps = weight.detach().clone(), optimizer.state[weight].get("step")
    steps = steps.clone() if isinstance(steps, torch.Tensor) else steps
    with pytest.raises(error, match=match):
        optimizer.step()
    assert torch.equal(weight, before)
    if isinstance(steps, torch.Tensor):
        now = optimizer.state[weight]["step"]
        torch.testing.assert_close(now, steps, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backend", ["reference", "foreach", "native"])
@pytest.mark.parametrize("own", [False, True])
def test_a_step_among_fake_tensors_counts_nothing(backend, own):
    weight, optimizer = taken_a_step(backend)
    fake = FakeTensorMode(allow_non_fake_inputs=own)
    with fake, pytest.raises((AssertionError, RuntimeError)):
        optimizer.step()
    assert float(optimizer.state[weight]["step"]) == 1


@pytest.mark.parametrize(
    "step",
    [3.0, None, torch.tensor(3, dtype=torch.uint16), torch.tensor([3.0, 3.0]), torch.tensor(-2.0)],
    ids=str,
)
@pytest.mark.parametrize("rank", [None, 4])
def test_what_cannot_count_steps_is_refused_by_name(step, rank):
    weight = torch.nn.Parameter(torch.randn(12, 20))
    group = {"params": [("layer.weight", weight)]} | ({"rank": rank} if rank else {})
    optimizer = GaLoreAdamW([group])
    weight.grad = torch.randn(12, 20)
    optimizer.step()
    optimizer.state[weight]["step"] = step
    message = "layer.weight has step as"
    assert_refused_unchanged(optimizer, weight, match=message)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, -5.0])
def test_a_number_of_steps_that_none_has_taken_changes_nothing(value):
    weight, optimizer = taken_a_step("auto")
    optimizer.state[weight]["step"].fill_(value)
    errors = (ValueError, OverflowError)
    assert_refused_unchanged(optimizer, weight, errors)


@pytest.mark.parametrize("backend", ["foreach", "native"])
@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq", "step"])
def test_a_state_behind_a_negation_is_refused(backend, entry):
    weight, optimizer = taken_a_step(backend)
    state = optimizer.state[weight]
    state[entry] = torch._neg_view(-state[entry])
    assert_refused_unchanged(optimizer, weight, match=entry)


@pytest.mark.parametrize("entry", ["exp_avg", "exp_avg_sq", "basis"])
def test_a_state_entry_that_is_no_tensor_is_refused_by_name(entry):
    weight, optimizer = taken_a_step("auto")
    optimizer.state[weight][entry] = 3.0
    message = f"parameter 0 of group 0 has {entry} as 3.0"
    assert_refused_unchanged(optimizer, weight, match=message)


@pytest.mark.parametrize("step", [2.0**24, 2.0**33])
def test_more_steps_than_float32_can_count_go_on(step):
    weight, optimizer = taken_a_step("native", FiraAdamW)
    optimizer.state[weight]["step"].fill_(step)
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_an_error_in_one_group_leaves_the_steps_of_later_groups(monkeypatch):
    weights = [torch.nn.Parameter(torch.randn(12, 20)) for _ in "ab"]
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4} for weight in weights])
    for weight in weights:
        weight.grad = torch.randn(12, 20)
    optimizer.step()

    def fails(*_):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(optimizer, "_step_batch", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    assert [float(optimizer.state[weight]["step"]) for weight in weights] == [2, 1]
