"""What stays dense and why, and what vLLM's metadata says of a step."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from installed import BACKEND_NAME, TAKES_NAMES, since
from tiny import common_metadata
from vllm.v1.attention import backend
from vllm.v1.attention.backend import AttentionCGSupport, AttentionType
from vllm.v1.attention.backends import registry
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_s2o import compat
from vllm_s2o.compat import caches

# -- layers -----------------------------------------------------------------------------------------------------------


def impl(**changes) -> SimpleNamespace:
    """An implementation of plain attention, as FLASH_ATTN describes itself."""
    plain = {
        "sliding_window": (-1, -1),
        "alibi_slopes": None,
        "logits_soft_cap": 0,
        "sinks": None,
        "attn_type": AttentionType.DECODER,
        "kv_cache_dtype": "auto",
        "head_size": 256,
        "dcp_world_size": 1,
        "total_cp_world_size": 1,
        "s2o_draft": False,
    }
    return SimpleNamespace(**plain | changes)


@pytest.mark.parametrize(
    "plain",
    [
        impl(),
        impl(sliding_window=-1, isa="vec"),
        impl(sliding_window=None, logits_soft_cap=None),
        impl(attn_type="decoder"),
        impl(kv_cache_dtype="bfloat16"),
        impl(kv_cache_dtype="float16"),
    ],
    ids=["flash-attn", "cpu-attn", "nothing-given", "type-as-text", "bf16-cache", "fp16-cache"],
)
def test_plain_layers_have_no_problem(plain):
    assert compat.layer_problem(plain, SimpleNamespace()) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"sliding_window": 4096}, "sliding window"),
        ({"sliding_window": (4095, 0)}, "sliding window"),
        ({"sliding_window": (0, 0)}, "sliding window"),
        ({"alibi_slopes": torch.ones(4)}, "ALiBi"),
        ({"logits_soft_cap": 30.0}, "logits soft cap"),
        ({"sinks": torch.zeros(4)}, "attention sinks"),
        ({"attn_type": AttentionType.ENCODER}, "encoder or cross attention"),
        ({"attn_type": AttentionType.ENCODER_ONLY}, "encoder or cross attention"),
        ({"attn_type": AttentionType.ENCODER_DECODER}, "encoder or cross attention"),
        ({"attn_type": "encoder_only"}, "encoder or cross attention"),
        ({"kv_cache_dtype": "fp8"}, "quantised KV cache (fp8 on a CPU)"),
        ({"kv_cache_dtype": "fp8_e5m2"}, "quantised KV cache (fp8_e5m2)"),
        ({"total_cp_world_size": 2}, "context parallelism"),
        ({"dcp_world_size": 2}, "context parallelism"),
        ({"head_size": 512}, "head size 512, above 256"),
        ({"isa": "neon"}, "unknown CPU cache layout (neon)"),
        ({"s2o_draft": True}, "draft model"),
    ],
    ids=[
        *("window", "window-pair", "window-of-one", "alibi", "soft-cap", "sinks", "encoder", "encoder-only", "cross"),
        *("encoder-as-text", "fp8", "fp8-e5m2", "context-parallel", "decode-context-parallel", "wide-head", "neon"),
        "draft",
    ],
)
def test_why_a_layer_stays_dense(changes, reason):
    assert compat.layer_problem(impl(**changes), SimpleNamespace()) == reason


def test_a_layer_without_sinks_or_parallelism_may_not_know_of_them():
    older = impl()
    del older.sinks, older.total_cp_world_size, older.dcp_world_size
    assert compat.layer_problem(older, SimpleNamespace()) is None


def test_an_unknown_layout_noted_on_the_layer_is_named():
    assert compat.layer_problem(impl(), SimpleNamespace(isa="rvv")) == "unknown CPU cache layout (rvv)"


def test_a_layer_that_vllm_marks_as_a_drafts_is_one():
    assert compat.layer_problem(impl(), SimpleNamespace(is_draft_layer=True)) == "draft model"
    assert compat.layer_problem(impl(), SimpleNamespace(is_draft_layer=False)) is None


@pytest.mark.parametrize("isa", caches.CPU_LAYOUTS)
def test_known_layouts_are_no_problem(isa):
    assert compat.layer_problem(impl(), SimpleNamespace(isa=isa)) is None


def gpu(monkeypatch, capability: int) -> None:
    platform = SimpleNamespace(is_cuda=lambda: True, has_device_capability=lambda wanted: capability >= wanted)
    monkeypatch.setattr("vllm.platforms.current_platform", platform)


def quantised_layer(scales: int = 1) -> SimpleNamespace:
    tensors = {f"_{name}_scale": torch.ones(scales) for name in "qkv"}
    return SimpleNamespace(**tensors, _q_scale_float=0.25, _k_scale_float=0.5, _v_scale_float=4.0)


@pytest.mark.parametrize(
    ("kind", "capability", "scales", "reason"),
    [
        ("fp8", 90, 1, None),
        ("fp8_e4m3", 89, 1, None),
        ("fp8", 80, 1, "fp8 on a GPU without fp8"),
        ("fp8", 90, 8, "fp8 with a scale per head"),
        ("fp8_e5m2", 90, 1, "fp8_e5m2"),
        ("int8_per_token_head", 90, 1, "int8_per_token_head"),
    ],
)
def test_a_quantised_cache_on_a_gpu(monkeypatch, kind, capability, scales, reason):
    gpu(monkeypatch, capability)
    expected = reason and f"quantised KV cache ({reason})"
    assert compat.layer_problem(impl(kv_cache_dtype=kind), quantised_layer(scales)) == expected


def test_types_and_factors_of_a_quantised_cache():
    """As vLLM says: queries come in fp8 to an implementation that asks for them so."""
    fp8 = impl(kv_cache_dtype="fp8", supports_quant_query_input=True)
    assert caches.kernel_dtypes(fp8) == (torch.float8_e4m3fn, torch.float8_e4m3fn)
    assert caches.kernel_dtypes(impl(kv_cache_dtype="fp8")) == (None, torch.float8_e4m3fn)
    assert caches.kernel_dtypes(impl()) == (None, None)
    query = torch.zeros(1, dtype=torch.float8_e4m3fn)
    assert caches.scales(fp8, quantised_layer(), query) == (0.125, 4.0)
    assert caches.scales(fp8, quantised_layer(), query.bfloat16()) == (0.5, 4.0)
    assert caches.scales(impl(), SimpleNamespace(), query) == (1.0, 1.0)


# -- steps ------------------------------------------------------------------------------------------------------------

QUERY_LENS, SEQ_LENS = [1, 5, 8, 1], [40, 5, 30, 7]


def common(**fields):
    """A decode, two prefills of which one has a history, and another decode."""
    table = torch.arange(12, dtype=torch.int32).view(4, 3)
    return common_metadata(QUERY_LENS, SEQ_LENS, table, torch.arange(100, 115), **fields)


def test_a_plain_step_has_no_problem():
    assert compat.step_problem(common(), SimpleNamespace()) is None
    assert compat.step_problem(common(mm_req_doc_ranges={}), SimpleNamespace(use_cascade=False)) is None


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"causal": False}, "non-causal or per-request causality"),
        ({"causal": torch.tensor([True] * 4)}, "non-causal or per-request causality"),
        ({"mm_req_doc_ranges": {0: [(0, 4)]}}, "multimodal prefix ranges"),
        ({"rswa_prefix_lens": torch.tensor([3, 0, 0, 0])}, "R-SWA"),
        ({"logits_indices_padded": torch.tensor([0])}, "fast prefill of shared KV layers"),
        ({"encoder_seq_lens": torch.tensor([4, 0, 0, 0])}, "encoder or cross attention"),
    ],
    ids=["non-causal", "per-request", "multimodal", "r-swa", "fast-prefill", "cross"],
)
def test_why_a_step_stays_dense(fields, reason):
    assert compat.step_problem(common(**fields), SimpleNamespace(use_cascade=False)) == reason


def test_cascade_attention_stays_dense():
    assert compat.step_problem(common(), SimpleNamespace(use_cascade=True)) == "cascade attention"


def test_lengths_come_from_the_bound_that_the_host_knows():
    """It is another tensor than the device's lengths, whose values are not looked at."""
    bound = torch.tensor([41, 5, 30, 8], dtype=torch.int32)
    assert compat.host_lengths(common(seq_lens_cpu_upper_bound=bound)) == (QUERY_LENS, [41, 5, 30, 8])


