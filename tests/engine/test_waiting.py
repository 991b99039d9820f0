"""On a GPU: nothing that S2O does in an engine's step waits for the device."""

import functools

import engines
import pytest
import torch
from engines import CONFIG, THRESHOLD, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(engines.CPU, reason="a CPU computes in turn")]


def never_waiting(function, calls: list[str]):
    """Raises where the function would wait, be it for a number or for a copy."""

    @functools.wraps(function)
    def watched(*args, **kwargs):
        calls.append(function.__name__)
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode(before)

    return watched


def test_no_step_waits(llama, monkeypatch):
    """Plans, layers and what is told of them: long prefills and chunks, beside dense rows too, with a dense end."""
    from vllm_s2o import backend

    prompts = [tokens(1100, 1), tokens(40, 2), tokens(400, 3)]
    calls: list[str] = []
    config = {**CONFIG, "threshold": THRESHOLD, "dense_tail": 64, "layers": [{"layers": 1, "threshold": "dense"}]}
    with engines.engine(llama, config, max_num_batched_tokens=512) as llm:
        engines.ask(llm, prompts)  # what is done once may wait
        for owner, name in (
            (backend.S2OMetadataBuilder, "build"), (backend.S2OImpl, "forward"), (backend.reporter, "finish"),
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, never_waiting(getattr(owner, name), calls))
        engines.ask(llm, [tokens(len(prompt), 9) for prompt in prompts])
    assert {"build", "forward", "finish"} == set(calls)


def test_what_waits_is_seen():
    number = torch.ones(1, device="cuda")
    with pytest.raises(RuntimeError, match="synchroniz"):
        never_waiting(number.item, [])()
