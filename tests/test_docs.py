"""The pages of docs/: what they link and name is there. Their `vllm-s2o` commands run in tests/cli/test_command.py."""

import re
import shlex
import subprocess
import sys

import pytest
from processes import ROOT

from vllm_s2o import config_reference
from vllm_s2o.quality import tasks
from vllm_s2o.quality.tasks import command, infinitebench

PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {page.name: page.read_text() for page in PAGES}
NAMES = {page: set(re.findall(r"`([^`\n]+)`", text)) for page, text in TEXTS.items()}


STEPS = ("calibrate", "evaluate", "report")


def test_the_reference_is_what_make_docs_writes():
    assert TEXTS["config.md"] == config_reference.markdown()
    assert TEXTS["config.md"].count("\n| `") == len(config_reference.fields())


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", TEXTS[page]):
        if not target.startswith("https://"):
            assert (ROOT / "docs" / target).exists(), target


def test_the_contents_of_readme_lead_to_its_headings():
    text = (ROOT / "README.md").read_text()
    headings = {h.lower().replace(",", "").replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}
    linked = set(re.findall(r"\(#([^)]+)\)", text))
    assert linked and linked <= headings


def test_readme_begins_with_a_server_its_proof_a_config_and_a_page():
    """In this order, before any table, and as a checkout has them: the command is on no path there."""
    first = (ROOT / "README.md").read_text().partition("\n## First steps\n")[2].partition("\n## ")[0]
    wanted = ["make serve ", ".venv/bin/python ", "curl ", *(f".venv/bin/vllm-s2o {name} " for name in STEPS)]
    places = [first.find(f"\n    {start}") for start in [*wanted, "make serve ARGS="]]
    assert -1 not in places and places == sorted(places)


def test_every_page_is_listed():
    assert {f"({page})" for page in TEXTS} - {"(README.md)"} <= set(re.findall(r"\([\w.-]+\)", TEXTS["README.md"]))


@pytest.mark.parametrize("page", TEXTS)
def test_targets_and_files_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for name in NAMES[page]:
        if name.startswith("make "):
            assert name.split()[1] in targets, name
        elif re.fullmatch(r"(vllm_s2o|kernels|configs|examples|benchmarks|tests)/[\w./-]*", name):
            assert (ROOT / name).exists(), name


def test_the_command_for_tasks_has_help():
    assert any("python -P -m vllm_s2o.quality.tasks --help" in text for text in TEXTS.values())
    told = subprocess.run([sys.executable, "-P", "-m", tasks.__name__, "--help"], capture_output=True, text=True)
    assert told.stdout.startswith("usage:"), told.stderr


def test_the_command_for_downloaded_samples_is_understood():
    """How it is asked is in tests/quality/tasks, on two samples of each format."""
    (line,) = re.findall(rf"-m {tasks.__name__} (.+--infinitebench.+)", (ROOT / "README.md").read_text())
    args = command.parser().parse_args(shlex.split(line))
    assert args.longbench_v2 and {path.stem for path in args.infinitebench} <= infinitebench.RULES.keys()
