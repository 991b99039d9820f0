"""A config that cannot be used stops the server at once, with one sentence at the end of its output.

One for each way in which a config reaches it; tests/config/test_refusals.py has all that can be wrong.
"""

import json
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from installed import since
from processes import ROOT, python_path
from serving import S2O, Server

pytestmark = pytest.mark.serving

# name: what the option holds, and what the sentence must name: the file or option, the field, what is allowed
OPTIONS = {
    "missing file": ("missing.yaml", ["missing.yaml", "no such file", "YAML config file is expected"]),
    "head that the model lacks": (
        {"layers": [{"layers": 1, "heads": [0, "8-9"], "threshold": 0.1}]},
        ["additional-config", "layers.0.heads", "8-9", "0 to 8"],
    ),
}
# name: what a file holds that VLLM_S2O_CONFIG names, and words
FILES = {
    "unknown key in a file": ("params: {tile_sise: 64}\n", [".yaml", "params.tile_sise", "allowed", "tile_size"]),
}
AMBIGUOUS = {
    "ambiguous match": ["mine.yaml and smollm2-135m-instruct.yaml both match", "'match'", "exactly one may"],
}
WORDS = {name: words for name, (_, words) in (OPTIONS | FILES).items()} | AMBIGUOUS


def checkout_with_a_second_file(directory: Path) -> Path:
    """A checkout whose user has copied SmolLM2's file: the shipped ones fit no model twice."""
    for name in ("vllm_s2o", "kernels", "configs"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    configs = directory / "configs"
    shutil.copy(configs / "smollm2-135m-instruct.yaml", configs / "mine.yaml")
    return directory


@pytest.fixture(scope="module")
def ended(model, log_dir):
    """Exit status and output per case. Most of their time is vLLM's import, which keeps one core busy and takes
    0.7 GB: no more run at a time than there are cores."""
    cases = {}

    def add(name, args=(), env=None):
        cases[name] = (model, log_dir / f"bad {name}.log", (*S2O, *args), env)

    def run(case):
        server = Server(*case)  # finds a free port, which another may have taken a minute later
        server.launch()
        try:
            return server.process.wait(180), server.log
        finally:
            server.stop()

    for name, (given, _) in OPTIONS.items():
        add(name, ("--additional-config", json.dumps({"s2o": given})))
    for name, (text, _) in FILES.items():
        file = log_dir / f"{name}.yaml"
        file.write_text(text)
        add(name, env={"VLLM_S2O_CONFIG": str(file)})
    for name in AMBIGUOUS:
        add(name, env={"PYTHONPATH": python_path(checkout_with_a_second_file(log_dir / name))})
    with ThreadPoolExecutor(min(len(os.sched_getaffinity(0)), 2)) as pool:
        return dict(zip(cases, pool.map(run, cases.values()), strict=True))


def last_line(log: str) -> str:
    last = [line for line in log.splitlines() if line.strip()][-1]
    # Older vLLM puts this before whatever a server writes.
    return last if since("0.32") else re.sub(r"^\(APIServer pid=\d+\) ", "", last)


@pytest.mark.parametrize("name", WORDS)
def test_sentence(ended, name):
    status, log = ended[name]
    sentence = last_line(log)
    assert status != 0
    assert sentence.startswith("vllm-s2o: ")
    assert sentence.endswith(".")
    for word in WORDS[name]:
        assert word in sentence
    assert "Engine core initialization failed" not in log
    assert "Traceback" not in log
