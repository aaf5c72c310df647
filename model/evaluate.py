"""`python -m llava_st.evaluate`: asks a model about a benchmark, and scores its answers. See docs/evaluation.md."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from .evaluation.charades import Unit
from .evaluation.datasets import EVALUATED_TASKS, read_dataset
from .evaluation.predictions import FileInUseError, PredictionFileError, read_predictions, replace_file
from .evaluation.report import format_report
from .evaluation.runner import Processes, launched_processes, predict_all
from .evaluation.samples import Sample
from .evaluation.scoring import score
from .evaluation.st_align import PUBLISHED_LIMIT


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if not options.score_only and not (options.model and options.media):
        parser.error("--model and --media are needed, unless --score-only is given")
    limit = options.limit
    if limit is None and options.metrics == "published" and options.task in ("stvg", "svg", "elc"):
        limit = PUBLISHED_LIMIT
    out = options.out or Path(f"{options.task}-{options.data.stem}.jsonl")
    try:
        dataset = read_dataset(options.task, options.data, options.seed, options.timestamps)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    samples = dataset.first(limit)
    if not samples:
        parser.error("\n".join([f"{options.data}: has no usable records", *dataset.broken[:5]]))
    if not options.score_only:
        with launched_processes() as processes:
            try:
                _predict(options, samples, out, processes)
            except (OSError, PredictionFileError, FileInUseError) as error:
                parser.error(str(error))
            if processes.rank > 0:
                return 0
    try:
        report = score(dataset, read_predictions(out), options.metrics, limit)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    report = {**report, "data": str(options.data), "predictions": str(out)}
    replace_file(out.with_suffix(".report.json"), json.dumps(report, indent=2, ensure_ascii=False).encode() + b"\n")
    print(format_report(report), end="")
    return 0


def _predict(options: argparse.Namespace, samples: Sequence[Sample], out: Path, processes: Processes) -> None:
    from .evaluation.pipeline_predictor import PipelinePredictor
    from .pipeline import LlavaStPipeline

    device_map = options.device_map
    if device_map is None and processes.count > 1:  # not all of them into the memory of the host
        device_map = {"": processes.device}
    pipeline = LlavaStPipeline.from_pretrained(options.model, device_map=device_map)
    if device_map is None:
        pipeline.model.to(processes.device)
    out.parent.mkdir(parents=True, exist_ok=True)
    asked = {"decoder": options.decoder, "max_new_tokens": options.max_new_tokens}
    predict_all(
        samples,
        PipelinePredictor(pipeline, options.media, **asked),
        out,
        batch_size=options.batch_size,
        retry_errors=options.retry_errors,
        settings={
            "task": options.task,
            "data": hashlib.sha256(options.data.read_bytes()).hexdigest(),
            "model": options.model,
            "seed": options.seed,
            "timestamps": options.timestamps,
            **asked,
        },
        processes=processes,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava_st.evaluate", description=__doc__)
    parser.add_argument("--task", required=True, choices=EVALUATED_TASKS)
    parser.add_argument("--data", required=True, type=Path, help="the benchmark's file of annotations")
    parser.add_argument("--media", type=Path, help="the folder of its videos or images")
    parser.add_argument("--model", help="a folder of save_pretrained or of llava_st.convert")
    parser.add_argument("--out", type=Path, help="the file of predictions, continued where it exists; TASK-DATA.jsonl")
    parser.add_argument("--metrics", choices=("standard", "published"), default="standard")
    parser.add_argument("--limit", type=_positive, help="only the first so many records of the file")
    parser.add_argument("--score-only", action="store_true", help="score the predictions in --out; needs no model")
    parser.add_argument("--batch-size", type=_positive, default=1)
    parser.add_argument("--max-new-tokens", type=_positive, default=1024)
    parser.add_argument("--decoder", choices=("expectation", "anchor"), help="see LlavaStPipeline.ask_batch")
    parser.add_argument("--device-map", help="as in transformers, to spread one model over several GPUs: auto")
    parser.add_argument("--seed", type=int, default=0, help="of the wordings that are drawn for each record")
    parser.add_argument(
        "--timestamps", choices=get_args(Unit), default="auto", help="what Charades-STA's timestamps are"
    )
    parser.add_argument(
        "--retry-errors", action="store_true", help="ask again about media that were missing or could not be decoded"
    )
    return parser


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return number


if __name__ == "__main__":
    sys.exit(main())
