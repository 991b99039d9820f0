"""From the files in configs/ and what a user gives to the parameters of each layer, or to one sentence."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from vllm_s2o import config_errors
from vllm_s2o.config import ConfigError, ConfigFile, ModelTraits, S2OParams, load_config
from vllm_s2o.plan import causal_pairs, make_plan

SMOLLM2 = ModelTraits("HuggingFaceTB/SmolLM2-135M-Instruct", "LlamaForCausalLM", 30, 9, 3, 64)
LLAMA = ModelTraits("meta-llama/Llama-3.1-8B-Instruct", "LlamaForCausalLM", 32, 32, 8, 128)
QWEN = ModelTraits("Qwen/Qwen3-8B", "Qwen3ForCausalLM", 36, 32, 8, 128)
OTHER = ModelTraits("someone/other", "OtherForCausalLM", 4, 8, 2, 64)
SHIPPED = {"smollm2-135m-instruct.yaml": SMOLLM2, "llama-3.1-8b-instruct.yaml": LLAMA, "qwen3-8b.yaml": QWEN}

OPTION = '--additional-config "s2o"'


@pytest.fixture
def write(tmp_path):
    """Write a config file, return its path."""

    def write(text: str | bytes, name: str = "my.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


def refusal(additional=None, traits=OTHER, **kwargs) -> str:
    """The sentence, which must be one line and one sentence."""
    with pytest.raises(ConfigError) as caught:
        load_config(traits, additional, **kwargs)
    sentence = str(caught.value)
    assert len(sentence.splitlines()) == 1
    assert sentence.endswith(".")
    assert "Input should" not in sentence, "pydantic's words"
    return sentence


def assert_names(sentence: str, *words: str) -> None:
    for word in words:
        assert word in sentence


# -- shipped files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SHIPPED, "default.yaml"])
def test_shipped_file_is_valid_and_honest(name):
    text = files("vllm_s2o.configs").joinpath(name).read_text()
    file = ConfigFile.model_validate(yaml.safe_load(text))
    assert file.provenance.calibrated is False
    assert re.search("default values|not searched", file.provenance.source)
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
    assert (config.params.segment_len, config.params.threshold) == (256, 0.02)
    assert [i for i in range(30) if config.layer(i) is None] == [0]


def test_what_smollm2_says_of_segments_is_so():
    """The shares in the file's comment, beside what a plan holds."""
    text = files("vllm_s2o.configs").joinpath("smollm2-135m-instruct.yaml").read_text().replace("\n#", "")
    said = re.search(
        r"causal pairs of 8,192 tokens they are ([\d.]+) % with segments of 256, and ([\d.]+) % with 512", text
    )
    for share, segment_len in zip(said.groups(), (256, 512), strict=True):
        plan = make_plan([8192], [8192], segment_len=segment_len, tile_size=128, num_kv_heads=3, max_slots=10**9)
        segments = [segment for wave in plan.waves for segment in wave.segments]
        inside = sum(causal_pairs(segment.num_queries, segment.num_queries) for segment in segments)
        assert f"{100 * inside / plan.causal_pairs[0]:.1f}" == share


@pytest.mark.parametrize("traits", [LLAMA, QWEN, OTHER], ids=lambda t: t.name)
def test_other_shipped_files_hold_the_defaults(traits):
    config = load_config(traits)
    assert (config.params, config.min_seq_len, config.min_query_len) == (S2OParams(), 4096, 256)
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
    assert config.params == S2OParams(threshold=0.01, segment_len=256)
    assert (config.min_seq_len, config.min_query_len, config.matched) == (99, 128, "name")
    assert config.layer(0) is None, "the file's overrides stay"


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


