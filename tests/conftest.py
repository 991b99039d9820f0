"""Without a GPU the Triton kernels run in Triton's interpreter, which must be chosen before they are imported."""

import os
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest
from processes import ROOT, pip

# PyTorch's threads wait for each other without keeping their cores busy: beside another process of tests, which has one
# of two cores, waiting takes several times as long as work. Read on import, and not for the programs that tests start.
with patch.dict(os.environ, {"OMP_WAIT_POLICY": "PASSIVE"}):
    import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

WHOLE = {
    "tests/serving/test_bad_config.py": "servers that share nothing with other tests",
    "tests/cli/test_command.py": "environments with the package installed",
    "tests/test_examples.py": "vLLM's parser, which takes all of vLLM to import",
    "tests/test_plugin_processes.py": "two processes that import all of vLLM",
}
"""Files whose tests share what takes long to make, and what that is."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """With pytest-xdist, `-n 2`: one process runs all tests that share servers, and the other one meanwhile all else.

    Each process makes fixtures of its own: otherwise both would start every server, for which memory does not suffice.
    The largest groups of tests are handed out first, so that the servers' are among them, and the engines', which the
    other process has; the others go one by one to the process that has time. With `--dist loadgroup` that would take
    marks only, but pytest-xdist 3.8.0 does not see them under pytest 9.2.0.
    """
    if config.getvalue("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            if path in WHOLE:
                return path
            if path.startswith("tests/engine/"):
                return "engines"
            return "servers" if path.startswith("tests/serving/") else nodeid

    return Scheduling(config, log)


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """A clean copy of the checkout, its tests and benchmarks included."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    hidden = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
    shutil.copytree(ROOT, copy, ignore=hidden)
    return copy


@pytest.fixture(scope="session")
def wheel(source, tmp_path_factory) -> Path:
    """Built without a network."""
    work = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", work, source)
    (built,) = work.glob("*.whl")
    return built
