"""R in the place of gradients of any layer, averaged over two gloo processes."""

import faulthandler
import operator
import os
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from integration.product_model import (
    ADAPTIVE,
    GALORE,
    OUT,
    PARTS,
    SHAPES,
    STEPS,
    WIDTH,
    build,
    loss_of,
    matrices,
)
from integration.tiny_runs import process_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_kernels import ProjectedGradients, Subspace
from lowrank_kernels.ops.contract import Side

WATCHDOG_SECONDS = 600
PLAIN_ELEMENTS = WIDTH * OUT + OUT
DDP_RUNS = {
    "each step": (GALORE, 1),
    "all at once": ({**GALORE, "subspace": "svd"}, 1),
    "accumulated": (GALORE, PARTS),
    "adaptive": (ADAPTIVE, PARTS),
    "from the last basis": ({**GALORE, "subspace": Subspace("power")}, 1),
}


class Sent:
    """Counts what goes over the wire: of the wrapper's buckets and of collectives beside it."""

    def __init__(self):
        self.bytes = 0

    def bucket(self, _, bucket):
        self.bytes += bucket.buffer().nbytes
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0] / dist.get_world_size())

    def counting(self):
        all_reduce = dist.all_reduce

        def counted(tensor, *arguments, async_op=False, **options):
            if not async_op:
                self.bytes += tensor.nbytes
            return all_reduce(tensor, *arguments, async_op=async_op, **options)

        return mock.patch.object(dist, "all_reduce", counted)


def ddp_run(rank, options, parts, projects):
    """Weights, bytes sent in each step, and the formula's: R or G of matrices, all of the rest."""
    # A rank's own weights are those of the first one once they are wrapped.
    model, optimizer = build(seed=rank, **options)
    handle = ProjectedGradients(optimizer, model) if projects else None
    wrapped, sent = DistributedDataParallel(model), Sent()
    wrapped.register_comm_hook(None, sent.bucket)
    counts, formula, norms = [], [], []
    for step in range(STEPS):
        sent.bytes = 0
        wanted = {name: optimizer.wants(weight) for name, weight in matrices(model).items()}
        with sent.counting():
            for part in range(parts):
                with wrapped.no_sync() if part < parts - 1 else nullcontext():
                    loss_of(wrapped, step, part, rank).backward()
        counts.append(sent.bytes)
        elements = [
            model.get_parameter(name if name == "square" else f"block.{name}").numel()
            if wants is None or not projects
            else (SHAPES[name][0] if wants.side is Side.RIGHT else SHAPES[name][1]) * wants.rank
            for name, wants in wanted.items()
        ]
        formula.append(8 * (PLAIN_ELEMENTS + sum(elements)))
        norms.append(float(nn.utils.clip_grad_norm_(wrapped.parameters(), 1e9)))
        optimizer.step()
        optimizer.zero_grad()
    refusal = ""
    try:
        if handle is not None:
            handle.remove()
    except RuntimeError as error:
        # It goes on as before.
        loss_of(wrapped, STEPS, 0, rank).backward()
        kinds = {type(w.grad).__name__ for w in matrices(model).values() if optimizer.wants(w)}
        refusal = f"{handle}: {error}, {kinds}"
    states = [{k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
              for state in optimizer.state.values()]  # fmt: skip
    return {"weights": model.state_dict(), "sent": counts, "formula": formula,
            "norms": norms, "refusal": refusal, "states": states}  # fmt: skip


def accelerate_run(rank, projects):
    """Weights after accumulated steps, whose passes accelerate tells the wrapper to synchronize."""
    os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
    os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), "2")
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=PARTS)
    model, optimizer = build(seed=rank, **GALORE)
    if projects:
        ProjectedGradients(optimizer, model)
    wrapped, prepared = accelerator.prepare(model, optimizer)
    held = []
    for step in range(STEPS):
        for part in range(PARTS):
            with accelerator.accumulate(wrapped):
                accelerator.backward(loss_of(wrapped, step, part, rank))
                held += [type(weight.grad).__name__ for weight in matrices(model).values()]
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(wrapped.parameters(), 1e9)
                prepared.step()
                prepared.zero_grad()
    return {"weights": model.state_dict(), "held": held}


def ddp_mistakes():
    """What is said to those who forget the model, or come too late."""
    texts = []
    model, optimizer = build(**GALORE)
    ProjectedGradients(optimizer)
    wrapped = DistributedDataParallel(model)
    try:
        for step in range(2):
            loss_of(wrapped, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    except RuntimeError as error:
        texts.append(str(error))
    model, optimizer = build(**GALORE)
    try:
        ProjectedGradients(optimizer, DistributedDataParallel(model))
    except ValueError as error:
        texts.append(str(error))
    return texts


def worker(rank, world, folder):
    faulthandler.dump_traceback_later(WATCHDOG_SECONDS, exit=True)
    torch.set_num_threads(1)
    with process_group(rank, world, folder / "store"):
        result = {}
        for name, run in DDP_RUNS.items():
            result[name] = [ddp_run(rank, *run, projects) for projects in (True, False)]
        result["accelerate"] = [accelerate_run(rank, projects) for projects in (True, False)]
        dist.barrier()
        result["mistakes"] = ddp_mistakes()
        torch.save(result, folder / f"{rank}.pt")
        dist.barrier()
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.start_processes(worker, (2, folder), nprocs=2, start_method="fork")
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", DDP_RUNS)
def test_weights_are_those_of_plain_ddp(two_ranks, name):
    own, whole = two_ranks[0][name]
    for key, value in own["weights"].items():
        expected = whole["weights"][key]
        assert (value - expected).norm() <= 1e-12 * expected.norm(), key
        assert torch.equal(value, two_ranks[1][name][0]["weights"][key]), key
    for state, other in zip(own["states"], two_ranks[1][name][0]["states"], strict=True):
        assert state.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in state.items())
    assert own["norms"] == two_ranks[1][name][0]["norms"]
    # Whole gradients in the first step; then that of R is less.
    shares = list(map(operator.truediv, own["norms"], whole["norms"]))
    assert shares[0] == pytest.approx(1, rel=1e-12)
    assert max(shares) <= 1 + 1e-12
    assert min(shares) < 0.999


@pytest.mark.parametrize("name", DDP_RUNS)
def test_what_is_sent_is_r_and_what_is_due(two_ranks, name):
    for result in two_ranks:
        own, whole = result[name]
        assert own["sent"] == own["formula"]
        assert whole["sent"] == whole["formula"]
        assert own["sent"][0] == whole["sent"][0]
        assert min(own["sent"]) < 0.6 * whole["sent"][0]


def test_accelerate_accumulates_and_averages_it(two_ranks):
    (own, whole), (other, _) = (result["accelerate"] for result in two_ranks)
    assert set(own["held"]) == {"Tensor", "ProjectedGradient"}
    assert set(whole["held"]) == {"Tensor"}
    for key, value in own["weights"].items():
        assert (value - whole["weights"][key]).norm() <= 1e-12 * value.norm(), key
        assert torch.equal(value, other["weights"][key]), key


def test_under_a_wrapper_it_stays(two_ranks):
    for result in two_ranks:
        refusal = result["each step"][0]["refusal"]
        assert "as they come: DistributedDataParallel" in refusal
        assert "wrap the model anew" in refusal
        assert refusal.endswith("{'ProjectedGradient'}")


def test_forgotten_or_late_models_are_told(two_ranks):
    for result in two_ranks:
        forgotten, late = result["mistakes"]
        assert "wrap the very module that was given there, as model=, and after" in forgotten
        assert late == "call ProjectedGradients before DistributedDataParallel wraps the model"
