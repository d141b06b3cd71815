import json

import pytest
import torch

from bench.models import PRESETS, build_model, cast_parameters
from lowrank_kernels import (
    AdaRankGradAdamW,
    ApolloAdamW,
    FiraAdamW,
    GaLoreAdamW,
    LowRankAdamW,
    param_groups,
)
from lowrank_kernels.optim.outside import TRANSFORMED
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

    facts = json_of(f"plan --model 20m --dtype {dtype} --tokens 0")
    weights = sum(param.numel() * param.element_size() for param in model.parameters())
    assert facts["weight_bytes"] == facts["gradient_bytes"] == weights
    assert {name: needs["state_bytes"] for name, needs in facts["optimizers"].items()} == held


# Those beside them, with what they are built of.
OTHERS = {
    "apollo": lambda model, rank: ApolloAdamW(param_groups(model, rank)),
    "apollo-mini": lambda model, rank: ApolloAdamW(param_groups(model, 1), per="matrix"),
    "normalize": lambda model, rank: LowRankAdamW(param_groups(model, rank), residual="normalize"),
    "sign": lambda model, rank: LowRankAdamW(
        param_groups(model, rank), residual="sign", residual_momentum=0.9
    ),
    "orthogonal": lambda model, rank: LowRankAdamW(
        param_groups(model, rank), residual="orthogonal", residual_momentum=0.9
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_hold_what_is_planned(json_of, command, name):
    model = build_model(PRESETS["nano"], 32000, 256)
    cast_parameters(model, torch.bfloat16)
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    optimizer = OTHERS[name](model, 16)
    optimizer.step()
    line = f"plan --model nano --tokens 0 --optimizers {name}"
    line += " --residual-momentum 0.9" if name in TRANSFORMED else ""
    rank = "" if name == "apollo-mini" else " --rank 16"
    needs = json_of(f"{line}{rank}")["optimizers"]
    assert needs[name]["state_bytes"] == sum(map(state_bytes, optimizer.state.values()))
    assert needs[name]["rank"] == (1 if name == "apollo-mini" else 16)
    assert ("rank 1, its own" in command(f"{line}{rank}")[1]) == (name == "apollo-mini")


def test_a_rank_that_is_asked_for_is_that_of_all_but_mini(json_of):
    line = "plan --model nano --tokens 0 --optimizers adamw,fira,apollo-mini --rank 8"
    needs = json_of(line)["optimizers"]
    assert [each["rank"] for each in needs.values()] == [None, 8, 1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", LLAMAS)
def test_larger_models_by_closed_formulas(json_of, size, dtype):
    hidden, ffn, layers, rank = LLAMAS[size]
    itemsize = DTYPES[dtype].itemsize
    blocks = [(hidden, hidden)] * 4 * layers + [(hidden, ffn)] * 3 * layers  # min, max
    others = [32000 * hidden] * 2 + [hidden] * (2 * layers + 1)
    elements = sum(small * large for small, large in blocks) + sum(others)
    facts = json_of(f"plan --model {size} --dtype {dtype} --tokens 0")
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
    facts = json_of("plan --model 350m --memory 4 --tokens 0")
    assert facts["memory_bytes"] == 4 * 10**9
    for needs in facts["optimizers"].values():
        workspace = max(needs["step_workspace_bytes"], needs["refresh_workspace_bytes"])
        parts = facts["weight_bytes"] + facts["gradient_bytes"] + needs["state_bytes"]
        assert needs["total_bytes"] == parts + workspace + facts["buffer_bytes"]
        assert needs["left_bytes"] == facts["memory_bytes"] - needs["total_bytes"]
        assert needs["activation_bytes"] is needs["most_tokens"] is None
        assert set(needs) == {
            *("state_bytes", "gradient_bytes", "activation_bytes", "step_workspace_bytes"),
            *("refresh_workspace_bytes", "peak_bytes", "peak_in", "total_bytes", "left_bytes"),
            *("most_tokens", "projected", "released", "rank", "remark", "weight_bytes"),
        }


def test_activations_of_a_llama_by_formula(json_of, tiny_config):
    """As transformers computes it in half precision, and a few numbers of its own."""
    hidden, ffn, heads, layers, vocabulary, tokens = 64, 160, 4, 3, 100, 512
    layer = 24 * hidden + 8 * ffn + 8 + 4 * heads
    recomputed = 12 * hidden + 4 * ffn + 4 * heads
    # Ids, loss and labels; the last norm and the head's input; cos and sin.
    rest = 8 + 4 * vocabulary + 8 + 4 * hidden // heads
    for flag, formula in (
        ("", layers * layer + 6 * hidden + 4 + 2 * hidden + rest),
        ("--recompute", layers * recomputed + 2 * hidden + rest),
    ):
        line = f"plan --config {tiny_config()} --tokens {tokens} --optimizers adamw {flag}"
        found = json_of(line)["optimizers"]["adamw"]["activation_bytes"]
        assert 0 <= found - tokens * formula < 1024


def test_the_head_is_the_peak_of_activations(json_of, tiny_config):
    """Three float32 for each entry of the vocabulary and token; one is saved."""
    facts = json_of(f"plan --config {tiny_config(vocab_size=8000)} --optimizers adamw")
    needs = facts["optimizers"]["adamw"]
    held = facts["weight_bytes"] + needs["state_bytes"] + needs["activation_bytes"]
    above = needs["peak_bytes"]["backward"] - held
    assert needs["peak_in"] == "backward"
    assert 0.98 < above / (2048 * 8000 * 8) < 1.02


def test_how_many_tokens_fit(json_of, command, tiny_config):
    config = f"--config {tiny_config()} --rank 8 --device cpu"
    line = f"plan {config} --optimizers galore --tokens 256 --memory 20MB"
    needs = json_of(line)["optimizers"]["galore"]
    most = needs["most_tokens"]
    assert most > 256
    at_most = json_of(line.replace("256", str(most)))["optimizers"]["galore"]
    assert 0 <= at_most["left_bytes"] < 0.05 * 20e6
    text = command(line)[1]
    assert (
        f"fits, {needs['left_bytes'] / 1e6:.2f} MB to spare; up to {most // 100 * 100:,} tokens"
        in text
    )


def test_what_to_change_cheapest_first(json_of, command, tiny_config):
    config = f"--config {tiny_config()} --rank 8 --device cpu --optimizers galore"
    total = json_of(f"plan {config} --recompute")["optimizers"]["galore"]["total_bytes"]
    line = f"plan {config} --memory {total / 1e6 + 0.001:.3f}MB"
    advice = json_of(line)["advice"]
    assert advice["add"] == ["--recompute"]
    assert advice["most_tokens"] >= 2000
    text = " ".join(command(line)[1].split())
    assert "galore fits with --recompute: " in text
    assert "too large by" in text
    assert json_of(f"{line} --recompute")["advice"] is None
    nothing = json_of(f"plan {config} --memory 1kB".replace("1kB", "0.001MB"))["advice"]
    assert nothing["add"][-1] == "--checkpointing"
    assert "The weights alone take" in nothing["text"]
    facts = json_of(f"plan {config} --recompute")
    above = (facts["weight_bytes"] + facts["buffer_bytes"]) / 1e6 + 0.001
    close = json_of(f"plan {config} --memory {above:.3f}MB --accumulate")["advice"]
    assert "does not fit, too large by" in close["text"]
    assert "--release in the place of --accumulate" in close["text"]


def test_nothing_needless_is_advised(json_of, tiny_config):
    """Inside of checkpointing nothing is left to be recomputed."""
    config = f"--config {tiny_config(num_hidden_layers=6)} --rank 8 --device cpu"
    line = f"plan {config} --optimizers galore"
    total = json_of(f"{line} --checkpointing")["optimizers"]["galore"]["total_bytes"]
    memory = f"--memory {total / 1e6 + 0.001:.3f}MB"
    advice = json_of(f"{line} {memory}")["advice"]
    assert "--checkpointing" in advice["add"]
    assert "--recompute" not in advice["add"]
    added = json_of(f"{line} {memory} {' '.join(advice['add'])}")["optimizers"]["galore"]
    assert added["total_bytes"] == advice["total_bytes"]
    assert added["left_bytes"] >= 0


def test_projected_and_released_gradients(json_of, command, tiny_config):
    line = f"plan --config {tiny_config()} --rank 8 --tokens 64 --optimizers adamw,galore,fira"
    plain = json_of(line)
    other = json_of(f"{line} --project --release")["optimizers"]
    galore, fira, adamw = (other[name] for name in ("galore", "fira", "adamw"))
    assert (galore["projected"], fira["projected"], adamw["projected"]) == (True, False, False)
    assert (galore["released"], fira["released"], adamw["released"]) == (True, True, False)
    assert galore["gradient_bytes"] == fira["gradient_bytes"] == plain["largest_gradient_bytes"]
    assert adamw["total_bytes"] == plain["optimizers"]["adamw"]["total_bytes"]
    text = command(f"{line} --project --release")[1]
    assert "adamw, fira: takes whole gradients, which are not projected." in text
    assert "adamw: all gradients are there at once." in text
    # R in float32 in the place of G.
    projected = json_of(f"{line} --project")["optimizers"]["galore"]["gradient_bytes"]
    low = 3 * 4 * 8 * (4 * 64 + 3 * 160)
    whole = 2 * (2 * 100 * 64 + 7 * 64)
    assert low + whole <= projected <= low + whole + 2 * 64 * 160


def test_a_model_that_does_not_run_on_tokens_has_no_activations(json_of, command, tmp_path):
    config = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    config |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config |= {"intermediate_size": 32, "image_size": 16, "patch_size": 8}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = f"plan --config {tmp_path} --rank 4 --memory 1"
    facts = json_of(line)
    assert facts["tokens"] is None
    assert "does not run on input_ids and labels alone" in facts["without_activations"]
    assert "to spare for activations" in command(line)[1]


def test_the_workspace_is_that_of_the_backend(json_of):
    facts = {
        name: json_of(f"plan --model 1b --tokens 0 --backend {name}")
        for name in ("reference", "native")
    }
    assert {name: each["backend"] for name, each in facts.items()} == {x: x for x in facts}
    step = {x: each["optimizers"]["fira"]["step_workspace_bytes"] for x, each in facts.items()}
    full = 4 * 2048 * 5461
    assert 4 * full < step["reference"] < 6 * full
    assert step["native"] < full


@pytest.mark.parametrize(("device", "expected"), [("", "cuda"), ("--device cpu", "cpu")])
def test_a_card_is_a_cuda_device_unless_another_is_named(json_of, device, expected):
    on_card = json_of(f"plan --model 60m --card rtx-3060 --tokens 0 {device}")
    on_device = json_of(f"plan --model 60m --memory 11.7GiB --tokens 0 --device {expected}")
    assert on_card == on_device
    assert on_card["device"] == expected
    assert json_of("plan --model 60m --memory 12 --tokens 0")["device"] == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_plan_for_a_card_that_is_not_there_is_predicted(command, json_of):
    """What a GPU would take, in batches as large as its memory allows."""
    pytest.importorskip("triton")
    large, small = (
        json_of(f"plan --model 7b --optimizers fira --card {card} --tokens 0")
        for card in ("h200", "rtx-4090")
    )
    step = {name: x["optimizers"]["fira"]["step_workspace_bytes"] for name, x in
            (("large", large), ("small", small))}  # fmt: skip
    assert large["backend"] == small["backend"] == "triton"
    assert large["predicted"]
    assert 139.8 * 2**30 // 128 * 0.9 < step["large"] < 139.8 * 2**30 // 128 * 1.1
    assert step["small"] < 23.5 * 2**30 // 128 * 1.1
    assert "The backend is predicted" in command("plan --model nano --card h200")[1]
    for named in ("--card h200 --backend foreach", "--device cpu"):
        assert not json_of(f"plan --model nano {named}")["predicted"]


def test_the_cards(json_of):
    cards = {"rtx-4090": 23.5, "l4": 22.0, "a100-80": 79.1, "h200": 139.8, "mi300x": 191.6}
    for card, size in cards.items():
        facts = json_of(f"plan --model nano --card {card} --tokens 0 --optimizers adamw")
        assert facts["memory_bytes"] == round(size * 2**30)
        assert facts["allowance_bytes"] == 768 * 2**20


@pytest.mark.parametrize(
    ("text", "size"),
    [("24", 24e9), ("24GB", 24e9), ("24GiB", 24 * 2**30), ("1.5gib", 1.5 * 2**30), ("900MB", 9e8)],
)
def test_amounts_of_memory(json_of, text, size):
    line = f"plan --model nano --tokens 0 --optimizers adamw --memory {text}"
    assert json_of(line)["memory_bytes"] == size


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
    status, out, err = command("plan --model 7b --card h200 --tokens 0")
    assert (status, err) == (0, [])
    assert "6,738,415,616 parameters" in out
    assert "150.11 GB" in out
    assert "to spare for activations" in out
    assert "without activations" in out
    assert "too large by" in command("plan --model 7b --card rtx-4090 --tokens 0")[1]


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
        (
            "plan --model nano --optimizers sign --residual-momentum 2",
            "residual_momentum must be in [0, 0.98], got 2",
        ),
        (
            "plan --model nano --optimizers fira,sign --residual-momentum 0.9",
            "--residual-momentum is of sign and orthogonal, and fira has none",
        ),
        ("plan --model nano --memory 0", "--memory must be an amount above 0"),
        ("plan --model nano --memory 3GF", "as 24, which are GB, 24GB or 24GiB, got 3GF"),
        ("plan --model nano --tokens -1", "--tokens must be at least 0, got -1"),
        ("plan --model nano --release --accumulate", "what is released adds up to nothing"),
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
