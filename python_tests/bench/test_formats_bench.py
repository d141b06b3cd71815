"""Arms are paired by seed and rate with the optimizer that they are named after."""

import json
import math

import pytest

from bench import formats, report
from bench.figures import FIGURES, Records
from bench.record import write_lines
from bench.tables import difference_texts


def run(optimizer, seed, loss, lr=0.02, steps=4, parameters=10):
    return {
        "optimizer": optimizer,
        "lr": lr,
        "seed": seed,
        "parameters": parameters,
        "train_loss": [loss] * steps,
        "validation": [[2, loss + 1], [steps, loss]],
    }


RUNS = [
    *(run("galore", seed, loss) for seed, loss in enumerate([1.5, 1.52, 1.49])),
    *(run("galore-8bit", seed, loss) for seed, loss in enumerate([1.501, 1.518, 1.494])),
    run("galore-8bit-nearest", 1, 1.55),
    run("galore-moved", 2, math.nan),
    run("galore-bf16", 0, 1.4, lr=0.01),
    run("fira-8bit", 0, 1.4),
    run("fira-8bit-basis", 0, 1.3),
    run("fira-8bit-basis-reversed", 0, 1.45),
    run("galore-projected-random", 0, 1.53),
    run("adamw-split", 0, 1.6),
    run("adamw-split-bf16", 0, 1.61),
]


def test_differences_mean_standard_error_and_bound_by_hand():
    found = {arm.arm: arm for arm in formats.paired(RUNS)}
    assert {name: arm.against for name, arm in found.items()} == {
        "galore-8bit": "galore",
        "galore-8bit-nearest": "galore",
        "galore-moved": "galore",
        "fira-8bit-basis-reversed": "fira-8bit-basis",
        "galore-projected-random": "galore",
        "adamw-split-bf16": "adamw-split",
    }
    arm = found["galore-8bit"]
    assert arm.seeds == [0, 1, 2]
    assert arm.differences == pytest.approx([0.001, -0.002, 0.004])
    assert arm.mean == pytest.approx(0.001)
    # Deviations 0, -3, 3 thousandths: variance 9e-6 with two degrees of freedom.
    assert arm.error == pytest.approx(0.003 / math.sqrt(3))
    assert arm.bound == pytest.approx(0.001 + 2 * 0.003 / math.sqrt(3))


def test_arms_are_paired_at_the_same_scale():
    scaled = [
        run(name, 0, loss) | {"scale": scale}
        for name, scale, loss in [
            *(("galore", 0.2, 1.5), ("galore", 0.4, 1.6)),
            *(("galore-8bit", 0.4, 1.61), ("galore-8bit", 0.8, 1.7)),
        ]
    ]
    (arm,) = formats.paired(scaled)
    assert arm.differences == pytest.approx([0.01])


def test_one_seed_has_a_mean_and_no_error():
    (arm,) = (arm for arm in formats.paired(RUNS) if arm.arm == "galore-8bit-nearest")
    assert (arm.against, arm.seeds) == ("galore", [1])
    assert arm.mean == pytest.approx(0.03)
    assert math.isnan(arm.error)
    assert math.isnan(arm.bound)
    assert difference_texts(arm.row()) == ("1", "+30.0", "", "")


def test_a_diverged_run_is_no_mean():
    (arm,) = (arm for arm in formats.paired(RUNS) if arm.arm == "galore-moved")
    assert math.isnan(arm.mean)
    assert difference_texts(arm.row()) == ("1", "diverged: 1", "", "")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (run("galore-8bit", 0, 1.6), "two runs of galore-8bit, lr 0.02, seed 0"),
        (run("galore-bf16", 0, 1.6, steps=5), "galore-bf16 and galore, seed 0: 5 and 4 steps"),
        (run("galore-bf16", 0, 1.6, parameters=11), "of 11 and 10 parameters"),
    ],
)
def test_what_is_no_pair_is_refused(other, message):
    with pytest.raises(ValueError, match=message):
        formats.paired([*RUNS, other])


def test_records_of_comparisons_and_of_runs_say_the_same(tmp_path, capsys):
    """And what the report shows of the record; a run that is read twice counts once."""
    head = {"command": "python -m bench.pretrain --seeds 0,1,2", "date": "2026-01-01"}
    head["environment"] = {"device": "a device", "commit": "abc"}
    write_lines(tmp_path / "pretrain.json", head, "runs", RUNS[:8])
    single = [tmp_path / f"{number}.json" for number in range(8)]
    for path, record in zip(single, RUNS, strict=False):
        path.write_text(json.dumps(record))
    out = tmp_path / "formats.json"
    records = []
    for paths in ([tmp_path / "pretrain.json"], single, [tmp_path / "pretrain.json", *single]):
        formats.main([*map(str, paths), "--out", str(out)])
        records.append(json.loads(out.read_text()))
    assert records[0]["rows"] == records[1]["rows"] == records[2]["rows"]
    assert [record["comparisons"] for record in records] == [[head], [], [head]]
    assert str(tmp_path) not in out.read_text()
    assert "+1.0 -2.0 +4.0" in capsys.readouterr().out
    text = FIGURES["format_losses"](Records(tmp_path))
    assert "| galore-8bit | 0.02 | 3 | +1.0 | 1.7 | 4.5 |" in text
    assert "| galore-8bit-nearest | 0.02 | 1 | +30.0 |  |  |" in text
    assert "| galore-moved | 0.02 | 1 | diverged: 1 |  |  |" in text
    assert "`python -m bench.pretrain --seeds 0,1,2`" in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r"formats: .*record\.json cannot be read: "),
        ("{", r"formats: .*record\.json cannot be read: "),
        ("{}", r"formats: .*record\.json is no record of bench\.pretrain"),
        ("[]", r"formats: .*record\.json is no record of bench\.pretrain"),
        ('{"runs": []}', r"formats: .*record\.json is no record of bench\.pretrain"),
    ],
)
def test_what_is_no_record_is_refused_in_one_line(tmp_path, text, message):
    path = tmp_path / "record.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit, match=message):
        formats.main([str(path)])


def test_without_pairs_or_without_a_record(tmp_path):
    path = tmp_path / "record.json"
    path.write_text(json.dumps(run("galore-8bit", 0, 1.0)))
    with pytest.raises(SystemExit, match=r"no pairs: .* X has to be there"):
        formats.main([str(path)])
    assert FIGURES["format_losses"](Records(tmp_path)).strip() == "**not measured**"
    assert "format_losses" in (report.README.parent / "bench" / "RESULTS.md").read_text()
