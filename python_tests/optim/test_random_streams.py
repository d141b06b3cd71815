"""No two matrices of a model draw the same random numbers, nor one matrix at two steps."""

import itertools

import pytest
import torch
from torch import nn

from lowrank_kernels import GaLoreAdamW, Subspace

MODULES = [f"self_attn.{x}_proj" for x in "qkvo"] + [
    f"mlp.{x}_proj" for x in ("gate", "up", "down")
]
LLAMA_7B = [f"model.layers.{i}.{module}.weight" for i in range(32) for module in MODULES]


def first_bases(groups, steps=1, **options):
    """Of equal weights with equal gradients: only their own numbers keep them apart."""
    optimizer = GaLoreAdamW(groups, subspace=Subspace("random", stagger=False, **options))
    params = [param for group in optimizer.param_groups for param in group["params"]]
    bases = []
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        bases += [optimizer.state[param]["basis"].clone() for param in params]
    return bases


def weights(count):
    return [nn.Parameter(torch.ones(6, 6)) for _ in range(count)]


def assert_all_differ(bases):
    drawn = {tuple(basis.flatten().tolist()) for basis in bases}
    assert len(drawn) == len(bases)


@pytest.mark.parametrize("named", [True, False])
def test_224_matrices_draw_224_streams(named):
    """A CPU's generator takes 32 bits of a seed and drops the others."""
    params = weights(len(LLAMA_7B))
    group = {"params": list(zip(LLAMA_7B, params, strict=True)) if named else params, "rank": 2}
    assert_all_differ(first_bases([group]))


def test_every_step_draws_another_stream():
    assert_all_differ(first_bases([{"params": weights(3), "rank": 2, "update_proj_gap": 1}], 100))


def test_unnamed_matrices_of_two_groups_draw_two_streams():
    assert_all_differ(first_bases([{"params": weights(2), "rank": 2} for _ in range(2)]))


def test_names_keep_their_streams_in_any_order_and_under_any_wrapper():
    params = weights(6)
    plain = [{"params": list(zip("abc", params, strict=False)), "rank": 2}]
    wrapped = [("module.c", params[3]), ("_orig_mod.a", params[4]), ("b", params[5])]
    (a, b, c), (c2, a2, b2) = first_bases(plain), first_bases([{"params": wrapped, "rank": 2}])
    for one, other in ((a, a2), (b, b2), (c, c2)):
        assert torch.equal(one, other)


def test_unnamed_matrices_share_the_turns_out_evenly():
    """Any 28 layers of 200 steps at most one a step, and no half of the interval left out."""
    optimizer = GaLoreAdamW([{"params": weights(28), "rank": 2}])
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    turns = sorted(state["salt"] / 2**32 for state in optimizer.state.values())
    gaps = [later - sooner for sooner, later in itertools.pairwise([*turns, turns[0] + 1])]
    assert max(gaps) <= 2 / 28
    assert min(gaps) >= 1 / 200
