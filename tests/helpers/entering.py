"""Requests that enter an engine, and what is decided of them."""

import functools

from vllm.pooling_params import PoolingParams
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.request import Request

from vllm_s2o.compat import requests
from vllm_s2o.plugin import admit, hash_for_stores


def request(extra=None, salt=None, pooling=False, **fields) -> EngineCoreRequest:
    params = PoolingParams(extra_kwargs=extra) if pooling else SamplingParams(extra_args=extra)
    kind = {"pooling_params": params, "sampling_params": None} if pooling else {"sampling_params": params}
    known = {
        "request_id": "a", "prompt_token_ids": list(range(64)), "mm_features": None, "pooling_params": None,
        "arrival_time": 0.0, "lora_request": None, "cache_salt": salt, "data_parallel_rank": None,
    }  # fmt: skip
    return EngineCoreRequest(**known | kind | fields)


@functools.cache
def _begin() -> None:
    """Once: what the first block's key begins with is drawn at random by older vLLM."""
    init_none_hash(sha256)


def hashes(entered: EngineCoreRequest) -> list[bytes]:
    """Keys of its blocks in vLLM's prefix cache, and in the stores that take these."""
    _begin()
    return Request.from_engine_core_request(entered, get_request_block_hasher(16, sha256)).block_hashes


def decided(config, **fields) -> EngineCoreRequest:
    entered = request(**fields)
    admit(config, entered, hash_for_stores(config))
    return entered


def carried(entered) -> str | None:
    return requests.mark_of(entered)
