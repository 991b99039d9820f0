"""Programs in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHANGED = ("VLLM_PLUGINS", "VLLM_S2O_CONFIG", "PYTHONSAFEPATH", "MAKEFLAGS", "MAKELEVEL")
"""Variables that would change what a program does: `make test` itself sets some."""


def run(command: list[str | Path], cwd: Path, **env: str) -> str:
    """Run a program, which must succeed, and return what it printed last."""
    environment = {name: value for name, value in os.environ.items() if name not in CHANGED}
    done = subprocess.run(command, cwd=cwd, env=environment | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


def run_python(code: str, cwd: Path, *options: str, **env: str) -> str:
    """Like `python -c` at a prompt: the directory is on sys.path."""
    return run([sys.executable, *options, "-c", code], cwd, **env)


def make(*arguments: str, cwd: Path = ROOT, **env: str) -> str:
    return run(["make", "--silent", *arguments], cwd, **env)
