"""Servers as the tests start them: small, on the CPU."""

from pathlib import Path

from vllm_s2o.cli import server

MODEL_NAME = "SmolLM2-135M-Instruct"
BASE_ARGS = [
    *("--enforce-eager", "--no-enable-prefix-caching", "--gpu-memory-utilization", "0.5"),
    *("--max-model-len", "8192", "--max-num-batched-tokens", "8192", "--max-num-seqs", "8"),
]
S2O = ("--attention-backend", "CUSTOM")
FP32 = ("--dtype", "float32")


class Server(server.Server):
    def __init__(self, model: Path, log: Path, args: tuple[str, ...] = (), env: dict[str, str] | None = None):
        env = {"VLLM_CPU_KVCACHE_SPACE": "2", **(env or {})}
        super().__init__(model, log, [*BASE_ARGS, *args], env, name=MODEL_NAME)
