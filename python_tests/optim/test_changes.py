"""Whatever changes between two steps, kept batches serve as batches prepared anew would.

Each row trains three runs: one as it is, one whose batches are prepared anew before every step,
and one without the change. The first two have the same bits after every step.
"""

import copy
import os
import pickle
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from lowrank_kernels import LowRankAdamW, Subspace
from lowrank_kernels.ops.dispatch import ENVIRONMENT_VARIABLE

BACKENDS = ("reference", "foreach", "native")
# Equal ones share a batch; the last is in no group at first.
SHAPES = [(12, 20), (12, 20), (20, 12), (12, 20), (12, 20), (16, 9), (10,), (12, 20)]
GROUPS = [slice(0, 3), slice(3, 5), slice(5, 7)]
RANK, GAP = 4, 3
NO_OPTIONS: Mapping[str, object] = MappingProxyType({})
HELD = ("exp_avg", "exp_avg_sq", "basis", "limiter_norm")


class Run:
    """A few parameters and their optimizer; gradients stay where they are, but for `form`."""

    def __init__(self, backend, dtype=torch.float32, anew=False, **options):
        rng = torch.Generator().manual_seed(0)
        self.params = [
            nn.Parameter(torch.randn(shape, generator=rng).to(dtype)) for shape in SHAPES
        ]
        first, second, plain = (self.params[part] for part in GROUPS)
        self.optimizer = LowRankAdamW(
            [
                {"params": first, "rank": RANK, "update_proj_gap": GAP},
                {"params": second, "rank": RANK, "update_proj_gap": GAP, "lr": 0.2, "scale": 0.4},
                {"params": plain},
            ],
            backend=backend,
            **{"lr": 0.05, "residual": "official", "subspace": Subspace(stagger=False), **options},
        )
        self.anew, self.seed = anew, 0
        self.form: Callable[[Tensor], Tensor] | None = None
        self.without: set[int] = set()
        self.kept: list[object] = []  # what a step with a stale address would write to
        self.history: list[object] = []

    @property
    def groups(self):
        return self.optimizer.param_groups

    def states(self):
        return [self.optimizer.state[param] for param in self.params[:7]]

    def train(self, steps):
        for _ in range(steps):
            self.step()
            self.history.append(self.bits())

    def step(self):
        self.seed += 1
        rng = torch.Generator().manual_seed(self.seed)
        for index, param in enumerate(self.params):
            values = torch.randn(param.shape, generator=rng).to(param.dtype)
            if index in self.without:
                param.grad = None
            elif self.form is not None:
                param.grad = torch.empty_like(param)
                param.grad.data = self.form(values)
            elif param.grad is None:
                param.grad = values
            else:
                param.grad.copy_(values)
        self.update()

    def update(self):
        if self.anew:
            self.optimizer._known = None
        self.optimizer.step()

    def bits(self):
        """Of everything that a step writes."""
        return [
            {"weight": _bits(param)}
            | {key: _bits(value) for key, value in self.optimizer.state.get(param, {}).items()}
            for param in self.params
        ]


def _bits(value):
    if not isinstance(value, Tensor):
        return value
    raw = value.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    return value.dtype, value.shape, raw.numpy().tobytes()


def assert_same(one, two):
    """Of the bits after each step; says which differ, without a page of bytes."""
    for step, pair in enumerate(zip(one, two, strict=True)):
        for place, (mine, other) in enumerate(zip(*pair, strict=True)):
            differ = [key for key in mine | other if mine.get(key) != other.get(key)]
            assert not differ, (step, place)


Change = Callable[[Run], object]


def nothing(run):
    pass


class Row(NamedTuple):
    """A change between two steps.

    Attributes:
        change: before the third step.
        back: before the fifth, another.
        acts: whether the weights or states then differ from a run's without it; None if that
            depends on rounding.
        options: of both runs.
        backends: that serve it.
    """

    change: Change
    back: Change = nothing
    acts: bool | None = True
    options: Mapping[str, object] = NO_OPTIONS
    backends: tuple[str, ...] = BACKENDS


