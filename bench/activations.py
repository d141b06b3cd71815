"""What layers that hand their optimizer R in place of a gradient buy: time, products and bytes.

    python -m bench.activations                # blocks as LLaMA 350M's, LLaMA 60M; half an hour
    python -m bench.activations --parts blocks --ranks 4 --lengths 512 --dtypes fp32,bf16
    python -m bench.activations --quick        # seconds, figures of no use

A run is forward, backward, step and `zero_grad`, with random weights and inputs. Arms take turns,
and the first of a round changes. Each takes a usual step, then one in which all bases are renewed
and the step after it, for which gradients are laid out anew. In training layers take turns to be
renewed, all of them in T = 200 steps: "mean" is a usual step with a T-th of what those two took
more than two usual ones.

Products are FLOPs: of forward and backward as torch counts them, with attention as if it were not
causal, and of the step as its method has them. By them alone an arm would be as many times as fast
as AdamW as "predicted" says. "Saved" is what autograd keeps between forward and backward, weights
aside; gradients are those that the step finds.

First it is made sure, on a small block in float64, that R is G P or P^T G of the gradient that the
same block has without it, and in every arm that is timed, which gradients are projected and which
are whole. What is wrong has no time. Stopped, the same command goes on behind the last case that is
in `--out`.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from bench.cases import DTYPES
from bench.measure import StepClock, tensor_bytes
from bench.models import PRESETS, Preset, build_model
from bench.optimizers import METHODS
from bench.options import parse, parser, words
from bench.peers import Recipe
from bench.record import code, head, result, write_lines
from bench.tables import SPREAD, missing_text, new_table, progress, show, time_text
from bench.timing import LEAD_OF_STEPS, Samples, interleaved
from lowrank_kernels import param_groups
from lowrank_kernels.ops.contract import Side
from lowrank_kernels.ops.products import project
from lowrank_kernels.optim.projected_gradient import held, is_projected_gradient

BLOCKS, MODELS = "blocks", "models"
PARTS = (BLOCKS, MODELS)
BASE = "adamw"
ARMS = (BASE, "galore", "galore-projected", "galore-projected-shared", "fira")
INTERVAL = 200
VOCABULARY, QUICK_VOCABULARY = 32_000, 512
QUICK = {"blocks": ["nano"], "models": ["nano"], "depth": 1, "tokens": 64, "lengths": [32]}
# Projected ones of a block.
MATRICES = 7
# Counts of steps from which no basis is due: float32 holds them, and half of it exactly.
FAR = 2**20
EXACT = {"fp64": torch.float64}
# Relative, in float64: R from three products against one of another order.
R_ERROR = 1e-12


@dataclass(frozen=True)
class Case:
    """A workload: blocks alone or a whole model, the tokens of a step, the rank and the dtype."""

    part: str
    shape: str
    layers: int
    vocabulary: int
    sequences: int
    length: int
    rank: int
    dtype: str

    @property
    def preset(self) -> Preset:
        return replace(PRESETS[self.shape], layers=self.layers)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class Blocks(nn.Module):
    """The blocks of a model and its last norm."""

    def __init__(self, case: Case):
        super().__init__()
        self.inner = build_model(case.preset, 2, case.length).model
        self.inner.embed_tokens = None

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(inputs_embeds=x).last_hidden_state


class Model(nn.Module):
    """The whole of it, with its loss."""

    def __init__(self, case: Case):
        super().__init__()
        self.inner = build_model(case.preset, case.vocabulary, case.length)

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.inner(input_ids=ids).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids.roll(-1, 1).flatten())


class Arm:
    """A model and its optimizer, which have taken a step, and the inputs of the next ones.

    Attributes:
        name: of the method.
        projects: whether its layers hand R over.
    """

    def __init__(self, name: str, case: Case, device: torch.device, backend: str):
        self.name, self.device = name, device
        self.projects = METHODS[name].prepare is not None
        torch.manual_seed(0)
        dtype = (DTYPES | EXACT)[case.dtype]
        with device:
            self.model = Blocks(case) if case.part == BLOCKS else Model(case)
            if case.part == BLOCKS:
                shape = case.sequences, case.length, case.preset.hidden
                self.inputs, self.gradient = (torch.randn(shape).to(dtype) for _ in "xh")
            else:
                self.inputs = torch.randint(case.vocabulary, (case.sequences, case.length))
                self.gradient = None
        for param in self.model.parameters():
            param.data = param.data.to(dtype)
        groups = param_groups(self.model, rank=case.rank, update_proj_gap=FAR)
        recipe = Recipe(backend=backend)
        self.optimizer = METHODS[name].optimizer_of(self.model, groups, 1e-5, recipe)
        self.run()
        self._settle()

    @property
    def projected(self) -> dict[str, Tensor]:
        """Weights that have a basis."""
        named = self.model.named_parameters()
        return {name: p for name, p in named if "basis" in self.optimizer.state.get(p, ())}

    def forward(self) -> Tensor:
        if self.gradient is None:
            return self.model(self.inputs)
        # As hidden states of a model's later blocks do, they get a gradient, too.
        return self.model(self.inputs.detach().requires_grad_())

    def backward(self, output: Tensor) -> None:
        output.backward(self.gradient)

    def run(self, due: Sequence[Tensor] = ()) -> StepClock:
        """One step; the bases of some matrices are due in it."""
        self.let_be_due(due)
        clock = StepClock(self.device)
        clock.mark()
        self.backward(self.forward())
        clock.mark()
        self.optimizer.step()
        clock.mark()
        self.optimizer.zero_grad()
        clock.mark()
        return clock

    def finish(self) -> None:
        """The rest of a run after its backward pass."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def let_be_due(self, params: Sequence[Tensor]) -> None:
        for param in params:
            self.optimizer.state[param]["basis_step"] = 0

    def _settle(self) -> None:
        """No basis is due any more unless it is made so: all are as if just renewed."""
        for param in self.projected.values():
            state = self.optimizer.state[param]
            state["step"].fill_(FAR)
            state["basis_step"] = FAR


