"""A tiny training: samples in memory, and a trainer for them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import torch
from llava_st.coordinate_text import write
from llava_st.data.collator import Collator
from llava_st.data.training import Sample
from llava_st.geometry import Box, Instant, TimeSpan
from llava_st.media import Media
from llava_st.tiny import tiny_model, tiny_processor
from llava_st.training import checkpoints
from llava_st.training.settings import StageSettings
from llava_st.training.sharding import shard, whole_tensor
from llava_st.training.trainable import prepare
from llava_st.training.trainer import StageTrainer
from torch.utils.data import Dataset
from transformers import TrainerCallback

SETTINGS = StageSettings(
    name="tiny",
    positions=True,
    train=("packer", "positions", "projector", "embedding", "language_model", "head"),
    learning_rate=1e-3,
    batch_size=4,
    accumulation=1,
    bf16=False,
    gradient_checkpointing=False,
    workers=0,
    log_steps=1,
    save_steps=1000,
)


class Samples(Dataset):
    """Sample i shows nothing, an image or a video, as `kinds` has it in turn."""

    def __init__(self, size: int, kinds: tuple[str, ...] = ("video", "image", "text")) -> None:
        self.size, self.kinds = size, kinds

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Sample:
        kind = self.kinds[index % len(self.kinds)]
        random = torch.Generator().manual_seed(index)
        a, b = torch.rand(2, generator=random).sort().values.tolist()
        answers = {"video": TimeSpan(a, b), "image": Box(a, a, b, b), "text": Instant(a)}
        question: list[Any] = [write([f"Where is {index}? ", Instant(b), " ", Box(a, a, b, b)], "input")]
        if kind != "text":
            frames = 10 if kind == "video" else 1
            pixels = torch.rand(frames, 3, 36, 36, generator=random) * 2 - 1
            media = Media(kind, 36, 36, tuple(map(float, range(frames))))
            question.insert(0, {"type": kind, kind: (pixels, media)})
        words = "yes " * int(torch.randint(1, 6, (), generator=random))
        answer = [write([words, answers[kind]], "output")]
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return Sample(index, kind, f"memory:{index}", turns)


def tiny_trainer(
    out: Path,
    size: int = 16,
    kinds: tuple[str, ...] = ("video", "image", "text"),
    compat: str = "paper",
    evaluate: Any = None,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> StageTrainer:
    settings = dataclasses.replace(SETTINGS, **changes)
    model = tiny_model(compat=compat, lape=settings.positions).to(dtype)
    trainables = prepare(model, settings)
    if settings.sharding == "fsdp2":
        shard(model, settings.bf16)
    data = Samples(size, kinds)
    collator = Collator(tiny_processor(compat=compat), packed=settings.packed, max_length=settings.max_length)
    return StageTrainer(model, settings, trainables, data, collator, out, evaluate)


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Starts processes from one that has imported what they need, which takes most of their time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.model.training_runs"])
    return context


def losses(trainer: StageTrainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Gradients(TrainerCallback):
    """Keeps the gradients of a trainer's first step, whole and by name."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == 0:
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    self.first[name.removeprefix("module.")] = whole_tensor(parameter.grad).clone()


def first_gradients(out: Path, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses of a run, and the gradients of its first step."""
    trainer = tiny_trainer(out, **{"clip": 0.0, **changes})
    gradients = Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    return losses(trainer), gradients.first


KILLED = {
    "train": ("packer", "positions", "embedding"),
    "lora_rank": 4,
    "lora_alpha": 8.0,
    "lora_dropout": 0.5,
    "batch_size": 2,
    "accumulation": 2,
    "epochs": 2,
    "save_steps": 1,
}


def train_until_killed(out: Path, die_in_write: int | None = None, size: int = 16) -> None:
    """Trains, going on from the last checkpoint; dies in the middle of writing the n-th file of tensors, if told to."""
    torch.set_num_threads(1)
    if die_in_write is not None:
        write, calls = checkpoints.write_safetensors, itertools.count(1)

        def dying(path: Path, *arguments: Any) -> None:
            write(path, *arguments)
            if next(calls) == die_in_write:
                os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        checkpoints.write_safetensors = dying
    trainer = tiny_trainer(out, size, **KILLED)
    checkpoint = checkpoints.last_checkpoint(out)
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))


def recorded_losses(out: Path) -> list[tuple[int, float]]:
    """Step and loss, from the last checkpoint."""
    state = json.loads((checkpoints.last_checkpoint(out) / "trainer_state.json").read_text())
    return [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
