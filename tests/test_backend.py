"""One step through vLLM's own layers and builders, on the CPU: who attends which rows, and what is said of it."""

import copy
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import tiny
import torch
from cases import Case, error_bar
from vllm.compilation.backends import set_model_tag
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from vllm_s2o import S2OParams, attention, backend, compat, plugin, prefill_attention
from vllm_s2o.backend import S2OBackend, layer_index, tell_once
from vllm_s2o.kernels import tables

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="these batches are small enough for a CPU only")

CPU = torch.device("cpu")
DENSE = compat.dense_backend()
SHORT = {"segment_len": 64, "tile_size": 32, "key_block": 16, "min_seq_len": 128, "min_query_len": 32}
EXACT = {**SHORT, "threshold": 0.0}
ALL_DENSE = {**EXACT, "layers": [{"layers": 0, "threshold": "dense"}]}

# A decode, a short prefill, the last 200 tokens of a long prompt, another decode, and a whole long prompt.
QUERY_LENS, SEQ_LENS = [1, 20, 200, 1, 150], [300, 20, 500, 40, 150]
LONG = [2, 4]
STARTS = [0, 1, 21, 221, 222, 372]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Read once by type of number."""
    plugin.register()
    directory = tmp_path_factory.mktemp("model")
    return {dtype: tiny.model_config(directory, dtype) for dtype in ("float32", "bfloat16")}


@pytest.fixture
def told(monkeypatch):
    """Lines that the backend logs."""
    lines = []
    monkeypatch.setattr(backend.logger, "log", lambda level, line, *values: lines.append(line % values))
    monkeypatch.setattr(backend, "_told", set())
    return lines


@pytest.fixture
def finished(monkeypatch):
    """Steps that the backend reports as done."""
    steps = []
    monkeypatch.setattr(backend, "reporter", SimpleNamespace(finish=steps.append))
    return steps


@pytest.fixture(autouse=True)
def rank(monkeypatch):
    """This process's place among those that share the heads: (rank, size)."""
    place = [0, 1]
    monkeypatch.setattr(compat, "tensor_parallel", lambda: tuple(place))
    return place


@pytest.fixture
def start(models, told):
    """Layers of a model and their metadata builder, as vLLM makes them."""

    def start(
        s2o=EXACT, *, dense=False, dtype="float32", layers=({},), num_heads=tiny.NUM_HEADS, proposed=None, **changes
    ):
        """A layer may have a `name`, a `tag` under which vLLM loads it, and a `mark`; drafts are `proposed` tokens."""
        config = tiny.vllm_config(models[dtype], None if dense else "CUSTOM", **s2o)
        if proposed is not None:
            config.speculative_config = tiny.speculative_config(config, proposed)
        for name, value in changes.items():
            setattr(config.scheduler_config, name, value)
        made = []
        with set_current_vllm_config(config):
            for index, special in enumerate(layers):
                special = dict(special)
                name = special.pop("name", f"model.layers.{index}.self_attn.attn")
                tag, mark = special.pop("tag", None), special.pop("mark", False)
                with set_model_tag(tag) if tag else nullcontext():
                    layer = Attention(
                        num_heads, tiny.HEAD_SIZE, tiny.HEAD_SIZE**-0.5, num_kv_heads=num_heads // 2,
                        cache_config=config.cache_config, prefix=name, **special,
                    )  # fmt: skip
                layer.is_draft_layer = mark
                made.append(layer)
            builder = made[0].attn_backend.get_builder_cls()(
                made[0].get_kv_cache_spec(config), [layer.layer_name for layer in made], config, CPU
            )
        return SimpleNamespace(layers=made, builder=builder, config=config)

    return start


