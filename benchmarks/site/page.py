"""The page: sections, and what each record was made on."""

from __future__ import annotations

from pathlib import Path

from ..record import Record
from .archive import Archive
from .cases import kind_sections
from .markup import NONE, Markup, code, element, joined, number, paragraph, section, table
from .others import environment_of, other_sections
from .summary import changes_section, coverage_section, summary_section

_STYLE = Path(__file__).with_name("style.css")
_TITLE = "llava_st_ops: measured"


def page(archive: Archive, results: str) -> str:
    """HTML in one file, without scripts or anything from elsewhere. `results`: the records' folder as seen from it."""
    machines = [*archive.machines("cuda"), *archive.machines("cpu")]
    kinds = kind_sections(archive, machines)
    links = {"summary": "In short", "coverage": "Coverage"}
    links |= {kind: kind if "_" in kind else kind.capitalize() for kind in kinds}
    links |= {"model": "Model", "changes": "Changes", "method": "Method", "records": "Records"}
    items = [element("li", element("a", text, href=f"#{name}")) for name, text in links.items()]
    body = [
        element(
            "header",
            element("h1", _TITLE),
            paragraph(
                "Kernels for LLaVA-ST's point-to-region attention and language-aligned positions, beside the published "
                "modules and other ways to compute the same. Every figure is from a record, which is named beside it; ",
                code("make report"),
                f" makes this page from all {len(archive.runs) + len(archive.others)} records.",
            ),
        ),
        element("nav", element("ul", *items)),
        element(
            "main",
            summary_section(archive),
            coverage_section(archive),
            *kinds.values(),
            section("model", "Model, training and tests", *other_sections(archive.others)),
            changes_section(archive),
            _method(archive),
            _records(archive, results),
        ),
        element("footer", "Apache-2.0. No scripts, nothing loaded from elsewhere."),
    ]
    head = [
        Markup('<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'),
        element("title", _TITLE),
        element("style", Markup(_STYLE.read_text())),
    ]
    document = element("html", element("head", *head), element("body", *body), lang="en")
    return f"<!doctype html>\n{document}\n"


def _method(archive: Archive) -> Markup:
    timings = dict.fromkeys(
        f"{record['environment']['device_type'].upper()}: {record['settings']['timing']}."
        for record in archive.runs.values()
        if "timing" in record.get("settings", {})
    )
    return section(
        "method",
        "How it is measured",
        element(
            "ul",
            element("li", "Implementations of a case take turns; medians, p10 and p90."),
            *(element("li", timing) for timing in timings),
            element("li", "Parity: at most twice the error of PyTorch in the same dtype, and one rounding step."),
            element(
                "li",
                "The limit: of what moves bytes, the fastest of some kernels that move the case's bytes and do nothing "
                "else; of what multiplies matrices, the rate of one large product. Above 100 %: faster than all these.",
            ),
            element("li", "Peak memory: growth during a call, above its inputs and weights."),
            element("li", "Allocators: torch's as it comes, and with THP_MEM_ALLOC_ENABLE=1, for all implementations."),
            element("li", "Faster, level, slower: whether the ranges from p10 to p90 overlap."),
        ),
    )


def _records(archive: Archive, results: str) -> Markup:
    rows = [_record(file, record, results) for file, record in (archive.runs | archive.others).items()]
    header = ["record", "commit", "date", "device", "threads", "load", "torch", "made by"]
    return section("records", "Records", table("Records", header, rows, texts=2))


def _record(file: str, record: Record, results: str) -> list[str]:
    found = environment_of(record)
    commit, _, changed = found.get("commit", NONE).partition("+")
    cpu, versions = found.get("cpu", {}), found.get("versions", {})
    link = element("a", file, href=f"{results}/{file}")
    return [
        element("span", link, id=f"record-{file}"),
        joined(code(commit[:12]), " with changes" if changed else ""),
        found.get("date", NONE)[:16].replace("T", " "),
        found.get("device", NONE),
        f"{cpu.get('torch_threads', NONE)}",
        number(cpu.get("load_average_1min"), "{:.1f}"),
        versions.get("torch") or found.get("torch", NONE),
        element("code", " ".join(found.get("command", [NONE]))),
    ]
