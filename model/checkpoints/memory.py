"""How much memory a model needs, computed from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import bfloat16, nn

from ..configuration_llava_st import LlavaStConfig
from .names import OUR_EMBEDDING
from .reading import TensorSpec
from .skeleton import expected_shapes, skeleton

PRECISIONS = ("bf16", "8-bit LLM", "4-bit LLM")
NEW_TOKENS = 1024  # published
TEXT_TOKENS = 256  # an allowance for the words of a prompt
_PARTS = {
    "model.vision_tower.": "vision tower",
    "model.visual_tokenizer.projector.": "projector",
    "model.visual_tokenizer.packer.": "packers",
    "model.visual_tokenizer.lape.": "LAPE tables",
    OUR_EMBEDDING: "LLM: embedding",
    "model.language_model.": "LLM: layers",
    "lm_head.": "LLM: head",
}


@dataclass(frozen=True)
class Part:
    """
    Attributes:
        parameters: how many.
        nbytes: with each of `PRECISIONS`.
    """

    name: str
    parameters: int
    nbytes: tuple[int, int, int]


def weights(config: LlavaStConfig) -> list[Part]:
    """The weights of each part of the model. Quantised are, as bitsandbytes does by default, the linear layers of the
    language model, but for the head: to 8 bits and a float32 per row, or 4 bits and a float32 per 64 weights."""
    model = skeleton(config)
    quantised = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("model.language_model.")
    }
    counts = dict.fromkeys(_PARTS.values(), 0)
    sizes = {part: [0, 0, 0] for part in counts}
    for name, parameter in model.named_parameters():
        part = next(part for beginning, part in _PARTS.items() if name.startswith(beginning))
        count = parameter.numel()
        precisions = (2 * count,) * 3
        if name in quantised:
            precisions = (2 * count, count + 4 * len(parameter), count // 2 + 4 * -(-count // 64))
        counts[part] += count
        for i, nbytes in enumerate(precisions):
            sizes[part][i] += nbytes
    return [Part(name, count, tuple(sizes[name])) for name, count in counts.items() if count]


def video_tokens(config: LlavaStConfig) -> int:
    """Visual tokens of a video of the config's number of frames, of both streams."""
    return sum(frames * rows * columns for frames, rows, columns in config.video_grids(config.num_frames))


def cache_bytes(config: LlavaStConfig, tokens: int, itemsize: int = 2) -> int:
    """Keys and values of so many tokens."""
    text = config.text_config
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return tokens * text.num_hidden_layers * 2 * text.num_key_value_heads * width * itemsize


def vision_bytes(config: LlavaStConfig, itemsize: int = 2) -> dict[str, int]:
    """What the vision tower needs for a video: its frames, the features, and one layer of a chunk of frames.

    A layer is at its largest in its MLP: what came in, what attention made of it, that normalised, and the wide
    activation before and after its function.
    """
    vision, frames = config.vision_config, config.num_frames
    rows, columns = config.patch_grid
    patches = rows * columns
    chunk = min(config.vision_chunk_frames, frames)
    return {
        f"{frames} frames in float32": frames * 3 * vision.image_size**2 * 4,
        f"features of {frames} frames": frames * patches * vision.hidden_size * itemsize,
        f"one layer, {chunk} frames at a time": (
            chunk * patches * (3 * vision.hidden_size + 2 * vision.intermediate_size) * itemsize
        ),
    }


def conversion_bytes(specs: Mapping[str, TensorSpec], adapted: bool) -> int:
    """The most that a conversion has in memory: one tensor as it was read; where stages are merged, a matrix and what
    it becomes with new rows, or a layer's, its sum with an adapter in float32 twice, and what that becomes."""
    largest = max(spec.nbytes for spec in specs.values())
    if not adapted:
        return largest
    layers = [spec for name, spec in specs.items() if ".layers." in name]
    return max(2 * largest, *(2 * spec.nbytes + 8 * prod(spec.shape) for spec in layers))


def describe(config: LlavaStConfig) -> str:
    """A table of all that."""
    parts = weights(config)
    rows = [
        f"{'weights, GiB':<34}{'parameters':>16}" + "".join(f"{name:>12}" for name in PRECISIONS),
        *(_row(part.name, part.parameters, part.nbytes) for part in parts),
        _row("all", sum(part.parameters for part in parts), [sum(p.nbytes[i] for p in parts) for i in range(3)]),
        "",
        "besides weights, GiB",
    ]
    visual = video_tokens(config)
    tokens = visual + TEXT_TOKENS + NEW_TOKENS
    rows.append(
        f"  {_gib(cache_bytes(config, tokens)):>8}  KV cache of {tokens:,} tokens: {visual:,} of a video of "
        f"{config.num_frames} frames, {TEXT_TOKENS} of text, {NEW_TOKENS:,} generated"
    )
    rows += [f"  {_gib(nbytes):>8}  vision tower: {what}" for what, nbytes in vision_bytes(config).items()]
    specs = {name: TensorSpec(shape, bfloat16) for name, shape in expected_shapes(skeleton(config)).items()}
    rows += ["", "converting, GiB"]
    rows.append(f"  {_gib(sum(spec.nbytes for spec in specs.values())):>8}  on the disk")
    rows.append(f"  {_gib(conversion_bytes(specs, False)):>8}  in memory: the largest tensor of a full model")
    rows.append(f"  {_gib(conversion_bytes(specs, True)):>8}  in memory, to merge stages")
    return "\n".join(rows)


def _row(name: str, parameters: int, nbytes: list[int] | tuple[int, ...]) -> str:
    return f"  {name:<32}{parameters:>16,}" + "".join(f"{_gib(size):>12}" for size in nbytes)


def _gib(nbytes: int) -> str:
    return f"{nbytes / 2**30:.3f}"
