"""A model that is worth a calibration, and one that takes seconds."""

from pathlib import Path

import causal_lm
import torch

TOKENS = 2048
TASK = {"texts": ("code",), "num_tokens": TOKENS, "min_seq_len": 512}
"""What `calibrate` is told beside the budget."""


def save(directory: Path) -> str:
    """A model whose queries look for the same keys everywhere, so that a ranking finds them; each layer more."""
    from transformers import AutoModelForCausalLM

    causal_lm.save(directory, "qwen2", max_position_embeddings=TOKENS)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for strength, layer in zip((1.0, 2.0, 4.0), model.model.layers, strict=True):
        projection = layer.self_attn.q_proj
        projection.weight.data *= 0.1
        torch.manual_seed(layer.self_attn.layer_idx)
        bias = strength * torch.randn(causal_lm.NUM_HEADS, 2, causal_lm.HEAD_SIZE // 2)
        bias[..., : causal_lm.HEAD_SIZE // 4] = 0  # what RoPE turns fast means another key at each distance
        projection.bias.data.copy_(bias.flatten())
    model.save_pretrained(directory)
    return str(directory)
