"""A machine of one's own: no other server's directory is seen, and none is left."""

import logging
import tempfile

import pytest

from vllm_s2o import metrics
from vllm_s2o.metrics import place


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path_factory):
    """The directory in which servers make theirs."""
    temporary = tmp_path_factory.mktemp("machine")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(place, "_mine", None)
    monkeypatch.setattr(place, "_off", False)
    # What `establish` sets is to be gone afterwards.
    monkeypatch.setenv(place.VARIABLE, "")
    monkeypatch.delenv(place.VARIABLE)
    monkeypatch.setenv("VLLM_RAY_EXTRA_ENV_VARS_TO_COPY", "")
    monkeypatch.delenv(place.MERGED, raising=False)
    return temporary


@pytest.fixture
def logger():
    """A logger, and the lines that it was given."""
    made = logging.Logger("figures")
    made.lines = []
    handler = logging.Handler()
    handler.emit = lambda record: made.lines.append(record.getMessage())
    made.addHandler(handler)
    return made


@pytest.fixture
def server(logger):
    """Of this process."""
    metrics.begin("some/model", logger)
    return place.here()
