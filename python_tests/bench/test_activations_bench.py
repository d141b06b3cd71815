"""Arms are what their names say before they are timed; bytes, products and means as by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench import activations
from bench.activations import BLOCKS, INTERVAL, MODELS, Arm, Case, Saved, costs
from bench.figures import FIGURES, Records
from lowrank_kernels.activations import linear
from lowrank_kernels.optim.projected_gradient import held

CPU = torch.device("cpu")
QUICK = ["--device", "cpu", "--quick"]
ONE = [*QUICK, "--parts", "blocks", "--ranks", "4"]
HIDDEN, FFN, RANK, TOKENS = 128, 352, 32, 64
BLOCK = Case(BLOCKS, "nano", 1, 0, 2, 32, RANK, "fp32")
# Rows and columns of q, k, v, o, gate, up and down.
SHAPES = [(HIDDEN, HIDDEN)] * 4 + [(FFN, HIDDEN)] * 2 + [(HIDDEN, FFN)]
PRODUCT = sum(2 * TOKENS * rows * cols for rows, cols in SHAPES)


def arm(name, case=BLOCK):
    return Arm(name, case, CPU, "reference")


def test_a_quick_run_has_every_arm_and_prints_what_it_found(tmp_path, capsys):
    out = tmp_path / "activations-cpu.json"
    activations.main([*QUICK, "--ranks", "4", "--dtypes", "fp32,bf16", "--out", str(out)])
    record = json.loads(out.read_text())
    found = [(row["part"], row["dtype"]) for row in record["rows"]]
    assert found == [(part, dtype) for dtype in ("fp32", "bf16") for part in (BLOCKS, MODELS)]
    printed = " ".join(capsys.readouterr().out.split())
    for row in record["rows"]:
        assert list(row["results"]) == list(activations.ARMS)
        assert not row["wrong"]
        for name, own in row["results"].items():
            assert name in printed
            assert own["passes"]["ms"] + own["step"]["ms"] == pytest.approx(own["ms"], rel=0.5)
            assert own["tokens_per_second"] == pytest.approx(1e3 * TOKENS / own["mean_ms"])
            base = row["results"]["adamw"]
            assert own["times_as_fast"] == pytest.approx(base["mean_ms"] / own["mean_ms"])
        predicted = [own["predicted"] for own in row["results"].values()]
        assert predicted[0] == 1.0
        assert predicted[1] == predicted[4] < 1 < predicted[2] < predicted[3]
    (tmp_path / "activations-models-cpu.json").write_text(out.read_text())
    names = ("projected_blocks", "projected_models", "projected_bytes")
    texts = {name: FIGURES[name](Records(tmp_path)) for name in names}
    for name, text in texts.items():
        assert text.count("galore-projected-shared") == 4 if name == "projected_bytes" else 2
        models = "-models" if name == "projected_models" else ""
        assert f"(bench/results/activations{models}-cpu.json)" in text
    speed = record["rows"][0]["results"]["galore-projected"]["times_as_fast"]
    assert f"{speed:.2f}" in FIGURES["projected_speed"](Records(tmp_path))
    assert "1 of nano, 2 x 32 tokens, r 32, bf16 | fira" in texts["projected_blocks"]


def test_products_of_adamw_and_what_r_spares_of_them_by_hand():
    """Attention is 2 products of t x length x h forward and 5 backward."""
    attention = 7 * 2 * TOKENS * BLOCK.length * HIDDEN
    whole = 3 * PRODUCT + attention

    def of_r(shapes):
        """x P or H P, and what it is multiplied with."""
        return sum(2 * TOKENS * RANK * (rows + cols) for rows, cols in shapes)

    shared = 2 * 2 * TOKENS * RANK * HIDDEN + 2 * TOKENS * RANK * HIDDEN
    expected = {
        "adamw": whole,
        "galore": whole,
        "galore-projected": whole - PRODUCT + of_r(SHAPES),
        "galore-projected-shared": whole - PRODUCT + of_r(SHAPES) - shared,
    }
    for name, flops in expected.items():
        assert costs(arm(name), BLOCK)["passes_flops"] == flops, name
    steps = {name: costs(arm(name), BLOCK)["step_flops"] for name in ("galore-projected", "fira")}
    update = sum(2 * RANK * rows * cols for rows, cols in SHAPES)
    assert steps == {"galore-projected": update, "fira": 2 * update}


def test_bytes_of_gradients_and_of_what_is_saved_by_hand():
    """R in float32; x P in place of x for q, k, v and for gate and up, but not for o, whose input
    attention saves, nor for down.
    """
    found = {name: costs(arm(name), BLOCK) for name in activations.ARMS}
    norms = 3 * HIDDEN
    whole = sum(rows * cols for rows, cols in SHAPES) + norms
    low = 4 * HIDDEN * RANK + 2 * FFN * RANK + RANK * FFN + norms
    for name in ("adamw", "galore", "fira"):
        assert found[name]["gradient_bytes"] == 4 * whole
        assert found[name]["saved_bytes"] == found["adamw"]["saved_bytes"]
    for name, products in (("galore-projected", 5), ("galore-projected-shared", 2)):
        assert found[name]["gradient_bytes"] == 4 * low
        more = 4 * TOKENS * (products * RANK - 2 * HIDDEN)
        assert found[name]["saved_bytes"] == found["adamw"]["saved_bytes"] + more
    assert found["adamw"]["state_bytes"] == 8 * whole + 4 * (len(SHAPES) + 3)


def test_what_is_saved_counts_once_and_weights_not_at_all():
    """x, and relu's output, which the next layer saves as well."""
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    x, saved = torch.randn(7, 3), Saved(model)
    with saved:
        output = model(x)
    assert saved.bytes() == 4 * (7 * 3 + 7 * 5)
    output.sum().backward()
    assert saved.bytes() == 0


