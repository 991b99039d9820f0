"""The command in this process: its status and what it prints."""

import json
import sys
from typing import NamedTuple

import pytest
from models import write_smollm2

from vllm_s2o.cli.main import main


class Ended(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """What a refusal says: one line on stderr, and nothing on stdout."""
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("vllm-s2o") and line.endswith(".")
        return line

    @property
    def document(self):
        assert self.err == ""
        return json.loads(self.out)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `vllm-s2o ARGUMENTS` away from the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VLLM_S2O_CONFIG", raising=False)

    def command(*arguments: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["vllm-s2o", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(ended.value.code, *capsys.readouterr())

    return command


@pytest.fixture
def smollm2(tmp_path) -> str:
    """A directory with no more of the model than its dimensions."""
    return write_smollm2(tmp_path / "SmolLM2-135M-Instruct")
