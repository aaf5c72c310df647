"""`python -m llava_st_ops.info`: versions, native libraries, and which backend each op takes on each device and why."""

from __future__ import annotations

import platform

import torch

from . import backends, library
from .version import __version__

OPS = (
    "point_to_region_attention",
    "point_to_region_attention_packed",
    "propagate_to_neighbors",
    "lape_add",
    "lape_add_",
    "lape_add_packed",
    "lape_scatter",
    "coordinate_cross_entropy",
    "normalized_region_attention",
    "linear_lape_gelu",
    "gelu_linear_gradient",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _version_of(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[torch.device]:
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def _library_lines() -> list[str]:
    lines = [f"  CPU   {library.CPU.reason}"]
    if library.CPU.loaded:
        lines.append(f"        instruction set: {library.CPU.text('llava_st_cpu_instruction_set')}")
    lines.append(f"  CUDA  {library.CUDA.reason}")
    if library.CUDA.loaded:
        runtime = library.CUDA.number("llava_st_cuda_runtime_version")
        lines.append(f"        CUDA {runtime // 1000}.{runtime % 1000 // 10}")
        lines.append(f"        architectures: {library.CUDA.text('llava_st_cuda_architectures')}")
        lines.append(f"        CUTLASS: {library.CUDA.text('llava_st_cutlass')}")
    return lines


def _op_lines(op: str, device: torch.device) -> list[str]:
    lines = []
    for dtype in DTYPES:
        verdicts = {name: backends.can_run(name, op, device, dtype) for name in backends.preference(device)}
        choice = next(name for name, verdict in verdicts.items() if verdict.ok)
        passed_over = [f"{name}: {verdict.reason}" for name, verdict in verdicts.items() if not verdict.ok]
        line = f"    {str(dtype).removeprefix('torch.'):9} {choice} ({verdicts[choice].reason})"
        lines.append(line + (f"; not {'; not '.join(passed_over)}" if passed_over else ""))
    return lines


def report() -> str:
    """The whole report as text."""
    lines = [
        f"llava_st_ops {_version_of('llava_st_ops')} (source {__version__})",
        f"Python {platform.python_version()}, torch {torch.__version__} "
        f"(CUDA {torch.version.cuda or 'none'}), triton {_version_of('triton')}",
        "",
        "native libraries",
        *_library_lines(),
    ]
    for device in _devices():
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
        lines += ["", f"{device}: {name}"]
        for op in OPS:
            lines += [f"  {op}", *_op_lines(op, device)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(report())
