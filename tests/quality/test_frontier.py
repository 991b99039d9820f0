"""The command: its table, its second run, its interruptions, and what it says of bad input."""

import csv
import json
import sys

import causal_lm
import pytest
import torch
from processes import ROOT, run

from vllm_s2o.quality import frontier as module
from vllm_s2o.quality.capture import CaptureError, attention_inputs, open_model
from vllm_s2o.quality.curves import at_density
from vllm_s2o.quality.frontier import COLUMNS, FrontierError, frontier
from vllm_s2o.quality.selection import method
from vllm_s2o.quality.sweep import FIGURES, sweep

TOKENS = 512
METHODS = ("s2o_128", "s2o_128_every1", "pbs", "top_p")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(causal_lm.save(tmp_path_factory.mktemp("llama")))


def table(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open(newline="")))


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.with_name(path.name + ".parts.jsonl").read_text().splitlines()]


@pytest.fixture
def measured(monkeypatch):
    """The layers that are swept, by their first query: of a second run, none."""
    seen = []

    def recorded(query, *args, **kwargs):
        seen.append(query.sum().item())
        return sweep(query, *args, **kwargs)

    monkeypatch.setattr(module, "sweep", recorded)
    return seen


def run_small(checkpoint, out, **changes):
    return frontier(
        checkpoint, out, **{"num_tokens": TOKENS, "layers": [2, 0], "texts": ["code"], "methods": METHODS} | changes
    )


@pytest.fixture(scope="module")
def whole(checkpoint, tmp_path_factory):
    """Two texts, two layers, from scratch."""
    out = tmp_path_factory.mktemp("whole") / "folder" / "frontier.csv"
    return out, run_small(checkpoint, out, texts=["code", "prose"])


def test_the_table_has_each_layer_and_their_mean(checkpoint, whole):
    out, curves = whole
    found = table(out)
    assert list(found[0]) == list(COLUMNS)
    figures = ("density", "masked_density", "mse", "rel_error", "retained_mass")
    assert ("model", "seq_len", "split", "layer", "method", *figures) == COLUMNS
    assert {row["layer"] for row in found} == {"0", "2", "all"} and {row["method"] for row in found} <= set(METHODS)
    assert {(row["seq_len"], row["split"]) for row in found} == {("512", "held-out")}
    made = json.loads(out.with_name("frontier.csv.made.json").read_text())
    assert (made["tokens"], made["texts"], sorted(made["layers"])) == (512, ["code", "prose"], [0, 2])
    assert {"machine", "torch", "commit"} <= set(made["environment"])
    wanted = {0.1, 0.15, 0.2, 0.3}
    for row in found:
        assert float(row["density"]) in wanted or float(row["rel_error"]) in (1e-2, 3e-3)
        assert float(row["masked_density"]) >= float(row["density"])
    for name in METHODS:
        mine = {float(row["density"]): row for row in found if row["method"] == name and row["layer"] == "all"}
        for density in wanted:
            point = at_density(curves[name], density)
            assert (point is None) == (density not in mine)
            if point:
                assert float(mine[density]["mse"]) == pytest.approx(point.mse, rel=1e-4)
    assert any(row["method"] == "pbs" and row["density"] == "0.3" for row in found) or curves["pbs"][0].density > 0.3


def test_the_figures_are_those_of_the_models_attention_on_the_held_out_text(checkpoint, whole):
    out, _ = whole
    source = open_model(checkpoint, TOKENS)
    model = source.load(torch.device("cpu"))
    (layer,) = attention_inputs(model, source.prompt("prose", TOKENS, "held-out"), [2])
    expected = sweep(layer.query, layer.key, layer.value, layer.scale, {name: method(name) for name in METHODS})
    (found,) = [part["methods"] for part in lines(out)[1:] if (part["text"], part["layer"]) == ("prose", 2)]
    for name in METHODS:
        for figure in FIGURES:
            torch.testing.assert_close(
                torch.tensor(found[name][figure]), expected[name][figure].float(), rtol=1e-4, atol=1e-12
            )


