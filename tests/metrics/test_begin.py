"""Where a configuration with the flag is read: a place for figures and the switch, whatever stands in its way."""

import os
import sys
from types import SimpleNamespace

import pytest
from entering import carried, decided
from prometheus_client import CollectorRegistry
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
        "counter_1.db", f"gauge_max_s2o-switch-{place.here().pid}.db"
    ]  # fmt: skip
    assert list(registry.collect()) == []
    assert figures().on
    set_switch(False)
    assert not figures().on


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
