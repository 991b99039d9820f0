"""Steps of requests through vLLM's own layers and builders: each row on its request's path, and in its figures."""

import logging
from types import SimpleNamespace

import pytest
import torch
from batch import ALL_DENSE, LONG, QUERY_LENS, SEQ_LENS, SHORT, Batch
from scheduled import new, runner_v1, scheduled
from vllm.platforms import current_platform

from vllm_s2o import attention, backend, compat, stats
from vllm_s2o.compat import requests
from vllm_s2o.metrics.figures import DENSE, SPARSE
from vllm_s2o.metrics.prompts import Prompts

pytestmark = pytest.mark.skipif(not current_platform.is_cpu(), reason="these batches are small enough for a CPU only")

NAMES = ["decode", "short", "chunk", "decode2", "whole"]
"""The rows of `Batch`."""


class Book:
    """What is recorded."""

    def __init__(self):
        self.counted, self.pairs_seen, self.times, self.done, self.started = {}, [0, 0], [], [], []

    def start(self, *config):
        self.started.append(config)

    def tokens(self, count, path, reason=""):
        self.counted[path, reason] = self.counted.get((path, reason), 0) + count

    def pairs(self, visited, causal):
        self.pairs_seen[0] += visited
        self.pairs_seen[1] += causal

    def seconds(self, ranking, total):
        self.times.append((ranking, total))

    def prompt(self, prompt):
        self.done.append(prompt)


@pytest.fixture
def book(monkeypatch):
    book = Book()
    prompts = Prompts(book, logging.getLogger("figures"))
    monkeypatch.setattr(backend, "recorder", book)
    monkeypatch.setattr(backend, "prompts", prompts)
    monkeypatch.setattr(backend, "reporter", stats.Reporter(lambda line: None, record=prompts.told))
    return book


def step(sparse, batch, marks=None, layers=None, names=NAMES, runner=None, lengths=None):
    """One step of the engine: every request was new, but those in decode and the chunk's beginning. Prompts have
    `lengths` where they do not end with the step."""
    marks, lengths = marks or {}, lengths or {}
    lens = dict(zip(NAMES, zip(batch.query_lens, batch.seq_lens, strict=True), strict=True))
    output = scheduled(
        {name: query for name, (query, _) in lens.items()},
        [
            new(name, lengths.get(name, seq - 1 if query == 1 else seq), seq - query, marks.get(name))
            for name, (query, seq) in lens.items()
        ],
    )
    backend.prompts.begin(output, runner or runner_v1(*names))
    metadata = sparse.builder.build(0, batch.common)
    outs = [batch.attend(layer, metadata) for layer in layers or sparse.layers]
    backend.prompts.end()
    return metadata, outs


def test_tokens_by_path(start, book):
    sparse = start()
    batch = Batch(sparse.layers[0])
    step(sparse, batch)
    assert book.counted == {(SPARSE, ""): 350, (DENSE, "below min_seq_len"): 20}
    assert book.pairs_seen[0] == book.pairs_seen[1] > 0, "threshold 0 skips nothing"
    assert {prompt.request_id: (prompt.tokens, prompt.cached) for prompt in book.done} == {
        "chunk": ({SPARSE: 200, DENSE: 0}, 300),
        "whole": ({SPARSE: 150, DENSE: 0}, 0),
    }


