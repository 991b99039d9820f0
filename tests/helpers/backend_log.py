"""What the backend logs, in the process of a test."""

from vllm_s2o import backend


def lines(monkeypatch) -> list[str]:
    """Its lines from now on, those among them that it has told before."""
    told: list[str] = []
    monkeypatch.setattr(backend.logger, "log", lambda level, line, *values: told.append(line % values))
    monkeypatch.setattr(backend, "_told", set())
    return told
