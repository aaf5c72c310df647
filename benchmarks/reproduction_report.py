"""Records of what was trained on moving shapes, and docs/reproduction.md, which is made from them."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from llava_st.coordinate_text import read
from llava_st.geometry import Box, Tube
from llava_st.reproduction.arms import ARMS
from llava_st.synthesis import make_scene, synthesize
from llava_st.synthesis.questions import STVG_QUESTION, video_file
from llava_st.synthesis.rendering import render
from llava_st.tasks import TASKS

from .environment import ROOT
from .pages import replace_part

RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "reproduction.md"
CURVES, ANSWERS = ROOT / "docs" / "reproduction-curves.png", ROOT / "docs" / "reproduction-answers.png"
SCORES = ("m_tiou", "m_siou", "m_viou")
SEEDS = (0, 1, 2)  # of each arm
# LLaVA-ST-7B on ST-Align's STVG, real videos: table of the paper (arXiv:2501.08282), which has no vIoU.
PAPER = {"m_tiou": 0.438, "m_siou": 0.228}
_ANSWERED = (1_001, (0, 1, 2, 3))  # seed of the clips whose answers are drawn, and which clips

Record = dict[str, Any]


def path(name: str) -> Path:
    return RESULTS / f"reproduction-{name}.json"


def write(name: str, record: Record) -> None:
    path(name).write_text(json.dumps(record, indent=1) + "\n")


def runs() -> list[Record]:
    """Of whole trainings, by seed."""
    found = [json.loads(file.read_text()) for file in RESULTS.glob("reproduction-seed*.json")]
    return sorted(found, key=lambda record: record["seed"])


def ablations() -> dict[str, dict[int, Record]]:
    """Arm -> seed -> record."""
    found: dict[str, dict[int, Record]] = {name: {} for name in ARMS}
    for file in sorted(RESULTS.glob("reproduction-ablation-*.json")):
        record = json.loads(file.read_text())
        found[record["arm"]][record["seed"]] = record
    return found


def make_page() -> None:
    """The page, and the curves."""
    PAGE.write_text(page(PAGE.read_text(), runs(), ablations()))
    if found := runs():
        _draw_curves(found[0])


def page(text: str, found: Sequence[Record], arms: dict[str, dict[int, Record]]) -> str:
    parts = [*(_run(record) for record in found), _arms(arms)]
    return replace_part(text, "figures", "\n\n".join(parts))


def _run(record: Record) -> str:
    environment, proof, clips = record["environment"], record["proof"], record["clips"]
    untrained = record["untrained"]
    means = {
        "constant": "the best answer that is the same for all clips",
        "a": "the model",
        "b": "the model, shown another clip",
    }
    rows = [
        f"**Seed {record['seed']}**: {record['parameters'] / 1e6:.2f} million parameters, of which the tower learned "
        f"from {record['tower']['clips']:,} clips and all others from "
        f"{', '.join(f'{count:,} ({name})' for name, count in clips.items())}. {environment['device']}, "
        f"{record['processes']} processes, torch {environment['versions']['torch']}, {environment['date'][:10]}, "
        f"commit {environment['commit'][:12]}; `benchmarks/results/{path('seed' + str(record['seed'])).name}`.",
        "",
        f"STVG on {proof['clips']} held-out clips (seed {proof['seed']}), from 0 to 1:",
        "",
        "| | m_tIoU | m_sIoU | m_vIoU |",
        "|---|---:|---:|---:|",
        *(
            f"| {meaning} | " + " | ".join(f"{proof[name][score]:.3f}" for score in SCORES) + " |"
            for name, meaning in means.items()
        ),
        f"| *the paper's 7B model on real videos, another task* | {PAPER['m_tiou']:.3f} | {PAPER['m_siou']:.3f} | - |",
        "",
        f"With its starting values the model has {untrained['m_tiou']:.3f}, {untrained['m_siou']:.3f} and "
        f"{untrained['m_viou']:.3f}, of {record['untrained']['clips']} of these clips.",
        "",
        f"Asked about another object of the same clip, its tube has a mean IoU of {proof['c']['new']:.3f} with that "
        f"object's, and of {proof['c']['old']:.3f} with the first one's.",
        "",
        *_verdicts(proof),
    ]
    return "\n".join(rows)


def _verdicts(proof: Record) -> Iterable[str]:
    """Gate and goal, and by how much they were met or missed."""
    a, b, constant, c = (proof[name] for name in ("a", "b", "constant", "c"))
    margins = {
        "temporal": min(a["m_tiou"] - b["m_tiou"], a["m_tiou"] - constant["m_tiou"]),
        "spatial": min(a["m_siou"] - b["m_siou"], a["m_siou"] - constant["m_siou"]),
        "asked": c["new"] - c["old"],
    }
    yield "| wanted | found | |"
    yield "|---|---:|---|"
    for what, margin in (
        ("m_tIoU 0.15 above both", margins["temporal"]),
        ("m_sIoU 0.15 above both", margins["spatial"]),
        ("the object asked about, 0.15 above the other", margins["asked"]),
    ):
        yield f"| {what} | {margin:+.3f} | {'met' if margin >= 0.15 else 'missed'} |"
    for score, goal in (("m_tiou", 0.6), ("m_siou", 0.5)):
        name = {"m_tiou": "m_tIoU", "m_siou": "m_sIoU"}[score]
        yield f"| goal: {name} of {goal} | {a[score]:.3f} | {'met' if a[score] >= goal else 'missed'} |"


def _arms(arms: dict[str, dict[int, Record]]) -> str:
    rows = [*_budget_of(arms), "| arm | | seeds | m_tIoU | m_sIoU | m_vIoU | asked |", "|---|---|---|---|---|---|---|"]
    for name, found in arms.items():
        missing = [str(seed) for seed in SEEDS if seed not in found]
        seeds = f"{len(found)}, missing {', '.join(missing)}" if missing else str(len(found))
        proofs = [record["proof"] for record in found.values()]
        numbers = [_spread([proof["a"][score] for proof in proofs]) for score in SCORES]
        numbers.append(_spread([proof["c"]["new"] for proof in proofs]))
        rows.append(f"| {name} | {ARMS[name].meaning} | {seeds} | {' | '.join(numbers)} |")
    return "\n".join([*rows, *_agreement(arms)])


def _agreement(arms: dict[str, dict[int, Record]]) -> Iterable[str]:
    """Whether the direct path learns as the folded one does: means as near as seeds of one arm are to each other."""
    shared = sorted(arms["baseline"].keys() & arms["direct"].keys()) if "baseline" in arms else []
    if len(shared) < 2:
        return
    yield ""
    for score, name in zip(SCORES, ("m_tIoU", "m_sIoU", "m_vIoU"), strict=True):
        folded, direct = ([arms[arm][seed]["proof"]["a"][score] for seed in shared] for arm in ("baseline", "direct"))
        apart = abs(statistics.mean(folded) - statistics.mean(direct))
        spread = max(max(values) - min(values) for values in (folded, direct))
        verdict = "agree" if apart <= spread else "differ"
        yield (f"Folded and direct {verdict} in {name}: {apart:.3f} apart, seeds of one arm up to {spread:.3f}. ")


def _budget_of(arms: dict[str, dict[int, Record]]) -> Iterable[str]:
    """What all arms have in common: how much they trained, and scores to hold theirs against."""
    records = [record for found in arms.values() for record in found.values()]
    if not records:
        return
    clips, proof = records[0]["clips"], records[0]["proof"]
    if any(record["clips"] != clips for record in records):
        raise ValueError("records of ablations: expected one number of clips, as arms are compared")
    each = ", ".join(f"{count:,} ({name})" for name, count in clips.items())
    yield (
        f"**Ablations**, each from {each} clips, fewer than above: means over seeds (smallest to largest), on "
        f"{proof['clips']} held-out clips. *Asked*: mean IoU with the tube of another object, asked about instead. The "
        f"best constant answer has {_scores(proof['constant'])}."
    )
    for seed, record in sorted(arms["baseline"].items()):
        yield f"The baseline of seed {seed}, shown another clip: {_scores(record['proof']['b'])}."
    yield ""


def _scores(of: dict[str, float]) -> str:
    return ", ".join(f"{of[score]:.3f}" for score in SCORES)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "missing"
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.3f}" + (f" ({low:.3f} to {high:.3f})" if len(values) > 1 else "")


def _draw_curves(record: Record) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.5), layout="constrained")
    done = 0
    for stage, entries in record["curves"].items():
        losses = [(done + entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
        left.plot(*zip(*losses, strict=True), label=stage)
        names = sorted({key for entry in entries for key in entry if key.startswith("eval/")})
        for name in names:
            points = [(done + entry["step"], entry[name]) for entry in entries if name in entry]
            right.plot(*zip(*points, strict=True), marker=".", label=name.removeprefix("eval/"))
        done += max(entry["step"] for entry in entries)
    left.set(xlabel="step", ylabel="loss", yscale="log", title="loss of each stage")
    right.set(xlabel="step", ylabel="percent", title="validation clips")
    left.legend()
    right.legend()
    figure.savefig(CURVES, dpi=100)
    plt.close(figure)


def draw_answers(pipeline: Any) -> None:
    """Frames of some held-out clips with the truth (dashed) and what the model says."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    seed, clips = _ANSWERED
    columns = range(0, 20, 2)
    figure, axes = plt.subplots(len(clips), len(columns), figsize=(12, 1.5 * len(clips)), layout="constrained")
    with tempfile.TemporaryDirectory() as folder:
        synthesize(folder, max(clips) + 1, seed, split="held-out")
        for row, clip in zip(axes, clips, strict=True):
            scene = make_scene(seed, "held-out", clip)
            shape, pictures = scene.objects[scene.asked], render(scene)
            said = _said(pipeline, Path(folder, video_file(scene)), shape.name, scene.frames)
            for each, frame in zip(row, columns, strict=True):
                each.imshow(pictures[frame])
                if shape.visible(frame):
                    _outline(each, shape.box(frame), pictures.shape[1], color="white", linestyle="--")
                for box in said.get(frame, []):
                    _outline(each, box, pictures.shape[1], color="red")
                each.set(xticks=[], yticks=[], title=f"{frame}")
            row[0].set_ylabel(shape.name, fontsize=8)
    figure.savefig(ANSWERS, dpi=80)
    plt.close(figure)


def _said(pipeline: Any, video: Path, name: str, frames: int) -> dict[int, list[Box]]:
    """Frame -> boxes of a model's answer."""
    content = [{"type": "video", "video": str(video)}, *TASKS["stvg"].prompt(STVG_QUESTION.format(name))]
    answer = pipeline.ask([{"role": "user", "unit": "fraction", "content": content}], "stvg")
    said: dict[int, list[Box]] = {}
    for part in read(answer.written).parts if answer.written else ():
        if isinstance(part, Tube):
            for time, box in zip(part.times, part.boxes, strict=True):
                said.setdefault(round(time * (frames - 1)), []).append(box)
    return said


def _outline(axes: Any, box: Box, size: int, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    corner, width, height = (box.left * size, box.top * size), box.right - box.left, box.bottom - box.top
    axes.add_patch(Rectangle(corner, width * size, height * size, fill=False, **style))
