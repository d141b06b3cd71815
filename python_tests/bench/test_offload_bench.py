"""The bench of offloaded activations, small: equal gradients, and a record of both processes."""

import json

from bench import offload


def test_both_processes_are_recorded(tmp_path, capsys):
    out = tmp_path / "offload.json"
    sizes = {"hidden": 64, "layers": 2, "tokens": 256, "rounds": 1}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    offload.main([*options, "--folder", str(tmp_path), "--out", str(out)])
    plain, offloaded = json.loads(out.read_text())["rows"]
    assert (plain["arm"], offloaded["arm"]) == offload.ARMS
    assert plain["saved_bytes"] > 0
    assert plain["disk"] is None
    assert offloaded["disk"]["packed"] > 0
    assert "% of plain" in capsys.readouterr().out