@pytest.mark.parametrize("given", [{}, {"layers": []}, {"threshold": 0.1}], ids=json.dumps)
def test_the_files_layers_keep_their_origin(given):
    config = load_config(SMOLLM2, given)
    assert config.origins["layers"] == config.source
    assert config.layer(0) is None


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
    assert_names(source, "smollm2-135m-instruct.yaml", "matched by name", "not calibrated", "chosen by hand")
    assert_names(values, "threshold=0.02 ", "segment_len=256", "min_seq_len=2048", "min_query_len=128")
    assert "1 of 30 layers dense" in values


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
    given = [None, {"threshold": 0.1}, {"segment_len": 256}, {"min_seq_len": 5}, {"min_query_len": 5}, {"layers": one}]
    assert len({digest(g) for g in given}) == len(given)


# -- refusals: fields -------------------------------------------------------------------------------------------------

TAU = "allowed is a number from 0 up to, but not including, 1"
POWER = "allowed is 16, 32, 64 or 128"
RANGES = 'allowed is a whole number, a range such as "4-7", or a list of these'
LENGTH = "allowed is a whole number from 1 to 2147483647"
OR_DENSE = f'{TAU}, or "dense"'
ALL = {"layers": 0, "threshold": 0.1}

# id: fields, then what the sentence must name
BAD_FIELDS = {
    "tau of 1": ({"params": {"threshold": 1}}, "'params.threshold'", "1;", TAU),
    "tau below 0": ({"params": {"threshold": -0.1}}, "'params.threshold'", "-0.1", TAU),
    "tau not a number": ({"params": {"threshold": float("nan")}}, "'params.threshold'", "NaN", TAU),
    "tau infinite": ({"params": {"threshold": float("inf")}}, "'params.threshold'", "Infinity", TAU),
    "tau a bool": ({"params": {"threshold": True}}, "'params.threshold'", "true", TAU),
    "tau a text": ({"params": {"threshold": "1e-3"}}, "'params.threshold'", 'text "1e-3" (write 0.001)', TAU),
    "tau null": ({"params": {"threshold": None}}, "'params.threshold'", "null", TAU),
    "one tau of a list": ({"params": {"threshold": [0.1, 2]}}, "'params.threshold.1'", "2;", TAU),
    "no tau in a list": ({"params": {"threshold": []}}, "'params.threshold'", "[]", "one per query head"),
    "list of another length": ({"params": {"threshold": [0.1]}}, "'params.threshold'", "1 heads", "has 8"),
    "segment_len 0": ({"params": {"segment_len": 0}}, "'params.segment_len'", "0;", "positive multiple of tile_size"),
    "segment_len too long": ({"params": {"segment_len": 65664}}, "'params.segment_len'", "65664", "up to 65536"),
    "segment_len no multiple": ({"params": {"segment_len": 100}}, "'params.segment_len'", "100", "of tile_size=128"),
    "segment_len a float": ({"params": {"segment_len": 512.0}}, "'params.segment_len'", "512.0", "allowed is"),
    "tile_size": ({"params": {"tile_size": 48}}, "'params.tile_size'", "48", POWER),
    "tile_size a bool": ({"params": {"tile_size": True}}, "'params.tile_size'", "true", POWER),
    "key_block": ({"params": {"key_block": "64"}}, "'params.key_block'", '"64"', POWER),
    "num_classes": ({"params": {"num_classes": 64.0}}, "'params.num_classes'", "64.0", POWER),
    "stop_interval": ({"params": {"stop_interval": 65}}, "'params.stop_interval'", "65", "from 1 to 64"),
    "stop_interval a bool": ({"params": {"stop_interval": True}}, "'params.stop_interval'", "true", "from 1 to 64"),
    "stop_rule": ({"params": {"stop_rule": "best"}}, "'params.stop_rule'", '"best"', "worst_row or mean_row"),
    "query_order": ({"params": {"query_order": "x"}}, "'params.query_order'", '"x"', "position or guide"),
    "budget 0": ({"params": {"budget": 0}}, "'params.budget'", "0;", "above 0 and up to 1"),
    "budget a text": ({"params": {"budget": "0.1"}}, "'params.budget'", "write 0.1", "above 0 and up to 1"),
    "unknown parameter": ({"params": {"treshold": 0.1}}, "'params.treshold'", "allowed are threshold, segment_len"),
    "params no object": ({"params": 3}, "'params'", "3;", "allowed is an object with any of: threshold"),
    "min_seq_len 0": ({"min_seq_len": 0}, "'min_seq_len'", "0;", LENGTH),
    "min_query_len a text": ({"min_query_len": "many"}, "'min_query_len'", '"many"', LENGTH),
    "unknown field": ({"Params": {}}, "'Params'", "allowed are", "min_seq_len"),
    "unknown field with a dash": ({"min-seq-len": 1}, "'min-seq-len'", "allowed are"),
    "unknown field with a line break": ({"a\nb": 1}, r"'a\nb'", "allowed are"),
    "unknown field without end": ({"a" * 5000: 1}, "aaa...'", "allowed are"),
    "layers no list": ({"layers": 5}, "'layers'", "5;", "allowed is a list of overrides"),
    "override no object": ({"layers": [5]}, "'layers.0'", "5;", "allowed is a list of overrides"),
    "override without threshold": ({"layers": [{"layers": 0}]}, "'layers.0.threshold' is missing", OR_DENSE),
    "override without layers": ({"layers": [{"threshold": 0.1}]}, "'layers.0.layers' is missing", RANGES),
    "override's tau": ({"layers": [ALL, {**ALL, "threshold": 1.5}]}, "'layers.1.threshold'", "1.5", OR_DENSE),
    "override's tau a bool": ({"layers": [{**ALL, "threshold": False}]}, "'layers.0.threshold'", "false", OR_DENSE),
    "override's word": ({"layers": [{**ALL, "threshold": "Dense"}]}, "'layers.0.threshold'", '"Dense"', OR_DENSE),
    "override's unknown field": ({"layers": [{**ALL, "head": 1}]}, "'layers.0.head'", "allowed are layers, heads"),
    "override's misspelt field": ({"layers": [{"layer": 0, "threshold": 0}]}, "'layers.0.layer'", "allowed are layers"),
    "layer a bool": ({"layers": [{**ALL, "layers": True}]}, "'layers.0.layers'", "true", RANGES),
    "layer below 0": ({"layers": [{**ALL, "layers": -1}]}, "'layers.0.layers'", "-1", RANGES),
    "layer a text": ({"layers": [{**ALL, "layers": "all"}]}, "'layers.0.layers'", '"all"', RANGES),
    "no layer": ({"layers": [{**ALL, "layers": []}]}, "'layers.0.layers'", "[]", RANGES),
    "downward range": ({"layers": [{**ALL, "layers": [0, "3-1"]}]}, "'layers.0.layers.1'", '"3-1"', RANGES),
    "layer of another model": ({"layers": [{**ALL, "layers": 4}]}, "'layers.0.layers'", "4;", "layers 0 to 3"),
    "range beyond the model": ({"layers": [{**ALL, "layers": "2-999999"}]}, "'layers.0.layers'", "layers 0 to 3"),
    "head of another model": ({"layers": [{**ALL, "heads": [1, "7-8"]}]}, "'layers.0.heads'", '"7-8"', "heads 0 to 7"),
    "heads a float": ({"layers": [{**ALL, "heads": 1.5}]}, "'layers.0.heads'", "1.5", RANGES),
}


