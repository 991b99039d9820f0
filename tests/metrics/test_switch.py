"""Sparse or dense: decided for each request where it enters the engine."""

import copy
import importlib
import inspect
from types import SimpleNamespace

import pytest
from entering import carried, decided, request
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import Request, RequestStatus
from vllm_configs import configured

import vllm_s2o
from vllm_s2o import compat, plugin
from vllm_s2o.compat import requests
from vllm_s2o.metrics import place
from vllm_s2o.metrics.figures import figures
from vllm_s2o.metrics.switch import SALT, set_switch
from vllm_s2o.plugin import admit

# -- the switch -------------------------------------------------------------------------------------------------------


def test_off_and_on_again(server):
    config = configured()
    assert (carried(decided(config)), figures().on) == (None, True)
    set_switch(False)
    assert (carried(decided(config)), figures().on) == ("off", False)
    set_switch(False)
    set_switch(True)
    assert (carried(decided(config)), figures().on) == (None, True)
    set_switch(True)


def test_another_process_switches(server):
    """The command finds the server; the engine looks at each request."""
    (found,) = place.running()
    set_switch(False, found)
    assert carried(decided(configured())) == "off"
    assert not place.running()[0].on
    vllm_s2o.set_switch(True)
    assert carried(decided(configured())) is None


def test_a_request_keeps_its_path(server):
    before = decided(configured())
    set_switch(False)
    after = decided(configured())
    set_switch(True)
    assert (carried(before), carried(after)) == (None, "off")


def test_without_a_directory_s2o_stays_on(monkeypatch):
    assert carried(decided(configured())) is None


# -- what a request asks for ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", [False, True])
def test_a_request_asks_for_dense_attention(server, pooling):
    entered = decided(configured(), extra={"s2o": "dense", "other": 1}, pooling=pooling)
    assert carried(entered) == "dense"
    params = entered.pooling_params if pooling else entered.sampling_params
    assert (params.extra_kwargs if pooling else params.extra_args) == {"s2o": "dense", "other": 1}


def test_a_wish_counts_more_than_the_switch(server):
    """Both are dense; the figures are to say who wanted it."""
    set_switch(False)
    assert carried(decided(configured(), extra={"s2o": "dense"})) == "dense"


def test_parameters_that_requests_share_are_not_changed(server):
    shared = SamplingParams(extra_args={"other": 1})
    set_switch(False)
    first = request(sampling_params=shared)
    admit(configured(), first, None)
    assert shared.extra_args == {"other": 1}
    assert first.sampling_params.extra_args == {"other": 1, "s2o": "off"}


@pytest.mark.parametrize("given", ["sparse", "off", "on", True, 1, ["dense"]])
@pytest.mark.parametrize("pooling", [False, True])
def test_other_wishes_are_refused(given, pooling):
    params = request(extra={"s2o": given}, pooling=pooling).params
    sentence = requests.wish_problem(params)
    assert sentence == f"The extra argument 's2o' of a request cannot be {given!r}; allowed is 'dense'."


@pytest.mark.parametrize("extra", [None, {}, {"other": 1}, {"s2o": "dense"}])
def test_the_rest_is_let_through(extra):
    assert requests.wish_problem(SamplingParams(extra_args=extra)) is None


# -- the hooks --------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine(monkeypatch, server):
    """As much of vLLM's engine as handles a new request."""
    for name in ("preprocess_add_request", "_initialize_kv_caches"):
        monkeypatch.setattr(EngineCore, name, getattr(EngineCore, name))
    monkeypatch.setattr(Scheduler, "_update_request_as_session", Scheduler._update_request_as_session)
    requests.follow_requests(plugin.admit, plugin.hash_for_stores, load=True)
    made = object.__new__(EngineCore)
    made.mm_receiver_cache = None
    made.request_block_hasher = None
    made.vllm_config = configured()
    return made


def test_a_request_is_decided_before_the_engine_keeps_it(engine):
    set_switch(False)
    kept, _ = engine.preprocess_add_request(request())
    assert (kept.cache_salt, kept.sampling_params.extra_args) == (SALT, {"s2o": "off"})


