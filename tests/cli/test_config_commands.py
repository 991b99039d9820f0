"""`vllm-s2o config`: values with their origins, a server's sentences, and fields in words."""

import json
import re

import pytest

from vllm_s2o import config_reference
from vllm_s2o.config import ConfigError, ModelTraits, load_config
from vllm_s2o.params import S2OParams

OPTION = '--additional-config "s2o"'
FILE = "smollm2-135m-instruct.yaml"
TRAITS = ModelTraits("SmolLM2-135M-Instruct", "LlamaForCausalLM", 30, 9, 3, 64)


def option(**s2o) -> tuple[str, str]:
    return "--additional-config", json.dumps({"s2o": s2o})


def rows(out: str) -> dict[str, list[str]]:
    """The table of `show` or `explain`: field -> the other columns."""
    table = out[out.index("field ") :].splitlines()[1:]
    return {line.split()[0]: line.split(maxsplit=2)[1:] for line in table}


# -- show -------------------------------------------------------------------------------------------------------------


def test_every_value_has_its_origin(command, smollm2):
    ended = command("config", "show", smollm2, *option(stop_interval=2))
    assert (ended.status, ended.err) == (0, "")
    assert ended.out.startswith(f"config {FILE} (matched by name; calibrated: searched on ")
    table = rows(ended.out)
    overrides = [name for name in table if name.startswith("layers.")]
    assert overrides == [f"layers.{index}" for index in range(len(load_config(TRAITS).file.layers))]
    assert set(table) - set(overrides) == {
        "min_seq_len", "min_query_len", *(f"params.{name}" for name in S2OParams.model_fields),
    }  # fmt: skip
    assert table["min_seq_len"] == ["2048", FILE]
    assert table["params.stop_interval"] == ["2", OPTION]
    assert table["params.budget"] == ["null", "default"]
    name, override, origin = re.split("  +", ended.out.splitlines()[-1])
    assert (name, origin) == (overrides[-1], FILE)
    assert set(json.loads(override)) == {"layers", "heads", "threshold"}


def test_overrides_say_which_are_the_users(command, smollm2):
    given = option(layers=[{"layers": "4-5", "heads": [0], "threshold": 0.1}])
    document = command("config", "show", smollm2, *given, "--json").document
    *files, users = document["layers"]
    assert len(files) > 20 and {entry["origin"] for entry in files} == {FILE}
    assert users == {"layers": "4-5", "heads": [0], "threshold": 0.1, "origin": OPTION}


def test_what_json_holds(command, smollm2):
    document = command("config", "show", smollm2, "--json").document
    assert set(document) == {
        "model", "source", "matched", "named_by", "provenance", "fields", "layers", "dense_layers", "digest",
    }  # fmt: skip
    assert document["model"] == {
        "name": smollm2, "architecture": "LlamaForCausalLM",
        "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "head_size": 64,
    }  # fmt: skip
    assert (document["source"], document["matched"], document["named_by"]) == (FILE, "name", None)
    assert document["provenance"]["calibrated"] is True
    assert document["fields"]["params.segment_len"] == {"value": 256, "origin": FILE}
    assert document["dense_layers"] == []
    assert document["digest"] == load_config(TRAITS).digest()


def test_json_of_what_yaml_may_hold(command, smollm2, tmp_path):
    """Dates, and numbers that are none, in what a file says of its origin: a script can read the document."""
    calibration = "{made: 2026-11-25, at: 2026-11-25 10:00:00, kl: .nan, bounds: [-.inf, 1.5], nothing: null}"
    (tmp_path / "my.yaml").write_text(f"provenance: {{calibrated: true, calibration: {calibration}}}\n")
    ended = command("config", "show", smollm2, "--additional-config", '{"s2o": "my.yaml"}', "--json")
    assert "NaN" not in ended.out and "Infinity" not in ended.out
    assert ended.document["provenance"]["calibration"] == {
        "made": "2026-11-25", "at": "2026-11-25T10:00:00", "kl": None, "bounds": [None, 1.5], "nothing": None,
    }  # fmt: skip