def trained(row, backend, anew=False, change=True):
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(ENVIRONMENT_VARIABLE, raising=False)
        run = Run(backend, anew=anew, **row.options)
        run.train(2)
        if change:
            row.change(run)
        run.train(2)
        if change:
            row.back(run)
        run.train(3)
        os.environ.pop(ENVIRONMENT_VARIABLE, None)
    return run


def on_weights(change: Callable[[Tensor], Tensor]) -> Change:
    def swap(run):
        for param in run.params:
            run.kept.append(param.data)
            param.data = change(param.data)

    return swap


def forms(form: Callable[[Tensor], Tensor] | None) -> Change:
    def begin(run):
        run.form = form

    return begin


def sets(**attributes: object) -> Change:
    def write(run):
        for name, value in attributes.items():
            setattr(run.optimizer, name, value)

    return write


def group(**options: object) -> Change:
    return lambda run: run.groups[0].update(options)


def every_group(**options: object) -> Change:
    return lambda run: [own.update(options) for own in run.groups]


def replaced(key: str) -> Change:
    """By a tensor elsewhere with other values; of one matrix in the middle of a batch."""

    def swap(run):
        state = run.states()[1]
        run.kept.append(state[key])
        state[key] = state[key].flip(-1) * 0.5 if state[key].dim() else state[key] * 0.5

    return swap


def numbers(index: int = 1, **values: object) -> Change:
    return lambda run: run.states()[index].update(values)


def transposed(values):
    return values.mT.contiguous().mT if values.dim() > 1 else values.clone()


def turned(values):
    """The same memory with other strides."""
    return values.view(values.shape[::-1]).permute(*range(values.dim())[::-1])


def holes(values):
    wide = torch.zeros(*values.shape, 2, dtype=values.dtype)
    wide[..., 0] = values
    return wide[..., 0]


def expanded(values):
    return values[:1].expand_as(values)


def negated(values):
    return torch._neg_view(-values)


def zero(values):
    return torch._efficientzerotensor(values.shape, dtype=values.dtype)


def to_bfloat16(run):
    for param in run.params:
        param.data, param.grad = param.data.bfloat16(), None
    run.optimizer.load_state_dict(run.optimizer.state_dict())


def resize(run):
    for index in (1, 6):
        param = run.params[index]
        param.grad, param.data = None, torch.cat([param.data, param.data])
        run.kept.append(run.optimizer.state.pop(param))


def remove(run):
    del run.groups[0]["params"][1]


def put_back(run):
    run.groups[0]["params"].insert(1, run.params[1])


def reorder(run):
    for own in run.groups:
        own["params"].reverse()


def move_to_the_next_group(run):
    """All lists of parameters, one after another, stay as they were."""
    run.groups[1]["params"].insert(0, run.groups[0]["params"].pop())


def stand_in(run):
    """Another parameter over the same memory, with the state of the old one."""
    for own in run.groups:
        for place, old in enumerate(own["params"]):
            new = nn.Parameter(old.data)
            index = [param is old for param in run.params].index(True)
            run.optimizer.state[new] = run.optimizer.state.pop(old)
            own["params"][place] = run.params[index] = new
            run.kept.append(old)
            assert new.data_ptr() == old.data_ptr()


def copy_states(run):
    for param in run.params[:7]:
        run.kept.append(run.optimizer.state[param])
        run.optimizer.state[param] = dict(run.optimizer.state[param])


def move_states(run):
    for state in run.states():
        for key in set(HELD) & state.keys():
            run.kept.append(state[key])
            state[key] = state[key].clone()


def move_memory(run):
    """As when a state is taken off a device and back."""
    for state in run.states():
        for key in set(HELD) & state.keys():
            run.kept.append(state[key].data)
            state[key].data = state[key].data.clone()


