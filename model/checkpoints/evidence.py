"""How a checkpoint was trained, read off its weights.

The published code loses the fast stream and the widths of prompts (`compat="released"`), and both leave marks. A tensor
that never gets a gradient stays as it was made: biases 0, LayerNorms 1 and 0, and rows of new tokens all the same, the
mean of the rows before them (AdamW without weight decay changes nothing where the gradient is zero).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from .names import EMBEDDING
from .reading import CheckpointError, Tensors

_FAST = "model.vision_resampler.token_packer_fast.devide_attention."
_TEMPLATES = ("temporal_input", "temporal_output", "height_input", "height_output", "width_output")


@dataclass(frozen=True)
class Finding:
    """What one place of a checkpoint says.

    Attributes:
        mode: `"released"`, `"paper"`, or None where it says neither.
        text: what was found.
    """

    mode: str | None
    text: str


def examine(tensors: Tensors, token_ids: Mapping[str, int], lape: bool) -> list[Finding]:
    """The findings for a checkpoint under its published names.

    Args:
        token_ids: see `LlavaStConfig`.
        lape: whether coordinates were trained; if not, nothing can be said of widths.
    """
    findings = [_fast_stream(tensors)]
    if lape:
        findings.append(_widths(tensors, token_ids))
    return [*findings, _placeholders(tensors, token_ids)]


def conclude(findings: Sequence[Finding]) -> str:
    """The mode that all findings agree on.

    Raises:
        CheckpointError: they do not; the message lists them.
    """
    modes = {finding.mode for finding in findings}
    if len(modes) == 1 and None not in modes:
        return modes.pop()
    raise CheckpointError("the weights do not agree on how they were trained:\n" + describe(findings))


def describe(findings: Sequence[Finding]) -> str:
    return "\n".join(f"  {finding.mode or 'neither'}: {finding.text}" for finding in findings)


def _fast_stream(tensors: Tensors) -> Finding:
    """A packer that is trained changes all its biases; weights of its LayerNorms may stay 1 in bf16."""
    names = [name for name in tensors.specs if name.startswith(_FAST)]
    biases = [name for name in names if name.endswith("bias")]
    norms = [name for name in names if name.startswith(_FAST + "ln_") and name.endswith("weight")]
    changed = {name for name in biases if tensors.read(name).count_nonzero()}
    changed |= {name for name in norms if not (tensors.read(name) == 1).all()}
    if not changed:
        return Finding("released", "token_packer_fast was never trained: biases are 0, LayerNorms 1 and 0")
    if changed >= set(biases):
        return Finding("paper", "token_packer_fast was trained")
    untouched = ", ".join(sorted(name.removeprefix(_FAST) for name in set(biases) - changed))
    return Finding(None, f"token_packer_fast was trained in part; as initialised: {untouched}")


def _widths(tensors: Tensors, token_ids: Mapping[str, int]) -> Finding:
    """The row of a template token gets a gradient only where no position takes its place."""
    others = tensors.rows(EMBEDDING, [token_ids[name] for name in _TEMPLATES])
    width = tensors.rows(EMBEDDING, [token_ids["width_input"]])
    if not torch.equal(others, others[:1].expand_as(others)):
        return Finding(None, "rows of template tokens other than <WIDTH-INPUT> differ")
    if torch.equal(width, others[:1]):
        return Finding("paper", "the rows of all six template tokens are the same: positions took the place of each")
    return Finding(
        "released", "the row of <WIDTH-INPUT> differs from those of the other five template tokens: widths were dropped"
    )


def _placeholders(tensors: Tensors, token_ids: Mapping[str, int]) -> Finding:
    """`<im_patch>` always makes place for features; `<vid_patch>` does not where the fast stream is lost."""
    image, video = tensors.rows(EMBEDDING, [token_ids["im_patch"], token_ids["vid_patch"]])
    if torch.equal(image, video):
        return Finding("paper", "the rows of <vid_patch> and <im_patch> are the same: features took the place of both")
    return Finding("released", "the row of <vid_patch> differs from that of <im_patch>: placeholders were trained on")
