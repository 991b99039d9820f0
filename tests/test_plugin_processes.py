"""The plugin in processes of its own, which import all of vLLM: what they hold, and what reaches them."""

import json
import pickle

import pytest
import vllm
from installed import BACKEND_NAME, TAKES_NAMES
from models import write_smollm2
from processes import ROOT, python_path, run_python

from vllm_s2o import plugin


def test_an_engine_process_can_unpickle_its_configuration(tmp_path):
    """It does so before it loads plugins, and registers afterwards."""
    plugin.register()
    attention = vllm.config.AttentionConfig(backend=BACKEND_NAME)
    child = f"""
import pickle
from vllm.v1.attention.backends.registry import AttentionBackendEnum
assert ("{BACKEND_NAME}" in AttentionBackendEnum.__members__) == {not TAKES_NAMES}
config = pickle.loads(bytes.fromhex("{pickle.dumps(attention).hex()}"))
assert config.backend is AttentionBackendEnum["{BACKEND_NAME}"]
from vllm.plugins import load_general_plugins
load_general_plugins()
assert config.backend is AttentionBackendEnum["{BACKEND_NAME}"]
print(config.backend.name, config.backend.get_path())
"""
    assert run_python(child, tmp_path) == f"{BACKEND_NAME} vllm_s2o.backend.S2OBackend"


COPIED = """
from models import inspected_here
from vllm.config.utils import replace
from vllm_s2o import compat

compat.load_plugins()
with inspected_here():
    config = compat.server_config("model", "CUSTOM", {})
print(replace(config, cache_config=config.cache_config).attention_config.backend.name)
"""


def test_vllm_copies_its_configuration_after_the_plugin_has_seen_it(tmp_path):
    """Field by field: an attribute that it does not know would stop it, on GPUs and with drafts alone."""
    write_smollm2(tmp_path / "model")
    environment = {"PYTHONPATH": python_path(ROOT / "tests" / "helpers", ROOT), "TMPDIR": str(tmp_path)}
    assert run_python(COPIED, tmp_path, **environment).splitlines()[-1] == "CUSTOM"


# -- a process without the flag ---------------------------------------------------------------------------------------

LOOK = """
import json, sys, torch
from vllm.plugins import load_general_plugins
load_general_plugins()
from vllm.config import VllmConfig
config = VllmConfig()
parts = {name: str(value) for name, value in vars(config).items() if name.endswith("_config")}
look = {"modules": sorted(sys.modules), "cuda": torch.cuda.is_initialized(), "config": parts}
print(json.dumps(look | {"hash": config.compute_hash()}))
"""


@pytest.fixture(scope="module")
def looks(tmp_path_factory):
    """What a process holds after vLLM has loaded all plugins, and after it has loaded none."""
    outside = tmp_path_factory.mktemp("outside")
    return [json.loads(run_python(LOOK, outside, **env)) for env in ({}, {"VLLM_PLUGINS": ""})]


def ours(look) -> set[str]:
    return {name for name in look["modules"] if name.partition(".")[0] == "vllm_s2o"}


def test_loading_the_plugin_imports_next_to_nothing(looks):
    with_plugin, without = looks
    compat = {"vllm_s2o.compat", "vllm_s2o.compat.caches", "vllm_s2o.compat.requests"}
    assert ours(with_plugin) == {"vllm_s2o", "vllm_s2o.version", "vllm_s2o.plugin", *compat}
    assert ours(without) == set(), "the comparison proves nothing"


def test_loading_the_plugin_touches_no_device(looks):
    with_plugin, without = looks
    assert not with_plugin["cuda"]
    added = set(with_plugin["modules"]) - set(without["modules"])
    assert not [name for name in added if name.partition(".")[0] in ("triton", "pydantic", "yaml", "kernels")]


def test_a_configuration_without_the_flag_stays_as_it_is(looks):
    with_plugin, without = looks
    assert "attention_config" in without["config"]
    assert with_plugin["config"] == without["config"]
    assert with_plugin["hash"] == without["hash"]
