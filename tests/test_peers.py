"""Other projects' kernels in the attention benchmark: how they are asked for, searched, counted and refused."""

import csv
import importlib
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT

HEADS, TOKENS = 4, 528  # four blocks of 128 and a rest
MACHINE = {"machine": "a GPU", "torch": "1", "triton": "2", "date": "today"}

FAKES = {
    "pbs": (
        "pbs_attn/src/pbs.py",
        """
def permuted_block_selection():
    return None, selection[None], None

def permuted_block_sparse_attn_fwd(
    query, key, value, block_size, segment_size, threshold, causal, force_select_first_block
):
    assert query.shape == key.shape == value.shape and (block_size, segment_size, causal) == (128, 256, True)
    permuted_block_selection()
    return query
""",
    ),
    "flashprefill": (
        "ops/flashprefill_native_forward.py",
        """
from fla.utils import autocast_custom_fwd, contiguous

def deal_output_score():
    return None, selection.sum(-1).T[None]

@contiguous
@autocast_custom_fwd
def flash_prefill(q, k, v, out, block_size, attention_sink, window_size, alpha, last_n_block_full, min_budget):
    assert k.shape == v.shape and k.shape[2] < q.shape[2] and block_size == 128
    deal_output_score()
    out.copy_(q)
""",
    ),
    "flashprefill2": (
        "flashprefill_ops/flashprefill/prefill.py",
        """
import torch

def build_block_sparse_index_fast():
    counts = selection.sum(-1).flatten()
    ends = counts.new_zeros(len(counts) + 1).int()
    ends[1:] = counts.cumsum(0)
    tiles = selection.flatten(0, 1).nonzero()[:, 1].int()
    spare = tiles.new_full((7,), 0)  # more room than the lists take
    return ends, torch.cat([tiles, spare]), selection.shape[1], None

class FlashPrefill:
    kept = None

    def __init__(self, k_block_m, k_block_n, attention_sink, window_size, last_n_blocks, use_mean_correction):
        assert (k_block_m, k_block_n, attention_sink, window_size, last_n_blocks) == (128, 128, 2, 4, 8)
        assert use_mean_correction

    def __call__(self, q, k, v, page_table, cache_seqlens, cu_seqlens_q, q_lens, max_cache_seqlen):
        assert cu_seqlens_q.tolist() == [0, *q_lens] and cache_seqlens.tolist() == [max_cache_seqlen] == [len(q)]
        assert 0 <= self.abs_threshold <= 1
        self.kept = [cache[page_table[0]].flatten(0, 1) for cache in (k, v)]
        build_block_sparse_index_fast()
        return q

    def clear_workspaces(self):
        self.kept = None
""",
    ),
    "flexprefill": (
        "flex_prefill/ops/flex_prefill_attention.py",
        """
def get_active_blocks():
    return [[mask.flatten().nonzero()[:, 0] for mask in selection]]

def flex_prefill_attention(q, k, v, gamma, tau, min_budget, block_size):
    assert k.shape == v.shape and k.shape[2] < q.shape[2] and block_size == 128
    get_active_blocks()
    return q
""",
    ),
}
"""Checkouts with the functions that are called, where the peers have them, and no attention inside."""
PACKAGES = ("pbs_attn", "flashprefill")
"""What is imported by its package's name, not by its file."""


