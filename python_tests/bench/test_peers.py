"""The rivals do what they are compared for, and who is not here is named."""

import os

import pytest
import torch

from bench.measure import tensor_bytes
from bench.optimizers import METHODS, present
from bench.peers import Recipe, factored_bytes
from bench.record import _clocks, _without_places
from bench.timing import interleaved
from lowrank_kernels import FiraAdamW, GaLoreAdamW
from lowrank_kernels.ops import codes
from lowrank_kernels.optim import formats
from lowrank_kernels.optim.groups import side_of

SHAPES = [(40, 24), (40, 24), (24, 56)]


def groups_of(dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)

    def param(*size):
        return torch.nn.Parameter(torch.randn(size, generator=rng).to(dtype))

    matrices = [(f"{i}.weight", param(*shape)) for i, shape in enumerate(SHAPES)]
    rank = {"rank": 8, "update_proj_gap": 1000, "scale": 0.25, "proj_type": "std"}
    return [{"params": matrices, **rank}, {"params": [("bias", param(30))]}]


def give_gradients(groups, seed):
    rng = torch.Generator().manual_seed(seed)
    for group in groups:
        for _, param in group["params"]:
            param.grad = torch.randn(param.shape, generator=rng).to(param.dtype)


@pytest.mark.parametrize(
    ("name", "ours"), [("hybrid-fira", FiraAdamW), ("hybrid-galore", GaLoreAdamW)]
)
def test_the_hybrids_take_our_steps(name, ours):
    mine, others = groups_of(), groups_of()
    optimizer = ours(mine, lr=1e-2, weight_decay=0.1, backend="reference", subspace="random")
    hybrid = METHODS[name].build(others, 1e-2, Recipe(weight_decay=0.1))
    for step in range(4):
        give_gradients(mine, step)
        give_gradients(others, step)
        optimizer.step()
        if step == 0:
            for (_, own), (_, other) in zip(mine[0]["params"], others[0]["params"], strict=True):
                state = hybrid._state_of(other, side_of("std", *other.shape), 8)
                state["basis"].copy_(optimizer.state[own]["basis"])
        hybrid.step()
    for group, other_group in zip(mine, others, strict=True):
        for (_, own), (_, other) in zip(group["params"], other_group["params"], strict=True):
            assert torch.dist(own, other) <= 1e-5 * torch.linalg.norm(own)


def test_master_adamw_is_adamw_on_float32_copies():
    groups = groups_of(torch.bfloat16)
    params = [param for group in groups for _, param in group["params"]]
    masters = [torch.nn.Parameter(param.detach().float()) for param in params]
    ours = METHODS["adamw-master"].build(groups, 1e-2, Recipe(weight_decay=0.1))
    theirs = torch.optim.AdamW(masters, lr=1e-2, weight_decay=0.1, fused=True)
    for step in range(3):
        give_gradients(groups, step)
        for param, master in zip(params, masters, strict=True):
            master.grad = param.grad.float()
        ours.step()
        theirs.step()
    for param, master in zip(params, masters, strict=True):
        assert torch.equal(param, master.to(torch.bfloat16))
    elements = sum(param.numel() for param in params)
    assert tensor_bytes(dict(ours.state)) == 12 * elements + 4 * len(params)


def steps_of(name, groups, count, **recipe):
    optimizer = METHODS[name].build(groups, 1e-2, Recipe(**recipe))
    for step in range(count):
        give_gradients(groups, step)
        optimizer.step()
    return optimizer


def weights(groups):
    return [param.detach().clone() for group in groups for _, param in group["params"]]


def test_factored_adamw_is_adamw_where_squares_have_one_rank():
    """Without a momentum, which is in codes; vectors have none of either."""
    rng = torch.Generator().manual_seed(0)
    pairs = [[torch.rand(size, generator=rng) + 0.1 for size in shape] for shape in SHAPES]
    sizes = [torch.outer(*pair) for pair in pairs] + [torch.rand(30, generator=rng) + 0.1]
    ends = []
    for name in ("adamw", "adamw-factored-8bit"):
        params = [torch.nn.Parameter(torch.ones(size.shape)) for size in sizes]
        groups = [{"params": list(zip("abcd", params, strict=True))}]
        optimizer = METHODS[name].build(groups, 1e-2, Recipe(weight_decay=0.1))
        optimizer.param_groups[0]["betas"] = (0.0, 0.999)
        rng.manual_seed(1)
        for step in range(20):
            for param, size in zip(params, sizes, strict=True):
                signs = torch.randint(0, 2, size.shape, generator=rng) * 2 - 1
                param.grad = (1 + step) * size * signs
            optimizer.step()
        ends.append([param.detach() - 1 for param in params])
    for own, other in zip(*ends, strict=True):
        assert torch.dist(own, other) <= 1e-5 * torch.linalg.norm(other)


