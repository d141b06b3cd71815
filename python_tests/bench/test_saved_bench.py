"""What a disk has to write, and the published peaks of T5, on small models."""

import json

import pytest
import torch
from torch import nn

from bench import offload_speeds, wtacrs
from lowrank_kernels import saved_bytes


def test_the_record_of_speeds(tmp_path, capsys):
    out = tmp_path / "speeds.json"
    offload_speeds.main(["--models", "nano", "--out", str(out)])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["with"], row["share"]) for row in rows] == list(offload_speeds.WAYS)
    for row in rows:
        assert row["out_bytes"] <= row["share"] * row["saved_bytes"]
        speeds = {card: each["bytes_per_second"] for card, each in row["speeds"].items()}
        assert speeds["h200"] == pytest.approx(
            row["out_bytes"] / (row["products"] / (0.4 * 989e12))
        )
        assert speeds["a100-80"] / speeds["h200"] == pytest.approx(312 / 989)
    assert rows[2]["saved_bytes"] < rows[1]["saved_bytes"] < rows[0]["saved_bytes"]
    assert "computed, not measured" in capsys.readouterr().out


TINY = wtacrs.Shape(32, 64, 2, 3, 10_000, {"full": 1.0, "wta": 0.5, "lora": 0.8})


def test_the_record_of_peaks(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(wtacrs, "SHAPES", {"tiny": TINY})
    wtacrs.main(["--out", str(tmp_path / "wtacrs.json")])
    rows = {row["way"]: row for row in json.loads((tmp_path / "wtacrs.json").read_text())["rows"]}
    assert set(rows) == set(wtacrs.WAYS)
    saved = {way: row["saved_bytes"] for way, row in rows.items()}
    assert saved["all sampled"] < saved["o, wi, wo sampled"] < saved["full"]
    assert saved["LoRA, its inputs sampled"] < saved["LoRA"] < saved["full"]
    assert saved["all that WTA-CRS does, by formula"] < saved["all sampled"]
    assert rows["full"]["peak_bytes"] == 10**9
    assert rows["full"]["held_bytes"] == 16 * TINY.parameters
    assert "published GB" in capsys.readouterr().out


def test_layers_of_a_model_are_alike():
    """One and two of them tell of three."""
    ids = torch.randint(1, 64, (1, wtacrs.LENGTH))
    labels = torch.randint(1, 64, (1, wtacrs.TARGET))
    way = wtacrs.WAYS["full"]
    model = wtacrs.model_of(TINY, TINY.layers, way)
    assert wtacrs._total(model, input_ids=ids, labels=labels) == wtacrs.saved_of(TINY, way)


def test_a_mask_of_dropout_takes_a_byte():
    x = torch.randn(5, 6, requires_grad=True)
    with wtacrs._BytesOfMasks():
        assert saved_bytes(nn.Dropout(0.5), x).total == x.numel()
        assert saved_bytes(nn.Dropout(0.5).eval(), x).total == 0
