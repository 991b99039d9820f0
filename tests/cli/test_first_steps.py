"""README's first steps with the command, one after the other as they stand, on a smaller model."""

import re
import shlex

import calibration_case
from processes import ROOT

FIRST = (ROOT / "README.md").read_text().partition("\n## First steps\n")[2].partition("\n## ")[0]
LINES = re.findall(r"^ {4}\.venv/bin/vllm-s2o (.+)$", FIRST, re.MULTILINE)


def test_a_config_what_it_costs_and_a_page(command, tmp_path):
    model = calibration_case.save(tmp_path / "model")
    ran = []
    for line in LINES:
        words = [model if word.startswith(".models/") else word for word in shlex.split(line)]
        ended = command(*words)
        assert ended.status == 0, ended.err
        ran.append((words[0], ended.out))
    assert [name for name, _ in ran] == ["calibrate", "evaluate", "report"]
    for _, out in ran[1:]:
        assert out.startswith("config my.yaml (named by the user; calibrated: "), "as the server's log begins"
    assert (tmp_path / "my.html").read_text().startswith("<!doctype html>")
