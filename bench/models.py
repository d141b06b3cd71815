"""The LLaMA shapes that the pre-training bench knows, and the recipe that goes with each."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lowrank_kernels.cli.models import SHAPES, Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import LlamaForCausalLM


@dataclass(frozen=True)
class Preset(Shape):
    """A shape, and the training recipe used unless an argument says otherwise."""

    seq_len: int
    batch_size: int
    micro_batch: int
    steps: int


# From 60m up the recipes are GaLore's (131K tokens a batch); nothing is published for 3b, whose
# recipe lies between its neighbours'. nano is the 9m shape with a recipe for two CPU cores.
RECIPES = {
    "nano": (128, 8, 8, 800),
    "9m": (256, 64, 64, 2_000),
    "20m": (256, 64, 64, 2_000),
    "35m": (256, 64, 64, 3_000),
    "60m": (256, 512, 128, 10_000),
    "130m": (256, 512, 128, 20_000),
    "350m": (256, 512, 64, 60_000),
    "1b": (256, 512, 32, 100_000),
    "3b": (256, 512, 16, 120_000),
    "7b": (256, 512, 16, 150_000),
}
PRESETS = {name: Preset(*asdict(SHAPES[name]).values(), *RECIPES[name]) for name in SHAPES}

# The paper's 9m and 20m are mostly vocabulary. These have their parameters in the blocks, with
# bytes as tokens, and recipes for hours on two CPU cores.
BLOCKS = {
    "9m-bytes": Preset(256, 688, 8, 11, 64, 200, 256, 16, 16, 400),
    "20m-bytes": Preset(384, 1024, 8, 11, 96, 200, 256, 16, 16, 400),
}
MODELS = PRESETS | BLOCKS


def build_model(preset: Preset, vocab_size: int, seq_len: int) -> LlamaForCausalLM:
    """Builds the model in float32 on the default device, with weights from the global generator."""
    # Imported here because the command line needs the table above but not the seconds this takes.
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=preset.hidden,
            intermediate_size=preset.ffn,
            num_attention_heads=preset.heads,
            num_hidden_layers=preset.layers,
            max_position_embeddings=seq_len,
            rms_norm_eps=1e-6,
            initializer_range=0.02,
            tie_word_embeddings=False,
            use_cache=False,
            bos_token_id=None,
            eos_token_id=None,
        )
    )


def cast_parameters(model: LlamaForCausalLM, dtype: torch.dtype) -> None:
    """Casts weights, and so gradients, but not buffers: bfloat16 would blur the rotary angles."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def attend_by_products(model: LlamaForCausalLM) -> None:
    """Lets a model hold the scores of whole sequences: in bfloat16 on a CPU, and for sequences of a
    few hundred tokens, a training step is then 1.4 times as fast as with torch's flash attention.
    """
    from transformers import AttentionInterface

    AttentionInterface.register("products", _attention)
    model.set_attn_implementation("products")


def _attention(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention of batch x heads x tokens x width, in the way that transformers calls it."""
    scores = (query * scaling) @ key.mT
    later = scores.new_full(scores.shape[-2:], float("-inf")).triu(1)
    return ((scores + later).softmax(-1) @ value).transpose(1, 2).contiguous(), None