class Batch:
    """A step's tokens, and a cache that holds all tokens of its sequences."""

    def __init__(self, layer, dtype="float32", seed=0, query_lens=QUERY_LENS, seq_lens=SEQ_LENS):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator).to(getattr(torch, dtype))

        pages = [-(-length // tiny.PAGE) for length in seq_lens]
        free = iter(torch.randperm(sum(pages) + 2, generator=generator).tolist())
        self.table = torch.full((len(seq_lens), max(pages) + 1), 2**30, dtype=torch.int32)
        for row, count in enumerate(pages):
            self.table[row, :count] = torch.tensor([next(free) for _ in range(count)])
        slots = [
            self.table[row, at // tiny.PAGE].long() * tiny.PAGE + at % tiny.PAGE
            for row, at in enumerate(map(torch.arange, seq_lens))
        ]
        self.query_lens, self.seq_lens = query_lens, seq_lens
        self.query = normal(sum(query_lens), tiny.NUM_HEADS, tiny.HEAD_SIZE)
        self.written = normal(2, sum(seq_lens), tiny.NUM_KV_HEADS, tiny.HEAD_SIZE)
        ends = torch.tensor(seq_lens).cumsum(0).tolist()
        new = torch.cat([torch.arange(end - count, end) for end, count in zip(ends, query_lens, strict=True)])
        self.key, self.value = self.written[0][new], self.written[1][new]
        self.slots = torch.cat(slots)[new]
        shape = (sum(pages) + 2, tiny.NUM_KV_HEADS, tiny.PAGE, 2 * tiny.HEAD_SIZE)
        self.cache = torch.zeros(shape, dtype=self.query.dtype)
        layer.impl.do_kv_cache_update(layer, *self.written, self.cache, torch.cat(slots))

    @property
    def common(self):
        return tiny.common_metadata(self.query_lens, self.seq_lens, self.table, self.slots)

    def attend(self, layer, metadata) -> torch.Tensor:
        """Rows that nobody writes stay NaN."""
        out = torch.full_like(self.query, torch.nan)
        layer.impl.forward(layer, self.query, self.key, self.value, self.cache, metadata, out)
        return out

    def case(self, layer, rows) -> Case:
        """Some rows as a problem of their own, for `prefill_attention`."""
        keys, values, table = compat.caches(layer, layer.impl, self.cache, self.table)
        starts = torch.tensor([0, *self.query_lens]).cumsum(0).tolist()
        query_lens, lens = [self.query_lens[row] for row in rows], [self.seq_lens[row] for row in rows]
        return Case(
            torch.cat([self.query[starts[row] : starts[row + 1]] for row in rows]), keys, values, table[rows],
            torch.tensor([0, *query_lens]).cumsum(0).int(), torch.tensor(lens, dtype=torch.int32), tiny.HEAD_SIZE**-0.5,
            query_lens, lens,
        )  # fmt: skip


def rows_of(out: torch.Tensor, rows) -> torch.Tensor:
    return torch.cat([out[STARTS[row] : STARTS[row + 1]] for row in rows])


# -- a mixed batch ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_threshold_zero_is_the_dense_backend(start, finished, dtype):
    sparse, dense = start(dtype=dtype), start(dense=True, dtype=dtype)
    assert type(dense.layers[0].impl) is DENSE.get_impl_cls()
    batch = Batch(dense.layers[0], dtype)
    alone = batch.attend(dense.layers[0], dense.builder.build(0, batch.common))
    metadata = sparse.builder.build(0, batch.common)
    out = batch.attend(sparse.layers[0], metadata)
    # One sequence at a time in fp64 is the judge of both.
    exact, bar = error_bar(batch.case(sparse.layers[0], range(len(QUERY_LENS))))
    assert (alone.double() - exact).abs().max() <= bar
    assert (out.double() - exact).abs().max() <= bar
    (step,) = finished
    assert (step.query_lens, step.seq_lens) == ([200, 150], [500, 150])
    assert int(step.visited) == step.causal_pairs * tiny.NUM_HEADS == (200 * 300 + 200 * 201 // 2 + 150 * 151 // 2) * 4


def test_each_row_is_attended_by_one_of_the_two(start, finished, monkeypatch):
    """The dense backend sees the rows between the long ones, together where they are neighbours."""
    sparse = start()
    seen = []
    dense_forward = DENSE.get_impl_cls().forward

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *args):
        seen.append((query.shape[0], key.shape[0], metadata.seq_lens.tolist(), metadata.max_query_len))
        return dense_forward(self, layer, query, key, value, kv_cache, metadata, output, *args)

    monkeypatch.setattr(DENSE.get_impl_cls(), "forward", forward)
    batch = Batch(sparse.layers[0])
    metadata = sparse.builder.build(0, batch.common)
    out = batch.attend(sparse.layers[0], metadata)
    assert seen == [(21, 21, [300, 20], 20), (1, 1, [40], 1)]
    assert metadata.s2o.plan.plan.seqs == tuple(LONG)
    assert out.isfinite().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_long_rows_run_with_the_parameters_of_the_config(start, finished, dtype):
    sparse = start({**SHORT, "threshold": 0.2, "stop_rule": "mean_row"}, dtype=dtype)
    layer = sparse.layers[0]
    batch = Batch(layer, dtype)
    out = batch.attend(layer, sparse.builder.build(0, batch.common))
    params = S2OParams(threshold=0.2, segment_len=64, tile_size=32, key_block=16, stop_rule="mean_row")
    expected, stats = prefill_attention(**batch.case(layer, LONG).arguments, params=params, return_stats=True)
    assert rows_of(out, LONG).equal(expected)
    assert finished[0].visited == stats.visited_pairs.sum() < stats.causal_pairs.sum()


def test_the_scale_is_the_layers(start, finished):
    sparse = start()
    layer = sparse.layers[0]
    layer.impl.scale = 0.5
    batch = Batch(layer)
    out = batch.attend(layer, sparse.builder.build(0, batch.common))
    case = batch.case(layer, LONG)
    case.scale = 0.5
    exact, bar = error_bar(case)
    assert (rows_of(out, LONG) - exact).abs().max() <= bar


def test_a_batch_of_long_rows_alone(start, finished):
    sparse = start()
    batch = Batch(sparse.layers[0], query_lens=[200, 150], seq_lens=[500, 150])
    metadata = sparse.builder.build(0, batch.common)
    assert metadata.s2o.dense == ()
    exact, bar = error_bar(batch.case(sparse.layers[0], [0, 1]))
    assert (batch.attend(sparse.layers[0], metadata) - exact).abs().max() <= bar


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "long"),
    [
        pytest.param([32], [128], [0], id="just-long-enough"),
        pytest.param([31], [128], None, id="too-few-new-tokens"),
        pytest.param([127], [127], None, id="too-short-a-sequence"),
        pytest.param([1, 1], [900, 400], None, id="decode"),
        pytest.param([31, 127, 32], [900, 127, 128], [2], id="one-of-three"),
        pytest.param([31, 127], [900, 127], None, id="long-enough-only-together"),
    ],
)
def test_which_rows_are_long(start, query_lens, seq_lens, long):
    sparse = start()
    batch = Batch(sparse.layers[0], query_lens=query_lens, seq_lens=seq_lens)
    work = sparse.builder.build(0, batch.common).s2o
    assert (list(work.plan.plan.seqs) if work else None) == long


def test_a_step_without_long_rows_is_left_to_the_dense_backend(start, finished):
    sparse, dense = start(), start(dense=True)
    batch = Batch(dense.layers[0], query_lens=[1, 20], seq_lens=[300, 20])
    alone = batch.attend(dense.layers[0], dense.builder.build(0, batch.common))
    assert batch.attend(sparse.layers[0], sparse.builder.build(0, batch.common)).equal(alone)
    assert finished == []


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "long"),
    [
        pytest.param([200], [1024], [0], id="as-long-as-can-be"),
        pytest.param([200], [1025], None, id="too-long"),
        pytest.param([200, 200], [1025, 300], [1], id="one-of-two"),
    ],
)
def test_rows_longer_than_a_block_table_are_left_out(start, told, query_lens, seq_lens, long):
    """vLLM warms up with such lengths. They say nothing of the step's other rows."""
    sparse = start()
    batch = Batch(sparse.layers[0], query_lens=query_lens, seq_lens=seq_lens)
    told.clear()
    work = sparse.builder.build(0, batch.common).s2o
    assert (list(work.plan.plan.seqs) if work else None) == long
    reason = "s2o: dense: sequences longer than max_model_len=1024, as in vLLM's warm-up"
    assert told == ([reason] if seq_lens[0] > 1024 else [])


