"""Lightning: training, its options, and a resume from its checkpoint."""

import lightning
import pytest
import torch
from integration.easy_tasks import (
    ENCODER_PROJECTED,
    GAP,
    LR,
    RANK,
    STEPS,
    STOP,
    EncoderClassifier,
    assert_learned,
    projected_and_scaled,
    stripes,
)
from integration.tiny_runs import assert_same_bits
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.optim.lr_scheduler import LinearLR

from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, param_groups

OPTIONS = {
    "accumulated": {"accumulate_grad_batches": 2},
    "clipped by norm": {"gradient_clip_val": 0.1},
    "clipped by value": {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed"},
}


class Module(lightning.LightningModule):
    def __init__(self, cls):
        super().__init__()
        self.model = EncoderClassifier()
        self.cls = cls
        self.losses = []

    def training_step(self, batch, _):
        loss = self.model(**batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        groups = param_groups(self.model, rank=RANK, update_proj_gap=GAP, weight_decay=0.01)
        optimizer = self.cls(groups, lr=LR)
        scheduler = LinearLR(optimizer, 0.5, total_iters=STOP // 3)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def fitted(folder, cls, seed=0, resume=False, **options):
    """A module after two epochs, from its beginning or from the checkpoint between them."""
    torch.manual_seed(seed)
    module = Module(cls)
    steps = STOP * options.get("accumulate_grad_batches", 1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=STEPS // STOP,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    batches = [stripes(seed) for seed in range(steps)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, ckpt_path=folder / "epoch=0.ckpt" if resume else None)
    assert trainer.global_step == STEPS
    return module, trainer.optimizers[0]


def assert_trains_and_resumes(folder, cls, **options):
    module, optimizer = fitted(folder, cls, **options)
    losses = module.losses[:: options.get("accumulate_grad_batches", 1)]
    assert_learned(losses)
    projected, scaled = projected_and_scaled(optimizer)
    assert projected == ENCODER_PROJECTED
    assert not scaled
    resumed = fitted(folder, cls, seed=1, resume=True, **options)
    assert len(resumed[0].losses) == len(module.losses) // 2
    assert_same_bits((module, optimizer), resumed)


@pytest.mark.parametrize("cls", [GaLoreAdamW, FiraAdamW, AdaRankGradAdamW])
def test_each_method_trains_and_resumes(cls, tmp_path):
    assert_trains_and_resumes(tmp_path, cls)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_trainer(options, tmp_path):
    assert_trains_and_resumes(tmp_path, FiraAdamW, **options)
