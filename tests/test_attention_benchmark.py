"""What `benchmarks/attention.py` is made of, as far as a machine without a GPU can run it."""

import csv
import importlib
import sys

import pytest
import torch
from processes import ROOT

from vllm_s2o import S2OParams


@pytest.fixture(scope="module")
def modules():
    """inputs, providers, attention and plot, which import each other and two more by their names."""
    names = ("inputs", "providers", "attention", "plot")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        yield [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
        for name in (*names, "captured", "peers"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def problem(modules):
    inputs = modules[0]
    return inputs.make_problem(inputs.Shape("small", 2, 1, 64), 2048, torch.device("cpu"), dtype=torch.float32)


def test_pages_hold_what_stands_in_order(problem):
    position = torch.arange(problem.num_tokens)
    page = problem.block_table[0, position // 16].long()
    assert torch.equal(problem.key_cache[page, position % 16], problem.key)
    assert torch.equal(problem.value_cache[page, position % 16], problem.value)


def test_inputs_have_sinks_heavy_keys_and_a_band(problem):
    """On average over the last rows: several times what a uniform map would give."""
    n = problem.num_tokens
    logits = problem.query[:, 1] @ problem.key[:, 0].T * problem.scale
    weights = logits[-256:, : n - 256].softmax(1).mean(0)
    assert weights[:4].sum() > 4 * 4 / n
    assert weights.sort(descending=True).values[: n // 10].sum() > 4 * 0.1
    assert logits.diagonal(-4).mean() > logits.diagonal(-100).mean() + 2


def test_exact_rows(modules, problem):
    rows = problem.rows()
    out = modules[0].exact_rows(problem, rows)
    whole = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (problem.query, problem.key, problem.value)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(out, whole[0].transpose(0, 1)[rows], rtol=1e-4, atol=1e-5)


def test_the_stop_rule_lands_on_the_density(modules, problem):
    providers = modules[1]
    params = providers.find_threshold(problem, 0.6, tolerance=0.05)
    assert providers.S2O(problem, params).density() == pytest.approx(0.6, rel=0.05)
    assert params.budget is None
    shared = providers.find_threshold(problem, 0.6, S2OParams(ranking="kv_head"), tolerance=0.05)
    assert shared.ranking == "kv_head"
    assert providers.S2O(problem, shared).density() == pytest.approx(0.6, rel=0.05)
    with pytest.raises(ValueError, match=r"No threshold gives density 0\.01 at 2048 tokens"):
        providers.find_threshold(problem, 0.01)


def test_a_provider_runs_what_a_server_runs(modules, problem):
    mine = modules[1].S2O(problem, S2OParams(dense_tail=0, threshold=0.0))
    assert mine.run().sum() == mine.causal
    rows = problem.rows()
    assert modules[2].relative_error(mine.out, modules[0].exact_rows(problem, rows), rows) < 1e-8


def test_what_is_rounded_to_fp8_stays_near(modules, problem):
    """S2O without a threshold errs as much as rounding does, and is judged by what there was before."""
    rounded = modules[0].in_fp8(problem)
    rows = problem.rows()
    exact = modules[0].exact_rows(rounded, rows)
    assert torch.equal(exact, modules[0].exact_rows(problem, rows))
    mine = modules[1].S2O(rounded, S2OParams(dense_tail=0, threshold=0.0))
    assert mine.run().sum() == mine.causal
    assert mine.out.dtype == problem.value.dtype
    assert 1e-5 < modules[2].relative_error(mine.out, exact, rows) < modules[2].FP8_ERROR
    wide = modules[0].from_fp8(rounded)
    for numbers, scale, stand_for in zip(
        (rounded.query, rounded.key_cache, rounded.value_cache), rounded.scales,
        (wide.query, wide.key_cache, wide.value_cache), strict=True,
    ):  # fmt: skip
        assert torch.equal(numbers.double() * scale, stand_for.double())
    same = modules[1].S2O(wide, S2OParams(dense_tail=0, threshold=0.0))
    same.run()
    torch.testing.assert_close(mine.out, same.out, rtol=1e-4, atol=1e-5)


def test_points_are_parsed(modules):
    parse = modules[2].parse_at
    assert parse(["32768:0.15", "131072:0.1", "131072:0.06"]) == {32768: [0.15], 131072: [0.1, 0.06]}
    for bad in ("32768", "100:0.1", "x:0.1", "32768:0", "32768:2"):
        with pytest.raises(modules[2].argparse.ArgumentTypeError, match=r"is not TOKENS:DENSITY"):
            parse([bad])


def test_rows_are_written_and_drawn(modules, problem, tmp_path):
    _, _, attention, plot = modules
    machine = {"machine": "GPU", "torch": "2", "triton": "3", "date": "2026-01-01"}
    found = [
        dict(provider=name, density=d, threshold="", times=(ms, ms, ms), visited_tflops=1.0, ranking_share=0.0,
             rel_error=1e-3, extra_mib=1.0)
        for name, d, ms in (("s2o", 0.1, 2.0), ("fa3_paged", 1.0, 8.0), ("fa2", 1.0, 16.0))
    ]  # fmt: skip
    medians = {f["provider"]: f["times"][1] for f in found}
    path = tmp_path / "a.csv"
    attention.write([attention.as_row(f, problem, medians, machine) for f in found], path)
    rows = list(csv.DictReader(path.open(newline="")))
    assert (rows[0]["vs_fa3_paged"], rows[0]["vs_fa2"]) == ("4.00", "8.00")
    assert plot.lines(plot.read([path]), "fa2", "ms_p50") == ([2048], [16.0])
    if importlib.util.find_spec("matplotlib"):  # of the extra `bench`
        plot.draw(rows, "s2o", tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_size > 10_000
        assert legends(0) == {"S2O", "FA3, pages", "FA2"} and legends(1) == {"against FA3, pages", "against FA2"}
        plot.draw([row | {"vs_fa2": ""} for row in rows if row["provider"] != "fa2"], "s2o", tmp_path / "b.png")
        assert legends(0) == {"S2O", "FA3, pages"} and legends(1) == {"against FA3, pages"}, "what did not run"


def legends(panel: int) -> set[str]:
    """Of the picture that was drawn last."""
    from matplotlib import pyplot

    return {text.get_text() for text in pyplot.gcf().axes[panel].get_legend().get_texts()}


def test_a_table_is_added_to(modules, tmp_path):
    attention, path = modules[2], tmp_path / "table.csv"
    row = dict.fromkeys(attention.COLUMNS, "") | {"run": "1", "provider": "fa2", "seq_len": "4096"}
    attention.write([row], path)
    assert attention.read(path) == [row]
    assert attention.read(tmp_path / "none.csv") == []
    path.write_text("provider,ms\n")
    with pytest.raises(ValueError, match="no table of this program's"):
        attention.read(path)


def test_a_picture_shows_one_shape(modules, tmp_path, monkeypatch, capsys):
    _, _, attention, plot = modules
    row, drawn = dict.fromkeys(attention.COLUMNS, "1"), []
    rows = [row | {"provider": p, "shape": s} for s in ("made", "layer 1") for p in ("s2o", "fa2")]
    attention.write(rows, tmp_path / "table.csv")
    monkeypatch.setattr(plot, "draw", lambda rows, mine, out: drawn.append((mine, {row["shape"] for row in rows})))
    arguments = ["plot.py", str(tmp_path / "table.csv"), "--out", "unwritten.png"]
    for more in ([], ["--shape", "layer 1"]):
        monkeypatch.setattr(sys, "argv", [*arguments, *more])
        plot.main()
    assert drawn == [("s2o", {"made"}), ("s2o", {"layer 1"})]
    monkeypatch.setattr(sys, "argv", [*arguments, "--shape", "layer 2"])
    with pytest.raises(SystemExit):
        plot.main()
    assert capsys.readouterr().err.endswith("no row of s2o for the shape 'layer 2', only for: made; layer 1\n")


def test_a_picture_of_a_shared_ranking_alone(modules, tmp_path, monkeypatch):
    """A table from before, or of nothing else, is drawn; beside the default it is not."""
    _, _, attention, plot = modules
    row, drawn = dict.fromkeys(attention.COLUMNS, "1") | {"shape": "made"}, []
    monkeypatch.setattr(plot, "draw", lambda rows, mine, out: drawn.append(mine))
    for providers in (("s2o_kv_head", "fa2"), ("s2o_kv_head", "s2o")):
        attention.write([row | {"provider": provider} for provider in providers], tmp_path / "table.csv")
        monkeypatch.setattr(sys, "argv", ["plot.py", str(tmp_path / "table.csv"), "--out", "unwritten.png"])
        plot.main()
    assert drawn == ["s2o_kv_head", "s2o"]
