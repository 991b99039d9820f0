"""Which figures there are, how a process of the engine records them, and how a program reads them."""

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from vllm_s2o.metrics import place
from vllm_s2o.metrics.channel import Series, Writer, read, write_alone
from vllm_s2o.step_log import density

TOKENS = Series(
    "counter", "vllm_s2o_prefill_tokens",
    "Prompt tokens computed, by the path of their attention and, where that was dense, the reason.",
    ("path", "reason"),
)  # fmt: skip
VISITED = Series(
    "counter", "vllm_s2o_visited_pairs",
    "(query, key) pairs that sparse layers computed, on the first rank of those that share the heads.",
)  # fmt: skip
CAUSAL = Series(
    "counter", "vllm_s2o_causal_pairs",
    "(query, key) pairs that dense causal attention would have computed in their place.",
)  # fmt: skip
DENSITY = Series(
    "histogram", "vllm_s2o_prompt_density",
    "Visited pairs over causal pairs, of each long prompt whose prefill is complete, its dense chunks included.",
    buckets=(0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.999, 1.0),
)  # fmt: skip
RANKING = Series(
    "counter", "vllm_s2o_ranking_seconds", "Time in ranking keys, of the layers that are timed: one a step, in turn."
)
ATTENTION = Series(
    "counter", "vllm_s2o_attention_seconds", "Time in sparse attention, ranking included, of the layers that are timed."
)
CONFIG = Series(
    "gauge", "vllm_s2o_config_info", "The config that prompts run with: always 1.", ("config_hash", "source")
)
ENABLED = Series("gauge", "vllm_s2o_enabled", "Whether new prompts may be sparse: the switch.")
PROMPT = Series(
    "gauge", "vllm_s2o_recent_prompt_density", "Density of the last long prompts, their dense chunks included.",
    ("request_id", "tokens", "reason"),
)  # fmt: skip

ALL = (TOKENS, VISITED, CAUSAL, DENSITY, RANKING, ATTENTION, CONFIG, ENABLED, PROMPT)

RECENT = 16
"""Prompts whose figures are shown one by one, of each process. Every one is a time series to Prometheus."""

LONGEST_ID = 128
"""Characters of a request's id that are told. Clients choose its beginning; vLLM makes its end, which no other has."""

SPARSE, DENSE = "sparse", "dense"


@dataclass(eq=False)
class Prompt:
    """A request whose prompt is being computed, and what that took."""

    request_id: str
    length: int
    computed: int
    """Tokens whose keys and values are there."""
    kept_dense: str | None = None
    """Why it is dense from its first token to its last, whatever its length: decided when the request came."""
    cached: int = 0
    """Of `computed`, those that nothing was computed for."""
    tokens: dict[str, int] = field(default_factory=lambda: {SPARSE: 0, DENSE: 0})
    causal: int = 0
    """Pairs of all that was computed of it, by sparse attention and by dense, in the layers that may be sparse."""
    skipped: int = 0
    """Of `causal`, those that sparse attention left out."""
    long: bool = False
    """Whether a part of it was sparse, or would have been."""
    pending: int = 0
    """Steps whose figures are not on the host yet."""
    complete: bool = False
    again: bool = False
    """Whether it was complete before a preemption, and has its figures: now it is computed for the answer's sake."""

    @property
    def visited(self) -> int:
        return self.causal - self.skipped

    @property
    def density(self) -> float:
        """Of the whole prompt: what skipping saved in some chunks is little where others were dense."""
        return density(self.visited, self.causal)

    @property
    def name(self) -> str:
        """The request's id as it is told: in one line, whatever a client has put into it, and not too long."""
        told = self.request_id
        if len(told) > LONGEST_ID:  # before anything is done with it: it may be very long
            told = f"{told[: LONGEST_ID - 35]}...{told[-32:]}"
        return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in told)

    def line(self) -> str:
        """For the log."""
        reason = f" ({self.kept_dense})" if self.kept_dense else ""
        return (
            f"s2o: request {self.name} prompt={self.length} cached={self.cached} "
            f"sparse={self.tokens[SPARSE]} dense={self.tokens[DENSE]} density={self.density:.3f}{reason}"
        )


