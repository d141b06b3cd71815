import pytest
import torch

from bench.models import PRESETS, build_model, cast_parameters
from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, param_groups
from lowrank_kernels.optim.state import state_bytes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OPTIMIZERS = {
    "adamw": lambda model, rank: torch.optim.AdamW(model.parameters()),
    "galore": lambda model, rank: GaLoreAdamW(param_groups(model, rank)),
    "fira": lambda model, rank: FiraAdamW(param_groups(model, rank)),
    "adarankgrad": lambda model, rank: AdaRankGradAdamW(
        param_groups(model, rank), residual_energy=0.0
    ),
}
# hidden, ffn, layers, rank
LLAMAS = {
    "130m": (768, 2048, 12, 256),
    "350m": (1024, 2736, 24, 256),
    "1b": (2048, 5461, 24, 512),
    "3b": (2560, 6848, 32, 640),
    "7b": (4096, 11008, 32, 1024),
}
# Beside a float32 step: Fira's limiter; the measure of the criterion and what it is compared with.
SCALARS = {"galore": 4, "fira": 8, "adarankgrad": 12}


@pytest.mark.parametrize("dtype", DTYPES)
def test_20m_holds_what_is_planned(json_of, dtype):
    model = build_model(PRESETS["20m"], 32000, 256)
    cast_parameters(model, DTYPES[dtype])
    rng = torch.Generator().manual_seed(0)
    for param in model.parameters():
        param.grad = torch.empty_like(param).normal_(generator=rng)
    held = {}
    for name, build in OPTIMIZERS.items():
        optimizer = build(model, 64)
        optimizer.step()
        held[name] = sum(state_bytes(state) for state in optimizer.state.values())

    facts = json_of(f"plan --model 20m --dtype {dtype}")
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    assert facts["weight_bytes"] == facts["gradient_bytes"] == weights
    assert {name: needs["state_bytes"] for name, needs in facts["optimizers"].items()} == held


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", LLAMAS)
def test_larger_models_by_closed_formulas(json_of, size, dtype):
    hidden, ffn, layers, rank = LLAMAS[size]
    itemsize = DTYPES[dtype].itemsize
    blocks = [(hidden, hidden)] * 4 * layers + [(hidden, ffn)] * 3 * layers  # min, max
    others = [32000 * hidden] * 2 + [hidden] * (2 * layers + 1)
    elements = sum(small * large for small, large in blocks) + sum(others)
    facts = json_of(f"plan --model {size} --dtype {dtype}")
    assert facts["parameters"] == elements
    assert facts["rank"] == rank
    assert facts["weight_bytes"] == facts["gradient_bytes"] == elements * itemsize

    plain = sum(2 * 4 * count + 4 for count in others)
    low = sum(rank * (small * itemsize + 2 * large * 4) for small, large in blocks)
    expected = {name: plain + low + each * len(blocks) for name, each in SCALARS.items()}
    expected["adamw"] = 2 * elements * itemsize + 4 * (len(blocks) + len(others))
    state = {name: needs["state_bytes"] for name, needs in facts["optimizers"].items()}
    assert state == expected


def test_totals_and_what_is_left(json_of):
    facts = json_of("plan --model 350m --memory 4")
    assert facts["memory_bytes"] == 4 * 10**9
    for needs in facts["optimizers"].values():
        workspace = max(needs["step_workspace_bytes"], needs["refresh_workspace_bytes"])
        parts = facts["weight_bytes"] + facts["gradient_bytes"] + needs["state_bytes"]
        assert needs["total_bytes"] == parts + workspace
        assert needs["left_bytes"] == 4 * 10**9 - needs["total_bytes"]
    assert set(needs) == {
        "state_bytes",
        "step_workspace_bytes",
        "refresh_workspace_bytes",
        "remark",
        "total_bytes",
        "left_bytes",
    }


def test_the_workspace_is_that_of_the_backend(json_of):
    facts = {name: json_of(f"plan --model 1b --backend {name}") for name in ("reference", "native")}
    assert {name: each["backend"] for name, each in facts.items()} == {x: x for x in facts}
    step = {x: each["optimizers"]["fira"]["step_workspace_bytes"] for x, each in facts.items()}
    full = 4 * 2048 * 5461
    assert 4 * full < step["reference"] < 6 * full
    assert step["native"] < full


