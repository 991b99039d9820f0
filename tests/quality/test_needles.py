"""The command that prints a request with a hidden number."""

import json
import sys

import causal_lm
import pytest

from vllm_s2o.quality import needles


@pytest.fixture
def main(monkeypatch):
    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", ["needles", *arguments])
        needles.main()

    return main


def test_a_request_and_its_number(main, tmp_path, capsys):
    main(str(causal_lm.save(tmp_path / "tiny")), "--tokens", "900", "--name", "it")
    out, err = capsys.readouterr()
    request, number = json.loads(out), err.split()[-1]
    assert request["model"] == "it" and number in request["messages"][0]["content"]


def test_a_model_that_is_none_is_told_in_a_sentence(main, tmp_path):
    with pytest.raises(SystemExit) as caught:
        main(str(tmp_path / "missing"))
    assert caught.value.code.startswith(f"needles: there is no directory {tmp_path / 'missing'}; allowed is ")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as caught:
        main(str(tmp_path))
    assert caught.value.code.startswith(f"needles: The model {tmp_path} cannot be loaded: ")
    assert "\n" not in caught.value.code
