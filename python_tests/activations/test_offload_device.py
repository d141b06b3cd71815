"""Saved tensors in the host's memory: the order of copies, and what is never touched too early.

A `Lane` that does nothing until it is waited for stands in for a GPU's stream. Memory that is given
up, or used, while a copy of it is waiting still, is an error there.
"""

import gc
import threading
from collections import deque

import pytest
import torch
from devices import GPU
from offload_runs import RUNS, gradients, inputs, net, passes, plain
from torch.multiprocessing.reductions import StorageWeakRef

from lowrank_kernels import offload_activations
from lowrank_kernels.activations.offload import OffloadActivations, Places
from lowrank_kernels.activations.offload.device import PIECE, Copying, Device, HostMemory
from lowrank_kernels.activations.offload.disk import Disk
from lowrank_kernels.activations.offload.engine import bytes_of
from lowrank_kernels.activations.offload.slots import Slots

GARBAGE = 0x5A
CPU = torch.device("cpu")


class Event:
    """Of a `LateLane`: milliseconds on its clock, which each copy takes one of."""

    def __init__(self, lane, moment=None):
        self.lane, self.moment = lane, moment

    def query(self):
        return self.moment is not None

    def synchronize(self):
        self.lane.run_until(self)

    def elapsed_time(self, later):
        return later.moment - self.moment


class LateLane:
    """Copies as late as may be."""

    def __init__(self):
        self.copies, self.lock = deque(), threading.Lock()
        self.clock = 0.0

    def out(self, memory, block):
        source = StorageWeakRef(memory)
        block.fill_(GARBAGE)
        # A GPU's copy counts as a change when it is ordered.
        return self._add(lambda: block.data.copy_(bytes_of(alive(source))), source)

    def back(self, block):
        memory = torch.UntypedStorage(len(block))
        bytes_of(memory).fill_(GARBAGE)
        target = StorageWeakRef(memory)
        return memory, self._add(lambda: bytes_of(alive(target)).copy_(block), target)

    def wait(self, done):
        self.run_until(done)

    def mark(self):
        return Event(self, self.clock)

    def finish(self):
        with self.lock:
            while self.copies:
                self._run()

    def run_until(self, done):
        with self.lock:
            while not done.query():
                self._run()

    def _add(self, copy, needed):
        copying = Copying(Event(self), Event(self))
        self.copies.append((copying, copy, needed))
        return copying

    def _run(self):
        copying, copy, _ = self.copies.popleft()
        copying.begun.moment = self.clock
        copy()
        self.clock += 1
        copying.done.moment = self.clock

    def check(self):
        """Nothing that waits to be copied is gone."""
        assert not any(needed.expired() for _, _, needed in self.copies)


def alive(reference):
    assert not reference.expired(), "memory was given up before its copy"
    storage = torch.UntypedStorage._new_with_weak_ptr(reference.cdata)
    assert storage is not None
    return storage


def unpinned(size):
    return torch.empty(size, dtype=torch.uint8)


def offload_on(lane, ram, folder=None, keep=0.0, in_flight=1 << 16, ahead=1 << 16):
    """As for a GPU, whose memory is that of the host."""
    slots = None if folder is None else Slots(folder)
    disk = None if slots is None else Disk(slots, in_flight, ahead, 0.0)
    places = Places(slots, ram, in_flight, ahead, keep)
    host = HostMemory(ram, unpinned)
    places.engines[CPU] = Device(lane, host, disk, in_flight, ahead, keep)
    return OffloadActivations(places, 1)


@pytest.fixture(params=["memory", "both", "disk"])
def late(request, tmp_path):
    """All in memory, half of it on the disk, and nearly all."""
    lane = LateLane()
    ram = {"memory": 1 << 22, "both": 1 << 17, "disk": 1}[request.param]
    found = offload_on(lane, ram, tmp_path)
    yield found
    lane.check()
    assert found.places_in_use == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_gradients_are_the_same_in_every_bit(run, late):
    model = net()
    run(model, lambda: late)
    assert all(map(torch.equal, gradients(model), plain(run)))
    counts = late._places.engines[CPU].counts
    assert counts.copied > 0
    assert counts.copied + counts.kept == counts.packed


