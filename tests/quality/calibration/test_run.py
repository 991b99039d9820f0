"""What calibration promises, on a model that is worth one: it beats a single threshold, and its figures are true."""

import functools
import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from calibration_case import TASK, TOKENS

from vllm_s2o.config import ModelTraits, S2OParams, load_config
from vllm_s2o.config_file import DIMENSIONS
from vllm_s2o.quality import cost
from vllm_s2o.quality.calibration import Budget, CalibrationError, calibrate, choose, curves, run, speed
from vllm_s2o.quality.calibration.search import Choice
from vllm_s2o.quality.capture import model_traits, open_model
from vllm_s2o.quality.sweep import sweep

ERROR = Budget(max_relative_error=0.02)
LAYERS = 3


def parts(out):
    return out.with_name(out.name + ".parts.jsonl")


def config_of(checkpoint, out):
    source = open_model(checkpoint, TOKENS)
    return load_config(model_traits(checkpoint, source.config), str(out))


@pytest.fixture
def swept(monkeypatch):
    """The layers that are swept, of a run that goes on only those that were left."""
    seen = []

    def counted(*args, **kwargs):
        seen.append(kwargs["chosen"])
        return sweep(*args, **kwargs)

    monkeypatch.setattr(curves, "sweep", counted)
    return seen


# -- promises ---------------------------------------------------------------------------------------------------------


def test_every_layer_is_within_the_error_and_few_pairs_are_visited(calibrated):
    _, found = calibrated
    assert all(choice.error <= ERROR.max_relative_error for choice in found.layers)
    assert max(choice.error for choice in found.layers) > 0.7 * ERROR.max_relative_error
    assert len({choice.at for choice in found.layers}) == LAYERS, "each layer has its own"


def test_it_beats_the_best_single_threshold_on_held_out_text(calibrated):
    _, found = calibrated
    _, density = found.single
    assert found.density < 0.95 * density


def test_what_is_told_of_held_out_text_is_what_a_whole_run_costs(checkpoint, calibrated):
    """Tiles were looked at by chance and layers got dense inputs; `cost` runs all of the prompt, errors adding up."""
    out, found = calibrated
    source = open_model(checkpoint, TOKENS)
    model = source.load(torch.device("cpu"))
    _, layers = cost.measure(model, source.prompt("code", TOKENS, "held-out"), config_of(checkpoint, out))
    for layer, choice in zip(layers, found.held_out, strict=True):
        assert layer.density == pytest.approx(choice.density, rel=0.15)
        assert 0.3 < layer.rel_error / choice.error < 3


def test_a_candidate_is_measured_without_the_shipped_file():
    """SmolLM2's has thresholds by layer and head: a candidate's alone must hold when logits are compared."""
    traits = ModelTraits("SmolLM2-135M-Instruct", "LlamaForCausalLM", 30, 9, 3, 64)
    assert load_config(traits).layer(0).threshold != 0.02
    choices = [Choice((1, 1, 1), 0.5, 0.01)] * 29 + [Choice((1, 0, 1), 0.5, 0.01)]
    config = choose.as_config(traits, choices, S2OParams(dense_tail=0, segment_len=256), (0.01, 0.02))
    assert [config.layer(layer).threshold for layer in (0, 28)] == [0.02, 0.02]
    assert config.layer(29).threshold == (*[0.02] * 3, *[0.01] * 3, *[0.02] * 3)
    assert config.params.segment_len == 256 and config.min_seq_len == 1


# -- again ------------------------------------------------------------------------------------------------------------


def test_another_seed_looks_at_other_tiles(checkpoint, calibrated, tmp_path):
    _, found = calibrated
    other = calibrate(checkpoint, tmp_path / "a.yaml", ERROR, seed=1, **TASK)
    assert other.layers != found.layers
    assert other.density == pytest.approx(found.density, rel=0.2)


@pytest.mark.long
def test_runs_for_a_divergence_are_not_run_again(checkpoint, tmp_path, monkeypatch):
    out, ran, real = tmp_path / "a.yaml", [], cost.measure

    def once(*args):
        if len(ran) == 1:
            ran.append("interrupted")
            raise KeyboardInterrupt
        ran.append("ran")
        return real(*args)

    monkeypatch.setattr(choose.cost, "measure", once)
    budget = Budget(max_logit_kl=0.02)
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, out, budget, **TASK)
    lines = [json.loads(line) for line in parts(out).read_text().splitlines()]
    assert [line["text"].startswith("logits of ") for line in lines[1:]] == [False] * 2 * LAYERS + [True]
    found = calibrate(checkpoint, out, budget, **TASK)
    ran_in_all = ran.count("ran")
    ran.clear()
    monkeypatch.setattr(choose.cost, "measure", lambda *args: ran.append("ran") or real(*args))
    assert calibrate(checkpoint, tmp_path / "b.yaml", budget, **TASK) == found
    assert len(ran) == ran_in_all


