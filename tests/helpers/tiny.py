"""Real vLLM objects of a model that is too small to be of use: no weights, no tokenizer, no server."""

import json
import os
from pathlib import Path
from unittest.mock import patch

import torch
from models import inspected_here
from vllm.config import AttentionConfig, CacheConfig, ModelConfig, SpeculativeConfig, VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

PAGE = 128
NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 4, 2, 64


def model_config(directory: Path, dtype: str = "float32", **fields) -> ModelConfig:
    """A Llama of three layers; `fields` go to its config.json."""
    known = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": NUM_HEADS * HEAD_SIZE,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": NUM_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_SIZE,
        "vocab_size": 128,
        "max_position_embeddings": 2048,
    }
    (directory / "config.json").write_text(json.dumps(known | fields))
    with inspected_here():
        return ModelConfig(model=str(directory), skip_tokenizer_init=True, dtype=dtype, max_model_len=1024)


def vllm_config(model: ModelConfig, backend: str | None = "CUSTOM", **s2o) -> VllmConfig:
    """What the flag and --additional-config make of it."""
    with patch.dict(os.environ):  # on a CPU, vLLM sets variables for the processes that it is about to start
        return VllmConfig(
            model_config=model,
            cache_config=CacheConfig(block_size=PAGE),
            attention_config=AttentionConfig(backend=backend),
            additional_config={"s2o": s2o} if s2o else {},
        )


def speculative_config(config: VllmConfig, num_tokens: int) -> SpeculativeConfig:
    """A drafter that needs no model."""
    return SpeculativeConfig(
        method="ngram",
        num_speculative_tokens=num_tokens,
        target_model_config=config.model_config,
        target_parallel_config=config.parallel_config,
    )


def common_metadata(
    query_lens: list[int], seq_lens: list[int], block_table: torch.Tensor, slot_mapping: torch.Tensor, **fields
) -> CommonAttentionMetadata:
    """What vLLM's model runner tells the metadata builders of a step."""
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    lens = torch.tensor(seq_lens, dtype=torch.int32)
    known = {
        "query_start_loc": starts,
        "query_start_loc_cpu": starts,
        "seq_lens": lens,
        "seq_lens_cpu_upper_bound": lens,
        "num_reqs": len(query_lens),
        "num_actual_tokens": sum(query_lens),
        "max_query_len": max(query_lens),
        "max_seq_len": max(seq_lens),
        "block_table_tensor": block_table,
        "slot_mapping": slot_mapping,
    }
    return CommonAttentionMetadata(**known | fields)
