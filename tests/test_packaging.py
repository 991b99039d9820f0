"""The wheel holds all that the checkout has, and no directory of the repository hides another package."""

import ast
import configparser
import json
import re
import shlex
import shutil
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from environments import Environment
from processes import ROOT, make, pip, run, run_python

import vllm_s2o

KERNELS = sorted(path.name for path in (ROOT / "kernels").glob("*.py"))
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
SOURCES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "vllm_s2o").rglob("*.py"))


def files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def contents(wheel) -> set[str]:
    return set(files(wheel))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A directory for sys.path, with the wheel in it and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)
    return target


# -- the wheel --------------------------------------------------------------------------------------------------------


def test_the_wheel_holds_every_source(contents):
    assert SOURCES
    assert set(SOURCES) <= contents


def test_the_wheel_holds_every_kernel(contents):
    assert KERNELS
    assert {f"vllm_s2o/kernels/{name}" for name in KERNELS} <= contents


def test_the_wheel_holds_every_config(contents):
    assert "default.yaml" in CONFIGS
    assert {f"vllm_s2o/configs/{name}" for name in CONFIGS} <= contents


def test_the_wheel_says_that_it_has_types(contents):
    """Type checkers look for this file, and pass over the annotations of a package without it."""
    assert "vllm_s2o/py.typed" in contents


def test_the_wheel_holds_nothing_beside_the_package(contents):
    top = {name.partition("/")[0] for name in contents}
    assert top == {"vllm_s2o", f"vllm_s2o-{vllm_s2o.__version__}.dist-info"}


def test_what_the_wheel_says_of_itself(wheel):
    info = f"vllm_s2o-{vllm_s2o.__version__}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        metadata = archive.read(f"{info}/METADATA").decode().splitlines()
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(f"{info}/entry_points.txt").decode())
        assert archive.read(f"{info}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert f"Version: {vllm_s2o.__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert dict(entry_points["vllm.general_plugins"]) == {"s2o": "vllm_s2o.plugin:register"}
    assert dict(entry_points["console_scripts"]) == {"vllm-s2o": "vllm_s2o.cli.main:main"}


def test_an_installed_wheel_works(installed, tmp_path):
    """Away from the repository, of which nothing is used."""
    code = f"""
import importlib, json, sys
import vllm_s2o, vllm_s2o.plugin
from vllm_s2o.config import ModelTraits, load_config
for name in {[name.removesuffix(".py") for name in KERNELS]}:
    importlib.import_module("vllm_s2o.kernels." + name)
resolved = load_config(ModelTraits("someone/other", "OtherForCausalLM", 4, 8, 2, 64))
files = [m.__file__ for n, m in sys.modules.items() if n.startswith("vllm_s2o") and getattr(m, "__file__", None)]
print(json.dumps([resolved.source, files, vllm_s2o.__path__]))
"""
    source, files, path = json.loads(run_python(code, tmp_path, PYTHONPATH=str(installed)))
    assert source == "default.yaml"
    assert len(files) > len(KERNELS)
    assert [file for file in files if not Path(file).is_relative_to(installed)] == []
    assert path == [str(installed / "vllm_s2o")]


DATA = [*(f"configs/{name}" for name in CONFIGS), *(f"kernels/tuning/{p.name}" for p in ROOT.glob("kernels/tuning/*"))]


@pytest.mark.parametrize("file", DATA)
def test_an_installed_wheel_reads_the_files_of_the_checkout(installed, file):
    assert (installed / "vllm_s2o" / file).read_bytes() == (ROOT / file).read_bytes()


INSTALLS = re.findall(r"^ {4}pip install (.+)$", (ROOT / "README.md").read_text(), re.MULTILINE)


def test_readme_says_how_to_install():
    assert {extra for line in INSTALLS for extra in re.findall(r"\[(\w+)\]", line)} >= {"cuda", "cpu"}


@pytest.mark.parametrize("line", INSTALLS)
def test_pip_understands_the_readme(source, line):
    """All but the dependencies, which would take a network: pip reads the line, and the project has the extra."""
    offline = ("--dry-run", "--ignore-installed", "--no-deps", "--no-index", "--no-build-isolation")
    warnings = pip("install", *offline, *shlex.split(line, comments=True), cwd=source)
    assert "does not provide the extra" not in warnings


def test_the_version_stands_in_one_place(source, tmp_path):
    copy = tmp_path / "checkout"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("build", "*.egg-info"))
    (copy / "vllm_s2o" / "version.py").write_text('__version__ = "9.8.7"\n')
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, copy)
    (built,) = tmp_path.glob("*.whl")
    held = files(built)
    assert built.name.startswith("vllm_s2o-9.8.7-")
    assert b"\nVersion: 9.8.7\n" in held["vllm_s2o-9.8.7.dist-info/METADATA"]
    old = vllm_s2o.__version__.encode()
    code = [name for name in held if name.endswith(".py")]
    assert code and [name for name in code if b'"%s"' % old in held[name]] == []


