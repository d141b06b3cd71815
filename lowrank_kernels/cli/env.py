"""What is installed, on which devices it runs, and which backend is chosen for what."""

import argparse
import importlib.metadata
import os
import platform
from typing import Any

import torch

from ..ops import BackendUnavailable, backends, requested_backend
from ..ops.dispatch import ENVIRONMENT_VARIABLE, Kind, choose_kind
from ..ops.native import build_info
from ..text import amount, table

SUMMARY = "say what is installed, what it runs on and which backend is chosen"

PACKAGES = ("torch", "lowrank-kernels", "triton", "transformers")
INTERPRETER = "TRITON_INTERPRET"
# Those after the first are read by setup.py.
VARIABLES = (ENVIRONMENT_VARIABLE, "LOWRANK_CUDA", "LOWRANK_CUDA_ARCHITECTURES", "LOWRANK_NATIVE")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def facts(args: argparse.Namespace) -> dict[str, Any]:
    """Versions, devices, threads, native, backends, auto, variables and remarks on them."""
    names = [name for name in sorted(os.environ) if name.startswith("LOWRANK_")]
    names += [INTERPRETER] if INTERPRETER in os.environ else []
    variables = {name: os.environ[name] for name in names}
    remarks = {name: _remark(name, value) for name, value in variables.items()}
    packages = {name.replace("-", "_"): _version(name) for name in PACKAGES}
    devices = _devices()
    places = [device["device"] for device in devices]
    places += ["cuda"] if len(places) == 1 else []
    return {
        "versions": {"python": platform.python_version(), **packages},
        "devices": devices,
        "threads": torch.get_num_threads(),
        "native": build_info(),
        "backends": {
            name: {"available": available, "reason": reason}
            for name, (available, reason) in backends().items()
        },
        "auto": [
            {"device": device, "dtype": name}
            | choose_kind("auto", Kind(device, dtype, dtype))._asdict()
            for device in places
            for name, dtype in DTYPES.items()
        ],
        "variables": variables,
        "remarks": {name: remark for name, remark in remarks.items() if remark},
    }


def as_text(facts: dict[str, Any]) -> str:
    """A table a kind."""
    versions = [(name, version or "not installed") for name, version in facts["versions"].items()]
    devices = [(x["device"], amount(x["memory_bytes"]), x["name"]) for x in facts["devices"]]
    native = [
        (key, " ".join(map(str, value)) if isinstance(value, (list, tuple)) else value)
        for key, value in facts["native"].items()
    ]
    found = [
        (name, "yes" if backend["available"] else "no", backend["reason"])
        for name, backend in facts["backends"].items()
    ]
    auto = [list(each.values()) for each in facts["auto"]]
    remarks = facts["remarks"]
    variables = [(name, value, remarks.get(name, "")) for name, value in facts["variables"].items()]
    parts = [
        table(("package", "version"), versions),
        table(("device", "memory", "name"), devices),
        f"threads  {facts['threads']}",
        table(("native module", ""), native or [("does not load", "")]),
        table(("backend", "available", "reason"), found),
        table(("auto takes on", "for", "backend", "reason"), auto),
        table(("variable", "value", "remark"), variables or [("none", "", "")]),
    ]
    return "\n\n".join(parts)


def _remark(name: str, value: str) -> str | None:
    """What is wrong with a variable, or None."""
    if name == INTERPRETER:
        return None if value in ("0", "1") else "neither 1 nor 0: here only 1 counts"
    if name not in VARIABLES:
        return f"of no effect: not one of {', '.join(VARIABLES)}"
    if name == ENVIRONMENT_VARIABLE:
        try:
            requested_backend("auto")
        except (ValueError, BackendUnavailable) as error:
            return f"every step fails: {error}"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    found = [{"device": "cpu", "name": platform.machine(), "memory_bytes": memory}]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        size = properties.total_memory
        found.append({"device": f"cuda:{index}", "name": properties.name, "memory_bytes": size})
    return found
