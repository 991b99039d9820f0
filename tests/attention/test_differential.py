"""Any problem that hypothesis thinks of, against the oracle: `make test` looks at some, `make soak` at thousands.

The oracle decides with other sums than the implementations do, so that rankings are equal up to keys on the border of a
class, and stops up to gains on the threshold. Both are checked with what fp64 says of them, and nothing else may
differ:

    ranking     keys in the order of their fp64 classes, but those that rounding may move; neighbours by position
    attention   on the implementation's ranking, the oracle's stops and output; where a stop differs, fp64 must find the
                gain on the threshold, and the output is judged by fp64 attention over the keys that were visited

Drawn examples are the same in each run, but with VLLM_S2O_EXAMPLES, how many there shall be; a failure prints what
repeats it. For long runs on a GPU VLLM_S2O_KERNELS has few kernels compiled (`problems.few_kinds`).
"""

import contextlib
import math
import os

import pytest
import torch
from cases import DEVICE, make_case
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from poison import poison
from problems import FEW, Problem, problems

from vllm_s2o import S2OParams, attention, prefill_attention
from vllm_s2o.kernels import naive
from vllm_s2o.plan import WHOLE

EXAMPLES = int(os.environ.get("VLLM_S2O_EXAMPLES", 0))
CUDA = DEVICE.type == "cuda"
ANY_DTYPE = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What is read before it is written shall not be zeros by chance."""
    poison(monkeypatch)


def examples(usual: int, share: float = 1.0) -> settings:
    """How many of a test, and of a long run how large a share: its other examples would take as long as all else, but
    where few kernels are compiled."""
    share = 1.0 if FEW else share
    return settings(
        max_examples=max(round(EXAMPLES * share), 1) if EXAMPLES else usual,
        derandomize=not EXAMPLES, deadline=None, print_blob=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )  # fmt: skip


# -- tolerances -------------------------------------------------------------------------------------------------------


def unit(dtype) -> float:
    """How far a rounded number may be off, relative to it."""
    return torch.finfo(dtype).eps / 2


def output_bar(case) -> float:
    """Of weights that are rounded to the case's type and of logits that are summed in fp32, on the largest value."""
    values = case.value_cache[case.value_cache.isfinite()].abs().max().item() if case.lens and max(case.lens) else 0.0
    products = largest_logit(case)
    sums = 4 * unit(torch.float32) * (32 + math.sqrt(case.query.shape[2]) * products)
    rounded = 0.0 if case.query.dtype == torch.float32 else 3 * unit(case.query.dtype)
    return (sums + rounded) * values


def largest_logit(case) -> float:
    """At most: sizes of a query and a key, scaled."""
    keys = case.key_cache.float().square().sum(-1)
    keys = keys[keys.isfinite()]
    if not len(case.query) or not len(keys):
        return 0.0
    return case.scale * (case.query.float().norm(dim=-1).max() * keys.max().sqrt()).item()


# -- what fp64 says ---------------------------------------------------------------------------------------------------


