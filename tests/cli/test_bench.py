"""`vllm-s2o bench`: what it asks of vLLM's tools, and what it makes of their figures. Tests of examples run it."""

import contextlib
import json
import shlex
import sys
from types import SimpleNamespace

import pytest
from models import write_smollm2

from vllm_s2o.cli import bench
from vllm_s2o.cli.server import Server, ServerError
from vllm_s2o.cli.vllm_bench import BenchError

LINE = (
    "INFO s2o: prefill query=9000 seq=9000 density=0.250 sparse_layers=2/2 | total steps=1 tokens=9000 density=0.250 "
    "pairs=25/100 process=7\n"
)


@pytest.fixture
def tools(monkeypatch):
    """vLLM's tools and servers replaced: S2O's servers take half the time."""
    found = SimpleNamespace(servers=[], loads=[], engines=[], fails=None, long=True)

    def server(model, log, args, env, *, name, start_seconds):
        found.servers.append((args, env))
        found.sparse = "CUSTOM" in args
        found.server = SimpleNamespace(log="")
        return contextlib.nullcontext(found.server)

    def serve(server, model, load, directory):
        if found.fails:
            raise BenchError(found.fails)
        found.loads.append(load)
        server.log += LINE if found.sparse and found.long else ""
        ms = 100.0 if found.sparse else 200.0
        return {
            "completed": load.prompts, "median_ttft_ms": ms, "p99_ttft_ms": 2 * ms, "median_tpot_ms": 5.0,
            "total_token_throughput": 1e6 / ms,
        }  # fmt: skip

    def engine(tool, model, arguments, log, more):
        found.engines.append((tool, arguments))
        log.write_text(LINE if "CUSTOM" in arguments else "")
        return {"num_requests": 5, "elapsed_time": 2.0, "tokens_per_second": 30.0 if "CUSTOM" in arguments else 20.0}

    monkeypatch.setattr(bench, "Server", server)
    monkeypatch.setattr(bench, "bench_serve", serve)
    monkeypatch.setattr(bench, "bench_engine", engine)
    return found


def test_both_side_by_side(command, tools, tmp_path):
    tokens = ("--tokens", "9000", "--tokens", "16000")
    model = write_smollm2(tmp_path / "long", max_position_embeddings=32768)
    ended = command("bench", model, *tokens, "--concurrency", "8", "--server", "--seed 3")
    assert ended.status == 0
    (ours, _), (theirs, _) = tools.servers
    assert ours == ["--no-enable-prefix-caching", "--attention-backend", "CUSTOM", "--seed", "3"]
    assert theirs == ["--no-enable-prefix-caching", "--seed", "3"]
    assert tools.loads[:2] == tools.loads[2:], "the same for both"
    assert [(load.prompt_len, load.prompts) for load in tools.loads[:2]] == [(9000, 8), (16000, 8)]
    assert [tool for tool, _ in tools.engines] == ["throughput"] * 4
    tables = ended.out.split("\n\n")
    assert [table.strip().splitlines()[0] for table in tables] == [
        "vllm bench serve: 8 prompts of 9000 tokens, 16 out, 8 at a time",
        "vllm bench serve: 8 prompts of 16000 tokens, 16 out, 8 at a time",
        "vllm bench throughput: 8 prompts of 9000 tokens, 16 out, all at once",
        "vllm bench throughput: 8 prompts of 16000 tokens, 16 out, all at once",
    ]
    rows = [line.rsplit(maxsplit=3) for line in tables[0].strip().splitlines()[2:]]
    assert rows[0] == ["time to the first token, median ms", "100.0", "200.0", "2.00x"]
    assert rows[3] == ["tokens a second, prompts included", "10000.0", "5000.0", "2.00x"]
    assert tables[0].splitlines()[-1].split()[-2:] == ["0.250", "-"]
    assert "30.0        20.0    1.50x" in tables[2]


def test_what_a_script_gets(command, tools, smollm2, monkeypatch, tmp_path):
    (tmp_path / "mine.yaml").write_text("min_seq_len: 99\n")
    monkeypatch.setenv("VLLM_S2O_CONFIG", "mine.yaml")
    given = '{"s2o": {"threshold": 0.01}}'
    ended = command("bench", smollm2, "--tool", "serve", "--additional-config", given, "--json")
    assert ended.err == ""
    document = json.loads(ended.out)
    (run,) = document["runs"]
    assert (run["tool"], run["prompt_len"], run["prompts"], run["concurrency"]) == ("serve", 8176, 5, 1), (
        "as many as the context holds with the answer"
    )
    assert (run["s2o"]["median_ttft_ms"], run["dense"]["median_ttft_ms"]) == (100.0, 200.0)
    assert (run["s2o"]["density"], run["dense"]["density"]) == (0.25, None)
    assert not tools.engines
    (ours, env), (theirs, _) = tools.servers
    assert json.loads(ours[-1]) == json.loads(given)
    assert "--additional-config" not in theirs
    assert env["VLLM_S2O_CONFIG"] == "mine.yaml", "a user's server is as the user's variables say"


def test_prompts_that_all_ran_dense_are_told_of(command, tools, smollm2):
    tools.long = False
    ended = command("bench", smollm2, "--tool", "serve")
    assert ended.status == 0
    assert "No prompt was long enough for S2O: see min_seq_len in `vllm-s2o config show MODEL`." in ended.err


