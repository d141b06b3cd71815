"""Projected layers under DistributedDataParallel, on two gloo processes."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from integration.tiny_runs import GAP, STEPS, process_group, tiny_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lowrank_kernels import GaLoreAdamW
from lowrank_kernels.activations import project_linears

PARTS = 2
STARTS = ("dense", "random")


def setup(seed, start):
    """A model whose weights are projected; a rank's own weights are not those of rank 0."""
    model = tiny_model(torch.float64, seed)
    named = dict(model.named_parameters())
    own = [(name, named.pop(name)) for name in ("0.weight", "3.weight")]
    projected = {"params": own, "rank": 3, "update_proj_gap": GAP}
    optimizer = GaLoreAdamW([projected, {"params": list(named.items())}], lr=0.01)
    return model, optimizer, project_linears(model, optimizer, start=start)


def loss_of(model, step, rank, part):
    rng = torch.Generator().manual_seed(100 * step + 10 * rank + part)
    return model(torch.randn(4, 12, generator=rng, dtype=torch.float64)).square().mean() / PARTS


def finish(model, optimizer):
    """A step whose clipping does something."""
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def run(rank, start):
    """Accumulates under no_sync; returns weights, norms and what was sent of projected ones."""
    model, optimizer, report = setup(rank, start)
    wrapped = DistributedDataParallel(model)
    sent, norms = [], []
    all_reduce = dist.all_reduce

    def counted(tensor, *arguments, **options):
        sent[-1] += tensor.numel()
        return all_reduce(tensor, *arguments, **options)

    for step in range(STEPS):
        sent.append(0)
        with mock.patch.object(dist, "all_reduce", counted):
            for part in range(PARTS - 1):
                with wrapped.no_sync():
                    loss_of(wrapped, step, rank, part).backward()
            loss_of(wrapped, step, rank, PARTS - 1).backward()
        norms.append(finish(wrapped, optimizer))
    refusal = ""
    try:
        report.undo()
    except RuntimeError as error:
        refusal = str(error)
    return model.state_dict(), norms, sent, refusal


def run_after_a_pass(rank, reentrant):
    """Weights after steps of a wrapped model that every rank has run by itself before, under
    gradient checkpointing.
    """
    model, optimizer, _ = setup(rank, "activations")
    loss_of(model, 0, rank, 0)

    def forward(x):
        for part in (model[:2], model[2:]):
            x = checkpoint(part, x.requires_grad_(), use_reentrant=reentrant)
        return x

    model.forward = forward
    wrapped = DistributedDataParallel(model)
    for step in range(3):
        loss_of(wrapped, step, rank, 0).backward()
        finish(wrapped, optimizer)
    return model.state_dict()


def worker(rank, world, folder):
    torch.set_num_threads(1)
    with process_group(rank, world, folder / "store"):
        result = {start: run(rank, start) for start in STARTS}
        for reentrant in (False, True):
            result[reentrant] = run_after_a_pass(rank, reentrant)
        torch.save(result, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (2, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("start", STARTS)
def test_ranks_agree_with_each_other_and_with_one_process_on_all_data(two_ranks, start):
    (first, norms, _, _), (second, other_norms, _, _) = (result[start] for result in two_ranks)
    assert norms == other_norms
    model, optimizer, _ = setup(0, start)
    for step in range(STEPS):
        for rank in range(2):
            for part in range(PARTS):
                (loss_of(model, step, rank, part) / 2).backward()
        assert finish(model, optimizer) == pytest.approx(norms[step], rel=1e-10)
    for name, value in model.state_dict().items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reentrant", [False, True])
def test_ranks_agree_under_checkpointing_and_after_a_pass_of_their_own(two_ranks, reentrant):
    first, second = (result[reentrant] for result in two_ranks)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_what_is_sent_is_r(two_ranks):
    r, g = 20 * 3 + 3 * 20, 20 * 12 + 8 * 20
    _, _, sent, _ = two_ranks[0]["dense"]
    # Refreshes take turns: a matrix of the two sends its gradient.
    assert sent[0] == g
    assert {sent[step] for step in range(1, STEPS)} <= {r, r - 60 + 240, r - 60 + 160, g}
    assert sent.count(r) >= STEPS // GAP


def test_undone_it_would_leave_the_wrapper_without_gradients(two_ranks):
    for result in two_ranks:
        assert "wrap the model" in result["dense"][3]


def test_a_wrapped_model_is_refused(tmp_path):
    with process_group(0, 1, tmp_path / "store"):
        model = DistributedDataParallel(tiny_model())
        optimizer = GaLoreAdamW([{"params": [model.module[0].weight], "rank": 3}])
        with pytest.raises(ValueError, match="before DistributedDataParallel wraps"):
            project_linears(model, optimizer)
