"""Tasks asked of a real server: it counts the tokens that were sent, and its log tells what was sparse."""

import csv

import pytest
from serving import MODEL_NAME

from vllm_s2o.quality.tasks.run import measure

pytestmark = [pytest.mark.serving, pytest.mark.long]


def test_a_running_server(s2o, model, tmp_path):
    """A prompt below SmolLM2's min_seq_len, and one above."""
    measure(
        str(model), tmp_path / "tasks.csv", tasks=["niah_single_2"], lengths=[1024, 2600], samples=[1],
        backends=["s2o"], url=str(s2o.client.base_url), name=MODEL_NAME, log=s2o.log_path,
    )  # fmt: skip
    short, long, every = csv.DictReader((tmp_path / "tasks.csv").open(newline=""))
    assert (short["model"], short["backend"], short["length"], long["length"]) == (MODEL_NAME, "s2o", "1024", "2600")
    assert short["density"] == "1.000" and 0 < float(long["density"]) < 0.9
    assert float(every["score"]) > 0, "at least one of two numbers is found"
