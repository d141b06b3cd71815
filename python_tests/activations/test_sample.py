"""Linear layers that keep a sample of their inputs."""

import copy
import pickle

import pytest
import torch
import transformers
from activations.llama import (
    HIDDEN,
    INTERMEDIATE,
    LAYERS,
    TOKENS,
    language_model,
    token_ids,
)
from activations.nets import Net, batch, groups_of, loss_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from lowrank_kernels import (
    FiraAdamW,
    GaLoreAdamW,
    Subspace,
    recompute_activations,
    sample_linears,
    saved_bytes,
)
from lowrank_kernels.activations.norms import GradientNorms
from lowrank_kernels.activations.sample import METHODS

SAMPLED = ("q", "k", "up", "down")
DRAWS = 600


def gradients(model, seed=0, ids=None):
    torch.manual_seed(seed)
    model.zero_grad()
    loss = loss_of(model, batch(0) if ids is None else ids)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def is_sampled(name):
    """The input of down is the output of a ReLU, which keeps it."""
    return name in ("q.weight", "k.weight", "up.weight")


@pytest.mark.parametrize("method", METHODS)
def test_all_but_the_weights_gradients_is_exact(method):
    loss, exact = gradients(Net())
    model = Net()
    sampled = sample_linears(model, 0.3, method, targets=SAMPLED)
    assert [row.taken for row in sampled.rows] == [True, True, True, True, False]
    found_loss, found = gradients(model)
    assert torch.equal(found_loss, loss)
    for name, grad in exact.items():
        if is_sampled(name):
            assert not torch.allclose(found[name], grad), name
        else:
            torch.testing.assert_close(found[name], grad, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.3, 0.7])
def test_the_mean_of_the_weights_gradients_is_exact(method, keep):
    _, exact = gradients(Net())
    model = Net()
    sample_linears(model, keep, method, targets=SAMPLED)
    total, squares = dict.fromkeys(exact, 0), dict.fromkeys(exact, 0.0)
    for seed in range(DRAWS):
        for name, grad in gradients(model, seed)[1].items():
            total[name] = total[name] + grad
            squares[name] += float((grad - exact[name]).square().sum())
    for name in filter(is_sampled, exact):
        bias = (total[name] / DRAWS - exact[name]).norm()
        assert bias < 4 * squares[name] ** 0.5 / DRAWS, name


def test_all_of_an_input_is_exact():
    model = Net()
    sample_linears(model, 1.0, targets=SAMPLED)
    found, exact = gradients(model)[1], gradients(Net())[1]
    assert all(torch.equal(found[name], exact[name]) for name in exact)


def test_evaluation_is_exact():
    model = Net()
    sample_linears(model, 0.3, targets=SAMPLED)
    found = gradients(model.eval())[1]
    exact = gradients(Net())[1]
    assert all(torch.equal(found[name], exact[name]) for name in exact)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", ["pps", "rademacher"])
def test_checkpoints_draw_again_what_was_drawn(method, reentrant):
    def model_of(checkpointed):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12)).double()
        sample_linears(net, 0.4, method)
        x = torch.randn(9, 12, dtype=torch.float64, requires_grad=True)
        torch.manual_seed(5)
        y = checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)
        # What comes between changes the state of random numbers.
        torch.rand(3)
        y.square().sum().backward()
        return [param.grad for param in net.parameters()]

    for one, other in zip(model_of(True), model_of(False), strict=True):
        assert torch.equal(one, other)


def test_layers_of_one_input_share_a_sample():
    ids = token_ids()
    model = language_model()
    sample_linears(model, 0.3)
    rows = {row.module: row for row in saved_bytes(model, ids, labels=ids).rows}
    kept = round(0.3 * TOKENS)
    q = rows["model.layers.1.self_attn.q_proj"]
    assert q.bytes == kept * (2 * HIDDEN + 8)
    assert "model.layers.1.self_attn.k_proj" not in rows
    assert "model.layers.1.self_attn.v_proj" not in rows
    # Its input is attention's output, which attention keeps.
    assert "model.layers.1.self_attn.o_proj" not in rows


