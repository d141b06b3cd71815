"""Groups and optimizers of factored models: never projected, and by whom they are trained."""

import copy
import logging
import pickle

import pytest
import torch
from torch import nn

from lowrank_kernels import (
    FactoredLinear,
    FiraAdamW,
    GaLoreAdamW,
    LowRankAdamW,
    densify,
    factorize,
    param_groups,
)


def net(**options) -> nn.Module:
    """An embedding and two blocks, of which one is factored."""
    torch.manual_seed(0)
    model = nn.Module()
    model.embedding = nn.Embedding(20, 40)
    model.layers = nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(40, 64), "down": nn.Linear(64, 40)}) for _ in range(2)
    )
    model.layers.append(nn.Linear(40, 40))
    factorize(model, 4, [r"layers\.[01]"], sparse=0.05)
    return model


def whole() -> nn.Module:
    """Without a linear layer that is left."""
    model = net()
    del model.layers[2]
    return model


def groups_of(groups) -> dict[str, dict]:
    return {
        name: {key: value for key, value in group.items() if key != "params"}
        for group in groups
        for name, _ in group["params"]
    }


def test_factors_and_values_are_hidden_weights_of_adamw() -> None:
    found = groups_of(param_groups(net(), 4, weight_decay=0.1))
    assert found["layers.2.weight"]["rank"] == 4
    for part in ("B", "A", "values"):
        assert found[f"layers.0.up.{part}"] == {"scale": 0.25, "weight_decay": 0.1}
    assert found["layers.0.up.bias"] == {"weight_decay": 0.0}
    assert found["embedding.weight"] == {"weight_decay": 0.1}


def test_nothing_but_factors_needs_no_rank() -> None:
    for targets in (None, "all-linear"):
        found = groups_of(param_groups(whole(), 4, targets=targets))
        assert not any("rank" in group for group in found.values())
        assert found["layers.1.down.A"] == {"scale": 0.25}


def test_no_warning_names_what_the_user_has_factored(caplog) -> None:
    with caplog.at_level(logging.WARNING, "lowrank_kernels"):
        for model in (net(), whole()):
            groups = param_groups(model, 4)
            LowRankAdamW(groups)
    assert not caplog.records


@pytest.mark.parametrize("make", [net, whole])
@pytest.mark.parametrize("state", ["float32", "int8"])
def test_they_are_trained_and_explained(make, state: str) -> None:
    model = make()
    optimizer = FiraAdamW(param_groups(model, 4), state=state)
    before = [param.detach().clone() for param in model.parameters()]
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    optimizer.step()
    assert not any(map(torch.equal, model.parameters(), before))
    rows = {row["name"]: row for row in optimizer.explain()}
    for name in ("layers.0.up.B", "layers.1.down.values"):
        assert rows[name]["reason"] == "AdamW at lr * scale: a part of a FactoredLinear"
        assert not rows[name]["projected"]
    assert rows["embedding.weight"]["reason"] == "AdamW: no rank in its group"
    assert sum(row["projected"] for row in rows.values()) == (make is net)


def twins(module: FactoredLinear) -> dict[str, FactoredLinear]:
    return {
        "itself": module,
        "copy": copy.deepcopy(module),
        "pickled": pickle.loads(pickle.dumps(module)),
        "converted": copy.deepcopy(module).double(),
    }


@pytest.mark.parametrize("which", ["itself", "copy", "pickled", "converted"])
@pytest.mark.parametrize("part", ["B", "A", "values"])
def test_a_group_with_a_rank_is_refused(which: str, part: str) -> None:
    module = twins(net().layers[0]["up"])[which]
    groups = [{"params": [("up", getattr(module, part))], "rank": 2}]
    with pytest.raises(ValueError, match=r"up, \(.*\), is a part of a FactoredLinear"):
        GaLoreAdamW(groups)


def test_a_dense_weight_is_projected_again() -> None:
    model = net()
    densify(model)
    assert "rank" in groups_of(param_groups(model, 4))["layers.0.up.weight"]
    GaLoreAdamW(param_groups(model, 4))


REFUSED = {
    "factored": (lambda: param_groups(whole(), 4, targets=["up"]), "layers.0.up is factored"),
    "nothing": (lambda: param_groups(whole(), 4, targets=["middle"]), "no trained linear module"),
    "too large": (lambda: param_groups(net(), 40), "saves no memory on any"),
    "none": (lambda: param_groups(net(), lambda *_: None), "gives none to any matched"),
}


@pytest.mark.parametrize(("call", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()


def test_any_adamw_takes_the_groups() -> None:
    model = whole()
    for make in (torch.optim.AdamW, LowRankAdamW):
        optimizer = make(param_groups(model, 4), lr=0.01)
        for param in model.parameters():
            param.grad = torch.ones_like(param)
        optimizer.step()