def test_the_variable_is_told_apart_from_the_option(command, smollm2, monkeypatch, tmp_path):
    (tmp_path / "my.yaml").write_text("min_seq_len: 99\nparams: {threshold: 0.5}\n")
    monkeypatch.setenv("VLLM_S2O_CONFIG", "my.yaml")
    by_variable = command("config", "show", smollm2, *option(segment_len=128), "--json").document
    origins = {name: entry["origin"] for name, entry in by_variable["fields"].items()}
    assert origins["min_seq_len"] == origins["params.threshold"] == "my.yaml (named by VLLM_S2O_CONFIG)"
    assert (origins["params.segment_len"], origins["min_query_len"]) == (OPTION, "default")
    by_option = command("config", "show", smollm2, "--additional-config", '{"s2o": "my.yaml"}', "--json").document
    assert by_option["fields"]["min_seq_len"] == {"value": 99, "origin": f"my.yaml (named by {OPTION})"}


@pytest.mark.parametrize("given", [{"threshold": 2}, {"treshold": 0.1}, {"config": "no.yaml"}], ids=json.dumps)
def test_show_refuses_in_the_servers_words(command, smollm2, given):
    with pytest.raises(ConfigError) as servers:
        load_config(TRAITS, given)
    ended = command("config", "show", smollm2, *option(**given))
    assert (ended.status, ended.sentence) == (1, f"vllm-s2o: {servers.value}")


def test_show_refuses_a_misspelt_key_and_a_model_that_is_none(command, smollm2):
    ended = command("config", "show", smollm2, "--additional-config", '{"S2O": {}}')
    assert (ended.status, ended.sentence) == (1, "vllm-s2o: --additional-config has the key 'S2O'; allowed is 's2o'.")
    ended = command("config", "show", "./nothing")
    assert ended.status == 1 and "there is no directory ./nothing; allowed is" in ended.sentence


@pytest.mark.parametrize("text", ["", "{", "3", "[]", "null", "[" * 100_000], ids=lambda text: text[:4])
def test_an_option_that_is_no_object_is_not_understood(command, smollm2, text):
    ended = command("config", "show", smollm2, "--additional-config", text)
    assert ended.status == 2
    assert "'--additional-config': allowed is a JSON object such as '{\"s2o\": " in ended.sentence
    assert len(ended.sentence) < 300


# -- validate ---------------------------------------------------------------------------------------------------------

GOOD = "min_seq_len: 1\nlayers:\n  - {layers: 29, heads: 8, threshold: 0}\n"
BAD = {
    "out of range": "params: {threshold: 1}\n",
    "unknown": "params: {tau: 0.1}\n",
    "not YAML": "params: [1\n",
    "given in vain": "params: {budget: 0.1, threshold: 0.1}\n",
    "between two fields": "params: {segment_len: 100}\n",
    "empty": "",
}


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> str:
        (tmp_path / "my.yaml").write_text(text)
        return str(tmp_path / "my.yaml")

    return write


def test_a_good_file_is_ok(command, write, smollm2):
    path = write(GOOD)
    assert command("config", "validate", path) == (0, f"{path}: ok\n", "")
    assert command("config", "validate", path, "--model", smollm2) == (0, f"{path}: ok for {smollm2}\n", "")
    document = command("config", "validate", path, "--model", smollm2, "--json").document
    assert document == {"file": path, "model": smollm2, "valid": True, "problem": None, "problems": []}


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_a_bad_file_gets_the_servers_sentence(command, write, text):
    path = write(text)
    with pytest.raises(ConfigError) as servers:
        load_config(TRAITS, path)
    # A server also says what named a file that cannot be read.
    sentence = str(servers.value).replace(f" (named by {OPTION})", "")
    ended = command("config", "validate", path)
    assert (ended.status, ended.sentence) == (1, f"vllm-s2o: {sentence}")


@pytest.mark.parametrize("path", ["no.yaml", ".", ""])
def test_a_path_that_is_no_file(command, path):
    ended = command("config", "validate", path)
    assert ended.status == 1
    assert "a path to a YAML config file is expected." in ended.sentence


def test_a_file_for_another_model(command, write, smollm2):
    path = write(GOOD.replace("29", "30"))
    assert command("config", "validate", path).status == 0, "nobody said which model it is for"
    ended = command("config", "validate", path, "--model", smollm2)
    assert ended.status == 1
    assert "'layers.0.layers' cannot be 30" in ended.sentence and "0 to 29" in ended.sentence


