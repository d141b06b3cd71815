"""Functions that run on every rank of some processes, started once for all functions of a file."""

import faulthandler
import multiprocessing
from contextlib import contextmanager

import torch
import torch.distributed as dist
from integration.tiny_runs import process_group
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

# Imported once, by a server that all ranks are forked from: what other tests leave in a process,
# threads and process groups, does not survive a fork.
PRELOADED = ("torch.distributed.tensor", "torch.distributed.fsdp", "torch.distributed.checkpoint")

# A hang ends with a traceback; a busy machine is slow.
DEADLINE = 600


def on_ranks(world, functions, folder, preloaded=()):
    """What each of some functions of (rank, world) returns, by its name, a list over the ranks.

    The server knows other modules at once only if this is what starts it.
    """
    multiprocessing.set_forkserver_preload([*PRELOADED, "lowrank_kernels", *preloaded])
    torch.multiprocessing.start_processes(
        _worker, (world, functions, folder), nprocs=world, start_method="forkserver"
    )
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    names = map(_name, functions)
    return {name: [result[name] for result in results] for name in names}


def _name(function):
    """Of a function or a `functools.partial` of one."""
    return getattr(function, "func", function).__name__


def _worker(rank, world, functions, folder):
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(DEADLINE, exit=True)
    with process_group(rank, world, folder / "store"):
        results = {_name(function): function(rank, world) for function in functions}
        torch.save(results, folder / f"{rank}.pt")
        dist.barrier()
    faulthandler.cancel_dump_traceback_later()


def mesh_of(*sizes):
    """A mesh of CPUs; its axes are named as HSDP's, if there are two."""
    names = ("replicas", "shards")[-len(sizes) :]
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def whole(tensor):
    """All of a DTensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


SENDING = ("all_reduce", "broadcast", "all_to_all_single")


@contextmanager
def counted_collectives():
    """A list that ends up with the names of the collectives that were called."""
    names, patched = [], {}
    for name in ("all_reduce", "broadcast", "all_to_all_single", "all_gather_object"):
        patched[name] = getattr(dist, name)

        def counting(*args, _name=name, **options):
            names.append(_name)
            return patched[_name](*args, **options)

        setattr(dist, name, counting)
    try:
        yield names
    finally:
        for name, function in patched.items():
            setattr(dist, name, function)


@contextmanager
def sent_bytes():
    """A dict that ends up with what this rank has sent, by the collectives' names, in bytes.

    Of X bytes an all-reduce over w ranks sends 2 (w - 1) / w X, as a ring does, and a broadcast X
    from each; an all-to-all sends what is not for this rank.
    """
    sent, patched = {}, {name: getattr(dist, name) for name in SENDING}

    def note(name, size):
        sent[name] = sent.get(name, 0) + size

    def all_reduce(tensor, group=None, **options):
        world = dist.get_world_size(group)
        note("all_reduce", 2 * (world - 1) / world * tensor.nbytes)
        return patched["all_reduce"](tensor, group=group, **options)

    def broadcast(tensor, *args, **options):
        note("broadcast", tensor.nbytes)
        return patched["broadcast"](tensor, *args, **options)

    def all_to_all_single(received, outgoing, in_splits, out_splits, group=None):
        others = sum(out_splits) - out_splits[dist.get_rank(group)]
        note("all_to_all_single", others * outgoing.itemsize)
        patched["all_to_all_single"](received, outgoing, in_splits, out_splits, group=group)

    for function in (all_reduce, broadcast, all_to_all_single):
        setattr(dist, function.__name__, function)
    try:
        yield sent
    finally:
        for name, function in patched.items():
            setattr(dist, name, function)