def delete_states(run):
    run.kept += [run.optimizer.state.pop(run.params[index]) for index in (1, 5)]


def copy_groups(run):
    run.kept += run.groups
    run.groups[:] = [{**own, "lr": 0.3} for own in run.groups]


def add_group(run):
    run.optimizer.add_param_group({"params": [run.params[7]], "rank": 3, "update_proj_gap": GAP})


def load_older(run):
    older = Run("reference")
    older.train(1)
    run.optimizer.load_state_dict(copy.deepcopy(older.optimizer.state_dict()))


def deep_copy(run):
    run.kept += [run.params, run.optimizer]
    run.params, run.optimizer = copy.deepcopy((run.params, run.optimizer))


def pickled(run):
    run.kept += [run.params, run.optimizer]
    run.params, run.optimizer = pickle.loads(pickle.dumps((run.params, run.optimizer)))


def environment(backend: str) -> Change:
    return lambda run: os.environ.update({ENVIRONMENT_VARIABLE: backend})


def tensor(key: str, value: float) -> Change:
    return lambda run: run.groups[0].update({key: torch.tensor(value)})


def fill(key: str, value: float) -> Change:
    return lambda run: run.groups[0][key].fill_(value)


HALF = {"dtype": torch.bfloat16}
GALORE = {"residual": None}
FLOAT64 = {"dtype": torch.float64}

