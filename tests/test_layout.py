"""CONTRIBUTING says who may import whom, and the sources keep to it."""

import ast
import re

import pytest
from import_graph import circle, graph, imported
from processes import ROOT, run_python

import vllm_s2o

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
GRAPH = graph(ROOT)


def table() -> dict[str, tuple[set[str], set[str]]]:
    """Rows of the table by the names in their first column."""
    section = TEXT.partition("## Who may import whom")[2].partition("\n## ")[0]
    cells = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| `")]
    return {" ".join(sorted(names(room))): (names(ours), names(others)) for room, ours, others in cells}


def names(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


TABLE = table()


def room_of(module: str) -> str:
    """The name by which CONTRIBUTING calls a module: its own, or that of its folder."""
    if module in ("vllm_s2o", "benchmarks"):
        return "__init__"
    package, _, rest = module.removeprefix("vllm_s2o.").partition(".")
    return f"{package}/" if rest or f"vllm_s2o.{package}" in PACKAGES else package


PACKAGES = {name.rpartition(".")[0] for name in GRAPH} - {"vllm_s2o", "benchmarks"}
ROW_OF = {room: row for row in TABLE for room in row.split()}


def imports_of_rows() -> dict[str, tuple[set[str], set[str]]]:
    found: dict[str, tuple[set[str], set[str]]] = {row: (set(), set()) for row in TABLE}
    for module, wanted in GRAPH.items():
        row = ROW_OF[room_of(module)]
        for other in wanted:
            if other not in GRAPH:
                found[row][1].add(other)
            elif ROW_OF[room_of(other)] != row:
                found[row][0].add(room_of(other))
    return found


def test_every_module_has_a_room_and_every_room_a_module():
    assert {room_of(module) for module in GRAPH} == set(ROW_OF)


@pytest.mark.parametrize("row", TABLE)
def test_a_room_imports_what_the_table_says(row):
    """No more, so that rooms stay apart, and no less, so that the table stays true."""
    assert imports_of_rows()[row] == TABLE[row]


def test_no_modules_import_each_other_in_a_circle():
    assert circle(GRAPH) is None


def test_only_the_command_and_the_benchmarks_stand_above_the_backend():
    """What a server runs knows nothing of what measures it."""
    serving = {"vllm_s2o", *(f"vllm_s2o.{name}" for name in ("plugin", "backend", "attention", "settings", "config"))}
    reached, left = set(), [*serving]
    while left:
        module = left.pop()
        reached.add(module)
        left += [other for other in GRAPH[module] if other in GRAPH and other not in reached]
    assert "vllm_s2o.kernels.tables" in reached
    assert {room_of(module) for module in reached} & {"cli/", "quality/", "report/", "benchmarks/"} == set()


def test_the_plugin_is_light(tmp_path):
    """Each of vLLM's processes loads it, with the flag or without."""
    code = """
import sys
import vllm_s2o.plugin
print(sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "triton", "vllm", "pydantic", "yaml"}))
"""
    assert run_python(code, tmp_path, PYTHONPATH=str(ROOT)) == "[]"


def test_the_command_line_answers_soon(tmp_path):
    """PyTorch alone takes two seconds to import: commands that need it do so when they run."""
    code = """
import sys
import vllm_s2o.cli.main
heavy = {"torch", "triton", "vllm", "transformers", "matplotlib", "openai"}
print(sorted({name.partition(".")[0] for name in sys.modules} & heavy))
"""
    assert run_python(code, tmp_path, PYTHONPATH=str(ROOT)) == "[]"


# -- the helper finds what is wrong -----------------------------------------------------------------------------------

KNOWN = ["vllm_s2o", "vllm_s2o.a", "vllm_s2o.b", "vllm_s2o.in.c", "vllm_s2o.in.d", "benchmarks.e", "benchmarks.f"]


def imports_in(tmp_path, name: str, source: str, file: str = "module.py") -> set[str]:
    path = tmp_path / file
    path.write_text(source)
    return imported(name, path, KNOWN)


@pytest.mark.parametrize(
    "name, source, found",
    [
        ("vllm_s2o.a", "import os, torch.nn\nimport vllm_s2o.b", {"torch", "vllm_s2o.b"}),
        ("vllm_s2o.a", "from vllm_s2o import b, S2OParams", {"vllm_s2o.b", "vllm_s2o"}),
        ("vllm_s2o.a", "def f():\n    from vllm_s2o.b import x", {"vllm_s2o.b"}),
        ("vllm_s2o.a", "if TYPE_CHECKING:\n    from vllm.config import x", {"vllm"}),
        ("vllm_s2o.in.c", "from . import d\nfrom ..a import x\nfrom .d import y", {"vllm_s2o.in.d", "vllm_s2o.a"}),
        ("benchmarks.e", "from f import x\nimport json", {"benchmarks.f"}),
        ("vllm_s2o.a", "from f import x", {"f"}),
    ],
)
def test_imports_are_found(tmp_path, name, source, found):
    assert imports_in(tmp_path, name, source) == found


def test_an_import_of_what_is_not_there_is_no_import_of_another_project(tmp_path):
    with pytest.raises(LookupError, match=r"vllm_s2o\.a imports x from vllm_s2o\.gone"):
        imports_in(tmp_path, "vllm_s2o.a", "from vllm_s2o.gone import x")


def test_circles_are_found():
    assert circle({"a": ["b"], "b": ["c", "d"], "c": [], "d": ["a"]}) == ["a", "b", "d", "a"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": ["torch"]}) is None


# -- the rest of CONTRIBUTING -----------------------------------------------------------------------------------------


TOKENS = sorted(set(re.findall(r"`([^`\n]+)`", TEXT)))
FILES = [token for token in TOKENS if re.fullmatch(r"[\w./-]+", token) and "/" in token and "MODEL" not in token]
DOTTED = [token for token in TOKENS if re.fullmatch(r"[a-zA-Z_0-9]+\.[a-z_]+", token) and not (ROOT / token).exists()]


def test_contributing_names_files_and_more():
    assert {"kernels/naive.py", "benchmarks/lab.md", "examples/"} <= set(FILES)
    assert {"compat.layer_problem", "S2OImpl.forward"} <= set(DOTTED)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_contributing_names_is_there(file):
    assert (ROOT / file).exists() or (ROOT / "vllm_s2o" / file).exists()


def defined() -> set[str]:
    """Names as CONTRIBUTING writes them: of a module's functions and classes, and of a class's methods."""
    found = set()
    for path in (*(ROOT / "vllm_s2o").glob("*.py"), *(ROOT / "vllm_s2o" / "compat").glob("*.py")):
        module = path.parent.name if path.name == "__init__.py" else path.stem
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(f"{module}.{node.name}")
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{inner.name}" for inner in node.body if isinstance(inner, ast.FunctionDef)}
    return found


def test_names_in_contributing_are_defined():
    """But for those of vLLM, and results."""
    results = (".csv", ".png", ".json", ".txt", ".py")
    ours = [name for name in DOTTED if not name.endswith(results) and name != "vllm.config"]
    assert sorted(set(ours) - defined()) == []


def test_the_changelog_is_of_this_version():
    """The newest section is what becomes this version, or is it."""
    changelog = (ROOT / "CHANGELOG.md").read_text()
    first = re.search(r"^## \[(.+?)\](.*?)(?=^## |\Z)", changelog, re.MULTILINE | re.DOTALL)
    assert first[1] == vllm_s2o.__version__ or (first[1] == "Unreleased" and vllm_s2o.__version__ in first[2])
    kinds = re.findall(r"^### (.+)$", changelog, re.MULTILINE)
    assert kinds
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_contributing_names_targets_that_are_there():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"make ([a-z-]+)", TEXT))
    assert {"install", "check", "test", "test-fast"} <= targets
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
