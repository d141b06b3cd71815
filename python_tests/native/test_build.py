"""What the compiled module says of itself, and what setup.py says of a bad environment."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest

from lowrank_kernels import _native

ROOT = Path(__file__).parents[2]


@pytest.fixture
def build(monkeypatch, tmp_path) -> ModuleType:
    """setup.py as a module, on a machine without nvcc and without settings."""
    for name in os.environ:
        if name.startswith(("CUDA", "CXX", "CMAKE", "LOWRANK", "MAX_JOBS")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    spec = importlib.util.spec_from_file_location("lowrank_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def cuda_home(tmp_path) -> Path:
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.touch(mode=0o755)
    return nvcc.parents[1]


def test_build_info_describes_the_build():
    info = _native.build_info()
    assert info.keys() == {
        *("version", "compiler", "cuda", "cuda_architectures", "openmp", "cpu_capability")
    }
    assert info["version"] == version("lowrank-kernels")
    assert re.fullmatch(r"\w+ \d+(\.\d+)*", info["compiler"])
    assert isinstance(info["openmp"], bool)
    assert info["cpu_capability"] in ("avx512", "avx2", "default")
    if info["cuda"] is None:
        assert info["cuda_architectures"] == []
    else:
        *codes, ptx = info["cuda_architectures"]
        assert codes
        assert all(re.fullmatch(r"sm_\d+[af]?", code) for code in codes)
        assert ptx == codes[-1].replace("sm_", "compute_")


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="needs /proc/cpuinfo")
def test_cpu_capability_is_that_of_this_machine():
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    flags = flags[1].split() if flags else []
    best = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "default"
    assert _native.build_info()["cpu_capability"] == best


def test_cuda_is_left_out_where_there_is_no_nvcc(build):
    assert build.choose_nvcc() is None


@pytest.mark.parametrize(
    ("cuda", "parts"),
    [
        ("on", ("no nvcc on PATH or in $CUDA_HOME/bin", "Install the CUDA", "LOWRANK_CUDA=off")),
        ("off", ("no C++ compiler on PATH", "g++", "LOWRANK_NATIVE=off")),
    ],
)
def test_a_missing_compiler_is_one_line_with_the_way_out(cuda, parts, tmp_path):
    run = subprocess.run(
        [sys.executable, "setup.py", "build_ext", f"-t{tmp_path}", f"-b{tmp_path}"],
        cwd=ROOT,
        env={"PATH": str(tmp_path), "LOWRANK_CUDA": cuda},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    (line,) = run.stderr.splitlines()
    for part in parts:
        assert part in line


def test_the_compiler_that_is_named_has_to_be_there(build, monkeypatch, tmp_path):
    (tmp_path / "g++").touch(mode=0o755)
    build.check_compiler()
    monkeypatch.setenv("CXX", "g++ -m64")
    build.check_compiler()
    monkeypatch.setenv("CXX", "/nowhere/icpx -g")
    with pytest.raises(SystemExit, match=r"no C\+\+ compiler on PATH \(CXX=/nowhere/icpx\)"):
        build.check_compiler()


@pytest.mark.parametrize(
    ("name", "value"),
    [("CMAKE_ARGS", "-DCMAKE_CXX_COMPILER=/opt/g++"), ("CMAKE_TOOLCHAIN_FILE", "cross.cmake")],
)
def test_a_compiler_that_cmake_is_told_of_is_left_to_it(build, monkeypatch, name, value):
    with pytest.raises(SystemExit):
        build.check_compiler()
    monkeypatch.setenv(name, value)
    build.check_compiler()


def test_a_command_that_fails_ends_the_build_without_a_traceback(build):
    build.run([sys.executable, "-c", "pass"])
    with pytest.raises(SystemExit, match="failed with status 3, see above; LOWRANK_NATIVE=off"):
        build.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_an_unknown_choice_of_the_module_is_an_error(build, monkeypatch):
    assert len(build.extensions()) == 1
    monkeypatch.setenv("LOWRANK_NATIVE", "no")
    with pytest.raises(SystemExit, match="LOWRANK_NATIVE must be on or off, got 'no'"):
        build.extensions()


# Without the finder of an editable install, which would bring its own module.
WITHOUT_NATIVE = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "ditable" not in repr(finder)]
import lowrank_kernels
assert lowrank_kernels.__file__.startswith(sys.argv[1]), lowrank_kernels.__file__
for name, status in lowrank_kernels.backends().items():
    print(name, *status)
"""


