"""Weights of 24 bits: what bfloat16 and a byte hold together."""

import torch

from lowrank_kernels.ops.weights24 import joined, split


def taken_apart(wide):
    weight = torch.empty_like(wide, dtype=torch.bfloat16)
    low_bits = torch.empty_like(wide, dtype=torch.int8)
    split(wide, weight, low_bits)
    return weight, low_bits


def random_floats(count):
    """Normal numbers that bfloat16 does not round to Inf."""
    rng = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=rng, dtype=torch.int64)
    wide = bits.int().view(torch.float32)
    return wide[wide.bfloat16().isfinite() & (wide.abs() > 2.0**-126)]


def test_any_number_is_held_to_sixteen_bits():
    wide = random_floats(1_000_000)
    weight, low_bits = taken_apart(wide)
    held = joined(weight, low_bits)
    assert float(((held - wide) / wide).abs().max()) <= 2.0**-16
    # The weight alone is the nearest of bfloat16, but where it is a tie after 24 bits.
    assert float((weight != wide.bfloat16()).float().mean()) < 0.005


def test_what_is_held_stays():
    held = joined(*taken_apart(random_floats(100_000)))
    assert torch.equal(joined(*taken_apart(held)), held)


def test_every_bfloat16_number_is_its_own():
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16)
    weight, low_bits = taken_apart(every.float())
    finite = every.isfinite()
    assert torch.equal(weight[finite].view(torch.int16), every[finite].view(torch.int16))
    assert not low_bits.any()
    assert torch.equal(weight.isnan(), every.isnan())
    assert torch.equal(weight[every.isinf()], every[every.isinf()])


def test_a_weight_that_was_changed_elsewhere_is_taken_as_it_is():
    """Bits of another weight are off by a unit in its last place at most, and never below zero."""
    _, low_bits = taken_apart(torch.tensor([1.0058, -1.0058, 1.0058, -1.0058]))
    assert (low_bits < 0).all()
    changed = torch.tensor([0.0, -0.0, 2.0, -2.0]).bfloat16()
    held = joined(changed, low_bits)
    assert torch.equal(held.sign() * changed.float().sign(), torch.tensor([0.0, 0.0, 1.0, 1.0]))
    assert float((held - changed.float()).abs().max()) <= 2.0 * 2.0**-8


def test_a_weight_that_is_not_finite_has_no_low_bits():
    """Those of the number that it was; what is taken off Inf would make it finite, too."""
    lost = torch.tensor([0x7F80, 0xFF80 - 2**16, 0x7FC0, 0x7F81], dtype=torch.int16)
    lost = lost.view(torch.bfloat16).repeat(256, 1)
    held = joined(lost, torch.arange(-128, 128).to(torch.int8).unsqueeze(1).expand(256, 4))
    assert torch.equal(held[:, :2], lost[:, :2].float())
    assert held[:, 2:].isnan().all()
