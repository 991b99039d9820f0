"""What `prefill_attention` refuses, each in one sentence."""

import torch

from vllm_s2o.config import S2OParams

MAX_SEQ_LEN = 2**24 - 1
"""Tokens of a sequence: the kernels count a tile's pairs, 128 rows of it at most, in 32 bits."""

MAX_ROW_STRIDE = 2**24
"""Elements from one token's row of query or out to the next: a tile's 128 rows lie within 2^31."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"prefill_attention: {message}")


def check(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, block_table: torch.Tensor,
    query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, key_scale: float, value_scale: float,
    out: torch.Tensor | None,
) -> None:  # fmt: skip
    require(query.dim() == 3, f"query must be [num_tokens, num_heads, head_size], got {list(query.shape)}")
    require(
        key_cache.dim() == 4 and key_cache.shape == value_cache.shape,
        "key_cache and value_cache must both be [num_blocks, block_size, num_kv_heads, head_size], "
        f"got {list(key_cache.shape)} and {list(value_cache.shape)}",
    )
    num_heads, head_size = query.shape[1:]
    num_kv_heads = key_cache.shape[2]
    require(scale > 0, f"scale must be above 0, got {scale}")
    require(
        head_size == key_cache.shape[3], f"head_size differs: {head_size} in query, {key_cache.shape[3]} in the caches"
    )
    require(
        num_kv_heads > 0 and num_heads % num_kv_heads == 0,
        f"the {num_heads} query heads must be a multiple of the {num_kv_heads} KV heads",
    )
    require(
        query.dtype in DTYPES
        and key_cache.dtype == value_cache.dtype
        and key_cache.dtype in (query.dtype, torch.float8_e4m3fn),
        "query, key_cache and value_cache must share one dtype of bfloat16, float16 and float32, or both caches be "
        f"float8_e4m3fn, got {query.dtype}, {key_cache.dtype} and {value_cache.dtype}",
    )
    for name, factor in (("key_scale", key_scale), ("value_scale", value_scale)):
        require(factor > 0, f"{name} must be above 0, got {factor}")
        require(
            factor == 1 or key_cache.dtype == torch.float8_e4m3fn,
            f"{name} is for fp8 caches, got {factor} beside {key_cache.dtype}",
        )
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        reach = max((cache.shape[1] - 1) * cache.stride(1), (head_size - 1) * cache.stride(3))
        require(reach < 2**31, f"{name}'s strides reach {reach} elements within a block, supported are 2^31 - 1")
    tokens = key_cache.shape[0] * key_cache.shape[1]
    require(tokens < 2**31, f"the caches hold {tokens} tokens, supported are 2^31 - 1")
    num_seqs = seq_lens.shape[0]
    for name, tensor, shape in (
        ("block_table", block_table, (num_seqs, None)),
        ("query_start_loc", query_start_loc, (num_seqs + 1,)),
        ("seq_lens", seq_lens, (num_seqs,)),
    ):
        fits = tensor.dim() == len(shape) and all(s in (None, t) for s, t in zip(shape, tensor.shape, strict=True))
        wanted = str(list(shape)).replace("None", "max_blocks")
        require(
            fits and tensor.dtype == torch.int32,
            f"{name} must be int32 {wanted}, got {tensor.dtype} {list(tensor.shape)}",
        )
    for name, given in (
        ("key_cache", key_cache), ("value_cache", value_cache), ("block_table", block_table),
        ("query_start_loc", query_start_loc), ("seq_lens", seq_lens), ("out", out),
    ):  # fmt: skip
        require(
            given is None or given.device == query.device,
            f"{name} must be on the query's device {query.device}, got {getattr(given, 'device', None)}",
        )
    if out is not None:
        require(
            out.shape == query.shape and out.dtype == query.dtype,
            f"out must be {query.dtype} {list(query.shape)} like query, got {out.dtype} {list(out.shape)}",
        )
        require(out.stride(-1) == 1, f"out's last dimension must be dense, its stride is {out.stride(-1)}")
        require(
            out.stride(0) < MAX_ROW_STRIDE,
            f"out's rows lie {out.stride(0)} elements apart, supported are less than {MAX_ROW_STRIDE}",
        )


def check_params(params: S2OParams, num_heads: int) -> None:
    require(isinstance(params, S2OParams), f"params must be an S2OParams, got {type(params).__name__}")
    # A copy of a model with other values is not validated, and kernels count on this.
    require(
        params.segment_len % params.tile_size == 0,
        f"segment_len={params.segment_len} must be a multiple of tile_size={params.tile_size}",
    )
    try:
        params.thresholds(num_heads)
    except ValueError as error:
        require(False, str(error))


def check_lengths(starts: list[int], query_lens: list[int], lens: list[int], num_tokens: int, capacity: int) -> None:
    require(
        starts[0] == 0 and starts[-1] == num_tokens and all(n >= 0 for n in query_lens),
        f"query_start_loc must ascend from 0 to the {num_tokens} rows of query, got {starts}",
    )
    for seq, (query_len, seq_len) in enumerate(zip(query_lens, lens, strict=True)):
        require(
            query_len <= seq_len <= capacity,
            f"sequence {seq} has {query_len} queries and length {seq_len}: the length must lie between the queries "
            f"and the {capacity} tokens that its row of block_table holds",
        )
        require(seq_len <= MAX_SEQ_LEN, f"sequence {seq} has length {seq_len}, supported are {MAX_SEQ_LEN}")


def longest_ranked(num_rankings: int) -> int:
    """Tokens of a sequence up to which its rankings' places fit 32 bits."""
    return min(MAX_SEQ_LEN, (2**31 - 1) // num_rankings)


def check_rankings(longest: int, num_rankings: int) -> None:
    most = longest_ranked(num_rankings)
    require(
        longest <= most, f"a sequence has length {longest}, supported are {most} with {num_rankings} rankings of each"
    )
