"""Ranks by patterns and by rules: who gets which, how groups are split, and what is refused."""

import io
import logging

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, param_groups
from lowrank_kernels.optim.param_groups import decide

LAYERS = 3
MODULES = (
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)
WEIGHTS = [f"model.layers.{i}.{name}.weight" for i in range(LAYERS) for name in MODULES]


def llama() -> LlamaForCausalLM:
    """Grouped-query attention: k and v are 16 x 32, and their rank is worth less than 13."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


def layer_of(name: str) -> int:
    return int(name.split(".")[2])


def linear(name: str, weight: nn.Parameter) -> int:
    return 4 + 3 * layer_of(name)


def of_some(name: str, weight: nn.Parameter) -> int | None:
    return None if "down" in name else min(weight.shape) // 4


RANKS = {
    "int": (6, dict.fromkeys(WEIGHTS, 6)),
    "patterns": (
        {"*.layers.0.*": 3, "*.[kv]_proj.weight": 2, "*": 8},
        {n: 3 if ".0." in n else 2 if "k_proj" in n or "v_proj" in n else 8 for n in WEIGHTS},
    ),
    "the first counts": (
        {"*.k_proj.weight": 2, "*self_attn*": 4, "*": 8},
        {n: 2 if "k_proj" in n else 4 if "attn" in n else 8 for n in WEIGHTS},
    ),
    "patterns with none": (
        {"*mlp*": None, "*": 8},
        {n: 8 for n in WEIGHTS if "mlp" not in n},
    ),
    "patterns without a rest": ({"*.[qo]_proj.*": 5}, {n: 5 for n in WEIGHTS if n[-13] in "qo"}),
    "nothing left for the rest": (
        {"*attn*": 5, "*mlp*": 7, "*": 9},
        {n: 5 if "attn" in n else 7 for n in WEIGHTS},
    ),
    "linear in depth": (linear, {n: 4 + 3 * layer_of(n) for n in WEIGHTS}),
    "by shape": (of_some, {n: 4 if n[-13] in "kv" else 8 for n in WEIGHTS if "down" not in n}),
    "one that saves nothing for some": (13, {n: 13 for n in WEIGHTS if n[-13] not in "kv"}),
}


def ranks_by_name(groups: list[dict]) -> dict[str, int]:
    return {name: g["rank"] for g in groups if "rank" in g for name, _ in g["params"]}


@pytest.mark.parametrize(("rank", "expected"), RANKS.values(), ids=RANKS)
def test_every_weight_gets_its_rank(rank: object, expected: dict[str, int]) -> None:
    model = llama()
    groups = param_groups(model, rank=rank)
    assert ranks_by_name(groups) == expected
    every = [name for group in groups for name, _ in group["params"]]
    assert sorted(every) == sorted(name for name, _ in model.named_parameters())
    projected = [group["rank"] for group in groups if "rank" in group]
    assert len(projected) == len(set(projected)), "equal ranks share a group"
    assert {type(group["rank"]) for group in groups if "rank" in group} == {int}


def test_weights_without_a_rank_move_as_fast_as_their_neighbours(caplog) -> None:
    with caplog.at_level(logging.WARNING, "lowrank_kernels"):
        groups = param_groups(llama(), rank={"*attn*": 5, "*up_proj*": None}, scale=0.5)
    scales = {name: g.get("scale") for g in groups for name, _ in g["params"]}
    assert {scales[name] for name in WEIGHTS} == {0.5}
    assert "mlp.up_proj.weight (64 x 32): given no rank, 3 of them" in caplog.text
    assert "mlp.down_proj.weight (32 x 64): given no rank, 3 of them" in caplog.text


def test_a_rule_sees_the_weights_that_are_matched_and_no_others() -> None:
    model, seen = llama(), {}

    def rule(name: str, weight: nn.Parameter) -> int:
        seen[name] = weight
        return 4

    param_groups(model, rank=rule, targets=["q_proj", "lm_head"])
    assert sorted(seen) == [name for name in sorted(WEIGHTS) if "q_proj" in name]
    assert all(weight is model.get_parameter(name) for name, weight in seen.items())


def test_with_the_other_arguments() -> None:
    groups = param_groups(
        llama(),
        rank={"*.0.*": 3, "*": 6},
        targets=["q_proj", "down_proj"],
        weight_decay=0.1,
        scale=0.5,
        update_proj_gap=7,
        proj_type="left",
    )
    common = {"update_proj_gap": 7, "scale": 0.5, "proj_type": "left", "weight_decay": 0.1}
    projected = [g for g in groups if "rank" in g]
    assert [{k: v for k, v in g.items() if k != "params"} for g in projected] == [
        {"rank": rank, **common} for rank in (3, 6)
    ]
    assert sorted(ranks_by_name(groups)) == sorted(
        name for name in WEIGHTS if "q_proj" in name or "down_proj" in name
    )


def test_transposed_weights_keep_their_side() -> None:
    model = nn.ModuleList([Conv1D(8, 8), nn.Linear(8, 8)])
    groups = param_groups(model, rank={"0.*": 2, "1.*": 3})
    sides = {g["rank"]: g["proj_type"] for g in groups if "rank" in g}
    assert sides == {2: "left", 3: "std"}


REFUSED = {
    "float": (lambda *_: 2.5, TypeError, r"rank of .*layers\.0.*must be an int, got 2\.5"),
    "bool": (lambda *_: True, TypeError, r"rank of .*layers\.0.*must be an int, got True"),
    "text": (lambda *_: "4", TypeError, "must be an int, got '4'"),
    "zero": (
        lambda name, _: layer_of(name),
        ValueError,
        r"rank of model\.layers\.0\.self_attn\.q_proj\.weight must be at least 1, got 0",
    ),
    "float of a pattern": ({"*": 2.5}, TypeError, r"pattern '\*' must be an int, got 2\.5"),
    "zero of a pattern": ({"*attn*": 4, "*": 0}, ValueError, r"pattern '\*' must be at least 1"),
    "a rank beside no pattern": ({3: 4}, TypeError, "patterns are text, got 3"),
    "no pattern": ({}, ValueError, "has no pattern"),
    "no match": ({"*c_attn*": 4, "*": 8}, ValueError, r"'\*c_attn\*' matches no weight.* at all"),
    "a module's name": ({"*q_proj": 4, "*": 8}, ValueError, r"called as 'model\.layers\.0\."),
    "not projected": ({"lm_head.weight": 4, "*": 8}, ValueError, "matches no weight that would"),
    "behind the rest": ({"*": 8, "*q_proj*": 4}, ValueError, r"'\*q_proj\*'.* none before it"),
    "none for all": ({"*": None}, ValueError, "gives none to any matched trained module"),
    "saves nothing": ({"*.0.*": 40, "*": 64}, ValueError, r"rank 40, 64 saves no memory.*\(16, 32"),
    "no number": ("4", TypeError, "rank must be an int"),
}


@pytest.mark.parametrize(("rank", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(rank: object, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        param_groups(llama(), rank=rank)


def test_brackets_in_names_are_to_be_escaped() -> None:
    model = nn.ModuleDict({name: nn.Sequential(nn.Linear(8, 8)) for name in ("out", "in[0]")})
    with pytest.raises(ValueError, match="matches no weight") as error:
        param_groups(model, rank={"in[0].*": 2, "*": 3})
    assert "called as 'in[0].0.weight', of which the pattern is 'in[[]0].0.weight'" in str(
        error.value
    )
    groups = param_groups(model, rank={"in[[]0].0.weight": 2, "*": 3})
    assert ranks_by_name(groups) == {"in[0].0.weight": 2, "out.0.weight": 3}
    with pytest.raises(ValueError, match=r"called as 'out\.0\.weight'$"):
        param_groups(model, rank={"inner.*": 2, "*": 3})


def test_no_match_of_targets_is_told_first() -> None:
    with pytest.raises(ValueError, match="no trained linear module matches"):
        param_groups(llama(), rank={"*": 4}, targets="no_such")


def test_decisions_tell_ranks() -> None:
    found = {each.name: each.rank for each in decide(llama(), {"*attn*": 4})}
    assert {name: rank for name, rank in found.items() if rank} == {
        name: 4 for name in WEIGHTS if "attn" in name
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)
        tokens = torch.randint(64, (2, 8))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("make", [GaLoreAdamW, FiraAdamW, AdaRankGradAdamW])
def test_groups_of_several_ranks_train_explain_plan_and_resume(make) -> None:
    def start():
        model = llama()
        groups = param_groups(model, rank=linear, update_proj_gap=3)
        return model, make(groups, lr=0.01)

    model, optimizer = start()
    train(model, optimizer, range(4))
    expected = RANKS["linear in depth"][1]
    planned = {row["name"]: row for row in optimizer.plan()}
    for row in optimizer.explain():
        if make is not AdaRankGradAdamW:  # whose ranks are what the gradient needs, or less
            assert row["rank"] == expected.get(row["name"])
            assert row["state_bytes"] == planned[row["name"]]["state_bytes"]
        assert planned[row["name"]]["rank"] == expected.get(row["name"])
        assert row["backend"] != "none"
    buffer = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), buffer)
    train(model, optimizer, range(4, 8))

    buffer.seek(0)
    twin, resumed = start()
    for part, saved in zip((twin, resumed), torch.load(buffer, weights_only=True), strict=True):
        part.load_state_dict(saved)
    train(twin, resumed, range(4, 8))
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_checkpoint_of_other_ranks_is_refused_or_told(caplog) -> None:
    model = llama()
    optimizer = GaLoreAdamW(param_groups(model, rank={"*attn*": 4, "*": 6}), lr=0.01)
    train(model, optimizer, range(1))
    saved = optimizer.state_dict()
    other = GaLoreAdamW(param_groups(llama(), rank={"*q_proj*": 4, "*": 6}), lr=0.01)
    with pytest.raises(ValueError, match=r"place .* holds the state of"):
        other.load_state_dict(saved)
    assert not other.state
    other = GaLoreAdamW(param_groups(llama(), rank={"*attn*": 3, "*": 6}), lr=0.01)
    with caplog.at_level(logging.WARNING, "lowrank_kernels"):
        other.load_state_dict(saved)
    assert "rank 4 (here 3)" in caplog.text