# -- the sdist --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdist(source, tmp_path_factory) -> Path:
    """Built without a network."""
    work = tmp_path_factory.mktemp("sdist")
    run([sys.executable, "-P", "-m", "build", "--sdist", "--no-isolation", "--outdir", work, source], work)
    (built,) = work.glob("*.tar.gz")
    return built


def test_the_sdist_makes_the_same_wheel(sdist, wheel, tmp_path):
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", tmp_path, sdist)
    (again,) = tmp_path.glob("*.whl")
    assert again.name == wheel.name
    assert files(again) == files(wheel)


def test_the_sdist_holds_no_tests(sdist):
    """Without their helpers and models they would fail."""
    with tarfile.open(sdist) as archive:
        top = {name.split("/")[1] for name in archive.getnames() if "/" in name}
    assert {"vllm_s2o", "kernels", "configs", "pyproject.toml", "README.md", "LICENSE"} <= top
    assert not top & {"tests", "benchmarks", "examples"}


PLUGINS = """
import json
from importlib.metadata import entry_points, version
(plugin,) = entry_points(group="vllm.general_plugins", name="s2o")
(script,) = entry_points(group="console_scripts", name="vllm-s2o")
print(json.dumps([version("vllm-s2o"), plugin.load().__module__, plugin.load().__name__, script.load().__module__]))
"""


def test_the_sdist_installs_in_an_environment_of_its_own(sdist, tmp_path):
    environment = Environment(tmp_path / "environment", sdist)
    ended = environment.run("--help", cwd=tmp_path)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("Usage: vllm-s2o")
    found = json.loads(run([environment.python, "-c", PLUGINS], tmp_path, PYTHONPATH=""))
    assert found == [vllm_s2o.__version__, "vllm_s2o.plugin", "register", "vllm_s2o.cli.main"]


# -- a checkout -------------------------------------------------------------------------------------------------------

FOUND = """
import importlib.util as util, json, vllm_s2o, vllm_s2o.configs, vllm_s2o.kernels
from importlib.resources import files
others = [name for name in ("tests", "benchmarks", "vllm_s2o") if util.find_spec("vllm_s2o." + name)]
configs = sorted(entry.name for entry in files("vllm_s2o.configs").iterdir())
paths = [list(module.__path__) for module in (vllm_s2o, vllm_s2o.kernels, vllm_s2o.configs)]
print(json.dumps([*paths, util.find_spec("vllm_s2o.kernels.rank").origin, configs, others]))
"""


def of_a_checkout(root: Path) -> list:
    """What FOUND prints: its kernels and configs, and nothing else of it."""
    folders = [[str(root / name)] for name in ("vllm_s2o", "kernels", "configs")]
    return [*folders, str(root / "kernels" / "rank.py"), CONFIGS, []]


def test_a_checkout_on_the_path_gives_the_package_alone(tmp_path):
    """Not another checkout's either, which this environment may have installed."""
    assert json.loads(run_python(FOUND, tmp_path, PYTHONPATH=str(ROOT))) == of_a_checkout(ROOT)


def test_an_editable_install_gives_the_package_alone(source, tmp_path):
    """Without this environment's packages, among which there may be another install."""
    pip(
        "install", "--no-deps", "--no-build-isolation", "--no-index", "--ignore-installed", "--prefix", tmp_path,
        "--editable", source,
    )  # fmt: skip
    (packages,) = tmp_path.glob("lib/*/site-packages")
    code = f"import site; site.addsitedir({str(packages)!r})\n{FOUND}"
    assert json.loads(run_python(code, tmp_path, "-S", PYTHONPATH="")) == of_a_checkout(source)


# -- the name `kernels` -----------------------------------------------------------------------------------------------

FIND = "import importlib.util as u; s = u.find_spec('kernels'); print(s and [s.origin, *s.submodule_search_locations])"


def is_ours(found: str) -> bool:
    return str(ROOT) in found.replace(sys.prefix, "")


def test_no_module_named_kernels_is_installed(tmp_path):
    """The name is that of Hugging Face's package, which may be installed or not."""
    found = run_python(FIND, tmp_path, PYTHONPATH="")
    assert found == "None" or "site-packages" in found
    assert not is_ours(found)


