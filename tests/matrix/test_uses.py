"""Whatever vllm_s2o touches of vLLM is there, in each version, and can be called as it is called."""

import pytest
from processes import ROOT
from vllm_uses import Problem, follow, uses

from vllm_s2o.compat import _release

USES = uses(ROOT / "vllm_s2o")

SINCE, UNTIL, NEVER = "since", "until", "never"

# What vllm_s2o asks for before it uses it, where the answer is not always yes. A name that is in no version any more,
# or has come back, is code in vllm_s2o that no one needs, or that does not do what it says.
HANDLED = {
    "vllm.v1.attention.backends.registry.AttentionBackendEnum.register": (SINCE, "0.32"),
    "VllmConfig.attention_config.backend_per_kind": (SINCE, "0.26"),
    "vllm.v1.attention.backend.max_decode_query_len": (SINCE, "0.31"),
    "VllmConfig.scheduler_config.long_prefill_token_threshold_adaptive": (SINCE, "0.31"),
    "Attention.is_draft_layer": (SINCE, "0.31"),
    "Attention.isa": (SINCE, "0.29"),
    "CPUAttentionBackendImpl.isa": (UNTIL, "0.29"),
    "CommonAttentionMetadata._seq_lens_cpu": (UNTIL, "0.30"),
    "CommonAttentionMetadata.req_idx": (SINCE, "0.30"),
    "FlashAttentionMetadata.use_cascade": (UNTIL, "0.32"),
    "vllm.envs.VLLM_USE_RAY_V2_EXECUTOR_BACKEND": (UNTIL, "0.33"),
    # A CPU's backend has these, or a GPU's, not both.
    "FlashAttentionImpl.isa": (NEVER, ""),
    "CPUAttentionMetadata.use_cascade": (NEVER, ""),
    "CPUAttentionMetadata.max_num_splits": (NEVER, ""),
}


def expected(use, version: str) -> bool:
    for name, (when, bound) in HANDLED.items():
        if str(use).startswith(name) and str(use)[len(name) :][:1] in ("", ".", "(", "["):
            if when == NEVER:
                return False
            return (_release(version) >= _release(bound)) == (when == SINCE)
    return True


def test_the_uses_are_found():
    """The list is derived: an empty or short one would prove nothing."""
    found = {str(use) for use in USES}
    assert len(found) > 100
    assert {
        "vllm.v1.attention.backends.registry.AttentionBackendEnum.CUSTOM",
        "vllm.v1.attention.backends.registry.register_backend()",
        "vllm.platforms.current_platform.__class__.get_attn_backend_cls()",
        "VllmConfig.scheduler_config.max_num_batched_tokens",
        "CommonAttentionMetadata.seq_lens_cpu_upper_bound",
        "FlashAttentionMetadataBuilder.build()",
        "CPUAttentionBackendImpl.forward()",
        "vllm.v1.worker.workspace.current_workspace_manager().get_simultaneous()",
    } <= found


def test_what_is_handled_is_asked_for():
    asked = {str(use) for use in USES if use.optional}
    assert sorted(set(HANDLED) - asked) == [], "HANDLED has names that vllm_s2o does not ask for any more"


@pytest.mark.parametrize("use", [use for use in USES if not use.optional], ids=str)
def test_what_is_needed_is_there(use, sources):
    try:
        follow(use, sources)
    except Problem as problem:
        pytest.fail(str(problem), pytrace=False)


@pytest.mark.parametrize("use", [use for use in USES if use.optional], ids=str)
def test_what_is_asked_for_is_there_when_it_is_said_to_be(use, sources, version):
    try:
        found = follow(use, sources)
    except Problem as problem:
        pytest.fail(str(problem), pytrace=False)
    if found != expected(use, version):
        has = "has" if found else "does not have"
        pytest.fail(f"{use.line}: vLLM {version} {has} {use}, and HANDLED says otherwise.", pytrace=False)
