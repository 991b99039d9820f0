"""The servers that are asked: each backend's, started and ended here, or one that runs already."""

import contextlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ... import step_log
from ...cli.server import Server, ServerError
from ...plan import causal_pairs
from ..capture import Source
from .answers import Answer
from .client import Client
from .prompt import Prompt, TaskError

FLAGS = {"s2o": ("--attention-backend", "CUSTOM"), "dense": ()}
"""By the name that the table uses. Without a flag, vLLM chooses its own backend."""
OURS = "s2o: "
"""In every line that the plugin logs, of which a dense server has none."""
START_SECONDS = 600
CPU_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "2"}
"""GiB, unless the environment says something else; nothing on a GPU."""


@dataclass
class Backend:
    """A server that answers."""

    client: Client
    log: Callable[[], str] | None = None
    """What the server has said so far; None where nobody knows."""
    ours: bool = False
    """Whether it has S2O for certain, and then says so, unless its log leaves out such lines."""

    def ask(self, prompts: Sequence[Prompt]) -> tuple[list[Answer], tuple[int, int] | None]:
        """Answers, and the visited and causal pairs of their prefills; None where nobody knows."""
        before = len(self.log()) if self.log else 0
        answers = self.client.ask(prompts)
        if self.log is None:
            return answers, None
        if OURS in self.log():  # lines are held back: the next prompts' must not take their place
            time.sleep(2 * step_log.LOG_INTERVAL)
        elif self.ours:
            return answers, None
        return answers, pairs(prompts, self.log()[before:])


def pairs(prompts: Sequence[Prompt], log: str) -> tuple[int, int] | None:
    """Visited and causal pairs of prompts, per head: of a prompt that no line names, all. None where the log has steps
    but no prompts, as under Ray's older executor."""
    told = step_log.prompts(log)
    if not told and step_log.prefills(log):
        return None
    # A prompt that was asked again may be told twice, and others may ask the same server.
    by_length: dict[int, list[step_log.Told]] = {}
    for one in told:
        by_length.setdefault(one.prompt, []).append(one)
    causal, skipped = 0, 0.0
    for length in (len(prompt.ids) for prompt in prompts):
        causal += causal_pairs(length, length)
        if by_length.get(length):
            one = by_length[length].pop()
            skipped += (1 - one.density) * causal_pairs(length - one.cached, length)
    return round(causal - skipped), causal


@contextlib.contextmanager
def started(
    backend: str, model: str, args: Sequence[str], logs: Path | None = None, concurrency: int = 1
) -> Iterator[Backend]:
    """A server of ours, gone afterwards.

    Args:
        args: for `vllm serve`, beside the backend's flag.
        logs: folder that keeps its log.

    Raises:
        TaskError: it does not come up.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        env = {name: value for name, value in CPU_CACHE.items() if name not in os.environ}
        # A prompt of one backend must not be answered from what an earlier prompt left.
        args = ["--no-enable-prefix-caching", *FLAGS[backend], *args]
        server = Server(model, folder / f"tasks-{backend}.log", args, env, name="model", start_seconds=START_SECONDS)
        try:
            with server:
                client = Client(str(server.client.base_url), "model", concurrency)
                yield Backend(client, lambda: server.log, ours=backend == "s2o")
                client.close()
        except ServerError as error:
            reason = str(error).strip().splitlines()
            raise TaskError(f"The server of {backend} does not come up: {reason[0]} ... {reason[-1]}") from error


@contextlib.contextmanager
def running(url: str, name: str | None, log: Path | None = None, concurrency: int = 1) -> Iterator[Backend]:
    """A server of someone else's.

    Args:
        name: as in `Client`.
        log: the file that it writes its log to.

    Raises:
        TaskError: there is none, or no such file.
    """
    if log and not log.is_file():
        raise TaskError(f"There is no log {log}.")
    client = Client(url, name, concurrency)
    yield Backend(client, (lambda: log.read_text(errors="replace")) if log else None)
    client.close()


def extension(source: Source, length: int) -> list[str]:
    """Arguments of a server that extend a model's context by YaRN; none where `length` fits into it.

    Args:
        source: the model, opened for `length` tokens.
    """
    if source.rope_factor == 1:
        return []
    config = source.config.get_text_config()
    # vLLM takes YaRN's factor as contained in the length of the context; 0.25.1 sees the length before it as well.
    overrides = {"rope_parameters": config.rope_parameters, "max_position_embeddings": config.max_position_embeddings}
    return ["--hf-overrides", json.dumps(overrides), "--max-model-len", str(length)]
