import pytest

from lowrank_kernels.cli.cards import CARDS
from lowrank_kernels.cli.offload import PCIE, speed_of

HIDDEN, FFN, HEADS, LAYERS, VOCABULARY, TOKENS = 64, 160, 4, 3, 100, 512
# Of the tiny model: a block and the head.
WEIGHTS = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * FFN) + VOCABULARY * HIDDEN
RATE = 0.4 * 989e12


@pytest.fixture
def needs(json_of, tiny_config):
    def plan(flags, optimizers="adamw"):
        line = f"plan --config {tiny_config()} --rank 8 --tokens {TOKENS} --optimizers {optimizers}"
        return json_of(f"{line} {flags}")["optimizers"]

    return plan


@pytest.mark.parametrize("how", ["", "--recompute", "--checkpointing"])
def test_a_share_goes_out_and_the_rest_stays(needs, how):
    plain, found, everything = (
        needs(f"--device cuda {share} {how}")["adamw"]
        for share in ("", "--offload 0.4", "--offload 1")
    )
    largest = TOKENS * max(4 * VOCABULARY, 4 * HIDDEN, 2 * FFN)
    assert 0 <= 0.4 * everything["offload_bytes"] - found["offload_bytes"] <= largest
    for each in (found, everything):
        kept = plain["activation_bytes"] - each["activation_bytes"]
        # The ids are written, and the caller has them still.
        assert each["offload_bytes"] - kept in (0, 8 * TOKENS)


def test_half_of_it_if_no_share_is_named(needs):
    assert needs("--device cuda --offload") == needs("--device cuda --offload 0.5")


@pytest.mark.parametrize(("how", "passes"), [("", 3), ("--recompute", 3), ("--checkpointing", 4)])
def test_how_fast_the_disk_must_be(needs, how, passes):
    """The products of a forward take their time, and a backward twice, or thrice, as long."""
    found = needs(f"--card h200 --offload {how}")["adamw"]
    seconds = 2 * WEIGHTS * TOKENS / RATE
    speed = found["offload_bytes"] / seconds
    assert found["offload_bytes_per_second"] == pytest.approx(speed)
    assert found["offload_bytes_a_day"] == pytest.approx(86400 * speed / passes)


def test_a_slower_card_leaves_more_time():
    assert speed_of(10**9, 10**12, "a100-80").bytes_per_second == pytest.approx(
        312 / 989 * speed_of(10**9, 10**12, "h200").bytes_per_second
    )
    assert {card.pcie for card in CARDS.values()} == set(PCIE)


def test_products_that_spare_gradients_leave_no_more_time(needs):
    """x P is a product more, in all passes but those where all of x is kept for a new basis."""
    found = needs("--card h200 --offload --project", "adamw,galore")
    speeds = [each["offload_bytes_per_second"] for each in found.values()]
    assert speeds[1] == pytest.approx(speeds[0], rel=0.02)


@pytest.mark.parametrize("flags", ["--device cuda", "--card h200 --dtype fp32", "--memory 1GB"])
def test_without_a_known_rate_there_is_no_speed(needs, flags):
    found = needs(f"{flags} --offload")["adamw"]
    assert found["offload_bytes"] > 0
    assert found["offload_bytes_per_second"] is found["offload_bytes_a_day"] is None


def test_more_tokens_fit(json_of):
    """What the loss takes for a while is most of it, here."""
    line = "plan --model 35m --optimizers adamw --memory 4GB"
    plain, found = (json_of(f"{line} {how}")["optimizers"]["adamw"] for how in ("", "--offload 1"))
    assert found["most_tokens"] > plain["most_tokens"] > 0


def test_the_text_says_what_a_drive_is_asked_for(command, tiny_config):
    line = f"plan --config {tiny_config()} --rank 8 --optimizers adamw --offload"
    text = " ".join(command(f"{line} --card h200")[1].split())
    assert "--offload 0.5" in text
    assert "offloaded GB/s" in text
    assert "the first 50 % of what a forward pass saves go out" in text
    assert "computed at 40 % of 989 TFLOP/s. PCIe 5.0 does about 50 GB/s" in text
    assert "TB a day" in text
    assert "name a --card, whose rate in bf16 is known" in command(line)[1].replace("\n", " ")
    assert "offload" not in command(line.replace("--offload", ""))[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--offload 1.5", "--offload must be a share, between 0 and 1, got 1.5"),
        ("--offload nan", "--offload must be a share, between 0 and 1, got nan"),
        ("--offload --tokens 0", "--offload needs --tokens above 0"),
        ("--offload --gpus 8", "--offload is planned for one GPU, without --gpus"),
        ("--offload /scratch", "argument --offload: invalid float value: '/scratch'"),
    ],
)
def test_mistakes(refused, flags, words):
    assert words in refused(f"plan --model nano {flags}")
