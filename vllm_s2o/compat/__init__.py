"""Every difference between vLLM versions. Nothing else in the project asks for one.

    (here)      versions, registration, the model and the dense backend, a step's metadata
    caches      how caches of keys and values lie in memory, and what their numbers stand for
    requests    what a request asks for, and which requests a step computes

Written against the sources of vLLM 0.25.1, 0.32.0 and 0.33.0; `make test-matrix` checks them, and others between.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import os
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_s2o.compat.caches import CPU_LAYOUTS, quantised
from vllm_s2o.compat.requests import wish_problem

if TYPE_CHECKING:  # the command line asks for versions and traits where nothing runs a model
    import torch

SUPPORTED = ("0.25.1", "0.34")
"""First supported vLLM version, and the first one that is not."""

BACKEND_PATH = "vllm_s2o.backend.S2OBackend"
NAME = "S2O"


def logger():
    """vLLM sets up handlers for its own namespace only: a logger outside it would stay silent."""
    from vllm.logger import init_logger

    return init_logger("vllm.s2o")


# -- versions ---------------------------------------------------------------------------------------------------------


def _release(version: str) -> tuple[int, ...]:
    match = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def version_problem(vllm_version: str | None = None) -> str | None:
    """A sentence that names both versions when this vLLM is outside the bounds, else None."""
    from vllm_s2o.version import __version__

    if vllm_version is None:
        import vllm

        vllm_version = vllm.__version__
    release = _release(vllm_version)
    if release and not _release(SUPPORTED[0]) <= release < _release(SUPPORTED[1]):
        return (
            f"vllm-s2o {__version__} works with vLLM {SUPPORTED[0]} up to, not including, {SUPPORTED[1]}; "
            f"vLLM {vllm_version} is installed: install a supported vLLM, or start without the S2O backend."
        )
    return None


# -- registration -----------------------------------------------------------------------------------------------------


def s2o_member(path: str = BACKEND_PATH):
    """The backend's member of vLLM's enum: S2O where vLLM allows new names, else CUSTOM.

    Also what the pickled member calls in another process, where it may not exist yet: an engine
    process unpickles its configuration before it loads plugins.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if NAME in AttentionBackendEnum.__members__:
        return AttentionBackendEnum[NAME]
    if not hasattr(AttentionBackendEnum, "register"):
        return AttentionBackendEnum.CUSTOM
    # vLLM tells of every new name, in each process and without the flag too.
    registry = logging.getLogger("vllm.v1.attention.backends.registry")
    disabled, registry.disabled = registry.disabled, True
    try:
        member = AttentionBackendEnum.register(NAME, path)
    finally:
        registry.disabled = disabled
    member.__reduce_ex__ = lambda protocol: (s2o_member, (path,))
    return member


def register_backend(path: str = BACKEND_PATH) -> None:
    """Make `--attention-backend CUSTOM`, and S2O where vLLM allows it, name the backend."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    custom = AttentionBackendEnum.CUSTOM
    if custom.is_overridden() and custom.get_path() != path:
        other = f"use --attention-backend {NAME}" if hasattr(AttentionBackendEnum, "register") else "remove one of them"
        logger().warning("s2o: the backend name CUSTOM belongs to %s already: %s.", custom.get_path(), other)
    else:
        register_backend(custom, path)
    s2o_member(path)


def is_s2o(backend: Any) -> bool:
    """Whether a member of vLLM's enum names this backend."""
    if backend is None:
        return False
    ours = backend.is_overridden() and backend.get_path() == BACKEND_PATH
    return backend.name == NAME or (backend.name == "CUSTOM" and ours)


def uses_s2o(vllm_config) -> bool:
    """Whether the flag was given, for all layers or for one kind of layer."""
    config = vllm_config.attention_config
    return is_s2o(config.backend) or any(map(is_s2o, (getattr(config, "backend_per_kind", None) or {}).values()))


