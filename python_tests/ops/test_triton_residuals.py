"""Half precision's residual norms near the span of the basis, where a difference of squares fails.

Triton's interpreter multiplies float16 as a GPU does; bfloat16 it cannot.
"""

import pytest
import torch
from devices import device_of

from lowrank_kernels.ops import AdamScalars, Matrices, Residual, Side, foreach, reference

kernels = pytest.importorskip("lowrank_kernels.ops.triton")

# Interpreted or compiled, the kernels have to do the same.
pytestmark = pytest.mark.gpu

CHANNELS, DEPTH, RANK = 40, 96, 16
DEVICE = device_of("triton")


def near_the_span(side, outside, rng):
    """A float16 gradient of which a share lies outside of a float16 basis, and that basis."""
    basis = torch.linalg.qr(torch.randn(DEPTH, RANK, generator=rng, dtype=torch.float64))[0].half()
    inside = torch.randn(CHANNELS, RANK, generator=rng, dtype=torch.float64) @ basis.double().T
    noise = torch.randn(CHANNELS, DEPTH, generator=rng, dtype=torch.float64)
    grad = inside + outside * noise * torch.linalg.norm(inside) / torch.linalg.norm(noise)
    return (grad if side is Side.RIGHT else grad.T.contiguous()).half(), basis


def residual_sq(module, grad, basis, side, kappa):
    """|e|^2 of each channel by a backend, in the dtype that the gradient asks for."""
    shape = (CHANNELS, RANK) if side is Side.RIGHT else (RANK, CHANNELS)
    dtype = torch.promote_types(grad.dtype, torch.float32)
    moments = [torch.zeros(shape, dtype=dtype, device=grad.device) for _ in "MV"]
    adam, residual = AdamScalars(0.9, 0.999, 1e-6), Residual(kappa, 1.0)
    matrices = Matrices(side, residual, [grad], [grad], [basis], moments[:1], moments[1:], [])
    projection = module.Operations(matrices).project_moments(matrices, adam)
    found = projection.sums.residual[0].double().cpu()
    return found.sum(0) if found.dim() == 2 else found


@pytest.mark.parametrize("elements", [2**20, 300], ids=["whole", "in blocks"])
@pytest.mark.parametrize("outside", [0.3, 0.03, 0.01])
@pytest.mark.parametrize("kappa", [1.0, 0.75])
@pytest.mark.parametrize("side", list(Side))
def test_residual_norms_near_the_span(side, kappa, outside, elements, rng, monkeypatch):
    monkeypatch.setattr(foreach, "BLOCK_ELEMENTS", {DEVICE.type: elements})
    grad, basis = near_the_span(side, outside, rng)
    exact = residual_sq(reference, grad.double(), basis.double(), side, kappa)
    plain = residual_sq(reference, grad, basis, side, kappa)
    found = residual_sq(kernels, grad.to(DEVICE), basis.to(DEVICE), side, kappa)
    rounding = (
        torch.finfo(torch.float32).eps * torch.linalg.norm(grad.double(), dim=None) / CHANNELS
    )
    bound = 2 * torch.maximum((plain - exact).abs().max(), rounding * exact.sqrt().max())
    assert (found - exact).abs().max() <= bound