def test_lengths_without_a_bound_come_from_lengths_on_the_cpu():
    assert compat.host_lengths(common(seq_lens_cpu_upper_bound=None)) == (QUERY_LENS, SEQ_LENS)


def on_gpu(**fields) -> SimpleNamespace:
    """A step whose lengths are on a GPU, where reading them would wait."""
    starts = torch.tensor([0, 1, 6])
    return SimpleNamespace(
        query_start_loc_cpu=starts, seq_lens=SimpleNamespace(is_cuda=True), num_reqs=2, seq_lens_cpu_upper_bound=None,
        **fields,
    )  # fmt: skip


def test_lengths_that_only_a_gpu_knows_are_not_read():
    assert compat.host_lengths(on_gpu()) is None


def test_older_vllm_keeps_the_lengths_under_another_name():
    assert compat.host_lengths(on_gpu(_seq_lens_cpu=torch.tensor([9, 5]))) == ([1, 5], [9, 5])


def test_rows_that_only_pad_a_graph_have_no_lengths():
    padded = dataclasses.replace(common(), num_reqs=3)
    assert compat.host_lengths(padded) == (QUERY_LENS[:3], SEQ_LENS[:3])


@pytest.mark.parametrize(("first", "last"), [(0, 1), (1, 3), (3, 4), (0, 4)])
def test_rows_are_sliced(first, last):
    whole = common(positions=torch.arange(15), is_prefilling=torch.tensor([False, True, True, False]))
    starts = [0, 1, 6, 14, 15]
    rows, tokens = slice(first, last), slice(starts[first], starts[last])
    cut = compat.slice_rows(whole, first, last, QUERY_LENS, SEQ_LENS)
    assert type(cut) is type(whole)
    assert cut.num_reqs == last - first
    assert cut.num_actual_tokens == sum(QUERY_LENS[rows])
    assert cut.max_query_len == max(QUERY_LENS[rows])
    assert cut.max_seq_len == max(SEQ_LENS[rows])
    for starts_cut in (cut.query_start_loc, cut.query_start_loc_cpu):
        assert starts_cut.tolist() == [start - starts[first] for start in starts[first : last + 1]]
        assert starts_cut.dtype == torch.int32
    assert cut.seq_lens.tolist() == cut.seq_lens_cpu_upper_bound.tolist() == SEQ_LENS[rows]
    assert torch.equal(cut.block_table_tensor, whole.block_table_tensor[rows])
    assert torch.equal(cut.is_prefilling, whole.is_prefilling[rows])
    assert torch.equal(cut.slot_mapping, whole.slot_mapping[tokens])
    assert torch.equal(cut.positions, whole.positions[tokens])
    assert cut.causal is True


