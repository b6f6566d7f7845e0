"""Rules for the sources of a package, checked without importing it.

:class:`Sources` reads every module as a syntax tree. :func:`private_uses` lists the places where a
module uses a name that is private to another one; :func:`import_circle` finds modules that import
each other in a circle, ``__init__`` modules included.
"""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

READERS = {"getattr", "setattr", "hasattr", "delattr", "__setattr__", "__getattribute__"}
"""Functions and methods that take the name of an attribute as their first or second argument."""


def is_private(name: str) -> bool:
    """Whether a name starts with exactly one underscore, as ``_lock``, and is not ``_`` itself."""
    return name.startswith("_") and not name.startswith("__") and name != "_"


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def is_package(self) -> bool:
        return self.path.name == "__init__.py"

    @cached_property
    def imported(self) -> dict[str, tuple[str, str | None]]:
        """The module that each imported name stands for, or the module and the name in it."""
        found: dict[str, tuple[str, str | None]] = {}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    whole = alias.asname is not None
                    name = alias.name if whole else alias.name.partition(".")[0]
                    found[alias.asname or name] = (name, None)
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    found[alias.asname or alias.name] = (node.module, alias.name)
        return found

    @cached_property
    def classes(self) -> dict[str, ast.ClassDef]:
        return {n.name: n for n in ast.walk(self.tree) if isinstance(n, ast.ClassDef)}

    @cached_property
    def own_names(self) -> set[str]:
        """The private names that this module defines, as variables, attributes or slots."""
        return set(_defined(self.tree))


def _defined(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name
            case ast.Assign(targets=[ast.Name(id="__slots__")], value=slots):
                yield from (n.value for n in ast.walk(slots) if isinstance(n, ast.Constant))


class Sources:
    """All modules of a package.

    Args:
        folders: where each package lies, as ``{"kvheap": Path("allocator")}``.
    """

    def __init__(self, folders: Mapping[str, Path]) -> None:
        self.modules: dict[str, Module] = {}
        for package, folder in folders.items():
            for path in sorted(folder.rglob("*.py")):
                steps = path.relative_to(folder).with_suffix("").parts
                steps = steps[:-1] if steps[-1] == "__init__" else steps
                name = ".".join((package, *steps))
                self.modules[name] = Module(name, path, ast.parse(path.read_text("utf-8")))

    def resolve(self, module: Module, node: ast.expr | None) -> tuple[Module, str | None] | None:
        """What an expression names in the package: a module, or a module and a name in it."""
        match node:
            case ast.Name(id=name) if name in module.classes:
                return module, name
            case ast.Name(id=name) if name in module.imported:
                return self._follow(*module.imported[name])
            case ast.Attribute(value=value, attr=name):
                found = self.resolve(module, value)
                if found is not None and found[1] is None:
                    return self._follow(found[0].name, name)
            case ast.Constant(value=str(text)):
                return self.resolve(module, ast.parse(text, mode="eval").body)
            case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
                return self.resolve(module, left)
        return None

    def _follow(self, module: str, name: str | None) -> tuple[Module, str | None] | None:
        """Find the module that defines a name, through modules that only import it."""
        if name is not None and f"{module}.{name}" in self.modules:
            return self.modules[f"{module}.{name}"], None
        if module not in self.modules:
            return None
        found = self.modules[module]
        if name is None or name in found.classes or name not in found.imported:
            return found, name
        return self._follow(*found.imported[name]) or (found, name)

    def private_names(self, module: Module, name: str | None) -> set[str]:
        """What is private in a class and its bases; nothing if the name is no class."""
        found = module.classes.get(name or "")
        if found is None:
            return set()
        return {n for n in _defined(found) if is_private(n)} | self.inherited(module, found)

    def inherited(self, module: Module, found: ast.ClassDef) -> set[str]:
        """What is private in the bases of a class."""
        resolved = [self.resolve(module, base) for base in found.bases]
        return set().union(*(self.private_names(*base) for base in resolved if base is not None))

    def foreign(self, module: Module, found: ast.ClassDef) -> set[str]:
        """What is private in those bases of a class that lie in other modules."""
        names: set[str] = set()
        for base in found.bases:
            resolved = self.resolve(module, base)
            if resolved is not None and resolved[1] is not None:
                where, name = resolved
                if where is not module:
                    names |= self.private_names(where, name)
                elif name in module.classes:
                    names |= self.foreign(module, module.classes[name])
        return names


@dataclass(frozen=True, order=True)
class PrivateUse:
    """One use of a name that another module keeps to itself."""

    path: Path
    line: int
    what: str
    """The expression, such as ``batch._lock``."""
    why: str = field(compare=False)

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.what} {self.why}"


