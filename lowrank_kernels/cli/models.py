"""Models without weights: what `plan` and `explain` are asked about."""

import argparse
import importlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops import Choice, requested_backend
from ..ops.dispatch import REQUESTS, Kind, choose_kind
from ..optim import AdaRankGradAdamW, FiraAdamW, GaLoreAdamW, LowRankAdamW, param_groups
from .errors import UserError
from .llama import SHAPES, VOCABULARY, Shape

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


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the rank, the dtype, and who would compute the step where."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="NAME", help=f"LLaMA preset: {', '.join(SHAPES)}")
    which.add_argument("--config", metavar="FILE", type=Path, help="config.json of transformers")
    parser.add_argument("--rank", type=int, help="default: the preset's, or hidden size / 4")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s"
    )
    parser.add_argument("--backend", choices=REQUESTS, default="auto", help="default: auto")


def model_of(args: argparse.Namespace) -> Model:
    """The model that the arguments name, without memory for its weights.

    Raises:
        UserError: it is unknown or cannot be built, or the rank does not fit.
    """
    if args.rank is not None and args.rank < 1:
        raise UserError(f"--rank must be at least 1, got {args.rank}")
    if args.config is None and args.model not in SHAPES:
        raise UserError(f"--model {args.model} is not one of {', '.join(SHAPES)}")
    if args.config is not None and not args.config.is_file():
        raise UserError(f"--config {args.config}: there is no such file")
    transformers = _transformers()
    if args.config is None:
        shape = SHAPES[args.model]
        name, published, config = args.model, shape.rank, _llama_config(transformers, shape)
    else:
        config = _read_config(transformers, args.config)
        name, published = str(args.config), getattr(config, "hidden_size", 0) // 4
    rank = args.rank or published
    if not rank:
        raise UserError(f"--config {args.config}: it has no hidden_size; name a --rank")
    return Model(name, _on_meta(transformers, config, DTYPES[args.dtype]), rank)


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


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise UserError("models are built with transformers: pip install transformers") from None


def _llama_config(transformers: Any, shape: Shape) -> Any:
    return transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_hidden_layers=shape.layers,
        tie_word_embeddings=False,
    )


def _read_config(transformers: Any, path: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(str(path))
    except (KeyError, OSError, ValueError) as error:
        raise UserError(f"--config {path}: {_first_line(error)}") from None


def _on_meta(transformers: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    try:
        with torch.device("meta"):
            module: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    except (ImportError, ValueError) as error:
        raise UserError(f"the model cannot be built: {_first_line(error)}") from None
    return module.to(dtype)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
