"""The backend: the platform's dense attention, with the prefill of long sequences taken over by S2O.

    build (once a step)     which rows are long enough -> a plan, and dense metadata for the rows between
    forward (each layer)    dense rows -> the dense backend; sparse rows -> attention.run; one output

Cache shape and update, decode, graphs and metadata stay the dense backend's. Imported only where the
flag was given, in a process that runs the model.
"""

import dataclasses
import itertools
import logging
import re
from dataclasses import dataclass
from typing import Any

import torch

from vllm_s2o import attention, compat, stats
from vllm_s2o.arguments import longest_ranked
from vllm_s2o.compat import caches, requests
from vllm_s2o.config import ResolvedConfig, S2OParams
from vllm_s2o.metrics import place
from vllm_s2o.metrics.figures import Recorder
from vllm_s2o.metrics.prompts import Prompts
from vllm_s2o.plan import dense_runs, most_segments, workspace_slots
from vllm_s2o.settings import resolve
from vllm_s2o.warm_up import warm_up

logger = compat.logger()
recorder = Recorder(logger)
prompts = Prompts(recorder, logger)
reporter = stats.Reporter(logger.info, record=prompts.told)
requests.watch_steps(prompts.begin, prompts.end)

_told: set[str] = set()


def say_once(line: str, level: int = logging.INFO, each_rank: bool = False) -> None:
    """vLLM makes a builder several times: for profiling, for capture, for each cache group."""
    if line in _told:
        return
    _told.add(line)
    if each_rank or compat.tensor_parallel()[0] == 0:
        logger.log(level, "s2o: %s", line)


def tell_once(reason: str) -> None:
    """Say why something stays dense, the first time that it does."""
    say_once(f"dense: {reason}")


def report(step: stats.Step) -> None:
    """One rank tells of its heads: the others' differ little."""
    if compat.tensor_parallel()[0] == 0:
        reporter.finish(step)


def layer_index(layer_name: str) -> int | None:
    """`model.layers.12.self_attn.attn` is layer 12 of the model; None where the name does not say."""
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", layer_name)
    return int(numbers[0]) if len(numbers) == 1 else None


def short_name(layer_name: str) -> str:
    """What the log calls a layer: its number, or all that is known of it."""
    index = layer_index(layer_name)
    return layer_name if index is None else str(index)


def reserved_slots(vllm_config, num_rankings: int, config: ResolvedConfig) -> int:
    """Index entries that the workspace holds: what profiling reserves and no plan exceeds."""
    return workspace_slots(
        vllm_config.model_config.max_model_len,
        vllm_config.scheduler_config.max_num_batched_tokens,
        config.params.segment_len,
        num_rankings,
        attention.MAX_SLOTS,
    )


@dataclass(frozen=True)
class DenseRun:
    """Neighbouring rows of a step that stay dense."""

    rows: slice
    tokens: slice
    metadata: Any


@dataclass(frozen=True)
class Work:
    """The sparse part of one step, hung on the dense backend's metadata. Holds no slots: vLLM may copy
    the metadata to another cache group with a block table of its own."""

    plan: attention.DevicePlan
    thresholds: dict[str, torch.Tensor]
    """By the name of a layer, for those that are sparse."""
    dense: tuple[DenseRun, ...]
    step: stats.Step


DENSE: Any = compat.dense_backend()
DENSE_BUILDER: Any = DENSE.get_builder_cls()
DENSE_IMPL: Any = DENSE.get_impl_cls()

# Why a row is dense, as figures have it: the log adds the numbers.
SHORT, FEW, BEYOND = "below min_seq_len", "below min_query_len", "above max_model_len"
END = "the end of a prompt"


