"""A Hugging Face Trainer run that stops and resumes in a new process, bit for bit.

Run as a script, this file is the worker: `python test_hf_trainer.py FOLDER PART...`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.optim import Optimizer

import lowrank_kernels
from lowrank_kernels import FiraAdamW, GaLoreAdamW, GaLoreAdamW8bit, param_groups

GAP, STOP, STEPS = 5, 7, 12
METHODS = {"galore": GaLoreAdamW, "fira": FiraAdamW, "galore-8bit": GaLoreAdamW8bit}
# A change of the weights' dtype does nothing to codes.
WIDE = ["galore", "fira"]
PARTS = ("whole", "stopped", "resumed", "rounded")


def rounding(optimizer_class):
    """The same optimizer with torch's loading, which casts the state to the weights' dtype."""

    class Rounding(optimizer_class):
        def load_state_dict(self, state_dict):
            Optimizer.load_state_dict(self, state_dict)
            for state in self.state.values():
                for key in {"exp_avg", "exp_avg_sq", "limiter_norm"} & state.keys():
                    assert state[key].dtype is torch.bfloat16
                    state[key] = state[key].float()  # the operations refuse other moments

    return Rounding


def tiny_llama(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
    )
    return LlamaForCausalLM(config).to(torch.bfloat16)


def train(part, method, folder):
    """One part of the run, and what it ended with, in a file."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop |= part == "stopped" and state.global_step == STOP

    resuming = part in ("resumed", "rounded")
    # Another initialization: what a resumed run knows comes from its checkpoint.
    model = tiny_llama(seed=1 if resuming else 0)
    tokens = torch.randint(0, 32, (24, 8), generator=torch.Generator().manual_seed(0))
    checkpoints = folder / f"{method}-checkpoints"
    optimizer_class = METHODS[method] if part != "rounded" else rounding(METHODS[method])
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(checkpoints),
            max_steps=STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            warmup_steps=2,
            seed=3,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="steps" if part == "stopped" else "no",
            save_steps=STOP,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        callbacks=[Stop()],
        optimizer_cls_and_kwargs=(
            optimizer_class,
            {
                "params": param_groups(model, rank=4, update_proj_gap=GAP, weight_decay=0.1),
                "lr": 1e-2,
            },
        ),
    )
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.train(resume_from_checkpoint=resuming and str(checkpoints / f"checkpoint-{STOP}"))
    result = {
        "steps": trainer.state.global_step,
        "start": start,
        "weights": model.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
    }
    torch.save(result, folder / f"{part}-{method}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each part ended with; a process does its parts for every method."""
    folder = tmp_path_factory.mktemp("trainer")
    package = str(Path(lowrank_kernels.__file__).parents[1])
    environment = os.environ | {"PYTHONPATH": package, "OMP_NUM_THREADS": "1"}

    def start(*parts):
        return subprocess.Popen(
            [sys.executable, __file__, str(folder), *parts],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(process):
        output, _ = process.communicate()
        assert process.returncode == 0, f"{process.args}\n{output}"

    whole, stopped = start("whole"), start("stopped")
    finish(stopped)
    resumed = start("resumed", "rounded")
    finish(whole)
    finish(resumed)
    return {
        (part, method): torch.load(folder / f"{part}-{method}.pt", weights_only=True)
        for part in PARTS
        for method in METHODS
    } | {"folder": folder}


def assert_same_weights(first, second):
    assert first["weights"].keys() == second["weights"].keys()
    for name, value in first["weights"].items():
        assert value.dtype is torch.bfloat16
        assert torch.equal(value, second["weights"][name]), name


@pytest.mark.parametrize("method", METHODS)
def test_the_run_was_interrupted_between_two_refreshes(results, method):
    assert STOP % GAP
    whole, stopped, resumed = (results[part, method] for part in PARTS[:3])
    assert [run["steps"] for run in (whole, stopped, resumed)] == [STEPS, STOP, STEPS]
    matrices = {name: value for name, value in whole["weights"].items() if value.dim() == 2}
    for name, value in matrices.items():
        assert not torch.equal(value, whole["start"][name]), f"{name} was not trained"
        assert not torch.equal(value, stopped["weights"][name]), f"{name} was finished at {STOP}"
    fresh = resumed["start"]
    assert any(not torch.equal(value, fresh[name]) for name, value in whole["start"].items())


@pytest.mark.parametrize("method", METHODS)
def test_the_resumed_run_ends_with_the_same_weights(results, method):
    assert_same_weights(results["whole", method], results["resumed", method])


@pytest.mark.parametrize("method", METHODS)
def test_the_resumed_run_ends_with_the_same_state(results, method):
    whole, resumed = (results[part, method]["optimizer"] for part in ("whole", "resumed"))
    assert whole["param_groups"] == resumed["param_groups"]
    assert whole["state"].keys() == resumed["state"].keys()
    for index, state in whole["state"].items():
        assert state.keys() == resumed["state"][index].keys()
        for key, value in state.items():
            other = resumed["state"][index][key]
            assert type(other) is type(value), (index, key)
            if isinstance(value, torch.Tensor):
                assert other.dtype is value.dtype, (index, key)
                assert torch.equal(other, value), (index, key)
            else:
                assert other == value, (index, key)


@pytest.mark.parametrize("method", WIDE)
def test_the_checkpoint_holds_float32_moments_and_loads_safely(results, method):
    path = results["folder"] / f"{method}-checkpoints" / f"checkpoint-{STOP}" / "optimizer.pt"
    saved = torch.load(path, weights_only=True)
    projected = [group for group in saved["param_groups"] if "rank" in group]
    assert len(projected) == 1
    assert len(projected[0]["params"]) == len(projected[0]["param_names"]) == 2 * 7
    for index, state in saved["state"].items():
        assert state["exp_avg"].dtype is state["exp_avg_sq"].dtype is torch.float32
        assert state["step"] == STOP
        if index in projected[0]["params"]:
            assert state["basis"].dtype is torch.bfloat16
            assert STOP - GAP <= state["basis_step"] < STOP
            assert ("limiter_norm" in state) == (method == "fira")


@pytest.mark.parametrize("method", WIDE)
def test_control_moments_that_went_through_the_weights_dtype_change_the_run(results, method):
    """What the two tests above would miss, they would miss here."""
    whole, rounded = results["whole", method], results["rounded", method]
    assert rounded["steps"] == STEPS
    with pytest.raises(AssertionError):
        assert_same_weights(whole, rounded)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[2:]:
        for method in METHODS:
            train(part, method, Path(sys.argv[1]))
