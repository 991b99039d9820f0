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


def make(checkpoint: str, query_order: str) -> Case:
    source = open_model(checkpoint, TOKENS)
    config = load_config(source.traits, {**GIVEN, "query_order": query_order})
    return Case(source.load(torch.device("cpu")), source.prompt("code", TOKENS), config)


@pytest.fixture(scope="session", params=["position", "guide"])
def case(request, checkpoint) -> Case:
    """In each order of queries."""
    return make(checkpoint, request.param)


@pytest.fixture(scope="session")
def plain(checkpoint) -> Case:
    """In that which is served."""
    return make(checkpoint, "position")
