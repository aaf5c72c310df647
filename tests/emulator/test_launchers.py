"""The CUDA launchers: what they check and refuse, and how torch sees their ops. The kernels run in the emulator."""

from __future__ import annotations

import pytest
import torch

from tests.emulator.backend import emulated
from tests.ops.test_errors import BAD_DENSE, BAD_PACKED, CASE, dense, packed
from tests.ops.test_torch_integration import raw_calls


@pytest.fixture
def ops():
    """The raw ops. The tensors are on the device but for `grid_thw`, which is read on the host."""
    with emulated(tensors_on_device=False) as ops:
        yield ops


@pytest.mark.parametrize(("changes", "expected", "came"), BAD_DENSE)
def test_bad_dense_arguments(ops, changes, expected, came):
    if isinstance(changes.get("value"), torch.Tensor) and changes["value"].is_meta:
        pytest.skip("the dispatcher sends this to the fake")
    with pytest.raises(RuntimeError, match=f"point_to_region_attention: {expected}.*{came}"):
        ops.point_to_region_attention(*dense(**changes).values())


@pytest.mark.parametrize(("changes", "expected", "came"), BAD_PACKED)
def test_bad_packed_arguments(ops, changes, expected, came):
    with pytest.raises(RuntimeError, match=f"point_to_region_attention_packed: {expected}"):
        ops.point_to_region_attention_packed(*packed(**changes).values())


def test_bad_gradients(ops):
    arguments = [*CASE.inputs(torch.float32), [2, 3, 3]]
    with pytest.raises(RuntimeError, match="grad_output must have shape"):
        ops.point_to_region_attention_backward(torch.randn(3), *arguments)
    with pytest.raises(RuntimeError, match="grad_output must have the dtype of query"):
        ops.point_to_region_attention_backward(torch.randn(CASE.query_shape).double(), *arguments)


def test_float64_has_no_kernel(ops):
    with pytest.raises(RuntimeError, match="query must be float32, bfloat16 or float16 .*, got float64"):
        ops.point_to_region_attention(*CASE.inputs(torch.float64), [2, 3, 3])


@pytest.mark.parametrize("axis", [1, 2, 3])
@pytest.mark.parametrize("size", [2**31, 2**40])
def test_regions_beyond_32_bits(ops, axis, size):
    """One token, repeated along time, height or width."""
    one = torch.zeros(1, 1, 1, 1, 1, 8)
    shape, region = list(one.shape), [1, 1, 1]
    shape[axis] = region[axis - 1] = size
    many = one.expand(shape)
    with pytest.raises(RuntimeError, match=r"regions of 2\^31 tokens or more along one axis are not supported"):
        ops.point_to_region_attention(one, many, many, region)


@pytest.mark.parametrize("name", ["dense", "packed", "dense_backward", "packed_backward"])
def test_opcheck(name):
    with emulated(name) as ops:
        op, arguments = raw_calls(torch.float32, requires_grad=not name.endswith("backward"), ops=ops)[name]
        torch.library.opcheck(op, arguments)
