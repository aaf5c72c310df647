"""Runs an op on the backend of choice, and registers the kernels of an op that are written in Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends, library
from .registration import autocast_is_on, is_transformed


def run(op: str, arguments: tuple[Any, ...], plain: Callable[..., Any]) -> Any:
    """`op(*arguments)` on the backend that fits the first of them; `plain` is its reference.

    What derivatives of a higher order go through is always the reference: the kernels have none.
    """
    first = arguments[0]
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    if not torch.compiler.is_compiling() and is_transformed(*tensors):
        return plain(*arguments)
    if first.is_meta:
        return getattr(torch.ops.llava_st, op)(*arguments)  # shapes alone: the op's fake
    namespace = backends.find_backend(backends.choose(op, first)).namespace
    if namespace is None:
        if not autocast_is_on(first.device.type):
            return plain(*arguments)
        with torch.autocast(first.device.type, enabled=False):  # what is to be cast was cast already
            return plain(*arguments)
    kernel = getattr(getattr(torch.ops, namespace), op)
    if torch.compiler.is_compiling():
        return kernel(*arguments)
    try:
        return kernel(*arguments)
    except RuntimeError as error:
        if "out of memory allocating" in str(error) and not isinstance(error, torch.OutOfMemoryError):
            raise torch.OutOfMemoryError(str(error)) from None  # the type is lost at the libraries' C boundary
        if "Expected a value of type" in str(error):  # the dispatcher, of a flag that is no bool
            raise TypeError(str(error)) from None
        raise


def computing_tables(tables: Sequence[Tensor], like: Tensor) -> Sequence[Tensor]:
    """Tables of anchors as the kernels take them: in float64 only where the rest is, too. Else float32 is computed in
    anyway."""
    if like.dtype == torch.float64 or tables[0].dtype != torch.float64:
        return tables
    return [table.float() for table in tables]


def with_defaults(op: str, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """All arguments of a call: the dispatcher leaves out trailing ones that equal their default."""
    schema = getattr(torch.ops.llava_st, op).default._schema
    return (*arguments, *(argument.default_value for argument in schema.arguments[len(arguments) :]))


def register_python_kernels(
    op: str, triton_function: str, plain: Callable[..., Any], check: Callable[[str, tuple[Any, ...]], None]
) -> None:
    """Triton's kernel for `op`, a function of `llava_st_ops.triton`, behind `torch.ops.llava_st_triton`; and where a
    native library was not loaded the better of it and the reference in its place.

    `check(op, arguments)` raises what is wrong with a call.
    """

    def kernel_of(backend: str | None) -> Callable[..., Any]:
        def kernel(*arguments: Any) -> Any:
            arguments = with_defaults(op, arguments)
            check(op, arguments)
            first = arguments[0]
            if backend == "triton" or (first.is_cuda and backends.can_run("triton", op, first.device, first.dtype).ok):
                from .. import triton  # imports Triton when a kernel of it is first wanted

                return getattr(triton, triton_function)(*arguments)
            return plain(*arguments)

        return kernel

    for key, native in (("CPU", library.CPU), ("CUDA", library.CUDA)):
        library.TRITON_OPS.impl(op, kernel_of("triton"), key)  # on the CPU it is Triton's interpreter
        if not native.loaded:
            library.OPS.impl(op, kernel_of(None), key)
