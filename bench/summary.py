"""What a comparison leaves: the summary by optimizer and rate, its tables, and the JSON record."""

from __future__ import annotations

import math
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.data import DataSummary
from bench.record import device_name, head, write_lines
from bench.settings import Settings, plan

PEAK_MEANING = {
    "cuda": "most that the CUDA allocator had handed out.",
    "cpu": "growth of the run's resident set, with what libraries and their threads keep.",
}


@dataclass(frozen=True)
class Summary:
    """One optimizer at one rate: means over seeds, and the sample deviation of the loss."""

    optimizer: str
    lr: float
    best: bool
    at_edge: bool
    loss: float
    deviation: float
    bits_per_byte: float
    tokens_per_second: float
    optimizer_ms: float
    slowest_optimizer_ms: float
    state_bytes: int
    peak_bytes: int
    scale: float | None = None

    @property
    def rates(self) -> str:
        """The rate, and the scale if there is one."""
        return f"{self.lr:g}" if self.scale is None else f"{self.lr:g}, scale {self.scale:g}"

    def has(self, record: dict) -> bool:
        """Whether a run is among those that this sums up."""
        return _point(record) == (self.optimizer, self.lr, self.scale)

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf


def summarize(records: list[dict], settings: Settings, data: DataSummary) -> list[Summary]:
    """Groups the records by optimizer and rate, and marks each optimizer's best rate."""
    summaries = []
    jobs = plan(settings.lrs, settings.seeds, settings.scales)
    for optimizer in settings.lrs:
        points = dict.fromkeys((job.lr, job.scale) for job in jobs if job.optimizer == optimizer)
        groups = {
            point: [r for r in records if _point(r) == (optimizer, *point)] for point in points
        }
        losses = {point: [final_loss(record) for record in groups[point]] for point in points}
        best = min(points, key=lambda point: statistics.mean(losses[point]))
        for point in points:
            summaries.append(
                Summary(
                    optimizer,
                    point[0],
                    best=point == best,
                    at_edge=any(map(_at_edge, point, zip(*points, strict=True))),
                    loss=statistics.mean(losses[point]),
                    deviation=_deviation(losses[point]),
                    **_costs(groups[point], settings),
                    bits_per_byte=statistics.mean(losses[point]) * _bits_per_nat(data),
                    scale=point[1],
                )
            )
    return summaries


def _point(record: dict) -> tuple[str, float, float | None]:
    return record["optimizer"], record["lr"], record.get("scale")


def _at_edge(value: float | None, values: tuple[float | None, ...]) -> bool:
    """Of a sweep; where nothing was swept there is none."""
    tried = {each for each in values if each is not None}
    return len(tried) > 1 and value in (min(tried), max(tried))


def final_loss(record: dict) -> float:
    """Returns the last validation loss; infinity after a divergence."""
    loss = record["validation"][-1][1] if record["validation"] else math.nan
    finished = math.isfinite(record["train_loss"][-1]) and math.isfinite(loss)
    return loss if finished else math.inf


def _deviation(losses: list[float]) -> float:
    finite = len(losses) > 1 and all(map(math.isfinite, losses))
    return statistics.stdev(losses) if finite else 0.0


def _bits_per_nat(data: DataSummary) -> float:
    return data.validation_tokens / data.validation_bytes / math.log(2)


def _costs(records: list[dict], settings: Settings) -> dict:
    steps = [seconds for record in records for seconds in record["step_seconds"]]
    optimizer = [seconds for record in records for seconds in record["optimizer_seconds"]]
    return {
        "tokens_per_second": settings.batch_size * settings.seq_len / statistics.median(steps),
        "optimizer_ms": statistics.median(optimizer) * 1e3,
        "slowest_optimizer_ms": max(optimizer) * 1e3,
        "state_bytes": max(record["state_bytes"] for record in records),
        "peak_bytes": max(record["peak_bytes"] for record in records),
    }


def print_tables(records: list[dict], settings: Settings, data: DataSummary) -> None:
    """Prints a row an optimizer at its best rate, and where rates were swept, a row a rate."""
    summaries = summarize(records, settings, data)
    # Piped output has no width of its own, and 80 columns would cut the numbers off.
    console = Console(width=None if sys.stdout.isatty() else 112)
    console.print(_main_table(summaries, records[0], settings))
    console.print(
        "optimizer, slowest: median and longest optimizer.step(). state: the optimizer's tensors.\n"
        f"peak: {PEAK_MEANING[settings.device]}",
        style="dim",
    )
    if not all(row.best for row in summaries):
        console.print(_sweep_table(summaries))


def _main_table(summaries: list[Summary], record: dict, settings: Settings) -> Table:
    tokens = settings.steps * settings.batch_size * settings.seq_len
    size = f"{record['parameters'] / 1e6:.2f} M parameters, {settings.dtype}"
    run = f"{tokens / 1e6:.2f} M tokens, {len(settings.seeds)} seed(s)"
    table = Table(title=f"LLaMA {settings.model}, {size}, {run}, {device_name(settings.device)}")
    table.add_column("optimizer", no_wrap=True)
    for heading in (
        *("best\nlr", "validation\nloss", "perplexity", "bits per\nbyte", "tokens\nper s"),
        *("optimizer\nms", "slowest\nms", "state\nMB", "peak\nMB"),
    ):
        table.add_column(heading, justify="right")
    for row in (summary for summary in summaries if summary.best):
        table.add_row(
            row.optimizer,
            row.rates,
            _loss_text(row),
            f"{row.perplexity:.3f}",
            f"{row.bits_per_byte:.3f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.optimizer_ms:.2f}",
            f"{row.slowest_optimizer_ms:.1f}",
            f"{row.state_bytes / 1e6:.2f}",
            f"{row.peak_bytes / 1e6:.0f}",
        )
    return table


def _sweep_table(summaries: list[Summary]) -> Table:
    table = Table(title="learning rates", caption="edge: the true best may lie outside the sweep")
    for heading in ("optimizer", "lr", "val loss", ""):
        table.add_column(heading)
    for row in summaries:
        mark = ("best, edge" if row.at_edge else "best") if row.best else ""
        table.add_row(row.optimizer, row.rates, _loss_text(row), mark)
    return table


def _loss_text(row: Summary) -> str:
    return f"{row.loss:.4f} ± {row.deviation:.4f}" if row.deviation else f"{row.loss:.4f}"


def write_record(
    records: list[dict],
    settings: Settings,
    data: DataSummary,
    path: Path,
    arguments: list[str] | None = None,
) -> None:
    """Writes everything that was measured."""
    facts = {
        "settings": asdict(settings),
        "data": asdict(data),
        "summary": [asdict(summary) for summary in summarize(records, settings, data)],
    }
    write_lines(path, head("pretrain", settings.device, arguments or [], **facts), "runs", records)
