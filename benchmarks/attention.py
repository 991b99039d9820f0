#!/usr/bin/env python3
"""One layer's attention on a GPU, S2O beside dense kernels and peers: a row per provider, shape, length and density.

    python benchmarks/attention.py --out benchmarks/results/attention.csv [--at 32768:0.15 131072:0.1]
                                   [--peer pbs=PATH --peer flashprefill=PATH --peer flexprefill=PATH]
                                   [--peer flashprefill2=PATH]
                                   [--model MODEL --captured-at 8192 32768 --layers 1 15 29 --text code]

All providers run in one process on the same problem. Before one is timed, its result is checked: dense kernels against
exact attention on sampled rows, S2O against the Triton kernels that every GPU runs (in fp8, which they compute, against
the kernels in 16 bits on the same numbers), against itself (same bits), and for waits on the device. What fails has a
row with the reason and without figures.

Inputs are made, and S2O's threshold is searched so that the stop rule itself lands on the density. With --model there
are also captured ones: queries, keys and values of some of its layers on a real text. On these S2O runs at the
thresholds of the config that ships for the model, and the density is what results. With --fp8 made inputs are measured
once more, rounded to fp8, at the same thresholds; errors are those from exact attention of the inputs before rounding.

A peer, from a checkout of its own project, has a row at its own defaults and one at matched error: its parameter is
searched until it errs as S2O's first row of the problem does, within 10 %. Where it cannot run, its row says why.
"""

import argparse
import csv
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import triton
from captured import captured_problems
from inputs import LLAMA_8B, Problem, exact_rows, from_fp8, in_fp8, make_problem
from peers import PEERS, Peer
from providers import DEFAULTS, DENSE, S2O, find_threshold

from vllm_s2o import S2OParams
from vllm_s2o.cli.environment import commit_name, describe
from vllm_s2o.params import threshold_range
from vllm_s2o.quality.capture import Capture, CaptureError, capture
from vllm_s2o.quality.text import SOURCES

AT = ("4096:0.5", "8192:0.3", "16384:0.2", "32768:0.15", "65536:0.12", "131072:0.1", "131072:0.06", "262144:0.05")
CAPTURED_AT = (8192, 32768)
COLUMNS = (
    "run", "gpu", "torch", "triton", "vllm", "date", "commit", "provider", "shape", "seq_len", "density", "threshold",
    "ms_p20", "ms_p50", "ms_p80", "visited_tflops", "ranking_share", "rel_error", "extra_mib", "vs_fa3_paged", "vs_fa2",
    "note",
)  # fmt: skip
SHOWN = (
    "provider", "shape", "seq_len", "density", "ms_p50", "visited_tflops", "ranking_share", "rel_error", "extra_mib",
    "vs_fa3_paged", "vs_fa2", "note",
)  # fmt: skip
"""Columns that are printed meanwhile."""
DENSE_ERROR = 1e-4
"""What a dense kernel in bfloat16 may err, relative to the mean square of the output."""
FP8_ERROR = 2e-2
"""The same in fp8: of 3 bits a rounded number is off by 1/16 at most, and queries, keys, values and weights are."""
MOVED = 1e-4
"""Pairs that may differ between two S2O kernels: sums of another order decide a tile whose gain is the threshold to six
digits. One test of one tile is 1e-6 of the pairs or less."""
NO_FP8 = ("fa3", "fa2")
"""FA2 has none, and keys and values that are rounded are there in pages only."""
MOVED_FP8 = 1e-2
"""The same between fp8 and what it stands for in 16 bits, and of the result: the mean of queries, which ranks the keys,
is rounded at another place, and some keys change places."""
PEER_ERROR = 0.5
"""What a peer may err at its own defaults: a result that has nothing to do with attention errs 1 or more."""
MATCHED = 0.1
"""How far a peer's error may be from S2O's to be called the same."""


