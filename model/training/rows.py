"""A few rows of a frozen embedding that train: nothing of the matrix's size is kept for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..configuration_llava_st import LlavaStConfig
from ..modeling_llava_st import LlavaStForConditionalGeneration, LlavaStModel

# Under "released" these keep their own row before the language model: the fast stream's places, and `<WIDTH-INPUT>`.
_RELEASED = ("vid_start", "vid_patch", "vid_end", "width_input")


def needed_rows(config: LlavaStConfig) -> list[int]:
    """Ids of LLaVA-ST's own tokens whose row of the embedding the language model reads.

    `"paper"`: none, visual tokens and coordinates take the places of all. `"released"`: those that the published code
    leaves as they are. Words have rows, too, but these are the language model's.
    """
    if config.compat == "paper":
        return []
    return [config.token_ids[name] for name in (_RELEASED if config.lape else _RELEASED[:3])]


class TrainableRows(nn.Module):
    """Rows that stand in for those of a frozen embedding matrix; `LlavaStModel.embed` puts them in their places.

    Args:
        model: whose embedding it is.
        ids: of the rows.
    """

    def __init__(self, model: LlavaStModel, ids: list[int]) -> None:
        super().__init__()
        self.ids = ids
        weight = model.get_input_embeddings().weight
        self.weight = nn.Parameter(weight.detach()[ids].float().clone())

    @classmethod
    def attach(cls, model: LlavaStForConditionalGeneration, ids: list[int]) -> TrainableRows:
        """Freezes the embedding, and makes rows of it train as `model.model.trainable_rows`.

        Raises:
            ValueError: the head is the embedding, so that its rows would have to change, too.
        """
        if model.lm_head.weight is model.get_input_embeddings().weight:
            raise ValueError("embedding_rows: 'needed' wants a head that is not tied to the embedding")
        model.get_input_embeddings().weight.requires_grad_(False)
        rows = cls(model.model, ids)
        model.model.trainable_rows = rows
        return rows

    def forward(self, embedded: Tensor, input_ids: Tensor, visual_index: Tensor | None) -> Tensor:
        """`[B, L, C]` with these rows where their ids stand, and no visual token does."""
        free = torch.ones_like(input_ids, dtype=torch.bool) if visual_index is None else visual_index < 0
        rows = self.weight.to(embedded)
        for row, token_id in zip(rows, self.ids, strict=True):
            embedded = torch.where(((input_ids == token_id) & free).unsqueeze(-1), row, embedded)
        return embedded

    def merged(self, weight: Tensor, rows: Tensor) -> Tensor:
        """The embedding matrix with these rows, both whole."""
        result = weight.clone()
        result[self.ids] = rows.to(result)
        return result