def test_a_bad_file_in_json(command, write):
    path = write(BAD["unknown"])
    ended = command("config", "validate", path, "--json")
    document = json.loads(ended.out)
    assert ended.status == 1
    sentence = document["problem"]
    assert document == {"file": path, "model": None, "valid": False, "problem": sentence, "problems": [sentence]}
    assert ended.err == f"vllm-s2o: {sentence}\n"
    assert "'params.tau'" in sentence


def test_all_wrong_fields_of_a_file_are_told(command, write, smollm2):
    """A server ends with the first; who looks at the file wants to mend it once."""
    path = write("min_seq_len: 0\nparams: {threshold: 2, tau: 1}\nlayers: [{layers: 3}]\n")
    names = ["min_seq_len", "params.threshold", "params.tau", "layers.0.threshold"]
    for model in ((), ("--model", smollm2)):
        ended = command("config", "validate", path, *model)
        lines = ended.err.splitlines()
        assert (ended.status, ended.out) == (1, "")
        for line, name in zip(lines, names, strict=True):
            assert line.startswith(f"vllm-s2o: {path}: ") and f"'{name}'" in line and line.endswith(".")
            assert "more wrong" not in line
    ended = command("config", "validate", path, "--json")
    document = json.loads(ended.out)
    assert [f"vllm-s2o: {problem}" for problem in document["problems"]] == lines == ended.err.splitlines()
    assert document["problem"].endswith(" (and 3 more wrong).")


def test_of_very_many_wrong_fields_the_rest_is_counted(command, write):
    path = write("layers: [" + "0," * 1000 + "]\n")
    lines = command("config", "validate", path).err.splitlines()
    assert len(lines) == 21 and lines[-1] == f"vllm-s2o: {path}: 980 more fields are wrong."


# -- explain ----------------------------------------------------------------------------------------------------------


def test_all_fields(command):
    table = rows(command("config", "explain").out)
    assert list(table) == [one.name for one in config_reference.fields()]
    assert table["params.threshold"][0] == "0.02"
    assert table["layers.threshold"][0] == "(required)"


def test_one_field(command):
    ended = command("config", "explain", "key_block")
    assert (ended.status, ended.out.splitlines()) == (
        0,
        [
            "params.key_block",
            f"  meaning  {S2OParams.model_fields['key_block'].description}",
            "  type     whole number",
            "  allowed  16, 32, 64 or 128",
            "  default  64",
        ],
    )


def test_fields_in_json(command):
    every = command("config", "explain", "--json").document
    assert [one["name"] for one in every] == [one.name for one in config_reference.fields()]
    one = command("config", "explain", "layers.0.heads", "--json").document
    assert one in every
    assert set(one) == {"name", "meaning", "type", "allowed", "required", "default"}
    assert (one["name"], one["required"], one["default"]) == ("layers.heads", False, None)


def test_a_field_that_is_none(command):
    ended = command("config", "explain", "treshold")
    assert ended.status == 2
    assert ended.sentence.startswith("vllm-s2o config explain: there is no field 'treshold'; allowed are min_seq_len, ")


# -- the command itself -----------------------------------------------------------------------------------------------

NOT_UNDERSTOOD = {
    "a command": (["bnch"], "vllm-s2o: ", "'bnch'", "config, doctor"),
    "a command of config": (["config", "shw"], "vllm-s2o config: ", "'shw'", "explain, show, validate"),
    "an option": (["config", "explain", "--jsn"], "vllm-s2o config explain: ", "--jsn"),
    "an argument too few": (["config", "show"], "vllm-s2o config show: ", "MODEL"),
    "an argument too many": (["config", "explain", "a", "b"], "vllm-s2o config explain: ", "argument"),
    "a model's option without a model": (["doctor", *option()], "vllm-s2o doctor: ", "name one"),
}


@pytest.mark.parametrize(
    "arguments, start, words", [(a, s, w) for a, s, *w in NOT_UNDERSTOOD.values()], ids=NOT_UNDERSTOOD
)
def test_what_is_not_understood(command, arguments, start, words):
    ended = command(*arguments)
    assert ended.status == 2
    assert ended.sentence.startswith(start)
    assert ended.sentence.endswith(f" See '{start.removesuffix(': ')} --help'.")
    for word in words:
        assert word in ended.sentence


@pytest.mark.parametrize("arguments", [[], ["config"]], ids=["alone", "a group"])
def test_without_a_subcommand_help_is_shown(command, arguments):
    assert command(*arguments) == command(*arguments, "--help")
