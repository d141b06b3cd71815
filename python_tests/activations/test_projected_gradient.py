"""What a gradient of which R is known can do, and what it says of all else."""

import pytest
import torch
from activations.nets import Net, batch, build, expected_r, loss_of, stepped_once, train, weights
from torch import nn

from lowrank_kernels.ops.contract import moment_dtype
from lowrank_kernels.optim.projected_gradient import (
    held,
)


def test_its_norm_is_that_of_r_and_clipping_scales_it():
    model, optimizer, plain = stepped_once()
    for module in (model, plain):
        loss_of(module, batch(1)).backward()
    squares = [expected_r(optimizer, w, o.grad).square().sum()
               for w, o in zip(weights(model), weights(plain), strict=True)]  # fmt: skip
    own = set(weights(model))
    squares += [p.grad.square().sum() for p in model.parameters() if p not in own]
    expected = torch.stack(squares).sum().sqrt()
    for foreach in (True, False):
        total = nn.utils.clip_grad_norm_(model.parameters(), 1e9, foreach=foreach)
        torch.testing.assert_close(total, expected)
    nn.utils.clip_grad_norm_(model.parameters(), expected / 2)
    total = nn.utils.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(total, expected / 2, rtol=1e-5, atol=0)
    with pytest.raises(RuntimeError, match="only the 2-norm"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, norm_type=float("inf"))


def test_a_grad_scaler_unscales_it():
    model, optimizer, plain = stepped_once(torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(model, batch(1))).backward()
    loss_of(plain, batch(1)).backward()
    scaler.unscale_(optimizer)
    for weight, other in zip(weights(model), weights(plain), strict=True):
        expected = expected_r(optimizer, weight, other.grad)
        torch.testing.assert_close(weight.grad.held, expected)
    model.q.weight.grad.held[0, 0] = torch.inf
    before = model.q.weight.detach().clone()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert torch.equal(model.q.weight, before)


def test_zero_gradients_that_stay_are_of_their_time():
    """What is known of a projection is set to zero; a whole gradient that stays is in the way."""
    model, optimizer, _ = stepped_once()
    plain = Net()
    plain.load_state_dict(model.state_dict())
    loss_of(model, batch(1)).backward()
    for weight in weights(model):
        weight.grad.zero_()
    loss_of(model, batch(2)).backward()
    loss_of(plain, batch(2)).backward()
    for weight, other in zip(weights(model), weights(plain), strict=True):
        expected = expected_r(optimizer, weight, other.grad)
        torch.testing.assert_close(weight.grad.held, expected, rtol=1e-12, atol=1e-14)
    model, optimizer = build(start="dense")
    loss_of(model, batch(0)).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match="set_to_none=True"):
        loss_of(model, batch(1)).backward()


def test_gradients_are_as_small_as_r_and_saved_is_x_p():
    model, optimizer = build(torch.float32, "activations")
    train(model, optimizer, 1)
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(5, 6, 24, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Two layers of one input: each saves x P of rank 4, less than x.
        out = model.q(x).sum() + model.k(x).sum()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert sum(size for place, size in saved.items() if place not in own) == 2 * 30 * 4 * 4
    out.backward()
    loss_of(model, batch(1)).backward()
    sizes = [held(weight.grad).numel() for weight in weights(model)]
    assert sizes == [24 * 4, 24 * 4, 41 * 4, 4 * 41]


def test_a_gradient_of_another_basis_is_refused():
    model, optimizer, _ = stepped_once()
    loss_of(model, batch(1)).backward()
    optimizer.load_state_dict(optimizer.state_dict())
    before = model.q.weight.detach().clone()
    with pytest.raises(RuntimeError, match=r"q\.weight .* projected by another basis"):
        optimizer.step()
    assert torch.equal(model.q.weight, before)
    optimizer.zero_grad()
    train(model, optimizer, 1, first=1)


def test_other_optimizers_and_methods_say_what_they_need():
    model, optimizer, _ = stepped_once()
    loss_of(model, batch(1)).backward()
    with pytest.raises(RuntimeError, match="only a projection is known"):
        torch.optim.AdamW(model.parameters()).step()
    optimizer.residual = "official"
    with pytest.raises(RuntimeError, match=r"q\.weight .* its step needs the whole"):
        optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, 2, first=1)


def test_what_it_says_of_itself():
    model, optimizer, plain = stepped_once(torch.bfloat16)
    loss_of(model, batch(1)).backward()
    loss_of(plain, batch(1)).backward()
    gradient = model.q.weight.grad
    assert "ProjectedGradient((24, 24), torch.bfloat16" in repr(gradient)
    assert gradient.held.dtype is moment_dtype(torch.bfloat16)
    assert gradient.dense().shape == (24, 24)
    assert gradient.dense().dtype is torch.bfloat16
    basis = optimizer.state[model.q.weight]["basis"].float()
    torch.testing.assert_close(
        gradient.dense().float() @ basis, gradient.held, rtol=0.05, atol=1e-3
    )


def test_only_numbers_scale_it_and_nothing_else_is_added():
    model, optimizer, _ = stepped_once()
    loss_of(model, batch(1)).backward()
    assert optimizer.state
    gradient = model.q.weight.grad
    before = gradient.held.clone()
    mask = torch.ones(24, 24, dtype=torch.float64)
    attempts = (
        lambda: gradient.mul_(mask),
        lambda: gradient * mask,
        lambda: mask * gradient,
        lambda: gradient * gradient,
        lambda: gradient + 1,
        lambda: torch._foreach_mul_([gradient], [mask]),
        lambda: torch.optim.SGD([model.q.weight], lr=1.0, foreach=False).step(),
        lambda: torch.optim.SGD([model.q.weight], lr=1.0, foreach=True).step(),
    )
    for attempt in attempts:
        # Python's operators tell of their operands instead.
        with pytest.raises(RuntimeError, match="only a projection is known"):
            attempt()
    assert torch.equal(gradient.held, before)
    other = gradient.clone()
    gradient.zero_()
    gradient.clone().add_(other, alpha=3.0)
    gradient.add_(other, alpha=3.0)
    assert torch.equal(gradient.held, 3 * before)