@pytest.fixture
def benchmark(monkeypatch):
    """The module `attention` of benchmarks/; its neighbours are found by the folder, as when it is run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    names = ("attention", "captured", "inputs", "peers", "providers")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield importlib.import_module("attention")
    for name in [name for name in sys.modules if name in names or name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]


@pytest.fixture
def problem(benchmark):
    shape = sys.modules["inputs"].Shape("small", HEADS, 2, 32)
    return benchmark.make_problem(shape, TOKENS, torch.device("cpu"), dtype=torch.float32)


@pytest.fixture
def checkout(tmp_path):
    for file, text in FAKES.values():
        (tmp_path / file).parent.mkdir(parents=True)
        (tmp_path / file).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    "entries, said",
    [
        (["pbs"], "'pbs' is not NAME=PATH with a name among pbs, flashprefill, flashprefill2, flexprefill"),
        (["other=."], "'other=.' is not NAME=PATH with a name among pbs, flashprefill, flashprefill2, flexprefill"),
        (["pbs=/not/there"], "'/not/there' is no folder: the path of pbs is a checkout of its repository"),
        (["pbs=.", "pbs=."], "each name can be given once"),
    ],
)
def test_bad_peers_are_refused(benchmark, monkeypatch, capsys, entries, said):
    given = [part for entry in entries for part in ("--peer", entry)]
    monkeypatch.setattr(sys, "argv", ["attention.py", "--out", "unwritten.csv", *given])
    with pytest.raises(SystemExit) as caught:
        benchmark.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f"attention.py: error: argument --peer: {said}\n")


def test_a_peer_is_a_name_and_a_path(benchmark, tmp_path):
    assert benchmark.parse_peer(f"pbs={tmp_path}") == ("pbs", tmp_path)


@pytest.mark.parametrize("name", sorted(FAKES.keys() - {"flashprefill2"}))
def test_density_counts_the_causal_pairs_of_the_selection(benchmark, problem, checkout, name):
    peer = benchmark.PEERS[name](problem, checkout)
    assert "fla" not in sys.modules
    torch.manual_seed(0)
    selection = (torch.rand(HEADS, 5, 5) < 0.5).tril() | torch.eye(5, dtype=torch.bool)
    segment = torch.arange(TOKENS) // (256 if name == "pbs" else 128)
    same, before = segment[:, None] == segment, segment[:, None] > segment
    if name == "pbs":  # it may select blocks that come after the queries: none is visited
        selection |= ~torch.ones(5, 5, dtype=torch.bool).tril()
    places = torch.arange(TOKENS) // 128
    visited = selection[:, places[:, None], places] & before | same
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    peer.module.selection = selection
    assert peer.density(peer.default) == pytest.approx((visited & causal).sum().item() / (HEADS * causal.sum().item()))
    assert torch.equal(peer.run(peer.default), problem.query)


@pytest.fixture
def packed(benchmark, checkout):
    """FlashPrefill V2 on a problem of four KV heads, each of which serves so many heads."""

    def packed(group, head_size=128):
        shape = sys.modules["inputs"].Shape("small", 4 * group, 4, head_size)
        problem = benchmark.make_problem(shape, TOKENS, torch.device("cpu"), dtype=torch.float32)
        return benchmark.PEERS["flashprefill2"](problem, checkout)

    return packed


@pytest.mark.parametrize("group", [1, 3, 4])
def test_density_counts_the_pairs_of_rows_that_heads_share(packed, group):
    peer = packed(group)
    torch.manual_seed(0)
    row = torch.arange(TOKENS * group)
    query, block = row // group, row // 128
    mine = torch.zeros(int(block[-1]) + 1, 5, dtype=torch.bool)
    mine[block, query // 128] = True
    # Past the diagonal nothing is selected but the rest of a block; past the end not even that.
    choice = (torch.rand(4, len(mine), 5) < 0.5) & (torch.arange(5) < mine.int().argmax(1)[:, None]) | mine
    peer.module.selection = choice.repeat_interleave(2, -1)[..., : -(-TOKENS // 64)]
    key = torch.arange(TOKENS)
    visited = choice[:, block[:, None], key // 128] & (key <= query[:, None])
    pairs = 4 * group * TOKENS * (TOKENS + 1) / 2
    assert peer.density(peer.default) == pytest.approx(visited.sum().item() / pairs)


@pytest.mark.parametrize("page", [1, 16])
def test_the_paged_cache_is_read_where_it_is(packed, monkeypatch, page):
    monkeypatch.setattr(sys.modules["peers"].FlashPrefillV2, "page", page)
    peer = packed(2)
    peer.module.selection = torch.ones(4, 9, 9, dtype=torch.bool)
    assert torch.equal(peer.run(peer.default), peer.problem.query)
    assert peer.key.shape == (TOKENS // page, page, 4, 128)
    assert peer.key.data_ptr() == peer.problem.key_cache.data_ptr()
    assert all(map(torch.equal, peer.operator.kept, (peer.problem.key, peer.problem.value)))
    peer.forget()
    assert peer.operator.kept is None


def test_heads_of_a_size_without_a_kernel_are_refused(packed):
    with pytest.raises(RuntimeError, match="it has no kernel for heads of 64"):
        packed(1, head_size=64)


@pytest.mark.parametrize("target", [0.3, 1e-3, 2e-5])
def test_the_search_lands_on_the_error(benchmark, target):
    asked = []

    def error_at(looseness):
        asked.append(looseness)
        return looseness**2

    looseness, error = benchmark.match_error(error_at, 0.1, 0.01, target)
    assert error == looseness**2 == pytest.approx(target, rel=0.1)
    assert len(asked) <= 10


def test_the_search_asks_nothing_where_the_default_matches(benchmark):
    assert benchmark.match_error(None, 0.1, 0.0105, 0.01) == (0.1, 0.0105)


@pytest.mark.parametrize("low", [1e-2, math.nan])
def test_the_search_returns_the_closest_that_it_saw(benchmark, low):
    asked = []

    def error_at(looseness):
        asked.append(looseness)
        return 0.02 if looseness > 0.05 else low

    looseness, error = benchmark.match_error(error_at, 0.5, 0.02, 1e-4)
    assert len(asked) == 10
    assert (error == low and looseness <= 0.05) if low == 1e-2 else (looseness, error) == (0.5, 0.02)


@pytest.fixture
def rows_of(benchmark, problem, monkeypatch, tmp_path):
    """The rows of a peer that gives exact attention with an error of its parameter's size; `attend` may replace it."""
    rows = torch.arange(TOKENS)
    exact = sys.modules["inputs"].exact_rows(problem, rows)

    class Fake(sys.modules["peers"].Peer):
        default, dense = 0.1, 0.0

        def load(self, path):
            pass

        def at(self, looseness):
            return looseness

        def density(self, value):
            return 1 - value

    def rows_of(attend=lambda value: exact * (1 + value), target=None):
        Fake.attend = lambda self, value: attend(value)
        monkeypatch.setitem(benchmark.PEERS, "fake", Fake)
        monkeypatch.setattr(benchmark, "quantiles", lambda run: (1.0, 2.0, 3.0))
        monkeypatch.setattr(benchmark, "extra_mib", lambda run: 4.0)
        found = benchmark.peer_rows(problem, {"fake": tmp_path}, exact, rows, target)
        table = [benchmark.as_row(one, problem, {"fa2": 8.0}, MACHINE) for one in found]
        benchmark.write(table, tmp_path / "table.csv")
        with (tmp_path / "table.csv").open() as file:
            return list(csv.DictReader(file))

    return rows_of


