"""Saved tensors on a disk: gradients in every bit, and nothing left behind."""

import errno
import gc
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager, nullcontext
from itertools import pairwise

import pytest
import torch
from offload_runs import (
    RUNS,
    WIDTH,
    backward_inside,
    double_backward,
    gradients,
    inputs,
    net,
    passes,
    plain,
)
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from lowrank_kernels import offload_activations
from lowrank_kernels.activations.offload.extents import Extents
from lowrank_kernels.activations.offload.slots import BLOCK, BOUNCE, Slots


@pytest.fixture
def offload(tmp_path):
    found = offload_activations(tmp_path, least=1, in_flight=1 << 16, ahead=1 << 16)
    yield found
    assert found.places_in_use == 0
    assert list(tmp_path.iterdir()) == []
    assert not any("_write_all" in t.name or "_read_all" in t.name for t in threading.enumerate())


def disk_of(offload):
    return offload._places.of(torch.device("cpu"))


def sines(x, times, context):
    """So many tensors are saved."""
    with context() if callable(context) else context:
        hidden = x * 1
        for _ in range(times):
            hidden = hidden.sin() * 1
    return hidden


@contextmanager
def settled(offload):
    """All that is saved is on the disk when it ends."""
    with offload:
        yield
    disk_of(offload).finish()


@pytest.mark.parametrize("settles", [True, False])
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.__name__)
def test_gradients_are_the_same_in_every_bit(run, settles, offload):
    model = net()
    run(model, (lambda: settled(offload)) if settles else (lambda: offload))
    assert all(map(torch.equal, gradients(model), plain(run)))
    if settles and run not in (double_backward, backward_inside):
        assert offload.counts.written > 0
        assert offload.counts.read > 0
    assert offload.counts.packed >= offload.counts.written + offload.counts.kept


def test_an_installed_model(offload):
    model = net()
    handle = offload.install(model)
    passes(model, torch.enable_grad)
    assert all(map(torch.equal, gradients(model), plain(passes)))
    packed = offload.counts.packed
    assert packed > 0
    model.eval()(inputs()).sum().backward()
    with torch.no_grad():
        model.train()(inputs())
    assert offload.counts.packed == packed
    handle.remove()
    passes(model, torch.enable_grad)
    assert offload.counts.packed == packed


def test_a_storage_is_written_once_and_parameters_never(offload):
    """x for three layers, and three parts of one storage."""
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(3)]
    x = inputs().requires_grad_() * 1
    with offload:
        total = sum(layer(x).sum() for layer in layers)
    assert offload.counts.packed == x.nbytes
    total.backward()
    wide = (inputs().requires_grad_() * 1).repeat(1, 3)
    with offload:
        one, two, three = wide.chunk(3, -1)
        total = (one * two * three).sum()
    # wide, and one * two.
    assert offload.counts.packed == x.nbytes + wide.nbytes + one.numel() * 4
    total.backward()


def test_a_part_of_something_large_stays_where_it_is(offload):
    large = torch.randn(1000, WIDTH)
    weight = torch.randn(WIDTH, requires_grad=True)
    with offload:
        total = (large[:10] * weight).sum()
    assert offload.counts.packed == 0
    total.backward()


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.expand(3, *x.shape),
        lambda x: x.t(),
        lambda x: x[:, ::2],
        lambda x: torch._neg_view(x),
        lambda x: x.to_sparse(),
        lambda x: x.double(),
        lambda x: x > 0,
        lambda x: x[:0],
        lambda x: x.as_strided((3, 4), (1, 1), 5),
    ],
)
def test_whatever_is_saved_comes_back(make, offload):
    saved = make(inputs())

    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            ctx.save_for_backward(saved)
            return y.clone()

        @staticmethod
        def backward(ctx, grad):
            (found,) = ctx.saved_tensors
            assert found.dtype is saved.dtype
            assert found.layout is saved.layout
            if saved.layout is torch.strided:
                assert found.stride() == saved.stride()
                assert torch.equal(found, saved)
            return grad

    y = torch.zeros(2, requires_grad=True)
    with offload:
        total = Keeps.apply(y).sum()
    total.backward()


@pytest.mark.parametrize("written", [True, False])
def test_a_change_in_place_is_an_error(written, offload):
    x = inputs().requires_grad_() * 1
    with offload:
        total = x.square().sum()
    if written:
        disk_of(offload).finish()
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()
    del total


def test_what_is_changed_after_backward_is_none(offload):
    x = inputs().requires_grad_() * 1
    with offload:
        total = x.square().sum()
    total.backward()
    with torch.no_grad():
        x.mul_(2)


