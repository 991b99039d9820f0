"""From a model to a file: its budget, its second run, its interruptions, and what it says of bad input."""

import json

import pytest
import torch
from calibration_case import TASK, TOKENS

from vllm_s2o.config import load_config
from vllm_s2o.quality import cost
from vllm_s2o.quality.calibration import Budget, CalibrationError, calibrate, choose, curves
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


# -- budgets ----------------------------------------------------------------------------------------------------------


def test_every_layer_is_within_the_error_and_few_pairs_are_visited(calibrated):
    _, found = calibrated
    assert all(choice.error <= ERROR.max_relative_error for choice in found.layers)
    assert max(choice.error for choice in found.layers) > 0.7 * ERROR.max_relative_error
    assert len({choice.at for choice in found.layers}) == LAYERS, "each layer has its own"


def test_it_beats_the_best_single_threshold_on_held_out_text(calibrated):
    _, found = calibrated
    _, density = found.single
    assert found.density < 0.95 * density


def test_a_density_is_met(checkpoint, tmp_path):
    found = calibrate(checkpoint, tmp_path / "a.yaml", Budget(target_density=0.5), **TASK)
    density = sum(choice.density for choice in found.layers) / LAYERS
    assert 0.4 < density <= 0.5
    assert found.density == pytest.approx(density, rel=0.15), "on the other half of the text, too"


def test_a_divergence_is_met_by_the_config_that_is_written(checkpoint, tmp_path):
    """The whole model with the file's thresholds: what was searched is what is served."""
    allowed = 0.02
    found = calibrate(checkpoint, tmp_path / "a.yaml", Budget(max_logit_kl=allowed), **TASK)
    assert 0.2 * allowed < found.kl <= allowed
    source = open_model(checkpoint, TOKENS)
    model = source.load(torch.device("cpu"))
    ids = source.prompt("code", TOKENS, "choosing")
    assert cost.measure(model, ids, config_of(checkpoint, tmp_path / "a.yaml"))[0].kl == pytest.approx(found.kl)


# -- the file ---------------------------------------------------------------------------------------------------------


def test_the_file_has_what_was_found(checkpoint, calibrated):
    out, found = calibrated
    config = config_of(checkpoint, out)
    for layer, choice in enumerate(found.layers):
        params = config.layer(layer)
        per_head = [found.thresholds[at] for at in choice.at for _ in range(2)]  # query heads of a KV head
        assert list(params.thresholds(4)) == per_head
        assert params.segment_len == found.params.segment_len
    assert config.min_seq_len == 512 and config.calibrated
    told = config.file.provenance.calibration
    assert (told.texts, told.tokens, told.budget, told.seed) == (("code",), TOKENS, "max_relative_error=0.02", 0)
    assert len(told.layer_density) == len(told.layer_relative_error) == LAYERS
    assert told.worst_relative_error == pytest.approx(found.worst_error, rel=1e-2)
    assert set(told.versions) == {"vllm-s2o", "torch", "transformers"} and config.file.provenance.date
    assert checkpoint not in out.read_text(), "no path of this machine"
    assert list(out.parent.iterdir()) == [out], "nothing is left beside it"


def test_what_is_told_of_held_out_text_is_what_a_whole_run_costs(checkpoint, calibrated):
    """Tiles were looked at by chance and layers got dense inputs; `cost` runs all of the prompt, errors adding up."""
    out, found = calibrated
    source = open_model(checkpoint, TOKENS)
    model = source.load(torch.device("cpu"))
    _, layers = cost.measure(model, source.prompt("code", TOKENS, "held-out"), config_of(checkpoint, out))
    for layer, choice in zip(layers, found.held_out, strict=True):
        assert layer.density == pytest.approx(choice.density, rel=0.15)
        assert 0.3 < layer.rel_error / choice.error < 3


# -- again ------------------------------------------------------------------------------------------------------------


def test_the_same_seed_finds_the_same_and_another_one_looks_elsewhere(checkpoint, calibrated, tmp_path):
    out, found = calibrated
    assert calibrate(checkpoint, tmp_path / "a.yaml", ERROR, **TASK) == found
    assert (tmp_path / "a.yaml").read_text() == out.read_text()
    assert calibrate(checkpoint, tmp_path / "b.yaml", ERROR, seed=1, **TASK).layers != found.layers


@pytest.mark.parametrize("after", [2, 4])
def test_a_run_that_was_cut_off_goes_on(checkpoint, calibrated, tmp_path, swept, after):
    """Once while thresholds are chosen and once while they are judged, each time in the middle of a line."""
    out, found = tmp_path / "a.yaml", calibrated[1]

    def cut(name: str, layers: int) -> None:
        if len(swept) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, out, ERROR, progress=cut, **TASK)
    assert not out.exists() and len(swept) == after
    parts(out).write_bytes(parts(out).read_bytes()[:-100])
    assert calibrate(checkpoint, out, ERROR, **TASK) == found
    assert len(swept) == 2 * LAYERS + 1, "one was lost with its line"
    assert not parts(out).exists()


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


@pytest.mark.parametrize(
    "budget, changes, said",
    [
        (Budget(), {}, "Exactly one budget is needed: "),
        (Budget(0.1, 0.1), {}, "Exactly one budget is needed: "),
        (Budget(max_relative_error=0.0), {}, "The budget max_relative_error=0 cannot be met: "),
        (Budget(target_density=1.0), {}, "The budget target_density=1 cannot be met: "),
        (Budget(max_logit_kl=float("nan")), {}, "The budget max_logit_kl=nan cannot be met: "),
        (ERROR, {"num_tokens": 200}, "200 tokens hold no two segments of 512: "),
        (ERROR, {"texts": ()}, "At least one text must be named."),
        (ERROR, {"texts": ("poetry",)}, "The text poetry cannot be read: "),
        (ERROR, {"segment_lens": (200,)}, "These parameters cannot be used: segment_len=200 must be a multiple of "),
        (ERROR, {"segment_lens": (0,)}, "These parameters cannot be used: "),
        (ERROR, {"segment_lens": ()}, "At least one segment length must be named."),
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
        (Budget(max_relative_error=1e-12), "No layer can be sparse within this budget: nothing is written."),
        (Budget(target_density=0.05), "A density of 0.05 cannot be reached: with segments of 256 or 512 tokens, "),
        (Budget(max_logit_kl=1e-12), "No thresholds kept the divergence of logits at 1e-12 or below in "),
    ],
)
def test_budgets_that_turn_out_impossible_are_told(checkpoint, tmp_path, budget, said):
    with pytest.raises(CalibrationError) as caught:
        calibrate(checkpoint, tmp_path / "a.yaml", budget, **TASK)
    assert str(caught.value).startswith(said)
    assert not (tmp_path / "a.yaml").exists()


def test_a_folder_that_cannot_be_is_told(checkpoint, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CalibrationError, match=r"^Cannot (read|write) .*: (Not a directory|File exists)\.$"):
        calibrate(checkpoint, tmp_path / "file" / "a.yaml", ERROR, **TASK)