@pytest.mark.parametrize(
    "given",
    [
        "--attention-backend FLASHINFER", "--attention_backend FLASHINFER", "--attention-b=FLASHINFER",
        "--attention-config {}", "--attention-config.backend=FLASHINFER", "-ac.backend FLASHINFER", "-ac {}",
        "--additional-config={}", "--additional_config {}", "--additional-config.s2o.threshold 1", "--config a.yaml",
    ],
)  # fmt: skip
def test_what_is_compared_cannot_be_chosen(command, tools, given):
    ended = command("bench", "m", "--server", given)
    assert ended.status == 2
    assert "--server cannot choose the backend or the additional config, nor name a --config file: " in ended.sentence
    assert not tools.servers


def test_prompts_are_as_many_as_asked(command, tools, smollm2):
    ended = command("bench", smollm2, "--prompts", "1", "--concurrency", "4")
    assert ended.status == 2 and "--prompts 1 is fewer than --concurrency 4: give as many, or more." in ended.sentence
    assert command("bench", smollm2, "--prompts", "2").status == 0
    assert {load.prompts for load in tools.loads} == {2}
    assert all(arguments[arguments.index("--num-prompts") + 1] == "2" for _, arguments in tools.engines)


@pytest.mark.parametrize(
    "given, said",
    [
        ("--tokens 8192", "--tokens 8192 and --output 16 do not fit into the context of 8192 tokens: allowed are "
         "prompts of up to 8176."),
        ("--tokens 4096 --server --max-model-len=4096", "of 4096 tokens: allowed are prompts of up to 4080."),
        ("--output 8192", "--output 8192 leaves no room for a prompt: the context ends at 8192 tokens."),
        ("--tokens 8176", None),
        ("--tokens 20000 --server '--max_model_len 32768'", None),
        ("--tokens 20000 --server '--max-model-len 32k'", None),
        ("--tokens 20000 --server --hf-overrides={}", None),
    ],
)  # fmt: skip
def test_prompts_end_within_the_context(command, tools, smollm2, given, said):
    ended = command("bench", smollm2, "--tool", "serve", *shlex.split(given))
    assert ended.status == (2 if said else 0)
    assert not said or (said in ended.sentence and not tools.servers)


def test_a_context_that_yarn_extends_is_left_to_vllm(command, tools, tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    model = write_smollm2(tmp_path / "yarn", rope_scaling=rope)
    assert command("bench", model, "--tokens", "20000").status == 0


def test_without_vllm_there_is_advice(command, tools, smollm2, monkeypatch):
    monkeypatch.setattr(bench.checks.importlib.util, "find_spec", lambda name: None)
    ended = command("bench", smollm2)
    assert ended.status == 1 and not tools.servers
    assert "vLLM, whose tools are run, is not installed: install it: pip install 'vllm" in ended.sentence


def test_a_server_is_started_without_a_client(tmp_path, monkeypatch):
    """`vllm bench` brings its own: without openai, which comes with vLLM, nothing else fails."""
    monkeypatch.setitem(sys.modules, "openai", None)
    server = Server("m", tmp_path / "log", name="m")
    server.command = [sys.executable, "-c", ""]
    with pytest.raises(ServerError, match=r"^the server ended with 0:"), server:
        pass


@pytest.mark.parametrize(
    "model, given, said",
    [
        ("./nomodel", "{}", "vllm-s2o: there is no directory ./nomodel; allowed is "),
        (None, '{"s2o": {"threshol": 1}}', "there is no field 'threshol'; allowed are "),
        (None, '{"s2o": "nowhere.yaml"}', 'nowhere.yaml (named by --additional-config "s2o"): there is no such file'),
        (None, '{"S2O": {}}', "--additional-config has the key 'S2O'; allowed is 's2o'."),
    ],
)
def test_what_no_server_would_take_is_told_before_one_starts(command, tools, smollm2, model, given, said):
    ended = command("bench", model or smollm2, "--additional-config", given)
    assert ended.status == 1 and said in ended.sentence
    assert not tools.servers and not tools.engines


@pytest.mark.parametrize(
    "said, sentence",
    [
        ("the server ended with 1:", "the server ended with 1"),
        ("vllm bench serve ended with 2; the end of its output:", "vllm bench serve ended with 2"),
    ],
)
def test_what_vllm_said_keeps_its_lines(command, tools, smollm2, said, sentence):
    tools.fails = f"{said}\nusage: vllm\n\n  --flag   what it does\nerror: no"
    ended = command("bench", smollm2)
    *lines, last = ended.err.splitlines()
    assert lines[-4:] == ["usage: vllm", "", "  --flag   what it does", "error: no"]
    assert last == f"vllm-s2o: S2O: {sentence}: see the lines above; --logs DIR would keep the logs."
    assert command("bench", smollm2, "--logs", "there").err.endswith("see the lines above; there holds the logs.\n")


def test_a_tool_that_fails(command, tools, smollm2):
    tools.fails = "vllm bench serve did not end in 500 s with prompts of 8192 tokens."
    ended = command("bench", smollm2)
    assert ended.status == 1
    assert ended.err.splitlines()[-1].endswith(
        "vllm-s2o: S2O: vllm bench serve did not end in 500 s with prompts of 8192 tokens."
    )
