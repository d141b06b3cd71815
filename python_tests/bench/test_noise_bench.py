"""The noise bench: its estimates by brute force, its record, and that it leaves training alone."""

import json
import math

import pytest
import torch

from bench import noise
from bench.data import prepare
from bench.settings import Job, parse
from bench.train import Run


def test_estimates_are_the_unbiased_ones_and_their_jackknife():
    draws = 2.0 + torch.randn(9, 30, dtype=torch.float64)

    def brute(rows: torch.Tensor) -> dict[str, float]:
        spread = float(rows.var(0).sum())
        signal = float(rows.mean(0).square().sum()) - spread / len(rows)
        return {"noise": spread, "signal": signal, "ratio": spread / signal}

    found, expected = noise.estimates(draws @ draws.T), brute(draws)
    without = [brute(torch.cat([draws[:i], draws[i + 1 :]])) for i in range(9)]
    for name, value in expected.items():
        values = torch.tensor([each[name] for each in without])
        error = math.sqrt(8 / 9 * float((values - values.mean()).square().sum()))
        assert found[name] == pytest.approx(value, rel=1e-6)
        assert found[f"{name}_error"] == pytest.approx(error, rel=1e-4)


@pytest.fixture(scope="module")
def text(tiny, tmp_path_factory):
    settings = parse([*tiny, "--optimizers", "galore"]).settings
    folder = tmp_path_factory.mktemp("data")
    data = prepare(settings.data, "bytes", 0, settings.seq_len + 1, folder)
    return settings, folder, data.vocab_size


def test_looking_leaves_training_as_it_is(text):
    settings, *data = text
    job = Job("galore", 2e-2, 0)
    watched, run = noise.Watched(settings, job, *data), Run(settings, job, *data)
    for step in range(6):
        watched.advance()
        run.advance()
        if step == 3:
            watched.products(3)
    for ours, theirs in zip(watched.run.model.parameters(), run.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_products_are_of_clipped_gradients_in_the_subspace(text):
    settings, *data = text
    watched = noise.Watched(settings, Job("galore", 2e-2, 0), *data)
    watched.advance()
    found = watched.products(2)
    run = watched.run
    low = {name: [] for name in found}
    for number in range(2):
        batch = run.batches.train(noise.FRESH + 2 + number, settings.batch_size)
        run.gradients(batch)
        for name, param in watched.projected.items():
            basis = run.optimizer.state[param]["basis"]
            left = len(basis) == len(param) and run.optimizer.state[param]["side"] == 0
            low[name].append((basis.T @ param.grad if left else param.grad @ basis).flatten())
        norms = [param.grad.norm() for param in run.model.parameters()]
        assert float(torch.stack(norms).norm()) <= settings.clip * 1.001
        run.optimizer.zero_grad()
    for name, (one, other) in low.items():
        assert float(found[name][0, 1]) == pytest.approx(float(one @ other), rel=1e-4, abs=1e-9)
        assert float(found[name][1, 1]) == pytest.approx(float(other @ other), rel=1e-4)


def test_the_record(tiny, tmp_path, capsys):
    out = tmp_path / "noise.json"
    noise.main([*tiny, "--points", "5,8", "--batches", "4", "--window", "2", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["bench"] == "noise"
    assert record["settings"]["batch_size"] == 4
    every = [row for row in record["rows"] if row["matrices"] == "all"]
    assert [row["step"] for row in every] == [5, 8]
    for row in every:
        assert row["told"]["noise"] > 0
        assert row["batches"]["noise"] > 0
        ratio = row["batches"]["noise"] / row["batches"]["signal"]
        assert row["batches_scale"] == pytest.approx(4 * ratio)
        assert row["told_scale"] == pytest.approx(4 * row["told"]["noise"] / row["told"]["signal"])
    assert "noise scale" in capsys.readouterr().out
