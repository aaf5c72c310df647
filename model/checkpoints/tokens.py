"""The tokenizer of a checkpoint, with the tokens of LLaVA-ST."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_llava_st import TEMPLATE_TOKENS, VISUAL_TOKENS, anchor_tokens
from .reading import CheckpointError

# Files of a tokenizer besides those that begin with these.
_BEGINNINGS = ("tokenizer", "vocab", "merges", "added_tokens", "special_tokens_map", "chat_template")


def tokenizer_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file() and path.name.startswith(_BEGINNINGS))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, whatever kind of model its `config.json` names."""
    files = tokenizer_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: has no tokenizer")
    with tempfile.TemporaryDirectory() as alone:
        for path in files:
            Path(alone, path.name).symlink_to(path.absolute())
        try:
            return AutoTokenizer.from_pretrained(alone, trust_remote_code=False)  # by default it would ask
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder}: its tokenizer cannot be loaded: {error}") from error


def add_tokens(tokenizer: PreTrainedTokenizerBase, num_bins: Sequence[int]) -> list[str]:
    """Gives a tokenizer the tokens of LLaVA-ST that it lacks, in the published order; returns them."""
    present = tokenizer.get_vocab()
    names = [*VISUAL_TOKENS.values(), *TEMPLATE_TOKENS.values(), *anchor_tokens(tuple(num_bins))]
    lacking = [name for name in names if name not in present]
    tokenizer.add_tokens([AddedToken(name, special=True, normalized=False) for name in lacking], special_tokens=True)
    return lacking


def lacks_templates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is of the first stage, without template tokens.

    Raises:
        CheckpointError: it has some of them.
    """
    present = tokenizer.get_vocab()
    lacking = [token for token in TEMPLATE_TOKENS.values() if token not in present]
    if lacking and len(lacking) < len(TEMPLATE_TOKENS):
        raise CheckpointError(f"the tokenizer has some template tokens, but lacks {', '.join(lacking)}")
    return bool(lacking)


def read_token_ids(tokenizer: PreTrainedTokenizerBase, num_bins: Sequence[int], vocab_size: int) -> dict[str, int]:
    """`LlavaStConfig.token_ids`, of a tokenizer that has all tokens.

    Raises:
        CheckpointError: anchors do not begin at `vocab_size`, are not in order, or a token has no row in the embedding.
    """
    ids = tokenizer.get_vocab()
    anchors = anchor_tokens(tuple(num_bins))
    if ids[anchors[0]] != vocab_size:
        raise CheckpointError(
            f"the tokenizer's id of {anchors[0]} must be the number of rows of the embedding, {vocab_size}, "
            f"got {ids[anchors[0]]}"
        )
    for place, anchor in enumerate(anchors):
        if ids[anchor] != vocab_size + place:
            raise CheckpointError(f"the tokenizer's id of {anchor} must be {vocab_size + place}, got {ids[anchor]}")
    found = {name: ids[token] for name, token in {**VISUAL_TOKENS, **TEMPLATE_TOKENS}.items()}
    for name, token_id in found.items():
        if token_id >= vocab_size:
            raise CheckpointError(f"{name}: the tokenizer's id {token_id} is beyond the embedding's {vocab_size} rows")
    return found
