"""Gradients released in the backward pass: the bits of whole steps, one matrix of gradients at a
time, and a refusal of all that needs more.
"""

import contextlib
import copy
import gc
import warnings
import weakref

import pytest
import torch
from integration.tiny_runs import GAP, STEPS, assert_same_bits, process_group
from pairs import pairwise
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint

from lowrank_kernels import (
    AdaRankGradAdamW,
    FiraAdamW,
    GaLoreAdamW,
    LowRankAdamW,
    Subspace,
    release_gradients,
)
from lowrank_kernels.optim import lowrank_adamw
from lowrank_kernels.optim.alone import Alone

BACKENDS = ("reference", "foreach", "native")
METHODS = {
    "galore": GaLoreAdamW,
    "fira": FiraAdamW,
    "paper": lambda groups, **options: LowRankAdamW(groups, residual="paper", **options),
    "adarankgrad": AdaRankGradAdamW,
}
DTYPES = (torch.float32, torch.bfloat16)
FORMATS = {
    "wide": {},
    "codes": {"state": "int8", "basis": "int8"},
    "low bits": {"state": "bfloat16", "basis": "int4", "master": 24},
    "noise": {"rounding": "stochastic"},
    "counted": {"monitor": True, "maximize": True},
}
SUBSPACES = {
    "in turn": {},
    "all at once": {"subspace": Subspace(stagger=False)},
    "svd": {"subspace": "svd"},
    "power": {"subspace": "power"},
}


class Net(nn.Module):
    """Equal matrices at odd sizes, a parameter that is used twice and one that is not used."""

    def __init__(self, layers=3, width=17, hidden=29):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, hidden), "down": nn.Linear(hidden, width)})
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.unused = nn.Linear(width, width)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.norm(x) @ self.embedding.weight.T


def loss_of(model, seed, scale=1.0):
    tokens = torch.randint(0, 11, (4, 6), generator=torch.Generator().manual_seed(seed))
    logits = model(tokens).float().flatten(0, 1)
    return scale * nn.functional.cross_entropy(logits, tokens.roll(-1, 1).flatten())


def setup(method="fira", dtype=torch.float32, named=True, seed=0, net=Net, **options):
    torch.manual_seed(seed)
    model = net().to(dtype)
    hidden, others = {}, {}
    for name, param in model.named_parameters():
        (hidden if "layers" in name and param.dim() == 2 else others)[name] = param
    groups = [
        {"params": list(hidden.items()), "rank": 5, "update_proj_gap": GAP, "weight_decay": 0.1},
        {"params": list(others.items()), "scale": 0.5},
    ]
    if not named:
        groups = [group | {"params": [p for _, p in group["params"]]} for group in groups]
    return model, METHODS[method](groups, **{"lr": 0.01} | options)


def train(model, optimizer, seeds=range(STEPS), scheduler=None):
    for seed in seeds:
        optimizer.zero_grad()
        loss_of(model, seed).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()


def assert_same(first, second):
    assert_same_bits(first, second)
    saved = [optimizer.state_dict() for _, optimizer in (first, second)]
    assert saved[0]["param_groups"] == saved[1]["param_groups"]
    assert saved[0]["state"].keys() == saved[1]["state"].keys()


def assert_release_changes_no_bit(release=True, **options):
    expected, run = setup(**options), setup(**options)
    train(*expected)
    if release:
        release_gradients(*run)
    train(*run)
    assert_same(run, expected)


@pytest.fixture
def released():
    model, optimizer = setup()
    return model, optimizer, release_gradients(model, optimizer)


# The same bits


@pytest.mark.parametrize(
    ("method", "backend", "dtype", "form", "subspace"),
    pairwise(METHODS, BACKENDS, DTYPES, FORMATS, SUBSPACES),
)
def test_the_bits_are_those_of_whole_steps(method, backend, dtype, form, subspace):
    options = FORMATS[form] | {"backend": backend}
    if method != "adarankgrad":
        options |= SUBSPACES[subspace]
    assert_release_changes_no_bit(method=method, dtype=dtype, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"named": False},
        {"lr": torch.tensor(0.01)},
        {"capturable": True, "backend": "foreach"},
        {"dtype": torch.float64, "backend": "reference"},
        {
            "method": "galore",
            "subspace": Subspace(
                residual_energy=0.3,
                moments="carry",
                criterion="displacement",
                threshold=0.05,
                check_gap=2,
                lazy=0.1,
            ),
        },
    ],
    ids=["no names", "lr in a tensor", "capturable", "float64", "all that moves"],
)
def test_other_options_change_no_bit_either(options):
    assert_release_changes_no_bit(**options)


