"""vLLM's Python sources, from the wheels of the versions that are supported.

A wheel is hundreds of megabytes, nearly all of them compiled: it is downloaded once, its `*.py` files are kept in an
archive of some megabytes, and it is deleted. Nothing of it is installed or imported.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_sources import Sources

VERSIONS = ("0.25.1", "0.27.1", "0.30.0", "0.32.0", "0.33.0")
"""The first and the last that are supported, those between them that differ, and the one that the CPU tests run on."""

VARIABLE = "VLLM_S2O_MATRIX"
"""A directory for the archives, in place of the one in the user's cache."""


class NoSources(RuntimeError):
    """A version's sources cannot be had, in one sentence."""


def directory() -> Path:
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vllm-s2o" / "matrix"


def _download(version: str, into: str) -> Path:
    """The wheel for this machine: the sources do not depend on the platform, but the registry asks for one."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "download", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", into, f"vllm=={version}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
        raise NoSources(f"The wheel of vLLM {version} cannot be downloaded: pip says {(said or ['nothing'])[-1]!r}.")
    (wheel,) = Path(into).glob("vllm-*.whl")
    return wheel


def _keep_sources(wheel: Path, kept: Path) -> None:
    """Under another name until it is whole: a run that is stopped, or a second one, never leaves or reads half."""
    unfinished = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(wheel) as given, zipfile.ZipFile(unfinished, "w", zipfile.ZIP_DEFLATED) as target:
            for entry in given.infolist():
                if entry.filename.startswith("vllm/") and entry.filename.endswith(".py"):
                    target.writestr(entry.filename, given.read(entry))
        unfinished.replace(kept)
    finally:
        unfinished.unlink(missing_ok=True)


def archive(version: str) -> Path:
    """The version's `*.py` files, by their paths in the wheel. Downloads the wheel the first time."""
    folder = directory()
    kept = folder / f"vllm-{version}.zip"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Beside the archive: /tmp may be memory.
        with tempfile.TemporaryDirectory(dir=folder, prefix="wheel-") as temporary:
            _keep_sources(_download(version, temporary), kept)
    return kept


def sources(version: str) -> Sources:
    opened = zipfile.ZipFile(archive(version))
    return Sources(opened.namelist(), lambda path: opened.read(path).decode())