def test_a_decode_beyond_the_limit_leaves_a_prefill_alone(start, told):
    """Its length may be an upper bound that counts proposed tokens."""
    sparse = start()
    batch = Batch(sparse.layers[0], query_lens=[1, 200], seq_lens=[1026, 300])
    assert sparse.builder.build(0, batch.common).s2o.plan.plan.seqs == (1,)
    assert not any("max_model_len" in line for line in told)


def test_keys_and_values_may_have_been_written_before(start, finished):
    """vLLM may write the cache in an operation of its own, and hand on the query alone."""
    sparse = start()
    layer = sparse.layers[0]
    batch = Batch(layer)
    metadata = sparse.builder.build(0, batch.common)
    both = batch.attend(layer, metadata)
    batch.key = batch.value = None
    assert batch.attend(layer, metadata).equal(both)


def test_graphs_and_drafts_have_no_plan(start):
    sparse = start()
    batch = Batch(sparse.layers[0])
    assert sparse.builder.build(0, batch.common).s2o is not None
    assert sparse.builder.build_for_cudagraph_capture(batch.common).s2o is None
    assert getattr(sparse.builder.build(0, batch.common, True), "s2o", None) is None
    assert getattr(sparse.builder.build_for_drafting(batch.common, 0), "s2o", None) is None


