"""vLLM's engine in this process, on checkpoints with random weights: what a model computes can be seen from within.

Weights are large enough that attention prefers some keys. Prompts are token numbers, and what is compared are
log-probabilities: of each token of a prompt, or of what was generated. On a CPU all is in fp32. FLASH_ATTN does not
take that: on a GPU the same tests run in 16 bits, and `agree` allows for their rounding.
"""

import contextlib
import functools
import gc
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import patch

import causal_lm
import torch
from models import inspected_here
from vllm.platforms import current_platform

from vllm_s2o import attention

CONTEXT = 4096
VOCABULARY = 256
CPU = current_platform.is_cpu()
_TILES = {"tile_size": 32, "key_block": 16} if CPU else {"tile_size": 64, "key_block": 32}
CONFIG = {"min_seq_len": 256, "min_query_len": 32, "dense_tail": 0, "segment_len": 64, **_TILES}
"""Small enough for prompts of hundreds of tokens; on a GPU the smallest that the kernels in Gluon take."""
EXACT = {**CONFIG, "threshold": 0.0}
THRESHOLD = 0.15 if CPU else 0.3
"""Skips some tenths of the pairs of these models: larger tiles stop later."""
DTYPE = "float32" if CPU else "float16"
"""Of the models, but for `_WIDE`."""
_WIDE = ("gemma2", "gemma3_text")
"""Kinds that vLLM refuses in float16: they are in bfloat16."""
COMPILED = {"enforce_eager": False, **({"compilation_config": {"mode": 1, "backend": "eager"}} if CPU else {})}
"""vLLM's default modes; on a CPU, which has no graphs, a model is traced and not compiled, which would take minutes."""
TOLERANCES = {"float32": 2e-3, "float16": 0.1, "experts": 1.0, "bfloat16": 0.5, "fp8": 1.0}
"""Of log-probabilities, between two ways to compute the same; "experts" is float16 with a choice of experts.

Measured on a CPU, of the tokens of six prompts, S2O without skipping against dense attention: in float16 they differ by
0.018 at most (Llama, Qwen), in bfloat16 by 0.16 (Gemma). Two dense runs with other chunks do by 0.015 and 0.16, and
float16 and fp32 by 0.24. Where rounding decides for another expert, one token in hundreds differs by 0.3, and by 2.4 to
fp32. The root of the mean square is below all that, 0.004 in float16, 0.01 with experts, 0.03 in bfloat16: prompts are
held to a quarter of the tolerance by it, which a single wrong token breaks. In fp8, where the weights of attention are
rounded to it too: with Qwen 3, rounding those alone moves it by 0.07, and rounding queries, keys and values by 0.19.
"""
TOLERANCE = TOLERANCES[DTYPE]
REL_ERRORS = {"float32": 1e-10, "float16": 1e-6, "bfloat16": 1e-4, "fp8": 2e-3}
"""Of what S2O computes without skipping, squared, against fp32: several times what rounding the weights and the result
to each type makes, in fp8 3e-4."""

# One process, whose threads vLLM would otherwise bind to cores for good; caches of one GiB.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_PLUGINS": "s2o",
}  # fmt: skip


def checkpoint(directory: Path, kind: str = "llama", **fields) -> Path:
    """A model of `causal_lm` with a context of 4,096 tokens."""
    return causal_lm.save(directory, kind, max_position_embeddings=CONTEXT, **fields)


def dtype(kind: str) -> str:
    """What a model of this kind is run in."""
    return "bfloat16" if not CPU and kind in _WIDE else DTYPE


def _platform(model: Path) -> dict:
    kind = json.loads((model / "config.json").read_text())["model_type"]
    if CPU:
        return {"dtype": dtype(kind), "gpu_memory_utilization": 0.5}
    # Blocks as a CPU has them. Several processes of tests may share a GPU: each needs little, and measures nothing.
    return {
        "dtype": dtype(kind), "gpu_memory_utilization": 0.08, "kv_cache_memory_bytes": 2**29, "block_size": 128,
    }  # fmt: skip


