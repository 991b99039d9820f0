"""Which requests a step computes: what the scheduler says of them, put beside what their attention took.

    begin (before a step)      new requests, with the decision that they carry; what each has to compute
    note (metadata builder)    the path of each row, or of the step; how many heads its pairs count for
    told (any thread)          figures of a step, once they are on the host
    end (after a step)         tokens by path; pairs of each prompt; prompts whose prefill is complete

Decisions are those that requests carry: nothing is decided here.
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm_s2o import compat, stats
from vllm_s2o.compat import requests
from vllm_s2o.metrics import switch
from vllm_s2o.metrics.figures import DENSE, SPARSE, Prompt, Recorder
from vllm_s2o.plan import causal_pairs

UNKNOWN = "unknown"
"""The reason of tokens whose path nobody noted."""


@dataclass
class _Step:
    """One step of the engine."""

    scheduled: dict[str, int]
    """New tokens of every request, decode among them."""
    runner: Any
    prefill: list[tuple[Prompt, int]]
    """Prompts of the step, and how many of their tokens it computes."""
    paths: dict[str, str | None] = field(default_factory=dict)
    """By request: None where it is sparse, else why not."""
    reason: str | None = None
    """Why all of the step is dense."""
    unnamed: int = 0
    """Sparse tokens of rows whose requests are not known."""
    heads: dict[Any, int] = field(default_factory=dict)
    """By group of layers: heads of those that may be sparse."""


class Prompts:
    """The requests of this process's engine."""

    def __init__(self, recorder: Recorder, logger: logging.Logger):
        self.recorder = recorder
        self._logger = logger
        self._all: dict[str, Prompt] = {}
        self._computing: dict[str, Prompt] = {}
        """Those with prompt tokens to compute: most steps have none, and cost nothing here."""
        self._step: _Step | None = None
        self._lock = threading.Lock()
        """Of what `told` shares with the thread that runs the steps."""

    # -- the engine's thread ------------------------------------------------------------------------------------------

    def begin(self, scheduler_output: Any, runner: Any) -> None:
        for request_id in scheduler_output.finished_req_ids:
            self._all.pop(request_id, None)
            self._computing.pop(request_id, None)
        for new_request in scheduler_output.scheduled_new_reqs:
            name, computed = new_request.req_id, new_request.num_computed_tokens
            kept_dense = switch.REASONS.get(requests.mark_of(new_request) or "")
            prompt = Prompt(name, requests.prompt_length(new_request), computed, kept_dense, computed)
            old = self._all.get(name)
            if old is not None and old.length == prompt.length:
                # Model runner V2 hears of a request that was preempted as of a new one. A session that goes on has a
                # longer prompt.
                prompt.again = old.again or old.complete
            self._all[name] = self._computing[name] = prompt
        cached = scheduler_output.scheduled_cached_reqs
        prefill = []
        if self._computing or cached.resumed_req_ids:
            computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
            for request_id in cached.resumed_req_ids:  # after a preemption all is computed anew
                if request_id in self._all:
                    old, cached_tokens = self._all[request_id], computed[request_id]
                    prompt = Prompt(request_id, old.length, cached_tokens, old.kept_dense, cached_tokens)
                    prompt.again = old.again or old.complete
                    self._all[request_id] = self._computing[request_id] = prompt
            for request_id, prompt in list(self._computing.items()):
                tokens = scheduler_output.num_scheduled_tokens.get(request_id, 0)
                if tokens:
                    prompt.computed = computed.get(request_id, prompt.computed)
                    if prompt.computed < prompt.length:
                        # What follows the prompt in a chunk is an answer that is computed anew.
                        prefill.append((prompt, min(tokens, prompt.length - prompt.computed)))
                    else:
                        del self._computing[request_id]
        self._step = _Step(scheduler_output.num_scheduled_tokens, runner, prefill)

    def rows(self, common: Any, query_lens: Sequence[int]) -> list[Prompt | None]:
        """The prompt of each row; None where a row's request is not known."""
        step = self._step
        ids = requests.row_requests(step.runner, common, query_lens, step.scheduled) if step else None
        return [None] * len(query_lens) if ids is None else list(map(self._all.get, ids))

    def kept_dense(self) -> str | None:
        """Why some request of the step is dense by decision: for those whose rows are not known."""
        scheduled = self._step.scheduled if self._step else ()
        found = (self._all[request_id].kept_dense for request_id in scheduled if request_id in self._all)
        return next((reason for reason in found if reason), None)

    def note_sparse(self, prompts: Iterable[Prompt | None], query_lens: Iterable[int]) -> None:
        if self._step is None:
            return
        unnamed = 0
        for prompt, tokens in zip(prompts, query_lens, strict=True):
            if prompt is None:
                unnamed += tokens
            else:
                self._step.paths[prompt.request_id] = None
        self._step.unnamed = max(self._step.unnamed, unnamed)  # each group of layers that plans tells of the same rows

    def note_dense(self, prompt: Prompt | None, reason: str) -> None:
        """Of a row. Where several groups of layers tell of it, one that makes it sparse counts."""
        if self._step is not None and prompt is not None:
            self._step.paths.setdefault(prompt.request_id, reason)
            prompt.long = prompt.long or reason == prompt.kept_dense

    def note_step(self, reason: str, sparse_layers: bool = True) -> None:
        """Of all rows that nobody notes. Layers that are never sparse do not answer for those that may be."""
        if self._step is not None and (sparse_layers or self._step.reason is None):
            self._step.reason = reason

    def weigh(self, group: Any, heads: int) -> None:
        """Of a group of layers that the step runs: the heads of those that may be sparse. Pairs of a prompt count once
        for each, whether its chunk is sparse or dense: else the ones would outweigh the others."""
        if self._step is not None:
            self._step.heads[group] = heads

    def expect(self, prompts: Iterable[Prompt | None]) -> list[Prompt | None]:
        """Figures of these will be `told`. Returned are those that they count for: a prompt that is complete has its
        figures, and what follows after a preemption is its answer, computed anew."""
        counted = [self._computing.get(prompt.request_id) if prompt else None for prompt in prompts]
        with self._lock:
            for prompt in counted:
                if prompt is not None:
                    prompt.pending += 1
                    prompt.long = True
        return counted

    def end(self) -> None:
        step, self._step = self._step, None
        if step is None:
            return
        records = compat.counts_tokens()
        unnamed, heads = step.unnamed, sum(step.heads.values())
        counts: dict[tuple[str, str], int] = {}
        for prompt, tokens in step.prefill:
            if unnamed and prompt.request_id not in step.paths:  # which of them, nobody knows
                sparse = min(unnamed, tokens)
                unnamed -= sparse
                parts = [(None, sparse), (step.reason or UNKNOWN, tokens - sparse)]
            else:
                parts = [(step.paths.get(prompt.request_id, step.reason or UNKNOWN), tokens)]
            for reason, count in parts:
                path = SPARSE if reason is None else DENSE
                prompt.tokens[path] += count
                counts[path, reason or ""] = counts.get((path, reason or ""), 0) + count
            if not step.unnamed or prompt.request_id in step.paths:  # else nobody knows what of it was skipped
                with self._lock:
                    prompt.causal += heads * causal_pairs(tokens, prompt.computed + tokens)
            prompt.computed += tokens
            if prompt.computed >= prompt.length:
                self._computing.pop(prompt.request_id, None)
                with self._lock:
                    prompt.complete = True
                    done = records and prompt.long and prompt.pending == 0
                if done:
                    self._finish(prompt)
        if records:
            for (path, reason), count in counts.items():
                if count:
                    self.recorder.tokens(count, path, reason)

    # -- any thread ---------------------------------------------------------------------------------------------------

    def told(self, done: stats.Step, visited: Sequence[int], causal: Sequence[int]) -> None:
        """The figures of a step's sparse rows."""
        self.recorder.pairs(sum(visited), sum(causal))
        if done.laps is not None:
            self.recorder.seconds(*done.laps.seconds())
        finished = []
        with self._lock:
            for prompt, seen, most in zip(done.prompts, visited, causal, strict=True):
                if prompt is not None:
                    prompt.skipped += most - seen
                    prompt.pending -= 1
                    if prompt.complete and prompt.pending == 0:
                        finished.append(prompt)
        if compat.counts_tokens():
            for prompt in finished:
                self._finish(prompt)

    def _finish(self, prompt: Prompt) -> None:
        if prompt.again:
            return
        self._logger.info("%s", prompt.line())
        self.recorder.prompt(prompt)
