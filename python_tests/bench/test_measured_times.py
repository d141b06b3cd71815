import json

import pytest

from bench import times as bench_times
from lowrank_kernels.ops import Side, Size, times

CASE = {"gpu": "NVIDIA H200", "dtype": "bfloat16", "rows": 4096, "cols": 4096, "rank": 1024}


@pytest.fixture
def record(tmp_path):
    """Of two matrices; GaLore's step, single operations and rivals have no place in the table."""
    shape = {key: CASE[key] for key in ("rows", "cols", "rank")}
    row = {**shape, "dtype": "bf16", "method": "fira", "matrices": 2, "side": "right"}
    results = {name: {"ms": ms} for name, ms in (("torch", 0.1), ("native", 0.4), ("triton", 0.3))}
    rows = [
        {**row, "operation": operation, "method": method, "results": results}
        for operation in ("project_moments", "step")
        for method in ("fira", "galore")
    ]
    rows.append({**rows[2], "rank": 7, "results": {"native": {"ms": 1.0}}})
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"environment": {"device": "NVIDIA H200"}, "rows": rows}))
    return path


def test_a_measured_step_takes_the_place_of_a_predicted_one(record, tmp_path, monkeypatch, capsys):
    out = tmp_path / "times.json"
    bench_times.main([str(record), "--out", str(out)])
    before, after = (json.loads(path.read_text())["rows"] for path in (times.FILE, out))
    key = {**CASE, "side": "right"}
    assert next(row for row in before if key.items() <= row.items())["source"] == "predicted"
    changed = [row for row in after if row not in before]
    assert changed == [{**key, "source": "measured", "us": {"triton": 150.0, "native": 200.0}}]
    assert len(after) == len(before)
    assert capsys.readouterr().out == f"1 measured rows of {len(before)}\n"

    monkeypatch.setattr(times, "FILE", out)
    times.table.cache_clear()
    bf16 = next(row for row in times.table() if row.source == "measured").dtype
    order, reason = times.fastest_first(Size(4096, 4096, 1024, Side.RIGHT), bf16, "NVIDIA H200")
    times.table.cache_clear()
    assert order[0] == "triton"
    assert reason.startswith("measured: triton 150 us")


def test_a_record_without_times_changes_nothing(record, tmp_path):
    emptied = json.loads(record.read_text()) | {"rows": []}
    record.write_text(json.dumps(emptied))
    out = tmp_path / "times.json"
    bench_times.main([str(record), "--out", str(out)])
    assert out.read_text() == times.FILE.read_text()
