"""What a later stage of training left: low-rank adapters, whole tensors, and rows for new tokens."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .names import EMBEDDING
from .reading import CheckpointError, Tensors, TensorSpec, WeightFiles, read_json

_PREFIX = "base_model.model."
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?\.weight")
# Settings of peft that change the arithmetic, and the values that they must have here.
_EXPECTED = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "use_dora": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
}


class GrownRows:
    """`base` with new rows at the end of some matrices, each the mean of all rows before: what the published code gives
    new tokens. The mean is taken in float64 and rounded once."""

    def __init__(self, base: Tensors, names: Sequence[str], count: int) -> None:
        self._base, self._names = base, names
        self._means: dict[str, Tensor] = {}
        self.specs = dict(base.specs)
        for name in names:
            rows, *rest = base.specs[name].shape
            self.specs[name] = TensorSpec((rows + count, *rest), base.specs[name].dtype)

    def read(self, name: str) -> Tensor:
        if name not in self._names:
            return self._base.read(name)
        old = self._base.read(name)
        return torch.cat([old, self._mean(name).expand(self.specs[name].shape[0] - len(old), -1)])

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        old = self._base.specs[name].shape[0]
        if name not in self._names:
            return self._base.rows(name, indices)
        return torch.cat([self._base.rows(name, [i]) if i < old else self._mean(name) for i in indices])

    def _mean(self, name: str) -> Tensor:
        if name not in self._means:
            matrix = self._base.read(name)
            total = sum(some.sum(0, keepdim=True, dtype=torch.float64) for some in matrix.split(4096))
            self._means[name] = (total / len(matrix)).to(matrix.dtype)
        return self._means[name]


class Adapted:
    """`base` with what is in the folder of a training stage: whole tensors take the place of the base's, then low-rank
    adapters are added, `W + B A * alpha / r`, computed in float32 and rounded to the dtype of `W`.

    Args:
        base: under the published names.
        folder: with `adapter_config.json`, and `adapter_model` and `non_lora_trainables` as `.safetensors` or `.bin`.
        allow_pickle: see `WeightFiles`.

    Raises:
        CheckpointError: a file is missing; peft settings are not supported; adapters do not fit.
    """

    def __init__(self, base: Tensors, folder: Path, allow_pickle: bool = False) -> None:
        self._base = base
        self._scaling, rank = _read_settings(folder)
        self._adapters = WeightFiles([_one_of(folder, "adapter_model")], allow_pickle)
        self._others = WeightFiles([_one_of(folder, "non_lora_trainables")], allow_pickle)
        self._replaced = {_without_prefix(name, folder): name for name in self._others.specs}
        self._pairs = _pair(self._adapters, folder)
        dtype = base.specs[EMBEDDING].dtype
        self.specs = dict(base.specs)
        for ours, name in self._replaced.items():
            shape = self._others.specs[name].shape
            if ours in base.specs and base.specs[ours].shape != shape:
                raise CheckpointError(
                    f"{folder}: {name}: expected shape {list(base.specs[ours].shape)}, got {list(shape)}"
                )
            self.specs[ours] = TensorSpec(shape, base.specs[ours].dtype if ours in base.specs else dtype)
        for target, pair in self._pairs.items():
            if target not in self.specs or len(self.specs[target].shape) != 2:
                raise CheckpointError(f"{folder}: {pair['A']}: adapts {target}, of which the base has no matrix")
            rows, columns = self.specs[target].shape
            for side, shape in (("A", (rank, columns)), ("B", (rows, rank))):
                if (got := self._adapters.specs[pair[side]].shape) != shape:
                    raise CheckpointError(f"{folder}: {pair[side]}: expected shape {list(shape)}, got {list(got)}")

    @property
    def summary(self) -> str:
        return f"{len(self._replaced)} tensors replaced, {len(self._pairs)} adapted with {self._scaling:g} B A"

    def read(self, name: str) -> Tensor:
        if name in self._replaced:
            weight = self._others.read(self._replaced[name]).to(self.specs[name].dtype)
        else:
            weight = self._base.read(name)
        if name not in self._pairs:
            return weight
        a, b = (self._adapters.read(self._pairs[name][side]).float() for side in "AB")
        return torch.addmm(weight.float(), b, a, alpha=self._scaling).to(weight.dtype)

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        if name in self._pairs:
            return self.read(name)[list(indices)]
        if name in self._replaced:
            return self._others.rows(self._replaced[name], indices).to(self.specs[name].dtype)
        return self._base.rows(name, indices)


def _read_settings(folder: Path) -> tuple[float, int]:
    """The factor of `B A`, and the rank."""
    path = folder / "adapter_config.json"
    settings = read_json(path)
    for name, allowed in _EXPECTED.items():
        if name in settings and settings[name] not in allowed:
            raise CheckpointError(f"{path}: {name} is {settings[name]!r}; only {allowed[0]!r} is supported")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise CheckpointError(f"{path}: expected numbers r >= 1 and lora_alpha, got {rank!r} and {alpha!r}")
    return alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank), rank


def _one_of(folder: Path, name: str) -> Path:
    paths = [folder / f"{name}.{ending}" for ending in ("safetensors", "bin")]
    for path in paths:
        if path.is_file():
            return path
    raise CheckpointError(f"{folder}: expected {paths[0].name} or {paths[1].name}")


def _without_prefix(name: str, folder: Path) -> str:
    if not name.startswith(_PREFIX):
        raise CheckpointError(f"{folder}: expected names that begin with {_PREFIX!r}, got {name!r}")
    return name.removeprefix(_PREFIX)


def _pair(adapters: Tensors, folder: Path) -> dict[str, dict[str, str]]:
    """The adapted weight -> the names of its A and B."""
    pairs: dict[str, dict[str, str]] = {}
    for name in adapters.specs:
        match = _LORA.fullmatch(_without_prefix(name, folder))
        if match is None:
            raise CheckpointError(f"{folder}: {name}: is not the A or B of a linear layer's adapter")
        pairs.setdefault(f"{match['module']}.weight", {})[match["side"]] = name
    for target, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{folder}: {target}: has a lora_{min(pair)} without its counterpart")
    return pairs
