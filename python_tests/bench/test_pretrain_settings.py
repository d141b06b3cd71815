import re

import pytest

from bench.pretrain import start
from bench.settings import parse, parse_lrs, plan


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["1e-3,3e-3"], {"adamw": [1e-3, 3e-3], "fira": [1e-3, 3e-3]}),
        (["adamw=1e-3,3e-3", "fira=1e-2"], {"adamw": [1e-3, 3e-3], "fira": [1e-2]}),
        (["fira=1e-2", "5e-3"], {"adamw": [5e-3], "fira": [1e-2]}),
    ],
)
def test_lrs(words, expected):
    assert parse_lrs(words, ["adamw", "fira"], nano=True) == expected


def test_every_optimizer_has_one_default_lr():
    lrs = parse([]).settings.lrs
    assert list(lrs) == ["adamw", "adamw-split", "galore", "adarankgrad", "fira"]
    assert all(len(rates) == 1 for rates in lrs.values())


def test_plan_is_every_combination():
    jobs = plan({"adamw": [1e-3, 3e-3], "fira": [1e-2]}, [0, 1])
    assert len({job.name for job in jobs}) == len(jobs) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "adamw,firra"], "unknown optimizer 'firra'.*adamw-split, galore, .*fira"),
        (["--model", "8b"], "'?8b'?.*60m.*7b"),
        (
            ["--lr", "soap=1e-3"],
            "'soap' is not among adamw, adamw-split, galore, adarankgrad, fira",
        ),
        (["--lr", "fast"], "RATE"),
        (["--micro-batch", "3"], "--micro-batch 3 must divide the batch, 8"),
    ],
)
def test_mistakes_end_with_the_known_names(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert re.search(message, capsys.readouterr().err)


def test_resume_with_other_arguments_names_the_difference(tiny, tmp_path):
    arguments = [*tiny, "--out", str(tmp_path)]
    start(parse(arguments))
    with pytest.raises(ValueError, match=r"rank was 8, is 16; clip was 1.0, is 2.0$"):
        start(parse([*arguments, "--rank", "16", "--clip", "2", "--resume"]))
    start(parse([*arguments, "--resume"]))


def test_resume_with_other_text_is_refused(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("some text\n" * 100)
    arguments = [*tiny, "--data", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]
    start(parse(arguments))
    (tmp_path / "a.txt").write_text("other text\n" * 100)
    with pytest.raises(ValueError, match="the text's digest was"):
        start(parse([*arguments, "--resume"]))


def test_an_unfinished_comparison_is_not_dropped_silently(tiny, tmp_path):
    arguments = [*tiny, "--out", str(tmp_path)]
    with pytest.raises(ValueError, match="nothing to resume"):
        start(parse([*arguments, "--resume"]))
    start(parse(arguments))
    with pytest.raises(ValueError, match="unfinished comparison: --resume goes on"):
        start(parse(arguments))
    start(parse([*arguments, "--overwrite"]))
