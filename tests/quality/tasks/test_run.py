"""From prompts to the table: what is asked, kept, taken up again, compared and refused."""

import csv
import json
import sys

import pytest
from fake_api import FakeApi

from vllm_s2o.config import ResolvedConfig
from vllm_s2o.quality.tasks import backends, client, command, longbench, run, suite, table
from vllm_s2o.quality.tasks.answers import Answer, Answers
from vllm_s2o.quality.tasks.backends import Backend, pairs
from vllm_s2o.quality.tasks.client import Client
from vllm_s2o.quality.tasks.prompt import Framing, Prompt, TaskError
from vllm_s2o.quality.tasks.run import Sources, measure, processes

LENGTHS = (1600, 2000)
TASKS = ("niah_single_1", "niah_multivalue")


def simple(index: int, ids=(1, 2, 3)) -> Prompt:
    return Prompt("vt", 100, index, [*ids, index], 7, lambda answer: float(answer == "yes"))


def step(tokens: int) -> str:
    return (
        f"INFO s2o: prefill query={tokens} seq={tokens} density=0.500 sparse_layers=2/3 | total steps=1 "
        f"tokens={tokens} density=0.500 pairs=50/100 process=7\n"
    )


def told(tokens: int, density: float) -> str:
    line = f"INFO s2o: request cmpl-1-a prompt={tokens} cached=0 sparse={tokens} dense=0 density={density:.3f}\n"
    return step(tokens) + line


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(backends.step_log, "LOG_INTERVAL", 0)
    monkeypatch.setattr(client, "WAIT_SECONDS", 0)


@pytest.fixture(autouse=True)
def prompts_are_made_here(monkeypatch):
    """Where tests see them, on a machine of many cores too."""
    monkeypatch.setattr(run, "processes", lambda: 0)


@pytest.fixture
def served(checkpoint, tokenizer, monkeypatch):
    """Servers that know every answer, but S2O's not those of the first sample; and their logs."""
    import contextlib

    known = {}
    real = suite.prompt

    def prompt(*args, **kwargs):
        made = real(*args, **kwargs)
        known[tuple(made.ids)] = made
        return made

    monkeypatch.setattr(suite, "prompt", prompt)
    asked = []

    @contextlib.contextmanager
    def started(backend, model, args, logs=None, concurrency=1):
        log = []

        def answer(ids):
            made = known[tuple(ids)]
            asked.append((backend, *made.key))
            log.append(told(len(ids), 0.3) if backend == "s2o" else "...")
            return "nothing" if backend == "s2o" and made.index == 0 else " ".join(made.score.keywords["expected"])

        with FakeApi(answer) as api:
            yield Backend(Client(api.url), lambda: "".join(log))

    monkeypatch.setattr(run, "started", started)
    return asked


def small(checkpoint, out, **changes):
    return measure(checkpoint, out, **{"tasks": TASKS, "lengths": LENGTHS, "samples": [2]} | changes)


def rows(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline="")))


# -- the table --------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_prompts_that_other_processes_make_are_the_same(framing):
    """In whatever order they are asked for, more of them than were announced, and a failure where it is asked for."""
    ahead, plain = Sources(framing, 3, processes=1), Sources(framing, 3)
    try:
        ahead.ahead("niah_multivalue", 2000, range(3))
        ahead.ahead("niah_single_1", 1600, range(2))
        ahead.ahead("cwe", 40, [0])
        for task, length, indices in ((TASKS[0], 1600, [1, 0]), (TASKS[1], 2000, [0, 1, 2, 3]), (TASKS[1], 2000, [2])):
            made = ahead.prompts(task, length, indices)
            for mine, other in zip(made, plain.prompts(task, length, indices), strict=True):
                assert (mine.key, mine.ids, mine.room) == (other.key, other.ids, other.room)
                assert mine.score.keywords == other.score.keywords
        with pytest.raises(TaskError, match="The task cwe does not fit into 40 tokens"):
            ahead.prompts("cwe", 40, [0])
    finally:
        ahead.close()


def test_where_no_process_can_make_prompts_they_are_made_here(framing, capsys):
    """As where a tokenizer has code of its own."""
    odd = Framing(framing.tokenizer)
    odd.chat = lambda: True  # which no other process can be given
    ahead = Sources(odd, 3, processes=1)
    try:
        ahead.ahead(TASKS[0], 1600, range(2))
        assert [made.index for made in ahead.prompts(TASKS[0], 1600, [0, 1])] == [0, 1]
    finally:
        ahead.close()
    assert capsys.readouterr().err.startswith("Prompts are made one after the other: ")


