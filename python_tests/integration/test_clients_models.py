"""Models that are no plain decoders: how each weight is trained, and that a run resumes."""

import functools
import io
import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from integration.easy_tasks import (
    CLASSES,
    ENCODER_PROJECTED,
    GAP,
    LR,
    PATCH,
    RANK,
    SCALE,
    SIDE,
    STEPS,
    STOP,
    TOKENS,
    EncoderClassifier,
    assert_learned,
    projected_and_scaled,
    repeated_pairs,
    stripes,
)
from integration.tiny_runs import assert_same_bits
from torch import nn
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lowrank_kernels import FiraAdamW, param_groups


def vit():
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=PATCH,
        num_channels=1,
        num_labels=CLASSES,
        initializer_range=0.15,  # 0.02 is for models twenty times as wide
    )
    return ViTForImageClassification(config)


def t5():
    config = T5Config(
        vocab_size=TOKENS,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        dropout_rate=0,
        decoder_start_token_id=0,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def mixtral():
    config = MixtralConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=16,
    )
    return MixtralForCausalLM(config)


class NamedBlocks(EncoderClassifier):
    """The same with blocks named as in torchvision."""

    def __init__(self):
        super().__init__()
        blocks = OrderedDict(
            (f"encoder_layer_{i}", block) for i, block in enumerate(self.encoder.layers)
        )
        self.encoder = nn.Sequential(blocks)


def naming(seed):
    """A token among a few others, and to be said of it the next one and itself."""
    rng = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, TOKENS - 1, (16, 1), generator=rng)
    noise = torch.randint(1, TOKENS, (16, 2), generator=rng)
    inputs = torch.cat([tokens, noise[:, :1], tokens, noise[:, 1:], tokens], dim=1)
    return {"input_ids": inputs, "labels": torch.cat([tokens + 1, tokens], dim=1)}


class Task(NamedTuple):
    """A model, the batch of a step, and the names of what is projected and of what is scaled."""

    model: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, torch.Tensor]]
    projected: set[str]
    scaled: set[str] = frozenset()


VIT_PROJECTED = {
    f"vit.layers.*.{name}.weight"
    for name in (
        *(f"attention.{x}_proj" for x in "qkvo"),
        "mlp.fc1",
        "mlp.fc2",
    )
}
T5_PROJECTED = {
    f"{half}.block.*.layer.*.{name}.weight"
    for half in ("encoder", "decoder")
    for name in (*(f"SelfAttention.{x}" for x in "qkvo"), "DenseReluDense.wi", "DenseReluDense.wo")
} | {f"decoder.block.*.layer.*.EncDecAttention.{x}.weight" for x in "qkvo"}

TASKS = {
    "vit": Task(vit, stripes, VIT_PROJECTED),
    "torch encoder": Task(EncoderClassifier, stripes, ENCODER_PROJECTED),
    "torchvision's names": Task(
        NamedBlocks,
        stripes,
        {name.replace("encoder.layers.", "encoder.encoder_layer_") for name in ENCODER_PROJECTED},
    ),
    "t5": Task(t5, naming, T5_PROJECTED),
    "mixtral": Task(
        mixtral,
        repeated_pairs,
        {f"model.layers.*.self_attn.{x}_proj.weight" for x in "qo"},
        {f"model.layers.*.self_attn.{x}_proj.weight" for x in "kv"}
        | {f"model.layers.*.mlp.experts.{x}_proj" for x in ("gate_up", "down")}
        | {"model.layers.*.mlp.gate.weight"},
    ),
}


def setup(task, seed=0):
    torch.manual_seed(seed)
    model = task.model().train()
    return model, FiraAdamW(param_groups(model, rank=RANK, update_proj_gap=GAP), lr=LR)


def train(task, model, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        output = model(**task.batch(step))
        loss = output if isinstance(output, torch.Tensor) else output.loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Run(NamedTuple):
    task: Task
    losses: list[float]
    start: dict[str, torch.Tensor]
    first: dict[str, torch.Tensor]
    checkpoint: io.BytesIO
    end: tuple[nn.Module, FiraAdamW]


def copied(model):
    return {name: param.detach().clone() for name, param in model.named_parameters()}


@functools.cache
def whole_run(name):
    """A run with its weights before and after the first step, and a checkpoint on its way."""
    task = TASKS[name]
    model, optimizer = setup(task)
    start = copied(model)
    losses = train(task, model, optimizer, range(1))
    first = copied(model)
    losses += train(task, model, optimizer, range(1, STOP))
    checkpoint = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, checkpoint)
    losses += train(task, model, optimizer, range(STOP, STEPS))
    return Run(task, losses, start, first, checkpoint, (model, optimizer))


@pytest.fixture(params=TASKS)
def run(request):
    # Of function scope, though it is made once: it must not be made before `few_threads`.
    return whole_run(request.param)


def test_what_is_projected_and_what_only_moves_as_slowly(run):
    projected, scaled = projected_and_scaled(run.end[1])
    assert projected == run.task.projected
    assert scaled == run.task.scaled


def test_what_is_left_out_is_said(run, caplog):
    with caplog.at_level(logging.WARNING, logger="lowrank_kernels"):
        setup(run.task)
    said = "\n".join(record.getMessage() for record in caplog.records)
    assert bool(run.task.scaled) == bool(said)
    for name in run.task.scaled:
        assert name in said


def test_it_learns(run):
    assert_learned(run.losses)


def test_every_matrix_takes_part(run):
    for name, param in run.end[0].named_parameters():
        assert param.dim() < 2 or not torch.equal(param, run.start[name]), name


def test_adamw_moves_hidden_matrices_by_less():
    """At first an entry whose gradient is far above eps moves by the whole rate."""
    run = whole_run("mixtral")
    rates = {}
    for name, param in run.end[0].named_parameters():
        if param.dim() > 1:
            rates[name] = (run.first[name] - run.start[name]).abs().max().item() / LR
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert 0.9 < rates[name] < 1.1, name
    for name in run.task.scaled:
        for layer in "01":
            assert 0.9 * SCALE < rates[name.replace("*", layer)] < 1.1 * SCALE, name


def test_a_resumed_run_is_the_whole_run(run):
    assert STOP % GAP
    run.checkpoint.seek(0)
    saved = torch.load(run.checkpoint, weights_only=True)
    model, optimizer = setup(run.task, seed=1)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    train(run.task, model, optimizer, range(STOP, STEPS))
    assert_same_bits((model, optimizer), run.end)
