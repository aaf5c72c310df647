"""The page of all records and README's tables: what they say follows from the records, and nothing is left out."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest

from benchmarks import record as records
from benchmarks.environment import ROOT
from benchmarks.integration_workloads import AFTER, BEFORE
from benchmarks.measure import summarise
from benchmarks.site import __main__ as command
from benchmarks.site import integrations
from benchmarks.site.archive import Archive
from benchmarks.site.comparisons import changes, comparisons
from benchmarks.site.markup import TIMES as X
from benchmarks.site.page import page
from benchmarks.site.readme import tables

RESULTS = ROOT / "benchmarks" / "results"
CASE = "spatial 40 frames, forward, float32"
ROLES = {
    "ours, cpu": "ours",
    AFTER: "ours",
    "ours, other": "ours",
    "eager": "peer",
    "compiled": "peer",
    "floor: plain": "floor",
}


def measured(case, name, milliseconds, allocator="default", spread=0.1):
    found = {"case": case, "allocator": allocator, "implementation": name, "role": ROLES.get(name, "peer")}
    found |= {"reason_without_numbers": None, "peak_memory_bytes": 3 << 20}
    if found["role"] != "floor":
        found |= {"max_abs_error": 2e-6, "error_over_reference": 0.5, "within_tolerance": True}
    samples = [milliseconds * factor for factor in (1 - spread, 1.0, 1 + spread)]
    return found | {"samples_ms": samples, **summarise(samples)}


def described(name, **more):
    frames = re.search(r"(\d+) frames", name)
    found = {"name": name, "kind": "attention", "dtype": "float32", "mode": "forward", "reason": "why"}
    found |= {"baseline": "eager", "bytes_read": 3_000_000, "bytes_written": 1_000_000, "bytes_counted": "all"}
    return found | ({"frames": int(frames[1])} if frames else {}) | more


def run(date, times, device_type="cpu", threads=2, cases=None):
    """A record: case -> implementation -> ms."""
    environment = {
        "device": "A CPU" if device_type == "cpu" else "A GPU",
        "device_type": device_type,
        "cpu": {"torch_threads": threads, "instruction_set": "AVX2", "load_average_1min": 0.5},
        "versions": {"torch": "2.13.0"},
        "commit": f"{date[-2:]}00aa11bb22cc33",
        "date": f"{date}T01:02:03+00:00",
        "command": ["python", "-m", "benchmarks"],
    }
    return {
        "schema": records.SCHEMA,
        "environment": environment,
        "settings": {"timing": "wall clock"},
        "cases": [(cases or {}).get(name) or described(name) for name in times],
        "measurements": [measured(case, name, ms) for case, found in times.items() for name, ms in found.items()],
    }


def archive_of(folder, **files):
    for name, found in files.items():
        (folder / f"{name}.json").write_text(json.dumps(found))
    return Archive.read(folder)


TIMES = {"ours, cpu": 2.0, "eager": 10.0, "compiled": 4.0, "floor: plain": 1.0}


class Structure(HTMLParser):
    """Open elements, ids, links, and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.tags, self.texts = [], [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.append(tag)
        self.ids += [found["id"]] if "id" in found else []
        self.links += [found["href"]] if "href" in found else []
        assert "src" not in found
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return "".join(self.texts)


def test_the_page_is_that_of_the_records():
    made = page(Archive.read(RESULTS), "../benchmarks/results")
    assert (ROOT / "docs" / "report.html").read_text() == made, "out of date: make report"


def test_the_page_stands_alone_and_its_links_lead_somewhere():
    archive = Archive.read(RESULTS)
    found = Structure(page(archive, "../benchmarks/results"))
    assert "script" not in found.tags
    assert "link" not in found.tags
    assert len(set(found.ids)) == len(found.ids)
    for link in found.links:
        if link.startswith("#"):
            assert link[1:] in found.ids
        else:
            assert (ROOT / "docs" / link).resolve().is_file()
    for file, of_file in (archive.runs | archive.others).items():
        assert f"record-{file}" in found.ids
        assert of_file.get("environment", of_file)["commit"][:12] in found.text
    for result in archive.results():
        assert result.name in found.text
        for measurement in result.found(result.allocators()[0]):
            if measurement["role"] in ("ours", "peer", "reference"):
                assert measurement["implementation"] in found.text


def test_what_a_comparison_says(tmp_path):
    archive = archive_of(tmp_path, a=run("2026-01-01", {CASE: TIMES}))
    (one,) = comparisons(next(archive.results()))
    assert (one.over_baseline, one.over_other, one.standing) == (5.0, 2.0, "faster")
    assert one.share_of_limit == 0.5


@pytest.mark.parametrize(("compiled", "standing"), [(4.0, "faster"), (2.1, "level"), (1.9, "level"), (1.0, "slower")])
def test_faster_and_slower_mean_beyond_the_spread(tmp_path, compiled, standing):
    archive = archive_of(tmp_path, a=run("2026-01-01", {CASE: TIMES | {"compiled": compiled}}))
    assert comparisons(next(archive.results()))[0].standing == standing


def test_the_limit_of_matrix_products_counts_what_a_way_needs(tmp_path):
    more = {"flops": 800, "flops_folded": 400, "yardstick_flops": 100}
    case = {"name": "path", "kind": "path", "baseline": "eager", "reason": "why", **more}
    found = run("2026-01-01", {"path": {"ours, cpu": 10.0, "ours, folded": 8.0, "product": 1.0}}, cases={"path": case})
    for measurement, role in zip(found["measurements"], ("ours", "ours", "yardstick"), strict=True):
        measurement["role"] = role
    result = next(archive_of(tmp_path, a=found).results())
    direct, folded, _ = result.found("default")
    assert result.share_of_limit("default", direct) == pytest.approx(0.8)
    assert result.share_of_limit("default", folded) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("now", "verdict"),
    [
        ({"ours, cpu": 2.1}, "within the spread"),
        ({"ours, cpu": 4.0}, "slower"),
        ({"ours, cpu": 1.0}, "faster"),
        ({"ours, cpu": 4.0, "eager": 12.0}, "slower"),
        ({"ours, cpu": 4.0, "eager": 20.0}, "slower, and the baseline as much"),
    ],
)
def test_changes_are_judged_by_the_spread_and_the_baseline(tmp_path, now, verdict):
    archive = archive_of(
        tmp_path, a=run("2026-01-01", {CASE: TIMES}), b=run("2026-01-02", {CASE: TIMES | now}), c=run("2025-01-01", {})
    )
    (change,) = changes(archive)
    assert change.verdict == verdict
    assert (change.old.file, change.new.file) == ("a.json", "b.json")
    text = Structure(page(archive, "results")).text
    assert f"{'1' if verdict == 'slower' else '0'} slowerof 1 measured twice" in text
    assert f"{change.ratio - 1:+.1%}" in text


