"""Every figure of the README is the one of its record."""

import re

import pytest

from bench import report
from bench.figures import FIGURES, NOT_MEASURED, Records
from bench.record import write_lines

TEXTS = {document.name: document.read_text() for document in report.DOCUMENTS}
ROOT = report.README.parent


def test_the_documents_say_what_the_records_say():
    report.main(["--check"])


def test_the_documents_show_figures_and_only_known_ones():
    shown = {name for text in TEXTS.values() for name, _ in report.MARKED.findall(text)}
    assert shown == set(FIGURES)


@pytest.mark.parametrize("name", TEXTS)
def test_nothing_that_looks_measured_stands_outside_of_the_figures(name):
    assert report.untraced(TEXTS[name]) == []


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


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda path: path.name)
def test_a_changed_figure_is_found(document, tmp_path):
    text = TEXTS[document.name]
    matches = [match for match in report.MARKED.finditer(text) if re.search(r"\d", match[2])]
    for match in matches:
        at = match.start(2) + re.search(r"\d", match[2]).start()
        changed = f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}"
        copy = tmp_path / document.name
        copy.write_text(changed)
        with pytest.raises(SystemExit, match="differs from the records"):
            report.main(["--check", "--documents", str(copy)])


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_tells_its_record(name):
    text = FIGURES[name](Records())
    if name in INLINE:
        assert "\n" not in text
        return
    places = re.findall(r"\]\((bench/results/[\w/-]+\.json)\)", text)
    assert all((ROOT / place).exists() for place in places)
    assert places or NOT_MEASURED in text or name == "accounting"


INLINE = ("rank_course", "captured", "cuda_compile", "published_bf16", "published_8bit")
INLINE += ("saved_to_8bit", "saved_to_bf16", "projected_speed", "family_losses")


@pytest.mark.parametrize("name", ["gpus_steps", "gpus_refreshes", "offload_speeds"])
def test_what_is_computed_is_called_so(name):
    assert "**Computed, not measured.**" in FIGURES[name](Records())


def test_what_no_gpu_has_run_is_said_so_and_what_one_has_is_shown(tmp_path):
    assert FIGURES["gpu_goals"](Records(tmp_path)).count(NOT_MEASURED) == 10
    row = {"results": {name: {"ms": 2.0} for name in ("fira", "adamw")}}
    row["results"]["adamw"]["ms"] = 5.0
    row["results"]["fira"]["launches"] = 9
    write_lines(tmp_path / "model_step-60m-cuda.json", {"bench": "model_step"}, "rows", [row])
    text = FIGURES["gpu_goals"](Records(tmp_path))
    assert text.count(NOT_MEASURED) == 8
    assert "| 2.50x |" in text
    assert "| 9 |" in text


def test_pictures_are_drawn_from_the_records(tmp_path):
    pictures = report.draw(Records(), tmp_path, "".join(TEXTS.values()))
    names = {picture.name for picture in pictures}
    assert {"kernels-cpu.png", "ranks-cpu.png", "sizes-cpu.png", "memory.png", "gpus.png"} <= names
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 20_000


PICTURES_OF = {"README.md": 4, "RESULTS.md": 4, "many-gpus.md": 1, "activations.md": 0}


@pytest.mark.parametrize("document", report.DOCUMENTS, ids=lambda path: path.name)
def test_every_picture_and_link_of_a_document_is_there(document):
    places = re.findall(r"\]\((?!http)([^)#]+)\)", TEXTS[document.name])
    assert sum(place.endswith(".png") for place in places) >= PICTURES_OF[document.name]
    missing = [place for place in places if not (document.parent / place).exists()]
    assert missing == []


def test_goals_are_read_from_a_first_contact_too(tmp_path):
    """Where a model has no record of its own, and nothing that it lacks is invented."""

    def row(model, rank, ms, **other):
        results = {"fira": {"ms": ms, "launches": 10}, "adamw": {"ms": 3.0}}
        common = {"part": "models", "dtype": "bf16", "backend": "triton", "wrong": {}}
        return common | {"model": model, "rank": rank, "results": results} | other

    rows = [
        {"part": "models", "case": "60m r128 bf16 triton", "error": "raised"},
        row("60m", 128, 9.0, backend="native"),
        row("60m", 64, 9.0),
        row("60m", 128, 2.0),
    ]
    write_lines(tmp_path / "first_contact-cuda.json", {"runs": []}, "rows", rows)
    text = FIGURES["gpu_goals"](Records(tmp_path))
    assert text.count(NOT_MEASURED) == 8
    assert "| 1.50x |" in text
    assert "| 10 |" in text
