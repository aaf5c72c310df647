"""The `config.json` of published checkpoints, and `LlavaStConfig`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from ..configuration_llava_st import LlavaStConfig
from .names import EMBEDDING, TABLES
from .reading import CheckpointError, TensorSpec, read_json

MODE = "llava_st_compat"  # our key in a published config.json: its weights cannot always tell
_ARCHITECTURE, _LANGUAGE_MODEL = "LlavaQwenForCausalLM", "qwen2"
# What the published code does not keep in config.json.
PACKER_HEADS = 8
_VISION_HEADS, _NUM_FRAMES, _TEMPORAL_FACTOR = 16, 100, 5
_SPATIAL_FACTOR = 3  # of the spatial and of the fast packer
_TOWER = "model.vision_tower.vision_tower.vision_model."
_PLACES = f"{_TOWER}embeddings.position_embedding.weight"
_NORM = "model.vision_resampler.token_packer.devide_attention.ln_q.weight"


def read_published(folder: Path) -> dict[str, Any]:
    """The `config.json` of a published checkpoint.

    Raises:
        CheckpointError: it is another model's.
    """
    path = folder / "config.json"
    settings = read_json(path)
    if (got := settings.get("architectures")) != [_ARCHITECTURE]:
        raise CheckpointError(f"{path}: architectures: expected {[_ARCHITECTURE]!r}, got {got!r}")
    if settings.get("tie_word_embeddings"):
        raise CheckpointError(f"{path}: tie_word_embeddings: expected false, as published, got true")
    if not isinstance(settings.get("rope_theta"), int | float):
        raise CheckpointError(f"{path}: rope_theta: expected a number, got {settings.get('rope_theta')!r}")
    return settings


def packer_settings(specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    """What a published `config.json` says of the published packers; that of LLaVA-OneVision lacks it."""
    packed = math.isqrt(_shape(specs, _PLACES, 2)[0]) // _SPATIAL_FACTOR
    return {
        "mm_resampler_type": "fast_slow_resampler",
        "mm_perceiver_latents": packed**2,
        "mm_perceiver_latents_fast": (packed // _SPATIAL_FACTOR) ** 2,
    }


def has_lape(specs: Mapping[str, TensorSpec]) -> bool:
    """Whether there are positions; stage-1 checkpoints have none."""
    return any(table in specs for table in TABLES)


def read_num_bins(specs: Mapping[str, TensorSpec]) -> tuple[int, ...]:
    """Anchors of time, height and width; the published 100 where there are no tables."""
    inputs = [table for table, ours in TABLES.items() if ours.endswith("_input")]
    return tuple(specs[table].shape[0] if table in specs else 100 for table in inputs)


def read_config(
    published: Mapping[str, Any], specs: Mapping[str, TensorSpec], vocab_size: int, token_ids: dict[str, int]
) -> LlavaStConfig:
    """The config that belongs to published tensors; `compat` is left at its default.

    Args:
        published: their `config.json`, which says little; the rest is read off shapes.
        specs: under published names.
        vocab_size: V.
        token_ids: see `LlavaStConfig`.

    Raises:
        CheckpointError: it does not agree with the shapes.
    """
    factors = _read_factors(published, specs)
    known = _text_settings()
    text = {key: value for key, value in published.items() if key in known}
    rope = {"rope_type": "default", "rope_theta": published.get("rope_theta"), **(published.get("rope_scaling") or {})}
    return LlavaStConfig(
        architectures=["LlavaStForConditionalGeneration"],
        text_config={**text, "model_type": _LANGUAGE_MODEL, "vocab_size": vocab_size, "rope_parameters": rope},
        vision_config=_read_vision(published, specs),
        token_ids=token_ids,
        lape=has_lape(specs),
        num_bins=read_num_bins(specs),
        num_frames=_NUM_FRAMES,
        packer_dim=_shape(specs, _NORM, 1)[0],
        packer_heads=PACKER_HEADS,
        temporal_factor=_TEMPORAL_FACTOR,
        dtype=str(specs[EMBEDDING].dtype).removeprefix("torch."),
        **factors,
    )


def write_config(config: LlavaStConfig, published: Mapping[str, Any]) -> dict[str, Any]:
    """A published `config.json` for a config of ours.

    Args:
        published: the one it was converted from, whose entries are kept; or nothing.

    Raises:
        CheckpointError: the published layout cannot say what the config says.
    """
    text, vision = config.text_config, config.vision_config
    rows = config.patch_grid[0]
    packed, fast = rows / config.spatial_factor, rows / config.spatial_factor / config.fast_factor
    required = {
        "text_config.model_type": (text.model_type, _LANGUAGE_MODEL),
        "tie_word_embeddings": (config.tie_word_embeddings, False),
        "pack_images": (config.pack_images, False),
        "num_frames": (config.num_frames, _NUM_FRAMES),
        "temporal_factor": (config.temporal_factor, _TEMPORAL_FACTOR),
        "packer_heads": (config.packer_heads, PACKER_HEADS),
        "vision_config.num_attention_heads": (vision.num_attention_heads, _VISION_HEADS),
        "spatial_factor, fast_factor: rows of the grids": ((packed, fast), (int(packed), int(fast))),
        "num_bins: of height and width": (config.num_bins[1], config.num_bins[2]),
    }
    for name, (got, expected) in required.items():
        if got != expected:
            raise CheckpointError(f"{name}: the published layout can only have {expected!r}, got {got!r}")
    if text.rope_parameters.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"rope_parameters: the published layout can only have the default kind, got {text.rope_parameters!r}"
        )
    return {
        **(published or _published_settings(config)),
        "architectures": [_ARCHITECTURE],
        "vocab_size": config.vocab_size,
        "num_temporal_tokens": config.num_bins[0],
        "num_spatial_tokens": config.num_bins[1],
        "mm_perceiver_latents": int(packed) ** 2,
        "mm_perceiver_latents_fast": int(fast) ** 2,
        MODE: config.compat,
    }


def _published_settings(config: LlavaStConfig) -> dict[str, Any]:
    """For a config that was not converted from one."""
    text, vision = config.text_config, config.vision_config
    rope = {"rope_theta": text.rope_parameters["rope_theta"], "rope_scaling": None}
    return {
        **{key: value for key, value in text.to_dict().items() if key in _text_settings() - {"rope_parameters"}},
        **rope,
        "model_type": "llava",
        "mm_vision_tower": f"google/siglip-so400m-patch{vision.patch_size}-{vision.image_size}",
        "mm_hidden_size": vision.hidden_size,
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": "fast_slow_resampler",
        "torch_dtype": str(config.dtype).removeprefix("torch."),
    }


def _text_settings() -> set[str]:
    """What a config of the language model has of its own."""
    return CONFIG_MAPPING[_LANGUAGE_MODEL]().to_dict().keys() - PreTrainedConfig().to_dict().keys()


def _read_vision(published: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    width, _, patch, _ = _shape(specs, f"{_TOWER}embeddings.patch_embedding.weight", 4)
    places = _shape(specs, _PLACES, 2)[0]
    tower = str(published.get("mm_vision_tower"))
    named = re.search(r"patch([1-9]\d{0,5})-(\d{1,6})", tower)
    if named is None or int(named[1]) != patch or (int(named[2]) // patch) ** 2 != places:
        raise CheckpointError(
            f"config.json: mm_vision_tower: expected ...-patch{patch}-S, S x S pixels that make {places} patches, "
            f"got {tower!r}"
        )
    layers = {name.removeprefix(f"{_TOWER}encoder.layers.").split(".")[0] for name in specs if "encoder.layers" in name}
    return {
        "model_type": "siglip_vision_model",
        "hidden_size": width,
        "intermediate_size": _shape(specs, f"{_TOWER}encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": _VISION_HEADS,
        "image_size": int(named[2]),
        "patch_size": patch,
        "vision_use_head": False,
    }


def _read_factors(published: Mapping[str, Any], specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """Sides of the packers' regions, from the tokens that they leave of a frame."""
    sides = [math.isqrt(_shape(specs, _PLACES, 2)[0])]
    for key in ("mm_perceiver_latents", "mm_perceiver_latents_fast"):
        latents = published.get(key)
        side = math.isqrt(latents) if isinstance(latents, int) and latents > 0 else 0
        if side == 0 or side**2 != latents or sides[-1] % side:
            raise CheckpointError(
                f"config.json: {key}: expected what a packer leaves of {sides[-1]} x {sides[-1]} tokens, the square of "
                f"a divisor, got {latents!r}"
            )
        sides.append(side)
    return {"spatial_factor": sides[0] // sides[1], "fast_factor": sides[1] // sides[2]}


def _shape(specs: Mapping[str, TensorSpec], name: str, dimensions: int) -> tuple[int, ...]:
    if name not in specs:
        raise CheckpointError(f"missing: {name}")
    if len(specs[name].shape) != dimensions:
        raise CheckpointError(f"{name}: expected {dimensions} dimensions, got shape {list(specs[name].shape)}")
    return specs[name].shape


def vocab_size(specs: Mapping[str, TensorSpec]) -> int:
    """V: the rows of the embedding."""
    return _shape(specs, EMBEDDING, 2)[0]
