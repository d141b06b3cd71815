import pytest
import torch

from lowrank_kernels.ops import Side, Size, dispatch, times
from lowrank_kernels.ops.times import Times

KEYS = {
    "name",
    "shape",
    "dtype",
    "projected",
    "side",
    "rank",
    "weight_bytes",
    "gradient_bytes",
    "state_bytes",
    "state",
    "basis",
    "master",
    "lr",
    "backend",
    "reason",
}


def test_every_parameter(json_of):
    facts = json_of("explain --model nano --optimizer galore")
    assert (facts["optimizer"], facts["device"]) == ("galore", "cpu")
    rows = {row["name"]: row for row in facts["parameters"]}
    assert len(rows) == 4 * 9 + 3
    first, *_, last = rows
    assert (first, last) == ("model.embed_tokens.weight", "lm_head.weight")
    assert all(set(row) == KEYS for row in rows.values())
    down = rows["model.layers.3.mlp.down_proj.weight"]
    assert (down["side"], down["rank"], down["shape"]) == ("left", 32, [128, 352])
    assert (down["dtype"], down["backend"]) == ("bfloat16", "native")
    assert rows["model.layers.0.mlp.up_proj.weight"]["side"] == "right"
    norm, embedding = rows["model.norm.weight"], rows["model.embed_tokens.weight"]
    assert not norm["projected"]
    assert norm["reason"] == "not a matrix"
    assert embedding["reason"] == "an embedding or an output head"
    assert {row["backend"] for row in rows.values() if not row["projected"]} == {"torch"}


@pytest.mark.parametrize(("name", "rank", "lr"), [("apollo", 32, 1), ("apollo-mini", 1, 128**0.5)])
def test_apollo_has_a_scale_and_mini_a_rank_of_its_own(json_of, name, rank, lr):
    rows = json_of(f"explain --model nano --optimizer {name}")["parameters"]
    projected = [row for row in rows if row["projected"]]
    assert len(projected) == 4 * 7
    assert {(row["rank"], row["lr"]) for row in projected} == {(rank, lr)}


def test_a_rank_of_its_own_saves_memory_where_the_models_does_not(json_of, tiny_config):
    line = f"explain --config {tiny_config(num_key_value_heads=1)} --optimizer"
    small = "model.layers.0.self_attn.k_proj.weight"
    reasons = {
        name: row["reason"]
        for name in ("apollo", "apollo-mini")
        for row in json_of(f"{line} {name}")["parameters"]
        if row["name"] == small
    }
    assert reasons["apollo"] == "rank 16 saves no memory"
    assert reasons["apollo-mini"] == "compiled CPU passes"


def test_codes_without_a_rank_are_stepped_by_the_compiled_pass(json_of):
    rows = json_of("explain --model nano --state int8 --basis int4")["parameters"]
    rows = {row["name"]: row for row in rows}
    embedding, norm = rows["model.embed_tokens.weight"], rows["model.norm.weight"]
    assert (embedding["state"], embedding["basis"], embedding["backend"]) == (
        "int8",
        None,
        "native",
    )
    assert (norm["state"], norm["backend"]) == ("float32", "torch")
    assert rows["model.layers.0.mlp.up_proj.weight"]["basis"] == "int4"


def test_states_are_those_of_the_plan(json_of):
    rows = json_of("explain --model 60m --optimizer fira")["parameters"]
    planned = json_of("plan --model 60m --optimizers fira")["optimizers"]["fira"]
    assert sum(row["state_bytes"] for row in rows) == planned["state_bytes"]


def test_totals(command, json_of, tiny_config):
    path = tiny_config()
    facts = json_of(f"explain --config {path} --rank 8")
    projected = 3 * (4 * 64 * 64 + 3 * 64 * 160)
    elements = projected + 2 * 100 * 64 + 7 * 64
    assert (facts["elements"], facts["projected_elements"]) == (elements, projected)
    assert facts["state_bytes"] == sum(row["state_bytes"] for row in facts["parameters"])
    first = command(f"explain --config {path} --rank 8")[1].splitlines()[0]
    assert first.startswith(f"{path}: LlamaForCausalLM, {elements:,} parameters,")
    assert f" {projected / elements:.1%} of them projected; fira's state " in first


