"""Engines whose parts run in processes of their own, started by `engine_program.py`."""

import json
import subprocess
import sys
from pathlib import Path

import engines
from processes import CHANGED, ROOT, python_path, without

PROGRAM = ROOT / "tests" / "helpers" / "engine_program.py"
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
if engines.CPU:
    ENVIRONMENT |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
else:
    # NCCL's plain paths alone: no memory of several GPUs under one address, which not every host lets a guest have.
    ENVIRONMENT |= {
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_ALLREDUCE_USE_SYMM_MEM": "0",
        "VLLM_ALLREDUCE_USE_FLASHINFER": "0", "NCCL_NVLS_ENABLE": "0", "NVSHMEM_DISABLE_NVLS": "1",
        "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    }  # fmt: skip


def run(
    options: dict, prompts: list[list[int]], cwd: Path, generated: int = 4, dense: tuple[int, ...] = ()
) -> tuple[list, str]:
    """What the program writes of its engine, and its log.

    Args:
        dense: which prompts ask for dense attention.
    """
    asked = {"options": options, "prompts": prompts, "dense": dense, "generated": generated}
    environment = without(*CHANGED) | ENVIRONMENT | {"PYTHONPATH": python_path(PROGRAM.parent)}
    command = [sys.executable, "-P", PROGRAM, json.dumps(asked), cwd / "found.json"]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return json.loads((cwd / "found.json").read_text()), done.stdout + done.stderr