@pytest.mark.parametrize("budget", [None, 0.5], ids=["stop rule", "budget"])
def test_layers_find_their_thresholds_on_the_device(start, finished, monkeypatch, budget):
    """A copy from the host would make the first layer that needs it wait for the device."""
    rule = {"threshold": 0.125, "layers": [{"layers": 1, "heads": 2, "threshold": 0.25}]}
    sparse = start({**SHORT, **(rule if budget is None else {"budget": budget})}, layers=({}, {}))
    batch = Batch(sparse.layers[0])
    metadata = sparse.builder.build(0, batch.common)
    own = list(metadata.s2o.thresholds.values())
    assert own[0].tolist() == ([0.125] * 4 if budget is None else [0.0] * 4)
    assert own[1].tolist() == ([0.125, 0.125, 0.25, 0.125] if budget is None else [0.0] * 4)
    given = []
    stages = attention.stages("cpu", CPU)

    def attend(*arguments, **options):
        given.append(arguments[8])
        return stages.attend(*arguments, **options)

    parts = SimpleNamespace(rank_keys=stages.rank_keys, order_queries=stages.order_queries, attend=attend)
    monkeypatch.setattr(attention, "stages", lambda *_: parts)
    monkeypatch.setattr(tables, "as_table", lambda *_: pytest.fail("a copy from the host"))
    for layer in sparse.layers:
        batch.attend(layer, metadata)
    assert given[0] is own[0]
    assert given[-1] is own[1]


def test_thresholds_lie_where_kernels_were_compiled_for():
    """Triton compiles anew for an address that is no multiple of 16 bytes: warm-up would be in vain."""
    params = [S2OParams(threshold=value) for value in (0.25, (0.5,) * 9, 0.125)]
    rows = attention.device_thresholds(list(zip(params, (9, 9, 3), strict=True)), CPU)
    assert [row.tolist() for row in rows] == [[0.25] * 9, [0.5] * 9, [0.125] * 3]
    assert {(row.data_ptr() - rows[0].data_ptr()) % 16 for row in rows} == {0}


# -- layers -----------------------------------------------------------------------------------------------------------


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


