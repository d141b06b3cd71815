"""Pre-training with sampled activations beside a smaller batch."""

import json
import os

import pytest

from bench import arms, sampled
from bench.data import prepare
from bench.figures import FIGURES, Records
from bench.sampled import ARMS
from bench.settings import Job, parse
from bench.train import train
from lowrank_kernels.activations import sample

WORDS = ["--steps", "4", "--seq-len", "16", "--eval-every", "4", "--eval-tokens", "64"]
WORDS += ["--warmup", "1", "--checkpoint-every", "1", "--rounds", "2", "--seeds", "0,1"]


def words_of(text_folder, out, *more):
    return [*WORDS, "--data", str(text_folder), "--out", str(out), *more]


@pytest.fixture(scope="module")
def whole(text_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    sampled.main(words_of(text_folder, out))
    return out


def told(out):
    record = json.loads((out / "sampled.json").read_text())
    return record, {(r["arm"], r["lr"], r["seed"]): r["weights_digest"] for r in record["runs"]}


def test_arms_have_the_same_tuning_and_differ_in_what_they_do(whole, tmp_path):
    record, digests = told(whole)
    assert [row["arm"] for row in record["summary"]] == list(ARMS)
    assert len({tuple(each["lr"] for each in row["tried"]) for row in record["summary"]}) == 1
    assert all(len(row["tried"]) == 3 and row["seeds"] == [0, 1] for row in record["summary"])
    assert {run["steps"] for run in record["runs"]} == {4}
    assert len(digests) == 4 * 4
    assert len(set(digests.values())) == len(digests)
    rows = {row["arm"]: row for row in record["summary"]}
    assert rows["all"]["difference"] == 0
    for name in ("pps-0.3", "uniform-0.3"):
        assert rows[name]["linear_bytes"] < rows["all"]["linear_bytes"]
    # The head's too, whose input no sample is taken of.
    small = rows["batch-0.3"]["saved_bytes"] / rows["all"]["saved_bytes"]
    assert small == pytest.approx(0.3, rel=0.02)
    os.link(whole / "sampled.json", tmp_path / "sampled-nano.json")
    text = FIGURES["sampled_nano"](Records(tmp_path))
    assert "| batch-0.3 | " in text
    assert "python -m bench.sampled" in text


def test_all_of_a_batch_is_a_run_of_pre_training(whole, text_folder, tmp_path):
    _, digests = told(whole)
    recipe = ["--optimizers", "adamw-split", "--batch-size", "10", "--micro-batch", "10"]
    own = [word for word in WORDS if word not in ("--rounds", "2", "--seeds", "0,1")]
    settings = parse([*recipe, *own, "--data", str(text_folder), "--device", "cpu"]).settings
    data = prepare(str(text_folder), "bytes", 0, 17, tmp_path / "data")
    (lr,) = settings.lrs["adamw-split"]
    job = Job("adamw-split", lr, 0)
    record = train(settings, job, tmp_path / "data", data.vocab_size, tmp_path)
    assert digests["all", lr, 0] == record["weights_digest"]


def test_validation_is_exact(text_folder, tmp_path, monkeypatch):
    calls, apply = [], sample.SampledLinear.apply
    monkeypatch.setattr(
        sample.SampledLinear, "apply", lambda *args: calls.append(args[3]) or apply(*args)
    )
    settings = parse(["--optimizers", "adamw-split", *WORDS[:8], "--device", "cpu"]).settings
    data = prepare(str(text_folder), "bytes", 0, 17, tmp_path)
    job = Job("adamw-split", 1e-3, 0)
    run = sampled.Sampled(
        settings, job, tmp_path, data.vocab_size, ARMS["pps-0.3"], until=float("inf")
    )
    run.advance()
    assert calls
    assert {len(sketch.tensors[1]) for sketch in calls} == {round(0.3 * settings.batch_size * 16)}
    calls.clear()
    run.validate()
    assert calls == []


class Killed(BaseException):
    """As little is done about it as about a signal."""


@pytest.mark.parametrize("reason", [Killed, arms.TimeUp])
def test_a_comparison_that_is_stopped_goes_on_to_the_same_bits(
    reason, whole, text_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(sampled, "ARMS", {name: ARMS[name] for name in ("all", "pps-0.3")})
    count, stop_at = 0, 3

    def check(until):
        nonlocal count
        count += 1
        if count == stop_at:
            raise reason

    for place in (arms, sampled):
        monkeypatch.setattr(place, "check", check)
    for stop in (4, 9, 15):
        count, stop_at = 0, stop
        with pytest.raises((Killed, SystemExit)) as ended:
            sampled.main(words_of(text_folder, tmp_path))
        assert ended.type is Killed or ended.value.code == arms.UNFINISHED
    stop_at = 0
    sampled.main(words_of(text_folder, tmp_path))
    expected = {key: digest for key, digest in told(whole)[1].items() if key[0] in sampled.ARMS}
    assert told(tmp_path)[1] == expected


def test_mistakes_end_with_a_message(text_folder, tmp_path):
    with pytest.raises(SystemExit, match=r"--batch-size 8 times 0\.3 is to be whole"):
        sampled.main(words_of(text_folder, tmp_path, "--batch-size", "8", "--micro-batch", "8"))
    with pytest.raises(SystemExit, match=r"--micro-batch, 5, the same as --batch-size"):
        sampled.main(words_of(text_folder, tmp_path, "--micro-batch", "5"))
