"""Architectures: which of their layers are sparse, why others are not, and that without skipping nothing changes."""

import re

import engines
import pytest
import torch
from engines import CONFIG, EXACT, agree, ask, tokens

PROMPTS = [tokens(700, 1), tokens(300, 2)]
WINDOW = 128
MODELS = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "qwen3_moe": {
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "gemma3_text": {
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 64,
    },
    "gemma2": {
        "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "query_pre_attn_scalar": 64, "attn_logit_softcapping": 50.0, "final_logit_softcapping": None,
    },
}  # fmt: skip
"""Further fields of each one's config."""
SPARSE_LAYERS = {"gemma3_text": 1, "gemma2": 0}
"""Of three, where that is not all."""
REASONS = {
    "gemma3_text": {("sliding window", "0"), ("sliding window", "1")},
    "gemma2": {("sliding window", "0"), ("logits soft cap", "1"), ("logits soft cap", "2")},
}


def reasons(told: list[str]) -> set[tuple[str, str]]:
    """Why layers are dense, and which. A line has those of one cache group: how layers are grouped is vLLM's matter."""
    found = (re.fullmatch(r"s2o: dense: (.*) \(layers (.*)\)", line) for line in told)
    return {(line[1], layer) for line in found if line for layer in line[2].split(",")}


LIKE_LLAMA = ("llama", "mistral", "qwen2")
"""Llama is what all other tests of engines run; what they say of it holds for these."""


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.long] * (kind in LIKE_LLAMA and engines.CPU)) for kind in MODELS]
)
def test_models(kind, tmp_path, witness, told):
    if kind == "qwen3_moe" and not engines.CPU:
        from vllm import _custom_ops  # noqa: F401, loads vLLM's kernels

        if not hasattr(torch.ops._moe_C, "topk_softmax"):
            pytest.skip("vLLM's kernels for experts, compiled for another torch, do not load here")
    model = engines.checkpoint(tmp_path / "model", kind, **MODELS[kind])
    with engines.engine(model, EXACT, max_num_batched_tokens=450) as llm:
        expected = ask(llm, PROMPTS, extra_args={"s2o": "dense"})
        assert not witness.take().rows
        got = ask(llm, PROMPTS)
    rounding = "experts" if kind == "qwen3_moe" and not engines.CPU else engines.dtype(kind)
    agree(got, expected, rounding)
    sparse = SPARSE_LAYERS.get(kind, 3)
    path = "the CPU path" if engines.CPU else r"kernels \(.*\)"
    line = rf"s2o: {sparse} of 3 attention layers take {path} for long prefills"
    assert any(re.fullmatch(line, one) for one in told), told
    assert reasons(told) == REASONS.get(kind, set())
    seen = witness.take()
    if not sparse:
        assert not seen.rows
        return
    assert seen.density == 1
    assert seen.rel_error <= engines.REL_ERRORS[engines.dtype(kind)]
    prefills = sum(len(step.sparse) for step in seen.batches)
    assert len(seen.rows) == sparse * prefills

    with engines.engine(model, {**CONFIG, "budget": 0.25}) as llm:
        ask(llm, PROMPTS)
    assert witness.take().density < 0.5
