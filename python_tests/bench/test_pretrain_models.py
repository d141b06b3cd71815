import pytest
import torch

from bench.models import BLOCKS, PRESETS, attend_by_products, build_model, cast_parameters
from bench.optimizers import METHODS
from bench.peers import Recipe
from bench.settings import parse
from lowrank_kernels import param_groups

# Millions of parameters at a vocabulary of 32000, as published with GaLore's configurations.
PUBLISHED = {
    "9m": 9.0,
    "20m": 19.5,
    "35m": 35.2,
    "60m": 58.1,
    "130m": 134.1,
    "350m": 368.0,
    "1b": 1339.1,
    "3b": 2685.8,
    "7b": 6738.4,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_sizes(name):
    with torch.device("meta"):
        model = build_model(PRESETS[name], 32000, 256)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(millions, 1) == PUBLISHED[name]


def test_every_preset_is_known_or_nano():
    assert set(PRESETS) == {"nano", *PUBLISHED}


@pytest.mark.parametrize(("name", "expected"), [("9m-bytes", 8.8), ("20m-bytes", 19.7)])
def test_models_of_blocks_have_their_parameters_there(name, expected):
    with torch.device("meta"):
        model = build_model(BLOCKS[name], 257, 256)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert round(millions, 1) == expected
    groups = param_groups(model, BLOCKS[name].rank)
    projected = sum(p.numel() for g in groups if "rank" in g for _, p in g["params"]) / 1e6
    assert projected > 0.97 * millions


def test_cast_leaves_the_rotary_frequencies_exact():
    model = build_model(PRESETS["nano"], 257, 16)
    cast_parameters(model, torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in model.buffers()} == {torch.float32}


def test_split_gives_matrices_of_the_blocks_the_scaled_rate():
    model = build_model(PRESETS["nano"], 257, 16)
    settings = parse(["--scale", "0.25"]).settings
    optimizer = METHODS["adamw-split"].build(param_groups(model, 8), 0.02, settings.recipe)
    rates = {
        id(parameter): group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert len(rates) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        projected = "_proj." in name
        assert rates[id(parameter)] == (0.005 if projected else 0.02), name
    assert sum("_proj." in name for name, _ in model.named_parameters()) == 4 * 7


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_every_parameter(name):
    if reason := METHODS[name].obstacle("cpu"):
        pytest.skip(reason)
    model = build_model(PRESETS["nano"], 257, 16)
    optimizer = METHODS[name].optimizer_of(model, param_groups(model, 8), 0.01, Recipe())
    before = [parameter.detach().clone() for parameter in model.parameters()]
    tokens = torch.arange(32).view(2, 16)
    model(input_ids=tokens).logits.square().mean().backward()
    optimizer.step()
    moved = [not a.equal(b) for a, b in zip(before, model.parameters(), strict=True)]
    assert all(moved)


def test_attention_by_products_is_torchs():
    torch.manual_seed(0)
    model = build_model(PRESETS["nano"], 257, 16).double()
    tokens, found = torch.arange(32).view(2, 16), []
    for products in (False, True):
        if products:
            attend_by_products(model)
        loss = model(input_ids=tokens, labels=tokens).loss
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        found.append([loss, *gradients])
    # Transformers' norms are in float32, whatever the model is in.
    for ours, torchs in zip(found[1], found[0], strict=True):
        assert float((ours - torchs).norm()) <= 1e-5 * float(torchs.norm())
