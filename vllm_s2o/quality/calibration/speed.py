"""What S2O's parts cost in time, as far as a choice depends on it: figures of Hopper GPUs (benchmarks/lab.md)."""

from vllm_s2o.config import ModelTraits, S2OParams

KEYS_COST = 0.003
"""Of the causal pairs, what reading the keys costs, however many rankings of them are made, at segments of 512. Twice
the segments, twice that."""

RANKING_COST = 0.005
"""And each ranking of a KV head's keys: one, or as many as query heads share the keys. Together, on an H200 with four
heads to a KV head, 0.013 and 0.027 of the pairs at 32,768 tokens, 0.006 and 0.022 at 131,072 (attention-h200.csv)."""

SPARSE_PAIR = 1.4
"""Time of a visited pair in that of a pair of dense attention: 600 TFLOP/s against 430 on an H100."""

LAUNCH = 0.4e-3 * 600e12
"""Operations that dense attention would do while S2O's kernels start, of which short prompts are full."""


def ranking_cost(params: S2OParams, traits: ModelTraits) -> float:
    """Of the causal pairs, what the rankings of a long prompt cost."""
    rankings = params.num_rankings(traits.num_heads, traits.num_kv_heads) / traits.num_kv_heads
    return (KEYS_COST + RANKING_COST * rankings) * 512 / params.segment_len


def shortest(traits: ModelTraits, density: float, num_tokens: int, params: S2OParams) -> int:
    """The shortest prompt, in powers of two, that S2O should take less time for than dense attention on an H100.

    A tile visits about as many keys of a short history as of a long one: what is a share of the pairs at `num_tokens`
    is a larger one of fewer. That is an estimate: at 50 / 30 / 20 % of 4,096 / 8,192 / 16,384 tokens S2O took 2.7 /
    0.70 / 0.39 of the time of FlashAttention-3 (Llama-3.1-8B's shape, a ranking for each KV head).
    """
    for exponent in range(10, 20):
        tokens = 2**exponent
        share = min(1.0, density * num_tokens / tokens) + ranking_cost(params, traits)
        dense = 2 * traits.num_heads * traits.head_size * tokens**2  # operations: half of the pairs, two products
        if share * SPARSE_PAIR * dense + LAUNCH < dense:
            return tokens
    return 2**20


def capped(estimate: int, context: int, segment_len: int) -> tuple[int, str | None]:
    """What `shortest` estimates, but no more than a quarter of the model's context, and that it was capped, in a
    sentence.

    Beyond the context no prompt would ever be sparse. How much S2O gains on other machines is for `vllm-s2o bench` to
    say. Of fewer tokens than two segments hold, nothing can be left out.
    """
    most = max(context // 4, 2 * segment_len)
    if estimate <= most:
        return estimate, None
    return most, (
        f"For an H100 min_seq_len was estimated as {estimate}; it is capped at {most}, for the model's context ends at "
        f"{context} tokens."
    )
