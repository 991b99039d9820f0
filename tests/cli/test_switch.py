"""`vllm-s2o switch`: which servers run, and S2O off and on in one of them."""

import os
import shutil
import tempfile

import pytest

from vllm_s2o.metrics import place
from vllm_s2o.metrics.figures import figures


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """One on which no server runs."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(place, "_mine", None)
    monkeypatch.setenv(place.VARIABLE, "")
    monkeypatch.delenv(place.MERGED, raising=False)


@pytest.fixture
def server():
    """This process, as far as the command knows."""
    place.establish("some/model")
    return place.here()


@pytest.fixture
def two(server, monkeypatch):
    monkeypatch.setattr(place, "_mine", None)
    place.establish("other/model")
    first, second = place.running()
    about = second.directory / place.ABOUT
    about.write_text(about.read_text().replace(str(os.getpid()), "77", 1))
    return first, second


def test_no_server_is_said(command):
    ended = command("switch")
    assert (ended.status, ended.out) == (0, "no server with the S2O backend runs here for this user\n")
    assert command("switch", "--json").document == []


@pytest.mark.parametrize("arguments", [["off"], ["on"], ["--server", "77"], ["off", "--server", "77"]])
def test_no_server_to_switch(command, arguments):
    ended = command("switch", *arguments)
    assert ended.status == 1
    assert ended.sentence.startswith("vllm-s2o: there is no server ")


def test_off_and_on(command, server):
    line = f"server {os.getpid()} (some/model): S2O is"
    assert command("switch").out == f"{line} on for new prompts\n"
    assert command("switch", "off").out == f"{line} off for new prompts\n"
    assert not place.here().on and not figures().on
    assert command("switch", "--json").document == [{"server": os.getpid(), "model": "some/model", "on": False}]
    assert command("switch", "on").out == f"{line} on for new prompts\n"
    assert place.here().on and figures().on


def test_what_metrics_cannot_show_is_switched_all_the_same(command, server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vllm_s2o.metrics.switch.write_alone", full)
    assert command("switch", "off").out.endswith("S2O is off for new prompts\n")
    assert not place.here().on


def test_a_switch_that_cannot_be_set_is_said_to_be_as_it_was(command, server):
    server.directory.chmod(0o500)
    if os.access(server.directory, os.W_OK):  # root may write everywhere
        shutil.rmtree(server.directory / place.OFF, ignore_errors=True)
        (server.directory / place.OFF).mkdir()
        ended = command("switch", "on")
    else:
        ended = command("switch", "off")
    assert ended.status == 1
    assert ended.sentence.startswith("vllm-s2o: the switch is as it was: ")


def test_of_several_servers_one_is_named(command, two):
    ended = command("switch", "off")
    assert ended.status == 1
    assert "several servers run: " in ended.sentence and "77 (" in ended.sentence and "--server" in ended.sentence
    assert all(server.on for server in place.running())
    assert command("switch", "off", "--server", "77").out.startswith("server 77 (")
    assert {server.pid: server.on for server in place.running()} == {77: False, os.getpid(): True}
    assert len(command("switch").out.splitlines()) == 2


def test_another_state_is_refused(command):
    ended = command("switch", "of")
    assert ended.status == 2
    assert "'on', 'off'" in ended.sentence


def test_engines_that_cannot_be_switched_are_said_to_be_as_they_were(command, server):
    about = server.directory / place.ABOUT
    about.write_text(about.read_text().replace('"fixed": null', '"fixed": "why"'))
    ended = command("switch", "off")
    assert ended.status == 1
    assert ended.sentence == "vllm-s2o: the switch is as it was: S2O cannot be switched on and off here: why."
    assert place.here().on