ROWS = {
    # Weights
    "weight elsewhere": Row(on_weights(Tensor.clone), acts=False),
    "weight of other values": Row(on_weights(lambda w: w.flip(0)), acts=True),
    "weight transposed": Row(on_weights(transposed), on_weights(Tensor.contiguous), acts=None),
    "weight transposed, galore": Row(
        on_weights(transposed), on_weights(Tensor.contiguous), None, GALORE
    ),
    "weight with holes": Row(on_weights(holes), on_weights(Tensor.contiguous), acts=None),
    "weight with holes, galore": Row(
        on_weights(holes), on_weights(Tensor.contiguous), None, GALORE
    ),
    "weight in the same memory": Row(on_weights(turned)),
    "weight in the same memory, galore": Row(on_weights(turned), options=GALORE),
    "weight in bfloat16": Row(to_bfloat16),
    "weight resized": Row(resize),
    # Parameters
    "removed": Row(remove, put_back),
    "reordered": Row(reorder, acts=None),
    "in the next group": Row(move_to_the_next_group),
    "another parameter": Row(stand_in, acts=False),
    "no gradient": Row(lambda run: run.without.update({1, 2, 5}), lambda run: run.without.clear()),
    "no gradient at all": Row(
        lambda run: run.without.update(range(8)), lambda run: run.without.clear()
    ),
    "another group": Row(add_group),
    # Gradients
    "gradient elsewhere": Row(forms(Tensor.clone), acts=False),
    "gradient transposed": Row(forms(transposed), forms(torch.clone), acts=None),
    "gradient with holes": Row(forms(holes), forms(torch.clone), acts=None),
    "gradient expanded": Row(forms(expanded), forms(torch.clone)),
    "gradient negated": Row(forms(negated), forms(torch.clone), acts=False),
    "gradient of zeros": Row(forms(zero), forms(torch.clone)),
    "gradient in bfloat16": Row(forms(Tensor.bfloat16), forms(torch.clone)),
    "gradient in float32": Row(forms(Tensor.float), forms(torch.clone), None, HALF),
    "gradient in float64": Row(
        forms(Tensor.double), forms(torch.clone), None, NO_OPTIONS, ("auto", "reference", "foreach")
    ),
    # States
    **{f"another {key}": Row(replaced(key)) for key in HELD},
    "states elsewhere": Row(move_states, acts=False),
    "memory of states elsewhere": Row(move_memory, acts=False),
    "state dicts copied": Row(copy_states, acts=False),
    "states deleted": Row(delete_states),
    "no limiter norm": Row(lambda run: run.states()[1].pop("limiter_norm")),
    "salt": Row(numbers(salt=7), options={**HALF, "rounding": "stochastic"}),
    "moments_step": Row(numbers(moments_step=1)),
    "moments_step of the first": Row(numbers(0, moments_step=1)),
    "step set back": Row(lambda run: run.states()[1]["step"].fill_(1)),
    "steps set back": Row(lambda run: [state["step"].fill_(1) for state in run.states()]),
    # Groups
    "group copied": Row(copy_groups),
    "scale": Row(group(scale=0.8)),
    "kappa over 0.5": Row(group(scale=0.8), group(scale=0.3), options=HALF),
    "kappa of float16 over 0.5": Row(
        group(scale=0.8), group(scale=0.3), options={"dtype": torch.float16}
    ),
    "scale in place": Row(tensor("scale", 0.3), fill("scale", 0.8)),
    "maximize": Row(every_group(maximize=True), every_group(maximize=False)),
    "rank": Row(group(rank=2)),
    "lr": Row(group(lr=0.5)),
    "lr in place": Row(tensor("lr", 0.1), fill("lr", 0.5)),
    "betas": Row(group(betas=(0.5, 0.6))),
    "eps": Row(group(eps=0.1)),
    "weight_decay": Row(group(weight_decay=0.5)),
    "update_proj_gap": Row(group(update_proj_gap=1)),
    # Optimizers
    "backend": Row(sets(backend="reference"), sets(backend="foreach"), acts=None),
    "LOWRANK_BACKEND": Row(environment("reference"), environment("foreach"), acts=None),
    "no residual": Row(sets(residual=None), sets(residual="official")),
    "residual of the paper": Row(sets(residual="paper"), sets(residual="official")),
    "residual": Row(sets(residual="paper"), options=GALORE),
    "rounding": Row(sets(rounding="stochastic"), sets(rounding="nearest"), options=HALF),
    "rounding, galore": Row(
        sets(rounding="stochastic"), sets(rounding="nearest"), options={**HALF, **GALORE}
    ),
    "monitor": Row(sets(monitor=True), sets(monitor=False)),
    "range finder": Row(sets(subspace=Subspace("svd", stagger=False))),
    "criterion": Row(
        sets(subspace=Subspace(criterion="relative_norm", threshold=9.0, check_gap=1)),
        sets(subspace=Subspace(criterion="displacement", threshold=9.0, check_gap=1)),
    ),
    "capturable": Row(
        sets(capturable=True),
        sets(capturable=False),
        None,
        NO_OPTIONS,
        ("auto", "reference", "foreach"),
    ),
    "older state dict": Row(load_older),
    "deep copy": Row(deep_copy, acts=False),
    "pickled": Row(pickled, acts=False),
    "threads": Row(lambda run: torch.set_num_threads(2), acts=None),
    # Refreshes
    "reset moments": Row(sets(subspace=Subspace(stagger=False, moments="reset"))),
    "adaptive rank": Row(sets(subspace=Subspace(stagger=False, residual_energy=0.6))),
    "adaptive rank in turn": Row(
        sets(subspace=Subspace(residual_energy=0.6, moments="carry")), group(rank=3)
    ),
}


@pytest.mark.parametrize(
    ("name", "backend"), [(name, each) for name, row in ROWS.items() for each in row.backends]
)
def test_a_change_is_followed(name, backend):
    row = ROWS[name]
    changed, anew = trained(row, backend), trained(row, backend, anew=True)
    assert_same(changed.history, anew.history)
    if row.acts is not None:
        without = trained(row, backend, change=False)
        assert (changed.history != without.history) is row.acts


