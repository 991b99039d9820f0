"""What one process counts, another one reads: also through prometheus_client alone, as vLLM does."""

import os
import subprocess
import sys
import threading

import pytest
from processes import ROOT
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.parser import text_string_to_metric_families

from vllm_s2o.metrics import channel
from vllm_s2o.metrics.channel import SIZE, Collector, Series, Writer, read, write_alone

COUNT = Series("counter", "count", "How many.", ("kind",))
SPREAD = Series("histogram", "spread", "How much.", buckets=(0.5, 1.0))
LEVEL = Series("gauge", "level", "How high.", ("who",))


def samples(text: str) -> dict[tuple, float]:
    """What Prometheus makes of an answer."""
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, *sorted(sample.labels.values())] = sample.value
    return found


def scraped(directory, logger, **how) -> dict[tuple, float]:
    registry = CollectorRegistry()
    registry.register(Collector(directory, logger))
    return samples(generate_latest(registry).decode())


def merged_by_the_library(directory) -> dict[tuple, float]:
    """/metrics of vLLM with several API servers."""
    registry = CollectorRegistry()
    MultiProcessCollector(registry, str(directory))
    return samples(generate_latest(registry).decode())


@pytest.fixture
def two(tmp_path) -> tuple[Writer, Writer]:
    """Two processes, as far as the files know."""
    return Writer(tmp_path, "1"), Writer(tmp_path, "2")


def test_counts_of_processes_are_added(two, tmp_path, logger):
    first, second = two
    first.add(COUNT, 3, kind="a")
    first.add(COUNT, 4, kind="a")
    second.add(COUNT, 5, kind="a")
    second.add(COUNT, 0, kind="b")
    expected = {("count_total", "a"): 12, ("count_total", "b"): 0}
    assert scraped(tmp_path, logger) == merged_by_the_library(tmp_path) == expected
    assert COUNT.shown == ("count_total",)


def test_values_fall_into_buckets(two, tmp_path, logger):
    first, second = two
    first.observe(SPREAD, None)
    empty = scraped(tmp_path, logger)
    assert set(empty.values()) == {0}
    for value in (0.25, 0.5, 0.75):
        first.observe(SPREAD, value)
    for value in (1.0, 7.0):
        second.observe(SPREAD, value)
    expected = {
        ("spread_bucket", "0.5"): 2, ("spread_bucket", "1.0"): 4, ("spread_bucket", "+Inf"): 5,
        ("spread_sum",): 9.5, ("spread_count",): 5,
    }  # fmt: skip
    assert scraped(tmp_path, logger) == merged_by_the_library(tmp_path) == expected
    assert {name for name, *_ in expected} == set(SPREAD.shown)
    assert set(empty) == set(expected)


def test_gauges_have_no_process(two, tmp_path, logger):
    first, second = two
    first.set(LEVEL, 1, who="a")
    second.set(LEVEL, 1, who="a")
    second.set(LEVEL, 7, who="b")
    second.set(LEVEL, 3, who="b")
    assert scraped(tmp_path, logger) == merged_by_the_library(tmp_path) == {("level", "a"): 1, ("level", "b"): 3}


def test_a_gauge_of_its_own_forgets_what_it_showed(tmp_path, logger):
    for values in ([("a", 1), ("b", 2)], [("b", 3), ("c", 4)]):
        write_alone(tmp_path, "1-last", LEVEL, [({"who": who}, value) for who, value in values])
    assert scraped(tmp_path, logger) == merged_by_the_library(tmp_path) == {("level", "b"): 3, ("level", "c"): 4}
    assert len(list(tmp_path.iterdir())) == 1, "no unfinished file stays"


