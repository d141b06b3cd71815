"""LoRA adapters of PEFT: their factors are projected, at ranks below the adapter's own."""

import peft
import pytest
import torch
from integration.easy_tasks import (
    GAP,
    STEPS,
    STOP,
    assert_learned,
    projected_and_scaled,
    repeated_pairs,
    tiny_llama,
)
from integration.tiny_runs import assert_same_bits

from lowrank_kernels import FiraAdamW, param_groups

ADAPTER_RANK, RANK, LR = 8, 4, 0.05
TARGETS = {"q_proj": "self_attn", "v_proj": "self_attn", "up_proj": "mlp", "down_proj": "mlp"}
FACTORS = {
    f"base_model.model.model.layers.*.{part}.{target}.lora_{factor}.default.weight"
    for target, part in TARGETS.items()
    for factor in "AB"
}


def base():
    """Its frozen head is large enough to say anything."""
    torch.manual_seed(0)
    return tiny_llama(initializer_range=0.2)


def adapted(**options):
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=ADAPTER_RANK, lora_alpha=4 * ADAPTER_RANK, target_modules=[*TARGETS], **options
    )
    return peft.get_peft_model(base(), config)


def fira(model):
    return FiraAdamW(param_groups(model, rank=RANK, update_proj_gap=GAP), lr=LR)


def train(model, optimizer, steps):
    losses = []
    for step in steps:
        optimizer.zero_grad()
        loss = model(**repeated_pairs(step)).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("rank", [ADAPTER_RANK, 2 * ADAPTER_RANK])
def test_a_rank_that_the_adapter_already_has_is_refused(rank):
    """The frozen weights below are large enough for it, and are not trained."""
    assert param_groups(base(), rank=rank)
    with pytest.raises(ValueError, match=f"rank {rank} saves no memory"):
        param_groups(adapted(), rank=rank)


ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "trained head": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_learns_and_resumes(options, tmp_path):
    model = adapted(**options)
    optimizer = fira(model)
    assert projected_and_scaled(optimizer) == (FACTORS, set())
    losses = train(model, optimizer, range(STOP))
    model.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    losses += train(model, optimizer, range(STOP, STEPS))
    assert_learned(losses)
    for name, param in model.named_parameters():
        assert (param in optimizer.state) == param.requires_grad, name

    twin = peft.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    resumed = fira(twin)
    resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(twin, resumed, range(STOP, STEPS))
    assert_same_bits((twin, resumed), (model, optimizer))