def test_what_is_beyond_the_hosts_memory_goes_to_the_disk(tmp_path):
    offload = offload_on(LateLane(), 1 << 14, tmp_path, in_flight=1)
    x = inputs().requires_grad_()
    for _ in range(2):
        with offload:
            hidden = x * 1
            for _ in range(4):
                hidden = hidden.sin() * 1
        offload.places_in_use  # noqa: B018 - it waits for the disk
        hidden.sum().backward()
        del hidden
    assert x.nbytes == 3 << 12
    assert offload.counts.packed == offload.counts.copied == 8 * x.nbytes
    # One of four fits.
    assert offload.counts.written == 6 * x.nbytes
    assert offload.counts.returned >= 6 * x.nbytes
    assert offload.places_in_use == 0


def test_without_a_disk_the_rest_stays_on_the_device(caplog):
    offload = offload_on(LateLane(), 1 << 14)
    x = inputs().requires_grad_()
    for _ in range(2):
        with offload:
            hidden = x * 1
            for _ in range(4):
                hidden = hidden.sin() * 1
        hidden.sum().backward()
        del hidden
    assert offload.counts.copied == 2 * x.nbytes
    assert offload.counts.kept == 6 * x.nbytes
    assert sum("ram is full" in record.message for record in caplog.records) == 1


def test_memory_is_given_up_beyond_what_may_be_in_flight():
    """Two of four are held; the copies of the others were waited for."""
    x, lane = inputs().requires_grad_(), LateLane()
    offload = offload_on(lane, 1 << 20, in_flight=2 * x.nbytes, ahead=x.nbytes)
    with offload:
        hidden = x * 1
        for _ in range(4):
            hidden = hidden.sin() * 1
    waiting = [each() for each in offload._places.engines[CPU]._living.values()]
    assert [each.memory is None for each in waiting] == [True, True, False, False]
    assert len(lane.copies) == 2
    hidden.sum().backward(retain_graph=True)
    # One was brought ahead, and then the other.
    assert offload.counts.returned == 2 * x.nbytes
    assert offload.counts.missed == 0
    hidden.sum().backward()
    assert offload.counts.returned == 6 * x.nbytes


def test_graphs_that_are_dropped_wait_for_their_copies():
    lane = LateLane()
    offload = offload_on(lane, 1 << 22)
    with offload:
        total = net()(inputs())
    assert lane.copies
    del total
    gc.collect()
    passes(net(), lambda: offload)
    assert offload.places_in_use == 0


def test_forwards_without_backward_leave_nothing():
    offload = offload_on(LateLane(), 1 << 22)
    for _ in range(50):
        with offload:
            net()(inputs())
    device = offload._places.engines[CPU]
    assert offload.places_in_use == 0
    assert not device._living
    assert not device._away
    assert not device._copies


def test_a_graph_that_is_kept_outlives_the_next_forward():
    """What it held while it was copied is no longer to be given up."""
    offload = offload_on(LateLane(), 1 << 22)
    losses = []
    for _ in range(2):
        with offload:
            losses.append(net()(inputs()).square().sum())
        losses[0].backward(retain_graph=True)
    losses[1].backward()


def test_a_change_in_place_is_an_error():
    offload = offload_on(LateLane(), 1 << 20, in_flight=1)
    x = inputs().requires_grad_() * 1
    with offload:
        total = x.square().sum()
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


