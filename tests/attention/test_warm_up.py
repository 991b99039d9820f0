"""What is compiled and tried before the first request, and what comes of it where that fails."""

import re
from types import SimpleNamespace

import pytest
import torch
import triton
from cases import DEVICE
from triton.runtime.errors import OutOfResources

from vllm_s2o import S2OParams, attention, warm_up
from vllm_s2o.kernels import naive
from vllm_s2o.kernels.common import FP8

SPARSE = S2OParams(dense_tail=0, threshold=0.05, segment_len=64, tile_size=32, key_block=16)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """What a process has compiled, it does not compile again."""
    monkeypatch.setattr(warm_up, "_warmed", [])
    warm_up.warm_up.cache_clear()
    yield
    warm_up.warm_up.cache_clear()


def dense(query, keys, values, block_table, plan, params, scale, out):
    """What `attention.run` should give."""
    starts, lens = (torch.tensor(numbers, device=DEVICE) for numbers in ([0, len(query)], [3 * params.segment_len]))
    out.copy_(naive.dense_attention(query, keys, values, block_table, starts, lens, scale))


def warm(num_heads: int = 4, head_size: int = 16, params: S2OParams = SPARSE, **dtypes) -> str | None:
    return warm_up.warm_up(num_heads, (16, 2, head_size), torch.float32, DEVICE, params, **dtypes)


class Kernels:
    """With some in Gluon, until they are given up."""

    reason: str | None = None

    def uses_gluon(self) -> bool:
        return self.reason is None

    def give_up(self, reason: str) -> None:
        self.reason = reason


WARM = {
    "default": S2OParams(),
    "thresholds of all ranks": S2OParams(dense_tail=0, threshold=(0.1,) * 8),
    "a ranking for each KV head": S2OParams(ranking="kv_head"),
    "a budget": S2OParams(budget=0.1),
}


@pytest.mark.parametrize("params", WARM.values(), ids=WARM)
def test_every_kernel_runs_and_is_right(params, monkeypatch):
    """On the kernels themselves: scores of one segment and of several, and on a GPU nothing is left to compile."""
    kernels = attention.stages("triton", DEVICE)
    for module in (attention, warm_up):
        monkeypatch.setattr(module, "stages", lambda *_: kernels)
    assert warm(params=params) is None


@pytest.mark.skipif(DEVICE.type == "cpu", reason="caches in fp8 run on a GPU")
@pytest.mark.parametrize("head_size", [32, 64, 128, 256])
def test_so_it_is_in_other_types(head_size):
    for num_heads, dtype in ((2, torch.bfloat16), (8, torch.float16)):
        given = (num_heads, (16, 2, head_size), dtype, DEVICE, S2OParams())
        assert warm_up.warm_up(*given) is warm_up.warm_up(*given, FP8, FP8) is None


def test_a_gpu_that_is_too_small_is_a_reason(monkeypatch):
    def run(*_):
        raise OutOfResources(147456, 101376, "shared memory")

    monkeypatch.setattr(warm_up, "run", run)
    monkeypatch.setattr(warm_up, "stages", lambda *_: SimpleNamespace())
    reason = warm(head_size=256)
    assert "head size 256" in reason
    assert "needs 147456 of shared memory, this GPU has 101376" in reason


@pytest.mark.parametrize("wrong", [False, True])
def test_kernels_in_gluon_that_do_not_work_are_given_up(wrong, monkeypatch):
    """And what was compiled before with them is compiled again without."""
    kernels, compiled = Kernels(), []

    def run(query, *rest):
        compiled.append((query.shape[1], kernels.uses_gluon()))
        dense(query, *rest)
        if kernels.uses_gluon() and query.shape[1] == 6:
            if not wrong:
                raise RuntimeError("PassManager::run failed")
            rest[-1][7, 5] = 0

    monkeypatch.setattr(warm_up, "run", run)
    monkeypatch.setattr(warm_up, "stages", lambda *_: kernels)
    assert [warm(num_heads) for num_heads in (4, 6)] == [None, None]
    expected = (
        r"here they are \d+% off dense attention in a test of 96 tokens"
        if wrong
        else r"they do not compile here \(Ru.*"
    )
    assert re.fullmatch(expected, kernels.reason)
    assert {(4, True), (4, False), (6, False)} <= set(compiled)


SPOILED = {
    "a row": lambda out: out[20].zero_(),
    "a row of a head": lambda out: out[20, 1].zero_(),
    "a head": lambda out: out[:, 2].copy_(out[:, 1].clone()),
    "a number that is not one": lambda out: out[3, 1, 4].fill_(torch.nan),
    "what was never written": lambda out: out[-1].fill_(torch.nan),
    "everything": lambda out: out.mul_(1.1),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_kernels_that_are_wrong_are_a_reason(spoil, monkeypatch):
    def run(*given):
        dense(*given)
        spoil(given[-1])

    monkeypatch.setattr(warm_up, "run", run)
    monkeypatch.setattr(warm_up, "stages", lambda *_: SimpleNamespace())
    reason = warm()
    assert re.search(
        r"^head size 16 with tile_size=32 and key_block=16 is \S+ off dense attention in a test of 96", reason
    )
    assert f"Triton {triton.__version__} or this GPU computes the kernels wrongly" in reason


def test_rounding_is_no_reason(monkeypatch):
    def run(*given):
        dense(*given)
        given[-1].copy_(given[-1].bfloat16())

    monkeypatch.setattr(warm_up, "run", run)
    monkeypatch.setattr(warm_up, "stages", lambda *_: SimpleNamespace())
    assert warm() is None


def test_memory_that_is_short_is_no_reason_to_give_up(monkeypatch):
    def run(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    kernels = Kernels()
    monkeypatch.setattr(warm_up, "run", run)
    monkeypatch.setattr(warm_up, "stages", lambda *_: kernels)
    with pytest.raises(torch.OutOfMemoryError):
        warm()
    assert kernels.uses_gluon()


def test_the_numbers_of_a_program_stay_its_own():
    """vLLM samples with PyTorch's generators."""
    before = torch.get_rng_state()
    assert warm() is None
    assert torch.equal(torch.get_rng_state(), before)
