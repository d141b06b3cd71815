"""Weights of the blocks that are left out of the projection move as fast as the projected ones."""

import logging

import pytest
import torch
from torch import nn

from lowrank_kernels import FiraAdamW, GaLoreAdamW, param_groups

RANK, SCALE = 16, 0.25


class Attention(nn.Module):
    """Grouped-query: a small key projection, which no rank of 16 makes smaller."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(64, 64)
        self.k_proj = nn.Linear(64, 16)
        self.mlp = nn.ParameterDict({"experts": torch.randn(2, 8, 8)})
        self.gate = nn.Linear(64, 64, bias=False)
        self.bias_table = nn.Embedding(8, 8)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 64)
        self.encoder_layer_0 = Attention()
        self.layers = nn.ModuleList([Attention()])
        self.fc1 = nn.Linear(64, 64)


BLOCKS = ("encoder_layer_0", "layers.0")
PROJECTED = {f"{block}.q_proj.weight" for block in BLOCKS}
HIDDEN = {f"{b}.{name}" for b in BLOCKS for name in ("k_proj.weight", "mlp.experts", "gate.weight")}


def kinds(groups):
    """Names by how they are trained."""
    found = {"projected": set(), "hidden": set(), "plain": set()}
    for group in groups:
        kind = "projected" if "rank" in group else "hidden" if "scale" in group else "plain"
        found[kind] |= {name for name, _ in group["params"]}
    return found


def test_what_moves_at_which_rate():
    found = kinds(param_groups(Model(), RANK))
    assert found["projected"] == PROJECTED
    assert found["hidden"] == HIDDEN
    assert {"embed.weight", "fc1.weight", "layers.0.bias_table.weight"} <= found["plain"]


def test_targets_that_leave_blocks_out_leave_them_at_their_neighbours_rate():
    found = kinds(param_groups(Model(), RANK, targets=["layers.0.q_proj"]))
    assert found["projected"] == {"layers.0.q_proj.weight"}
    assert found["hidden"] == HIDDEN | {"encoder_layer_0.q_proj.weight"}


def test_a_warning_says_what_is_left_out_and_why(caplog):
    with caplog.at_level(logging.WARNING, "lowrank_kernels"):
        param_groups(Model(), RANK, scale=0.5)
    (record,) = caplog.records
    assert record.getMessage().splitlines()[0].endswith("trained by AdamW at lr * 0.5:")
    told = {line.strip() for line in record.getMessage().splitlines()[1:]}
    assert told == {
        f"{block}.{line}, 1 of them"
        for block in ("encoder_layer_0", "layers.*")
        for line in (
            "k_proj.weight (16 x 64): rank 16 saves no memory",
            "mlp.experts (2 x 8 x 8): not a matrix",
            "gate.weight (64 x 64): a router",
        )
    }


def test_nothing_is_told_where_nothing_is_left_out(caplog):
    with caplog.at_level(logging.WARNING, "lowrank_kernels"):
        param_groups(nn.Sequential(nn.Linear(64, 64)), RANK)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_group_with_a_scale_is_adamw_at_lr_times_scale(dtype, weight_decay):
    """The step alone is scaled; the decay stays lr * weight_decay, as in projected groups."""
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(13, 7, generator=rng, dtype=torch.float64).to(dtype)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.double())
    decay = weight_decay / SCALE
    optimizer = FiraAdamW([{"params": [ours], "scale": SCALE}], lr=0.02, weight_decay=weight_decay)
    torchs = torch.optim.AdamW([theirs], lr=0.02 * SCALE, eps=1e-6, weight_decay=decay)
    for _ in range(5):
        grad = torch.randn(13, 7, generator=rng, dtype=torch.float64).to(dtype)
        ours.grad, theirs.grad = grad.clone(), grad.double()
        optimizer.step()
        torchs.step()
    error = torch.linalg.norm(ours.double() - theirs) / torch.linalg.norm(theirs)
    assert error <= 5 * torch.finfo(dtype).eps


def test_a_scale_of_0_without_a_rank_is_refused():
    with pytest.raises(ValueError, match="group 0: scale must be above 0 without a rank"):
        FiraAdamW([{"params": [nn.Parameter(torch.ones(2, 2))], "scale": 0.0}])


def test_explain_tells_how_fast_each_parameter_moves():
    optimizer = GaLoreAdamW(param_groups(Model(), RANK, scale=0.5), lr=0.02)
    rates = {row["name"]: row["lr"] for row in optimizer.explain()}
    assert {name for name, lr in rates.items() if lr == 0.01} == PROJECTED | HIDDEN
    assert {lr for name, lr in rates.items() if name not in PROJECTED | HIDDEN} == {0.02}


def test_hidden_weights_take_steps_of_their_neighbours_size():
    """At the first step AdamW moves every entry by its rate; GaLore by less than its own."""
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 16, bias=False))
    before = [param.detach().clone() for param in model.parameters()]
    optimizer = GaLoreAdamW(param_groups(model, RANK), lr=0.01)
    model(
        torch.randn(256, 64, generator=torch.Generator().manual_seed(0))
    ).square().sum().backward()
    optimizer.step()
    projected, hidden = (
        float((param.detach() - old).square().mean().sqrt())
        for param, old in zip(model.parameters(), before, strict=True)
    )
    assert hidden == pytest.approx(0.01 * SCALE, rel=1e-3)
    assert projected <= 0.01 * SCALE


def adapted(rank):
    """A frozen model with trained factors beside its weights, as LoRA makes it."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).requires_grad_(False)
    for layer in model:
        layer.lora_A = nn.Linear(64, rank, bias=False)
        layer.lora_B = nn.Linear(rank, 64, bias=False)
    return model