def quantiles(run: Callable) -> tuple[float, float, float]:
    """Milliseconds: 20th, 50th and 80th percentile of what fits in 0.6 s, and of five runs at least."""
    run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    once = 1000 * (time.perf_counter() - start)
    return triton.testing.do_bench(run, warmup=100, rep=max(600, 5.5 * once), quantiles=[0.2, 0.5, 0.8])


def replayed(run: Callable) -> Callable:
    """The same work without its launches. A ranking alone is short beside them; in a step the host is ahead of it."""
    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def extra_mib(run: Callable) -> float:
    """Memory that a run takes beside what was there before, the result included."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def relative_error(out: torch.Tensor, exact: torch.Tensor, rows: torch.Tensor) -> float:
    return ((out[rows].float() - exact).square().mean() / exact.square().mean()).item()


def check_s2o(mine: S2O) -> str | None:
    """What is wrong with S2O's result, or None."""
    pairs = mine.run()
    first = mine.out.clone()
    torch.cuda.set_sync_debug_mode("error")
    try:
        mine.run()
    except RuntimeError as error:
        return f"a run waits for the device: {error}"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if not torch.equal(mine.out, first):
        return "two runs differ"
    if mine.problem.exact is None:
        other, bounds, plain = "the Triton kernels", (MOVED, DENSE_ERROR), S2O(mine.problem, mine.params, "triton")
    else:  # in fp8 it is the Triton kernels
        other, bounds = "the kernels in 16 bits", (MOVED_FP8, MOVED_FP8)
        plain = S2O(from_fp8(mine.problem), mine.params)
    moved = (plain.run() - pairs).abs().sum().item() / pairs.sum().item()
    if moved:
        print(f"{mine.problem.num_tokens} tokens: {moved:.1e} of the pairs are not those of {other}", flush=True)
    if moved > bounds[0]:
        return f"it stops elsewhere than {other}: {moved:.1e} of the pairs"
    apart = (plain.out.float() - first.float()).square().mean() / first.float().square().mean()
    return None if apart < bounds[1] else f"it differs from {other} by {apart.item():.1e}"


def s2o_row(problem: Problem, params: S2OParams | None, exact: torch.Tensor, rows: torch.Tensor) -> dict:
    """S2O with these parameters; None is a layer that its config leaves dense."""
    if params is None:
        return dict(provider="s2o", note="the model's config keeps this layer dense")
    provider = "s2o" if params.ranking == DEFAULTS.ranking else f"s2o_{params.ranking}"
    mine = S2O(problem, params)
    if wrong := check_s2o(mine):
        return not_reported(provider, problem, wrong)
    pairs = mine.run().sum().item()
    times = quantiles(mine.run)
    ranking = quantiles(replayed(mine.rank))[1]
    workspace = sum(buffer.nbytes for buffer in mine.workspace) / 2**20
    given = params.threshold
    return dict(
        provider=provider,
        density=round(pairs / mine.causal, 4),
        threshold=f"{given:.5f}" if isinstance(given, float) else threshold_range([params]),
        times=times,
        visited_tflops=4 * problem.shape.head_size * pairs / (times[1] - ranking) / 1e9,
        ranking_share=ranking / times[1],
        rel_error=relative_error(mine.out, exact, rows),
        extra_mib=workspace + extra_mib(mine.run),
    )


def not_reported(provider: str, problem: Problem, reason: object) -> dict:
    """A row without figures."""
    note = " ".join(str(reason).split())
    print(f"{provider} on {problem.num_tokens} tokens of {problem.shape.name}: not reported, {note}", file=sys.stderr)
    return dict(provider=provider, note=note)


def dense_rows(problem: Problem, names: list[str], exact: torch.Tensor, rows: torch.Tensor) -> list[dict]:
    found = []
    work = 4 * problem.shape.head_size * problem.shape.num_heads * problem.num_tokens * (problem.num_tokens + 1) / 2
    for name in names:
        try:
            run = DENSE[name](problem)
            error = relative_error(run(), exact, rows)
        except (ImportError, RuntimeError) as reason:
            found.append(not_reported(name, problem, reason))
            continue
        if not error < (DENSE_ERROR if problem.exact is None else FP8_ERROR):
            found.append(not_reported(name, problem, f"its error is {error:.1e}"))
            continue
        times = quantiles(run)
        found.append(
            dict(
                provider=name, density=1.0, threshold="", times=times, visited_tflops=work / times[1] / 1e9,
                ranking_share=0.0, rel_error=error, extra_mib=extra_mib(run),
            )
        )  # fmt: skip
    return found


