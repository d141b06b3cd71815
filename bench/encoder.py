"""A small encoder of bytes: trained to guess hidden bytes, then to tell labels, with LoRA on its
linear layers or without.

It is ModernBERT's, which is better than the bytes' frequencies after a hundred steps of a thousand
bytes. BERT, whose positions are learned and whose norms come behind, is not after four hundred.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bench.arms import TimeUp, check
from bench.labels import BEGIN, PADDING, VOCABULARY, Masked
from bench.train import schedule

if TYPE_CHECKING:
    from transformers import (
        ModernBertConfig,
        ModernBertForMaskedLM,
        ModernBertForSequenceClassification,
    )

# Of pre-training.
MASKED_LR = 2e-3
CHECKPOINT_EVERY = 100
LORA_RANK, LORA_ALPHA = 8, 16


def config(hidden: int, layers: int, heads: int, length: int, labels: int) -> ModernBertConfig:
    """Without dropout, as is usual, so that what is drawn are samples alone."""
    from transformers import ModernBertConfig

    return ModernBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        # A gate beside each.
        intermediate_size=2 * hidden,
        max_position_embeddings=length,
        global_attn_every_n_layers=1,
        # 0.02 is for models that are ten times as wide.
        initializer_range=0.05,
        pad_token_id=PADDING,
        bos_token_id=BEGIN,
        cls_token_id=BEGIN,
        eos_token_id=None,
        sep_token_id=None,
        num_labels=labels,
        classifier_pooling="mean",
        attn_implementation="sdpa",
    )


class LoRA(nn.Module):
    """y = W x + b + (alpha / r) B A x, of which A and B are trained (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, LORA_RANK, bias=False)
        self.up = nn.Linear(LORA_RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x)) * (LORA_ALPHA / LORA_RANK)


def adapt(model: ModernBertForSequenceClassification) -> None:
    """Puts LoRA on every linear layer of the blocks; beside it the head alone is trained."""
    encoder = model.model.requires_grad_(False)
    linears = {name: each for name, each in encoder.named_modules() if isinstance(each, nn.Linear)}
    for name, linear in linears.items():
        parent, _, own = name.rpartition(".")
        setattr(encoder.get_submodule(parent), own, LoRA(linear))


def classifier(
    config: ModernBertConfig, pretrained: dict[str, Tensor]
) -> ModernBertForSequenceClassification:
    """The pre-trained encoder below a head that torch's generator draws."""
    from transformers import ModernBertForSequenceClassification

    model = ModernBertForSequenceClassification(config)
    model.model.load_state_dict(pretrained)
    return model


def pretrained(
    config: ModernBertConfig, text: Masked, steps: int, batch: int, folder: Path, until: float
) -> dict[str, Tensor]:
    """The encoder's weights after so many steps of guessing hidden bytes, kept in the folder.

    Raises:
        TimeUp: the deadline came before; the next call goes on.
    """
    from transformers import ModernBertForMaskedLM

    path, checkpoint = folder / "encoder.pt", folder / "checkpoint.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    torch.manual_seed(0)
    model = ModernBertForMaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=MASKED_LR, fused=True)
    losses: list[float] = []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        losses = state["losses"]

    def save() -> None:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        _save(parts | {"losses": losses}, checkpoint)

    while len(losses) < steps:
        try:
            check(until)
        except TimeUp:
            save()
            raise
        losses.append(_masked_step(model, optimizer, text.batch(len(losses), batch), steps, losses))
        if len(losses) % CHECKPOINT_EVERY == 0:
            save()
            mean = sum(losses[-CHECKPOINT_EVERY:]) / CHECKPOINT_EVERY
            print(f"hidden bytes, {len(losses)} of {steps} steps: {mean:.4f}", flush=True)
    _save(model.model.state_dict(), path)
    checkpoint.unlink(missing_ok=True)
    return model.model.state_dict()


def _masked_step(
    model: ModernBertForMaskedLM,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    steps: int,
    losses: list[float],
) -> float:
    optimizer.param_groups[0]["lr"] = MASKED_LR * schedule(len(losses), steps, steps // 10)
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def _save(value: dict, path: Path) -> None:
    """A file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(value, partial)
    os.replace(partial, path)
