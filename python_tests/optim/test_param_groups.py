"""Which parameters are projected, and that a Conv1D weight trains as the linear weight it stores.

The models are randomly initialized and tiny: what is checked is the classification, by exact names.
"""

import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    JetMoeConfig,
    JetMoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.pytorch_utils import Conv1D

from lowrank_kernels import FiraAdamW, GaLoreAdamW, param_groups
from lowrank_kernels.subspace.range_finders import RANGE_FINDERS, Found, Request

PROJ_TYPES = ("std", "reverse_std", "left", "right")
LAYERS = 2
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 32,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
}
DECODER = SIZES | {"num_attention_heads": 4}
GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 32}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
JETMOE = SIZES | {"kv_channels": 8, "num_local_experts": 8}

ATTENTION = tuple(f"self_attn.{x}_proj" for x in "qkvo")
MLP = tuple(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
CONV1D = ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")


def llama(**options: object) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**DECODER, **options))


class Expected(NamedTuple):
    """A model, the linear modules of each of its blocks that a rank projects, and all other names.

    `plain` are regular expressions of the parameters that must not be projected, so that a model
    whose layout changes fails here and not silently.
    """

    model: Callable[[], nn.Module]
    rank: int
    block: str
    projected: tuple[str, ...]
    plain: tuple[str, ...]


NORMS = (r"model\.norm\.weight", r"\.(input|post_attention)_layernorm\.weight")
EMBEDDING = r"model\.embed_tokens\.weight"
HEAD = r"lm_head\.weight"
ROUTER = r"\.mlp\.gate\.weight"
EXPERTS = r"\.mlp\.experts\.(gate_up|down)_proj"

MODELS = {
    "llama": Expected(llama, 4, "model.layers", ATTENTION + MLP, (EMBEDDING, HEAD, *NORMS)),
    "llama-tied": Expected(
        lambda: llama(tie_word_embeddings=True),
        4,
        "model.layers",
        ATTENTION + MLP,
        (EMBEDDING, *NORMS),
    ),
    "llama-biases": Expected(
        lambda: llama(attention_bias=True, mlp_bias=True),
        4,
        "model.layers",
        ATTENTION + MLP,
        (EMBEDDING, HEAD, *NORMS, r"_proj\.bias"),
    ),
    # Grouped-query attention has 16 x 32 keys and values: at rank 13 a basis and two moments of
    # 13 (16 + 2 * 32) elements would be more than AdamW's 2 * 16 * 32.
    "llama-small-kv": Expected(
        llama,
        13,
        "model.layers",
        ("self_attn.q_proj", "self_attn.o_proj", *MLP),
        (EMBEDDING, HEAD, *NORMS, r"\.self_attn\.[kv]_proj\.weight"),
    ),
    "llama-classifier": Expected(
        lambda: LlamaForSequenceClassification(
            LlamaConfig(**DECODER, num_labels=16, pad_token_id=0)
        ),
        4,
        "model.layers",
        ATTENTION + MLP,
        (EMBEDDING, r"score\.weight", *NORMS),
    ),
    "qwen2": Expected(
        lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)),
        4,
        "model.layers",
        ATTENTION + MLP,
        (EMBEDDING, HEAD, *NORMS, r"\.self_attn\.[qkv]_proj\.bias"),
    ),
    "qwen2-tied": Expected(
        lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER, tie_word_embeddings=True)),
        4,
        "model.layers",
        ATTENTION + MLP,
        (EMBEDDING, *NORMS, r"\.self_attn\.[qkv]_proj\.bias"),
    ),
    "qwen3": Expected(
        lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=8)),
        4,
        "model.layers",
        ATTENTION + MLP,
        (EMBEDDING, HEAD, *NORMS, r"\.self_attn\.[qk]_norm\.weight"),
    ),
    "gpt2": Expected(
        lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
        4,
        "transformer.h",
        CONV1D,
        (r"\.wte\.weight", r"\.wpe\.weight", r"\.ln_[12f]\.(weight|bias)", r"\.c_\w+\.bias"),
    ),
    "mixtral": Expected(
        lambda: MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4)),
        4,
        "model.layers",
        ATTENTION,
        (EMBEDDING, HEAD, *NORMS, ROUTER, EXPERTS),
    ),
    # Its router is an nn.Linear, as in Gemma 4, DBRX and Switch; rank 2 is small enough for it.
    "jetmoe-linear-router": Expected(
        lambda: JetMoeForCausalLM(JetMoeConfig(**JETMOE)),
        2,
        "model.layers",
        ("self_attention.kv_proj",),
        (EMBEDDING, *NORMS, r"\.router\.layer\.weight", r"put_linear\.weight", r"\.bias"),
    ),
}


