"""Elements, pictures, axes and charts."""

import math
import re

import pytest
from page_parts import elements, named, picture

from vllm_s2o.report import axes, page, png
from vllm_s2o.report.chart import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Point, Series, chart
from vllm_s2o.report.markup import el, table
from vllm_s2o.report.style import _DARK, _LIGHT, DARK, LIGHT, LOOKS

NASTY = "</style><script>alert('1')</script>\"&'"


def test_text_and_attributes_are_escaped():
    made = el("p", NASTY, el("b", "x", title=NASTY, data_name=NASTY, class_="y"), None, 0)
    paragraph, bold = elements(made)
    assert paragraph.words == NASTY + "x0"
    assert bold.attributes == {"title": NASTY, "data-name": NASTY, "class": "y"}


def test_tables():
    found = elements(table("of all", ("name", "number"), [(NASTY, "1.5"), ("b", "-2"), ("c", "none"), ("d", "")]))
    assert [cell.words for cell in named(found, "th", scope="row")] == [NASTY, "b", "c", "d"]
    assert [cell.words for cell in named(found, "td", class_="words")] == ["none"]
    (scrolls,) = named(found, "div")
    assert (scrolls.attributes["tabindex"], scrolls.attributes["aria-label"]) == ("0", "of all")


def test_pictures():
    rows = [bytes([0, 1, 2]), bytes([64, 0, 7])]
    colours = png.ramp(["#000000", "#ffffff"])
    found = picture(png.uri(png.png(rows, colours)))
    assert (found.rows, found.transparency) == (rows, b"\0")
    assert found.palette[3:6] == b"\0\0\0" and found.palette[-3:] == b"\xff\xff\xff" and len(found.palette) == 3 * 65
    assert [png.ramp(["#000000", "#0a0000", "#0a0a00"], 5)[index] for index in (0, 2, 4)] == [
        (0, 0, 0), (10, 0, 0), (10, 10, 0),
    ]  # fmt: skip


# -- axes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, low, high, names",
    [
        ([0.25, 1800], 0.2, 2000, ["1 ms", "10 ms", "100 ms", "1 s"]),
        ([60.3, 931], 50, 1000, ["50 ms", "100 ms", "200 ms", "500 ms", "1 s"]),
        ([100], 100, 1000, ["100 ms", "200 ms", "500 ms", "1 s"]),
    ],
)
def test_axes_of_time(values, low, high, names):
    axis = axes.decades("time", values, "ms")
    assert (axis.low, axis.high) == (pytest.approx(low), pytest.approx(high))
    assert [name for _, name in axis.ticks] == names


@pytest.mark.parametrize("values", [[1e-30, 1.0], [3e-6, 0.4], [2.0], [7e5, 2e7]])
def test_axes_hold_what_they_are_made_for(values):
    axis = axes.decades("error", values)
    assert all(axis.low * 0.99 <= max(value, axes.LEAST) <= axis.high * 1.01 for value in values)
    assert 2 <= len(axis.ticks) <= 8 and len({name for _, name in axis.ticks}) == len(axis.ticks)
    assert all(0 <= axis.share(value) <= 1 for value, _ in axis.ticks)


def test_places_on_axes():
    assert axes.decades("", [1, 100]).share(10) == pytest.approx(0.5)
    shares = axes.shares("", [0.07, 0.41])
    assert (shares.high, shares.share(0.25)) == (0.5, pytest.approx(0.5))
    assert [name for _, name in axes.shares("", [0.95]).ticks] == ["0%", "20%", "40%", "60%", "80%", "100%"]
    lengths = axes.lengths("", [2000, 131071])
    assert [name for _, name in lengths.ticks] == ["2K", "4K", "8K", "16K", "32K", "64K", "128K"]
    middle = math.sqrt(lengths.low * lengths.high)
    assert lengths.share(middle) == pytest.approx(0.5)
    assert len(axes.lengths("", [1, 2**30]).ticks) <= 9