@pytest.mark.parametrize("fields, words", [(b[0], b[1:]) for b in BAD_FIELDS.values()], ids=BAD_FIELDS)
@pytest.mark.parametrize("given_by", ["file", "option"])
def test_bad_field(write, fields, words, given_by):
    if given_by == "option":
        assert_names(refusal(fields), OPTION, *words)
    else:
        assert_names(refusal(write(yaml.safe_dump(fields))), "my.yaml: ", *words)


ENDLESS = f"0x{'f' * 6000}"  # more digits than Python writes out
BAD_IN_A_FILE = {
    "endless number": (f"min_seq_len: {ENDLESS}\n", "'min_seq_len'", "too long to show", LENGTH),
    "endless layer": (f"layers: [{{layers: {ENDLESS}, threshold: 0}}]\n", "'layers.0.layers'", "layers 0 to 3"),
    "parameter at the top level": ("threshold: 0.1\n", "'threshold'", "allowed are min_seq_len"),
    "config": ("config: other.yaml\n", "'config'", "allowed are min_seq_len"),
    "match": ("match: 3\n", "'match'", "3;", "allowed is an object with any of: names"),
    "names": ("match: {names: mine}\n", "'match.names'", '"mine"', "a list of model names"),
    "a name": ("match: {names: [a, 3]}\n", "'match.names.1'", "3;", "a list of model names"),
    "architecture": ("match: {architecture: [a]}\n", "'match.architecture'", "the name of a model class"),
    "num_layers": ("match: {num_layers: 0}\n", "'match.num_layers'", "0;", LENGTH),
    "calibrated": ("provenance: {calibrated: 1}\n", "'provenance.calibrated'", "1;", "true or false"),
    "provenance's source": ("provenance: {source: 3}\n", "'provenance.source'", "3;", "a text"),
    "provenance's unknown field": ("provenance: {by: me}\n", "'provenance.by'", "allowed are calibrated, source"),
}


