"""Tensors of a checkpoint, one at a time."""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # in the order in which they are looked for


class CheckpointError(ValueError):
    """A checkpoint is not what it should be; the message says where, and what was expected."""


@dataclass(frozen=True)
class TensorSpec:
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Tensors(Protocol):
    """Named tensors that are read when they are asked for.

    Attributes:
        specs: name -> shape and dtype, in the order in which reading is quickest.
    """

    specs: dict[str, TensorSpec]

    def read(self, name: str) -> Tensor: ...

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        """Some rows of a tensor, `[len(indices), ...]`, without the others where that can be had."""
        ...


class WeightFiles:
    """The tensors of some files, none of which is read as a whole.

    Args:
        paths: safetensors files and pickles of tensors (`torch.save`).
        allow_pickle: whether pickles are read at all; if so, by torch's unpickler of weights alone.

    Raises:
        CheckpointError: a file is missing, damaged, a pickle that is not allowed, holds something that is no tensor, or
            two files have tensors of the same name.
    """

    def __init__(self, paths: Sequence[Path], allow_pickle: bool = False) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self._paths: dict[str, Path] = {}
        self._unpickled: tuple[Path, dict[str, Tensor]] | None = None
        for path in paths:
            if not path.is_file():
                raise CheckpointError(f"{path}: no such file")
            if path.suffix != ".safetensors" and not allow_pickle:
                raise CheckpointError(
                    f"{path} is a pickle, which may be made to run any program when it is loaded; --allow-pickle reads "
                    f"it all the same, with torch.load(weights_only=True)"
                )
            specs = _safetensors_specs(path) if path.suffix == ".safetensors" else self._pickle_specs(path)
            if twice := self.specs.keys() & specs.keys():
                raise CheckpointError(f"{path}: {min(twice)} is also in {self._paths[min(twice)]}")
            self.specs.update(specs)
            self._paths.update(dict.fromkeys(specs, path))

    def read(self, name: str) -> Tensor:
        path = self._paths[name]
        if path.suffix != ".safetensors":
            return self._unpickle(path)[name]
        # Opened for one tensor: a file that stays mapped keeps in memory all that was read of it.
        with safe_open(path, "pt") as file:
            return file.get_tensor(name)

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        path = self._paths[name]
        if path.suffix != ".safetensors":
            return self._unpickle(path)[name][list(indices)]
        with safe_open(path, "pt") as file:
            rows = file.get_slice(name)
            return torch.cat([rows[i : i + 1] for i in indices])

    def _pickle_specs(self, path: Path) -> dict[str, TensorSpec]:
        return {name: TensorSpec(tuple(x.shape), x.dtype) for name, x in self._unpickle(path).items()}

    def _unpickle(self, path: Path) -> dict[str, Tensor]:
        if self._unpickled is None or self._unpickled[0] != path:
            self._unpickled = None  # before the next one is opened
            self._unpickled = (path, _load_pickle(path))
        return self._unpickled[1]


def open_folder(folder: Path, allow_pickle: bool = False) -> WeightFiles:
    """The weights of a folder in the layout of transformers: one file, or shards and their index.

    Raises:
        CheckpointError: there are none, the index is damaged, or does not agree with the shards.
    """
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _open_shards(folder, index, allow_pickle)
        if (folder / name).is_file():
            return WeightFiles([folder / name], allow_pickle)
    wanted = " or ".join(f"{name}[.index.json]" for name in _WEIGHTS)
    raise CheckpointError(f"{folder}: has no weights; expected {wanted}")


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise CheckpointError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _open_shards(folder: Path, index: Path, allow_pickle: bool) -> WeightFiles:
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(shard, str) for shard in where.values()):
        raise CheckpointError(f"{index}: expected a weight_map of names and files")
    shards = sorted(set(where.values()))
    if outside := [shard for shard in shards if Path(shard).name != shard]:
        raise CheckpointError(f"{index}: expected names of files beside it, got {outside[0]!r}")
    files = WeightFiles([folder / shard for shard in shards], allow_pickle)
    if astray := sorted(where.keys() ^ files.specs.keys()):
        raise CheckpointError(f"{index}: does not agree with the shards about {', '.join(astray)}")
    return files


def _safetensors_specs(path: Path) -> dict[str, TensorSpec]:
    specs = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.offset_keys():
                tensor = file.get_slice(name)
                if tensor.get_dtype() not in SAFETENSORS_DTYPES:
                    raise CheckpointError(f"{path}: {name} has the dtype {tensor.get_dtype()}, which is not supported")
                specs[name] = TensorSpec(tuple(tensor.get_shape()), SAFETENSORS_DTYPES[tensor.get_dtype()])
    except SafetensorError as error:
        raise CheckpointError(f"{path}: is damaged, or not a safetensors file: {error}") from error
    return specs


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        # Mapped: what is read of it is in memory, and no more.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: holds more than tensors, and is not read: {error}") from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(f"{path}: is damaged, or not what torch.save writes since 1.6: {error}") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{path}: expected a dict of tensors, got {type(loaded).__name__}")
    for name, tensor in loaded.items():
        if not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: expected tensors alone, but {name!r} is of type {type(tensor).__name__}")
    return loaded