@pytest.mark.parametrize(("device", "expected"), [("", "cuda"), ("--device cpu", "cpu")])
def test_a_card_is_a_cuda_device_unless_another_is_named(json_of, device, expected):
    on_card = json_of(f"plan --model 60m --card rtx-3060 {device}")
    on_device = json_of(f"plan --model 60m --memory 12 --device {expected}")
    assert on_card == on_device
    assert on_card["device"] == expected
    assert json_of("plan --model 60m --memory 12")["device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_plan_for_a_card_that_is_not_there_is_predicted(command, json_of):
    """What a GPU would take, in batches as large as its memory allows."""
    pytest.importorskip("triton")
    large, small = (
        json_of(f"plan --model 7b --optimizers fira --card {card}") for card in ("h200", "rtx-4090")
    )
    step = {name: x["optimizers"]["fira"]["step_workspace_bytes"] for name, x in
            (("large", large), ("small", small))}  # fmt: skip
    assert large["backend"] == small["backend"] == "triton"
    assert large["predicted"]
    assert 141 * 2**30 // 128 * 0.9 < step["large"] < 141 * 2**30 // 128 * 1.1
    assert step["small"] < 24 * 2**30 // 128 * 1.1
    assert "The backend is predicted" in command("plan --model nano --card h200")[1]
    for named in ("--card h200 --backend foreach", "--device cpu"):
        assert not json_of(f"plan --model nano {named}")["predicted"]


def test_the_cards(json_of):
    cards = ("rtx-4080", "rtx-4090", "rtx-5090", "l40s", "a6000", "h200")
    memory = [json_of(f"plan --model nano --card {card}")["memory_bytes"] for card in cards]
    assert memory == [size * 10**9 for size in (16, 24, 32, 48, 48, 141)]


def test_the_largest_gradient(command, json_of, tiny_config):
    path = tiny_config(vocab_size=1000)
    assert json_of(f"plan --config {path}")["largest_gradient_bytes"] == 2 * 1000 * 64
    out = " ".join(command(f"plan --config {path}")[1].split())
    assert "largest gradient, 128.00 kB" in out


def test_more_state_than_adamw_is_explained(command, json_of, tiny_config):
    path = tiny_config(vocab_size=1000, num_hidden_layers=1)
    facts = json_of(f"plan --config {path} --rank 8")["optimizers"]
    assert facts["galore"]["state_bytes"] > facts["adamw"]["state_bytes"]
    assert facts["adamw"]["remark"] is None
    elements = 2 * 1000 * 64 + 3 * 64
    ours, adamw = 2 * 4 * elements + 4 * 5, 2 * 2 * elements + 4 * 5
    assert facts["galore"]["remark"] == (
        "more state than adamw's: what is not projected holds float32 moments,"
        f" {ours / 1e6:.2f} MB where adamw's take {adamw / 1e3:.2f} kB, the largest part"
        " model.embed_tokens.weight"
    )
    out = command(f"plan --config {path} --rank 8")[1]
    assert "galore, fira, adarankgrad: more state than adamw's: what is not" in out
    facts = json_of(f"plan --config {path} --rank 8 --dtype fp32")["optimizers"]
    assert not any(needs["remark"] for needs in facts.values())


def test_a_rank_that_costs_more_than_adamw_is_named(json_of, tiny_config):
    facts = json_of(f"plan --config {tiny_config()} --rank 40 --optimizers fira")
    remark = facts["optimizers"]["fira"]["remark"]
    assert "the largest part model.embed_tokens.weight; " in remark
    low = 3 * (4 * 40 * (2 * 64 + 8 * 64) + 3 * 40 * (2 * 64 + 8 * 160) + 7 * 8)
    adamw = 3 * (4 * 64 * 64 * 4 + 3 * 64 * 160 * 4 + 7 * 4)
    assert (
        f"; rank 40 takes {low / 1e3:.2f} kB for what is projected, adamw {adamw / 1e3:.2f} kB"
        in remark
    )


def test_no_memory_leaves_nothing_to_say(json_of):
    facts = json_of("plan --model nano --optimizers fira,adamw")
    assert list(facts["optimizers"]) == ["fira", "adamw"]
    assert facts["memory_bytes"] is None
    assert facts["optimizers"]["fira"]["left_bytes"] is None


def test_text(command):
    status, out, err = command("plan --model 7b --card h200")
    assert (status, err) == (0, [])
    assert "6,738,415,616 parameters" in out
    assert "141.00 GB" in out
    assert "for activations" in out
    assert "too large by" in command("plan --model 7b --card rtx-4090")[1]


def test_a_config_of_transformers(json_of, tiny_config):
    facts = json_of(f"plan --config {tiny_config()} --rank 8 --dtype fp32")
    elements = 2 * 100 * 64 + 3 * (4 * 64 * 64 + 3 * 64 * 160 + 2 * 64) + 64
    assert (facts["parameters"], facts["rank"]) == (elements, 8)
    by_default = json_of(f"plan --config {tiny_config()}")
    assert by_default["rank"] == 64 // 4


def test_tied_weights_count_once(json_of, tiny_config):
    loose = json_of(f"plan --config {tiny_config()}")
    tied = json_of(f"plan --config {tiny_config(tie_word_embeddings=True)}")
    assert loose["parameters"] - tied["parameters"] == 100 * 64


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("plan --model 8b", "--model 8b is not one of nano, 9m"),
        ("plan --config missing.json", "missing.json: there is no such file"),
        ("plan --model nano --rank 0", "--rank must be at least 1, got 0"),
        ("plan --model nano --rank many", "invalid int value: 'many'"),
        ("plan --model nano --rank 5000", "rank 5000 saves no memory"),
        ("plan --model nano --optimizers lion", "'lion' is not one of adamw, galore"),
        ("plan --model nano --memory 0", "--memory must be a number of GB above 0"),
        ("plan --model nano --memory 1 --card h100", "not allowed with"),
        ("plan --model nano --card tpu", "invalid choice: 'tpu'"),
    ],
)
def test_mistakes(refused, line, words):
    assert words in refused(line)


def test_a_file_that_is_no_config(refused, tmp_path):
    path = tmp_path / "config.json"
    for text in ("no json", "{}", '{"model_type": "no-such-model"}', "[]"):
        path.write_text(text)
        assert str(path) in refused(f"plan --config {path}")


def test_a_backend_that_is_unknown_or_unavailable(refused, monkeypatch):
    monkeypatch.setenv("LOWRANK_BACKEND", "fast")
    assert "LOWRANK_BACKEND='fast' is not one of" in refused("plan --model nano")
    monkeypatch.delenv("LOWRANK_BACKEND")
    monkeypatch.setattr("lowrank_kernels.ops.native.import_error", "no such file")
    assert "cannot run here" in refused("plan --model nano --backend native")
