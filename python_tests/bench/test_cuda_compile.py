"""What nvcc's assembler reports and what it made are read right, and each fault fails."""

import re
from pathlib import Path

import pytest

from bench import cuda_compile

# What ptxas 13.0 prints of two kernels, with what other tools put before it.
LOG = Path(__file__).with_name("ptxas.txt").read_text()
SPILL = "16 bytes stack frame, 24 bytes spill stores, 32 bytes spill loads"


# What cuobjdump prints of one architecture, three stores and what looks like one.
CODE = """
Fatbin elf code:
arch = sm_90
\tcode for sm_90
\t\tFunction : first
        /*0ce0*/                   STG.E.128 desc[UR10][R40.64+0x200], R12 ;   /* 0x000c28007986 */
        /*0d00*/                   STS.128 [R4], R12 ;
    @P0 /*0d10*/                   STG.E.U16 desc[UR12][R20.64], R17 ;
        /*0d20*/                   STG.E desc[UR10][R40.64], R13 ;
        /*0d30*/                   STG.E desc[UR10][R40.64+0x4], R13 ;
\t\tFunction : second
        /*0000*/                   STG.E.64.STRONG.GPU [R2.64], R4 ;
"""


def mangled(name):
    """Of float, eight elements a pack, as a compiler would call it."""
    return f"_ZN7lowrank4cuda12_GLOBAL__N_1{len(name)}{name}IfLi8EEEvi"


ARCHITECTURES = ("sm_80", "sm_90")


def kernels():
    """Every kernel that the sources define."""
    sources = (Path(cuda_compile.ROOT) / "csrc" / "cuda").glob("*.cu")
    text = "".join(path.read_text() for path in sources)
    return sorted(set(re.findall(r"\b(\w+_kernel)\(const", text)))


def clean_log():
    """A report of every kernel without spills."""
    return "".join(
        f"Compiling entry function '{mangled(name)}' for '{architecture}'\n"
        "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\nUsed 9 registers\n"
        for name in kernels()
        for architecture in ARCHITECTURES
    )


def clean_code():
    """Machine code of every kernel, with stores of 16 bytes and as many sums as there may be."""
    sums = {"adam_moments_rows_kernel": 2, "adam_moments_columns_kernel": 8}
    return "".join(
        f"code for {architecture}\nFunction : {mangled(name)}\n"
        + 4 * "STG.E.128 [R2.64], R4 ;\n"
        + sums.get(name, 0) * "STG.E [R2.64], R4 ;\n"
        for architecture in ARCHITECTURES
        for name in kernels()
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


def test_stores_are_counted_by_their_width():
    assert cuda_compile.count_stores(CODE) == {
        ("first", "sm_90"): {2: 1, 4: 2, 16: 1},
        ("second", "sm_90"): {8: 1},
    }


@pytest.mark.parametrize(
    ("name", "stores", "scatters"),
    [
        ("combine_kernel<float, 4>", {16: 3}, False),
        ("combine_kernel<float, 4>", {4: 4, 16: 3}, True),
        ("combine_kernel<Float16, 4>", {8: 1}, False),
        ("combine_kernel<Float16, 4>", {2: 4}, True),
        ("combine_kernel<BFloat16, 1>", {2: 4}, False),
        ("update_kernel<BFloat16, float, 8>", {16: 1}, False),
        ("update_kernel<BFloat16, float, 8>", {8: 2}, True),
        ("update_kernel<float, BFloat16, 8>", {}, True),
        ("adam_moments_rows_kernel<BFloat16, 4>", {4: 2, 16: 4}, False),
        ("adam_moments_rows_kernel<BFloat16, 4>", {4: 10, 16: 2}, True),
        ("adam_moments_rows_kernel<BFloat16, 4>", {8: 8, 4: 2}, True),
        ("adam_moments_columns_kernel<float, 4>", {4: 8, 16: 4}, False),
        ("adam_moments_columns_kernel<float, 4>", {4: 16, 16: 2}, True),
        ("residual_sums_rows_kernel<float, 8>", {4: 1}, False),
        ("channel_scale_kernel", {4: 3}, False),
    ],
)
def test_packs_in_parts_are_told_from_sums(name, stores, scatters):
    kernel = cuda_compile.Kernel(name, "sm_90", 1, 0, 0, 0, 0, stores)
    assert kernel.scatters == scatters


def run(log, monkeypatch, *arguments, code=None):
    monkeypatch.setattr(cuda_compile, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_compile, "nvcc_version", lambda: "13.0.88")
    monkeypatch.setattr(
        cuda_compile, "build", lambda: (log, clean_code() if code is None else code)
    )
    cuda_compile.main(list(arguments))


def test_all_is_well_without_spills(monkeypatch, tmp_path, capsys):
    run(clean_log(), monkeypatch, "--out", str(tmp_path / "record.json"))
    out = capsys.readouterr().out
    assert re.search(r"\d+ kernels, 0 spill, 0 missing\n8 of them write packs, 0 in parts", out)
    assert '"stores": {"16": 4}' in (tmp_path / "record.json").read_text()


def test_packs_in_parts_fail(monkeypatch):
    name = mangled("combine_kernel")
    before, _, after = clean_code().rpartition(f"{name}\nSTG.E.128")
    told = r"combine_kernel<float, 8> for sm_90 stores \{8: 1, 16: 3\}, packs of 16 bytes in parts$"
    with pytest.raises(SystemExit, match=told):
        run(clean_log(), monkeypatch, code=f"{before}{name}\nSTG.E.64{after}")


def test_code_that_was_not_read_fails(monkeypatch):
    with pytest.raises(SystemExit, match="in parts"):
        run(clean_log(), monkeypatch, code="")
    monkeypatch.setattr(cuda_compile.shutil, "which", lambda _: None)
    with pytest.raises(SystemExit, match="no kernel that writes packs was found"):
        run(clean_log(), monkeypatch)


def test_without_a_disassembler_it_says_so(monkeypatch):
    monkeypatch.setattr(
        cuda_compile, "find_tool", lambda name: None if name == "cuobjdump" else name
    )
    with pytest.raises(SystemExit, match="no cuobjdump"):
        cuda_compile.main([])


def test_a_spill_fails_and_shows(monkeypatch, capsys):
    log = clean_log().replace("0 bytes spill stores", "8 bytes spill stores", 1)
    with pytest.raises(SystemExit, match="_kernel<float, 8> for sm_80"):
        run(log, monkeypatch)
    assert "9 (0/8/0)" in capsys.readouterr().out


def test_a_kernel_that_is_missing_for_one_architecture_fails(monkeypatch):
    log = clean_log().replace(f"'{mangled('update_kernel')}' for 'sm_90'", "'other' for 'sm_90'")
    with pytest.raises(SystemExit, match=r"cuda_compile: update_kernel for sm_90$"):
        run(log, monkeypatch)


def test_a_log_without_kernels_fails(monkeypatch):
    with pytest.raises(SystemExit, match="no kernel was found"):
        run("nothing of interest", monkeypatch)


def test_without_nvcc_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(cuda_compile, "find_nvcc", lambda: None)
    cuda_compile.main([])
    assert "no nvcc" in capsys.readouterr().out
