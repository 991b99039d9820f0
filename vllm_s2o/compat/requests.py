"""What a request asks for and carries through vLLM, and which requests a step computes."""

from __future__ import annotations

import copy
import functools
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any

REQUEST_KEY = "s2o"
"""Among a request's extra arguments. They reach the ranks with its parameters; attention metadata knows no request."""


def _extras(params) -> dict[str, Any]:
    """A client's `vllm_xargs`, and what a pooling request has in their place."""
    return getattr(params, "extra_args", None) or getattr(params, "extra_kwargs", None) or {}


def wish_problem(params) -> str | None:
    """Why a client may not ask for this, or None."""
    given = _extras(params).get(REQUEST_KEY)
    if given in (None, "dense"):
        return None
    return f"The extra argument '{REQUEST_KEY}' of a request cannot be {given!r}; allowed is 'dense'."


def keep_decisions() -> None:
    """What comes in pieces (vLLM's streaming input) has its first piece's decision in all of them: vLLM gives it each
    piece's parameters, but keeps its keys and values and their salt."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if getattr(Scheduler._update_request_as_session, "s2o", False):
        return
    update_session = Scheduler._update_request_as_session

    def _update_request_as_session(self, session, update):
        decision = mark_of(session)
        update_session(self, session, update)
        if mark_of(session) != decision:
            _set_mark(session, decision)

    hook: Any = _update_request_as_session
    hook.s2o = True
    Scheduler._update_request_as_session = hook


def follow_requests(admit: Callable[[Any, Any, Any], None], started: Callable[[Any], Any], load: bool = False) -> None:
    """Call `admit` with the configuration, each request that enters an engine, and what `started` said of the
    configuration when the engine was built; whatever its flags.

    Args:
        load: make it so in this process; otherwise only if it has an engine, whose module is heavy.
    """
    if not load and "vllm.v1.engine.core" not in sys.modules:
        return
    from vllm.v1.engine.core import EngineCore

    keep_decisions()
    if getattr(EngineCore.preprocess_add_request, "s2o", False):
        return
    preprocess, initialize = EngineCore.preprocess_add_request, EngineCore._initialize_kv_caches

    # An engine's `__init__` loads the plugins, and calls this one afterwards, in which its workers read the config.
    def _initialize_kv_caches(self, *args, **kwargs):
        done = initialize(self, *args, **kwargs)
        self.s2o_started = started(self.vllm_config)
        return done

    def preprocess_add_request(self, request):
        if not hasattr(self, "s2o_started"):  # the engine was built before this process had the hooks
            self.s2o_started = started(self.vllm_config)
        admit(self.vllm_config, request, self.s2o_started)
        return preprocess(self, request)

    hook: Any = preprocess_add_request
    hook.s2o = True
    EngineCore.preprocess_add_request = hook
    EngineCore._initialize_kv_caches = _initialize_kv_caches


def wish(engine_request) -> Any:
    """What a request's extra arguments hold for S2O."""
    return _extras(engine_request.sampling_params or engine_request.pooling_params).get(REQUEST_KEY)


def wrong_wish(engine_request) -> str | None:
    return wish_problem(engine_request.sampling_params or engine_request.pooling_params)


def refuse_lost_wishes() -> None:
    """Refuse beam search where a request has a wish, in a process that talks to clients. vLLM asks its engine for each
    beam anew, without the extra arguments of the request: the wish would be lost."""
    for name, module in list(sys.modules.items()):
        if name.startswith("vllm.entrypoints.") and name.endswith(".protocol"):
            for kind in vars(module).values():
                convert = vars(kind).get("to_beam_search_params") if isinstance(kind, type) else None
                if convert is not None and not getattr(convert, "s2o", False):
                    kind.to_beam_search_params = _without_wish(convert)


def _without_wish(convert: Callable) -> Callable:
    @functools.wraps(convert)
    def to_beam_search_params(self, *args, **kwargs):
        if REQUEST_KEY in (getattr(self, "vllm_xargs", None) or {}):
            from vllm.exceptions import VLLMValidationError

            problem = f"The extra argument '{REQUEST_KEY}' of a request cannot be had with beam search."
            raise VLLMValidationError(problem, parameter="vllm_xargs")
        return convert(self, *args, **kwargs)

    hook: Any = to_beam_search_params
    hook.s2o = True
    return hook


def _set_mark(request, value: str | None) -> None:
    """Of vLLM's request, or of the engine's. None removes it."""
    kind = "sampling_params" if request.sampling_params is not None else "pooling_params"
    params = copy.copy(getattr(request, kind))  # requests may share their parameters
    extras = {name: given for name, given in _extras(params).items() if name != REQUEST_KEY}
    if value is not None:
        extras[REQUEST_KEY] = value
    setattr(params, "extra_args" if kind == "sampling_params" else "extra_kwargs", extras or None)
    setattr(request, kind, params)


