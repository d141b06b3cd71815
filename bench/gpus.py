"""How long would a step take on 8 to 4,096 GPUs? COMPUTED, NOT MEASURED.

    python -m bench.gpus --out bench/results/gpus.json

From formulas and from what data sheets say of an H100 (`Machine`, each constant with its source);
nothing here has run on several GPUs. A step of a batch of so many tokens in all, in bfloat16:

    step = passes (max(forward, gathers) + max(backward, gathers + reduces)) + update + own + bases

- Products of forward and backward: 2 and 4 a weight and token, of linear layers alone.
- Gathers and reduces are `lowrank_kernels.cli.traffic`'s bytes, over rings: a ring that g GPUs of a
  node take part in leaves it by g network cards. They are hidden behind products but for what is
  longer, and each block has its own, with a latency a hop.
- The update reads and writes what is local once, or multiplies, whichever takes longer.
- Own: what the optimizer sends in a step. Small all-reduces go over trees.
- Bases are due in turn, count / `update_proj_gap` a step, each factorized by an owner, at the same
  time as others; G comes to it over its own card, and bases go out over a ring. Nothing of it is
  hidden. That is the mean of all steps; `refresh_when_due` is what the largest adds to its step.

What is left out: attention's own products, pipelines, other jobs on the network, stragglers, the
host, and memory for activations. The eigenvalues of the sketch are the largest part of a basis, and
the one constant without a source: see `eigh`.
"""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from rich.table import Table
from torch import nn

from bench.options import about, words
from bench.record import head, write_lines
from bench.tables import new_table, progress, show
from lowrank_kernels import FiraAdamW, GaLoreAdamW, LowRankAdamW, param_groups
from lowrank_kernels.cli.models import PLANNED, llama
from lowrank_kernels.cli.traffic import Held, Layout, Needs, adamw_needs, held_of, needs_of
from lowrank_kernels.ops.orthogonal import STEPS
from lowrank_kernels.optim.groups import is_projected

TITLE = "computed, not measured"
MODELS = ("7b", "70b")
GPUS = tuple(2**power for power in range(3, 13))
SHARDS = ("fsdp2", "hsdp")


@dataclass(frozen=True)
class Machine:
    """Nodes of 8 H100 (SXM), each GPU with a network card; bytes and FLOPs a second, seconds."""

    node: int = 8
    # NVIDIA's data sheet: 900 GB/s in both directions; 350 of 450 is what rings of NCCL reach.
    nvlink: float = 350e9
    # NVIDIA's data sheet of ConnectX-7: 400 Gb/s a port.
    network: float = 50e9
    # NVIDIA's data sheet: dense bfloat16, float32, HBM3.
    bfloat16: float = 989e12
    float32: float = 67e12
    memory: float = 3.35e12
    # Of dense bfloat16 in forward and backward: LLaMA 3 reports 38 to 43 % (arXiv 2407.21783).
    utilisation: float = 0.4
    # Of a peak, in single products and passes over memory: assumed.
    reached: float = 0.6
    # A hop of a ring in a node and between nodes, of a tree likewise, and a start: the model by
    # which NCCL chooses (src/graph/tuning.cc, 01afd20), simple protocol for rings, LL for trees.
    ring_hop: float = 3.4e-6
    ring_hop_of_nodes: float = 9.6e-6
    tree_hop: float = 0.94e-6
    tree_hop_of_nodes: float = 5.0e-6
    start: float = 8.4e-6
    # torch.linalg.eigh of q x q in float32, a q^2: ASSUMED; 47 ms at q = 1,088. Nothing published
    # was found for these sizes.
    eigh: float = 40e-9


MACHINE = Machine()


class Run(NamedTuple):
    """What is trained: tokens of a step in all, and at most so many on a GPU in a pass."""

    tokens: int = 2**22  # LLaMA 2's batch (arXiv 2307.09288)
    in_a_pass: int = 8192


class Ring(NamedTuple):
    """Some GPUs that send in a circle."""

    ranks: int
    in_a_node: int

    @property
    def nodes(self) -> int:
        return self.ranks // self.in_a_node

    @property
    def rate(self) -> float:
        """Bytes a second that one GPU sends."""
        cards = self.in_a_node * MACHINE.network
        return MACHINE.nvlink if self.nodes == 1 else min(MACHINE.nvlink, cards)

    @property
    def latency(self) -> float:
        """Once around."""
        if self.ranks == 1:
            return 0.0
        between = self.nodes - 1
        inside = self.ranks - 1 - between
        return MACHINE.start + inside * MACHINE.ring_hop + between * MACHINE.ring_hop_of_nodes

    @property
    def tree(self) -> float:
        """An all-reduce of a few bytes: up a tree and down again."""
        if self.ranks == 1:
            return 0.0
        inside = (self.in_a_node - 1) * MACHINE.tree_hop
        between = math.floor(math.log2(self.nodes)) * MACHINE.tree_hop_of_nodes
        return MACHINE.start + 2 * (inside + between)