class Adapters(nn.Module):
    """Of one input, with other inputs in between, as LoRA's of q and k."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(*sizes) for sizes in ((8, 2), (2, 8)) * 2)

    def forward(self, x):
        x = x * 1
        down, up, other_down, other_up = self.blocks
        return (up(down(x)) + other_up(other_down(x))).sum()


def test_layers_share_a_sample_whatever_comes_between():
    x = torch.randn(2, 10, 8).requires_grad_()
    model = Adapters()
    sample_linears(model, 0.3)
    # Six rows of x, and six of each factor's output, with their indices and weights.
    assert saved_bytes(model, x).by_kind()["linear"] == 6 * (4 * (8 + 2 + 2) + 3 * 8)


@pytest.mark.parametrize("keep", [0.3, 0.1])
def test_a_llama_saves_what_the_formula_says(keep):
    ids = token_ids()
    before = saved_bytes(language_model(), ids, labels=ids).by_kind()
    model = language_model()
    sample_linears(model, keep)
    after = saved_bytes(model, ids, labels=ids).by_kind()
    kept = round(keep * TOKENS)
    head = TOKENS * 2 * HIDDEN
    rows = 2 * (2 * HIDDEN + 8) + 2 * INTERMEDIATE + 8
    assert after.pop("linear") == LAYERS * kept * rows + head
    assert before.pop("linear") == LAYERS * TOKENS * (4 * HIDDEN + 2 * INTERMEDIATE) + head
    assert after == before


def encoder(kind):
    """A BERT or T5 encoder of two layers, in bfloat16 without dropout."""
    torch.manual_seed(0)
    if kind == "bert":
        config = transformers.BertConfig(
            vocab_size=61,
            hidden_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=104,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return transformers.BertModel(config, add_pooling_layer=False).bfloat16()
    config = transformers.T5Config(
        vocab_size=61, d_model=48, d_kv=12, d_ff=104, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return transformers.T5EncoderModel(config).bfloat16()


@pytest.mark.parametrize("kind", ["bert", "t5"])
@pytest.mark.parametrize("keep", [0.3, 0.1])
def test_encoders_save_what_the_formula_says(kind, keep):
    """Of each linear layer whose input nothing else keeps."""
    ids, model = token_ids(), encoder(kind)
    rows = {row.module: row.bytes for row in saved_bytes(model, ids).rows if row.kind == "linear"}
    sample_linears(model, keep)
    found = {row.module: row.bytes for row in saved_bytes(model, ids).rows if row.kind == "linear"}
    kept = round(keep * TOKENS)
    features = {name: size // (2 * TOKENS) for name, size in rows.items()}
    assert found == {name: kept * (2 * features[name] + 8) for name in rows}
    assert rows


def test_padding_is_not_drawn():
    model = Net()
    sampled = sample_linears(model, 0.3, targets=SAMPLED)
    mask = torch.ones(3, 7, dtype=torch.long)
    mask[0, 2:] = mask[1] = 0
    ids = batch(0)

    def losses():
        found = model(ids[:, :-1]).float()
        each = torch.nn.functional.cross_entropy(
            found.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        return (each * mask.flatten()).sum()

    sampled.keep = 1.0
    (exact,) = torch.autograd.grad(losses(), model.up.weight)
    sampled.keep = 0.3

    def bias_and_variance(mask=None):
        total, squares = 0, 0.0
        for seed in range(DRAWS):
            torch.manual_seed(seed)
            sampled.of_batch(mask)
            (grad,) = torch.autograd.grad(losses(), model.up.weight)
            total, squares = total + grad, squares + float((grad - exact).square().sum())
        return float((total / DRAWS - exact).norm()), squares / DRAWS

    _, blind = bias_and_variance()
    bias, variance = bias_and_variance(mask)
    assert bias < 4 * (variance / DRAWS) ** 0.5
    # Of 21 tokens 9 count, and 6 are kept: of all, or of those.
    assert variance < 0.5 * blind


def test_norms_of_an_epoch_draw_for_the_next():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).double()
    sampled = sample_linears(model, 0.3, norms=4)
    x = torch.ones(2, 10, 6, dtype=torch.float64)
    factor = torch.ones(2, 10, 1, dtype=torch.float64)
    # Almost all that counts is in two tokens of a sample.
    factor[:, :2] = 1e4
    index = torch.tensor([3, 1])

    def error():
        sampled.of_batch(index=index)
        model.zero_grad()
        (model(x).tanh() * factor).sum().backward()
        found = model[0].weight.grad.clone()
        model.zero_grad()
        (model.eval()(x).tanh() * factor).sum().backward()
        model.train()
        return float((found - model[0].weight.grad).norm() / found.norm())

    first = [error()]
    assert sampled._norms_of["0"].values[index].min() > 0
    assert (sampled._norms_of["0"].values[[0, 2]] == 0).all()
    later = [error() for _ in range(20)]
    assert first[0] > 0.1
    assert max(later) < 0.01
    sampled.of_batch(index=torch.arange(3))
    with pytest.raises(ValueError, match="told 3 samples"):
        model(x)
    sampled.of_batch(index=index)
    with pytest.raises(ValueError, match="pad all batches to one length"):
        model(x[:, :7])


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_what_was_told_is_of_one_backward_pass(reentrant):
    """Another batch's mask would hide tokens; what checkpoints draw again goes by the same."""
    layers = [nn.Linear(6, 6).double() for _ in range(2)]
    sample_linears(nn.Sequential(*layers), 0.5).of_batch(torch.tensor([[1, 0, 1, 0]]))
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    seen = []

    def whole(layer, x):
        return layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)

    for _ in range(2):
        # Of the two tokens that count both are kept, with a weight of 1.
        y = whole(layers[1], whole(layers[0], x))
        layers[0].weight.grad = None
        y[:, ::2].sum().backward()
        heads = torch.ones(2, 6, dtype=torch.float64) @ layers[1].weight.detach()
        seen.append(torch.allclose(layers[0].weight.grad, heads.T @ x.detach()[0, ::2]))
    assert seen == [True, False]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_dropout_drops_the_same_in_checkpoints_of_sampled_layers(reentrant, method):
    """One layer's input is also multiplied outside of the checkpoint."""

    def run(checkpoints):
        torch.manual_seed(0)
        outer, inner, last = (nn.Linear(6, 6).double() for _ in range(3))
        sample_linears(nn.Sequential(outer, inner, last), 0.5, method)
        x = torch.randn(9, 6, dtype=torch.float64, requires_grad=True)
        shared = x.sin()

        def block(shared):
            hidden = nn.functional.dropout(inner(shared), 0.5)
            return nn.functional.dropout(last(hidden), 0.5)

        inside = (
            checkpoint(block, shared, use_reentrant=reentrant) if checkpoints else block(shared)
        )
        y = outer(shared) + inside
        y.square().sum().backward()
        return y.detach(), x.grad, outer.bias.grad, inner.bias.grad, last.bias.grad

    # What is exact by contract.
    for one, other in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("method", ["pps", "wta", "crs"])
def test_large_weights_of_short_rows_are_in_the_range_of_float16(method):
    layer = nn.Linear(8, 4).half()
    sample_linears(nn.Sequential(layer), 0.3, method)
    x = torch.ones(40, 8, dtype=torch.float16)
    x[::2] /= 500
    torch.manual_seed(0)
    for _ in range(300):
        layer.weight.grad = None
        (layer(x) * 200).sum().backward()
        assert layer.weight.grad.isfinite().all()


def test_no_features_and_no_rows():
    layer = nn.Linear(8, 0)
    sample_linears(nn.Sequential(layer), 0.3)
    layer(torch.ones(5, 8, requires_grad=True)).sum().backward()
    assert layer.weight.grad.shape == (0, 8)


def test_another_mask_of_the_same_input_draws_anew():
    layers = [nn.Linear(6, 6).double() for _ in range(2)]
    sampled = sample_linears(nn.Sequential(*layers), 0.5)
    x = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    ys = []
    for layer, mask in zip(layers, ([[1, 0, 1, 0]], [[0, 1, 0, 1]]), strict=True):
        sampled.of_batch(torch.tensor(mask))
        ys.append(layer(x)[torch.tensor(mask) == 1])
    sum(y.sum() for y in ys).backward()
    for layer, start in zip(layers, (0, 1), strict=True):
        exact = torch.ones(6, 2, dtype=torch.float64) @ x.detach()[0, start::2]
        torch.testing.assert_close(layer.weight.grad, exact)


