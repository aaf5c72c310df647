"""Which parameters of a model train in a stage, at which rates, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..modeling_llava_st import LlavaStForConditionalGeneration
from .rows import TrainableRows, needed_rows
from .settings import StageSettings

# AdamW keeps two moments in float32 for each parameter; a gradient is a third number.
_MOMENT_BYTES, _GRADIENT_BYTES = 8, 4


@dataclass(frozen=True)
class Trainable:
    """A part of a model that trains: the names of its parameters, how many numbers they are, and their rate."""

    part: str
    names: tuple[str, ...]
    numel: int
    rate: float


def prepare(model: LlavaStForConditionalGeneration, settings: StageSettings) -> list[Trainable]:
    """Freezes a model but for what a stage trains; adds adapters and rows that it needs.

    Parameters that train become float32: a step of 2e-5 would be lost in the rounding of bfloat16.

    Raises:
        ValueError: the model has positions and the stage has none, or the other way round.
    """
    if (model.model.lape is not None) != settings.positions:
        raise ValueError(f"positions: expected a model with lape={settings.positions}, as the stage has it")
    model.requires_grad_(False)
    if settings.lora_rank:
        add_adapters(model, settings)
    if "embedding" in settings.train and settings.embedding_rows == "needed" and (ids := needed_rows(model.config)):
        TrainableRows.attach(model, ids)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    trainables = []
    for part in (*settings.train, "lora"):
        if not (parameters := _parameters(model, part, settings)):
            continue
        for parameter in parameters:
            parameter.requires_grad_(True)
            parameter.data = parameter.data.float()
        found = tuple(names[id(parameter)] for parameter in parameters)
        trainables.append(Trainable(part, found, sum(p.numel() for p in parameters), settings.rate(part)))
    return trainables


def add_adapters(model: LlavaStForConditionalGeneration, settings: StageSettings) -> None:
    """LoRA on every linear layer of the language model, found by where it is, not by what it is called."""
    language_model = model.model.language_model
    layers = [name for name, module in language_model.named_modules() if type(module) is nn.Linear]
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules=layers,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        inject_adapter_in_model(config, language_model)


def reset_packer(model: LlavaStForConditionalGeneration, seed: int) -> None:
    """A new packer, the same one for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for packer in model.model.visual_tokenizer.packer.children():
            packer.reset_parameters()


def optimizer_groups(model: nn.Module, trainables: list[Trainable], settings: StageSettings) -> list[dict[str, Any]]:
    """Parameter groups of AdamW, one for each part."""
    return [
        {
            "params": [model.get_parameter(name) for name in each.names],
            "lr": each.rate,
            "weight_decay": settings.weight_decay,
            "name": each.part,
        }
        for each in trainables
    ]


def optimizer_bytes(numel: int) -> int:
    """Memory of AdamW's two moments, without gradients."""
    return numel * _MOMENT_BYTES


def saved_by_rows(model: LlavaStForConditionalGeneration) -> tuple[int, int]:
    """Bytes of moments and of gradients that training needed rows alone saves against the whole embedding."""
    rows, width = model.get_input_embeddings().weight.shape
    numel = (rows - len(needed_rows(model.config))) * width
    return optimizer_bytes(numel), numel * _GRADIENT_BYTES


def describe(model: LlavaStForConditionalGeneration, trainables: list[Trainable], settings: StageSettings) -> str:
    """In plain words: what trains, at which rate, and what that costs."""
    total = sum(parameter.numel() for parameter in model.parameters())
    count = sum(each.numel for each in trainables)
    lines = [f"{settings.name}: {count:,} of {total:,} parameters train"]
    for each in trainables:
        what = "adapters on the language model's linear layers" if each.part == "lora" else each.part
        if each.part == "embedding" and settings.embedding_rows == "needed":
            what = f"{len(needed_rows(model.config))} rows of the embedding"
        lines.append(f"  {what}: {each.numel:,} at a rate of {each.rate:g}")
    lines.append(f"  AdamW's moments take {optimizer_bytes(count) / 1e6:,.1f} MB; under fsdp2 processes share them")
    if "embedding" in settings.train:
        moments, gradients = (f"{nbytes / 1e6:,.1f} MB of" for nbytes in saved_by_rows(model))
        saves = "saves" if settings.embedding_rows == "needed" else "would save"
        lines.append(f"  embedding_rows: needed {saves} {moments} moments and {gradients} gradients")
    return "\n".join(lines)


def _parameters(model: LlavaStForConditionalGeneration, part: str, settings: StageSettings) -> list[nn.Parameter]:
    inner, embedding = model.model, model.get_input_embeddings()
    if part == "lora":
        layers = [module for module in inner.language_model.modules() if isinstance(module, LoraLayer)]
        return [p for layer in layers for side in (layer.lora_A, layer.lora_B) for p in side.parameters()]
    if part == "language_model":
        return [p for p in inner.language_model.parameters() if p is not embedding.weight]
    if part == "embedding":
        rows = inner.trainable_rows
        needed = [] if rows is None else list(rows.parameters())
        return [embedding.weight] if settings.embedding_rows == "all" else needed
    modules = {"positions": inner.lape, "packer": inner.visual_tokenizer.packer, "head": model.lm_head}
    return list(modules.get(part, inner.visual_tokenizer.projector).parameters())
