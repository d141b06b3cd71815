"""The command line that the benches share, so that an option means the same in each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.cases import DTYPES
from bench.models import PRESETS
from lowrank_kernels import backends

QUICK_ROUNDS = 2


def about(bench: str, text: str | None) -> argparse.ArgumentParser:
    """A parser whose help begins with the docstring of a bench, as it stands there."""
    return argparse.ArgumentParser(
        prog=f"python -m bench.{bench}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def parser(
    bench: str,
    text: str | None,
    *,
    models: str,
    dtypes: str,
    rounds: int,
    out: str = "the JSON record; none by default",
) -> argparse.ArgumentParser:
    """A parser with the common options; a bench, whose docstring is `text`, adds its own."""
    here = "cuda" if torch.cuda.is_available() else "cpu"
    result = about(bench, text)
    help_of_device = "default: %(default)s here, cuda where there is one"
    result.add_argument("--device", choices=("cpu", "cuda"), default=here, help=help_of_device)
    usual = "ours; default: triton, on cpu native"
    result.add_argument("--backend", choices=tuple(backends()), help=usual)
    names = f"of {', '.join(PRESETS)}; default: {models}"
    result.add_argument("--models", type=words(PRESETS), default=models, help=names)
    names = f"of {', '.join(DTYPES)}; default: {dtypes}"
    result.add_argument("--dtypes", type=words(DTYPES), default=dtypes, help=names)
    result.add_argument("--rounds", type=int, default=rounds, help="default: %(default)s")
    result.add_argument("--quick", action="store_true", help="seconds: figures of no use")
    result.add_argument("--out", type=Path, help=out)
    return result


def words(known: object) -> object:
    """A type for argparse: names out of `known`, with commas between them."""

    def split(text: str) -> list[str]:
        found = list(dict.fromkeys(text.split(",")))
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return found

    return split


def parse(result: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options with nothing left open, and the words that they were read from."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = result.parse_args(arguments)
    options.arguments = arguments
    options.backend = options.backend or ("triton" if options.device == "cuda" else "native")
    available, reason = backends()[options.backend]
    if not available:
        result.error(f"the {options.backend} backend cannot run here: {reason}")
    if options.quick:
        options.rounds = QUICK_ROUNDS
    return options