@pytest.mark.parametrize("method", ["galore", "fira"])
def test_triton_gives_a_batch_of_one_the_same_bits(method):
    pytest.importorskip("triton")
    assert_release_changes_no_bit(method=method, backend="triton", net=lambda: Net(2, 16, 20))


def test_a_schedule_and_written_options_are_read_live():
    runs = []
    for releases in (False, True):
        model, optimizer = setup()
        scheduler = CosineAnnealingLR(optimizer, STEPS)
        if releases:
            release_gradients(model, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            train(model, optimizer, range(3), scheduler)
            optimizer.param_groups[0]["weight_decay"] = 0.3
            optimizer.param_groups[0]["betas"] = (0.8, 0.99)
            optimizer.rounding, optimizer.monitor = "stochastic", True
            train(model, optimizer, range(3, STEPS), scheduler)
        runs.append((model, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("options", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("releases", [(True, True), (False, True), (True, False)], ids=str)
def test_a_resumed_run_goes_on_in_the_same_bits(releases, options):
    expected = setup(dtype=torch.bfloat16, **options)
    train(*expected, range(4))
    first = setup(dtype=torch.bfloat16, **options)
    if releases[0]:
        release_gradients(*first)
    train(*first, range(4))
    saved = copy.deepcopy(first[1].state_dict())
    run = setup(dtype=torch.bfloat16, seed=1, **options)
    if releases[1]:
        release_gradients(*run)
    train(*run, range(2))
    run[0].load_state_dict(first[0].state_dict())
    run[1].load_state_dict(saved)
    # Loaded groups are other dictionaries.
    for _, optimizer in (run, expected):
        optimizer.param_groups[0]["lr"] = 0.03
    train(*run, range(4, STEPS))
    train(*expected, range(4, STEPS))
    assert_same(run, expected)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_autocast_around_the_backward_pass_changes_no_bit(where):
    runs = []
    for releases in (False, True):
        model, optimizer = setup()
        if releases:
            release_gradients(model, optimizer)
        for seed in range(STEPS):
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, seed)
                if where == "backward":
                    loss.backward()
            if where == "forward":
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((model, optimizer))
    assert_same(*runs)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_changes_no_bit(use_reentrant):
    class Checkpointed(Net):
        def forward(self, tokens):
            x = self.embedding(tokens)
            for layer in self.layers:
                x = checkpoint(self.block, layer, x, use_reentrant=use_reentrant)
            return self.norm(x)[..., :11]

        def block(self, layer, x):
            return x + layer["down"](torch.tanh(layer["up"](x)))

    assert_release_changes_no_bit(net=Checkpointed)


def test_a_compiled_model_changes_no_bit():
    runs = []
    for releases in (False, True):
        model, optimizer = setup()
        if releases:
            release_gradients(model, optimizer)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for seed in range(STEPS):
            loss_of(compiled, seed).backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append((model, optimizer))
        torch._dynamo.reset()
    assert_same(*runs)


@pytest.mark.parametrize("call", ["place", "keyword"])
def test_a_closure_goes_backward_within_the_step(call):
    expected, run = setup(), setup()
    train(*expected)
    model, optimizer = run
    release_gradients(model, optimizer)
    for seed in range(STEPS):

        def closure(seed=seed):
            optimizer.zero_grad()
            loss = loss_of(model, seed)
            loss.backward()
            return loss

        loss = optimizer.step(closure) if call == "place" else optimizer.step(closure=closure)
        assert loss > 0
    assert_same(run, expected)


def test_the_norm_of_each_parameter_is_limited():
    expected, run = setup(), setup()
    release_gradients(*run, clip=1.0)
    train(*run)
    model, optimizer = expected
    for seed in range(STEPS):
        loss_of(model, seed).backward()
        norms = [
            float(nn.utils.clip_grad_norm_([param], 1.0))
            for param in model.parameters()
            if param.grad is not None
        ]
        assert min(norms) < 1 < max(norms)
        optimizer.step()
        optimizer.zero_grad()
    assert_same(run, expected)


# What it holds and costs


class Alive:
    """Bytes of the gradients that have come and are still there, and their largest sum."""

    def __init__(self, model):
        self.now = self.peak = 0
        for param in model.parameters():
            param.register_hook(self._come)

    def _come(self, grad):
        size = grad.untyped_storage().nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(grad.untyped_storage(), self._gone, size)

    def _gone(self, size):
        self.now -= size


def test_one_gradient_is_there_at_a_time():
    sizes = [4 * param.numel() for param in Net().parameters()]
    for releases, most in ((False, sum(sizes)), (True, max(sizes))):
        model, optimizer = setup()
        alive = Alive(model)
        if releases:
            release_gradients(model, optimizer)
        train(model, optimizer, range(3))
        used = most if releases else most - sum(sizes[-4:-2])  # but what the model does not use
        assert alive.peak <= most
        assert releases or alive.peak > used // 2


def test_all_parameters_decode_in_one_memory():
    model, optimizer = setup(dtype=torch.bfloat16, state="int8", basis="int8", master=24)
    release = release_gradients(model, optimizer)
    train(model, optimizer, range(3))
    used = [each for each in release._each.values() if each._known]
    batches = [batch for each in used for batch in each._known.batches]
    memories = {batch.room.weights[0].untyped_storage().data_ptr() for batch in batches}
    (size,) = {batch.room.weights[0].untyped_storage().nbytes() for batch in batches}
    assert len(batches) == 6
    assert len(memories) == 1
    assert size <= 4 * 17 * 29 + 2 * 29 * 5 + 512


def test_every_parameter_is_prepared_once(monkeypatch):
    names = []
    prepare = LowRankAdamW._prepare

    def note(self):
        names.append(self.name)
        return prepare(self)

    model, optimizer = setup(subspace="svd")
    release_gradients(model, optimizer)
    train(model, optimizer, range(2))
    monkeypatch.setattr(Alone, "_prepare", note)
    train(model, optimizer, range(2, GAP))
    assert not names
    optimizer.load_state_dict(optimizer.state_dict())
    train(model, optimizer, range(GAP + 1, GAP + 2))
    assert len(names) == len(set(names)) == len(optimizer.state)


def test_nothing_keeps_a_model_or_an_optimizer_that_nobody_has():
    model, optimizer = setup()
    release_gradients(model, optimizer)
    train(model, optimizer, range(2))
    loss_of(model, 0).backward()
    ends = weakref.ref(model), weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert ends[1]() is None
    model.zero_grad()
    loss_of(model, 0).backward()
    del model
    gc.collect()
    assert ends[0]() is None


# Before, beside and after


def test_after_remove_all_is_as_before():
    expected, run = setup(), setup()
    with release_gradients(*run) as release:
        train(*run, range(3))
        loss_of(run[0], 3).backward()
    assert all(param.grad is None for param in run[0].parameters())
    train(*expected, range(4))
    train(*run, range(4, STEPS))
    train(*expected, range(4, STEPS))
    assert_same(run, expected)
    assert not any(param._post_accumulate_grad_hooks for param in run[0].parameters())
    assert not run[0]._forward_pre_hooks
    assert not run[1]._optimizer_step_pre_hooks
    assert not run[1]._optimizer_step_post_hooks
    release.remove()
    release_gradients(*run).remove()


def test_what_is_not_released_is_stepped_as_ever():
    """Weights that were frozen, or came later."""
    runs = []
    for releases in (False, True):
        model, optimizer = setup()
        frozen = model.layers[0]["up"].weight.requires_grad_(False)
        if releases:
            release_gradients(model, optimizer)
        train(model, optimizer, range(2))
        frozen.requires_grad_(True)
        model.norm.scale = nn.Parameter(torch.ones(11))
        model.register_forward_hook(lambda module, _, logits: logits * module.norm.scale)
        optimizer.add_param_group({"params": [("norm.scale", model.norm.scale)]})
        for seed in range(2, STEPS):
            optimizer.zero_grad()
            loss_of(model, seed).backward()
            assert frozen.grad.isfinite().all()
            optimizer.step()
        runs.append((model, optimizer))
    assert_same(*runs)


def test_an_exception_leaves_those_stepped_that_it_came_to(released):
    model, optimizer, _ = released
    broken = model.layers[1]["up"].weight
    broken.register_hook(lambda grad: 1 / 0)
    before = [layer["down"].weight.detach().clone() for layer in model.layers]
    with pytest.raises(ZeroDivisionError):
        loss_of(model, 0).backward()
    moved = [
        not torch.equal(old, layer["down"].weight)
        for old, layer in zip(before, model.layers, strict=True)
    ]
    assert moved == [False, True, True]
    broken._backward_hooks.clear()
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, range(2))


def test_gradients_that_are_gone_can_be_cleared_and_named(released):
    model, optimizer, _ = released
    for set_to_none in (False, True):
        loss_of(model, 0).backward()
        grad = model.norm.weight.grad
        assert "norm.weight" in repr(grad)
        assert grad.shape == model.norm.weight.shape
        assert grad.norm() == torch.inf
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
        assert model.norm.weight.grad is None


# Refusals


@contextlib.contextmanager
def nothing_changes(model, error, match):
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=match):
        yield
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("clears", [False, True])
def test_a_second_backward_pass_is_refused(released, clears):
    model, optimizer, _ = released
    loss_of(model, 0).backward()
    if clears:
        optimizer.zero_grad()
    with nothing_changes(model, RuntimeError, r"norm\..*: a second gradient .* larger batch"):
        loss_of(model, 1).backward()
    optimizer.step()
    train(model, optimizer, range(2))


@pytest.mark.parametrize("foreach", [None, True, False])
def test_clipping_by_the_norm_of_all_is_refused(released, foreach):
    model, _, _ = released
    loss_of(model, 0).backward()
    with nothing_changes(model, RuntimeError, "before the norm of all .* clip=.* max_grad_norm=0"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=foreach)
    with nothing_changes(model, RuntimeError, "clip="):
        nn.utils.clip_grad_value_(model.parameters(), 1.0, foreach=foreach or False)


def test_who_only_asks_for_the_norm_is_told_that_nobody_knows(released):
    model, _, _ = released
    loss_of(model, 0).backward()
    assert nn.utils.clip_grad_norm_(model.parameters(), torch.inf) == torch.inf


@pytest.mark.parametrize("unscales", [False, True])
def test_a_grad_scaler_is_refused(released, unscales):
    model, optimizer, _ = released
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(model, 0)).backward()
    with nothing_changes(model, RuntimeError, "GradScaler .* bfloat16"):
        scaler.unscale_(optimizer) if unscales else scaler.step(optimizer)


