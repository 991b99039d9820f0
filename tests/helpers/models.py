"""Models of which there is no more than a config.json."""

import json
from pathlib import Path

SMOLLM2 = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    "max_position_embeddings": 8192, "dtype": "float32",
}  # fmt: skip


def write_smollm2(directory: Path, **changes) -> str:
    """SmolLM2-135M-Instruct's, in a directory that is made."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(SMOLLM2 | changes))
    return str(directory)