def test_a_mask_is_not_taken_for_two_sides():
    model = nn.ModuleDict(
        {side: nn.ModuleList([nn.Linear(4, 4)]) for side in ("encoder", "decoder")}
    )
    sampled = sample_linears(model, 0.5)
    with pytest.raises(ValueError, match="encoder's and for the decoder's tokens alike"):
        sampled.of_batch(torch.ones(1, 4))
    sampled.undo()
    sample_linears(model, 0.5, targets="encoder").of_batch(torch.ones(1, 4))


def test_keep_is_checked_when_it_is_written():
    sampled = sample_linears(Net(), 0.5, targets=SAMPLED)
    for keep in (0, 30, None, "x"):
        with pytest.raises(ValueError, match="keep must be above 0 and at most 1"):
            sampled.keep = keep
    sampled.keep = 0.25
    assert sampled.keep == 0.25


def test_samples_have_to_be_told_and_known():
    model = nn.Sequential(nn.Linear(6, 5))
    x = torch.ones(2, 10, 6)
    sampled = sample_linears(model, 0.3)
    with pytest.raises(ValueError, match="index is for norms"):
        sampled.of_batch(index=torch.arange(2))
    sampled.undo()
    sampled = sample_linears(model, 0.3, norms=4)
    with pytest.raises(ValueError, match=r"needs of_batch\(index=...\) before each batch"):
        model(x)
    for index, text in (
        ([0, 1], "must be a vector of int64, got"),
        (torch.ones(2), "must be a vector of int64, got"),
        (torch.tensor([0, 4]), "from 0 to 3, as norms=4, got 0 to 4"),
        (torch.tensor([-1, 1]), "from 0 to 3, as norms=4, got -1 to 1"),
    ):
        with pytest.raises(ValueError, match=text):
            sampled.of_batch(index=index)
    sampled.of_batch(index=torch.arange(2))
    model(x).sum().backward()
    with pytest.raises(ValueError, match="needs of_batch"):
        model(x)


