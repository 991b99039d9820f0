"""`benchmarks/load.py`: what it sends, what it counts as failed, and when it says that memory grew."""

import argparse
import asyncio
import csv
import importlib
import sys
from types import SimpleNamespace

import pytest
from processes import ROOT

OPTIONS = argparse.Namespace(
    requests=400, tokens=(64, 7800), seed=0, leave=0.1, patience=10.0, concurrency=32, shape=None, model="models/own"
)


@pytest.fixture
def load(monkeypatch):
    """As when it is run, it finds its neighbours by the folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    names = ("load", "servers")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("load")
    for name in names:
        sys.modules.pop(name, None)


def test_requests_are_the_same_for_a_seed(load):
    asked = load.requests(OPTIONS, 1000)
    assert asked == load.requests(OPTIONS, 1000)
    assert asked != load.requests(argparse.Namespace(**vars(OPTIONS) | {"seed": 1}), 1000)


def test_requests_are_spread(load):
    """A third of the logarithms' range has a third of the lengths."""
    asked = load.requests(OPTIONS, 1000)
    lengths = [len(request.prompt) for request in asked]
    assert 64 <= min(lengths) < 80 and 6000 < max(lengths) <= 7800
    assert 100 < sum(length < 64 * (7800 / 64) ** (1 / 3) for length in lengths) < 170
    assert 20 < sum(request.leaves is not None for request in asked) < 60
    assert {request.output for request in asked} == set(range(1, 33))


class Client:
    """An API that answers in a way."""

    def __init__(self, count: int, error: Exception | None = None, seconds: float = 0.0):
        self.completions = self
        self.count, self.error, self.seconds = count, error, seconds

    async def create(self, **asked):
        if self.error is not None:
            raise self.error
        return self.parts()

    async def parts(self):
        await asyncio.sleep(self.seconds)
        for _ in range(self.count):
            yield SimpleNamespace(choices=["text"], usage=None)
        yield SimpleNamespace(choices=[], usage=SimpleNamespace(completion_tokens=self.count))


@pytest.mark.parametrize(
    "client, answered, left, failed",
    [
        (Client(4), 1, 0, []),
        (Client(3), 0, 0, ["3 of 4 tokens for a prompt of 2"]),
        (Client(0), 0, 0, ["0 of 4 tokens for a prompt of 2"]),
        (Client(4, ConnectionError("gone")), 0, 0, ["ConnectionError: gone"]),
        (Client(4, seconds=30), 0, 1, []),
    ],
    ids=["whole", "cut off", "empty", "refused", "client leaves"],
)
def test_what_came_of_a_request(load, client, answered, left, failed):
    told = load.Told()
    asyncio.run(load.one(client, "model", load.Request([1, 2], 4, 0.05 if client.seconds else None), told))
    assert (len(told.ttft), told.left, told.failed) == (answered, left, failed)


def test_memory_of_the_second_half(load):
    assert load.halves([100.0] * 40 + [200.0] * 40) == (200, 200)
    half, end = load.halves([float(i) for i in range(80)])
    assert (half, end) == (44.5, 74.5)
    assert load.halves([1.0] * 15) == (None, None)


@pytest.fixture
def run(load, monkeypatch, tmp_path):
    """A row of a server that is none, and what is wrong with it."""

    class Server:
        log = ""

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def run(told, held=()):
        async def send(server, asked, concurrency):
            return told

        (tmp_path / "config.json").write_text('{"vocab_size": 100}')
        monkeypatch.setattr(load, "send", send)
        monkeypatch.setattr(load, "serve", lambda *_: Server())
        monkeypatch.setattr(load, "emptied", lambda server: dict(held))
        options = argparse.Namespace(**vars(OPTIONS) | {"model": str(tmp_path), "server": [], "config": {}})
        return load.run("s2o", options, tmp_path)

    return run


def test_a_server_that_stays_as_it_was(load, run):
    row, wrong = run(load.Told(ttft=[0.1, 0.2, 0.3], host=[1000.0] * 20))
    assert wrong == []
    assert (row["answered"], row["failed"], row["host_mib_half"], row["host_mib_end"]) == (3, 0, 1000, 1000)
    assert row["device_mib_end"] is None


@pytest.mark.parametrize(
    "fields, held, said",
    [
        (
            {"failed": ["ConnectionError: gone", "another"]},
            {},
            "s2o: 2 requests failed, the first with ConnectionError",
        ),
        ({"host": [1000.0] * 40 + [1030.0] * 40}, {}, None),
        ({"host": [1000.0] * 55 + [1030.0] * 25}, {}, "s2o: host memory grew from 1000 to 1030 MiB"),
        ({"device": [500.0] * 55 + [600.0] * 25}, {}, "s2o: device memory grew from 500 to 600 MiB"),
        (
            {},
            {"vllm:kv_cache_usage_perc": 0.1},
            "s2o: still in use after the last request: {'vllm:kv_cache_usage_perc'",
        ),
    ],
    ids=["failed", "grew before", "grew", "device", "blocks"],
)
def test_what_is_wrong_is_said(load, run, fields, held, said):
    _, wrong = run(load.Told(ttft=[0.1, 0.2], **fields), held)
    assert len(wrong) == (said is not None)
    assert said is None or wrong[0].startswith(said)


def rows(load, device):
    figures = {"answered": 9, "left": 1, "failed": 0, "density": 0.3, "host_mib_half": 1.0, "host_mib_end": 2.0}
    return [
        {"backend": name, **figures, "ttft": dict.fromkeys(load.PERCENTILES, ms), "device_mib_half": device,
         "device_mib_end": device}
        for name, ms in (("dense", 200.0), ("s2o", 100.0))
    ]  # fmt: skip


@pytest.mark.parametrize("device, ms", [(None, None), (900.0, "100.0")], ids=["CPU", "GPU"])
def test_times_of_a_cpu_are_ratios(load, device, ms):
    _, s2o = load.table(rows(load, device), OPTIONS)
    assert s2o["ttft_p50_vs_dense"] == "0.500" and s2o.get("ttft_ms_p50") == ms
    assert s2o["model"] == "own" and s2o["host_mib_end"] == "2"


def test_rows_of_other_loads_stay(load, tmp_path):
    path = tmp_path / "load.csv"
    load.write(path, load.table(rows(load, None), OPTIONS))
    load.write(path, load.table(rows(load, None), argparse.Namespace(**vars(OPTIONS) | {"requests": 7})))
    load.write(path, load.table(rows(load, None), OPTIONS))
    held = list(csv.DictReader(path.open(newline="")))
    assert [(row["requests"], row["backend"]) for row in held] == [
        ("7", "dense"), ("7", "s2o"), ("400", "dense"), ("400", "s2o"),
    ]  # fmt: skip
    assert list(held[0]) == list(load.COLUMNS)