@pytest.mark.parametrize("meanwhile", [0, 1 << 20])
@pytest.mark.parametrize("refilled", [True, False])
def test_a_storage_that_is_resized_before_it_is_written_stays(meanwhile, refilled, offload):
    """As sharded training frees and gathers again. A larger one would lie in others' slots."""
    slots, started = offload._places.slots, threading.Event()
    take = slots.take

    def late(size):
        started.wait(5)
        return take(size)

    slots.take = late
    saved, weight = torch.full((64, 64), 3.0), torch.ones(64, 64, requires_grad=True)
    storage = saved.untyped_storage()
    size = storage.nbytes()
    with offload:
        loss = (saved * weight).sum()
    storage.resize_(meanwhile)
    started.set()
    disk_of(offload).finish()
    assert offload.counts.written == 0
    if refilled:
        storage.resize_(size)
        saved.data.fill_(3)
    if refilled or meanwhile:
        loss.backward()
        assert torch.equal(weight.grad, torch.full((64, 64), 3.0))
    else:
        with pytest.raises(RuntimeError, match="of 16384 bytes was resized to 0 since it was"):
            loss.backward()
    del loss


@pytest.mark.parametrize("settles", [True, False])
def test_what_changed_unseen_between_two_forwards_is_saved_anew(settles, offload):
    """Through `.data`, or numpy, while a graph of before is alive."""
    x, weights = torch.ones(64, 64), [torch.ones(64, 64, requires_grad=True) for _ in range(2)]
    with settled(offload):
        first = (x * weights[0]).sum()
    x.data.mul_(7)
    with settled(offload) if settles else offload:
        second = (x * weights[1]).sum()
    second.backward()
    assert torch.equal(weights[1].grad, torch.full((64, 64), 7.0))
    del first, second


def test_graphs_that_are_dropped_are_forgotten(offload):
    x = inputs().requires_grad_()
    with offload:
        kept = sines(x, 2, nullcontext)
        for _ in range(50):
            sines(x, 2, nullcontext)
    disk = disk_of(offload)
    disk.finish()
    assert len(disk._living) == len(disk._known) == 2
    assert len(disk._away) <= 2
    assert offload.places_in_use <= 2
    del kept


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_memory_of_a_dropped_graph_is_free_at_once(keep, tmp_path):
    offload = offload_activations(tmp_path, keep=keep, least=1)
    x = inputs().requires_grad_()
    sines(x, 1, offload).sum().backward()
    start, written = threading.Event(), offload._places.slots.write
    offload._places.slots.write = lambda *args: (start.wait(5), written(*args))
    with offload:
        hidden = x * 1
        storage, total = StorageWeakRef(hidden.untyped_storage()), hidden.sin()
    del hidden, total
    start.set()
    while any("_write_all" in thread.name for thread in threading.enumerate()):
        time.sleep(0.001)
    assert storage.expired()


