"""What reading and decoding videos costs training: steps on a data set of files, and on the same batches in memory.

`python -m benchmarks.training_throughput` measures on the CPU, writes `benchmarks/results/training_throughput.json`,
and makes the table of docs/training.md anew from it (`--report` does that alone).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from llava_st.data.collator import Collator, TrainingBatch
from llava_st.data.order import EpochSampler
from llava_st.data.training import MediaLoader, TrainingData
from llava_st.modeling_llava_st import LlavaStForConditionalGeneration
from llava_st.reproduction.recipe import texts
from llava_st.reproduction.start import shapes_processor
from llava_st.synthesis import synthesize
from torch.utils.data import DataLoader

from .environment import ROOT, describe
from .measure import summarise
from .pages import measure_command, replace_part

RECORD = ROOT / "benchmarks" / "results" / "training_throughput.json"
PAGE = ROOT / "docs" / "training.md"
BATCH, WORKERS = 8, 2
# Of a round: workers that have read ahead while nothing was timed must not help those that are.
UNTIMED, STEPS, ROUNDS = 4, 8, 5


def measure_steps() -> dict[str, Any]:
    """Milliseconds of a step of the reproduction's model, forward and backward, by where batches come from."""
    config, processor = shapes_processor(texts(100))
    model = LlavaStForConditionalGeneration(config).train()
    with tempfile.TemporaryDirectory() as folder:
        path = synthesize(folder, BATCH * (UNTIMED + STEPS + 2 * WORKERS), tasks=("stvg",), turns=4)
        data = TrainingData(path, None, MediaLoader.of(processor))
        collator = Collator(processor)
        sampler = EpochSampler(len(data), seed=0)
        loader = DataLoader(
            data, BATCH, sampler=sampler, collate_fn=collator, num_workers=WORKERS, persistent_workers=True
        )
        cached = list(islice(loader, UNTIMED + STEPS))
        tokens = sum(int(batch["attention_mask"].sum()) for batch in cached[UNTIMED:])
        samples: dict[str, list[float]] = {"files": [], "memory": []}
        for _ in range(ROUNDS):
            for name, batches in (("files", loader), ("memory", cached)):
                samples[name].append(_seconds(model, iter(batches)) / STEPS * 1e3)
    return {
        **{name: summarise(times) for name, times in samples.items()},
        "batch": BATCH,
        "steps": STEPS,
        "workers": WORKERS,
        "tokens_per_step": tokens / STEPS,
    }


def _seconds(model: torch.nn.Module, batches: Iterator[TrainingBatch]) -> float:
    """Of the steps after the first ones."""
    start = 0.0
    for step, batch in enumerate(islice(batches, UNTIMED + STEPS)):
        if step == UNTIMED:
            start = time.perf_counter()
        model(**batch).loss.backward()
        model.zero_grad()
    return time.perf_counter() - start


def table(record: dict[str, Any]) -> str:
    environment, found = record["environment"], record["steps"]
    share = found["files"]["median_ms"] / found["memory"]["median_ms"] - 1
    rows = [
        f"**{environment['device']}**, {environment['cpu']['torch_threads']} threads and {found['workers']} workers, "
        f"load average at the start {environment['cpu']['load_average_1min']:.1f}, torch "
        f"{environment['versions']['torch']}, {environment['date'][:10]}, commit {environment['commit'][:12]}; "
        f"`benchmarks/results/{RECORD.name}`. A step of the [reproduction](reproduction.md)'s model, forward and "
        f"backward, {found['batch']} videos and {found['tokens_per_step']:,.0f} tokens:",
        "",
        "| batches come from | median, ms | p10..p90 |",
        "|---|---:|---:|",
    ]
    for name, meaning in (("memory", "memory"), ("files", "files, decoded by the workers")):
        times = found[name]
        rows.append(f"| {meaning} | {times['median_ms']:.0f} | {times['p10_ms']:.0f}..{times['p90_ms']:.0f} |")
    verdict = "met" if share <= 1 / 3 else "missed"
    rows += ["", f"Files cost {share:.0%} more (wanted: a third at most, {verdict})."]
    return "\n".join(rows)


def page(text: str, record: dict[str, Any]) -> str:
    return replace_part(text, "throughput", table(record))


def measure() -> dict[str, Any]:
    return {"environment": describe(torch.device("cpu")), "steps": measure_steps()}


def main(arguments: Sequence[str] | None = None) -> int:
    return measure_command(arguments, __doc__, measure, RECORD, page, PAGE)


if __name__ == "__main__":
    sys.exit(main())
