"""What training on moving shapes begins with: a model that has seen nothing, but for its vision tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration_llava_st import LlavaStConfig
from ..modeling_llava_st import LlavaStForConditionalGeneration
from ..processing_llava_st import LlavaStProcessor
from ..prompting.chat import CHATML
from ..synthesis.questions import video_file
from ..synthesis.scenes import COLOURS, SHAPES, Scene
from ..tasks import TASKS
from ..tiny import tiny_tokenizer
from ..video import load_video
from ..vision_tower import vision_features
from .tower import PatchTruth, patch_truth, train_tower, waves

_WIDTH = 128
_WAVES, _FASTEST = 16, 16.0  # of positions, see `tower.waves`
# Standard deviations: of a word, of what the tower sees, of a position along one axis, of logits.
_WORDS, _VISUAL, _POSITIONS = 0.2, 0.5, 0.25
_HEAD, _PACKER_OUTPUT = 0.05, 0.02
_LIKENESS = 0.7
_INITIAL = 1000  # pictures that they depend on


def shapes_processor(texts: Iterable[str], **changes: Any) -> tuple[LlavaStConfig, LlavaStProcessor]:
    """The configuration of the model, and its processor.

    Args:
        texts: of which the tokenizer learns its words.
        changes: of the configuration.
    """
    tokenizer = tiny_tokenizer(texts=[*texts, CHATML, CHATML], phrases=_phrases())
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": 72,
        "patch_size": 12,
        "vision_use_head": False,
    }
    text = {
        "model_type": "qwen2",
        "vocab_size": len(tokenizer) - 300,
        "hidden_size": _WIDTH,
        "intermediate_size": 3 * _WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    packer = {"packer_dim": 96, "packer_heads": 4, "spatial_factor": 2, "temporal_factor": 5, "fast_factor": 1}
    config = LlavaStConfig(**{"vision_config": vision, "text_config": text, "num_frames": 20, **packer, **changes})
    return config, LlavaStProcessor.from_config(config, tokenizer)


def _phrases() -> list[str]:
    """What a task's questions have in common, which would be most of what a small model reads."""
    mark = "\ufdd0"
    phrases = []
    for task, field in (("stvg", "question"), ("svg", "question"), ("elc", "question"), ("tvg", "event")):
        for part in TASKS[task].prompt(**{field: mark}):
            phrases += [piece for piece in part.split(mark) if piece]
    return phrases


def write_start(
    out: Path,
    folder: Path,
    scenes: Sequence[Scene],
    texts: Iterable[str],
    seed: int,
    tower_steps: int,
    report: Callable[[int, dict[str, float]], None],
    **changes: Any,
) -> None:
    """Writes the model's folder, with its tower trained.

    Args:
        out: for `from_pretrained`.
        folder: a data set of `synthesis.synthesize`.
        scenes: the clips of it that the tower learns from.
        texts, changes: see `shapes_processor`.
        seed: of everything random.
        tower_steps, report: see `train_tower`.
    """
    config, processor = shapes_processor(texts, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaStForConditionalGeneration(config)
        pixels, truth = tower_data(folder, scenes, config)
        train_tower(model.model.vision_tower, pixels, truth, tower_steps, seed, report)
        few = torch.arange(0, len(pixels), max(len(pixels) // _INITIAL, 1))
        initialise(model, processor, pixels[few], truth[few])
    model.generation_config.eos_token_id = config.text_config.eos_token_id
    model.generation_config.pad_token_id = config.text_config.pad_token_id
    model.save_pretrained(out)
    processor.save_pretrained(out)


def tower_data(folder: Path, scenes: Sequence[Scene], config: LlavaStConfig) -> tuple[Tensor, PatchTruth]:
    """Frames of clips as uint8 `[N, 3, S, S]`, and what their patches show."""
    size, grid = config.vision_config.image_size, config.patch_grid[0]
    pixels, truths = [], []
    for scene in scenes:
        frames, _ = load_video(folder / video_file(scene), scene.frames, size)
        pixels.append(frames.add_(1).mul_(127.5).round_().to(torch.uint8))
        truths.append(patch_truth(scene, grid))
    return torch.cat(pixels), PatchTruth.join(truths)


@torch.no_grad()
def initialise(
    model: LlavaStForConditionalGeneration, processor: LlavaStProcessor, pixels: Tensor, truth: PatchTruth
) -> None:
    """Starting values with which a small model learns in thousands of steps, not in millions.

    Positions are waves along their axis, so that neighbours are alike from the start and "earlier" and "further left"
    are directions; each axis has dimensions of its own, and a position is written as it is read. Words, positions and
    visual tokens begin at sizes like each other's, and names of colours and shapes where the projector puts what they
    name: SigLIP, too, was trained with words. In attention, like looks for like.

    Args:
        pixels: uint8 `[N, 3, S, S]`, by which the projector is scaled.
        truth: what they show, whose names words begin with.
    """
    inner = model.model
    if inner.lape is not None:
        axes = ("temporal", "height", "width")
        directions = torch.linalg.qr(torch.randn(_WIDTH, 2 * _WAVES * len(axes)))[0].chunk(len(axes), dim=1)
        for axis, own in zip(axes, directions, strict=True):
            for side in ("input", "output"):
                table = getattr(inner.lape, f"{axis}_{side}")
                # Slow waves are larger, so that what they say is learned first.
                slowness = torch.logspace(0, -0.5, _WAVES).repeat(2)
                values = (waves(torch.linspace(0, 1, len(table)), _WAVES, _FASTEST) * slowness) @ own.T
                table.copy_(values * (_POSITIONS / values.std()))
    tokenizer = inner.visual_tokenizer
    for part in (tokenizer.projector, *tokenizer.packer.children()):
        for matrix in (parameter for parameter in part.parameters() if parameter.dim() == 2):
            nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
    for packer in tokenizer.packer.children():
        nn.init.normal_(packer.output.weight, std=_PACKER_OUTPUT)
    # Most of what the tower says is the same everywhere; what differs is to have the right size.
    projected = tokenizer.projector(vision_features(inner.vision_tower, pixels.float() / 127.5 - 1, 64))
    mean, deviation = projected.mean(dim=(0, 1, 2)), (projected - projected.mean(dim=(0, 1, 2))).std()
    last = tokenizer.projector[2]
    last.weight.mul_(_VISUAL / deviation)
    last.bias.sub_(mean).mul_(_VISUAL / deviation)
    nn.init.normal_(model.get_input_embeddings().weight, std=_WORDS)
    nn.init.normal_(model.lm_head.weight, std=_HEAD)
    for names, shown in ((COLOURS, truth.colours), (SHAPES, truth.shapes)):
        for i, name in enumerate(names, start=1):
            if (token := processor.tokenizer.encode(f" {name}", add_special_tokens=False))[1:]:
                raise ValueError(f"texts: expected them to make one token of {name!r}")
            if not (shown == i).any():
                continue
            direction = projected[shown == i].mean(dim=0) - mean
            direction = direction * (len(direction) ** 0.5 / direction.norm())
            model.get_input_embeddings().weight[token] = _WORDS * direction
            model.lm_head.weight[token] = _HEAD * direction
    layers = inner.language_model.layers
    for layer in layers:
        for name, matrix in layer.named_parameters():
            if matrix.dim() == 2:
                out = (2 * len(layers)) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(matrix, std=out * matrix.shape[1] ** -0.5)
        # Like looks for like from the start.
        layer.self_attn.q_proj.weight.mul_(_LIKENESS)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)
