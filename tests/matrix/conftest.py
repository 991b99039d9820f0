"""The contract with vLLM, checked against the sources of each supported version. Run by `make test-matrix`."""

import functools
import re

import pytest
import vllm_wheels


def pytest_addoption(parser):
    parser.addoption("--versions", default="", metavar="LIST", help="versions of vLLM, with spaces or commas between")


def chosen(config) -> tuple[str, ...]:
    given = re.split(r"[ ,]+", config.getoption("--versions").strip())
    return tuple(dict.fromkeys(filter(None, given))) or vllm_wheels.VERSIONS


def pytest_configure(config):
    for version in chosen(config):
        if not re.fullmatch(r"\d+(\.\d+)+", version):
            raise pytest.UsageError(f"{version!r} is no version of vLLM: VERSIONS takes some like 0.32.0.")


def pytest_generate_tests(metafunc):
    if "version" in metafunc.fixturenames:
        # For the session, so that a version's cases follow each other and its sources are parsed once.
        metafunc.parametrize("version", chosen(metafunc.config), scope="session")


def pytest_collection_modifyitems(items):
    for item in items:
        if "matrix" in item.path.parts:
            item.add_marker(pytest.mark.matrix)


@functools.lru_cache(maxsize=2)
def _sources(version: str):
    try:
        return vllm_wheels.sources(version)
    except vllm_wheels.NoSources as error:
        return str(error)


@pytest.fixture(scope="session")
def sources(version):
    """The sources of one version. A version that cannot be had is a failure: nothing would have been checked."""
    found = _sources(version)
    if isinstance(found, str):
        pytest.fail(found, pytrace=False)
    return found
