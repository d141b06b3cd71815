"""Figures of the time of a step: of single matrices, whole models, kernels and refreshes."""

from __future__ import annotations

from bench.figures.common import Records, by, figure, ms, source, span_text, table


@figure
def step_matrices(records: Records) -> str:
    """Ours and the rivals, a row a shape: the ratios over dtypes and sides, least to most."""
    record, lines = records["step-cpu"], []
    for method, official in (("fira", "fira 1.0.2"), ("galore", "galore-torch 1.0")):
        mine = by(record["rows"], method=method)
        shapes = dict.fromkeys((*sorted((r["rows"], r["cols"])), r["rank"]) for r in mine)
        for small, large, rank in shapes:
            some = [r for r in mine if sorted((r["rows"], r["cols"])) == [small, large]]
            some = [r for r in some if r["rank"] == rank]
            cells = [
                span_text(r["times_faster"][name] for r in some) for name in ("official", "torch")
            ]
            products = span_text(1 / r["times_faster"]["products"] for r in some)
            adamw = span_text(1 / r["times_faster"]["fused AdamW"] for r in some)
            shape = f"{small} x {large}, r {rank}"
            lines.append((method, official, shape, *cells, products, adamw))
        mean = record["geometric_means"][method]
        cells = [f"**{mean[name]:.2f}**" for name in ("official", "torch")]
        inverse = [f"**{1 / mean[name]:.2f}**" for name in ("products", "fused AdamW")]
        lines.append((method, official, "geometric mean", *cells, *inverse))
    headings = (
        "",
        "official package",
        "matrix",
        "times as fast as it",
        "as torch's own operations",
    )
    headings += ("our time in bare products", "in fused AdamW's steps")
    return table(headings, lines, source(records, "step-cpu"))


@figure
def model_steps(records: Records) -> str:
    """Every optimizer on a whole model."""
    record, lines = records["model_step-cpu"], []
    dtypes = list(dict.fromkeys(row["dtype"] for row in record["rows"]))
    rows = {row["dtype"]: row for row in record["rows"]}
    known = dict.fromkeys(name for row in rows.values() for name in row["results"])
    for optimizer in known:
        cells = []
        for dtype in dtypes:
            own = rows[dtype]["results"].get(optimizer)
            if own is None:
                cells += ["", "", ""]
                continue
            room = own["workspace_bytes"]
            cells += [
                ms(own),
                f"{own['state_bytes'] / 1e6:.0f}",
                "" if room is None else f"{room / 1e6:.1f}",
            ]
        lines.append((optimizer, *cells))
    lines += [
        (f"{name}: {reason}", *[""] * 3 * len(dtypes)) for name, reason in record["missing"].items()
    ]
    headings = [h for d in dtypes for h in (f"{d}: ms", "state MB", "workspace MB")]
    return table(("optimizer", *headings), lines, source(records, "model_step-cpu"))


@figure
def kernels(records: Records) -> str:
    """Shares of the floor, least to most over shapes, ours and torch's operations."""
    record, lines = records["kernels-cpu"], []
    own = record["backend"]
    for method in ("galore", "fira"):
        for operation in ("project_moments", "channel_scale", "back_project_update", "step"):
            cells = []
            for dtype in record["rates"]:
                some = by(record["rows"], method=method, operation=operation, dtype=dtype)
                for name in (own, "torch"):
                    shares = [100 * row["results"][name]["share_of_floor"] for row in some]
                    cells.append(f"{min(shares):.0f} to {max(shares):.0f} %" if shares else "")
            if any(cells):
                lines.append((method, f"`{operation}`", *cells))
    headings = [f"{d}: {n}" for d in record["rates"] for n in (own, "torch's operations")]
    return table(("", "operation", *headings), lines, source(records, "kernels-cpu"))


@figure
def refresh(records: Records) -> str:
    """Range finders beside an SVD, synthetic gradients."""
    record, lines = records["refresh-cpu"], []
    made = [row for row in record["rows"] if row["gradient"].startswith("synthetic")]
    for key in dict.fromkeys((r["rows"], r["cols"], r["rank"], r["gradient"]) for r in made):
        some = {
            r["finder"]: r for r in made if (r["rows"], r["cols"], r["rank"], r["gradient"]) == key
        }
        exact, own = some["torch.linalg.svd"], some["randomized"]
        lines.append(
            (
                f"{key[0]} x {key[1]}, r {key[2]}, {key[3].split()[-1]}",
                f"{exact['ms']:.0f}",
                f"{own['ms']:.1f}",
                f"{own['times_faster_than_svd']:.1f}x",
                f"{100 * own['captured']:.1f} %",
                f"{100 * own['share_of_step']:.1f} %",
            )
        )
    headings = ("gradient", "`torch.linalg.svd`, ms", "randomized, ms", "times as fast")
    headings += ("of its energy", "of a Fira step, every 200")
    return table(headings, lines, source(records, "refresh-cpu"))


@figure
def captured(records: Records) -> str:
    """Least share of an SVD's energy over saved gradients, with one and two iterations."""
    rows = records["refresh-cpu"]["rows"]
    real = [row for row in rows if not row["gradient"].startswith("synthetic")]
    least = [
        min(row["captured"] for row in by(real, finder=finder))
        for finder in ("randomized", "randomized, 2 iterations")
    ]
    return f"{100 * least[0]:.2f} % ({100 * least[1]:.2f} % with two power iterations)"
