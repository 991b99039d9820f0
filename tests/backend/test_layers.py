"""Which path each layer takes, and why: windows, overrides, ranks, drafts."""

import pytest
import tiny
import torch
from batch import ALL_DENSE, DENSE, EXACT, LONG, SHORT, Batch, rows_of
from vllm.platforms import current_platform

from vllm_s2o import backend, compat, prefill_attention
from vllm_s2o.backend import S2OBackend, layer_index

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="these batches are small enough for a CPU only")


def test_layers_that_must_stay_dense_do(start, finished, told):
    layers = ({}, {"per_layer_sliding_window": 64}, {"logits_soft_cap": 20.0})
    sparse, dense = start(layers=layers), start(dense=True, layers=layers)
    batch = Batch(dense.layers[0])
    with_s2o, without = sparse.builder.build(0, batch.common), dense.builder.build(0, batch.common)
    for index, (ours, theirs) in enumerate(zip(sparse.layers, dense.layers, strict=True)):
        out, alone = batch.attend(ours, with_s2o), batch.attend(theirs, without)
        assert out.equal(alone) == (index > 0)
        torch.testing.assert_close(out, alone, rtol=1e-4, atol=1e-5)
        assert len(finished) == (index == 2)
    assert (finished[0].done, finished[0].sparse, finished[0].heads) == (3, 1, 4)
    assert "s2o: 1 of 3 attention layers take the CPU path for long prefills" in told
    assert "s2o: dense: sliding window (layers 1)" in told
    assert "s2o: dense: logits soft cap (layers 2)" in told


def test_halves_of_a_step_that_run_in_turn_are_dense(start, finished, told, monkeypatch):
    monkeypatch.setattr(compat, "engine_problem", lambda config: "dual-batch overlap")
    sparse = start()
    assert not hasattr(sparse.builder.build(0, Batch(sparse.layers[0]).common), "s2o")
    assert "s2o: 0 of 1 attention layers take the CPU path for long prefills" in told
    assert "s2o: dense: dual-batch overlap (layers 0)" in told


def test_layers_that_the_config_keeps_dense(start, told):
    s2o = {**EXACT, "layers": [{"layers": "0-1", "threshold": "dense"}, {"layers": 2, "threshold": 0.25}]}
    sparse = start(s2o, layers=({}, {}, {}))
    params = [layer.impl.s2o_params for layer in sparse.layers]
    assert params[:2] == [None, None]
    assert params[2].threshold == 0.25
    assert "s2o: dense: the config says so (layers 0,1)" in told


def test_layers_that_have_a_ranking_for_each_query_head(start, finished):
    """A step's plan has room for all of them; it was not made for a layer with other heads."""
    sparse = start({**SHORT, "threshold": 0.25, "ranking": "query_head"})
    (layer,) = sparse.layers
    batch = Batch(layer)
    metadata = sparse.builder.build(0, batch.common)
    out, case = batch.attend(layer, metadata), batch.case(layer, LONG)
    ours = prefill_attention(**case.arguments, params=layer.impl.s2o_params)
    assert rows_of(out, LONG).equal(ours)
    shared = layer.impl.s2o_params.model_copy(update={"ranking": "kv_head"})
    assert not prefill_attention(**case.arguments, params=shared).equal(ours)
    told = layer.impl.settle(layer, sparse.builder.s2o, 8)
    assert told == "steps are planned for 8 rankings, one of each query head, and it has 4"
    assert layer.impl.s2o_params is None


