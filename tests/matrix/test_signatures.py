"""What vLLM calls of ours can be called as vLLM calls it, and nothing of ours takes a name of vLLM's by accident."""

import ast
import re

import pytest
from processes import ROOT
from vllm_sources import Class, call_problem
from vllm_uses import OVERRIDES, SUBCLASSES, own_names

OURS = {
    path: ast.parse((ROOT / "vllm_s2o" / path).read_text())
    for path in ("backend.py", "compat/__init__.py", "compat/requests.py")
}


def function(owner: str, name: str) -> ast.FunctionDef:
    """A method of ours, or a function inside a function."""
    for tree in OURS.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name == owner:
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef) and inner.name == name:
                        return inner
    raise LookupError(f"vllm_s2o has no {owner}.{name}")


def bound(node: ast.FunctionDef) -> bool:
    return "staticmethod" not in map(ast.unparse, node.decorator_list)


METHODS = [
    (owner, name, base)
    for owner, names in OVERRIDES.items()
    for name in sorted(names - {"_cudagraph_support"})
    for base in SUBCLASSES[owner]
] + [
    # Put in the place of the platform's.
    ("install_hooks", name, platform)
    for name in ("check_and_update_config", "get_attn_backend_cls", "validate_request")
    for platform in ("vllm.platforms.interface.Platform", "vllm.platforms.cpu.CpuPlatform")
]
METHODS += [
    ("follow_requests", "preprocess_add_request", "vllm.v1.engine.core.EngineCore"),
    ("follow_requests", "_initialize_kv_caches", "vllm.v1.engine.core.EngineCore"),
    ("watch_steps", "execute_model", "vllm.v1.worker.worker_base.WorkerWrapperBase"),
]

NEWER = {"supports_device_cpu_query_lens_mismatch": (0, 28)}
"""Methods that are ours alone in versions before this one, where nothing asks for them."""


@pytest.mark.parametrize(("owner", "name", "base"), METHODS, ids=lambda value: value.rpartition(".")[2])
def test_an_override_takes_what_its_base_takes(owner, name, base, sources, version):
    """By position and by name, whichever of them a caller of vLLM's may choose."""
    theirs = sources.method(sources.at(base), name)
    release = tuple(map(int, version.split(".")))
    assert (theirs is not None) == (release >= NEWER.get(name, (0,))), f"{base}.{name} in vLLM {version}"
    if theirs is None:
        return
    ours = function(owner, name)
    arguments = [a.arg for a in theirs.args.args][bound(theirs) :]
    keywords = tuple(a.arg for a in theirs.args.kwonlyargs)
    more = bool(theirs.args.vararg or theirs.args.kwarg)
    problems = [
        call_problem(ours.args, bound(ours), len(arguments), keywords, more),
        call_problem(ours.args, bound(ours), 0, (*arguments, *keywords), more),
    ]
    assert problems == [None, None], f"{owner}.{name} must take what {base}.{name} takes: {arguments} {keywords}"
    places = [a.arg for a in (*ours.args.posonlyargs, *ours.args.args)][bound(ours) :]
    shared = min(len(places), len(arguments))
    assert places[:shared] == arguments[:shared], f"{owner}.{name} takes in another order what {base}.{name} takes"


CALLS = {
    ("S2OImpl", "__init__"): (r"impl_cls", "vllm/model_executor/layers/attention/attention.py"),
    ("S2OImpl", "forward"): (r"self\.impl\.forward", "vllm/model_executor/layers/attention/attention.py"),
    ("S2OMetadataBuilder", "__init__"): (r"builder_cls|.*\.get_builder_cls\(\)", "vllm/v1/(worker|spec_decode)/"),
    ("S2OMetadataBuilder", "build"): (
        r".*(builder|get_metadata_builder\(.*\))\.build|self\.build",
        "vllm/v1/(worker|spec_decode)/|vllm/v1/attention/backend.py",
    ),
    ("S2OMetadataBuilder", "build_for_cudagraph_capture"): (
        r".*(builder|get_metadata_builder\(.*\))\.build_for_cudagraph_capture",
        "vllm/v1/worker/",
    ),
    ("S2OMetadataBuilder", "update_block_table"): (r".*builder\.update_block_table", "vllm/v1/worker/"),
    ("install_hooks", "check_and_update_config"): (r"current_platform\.check_and_update_config", "vllm/config/"),
    ("install_hooks", "get_attn_backend_cls"): (r"current_platform\.get_attn_backend_cls", "vllm/v1/attention/"),
}
"""Our function -> what vLLM's calls of it look like, and where they are."""


@pytest.mark.parametrize(("owner", "name"), CALLS)
def test_vllm_calls_ours_as_it_can_be_called(owner, name, sources):
    pattern, place = CALLS[owner, name]
    ours = function(owner, name)
    called = name if name != "__init__" else pattern.partition("|")[0]
    seen = 0
    for path in sources.paths:
        if not re.match(place, path) or called not in sources.read(path):
            continue
        for call in ast.walk(sources.tree(path.removesuffix(".py").replace("/", "."))):
            if not isinstance(call, ast.Call) or not re.fullmatch(pattern, ast.unparse(call.func)):
                continue
            seen += 1
            by_place = sum(not isinstance(argument, ast.Starred) for argument in call.args)
            keywords = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
            more = by_place < len(call.args) or len(keywords) < len(call.keywords)
            wrong = call_problem(ours.args, True, by_place, keywords, more)
            assert wrong is None, f"{path}:{call.lineno} calls {owner}.{name}, which {wrong}"
    assert seen, f"no call of {name} was found: it may have moved, or got another name"


@pytest.mark.parametrize("owner", SUBCLASSES)
def test_nothing_of_ours_hides_a_name_of_vllms(owner, sources):
    (node,) = [node for node in OURS["backend.py"].body if isinstance(node, ast.ClassDef) and node.name == owner]
    for base in SUBCLASSES[owner]:
        theirs = sources.at(base)
        assert isinstance(theirs, Class)
        taken = own_names(node) & sources.members(theirs).keys()
        assert not taken, f"{base} has {sorted(taken)} of its own, which {owner} overrides without meaning to"


def test_arguments_that_vllm_may_add_are_taken():
    """The last ones of what has grown before: by name, and by position where vLLM calls so."""
    for owner, name in (("S2OImpl", "__init__"), ("S2OImpl", "forward"), ("S2OMetadataBuilder", "__init__")):
        arguments = function(owner, name).args
        assert arguments.vararg and arguments.kwarg, f"{owner}.{name} must take *args and **kwargs"
    for owner, name in (
        ("S2OMetadataBuilder", "build"),
        ("S2OMetadataBuilder", "build_for_cudagraph_capture"),
        ("install_hooks", "get_attn_backend_cls"),
    ):
        assert function(owner, name).args.kwarg, f"{owner}.{name} must take **kwargs"