def options(model: Path, s2o: dict | None, **more) -> dict:
    """Of vLLM's LLM; `s2o` is None for the platform's own attention."""
    flag = {} if s2o is None else {"attention_backend": "CUSTOM", "additional_config": {"s2o": s2o}}
    return {
        "model": str(model), "enforce_eager": True, "seed": 0, **_platform(model),
        "max_model_len": CONTEXT, "max_num_batched_tokens": CONTEXT, "max_num_seqs": 8,
        "enable_prefix_caching": False, "distributed_executor_backend": "uni", **flag, **more,
    }  # fmt: skip


_register = functools.cache(lambda platform: platform.register_triton_kernel_overrides())


def _overridden_once():
    """On a CPU vLLM looks through all modules for kernels that it replaces, once for each engine, and stumbles over
    Numba's, which it imports itself where drafts are looked up in prompts. Once for all engines does."""
    name = "register_triton_kernel_overrides"
    # vLLM 0.25.1 has none, and a platform says None to any name.
    if not callable(getattr(current_platform, name, None)):
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
    if CPU:
        patches.enter_context(inspected_here())
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


def sampling(generated: int = 4, prompt_logprobs: int | None = 1, **more):
    """Greedy. Of each place in the answer also what came next after the best: a near tie shows there."""
    from vllm import SamplingParams

    return SamplingParams(
        temperature=0, max_tokens=generated, ignore_eos=True, logprobs=3, prompt_logprobs=prompt_logprobs,
        detokenize=False, **more,
    )  # fmt: skip


def ask(llm, prompts: list[list[int]], generated: int = 4, prompt_logprobs: int | None = 1, lora=None, **more):
    """vLLM's outputs, in the order of the prompts, which may each have an adapter; `more` goes to SamplingParams."""
    params = sampling(generated, prompt_logprobs, **more)
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


class Said(NamedTuple):
    """What is compared of an output, as it can be written to a file."""

    prompt: list[float] | None
    """Log-probability of each token of the prompt but the first, where they were asked for."""
    tokens: list[int]
    candidates: list[list[tuple[int, float]]]
    """For each place of the answer the likeliest tokens, and how likely they were."""


def said(output) -> Said:
    (answer,) = output.outputs
    candidates = [[(token, one.logprob) for token, one in place.items()] for place in answer.logprobs]
    prompt = None if output.prompt_logprobs is None else of_prompt(output).tolist()
    return Said(prompt, list(answer.token_ids), candidates)


def agree(ours, theirs, dtype: str = DTYPE) -> None:
    """vLLM's outputs for the same prompts, or `Said` of them, are the same up to rounding.

    In fp32 the tokens are. In 16 bits two that are nearly as likely may change places: then each is nearly as likely
    for the one as for the other, and what follows has another past. The first place is always compared.
    """
    tolerance = TOLERANCES[dtype]
    for mine, other in zip(ours, theirs, strict=True):
        mine, other = (one if isinstance(one, Said) else said(one) for one in (mine, other))
        assert (mine.prompt is None) == (other.prompt is None)
        if mine.prompt is not None:
            prompts = torch.tensor(mine.prompt), torch.tensor(other.prompt)
            if dtype == "float32":
                torch.testing.assert_close(*prompts, atol=tolerance, rtol=0)
            else:
                assert distance(*prompts) <= tolerance / 4
        assert len(mine.tokens) == len(other.tokens) > 0
        for place, tokens in enumerate(zip(mine.tokens, other.tokens, strict=True)):
            likely = [dict(one.candidates[place]) for one in (mine, other)]
            for token in tokens:
                assert all(token in found for found in likely), f"place {place}: {token} in one of {likely} only"
                assert abs(likely[0][token] - likely[1][token]) <= tolerance, f"place {place}, token {token}: {likely}"
            if tokens[0] != tokens[1]:
                assert dtype != "float32", f"place {place}: {likely}"
                break