def figures(row):
    return {column for column in ("density", "threshold", "ms_p50", "rel_error", "extra_mib", "vs_fa2") if row[column]}


def test_a_peer_has_a_row_at_its_defaults_and_one_at_matched_error(rows_of):
    first, second = rows_of(target=1e-3)
    assert [first["note"], first["threshold"], first["density"]] == ["default", "0.1", "0.9"]
    assert [first["ms_p50"], first["rel_error"], first["vs_fa2"]] == ["2.000", "1.00e-02", "4.00"]
    assert first["visited_tflops"] == first["ranking_share"] == ""
    assert second["note"] == "matched error"
    assert float(second["rel_error"]) == pytest.approx(1e-3, rel=0.1)
    assert float(second["threshold"]) == pytest.approx(1e-3**0.5, rel=0.05)


def test_memory_is_that_of_a_run_to_which_nothing_was_left(benchmark, monkeypatch):
    steps = []
    peer = SimpleNamespace(
        run=lambda value: steps.append("run"),
        density=lambda value: steps.append("count") or 0.5,
        forget=lambda: steps.append("forget"),
    )
    monkeypatch.setattr(benchmark, "quantiles", lambda run: run())
    monkeypatch.setattr(benchmark, "extra_mib", lambda run: steps.append("measure"))
    benchmark.peer_row(peer, 0.1, lambda out: 0.0)
    assert steps == ["run", "count", "run", "forget", "measure"]


def test_an_error_that_is_not_reached_is_called_the_closest(rows_of):
    assert [row["note"] for row in rows_of(target=1e-12)] == ["default", "closest error"]


def test_without_a_row_of_s2o_there_is_no_error_to_match(rows_of):
    assert [row["note"] for row in rows_of()] == ["default"]


def failing(value):
    assert value == 0.1, "only its default"
    return torch.zeros(TOKENS, HEADS, 32)


@pytest.mark.parametrize(
    "attend, note",
    [
        (failing, "its result is not attention: its error is 1.0e+00"),
        (lambda value: torch.full((TOKENS, HEADS, 32), math.nan), "its result is not attention: its error is nan"),
        (lambda value: 1 // 0, "ZeroDivisionError: integer division or modulo by zero"),
    ],
    ids=["zeros", "nan", "fault"],
)
def test_a_peer_that_fails_has_a_row_with_the_reason_and_no_figures(rows_of, attend, note):
    (row,) = rows_of(attend, target=1e-3)
    assert [row["provider"], row["seq_len"], row["note"]] == ["fake", str(TOKENS), note]
    assert not figures(row)


@pytest.mark.parametrize("name", FAKES)
def test_a_folder_that_is_no_checkout_is_told(benchmark, problem, tmp_path, name):
    (found,) = benchmark.peer_rows(problem, {name: tmp_path}, None, None, None)
    assert found["provider"] == name
    assert found["note"].startswith(f"there is no {tmp_path}")
    assert not figures(dict.fromkeys(benchmark.COLUMNS) | benchmark.as_row(found, problem, {}, MACHINE))


def test_the_reason_is_the_cause_in_one_line(benchmark):
    error = RuntimeError("at 3:1:\n  a line of the kernel")
    error.__cause__ = NotImplementedError("Block pointers have been removed.\nUse another.")
    assert sys.modules["peers"].reason(error) == "NotImplementedError: Block pointers have been removed."
