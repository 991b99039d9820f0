"""What vllm_s2o touches of vLLM, by vllm_s2o's own sources.

Whatever is reached from an import of vLLM, from a name that stands for an object of vLLM's, or from `self` in a
subclass of one of vLLM's classes is a use: a path of attributes and calls. A new line in the package is a new use.
"""

import ast
import re
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_sources import OUTSIDE, UNKNOWN, Function, Instance, Sources, Value, call_problem, targets

BACKENDS = "vllm.v1.attention.backends"
DENSE = {
    "backend": (f"{BACKENDS}.flash_attn.FlashAttentionBackend", f"{BACKENDS}.cpu_attn.CPUAttentionBackend"),
    "impl": (f"{BACKENDS}.flash_attn.FlashAttentionImpl", f"{BACKENDS}.cpu_attn.CPUAttentionBackendImpl"),
    "builder": (
        f"{BACKENDS}.flash_attn.FlashAttentionMetadataBuilder",
        f"{BACKENDS}.cpu_attn.CPUAttentionMetadataBuilder",
    ),
    "metadata": (f"{BACKENDS}.flash_attn.FlashAttentionMetadata", f"{BACKENDS}.cpu_attn.CPUAttentionMetadata"),
}
"""The parts of the dense backends, on a GPU and on a CPU."""

COMMON = "vllm.v1.attention.backend.CommonAttentionMetadata"
ATTENTION_MODULE = "vllm.model_executor.layers.attention"
ATTENTION = f"{ATTENTION_MODULE}.Attention"
SPEC = "vllm.v1.kv_cache_interface.AttentionSpec"

# What cannot be derived: vllm_s2o does not annotate its arguments, since vLLM is not imported for that.
NAMED = {
    "vllm_config": ("vllm.config.VllmConfig",),
    "model_config": ("vllm.config.ModelConfig",),
    "common": (COMMON,),
    "common_attn_metadata": (COMMON,),
    "backend": (f"{BACKENDS}.registry.AttentionBackendEnum",),
    "kv_cache_spec": (SPEC,),
    "layer": (ATTENTION,),
    "impl": DENSE["impl"],
    "engine_request": ("vllm.v1.engine.EngineCoreRequest",),
    "new_request": ("vllm.v1.core.sched.output.NewRequestData",),
    "scheduler_output": ("vllm.v1.core.sched.output.SchedulerOutput",),
    **dict.fromkeys(("metadata", "attn_metadata", "part", "whole"), DENSE["metadata"]),
}
"""Name of an argument or variable -> the classes of vLLM's that it may be an instance of."""

PLUGINS = "vllm.general_plugins"
"""The entry points' group, which looks like a module; `test_facts.py` looks for it."""

CLASSES = {"DENSE": DENSE["backend"], "dense_builder": DENSE["builder"]}
"""The same for names that stand for a class itself."""

SUBCLASSES = {"S2OBackend": DENSE["backend"], "S2OImpl": DENSE["impl"], "S2OMetadataBuilder": DENSE["builder"]}
"""Our class -> its bases."""

# Where vLLM's annotation is missing, or says less than holds for attention.
TYPES = {
    ("CompilationConfig", "static_forward_context[]"): ATTENTION,
    ("Attention", "impl"): "vllm.v1.attention.backend.AttentionImpl",
    ("AttentionMetadataBuilder", "kv_cache_spec"): SPEC,
    ("AttentionMetadataBuilder", "vllm_config"): "vllm.config.VllmConfig",
}
"""(class, attribute) -> class of its value; with `[]`, of its items."""

ASSIGNED = {("Attention", "isa"): f"{BACKENDS}.cpu_attn"}
ASSIGNED |= {("Attention", f"_{name}_scale_float"): f"{ATTENTION_MODULE}.attention" for name in "qkv"}
"""(class, attribute) -> the module that adds the attribute to `layer` from outside."""


@dataclass(frozen=True)
class Step:
    """One step along a path: an attribute, or a call, an item, or the type of what was reached."""

    kind: str
    name: str = ""
    optional: bool = False
    """Whether the code asks first, or has a default."""
    positional: int = 0
    keywords: tuple[str, ...] = ()
    open_ended: bool = False

    def __str__(self) -> str:
        return {"attribute": f".{self.name}", "call": "()", "item": "[]", "type": ".__class__"}[self.kind]


@dataclass(frozen=True)
class Use:
    root: str
    """Full name of a module or class of vLLM's."""
    instance: bool
    """Whether the path starts at an instance of the class."""
    steps: tuple[Step, ...] = ()
    line: str = ""
    """Where it stands in vllm_s2o."""

    def __add__(self, step: Step) -> "Use":
        return replace(self, steps=(*self.steps, step))

    def __str__(self) -> str:
        last = self.root.rpartition(".")[2]
        return (last if last[0].isupper() else self.root) + "".join(map(str, self.steps))

    @property
    def optional(self) -> bool:
        return any(step.optional for step in self.steps)