def test_a_step_without_a_backward_is_none(tmp_path):
    offload = offload_activations(tmp_path, keep=0.5, least=1)
    x, written = inputs().requires_grad_(), []
    for step in range(5):
        before = offload.counts.written
        hidden = sines(x, 4, lambda: settled(offload))
        written.append((offload.counts.written - before) // x.nbytes)
        if step != 2:
            hidden.sum().backward()
        del hidden
    assert written == [4, 2, 2, 2, 2]


def test_what_is_to_be_brought_is_looked_for_once(offload):
    class Counted(dict):
        looks = 0

        def __getitem__(self, key):
            self.looks += 1
            return super().__getitem__(key)

    x, disk = inputs().requires_grad_(), disk_of(offload)
    disk._living = Counted()
    hidden = sines(x, 100, lambda: settled(offload))
    hidden.sum().backward()
    assert offload.counts.read == 100 * x.nbytes
    assert 100 <= disk._living.looks <= 300
    del hidden


def test_exceptions_and_graphs_that_are_dropped_leave_nothing(offload):
    model = net()
    with pytest.raises(RuntimeError, match="normalized_shape"), offload:
        model[1](model[0](inputs()).T)
    with offload:
        model(inputs())

    def fail(grad):
        raise ValueError("in backward")

    with offload:
        hidden = model[0](inputs())
        hidden.register_hook(fail)
        loss = model[1](hidden).sum()
    with pytest.raises(ValueError, match="in backward"):
        loss.backward()
    del loss, hidden
    gc.collect()
    assert offload.places_in_use == 0
    passes(model, lambda: offload)


def test_a_full_disk_keeps_the_rest_in_memory(offload, caplog):
    take, left = offload._places.slots.take, [4]

    def full(size):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return take(size)

    offload._places.slots.take = full
    model = net()
    passes(model, lambda: offload)
    passes(model, lambda: offload)
    assert sum("No space left on device" in record.message for record in caplog.records) == 1
    model.zero_grad()
    passes(model, lambda: offload)
    assert all(map(torch.equal, gradients(model), plain(passes)))
    assert offload.counts.kept > 0


def test_what_cannot_be_read_is_an_error_with_its_folder(offload, tmp_path):
    model = net()
    with offload:
        loss = model(inputs()).sum()
    disk_of(offload).finish()

    def broken(place, memory):
        raise OSError(errno.EIO, "Input/output error")

    offload._places.slots.read = broken
    with pytest.raises(OSError, match="of activations cannot be read: Input/output error") as found:
        loss.backward()
    assert found.value.errno == errno.EIO
    assert found.value.filename == str(tmp_path)
    disk_of(offload).finish()
    del loss, found
    gc.collect()


def test_the_last_part_of_a_step_may_stay_in_memory(tmp_path):
    x = inputs().requires_grad_()
    for keep, written in ((0.0, 4), (0.5, 2), (0.75, 1), (1.0, 0)):
        offload = offload_activations(tmp_path, keep=keep, least=1)
        for _ in range(3):
            before = offload.counts.written
            with settled(offload):
                hidden = x * 1
                for _ in range(4):
                    hidden = hidden.sin() * 1
            hidden.sum().backward()
            del hidden
        assert (offload.counts.written - before) / x.nbytes == written, keep


def test_a_step_that_saves_more_than_the_last_one_goes_away_wholly(offload):
    x = inputs().requires_grad_()
    for times in (1, 3):
        before = offload.counts.written
        with settled(offload):
            hidden = x * 1
            for _ in range(times):
                hidden = hidden.sin() * 1
        hidden.sum().backward()
        assert offload.counts.written - before == times * x.nbytes


def test_what_the_disk_cannot_write_in_time_stays_in_memory(tmp_path):
    offload = offload_activations(tmp_path, keep=None, least=1)
    write = offload._places.slots.write

    def slow(place, memory):
        time.sleep(0.02)
        write(place, memory)

    offload._places.slots.write = slow
    x = inputs().requires_grad_()

    def passes():
        before = offload.counts.written
        with settled(offload):
            hidden = x * 1
            for _ in range(10):
                time.sleep(0.01)
                hidden = hidden.sin() * 1
        hidden.sum().backward()
        return (offload.counts.written - before) // x.nbytes

    assert passes() == 10
    # The forward of the first step waited until all was written; that of the second will not.
    disk = disk_of(offload)
    finish, disk.finish = disk.finish, lambda: None
    assert 1 <= passes() <= 10
    finish()
    disk._forward, disk._writing, disk._written = 0.1, 0.2, 10 * x.nbytes
    passes()
    assert disk.budget == pytest.approx(5 * x.nbytes)


@pytest.mark.parametrize("name", ["write", "read"])
def test_other_errors_of_a_thread_leave_nobody_waiting(name, offload):
    """What cannot be written stays; what cannot be read is an error."""
    model, slots = net(), offload._places.slots

    def fails(place, memory):
        raise MemoryError("none left")

    setattr(slots, name, fails)
    with settled(offload):
        loss = model(inputs()).sum()
    if name == "write":
        loss.backward()
        assert offload.counts.written == 0
    else:
        with pytest.raises(MemoryError, match="none left"):
            loss.backward()
    del loss
    gc.collect()


@pytest.mark.parametrize("name", ["_write_all", "_read_all"])
def test_a_thread_that_cannot_be_started_leaves_nobody_waiting(name, offload, monkeypatch):
    start, failed = threading.Thread.start, []

    def fails_once(thread):
        if name in thread.name and not failed:
            failed.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fails_once)
    model = net()
    for _ in range(2):
        model.zero_grad()
        passes(model, lambda: settled(offload))
        assert all(map(torch.equal, gradients(model), plain(passes)))
    assert failed
    assert (offload.counts.kept > 0) == (name == "_write_all")
    assert offload.counts.written > 0


