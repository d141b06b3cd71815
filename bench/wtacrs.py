"""Where the published 2.7 times less memory of WTA-CRS comes from, counted on T5's own blocks.

    python -m bench.wtacrs --out bench/results/wtacrs.json       # a minute

Published (the table in the repository of WTA-CRS, zirui-ray-liu/WTACRS e114d35; arXiv 2305.15265)
are peaks in GB on an A100, with sequences of 128 tokens; the batch is not. Here a peak is

    weights in float32, gradients and AdamW's moments of what is trained, + batch x saved bytes

and the batch is the one that makes the peak of full training the published one; all other peaks are
then predictions. Saved bytes are those of `saved_bytes` on the T5 of transformers in float32, in
training, with attention that writes its scores, masks of dropout in bytes as on a GPU, and a target
of 4 tokens; a model of 1 and one of 2 layers tell those of all. LoRA is PEFT's, rank 32, on q, v.
The sample is this package's, of the inputs of o, wi and wo, as published, or of all linear layers.

WTA-CRS does more: it samples the two products of attention, keeps nothing for norms, and masks of
dropout and ReLU in bits. What is then saved is a formula, `everything_of`, and no count.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from rich.table import Table
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from bench.options import about
from bench.record import head, write_lines
from bench.tables import new_table, show
from lowrank_kernels import sample_linears, saved_bytes

LENGTH, TARGET, VOCABULARY, LORA_RANK = 128, 4, 64, 32
PUBLISHED_LINEARS = r"\.(o|wi|wo)$"
EVERYTHING = r"\.(q|k|v|o|wi|wo)$"


class Shape(NamedTuple):
    """A T5, and peaks in GB that are published, by what they were made with."""

    hidden: int
    ffn: int
    heads: int
    layers: int
    parameters: int
    published: dict[str, float]


SHAPES = {
    "T5-Base": Shape(768, 3072, 12, 12, 222_903_552,
                     {"full": 17.66, "wta": 8.44, "lora": 13.84, "lora + wta": 6.50}),
    "T5-Large": Shape(1024, 4096, 16, 24, 737_668_096,
                      {"full": 45.85, "wta": 21.58, "lora + wta": 17.44}),
}  # fmt: skip


class Way(NamedTuple):
    """How it is trained, and which published one is like it."""

    like: str
    lora: bool = False
    sampled: str = ""
    keep: float = 0.3
    attention: str = "eager"
    published: bool = False


WAYS = {
    "full": Way("full"),
    "o, wi, wo sampled": Way("wta", sampled=PUBLISHED_LINEARS),
    "all sampled": Way("wta", sampled=EVERYTHING),
    "all that WTA-CRS does, by formula": Way("wta", published=True),
    "LoRA": Way("lora", lora=True),
    "LoRA, its inputs sampled": Way("lora + wta", lora=True, sampled=r"lora_A\.default$"),
    "LoRA, all that WTA-CRS does, by formula": Way("lora + wta", lora=True, published=True),
    "full, fused attention": Way("", attention="sdpa"),
    "all sampled, fused attention": Way("", sampled=EVERYTHING, attention="sdpa"),
}


class _BytesOfMasks(TorchFunctionMode):
    """Dropout as a GPU has it, whose mask takes a byte; on a CPU it takes four."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.dropout:
            return _dropout(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _dropout(x: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False):
    return torch.native_dropout(x, p, training)[0] if training and p else x


def model_of(shape: Shape, layers: int, way: Way) -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=shape.hidden,
        d_kv=64,
        d_ff=shape.ffn,
        num_heads=shape.heads,
        num_layers=layers,
        num_decoder_layers=layers,
        decoder_start_token_id=0,
        attn_implementation=way.attention,
    )
    model = transformers.T5ForConditionalGeneration(config)
    if way.lora:
        adapters = peft.LoraConfig(r=LORA_RANK, target_modules=["q", "v"], lora_dropout=0.0)
        model = peft.get_peft_model(model, adapters)
    if way.sampled:
        sample_linears(model, way.keep, targets=way.sampled)
    return model.train()