# From the repository's root: with the working directory on sys.path, Python takes kernels/ for a namespace package.
# Whatever starts from the root keeps it off, or lives with it.


def test_the_repository_has_a_directory_of_that_name():
    """Else the tests below would prove nothing. Without site-packages: an installed package would be found instead."""
    assert is_ours(run_python(FIND, ROOT, "-S", PYTHONPATH=""))


def test_kernels_is_not_found_in_the_repository_with_a_safe_path():
    assert not is_ours(run_python(FIND, ROOT, "-P", PYTHONPATH=""))


def test_readme_runs_modules_with_a_safe_path():
    commands = re.findall(r"^ {4}\S*python .*-m .+$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands
    assert [command for command in commands if " -P " not in command] == []


def test_kernels_is_not_found_in_the_repository_by_a_console_script(tmp_path):
    """`vllm` or `pytest`: Python puts the script's own directory on the path."""
    script = tmp_path / "script"
    script.write_text(f"#!{sys.executable}\n{FIND}\n")
    script.chmod(0o755)
    assert not is_ours(run([script], ROOT, PYTHONPATH=""))


def test_kernels_is_not_found_in_the_repository_under_make():
    rule = f'find: ; @{sys.executable} -c "{FIND}"'
    assert not is_ours(make(f"--eval={rule}", "find", PYTHONPATH=""))


def test_transformers_loads_a_model_in_the_repository_all_the_same():
    """In the plain case too, without a safe path."""
    code = "import sys, transformers.models.llama.modeling_llama as llama; print(sys.path[0] == '', llama.__name__)"
    assert run_python(code, ROOT, PYTHONPATH="") == "True transformers.models.llama.modeling_llama"


def test_transformers_finds_the_same_kernels_from_the_repository(tmp_path):
    code = "from transformers.utils import is_kernels_available; print(is_kernels_available())"
    assert run_python(code, ROOT, PYTHONPATH="") == run_python(code, tmp_path, PYTHONPATH="")


def test_a_package_named_kernels_is_found_from_the_repository(tmp_path):
    """Without an __init__.py, the repository's directory gives way to any package of that name."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("name = 'from elsewhere'\n")
    code = "import sys; assert sys.path[0] == ''; import kernels; print(kernels.name)"
    assert run_python(code, ROOT, PYTHONPATH=str(tmp_path)) == "from elsewhere"


# -- what imports what ------------------------------------------------------------------------------------------------


def imports(path: Path) -> list[tuple[int, str]]:
    """(dots, name) of all imports of a file, those inside functions included."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_all_imports_are_seen(tmp_path):
    path = tmp_path / "example.py"
    path.write_text("import vllm.config\ndef f():\n    from . import x\n    from .y import z\n    from vllm import a\n")
    assert imports(path) == [(0, "vllm.config"), (1, ""), (1, "y"), (0, "vllm")]


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_imports_neither_vllm_nor_the_package(kernel):
    """Kernels stand alone: their names for each other are relative, and nothing else of ours is known to them."""
    found = imports(ROOT / "kernels" / kernel)
    assert not {name.partition(".")[0] for dots, name in found if dots == 0} & {"vllm", "vllm_s2o", "kernels"}
    assert {dots for dots, _ in found} <= {0, 1}


def test_kernels_load_where_there_is_no_vllm(tmp_path):
    code = f"""
import importlib, sys
sys.modules["vllm"] = None
for name in {[name.removesuffix(".py") for name in KERNELS]}:
    importlib.import_module("vllm_s2o.kernels." + name)
print(sorted(name for name in sys.modules if name.startswith("vllm_s2o.") and "kernels" not in name))
"""
    assert run_python(code, tmp_path) == "['vllm_s2o.version']"


def test_plans_and_parameters_load_where_there_is_no_torch(tmp_path):
    code = """
import sys
sys.modules |= dict.fromkeys(["torch", "vllm", "triton"])
import vllm_s2o.plan, vllm_s2o.params
print(sorted(name for name in sys.modules if name.startswith("vllm_s2o.")))
"""
    assert run_python(code, tmp_path) == "['vllm_s2o.params', 'vllm_s2o.plan', 'vllm_s2o.version']"


@pytest.mark.parametrize("source", SOURCES)
def test_vllm_is_imported_in_one_place(source):
    """All that differs between versions of vLLM is in compat/; the backend asks for the current configuration."""
    used = {name for dots, name in imports(ROOT / source) if dots == 0 and name.partition(".")[0] == "vllm"}
    if source.startswith("vllm_s2o/compat/"):
        assert used
    else:
        assert used <= ({"vllm.config"} if source == "vllm_s2o/backend.py" else set())
