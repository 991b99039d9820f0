"""A tokenizer of single bytes, with a chat template, and a checkpoint that has it."""

import json

import causal_lm
import pytest

from vllm_s2o.quality.tasks.prompt import Framing

CONTEXT = 8192
TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    directory = causal_lm.save(tmp_path_factory.mktemp("llama"), max_position_embeddings=CONTEXT)
    for name, more in {
        "tokenizer_config.json": {"chat_template": TEMPLATE},
        "tokenizer.json": {"decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}},
    }.items():
        path = directory / name
        path.write_text(json.dumps(json.loads(path.read_text()) | more))
    return str(directory)


@pytest.fixture(scope="session")
def tokenizer(checkpoint):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(checkpoint)


@pytest.fixture(scope="session")
def framing(tokenizer) -> Framing:
    return Framing(tokenizer)
