"""What a run ran on: hardware, its state, versions, commit."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
HUGE_PAGE_VARIABLE = "THP_MEM_ALLOC_ENABLE"


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def cpu_model() -> str:
    match = re.search(r"^model name\s*:\s*(.+)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


def _cpu() -> dict[str, Any]:
    setting = _read("/sys/kernel/mm/transparent_hugepage/enabled") or ""
    chosen = re.search(r"\[(\w+)\]", setting)
    return {
        "model": cpu_model(),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "transparent_huge_pages": chosen[1] if chosen else "unknown",
        "load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


@contextlib.contextmanager
def _nvml(device: torch.device) -> Iterator[Any]:
    """The nvidia-ml-py module and a handle of the device that torch uses."""
    import pynvml

    pynvml.nvmlInit()
    try:
        uuid = torch.cuda.get_device_properties(device).uuid
        yield pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    finally:
        pynvml.nvmlShutdown()


def device_state(device: torch.device) -> dict[str, Any]:
    """Clocks, temperature and power of a GPU now; load of a CPU now."""
    if device.type != "cuda":
        return {"load_average_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None}
    try:
        with _nvml(device) as (nvml, handle):
            return {
                "sm_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                "memory_clock_mhz": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                "temperature_c": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                "power_w": nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            }
    except Exception as error:  # whatever NVML lacks here must not end the run
        return {"unknown": f"{type(error).__name__}: {error}"}


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    found: dict[str, Any] = {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
    }
    try:
        with _nvml(device) as (nvml, handle):
            found["driver"] = nvml.nvmlSystemGetDriverVersion()
            found["max_sm_clock_mhz"] = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)
            found["max_memory_clock_mhz"] = nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)
    except Exception as error:  # as above
        found["driver"] = f"unknown: {type(error).__name__}: {error}"
    return found


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _versions() -> dict[str, str | None]:
    import llava_st_ops

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "llava_st_ops": llava_st_ops.__version__,
        "triton": _installed("triton"),
        "cuda": torch.version.cuda,
        "system": platform.platform(),
    }


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def commit() -> str:
    """The commit of the checkout, with "+dirty" where files differ from it. Without history: LLAVA_ST_COMMIT."""
    head = _git("rev-parse", "--verify", "HEAD")
    if head is None:
        return os.environ.get("LLAVA_ST_COMMIT", "none")
    return f"{head}+dirty" if _git("status", "--porcelain") else head


def describe(device: torch.device) -> dict[str, Any]:
    return {
        "device": _gpu(device)["name"] if device.type == "cuda" else cpu_model(),
        "device_type": device.type,
        "gpu": _gpu(device) if device.type == "cuda" else None,
        "cpu": _cpu(),
        "versions": _versions(),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": ["python", *sys.orig_argv[1:]],
    }
