"""Tables of results: what is read, what is drawn, and what is refused."""

import csv
import importlib.util
import sys

import bench_modules
import pytest
from page_parts import elements, named
from processes import ROOT

from vllm_s2o.quality import frontier
from vllm_s2o.quality.tasks import table as tasks
from vllm_s2o.report import bench, results, words

ATTENTION = {
    "gpu": "H100", "torch": "2", "triton": "3", "vllm": "0.32", "date": "2026-01-01", "commit": "abc",
    "provider": "s2o", "shape": "made", "seq_len": "8192", "density": "0.25", "ms_p50": "2.0", "rel_error": "1e-3",
    "vs_fa3_paged": "3.0", "vs_fa2": "6.0", "note": "",
}  # fmt: skip
FRONTIER = {
    "model": "M", "seq_len": "8192", "split": "held-out", "layer": "all", "method": "s2o_256", "density": "0.1",
    "rel_error": "2e-3",
}  # fmt: skip
SERVING = {
    "gpu": "H100", "vllm": "0.32", "date": "2026-01-01", "commit": "abc", "model": "M", "backend": "s2o",
    "tool": "bench serve", "prompt_len": "32768", "output_len": "16", "concurrency": "1", "prompts": "8",
    "ttft_ms_p50": "930.6", "tpot_ms_p50": "", "tokens_per_s": "31546", "density": "0.114",
}  # fmt: skip
TASKS = {
    "model": "M", "backend": "s2o", "task": "average", "length": "4096", "score": "81.5", "ci95": "2.5",
    "density": "0.4", "samples": "20", "difference": "-0.5", "difference_low": "-1.5", "difference_high": "0.5",
}  # fmt: skip
ROWS = {"attention.csv": ATTENTION, "frontier.csv": FRONTIER, "serving.csv": SERVING, "tasks.csv": TASKS}


