"""What is wrong with the file of a picture."""

import pytest

from vllm_s2o.quality import picture


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setattr(picture.importlib.util, "find_spec", lambda name: None)
    assert picture.problem(tmp_path / "a.png") == "--plot needs matplotlib: pip install '.[bench]'"


@pytest.mark.parametrize("name", ["a.png", "new/folder/a.pdf", "A.SVG"])
def test_what_can_be_written(tmp_path, name):
    pytest.importorskip("matplotlib")
    assert picture.problem(tmp_path / name) is None
    assert (tmp_path / name).parent.is_dir()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.xyz", "pictures are files that end in "),
        ("a", "pictures are files that end in "),
        ("folder.png", "is a folder, not a file"),
        ("file/a.png", "its folder cannot be made, "),
    ],
)
def test_what_cannot(tmp_path, name, said):
    pytest.importorskip("matplotlib")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    assert said in picture.problem(tmp_path / name)