class _Reader(ast.NodeVisitor):
    """Notes the uses in one file."""

    def __init__(self, path: str, own: set[str]):
        self.path = path
        self.own = own
        self.uses: list[Use] = []
        self.scopes: list[dict[str, tuple[Use, ...]]] = [{}]
        self.guards: set[str] = set()
        """Attributes that the function asks for with `hasattr`."""
        self.bases: tuple[str, ...] = ()

    # -- scopes -------------------------------------------------------------------------------------------------------

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.partition(".")[0] == "vllm":
                self._note(node, Use(alias.name, False))
                name = alias.asname or alias.name.partition(".")[0]
                self.scopes[-1][name] = (Use(alias.name if alias.asname else name, False),)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if (node.module or "").partition(".")[0] == "vllm":
            for alias in node.names:
                use = Use(node.module, False) + Step("attribute", alias.name)
                self._note(node, use)
                self.scopes[-1][alias.asname or alias.name] = (use,)

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        outer, self.bases = self.bases, SUBCLASSES.get(node.name, ())
        self.generic_visit(node)
        self.bases = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        scope: dict[str, tuple[Use, ...]] = {}
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        for argument in arguments:
            scope[argument.arg] = self._by_name(argument.arg)
        if self.bases and arguments and arguments[0].arg == "self":
            scope["self"] = tuple(Use(base, True) for base in self.bases)
        outer = self.guards
        self.guards = outer | {
            call.args[1].value
            for call in ast.walk(node)
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "hasattr"
            if isinstance(call.args[1], ast.Constant)
        }
        self.scopes.append(scope)
        self.generic_visit(node)
        self.scopes.pop()
        self.guards = outer

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name):
                value = self._value(node.value)
                if value or target.id not in CLASSES:
                    self.scopes[-1][target.id] = value

    def _by_name(self, name: str) -> tuple[Use, ...]:
        instances = tuple(Use(root, True) for root in NAMED.get(name, ()))
        return instances or tuple(Use(root, False) for root in CLASSES.get(name, ()))

    # -- expressions --------------------------------------------------------------------------------------------------

    def _value(self, node: ast.expr) -> tuple[Use, ...]:
        """The paths to what an expression gives, none where it is not vLLM's."""
        if isinstance(node, ast.Name):
            for scope in reversed(self.scopes):
                if node.id in scope:
                    return scope[node.id]
            return self._by_name(node.id)
        if isinstance(node, ast.Attribute):
            return self._attribute(node.value, node.attr, node.attr in self.guards)
        if isinstance(node, ast.Subscript):
            return tuple(use + Step("item") for use in self._value(node.value))
        if isinstance(node, ast.BoolOp):
            return next((found for found in map(self._value, node.values) if found), ())
        if isinstance(node, ast.IfExp):
            return self._value(node.body) or self._value(node.orelse)
        if not isinstance(node, ast.Call):
            return ()
        called = ast.unparse(node.func)
        if called == "super":
            return tuple(Use(base, True) for base in self.bases)
        if called == "type":
            return tuple(use + Step("type") for use in self._value(node.args[0]))
        if called == "getattr" and isinstance(node.args[1], ast.Constant):
            return self._attribute(node.args[0], node.args[1].value, len(node.args) > 2)
        positional = [argument for argument in node.args if not isinstance(argument, ast.Starred)]
        keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
        open_ended = len(positional) < len(node.args) or len(keywords) < len(node.keywords)
        step = Step("call", positional=len(positional), keywords=keywords, open_ended=open_ended)
        return tuple(use + step for use in self._value(node.func))

    def _attribute(self, node: ast.expr, name: str, optional: bool) -> tuple[Use, ...]:
        if name in self.own or name.lstrip("_").startswith("s2o"):
            return ()
        return tuple(use + Step("attribute", name, optional) for use in self._value(node))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.generic_visit(node)
        self._note(node, *self._value(node))

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        """What follows an attribute that may be missing stands in for it, and may be missing where that one is not."""
        first = self._value(node.values[0])
        before = len(self.uses)
        self.generic_visit(node)
        if isinstance(node.op, ast.Or) and first and all(use.steps and use.steps[-1].optional for use in first):
            for place in range(before, len(self.uses)):
                *steps, last = self.uses[place].steps
                if last.kind == "attribute":
                    self.uses[place] = replace(self.uses[place], steps=(*steps, replace(last, optional=True)))

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = ast.unparse(node.func)
        if called == "hasattr" and isinstance(node.args[1], ast.Constant):
            self._note(node, *self._attribute(node.args[0], node.args[1].value, True))
        elif called == "dataclasses.replace":
            for keyword in node.keywords:
                if keyword.arg:
                    self._note(node, *self._attribute(node.args[0], keyword.arg, False))
        elif called not in ("super", "type"):
            self._note(node, *self._value(node))

    def visit_Constant(self, node: ast.Constant) -> None:
        """A module that is named: a logger's, or a program's."""
        if not isinstance(node.value, str) or node.value == PLUGINS:
            return
        if re.fullmatch(r"vllm(\.\w+)+", node.value) and "s2o" not in node.value:
            self._note(node, Use(node.value, False))

    def _note(self, node: ast.AST, *uses: Use) -> None:
        self.uses += [replace(use, line=f"{self.path}:{node.lineno}") for use in uses]