def write(directory, name: str, *rows: dict[str, str]) -> None:
    with (directory / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def drawn(directory):
    return elements(bench.section(results.read(directory)))


def told(found, figure: str) -> list[str]:
    """What the marks of a figure say."""
    (one,) = [number for number, element in enumerate(found) if element.name == "b" and element.words == figure]
    after = found[one:]
    end = next(n for n, element in enumerate(after) if element.name == "ul")
    return [element.words for element in after[:end] if element.name == "title"][1:]


def test_columns_are_those_that_are_written():
    spec = importlib.util.spec_from_file_location("benchmarks_attention", ROOT / "benchmarks" / "attention.py")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        attention = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(attention)
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    written = {
        "attention.csv": attention.COLUMNS, "frontier.csv": frontier.COLUMNS, "tasks.csv": tasks.COLUMNS,
        "serving.csv": bench_modules.record.COLUMNS,
    }  # fmt: skip
    assert {name: set(columns) - set(written[name]) for name, columns in results.FILES.items()} == {
        name: set() for name in results.FILES
    }


def test_results_of_this_repository():
    found = results.read(ROOT / "benchmarks" / "results")
    assert {"attention.csv", "serving.csv"} <= set(found.tables)
    assert set(found.tables) | set(found.missing) == set(results.FILES)
    page = bench.section(found)
    for name, rows in found.tables.items():
        lines = len((found.directory / name).read_text().splitlines())
        assert len(rows) == lines - 1
    assert "131,072 tokens" in page and "ms to the first token" in page


def test_what_is_drawn_of_each_table(tmp_path):
    dense = {"provider": "fa3_paged", "ms_p50": "6.0", "density": "1.0", "rel_error": "3e-6"}
    broken = {"provider": "pbs", "ms_p50": "", "density": "", "rel_error": "", "note": "no kernel here"}
    write(tmp_path, "attention.csv", ATTENTION, ATTENTION | dense, ATTENTION | broken)
    write(tmp_path, "frontier.csv", FRONTIER, FRONTIER | {"layer": "3"}, FRONTIER | {"method": "pbs", "density": "0.3"})
    write(tmp_path, "serving.csv", SERVING, SERVING | {"backend": "flash_attn", "ttft_ms_p50": "1336.1", "density": ""})
    write(tmp_path, "tasks.csv", TASKS, TASKS | {"backend": "dense", "score": "82"}, TASKS | {"length": "all"})
    found = drawn(tmp_path)
    assert told(found, "Time against length") == [
        "S2O, 8,192 tokens: 2 ms at a density of 25 %", "FA3 on pages, 8,192 tokens: 6 ms at a density of 100 %",
    ]  # fmt: skip
    assert told(found, "Time to the first token") == [
        "S2O, 32,768 tokens in, 16 out: 930.6 ms to the first token",
        "dense (FLASH_ATTN), 32,768 tokens in, 16 out: 1,336 ms to the first token",
    ]
    assert told(found, "Average score against length") == [
        "S2O, 4,096 tokens: 81.5 ± 2.5", "dense, 4,096 tokens: 82.0 ± 2.5"
    ]  # fmt: skip
    errors = [e.words for e in named(found, "title") if "relative error" in e.words]
    assert errors == [
        "S2O, 8,192 tokens: relative error 0.001 at a density of 25 %",
        "s2o_256: relative error 0.002 at a density of 10 %", "pbs: relative error 0.002 at a density of 30 %",
    ]  # fmt: skip
    tables = {table.words: None for table in named(found, "caption")}
    assert "S2O's speed on H100" in tables
    cells = [cell.words for cell in named(found, "td")]
    assert "no kernel here" in cells and "3.00x" in cells and "-0.5 (-1.5 to +0.5)" in cells
    assert [p.words for p in named(found, "p") if "single layers" in p.words] == [
        "The table has 1 rows more, of single layers."
    ]


def test_figures_that_cannot_be_compared_have_charts_of_their_own(tmp_path):
    rows = [SERVING, SERVING | {"concurrency": "8"}, SERVING | {"tool": "bench latency"}, SERVING | {"gpu": "H200"}]
    write(tmp_path, "serving.csv", *rows)
    assert len([b for b in named(drawn(tmp_path), "b") if b.words == "Time to the first token"]) == 4


def test_all_prompts_at_once_have_a_row_and_no_chart(tmp_path):
    write(tmp_path, "serving.csv", SERVING | {"tool": "bench throughput", "concurrency": "", "ttft_ms_p50": ""})
    found = drawn(tmp_path)
    assert "all" in [cell.words for cell in named(found, "td")]
    assert not [b for b in named(found, "b") if b.words == "Time to the first token"]


def test_charts_of_one_layer_hold_one_gpu_and_one_shape(tmp_path):
    others = [ATTENTION | {"gpu": "H200", "ms_p50": "1.0"}, ATTENTION | {"shape": "captured", "ms_p50": "1.5"}]
    write(tmp_path, "attention.csv", ATTENTION, *others)
    found = drawn(tmp_path)
    assert told(found, "Time against length") == ["S2O, 8,192 tokens: 2 ms at a density of 25 %"]
    assert [c.words for c in named(found, "caption") if "speed" in c.words] == [
        "S2O's speed on H100", "S2O's speed on H200",
    ]  # fmt: skip


def test_both_rankings_of_one_table_are_told_apart(tmp_path):
    write(tmp_path, "attention.csv", ATTENTION | {"provider": "s2o_kv_head", "ms_p50": "1.5"}, ATTENTION)
    found = drawn(tmp_path)
    names = ["S2O, a ranking per KV head", "S2O"]
    assert told(found, "Time against length") == [
        f"{name}, 8,192 tokens: {ms} ms at a density of 25 %" for name, ms in zip(names, ("1.5", "2"), strict=True)
    ]
    assert [c.words for c in named(found, "caption") if "speed" in c.words] == [
        "S2O's speed on H100, a ranking per KV head", "S2O's speed on H100",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_missing_tables_are_named(tmp_path, name):
    write(tmp_path, name, ROWS[name])
    (said,) = [p.words for p in named(drawn(tmp_path), "p") if p.words.startswith("Not there")]
    assert [other for other in results.FILES if other in said] == [other for other in results.FILES if other != name]


@pytest.mark.parametrize("name", ROWS)
def test_a_table_without_rows(tmp_path, name):
    (tmp_path / name).write_text(",".join(ROWS[name]) + "\n")
    assert "The table has no rows." in [p.words for p in named(drawn(tmp_path), "p")]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_which_nothing_was_measured(tmp_path, name):
    """Whatever may be empty is."""
    maybe = {column: "" for column, kind in results.FILES[name].items() if kind in (results.MAYBE, results.SIGNED)}
    write(tmp_path, name, ROWS[name] | maybe)
    assert named(drawn(tmp_path), "table")


REFUSED = {
    "no number": ("serving.csv", SERVING | {"prompt_len": "many"}, "row 1: 'many' in the column prompt_len is not a w"),
    "not a number": ("attention.csv", ATTENTION | {"ms_p50": "nan"}, "'nan' in the column ms_p50 is not a number fro"),
    "less than none": ("attention.csv", ATTENTION | {"rel_error": "-1"}, "'-1' in the column rel_error is not a num"),
    "endless": ("tasks.csv", TASKS | {"difference": "-inf"}, "'-inf' in the column difference is not a number, or no"),
    "no tokens": ("attention.csv", ATTENTION | {"seq_len": "0"}, "'0' in the column seq_len is not a whole number fr"),
    "nothing": ("frontier.csv", FRONTIER | {"density": ""}, "'' in the column density is not a number from 0"),
    "a column less": ("tasks.csv", {"model": "M"}, "has no column backend: it is no table that make tasks writes"),
}


@pytest.mark.parametrize("name, row, said", REFUSED.values(), ids=REFUSED)
def test_refusals(tmp_path, name, row, said):
    write(tmp_path, name, row)
    with pytest.raises(results.ResultsError) as refused:
        results.read(tmp_path)
    assert said in str(refused.value) and name in str(refused.value)


def test_refusals_of_files(tmp_path):
    for content, said in ((b"\xff\xfe", "is no CSV file in UTF-8."), (b"", "has no column gpu")):
        (tmp_path / "attention.csv").write_bytes(content)
        with pytest.raises(results.ResultsError, match=said):
            results.read(tmp_path)
    (tmp_path / "attention.csv").write_text(",".join(ATTENTION) + "\nH100\n")
    with pytest.raises(results.ResultsError, match="row 1, is shorter than the line of names"):
        results.read(tmp_path)


def test_names_of_providers():
    """Each its own, and S2O's rankings told apart."""
    said = {provider: words.name_of(provider) for provider in (*bench_modules.servers.PROVIDERS, "s2o_budget_2")}
    assert said == {
        "s2o": "S2O", "s2o_budget_10": "S2O, 10 % budget", "flash_attn": "dense (FLASH_ATTN)",
        "s2o_budget_10_kv_head": "S2O, 10 % budget, a ranking per KV head", "s2o_budget_2": "S2O, 2 % budget",
    }  # fmt: skip
    assert len({words.look_of(provider) for provider in bench_modules.servers.PROVIDERS}) == 3
    assert set(bench_modules.servers.DEFAULT) == set(bench_modules.servers.PROVIDERS) - {"s2o_budget_10_kv_head"}
