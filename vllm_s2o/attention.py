"""`prefill_attention`: plans the step and runs its stages on the device at hand."""

import contextlib
import importlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Literal, NamedTuple

import torch

from vllm_s2o.arguments import MAX_ROW_STRIDE, check, check_lengths, check_params, check_rankings, require
from vllm_s2o.config import S2OParams
from vllm_s2o.plan import MAX_PAIRS, StepPlan, Wave, make_plan

Implementation = Literal["auto", "cuda", "triton", "cpu", "naive"]

WORKSPACE_BYTES = 448 * 2**20
"""Rankings and classes held at one time, at most, but for those of a single history, which is held whole. With the
small tables beside them, of 32 classes, a step stays below 512 MiB."""

MAX_SLOTS = WORKSPACE_BYTES // 5
"""Each entry is an index (int32) and its importance class (uint8)."""


class Stats(NamedTuple):
    """What was computed, per row of the batch and query head."""

    visited_pairs: torch.Tensor
    """[num_seqs, num_heads] int64: (query, key) pairs that entered the softmax."""
    causal_pairs: torch.Tensor
    """[num_seqs, num_heads] int64: pairs that dense causal attention computes."""


@dataclass(frozen=True)
class DeviceWave:
    """A wave with its tables on the device."""

    wave: Wave
    segments: torch.Tensor
    tiles: torch.Tensor
    groups: torch.Tensor
    tile_seqs: torch.Tensor
    """[num_tiles] int64: the row of the batch that a tile belongs to."""


@dataclass(frozen=True)
class DevicePlan:
    """A step's plan with its tables on the device: made once a step, used by every layer."""

    plan: StepPlan
    waves: tuple[DeviceWave, ...]

    @property
    def max_slots(self) -> int:
        """The longest list of slots that a wave needs."""
        return max((tables.wave.num_slots for tables in self.waves), default=0)

    def buffers(self, head_size: int, num_classes: int) -> "Buffers":
        """Workspace of the step."""
        sizes = [(len(tables.wave.segments), tables.wave.max_history) for tables in self.waves]
        words = [
            _words(count, count * longest, (self.plan.num_rankings, head_size), num_classes) for count, longest in sizes
        ]
        return _buffers(self.max_slots, max(words, default=0))


def stages(implementation: Implementation, device: torch.device) -> ModuleType | SimpleNamespace:
    """rank_keys and attend for a device ("auto") or by name."""
    if implementation == "auto":
        implementation = "cuda" if device.type == "cuda" else "cpu"
    if implementation != "triton":
        return importlib.import_module(f"vllm_s2o.kernels.{implementation}")
    rank = importlib.import_module("vllm_s2o.kernels.rank")
    prefill = importlib.import_module("vllm_s2o.kernels.prefill")
    return SimpleNamespace(rank_keys=rank.rank_keys, attend=prefill.attend)


def describe(
    device: torch.device, dtype: torch.dtype, num_kv_heads: int, head_size: int, params: S2OParams,
    cache: torch.dtype | None = None,
) -> str:  # fmt: skip
    """What computes a model's layers on a device, for the log; `cache` is the caches' type if it is another one."""
    if device.type != "cuda":
        return "the CPU path"
    return f"kernels ({stages('auto', device).describe(device, dtype, num_kv_heads, head_size, params, cache)})"


def plan_step(
    query_lens: list[int],
    seq_lens: list[int],
    params: S2OParams,
    num_rankings: int,
    seqs: list[int] | None = None,
    max_slots: int = MAX_SLOTS,
    prompt_lens: Sequence[int] | None = None,
) -> StepPlan:
    """`make_plan` with what `params` say.

    Args:
        num_rankings: `params.num_rankings` of the model's heads.
        prompt_lens: as in `prefill_attention`.
    """
    ends = seq_lens if prompt_lens is None else prompt_lens
    return make_plan(
        query_lens,
        seq_lens,
        segment_len=params.segment_len,
        tile_size=params.tile_size,
        num_rankings=num_rankings,
        max_slots=max_slots,
        budget=params.budget,
        seqs=seqs,
        dense_from=[end - params.dense_tail for end in ends] if params.dense_tail else None,
        reference_len=params.reference_len,
    )


def to_device(plan: StepPlan, device: torch.device) -> DevicePlan:
    """Copy a plan's tables without waiting for the device."""
    from vllm_s2o.kernels.tables import as_table, score_groups

    waves = []
    for wave in plan.waves:
        seqs = [wave.segments[tile.segment].seq for tile in wave.tiles]
        waves.append(
            DeviceWave(
                wave,
                as_table(wave.segments, device),
                as_table(wave.tiles, device),
                as_table(score_groups(wave.segments), device),
                as_table(seqs, device, torch.int64),
            )
        )
    return DevicePlan(plan, tuple(waves))


