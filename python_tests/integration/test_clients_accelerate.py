"""accelerate with DDP on two gloo processes, and a resume from what it saved."""

import os

import pytest
import torch
from accelerate import Accelerator
from integration.easy_tasks import (
    ENCODER_PROJECTED,
    GAP,
    LR,
    RANK,
    STEPS,
    STOP,
    EncoderClassifier,
    assert_learned,
    examples,
    projected_and_scaled,
    stripes,
)
from integration.tiny_runs import assert_same_result, process_group
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader

from lowrank_kernels import FiraAdamW, param_groups

RANKS, ROWS, ACCUMULATED = 2, 8, 2


def trained(folder, seed, resume=False):
    """A run of two epochs, from its beginning or from what was saved between them."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=ACCUMULATED)
    assert accelerator.num_processes == RANKS
    torch.manual_seed(seed)
    model = EncoderClassifier()
    groups = param_groups(model, rank=RANK, update_proj_gap=GAP, weight_decay=0.01)
    optimizer = FiraAdamW(groups, lr=LR)
    batch = stripes(0, RANKS * ROWS * ACCUMULATED * STOP)
    model, optimizer, scheduler, loader = accelerator.prepare(
        model,
        optimizer,
        LinearLR(optimizer, 0.5, total_iters=STEPS),
        DataLoader(examples(batch), ROWS),
    )
    assert len(loader) == ACCUMULATED * STOP
    if resume:
        accelerator.load_state(folder)
    losses, labels = [], []
    for epoch in range(1 if resume else 0, STEPS // STOP):
        if epoch == 1 and not resume:
            accelerator.save_state(folder)
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                    losses.append(accelerator.reduce(loss.detach(), "mean").item())
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            labels.append(batch["labels"])
    return {
        "weights": accelerator.unwrap_model(model).state_dict(),
        "states": [optimizer.state[param] for param in model.parameters()],
        "losses": losses,
        "labels": torch.stack(labels),
        "names": [sorted(names) for names in projected_and_scaled(optimizer.optimizer)],
    }


def worker(rank, world, folder):
    torch.set_num_threads(1)
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    with process_group(rank, world, folder / "store"):
        runs = {
            "whole": trained(folder / "state", seed=rank),
            "resumed": trained(folder / "state", seed=10 + rank, resume=True),
        }
        torch.save(runs, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (RANKS, folder), nprocs=RANKS)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


def result(run):
    return run["weights"], run["states"]


def test_the_ranks_learn_the_same_from_their_own_data(runs):
    first, second = (run["whole"] for run in runs)
    assert not torch.equal(first["labels"], second["labels"])
    assert first["losses"] == second["losses"]
    assert_learned(first["losses"])
    assert_same_result(result(first), result(second))


def test_what_is_projected_is_what_was_asked_before_preparing(runs):
    for run in runs:
        assert run["whole"]["names"] == [sorted(ENCODER_PROJECTED), []]


def test_a_loaded_state_resumes_bit_for_bit(runs):
    for run in runs:
        assert run["resumed"]["losses"] == run["whole"]["losses"][STOP:]
        assert_same_result(result(run["resumed"]), result(run["whole"]))
