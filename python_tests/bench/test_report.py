"""Every figure of the README is the one of its record."""

import re

import pytest

from bench import report
from bench.figures import FIGURES, NOT_MEASURED, Records
from bench.record import write_lines

README = report.README.read_text()


def test_the_readme_says_what_the_records_say():
    report.main(["--check"])


def test_the_readme_shows_figures_and_only_known_ones():
    shown = [name for name, _ in report.MARKED.findall(README)]
    assert len(shown) > 8
    assert set(shown) <= set(FIGURES)


def test_nothing_that_looks_measured_stands_outside_of_the_figures():
    assert report.untraced(README) == []


@pytest.mark.parametrize(
    "line",
    [
        "a step takes 12.3 ms",
        "| fira | 1.9x |",
        "it saves 65 % of",
        "2,345 tokens/s",
        "uses 7.1 GB",
    ],
)
def test_a_figure_without_a_record_is_found(line):
    assert report.untraced(f"text\n{line}\nmore") == [line]
    assert report.untraced(f"<!-- figure: demo -->\n{line}\n<!-- end -->") == []


def test_a_changed_figure_is_found(tmp_path):
    match = report.MARKED.search(README)
    digit = re.search(r"\d", match[2])
    at = match.start(2) + digit.start()
    changed = f"{README[:at]}{(int(digit[0]) + 1) % 10}{README[at + 1 :]}"
    (tmp_path / "README.md").write_text(changed)
    with pytest.raises(SystemExit, match="differs from the records"):
        report.main(["--check", "--readme", str(tmp_path / "README.md")])


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_tells_its_record(name):
    text = FIGURES[name](Records())
    if name in INLINE:
        assert "\n" not in text
        return
    places = re.findall(r"\]\((bench/results/[\w/-]+\.json)\)", text)
    assert all((report.README.parent / place).exists() for place in places)
    assert places or name in ("gpu_goals", "accounting")


INLINE = ("rank_course", "step_means", "captured", "cuda_compile")


def test_what_no_gpu_has_run_is_said_so_and_what_one_has_is_shown(tmp_path):
    assert FIGURES["gpu_goals"](Records(tmp_path)).count(NOT_MEASURED) == 8
    row = {"results": {name: {"ms": 2.0} for name in ("fira", "adamw")}}
    row["results"]["adamw"]["ms"] = 5.0
    row["results"]["fira"]["launches"] = 9
    write_lines(tmp_path / "model_step-60m-cuda.json", {"bench": "model_step"}, "rows", [row])
    text = FIGURES["gpu_goals"](Records(tmp_path))
    assert text.count(NOT_MEASURED) == 6
    assert "| 2.50x |" in text
    assert "| 9 |" in text


def test_pictures_are_drawn_from_the_records(tmp_path):
    pictures = report.draw(Records(), tmp_path)
    names = {picture.name for picture in pictures}
    assert {"kernels-cpu.png", "ranks-cpu.png", "sizes-cpu.png", "memory.png"} <= names
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 20_000


def test_every_picture_of_the_readme_is_there():
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README)
    assert len(pictures) > 4
    assert all((report.README.parent / picture).exists() for picture in pictures)