@pytest.mark.parametrize(
    "changes, said", [({"seed": 1}, "seed"), ({"texts": ("prose",)}, "texts"), ({"segment_lens": (128,)}, "methods")]
)
def test_sweeps_with_other_settings_are_not_mixed(checkpoint, tmp_path, changes, said):
    out = tmp_path / "a.yaml"

    def cut(name: str, layers: int) -> None:
        if layers:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, out, ERROR, progress=cut, **TASK)
    with pytest.raises(CalibrationError, match=rf"^The sweeps in .*jsonl have other {said}: remove it, or name "):
        calibrate(checkpoint, out, ERROR, **TASK | changes)


# -- nonsense ---------------------------------------------------------------------------------------------------------


GIVEN = [
    ({"reference_len": 8192}, "params.reference_len"),
    ({"params": {"reference_len": None}}, "params.reference_len"),
    ({"threshold": 0.01}, "params.threshold"),
    ({"layers": [{"layers": 0, "threshold": "dense"}]}, "layers"),
    ({"segment_len": 256}, "params.segment_len"),
    ({"budget": 0.1}, "params.budget"),
    ({"min_seq_len": 512}, "min_seq_len"),
]
"""What is searched or set, which a user cannot give over the present config."""


@pytest.mark.parametrize(
    "budget, changes, said",
    [
        (Budget(target_density=1.0), {}, "The budget target_density=1 cannot be met: "),
        (Budget(max_logit_kl=float("nan")), {}, "The budget max_logit_kl=nan cannot be met: "),
        (ERROR, {"segment_lens": (200,)}, "These parameters cannot be used: segment_len=200 must be a multiple of "),
        (ERROR, {"segment_lens": (0,)}, "These parameters cannot be used: "),
        (ERROR, {"segment_lens": ()}, "At least one segment length must be named."),
        (ERROR, {"min_seq_len": 2**31}, "min_seq_len cannot be 2147483648: allowed is a number from 1 to 2147483647."),
        *(
            (ERROR, {"additional": given}, f"The field '{field}' cannot be given to a calibration: ")
            for given, field in GIVEN
        ),
    ],
)
def test_nonsense_is_told_in_a_sentence_before_anything_is_run(checkpoint, tmp_path, swept, budget, changes, said):
    with pytest.raises(CalibrationError) as caught:
        calibrate(checkpoint, tmp_path / "a.yaml", budget, **TASK | changes)
    assert str(caught.value).startswith(said) and str(caught.value).endswith(".") and "\n" not in str(caught.value)
    assert swept == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text, tokens", [("", 0), ("too short\n" * 60, 310)])
def test_a_text_that_is_too_short_is_told(checkpoint, tmp_path, text, tokens):
    (tmp_path / "own.txt").write_text(text)
    with pytest.raises(CalibrationError, match=rf"has {tokens} tokens, fewer than {TOKENS}: give a longer one\.$"):
        calibrate(checkpoint, tmp_path / "a.yaml", ERROR, **TASK | {"texts": (str(tmp_path / "own.txt"),)})
    assert [path.name for path in tmp_path.iterdir()] == ["own.txt"]


@pytest.mark.parametrize(
    "budget, said",
    [
        (Budget(max_relative_error=1e-12), "No layer can be sparse within this budget: nothing is written; "),
        pytest.param(
            Budget(max_logit_kl=1e-12),
            "No thresholds kept the divergence of logits at 1e-12 or below in ",
            marks=pytest.mark.long,
        ),
    ],
)
def test_budgets_that_turn_out_impossible_are_told(checkpoint, tmp_path, budget, said):
    """And that the next try need not begin anew."""
    out = tmp_path / "a.yaml"
    with pytest.raises(CalibrationError) as caught:
        calibrate(checkpoint, out, budget, **TASK)
    assert str(caught.value).startswith(said)
    assert str(caught.value).endswith(f"; the sweeps are kept in {parts(out)}, for the next try.")
    assert parts(out).exists() and not out.exists()