class S2OMetadataBuilder(DENSE_BUILDER):
    """The dense builder, and the plan of a step's long prefills."""

    _cudagraph_support = compat.cudagraph_support(DENSE_BUILDER)

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, *args, **kwargs)
        self.s2o = resolve(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        self.s2o_max_len = vllm_config.model_config.max_model_len
        self.s2o_min_query = max(self.s2o.min_query_len, 1 + compat.longest_decode(vllm_config))
        self.s2o_short = f"sequences shorter than min_seq_len={self.s2o.min_seq_len}"
        self.s2o_few = f"fewer new tokens than min_query_len={self.s2o_min_query}, decode among them"
        self.s2o_end = f"chunks within a prompt's last dense_tail={self.s2o.params.dense_tail} tokens"
        # A block table ends there: only a dummy batch, while vLLM warms up, should claim more.
        self.s2o_beyond = f"sequences longer than max_model_len={self.s2o_max_len}, as in vLLM's warm-up"
        ours = [layers[name] for name in layer_names if isinstance(layers[name].impl, S2OImpl)]
        # A draft's layers may be in the target's group. They run in steps of the drafter too, and are not counted.
        self.s2o_layers = [layer for layer in ours if not compat.is_draft_layer(layer.impl, layer)]
        # One plan for all layers of the group, which vLLM makes of layers with as many heads; any other one is dense.
        num_heads = max((layer.impl.num_heads for layer in self.s2o_layers), default=kv_cache_spec.num_kv_heads)
        self.s2o_rankings = self.s2o.params.num_rankings(num_heads, kv_cache_spec.num_kv_heads)
        self.s2o_slots = reserved_slots(vllm_config, self.s2o_rankings, self.s2o)
        problem = compat.engine_problem(vllm_config) or compat.builder_problem(type(self), S2OMetadataBuilder)
        if problem is None and self.s2o_max_len > (most := longest_ranked(self.s2o_rankings)):
            problem = (
                f"max_model_len={self.s2o_max_len} is above {most}, with {self.s2o_rankings} rankings of a history"
            )
        if device.type == "cuda" and self.s2o_layers and problem is None:
            shape = (kv_cache_spec.block_size, kv_cache_spec.num_kv_heads, kv_cache_spec.head_size)
            for num_heads in sorted({layer.impl.num_heads for layer in self.s2o_layers}):
                dtypes = caches.kernel_dtypes(self.s2o_layers[0].impl)
                dtype = vllm_config.model_config.dtype
                wrong = warm_up(num_heads, shape, dtype, device, self.s2o.params, *dtypes)
                if wrong is not None:
                    say_once(wrong, logging.WARNING, each_rank=True)  # another one's GPU may be well
                problem = problem or wrong
        dense: dict[str, list[str]] = {}
        for layer in ours:
            reason = layer.impl.settle(layer, self.s2o, self.s2o_rankings, problem)
            if reason is not None:
                dense.setdefault(reason, []).append(short_name(layer.layer_name))
        may_be_sparse = [layer.impl for layer in self.s2o_layers if layer.impl.s2o_params is not None]
        self.num_sparse, self.s2o_heads = len(may_be_sparse), sum(impl.num_heads for impl in may_be_sparse)
        self.s2o_dense = next(iter(dense), None)
        self.s2o_steps = 0
        self._introduce(
            dense, [layer for layer in layers.values() if isinstance(getattr(layer, "impl", None), S2OImpl)]
        )

    def _introduce(self, dense: dict[str, list[str]], every: list[Any]) -> None:
        """`dense`: why layers of this group are; `every`: layers of all groups. The last builder counts them."""
        if self.s2o_layers:  # none where a draft has a builder of its own
            for line in self.s2o.describe(self.s2o_min_query):
                say_once(line)
            spec, dtype = self.kv_cache_spec, self.vllm_config.model_config.dtype
            cache = caches.kernel_dtypes(self.s2o_layers[0].impl)[1]
            path = attention.describe(self.device, dtype, spec.num_kv_heads, spec.head_size, self.s2o.params, cache)
            for layer in self.s2o_layers:
                layer.impl.s2o_path = path
            own = [layer.impl for layer in every if not compat.is_draft_layer(layer.impl, layer)]
            if all(impl.s2o_path is not None for impl in own):
                sparse = [impl for impl in own if impl.s2o_params is not None]
                paths = " and ".join(dict.fromkeys(impl.s2o_path for impl in sparse or own))
                line = f"{len(sparse)} of {len(own)} attention layers take {paths} for long prefills"
                say_once(line, logging.INFO if sparse else logging.WARNING)
            server = place.here()
            switch = ""
            if server is not None and server.fixed is None:
                switch = f"; off and on again: vllm-s2o switch off --server {server.pid}"
            say_once(f"config hash {self.s2o.digest()}{switch}")
            if compat.tensor_parallel()[0] == 0:
                recorder.start(self.s2o.digest(), self.s2o.source)
        for reason, names in dense.items():
            tell_once(f"{reason} (layers {','.join(names)})")

    def build(self, common_prefix_len, common_attn_metadata, fast_build: bool = False, **kwargs):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)
        if fast_build:  # V1, for the steps of a drafter, whose layers are all dense
            return metadata
        metadata.s2o_common = common_attn_metadata  # another group may have to plan, from a copy of this
        metadata.s2o_planned = bool(self.num_sparse)
        if self.num_sparse:
            prompts.weigh(self, self.s2o_heads)
            metadata.s2o = self._plan(common_attn_metadata, metadata)
        elif self.s2o_dense is not None:
            prompts.note_step(self.s2o_dense, sparse_layers=False)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata, *args, **kwargs):
        metadata = super().build_for_cudagraph_capture(common_attn_metadata, *args, **kwargs)
        metadata.s2o = metadata.s2o_common = None  # no graph holds a plan, whatever the lengths of a dummy batch are
        return metadata

    def update_block_table(self, metadata, blk_table, slot_mapping):
        update = super().update_block_table
        new = update(metadata, blk_table, slot_mapping)
        new.s2o = None
        if not self.num_sparse:
            return new
        prompts.weigh(self, self.s2o_heads)
        work, common = getattr(metadata, "s2o", None), getattr(metadata, "s2o_common", None)
        if work is not None and work.plan.plan.num_rankings == self.s2o_rankings:
            dense = tuple(
                dataclasses.replace(run, metadata=update(run.metadata, blk_table[run.rows], slot_mapping[run.tokens]))
                for run in work.dense
            )
            step = work.step.again(len(self.s2o_layers))
            prompts.expect(step.prompts)
            new.s2o = dataclasses.replace(work, thresholds=self._thresholds(), dense=dense, step=step)
        # With other rankings it needs a plan of its own, as it does where the first group is all dense and has none.
        elif common is not None and (work is not None or not metadata.s2o_planned):
            own = dataclasses.replace(common, block_table_tensor=blk_table, slot_mapping=slot_mapping)
            new.s2o = self._plan(own, new)
        return new

    def _plan(self, common, metadata) -> Work | None:
        # Most steps end here: what a step holds at most tells enough.
        if common.max_seq_len < self.s2o.min_seq_len:
            self._all_dense(self.s2o_short, SHORT)
            return None
        if common.max_query_len < self.s2o_min_query:
            self._all_dense(self.s2o_few, FEW)
            return None
        lengths = compat.host_lengths(common)
        if lengths is None:
            self._all_dense("sequence lengths are not known on the host")
            return None
        reason = compat.step_problem(common, metadata)
        if reason is not None:
            self._all_dense(reason)
            return None
        query_lens, seq_lens = lengths
        owners = prompts.rows(common, query_lens)
        # A row that may be of a request that is dense by decision is dense.
        unknown = prompts.kept_dense() if None in owners else None
        # Of a request that is not known, any chunk may be the prompt's last one.
        ends = [(prompt.length if prompt else 0) or end for end, prompt in zip(seq_lens, owners, strict=True)]
        tail = self.s2o.params.dense_tail
        sparse = []
        for row, (query_len, seq_len, prompt) in enumerate(zip(query_lens, seq_lens, owners, strict=True)):
            if seq_len < self.s2o.min_seq_len:
                self._row_dense(prompt, self.s2o_short, SHORT)
            elif query_len < self.s2o_min_query:
                self._row_dense(prompt, self.s2o_few, FEW)
            elif seq_len > self.s2o_max_len:
                self._row_dense(prompt, self.s2o_beyond, BEYOND)
            elif kept := (prompt.kept_dense if prompt else unknown):
                self._row_dense(prompt, kept)
            elif tail and seq_len - query_len >= ends[row] - tail:
                self._row_dense(prompt, self.s2o_end, END)
            else:
                sparse.append(row)
        if not sparse:
            return None
        prompts.note_sparse([owners[row] for row in sparse], [query_lens[row] for row in sparse])
        plan = attention.plan_step(
            query_lens, seq_lens, self.s2o.params, self.s2o_rankings, sparse, self.s2o_slots, ends
        )  # fmt: skip
        starts = list(itertools.accumulate(query_lens, initial=0))
        dense = []
        for first, last in dense_runs(query_lens, sparse):
            rows = compat.slice_rows(common, first, last, query_lens, seq_lens)
            # A fast build: the builder's buffer for the kernel's schedule belongs to the whole batch.
            run = compat.as_in_batch(super().build(0, rows, True), metadata)
            dense.append(DenseRun(slice(first, last), slice(starts[first], starts[last]), run))
        step = stats.Step(
            [query_lens[row] for row in sparse],
            [seq_lens[row] for row in sparse],
            [plan.causal_pairs[row] for row in sparse],
            len(self.s2o_layers),
            plan.seqs,
            prompts.expect([owners[row] for row in sparse]),
            self.s2o_steps % self.num_sparse,
        )
        self.s2o_steps += 1
        return Work(attention.to_device(plan, self.device), self._thresholds(), tuple(dense), step)

    def _all_dense(self, told: str, reason: str | None = None) -> None:
        """Tell why a step is dense; `reason` is the same without a number, for figures."""
        tell_once(told)
        prompts.note_step(reason or told)

    def _row_dense(self, prompt, told: str, reason: str | None = None) -> None:
        tell_once(told)
        prompts.note_dense(prompt, reason or told)

    def _thresholds(self) -> dict[str, torch.Tensor]:
        """Copied before the layers run, so that none of them does."""
        sparse = [layer for layer in self.s2o_layers if layer.impl.s2o_params is not None]
        rows = [(layer.impl.s2o_params, layer.impl.num_heads) for layer in sparse]
        names = [layer.layer_name for layer in sparse]
        return dict(zip(names, attention.device_thresholds(rows, self.device), strict=True))


