"""A few rows of a frozen embedding that train: nothing of the matrix's size is kept for them."""

from __future__ import annotations

from typing import Any

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
    """Rows that stand in for those of a frozen embedding matrix. Hooks put them into what the language model reads.

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
        model.model.register_forward_pre_hook(rows._embed, with_kwargs=True)
        return rows

    def place(self, embedded: Tensor, input_ids: Tensor, visual_index: Tensor | None) -> Tensor:
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

    def _embed(self, model: LlavaStModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        input_ids = kwargs.get("input_ids")
        if input_ids is None:
            return args, kwargs
        media = {name: kwargs.pop(name, None) for name in ("pixel_values", "pixel_values_videos", "video_frames")}
        tokens, index = kwargs.pop("visual_tokens", None), kwargs.pop("visual_index", None)
        if tokens is None:
            tokens = model.encode(**media)
        embedded = model.embed(input_ids, kwargs.pop("positions", None), tokens, index)
        if tokens is not None and index is None:
            index = model.visual_index(input_ids)
        kwargs["inputs_embeds"] = self.place(embedded, input_ids, index)
        kwargs["input_ids"] = None
        return args, kwargs