def test_slicing_leaves_the_whole_step_alone_and_forgets_what_it_cached():
    whole = common()
    computed = whole.compute_num_computed_tokens()
    before = {field.name: getattr(whole, field.name) for field in dataclasses.fields(whole)}
    copies = {name: value.clone() for name, value in before.items() if isinstance(value, torch.Tensor)}
    cut = compat.slice_rows(whole, 1, 3, QUERY_LENS, SEQ_LENS)
    assert cut.compute_num_computed_tokens().tolist() == computed[1:3].tolist() == [0, 22]
    assert all(getattr(whole, name) is value for name, value in before.items())
    assert all(torch.equal(getattr(whole, name), copy) for name, copy in copies.items())


def test_nothing_cached_survives_a_slice():
    fields = {field.name for field in dataclasses.fields(common())}
    cached = [name for name in fields if name.startswith("_") and name != "_seq_lens_cpu"]
    assert cached, "vLLM caches nothing any more"
    whole = dataclasses.replace(common(), **dict.fromkeys(cached, torch.arange(4)))
    cut = compat.slice_rows(whole, 1, 3, QUERY_LENS, SEQ_LENS)
    assert [name for name in cached if getattr(cut, name) is not None] == []


def test_rows_are_launched_as_their_batch_is():
    part, whole = SimpleNamespace(max_num_splits=32), SimpleNamespace(max_num_splits=1)
    assert compat.as_in_batch(part, whole) is part
    assert part.max_num_splits == 1
    assert vars(compat.as_in_batch(SimpleNamespace(), SimpleNamespace())) == {}, "the CPU backend has no splits"