class Saved(saved_tensors_hooks):
    """Counts what autograd keeps for backward: each storage once, those of a model not at all.

    It hands on the tensors themselves: `saved_bytes` keeps others in their place, and layers that
    share x P find it by the tensor that the graph keeps.
    """

    def __init__(self, model: nn.Module):
        super().__init__(self._pack, lambda holder: holder.tensor)
        self._known = {_address(tensor) for tensor in (*model.parameters(), *model.buffers())}
        self._holders: list[weakref.ref[_Holder]] = []

    def _pack(self, tensor: Tensor) -> _Holder:
        holder = _Holder(tensor)
        self._holders.append(weakref.ref(holder))
        return holder

    def bytes(self) -> int:
        """As long as the graph lives."""
        alive = [holder.tensor for ref in self._holders if (holder := ref()) is not None]
        storages = {_address(tensor): tensor.untyped_storage().nbytes() for tensor in alive}
        return sum(size for address, size in storages.items() if address not in self._known)


class _Holder:
    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def costs(arm: Arm, case: Case) -> dict:
    """Products and bytes of a usual step, which it takes.

    Raises:
        WrongArm: of this step's gradients, or of those where bases are due, others are projected
            than the arm's name says, or a basis that is due is not renewed.
    """
    saved, flops = Saved(arm.model), FlopCounterMode(display=False, custom_mapping=ON_CPU)
    with flops:
        with saved:
            output = arm.forward()
        kept = saved.bytes()
        arm.backward(output)
    _check_gradients(arm, case, [])
    grads = [held(p.grad) for p in arm.model.parameters() if p.grad is not None]
    found = {
        "saved_bytes": kept,
        "gradient_bytes": tensor_bytes(grads),
        "passes_flops": flops.get_total_flops(),
        "step_flops": step_flops(arm, case.rank),
    }
    arm.finish()
    due = list(arm.projected.values())
    arm.let_be_due(due)
    arm.backward(arm.forward())
    _check_gradients(arm, case, due)
    arm.finish()
    if any(arm.optimizer.state[param]["basis_step"] < FAR for param in due):
        raise WrongArm("a basis that is due is not renewed")
    return found | {"state_bytes": tensor_bytes(dict(arm.optimizer.state))}


class WrongArm(Exception):
    """An arm does not do what its name says."""


def _check_gradients(arm: Arm, case: Case, due: list[Tensor]) -> None:
    """All matrices of the blocks are projected but those that are due, or none is."""
    grads = [param.grad for param in arm.model.parameters()]
    found = sum(map(is_projected_gradient, grads))
    whole = sum(not is_projected_gradient(param.grad) for param in due)
    expected = MATRICES * case.layers - len(due) if arm.projects else 0
    if found != expected or whole != len(due):
        raise WrongArm(
            f"{found} gradients are projected instead of {expected}, and {whole} whole of"
            f" {len(due)} whose bases are due"
        )


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object):
    return sdpa_flop_count(query, key, value)


def _attention_backward(
    grad: torch.Size,
    query: torch.Size,
    key: torch.Size,
    value: torch.Size,
    *_: object,
    **__: object,
):
    return sdpa_backward_flop_count(grad, query, key, value)


# What torch's counter does not know.
ON_CPU = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def step_flops(arm: Arm, rank: int) -> int:
    """R, unless it is there already, and the product that an update is."""
    products = 1 if arm.projects else 2
    return sum(2 * products * param.numel() * rank for param in arm.projected.values())


