"""What a long prompt says is found again, S2O or not, and the log shows what was skipped."""

import time

import pytest
from serving import CUDA

from vllm_s2o.quality.needles import needle
from vllm_s2o.step_log import LOG_INTERVAL, prefills

# The server of README's first steps is asked for one in any case (`test_make_serve.py`).
pytestmark = [pytest.mark.serving, pytest.mark.long]

# What takes minutes on a slow machine is asked once; `benchmarks/serving.py needles` asks at three depths each.
DEPTHS = {1000: (0.1, 0.5, 0.9), 4000: (0.1,), 7800: (0.5,)}


@pytest.fixture(scope="module", params=DEPTHS, ids="{} tokens".format)
def found(request, s2o, count_tokens):
    """Needles, and whether S2O found them."""
    found = {}
    for n in (needle(request.param, depth, 1, count_tokens) for depth in DEPTHS[request.param]):
        found[n] = n.number in s2o.ask(n.prompt)
        if CUDA:  # a GPU takes less than the time that lines of the log keep between them
            time.sleep(2 * LOG_INTERVAL)
    return found


def test_no_worse_than_dense(found, request):
    assert any(found.values()), f"S2O finds none of these: {[n.name for n in found]}"
    missed = [n for n, was_found in found.items() if not was_found]
    if missed:  # asked only then: it takes as long again
        dense = request.getfixturevalue("dense")
        assert [n.name for n in missed if n.number in dense.ask(n.prompt)] == []


def test_log_shows_sparsity(found, s2o):
    length = int(next(iter(found)).name.split()[0])
    steps = [step for step in prefills(s2o.log) if 0.9 * length < sum(step.query_lens) < 1.1 * length]
    if length < 2048:
        assert not steps, "sequences below min_seq_len stay dense"
        return
    assert len(steps) == len(found)
    for step in steps:
        assert 0 < step.density < 0.8
        assert step.sparse_layers > step.num_layers / 2