# -- the flag and the model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense", "ours"),
    [
        ("NEVER", "NEVER"),
        ("UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_SINGLE_TOKEN_DECODE"),
        ("UNIFORM_BATCH", "UNIFORM_BATCH"),
        ("ALWAYS", "UNIFORM_BATCH"),
    ],
)
def test_graphs_hold_uniform_decode_at_most(dense, ours):
    builder = SimpleNamespace(_cudagraph_support=AttentionCGSupport[dense])
    assert compat.cudagraph_support(builder) is AttentionCGSupport[ours]


def test_all_kinds_of_graph_support_are_known():
    """What is above uniform decode in a new vLLM must be thought about."""
    known = {"NEVER", "UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_BATCH", "ALWAYS"}
    assert {support.name for support in AttentionCGSupport} == known


HAS_FUNCTION = since("0.31")
WHOSE = pytest.mark.parametrize(
    "own",
    [True, False] if HAS_FUNCTION else [False],
    ids=lambda own: "vLLM's function" if own else "a vLLM without one",
)


@WHOSE
@pytest.mark.parametrize(
    ("proposed", "parallel", "runner_v2", "longest"),
    [
        pytest.param(3, False, False, 4, id="one-after-the-other"),
        pytest.param(3, True, False, 7, id="in-parallel"),
        pytest.param(3, True, True, 4, id="in-parallel-on-runner-v2"),
        pytest.param(None, False, False, 1, id="no-tokens"),
    ],
)
def test_the_longest_decode(monkeypatch, own, proposed, parallel, runner_v2, longest):
    """V1's parallel drafter appends what it proposes to what is verified."""
    if not own:
        monkeypatch.delattr(backend, "max_decode_query_len", raising=HAS_FUNCTION)
        longest = 7 if parallel else longest  # 0.25.1 asks for no runner
    speculative = SimpleNamespace(num_speculative_tokens=proposed, parallel_drafting=parallel)
    given = SimpleNamespace(speculative_config=speculative, use_v2_model_runner=runner_v2)
    assert compat.longest_decode(given) == longest


@WHOSE
def test_the_longest_decode_without_a_drafter(monkeypatch, own):
    if not own:
        monkeypatch.delattr(backend, "max_decode_query_len", raising=HAS_FUNCTION)
    assert compat.longest_decode(SimpleNamespace(speculative_config=None)) == 1


@pytest.mark.parametrize("halves, reason", [(False, None), (True, "dual-batch overlap")], ids=["whole", "halves"])
def test_why_an_engine_stays_dense(halves, reason):
    given = SimpleNamespace(parallel_config=SimpleNamespace(use_ubatching=halves))
    assert compat.engine_problem(given) == reason


def model(**changes) -> SimpleNamespace:
    text = SimpleNamespace(num_hidden_layers=30, num_attention_heads=9)
    fields = {
        "model": "some/model",
        "hf_config": SimpleNamespace(architectures=["LlamaForCausalLM", "Other"]),
        "hf_text_config": text,
        "get_total_num_kv_heads": lambda: 3,
        "get_head_size": lambda: 64,
    }
    return SimpleNamespace(**fields | changes)


