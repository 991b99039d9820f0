"""`benchmarks/load.py`: what it sends, what it counts as failed, and when it says that memory grew."""

import argparse
import asyncio
import contextlib
import csv
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from bench_modules import load

OPTIONS = argparse.Namespace(
    requests=400,
    tokens=(64, 7800),
    seed=0,
    leave=0.1,
    patience=10.0,
    again=0.0,
    dense=0.0,
    concurrency=32,
    shape=None,
    model="models/own",
    config={},
)


def test_requests_are_the_same_for_a_seed():
    asked = load.requests(OPTIONS, 1000)
    assert asked == load.requests(OPTIONS, 1000)
    assert asked != load.requests(argparse.Namespace(**vars(OPTIONS) | {"seed": 1}), 1000)


def test_requests_are_spread():
    """A third of the logarithms' range has a third of the lengths."""
    asked = load.requests(OPTIONS, 1000)
    lengths = [len(request.prompt) for request in asked]
    assert 64 <= min(lengths) < 80 and 6000 < max(lengths) <= 7800
    assert 100 < sum(length < 64 * (7800 / 64) ** (1 / 3) for length in lengths) < 170
    assert 20 < sum(request.leaves is not None for request in asked) < 60
    assert {request.output for request in asked} == set(range(1, 33))


def test_some_prompts_begin_as_earlier_ones_did_and_some_ask_to_run_dense():
    plain = load.requests(OPTIONS, 1000)
    asked = load.requests(argparse.Namespace(**vars(OPTIONS) | {"again": 0.5, "dense": 0.1}), 1000)
    assert len(asked[0].prompt) == len(plain[0].prompt)
    begun = {tuple(request.prompt[:32]) for request in asked}
    assert len({tuple(request.prompt[:32]) for request in plain}) == 400 and 150 < len(begun) < 280
    assert 20 < sum(request.dense for request in asked) < 60 and not any(request.dense for request in plain)


class Client:
    """An API that answers in a way."""

    def __init__(self, count: int, error: Exception | None = None, seconds: float = 0.0, between: float = 0.0):
        self.count, self.error, self.seconds, self.between = count, error, seconds, between

    async def post(self, path, **asked):
        if self.error is not None:
            raise self.error
        return self.parts()

    async def parts(self):
        await asyncio.sleep(self.seconds)
        for _ in range(self.count):
            yield SimpleNamespace(choices=["text"], usage=None)
            await asyncio.sleep(self.between)
        yield SimpleNamespace(choices=[], usage=SimpleNamespace(completion_tokens=self.count))


@pytest.mark.parametrize(
    "client, leaves, answered, left, failed",
    [
        (Client(4), None, 1, 0, []),
        (Client(3), None, 0, 0, ["3 of 4 tokens for a prompt of 2"]),
        (Client(0), None, 0, 0, ["0 of 4 tokens for a prompt of 2"]),
        (Client(4, ConnectionError("gone")), None, 0, 0, ["ConnectionError: gone, after 0.0 s"]),
        (Client(4, TimeoutError("slow")), None, 0, 0, ["TimeoutError: slow, after 0.0 s"]),
        (Client(4, seconds=30), 0.05, 0, 1, []),
        (Client(4, between=30), 0.05, 0, 1, []),
    ],
    ids=["whole", "cut off", "empty", "refused", "slow", "client leaves", "client leaves after a token"],
)
def test_what_came_of_a_request(client, leaves, answered, left, failed):
    told = load.Told()
    asyncio.run(load.one(client, "model", 7, load.Request([1, 2], 4, leaves), told))
    assert (list(told.ttft), told.left, told.failed) == ([7] * answered, left, failed)


