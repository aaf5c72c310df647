"""Where the first stage of training begins: LLaVA-OneVision, which has neither a packer nor LLaVA-ST's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llava_st_ops.nn import SpatialTemporalPacker

from ..configuration_llava_st import VISUAL_TOKENS
from .lora import GrownRows
from .names import EMBEDDING, HEAD, to_published
from .reading import CheckpointError, Tensors, TensorSpec
from .settings import PACKER_HEADS

_PACKER_DIM = 1024
_PACKERS, _OUR_PACKERS = "model.vision_resampler.", "model.visual_tokenizer.packer."


def begin(base: Tensors, tokens: Sequence[str], seed: int) -> Tensors:
    """`base` with a packer as initialised, and with rows for the visual tokens, each the mean of all rows before.

    Args:
        base: LLaVA-OneVision, under the published names.
        tokens: of its tokenizer. Rows of the embedding that belong to none are dropped, as by the published code.
        seed: of the packer.

    Raises:
        CheckpointError: it has a packer or a visual token, or no row for a token.
    """
    if found := next((name for name in base.specs if name.startswith(_PACKERS)), None):
        raise CheckpointError(f"--new-packer: the checkpoint has a packer already, {found}")
    if found := next((token for token in VISUAL_TOKENS.values() if token in tokens), None):
        raise CheckpointError(f"--new-packer: the tokenizer has {found} already")
    for name in (EMBEDDING, HEAD):
        rows = base.specs[name].shape[0] if name in base.specs else 0
        if rows < len(tokens):
            raise CheckpointError(f"{name}: expected rows for the tokenizer's {len(tokens)} tokens, got {rows}")
    grown = GrownRows(_FirstRows(base, (EMBEDDING, HEAD), len(tokens)), (EMBEDDING, HEAD), len(VISUAL_TOKENS))
    return _WithPacker(grown, seed)


class _FirstRows:
    """`base` with the first `count` rows of some matrices alone."""

    def __init__(self, base: Tensors, names: Sequence[str], count: int) -> None:
        self._base, self._names, self._count = base, names, count
        shortened = {name: TensorSpec((count, *base.specs[name].shape[1:]), base.specs[name].dtype) for name in names}
        self.specs = {**base.specs, **shortened}

    def read(self, name: str) -> Tensor:
        tensor = self._base.read(name)
        return tensor[: self._count].clone() if name in self._names else tensor

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        return self._base.rows(name, indices)


class _WithPacker:
    """`base` with the tensors of a packer that is not trained."""

    def __init__(self, base: Tensors, seed: int) -> None:
        self._base = base
        width, dtype = base.specs[EMBEDDING].shape[1], base.specs[EMBEDDING].dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            packer = SpatialTemporalPacker(width, _PACKER_DIM, PACKER_HEADS)
        self._new = {to_published(_OUR_PACKERS + name): x.to(dtype) for name, x in packer.state_dict().items()}
        self.specs = base.specs | {name: TensorSpec(tuple(x.shape), dtype) for name, x in self._new.items()}

    def read(self, name: str) -> Tensor:
        return self._new[name] if name in self._new else self._base.read(name)

    def rows(self, name: str, indices: Sequence[int]) -> Tensor:
        return self._base.rows(name, indices)
