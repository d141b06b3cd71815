"""Tasks that tiny models learn in thirty steps, for the tests of clients.

A batch is made anew from its number, so that a resumed run needs no place in the data.
"""

import re

import torch
from torch import nn

RANK, GAP, STOP, STEPS, LR = 8, 7, 15, 30, 0.02
SCALE = 0.25  # the default of groups with a rank
TOKENS, CLASSES, PATCH = 16, 4, 4
SIDE = CLASSES * PATCH


def repeated_pairs(seed, rows=32):
    """Tokens that repeat the pair they start with: only attention can see what comes next."""
    pairs = torch.randint(0, TOKENS, (rows, 2), generator=torch.Generator().manual_seed(seed))
    tokens = pairs.repeat(1, 6)
    labels = tokens.clone()
    labels[:, :2] = -100
    return {"input_ids": tokens, "labels": labels}


def stripes(seed, rows=16):
    """Noise with a bright stripe, whose place is the class."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (rows,), generator=rng)
    images = 0.3 * torch.randn(rows, 1, SIDE, SIDE, generator=rng)
    for image, label in zip(images, labels, strict=True):
        image[0, :, PATCH * label : PATCH * (label + 1)] += 2
    return {"pixel_values": images, "labels": labels}


def examples(batch):
    """The rows of a batch, as a data set has them."""
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


class EncoderClassifier(nn.Module):
    """torch's own transformer, whose attention keeps q, k and v in one `in_proj_weight`."""

    def __init__(self):
        super().__init__()
        patches = SIDE * SIDE // PATCH**2
        self.embed = nn.Linear(PATCH**2, 32)
        self.positions = nn.Parameter(0.5 * torch.randn(patches, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, pixel_values, labels):
        patches = nn.functional.unfold(pixel_values, PATCH, stride=PATCH).transpose(1, 2)
        hidden = self.encoder(self.embed(patches) + self.positions)
        return nn.functional.cross_entropy(self.head(hidden.mean(1)), labels)


ENCODER_PROJECTED = {
    f"encoder.layers.*.{name}"
    for name in (
        "self_attn.in_proj_weight",
        "self_attn.out_proj.weight",
        "linear1.weight",
        "linear2.weight",
    )
}


def tiny_llama(**options):
    """Its one head of keys and values is so small that a rank of 8 saves nothing on it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=16,
        **options,
    )
    return LlamaForCausalLM(config)


LLAMA_PROJECTED = {
    f"model.layers.*.{name}_proj.weight"
    for name in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
}
LLAMA_SCALED = {f"model.layers.*.self_attn.{name}_proj.weight" for name in "kv"}


def projected_and_scaled(optimizer):
    """Names of the trained weights that are projected, and of those that AdamW moves as slowly.

    Numbers of blocks are read as *; everything else has to be trained at the full rate.
    """
    projected, scaled = set(), set()
    pairs = [(group, param) for group in optimizer.param_groups for param in group["params"]]
    for row, (group, param) in zip(optimizer.explain(), pairs, strict=True):
        if not param.requires_grad:
            continue
        name = re.sub(r"(?<=[._])\d+(?=\.)", "*", row["name"])
        if row["projected"]:
            projected.add(name)
        elif row["lr"] != group["lr"]:
            scaled.add(name)
        slow = row["projected"] or name in scaled
        assert row["lr"] == (group["lr"] * SCALE if slow else group["lr"]), name
    return projected, scaled


def assert_learned(losses):
    assert len(losses) == STEPS
    last = losses[-3:]
    assert sum(last) / len(last) < losses[0] / 3, losses
