"""What `make test-matrix` checks with must see a name that is missing, a call that does not fit, and half a wheel."""

import subprocess
import textwrap
import zipfile
from pathlib import Path

import pytest
import vllm_wheels
from vllm_sources import Sources
from vllm_uses import Problem, follow, uses

# A vLLM of a few lines, with the ways in which the real one makes its names.
FILES = {
    "vllm/__init__.py": "from .version import __version__\n",
    "vllm/version.py": "try:\n    from ._version import __version__\nexcept ImportError:\n    __version__ = 'dev'\n",
    "vllm/_version.py": "__version__ = '1.0'\n",
    "vllm/envs.py": """
        from typing import TYPE_CHECKING
        if TYPE_CHECKING:
            KNOWN: bool = False
            DECLARED: bool = False
        variables = {"KNOWN": lambda: True}
        def __getattr__(name): return variables[name]()
        """,
    "vllm/config/__init__.py": "from vllm.config.vllm import VllmConfig\nfrom .model import ModelConfig\n",
    "vllm/config/vllm.py": """
        from .model import ModelConfig
        class VllmConfig:
            model_config: ModelConfig = None
            speculative: "ModelConfig | None" = None
            layers: dict[str, object]
        """,
    "vllm/config/model.py": """
        from transformers import PretrainedConfig
        class Base:
            def __init__(self, dtype: str):
                self.dtype = dtype
                self.hidden = dtype
        class ModelConfig(Base):
            hf_config: PretrainedConfig
            @property
            def use_mla(self) -> bool: return False
            def get_size(self, parallel, *, fast=False) -> int: return 1
        """,
    "vllm/registry.py": """
        from enum import Enum
        class BackendEnum(Enum):
            CUSTOM = None
            @classmethod
            def register(cls, name: str, value: str) -> "BackendEnum": ...
            def get_path(self) -> str: ...
        """,
}


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources(list(FILES), lambda path: textwrap.dedent(FILES[path]))


def problems(tmp_path: Path, sources: Sources, code: str) -> list[str]:
    """What does not hold of the uses in a module of ours; a use that is absent and asked for is told as such."""
    package = tmp_path / "ours"
    package.mkdir()
    (package / "module.py").write_text("from ours import compat\n" + textwrap.dedent(code))
    found = []
    for use in uses(package):
        try:
            found += [] if follow(use, sources) else [f"no {use}"]
        except Problem as problem:
            found.append(str(problem))
    return found


@pytest.mark.parametrize(
    "code",
    [
        "import vllm\nvllm.__version__\nvllm.__file__",
        "from vllm import envs\nenvs.KNOWN",
        "from vllm.config import VllmConfig, ModelConfig",
        "def f(vllm_config): return vllm_config.model_config.use_mla",
        "def f(vllm_config): return vllm_config.model_config.hf_config.whatever.there.may.be",
        "def f(vllm_config): return vllm_config.speculative.dtype",
        "def f(model_config): return model_config.hidden.upper()",
        "def f(model_config): return model_config.get_size(1, fast=True)",
        "from vllm.registry import BackendEnum\nBackendEnum.CUSTOM.get_path()\nBackendEnum.CUSTOM.name",
        "from vllm.registry import BackendEnum\nBackendEnum.register('A', 'b').get_path()",
        "LOGGER = 'vllm.config.model'",
        "def f(layers): return layers.nothing_of_vllms",
        "def f(model_config):\n    model_config = other()\n    return model_config.theirs",
    ],
)
def test_what_is_there_is_no_problem(tmp_path, sources, code):
    assert problems(tmp_path, sources, code) == []


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("from vllm.moved import Name", "module.py:2 needs vllm.moved, which"),
        ("from vllm.config import Moved", "needs vllm.config.Moved, which this vLLM does not have."),
        ("from vllm import envs\nenvs.UNKNOWN", "module.py:3 needs vllm.envs.UNKNOWN, which"),
        # Declared for type checkers, and not made by anything.
        ("from vllm import envs\nenvs.DECLARED", "needs vllm.envs.DECLARED, which"),
        ("def f(vllm_config): return vllm_config.gone", "needs vllm.config.VllmConfig.gone, which"),
        ("def f(vllm_config):\n    m = vllm_config.model_config\n    return m.gone", "model_config.gone, which"),
        ("def f(vllm_config): return vllm_config.speculative.gone", "speculative.gone, which"),
        ("def f(vllm_config): return getattr(vllm_config.gone, 'more', None)", "VllmConfig.gone, which"),
        ("def f(model_config): return model_config.get_size()", "get_size, which needs the argument 'parallel' in"),
        ("def f(model_config): return model_config.get_size(1, 2)", "which takes 1 arguments by position, not 2 in"),
        ("def f(model_config): return model_config.get_size(1, slow=1)", "which takes no argument 'slow' in"),
        ("def f(model_config): return model_config.get_size(1, parallel=1)", "which would get 'parallel' twice in"),
        ("from vllm.registry import BackendEnum\nBackendEnum.S2O", "needs vllm.registry.BackendEnum.S2O, which"),
        ("from vllm.registry import BackendEnum\nBackendEnum.CUSTOM.value_of()", "CUSTOM.value_of, which"),
        ("def f(model_config): dataclasses.replace(model_config, gone=1)", "ModelConfig.gone, which"),
        ("LOGGER = 'vllm.config.gone'", "needs vllm.config.gone, which"),
        # What cannot be followed is not taken to be right.
        ("def f(vllm_config): return vllm_config.layers[0].name", "add it to TYPES."),
    ],
)
def test_what_is_missing_is_named(tmp_path, sources, code, problem):
    found = problems(tmp_path, sources, code)
    assert any(problem in line for line in found), found