def test_traits_of_a_model():
    """Of a multimodal model, the text part counts, and the architecture is that of the whole."""
    assert compat.model_traits(model()) == {
        "name": "some/model", "architecture": "LlamaForCausalLM",
        "num_layers": 30, "num_heads": 9, "num_kv_heads": 3, "head_size": 64,
    }  # fmt: skip


@pytest.mark.parametrize("hf_config", [SimpleNamespace(architectures=None), SimpleNamespace()], ids=["none", "missing"])
def test_a_model_without_an_architecture(hf_config):
    assert compat.model_traits(model(hf_config=hf_config))["architecture"] == "unknown"


@pytest.fixture
def registered(monkeypatch):
    """The registry with the backend in it, as other plugins may have left it."""
    monkeypatch.setitem(registry._ATTN_OVERRIDES, AttentionBackendEnum.CUSTOM, compat.BACKEND_PATH)
    return compat.s2o_member()


def test_both_names_are_ours(registered):
    assert compat.is_s2o(AttentionBackendEnum.CUSTOM)
    assert compat.is_s2o(AttentionBackendEnum[BACKEND_NAME])
    assert registered is AttentionBackendEnum[BACKEND_NAME]


@pytest.mark.parametrize("backend", [None, AttentionBackendEnum.FLASH_ATTN, AttentionBackendEnum.CPU_ATTN], ids=str)
def test_other_backends_are_not_ours(registered, backend):
    assert not compat.is_s2o(backend)


def test_custom_of_another_plugin_is_not_ours(registered, monkeypatch):
    monkeypatch.setitem(registry._ATTN_OVERRIDES, AttentionBackendEnum.CUSTOM, "other.Backend")
    assert not compat.is_s2o(AttentionBackendEnum.CUSTOM)
    assert compat.is_s2o(registered) == TAKES_NAMES


def test_custom_of_nobody_is_not_ours(registered, monkeypatch):
    monkeypatch.delitem(registry._ATTN_OVERRIDES, AttentionBackendEnum.CUSTOM)
    assert not compat.is_s2o(AttentionBackendEnum.CUSTOM)


def config(backend, **attention) -> SimpleNamespace:
    return SimpleNamespace(attention_config=SimpleNamespace(backend=backend, **attention))


def test_the_flag_is_seen(registered):
    dense = AttentionBackendEnum.FLASH_ATTN
    assert compat.uses_s2o(config(registered))
    assert compat.uses_s2o(config(AttentionBackendEnum.CUSTOM, backend_per_kind={}))
    assert compat.uses_s2o(config(None, backend_per_kind={"full_attention": registered}))
    assert compat.uses_s2o(config(dense, backend_per_kind={"sliding_window": dense, "full_attention": registered}))


def test_no_flag_is_no_flag(registered):
    dense = AttentionBackendEnum.FLASH_ATTN
    assert not compat.uses_s2o(config(None))
    assert not compat.uses_s2o(config(None, backend_per_kind=None))
    assert not compat.uses_s2o(config(dense, backend_per_kind={"full_attention": dense}))


def test_layers_whose_sequences_are_cut_up_are_dense():
    """vLLM derives a builder from ours for chunked local attention."""

    class Ours:
        pass

    class ChunkedLocalAttentionBuilder(Ours):
        pass

    assert compat.builder_problem(Ours, Ours) is None
    reason = compat.builder_problem(ChunkedLocalAttentionBuilder, Ours)
    assert reason == "vLLM changes what its layers are told of sequences (ChunkedLocalAttentionBuilder)"


# -- ranks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("places", list(itertools.product([0, 1], repeat=3)))
def test_one_rank_of_all_counts_tokens(monkeypatch, places):
    """Those that share heads, those that share a prompt, and the stages of a pipeline all see the same requests."""
    heads, prompt, stage = (SimpleNamespace(rank_in_group=rank, is_first_rank=rank == 0) for rank in places)
    monkeypatch.setattr(compat, "tensor_parallel", lambda: (heads.rank_in_group, 2))
    monkeypatch.setattr("vllm.distributed.get_pcp_group", lambda: prompt)
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: stage)
    assert compat.counts_tokens() == (places == (0, 0, 0))