def test_a_new_implementation_is_compared_with_the_fastest_of_before(tmp_path):
    now = {"ours, other": 3.0, "eager": 10.0}
    archive = archive_of(tmp_path, a=run("2026-01-01", {CASE: TIMES}), b=run("2026-01-02", {CASE: now}))
    (change,) = changes(archive)
    assert (change.before["implementation"], change.verdict) == ("ours, cpu", "slower")
    assert "ours, other (was: ours, cpu)" in page(archive, "results")


def test_other_machines_are_not_compared(tmp_path):
    archive = archive_of(
        tmp_path,
        a=run("2026-01-01", {CASE: TIMES}),
        b=run("2026-01-02", {CASE: TIMES}, threads=8),
        c=run("2026-01-03", {CASE: TIMES}, device_type="cuda"),
    )
    assert not list(changes(archive))
    assert "No case has two records of one machine." in page(archive, "results")


def test_what_is_missing_is_shown(tmp_path):
    text = Structure(page(archive_of(tmp_path, a=run("2026-01-01", {CASE: TIMES})), "results")).text
    assert "GPUno record" in text
    for name in ("lape_add_packed", "coordinate_cross_entropy, any positions", "nn.VisualTokenizer, the whole path"):
        assert f"{name}no recordno record" in text
    assert f"point_to_region_attention5.0{X} its baseline, parity metno record" in text
    for file in ("model_costs.json", "folding_error.json", "training_throughput.json", "synthesis.json"):
        assert f"makes {file}." in text
    assert "make reproduce makes them" in text


