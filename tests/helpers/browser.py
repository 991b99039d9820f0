"""A headless Chromium, where there is one: what a page looks like, and what it measures."""

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

SCHEMES = {"dark": 0, "light": 1}
"""Chromium's numbers for prefers-color-scheme."""

NARROW = 390
"""Width of a phone."""


def program() -> str:
    """Its path; the test is skipped where none is found."""
    named = os.environ.get("CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH, and CHROMIUM names none")
    return found


def run(work: Path, url: str, *options: str) -> str:
    """Open a page and return what is printed; the profile goes to `work`."""
    command = [
        program(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run",
        "--disable-background-networking", f"--user-data-dir={work / 'profile'}", *options, url,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def screenshot(work: Path, url: str, out: Path, scheme: str, width: int, height: int) -> None:
    options = f"--screenshot={out}", f"--window-size={width},{height}"
    run(work, url, *options, f"--blink-settings=preferredColorScheme={SCHEMES[scheme]}")


def framed(work: Path, page: Path, script: str = "", width: int = NARROW, height: int = 4000) -> str:
    """The URL of a document that shows a page at a width: a headless window is never narrower than 500.

    The page comes as text, so that `script` may look at it: it becomes the body of a function of the page's window,
    and the JSON of what that returns becomes the text of the document's only `pre`.
    """
    shown = html.escape(page.read_text(encoding="utf-8"))
    looks = f"""
        frame.onload = () => {{
            const look = (view) => {{ {script} }};
            document.querySelector("pre").textContent = JSON.stringify(look(frame.contentWindow));
        }};
        frame.srcdoc = document.querySelector("template").content.textContent;"""
    wrapper = work / "framed.html"
    wrapper.write_text(
        f"<!doctype html><body style='margin:0'><template>{shown}</template><pre hidden></pre>"
        f"<iframe style='border:0;width:{width}px;height:{height}px'></iframe>"
        f"<script>const frame = document.querySelector('iframe');{looks}</script>",
        encoding="utf-8",
    )
    return wrapper.as_uri()


def look(work: Path, page: Path, script: str, width: int = NARROW) -> object:
    """What a script finds in the page at a width."""
    printed = run(work, framed(work, page, script, width), "--dump-dom", "--virtual-time-budget=5000")
    (found,) = re.findall(r'<pre hidden="">(.*?)</pre>', printed, re.DOTALL)
    return json.loads(html.unescape(found))
