"""The three ways of giving an optimizer to the Trainer, under the options that people use with it.

That a run resumes in a new process, test_hf_trainer shows.
"""

import os
from unittest import mock

import pytest
import torch
from accelerate.state import AcceleratorState
from integration.easy_tasks import (
    GAP,
    LLAMA_PROJECTED,
    LLAMA_SCALED,
    LR,
    RANK,
    STEPS,
    STOP,
    assert_learned,
    examples,
    projected_and_scaled,
    repeated_pairs,
    tiny_llama,
)
from integration.tiny_runs import assert_same_bits
from transformers import Trainer, TrainingArguments

from lowrank_kernels import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, param_groups

ROWS = 32
WAYS = {
    "optimizers": lambda cls, groups: {"optimizers": (cls(groups, lr=LR), None)},
    "params": lambda cls, groups: {
        "optimizer_cls_and_kwargs": (cls, {"params": groups, "lr": LR}),
    },
    "optimizer_dict": lambda cls, groups: {
        "optimizer_cls_and_kwargs": (cls, {"optimizer_dict": groups, "lr": LR}),
    },
}
OPTIONS = {
    "accumulated": {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": ROWS // 2,
    },
    "clipped": {"max_grad_norm": 0.1},
    "bf16": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.fixture(autouse=True)
def own_accelerate():
    """Precision and compiler go from TrainingArguments to accelerate through what it shares."""
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()


def trained(folder, cls, way="params", seed=0, resume=False, **options):
    """A Trainer after the whole run, from its beginning or from the checkpoint in the middle."""
    torch.manual_seed(seed)
    model = tiny_llama()
    groups = param_groups(model, rank=RANK, update_proj_gap=GAP, weight_decay=0.01)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        learning_rate=LR,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=3,
        save_steps=STOP,
        logging_steps=1,
        seed=3,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        **{"per_device_train_batch_size": ROWS} | options,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=examples(repeated_pairs(0, ROWS * STEPS)),
        **WAYS[way](cls, groups),
    )
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{STOP}") if resume else None)
    return trainer


def result(trainer):
    return trainer.model, trainer.optimizer.optimizer


def assert_trains_and_resumes(folder, cls, **options):
    run = trained(folder, cls, **options)
    assert_learned([log["loss"] for log in run.state.log_history if "loss" in log])
    projected, scaled = projected_and_scaled(result(run)[1])
    assert projected == LLAMA_PROJECTED
    assert scaled == LLAMA_SCALED
    resumed = trained(folder, cls, seed=1, resume=True, **options)
    assert_same_bits(result(resumed), result(run))
    return run


def test_three_ways_in_are_one_run(tmp_path):
    first, *others = (assert_trains_and_resumes(tmp_path / way, FiraAdamW, way=way) for way in WAYS)
    for run in others:
        assert_same_bits(result(run), result(first))


@pytest.mark.parametrize("cls", [GaLoreAdamW, AdaRankGradAdamW])
def test_the_other_methods(cls, tmp_path):
    assert_trains_and_resumes(tmp_path, cls)


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_the_trainer(option, tmp_path):
    run = assert_trains_and_resumes(tmp_path, FiraAdamW, **OPTIONS[option])
    assert (run.accelerator.mixed_precision == "bf16") == (option == "bf16")
    assert (run.model_wrapped is not run.model) == (option == "compiled")