def distance(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Of log-probabilities: the root of the mean of the squares of their differences."""
    return float((ours - theirs).square().mean().sqrt())


class Row(NamedTuple):
    """What S2O computed of one sequence, in one layer of one step."""

    query_len: int
    seq_len: int
    visited: int
    causal: int
    squared_error: float
    """Summed over the output's elements: from dense attention with the same keys and queries, in fp32."""
    squared: float
    """The same of dense attention itself."""


class Batch(NamedTuple):
    """A step in which S2O has work."""

    query_lens: list[int]
    seq_lens: list[int]
    sparse: tuple[int, ...]
    """Places of the sequences that are sparse."""
    prompt_lens: list[int]


class Witness:
    """Sees what the engine of this process hands to S2O, and holds each sequence against itself alone.

    What vLLM warms up with is no step, and is passed on unseen. On a GPU looking waits for the device, which takes time
    only.

    Attributes:
        rows: of all steps and layers, in their order.
        batches: the steps.
    """

    def __init__(self, monkeypatch):
        from vllm_s2o import backend  # not in a program that only asks an engine

        self.rows: list[Row] = []
        self.batches: list[Batch] = []
        self._prompts = backend.prompts
        # Not in the module itself, which uses them too.
        watched = {**vars(attention), "run": self._run, "plan_step": self._plan_step}
        monkeypatch.setattr("vllm_s2o.backend.attention", SimpleNamespace(**watched))

    def _plan_step(self, query_lens, seq_lens, *args):
        plan = attention.plan_step(query_lens, seq_lens, *args)
        if self._prompts._step is not None:
            self.batches.append(Batch(query_lens, seq_lens, plan.seqs, args[-1]))
        return plan

    def _run(self, query, key_cache, value_cache, block_table, plan, params, scale, out, *, value_scale=1.0, **more):
        caches = {"key_cache": key_cache, "value_cache": value_cache, "params": params, "scale": scale}
        visited = attention.run(
            query, block_table=block_table, plan=plan, out=out, value_scale=value_scale, **caches, **more
        )  # fmt: skip
        if self._prompts._step is None:
            return visited
        query_lens, seq_lens, seqs, ends = self.batches[-1]
        starts = torch.tensor([0, *query_lens]).cumsum(0).tolist()
        for row in seqs:
            mine, blocks = slice(starts[row], starts[row + 1]), block_table[row : row + 1]
            num_rankings = params.num_rankings(query.shape[1], key_cache.shape[2])
            single = attention.plan_step(
                [query_lens[row]], [seq_lens[row]], params, num_rankings, prompt_lens=[ends[row]]
            )
            alone = torch.empty_like(out[mine])
            # With a workspace and thresholds of its own, whatever the engine gave.
            pairs = attention.run(
                query[mine], block_table=blocks, plan=attention.to_device(single, query.device), out=alone,
                value_scale=value_scale, **caches,
            )  # fmt: skip
            assert out[mine].equal(alone), f"sequence {row} of {query_lens} depends on its neighbours"
            assert visited[row].equal(pairs[0])
            exact = dense(query[mine], key_cache, value_cache, blocks[0], seq_lens[row], scale) * value_scale
            self.rows.append(
                Row(
                    query_lens[row], seq_lens[row], int(pairs.sum()), single.causal_pairs[0] * query.shape[1],
                    float((alone.float() - exact).square().sum()), float(exact.square().sum()),
                )
            )  # fmt: skip
        return visited

    def take(self) -> "Seen":
        """What was seen since the last time."""
        rows, self.rows = self.rows, []
        batches, self.batches = self.batches, []
        return Seen(rows, batches)


def dense(query, key_cache, value_cache, blocks, seq_len: int, scale: float) -> torch.Tensor:
    """Causal attention of a sequence's last queries in fp32, [tokens, heads, head_size]; the types given may be any."""
    block_size = key_cache.shape[1]
    used = blocks[: -(-seq_len // block_size)].long()
    keys, values = (cache[used].float().flatten(0, 1)[:seq_len] for cache in (key_cache, value_cache))
    group = query.shape[1] // keys.shape[1]
    keys, values = (rows.repeat_interleave(group, 1).transpose(0, 1) for rows in (keys, values))
    places = torch.arange(seq_len, device=query.device)
    hidden = places > places[seq_len - len(query) :, None]
    logits = (query.float().transpose(0, 1) @ keys.transpose(1, 2) * scale).masked_fill(hidden, float("-inf"))
    return (logits.softmax(-1) @ values).transpose(0, 1)


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
