"""What saves tensors in every way that autograd has, for runs with and without offloading."""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

ROWS, WIDTH, BLOCKS = 64, 48, 5


class Block(nn.Module):
    """Views of one storage, a shared input, a mask, a tensor in another dtype."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mixed = torch.softmax(q @ k.T, -1) @ v
        return x + self.drop(torch.tanh(self.out(mixed))).double().float()


def net():
    torch.manual_seed(0)
    return nn.Sequential(*(Block() for _ in range(BLOCKS)))


def inputs(seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(ROWS, WIDTH, generator=rng)


def gradients(model):
    return [param.grad for param in model.parameters()]


def plain(run):
    """Of a function of a model and a context, without offloading."""
    model = net()
    run(model, torch.enable_grad)
    return gradients(model)


def passes(model, context):
    torch.manual_seed(3)
    with context():
        loss = model(inputs()).square().sum()
    loss.backward()


def several_micro_batches(model, context):
    torch.manual_seed(3)
    for seed in range(3):
        with context():
            loss = model(inputs(seed)).square().sum()
        loss.backward()


def two_graphs_at_once(model, context):
    torch.manual_seed(3)
    with context():
        losses = [model(inputs(seed)).square().sum() for seed in range(2)]
    for loss in losses:
        loss.backward()


def retained(model, context):
    torch.manual_seed(3)
    with context():
        loss = model(inputs()).square().sum()
    for last in (False, False, True):
        loss.backward(retain_graph=not last)


def double_backward(model, context):
    torch.manual_seed(3)
    x = inputs().requires_grad_()
    with context():
        loss = model(x).square().sum()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        penalty = grad.square().sum()
    penalty.backward()


def backward_inside(model, context):
    torch.manual_seed(3)
    with context():
        for seed in range(2):
            model(inputs(seed)).square().sum().backward()


def checkpointed(model, context, reentrant):
    torch.manual_seed(3)
    x = inputs().requires_grad_()
    with context():
        for block in model:
            x = checkpoint(block, x, use_reentrant=reentrant)
    x.square().sum().backward()


def reentrant(model, context):
    checkpointed(model, context, True)


def not_reentrant(model, context):
    checkpointed(model, context, False)


def in_half(model, context):
    torch.manual_seed(3)
    with context(), torch.autocast("cpu"):
        loss = model(inputs()).square().sum()
    loss.backward()


RUNS = (
    passes,
    several_micro_batches,
    two_graphs_at_once,
    retained,
    double_backward,
    backward_inside,
    reentrant,
    not_reentrant,
    in_half,
)