def test_results_out_of_tolerance_and_medians_behind_stand_out(tmp_path):
    found = run("2026-01-01", {CASE: TIMES | {"compiled": 1.0}})
    found["measurements"][0]["within_tolerance"] = False
    text = Structure(page(archive_of(tmp_path, a=found), "results")).text
    assert "0 of 1results of ours are as near to float64 as they must be: at most twice" in text
    assert f"missed: {CASE}, ours, cpu." in text
    assert f"slower in 1. Medians behind: {CASE} (0.50{X})." in text


def test_a_reason_instead_of_numbers_is_quoted_and_escaped(tmp_path):
    found = run("2026-01-01", {CASE: TIMES})
    failed = {"case": CASE, "allocator": "default", "implementation": "FlexAttention", "role": "peer"}
    found["measurements"].append({**failed, "reason_without_numbers": "<b>it & broke"})
    written = page(archive_of(tmp_path, a=found), "results")
    assert "FlexAttention: &lt;b&gt;it &amp; broke." in written
    Structure(written)


def test_time_over_frames_is_drawn_where_more_than_one_length_was_measured(tmp_path):
    one = run("2026-01-01", {CASE: TIMES})
    assert "svg" not in Structure(page(archive_of(tmp_path, a=one), "results")).tags
    two = run("2026-01-02", {CASE: TIMES, CASE.replace("40", "8"): TIMES})
    tags = Structure(page(archive_of(tmp_path, a=two), "results")).tags
    assert tags.count("svg") == 1
    assert tags.count("circle") == 2 * len(TIMES)
    assert tags.count("polyline") == len(TIMES)


def test_a_case_may_leave_out_its_baseline_and_reason(tmp_path):
    case = {"name": "module", "kind": "integration", "mode": "forward"}
    found = run("2026-01-01", {"module": {"ours, cpu": 2.0, "eager": 5.0}}, cases={"module": case})
    for measurement in found["measurements"]:
        for key in ("reason_without_numbers", "max_abs_error", "error_over_reference", "within_tolerance"):
            del measurement[key]
    archive = archive_of(tmp_path, a=found)
    assert comparisons(next(archive.results()))[0].over_baseline == 2.5
    assert f"2.5{X}eager" in Structure(page(archive, "results")).text
    assert f"| module | 2.00 ms | 2.5{X} | 2.5{X} | - | - |" in tables(archive)


def test_records_that_are_not_made_of_cases(tmp_path):
    environment = run("2026-01-01", {})["environment"]
    scores = {"m_tiou": 0.5, "m_siou": 0.25, "m_viou": 0.125}
    trained = {"environment": environment, "seed": 3, "proof": {"a": scores}}
    others = {"reproduction-seed3": trained, "unheard-of": {"environment": environment}}
    archive = archive_of(tmp_path, **others, mutation=json.loads((RESULTS / "mutation.json").read_text()))
    text = Structure(page(archive, "results")).text
    assert "the model0.5000.2500.125" in text
    assert "Records that this page cannot read: unheard-of.json" in text
    assert "395 of 432 changes" in text


def test_a_record_of_another_schema_is_refused(tmp_path):
    with pytest.raises(ValueError, match="schema"):
        archive_of(tmp_path, a=run("2026-01-01", {CASE: TIMES}) | {"schema": 0})


