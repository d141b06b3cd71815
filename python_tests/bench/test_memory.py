"""The memory bench counts what formulas say, and GaLore's published savings come out of it."""

import itertools
import json
import math

import pytest
import torch

from bench import memory
from bench.figures import RESULTS
from bench.measure import tensor_bytes
from bench.tables import less_text, share_text

CASES = [("60m", 128), ("350m", 256), ("1b", 512), ("7b", 1024), ("7b", 64)]
# Hidden size, size of the feed-forward layer, layers.
SIZES = {
    "60m": (512, 1376, 8),
    "350m": (1024, 2736, 24),
    "1b": (2048, 5461, 24),
    "7b": (4096, 11008, 32),
}
# Of every projected matrix, beside moments and basis: steps, the limiter's norm, two measures.
SCALARS = {"galore": 4, "fira": 8, "adarankgrad": 12}


def matrix_bytes(name, rows, cols, rank, state, basis):
    """Of a projected matrix with bfloat16 weights."""
    large, small = max(rows, cols), min(rows, cols)
    moments = {
        "float32": 8 * rank * large,
        "bfloat16": 4 * rank * large,
        "int8": 2 * rank * large + 2 * 4 * math.ceil(large / 64) * rank,
    }
    bases = {
        "weight": 2 * small * rank,
        "int8": small * rank + 4 * rank,
        "int4": small * rank // 2 + 4 * math.ceil(small / 64) * rank,
    }
    return moments[state] + bases[basis] + SCALARS[name]


def embedding_bytes(elements, state):
    codes = 2 * elements + 2 * 4 * math.ceil(elements / 256)
    return 4 + {"float32": 8 * elements, "bfloat16": 4 * elements, "int8": codes}[state]


