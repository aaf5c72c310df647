"""From the features of a vision tower to the visual tokens of a language model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .foldable import Foldable, is_plain, why_no_mlp
from .folded_path import FoldedPath, run_path
from .folding import Before, FoldedPacker, Tables, fold
from .lape import LanguageAlignedPositionalEmbedding
from .packers import PointToRegionPacker, SpatialTemporalPacker

CHUNK_TOKENS = 1 << 14


class VisualTokenizer(Foldable):
    """LLaVA-ST's path from vision features to tokens: projector, positions (LAPE) and Spatial-Temporal Packer.

    Args:
        projector: `nn.Sequential(nn.Linear, nn.GELU, nn.Linear)`, from the width of the vision tower to that of the
            language model.
        lape: what is added to projected features; None, as in the first training stage: nothing.
        packer: what shrinks videos. Images are not packed.
        execution: `"folded"`, or `"direct"`: the published order of operations, the definition of right. `"folded"` is
            the same function with linear maps moved to where there are fewest rows (docs/folding.md). May be set on a
            living module; `"direct"` leaves it to the packer how it executes. A projector or packer with layers that
            are not plain ones (adapters, quantised weights, hooks) runs direct, with a notice.
        recompute: folded training does not keep the projector's hidden activation, the largest tensor of all, but
            calculates it again in the backward pass.
        chunk_tokens: folded execution takes about so many features at a time (whole regions of frames), so that memory
            for what lies between does not grow with the video. 0: all at once.

    The parameters are those of the three modules, whatever the execution, and so are the names in a state dict. Where
    no gradient is wanted the folded matrices are computed once, and anew when a parameter changes: optimizer steps,
    `load_state_dict`, `.to` and edits under `no_grad` are seen; after writes through `.data` call `refresh()`. Where
    gradients are wanted the matrices are part of the graph and every parameter gets its gradient. Compiled code
    computes them in every call: serve and export what `freeze()` gives.

    Raises:
        ValueError: another word for `execution`; a negative `chunk_tokens`.

    Source: LLaVA-ST (arXiv:2501.08282), LAPE and Spatial-Temporal Packer; the folding is derived in docs/folding.md.
    """

    def __init__(
        self,
        projector: nn.Module,
        lape: LanguageAlignedPositionalEmbedding | None,
        packer: SpatialTemporalPacker,
        execution: str = "folded",
        *,
        recompute: bool = False,
        chunk_tokens: int = CHUNK_TOKENS,
    ) -> None:
        super().__init__(execution)
        if chunk_tokens < 0:
            raise ValueError(f"chunk_tokens must not be negative, got {chunk_tokens}")
        self.projector = projector
        self.lape = lape
        self.packer = packer
        self.recompute = recompute
        self.chunk_tokens = chunk_tokens

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of videos.

        Args:
            features: `[B, T, H, W, Cv]`, of the vision tower.

        Returns:
            `(slow, fast)`, both `[B, T', H', W', C]`, on the grids of `SpatialTemporalPacker`.

        Raises:
            ValueError: features of another rank.
        """
        _check(features)
        if 0 not in features.shape[1:4] and self._runs_folded():
            return run_path(self._path(), features, self.chunk_tokens, self.recompute)
        return self.packer(self.images(features))

    def images(self, features: Tensor) -> Tensor:
        """The tokens of images, which are not packed.

        Args:
            features: `[B, 1, H, W, Cv]`, of the vision tower.

        Returns:
            `[B, 1, H, W, C]`.

        Raises:
            ValueError: features of another rank.
        """
        _check(features)
        projected = self.projector(features)
        return projected if self.lape is None else self.lape.inject(projected)

    def why_not_folded(self) -> str | None:
        """Why the folded execution cannot be had.

        Returns:
            A reason in words, which names the layer; None where it can be had.
        """
        reason = why_no_mlp(self.projector)
        if reason is not None:
            return f"projector: {reason}"
        if self.lape is not None and type(self.lape) is not LanguageAlignedPositionalEmbedding:
            return f"lape is not a LanguageAlignedPositionalEmbedding, but {type(self.lape).__name__}"
        if not is_plain(self.packer, SpatialTemporalPacker):
            return f"packer is not a plain SpatialTemporalPacker, but {type(self.packer).__name__}"
        for name in ("spatial", "slow", "fast"):
            packer = getattr(self.packer, name)
            if type(packer) is PointToRegionPacker and (reason := packer.why_not_folded()) is not None:
                return f"packer.{name}.{reason}"
            if not is_plain(packer, PointToRegionPacker):
                return f"packer.{name} is not a plain PointToRegionPacker, but {type(packer).__name__}"
        return None

    def refresh(self) -> None:
        """Of the packer, too."""
        super().refresh()
        self.packer.refresh()

    def freeze(self) -> FrozenVisualTokenizer:
        """The folded execution as a module of its own, for serving, compiling and export.

        Returns:
            A module whose buffers are the folded matrices as they are now.

        Raises:
            ValueError: the folded execution cannot be had.
        """
        reason = self.why_not_folded()
        if reason is not None:
            raise ValueError(f"cannot freeze: {reason}")
        with torch.no_grad():
            return FrozenVisualTokenizer(self._path(), self.chunk_tokens)

    def _path(self) -> FoldedPath:
        first, _, second = self.projector
        tables, spatial = self._tables_and_spatial()
        return FoldedPath(
            first=(first.weight, first.bias),
            second=(second.weight, second.bias),
            tables=tables,
            text_aligned=self.lape is not None and self.lape.text_aligned,
            spatial=spatial,
            slow=self.packer.slow.folded(),
            fast=self.packer.fast.folded(),
        )

    def _tables_and_spatial(self) -> tuple[Tables | None, FoldedPacker]:
        """What LAPE adds, and the first packer's matrices, with what is linear before it."""
        packer, second, lape = self.packer.spatial, self.projector[2], self.lape
        modules = (packer, second) if lape is None else (packer, second, lape)
        parameters = [parameter for module in modules for parameter in module.parameters()]

        def compute() -> tuple[Tables | None, FoldedPacker]:
            tables = None if lape is None else tuple(lape.visual_tables())
            return tables, fold(packer, Before(second.weight, second.bias, tables))

        settings = (packer.settings(), None if lape is None else lape.compat)
        return self._kept.get(parameters, settings, compute)


