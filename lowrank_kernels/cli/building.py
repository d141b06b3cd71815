"""Models of transformers on the meta device, and one line for whatever transformers raises."""

import importlib
import importlib.util
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .errors import UserError
from .llama import VOCABULARY, Shape


def llama_config(shape: Shape) -> Any:
    """The config of a preset.

    Raises:
        UserError: transformers is missing or broken.
    """
    transformers = _transformers()
    with _in_one_line("transformers does not work"):
        return transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_attention_heads=shape.heads,
            num_hidden_layers=shape.layers,
            tie_word_embeddings=False,
            architectures=["LlamaForCausalLM"],
        )


def read_config(path: Path) -> Any:
    """The config in a file, or in a directory as transformers saves it.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        missing = "no config.json in this directory" if path.is_dir() else "no such file"
        raise UserError(f"--config {path}: there is {missing}")
    transformers = _transformers()
    with _in_one_line(f"--config {path}"):
        return transformers.AutoConfig.from_pretrained(str(file), trust_remote_code=False)


def hidden_size(config: Any) -> int:
    """Of the config, or of the language model in it; 0 if it has none."""
    text = getattr(config, "text_config", None)
    size = getattr(config, "hidden_size", None) or getattr(text, "hidden_size", None)
    return size if isinstance(size, int) else 0


def build(config: Any, dtype: torch.dtype) -> nn.Module:
    """The model without memory for its weights: of the class that the config names, since one
    config serves several; of a config that names none, the causal language model.

    Raises:
        UserError: it cannot be built; the text says which class was tried.
    """
    transformers = _transformers()
    named = (getattr(config, "architectures", None) or [None])[0]
    tried = f"{named}, which the config names" if named else "AutoModelForCausalLM by default"
    with _in_one_line(f"the model cannot be built; tried {tried}"), torch.device("meta"):
        if named:
            module: nn.Module = _class_of(transformers, named)(config)
        else:
            automatic = transformers.AutoModelForCausalLM
            module = automatic.from_config(config, trust_remote_code=False)
    return module.to(dtype)


def _class_of(transformers: Any, name: str) -> Any:
    found = getattr(transformers, name, None)
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise LookupError(f"transformers {transformers.__version__} has no such model")
    return found


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
        reasons = [_named(error)] if root is error else [_named(error), f"from {_named(root)}"]
        raise UserError(f"{what}: {', '.join(reasons)}") from None


def _named(error: BaseException) -> str:
    name, text = type(error).__name__, str(error)
    return textwrap.shorten(f"{name}: {text}" if text else name, 240, placeholder=" ...")
