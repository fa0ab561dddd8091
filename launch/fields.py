"""The fields of a spec, read off its source: what they are called, mean and accept.

Nothing is imported, so that a shell's completion and `tessera explain` need no torch.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGES = ("trainer", "models", "launch")


@dataclass(frozen=True, kw_only=True)
class Field:
    """One setting."""

    name: str
    kind: str
    """Its type, as the source writes it."""
    default: str | None
    """As a config would write it; None: it must be set."""
    meaning: str
    place: str
    """File and line."""
    source: "Source"
    annotation: ast.expr

    @cached_property
    def choices(self) -> tuple[str, ...]:
        """Legal values, where the type lists them."""
        return tuple(dict.fromkeys(_choices(self.source, self.annotation)))

    @cached_property
    def spec(self) -> str | None:
        """Full name of the dataclass that it holds, alone or by name, where it is a known one."""
        return _spec_in(self.source, self.annotation)

    @property
    def is_named(self) -> bool:
        """Whether it holds several by names of the user's own."""
        return self.kind.startswith("dict[")


@dataclass(frozen=True, kw_only=True)
class Source:
    """One module's text."""

    name: str
    path: Path
    tree: ast.Module

    def definition(self, name: str) -> "tuple[Source, ast.stmt] | None":
        """Return where a name of this module is defined: here, or where it is imported from."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return self, node
            if isinstance(node, ast.Assign) and name in map(ast.unparse, node.targets):
                return self, node
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        there = source_of(node.module)
                        return there.definition(alias.name) if there else None
        return None


@cache
def source_of(module: str) -> Source | None:
    """Return a module of ours; None for others'."""
    package, *rest = module.split(".")
    spec = find_spec(package) if package in PACKAGES else None
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*rest)
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    return Source(name=module, path=path, tree=ast.parse(text))


@cache
def fields_of(target: str) -> dict[str, Field]:
    """Return the fields of a spec by name, those of its bases first; none of what is unknown."""
    module, _, name = target.rpartition(".")
    source = source_of(module)
    where, node = (source.definition(name) if source else None) or (None, None)
    if where is None or not isinstance(node, ast.ClassDef):
        return {}
    fields: dict[str, Field] = {}
    for base in node.bases:
        name = ast.unparse(base).partition("[")[0]  # Base[int] is Base
        if inherited := where.definition(name):
            fields |= fields_of(f"{inherited[0].name}.{name}")
    return fields | {field.name: field for field in _own_fields(where, node)}


def summary_of(target: str) -> str:
    """Return the first line of what a spec says of itself."""
    module, _, name = target.rpartition(".")
    source = source_of(module)
    found = source.definition(name) if source else None
    text = ast.get_docstring(found[1]) if found and isinstance(found[1], ast.ClassDef) else None
    return (text or "").partition("\n")[0]


def _own_fields(source: Source, node: ast.ClassDef) -> Iterator[Field]:
    for number, line in enumerate(node.body):
        if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
            continue
        kind = ast.unparse(line.annotation)
        if kind.startswith("ClassVar"):
            continue
        following = node.body[number + 1] if number + 1 < len(node.body) else None
        yield Field(
            name=line.target.id, kind=kind, default=_default(line), meaning=_text(following),
            place=f"{source.name.replace('.', '/')}.py:{line.lineno}",
            source=source, annotation=line.annotation,
        )  # fmt: skip


def _default(line: ast.AnnAssign) -> str | None:
    if line.value is None:
        return None
    for keyword in line.value.keywords if isinstance(line.value, ast.Call) else []:
        if keyword.arg == "default_factory":
            made = ast.unparse(keyword.value)
            return {"dict": "{}", "list": "[]", "tuple": "[]"}.get(made, made)
    try:
        value = ast.literal_eval(line.value)
    except ValueError:
        return ast.unparse(line.value)
    return in_yaml(value)


def in_yaml(value: Any) -> str:
    """Return a plain value as a config would write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(in_yaml, value))}]"
    return repr(value) if value == "" else str(value)


def _text(node: ast.stmt | None) -> str:
    """Return a docstring below a field as one line."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Constant):
        return ""
    return " ".join(str(node.value.value).split())


def _choices(source: Source, annotation: ast.expr) -> Iterator[str]:
    """Yield the values that a type lists; true and false of a bool."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
            values = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            yield from (str(value.value) for value in values if isinstance(value, ast.Constant))
        elif isinstance(node, ast.Name) and node.id == "bool":
            yield from ("true", "false")
        elif isinstance(node, ast.Name):
            found = source.definition(node.id)
            if found and isinstance(found[1], ast.Assign):
                yield from _choices(found[0], found[1].value)
    if ast.unparse(annotation).endswith("| None"):
        yield "null"


def _spec_in(source: Source, annotation: ast.expr) -> str | None:
    """Return the full name of the dataclass that a type names."""
    for node in ast.walk(annotation):
        if isinstance(node, ast.Name) and (found := source.definition(node.id)):
            where, definition = found
            decorators = getattr(definition, "decorator_list", [])
            if any("dataclass" in ast.unparse(decorator) for decorator in decorators):
                return f"{where.name}.{node.id}"
    return None
