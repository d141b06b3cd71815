"""Layers of a model that are replaced, those that are not, and the way back."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lowrank_kernels import FactoredLinear, densify, factorize


class Block(nn.Module):
    def __init__(self, size: int = 32, inner: int = 56) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(size)
        self.up = nn.Linear(size, inner)
        self.down = nn.Linear(inner, size, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Net(nn.Module):
    """An embedding, two blocks, and a head that is tied to it."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, size)
        self.layers = nn.ModuleList(Block(size) for _ in range(2))
        self.head = nn.Linear(size, 20, bias=False)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.arange(20).view(2, 10)


def net(**options) -> Net:
    torch.manual_seed(0)
    return Net(**options).double()


def reasons(done) -> dict[str, str]:
    return {row.name: row.reason for row in done.rows if not row.taken}


def test_blocks_are_replaced_and_nothing_else() -> None:
    model = net()
    kept = model.embedding, model.head, *(layer.norm for layer in model.layers)
    bias = model.layers[0].up.bias
    done = factorize(model, 4)
    assert [row.name for row in done.rows if row.taken] == [
        f"layers.{layer}.{name}" for layer in range(2) for name in ("up", "down")
    ]
    assert reasons(done) == {"head": "its name is not among the targets"}
    assert all(type(module) is FactoredLinear for module in done.modules)
    assert [model.get_submodule(row.name) for row in done.rows if row.taken] == done.modules
    assert all(a is b for a, b in zip(kept, (model.embedding, model.head, *kept[2:]), strict=True))
    assert model.layers[0].up.bias is bias
    assert model.layers[0].down.bias is None
    assert str(done).startswith("4 of 5 linear layers are factored\n  1 not: its name")
    model(IDS).sum().backward()


@pytest.mark.parametrize("sparse", [0.0, 0.1])
@pytest.mark.parametrize("scale", [1.0, -0.25])
def test_the_best_factors_of_the_weights_that_are_there(sparse: float, scale: float) -> None:
    dense, model = net(), net()
    factorize(model, 4, sparse=sparse, scale=scale)
    for name, module in model.named_modules():
        if not isinstance(module, FactoredLinear):
            continue
        weight = dense.get_submodule(name).weight.detach()
        U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
        best = (U[:, :4] * s[:4]) @ Vh[:4]
        if sparse:  # what the factors leave, at the places that are there
            places = module.indices.long()
            best.view(-1)[places] = weight.view(-1)[places]
            assert len(places) == int(0.1 * weight.numel())
        torch.testing.assert_close(module.dense(), best)
        torch.testing.assert_close(module.B.mT @ module.B, module.A @ module.A.mT)


def test_random_factors_are_those_of_the_seed_and_the_name() -> None:
    models = net(), net(), net()
    for model, seed in zip(models, (0, 0, 1), strict=True):
        torch.manual_seed(int(model is models[1]))
        factorize(model, 4, sparse=0.1, init="random", seed=seed)
    first, second, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    name = "layers.{}.up.indices".format
    assert not torch.equal(first[name(0)], other[name(0)])
    assert not torch.equal(first[name(0)], first[name(1)])
    assert not models[0].layers[0].up.B.any()


def test_and_back() -> None:
    model = net()
    factorize(model, {"*.up.weight": 4, "*": 3}, sparse=0.1)
    assert [each.rank for each in model.modules() if type(each) is FactoredLinear] == [4, 3] * 2
    expected, bias = model(IDS), model.layers[1].up.bias
    layers = densify(model)
    assert len(layers) == 4
    assert all(type(layer) is nn.Linear for layer in layers)
    assert model.layers[1].up.bias is bias
    assert list(model.state_dict()) == list(net().state_dict())
    torch.testing.assert_close(model(IDS), expected)


def test_what_is_frozen_and_what_is_evaluated_stays_so() -> None:
    model = net().eval()
    model.layers[0].up.weight.requires_grad_(False)
    factorize(model, 4, sparse=0.1)
    frozen = {name for name, param in model.named_parameters() if not param.requires_grad}
    assert frozen == {f"layers.0.up.{part}" for part in ("B", "A", "values")}
    assert not any(module.training for module in model.modules())
    densify(model)
    assert not model.layers[0].up.weight.requires_grad
    assert not any(module.training for module in model.modules())


