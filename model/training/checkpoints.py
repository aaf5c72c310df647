"""Checkpoints of training: complete, or not there."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..checkpoints.reading import TensorSpec
from ..checkpoints.writing import write_safetensors
from ..durable import sync_folder

_logger = logging.getLogger(__name__)
_NAME = re.compile(r"checkpoint-(\d+)")
_PARTIAL = ".partial-"
_MANIFEST = "manifest.json"


def write_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str], keep: int
) -> Path:
    """Writes `checkpoint-STEP` under a temporary name, to which it is renamed once all is on the disk.

    Args:
        folder: of checkpoints.
        step: of training.
        tensors: file -> names and CPU tensors, written as safetensors.
        texts: file -> what is in it.
        keep: how many checkpoints stay, this one included. None is removed before this one is complete. Those of later
            steps stay and do not count: they are damaged, or training would have gone on from them.

    Raises:
        OSError: the disk is full, or cannot be written to. Checkpoints stay as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"checkpoint-{step}"
    partial = folder / f"{_PARTIAL}{name}"
    _remove_partial(folder)
    partial.mkdir()
    try:
        for file, named in tensors.items():
            _write_tensors(partial / file, named)
        for file, text in texts.items():
            _write_text(partial / file, text)
        manifest = {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(partial.iterdir())}
        _write_text(partial / _MANIFEST, json.dumps(manifest, indent=2))
        sync_folder(partial)
        if (folder / name).exists():  # a damaged one, or training was begun anew from an earlier one
            shutil.rmtree(folder / name)
        partial.rename(folder / name)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(error.errno, f"{name} could not be written: {error.strerror}", str(folder)) from error
    earlier = [path for path in _checkpoints(folder) if _step(path) <= step]
    for old in earlier[keep:]:
        shutil.rmtree(old)
    return folder / name


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; damaged ones are passed over with a warning."""
    for path in _checkpoints(folder):
        if (reason := damage(path)) is None:
            return path
        _logger.warning("%s: skipped, %s", path, reason)
    return None


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint: files that are missing, or not as they were written."""
    try:
        manifest = json.loads((checkpoint / _MANIFEST).read_text())
        for name, (size, checksum) in manifest.items():
            path = checkpoint / name
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, expected {size}"
            if _checksum(path) != checksum:
                return f"{name} is not as it was written"
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:  # damaged JSON may be any JSON
        return f"it is not complete ({error})"
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _checkpoints(folder: Path) -> list[Path]:
    """Newest first."""
    found = [path for path in folder.glob("checkpoint-*") if _NAME.fullmatch(path.name)]
    return sorted(found, key=_step, reverse=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def _remove_partial(folder: Path) -> None:
    """What processes left that were killed while they wrote."""
    for path in folder.glob(f"{_PARTIAL}*"):
        shutil.rmtree(path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    specs = {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_safetensors(path, specs, tensors.__getitem__)


def _write_text(path: Path, text: str) -> None:
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _checksum(path: Path) -> int:
    checksum = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            checksum = zlib.crc32(piece, checksum)
    return checksum


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], whole: Callable[[Tensor], Tensor | None]
) -> dict[str, Tensor]:
    """The state of an optimizer by names of parameters, whatever processes hold it.

    Args:
        names: id of a parameter -> its name.
        whole: gives a tensor of which this process may hold a part, or None where another process writes it.
    """
    found = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            for key, value in optimizer.state.get(parameter, {}).items():
                if (tensor := whole(value)) is not None:
                    found[f"{names[id(parameter)]}:{key}"] = tensor
    return found


def optimizer_state(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Name of a parameter -> its state, from what `optimizer_tensors` gave."""
    states: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition(":")
        states.setdefault(parameter, {})[key] = tensor
    return states