def test_a_density_that_lengths_forbid_is_told_before_anything_is_run(checkpoint, tmp_path, swept):
    with pytest.raises(CalibrationError) as caught:
        calibrate(checkpoint, tmp_path / "a.yaml", Budget(target_density=0.05), **TASK)
    assert str(caught.value).startswith("A density of 0.05 cannot be reached: with segments of 256 or 512 tokens, ")
    named = float(re.search(r"at least (\S+) of the pairs are visited\.$", str(caught.value))[1])
    least = curves.least_density(TOKENS, S2OParams(segment_len=256))
    assert least <= named < least + 1e-3
    assert swept == [] and list(tmp_path.iterdir()) == []


# -- the file ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["option", "environment"])
def test_a_file_that_is_named_has_its_values_replaced(checkpoint, tmp_path, monkeypatch, by):
    """All that is searched, that is; what is not stays, and so does the file."""
    mine, out = tmp_path / "mine.yaml", tmp_path / "a.yaml"
    mine.write_text("params: {reference_len: 77, threshold: 0.5, dense_tail: 64}\nmin_seq_len: 300\n")
    if by == "environment":
        monkeypatch.setenv("VLLM_S2O_CONFIG", str(mine))
    named = {"additional": str(mine)} if by == "option" else {}
    found = calibrate(checkpoint, out, ERROR, **TASK | {"segment_lens": (256,)}, **named)
    config = config_of(checkpoint, out)
    assert (config.params.reference_len, config.params.dense_tail) == (TOKENS, 64)
    assert (config.min_seq_len, config.params.threshold) == (TASK["min_seq_len"], found.params.threshold)
    assert "reference_len: 77" in mine.read_text()


@pytest.mark.parametrize("names, kept", [(["someone/else"], False), (["another", "someone/MODEL"], True)])
def test_the_file_names_the_model_that_was_calibrated(checkpoint, tmp_path, monkeypatch, names, kept):
    """A shipped file that fits by dimensions alone is another model's."""
    (model := tmp_path / "model").symlink_to(checkpoint)
    source = open_model(str(model), TOKENS)
    dimensions = {name: getattr(source.traits, name) for name in DIMENSIONS}
    (configs := tmp_path / "configs").mkdir()
    (configs / "shipped.yaml").write_text(json.dumps({"match": {"names": names, **dimensions}}))
    monkeypatch.setattr(run.settings, "load_config", functools.partial(load_config, configs_dir=configs))
    out = tmp_path / "a.yaml"
    calibrate(str(model), out, ERROR, **TASK | {"segment_lens": (256,)})
    expected = names if kept else [Path(checkpoint).name]
    assert yaml.safe_load(out.read_text())["match"] == {"names": expected, **dimensions}


def test_a_file_that_cannot_be_used_takes_no_files_place(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "a.yaml"
    out.write_text("min_seq_len: 1\n")
    monkeypatch.setattr(run, "MOST_LEN", 2**40)
    with pytest.raises(CalibrationError, match=r"a\.yaml\S*: the field 'min_seq_len' .*; the sweeps are kept in "):
        calibrate(checkpoint, out, ERROR, **TASK | {"segment_lens": (256,), "min_seq_len": 2**33})
    assert out.read_text() == "min_seq_len: 1\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.yaml", "a.yaml.parts.jsonl"]


# -- the shortest sparse prompt ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "estimate, context, segment_len, expected",
    [(16384, 8192, 512, 2048), (2048, 8192, 512, 2048), (16384, 131072, 512, 16384), (16384, 2048, 512, 1024)],
)
def test_the_estimate_ends_far_below_the_context(estimate, context, segment_len, expected):
    found, note = speed.capped(estimate, context, segment_len)
    assert found == expected
    assert (note is None) == (found == estimate)
    if note:
        assert note == (
            f"For an H100 min_seq_len was estimated as {estimate}; it is capped at {expected}, for the model's context "
            f"ends at {context} tokens."
        )


def test_the_file_says_that_the_estimate_was_capped(checkpoint, tmp_path):
    """And no server would find it without effect. A given length is left alone."""
    out = tmp_path / "a.yaml"
    found = calibrate(checkpoint, out, ERROR, **TASK | {"min_seq_len": None})
    assert found.min_seq_len == max(TOKENS // 4, 2 * found.params.segment_len)
    (note,) = found.notes
    assert f"# {note}" in out.read_text().splitlines()
    assert config_of(checkpoint, out).no_effect(TOKENS) is None


def test_a_given_length_is_not_capped(calibrated):
    out, found = calibrated
    assert found.min_seq_len == TASK["min_seq_len"] and found.notes == ()
    assert "capped" not in out.read_text()


def test_a_folder_that_cannot_be_is_told(checkpoint, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CalibrationError, match=r"^Cannot (read|write) .*: (Not a directory|File exists)\.$"):
        calibrate(checkpoint, tmp_path / "file" / "a.yaml", ERROR, **TASK)
