import copy
import weakref
from contextlib import nullcontext

import pytest
import torch
from activations.llama import (
    EAGER_NORM,
    HEADS,
    HIDDEN,
    IDS,
    INTERMEDIATE,
    LABEL_COUNT,
    LAYER,
    LAYERS,
    LOSS,
    ROTATIONS,
    TOKENS,
    language_model,
    token_ids,
    whole,
)
from torch import nn
from torch.nn import functional

from lowrank_kernels import saved_bytes


def test_a_layer_saves_what_the_table_of_the_reference_says():
    assert sum(LAYER.values()) == 24 * HIDDEN + 8 * INTERMEDIATE + 8 + 4 * HEADS


def test_a_language_model_to_the_byte():
    ids = token_ids()
    report = saved_bytes(language_model(), ids, labels=ids)
    assert report.total == sum(row.bytes for row in report.rows)
    assert report.total == whole(LAYER, EAGER_NORM + 2 * HIDDEN)
    assert report.by_kind() == {
        "other": TOKENS * IDS,
        "norm": TOKENS * (2 * LAYERS + 1) * EAGER_NORM,
        "linear": TOKENS * (LAYERS * (2 * 2 * HIDDEN + 2 * INTERMEDIATE) + 2 * HIDDEN),
        "attention": TOKENS * LAYERS * (4 * 2 * HIDDEN + 4 * HEADS) + ROTATIONS,
        "activation": TOKENS * LAYERS * 3 * 2 * INTERMEDIATE,
        "loss": TOKENS * LOSS + LABEL_COUNT,
    }


def test_the_first_of_siblings_owns_their_input():
    ids = token_ids()
    rows = {row.module: row for row in saved_bytes(language_model(), ids, labels=ids).rows}
    q = rows["model.layers.1.self_attn.q_proj"]
    assert q == ("model.layers.1.self_attn.q_proj", "linear", 1, TOKENS * 2 * HIDDEN)
    assert "model.layers.1.self_attn.k_proj" not in rows
    assert "model.layers.1.self_attn.o_proj" not in rows  # its input is attention's output


def test_layers_are_one_line_of_the_table():
    ids = token_ids()
    text = str(saved_bytes(language_model(), ids, labels=ids))
    (line,) = [line for line in text.splitlines() if "gate_proj" in line]
    size = LAYERS * TOKENS * 2 * HIDDEN
    assert line.split() == ["model.layers.*.mlp.gate_proj", "linear", str(LAYERS), str(size)]


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_saves_its_input_and_no_weight(shape, bias):
    x = torch.randn(shape, requires_grad=True)
    report = saved_bytes(nn.Linear(6, 4, bias=bias), x)
    assert report.rows == [("", "linear", 1, x.numel() * 4)]


def test_a_view_keeps_the_whole_of_its_storage():
    x = torch.randn(20, 6)
    assert saved_bytes(nn.Linear(6, 4), x[3:5]).total == 20 * 6 * 4


class Twice(nn.Module):
    """Multiplies by a buffer; branches are thrown away."""

    def __init__(self):
        super().__init__()
        self.register_buffer("factor", torch.full((6,), 2.0))

    def forward(self, x):
        x.exp()
        cycle = [x.exp()]
        cycle.append(cycle)
        return x.sin() * self.factor


def test_neither_buffers_nor_what_was_dropped_count():
    x = torch.randn(5, 6, requires_grad=True)
    assert saved_bytes(Twice(), x).rows == [("", "other", 1, x.numel() * 4)]


def test_what_is_saved_is_freed_with_the_graph():
    freed = []

    class Exp(nn.Module):
        def forward(self, x):
            y = x.exp()
            weakref.finalize(y.untyped_storage(), freed.append, True)
            return y + 1

    saved_bytes(Exp(), torch.randn(5, 6, requires_grad=True))
    assert freed


def test_a_part_that_fails_does_not_own_what_comes_after():
    class Retrying(nn.Module):
        def __init__(self):
            super().__init__()
            self.wrong, self.right = nn.Linear(5, 4), nn.Linear(6, 4)

        def forward(self, x):
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.right(x).sin()

    rows = saved_bytes(Retrying(), torch.randn(3, 6)).rows
    assert [(row.module, row.kind) for row in rows] == [("right", "linear"), ("", "other")]


