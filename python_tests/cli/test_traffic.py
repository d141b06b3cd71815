"""What many GPUs hold and send, against numbers written out by hand."""

import pytest
import torch
from torch import nn

from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, LowRankAdamW, Subspace
from lowrank_kernels.cli.traffic import Layout, adamw_needs, held_of, needs_of

FSDP2 = Layout.of("fsdp2", 4)
HSDP = Layout.of("hsdp", 4, 2)
DDP = Layout.of("ddp", 4)
# Rank 4: more than b has rows on each of 4 GPUs.
SHAPES = {"a": (10, 6), "b": (6, 10), "head": (9, 4), "norm": (7,)}


@pytest.fixture
def module():
    found = nn.Module()
    for name, shape in SHAPES.items():
        setattr(found, name, nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16)))
    found.register_buffer("positions", torch.zeros(5))
    return found


def groups_of(module):
    projected = {"a": {"update_proj_gap": 2}, "b": {"update_proj_gap": 5}}
    named = dict(module.named_parameters())
    groups = [{"params": [(k, named[k])], "rank": 4, **own} for k, own in projected.items()]
    return [*groups, {"params": [(key, named[key]) for key in ("head", "norm")]}]


@pytest.mark.parametrize(
    ("layout", "weights", "gathers", "reduces"),
    [
        # Shards of 3 x 6, 2 x 10, 3 x 4 and 2; 3 of 4 are sent, thrice.
        (FSDP2, 2 * (18 + 20 + 12 + 2), 2 * 3 * 104, 3 * 104),
        # Of 5 x 6, 3 x 10, 5 x 4 and 4: half is sent, then the shards are reduced by 2 replicas.
        (HSDP, 2 * (30 + 30 + 20 + 4), 2 * 168, 168 + 168),
        (DDP, 2 * (60 + 60 + 36 + 7), 0, 2 * 3 * 326 // 4),
        (Layout.of("fsdp2", 1), 326, 0, 0),
        (Layout.of("hsdp", 1, 1), 326, 0, 0),
        (Layout.of("ddp", 1), 326, 0, 0),
    ],
)
def test_what_a_model_holds_and_sends(module, layout, weights, gathers, reduces):
    found = held_of(module, layout)
    assert found == (weights, weights, 20, gathers, reduces)
    assert found.sent == gathers + reduces


def test_frozen_weights_are_gathered_and_have_no_gradient(module):
    module.a.requires_grad_(False)
    found = held_of(module, FSDP2)
    assert (found.weights, found.gradients) == (104, 104 - 36)
    assert (found.gathers, found.reduces) == (2 * 3 * 104, 3 * 68)
    groups = [{"params": [module.a, module.b], "rank": 4}]
    assert needs_of(GaLoreAdamW(groups), FSDP2).bases == 2 * 4 * 10
    assert adamw_needs(module, FSDP2).state == 4 * (20 + 12 + 2) + 3 * 4


# M and V in float32, P of 6 x 4 and 10 x 4 in bfloat16, a step each; then what is not projected.
SHARDED = (8 * 3 * 4 + 48 + 4) + (8 * 2 * 4 + 80 + 4) + (8 * 12 + 4) + (8 * 2 + 4)
REPLICATED = (8 * 5 * 4 + 48 + 4) + (8 * 3 * 4 + 80 + 4) + (8 * 20 + 4) + (8 * 4 + 4)
# By their shapes a is projected from the right, b from the left.
WHOLE = 2 * (8 * 10 * 4 + 48 + 4) + (8 * 36 + 4) + (8 * 7 + 4)


@pytest.mark.parametrize(
    ("layout", "state", "bases", "renewed"),
    [
        # 3/4 of 120 bytes go to an owner, from 4 GPUs in turn; 48 and 80 to everybody.
        (FSDP2, SHARDED, 128, (22.5 + 48, 22.5 + 80)),
        (HSDP, REPLICATED, 128, (15 + 48, 15 + 80)),
        (DDP, WHOLE, 96, None),
    ],
)
def test_what_galore_holds_and_sends(module, layout, state, bases, renewed):
    found = needs_of(GaLoreAdamW(groups_of(module)), layout)
    assert (found.state, found.bases) == (state, bases)
    assert (found.sent, found.collectives) == (0, 0)
    if renewed is None:
        assert found[4:] == (0, 0, 0)
        return
    assert found.bases_sent == sum(renewed)
    assert found.bases_sent_a_step == round(renewed[0] / 2 + renewed[1] / 5)
    assert found.largest == 120


def test_an_interpolation_needs_first_moments_for_new_bases(module):
    """3/4 of 4 x 10 x 4 and 4 x 6 x 4 bytes, from 4 GPUs in turn."""
    ldadam = Subspace("power", interpolation=0.5, moments="carry_ldadam")
    found = needs_of(GaLoreAdamW(groups_of(module), subspace=ldadam), FSDP2)
    galore = needs_of(GaLoreAdamW(groups_of(module)), FSDP2)
    assert found.bases_sent == galore.bases_sent + 30 + 18
    assert found.sent == 0


def test_under_ddp_the_state_is_that_of_one_gpu(module):
    optimizer = FiraAdamW(groups_of(module), state="int8", basis="int8", master=24)
    alone = sum(row["state_bytes"] for row in optimizer.plan())
    assert needs_of(optimizer, DDP).state == alone


def test_one_gpu_sends_nothing(module):
    for layout in (Layout.of("fsdp2", 1), Layout.of("hsdp", 1, 1)):
        assert needs_of(FiraAdamW(groups_of(module)), layout)[2:6] == (0, 0, 0, 0)


def test_replicas_of_whole_weights_share_new_bases_alone(module):
    found = needs_of(FiraAdamW(groups_of(module)), Layout.of("hsdp", 2, 1))
    assert found[2:5] == (0, 0, 48 + 80)


FORMATS = {"state": "int8", "basis": "int8", "master": 24}


def test_formats_on_shards(module):
    """Moments stay float32 and weights as they are; bases are codes."""
    found = needs_of(GaLoreAdamW(groups_of(module), **FORMATS), FSDP2)
    bases = 6 * 4 + 16 + 10 * 4 + 16
    assert found.bases == bases
    assert found.state == SHARDED - 128 + bases


LOTUS = {"criterion": "displacement", "threshold": 0.01}


@pytest.mark.parametrize(
    ("build", "messages"),
    [
        (lambda groups: GaLoreAdamW(groups), 0),
        (lambda groups: LowRankAdamW(groups, residual="sign", residual_momentum=0.9), 0),
        (lambda groups: LowRankAdamW(groups, residual="normalize"), 0),
        (lambda groups: FiraAdamW(groups), 1),
        (lambda groups: AdaRankGradAdamW(groups), 1),
        (lambda groups: GaLoreAdamW(groups, subspace=Subspace(**LOTUS)), 1),
        (lambda groups: FiraAdamW(groups, subspace=Subspace(**LOTUS)), 1),
        (lambda groups: LowRankAdamW(groups, residual="scale", per="matrix"), 1),
    ],
)
def test_what_methods_reduce_in_a_step(module, build, messages):
    """A message of 4 KiB for both matrices, or nothing."""
    optimizer = build(groups_of(module))
    found = needs_of(optimizer, FSDP2)
    assert (found.sent, found.collectives) == (2 * 3 * 4096 * messages // 4, messages)
    assert needs_of(optimizer, HSDP).sent == 4096 * messages
    assert needs_of(optimizer, DDP).sent == 0


def test_orthogonal_sends_what_is_outside_to_owners_and_back(module):
    optimizer = LowRankAdamW(groups_of(module), residual="orthogonal", residual_momentum=0.9)
    assert needs_of(optimizer, FSDP2)[2:4] == (2 * 3 * 240 // 16 + 2 * 3 * 4096 // 4, 3)
    assert needs_of(optimizer, HSDP)[2:4] == (2 * 240 // 4 + 4096, 3)
    momentum = 18 + 3 * 4 + 20 + 2 * 4  # codes of the shards and a scale a row
    assert needs_of(optimizer, FSDP2).state == SHARDED + momentum


@pytest.mark.parametrize(("rows", "buckets"), [(80, 1), (2**16, 2), (2**17, 3), (2**19, 5)])
def test_norms_are_reduced_for_64_mib_of_moments_at_once(rows, buckets):
    """M and V of half of the rows at rank 64: of the last three sizes 16, 32 and 128 MiB each."""
    with torch.device("meta"):
        params = [nn.Parameter(torch.empty(rows, 80)) for _ in range(5)]
    optimizer = FiraAdamW([{"params": params, "rank": 64}], backend="reference")
    found = needs_of(optimizer, Layout.of("fsdp2", 2))
    assert found.collectives == buckets


@pytest.mark.parametrize(("rows", "gpus"), [(21, 2), (2, 3), (10, 4), (11008, 48), (1, 8)])
def test_the_largest_shard_is_that_of_torch(rows, gpus):
    weight = nn.Linear(2, rows, bias=False, device="meta")
    largest = max(len(part) for part in torch.empty(rows).chunk(gpus))
    assert held_of(weight, Layout.of("fsdp2", gpus)).weights == 4 * 2 * largest


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("fsdp2", 0), "--gpus must be at least 1, got 0"),
        (("hsdp", 12), "--shard-size must divide --gpus, got 8 of 12"),
        (("hsdp", 8, 0), "--shard-size must divide --gpus, got 0 of 8"),
    ],
)
def test_layouts_that_there_are_not(arguments, words):
    with pytest.raises(ValueError, match=words):
        Layout.of(*arguments)
