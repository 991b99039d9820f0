"""Metadata that vLLM copies to another cache group."""

import pytest
import tiny
import torch
from batch import ALL_DENSE, LONG, QUERY_LENS, SHORT, Batch, rows_of
from cases import error_bar
from vllm.platforms import current_platform

from vllm_s2o import prefill_attention

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="these batches are small enough for a CPU only")


def test_another_group_has_the_plan_and_counters_of_its_own(start, finished, other_group):
    sparse = start()
    layer = sparse.layers[0]
    first, second = Batch(layer, seed=1), Batch(layer, seed=2)
    second.query = first.query
    metadata = sparse.builder.build(0, first.common)
    batch_out = first.attend(layer, metadata)
    new = sparse.builder.update_block_table(metadata, second.table, second.slots)
    assert new.s2o.plan is metadata.s2o.plan
    step = new.s2o.step
    assert (step.done, step.sparse, step.heads, step.visited) == (0, 0, 0, None)
    assert (metadata.s2o.step.done, metadata.s2o.step.sparse) == (1, 1)
    # The dense rows read the second group's pages too.
    assert [run.metadata.block_table.equal(second.table[run.rows]) for run in new.s2o.dense] == [True, True]
    assert [run.metadata.slot_mapping.equal(second.slots[run.tokens]) for run in new.s2o.dense] == [True, True]
    assert [run.metadata.block_table.equal(first.table[run.rows]) for run in metadata.s2o.dense] == [True, True]
    out = second.attend(layer, new)
    exact, bar = error_bar(second.case(layer, range(len(QUERY_LENS))))
    assert (out - exact).abs().max() <= bar
    assert not torch.allclose(out, batch_out, atol=0.1)
    assert finished == [metadata.s2o.step, new.s2o.step]


@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)], ids=["a larger group", "a smaller group"])
def test_another_group_counts_its_own_layers(start, finished, other_group, sizes):
    groups = [start(layers=({},) * size) for size in sizes]
    batch = Batch(groups[0].layers[0])
    metadata = groups[0].builder.build(0, batch.common)
    steps = [metadata, groups[1].builder.update_block_table(metadata, batch.table.clone(), batch.slots)]
    for group, own in zip(groups, steps, strict=True):
        assert set(own.s2o.thresholds) == {layer.layer_name for layer in group.layers}
        for layer in group.layers:
            assert own.s2o.step not in finished
            batch.attend(layer, own)
    assert [(step.num_layers, step.sparse) for step in finished] == [(size, size) for size in sizes]


def test_another_group_plans_where_the_first_is_all_dense(start, finished, other_group):
    first, second = start(ALL_DENSE), start()
    batch, other = Batch(first.layers[0], seed=1), Batch(second.layers[0], seed=2)
    metadata = first.builder.build(0, batch.common)
    new = second.builder.update_block_table(metadata, other.table, other.slots)
    assert new.s2o.plan.plan.seqs == tuple(LONG)
    exact, bar = error_bar(other.case(second.layers[0], range(len(QUERY_LENS))))
    assert (other.attend(second.layers[0], new) - exact).abs().max() <= bar
    assert finished == [new.s2o.step]
    # A graph must hold no plan, in whichever group.
    captured = first.builder.build_for_cudagraph_capture(batch.common)
    assert second.builder.update_block_table(captured, other.table, other.slots).s2o is None


def test_another_group_with_other_query_heads_plans_for_its_rankings(start, finished, other_group, monkeypatch):
    """The groups' caches are alike, and so their metadata may be: what differs is how many rankings a history has."""
    ranked = {**SHORT, "threshold": 0.25, "ranking": "query_head"}
    first, second = start(ranked), start(ranked, num_heads=tiny.NUM_HEADS // 2, num_kv_heads=tiny.NUM_KV_HEADS)
    assert (first.builder.s2o_rankings, second.builder.s2o_rankings) == (4, 2)
    batch = Batch(first.layers[0])
    other = Batch(first.layers[0], seed=2)
    metadata = first.builder.build(0, batch.common)
    new = second.builder.update_block_table(metadata, other.table, other.slots)
    assert [own.s2o.plan.plan.num_rankings for own in (metadata, new)] == [4, 2]
    assert new.s2o.plan.max_slots == metadata.s2o.plan.max_slots // 2
    other.query = other.query[:, : tiny.NUM_HEADS // 2].contiguous()
    (layer,) = second.layers
    out, case = other.attend(layer, new), other.case(layer, LONG)
    assert rows_of(out, LONG).equal(prefill_attention(**case.arguments, params=layer.impl.s2o_params))
    assert finished == [new.s2o.step]
    short = Batch(first.layers[0], query_lens=[1, 20], seq_lens=[300, 20])
    dense = first.builder.build(0, short.common)
    monkeypatch.setattr(type(second.builder), "_plan", lambda *_: pytest.fail("looked at again"))
    assert dense.s2o is None and second.builder.update_block_table(dense, short.table, short.slots).s2o is None


def test_another_group_that_is_all_dense_has_no_plan(start, finished, other_group):
    first, second = start(), start(ALL_DENSE)
    batch = Batch(first.layers[0])
    metadata = first.builder.build(0, batch.common)
    new = second.builder.update_block_table(metadata, batch.table.clone(), batch.slots)
    assert new.s2o is None
    assert batch.attend(second.layers[0], new).isfinite().all()
    assert finished == []


def test_another_group_of_a_dense_step_is_dense(start, other_group):
    sparse = start()
    batch = Batch(sparse.layers[0], query_lens=[1, 20], seq_lens=[300, 20])
    metadata = sparse.builder.build(0, batch.common)
    assert sparse.builder.update_block_table(metadata, batch.table.clone(), batch.slots).s2o is None