def split(groups: list[dict]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The projected and the plain parameters of groups, by name."""
    projected, plain = {}, {}
    for group in groups:
        (projected if "rank" in group else plain).update(group["params"])
    return projected, plain


def all_pairs(groups: list[dict]) -> list[tuple[str, Tensor]]:
    return [pair for group in groups for pair in group["params"]]


def assert_complete(groups: list[dict], model: nn.Module) -> None:
    """Every parameter of the model, once, under its own name, and no empty group."""
    pairs = all_pairs(groups)
    assert sorted(name for name, _ in pairs) == sorted(dict(model.named_parameters()))
    for name, param in pairs:
        assert param is model.get_parameter(name), name
    assert all(group["params"] for group in groups)


@pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
def test_projects_exactly_the_linear_weights_of_the_blocks(row: Expected) -> None:
    model = row.model()
    groups = param_groups(model, rank=row.rank)
    projected, plain = split(groups)
    expected = {
        f"{row.block}.{layer}.{name}.weight" for layer in range(LAYERS) for name in row.projected
    }
    assert set(projected) == expected
    for pattern in row.plain:
        assert any(re.search(pattern, name) for name in plain), pattern
    assert [n for n in plain if not any(re.search(p + "$", n) for p in row.plain)] == []
    assert_complete(groups, model)


@pytest.mark.parametrize("weight_decay", [None, 0.1])
@pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
def test_the_optimizer_keeps_the_names(row: Expected, weight_decay: float | None) -> None:
    model = row.model()
    groups = param_groups(model, rank=row.rank, weight_decay=weight_decay)
    names = [[name for name, _ in group["params"]] for group in groups]
    optimizer = FiraAdamW(groups)
    assert [group["param_names"] for group in optimizer.param_groups] == names
    assert [group["param_names"] for group in optimizer.state_dict()["param_groups"]] == names
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            assert param is model.get_parameter(name)


@pytest.mark.parametrize("row", MODELS.values(), ids=MODELS)
def test_weight_decay_is_for_matrices(row: Expected) -> None:
    model = row.model()
    assert all("weight_decay" not in group for group in param_groups(model, rank=row.rank))
    groups = param_groups(model, rank=row.rank, weight_decay=0.1)
    for group in groups:
        for name, param in group["params"]:
            assert group["weight_decay"] == (0.1 if param.dim() > 1 else 0.0), name
    assert_complete(groups, model)
    assert split(groups)[0].keys() == split(param_groups(model, rank=row.rank))[0].keys()


def test_without_weight_decay_the_one_of_the_optimizer_holds() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    optimizer = GaLoreAdamW(param_groups(model, rank=2), weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]
    optimizer = GaLoreAdamW(param_groups(model, rank=2, weight_decay=0.0), weight_decay=0.3)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.0]


def test_options_reach_the_projected_groups_only() -> None:
    options = {"rank": 3, "update_proj_gap": 7, "scale": 0.5, "proj_type": "left"}
    groups = param_groups(nn.Sequential(nn.Linear(8, 9)), **options)
    without_params = [{k: v for k, v in g.items() if k != "params"} for g in groups]
    assert sorted(without_params, key=len) == [{}, options]


# Parameter count by (rows, cols, rank): basis + 2 moments against AdamW's 2 moments.
@pytest.mark.parametrize(
    ("rows", "cols", "rank", "projected"),
    [
        (6, 6, 3, True),  # 54 < 72
        (6, 6, 4, False),  # 72 = 72: nothing is saved
        (16, 32, 12, True),  # 960 < 1024
        (16, 32, 13, False),  # 1040 > 1024
        (32, 16, 12, True),
        (32, 16, 13, False),
        (1, 64, 1, False),
        (64, 1, 1, False),
    ],
)
def test_a_matrix_is_projected_where_that_saves_memory(
    rows: int, cols: int, rank: int, projected: bool
) -> None:
    model = nn.ModuleList([nn.Linear(cols, rows), nn.Linear(200, 200)])
    groups = param_groups(model, rank=rank)
    assert ("0.weight" in split(groups)[0]) == projected
    assert_complete(groups, model)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize(("rows", "cols"), [(12, 7), (7, 12), (8, 8)], ids=lambda size: str(size))
def test_conv1d_takes_the_other_side(rows: int, cols: int, proj_type: str) -> None:
    """A linear weight is rows x cols, a Conv1D holds it as cols x rows."""
    linear_right = {
        "std": rows >= cols,
        "reverse_std": rows < cols,
        "left": False,
        "right": True,
    }[proj_type]
    for module, right in ((nn.Linear(cols, rows), linear_right), (Conv1D(rows, cols), True)):
        if isinstance(module, Conv1D):
            right = not linear_right
        model = nn.ModuleList([module])
        optimizer = GaLoreAdamW(param_groups(model, rank=2, proj_type=proj_type))
        (row,) = (row for row in optimizer.explain() if row["projected"])
        assert row["side"] == ("right" if right else "left"), type(module).__name__


class Twin:
    """One random linear layer trained in float64, as nn.Linear or stored transposed."""

    def __init__(self, rows: int, cols: int, make: Callable, transposed: bool, **options) -> None:
        self.transposed = transposed
        weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(0)).double()
        module = Conv1D(rows, cols) if transposed else nn.Linear(cols, rows)
        module.weight = nn.Parameter(weight.T.clone() if transposed else weight)
        self.weight = module.weight
        groups = param_groups(nn.ModuleList([module]), rank=3, weight_decay=0.1, **options)
        self.optimizer = make(groups, lr=0.1)

    def step(self, grad: Tensor) -> Tensor:
        """Takes a step and returns the weight in the orientation of nn.Linear."""
        self.weight.grad = grad.T.clone() if self.transposed else grad.clone()
        self.optimizer.step()
        return self.weight.detach().T if self.transposed else self.weight.detach()


def fira_paper(*args, **kwargs) -> FiraAdamW:
    return FiraAdamW(*args, residual="paper", **kwargs)


METHODS = {"galore": GaLoreAdamW, "fira": FiraAdamW, "fira-paper": fira_paper}
SHAPES = {"tall": (12, 7), "wide": (7, 12), "square": (8, 8)}
STEPS = 7


def gradients(rows: int, cols: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(rows, cols, generator=generator, dtype=torch.float64) for _ in range(STEPS))


def assert_twins_agree(rows: int, cols: int, make: Callable, **options) -> None:
    linear = Twin(rows, cols, make, transposed=False, **options)
    conv1d = Twin(rows, cols, make, transposed=True, **options)
    before = linear.weight.detach().clone()
    for grad in gradients(rows, cols):
        expected, actual = linear.step(grad), conv1d.step(grad)
        change = (expected - before).abs().max()
        assert change > 1e-3
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * change.item())


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_conv1d_trains_as_the_transpose(
    shape: tuple[int, int], proj_type: str, make: Callable
) -> None:
    """Under one basis: its sign is free, but the moments start at zero and turn with it."""
    assert_twins_agree(*shape, make, proj_type=proj_type, update_proj_gap=STEPS + 1)


@pytest.mark.parametrize("make", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_conv1d_trains_as_the_transpose_over_refreshes(
    shape: tuple[int, int], proj_type: str, make: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Moments are kept over a refresh, so both twins need the singular vectors in one sign."""
    randomized = RANGE_FINDERS["randomized"]

    def of_one_sign(request: Request) -> Found:
        found = randomized(request)
        largest = found.bases.gather(1, found.bases.abs().argmax(1, keepdim=True))
        return found._replace(bases=found.bases * largest.sign())

    monkeypatch.setitem(RANGE_FINDERS, "randomized", of_one_sign)
    assert_twins_agree(*shape, make, proj_type=proj_type, update_proj_gap=2)


BLOCK = {f"model.layers.{{}}.{name}.weight" for name in ATTENTION + MLP}
TARGETS = {
    "name part": ("q_proj", {"self_attn.q_proj"}, (0, 1)),
    "parent": ("self_attn", set(ATTENTION), (0, 1)),
    "list": (["q_proj", "down_proj"], {"self_attn.q_proj", "mlp.down_proj"}, (0, 1)),
    "tuple": (("q_proj", "down_proj"), {"self_attn.q_proj", "mlp.down_proj"}, (0, 1)),
    "set": ({"q_proj", "down_proj"}, {"self_attn.q_proj", "mlp.down_proj"}, (0, 1)),
    "regex": (r"layers\.1\..*\.(up|down)_proj$", {"mlp.up_proj", "mlp.down_proj"}, (1,)),
    "list of regex": ([r"\.[qk]_proj$", "^none"], {"self_attn.q_proj", "self_attn.k_proj"}, (0, 1)),
    "partly unmatched": (["q_proj", "no_such"], {"self_attn.q_proj"}, (0, 1)),
    "all-linear": ("all-linear", set(ATTENTION + MLP), (0, 1)),
}


@pytest.mark.parametrize("row", TARGETS.values(), ids=TARGETS)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_targets(row: tuple, tied: bool) -> None:
    targets, modules, layers = row
    model = llama(tie_word_embeddings=tied)
    groups = param_groups(model, rank=4, targets=targets)
    expected = {f"model.layers.{layer}.{name}.weight" for layer in layers for name in modules}
    assert set(split(groups)[0]) == expected
    assert_complete(groups, model)


def test_targets_may_be_a_one_shot_iterable() -> None:
    groups = param_groups(llama(), rank=4, targets=(name for name in ("q_proj", "down_proj")))
    suffixes = ("self_attn.q_proj.weight", "mlp.down_proj.weight")
    assert set(split(groups)[0]) == {
        f"model.layers.{layer}.{suffix}" for layer in range(LAYERS) for suffix in suffixes
    }


@pytest.mark.parametrize("targets", ["no_such", ["no_such", "nor_this"], [], r"^q_proj$"])
def test_no_match_lists_the_candidates(targets: object) -> None:
    with pytest.raises(ValueError, match="no trained linear module matches") as error:
        param_groups(llama(), rank=4, targets=targets)
    text = str(error.value)
    assert repr(targets) in text
    listed = [line.strip() for line in text.splitlines()[1:]]
    assert listed == [f"model.layers.*.{name}" for name in ATTENTION + MLP]


def test_no_match_without_any_linear_module() -> None:
    with pytest.raises(ValueError, match="none"):
        param_groups(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LayerNorm(8)), rank=2)


