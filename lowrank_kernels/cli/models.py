"""Models without weights: what `plan` and `explain` are asked about."""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ..ops import Choice, requested_backend
from ..ops.dispatch import REQUESTS, Kind, choose_kind
from ..optim import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, LowRankAdamW, param_groups
from .building import build, hidden_size, llama_config, read_config
from .errors import UserError
from .llama import SHAPES

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPTIMIZERS: dict[str, type[LowRankAdamW]] = {
    "galore": GaLoreAdamW,
    "fira": FiraAdamW,
    "adarankgrad": AdaRankGradAdamW,
}


class Model(NamedTuple):
    """A model on the meta device, its name and the rank of its projected matrices."""

    name: str
    module: nn.Module
    rank: int

    @property
    def architecture(self) -> str:
        """The class, which for a config of several is not to be guessed."""
        return type(self.module).__name__


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the rank, the dtype, and who would compute the step where."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="NAME", help=f"LLaMA preset: {', '.join(SHAPES)}")
    which.add_argument(
        "--config", metavar="PATH", type=Path, help="config.json of transformers, or its directory"
    )
    parser.add_argument("--rank", type=int, help="default: the preset's, or hidden size / 4")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--backend", choices=REQUESTS, default="auto", help="default: auto")


def model_of(args: argparse.Namespace) -> Model:
    """The model that the arguments name, without memory for its weights.

    Raises:
        UserError: it is unknown or cannot be built, or the rank does not fit.
    """
    if args.rank is not None and args.rank < 1:
        raise UserError(f"--rank must be at least 1, got {args.rank}")
    if args.config is not None:
        config = read_config(args.config)
        name, published = str(args.config), hidden_size(config) // 4
    elif args.model in SHAPES:
        shape = SHAPES[args.model]
        name, published, config = args.model, shape.rank, llama_config(shape)
    else:
        raise UserError(f"--model {args.model} is not one of {', '.join(SHAPES)}")
    rank = args.rank or published
    if not rank:
        raise UserError(f"--config {args.config}: it has no hidden_size; name a --rank")
    return Model(name, build(config, DTYPES[args.dtype]), rank)


def build_optimizer(name: str, model: Model, backend: str) -> LowRankAdamW:
    """One of `OPTIMIZERS` over the model's groups.

    Raises:
        UserError: nothing can be projected.
    """
    try:
        return OPTIMIZERS[name](param_groups(model.module, model.rank), backend=backend)
    except ValueError as error:
        raise UserError(" ".join(str(error).split())) from None


def backend_of(args: argparse.Namespace) -> Choice:
    """The backend of the projected matrices on the device that is asked for, and why.

    Raises:
        UserError: it is unknown, or does not serve this device and dtype.
        BackendUnavailable: it cannot run here.
    """
    dtype = DTYPES[args.dtype]
    try:
        return choose_kind(requested_backend(args.backend), Kind(args.device, dtype, dtype))
    except ValueError as error:
        raise UserError(str(error)) from None
