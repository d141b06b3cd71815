"""Each rival against its equations in float64, written apart from it."""

import numpy as np
import pytest
import torch

from bench import rivals
from bench.measure import tensor_bytes
from bench.optimizers import METHODS, RIVALS, named
from bench.peers import Recipe

LR, DECAY, STEPS = 0.01, 0.1, 5
MATRICES = {"tall.weight": (40, 24), "wide.weight": (24, 56), "square.weight": (32, 32)}
REST = {"embed_tokens.weight": (50, 24), "norm.weight": (24,), "lm_head.weight": (60, 24)}


def groups_of(dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)

    def params(shapes):
        return [
            (name, torch.nn.Parameter(torch.randn(s, generator=rng, dtype=torch.float64).to(dtype)))
            for name, s in shapes.items()
        ]

    rank = {"rank": 8, "update_proj_gap": 2, "scale": 0.25, "proj_type": "std"}
    return [{"params": params(MATRICES), **rank}, {"params": params(REST)}]


def gradients(shape, seed=7):
    """Of very different sizes, which a normalization has to do away with."""
    rng = np.random.default_rng((seed, *shape))
    return [10.0 ** (step - 2) * rng.standard_normal(shape) for step in range(STEPS)]


def trained(name, recipe, dtype=torch.float64, skip=()):
    """Weights before and after the steps, and the optimizer."""
    groups = groups_of(dtype)
    before = {n: p.detach().double().numpy().copy() for g in groups for n, p in g["params"]}
    params = {n: p for g in groups for n, p in g["params"]}
    given = {n: gradients(tuple(p.shape)) for n, p in params.items()}
    for known in skip:
        for grad in given[known]:
            grad[3] = 0.0
    optimizer = METHODS[name].build(groups, LR, recipe)
    for step in range(STEPS):
        for n, p in params.items():
            p.grad = torch.from_numpy(given[n][step]).to(dtype, copy=True)
        optimizer.step()
    after = {n: p.detach().double().numpy() for n, p in params.items()}
    return before, given, after, optimizer


def polar_ish(matrix, steps=5):
    """The quintic on singular values."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt * np.sqrt(max(matrix.shape))


def rows_first(matrix):
    return polar_ish(matrix / np.sqrt((matrix**2).mean(1, keepdims=True)))


def unit(matrix, axis):
    lengths = np.sqrt((matrix**2).sum(axis, keepdims=True))
    return matrix / np.where(lengths > 0, lengths, 1.0)


def momenta(grads, beta):
    found, last = [], np.zeros_like(grads[0])
    for grad in grads:
        last = beta * last + (1 - beta) * grad
        found.append(last)
    return found


def moved(weight, directions, lr, decay=DECAY, scale=1.0):
    """W after steps of -lr scale D, the decay before each."""
    for direction in directions:
        weight = (1 - lr * decay) * weight - lr * scale * direction
    return weight


def adam(grads, betas=(0.9, 0.999)):
    found, m, v = [], 0.0, 0.0
    for t, grad in enumerate(grads, 1):
        m = betas[0] * m + (1 - betas[0]) * grad
        v = betas[1] * v + (1 - betas[1]) * grad**2
        found.append(m / (1 - betas[0] ** t) / (np.sqrt(v / (1 - betas[1] ** t)) + 1e-8))
    return found


def distance(found, expected):
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)


def check(name, recipe, expected, limit=1e-12, skip=()):
    """`expected` gives the directions and the scale of a parameter; the rest is AdamW's.

    What computes in float32 has a limit of None: twice as far off as the equations in float32.
    """
    before, given, after, optimizer = trained(name, recipe, skip=skip)

    def wanted(n, dtype=np.float64):
        grads, weight = [grad.astype(dtype) for grad in given[n]], before[n].astype(dtype)
        directions, scale = expected(n, grads) or (adam(grads), 1.0)
        return moved(weight, directions, LR, recipe.weight_decay, scale) - before[n]

    for n, weight in before.items():
        exact = wanted(n)
        allowed = 2 * distance(wanted(n, np.float32), exact) if limit is None else limit
        assert distance(after[n] - weight, exact) <= allowed, n
    return optimizer


@pytest.mark.parametrize(
    ("name", "rule"), [("newton-schulz", polar_ish), ("swan", rows_first)], ids=lambda v: str(v)
)
def test_what_has_no_state(name, rule):
    recipe = Recipe(own_scale=0.7, weight_decay=DECAY)
    check(name, recipe, lambda n, g: ([rule(x) for x in g], 0.7) if n in MATRICES else None)


@pytest.mark.parametrize("beta", [None, 0.5])
def test_muon_within_what_bfloat16_products_are_off(beta):
    """Torch's own iterations run in bfloat16: as far off as they are of one gradient."""
    recipe = Recipe(own_scale=0.7, weight_decay=DECAY, beta=beta)
    kept = 0.95 if beta is None else beta

    def expected(name, grads):
        if name not in MATRICES:
            return None
        ahead = zip(momenta(grads, kept), grads, strict=True)
        return [polar_ish(kept * m + (1 - kept) * g) for m, g in ahead], 0.7

    def alone(matrix):
        tensor = torch.from_numpy(matrix).float()
        iterate = torch.optim._muon._zeropower_via_newtonschulz
        found = iterate(tensor, rivals.QUINTIC, 5, 1e-7).double().numpy()
        return distance(found * np.sqrt(max(matrix.shape)), polar_ish(matrix))

    worst = max(alone(g) for shape in MATRICES.values() for g in gradients(shape))
    check("muon", recipe, expected, limit=2 * worst)


