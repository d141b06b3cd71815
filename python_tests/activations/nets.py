"""A small net of linear layers, trained by GaLore, and what R has to be."""

import torch
import torch.nn.functional as F
from torch import nn

from lowrank_kernels import GaLoreAdamW, project_linears
from lowrank_kernels.ops.contract import Side
from lowrank_kernels.optim.projected_gradient import ProjectedGradient

LAYERS = ("q", "k", "up", "down")
TOKENS = 23
GAP = 20


class Net(nn.Module):
    """q and k share an input; down is on the left; the head is not projected."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(1)
        self.embedding = nn.Embedding(TOKENS, 24, dtype=dtype)
        self.q = nn.Linear(24, 24, bias=False, dtype=dtype)
        self.k = nn.Linear(24, 24, dtype=dtype)
        self.up = nn.Linear(24, 41, dtype=dtype)
        self.down = nn.Linear(41, 24, bias=False, dtype=dtype)
        self.head = nn.Linear(24, TOKENS, dtype=dtype)

    def forward(self, ids):
        x = self.embedding(ids)
        x = x + torch.tanh(self.q(x)) * self.k(x)
        x = x + self.down(torch.relu(self.up(x)))
        return self.head(x)


def groups_of(model, rank=4, **options):
    """By hand: `param_groups` leaves out what a rank saves no memory on."""
    named = dict(model.named_parameters())
    own = [(f"{name}.weight", named.pop(f"{name}.weight")) for name in LAYERS]
    projected = {"params": own, "rank": rank, "update_proj_gap": GAP, **options}
    return [projected, {"params": list(named.items())}]


def build(
    dtype=torch.float64,
    start=None,
    kind=GaLoreAdamW,
    rank=4,
    proj_type="std",
    shares=False,
    **options,
):
    """A model, its optimizer and, with a `start`, projected layers."""
    model = Net(dtype)
    optimizer = kind(groups_of(model, rank, proj_type=proj_type), lr=1e-2, **options)
    if start is not None:
        project_linears(model, optimizer, start=start, share_bases=shares)
    return model, optimizer


def batch(step, part=0):
    rng = torch.Generator().manual_seed(1000 * step + part)
    return torch.randint(0, TOKENS, (3, 8), generator=rng)


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())


def train(model, optimizer, steps, first=0, parts=1, clip=None):
    for step in range(first, first + steps):
        for part in range(parts):
            (loss_of(model, batch(step, part)) / parts).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()


def distance(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(((a - b).norm() / a.norm()).item() for a, b in pairs)


def weights(model):
    return [getattr(model, name).weight for name in LAYERS]


def stepped_once(dtype=torch.float64, **options):
    """Projected layers whose bases are there, and a copy of the model that has dense gradients."""
    model, optimizer = build(dtype, "gradient", **options)
    train(model, optimizer, 1)
    plain = Net(dtype)
    plain.load_state_dict(model.state_dict())
    return model, optimizer, plain


def expected_r(optimizer, weight, gradient):
    state = optimizer.state[weight]
    basis = state["basis"].to(gradient.dtype)
    return gradient @ basis if state["side"] == Side.RIGHT else basis.mT @ gradient


def check_r(model, optimizer, plain, bound=1e-13):
    for weight, other in zip(weights(model), weights(plain), strict=True):
        assert isinstance(weight.grad, ProjectedGradient)
        expected = expected_r(optimizer, weight, other.grad)
        assert (weight.grad.held - expected).norm() <= bound * expected.norm()
    for (name, weight), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if weight not in set(weights(model)):
            error = (weight.grad - other.grad).norm()
            assert error <= bound * other.grad.norm(), name


class Routed(nn.Module):
    """Layers whose inputs the caller chooses."""

    def __init__(self, *names):
        super().__init__()
        torch.manual_seed(2)
        for name in names:
            setattr(self, name, nn.Linear(16, 16, bias=False, dtype=torch.float64))


def routed(*names, gap=GAP, **options):
    """Layers that share bases, and the same with whole gradients."""
    model = Routed(*names)
    group = {"params": list(model.named_parameters()), "rank": 3, "update_proj_gap": gap}
    optimizer = GaLoreAdamW([group], lr=1e-2)
    project_linears(model, optimizer, start="random", share_bases=True, **options)
    return model, optimizer, Routed(*names)
