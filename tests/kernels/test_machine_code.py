"""What the installed Triton makes of the kernels for a Hopper GPU; `test_gluon.py` compiles those in Gluon."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import python_path

HELPERS = Path(__file__).parents[1] / "helpers"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_attention_for_many_kinds_of_models():
    """In a process of its own: this one may have Triton's interpreter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = python_path(HELPERS)
    done = subprocess.run(
        [sys.executable, HELPERS / "compile_many.py"], capture_output=True, text=True, env=env, timeout=1800
    )
    kernels = [line for line in done.stdout.splitlines() if line.startswith(("attention:", "marked tiles:"))]
    assert [line for line in kernels if not line.endswith(": right")] == [], done.stderr[-2000:]
    assert len(kernels) == 2 * (7 * 3 * 4 + 4)
    assert done.returncode == 0, done.stderr[-2000:]
