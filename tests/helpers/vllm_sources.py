"""What Python sources say, without importing them: the names of a module, what a class holds, what an annotation means.

Only of one package. What another one defines is OUTSIDE: it has some type, which is not looked into.
"""

import ast
import builtins
import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Module:
    name: str


@dataclass(frozen=True)
class Class:
    module: str
    node: ast.ClassDef

    @property
    def name(self) -> str:
        return self.node.name


@dataclass(frozen=True)
class Instance:
    of: Class


@dataclass(frozen=True)
class Function:
    module: str
    node: ast.FunctionDef
    bound: bool
    """Whether the caller does not pass the first argument."""


@dataclass(frozen=True)
class Tells:
    """A type that is not of the package, or one that no annotation gives."""

    what: str


OUTSIDE, UNKNOWN = Tells("outside"), Tells("unknown")
CONTAINER = Tells("container")
"""Outside too, with items that may not be."""

Value = Module | Class | Instance | Function | Tells

WRAPPERS = {"ClassVar", "Final", "Optional", "SkipValidation", "Annotated"}
"""Around a type in an annotation."""


def statements(body: list[ast.stmt], typing_only: bool = False) -> Iterator[tuple[ast.stmt, bool]]:
    """Those of a module or class, in branches too, and whether each is there for type checkers alone."""
    for node in body:
        yield node, typing_only
        if isinstance(node, ast.If):
            only = typing_only or "TYPE_CHECKING" in ast.unparse(node.test)
            yield from statements(node.body, only)
            yield from statements(node.orelse, typing_only)
        elif isinstance(node, ast.Try):
            for part in (node.body, node.orelse, node.finalbody, *(handler.body for handler in node.handlers)):
                yield from statements(part, typing_only)
        elif isinstance(node, ast.With):
            yield from statements(node.body, typing_only)


def targets(node: ast.AST) -> list[ast.expr]:
    """What an assignment writes to."""
    if isinstance(node, ast.Assign):
        found = []
        for target in node.targets:
            found += target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        return found
    return [node.target] if isinstance(node, (ast.AnnAssign, ast.AugAssign)) else []


def call_problem(
    arguments: ast.arguments, bound: bool, positional: int, keywords: tuple[str, ...], open_ended: bool
) -> str | None:
    """Why a call does not fit a signature, or None. An `open_ended` call passes on `*` or `**`, which may fill gaps."""
    by_place = [*arguments.posonlyargs, *arguments.args][bound:]
    named = {a.arg for a in (*arguments.args, *arguments.kwonlyargs)}
    if positional > len(by_place) and arguments.vararg is None:
        return f"takes {len(by_place)} arguments by position, not {positional}"
    for name in keywords:
        if name not in named and arguments.kwarg is None:
            return f"takes no argument {name!r}"
        if name in {a.arg for a in by_place[:positional]}:
            return f"would get {name!r} twice"
    if open_ended:
        return None
    needed = by_place[: len(by_place) - len(arguments.defaults)][positional:]
    needed += [a for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True) if default is None]
    missing = [a.arg for a in needed if a.arg not in keywords]
    return f"needs the argument {missing[0]!r}" if missing else None


