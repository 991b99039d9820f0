"""Engines of vLLM that run in this process."""

import backend_log
import engines
import pytest
from vllm.platforms import current_platform


@pytest.fixture(scope="session", autouse=True)
def cpu():
    """Before anything else is made."""
    if not current_platform.is_cpu():
        pytest.skip("these engines compare in fp32, which FLASH_ATTN does not take")


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