class Rings(NamedTuple):
    """Of a layout: those that share a weight, those that have the same shard, and all."""

    shards: Ring
    replicas: Ring
    all: Ring

    @classmethod
    def of(cls, layout: Layout) -> Rings:
        node = MACHINE.node
        inside = min(layout.shards, node)
        return cls(
            Ring(layout.shards, inside),
            Ring(layout.replicas, min(layout.replicas, max(1, node // inside))),
            Ring(layout.gpus, min(layout.gpus, node)),
        )


class Matrices(NamedTuple):
    """The projected matrices of an optimizer, and how often they have a new basis."""

    shapes: list[tuple[int, int, int]]  # m, n, r
    gap: int

    @classmethod
    def of(cls, optimizer: LowRankAdamW | None) -> Matrices:
        if optimizer is None:
            return cls([], 1)
        groups = [group for group in optimizer.param_groups if is_projected(group)]
        shapes = [
            (*param.shape, min(group["rank"], *param.shape))
            for group in groups
            for param in group["params"]
        ]
        return cls(shapes, groups[0]["update_proj_gap"])


def passes_of(module: nn.Module, blocks: int, layout: Layout, held: Held, run: Run) -> float:
    """Seconds of all forward and backward passes of a step."""
    tokens = run.tokens / layout.gpus
    passes = math.ceil(tokens / run.in_a_pass)
    linear = sum(each.weight.numel() for each in module.modules() if isinstance(each, nn.Linear))
    products = 2 * linear * tokens / passes / (MACHINE.bfloat16 * MACHINE.utilisation)
    shards, replicas, _ = Rings.of(layout)
    units = blocks + 1  # what is around the blocks is gathered at once
    gathers = held.gathers / 2 / shards.rate + units * shards.latency
    scattered = (layout.shards - 1) * held.gradients
    reduces = scattered / shards.rate + units * shards.latency
    reduces += (held.reduces - scattered) / replicas.rate + 2 * units * replicas.latency
    return passes * (max(products, gathers) + max(2 * products, gathers + reduces))


def update_of(module: nn.Module, matrices: Matrices, layout: Layout, limited: bool) -> float:
    """Seconds of an optimizer's own passes and products, on the shards of one GPU."""
    elements = sum(param.numel() for param in module.parameters())
    projected = sum(m * n for m, n, _ in matrices.shapes)
    low = sum(m * r for m, _, r in matrices.shapes)
    bases = sum(n * r for _, n, r in matrices.shapes)
    # W is read and written, G is read, twice where it is part of the update; M, V and N likewise,
    # and R; moments in float32, torch's in bfloat16.
    moments = 16 if matrices.shapes else 8
    moved = (elements - projected) * (6 + moments)
    moved += projected * (8 if limited else 6) + low * (32 if limited else 24)
    moved = moved / layout.shards + 4 * bases
    products = sum(4 * m * n * r for m, n, r in matrices.shapes) / layout.shards
    return max(moved / MACHINE.memory, products / MACHINE.bfloat16) / MACHINE.reached


def own_of(needs: Needs, matrices: Matrices, layout: Layout, orthogonal: bool) -> float:
    """Seconds of what an optimizer sends in a step, and of what owners do with it."""
    shards = Rings.of(layout).shards
    if not orthogonal:
        return needs.collectives * shards.tree
    sent = needs.sent / _to_one(shards) + needs.collectives * _hop(shards)
    sides = [(min(m, n), max(m, n)) for m, n, _ in matrices.shapes]
    products = STEPS * sum(4 * m * m * n + 2 * m**3 for m, n in sides) / layout.shards
    return sent + products / (MACHINE.bfloat16 * MACHINE.reached)


def factorized(m: int, n: int, r: int) -> float:
    """Seconds of a randomized basis of G^T on its owner: 3 products with the sketch, 1 with P.

    Three Cholesky QRs, a Gram matrix and a rotation are products in float32.
    """
    q = min(m, n, r + max(8, r // 16))
    sketches = (6 * q + 2 * r) * m * n / MACHINE.bfloat16
    others = q * q * (10 * n + 3 * m) / MACHINE.float32
    return (sketches + others) / MACHINE.reached + MACHINE.eigh * q * q


def bases_of(matrices: Matrices, layout: Layout) -> tuple[float, float]:
    """Seconds that new bases take: the mean of all steps, and in the step of the largest."""
    if not matrices.shapes:
        return 0.0, 0.0
    shards, _, everybody = Rings.of(layout)
    others = (layout.shards - 1) / layout.shards
    owned = [
        2 * m * n * others / _to_one(shards) + _hop(shards) + factorized(m, n, r)
        for m, n, r in matrices.shapes
    ]
    sent = [2 * n * r / everybody.rate + everybody.latency for _, n, r in matrices.shapes]
    count = len(matrices.shapes)
    due = count / matrices.gap
    at_once = math.ceil(due)
    rounds = math.ceil(at_once / layout.gpus)
    mean = min(1.0, due) * rounds * sum(owned) / count + due * sum(sent) / count
    return mean, rounds * max(owned) + at_once * max(sent)


def _to_one(ring: Ring) -> float:
    """Bytes a second that one GPU can take from the others."""
    return MACHINE.nvlink if ring.nodes == 1 else MACHINE.network


def _hop(ring: Ring) -> float:
    between = MACHINE.ring_hop if ring.nodes == 1 else MACHINE.ring_hop_of_nodes
    return MACHINE.start + between


METHODS = {
    "adamw": None,
    "galore": lambda groups: GaLoreAdamW(groups),
    "fira": lambda groups: FiraAdamW(groups),
    "orthogonal": lambda groups: LowRankAdamW(groups, residual="orthogonal"),
}


def rows_of(model: str, gpus: tuple[int, ...] = GPUS, run: Run | None = None) -> list[dict]:
    """A row a layout, number of GPUs and optimizer."""
    run, shape = run or Run(), PLANNED[model]
    module = llama(model).bfloat16()
    optimizers = {
        name: build and build(param_groups(module, shape.rank)) for name, build in METHODS.items()
    }
    rows = []
    for shard, count in [(shard, count) for shard in SHARDS for count in gpus]:
        layout = Layout.of(shard, count)
        held = held_of(module, layout)
        passes = passes_of(module, shape.layers, layout, held, run)
        for name, optimizer in optimizers.items():
            needs = needs_of(optimizer, layout) if optimizer else adamw_needs(module, layout)
            matrices = Matrices.of(optimizer)
            update = update_of(module, matrices, layout, name in ("fira", "orthogonal"))
            own = own_of(needs, matrices, layout, name == "orthogonal")
            mean, largest = bases_of(matrices, layout)
            step = passes + update + own + mean
            rows.append(
                {"model": model, "rank": shape.rank, "shard": shard, "gpus": count,
                 "optimizer": name, "tokens": run.tokens // count,
                 "held_bytes": held.weights + held.gradients + held.buffers + needs.state,
                 "passes": passes, "update": update, "own": own, "refresh": mean,
                 "refresh_when_due": largest, "step": step}
            )  # fmt: skip
    return rows


def shown_from(rows: list[dict], share: float) -> int | None:
    """The fewest GPUs on which new bases take at least this share of a step; None if nowhere."""
    counts = (row["gpus"] for row in rows if row["refresh"] >= share * row["step"])
    return min(counts, default=None)


def table(rows: list[dict]) -> Table:
    found = new_table(
        f"a step, {TITLE}",
        "ms; bases: the mean of all steps; due: in the step of the largest",
        ("LLaMA", "shards", "GPUs", "optimizer"),
        ("held GB", "passes", "update", "own", "bases", "due", "step"),
    )
    parts = ("passes", "update", "own", "refresh", "refresh_when_due", "step")
    for row in rows:
        found.add_row(
            *(row["model"], row["shard"], f"{row['gpus']:,}", row["optimizer"]),
            *(f"{row['held_bytes'] / 1e9:.2f}", *(f"{1e3 * row[part]:,.1f}" for part in parts)),
        )
    return found


def main(arguments: list[str] | None = None) -> None:
    line = about("gpus", __doc__)
    names = f"of {', '.join(PLANNED)}; default: %(default)s"
    line.add_argument("--models", type=words(PLANNED), default=",".join(MODELS), help=names)
    line.add_argument("--out", type=Path, help="the JSON record; none by default")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = line.parse_args(arguments)
    rows = [row for model in progress(options.models, "computing") for row in rows_of(model)]
    if options.out:
        facts = {"title": TITLE, "machine": asdict(MACHINE), "run": Run()._asdict()}
        write_lines(options.out, head("gpus", "cpu", arguments, **facts), "rows", rows)
    show(table([row for row in rows if row["gpus"] in (8, 64, 512, 4096)]), 150)


if __name__ == "__main__":
    main()
