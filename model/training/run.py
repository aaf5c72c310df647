"""A stage from its settings to a trained model."""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import nn

from ..configuration_llava_st import LlavaStConfig
from ..data.collator import Collator
from ..data.training import MediaLoader, TrainingData
from ..modeling_llava_st import LlavaStForConditionalGeneration
from ..processing_llava_st import LlavaStProcessor
from ..tiny import tiny_model, tiny_processor
from .checkpoints import last_checkpoint
from .export import export
from .settings import StageSettings
from .sharding import refuse_other_sharding, shard
from .trainable import describe, prepare, reset_packer
from .trainer import StageTrainer

# What may differ between a run and the one it goes on from. `StageTrainer` sees to it that samples of a step do not.
_FREE = (
    "workers",
    "save_steps",
    "keep",
    "log_steps",
    "eval_steps",
    "max_failure_share",
    "batch_size",
    "accumulation",
    "sharding",
)
_PICKED = 64  # values of each parameter
Evaluate = Callable[[LlavaStForConditionalGeneration, LlavaStProcessor, int], Mapping[str, float]]


def run_stage(
    settings: StageSettings,
    model_path: str | Path,
    data_path: str | Path,
    out: Path,
    folder: str | Path | None = None,
    evaluate: Evaluate | None = None,
    adapt: Callable[[LlavaStForConditionalGeneration], None] | None = None,
) -> Path:
    """Trains a stage, going on from the last complete checkpoint in `out`.

    Args:
        model_path: a folder of `save_pretrained`, `llava_st.convert` or another stage (`OUT/model`); `"tiny"`: the
            random model of tests.
        data_path, folder: see `TrainingData`.
        out: gets `checkpoint-*`, `skipped.jsonl`, `training.png` and, at the end, `model`.
        evaluate: called with model, processor and step every `settings.eval_steps` steps; gives numbers to report.
        adapt: changes the model that was loaded; what it changes is not exported, but for values of parameters.

    Returns:
        The trained model's folder.

    Raises:
        ValueError: accelerate is to shard, settings or model are not those of the run that `out` has, or do not fit
            each other.
        FileExistsError: the stage is done.
    """
    refuse_other_sharding()
    if (out / "model").exists():
        raise FileExistsError(f"{out / 'model'}: is there already, the stage is done")
    state = PartialState(cpu=not torch.cuda.is_available())
    model, processor = load(model_path, settings)
    if state.is_main_process:
        _check_settings(settings, model, out)
    if adapt is not None:
        adapt(model)
    if settings.packer_between_stages == "reset" and "packer" in settings.train:  # else it is to be used as it is
        reset_packer(model, settings.seed)
    trainables = prepare(model, settings)
    if state.is_main_process:
        print(describe(model, trainables, settings), flush=True)
    if settings.sharding == "fsdp2":
        if state.num_processes == 1:
            raise ValueError("sharding: fsdp2 wants several processes, started with torchrun; got one")
        shard(model.to(state.device), settings.bf16)
    data = TrainingData(
        data_path,
        folder,
        MediaLoader.of(processor),
        max_failure_share=settings.max_failure_share,
        report=out / "skipped.jsonl",
        seed=settings.seed,
    )
    collator = Collator(processor, settings.packed, settings.max_length, data.failures)
    evaluator = None if evaluate is None else _Evaluator(evaluate, processor)
    trainer = StageTrainer(model, settings, trainables, data, collator, out, evaluator)
    checkpoint = last_checkpoint(out)
    if checkpoint is not None and state.is_main_process:
        print(f"goes on from {checkpoint}", flush=True)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    trainer.plot()
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    export(trainer.model, processor, out / "model", dtype)
    return out / "model"


def load(path: str | Path, settings: StageSettings) -> tuple[LlavaStForConditionalGeneration, LlavaStProcessor]:
    """Model and processor that a stage begins with. Tables of positions that the model lacks are made."""
    if path == "tiny":
        return tiny_model(settings.seed, lape=settings.positions), tiny_processor()
    config = LlavaStConfig.from_pretrained(path)
    if config.lape and not settings.positions:
        raise ValueError(f"{path}: has positions already, and cannot train in a stage without")
    config.lape = settings.positions
    dtype = torch.bfloat16 if settings.bf16 else torch.float32
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model = LlavaStForConditionalGeneration.from_pretrained(path, config=config, dtype=dtype)
    return model, LlavaStProcessor.from_pretrained(path)


def _check_settings(settings: StageSettings, model: nn.Module, out: Path) -> None:
    """That `out` has no run of others, or of another model: checkpoints do not hold what does not train."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "settings.json"
    values = {**json.loads(json.dumps(dataclasses.asdict(settings))), "model_fingerprint": _fingerprint(model)}
    if path.exists() and any(out.glob("checkpoint-*")):
        before = json.loads(path.read_text())
        for name, value in values.items():
            if name not in _FREE and before.get(name) != value:
                raise ValueError(f"{name}: the run in {out} has {before.get(name)!r}, and cannot go on with {value!r}")
    else:
        path.write_text(json.dumps(values, indent=2) + "\n")


def _fingerprint(model: nn.Module) -> str:
    """Of names, shapes and some values of all parameters: other weights, other fingerprint."""
    checksum = 0
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        picked = values[:: max(1, len(values) // _PICKED)][:_PICKED].tolist()
        checksum = zlib.crc32(repr((name, tuple(parameter.shape), picked)).encode(), checksum)
    return f"{checksum:08x}"


@dataclasses.dataclass(frozen=True)
class _Evaluator:
    evaluate: Evaluate
    processor: LlavaStProcessor

    def __call__(self, model: nn.Module, step: int) -> Mapping[str, Any]:
        return self.evaluate(model, self.processor, step)