def test_how_fast_each_parameter_moves(command, json_of, tiny_config):
    path = tiny_config(num_key_value_heads=1)
    rows = json_of(f"explain --config {path} --rank 16")["parameters"]
    assert not next(row for row in rows if row["name"].endswith("k_proj.weight"))["projected"]
    lr = {row["name"].rpartition("0.")[2]: row["lr"] for row in rows}
    assert lr["model.embed_tokens.weight"] == lr["input_layernorm.weight"] == 1.0
    assert lr["self_attn.k_proj.weight"] == lr["mlp.up_proj.weight"] == 0.25
    lines = command(f"explain --config {path} --rank 16")[1].splitlines()
    (k_proj,) = (line for line in lines if "k_proj" in line)
    assert " 0.25 " in k_proj
    assert "learning rate" in lines[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_backend_is_that_of_the_device(json_of):
    """Predicted of a GPU that is not there."""
    pytest.importorskip("triton")
    for device, backend in (("cpu", "native"), ("cuda", "triton")):
        rows = json_of(f"explain --model nano --device {device}")["parameters"]
        assert {row["backend"] for row in rows if row["projected"]} == {backend}
        assert {row["reason"] for row in rows if row["projected"]} != {""}


def test_each_size_has_its_own_backend_on_a_gpu(json_of, gpu, monkeypatch):
    table = [
        Times("a GPU", torch.bfloat16, Size(rows, 2048, 512, Side.RIGHT), "predicted", us)
        for rows, us in ((2048, {"triton": 1, "native": 2}), (5461, {"triton": 2, "native": 1}))
    ]
    monkeypatch.setattr(times, "table", lambda: table)
    rows = json_of("explain --model 1b --device cuda")["parameters"]
    backends = {tuple(row["shape"]): row["backend"] for row in rows if row["projected"]}
    assert backends == {(2048, 2048): "triton", (5461, 2048): "native", (2048, 5461): "native"}
    plan = json_of("plan --model 1b --device cuda --optimizers galore")
    assert plan["backend"] == "native and triton"
    gpu.faults["native"] = "native fails its check"
    dispatch._chosen.cache_clear()
    rows = json_of("explain --model 1b --device cuda")["parameters"]
    found = [row for row in rows if row["shape"] == [5461, 2048]]
    assert all(row["backend"] == "triton" for row in found)
    assert all(row["reason"].endswith("; native fails its check") for row in found)


def test_text_has_a_row_a_kind(command):
    status, out, err = command("explain --model 350m")
    assert (status, err) == (0, [])
    lines = [line for line in out.splitlines() if "mlp.up_proj" in line]
    assert len(lines) == 1
    assert "model.layers.*.mlp.up_proj.weight x 24" in lines[0]
    for word in ("2736 x 1024", "right", "256", "native", "compiled CPU passes"):
        assert word in lines[0]


def test_a_matrix_that_saves_no_memory_says_so(json_of, tiny_config):
    # Of 64 x 64 and 64 x 160 only the second is smaller with 50 directions.
    path = tiny_config()
    rows = json_of(f"explain --config {path} --rank 50")["parameters"]
    square = next(row for row in rows if row["name"].endswith("0.self_attn.q_proj.weight"))
    assert not square["projected"]
    assert square["reason"] == "rank 50 saves no memory"
    assert next(row for row in rows if row["name"].endswith("0.mlp.up_proj.weight"))["projected"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("explain --model 8b", "--model 8b is not one of"),
        ("explain --model nano --optimizer adamw", "invalid choice: 'adamw'"),
        ("explain --model nano --rank -1", "--rank must be at least 1, got -1"),
        ("explain --config none.json", "there is no such file"),
    ],
)
def test_mistakes(refused, line, words):
    assert words in refused(line)
