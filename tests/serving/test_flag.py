"""Installing the package changes nothing until the flag is given."""

import re

import pytest

pytestmark = pytest.mark.serving


def imported(log: str) -> set[str]:
    """Modules of ours that a server's processes imported. Python lists those that an import statement names."""
    return set(re.findall(r"import time:\s+\d+ \|\s+\d+ \|\s+(vllm_s2o\S*)", log))


def test_nothing_of_ours_runs_without_the_flag(dense, s2o):
    dense.ask("Hello!")
    compat = {"vllm_s2o.compat", "vllm_s2o.compat.caches", "vllm_s2o.compat.requests"}
    registered = {"vllm_s2o", "vllm_s2o.version", "vllm_s2o.plugin", *compat}
    assert "vllm_s2o.compat" in imported(dense.log), "the plugin is not installed, so the test proves nothing"
    assert imported(dense.log) <= registered
    said = [line for line in dense.log.splitlines() if not line.startswith("import time:")]
    assert not [line for line in said if "s2o" in line.lower()]
    # The same look at a server with the flag does see what the backend imports.
    assert imported(s2o.log) >= {"vllm_s2o.plan", "vllm_s2o.config", "vllm_s2o.settings"}


def test_the_flag_is_told(s2o):
    assert "s2o: config smollm2-135m-instruct.yaml" in s2o.log
    assert "30 of 30 attention layers" in s2o.log


def test_a_short_prompt_is_told_once_why_it_stays_dense(s2o):
    for _ in range(2):
        s2o.ask("Hello!")
    assert s2o.log.count("shorter than min_seq_len") == 1
