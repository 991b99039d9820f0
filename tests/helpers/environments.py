"""Virtual environments with this package installed, as a user has it."""

import subprocess
import sys
import venv
from pathlib import Path

from processes import CHANGED, pip, without


class Environment:
    """Everything that this environment has but this package comes along as links: nothing is downloaded.

    Args:
        directory: where to make it.
        package: its wheel or its sdist; None to leave it out.
        missing: distributions to leave out, with the packages of that name.
    """

    def __init__(self, directory: Path, package: Path | None, missing: tuple[str, ...] = ()):
        self.directory = directory
        venv.create(directory, with_pip=False)
        (packages,) = directory.glob("lib/*/site-packages")
        for place in map(Path, sys.path):
            if place.name == "site-packages" and place.is_dir():
                for entry in place.iterdir():
                    if self._wanted(entry.name, missing) and not (packages / entry.name).exists():
                        (packages / entry.name).symlink_to(entry)
        self.python = directory / "bin" / "python"
        if package is not None:
            pip("--python", self.python, "install", "--no-deps", "--no-index", "--no-build-isolation", package)

    @staticmethod
    def _wanted(name: str, missing: tuple[str, ...]) -> bool:
        # Files of paths would lead back to a checkout.
        ours = name.startswith(("vllm_s2o", "__editable__")) or name.endswith(".pth")
        distribution = name.partition("-")[0].replace("_", "-") if name.endswith(".dist-info") else name
        return not ours and distribution not in missing

    def run(self, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
        """The console script."""
        command = [self.directory / "bin" / "vllm-s2o", *arguments]
        environment = without(*CHANGED, "PYTHONPATH") | env
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