@pytest.mark.parametrize("name", ["galore", "galore-projected", "galore-projected-shared", "fira"])
def test_bases_that_are_due_are_renewed_and_usual_steps_renew_none(name):
    one = arm(name)
    states = {key: one.optimizer.state[param] for key, param in one.projected.items()}

    def renewed(due):
        before = {key: state["refreshes"] for key, state in states.items()}
        one.run(due)
        return {key for key, state in states.items() if state["refreshes"] > before[key]}

    assert renewed([]) == set()
    assert renewed(list(one.projected.values())) == set(states)
    assert renewed([]) == set()


def test_what_new_bases_cost_and_their_share_of_the_mean_by_hand():
    """300 ms in the step that renews them and 100 ms in the next."""
    after = []

    def run(due=()):
        seconds = 1.3 if due else 1.1 if after else 1.0
        after[:] = [True] if due else []
        return SimpleNamespace(read=lambda: (seconds, 0.2))

    one = SimpleNamespace(name="galore", projected={"w": torch.empty(2, 3)}, run=run)
    found = activations.timed([one], CPU, rounds=3)["galore"]
    assert found["ms"] == pytest.approx(1000)
    assert found["passes"]["ms"] == pytest.approx(800)
    assert found["step"]["ms"] == pytest.approx(200)
    assert found["renewal_ms"] == pytest.approx(400)
    assert found["mean_ms"] == pytest.approx(1000 + 400 / INTERVAL)


def wrong_arms(out, *words):
    with pytest.raises(SystemExit, match="an arm is not what its name says"):
        activations.main([*ONE, "--arms", "adamw,galore-projected", *words, "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert list(row["results"]) == ["adamw"]
    return row["wrong"]["galore-projected"]


def test_a_wrong_r_is_reported_and_not_timed(monkeypatch, tmp_path, capsys):
    right = linear.new_gradient

    def slightly_wrong(projected, *others):
        return right(projected * (1 + 1e-9), *others)

    monkeypatch.setattr(linear, "new_gradient", slightly_wrong)
    assert "is off by 1.0e-09" in wrong_arms(tmp_path / "r.json")
    assert "WRONG" in capsys.readouterr().out


def test_an_arm_whose_gradients_are_whole_is_not_timed(monkeypatch, tmp_path):
    """In float32 alone, where R is not compared."""
    right = linear.new_gradient

    def whole(projected, projector, shape, dtype):
        gradient = right(projected, projector, shape, dtype)
        return gradient.dense() if dtype is torch.float32 else gradient

    monkeypatch.setattr(linear, "new_gradient", whole)
    assert "0 gradients are projected instead of 7" in wrong_arms(tmp_path / "r.json")


def test_an_arm_that_renews_no_basis_is_not_timed(monkeypatch, tmp_path):
    monkeypatch.setattr(Arm, "let_be_due", lambda self, params: None)
    assert "0 whole of 7 whose bases are due" in wrong_arms(tmp_path / "r.json")


def test_stopped_it_goes_on_behind_the_last_case_and_anew_for_another_command(
    monkeypatch, tmp_path
):
    out, taken = tmp_path / "r.json", []
    measure = activations.bench_case

    def stopped_at_the_second(case, *others):
        if len(taken) == 1:
            taken.append(None)
            raise KeyboardInterrupt
        taken.append(case.rank)
        return measure(case, *others)

    monkeypatch.setattr(activations, "bench_case", stopped_at_the_second)
    command = [*QUICK, "--parts", "blocks", "--arms", "adamw,galore", "--out", str(out)]
    with pytest.raises(KeyboardInterrupt):
        activations.main(command)
    activations.main(command)
    assert taken == [32, None, 16]
    activations.main(command)
    assert taken == [32, None, 16]
    assert [row["rank"] for row in json.loads(out.read_text())["rows"]] == [32, 16]
    activations.main([*command, "--ranks", "4"])
    assert taken == [32, None, 16, 32]


def test_gradients_of_the_small_block_are_held_as_they_are_compared():
    """The check would pass on nothing: seven weights of it have R."""
    one = arm("galore-projected", Case(BLOCKS, "nano", 1, 0, 2, 24, RANK, "fp64"))
    one.backward(one.forward())
    assert [held(p.grad).dtype for p in one.projected.values()] == [torch.float64] * 7