def test_functions_tell_what_modules_do_not():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(6, 6))

        def forward(self, x):
            x = functional.linear(x, self.w)
            x = functional.rms_norm(functional.silu(x), (6,))
            return functional.mse_loss(
                x[None], functional.scaled_dot_product_attention(x, x, x)[None]
            )

    kinds = {row.kind for row in saved_bytes(Block(), torch.randn(2, 3, 6)).rows}
    assert kinds == {"linear", "activation", "norm", "attention", "loss"}


def test_a_loss_of_the_caller_counts_as_loss():
    x, target = torch.randn(5, 6), torch.tensor([0, 1, 2, 3, 3])
    loss = nn.Linear(4, 1, bias=False)
    report = saved_bytes(nn.Linear(6, 4), x, loss=lambda y: functional.cross_entropy(y, target))
    assert report.by_kind() == {"linear": 5 * 6 * 4, "loss": 5 * 4 * 4 + 5 * 8 + 4}
    # Parameters of a loss are parameters.
    report = saved_bytes(nn.Linear(6, 4), x, loss=loss)
    assert report.by_kind() == {"linear": 5 * 6 * 4, "loss": 5 * 4 * 4}


@pytest.mark.parametrize("reentrant", [False, True])
def test_of_checkpoints_the_inputs_are_left(reentrant):
    ids, model = token_ids(), language_model().train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    report = saved_bytes(model, ids, labels=ids)
    layers = [row for row in report.rows if ".layers." in row.module]
    assert sum(row.bytes for row in layers) == LAYERS * TOKENS * 2 * HIDDEN


@pytest.mark.parametrize("way", ["wrapped", "in place", "part"])
def test_a_compiled_module_is_one_row_and_not_compiled_again(way):
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    class Stack(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    torch._dynamo.reset()
    model = Stack(nn.Linear(6, 6), nn.SiLU(), nn.Linear(6, 4))
    x = torch.randn(5, 6)
    expected = saved_bytes(model, x).total
    if way == "wrapped":
        run, names = torch.compile(model, backend=backend), {""}
    elif way == "in place":
        model.compile(backend=backend)
        run, names = model, {""}
    else:
        run = Stack(torch.compile(model[0], backend=backend), *model[1:])
        names = {"0", "1", "2"}
    run(x).sum().backward()
    before = len(compiled)
    assert before
    report = saved_bytes(run, x)
    assert report.total == expected
    assert {row.module for row in report.rows} == names
    assert any(row.kind == "compiled" for row in report.rows) == (way != "in place")
    run(x).sum().backward()
    assert len(compiled) == before


@pytest.mark.parametrize("backward", [False, True])
def test_nothing_is_left_behind(backward):
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
    x = torch.randn(5, 6)
    model(x).sum().backward()
    model[3].weight.grad = None
    grads = [param.grad for param in model.parameters()]
    values = [None if grad is None else grad.clone() for grad in grads]
    buffers, chance = copy.deepcopy(list(model.buffers())), torch.get_rng_state()
    saved_bytes(model, x, loss=torch.sum, backward=backward)
    assert torch.equal(torch.get_rng_state(), chance)
    assert all(map(torch.equal, model.buffers(), buffers))
    for param, grad, value in zip(model.parameters(), grads, values, strict=True):
        assert param.grad is grad
        assert grad is None or torch.equal(grad, value)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_nothing_is_left_behind_by_a_forward_that_raises():
    model, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 4), nn.Linear(3, 4)), torch.randn(5, 6)
    chance = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes"):
        saved_bytes(model, x)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), chance)


def test_gradients_of_parameters_that_are_trained():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 4)).bfloat16()
    model[0].bias.requires_grad_(False)
    report = saved_bytes(model, torch.randn(5, 6).bfloat16())
    assert report.gradients == 2 * (24 + 16 + 4)
    assert report.largest_gradient == 2 * 24


def test_gradients_that_backward_really_leaves():
    model = nn.Module()
    model.used, model.unused = nn.Linear(6, 4), nn.Linear(60, 40)
    model.forward = model.used.forward
    report = saved_bytes(model, torch.randn(5, 6), loss=torch.sum, backward=True)
    assert report.gradients == 4 * (24 + 4)
    assert report.largest_gradient == 4 * 24
    assert saved_bytes(model, torch.randn(5, 6)).largest_gradient == 4 * 2400


def test_backward_needs_a_loss():
    with pytest.raises(ValueError, match="pass loss="):
        saved_bytes(nn.Linear(6, 4), torch.randn(5, 6), backward=True)


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad])
def test_gradients_are_on_whatever_the_caller_has(context):
    x = torch.randn(5, 6)
    with context():
        assert saved_bytes(nn.Linear(6, 4), x).total == x.numel() * 4
