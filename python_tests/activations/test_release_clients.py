"""Released gradients under the trainers that people use: the bits of a run without, and what each
has to be told.
"""

import os
from unittest import mock

import lightning
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from integration.easy_tasks import (
    GAP,
    LR,
    RANK,
    EncoderClassifier,
    examples,
    repeated_pairs,
    stripes,
    tiny_llama,
)
from integration.tiny_runs import assert_same_bits
from torch.optim.lr_scheduler import LinearLR
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from lowrank_kernels import FiraAdamW, param_groups, release_gradients

STEPS, ROWS = 6, 8


@pytest.fixture(autouse=True)
def own_accelerate():
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def optimizer_of(model):
    groups = param_groups(model, rank=RANK, update_proj_gap=GAP, weight_decay=0.01)
    return FiraAdamW(groups, lr=LR)


def trainer_run(folder, releases, resume=False, **options):
    torch.manual_seed(int(resume))
    model = tiny_llama()
    optimizer = optimizer_of(model)
    if releases:
        release_gradients(model, optimizer)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=LR,
        warmup_steps=3,
        save_steps=STEPS // 2,
        logging_steps=1,
        seed=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"per_device_train_batch_size": ROWS, "max_grad_norm": 0.0} | options,
    )
    data = examples(repeated_pairs(0, ROWS * STEPS))
    trainer = Trainer(model=model, args=arguments, train_dataset=data, optimizers=(optimizer, None))
    checkpoint = str(folder / f"checkpoint-{STEPS // 2}") if resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    return model, optimizer


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}],
    ids=["plain", "bf16", "checkpointing"],
)
def test_a_trainer_run_ends_in_the_same_bits(options, tmp_path):
    expected = trainer_run(tmp_path / "whole", False, **options)
    run = trainer_run(tmp_path / "released", True, **options)
    assert_same_bits(run, expected)
    assert_same_bits(trainer_run(tmp_path / "released", True, resume=True, **options), expected)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_grad_norm": 1.0}, "before the norm of all gradients .* max_grad_norm=0"),
        ({"gradient_accumulation_steps": 2}, "cannot be accumulated"),
    ],
    ids=["clipping", "accumulation"],
)
def test_a_trainer_is_told_what_it_cannot_do(options, text, tmp_path):
    with pytest.raises(RuntimeError, match=text):
        trainer_run(tmp_path, True, **options)


def test_accelerate_takes_a_step_as_before():
    runs = []
    for releases in (False, True):
        accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = EncoderClassifier()
        optimizer = optimizer_of(model)
        if releases:
            release_gradients(model, optimizer)
        prepared = accelerator.prepare(
            model,
            optimizer,
            LinearLR(optimizer, 0.5, total_iters=STEPS),
            DataLoader(examples(stripes(0, ROWS * STEPS)), ROWS),
        )
        wrapped, wrapper, scheduler, loader = prepared
        with pytest.raises(TypeError, match="not AcceleratedOptimizer: pass it before"):
            release_gradients(model, wrapper)
        for batch in loader:
            accelerator.backward(wrapped(**batch))
            wrapper.step()
            scheduler.step()
            wrapper.zero_grad()
        runs.append((model, optimizer))
    assert_same_bits(*runs)


class Module(lightning.LightningModule):
    """Released by what Lightning calls once its optimizers are there."""

    def __init__(self, releases):
        super().__init__()
        self.model, self.releases = EncoderClassifier(), releases

    def training_step(self, batch, _):
        return self.model(**batch)

    def configure_optimizers(self):
        optimizer = optimizer_of(self.model)
        if self.releases:
            release_gradients(self.model, optimizer)
        scheduler = LinearLR(optimizer, 0.5, total_iters=STEPS)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def lightning_run(folder, releases, **options):
    torch.manual_seed(0)
    module = Module(releases)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    batches = [stripes(seed) for seed in range(STEPS)]
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module, trainer.optimizers[0]


def test_a_lightning_run_ends_in_the_same_bits(tmp_path):
    assert_same_bits(lightning_run(tmp_path, True), lightning_run(tmp_path, False))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"gradient_clip_val": 1.0}, "clip="),
        ({"gradient_clip_val": 1.0, "gradient_clip_algorithm": "value"}, "clip="),
        ({"accumulate_grad_batches": 2}, "cannot be accumulated"),
    ],
    ids=["norm", "value", "accumulation"],
)
def test_lightning_is_told_what_it_cannot_do(options, text, tmp_path):
    with pytest.raises(RuntimeError, match=text):
        lightning_run(tmp_path, True, **options)