def install_hooks(on_config: Callable[[Any], None]) -> None:
    """Call `on_config` with each configuration that has the flag, make the flag effective on CPU, and refuse requests
    that ask for what is not to be had.

    vLLM has no hook that lets a general plugin see the configuration before engine processes start,
    and its CPU platform ignores the flag. All are methods of the platform, wrapped here.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    if getattr(platform.check_and_update_config, "s2o", False):
        return
    check, flagged = platform.check_and_update_config, False

    def check_and_update_config(cls, vllm_config) -> None:
        nonlocal flagged
        check(vllm_config)
        if uses_s2o(vllm_config):
            flagged = True
            on_config(vllm_config)

    hook: Any = check_and_update_config
    hook.s2o = True
    platform.check_and_update_config = classmethod(hook)

    if current_platform.is_cpu():
        choose = platform.get_attn_backend_cls

        def get_attn_backend_cls(cls, selected_backend, *args, **kwargs) -> str:
            if not is_s2o(selected_backend):
                return choose(selected_backend, *args, **kwargs)
            dense = choose(None, *args, **kwargs)
            # Anything but plain attention (MLA, for one) is refused by S2O's backend, not replaced silently.
            if not dense.endswith(".CPUAttentionBackend"):
                raise ValueError(f"The S2O backend cannot stand in for {dense.rpartition('.')[2]}: start without it.")
            return BACKEND_PATH

        platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)

    validate = platform.validate_request

    def validate_request(cls, processed_inputs, params, *args, **kwargs) -> None:
        problem = wish_problem(params) if flagged else None
        if problem is not None:
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(problem, parameter="vllm_xargs")
        validate(processed_inputs, params, *args, **kwargs)

    platform.validate_request = classmethod(validate_request)


def batch_invariant() -> bool:
    """Whether the user asks for answers that do not depend on what else is in a step."""
    from vllm import envs

    return envs.VLLM_BATCH_INVARIANT


def copy_to_ray(variable: str) -> None:
    """Have vLLM hand an environment variable to the actors of Ray that it starts, beside those that the user names.

    Ray may have run before this process: then its actors have another environment. vLLM gives its workers all of this
    one's, but engines (of `--data-parallel-backend ray`) and the workers of the older executor what is named alone.
    """
    from vllm import envs

    given = [name.strip() for name in envs.VLLM_RAY_EXTRA_ENV_VARS_TO_COPY.split(",") if name.strip()]
    if variable not in given:
        os.environ["VLLM_RAY_EXTRA_ENV_VARS_TO_COPY"] = ",".join([*given, variable])


def in_ray_actor() -> bool:
    """Whether this process is an actor of Ray, which Python does not take for another process's child."""
    from vllm.ray.lazy_utils import is_in_ray_actor

    return "ray" in sys.modules and is_in_ray_actor()  # which would import it, where it is installed


# -- asking vLLM, without a server ------------------------------------------------------------------------------------


def load_plugins() -> None:
    """All general plugins, as each of vLLM's processes loads them."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def installed_version() -> str:
    import vllm

    return vllm.__version__


def device_type() -> str:
    """The platform that vLLM chose: cpu, cuda or another; empty where it finds none."""
    from vllm.platforms import current_platform

    return current_platform.device_type


def backend_names() -> list[str]:
    """What --attention-backend may be for this backend, in the order in which README names them."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    members = AttentionBackendEnum.__members__
    return [name for name in ("CUSTOM", NAME) if name in members and is_s2o(members[name])]


def server_config(model: str, backend: str, additional: dict[str, Any]):
    """The VllmConfig of `vllm serve` with the flag, without weights or a tokenizer. Raises what a server ends with."""
    from vllm.engine.arg_utils import EngineArgs

    args = EngineArgs(
        model=model, attention_backend=backend, additional_config=additional, skip_tokenizer_init=True
    )  # fmt: skip
    return args.create_engine_config()


# -- refusing ---------------------------------------------------------------------------------------------------------


class StartError(RuntimeError):
    """A configuration that cannot be served, in one sentence. No ValueError: pydantic would wrap that."""


def stop(sentence: str) -> None:
    """End the start with this sentence: under vLLM's own commands as the last line, in a program as an exception."""
    import vllm

    main = getattr(sys.modules.get("__main__"), "__file__", None) or ""
    if os.path.basename(main) == "vllm" or main.startswith(os.path.dirname(vllm.__file__) + os.sep):
        raise SystemExit(f"vllm-s2o: {sentence}")
    raise StartError(sentence)


# -- the model and the dense backend ----------------------------------------------------------------------------------


def model_traits(model_config) -> dict[str, Any]:
    """What a config file is matched by."""
    text = model_config.hf_text_config
    architectures = getattr(model_config.hf_config, "architectures", None) or ["unknown"]
    return dict(
        name=str(model_config.model),
        architecture=architectures[0],
        num_layers=int(text.num_hidden_layers),
        num_heads=int(text.num_attention_heads),
        num_kv_heads=int(model_config.get_total_num_kv_heads()),
        head_size=int(model_config.get_head_size()),
    )