def test_places_of_rankings_that_exceed_32_bits(start, told, monkeypatch):
    monkeypatch.setattr(backend, "longest_ranked", lambda rankings: 1000 // rankings)
    sparse = start({**EXACT, "ranking": "query_head"})
    assert sparse.layers[0].impl.s2o_params is None
    assert "s2o: dense: max_model_len=1024 is above 250, with 4 rankings of a history (layers 0)" in told


NAMELESS = {"name": "model.blocks.1.part.2.attn"}


def test_a_layer_without_a_number_cannot_be_overridden(start, told):
    """It might be the one that the config keeps dense."""
    sparse = start({**EXACT, "layers": [{"layers": 1, "threshold": "dense"}]}, layers=({}, NAMELESS))
    assert [layer.impl.s2o_params is None for layer in sparse.layers] == [False, True]
    reason = "the config has settings for single layers, and the name does not say which layer this is"
    assert f"s2o: dense: {reason} (layers model.blocks.1.part.2.attn)" in told


def test_a_layer_without_a_number_runs_as_all_layers_do(start, told):
    sparse = start({**SHORT, "threshold": 0.25}, layers=(NAMELESS,))
    assert sparse.layers[0].impl.s2o_params.threshold == 0.25


def test_the_log_calls_a_layer_without_a_number_by_its_name(start, told):
    start(layers=({"per_layer_sliding_window": 64}, NAMELESS | {"per_layer_sliding_window": 64}))
    assert "s2o: dense: sliding window (layers 0,model.blocks.1.part.2.attn)" in told


def test_a_model_of_dense_layers_has_no_plan(start, finished):
    sparse = start(ALL_DENSE)
    batch = Batch(sparse.layers[0])
    metadata = sparse.builder.build(0, batch.common)
    assert getattr(metadata, "s2o", None) is None
    assert batch.attend(sparse.layers[0], metadata).isfinite().all()


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.layers.12.self_attn.attn", 12),
        ("model.layers.0.self_attn.attn", 0),
        ("language_model.model.layers.7.attn", 7),
        ("h.3", 3),
        ("model.layers.1.experts.2.attn", None),
        ("model.self_attn.attn", None),
        ("model.layers2.attn", None),
        ("model.layers.2b.attn", None),
        ("12", None),
        ("", None),
    ],
)
def test_layer_index(name, index):
    assert layer_index(name) == index


@pytest.mark.parametrize(
    ("place", "mine"), [((0, 1), (0.0, 0.1, 0.2, 0.3)), ((0, 2), (0.0, 0.1)), ((1, 2), (0.2, 0.3))]
)
def test_thresholds_are_cut_by_rank(start, rank, place, mine):
    """The config counts the model's four heads, of which this process holds some."""
    rank[:] = place
    sparse = start({**SHORT, "threshold": [0.0, 0.1, 0.2, 0.3]}, num_heads=4 // place[1])
    assert sparse.layers[0].impl.s2o_params.threshold == mine
    assert sparse.layers[0].impl.s2o_params.segment_len == 64


def test_one_threshold_is_every_ranks(start, rank):
    rank[:] = (1, 2)
    assert start({**SHORT, "threshold": 0.1}, num_heads=2).layers[0].impl.s2o_params.threshold == 0.1


@pytest.mark.parametrize(
    "place, num_heads, said",
    [
        ((0, 1), 2 * tiny.NUM_HEADS, f"a layer of {2 * tiny.NUM_HEADS}"),
        ((0, 1), tiny.NUM_HEADS // 2, f"a layer of {tiny.NUM_HEADS // 2}"),
        ((0, 2), tiny.NUM_HEADS, f"a layer of {tiny.NUM_HEADS} on each of 2 ranks"),
        ((1, 2), tiny.NUM_HEADS, f"a layer of {tiny.NUM_HEADS} on each of 2 ranks"),
    ],
    ids=["more", "fewer", "all on the first rank", "all on the second rank"],
)
def test_thresholds_for_another_number_of_heads(start, rank, told, place, num_heads, said):
    """A layer may have other heads than the model says, and all of them on each rank: it stays dense, on every rank
    alike, and the server starts."""
    rank[:] = place
    made = start({**EXACT, "threshold": [0.1] * tiny.NUM_HEADS}, layers=({},), num_heads=num_heads)
    assert made.layers[0].impl.s2o_params is None
    assert any(f"do not fit {said}" in line for line in told) == (place[0] == 0), "the first rank speaks for all"


@pytest.mark.parametrize("proposed, least", [(None, 2), (3, 5)], ids=["one token", "three proposed"])
def test_decode_rows_stay_dense_whatever_the_config_says(start, proposed, least):
    made = start({**EXACT, "min_query_len": 1, "min_seq_len": 1}, proposed=proposed)
    for query_len in (least - 1, least):
        batch = Batch(made.layers[0], query_lens=[query_len], seq_lens=[40])
        planned = made.builder.build(0, batch.common).s2o
        assert (planned is not None) == (query_len == least)


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (32, "min_query_len=32 0 of 3 layers dense"),
        (3, "min_query_len=5 (not 3: decode stays dense) 0 of 3 layers dense"),
    ],
    ids=["as given", "raised"],
)
def test_the_least_number_of_new_tokens_is_told_as_it_is(start, told, given, line):
    start({**EXACT, "min_query_len": given}, proposed=3)
    assert any(line in told_line for told_line in told)


