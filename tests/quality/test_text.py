"""Texts: the same each time, as long as asked for, and one sentence where there is none."""

import itertools
import re
import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest

from vllm_s2o.quality import text
from vllm_s2o.quality.tasks import haystack


def letters(given: str, verbose: bool = True) -> SimpleNamespace:
    """A tokenizer with one token for four letters."""
    return SimpleNamespace(input_ids=[given[at : at + 4] for at in range(0, len(given), 4)])


# Each is made of the whole standard library, which takes seconds.
SOURCES = [pytest.param(name, marks=[pytest.mark.long] * (name in ("dialogue", "tables"))) for name in text.SOURCES]


def test_code_is_the_standard_library_in_the_order_of_its_paths():
    names = [name for name, _ in text.standard_library()]
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


def test_dialogue_asks_for_functions_and_answers_with_their_docstrings():
    source = (
        'class A:\n    def b(self, *, c=1):\n        """What b does."""\n    d = 1\n'
        'async def e(f: int):\n    def inner(): "i"\n    return f\n'
    )
    assert list(text.functions(source)) == [
        text.Function("A.b", 2, "b(self, *, c=1)", "What b does."),
        text.Function("e", 5, "e(f: int)", ""),
    ]
    assert list(text.functions("def (")) == []
    spoken = next(
        piece for piece in text.pieces("dialogue") if piece.startswith("User: I have a question about bisect")
    )
    assert "Assistant: Go ahead.\n\nUser: What does insort_right do?\n\nAssistant: Insert item x in list a" in spoken
    assert "As insort_right(a, x, lo=0, hi=None, *, key=None), in line " in spoken
    assert spoken.count("User: ") == spoken.count("Assistant: ")


def test_tables_have_whole_rows_and_go_on_in_unicode():
    tabular = list(itertools.islice(text.pieces("tables"), 40))
    rows = [line for piece in tabular for line in piece.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") and line.count("|") >= 5 for line in rows)
    points = [line for piece in tabular for line in piece.splitlines() if line.startswith("U+")]
    assert points[0] == "U+0020,SPACE,Zs,WS," and len(points) == len(set(points)) == 40 * text.UNICODE_ROWS
    assert "U+00BD,VULGAR FRACTION ONE HALF,No,ON,0.5" in points


@pytest.mark.parametrize("split", text.SPLITS)
def test_needles_are_asked_for_after_they_were_hidden_in_the_same_part(split):
    said = "".join(itertools.islice(text.pieces("needles", split), 200))
    hidden = {found[1]: found for found in re.finditer(r"The number of (\w+) is (\d{7})\.", said)}
    asked = list(re.finditer(r"What is the number of (\w+)\? It is (\d{7})\.", said))
    assert len(hidden) == len(asked) == 200
    assert all(hidden[found[1]][2] == found[2] and hidden[found[1]].start() < found.start() for found in asked)
    far = [found.start() - hidden[found[1]].start() for found in asked]
    assert min(far) < 500 and max(far) > len(said) / 2
    assert text.HAY != haystack.NOISE and said.count(text.HAY) > 400


@pytest.mark.parametrize("source", SOURCES)
def test_the_parts_of_a_text_have_every_other_piece(source):
    whole, chosen, held_out = (
        list(itertools.islice(text.pieces(source, split), 20)) for split in (None, "choosing", "held-out")
    )
    assert chosen[:10] == whole[::2] and held_out[:10] == whole[1::2]


def test_the_parts_of_ones_own_text_are_its_halves(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("one\ntwo\nthree\nfour\n")
    parts = ["".join(text.pieces(str(path), split)) for split in ("choosing", "held-out", None)]
    assert parts == ["one\ntwo\nthree\n", "four\n", "one\ntwo\nthree\nfour\n"]
    path.write_text("a line without an end")
    assert "".join(text.pieces(str(path))) == "a line without an end"
    with pytest.raises(text.TextError, match=r"own\.txt \(held-out\) has 3 tokens, fewer than 4: give a longer one\.$"):
        text.first_tokens(letters, str(path), 4, "held-out")
    with pytest.raises(text.TextError, match=r"^A text has no part test: known are choosing and held-out\.$"):
        text.first_tokens(letters, "code", 1, "test")


@pytest.mark.parametrize("source", SOURCES)
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
        text.TextError, match=r"^The text poetry cannot be read: No such file .*; known are code, prose, "
    ):
        text.first_tokens(letters, "poetry", 1)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(text.TextError, match=r"binary is no UTF-8 file\.$"):
        text.first_tokens(letters, str(tmp_path / "binary"), 1)


def test_a_python_without_its_sources_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(text.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(text.TextError, match=r"^There are no sources of Python's standard library in "):
        text.first_tokens(letters, "code", 1)
