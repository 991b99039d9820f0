"""What each field is said to be holds for the models that check it."""

import json

import pytest
from pydantic import TypeAdapter, ValidationError

from vllm_s2o.config import ConfigError
from vllm_s2o.config_errors import ALLOWED, NESTED
from vllm_s2o.config_file import ConfigFile
from vllm_s2o.config_reference import Field, field, fields

LEAVES = [one for one in fields() if one.name not in NESTED]
VALUES = {
    "whole number": 64,
    "number": 0.5,
    "text": "a text",
    "true or false": True,
    "null": None,
    "list": [1],
    "object": {"a": 1},
}
"""One of each type, so that every type which is not named is refused."""


def model_of(one: Field) -> tuple[type, str]:
    parent, _, name = one.name.rpartition(".")
    return NESTED.get(parent, ConfigFile), name


def test_every_field_is_there_once():
    names = [one.name for one in fields()]
    assert len(names) == len(set(names))
    assert len(names) == sum(map(len, ALLOWED.values()))
    assert all(one.meaning.endswith(".") and one.allowed and one.type for one in fields())


@pytest.mark.parametrize("one", fields(), ids=lambda one: one.name)
def test_the_default_is_the_models(one):
    model, name = model_of(one)
    info = model.model_fields[name]
    assert one.required == info.is_required()
    if not one.required:
        default = TypeAdapter(info.annotation).dump_python(info.default, mode="json")
        assert one.default == ({} if one.type == "object" else default)
        assert json.loads(json.dumps(one.default)) == one.default


@pytest.mark.parametrize("one", LEAVES, ids=lambda one: one.name)
def test_types_that_are_not_named_are_refused(one):
    model, name = model_of(one)
    required = {other: "0" for other, info in model.model_fields.items() if info.is_required()}
    named = one.type.replace("list of", "list or").split(" or ")
    for kind, value in VALUES.items():
        word = "true" if kind == "true or false" else kind
        # A whole number is a number, wherever one is allowed.
        if word in named or (word == "whole number" and "number" in named):
            continue
        with pytest.raises(ValidationError) as caught:
            model.model_validate(required | {name: value})
        assert any(error["loc"][:1] == (name,) for error in caught.value.errors()), kind


@pytest.mark.parametrize(
    "given, name",
    {
        "min_seq_len": "min_seq_len",
        "params.threshold": "params.threshold",
        "threshold": "params.threshold",
        "layers.threshold": "layers.threshold",
        "layers.0.threshold": "layers.threshold",
        "layers": "layers",
    }.items(),
)
def test_names(given, name):
    assert field(given).name == name


@pytest.mark.parametrize("given", ["", "0", "treshold", "params.min_seq_len", "x" * 200])
def test_another_name_is_refused(given):
    with pytest.raises(ConfigError) as caught:
        field(given)
    sentence = str(caught.value)
    assert sentence.startswith("there is no field '") and sentence.endswith(".")
    assert "min_seq_len, " in sentence and "threshold, reference_len" in sentence
    assert len(sentence) < 600
