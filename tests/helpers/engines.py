"""vLLM's engine in this process, on checkpoints with random weights: what a model computes can be seen from within.

Weights are large enough that attention prefers some keys. Prompts are token numbers, and what is compared are
log-probabilities in fp32: of each token of a prompt, or of what was generated.
"""

import contextlib
import functools
import gc
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import causal_lm
import torch

from vllm_s2o import attention, prefill_attention

CONTEXT = 4096
VOCABULARY = 256
CONFIG = {"min_seq_len": 256, "min_query_len": 32, "segment_len": 64, "tile_size": 32, "key_block": 16}
"""Small enough for prompts of hundreds of tokens."""
EXACT = {**CONFIG, "threshold": 0.0}
TOLERANCE = 2e-3
"""Of log-probabilities in fp32, between two ways to compute the same."""

# One process, whose threads vLLM would otherwise bind to cores for good; caches of one GiB.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "s2o",
}  # fmt: skip


def checkpoint(directory: Path, kind: str = "llama", **fields) -> Path:
    """A model of `causal_lm` with a context of 4,096 tokens."""
    return causal_lm.save(directory, kind, max_position_embeddings=CONTEXT, **fields)


def options(model: Path, s2o: dict | None, **more) -> dict:
    """Of vLLM's LLM; `s2o` is None for the platform's own attention."""
    flag = {} if s2o is None else {"attention_backend": "CUSTOM", "additional_config": {"s2o": s2o}}
    return {
        "model": str(model), "dtype": "float32", "enforce_eager": True, "gpu_memory_utilization": 0.5, "seed": 0,
        "max_model_len": CONTEXT, "max_num_batched_tokens": CONTEXT, "max_num_seqs": 8,
        "enable_prefix_caching": False, "distributed_executor_backend": "uni", **flag, **more,
    }  # fmt: skip


_register = functools.cache(lambda platform: platform.register_triton_kernel_overrides())


def _overridden_once():
    """On a CPU vLLM looks through all modules for kernels that it replaces, once for each engine, and stumbles over
    Numba's, which it imports itself where drafts are looked up in prompts. Once for all engines does."""
    from vllm.platforms import current_platform

    name = "register_triton_kernel_overrides"
    if not hasattr(current_platform, name):
        return contextlib.nullcontext()
    _register(current_platform)
    return patch.object(type(current_platform), name, lambda *args: None)


@contextlib.contextmanager
def engine(model: Path, s2o: dict | None, **more):
    """An LLM; nothing of it stays in this process."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    patches = contextlib.ExitStack()
    patches.enter_context(patch.dict(os.environ, _ENVIRONMENT))
    # On a CPU vLLM puts a function of its own in PyTorch's place.
    patches.enter_context(patch.object(torch, "set_num_threads", torch.set_num_threads))
    patches.enter_context(_overridden_once())
    with patches:
        llm = LLM(**options(model, s2o, **more))
        try:
            yield llm
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()
            cleanup_dist_env_and_memory()


def tokens(count: int, seed: int = 0) -> list[int]:
    """A prompt."""
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def ask(llm, prompts: list[list[int]], generated: int = 4, prompt_logprobs: int | None = 1, lora=None, **more):
    """vLLM's outputs, in the order of the prompts, which may each have an adapter; `more` goes to SamplingParams."""
    from vllm import SamplingParams

    params = SamplingParams(
        temperature=0, max_tokens=generated, ignore_eos=True, logprobs=1, prompt_logprobs=prompt_logprobs,
        detokenize=False, **more,
    )  # fmt: skip
    asked = [{"prompt_token_ids": prompt} for prompt in prompts]
    return llm.generate(asked, params, use_tqdm=False, lora_request=lora)


def of_prompt(output) -> torch.Tensor:
    """Log-probability of each token of a prompt but the first."""
    given = output.prompt_token_ids
    return torch.tensor([of[token].logprob for token, of in zip(given[1:], output.prompt_logprobs[1:], strict=True)])


def of_answer(output) -> torch.Tensor:
    """Log-probability of each generated token."""
    (answer,) = output.outputs
    return torch.tensor([of[token].logprob for token, of in zip(answer.token_ids, answer.logprobs, strict=True)])


class Row(NamedTuple):
    """What S2O computed of one sequence, in one layer of one step."""

    query_len: int
    seq_len: int
    visited: int
    causal: int
    squared_error: float
    """Summed over the output's elements: from dense attention with the same keys and queries."""
    squared: float
    """The same of dense attention itself."""


class Batch(NamedTuple):
    """A step in which S2O has work."""

    query_lens: list[int]
    seq_lens: list[int]
    sparse: tuple[int, ...]
    """Places of the sequences that are sparse."""


class Witness:
    """Sees what the engine of this process hands to S2O, and holds each sequence against itself alone.

    Attributes:
        rows: of all steps and layers, in their order.
        batches: the steps.
    """

    def __init__(self, monkeypatch):
        self.rows: list[Row] = []
        self.batches: list[Batch] = []
        # Not in the module itself, which uses them too.
        watched = {**vars(attention), "run": self._run, "plan_step": self._plan_step}
        monkeypatch.setattr("vllm_s2o.backend.attention", SimpleNamespace(**watched))

    def _plan_step(self, query_lens, seq_lens, *args):
        plan = attention.plan_step(query_lens, seq_lens, *args)
        self.batches.append(Batch(query_lens, seq_lens, plan.seqs))
        return plan

    def _run(self, query, key_cache, value_cache, block_table, plan, params, scale, out, **more):
        visited = attention.run(query, key_cache, value_cache, block_table, plan, params, scale, out, **more)
        query_lens, seq_lens, seqs = self.batches[-1]
        starts = torch.tensor([0, *query_lens]).cumsum(0).tolist()
        for row in seqs:
            mine = slice(starts[row], starts[row + 1])
            arguments = {
                "query": query[mine], "key_cache": key_cache, "value_cache": value_cache, "scale": scale,
                "block_table": block_table[row : row + 1],
                "query_start_loc": torch.tensor([0, query_lens[row]], dtype=torch.int32),
                "seq_lens": torch.tensor([seq_lens[row]], dtype=torch.int32),
            }  # fmt: skip
            alone, stats = prefill_attention(**arguments, params=params, return_stats=True)
            assert out[mine].equal(alone), f"sequence {row} of {query_lens} depends on its neighbours"
            assert visited[row].equal(stats.visited_pairs[0])
            exact = prefill_attention(**arguments, params=params.model_copy(update=DENSE))
            self.rows.append(
                Row(
                    query_lens[row], seq_lens[row], int(visited[row].sum()), int(stats.causal_pairs.sum()),
                    float((alone - exact).square().sum()), float(exact.square().sum()),
                )
            )  # fmt: skip
        return visited

    def take(self) -> "Seen":
        """What was seen since the last time."""
        rows, self.rows = self.rows, []
        batches, self.batches = self.batches, []
        return Seen(rows, batches)


DENSE = {"threshold": 0.0, "budget": None}


class Seen(NamedTuple):
    rows: list[Row]
    batches: list[Batch]

    @property
    def density(self) -> float:
        return sum(row.visited for row in self.rows) / sum(row.causal for row in self.rows)

    @property
    def rel_error(self) -> float:
        """Squared, of all that S2O computed, against dense attention of the same layers' inputs."""
        return sum(row.squared_error for row in self.rows) / sum(row.squared for row in self.rows)
