"""The names that parameters have in LLaVA-ST's checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Beginnings, and what they are here: of the three packers, the module around each of them (spelled so), and its parts.
PACKERS = {"token_packer.": "spatial.", "token_packer_slow.": "slow.", "token_packer_fast.": "fast."}
WRAPPER = "devide_attention."
PACKER_PARTS = {
    "to_q.": "query_mlp.",
    "to_k.": "key_mlp.",
    "to_v.": "value_mlp.",
    "ln_q.": "query_norm.",
    "ln_k.": "key_norm.",
    "ln_v.": "value_norm.",
    "attn.in_proj_": "in_proj_",
    "attn.out_proj.": "out_proj.",
    "to_out.": "output.",
}


def rename(state_dict: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Gives the entries below `prefix` whose names begin with a key of `names` their new beginnings, in place."""
    for key in [key for key in state_dict if key.startswith(prefix)]:
        rest = key[len(prefix) :]
        for old, new in names.items():
            if rest.startswith(old):
                state_dict[prefix + new + rest[len(old) :]] = state_dict.pop(key)
                break
