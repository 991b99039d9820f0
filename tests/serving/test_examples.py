"""Examples that need no GPU, run as their headers say: a server's config file, the client, and vLLM as a library."""

import json
import re
import subprocess
import sys

import pytest
from processes import CHANGED, ROOT, without
from serving import DTYPE, KV_CACHE, ONE_PROCESS, SHARE_OPTIONS, Server, write_small

from vllm_s2o.quality.needles import needle
from vllm_s2o.step_log import prefills

pytestmark = [pytest.mark.serving, pytest.mark.long]

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def served(model, log_dir):
    """Nothing of S2O on its command line."""
    with Server(model, log_dir / "example.log", ("--config", str(EXAMPLES / "serve_config.yaml"))) as server:
        yield server


def run(name: str, *arguments: str, cwd, **env: str) -> str:
    """What an example prints, vLLM's log included."""
    environment = without(*CHANGED) | {"HF_HUB_OFFLINE": "1"} | env
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_a_config_file_gives_all_options(served):
    assert 's2o: overridden by --additional-config "s2o": min_seq_len, params.dense_tail' in served.log
    assert "min_seq_len=2048" in served.log


def test_the_client_has_an_answer_from_a_long_document(served, count_tokens, tmp_path):
    asked = needle(2300, 0.5, 3, count_tokens)
    text, question = asked.prompt.rsplit("\n\n", 1)
    document = tmp_path / "document.txt"
    document.write_text(text)
    url = str(served.client.base_url)
    said = run("openai_client.py", str(document), question, "--url", url, "--max-tokens", "24", cwd=tmp_path)
    answer, told = said.rstrip().split("\n\n")
    assert asked.number in answer
    tokens, seconds = re.fullmatch(r"(\d+) tokens, first word after ([\d.]+) s", told).groups()
    (step,) = prefills(served.log)
    assert step.query_lens == (int(tokens),)
    assert 0 < step.density < 0.8
    assert float(seconds) > 0


def test_vllm_as_a_library(model, tmp_path):
    """With a model that knows nothing: the prompt is prefilled by S2O in all layers, and there is an answer."""
    (tmp_path / "small").mkdir()
    engine = {
        "load_format": "dummy", "enforce_eager": True, "max_model_len": 4096, **SHARE_OPTIONS,
        "distributed_executor_backend": "uni", **({"dtype": DTYPE[0]} if DTYPE else {}),
    }  # fmt: skip
    said = run(
        "offline_llm.py", str(write_small(model, tmp_path / "small")), "--tokens", "2300", "--engine",
        json.dumps(engine), cwd=tmp_path, **KV_CACHE, **ONE_PROCESS,
    )  # fmt: skip
    (tokens,) = re.findall(r"^prompt: (\d+) tokens, of which one sentence holds the number \d{5}$", said, re.MULTILINE)
    assert re.search("^answer: .+", said, re.MULTILINE)
    steps = prefills(said)
    assert sum(length for step in steps for length in step.query_lens) == int(tokens) >= 2048
    assert {(step.sparse_layers, step.num_layers) for step in steps} == {(3, 3)}
