"""Where a configuration with the flag is read: a place for figures and the switch, whatever stands in its way."""

import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from entering import carried, decided
from processes import ROOT
from prometheus_client import CollectorRegistry
from prometheus_client.multiprocess import MultiProcessCollector
from vllm.ray.ray_env import get_env_vars_to_copy
from vllm_configs import configured

from vllm_s2o import metrics
from vllm_s2o.metrics import place, switch
from vllm_s2o.metrics.figures import figures
from vllm_s2o.metrics.switch import set_switch

RAY_COPIES = "VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"


def test_a_server_shows_its_figures_from_the_start(monkeypatch, logger):
    registry = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", registry)
    monkeypatch.setattr(metrics, "_shown", set())
    for _ in range(2):  # vLLM makes several configurations
        metrics.begin("some/model", logger)
    assert registry.get_sample_value("vllm_s2o_enabled") == 1.0
    set_switch(False)
    metrics.begin("some/model", logger)
    assert registry.get_sample_value("vllm_s2o_enabled") == 0.0, "a later configuration does not switch"


def test_with_several_api_servers_vllm_collects(monkeypatch, tmp_path, logger):
    registry = CollectorRegistry()
    monkeypatch.setattr("prometheus_client.REGISTRY", registry)
    monkeypatch.setattr(metrics, "_shown", set())
    monkeypatch.setenv(place.MERGED, str(tmp_path))
    stale = tmp_path / "counter_s2o-1.db"
    stale.touch()
    (tmp_path / "counter_1.db").touch()
    metrics.begin("some/model", logger)
    assert not stale.exists()
    assert sorted(path.name for path in tmp_path.glob("*.db")) == [
        "counter_1.db", f"gauge_max_s2o-{place.here().name}-switch.db"
    ]  # fmt: skip
    assert list(registry.collect()) == []
    assert figures().on
    set_switch(False)
    assert not figures().on


SERVER = """
import logging, sys, tempfile
tempfile.tempdir = sys.argv[1]
from vllm_s2o import metrics
from vllm_s2o.metrics.figures import Recorder, figures

logger = logging.Logger("figures")
metrics.begin(sys.argv[2], logger)
recorder = Recorder(logger)
recorder.start("c0ffee", "default.yaml")
for line in sys.stdin:
    recorder.tokens(int(line), "sparse")
    print(sum(figures().tokens.values()), flush=True)
"""


class Beside:
    """A server in a process of its own, with its figures in a directory that the user names."""

    def __init__(self, machine, shared, name):
        env = os.environ | {"PYTHONPATH": str(ROOT), place.MERGED: str(shared)}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", SERVER, str(machine), name], env=env, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def counts(self, tokens: int) -> int:
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self, sign: int | None = None) -> None:
        if sign is not None:
            self.process.send_signal(sign)
        self.process.communicate(timeout=60)


def test_servers_that_share_a_directory_keep_their_own_figures(machine, tmp_path):
    """It is the user's. One that starts takes away what others left that were killed, and one that ends its own."""

    def told() -> float:
        registry = CollectorRegistry()
        MultiProcessCollector(registry, str(tmp_path))
        return registry.get_sample_value("vllm_s2o_prefill_tokens_total", {"path": "sparse", "reason": ""}) or 0.0

    killed = Beside(machine, tmp_path, "killed")
    assert killed.counts(1000) == 1000
    killed.end(signal.SIGKILL)
    assert told() == 1000
    first = Beside(machine, tmp_path, "first")
    assert first.counts(30) == 30 == told()
    second = Beside(machine, tmp_path, "second")
    assert (second.counts(7), first.counts(2)) == (7, 32), "to each its own"
    assert told() == 39, "what the directory adds up to"
    second.end()
    assert told() == 32
    first.end()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "named"),
    [(None, "S2O_SERVER"), ("MINE, YOURS,", "MINE,YOURS,S2O_SERVER"), ("S2O_SERVER,MINE", "S2O_SERVER,MINE")],
)
def test_actors_of_ray_are_told_of_the_server(monkeypatch, logger, given, named):
    """Ray may have run before it."""
    monkeypatch.setenv(RAY_COPIES, given or "")
    if given is None:
        monkeypatch.delenv(RAY_COPIES)
    for _ in range(2):
        metrics.begin("some/model", logger)
    assert os.environ[RAY_COPIES] == named
    assert {place.VARIABLE, *named.split(",")} <= get_env_vars_to_copy()


def test_an_actor_of_ray_belongs_to_the_server(monkeypatch, logger, server):
    """vLLM reads the configuration again in an engine that is one."""
    monkeypatch.setattr(place, "_mine", None)  # another process made it
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(
        is_initialized=lambda: True, get_runtime_context=lambda: SimpleNamespace(get_actor_id=lambda: "an id"))
    )  # fmt: skip
    metrics.begin("some/model", logger)
    assert os.environ[place.VARIABLE] == str(server.directory)


def test_a_machine_without_a_place_serves_all_the_same(logger):
    place.base().touch()
    metrics.begin("some/model", logger)
    (line,) = logger.lines
    assert line.startswith("s2o: no figures and no switch: ")
    assert place.here() is None and place.running() == []
    assert carried(decided(configured())) is None


def test_figures_that_cannot_be_removed_leave_the_switch(logger, monkeypatch, tmp_path):
    monkeypatch.setenv(place.MERGED, str(tmp_path))
    (tmp_path / "counter_s2o-1.db").mkdir()  # cannot be unlinked
    metrics.begin("some/model", logger)
    (line,) = logger.lines
    assert line.startswith(f"s2o: /metrics counts what an earlier server left in {tmp_path}: ")
    set_switch(False)
    assert not place.here().on


def test_figures_that_cannot_be_written_leave_the_switch(logger, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(switch, "write_alone", full)
    metrics.begin("some/model", logger)
    assert [line.split(", ")[0] for line in logger.lines] == ["s2o: new prompts are sparse"]
    set_switch(False)
    assert not place.here().on and carried(decided(configured())) == "off"
