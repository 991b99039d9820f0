"""What was sparse: counted on the device, read without waiting for it, told to the log."""

import contextlib
import queue
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .step_log import LOG_INTERVAL, Totals, step_line


class Laps:
    """When the stages of a layer began and ended, without waiting for them: events on a GPU, a clock on a CPU."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def lap(self) -> None:
        """Before a wave, after its ranking, and after its attention: three for each wave."""
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def seconds(self) -> tuple[float, float]:
        """(ranking, all of it), once everything has run."""
        ranking = total = 0.0
        for before, ranked, after in zip(*(self._marks[i::3] for i in range(3)), strict=True):
            ranking += self._between(before, ranked)
            total += self._between(before, after)
        return ranking, total

    def _between(self, first: Any, last: Any) -> float:
        return first.elapsed_time(last) / 1000 if self._cuda else last - first


@dataclass
class Step:
    """One step with a long prefill, as its layers run."""

    query_lens: list[int]
    """Of the rows that may be sparse."""
    seq_lens: list[int]
    causal_pairs: list[int]
    """Of each of these rows, for one head."""
    num_layers: int
    """Attention layers that will report."""
    rows: tuple[int, ...]
    """Which of the batch's they are."""
    prompts: list[Any] = field(default_factory=list)
    """Whose they are, for `Reporter`'s `record`."""
    timed: int | None = None
    """Which of the sparse layers is timed."""
    done: int = 0
    sparse: int = 0
    heads: int = 0
    visited: torch.Tensor | None = field(default=None, repr=False)
    """Pairs that the sparse layers visited, by row of the batch, summed over heads and layers: int64 on the device."""
    laps: Laps | None = None

    def again(self, num_layers: int) -> "Step":
        """The same rows, for other layers."""
        return replace(self, num_layers=num_layers, done=0, sparse=0, heads=0, visited=None, laps=None)

    def clock(self, device: torch.device) -> Laps | None:
        """For the sparse layer that is about to run, if its turn has come: one a step."""
        if self.sparse == self.timed:
            self.laps = Laps(device)
            return self.laps
        return None

    def dense_layer(self) -> bool:
        """Note a layer that ran dense. True with the last layer of the step."""
        self.done += 1
        return self.done == self.num_layers

    def sparse_layer(self, visited: torch.Tensor) -> bool:
        """Note a layer's visited pairs, [num_seqs, num_heads]. True with the last layer of the step."""
        total = visited.sum(1)
        self.visited = total if self.visited is None else self.visited + total
        self.sparse += 1
        self.heads += visited.shape[1]
        return self.dense_layer()


class Reporter:
    """Turns finished steps into log lines.

    The figures of a step are copied to the host behind its kernels; a thread waits for the copy, so
    that neither the forward pass nor the next step does.
    """

    def __init__(
        self,
        log: Callable[[str], None],
        interval: float = LOG_INTERVAL,
        record: Callable[[Step, list[int], list[int]], None] | None = None,
    ):
        """`record` gets each step that is done, with the visited and the causal pairs of its rows."""
        self._log = log
        self._record = record
        self._interval = interval
        self._last = -interval
        self._lock = threading.Lock()
        self._held: str | None = None
        self._timer: threading.Timer | None = None
        self.totals = Totals()
        self._pending: queue.SimpleQueue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._missed: set[tuple[type, str]] = set()

    def finish(self, step: Step) -> None:
        """Call after the last layer of a step."""
        if step.visited is None or not step.visited.is_cuda:
            self.tell(step, None if step.visited is None else step.visited.tolist())
            return
        host = torch.empty(step.visited.shape, dtype=torch.int64, pin_memory=True)
        host.copy_(step.visited, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)  # the thread sleeps, it does not spin
        copied.record()
        device, step.visited = step.visited.device, None
        self._pending.put((step, host, copied, device))
        if self._thread is None:
            self._thread = threading.Thread(target=self._drain, name="s2o-stats", daemon=True)
            self._thread.start()

    def _drain(self) -> None:
        while True:
            step, host, copied, device = self._pending.get()
            try:
                with torch.cuda.device(device):  # a thread starts on the first device
                    copied.synchronize()
                self.tell(step, host.tolist())
            except Exception as error:  # without this thread, steps and their pinned memory would pile up
                self._miss(error)

    def _miss(self, error: Exception) -> None:
        """Say that a step's figures are lost: once for each kind of error, for the next steps may all have the same."""
        *_, (frame, line) = traceback.walk_tb(error.__traceback__)
        place = f"{frame.f_code.co_filename}:{line}"
        if (type(error), place) not in self._missed:
            self._missed.add((type(error), place))
            with contextlib.suppress(Exception):  # it may be the log that fails
                self._log(f"s2o: figures of a step are lost ({error!r}, {place}).")

    def tell(self, step: Step, by_row: list[int] | None) -> None:
        """Add a step to the totals, and log it: at once, or, of several within a moment, the last one after it.

        Args:
            by_row: visited pairs of each row of the batch; None where all layers were dense.
        """
        seen = [by_row[row] if by_row else 0 for row in step.rows]
        most = [pairs * step.heads for pairs in step.causal_pairs]
        if self._record is not None:
            self._record(step, seen, most)
        visited, causal = sum(seen), sum(most)
        totals = self.totals
        totals.steps += 1
        totals.tokens += sum(step.query_lens)
        totals.visited += visited
        totals.causal += causal
        line = step_line(step.query_lens, step.seq_lens, visited, causal, step.sparse, step.num_layers, totals)
        with self._lock:
            self._held = line
            wait = self._last + self._interval - time.monotonic()
            if wait > 0 and self._timer is None:
                self._timer = threading.Timer(wait, self._flush)
                self._timer.daemon = True
                self._timer.start()
        if wait <= 0:
            self._flush()

    def _flush(self) -> None:
        """Log the line that is held, if it has not been logged yet."""
        with self._lock:
            line, self._held, self._timer = self._held, None, None
            if line is not None:
                self._last = time.monotonic()
        if line is not None:
            self._log(line)
