"""The log's lines about steps, which `stats` writes, and about prompts, which `metrics.figures` does: whoever has a
server's log reads them here.

Without PyTorch, which takes two seconds to import: the command line reads logs too.
"""

import os
import re
from dataclasses import dataclass
from typing import NamedTuple

LOG_INTERVAL = 1.0
"""Seconds between two lines about steps, at least; what happens in between is in the totals."""


def density(visited: int, causal: int) -> float:
    """Share of the pairs, for three digits: 1 says that every one was visited, not that nearly all were."""
    if visited < causal:
        return min(visited / causal, 0.999)
    return visited / causal if causal else 1.0


@dataclass
class Totals:
    steps: int = 0
    tokens: int = 0
    visited: int = 0
    causal: int = 0

    @property
    def density(self) -> float:
        return density(self.visited, self.causal)


def _numbers(values: list[int]) -> str:
    return ",".join(map(str, values[:8])) + (",..." if len(values) > 8 else "")


def step_line(
    query_lens: list[int], seq_lens: list[int], visited: int, causal: int, sparse: int, layers: int, totals: Totals
) -> str:
    """One step with long prefills: lengths of their rows, pairs of all of them, how many of its layers were sparse."""
    return (
        f"s2o: prefill query={_numbers(query_lens)} seq={_numbers(seq_lens)} density={density(visited, causal):.3f} "
        f"sparse_layers={sparse}/{layers} | total steps={totals.steps} tokens={totals.tokens} "
        f"density={totals.density:.3f} pairs={totals.visited}/{totals.causal} process={os.getpid()}"
    )


class Prefill(NamedTuple):
    """What a line of the log says about one step."""

    query_lens: tuple[int, ...]
    """Of the first rows, where a step has many."""
    seq_lens: tuple[int, ...]
    density: float
    sparse_layers: int
    num_layers: int
    visited: int
    causal: int
    """Pairs of all steps of its process so far, those that were not logged too."""
    process: int
    """Of several engines, or stages of one, each has its own totals."""


_LINE = re.compile(
    r"s2o: prefill query=(\S+) seq=(\S+) density=([0-9.]+) sparse_layers=(\d+)/(\d+) \|.* pairs=(\d+)/(\d+)"
    r" process=(\d+)"
)


def prefills(log: str) -> list[Prefill]:
    """The steps that a server's log tells of."""
    found = []
    for query, seq, density, *numbers in _LINE.findall(log):
        query_lens, seq_lens = (tuple(int(n) for n in re.findall(r"\d+", text)) for text in (query, seq))
        found.append(Prefill(query_lens, seq_lens, float(density), *map(int, numbers)))
    return found


def pairs(log: str, since: int = 0) -> tuple[int, int]:
    """Visited and causal pairs of all steps that a server's log tells of after its first `since` characters.

    By the running totals: of steps that follow each other closely only the last one has a line. Both are 0 where no
    step is told of.
    """
    now, before = ({step.process: step for step in prefills(text)} for text in (log, log[:since]))
    visited, causal = (
        sum(getattr(step, kind) for step in now.values()) - sum(getattr(step, kind) for step in before.values())
        for kind in ("visited", "causal")
    )
    return visited, causal


class Told(NamedTuple):
    """What a line of the log says about one long prompt."""

    prompt: int
    """Tokens."""
    cached: int
    density: float
    """Of what was computed, dense chunks included."""


_PROMPT = re.compile(r"s2o: request .* prompt=(\d+) cached=(\d+) sparse=\d+ dense=\d+ density=([0-9.]+)")


def prompts(log: str) -> list[Told]:
    """The long prompts that a server's log tells of."""
    return [Told(int(length), int(cached), float(density)) for length, cached, density in _PROMPT.findall(log)]
