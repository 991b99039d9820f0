"""Servers as the tests start them: small, on the CPU or on a GPU."""

import contextlib
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import torch
from bench_modules import servers
from installed import BACKEND_NAME
from processes import ROOT, make

from vllm_s2o.cli import server

MODEL_NAME = "SmolLM2-135M-Instruct"
MADE_HERE = ROOT / ".models" / MODEL_NAME
"""The checkpoint that `make serve` and `make test` make."""
CUDA = torch.cuda.is_available()
# Up to four servers live side by side, and each one takes its share of a GPU when it starts: with a cache of a given
# size it measures nothing while another one comes or goes. On the CPU the share only has to be free.
SHARE_OPTIONS = {"gpu_memory_utilization": 0.5}
if CUDA:
    SHARE_OPTIONS = {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 2**32}
SHARE = [part for name, value in SHARE_OPTIONS.items() for part in (f"--{name.replace('_', '-')}", str(value))]
DTYPE = re.findall(r"--dtype (\S+)", make("serve-command"))
"""What `make serve` says of it: nothing where the model's own type is fast."""
BASE_ARGS = [
    *("--enforce-eager", "--no-enable-prefix-caching", *SHARE, *(f"--dtype={name}" for name in DTYPE)),
    *("--max-model-len", "8192", "--max-num-batched-tokens", "8192", "--max-num-seqs", "8"),
    # As vLLM does by itself on one GPU; on a CPU it starts a process more, which imports all of it once more.
    *("--distributed-executor-backend", "uni"),
]
S2O = ("--attention-backend", "CUSTOM")
BY_NAME = ("--attention-backend", BACKEND_NAME)
EXACT = not CUDA
"""Whether there is a precision in which two ways to compute one thing agree: FLASH_ATTN takes no fp32."""
PRECISION = ("--dtype", "float32" if EXACT else "bfloat16")
KV_CACHE = {"VLLM_CPU_KVCACHE_SPACE": "1"}
"""GiB of each server: more than twice what 8,192 tokens take in fp32, for up to four servers live side by side."""


SMALL = servers.SHAPES["tiny"]
"""A model's config.json, without weights, for SmolLM2's tokenizer: where the model is not what is tried."""
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
"""For an engine without a server: two processes less, each of which imports vLLM for ten seconds. More threads in the
one would wait for each other."""


def write_small(model: Path, directory: Path) -> Path:
    """SMALL with the tokenizer and the chat template of a model."""
    (directory / "config.json").write_text(json.dumps(SMALL))
    for pattern in ("tokenizer*.json", "chat_template*"):
        for file in model.glob(pattern):
            shutil.copy(file, directory)
    return directory


class Server(server.Server):
    def __init__(self, model: Path, log: Path, args: tuple[str, ...] = (), env: dict[str, str] | None = None):
        env = KV_CACHE | (env or {})
        super().__init__(model, log, [*BASE_ARGS, *args], env, name=MODEL_NAME)


class MakeServe(server.Server):
    """The command of `make serve`, flag for flag, in the environment that the tests run in."""

    def __init__(self, log: Path, *settings: str):
        super().__init__("", log, env=KV_CACHE, name=MODEL_NAME)
        program, *args = shlex.split(make("serve-command", f"PORT={self.port}", *settings))
        self.command = [str(Path(sys.executable).with_name(Path(program).name)), *args]

    def launch(self) -> None:
        with contextlib.chdir(ROOT):  # the model's directory is relative
            super().launch()


# What `vllm serve` runs. vllm-cpu has no such command, and the module that stands for it has one API server at most.
_SERVE = """
import sys
from vllm.entrypoints.cli.serve import cmd_init
from vllm.utils.argparse_utils import FlexibleArgumentParser

if __name__ == "__main__":
    parser = FlexibleArgumentParser()
    (command,) = cmd_init()
    command.subparser_init(parser.add_subparsers())
    args = parser.parse_args(["serve", *sys.argv[1:]])
    command.validate(args)
    command.cmd(args)
"""


class VllmServe(Server):
    """With all that `vllm serve` can do."""

    def __init__(self, model: Path, log: Path, args: tuple[str, ...] = (), env: dict[str, str] | None = None):
        super().__init__(model, log, args, env)
        program = log.with_suffix(".py")  # processes that it spawns import the file again
        program.write_text(_SERVE)
        self.command[: len(server.vllm_command())] = [sys.executable, "-P", str(program)]
