"""Who computes the attention of a problem: S2O, and dense kernels beside it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from inputs import Problem

from vllm_s2o import S2OParams, attention


@dataclass
class S2O:
    """Everything that a step runs for one layer: order, ranking, both passes, stops. The plan of the step is made once
    for all layers, before."""

    problem: Problem
    params: S2OParams
    implementation: attention.Implementation = "auto"

    def __post_init__(self) -> None:
        problem, shape = self.problem, self.problem.shape
        self.num_rankings = self.params.num_rankings(shape.num_heads, shape.num_kv_heads)
        plan = attention.plan_step([problem.num_tokens], [problem.num_tokens], self.params, self.num_rankings)
        device = problem.query.device
        self.plan = attention.to_device(plan, device)
        buffers = self.plan.buffers(shape.head_size, self.params.num_classes)
        self.workspace = attention.allocate(buffers, device)
        (self.thresholds,) = attention.device_thresholds([(self.params, shape.num_heads)], device)
        self.out = torch.empty_like(problem.query, dtype=problem.value.dtype)

    def run(self) -> torch.Tensor:
        """[num_seqs, num_heads]: the pairs that were visited; the output is in `out`."""
        p = self.problem
        of_query, of_key, of_value = p.scales
        return attention.run(
            p.query, p.key_cache, p.value_cache, p.block_table, self.plan, self.params, p.scale * of_query * of_key,
            self.out, thresholds=self.thresholds, workspace=self.workspace, value_scale=of_value,
            implementation=self.implementation,
        )  # fmt: skip

    def rank(self) -> None:
        """The rankings alone, of all waves."""
        p = self.problem
        stage = attention.stages(self.implementation, p.query.device)
        for tables in self.plan.waves:
            stage.rank_keys(
                p.query, p.key_cache, p.block_table, tables.segments, tables.wave.num_slots, self.params.num_classes,
                max_history=tables.wave.max_history, groups=tables.groups, num_rankings=self.num_rankings,
                workspace=self.workspace,
            )  # fmt: skip

    @property
    def causal(self) -> int:
        return sum(self.plan.plan.causal_pairs) * self.problem.shape.num_heads

    def density(self) -> float:
        return self.run().sum().item() / self.causal


DEFAULTS = S2OParams()


def find_threshold(
    problem: Problem, density: float, params: S2OParams = DEFAULTS, tolerance: float = 0.01
) -> S2OParams:
    """`params` with a threshold whose stop rule visits this share of the causal pairs, within `tolerance` of it.

    Raises:
        ValueError: no threshold does.
    """
    low, high = 1e-5, 0.9
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        params = params.model_copy(update={"threshold": middle})
        found = S2O(problem, params).density()
        if abs(found / density - 1) <= tolerance:
            return params
        low, high = (middle, high) if found > density else (low, middle)
    raise ValueError(
        f"No threshold gives density {density} at {problem.num_tokens} tokens: {found} at {params.threshold}."
    )


def fa2(problem: Problem) -> Callable[[], torch.Tensor]:
    """FlashAttention-2, as PyTorch has it, on contiguous keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t.transpose(0, 1)[None] for t in (problem.query, problem.key, problem.value))

    def run() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out[0].transpose(0, 1)

    return run


def fa3(problem: Problem, paged: bool) -> Callable[[], torch.Tensor]:
    """FlashAttention-3, as vLLM has it, on the same pages or on contiguous keys and values."""
    from vllm.vllm_flash_attn import flash_attn_varlen_func

    tokens, device = problem.num_tokens, problem.query.device
    starts = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    where = dict(cu_seqlens_k=starts)
    if paged:
        where = dict(seqused_k=starts[1:], block_table=problem.block_table)
    key, value = (problem.key_cache, problem.value_cache) if paged else (problem.key, problem.value)
    if problem.exact is not None:
        for name, scale in zip(("q_descale", "k_descale", "v_descale"), problem.scales, strict=True):
            where[name] = torch.full((1, problem.shape.num_kv_heads), scale, device=device)
    return functools.partial(
        flash_attn_varlen_func, q=problem.query, k=key, v=value, max_seqlen_q=tokens, cu_seqlens_q=starts,
        max_seqlen_k=tokens, softmax_scale=problem.scale, causal=True, fa_version=3, **where,
    )  # fmt: skip


DENSE: dict[str, Callable[[Problem], Callable[[], torch.Tensor]]] = {
    "fa3_paged": functools.partial(fa3, paged=True),
    "fa3": functools.partial(fa3, paged=False),
    "fa2": fa2,
}
