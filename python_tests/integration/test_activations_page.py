"""The code of docs/activations.md, run as it is written there."""

import re
from pathlib import Path

import pytest
import torch
from integration.easy_tasks import GAP, RANK, repeated_pairs, tiny_llama
from transformers import Trainer, TrainingArguments

import lowrank_kernels

PAGE = Path(__file__).parents[2] / "docs" / "activations.md"
CODE = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
CALLS = ("project_linears", "recompute_activations", "release_gradients", "sample_linears")
CALLS += ("offload_activations",)


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.split("(")[0].split()[-1])
def test_the_code_of_the_page_trains(code, tmp_path):
    for text, smaller in {
        "rank=512": f"rank={RANK}, update_proj_gap={GAP}",
        '"/nvme/scratch"': f'"{tmp_path}"',
    }.items():
        code = code.replace(text, smaller)
    torch.manual_seed(0)
    model = tiny_llama()
    before = [param.detach().clone() for param in model.parameters()]
    names = {name: getattr(lowrank_kernels, name) for name in lowrank_kernels.__all__}
    loader = [repeated_pairs(seed, 8) for seed in range(3)]
    names |= {"torch": torch, "model": model, "loader": loader, "Trainer": Trainer}
    dataset = repeated_pairs(0, 8)
    rows = [{key: values[row] for key, values in dataset.items()} for row in range(8)]
    names["dataset"] = [row | {"index": place} for place, row in enumerate(rows)]
    names["arguments"] = TrainingArguments(
        tmp_path,
        max_steps=3,
        learning_rate=1e-2,
        per_device_train_batch_size=4,
        remove_unused_columns=False,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    exec(compile(code, PAGE.name, "exec"), names)
    for old, param in zip(before, model.parameters(), strict=True):
        assert param.isfinite().all()
        assert not torch.equal(old, param)


def test_every_tool_is_shown():
    shown = "".join(CODE)
    assert [name for name in CALLS if f"{name}(" not in shown] == []


def test_every_cell_names_its_test():
    """And every test of the table is there."""
    text = PAGE.read_text()
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", text, re.MULTILINE)
    cells = [cell for name, row in rows if name in CALLS for cell in row.split("|")]
    table = [cell for cell in cells if re.search(r"\[\w\]", cell)]
    assert len(table) == 7 * len(CALLS)
    marks = {mark for cell in table for mark in re.findall(r"\[(\w)\]", cell)}
    places = dict(re.findall(r"^\[(\w)\]: (\S+)$", text, re.MULTILINE))
    assert marks == set(places)
    assert all((PAGE.parent / place).exists() for place in places.values())
