"""Builds lowrank_kernels._native with CMake. The rest of the packaging is in pyproject.toml.

Environment:
    LOWRANK_NATIVE: `on` (default) builds the module, `off` leaves it out: no compiler is needed,
        and the backends are the reference, foreach and Triton. An editable install still loads a
        `lowrank_kernels/_native*.so` that an earlier build left in the folder: remove it.
    LOWRANK_CUDA: `auto` (default) builds the CUDA half when nvcc is found, `on` requires it, `off`
        leaves it out.
    LOWRANK_CUDA_ARCHITECTURES: such as `90` or `80;90`; PTX of the last is embedded too.
    MAX_JOBS: how many compilers run at once.
    CMAKE_ARGS: further arguments for CMake, such as `-DLOWRANK_CPU_DISPATCH=OFF`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
COMPILERS = ("c++", "g++", "clang++")


class BuildError(SystemExit):
    """Ends the build with a message and no traceback."""


def extensions() -> list[Extension]:
    """What there is to compile; see LOWRANK_NATIVE above."""
    choice = os.environ.get("LOWRANK_NATIVE", "on").lower()
    if choice not in ("on", "off"):
        raise BuildError(f"LOWRANK_NATIVE must be on or off, got {choice!r}")
    return [Extension("lowrank_kernels._native", sources=[])] if choice == "on" else []


def check_compiler() -> None:
    """Says in a line what CMake would say in a page, unless CMake was told where to look."""
    settings = [os.environ.get("CMAKE_ARGS", ""), *os.environ]
    if any("CMAKE_CXX_COMPILER" in text or "CMAKE_TOOLCHAIN_FILE" in text for text in settings):
        return
    named = shlex.split(os.environ.get("CXX", ""))[:1]
    if not any(map(shutil.which, named or COMPILERS)):
        missing = f"CXX={named[0]}" if named else ", ".join(COMPILERS)
        raise BuildError(
            f"there is no C++ compiler on PATH ({missing}): install one, such as g++, or set"
            " LOWRANK_NATIVE=off to install without the compiled backend"
        )


def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, else the one on PATH."""
    home = os.environ.get("CUDA_HOME")
    if home and (nvcc := shutil.which("nvcc", path=str(Path(home, "bin")))):
        return nvcc
    return shutil.which("nvcc")


def choose_nvcc() -> str | None:
    """The nvcc to build the CUDA half with, or None to leave it out; see LOWRANK_CUDA above."""
    choice = os.environ.get("LOWRANK_CUDA", "auto").lower()
    if choice not in ("auto", "on", "off"):
        raise BuildError(f"LOWRANK_CUDA must be auto, on or off, got {choice!r}")
    if choice == "off":
        return None
    nvcc = find_nvcc()
    if nvcc is None and choice == "on":
        raise BuildError(
            "LOWRANK_CUDA=on, but there is no nvcc on PATH or in $CUDA_HOME/bin. Install the CUDA "
            "toolkit and point CUDA_HOME at it, or set LOWRANK_CUDA=off to build the CPU half only."
        )
    return nvcc


def cuda_architectures() -> str:
    """LOWRANK_CUDA_ARCHITECTURES as a CMake list; empty for the default."""
    text = os.environ.get("LOWRANK_CUDA_ARCHITECTURES", "")
    architectures = re.split(r"[;,\s]+", text.strip()) if text.strip() else []
    for architecture in architectures:
        if not re.fullmatch(r"\d+[af]?", architecture):
            raise BuildError(
                f"LOWRANK_CUDA_ARCHITECTURES must be numbers such as 80;90, got {architecture!r}"
            )
    return ";".join(architectures)


def jobs() -> int:
    """MAX_JOBS, else the processors this process may use."""
    text = os.environ.get("MAX_JOBS", "")
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if not text.isdigit() or int(text) < 1:
        raise BuildError(f"MAX_JOBS must be a positive integer, got {text!r}")
    return int(text)


def find_tool(name: str) -> str:
    """The tool beside this Python, which is where pip puts it without activating anything."""
    tool = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if tool is None:
        raise BuildError(f"{name} is needed to build lowrank_kernels: pip install {name}")
    return tool


def run(command: list[str]) -> None:
    """Ends the build if a command fails, whose own output says why."""
    if status := subprocess.run(command, check=False).returncode:
        raise BuildError(
            f"{' '.join(command[:2])} failed with status {status}, see above; LOWRANK_NATIVE=off"
            " installs without the compiled backend"
        )


class BuildNative(build_ext):
    """Hands the extension to CMake."""

    def build_extension(self, ext: Extension) -> None:
        nvcc = choose_nvcc()
        check_compiler()
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "native"
        print(
            f"lowrank_kernels._native: CPU and CUDA, {nvcc}"
            if nvcc
            else "lowrank_kernels._native: CPU only (no nvcc, or LOWRANK_CUDA=off)",
            flush=True,
        )
        cmake = find_tool("cmake")
        configure = [
            # Fresh: a cache left in build/ may name the tools of an isolated build long gone.
            *(cmake, "--fresh", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
            f"-DCMAKE_MAKE_PROGRAM={find_tool('ninja')}",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DCMAKE_INSTALL_PREFIX={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DLOWRANK_VERSION={self.distribution.get_version()}",
            f"-DLOWRANK_CUDA={'ON' if nvcc else 'OFF'}",
        ]
        if nvcc:
            configure.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
            configure.append(f"-DLOWRANK_CUDA_ARCHITECTURES={cuda_architectures()}")
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        run(configure)
        run([cmake, "--build", str(build), "--parallel", str(jobs())])
        run([cmake, "--install", str(build)])
        if not target.is_file():
            raise BuildError(f"CMake finished without writing {target}")


if __name__ == "__main__":
    setup(
        ext_modules=extensions(),
        cmdclass={"build_ext": BuildNative},
    )
