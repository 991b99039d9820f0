"""The whole calibration on a tiny model: budgets, the file, interruptions, and what it says of bad input."""

import json

import causal_lm
import pytest
import yaml

from vllm_s2o import model as models
from vllm_s2o import settings
from vllm_s2o.config import load_config
from vllm_s2o.quality import cost
from vllm_s2o.quality.calibration import Budget, CalibrationError, calibrate, curves
from vllm_s2o.quality.capture import open_model

TOKENS = 1024
# Random weights attend to everything: few rows at a time, and few keys, find a stop.
RULES = {"tile_size": 16, "key_block": 16, "stop_interval": 1}
SMALL = dict(texts=["prose"], num_tokens=TOKENS, segment_lens=[128], additional=RULES)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(causal_lm.save(tmp_path_factory.mktemp("llama"), initializer_range=0.1, max_position_embeddings=2048))


@pytest.fixture(scope="module")
def calibrated(checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated") / "tiny.yaml"
    return out, calibrate(checkpoint, out, Budget(max_relative_error=0.1), **SMALL)


def test_the_file_has_what_was_found(checkpoint, calibrated):
    out, found = calibrated
    config = load_config(settings.traits_of(models.read(checkpoint)), str(out))
    assert config.calibrated and "max_relative_error=0.1" in config.provenance
    assert not list(out.parent.glob("*.parts.jsonl")), "nothing is left beside it"
    written = yaml.safe_load(out.read_text())["provenance"]["calibration"]
    # Searched at this length, thresholds fall for longer prompts.
    assert config.params.reference_len == written["tokens"]
    assert written["texts"] == ["prose"] and written["tokens"] == TOKENS
    assert len(written["layer_density"]) == len(found.layers) == config.traits.num_layers
    group = config.traits.num_heads // config.traits.num_kv_heads
    for layer, choice in enumerate(found.layers):
        if choice.dense:
            assert config.layer(layer) is None
        else:
            taus = [found.thresholds[at] for at in choice.at for _ in range(group)]
            assert list(config.layer(layer).thresholds(config.traits.num_heads)) == taus


def test_the_budget_is_met(calibrated):
    _, found = calibrated
    assert all(choice.error <= 0.1 for choice in found.layers)
    assert any(not choice.dense and choice.density < 0.9 for choice in found.layers)
    assert found.single is None or found.density <= found.single[1] + 1e-9


def test_the_same_again(checkpoint, calibrated, tmp_path):
    out, found = calibrated
    again = tmp_path / "again.yaml"
    assert calibrate(checkpoint, again, Budget(max_relative_error=0.1), **SMALL) == found
    assert again.read_text() == out.read_text()


def test_a_density_is_reached(checkpoint, tmp_path):
    found = calibrate(checkpoint, tmp_path / "d.yaml", Budget(target_density=0.7), **SMALL)
    assert 0.4 < sum(choice.density for choice in found.layers) / len(found.layers) <= 0.7


def test_a_divergence_of_logits_is_kept(checkpoint, tmp_path):
    out = tmp_path / "kl.yaml"
    found = calibrate(checkpoint, out, Budget(max_logit_kl=0.05), **SMALL)
    config = load_config(settings.traits_of(models.read(checkpoint)), str(out))
    source = open_model(checkpoint, TOKENS)
    config = load_config(config.traits, {"config": str(out), "min_seq_len": 1})
    measured, _ = cost.measure(source.load(), source.prompt("prose", TOKENS, "choosing"), config)
    assert measured.kl == pytest.approx(found.kl, rel=1e-3) and measured.kl <= 0.05
    written = config.file.provenance.calibration["logit_kl_where_chosen"]
    assert written == pytest.approx(found.kl, rel=1e-2), "and says of which text it is"


def test_what_was_cut_off_goes_on(checkpoint, calibrated, tmp_path, monkeypatch):
    out, found = calibrated
    again = tmp_path / "cut.yaml"
    swept = []
    real = curves.sweep

    def cut(*args, **options):
        swept.append(1)
        if len(swept) == 3:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(curves, "sweep", cut)
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, again, Budget(max_relative_error=0.1), **SMALL)
    assert not again.exists() and len(again.with_name("cut.yaml.parts.jsonl").read_text().splitlines()) == 3
    assert calibrate(checkpoint, again, Budget(max_relative_error=0.1), **SMALL) == found
    assert again.read_text() == out.read_text()
    assert len(swept) == 3 + 2 * len(found.layers) - 2, "two layers were there already"


@pytest.mark.parametrize(
    "budget, options, said",
    [
        (Budget(), {}, "Exactly one budget is needed"),
        (Budget(0.1, 0.2), {}, "Exactly one budget is needed"),
        (Budget(max_relative_error=0.0), {}, "The budget max_relative_error=0 cannot be met"),
        (Budget(target_density=1.5), {}, "The budget target_density=1.5 cannot be met"),
        (Budget(target_density=1e-4), {}, "A density of 0.0001 cannot be reached: with segments of 128 tokens, "),
        (Budget(max_relative_error=0.1), {"texts": []}, "At least one text must be named"),
        (Budget(max_relative_error=0.1), {"num_tokens": 200}, "200 tokens hold no two segments of 128"),
        (Budget(max_relative_error=0.1), {"segment_lens": [100]}, "These parameters cannot be used: segment_len=100 "),
        (Budget(max_relative_error=0.1), {"texts": ["no such file"]}, "The text .*no such file"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_a_sentence(checkpoint, tmp_path, budget, options, said):
    with pytest.raises(CalibrationError, match=f"^{said}") as caught:
        calibrate(checkpoint, tmp_path / "x.yaml", budget, **{**SMALL, **options})
    assert "\n" not in str(caught.value) and not (tmp_path / "x.yaml").exists()


def test_an_empty_text_is_refused(checkpoint, tmp_path):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    with pytest.raises(CalibrationError, match=r"empty\.txt"):
        calibrate(checkpoint, tmp_path / "x.yaml", Budget(max_relative_error=0.1), **{**SMALL, "texts": [str(empty)]})


def test_parts_of_other_settings_are_not_mixed_in(checkpoint, tmp_path):
    parts = tmp_path / "x.yaml.parts.jsonl"
    parts.write_text(json.dumps({"settings": {"model": "another", "methods": {}}}) + "\n")
    with pytest.raises(CalibrationError, match="have other"):
        calibrate(checkpoint, tmp_path / "x.yaml", Budget(max_relative_error=0.1), **SMALL)
