"""The Triton kernels touch nothing beside their tensors, in the interpreter: on a GPU that is `make sanitize`."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from processes import ROOT, python_path

EXAMPLES = int(os.environ.get("VLLM_S2O_EXAMPLES", 0)) // 10 or 10


def guarded(*arguments: str) -> subprocess.CompletedProcess:
    program = ROOT / "tests" / "helpers" / "guarded.py"
    environment = os.environ | {"PYTHONPATH": python_path(program.parent)}
    command = [sys.executable, "-P", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
def test_kernels_stay_within_their_tensors():
    done = guarded(str(EXAMPLES), "0")
    assert done.returncode == 0, f"ended with {done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout == f"{EXAMPLES} problems\n"


def test_a_byte_beside_a_tensor_is_seen():
    done = guarded("1", "0", "beside")
    assert (done.returncode, done.stdout) == (-signal.SIGSEGV, "within\n")
