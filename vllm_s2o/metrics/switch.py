"""Sparse or dense: decided once for each request, where it enters the engine.

The decision travels with the request's parameters to every rank, so that no rank decides by itself and none can differ,
and a request keeps its path whatever is switched meanwhile, also one that comes in pieces. What is dense by decision
gets a cache salt: vLLM's prefix cache then never gives it keys and values of a sparse run, nor the other way round.
"""

import logging
from typing import Any

from vllm_s2o.compat import requests
from vllm_s2o.metrics import place
from vllm_s2o.metrics.channel import write_alone
from vllm_s2o.metrics.figures import ENABLED

KEY = requests.REQUEST_KEY
ASKED, SWITCHED_OFF = "dense", "off"
"""What may stand under KEY: a client's wish, and what is put there while the switch is off."""

REASONS = {ASKED: "asked by the request", SWITCHED_OFF: "switched off"}

SALT_PREFIX = "s2o-"
SALT, ESCAPED_SALT = f"{SALT_PREFIX}dense", f"{SALT_PREFIX}sparse"
"""Of what is dense by decision; and of what is not and whose client gave a salt that looks like one from here."""


def set_switch(on: bool, server: place.Server | None = None) -> None:
    """Let new requests of a server be sparse, or not. By default of the engines of this program.

    Raises:
        LookupError: there is no such server.
        RuntimeError: its engines cannot be switched.
        OSError: the switch could not be set, and is as it was.
    """
    server = place.here() if server is None else server
    if server is None:
        raise LookupError("there is no engine with the S2O backend in this program")
    if server.fixed is not None:
        raise RuntimeError(f"S2O cannot be switched on and off here: {server.fixed}")
    if on:
        (server.directory / place.OFF).unlink(missing_ok=True)
    else:
        (server.directory / place.OFF).touch()
    show(server, on, logging.getLogger(__name__))


def show(server: place.Server, on: bool, logger: logging.Logger) -> None:
    """On /metrics. What is shown decides nothing: where it cannot be written, the logger has it."""
    try:
        write_alone(server.figures, f"{server.name}-switch", ENABLED, [({}, float(on))])
    except OSError as error:
        logger.warning("s2o: new prompts are %s, which /metrics does not show: %s.", "sparse" if on else "dense", error)


def admit(vllm_config: Any, engine_request: Any, config_hash: str | None) -> None:
    """Decide how a request that enters the engine is computed, and mark it.

    Args:
        config_hash: of the engine's config, where keys and values leave it through a connector, else None.
    """
    wrong = requests.wrong_wish(engine_request)
    if wrong is not None:  # of a client that no process of vLLM's API has asked, whose platform would have refused it
        raise RuntimeError(f"s2o: {wrong}")
    mark = None
    if requests.wish(engine_request) == ASKED:
        mark = ASKED
    elif place.switched_off():
        mark = SWITCHED_OFF
    problem = mark and requests.unseen_steps(vllm_config)
    if problem and mark == ASKED:
        raise RuntimeError(f"s2o: a request asks for dense attention, which cannot be had here: {problem}")
    if mark and not problem:
        requests.mark(engine_request, mark, SALT)
    elif config_hash is not None:
        requests.mark(engine_request, None, f"{SALT_PREFIX}{config_hash}")
    elif (engine_request.cache_salt or "").startswith(SALT_PREFIX):
        requests.mark(engine_request, None, ESCAPED_SALT)
