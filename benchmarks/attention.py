#!/usr/bin/env python3
"""One layer's attention on a GPU, S2O beside dense kernels: a row per provider, shape, length and density.

    python benchmarks/attention.py --out benchmarks/results/attention.csv [--at 32768:0.15 131072:0.1]

All providers run in one process on the same problem. S2O's threshold is searched so that the stop rule itself lands on
the density. Before a provider is timed, its result is checked: dense kernels against exact attention on sampled rows,
S2O against the Triton kernels that every GPU runs, against itself (same bits), and for waits on the device. What fails
is told and not reported.
"""

import argparse
import csv
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from inputs import LLAMA_8B, Problem, exact_rows, make_problem
from providers import DENSE, S2O, find_threshold

from vllm_s2o.cli.environment import describe

AT = ("32768:0.15", "65536:0.12", "131072:0.1", "131072:0.06", "262144:0.05")
COLUMNS = (
    "gpu", "torch", "triton", "vllm", "date", "commit", "provider", "shape", "seq_len", "density", "threshold",
    "ms_p20", "ms_p50", "ms_p80", "visited_tflops", "ranking_share", "rel_error", "extra_mib", "vs_fa3_paged", "vs_fa2",
)  # fmt: skip
DENSE_ERROR = 1e-4
"""What a dense kernel in bfloat16 may err, relative to the mean square of the output."""
MOVED = 1e-4
"""Pairs that may differ between two S2O kernels: sums of another order decide a tile whose gain is the threshold to six
digits. One test of one tile is 1e-6 of the pairs or less."""


def quantiles(run: Callable) -> tuple[float, float, float]:
    """Milliseconds: 20th, 50th and 80th percentile."""
    return triton.testing.do_bench(run, warmup=100, rep=600, quantiles=[0.2, 0.5, 0.8])


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
    plain = S2O(mine.problem, mine.params, "triton")
    moved = (plain.run() - pairs).abs().sum().item() / pairs.sum().item()
    if moved:
        print(f"{mine.problem.num_tokens} tokens: {moved:.1e} of the pairs are not the Triton kernels'", flush=True)
    if moved > MOVED:
        return f"it stops elsewhere than the Triton kernels: {moved:.1e} of the pairs"
    apart = (plain.out.float() - first.float()).square().mean() / first.float().square().mean()
    return None if apart < DENSE_ERROR else f"it differs from the Triton kernels by {apart.item():.1e}"


def s2o_rows(problem: Problem, densities: list[float], exact: torch.Tensor, rows: torch.Tensor) -> list[dict]:
    found = []
    for density in densities:
        params = find_threshold(problem, density)
        mine = S2O(problem, params)
        wrong = check_s2o(mine)
        if wrong is not None:
            print(f"s2o at {problem.num_tokens} tokens, density {density}: not reported, {wrong}", file=sys.stderr)
            continue
        pairs = mine.run().sum().item()
        times = quantiles(mine.run)
        ranking = quantiles(mine.rank)[1]
        workspace = sum(buffer.nbytes for buffer in mine.workspace) / 2**20
        found.append(
            dict(
                provider="s2o",
                density=round(pairs / mine.causal, 4),
                threshold=f"{params.threshold:.5f}",
                times=times,
                visited_tflops=4 * problem.shape.head_size * pairs / (times[1] - ranking) / 1e9,
                ranking_share=ranking / times[1],
                rel_error=relative_error(mine.out, exact, rows),
                extra_mib=workspace + extra_mib(mine.run),
            )
        )
        del mine
    return found


def dense_rows(problem: Problem, names: list[str], exact: torch.Tensor, rows: torch.Tensor) -> list[dict]:
    found = []
    work = 4 * problem.shape.head_size * problem.shape.num_heads * problem.num_tokens * (problem.num_tokens + 1) / 2
    for name in names:
        try:
            run = DENSE[name](problem)
            error = relative_error(run(), exact, rows)
        except (ImportError, RuntimeError) as reason:
            print(f"{name}: cannot run here: {reason}", file=sys.stderr)
            continue
        if not error < DENSE_ERROR:
            print(f"{name} at {problem.num_tokens} tokens: not reported, its error is {error:.1e}", file=sys.stderr)
            continue
        times = quantiles(run)
        found.append(
            dict(
                provider=name, density=1.0, threshold="", times=times, visited_tflops=work / times[1] / 1e9,
                ranking_share=0.0, rel_error=error, extra_mib=extra_mib(run),
            )
        )  # fmt: skip
    return found


def as_row(found: dict, problem: Problem, medians: dict[str, float], machine: dict) -> dict:
    p20, p50, p80 = found.pop("times")
    row = {
        "gpu": machine["machine"], "torch": machine["torch"], "triton": machine["triton"],
        "vllm": machine.get("vllm", ""), "date": machine["date"], "commit": machine.get("commit") or "",
        "shape": problem.shape.name, "seq_len": problem.num_tokens, **found,
        "ms_p20": f"{p20:.3f}", "ms_p50": f"{p50:.3f}", "ms_p80": f"{p80:.3f}",
    }  # fmt: skip
    for column, name in (("vs_fa3_paged", "fa3_paged"), ("vs_fa2", "fa2")):
        row[column] = f"{medians[name] / p50:.2f}" if name in medians else ""
    row["visited_tflops"] = f"{row['visited_tflops']:.0f}"
    row["ranking_share"] = f"{row['ranking_share']:.3f}"
    row["rel_error"] = f"{row['rel_error']:.2e}"
    row["extra_mib"] = f"{row['extra_mib']:.0f}"
    return row


def measure(at: dict[int, list[float]], dense: list[str], device: torch.device) -> list[dict]:
    machine, table = describe(), []
    for tokens, densities in at.items():
        problem = make_problem(LLAMA_8B, tokens, device)
        rows = problem.rows()
        exact = exact_rows(problem, rows)
        found = s2o_rows(problem, densities, exact, rows) + dense_rows(problem, dense, exact, rows)
        medians = {f["provider"]: f["times"][1] for f in found}
        for one in found:
            row = as_row(one, problem, medians, machine)
            table.append(row)
            shown = ("provider", "seq_len", "density", "ms_p50", "visited_tflops", "ranking_share", "rel_error")
            print(*(f"{name} {row[name]}" for name in (*shown, "extra_mib", "vs_fa3_paged", "vs_fa2")), flush=True)
        del problem
    return table


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the results file")
    parser.add_argument("--at", nargs="+", default=list(AT), metavar="TOKENS:DENSITY")
    parser.add_argument("--dense", nargs="*", choices=DENSE, default=list(DENSE), help="kernels beside S2O")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(1, "attention.py needs a CUDA device.\n")
    try:
        at = parse_at(options.at)
    except (argparse.ArgumentTypeError, ValueError) as error:
        parser.error(str(error))
    write(measure(at, options.dense, torch.device("cuda")), options.out)


if __name__ == "__main__":
    main()
