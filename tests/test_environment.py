"""What a results file says of the code that ran."""

import shutil
import subprocess

import pytest

from vllm_s2o.cli import environment
from vllm_s2o.cli.environment import describe, revision

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="makes a repository")
UNKNOWN = {"commit": None, "changed": None}


@pytest.fixture(autouse=True)
def no_commit_from_outside(monkeypatch):
    monkeypatch.delenv("S2O_COMMIT", raising=False)


@pytest.fixture
def checkout(tmp_path):
    """A repository with one commit."""

    def git(*arguments):
        who = ("-c", "user.name=me", "-c", "user.email=me@here")
        done = subprocess.run(["git", "-C", tmp_path, *who, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    for name in ("vllm_s2o", "kernels", "configs", "benchmarks/results"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a").touch()
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    return tmp_path, git("rev-parse", "HEAD")


@needs_git
def test_a_checkout_names_its_commit(checkout, monkeypatch):
    root, head = checkout
    assert len(head) == 40
    monkeypatch.setenv("S2O_COMMIT", "another")
    assert revision(root) == {"commit": head, "changed": False}


@needs_git
@pytest.mark.parametrize("path", ["kernels/a", "configs/new.yaml", "benchmarks/new.py"])
def test_changed_code_is_told(checkout, path):
    root, head = checkout
    (root / path).write_text("changed")
    assert revision(root) == {"commit": head, "changed": True}


@needs_git
@pytest.mark.parametrize("path", ["benchmarks/results/new.json", "notes.txt"])
def test_what_does_not_run_is_no_change(checkout, path):
    """Of two benchmarks in a row, the second would find the first one's results."""
    root, head = checkout
    (root / path).write_text("new")
    assert revision(root) == {"commit": head, "changed": False}


@needs_git
def test_an_installed_package_is_not_the_repository_that_it_lies_in(checkout):
    root, _ = checkout
    assert revision(root / "vllm_s2o") == UNKNOWN


def test_a_copy_without_its_repository_is_told_its_commit(tmp_path, monkeypatch):
    assert revision(tmp_path) == UNKNOWN
    monkeypatch.setenv("S2O_COMMIT", "0123abc")
    assert revision(tmp_path) == {"commit": "0123abc", "changed": None}


def test_a_machine_without_git_knows_nothing(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    assert revision(tmp_path) == UNKNOWN, "git refuses an empty repository"
    monkeypatch.setenv("PATH", "")
    assert revision(tmp_path) == UNKNOWN


def test_it_is_part_of_what_is_described(monkeypatch):
    monkeypatch.setattr(environment, "revision", lambda root: {"commit": str(root), "changed": True})
    described = describe()
    assert (described["commit"], described["changed"]) == (environment.__file__.rpartition("/vllm_s2o/")[0], True)