def test_what_another_process_wrote_is_read_while_it_writes(tmp_path, logger):
    code = """
import sys
from pathlib import Path
from vllm_s2o.metrics.channel import Series, Writer
writer = Writer(Path(sys.argv[1]), "other")
writer.add(Series("counter", "count", "How many.", ("kind",)), 42, kind="a")
print(flush=True)
sys.stdin.read()
"""
    other = subprocess.Popen(
        [sys.executable, "-P", "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        other.stdout.readline()
        assert scraped(tmp_path, logger) == {("count_total", "a"): 42}
    finally:
        other.communicate(timeout=60)
    assert scraped(tmp_path, logger) == {("count_total", "a"): 42}, "what a process counted outlives it"


def test_threads_lose_nothing(tmp_path, logger):
    writer = Writer(tmp_path, "1")

    def count():
        for _ in range(2000):
            writer.add(COUNT, 1, kind="a")

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scraped(tmp_path, logger) == {("count_total", "a"): 8000}


CUTS = """
import sys, threading
from pathlib import Path
from vllm_s2o.metrics.channel import Series, write_alone
level, failed = Series("gauge", "level", "How high.", ("who",)), []

def write(thread):
    try:
        for number in range(1000):
            write_alone(Path(sys.argv[1]), "1-last", level, [({"who": f"{thread}{i}"}, number) for i in range(16)])
    except Exception as error:
        failed.append(error)

threads = [threading.Thread(target=write, args=(name,)) for name in "ab"]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(repr(failed) if failed else 0)
"""


def test_threads_cut_no_file_that_another_one_writes(tmp_path, logger):
    """It would end the process: this one is for that."""
    ended = subprocess.run(
        [sys.executable, "-P", "-c", CUTS, str(tmp_path)], env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    (file,) = tmp_path.iterdir()
    assert set(scraped(tmp_path, logger).values()) == {999}
    assert file.stat().st_size == SIZE


def test_what_is_not_finished_leaves_nothing(tmp_path):
    """And takes nothing away."""

    def values():
        yield {"who": "a"}, 2
        raise OSError("gone")

    write_alone(tmp_path, "1-last", LEVEL, [({"who": "a"}, 1)])
    (before,) = tmp_path.iterdir()
    content = before.read_bytes()
    with pytest.raises(OSError, match="gone"):
        write_alone(tmp_path, "1-last", LEVEL, values())
    assert list(tmp_path.iterdir()) == [before]
    assert before.read_bytes() == content


def test_files_are_reserved(tmp_path):
    """Writing to a hole in a mapped file, on a full disk, would end the process."""
    Writer(tmp_path, "1").add(COUNT, 1, kind="a")
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == SIZE
    assert file.stat().st_blocks * 512 >= SIZE


def test_a_disk_that_is_full_is_said_when_files_are_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        Writer(tmp_path, "1").add(COUNT, 1, kind="a")
    assert list(tmp_path.iterdir()) == []


# -- what is broken ---------------------------------------------------------------------------------------------------


BROKEN = {
    "empty": b"",
    "short": b"\x10",
    "zeros": bytes(SIZE),
    "noise": bytes(range(256)) * 256,
    "longer than it is": (2**31 - 1).to_bytes(4, "little") + bytes(100),
    "no JSON": (48).to_bytes(4, "little") + bytes(4) + (20).to_bytes(4, "little") + b"x" * 20 + bytes(24),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_takes_no_other_figure_away(tmp_path, logger, content):
    Writer(tmp_path, "1").add(COUNT, 3, kind="a")
    (tmp_path / "counter_s2o-2.db").write_bytes(content)
    for _ in range(2):
        assert scraped(tmp_path, logger) == {("count_total", "a"): 3}
    told = [line for line in logger.lines if "counter_s2o-2.db cannot be read" in line]
    assert len(told) == (content != BROKEN["zeros"]), "once, and not of a file that is merely empty"


def test_what_is_no_file_is_not_opened(tmp_path, logger):
    """Opening a pipe would wait for a writer."""
    os.mkfifo(tmp_path / "counter_s2o-2.db")
    (tmp_path / "gauge_max_s2o-3.db").mkdir()
    Writer(tmp_path, "1").add(COUNT, 3, kind="a")
    assert scraped(tmp_path, logger) == {("count_total", "a"): 3}


def test_a_directory_that_is_gone_has_no_figures(tmp_path, logger):
    assert scraped(tmp_path / "gone", logger) == {}


def test_a_file_that_goes_while_it_is_looked_at_does_no_harm(tmp_path, logger, monkeypatch):
    Writer(tmp_path, "1").add(COUNT, 3, kind="a")
    merge = MultiProcessCollector.merge

    def gone(files):
        for file in files[:1]:
            os.unlink(file)
        return merge(files)

    monkeypatch.setattr(channel.MultiProcessCollector, "merge", gone)
    assert scraped(tmp_path, logger) == {}


def test_registering_reads_nothing(tmp_path, logger, monkeypatch):
    monkeypatch.setattr(channel, "read", lambda *_: pytest.fail("files were read"))
    CollectorRegistry(auto_describe=True).register(Collector(tmp_path, logger))


def test_files_of_others_are_left_alone(tmp_path, logger):
    """vLLM's directory holds its own."""
    Writer(tmp_path, "1").add(COUNT, 3, kind="a")
    theirs = tmp_path / "counter_77.db"
    theirs.write_bytes((tmp_path / "counter_s2o-1.db").read_bytes())
    assert {s.value for metric in read(tmp_path, logger) for s in metric.samples} == {3}
    (tmp_path / "gauge_max_s2o-1-prompts.1-beef.new").touch()  # of a process that was killed just then
    channel.remove(tmp_path, lambda name: name == "")
    assert list(tmp_path.iterdir()) == [theirs]


def test_files_of_servers_that_live_are_left_alone(tmp_path, logger):
    """A directory of the user's may have several, and what some of them left that were killed."""
    for server, count in (("12-ab", 3), ("12-abc", 4), ("7-00ff", 5)):
        Writer(tmp_path, f"{server}-12").add(COUNT, count, kind="a")
        write_alone(tmp_path, f"{server}-switch", LEVEL, [({"who": "a"}, count)])
    (tmp_path / "gauge_max_s2o-12-ab-12-prompts.9-beef.new").touch()
    channel.remove(tmp_path, lambda name: name == "12-ab")
    assert scraped(tmp_path, logger) == {("count_total", "a"): 9, ("level", "a"): 5}
    assert not list(tmp_path.glob("*12-ab-*"))
    assert {s.value for metric in read(tmp_path, logger, "12-abc-") for s in metric.samples} == {4}