def test_a_grad_scaler_that_is_disabled_passes(released):
    model, optimizer, _ = released
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for seed in range(2):
        scaler.scale(loss_of(model, seed)).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def test_another_optimizer_of_the_same_parameters_is_refused(released):
    model, _, _ = released
    loss_of(model, 0).backward()
    with nothing_changes(model, RuntimeError, "embedding.weight: "):
        torch.optim.SGD(model.parameters(), lr=1.0).step()


def test_a_weight_whose_gradient_comes_in_parts_is_refused_by_name():
    """Reentrant checkpointing goes backward once for every use."""
    model, optimizer = setup()
    release_gradients(model, optimizer)
    shared = model.layers[0]["up"]

    def use(x):
        return torch.tanh(shared(x))[..., :17]

    x = torch.randn(3, 17, requires_grad=True)
    for _ in range(2):
        x = checkpoint(use, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"layers.0.up.(weight|bias): .*use_reentrant=False"):
        x.sum().backward()


def test_a_parameter_is_released_once(released):
    model, optimizer, release = released
    other = FiraAdamW([("other name", model.norm.weight)])
    for again in (optimizer, other):
        with pytest.raises(ValueError, match="is released already: remove"):
            release_gradients(model, again)
    assert not other._optimizer_step_pre_hooks
    release.remove()
    release_gradients(model, other)


