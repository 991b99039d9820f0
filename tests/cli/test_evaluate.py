"""`vllm-s2o evaluate`: what it tells, what a script gets, and how it refuses."""

import json
import re
import shlex

import calibration_case
import pytest

from vllm_s2o.quality.tasks import command as tasks

SMALL = ("--text", "code", "--tokens", "1024")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return calibration_case.save(tmp_path_factory.mktemp("model"))


def test_a_text_named_twice_is_one(command, checkpoint):
    document = command("evaluate", checkpoint, *SMALL, "--text", "code", "--json").document
    assert list(document["texts"]) == ["code"]
    assert document["mean"] == {name: document["texts"]["code"][name] for name in document["mean"]}
    assert (document["min_seq_len"], document["rope_factor"]) == (8192, 1.0)


def test_a_config_is_judged_below_its_shortest_sparse_prompt(command, checkpoint, tmp_path):
    (tmp_path / "my.yaml").write_text("min_seq_len: 3000\nparams: {threshold: 0.1, segment_len: 256}\n")
    ended = command("evaluate", checkpoint, "--config", "my.yaml", *SMALL)
    assert ended.status == 0
    assert "A server leaves prompts of 1024 tokens dense, below min_seq_len=3000: " in ended.out
    density = float(ended.out[ended.out.index("density") :].splitlines()[1].split()[1])
    assert density < 1


def test_tasks_and_needles_are_pointed_to(command, checkpoint):
    last = command("evaluate", checkpoint, *SMALL).out.splitlines()[-1]
    for module in ("tasks", "needles"):
        assert f"python -P -m vllm_s2o.quality.{module} {checkpoint}" in last


MINE, OTHER = {"s2o": "my file.yaml"}, {"s2o": {"threshold": 0.5, "segment_len": 256}}
BOTH = {"s2o": {"config": "my file.yaml", **OTHER["s2o"]}}


@pytest.mark.parametrize(
    "arguments, variable, expected",
    [
        (("--config", "my file.yaml"), None, MINE),
        (("--additional-config", json.dumps(OTHER)), None, OTHER),
        ((), "my file.yaml", MINE),
        (("--additional-config", json.dumps(OTHER)), "my file.yaml", BOTH),
        (("--config", "my file.yaml"), "gone.yaml", MINE),
    ],
)
def test_servers_get_the_config_that_was_judged(
    command, checkpoint, tmp_path, monkeypatch, arguments, variable, expected
):
    """The command for tasks, as a shell and its parser read it."""
    (tmp_path / "my file.yaml").write_text("params: {segment_len: 128}\n")
    if variable is not None:
        monkeypatch.setenv("VLLM_S2O_CONFIG", variable)
    ended = command("evaluate", checkpoint, *SMALL, *arguments)
    last = ended.out.splitlines()[-1]
    line = re.search(r"python -P -m vllm_s2o\.quality\.tasks (.+) asks tasks", last)[1]
    flag, given = tasks.parser().parse_args(shlex.split(line)).server
    assert (flag, json.loads(given)) == ("--additional-config", expected)
    assert last.endswith(f"of a server that was started with {flag} {shlex.quote(given)}.")


def test_an_extended_context_is_told(command, checkpoint):
    arguments = ("evaluate", checkpoint, "--text", "code", "--tokens", "2560")
    assert command(*arguments, "--json").document["rope_factor"] == 1.25
    said = "The model's context ends at 2048 tokens: it ran with YaRN x1.25, "
    assert sum(line.startswith(said) for line in command(*arguments).out.splitlines()) == 1


@pytest.mark.parametrize(
    "text, said",
    [
        (None, "vllm-s2o: --config: my.yaml: there is no such file (looked for "),
        ("params: {tau: 1}\n", "vllm-s2o: --config: my.yaml: there is no field 'params.tau'; allowed are "),
        ("layers: [{layers: 30, threshold: 0}]\n", "vllm-s2o: my.yaml: the field 'layers.0.layers' cannot be 30; "),
    ],
)
def test_a_bad_config_is_told_with_the_option_that_names_it(command, smollm2, tmp_path, text, said):
    if text is not None:
        (tmp_path / "my.yaml").write_text(text)
    ended = command("evaluate", smollm2, "--config", "my.yaml")
    assert ended.status == 1 and ended.sentence.startswith(said)


