"""Parameters, gradients and states that do not lie in memory as they are counted."""

import pytest
import torch
from optim.torch_suite import KINDS, Kind, assert_close, every_kind, over, set_grads, with_holes
from torch import nn

from lowrank_kernels import FiraAdamW

# Dense, and of more than one dimension, in every layout that a parameter can have.
SHAPES = {"tall": (10, 5), "wide": (4, 9), "vector": (10,), "filters": (4, 3, 2, 2)}
STEPS = 4


def contiguous(tensor):
    return tensor.clone(memory_format=torch.contiguous_format)


def transposed(tensor):
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def channels_last(tensor):
    return tensor.movedim(1, -1).contiguous().movedim(-1, 1) if tensor.dim() > 2 else tensor


def equal_rows(tensor):
    return tensor[:1].expand(tensor.shape)


def one_element(tensor):
    """What `torch.autograd.grad(weight.sum(), weight)` returns."""
    return tensor.flatten()[:1].reshape([1] * tensor.dim()).expand(tensor.shape)


# Of a parameter, and of its gradient.
LAYOUTS = [
    (contiguous, with_holes),
    (contiguous, transposed),
    (contiguous, channels_last),
    (contiguous, equal_rows),
    (contiguous, one_element),
    (with_holes, contiguous),
    (with_holes, with_holes),
    (with_holes, one_element),
    (transposed, contiguous),
    (transposed, transposed),
    (transposed, equal_rows),
    (channels_last, contiguous),
    (channels_last, channels_last),
]
every_layout = pytest.mark.parametrize(
    ("param_layout", "grad_layout"), LAYOUTS, ids=[f"{a.__name__}-{b.__name__}" for a, b in LAYOUTS]
)


class Run:
    """Parameters of all shapes in one layout, and their optimizer.

    One direction, kept, is what a gradient of equal rows has: with a second one, or after a change,
    rounding errors would have a say.
    """

    def __init__(self, kind, layout=contiguous, dtype=torch.float64):
        rng = torch.Generator().manual_seed(0)
        values = [
            torch.randn(shape, generator=rng, dtype=torch.float64) for shape in SHAPES.values()
        ]
        self.params = [nn.Parameter(layout(value.to(dtype))) for value in values]
        named = zip(SHAPES, self.params, strict=True)
        self.optimizer = kind(named, rank=1, gap=10**6, lr=0.01, weight_decay=0.1)

    def train(self, seeds, layout=contiguous, values=contiguous):
        for seed in seeds:
            set_grads(self.params, seed)
            for param in self.params:
                param.grad = layout(values(param.grad))
            self.optimizer.step()
        return self

    def weights(self):
        return list(zip(SHAPES, (param.detach() for param in self.params), strict=True))


def of_expanded(layout):
    """A contiguous tensor of the values that an expanded one has."""
    return (
        (lambda tensor: contiguous(layout(tensor)))
        if layout in (equal_rows, one_element)
        else contiguous
    )


@every_kind
@every_layout
def test_layouts_change_no_value(param_layout, grad_layout, kind):
    values = of_expanded(grad_layout)
    dense = Run(kind).train(range(STEPS), values=values)
    run = Run(kind, param_layout).train(range(STEPS), layout=grad_layout, values=values)
    assert_close(dense.weights(), run.weights())


# The compiled backend has no float64 on a CPU. Bases of random numbers: no rounding changes them.
IN_FLOAT32 = {name: KINDS[name] for name in ("torch", "plain", "random")}
IN_FLOAT32["random fira"] = Kind(FiraAdamW, {"subspace": "random"})


@over(IN_FLOAT32)
@every_layout
def test_layouts_change_no_value_in_float32(param_layout, grad_layout, kind):
    values = of_expanded(grad_layout)
    dense = Run(kind, dtype=torch.float32).train(range(STEPS), values=values)
    run = Run(kind, param_layout, torch.float32)
    run.train(range(STEPS), layout=grad_layout, values=values)
    assert_close(dense.weights(), run.weights())


def between(tensor):
    """The elements that `with_holes` has left to others."""
    return tensor.detach().as_strided(tensor.shape, tensor.stride(), 1)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad_layout", [with_holes, contiguous])
def test_what_lies_between_the_elements_is_left_alone(grad_layout, dtype, kind):
    run = Run(kind, with_holes, dtype).train(range(STEPS), layout=grad_layout)
    for name, param in zip(SHAPES, run.params, strict=True):
        assert (between(param) == 7).all(), name


@every_kind
def test_what_lies_between_the_elements_of_moments_is_left_alone(kind):
    """All strides are equal then, and yet memory is not to be walked along."""
    run = Run(kind, with_holes).train([0], layout=with_holes)
    state = run.optimizer.state[run.params[2]]
    for key in ("exp_avg", "exp_avg_sq"):
        state[key] = with_holes(state[key])
    run.train(range(1, STEPS), layout=with_holes)
    assert_close(Run(kind).train(range(STEPS)).weights(), run.weights())
    assert all((between(state[key]) == 7).all() for key in ("exp_avg", "exp_avg_sq"))
    assert (between(run.params[2]) == 7).all()


@every_kind
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (contiguous, channels_last),
        (channels_last, contiguous),
        (contiguous, with_holes),
        (transposed, contiguous),
    ],
)
def test_a_checkpoint_goes_on_in_another_layout(before, after, kind):
    """A model that is trained on in `channels_last` has moments that are not."""
    whole = Run(kind).train(range(2 * STEPS))
    half = Run(kind, before).train(range(STEPS), layout=before)
    other = Run(kind, after)
    with torch.no_grad():
        torch._foreach_copy_(other.params, half.params)
    other.optimizer.load_state_dict(half.optimizer.state_dict())
    other.train(range(STEPS, 2 * STEPS), layout=after)
    assert_close(whole.weights(), other.weights())
