"""Every public function says what it takes, returns and raises; the ops also say where they come from."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch

import llava_st_ops
from llava_st_ops import reference

from .docstrings import Docstring
from .public_surface import Public, everything

SHAPE = re.compile(r"`\[.*\]`|\b[Ll]ike\b|\bshape\b|\bscalar\b", re.DOTALL)
PUBLIC = {public.name: public for public in everything()}


@pytest.fixture(params=PUBLIC)
def public(request) -> Public:
    return PUBLIC[request.param]


def documented(public: Public) -> Docstring:
    return Docstring.read(inspect.getdoc(public.value) or "")


def parameters(public: Public) -> list[inspect.Parameter]:
    if public.function is None or isinstance(public.value, property) or dataclasses.is_dataclass(public.value):
        return []
    listed = list(inspect.signature(public.function).parameters.values())
    return listed[1:] if public.owner or inspect.isclass(public.value) else listed


def returned(public: Public) -> str:
    if inspect.isclass(public.value) or isinstance(public.value, property):
        return ""
    annotation = inspect.signature(public.function).return_annotation
    return "" if annotation in (None, "None", inspect.Signature.empty) else str(annotation)


def delegates(public: Public) -> bool:
    """Whether the docstring leaves errors and source to another one's, by name."""
    named = re.search(r"Everything else is as in\s+`(\w+)`", inspect.getdoc(public.value) or "")
    return named is not None and hasattr(llava_st_ops, named[1])


def test_there_is_something_to_check():
    assert len(PUBLIC) > 60
    assert sum(public.is_op for public in PUBLIC.values()) == len(llava_st_ops.ops.__all__)
    assert any(public.raised() for public in PUBLIC.values())


def test_it_has_a_docstring(public):
    assert len((inspect.getdoc(public.value) or "").strip()) > 10
    assert "TODO" not in inspect.getdoc(public.value)


def test_arguments_are_those_of_the_signature(public):
    if dataclasses.is_dataclass(public.value):
        own = {field.name for field in dataclasses.fields(public.value)} & set(vars(public.value)["__annotations__"])
        assert {*documented(public).entries("Args"), *documented(public).entries("Attributes")} == own
    elif "Attributes" not in documented(public).sections:  # a class of results, which users do not make
        assert list(documented(public).entries("Args")) == [parameter.name for parameter in parameters(public)]


def test_results_are_documented(public):
    if returned(public):
        sections = documented(public).sections
        text = "".join(sections.get(name, "") for name in ("Returns", "Yields")).strip()
        assert text
        assert ": " not in text.partition("\n")[0]  # what is before one would be taken for a type


def test_errors_are_documented(public):
    missing = public.raised() - {name.rpartition(".")[2] for name in documented(public).entries("Raises")}
    assert not missing or delegates(public)


def test_tensors_have_shapes(public):
    document = documented(public)
    for parameter in parameters(public):
        if parameter.annotation in ("Tensor", "Tensor | None", torch.Tensor):
            assert SHAPE.search(document.entries("Args")[parameter.name]), parameter.name
    if "Tensor" in returned(public):
        assert SHAPE.search(document.sections["Returns"])


def test_ops_name_their_errors(public):
    if public.is_op and not delegates(public):
        assert "ValueError" in documented(public).entries("Raises")


def test_what_is_from_a_paper_names_its_source(public):
    """Ops, modules and adapters; what belongs to these, such as methods, has the same."""
    here = public.owner is None and public.name.startswith(("llava_st_ops.nn.", "llava_st_ops.integrations.accelerate"))
    if here or (public.is_op and not delegates(public)):
        assert re.search(r"arXiv:\d{4}\.\d{5}", documented(public).sections["Source"])


def test_the_reference_takes_what_the_ops_take():
    """So the docstrings of the ops say what its functions take."""
    for name in reference.__all__:
        function = getattr(reference, name)
        assert (inspect.getdoc(function) or "").strip(), name
        if name in llava_st_ops.ops.__all__:
            ours, theirs = (set(inspect.signature(each).parameters) for each in (getattr(llava_st_ops, name), function))
            assert ours == theirs, name
