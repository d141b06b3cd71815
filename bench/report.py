"""From the records in `bench/results` to the figures of the documents and to the pictures.

    python -m bench.report            # writes both
    python -m bench.report --check    # exit status 1 if a document does not say what the records do

In the README and in bench/RESULTS.md a figure stands between `<!-- figure: NAME -->` and
`<!-- end -->`; `bench.figures` has a function of that name.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bench.figures import FIGURES, RESULTS, Records

README = Path(__file__).parents[1] / "README.md"
DOCUMENTS = (README, Path(__file__).parent / "RESULTS.md")
MARKED = re.compile(r"<!-- figure: (\w+) -->(.*?)<!-- end -->", re.DOTALL)
# What a measurement has behind its number, and settings or published numbers hardly ever.
UNIT = r"(ms|MB|GB|GB/s|TFLOP/s|tokens/s|%|x|times as fast|registers)"
MEASURED = re.compile(rf"(?<![\w.])\d[\d.,]*\s?{UNIT}(?![\w%/])")


def filled(text: str, records: Records) -> str:
    """The text with every figure as the records have it.

    Raises:
        KeyError: a figure is asked for that nobody computes.
    """

    def fill(match: re.Match) -> str:
        return f"<!-- figure: {match[1]} -->{FIGURES[match[1]](records)}<!-- end -->"

    return MARKED.sub(fill, text)


def untraced(text: str) -> list[str]:
    """Lines with numbers that look measured and stand outside of every figure."""
    rest = re.sub(r"```.*?```", "", MARKED.sub("", text), flags=re.DOTALL)
    return [line.strip() for line in rest.splitlines() if MEASURED.search(line)]


def draw(records: Records, folder: Path) -> list[Path]:
    """Draws what there are records for."""
    # Drawing libraries take seconds to import, which a check does not need.
    from bench import plots
    from bench.data import DataSummary
    from bench.picture import draw_all
    from bench.settings import Settings

    pictures = []
    for device in ("cpu", "cuda"):
        for name, paint in (
            ("kernels", plots.draw_roofline),
            ("ranks", plots.draw_ranks),
            ("sizes", plots.draw_sizes),
        ):
            if f"{name}-{device}" in records:
                record, path = records[f"{name}-{device}"], folder / f"{name}-{device}.png"
                paint(record, record["rows"], path)
                pictures.append(path)
    if "memory" in records:
        plots.draw_memory(records["memory"]["rows"], folder / "memory.png")
        pictures.append(folder / "memory.png")
    for record in sorted(records.folder.glob("*/pretrain.json")):
        found = records[f"{record.parent.name}/pretrain"]
        about = Settings(**found["settings"]), DataSummary(**found["data"])
        place = folder / record.parent.name
        place.mkdir(exist_ok=True)
        pictures += draw_all(found["runs"], *about, found["environment"]["device"], place)
    return pictures


def written(document: Path, records: Records) -> str:
    """What a document has to say; its links start where it lies."""
    text = filled(document.read_text(), records)
    return text if document.parent == README.parent else text.replace("](bench/", "](")


def main(arguments: list[str] | None = None) -> None:
    line = argparse.ArgumentParser(prog="python -m bench.report")
    line.add_argument("--results", type=Path, default=RESULTS, help="records, and the pictures")
    line.add_argument("--documents", type=Path, nargs="+", default=DOCUMENTS)
    line.add_argument("--check", action="store_true", help="changes nothing")
    options = line.parse_args(arguments)
    records = Records(options.results)
    for document in options.documents:
        after = written(document, records)
        if not options.check:
            document.write_text(after)
        elif after != document.read_text():
            sys.exit(f"report: {document.name} differs from the records; python -m bench.report")
    if not options.check:
        for path in draw(records, options.results):
            print(path)


if __name__ == "__main__":
    main()
