"""A model whose matrices are no layers', its optimizer and its losses."""

import torch
from torch import nn

from lowrank_kernels import AdaRankGradAdamW, GaLoreAdamW

WIDTH, INNER, OUT, RANK, GAP, STEPS, PARTS = 10, 14, 6, 3, 3, 10, 2
SHAPES = {"up": (WIDTH, INNER), "down": (INNER, WIDTH), "square": (WIDTH, WIDTH)}


class Products(nn.Module):
    """Matrices on both sides, one of them the model's own and used twice, and no nn.Linear but the
    last.
    """

    def __init__(self, dtype=torch.float64, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.square = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=dtype) / WIDTH**0.5)
        self.block = nn.Module()
        self.block.up = nn.Parameter(torch.randn(WIDTH, INNER, dtype=dtype) / WIDTH**0.5)
        self.block.down = nn.Parameter(torch.randn(INNER, WIDTH, dtype=dtype) / INNER**0.5)
        self.last = nn.Linear(WIDTH, OUT, dtype=dtype)

    def forward(self, x):
        x = torch.tanh(x @ self.square)
        x = x + torch.tanh(x @ self.block.up) @ self.block.down
        return self.last(x @ self.square)


def matrices(model):
    return {"square": model.square, "up": model.block.up, "down": model.block.down}


def build(dtype=torch.float64, seed=0, kind=GaLoreAdamW, **options):
    model = Products(dtype, seed)
    projected = {
        "params": list(matrices(model).items()),
        "rank": RANK,
        "update_proj_gap": GAP,
        "scale": 1.0,
        "weight_decay": 0.1,
    }
    return model, kind([projected, {"params": list(model.last.named_parameters())}], **options)


GALORE = {"kind": GaLoreAdamW, "lr": 0.01}
ADAPTIVE = {"kind": AdaRankGradAdamW, "lr": 0.01}


def loss_of(model, step, part=0, rank=0):
    rng = torch.Generator().manual_seed(1000 * step + 10 * rank + part)
    dtype = next(model.parameters()).dtype
    x = torch.randn(32, WIDTH, generator=rng, dtype=torch.float64).to(dtype)
    return model(x).square().mean() / PARTS


def accumulate(model, step):
    for part in range(PARTS):
        loss_of(model, step, part).backward()


def train(model, optimizer, steps=range(STEPS)):
    for step in steps:
        accumulate(model, step)
        optimizer.step()
        optimizer.zero_grad()


def assert_same_weights(model, other, bound=1e-12):
    others = dict(other.named_parameters())
    for name, param in model.named_parameters():
        distance = torch.linalg.vector_norm(param - others[name])
        assert distance <= bound * torch.linalg.vector_norm(others[name]), name