def mark(engine_request, value: str | None, salt: str) -> None:
    """Note a decision among the extra arguments, and keep the request's blocks apart in caches of keys and values."""
    if value is not None:
        _set_mark(engine_request, value)
    given = engine_request.cache_salt
    engine_request.cache_salt = f"{salt}-{given}" if given else salt


def kv_connectors(vllm_config) -> list[str]:
    """The connectors through which keys and values leave this engine, or come from elsewhere."""
    transfer = vllm_config.kv_transfer_config
    if transfer is None or transfer.kv_connector is None:
        return []
    if transfer.kv_connector_module_path:  # which counts before vLLM's own of that name
        return [f"{transfer.kv_connector_module_path}.{transfer.kv_connector}"]
    several = transfer.kv_connector_extra_config.get("connectors", ())
    named = [(one.get("kv_connector_module_path"), one.get("kv_connector", "unknown")) for one in several]
    return [".".join(filter(None, one)) for one in named] or [transfer.kv_connector]


SALTED_STORES = {"OffloadingConnector", "SimpleCPUOffloadConnector", "MooncakeStoreConnector", "LMCacheMPConnector"}
"""Connectors that never mix the blocks of two salts: their keys are block hashes, which the salt is part of, or hold
the salt itself."""

HANDING_OVER = {"NixlConnector", "NixlPullConnector", "NixlPushConnector", "MooncakeConnector", "MoRIIOConnector"}
"""Connectors that hand a request's blocks to one other engine, which caches them under the salt that it gives the
request itself."""


def unseen_steps(vllm_config) -> str | None:
    """Why steps of this engine cannot be told apart by request, or None."""
    from vllm import envs

    # Ray's older executor hands a step to the model runner itself, past what `watch_steps` watches.
    newer = getattr(envs, "VLLM_USE_RAY_V2_EXECUTOR_BACKEND", True)  # 0.33 has no other one
    if vllm_config.parallel_config.distributed_executor_backend == "ray" and not newer:
        return "Ray's older executor (VLLM_USE_RAY_V2_EXECUTOR_BACKEND=0) does not show the steps of an engine"
    return None


def watch_steps(begin: Callable[[Any, Any], None], end: Callable[[], None]) -> None:
    """Call `begin` with what the scheduler says of a step, and with the model runner, before this process's worker
    computes it, and `end` after it. Warm-up and dummy batches go another way."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase

    if getattr(WorkerWrapperBase.execute_model, "s2o", False):
        return
    execute = WorkerWrapperBase.execute_model

    def execute_model(self, scheduler_output, *args, **kwargs):
        begin(scheduler_output, self.worker.model_runner)
        try:
            return execute(self, scheduler_output, *args, **kwargs)
        finally:
            end()

    hook: Any = execute_model
    hook.s2o = True
    WorkerWrapperBase.execute_model = hook


def mark_of(new_request) -> str | None:
    """The decision that a request carries."""
    return _extras(new_request.sampling_params or new_request.pooling_params).get(REQUEST_KEY)


def prompt_length(new_request) -> int:
    """Tokens of a prompt, which may be given as numbers or as embeddings."""
    if new_request.prompt_token_ids is not None:
        return len(new_request.prompt_token_ids)
    return 0 if new_request.prompt_embeds is None else len(new_request.prompt_embeds)


def row_requests(runner, common, query_lens: Sequence[int], scheduled: dict[str, int]) -> list[str] | None:
    """The request of each row of a step, or None where that cannot be told.

    Args:
        query_lens: of the rows, rows of padding (of length 0) included.
        scheduled: new tokens of each request of the step, as the scheduler has them.
    """
    padding = [""] * len(query_lens)
    places = getattr(common, "req_idx", None)
    if places is not None:  # model runner V2, from 0.30 on
        named = map(runner.req_states.index_to_req_id.get, places.tolist())
        return [name or "" for name in itertools.islice(itertools.chain(named, padding), len(query_lens))]
    ids = _sorted_by_tokens(query_lens, scheduled) if hasattr(runner, "req_states") else runner.input_batch.req_ids
    # A step may be cut into micro-batches, or shared with other ranks: then its rows are not the scheduler's.
    count = len(scheduled)
    if list(map(scheduled.get, ids[:count])) != list(query_lens[:count]) or any(query_lens[count:]):
        return None
    return [*ids[:count], *padding[count:]]


def _sorted_by_tokens(query_lens: Sequence[int], scheduled: dict[str, int]) -> list[str]:
    """Rows of model runner V2 before 0.30: by new tokens, and those with as many in the scheduler's order."""
    of_length: dict[int, list[str]] = {}
    for name, length in scheduled.items():
        of_length.setdefault(length, []).append(name)
    rows = {length: iter(names) for length, names in of_length.items()}
    return [next(rows.get(length, iter(())), "") for length in query_lens]
