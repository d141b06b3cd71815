"""Moments in every format between sentinels, and Adam's step on them in separate operations."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_kernels.ops.codes import Groups, Stored, loaded, new_stored, store
from lowrank_kernels.ops.noise import MOMENTS_SALT

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
ADAM = {
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "bias_correction1": 0.5,
    "bias_correction2": 0.25,
}
SENTINEL, ZONE = 85, 64


def powers(shape: tuple[int, ...], low: float, high: float, rng: torch.Generator) -> Tensor:
    """Powers of ten, in float32: small ones are subnormal, then 0."""
    return (
        10 ** (low + (high - low) * torch.rand(shape, generator=rng, dtype=torch.float64)).float()
    )


def random_gradient(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """From what is lost beside the moments to what cannot be squared."""
    return torch.randn(shape, generator=rng) * powers(shape, -46, 20, rng)


def random_moments(
    shape: tuple[int, ...], dtype: torch.dtype, groups: Groups, rng: torch.Generator
) -> Stored:
    """Every code under every scale, groups of zeros among them."""
    stored = new_stored(shape, dtype, torch.device("cpu"), groups)
    if dtype is not torch.int8:
        stored.exp_avg.copy_(torch.randn(shape, generator=rng) * powers(shape, -46, 10, rng))
        stored.exp_avg_sq.copy_(powers(shape, -46, 20, rng))
        return stored
    stored.exp_avg.copy_(torch.randint(-127, 128, shape, generator=rng))
    stored.exp_avg_sq.copy_(torch.randint(0, 256, shape, generator=rng))
    for scale in (stored.exp_avg_scale, stored.exp_avg_sq_scale):
        assert scale is not None
        kept = torch.rand(scale.shape, generator=rng) < 0.9
        scale.copy_(powers(tuple(scale.shape), -22, 10, rng) * kept)
    return stored


def stepped(
    projected: Tensor, stored: Stored, groups: Groups, bits: Tensor | None, adam: dict[str, float]
) -> tuple[Stored, Tensor, Tensor]:
    """New moments, N and R, by numpy: its root is rounded correctly."""
    f32, projected = np.float32, projected.cpu()
    stored = Stored(*(None if tensor is None else tensor.cpu().clone() for tensor in stored))
    exp_avg, exp_avg_sq = (moment.numpy() for moment in loaded(stored, groups))
    beta1, beta2, eps, correction1, correction2 = adam.values()
    with np.errstate(all="ignore"):
        usable = projected.numpy() ** 2 <= np.finfo(f32).max
        r = np.where(usable, projected.numpy(), f32(0))
        m = np.where(usable, f32(beta1) * exp_avg + f32(1 - beta1) * r, exp_avg)
        v = np.where(usable, f32(beta2) * exp_avg_sq + f32(1 - beta2) * (r * r), exp_avg_sq)
        n = (m * f32(1 / correction1)) / (np.sqrt(v * f32(1 / correction2)) + f32(eps))
    n = np.where(usable, n, f32(0))
    store(stored, torch.from_numpy(m), torch.from_numpy(v), groups, bits)
    return stored, torch.from_numpy(n), torch.from_numpy(r)


@dataclass
class Fenced:
    """A tensor between sentinels."""

    storage: Tensor
    view: Tensor

    @classmethod
    def around(cls, tensor: Tensor, device: str = "cpu") -> "Fenced":
        size = tensor.numel() + 2 * ZONE
        storage = torch.full((size,), SENTINEL, dtype=tensor.dtype, device=device)
        view = storage[ZONE : storage.numel() - ZONE].view(tensor.shape)
        view.copy_(tensor)
        return cls(storage, view)

    @property
    def addresses(self) -> list[int]:
        return [self.view.data_ptr()]

    def assert_nothing_else_was_written(self):
        assert (self.storage[:ZONE] == SENTINEL).all()
        assert (self.storage[self.storage.numel() - ZONE :] == SENTINEL).all()


class FencedMoments:
    """M and V of one parameter as a pass takes them."""

    def __init__(self, stored: Stored, device: str = "cpu") -> None:
        self.fences = {
            name: Fenced.around(tensor, device)
            for name, tensor in stored._asdict().items()
            if tensor is not None
        }

    @property
    def stored(self) -> Stored:
        return Stored(**{name: fence.view for name, fence in self.fences.items()})

    def arguments(self, salt: int | None, step: int) -> dict[str, Any]:
        made: dict[str, Any] = {name: fence.addresses for name, fence in self.fences.items()}
        made["format"] = FORMATS[self.stored.exp_avg.dtype]
        if salt is not None:
            made.update(moment_salts=[(salt + MOMENTS_SALT) % 2**32], step=step)
        return made

    def assert_nothing_else_was_written(self):
        for fence in self.fences.values():
            fence.assert_nothing_else_was_written()


def assert_same_moments(actual: Stored, expected: Stored):
    for name, value in expected._asdict().items():
        if value is not None:
            assert_same(getattr(actual, name), value, name)


def assert_same(actual: Tensor, expected: Tensor, name: str = ""):
    """Bit for bit."""
    integers = {4: torch.int32, 2: torch.int16, 1: torch.int8}
    integer = integers[expected.dtype.itemsize]
    actual = actual.cpu()
    assert torch.equal(actual.contiguous().view(integer), expected.contiguous().view(integer)), name