def is_draft(vllm_config) -> bool:
    """Whether this is the configuration of a draft model alone: most drafts are loaded with the target's."""
    speculative = vllm_config.speculative_config
    draft = getattr(speculative, "draft_model_config", None)
    # Where there is no draft model (n-gram, for one), vLLM notes the target's as the draft's.
    target = getattr(speculative, "target_model_config", None)
    return draft is not None and draft is vllm_config.model_config and draft is not target


def loads_draft(vllm_config) -> bool:
    """Whether the layers that are made now are a draft model's.

    All versions load a draft under a tag of its own, and the model that is served under the first one.
    """
    from vllm.compilation import backends

    return vllm_config.speculative_config is not None and backends.model_tag != "backbone"


def is_draft_layer(impl, layer) -> bool:
    """Whether a layer is a draft model's. Model runner V2 marks such layers from 0.31 on, and V1 from 0.33 on; before,
    the implementation alone knows, from the time when it was made."""
    return impl.s2o_draft or getattr(layer, "is_draft_layer", False)


def builder_problem(builder: type, ours: type) -> str | None:
    """Why the layers of a builder that vLLM derives from ours are dense, or None where it is ours.

    Such a builder tells ours something else than the requests: that of chunked local attention cuts each sequence into
    short ones, which then have neither the rows of the requests nor their lengths.
    """
    return None if builder is ours else f"vLLM changes what its layers are told of sequences ({builder.__name__})"


def longest_decode(vllm_config) -> int:
    """Query tokens of a row in decode, at most: one, and what a draft proposes."""
    from vllm.v1.attention import backend

    if hasattr(backend, "max_decode_query_len"):  # from 0.31 on; it knows the model runner too
        return backend.max_decode_query_len(vllm_config)
    speculative = vllm_config.speculative_config
    proposed = getattr(speculative, "num_speculative_tokens", None) or 0
    # A parallel drafter verifies and proposes in one row.
    return 1 + (2 if getattr(speculative, "parallel_drafting", False) else 1) * proposed


def longest_chunk(vllm_config) -> int:
    """The most tokens of one prompt that a step computes."""
    scheduler = vllm_config.scheduler_config
    threshold = scheduler.long_prefill_token_threshold
    # Where it adapts (as it may from 0.31 on), a prompt alone may have the whole step.
    if not threshold or getattr(scheduler, "long_prefill_token_threshold_adaptive", False):
        return scheduler.max_num_batched_tokens
    return min(threshold, scheduler.max_num_batched_tokens)


def dense_backend() -> type:
    """The platform's own backend, which everything but long prefill is left to."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        return CPUAttentionBackend
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    return FlashAttentionBackend


def cudagraph_support(dense_builder: Any):
    """At most uniform decode: a graph of a mixed batch would freeze the choice between sparse and dense."""
    from vllm.v1.attention.backend import AttentionCGSupport

    support = dense_builder._cudagraph_support
    return min(support, AttentionCGSupport.UNIFORM_BATCH, key=lambda s: s.value)


def tensor_parallel() -> tuple[int, int]:
    """(rank, size)"""
    from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    return get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()


def counts_tokens() -> bool:
    """Whether this rank is the one of its engine's that counts prompts and their tokens, which all ranks see."""
    from vllm.distributed import get_pcp_group, get_pp_group

    return tensor_parallel()[0] == 0 and get_pcp_group().is_first_rank and get_pp_group().is_first_rank


def reserve_workspace(*shapes_and_dtypes) -> list[torch.Tensor] | None:
    """Buffers from vLLM's workspace manager, which memory profiling knows; None where there is none."""
    from vllm.v1.worker import workspace

    if not workspace.is_workspace_manager_initialized():
        return None
    return workspace.current_workspace_manager().get_simultaneous(*shapes_and_dtypes)


def engine_problem(vllm_config) -> str | None:
    """Why all layers of this engine must stay dense, or None."""
    if vllm_config.parallel_config.use_ubatching:  # two halves of a step, in turn, each with metadata of its own
        return "dual-batch overlap"
    return None


MAX_HEAD_SIZE = 256
"""The largest that the kernels are tested with."""


