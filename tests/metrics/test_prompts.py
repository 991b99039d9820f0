"""From the scheduler's view of a step, and the path of each row, to figures of prompts."""

import numpy as np
import pytest
import torch
from scheduled import new, runner_v1, runner_v2, scheduled

from vllm_s2o import compat
from vllm_s2o.compat import requests
from vllm_s2o.metrics import place
from vllm_s2o.metrics.channel import read
from vllm_s2o.metrics.figures import DENSITY, Recorder, figures
from vllm_s2o.metrics.prompts import UNKNOWN, Prompts
from vllm_s2o.stats import Laps, Step

SHORT, OFF, ASKED = "below min_seq_len", "switched off", "asked by the request"


@pytest.fixture(autouse=True)
def counts(monkeypatch):
    """Whether this rank is the one that counts."""
    answer = [True]
    monkeypatch.setattr(compat, "counts_tokens", lambda: answer[0])
    return answer


@pytest.fixture
def prompts(logger):
    place.establish("some/model")
    return Prompts(Recorder(logger), logger)


class Common:
    def __init__(self, req_idx=None):
        self.req_idx = None if req_idx is None else np.array(req_idx)


def run(prompts, output, runner=None, sparse=(), dense=(), step_reason=None, figures=None, heads=1):
    """One step. `sparse` and `dense` are rows; `figures` are visited and causal pairs of the sparse rows, `heads` those
    of all layers together."""
    query_lens = list(output.num_scheduled_tokens.values())
    prompts.begin(output, runner or runner_v1(*output.num_scheduled_tokens))
    prompts.weigh("a group", heads)
    owners = prompts.rows(Common(), query_lens)
    for row, reason in dict(dense).items():
        prompts.note_dense(owners[row], reason)
    done = None
    if sparse:
        prompts.note_sparse([owners[row] for row in sparse], [query_lens[row] for row in sparse])
        done = Step([], [], [], 1, tuple(sparse), prompts=prompts.expect([owners[row] for row in sparse]))
    if step_reason:
        prompts.note_step(step_reason)
    if figures:
        prompts.told(done, *figures)
    prompts.end()
    return done


@pytest.fixture(params=["V1", "V2"])
def again(request):
    """A step in which "a", which was preempted, is computed anew: vLLM's first model runner knows it, the second one
    hears of it as of a new request."""

    def again(tokens: int, length: int, computed: int = 0):
        if request.param == "V2":
            return scheduled({"a": tokens}, [new("a", length, computed)])
        return scheduled({"a": tokens}, computed={"a": computed}, resumed=["a"])

    return again


def pairs(query_len: int, seq_len: int, heads: int = 1) -> int:
    """Counted one by one."""
    return heads * sum(range(seq_len - query_len + 1, seq_len + 1))