def device_thresholds(layers: Sequence[tuple[S2OParams, int]], device: torch.device) -> list[torch.Tensor]:
    """Thresholds of layers, given by parameters and number of query heads, in one copy that does not wait.

    To be made anew for each step: memory that was allocated at start may lose its values in vLLM's sleep mode.
    """
    from vllm_s2o.kernels.tables import as_table

    rows = [params.thresholds(num_heads) for params, num_heads in layers]
    # A budget is a fixed share: the stop rule is off.
    rows = [row if params.budget is None else (0.0,) * len(row) for row, (params, _) in zip(rows, layers, strict=True)]
    # Triton compiles a kernel again for an address that is no multiple of 16 bytes.
    width = -(-max(map(len, rows)) // 4) * 4
    table = as_table([(*row, *(0.0,) * (width - len(row))) for row in rows], device, torch.float32)
    return [values[: len(row)] for values, row in zip(table, rows, strict=True)]


Buffers = tuple[tuple[tuple[int], torch.dtype], ...]
"""Shape and type of each buffer of a workspace: slots, classes, tables."""


def _buffers(num_slots: int, words: int) -> Buffers:
    return ((num_slots,), torch.int32), ((num_slots,), torch.uint8), ((words,), torch.int32)


def _words(num_segments: int, total_history: int, ranked: tuple[int, int], num_classes: int) -> int:
    from vllm_s2o.kernels.tables import table_words

    num_rankings, head_size = ranked
    return table_words(num_segments, num_rankings, total_history * num_rankings, head_size, num_classes)


def most_buffers(num_slots: int, num_segments: int, ranked: tuple[int, int], num_classes: int) -> Buffers:
    """What no step exceeds whose waves hold `num_slots` entries and which has `num_segments` segments, at most;
    ranked: (num_rankings, head_size)."""
    num_segments = min(num_segments, max(MAX_PAIRS // ranked[0], 1))  # of one wave
    return _buffers(num_slots, _words(num_segments, 2 * num_slots // ranked[0], ranked, num_classes))


def allocate(buffers: Buffers, device: torch.device) -> tuple[torch.Tensor, ...]:
    """A workspace of one's own."""
    return tuple(torch.empty(shape, dtype=dtype, device=device) for shape, dtype in buffers)


def run(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    block_table: torch.Tensor,
    plan: DevicePlan,
    params: S2OParams,
    scale: float,
    out: torch.Tensor,
    *,
    thresholds: torch.Tensor | None = None,
    workspace: Sequence[torch.Tensor] | None = None,
    value_scale: float = 1.0,
    implementation: Implementation = "auto",
    lap: Callable[[], None] | None = None,
) -> torch.Tensor:
    """Attend the plan's rows, wave by wave, into `out`; other rows of `out` are left alone.

    Returns the visited pairs, [num_seqs, num_heads] int64. Nothing here waits for the device, and with `thresholds`
    (one of `device_thresholds`) nothing is copied to it. `lap` is called before each wave, after its ranking, and after
    its attention. Queries may be fp8 beside caches that are: `scale` then holds their factor and that of the keys, and
    `out` has the model's type.
    """
    num_heads = query.shape[1]
    if thresholds is None:
        (thresholds,) = device_thresholds([(params, num_heads)], query.device)
    num_rankings = params.num_rankings(num_heads, key_cache.shape[2])
    assert plan.plan.num_rankings == num_rankings, f"planned for {plan.plan.num_rankings} rankings, not {num_rankings}"
    visited = torch.zeros(plan.plan.num_seqs, num_heads, dtype=torch.int64, device=query.device)
    for tables in plan.waves:
        done = run_wave(
            query, key_cache, value_cache, block_table, tables, params, scale, out, thresholds,
            workspace=workspace, value_scale=value_scale, implementation=implementation, lap=lap,
        )  # fmt: skip
        visited.index_add_(0, tables.tile_seqs, done.pairs.long())
        if lap is not None:
            lap()
    return visited


class WaveDone(NamedTuple):
    """What a wave leaves beside its output."""

    slots: torch.Tensor
    """Rankings, as `rank_keys` returns them; the next wave writes over those in a workspace."""
    pairs: torch.Tensor
    """[num_tiles, num_heads]: visited ones."""


def run_wave(
    query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, block_table: torch.Tensor,
    tables: DeviceWave, params: S2OParams, scale: float, out: torch.Tensor, thresholds: torch.Tensor,
    *, workspace: Sequence[torch.Tensor] | None = None, value_scale: float = 1.0,
    implementation: Implementation = "auto", lap: Callable[[], None] | None = None,
) -> WaveDone:  # fmt: skip
    """One wave of `run`; `lap` is called before it and after its ranking."""
    stage, wave = stages(implementation, query.device), tables.wave
    num_rankings = params.num_rankings(query.shape[1], key_cache.shape[2])
    if lap is not None:
        lap()
    slots = stage.rank_keys(
        query, key_cache, block_table, tables.segments, wave.num_slots, params.num_classes,
        max_history=wave.max_history, groups=tables.groups, num_rankings=num_rankings, workspace=workspace,
    )  # fmt: skip
    if lap is not None:
        lap()
    pairs = stage.attend(
        query, key_cache, value_cache, block_table, tables.segments, tables.tiles, slots, thresholds, out,
        scale=scale, key_block=params.key_block, stop_interval=params.stop_interval,
        tile_size=params.tile_size, value_scale=value_scale, num_rankings=num_rankings,
    )  # fmt: skip
    return WaveDone(slots, pairs)


def prefill_attention(
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    *,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    params: S2OParams,
    prompt_lens: Sequence[int] | None = None,
    out: torch.Tensor | None = None,
    key_scale: float = 1.0,
    value_scale: float = 1.0,
    return_stats: bool = False,
    implementation: Implementation = "auto",
) -> torch.Tensor | tuple[torch.Tensor, Stats]:
    """S2O attention of new tokens over a paged KV cache that already holds their keys and values.

    Args:
        query: [num_tokens, num_heads, head_size], bf16, fp16 or fp32: the last tokens of each sequence, packed.
        key_cache, value_cache: [num_blocks, block_size, num_kv_heads, head_size], same dtype or fp8 (e4m3), any
            strides.
        block_table: [num_seqs, max_blocks] int32. Entries beyond a sequence's length are not read.
        query_start_loc: [num_seqs + 1] int32, ascending from 0 to num_tokens.
        seq_lens: [num_seqs] int32, the new tokens included.
        scale: factor on the logits, as a rule head_size ** -0.5.
        params: threshold, segment length and the rest; `threshold=0` computes dense attention.
        prompt_lens: tokens of each sequence's prompt, from whose end `params.dense_tail` counts: more than its length
            in all chunks of a prompt but the last, and less where what comes behind a prompt is computed again, which
            is all dense. By default the length.
        key_scale, value_scale: what the numbers of fp8 caches are multiplied by to be keys and values.
        out: written in place where given, shaped and typed like query, its last dimension dense.
        return_stats: also return the visited and the causal pairs.
        implementation: "auto" takes the fastest kernels on a GPU ("cuda"; "triton" are those that run everywhere, in
            the interpreter too) and the vectorised path on a CPU; "naive" is the oracle.

    Returns:
        out, or (out, Stats).

    Raises:
        ValueError: an argument that does not fit the others, in one sentence.

    The lengths are read on the host once to plan the step, which waits for the device; a server plans
    from lengths it already has (`plan_step`, `to_device`, `run`).
    """
    check(
        query, key_cache, value_cache, block_table, query_start_loc, seq_lens, scale, key_scale, value_scale, out
    )  # fmt: skip
    check_params(params, query.shape[1])
    require(
        not (implementation == "triton" and query.dtype == torch.bfloat16 and query.device.type == "cpu"),
        "Triton's interpreter, which runs the kernels on a CPU, computes in NumPy and knows no bfloat16",
    )
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    query_lens = [b - a for a, b in itertools.pairwise(starts)]
    check_lengths(starts, query_lens, lens, query.shape[0], block_table.shape[1] * key_cache.shape[1])
    require(
        prompt_lens is None or len(prompt_lens) == len(lens),
        f"prompt_lens must have one entry for each of the {len(lens)} sequences, got {len(prompt_lens or ())}",
    )
    require(
        prompt_lens is None or all(isinstance(length, int) and length >= 0 for length in prompt_lens),
        f"prompt_lens must be whole numbers from 0 on, got {prompt_lens}",
    )
    if out is None:
        out = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    # The kernels know one stride of each, and count a tile's rows in 32 bits: the caches, which are large, are read
    # with any strides.
    query = query if query.stride(-1) == 1 and query.stride(0) < MAX_ROW_STRIDE else query.contiguous()
    block_table = block_table if block_table.stride(-1) == 1 else block_table.contiguous()
    num_rankings = params.num_rankings(query.shape[1], key_cache.shape[2])
    check_rankings(max(lens, default=0), num_rankings)
    plan = plan_step(query_lens, lens, params, num_rankings, prompt_lens=prompt_lens)
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device(query.device) if query.is_cuda else contextlib.nullcontext():
        visited = run(
            query, key_cache, value_cache, block_table, to_device(plan, query.device), params, scale * key_scale,
            out, value_scale=value_scale, implementation=implementation,
        )  # fmt: skip
    if not return_stats:
        return out
    causal = torch.tensor(plan.causal_pairs, dtype=torch.int64, device=query.device)
    return out, Stats(visited, causal[:, None].expand(-1, query.shape[1]).contiguous())