class Sources:
    """The sources of one package.

    Args:
        paths: every file.
        read: gives a file's text.
    """

    def __init__(self, paths: list[str], read: Callable[[str], str]):
        self.paths = {path: None for path in paths}
        self.read = read
        self._trees: dict[str, ast.Module] = {}
        self._members: dict[Class, dict[str, tuple[Class, ast.AST, ast.AST | None]]] = {}

    @cached_property
    def root(self) -> str:
        return min(self.paths).partition("/")[0]

    def path(self, module: str) -> str | None:
        stem = module.replace(".", "/")
        return next((path for path in (f"{stem}.py", f"{stem}/__init__.py") if path in self.paths), None)

    def tree(self, module: str) -> ast.Module:
        path = self.path(module)
        if path is None:
            raise KeyError(module)
        if module not in self._trees:
            self._trees[module] = ast.parse(self.read(path))
        return self._trees[module]

    # -- names --------------------------------------------------------------------------------------------------------

    def name(self, module: str, name: str) -> Value | None:
        """What `from module import name` gives, None where that fails."""
        found = self._defined(module, name)
        if found is None and self.path(f"{module}.{name}"):
            return Module(f"{module}.{name}")
        return found

    def _defined(self, module: str, name: str) -> Value | None:
        tree = self.tree(module)
        declared = None
        for node, typing_only in statements(tree.body):
            value = self._definition(module, node, name)
            if value is None:
                continue
            if not typing_only:
                return value
            declared = value
        # A module may make a name when it is first asked for, and declare it for type checkers.
        lazy = any(isinstance(node, ast.FunctionDef) and node.name == "__getattr__" for node in tree.body)
        if lazy and any(isinstance(node, ast.Constant) and node.value == name for node in ast.walk(tree)):
            return declared or UNKNOWN
        return None

    def _definition(self, module: str, node: ast.stmt, name: str) -> Value | None:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return Class(module, node)
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return Function(module, node, bound=False)
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (alias.asname or alias.name.partition(".")[0]) == name:
                    imported = alias.name if alias.asname else name
                    return Module(imported) if imported.partition(".")[0] == self.root else OUTSIDE
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name or alias.name == "*":
                    found = self._imported(module, node, name if alias.name == "*" else alias.name)
                    if found is not None or alias.name != "*":
                        return found
        if any(isinstance(target, ast.Name) and target.id == name for target in targets(node)):
            if isinstance(node, ast.AnnAssign):
                return self.type(node.annotation, module)
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and node.value.id != name:
                return self.name(module, node.value.id) or UNKNOWN
            return UNKNOWN
        return None

    def _imported(self, module: str, node: ast.ImportFrom, name: str) -> Value | None:
        origin = node.module or ""
        if node.level:
            package = module if self.path(module).endswith("/__init__.py") else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            origin = f"{package}.{origin}".rstrip(".")
        if origin.partition(".")[0] != self.root:
            return OUTSIDE
        return self.name(origin, name) if self.path(origin) else None

    def at(self, dotted: str) -> Value | None:
        """A module, or what stands in one, by its full name."""
        parts = dotted.split(".")
        size = next((n for n in range(len(parts), 0, -1) if self.path(".".join(parts[:n]))), 0)
        if not size:
            return None
        value: Value | None = Module(".".join(parts[:size]))
        for part in parts[size:]:
            value = self.attribute(value, part) if value is not None else None
        return value

    # -- classes ------------------------------------------------------------------------------------------------------

    def bases(self, owner: Class) -> list[Class]:
        """Those of the package."""
        nodes = [base.value if isinstance(base, ast.Subscript) else base for base in owner.node.bases]
        found = [self._expression(node, owner.module) for node in nodes]
        return [base for base in found if isinstance(base, Class)]

    def is_enum(self, owner: Class) -> bool:
        named = any("Enum" in ast.unparse(base) for base in owner.node.bases)
        return named or any(map(self.is_enum, self.bases(owner)))

    def members(self, owner: Class) -> dict[str, tuple[Class, ast.AST, ast.AST | None]]:
        """Name -> the class that has it, the statement, and the method in which it is assigned."""
        if owner in self._members:
            return self._members[owner]
        found: dict[str, tuple[Class, ast.AST, ast.AST | None]] = {}
        for node, _ in statements(owner.node.body):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found[node.name] = (owner, node, None)
            for target in targets(node):
                if isinstance(target, ast.Name):
                    found[target.id] = (owner, node, None)
        methods = [node for node, _ in statements(owner.node.body) if isinstance(node, ast.FunctionDef)]
        for method in methods:
            for node in ast.walk(method):
                for target in targets(node):
                    if isinstance(target, ast.Attribute) and ast.unparse(target.value) == "self":
                        found.setdefault(target.attr, (owner, node, method))
        for base in self.bases(owner):
            for name, member in self.members(base).items():
                found.setdefault(name, member)
        self._members[owner] = found
        return found

    def method(self, owner: Class, name: str) -> ast.FunctionDef | None:
        node = self.members(owner).get(name, (None, None, None))[1]
        return node if isinstance(node, ast.FunctionDef) else None

    def fields(self, owner: Class) -> list[str]:
        """Of a dataclass, its bases' first."""
        inherited = [name for base in self.bases(owner) for name in self.fields(base)]
        own = [node for node in owner.node.body if isinstance(node, ast.AnnAssign)]
        names = [node.target.id for node in own if "ClassVar" not in ast.unparse(node.annotation)]
        return list(dict.fromkeys(inherited + names))

    # -- what an expression gives -------------------------------------------------------------------------------------

    def attribute(self, value: Value, name: str) -> Value | None:
        """None where there is no such attribute."""
        if isinstance(value, Module):
            return OUTSIDE if name in ("__file__", "__name__", "__path__") else self.name(value.name, name)
        if isinstance(value, (Function, Tells)):
            return UNKNOWN if value is UNKNOWN else OUTSIDE
        owner = value if isinstance(value, Class) else value.of
        member = self.members(owner).get(name)
        if member is None:
            standard = {*dir(object), *(("name", "value", *dir(enum.Enum)) if self.is_enum(owner) else ())}
            return OUTSIDE if name in standard else None
        where, node, method = member
        if isinstance(node, ast.ClassDef):
            return Class(where.module, node)
        if isinstance(node, ast.FunctionDef):
            marks = [ast.unparse(mark) for mark in node.decorator_list]
            if any(mark.endswith("property") for mark in marks):
                return self.type(node.returns, where.module)
            of_instance = isinstance(value, Instance) and "staticmethod" not in marks
            return Function(where.module, node, bound=of_instance or "classmethod" in marks)
        if method is None and self.is_enum(where) and isinstance(node, ast.Assign):
            return Instance(owner)
        if isinstance(node, ast.AnnAssign):
            return self.type(node.annotation, where.module)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name) and method is not None:
            arguments = [a for a in method.args.args if a.arg == node.value.id]
            return self.type(arguments[0].annotation, where.module) if arguments else UNKNOWN
        return UNKNOWN

    def result(self, value: Value) -> Value:
        """Of a call."""
        if isinstance(value, Class):
            return Instance(value)
        if isinstance(value, Function):
            return self.type(value.node.returns, value.module)
        return OUTSIDE if value in (OUTSIDE, CONTAINER) else UNKNOWN

    def _expression(self, node: ast.expr, module: str) -> Value:
        if isinstance(node, ast.Name):
            return self.name(module, node.id) or (OUTSIDE if hasattr(builtins, node.id) else UNKNOWN)
        if isinstance(node, ast.Attribute):
            value = self._expression(node.value, module)
            return self.attribute(value, node.attr) or UNKNOWN
        return UNKNOWN

    def type(self, node: ast.expr | None, module: str) -> Value:
        """What a value with this annotation is."""
        if isinstance(node, ast.Constant):
            quoted = isinstance(node.value, str)
            return self.type(ast.parse(node.value, mode="eval").body, module) if quoted else OUTSIDE
        if isinstance(node, ast.BinOp):
            sides = (node.left, node.right)
            parts = [self.type(side, module) for side in sides if ast.unparse(side) != "None"]
            # Of a class or something else: which of them it is, the code has to ask.
            return next((part for part in parts if isinstance(part, Tells)), parts[0] if parts else OUTSIDE)
        if isinstance(node, ast.Subscript):
            outer = ast.unparse(node.value).rpartition(".")[2]
            inner = node.slice.elts[0] if isinstance(node.slice, ast.Tuple) else node.slice
            if outer in WRAPPERS:
                return self.type(inner, module)
            if outer == "type":
                value = self.type(inner, module)
                return value.of if isinstance(value, Instance) else value
            return CONTAINER
        if node is None or ast.unparse(node) in ("Any", "typing.Any"):
            return UNKNOWN
        value = self._expression(node, module)
        return Instance(value) if isinstance(value, Class) else value