def test_a_second_run_measures_nothing_and_writes_the_same(checkpoint, whole, measured, monkeypatch):
    out, curves = whole
    before = out.read_text()
    out.unlink()
    assert run_small(checkpoint, out, texts=["code", "prose"]) == curves
    assert out.read_text() == before and measured == []


def test_a_run_that_was_cut_off_goes_on(checkpoint, whole, tmp_path, measured):
    """Once between two layers, by the user, and once in the middle of a line, by the machine."""
    out = tmp_path / "frontier.csv"
    complete, curves = whole

    class Cut(Exception):
        pass

    real = module.Parts.add

    def add(self, *args):
        real(self, *args)
        if len(self.done) == 2:
            raise Cut

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Cut):
        patch.setattr(module.Parts, "add", add)
        run_small(checkpoint, out, texts=["code", "prose"])
    assert not out.exists() and len(measured) == 2
    parts = out.with_name("frontier.csv.parts.jsonl")
    parts.write_bytes(parts.read_bytes()[:-1000])
    assert run_small(checkpoint, out, texts=["code", "prose"]) == curves
    assert len(measured) == 5, "one was lost with its line"
    assert out.read_text() == complete.read_text()
    assert sorted((part["text"], part["layer"]) for part in lines(out)[1:]) == [
        ("code", 0), ("code", 2), ("prose", 0), ("prose", 2),
    ]  # fmt: skip


def test_more_layers_and_fewer_methods_use_what_is_there(checkpoint, tmp_path, measured):
    out = tmp_path / "frontier.csv"
    run_small(checkpoint, out, layers=[0])
    run_small(checkpoint, out, layers=[0, 1])
    assert len(measured) == 2
    run_small(checkpoint, out, layers=[1], methods=["pbs"])
    assert len(measured) == 2
    assert {(row["layer"], row["method"]) for row in table(out)} <= {("1", "pbs"), ("all", "pbs")}


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"num_tokens": 384}, "tokens"),
        ({"split": "choosing"}, "split"),
        ({"methods": ["block_mean"]}, "methods"),
    ],
)
def test_sweeps_with_other_settings_are_not_mixed(checkpoint, whole, changes, said):
    out, _ = whole
    before = lines(out)
    with pytest.raises(FrontierError, match=rf"^The sweeps in .*jsonl have other {said}: remove it, or name another "):
        run_small(checkpoint, out, **changes)
    assert lines(out) == before


def test_sweeps_of_another_commit_are_not_mixed(checkpoint, whole, monkeypatch):
    monkeypatch.setattr(module, "commit_name", lambda machine: "another")
    with pytest.raises(FrontierError, match=r"^The sweeps in .*jsonl have other commit: remove it, or name another "):
        run_small(checkpoint, whole[0])


def test_single_layers_of_a_sample_have_no_row_with_a_dense_end(checkpoint, tmp_path):
    """Their last tile is in it by chance."""
    for every, expected in ((1, {"0", "2", "all"}), (2, {"all"})):
        out = tmp_path / f"{every}.csv"
        mine = "s2o_128_every1_tail64"
        run_small(checkpoint, out, num_tokens=2048, methods=[mine, "pbs"], every=every)
        layers = {row["layer"] for row in table(out) if row["method"] == mine}
        assert layers <= expected and "all" in layers and (every > 1 or len(layers) > 1)
        assert len({row["layer"] for row in table(out) if row["method"] == "pbs"}) == 3


def test_a_file_that_changed_is_swept_anew(checkpoint, tmp_path, measured):
    text, out = tmp_path / "mine.txt", tmp_path / "frontier.csv"
    for words in ("red", "green", "green"):
        text.write_text(f"The {words} house stands by the road, and nobody lives in it. " * 400)
        run_small(checkpoint, out, layers=[0], texts=[str(text)], methods=["pbs"])
    assert len(measured) == 2


