"""What is prepared once serves every later step, with the bits of what is prepared anew."""

import gc

import pytest
import torch
from devices import device_of
from ops.test_operations import FORMS, STEPS, Run, take_step
from pairs import pairwise
from torch.multiprocessing.reductions import StorageWeakRef

from lowrank_kernels.ops import AdamScalars, Scalars, Side, backends, prepare
from lowrank_kernels.ops.dispatch import Kind, choose_kind

# Interpreted or compiled, the kernels have to do the same.
pytestmark = pytest.mark.gpu


def served():
    """The backends that run here, each with the dtypes that it has."""
    for name in (name for name, (available, _) in backends().items() if available):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            try:
                choose_kind(name, Kind(device_of(name).type, dtype, dtype))
            except ValueError:
                continue
            yield name, dtype


SERVED = list(served())


def batch(backend, dtype, side, form):
    """Three matrices, with a gradient each for every step; bfloat16 ones round stochastically."""
    runs = [Run(backend, dtype, (37, 61), 13, side, form, seed=seed) for seed in range(3)]
    salts = (3, 7, 2**32 - 1) if dtype is torch.bfloat16 else None
    return runs, [Run.matrices(runs, index)._replace(salts=salts) for index in range(STEPS)]


def scalars(index):
    adam = AdamScalars(0.9, 0.999, 1e-6, 1 - 0.9 ** (index + 1), 1 - 0.999 ** (index + 1))
    return Scalars(adam, 0.25, step_size=0.5 / (index + 1), decay=0.125, step=index + 1)


def in_one_place(grads):
    """The gradients of every step, where those of the first one lie."""
    first = [grad.clone() for grad in grads[0]]
    for of_step in grads:
        for place, grad in zip(first, of_step, strict=True):
            place.copy_(grad)
        yield first


def elsewhere(grads):
    """At new addresses, of other alignments at that; the tensors of the first step are gone."""
    for index, of_step in enumerate(grads):
        yield [
            grad.new_empty(grad.numel() + index)[index:].view(grad.shape).copy_(grad)
            for grad in of_step
        ]


@pytest.mark.parametrize("places", [in_one_place, elsewhere])
@pytest.mark.parametrize(("backend_dtype", "side", "form"), pairwise(SERVED, Side, FORMS), ids=str)
def test_prepared_once_has_the_bits_of_prepared_anew(backend_dtype, side, form, places):
    backend, _ = backend_dtype
    (kept, every), (fresh, others) = (batch(*backend_dtype, side, form) for _ in "ab")
    operations = None
    for index, grads in enumerate(places([matrices.grads for matrices in every])):
        matrices = every[index]._replace(grads=grads)
        operations = operations or prepare(matrices, backend=backend)
        take_step(operations, matrices, scalars(index))
        matrices = others[index]._replace(grads=grads)
        take_step(prepare(matrices, backend=backend), matrices, scalars(index))
        for one, other in zip(kept, fresh, strict=True):
            for name in ("weight", "exp_avg", "exp_avg_sq", "limiter_norm"):
                assert torch.equal(getattr(one, name), getattr(other, name)), (name, index)
    assert not torch.equal(kept[0].weight, kept[1].weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("backend", "dtype"), SERVED, ids=str)
def test_prepared_operations_keep_nothing_of_the_batch(backend, dtype, form):
    runs, every = batch(backend, dtype, Side.LEFT, form)
    operations = prepare(every[0], backend=backend)
    for index, matrices in enumerate(every):
        take_step(operations, matrices, scalars(index))
    tensors = [tensor for lists in every for each in lists[2:8] for tensor in each]
    memory = [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]
    assert not any(each.expired() for each in memory)
    del runs, every, matrices, tensors
    gc.collect()
    assert all(each.expired() for each in memory)
    assert operations
