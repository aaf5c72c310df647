"""The names of tensors in LLaVA-ST's published checkpoints, and their names here."""

from __future__ import annotations

import re

from llava_st_ops.nn.lape import PUBLISHED_TABLES
from llava_st_ops.nn.published_names import PACKER_PARTS, PACKERS, WRAPPER

# Published name of a LAPE table -> what is called so here.
TABLES = {f"model.{published}": ours for published, ours in PUBLISHED_TABLES.items()}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OUR_EMBEDDING, OUR_TABLES = "model.language_model.embed_tokens.weight", "model.visual_tokenizer.lape."
_LANGUAGE_MODEL = "model.language_model."

# Published beginning -> ours. The first that fits is taken: what is left below `model.` is the language model's.
_BEGINNINGS = {
    "lm_head.": "lm_head.",
    "model.mm_projector.": "model.visual_tokenizer.projector.",
    "model.vision_tower.vision_tower.vision_model.": "model.vision_tower.",
    **{
        f"model.vision_resampler.{packer}{WRAPPER}{part}": f"model.visual_tokenizer.packer.{ours}{our_part}"
        for packer, ours in PACKERS.items()
        for part, our_part in PACKER_PARTS.items()
    },
    **{table: OUR_TABLES + ours for table, ours in TABLES.items()},
    "model.": _LANGUAGE_MODEL,
}
# Tensors that checkpoints of LLaVA-ST's ancestors have, and that take no part in what it computes.
_UNUSED = re.compile(r"model\.image_newline|.*\.rotary_emb\.inv_freq|.*\.embeddings\.position_ids")


def is_unused(published: str) -> bool:
    """Whether a published tensor takes no part in what the model computes."""
    return _UNUSED.fullmatch(published) is not None


def to_ours(published: str) -> str:
    """Raises ValueError for a name that no published tensor has."""
    return _rename(published, _BEGINNINGS)


def to_published(ours: str) -> str:
    """The inverse of `to_ours`."""
    return _rename(ours, {ours: published for published, ours in _BEGINNINGS.items()})


def to_language_model(ours: str, prefix: str) -> str | None:
    """The name in a plain causal language model whose body is called `prefix`; None for what such a model lacks."""
    if ours.startswith(_LANGUAGE_MODEL):
        return f"{prefix}.{ours.removeprefix(_LANGUAGE_MODEL)}"
    return ours if ours == HEAD else None


def _rename(name: str, beginnings: dict[str, str]) -> str:
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name[len(old) :]
    raise ValueError(f"{name!r}: no tensor of LLaVA-ST has such a name")
