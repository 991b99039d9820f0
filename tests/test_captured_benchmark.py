"""Rows of `benchmarks/attention.py` for attention that was captured from a model, as far as a CPU can make them."""

import csv
import functools
import importlib
import importlib.util
import sys

import causal_lm
import pytest
import torch
from processes import ROOT

from vllm_s2o.config import ModelTraits, load_config
from vllm_s2o.quality.capture import Capture, CaptureError, attention_inputs

CPU = torch.device("cpu")
TOKENS = 1031  # seven more than whole pages hold
NAMES = ("attention", "captured", "inputs", "peers", "providers")
OWN = ModelTraits("models/tiny", "LlamaForCausalLM", causal_lm.NUM_LAYERS, 4, 2, 64)


@pytest.fixture
def modules(monkeypatch):
    """The modules of benchmarks/ by their names; as when one is run, they find each other by the folder."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in NAMES}
    for name in NAMES:
        sys.modules.pop(name, None)


def captured(kind="llama", traits=OWN, tokens=TOKENS, **fields) -> Capture:
    """Layers 0 and 2 of a random model; its context is never passed, for nothing here checks it."""
    ids = torch.randint(256, (tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    layers = attention_inputs(causal_lm.make(kind, **fields), ids, [0, 2])
    return Capture(tuple(layers), traits, tokens, 1.0, "code", {})


@pytest.fixture(scope="module")
def capture():
    return captured()


@pytest.fixture
def table(modules, monkeypatch, tmp_path):
    """The rows of a capture, written and read again. Times and memory are not those of a machine; unless asked for, S2O
    is not compared with the Triton kernels, which are slow in the interpreter."""
    attention = modules["attention"]
    monkeypatch.setattr(
        attention, "quantiles", lambda run: (0.1, 0.2, 0.3) if run.__name__ == "rank" else (1.0, 2.0, 3.0)
    )
    monkeypatch.setattr(attention, "replayed", lambda run: run)
    monkeypatch.setattr(attention, "extra_mib", lambda run: 4.0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)

    def table(capture, dense=("fa2",), check=lambda mine: None):
        monkeypatch.setattr(attention, "check_s2o", check)
        problems = attention.problems_of([capture], CPU)
        attention.write(list(attention.measure(problems, dense, {})), tmp_path / "table.csv")
        return list(csv.DictReader((tmp_path / "table.csv").open(newline="")))

    return table


def test_a_captured_problem_holds_whole_pages_of_the_layer(modules, capture):
    (first, _), (last, _) = modules["captured"].captured_problems(capture, CPU)
    assert first.num_tokens == last.num_tokens == 1024
    assert first.shape == modules["inputs"].Shape("tiny layer 0 (captured from code)", 4, 2, 64)
    assert last.shape.name == "tiny layer 2 (captured from code)"
    for problem, layer in zip((first, last), capture.layers, strict=True):
        at = torch.arange(1024)
        page = problem.block_table[0, at // 16].long()
        assert not torch.equal(problem.block_table[0], torch.arange(64)), "shuffled"
        assert torch.equal(problem.query, layer.query[:1024])
        assert torch.equal(problem.key_cache[page, at % 16], layer.key[:1024])
        assert torch.equal(problem.value_cache[page, at % 16], layer.value[:1024])


def test_a_scale_of_the_models_own_goes_into_the_query(modules):
    capture = captured("granite", attention_multiplier=0.05)
    layer = capture.layers[0]
    assert layer.scale == 0.05
    problem = modules["captured"].captured_problem(capture, layer, CPU)
    whole = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(0, 1)[None] for t in (layer.query, layer.key, layer.value)), is_causal=True, enable_gqa=True,
        scale=layer.scale,
    )  # fmt: skip
    rows = problem.rows()
    exact = modules["inputs"].exact_rows(problem, rows)
    torch.testing.assert_close(exact, whole[0].transpose(0, 1)[rows], rtol=1e-4, atol=1e-5)


def test_yarn_and_a_text_of_ones_own_are_in_the_name(modules, capture):
    other = capture._replace(rope_factor=4.0, text="books/moby.txt")
    name = modules["captured"].name(other, other.layers[1])
    assert name == "tiny layer 2 (captured from moby.txt with YaRN x4)"


def test_less_than_a_page_is_refused(modules, capture):
    with pytest.raises(CaptureError, match=r"^15 tokens of models/tiny do not fill a page of 16\.$"):
        modules["captured"].captured_problem(capture._replace(num_tokens=15), capture.layers[0], CPU)


def test_rows_are_at_the_threshold_of_the_shipped_config(table, capture):
    """So few random keys hold nothing that could be left out: the density is 1."""
    rows = table(capture)
    assert [(row["provider"], row["shape"]) for row in rows] == [
        ("s2o", "tiny layer 0 (captured from code)"), ("fa2", "tiny layer 0 (captured from code)"),
        ("s2o", "tiny layer 2 (captured from code)"), ("fa2", "tiny layer 2 (captured from code)"),
    ]  # fmt: skip
    assert [row["threshold"] for row in rows] == ["0.02000", "", "0.02000", ""], "of default.yaml"
    for row in rows:
        assert row["seq_len"] == "1024" and row["vs_fa2"] == "1.00" and row["note"] == ""
        assert row["density"] == "1.0" and float(row["rel_error"]) < 1e-9


def test_density_and_error_are_what_the_thresholds_of_a_layer_give(table, modules, capture, monkeypatch):
    heads = [{"layers": 2, "heads": 0, "threshold": 0.3}]
    # Random weights attend to everything: few rows at a time, and few keys, find a stop.
    rules = {"segment_len": 128, "tile_size": 16, "key_block": 16, "stop_interval": 1}
    settings = {"threshold": 0.1, **rules, "layers": heads}
    monkeypatch.setattr(modules["captured"], "load_config", functools.partial(load_config, additional=settings))
    rows = table(capture, dense=())
    assert [row["threshold"] for row in rows] == ["0.10000", "0.1..0.3"]
    for row, problem in zip(rows, modules["attention"].problems_of([capture], CPU), strict=True):
        (params,) = problem[1]
        mine = modules["providers"].S2O(problem[0], params, "naive")
        assert float(row["density"]) == pytest.approx(mine.density(), abs=1e-3)
        assert 0.1 < float(row["density"]) < 0.95
        assert 1e-4 < float(row["rel_error"]) < 0.5


def test_a_captured_layer_passes_the_check_of_a_gpu(table, modules, capture):
    """Same bits twice, and the stops and results of the Triton kernels."""
    (row,) = table(capture._replace(layers=capture.layers[:1]), dense=(), check=modules["attention"].check_s2o)
    assert row["note"] == "" and row["density"]


def test_a_layer_that_the_config_keeps_dense_has_no_figures(table, modules, capture, monkeypatch):
    settings = {"layers": [{"layers": 0, "threshold": "dense"}]}
    monkeypatch.setattr(modules["captured"], "load_config", functools.partial(load_config, additional=settings))
    dense, fa2, sparse, _ = table(capture)
    assert dense["note"] == "the model's config keeps this layer dense"
    assert not any(dense[column] for column in ("density", "threshold", "ms_p50", "rel_error"))
    assert fa2["ms_p50"] and not fa2["vs_fa3_paged"]
    assert sparse["shape"] == "tiny layer 2 (captured from code)" and sparse["density"]


def test_what_cannot_run_or_errs_has_a_row_with_the_reason(table, modules, capture, monkeypatch, capsys):
    def broken(problem):
        raise RuntimeError("no kernel for heads of 64\nor for anything")

    monkeypatch.setitem(modules["attention"].DENSE, "fa3", broken)
    monkeypatch.setitem(modules["attention"].DENSE, "fa3_paged", lambda problem: lambda: problem.query)
    rows = table(capture, dense=("fa3_paged", "fa3"), check=lambda mine: "two runs differ")[:3]
    notes = {row["provider"]: row["note"] for row in rows}
    assert notes["s2o"] == "two runs differ" and notes["fa3"] == "no kernel for heads of 64 or for anything"
    assert notes["fa3_paged"].startswith("its error is ")
    assert not any(row["ms_p50"] or row["rel_error"] for row in rows)
    assert (
        "s2o on 1024 tokens of tiny layer 0 (captured from code): not reported, two runs differ"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--layers", "1"], "--captured-at, --layers and --text are of no use without --model\n"),
        (["--model", "any", "--captured-at", "64", "8"], "--captured-at: 8 tokens do not fill a page of 16\n"),
        (["--at"], "there is nothing to measure: give --at points, or a --model\n"),
        (["--model", "{empty}", "--at", "--captured-at", "64"], "attention.py: The model {empty} cannot be loaded: "),
    ],
)
def test_bad_input_is_told_in_a_sentence(modules, monkeypatch, capsys, tmp_path, arguments, said):
    arguments = [argument.format(empty=tmp_path) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["attention.py", "--out", str(tmp_path / "unwritten.csv"), *arguments])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as caught:
        modules["attention"].main()
    assert caught.value.code in (1, 2)
    assert said.format(empty=tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "unwritten.csv").exists()