@pytest.mark.parametrize("targets", ["lm_head", ["q_proj", "lm_head"]])
def test_the_output_head_is_never_projected(targets: object) -> None:
    if targets == "lm_head":
        with pytest.raises(ValueError, match="no trained linear module matches"):
            param_groups(llama(), rank=4, targets=targets)
        return
    projected, _ = split(param_groups(llama(), rank=4, targets=targets))
    assert set(projected) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(LAYERS)}


class Wrapper(nn.Module):
    """What DistributedDataParallel, adapters and user modules around a model look like."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def test_all_linear_spares_the_head_of_a_wrapped_model() -> None:
    bare, _ = split(param_groups(llama(), rank=4, targets="all-linear"))
    wrapped, _ = split(param_groups(Wrapper(llama()), rank=4, targets="all-linear"))
    assert set(wrapped) == {f"module.{name}" for name in bare}


def test_a_head_module_without_a_weight_is_no_error() -> None:
    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(16, 16)])
            self.head = nn.Sequential(nn.LayerNorm(16), nn.ReLU())

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    assert set(split(param_groups(Classifier(), rank=2))[0]) == {"layers.0.weight"}


def test_a_rank_too_large_for_every_matrix_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"rank 64 saves no memory.*\(16, 32\).*\(64, 32\)"):
        param_groups(llama(), rank=64)


@pytest.mark.parametrize("proj_type", ["full", "random", "Left", ""])
def test_unknown_proj_type(proj_type: str) -> None:
    with pytest.raises(ValueError, match="proj_type must be one of std, reverse_std, left, right"):
        param_groups(nn.Sequential(nn.Linear(8, 8)), rank=2, proj_type=proj_type)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rank": 0}, ValueError),
        ({"rank": -1}, ValueError),
        ({"rank": 2.5}, TypeError),
        ({"rank": 2, "update_proj_gap": 0}, ValueError),
        ({"rank": 2, "scale": -1.0}, ValueError),
        ({"rank": 2, "weight_decay": -0.1}, ValueError),
    ],
)
def test_bad_options_do_not_reach_training(options: dict, error: type[Exception]) -> None:
    name = list(options)[-1]
    with pytest.raises(error, match=name):
        GaLoreAdamW(param_groups(nn.Sequential(nn.Linear(8, 8)), **options))


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.LayerNorm(16), nn.Linear(16, 8))


class Mlp(nn.Module):
    """Linear modules outside numbered blocks, next to numbered ones and to other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 16, bias=False), "down": nn.Linear(16, 8)})
            for _ in range(2)
        )
        self.conv = nn.Sequential(nn.Conv1d(8, 8, 3), nn.Conv2d(8, 8, 3))
        self.attention = nn.ModuleList([nn.MultiheadAttention(8, 2)])
        self.head = nn.Linear(8, 16, bias=False)