def test_an_engine_without_the_flag_is_left_alone(engine):
    set_switch(False)
    engine.vllm_config.attention_config = SimpleNamespace(backend=None)
    kept, _ = engine.preprocess_add_request(request(extra={"s2o": "dense"}))
    assert kept.cache_salt is None


def test_the_engine_is_hooked_once(engine):
    once = EngineCore.preprocess_add_request, Scheduler._update_request_as_session
    requests.follow_requests(plugin.admit, plugin.hash_for_stores, load=True)
    assert (EngineCore.preprocess_add_request, Scheduler._update_request_as_session) == once


ASKS = {"s2o": "dense"}


@pytest.fixture
def scheduler(monkeypatch, engine):
    """As much of vLLM's scheduler as adds a request, or a piece to one that it has."""
    made = object.__new__(Scheduler)
    made.requests, made.hash_block_size = {}, 16
    made.num_waiting_for_streaming_input, made.log_stats, made.connector = 0, False, None
    made.spec_decode_metrics_level = "none"
    monkeypatch.setattr(made, "_enqueue_waiting_request", lambda request: None, raising=False)
    return made


@pytest.fixture
def piece(engine, scheduler):
    """Give a piece of a session to the engine; returned is the session."""

    def piece(extra=None, waits=True) -> Request:
        params = SamplingParams(extra_args=extra)
        entered, _ = engine.preprocess_add_request(request(sampling_params=params, resumable=True))
        scheduler.add_request(entered)
        session = scheduler.requests["a"]
        assert params.extra_args == extra, "other pieces may have the same"
        if waits:
            session.status = RequestStatus.WAITING_FOR_STREAMING_REQ
            scheduler.num_waiting_for_streaming_input += 1
        return session

    return piece


@pytest.mark.parametrize(("first", "then"), [(True, False), (False, True)])
def test_a_session_keeps_the_path_of_its_first_piece(piece, first, then):
    """As it keeps its keys and values, and their salt."""
    set_switch(first)
    session = piece()
    decided = (requests.mark_of(session), session.cache_salt)
    assert decided == ((None, None) if first else ("off", SALT))
    for on in (then, first, then):
        set_switch(on)
        assert piece() is session
        assert (requests.mark_of(session), session.cache_salt) == decided
    assert session.num_prompt_tokens == 4 * 64


@pytest.mark.parametrize(("first", "then", "mark"), [(ASKS, None, "dense"), (None, ASKS, None), (ASKS, ASKS, "dense")])
def test_a_session_is_what_its_first_piece_asks_for(piece, first, then, mark):
    piece(first)
    session = piece(then)
    assert requests.mark_of(session) == mark


def test_other_arguments_are_each_pieces_own(piece):
    piece({"s2o": "dense", "other": 1})
    assert piece({"other": 2}).sampling_params.extra_args == {"s2o": "dense", "other": 2}


def test_a_piece_that_waits_for_its_turn_changes_nothing_either(piece, scheduler):
    """vLLM puts it into the session when the one before it is answered."""
    session = piece(ASKS, waits=False)
    piece(waits=False)
    (update,) = session.streaming_queue
    scheduler._update_request_as_session(session, update)
    assert requests.mark_of(session) == "dense"


def test_the_next_request_of_that_name_is_decided_anew(piece, scheduler):
    piece(ASKS)
    del scheduler.requests["a"]
    assert requests.mark_of(piece()) is None


@pytest.mark.parametrize("backend", ["ray", "mp", "uni"])
def test_steps_are_seen_but_for_rays_older_executor(backend, monkeypatch):
    config = configured()
    config.parallel_config.distributed_executor_backend = backend
    assert requests.unseen_steps(config) is None
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    assert (requests.unseen_steps(config) is not None) == (backend == "ray")


@pytest.fixture
def older_ray(monkeypatch):
    """How an engine's steps are handed out."""
    monkeypatch.setenv("VLLM_USE_RAY_V2_EXECUTOR_BACKEND", "0")
    return "ray"


