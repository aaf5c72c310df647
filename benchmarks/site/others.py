"""The sections of records that are not made of cases: each knows what its record holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..record import Record
from .cases import source
from .markup import TIMES, Markup, element, joined, mebibytes, milliseconds, paragraph, spread, table, times

Rows = Sequence[Markup]


def _missing(what: str) -> list[Markup]:
    return [paragraph(element("span", "No record. ", class_="warn"), what)]


def model_costs(file: str, record: Record) -> Rows:
    decoding, tower = record["decoding"], record["tower"]
    published, ours = decoding["published"], decoding["ours"]
    rows = [
        [
            name,
            milliseconds(found["median_ms"]),
            spread(found["p10_ms"], found["p90_ms"]),
            times(published["median_ms"] / found["median_ms"]),
            mebibytes(found["allocated_bytes"]),
            mebibytes(tower[name]["peak_bytes"]),
        ]
        for name, found in (("published", published), ("ours", ours))
    ]
    header = [
        "",
        "a decode step, median",
        "p10..p90",
        f"{TIMES} published",
        "new tensors of a step",
        "peak of the tower",
    ]
    return [
        table("Costs of the model", header, rows),
        paragraph(
            f"Largest difference between the two: {decoding['largest_difference_of_logits']:.1e} (logits), "
            f"{tower['largest_difference']:.1e} (features of the tower). ",
            source(file),
            class_="quiet",
        ),
    ]


def training_throughput(file: str, record: Record) -> Rows:
    steps = record["steps"]
    share = steps["files"]["median_ms"] / steps["memory"]["median_ms"] - 1
    rows = [
        [name, milliseconds(steps[key]["median_ms"]), spread(steps[key]["p10_ms"], steps[key]["p90_ms"])]
        for key, name in (("memory", "memory"), ("files", "video files, decoded by workers"))
    ]
    return [
        table("Training throughput", ["batches come from", "a step, median", "p10..p90"], rows),
        paragraph(
            f"{steps['batch']} videos and {steps['tokens_per_step']:,.0f} tokens a step, {steps['workers']} workers: "
            f"reading and decoding make a step {share:.0%} longer. ",
            source(file),
            class_="quiet",
        ),
    ]


def synthesis(file: str, record: Record) -> Rows:
    speed, reading = record["speed"], record["speed"]["load_video"]
    rows = []
    for split, answers in record["constant"].items():
        scores = [[answer[score] for answer in answers] for score in ("m_tiou", "m_siou")]
        rows.append([split, *(f"{min(values):.3f} to {max(values):.3f}" for values in scores)])
    return [
        table("Synthetic clips", ["split", "m_tIoU of the best constant answer", "m_sIoU of it"], rows),
        paragraph(
            f"One thread makes {speed['clips_per_second']:.0f} clips a second; load_video takes "
            f"{milliseconds(reading['median_ms'])} ({spread(reading['p10_ms'], reading['p90_ms'])}). ",
            source(file),
            class_="quiet",
        ),
    ]


def folding_error(file: str, record: Record) -> Rows:
    rows = [
        [
            f"{row['regime']}, {row['dtype']}",
            f"{row['median_ratio']:.3f}",
            f"{row['largest_ratio']:.3f}",
            f"{len(row['folded'])}",
        ]
        for row in record["rows"]
    ]
    header = ["weights, dtype", "median of folded / direct", "largest", "draws"]
    return [
        table("Rounding errors of the folded path", header, rows),
        paragraph("Errors against float64; below 1 the folded path rounds less. ", source(file), class_="quiet"),
    ]


def record_memory(file: str, record: Record) -> Rows:
    found = record["growth"]
    return [
        paragraph(
            f"{found['records']:,} records of training data, {found['characters'] / 1e9:.1f} GB of text, take "
            f"{found['grown_bytes'] / 1e6:.0f} MB of resident memory and {found['seconds']:.0f} s. ",
            source(file),
        )
    ]


def mutation(file: str, record: Record) -> Rows:
    tests = record["tests with a mutant"]
    rows = [[name, f"{count}"] for name, count in tests.items()]
    return [
        paragraph(
            f"{record['caught']} of {record['mutants']} changes to the CUDA kernels were caught by the tests, "
            f"{record['caught'] / record['mutants']:.0%}. ",
            source(file),
        ),
        table("Mutants", ["the tests with a mutant", "mutants"], rows),
    ]


def walk_through(file: str, record: Record) -> Rows:
    rows = [[step["command"], f"{step['seconds']:.1f}"] for step in record["steps"]]
    seconds = sum(step["seconds"] for step in record["steps"])
    return [
        table("From an empty environment", ["step", "seconds"], rows),
        paragraph(f"README's steps, in {seconds / 60:.1f} minutes in all. ", source(file), class_="quiet"),
    ]


def reproduction(found: Mapping[str, Record]) -> Rows:
    """All runs: whole trainings, then arms of the ablation."""
    rows = []
    for file, record in found.items():
        proof = record["proof"]
        name = f"{record['arm']}, seed {record['seed']}" if "arm" in record else f"seed {record['seed']}"
        for who, meaning in (("a", "the model"), ("b", "shown another clip"), ("constant", "best constant answer")):
            if who in proof:
                rows.append([joined(name, " ", source(file)), meaning, *_scores(proof[who])])
    header = ["training", "answers of", "m_tIoU", "m_sIoU", "m_vIoU"]
    return [table("Trained on moving shapes", header, rows, texts=2)]


def _scores(of: Mapping[str, float]) -> list[str]:
    return [f"{of[score]:.3f}" for score in ("m_tiou", "m_siou", "m_viou")]


_KNOWN: dict[str, tuple[str, str, Callable[[str, Record], Rows]]] = {
    "model_costs.json": ("A decode step, and the vision tower", "python -m benchmarks.model_costs", model_costs),
    "training_throughput.json": (
        "Reading videos in training",
        "python -m benchmarks.training_throughput",
        training_throughput,
    ),
    "folding_error.json": ("Rounding of the folded path", "python -m benchmarks.folding_error", folding_error),
    "synthesis.json": ("Synthetic clips", "python -m benchmarks.synthesis", synthesis),
    "record_memory.json": ("A million training records", "python -m benchmarks.record_memory", record_memory),
    "walk_through.json": (
        "From an empty environment to a module of one's own",
        "python -m benchmarks.walk_through",
        walk_through,
    ),
    "mutation.json": ("Would the tests notice a wrong kernel?", "make mutate", mutation),
}
_REPRODUCTION = "reproduction-"


def other_sections(others: Mapping[str, Record]) -> list[Markup]:
    """One for each record that is known, present or missing, and the names of those that are not known."""
    parts = []
    for file, (title, command, make) in _KNOWN.items():
        found = make(file, others[file]) if file in others else _missing(f"{command} makes {file}.")
        parts.append(element("section", element("h3", title), *found, id=file.partition(".")[0]))
    trained = {file: record for file, record in others.items() if file.startswith(_REPRODUCTION)}
    parts.append(
        element(
            "section",
            element("h3", "What the model learns from moving shapes"),
            *(reproduction(trained) if trained else _missing("make reproduce makes them; it takes hours.")),
            id="reproduction",
        )
    )
    unknown = [file for file in others if file not in _KNOWN and file not in trained]
    if unknown:
        parts.append(paragraph("Records that this page cannot read: ", ", ".join(unknown), class_="warn"))
    return parts


def environment_of(record: Record) -> dict[str, Any]:
    """What a record says of where it was made; older ones have commit and date beside the numbers."""
    return record.get("environment", record)