# -- charts -----------------------------------------------------------------------------------------------------------


def places(found) -> list[tuple[float, float]]:
    return [(float(mark.attributes["cx"]), float(mark.attributes["cy"])) for mark in named(found, "circle", class_="m")]


def test_marks_and_lines_lie_where_the_values_are():
    x, y = axes.decades("x", [1, 100]), axes.points("y")
    series = Series(NASTY, [Point(1, 0, "low"), Point(10, 50, "mid"), Point(100, 100, says=NASTY)])
    found = elements(chart("Title", "Says.", x, y, [series]))
    marks = places(found)[:3]  # the last one is the legend's
    assert marks == [
        (LEFT, HEIGHT - BOTTOM),
        (pytest.approx((LEFT + WIDTH - RIGHT) / 2, abs=0.01), pytest.approx((TOP + HEIGHT - BOTTOM) / 2, abs=0.01)),
        (WIDTH - RIGHT, TOP),
    ]
    (line, _) = named(found, "path", class_="l")
    corners = [tuple(map(float, pair)) for pair in re.findall(r"[ML]([\d.]+) ([\d.]+)", line.attributes["d"])]
    assert corners == [(pytest.approx(a, abs=0.1), pytest.approx(b, abs=0.1)) for a, b in marks]
    (drawing,) = named(found, "svg", role="img")
    assert drawing.attributes["aria-label"] == "Title. Says."
    assert [text.words for text in named(found, "text", class_="label")] == ["mid"], "no room in the corner"
    assert named(found, "li")[0].words.strip() == NASTY
    assert NASTY in [title.words for title in named(found, "title")]


def test_labels_cover_neither_marks_nor_each_other():
    """Where there is no room, there is no label."""
    crowd = Series("crowd", [Point(50 + index % 5, 50 + index // 5, f"label {index}") for index in range(25)])
    found = elements(chart("", "", axes.points(""), axes.points(""), [crowd]))
    boxes = []
    for text in named(found, "text", class_="label"):
        x, y, width = float(text.attributes["x"]), float(text.attributes["y"]), 7.8 * len(text.words)
        x -= {"start": 0, "middle": width / 2, "end": width}[text.attributes["text-anchor"]]
        boxes.append((x, y - 12, x + width, y))
    marks = [(x - 4, y - 4, x + 4, y + 4) for x, y in places(found)[:25]]
    assert 1 <= len(boxes) < 25
    for index, a in enumerate(boxes):
        assert a[0] > 0 and a[2] < WIDTH
        for b in boxes[:index] + marks:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


# -- colours ----------------------------------------------------------------------------------------------------------


def contrast(a: str | tuple, b: str | tuple) -> float:
    """As WCAG defines it."""

    def luminance(colour) -> float:
        values = [int(colour[at : at + 2], 16) for at in (1, 3, 5)] if isinstance(colour, str) else colour
        linear = [v / 255 / 12.92 if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in values]
        return sum(share * value for share, value in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    bright, dim = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("colours, paper", [(_LIGHT, "#ffffff"), (_DARK, "#14171b")], ids=["light", "dark"])
def test_labels_can_be_read(colours, paper):
    """Marks and their labels have one colour: 4.5 is what text needs."""
    assert len(colours) == LOOKS == len(set(colours))
    assert min(contrast(colour, paper) for colour in colours) >= 4.5


@pytest.mark.parametrize("shades, paper", [(LIGHT, "#ffffff"), (DARK, "#14171b")], ids=["light", "dark"])
def test_shades_leave_the_page_step_by_step(shades, paper):
    steps = [contrast(shade, paper) for shade in shades]
    assert steps == sorted(steps)
    assert steps[-1] > 12


# -- the file ---------------------------------------------------------------------------------------------------------


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    page.write(out, "first")
    (tmp_path / "plain").write_text("")
    assert out.read_text() == "first" and out.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(page.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        page.write(out, "second")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert out.read_text() == "first"