def test_a_layer_that_is_in_two_places_is_one_layer() -> None:
    model = net()
    model.layers[1].up = model.layers[0].up
    factorize(model, 4)
    assert type(model.layers[0].up) is FactoredLinear
    assert model.layers[1].up is model.layers[0].up
    densify(model)
    assert type(model.layers[0].up) is nn.Linear
    assert model.layers[1].up is model.layers[0].up


def test_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Net()
    factorize(model, 4, sparse=0.1)
    assert all(each.is_meta for each in (*model.parameters(), *model.buffers()))
    assert model(IDS.to("meta")).shape == (2, 10, 20)


def left_out(change) -> str:
    """Why the first layer is left out, after a change."""
    model = net()
    change(model.layers[0].up, model)
    return reasons(factorize(model, 4)).get("layers.0.up", "taken")


class Own(nn.Linear):
    pass


def share(layer, model):
    model.layers[1].up.weight = layer.weight


def subclass(layer, model):
    model.layers[0].up = Own(32, 56).double()


OBSTACLES = {
    "shared": (share, "shared with another module"),
    "subclass": (subclass, "a Own"),
    "hooks": (lambda layer, model: layer.register_forward_hook(lambda *_: None), "hooks"),
    "patched": (lambda layer, model: setattr(layer, "forward", layer.forward), "patched"),
    "parametrized": (
        lambda layer, model: nn.utils.parametrizations.weight_norm(layer),
        "a ParametrizedLinear",
    ),
}


@pytest.mark.parametrize(("change", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_is_left_out(change, reason: str) -> None:
    assert reason in left_out(change)


def test_a_layer_of_torch_that_reads_its_weights_is_left_out() -> None:
    model = nn.ModuleList([nn.TransformerEncoderLayer(32, 2, 64), nn.Linear(32, 32)])
    done = factorize(model, 2)
    assert [row.name for row in done.rows if row.taken] == ["1"]
    assert reasons(done)["0.linear1"] == "nn.TransformerEncoderLayer reads its weight"
    assert "NonDynamicallyQuantizableLinear" in reasons(done)["0.self_attn.out_proj"]
    with torch.no_grad():
        model[0].eval()(torch.randn(1, 3, 32))


def test_what_would_not_be_smaller_is_left_out() -> None:
    """32 x 56: rank 20 has 1760 elements of 1792; with 1 % of places, 8 + 4 bytes each, more."""
    done = factorize(net(), lambda name, weight: 20 if ".0." in name else None)
    assert reasons(done)["layers.1.up"] == "given no rank"
    assert "layers.0.up" not in reasons(done)
    for rank, sparse in ((21, 0.0), (20, 0.02), (33, 0.0)):
        model = net()
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="saves no memory"):
            factorize(model, rank, sparse=sparse)
        assert before.keys() == model.state_dict().keys()


def infinite():
    model = net()
    model.layers[1].down.weight.data[0, 0] = torch.inf
    return model


REFUSED = {
    "no model": (lambda: factorize([net()], 4), TypeError, "takes a model, not list"),
    "no target": (lambda: factorize(net(), 4, ["middle"]), ValueError, "5 not: its name"),
    "rank": (lambda: factorize(net(), 0), ValueError, "rank must be at least 1"),
    "pattern": (lambda: factorize(net(), {"*.middle": 4}), ValueError, "matches no weight"),
    "sparse": (lambda: factorize(net(), 4, sparse=-0.1), ValueError, "sparse must be"),
    "scale": (lambda: factorize(net(), 4, scale=0), ValueError, "scale must be finite and not 0"),
    "init": (lambda: factorize(net(), 4, init="zero"), ValueError, "svd, random"),
    "seed": (lambda: factorize(net(), 4, seed=-1), ValueError, "seed must be at least 0"),
    "infinite": (lambda: factorize(infinite(), 4), ValueError, "layers.1.down.weight has values"),
    "itself": (
        lambda: factorize(nn.Linear(32, 32), 4, "all-linear"),
        ValueError,
        "the model itself",
    ),
    "twice": (lambda: factorize(factorized(), 4), ValueError, "0 of 1"),
    "nothing to densify": (lambda: densify(net()), ValueError, "has no FactoredLinear"),
    "densify itself": (lambda: densify(FactoredLinear(9, 9, 2)), ValueError, "its dense()"),
}


def factorized() -> Net:
    model = net()
    factorize(model, 4)
    return model


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_nothing_has_changed_when_it_is_refused() -> None:
    model = infinite()
    with pytest.raises(ValueError, match="not finite"):
        factorize(model, 4)
    assert not any(isinstance(module, FactoredLinear) for module in model.modules())