class Api:
    """A server's, of one token an answer."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.connections = 0

    async def connected(self, reader, writer) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the client is gone
            while head := (await reader.readuntil(b"\r\n\r\n")).decode().lower():
                length = re.search(r"content-length: (\d+)", head)[1]
                self.bodies.append(json.loads(await reader.readexactly(int(length))))
                kept = "connection: close" not in head
                text = {"index": 0, "text": "a", "finish_reason": None, "logprobs": None}
                parts = [{"choices": [text]}, {"choices": [], "usage": {"completion_tokens": 1}}]
                said = "".join(f"data: {json.dumps(part)}\n\n" for part in parts) + "data: [DONE]\n\n"
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
                writer.write(b"" if kept else b"connection: close\r\n")
                writer.write(f"content-length: {len(said)}\r\n\r\n{said}".encode())
                await writer.drain()
                if not kept:
                    break
        writer.close()


async def sent(asked: list[load.Request], concurrency: int) -> tuple[load.Told, Api, float]:
    """What came of them, whom they met, and the longest time in seconds for which nobody else had a turn."""
    api, waits = Api(), [0.0]

    async def wait() -> None:
        while True:
            began = time.perf_counter()
            await asyncio.sleep(0)
            waits.append(time.perf_counter() - began)

    async with await asyncio.start_server(api.connected, "127.0.0.1", 0, limit=2**24) as server:
        port = server.sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1"
        process = SimpleNamespace(pid=os.getpid())
        waiter = asyncio.create_task(wait())
        told = await load.send(
            SimpleNamespace(client=SimpleNamespace(base_url=url), name="own", process=process), asked, concurrency
        )
        waiter.cancel()
    return told, api, max(waits)


def test_why_a_request_failed():
    """Nobody listens there."""
    told = load.Told()
    asyncio.run(load.one(load.api("http://127.0.0.1:9/v1"), "own", 0, load.Request([1], 1, None), told))
    (said,) = told.failed
    assert said.startswith("APIConnectionError: Connection error., from ConnectError: ") and "refused" in said.lower()


def test_what_is_sent():
    """Through OpenAI's client, each over a connection of its own."""
    asked = [load.Request([1, 2, 3], 1, None), load.Request([4], 1, None, dense=True), load.Request([5], 2, None)]
    told, api, _ = asyncio.run(sent(asked, 1))
    assert list(told.ttft) == [0, 1] and told.failed == ["1 of 2 tokens for a prompt of 1"]
    shared = {
        "model": "own", "temperature": 0, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert api.bodies == [
        shared | {"prompt": [1, 2, 3], "max_tokens": 1},
        shared | {"prompt": [4], "max_tokens": 1, "vllm_xargs": {"s2o": "dense"}},
        shared | {"prompt": [5], "max_tokens": 2},
    ]
    assert api.connections == 3


def test_no_client_waits_for_the_prompt_of_another():
    """Who sends 65,536 tokens holds up the others for little more than it takes to write them down."""
    asked = [load.Request(list(range(65536)), 1, None)]
    began = time.perf_counter()
    json.dumps(asked[0].prompt)
    written = time.perf_counter() - began
    told, held = zip(*((told, held) for told, _, held in (asyncio.run(sent(asked, 1)) for _ in range(3))), strict=True)
    assert not any(one.failed for one in told)
    assert min(held) < 15 * written  # with `completions.create` some 100 times


def test_memory_of_the_second_half():
    assert load.halves([100.0] * 40 + [200.0] * 40) == (200, 200)
    half, end = load.halves([float(i) for i in range(80)])
    assert (half, end) == (44.5, 74.5)
    assert load.halves([1.0] * 15) == (None, None)


@pytest.fixture
def run(monkeypatch, tmp_path):
    """A row of a server that is none, and what is wrong with it."""

    class Server:
        log = ""
        process = SimpleNamespace(poll=lambda: None)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    def run(told, held=(), again=0.0, shown=()):
        told_of = dict(zip(load.TIMED, (2.0, 0.5), strict=True)) | dict(shown)

        async def send(server, asked, concurrency):
            return told

        (tmp_path / "config.json").write_text('{"vocab_size": 100}')
        monkeypatch.setattr(load, "send", send)
        monkeypatch.setattr(load, "serve", lambda *_: Server())
        monkeypatch.setattr(load, "emptied", lambda server: dict(held))
        monkeypatch.setattr(
            load, "shown", lambda server, names: {name: told_of[name] for name in names if name in told_of}
        )
        options = argparse.Namespace(**vars(OPTIONS) | {"model": str(tmp_path), "server": [], "again": again})
        return load.run("s2o", options, tmp_path)[1:]

    return run


FLAT = [1000.0] * 80


def test_a_server_that_stays_as_it_was(run, capsys):
    row, wrong = run(load.Told(ttft={0: 0.1, 1: 0.2, 5: 0.3}, host=FLAT))
    assert "s2o: 2.00 s of it in a layer's sparse attention, ranking 25%" in capsys.readouterr().out
    assert wrong == []
    assert (row["answered"], row["failed"], row["host_mib_half"], row["host_mib_end"]) == (3, 0, 1000, 1000)
    assert row["device_mib_end"] is None


def memory(host=FLAT, device=()) -> dict:
    """As much of a row."""
    return {
        f"{place}_mib_{part}": value
        for place, samples in (("host", host), ("device", device))
        for part, value in zip(("half", "end"), load.halves(list(samples)), strict=True)
    }


BEFORE, LATER = [1000.0] * 40 + [1030.0] * 40, [1000.0] * 55 + [1030.0] * 25


@pytest.mark.parametrize(
    "s2o, dense, said",
    [
        (memory(BEFORE), memory(), None),
        (memory(LATER), memory(), "s2o: host memory grew from 1000 to 1030 MiB in the second half, without "),
        (memory(LATER), memory(LATER), None),
        (memory(LATER), memory(list(reversed(LATER))), "s2o: host memory grew from 1000 to 1030 MiB"),
        (memory(), memory(LATER), None),
        (memory(FLAT, [500.0] * 55 + [600.0] * 25), memory(FLAT, [500.0] * 80), "s2o: device memory grew from 500 to "),
        (memory(FLAT[:15]), memory(), None),
    ],
    ids=["before", "with S2O only", "vLLM's own", "without S2O it shrank", "without S2O only", "device", "no samples"],
)  # fmt: skip
def test_memory_that_grows_with_s2o_and_not_without(s2o, dense, said):
    wrong = load.grown({"s2o": s2o, "dense": dense})
    assert len(wrong) == (said is not None)
    assert said is None or wrong[0].startswith(said)


@pytest.mark.parametrize(
    "fields, held, said",
    [
        ({"failed": ["ConnectionError: gone", "other"]}, {}, "s2o: 2 requests failed, the first with ConnectionError"),
        ({"host": [1000.0] * 15}, {}, "s2o: 15 samples of host memory tell nothing"),
        ({}, {"vllm:kv_cache_usage_perc": 0.1}, "s2o: still in use after the last request: {'vllm:kv_cache_usage_perc"),
    ],
    ids=["failed", "no samples", "blocks"],
)
def test_what_is_wrong_is_said(run, fields, held, said):
    _, wrong = run(load.Told(**{"ttft": {0: 0.1, 1: 0.2}, "host": FLAT} | fields), held)
    assert len(wrong) == (said is not None)
    assert said is None or wrong[0].startswith(said)


@pytest.mark.parametrize("cached", [0.0, 5.0])
def test_prefixes_that_no_prompt_takes_prove_nothing(run, cached):
    _, wrong = run(load.Told(ttft={0: 0.1}, host=FLAT), again=0.5, shown={load.CACHED: cached})
    assert wrong == ([] if cached else ["s2o: no prompt took a prefix from the cache"])


def test_what_ends_the_sampler_ends_the_run(monkeypatch):
    """A run whose memory nobody saw has shown nothing of it."""

    def broken(server):
        raise OSError("no such process")

    async def one(client, name, number, request, told):
        await asyncio.sleep(0.05)

    monkeypatch.setattr(load, "host_mib", broken)
    monkeypatch.setattr(load, "one", one)
    server = SimpleNamespace(client=SimpleNamespace(base_url="http://127.0.0.1:9/v1"), name="model")
    with pytest.raises(OSError, match="no such process"):
        asyncio.run(load.send(server, [load.Request([1], 1, None)], 1))


def test_memory_is_that_of_all_processes():
    """This one and one that it starts."""
    alone = load.host_mib(SimpleNamespace(process=SimpleNamespace(pid=os.getpid())))
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        both = load.host_mib(SimpleNamespace(process=SimpleNamespace(pid=os.getpid())))
    finally:
        child.communicate(b"\n")
    assert both > alone > 100


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--requests", "0"], "argument --requests: '0' is not a whole number above 0"),
        (["--concurrency", "x"], "argument --concurrency: 'x' is not a whole number above 0"),
        (["--config", "[1]"], "argument --config: '[1]' is no JSON object of S2O's fields"),
        (["--tokens", "9", "8"], "argument --tokens: MIN and MAX must ascend, up to 8, not 9 8"),
        (["--shape", "tiny", "--tokens", "9", "8190"], "must ascend, up to 8160, not 9 8190"),
        ([], "model/config.json does not tell the size of the vocabulary"),
    ],
)
def test_what_cannot_be_run_is_refused(monkeypatch, capsys, tmp_path, arguments, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["load.py", "model", "--out", "x.csv", *arguments])
    with pytest.raises(SystemExit) as ended:
        load.main()
    assert said in capsys.readouterr().err + str(ended.value)
    assert not (tmp_path / "x.csv").exists()


