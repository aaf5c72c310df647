"""Language-Aligned Positional Embedding: one set of anchors for visual features, coordinates in text, and the loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import (
    coordinate_cross_entropy,
    lape_add,
    lape_add_packed,
    lape_scatter,
    neighboring_token_propagation,
)
from ..ops.checks import can_read
from .foldable import Kept
from .published_names import rename

AXES = ("temporal", "height", "width")
PUBLISHED_TABLES = {
    f"{'' if axis == 'temporal' else 'spatial_'}{axis}_{side}_embeddings.weight": f"{axis}_{side}"
    for axis in AXES
    for side in ("input", "output")
}
# Lists of positions in the annotations of LLaVA-ST: one per template token.
VARIABLES = {
    f"{axis}_{side}": f"{'' if axis == 'temporal' else 'spatial_'}{axis}_{side}_locations"
    for axis in AXES
    for side in ("input", "output")
}


@dataclass(frozen=True)
class CoordinateTokens:
    """The ids of the tokens that LAPE gives a meaning.

    Args:
        vocab_size: V, the rows of the embedding and the head without coordinates. Anchor k of the temporal, height and
            width axis has the id `V + k`, `V + n + k` and `V + n + m + k`.
        temporal_input: the id of the template token `<TEMP-INPUT>`, which stands for a time in what the model reads.
        temporal_output: of `<TEMP-OUTPUT>`, for a time in what it says.
        height_input: of `<HEIGHT-INPUT>`.
        height_output: of `<HEIGHT-OUTPUT>`.
        width_input: of `<WIDTH-INPUT>`.
        width_output: of `<WIDTH-OUTPUT>`.
        visual: ids whose places visual tokens take, in order.

    Source: LLaVA-ST (arXiv:2501.08282), section 3.2; the order of ids is its published code's.
    """

    vocab_size: int
    temporal_input: int
    temporal_output: int
    height_input: int
    height_output: int
    width_input: int
    width_output: int
    visual: tuple[int, ...] = ()

    def axis_of(self, ids: Tensor, kinds: Sequence[str]) -> Tensor:
        """The axis of each token.

        Args:
            ids: of any shape.
            kinds: which template tokens have an axis: `"width_input"`, ...

        Returns:
            int8 of the shape of ids; 0 temporal, 1 height, 2 width, -1 where a token is of none of these kinds.
        """
        axis = torch.full_like(ids, -1, dtype=torch.int8)
        for kind in kinds:
            number = AXES.index(kind.partition("_")[0])
            axis = axis.masked_fill(ids == getattr(self, kind), number)
        return axis

    def positions(self, ids: Tensor, variables: Sequence[Mapping[str, Sequence[float]]]) -> Tensor:
        """The positions of template tokens, from LLaVA-ST's lists.

        Args:
            ids: `[B, L]`.
            variables: one dict per sample, of lists `temporal_input_locations`, `spatial_height_output_locations` and
                so on; the i-th template token of a kind in a sample takes entry i. A list that is not needed may be
                missing, and may have more entries than needed. Entries are fractions of an axis.

        Returns:
            float64 `[B, L]`, NaN at all other tokens.

        Raises:
            ValueError: a list is too short; the message names the sample.
        """
        if len(variables) != len(ids):
            raise ValueError(f"positions: expected one dict for each of the {len(ids)} samples, got {len(variables)}")
        rows = ids.cpu()
        positions = torch.full(rows.shape, math.nan, dtype=torch.float64)
        for sample, lists in enumerate(variables):
            for kind, name in VARIABLES.items():
                at = (rows[sample] == getattr(self, kind)).nonzero().squeeze(1)
                values = list(lists.get(name) or ())
                if len(values) < len(at):
                    raise ValueError(
                        f"positions: sample {sample} has {len(at)} {kind} tokens, the last at position {int(at[-1])}, "
                        f"but only {len(values)} entries in {name}"
                    )
                positions[sample, at] = torch.tensor(values[: len(at)], dtype=torch.float64)
        return positions.to(ids.device)

    def check(self, ids: Tensor, positions: Tensor) -> None:
        """That every template token has a position: for data loaders, before the transfer to a GPU.

        Args:
            ids: `[B, L]`, or `[L]`.
            positions: like ids, NaN where there is none.

        Raises:
            ValueError: one has none; the message names sample and position.
        """
        missing = (self.axis_of(ids, tuple(VARIABLES)) >= 0) & positions.isnan()
        if missing.any():
            *sample, at = missing.nonzero()[0].tolist()
            where = f"sample {sample[0]}, position {at}" if sample else f"position {at}"
            raise ValueError(f"positions must be a number for every coordinate token, got nan at {where}")


class LanguageAlignedPositionalEmbedding(nn.Module):
    """Tables of anchors for time, height and width, an input and an output one each, and all that is done with them.

    `inject` adds them to visual features, `embed` puts interpolated rows of the input tables where coordinates stand in
    text, `loss` has rows of the output tables as classes, and `decode` reads positions from logits. Gradients of a row
    reach its neighbours (`neighboring_token_propagation`).

    Args:
        num_bins: anchors per axis; one number, or three, of time, height and width.
        hidden_size: width C of the language model.
        tokens: the ids of coordinate tokens, which `embed` and `loss` need.
        compat: `"paper"`, or `"released"`: the arithmetic of the published code, which rounds after every addition in
            low precision, and leaves `<WIDTH-INPUT>` tokens as they are.
        text_aligned: `inject` puts patches where text coordinates put their centres, and not up to half an anchor away,
            as LLaVA-ST does.

    `load_state_dict` also accepts the names of LLaVA-ST's checkpoints (`model.temporal_input_embeddings.weight`, ...).

    Raises:
        ValueError: `num_bins` is not one positive number or three; another word for `compat`.

    Source: LLaVA-ST (arXiv:2501.08282), section 3.2.
    """

    def __init__(
        self,
        num_bins: int | tuple[int, int, int],
        hidden_size: int,
        *,
        tokens: CoordinateTokens | None = None,
        compat: str = "paper",
        text_aligned: bool = False,
    ) -> None:
        super().__init__()
        if compat not in ("paper", "released"):
            raise ValueError(f"compat must be 'paper' or 'released', got {compat!r}")
        self.num_bins = (num_bins,) * 3 if isinstance(num_bins, int) else tuple(num_bins)
        if len(self.num_bins) != 3 or min(self.num_bins) < 1:
            raise ValueError(f"num_bins must be one positive number or three, got {num_bins!r}")
        self.hidden_size = hidden_size
        self.tokens = tokens
        self.compat = compat
        self.text_aligned = text_aligned
        self._kept = {"input": Kept(), "output": Kept()}
        for axis, bins in zip(AXES, self.num_bins, strict=True):
            for side in ("input", "output"):
                self.register_parameter(f"{axis}_{side}", nn.Parameter(torch.empty(bins, hidden_size)))
        self.reset_parameters()
        self.register_load_state_dict_pre_hook(self._accept_published_names)

    def reset_parameters(self) -> None:
        """The initialisation of the published tables: those of an embedding and of a linear layer."""
        bound = 1 / math.sqrt(self.hidden_size)
        for axis in AXES:
            nn.init.normal_(getattr(self, f"{axis}_input"))
            nn.init.uniform_(getattr(self, f"{axis}_output"), -bound, bound)

    def tables(self, side: str) -> list[Tensor]:
        """The three tables of a side, as they are used: gradients reach neighbouring rows.

        Args:
            side: `"input"` or `"output"`.

        Returns:
            `[n, C]`, `[m, C]` and `[m', C]`, of time, height and width.
        """
        tables = [getattr(self, f"{axis}_{side}") for axis in AXES]

        def compute() -> list[Tensor]:
            return [neighboring_token_propagation(table, compat=self.compat) for table in tables]

        # "paper" gives views; the rounding of "released" takes matrix products, not to be repeated at every new token.
        return compute() if self.compat == "paper" else self._kept[side].get(tables, self.compat, compute)

    def output_tables(self) -> list[Tensor]:
        """The three output tables as they are, without gradients to neighbours: what logits are made with.

        Returns:
            `[n, C]`, `[m, C]` and `[m', C]`, of time, height and width.
        """
        return [getattr(self, f"{axis}_output") for axis in AXES]

    def visual_tables(self) -> list[Tensor]:
        """The three tables that `inject` adds: the means of the input and the output ones.

        Returns:
            `[n, C]`, `[m, C]` and `[m', C]`, in float32 or better; in the parameters' dtype for `"released"`.
        """
        pairs = zip(self.tables("input"), self.tables("output"), strict=True)
        released = self.compat == "released"
        return [(a + b) / 2 if released else (_wide(a) + _wide(b)) / 2 for a, b in pairs]

    def inject(self, features: Tensor, grid_thw: Tensor | None = None) -> Tensor:
        """Adds the mean of input and output tables, resized to the grid, to features.

        Args:
            features: `[B, T, H, W, C]`, or with `grid_thw` packed ones, `[tokens, C]`. An image is a video of one
                frame.
            grid_thw: int `[videos, 3]`, the size of each video in patches (see `lape_add_packed`).

        Returns:
            Like features. Errors are those of `lape_add` and `lape_add_packed`.
        """
        means = self.visual_tables()
        options = {"text_aligned": self.text_aligned, "round_every_addition": self.compat == "released"}
        if grid_thw is None:
            return lape_add(features, *means, **options)
        return lape_add_packed(features, *means, grid_thw, **options)

    def forward(self, features: Tensor, grid_thw: Tensor | None = None) -> Tensor:
        """As `inject`.

        Args:
            features: as in `inject`, of shape `[B, T, H, W, C]` or `[tokens, C]`.
            grid_thw: as in `inject`, int `[videos, 3]`.

        Returns:
            Like features.
        """
        return self.inject(features, grid_thw)

    def embed(
        self,
        input_ids: Tensor,
        embed_weight: Tensor,
        positions: Tensor | Sequence[Mapping[str, Sequence[float]]] | None = None,
        visual: Tensor | Sequence[Tensor] | None = None,
        visual_mask: Tensor | None = None,
        visual_index: Tensor | None = None,
    ) -> Tensor:
        """The input embeddings of a batch: words, coordinates and visual tokens.

        Args:
            input_ids: `[B, L]`. Ids from `tokens.vocab_size` on are single anchors.
            embed_weight: `[V, C]`.
            positions: `[B, L]`, NaN where there is none; or LLaVA-ST's lists, one dict per sample (see
                `CoordinateTokens.positions`).
            visual: the visual tokens of all samples in order, `[..., C]`, or several such tensors, one of each image
                and video, say.
            visual_mask: bool `[B, L]`, where they go, as many places as there are visual tokens. By default wherever an
                id is one of `tokens.visual`.
            visual_index: int `[B, L]`, which visual token each place takes, -1 elsewhere, in place of visual_mask:
                samples may share tokens.

        Returns:
            `[B, L, C]` in the dtype of embed_weight.

        Raises:
            ValueError: on the CPU, a coordinate token without a position, ids out of range, or another number of places
                than of visual tokens. On a GPU these rows are NaN (see `lape_scatter`).
        """
        tokens = self._tokens()
        released = self.compat == "released"
        axis = tokens.axis_of(input_ids, [k for k in VARIABLES if not (released and k == "width_input")])
        places = self._positions(positions, input_ids)
        if visual is None:
            visual = embed_weight.new_zeros(0, embed_weight.shape[1])
        else:
            several = [visual] if isinstance(visual, Tensor) else visual
            visual = torch.cat([each.reshape(-1, each.shape[-1]) for each in several])
        if visual_index is None:
            visual_index = self._places(input_ids, visual_mask, len(visual))
        tables = [table.to(embed_weight.device) for table in self.tables("input")]
        return lape_scatter(embed_weight, *tables, input_ids, axis, places, visual_index, visual)

    def loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        positions: Tensor | Sequence[Mapping[str, Sequence[float]]] | None,
        head_weight: Tensor,
        reduction: str = "mean",
        normalizer: float | Tensor | None = None,
        ignore_index: int = -100,
        sample: Tensor | None = None,
    ) -> Tensor:
        """The loss of predicting each next token: words, single anchors, or coordinates between two anchors.

        Args:
            hidden: `[B, L, C]`, the language model's last hidden states.
            labels: `[B, L]`, not shifted: position i predicts label i + 1. The ids of output template tokens
                (`tokens.temporal_output`, ...) stand for positions.
            positions: `[B, L]`, of the labels, NaN where there is none; or LLaVA-ST's lists, one dict per sample.
            head_weight: `[V, C]`.
            reduction: see `coordinate_cross_entropy`; the published one is `"per_sample_sum"`.
            normalizer: likewise.
            ignore_index: likewise.
            sample: likewise, `[B, L]`.

        Returns:
            A float32 scalar (float64 for float64); `[B, L]` for `"none"`, where the last of each sample is 0.

        Raises:
            ValueError: as `coordinate_cross_entropy`; also if the module was made without `tokens`.
            TypeError: positions in 16 bits.
        """
        places = self._positions(positions, labels)
        axis = self._tokens().axis_of(labels, [f"{axis}_output" for axis in AXES])
        shifted = (
            torch.cat([x[:, 1:], torch.full_like(x[:, :1], fill)], 1)
            for x, fill in ((labels, ignore_index), (axis, -1), (places, math.nan))
        )
        return coordinate_cross_entropy(
            hidden,
            head_weight,
            *self.tables("output"),
            *shifted,
            reduction=reduction,
            normalizer=normalizer,
            ignore_index=ignore_index,
            sample=None if sample is None else sample.flatten(),
        )

    def decode(self, logits: Tensor, axis: int, decoder: str = "expectation") -> Tensor:
        """Positions, fractions of an axis, from logits.

        Args:
            logits: `[..., V + n + m + m']`, those of all classes, or `[..., n]`, those of the axis alone.
            axis: 0 temporal, 1 height, 2 width.
            decoder: `"anchor"`: the best anchor, k / (n - 1), as published; `"expectation"`: the mean of the best one
                and its two neighbours, weighted by their probabilities, which falls between anchors.

        Returns:
            float32 `[...]` (float64 for float64 logits).

        Raises:
            ValueError: another axis or decoder, or logits of another number of classes.
        """
        if axis not in (0, 1, 2):
            raise ValueError(f"decode: axis must be 0, 1 or 2, got {axis!r}")
        if decoder not in ("anchor", "expectation"):
            raise ValueError(f"decode: decoder must be 'anchor' or 'expectation', got {decoder!r}")
        bins = self.num_bins[axis]
        if logits.shape[-1] != bins:
            if logits.shape[-1] <= sum(self.num_bins):
                raise ValueError(
                    f"decode: logits must be of all classes, or of the {bins} anchors of axis {axis}, got "
                    f"{logits.shape[-1]}"
                )
            after = sum(self.num_bins[axis:])
            logits = logits[..., logits.shape[-1] - after :][..., :bins]
        logits = _wide(logits)
        best = logits.argmax(-1, keepdim=True)
        scale = max(bins - 1, 1)
        if decoder == "anchor":
            return best.squeeze(-1).to(logits.dtype) / scale
        around = best + torch.arange(-1, 2, device=logits.device)
        exists = (around >= 0) & (around < bins)
        around = around.clamp(0, bins - 1)
        weights = logits.gather(-1, around).masked_fill(~exists, -math.inf).softmax(-1)
        return (weights * around).sum(-1) / scale

    def extend_head(self, head_weight: Tensor) -> Tensor:
        """A head that has the anchors as plain rows.

        Args:
            head_weight: `[V, C]`.

        Returns:
            `[V + n + m + m', C]`, in the dtype of head_weight.
        """
        return torch.cat([head_weight, *(table.to(head_weight) for table in self.output_tables())])

    def merge(self, embed_weight: Tensor, head_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Embedding and head with the anchors as plain rows: what a server of ordinary checkpoints takes, so that
        generation concatenates nothing at every step.

        Args:
            embed_weight: `[V, C]`.
            head_weight: `[V, C]`.

        Returns:
            Both as `[V + n + m + m', C]`, each in its dtype.
        """
        embed = torch.cat([embed_weight, *(table.to(embed_weight) for table in self.tables("input"))])
        return embed, self.extend_head(head_weight)

    def extra_repr(self) -> str:
        return f"num_bins={self.num_bins}, hidden_size={self.hidden_size}, compat={self.compat!r}"

    def _tokens(self) -> CoordinateTokens:
        if self.tokens is None:
            raise ValueError("this module was made without tokens=CoordinateTokens(...), which embed and loss need")
        return self.tokens

    def _places(self, input_ids: Tensor, mask: Tensor | None, visuals: int) -> Tensor:
        """Which visual token each place takes: the i-th token i, in the order of samples; -1 elsewhere."""
        if mask is None:
            mask = torch.zeros_like(input_ids, dtype=torch.bool)
            for each in self._tokens().visual:  # few; a tensor of them would be waited for on its way to a GPU
                mask = mask | (input_ids == each)
        if can_read(mask) and (count := int(mask.sum())) != visuals:
            raise ValueError(f"embed: visual_mask has {count} places, but there are {visuals} visual tokens")
        return (mask.flatten().cumsum(0).view_as(mask) - 1).masked_fill(~mask, -1)

    def _positions(self, positions: Tensor | Sequence[Mapping[str, Sequence[float]]] | None, ids: Tensor) -> Tensor:
        if positions is None:
            return torch.full_like(ids, math.nan, dtype=torch.float64)
        if isinstance(positions, Tensor):
            if positions.dtype in (torch.bfloat16, torch.float16):  # mixed precision casts what it takes for features
                raise TypeError(f"positions must be float64 or float32, got {positions.dtype}, which would round them")
            return positions.double()
        return self._tokens().positions(ids, positions)

    @staticmethod
    def _accept_published_names(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        rename(state_dict, prefix, PUBLISHED_TABLES)
        rename(state_dict, prefix, {f"model.{published}": ours for published, ours in PUBLISHED_TABLES.items()})


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