def class_coordinates(problem, segment, ranking) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each history key, the class as a real number, and how far rounding may move it: `naive.importance_classes`."""
    case, params = problem.case, problem.params
    group = case.query.shape[1] // problem.num_rankings
    kv_head = ranking * case.key_cache.shape[2] // problem.num_rankings
    rows = slice(segment.query_row, segment.query_row + segment.num_queries)
    queries = case.query[rows, ranking * group : (ranking + 1) * group].flatten(0, 1).double()
    positions = torch.arange(segment.history, device=DEVICE)
    page = case.key_cache.shape[1]
    keys = case.key_cache[case.block_table[segment.seq, positions // page].long(), positions % page, kv_head].double()
    mean, variance = queries.mean(0), queries.var(0, correction=0)
    scores = keys @ mean + naive.DEVIATIONS * (keys.square() @ variance).sqrt()
    # The kernels keep the mean in the case's type, and variance and squares in bfloat16; in the interpreter in fp32.
    off = unit(torch.float32) * 4 * math.sqrt(keys.shape[1])
    spread = (keys.square() @ variance).sqrt()
    squares = off if case.query.dtype == torch.float32 or not CUDA else off + 2 * unit(torch.bfloat16)
    product = off if case.query.dtype == torch.float32 else off + 2 * unit(case.query.dtype)
    # A variance is a difference of squares around one of the queries.
    apart = (queries - queries[0]).square().mean(0)
    lost = (keys.square() @ apart) * 16 * unit(torch.float32) * math.sqrt(len(queries))
    error = product * keys.norm(dim=-1) * mean.norm()
    error += naive.DEVIATIONS * torch.maximum(
        squares * spread, torch.minimum(lost / spread.clamp(min=1e-30), lost.sqrt())
    )
    sample = scores[naive.FIRST_TOKENS :: naive.SAMPLE_EVERY]
    deviation = sample.std(correction=0)
    place = (scores - sample.mean()) / deviation.clamp(min=1e-20)
    moved = 4 * (error + error.max()) / deviation.clamp(min=1e-20)
    ends = [params.num_classes * torch.sigmoid(-naive.LOGISTIC * (place + side * moved)).sqrt() for side in (0, 1, -1)]
    return ends[0], torch.maximum((ends[1] - ends[0]).abs(), (ends[2] - ends[0]).abs()) + 1e-4


def assert_ranked(problem, segment, number, slots) -> None:
    case, page = problem.case, problem.case.key_cache.shape[1]
    positions = torch.arange(segment.history, device=DEVICE)
    history = naive.slots_of(case.block_table, segment.seq, positions, page)
    ranking = naive.ranking_of(slots, list(segment), number)
    assert torch.equal(ranking.sort().values, history.sort().values), "a permutation"
    at = torch.empty(int(history.max()) + 1, dtype=torch.int64, device=DEVICE)
    at[history.long()] = positions
    ranked = at[ranking.long()]
    coordinate, off = class_coordinates(problem, segment, number)
    most = problem.params.num_classes - 1
    low, high = ((coordinate + side * off).clamp(0, most).int() for side in (-1, 1))
    low[: naive.FIRST_TOKENS] = high[: naive.FIRST_TOKENS] = 0
    # A key may not stand before one whose class is lower in any case.
    worst_before = low[ranked].cummax(0).values
    assert (high[ranked] >= worst_before).all()
    sure = ranked[low[ranked] == high[ranked]]
    same = low[sure][1:] == low[sure][:-1]
    assert (sure.diff()[same] > 0).all(), "keys of one class keep the order of their positions"


class Tile:
    """One tile of one head in fp64: its logits over its own keys and over a ranking."""

    def __init__(self, case, params, segment, tile, head, ranking):
        group = case.query.shape[1] // case.key_cache.shape[2]
        page = case.key_cache.shape[1]
        places = torch.arange(tile.first, tile.first + tile.rows, device=DEVICE)
        self.rows = segment.query_row + places
        positions = segment.query_pos + places
        own = torch.arange(segment.history, int(positions.max()) + 1, device=DEVICE)
        slots = torch.cat([naive.slots_of(case.block_table, segment.seq, own, page).long(), ranking.long()])
        keys, values = (
            cache[slots // page, slots % page, head // group].double() for cache in (case.key_cache, case.value_cache)
        )
        self.logits = case.query[self.rows, head].double() @ keys.T * case.scale
        self.logits[:, : len(own)] = self.logits[:, : len(own)].masked_fill(own > positions[:, None], -math.inf)
        self.values, self.own, self.params, self.segment = values, len(own), params, segment
        self.inside = int((positions - segment.history + 1).sum())
        self.limit = segment.visit_limit if tile.share else segment.history

    def mass(self, seen: int, origin: torch.Tensor) -> torch.Tensor:
        return (self.logits[:, : self.own + seen] - origin[:, None]).exp().sum(1)

    def output(self, seen: int) -> torch.Tensor:
        return self.logits[:, : self.own + seen].softmax(1) @ self.values[: self.own + seen]

    def assert_may_stop_at(self, seen: int, threshold: float) -> None:
        """After each earlier step the gain reaches the threshold, after the last one it does not, up to rounding."""
        done, block = 0, self.params.key_block
        origin = self.logits.amax(1)
        while done < self.limit:
            before = self.mass(done, origin)
            now = min(block * naive.step_blocks(done // block, self.params.stop_interval), self.limit - done)
            assert done + now <= seen, "stopped between two tests"
            done += now
            gains = (1 - before / self.mass(done, origin)) / -(-now // block)
            judged = gains.max()
            # Sums and exponentials of fp32: of logits up to 100, with errors of 1e-5.
            slack = 1e-4 * threshold + 2e-5
            if done == seen:
                assert done == self.limit or judged < threshold + slack, f"stopped at a gain of {judged}"
                return
            assert judged >= threshold - slack, f"went on at a gain of {judged}"
        assert seen == self.limit == 0


# -- the comparison ---------------------------------------------------------------------------------------------------


def stages_of(problem, implementation):
    """Wave by wave, what the stages give: (wave, slots, output of this wave, pairs)."""
    case, params, stage = problem.case, problem.params, attention.stages(implementation, DEVICE)
    num_rankings = problem.num_rankings
    plan = attention.plan_step(case.query_lens, case.lens, params, num_rankings, prompt_lens=problem.prompt_lens)
    (thresholds,) = attention.device_thresholds([(params, case.query.shape[1])], DEVICE)
    query = case.query if case.query.stride(-1) == 1 else case.query.contiguous()
    for tables in attention.to_device(plan, DEVICE).waves:
        wave = tables.wave
        slots = stage.rank_keys(
            query, case.key_cache, case.block_table, tables.segments, wave.num_slots, params.num_classes,
            max_history=wave.max_history, groups=tables.groups, num_rankings=num_rankings,
        )  # fmt: skip
        rules = dict(
            scale=case.scale, key_block=params.key_block, stop_interval=params.stop_interval,
            tile_size=params.tile_size, num_rankings=num_rankings,
        )  # fmt: skip
        tensors = (case.key_cache, case.value_cache, case.block_table, tables.segments, tables.tiles, slots)
        out, expected = (torch.full(case.query.shape, math.nan, dtype=query.dtype, device=DEVICE) for _ in range(2))
        pairs = stage.attend(query, *tensors, thresholds, out, **rules).long()
        want = naive.attend(query, *tensors, thresholds, expected, **rules)
        yield wave, slots, thresholds.tolist(), (out, pairs), (expected, want)


def assert_like_the_oracle(problem, implementation) -> None:
    case, params = problem.case, problem.params
    out, stats = prefill_attention(
        **problem.arguments, out=problem.out, return_stats=True, implementation=implementation
    )
    assert out is problem.out and out.isfinite().all()
    again, stats_again = prefill_attention(**problem.arguments, return_stats=True, implementation=implementation)
    assert torch.equal(out, again) and torch.equal(stats.visited_pairs, stats_again.visited_pairs), "two runs differ"
    assert (stats.visited_pairs <= stats.causal_pairs).all()
    bar, num_rankings = output_bar(case), problem.num_rankings
    parts, visited, ties = torch.full_like(again, math.nan), torch.zeros_like(stats.visited_pairs), 0
    for wave, slots, thresholds, (mine, pairs), (expected, want) in stages_of(problem, implementation):
        for segment in wave.segments:
            for ranking in range(num_rankings if segment.history else 0):
                assert_ranked(problem, segment, ranking, slots)
        judged = torch.ones_like(mine[..., 0], dtype=torch.bool)
        for index, head in (pairs != want).nonzero().tolist():
            tile = wave.tiles[index]
            segment = wave.segments[tile.segment]
            ranking = naive.ranking_of(slots, list(segment), head * num_rankings // case.query.shape[1])
            exact = Tile(case, params, segment, tile, head, ranking)
            seen, rest = divmod(int(pairs[index, head]) - exact.inside, tile.rows)
            assert rest == 0
            exact.assert_may_stop_at(seen, thresholds[head] * (tile.share / WHOLE))
            assert (mine[exact.rows, head].double() - exact.output(seen)).abs().max() <= bar
            judged[exact.rows, head] = False
            ties += 1
        rows = ~mine.isnan().all(-1) & judged
        difference = (mine.float() - expected.float())[rows].abs()
        assert not len(difference) or difference.max() <= bar, f"{difference.max()} from the oracle, allowed {bar}"
        parts = torch.where(mine.isnan(), parts, mine)
        seqs = torch.tensor([wave.segments[tile.segment].seq for tile in wave.tiles], device=DEVICE)
        visited.index_add_(0, seqs, pairs)
    note(f"{ties} stops on the threshold")
    assert torch.equal(parts, again) and torch.equal(visited, stats.visited_pairs), "the function is its stages"
    assert_dense_heads(problem, again, stats, bar)


def assert_dense_heads(problem, out, stats, bar) -> None:
    """Heads whose threshold is 0 equal dense attention, and a budget visits its share."""
    case, params = problem.case, problem.params
    if params.budget is not None:
        return
    exact = None
    for head, threshold in enumerate(params.thresholds(case.query.shape[1])):
        if threshold:
            continue
        exact = naive.dense_attention(**case.arguments) if exact is None else exact
        assert torch.equal(stats.visited_pairs[:, head], stats.causal_pairs[:, head])
        assert not len(out) or (out[:, head].float() - exact[:, head]).abs().max() <= bar


def assert_alone(problem, implementation, seq: int) -> None:
    """A sequence by itself has the bits that it has beside others."""
    case = problem.case
    batch, stats = prefill_attention(**problem.arguments, return_stats=True, implementation=implementation)
    starts = case.query_start_loc.tolist()
    rows = slice(starts[seq], starts[seq + 1])
    alone = problem.arguments | {
        "query": case.query[rows], "block_table": case.block_table[seq : seq + 1],
        "query_start_loc": torch.tensor([0, rows.stop - rows.start], dtype=torch.int32, device=DEVICE),
        "seq_lens": case.seq_lens[seq : seq + 1],
        "prompt_lens": problem.prompt_lens and problem.prompt_lens[seq : seq + 1],
    }  # fmt: skip
    single, stats_single = prefill_attention(**alone, return_stats=True, implementation=implementation)
    assert torch.equal(single, batch[rows])
    assert torch.equal(stats_single.visited_pairs[0], stats.visited_pairs[seq])


def assert_more_for_less(problem, implementation) -> None:
    """A lower threshold visits no fewer keys: the ranking and the tests are the same."""
    params = problem.params
    if params.budget is not None:
        return
    lower = params.threshold
    lower = tuple(t / 2 for t in lower) if isinstance(lower, tuple) else lower / 2
    _, stats = prefill_attention(**problem.arguments, return_stats=True, implementation=implementation)
    arguments = problem.arguments | {"params": params.model_copy(update={"threshold": lower})}
    _, more = prefill_attention(**arguments, return_stats=True, implementation=implementation)
    assert (more.visited_pairs >= stats.visited_pairs).all()


@pytest.mark.skipif(CUDA, reason="the CPU path takes tensors of the CPU")
class TestCpu:
    @examples(60)
    @given(problems(ANY_DTYPE))
    def test_like_the_oracle(self, problem):
        assert_like_the_oracle(problem, "cpu")

    @examples(25, 0.25)
    @given(problems(ANY_DTYPE), st.data())
    def test_neighbours_and_thresholds(self, problem, data):
        assert_more_for_less(problem, "cpu")
        assert_alone(problem, "cpu", data.draw(st.integers(0, len(problem.case.lens) - 1)))


@pytest.mark.skipif(CUDA, reason="the kernels run on the GPU")
class TestInterpreter:
    """Triton's interpreter takes a second or two for what the CPU path computes in a hundredth."""

    @examples(4, 0.03)
    @given(problems((torch.float32, torch.float16), most=100, small=True))
    def test_like_the_oracle(self, problem):
        assert_like_the_oracle(problem, "triton")


