"""The wheel as a user gets it: built without torch, installed beside nothing but torch."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import Distribution, distribution, distributions, version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
GENERATED = shutil.ignore_patterns(
    *(".*", "build", "demo", "dist", "*.so", "*.egg-info", "__pycache__")
)
MEGABYTE = 2**20

# Building takes as long as the machine's other work makes it.
pytestmark = pytest.mark.timeout(0)

TRAIN = """
import importlib.util, shutil

import torch
from torch import nn

import lowrank_kernels

assert shutil.which("nvcc") is None
if torch.version.cuda is None:
    assert importlib.util.find_spec("triton") is None
backends = lowrank_kernels.backends()
print(lowrank_kernels.__version__, lowrank_kernels.__file__, backends)
assert backends["native"][0], backends["native"][1]

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(48, 64), nn.Tanh(), nn.Linear(64, 32))
inputs, targets = torch.randn(256, 48), torch.randn(256, 32)
groups = lowrank_kernels.param_groups(model, rank=8)
optimizer = lowrank_kernels.FiraAdamW(groups, lr=1e-2, backend="native")
losses = []
for _ in range(20):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(inputs), targets)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
print(losses)
assert losses[-1] < 0.9 * losses[0]
"""


def run(*command: str | Path, **options) -> str:
    """Runs in the root, where a relative PIP_CONSTRAINT means what it says."""
    result = subprocess.run(
        [*map(str, command)],
        **{"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        | options,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built in isolation, that is without torch, from a tree without anything built before.

    Where there is an nvcc, for one architecture.
    """
    source = tmp_path_factory.mktemp("tree") / "source"
    shutil.copytree(ROOT, source, ignore=GENERATED)
    folder = tmp_path_factory.mktemp("wheel")
    build = (sys.executable, "-m", "pip", "wheel", source, "--no-deps", "-w", folder)
    run(*build, env={**os.environ, "LOWRANK_CUDA_ARCHITECTURES": "90"})
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.stat().st_size < 20 * MEGABYTE
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    release = f"lowrank_kernels-{version('lowrank-kernels')}.dist-info"
    assert {name.split("/")[0] for name in names} == {"lowrank_kernels", release}
    assert {Path(name).suffix for name in names if not name.startswith(release)} <= {
        *(".py", ".pyi", ".typed", ".json", ".so")
    }
    expected = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("lowrank_kernels/**/*.py*")}
    expected = {name for name in expected if "__pycache__" not in name}
    assert expected | {"lowrank_kernels/py.typed"} <= set(names)
    assert sum(name.startswith("lowrank_kernels/_native.") and ".so" in name for name in names) == 1


# What every Linux has; torch brings the OpenMP runtime.
SYSTEM_LIBRARIES = {"libstdc++", "libgcc_s", "libc", "libm", "libpthread", "libdl", "librt"}


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_wheel_needs_nothing_that_manylinux_lacks(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        (module,) = (name for name in archive.namelist() if name.endswith(".so"))
        archive.extract(module, tmp_path)
    lines = run("readelf", "--dynamic", tmp_path / module).splitlines()
    needed = [line.split("[")[1].split(".so")[0] for line in lines if "(NEEDED)" in line]
    assert {name for name in needed if not name.startswith("ld-linux")} <= SYSTEM_LIBRARIES


def required(dist: Distribution) -> set[str]:
    """Names of what pip installs with a distribution; extras are left out."""
    needed = [Requirement(line) for line in dist.requires or ()]
    return {each.name for each in needed if not each.marker or each.marker.evaluate({"extra": ""})}


def test_wheel_trains_beside_torch_alone(wheel, tmp_path):
    """Without `site` Python sees no other packages than those of this folder."""
    folder = tmp_path / "packages"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "-t", folder, wheel)
    (package,) = distributions(path=[str(folder)])
    assert required(package) == {"torch"}
    found, missing = set(), {"torch"}
    while missing:
        found.add(name := missing.pop())
        missing |= required(distribution(name)) - found
    places = {
        file.parts[0]: dist.locate_file(file.parts[0])
        for dist in map(distribution, found)
        for file in dist.files or ()
        if file.parts[0] not in ("..", "__pycache__")
    }
    for name, place in places.items():
        (folder / name).symlink_to(place)
    script = tmp_path / "train.py"
    script.write_text(TRAIN)
    output = run(sys.executable, "-S", script, env={"PYTHONPATH": str(folder)}, cwd=tmp_path)
    assert str(folder) in output