def test_a_forked_process_is_refused(offload):
    with offload:
        loss = net()(inputs()).sum()
    child = os.fork()
    if child == 0:
        try:
            loss.backward()
        except RuntimeError as error:
            os._exit(7 if "do not survive a fork" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    loss.backward()


def test_processes_forked_before_the_first_use_write_files_of_their_own(tmp_path):
    offload, (ready, go) = offload_activations(tmp_path, least=1), (os.pipe(), os.pipe())

    def child(value):
        weight = torch.zeros(64, 64, requires_grad=True)
        with settled(offload):
            loss = (torch.full((64, 64), value) * weight).sum()
        os.write(ready[1], b"w")
        os.read(go[0], 1)
        loss.backward()
        return offload.counts.read > 0 and bool((weight.grad == value).all())

    children = []
    for value in (1.0, 2.0):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                code = 0 if child(value) else 2
            finally:
                os.write(ready[1], b"w")  # also when it has failed
                os._exit(code)
    for _ in children:
        assert os.read(ready[0], 1) == b"w"
    os.write(go[1], b"gg")
    assert [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in children] == [0, 0]


def test_a_killed_process_leaves_no_file(tmp_path):
    text = f"""
        import os, signal, torch
        from lowrank_kernels import offload_activations
        offload = offload_activations({str(tmp_path)!r}, least=1)
        with offload:
            loss = (torch.randn(512, 512, requires_grad=True) * 1).square().sum()
        assert offload.places_in_use
        os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text)])
    assert done.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_the_file_is_the_owners_alone(tmp_path):
    slots = Slots(tmp_path)
    assert os.fstat(slots._file).st_mode & 0o777 == 0o600
    assert os.fstat(slots._file).st_nlink == 0


@pytest.mark.parametrize("size", [1, BLOCK - 1, BLOCK, BOUNCE, BOUNCE + 1, 3 * BOUNCE + 5])
def test_slots_hold_bytes_of_any_number_and_are_used_again(size, tmp_path):
    slots, rng = Slots(tmp_path), torch.Generator().manual_seed(0)
    places = []
    for _ in range(3):
        memory = torch.randint(256, (2, size), generator=rng).to(torch.uint8)
        own = [slots.take(size) for _ in range(2)]
        for place, each in zip(own, memory, strict=True):
            slots.write(place, each)
        for place, each in zip(own, memory, strict=True):
            found = torch.zeros_like(each)
            slots.read(place, found)
            assert torch.equal(found, each)
            slots.give(place, size)
        places.append(sorted(own))
    assert places[0] == places[1] == places[2]
    assert slots.in_use == 0


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no file system without files")
def test_a_folder_where_no_file_can_be_made_is_named():
    with pytest.raises(OSError, match="no file for activations can be made here") as found:
        Slots("/proc")
    assert found.value.filename == "/proc"


def test_slots_whose_sizes_change_take_no_more_of_the_disk(tmp_path):
    slots = Slots(tmp_path)
    grown = []
    slots._grow, grow = lambda needed: (grown.append(needed), grow(needed)), slots._grow
    for step in range(50):
        size = (1 << 25) + BLOCK * step
        places = [slots.take(size) for _ in range(7)]
        assert all(two - one >= size for one, two in pairwise(sorted(places)))
        for place in places[step % 2 :: 2] + places[1 - step % 2 :: 2]:
            slots.give(place, size)
    assert len(grown) == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT])
def test_where_no_chunk_may_be_taken_slots_take_what_they_need(code, tmp_path, monkeypatch):
    allocate, sizes = os.posix_fallocate, []

    def limited(file, start, size):
        if start + size > 5 * BLOCK:
            raise OSError(code, os.strerror(code))
        sizes.append(size)
        allocate(file, start, size)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    slots = Slots(tmp_path)
    for room in (1, 3):
        slots.give(slots.take(room * BLOCK), room * BLOCK)
    taken = [slots.take(BLOCK) for _ in range(5)]
    assert sorted(taken) == [number * BLOCK for number in range(5)]
    assert sizes == [BLOCK, 2 * BLOCK, BLOCK, BLOCK]
    with pytest.raises(OSError, match=os.strerror(code)):
        slots.take(1)
    assert slots.in_use == 5


def test_parts_that_are_given_back_become_one():
    """Against a list of what is free."""
    extents, free, held = Extents(), [True] * 64, []
    extents.give(0, 64)
    rng = random.Random(0)
    for _ in range(500):
        if held and rng.random() < 0.5:
            place, size = held.pop(rng.randrange(len(held)))
            extents.give(place, size)
            free[place : place + size] = [True] * size
        else:
            size = rng.randrange(1, 9)
            wanted = [True] * size
            first = (p for p in range(65 - size) if free[p : p + size] == wanted)
            place = extents.take(size)
            assert place == next(first, None)
            if place is not None:
                held.append((place, size))
                free[place : place + size] = [False] * size
    for place, size in held:
        extents.give(place, size)
    assert extents._free == [(0, 64)]


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is no folder"):
        offload_activations(tmp_path / "none")
    for name in ("least", "in_flight", "ahead"):
        with pytest.raises(ValueError, match=f"{name} must be an int of at least 1 byte, got 0"):
            offload_activations(tmp_path, **{name: 0})
    for value in (True, 1.5, "1GiB"):
        with pytest.raises(ValueError, match=f"of at least 1 byte, got {value!r}"):
            offload_activations(tmp_path, least=value)
    for keep in (2, "0.5"):
        with pytest.raises(
            ValueError, match=f"keep must be between 0 and 1, or None, got {keep!r}"
        ):
            offload_activations(tmp_path, keep=keep)
    if os.path.ismount("/dev/shm"):
        with pytest.raises(ValueError, match="is a tmpfs, which is memory"):
            offload_activations("/dev/shm")
