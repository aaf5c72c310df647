"""Every peer computes the same as the reference, so that the times compare like with like."""

from __future__ import annotations

import pytest
import torch

from benchmarks import parity, peers
from benchmarks.cases import Case
from benchmarks.packer_published import seeded
from llava_st_ops.nn import SpatialTemporalPacker
from llava_st_ops.reference import point_to_region_attention

REGIONS = [(1, 3, 3), (5, 1, 1), (5, 3, 3)]
CPU = torch.device("cpu")


def tensors(region, dtype=torch.float64, batch=2):
    grid = (10, 9, 6)
    generator = torch.Generator().manual_seed(0)
    query_grid = [size // step for size, step in zip(grid, region, strict=True)]
    shapes = [(batch, *query_grid, 2, 16), (batch, *grid, 2, 16), (batch, *grid, 2, 16)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("region", REGIONS)
@pytest.mark.parametrize("peer", [peers.eager, peers.sdpa, peers.multiply_and_sum, peers.einsum])
def test_peer_is_the_reference_forward_and_backward(peer, region):
    inputs = tensors(region)
    expected = point_to_region_attention(*inputs, region)
    result = peer(*inputs, region)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    assert result.is_contiguous()
    grad_output = torch.randn_like(expected)
    for found, right in zip(
        torch.autograd.grad(result, inputs, grad_output),
        torch.autograd.grad(expected, inputs, grad_output),
        strict=True,
    ):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12)


@pytest.mark.parametrize("region", REGIONS)
def test_flex_attention_is_the_reference(region):
    case = Case(5, region, torch.float32, "forward", "")
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(s, generator=generator) for s in (case.query_shape, case.key_shape, case.key_shape)]
    with torch.no_grad():
        result = peers.flex_attention(case, CPU)(*inputs)
    torch.testing.assert_close(result, point_to_region_attention(*inputs, region), rtol=0, atol=1e-5)


def test_every_backend_of_this_machine_and_every_peer_is_run():
    found = peers.implementations(Case(8, (1, 3, 3), torch.float32, "forward+backward", ""), CPU)
    names = [way.name for way in found]
    assert len(set(names)) == len(names)
    for backend, reason in peers.available_backends(CPU, torch.float32).items():
        assert (f"llava_st_ops, {backend}" in names) == (not reason)
    assert {way.role for way in found} >= {"reference", "peer"}
    assert all(way.attention is not None or way.reason for way in found)


def test_truth_in_slices_is_the_reference_in_one_piece():
    region = (5, 3, 3)
    inputs = tensors(region, torch.float32)
    grad_output = torch.randn(inputs[0].shape)
    found = parity.truth(*inputs, grad_output, region)
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    output = point_to_region_attention(*doubles, region)
    expected = (output, *torch.autograd.grad(output, doubles, grad_output.double()))
    for (name, result), right in zip(found.items(), expected, strict=True):
        torch.testing.assert_close(result, right, rtol=0, atol=1e-12, msg=name)


def test_errors_are_the_largest_and_a_value_that_is_not_finite_is_refused():
    expected = torch.zeros(1, 3, 2, dtype=torch.float64)
    result = torch.tensor([[[0.0, 1], [2, -5], [0, 3]]])
    assert parity.max_abs_error(result, expected) == 5
    result[0, 1, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        parity.max_abs_error(result, expected)
    with pytest.raises(ValueError, match="shape"):
        parity.max_abs_error(result[:, :2], expected)


def test_tolerance_is_twice_the_references_error_and_one_rounding_step():
    expected = {"output": torch.tensor([-4.0])}
    step = 4 * torch.finfo(torch.bfloat16).eps
    of_reference = {"output": 0.01}
    assert parity.within_tolerance({"output": 0.02 + step}, of_reference, expected, torch.bfloat16)
    assert not parity.within_tolerance({"output": 0.021 + step}, of_reference, expected, torch.bfloat16)
    assert parity.over_reference({"output": 0.03}, of_reference) == pytest.approx(3)
    assert parity.over_reference({"output": 0.03}, {"output": 0.0}) is None


def test_published_packer_is_ours_with_the_same_weights():
    published = seeded(visual_dim=24, embed_dim=32, num_heads=4).double()
    ours = SpatialTemporalPacker(24, 32, 4).double()
    ours.load_state_dict(published.state_dict())
    features = torch.randn(2, 10, 27, 27, 24, dtype=torch.float64)
    for result, expected in zip(ours(features), published(features), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)


def test_seeded_weights_are_the_same_in_every_run_and_leave_the_global_generator_alone():
    state = torch.get_rng_state()
    first, second = (seeded(8, 16, 2).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], second[name]) for name in first)
