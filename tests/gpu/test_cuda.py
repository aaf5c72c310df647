"""What only a GPU can show: streams, graphs, devices, grids that are never read back. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from llava_st_ops import (
    backends,
    point_to_region_attention,
    point_to_region_attention_packed,
    reference,
)
from tests.attention_cases import CASES, Case, gradients
from tests.ops.test_packed import GRIDS, packed_inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
CASE = Case(1, (10, 27, 27), (1, 3, 3), 8, 128)


def test_cuda_graph_replays_forward_and_backward(kernel):
    inputs = [x.requires_grad_() for x in CASE.inputs(torch.bfloat16, "cuda")]
    grad_output = torch.randn(CASE.query_shape, device="cuda", dtype=torch.bfloat16)

    def step():
        output = point_to_region_attention(*inputs, CASE.region)
        return output, *torch.autograd.grad(output, inputs, grad_output)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        for x, fresh in zip(inputs, CASE.inputs(torch.bfloat16, "cuda", seed=7), strict=True):
            x.copy_(fresh)
    graph.replay()
    for replayed, expected in zip(results, step(), strict=True):
        assert torch.equal(replayed, expected)


def test_cuda_graph_with_a_grid_on_the_device(kernel):
    region = (1, 3, 3)
    inputs, grid_thw = packed_inputs(GRIDS[1], region, device="cuda", dtype=torch.bfloat16)
    grid_thw = grid_thw.cuda()
    expected = point_to_region_attention_packed(*inputs, grid_thw, region)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = point_to_region_attention_packed(*inputs, grid_thw, region)
    graph.replay()
    assert torch.equal(output, expected)


def test_cuda_graph_with_a_grid_on_the_host_is_an_error(kernel):
    """A graph would read the host's memory again in every replay."""
    region = (1, 3, 3)
    inputs, grid_thw = packed_inputs(GRIDS[1], region, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="grid_thw must be on the device"), torch.cuda.graph(graph):
        point_to_region_attention_packed(*inputs, grid_thw, region)
    torch.cuda.synchronize()


def test_grids_on_the_device_are_not_read_back(kernel):
    region = (1, 3, 3)
    inputs, grid_thw = packed_inputs(GRIDS[1], region, device="cuda")
    grid_thw = grid_thw.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        point_to_region_attention_packed(*inputs, grid_thw, region)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("grids", [[(1, 3, 3)], [(5, 9, 9), (5, 9, 9)], [(-1, 3, 3), (2, 3, 3)]])
def test_grids_on_the_device_that_do_not_add_up_are_masked(kernel, grids):
    """Too few, too many, negative: nothing outside of the tensors is touched, and what no video owns is zero."""
    region = (1, 3, 3)
    inputs, _ = packed_inputs([(2, 3, 3), (1, 3, 3)], region, device="cuda")
    grid_thw = torch.tensor(grids, device="cuda")
    output, (grad_query, grad_key, grad_value) = gradients(
        lambda q, k, v: point_to_region_attention_packed(q, k, v, grid_thw, region), inputs, torch.ones_like(inputs[0])
    )
    for tensor in (output, grad_query, grad_key, grad_value):
        assert tensor.isfinite().all()
    if grids == [(1, 3, 3)]:
        assert output[0].any()
        assert not output[1:].any()
        assert grad_value[:9].any()
        assert not grad_value[9:].any()


def test_current_stream(kernel):
    inputs = CASE.inputs(torch.float32, "cuda")
    expected = reference.point_to_region_attention(*inputs, CASE.region)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        later = [x * 1 for x in inputs]  # only ready in the order of this stream
        output = point_to_region_attention(*later, CASE.region)
    stream.synchronize()
    torch.testing.assert_close(output, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU only")
def test_tensors_decide_the_device(kernel):
    inputs = CASE.inputs(torch.float32, "cuda:1")
    assert torch.cuda.current_device() == 0
    output = point_to_region_attention(*inputs, CASE.region)
    assert output.device.index == 1
    torch.testing.assert_close(output, reference.point_to_region_attention(*inputs, CASE.region))


def test_double_precision_takes_the_reference():
    inputs = CASES[0].inputs(torch.float64, "cuda")
    assert backends.choose("point_to_region_attention", inputs[0]) == "reference"
    with pytest.raises(RuntimeError, match="float64"):
        torch.ops.llava_st.point_to_region_attention(*inputs, CASES[0].region)


def test_more_than_2_to_31_elements(kernel):
    frames = 2**31 // (27 * 27 * 8 * 128) + 2
    case = Case(1, (frames, 27, 27), (1, 3, 3), 8, 128)
    if torch.cuda.mem_get_info()[0] < 5 * 2**31 * 2:
        pytest.skip("not enough memory on the GPU")
    key = torch.randn(case.key_shape, device="cuda", dtype=torch.bfloat16)
    query = torch.randn(case.query_shape, device="cuda", dtype=torch.bfloat16)
    output = point_to_region_attention(query, key, key, case.region)
    tail = reference.point_to_region_attention(query[:, -2:], key[:, -2:], key[:, -2:], case.region)
    torch.testing.assert_close(output[:, -2:], tail, rtol=2e-2, atol=2e-2)