class Recorder:
    """Of one process. Where its figures cannot be kept, it says so once, and forgets them: serving goes on."""

    def __init__(self, logger: logging.Logger):
        self._logger = logger
        self._lock = threading.Lock()
        self._opened = False
        self._writer: Writer | None = None
        self._recent: deque[tuple[dict[str, str], float]] = deque(maxlen=RECENT)
        self._showing = threading.Lock()
        """Held while the last prompts are written: a thread that is late must not put back what they were before."""

    def _to(self) -> Writer | None:
        with self._lock:
            if not self._opened:
                self._opened = True
                directory = place.figures_directory()
                if directory is None:
                    self._logger.warning("s2o: no figures are kept: there is no directory for them.")
                else:
                    self._writer = Writer(directory, place.writer(str(os.getpid())))
            return self._writer

    @contextlib.contextmanager
    def _kept(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            with self._lock:
                first, self._writer = self._writer is not None, None
            if first:  # of the threads that came upon it
                self._logger.warning("s2o: no more figures are kept (%s).", error)

    def start(self, config_hash: str, source: str) -> None:
        """Show every series, for those who look before the first prompt."""
        writer = self._to()
        if writer is None:
            return
        with self._kept():
            writer.set(CONFIG, 1.0, config_hash=config_hash, source=source)
            writer.add(TOKENS, 0.0, path=SPARSE, reason="")
            for series in (VISITED, CAUSAL, RANKING, ATTENTION):
                writer.add(series, 0.0)
            writer.observe(DENSITY, None)

    def tokens(self, count: int, path: str, reason: str = "") -> None:
        if writer := self._to():
            with self._kept():
                writer.add(TOKENS, count, path=path, reason=reason)

    def pairs(self, visited: int, causal: int) -> None:
        if writer := self._to():
            with self._kept():
                writer.add(VISITED, visited)
                writer.add(CAUSAL, causal)

    def seconds(self, ranking: float, attention: float) -> None:
        if writer := self._to():
            with self._kept():
                writer.add(RANKING, ranking)
                writer.add(ATTENTION, attention)

    def prompt(self, prompt: Prompt) -> None:
        """One whose prefill is complete. Called by the thread that runs the steps, and by the one of `stats`."""
        if writer := self._to():
            labels = {
                "request_id": prompt.name,
                "tokens": str(prompt.length),
                "reason": prompt.kept_dense or "",
            }
            with self._kept():
                writer.observe(DENSITY, prompt.density)
                with self._showing:
                    self._recent.append((labels, prompt.density))
                    write_alone(writer.directory, f"{writer.name}-prompts", PROMPT, list(self._recent))


@dataclass(frozen=True)
class Figures:
    """What a server, or the engines of this program, have done since they started."""

    tokens: dict[tuple[str, str], int]
    """Prompt tokens by path and reason; sparse ones have the reason ''."""
    visited: int
    causal: int
    ranking_seconds: float
    attention_seconds: float
    prompts: dict[str, float]
    """Density of the last long prompts, by request; of the whole prompt, dense chunks included."""
    configs: tuple[str, ...]
    """Hashes."""
    on: bool

    @property
    def density(self) -> float:
        return density(self.visited, self.causal)

    @property
    def ranking_share(self) -> float:
        return self.ranking_seconds / self.attention_seconds if self.attention_seconds else 0.0


def figures(directory: Path | None = None, logger: logging.Logger | None = None) -> Figures:
    """The figures of the server that this process belongs to, or of those that write to `directory`.

    With vLLM's LLM class: of the engines of this program. All are 0 where nothing was written.
    """
    server = place.writer("") if directory is None else ""
    directory = place.figures_directory() if directory is None else directory
    found = read(directory, logger or logging.getLogger(__name__), server) if directory is not None else []
    samples = [sample for metric in found for sample in metric.samples]

    def of(series: Series) -> list:
        return [sample for sample in samples if sample.name == series.shown[0]]

    def total(series: Series) -> float:
        return sum(sample.value for sample in of(series))

    return Figures(
        tokens={(s.labels["path"], s.labels["reason"]): int(s.value) for s in of(TOKENS)},
        visited=int(total(VISITED)),
        causal=int(total(CAUSAL)),
        ranking_seconds=total(RANKING),
        attention_seconds=total(ATTENTION),
        prompts={s.labels["request_id"]: s.value for s in of(PROMPT)},
        configs=tuple(s.labels["config_hash"] for s in of(CONFIG)),
        on=all(sample.value for sample in of(ENABLED)),
    )