def test_weights_that_share_memory_are_refused():
    weight = nn.Parameter(torch.ones(8, 6))
    twin = nn.Parameter(weight.detach()[:4])
    optimizer = GaLoreAdamW([{"params": [weight, twin], "rank": 2}])
    with pytest.raises(ValueError, match="shares its memory"):
        release_gradients(None, optimizer)
    assert not weight._post_accumulate_grad_hooks


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (lambda m, o: {"optimizer": torch.optim.AdamW(m.parameters())}, TypeError, "not AdamW"),
        (lambda m, o: {"model": m.parameters()}, TypeError, "Module or None, got generator"),
        (lambda m, o: {"clip": 0.0}, ValueError, "clip must be a positive"),
        (lambda m, o: {"clip": float("nan")}, ValueError, "clip must be a positive"),
        (lambda m, o: {"clip": True}, ValueError, "clip must be a positive"),
        (lambda m, o: {"clip": "1.0"}, ValueError, "clip must be a positive"),
    ],
)
def test_wrong_arguments(arguments, error, text):
    model, optimizer = setup()
    with pytest.raises(error, match=text):
        release_gradients(**{"model": model, "optimizer": optimizer} | arguments(model, optimizer))
    assert not model.norm.weight._post_accumulate_grad_hooks


def test_a_captured_step_is_refused(released, monkeypatch):
    model, _, _ = released
    monkeypatch.setattr(lowrank_adamw, "_capturing", lambda: True)
    with nothing_changes(model, RuntimeError, "a CUDA graph cannot capture .* remove"):
        loss_of(model, 0).backward()