def done(device):
    """Of three requests one was not answered by dense attention, and another one not by S2O."""
    figures = {"answered": 2, "left": 1, "failed": 0, "density": 0.3, "host_mib_half": 1.0, "host_mib_end": 2.0}
    times = {"dense": {0: 0.2, 1: 0.2, 2: 9.0, 3: 0.2}, "s2o": {0: 0.1, 1: 0.1, 3: 0.1, 4: 7.0}}
    return [
        (load.Told(ttft=times[name], device=device), {"backend": name, **figures, "device_mib_end": None})
        for name in load.BACKENDS
    ]


@pytest.mark.parametrize("device, ms", [([], None), ([900.0], "100.0")], ids=["CPU", "GPU"])
def test_times_are_those_of_requests_that_both_answered(device, ms):
    """On a CPU their ratio alone."""
    _, s2o = load.table(done(device), OPTIONS)
    assert {s2o[f"ttft_p{p}_vs_dense"] for p in load.PERCENTILES} == {"0.500"}
    assert s2o.get("ttft_ms_p99") == ms
    assert s2o["model"] == "own" and s2o["host_mib_end"] == "2"


def test_rows_of_other_loads_stay(tmp_path):
    path = tmp_path / "load.csv"
    for changes in ({}, {"requests": 7}, {"config": {"budget": 0.1}}, {}):
        load.write(path, load.table(done([]), argparse.Namespace(**vars(OPTIONS) | changes)))
    held = list(csv.DictReader(path.open(newline="")))
    assert [(row["requests"], row["config"]) for row in held[::2]] == [
        ("7", "{}"), ("400", '{"budget": 0.1}'), ("400", "{}"),
    ]  # fmt: skip
    assert {row["backend"] for row in held[::2]} == {"dense"} and list(held[0]) == list(load.COLUMNS)
