"""`benchmarks/chunks.py`: cuts of a prompt, as sequences that share their pages."""

import argparse
import csv
import sys

import causal_lm
import pytest
import torch
from bench_modules import chunks

from vllm_s2o import S2OParams
from vllm_s2o.quality.capture import attention_inputs, dense_attention
from vllm_s2o.quality.cost import sparse_attention

PARAMS = S2OParams(dense_tail=0, threshold=0.1, segment_len=64, tile_size=32, key_block=16)


@pytest.fixture(scope="module")
def layer():
    ids = torch.randint(256, (500,), generator=torch.Generator().manual_seed(1)).tolist()
    return attention_inputs(causal_lm.make(), ids, [1])[0]


@pytest.mark.parametrize(
    "cut, expected",
    [("whole", [500]), ("200", [200, 400, 500]), ("250", [250, 500]), ("130+", [130, 500])],
)
def test_cuts(cut, expected):
    assert chunks.ends(cut, 500) == expected


def test_a_cut_at_a_segments_end_changes_nothing(layer):
    """Nor has any chunk but the last one a dense end."""
    found = chunks.measure(layer, PARAMS.model_copy(update={"dense_tail": 40}), ["whole", "128", "100", "350+"])
    assert found["128"] == pytest.approx(found["whole"])
    assert 0 < found["whole"].density < 1 and found["whole"].rel_error > 0
    assert found["100"] != pytest.approx(found["whole"]) and found["350+"] != pytest.approx(found["whole"])


def test_without_a_threshold_each_cut_is_dense(layer):
    exact = dense_attention(layer)
    for cut in ("whole", "100", "350+"):
        out, density = sparse_attention(layer, PARAMS.model_copy(update={"threshold": 0.0}), chunks.ends(cut, 500))
        torch.testing.assert_close(out, exact, atol=1e-4, rtol=1e-3)
        assert density == 1


def test_the_table(tmp_path, monkeypatch):
    model = causal_lm.save(tmp_path / "model")
    out = tmp_path / "chunks.csv"
    monkeypatch.setattr(chunks, "load_config", lambda traits: argparse.Namespace(layer=lambda index: PARAMS))
    arguments = ["--tokens", "300", "--layers", "0", "2", "--text", "code", "--cuts", "100"]
    monkeypatch.setattr(sys, "argv", ["chunks.py", str(model), "--out", str(out), *arguments])
    chunks.main()
    whole, cut = csv.DictReader(out.open(newline=""))
    assert (whole["cut"], whole["layers"], whole["error_vs_whole"], whole["density_vs_whole"]) == (
        "whole", "2", "1.000", "1.000",
    )  # fmt: skip
    assert cut["cut"] == "100" and 0 < float(cut["rel_error"]) < 0.5
    assert float(cut["error_vs_whole"]) == pytest.approx(float(cut["rel_error"]) / float(whole["rel_error"]), rel=0.01)


def test_a_cut_that_is_none_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["chunks.py", "model", "--out", "x.csv", "--cuts", "8192"])
    with pytest.raises(SystemExit):
        chunks.main()
    assert "a number from 1 to 8191, with + for one cut, not '8192'" in capsys.readouterr().err
