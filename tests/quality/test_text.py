"""Texts: the same each time, as long as asked for, and one sentence where there is none."""

import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_s2o.quality import text


def letters(given: str, verbose: bool = True) -> SimpleNamespace:
    """A tokenizer with one token for four letters."""
    return SimpleNamespace(input_ids=[given[at : at + 4] for at in range(0, len(given), 4)])


def test_code_is_the_standard_library_in_the_order_of_its_paths():
    names = [name for name, _ in text.library()]
    assert names == sorted(names)
    assert {"argparse.py", "asyncio/events.py", "json/decoder.py"} <= set(names)
    assert not any("site-packages" in name or name.startswith(("test/", "_sysconfigdata")) for name in names)
    source = (Path(sysconfig.get_path("stdlib")) / "argparse.py").read_text()
    assert f"# argparse.py\n{source}" in text.beginning(text.pieces("code"), 2_000_000)


def test_prose_is_what_help_says_and_then_docstrings():
    from pydoc_data.topics import topics

    prose = text.beginning(text.pieces("prose"), 2**30)
    first, last = (topics[name].strip() for name in (min(topics), max(topics)))
    assert prose.startswith(first)
    assert 0 < prose.index(last) < prose.index("Command-line parsing library") < prose.index("JSON (JavaScript Object")
    assert "def parse_args(" not in prose


def test_docstrings_come_in_the_order_of_the_file():
    source = (
        '"""a"""\nclass B:\n    """b"""\n    def c(self):\n        """c"""\nasync def d():\n    """d"""\ndef e(): "e"\n'
    )
    assert list(text.docstrings(source)) == ["a", "b", "c", "d", "e"]
    assert list(text.docstrings("def (")) == []


@pytest.mark.parametrize("source", text.SOURCES)
def test_a_text_has_as_many_tokens_as_asked_for_and_a_longer_one_begins_the_same(source):
    short, long = (text.first_tokens(letters, source, count) for count in (50, 3000))
    assert (len(short), len(long)) == (50, 3000)
    assert long[:50] == short


def test_a_tokenizer_with_long_tokens_gets_more_text():
    def words(given, verbose=True):
        return SimpleNamespace(input_ids=[given[at : at + 100] for at in range(0, len(given), 100)])

    assert len("".join(text.first_tokens(words, "code", 500))) == 50_000


def test_a_text_of_ones_own(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("abcdefgh" * 10, encoding="utf-8")
    assert text.first_tokens(letters, str(path), 3) == ["abcd", "efgh", "abcd"]
    assert len(text.first_tokens(letters, str(path), 20)) == 20, "all of it"
    with pytest.raises(text.TextError, match=r"own\.txt has 20 tokens, fewer than 21: give a longer one\.$"):
        text.first_tokens(letters, str(path), 21)


def test_what_is_no_text_is_told_in_a_sentence(tmp_path):
    with pytest.raises(
        text.TextError, match=r"^The text poetry cannot be read: No such file .*; known are code and pro"
    ):
        text.first_tokens(letters, "poetry", 1)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(text.TextError, match=r"binary is no UTF-8 file\.$"):
        text.first_tokens(letters, str(tmp_path / "binary"), 1)


def test_a_python_without_its_sources_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(text.TextError, match=r"^There are no sources of Python's standard library in "):
        text.first_tokens(letters, "code", 1)
