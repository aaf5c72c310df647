"""Peak memory of one call, above what was held before it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def _status_bytes(field: str) -> int:
    match = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if match is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(match[1]) * 1024


def _cpu_peak(call: Callable[[], object]) -> int:
    # Memory that was freed but kept by malloc would hide what the call takes.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # resets the high-water mark of resident memory, VmHWM
    before = _status_bytes("VmRSS")
    result = call()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _cuda_peak(call: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = call()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return peak - before


def peak_memory(call: Callable[[], object], device: torch.device) -> tuple[int | None, str]:
    """Bytes that the call held at its peak, its result included, and how that was measured or why it was not.

    On a CPU this is resident memory, so whole pages and every library's buffers count.
    """
    gc.collect()
    if device.type == "cuda":
        return _cuda_peak(call, device), "torch.cuda.max_memory_allocated above what was held before"
    try:
        return _cpu_peak(call), "growth of peak resident memory (VmHWM, reset before the call)"
    except (OSError, AttributeError) as error:
        call()
        return None, f"not measured: {error}"
