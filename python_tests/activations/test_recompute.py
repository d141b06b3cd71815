import copy
import io
import pickle

import pytest
import torch
from activations.llama import (
    HEADS,
    HIDDEN,
    INTERMEDIATE,
    RECOMPUTED_LAYER,
    language_model,
    token_ids,
    whole,
)
from torch import nn
from torch.nn import functional

from lowrank_kernels import recompute_activations, saved_bytes
from lowrank_kernels.activations.recompute import Recipe, input_of, recomputed

FAMILIES = ("Llama", "Qwen2", "Qwen3", "Mistral", "Gemma", "Gemma2", "Gemma3")


class ScaledNorm(nn.Module):
    """A norm in the dtype of its input."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight


class Gated(nn.Module):
    def __init__(self, width, inner, bias=False):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A norm, three linears that read it, a second norm and a gated product."""

    def __init__(self, width=24, inner=40, norm=nn.LayerNorm, bias=True):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q, self.k, self.v = (nn.Linear(width, width, bias=bias) for _ in range(3))
        self.mlp = Gated(width, inner, bias)

    def forward(self, x):
        n = self.norm1(x)
        x = x + self.q(n) * self.k(n).sigmoid() + self.v(n)
        return x + self.mlp(self.norm2(x))


def block(dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Block(**options).to(dtype)


def tokens(dtype=torch.float64, shape=(2, 5, 24), requires_grad=True):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.requires_grad_(requires_grad)


def gradients(model, x, run=None):
    """Output and gradients of x and of all parameters, by name."""
    x = x.detach().requires_grad_(x.requires_grad)
    model.zero_grad()
    y = model(x) if run is None else run(x)
    y.square().sum().backward()
    named = {name: param.grad for name, param in model.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **named}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if value is None:
            assert found[name] is None, name
        else:
            assert torch.equal(found[name], value), name


def language_gradients(model, ids):
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    named = {name: param.grad for name, param in model.named_parameters()}
    return {"loss": output.loss.detach(), **named}


# Bytes


def test_a_language_model_saves_what_the_table_of_the_reference_says():
    assert sum(RECOMPUTED_LAYER.values()) == 12 * HIDDEN + 4 * INTERMEDIATE + 4 * HEADS
    ids, model = token_ids(), language_model()
    recompute_activations(model)
    report = saved_bytes(model, ids, labels=ids)
    assert report.total == whole(RECOMPUTED_LAYER, 2 * HIDDEN)  # the input of the last norm
    assert "linear" not in report.by_kind()


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24)])
def test_a_block_saves_the_sources_only(shape):
    model, x = block(), tokens(shape=shape)
    recompute_activations(model)
    attention = ("q(n)", "sigmoid of k(n)")
    mlp = 2 * 40
    rows = x.numel() // 24
    assert saved_bytes(model, x).total == 8 * rows * (2 * 24 + len(attention) * 24 + mlp)


# Gradients


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_their_bits(family, dtype):
    ids, model = token_ids(), language_model(family, dtype)
    expected, before = language_gradients(model, ids), saved_bytes(model, ids, labels=ids)
    report = recompute_activations(model)
    assert not [row for row in report.rows if row.skipped]
    assert_same(language_gradients(model, ids), expected)
    assert saved_bytes(model, ids, labels=ids).total < 0.8 * before.total


