"""Engines of vLLM that run in this process: on a CPU in fp32, on a GPU in 16 bits."""

import backend_log
import engines
import pytest


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return engines.checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def witness(monkeypatch):
    return engines.Witness(monkeypatch)


@pytest.fixture
def told(monkeypatch):
    """Lines that the backend logs."""
    return backend_log.lines(monkeypatch)
