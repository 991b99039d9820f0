"""Names that are no model, given to commands that transformers would answer."""

import sys

import pytest

from vllm_s2o import model as models
from vllm_s2o.quality import frontier
from vllm_s2o.quality.tasks import command


@pytest.mark.parametrize(("name", "main"), [("frontier", frontier.main), ("tasks", command.main)])
def test_a_name_that_is_no_model_is_told_at_once(tmp_path, monkeypatch, name, main):
    """In the words of the other commands: transformers would ask the network for half a minute."""
    monkeypatch.setattr(models, "_reachable", lambda host: False)
    with pytest.raises(models.ConfigError) as words:
        models.read("nomodel")
    monkeypatch.setattr(sys, "argv", [name, "nomodel", "--out", str(tmp_path / "a.csv")])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == f"{name}: {words.value}"
    assert list(tmp_path.iterdir()) == []