def match_error(
    error_at: Callable[[float], float], start: float, error: float, target: float, runs: int = 10
) -> tuple[float, float]:
    """The looseness at which a peer errs most nearly `target`, and its error there, by bisection.

    Args:
        error_at: the error at a looseness; it grows with the looseness.
        start: a looseness whose `error` is known.
        runs: how often `error_at` may be asked.
    """

    def apart(error: float) -> float:
        """Distance of an error from the target: 0 is the same, and what is no number is never nearest."""
        return abs(math.log(max(error, 1e-30) / target)) if math.isfinite(error) else math.inf

    low, high = 1e-4, 1.0
    at, best = start, (start, error)
    for _ in range(runs):
        if abs(best[1] / target - 1) <= MATCHED:
            break
        low, high = (at, high) if error < target else (low, at)
        at = (low * high) ** 0.5
        error = error_at(at)
        best = min(best, (at, error), key=lambda pair: apart(pair[1]))
    return best


def peer_row(peer: Peer, value: float, error: Callable[[torch.Tensor], float]) -> dict:
    # What a peer compiled for other values of its parameter, or for other lengths, would be slower or no longer
    # compiled: each row starts anew.
    torch.compiler.reset()
    run = functools.partial(peer.run, value)
    rel_error = error(run())
    if not rel_error < PEER_ERROR:
        raise RuntimeError(f"its result is not attention: its error is {rel_error:.1e}")
    found = dict(
        density=round(peer.density(value), 4), threshold=f"{value:.5g}", times=quantiles(run), rel_error=rel_error
    )
    peer.forget()
    return dict(found, extra_mib=extra_mib(run))


def rows_of_peer(peer: Peer, error: Callable[[torch.Tensor], float], target: float | None) -> Iterator[dict]:
    """At its own defaults, and where it errs `target`, if there is one."""
    first = peer_row(peer, peer.default, error)
    # Only now: kernels choose their tiles in the first run of a length, and that is to be at the defaults. Compilers
    # stay out of what is not timed, since every value of the parameter would be compiled for.
    with torch.compiler.set_stance("force_eager"):
        if peer.dense is not None and not (wrong := error(peer.run(peer.dense))) < DENSE_ERROR:
            raise RuntimeError(f"its error is {wrong:.1e} where it visits everything")
    yield dict(first, note="default")
    if target is None:
        return
    with torch.compiler.set_stance("force_eager"):
        # `at` is its own inverse: 1 - x, or x.
        looseness, nearest = match_error(
            lambda looseness: error(peer.run(peer.at(looseness))), peer.at(peer.default), first["rel_error"], target
        )
    matched = abs(nearest / target - 1) <= MATCHED
    found = first if looseness == peer.at(peer.default) else peer_row(peer, peer.at(looseness), error)
    yield dict(found, note="matched error" if matched else "closest error")


def peer_rows(
    problem: Problem, peers: dict[str, Path], exact: torch.Tensor, rows: torch.Tensor, target: float | None
) -> list[dict]:
    found = []
    peer: Peer | None
    for name, path in peers.items():
        try:
            peer = PEERS[name](problem, path)
            for row in rows_of_peer(peer, lambda out: relative_error(out, exact, rows), target):
                found.append(dict(provider=name, **row))
        except (ImportError, RuntimeError) as reason:
            found.append(not_reported(name, problem, reason))
        peer = None  # its tensors go before the next peer's come
    return found


