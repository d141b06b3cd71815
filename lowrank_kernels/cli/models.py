"""Models without memory for their weights: what `plan` and `explain` are asked about."""

import argparse
import importlib
import importlib.util
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..ops import Choice, Side, Size, requested_backend
from ..ops.dispatch import REQUESTS, Kind, choose_kind
from ..optim import (
    AdaRankGradAdamW,
    ApolloAdamW,
    FiraAdamW,
    GaLoreAdamW,
    LowRankAdamW,
    param_groups,
)
from ..optim.formats import BASIS_FORMATS, STATE_FORMATS
from ..optim.groups import PROJECTION_DEFAULTS
from ..optim.outside import TRANSFORMED
from .text import UserError, user_errors

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Method(NamedTuple):
    """An optimizer, what makes it the one of its name, and the rank that it has of itself."""

    optimizer: type[LowRankAdamW]
    options: dict[str, Any]
    scale: float = PROJECTION_DEFAULTS["scale"]
    rank: int | None = None


OPTIMIZERS = {
    "galore": Method(GaLoreAdamW, {}),
    "fira": Method(FiraAdamW, {}),
    "adarankgrad": Method(AdaRankGradAdamW, {}),
    "apollo": Method(ApolloAdamW, {}, scale=1.0),
    "apollo-mini": Method(ApolloAdamW, {"per": "matrix"}, scale=128**0.5, rank=1),
    "normalize": Method(LowRankAdamW, {"residual": "normalize"}),
    **{form: Method(LowRankAdamW, {"residual": form}) for form in TRANSFORMED},
}


@dataclass(frozen=True)
class Shape:
    """A LLaMA, and the rank and the interval between two bases that are published for it."""

    hidden: int
    ffn: int
    heads: int
    layers: int
    rank: int
    update_proj_gap: int


# Those of the GaLore paper, by the size that each has with its vocabulary. The rank of 1b is the
# paper's; nothing is published for 3b, whose values lie between its neighbours'. nano is the 9m
# shape under the name of the recipe for two CPU cores.
VOCABULARY = 32_000
SHAPES = {
    "nano": Shape(128, 352, 4, 4, 32, 200),
    "9m": Shape(128, 352, 4, 4, 32, 200),
    "20m": Shape(256, 688, 4, 4, 64, 200),
    "35m": Shape(384, 1024, 8, 6, 96, 200),
    "60m": Shape(512, 1376, 8, 8, 128, 200),
    "130m": Shape(768, 2048, 12, 12, 256, 200),
    "350m": Shape(1024, 2736, 16, 24, 256, 200),
    "1b": Shape(2048, 5461, 32, 24, 512, 200),
    "3b": Shape(2560, 6848, 32, 32, 640, 200),
    "7b": Shape(4096, 11008, 32, 32, 1024, 500),
}
# LLaMA 2's, planned for and not trained here. Nothing is published for them: ranks are a quarter of
# the hidden size, as those above from 130m on, the interval is the default.
LARGE = {
    "13b": Shape(5120, 13824, 40, 40, 1280, 200),
    "70b": Shape(8192, 28672, 64, 80, 2048, 200),
}
PLANNED = SHAPES | LARGE
# Heads of keys and values, where they are fewer than those of queries.
KEY_VALUE_HEADS = {"70b": 8}


class Model(NamedTuple):
    """A model on the meta device, its name, its class, which for a config of several is not to be
    guessed, and the rank of its projected matrices.
    """

    name: str
    architecture: str
    module: nn.Module
    rank: int


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the rank, the dtype, and who would compute the step where."""
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", metavar="NAME", help=f"LLaMA preset: {', '.join(PLANNED)}")
    which.add_argument(
        "--config", metavar="PATH", type=Path, help="config.json of transformers, or its directory"
    )
    parser.add_argument(
        "--rank", type=int, help="default: the preset's, or hidden size / 4; apollo-mini's is 1"
    )
    held = f"of {' and '.join(TRANSFORMED)}, held in a byte an element; default: none"
    parser.add_argument("--residual-momentum", type=float, default=0.0, metavar="BETA", help=held)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    parser.add_argument("--backend", choices=REQUESTS, default="auto", help="default: auto")
    forms = "in which moments are held; default: %(default)s"
    parser.add_argument("--state", choices=STATE_FORMATS, default="float32", help=forms)
    forms = "in which bases are held; default: %(default)s"
    parser.add_argument("--basis", choices=BASIS_FORMATS, default="weight", help=forms)


def model_of(args: argparse.Namespace) -> Model:
    """The model that the arguments name.

    Raises:
        UserError: it is unknown or cannot be built, or the rank does not fit.
    """
    if args.rank is not None and args.rank < 1:
        raise UserError(f"--rank must be at least 1, got {args.rank}")
    if args.config is not None:
        config = _read_config(args.config)
        name, published = str(args.config), _hidden_size(config) // 4
    elif args.model in PLANNED:
        name, published = args.model, PLANNED[args.model].rank
        config = _llama_config(name)
    else:
        raise UserError(f"--model {args.model} is not one of {', '.join(PLANNED)}")
    rank = args.rank or published
    if not rank:
        raise UserError(f"--config {args.config}: it has no hidden_size; name a --rank")
    module = _build(config).to(DTYPES[args.dtype])
    return Model(name, type(module).__name__, module, rank)


def rank_of(name: str, model: Model, args: argparse.Namespace) -> int:
    """The rank of one of `OPTIMIZERS`: its own, as asked for, or the model's."""
    return OPTIMIZERS[name].rank or args.rank or model.rank