def test_a_prompt_in_chunks(prompts, logger):
    """Its density is that of the whole: the chunk that was dense counts with all its pairs, here 5050 of 31375."""
    run(prompts, scheduled({"a": 100}, [new("a", 250)]), dense={0: SHORT}, heads=4)
    most = pairs(100, 200, 4)
    run(prompts, scheduled({"a": 100}, computed={"a": 100}), sparse=[0], figures=([most // 5], [most]), heads=4)
    assert figures().prompts == {}, "its prefill is not complete"
    last = pairs(50, 250, 4)
    run(prompts, scheduled({"a": 50}, computed={"a": 200}), sparse=[0], figures=([last // 5], [last]), heads=4)
    found = figures()
    assert found.tokens == {("sparse", ""): 150, ("dense", SHORT): 100}
    assert (found.visited, found.causal, found.density) == ((most + last) // 5, most + last, 0.2)
    assert found.prompts == {"a": (5050 + 0.2 * (31375 - 5050)) / 31375}
    assert logger.lines == ["s2o: request a prompt=250 cached=0 sparse=150 dense=100 density=0.329"]


def test_the_chunks_of_a_long_prompt(prompts, logger):
    """Three of eight chunks are below min_seq_len: a seventh of the pairs."""
    for end in range(2048, 16385, 2048):
        seen = {"computed": {"a": end - 2048}} if end > 2048 else {"new": [new("a", 16384)]}
        output = scheduled({"a": 2048}, **seen)
        if end < 8192:
            run(prompts, output, step_reason=SHORT, heads=64)
        else:
            most = pairs(2048, end, 64)
            run(prompts, output, sparse=[0], figures=([most // 5], [most]), heads=64)
    assert figures().density == pytest.approx(0.2)
    assert figures().prompts["a"] == pytest.approx(0.3125, abs=1e-4)
    assert logger.lines == ["s2o: request a prompt=16384 cached=0 sparse=10240 dense=6144 density=0.313"]


def test_what_was_cached_counts_neither_way(prompts):
    """Tokens that nothing was computed for have no pairs; as keys of the others they have."""
    run(prompts, scheduled({"a": 100}, [new("a", 250, computed=50)]), dense={0: SHORT})
    most = pairs(100, 250)
    run(prompts, scheduled({"a": 100}, computed={"a": 150}), sparse=[0], figures=([0], [most]))
    assert figures().prompts == {"a": pairs(100, 150) / pairs(200, 250)}


def test_groups_of_layers_weigh_as_they_have_heads(prompts):
    """Where one of them is dense for a step's sake, its pairs are visited. A group that is asked twice counts once."""
    prompts.begin(scheduled({"a": 100}, [new("a", 100)]), runner_v1("a"))
    for group, heads in (("first", 6), ("second", 2), ("second", 2)):
        prompts.weigh(group, heads)
    owners = prompts.rows(Common(), [100])
    prompts.note_sparse(owners, [100])
    done = Step([], [], [], 1, (0,), prompts=prompts.expect(owners))
    prompts.note_step("cascade attention")
    prompts.end()
    prompts.told(done, [pairs(100, 100, 3)], [pairs(100, 100, 6)])
    assert figures().prompts == {"a": 5 / 8}


def test_a_prompt_of_dense_chunks_alone_has_no_density(prompts, logger):
    run(prompts, scheduled({"a": 100}, [new("a", 200)]), dense={0: SHORT})
    run(prompts, scheduled({"a": 100}, computed={"a": 100}), dense={0: "the end of a prompt"})
    assert (figures().prompts, logger.lines) == ({}, [])


def test_decode_is_no_prefill(prompts):
    run(prompts, scheduled({"a": 100}, [new("a", 100)]), sparse=[0], figures=([1], [2]))
    for computed in (100, 101):
        run(prompts, scheduled({"a": 1}, computed={"a": computed}), step_reason="below min_query_len")
    assert figures().tokens == {("sparse", ""): 100}


def test_decode_steps_look_at_no_request(prompts):
    """Nearly all steps of a server are such."""
    run(prompts, scheduled({"a": 100}, [new("a", 100)]), sparse=[0], figures=([1], [2]))
    output = scheduled({"a": 1}, computed={"a": 100})
    output.scheduled_cached_reqs.num_computed_tokens = None
    run(prompts, output)


def test_a_cached_prefix_is_not_computed(prompts, logger):
    run(prompts, scheduled({"a": 60}, [new("a", 100, computed=40)]), sparse=[0], figures=([1], [4]))
    assert figures().tokens == {("sparse", ""): 60}
    assert "prompt=100 cached=40 sparse=60 dense=0" in logger.lines[0]


def test_figures_that_come_late(prompts):
    """On a GPU: the next step runs, and the request may be gone, when a step's figures are on the host."""
    first = run(prompts, scheduled({"a": 100}, [new("a", 200)]), sparse=[0])
    second = run(prompts, scheduled({"a": 100}, computed={"a": 100}), sparse=[0])
    run(prompts, scheduled({"b": 10}, [new("b", 10)], finished=["a"]), step_reason=SHORT)
    prompts.told(first, [pairs(100, 100)], [pairs(100, 100)])
    assert figures().prompts == {}
    prompts.told(second, [0], [pairs(100, 200)])
    assert figures().prompts == {"a": pairs(100, 100) / pairs(200, 200)}


@pytest.mark.parametrize("reason", ["below min_query_len", "the end of a prompt"])
def test_the_last_chunk_may_be_dense(prompts, reason):
    first = run(prompts, scheduled({"a": 100}, [new("a", 110)]), sparse=[0])
    run(prompts, scheduled({"a": 10}, computed={"a": 100}), dense={0: reason})
    assert figures().prompts == {}
    prompts.told(first, [50], [pairs(100, 100)])
    assert figures().prompts == {"a": (50 + pairs(10, 110)) / pairs(110, 110)}
    assert figures().density == 50 / pairs(100, 100), "what sparse attention did"


def test_an_aborted_prompt_has_no_density(prompts):
    run(prompts, scheduled({"a": 100}, [new("a", 200)]), sparse=[0], figures=([1], [2]))
    run(prompts, scheduled({"b": 10}, [new("b", 10)], finished=["a"]), step_reason=SHORT)
    assert figures().prompts == {}
    assert figures().tokens == {("sparse", ""): 100, ("dense", SHORT): 10}


def test_a_preempted_prompt_starts_again(prompts, again):
    run(prompts, scheduled({"a": 60}, [new("a", 200)]), dense={0: SHORT})
    first = run(prompts, scheduled({"a": 40}, computed={"a": 60}), sparse=[0])
    most = pairs(200, 200)
    run(prompts, again(200, 200), sparse=[0], figures=([most // 5], [most]))
    prompts.told(first, [9], [10])
    assert figures().prompts == {"a": 0.2}, "what was thrown away does not count for the prompt"
    assert figures().tokens == {("sparse", ""): 240, ("dense", SHORT): 60}, "but it was computed"


def test_what_was_cached_when_a_prompt_starts_again_counts_neither_way(prompts, logger, again):
    """Its own first chunk, most often."""
    run(prompts, scheduled({"a": 100}, [new("a", 250)]), dense={0: SHORT})
    run(prompts, again(50, 250, computed=100), dense={0: SHORT})
    most = pairs(100, 250)
    run(prompts, scheduled({"a": 100}, computed={"a": 150}), sparse=[0], figures=([0], [most]))
    assert figures().prompts == {"a": pairs(50, 150) / pairs(150, 250)}
    assert "cached=100 sparse=100 dense=50 " in logger.lines[0]


def test_a_long_answer_that_is_computed_anew_is_no_part_of_the_prompt(prompts, logger, again):
    """Nor is its prompt told of twice: chunks of the answer may be sparse, too."""
    run(prompts, scheduled({"a": 100}, [new("a", 100)]), sparse=[0], figures=([0], [pairs(100, 100)]))
    run(prompts, scheduled({"a": 1}, computed={"a": 100}))
    logger.lines.clear()
    first = run(prompts, again(100, 100), sparse=[0])
    second = run(prompts, scheduled({"a": 80}, computed={"a": 100}), sparse=[0])
    third = run(prompts, scheduled({"a": 70}, computed={"a": 180}), sparse=[0])
    prompts.told(first, [pairs(100, 100) // 2], [pairs(100, 100)])
    for done, most in ((second, pairs(80, 180)), (third, pairs(70, 250))):
        prompts.told(done, [0], [most])
    assert (logger.lines, figures().prompts) == ([], {"a": 0.0})
    assert figures().tokens == {("sparse", ""): 200}, "the prompt's own, twice"
    assert figures().causal == 2 * pairs(100, 100) + pairs(150, 250), "but S2O computed it"


def seen_in_the_histogram() -> float:
    """How many prompts."""
    (density,) = (m for m in read(place.figures_directory(), None) if m.name == DENSITY.name)
    return next(sample.value for sample in density.samples if sample.name == DENSITY.name + "_count")


def test_a_request_resumed_in_its_decode_is_computed_anew(prompts, logger, again):
    """Twice. What it had generated comes along, and is no part of the prompt."""
    run(prompts, scheduled({"a": 100}, [new("a", 100)]), sparse=[0], figures=([1], [2]))
    run(prompts, scheduled({"a": 1}, computed={"a": 100}))
    for length in (105, 110):
        run(prompts, again(length, 100), sparse=[0], figures=([1], [2]))
        run(prompts, scheduled({"a": 1}, computed={"a": length}))
    assert figures().tokens == {("sparse", ""): 300}
    assert (len(logger.lines), seen_in_the_histogram()) == (1, 1)


def test_figures_that_come_late_are_those_of_before_a_preemption(prompts, logger, again):
    first = run(prompts, scheduled({"a": 100}, [new("a", 100)]), sparse=[0])
    run(prompts, scheduled({"a": 1}, computed={"a": 100}))
    second = run(prompts, again(102, 100), sparse=[0])
    for done, visited in ((first, pairs(100, 100)), (second, 0)):
        prompts.told(done, [visited], [pairs(100, 100)])
    assert figures().prompts == {"a": 1.0}
    assert len(logger.lines) == 1


def test_a_prompt_that_is_stopped_ever_again_is_told_of_once(prompts, logger, again):
    """Before it is complete, in decode, and while it is computed anew."""
    run(prompts, scheduled({"a": 60}, [new("a", 100)]), dense={0: SHORT})
    for tokens in (60, 100, 70, 103):
        run(prompts, again(tokens, 100), sparse=[0], figures=([1], [2]))
    assert (len(logger.lines), seen_in_the_histogram()) == (1, 1)


@pytest.mark.parametrize(("mark", "reason"), [("off", OFF), ("dense", ASKED)])
def test_a_long_prompt_that_is_dense_by_decision(prompts, logger, mark, reason):
    prompts.begin(scheduled({"a": 100}, [new("a", 100, mark=mark)]), runner_v1("a"))
    (owner,) = prompts.rows(Common(), [100])
    assert owner.kept_dense == prompts.kept_dense() == reason
    prompts.note_dense(owner, reason)
    prompts.end()
    assert figures().tokens == {("dense", reason): 100}
    assert figures().prompts == {"a": 1.0}
    assert logger.lines == [f"s2o: request a prompt=100 cached=0 sparse=0 dense=100 density=1.000 ({reason})"]


def test_a_short_prompt_is_not_told_of(prompts, logger):
    run(prompts, scheduled({"a": 100}, [new("a", 100, mark="off")]), step_reason=SHORT)
    assert (figures().prompts, logger.lines) == ({}, [])
    assert figures().tokens == {("dense", SHORT): 100}


def test_a_mark_that_means_nothing_is_none(prompts):
    prompts.begin(scheduled({"a": 100}, [new("a", 100, mark="on")]), runner_v1("a"))
    assert prompts.rows(Common(), [100])[0].kept_dense is None


def test_each_request_of_a_step_has_its_path(prompts):
    output = scheduled({"d": 1, "a": 50, "b": 80, "c": 90}, [new("a", 50), new("b", 80), new("c", 90, mark="off")])
    run(prompts, output, sparse=[2], dense={1: SHORT, 3: OFF}, figures=([1620], [pairs(80, 80)]))
    assert figures().tokens == {("sparse", ""): 80, ("dense", SHORT): 50, ("dense", OFF): 90}
    assert figures().prompts == {"b": 0.5, "c": 1.0}


def test_a_group_that_is_sparse_speaks_for_all(prompts):
    """A model may have groups of layers, each with a builder: a request is counted once."""
    prompts.begin(scheduled({"a": 50, "b": 60}, [new("a", 50), new("b", 60)]), runner_v1("a", "b"))
    prompts.note_step("sliding window", sparse_layers=False)
    owners = prompts.rows(Common(), [50, 60])
    prompts.note_sparse([owners[1]], [60])
    prompts.note_dense(owners[0], SHORT)
    prompts.note_step("sliding window", sparse_layers=False)
    prompts.end()
    assert figures().tokens == {("sparse", ""): 60, ("dense", SHORT): 50}


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_layers_that_are_never_sparse_answer_last(prompts, order):
    prompts.begin(scheduled({"a": 50}, [new("a", 50)]), runner_v1("a"))
    for sparse_layers in order:
        prompts.note_step(SHORT if sparse_layers else "sliding window", sparse_layers)
    prompts.end()
    assert figures().tokens == {("dense", SHORT): 50}


def test_a_step_that_nobody_notes(prompts):
    run(prompts, scheduled({"a": 50}, [new("a", 50)]))
    assert figures().tokens == {("dense", UNKNOWN): 50}


def test_other_ranks_count_no_token_twice(prompts, counts, logger):
    counts[0] = False
    run(prompts, scheduled({"a": 50}, [new("a", 50)]), sparse=[0], figures=([1], [2]))
    assert figures().tokens == {}
    assert (figures().prompts, logger.lines) == ({}, [])
    assert figures().causal == 2, "another stage of a pipeline has pairs of its own"


def test_outside_a_step_nothing_is_noted(prompts):
    """Warm-up, and batches without requests."""
    assert prompts.rows(Common(), [5, 6]) == [None, None]
    assert prompts.kept_dense() is None
    prompts.note_sparse([None], [5])
    prompts.note_dense(None, SHORT)
    prompts.note_step(SHORT)
    prompts.end()
    assert figures().tokens == {}


def test_only_the_timed_layer_counts(prompts, monkeypatch):
    prompts.begin(scheduled({"a": 50}, [new("a", 50)]), runner_v1("a"))
    timed, other = (Step([], [], [], 1, (), laps=laps) for laps in (Laps(torch.device("cpu")), None))
    monkeypatch.setattr(Laps, "seconds", lambda self: (1.0, 4.0))
    for step in (timed, other):
        prompts.told(step, [], [])
    assert (figures().ranking_seconds, figures().attention_seconds, figures().ranking_share) == (1.0, 4.0, 0.25)


# -- whose a row is ---------------------------------------------------------------------------------------------------

TWO = runner_v2({7: "a", 3: "b"})


@pytest.mark.parametrize(
    ("runner", "common", "query_lens", "tokens", "expected"),
    [
        pytest.param(runner_v1("b", "a"), Common(), [1, 50], {"a": 50, "b": 1}, ["b", "a"], id="v1"),
        pytest.param(runner_v1("b", "a"), Common(), [1, 50, 0], {"a": 50, "b": 1}, ["b", "a", ""], id="v1-padded"),
        pytest.param(runner_v1("b", "a", "c"), Common(), [1, 50], {"a": 50, "b": 1}, ["b", "a"], id="v1-stale-rows"),
        pytest.param(runner_v1("b", "a"), Common(), [50], {"a": 50, "b": 1}, None, id="v1-a-micro-batch"),
        pytest.param(runner_v1("b", "a"), Common(), [1, 25, 25], {"a": 50, "b": 1}, None, id="v1-a-prompt-in-parts"),
        pytest.param(runner_v1("a", "b"), Common(), [1, 50], {"a": 50, "b": 1}, None, id="v1-another-order"),
        pytest.param(TWO, Common([3, 7]), [1, 50], {"a": 50, "b": 1}, ["b", "a"], id="v2"),
        pytest.param(TWO, Common([7, 3]), [50, 50], {"b": 50, "a": 50}, ["a", "b"], id="v2-tie"),
        pytest.param(TWO, Common([7]), [20], {"a": 50, "b": 1}, ["a"], id="v2-a-micro-batch"),
        pytest.param(runner_v2({7: "a"}), Common([7]), [50, 0], {"a": 50}, ["a", ""], id="v2-padded"),
        pytest.param(runner_v2({}), Common([7]), [50], {"a": 50}, [""], id="v2-gone"),
        pytest.param(
            runner_v2({}), Common(), [1, 50, 50], {"x": 50, "y": 1, "z": 50}, ["y", "x", "z"], id="v2-before-0.30"
        ),
        pytest.param(runner_v2({}), Common(), [1, 49], {"x": 50, "y": 1}, None, id="v2-before-0.30-unknown"),
    ],
)  # fmt: skip
def test_rows(runner, common, query_lens, tokens, expected):
    assert requests.row_requests(runner, common, query_lens, tokens) == expected


def test_rows_that_are_not_known_count_as_tokens(prompts):
    """Their prompts have no figures, and the tokens are as many."""
    output = scheduled({"a": 50, "b": 80}, [new("a", 50), new("b", 80)])
    prompts.begin(output, runner_v1("b", "a"))
    prompts.weigh("a group", 1)
    owners = prompts.rows(Common(), [50, 80])
    assert owners == [None, None]
    prompts.note_sparse([None], [80])
    prompts.note_sparse([None], [80])  # another group of layers, of the same rows
    assert prompts.expect([None]) == [None]
    prompts.note_step(SHORT)
    prompts.end()
    found = figures()
    assert sum(found.tokens.values()) == 130
    assert found.tokens["sparse", ""] == 80
    assert found.prompts == {}


def test_a_chunk_that_is_not_known_does_not_count_for_its_prompt(prompts):
    """How much of it was skipped, nobody knows; in a step without sparse rows, nothing was."""
    prompts.begin(scheduled({"a": 50, "b": 80}, [new("a", 200), new("b", 80)]), runner_v1("b", "a"))
    prompts.weigh("a group", 1)
    prompts.rows(Common(), [50, 80])
    prompts.note_sparse([None], [80])
    prompts.end()
    run(prompts, scheduled({"a": 50}, computed={"a": 50}), step_reason=SHORT)
    most = pairs(100, 200)
    run(prompts, scheduled({"a": 100}, computed={"a": 100}), sparse=[0], figures=([0], [most]))
    assert figures().prompts == {"a": pairs(50, 100) / pairs(150, 200)}


def test_a_decision_holds_where_rows_are_not_known(prompts):
    prompts.begin(scheduled({"a": 50, "b": 80}, [new("a", 50), new("b", 80, mark="off")]), runner_v1("b", "a"))
    assert prompts.rows(Common(), [50, 80]) == [None, None]
    assert prompts.kept_dense() == OFF
