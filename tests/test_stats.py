"""Steps counted layer by layer, and told to the log no more often than it bears."""

import contextlib
import os
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from vllm_s2o.stats import Laps, Reporter, Step
from vllm_s2o.step_log import Prefill, Totals, pairs, prefills


def step(query_lens=(100, 50), seq_lens=(300, 50), causal_pairs=(800, 200), num_layers=3, **fields) -> Step:
    rows = tuple(range(len(query_lens)))
    return Step(list(query_lens), list(seq_lens), list(causal_pairs), num_layers, rows, **fields)


def finished(visited: int, causal: int = 1000, heads: int = 2, tokens: int = 100) -> tuple[Step, list[int]]:
    """A step of one sparse layer, and the pairs that its heads visited together."""
    done = step([tokens], [tokens], [causal], num_layers=1)
    assert done.sparse_layer(torch.tensor([[visited // heads] * heads]))
    return done, [visited]


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_step_is_done_with_its_last_layer():
    counted = step(num_layers=3)
    assert not counted.sparse_layer(torch.tensor([[5, 7], [0, 1]]))
    assert not counted.dense_layer()
    assert counted.sparse_layer(torch.tensor([[10, 20], [30, 40]]))
    assert (counted.done, counted.sparse, counted.heads) == (3, 2, 4)
    assert counted.visited.tolist() == [42, 71]


def test_a_step_keeps_its_figures_on_the_device():
    """A number on the host would make each layer wait for its kernels."""
    counted = step()
    counted.sparse_layer(torch.tensor([[1, 2]]))
    assert isinstance(counted.visited, torch.Tensor)
    assert counted.visited.dtype == torch.int64


def test_a_line_says_all(clock):
    lines = []
    reporter = Reporter(lines.append)
    counted = step(num_layers=3)
    counted.sparse_layer(torch.tensor([[300, 500], [0, 0]]))
    counted.dense_layer()
    counted.sparse_layer(torch.tensor([[400, 600], [100, 100]]))
    reporter.finish(counted)
    assert lines == [
        "s2o: prefill query=100,50 seq=300,50 density=0.500 sparse_layers=2/3 | "
        f"total steps=1 tokens=150 density=0.500 pairs=2000/4000 process={os.getpid()}"
    ]


def test_a_line_is_read_back(clock):
    lines = []
    Reporter(lines.append).tell(*finished(1500))
    Reporter(lines.append).tell(step(), None)
    assert prefills("\n".join(["INFO something else", *lines, ""])) == [
        Prefill((100,), (100,), 0.75, 1, 1, 1500, 2000, os.getpid()),
        Prefill((100, 50), (300, 50), 1.0, 0, 3, 0, 0, os.getpid()),
    ]


def test_totals_of_several_processes_add_up(clock, monkeypatch):
    """Engines of a data-parallel server, or stages of a pipeline, write one log."""
    lines, reporters = [], {process: Reporter(lambda line: lines.append(line + "\n")) for process in (7, 8)}

    def tell(process, visited):
        monkeypatch.setattr(os, "getpid", lambda: process)
        clock[0] += 1
        reporters[process].tell(*finished(visited))

    for process, visited in ((7, 1000), (8, 100), (7, 300)):
        tell(process, visited)
    since = len("".join(lines))
    assert pairs("".join(lines)) == (1400, 6000)
    for process, visited in ((7, 200), (8, 10), (7, 20), (8, 5)):
        tell(process, visited)
    assert pairs("".join(lines), since) == (235, 8000)
    assert pairs("nothing") == (0, 0)


def test_a_batch_of_many_rows_stays_short(clock):
    lines = []
    Reporter(lines.append).tell(step(range(10, 19), range(20, 29), [0] * 9), None)
    assert "query=10,11,12,13,14,15,16,17,... seq=20,21,22,23,24,25,26,27,... " in lines[0]


def test_lines_keep_a_distance_and_totals_miss_nothing(clock):
    lines = []
    reporter = Reporter(lines.append, interval=1.0)
    reporter.tell(*finished(200))
    clock[0] += 0.5
    reporter.tell(*finished(400))
    clock[0] += 0.25
    reporter.tell(*finished(600))
    assert len(lines) == 1
    clock[0] += 0.25
    reporter.tell(*finished(1200, tokens=7))
    assert len(lines) == 2
    assert "query=7 seq=7 density=0.600" in lines[1]
    assert "total steps=4 tokens=307 density=0.300 pairs=2400/8000 process=" in lines[1]
    assert reporter.totals == Totals(steps=4, tokens=307, visited=2400, causal=8000)


def test_the_last_figures_of_a_burst_are_told_after_it():
    lines = []
    reporter = Reporter(lines.append, interval=0.1)
    for tokens in (1, 2, 3):
        reporter.tell(*finished(200, tokens=tokens))
    assert len(lines) == 1
    deadline = time.monotonic() + 30
    while len(lines) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "query=3 " in lines[1]
    assert "total steps=3 tokens=6 " in lines[1]


def test_the_first_step_is_told_whatever_the_clock_says(clock):
    """The clock may start at any number, zero included."""
    clock[0] = 0.0
    lines = []
    Reporter(lines.append).tell(*finished(200))
    assert len(lines) == 1


def test_density_weighs_steps_by_their_pairs(clock):
    reporter = Reporter(lambda line: None)
    reporter.tell(*finished(100, causal=50))
    reporter.tell(*finished(180, causal=450))
    assert reporter.totals.density == pytest.approx(280 / 1000)
    assert Totals().density == 1.0


def test_nearly_all_pairs_are_not_all_of_them(clock):
    """Else a log could not show that nothing was skipped."""
    lines = []
    reporter = Reporter(lines.append, interval=0)
    reporter.tell(*finished(1_999_998, causal=1_000_000))
    reporter.tell(*finished(2_000_000, causal=1_000_000))
    assert [step.density for step in prefills("\n".join(lines))] == [0.999, 1.0]
    assert [line.split(" ")[-3] for line in lines] == ["density=0.999", "density=0.999"]


def test_a_step_of_dense_layers_alone(clock):
    """It has no pairs to divide by, adds its tokens, and leaves the density of the sparse layers as it was."""
    lines = []
    reporter = Reporter(lines.append, interval=0)
    reporter.tell(*finished(500))
    counted = step(num_layers=2)
    assert not counted.dense_layer()
    assert counted.dense_layer()
    reporter.finish(counted)
    assert "density=1.000 sparse_layers=0/2 | total steps=2 tokens=250 density=0.250" in lines[1]


# -- by row -----------------------------------------------------------------------------------------------------------


def test_rows_are_told_apart():
    """Rows of the batch that are dense have figures of nobody."""
    told = []
    reporter = Reporter(lambda line: None, record=lambda *figures: told.append(figures))
    counted = Step([100, 50], [300, 50], [800, 200], 2, (1, 3), prompts=["one", "other"])
    counted.sparse_layer(torch.tensor([[0, 0], [100, 300], [0, 0], [20, 30]]))
    counted.sparse_layer(torch.tensor([[0, 0], [1, 1], [0, 0], [2, 2]]))
    reporter.finish(counted)
    assert told == [(counted, [402, 54], [3200, 800])]
    assert (reporter.totals.visited, reporter.totals.causal) == (456, 4000)


def test_a_step_of_dense_layers_has_no_pairs():
    told = []
    reporter = Reporter(lambda line: None, record=lambda *figures: told.append(figures))
    counted = step(num_layers=1)
    counted.dense_layer()
    reporter.finish(counted)
    assert told == [(counted, [0, 0], [0, 0])]


def test_the_same_rows_for_other_layers():
    counted = step(num_layers=1, prompts=["one", "other"], timed=0)
    counted.sparse_layer(torch.tensor([[1], [2]]))
    other = counted.again(3)
    assert (other.num_layers, other.done, other.sparse, other.heads, other.visited) == (3, 0, 0, 0, None)
    assert (other.query_lens, other.rows, other.prompts) == (counted.query_lens, counted.rows, counted.prompts)
    assert counted.done == 1


# -- time -------------------------------------------------------------------------------------------------------------


def test_one_layer_of_a_step_is_timed():
    counted = step(num_layers=3, timed=1)
    clocks = []
    for _ in range(3):
        clocks.append(counted.clock(torch.device("cpu")))
        counted.sparse_layer(torch.tensor([[1], [2]]))
    assert [clock is not None for clock in clocks] == [False, True, False]
    assert counted.laps is clocks[1]


def test_laps_part_ranking_from_the_rest(monkeypatch):
    now = iter([10.0, 11.0, 14.0, 20.0, 20.5, 22.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    laps = Laps(torch.device("cpu"))
    for _ in range(6):  # two waves
        laps.lap()
    assert laps.seconds() == (1.5, 6.0), "what happens between two waves is neither"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="times a CUDA device")
def test_laps_on_a_gpu_measure_what_runs_there():
    laps = Laps(torch.device("cuda"))
    work = torch.ones(4096, 4096, device="cuda")
    work @ work
    torch.cuda.synchronize()
    laps.lap()
    for _ in range(20):
        work @ work
    laps.lap()
    work @ work
    laps.lap()
    torch.cuda.synchronize()
    ranking, total = laps.seconds()
    assert 0 < total - ranking < ranking < total


def test_the_thread_outlives_an_error(monkeypatch):
    """Else later steps would wait for it, each with pinned memory. What fails may fail each time: it is said once."""
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    lines, told = [], []

    def record(done, visited, causal):
        told.append(visited)
        if len(told) < 4:
            raise ValueError(f"step {len(told)}")
        if len(told) == 4:
            raise LookupError("another kind")

    reporter = Reporter(lines.append, interval=0, record=record)
    threading.Thread(target=reporter._drain, daemon=True).start()
    copied = SimpleNamespace(synchronize=lambda: None)
    for visited in range(100, 700, 100):
        done, by_row = finished(visited)
        reporter._pending.put((done, torch.tensor(by_row), copied, None))
    deadline = time.monotonic() + 10
    while len(lines) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert told == [[100], [200], [300], [400], [500], [600]]
    first, second, *steps = lines
    assert first.startswith("s2o: figures of a step are lost (ValueError('step 1'), ")
    assert "test_stats.py:" in first
    assert second.startswith("s2o: figures of a step are lost (LookupError('another kind'), ")
    assert [step.density for step in prefills("\n".join(steps))] == [0.25, 0.3]


def test_the_thread_outlives_a_log_that_fails(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    told = []

    def log(line):
        raise ValueError(line)

    reporter = Reporter(log, interval=0, record=lambda *figures: told.append(figures))
    threading.Thread(target=reporter._drain, daemon=True).start()
    for _ in range(3):
        done, by_row = finished(100)
        reporter._pending.put((done, torch.tensor(by_row), SimpleNamespace(synchronize=lambda: None), None))
    deadline = time.monotonic() + 10
    while len(told) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(told) == 3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="copies from a CUDA device")
def test_figures_on_a_gpu_are_told_by_a_thread():
    lines = []
    reporter = Reporter(lines.append, interval=0)
    for visited in (500, 1500):
        done, _ = finished(visited)
        done.visited = done.visited.cuda()
        reporter.finish(done)
    deadline = time.monotonic() + 30
    while len(lines) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert "density=0.250" in lines[0]
    assert "density=0.750" in lines[1]
    assert reporter.totals.visited == 2000
