"""Python in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_python(code: str, cwd: Path, *options: str, **env: str) -> str:
    """Run `code` and return what it printed last. Like `python -c` at a prompt: the directory is on sys.path."""
    changed = ("VLLM_PLUGINS", "VLLM_S2O_CONFIG", "PYTHONSAFEPATH")
    environment = {name: value for name, value in os.environ.items() if name not in changed}
    done = subprocess.run(
        [sys.executable, *options, "-c", code], cwd=cwd, env=environment | env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().rpartition("\n")[2]
