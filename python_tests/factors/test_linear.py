"""The factored layer: function and gradients, first values, and what it is beside others."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_kernels import FactoredLinear

ROWS, COLS, RANK = 24, 40, 5
# With and without each of what a layer may have.
KINDS = {
    "plain": {"bias": False},
    "bias": {},
    "scaled": {"scale": 0.25},
    "sparse": {"sparse": 0.05},
    "all": {"sparse": 0.05, "scale": -2.0},
}


def layer(dtype=torch.float64, **options) -> FactoredLinear:
    made = FactoredLinear(COLS, ROWS, RANK, dtype=dtype, seed=1, **options)
    with torch.no_grad():  # of a sparse one it is 0 at first
        made.B.copy_(torch.randn(ROWS, RANK, generator=torch.Generator().manual_seed(2)))
    return made


def inputs(dtype=torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, 7, COLS, generator=generator, dtype=torch.float64).to(dtype)


def oracle(x: torch.Tensor, parts: dict[str, torch.Tensor], made: FactoredLinear) -> torch.Tensor:
    """By the dense weight."""
    weight = made.scale * (parts["B"] @ parts["A"])
    if "values" in parts:
        places = made.indices.long()
        weight = weight.view(-1).index_add(0, places, parts["values"]).view(ROWS, COLS)
    return F.linear(x, weight, parts.get("bias"))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_dense_autograd(kind: str) -> None:
    made = layer(**KINDS[kind])
    x, twin = inputs().requires_grad_(), inputs().requires_grad_()
    parts = {name: p.detach().clone().requires_grad_() for name, p in made.named_parameters()}
    weights = torch.randn(2, 7, ROWS, dtype=torch.float64)
    y, expected = made(x), oracle(twin, parts, made)
    assert (y - expected).norm() <= 1e-13 * expected.norm()
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    assert (x.grad - twin.grad).norm() <= 1e-13 * twin.grad.norm()
    for name, param in made.named_parameters():
        assert (param.grad - parts[name].grad).norm() <= 1e-13 * parts[name].grad.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_the_dense_weight_has_the_same_function(kind: str) -> None:
    made = layer(**KINDS[kind])
    weight = made.dense()
    assert not weight.requires_grad
    torch.testing.assert_close(F.linear(inputs(), weight, made.bias), made(inputs()))


def test_autocast_keeps_one_input_in_half_precision() -> None:
    made, x, saved = layer(torch.float32, sparse=0.05), inputs(torch.float32), []
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t),
    ):
        y = made(x)
        weight = made.dense()
    assert y.dtype is torch.bfloat16
    assert torch.equal(weight, made.dense())
    of_input = [each for each in saved if each.numel() == x.numel()]
    assert {each.dtype for each in of_input} == {torch.bfloat16}
    assert len({each.data_ptr() for each in of_input}) == 1
    y.sum().backward()
    assert all(param.grad.dtype is torch.float32 for param in made.parameters())
    exact = made.double()(x.double())
    rounded = F.linear(x.bfloat16(), weight.bfloat16(), made.bias.bfloat16())
    assert (y - exact).norm() <= 2 * (rounded - exact).norm()


@pytest.mark.parametrize("kind", ["bias", "all"])
def test_a_compiled_layer_is_one_graph(kind: str) -> None:
    made = layer(**KINDS[kind])
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    weights, found = torch.randn(2, 7, ROWS, dtype=torch.float64), []
    for each in (made, compiled):
        made.zero_grad()
        x = inputs().requires_grad_()
        (each(x) * weights).sum().backward()
        found.append([x.grad, *(param.grad.clone() for param in made.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_first_values() -> None:
    """Those of SLTrain; without values B is not 0; one seed is one layer, in every dtype."""
    made = FactoredLinear(400, 300, 20, sparse=0.03, seed=7)
    assert not made.B.any()
    assert made.indices.dtype is torch.int32
    assert len(made.indices) == len(made.values) == int(0.03 * 400 * 300)
    assert (made.indices.diff() > 0).all()
    assert made.indices[0] >= 0
    assert made.indices[-1] < 400 * 300
    for part, bound in ((made.A, 1 / 20), (made.values, 1 / 20), (made.bias, 1 / 20)):
        assert 0.9 * bound < part.abs().max() <= bound
    low = FactoredLinear(400, 300, 20, seed=7)
    assert 0.99 / 20**0.5 < low.B.abs().max() <= 1 / 20**0.5
    again = FactoredLinear(400, 300, 20, sparse=0.03, seed=7, dtype=torch.bfloat16)
    assert torch.equal(again.indices, made.indices)
    assert torch.equal(again.A, made.A.bfloat16())
    assert not torch.equal(FactoredLinear(400, 300, 20, sparse=0.03, seed=8).indices, made.indices)
    torch.manual_seed(0)
    first = FactoredLinear(400, 300, 20)
    torch.manual_seed(0)
    assert torch.equal(FactoredLinear(400, 300, 20).A, first.A)


def test_places_are_everywhere_as_likely() -> None:
    """Quarters of the entries hold a quarter of the places each, within five deviations."""
    made = FactoredLinear(200, 200, 2, sparse=0.25, seed=0)
    counts = torch.histc(made.indices.double(), 4, 0, 200 * 200)
    deviation = (10_000 * 0.25 * 0.75) ** 0.5
    assert (counts - 2500).abs().max() < 5 * deviation


def test_state_dict_pickle_and_copies() -> None:
    made, other = layer(sparse=0.05), FactoredLinear(COLS, ROWS, RANK, sparse=0.05, seed=9)
    assert list(made.state_dict()) == ["B", "A", "bias", "values", "indices"]
    other = other.double()
    stream = io.BytesIO()
    torch.save(made.state_dict(), stream)
    stream.seek(0)
    other.load_state_dict(torch.load(stream, weights_only=True))
    for twin in (other, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(twin(inputs()), made(inputs()))


def test_safetensors(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    made, other = layer(sparse=0.05), FactoredLinear(COLS, ROWS, RANK, sparse=0.05).double()
    safetensors.save_model(made, tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors")
    assert torch.equal(other(inputs()), made(inputs()))


def test_a_state_dict_of_a_lower_rank_lowers_the_rank() -> None:
    made, low = layer(), FactoredLinear(COLS, ROWS, 3, dtype=torch.float64)
    params, held = list(made.parameters()), nn.Sequential(made)
    held.load_state_dict(nn.Sequential(low).state_dict())
    assert made.rank == 3
    assert all(map(torch.equal, [made(inputs())], [low(inputs())]))
    assert all(one is other for one, other in zip(params, made.parameters(), strict=True))
    for wrong in (FactoredLinear(COLS, ROWS, 9), FactoredLinear(COLS, 20, 2)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            made.load_state_dict(wrong.state_dict())
    assert made.rank == 3


def test_on_the_meta_device() -> None:
    made = FactoredLinear(COLS, ROWS, RANK, sparse=0.05, device="meta")
    y = made(torch.empty(3, COLS, device="meta"))
    assert y.shape == (3, ROWS)
    assert y.is_meta
    filled = made.to_empty(device="cpu")
    filled.load_state_dict(layer(torch.float32, sparse=0.05).state_dict())
    assert torch.equal(
        filled(inputs(torch.float32)), layer(torch.float32, sparse=0.05)(inputs(torch.float32))
    )


REFUSED = {
    "rank": ((COLS, ROWS, 25), {}, ValueError, "rank must be at most 24"),
    "no rank": ((COLS, ROWS, 0), {}, ValueError, "rank must be at least 1"),
    "float": ((COLS, ROWS, 2.0), {}, TypeError, "rank must be an int"),
    "size": ((0, ROWS, 2), {}, ValueError, "in_features must be at least 1"),
    "sparse": ((COLS, ROWS, 2), {"sparse": 1.0}, ValueError, "sparse must be"),
    "nothing sparse": ((COLS, ROWS, 2), {"sparse": 1e-6}, ValueError, "less than one entry"),
    "too many": ((2**16, 2**16, 2), {"sparse": 0.1, "device": "meta"}, ValueError, "int32"),
    "scale": ((COLS, ROWS, 2), {"scale": 0.0}, ValueError, "not 0"),
    "nan": ((COLS, ROWS, 2), {"scale": float("nan")}, ValueError, "finite"),
    "text": ((COLS, ROWS, 2), {"scale": "1"}, ValueError, "a number"),
}


@pytest.mark.parametrize(("sizes", "options", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(sizes, options, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        FactoredLinear(*sizes, **options)
