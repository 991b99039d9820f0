"""What is compiled and tried before the first request, and what comes of it where that fails."""

import re

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
    """Rankings are the oracle's."""

    def rank_keys(self, *given, max_history, groups, num_rankings):
        return naive.rank_keys(*given, num_rankings=num_rankings)


class WithGluon(Kernels):
    """Some of them, until they are given up."""

    reason: str | None = None

    def uses_gluon(self) -> bool:
        return self.reason is None

    def give_up(self, reason: str | None) -> None:
        self.reason = reason


@pytest.fixture
def use(monkeypatch):
    """Instead of what a device has: `attention.run`, and kernels."""

    def use(run, kernels=None):
        monkeypatch.setattr(warm_up, "run", run)
        monkeypatch.setattr(warm_up, "stages", lambda *_: kernels or Kernels())

    return use


@pytest.fixture
def triton_kernels(monkeypatch):
    """Those of every device, in Triton's interpreter without a GPU."""
    kernels = attention.stages("triton", DEVICE)
    for module in (attention, warm_up):
        monkeypatch.setattr(module, "stages", lambda *_: kernels)


WARM = {
    "default": S2OParams(),
    "thresholds of all ranks": S2OParams(dense_tail=0, threshold=(0.1,) * 8),
    "a ranking for each KV head": S2OParams(ranking="kv_head"),
    "a budget": S2OParams(budget=0.1),
}


@pytest.mark.parametrize("params", WARM.values(), ids=WARM)
def test_every_kernel_runs_and_is_right(params, triton_kernels):
    """On the kernels themselves: scores of one segment and of several, and on a GPU nothing is left to compile."""
    assert warm(params=params) is None


LONG = [pytest.mark.long] * (DEVICE.type == "cpu")
"""Ten seconds each in the interpreter."""


@pytest.mark.parametrize("head_size", [72, *(pytest.param(size, marks=LONG) for size in (32, 64, 128, 256))])
def test_so_it_is_in_other_types(head_size, triton_kernels):
    """Heads of 72 are tried as they lie before vLLM 0.26, too. Triton's interpreter knows no bfloat16."""
    for num_heads, dtype in ((2, torch.float32 if DEVICE.type == "cpu" else torch.bfloat16), (8, torch.float16)):
        given = (num_heads, (16, 2, head_size), dtype, DEVICE, SPARSE)
        assert warm_up.warm_up(*given) is warm_up.warm_up(*given, FP8, FP8) is None


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("head_size", [32, 64, 72, 128, 256])
def test_so_are_those_that_a_gpu_prefers(head_size):
    for num_heads, dtype in ((2, torch.bfloat16), (8, torch.float16)):
        given = (num_heads, (16, 2, head_size), dtype, DEVICE, S2OParams())
        assert warm_up.warm_up(*given) is warm_up.warm_up(*given, FP8, FP8) is None


def test_a_gpu_that_is_too_small_is_a_reason(use):
    def run(*_):
        raise OutOfResources(147456, 101376, "shared memory")

    use(run)
    reason = warm(head_size=256)
    assert reason == (
        "head size 256 with tile_size=32 and key_block=16 needs 147456 of shared memory, this GPU has 101376"
    )


def fails(error: bool, out) -> None:
    if error:
        raise RuntimeError("PassManager::run failed")
    out[7, 1] = 0


@pytest.mark.parametrize("error", [False, True])
def test_kernels_in_gluon_that_do_not_work_are_given_up(error, use):
    """And what was compiled before with them is compiled again without."""
    kernels, compiled = WithGluon(), []

    def run(query, *rest):
        compiled.append((query.shape[1], kernels.uses_gluon()))
        dense(query, *rest)
        if kernels.uses_gluon() and query.shape[1] == 6:
            fails(error, rest[-1])

    use(run, kernels)
    assert [warm(num_heads) for num_heads in (4, 6)] == [None, None]
    said = "not compiled (RuntimeError)" if error else "100% off dense attention in a trial of 96 tokens"
    assert kernels.reason == f"here they are {said}"
    assert {(4, True), (4, False), (6, False)} <= set(compiled)


