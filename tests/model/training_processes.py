"""One of several processes that train together; the first writes what became of each run."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from llava_st.training.run import run_stage
from llava_st.training.trainer import StageTrainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.model.training_records import make_record, write_records
from tests.model.training_runs import SETTINGS, first_gradients, losses, tiny_trainer

# name -> how the same steps of 8 samples are dealt out, and what else is not as it is by default.
RUNS = {
    "paper": {"batch_size": 2, "accumulation": 2},
    "released": {"batch_size": 2, "accumulation": 2, "compat": "released"},
    "uneven": {"batch_size": 1, "accumulation": 2, "size": 5},  # one process has nothing in the last step
    "uneven released": {"batch_size": 2, "size": 7, "compat": "released", "positions": False, "train": ("packer",)},
    "mixed": {"batch_size": 1, "accumulation": 1, "size": 6},
    "fsdp2": {"batch_size": 2, "accumulation": 2, "sharding": "fsdp2"},
    "fsdp2 mixed": {"batch_size": 1, "accumulation": 1, "size": 6, "sharding": "fsdp2"},
    "fsdp2 adapters": {
        "batch_size": 4,
        "sharding": "fsdp2",
        "train": ("packer", "positions", "embedding"),
        "lora_rank": 4,
        "lora_alpha": 8.0,
    },
}


BF16 = {"batch_size": 4, "bf16": True, "train": ("packer", "positions"), "lora_rank": 4, "lora_alpha": 8.0}


def write_stage(out: Path) -> None:
    """What `stage` trains on."""
    out.mkdir(exist_ok=True)
    records = [make_record(("Where?",), ("there " * (i + 1),), id=str(i), video=None) for i in range(4)]
    write_records(out / "records.json", records)


def stage(out: Path, **changes: Any) -> Path:
    """Two steps of a stage, from a file of records to the model that the next one begins with."""
    return run_stage(dataclasses.replace(SETTINGS, **changes), "tiny", out / "records.json", out)


def _trained(trainer: StageTrainer) -> StageTrainer:
    trainer.train()
    return trainer


def _encode(model: nn.Module, step: int) -> dict[str, Tensor]:
    tokens = model.encode(pixel_values_videos=torch.ones(10, 3, 36, 36), video_frames=torch.tensor([10]))
    return {"finite": tokens.isfinite().all()}


def train_as(rank: int, port: int, out: Path) -> None:
    """What a process does."""
    torch.set_num_threads(1)
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ.update(world, RANK=str(rank), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo")
    found = {}
    for name, changes in RUNS.items():
        values, gradients = first_gradients(Path(tempfile.mkdtemp()), **changes)
        found[name] = values
        torch.save(gradients, out / f"{name}.{dist.get_rank()}.pt")
    found["bf16"] = losses(_trained(tiny_trainer(Path(tempfile.mkdtemp()), **BF16, sharding="fsdp2")))
    options = {"batch_size": 4, "sharding": "fsdp2"}
    evaluated = _trained(tiny_trainer(Path(tempfile.mkdtemp()), **options, evaluate=_encode, eval_steps=1))
    found["evaluated"] = [entry["eval/finite"] for entry in evaluated.state.log_history if "eval/finite" in entry]
    found["after evaluations"] = losses(evaluated)
    folder = out / "resumed"
    trainer = _trained(tiny_trainer(folder, batch_size=4, epochs=2, sharding="fsdp2", save_steps=1, keep=9))
    again = tiny_trainer(folder, batch_size=4, epochs=2, sharding="fsdp2")
    again.train(resume_from_checkpoint=str(folder / "checkpoint-3"))  # in the middle of the second epoch
    found["resumed"] = [losses(trainer), losses(again)]
    stage(out / "stage", batch_size=1, sharding="fsdp2")
    parameters = dict(again.model.named_parameters())
    found["plain"] = [name for name, p in parameters.items() if not isinstance(p, DTensor)]
    if dist.get_rank() == 0:
        (out / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()
