"""What users can call: the functions and classes that the packages export or pages import, and the public methods of
those classes."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import llava_st

import llava_st_ops
from llava_st_ops import export, integrations, nn, ops

from .code_blocks import PAGES, blocks

OWN = ("llava_st", "llava_st_ops")


@dataclass(frozen=True)
class Public:
    """A function, class or method that users call, under the name that documents use for it."""

    name: str
    value: Any
    owner: type | None = None

    @property
    def is_op(self) -> bool:
        return self.owner is None and self.name.rpartition(".")[2] in ops.__all__

    @property
    def function(self) -> Any:
        """What holds signature and code; of a class its `__init__`, None where that is not of these packages."""
        if inspect.isclass(self.value):
            return self.value.__init__ if _is_own(self.value.__init__) else None
        value = self.value.fget if isinstance(self.value, property) else self.value
        return inspect.unwrap(getattr(value, "__func__", value))

    def raised(self) -> set[str]:
        """The names of exceptions that its own code raises."""
        if self.function is None or dataclasses.is_dataclass(self.value):
            return set()
        tree = ast.parse(textwrap.dedent(inspect.getsource(self.function)))
        raises = (node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc is not None)
        return {ast.unparse(exc.func if isinstance(exc, ast.Call) else exc).rpartition(".")[2] for exc in raises}


def _is_own(value: Any) -> bool:
    return getattr(value, "__module__", "").partition(".")[0] in OWN


def exported() -> Iterator[Public]:
    """Functions and classes, under the name of the first package that exports them."""
    seen = set()
    for package in (llava_st_ops, nn, integrations, export, llava_st):
        for name in getattr(package, "__all__", vars(package)):
            value = getattr(package, name)
            named = not name.startswith("_") and callable(value) and _is_own(value)
            if named and value not in seen:
                seen.add(value)
                yield Public(f"{package.__name__}.{name}", value)


def imported_by_pages() -> Iterator[Public]:
    """What the code of pages imports from modules of the packages."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "python"):
            for node in ast.walk(ast.parse(block.code)):
                if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] in OWN:
                    found |= {f"{node.module}.{alias.name}": (node.module, alias.name) for alias in node.names}
    for name, (module, attribute) in found.items():
        yield Public(name, getattr(importlib.import_module(module), attribute))


def methods(public: Public) -> Iterator[Public]:
    """Public methods of a class that these packages define, without those that a framework's base class has too, whose
    rules they follow; `forward` is always one."""
    for name in dir(public.value):
        if name.startswith("_"):
            continue
        value = inspect.getattr_static(public.value, name)
        if not (inspect.isfunction(value) or isinstance(value, classmethod | property)):
            continue
        owners = [kind for kind in public.value.__mro__ if name in vars(kind)]
        if all(map(_is_own, owners)) or (name == "forward" and _is_own(owners[0])):
            yield Public(f"{public.name}.{name}", value, public.value)


def everything() -> Iterator[Public]:
    seen = set()
    for public in (*exported(), *imported_by_pages()):
        if public.value in seen:
            continue
        seen.add(public.value)
        yield public
        if inspect.isclass(public.value) and not issubclass(public.value, BaseException):
            yield from methods(public)