def test_each_of_the_last_tiles_is_looked_at_equally_often():
    """A dense end is one of them, and its share of the pairs is that of all tiles."""
    last = [
        module.looked_at(8192, 8, text, layer, layer + 30 * place)[-1]
        for place, text in enumerate(module.REAL) for layer in range(30)
    ]  # fmt: skip
    assert {tile: last.count(tile) for tile in last} == dict.fromkeys(range(56, 64), 15)
    assert module.looked_at(8192, 1, "code", 0, 0) is None
    assert [module.looked_at(300, 8, "code", 0, turn) for turn in (0, 5)] == [[0, 1, 2]] * 2


def test_the_parts_of_a_text_are_different(checkpoint):
    source = open_model(checkpoint, TOKENS)
    for text in module.REAL:
        chosen, held_out = (source.prompt(text, TOKENS, split) for split in module.SPLITS)
        assert chosen != held_out


@pytest.mark.parametrize(
    "changes, error, said",
    [
        ({"methods": ["dense"]}, FrontierError, "There is no method dense: "),
        ({"methods": []}, FrontierError, "At least one text and one method must be named."),
        ({"texts": []}, FrontierError, "At least one text and one method must be named."),
        ({"texts": ["poetry"]}, CaptureError, "The text poetry cannot be read: "),
        ({"layers": [3]}, CaptureError, "There is no layer 3: "),
        ({"layers": []}, CaptureError, "No layer is named"),
        ({"num_tokens": 0}, CaptureError, "A prompt has at least 1 token"),
    ],
)
def test_bad_input_is_told_in_a_sentence(checkpoint, tmp_path, changes, error, said):
    with pytest.raises(error) as caught:
        run_small(checkpoint, tmp_path / "frontier.csv", **changes)
    assert str(caught.value).startswith(said) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_used_are_told_in_a_sentence(checkpoint, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(FrontierError, match=r"^Cannot (read|write) .*parts\.jsonl: (Not a directory|File exists)\.$"):
        run_small(checkpoint, tmp_path / "file" / "a.csv")
    for text in ("no JSON\n", "[]\n", '{"other": 1}\n'):
        (tmp_path / "a.csv.parts.jsonl").write_text(text)
        with pytest.raises(FrontierError, match=r"parts\.jsonl holds no sweeps: remove it, or name another --out\.$"):
            run_small(checkpoint, tmp_path / "a.csv")
        assert (tmp_path / "a.csv.parts.jsonl").read_text() == text


def test_the_command(checkpoint, tmp_path):
    """In a process of its own, with the picture; the progress goes to stderr."""
    out, plot = tmp_path / "a.csv", tmp_path / "a.png"
    command = [sys.executable, "-P", "-m", "vllm_s2o.quality.frontier", checkpoint, "--tokens", "256", "--out", out]
    arguments = ["--layers", "1", "--texts", "tables", "--methods", "s2o_128", "pbs", "top_p"]
    pytest.importorskip("matplotlib")
    told = run([*command, *arguments, "--plot", plot], ROOT, PYTHONPATH=str(ROOT))
    assert told.startswith("top_p "), "the last line of the summary"
    assert {row["layer"] for row in table(out)} == {"1", "all"}
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--layers", "1", "last"], "--layers takes indices, or all alone, not 1 last"),
        (["--split", "test"], "argument --split: invalid choice: 'test'"),
        (["--methods", "dense"], "frontier: There is no method dense: "),
    ],
)
def test_bad_arguments_are_told_in_a_sentence(checkpoint, monkeypatch, capsys, tmp_path, arguments, said):
    monkeypatch.setattr(sys, "argv", ["frontier", checkpoint, "--out", str(tmp_path / "a.csv"), *arguments])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert said in f"{caught.value.code} {capsys.readouterr().err}"
    assert list(tmp_path.iterdir()) == []


def test_matplotlib_is_asked_for_before_anything_is_measured(checkpoint, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(module.picture.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        sys, "argv", ["frontier", checkpoint, "--out", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png")]
    )
    with pytest.raises(SystemExit):
        module.main()
    assert "--plot needs matplotlib: pip install '.[bench]'" in capsys.readouterr().err
