"""Contexts in contexts, in threads and in models; what is installed, copied and taken away."""

import copy
import inspect
import pickle
import threading
from types import MethodType

import pytest
import torch
from offload_runs import ROWS, WIDTH, gradients, inputs, net, passes, plain
from torch import nn

from lowrank_kernels import offload_activations

BYTES = 4 * ROWS * WIDTH


@pytest.fixture
def offload(tmp_path):
    found = offload_activations(tmp_path, least=1)
    yield found
    assert packed_by(found, lambda: sine().backward()) == 0
    assert found.places_in_use == 0


def packed_by(offload, function):
    before = offload.counts.packed
    function()
    return offload.counts.packed - before


def sine():
    """It saves one tensor of `BYTES`."""
    return (inputs().requires_grad_() * 1).sin().sum()


def test_the_end_of_an_inner_context_is_not_that_of_the_outer_one(offload):
    with offload:
        with offload:
            assert packed_by(offload, sine) == BYTES
        assert packed_by(offload, sine) == BYTES
    assert packed_by(offload, sine) == 0


def test_hooks_of_others_in_between_come_back(offload):
    seen = []
    with offload, torch.autograd.graph.saved_tensors_hooks(seen.append, lambda _: None):
        with offload:
            assert packed_by(offload, sine) == BYTES
        assert packed_by(offload, sine) == 0
    assert len(seen) == 1


def test_an_evaluation_within_leaves_the_context_as_it_is(offload):
    teacher = nn.Linear(WIDTH, WIDTH).eval()
    offload.install(teacher)
    with offload:
        with torch.no_grad():
            teacher(inputs())
        assert packed_by(offload, sine) == BYTES


def test_a_model_and_a_part_of_it(offload):
    """As much as with the model alone, and no parameters of either."""
    packed, models = [], [net(), net()]
    for number, model in enumerate(models):
        offload.install(model)
        if number:
            offload.install(model[2].qkv)
        packed.append(packed_by(offload, lambda model=model: passes(model, torch.enable_grad)))
        assert all(map(torch.equal, gradients(model), plain(passes)))
    # What both have saved is taken twice: the input of the part.
    assert packed[1] - packed[0] in (0, BYTES)


def test_buffers_of_a_model_stay_behind_its_installed_parts(offload):
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", inputs())
            self.inner = nn.Identity()

        def forward(self, x):
            return (self.inner(x) * self.table).sum()

    model = Table()
    offload.install(model)
    offload.install(model.inner)
    x = inputs().requires_grad_()
    assert packed_by(offload, lambda: model(x).backward()) == 0


def test_two_threads_in_one_context(offload):
    errors, barrier = [], threading.Barrier(2, timeout=20)

    def work(value):
        try:
            for _ in range(5):
                weight = torch.ones(64, 64, requires_grad=True)
                barrier.wait()
                with offload:
                    loss = (torch.full((64, 64), value) * weight).sum()
                    barrier.wait()
                loss.backward()
                assert torch.equal(weight.grad, torch.full((64, 64), value))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(value,)) for value in (1.0, 2.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not errors


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_forward_leaves_the_context(error, offload):
    class Fails(nn.Module):
        def forward(self, x):
            raise error

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), Fails())
    offload.install(model)
    with pytest.raises(error):
        model(inputs())
    assert packed_by(offload, sine) == 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors_stay(offload):
    nested = torch.nested.nested_tensor([torch.randn(5, 8), torch.randn(3, 8)], requires_grad=True)
    with offload:
        loss = torch.nested.to_padded_tensor(nested * nested, 0.0).sum()
    assert offload.counts.packed == 0
    loss.backward()
    assert torch.equal(nested.grad[0], 2 * nested[0])


def test_copies_of_an_installed_model(offload):
    """A deep copy has its own parameters, and is installed as well; what is pickled is not."""
    model = net()
    handle = offload.install(model)
    twin, other = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for each, is_installed in ((twin, True), (other, False)):
        packed = packed_by(offload, lambda each=each: passes(each, torch.enable_grad))
        assert (packed > 0) == is_installed
        assert all(map(torch.equal, gradients(each), plain(passes)))
    assert all(grad is None for grad in gradients(model))
    handle.remove()
    assert packed_by(offload, lambda: passes(twin, torch.enable_grad)) == 0


def test_a_handle_is_one_of_torch(offload):
    model = net()
    with offload.install(model) as handle:
        assert isinstance(handle.id, int)
        assert packed_by(offload, lambda: passes(model, torch.enable_grad)) > 0
        signature = inspect.signature(type(model).forward.__get__(model))
        assert inspect.signature(model.forward) == signature
    assert "forward" not in model.__dict__
    assert packed_by(offload, lambda: passes(model, torch.enable_grad)) == 0


@pytest.mark.parametrize("bound", [True, False])
def test_a_forward_that_others_have_wrapped(bound, offload):
    """Before it was installed, and after: that is left as it is."""
    model = net()

    def doubled(inner):
        return lambda *args: 2 * inner(*args)

    own = doubled(type(model).forward)
    model.forward = MethodType(own, model) if bound else doubled(model.forward)
    first = model.forward
    handle = offload.install(model)
    twin = copy.deepcopy(model)
    assert packed_by(offload, lambda: torch.equal(model(inputs()), twin(inputs()))) > 0
    model.forward = last = MethodType(doubled(model.forward.__func__), model)
    handle.remove()
    assert model.forward == last
    model.eval()
    assert torch.equal(model(inputs()), 4 * net().eval()(inputs()))
    model.forward = first
    handle = offload.install(model)
    handle.remove()
    assert model.forward == first
