"""`vllm-s2o evaluate --tasks` with real servers."""

import json
import os
import shlex
import subprocess
import sys

import pytest
from processes import CHANGED, without
from serving import BASE_ARGS, KV_CACHE

from vllm_s2o.quality.tasks import suite

pytestmark = [pytest.mark.serving, pytest.mark.long]


def test_all_tasks_are_asked_of_both(model, tmp_path):
    config = {"s2o": {"min_seq_len": 512, "min_query_len": 128, "segment_len": 256}}
    program = [
        sys.executable, "-P", "-m", "vllm_s2o.cli", "evaluate", os.path.relpath(model.resolve(), tmp_path), "--text",
        "code", "--tokens", "1024", "--additional-config", json.dumps(config), "--tasks", "1", "--server",
        shlex.join(BASE_ARGS), "--json",
    ]  # fmt: skip
    done = subprocess.run(program, cwd=tmp_path, env=without(*CHANGED) | KV_CACHE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)["tasks"]
    assert {(row["task"], row["backend"]) for row in rows} == {
        (task, backend) for task in (*suite.TASKS, "average") for backend in ("s2o", "dense")
    }
    assert all(row["density"] == 1 for row in rows if row["backend"] == "dense")
    assert all(0.2 < row["density"] < 1 for row in rows if row["backend"] == "s2o")