def coded(matrix):
    """To the nearest of 127 levels either way, in blocks of 256."""
    flat = np.pad(matrix.ravel(), (0, -matrix.size % 256)).reshape(-1, 256)
    levels = np.abs(flat).max(1, keepdims=True) / 127
    return (np.round(flat / levels) * levels).ravel()[: matrix.size].reshape(matrix.shape)


def test_muon_in_8_bits():
    """M is rounded where it is kept and not where it is used; float32 of it is near enough."""

    def expected(name, grads):
        if name not in MATRICES:
            return None
        directions, kept = [], 0.0
        for grad in grads:
            momentum = 0.9 * kept + 0.1 * grad
            directions.append(polar_ish(momentum))
            kept = coded(momentum)
        return directions, 0.7

    recipe = Recipe(own_scale=0.7, weight_decay=DECAY)
    optimizer = check("muon-8bit", recipe, expected, limit=None)
    elements = sum(rows * cols for rows, cols in MATRICES.values())
    scales = sum(-(-rows * cols // 256) for rows, cols in MATRICES.values())
    moments = sum(2 * 8 * int(np.prod(shape)) + 4 for shape in REST.values())
    assert tensor_bytes(dict(optimizer.state)) == elements + 4 * scales + moments


def test_scale_normalizes_what_an_input_has_and_keeps_a_momentum_of_the_head_alone():
    def expected(name, grads):
        if name == "norm.weight":
            return None
        if name == "lm_head.weight":
            return [unit(m, 0) for m in momenta(grads, 0.9)], 3.0
        return [unit(g, 1 if "embed" in name else 0) for g in grads], 3.0

    recipe = Recipe(own_scale=3.0, weight_decay=DECAY)
    optimizer = check("scale", recipe, expected, skip=("embed_tokens.weight",))
    head = int(np.prod(REST["lm_head.weight"]))
    assert tensor_bytes(dict(optimizer.state)) == 8 * head + 16 * 24 + 4


def test_adafactor_in_8_bits_moves_matrices_at_lr_alpha():
    def expected(name, grads):
        if name not in MATRICES:
            return None
        directions, kept, rows, cols = [], 0.0, 0.0, 0.0
        for t, grad in enumerate(grads, 1):
            momentum = 0.9 * kept + 0.1 * grad
            kept = coded(momentum)
            squares = grad**2 + 1e-30
            rows = 0.999 * rows + 0.001 * squares.mean(1)
            cols = 0.999 * cols + 0.001 * squares.mean(0)
            second = np.outer(rows, cols) / rows.mean() / (1 - 0.999**t)
            directions.append(momentum / (1 - 0.9**t) / (np.sqrt(second) + 1e-8))
        return directions, 0.25

    check("adafactor-8bit", Recipe(), expected, limit=None)


def steadied(grads):
    found, limit, mean, square = [], 0.0, 0.0, 0.0
    for t, grad in enumerate(grads, 1):
        largest = np.abs(grad).max()
        limit = 0.999 * limit + 0.001 * largest
        bound = limit / (1 - 0.999**t)
        clipped = np.where(np.abs(grad) > bound, grad / largest * bound, grad)
        norm = np.linalg.norm(clipped)
        mean, square = 0.7 * mean + 0.3 * norm, 0.9 * square + 0.1 * norm**2
        ratio = mean / (1 - 0.7**t) / (np.sqrt(square / (1 - 0.9**t)) + 1e-8)
        found.append(clipped / norm * ratio)
    return found


def test_stable_spam():
    def expected(name, grads):
        directions = adam(steadied(grads))
        return directions, (0.25 if name in MATRICES else 1.0)

    check("stable-spam", Recipe(), expected, limit=1e-12)


def test_stable_spam_begins_its_moments_anew():
    param = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
    optimizer = rivals.StableSpam([{"params": [param]}], LR, 0.0, reset=3)
    given, seen = gradients((6, 5)), []
    for grad in given:
        param.grad = torch.from_numpy(grad.copy())
        before = param.detach().clone()
        optimizer.step()
        seen.append(((before - param) / LR).detach().numpy())
    clean = steadied(gradients((6, 5)))
    for found, expected in zip(seen, adam(clean[:3]) + adam(clean[3:]), strict=True):
        assert distance(found, expected) <= 1e-6


def test_adamw_in_8_bits_is_adamw_with_the_split_to_a_code():
    pytest.importorskip("bitsandbytes")
    big = {"big.weight": (96, 64)}
    ends = []
    for name in ("adamw-split", "adamw-8bit"):
        rng = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(96, 64, generator=rng)) for _ in range(2)]
        groups = [
            {"params": [("big.weight", params[0])], "rank": 8},
            {"params": [("b", params[1])]},
        ]
        optimizer = METHODS[name].build(groups, LR, Recipe())
        for grad in gradients(big["big.weight"]):
            for param in params:
                param.grad = torch.from_numpy(grad).float()
            optimizer.step()
        begun = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))
        ends.append([(params[0] - begun).detach(), params[1].detach()])
    assert optimizer.state[params[0]]["state1"].dtype == torch.uint8
    wide, coded_ = (end[0] for end in ends)
    assert 0 < torch.dist(wide, coded_) <= 0.2 * torch.linalg.norm(wide)
    # Two moments of a byte and their scales, and one table of codes for each moment in all.
    blocks = 2 * 2 * 96 * 64 // 256
    assert tensor_bytes(dict(optimizer.state)) == 2 * 2 * 96 * 64 + 4 * blocks + 2 * 4 * 256


