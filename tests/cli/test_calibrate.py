"""`vllm-s2o calibrate`: its example, what a script gets, and how it ends where it cannot go on."""

import json
import re
import shlex
from pathlib import Path

import calibration_case
import click
import pytest

from vllm_s2o.cli.main import cli
from vllm_s2o.quality.calibration import run

SMALL = ("--tokens", "2048", "--text", "code")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return calibration_case.save(tmp_path_factory.mktemp("model"))


def test_the_example_of_the_help(command, checkpoint, tmp_path):
    """On a smaller model: a table, the comparison, and a file that the other commands take."""
    text = cli.commands["calibrate"].get_help(click.Context(cli.commands["calibrate"], info_name="vllm-s2o calibrate"))
    (example,) = re.findall(r"^ +(vllm-s2o .+)$", text, re.MULTILINE)
    arguments = [checkpoint if "SmolLM2" in word else word for word in shlex.split(example)[1:]]
    ended = command(*arguments)
    assert ended.status == 0
    lines = ended.out.splitlines()
    assert [line.split()[0] for line in lines[1:5]] == ["0", "1", "2", "all"]
    assert re.search(r"^The best single threshold with no worse layer, [\d.]+, visits 0\.\d{3}\.$", ended.out, re.M)
    assert re.search(
        r"^For an H100 min_seq_len was estimated as \d+; it is capped at (512|1024), for the model's context ends at "
        r"2048 tokens\.$", ended.out, re.M,
    )  # fmt: skip
    assert "No prompt is as long as that" not in ended.out
    assert (tmp_path / "my.yaml").exists()
    assert command("config", "validate", "my.yaml", "--model", checkpoint).status == 0
    shown = command("config", "show", checkpoint, "--additional-config", '{"s2o": "my.yaml"}')
    assert "calibrated: searched on " in shown.out


def test_what_a_script_gets(command, checkpoint, tmp_path):
    arguments = ("calibrate", checkpoint, "--target-density", "0.5", "--out", "a.yaml", *SMALL, "--segment-len", "256")
    ended = command(*arguments, "--min-seq-len", "512", "--json")
    document = json.loads(ended.out)
    assert ended.status == 0
    assert (document["file"], document["segment_len"], document["min_seq_len"]) == ("a.yaml", 256, 512)
    assert [layer["layer"] for layer in document["layers"]] == [0, 1, 2]
    assert all(len(layer["thresholds"]) == 2 for layer in document["layers"] if layer["thresholds"])
    assert document["density"] == pytest.approx(sum(layer["density"] for layer in document["layers"]) / 3)
    before = (tmp_path / "a.yaml").read_text()
    refused = command(*arguments)
    assert refused.status == 2
    assert "a.yaml is there already: name another file, or add --force." in refused.sentence
    assert command(*arguments, "--force").status == 0
    assert (tmp_path / "a.yaml").read_text() != before, "another minimum length"


def test_what_no_prompt_reaches_and_what_yarn_does_is_told(command, checkpoint):
    arguments = ("--max-relative-error", "0.1", "--out", "a.yaml", "--text", "code", "--tokens", "2560")
    ended = command("calibrate", checkpoint, *arguments, "--segment-len", "256", "--min-seq-len", "3000")
    lines = ended.out.splitlines()
    for said in ("The model's context ends at 2048 tokens: it ran with YaRN x1.25, ", "No prompt is as long as that: "):
        assert sum(line.startswith(said) for line in lines) == 1


def test_an_interruption_says_how_to_go_on(command, checkpoint, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "measure", interrupted)
    ended = command("calibrate", checkpoint, "--max-relative-error", "0.02", "--out", "a.yaml", *SMALL)
    assert (ended.status, ended.out) == (130, "")
    assert "vllm-s2o calibrate: stopped; the same command goes on from here." in ended.err.splitlines()
    assert [path.name for path in tmp_path.iterdir()] == ["a.yaml.parts.jsonl"]


@pytest.mark.parametrize(
    "arguments, status, said",
    [
        ((), 1, "Exactly one budget is needed: "),
        (("--max-relative-error", "0.1", "--target-density", "0.1"), 1, "Exactly one budget is needed: "),
        (("--target-density", "0.001", *SMALL), 1, "A density of 0.001 cannot be reached: with segments of 256 or "),
        (("--max-relative-error", "2"), 1, "The budget max_relative_error=2 cannot be met: "),
        (("--max-relative-error", "0.1", "--tokens", "300"), 1, "300 tokens hold no two segments of 512: "),
        (("--max-relative-error", "0.1", "--segment-len", "100"), 1, "segment_len=100 must be a multiple of tile_size"),
        (("--max-relative-error", "0.1", "--text", "nowhere.txt"), 1, "The text nowhere.txt cannot be read: "),
        (("--max-relative-error", "much"), 2, "'much' is not a valid float."),
        (("--min-seq-len", "0"), 2, "Invalid value for '--min-seq-len': "),
        (("--max-relative-error", "0.1", "--min-seq-len", "2147483648"), 2, "Invalid value for '--min-seq-len': "),
        (
            ("--max-relative-error", "0.1", *SMALL, "--additional-config", '{"s2o": {"reference_len": 8192}}'),
            1,
            "The field 'params.reference_len' cannot be given to a calibration: it becomes the length that thresholds "
            "are judged at (--tokens); leave it out.",
        ),
    ],
)
def test_nonsense_is_refused_in_a_line(command, checkpoint, arguments, status, said):
    ended = command("calibrate", checkpoint, "--out", "a.yaml", *arguments)
    assert ended.status == status and said in ended.sentence
    assert not Path("a.yaml").exists()


def test_a_model_without_weights_is_refused_in_a_line(command, smollm2):
    ended = command("calibrate", smollm2, "--max-relative-error", "0.1", "--out", "a.yaml", *SMALL)
    assert ended.status == 1
    assert ended.err.splitlines()[-1].startswith("vllm-s2o")