@pytest.mark.parametrize("maximize", [True, False])
@pytest.mark.parametrize("form", [holes, expanded, negated])
@pytest.mark.parametrize("backend", BACKENDS)
def test_maximize_changes_the_layout_that_kernels_see(backend, form, maximize):
    """-G is dense where G is not."""

    def start(run):
        run.form = form
        every_group(maximize=not maximize)(run)

    row = Row(start, every_group(maximize=maximize))
    assert_same(trained(row, backend).history, trained(row, backend, anew=True).history)


@pytest.mark.parametrize("change", [sets(backend="foreach"), environment("foreach")])
def test_a_backend_asked_for_takes_over(change):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(ENVIRONMENT_VARIABLE, raising=False)
        run = Run("reference")
        run.train(1)
        change(run)
        run.train(1)
        os.environ.pop(ENVIRONMENT_VARIABLE, None)
    served = {type(batch.operations).__module__ for batch in run.optimizer._known.batches}
    assert served == {"lowrank_kernels.ops.foreach"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranks_and_moments_of_a_refresh_are_followed(backend):
    """Of the rows whose names promise it."""
    adaptive = trained(ROWS["adaptive rank"], backend)
    assert len({state["rank"] for state in adaptive.states()[:5]} | {RANK}) > 1
    reset = trained(ROWS["reset moments"], backend)
    assert all(state["moments_step"] == 6 for state in reset.states()[:5])


class Refusal(NamedTuple):
    """A change that no step can be taken after.

    Attributes:
        change: before the third step.
        back: puts right what it did, for the step after that.
        message: of the error.
        error: its type.
        options: of both runs.
        backends: of both runs.
    """

    change: Change
    back: Change
    message: str
    error: type[Exception] = ValueError
    options: Mapping[str, object] = NO_OPTIONS
    backends: tuple[str, ...] = ("reference", "native")


def gradient_over_a_weight(run):
    run.kept.append(run.params[1].grad)
    run.params[1].grad = run.params[0].data.view_as(run.params[1])


def gradient_back(run):
    run.params[1].grad = run.kept.pop()


def weight_over_a_weight(run):
    """Both in one memory, half of each in the other's."""
    whole = torch.cat([run.params[0].data, run.params[0].data])
    run.kept.append(run.params[1].data)
    run.params[0].data, run.params[1].data = whole[:12], whole[6:18]


def weights_apart(run):
    run.params[0].data = run.params[0].data.clone()
    run.params[1].data = run.kept.pop()


def weight_data(form: Callable[[Tensor], Tensor]) -> Change:
    def swap(run):
        run.kept.append(run.params[1].data)
        run.params[1].data = form(run.params[1].data)

    return swap


def weight_back(run):
    run.params[1].data = run.kept.pop()


def gradient_data(form: Callable[[Tensor], Tensor]) -> Change:
    def swap(run):
        run.kept.append(run.params[1].grad)
        run.params[1].grad.data = form(run.params[1].grad)

    return swap


def gradient_renewed(run):
    run.params[1].grad = None
    run.params[1].grad = torch.ones_like(run.params[1])


def state_entry(key: str, form: Callable[[Tensor], Tensor], index: int = 1) -> Change:
    def swap(run):
        run.kept.append((index, key, run.states()[index][key]))
        run.states()[index][key] = form(run.states()[index][key])

    return swap


def state_back(run):
    index, key, value = run.kept.pop()
    run.states()[index][key] = value


def without_rank(run):
    run.kept.append({key: run.groups[0].pop(key) for key in ("rank", "update_proj_gap")})


def with_rank(run):
    run.groups[0].update(run.kept.pop())


def forget_lr(run):
    run.kept.append(run.groups[0].pop("lr"))


def lr_back(run):
    run.groups[0]["lr"] = run.kept.pop()


LR, BETAS = torch.tensor(0.05), [0.9, 0.999]


def value_in_place(run):
    LR.fill_(-1.0)


def beta_in_place(run):
    BETAS[0] = 2.0


def beta_back(run):
    BETAS[0] = 0.9


REFUSALS = {
    "gradient over a weight": Refusal(gradient_over_a_weight, gradient_back, "shares its memory"),
    "weight over a weight": Refusal(weight_over_a_weight, weights_apart, "shares its memory"),
    "weight cut": Refusal(weight_data(lambda w: w[:6]), weight_back, "has shape", RuntimeError),
    "weight of another dtype": Refusal(
        weight_data(Tensor.bfloat16), weight_back, "has exp_avg as|has basis as"
    ),
    "weight with a pending negation": Refusal(
        weight_data(torch._neg_view), weight_back, "pending negation"
    ),
    "gradient cut": Refusal(
        gradient_data(lambda g: g[:6]), gradient_renewed, "has shape", RuntimeError
    ),
    "gradient sparse": Refusal(
        lambda run: setattr(run.params[1], "grad", run.params[1].grad.to_sparse()),
        gradient_renewed,
        "sparse gradient",
        RuntimeError,
    ),
    "state cut": Refusal(state_entry("exp_avg", lambda m: m[:, :1]), state_back, "exp_avg has"),
    "state of another type": Refusal(
        state_entry("basis", lambda p: p.view(torch.int32)), state_back, "has basis as"
    ),
    "plain state cut": Refusal(
        state_entry("exp_avg", lambda m: m[:1], 5), state_back, "exp_avg has"
    ),
    "no exp_avg": Refusal(
        lambda run: run.kept.append((1, "exp_avg", run.states()[1].pop("exp_avg"))),
        state_back,
        "has no 'exp_avg'",
    ),
    "side": Refusal(numbers(side=1), numbers(side=0), "expected"),
    "rank taken away": Refusal(without_rank, with_rank, "has the state of a projected parameter"),
    "lr below 0": Refusal(group(lr=-1.0), group(lr=0.05), "lr must be at least 0"),
    "lr below 0 in place": Refusal(
        value_in_place, lambda run: LR.fill_(0.05), "lr must be at least 0", options={"lr": LR}
    ),
    "lr of two elements": Refusal(
        group(lr=torch.ones(2)), group(lr=0.05), "lr must have one element"
    ),
    "no lr": Refusal(forget_lr, lr_back, "has no lr"),
    "beta over 1 in place": Refusal(
        beta_in_place, beta_back, "betas must be", options={"betas": BETAS}
    ),
    "eps": Refusal(group(eps=-1.0), group(eps=1e-6), "eps must be"),
    "weight_decay": Refusal(group(weight_decay=-1.0), group(weight_decay=0.0), "weight_decay must"),
    "maximize": Refusal(group(maximize="no"), group(maximize=False), "maximize must be", TypeError),
    "scale": Refusal(group(scale=-1.0), group(scale=0.25), "scale must be"),
    "rank": Refusal(group(rank=0), group(rank=RANK), "rank must be"),
    "rank as a float": Refusal(
        group(rank=float(RANK)), group(rank=RANK), "rank must be", TypeError
    ),
    "gap as a float": Refusal(
        group(update_proj_gap=float(GAP)), group(update_proj_gap=GAP), "proj_gap must", TypeError
    ),
    "proj_type": Refusal(group(proj_type="up"), group(proj_type="std"), "proj_type must be"),
    "unknown backend": Refusal(sets(backend="best"), sets(backend="auto"), "is not one of"),
    "capturable": Refusal(
        sets(capturable=True), sets(capturable=False), "not capturable", backends=("native",)
    ),
}


@pytest.mark.parametrize(
    ("name", "backend"), [(name, each) for name, row in REFUSALS.items() for each in row.backends]
)
def test_what_cannot_be_followed_is_refused_before_anything_changes(name, backend):
    row = REFUSALS[name]
    histories = []
    for anew in (False, True):
        run = Run(backend, anew=anew, **row.options)
        run.train(2)
        row.change(run)
        before = run.bits()
        for _ in range(2):
            with pytest.raises(row.error, match=row.message):
                run.update()
        assert_same([run.bits()], [before])
        row.back(run)
        run.train(3)
        histories.append(run.history)
    assert_same(*histories)


@pytest.mark.parametrize("anew", [False, True])
def test_a_sparse_gradient_is_refused_after_one_with_its_strides(anew):
    """A sparse tensor tells strides of 0, and so does the gradient of a sum."""
    run = Run("native", anew=anew)
    run.form = lambda values: values.flatten()[0].expand_as(values)
    run.train(2)
    before = run.bits()
    dense = run.params[1].grad
    run.params[1].grad = torch.ones_like(run.params[1]).to_sparse()
    assert run.params[1].grad.stride() == dense.stride()
    with pytest.raises(RuntimeError, match="sparse gradient"):
        run.update()
    assert_same([run.bits()], [before])


def test_the_device_of_an_lr_is_looked_at_with_capturable():
    """A learning rate on the meta device stands for one on a GPU."""
    run = Run("reference", capturable=True)
    run.train(1)
    run.groups[0]["lr"] = lr = torch.tensor(0.1, device="meta")
    run.optimizer._prepared()
    run.optimizer.capturable = False
    with pytest.raises(ValueError, match="lr is a tensor on meta"):
        run.optimizer.step()
    run.optimizer.capturable = True
    run.groups[0]["lr"] = lr.expand(2)
    with pytest.raises(ValueError, match="lr must have one element"):
        run.optimizer._prepared()


@pytest.fixture
def preparations(monkeypatch):
    """An entry for each time that batches are prepared."""
    calls = []
    prepare = LowRankAdamW._prepare

    def counted(optimizer):
        calls.append(optimizer)
        return prepare(optimizer)

    monkeypatch.setattr(LowRankAdamW, "_prepare", counted)
    return calls


STEADY = {
    "fira": {},
    "galore": GALORE,
    "bfloat16": {**HALF, "rounding": "stochastic"},
    "maximize": {"maximize": True},
    "monitor": {"monitor": True},
    "capturable": {"capturable": True, "backend": "foreach"},
    "in turn": {"subspace": Subspace()},
    "svd": {"subspace": "svd"},
    "carried": {"subspace": Subspace(moments="carry")},
    "criterion": {"subspace": Subspace(criterion="displacement", threshold=9.0, check_gap=1)},
    "lazy": {"subspace": Subspace(lazy=0.0)},
}


@pytest.mark.parametrize("moving", [False, True], ids=["gradients stay", "gradients move"])
@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("backend", BACKENDS)
def test_steady_steps_prepare_nothing(preparations, backend, name, moving):
    run = Run(**{"backend": backend, **STEADY[name]})
    schedule = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.9)
    run.form = Tensor.clone if moving else None
    for _ in range(8):
        run.step()
        schedule.step()
    assert all(state["refreshes"] > 1 for state in run.states()[:5])
    assert len(preparations) == 1


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("form", [Tensor.clone, holes, negated])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_taken_away_after_a_step_is_freed(backend, name, form):
    """Gradients and the tensors of a state, not before the next step but at once."""
    run = Run(**{"backend": backend, **STEADY[name]})
    run.form = form
    for _ in range(4):
        run.step()
    gone = [StorageWeakRef(param.grad.untyped_storage()) for param in run.params[:7]]
    for param in run.params:
        param.grad = None
    for state in run.states():
        for key in [key for key, value in state.items() if isinstance(value, Tensor)]:
            gone.append(StorageWeakRef(state[key].untyped_storage()))
            state[key] = state[key].clone()
    assert all(ref.expired() for ref in gone)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("moved", ["weight", "gradient"])
def test_what_moved_to_another_device_alone_is_refused(moved):
    run = Run("reference")
    run.train(2)
    tensor = run.params[1] if moved == "weight" else run.params[1].grad
    tensor.data = tensor.data.cuda()
    with pytest.raises(RuntimeError, match="on cuda:0"):
        run.update()
