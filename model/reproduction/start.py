"""What training on moving shapes begins with: a model that has seen nothing, but for its vision tower."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

from llava_st_ops.nn import LanguageAlignedPositionalEmbedding

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
from .directions import AXIS_WAVES, EDGE_WAVES, FASTEST_AXIS, FASTEST_EDGE, Directions
from .tower import PatchTruth, patch_truth, train_tower, waves
from .wiring import HEAD_DIM, ROPE_BASE, wire

_WIDTH = 128
# Sizes of what a token says: norms, and for words and logits standard deviations.
_NAME, _EDGES, _VISUAL = 6.0, 0.9, 3.0  # of visual tokens, before packing; edges per wave
_WORD, _NAME_WORD = 0.2, 1.6
_POSITION, _HEAD, _PACKER_OUTPUT = 0.25, 0.05, 0.02
_LIKENESS = 0.7
_PROJECTOR_STEPS, _PROJECTOR_RATE, _PROJECTOR_BATCH = 600, 3e-3, 2048


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
        "head_dim": HEAD_DIM,
        "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
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


def write_tower(
    path: Path,
    folder: Path,
    scenes: Sequence[Scene],
    texts: Iterable[str],
    seed: int,
    steps: int,
    report: Callable[[int, dict[str, float]], None],
) -> None:
    """Writes the weights of a trained vision tower.

    Args:
        path: of the file.
        folder: a data set of `synthesis.synthesize`.
        scenes: the clips of it that the tower learns from.
        texts: see `shapes_processor`.
        seed: of everything random.
        steps, report: see `train_tower`.
    """
    config, _ = shapes_processor(texts)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tower = AutoModel.from_config(config.vision_config)
    pixels, truth = tower_data(folder, scenes, config)
    train_tower(tower, pixels, truth, steps, seed, report)
    save_file(tower.state_dict(), path)


def write_start(
    out: Path, tower: Path, folder: Path, scenes: Sequence[Scene], texts: Iterable[str], seed: int, **changes: Any
) -> None:
    """Writes the folder of a model that has seen nothing, but for its tower.

    Args:
        out: for `from_pretrained`.
        tower: a file of `write_tower`.
        folder: a data set of `synthesis.synthesize`.
        scenes: some clips of it that the tower has seen; see `initialise`.
        texts, changes: see `shapes_processor`.
        seed: of everything random.
    """
    config, processor = shapes_processor(texts, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaStForConditionalGeneration(config)
        model.model.vision_tower.load_state_dict(load_file(tower))
        initialise(model, processor, *tower_data(folder, scenes, config))
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


def initialise(
    model: LlavaStForConditionalGeneration, processor: LlavaStProcessor, pixels: Tensor, truth: PatchTruth
) -> None:
    """Starting values with which a small model learns in thousands of steps, not in millions.

    Colours, shapes, edges and positions have directions of their own, and all parts agree on them. Positions are waves
    along their axis, so that neighbours are alike from the start, and are written as they are read. The projector says
    what the tower sees in the directions of the words for it, as SigLIP was trained with words. Some heads find what a
    question names, see `wire`; in the others like looks for like.

    Args:
        pixels: uint8 `[N, 3, S, S]`, from which the projector learns.
        truth: what they show.
    """
    directions = Directions.random(_WIDTH)
    inner = model.model
    start_language_model(model, processor, directions)
    with torch.no_grad():
        for packer in inner.visual_tokenizer.packer.children():
            for matrix in (parameter for parameter in packer.parameters() if parameter.dim() == 2):
                nn.init.normal_(matrix, std=matrix.shape[1] ** -0.5)
            nn.init.normal_(packer.output.weight, std=_PACKER_OUTPUT)
        features = vision_features(inner.vision_tower, pixels.float() / 127.5 - 1, 64)
    _train_projector(inner.visual_tokenizer.projector, features, what_is_seen(truth, directions))


@torch.no_grad()
def start_language_model(
    model: LlavaStForConditionalGeneration, processor: LlavaStProcessor, directions: Directions
) -> None:
    """All of `initialise` that is not about pictures."""
    _start_layers(model)
    wire(model.model.language_model.layers, directions)
    _start_words(model, processor, directions)
    if model.model.lape is not None:
        _start_positions(model.model.lape, directions)


def _start_layers(model: LlavaStForConditionalGeneration) -> None:
    layers = model.model.language_model.layers
    for layer in layers:
        for name, matrix in layer.named_parameters():
            if matrix.dim() == 2:
                out = (2 * len(layers)) ** -0.5 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                nn.init.normal_(matrix, std=out * matrix.shape[1] ** -0.5)
        layer.self_attn.q_proj.weight.mul_(_LIKENESS)
        layer.self_attn.k_proj.weight.copy_(layer.self_attn.q_proj.weight)


def _start_words(model: LlavaStForConditionalGeneration, processor: LlavaStProcessor, directions: Directions) -> None:
    words, head = model.get_input_embeddings().weight, model.lm_head.weight
    nn.init.normal_(words, std=_WORD)
    nn.init.normal_(head, std=_HEAD)
    for own in (directions.names, directions.word, directions.visual):
        words.sub_(words @ own.T @ own)
    head.sub_(head @ directions.names.T @ directions.names)
    for name, direction in zip((*COLOURS, *SHAPES), directions.names, strict=True):
        token = processor.tokenizer.encode(f" {name}", add_special_tokens=False)
        if len(token) != 1:
            raise ValueError(f"texts: expected them to make one token of {name!r}")
        words[token] = _NAME_WORD * (direction + directions.word)
        head[token] = _HEAD * _WIDTH**0.5 * direction


def _start_positions(lape: LanguageAlignedPositionalEmbedding, directions: Directions) -> None:
    for axis in ("temporal", "height", "width"):
        for side in ("input", "output"):
            table = getattr(lape, f"{axis}_{side}")
            # Slow waves are larger, so that what they say is learned first.
            slowness = torch.logspace(0, -0.5, AXIS_WAVES).repeat(2)
            values = waves(torch.linspace(0, 1, len(table)), AXIS_WAVES, FASTEST_AXIS) * slowness
            values = values @ getattr(directions, axis)
            table.copy_(values * (_POSITION / values.std()))


def what_is_seen(truth: PatchTruth, directions: Directions) -> Tensor:
    """What the projector is to say of patches: `[N, rows, columns, C]`."""
    colours, shapes = directions.names.split([len(COLOURS), len(SHAPES)])
    objects = truth.colours > 0
    seen = _NAME * (colours[truth.colours[objects].long() - 1] + shapes[truth.shapes[objects].long() - 1])
    seen += _EDGES * waves(truth.edges[objects], EDGE_WAVES, FASTEST_EDGE).flatten(-2) @ directions.edges
    tokens = seen.new_zeros(*objects.shape, _WIDTH)
    tokens[objects] = seen
    return tokens + _VISUAL * directions.visual[0]


def _train_projector(projector: nn.Sequential, features: Tensor, wanted: Tensor) -> None:
    features, wanted = features.flatten(0, -2), wanted.flatten(0, -2)
    for layer in (projector[0], projector[2]):
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
        nn.init.zeros_(layer.bias)
    with torch.no_grad():
        projector[0].weight.div_(features.std(dim=0).mean())
    optimizer = torch.optim.Adam(projector.parameters(), lr=_PROJECTOR_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PROJECTOR_RATE, _PROJECTOR_STEPS)
    for _ in range(_PROJECTOR_STEPS):
        index = torch.randint(len(features), (_PROJECTOR_BATCH,))
        optimizer.zero_grad()
        nn.functional.mse_loss(projector(features[index]), wanted[index]).backward()
        optimizer.step()
        schedule.step()
