"""Safetensors files and whole folders, written as a stream and complete or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, uint8

from .reading import SAFETENSORS_DTYPES, CheckpointError, TensorSpec

MAX_SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@contextmanager
def new_folder(out: Path, nbytes: int = 0) -> Iterator[Path]:
    """A folder to write into, beside `out`, which takes that name once all is written; nothing is left otherwise.

    Args:
        out: must not exist yet, or be empty.
        nbytes: what is going to be written.

    Raises:
        FileExistsError: there is something at `out`.
        OSError: the disk has no room for `nbytes`.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out}: is there already, and not an empty folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < nbytes:
        raise OSError(f"{out}: needs {nbytes:,} bytes on the disk, of which {free:,} are free")
    partial = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    try:
        yield partial
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp's folders are their owner's alone
        partial.replace(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_shards(
    folder: Path,
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Tensors to `model.safetensors`, or to shards of at most `max_shard_bytes` (or one tensor) and their index.

    One tensor is in memory at a time, in the order of `specs`.
    """
    shards: list[dict[str, TensorSpec]] = [{}]
    size = 0
    for name, spec in specs.items():
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = spec
        size += spec.nbytes
    if len(shards) == 1:
        paths = [folder / "model.safetensors"]
    else:
        paths = [folder / f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        where = {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(spec.nbytes for spec in specs.values())}, "weight_map": where}
        write_json(folder / "model.safetensors.index.json", index)
    for path, shard in zip(paths, shards, strict=True):
        write_safetensors(path, shard, read)
    return paths


def write_safetensors(path: Path, specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]) -> None:
    """One file. The library's own writer wants all of its tensors in memory."""
    header: dict = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, spec in specs.items():
        end = offset + spec.nbytes
        header[name] = {"dtype": _DTYPE_NAMES[spec.dtype], "shape": list(spec.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned to 8 bytes
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, spec in specs.items():
            tensor = read(name)
            if TensorSpec(tuple(tensor.shape), tensor.dtype) != spec:
                raise CheckpointError(f"{name}: expected {spec}, got {list(tensor.shape)} in {tensor.dtype}")
            file.write(tensor.contiguous().reshape(-1).view(uint8).numpy().data)
            del tensor
        file.flush()
        os.fsync(file.fileno())


def write_json(path: Path, value: Mapping) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
