"""The rivals do what they are compared for, and who is not here is named."""

import os

import pytest
import torch

from bench.measure import tensor_bytes
from bench.optimizers import METHODS, present
from bench.peers import Recipe
from bench.record import _clocks, _without_places
from bench.timing import interleaved
from lowrank_kernels import FiraAdamW, GaLoreAdamW
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
