"""Engines of vLLM that run in this process."""

import engines
import pytest
from vllm.platforms import current_platform

from vllm_s2o import backend


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "engine" and not current_platform.is_cpu():
            item.add_marker(pytest.mark.skip(reason="these engines are small and exact enough for a CPU only"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory):
    return engines.checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def witness(monkeypatch):
    return engines.Witness(monkeypatch)


@pytest.fixture
def told(monkeypatch):
    """Lines that the backend logs."""
    lines = []
    monkeypatch.setattr(backend.logger, "log", lambda level, line, *values: lines.append(line % values))
    monkeypatch.setattr(backend, "_told", set())
    return lines
