import platform

import pytest
import torch

from lowrank_kernels import backends
from lowrank_kernels.cli import env
from lowrank_kernels.ops import native


def test_the_facts(json_of, monkeypatch):
    monkeypatch.setenv("LOWRANK_BACKEND", "reference")
    facts = json_of("env")
    assert list(facts) == [
        "versions",
        "devices",
        "threads",
        "native",
        "backends",
        "auto",
        "variables",
        "remarks",
    ]
    assert facts["versions"]["python"] == platform.python_version()
    assert list(facts["versions"])[1:] == ["torch", "lowrank_kernels", "triton", "transformers"]
    assert facts["devices"][0]["device"] == "cpu"
    assert facts["devices"][0]["memory_bytes"] > 2**28
    assert facts["threads"] == torch.get_num_threads()
    assert facts["native"] == native.build_info()
    assert facts["variables"]["LOWRANK_BACKEND"] == "reference"
    assert {name: tuple(each.values()) for name, each in facts["backends"].items()} == backends()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_auto_takes(json_of):
    rows = json_of("env")["auto"]
    assert [(row["device"], row["dtype"]) for row in rows] == [
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
        ("cuda", "float32"),
        ("cuda", "bfloat16"),
    ]
    assert [row["backend"] for row in rows[:2]] == ["native", "native"]
    assert all(row["reason"] for row in rows)
    assert all("there is no CUDA device here" in row["reason"] for row in rows[2:])


def test_kernels_that_fail_their_check_on_a_gpu(command, json_of, gpu, monkeypatch):
    gpu.faults = {"triton": "triton fails its check on cuda:0", "native": None}
    rows = [row for row in json_of("env")["auto"] if row["device"] == "cuda"]
    assert [row["backend"] for row in rows] == ["native", "native"]
    assert all("triton fails its check on cuda:0" in row["reason"] for row in rows)
    assert "triton fails its check on cuda:0" in command("env")[1]

    found = [
        {"device": name, "name": "", "memory_bytes": 1} for name in ("cpu", "cuda:0", "cuda:1")
    ]
    monkeypatch.setattr(env, "_devices", lambda: found)
    places = [row["device"] for row in json_of("env")["auto"]]
    assert places == [name for name in ("cpu", "cuda:0", "cuda:1") for _ in range(2)]


def test_a_package_that_is_missing(json_of, monkeypatch):
    monkeypatch.setattr("lowrank_kernels.cli.env.PACKAGES", ("torch", "no-such-package"))
    assert json_of("env")["versions"]["no_such_package"] is None


def test_variables_that_are_wrong(command, json_of, monkeypatch):
    good = {"LOWRANK_CUDA": "off", "LOWRANK_NATIVE": "on", "TRITON_INTERPRET": "1"}
    for name, value in {**good, "LOWRANK_BACKEND": "reference"}.items():
        monkeypatch.setenv(name, value)
    assert json_of("env")["remarks"] == {}

    wrong = {
        "LOWRANK_BACKEND": ("foo", "every step fails: LOWRANK_BACKEND='foo' is not one of auto"),
        "LOWRANK_BAKEND": ("native", "of no effect: not one of LOWRANK_BACKEND, "),
        "TRITON_INTERPRET": ("true", "here only 1 counts"),
    }
    for name, (value, _) in wrong.items():
        monkeypatch.setenv(name, value)
    facts = json_of("env")
    assert set(facts["remarks"]) == set(wrong)
    out = command("env")[1]
    for name, (_, remark) in wrong.items():
        assert remark in facts["remarks"][name]
        assert remark in out

    monkeypatch.setenv("LOWRANK_BACKEND", "native")
    monkeypatch.setattr(native, "import_error", "no such file")
    assert "cannot run here" in json_of("env")["remarks"]["LOWRANK_BACKEND"]


def test_the_text_has_every_fact(command, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    status, out, _ = command("env")
    assert status == 0
    for word in (torch.__version__, *backends(), "TRITON_INTERPRET", "compiled CPU passes"):
        assert word in out