def test_ldadam_renews_its_basis_every_step_and_moments_follow():
    optimizer = trained("ldadam", Recipe(), torch.float32)[3]
    assert all(
        optimizer.state[param]["exp_avg"].shape != param.shape
        for group in optimizer.param_groups
        if "rank" in group
        for param in group["params"]
    )
    assert optimizer.subspace.moments == "carry_ldadam"
    assert optimizer.subspace.interpolation == 0.908
    assert {g["update_proj_gap"] for g in optimizer.param_groups if "rank" in g} == {1}


@pytest.mark.parametrize("name", [n for n, m in RIVALS.items() if not m.packages])
def test_rivals_find_a_matrix(name):
    """W of |W X - Y|^2, from bf16 weights, too: all of them train."""
    for dtype in (torch.float32, torch.bfloat16):
        rng = torch.Generator().manual_seed(0)
        inputs = torch.randn(24, 64, generator=rng)
        target = torch.randn(40, 24, generator=rng)
        weight = torch.nn.Parameter(torch.zeros(40, 24, dtype=dtype))
        bias = torch.nn.Parameter(torch.zeros(40, 1, dtype=dtype))
        rank = {"rank": 4, "update_proj_gap": 4, "scale": 0.25, "proj_type": "std"}
        groups = [{"params": [("w", weight)], **rank}, {"params": [("b", bias)]}]
        method, losses = METHODS[name], []
        scale = method.own_scale or 1.0
        optimizer = method.build(groups, 0.02, Recipe(own_scale=scale))
        for _ in range(200):
            loss = ((weight @ inputs.to(dtype) + bias).float() - target @ inputs).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0], dtype


def test_parts_of_the_orthogonal_residual_are_left_out():
    """Adam's step, two steps of the iteration; and neither any longer after that."""
    weights = {}
    for name in ("orthogonal", "orthogonal-outside", "orthogonal-3-steps", "orthogonal"):
        weight = torch.nn.Parameter(torch.zeros(24, 32, dtype=torch.float64))
        group = {"params": [("w", weight)], "rank": 4, "update_proj_gap": 9, "scale": 0.25}
        optimizer = METHODS[name].build([group | {"proj_type": "std"}], 1.0, Recipe(own_scale=0.4))
        rng = torch.Generator().manual_seed(0)
        weight.grad = torch.randn(24, 32, generator=rng, dtype=torch.float64)
        optimizer.step()
        basis = optimizer.state[weight]["basis"]
        spanned = basis.T @ weight.detach()
        weights.setdefault(name, (weight.detach() - basis @ spanned, spanned))
        found = weights[name]
        torch.testing.assert_close(found[0], weight.detach() - basis @ spanned)
    whole, alone, three = (
        weights[name] for name in ("orthogonal", "orthogonal-outside", "orthogonal-3-steps")
    )
    torch.testing.assert_close(alone[0], whole[0])
    assert float(alone[1].norm()) < 1e-12 < 0.1 < float(whole[1].norm())
    torch.testing.assert_close(three[1], whole[1])
    assert 0.05 < float((three[0] - whole[0]).norm() / whole[0].norm()) < 0.5


def test_options_in_names():
    assert named("fira@16") == (METHODS["fira"], {"rank": 16})
    assert named("muon@b0.95") == (METHODS["muon"], {"beta": 0.95})
    assert named("apollo-mini") == (METHODS["apollo-mini"], {"rank": 1})
    for name, message in {
        "adamw@4": "adamw takes no options",
        "muon@4": "muon takes @b0.9",
        "fira@0": "fira takes @16",
        "fira@b0.9": "fira takes @16",
        "apollo-mini@16": "apollo-mini takes no options",
        "soap@4": "unknown optimizer 'soap'",
    }.items():
        with pytest.raises(ValueError, match=message):
            named(name)