def test_frozen_weights_do_not_count_as_projected():
    with pytest.raises(ValueError, match=r"rank 16 saves no memory on any .* trained shapes"):
        param_groups(adapted(16), rank=16)
    found = kinds(param_groups(adapted(16), rank=4))
    assert {name for name in found["projected"] if "lora" in name} == {
        f"{layer}.lora_{factor}.weight" for layer in "01" for factor in "AB"
    }


def test_a_model_that_is_frozen_altogether_is_judged_as_it_is():
    groups = param_groups(nn.Sequential(nn.Linear(64, 64)).requires_grad_(False), RANK)
    assert kinds(groups)["projected"] == {"0.weight"}


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "lowrank_kernels")
    return lambda: [r.getMessage() for r in caplog.records if "plain AdamW" in r.getMessage()]


def test_groups_without_a_trained_projected_weight_are_told_by_every_optimizer(warnings):
    model = adapted(8)
    frozen = [p for p in model.parameters() if not p.requires_grad and p.dim() == 2]
    factors = [p for p in model.parameters() if p.requires_grad]
    for count in (1, 2):
        FiraAdamW([{"params": frozen, "rank": 4}, {"params": factors}])
        assert len(warnings()) == count


def test_weights_frozen_after_construction_are_told_at_the_first_step(warnings):
    model = nn.Sequential(nn.Linear(64, 64))
    optimizer = FiraAdamW([{"params": [model[0].weight], "rank": 4}, {"params": [model[0].bias]}])
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))]})
    model[0].weight.requires_grad_(False)
    assert not warnings()
    for group in optimizer.param_groups[1:]:
        group["params"][0].grad = torch.ones_like(group["params"][0])
    optimizer.step()
    optimizer.step()
    assert len(warnings()) == 1


def test_the_optimizer_of_one_parameter_is_told_nothing(warnings):
    """As gradient release has one for every parameter."""
    param = nn.Parameter(torch.ones(3))
    optimizer = FiraAdamW([param])
    param.grad = torch.ones(3)
    optimizer.step()
    assert not warnings()


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((nn.Linear(4, 4).parameters(), 8), TypeError, "takes the model, not generator"),
        ((nn.Linear(4, 4), None), TypeError, "rank must be an int, got None"),
        ((nn.Linear(4, 4), 0), ValueError, "rank must be at least 1"),
    ],
)
def test_common_first_tries_of_param_groups(arguments, error, text):
    with pytest.raises(error, match=text):
        param_groups(*arguments)


def test_group_options_given_to_the_optimizer_are_shown_the_way():
    with pytest.raises(TypeError, match=r"rank, scale: .*param_groups\(model, rank=...\)"):
        FiraAdamW(nn.Linear(4, 4).parameters(), rank=8, scale=1.0)
