"""Architectures: which of their layers are sparse, why others are not, and that without skipping nothing changes."""

import engines
import pytest
import torch
from engines import CONFIG, EXACT, TOLERANCE, ask, of_answer, of_prompt, tokens

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
# On a CPU each layer of models with windows has a cache group of its own.
REASONS = {
    "gemma3_text": ["s2o: dense: sliding window (layers 0)", "s2o: dense: sliding window (layers 1)"],
    "gemma2": [
        "s2o: dense: sliding window (layers 0)",
        "s2o: dense: logits soft cap (layers 1)",
        "s2o: dense: logits soft cap (layers 2)",
    ],
}


@pytest.mark.parametrize("kind", MODELS)
def test_models(kind, tmp_path, witness, told):
    model = engines.checkpoint(tmp_path / "model", kind, **MODELS[kind])
    with engines.engine(model, EXACT, max_num_batched_tokens=450) as llm:
        expected = ask(llm, PROMPTS, extra_args={"s2o": "dense"})
        assert not witness.take().rows
        got = ask(llm, PROMPTS)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(of_prompt(ours), of_prompt(theirs), atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(of_answer(ours), of_answer(theirs), atol=TOLERANCE, rtol=0)
    sparse = SPARSE_LAYERS.get(kind, 3)
    assert f"s2o: {sparse} of 3 attention layers take the CPU path for long prefills" in told
    assert [line for line in told if "(layers" in line] == REASONS.get(kind, [])
    seen = witness.take()
    if not sparse:
        assert not seen.rows
        return
    assert seen.density == 1
    prefills = sum(len(step.sparse) for step in seen.batches)
    assert len(seen.rows) == sparse * prefills

    with engines.engine(model, {**CONFIG, "budget": 0.25}) as llm:
        ask(llm, PROMPTS)
    assert witness.take().density < 0.5
