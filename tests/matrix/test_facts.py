"""What vllm_s2o counts on that no name tells: fields, layouts, what vLLM does when. Each by the code that does it."""

import ast
import tomllib

import pytest
from processes import ROOT
from vllm_uses import ATTENTION, COMMON, DENSE, PLUGINS

from vllm_s2o import compat
from vllm_s2o.compat import caches

GPU, CPU = 0, 1
KINDS = pytest.mark.parametrize("kind", [GPU, CPU], ids=["GPU", "CPU"])
BASE = "vllm.v1.attention.backend"


def release(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def method(sources, owner: str, name: str) -> ast.FunctionDef:
    found = sources.method(sources.at(owner), name)
    assert found is not None, f"{owner} has no {name}"
    return found


def lines(node: ast.AST) -> set[str]:
    """Its statements, written in one way."""
    return {ast.unparse(part) for part in ast.walk(node) if isinstance(part, ast.stmt)}


def constant(sources, owner: str, name: str):
    """A class attribute's value."""
    node = sources.members(sources.at(owner))[name][1]
    return ast.literal_eval(node.value)


# -- a step's metadata ------------------------------------------------------------------------------------------------

WHOLE = {
    "causal": "another value makes the step dense",
    "logits_indices_padded": "makes the step dense",
    "num_logits_indices": "comes with logits_indices_padded",
    "encoder_seq_lens": "makes the step dense",
    "encoder_seq_lens_cpu": "comes with encoder_seq_lens",
    "dcp_local_seq_lens": "context parallelism makes the layers dense",
    "dcp_local_seq_lens_cpu": "context parallelism makes the layers dense",
    "dcp_local_seq_lens_cpu_upper_bound": "context parallelism makes the layers dense",
    "mm_req_doc_ranges": "makes the step dense",
    "rswa_prefix_lens": "makes the step dense",
    "max_logits_per_req": "one number for the step",
    "replayssm_decode_base_cpu": "of state space layers, which have another backend",
}
"""Fields of a step that `slice_rows` leaves as they are, and why it may."""


def replaced() -> set[str]:
    """Fields that `slice_rows` gives new values by name."""
    tree = ast.parse((ROOT / "vllm_s2o" / "compat" / "__init__.py").read_text())
    (slice_rows,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "slice_rows"]
    calls = [node for node in ast.walk(slice_rows) if isinstance(node, ast.Call)]
    (replace,) = [call for call in calls if ast.unparse(call.func) == "dataclasses.replace"]
    return {keyword.arg for keyword in replace.keywords if keyword.arg}


CUT = {*replaced(), *compat._PER_ROW, *compat._PER_TOKEN, *compat._CACHED}


def test_every_field_of_a_step_is_cut_or_known_to_be_the_same_for_all_rows(sources):
    unknown = set(sources.fields(sources.at(COMMON))) - CUT - WHOLE.keys()
    assert not unknown, f"compat.slice_rows must cut {sorted(unknown)}, or WHOLE say why it need not"


def test_what_every_version_must_have_of_a_step(sources):
    needed = {*replaced(), "seq_lens", "block_table_tensor", "slot_mapping", "positions", "seq_lens_cpu_upper_bound"}
    assert needed <= set(sources.fields(sources.at(COMMON)))


@KINDS
def test_the_dense_builder_reads_nothing_that_is_left_uncut_for_another_backend(kind, sources):
    read = {
        node.attr
        for node in ast.walk(method(sources, DENSE["builder"][kind], "build"))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "common_attn_metadata"
    }
    assert {"query_start_loc", "block_table_tensor", "slot_mapping"} <= read, "build reads its step under another name"
    assert not read & {"replayssm_decode_base_cpu", "max_logits_per_req", "num_logits_indices"}


def test_both_model_runners_tell_the_lengths_on_the_host(sources):
    for module in ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils"):
        made = [
            {keyword.arg for keyword in node.keywords}
            for node in ast.walk(sources.tree(module))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "CommonAttentionMetadata"
        ]
        assert made, f"{module} makes no CommonAttentionMetadata any more"
        assert all({"seq_lens_cpu_upper_bound", "query_start_loc_cpu"} <= given for given in made), module


@KINDS
def test_a_plan_can_be_hung_on_the_dense_metadata(kind, sources):
    owner = sources.at(DENSE["metadata"][kind])
    marks = [ast.unparse(mark) for mark in owner.node.decorator_list]
    assert marks == ["dataclass"], f"{owner.name} may refuse attributes that are not its fields: {marks}"
    assert "__slots__" not in sources.members(owner)


def test_metadata_for_another_group_is_a_copy_with_all_attributes(sources):
    update = method(sources, DENSE["builder"][GPU], "update_block_table")
    assert "new_metadata = copy.copy(metadata)" in lines(update)
    assert constant(sources, DENSE["builder"][CPU], "supports_update_block_table") is False


def test_only_a_drafters_steps_are_built_fast(sources):
    (call,) = [n for n in ast.walk(method(sources, f"{BASE}.AttentionMetadataBuilder", "build_for_drafting"))
               if isinstance(n, ast.Call)]  # fmt: skip
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    assert ast.unparse(call.func) == "self.build"
    assert given["fast_build"] == "True"


def test_a_fast_build_leaves_the_builders_schedule_alone(sources):
    """The dense rows of a sparse step are built so, while the whole step's schedule is in the builder's buffer."""
    build = method(sources, DENSE["builder"][GPU], "build")
    schedules = [line for line in lines(build) if line.startswith("aot_schedule = self.aot_schedule")]
    assert schedules and all("not fast_build" in line for line in schedules)


# -- layers -----------------------------------------------------------------------------------------------------------


@KINDS
def test_the_cache_is_written_before_forward(kind, sources):
    """Sparse rows are read from the cache: where forward wrote it, theirs would be missing."""
    assert constant(sources, DENSE["backend"][kind], "forward_includes_kv_cache_update") is False


@KINDS
def test_profiling_has_no_metadata(kind, sources):
    forward = method(sources, DENSE["impl"][kind], "forward")
    tests = [n for n in ast.walk(forward) if isinstance(n, ast.If) and ast.unparse(n.test) == "attn_metadata is None"]
    assert len(tests) == 1
    assert any(isinstance(node, ast.Return) for node in tests[0].body)


@KINDS
def test_nothing_asks_the_dense_implementation_for_a_quantised_output(kind, sources):
    """S2O would ignore the scales."""
    owner, node, _ = sources.members(sources.at(DENSE["impl"][kind]))["fused_output_quant_supported"]
    assert owner.name == "AttentionImpl"
    assert ast.unparse(node.body[-1]) == "return False"


@pytest.mark.parametrize("name", ["forward", "do_kv_cache_update"])
def test_the_layout_of_the_cache_on_a_gpu(name, sources, version):
    """`caches.cuda_caches` tells both by the number of dimensions."""
    body = lines(method(sources, DENSE["impl"][GPU], name))
    found = [line for line in body if line.startswith("key_cache, value_cache = kv")]
    split = "kv_cache.transpose(1, 2).split(self.head_size, dim=-1)"
    assert found == [f"key_cache, value_cache = {'kv_cache.unbind(1)' if release(version) < (0, 26) else split}"]


def test_an_fp8_cache_is_bytes_with_one_scale_a_layer_and_queries_come_in_fp8(sources):
    """`caches.caches` and `caches.scales`: in FLASH_ATTN as in S2O."""
    body = lines(method(sources, DENSE["impl"][GPU], "forward"))
    fp8 = "current_platform.fp8_dtype()"
    views = {line for line in body if line.startswith("key_cache = key_cache.view(")}
    assert views <= {f"key_cache = key_cache.view({fp8})", "key_cache = key_cache.view(dtype)"} and len(views) == 1
    assert any(line.startswith("k_descale = layer._k_scale.expand(") for line in body)
    made = ast.unparse(method(sources, ATTENTION, "__init__"))
    assert "self.impl.supports_quant_query_input" in made and "startswith('fp8')" in made


def test_the_group_of_entry_points(sources):
    strings = {node.value for node in ast.walk(sources.tree("vllm.plugins")) if isinstance(node, ast.Constant)}
    assert PLUGINS in strings


@pytest.mark.parametrize("name", ["forward", "do_kv_cache_update"])
def test_the_layout_of_the_cache_on_a_cpu(name, sources):
    """[blocks, kv_heads, block_size, 2 * head_size], of which K takes the first half of a page."""
    assert {
        "num_blocks, num_kv_heads, block_size, _ = kv_cache.size()",
        "kv_cache = kv_cache.view((num_blocks, num_kv_heads, block_size * 2, -1))",
        "key_cache, value_cache = kv_cache.chunk(2, dim=2)",
    } <= lines(method(sources, DENSE["impl"][CPU], name))


def test_the_instruction_sets_that_pack_a_cpus_cache(sources):
    """New names make a layer dense; a known one that is gone may have become something else."""
    choose = sources.name("vllm.v1.attention.backends.cpu_attn", "_get_attn_isa").node
    returned = {line for line in lines(choose) if line.startswith("return ")}
    assert {f"return {name!r}" for name in caches.CPU_LAYOUTS} <= returned


def test_a_layer_is_made_where_its_configuration_is_known(sources):
    assert "vllm_config = get_current_vllm_config()" in lines(method(sources, ATTENTION, "__init__"))


def test_every_draft_is_loaded_under_a_tag(sources):
    """`compat.loads_draft` knows a draft by that."""
    loads = []
    folders = ("vllm/v1/spec_decode/", "vllm/v1/worker/gpu/spec_decode/")
    for path in sources.paths:
        if not path.startswith(folders) or "get_model(" not in sources.read(path):
            continue
        pending = [(sources.tree(path.removesuffix(".py").replace("/", ".")), False)]
        while pending:
            node, tagged = pending.pop()
            if isinstance(node, ast.With):
                tagged = tagged or any("set_model_tag(" in ast.unparse(item) for item in node.items)
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "get_model":
                loads.append((f"{path}:{node.lineno}", tagged))
            pending += [(child, tagged) for child in ast.iter_child_nodes(node)]
    assert len(loads) >= 5, "drafts are loaded in another way now"
    assert [place for place, tagged in loads if not tagged] == []


def test_the_model_that_is_served_is_loaded_under_the_first_tag(sources):
    assert "model_tag: str = 'backbone'" in lines(sources.tree("vllm.compilation.backends"))


def test_without_a_draft_model_the_targets_configuration_is_noted(sources):
    assert "self.draft_model_config = self.target_model_config" in lines(sources.tree("vllm.config.speculative"))


# -- requests ---------------------------------------------------------------------------------------------------------

RUNNERS = ("vllm.v1.worker.gpu_model_runner.GPUModelRunner", "vllm.v1.worker.gpu.model_runner.GPUModelRunner")
"""V1 and V2."""


def assigned(sources, owner: str) -> set[str]:
    """Attributes that a class gives its instances."""
    return {
        node.attr
        for node in ast.walk(sources.at(owner).node)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }


def test_the_model_runners_are_told_apart_by_their_tables_of_requests(sources):
    v1, v2 = (assigned(sources, runner) for runner in RUNNERS)
    assert "input_batch" in v1 and "req_states" not in v1
    assert "req_states" in v2
    assert "index_to_req_id" in assigned(sources, "vllm.v1.worker.gpu.states.RequestState")
    assert sources.method(sources.at("vllm.v1.worker.gpu_input_batch.InputBatch"), "req_ids") is not None


def test_rows_have_the_index_of_their_request_or_are_sorted_by_their_tokens(sources, version):
    """Before 0.30 `requests.row_requests` sorts as model runner V2 does: by new tokens, and else as scheduled."""
    tree = sources.tree("vllm.v1.worker.gpu.model_runner")
    if release(version) >= (0, 30):
        states = ast.unparse(sources.tree("vllm.v1.worker.gpu.model_states.default"))
        assert "req_idx=input_batch.idx_mapping_np" in states
        return
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "sorted"]
    (order,) = [call for call in calls if "num_tokens_per_req" in ast.unparse(call)]
    assert [ast.unparse(argument) for argument in order.args] == ["num_tokens_per_req"]
    keys = {line for line in lines(tree) if line.startswith("key = lambda")} or {ast.unparse(order.keywords[0].value)}
    known = "key = lambda r: ((num := num_tokens_per_req[r]) != decode_query_len, num)"
    assert keys <= {known, "num_tokens_per_req.get"}, "rows with as many tokens may have another order now"


