"""What the benchmark counts and runs."""

from __future__ import annotations

import pytest
import torch

from benchmarks.cases import Case, select_cases


def test_bytes_of_a_case_counted_by_hand():
    # 5 frames of 27x27 tokens of 8 heads of 128 in 2 bytes; joint regions leave 1 x 9 x 9 queries.
    key, query = 5 * 27 * 27 * 1024 * 2, 81 * 1024 * 2
    forward = Case(5, (5, 3, 3), torch.bfloat16, "forward", "")
    assert forward.bytes_read == query + 2 * key
    assert forward.bytes_written == query
    backward = Case(5, (5, 3, 3), torch.bfloat16, "forward+backward", "")
    assert backward.bytes_read == forward.bytes_read + 2 * query + 2 * key
    assert backward.bytes_written == forward.bytes_written + query + 2 * key


def test_bytes_are_those_of_the_tensors():
    case = Case(3, (1, 3, 3), torch.float32, "forward", "")
    query, key = torch.empty(case.query_shape), torch.empty(case.key_shape)
    assert case.query_bytes == query.numel() * query.element_size()
    assert case.key_bytes == key.numel() * key.element_size()
    assert case.query_shape == (1, 3, 9, 9, 8, 128)


def test_flops_of_a_case_counted_by_hand():
    elements = 2 * 27 * 27 * 1024
    assert Case(2, (1, 3, 3), torch.float32, "forward", "").flops == 2 * 2 * elements
    assert Case(2, (1, 3, 3), torch.float32, "forward+backward", "").flops == 7 * 2 * elements


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_the_cases_of_a_run(device, quick):
    cases = select_cases(torch.device(device), quick)
    assert len({case.name for case in cases}) == len(cases)
    assert all(case.reason for case in cases)
    assert {case.mode for case in cases} == {"forward", "forward+backward"}
    for case in cases:
        assert all(size % step == 0 for size, step in zip(case.key_shape[1:4], case.region, strict=True))
    assert cases[0].dtype == (torch.bfloat16 if device == "cuda" else torch.float32)
    if not quick:
        assert {case.frames for case in cases} == {8, 16, 40, 100}
        assert {case.region for case in cases} == {(1, 3, 3), (5, 1, 1), (5, 3, 3)}
        assert {case.dtype for case in cases} == {torch.float32, torch.bfloat16}
