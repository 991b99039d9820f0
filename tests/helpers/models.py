"""Models of which there is no more than a config.json."""

import json
from pathlib import Path
from unittest.mock import patch

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


def inspected_here():
    """Within this, vLLM looks at models' classes in this process. It would take another one, so that CUDA is not begun
    too early, which takes ten seconds for each class that its cache on disk does not know yet."""
    return patch("vllm.model_executor.models.registry._run_in_subprocess", lambda look: look())
