"""Causal LMs of transformers with random weights, too small to be of use, and a tokenizer of single bytes."""

from pathlib import Path

import torch

NUM_LAYERS, NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 3, 4, 2, 64
CONTEXT = 512


def make(kind: str = "llama", **fields):
    """A model in float32; `fields` go to its config.

    Args:
        kind: transformers' name of an architecture, such as "llama" or "qwen3".
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    known = {
        "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS, "head_dim": HEAD_SIZE, "vocab_size": 256,
        "max_position_embeddings": CONTEXT, "initializer_range": 0.2,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **known | fields)).eval()


def save(directory: Path, kind: str = "llama", **fields) -> Path:
    """A checkpoint with weights and tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    make(kind, **fields).save_pretrained(directory)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(dict(zip(alphabet, range(256), strict=True)), []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory
