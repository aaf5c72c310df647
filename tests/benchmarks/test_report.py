"""The record survives the disk, and tables and plot follow from it."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks import plot, record, report
from benchmarks.cases import Case
from benchmarks.environment import describe
from benchmarks.measure import summarise

TIMES = {"llava_st_ops, cpu": 2.0, "reference, PyTorch": 12.0, "eager, as published": 10.0, "einsum, compiled": 4.0}


def measurement(case, allocator, name, role, milliseconds):
    samples = [milliseconds * factor for factor in (0.9, 1.0, 1.1)]
    found = {"case": case, "allocator": allocator, "implementation": name, "role": role, "samples_ms": samples}
    found |= {"reason_without_numbers": None, **summarise(samples)}
    if role != "floor" and allocator == "default":
        found |= {"errors": {"output": 2e-6}, "max_abs_error": 2e-6, "error_over_reference": 0.5}
        found |= {"within_tolerance": name != "einsum, compiled", "peak_memory_bytes": 3 << 20}
    return found


@pytest.fixture(scope="module")
def made_up():
    """A record with invented times."""
    cases = [Case(f, (1, 3, 3), torch.float32, m, "why") for f in (8, 40) for m in ("forward", "forward+backward")]
    measurements = []
    for case in cases:
        for allocator, factor in (("default", 1.0), ("huge pages", 0.5)):
            for name, milliseconds in TIMES.items():
                role = {"l": "ours", "r": "reference"}.get(name[0], "peer")
                measurements.append(measurement(case.name, allocator, name, role, milliseconds * factor * case.frames))
            for name, slower in (("floor: slow", 1.5), ("floor: fast", 1.0)):
                measurements.append(measurement(case.name, allocator, name, "floor", factor * case.frames * slower))
            failed = {"case": case.name, "allocator": allocator, "implementation": "FlexAttention", "role": "peer"}
            measurements.append({**failed, "reason_without_numbers": "it broke"})
    return {
        "schema": record.SCHEMA,
        "environment": describe(torch.device("cpu")),
        "clip": {"file": "clip.mp4", "frames": 250, "features": "seeded"},
        "settings": {},
        "backends": {"cpu": "", "cuda": "was not built"},
        "cases": [case.describe() for case in cases],
        "measurements": measurements,
    }


def test_record_round_trip(made_up, tmp_path):
    path = record.write(made_up, tmp_path / "new" / "folder")
    assert record.read(path) == made_up
    assert path.stem == record.file_stem(made_up)


def test_file_name_holds_device_and_date(made_up):
    named = copy.deepcopy(made_up)
    named["environment"] |= {"device": "NVIDIA H100 80GB HBM3", "date": "2026-01-02T03:04:05+00:00"}
    assert record.file_stem(named) == "nvidia-h100-80gb-hbm3-20260102-030405"


def test_a_record_of_another_schema_is_refused(made_up, tmp_path):
    path = record.write({**made_up, "schema": 0}, tmp_path)
    with pytest.raises(ValueError, match="schema"):
        record.read(path)


def test_the_environment_says_what_the_numbers_depend_on():
    found = describe(torch.device("cpu"))
    assert found["cpu"]["model"]
    assert found["cpu"]["torch_threads"] == torch.get_num_threads()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["llava_st_ops"]
    assert found["commit"]
    assert found["date"].endswith("+00:00")


def test_full_table(made_up):
    table = report.full_table(made_up)
    lines = table.splitlines()
    ours = next(line for line in lines if line.startswith("  llava_st_ops, cpu"))
    # 8 frames: 16 ms against 80 ms eager and 8 ms of the fastest floor.
    assert ours.split()[2:6] == ["2e-06", "0.50", "3", "16.00"]
    assert "5.00" in ours.split()
    assert ours.split().count("50%") == 2
    assert any(line.startswith("  einsum, compiled") and "2e-06 !" in line for line in lines)
    assert any("FlexAttention: it broke" in line for line in lines)
    assert "backend cuda is not in the table: was not built" in table
    assert "each once" in table
    assert all(case["name"] in table for case in made_up["cases"])


def test_an_implementation_without_numbers_in_one_run_shows_those_of_the_other(made_up):
    record_ = copy.deepcopy(made_up)
    first = next(m for m in record_["measurements"] if m["implementation"] == "einsum, compiled")
    for key in ("samples_ms", "median_ms", "p10_ms", "p90_ms"):
        del first[key]
    first["reason_without_numbers"] = "too slow"
    lines = report.full_table(record_).splitlines()
    assert "  einsum, compiled, torch's allocator as it comes: too slow" in lines
    row = next(line for line in lines if line.startswith("  einsum, compiled  "))
    assert row.split()[-5] == "16.00"


def test_gigabytes_per_second_are_counted_bytes_over_the_median():
    case = {"bytes_read": 3_000_000, "bytes_written": 1_000_000}
    assert record.gigabytes_per_second(case, {"median_ms": 2.0}) == pytest.approx(2.0)


def test_the_table_of_a_record_is_printed(made_up, tmp_path, capsys):
    assert report.main([str(record.write(made_up, tmp_path))]) == 0
    assert "llava_st_ops, cpu" in capsys.readouterr().out


def test_plot(made_up, tmp_path):
    path = tmp_path / "plot.png"
    plot.write(made_up, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_ratio_within_rounds():
    """Of a machine that gets ten times slower on the way; ends of the interval are those of tables of the sign test."""
    speed = [1.0 + i for i in range(10)]
    faster = {"samples_ms": speed}
    ratios = [1.5, 1.1, 1.2, 1.3, 1.4, 0.9, 1.6, 1.7, 1.8, 9.0]
    slower = {"samples_ms": [ratio * s for ratio, s in zip(ratios, speed, strict=True)]}
    median, interval = record.paired_ratio(slower, faster)
    assert median == pytest.approx(1.45)
    assert interval == pytest.approx((1.1, 1.8))  # the second and the ninth of ten
    few = [{"samples_ms": m["samples_ms"][:5]} for m in (slower, faster)]
    assert record.paired_ratio(*few) == (pytest.approx(1.3), None)
    six = [{"samples_ms": m["samples_ms"][:6]} for m in (slower, faster)]
    assert record.paired_ratio(*six)[1] == pytest.approx((0.9, 1.5))
