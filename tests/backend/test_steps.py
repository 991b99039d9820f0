"""One step through vLLM's own layers and builders, on the CPU: who attends which rows."""

import sys
from types import SimpleNamespace

import pytest
import tiny
import torch
from batch import CPU, DENSE, LONG, QUERY_LENS, SHORT, Batch, rows_of
from cases import error_bar
from vllm.platforms import current_platform

from vllm_s2o import S2OParams, attention, prefill_attention
from vllm_s2o.kernels import tables

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="these batches are small enough for a CPU only")


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
    assert step.causal_pairs == [200 * 300 + 200 * 201 // 2, 150 * 151 // 2]
    assert [int(step.visited[row]) for row in LONG] == [pairs * tiny.NUM_HEADS for pairs in step.causal_pairs]


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
    sparse = start({**SHORT, "threshold": 0.2}, dtype=dtype)
    layer = sparse.layers[0]
    batch = Batch(layer, dtype)
    out = batch.attend(layer, sparse.builder.build(0, batch.common))
    params = S2OParams(dense_tail=0, threshold=0.2, segment_len=64, tile_size=32, key_block=16)
    expected, stats = prefill_attention(**batch.case(layer, LONG).arguments, params=params, return_stats=True)
    assert rows_of(out, LONG).equal(expected)
    assert finished[0].visited.sum() == stats.visited_pairs.sum() < stats.causal_pairs.sum()


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
        given.append(arguments[7])
        return stages.attend(*arguments, **options)

    parts = SimpleNamespace(rank_keys=stages.rank_keys, attend=attend)
    monkeypatch.setattr(attention, "stages", lambda *_: parts)
    monkeypatch.setattr(tables, "as_table", lambda *_: pytest.fail("a copy from the host"))
    for layer in sparse.layers:
        batch.attend(layer, metadata)
    assert given[0] is own[0]
    assert given[-1] is own[1]


def test_thresholds_lie_where_kernels_were_compiled_for():
    """Triton compiles anew for an address that is no multiple of 16 bytes: warm-up would be in vain."""
    params = [S2OParams(dense_tail=0, threshold=value) for value in (0.25, (0.5,) * 9, 0.125)]
    rows = attention.device_thresholds(list(zip(params, (9, 9, 3), strict=True)), CPU)
    assert [row.tolist() for row in rows] == [[0.25] * 9, [0.5] * 9, [0.125] * 3]
    assert {(row.data_ptr() - rows[0].data_ptr()) % 16 for row in rows} == {0}


def test_arguments_of_a_newer_vllm_reach_the_dense_backend(start, finished, monkeypatch):
    """A sparse step has no use for them, and must not fail for their sake."""
    (layer,) = (sparse := start()).layers
    batch = Batch(layer)
    expected = batch.attend(layer, sparse.builder.build(0, batch.common))
    seen = []

    def with_later(dense):
        def method(self, *args, later=None, **kwargs):
            seen.append(later)
            return dense(self, *args, **kwargs)

        return method

    for owner, name in ((DENSE.get_impl_cls(), "forward"), (DENSE.get_builder_cls(), "build")):
        monkeypatch.setattr(owner, name, with_later(getattr(owner, name)))
    metadata = sparse.builder.build(common_prefix_len=0, common_attn_metadata=batch.common, later="in build")
    assert seen[0] == "in build"
    seen.clear()
    out = torch.full_like(batch.query, torch.nan)
    layer.impl.forward(
        layer,
        batch.query,
        batch.key,
        batch.value,
        batch.cache,
        metadata,
        output=out,
        output_scale=None,
        later="forward",
    )
    assert out.equal(expected)
    assert seen == ["forward"] * len(metadata.s2o.dense)
    assert seen, "the step has no dense rows"


_opened: list[str] = []
_watched = [False]


def _watch(event: str, args: tuple) -> None:
    if _watched[0] and event in ("open", "os.listdir", "os.scandir", "subprocess.Popen", "import"):
        _opened.append(f"{event} {args}")


def test_a_step_reads_no_file(start, finished):
    """What a layer runs with was settled at start. A step knows lengths and tensors: no request can name a config."""
    sparse = start()
    batch = Batch(sparse.layers[0])
    first = batch.attend(sparse.layers[0], sparse.builder.build(0, batch.common))  # imports what is imported once
    sys.addaudithook(_watch)  # for good: there is no way to remove it
    _watched[0] = True
    try:
        again = batch.attend(sparse.layers[0], sparse.builder.build(0, batch.common))
        during = list(_opened)
        open(__file__).close()
    finally:
        _watched[0] = False
    assert during == []
    assert len(_opened) == 1, "the watch sees what is opened"
    assert again.equal(first)