def test_layers_that_the_config_keeps_dense(start, told):
    s2o = {**EXACT, "layers": [{"layers": "0-1", "threshold": "dense"}, {"layers": 2, "threshold": 0.25}]}
    sparse = start(s2o, layers=({}, {}, {}))
    params = [layer.impl.s2o_params for layer in sparse.layers]
    assert params[:2] == [None, None]
    assert params[2].threshold == 0.25
    assert "s2o: dense: the config says so (layers 0,1)" in told


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


def test_thresholds_for_another_number_of_heads(start, rank, told):
    """A layer may have fewer heads than the model says: it stays dense, the server starts."""
    made = start({**EXACT, "threshold": [0.1] * tiny.NUM_HEADS}, layers=({},), num_heads=2 * tiny.NUM_HEADS)
    assert made.layers[0].impl.s2o_params is None
    assert any(f"do not fit a layer of {2 * tiny.NUM_HEADS}" in line for line in told)


@pytest.mark.parametrize("proposed, least", [(None, 2), (3, 5)], ids=["one token", "three proposed"])
def test_decode_rows_stay_dense_whatever_the_config_says(start, proposed, least):
    made = start({**EXACT, "min_query_len": 1, "min_seq_len": 1}, proposed=proposed)
    for query_len in (least - 1, least):
        batch = Batch(made.layers[0], query_lens=[query_len], seq_lens=[40])
        planned = made.builder.build(0, batch.common).s2o
        assert (planned is not None) == (query_len == least)


@pytest.mark.parametrize(
    ("given", "line"),
    [(32, "min_query_len=32 layers"), (3, "min_query_len=5 (not 3: decode stays dense) layers")],
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


# -- the workspace ----------------------------------------------------------------------------------------------------


def test_profiling_reserves_what_no_plan_exceeds(start, monkeypatch, finished):
    asked = []
    monkeypatch.setattr(compat, "reserve_workspace", lambda *buffers: asked.append(buffers))
    sparse = start(max_num_batched_tokens=512)
    batch = Batch(sparse.layers[0])
    batch.attend(sparse.layers[0], None)
    (profiled,) = asked
    assert [buffer[1] for buffer in profiled] == [torch.int32, torch.uint8, torch.int32]
    assert profiled[0][0] == profiled[1][0] == (sparse.builder.s2o_slots,)
    # The longest history for each KV head, times the segments that a step's tokens can fall into.
    assert sparse.builder.s2o_slots == 1024 * tiny.NUM_KV_HEADS * (512 // 64 + 2)
    batch.attend(sparse.layers[0], sparse.builder.build(0, batch.common))
    for used, most in zip(asked[1], profiled, strict=True):
        assert 0 < used[0][0] <= most[0][0]


def test_plans_keep_within_a_small_workspace(start, monkeypatch, finished):
    monkeypatch.setattr(attention, "MAX_SLOTS", 1)
    sparse = start()
    assert sparse.builder.s2o_slots == 1024 * tiny.NUM_KV_HEADS
    batch = Batch(sparse.layers[0], query_lens=[400, 400, 200], seq_lens=[700, 700, 1000])
    work = sparse.builder.build(0, batch.common).s2o
    assert len(work.plan.waves) > 1
    assert work.plan.max_slots <= sparse.builder.s2o_slots


# -- what is said -----------------------------------------------------------------------------------------------------


def test_each_reason_is_told_once(told):
    for reason in ("first", "second", "first"):
        tell_once(reason)
    assert told == ["s2o: dense: first", "s2o: dense: second"]


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


# -- another cache group ----------------------------------------------------------------------------------------------


@pytest.fixture
def other_group(monkeypatch):
    """FLASH_ATTN's way to use a step's metadata for a second group of layers; the CPU backend has none."""

    def update_block_table(self, metadata, blk_table, slot_mapping):
        new = copy.copy(metadata)
        new.block_table, new.slot_mapping = blk_table, slot_mapping
        return new

    monkeypatch.setattr(DENSE.get_builder_cls(), "update_block_table", update_block_table, raising=False)


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