def test_a_wheel_without_the_module_needs_no_compiler(tmp_path):
    source, wheels, unpacked = (tmp_path / name for name in ("source", "wheels", "unpacked"))
    shutil.copytree(
        ROOT / "lowrank_kernels",
        source / "lowrank_kernels",
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run(
        [sys.executable, "setup.py", "-q", "bdist_wheel", "-d", wheels],
        cwd=source,
        env={"PATH": str(tmp_path), "LOWRANK_NATIVE": "off"},
        check=True,
    )
    (wheel,) = wheels.iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    shutil.unpack_archive(wheel, unpacked, "zip")
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_NATIVE, unpacked],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "reference True" in run.stdout
    assert "native False the compiled module does not load: it was not built" in run.stdout


@pytest.mark.parametrize("choice", ["auto", "on", "ON", "off"])
def test_nvcc_is_found_in_cuda_home(choice, build, cuda_home, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home))
    monkeypatch.setenv("LOWRANK_CUDA", choice)
    expected = None if choice == "off" else str(cuda_home / "bin" / "nvcc")
    assert build.choose_nvcc() == expected


def test_nvcc_is_found_on_path(build, cuda_home, monkeypatch):
    monkeypatch.setenv("PATH", os.pathsep.join(["/nowhere", str(cuda_home / "bin")]))
    assert build.choose_nvcc() == str(cuda_home / "bin" / "nvcc")


def test_unknown_choice_is_an_error(build, monkeypatch):
    monkeypatch.setenv("LOWRANK_CUDA", "1")
    with pytest.raises(SystemExit, match="LOWRANK_CUDA must be auto, on or off, got '1'"):
        build.choose_nvcc()


@pytest.mark.parametrize(
    ("text", "expected"), [("", ""), ("90", "90"), ("80;90a", "80;90a"), ("80, 90", "80;90")]
)
def test_architectures(text, expected, build, monkeypatch):
    monkeypatch.setenv("LOWRANK_CUDA_ARCHITECTURES", text)
    assert build.cuda_architectures() == expected


def test_unknown_architecture_is_an_error(build, monkeypatch):
    monkeypatch.setenv("LOWRANK_CUDA_ARCHITECTURES", "80;hopper")
    with pytest.raises(SystemExit, match="got 'hopper'"):
        build.cuda_architectures()


def test_jobs(build, monkeypatch):
    assert build.jobs() >= 1
    monkeypatch.setenv("MAX_JOBS", "3")
    assert build.jobs() == 3
    monkeypatch.setenv("MAX_JOBS", "many")
    with pytest.raises(SystemExit, match="MAX_JOBS"):
        build.jobs()


def test_missing_tool_says_how_to_get_it(build):
    with pytest.raises(SystemExit, match="pip install no-such-tool"):
        build.find_tool("no-such-tool")


# torch works with three threads and a pass with four: two start for torch, and one more if the
# pass has its pool.
ONE_POOL = """
import os, re, torch, lowrank_kernels
from lowrank_kernels import _native

maps = open("/proc/self/maps").read()
print(*set(re.findall(r"/(lib[gi]?omp[^/\\s]*)$", maps, re.M)))
started = lambda: len(os.listdir("/proc/self/task"))
torch.set_num_threads(3)
alone = started()
ones = torch.ones(2048, 2048)
channels = torch.ones(2, 2048)
print(started() - alone)
_native.residual_sums(
    matrix=([ones.data_ptr()], 0, 2048),
    residual_sq=[channels[0].data_ptr()],
    projected_sq=[channels[1].data_ptr()],
    kappa=0.25,
    rows=2048,
    cols=2048,
    channels_are_rows=True,
    threads=4,
)
print(started() - alone)
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
@pytest.mark.skipif(
    not _native.build_info()["openmp"] or not _native.build_info()["compiler"].startswith("GNU"),
    reason="only GCC compiles for the OpenMP runtime that torch brings",
)
def test_the_openmp_runtime_is_torchs():
    """One library, whatever torch calls it, and one pool of threads."""
    run = subprocess.run(
        [sys.executable, "-c", ONE_POOL], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    libraries, torch_threads, all_threads = run.stdout.splitlines()
    assert len(libraries.split()) == 1, libraries
    assert (int(torch_threads), int(all_threads)) == (2, 3)