BLOCKS = {f"blocks.{i}.{name}.weight" for i in range(2) for name in ("up", "down")}
IN_BLOCKS = BLOCKS | {"attention.0.in_proj_weight", "attention.0.out_proj.weight"}
USER_MODELS = {
    "sequential": (sequential, None, {"0.weight", "3.weight"}),
    "nested": (
        lambda: nn.ModuleDict({"body": sequential()}),
        None,
        {"body.0.weight", "body.3.weight"},
    ),
    "module list": (lambda: nn.ModuleList([nn.Linear(8, 8, bias=False)]), None, {"0.weight"}),
    "bare linear": (lambda: nn.Linear(8, 8), "all-linear", {"weight"}),
    "blocks": (Mlp, None, IN_BLOCKS),
    "blocks, all": (Mlp, "all-linear", IN_BLOCKS | {"stem.weight", "head.weight"}),
    "blocks, named": (
        Mlp,
        ["^stem$", "up"],
        {"stem.weight", "blocks.0.up.weight", "blocks.1.up.weight"},
    ),
}


@pytest.mark.parametrize("row", USER_MODELS.values(), ids=USER_MODELS)
def test_user_models(row: tuple) -> None:
    make, targets, expected = row
    model = make()
    groups = param_groups(model, rank=2, targets=targets)
    assert set(split(groups)[0]) == expected
    assert_complete(groups, model)