def test_warm_up_does_not_pass_where_steps_are_watched(sources):
    """`requests.watch_steps` wraps the outermost object of a worker, and warm-up begins further inside."""
    execute = method(sources, "vllm.v1.worker.worker_base.WorkerWrapperBase", "execute_model")
    assert ast.unparse(execute.body[-1]) == "return self.worker.execute_model(scheduler_output)"
    assert any(
        "model_runner" in assigned(sources, worker)
        for worker in ("vllm.v1.worker.gpu_worker.Worker", "vllm.v1.worker.worker_base.WorkerBase")
    )


def test_both_ways_into_an_engine_pass_where_requests_are_decided(sources):
    within = ast.unparse(sources.tree("vllm.v1.engine.core_client"))
    assert "self.engine_core.preprocess_add_request(request)" in within
    assert "self.preprocess_add_request(req)" in ast.unparse(sources.tree("vllm.v1.engine.core"))
    body = ast.unparse(method(sources, "vllm.v1.engine.core.EngineCore", "__init__"))
    assert 0 < body.index("load_general_plugins()") < body.index("self.vllm_config = vllm_config")
    assert body.index("self.vllm_config = vllm_config") < body.index("self._initialize_kv_caches(vllm_config)")


def test_extra_arguments_reach_the_workers(sources):
    fields = sources.fields(sources.at("vllm.v1.core.sched.output.NewRequestData"))
    assert {"sampling_params", "pooling_params", "num_computed_tokens", "prompt_token_ids"} <= set(fields)
    assert "extra_args" in sources.fields(sources.at("vllm.sampling_params.SamplingParams"))
    assert "extra_kwargs" in sources.fields(sources.at("vllm.pooling_params.PoolingParams"))