def test_each_prompt_has_its_own_pairs(start, book):
    sparse = start({**SHORT, "threshold": 0.2}, layers=({}, {}))
    step(sparse, Batch(sparse.layers[0]))
    chunk, whole = book.done
    assert chunk.causal == (200 * 300 + 200 * 201 // 2) * 4 * 2
    assert whole.causal == 150 * 151 // 2 * 4 * 2
    assert [chunk.visited + whole.visited, chunk.causal + whole.causal] == book.pairs_seen
    assert 0 < whole.density < 1 and 0 < chunk.density < 1
    assert whole.density != chunk.density


def test_the_end_of_a_prompt_is_dense(start, book):
    """Of a chunk with more to come no tile is; of a request that is not known, any chunk may be the last one."""
    sparse = start({**SHORT, "threshold": 0.2, "dense_tail": 20})
    batch = Batch(sparse.layers[0])

    def dense_rows(**more) -> dict[int, int]:
        metadata, _ = step(sparse, batch, **more)
        (wave,) = metadata.s2o.plan.plan.waves
        tiles = [(wave.segments[tile.segment].seq, tile) for tile in wave.tiles]
        return {row: sum(tile.rows for seq, tile in tiles if seq == row and tile.share == 0) for row in LONG}

    # Positions 480 to 499 of 500, and 130 to 149 of 150: from the tiles at 480 and at 128 on.
    assert dense_rows() == {2: 20, 4: 22}
    assert dense_rows(lengths={"chunk": 600, "whole": 151}) == {2: 0, 4: 22}
    assert dense_rows(lengths={"chunk": 510}) == {2: 20, 4: 22}, "ten of twenty tokens are here"
    assert dense_rows(lengths={"chunk": 600}, names=[*NAMES[1:], NAMES[0]]) == {2: 20, 4: 22}
    assert dense_rows(lengths={"chunk": 450}) == {2: 84, 4: 22}, "computed again after a preemption, answer and all"


def test_a_chunk_that_is_all_end_is_dense(start, book, told):
    """By vLLM's own backend, which is faster for it."""
    sparse = start({**SHORT, "threshold": 0.2, "dense_tail": 200})
    metadata, _ = step(sparse, Batch(sparse.layers[0]))
    assert metadata.s2o is None
    metadata, _ = step(sparse, Batch(sparse.layers[0]), lengths={"chunk": 501})
    assert metadata.s2o.plan.plan.seqs == (2,)
    assert "s2o: dense: chunks within a prompt's last dense_tail=200 tokens" in told
    assert book.counted[DENSE, "the end of a prompt"] == 150 + 200 + 150


def test_the_density_of_a_prompt_is_that_of_all_its_chunks(start, book):
    """Of the layers that may be sparse: chunks that are too short, too few or the end count with all their pairs."""
    config = {**SHORT, "threshold": 0.2, "dense_tail": 50, "layers": [{"layers": 1, "threshold": "dense"}]}
    sparse = start(config, layers=({}, {}, {}))

    def run(tokens, end, **how):
        batch = Batch(sparse.layers[0], query_lens=[tokens], seq_lens=[end])
        output = scheduled({"a": tokens}, **how)
        backend.prompts.begin(output, runner_v1("a"))
        metadata = sparse.builder.build(0, batch.common)
        for layer in sparse.layers:
            batch.attend(layer, metadata)
        backend.prompts.end()

    run(100, 100, new=[new("a", 450)])
    run(200, 300, computed={"a": 100})
    run(20, 320, computed={"a": 300})
    run(80, 400, computed={"a": 320})
    run(50, 450, computed={"a": 400})
    reasons = {"below min_seq_len": 100, "below min_query_len": 20, "the end of a prompt": 50}
    assert book.counted == {(SPARSE, ""): 280} | {(DENSE, reason): count for reason, count in reasons.items()}
    (prompt,) = book.done
    visited, causal = book.pairs_seen
    assert causal == (sum(range(101, 301)) + sum(range(321, 401))) * 4 * 2
    assert prompt.causal == sum(range(1, 451)) * 4 * 2
    assert 0 < visited < causal
    assert prompt.visited == visited + prompt.causal - causal
    assert visited / causal < prompt.density < 1


@pytest.mark.parametrize(("mark", "reason"), [("off", "switched off"), ("dense", "asked by the request")])
def test_a_request_that_is_dense_by_decision_is_dense(start, book, told, mark, reason):
    """As the dense backend computes it, beside one that is sparse."""
    sparse, dense = start({**SHORT, "threshold": 0.2}), start(dense=True)
    batch = Batch(dense.layers[0])
    exact = batch.attend(dense.layers[0], dense.builder.build(0, batch.common))
    metadata, (out,) = step(sparse, batch, {"chunk": mark})
    assert metadata.s2o.plan.plan.seqs == (4,)
    chunk, whole = slice(21, 221), slice(222, 372)
    assert torch.allclose(out[chunk], exact[chunk], atol=1e-5)
    assert not torch.allclose(out[whole], exact[whole], atol=1e-2)
    assert book.counted == {(SPARSE, ""): 150, (DENSE, "below min_seq_len"): 20, (DENSE, reason): 200}
    assert {prompt.request_id: (prompt.kept_dense, prompt.density == 1) for prompt in book.done} == {
        "chunk": (reason, True),
        "whole": (None, False),
    }
    assert f"s2o: dense: {reason}" in told


def test_a_step_of_dense_requests_has_no_plan(start, book):
    sparse = start()
    metadata, _ = step(sparse, Batch(sparse.layers[0]), dict.fromkeys(NAMES, "off"))
    assert metadata.s2o is None
    assert book.counted == {(DENSE, "switched off"): 350, (DENSE, "below min_seq_len"): 20}


def test_where_rows_are_not_known_none_is_sparse_that_may_not_be(start, book):
    """The runner's order is another one: any long row may be the one that is to be dense."""
    sparse = start()
    batch = Batch(sparse.layers[0])
    other = [*NAMES[1:], NAMES[0]]
    metadata, _ = step(sparse, batch, {"chunk": "dense"}, names=other)
    assert metadata.s2o is None
    metadata, _ = step(sparse, batch, names=other)
    assert metadata.s2o.plan.plan.seqs == tuple(LONG), "without such a request nothing is lost"


def test_other_ranks_take_the_same_path_and_count_nothing(start, book, rank):
    sparse = start()
    rank[:] = 1, 2
    metadata, _ = step(sparse, Batch(sparse.layers[0]), {"chunk": "off"})
    assert metadata.s2o.plan.plan.seqs == (4,)
    assert (book.counted, book.done, book.pairs_seen) == ({}, [], [0, 0])


def test_layers_that_are_all_dense_say_why(start, book):
    sparse = start(ALL_DENSE)
    step(sparse, Batch(sparse.layers[0]))
    assert book.counted == {(DENSE, "the config says so"): 370}
    assert book.done == []


def test_what_a_whole_step_cannot(start, book, monkeypatch):
    sparse = start()
    batch = Batch(sparse.layers[0])
    monkeypatch.setattr(compat, "step_problem", lambda *_: "cascade attention")
    step(sparse, batch)
    assert book.counted == {(DENSE, "cascade attention"): 370}


@pytest.mark.parametrize(
    ("query_lens", "seq_lens", "reason"),
    [
        ([1, 20, 100, 1, 90], [300, 20, 100, 40, 90], "below min_seq_len"),
        ([1, 20, 31, 1, 30], [300, 20, 500, 40, 150], "below min_query_len"),
    ],
)
def test_numbers_are_left_to_the_log(start, book, told, query_lens, seq_lens, reason):
    """A label with a number in it would be another series for each config."""
    sparse = start()
    told.clear()
    step(sparse, Batch(sparse.layers[0], query_lens=query_lens, seq_lens=seq_lens))
    assert {why for path, why in book.counted if path == DENSE} >= {reason}
    assert any("=" in line for line in told)


def test_another_group_of_layers_counts_no_token_twice(start, book, other_group):
    sparse, other = start(), start(layers=({}, {}))
    batch = Batch(sparse.layers[0])
    output = scheduled(
        dict(zip(NAMES, QUERY_LENS, strict=True)),
        [new(name, seq, seq - query) for name, query, seq in zip(NAMES, QUERY_LENS, SEQ_LENS, strict=True)],
    )
    backend.prompts.begin(output, runner_v1(*NAMES))
    metadata = sparse.builder.build(0, batch.common)
    copied = other.builder.update_block_table(metadata, batch.table, batch.slots)
    for layer, given in ((sparse.layers[0], metadata), *((layer, copied) for layer in other.layers)):
        batch.attend(layer, given)
    backend.prompts.end()
    assert book.counted[SPARSE, ""] == 350
    assert {prompt.request_id: prompt.causal for prompt in book.done}["whole"] == 150 * 151 // 2 * 4 * 3
    assert all(prompt.pending == 0 and prompt.density == 1 for prompt in book.done)


def test_each_layer_is_timed_in_turn(start, book, monkeypatch):
    sparse = start(layers=({}, {}, {}))
    batch = Batch(sparse.layers[0])
    timed = []
    run = attention.run

    def seen(*arguments, lap=None, **options):
        timed.append(lap is not None)
        return run(*arguments, lap=lap, **options)

    monkeypatch.setattr(attention, "run", seen)
    for _ in range(4):
        step(sparse, batch)
    assert [timed[i : i + 3].index(True) for i in range(0, 12, 3)] == [0, 1, 2, 0]
    assert timed.count(True) == 4 == len(book.times)
    assert all(0 < ranking < total for ranking, total in book.times)


def test_the_config_is_told(start, book):
    sparse = start()
    assert book.started == [(sparse.builder.s2o.digest(), sparse.builder.s2o.source)]


# -- the worker -------------------------------------------------------------------------------------------------------


def test_steps_of_the_worker_are_seen_and_no_others(monkeypatch):
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    seen = []

    def execute_model(self, scheduler_output):
        seen.append("computes")
        if scheduler_output == "bad":
            raise RuntimeError("out of memory")
        return "output"

    monkeypatch.setattr(WorkerWrapperBase, "execute_model", execute_model)
    for _ in range(2):
        requests.watch_steps(lambda output, runner: seen.append((output, runner)), lambda: seen.append("end"))
    wrapper = object.__new__(WorkerWrapperBase)
    wrapper.worker = SimpleNamespace(model_runner="runner")
    assert wrapper.execute_model("good") == "output"
    with pytest.raises(RuntimeError, match="out of memory"):
        wrapper.execute_model("bad")
    assert seen == [("good", "runner"), "computes", "end", ("bad", "runner"), "computes", "end"]


def test_the_backend_watches_the_worker():
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    assert WorkerWrapperBase.execute_model.s2o
