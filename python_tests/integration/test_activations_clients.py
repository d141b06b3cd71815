"""What is saved for backward in fewer bytes, beside the HF Trainer, PEFT and torch.compile.

Of released gradients, test_release_clients shows it.
"""

import os
from unittest import mock

import peft
import pytest
import torch
from accelerate.state import AcceleratorState
from integration.easy_tasks import (
    GAP,
    LLAMA_PROJECTED,
    LR,
    RANK,
    examples,
    repeated_pairs,
    tiny_llama,
)
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from lowrank_kernels import (
    GaLoreAdamW,
    offload_activations,
    param_groups,
    project_linears,
    recompute_activations,
    release_gradients,
    sample_linears,
)
from lowrank_kernels.optim.param_groups import collapsed
from lowrank_kernels.optim.projected_gradient import is_projected_gradient

STEPS, ROWS = 4, 8
WAYS = {
    "plain": lambda model, optimizer, folder: None,
    "offload": lambda model, optimizer, folder: _offloaded(model, folder),
    "recompute": lambda model, optimizer, folder: recompute_activations(model),
    "release": lambda model, optimizer, folder: release_gradients(model, optimizer),
    "all sampled": lambda model, optimizer, folder: sample_linears(model, 1.0),
    "sample": lambda model, optimizer, folder: sample_linears(model, 0.3),
    "project": lambda model, optimizer, folder: project_linears(model, optimizer),
}


def _offloaded(model, folder):
    folder.mkdir()
    offload = offload_activations(folder, least=1)
    offload.install(model)
    return offload


@pytest.fixture(autouse=True)
def own_accelerate():
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


class Seen(TrainerCallback):
    """Names of the weights whose gradient was projected when a step was taken."""

    def __init__(self):
        self.projected = set()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.projected |= {
            collapsed(name)
            for name, param in model.named_parameters()
            if is_projected_gradient(param.grad)
        }


def llama(**options):
    """Norms compute in float32: of other precisions their gradients are summed in another order."""
    return tiny_llama(**options).bfloat16()


def weights_of(model):
    return [param.detach().clone() for param in model.parameters()]


def trained(way, folder, **options):
    """Weights, losses, what the call returned, and whose gradients were projected."""
    torch.manual_seed(0)
    model, seen = llama(), Seen()
    optimizer = GaLoreAdamW(param_groups(model, rank=RANK, update_proj_gap=GAP), lr=LR)
    told = WAYS[way](model, optimizer, folder / "disk")
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        save_strategy="no",
        logging_steps=1,
        lr_scheduler_type="constant",
        seed=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=ROWS,
        **options,
    )
    data = examples(repeated_pairs(0, ROWS * STEPS))
    trainer = Trainer(
        model, arguments, train_dataset=data, optimizers=(optimizer, None), callbacks=[seen]
    )
    trainer.train()
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return weights_of(model), losses, told, seen.projected


OPTIONS = {
    "plain": {},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulated": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_a_trainer_run(option, tmp_path):
    runs = {}
    for way in ("plain", "offload", "recompute", "all sampled", "sample", "project"):
        (tmp_path / way).mkdir()
        runs[way] = trained(way, tmp_path / way, **OPTIONS[option])
    weights, losses, _, _ = runs["plain"]
    for way in ("offload", "recompute", "all sampled"):
        assert all(map(torch.equal, runs[way][0], weights)), way
        assert runs[way][1] == losses
    offload = runs["offload"][2]
    assert offload.counts.packed > 0
    assert offload.places_in_use == 0
    # The first loss is that of the same weights; what comes after is of other gradients.
    assert runs["sample"][1][0] == losses[0]
    assert not all(map(torch.equal, runs["sample"][0], weights))
    assert runs["project"][1][0] == losses[0]
    assert runs["project"][3] == LLAMA_PROJECTED
    assert not runs["plain"][3]


def adapted():
    torch.manual_seed(0)
    model = llama(initializer_range=0.2)
    targets = ["q_proj", "up_proj", "down_proj"]
    return peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=targets))


def adapter_run(way, folder):
    """Weights after some steps of LoRA, and what the call returned."""
    model = adapted()
    optimizer = GaLoreAdamW(param_groups(model, rank=4, update_proj_gap=GAP), lr=LR)
    told = WAYS[way](model, optimizer, folder / way)
    projected = set()
    for step in range(STEPS):
        torch.manual_seed(step)
        model(**repeated_pairs(step)).loss.backward()
        projected |= {
            name for name, param in model.named_parameters() if is_projected_gradient(param.grad)
        }
        optimizer.step()
        optimizer.zero_grad()
    return weights_of(model), told, projected


def test_adapters_of_peft(tmp_path):
    weights, _, _ = adapter_run("plain", tmp_path)
    for way in ("offload", "recompute", "release", "all sampled"):
        assert all(map(torch.equal, adapter_run(way, tmp_path)[0], weights)), way
    found, sampled, _ = adapter_run("sample", tmp_path)
    assert not all(map(torch.equal, found, weights))
    reasons = {row.name: row.reason for row in sampled.rows if not row.taken}
    assert reasons["base_model.model.model.layers.0.mlp.up_proj.base_layer"] == (
        "its weight is frozen"
    )
    factors = {name for name, param in adapted().named_parameters() if param.requires_grad}
    assert adapter_run("project", tmp_path)[2] == factors


def test_a_compiled_model_with_projected_gradients():
    """A layer that is projected is a break in the graph."""

    def run(compiles):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)).double()
        optimizer = GaLoreAdamW(param_groups(model, rank=3, update_proj_gap=GAP), lr=LR)
        project_linears(model, optimizer)
        call = torch.compile(model, backend="aot_eager") if compiles else model
        for seed in range(STEPS):
            torch.manual_seed(seed)
            call(torch.randn(30, 12, dtype=torch.float64)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return weights_of(model)

    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other)