DRAFTS = pytest.mark.parametrize("draft", [{"tag": "eagle_head"}, {"mark": True}], ids=["as it was loaded", "marked"])


@DRAFTS
def test_a_drafts_layer_stays_dense_and_is_not_counted(start, finished, told, draft):
    """Model runner V2 has one builder for the target's layers and for a draft's, which get the target's metadata."""
    sparse, dense = start(layers=({}, draft), proposed=3), start(dense=True, layers=({}, {}))
    assert [layer.impl.s2o_params is None for layer in sparse.layers] == [False, True]
    batch = Batch(sparse.layers[0])
    metadata, without = sparse.builder.build(0, batch.common), dense.builder.build(0, batch.common)
    batch.attend(sparse.layers[0], metadata)
    for _ in range(2):  # a drafter may run its layers once, several times, or not at all
        assert len(finished) == 1
        assert batch.attend(sparse.layers[1], metadata).equal(batch.attend(dense.layers[1], without))
    assert (finished[0].num_layers, finished[0].done, finished[0].sparse) == (1, 1, 1)
    assert "s2o: 1 of 1 attention layers take the CPU path for long prefills" in told
    assert "s2o: dense: draft model (layers 1)" in told


@DRAFTS
def test_a_draft_with_a_builder_of_its_own_has_no_plan(start, told, draft):
    made = start(layers=(draft,), proposed=3)
    assert getattr(made.builder.build(0, Batch(made.layers[0]).common), "s2o", None) is None
    assert told == ["s2o: dense: draft model (layers 0)"], "the config is not the draft's"


def test_the_target_of_a_draft_is_no_draft(start):
    made = start(proposed=3)
    assert made.layers[0].impl.s2o_params is not None


def test_a_tag_alone_makes_no_draft(start):
    """Parts of a model may be made under tags too; without a drafter they are the model's."""
    assert start(layers=({"tag": "decoder"},)).layers[0].impl.s2o_params is not None


def test_a_draft_reserves_nothing(start, monkeypatch):
    asked = []
    monkeypatch.setattr(compat, "reserve_workspace", lambda *buffers: asked.append(buffers))
    made = start(layers=({}, {"tag": "draft_model"}), proposed=3)
    batch = Batch(made.layers[0])
    batch.attend(made.layers[1], None)
    assert asked == []
    batch.attend(made.layers[0], None)
    assert len(asked) == 1


def test_one_process_introduces_the_backend(start, rank, told):
    rank[:] = (1, 2)
    start(num_heads=2)
    assert told == []
    rank[:] = (0, 2)
    backend._told.clear()  # another process has its own
    start(num_heads=2)
    assert any("attention layers take" in line for line in told)


def test_the_backend_is_introduced_once(start, told):
    """vLLM makes builders for profiling, for capture, and for each cache group."""
    start(ALL_DENSE)
    lines = list(told)
    start(ALL_DENSE)
    assert told == lines
    assert len(lines) == len(set(lines)) >= 4


def test_the_backend_is_the_dense_one_in_all_else():
    assert S2OBackend.get_name() == "CUSTOM"
    assert issubclass(S2OBackend, DENSE)
    assert S2OBackend.get_impl_cls() is backend.S2OImpl
    assert S2OBackend.get_builder_cls() is backend.S2OMetadataBuilder
    assert S2OBackend.get_supported_head_sizes() == DENSE.get_supported_head_sizes()
    assert S2OBackend.get_builder_cls()._cudagraph_support is compat.cudagraph_support(DENSE.get_builder_cls())


def test_batch_invariance_is_not_inherited(monkeypatch):
    """FLASH_ATTN claims it."""
    monkeypatch.setattr(DENSE, "supports_batch_invariance", classmethod(lambda cls: True))
    assert not S2OBackend.supports_batch_invariance()