@pytest.mark.parametrize("text, words", [(b[0], b[1:]) for b in BAD_IN_A_FILE.values()], ids=BAD_IN_A_FILE)
def test_bad_in_a_file(write, text, words):
    assert_names(refusal(write(text)), "my.yaml: ", *words)
    assert_names(refusal(env=write(text)), "my.yaml: ", *words)


BAD_OPTION = {
    "match": ({"match": {"names": ["a"]}}, "'match'", "allowed are config, min_seq_len"),
    "provenance": ({"provenance": {"calibrated": True}}, "'provenance'", "allowed are config, min_seq_len"),
    "given twice": ({"threshold": 0.1, "params": {"threshold": 0.2}}, "'threshold'", "twice", "once"),
    "misspelt parameter": ({"treshold": 0.1}, "'treshold'", "allowed are config", "threshold"),
    "key no text": ({1: 2}, "'1'", "allowed are config"),
    "a list": ([1], "[1]", "path of a YAML config file", "object of fields"),
    "a bool": (True, "true", "path of a YAML config file", "object of fields"),
    "config no text": ({"config": 5}, "'config'", "5;", "path of a YAML config file"),
    "config empty": ({"config": ""}, "'config'", '"";', "path of a YAML config file"),
    "path with a NUL": ("a\0b", r"a\u0000b", "path of a YAML config file"),
    "deep value": ({"threshold": json.loads("[" * 200 + "]" * 200)}, "'params.threshold.0'", TAU),
}


@pytest.mark.parametrize("given, words", [(b[0], b[1:]) for b in BAD_OPTION.values()], ids=BAD_OPTION)
def test_bad_option(given, words):
    assert_names(refusal(given), OPTION, *words)


def test_first_of_several():
    sentence = refusal({"threshold": 5, "tile_size": 3, "layers": [{"layers": "x", "heads": "y", "threshold": 2}]})
    assert_names(sentence, "'params.threshold'", "(and 4 more wrong)")
    assert "tile_size" not in sentence


def test_number_of_the_users_own_override():
    """The file of SmolLM2 holds one override: the user's first is still number 0."""
    sentence = refusal({"layers": [{"layers": "28-30", "threshold": 0}]}, SMOLLM2)
    assert_names(sentence, OPTION, "'layers.0.layers'", '"28-30"', "0 to 29")


def test_every_field_has_its_values_and_a_description():
    for model, allowed in config_errors.ALLOWED.items():
        assert set(allowed) == set(model.model_fields)
        assert all(field.description for field in model.model_fields.values())


# -- refusals: files --------------------------------------------------------------------------------------------------

