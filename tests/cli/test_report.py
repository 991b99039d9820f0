"""`vllm-s2o report`: the page that a user gets, what a script gets, and how it ends where it cannot go on."""

import json
import re
import shutil
import struct

import calibration_case
import pytest
from page_parts import elements, named, picture
from processes import ROOT
from report_case import GIVEN, TOKENS

from vllm_s2o.report import capture, plot

NASTY = "<script>alert(1)<\\script>\"&'<b>"
OPTION = ("--additional-config", json.dumps({"s2o": GIVEN}))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return calibration_case.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Results whose words are no words."""
    folder = tmp_path_factory.mktemp("results")
    for name in ("attention.csv", "serving.csv"):
        shutil.copy(ROOT / "benchmarks" / "results" / name, folder)
    rows = (folder / "serving.csv").read_text().replace("bench serve", NASTY.replace('"', '""'))
    (folder / "serving.csv").write_text(re.sub(r"(<script>.*?<b>)", r'"\1"', rows))
    return folder


def self_contained(page: str) -> list:
    """Its elements, none of which runs or fetches anything."""
    found = elements(page)
    assert {element.name for element in found} & {"script", "link", "iframe", "object", "embed", "base", "use"} == set()
    for element in found:
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "srcset", "action", "poster"):
                assert value.startswith("data:image/png;base64,")
    (style,) = named(found, "style")
    assert not re.search(r"@import|url\(", style.words)
    (policy,) = [e for e in named(found, "meta") if e.attributes.get("http-equiv") == "Content-Security-Policy"]
    assert policy.attributes["content"].startswith("default-src 'none'; ")
    return found


def test_a_picture_for_a_text(command, checkpoint, tmp_path):
    pytest.importorskip("matplotlib")
    given = ["report", checkpoint, "--text", "code", "--tokens", str(TOKENS), *OPTION, "--picture", "maps.PNG"]
    ended = command(*given, "--out", "page.html")
    assert ended.status == 0
    assert re.fullmatch(r"Written: maps\.PNG, \d+ KiB\.", ended.out.splitlines()[-1])
    width, height = struct.unpack(">II", (tmp_path / "maps.PNG").read_bytes()[16:24])
    assert width > height > 400
    again = command(*given, "--out", "other.html")
    assert again.status == 2 and "maps.PNG is there already" in again.err


def test_a_prompt_and_results_on_one_page(command, checkpoint, results, tmp_path):
    """A prompt file with a name that is no name, and all that the page says of it."""
    prompt = tmp_path / "a<b>&'.txt"
    prompt.write_text("secret words, and then: " + "".join(f"{n} is {n * n}; " for n in range(90)))
    ended = command(
        "report", checkpoint, "--prompt", str(prompt), "--tokens", str(TOKENS), "--layer", "2", "--head", "3",
        "--results", str(results), "--out", "page.html", *OPTION, "--json",
    )  # fmt: skip
    assert ended.status == 0
    document = ended.document
    page = (tmp_path / "page.html").read_text()
    found = self_contained(page)
    assert len(page) < 3 * 2**20 and "secret" not in page
    assert document["file"] == "page.html"
    assert document["results"]["missing"] == ["frontier.csv", "tasks.csv"]
    assert document["results"]["rows"]["serving.csv"] == len((results / "serving.csv").read_text().splitlines()) - 1

    told = document["prompt"]
    assert (told["model"], told["text"], told["tokens"], told["rope_factor"]) == (checkpoint, str(prompt), TOKENS, 1.0)
    assert [layer["sparse"] for layer in told["layers"]] == [True, False, True]
    assert told["density"] == pytest.approx(sum(layer["density"] for layer in told["layers"]) / 3)
    assert any(f"{TOKENS} tokens of {prompt}" in element.words for element in named(found, "dd"))
    assert NASTY in [cell.words for cell in named(found, "td")]

    # The grid, its table, and the JSON are of one mind.
    cells = named(found, "rect", class_="cell")
    densities = [density for layer in told["layers"] for density in layer["densities"]]
    assert [float(cell.attributes["fill-opacity"]) for cell in cells] == [pytest.approx(d, abs=6e-4) for d in densities]
    (table,) = [t for t in named(found, "table") if "Density by layer and head" in t.words]
    assert all(f"{density:.4f}" in table.words for density in densities)

    # The stop line runs through the visited counts, and these make up the density.
    drawn = told["drawn"]
    visited = [tile["visited"] for tile in drawn["tiles"]]
    rows = [min(32, TOKENS - 32 * number) for number in range(len(visited))]
    inside = [sum(range(32 * n - tile["history"] + 1, 32 * n - tile["history"] + r + 1))
              for n, (tile, r) in enumerate(zip(drawn["tiles"], rows, strict=True))]  # fmt: skip
    pairs = sum(inside) + sum(v * r for v, r in zip(visited, rows, strict=True))
    assert pairs / (TOKENS * (TOKENS + 1) / 2) == pytest.approx(told["layers"][2]["densities"][3])
    (line,) = named(found, "path", class_="stop")
    corners = re.findall(r"[ML]([\d.]+) ([\d.]+)V([\d.]+)", line.attributes["d"])
    extent, left, top, side = 768, 62, 10, 404
    assert [(float(x) - left) / side * extent - 128 for x, _, _ in corners] == [
        pytest.approx(v, abs=0.02) for v in visited
    ]
    ends = [(float(end) - top) / side * TOKENS for _, _, end in corners]
    assert ends == [pytest.approx(sum(rows[: n + 1]), abs=2.1) for n in range(len(rows))]
    (listed,) = [t for t in named(found, "table") if "each tile" in t.words]
    assert all(f"{count:,}" in listed.words for count in visited)

    # Two maps, each in shades for light and for dark.
    images = [picture(image.attributes["href"]) for image in named(found, "image")]
    assert [image.attributes["class"] for image in named(found, "image")] == ["in-light", "in-dark"] * 2
    assert images[0].rows == images[1].rows != images[2].rows == images[3].rows
    assert images[0].palette != images[1].palette
    assert 0.5 < drawn["kept"] <= 1


def test_the_default_layer_and_what_is_printed(command, checkpoint, tmp_path):
    ended = command("report", checkpoint, "--text", "prose", "--tokens", "300", "--out", "page.html", *OPTION)
    assert (ended.status, ended.err) == (0, "")
    assert re.search(
        r"^300 tokens of prose: density 0\.\d{3}, mean over 3 layers; the layer that errs most", ended.out, re.M
    )
    assert re.search(r"^Layer 2, head 0 visits 0\.\d{3}, which holds \d+\.\d\d% of", ended.out, re.M)
    assert re.search(r"^Written: page.html, \d+ KiB\.$", ended.out, re.M)
    self_contained((tmp_path / "page.html").read_text())


def test_results_alone_need_no_model(command, results, tmp_path):
    ended = command("report", "--results", str(results), "--out", "page.html")
    assert ended.status == 0
    assert f"Not in {results}, and so not shown: frontier.csv, tasks.csv." in ended.out.splitlines()
    found = self_contained((tmp_path / "page.html").read_text())
    assert [heading.words for heading in named(found, "h2")] == ["Results"]


def test_folders_that_are_missing_are_made(command, results, tmp_path):
    """As `calibrate` makes them."""
    assert command("report", "--results", str(results), "--out", "a/new/page.html").status == 0
    assert (tmp_path / "a" / "new" / "page.html").exists()


def test_a_picture_that_fails_takes_no_page_with_it(command, checkpoint, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plot, "draw", full)
    given = ("report", checkpoint, "--tokens", "300", *OPTION, "--picture", "maps.png", "--out", "page.html")
    assert command(*given).status == 1
    assert (tmp_path / "page.html").exists()


def test_a_file_that_is_there_is_kept_unless_told(command, results, tmp_path):
    (tmp_path / "page.html").write_text("mine")
    arguments = ("report", "--results", str(results), "--out", "page.html")
    ended = command(*arguments)
    assert ended.status == 2 and "page.html is there already: name another file, or add --force." in ended.sentence
    assert (tmp_path / "page.html").read_text() == "mine"
    assert command(*arguments, "--force").status == 0
    assert (tmp_path / "page.html").read_text() != "mine"


def test_an_interruption_leaves_nothing(command, checkpoint, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(capture, "dense_attention", interrupted)
    ended = command("report", checkpoint, "--tokens", "300", "--out", "page.html", *OPTION)
    assert (ended.status, ended.out) == (130, "")
    assert list(tmp_path.iterdir()) == []


REFUSED = {
    "nothing to do": ((), 2, "Give MODEL, --results DIR, or both."),
    "a layer of nothing": (("--results", ".", "--layer", "1"), 2, "--layer needs MODEL."),
    "a prompt of nothing": (("--results", ".", "--prompt", "x"), 2, "--prompt needs MODEL."),
    "no directory": (("--results", "gone"), 1, "There is no directory gone."),
    "no results": (("--results", "."), 1, ". holds none of attention.csv, frontier.csv, serving.csv, tasks.csv: "),
    "nowhere to write": (("--results", ".", "--out", "empty/page.html"), 2, "/empty is no directory to write into."),
    "a picture in the page's place": (
        ("MODEL", "--out", "a.png", "--picture", "./a.png"), 2, "--out and --picture are both a.png: name two files."
    ),
    "a picture of another kind": (
        ("MODEL", "--picture", "maps.foo"), 2, "--picture writes a PNG: name a file that ends in .png, not maps.foo."
    ),
    "both texts": (("MODEL", "--prompt", "x", "--text", "code"), 2, "--prompt and --text cannot be given together."),
    "both configs": (("MODEL", "--config", "a.yaml", *OPTION), 2, "--config and --additional-config cannot be given"),
    "no prompt": (("MODEL", "--prompt", "gone.txt", *OPTION), 1, "The prompt gone.txt cannot be read: No such file"),
    "no text file": (("MODEL", "--prompt", "binary", *OPTION), 1, "The prompt binary is no UTF-8 file."),
    "an empty prompt": (("MODEL", "--prompt", "empty", *OPTION), 1, "The prompt empty has 0 tokens, fewer than 1."),
    "fewer than asked": (("MODEL", "--prompt", "short", "--tokens", "99", *OPTION), 1, "has 5 tokens, fewer than 99."),
    "too short": (("MODEL", "--prompt", "short", *OPTION), 1, "The prompt has 5 tokens, and default.yaml makes prompts "
                  "sparse from min_seq_len=256 on: give a longer one, or another minimum with --additional-config "
                  "'{\"s2o\": {\"min_seq_len\": N}}'."),
    "no such text": (("MODEL", "--text", "gone.txt", *OPTION), 1, "The text gone.txt cannot be read: "),
    "no such layer": (("MODEL", "--layer", "3", *OPTION), 1, "There is no layer 3: "),
    "no such head": (("MODEL", "--head", "-1", *OPTION), 1, "There is no head -1: "),
    "a dense layer": (("MODEL", "--layer", "1", *OPTION), 1, "default.yaml keeps layer 1 dense: sparse ones are 0,2."),
    "all dense": (
        ("MODEL", "--additional-config", '{"s2o": {"layers": [{"layers": "0-2", "threshold": "dense"}]}}'), 1,
        "makes no layer of",
    ),
    "no config": (("MODEL", "--config", "gone.yaml"), 1, "--config: gone.yaml: there is no such file (looked for "),
    "no model": (("gone", *OPTION), 1, "gone"),
}  # fmt: skip


@pytest.mark.parametrize("arguments, status, said", REFUSED.values(), ids=REFUSED)
def test_nonsense_is_refused_in_a_line(command, checkpoint, tmp_path, arguments, status, said):
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").write_text("")
    (tmp_path / "short").write_text("abcde")
    before = sorted(tmp_path.rglob("*"))
    out = () if "--out" in arguments else ("--out", "page.html")
    ended = command("report", *(checkpoint if word == "MODEL" else word for word in arguments), *out)
    assert ended.status == status and said in ended.sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_a_model_whose_attention_is_another_is_refused(command, tmp_path):
    """Sliding windows: S2O would leave them dense, and the page would be of something else."""
    import causal_lm

    model = causal_lm.save(tmp_path / "windows", "mistral", sliding_window=64)
    ended = command("report", str(model), "--tokens", "300", "--out", "page.html", *OPTION)
    assert ended.status == 1 and "a sliding window of 64 tokens" in ended.sentence