def test_answers_are_told_with_what_they_were_asked_of(command, checkpoint, tmp_path, monkeypatch):
    """Servers get the config that is judged, and what is named for them, and the device before the model does."""
    from vllm_s2o.quality.capture import Source
    from vllm_s2o.quality.tasks import run
    from vllm_s2o.quality.tasks.statistics import Estimate
    from vllm_s2o.quality.tasks.table import Row

    asked, loaded, load = [], [], Source.load
    monkeypatch.setattr(Source, "load", lambda source: loaded.append(len(asked)) or load(source))

    def measure(model, out, **options):
        asked.append((model, options))
        worse = Estimate(-25.0, -70.0, 20.0)
        scores = {"s2o": Estimate(50.0, 15.0, 85.0), "dense": Estimate(75.0, 30.0, 95.0)}
        return [
            Row("s2o", "vt", 1024, scores["s2o"], 0.25, 4, worse, 1), Row("dense", "vt", 1024, scores["dense"], 1.0, 4)
        ], 0  # fmt: skip

    monkeypatch.setattr(run, "measure", measure)
    (tmp_path / "my.yaml").write_text("params: {segment_len: 128}\n")
    more = ("--config", "my.yaml", "--tasks", "4", "--server", "--enforce-eager --seed 3")
    said = command("evaluate", checkpoint, *SMALL, *more).out
    server = ["--additional-config", '{"s2o": "my.yaml"}', "--enforce-eager", "--seed", "3"]
    assert loaded == [1]
    assert asked == [(checkpoint, {"lengths": [1024], "samples": [4], "server": server})]
    assert "Answers to 4 prompts of each task:" in said and "density 0.250  -25.0 points (-70.0 to +20.0)" in said
    ours, dense = command("evaluate", checkpoint, *SMALL, *more, "--json").document["tasks"]
    assert (ours["task"], ours["backend"], ours["score"]["mean"], ours["difference"]["low"]) == ("vt", "s2o", 50, -70)
    assert (dense["backend"], dense["density"], dense["samples"]) == ("dense", 1, 4) and "difference" not in dense
    assert command("evaluate", checkpoint, *SMALL, "--json").document["tasks"] == []


def test_answers_that_cannot_be_had_are_told_in_a_sentence(command, checkpoint, monkeypatch):
    from vllm_s2o.quality.tasks import run
    from vllm_s2o.quality.tasks.prompt import TaskError

    def measure(*args, **options):
        raise TaskError("The server of s2o does not come up: why.")

    monkeypatch.setattr(run, "measure", measure)
    ended = command("evaluate", checkpoint, *SMALL, "--tasks", "1")
    assert ended.status == 1 and ended.err.splitlines()[-1].endswith("The server of s2o does not come up: why.")
    monkeypatch.setattr("vllm_s2o.cli.checks.without_vllm", lambda: "install it.")
    ended = command("evaluate", checkpoint, *SMALL, "--tasks", "1")
    assert ended.status == 1 and ended.sentence.endswith("--tasks asks, is not installed: install it.")


@pytest.mark.parametrize("more", [(), ("--tasks", "1")], ids=["text", "tasks"])
def test_a_config_that_leaves_all_dense_is_refused_before_anything_is_asked(
    command, checkpoint, tmp_path, monkeypatch, more
):
    from vllm_s2o.quality.tasks import run

    monkeypatch.setattr(run, "measure", None)
    (tmp_path / "my.yaml").write_text("layers: [{layers: 0-2, threshold: dense}]\n")
    ended = command("evaluate", checkpoint, "--config", "my.yaml", *SMALL, *more)
    assert ended.status == 1
    assert ended.sentence.endswith("my.yaml makes prompts sparse in no layer: there is nothing to measure.")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (("--server", "--seed 3"), "--server is for the servers of --tasks, which is not given."),
        (
            ("--tasks", "1", "--server", "--additional_config.s2o=a.yaml"),
            "--server cannot choose the backend or ",
        ),
        (
            ("--tasks", "1", "--server", "-ac.backend FLASH_ATTN"),
            "--server cannot choose the backend or ",
        ),
    ],
)
def test_servers_arguments_that_would_mean_something_else_are_refused(command, smollm2, arguments, said):
    ended = command("evaluate", smollm2, *arguments)
    assert ended.status == 2 and said in ended.sentence
