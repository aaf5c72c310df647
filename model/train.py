"""`python -m llava_st.train`: trains a stage of LLaVA-ST. See docs/training.md."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .data.failures import TooManyFailuresError
from .training.errors import NonFiniteLossError
from .training.settings import published_stages, read_settings


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    changes = list(options.set)
    if options.deepspeed is not None:
        changes.append(f"deepspeed={options.deepspeed}")  # which the settings refuse
    if options.packer_between_stages:
        changes.append(f"packer_between_stages={options.packer_between_stages}")
    try:
        settings = read_settings(options.stage, changes)
        evaluate = _evaluator(options) if options.evaluate else None
        from .training.run import run_stage

        data = options.data or _synthesized(options.out / "data", options.clips, settings.seed)
        print(run_stage(settings, options.model, data, options.out, options.folder, evaluate))
    except (OSError, ValueError, NonFiniteLossError, TooManyFailuresError) as error:
        print(f"train: {error}", file=sys.stderr)
        return 1
    return 0


def _synthesized(folder: Path, clips: int, seed: int) -> Path:
    """Rendered clips of moving shapes, where no data are named. One process renders, the others wait."""
    from .processes import patient_processes
    from .synthesis import synthesize

    processes = patient_processes()
    with processes.main_process_first():
        if processes.is_main_process:  # clips that are there stay as they are
            synthesize(folder, clips=clips, seed=seed)
    return folder / "train.yaml"


def _evaluator(options: argparse.Namespace) -> Callable[..., Any]:
    """A function by its name, or benchmarks by their files."""
    if "=" not in options.evaluate[0]:
        if len(options.evaluate) > 1:
            raise ValueError(f"evaluate: expected one module:function, got {options.evaluate}")
        return _function(options.evaluate[0])
    from .evaluation.evaluator import Evaluator

    files = dict(each.partition("=")[::2] for each in options.evaluate)
    media = options.evaluate_media or Path(next(iter(files.values()))).parent
    return Evaluator(files, media, options.evaluate_limit)


def _function(name: str) -> Callable[..., Any]:
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"evaluate: expected module:function, got {name!r}")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"evaluate: {name}: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava_st.train", description=__doc__)
    parser.add_argument("stage", help=f"a YAML file, or one of {', '.join(published_stages())}")
    parser.add_argument("--model", required=True, help="a folder of llava_st.convert or of another stage; or tiny")
    parser.add_argument("--out", type=Path, required=True, help="for checkpoints and the model; a run there goes on")
    parser.add_argument("--data", type=Path, help="YAML, or a file of records; by default clips are rendered")
    parser.add_argument("--folder", type=Path, help="of the media, where --data is a file of records")
    parser.add_argument("--clips", type=int, default=100, help="how many are rendered where there are no --data")
    parser.add_argument("--packer-between-stages", choices=("keep", "reset"), help="published: reset")
    parser.add_argument(
        "--evaluate",
        nargs="+",
        metavar="TASK=FILE",
        help="benchmarks to report scores of; or MODULE:FUNCTION, called with model, processor and step",
    )
    parser.add_argument("--evaluate-media", type=Path, help="of those benchmarks; by default where the first file is")
    parser.add_argument("--evaluate-limit", type=int, help="only the first so many records of each benchmark")
    parser.add_argument("--deepspeed", help=argparse.SUPPRESS)
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="settings other than in the YAML"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
