"""The comparison itself must be able to fail."""

import pytest
import torch

from tests.tolerance import assert_accurate


def test_accepts_twice_the_reference_error():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert_accurate(torch.tensor([1.0, 2.0019]), exact, torch.tensor([1.0, 2.001]))


def test_accepts_one_rounding_where_the_reference_is_exact():
    exact = torch.tensor([0.25, 1.0], dtype=torch.float64)
    step = torch.finfo(torch.float32).eps
    assert_accurate(torch.tensor([0.25 + step, 1.0]), exact, exact.float())
    with pytest.raises(AssertionError, match=r"at \(0,\)"):
        assert_accurate(torch.tensor([0.25 + 2 * step, 1.0]), exact, exact.float())


def test_rejects_more_and_names_the_first_entry():
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match=r"at \(1,\)"):
        assert_accurate(torch.tensor([1.0, 2.0021]), exact, torch.tensor([1.0, 2.001]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rejects_values_that_are_not_finite(bad):
    exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="differs at"):
        assert_accurate(torch.tensor([1.0, bad]), exact, torch.tensor([1.0, 2.0]))


def test_rejects_a_missing_nan():
    exact = torch.tensor([1.0, float("nan")], dtype=torch.float64)
    with pytest.raises(AssertionError, match="NaN differs"):
        assert_accurate(torch.tensor([1.0, 2.0]), exact, torch.tensor([1.0, float("nan")]))


def test_rejects_another_dtype():
    exact = torch.tensor([1.0], dtype=torch.float64)
    with pytest.raises(AssertionError, match="dtype"):
        assert_accurate(torch.tensor([1.0], dtype=torch.float16), exact, torch.tensor([1.0]))
