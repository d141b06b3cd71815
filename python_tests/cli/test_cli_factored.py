"""`plan --factored`: bytes by formula, held by a model that is really built, and refusals."""

import pytest
import torch

from bench.models import PRESETS, build_model, cast_parameters
from lowrank_kernels import LowRankAdamW, factorize
from lowrank_kernels.optim.state import state_bytes

# hidden, ffn, layers, rank
LLAMAS = {
    "60m": (512, 1376, 8, 128),
    "130m": (768, 2048, 12, 256),
    "350m": (1024, 2736, 24, 256),
    "1b": (2048, 5461, 24, 512),
    "7b": (4096, 11008, 32, 1024),
}


@pytest.mark.parametrize("sparse", [0.0, 0.03])
@pytest.mark.parametrize("name", LLAMAS)
def test_bytes_by_formula(json_of, name: str, sparse: float) -> None:
    hidden, ffn, layers, rank = LLAMAS[name]
    shapes = [(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    low = layers * sum(rank * (rows + cols) for rows, cols in shapes)
    values = layers * sum(int(sparse * rows * cols) for rows, cols in shapes)
    others, parameters = 2 * 32_000 * hidden + (2 * layers + 1) * hidden, 2 * layers + 3
    trained = low + values + others
    count = parameters + layers * len(shapes) * (3 if sparse else 2)
    line = f"plan --model {name} --factored {rank} --sparse {sparse} --tokens 0 --optimizers adamw"
    facts = json_of(line)
    needs = facts["optimizers"]["factored-adamw"]
    assert needs["weight_bytes"] == 2 * trained + 4 * values + facts["buffer_bytes"]
    assert needs["gradient_bytes"] == 2 * trained
    assert needs["state_bytes"] == 4 * trained + 4 * count
    dense = facts["optimizers"]["adamw"]
    assert dense["weight_bytes"] == facts["weight_bytes"] + facts["buffer_bytes"]
    for kind in ("weight", "gradient", "state", "total"):
        assert needs[f"{kind}_bytes"] < dense[f"{kind}_bytes"]


@pytest.mark.parametrize("state", ["float32", "int8"])
def test_a_model_holds_what_is_planned(json_of, state: str) -> None:
    model = build_model(PRESETS["20m"], 32000, 256)
    cast_parameters(model, torch.bfloat16)
    factorize(model, 32, sparse=0.02, init="random")
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    if state == "float32":
        optimizer = torch.optim.AdamW(model.parameters())
    else:
        optimizer = LowRankAdamW(model.named_parameters(), state=state)
    optimizer.step()
    line = "plan --model 20m --factored 32 --sparse .02 --tokens 0 --optimizers adamw --state"
    facts = json_of(f"{line} {state}")
    needs = facts["optimizers"]["factored-adamw"]
    places = [place for name, place in model.named_buffers() if name.endswith("indices")]
    held = [each.numel() * each.element_size() for each in (*model.parameters(), *places)]
    assert needs["weight_bytes"] - facts["buffer_bytes"] == sum(held)
    assert needs["state_bytes"] == sum(map(state_bytes, optimizer.state.values()))


def test_activations_are_those_of_the_dense_model_and_of_the_products_between(
    json_of, tiny_config
) -> None:
    """x A^T of each of seven layers in a block; and nothing of the sparse part."""
    line = f"plan --config {tiny_config()} --tokens 512 --optimizers adamw --factored 8"
    for sparse in ("0", ".05"):
        found = json_of(f"{line} --sparse {sparse}")["optimizers"]
        more = 2 * 512 * 8 * 7 * 3
        saved = found["adamw"]["activation_bytes"] + more
        assert found["factored-adamw"]["activation_bytes"] == saved


def test_the_table_has_a_row_and_a_column_more(command, tiny_config) -> None:
    line = f"plan --config {tiny_config()} --tokens 64 --optimizers adamw"
    status, out, _ = command(f"{line} --factored 8 --sparse .05 --memory 1 --project --release")
    assert status == 0
    header, *rows = (row for row in out.splitlines() if "  " in row)
    assert header.split()[:2] == ["optimizer", "weights"]
    assert rows[-1].startswith("factored-adamw")
    assert "rank 8 with 5 % of entries in 21 of 22 linear layers" in out
    assert "weights  state" not in command(line)[1]


REFUSED = {
    "--sparse .1": "--sparse is a part of factored layers: name a rank, --factored",
    "--factored 0": "--factored must be at least 1, got 0",
    "--factored 8 --sparse 2": "sparse must be a share of entries",
    "--factored 64": "rank 64 saves no memory",
    "--factored 8 --gpus 8": "--factored and --gpus do not go together",
}


@pytest.mark.parametrize(("line", "text"), REFUSED.items())
def test_what_is_refused(refused, tiny_config, line: str, text: str) -> None:
    assert text in refused(f"plan --config {tiny_config()} {line}")
