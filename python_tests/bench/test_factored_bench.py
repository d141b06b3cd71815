"""The bench of factored layers runs, and its arms are of the work that it names."""

import json

import torch

from bench import factored


def test_a_quick_run_has_a_result_for_each_arm(capsys, tmp_path):
    out = tmp_path / "factored.json"
    factored.main(["--quick", "--out", str(out)])
    printed = capsys.readouterr().out
    rows = json.loads(out.read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["fp32", "bf16"]
    for row in rows:
        results = row["results"]
        assert list(results) == [
            "dense",
            *(f"r = 1/{s}{e}" for s in (4, 8) for e in ("", ", sparse")),
        ]
        assert results["dense"]["of_dense"] == results["dense"]["operations"] == 1
        assert all(name in printed for name in results)
        low = results["r = 1/4"]["operations"]
        assert low == 12 * (64 + 48) / (64 * 48)
        assert results["r = 1/4, sparse"]["operations"] == low + int(0.03 * 64 * 48) / (64 * 48)


def test_a_pass_leaves_gradients_of_everything():
    layers = factored.arms(24, 32, torch.float32)
    for layer in layers.values():
        x = torch.randn(5, 32, requires_grad=True)
        factored.passes(layer, [x], [torch.randn(5, 24)])(0)
        assert all(each.grad.any() for each in (x, *layer.parameters()))