def as_row(found: dict, problem: Problem, medians: dict[str, float], machine: dict) -> dict:
    """A row of the table. A provider that could not run has no figures, only a note."""
    row = {
        "gpu": machine["machine"], "torch": machine["torch"], "triton": machine["triton"],
        "vllm": machine.get("vllm", ""), "date": machine["date"], "commit": commit_name(machine),
        "shape": problem.shape.name, "seq_len": problem.num_tokens, **found,
    }  # fmt: skip
    times = row.pop("times", None)
    if times is not None:
        row.update(zip(("ms_p20", "ms_p50", "ms_p80"), (f"{one:.3f}" for one in times), strict=True))
        for column, name in (("vs_fa3_paged", "fa3_paged"), ("vs_fa2", "fa2")):
            row[column] = f"{medians[name] / times[1]:.2f}" if name in medians else ""
    # A peer's ranking is not known apart, so neither is its rate on the visited pairs.
    forms = {"visited_tflops": ".0f", "ranking_share": ".3f", "rel_error": ".2e", "extra_mib": ".0f"}
    row.update((column, format(row[column], form)) for column, form in forms.items() if column in row)
    return row


def made_problems(
    at: dict[int, list[float]], device: torch.device, fp8: bool = False, bases: Sequence[S2OParams] = (DEFAULTS,)
) -> Iterator[tuple[Problem, list[S2OParams | None]]]:
    """Each of `bases` at thresholds that land on the densities; with `fp8` also inputs that are rounded to it, at the
    same thresholds."""
    for tokens, densities in at.items():
        problem = make_problem(LLAMA_8B, tokens, device)
        wanted: list[S2OParams | None] = [
            find_threshold(problem, density, base) for base in bases for density in densities
        ]
        yield problem, wanted
        if fp8:
            yield in_fp8(problem), wanted
        del problem  # before the next one is made


def problems_of(captures: list[Capture], device: torch.device) -> Iterator[tuple[Problem, list[S2OParams | None]]]:
    for captured in captures:
        for problem, params in captured_problems(captured, device):
            yield problem, [params]
            del problem


def measure(
    problems: Iterable[tuple[Problem, list[S2OParams | None]]],
    dense: list[str],
    peers: dict[str, Path],
    peers_at: list[int] | None = None,
) -> Iterator[dict]:
    """The rows of each problem, S2O's with each of its parameters first; peers at some lengths, or at all."""
    machine = describe()
    for problem, wanted in problems:
        rows = problem.rows()
        exact = exact_rows(problem, rows)
        found = [s2o_row(problem, params, exact, rows) for params in wanted]
        target = next((one["rel_error"] for one in found if "rel_error" in one), None)
        found += dense_rows(problem, [name for name in dense if not (problem.exact and name in NO_FP8)], exact, rows)
        if problem.exact is None and (peers_at is None or problem.num_tokens in peers_at):
            found += peer_rows(problem, peers, exact, rows, target)
        medians = {one["provider"]: one["times"][1] for one in found if one["provider"] in DENSE and "times" in one}
        for one in found:
            row = as_row(one, problem, medians, machine)
            yield row
            print(*(f"{name} {row[name]}" for name in SHOWN if row.get(name, "") != ""), flush=True)
        del problem


