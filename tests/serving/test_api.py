"""The OpenAI API, with the flag: short prompts, which stay dense, and long ones, which do not."""

import pytest
from serving import MODEL_NAME

from vllm_s2o.quality.needles import needle
from vllm_s2o.step_log import prefills

pytestmark = pytest.mark.serving

FACT = "The capital of France is"


def test_completion(s2o):
    answer = s2o.client.completions.create(model=MODEL_NAME, prompt=FACT, max_tokens=8, temperature=0)
    assert "Paris" in answer.choices[0].text
    assert answer.usage.completion_tokens == 8


def chat(server, prompt, **options):
    messages = [{"role": "user", "content": prompt}]
    return server.client.chat.completions.create(model=MODEL_NAME, messages=messages, temperature=0, **options)


def test_chat_ends_by_itself(s2o, count_tokens):
    asked = needle(600, 0.5, 3, count_tokens)
    answer = chat(s2o, asked.prompt, max_tokens=100)
    assert asked.number in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


def test_a_short_chat_is_answered_as_without_the_flag(s2o, dense):
    answers = [chat(server, "What is the capital of France?", max_tokens=30) for server in (s2o, dense)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


@pytest.mark.parametrize("num_tokens", [60, pytest.param(2100, marks=pytest.mark.long)], ids=["short", "long"])
def test_stream_equals_whole_answer(s2o, count_tokens, num_tokens):
    request = dict(
        model=MODEL_NAME,
        messages=[{"role": "user", "content": needle(num_tokens, 0.5, 5, count_tokens).prompt}],
        max_tokens=16,
        temperature=0,
    )
    whole = s2o.client.chat.completions.create(**request).choices[0].message.content
    chunks = [c.choices[0].delta.content or "" for c in s2o.client.chat.completions.create(**request, stream=True)]
    assert "".join(chunks) == whole
    assert len(chunks) > 2


def test_several_at_once(s2o):
    answer = s2o.client.completions.create(model=MODEL_NAME, prompt=[FACT, FACT, FACT], max_tokens=4, temperature=0)
    texts = [choice.text for choice in answer.choices]
    assert len(texts) == 3
    assert len(set(texts)) == 1


def test_short_prompts_stay_dense(s2o):
    before = len(prefills(s2o.log))
    s2o.ask("Hello!")
    assert len(prefills(s2o.log)) == before
