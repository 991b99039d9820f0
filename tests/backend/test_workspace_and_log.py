"""What profiling reserves, and what is said of a step."""

import logging

import pytest
import tiny
import torch
from batch import EXACT, Batch
from vllm.platforms import current_platform

from vllm_s2o import attention, compat
from vllm_s2o.backend import say_once, tell_once

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="these batches are small enough for a CPU only")


# -- the workspace ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranking", ["kv_head", "query_head"])
def test_profiling_reserves_what_no_plan_exceeds(start, monkeypatch, finished, ranking):
    asked = []
    monkeypatch.setattr(compat, "reserve_workspace", lambda *buffers: asked.append(buffers))
    sparse = start({**EXACT, "ranking": ranking}, max_num_batched_tokens=512)
    rankings = tiny.NUM_KV_HEADS if ranking == "kv_head" else tiny.NUM_HEADS
    batch = Batch(sparse.layers[0])
    batch.attend(sparse.layers[0], None)
    (profiled,) = asked
    assert [buffer[1] for buffer in profiled] == [torch.int32, torch.uint8, torch.int32]
    assert profiled[0][0] == profiled[1][0] == (sparse.builder.s2o_slots,)
    # The longest history for each ranking, times the segments that a step's tokens can fall into.
    assert sparse.builder.s2o_slots == 1024 * rankings * (512 // 64 + 2)
    batch.attend(sparse.layers[0], sparse.builder.build(0, batch.common))
    for used, most in zip(asked[1], profiled, strict=True):
        assert 0 < used[0][0] <= most[0][0]


def test_plans_keep_within_a_small_workspace(start, monkeypatch, finished):
    monkeypatch.setattr(attention, "MAX_SLOTS", 1)
    sparse = start()
    assert sparse.builder.s2o_slots == 1024 * tiny.NUM_HEADS
    batch = Batch(sparse.layers[0], query_lens=[400, 400, 200], seq_lens=[700, 700, 1000])
    work = sparse.builder.build(0, batch.common).s2o
    assert len(work.plan.waves) > 1
    assert work.plan.max_slots <= sparse.builder.s2o_slots


# -- what is said -----------------------------------------------------------------------------------------------------


def test_each_reason_is_told_once(told):
    for reason in ("first", "second", "first"):
        tell_once(reason)
    assert told == ["s2o: dense: first", "s2o: dense: second"]


def test_each_rank_tells_what_is_wrong_with_its_gpu(told, rank):
    rank[:] = [1, 2]
    say_once("as the first one says")
    say_once("kernels are wrong here", logging.WARNING, each_rank=True)
    assert told == ["s2o: kernels are wrong here"]


def test_why_a_step_stays_dense_is_told_once(start, told):
    sparse = start()
    batch = Batch(sparse.layers[0])
    told.clear()
    for _ in range(2):
        common = batch.common
        common.mm_req_doc_ranges = {2: [(0, 10)]}
        assert sparse.builder.build(0, common).s2o is None
    assert told == ["s2o: dense: multimodal prefix ranges"]


def test_unknown_lengths_are_told(start, told, monkeypatch):
    sparse = start()
    batch = Batch(sparse.layers[0])
    told.clear()
    monkeypatch.setattr(compat, "host_lengths", lambda common: None)
    assert sparse.builder.build(0, batch.common).s2o is None
    assert told == ["s2o: dense: sequence lengths are not known on the host"]


def test_short_rows_are_told(start, told):
    sparse = start()
    batch = Batch(sparse.layers[0])
    told.clear()
    sparse.builder.build(0, batch.common)
    assert told == [
        "s2o: dense: fewer new tokens than min_query_len=32, decode among them",
        "s2o: dense: sequences shorter than min_seq_len=128",
    ]
