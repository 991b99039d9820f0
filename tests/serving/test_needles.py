"""What a long prompt says is found again, S2O or not, and the log shows what was skipped."""

import time

import pytest
from serving import CUDA

from vllm_s2o.quality.needles import needle
from vllm_s2o.stats import LOG_INTERVAL, prefills

pytestmark = pytest.mark.serving

# What takes minutes on a slow machine is asked once; `benchmarks/serving.py needles` asks at three depths each.
DEPTHS = {1000: (0.1, 0.5, 0.9), 4000: (0.1,), 7800: (0.5,)}


@pytest.fixture(scope="module", params=DEPTHS, ids="{} tokens".format)
def found(request, dense, s2o, count_tokens):
    """Per prompt: whether dense attention and S2O found the needle."""
    found = {}
    for n in (needle(request.param, depth, 1, count_tokens) for depth in DEPTHS[request.param]):
        found[n.name] = tuple(n.number in server.ask(n.prompt) for server in (dense, s2o))
        if CUDA:  # a GPU takes less than the time that lines of the log keep between them
            time.sleep(2 * LOG_INTERVAL)
    return found


def test_no_worse_than_dense(found):
    by_dense, by_s2o = (sum(column) for column in zip(*found.values(), strict=True))
    assert by_dense >= 1, f"dense attention finds none of these: {found}"
    assert by_s2o >= by_dense, found


def test_log_shows_sparsity(found, s2o):
    length = int(next(iter(found)).split()[0])
    steps = [step for step in prefills(s2o.log) if 0.9 * length < sum(step.query_lens) < 1.1 * length]
    if length < 2048:
        assert not steps, "sequences below min_seq_len stay dense"
        return
    assert len(steps) == len(found)
    for step in steps:
        assert 0 < step.density < 0.8
        assert step.sparse_layers > step.num_layers / 2