def test_beam_search_is_asked_for_where_a_wish_is_refused(sources):
    """And its beams have no extra arguments, or it need not be refused."""
    asking = [path for path in sources.paths if "def to_beam_search_params" in sources.read(path)]
    assert all(path.startswith("vllm/entrypoints/") and path.endswith("/protocol.py") for path in asking)
    openai = [path for path in asking if "/openai/" in path]
    assert len(openai) == 2
    for path in openai:
        assert "    vllm_xargs: " in sources.read(path)
        assert "request.to_beam_search_params(" in sources.read(path.replace("/protocol.py", "/serving.py"))
    assert "extra_args" not in sources.fields(sources.at("vllm.sampling_params.BeamSearchParams"))


def test_a_cache_salt_is_part_of_every_blocks_hash(sources):
    """Of the first one's, on which all others build."""
    text = ast.unparse(sources.tree("vllm.v1.core.kv_cache_utils"))
    assert "request.cache_salt" in text
    assert "start_token_idx == 0 and request.cache_salt" in text


def test_several_api_servers_have_a_directory_for_figures_before_the_configuration_is_read(sources):
    """And one has none: `metrics.place` asks for the variable when the configuration is read."""
    body = ast.unparse(sources.name("vllm.entrypoints.cli.serve", "run_multi_api_server").node)
    assert 0 < body.index("setup_multiprocess_prometheus()") < body.index("create_engine_config(")
    setup = ast.unparse(sources.tree("vllm.v1.metrics.prometheus"))
    assert "os.environ['PROMETHEUS_MULTIPROC_DIR']" in setup
    assert "return REGISTRY" in setup


