"""Factors that are balanced anew: the same function, less of it with a threshold, refusals."""

import re
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_kernels import FactoredLinear, LowRankAdamW, refactorize

SIZES = ((40, 24, 5), (24, 40, 5), (40, 24, 5), (32, 32, 32))


def layers(dtype=torch.float32, **options) -> nn.ModuleList:
    """Out of balance, two of them of one shape."""
    generator = torch.Generator().manual_seed(0)
    made = nn.ModuleList()
    for seed, (cols, rows, rank) in enumerate(SIZES):
        layer = FactoredLinear(cols, rows, rank, dtype=dtype, seed=seed, **options)
        with torch.no_grad():
            layer.B.copy_(3 * torch.randn(rows, rank, generator=generator, dtype=torch.float64))
        made.append(layer)
    return made


def products(made: nn.ModuleList) -> list[torch.Tensor]:
    return [each.B.detach().double() @ each.A.detach().double() for each in made]


def optimizer_of(made: nn.Module, make=torch.optim.AdamW, **options) -> torch.optim.Optimizer:
    optimizer = make(made.parameters(), lr=0.01, **options)
    for each in made:
        each(torch.ones(3, each.in_features, dtype=each.B.dtype)).square().sum().backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, {"sparse": 0.05, "scale": -0.25}], ids=["low", "all"])
def test_the_function_stays_and_the_factors_are_balanced(dtype, options) -> None:
    made = layers(dtype, **options)
    x = {each.in_features: torch.randn(9, each.in_features, dtype=dtype) for each in made}
    before = [each(x[each.in_features]).detach() for each in made]
    others = [(each.bias.clone(), each.values) for each in made]
    refactorize(made)
    error = 1e-5 if dtype is torch.float32 else 1e-14
    for each, y, (bias, values) in zip(made, before, others, strict=True):
        assert (each(x[each.in_features]) - y).norm() <= error * y.norm()
        of_B, of_A = each.B.mT @ each.B, each.A @ each.A.mT
        s = torch.linalg.svdvals(each.B.double() @ each.A.double())[: each.rank]
        for gram in (of_B, of_A):
            assert (gram - s.diag()).norm() <= error * s.norm()
        assert torch.equal(each.bias, bias)
        assert each.values is values


def test_bfloat16_changes_by_its_rounding() -> None:
    """As much as rounding exactly balanced factors does."""
    made = layers(torch.bfloat16)
    before = products(made)
    refactorize(made)
    for each, product, after in zip(made, before, products(made), strict=True):
        assert each.B.dtype is torch.bfloat16
        U, s, Vh = torch.linalg.svd(product, full_matrices=False)
        roots = s[: each.rank].sqrt()
        B, A = U[:, : each.rank] * roots, roots.unsqueeze(1) * Vh[: each.rank]
        rounded = B.bfloat16().double() @ A.bfloat16().double()
        assert (after - product).norm() <= 2 * (rounded - product).norm()


def test_no_matrix_of_the_weight_s_size_is_formed() -> None:
    made, largest = FactoredLinear(300, 200, 4), [0]

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for each in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(each, torch.Tensor):
                    largest[0] = max(largest[0], each.numel())
            return result

    with Watch():
        refactorize(made)
    assert 0 < largest[0] <= 300 * 4


def test_large_ones_go_a_few_at_a_time(monkeypatch) -> None:
    together, apart, sizes = layers(), layers(), []

    def counted(B, A):
        sizes.append(len(B))
        return balanced(B, A)

    module = sys.modules["lowrank_kernels.factors.refactorize"]
    balanced = module.balanced
    monkeypatch.setattr(module, "balanced", counted)
    refactorize(together)
    assert sizes == [2, 1, 1]
    monkeypatch.setattr(module, "MOST_ELEMENTS", 1)
    refactorize(apart)
    assert sizes[3:] == [1] * 4
    for one, other in zip(products(together), products(apart), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["B", "A"])
def test_a_product_of_zero_keeps_its_factors(which: str) -> None:
    """Or both were 0, and had no gradient for ever; of its neighbour in the batch nothing is."""
    made = layers()
    with torch.no_grad():
        getattr(made[0], which).zero_()
    before, other = [each.detach().clone() for each in (made[0].B, made[0].A)], made[2].B.clone()
    refactorize(made, 1e-3, optimizer=torch.optim.SGD(made.parameters()))
    assert torch.equal(made[0].B, before[0])
    assert torch.equal(made[0].A, before[1])
    assert not torch.equal(made[2].B, other)


