import re
from dataclasses import asdict, replace

import pytest

from bench.pretrain import start
from bench.settings import Job, parse, parse_lrs, parse_scales, plan


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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (0.25, {"muon": [0.4]})),
        (["0.5"], (0.5, {"muon": [0.4]})),
        (["muon=0.2,0.8", "0.5"], (0.5, {"muon": [0.2, 0.8]})),
        (["fira@16=0.1"], (0.25, {"muon": [0.4], "fira@16": [0.1]})),
    ],
)
def test_scales(words, expected):
    assert parse_scales(words, ["adamw", "muon", "fira@16"]) == expected


def test_a_job_tells_its_scale_and_rank_where_there_is_one():
    lrs = {"adamw": [1e-3], "muon@b0.9": [5e-3], "fira@16": [1e-2]}
    jobs = plan(lrs, [0], {"muon@b0.9": [0.2, 0.4]})
    assert [job.name for job in jobs] == [
        "adamw-lr0.001-seed0",
        "muon@b0.9-lr0.005-scale0.2-seed0",
        "muon@b0.9-lr0.005-scale0.4-seed0",
        "fira@16-lr0.01-seed0",
    ]


def test_what_a_job_changes_in_the_recipe():
    """A scale is alpha of what is split, and the method's own of what has one."""
    settings = parse(["--optimizers", "muon,fira", "--scale", "0.5"]).settings
    assert settings.recipe_of(Job("fira", 1e-2, 0)).scale == 0.5
    fira = settings.recipe_of(Job("fira@16", 1e-2, 0, 0.1))
    assert (fira.scale, fira.own_scale, fira.beta) == (0.1, 1.0, None)
    muon = settings.recipe_of(Job("muon@b0.9", 1e-2, 0, 0.1))
    assert (muon.scale, muon.own_scale, muon.beta) == (0.5, 0.1, 0.9)


def test_tokens_per_batch_instead_of_sequences():
    settings = parse(["--tokens-per-batch", "4096"]).settings
    assert (settings.batch_size, settings.micro_batch) == (32, 8)
    bytes_9m = parse(["--model", "9m-bytes"]).settings
    assert bytes_9m.batch_size * bytes_9m.seq_len == 4096


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
        (["--scale", "adamw=0.1"], "adamw has no scale"),
        (["--scale", "0.1,0.2"], "--scale 0.1,0.2: there is one alpha; or give NAME=0.1,0.2"),
        (["--scale", "big"], r"--scale big: give SCALE\[,SCALE...\] or NAME=SCALE"),
        (["--optimizers", "adamw@16"], "adamw@16: adamw takes no options"),
        (["--tokens-per-batch", "1000"], "must be a multiple of 128"),
        (["--micro-batch", "3"], "--micro-batch 3 must divide the batch, 8"),
        (["--weights", "nowhere.pt"], "--weights nowhere.pt is no file"),
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


def test_what_an_older_comparison_does_not_tell_had_its_usual_value():
    settings = parse([]).settings
    older = {name: value for name, value in asdict(settings).items() if name != "autocast"}
    assert settings.differences(older) == []
    assert replace(settings, autocast=True).differences(older) == ["autocast was False, is True"]
    assert settings.differences(older | {"rank": 99}) == [f"rank was 99, is {settings.rank}"]
