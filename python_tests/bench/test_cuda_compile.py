"""The report of nvcc's assembler is read right, and a spill or a missing kernel fails."""

import re
from pathlib import Path

import pytest

from bench import cuda_compile

# What ptxas 13.0 prints of two kernels, with what other tools put before it.
LOG = Path(__file__).with_name("ptxas.txt").read_text()
SPILL = "16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads"


def clean_log(architectures=("sm_80", "sm_90")):
    """A report of every kernel that the sources define, without spills."""
    sources = (Path(cuda_compile.ROOT) / "csrc" / "cuda").glob("*.cu")
    text = "".join(path.read_text() for path in sources)
    names = set(re.findall(r"\b(\w+_kernel)\(const", text))
    return "".join(
        f"Compiling entry function '{name}' for '{architecture}'\n"
        "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 9 registers\n"
        for name in names
        for architecture in architectures
    )


def test_every_figure_is_read():
    first, second = cuda_compile.readable(cuda_compile.parse(LOG))
    name = "adam_moments_columns_kernel<Float16, 1>"
    assert first == cuda_compile.Kernel(name, "sm_80", 62, 0, 0, 0, 2048)
    assert second == cuda_compile.Kernel("update_kernel<float, float, 8>", "sm_120", 70, 0, 0, 0, 0)
    assert not first.spills


def test_a_spill_is_read():
    none = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    first, second = cuda_compile.parse(LOG.replace(none, SPILL, 1))
    assert (first.stack, first.spill_stores, first.spill_loads) == (16, 24, 32)
    assert first.spills
    assert not second.spills


def test_a_spill_of_a_function_that_is_not_inlined_counts():
    used = "  ptxas info    : Used 62"
    helper = f"  ptxas info    : Function properties for helper\n      {SPILL}\n"
    first, second = cuda_compile.parse(LOG.replace(used, helper + used))
    assert first.spill_stores == 24
    assert not second.spills
    frame = "      0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    own = LOG.replace(frame, f"      {SPILL}\n{helper.replace(SPILL, frame.strip())}", 1)
    assert cuda_compile.parse(own)[0].spill_stores == 24


def test_names_lose_namespaces_and_arguments(monkeypatch):
    mangled = "_ZN7lowrank4cuda12_GLOBAL__N_113update_kernelIfLi8EEEvi"
    (kernel,) = cuda_compile.readable([cuda_compile.Kernel(mangled, "sm_90", 1, 0, 0, 0, 0)])
    assert kernel.name == "update_kernel<float, 8>"
    monkeypatch.setattr(cuda_compile.shutil, "which", lambda _: None)
    (kernel,) = cuda_compile.readable([cuda_compile.Kernel(mangled, "sm_90", 1, 0, 0, 0, 0)])
    assert kernel.name == mangled


def run(log, monkeypatch, *arguments):
    monkeypatch.setattr(cuda_compile, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_compile, "nvcc_version", lambda: "13.0.88")
    monkeypatch.setattr(cuda_compile, "build", lambda: log)
    cuda_compile.main(list(arguments))


def test_all_is_well_without_spills(monkeypatch, tmp_path, capsys):
    run(clean_log(), monkeypatch, "--out", str(tmp_path / "record.json"))
    assert re.search(r"\d+ kernels, 0 spill, 0 missing", capsys.readouterr().out)
    assert (tmp_path / "record.json").is_file()


def test_a_spill_fails_and_shows(monkeypatch, capsys):
    log = clean_log().replace("0 bytes spill stores", "8 bytes spill stores", 1)
    with pytest.raises(SystemExit, match="_kernel for sm_80"):
        run(log, monkeypatch)
    assert "9 (0/8/0)" in capsys.readouterr().out


def test_a_kernel_that_is_missing_for_one_architecture_fails(monkeypatch):
    log = clean_log().replace("'update_kernel' for 'sm_90'", "'other' for 'sm_90'")
    with pytest.raises(SystemExit, match=r"cuda_compile: update_kernel for sm_90$"):
        run(log, monkeypatch)


def test_a_log_without_kernels_fails(monkeypatch):
    with pytest.raises(SystemExit, match="no kernel was found"):
        run("nothing of interest", monkeypatch)


def test_without_nvcc_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda_compile, "find_nvcc", lambda: None)
    cuda_compile.main([])
    assert "no nvcc" in capsys.readouterr().out
