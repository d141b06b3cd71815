"""The recipes for many GPUs on gloo processes: what two ranks save, three go on with."""

import functools
import os

import lightning
import pytest
import torch
import transformers
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from integration.easy_tasks import (
    LLAMA_PROJECTED,
    LLAMA_SCALED,
    STEPS,
    STOP,
    assert_learned,
    examples,
    projected_and_scaled,
    repeated_pairs,
    tiny_llama,
)
from integration.ranks import on_ranks, whole
from integration.recipes import cook
from integration.tiny_runs import assert_same_result
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from lowrank_kernels import FiraAdamW, param_groups

ROWS = 16
OURS = {"FiraAdamW": FiraAdamW, "param_groups": param_groups}
PRELOADED = ("transformers.models.llama.modeling_llama", "accelerate", "lightning")
# First on two ranks, then on three.
WORLDS = (2, 3)


def snapshot(model, optimizer):
    """Whole weights and states, on every rank."""
    weights = {name.removeprefix("model."): whole(p) for name, p in model.named_parameters()}
    states = [
        {key: whole(x) if torch.is_tensor(x) else x for key, x in optimizer.state[param].items()}
        for param in model.parameters()
    ]
    return weights, states


def told(model, optimizer, losses, **more):
    """What is sent to the tests."""
    return {
        "losses": losses,
        "sharded": {isinstance(param, DTensor) for param in model.parameters()},
        "names": projected_and_scaled(getattr(optimizer, "optimizer", optimizer)),
        "end": snapshot(model, optimizer),
        **more,
    }


def model_and_losses(world):
    """Of another start on another number of ranks."""
    torch.manual_seed(world)
    model, losses = tiny_llama(), []
    model.register_forward_hook(lambda _, __, output: losses.append(output.loss.item()))
    return model, losses


def batches_of(rank, count):
    return [repeated_pairs(10 * seed + rank, ROWS) for seed in range(count)]


def take_for_gpus(rank, world):
    """accelerate shards over GPUs only: it takes these processes for some."""
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def plainly(rank, world):
    """DDP and FSDP2 without a framework."""
    results = {}
    for title in ("DDP", "FSDP2"):
        model, losses = model_and_losses(world)
        names = {"DistributedDataParallel": DistributedDataParallel, "fully_shard": fully_shard}
        loader = batches_of(rank, STEPS)
        names = cook(title, model=model, loader=loader, torch=torch, **OURS, **names)
        results[title] = told(model, names["optimizer"], losses)
    return results


def accelerated(rank, world, folder):
    """What two ranks train and save three load, and then load again and train."""

    def run(count, resuming):
        take_for_gpus(rank, world)
        model, losses = model_and_losses(world)
        names = cook(
            "accelerate",
            model=model,
            loader=DataLoader(examples(repeated_pairs(0, world * ROWS * count)), ROWS),
            folder=folder / "accelerate",
            resuming=resuming,
            Accelerator=Accelerator,
            FullyShardedDataParallelPlugin=FullyShardedDataParallelPlugin,
            **OURS,
        )
        return told(names["model"], names["optimizer"], losses)

    if world == WORLDS[0]:
        return run(STOP, False)
    begun = run(0, True)["end"]
    return run(STEPS - STOP, True) | {"begun": begun}


