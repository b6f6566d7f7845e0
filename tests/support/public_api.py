"""The public API of a package as text, read from its sources: every module, name and signature.

``python tests/support/public_api.py`` writes ``tests/public_api.txt``; a test compares the two, so
that a change of the API is meant. Nothing is imported, so the text depends neither on the Python
that makes it nor on what is installed.

Public are the names in ``__all__`` of every package, and of every module in ``MODULES`` and
directly in ``integrations``; of a class, what does not begin with an underscore, with what it
inherits from classes that are not public themselves.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["PublicApi", "main"]

ROOT = Path(__file__).parents[2]
SOURCES = {"kvheap": ROOT / "allocator", "kvheap.kernels": ROOT / "kernels"}
LISTING = ROOT / "tests" / "public_api.txt"

MODULES = (
    "kvheap.errors",
    "kvheap.device.events",
    "kvheap.integrations.vllm.file_tier",
)
"""Public modules that no package hands on as a whole."""

OPEN_PACKAGES = ("kvheap.integrations",)
"""Packages whose modules are public themselves."""

SPECIAL = {
    *("__len__", "__iter__", "__contains__", "__getitem__", "__eq__", "__add__"),
    *("__enter__", "__aenter__", "__await__"),
}
"""Special methods that are listed."""

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Module:
    """One source file: what it defines, and where what it imports is defined."""

    name: str
    is_package: bool
    defined: dict[str, ast.stmt] = field(default_factory=dict)
    imported: dict[str, tuple[str, str | None]] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, path: Path) -> Module:
        found = cls(name, path.name == "__init__.py")
        found._read(ast.parse(path.read_text(encoding="utf-8")).body)
        return found

    def _read(self, body: list[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                if not is_overload(node):
                    self.defined[node.name] = node
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                self.defined[node.target.id] = node
            elif isinstance(node, ast.Assign):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.defined[target.id] = node
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = (node.module, alias.name)
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    self.imported[alias.asname or alias.name] = (alias.name, None)
            elif isinstance(node, (ast.If, ast.Try, ast.With)):
                for part in ("body", "orelse", "handlers", "finalbody"):
                    for each in getattr(node, part, []):
                        self._read(each.body if isinstance(each, ast.ExceptHandler) else [each])


class PublicApi:
    """The public names of a package.

    Args:
        sources: the folder of each package that has a place of its own.
        modules: public modules that no package hands on.
        open_packages: packages whose modules are public.
    """

    def __init__(
        self,
        sources: dict[str, Path],
        modules: tuple[str, ...] = MODULES,
        open_packages: tuple[str, ...] = OPEN_PACKAGES,
    ) -> None:
        self.modules: dict[str, Module] = {}
        for package, folder in sources.items():
            for path in sorted(folder.rglob("*.py")):
                parts = path.relative_to(folder).with_suffix("").parts
                names = parts[:-1] if parts[-1] == "__init__" else parts
                name = ".".join((package, *names))
                self.modules[name] = Module.of(name, path)
        self._extra, self._open = modules, open_packages

    # -- which names ---------------------------------------------------------------------------

    def public_modules(self) -> list[str]:
        """The names of all public modules."""
        return sorted(
            name
            for name, module in self.modules.items()
            if not any(part.startswith("_") for part in name.split("."))
            and (module.is_package or name in self._extra or name.rpartition(".")[0] in self._open)
            and self.names_of(name)
        )

    def names_of(self, module: str) -> list[str]:
        """The names in ``__all__`` of a module."""
        node = self.modules[module].defined.get("__all__")
        return sorted(self._texts(module, node.value)) if isinstance(node, ast.Assign) else []

    def _texts(self, module: str, value: ast.expr) -> Iterator[str]:
        """The texts of a list, ``[*NAMES]`` of a dict or list of the module included."""
        if isinstance(value, (ast.List, ast.Tuple, ast.Set)):
            for each in value.elts:
                yield from self._texts(module, each)
        elif isinstance(value, ast.Dict):
            for key in value.keys:
                if key is not None:
                    yield from self._texts(module, key)
        elif isinstance(value, ast.Constant) and isinstance(value.value, str):
            yield value.value
        elif isinstance(value, ast.Starred):
            yield from self._texts(module, value.value)
        elif isinstance(value, ast.Name):
            node = self.modules[module].defined.get(value.id)
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                yield from self._texts(module, node.value)

    def definition(self, module: str, name: str) -> tuple[Module, str, ast.stmt | None]:
        """Where a name of a module is defined; no statement if that is not in the package."""
        for _ in range(20):
            found = self.modules.get(module)
            if found is None:
                break
            if name in found.defined:
                return found, name, found.defined[name]
            if name not in found.imported:
                if f"{module}.{name}" in self.modules:
                    return self.modules[f"{module}.{name}"], "", None
                break
            module, given = found.imported[name]
            name = name if given is None else given
        return Module(module, False), name, None

    # -- as text -------------------------------------------------------------------------------

    def text(self) -> str:
        """All public names, module by module."""
        lines = [
            "# The public API: a test compares this file with the sources. After a change that is",
            "# meant: python tests/support/public_api.py",
        ]
        where: dict[tuple[str, str], str] = {}
        modules = sorted(self.public_modules(), key=lambda name: (name.count("."), name))
        public = {self._place(module, name) for module in modules for name in self.names_of(module)}
        for module in modules:
            lines += ["", f"[{module}]"]
            for name in self.names_of(module):
                place = self._place(module, name)
                if place in where:
                    lines.append(f"{name}: see {where[place]}")
                    continue
                where[place] = module
                lines += self._described(module, name, public)
        return "\n".join(lines) + "\n"

    def _place(self, module: str, name: str) -> tuple[str, str]:
        found, own_name, _ = self.definition(module, name)
        return found.name, own_name

    def _described(self, module: str, name: str, public: set[tuple[str, str]]) -> list[str]:
        found, own_name, node = self.definition(module, name)
        if isinstance(node, ast.ClassDef):
            return self._class(found, node, name, public)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            return [f"def {name}{signature(node)}"]
        if isinstance(node, ast.AnnAssign):
            return [f"{name}: {ast.unparse(node.annotation)}"]
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name):
            return [f"{name} = {node.value.id}"]
        return [name if node is not None or not own_name else f"{name}: of {found.name}"]

    def _class(
        self, module: Module, node: ast.ClassDef, name: str, public: set[tuple[str, str]]
    ) -> list[str]:
        members: dict[str, str] = {}
        for owner, part in self._with_hidden_bases(module, node, public):
            for key, line in self._members(owner, part).items():
                members.setdefault(key, line)
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        constructor = members.pop("__init__", "") or self._fields(module, node)
        head = f"class {name}({bases})" if bases else f"class {name}"
        lines = [head] + ([f"    __init__{constructor}"] if constructor else [])
        return lines + [f"    {members[key]}" for key in sorted(members)]

    def _fields(self, module: Module, node: ast.ClassDef) -> str:
        """The constructor of a dataclass or named tuple, whose fields have an order; or nothing."""
        fields = self._ordered_fields(module, node)
        return f"({', '.join(fields.values())})" if fields else ""

    def _ordered_fields(self, module: Module, node: ast.ClassDef) -> dict[str, str]:
        decorators = {ast.unparse(each).partition("(")[0] for each in node.decorator_list}
        bases = {ast.unparse(base) for base in node.bases}
        if "dataclass" not in decorators and "NamedTuple" not in bases:
            return {}
        found: dict[str, str] = {}
        for base in node.bases:
            owner, _, part = self.definition(module.name, ast.unparse(base))
            if isinstance(part, ast.ClassDef):
                found |= self._ordered_fields(owner, part)
        for part in node.body:
            if not isinstance(part, ast.AnnAssign) or not isinstance(part.target, ast.Name):
                continue
            text, value = f"{part.target.id}: {ast.unparse(part.annotation)}", part.value
            if "ClassVar" in text or (value is not None and "init=False" in ast.unparse(value)):
                continue
            found[part.target.id] = text if value is None else f"{text} = {ast.unparse(value)}"
        return found

    def _with_hidden_bases(
        self, module: Module, node: ast.ClassDef, public: set[tuple[str, str]]
    ) -> Iterator[tuple[Module, ast.ClassDef]]:
        """A class, and the classes that it inherits from and that are not listed themselves."""
        yield module, node
        for base in node.bases:
            base = base.value if isinstance(base, ast.Subscript) else base
            if not isinstance(base, ast.Name):
                continue
            owner, own_name, found = self.definition(module.name, base.id)
            if isinstance(found, ast.ClassDef) and (owner.name, own_name) not in public:
                yield from self._with_hidden_bases(owner, found, public)

    def _members(self, module: Module, node: ast.ClassDef) -> dict[str, str]:
        """Lines by member; of ``__init__``, its signature."""
        found: dict[str, str] = {}
        is_enum = any(ast.unparse(base).endswith("Enum") for base in node.bases)
        for part in node.body:
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                if is_overload(part):
                    continue
                if part.name == "__init__":
                    found |= self._attributes(part)
                    found["__init__"] = signature(part, skip_first=True)
                elif not part.name.startswith("_") or part.name in SPECIAL:
                    found[part.name] = self._method(part)
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                name = part.target.id
                if not name.startswith("_"):
                    default = "" if part.value is None else " = ..."
                    found.setdefault(name, f"{name}: {ast.unparse(part.annotation)}{default}")
            elif isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name):
                name = part.targets[0].id
                if not name.startswith("_"):
                    found[name] = self._assigned(module, name, part.value, is_enum)
        return found

    def _method(self, node: Function) -> str:
        kinds = {ast.unparse(each) for each in node.decorator_list}
        if kinds & {"property", "cached_property"}:
            returned = "Any" if node.returns is None else ast.unparse(node.returns)
            return f"{node.name}: {returned} (property)"
        kind = next((f" ({each})" for each in ("classmethod", "staticmethod") if each in kinds), "")
        prefix = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
        skip = "staticmethod" not in kinds
        return f"{prefix}{node.name}{signature(node, skip_first=skip)}{kind}"

    def _assigned(self, module: Module, name: str, value: ast.expr, is_enum: bool) -> str:
        """A class attribute; a function of another module is a method."""
        if is_enum:
            return f"{name} = {ast.unparse(value)}"
        if isinstance(value, ast.Attribute) and isinstance(value.value, ast.Name):
            owner, _, _ = self.definition(module.name, value.value.id)
            node = owner.defined.get(value.attr)
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                return f"{name}{signature(node, skip_first=True)}"
        return name

    @staticmethod
    def _attributes(init: Function) -> dict[str, str]:
        """The public attributes that a constructor sets."""
        found: dict[str, str] = {}
        for node in ast.walk(init):
            targets: list[ast.expr] = []
            annotation = ""
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AnnAssign):
                targets, annotation = [node.target], f": {ast.unparse(node.annotation)}"
            for target in targets:
                if (
                    isinstance(target, ast.Attribute)
                    and isinstance(target.value, ast.Name)
                    and target.value.id == "self"
                    and not target.attr.startswith("_")
                ):
                    found[target.attr] = f"{target.attr}{annotation}"
        return found


def is_overload(node: ast.stmt) -> bool:
    """Whether this is one of several typed signatures of a function."""
    decorators = getattr(node, "decorator_list", [])
    return any(ast.unparse(each).rpartition(".")[2] == "overload" for each in decorators)


def signature(node: Function, skip_first: bool = False) -> str:
    """Arguments and result of a function, in one line.

    >>> text = "def f(self, a, b: int=1, /, *c, d: str='x', **e) -> None: ..."
    >>> signature(ast.parse(text).body[0], skip_first=True)
    "(a, b: int = 1, /, *c, d: str = 'x', **e) -> None"
    """
    given = node.args
    places = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(places) - len(given.defaults))
    defaults += given.defaults
    parts = [argument(*each) for each in zip(places, defaults, strict=True)]
    if given.posonlyargs:
        parts.insert(len(given.posonlyargs), "/")
    if skip_first and parts:
        parts = parts[1:]
    if given.vararg is not None:
        parts.append(f"*{argument(given.vararg, None)}")
    elif given.kwonlyargs:
        parts.append("*")
    parts += [argument(*each) for each in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg is not None:
        parts.append(f"**{argument(given.kwarg, None)}")
    returned = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"({', '.join(parts)}){returned}"


def argument(node: ast.arg, default: ast.expr | None) -> str:
    """One argument with its type and default."""
    text = node.arg if node.annotation is None else f"{node.arg}: {ast.unparse(node.annotation)}"
    if default is None:
        return text
    equals = "=" if node.annotation is None else " = "
    return f"{text}{equals}{ast.unparse(default)}"


def main() -> None:
    """Write the listing."""
    text = PublicApi(SOURCES).text()
    has_changed = not LISTING.exists() or LISTING.read_text(encoding="utf-8") != text
    LISTING.write_text(text, encoding="utf-8")
    sys.stdout.write(f"{LISTING}: {'written' if has_changed else 'unchanged'}\n")


if __name__ == "__main__":
    main()
