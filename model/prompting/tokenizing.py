"""From a prompt, which is text, to ids, positions and labels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..configuration_llava_st import TEMPLATE_TOKENS, VISUAL_TOKENS
from .chat import TURN_END, TURN_START, Prompt
from .inputs import IGNORED

# Names of the first, the other and the last token of each block of visual tokens.
_BLOCKS = (
    ("im_start", "im_patch", "im_end"),
    ("vid_start", "vid_patch", "vid_end"),
    ("slow_vid_start", "vid_patch", "slow_vid_end"),
)


def to_rows(
    prompts: Sequence[Prompt],
    tokenizer: PreTrainedTokenizerBase,
    token_ids: Mapping[str, int],
    labels: str | None = None,
    max_length: int | None = None,
) -> list[dict[str, Tensor]]:
    """`input_ids` int64, `positions` float64 and, if wanted, `labels` int64, all `[L]`, of each prompt.

    Args:
        prompts: texts.
        tokenizer: with LLaVA-ST's tokens; a fast one if labels are wanted.
        token_ids: ids of visual and template tokens by name.
        labels: `"paper"`: what the assistant says and the ends of its turns; `"released"`: as published, the headers of
            its turns and all ends, beginnings and new lines besides.
        max_length: longer prompts are cut.

    Raises:
        ValueError: a video or an image would be cut.
    """
    if labels and not tokenizer.is_fast:
        raise ValueError("return_labels: needs a fast tokenizer, which tells where in the text its tokens are")
    chunks = [prompt.chunks() for prompt in prompts]
    encoded = tokenizer(
        [chunk for each in chunks for chunk in each],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=bool(labels),
        verbose=False,
    )
    always = _always_learned(tokenizer) if labels == "released" else []
    rows, done = [], 0
    for number, (prompt, pieces) in enumerate(zip(prompts, chunks, strict=True)):
        here = slice(done, done + len(pieces))
        done += len(pieces)
        ids = np.concatenate([np.asarray(chunk, dtype=np.int64) for chunk in encoded["input_ids"][here]])
        positions = np.full(len(ids), math.nan)
        positions[np.isin(ids, [token_ids[name] for name in TEMPLATE_TOKENS])] = prompt.positions
        columns = {"input_ids": ids, "positions": positions}
        if labels:
            starts, ends = _places(encoded["offset_mapping"][here], [0, *prompt.cuts])
            learned = _is_target(starts, ends, prompt.targets) | np.isin(ids, always)
            columns["labels"] = np.where(learned, ids, IGNORED)
        columns = _fill_blocks(columns, [n for shown in prompt.shown for n in shown.streams], token_ids)
        if max_length is not None:
            visual = np.isin(columns["input_ids"][max_length:], [token_ids[name] for name in VISUAL_TOKENS])
            if visual.any():
                raise ValueError(f"max_length: {max_length} tokens cut a video or image of conversation {number}")
        rows.append({name: torch.from_numpy(column[:max_length]) for name, column in columns.items()})
    return rows


def _fill_blocks(
    columns: dict[str, np.ndarray], sizes: Sequence[int], token_ids: Mapping[str, int]
) -> dict[str, np.ndarray]:
    """Each first token of a block becomes the block. A block of one is its first token alone."""
    ids = columns["input_ids"]
    blocks = {token_ids[first]: (token_ids[patch], token_ids[last]) for first, patch, last in _BLOCKS}
    firsts = np.isin(ids, list(blocks))
    repeats = np.ones(len(ids), np.int64)
    repeats[firsts] = sizes
    filled = {name: np.repeat(column, repeats) for name, column in columns.items()}
    starts = np.cumsum(repeats) - repeats
    for first, start, size in zip(ids[firsts].tolist(), starts[firsts], sizes, strict=True):
        block = filled["input_ids"][start : start + size]
        block[1:], block[size - 1 : size] = blocks[first]
        block[0] = first
    return filled


def _places(offsets: Iterable[list[tuple[int, int]]], chunk_starts: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Where in the text each token begins and ends."""
    starts, ends = [], []
    for pairs, first in zip(offsets, chunk_starts, strict=True):
        begin, end = np.array(pairs, dtype=np.int64).reshape(-1, 2).T + first
        # Some tokenizers leave blanks out of what they tell: a token reaches back to the one before it.
        starts.append(np.minimum(begin, np.concatenate([[first], end])[: len(begin)]))
        ends.append(end)
    return np.concatenate(starts), np.concatenate(ends)


def _is_target(starts: np.ndarray, ends: np.ndarray, targets: Sequence[tuple[int, int]]) -> np.ndarray:
    """Which tokens, at these places of the text, lie in one of the targets, if only in part. Targets ascend."""
    if not targets:
        return np.zeros(len(starts), bool)
    first, last = np.array(targets).T
    at = np.searchsorted(first, ends, side="left") - 1  # the last target that starts before the token ends
    return (at >= 0) & (starts < last[at])


def _always_learned(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that are labels wherever they are, as published."""
    added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    new_line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    found = [added[token] for token in (TURN_START, TURN_END) if token in added]
    return found + (new_line if len(new_line) == 1 else [])