class FrozenVisualTokenizer(nn.Module):
    """What `VisualTokenizer.freeze` gives, for inference.

    Args:
        path: the folded matrices, which become buffers.
        chunk_tokens: as in `VisualTokenizer`.

    Source: LLaVA-ST (arXiv:2501.08282), folded as docs/folding.md derives it.
    """

    def __init__(self, path: FoldedPath, chunk_tokens: int) -> None:
        super().__init__()
        self.chunk_tokens = chunk_tokens

        def keep(name: str, tensor: Tensor) -> str:
            self.register_buffer(name, tensor.detach().clone())
            return name

        self._path = _map(path, Tensor, keep)  # the path with names in place of tensors

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of videos.

        Args:
            features: `[B, T, H, W, Cv]`, of the vision tower.

        Returns:
            `(slow, fast)`, both `[B, T', H', W', C]`, as `VisualTokenizer` gives them.

        Raises:
            ValueError: features of another rank.
        """
        _check(features)
        path = _map(self._path, str, lambda _, name: getattr(self, name))
        return run_path(path, features, self.chunk_tokens, recompute=False)


def _map(value: Any, kind: type, change: Callable[[str, Any], Any], name: str = "") -> Any:
    """`value` with every leaf of a kind changed; leaves are named after where they are."""
    if isinstance(value, kind):
        return change(name, value)
    prefix = f"{name}_" if name else ""
    if dataclasses.is_dataclass(value):
        parts = {f.name: _map(getattr(value, f.name), kind, change, prefix + f.name) for f in dataclasses.fields(value)}
        return type(value)(**parts)
    if isinstance(value, tuple):
        return tuple(_map(part, kind, change, f"{prefix}{i}") for i, part in enumerate(value))
    return value


def _check(features: Tensor) -> None:
    if features.dim() != 5:
        raise ValueError(f"features must have 5 dimensions [B, T, H, W, Cv], got shape {list(features.shape)}")