def everything_of(shape: Shape, way: Way) -> int:
    """Bytes of a sequence, of all layers, in the encoder and of its output in the decoder.

    Exact: the input of q, k and v, and softmax. A share `keep`: q, k, v, the probabilities after
    dropout, and inputs of o, wi and wo, which frozen weights do not need. Bits: masks.
    """
    wide, inner = 4 * LENGTH * shape.hidden, 4 * LENGTH * shape.ffn
    scores = 4 * LENGTH**2 * shape.heads
    inputs = 0 if way.lora else 2 * wide + inner
    layer = wide + scores + way.keep * (3 * wide + scores + inputs)
    layer += (2 * wide + 2 * inner + scores) / 32
    return round(shape.layers * (layer + way.keep * 2 * wide) + wide)


def saved_of(shape: Shape, way: Way) -> int:
    """Bytes of a sequence, of all layers."""
    if way.published:
        return everything_of(shape, way)
    ids = torch.randint(1, VOCABULARY, (1, LENGTH))
    labels = torch.randint(1, VOCABULARY, (1, TARGET))
    one, two = (
        _total(model_of(shape, layers, way), input_ids=ids, labels=labels) for layers in (1, 2)
    )
    return one + (shape.layers - 1) * (two - one)


def _total(model: torch.nn.Module, **batch: torch.Tensor) -> int:
    with _BytesOfMasks():
        return saved_bytes(model, **batch).total


def trained_of(shape: Shape, way: Way) -> int:
    if not way.lora:
        return shape.parameters
    # q and v of an encoder's layer, and of the two attentions of a decoder's.
    return shape.layers * 6 * 2 * LORA_RANK * shape.hidden


def rows_of(name: str) -> list[dict]:
    shape, rows, batch = SHAPES[name], [], 0.0
    for text, way in WAYS.items():
        saved, trained = saved_of(shape, way), trained_of(shape, way)
        held = 4 * shape.parameters + 12 * trained + (4 * trained if way.lora else 0)
        if text == "full":
            batch = (1e9 * shape.published["full"] - held) / saved
        rows.append(
            {"model": name, "way": text, "keep": way.keep if way.sampled else None,
             "saved_bytes": saved, "held_bytes": held, "batch": batch,
             "peak_bytes": round(held + batch * saved),
             "published_gb": shape.published.get(way.like)}
        )  # fmt: skip
    return rows


def table(rows: list[dict]) -> Table:
    found = new_table(
        "peaks of T5, counted and published",
        "GB are 10^9 bytes; the batch is that of the published peak of full training",
        ("model", "way"),
        ("saved MB a sequence", "peak GB", "times less", "published GB", "times less"),
    )
    for row in rows:
        full = next(each for each in rows if each["model"] == row["model"])
        found.add_row(*(row["model"], row["way"]), *cells(row, full))
    return found


def cells(row: dict, full: dict) -> list[str]:
    """Numbers of a row, beside those of full training."""
    known = row["published_gb"]
    return [
        f"{row['saved_bytes'] / 1e6:.1f}",
        f"{row['peak_bytes'] / 1e9:.2f}",
        f"{full['peak_bytes'] / row['peak_bytes']:.2f}",
        "" if known is None else f"{known:.2f}",
        "" if known is None else f"{full['published_gb'] / known:.2f}",
    ]


def main(arguments: list[str] | None = None) -> None:
    line = about("wtacrs", __doc__)
    line.add_argument("--out", type=Path, help="the JSON record; none by default")
    arguments = sys.argv[1:] if arguments is None else arguments
    options = line.parse_args(arguments)
    rows = [row for name in SHAPES for row in rows_of(name)]
    if options.out:
        write_lines(options.out, head("wtacrs", "cpu", arguments), "rows", rows)
    show(table(rows), 150)


if __name__ == "__main__":
    main()
