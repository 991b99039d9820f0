"""From the files in configs/ and what a user gives to the parameters of each layer."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from config_cases import LLAMA, OPTION, OTHER, QWEN, SMOLLM2, assert_names, refusal
from pydantic import ValidationError

from vllm_s2o.config import ConfigFile, S2OParams, load_config

SHIPPED = {"smollm2-135m-instruct.yaml": SMOLLM2, "llama-3.1-8b-instruct.yaml": LLAMA, "qwen3-8b.yaml": QWEN}


# -- shipped files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SHIPPED, "default.yaml"])
def test_shipped_file_is_valid_and_honest(name):
    text = files("vllm_s2o.configs").joinpath(name).read_text()
    file = ConfigFile.model_validate(yaml.safe_load(text))
    searched = name.startswith("smollm2")
    assert file.provenance.calibrated is searched
    assert re.search("searched on SmolLM2" if searched else "default values", file.provenance.source)
    assert (file.provenance.calibration is not None) is searched, "with what the search reached"
    assert "/work" not in text


@pytest.mark.parametrize("name", [*SHIPPED, "default.yaml"])
def test_shipped_file_leaves_no_parameter_to_the_code(name):
    """Another default in the code must not change what a model runs with."""
    fields = yaml.safe_load(files("vllm_s2o.configs").joinpath(name).read_text())
    assert set(fields["params"]) == set(S2OParams.model_fields) - {"budget"}
    assert {"min_seq_len", "min_query_len"} <= set(fields)


def test_every_shipped_file_is_known_here():
    assert {entry.name for entry in files("vllm_s2o.configs").iterdir() if entry.name.endswith(".yaml")} == {
        *SHIPPED,
        "default.yaml",
    }


def test_smollm2_values():
    config = load_config(SMOLLM2)
    assert (config.min_seq_len, config.min_query_len) == (2048, 128)
    assert (config.params.segment_len, config.params.ranking, config.calibrated) == (256, "query_head", True)
    layers = [config.layer(i) for i in range(30)]
    assert None not in layers
    assert len({str(layer.threshold) for layer in layers}) > 20, "searched by layer and head"


@pytest.mark.parametrize("traits", [LLAMA, QWEN, OTHER], ids=lambda t: t.name)
def test_other_shipped_files_hold_the_defaults(traits):
    config = load_config(traits)
    assert (config.params, config.min_seq_len, config.min_query_len) == (S2OParams(reference_len=8192), 8192, 256)
    assert not config.calibrated


# -- matching ---------------------------------------------------------------------------------------------------------


NAMES = {
    "full name": ("{}", "name"),
    "upper case": ("{upper}", "name"),
    "last part of a path": ("/models/{last}", "name"),
    "trailing slash": ("/models/{last}/", "name"),
    "any path": ("/models/snapshots/0123abc", "dimensions"),
    "the working directory": (".", "dimensions"),
}


@pytest.mark.parametrize("file, traits", SHIPPED.items(), ids=SHIPPED)
@pytest.mark.parametrize("name, matched", NAMES.values(), ids=NAMES)
def test_match(file, traits, name, matched):
    name = name.format(traits.name, upper=traits.name.upper(), last=traits.name.split("/")[1])
    config = load_config(replace(traits, name=name))
    assert (config.source, config.matched) == (file, matched)


def test_another_model_of_the_same_name_is_not_matched():
    config = load_config(replace(QWEN, num_layers=4))
    assert (config.source, config.matched) == ("default.yaml", "default")


@pytest.mark.parametrize("change", ["architecture", "num_layers", "num_heads", "num_kv_heads", "head_size"])
def test_every_dimension_counts(change):
    value = "MistralForCausalLM" if change == "architecture" else getattr(LLAMA, change) * 2
    config = load_config(replace(LLAMA, name="/models/mine", **{change: value}))
    assert (config.source, config.matched) == ("default.yaml", "default")


@pytest.fixture
def configs(tmp_path):
    """A directory of config files: name -> match section."""

    def configs(**matches: dict) -> Path:
        for name, match in matches.items():
            (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"match": match} if match else {"min_seq_len": 1}))
        return tmp_path

    return configs


DIMENSIONS = {name: value for name, value in asdict(OTHER).items() if name != "name"}


@pytest.mark.parametrize("match", [{"names": ["someone/other"]}, DIMENSIONS], ids=["name", "dimensions"])
def test_ambiguous_match_names_both_files(configs, match):
    how = "by name" if "names" in match else "by dimensions"
    sentence = refusal(configs_dir=configs(default={}, one=match, two=match))
    assert_names(sentence, "one.yaml and two.yaml", "someone/other", how, "'match'", "exactly one")


def test_closer_match_wins(configs):
    """The whole name, then its last part, then the dimensions."""
    directory = configs(default={}, a=DIMENSIONS, b={"names": ["b/other", "b/only"]}, c={"names": ["c/other"]})
    for name, source in {"c/other": "c.yaml", "x/only": "b.yaml", "x/y": "a.yaml"}.items():
        assert load_config(replace(OTHER, name=name), configs_dir=directory).source == source


def test_directory_without_default(configs):
    assert_names(refusal(configs_dir=configs(one={"names": ["a"]})), "someone/other", "default.yaml")


def test_broken_shipped_file_is_named(configs):
    assert_names(refusal(configs_dir=configs(default={}, one={"nmaes": ["a"]})), "one.yaml", "'match.nmaes'", "names")


# -- where it starts from ---------------------------------------------------------------------------------------------


def test_path_from_the_option_wins_over_the_environment(write):
    mine, env = write("min_seq_len: 11\n"), write("min_seq_len: 22\n", "env.yaml")
    assert load_config(OTHER, mine, env).min_seq_len == 11
    assert load_config(OTHER, None, env).min_seq_len == 22
    config = load_config(SMOLLM2, {"config": mine, "threshold": 0.1}, env)
    assert (config.source, config.matched, config.min_seq_len, config.params.threshold) == (mine, "path", 11, 0.1)


@pytest.mark.parametrize("given", [{}, {"threshold": 0.1}, {"config": None}], ids=json.dumps)
def test_fields_lie_over_the_file_that_the_environment_names(write, given):
    """Else the variable would be ignored without a word as soon as one field is overridden."""
    env = write("min_seq_len: 22\nparams: {segment_len: 256}\n", "env.yaml")
    config = load_config(SMOLLM2, given, env)
    assert (config.source, config.matched) == (env, "path")
    assert (config.min_seq_len, config.params.segment_len) == (22, 256)
    assert config.params.threshold == given.get("threshold", 0.02)
    assert_names(refusal(given, env="no.yaml"), "no.yaml", "VLLM_S2O_CONFIG", "no such file")


def test_named_file_is_not_matched(write):
    path = write("match: {names: [Qwen/Qwen3-8B], num_layers: 36}\nprovenance: {calibrated: true, source: a search}\n")
    config = load_config(OTHER, path)
    assert config.matched == "path"
    assert config.calibrated
    assert config.provenance == "a search"


def test_provenance_text(write):
    path = write("provenance: {source: a search, date: 2026-01-31, note: on code only}\n")
    assert load_config(OTHER, path).provenance == "a search, 2026-01-31, on code only"


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [{"threshold": 0.01}, {"params": {"threshold": 0.01}}], ids=["top level", "params"])
def test_fields_override_one_by_one(given):
    config = load_config(SMOLLM2, {**given, "min_seq_len": 99})
    assert config.params == S2OParams(
        threshold=0.01, segment_len=256, stop_interval=1, dense_tail=64, reference_len=8192, ranking="query_head"
    )
    assert (config.min_seq_len, config.min_query_len, config.matched) == (99, 128, "name")
    assert load_config(SMOLLM2).layer(9).threshold != 0.01, "the file has one for this layer"
    assert {config.layer(i).threshold for i in range(30)} == {0.01}


def test_a_threshold_is_all_layers_but_the_dense_ones(write):
    """What a file has for single layers would otherwise leave next to nothing of it."""
    layers = [
        {"layers": 0, "threshold": "dense"}, {"layers": 1, "threshold": 0.2},
        {"layers": "2-3", "heads": 1, "threshold": 0.3}, {"layers": 3, "heads": 0, "threshold": "dense"},
    ]  # fmt: skip
    path = write(yaml.safe_dump({"params": {"threshold": 0.1}, "layers": layers}))
    config = load_config(OTHER, {"config": path, "threshold": 0.05, "layers": [{"layers": 2, "threshold": 0.4}]})
    assert config.layer(0) is None
    assert [config.layer(i).threshold for i in (1, 2)] == [0.05, 0.4]
    assert config.layer(3).threshold == (0.0, *(0.05,) * 7)
    assert (config.num_file_layers, config.origins["layers"]) == (2, f"{path}, {OPTION}")
    assert config.describe()[-2:] == [
        f"overridden by {OPTION}: layers, params.threshold",
        f"params.threshold of {OPTION} replaces 2 thresholds of single layers in {path}",
    ]


@pytest.mark.parametrize("given", [{}, {"threshold": 0.1}], ids=json.dumps)
def test_a_files_layers_are_checked_whether_they_count_or_not(write, given):
    path = write(yaml.safe_dump({"layers": [{"layers": 0, "threshold": 0.1}, {"layers": 4, "threshold": 0.1}]}))
    assert_names(refusal({"config": path, **given}), "my.yaml: the field 'layers.1.layers' cannot be 4", "0 to 3")


def test_origins():
    origins = load_config(SMOLLM2, {"threshold": 0.01, "layers": [{"layers": 1, "threshold": 0}]}).origins
    expected = {
        "params.threshold": OPTION,
        "params.segment_len": "smollm2-135m-instruct.yaml",
        "params.tile_size": "smollm2-135m-instruct.yaml",
        "params.budget": "default",
        "min_seq_len": "smollm2-135m-instruct.yaml",
        "layers": f"smollm2-135m-instruct.yaml, {OPTION}",
    }
    assert {name: origins[name] for name in expected} == expected
    fields = {f"params.{name}" for name in S2OParams.model_fields} | {"min_seq_len", "min_query_len", "layers"}
    assert fields <= set(origins)


@pytest.mark.parametrize("given", [{}, {"layers": []}, {"min_seq_len": 9}], ids=json.dumps)
def test_the_files_layers_keep_their_origin(given):
    config = load_config(SMOLLM2, given)
    assert config.origins["layers"] == config.source
    assert config.layer(9) == load_config(SMOLLM2).layer(9)


def test_rule_between_fields_is_judged_on_the_whole(write):
    path = write("params: {tile_size: 64, segment_len: 192}\n")
    assert load_config(OTHER, {"config": path, "segment_len": 320}).params.segment_len == 320
    sentence = refusal({"config": path, "tile_size": 128})
    assert_names(sentence, "my.yaml", OPTION, "'params.segment_len'", "192", "positive multiple of tile_size=128")


BUDGET = {"params": {"budget": 0.1}}
IN_VAIN = {
    "threshold": ({"params": {"budget": 0.1, "threshold": 0.02}}, "params.threshold"),
    "a layer's threshold": ({**BUDGET, "layers": [{"layers": 0, "threshold": 0.1}]}, "layers.0.threshold"),
    "heads": ({**BUDGET, "layers": [{"layers": 0, "heads": 1, "threshold": "dense"}]}, "layers.0.threshold"),
}


@pytest.mark.parametrize("fields, field", IN_VAIN.values(), ids=IN_VAIN)
def test_a_threshold_beside_a_budget_is_refused(write, fields, field):
    words = (f"the field '{field}' has no effect with the budget 0.1 ('params.budget')", "leave one of them out")
    assert_names(refusal(fields), OPTION, *words)
    assert_names(refusal(write(yaml.safe_dump(fields))), "my.yaml: ", *words)
    over_the_file = {name: value for name, value in fields.items() if name == "layers"} or {"threshold": 0.02}
    assert_names(refusal({"config": write(yaml.safe_dump(BUDGET)), **over_the_file}), OPTION, *words)


def test_a_budget_over_a_files_thresholds(write):
    layers = [{"layers": 1, "threshold": 0.2}, {"layers": 0, "threshold": "dense"}]
    path = write(yaml.safe_dump({"params": {"threshold": 0.1}, "layers": layers}))
    config = load_config(OTHER, {"config": path, "budget": 0.25})
    assert (config.params.budget, config.layer(0), config.layer(1).budget) == (0.25, None, 0.25)
    assert "threshold" not in config.describe()[1]
    assert "1 of 4 layers dense" in config.describe()[1]
    assert load_config(OTHER, {"config": path, "budget": None, "threshold": 0.3}).params == S2OParams(threshold=0.3)


def test_what_is_given_is_left_alone():
    given = {"threshold": 0.1, "params": {"tile_size": 64}, "layers": []}
    load_config(OTHER, given)
    assert given == {"threshold": 0.1, "params": {"tile_size": 64}, "layers": []}


# -- layers and heads -------------------------------------------------------------------------------------------------


def thresholds(*overrides: dict, base=0.5):
    """Per layer of a model with 4 layers and 8 heads: threshold, or "dense"."""
    config = load_config(OTHER, {"threshold": base, "layers": list(overrides)})
    return ["dense" if (layer := config.layer(i)) is None else layer.threshold for i in range(4)]


@pytest.mark.parametrize(
    "layers, chosen",
    [(0, [0]), ("1-2", [1, 2]), ("3-3", [3]), ([0, "2-3"], [0, 2, 3])],
    ids=["one", "range", "range of one", "list"],
)
def test_layers(layers, chosen):
    assert thresholds({"layers": layers, "threshold": 0.1}) == [0.1 if i in chosen else 0.5 for i in range(4)]


def test_later_override_wins():
    first, second = {"layers": "0-2", "threshold": "dense"}, {"layers": "1-3", "threshold": 0}
    assert thresholds(first, second) == ["dense", 0.0, 0.0, 0.0]
    assert thresholds(second, first) == ["dense", "dense", "dense", 0.0]


def test_heads():
    some = {"layers": 1, "heads": ["0-1", 7], "threshold": 0.1}
    assert thresholds(some)[1] == (0.1, 0.1, 0.5, 0.5, 0.5, 0.5, 0.5, 0.1)
    assert thresholds(some, {"layers": 1, "heads": 0, "threshold": "dense"})[1][:3] == (0.0, 0.1, 0.5)
    assert thresholds(some, {"layers": 1, "threshold": 0.2})[1] == 0.2


def test_heads_over_a_list_of_thresholds():
    base = [0.1 * i for i in range(8)]
    assert thresholds({"layers": 0, "heads": 3, "threshold": 0.9}, base=base)[:2] == [
        (*base[:3], 0.9, *base[4:]),
        tuple(base),
    ]


def test_heads_of_a_dense_layer():
    dense = {"layers": 0, "threshold": "dense"}
    assert thresholds(dense, {"layers": 0, "heads": 0, "threshold": "dense"})[0] == "dense"
    assert thresholds(dense, {"layers": 0, "heads": 0, "threshold": 0.1})[0] == (0.1, *[0.0] * 7)


# -- what is said of it -----------------------------------------------------------------------------------------------


def test_describe_the_shipped_file():
    source, values = load_config(SMOLLM2).describe()
    assert_names(source, "smollm2-135m-instruct.yaml", "matched by name", "calibrated: searched on SmolLM2")
    assert_names(values, "threshold=0.0", "segment_len=256", "min_seq_len=2048", "min_query_len=128")
    assert "layers have thresholds of their own" in values


def test_describe_overrides():
    layers = [{"layers": "0-1", "threshold": "dense"}, {"layers": 3, "threshold": 0.05}]
    source, values, overridden = load_config(OTHER, {"min_seq_len": 7, "layers": layers}).describe()
    assert "no file matches" in source
    assert_names(values, "threshold=0.02..0.05", "min_seq_len=7", "2 of 4 layers dense")
    assert "1 of 4 layers have thresholds of their own" in values
    assert_names(overridden, OPTION, "layers", "min_seq_len")


def test_describe_warns_of_a_budget():
    lines = load_config(OTHER, {"budget": 0.1}).describe()
    assert len(lines) <= 3
    assert_names(lines[1], "budget=0.1", "WARNING", "benchmarks only")


def test_describe_a_model_that_is_all_dense():
    config = load_config(OTHER, {"layers": [{"layers": "0-3", "threshold": "dense"}]})
    assert "4 of 4 layers dense" in config.describe()[1]


def test_digest(write):
    def digest(given=None, traits=OTHER):
        return load_config(traits, given).digest()

    one, two = [{"layers": "0-1", "threshold": 0.1}], [{"layers": i, "threshold": 0.1} for i in (1, 0)]
    assert re.fullmatch("[0-9a-f]{12}", digest())
    assert digest() == digest({"threshold": 0.02}) == digest(traits=replace(OTHER, name="x"))
    assert digest({"layers": one}) == digest({"layers": two})
    assert digest({"budget": 0.1}) == digest({"config": write("params: {threshold: 0.1}\n"), "budget": 0.1}) != digest()
    other = dict(
        threshold=0.1, reference_len=None, budget=0.1, segment_len=256, tile_size=64, key_block=32, stop_interval=1,
        num_classes=16, dense_tail=0, ranking="kv_head",
    )  # fmt: skip
    assert other.keys() == S2OParams.model_fields.keys(), "what is in no hash mixes with what another config computed"
    given = [None, {"min_seq_len": 5}, {"min_query_len": 5}, {"layers": one}]
    given += [{name: value} for name, value in other.items()]
    assert len({digest(g) for g in given}) == len(given)


# -- parameters by themselves -----------------------------------------------------------------------------------------


def test_thresholds():
    assert S2OParams(threshold=0.1).thresholds(3) == (0.1, 0.1, 0.1)
    assert S2OParams(threshold=[0, 0.1]).thresholds(2) == (0.0, 0.1)
    with pytest.raises(ValueError, match=r"^threshold lists 2 heads, the query has 3$"):
        S2OParams(threshold=(0, 0.1)).thresholds(3)


def test_params_are_frozen_strict_and_plain_to_read():
    with pytest.raises(ValidationError, match="frozen"):
        S2OParams().threshold = 0.5
    with pytest.raises(ValidationError, match="extra"):
        S2OParams(tau=0.5)
    with pytest.raises(ValidationError, match="segment_len=100 must be a multiple of tile_size=128"):
        S2OParams(segment_len=100)
    assert S2OParams(threshold=0).threshold == 0.0, "a whole number is a number"


# -- the module by itself ---------------------------------------------------------------------------------------------


def test_config_needs_neither_torch_nor_vllm():
    code = "import sys, vllm_s2o.config; print({'torch', 'triton', 'vllm'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_directory_of_files_may_be_a_copy(tmp_path):
    for name in SHIPPED:
        shutil.copy(str(files("vllm_s2o.configs").joinpath(name)), tmp_path)
    assert load_config(QWEN, configs_dir=tmp_path).source == "qwen3-8b.yaml"