def test_linear_modules_outside_blocks_are_named_when_nothing_matches() -> None:
    model = nn.ModuleDict({"fc1": nn.Linear(8, 16), "fc2": nn.Linear(16, 8)})
    with pytest.raises(ValueError, match=r"fc1\n\s+fc2"):
        param_groups(model, rank=2)


def test_a_shared_linear_weight_appears_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    groups = param_groups(model, rank=2)
    assert set(split(groups)[0]) == {"0.weight"}
    assert_complete(groups, model)


@pytest.mark.parametrize("embedding_first", [True, False])
def test_a_tied_weight_in_a_block_is_an_embedding(embedding_first: bool) -> None:
    embedding, head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
    head.weight = embedding.weight
    modules = [embedding, head] if embedding_first else [head, embedding]
    groups = param_groups(nn.Sequential(*modules, nn.Linear(8, 8)), rank=2)
    assert set(split(groups)[0]) == {"2.weight"}


def test_groups_come_in_one_order() -> None:
    """A checkpoint finds parameters by position: freezing or a second call must not move them."""

    def layout(model: nn.Module) -> list:
        groups = param_groups(model, rank=4, weight_decay=0.1)
        return [[name for name, _ in group["params"]] for group in groups]

    model = MODELS["gpt2"].model()
    first = layout(model)
    assert layout(model) == first
    model.transformer.h[0].requires_grad_(False)
    assert layout(model) == first