def private_uses(sources: Sources) -> list[PrivateUse]:
    """Every use of a private name that the using module does not define, sorted by place.

    A name that the module does define still counts as another module's in three cases: it is read
    from an imported module; it is read from a parameter whose annotation is a class of another
    module that has such a name; or it is used, or defined again, in a subclass of such a class.
    """
    found = {use for module in sources.modules.values() for use in _uses(sources, module)}
    return sorted(found)


def _uses(sources: Sources, module: Module) -> Iterator[PrivateUse]:
    for node in ast.walk(module.tree):
        match node:
            case ast.Import(names=names):
                for alias in names:
                    if any(map(is_private, alias.name.split("."))):
                        yield PrivateUse(module.path, node.lineno, alias.name, "is imported")
            case ast.ImportFrom(module=str(origin), names=names):
                for alias in names:
                    if any(map(is_private, (*origin.split("."), alias.name))):
                        what = f"{origin}.{alias.name}"
                        yield PrivateUse(module.path, node.lineno, what, "is imported")
            case ast.Attribute(value=value, attr=name) if is_private(name):
                if name not in module.own_names or _is_module(sources, module, value):
                    what = f"{_short(value)}.{name}"
                    yield PrivateUse(module.path, node.lineno, what, "is not defined here")
            case ast.Call(func=ast.Name(id=reader) | ast.Attribute(attr=reader), args=arguments):
                if reader in READERS:
                    for argument in arguments[:2]:
                        match argument:
                            case ast.Constant(value=str(name)):
                                if is_private(name) and name not in module.own_names:
                                    what = f"{reader}({name!r})"
                                    why = "is not defined here"
                                    yield PrivateUse(module.path, node.lineno, what, why)
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield from _uses_of_parameters(sources, module, node)
            case ast.ClassDef():
                yield from _uses_of_bases(sources, module, node)


def _uses_of_parameters(
    sources: Sources, module: Module, function: ast.FunctionDef | ast.AsyncFunctionDef
) -> Iterator[PrivateUse]:
    arguments = function.args
    names: dict[str, set[str]] = {}
    for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
        resolved = sources.resolve(module, argument.annotation)
        if resolved is not None and resolved[0] is not module:
            names[argument.arg] = sources.private_names(*resolved)
    for node in ast.walk(function):
        match node:
            case ast.Attribute(value=ast.Name(id=argument), attr=name):
                if name in names.get(argument, ()):
                    what = f"{argument}.{name}"
                    yield PrivateUse(module.path, node.lineno, what, "is not defined here")


def _uses_of_bases(sources: Sources, module: Module, found: ast.ClassDef) -> Iterator[PrivateUse]:
    foreign = sources.foreign(module, found)
    if not foreign:
        return
    for node in ast.walk(found):
        match node:
            case ast.Attribute(attr=name, value=ast.Name(id="self" | "cls")) if name in foreign:
                what = f"self.{name}"
            case ast.Attribute(attr=name, value=ast.Call(func=ast.Name(id="super"))) if (
                name in foreign
            ):
                what = f"super().{name}"
            case ast.FunctionDef(name=name) | ast.Name(id=name, ctx=ast.Store()) if name in foreign:
                what = f"{found.name}.{name}"
            case _:
                continue
        why = "belongs to a base class in another module"
        yield PrivateUse(module.path, node.lineno, what, why)


def _is_module(sources: Sources, module: Module, value: ast.expr) -> bool:
    """Whether an expression is an imported module."""
    resolved = sources.resolve(module, value)
    if resolved is not None:
        return resolved[1] is None
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name) and module.imported.get(value.id, ("", ""))[1] is None


def _short(value: ast.expr) -> str:
    text = ast.unparse(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def import_circle(sources: Sources) -> list[str]:
    """A list of modules, each importing the next, that ends where it began; empty if there is none.

    Imports inside functions and for type checking count. An ``__init__`` is a module like any
    other, but importing ``a.b`` does not count as importing ``a``.
    """
    graph: dict[str, set[str]] = {}
    for module in sources.modules.values():
        graph[module.name] = {
            target.name
            for origin, name in _imports(module)
            if (target := _target(sources, origin, name)) is not None and target is not module
        }
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(reversed(error.args[1]))
    return []


def _imports(module: Module) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from ((node.module, alias.name) for alias in node.names)


def _target(sources: Sources, origin: str, name: str | None) -> Module | None:
    return sources.modules.get(f"{origin}.{name}") or sources.modules.get(origin)
