"""Three stages on moving shapes, from nothing to a model that says when and where things are."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..processes import patient_processes
from ..synthesis import make_records, make_scene, synthesize
from ..training.run import Evaluate, run_stage
from ..training.settings import read_settings
from .arms import ARMS, Arm
from .start import write_start, write_tower

_STAGES = Path(__file__).parent / "stages"
_SAMPLES_OF_A_STEP = 16
_TEXT_CLIPS = 300  # whose questions and answers the tokenizer learns its words from
_START_CLIPS = 200  # that the projector learns from before the first stage


@dataclass(frozen=True)
class Stage:
    """What a stage asks.

    Attributes:
        name: of its YAML in `stages/`.
        tasks: see `make_records`.
        objects: the fewest and most in a clip.
        questions: about a clip.
        longest_tube: see `make_records`.
    """

    name: str
    tasks: tuple[str, ...]
    objects: tuple[int, int]
    questions: int
    longest_tube: int | None = None

    @property
    def yaml(self) -> Path:
        return _STAGES / f"{self.name}.yaml"


# Pictures come first: they take less time than videos, and what is learned of names holds in both.
STAGES = (
    Stage("names", ("rec", "reg"), (1, 3), 12),
    Stage("places", ("tvg", "svg", "svg", "rec"), (1, 3), 12, longest_tube=1),
    Stage("tubes", ("stvg", "svg", "elc", "tvg"), (1, 4), 5),
)


@dataclass(frozen=True)
class Budget:
    """How much is spent.

    Attributes:
        clips: stage -> clips that are made for it.
        tower_clips: of the first stage's, how many the tower learns from.
        tower_steps: of 64 frames each.
    """

    clips: Mapping[str, int]
    tower_clips: int
    tower_steps: int

    @classmethod
    def of(cls, clips: int) -> Budget:
        """Of so many clips in each stage."""
        return cls({stage.name: clips for stage in STAGES}, tower_clips=clips, tower_steps=2 * clips)


def train(
    out: Path,
    budget: Budget,
    seed: int,
    arm: Arm = ARMS["baseline"],
    evaluate: Mapping[str, Evaluate] | None = None,
    report: Callable[[str], None] = print,
    shared: Path | None = None,
) -> Path:
    """Trains through all stages, going on where an earlier call was cut off; the folder of the last stage's model.

    Several processes that torchrun started share each step. On a CPU processes of one thread each are faster than one
    process of several threads, which wait for each other in every small operation.

    Args:
        out: for checkpoints and models.
        budget: how much is spent.
        seed: of the data and of everything random.
        arm: what is changed.
        evaluate: stage -> see `run_stage`.
        report: gets lines of progress.
        shared: for clips and the tower, which arms of the same budget and seed have in common; by default `out`.

    Raises:
        ValueError: the processes cannot share a step evenly, or `out` has a run with other settings.
    """
    state = patient_processes()
    if _SAMPLES_OF_A_STEP % state.num_processes:
        raise ValueError(f"processes: expected a divisor of {_SAMPLES_OF_A_STEP}, got {state.num_processes}")
    batch = f"batch_size={_SAMPLES_OF_A_STEP // state.num_processes}"
    shared, model = shared or out, out / "start"
    for stage in STAGES:
        target = out / stage.name
        if not (target / "model").exists():
            settings = read_settings(stage.yaml, [f"seed={seed}", batch, *arm.settings])
            with state.main_process_first():  # the others find that all is there
                data = _render(stage, shared, budget, seed, report)
                if not model.exists():
                    tower = shared / "tower.safetensors"
                    _write_start(model, tower, data.parent, budget, seed, report, arm.configuration)
            run_stage(settings, model, data, target, evaluate=(evaluate or {}).get(stage.name), adapt=arm.adapt)
        model = target / "model"
    return model


def _render(stage: Stage, shared: Path, budget: Budget, seed: int, report: Callable[[str], None]) -> Path:
    """The YAML of a stage's data; stages with as many objects share clips."""
    fewest, most = stage.objects
    folder, clips = shared / f"clips-{fewest}-{most}", budget.clips[stage.name]
    path = folder / f"{stage.name}.yaml"
    if not path.exists():
        report(f"{stage.name}: renders {clips} clips")
        synthesize(
            folder,
            clips,
            seed,
            tasks=stage.tasks,
            objects=stage.objects,
            questions_per_clip=stage.questions,
            turns=stage.questions,
            longest_tube=stage.longest_tube,
            mixed=True,
            name=stage.name,
        )
    return path


def _write_start(
    model: Path,
    tower: Path,
    folder: Path,
    budget: Budget,
    seed: int,
    report: Callable[[str], None],
    changes: Mapping[str, Any],
) -> None:
    def progress(step: int, scores: dict[str, float]) -> None:
        numbers = ", ".join(f"{name} {value:.3f}" for name, value in scores.items())
        report(f"tower: step {step} of {budget.tower_steps}: {numbers}")

    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, patient_processes().num_processes))  # the other processes wait
    objects = STAGES[0].objects
    scenes = [make_scene(seed, "train", clip, objects=objects) for clip in range(budget.tower_clips)]
    words = texts(_TEXT_CLIPS)
    if not tower.exists():
        write_tower(tower, folder, scenes, words, seed, budget.tower_steps, progress)
    write_start(model, tower, folder, scenes[:_START_CLIPS], words, seed, **changes)
    torch.set_num_threads(threads)


def texts(clips: int) -> list[str]:
    """All that is said about so many clips."""
    records = [record for clip in range(clips) for record in make_records(make_scene(0, "train", clip), questions=100)]
    return [turn["value"] for record in records for turn in record["conversations"]]
