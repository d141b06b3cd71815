"""`plan --gpus`: what it prints, and what it refuses."""

import pytest

SIZES = {"13b": (5120, 13824, 5120, 40, 1280), "70b": (8192, 28672, 1024, 80, 2048)}


@pytest.mark.parametrize("name", SIZES)
def test_the_large_llamas_by_formula(json_of, name):
    """Keys and values of 70b are 1024 x 8192, which rank 2048 makes no smaller."""
    hidden, ffn, keys, layers, rank = SIZES[name]
    facts = json_of(f"plan --model {name} --gpus 64 --optimizers adamw,galore,fira")
    matrices = [(hidden, hidden)] * 2 + [(ffn, hidden)] * 2 + [(hidden, ffn)]
    others = [(keys, hidden)] * 2
    elements = layers * (sum(m * n for m, n in matrices + others) + 2 * hidden)
    elements += 2 * 32_000 * hidden + hidden
    assert (facts["parameters"], facts["rank"]) == (elements, rank)
    if name == "13b":
        matrices, others = matrices + others, []
    # All of it can be divided by 64, and P is n x r.
    low = layers * sum(8 * m // 64 * rank + 2 * n * rank + 4 for m, n in matrices)
    wide = elements - layers * sum(m * n for m, n in matrices)
    plain = 8 * wide // 64 + 4 * (layers * (len(others) + 2) + 3)
    found = facts["optimizers"]
    assert found["galore"]["state_bytes"] == low + plain
    assert found["galore"]["basis_bytes"] == layers * sum(2 * n * rank for _, n in matrices)
    assert found["fira"]["state_bytes"] == low + plain + 4 * layers * len(matrices)
    calls = found["fira"]["collectives"]
    assert found["fira"]["sent_bytes"] == 2 * 63 * 4096 * calls // 64
    moments = sum(8 * m // 64 * rank for m, _ in matrices) * layers
    assert moments / 2**26 <= calls <= layers
    assert facts["sent_bytes"] == 3 * 63 * 2 * elements // 64


def test_keys_and_values_of_a_group_are_projected_from_the_right_on_shards(json_of):
    """Of 1024 x 8192, on 8 GPUs: moments of 128 rows, a basis of 8192."""
    low, lower = (
        json_of(f"plan --model 70b --gpus 8 --optimizers galore --rank {rank}")["optimizers"]
        for rank in (256, 128)
    )
    keys = 80 * 2 * (8 * 128 + 2 * 8192)
    others = 80 * 2 * (8 * 1024 + 2 * 8192) + 80 * 2 * (8 * 3584 + 2 * 8192)
    others += 80 * (8 * 1024 + 2 * 28672)
    difference = low["galore"]["state_bytes"] - lower["galore"]["state_bytes"]
    assert difference == 128 * (keys + others)


def test_what_is_printed(command, json_of, tiny_config):
    line = f"plan --config {tiny_config()} --rank 8 --gpus 16 --shard hsdp --memory 0.001"
    facts = json_of(line)
    assert (facts["gpus"], facts["shard_size"], facts["replicas"]) == (16, 8, 2)
    fira = facts["optimizers"]["fira"]
    parts = ("weights", "gradients", "buffers")
    assert fira["total_bytes"] == fira["state_bytes"] + sum(facts[f"{x}_bytes"] for x in parts)
    assert fira["left_bytes"] == 10**6 - fira["total_bytes"]
    status, out, err = command(line)
    out = " ".join(out.split())
    assert (status, err) == (0, [])
    assert "each of 16 GPUs, hsdp, 2 replicas of 8: weights" in out
    assert f"{fira['left_bytes'] / 1e3:.2f} kB left" in out
    assert f" {fira['sent_bytes'] / 1e3:.2f} kB {fira['collectives']} calls" in out
    out = command(line.replace("--memory 0.001", "--optimizers orthogonal"))[1]
    assert " 3 calls" in out
    assert "Computed from shapes, not measured." in out
    assert "holds a whole gradient, up to 20.48 kB" in out
    assert "too large by" in " ".join(command(f"{line}MB".replace("0.001MB", "0.1MB"))[1].split())


def test_shards_are_the_default_and_whole_copies_say_so(json_of, command, tiny_config):
    line = f"plan --config {tiny_config()} --rank 8 --gpus 4"
    assert json_of(line) == json_of(f"{line} --shard fsdp2")
    whole = json_of(f"{line} --shard ddp")
    alone = json_of(f"plan --config {tiny_config()} --rank 8 --tokens 0")
    for name, needs in whole["optimizers"].items():
        assert needs["state_bytes"] == alone["optimizers"][name]["state_bytes"]
        assert needs["total_bytes"] == (
            needs["state_bytes"] + 2 * alone["weight_bytes"] + alone["buffer_bytes"]
        )
    assert "every GPU computes the same bases" in command(f"{line} --shard ddp")[1]


def test_bases_that_outweigh_sharded_moments_are_named(command, json_of, tiny_config):
    line = f"plan --config {tiny_config()} --rank 16 --gpus 64 --optimizers adamw,galore"
    facts = json_of(line)["optimizers"]
    assert facts["galore"]["more_than_adamw"]
    assert not facts["adamw"]["more_than_adamw"]
    assert "galore: more state than adamw's" in command(line)[1]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--shard ddp", "--shard needs --gpus: over how many?"),
        ("--shard-size 4", "--shard-size needs --gpus"),
        ("--gpus 0", "--gpus must be at least 1, got 0"),
        ("--gpus 12 --shard hsdp", "--shard-size must divide --gpus, got 8 of 12"),
        ("--gpus 8 --shard-size 4", "--shard-size is of --shard hsdp"),
        ("--gpus 8 --shard fsdp1", "invalid choice: 'fsdp1'"),
        ("--gpus 8 --release", "--release is planned for one GPU, without --gpus"),
        ("--gpus 8 --tokens 4096", "--tokens is planned for one GPU, without --gpus"),
    ],
)
def test_mistakes(refused, line, words):
    assert words in refused(f"plan --model nano {line}")