class S2OImpl(DENSE_IMPL):
    """The dense implementation, and S2O for the rows that a step's plan names."""

    s2o_params: S2OParams | None = None
    """What this layer runs with; None: it stays dense. Known once the metadata builder has seen the layer."""
    s2o_path: str | None = None
    """What computes it where it is sparse, for the log; known then, too."""
    s2o_draft: bool
    """Whether this was made for a draft model; `compat.is_draft_layer` asks vLLM's mark too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        from vllm.config import get_current_vllm_config

        vllm_config = get_current_vllm_config()
        self.s2o_draft = compat.loads_draft(vllm_config)
        self._s2o_most: attention.Buffers = ()
        if self.s2o_draft:
            return
        config = resolve(vllm_config)
        num_rankings = config.params.num_rankings(self.num_heads, self.num_kv_heads)
        if vllm_config.model_config.max_model_len <= longest_ranked(num_rankings):  # else the layer is dense
            self._s2o_most = attention.most_buffers(
                reserved_slots(vllm_config, num_rankings, config),
                most_segments(
                    vllm_config.scheduler_config.max_num_batched_tokens, config.params.segment_len, config.min_query_len
                ),
                (num_rankings, self.head_size),
                config.params.num_classes,
            )

    def settle(self, layer, config: ResolvedConfig, num_rankings: int, problem: str | None = None) -> str | None:
        """Choose this layer's path. Returns the reason when it stays dense; `problem` is one that all layers have, and
        plans are made for `num_rankings`."""
        self.s2o_params = None
        reason = problem or compat.layer_problem(self, layer)
        if reason is not None:
            return reason
        index = layer_index(layer.layer_name)
        if index is None and config.file.layers:  # one of them may be meant for this layer
            return "the config has settings for single layers, and the name does not say which layer this is"
        params = config.params if index is None else config.layer(index)
        if params is None:
            return "the config says so"
        if params.num_rankings(self.num_heads, self.num_kv_heads) != num_rankings:
            return f"steps are planned for {num_rankings} rankings, one of each query head, and it has {self.num_heads}"
        if isinstance(params.threshold, tuple):  # the config counts the model's heads, this rank holds some of them
            rank, ranks = compat.tensor_parallel()
            if len(params.threshold) != ranks * self.num_heads:  # fewer than the model has, or all of them on each rank
                of = f"{self.num_heads} on each of {ranks} ranks" if ranks > 1 else f"{self.num_heads}"
                return f"thresholds for {len(params.threshold)} heads do not fit a layer of {of}"
            mine = params.threshold[rank * self.num_heads : (rank + 1) * self.num_heads]
            params = params.model_copy(update={"threshold": mine})
        self.s2o_params = params
        return None

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs):
        work = getattr(attn_metadata, "s2o", None)
        if work is None:
            if attn_metadata is None and self._s2o_most:  # memory profiling: what a long prefill will need
                compat.reserve_workspace(*self._s2o_most)
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
        params = self.s2o_params
        if params is None:
            super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *args, **kwargs)
            if not compat.is_draft_layer(self, layer) and work.step.dense_layer():
                report(work.step)
            return output
        for run in work.dense:
            rows = run.tokens
            # The cache may have been written by an operation of its own, and key and value not be passed on.
            new = (None if tensor is None else tensor[rows] for tensor in (key, value))
            super().forward(layer, query[rows], *new, kv_cache, run.metadata, output[rows], *args, **kwargs)
        key_cache, value_cache, block_table = caches.views(layer, self, kv_cache, attn_metadata.block_table)
        buffers = work.plan.buffers(self.head_size, params.num_classes)
        workspace = compat.reserve_workspace(*buffers)
        clock = work.step.clock(query.device)
        of_logits, of_values = caches.scales(self, layer, query)
        visited = attention.run(
            query, key_cache, value_cache, block_table, work.plan, params, self.scale * of_logits, output,
            thresholds=work.thresholds.get(layer.layer_name), workspace=workspace, value_scale=of_values,
            lap=clock and clock.lap,
        )  # fmt: skip
        if work.step.sparse_layer(visited):
            report(work.step)
        return output


class S2OBackend(DENSE):
    """What `--attention-backend CUSTOM` names."""

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Steps are planned from the lengths that the host knows."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """A segment that is cut into chunks is ranked once for each of them, from fewer queries."""
        return False

    @staticmethod
    def get_impl_cls() -> type[S2OImpl]:
        return S2OImpl

    @staticmethod
    def get_builder_cls() -> type[S2OMetadataBuilder]:
        return S2OMetadataBuilder