@pytest.mark.parametrize(("cores", "making"), [(1, 0), (2, 0), (4, 0), (10, 6), (128, 12)])
def test_few_cores_make_no_prompts_ahead(monkeypatch, cores, making):
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(cores)))
    assert processes() == making


def test_the_table(checkpoint, served, tmp_path):
    out = tmp_path / "folder" / "tasks.csv"
    found, repeated = small(checkpoint, out)
    assert repeated == 0 and len(served) == len(set(served)) == 16
    read = rows(out)
    assert list(read[0]) == list(table.COLUMNS)
    made = json.loads(out.with_name("tasks.csv.made.json").read_text())
    assert made["samples"] == {f"{task} at {length}": 2 for length in LENGTHS for task in TASKS}
    assert made["model"] == checkpoint and {"machine", "torch", "commit"} <= set(made["environment"])
    wanted = [(str(length), task) for length in (*LENGTHS, "all") for task in (*TASKS, "average")]
    assert [(row["length"], row["task"], row["backend"]) for row in read] == [
        (length, task, backend) for length, task in wanted for backend in ("s2o", "dense")
    ]
    for row in read:
        dense = row["backend"] == "dense"
        assert (row["score"], row["density"]) == (("100.00", "1.000") if dense else ("50.00", "0.300"))
        assert float(row["ci95"]) > 5
        assert row["difference"] == ("" if dense else "-50.00")
        if not dense:
            assert float(row["difference_low"]) < -50 < float(row["difference_high"])
            assert int(row["same_answers"]) * 2 == int(row["samples"])
    assert [int(row["samples"]) for row in read[::2]] == [2, 2, 4, 2, 2, 4, 4, 4, 8]
    said = table.summary(found, 3)
    assert (
        "Worse than dense by more than 2 points: niah_single_1 at 1600, niah_multivalue at 1600, niah_single_1 " in said
    )
    assert "the interval of 0 of 4 differences excludes it." in said
    assert "Average over tasks: -50.0 points (" in said and "made again: 3." in said


def test_without_the_reference_nothing_is_compared(checkpoint, served, tmp_path):
    found, _ = small(checkpoint, tmp_path / "a.csv", backends=["s2o"])
    assert {row["difference"] for row in rows(tmp_path / "a.csv")} == {""} and "Worse" not in table.summary(found)


def test_a_number_of_samples_for_each_length(checkpoint, served, tmp_path):
    small(checkpoint, tmp_path / "a.csv", samples=[1, 3], backends=["dense"], tasks=["vt"])
    assert [(row["length"], row["samples"]) for row in rows(tmp_path / "a.csv")] == [
        ("1600", "1"), ("2000", "3"), ("all", "4"),
    ]  # fmt: skip


def test_the_picture(checkpoint, served, tmp_path):
    pytest.importorskip("matplotlib")
    found, _ = small(checkpoint, tmp_path / "a.csv")
    command.draw(found, "model", tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


# -- a second run -----------------------------------------------------------------------------------------------------


def test_a_second_run_asks_nothing_and_starts_no_server(checkpoint, served, tmp_path, monkeypatch):
    out = tmp_path / "a.csv"
    small(checkpoint, out)
    before = out.read_text()
    out.unlink()
    monkeypatch.setattr(run, "started", None)
    small(checkpoint, out)
    assert out.read_text() == before


def test_more_samples_lengths_and_tasks_add_to_what_is_there(checkpoint, served, tmp_path):
    out = tmp_path / "a.csv"
    small(checkpoint, out, samples=[1], lengths=[1600], tasks=["vt"])
    served.clear()
    small(checkpoint, out, samples=[2], lengths=LENGTHS, tasks=["vt", "niah_single_1"])
    assert len(served) == 14 and ("dense", "vt", 1600, 0) not in served
    assert {row["density"] for row in rows(out) if row["backend"] == "s2o"} == {"0.300"}


def test_a_run_that_was_cut_off_goes_on(checkpoint, served, tmp_path, monkeypatch):
    """Once between two batches, by the user, and once in the middle of a line, by the machine."""
    out, complete = tmp_path / "a.csv", tmp_path / "b.csv"
    small(checkpoint, complete)
    served.clear()
    real = Answers.add

    def add(self, *args):
        real(self, *args)
        if len(self.found) == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Answers, "add", add)
        small(checkpoint, out)
    assert len(served) == 4 and not out.exists()
    parts = out.with_name("a.csv.parts.jsonl")
    parts.write_bytes(parts.read_bytes()[:-20])
    small(checkpoint, out)
    assert len(served) == 17, "one was lost with its line, and its density is that of the others"
    assert out.read_text() == complete.read_text()


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"seed": 1}, "seed"),
        ({"chat": False}, "chat template"),
        ({"server": ["--dtype", "float32"]}, "server arguments"),
        ({"lengths": [1600, 10_000]}, "context extension"),
    ],
)
def test_answers_under_other_settings_are_not_mixed(checkpoint, served, tmp_path, changes, said):
    out = tmp_path / "a.csv"
    small(checkpoint, out, samples=[1], tasks=["vt"])
    before = out.with_name("a.csv.parts.jsonl").read_text()
    with pytest.raises(
        TaskError, match=rf"^The answers in .*jsonl have other {said}: remove it, or name another --out"
    ):
        small(checkpoint, out, **changes)
    assert out.with_name("a.csv.parts.jsonl").read_text() == before