def layer_problem(impl, layer) -> str | None:
    """Why this layer must stay dense, or None."""
    if is_draft_layer(impl, layer):
        return "draft model"
    window = impl.sliding_window
    if (window[0] if isinstance(window, tuple) else window or -1) >= 0:
        return "sliding window"
    if impl.alibi_slopes is not None:
        return "ALiBi"
    if impl.logits_soft_cap:
        return "logits soft cap"
    if getattr(impl, "sinks", None) is not None:
        return "attention sinks"
    if str(getattr(impl.attn_type, "value", impl.attn_type)) != "decoder":
        return "encoder or cross attention"
    if impl.kv_cache_dtype not in ("auto", "float16", "bfloat16", "float32") and (problem := quantised(impl, layer)):
        return f"quantised KV cache ({problem})"
    if getattr(impl, "total_cp_world_size", 1) > 1 or getattr(impl, "dcp_world_size", 1) > 1:
        return "context parallelism"
    if impl.head_size > MAX_HEAD_SIZE:
        return f"head size {impl.head_size}, above {MAX_HEAD_SIZE}"
    isa = getattr(layer, "isa", None) or getattr(impl, "isa", None)
    if isa is not None and isa not in CPU_LAYOUTS:
        return f"unknown CPU cache layout ({isa})"
    return None


# -- one step ---------------------------------------------------------------------------------------------------------


def step_problem(common, metadata) -> str | None:
    """Why no row of this step may be sparse, or None."""
    if common.causal is not True:
        return "non-causal or per-request causality"
    if getattr(metadata, "use_cascade", False):
        return "cascade attention"
    if getattr(common, "mm_req_doc_ranges", None):
        return "multimodal prefix ranges"
    if getattr(common, "rswa_prefix_lens", None) is not None:
        return "R-SWA"
    if getattr(common, "logits_indices_padded", None) is not None:
        return "fast prefill of shared KV layers"
    if getattr(common, "encoder_seq_lens", None) is not None:
        return "encoder or cross attention"
    return None


def host_lengths(common) -> tuple[list[int], list[int]] | None:
    """(query lengths, sequence lengths) of the step's rows as the host knows them, or None.

    The upper bound on the sequence lengths is exact for rows in prefill, the only ones that matter here.
    """
    starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
    lens = common.seq_lens_cpu_upper_bound
    if lens is None:
        lens = getattr(common, "_seq_lens_cpu", None)
    if lens is None and not common.seq_lens.is_cuda:
        lens = common.seq_lens
    if lens is None:
        return None
    return [b - a for a, b in itertools.pairwise(starts)], lens[: common.num_reqs].tolist()


_PER_ROW = ("seq_lens", "block_table_tensor", "is_prefilling", "seq_lens_cpu_upper_bound", "_seq_lens_cpu", "req_idx")
_PER_TOKEN = ("slot_mapping", "positions")
_CACHED = ("_num_computed_tokens_cpu", "_num_computed_tokens_cache", "_token_to_req_indices_cache")


def slice_rows(common, first: int, last: int, query_lens: list[int], seq_lens: list[int]):
    """The step's metadata for rows `first` to `last` alone."""
    begin, end = (int(common.query_start_loc_cpu[row]) for row in (first, last))
    names = {field.name for field in dataclasses.fields(common)}
    changes: dict[str, Any] = {name: None for name in _CACHED if name in names}
    for names_cut, cut in ((_PER_ROW, slice(first, last)), (_PER_TOKEN, slice(begin, end))):
        for name in names_cut:
            value = getattr(common, name, None)
            if name in names and value is not None:
                changes[name] = value[cut]
    return dataclasses.replace(
        common,
        query_start_loc=common.query_start_loc[first : last + 1] - begin,
        query_start_loc_cpu=common.query_start_loc_cpu[first : last + 1] - begin,
        num_reqs=last - first,
        num_actual_tokens=end - begin,
        max_query_len=max(query_lens[first:last]),
        max_seq_len=max(seq_lens[first:last]),
        **changes,
    )


def as_in_batch(part: Any, whole: Any) -> Any:
    """Metadata of some rows, launched as within their batch: FLASH_ATTN would split a small part into many
    pieces, whose sums take memory that profiling has not seen."""
    if hasattr(whole, "max_num_splits"):
        part.max_num_splits = whole.max_num_splits
    return part
