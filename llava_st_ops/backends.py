"""Which backend an op takes, and why.

One predicate, `can_run`, both selects and explains. `use_backend` forces a backend.
"""

from __future__ import annotations

import contextvars
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

import torch

from . import library

# Tried in this order when none is forced.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Verdict:
    """Whether a backend can run an op, and the reason in words."""

    ok: bool
    reason: str


class BackendError(RuntimeError):
    """The backend that was asked for cannot run here."""


@dataclass(frozen=True)
class Backend:
    """One way to run the ops: the namespace that its kernels are registered in, and the predicate of `can_run`."""

    namespace: str | None  # None: plain PyTorch
    verdict: Callable[[torch.device, torch.dtype], Verdict]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cpu_verdict(device: torch.device, dtype: torch.dtype) -> Verdict:
    if not library.CPU.loaded:
        return Verdict(False, library.CPU.reason)
    if device.type != "cpu":
        return Verdict(False, f"the tensors are on {device.type}")
    if dtype not in (*_KERNEL_DTYPES, torch.float64):
        return Verdict(False, f"no CPU kernel computes in {_dtype_name(dtype)}")
    return Verdict(True, f"native CPU kernel, {library.CPU.text('llava_st_cpu_instruction_set')}")


def covers(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether code for `architectures`, such as `80-real,90a-real,80-virtual`, runs on a device of that capability."""
    for architecture in architectures.split(","):
        number, _, kind = architecture.strip().partition("-")
        if not number:
            continue
        specific = not number[-1].isdigit()  # 90a runs on 9.0 alone
        built = divmod(int(number.rstrip("abcdefghijklmnopqrstuvwxyz")), 10)
        if specific and built != capability:
            continue
        if kind != "virtual" and built[0] == capability[0] and built <= capability:
            return True
        if kind != "real" and built <= capability:
            return True
    return False


def _cuda_verdict(device: torch.device, dtype: torch.dtype) -> Verdict:
    if not library.CUDA.loaded:
        return Verdict(False, library.CUDA.reason)
    if device.type != "cuda":
        return Verdict(False, f"the tensors are on {device.type}")
    if dtype not in _KERNEL_DTYPES:
        return Verdict(False, f"no CUDA kernel computes in {_dtype_name(dtype)}")
    if not torch.cuda.is_available():
        return Verdict(False, "torch finds no CUDA device")
    # Minor versions of CUDA are compatible with each other, a driver of an older major version is not.
    driver, runtime = torch._C._cuda_getDriverVersion(), library.CUDA.number("llava_st_cuda_runtime_version")
    if driver // 1000 < runtime // 1000:
        return Verdict(False, f"the driver is for CUDA {driver // 1000}, the library for CUDA {runtime // 1000}")
    capability = torch.cuda.get_device_capability(device)
    architectures = library.CUDA.text("llava_st_cuda_architectures")
    if not covers(architectures, capability):
        found = ".".join(map(str, capability))
        return Verdict(False, f"the device has compute capability {found}, the library was built for {architectures}")
    return Verdict(True, "native CUDA kernel")


def _triton_verdict(device: torch.device, dtype: torch.dtype) -> Verdict:
    if importlib.util.find_spec("triton") is None:
        return Verdict(False, "triton is not installed")
    if dtype not in _KERNEL_DTYPES:
        return Verdict(False, f"no Triton kernel computes in {_dtype_name(dtype)}")
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return Verdict(True, "Triton's interpreter")
    if device.type != "cuda":
        return Verdict(False, f"the tensors are on {device.type} and TRITON_INTERPRET is not 1")
    if not torch.cuda.is_available():
        return Verdict(False, "torch finds no CUDA device")
    return Verdict(True, "Triton kernel")


_backends = {
    "cpu": Backend(library.NAMESPACE, _cpu_verdict),
    "cuda": Backend(library.NAMESPACE, _cuda_verdict),
    "triton": Backend(library.TRITON_NAMESPACE, _triton_verdict),
    "reference": Backend(None, lambda device, dtype: Verdict(True, "plain PyTorch")),
}

# What users choose from. `add_backend` adds to what can be forced, not to this.
BACKENDS = tuple(_backends)


def add_backend(name: str, backend: Backend) -> None:
    """Makes another backend known, which runs where `use_backend` forces it: tests run kernels in an emulator so."""
    _backends[name] = backend


def find_backend(name: str) -> Backend:
    """The backend of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _backends:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    return _backends[name]


def can_run(backend: str, op: str, device: torch.device | str, dtype: torch.dtype) -> Verdict:
    """Whether `backend` can run `op` on tensors of this device and dtype."""
    return find_backend(backend).verdict(torch.device(device), dtype)


# The choice of `use_backend`. Eager code reads the context variable, which is local to the thread and the task. Dynamo
# can neither read one nor guard on it, so compiled code sees a global, which it guards on: a changed choice recompiles.
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("llava_st_ops.backend", default=None)
_forced_for_compiled: list[str] = []  # the choices in force anywhere in the process, the latest last


class use_backend:  # noqa: N801 - a context manager, named as torch.no_grad is
    """Forces a backend: `with use_backend("reference"): ...`. An op that it cannot run raises `BackendError`.

    The choice is local to the thread and the asyncio task. Code under `torch.compile` sees the latest choice in force
    in the process instead, and is compiled anew when it changes.

    Args:
        backend: `"cpu"`, `"cuda"`, `"triton"` or `"reference"`.

    Raises:
        ValueError: another word.
    """

    def __init__(self, backend: str) -> None:
        find_backend(backend)
        self.backend = backend
        self._tokens: list[contextvars.Token[str | None]] = []  # one per `with` in which this instance is

    def __enter__(self) -> use_backend:
        _forced_for_compiled.append(self.backend)
        if not torch.compiler.is_compiling():
            self._tokens.append(_forced.set(self.backend))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Threads and tasks may leave in another order than they came. Which of several equal entries goes is no matter
        # but for their order, so the latest does.
        latest = len(_forced_for_compiled) - 1 - _forced_for_compiled[::-1].index(self.backend)
        del _forced_for_compiled[latest]
        if not torch.compiler.is_compiling():
            _forced.reset(self._tokens.pop())


def forced_backend() -> str | None:
    """The choice of `use_backend` in force here, outside of compiled code."""
    return _forced.get()


@functools.cache
def _announce_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def preference(device: torch.device) -> tuple[str, ...]:
    """The backends that are tried for a device, in order."""
    return _PREFERENCE.get(device.type, ("reference",))


def _choose(forced: str | None, op: str, device: torch.device, dtype: torch.dtype) -> str:
    if forced is not None:
        verdict = can_run(forced, op, device, dtype)
        if not verdict.ok:
            raise BackendError(f"{op}: backend {forced!r} cannot run here: {verdict.reason}")
        return forced
    verdicts = {name: can_run(name, op, device, dtype) for name in preference(device)}
    choice = next(name for name, verdict in verdicts.items() if verdict.ok)
    if choice == "reference":
        reasons = "; ".join(f"{name}: {verdict.reason}" for name, verdict in verdicts.items() if not verdict.ok)
        where = f"{_dtype_name(dtype)} on {device.type}"
        _announce_once(f"llava_st_ops: {op} takes the PyTorch reference for {where}: {reasons}")
    return choice


_choose_cached = functools.cache(_choose)


@torch.compiler.assume_constant_result
def _choose_while_tracing(forced: str | None, op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Evaluated while tracing and kept as a constant: its arguments are guarded on."""
    return _choose(forced, op, device, dtype)


def choose(op: str, tensor: torch.Tensor) -> str:
    """The backend that `op` takes for a tensor like this: the forced one, else the best that can run."""
    if torch.compiler.is_compiling():
        forced = _forced_for_compiled[-1] if _forced_for_compiled else None
        return _choose_while_tracing(forced, op, tensor.device, tensor.dtype)
    return _choose_cached(_forced.get(), op, tensor.device, tensor.dtype)
