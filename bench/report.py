"""From the records in `bench/results` to the README's figures and to the pictures.

    python -m bench.report            # writes both
    python -m bench.report --check    # exit status 1 if the README does not say what the records do

In the README a figure stands between `<!-- figure: NAME -->` and `<!-- end -->`; `bench.figures`
has a function of that name.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from bench.figures import FIGURES, RESULTS, Records

README = Path(__file__).parents[1] / "README.md"
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
    return pictures


def main(arguments: list[str] | None = None) -> None:
    line = argparse.ArgumentParser(prog="python -m bench.report")
    line.add_argument("--results", type=Path, default=RESULTS, help="records, and the pictures")
    line.add_argument("--readme", type=Path, default=README)
    line.add_argument("--check", action="store_true", help="changes nothing")
    options = line.parse_args(arguments)
    records = Records(options.results)
    before = options.readme.read_text()
    after = filled(before, records)
    if options.check:
        if before != after:
            sys.exit(
                "report: the README differs from the records; python -m bench.report writes it"
            )
        return
    options.readme.write_text(after)
    for path in draw(records, options.results):
        print(path)


if __name__ == "__main__":
    main()