@pytest.mark.parametrize("error", [False, True])
@pytest.mark.parametrize("worse", [4, 6])
def test_kernels_in_gluon_stay_where_others_do_no_better(worse, error, use):
    """Layers that have them already keep them, and those with which they do not work are dense."""
    kernels = WithGluon()

    def run(query, *rest):
        dense(query, *rest)
        if kernels.uses_gluon() and query.shape[1] == 6:
            fails(error, rest[-1])
        if not kernels.uses_gluon() and query.shape[1] == worse:
            rest[-1][3] = 0

    use(run, kernels)
    assert warm(4) is None
    reason = warm(6)
    assert reason.startswith("head size 16 with tile_size=32 and key_block=16")
    other = "not compiled (RuntimeError)" if error else "100% off dense attention in a trial of 96 tokens"
    ends = f": the kernels in Gluon are {other}, and other layers cannot do without them"
    assert reason.endswith(ends if worse == 4 else "or this GPU computes the kernels wrongly")
    assert kernels.uses_gluon()
    assert warm(4) is None and warm(6) == reason, "asked again"


SPOILED = {
    "a row of a head": lambda out: out[-1, 1].zero_(),
    "the first row": lambda out: out[0].mul_(1.1),
    "a head": lambda out: out[:, 2].copy_(out[:, 1].clone()),
    "a number that is not one": lambda out: out[3, 1, 4].fill_(torch.nan),
    "what was never written": lambda out: out[-1].fill_(torch.nan),
    "everything": lambda out: out.mul_(1.06),
}


@pytest.mark.parametrize("cache", [None, FP8], ids=str)
@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_kernels_that_are_wrong_are_a_reason(spoil, cache, use):
    def run(*given):
        dense(*given)
        spoil(given[-1])

    use(run)
    params = S2OParams()
    reason = warm(32, 128, params, query_dtype=cache, cache_dtype=cache)
    sizes = f"head size 128 with tile_size={params.tile_size} and key_block={params.key_block}"
    assert re.match(rf"{sizes} is \S+ off dense attention in a trial of {3 * params.tile_size} tokens: ", reason)
    assert reason.endswith(f"Triton {triton.__version__} or this GPU computes the kernels wrongly")


def other_way(ranked: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return ranked.flip(0)


def as_they_stand(ranked: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return ranked.sort().values


def of_another(ranked: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    return slots[: len(ranked)]


@pytest.mark.parametrize("spoil", [other_way, as_they_stand, of_another])
def test_rankings_that_are_wrong_are_a_reason(spoil, use):
    """Though all keys are visited, and the result is right."""

    class Wrong(Kernels):
        def rank_keys(self, query, keys, table, segments, *given, **more):
            slots = super().rank_keys(query, keys, table, segments, *given, **more)
            for number in range(1, more["num_rankings"]):
                ranked = naive.ranking_of(slots, segments[-1].tolist(), number)
                ranked.copy_(spoil(ranked.clone(), slots))
            return slots

    use(dense, Wrong())
    assert re.match(
        r"head size 64 with .* is ranking keys \d\d% off in a trial of 384 tokens", warm(4, 64, S2OParams())
    )


def test_rounding_is_no_reason(use, monkeypatch):
    """Of the result, to bfloat16, and of keys that stand a class further: by far."""
    monkeypatch.setattr(warm_up, "OFF", 0.005)
    monkeypatch.setattr(warm_up, "MOVED", 0.01)

    class Rounded(Kernels):
        def rank_keys(self, query, keys, *given, **more):
            return super().rank_keys(query.bfloat16(), keys.bfloat16(), *given, **more)

    def run(*given):
        dense(*given)
        given[-1].copy_(given[-1].bfloat16())

    use(run, Rounded())
    assert warm(32, 128, S2OParams()) is None


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_what_no_other_kernel_would_mend_is_raised(error, use):
    kernels = WithGluon()

    def run(*_):
        raise error("CUDA error: of some kind")

    use(run, kernels)
    with pytest.raises(error):
        warm()
    assert kernels.uses_gluon()


def test_the_numbers_of_a_program_stay_its_own():
    """vLLM samples with PyTorch's generators."""
    state = torch.cuda.get_rng_state if DEVICE.type == "cuda" else torch.get_rng_state
    before = state()
    assert warm() is None
    assert torch.equal(state(), before)