BAD_FILES = {
    "empty": ("", "holds no fields", "YAML mapping"),
    "comments only": ("# nothing\n", "holds no fields", "YAML mapping"),
    "a list": ("- 1\n", "holds no fields", "YAML mapping"),
    "not UTF-8": (b"params: \xff\n", "not UTF-8", "YAML config file is expected"),
    "not YAML": ("params: [1\n", "not valid YAML", "line"),
    "two documents": ("a: 1\n---\nb: 2\n", "not valid YAML"),
    "a control character": ("a: \x01\n", "not valid YAML"),
    "python tag": ("params: !!python/object/apply:os.system [ls]\n", "tags", "not allowed", "line 1"),
    "own tag": ("params: !mine {}\n", "tags", "not allowed", "line 1"),
    "harmless tag": ("min_seq_len: !!int 3\n", "tags", "not allowed", "line 1"),
    "anchor": ("params: &a {}\n", "aliases and anchors", "line 1"),
    "alias bomb": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases and anchors", "line 1"),
    "merge key": ("params:\n  <<: {threshold: 0.1}\n", "not valid YAML"),
    "duplicate key": ("params:\n  threshold: 0.1\n  threshold: 0.2\n", "'threshold'", "twice"),
    "duplicate key at the top": ("min_seq_len: 1\nmin_seq_len: 1\n", "'min_seq_len'", "twice"),
    "key no text": ("1: 2\n", "key 1", "line 1"),
    "key a list": ("? [a]\n: 1\n", "key ['a']", "line 1"),
    "deep": ("params: " + "[" * 25 + "]" * 25 + "\n", "nested deeper than 20"),
    "very deep": ("[" * 100_000, "nest"),  # libyaml has a bound of its own
    "endless number": ("min_seq_len: " + "9" * 6000 + "\n", "not valid YAML"),
    "a million lines": ("a: 1\n" * 1_000_000, "larger than 256 KiB"),
}


@pytest.mark.parametrize("content, words", [(b[0], b[1:]) for b in BAD_FILES.values()], ids=BAD_FILES)
def test_bad_file(write, content, words):
    path = write(content)
    start = time.monotonic()
    assert_names(refusal(path), "my.yaml", OPTION, *words)
    assert time.monotonic() - start < 2


def test_missing_file():
    assert_names(refusal("no.yaml"), "no.yaml", OPTION, "no such file", "YAML config file is expected")
    assert_names(refusal({"config": "no.yaml"}), "no.yaml", OPTION, "no such file")
    assert_names(refusal(env="no.yaml"), "no.yaml", "VLLM_S2O_CONFIG", "no such file")
    assert_names(refusal("~nobody-of-that-name/no.yaml"), "no.yaml", "no such file")
    assert_names(refusal("a\nb.yaml"), "a b.yaml", "no such file")
    assert_names(refusal("a" * 5000), "cannot be read", "readable YAML config file is expected")


def test_a_missing_file_of_a_relative_path_says_where_it_was_looked_for(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert_names(refusal("sub/no.yaml"), f"no such file (looked for {tmp_path}/sub/no.yaml);")
    assert_names(refusal(env="no.yaml"), f"no such file (looked for {tmp_path}/no.yaml);")
    assert_names(refusal("~/no.yaml"), "no such file (looked for /home/me/no.yaml);")
    assert "looked for" not in refusal(f"{tmp_path}/no.yaml")


def test_directory(tmp_path):
    assert_names(refusal(str(tmp_path)), tmp_path.name, "is a directory", "YAML config file is expected")


def test_unreadable_file(write, monkeypatch):
    path = write("{}")

    def refuse(*_):  # root may read a file of mode 000
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("vllm_s2o.yaml_file.os.open", refuse)
    assert_names(refusal(path), "my.yaml", "cannot be read (Permission denied)", "readable YAML config file")


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    assert_names(refusal(str(tmp_path / "pipe.yaml")), "pipe.yaml", "is no regular file")


def test_home_is_expanded(write, monkeypatch, tmp_path):
    write("min_seq_len: 3\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_config(OTHER, "~/my.yaml").min_seq_len == 3


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