def test_a_momentum_in_codes_is_off_by_half_a_code_of_its_block():
    params = [torch.nn.Parameter(torch.zeros(40, 24)), torch.nn.Parameter(torch.zeros(30))]
    optimizer = METHODS["adamw-factored-8bit"].build(
        [{"params": list(zip("ab", params, strict=True))}], 1e-2, Recipe()
    )
    for param in params:
        param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(0))
    params[0].grad[11] = 0.0
    optimizer.step()
    exact = 0.1 * params[0].grad
    state = optimizer.state[params[0]]
    found = (state["exp_avg"].flatten() * state["scales"].repeat_interleave(256)[:960]).view(40, 24)
    largest = torch.stack([block.abs().max() for block in exact.flatten().split(256)])
    assert torch.allclose(state["scales"], largest / 127)
    steps = state["scales"].repeat_interleave(256)[:960].view(40, 24)
    assert torch.all((found - exact).abs() <= 0.5001 * steps)
    assert torch.all(found[11] == 0)
    assert torch.allclose(optimizer.state[params[1]]["exp_avg"], 0.1 * params[1].grad)


def test_state_of_factored_adamw_to_the_byte():
    """A byte an element, a float32 scale for 256 of them, a float32 a row and a column."""
    groups = groups_of(torch.bfloat16)
    optimizer = steps_of("adamw-factored-8bit", groups, 2)
    matrices = sum(rows * cols + 4 * (rows + cols) for rows, cols in SHAPES)
    scales = 4 * sum(-(-rows * cols // 256) for rows, cols in SHAPES)
    assert tensor_bytes(dict(optimizer.state)) == matrices + scales + 8 * 30
    assert sum(factored_bytes(w.shape) for w in weights(groups)) == matrices + scales + 8 * 30


def test_factored_adamw_trains_and_resumes_bit_for_bit():
    inputs = torch.randn(64, 24, generator=torch.Generator().manual_seed(1))
    targets = torch.tanh(inputs @ torch.randn(24, 8, generator=torch.Generator().manual_seed(2)))

    def train(model, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            loss = (model(inputs).float() - targets).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    def start():
        torch.manual_seed(0)
        model = torch.nn.Sequential(
            torch.nn.Linear(24, 40), torch.nn.Tanh(), torch.nn.Linear(40, 8)
        )
        groups = [{"params": list(model.named_parameters())}]
        return model, METHODS["adamw-factored-8bit"].build(groups, 1e-2, Recipe())

    model, optimizer = start()
    first = train(model, optimizer, 1)
    assert train(model, optimizer, 99) < 0.05 * first
    half, other = start(), start()
    train(*half, 50)
    other[0].load_state_dict(half[0].state_dict())
    other[1].load_state_dict(half[1].state_dict())
    train(*other, 50)
    for own, again in zip(model.parameters(), other[0].parameters(), strict=True):
        assert torch.equal(own, again)


def test_what_is_rounded_to_the_nearest_is_and_what_comes_after_is_not():
    """V of a projected and of a plain parameter after a step, held against V in float32."""

    def stepped(name):
        rng = torch.Generator().manual_seed(0)
        sizes = {"a.weight": (70, 40), "head": (90, 50)}
        params = {k: torch.nn.Parameter(torch.randn(s, generator=rng)) for k, s in sizes.items()}
        first, second = params.items()
        groups = [{"params": [first], "rank": 8, "scale": 0.25}, {"params": [second]}]
        optimizer = METHODS[name].build(groups, 1e-2, Recipe(backend="reference"))
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=rng)
        optimizer.step()
        return [optimizer.state[param] for param in params.values()]

    exact, nearest = stepped("galore"), stepped("galore-8bit-nearest")
    noisy = stepped("galore-8bit")
    for wide, coded, rounded in zip(exact, nearest, noisy, strict=True):
        groups = formats.groups_of(coded)
        expected = codes.new_stored(wide["exp_avg"].shape, torch.int8, torch.device("cpu"), groups)
        codes.store(expected, wide["exp_avg"], wide["exp_avg_sq"], groups)
        assert torch.equal(coded["exp_avg_sq"], expected.exp_avg_sq)
        assert not torch.equal(rounded["exp_avg_sq"], expected.exp_avg_sq)


def galore_groups(dtype=torch.float32):
    """Projected gradients of less and of more than the 4,096 elements that take codes."""
    rng = torch.Generator().manual_seed(0)
    rank = {"rank": 16, "update_proj_gap": 3, "scale": 0.25, "proj_type": "std"}
    matrices = [
        (f"{i}.weight", torch.nn.Parameter(torch.randn(shape, generator=rng).to(dtype)))
        for i, shape in enumerate([(40, 24), (24, 56), (320, 48)])
    ]
    bias = torch.nn.Parameter(torch.randn(30, generator=rng).to(dtype))
    return [{"params": matrices, **rank}, {"params": [("bias", bias)]}]


def test_galore_torch_in_8_bits_is_galore_torch():
    """What has float32 moments to a thousandth, as eps differs; what has codes to a fifth."""
    pytest.importorskip("galore_torch"), pytest.importorskip("bitsandbytes")
    ends = []
    for name in ("galore-torch", "galore-torch-8bit"):
        groups = galore_groups()
        before = weights(groups)
        steps_of(name, groups, 5, weight_decay=0.1)
        ends.append([new - old for new, old in zip(weights(groups), before, strict=True)])
    for index, (wide, coded) in enumerate(zip(*ends, strict=True)):
        limit = 0.2 if index == 2 else 1e-3
        assert torch.dist(wide, coded) <= limit * torch.linalg.norm(wide), index


def test_galore_torch_in_8_bits_leaves_gradients_and_weights_where_they_are():
    pytest.importorskip("galore_torch"), pytest.importorskip("bitsandbytes")
    groups = galore_groups(torch.bfloat16)
    optimizer = METHODS["galore-torch-8bit"].build(groups, 1e-2, Recipe())
    params = [param for group in groups for _, param in group["params"]]
    places = [param.data_ptr() for param in params]
    for step in range(2):
        give_gradients(groups, step)
        gradients = [param.grad for param in params]
        optimizer.step()
        assert all(p.grad is grad for p, grad in zip(params, gradients, strict=True))
    assert [param.data_ptr() for param in params] == places
    codes = optimizer.state[params[2]]
    assert (codes["state1"].dtype, codes["state1"].shape) == (torch.uint8, (320, 16))


def test_state_inside_of_objects_counts():
    """As the bases that galore-torch keeps."""
    pytest.importorskip("galore_torch")
    groups = galore_groups()
    optimizer = steps_of("galore-torch", groups, 1)
    shapes = [param.shape for _, param in groups[0]["params"]]
    numbers = sum(16 * (2 * max(shape) + min(shape)) for shape in shapes) + 2 * 30
    assert tensor_bytes(dict(optimizer.state)) == 4 * numbers


def test_who_is_not_here_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name != "bitsandbytes" or None)
    here, missing = present(["adamw", "flashoptim", "fira-official", "galore-torch"], "cpu")
    assert here == ["adamw", "fira-official"]
    assert missing == {
        "flashoptim": "needs cuda",
        "galore-torch": "bitsandbytes is not installed",
    }
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert present(["fira-official"], "cpu") == ([], {"fira-official": "fira is not installed"})


def test_a_tensor_that_states_share_counts_once():
    codes = torch.zeros(256)
    states = [{"codes": codes, "moment": torch.zeros(10)} for _ in range(3)]
    assert tensor_bytes(dict(enumerate(states))) == 4 * (256 + 30)


def test_a_quantized_tensor_counts_what_it_holds():
    class Quantized(torch.Tensor):
        @staticmethod
        def __new__(cls, codes, scale):
            made = torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)
            made.codes, made.scale = codes, scale
            return made

        def __tensor_flatten__(self):
            return ["codes", "scale"], None

        @classmethod
        def __torch_dispatch__(cls, *args):
            raise NotImplementedError

    quantized = Quantized(torch.zeros(256, dtype=torch.uint8), torch.zeros(1))
    assert tensor_bytes({"state": [quantized, torch.zeros(2)]}) == 256 + 4 + 8


def test_what_is_prepared_is_not_timed():
    now, prepared = [0.0], []

    def prepare(turn):
        prepared.append(turn)
        now[0] += 100

    def run(turn):
        now[0] += 1

    cpu = torch.device("cpu")
    times = interleaved({"a": run, "b": run}, cpu, 3, clock=lambda: now[0], prepare=prepare)
    assert [samples.seconds for samples in times.values()] == [[1.0] * 3] * 2
    assert prepared == [turn for turn in range(5) for _ in "ab"]


def test_a_record_does_not_tell_where_files_lay():
    words = [
        "--resume",
        "--rounds",
        "7",
        "--gradients",
        "/somewhere/g.pt",
        "--out",
        "/elsewhere/x.json",
    ]
    assert _without_places(words) == ["--rounds", "7"]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("345, 2619.5, 1980", {"clocks.sm": 345.0, "clocks.mem": 2619.5, "clocks.max.sm": 1980.0}),
        ("[N/A], 2619, 1980", {"clocks.sm": None, "clocks.mem": 2619.0, "clocks.max.sm": 1980.0}),
        ("No devices were found", None),
    ],
)
def test_clocks_that_nobody_tells_are_none(told, expected, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{told}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert _clocks("cuda") == expected
