"""The backend `emulated`: the CUDA launchers and kernels, run on the CPU, as ops of a namespace of their own."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from llava_st_ops import backends, use_backend
from llava_st_ops.ops import registration
from tests.emulator.build import load

NAMESPACE = "llava_st_emulated"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _verdict(device: torch.device, dtype: torch.dtype) -> backends.Verdict:
    if device.type != "cpu":
        return backends.Verdict(False, f"the tensors are on {device.type}")
    if dtype not in DTYPES:
        return backends.Verdict(False, f"no CUDA kernel computes in {dtype}")
    return backends.Verdict(True, "CUDA kernels in the emulator")


@functools.cache
def install() -> Any:
    """Builds the emulated library, makes the backend known and returns the library's Python module."""
    registration.add_namespace(NAMESPACE)
    module = load()
    backends.add_backend("emulated", backends.Backend(NAMESPACE, _verdict))
    return module


@contextmanager
def launched() -> Iterator[list[str]]:
    """The names of the kernels that are launched meanwhile, once each; filled at the end."""
    names: list[str] = []
    before = load().launches()
    yield names
    names += [name for name, count in load().launches().items() if count > before.get(name, 0)]


@contextmanager
def emulated(name: str = "", **settings: Any) -> Iterator[Any]:
    """Forces the backend; the order of threads is drawn from a seed that `name` determines.

    `settings` are those of the emulator (emulator.h) for as long as this lasts. Yields the raw ops.
    """
    module = install()
    settings = {"seed": zlib.crc32(name.encode()), **settings}
    before = {key: getattr(module.settings, key) for key in settings}
    for key, value in settings.items():
        setattr(module.settings, key, value)
    try:
        with use_backend("emulated"):
            yield getattr(torch.ops, NAMESPACE)
    finally:
        for key, value in before.items():
            setattr(module.settings, key, value)