def test_tables_of_the_readme(tmp_path):
    found = run("2026-01-01", {CASE: TIMES, CASE.replace("40", "100"): TIMES, CASE.replace("40", "8"): TIMES})
    found["measurements"] += [measured(CASE.replace("40", "100"), n, ms, "huge pages") for n, ms in TIMES.items()]
    found["measurements"][-2] |= measured(CASE.replace("40", "100"), "compiled", 3.0, "huge pages")
    older = run("2025-01-01", {CASE: TIMES, "lape_add": TIMES}, threads=8)
    text = tables(archive_of(tmp_path, a=found, old=older))
    assert "**GPU**: no record." in text
    ratios = f"5.0{X} (5.0{X}) | 2.0{X} (1.50{X})"
    assert f"| spatial 100 frames, forward, float32 | 2.00 ms | {ratios} | 50% | 0.50 | 3 / 3 | [1] |" in text
    assert "spatial 40" not in text, "shorter clips are left to the page"
    assert text.count("| lape_add |") == 1, "an older record on another machine stands for what no newer one has"
    assert "Of 2 comparisons with the fastest of all other ways, ours is faster in 2, level" in text
    assert "[1] `benchmarks/results/a.json`, commit 0100aa11bb22, 2026-01-01, torch 2.13.0, load average 0.5" in text


def test_table_of_integrations(tmp_path):
    case = described("Packer, forward", kind="integration", baseline=BEFORE)
    found = run("2026-01-01", {case["name"]: {AFTER: 2.0, BEFORE: 3.0}}, cases={case["name"]: case})
    text = integrations.table(archive_of(tmp_path, a=found))
    assert "commit 0100aa11bb22; `benchmarks/results/a.json`." in text
    assert (
        f"| Packer, forward | 3.00 ms (2.76..3.24 ms) | 2.00 ms (1.84..2.16 ms) | 1.50{X} | 0.50 | 3 MiB → 3 MiB |"
        in text
    )
    assert "**GPU**: no record." in text
    longer = run("2026-01-02", {case["name"]: {AFTER: 2.0, BEFORE: 3.0}}, cases={case["name"]: case})
    for measurement in longer["measurements"]:
        measurement["samples_ms"] *= 2
    assert f"| 1.50{X} (1.50..1.50) |" in integrations.table(archive_of(tmp_path, b=longer))


README = "# Title\n\n<!-- benchmark:begin -->\n\nold\n\n<!-- benchmark:end -->\n\nafter\n"


def test_the_command_writes_all_and_checks_all(tmp_path, capsys):
    (results := tmp_path / "results").mkdir()
    archive_of(results, a=run("2026-01-01", {CASE: TIMES}))
    out, readme, page_of_modules = (tmp_path / name for name in ("report.html", "README.md", "modules.md"))
    readme.write_text(README)
    page_of_modules.write_text(README.replace("benchmark:", "times:"))
    arguments = ["--results", str(results), "--out", str(out), "--readme", str(readme)]
    arguments += ["--integrations", str(page_of_modules)]
    assert command.main([*arguments, "--check"]) == 1
    assert not out.exists()
    assert readme.read_text() == README
    assert command.main(arguments) == 0
    assert command.main([*arguments, "--check"]) == 0
    assert 'href="results/a.json"' in out.read_text()
    assert "old" not in readme.read_text() + page_of_modules.read_text()
    assert readme.read_text().endswith("<!-- benchmark:end -->\n\nafter\n")
    archive_of(results, b=run("2026-01-02", {CASE: TIMES | {"ours, cpu": 5.0}}))
    capsys.readouterr()
    assert command.main([*arguments, "--check"]) == 1
    assert capsys.readouterr().err.count("out of date") == 2


def test_a_readme_without_markers_is_refused(tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n")
    with pytest.raises(SystemExit):
        command.main(["--results", str(RESULTS), "--out", str(tmp_path / "x.html"), "--readme", str(readme)])
    assert "benchmark:begin" in capsys.readouterr().err
    assert readme.read_text() == "# Title\n"
