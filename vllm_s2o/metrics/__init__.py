"""What S2O did: figures for Prometheus and for programs, and a switch.

    place      the directory in which a server's processes meet
    channel    files that one process writes and another one reads
    figures    which figures there are
    prompts    which requests a step computes
    switch     sparse or dense, for each request

One process of a server reads the configuration, others compute, one or several are asked: none counts on being
another one.
"""

import atexit
import contextlib
import logging
import os
from pathlib import Path

from vllm_s2o.metrics import place

_shown: set[int] = set()
"""Processes whose registry has our figures: a forked one has its parent's."""


def begin(model: str, logger: logging.Logger, fixed: str | None = None) -> None:
    """Call where a configuration with the flag is read, before other processes start.

    Args:
        fixed: why its engines cannot be switched off, or None.
    """
    from prometheus_client import REGISTRY

    from vllm_s2o import compat
    from vllm_s2o.metrics import channel, switch

    before = place.current()
    try:
        directory = place.establish(model, started=compat.in_ray_actor(), fixed=fixed)
        compat.copy_to_ray(place.VARIABLE)
        server = place.here()
        if directory != before and server is not None:
            if server.figures != directory:
                _remove_figures(server.figures, logger)
                atexit.register(_leave, os.getpid(), server)
            switch.show(server, True, logger)
    except OSError as error:
        logger.warning("s2o: no figures and no switch: %s.", error)
        return
    if place.MERGED not in os.environ and not _shown & {os.getpid()}:
        _shown.add(os.getpid())
        with contextlib.suppress(ValueError):
            REGISTRY.register(channel.Collector(directory, logger))


def _remove_figures(directory: Path, logger: logging.Logger) -> None:
    """Those of servers that have ended, in the user's directory: they would add up with ours."""
    from vllm_s2o.metrics import channel

    try:
        channel.remove(directory, lambda name: not (name and place.lives(name)))
    except OSError as error:
        logger.warning("s2o: /metrics counts what an earlier server left in %s: %s.", directory, error)


def _leave(pid: int, server: place.Server) -> None:
    """This server's, at its end: whoever uses the directory next did not count them."""
    from vllm_s2o.metrics import channel

    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            channel.remove(server.figures, lambda name: name == server.name)
