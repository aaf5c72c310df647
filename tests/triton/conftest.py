"""Triton kernels on any machine: compiled where there is a GPU, in Triton's interpreter elsewhere.

Triton decides when `triton` itself is imported, and again for every kernel when its module is, whether it interprets;
`torch` may import it long before the first test does, at a time that depends on which tests were collected. So the
tests here run with a copy of Triton and of our kernels that was imported with TRITON_INTERPRET=1, and that stands in
`sys.modules` only while such a test runs: every other test of the process keeps the Triton it had.
"""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

import llava_st_ops

GPU = torch.cuda.is_available()
KERNELS = "llava_st_ops.triton"
# An interpreted program takes about 14 ms.
MAX_INTERPRETED_PROGRAMS = 200


def _has_copy(name: str) -> bool:
    """Whether a module differs between the two copies. Triton's native library has no such setting."""
    if name == "triton._C" or name.startswith("triton._C."):
        return False
    return any(name == package or name.startswith(f"{package}.") for package in ("triton", KERNELS))


def _take_modules() -> dict[str, ModuleType]:
    return {name: sys.modules.pop(name) for name in list(sys.modules) if _has_copy(name)}


# Where the copy waits in `sys.modules`. Anywhere else, it would be torn down too late when Python ends, and Triton's
# bindings would report leaks.
_PARKED = "interpreted copy of "


@contextlib.contextmanager
def _interpreted() -> Iterator[None]:
    outer_modules, outer_setting = _take_modules(), os.environ.get("TRITON_INTERPRET")
    outer_package = vars(llava_st_ops).get("triton")
    os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if name.startswith(_PARKED)]:
        sys.modules[name.removeprefix(_PARKED)] = sys.modules[name]
    try:
        yield
    finally:
        sys.modules.update({_PARKED + name: module for name, module in _take_modules().items()})
        sys.modules.update(outer_modules)
        if outer_setting is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = outer_setting
        if outer_package is not None:
            llava_st_ops.triton = outer_package
        elif "triton" in vars(llava_st_ops):
            del llava_st_ops.triton


class _GuardedEmpty:
    """Stands in for `torch.empty`: memory full of NaN (integers: -1), between two guards that must stay as they are."""

    GUARD = 64  # elements: keeps the alignment of fresh memory

    def __init__(self) -> None:
        self._empty = torch.empty
        self._buffers: list[torch.Tensor] = []

    def __call__(self, *size, dtype=None, device=None, **options):
        shape = self._empty(*size, device="meta").shape
        fill = float("nan") if (dtype or torch.get_default_dtype()).is_floating_point else -1
        buffer = torch.full((shape.numel() + 2 * self.GUARD,), fill, dtype=dtype, device=device, **options)
        self._buffers.append(buffer)
        return buffer[self.GUARD : -self.GUARD].view(shape)

    def check(self) -> None:
        for buffer in self._buffers:
            for guard in (buffer[: self.GUARD], buffer[-self.GUARD :]):
                untouched = guard.isnan() if guard.is_floating_point() else guard == -1
                assert untouched.all(), "a kernel wrote outside of its result"


@pytest.fixture
def launchers(monkeypatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the package that launches kernels. Their results start as NaN and are guarded on both sides,
    and a launch must not be too large for the interpreter."""
    with contextlib.nullcontext() if GPU else _interpreted():
        if not GPU:
            module = importlib.import_module(f"{KERNELS}.launching")
            launch = module.launch

            def launch_small(kernel, grid, *arguments, **options):
                programs = math.prod(grid)
                assert programs <= MAX_INTERPRETED_PROGRAMS, f"{programs} programs are too many for the interpreter"
                launch(kernel, grid, *arguments, **options)

            monkeypatch.setattr(module, "launch", launch_small)
        empty = _GuardedEmpty()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", empty)
            yield lambda name: importlib.import_module(f"{KERNELS}.{name}")
        empty.check()


@pytest.fixture
def kernels(launchers) -> ModuleType:
    """The module that launches the kernels of point-to-region attention."""
    return launchers("point_to_region_attention")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")
