"""What else vLLM does with a prompt: adapters, drafts of several tokens that are verified at once, stores of keys."""

import json

import engines
import pytest
import torch
from engines import CONFIG, EXACT, THRESHOLD, agree, ask, of_answer, tokens
from installed import since
from safetensors.torch import save_file

RANK = 4
SPARSE = {**CONFIG, "segment_len": 256, "threshold": THRESHOLD}
STORED = 896
"""Of a prompt of 1,000 tokens, those in blocks that are full."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of rank 4, for queries, keys and values of all layers, as PEFT stores one."""
    directory = tmp_path_factory.mktemp("adapter")
    generator = torch.Generator().manual_seed(5)
    sizes = {"q_proj": 256, "k_proj": 128, "v_proj": 128}
    weights = {}
    for layer in range(3):
        for name, size in sizes.items():
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            weights[f"{at}.lora_A.weight"] = torch.randn(RANK, 128, generator=generator) * 0.2
            weights[f"{at}.lora_B.weight"] = torch.randn(size, RANK, generator=generator) * 0.2
    save_file(weights, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": [*sizes], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def test_adapters(llama, adapter, witness):
    """A prompt with one and without: on a GPU both in a batch, in which vLLM's CPU path gives the adapter to either."""
    from vllm.lora.request import LoRARequest

    # With adapters, vLLM has no log-probabilities of prompts on a CPU.
    asked = {"generated": 8, "prompt_logprobs": None}
    prompt, loras = tokens(600, 6), [None, LoRARequest("adapter", 1, str(adapter))]
    answers = []
    for s2o in (None, EXACT):
        with engines.engine(llama, s2o, enable_lora=True, max_loras=1, max_lora_rank=8) as llm:
            batches = [[lora] for lora in loras] if engines.CPU else [loras]
            answers.append([one for batch in batches for one in ask(llm, [prompt] * len(batch), lora=batch, **asked)])
    dense, sparse = answers
    assert (of_answer(dense[0]) - of_answer(dense[1])).abs().mean() > 0.1, "the adapter changes nothing"
    agree(sparse, dense)
    assert [step.query_lens for step in witness.take().batches] == [[600] * len(batch) for batch in batches]


@pytest.mark.xfail(
    engines.CPU and since("0.30") and not since("0.31"),
    reason="vLLM 0.30 fails to verify drafts on a CPU, without S2O too",
    raises=TypeError,
    strict=True,
)
def test_drafted_tokens_are_verified_dense(llama, witness):
    """Drafts are found in the prompt. Rows that verify them are short prefills on a long history."""
    prompts = [tokens(100, 8) * 6, tokens(70, 9) * 5]
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
    with engines.engine(llama, None) as llm:
        expected = ask(llm, prompts, generated=24, prompt_logprobs=None)
    # The config would have rows of a single query sparse.
    asked = {**EXACT, "min_query_len": 1}
    with engines.engine(llama, asked, speculative_config=drafts, disable_log_stats=False) as llm:
        got = ask(llm, prompts, generated=24, prompt_logprobs=None)
        figures = {metric.name: metric for metric in llm.get_metrics()}
    assert figures["vllm:spec_decode_num_draft_tokens"].value > 0, "nothing was drafted"
    agree(got, expected)
    assert {row.query_len for row in witness.take().rows} == {600, 350}


@pytest.mark.parametrize(
    ("prefills", "decodes"),
    [
        pytest.param(EXACT, None, id="dense", marks=pytest.mark.long),
        pytest.param(EXACT, EXACT, id="s2o"),
        pytest.param(SPARSE, SPARSE, id="sparse"),
    ],
)
def test_keys_and_values_from_another_engine(llama, tmp_path, witness, prefills, decodes):
    """One engine prefills with S2O and stores what it computed, another one goes on from there: of the same cuts, it
    computes the same."""
    prompt = tokens(1000, 10)
    store = {
        "kv_connector": "ExampleConnector", "kv_role": "kv_both",
        "kv_connector_extra_config": {"shared_storage_path": str(tmp_path / "store")},
    }  # fmt: skip
    options = {"kv_transfer_config": store, "max_num_batched_tokens": STORED}
    path = tmp_path / "mine.yaml"
    fields = {name: prefills[name] for name in ("min_seq_len", "min_query_len")}
    path.write_text(json.dumps(fields | {"params": {k: v for k, v in prefills.items() if k not in fields}}))
    with engines.engine(llama, {"config": str(path)}, **options) as llm:
        path.unlink()  # it was read
        (prefilled,) = ask(llm, [prompt], prompt_logprobs=None)
    assert (witness.take().density < 0.9) == (prefills is SPARSE)
    with engines.engine(llama, decodes, **options) as llm:
        (decoded,) = ask(llm, [prompt], prompt_logprobs=None)
    assert (prefilled.num_cached_tokens, decoded.num_cached_tokens) == (0, STORED)
    agree([decoded], [prefilled])