def test_where_no_step_is_seen_a_wish_is_refused_and_the_switch_has_no_effect(engine, older_ray):
    """Rather than ignored: no rank would see it."""
    engine.vllm_config.parallel_config.distributed_executor_backend = older_ray
    with pytest.raises(RuntimeError, match="Ray's older executor"):
        engine.preprocess_add_request(request(extra={"s2o": "dense"}))
    set_switch(False)  # of another engine of this program, which came first
    kept, _ = engine.preprocess_add_request(request())
    assert (kept.cache_salt, kept.sampling_params.extra_args) == (None, None)


def test_unseen_steps_are_warned_of(monkeypatch, older_ray):
    lines = []
    monkeypatch.setattr(compat.logger(), "warning", lambda line, *values: lines.append(line % values))
    config = configured()
    config.parallel_config.distributed_executor_backend = older_ray
    plugin.check(config)
    (line,) = [line for line in lines if "older executor" in line]
    assert line.startswith("s2o: no switch, no dense requests, and figures without requests: ")
    for server in (None, *place.running()):
        with pytest.raises(RuntimeError, match="S2O cannot be switched on and off here: Ray's older executor"):
            set_switch(False, server)
    assert place.here().on and figures().on


def test_a_wish_that_no_platform_has_looked_at_is_refused_by_the_engine(server):
    """One frontend of vLLM's is no Python. Marks of our own are no wishes."""
    for wish in ("off", "sparse", 1):
        entered = request(extra={"s2o": wish})
        with pytest.raises(RuntimeError, match="allowed is 'dense'"):
            admit(configured(), entered, None)


BEAM_SEARCH = {
    "openai.completion": ("CompletionRequest", {"prompt": "a"}),
    "openai.chat_completion": ("ChatCompletionRequest", {"messages": [{"role": "user", "content": "a"}]}),
    "speech_to_text.transcription": ("TranscriptionRequest", {}),
    "speech_to_text.translation": ("TranslationRequest", {}),
}


@pytest.mark.parametrize("name", BEAM_SEARCH)
def test_beam_search_with_a_wish_is_refused(name, monkeypatch):
    """vLLM asks for each beam anew, without the wish."""
    kind_name, fields = BEAM_SEARCH[name]
    kind = getattr(importlib.import_module(f"vllm.entrypoints.{name}.protocol"), kind_name)
    original = inspect.unwrap(kind.to_beam_search_params)  # whatever was done before
    monkeypatch.setattr(kind, "to_beam_search_params", original)
    for _ in range(2):
        requests.refuse_lost_wishes()

    def asked(**extra):
        made = kind.model_construct(**kind.model_construct().model_dump() | fields | {"model": "m"} | extra)
        return made.to_beam_search_params(8, {}), original(made, 8, {})

    for harmless in ({}, {"vllm_xargs": {"other": "1"}}):
        ours, theirs = asked(**harmless)
        assert ours == theirs
    with pytest.raises(VLLMValidationError, match="'s2o' of a request cannot be had with beam search"):
        asked(vllm_xargs={"s2o": "dense"})


def test_the_platform_refuses_a_wrong_wish(monkeypatch):
    """Where a client gets the sentence: in the process that talks to it."""
    from vllm import platforms

    class Platform:
        @classmethod
        def check_and_update_config(cls, vllm_config): ...

        @classmethod
        def validate_request(cls, processed_inputs, params): ...

        def is_cpu(self):
            return False

    monkeypatch.setattr(platforms, "current_platform", Platform())
    compat.install_hooks(lambda config: None)
    wrong = SamplingParams(extra_args={"s2o": "sparse"})
    Platform.validate_request({}, wrong)  # there is no flag
    Platform.check_and_update_config(configured())
    Platform.validate_request({}, SamplingParams(extra_args={"s2o": "dense"}))
    with pytest.raises(VLLMValidationError, match="allowed is 'dense'"):
        Platform.validate_request({}, wrong)


def test_a_copy_of_the_parameters_is_enough():
    """What `mark` counts on: the copy has a dictionary of its own afterwards."""
    params = SamplingParams(extra_args={"a": 1})
    other = copy.copy(params)
    other.extra_args = {"b": 2}
    assert params.extra_args == {"a": 1}