# -- graphs, platforms, plugins ---------------------------------------------------------------------------------------


def test_kinds_of_graph_support_are_ordered_as_they_were(sources):
    nodes = [node for node in sources.at(f"{BASE}.AttentionCGSupport").node.body if isinstance(node, ast.Assign)]
    values = {node.targets[0].id: node.value.value for node in nodes}
    assert sorted(values, key=values.get) == ["NEVER", "UNIFORM_SINGLE_TOKEN_DECODE", "UNIFORM_BATCH", "ALWAYS"]


@KINDS
def test_the_builder_says_which_graphs_it_supports(kind, sources):
    """Through the attribute that ours sets."""
    support = method(sources, DENSE["builder"][kind], "get_cudagraph_support")
    assert ast.unparse(support.body[-1]) == "return cls._cudagraph_support"


def test_the_cpu_platform_answers_with_the_backend_that_is_stood_in_for(sources):
    value = sources.members(sources.at("vllm.v1.attention.backends.registry.AttentionBackendEnum"))["CPU_ATTN"][1].value
    assert value.value == DENSE["backend"][CPU]
    choose = method(sources, "vllm.platforms.cpu.CpuPlatform", "get_attn_backend_cls")
    assert "return AttentionBackendEnum.CPU_ATTN.get_path()" in lines(choose)


def test_a_new_name_is_told_through_the_logger_that_is_held_silent(sources):
    assert "logger = init_logger(__name__)" in lines(sources.tree("vllm.v1.attention.backends.registry"))


def test_the_group_of_plugins_is_the_one_that_every_process_loads(sources):
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    assert f"DEFAULT_PLUGINS_GROUP = '{next(iter(groups))}'" in lines(sources.tree("vllm.plugins"))


def test_the_tools_of_vllm_bench_are_modules_with_two_functions(sources):
    """Named in a program that `cli.server` writes, where no import tells of them."""
    assert sources.at("vllm.utils.argparse_utils.FlexibleArgumentParser") is not None
    for tool in ("serve", "latency", "throughput"):
        for name in ("add_cli_args", "main"):
            assert sources.at(f"vllm.benchmarks.{tool}.{name}") is not None, f"vllm.benchmarks.{tool}.{name}"