def test_what_could_not_be_copied_in_time_stays():
    """Of four copies of 1 ms each, a forward of 2 ms leaves two."""
    lane = LateLane()
    offload = offload_on(lane, 1 << 20, keep=None, in_flight=1)
    x = inputs().requires_grad_()

    def copied(forward_ms):
        before = offload.counts.copied
        with offload:
            hidden = x * 1
            for _ in range(4):
                hidden = hidden.sin() * 1
        device = offload._places.engines[CPU]
        lane.finish()
        lane.clock = device._span[0].moment + forward_ms
        hidden.sum().backward()
        return (offload.counts.copied - before) // x.nbytes

    assert copied(forward_ms=2.0) == 4
    assert copied(forward_ms=20.0) == 2
    assert copied(forward_ms=20.0) == 4


def test_blocks_are_cut_from_pieces_and_used_again():
    taken = []

    def allocate(size):
        taken.append(size)
        return unpinned(size)

    host = HostMemory(3 << 20, allocate)
    sizes = (5, 1 << 20, 900_000, 300_000)
    blocks = [host.take(size) for size in sizes]
    assert [len(block) for block in blocks] == list(sizes)
    for number, block in enumerate(blocks):
        block.fill_(number)
    assert [int(block.unique()) for block in blocks] == [0, 1, 2, 3]
    # The largest powers of 2 that fit, and then there is no room.
    assert taken == [2 << 20, 1 << 20]
    assert host.take(1 << 20) is None
    for block in blocks:
        host.give(block)
    assert host.in_use == 0
    again = [host.take(size) for size in sizes]
    assert [one.data_ptr() for one in again] == [one.data_ptr() for one in blocks]
    assert len(taken) == 2


@pytest.mark.parametrize("mib", [1, 31, 33, 65, 129, 200, 257, 600, 1000])
def test_blocks_of_any_size_find_nearly_all_of_the_hosts_memory(mib):
    """Eight ninths of it; of blocks that are larger than a ninth, what powers of 2 leave."""
    host, blocks = HostMemory(16 << 30, lambda size: unpinned(1).expand(size)), 0
    while host.take(mib << 20) is not None:
        blocks += 1
    assert blocks * mib << 20 >= 8 * (16 << 30) // 9
    assert host.in_use == blocks


def test_blocks_whose_sizes_change_find_what_was_given_back():
    taken = []

    def allocate(size):
        taken.append(size)
        return unpinned(size)

    host = HostMemory(1 << 40, allocate)
    for step in range(50):
        blocks = [host.take((1 << 25) + 4096 * step) for _ in range(7)]
        for block in blocks[step % 2 :: 2] + blocks[1 - step % 2 :: 2]:
            host.give(block)
    assert taken == [PIECE]


def test_memory_that_cannot_be_had_is_no_room():
    def allocate(size):
        raise RuntimeError("CUDA error: out of memory")

    host = HostMemory(1 << 20, allocate)
    assert host.take(100) is None
    assert host.take(100) is None
    assert host.in_use == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_has_to_be_a_folder():
    with pytest.raises(ValueError, match="there is no GPU: name a folder"):
        offload_activations()


def test_amounts_are_checked(tmp_path):
    for ram, said in (("8 GX", "ram must be an amount above 0"), (0, "ram must be an int of")):
        with pytest.raises(ValueError, match=said):
            offload_activations(tmp_path, ram=ram)


@pytest.mark.parametrize("folder", [None, "disk"])
@pytest.mark.parametrize("run", [*RUNS], ids=lambda run: run.__name__)
@pytest.mark.gpu
@GPU[1]
def test_on_a_gpu(run, folder, tmp_path):
    def on_gpu(model, context):
        with torch.device("cuda"):
            run(model.cuda(), context)

    ram = "1GiB" if folder is None else 1 << 17
    path = None if folder is None else tmp_path
    offload = offload_activations(path, ram=ram, least=1, in_flight=1 << 16, ahead=1 << 16)
    model, other = net(), net()
    on_gpu(model, lambda: offload)
    on_gpu(other, torch.enable_grad)
    assert all(map(torch.equal, gradients(model), gradients(other)))
    assert offload.counts.copied > 0
    assert offload.places_in_use == 0