def test_dependent_columns() -> None:
    """CholeskyQR fails on them; the product stays."""
    made = layers()
    with torch.no_grad():
        made[0].B[:, 1] = made[0].B[:, 0]
        made[1].A[3] = 0
    before = products(made)
    refactorize(made)
    for one, other in zip(products(made), before, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


OPTIMIZERS = {
    "adamw": (torch.optim.AdamW, {}),
    "fused": (torch.optim.AdamW, {"fused": True}),
    "ours": (LowRankAdamW, {}),
    "8 bits": (LowRankAdamW, {"state": "int8"}),
}


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("shrink", [0.0, 4.0])
def test_an_optimizer_goes_on_with_what_is_there(make, options, shrink: float) -> None:
    """Moments of B and A are gone, those of biases are not; parameters stay the same objects."""
    made = layers(bias=True)
    optimizer, params = optimizer_of(made, make, **options), list(made.parameters())
    refactorize(made, shrink, optimizer=optimizer)
    assert (made[0].rank < 5) == (shrink > 0)
    assert all(one is other for one, other in zip(params, made.parameters(), strict=True))
    for each in made:
        assert each.B.grad is None
        assert each.A.grad is None
        assert not optimizer.state.get(each.B)
        assert not optimizer.state.get(each.A)
        assert float(optimizer.state[each.bias]["step"]) == 1
        each(torch.ones(3, each.in_features)).square().sum().backward()
    before = [param.detach().clone() for param in params]
    optimizer.step()
    assert not any(map(torch.equal, params, before))
    for each in made:
        assert float(optimizer.state[each.B]["step"]) == 1
        assert optimizer.state[each.B]["exp_avg"].shape == each.B.shape


def test_each_singular_value_loses_as_much() -> None:
    made = layers(torch.float64, scale=-0.5, bias=False)
    optimizer = torch.optim.SGD(made.parameters(), lr=0.1)
    weights = [torch.linalg.svd(each.dense(), full_matrices=False) for each in made]
    shrink = float(weights[0][1][3:5].mean())
    refactorize(made, shrink, optimizer=optimizer)
    for each, (U, s, Vh) in zip(made, weights, strict=True):
        lower = (s - shrink).clamp(min=0)
        expected = (U * lower) @ Vh
        assert (each.dense() - expected).norm() <= 1e-12 * expected.norm()
        assert each.rank == max(1, int((lower > 0).sum()))
    assert made[0].rank == 4


def test_a_rank_never_falls_below_one() -> None:
    made = layers()
    refactorize(made, 1e6, optimizer=torch.optim.SGD(made.parameters()))
    assert [each.rank for each in made] == [1] * 4
    assert not any(each.dense().any() for each in made)


def with_values(value: float) -> nn.ModuleList:
    made = layers()
    made[1].A.data[0, 0] = value
    return made


def others() -> torch.optim.Optimizer:
    return torch.optim.SGD(layers().parameters())


def meta() -> nn.Module:
    return FactoredLinear(9, 9, 2, device="meta")


REFUSED = {
    "nothing": (lambda: refactorize(nn.Linear(3, 3)), ValueError, "there is no FactoredLinear"),
    "no module": (lambda: refactorize([layers(), 3]), TypeError, "modules[1] must be a module"),
    "number": (lambda: refactorize(3), TypeError, "modules must be modules"),
    "nan": (lambda: refactorize(with_values(torch.nan)), ValueError, "1.A, (5, 24)"),
    "infinite": (lambda: refactorize(with_values(torch.inf)), ValueError, "not finite"),
    "meta": (lambda: refactorize(meta()), ValueError, "meta device"),
    "no optimizer": (lambda: refactorize(layers(), 0.1), ValueError, "pass optimizer="),
    "negative": (lambda: refactorize(layers(), -0.1), ValueError, "shrink must be a finite"),
    "bool": (lambda: refactorize(layers(), True), ValueError, "shrink must be a finite"),
    "others": (
        lambda: refactorize(layers(), optimizer=others()),
        ValueError,
        "0.B is not a parameter of the optimizer",
    ),
}


@pytest.mark.parametrize(("call", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=re.escape(text)):
        call()


def test_nothing_has_changed_when_it_is_refused() -> None:
    made = with_values(torch.inf)
    before = [param.detach().clone() for param in made.parameters()]
    with pytest.raises(ValueError, match="not finite"):
        refactorize(made)
    assert all(map(torch.equal, made.parameters(), before))
