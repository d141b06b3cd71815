"""Times on paper against numbers written out by hand; the record is what the formulas say."""

import json
import math

import pytest
import torch
from torch import nn

from bench import gpus
from bench.figures import RESULTS
from bench.gpus import MACHINE, Matrices, Ring, Rings, Run
from lowrank_kernels import FiraAdamW
from lowrank_kernels.cli.traffic import Held, Layout, Needs, held_of

MODULE = nn.ModuleList([nn.Linear(2**12, 2**14, bias=False, device="meta") for _ in range(2)])
MODULE = MODULE.bfloat16()
ELEMENTS = 2 * 2**26


def test_rings_and_trees():
    """A ring of all leaves a node by eight cards, one of replicas by the card of its GPU."""
    rings = Rings.of(Layout.of("hsdp", 64, 8))
    assert rings == (Ring(8, 8), Ring(8, 1), Ring(64, 8))
    assert [ring.rate for ring in rings] == [350e9, 50e9, 350e9]
    assert [ring.latency for ring in rings] == pytest.approx(
        [8.4e-6 + 7 * 3.4e-6, 8.4e-6 + 7 * 9.6e-6, 8.4e-6 + 56 * 3.4e-6 + 7 * 9.6e-6]
    )
    assert Ring(64, 8).tree == pytest.approx(8.4e-6 + 2 * (7 * 0.94e-6 + 3 * 5e-6))
    assert Ring(1, 1).latency == Ring(1, 1).tree == 0
    assert Rings.of(Layout.of("hsdp", 16, 4)).replicas == Ring(4, 2)
    assert Rings.of(Layout.of("fsdp2", 64)) == (Ring(64, 8), Ring(1, 1), Ring(64, 8))


@pytest.mark.parametrize(("tokens", "passes"), [(8 * 2**13, 1), (8 * 2**13 + 8, 2), (8, 1)])
def test_passes_hide_what_is_sent_behind_products_or_the_other_way_round(tokens, passes):
    layout = Layout.of("fsdp2", 8)
    held = held_of(MODULE, layout)
    found = gpus.passes_of(MODULE, 2, layout, held, Run(tokens))
    forward = 2 * ELEMENTS * tokens / 8 / passes / (989e12 * 0.4)
    gathers = 7 / 8 * 2 * ELEMENTS / 350e9 + 3 * (8.4e-6 + 7 * 3.4e-6)
    expected = passes * (max(forward, gathers) + max(2 * forward, 2 * gathers))
    assert found == pytest.approx(expected)
    assert (forward > gathers) == (tokens > 8)


def test_replicas_reduce_shards_over_cards_of_their_own():
    layout, held = Layout.of("hsdp", 64, 8), Held(0, 2**20, 0, 0, 7 * 2**20 + 2**21)
    found = gpus.passes_of(nn.ModuleList(), 0, layout, held, Run(64))
    inside = 7 * 2**20 / 350e9 + 2 * (8.4e-6 + 7 * 3.4e-6) + (8.4e-6 + 7 * 3.4e-6)
    assert found == pytest.approx(inside + 2**21 / 50e9 + 2 * (8.4e-6 + 7 * 9.6e-6))


def test_the_update_is_memory_or_products():
    layout, shapes = Layout.of("fsdp2", 8), [(2**14, 2**12, 64), (2**14, 2**12, 64)]
    adamw = gpus.update_of(MODULE, Matrices([], 1), layout, False)
    assert adamw == pytest.approx(14 * ELEMENTS / 8 / 3.35e12 / 0.6)
    moved = 8 * ELEMENTS / 8 + 32 * 2 * 2**14 * 64 / 8 + 4 * 2 * 2**12 * 64
    fira = gpus.update_of(MODULE, Matrices(shapes, 200), layout, True)
    assert fira == pytest.approx(moved / 3.35e12 / 0.6)
    large = [(m, n, 4096) for m, n, _ in shapes]
    fira = gpus.update_of(MODULE, Matrices(large, 200), layout, True)
    assert fira == pytest.approx(4 * ELEMENTS * 4096 / 8 / 989e12 / 0.6)


