import json

from bench import fits, peak


def test_the_record_holds_every_method_and_memory(tmp_path, capsys):
    out = tmp_path / "fits.json"
    fits.main(["--models", "nano", "--memory", "2GB,2GiB", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    ways = [(name, how) for name, (_, own) in fits.METHODS.items() for how in own]
    assert len(rows) == 1 + len(ways) * len(fits.SHARES) * len(fits.BASES)
    found = [(row["optimizer"], tuple(row["with"])) for row in rows]
    assert list(dict.fromkeys(found)) == [("adamw", ()), *ways]
    for row in rows:
        small, large = (row["most_tokens"][text] for text in ("2GB", "2GiB"))
        assert 0 < small < large
        assert (row["total_bytes"] <= 2e9) == (small >= fits.TOKENS)
    ranks = [row["rank"] for row in rows if row["optimizer"] == "galore"]
    assert ranks == [32, 32, 16, 16, 8, 8] * 3
    shown = capsys.readouterr().out
    assert "in 2GiB" in shown


def test_the_plan_beside_a_process(capsys):
    """Whatever the ratio is: resident memory is not in a test's hands."""
    peak.main(["--hidden", "128", "--layers", "1", "--tokens", "64"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == list(peak.ARMS)
    assert all("resident" in line for line in lines)
