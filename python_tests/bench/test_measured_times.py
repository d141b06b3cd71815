import json

import pytest

from bench import times as bench_times
from lowrank_kernels.ops import Side, Size, times

CASE = {"gpu": "NVIDIA H200", "dtype": "bfloat16", "rows": 4096, "cols": 4096, "rank": 1024}


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch):
    """A table of predictions in the place of the package's, which may have measured times."""
    rows = [{**CASE, "rank": rank, "side": "right"} for rank in (64, 1024)]
    text = {"rows": [row | {"source": "predicted", "us": {"triton": 9}} for row in rows]}
    path = tmp_path / "shipped.json"
    path.write_text(json.dumps(text))
    monkeypatch.setattr(times, "FILE", path)


RUN = {"environment": {"device": "NVIDIA H200"}, "command": "python -m bench.kernels"}


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
    path.write_text(json.dumps(RUN | {"rows": rows}))
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


def test_the_operations_of_a_first_contact_are_measured_times(record, tmp_path):
    """Beside its other parts and cases that failed; of each row the run that it is from."""
    operations = json.loads(record.read_text())["rows"]
    other = RUN | {"environment": {"device": "another"}}
    rows = [
        {"part": "rates", "case": "launches", "run": 0, "python_us": 1.0},
        {"part": "check", "case": "a", "run": 0, "backends": {}},
        {"part": "models", "case": "a", "run": 0, "results": {"adamw": {"ms": 1.0}}},
        {"part": "operations", "case": "a", "run": 0, "error": "raised"},
        {"part": "operations", "case": "b", "run": 1, "operations": operations},
    ]
    contact, out = tmp_path / "first_contact.json", tmp_path / "times.json"
    contact.write_text(json.dumps({"runs": [other, RUN], "rows": rows}))
    bench_times.main([str(contact), "--out", str(out)])
    by_contact = out.read_text()
    bench_times.main([str(record), "--out", str(out)])
    assert by_contact == out.read_text()
    assert by_contact != times.FILE.read_text()


@pytest.mark.parametrize("change", [{"rows": []}, {"command": "python -m bench.kernels --quick"}])
def test_a_record_without_times_is_refused(change, record, tmp_path):
    record.write_text(json.dumps(json.loads(record.read_text()) | change))
    out = tmp_path / "times.json"
    with pytest.raises(SystemExit, match=f"{record} has no case that triton and native were both"):
        bench_times.main([str(record), "--out", str(out)])
    assert not out.exists()
