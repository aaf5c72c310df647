"""Bad input raises an error that names the argument, what was expected and what came: in Python and in the raw ops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from llava_st_ops import point_to_region_attention, point_to_region_attention_packed, region_centers, use_backend
from tests.attention_cases import Case

CASE = Case(2, (3, 4, 5), (2, 3, 3), 2, 8)
GRIDS = torch.tensor([[1, 3, 3], [2, 3, 3]])


def dense(**changes):
    query, key, value = CASE.inputs(torch.float32)
    return {"query": query, "key": key, "value": value, "region": [2, 3, 3], "scale": None, **changes}


def packed(**changes):
    tensors = {"query": torch.randn(3, 2, 8), "key": torch.randn(27, 2, 8), "value": torch.randn(27, 2, 8)}
    return {**tensors, "grid_thw": GRIDS, "region": [1, 3, 3], "scale": None, **changes}


BAD_DENSE = [
    ({"query": torch.randn(2, 3)}, "query must have 6 dimensions", "got 2"),
    ({"key": torch.randn(2, 3)}, "key must have 6 dimensions", "got 2"),
    (
        {"value": torch.randn(2, 3, 4, 5, 3, 9)},
        r"value must have shape \[2, 3, 4, 5, 2, 9\]",
        r"got \[2, 3, 4, 5, 3, 9",
    ),
    ({"value": torch.randn(2, 3)}, r"value must have shape \[2, 3, 4, 5, 2, 8\]", r"got \[2, 3\]"),
    (
        {"query": torch.randn(2, 2, 2, 1, 2, 8)},
        r"query must have shape \[2, 2, 2, 2, 2, 8\]",
        r"got \[2, 2, 2, 1, 2, 8",
    ),
    ({"key": torch.randn(CASE.key_shape).half()}, "key must have the dtype of query", "float16"),
    ({"value": torch.randn(CASE.key_shape).double()}, "value must have the dtype of query", "float64"),
    ({"value": torch.empty(CASE.key_shape, device="meta")}, "value must be on the device of query", "got"),
    ({"region": [2, 3]}, "region must be three positive sizes", r"got \[2, 3\]"),
    ({"region": [0, 3, 3]}, "region must be three positive sizes", r"got \[0, 3, 3\]"),
    ({"region": [2, -3, 3]}, "region must be three positive sizes", r"got \[2, -3, 3\]"),
    ({"scale": float("nan")}, "scale must be", "nan"),
    ({"scale": float("inf")}, "scale must be", "inf"),
]
BAD_PACKED = [
    ({"query": torch.randn(3, 8)}, "query must have 3 dimensions", "got 2"),
    ({"key": torch.randn(27, 8)}, "key must have 3 dimensions", "got 2"),
    ({"query": torch.randn(3, 2, 9)}, "query must have shape", r"got \[3, 2, 9\]"),
    ({"grid_thw": GRIDS.float()}, "grid_thw must be int32 or int64", "got"),
    ({"grid_thw": GRIDS[:, :2]}, r"grid_thw must have shape \[videos, 3\]", r"got \[2, 2\]"),
    ({"grid_thw": GRIDS[:1]}, "grid_thw must add up to the 27 tokens of key", "got 9"),
    ({"grid_thw": 2 * GRIDS}, "grid_thw must add up to the 27 tokens of key", ""),
    ({"grid_thw": torch.tensor([[-1, -3, 9]])}, "grid_thw must not be negative", r"got \[-1, -3, 9\] for video 0"),
    ({"grid_thw": torch.tensor([[27, 1, 1]])}, "query must have one row per region of grid_thw, 27", "got 3"),
    ({"grid_thw": torch.tensor([[2**40, 2**40, 1]])}, "grid_thw must add up to", ""),
    ({"region": (1, 0, 1)}, "region must be three positive sizes", ""),
]


@pytest.mark.parametrize(("changes", "expected", "came"), BAD_DENSE)
def test_dense(changes, expected, came):
    with pytest.raises((ValueError, TypeError), match=f"point_to_region_attention: {expected}.*{came}"):
        point_to_region_attention(**dense(**changes))


@pytest.mark.parametrize(("changes", "expected", "came"), BAD_DENSE)
def test_raw_dense(changes, expected, came):
    if isinstance(changes.get("value"), torch.Tensor) and changes["value"].is_meta:
        pytest.skip("the dispatcher sends this to the fake")
    with pytest.raises(RuntimeError, match=f"point_to_region_attention: {expected}.*{came}"):
        torch.ops.llava_st.point_to_region_attention(*dense(**changes).values())


@pytest.mark.parametrize(("changes", "expected", "came"), BAD_PACKED)
def test_packed(changes, expected, came):
    with pytest.raises((ValueError, TypeError), match=f"point_to_region_attention_packed: {expected}.*{came}"):
        point_to_region_attention_packed(**packed(**changes))


@pytest.mark.parametrize(("changes", "expected", "came"), BAD_PACKED)
def test_raw_packed(changes, expected, came):
    with pytest.raises(RuntimeError, match=f"point_to_region_attention_packed: {expected}"):
        torch.ops.llava_st.point_to_region_attention_packed(*packed(**changes).values())


def test_raw_backward_checks_its_gradient():
    arguments = [*CASE.inputs(torch.float32), [2, 3, 3]]
    backward = torch.ops.llava_st.point_to_region_attention_backward
    with pytest.raises(RuntimeError, match="grad_output must have shape"):
        backward(torch.randn(3), *arguments)
    with pytest.raises(RuntimeError, match="grad_output must have the dtype of query"):
        backward(torch.randn(CASE.query_shape).double(), *arguments)


def test_region_of_one_number_is_not_taken_for_three():
    """A schema of int[3] would broadcast a bare 3."""
    with pytest.raises(ValueError, match="region must be three positive sizes"):
        point_to_region_attention(**dense(region=3))
    with pytest.raises(RuntimeError, match=r"region|int\[\]|List\[int\]"):
        torch.ops.llava_st.point_to_region_attention(*dense(region=3).values())


def test_numbers_of_other_kinds():
    """NumPy's are as good as Python's; one that no float holds is not."""
    arguments = dense(region=[np.int64(2), 3, 3], scale=np.float32(0.5))
    assert torch.equal(point_to_region_attention(**arguments), point_to_region_attention(**dense(scale=0.5)))
    with pytest.raises(ValueError, match="scale must be a finite number"):
        point_to_region_attention(**dense(scale=10**400))


def test_integers_and_wide_heads():
    query, key, value = (x.long() for x in CASE.inputs(torch.float32))
    with pytest.raises(TypeError, match="query must be of a floating point dtype, got torch.int64"):
        point_to_region_attention(query, key, value, (2, 3, 3))
    for name, dims in (("query", (1153, 8)), ("value", (8, 1153))):
        wide = Case(1, (1, 1, 1), (1, 1, 1), 1, *dims)
        message = rf"head dimension \(last of {name}\) must be at most 1152, got 1153"
        with pytest.raises(ValueError, match=message):
            point_to_region_attention(*wide.inputs(torch.float32), wide.region)
        with pytest.raises(RuntimeError, match=message):
            torch.ops.llava_st.point_to_region_attention(*wide.inputs(torch.float32), list(wide.region))


def test_out_of_memory_has_its_own_type():
    """Strides of zero: a call whose result alone would take an exabyte."""
    one = torch.zeros(1, 1, 1, 1, 1, 1).expand(2**40, 1, 1, 1, 2**18, 1)
    with use_backend("cpu"), pytest.raises(torch.OutOfMemoryError, match="out of memory allocating the output"):
        point_to_region_attention(one, one, one, (1, 1, 1))


def test_errors_while_compiling_are_the_same():
    compiled = torch.compile(lambda **kw: point_to_region_attention(**kw), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match="region must be three positive sizes"):
        compiled(**dense(region=[0, 1, 1]))


def test_region_centers():
    with pytest.raises(ValueError, match="region_centers: x must have 5 dimensions"):
        region_centers(torch.randn(3, 3), (1, 3, 3))
    with pytest.raises(ValueError, match="region_centers: region must be three positive sizes"):
        region_centers(torch.randn(1, 3, 3, 3, 4), (1, 3))
