"""Models whose config is asked for, and what a refusal must be like."""

import pytest

from vllm_s2o.config import ConfigError, ModelTraits, load_config

SMOLLM2 = ModelTraits("HuggingFaceTB/SmolLM2-135M-Instruct", "LlamaForCausalLM", 30, 9, 3, 64)
LLAMA = ModelTraits("meta-llama/Llama-3.1-8B-Instruct", "LlamaForCausalLM", 32, 32, 8, 128)
QWEN = ModelTraits("Qwen/Qwen3-8B", "Qwen3ForCausalLM", 36, 32, 8, 128)
OTHER = ModelTraits("someone/other", "OtherForCausalLM", 4, 8, 2, 64)

OPTION = '--additional-config "s2o"'


def refusal(additional=None, traits=OTHER, **kwargs) -> str:
    """The sentence, which must be one line and one sentence."""
    with pytest.raises(ConfigError) as caught:
        load_config(traits, additional, **kwargs)
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    assert sentence.endswith(".")
    assert "Input should" not in sentence, "pydantic's words"
    return sentence


def assert_names(sentence: str, *words: str) -> None:
    for word in words:
        assert word in sentence
