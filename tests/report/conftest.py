"""A small model's prompt with S2O."""

from typing import Any, NamedTuple

import calibration_case
import pytest
import torch
from report_case import GIVEN, TOKENS

from vllm_s2o.config import ResolvedConfig, load_config
from vllm_s2o.quality.capture import open_model


class Case(NamedTuple):
    model: Any
    ids: list[int]
    config: ResolvedConfig


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> str:
    return calibration_case.save(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def case(checkpoint) -> Case:
    source = open_model(checkpoint, TOKENS)
    config = load_config(source.traits, GIVEN)
    return Case(source.load(torch.device("cpu")), source.prompt("code", TOKENS), config)