@pytest.mark.parametrize("changed", ["config", "commit"])
def test_answers_of_another_config_or_commit_are_not_mixed(checkpoint, served, tmp_path, monkeypatch, changed):
    out = tmp_path / "a.csv"
    small(checkpoint, out, samples=[1], tasks=["vt"])
    if changed == "config":
        monkeypatch.setattr(ResolvedConfig, "digest", lambda self: "0123456789ab")
    else:
        monkeypatch.setattr(run, "commit_name", lambda machine: "another")
    with pytest.raises(TaskError, match=rf"^The answers in .*jsonl have other {changed}: remove it, or name another"):
        small(checkpoint, out, samples=[1], tasks=["vt"])


def test_files_that_cannot_be_used_are_told_in_a_sentence(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(TaskError, match=r"^Cannot (read|write) .*parts: (Not a directory|File exists)\.$"):
        Answers(tmp_path / "file" / "parts", {})
    for text in ("no JSON\n", "[]\n", '{"other": 1}\n', '{"settings": {}}\n{"key": ["dense"]}\n'):
        (tmp_path / "parts").write_text(text)
        with pytest.raises(TaskError, match=r"parts holds no answers: remove it, or name another --out\.$"):
            Answers(tmp_path / "parts", {})
        assert (tmp_path / "parts").read_text() == text


# -- the API ----------------------------------------------------------------------------------------------------------


def test_prompts_are_sent_as_tokens_and_answered_greedily():
    with FakeApi(lambda ids: "yes" if ids[-1] else "no") as api:
        answers = Client(api.url).ask([simple(0), simple(1)])
    assert [(a.text, a.score, a.prompt_tokens, a.tries) for a in answers] == [("no", 0, 4, 1), ("yes", 1, 4, 1)]
    assert {"model": "model", "prompt": [1, 2, 3, 0], "max_tokens": 7, "temperature": 0} in api.requests


def test_no_more_requests_at_a_time_than_allowed():
    import time

    with FakeApi(lambda ids: time.sleep(0.4) or "yes") as api:
        answers = Client(api.url, concurrency=3).ask([simple(i) for i in range(9)])
    assert len(answers) == 9 and 1 < api.most_at_once <= 3


def test_a_server_that_fails_is_asked_again_and_that_is_told():
    said, failures = [], ["busy", "hang up"]

    def answer(ids):
        if not failures:
            return "yes"
        if failures.pop(0) == "busy":
            return 503, "try later"
        raise ConnectionError

    with FakeApi(answer) as api:
        (given,) = Client(api.url, tell=said.append).ask([simple(0)])
    assert (given.text, given.tries) == ("yes", 3)
    assert said[0] == "sample 0 of vt at 100 tokens failed: try later; asking again." and len(said) == 2


@pytest.mark.parametrize(
    "answer, counted, error",
    [
        ((503, "try later"), None, r"^sample 5 of vt at 100 tokens failed: try later, 3 times\.$"),
        ((400, "too long"), None, r"^http://\S+/v1/? refuses sample 5 of vt at 100 tokens: too long\.$"),
        (
            "yes",
            3,
            r"counts 3 tokens where sample 5 of vt at 100 tokens has 4: does it serve the model whose tokenizer ",
        ),
    ],
)
def test_a_server_that_does_not_answer_is_told_in_a_sentence(answer, counted, error):
    with FakeApi(lambda ids: answer) as api:
        api.counted = counted
        with pytest.raises(TaskError, match=error):
            Client(api.url, tell=lambda said: None).ask([simple(5)])


def test_the_model_must_be_known():
    with FakeApi(str, models=("one", "two")) as api:
        assert Client(api.url, "two").name == "two"
        for name in (None, "three"):
            with pytest.raises(TaskError, match=r"^Name one of the models that \S+ serves with --name: one, two\.$"):
                Client(api.url, name)
    with pytest.raises(TaskError, match=r"^No server with the OpenAI API answers at \S+: .*\.$"):
        Client(api.url)


def test_a_log_without_prefills_says_that_all_ran_dense():
    with FakeApi(lambda ids: "yes") as api:
        assert Backend(Client(api.url), lambda: "nothing").ask([simple(0)])[1] == (10, 10)
        assert Backend(Client(api.url)).ask([simple(0)])[1] is None


def test_a_density_is_that_of_all_prompts():
    """Of prompts that no line names, all pairs are visited."""
    long, short = simple(0, range(99)), simple(1, range(9))
    causal = 100 * 101 // 2 + 10 * 11 // 2
    assert pairs([long, short], "INFO something\n") == (causal, causal)
    assert pairs([long, short], told(100, 0.4)) == (causal - round(0.6 * 100 * 101 // 2), causal)
    cached = told(100, 0.4).replace("cached=0", "cached=60")
    assert pairs([long], cached) == (5050 - round(0.6 * (5050 - 60 * 61 // 2)), 5050)
    assert pairs([long], step(100)) is None, "there are steps, and nobody says of which prompts"
    told_twice = told(100, 0.4) + told(100, 0.4) + told(50, 0.1)
    assert pairs([long, short], told_twice) == pairs([long, short], told(100, 0.4)), "asked again, and by others"


def test_a_density_is_of_the_samples_that_are_shown(tmp_path):
    """Where more are kept than are asked for, their pairs cannot be told apart."""
    answers = Answers(tmp_path / "a.parts.jsonl", {})
    given = [(("vt", 2000, index), Answer("yes", 1.0, 4, 1)) for index in range(4)]
    answers.add("s2o", given[:2], (1, 10))
    answers.add("s2o", given[2:], (9, 10))
    assert answers.density("s2o", {("vt", 2000): 4}) == 0.5
    assert answers.density("s2o", {("vt", 2000): 2}) is None


def test_a_server_of_ours_that_says_nothing_of_it_has_no_density():
    """As where its log leaves out such lines: it would look like a dense one's."""
    with FakeApi(lambda ids: "yes") as api:
        assert Backend(Client(api.url), lambda: "nothing", ours=True).ask([simple(0)])[1] is None


def test_the_config_is_that_of_the_servers_arguments(checkpoint, served, tmp_path):
    """Of a file that was changed, answers are not taken up again."""
    mine, out = tmp_path / "mine.yaml", tmp_path / "a.csv"
    mine.write_text("params: {threshold: 0.1}\n")
    digests = set()
    for server in ([], ["--additional-config", json.dumps({"s2o": str(mine)})], [f"--additional-config.s2o={mine}"]):
        small(checkpoint, out, samples=[1], tasks=["vt"], server=server)
        digests.add(json.loads(out.with_name("a.csv.made.json").read_text())["config"])
        out.with_name("a.csv.parts.jsonl").unlink()
    assert len(digests) == 2
    small(checkpoint, out, samples=[1], tasks=["vt"], server=server)
    mine.write_text("params: {threshold: 0.2}\n")
    with pytest.raises(TaskError, match=r"^The answers in .*jsonl have other config: "):
        small(checkpoint, out, samples=[1], tasks=["vt"], server=server)
    for wrong, said in (("{", "is no JSON"), ('{"s2o": {"tau": 1}}', "there is no field 'tau'")):
        with pytest.raises(TaskError, match=said):
            small(checkpoint, tmp_path / "b.csv", tasks=["vt"], server=["--additional-config", wrong])


# -- a running server, downloaded samples, the command ----------------------------------------------------------------


def choice(answer: str) -> dict:
    fields = {"context": "The grass grows. " * 100, "question": "What grows?", "answer": answer}
    return fields | {f"choice_{letter}": letter.lower() for letter in "ABCD"}


def test_a_running_server_is_asked_and_compared_with_an_earlier_one(checkpoint, tmp_path, monkeypatch, capsys):
    """The command, on two downloaded samples: the reference first, and then what is compared with it."""
    path, log = tmp_path / "data.jsonl", tmp_path / "server.log"
    path.write_text("".join(json.dumps(choice(letter)) + "\n" for letter in "BD"))
    log.write_text(told(9, 0.5))
    asked = []

    def answer(ids):
        asked.append(ids)
        with log.open("a") as file:
            file.write(told(len(ids), 0.2))
        return "B)"

    command_line = ["tasks", checkpoint, "--out", str(tmp_path / "a.csv"), "--longbench-v2", str(path)]
    command_line += ["--lengths", "1000", "--samples", "50"]
    with FakeApi(answer) as api:
        for backend, more in (("dense", []), ("mine", ["--log", str(log)])):
            monkeypatch.setattr(sys, "argv", [*command_line, "--url", api.url, "--backends", backend, *more])
            command.main()
        assert {len(request["prompt"]) for request in api.requests} == {1000 - 128}
    mine, dense = rows(tmp_path / "a.csv")
    assert (mine["backend"], mine["task"], mine["score"], mine["density"], mine["same_answers"]) == (
        "mine", longbench.TASK, "50.00", "0.200", "2",
    )  # fmt: skip
    assert (dense["backend"], dense["samples"], dense["density"]) == ("dense", "2", "")
    assert "longbench_v2 at 1000: +0.0 points (" in capsys.readouterr().out


def test_prompts_beyond_the_servers_context_are_not_sent(checkpoint, tmp_path):
    with (
        FakeApi(lambda ids: "yes", longest=1000) as api,
        pytest.raises(TaskError, match=r"takes 1000 tokens at most, not 2000\.$"),
    ):
        small(checkpoint, tmp_path / "a.csv", url=api.url, backends=["s2o"])
    assert api.requests == []


def test_yarn_extends_a_context(checkpoint, tmp_path):
    from vllm_s2o.quality.capture import open_model

    assert backends.extension(open_model(checkpoint, 8192), 8192) == []
    flag, overrides, *more = backends.extension(open_model(checkpoint, 32768), 32768)
    overrides = json.loads(overrides)
    rope = overrides["rope_parameters"]
    assert overrides["max_position_embeddings"] == 32768, "vLLM refuses a longer sequence than this"
    assert flag == "--hf-overrides" and more == ["--max-model-len", "32768"]
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 8192)


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--tasks", "qa"], "tasks: There is no task qa: known are niah_single_1, "),
        (["--tasks"], "tasks: At least one task and one backend must be named."),
        (["--backends", "fast"], "tasks: There is no backend fast to start: known are s2o, dense."),
        (["--url", "http://localhost:1/v1"], "tasks: A server that runs already is one backend: name it, with --backe"),
        (["--samples", "1", "2"], "tasks: Give one number of samples, or one for each of the 4 lengths."),
        (["--samples", "0"], "tasks: At least one length must be given, and lengths and numbers of samples are 1 or "),
        (["--concurrency", "0"], "--concurrency takes 1 or more"),
        (["--infinitebench", "math_calc.jsonl"], "tasks: The task math_calc of InfiniteBench is not scored here: "),
        (["--url", "http://localhost:1", "--backends", "s2o", "--log", "none.log"], "tasks: There is no log none.log."),
    ],
)
def test_bad_arguments_are_told_in_a_sentence(checkpoint, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.setattr(sys, "argv", ["tasks", checkpoint, "--out", str(tmp_path / "a.csv"), *arguments])
    with pytest.raises(SystemExit) as caught:
        command.main()
    assert said in f"{caught.value.code} {capsys.readouterr().err}"
    assert not (tmp_path / "a.csv").exists()


def test_a_server_that_does_not_come_up_is_told_in_a_sentence(checkpoint, tmp_path, monkeypatch):
    ended = "the server ended with 1:\nTraceback\nValueError: no such thing"

    def fail(self):
        raise backends.ServerError(ended)

    monkeypatch.setattr(backends.Server, "_wait_until_up", fail)
    monkeypatch.setattr(backends.Server, "launch", lambda self: None)
    monkeypatch.setattr(backends.Server, "stop", lambda self: None)
    with (
        pytest.raises(
            TaskError, match=r"^The server of s2o does not come up: the server ended with 1: \.\.\. ValueErr"
        ),
        backends.started("s2o", checkpoint, [], tmp_path),
    ):
        pass