@pytest.mark.parametrize(
    "code",
    [
        "def f(vllm_config): return getattr(vllm_config, 'gone', None)",
        "def f(vllm_config):\n    if hasattr(vllm_config, 'gone'):\n        return vllm_config.gone",
        "def f(vllm_config): return getattr(vllm_config, 'gone', None) or vllm_config.gone",
    ],
)
def test_what_is_asked_for_may_be_missing(tmp_path, sources, code):
    assert set(problems(tmp_path, sources, code)) == {"no VllmConfig.gone"}


# -- wheels -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv(vllm_wheels.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def downloads(monkeypatch) -> list[str]:
    """Versions that were downloaded, as wheels of two files."""
    made = []

    def download(version: str, into: str) -> Path:
        made.append(version)
        wheel = Path(into) / f"vllm-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr("vllm/__init__.py", "name = 'of the wheel'\n")
            archive.writestr("vllm/_C.so", bytes(1000))
            archive.writestr("other/__init__.py", "")
        return wheel

    monkeypatch.setattr(vllm_wheels, "_download", download)
    return made


def test_a_wheel_is_downloaded_once_and_its_sources_are_kept(cache, downloads):
    for _ in range(2):
        found = vllm_wheels.sources("1.0")
        assert list(found.paths) == ["vllm/__init__.py"]
        assert found.name("vllm", "name") is not None
    assert downloads == ["1.0"]
    assert [path.name for path in cache.iterdir()] == ["vllm-1.0.zip"]


def test_a_download_that_breaks_off_leaves_nothing(cache, downloads, monkeypatch):
    def half(wheel, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(zipfile.ZipFile, "writestr", half)
    with pytest.raises(KeyboardInterrupt):
        vllm_wheels.sources("1.0")
    assert list(cache.iterdir()) == []


def test_a_wheel_that_cannot_be_had_is_told_in_one_sentence(cache, monkeypatch):
    def pip(command, **options):
        said = "WARNING: slow\nERROR: Could not find a version\nERROR: No matching distribution found for vllm==9.9\n"
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(vllm_wheels.NoSources) as caught:
        vllm_wheels.sources("9.9")
    reason = "pip says 'No matching distribution found for vllm==9.9'."
    assert str(caught.value) == f"The wheel of vLLM 9.9 cannot be downloaded: {reason}"
    assert list(cache.iterdir()) == []


def test_the_versions_are_those_that_are_supported():
    from vllm_s2o import compat

    assert [version for version in vllm_wheels.VERSIONS if compat.version_problem(version)] == []
    assert vllm_wheels.VERSIONS[0] == compat.SUPPORTED[0]