@contextlib.contextmanager
def faults_named(problem, exit=pytest.exit):
    """After a fault on the device all fails in this process, the repetition of what failed too, and the first message
    would be lost: name the problem, and end."""
    try:
        yield
        if CUDA:
            torch.cuda.synchronize()
    except torch.AcceleratorError as error:
        exit(f"{str(error).splitlines()[0]} with {problem}", returncode=3)


@pytest.mark.gpu
@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("implementation", ["triton", "auto"])
class TestGpu:
    """Each new head size, page or rule is compiled: the first examples take the most time."""

    @examples(40, 0.1)
    @given(problems(ANY_DTYPE, most=900))
    def test_like_the_oracle(self, implementation, problem):
        with faults_named(problem):
            assert_like_the_oracle(problem, implementation)

    @examples(20, 0.05)
    @given(problems(ANY_DTYPE, most=900), st.data())
    def test_neighbours_and_thresholds(self, implementation, problem, data):
        with faults_named(problem):
            assert_more_for_less(problem, implementation)
            assert_alone(problem, implementation, data.draw(st.integers(0, len(problem.case.lens) - 1)))


def test_a_fault_is_told_with_its_problem():
    told = []
    case = make_case([3, 1], [5, 7], head_size=32)
    problem = Problem(case, S2OParams(threshold=0.25), torch.empty_like(case.query), [5, 9])
    with faults_named(problem, lambda line, returncode: told.append((line, returncode))):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nand more")
    ((line, status),) = told
    assert line.startswith("CUDA error: an illegal memory access was encountered with queries [3, 1] of [5, 7] tokens")
    assert "prompts [5, 9]" in line and "threshold=0.25" in line and "key [5, 16, 2, 32] by " in line
    assert status and "\n" not in line