def build_optimizer(name: str, model: Model, args: argparse.Namespace) -> LowRankAdamW:
    """One of `OPTIMIZERS` over the model's groups, as the command line asks for it.

    Raises:
        UserError: nothing can be projected, or an option is out of range.
    """
    with user_errors():
        optimizer, own, scale, _ = OPTIMIZERS[name]
        groups = param_groups(model.module, rank_of(name, model, args), scale=scale)
        options = {**own, "state": args.state, "basis": args.basis}
        if own.get("residual") in TRANSFORMED:
            options["residual_momentum"] = args.residual_momentum
        elif args.residual_momentum:
            which = " and ".join(TRANSFORMED)
            raise ValueError(f"--residual-momentum is of {which}, and {name} has none")
        return optimizer(groups, backend=args.backend, **options)


def backend_of(args: argparse.Namespace, row: dict[str, Any] | None = None) -> Choice:
    """The backend of a projected matrix on the device that is asked for, and why.

    Args:
        args: of the command line.
        row: of `LowRankAdamW.plan`; None for matrices of any size.

    Raises:
        UserError: it is unknown, or does not serve this device and dtype.
        BackendUnavailable: it cannot run here.
    """
    dtype, size = DTYPES[args.dtype], None
    if row is not None:
        (rows, cols), side = row["shape"], Side[row["side"].upper()]
        size = Size(rows, cols, row["rank"], side)
    with user_errors():
        request = requested_backend(args.backend)
        return choose_kind(request, Kind(args.device, dtype, dtype, size=size))


def llama(name: str) -> nn.Module:
    """One of `PLANNED` in float32, on the meta device."""
    return _build(_llama_config(name))


def _llama_config(name: str) -> Any:
    transformers, shape = _transformers(), PLANNED[name]
    with _in_one_line("transformers does not work"):
        return transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_key_value_heads=KEY_VALUE_HEADS.get(name, shape.heads),
            num_hidden_layers=shape.layers,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )


def _read_config(path: Path) -> Any:
    """The config in a file, or in a directory as transformers saves it."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        missing = "no config.json in this directory" if path.is_dir() else "no such file"
        raise UserError(f"--config {path}: there is {missing}")
    transformers = _transformers()
    with _in_one_line(f"--config {path}"):
        return transformers.AutoConfig.from_pretrained(str(file), trust_remote_code=False)


def _hidden_size(config: Any) -> int:
    """Of the config, or of the language model in it; 0 if it has none."""
    text = getattr(config, "text_config", None)
    size = getattr(config, "hidden_size", None) or getattr(text, "hidden_size", None)
    return size if isinstance(size, int) else 0


def _build(config: Any) -> nn.Module:
    """A model of the class that the config names, since one config serves several; of a config
    that names none, the causal language model.
    """
    transformers = _transformers()
    named = (getattr(config, "architectures", None) or [None])[0]
    tried = f"{named}, which the config names" if named else "AutoModelForCausalLM by default"
    with _in_one_line(f"the model cannot be built; tried {tried}"), torch.device("meta"):
        if not named:
            automatic = transformers.AutoModelForCausalLM
            module: nn.Module = automatic.from_config(config, trust_remote_code=False)
            return module
        found = getattr(transformers, named, None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise LookupError(f"transformers {transformers.__version__} has no such model")
        return found(config)


def _transformers() -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise UserError("models are built with transformers: pip install transformers")
    with _in_one_line("transformers does not import"):
        return importlib.import_module("transformers")


@contextmanager
def _in_one_line(what: str) -> Iterator[None]:
    """Any exception as a `UserError`: a package that does not fit raises whatever it likes, often
    at the first use of a class, with the reason at the end of a chain.
    """
    try:
        yield
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        reason = _named(error) if root is error else f"{_named(error)}, from {_named(root)}"
        raise UserError(f"{what}: {reason}") from None


def _named(error: BaseException) -> str:
    name, text = type(error).__name__, str(error)
    return textwrap.shorten(f"{name}: {text}" if text else name, 240, placeholder=" ...")
