"""Servers that several tests share: each starts once, when it is first asked for.

Requests go to one at a time: the suite is made for a machine with 2 cores.
"""

import json
import os
from pathlib import Path

import pytest
from serving import BY_NAME, MADE_HERE, PRECISION, S2O, Server

LIST_IMPORTS = {"PYTHONPROFILEIMPORTTIME": "1"}
"""The server's log then lists what its processes import."""


@pytest.fixture(scope="session")
def model() -> Path:
    """The checkpoint that is served: made here if it is missing."""
    from vllm_s2o.cli.prepare import prepare

    if "S2O_TEST_MODEL" in os.environ:
        return Path(os.environ["S2O_TEST_MODEL"])
    prepare(MADE_HERE)
    return MADE_HERE


@pytest.fixture(scope="session")
def count_tokens(model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return lambda text: len(tokenizer(text).input_ids)


@pytest.fixture(scope="session")
def log_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def dense(model, log_dir):
    """Without the flag."""
    with Server(model, log_dir / "dense.log", env=LIST_IMPORTS) as server:
        yield server


@pytest.fixture(scope="session")
def s2o(model, log_dir):
    """With the flag, as shipped."""
    with Server(model, log_dir / "s2o.log", S2O, LIST_IMPORTS) as server:
        yield server


@pytest.fixture(scope="module")
def s2o_tau0(model, log_dir):
    """Nothing is ever skipped, on the sparse path all the same; prompts in chunks, for which no border may matter.
    By the backend's other name."""
    exact = {"threshold": 0, "min_seq_len": 512}
    args = (*BY_NAME, "--additional-config", json.dumps({"s2o": exact}))
    with Server(model, log_dir / "s2o_tau0.log", (*PRECISION, *args, "--max-num-batched-tokens", "450")) as server:
        yield server
