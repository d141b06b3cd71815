"""One step of every form of the residual, in float64 and a channel at a time, by its equations."""

import math

import torch
from torch import Tensor

# a, b, c of x -> a x + b x^3 + c x^5, five times.
QUINTIC = (3.4445, -4.7750, 2.0315)


def step(form, weight, grad, basis, left, moments, scalars, previous=0.0):
    """Returns the weight after the step, and the norm that the limiter stores.

    Args:
        form: (name, s, whether phi is the matrix').
        weight: rows x cols.
        grad: G, likewise.
        basis: P.
        left: whether P multiplies from the left.
        moments: M and V before the step, in the shape of R.
        scalars: lr, beta1, beta2, eps, weight decay, alpha and the 1-based step.
        previous: what the limiter stored last.
    """
    lr, beta1, beta2, eps, decay, alpha, count = scalars
    name, s, of_matrix = form
    # On the left, of the transposed: channels are rows, and P stands on the right.
    turn = (lambda x: x.T) if left else (lambda x: x)
    g, m, v = (turn(x.double()) for x in (grad, *moments))
    p = basis.double()
    r = g @ p
    m, v = beta1 * m + (1 - beta1) * r, beta2 * v + (1 - beta2) * r * r
    n = (m / (1 - beta1**count)) / ((v / (1 - beta2**count)).sqrt() + eps)
    e = g - r @ p.T
    back, stored = alpha * n @ p.T, previous
    if name == "scale":
        channels = range(len(g))
        phi = [float(n[j].norm() / (r[j].norm() + 1e-8)) for j in channels]
        if of_matrix:
            phi = [float(n.norm() / (r.norm() + 1e-8)) for _ in channels]
        scaled = torch.stack([f * row for f, row in zip(phi, g, strict=True)])
        norm = float(scaled.norm())
        growth = max(norm / (previous + 1e-8), 1.01) / 1.01 if previous > 0 else 1.0
        stored = norm / growth
        back = alpha * scaled / growth
    elif name == "normalize":
        back = back + s * torch.stack([row * math.sqrt(len(row)) / row.norm() for row in e])
    elif name == "sign":
        back = back + s * e.sign()
    elif name == "orthogonal":
        back = back + s * math.sqrt(max(e.shape)) * polar(e)
    return turn((1 - lr * decay) * (turn(weight.double()) - lr * back)), stored


def polar(matrix: Tensor, steps: int = 5) -> Tensor:
    """What the iteration makes of a matrix, by its singular values."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / matrix.double().norm()
    a, b, c = QUINTIC
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left @ torch.diag(values) @ right
