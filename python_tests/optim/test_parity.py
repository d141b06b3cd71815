"""The trajectories of the official packages, `galore-torch` 1.0 and `fira` 1.0.2."""

import pytest
import torch
from devices import device_of
from oracles.low_rank import low_rank_gradient
from pairs import pairwise

from lowrank_kernels import FiraAdamW, GaLoreAdamW
from lowrank_kernels.subspace import RANGE_FINDERS, Subspace

OfficialFira = pytest.importorskip("fira").FiraAdamW
OfficialGaLore = pytest.importorskip("galore_torch").GaLoreAdamW
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

STEPS, GAP, RANK = 50, 20, 7
SHAPES = {"wide": (24, 61), "tall": (61, 24), "square": (32, 32), "odd": (37, 41)}
METHODS = {"galore": (OfficialGaLore, GaLoreAdamW), "fira": (OfficialFira, FiraAdamW)}
SCALES, DECAYS = (1.0, 0.25), (0.0, 0.1)


def official_basis(request):
    """The SVD call of both official projectors: float32 whatever the gradient is."""
    return RANGE_FINDERS["svd"](request._replace(matrices=request.matrices.float()))


def run_both(method, shape, proj_type, scale, weight_decay, dtype, backend="auto", **ours):
    """Relative distance of the two trajectories, on one device, at its worst step."""
    rng, device = torch.Generator().manual_seed(sum(shape)), device_of(backend)
    start = torch.randn(shape, generator=rng, dtype=torch.float64).to(device, dtype)
    weights = [start.clone() for _ in range(2)]
    official_class, our_class = METHODS[method]
    alpha = "alpha" if method == "fira" else "scale"
    groups = [
        [
            {
                "params": [w],
                "rank": RANK,
                "update_proj_gap": GAP,
                alpha: scale,
                "proj_type": proj_type,
            }
        ]
        for w in weights
    ]
    options = {"lr": 0.05, "weight_decay": weight_decay}
    official = official_class(groups[0], no_deprecation_warning=True, **options)
    optimizer = our_class(groups[1], backend=backend, **options, **ours)
    worst = 0.0
    for _ in range(STEPS):
        grad = low_rank_gradient(*shape, rng).to(start)
        for weight in weights:
            weight.grad = grad.clone()
        official.step()
        optimizer.step()
        distance = torch.linalg.norm(weights[1] - weights[0]) / torch.linalg.norm(weights[0])
        worst = max(worst, float(distance))
    assert torch.linalg.norm(weights[0] - start) > 0.01 * torch.linalg.norm(start)
    return worst


@pytest.mark.parametrize(
    ("shape", "proj_type", "method", "scale", "weight_decay"),
    pairwise(SHAPES, ("std", "reverse_std", "left", "right"), METHODS, SCALES, DECAYS),
)
def test_same_basis_float64(shape, proj_type, method, scale, weight_decay, monkeypatch):
    monkeypatch.setitem(RANGE_FINDERS, "official", official_basis)
    worst = run_both(
        method,
        SHAPES[shape],
        proj_type,
        scale,
        weight_decay,
        torch.float64,
        subspace=Subspace("official", stagger=False),
    )
    assert worst <= 1e-10


@pytest.mark.parametrize("backend", ["reference", "foreach", "native", "triton"])
@pytest.mark.parametrize(
    ("shape", "method", "scale", "weight_decay"), pairwise(SHAPES, METHODS, SCALES, DECAYS)
)
def test_own_svd_float32(shape, method, scale, weight_decay, backend):
    worst = run_both(
        method,
        SHAPES[shape],
        "std",
        scale,
        weight_decay,
        torch.float32,
        backend=backend,
        subspace="svd",
    )
    assert worst <= 1e-4
