"""Fine-tuning with sampled activations: labels, equal tuning, runs that are stopped, the record."""

import json
import os
import random
import re

import pytest
import torch

from bench import arms, encoder, finetune
from bench.data import Document, load_documents
from bench.figures import FIGURES, Records
from bench.finetune import ARMS, Bench, Settings
from bench.labels import (
    BEGIN,
    MASK,
    PADDING,
    Masked,
    encoded,
    labelled,
    pairs_of,
    parted,
    torch_documents,
)
from bench.settings import Job
from lowrank_kernels.activations import sample

PACKAGES = ("alpha", "beta", "gamma")
TINY = {"packages": 3, "train": 8, "validation": 4, "length": 32, "hidden": 32, "layers": 2}
TINY |= {"heads": 2, "batch": 8, "epochs": 2, "masked_steps": 5}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Lines that tell their package and their file."""
    folder, draw = tmp_path_factory.mktemp("sources"), random.Random(0)
    for package in PACKAGES:
        (folder / package).mkdir()
        for part in range(5):
            lines = [
                f"    {package} {part} {draw.choice(('is', 'has', 'was'))} {n}" for n in range(24)
            ]
            (folder / package / f"part{part}.py").write_text("\n\n".join(lines))
    (folder / "setup.py").write_text("import alpha\nof no package\n" * 20)
    return folder


def words_of(sources, out, *more):
    sizes = [word for name, value in TINY.items() for word in (f"--{name}", str(value))]
    sizes = [word.replace("_", "-") if word.startswith("--") else word for word in sizes]
    return [*sizes, "--data", str(sources), "--rounds", "2", "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(sources, tmp_path_factory):
    """A comparison of all arms."""
    out = tmp_path_factory.mktemp("whole")
    finetune.main(words_of(sources, out, "--seeds", "0,1"))
    return out


@pytest.fixture
def bench(sources, tmp_path):
    settings = Settings(**TINY)
    data = labelled(load_documents(str(sources)), 3, 8, 4, 32)
    found = Bench(settings, data, tmp_path)
    found.pretrain(float("inf"))
    return found


def text_of(tokens):
    return bytes(token for token in tokens.tolist() if token < 256).decode()


def told(out):
    record = json.loads((out / "finetune.json").read_text())
    return record, {(r["arm"], r["lr"], r["seed"]): r["weights_digest"] for r in record["runs"]}


def test_packages_are_folders_of_one_language():
    names = {document.name: document.text for document in torch_documents()}
    assert "nn.Module" in names["nn.py/nn/modules/module.py"]
    assert "#pragma once" in names["include.c10.h/include/c10/core/Device.h"]
    assert not any("/" not in name.partition("/")[2] for name in names)


def test_samples_are_lines_of_their_package_and_parts_share_no_file(sources):
    data = labelled(load_documents(str(sources)), 3, 8, 4, 64)
    assert sorted(data.packages) == sorted(PACKAGES)
    files = []
    for samples, count in ((data.train, 8), (data.validation, 4)):
        assert torch.bincount(samples.labels).tolist() == [count] * 3
        seen = set()
        for tokens, label in zip(samples.tokens, samples.labels, strict=True):
            first, second = text_of(tokens).split("\n")
            package, part, _, number = first.split()
            assert package == data.packages[label]
            # The line after it, of the same file.
            assert re.fullmatch(rf"{package} {part} \w+ {int(number) + 1}", second)
            seen.add((package, part))
        files.append(seen)
    assert files[0].isdisjoint(files[1])
    # Nor does the encoder learn from the text of validation.
    text = data.text.tobytes().decode()
    assert all(f"{package} {part} " not in text for package, part in files[1])
    assert "of no package" in text


def test_files_are_parted_by_size():
    sizes = {"a": 1, "b": 80, "c": 10, "d": 9}
    files = [Document(f"p/{name}.py", "x" * size) for name, size in sizes.items()]
    train, held = parted(files)
    assert 15 <= sum(len(each.text) for each in held) <= 40
    assert sorted([*train, *held], key=lambda each: each.name) == files
    assert files[1] in train
    # Where one file is nearly all, no part is large enough.
    assert parted(files[:2]) == (files[:2], [])


def test_too_few_lines_are_refused(sources):
    with pytest.raises(ValueError, match="0 packages have 800 and 4 pairs of lines"):
        labelled(load_documents(str(sources)), 3, 800, 4, 32)


def test_known_lines():
    assert pairs_of("  def first(self, argument):\n\n    pass\n\tlast\n") == [
        "def first(self, argument):\npass"
    ]
    assert pairs_of("a\nb\n") == []
    assert encoded("ab", 5) == [BEGIN, 97, 98, PADDING, PADDING]
    assert encoded("abcdef", 4) == [BEGIN, 97, 98, 99]


def test_hidden_bytes_are_those_that_are_to_be_guessed(sources):
    data = labelled(load_documents(str(sources)), 3, 8, 4, 32)
    masked = Masked(data.text, 32)
    batch = masked.batch(3, 64)
    tokens, labels = batch["input_ids"], batch["labels"]
    assert tokens.shape == labels.shape == (64, 32)
    hidden = tokens == MASK
    assert torch.equal(hidden, labels != -100)
    assert 0.1 < hidden.float().mean() < 0.2
    assert (tokens[:, 0] == BEGIN).all()
    plain = text_of(torch.where(hidden, labels, tokens)[0])
    assert plain in data.text.tobytes().decode()
    assert torch.equal(masked.batch(3, 64)["input_ids"], tokens)
    assert not torch.equal(masked.batch(4, 64)["input_ids"], tokens)


@pytest.mark.parametrize("name", ARMS)
def test_training_is_sampled_and_evaluation_is_not(name, bench, monkeypatch):
    calls, apply = [], sample.SampledLinear.apply
    monkeypatch.setattr(
        sample.SampledLinear, "apply", lambda *args: calls.append(args[3]) or apply(*args)
    )
    run = bench.run(Job(name, 1e-3, 0))
    run.advance(0)
    # Of four linear layers a block, the one behind attention has an input that is kept anyway.
    assert len(calls) == (0 if ARMS[name].keep == 1 else 2 * 3)
    if calls:
        rows = {len(sketch.tensors[0]) for sketch in calls}
        assert rows == {round(ARMS[name].keep * 8 * 32)} or name.startswith("lora")
    noted = (sketch.seen.keywords["norms"] for sketch in calls)
    assert all((norms is not None) == ARMS[name].norms for norms in noted)
    calls.clear()
    modes = []
    run.model.register_forward_pre_hook(lambda model, _: modes.append(model.training))
    wrong = run.wrong(bench.data.validation)
    assert (calls, set(modes)) == ([], {False})
    assert run.model.training
    if run.sampled:
        run.sampled.undo()
    assert run.wrong(bench.data.validation) == wrong


def test_padding_is_never_drawn(bench, monkeypatch):
    """Nor has it a gradient."""
    seen = []
    kept_rows = sample.kept_rows

    def noted(rows, scores, *others):
        sketch = kept_rows(rows, scores, *others)
        seen.append((scores, sketch.tensors[1], sketch.tensors[2]))
        return sketch

    monkeypatch.setattr(sample, "kept_rows", noted)
    run = bench.run(Job("pps-0.3", 1e-3, 0))
    batch = run.batch(0)
    batch["attention_mask"][:, 20:] = 0
    run.model(**batch)
    mask = batch["attention_mask"].flatten()
    assert len(seen) == 2 * 3
    for scores, places, weights in seen:
        assert torch.equal(scores != 0, mask != 0)
        assert (mask[places.long()] * weights != 0).sum() == (weights != 0).sum()


def test_lora_trains_its_factors_and_the_head(bench):
    run = bench.run(Job("lora", 1e-2, 0))
    names = {name for name, param in run.model.named_parameters() if param.requires_grad}
    assert len([name for name in names if re.search(r"\.(down|up)\.weight$", name)]) == 2 * 4 * 2
    rest = {name for name in names if not re.search(r"\.(down|up)\.weight$", name)}
    assert rest == {
        *("head.dense.weight", "head.norm.weight"),
        *("classifier.weight", "classifier.bias"),
    }
    before = {name: param.clone() for name, param in run.model.named_parameters()}
    plain = bench.run(Job("plain", 1e-2, 0))
    batch = run.batch(0)
    # It begins as the encoder.
    assert torch.equal(run.model(**batch).logits, plain.model(**batch).logits)
    for step in range(2):
        run.advance(step)
    moved = {n for n, param in run.model.named_parameters() if not torch.equal(param, before[n])}
    assert moved == names


def test_every_arm_gets_the_same_tuning(whole):
    record, _ = told(whole)
    assert [row["arm"] for row in record["summary"]] == list(ARMS)
    for row in record["summary"]:
        rates = [each["lr"] for each in row["tried"]]
        middle = ARMS[row["arm"]].lr
        assert rates == pytest.approx([middle / 3, middle, middle * 3], rel=0.01)
        assert row["lr"] in rates
        best = min(each["loss"] for each in row["tried"])
        assert next(each["loss"] for each in row["tried"] if each["lr"] == row["lr"]) == best
        runs = [run for run in record["runs"] if run["arm"] == row["arm"]]
        assert sorted(run["seed"] for run in runs) == [0, 0, 0, 1]
        assert {run["steps"] for run in runs} == {6}
        assert row["losses"] == [
            run["validation"][-1][1]
            for seed in (0, 1)
            for run in runs
            if (run["seed"], run["lr"]) == (seed, row["lr"])
        ]


def test_what_the_record_and_the_table_hold(whole, tmp_path):
    record, digests = told(whole)
    assert record["environment"]["commit"]
    assert record["environment"]["threads"] == 1
    assert record["settings"]["epochs"] == 2
    assert record["data"]["digest"]
    assert 0 < record["data"]["padding"] < 1
    rows = {row["arm"]: row for row in record["summary"]}
    plain, lora = rows["plain"], rows["lora"]
    for name in ("pps-0.3", "uniform-0.3", "pps-0.3-norms", "wta-0.3-norms"):
        assert rows[name]["linear_bytes"] < plain["linear_bytes"]
        # What others keep stays.
        others = [each["saved_bytes"] - each["linear_bytes"] for each in (plain, rows[name])]
        assert others[0] == others[1]
    assert rows["pps-0.1"]["linear_bytes"] < rows["pps-0.3"]["linear_bytes"]
    assert rows["lora-pps-0.3"]["linear_bytes"] < lora["linear_bytes"]
    assert lora["trained"] < plain["trained"]
    # In bfloat16, of 24 samples of 32 tokens, in two blocks' layers but the one behind attention.
    for name, row in rows.items():
        assert row["norm_bytes"] == (2 * 24 * 32 * 2 * 3 if ARMS[name].norms else 0)
    assert all(len(row["samples_ms"]) == 2 and row["ms"] > 0 for row in rows.values())
    # Arms differ in what they do, not in name only.
    first = {
        arm: digest
        for (arm, lr, seed), digest in digests.items()
        if (lr, seed) == (ARMS["plain"].lr, 0)
    }
    assert len(set(first.values())) == len(first) == 6
    assert (whole / "finetune.png").read_bytes().startswith(b"\x89PNG")
    os.link(whole / "finetune.json", tmp_path / "finetune.json")
    text = FIGURES["finetune"](Records(tmp_path))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == ["| arm", *(f"| {name}" for name in ARMS)]
    assert f"| {100 * (1 - plain['loss']):.1f} ± " in lines[1]


class Killed(BaseException):
    """As little is done about it as about a signal."""


@pytest.mark.parametrize("reason", [Killed, arms.TimeUp])
def test_a_comparison_that_is_stopped_goes_on_to_the_same_bits(
    reason, whole, sources, tmp_path, monkeypatch
):
    """In the middle of pre-training, between runs and inside of them."""
    names = ["plain", "pps-0.3-norms", "lora-pps-0.3"]
    words = words_of(sources, tmp_path, "--seeds", "0,1", "--arms", ",".join(names))
    count, stop_at = 0, 3

    def check(until):
        nonlocal count
        count += 1
        if count == stop_at:
            raise reason

    for place in (arms, encoder, finetune):
        monkeypatch.setattr(place, "check", check)
    monkeypatch.setattr(encoder, "CHECKPOINT_EVERY", 2)
    for stop in (4, 12, 20, 40):
        count, stop_at = 0, stop
        with pytest.raises((Killed, SystemExit)) as ended:
            finetune.main(words)
        assert ended.type is Killed or ended.value.code == arms.UNFINISHED
    stop_at = 0
    finetune.main(words)
    expected = {key: digest for key, digest in told(whole)[1].items() if key[0] in names}
    assert told(tmp_path)[1] == expected
    again = json.loads((tmp_path / "finetune.json").read_text())
    finetune.main(words)
    assert json.loads((tmp_path / "finetune.json").read_text()) == again


def test_mistakes_end_with_a_message(whole, sources, capsys):
    with pytest.raises(SystemExit, match=r"of another comparison: settings was .*'epochs': 2"):
        finetune.main(words_of(sources, whole, "--epochs", "3"))
    with pytest.raises(SystemExit):
        finetune.main(words_of(sources, whole, "--arms", "plain,best"))
    assert "--arms best: the known ones are plain, pps-0.3" in capsys.readouterr().err