def _own(trees: list[ast.Module]) -> set[str]:
    """Names of what our subclasses add: methods, and attributes of `self`, that no base is asked for."""
    names = set()
    for tree in trees:
        for owner in tree.body:
            if isinstance(owner, ast.ClassDef) and owner.name in SUBCLASSES:
                names |= own_names(owner)
    return names


def own_names(owner: ast.ClassDef) -> set[str]:
    """What a class defines or assigns to `self`, less what it overrides (which is its base's name)."""
    names = set()
    for node in ast.walk(owner):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            names.add(node.attr)
    for node in owner.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.AnnAssign):
            names.add(node.target.id)
    return names - OVERRIDES[owner.name]


OVERRIDES = {
    "S2OBackend": {
        *("get_name", "get_impl_cls", "get_builder_cls"),
        *("supports_batch_invariance", "supports_device_cpu_query_lens_mismatch"),
    },
    "S2OImpl": {"__init__", "forward"},
    "S2OMetadataBuilder": {
        *("__init__", "_cudagraph_support", "build", "build_for_cudagraph_capture", "update_block_table"),
    },
}
"""What our classes redefine of vLLM's. Anything else that they define must not be vLLM's name by accident."""


def uses(package: Path) -> list[Use]:
    """Every use in the package, each path once."""
    files = sorted(package.rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in files}
    own = _own(list(trees.values()))
    found: dict[str, Use] = {}
    for path, tree in trees.items():
        # Elsewhere `layer` or `backend` is nothing of vLLM's.
        text = path.read_text()
        if not re.search(r"^\s*(from|import) vllm\b|import .*\bcompat\b|[\"']vllm\.", text, re.MULTILINE):
            continue
        reader = _Reader(path.relative_to(package.parent).as_posix(), own)
        reader.visit(tree)
        for use in reader.uses:
            # Another way to call is another use; asking first in one place makes no other place safe.
            found.setdefault(f"{use}{use.steps}", use)
    return list(found.values())


class Problem(Exception):
    """Why a use does not hold, in one sentence."""


def follow(use: Use, sources: Sources) -> bool:
    """Whether the whole path exists. Raises Problem where something is missing that is not optional."""
    value = sources.at(use.root)
    reached, told = use.root, ""
    if value is None:
        raise Problem(f"{use.line} needs {use.root}, which this vLLM does not have.")
    if use.instance:
        value = sources.result(value)
    owner = value
    for step in use.steps:
        if step.kind == "call" and isinstance(value, Function):
            wrong = call_problem(value.node.args, value.bound, step.positional, step.keywords, step.open_ended)
            if wrong:
                raise Problem(f"{use.line} calls {reached}, which {wrong} in this vLLM.")
        if step.kind == "attribute":
            owner, told = value, step.name
        following = _next(value, step, sources)
        if following is None and step.optional:
            return False
        if following is None:
            raise Problem(f"{use.line} needs {reached}{step}, which this vLLM does not have.")
        if value is UNKNOWN and step.kind == "attribute" and not step.optional:
            unknown = f"but no annotation says what {reached} is: add it to TYPES."
            raise Problem(f"{use.line} uses {reached}{step}, {unknown}")
        told += "[]" if step.kind == "item" else ""
        value, reached = _typed(owner, told, sources) or following, f"{reached}{step}"
    return True


def _typed(owner: Value, told: str, sources: Sources) -> Value | None:
    """What TYPES says of an attribute of this class or of its bases."""
    if not isinstance(owner, Instance):
        return None
    pending = [owner.of]
    while pending:
        above = pending.pop()
        if (above.name, told) in TYPES:
            return sources.result(sources.at(TYPES[above.name, told]))
        pending += sources.bases(above)
    return None


def _next(value: Value, step: Step, sources: Sources) -> Value | None:
    if step.kind == "type":
        return value.of if isinstance(value, Instance) else UNKNOWN
    if step.kind == "item":
        return value if value is OUTSIDE else UNKNOWN
    if step.kind == "call":
        return sources.result(value)
    found = sources.attribute(value, step.name)
    if found is None and isinstance(value, Instance) and (value.of.name, step.name) in ASSIGNED:
        tree = sources.tree(ASSIGNED[value.of.name, step.name])
        written = {ast.unparse(target) for node in ast.walk(tree) for target in targets(node)}
        return UNKNOWN if f"layer.{step.name}" in written else None
    return found
