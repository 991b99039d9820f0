"""The example of `vllm-s2o bench`, with real servers: those of a small model, or it would take minutes."""

import re
import shlex
import subprocess
import sys

import click
import pytest
from processes import CHANGED, without
from serving import KV_CACHE, write_small

from vllm_s2o.cli.main import cli

pytestmark = [pytest.mark.serving, pytest.mark.long]
SPARSE = '{"s2o": {"min_seq_len": 512, "segment_len": 256, "budget": 0.1}}'


def test_the_example(model, tmp_path):
    text = cli.commands["bench"].get_help(click.Context(cli.commands["bench"], info_name="vllm-s2o bench"))
    (example,) = re.findall(r"^ +(vllm-s2o .+)$", text, re.MULTILINE)
    _, command, named, *options = shlex.split(example)
    assert named == ".models/SmolLM2-135M-Instruct"
    options[options.index("--server") + 1] += " --load-format dummy"
    small = write_small(model, tmp_path)
    program = [sys.executable, "-P", "-m", "vllm_s2o.cli", command, str(small), *options, "--additional-config", SPARSE]
    env = without(*CHANGED) | KV_CACHE
    done = subprocess.run(program, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = {line[:36].strip(): line[36:].split() for line in done.stdout.splitlines()}
    s2o, dense, gain = lines["time to the first token, median ms"]
    assert gain == f"{float(dense) / float(s2o):.2f}x"
    assert lines["density of long prefills"][0].startswith("0.") and lines["density of long prefills"][1] == "-"