def test_a_run_with_norms_goes_on_from_its_state():
    def run(steps, state=None, weights=None):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 5))
        sampled = sample_linears(model, 0.3, norms=4)
        if state is not None:
            sampled.load_state_dict(state)
            model.load_state_dict(weights)
        for step in steps:
            torch.manual_seed(step)
            sampled.of_batch(index=torch.tensor([step % 4]))
            model.zero_grad()
            (model(torch.randn(1, 10, 6)).tanh() ** 2).sum().backward()
            with torch.no_grad():
                model[0].weight -= 0.1 * model[0].weight.grad
        return sampled.state_dict(), model.state_dict()

    whole = run(range(9))
    state, weights = run(range(5))
    parts = run(range(5, 9), {key: value.clone() for key, value in state.items()}, weights)
    for one, other in zip(whole, parts, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    forgot = run(range(5, 9), {}, run(range(5))[1])
    assert not torch.equal(forgot[1]["0.weight"], whole[1]["0.weight"])
    sampled = sample_linears(nn.Sequential(nn.Linear(6, 5)), 0.3, norms=3)
    with pytest.raises(ValueError, match=r"norms of 0, \(4, 10\): here are norms=3"):
        sampled.load_state_dict(state)


def test_layers_whose_input_is_kept_anyway_are_told():
    model = language_model()
    sampled = sample_linears(model, 0.3)
    assert "of them" not in str(sampled).splitlines()[1]
    gradients_of = model(input_ids=token_ids(), labels=token_ids()).loss
    gradients_of.backward()
    # Attention's output layer of each block.
    assert "2 of them: another keeps all of it anyway" in str(sampled)


def test_norms_of_new_samples_are_usual_ones():
    norms = GradientNorms(4, 3)
    assert torch.equal(norms.of(torch.tensor([0, 1])), torch.ones(2, 3))
    norms.note(torch.tensor([1]), torch.tensor([[2.0, 4.0, 0.0]]))
    found = norms.of(torch.tensor([0, 1]))
    torch.testing.assert_close(found[0], torch.full((3,), 2.0))
    torch.testing.assert_close(found[1], torch.tensor([2.0, 4.0, 0.2]))
    norms.note(torch.tensor([1]), torch.tensor([[float("nan"), 1.0, float("inf")]]))
    assert norms.values[1].tolist() == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("kind", [GaLoreAdamW, FiraAdamW])
def test_what_a_basis_spans_is_exact(kind):
    model = Net()
    optimizer = kind(groups_of(model, proj_type="right"), lr=0.01)
    gradients(model)
    optimizer.step()
    exact = gradients(model)[1]
    sample_linears(model, 0.3, targets=SAMPLED, optimizer=optimizer)
    gradients(model)  # which layers share an input is known then
    total, squares = dict.fromkeys(exact, 0), dict.fromkeys(exact, 0.0)
    for seed in range(DRAWS):
        found = gradients(model, seed)[1]
        for name in ("up.weight",):
            basis = optimizer.state[model.get_parameter(name)]["basis"]
            inside, expected = found[name] @ basis, exact[name] @ basis
            torch.testing.assert_close(inside, expected, rtol=1e-10, atol=1e-14)
            total[name] = total[name] + found[name]
            squares[name] += float((found[name] - exact[name]).square().sum())
    for name in ("up.weight",):
        assert squares[name] > 0
        bias = (total[name] / DRAWS - exact[name]).norm()
        assert bias < 4 * squares[name] ** 0.5 / DRAWS, name


def test_a_sample_beside_a_basis_is_kept_where_it_is_less():
    """q and k would keep two products and two samples of one input."""
    model = Net()
    optimizer = GaLoreAdamW(groups_of(model, proj_type="right"), lr=0.01)
    sample_linears(model, 0.4, targets=SAMPLED, optimizer=optimizer)
    for _ in range(2):
        exact, found = gradients(Net())[1], gradients(model)[1]
        optimizer.step()
    model.load_state_dict(Net().state_dict())
    found = gradients(model)[1]
    torch.testing.assert_close(found["q.weight"], exact["q.weight"])
    assert not torch.allclose(found["up.weight"], exact["up.weight"])


def test_names_copies_and_the_way_back():
    model = Net()
    names = list(model.state_dict())
    sampled = sample_linears(model, 0.3, targets=SAMPLED)
    assert list(model.state_dict()) == names
    twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    exact = gradients(Net())[1]
    for twin in twins:
        assert all(torch.equal(g, exact[name]) for name, g in gradients(twin)[1].items())
    with pytest.raises(ValueError, match="its forward is patched already"):
        sample_linears(model, 0.3, targets=SAMPLED)
    sampled.undo()
    assert all(torch.equal(g, exact[name]) for name, g in gradients(model)[1].items())
    sample_linears(model, 0.3, targets=SAMPLED)


def test_recomputed_inputs_are_not_sampled():
    """They cost nothing; and the way back is to recomputing."""
    ids, model = token_ids(), language_model()
    recompute_activations(model)
    before = saved_bytes(model, ids, labels=ids)
    sampled = sample_linears(model, 0.3)
    assert saved_bytes(model, ids, labels=ids).total == before.total
    sampled.undo()
    assert saved_bytes(model, ids, labels=ids).total == before.total


@pytest.mark.parametrize("method", METHODS)
def test_autocast_and_half_precision(method):
    for dtype, autocast in ((torch.bfloat16, False), (torch.float32, True)):
        model = Net(dtype)
        sample_linears(model, 0.5, method, targets=SAMPLED)
        with torch.autocast("cpu", enabled=autocast):
            loss = loss_of(model, batch(0))
        loss.backward()
        exact = Net(dtype)
        with torch.autocast("cpu", enabled=autocast):
            other = loss_of(exact, batch(0))
        other.backward()
        assert torch.equal(loss, other)
        for (name, one), two in zip(model.named_parameters(), exact.parameters(), strict=True):
            assert one.grad.dtype is dtype
            assert one.grad.isfinite().all(), name
            if not is_sampled(name):
                difference = (one.grad - two.grad).float().norm() / two.grad.float().norm()
                assert difference < 0.02, name


@pytest.mark.parametrize("method", METHODS)
def test_odd_inputs(method):
    """No rows, one row, one vector, strides, zeros."""
    for x in (
        torch.zeros(0, 8),
        torch.randn(1, 8),
        torch.randn(8),
        torch.randn(8, 5).T,
        torch.zeros(5, 8),
        torch.randn(1, 8).expand(5, 8),
        torch.randn(2, 1, 3, 8),
    ):
        model = nn.Sequential(nn.Linear(8, 4))
        sample_linears(model, 0.4, method)
        exact = nn.Sequential(nn.Linear(8, 4))
        exact.load_state_dict(model.state_dict())
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        for net, own in zip((model, exact), inputs, strict=True):
            net(own).square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
        assert model[0].weight.grad.isfinite().all()
        torch.testing.assert_close(model[0].bias.grad, exact[0].bias.grad)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": 0}, "keep must be above 0 and at most 1, got 0"),
        ({"keep": 1.5}, "keep must be above 0"),
        ({"keep": True}, "keep must be above 0"),
        ({"method": "best"}, "method must be one of uniform, crs, wta, pps, rademacher"),
        ({"norms": 0}, "norms must be how many samples"),
        ({"norms": 3, "method": "uniform"}, "norms do nothing"),
        ({"targets": ["nothing"]}, "no linear layer can be sampled"),
        ({"targets": "*.mlp.*"}, "targets has .* no regular expression: nothing to repeat"),
    ],
)
def test_what_does_not_fit_is_refused(options, text):
    model = Net()
    with pytest.raises(ValueError, match=text):
        sample_linears(model, **{"targets": SAMPLED} | options)
    assert all("forward" not in vars(module) for module in model.modules())


def test_bases_that_do_not_fit_are_refused():
    model = Net()
    with pytest.raises(TypeError, match=r"must be one of lowrank_kernels, .* got AdamW"):
        sample_linears(model, optimizer=torch.optim.AdamW(model.parameters()), targets=SAMPLED)
    optimizer = GaLoreAdamW(groups_of(model), subspace=Subspace("gaussian"))
    with pytest.raises(ValueError, match="not orthonormal"):
        sample_linears(model, optimizer=optimizer, targets=SAMPLED)
    optimizer = GaLoreAdamW(groups_of(model))
    with pytest.raises(ValueError, match="draw tokens"):
        sample_linears(model, method="rademacher", optimizer=optimizer, targets=SAMPLED)