def with_trainer(rank, world, folder):
    """The HF Trainer; three ranks go on where two were in the middle."""
    snapshots = {}

    class Snapshots(transformers.TrainerCallback):
        def on_train_begin(self, args, state, control, model, optimizer, **_):
            if state.global_step:
                snapshots["begun"] = snapshot(model, optimizer)

        def on_save(self, args, state, control, model, optimizer, **_):
            if state.global_step == STOP:
                snapshots["saved"] = snapshot(model, optimizer)

    take_for_gpus(rank, world)
    model, losses = model_and_losses(world)
    options = {
        "use_cpu": True,
        # Made by `take_for_gpus`.
        "accelerator_config": {"use_configured_state": True},
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS,
        "learning_rate": 0.01,
        # At a rate of 0 nobody can tell which are scaled.
        "lr_scheduler_type": "constant",
        "save_steps": STOP,
        "report_to": [],
        "disable_tqdm": True,
    }
    path = folder / "trainer"
    names = cook(
        "HF Trainer",
        model=model,
        folder=str(path),
        resuming=world > WORLDS[0] and str(path / f"checkpoint-{STOP}"),
        options=options,
        dataset=examples(repeated_pairs(0, WORLDS[-1] * ROWS * STEPS)),
        TrainingArguments=transformers.TrainingArguments,
        Trainer=functools.partial(transformers.Trainer, callbacks=[Snapshots()]),
        **OURS,
    )
    trainer = names["trainer"]
    return told(trainer.model, trainer.optimizer, losses, **snapshots)


def with_lightning(rank, world, folder):
    """Lightning; three ranks go on with what two had at the end of their only epoch."""
    snapshots = {}

    class Snapshots(lightning.Callback):
        def on_train_start(self, trainer, module):
            if trainer.global_step:
                snapshots["begun"] = snapshot(module.model, trainer.optimizers[0])

    os.environ["LOCAL_RANK"] = str(rank)
    model, losses = model_and_losses(world)
    options = {
        "accelerator": "cpu",
        "devices": world,
        "plugins": [LightningEnvironment()],
        "max_epochs": WORLDS.index(world) + 1,
        "default_root_dir": folder,
        "callbacks": [Snapshots(), ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        "logger": False,
        "use_distributed_sampler": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    names = cook(
        "Lightning",
        model=model,
        folder=folder / "epoch=0.ckpt",
        resuming=world > WORLDS[0],
        world=world,
        options=options,
        loader=DataLoader(batches_of(rank, STOP), batch_size=None),
        fully_shard=fully_shard,
        LightningModule=lightning.LightningModule,
        ModelParallelStrategy=ModelParallelStrategy,
        Trainer=lightning.Trainer,
        **OURS,
    )
    return told(model, names["trainer"].optimizers[0], losses, **snapshots)


RESUMED = ("accelerated", "with_trainer", "with_lightning")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of the functions on two and on three ranks."""
    folder, found = tmp_path_factory.mktemp("recipes"), []
    functions = [functools.partial(globals()[name], folder=folder) for name in RESUMED]
    for world in WORLDS:
        own = functions if found else [plainly, *functions]
        stores = tmp_path_factory.mktemp("ranks")
        found.append(on_ranks(world, own, stores, PRELOADED))
    return found


@pytest.mark.parametrize("title", ["DDP", "FSDP2"])
def test_without_a_framework(title, results):
    first, second = (found[title] for found in results[0]["plainly"])
    assert first["sharded"] == {title == "FSDP2"}
    assert first["names"] == (LLAMA_PROJECTED, LLAMA_SCALED)
    assert_learned(first["losses"])
    assert first["losses"] != second["losses"]
    assert_same_result(first["end"], second["end"])


@pytest.mark.parametrize("name", RESUMED)
def test_what_two_ranks_save_three_go_on_with(name, results):
    (two, *_), (three, *_) = results[0][name], results[1][name]
    for found in (two, three):
        assert found["sharded"] == {True}
        assert found["names"] == (LLAMA_PROJECTED, LLAMA_SCALED)
    assert_same_result(three["begun"], two.get("saved", two["end"]))
    # As in one run, which three ranks went on with.
    losses = two["losses"][:STOP] + three["losses"]
    assert_learned(losses)
    assert max(three["losses"][:3]) < losses[0] / 1.5


@pytest.mark.parametrize("name", RESUMED)
def test_all_ranks_end_with_the_same(name, results):
    for found in results:
        first, *others = found[name]
        for other in others:
            assert_same_result(other["end"], first["end"])
