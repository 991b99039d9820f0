"""What is recorded is read back, and serving goes on where nothing can be recorded."""

import json
import os
import subprocess
import sys
import time

import pytest
from processes import ROOT

import vllm_s2o
from vllm_s2o.metrics import channel, place
from vllm_s2o.metrics.figures import ALL, LONGEST_ID, RECENT, Prompt, Recorder, figures


def prompt(name: str, visited: int = 1, causal: int = 4, **fields) -> Prompt:
    return Prompt(name, 100, 100, causal=causal, skipped=causal - visited, **fields)


@pytest.fixture
def recorder(logger):
    place.establish("some/model")
    return Recorder(logger)


def test_nothing_was_done_yet():
    empty = figures()
    assert (empty.tokens, empty.visited, empty.causal, empty.prompts, empty.configs) == ({}, 0, 0, {}, ())
    assert (empty.density, empty.ranking_share, empty.on) == (1.0, 0.0, True)


def test_every_series_is_there_from_the_start(recorder, logger):
    """A dashboard's query for a series that is missing shows nothing, not zero."""
    recorder.start("c0ffee", "default.yaml")
    shown = {sample.name for metric in channel.read(place.current(), logger) for sample in metric.samples}
    later = {"vllm_s2o_enabled", "vllm_s2o_recent_prompt_density"}
    assert shown == {name for series in ALL for name in series.shown} - later
    assert figures().configs == ("c0ffee",)
    assert figures().tokens == {("sparse", ""): 0}


def test_starting_again_changes_nothing(recorder):
    """vLLM makes builders several times."""
    recorder.start("c0ffee", "default.yaml")
    recorder.tokens(5, "sparse")
    recorder.start("c0ffee", "default.yaml")
    assert figures().tokens == {("sparse", ""): 5}
    assert figures().configs == ("c0ffee",)


def test_the_last_prompts_are_shown(recorder):
    for number in range(RECENT + 5):
        recorder.prompt(prompt(f"request-{number}", visited=number, causal=100))
    assert figures().prompts == {f"request-{n}": n / 100 for n in range(5, RECENT + 5)}


def test_a_client_may_choose_a_long_name(recorder):
    done = prompt("x" * 50_000)
    for _ in range(RECENT):
        recorder.prompt(done)
    (name,) = figures().prompts
    assert len(name) == LONGEST_ID
    assert len(done.line()) < 300


def test_a_very_long_name_costs_no_time():
    """Nothing of it is looked at but what is told."""
    done = prompt("\0" * 50_000_000)
    began = time.monotonic()
    assert len(done.name) < 6 * LONGEST_ID
    assert time.monotonic() - began < 1


def test_long_names_are_told_apart(recorder):
    """By what vLLM puts at their ends."""
    recorder.prompt(prompt("x" * 200 + "-0-1a2b3c4d"))
    recorder.prompt(prompt("x" * 200 + "-0-5e6f7a8b"))
    first, second = figures().prompts
    assert first.startswith("x" * 90) and first.endswith("x-0-1a2b3c4d") and second.endswith("x-0-5e6f7a8b")


@pytest.mark.parametrize("char", ["\n", "\r", "\x1b", "\0", "\u2028", "\u202e", "\ud800"])
def test_a_name_is_one_line_whatever_a_client_puts_into_it(recorder, char):
    done = prompt(f"mine{char}s2o: request forged")
    assert done.line().isprintable()
    assert done.line().startswith("s2o: request mine\\") and char not in done.line()
    recorder.prompt(done)
    (name,) = figures().prompts
    assert name.isprintable() and name.endswith("s2o: request forged")


TWO_THREADS = """
import json, logging, sys, threading
from vllm_s2o.metrics import place
from vllm_s2o.metrics.channel import read
from vllm_s2o.metrics.figures import DENSITY, RECENT, Prompt, Recorder, figures

lines = []
logger = logging.Logger("figures")
logger.warning = lambda line, *values: lines.append(line % values)
directory = place.establish("some/model")
recorder = Recorder(logger)
recorder.start("c0ffee", "default.yaml")
sys.setswitchinterval(1e-5)

def tell(thread):
    for number in range(400):
        recorder.prompt(Prompt(f"{thread}-{number}", 10, 10, causal=4, skipped=3))

threads = [threading.Thread(target=tell, args=(name,)) for name in "ab"]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
told = [sample for metric in read(directory, logger) for sample in metric.samples]
(count,) = [sample.value for sample in told if sample.name == DENSITY.name + "_count"]
last = [dict(labels)["request_id"] for labels, _ in recorder._recent]
unfinished = [file.name for file in directory.iterdir() if file.suffix == ".new"]
print(json.dumps([lines, count, sorted(figures().prompts) == sorted(last), len(last) == RECENT, unfinished]))
"""


def test_prompts_are_told_by_two_threads(machine):
    """On a GPU: by the one that runs the steps, and by the one that waits for figures. In a process of its own: writing
    to a mapped file that somebody cuts would end it."""
    ended = subprocess.run(
        [sys.executable, "-P", "-c", TWO_THREADS], capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(machine)},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == [[], 800, True, True, []]


def test_figures_of_another_process_are_read(recorder):
    recorder.pairs(3, 12)
    assert figures(place.current()).density == 0.25


def test_the_packages_names_lead_there():
    assert vllm_s2o.figures is figures
    with pytest.raises(LookupError, match="no engine with the S2O backend"):
        vllm_s2o.set_switch(False)


# -- where nothing can be recorded ------------------------------------------------------------------------------------


def record_everything(recorder):
    recorder.start("c0ffee", "default.yaml")
    recorder.tokens(5, "sparse")
    recorder.pairs(1, 2)
    recorder.seconds(1.0, 2.0)
    recorder.prompt(prompt("a"))


def test_without_a_directory_figures_are_forgotten(logger):
    record_everything(Recorder(logger))
    assert logger.lines == ["s2o: no figures are kept: there is no directory for them."]


def test_a_directory_that_goes_away_ends_the_figures_alone(recorder, logger):
    recorder.start("c0ffee", "default.yaml")
    directory = place.current()
    for file in directory.iterdir():
        file.unlink()
    directory.rmdir()
    record_everything(recorder)
    record_everything(recorder)
    (line,) = logger.lines
    assert line.startswith("s2o: no more figures are kept (")


def test_threads_that_find_the_same_say_it_once(recorder, logger):
    """Each has begun before the other one found that nothing can be kept."""
    recorder.start("c0ffee", "default.yaml")
    for _ in range(2):
        with recorder._kept():
            raise OSError(28, "No space left on device")
    assert logger.lines == ["s2o: no more figures are kept ([Errno 28] No space left on device)."]


def test_a_full_disk_ends_the_figures_alone(recorder, logger, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(channel.os, "posix_fallocate", full)
    record_everything(recorder)
    assert logger.lines == ["s2o: no more figures are kept ([Errno 28] No space left on device)."]