def test_grouped_queries_and_biases_keep_their_bits():
    options = {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}
    ids, model = token_ids(), language_model(**options)
    expected = language_gradients(model, ids)
    recompute_activations(model)
    assert_same(language_gradients(model, ids), expected)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 24), (2, 3, 5, 24), (0, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linears_keep_their_bits(bias, shape, dtype):
    model, x = block(dtype, bias=bias), tokens(dtype, shape)
    expected = gradients(model, x)
    recompute_activations(model)
    assert_same(gradients(model, x), expected)


@pytest.mark.parametrize("norm", [ScaledNorm, nn.RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_in_the_dtype_of_its_input_is_at_most_twice_as_far_from_float64(norm, dtype):
    model, x = block(dtype, norm=norm), tokens(dtype)
    exact = gradients(copy.deepcopy(model).double(), x.double())
    plain = gradients(model, x)
    recompute_activations(model)
    found = gradients(model, x)
    assert torch.equal(found["y"], plain["y"])
    for name, value in exact.items():
        errors = [(each[name].double() - value).norm() for each in (found, plain)]
        assert errors[0] <= 2 * errors[1], name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_keeps_its_bits(dtype):
    def run(x):
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    model, x = block(dtype), tokens(dtype)
    expected = gradients(model, x, run)
    with torch.autocast("cpu", torch.bfloat16):
        before = saved_bytes(model, x).total
    recompute_activations(model)
    assert_same(gradients(model, x, run), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert saved_bytes(model, x).total < before


@pytest.mark.parametrize("forward", [False, True])
def test_autocast_is_that_of_the_forward(forward):
    x, weight = tokens(torch.float32), torch.randn(24, 24)
    with torch.autocast("cpu", torch.bfloat16, enabled=forward):
        y = recomputed(torch.matmul, x, weight)
    assert y.dtype == (torch.bfloat16 if forward else torch.float32)
    load, kept = input_of(y)
    with torch.autocast("cpu", torch.bfloat16, enabled=not forward):
        again = load(kept)
    assert torch.equal(again, y)


FROZEN = {
    "norms": ("norm",),
    "linears": ("q.", "k.", "v.", "_proj."),
    "first half": ("norm1", "q.", "k."),
    "all but q": ("norm", "k.", "v.", "_proj."),
    "all but down": ("norm", "q.", "k.", "v.", "gate_proj", "up_proj"),
    "weights but no biases": (".weight",),
}


@pytest.mark.parametrize("input_trained", [False, True])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_weights(frozen, input_trained):
    model, x = block(), tokens(requires_grad=input_trained)
    for name, param in model.named_parameters():
        param.requires_grad_(not any(part in name for part in FROZEN[frozen]))
    expected, before = gradients(model, x), saved_bytes(model, x).total
    recompute_activations(model)
    assert_same(gradients(model, x), expected)
    assert saved_bytes(model, x).total <= before


def test_lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model = peft.get_peft_model(language_model(), config)
    ids = token_ids()
    expected, before = language_gradients(model, ids), saved_bytes(model, ids, labels=ids).total
    recompute_activations(model)
    assert_same(language_gradients(model, ids), expected)
    assert saved_bytes(model, ids, labels=ids).total < before


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    def run(x):
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=reentrant)

    model, x = block(), tokens()
    expected = gradients(model, x, run)
    recompute_activations(model)
    assert_same(gradients(model, x, run), expected)
    x = tokens()
    if not reentrant:  # the other one saves its input in `backward` only
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            run(x)
    holder = nn.Module()
    holder.inner, holder.forward = model, run
    assert saved_bytes(holder, x).total == x.numel() * 8


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_models_keep_their_own_forwards(backend):
    torch._dynamo.reset()
    model, x = block(), tokens()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    expected = gradients(model, x, compiled)
    recompute_activations(model)
    torch._dynamo.reset()
    assert_same(gradients(model, x, compiled), expected)


def test_micro_batches_add_up():
    model = block()
    batches = [tokens(), 2 * tokens().detach()]

    def both():
        model.zero_grad()
        for each in batches:
            model(each).square().sum().backward()
        return {name: param.grad for name, param in model.named_parameters()}

    expected = both()
    recompute_activations(model)
    assert_same(both(), expected)


def test_a_second_backward_and_one_of_a_part():
    model, x = block(), tokens()
    expected = gradients(model, x)
    recompute_activations(model)
    loss = model(x).square().sum()
    for _ in range(2):
        (found,) = torch.autograd.grad(loss, model.k.weight, retain_graph=True)
        assert torch.equal(found, expected["k.weight"])
    for last in (False, True):
        x.grad = None
        model.zero_grad()
        loss.backward(retain_graph=not last)
        assert torch.equal(x.grad, expected["x"])
        assert torch.equal(model.mlp.down_proj.weight.grad, expected["mlp.down_proj.weight"])


def test_a_second_derivative_is_an_error():
    model, x = block(), tokens()
    recompute_activations(model)
    (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_hooks_on_saved_tensors_get_the_sources():
    model, x = block(), tokens()
    expected = gradients(model, x)
    recompute_activations(model)
    with torch.autograd.graph.save_on_cpu():
        assert_same(gradients(model, x), expected)


# What is made again, and when


def count_calls(monkeypatch, norm):
    calls, own = [], norm.forward

    def forward(self, x):
        calls.append(torch.is_grad_enabled())
        return own(self, x)

    monkeypatch.setattr(norm, "forward", forward)
    return calls


@pytest.mark.parametrize("input_trained", [False, True])
def test_siblings_share_what_is_made_again(monkeypatch, input_trained):
    calls = count_calls(monkeypatch, ScaledNorm)
    model, x = block(norm=ScaledNorm), tokens(requires_grad=input_trained)
    for norm in (model.norm1, model.norm2):
        norm.weight.requires_grad_(input_trained)
    recompute_activations(model)
    calls.clear()
    loss = model(x).square().sum()
    # What nothing trains is saved as it is: its source is not saved anyway.
    assert calls == [not input_trained, False]
    loss.backward()
    assert calls[2:] == (2 if input_trained else 1) * [True]


def recipes(monkeypatch):
    made, init = [], Recipe.__init__

    def remember(self, *args):
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(Recipe, "__init__", remember)
    return made


def test_what_was_made_is_freed_after_the_last_that_reads_it(monkeypatch):
    made, model, x = recipes(monkeypatch), block(), tokens()
    recompute_activations(model)
    loss = model(x).square().sum()
    assert len(made) == 3
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert all(recipe._made is None for recipe in made)


def test_recipes_hold_nothing_that_a_checkpoint_wants_to_free(monkeypatch):
    made, model, x = recipes(monkeypatch), block(), tokens()
    recompute_activations(model)
    y = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    for recipe in made:
        held = [value for value in vars(recipe).values() if isinstance(value, torch.Tensor)]
        assert not held
        assert recipe._made is None
    del y


def test_parameters_hooks_run_once():
    model, x = block(), tokens()
    recompute_activations(model)
    seen = []
    model.norm1.weight.register_hook(seen.append)
    model.norm1.register_forward_hook(lambda *args: seen.append("forward"))
    model(x).sum().backward()
    assert len(seen) == 2


def test_a_source_that_was_changed_is_an_error():
    class InPlace(Block):
        def forward(self, x):
            y = x * 1
            n = self.norm1(y)
            q = self.q(n)
            y += 1
            return q + y

    torch.manual_seed(0)
    model = InPlace().double()
    recompute_activations(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        model(tokens()).sum().backward()


@pytest.mark.parametrize("change", ["before", "after"])
def test_a_norms_output_may_be_changed(change):
    class InPlace(Block):
        def forward(self, x):
            n = self.norm1(x)
            if change == "before":
                n *= 2
            q = self.q(n)
            return (q if change == "before" else self.q(n)).sin() + self.v(n[:, :2]).sum()

    torch.manual_seed(0)
    model, x = InPlace().double(), tokens()
    expected = gradients(model, x)
    recompute_activations(model)
    assert_same(gradients(model, x), expected)


def test_a_hook_may_replace_a_norms_output():
    model, x = block(), tokens()
    model.norm1.register_forward_hook(lambda module, args, output: 3 * output)
    expected = gradients(model, x)
    recompute_activations(model)
    assert_same(gradients(model, x), expected)


VIEWS = {
    "view(-1, 24)": 0,
    "view(2, 5, 4, 6)": 0,
    # Where it is no view of the whole, the linear saves a copy, or the output itself.
    "narrow(0, 1, 1)": 2 * 5,
    "narrow(1, 1, 2)": 2 * 2,
    "transpose(0, 1)": 2 * 5,
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_of_a_norms_output(view):
    class Viewed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.RMSNorm(24)
            self.q = nn.Linear(6 if "6" in view else 24, 3)

        def forward(self, x):
            return self.q(eval(f"n.{view}", {"n": self.norm(x)}))

    torch.manual_seed(0)
    model, x = Viewed().double(), tokens()
    expected = gradients(model, x)
    recompute_activations(model)
    assert_same(gradients(model, x), expected)
    assert saved_bytes(model, x).total == 8 * 24 * (2 * 5 + VIEWS[view])


def test_other_functions_can_read_an_input_that_is_made_again():
    class Projected(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.load, kept = input_of(x)
            ctx.save_for_backward(weight, *kept)
            return functional.linear(x, weight)

        @staticmethod
        def backward(ctx, grad):
            weight, *kept = ctx.saved_tensors
            x = ctx.load(kept)
            return grad @ weight, grad.flatten(0, -2).t() @ x.flatten(0, -2)

    x, weight = tokens(), torch.randn(7, 24, dtype=torch.float64, requires_grad=True)
    for y in (x.sin(), recomputed(torch.sin, x), recomputed(torch.sin, x).view(10, 24)):
        x.grad = weight.grad = None
        Projected.apply(y, weight).square().sum().backward()
        found = x.grad, weight.grad
        x.grad = weight.grad = None
        functional.linear(x.sin(), weight).square().sum().backward()
        assert torch.equal(found[0], x.grad)
        assert torch.equal(found[1], weight.grad)


# The model stays what it was


def test_names_and_values_stay_and_undo_restores():
    ids, model = token_ids(), language_model()
    before, bytes_before = copy.deepcopy(model.state_dict()), saved_bytes(model, ids, labels=ids)
    types = [type(module) for module in model.modules()]
    report = recompute_activations(model)
    assert [type(module) for module in model.modules()] == types
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    report.undo()
    assert not any("forward" in vars(module) for module in model.modules())
    assert saved_bytes(model, ids, labels=ids) == bytes_before
    report.undo()


def test_nothing_changes_without_gradients(monkeypatch):
    made, model, x = recipes(monkeypatch), block(), tokens()
    expected = model(x)
    recompute_activations(model)
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert not made


@pytest.mark.parametrize("trained", [False, True])
def test_linears_that_need_no_input_are_torchs_own(trained):
    model, x = block(), tokens()
    model.q.weight.requires_grad_(trained)
    recompute_activations(model)
    assert (model.q(x).grad_fn.name() == "_LinearBackward") is False
    assert (model.q(model.norm1(x)).grad_fn.name() == "_LinearBackward") is trained


def test_a_copy_is_a_model_of_its_own():
    model, x = block(), tokens()
    recompute_activations(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    expected = gradients(block(), x)
    assert_same(gradients(twin, x), expected)
    assert saved_bytes(twin, x) == saved_bytes(model, x)


def test_a_pickled_model_has_its_own_forwards():
    model, x = block(), tokens()
    expected = gradients(model, x)
    recompute_activations(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert_same(gradients(loaded, x), expected)
    buffer = io.BytesIO()
    torch.save(model.norm1(x), buffer)  # an output carries nothing along


def test_undo_after_someone_else_is_an_error():
    model = block()
    report = recompute_activations(model)
    model.k.forward = model.q.forward
    with pytest.raises(RuntimeError, match="the forward of 'k' was replaced since"):
        report.undo()
    assert "forward" in vars(model.norm1)


def test_chance_stays():
    model = block()
    model.mlp.down_proj = nn.Sequential(nn.Dropout(0.5), model.mlp.down_proj)
    chance = torch.get_rng_state()
    report = recompute_activations(model)
    assert torch.equal(torch.get_rng_state(), chance)
    assert ("mlp", "gated product", None) in report.rows


# What is left out


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Clipped(Gated):
    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=0.1)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class TwoInputs(Gated):
    def forward(self, x, y):
        return super().forward(x + y)


def replaced():
    linear = nn.Linear(24, 24)
    linear.forward = linear.forward
    return linear


def with_parameter():
    mlp = Gated(24, 40)
    mlp.act_fn = nn.PReLU()
    return mlp


LEFT_OUT = {
    "another forward": (lambda: Doubled(24, 24), "Doubled has a forward of its own"),
    "replaced": (replaced, "its forward was replaced already"),
    "activation with a parameter": (with_parameter, "its activation has parameters"),
    "another formula": (lambda: Clipped(24, 40), "does not compute down_proj(act_fn(gate_proj(x))"),
    "another signature": (lambda: TwoInputs(24, 40), "does not run on one tensor"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_is_left_out_says_why(case):
    make, reason = LEFT_OUT[case]
    model = nn.ModuleDict({"odd": make()})
    report = recompute_activations(model)
    (why,) = [row.skipped for row in report.rows if row.module == "odd"]
    assert why.startswith(reason)
    assert reason in str(report)


@pytest.mark.parametrize(
    "module", [nn.BatchNorm1d(24), nn.PReLU(24), nn.Embedding(9, 24), nn.GRU(24, 24), nn.SiLU()]
)
def test_what_is_no_norm_is_no_candidate(module):
    assert recompute_activations(nn.ModuleDict({"odd": module})).rows == []


def test_a_second_call_takes_nothing():
    model = block()
    recompute_activations(model)
    report = recompute_activations(model)
    assert {row.skipped for row in report.rows} == {"its forward was replaced already"}
    assert str(report).startswith("recomputed: nothing")
    report.undo()
    assert "forward" in vars(model.norm1)