def read(path: Path) -> list[dict]:
    """The rows of a table that was written before.

    Raises:
        ValueError: the file is no such table.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if reader.fieldnames != list(COLUMNS):
        raise ValueError(f"{path} is no table of this program's: its columns are {reader.fieldnames}.")
    return rows


def write(table: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def parse_at(entries: list[str]) -> dict[int, list[float]]:
    """`131072:0.1` -> {131072: [0.1]}, several densities of one length together."""
    at: dict[int, list[float]] = {}
    for entry in entries:
        tokens, _, density = entry.partition(":")
        if not tokens.isdigit() or int(tokens) % LLAMA_8B.page or not 0 < float(density or 0) <= 1:
            raise argparse.ArgumentTypeError(
                f"'{entry}' is not TOKENS:DENSITY, with a multiple of {LLAMA_8B.page} tokens and a density up to 1"
            )
        at.setdefault(int(tokens), []).append(float(density))
    return at


def parse_peer(entry: str) -> tuple[str, Path]:
    """`pbs=PATH` -> ("pbs", PATH)"""
    name, _, path = entry.partition("=")
    if name not in PEERS or not path:
        raise argparse.ArgumentTypeError(f"'{entry}' is not NAME=PATH with a name among {', '.join(PEERS)}")
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"'{path}' is no folder: the path of {name} is a checkout of its repository")
    return name, Path(path).resolve()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the results file")
    parser.add_argument(
        "--at", nargs="*", default=list(AT), metavar="TOKENS:DENSITY", help="made inputs; nothing after it: none"
    )
    parser.add_argument(
        "--fp8", action="store_true", help="also made inputs in fp8, as queries and caches are with vLLM's fp8 caches"
    )
    parser.add_argument(
        "--kv-head", action="store_true",
        help="also S2O with a ranking for each KV head, on made inputs, at the same densities",
    )  # fmt: skip
    parser.add_argument("--dense", nargs="*", choices=DENSE, default=list(DENSE), help="kernels beside S2O")
    parser.add_argument(
        "--peer", type=parse_peer, action="append", default=[], metavar="NAME=PATH",
        help=f"another project's kernel, from its checkout; repeatable; names: {', '.join(PEERS)}",
    )  # fmt: skip
    parser.add_argument(
        "--peer-at", type=int, nargs="+", metavar="TOKENS",
        help="lengths at which peers run, for each chooses its tiles anew there, which takes minutes (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--add", action="store_true",
        help="keep the file's rows: the column `run` tells which come from one process, and ratios are within one",
    )  # fmt: skip
    model = parser.add_argument_group("inputs from a model")
    model.add_argument("--model", help="directory or name of a model, whose attention is captured")
    model.add_argument("--captured-at", type=int, nargs="+", metavar="TOKENS", help="default: 8192 32768")
    model.add_argument("--layers", type=int, nargs="+", help="default: the first, middle and last sparse one")
    model.add_argument("--text", help=f"{', '.join(SOURCES)}, or a UTF-8 file (default code)")
    options = parser.parse_args()
    if options.model is None and (options.captured_at or options.layers or options.text):
        parser.error("--captured-at, --layers and --text are of no use without --model")
    if not options.at and options.model is None:
        parser.error("there is nothing to measure: give --at points, or a --model")
    lengths = options.captured_at or CAPTURED_AT
    if min(lengths) < LLAMA_8B.page:
        parser.error(f"argument --captured-at: {min(lengths)} tokens do not fill a page of {LLAMA_8B.page}")
    peers = dict(options.peer)
    if options.peer_at and not peers:
        parser.error("--peer-at is of no use without --peer")
    if len(peers) < len(options.peer):
        parser.error("argument --peer: each name can be given once")
    if not torch.cuda.is_available():
        parser.exit(1, "attention.py needs a CUDA device.\n")
    try:
        at = parse_at(options.at)
        kept = read(options.out) if options.add else []
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    device = torch.device("cuda")
    captures = []
    try:
        # Before minutes are spent on measuring: a model can be wrong in many ways.
        if options.model is not None:
            for tokens in lengths:
                captures.append(capture(options.model, tokens, options.layers, options.text or "code", device))
    except CaptureError as error:
        parser.exit(1, f"attention.py: {error}\n")
    bases = [DEFAULTS, *([S2OParams(ranking="kv_head")] if options.kv_head else [])]
    problems = itertools.chain(made_problems(at, device, options.fp8, bases), problems_of(captures, device))
    table = list(kept)
    run = 1 + max((int(row["run"]) for row in kept), default=0)
    for row in measure(problems, options.dense, peers, options.peer_at):
        table.append({"run": run, **row})
        # After every row: a fault in a peer's kernel can end the process's use of the GPU, a time limit the process.
        write(table, options.out)


if __name__ == "__main__":
    main()
