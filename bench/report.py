"""From the records in `bench/results` to the figures of the documents and to the pictures.

    python -m bench.report            # writes both
    python -m bench.report --check    # exit status 1 if a document does not say what the records do

In the README, in bench/RESULTS.md and in the pages of docs (`PAGES`) a figure stands between
`<!-- figure: NAME -->` and `<!-- end -->`; `bench.figures` has a function of that name.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bench.figures import FIGURES, RESULTS, Records

README = Path(__file__).parents[1] / "README.md"
# How a document names the folder of this file.
HERE = {README: "bench/", README.parent / "bench" / "RESULTS.md": ""}
PAGES = ("many-gpus", "activations")
HERE |= {README.parent / "docs" / f"{name}.md": "../bench/" for name in PAGES}
DOCUMENTS = tuple(HERE)
MARKED = re.compile(r"<!-- figure: (\w+) -->(.*?)<!-- end -->", re.DOTALL)
# What a measurement has behind its number, and settings or published numbers hardly ever.
UNIT = r"(\s?(ms|MB|GB|GB/s|TFLOP/s|tokens/s|%|times as fast|registers)|x)"
MEASURED = re.compile(rf"(?<![\w.])\d[\d.,]*{UNIT}(?![\w%/])")


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


def draw(records: Records, folder: Path, shown: str) -> list[Path]:
    """Draws what there are records for: of comparisons, the pictures that a document shows."""
    # Drawing libraries take seconds to import, which a check does not need.
    from bench import plots
    from bench.data import DataSummary
    from bench.picture import PICTURES, Comparison
    from bench.settings import Settings

    pictures = []
    for device in ("cpu", "cuda"):
        for name, paint in plots.PICTURES.items():
            if f"{name}-{device}" in records:
                pictures.append(folder / f"{name}-{device}.png")
                paint(records[f"{name}-{device}"], pictures[-1])
    for name, paint in plots.COUNTED.items():
        if name in records:
            pictures.append(folder / f"{name}.png")
            paint(records[name], pictures[-1])
    for name in sorted(path.stem for path in records.folder.glob("family*.json")):
        pictures.append(folder / f"{name}.png")
        plots.draw_family(records[name], pictures[-1])
    for place in sorted(path.parent.name for path in records.folder.glob("*/pretrain.json")):
        found = records[f"{place}/pretrain"]
        about = Settings(**found["settings"]), DataSummary(**found["data"])
        comparison = Comparison(found["runs"], *about, found["environment"]["device"])
        for name, paint in PICTURES.items():
            if f"{place}/{name}.png" in shown:
                (folder / place).mkdir(exist_ok=True)
                pictures.append(folder / place / f"{name}.png")
                paint(comparison, pictures[-1])
    return pictures


def written(document: Path, records: Records) -> str:
    """What a document has to say; its links start where the document of its name lies."""
    here = next(place for path, place in HERE.items() if path.name == document.name)
    return filled(document.read_text(), records).replace("](bench/", f"]({here}")


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
        shown = "".join(document.read_text() for document in options.documents)
        for path in draw(records, options.results, shown):
            print(path)


if __name__ == "__main__":
    main()