def test_frozen_parameters_wait_in_their_groups() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[0].requires_grad_(False)
    groups = param_groups(model, rank=2)
    assert set(split(groups)[0]) == {"0.weight", "1.weight"}
    assert_complete(groups, model)
    optimizer = FiraAdamW(groups, lr=0.1)
    frozen = [param.detach().clone() for param in model[0].parameters()]

    def train() -> None:
        optimizer.zero_grad()
        model(torch.ones(4, 8)).square().sum().backward()
        optimizer.step()

    train()
    for param, before in zip(model[0].parameters(), frozen, strict=True):
        assert torch.equal(param, before)
        assert param not in optimizer.state
    model[0].requires_grad_(True)
    train()
    for param, before in zip(model[0].parameters(), frozen, strict=True):
        assert not torch.equal(param, before)
    assert optimizer.state[model[0].weight]["exp_avg"].shape == (8, 2)


@pytest.mark.parametrize("targets", [None, "all-linear", ["0", "1"]])
def test_a_parametrized_linear_is_trained_by_adamw(targets: object) -> None:
    """Its weight is computed, so the factors are the parameters, and none of them may get lost."""
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8))
    groups = param_groups(model, rank=2, targets=targets)
    projected, plain = split(groups)
    assert set(projected) == {"1.weight"}
    factors = {f"0.parametrizations.weight.original{i}" for i in range(2)}
    assert set(plain) == {"0.bias", "1.bias", *factors}
    assert_complete(groups, model)

    optimizer = FiraAdamW(groups, lr=0.1)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    for name, param in model.named_parameters():
        assert not torch.equal(param, before[name]), name


def test_only_parametrized_linear_modules_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trained linear module matches"):
        param_groups(nn.Sequential(weight_norm(nn.Linear(8, 8))), rank=2)


def test_a_subclass_of_linear_is_projected() -> None:
    class Quiet(nn.Linear):
        pass

    class Loud(Conv1D):
        pass

    model = nn.ModuleList([Quiet(8, 8), Loud(8, 8)])
    assert set(split(param_groups(model, rank=2))[0]) == {"0.weight", "1.weight"}


def test_a_users_convolution_called_conv1d_is_not_a_linear_layer() -> None:
    class Conv1D(nn.Conv1d):  # a common spelling in user code
        pass

    model = nn.ModuleList([Conv1D(16, 16, 3), nn.Linear(8, 8)])
    groups = param_groups(model, rank=2)
    assert set(split(groups)[0]) == {"1.weight"}
    assert_complete(groups, model)


def test_what_is_left_to_adamw_moves_at_most_at_lr():
    """APOLLO's scales are of whole gradients, and may be above 1."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)))
    ranks = {"0.weight": None, "*": 2}
    for scale, expected in ((0.25, 0.25), (1.0, 1.0), (11.3, 1.0)):
        groups = param_groups(model, ranks, scale=scale)
        found = {group["scale"] for group in groups if "scale" in group and "rank" not in group}
        assert found == {expected}