def test_a_bad_gradient_is_refused_as_by_a_step(released):
    model, optimizer, _ = released
    optimizer.param_groups[1]["lr"] = float("nan")
    with nothing_changes(model, ValueError, "group 1: lr"):
        loss_of(model, 0).backward()


# Several processes


@pytest.fixture
def one_rank(tmp_path):
    with process_group(0, 1, tmp_path / "store"):
        yield


@pytest.mark.parametrize("first", ["wrapped", "released"])
def test_ddp_is_refused(one_rank, first):
    model, optimizer = setup()
    if first == "wrapped":
        for wrapped in (
            DistributedDataParallel(model),
            nn.Sequential(DistributedDataParallel(model)),
        ):
            with pytest.raises(NotImplementedError, match="DistributedDataParallel averages"):
                release_gradients(wrapped, optimizer)
        return
    release = release_gradients(model, optimizer)
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    with nothing_changes(model, NotImplementedError, "DistributedDataParallel averages"):
        loss_of(wrapped, 0)
    release.remove()
    loss_of(wrapped, 0).backward()


def sharded_run(releases):
    """FSDP2, a unit a layer: each one's gradients are averaged and released together."""
    torch.manual_seed(0)
    model = Net(width=16, hidden=20)
    for part in model.layers[1].values():
        fully_shard(part)
    fully_shard(model)
    optimizer = FiraAdamW(
        [{"params": list(model.named_parameters()), "weight_decay": 0.1}], lr=0.01
    )
    if releases:
        with pytest.raises(NotImplementedError, match=r"is a DTensor.* leave clip out"):
            release_gradients(model, optimizer, clip=1.0)
        release_gradients(model, optimizer)
    rank, seen = torch.distributed.get_rank(), []
    for seed in range(2):
        loss_of(model, 10 * seed + rank).backward()
        seen += [param.grad is None for param in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
    assert all(seen) is releases
    assert all(isinstance(state["exp_avg"], DTensor) for state in optimizer.state.values())
    return {name: p.full_tensor().detach() for name, p in model.named_parameters()}


def worker(rank, folder):
    torch.set_num_threads(1)
    with process_group(rank, 2, folder / "store"):
        torch.save([sharded_run(False), sharded_run(True)], folder / f"{rank}.pt")


def assert_equal(first, second):
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_shards_on_one_rank(one_rank):
    assert_equal(sharded_run(False), sharded_run(True))


def test_shards_on_two_ranks(tmp_path):
    torch.multiprocessing.spawn(worker, (tmp_path,), nprocs=2)
    whole, released = torch.load(tmp_path / "0.pt", weights_only=True)
    assert_equal(whole, released)