def model_bytes(name, model, rank, state, basis, layers=None):
    hidden, ffn, all_layers = SIZES[model]
    layers = layers or all_layers
    matrices = [(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    projected = sum(matrix_bytes(name, *shape, rank, state, basis) for shape in matrices)
    norms = (2 * layers + 1) * (8 * hidden + 4)
    return layers * projected + norms + 2 * embedding_bytes(32_000 * hidden, state)


@pytest.mark.parametrize(("model", "rank"), CASES)
@pytest.mark.parametrize("name", memory.OURS)
def test_state_of_every_format_by_formula(name, model, rank):
    """One block and everything around it."""
    module = memory.on_meta(model, "bf16", layers=1)
    for state, basis in itertools.product(
        ("float32", "bfloat16", "int8"), ("weight", "int8", "int4")
    ):
        found = memory.ours(module, name, rank, state, basis)
        assert found == model_bytes(name, model, rank, state, basis, layers=1), (state, basis)


@pytest.mark.parametrize("name", memory.OURS)
@pytest.mark.parametrize("state", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("basis", ["weight", "int8", "int4"])
def test_what_is_counted_is_what_a_step_leaves(name, state, basis):
    """Odd sizes, both sides, an embedding of more than 4,096 elements and one of less."""
    shapes = {"a": (100, 66), "b": (67, 131), "head": (301, 15), "small": (60, 60), "norm": (66,)}
    values = {key: torch.randn(shape).bfloat16() for key, shape in shapes.items()}
    params = {key: torch.nn.Parameter(value) for key, value in values.items()}
    groups = [
        {"params": [(key, params[key]) for key in ("a", "b")], "rank": 9},
        {"params": [(key, params[key]) for key in ("head", "small", "norm")]},
    ]
    options = {"residual_energy": None} if name == "adarankgrad" else {}
    optimizer = memory.OURS[name](groups, state=state, basis=basis, **options)
    planned = {row["name"]: row["state_bytes"] for row in optimizer.plan()}
    for param in params.values():
        param.grad = torch.randn_like(param)
    optimizer.step()
    for key, param in params.items():
        assert tensor_bytes(optimizer.state[param]) == planned[key], key


@pytest.fixture(scope="module")
def kept():
    return json.loads((RESULTS / "memory.json").read_text())


def test_the_record_has_every_format_of_whole_models_to_the_byte(kept):
    own = [row for row in kept["rows"] if row["optimizer"] in memory.OURS]
    assert {(row["model"], row["rank"]) for row in own} == set(CASES)
    assert len(own) == len(CASES) * len(memory.OURS) * len(memory.FORMATS)
    for row in own:
        key = [row[name] for name in ("optimizer", "model", "rank", "state", "basis")]
        assert row["state_bytes"] == model_bytes(*key), key


@pytest.mark.parametrize("model", SIZES)
def test_rivals_of_the_record_by_formula(model, kept):
    """8 bits with a float32 scale for 256 elements, and at 7B norms of 4,096 elements, too."""
    hidden, ffn, layers = SIZES[model]
    shapes = [(hidden, hidden)] * 4 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    shapes = layers * shapes + [(32_000, hidden)] * 2
    norms, tensors = 2 * layers + 1, len(shapes) + 2 * layers + 1
    elements = sum(rows * cols for rows, cols in shapes)
    count, blocks = elements + norms * hidden, sum(math.ceil(r * c / 256) for r, c in shapes)
    of_norm = 8 * hidden if hidden < 4096 else 2 * hidden + 8 * hidden // 256
    sums = sum(rows + cols for rows, cols in shapes)
    expected = {
        "adamw": 4 * count + 4 * tensors,
        "adamw-fp32": 8 * count + 4 * tensors,
        "adamw-master": 12 * count + 4 * tensors,
        "adamw-8bit": 2 * elements + 8 * blocks + norms * of_norm,
        "adamw-factored-8bit": elements + 4 * blocks + 4 * sums + norms * 8 * hidden,
    }
    found = {
        row["optimizer"]: row["state_bytes"]
        for row in kept["rows"]
        if row["model"] == model and row["optimizer"] not in memory.OURS
    }
    assert found == expected


def test_8bit_adamw_is_counted_as_bitsandbytes_keeps_it():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    shapes = [(70, 100), (60, 60), (4096,), (4095,), (1000, 33)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    optimizer = bitsandbytes.optim.AdamW8bit(params)
    optimizer.step()
    for param in params:
        kept = {k: v for k, v in optimizer.state[param].items() if k.startswith(("state", "absm"))}
        found = sum(value.numel() * value.element_size() for value in kept.values())
        assert found == memory.eight_bit_bytes(param.numel())


def test_the_record_holds_plans_and_accounts(tmp_path, capsys):
    out = tmp_path / "memory.json"
    memory.main(["--models", "60m", "--dtypes", "bf16,fp32", "--out", str(out)])
    record = json.loads(out.read_text())
    rows = {
        (row["optimizer"], row["dtype"], row["state"], row["basis"]): row for row in record["rows"]
    }
    names = {name for name, *_ in rows}
    assert names == {
        *("adamw", "adamw-master", "adamw-fp32", "adamw-8bit", "adamw-factored-8bit"),
        *memory.OURS,
    }
    adamw, fira = rows["adamw", "bf16", None, None], rows["fira", "bf16", "int8", "int4"]
    assert adamw["state_bytes"] == 4 * adamw["parameters"] + 4 * (8 * 9 + 3)
    assert fira["of_adamw"] == fira["state_bytes"] / adamw["state_bytes"]
    eight = rows["adamw-8bit", "bf16", None, None]["state_bytes"]
    assert fira["of_adamw_8bit"] == fira["state_bytes"] / eight
    assert "published: 65.5 % less and 82.5 % less" in capsys.readouterr().out


def test_both_published_savings_are_of_8_bit_galore(kept):
    """A byte a number and no scales, against 8-bit AdamW with scales and against bfloat16."""
    accounts = {row["text"]: row for row in kept["accounting"]}
    (counted,) = (row for text, row in accounts.items() if "published" in text)
    hidden, ffn, layers = SIZES["7b"]
    basis = layers * 7 * 1024 * hidden
    moments = layers * 2 * 1024 * (4 * hidden + 3 * ffn)
    rest = 2 * 32_000 * hidden + (2 * layers + 1) * hidden
    assert counted["state_bytes"] == basis + moments + 2 * rest
    assert 100 * counted["less_than_8bit"] == pytest.approx(65.5, abs=0.2)
    assert 100 * counted["less_than_bf16"] == pytest.approx(82.5, abs=0.1)


def test_what_is_rounded_favours_no_state():
    assert share_text(0.18236) == "18.3 %"
    assert less_text(1 - 0.18236) == "81.7 %"
    assert share_text(1.0) == "100.0 %"


def test_products_of_newton_schulz_by_formula():
    """LLaMA 60M: 8 layers of four square matrices and three of the feed-forward part."""
    found, hidden, wide = memory.orthogonalization("60m"), 512, 1376
    square = 6 * hidden**3
    oblong = 4 * hidden**2 * wide + 2 * hidden**3
    assert found["flops"] == 8 * 5 * (4 * square + 3 * oblong)
    weights = 8 * (4 * hidden**2 + 3 * hidden * wide) + 32_000 * hidden
    assert found["flops_per_token"] == 6 * weights
    share = found["flops"] / (found["tokens_of_tenth"] * 6 * weights)
    assert 0.0999 < share <= 0.1
