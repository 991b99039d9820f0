"""What cannot be used stops the start with one sentence that says what, where, and what is allowed."""

import contextlib
import json
import os
import subprocess
import sys
import time
import tracemalloc

import pytest
import yaml
from config_cases import OPTION, OTHER, SMOLLM2, assert_names, refusal

from vllm_s2o import config_errors, yaml_file
from vllm_s2o.config import ConfigError, load_config

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
    "budget 0": ({"params": {"budget": 0}}, "'params.budget'", "0;", "above 0 and up to 1"),
    "budget a text": ({"params": {"budget": "0.1"}}, "'params.budget'", "write 0.1", "above 0 and up to 1"),
    "unknown parameter": ({"params": {"treshold": 0.1}}, "'params.treshold'", "allowed are threshold, reference_len"),
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
    "number to the base of 60": ("min_seq_len: 1" + ":1" * 3000 + "\n", "'min_seq_len'", "too long to show", LENGTH),
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
    "a list": ("- 1\n", "is a list", "YAML mapping"),
    "a number": ("7\n", "is a single value", "YAML mapping"),
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
    "its fraction": ("min_seq_len: 1" + ":1" * 400 + ".5\n", "not valid YAML"),
    "no date": ("min_seq_len: 2001-99-99\n", "not valid YAML"),
    "another YAML": ("%YAML 9.9\n---\nmin_seq_len: 3\n", "not valid YAML"),
    "a million lines": ("a: 1\n" * 1_000_000, "larger than 256 KiB"),
    "a million comments": ("#\n" * 1_000_000, "larger than 256 KiB"),
}


@pytest.mark.parametrize("content, words", [(b[0], b[1:]) for b in BAD_FILES.values()], ids=BAD_FILES)
def test_bad_file(write, content, words):
    path = write(content)
    start = time.monotonic()
    assert_names(refusal(path), "my.yaml", OPTION, *words)
    assert time.monotonic() - start < 2


FULL = yaml_file.MAX_BYTES - 100
WORST = {
    "a word": ("min_seq_len: 1" + ":1" * (FULL // 2) + "\n", "more than 8192 characters", "line 1", "quotes"),
    "a text": ("provenance: {note: '" + "x" * FULL + "'}\n", None),
    "numbers": ("layers: [" + "0," * (FULL // 2) + "]\n", "more than 65536 values", "line 1"),
    "lines": ("layers:\n" + "- 0\n" * (FULL // 4), "'layers.0'", "(and 65510 more wrong)"),
    "wrong numbers": ("layers: [" + "0," * 65_000 + "]\n", "'layers.0'", "(and 64999 more wrong)"),
    "objects": ("layers: [" + "{}," * 32_000 + "]\n", "'layers.0.layers' is missing", "(and 63999 more wrong)"),
    "lists in lists": ("layers: [" + ("[" * 15 + "]" * 15 + ",") * 2000 + "]\n", "'layers.0'", "(and 1999 more wrong)"),
    "fields": ("".join(f"k{i}: 1\n" for i in range(25_000)), "'k0'", "allowed are", "(and 24999 more wrong)"),
    "anchors": ("a: &a 1\n" * 25_000, "aliases and anchors", "line 1"),
}


SLOWEST = ("wrong numbers", "objects", "fields")
"""Among the largest files: each takes seconds, and "lines" does what they do."""


@pytest.mark.parametrize(
    "text, words",
    [
        pytest.param(text, words, id=name, marks=[pytest.mark.long] * (name in SLOWEST))
        for name, (text, *words) in WORST.items()
    ],
)
def test_the_largest_files_take_little(write, text, words):
    """Of a file as large as one may be: seconds of this process, and memory."""
    assert len(text) <= yaml_file.MAX_BYTES
    path = write(text)
    start = time.process_time()
    if words == [None]:
        assert load_config(OTHER, path).file.provenance.note == "x" * FULL
    else:
        assert_names(refusal(path), "my.yaml", *words)
    assert time.process_time() - start < 4
    tracemalloc.start()
    with contextlib.suppress(ConfigError):
        load_config(OTHER, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 * 2**20


EXECUTED = """
import sys
from vllm_s2o.config import ConfigError, ModelTraits, load_config
load_config(ModelTraits("a", "b", 4, 8, 2, 64), None)  # what is imported once is imported
def hook(event, args):
    risky = ("os", "subprocess", "exec", "compile", "import", "shutil", "socket", "ctypes", "marshal")
    if event.split(".")[0] in risky:
        print(event, args)
sys.addaudithook(hook)
try:
    load_config(ModelTraits("a", "b", 4, 8, 2, 64), sys.argv[1])
except ConfigError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize(
    "text",
    [
        "params: !!python/object/apply:os.system ['touch {file}']\n",
        "!!python/object/new:subprocess.Popen [['touch', '{file}']]\n",
        "params: !!python/name:os.system\n",
        "params: !!python/module:antigravity\n",
        "%TAG ! tag:yaml.org,2002:python/\n---\nparams: !object/apply:os.system ['touch {file}']\n",
        "params: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch {file}']\n",
    ],
)
def test_nothing_is_executed(write, tmp_path, text):
    """The interpreter tells of whatever runs a program, imports or compiles."""
    path = write(text.format(file=tmp_path / "executed"))
    done = subprocess.run(
        [sys.executable, "-P", "-c", EXECUTED, path], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.startswith("refused: ") and done.stdout.count("\n") == 1, done.stdout
    assert "tags such as" in done.stdout
    assert not (tmp_path / "executed").exists()


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
