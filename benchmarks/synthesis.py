"""What an answer scores that does not look at synthetic clips, and how fast these are made and read.

`python -m benchmarks.synthesis` writes `benchmarks/results/synthesis.json`, and makes the tables of docs/synthesis.md
anew from it (`--report` does that alone).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from llava_st.synthesis import constant_answer, synthesize
from llava_st.synthesis.questions import event_truth
from llava_st.synthesis.scenes import SPLITS, make_scene
from llava_st.video import load_video

from .environment import ROOT, describe
from .measure import summarise
from .pages import measure_command, replace_part

RECORD = ROOT / "benchmarks" / "results" / "synthesis.json"
PAGE = ROOT / "docs" / "synthesis.md"
SEEDS, SCENES, CLIPS = range(5), 300, 100


def constant_scores() -> dict[str, list[dict[str, float]]]:
    """Of each split, the scores of the best constant answer, a seed each."""
    found: dict[str, list[dict[str, float]]] = {}
    for split in SPLITS:
        for seed in SEEDS:
            scenes = (make_scene(seed, split, clip) for clip in range(SCENES))
            answer = constant_answer([event_truth(scene, scene.asked) for scene in scenes])
            found.setdefault(split, []).append({"m_tiou": answer.m_tiou, "m_siou": answer.m_siou})
    return found


def speed() -> dict[str, Any]:
    """On one thread: clips made per second, and the time to read one."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        synthesize(folder, clips=CLIPS, seed=0)
        made = CLIPS / (time.perf_counter() - start)
        files = sorted(Path(folder, "videos").iterdir())
        samples = []
        for file in files:
            start = time.perf_counter()
            load_video(file, 20, 96)
            samples.append((time.perf_counter() - start) * 1e3)
        size = sum(file.stat().st_size for file in files) / len(files)
    return {"clips_per_second": made, "load_video": summarise(samples), "bytes_per_clip": size}


def tables(record: dict[str, Any]) -> str:
    environment, quick = record["environment"], record["speed"]
    rows = [f"Means over {SCENES} clips, seeds 0 to {len(SEEDS) - 1}:", ""]
    rows += ["| split | m_tIoU | m_sIoU |", "|---|---|---|"]
    for split, answers in record["constant"].items():
        ranges = []
        for score in ("m_tiou", "m_siou"):
            values = [answer[score] for answer in answers]
            ranges.append(f"{min(values):.3f} to {max(values):.3f}")
        rows.append(f"| `{split}` | {' | '.join(ranges)} |")
    reading = quick["load_video"]
    rows += [
        "",
        f"**{environment['device']}**, one thread, load average at the start "
        f"{environment['cpu']['load_average_1min']:.1f}, {environment['date'][:10]}, "
        f"commit {environment['commit'][:12]},",
        f"`benchmarks/results/{RECORD.name}`: {quick['clips_per_second']:.0f} clips a second are rendered, encoded and",
        f"written; `load_video` takes {reading['median_ms']:.0f} ms ({reading['p10_ms']:.0f}..{reading['p90_ms']:.0f}) "
        f"for 20 frames, and a clip {quick['bytes_per_clip'] / 1e3:.0f} kB of the disk.",
    ]
    return "\n".join(rows)


def page(text: str, record: dict[str, Any]) -> str:
    return replace_part(text, "figures", tables(record))


def measure() -> dict[str, Any]:
    return {"environment": describe(torch.device("cpu")), "constant": constant_scores(), "speed": speed()}


def main(arguments: Sequence[str] | None = None) -> int:
    return measure_command(arguments, __doc__, measure, RECORD, page, PAGE)


if __name__ == "__main__":
    sys.exit(main())