def test_bases_of_owners_in_turn():
    """Of three matrices one or two are due in a step of two, on an owner each."""
    shape, layout = (2**14, 2**12, 64), Layout.of("fsdp2", 16)
    q = 64 + 8
    owned = 2 * 2**26 * 15 / 16 / 50e9 + 8.4e-6 + 9.6e-6
    owned += 40e-9 * q * q + (6 * q + 2 * 64) * 2**26 / 989e12 / 0.6
    owned += q * q * (10 * 2**12 + 3 * 2**14) / 67e12 / 0.6
    sent = 2 * 2**12 * 64 / 350e9 + 8.4e-6 + 14 * 3.4e-6 + 9.6e-6
    mean, largest = gpus.bases_of(Matrices([shape] * 3, 2), layout)
    assert mean == pytest.approx(owned + 1.5 * sent)
    assert largest == pytest.approx(owned + 2 * sent)
    mean, largest = gpus.bases_of(Matrices([shape], 200), layout)
    assert (mean, largest) == pytest.approx(((owned + sent) / 200, owned + sent))
    # Two GPUs take three due matrices in two rounds.
    mean, _ = gpus.bases_of(Matrices([shape] * 3, 1), Layout.of("fsdp2", 2))
    alone = gpus.factorized(*shape) + 2 * 2**26 / 2 / 350e9 + 8.4e-6 + 3.4e-6
    assert mean == pytest.approx(2 * alone + 3 * (2 * 2**12 * 64 / 350e9 + 8.4e-6 + 3.4e-6))


def test_what_optimizers_send():
    layout, matrices = Layout.of("fsdp2", 8), Matrices([(2**14, 2**12, 64)], 200)
    needs = Needs(0, 0, sent=2**20, collectives=3, bases_sent=0, bases_sent_a_step=0, largest=0)
    limiter = gpus.own_of(needs, matrices, layout, False)
    assert limiter == pytest.approx(3 * (8.4e-6 + 2 * 7 * 0.94e-6))
    orthogonal = gpus.own_of(needs, matrices, layout, True)
    m, n = 2**12, 2**14
    products = 5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n) / 8 / 989e12 / 0.6
    assert orthogonal == pytest.approx(2**20 / 350e9 + 3 * (8.4e-6 + 3.4e-6) + products)


def test_matrices_are_those_that_are_projected():
    shapes = ((20, 12), (12, 20), (30, 8))
    params = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    groups = [{"params": params[:2], "rank": 14, "update_proj_gap": 7}, {"params": params[2:]}]
    assert Matrices.of(FiraAdamW(groups)) == ([(20, 12, 12), (12, 20, 12)], 7)
    assert Matrices.of(None).shapes == []


def test_from_where_bases_show():
    rows = [{"gpus": n, "refresh": 0.05, "step": 80 / n} for n in (8, 16, 32)]
    assert gpus.shown_from(rows, 0.01) == 16
    assert gpus.shown_from(rows, 0.02) == 32
    assert gpus.shown_from(rows, 0.5) is None


@pytest.fixture(scope="module")
def kept():
    return json.loads((RESULTS / "gpus.json").read_text())


def test_the_record_is_what_its_command_computes(kept):
    assert kept["command"] == "python -m bench.gpus"
    assert kept["title"] == "computed, not measured"
    assert kept["machine"] == gpus.asdict(MACHINE)
    assert Run(**kept["run"]) == Run()
    cases = {(row["model"], row["shard"], row["gpus"]) for row in kept["rows"]}
    assert len(cases) == len(gpus.MODELS) * len(gpus.SHARDS) * len(gpus.GPUS)
    assert len(kept["rows"]) == len(cases) * len(gpus.METHODS)
    for row in gpus.rows_of("7b", (8, 512)):
        key = ("model", "shard", "gpus", "optimizer")
        (same,) = (r for r in kept["rows"] if all(r[name] == row[name] for name in key))
        assert same.keys() == row.keys()
        for name, value in row.items():
            wanted = value if isinstance(value, str) else pytest.approx(value, rel=1e-9)
            assert same[name] == wanted


def test_steps_of_the_record_are_their_parts(kept):
    for row in kept["rows"]:
        parts = [row[part] for part in ("passes", "update", "own", "refresh")]
        assert row["step"] == pytest.approx(math.fsum(parts))
        assert (row["refresh"] == 0) == (row["optimizer"] == "adamw")
        assert row["refresh_when_due"] >= row["refresh"]


def test_a_record_of_another_model(tmp_path, capsys):
    out = tmp_path / "gpus.json"
    gpus.main(["--models", "nano", "--out", str(out)])
    record = json.loads(out.read_text())
    assert record["command"] == "python -m bench.gpus --models nano"
    assert {row["model"] for row in record["rows"]} == {"nano"}
    assert "computed, not measured" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        gpus.main(["--models", "8b"])
