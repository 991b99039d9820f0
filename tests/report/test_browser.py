"""The page in a real browser, in light and in dark. Screenshots stay in build/report/, to be looked at."""

from pathlib import Path

import browser
import pytest
from processes import ROOT

from vllm_s2o.report import bench, capture, maps, page, prompt, results

PAPER = {"light": (255, 255, 255), "dark": (20, 23, 27)}

OVERLAPS = """
    const found = [];
    for (const drawing of view.document.querySelectorAll("figure > svg")) {
        const boxed = (text) => [text.textContent, text.getBoundingClientRect()];
        const texts = [...drawing.querySelectorAll("text")].map(boxed);
        texts.forEach(([a, p], index) => texts.slice(0, index).forEach(([b, q]) => {
            const wide = Math.min(p.right, q.right) - Math.max(p.left, q.left);
            const high = Math.min(p.bottom, q.bottom) - Math.max(p.top, q.top);
            // Boxes hold what letters never fill: a little of both may be shared.
            if (wide > 2 && high > 0.35 * Math.min(p.height, q.height)) found.push([a, b]);
        }));
    }
    return found;"""

WIDE = "return [view.document.documentElement.scrollWidth, view.innerWidth];"

OUTSIDE = """
    const boxed = (text) => [text.textContent, text.getBoundingClientRect()];
    return [...view.document.querySelectorAll("svg text")].map(boxed)
        .filter(([, box]) => box.left < 0 || box.right > view.innerWidth).map(([words]) => words);"""

ALL = "return [" + ", ".join(f"(() => {{ {script} }})()" for script in (OVERLAPS, OUTSIDE, WIDE)) + "];"


@pytest.fixture(scope="module")
def shown(case, tmp_path_factory) -> Path:
    """Both parts on one page."""
    browser.program()
    figures, visits = capture.measure(case.model, case.ids, case.config, 2, 3)
    drawn = prompt.Prompt("tiny", "code", len(case.ids), 1.0, case.config, figures, 2, 3, maps.draw(visits))
    found = results.read(ROOT / "benchmarks" / "results")
    out = tmp_path_factory.mktemp("page") / "report.html"
    page.write(out, page.page("S2O: a test's page", [prompt.section(drawn), bench.section(found)], "made by a test."))
    return out


@pytest.mark.parametrize("scheme", PAPER)
@pytest.mark.parametrize("width", [1200, browser.NARROW])
def test_screenshots(shown, tmp_path, scheme, width):
    from PIL import Image  # comes with every vLLM

    folder = ROOT / "build" / "report"
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"{scheme}-{width}.png"
    url = shown.as_uri() if width > 500 else browser.framed(tmp_path, shown)
    browser.screenshot(tmp_path, url, out, scheme, max(width, 500), 4000)
    picture = Image.open(out).convert("RGB").crop((0, 0, width, 4000))
    assert picture.getpixel((1, 1)) == PAPER[scheme] == picture.getpixel((width - 2, 3000))
    # The maps' shades are there, those of this scheme and not those of the other one.
    known = {tuple(shade): "light" for shade in prompt_shades("light")} | {
        tuple(shade): "dark" for shade in prompt_shades("dark")
    }
    counts = {"light": 0, "dark": 0}
    for count, colour in picture.getcolors(maxcolors=2**24):
        if colour in known:
            counts[known[colour]] += count
    (other,) = set(PAPER) - {scheme}
    assert counts[scheme] > 5000 > 100 * counts[other]


def prompt_shades(scheme: str):
    from vllm_s2o.report.style import DARK, LIGHT

    shades = {"light": LIGHT, "dark": DARK}
    (other,) = set(shades) - {scheme}
    return [shade for shade in shades[scheme][:20] if shade not in shades[other]]


@pytest.mark.parametrize("width", [1200, browser.NARROW])
def test_nothing_covers_or_leaves_the_page(shown, tmp_path, width):
    overlaps, outside, (whole, inner) = browser.look(tmp_path, shown, ALL, width)
    assert (overlaps, outside) == ([], [])
    assert whole <= inner == width


def test_the_browser_runs_and_fetches_nothing(shown, tmp_path):
    """The policy of the page holds even for what somebody would write into it."""
    spoilt = tmp_path / "spoilt.html"
    spoilt.write_text(shown.read_text().replace("</main>", "<script>document.title = 'ran'</script></main>"))
    assert "<title>S2O: a test's page</title>" in browser.run(tmp_path, spoilt.as_uri(), "--dump-dom")


def test_the_browser_finds_overlaps(tmp_path):
    """What the tests above look for is found where it is."""
    bad = tmp_path / "bad.html"
    bad.write_text(
        "<!doctype html><body style='margin:0'><figure style='margin:0'><svg viewBox='0 0 390 100' width='900'>"
        "<text x='10' y='20'>one</text><text x='12' y='21'>two</text><text x='380' y='60'>outside</text></svg></figure>"
    )
    overlaps, outside, (whole, inner) = browser.look(tmp_path, bad, ALL)
    assert (overlaps, outside) == ([["two", "one"]], ["outside"])
    assert whole > inner == browser.NARROW
