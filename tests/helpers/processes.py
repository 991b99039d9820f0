"""Programs in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

CHANGED = ("VLLM_PLUGINS", "VLLM_S2O_CONFIG", "PYTHONSAFEPATH", "MAKEFLAGS", "MAKELEVEL")
"""Variables that would change what a program does: `make test` itself sets some."""


def without(*names: str) -> dict[str, str]:
    """The variables of this process but some."""
    return {name: value for name, value in os.environ.items() if name not in names}


def python_path(*first: Path) -> str:
    """For PYTHONPATH: some directories, before those that it has: what is installed may be found by it alone."""
    return os.pathsep.join([*map(str, first), *filter(None, [os.environ.get("PYTHONPATH")])])


def run(command: list[str | Path], cwd: Path, **env: str) -> str:
    """Run a program, which must succeed, and return what it printed last."""
    done = subprocess.run(command, cwd=cwd, env=without(*CHANGED) | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]


def run_python(code: str, cwd: Path, *options: str, **env: str) -> str:
    """Like `python -c` at a prompt: the directory is on sys.path."""
    return run([sys.executable, *options, "-c", code], cwd, **env)


def make(*arguments: str, cwd: Path = ROOT, **env: str) -> str:
    return run(["make", "--silent", *arguments], cwd, **env)


def pip(*arguments: str | Path, cwd: Path = ROOT) -> str:
    """Run pip, which must succeed, and return its warnings."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stderr