def wrong_r(name: str, device: torch.device) -> str | None:
    """How far R of a small block in float64 is from the projection of a whole gradient, if far."""
    if METHODS[name].prepare is None:
        return None
    case = Case(BLOCKS, "nano", 1, 0, 2, 24, PRESETS["nano"].hidden // 4, "fp64")
    arm, plain = Arm(name, case, device, "reference"), Blocks(case).to(device, torch.float64)
    plain.load_state_dict(arm.model.state_dict())
    arm.backward(arm.forward())
    plain(arm.inputs).backward(arm.gradient)
    gradients = {name: param.grad for name, param in plain.named_parameters()}
    for name, param in arm.projected.items():
        state = arm.optimizer.state[param]
        expected = project(gradients[name], state["basis"], Side(state["side"]))
        if not is_projected_gradient(param.grad):
            return f"{name} has a whole gradient in float64"
        error = float(torch.dist(param.grad.held, expected) / torch.linalg.norm(expected))
        if not error <= R_ERROR:
            return f"R of {name} is off by {error:.1e}"
    return None


class Stopwatch:
    """A candidate of `interleaved` that keeps the clocks of its steps.

    Where bases are due, a run is a step that renews them and the step after it.
    """

    def __init__(self, arm: Arm, due: Sequence[Tensor] = ()):
        self._arm, self._due = arm, due
        self._clocks: list[list[StepClock]] = []

    def __call__(self, turn: int) -> None:
        steps = [self._due, ()] if self._due else [()]
        self._clocks.append([self._arm.run(due) for due in steps])

    def read(self, rounds: int) -> list[list[tuple[float, float]]]:
        """Of each of the last rounds: seconds of its steps and of their optimizer's part."""
        return [[clock.read() for clock in own] for own in self._clocks[-rounds:]]


def timed(arms: list[Arm], device: torch.device, rounds: int) -> dict[str, dict]:
    """Seconds of every arm, as a row has them."""
    usual = {arm.name: Stopwatch(arm) for arm in arms}
    due = {arm.name: list(arm.projected.values()) for arm in arms if arm.projected}
    renewing = {arm.name: Stopwatch(arm, due[arm.name]) for arm in arms if arm.projected}
    candidates = usual | {f"{name}, new bases": watch for name, watch in renewing.items()}
    interleaved(candidates, device, rounds, lead=LEAD_OF_STEPS, idle=1)
    found = {}
    for name, watch in usual.items():
        steps = [step for (step,) in watch.read(rounds)]
        own = result(Samples([seconds for seconds, _ in steps]))
        own["passes"] = result(Samples([seconds - step for seconds, step in steps]))
        own["step"] = result(Samples([step for _, step in steps]))
        own["renewal_ms"] = 0.0
        if name in renewing:
            pairs = [sum(seconds for seconds, _ in pair) for pair in renewing[name].read(rounds)]
            more = [pair - 2 * seconds for pair, (seconds, _) in zip(pairs, steps, strict=True)]
            own["renewal_ms"] = 1e3 * statistics.median(more)
        own["mean_ms"] = own["ms"] + own["renewal_ms"] / INTERVAL
        found[name] = own
    return found


def bench_case(case: Case, wrong: dict[str, str], options: argparse.Namespace) -> dict:
    """A row of the record; an arm that is not what its name says has no time."""
    device, arms, spent = torch.device(options.device), [], {}
    wrong, missing = dict(wrong), {}
    for name in options.arms:
        if name in wrong:
            continue
        try:
            arm = Arm(name, case, device, options.backend)
            spent[name] = costs(arm, case)
            arms.append(arm)
        except torch.OutOfMemoryError:
            missing[name] = "does not fit"
        except WrongArm as error:
            wrong[name] = str(error)
    times = timed(arms, device, options.rounds)
    results = {name: own | spent[name] for name, own in times.items()}
    for own in results.values():
        own["tokens_per_second"] = 1e3 * case.tokens / own["mean_ms"]
        if (base := results.get(BASE)) is not None:
            own["times_as_fast"] = base["mean_ms"] / own["mean_ms"]
            own["predicted"] = _flops(base) / _flops(own)
    return {
        "part": case.part,
        "shape": case.shape,
        "layers": case.layers,
        "parameters": sum(p.numel() for p in arms[0].model.parameters()) if arms else None,
        "vocabulary": case.vocabulary,
        "sequences": case.sequences,
        "length": case.length,
        "rank": case.rank,
        "dtype": case.dtype,
        "wrong": wrong,
        "missing": missing,
        "results": results,
    }


def _flops(own: dict) -> int:
    return own["passes_flops"] + own["step_flops"]


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """Blocks first; a length that the tokens are no multiple of is cut off."""
    vocabulary = QUICK_VOCABULARY if options.quick else VOCABULARY
    for dtype in options.dtypes:
        for part in options.parts:
            for name in options.blocks if part == BLOCKS else options.models:
                preset = PRESETS[name]
                lengths = options.lengths if part == BLOCKS else [preset.seq_len]
                for length in [min(length, options.tokens) for length in lengths]:
                    for share in options.ranks:
                        yield Case(
                            part,
                            name,
                            options.depth if part == BLOCKS else preset.layers,
                            0 if part == BLOCKS else vocabulary,
                            options.tokens // length,
                            length,
                            preset.hidden // share,
                            dtype,
                        )


def row_of(case: Case, rows: list[dict]) -> dict | None:
    """The one of this case, if it was measured."""
    wanted = {name: getattr(case, name) for name in Case.__dataclass_fields__}
    return next((row for row in rows if wanted.items() <= row.items()), None)


def measured(path: Path | None, record: dict) -> list[dict]:
    """The rows of a file that the same command left, of the same code on the same device."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    return found["rows"] if _origin(found) == _origin(record) else []


def _origin(record: dict) -> list[object]:
    place = record.get("environment", {})
    facts = [record.get(key) for key in ("bench", "command", "code", "backend")]
    return facts + [place.get(key) for key in ("device", "threads")]


def table(record: dict, rows: list[dict]) -> Table:
    """A row a case and an arm."""
    place = record["environment"]
    found = new_table(
        f"{place['device']}, {place['threads']} threads; forward, backward and step,"
        f" ours by the {record['backend']} backend",
        f"{SPREAD}; mean: with a {INTERVAL}th of what new bases take;"
        f" {missing_text(record['missing'])}",
        ("model", "dtype", "tokens", "r", "arm", "ms"),
        (
            *("passes", "step", "renewal", "mean", "x adamw", "predicted", "tokens/s"),
            *("saved\nMB", "gradients\nMB", "state\nMB"),
        ),
    )
    for row in rows:
        tokens = f"{row['sequences']} x {row['length']}"
        cells = [model_text(row), row["dtype"], tokens, str(row["rank"])]
        for name, reason in (row["wrong"] | row["missing"]).items():
            text = f"WRONG: {reason}" if name in row["wrong"] else reason
            found.add_row(*cells, name, text)
        for name, own in row["results"].items():
            found.add_row(*cells, name, time_text(own, 1), *_figures(own))
        found.add_section()
    return found


def model_text(row: dict) -> str:
    if row["part"] == MODELS:
        return row["shape"]
    return f"{row['layers']} of {row['shape']}"


def _figures(own: dict) -> list[str]:
    return [
        f"{own['passes']['ms']:.1f}",
        f"{own['step']['ms']:.1f}",
        f"{own['renewal_ms']:.1f}" if own["renewal_ms"] else "",
        f"{own['mean_ms']:.1f}",
        *(f"{own[key]:.2f}" if key in own else "" for key in ("times_as_fast", "predicted")),
        f"{own['tokens_per_second']:,.0f}",
        *(f"{own[f'{key}_bytes'] / 1e6:.1f}" for key in ("saved", "gradient", "state")),
    ]


def main(arguments: list[str] | None = None) -> None:
    """Checks, measures, writes and prints; the exit status is 1 if an arm is wrong."""
    line = parser("activations", __doc__, models="60m", dtypes="fp32", rounds=5)
    line.add_argument("--parts", type=words(PARTS), default=",".join(PARTS), help="default: both")
    line.add_argument("--blocks", type=words(PRESETS), default="350m", help="default: %(default)s")
    line.add_argument("--depth", type=int, default=2, help="blocks; default: %(default)s")
    line.add_argument("--tokens", type=int, default=2048, help="a step; default: %(default)s")
    text = "of the sequences that blocks get; default: %(default)s"
    line.add_argument("--lengths", type=_integers, default="2048,512", help=text)
    text = "what the hidden size is divided by; default: %(default)s"
    line.add_argument("--ranks", type=_integers, default="4,8", help=text)
    line.add_argument("--arms", type=words(METHODS), default=",".join(ARMS), help="of METHODS")
    line.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parse(line, arguments)
    if options.quick:
        vars(options).update(QUICK)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    facts = {"backend": options.backend, "interval": INTERVAL, "missing": {}, "code": code()}
    record = head("activations", options.device, options.arguments, **facts)
    rows = measured(options.out, record)
    todo = [case for case in cases(options) if row_of(case, rows) is None]
    wrong = {name: reason for name in options.arms if (reason := wrong_r(name, device))}
    for case in progress(todo):
        rows.append(bench_case(case, wrong, options))
        if options.out:
            write_lines(options.out, record, "rows", rows)
        gc.collect()
    show(table(record, rows), width=190)
    if any(row["wrong"] for row in rows):
        sys.exit("activations: an arm is not what its name says, so no time")


def _integers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


if __name__ == "__main__":
    main()
