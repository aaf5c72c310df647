"""What a stage of training does: one YAML file, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from ..yaml_files import read_yaml

PARTS = ("packer", "positions", "projector", "embedding", "language_model", "head")
STAGES = Path(__file__).parent / "stages"
_CHOICES = {
    "embedding_rows": ("all", "needed"),
    "packer_between_stages": ("keep", "reset"),
    "sharding": ("none", "fsdp2"),
    "lr_scheduler": ("cosine", "linear", "constant", "constant_with_warmup"),
}


@dataclass(frozen=True)
class StageSettings:
    """The settings of a stage. Those with a default need not be in the YAML.

    Attributes:
        name: of the stage, for reports.
        positions: whether the model has positions (LAPE); False in the first published stage.
        train: which parts of the model train, of `PARTS`. The vision tower never does.
        embedding_rows: `"all"` rows of the embedding, where it trains; `"needed"`: those alone that training can move
            (`needed_rows`).
        lora_rank: adapters on all linear layers of the language model; 0: none.
        lora_alpha, lora_dropout: likewise.
        learning_rate: of everything but adapters.
        lora_learning_rate: of adapters; None: `learning_rate`.
        learning_rates: part -> its own rate.
        batch_size: samples per process and micro-batch.
        accumulation: micro-batches of a step.
        epochs: passes over the data.
        max_steps: ends earlier; -1: no.
        lr_scheduler, warmup_ratio: of transformers.
        weight_decay, beta1, beta2, epsilon: of AdamW.
        clip: the largest norm of a gradient; 0: any.
        loss_samples: `compat="released"` alone, with positions: the published loss is a sum over a micro-batch, and so
            many times the mean over samples.
        bf16, tf32, gradient_checkpointing: see docs/training.md.
        packed: samples one after another in one row, without padding.
        max_length: tokens of a sample; longer ones are skipped and counted.
        workers: processes that load data, for each that trains.
        max_failure_share: of samples that may be skipped.
        seed: of all random choices.
        packer_between_stages: `"reset"`: the stage begins with a new packer, as published; `"keep"`: with the
            trained one.
        sharding: `"fsdp2"`: parameters are dealt out over processes.
        save_steps, keep: a checkpoint after so many steps; how many stay.
        log_steps, eval_steps: reports and evaluations after so many steps; an evaluation at the end, too, and 0: there
            alone.
    """

    name: str
    positions: bool
    train: tuple[str, ...]
    learning_rate: float
    batch_size: int
    accumulation: int
    embedding_rows: str = "all"
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0
    lora_learning_rate: float | None = None
    learning_rates: Mapping[str, float] = dataclasses.field(default_factory=dict)
    epochs: int = 1
    max_steps: int = -1
    lr_scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip: float = 1.0
    loss_samples: float = 1.0
    bf16: bool = True
    tf32: bool = True
    gradient_checkpointing: bool = True
    packed: bool = False
    max_length: int = 32768
    workers: int = 4
    max_failure_share: float = 0.01
    seed: int = 42
    packer_between_stages: str = "reset"
    sharding: str = "none"
    save_steps: int = 500
    keep: int = 2
    log_steps: int = 10
    eval_steps: int = 0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if unknown := [part for part in (*self.train, *self.learning_rates) if part not in PARTS]:
            raise ValueError(f"train, learning_rates: expected parts of {', '.join(PARTS)}, got {unknown[0]!r}")
        if "positions" in self.train and not self.positions:
            raise ValueError("train: has positions, but this stage has none (positions: false)")
        if self.lora_rank and "language_model" in self.train:
            raise ValueError("train: has language_model, which is frozen under adapters (lora_rank)")
        if not self.train and not self.lora_rank:
            raise ValueError("train: expected at least one part, or lora_rank, got neither")
        for name in ("batch_size", "accumulation", "epochs", "max_length", "save_steps", "keep", "log_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(f"max_steps: expected at least 1, or -1, got {self.max_steps}")
        for name in ("learning_rate", "loss_samples", "epsilon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)}")
        if (self.lora_rank > 0) != (self.lora_alpha > 0):
            raise ValueError(f"lora_alpha: expected it with lora_rank alone, got {self.lora_alpha}, {self.lora_rank}")

    def rate(self, part: str) -> float:
        """The learning rate of a part of the model, or of `"lora"`."""
        if part == "lora":
            return self.learning_rate if self.lora_learning_rate is None else self.lora_learning_rate
        return self.learning_rates.get(part, self.learning_rate)


def read_settings(path: str | PathLike[str], changes: Sequence[str] = ()) -> StageSettings:
    """A stage from YAML.

    Args:
        path: a file, or the name of a published stage: `content`, `coordinates` or `tasks`.
        changes: `name=value`, with values as in YAML, that replace what is in the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a key is unknown or missing, or a value is not as expected.
    """
    path = STAGES / f"{path}.yaml" if str(path) in published_stages() else Path(path)
    values = read_yaml(path)
    try:
        if not isinstance(values, dict):
            raise ValueError(f"expected keys and values, got {type(values).__name__}")
        for change in changes:
            key, equals, text = change.partition("=")
            if not equals:
                raise ValueError(f"set: expected name=value, got {change!r}")
            values[key] = yaml.safe_load(text)
        return from_mapping(values)
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error


def from_mapping(values: Mapping[str, Any]) -> StageSettings:
    """Settings from what YAML gave. Unknown keys are errors, and so are values of another type."""
    fields = {field.name: field for field in dataclasses.fields(StageSettings)}
    hints = get_type_hints(StageSettings)
    if "deepspeed" in values:
        raise ValueError(
            "deepspeed: not supported; `sharding: fsdp2` deals out parameters, gradients and moments (FSDP2)"
        )
    if unknown := sorted(map(str, values.keys() - fields.keys())):
        raise ValueError(f"{unknown[0]}: there is no such setting. There are {', '.join(fields)}")
    required = [name for name, field in fields.items() if _has_no_default(field)]
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"{missing[0]}: expected a value, got none")
    return StageSettings(**{name: _converted(name, value, hints[name]) for name, value in values.items()})


def published_stages() -> list[str]:
    return sorted(path.stem for path in STAGES.glob("*.yaml"))


def _has_no_default(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _converted(name: str, value: Any, hint: Any) -> Any:
    if get_origin(hint) is tuple:
        if isinstance(value, list) and all(isinstance(each, str) for each in value):
            return tuple(value)
    elif name == "learning_rates":
        if isinstance(value, dict):
            return {str(part): _number(f"{name}.{part}", rate) for part, rate in value.items()}
    elif hint is float or float in get_args(hint):
        return None if value is None and hint is not float else _number(name, value)
    elif (hint is bool or not isinstance(value, bool)) and isinstance(value, hint):
        return value
    raise ValueError(f"{name}: expected {getattr(hint, '__name__', hint)}, got {value!r}")


def _number(name: str, value: Any) -> float:
    try:  # YAML takes 1e-4, without a dot, for a string
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name}: expected a number, got {value!r}") from None


__all__ = ["PARTS", "StageSettings", "from_mapping", "published_stages", "read_settings"]
