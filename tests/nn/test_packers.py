"""The packer modules against vectors of the published implementation, and their behaviour as modules."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from llava_st_ops import use_backend
from llava_st_ops.nn import PointToRegionPacker, SpatialTemporalPacker

GOLDEN = Path(__file__).parents[1] / "golden"


def load_golden(name):
    """The tensors and the configuration of a golden file, and a packer with its parameters."""
    path = GOLDEN / f"{name}.safetensors"
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
    packer = SpatialTemporalPacker(
        config["visual_dim"],
        config["embed_dim"],
        config["num_heads"],
        temporal_factor=config["temporal_factor"],
    ).double()
    packer.load_state_dict({key[len("param.") :]: t for key, t in tensors.items() if key.startswith("param.")})
    return tensors, config, packer


def clean_name(published):
    """What a published parameter is called in the module: through its own renaming."""
    state = {published: None}
    for name, child in (("token_packer.", "spatial"), ("token_packer_slow.", "slow"), ("token_packer_fast.", "fast")):
        if published.startswith(name):
            SpatialTemporalPacker._accept_published_names(None, state, "")
            PointToRegionPacker._accept_published_names(None, state, f"{child}.")
    return next(iter(state))


def assert_close_to_golden(actual, expected, what):
    """To 1e-9 of the largest entry; gradients that vanish analytically are compared absolutely."""
    bound = max(1e-9 * expected.abs().max().item(), 1e-9 if what.startswith("grad") else 0.0)
    error = (actual.reshape(expected.shape) - expected).abs().max().item()
    assert error <= bound, f"{what}: {error} > {bound}"


@pytest.mark.parametrize("execution", ["direct", "folded"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", ["packer_video_small", "packer_image"])
def test_golden_vectors(name, backend, execution):
    tensors, config, packer = load_golden(name)
    packer.execution = execution
    grid = config["grid"]
    features = tensors["input.image_features"].unflatten(1, (grid, grid)).unsqueeze(0).requires_grad_()
    with use_backend(backend):
        slow, fast = packer(features)
        loss = (slow.flatten() @ tensors["cotangent.slow"].flatten()) + (
            fast.flatten() @ tensors["cotangent.fast"].flatten()
        )
        loss.backward()
    assert_close_to_golden(packer.spatial(features), tensors["output.packed"], "packed")
    assert_close_to_golden(slow, tensors["output.slow"], "slow")
    assert_close_to_golden(fast, tensors["output.fast"], "fast")
    assert_close_to_golden(features.grad, tensors["grad.image_features"], "grad of the features")
    parameters = dict(packer.named_parameters())
    published = [key[len("param.") :] for key in tensors if key.startswith("param.")]
    assert len(published) == len(parameters)
    for key in published:
        assert_close_to_golden(parameters[clean_name(key)].grad, tensors[f"grad.{key}"], f"grad of {key}")


def test_published_names_load_at_any_depth():
    tensors, _, packer = load_golden("packer_image")
    published = {f"model.resampler.{key[len('param.') :]}": t for key, t in tensors.items() if key.startswith("param.")}
    outer = torch.nn.ModuleDict(
        {"model": torch.nn.ModuleDict({"resampler": SpatialTemporalPacker(24, 32, 4)})}
    ).double()
    outer.load_state_dict(published)
    for name, value in packer.state_dict().items():
        assert torch.equal(outer.state_dict()[f"model.resampler.{name}"], value)


def test_own_names_round_trip_and_unknown_names_are_reported():
    packer = SpatialTemporalPacker(8, 16, 2)
    state = packer.state_dict()
    assert not any("devide" in name or name.startswith("token_packer") for name in state)
    SpatialTemporalPacker(8, 16, 2).load_state_dict(state)
    state["slow.to_x.weight"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="slow.to_x.weight"):
        packer.load_state_dict(state)


def test_published_size_and_initialisation():
    packer = PointToRegionPacker(3584, 1024, 8, (1, 3, 3))
    assert sum(p.numel() for p in packer.parameters()) == 22_036_480
    for name, parameter in packer.named_parameters():
        if "norm" in name:
            assert (parameter == (1 if name.endswith("weight") else 0)).all()
        elif name.endswith("bias"):
            assert not parameter.any()
        else:
            expected = (6 / (3 * 1024 + 1024)) ** 0.5 / 3**0.5 if name == "in_proj_weight" else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("shape", "slow_shape", "fast_shape"),
    [
        ((1, 10, 27, 27, 8), (1, 2, 9, 9, 8), (1, 10, 3, 3, 8)),
        ((2, 7, 27, 27, 8), (2, 2, 9, 9, 8), (2, 7, 3, 3, 8)),
        ((1, 1, 27, 27, 8), (1, 1, 9, 9, 8), (1, 1, 3, 3, 8)),  # a single frame
        ((1, 3, 10, 17, 8), (1, 1, 4, 6, 8), (1, 3, 2, 2, 8)),  # partial regions
        ((0, 3, 9, 9, 8), (0, 1, 3, 3, 8), (0, 3, 1, 1, 8)),
    ],
)
def test_any_shape(shape, slow_shape, fast_shape):
    packer = SpatialTemporalPacker(8, 16, 2)
    features = torch.randn(shape)
    slow, fast = packer(features)
    assert slow.shape == slow_shape
    assert fast.shape == fast_shape
    with use_backend("reference"):
        for actual, expected in zip((slow, fast), packer(features), strict=True):
            torch.testing.assert_close(actual, expected)


def test_other_factors():
    packer = SpatialTemporalPacker(8, 16, 2, spatial_factor=2, temporal_factor=4, fast_factor=4)
    slow, fast = packer(torch.randn(1, 8, 16, 16, 8))
    assert slow.shape == (1, 2, 8, 8, 8)
    assert fast.shape == (1, 8, 2, 2, 8)


def test_every_parameter_gets_a_gradient():
    """Key biases cancel in the softmax: their gradient is zero and not None, which DistributedDataParallel needs."""
    packer = SpatialTemporalPacker(8, 16, 2)
    slow, fast = packer(torch.randn(1, 5, 9, 9, 8))
    (slow.sum() + fast.sum()).backward()
    assert all(p.grad is not None for p in packer.parameters())
    key_bias = packer.spatial.in_proj_bias.grad.chunk(3)[1]
    assert key_bias.abs().max() < 1e-5


def test_compiles_without_a_graph_break_and_under_autocast():
    packer = PointToRegionPacker(8, 16, 2, (1, 3, 3))
    features = torch.randn(1, 2, 9, 9, 8)
    torch.testing.assert_close(torch.compile(packer, fullgraph=True)(features), packer(features))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert packer(features).isfinite().all()


def test_bad_arguments():
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads, 3, got 16"):
        PointToRegionPacker(8, 16, 3, (1, 3, 3))
    with pytest.raises(ValueError, match="x must have 5 dimensions"):
        SpatialTemporalPacker(8, 16, 2)(torch.randn(3, 9, 9, 8))
