"""What the benchmarks of whole servers share: their flags, models without weights, and what a log tells."""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from vllm_s2o.cli.server import Server
from vllm_s2o.step_log import pairs

FLAG = ("--attention-backend", "CUSTOM")
PROVIDERS = {
    "s2o": [*FLAG],
    # Random weights attend to everything alike: a fixed share of the history shows what sparse prefill would cost.
    # Every layer visits it where the model's file keeps none dense, as Llama's does; no override here undoes a file's.
    "s2o_budget_10": [*FLAG, "--additional-config", '{"s2o": {"budget": 0.1}}'],
    "s2o_budget_10_kv_head": [*FLAG, "--additional-config", '{"s2o": {"budget": 0.1, "ranking": "kv_head"}}'],
    "flash_attn": ["--attention-backend", "FLASH_ATTN"],
}
DEFAULT = ("s2o", "s2o_budget_10", "flash_attn")
CPU = {"VLLM_CPU_KVCACHE_SPACE": "2"}
START_SECONDS = 400


def whole(text: str) -> int:
    """For argparse."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def serve(model: str, log: Path, args: list[str]) -> Server:
    return Server(model, log, args, CPU, name="model", start_seconds=START_SECONDS)


def our_lines(log: str) -> list[str]:
    """What the plugin says in a log, without vLLM's prefix; steps are summarised elsewhere."""
    said = ["s2o: " + line.partition("s2o: ")[2] for line in log.splitlines() if "s2o: " in line]
    return list(dict.fromkeys(line for line in said if not line.startswith("s2o: prefill")))


def compiled_while_serving(log: str) -> list[str]:
    """Warnings of vLLM's monitor for kernels compiled during inference; 0.25.1 has it too."""
    return [line for line in log.splitlines() if " during inference: " in line]


def step_tokens(log: str) -> int | None:
    """The most tokens that one step of an engine takes, and so the chunks of a long prompt; None where vLLM does not
    say. Its default differs between servers and engines without one."""
    found = re.search(r"Chunked prefill is enabled with max_num_batched_tokens=(\d+)", log)
    return int(found[1]) if found else None


def density(log: str, before: int = 0) -> float | None:
    """Of all steps that a log tells of after its first `before` characters; None where there is none."""
    visited, causal = pairs(log, before)
    return round(visited / causal, 3) if causal else None


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
    # Next to nothing to compute: for thousands of requests on a CPU.
    "tiny": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "hidden_size": 256,
        "intermediate_size": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "torch_dtype": "bfloat16",
    },
}

# Twice the context, by twice the factor: no such model was released, and nothing but its dimensions counts here.
SHAPES["llama-3.1-8b-256k"] = SHAPES["llama-3.1-8b"] | {
    "max_position_embeddings": 262144,
    "rope_scaling": SHAPES["llama-3.1-8b"]["rope_scaling"] | {"factor": 16.0},
}


def write_shape(shape: str, tokenizer_from: Path, directory: Path) -> Path:
    """A checkpoint directory without weights: a config, and the tokenizer of another model."""
    needed = [tokenizer_from / name for name in ("tokenizer.json", "tokenizer_config.json")]
    missing = [str(path) for path in needed if not path.is_file()]
    if missing:
        sys.exit(f"serving.py: --shape takes the tokenizer of MODEL, which has no {missing[0]}.")
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(SHAPES[shape]))
    shutil.copy(needed[0], directory)
    settings = json.loads(needed[1].read_text())
    settings.pop("model_max_length", None)  # the other model's context
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def model_and_args(model: str, shape: str | None, more: list[str], scratch: Path) -> tuple[str, list[str]]:
    """What is served, and the arguments that every provider's engine gets."""
    # Else the warm-up's prompt would be served from the cache when it is asked again.
    args = ["--no-enable-prefix-caching", *more]
    if shape is None:
        return model, args
    return str(write_shape(shape, Path(model), scratch / shape)), ["--load-format", "dummy", *args]


def room(tokens: int, output: int, shape: str | None) -> int:
    """Tokens of a prompt whose answer fits in as well: the model's longest sequence holds both."""
    return min(tokens, SHAPES[shape]["max_position_embeddings"] - output) if shape else tokens
