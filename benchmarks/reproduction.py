"""Trains a small LLaVA-ST from nothing on moving shapes, and proves what it has learned.

`python -m benchmarks.reproduction train` trains one seed, writes its record and a checkpoint in half precision.
`ablate` trains the recipe with one idea changed at a time; `report` makes docs/reproduction.md anew from the records.
What was cut off goes on. Started by torchrun, processes share the work.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llava_st.evaluation.evaluator import Evaluator
from llava_st.pipeline import LlavaStPipeline
from llava_st.processes import patient_processes
from llava_st.reproduction import CHECKPOINT
from llava_st.reproduction.arms import ARMS, Arm
from llava_st.reproduction.proving import BATCH, LONGEST_ANSWER, prove
from llava_st.reproduction.recipe import STAGES, Budget, train
from llava_st.synthesis import synthesize
from llava_st.training.checkpoints import last_checkpoint

from . import reproduction_report as report
from .environment import ROOT, describe

FOLDER = ROOT / "build" / "reproduction"
CLIPS = 2_000
_PUBLISHED_SEED = 0  # whose checkpoint comes along, with its pictures
# Tubes take the longest. With 750 for places and 600 for tubes the baseline stayed below a constant answer.
ABLATION = Budget({"names": 1_500, "places": 1_500, "tubes": 1_000}, tower_clips=1_500, tower_steps=3_000)
# Of the clips that a record's scores are of; those of training have the run's own seed, and another split.
PROOF_SEED, PROOF_CLIPS, ABLATION_PROOF_CLIPS = 1_000, 200, 100
UNTRAINED_CLIPS = 20  # that the starting values are asked about: they hardly ever make a sentence
_VALIDATION_CLIPS = 64
# What is asked during training, and which numbers of a step are kept: "eval/stvg m_tIoU" by its last word.
_ASKED = {"names": ("rec",), "places": ("tvg", "rec"), "tubes": ("stvg",)}
_KEPT = ("step", "loss", "tokens_per_second", "waiting_for_data", "mIoU", "Acc@0.5", "m_tIoU", "m_sIoU", "m_vIoU")


def run(
    out: Path, budget: Budget, seed: int, arm: Arm, proof_clips: int, shared: Path | None = None
) -> tuple[LlavaStPipeline, dict[str, Any]] | None:
    """Trains and proves. In the main process: the model, and a record of it. `shared`: see `train`."""
    start = time.time()
    state = patient_processes()
    validation = (shared or out) / "validation"
    with state.main_process_first():
        synthesize(validation, _VALIDATION_CLIPS, seed, split="validation")
    evaluate = {
        stage.name: Evaluator(
            {task: validation / "benchmark" / f"{task}.json" for task in _ASKED[stage.name]},
            validation,
            batch_size=BATCH,
            max_new_tokens=LONGEST_ANSWER,
        )
        for stage in STAGES
    }
    folder = train(out, budget, seed, arm, evaluate, shared=shared)
    if not state.is_main_process:
        return None
    pipeline = LlavaStPipeline.from_pretrained(folder, dtype="float32")
    if arm.adapt is not None:
        arm.adapt(pipeline.model)
    record = {
        "environment": describe(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "processes": state.num_processes,
        "seed": seed,
        "clips": dict(budget.clips),
        "tower": {"clips": budget.tower_clips, "steps": budget.tower_steps},
        "parameters": sum(parameter.numel() for parameter in pipeline.model.parameters()),
        "seconds_of_last_call": time.time() - start,
        "curves": {stage.name: _curve(out / stage.name) for stage in STAGES},
        "proof": {"seed": PROOF_SEED, "clips": proof_clips},
    }
    record["proof"] |= prove(pipeline, out / "proof", PROOF_SEED, proof_clips)
    return pipeline, record


def _curve(folder: Path) -> list[dict[str, float]]:
    """What a stage reported, by step."""
    history = json.loads((last_checkpoint(folder) / "trainer_state.json").read_text())["log_history"]
    return [{name: value for name, value in entry.items() if name.split()[-1] in _KEPT} for entry in history]


def save_checkpoint(pipeline: LlavaStPipeline, folder: Path) -> None:
    """In half precision, which the pipeline then has, too."""
    shutil.rmtree(folder, ignore_errors=True)
    pipeline.model.half().save_pretrained(folder)
    pipeline.processor.save_pretrained(folder)


def _train(options: argparse.Namespace) -> None:
    out = options.out / f"seed{options.seed}-{options.clips}"
    found = run(out, Budget.of(options.clips), options.seed, ARMS["baseline"], PROOF_CLIPS)
    if found is not None:
        pipeline, record = found
        untrained = LlavaStPipeline.from_pretrained(out / "start", dtype="float32")
        record["untrained"] = {"clips": UNTRAINED_CLIPS}
        record["untrained"] |= prove(untrained, out / "untrained", PROOF_SEED, UNTRAINED_CLIPS)["a"]
        published = options.seed == _PUBLISHED_SEED
        checkpoint = options.checkpoint or (CHECKPOINT if published else out / "checkpoint")
        save_checkpoint(pipeline, checkpoint)
        report.write(f"seed{options.seed}", record)
        if published:
            report.draw_answers(LlavaStPipeline.from_pretrained(checkpoint, dtype="float32"))


def _ablate(options: argparse.Namespace) -> None:
    budget = ABLATION if options.clips is None else Budget.of(options.clips)
    for seed in options.seeds:
        shared = options.out / "-".join(map(str, ("ablation", seed, *budget.clips.values())))
        for name in options.arms:
            record_name = f"ablation-{name.replace(' ', '-')}-{seed}"
            if report.path(record_name).exists():
                continue
            out = options.out / record_name
            if (found := run(out, budget, seed, ARMS[name], ABLATION_PROOF_CLIPS, shared)) is not None:
                report.write(record_name, {"arm": name, **found[1]})
                shutil.rmtree(out)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="for clips and checkpoints; default: %(default)s")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--clips", type=int, default=CLIPS, help="see Budget.of; default: %(default)s")
    training.add_argument("--checkpoint", type=Path, help="default: of seed 0 the one that comes along, else in --out")
    ablation = commands.add_parser("ablate")
    ablation.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    ablation.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    ablation.add_argument("--clips", type=int, help="as for train; default: ABLATION, fewer than that")
    commands.add_parser("report")
    options = parser.parse_args(arguments)
    if options.command == "train":
        _train(options)
    elif options.command == "ablate":
        _ablate(options)
    if patient_processes().is_main_process:
        report.make_page()
    return 0


if __name__ == "__main__":
    sys.exit(main())
