"""A campaign goes on where it was stopped, and says how everything ended."""

import json
import subprocess
import sys

import pytest

from bench import campaign, family, settings
from bench.campaign import Part


def part(name, code, **others):
    return Part(name, (sys.executable, "-c", code), **others)


def counting(folder, name, code=""):
    """A part that leaves a letter a run."""
    line = f"open({str(folder / name)!r}, 'a').write('x')"
    return part(name, f"{line}\n{code}")


def test_what_ended_well_is_not_run_again(tmp_path):
    todo = [counting(tmp_path, "good"), counting(tmp_path, "bad", "raise SystemExit(3)")]
    for _ in range(2):
        done = campaign.campaign(todo, tmp_path)
    assert (tmp_path / "good").read_text() == "x"
    assert (tmp_path / "bad").read_text() == "xx"
    assert done["bad"]["status"] == "exit status 3"
    assert json.loads((tmp_path / "campaign.json").read_text()) == done


def test_a_part_that_takes_too_long_is_stopped(tmp_path):
    done = campaign.campaign([part("slow", "import time; time.sleep(3600)")], tmp_path, seconds=1)
    assert done["slow"]["status"] == "too long"


def test_a_part_that_resumes_goes_on(tmp_path, monkeypatch):
    commands = []

    def stopped_once(command, *, timeout, **_):
        commands.append(command)
        (tmp_path / "run" / "work").mkdir(parents=True, exist_ok=True)
        if len(commands) == 1:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(campaign.subprocess, "run", stopped_once)
    command = ("pretrain", "--out", str(tmp_path / "run"))
    done = campaign.campaign([Part("run", command, resumes=True)], tmp_path)
    assert done["run"]["status"] == "ok"
    assert commands == [[*command], [*command, "--resume"]]


def test_a_missing_tool_is_named(tmp_path):
    done = campaign.campaign([part("check", "pass", needs="no-such-tool")], tmp_path)
    assert done["check"]["status"] == "not run: no-such-tool is not on PATH"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_parts_have_names_and_records_of_their_own(device, tmp_path):
    todo = campaign.parts(tmp_path, device, quick=False)
    names = [each.name for each in todo]
    assert len(set(names)) == len(names)
    places = [each.command[-1] for each in todo if "--out" in each.command]
    assert len(set(places)) == len(places)
    assert {"build", "selftest", "memory", "tests-bench", "tests-ops"} <= set(names)
    assert ("sanitize-memcheck" in names) == (device == "cuda")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_comparisons_have_arguments_that_are_known(device, tmp_path):
    todo = [part for part in campaign.parts(tmp_path, device, quick=False) if part.resumes]
    for each in todo:
        bench, arguments = each.command[2], [*each.command[3:], "--resume", "--device", "cpu"]
        if bench == "bench.pretrain":
            settings.parse(arguments)
        elif bench == "bench.family":
            family.parse(arguments)
    assert ("family-60m-cuda" in [each.name for each in todo]) == (device == "cuda")


def test_on_a_gpu_kernels_go_before_what_needs_none(tmp_path):
    names = [part.name for part in campaign.parts(tmp_path, "cuda", quick=False)]
    tests = [name for name in names if name.startswith("tests-")]
    others = [name for name in names if not name.startswith("tests-") and name != "memory"]
    assert max(map(names.index, others)) < min(map(names.index, tests))
    assert names.index("kernels-1b-7b-cuda") < names.index("sanitize-memcheck")


def test_the_list_runs_nothing(tmp_path, capsys):
    campaign.main(["--out", str(tmp_path), "--list", "--device", "cuda"])
    assert "tune-7b" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_part_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        campaign.main(["--out", str(tmp_path), "--only", "kernels-cpu,nonsense", "--device", "cpu"])
    assert error.value.code == 2
    assert "no such part: nonsense" in capsys.readouterr().err


def test_a_part_that_fails_fails_the_campaign(tmp_path, monkeypatch):
    todo = [part("bad", "raise SystemExit(1)")]
    monkeypatch.setattr(campaign, "parts", lambda *_: todo)
    with pytest.raises(SystemExit, match="bad did not end well"):
        campaign.main(["--out", str(tmp_path)])
