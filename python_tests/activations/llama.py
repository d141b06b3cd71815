"""Tiny models of the LLaMA type, and what one saves, in bytes."""

import torch
import transformers

VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, HEADS = 61, 48, 104, 2, 4
BATCH, LENGTH = 2, 9
TOKENS = BATCH * LENGTH
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": HIDDEN // HEADS,
    "pad_token_id": 0,
}


def language_model(family="Llama", dtype=torch.bfloat16, seed=0, **options):
    """Of a family that transformers has, with random norms and biases, too."""
    torch.manual_seed(seed)
    kind = getattr(transformers, f"{family}ForCausalLM")
    model = kind(kind.config_class(**{**SIZES, **options}))
    with torch.no_grad():
        for param in model.parameters():
            if param.dim() == 1:
                param.add_(0.1 * torch.randn_like(param))
    return model.to(dtype)


def token_ids(seed=1):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH), generator=rng)


# In half precision, for a token. Of eager code: x in float32, 1 / rms, x / rms.
EAGER_NORM = 4 * HIDDEN + 4 + 2 * HIDDEN
LAYER = {
    "two norms": 2 * EAGER_NORM,
    "their outputs": 2 * 2 * HIDDEN,
    "q, k, v": 3 * 2 * HIDDEN,
    "attention's output": 2 * HIDDEN,
    "attention's log-sum-exp": 4 * HEADS,
    "gate, silu(gate), up, their product": 4 * 2 * INTERMEDIATE,
}
RECOMPUTED_LAYER = {
    "inputs of two norms": 2 * 2 * HIDDEN,
    "q, k, v": 3 * 2 * HIDDEN,
    "attention's output": 2 * HIDDEN,
    "attention's log-sum-exp": 4 * HEADS,
    "gate, up": 2 * 2 * INTERMEDIATE,
}
IDS = 8
# cos and sin of all places, which all layers and sequences share.
ROTATIONS = 2 * 2 * LENGTH * HIDDEN // HEADS
# log_softmax in float32, labels shifted by one; and how many labels there are.
LOSS, LABEL_COUNT = 4 * VOCABULARY + 8, 4


def whole(layer, last_norm_and_head):
    """Bytes of a language model with its loss, by those of a token in a layer and at the end."""
    token = IDS + LAYERS * sum(layer.values()) + last_norm_and_head + LOSS
    return TOKENS * token + ROTATIONS + LABEL_COUNT
